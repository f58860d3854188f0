//! Small messages, with descriptors, between the monitor and a domain.
//!
//! A `SOCK_SEQPACKET` socket keeps messages whole: one is received as it was sent or, if it does not
//! fit, refused ([`ChannelError::Cut`]). The monitor sends descriptors and never takes any; a
//! domain takes them and cannot send them on (its seccomp filter has no `sendmsg`).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Descriptors that one message may carry.
pub const MAX_DESCRIPTORS: usize = 32;

/// Why a message was not sent or not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// The other side has gone.
    #[error("the other side of the channel has closed it")]
    Closed,
    /// Sending: the other side does not take its messages. Receiving: there is none.
    #[error("the channel would have to wait")]
    WouldWait,
    /// A message or its descriptors did not fit; what came with it was closed.
    #[error("a message was longer than {limit} bytes or carried more than {MAX_DESCRIPTORS} descriptors")]
    Cut {
        /// Bytes that were expected at most.
        limit: usize,
    },
    /// More descriptors than a message may carry were to be sent.
    #[error("{count} descriptors were to be sent, a message carries at most {MAX_DESCRIPTORS}")]
    TooManyDescriptors {
        /// How many there were.
        count: usize,
    },
    /// Anything else: out of descriptors, out of memory.
    #[error("the channel failed: {0}")]
    Failed(Errno),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => ChannelError::WouldWait,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::CONNREFUSED => ChannelError::Closed,
            other => ChannelError::Failed(other),
        }
    }
}

/// What was received.
#[derive(Debug)]
pub struct Message {
    /// Bytes of the message, at the start of the buffer that was given.
    pub len: usize,
    /// The descriptors that came with it, in order.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of a channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Two connected ends.
    ///
    /// # Errors
    /// The kernel's, when descriptors or memory have run out.
    pub fn pair() -> Result<(Channel, Channel), Errno> {
        let (one, other) = net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel { socket: one }, Channel { socket: other }))
    }

    /// Takes over a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn from_socket(socket: OwnedFd) -> Channel {
        Channel { socket }
    }

    /// The same end once more: the other side sees it closed when all of them are.
    ///
    /// # Errors
    /// The kernel's, when descriptors have run out.
    pub fn try_clone(&self) -> Result<Channel, Errno> {
        Ok(Channel {
            socket: rustix::io::fcntl_dupfd_cloexec(&self.socket, 3)?,
        })
    }

    /// The socket.
    #[must_use]
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Sends one message without ever waiting: a peer that does not take its messages costs
    /// itself this one.
    ///
    /// # Errors
    /// Any [`ChannelError`] but `Cut`; nothing was sent then.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::TooManyDescriptors {
                count: descriptors.len(),
            });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(ChannelError::TooManyDescriptors {
                count: descriptors.len(),
            });
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        retry(|| net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags))?;
        Ok(())
    }

    /// Sends one message that carries nothing, without ever waiting: the way that is left to a
    /// confined domain.
    ///
    /// # Errors
    /// Any [`ChannelError`] but `Cut` and `TooManyDescriptors`; nothing was sent then.
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<(), ChannelError> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        retry(|| net::send(&self.socket, bytes, flags))?;
        Ok(())
    }

    /// Waits until there is a message or the end; false if `timeout` passed first.
    ///
    /// # Errors
    /// [`ChannelError::Failed`] with the kernel's error.
    pub fn wait(&self, timeout: Duration) -> Result<bool, ChannelError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let mut poll = [PollFd::new(&self.socket, PollFlags::IN)];
        Ok(retry(|| rustix::event::poll(&mut poll, Some(&timeout)))? > 0)
    }

    /// Whether the other side still holds its end.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let mut poll = [PollFd::new(&self.socket, PollFlags::empty())];
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(
            rustix::event::poll(&mut poll, Some(&none)),
            Ok(0) | Err(Errno::INTR)
        )
    }

    /// Closes both ways for both sides, whoever holds a descriptor of this end.
    pub fn hang_up(&self) {
        // A peer that has gone already has hung up first.
        let _ = net::shutdown(&self.socket, net::Shutdown::Both);
    }

    /// Receives one message with the descriptors it carries. Waits for it if `wait` says so.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end, [`ChannelError::WouldWait`] if there is none and `wait` is
    /// not set, [`ChannelError::Cut`] for a message that does not fit.
    pub fn receive(&self, buffer: &mut [u8], wait: bool) -> Result<Message, ChannelError> {
        let limit = buffer.len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC
            | if wait {
                RecvFlags::empty()
            } else {
                RecvFlags::DONTWAIT
            };
        let got = retry(|| net::recvmsg(&self.socket, &mut [IoSliceMut::new(buffer)], &mut control, flags))?;
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ChannelError::Cut { limit });
        }
        // No message of ours is empty: zero bytes are the end.
        if got.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        Ok(Message {
            len: got.bytes,
            descriptors,
        })
    }

    /// Receives one message and refuses descriptors: the kernel drops those that came with it
    /// before they become ours.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_bytes(&self, buffer: &mut [u8], wait: bool) -> Result<usize, ChannelError> {
        let limit = buffer.len();
        let flags = RecvFlags::TRUNC
            | if wait {
                RecvFlags::empty()
            } else {
                RecvFlags::DONTWAIT
            };
        // With TRUNC the second number is the message's own length.
        let (_, len) = retry(|| net::recv(&self.socket, &mut *buffer, flags))?;
        match len {
            0 => Err(ChannelError::Closed),
            len if len > limit => Err(ChannelError::Cut { limit }),
            len => Ok(len),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Does it again when a signal came between.
fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Backing, SealedMemory};
    use rustix::io::FdFlags;

    #[test]
    fn a_message_arrives_whole_with_its_descriptors_close_on_exec() {
        let (one, other) = Channel::pair().unwrap();
        let page = SealedMemory::new("test", 1, Backing::Lazy).unwrap();
        one.send(b"page", &[page.as_fd()]).unwrap();
        one.send(b"next", &[]).unwrap();
        let mut buffer = [0; 16];
        let message = other.receive(&mut buffer, false).unwrap();
        assert_eq!(&buffer[..message.len], b"page");
        let flags = rustix::io::fcntl_getfd(&message.descriptors[0]).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
        let message = other.receive(&mut buffer, false).unwrap();
        assert_eq!(
            (&buffer[..message.len], message.descriptors.len()),
            (&b"next"[..], 0)
        );
        assert_eq!(
            other.receive(&mut buffer, false).unwrap_err(),
            ChannelError::WouldWait
        );
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_and_the_next_one_is_whole() {
        let (one, other) = Channel::pair().unwrap();
        for receive_bytes in [false, true] {
            one.send(&[7; 20], &[]).unwrap();
            one.send(&[8; 16], &[]).unwrap();
            let mut buffer = [0; 16];
            let mut receive = || match receive_bytes {
                true => other.receive_bytes(&mut buffer, false),
                false => other.receive(&mut buffer, false).map(|message| message.len),
            };
            assert_eq!(receive().unwrap_err(), ChannelError::Cut { limit: 16 });
            assert_eq!(receive().unwrap(), 16);
        }
    }

    #[test]
    fn a_peer_that_does_not_take_its_messages_cannot_make_the_sender_wait() {
        let (one, _other) = Channel::pair().unwrap();
        let refused = (0..100_000).find_map(|_| one.send(&[0; 64], &[]).err());
        assert_eq!(refused, Some(ChannelError::WouldWait));
    }

    #[test]
    fn a_closed_peer_is_an_error_on_both_ways() {
        let (one, other) = Channel::pair().unwrap();
        assert!(one.is_connected());
        assert_eq!(one.wait(Duration::from_millis(1)), Ok(false));
        drop(other);
        assert!(!one.is_connected());
        assert_eq!(one.wait(Duration::from_secs(9)), Ok(true));
        assert_eq!(one.send_bytes(b"x").unwrap_err(), ChannelError::Closed);
        assert_eq!(one.send(b"x", &[]).unwrap_err(), ChannelError::Closed);
        assert_eq!(one.receive(&mut [0; 4], true).unwrap_err(), ChannelError::Closed);
        assert_eq!(
            one.receive_bytes(&mut [0; 4], true).unwrap_err(),
            ChannelError::Closed
        );
    }

    #[test]
    fn descriptors_that_nobody_asked_for_never_become_ours() {
        let (one, other) = Channel::pair().unwrap();
        // Sockets tell the end of their peer: when the only copy was dropped in flight, `kept` sees it.
        let (sent, kept) = Channel::pair().unwrap();
        one.send(b"take this", &[sent.as_fd()]).unwrap();
        drop(sent);
        assert_eq!(other.receive_bytes(&mut [0; 16], false).unwrap(), 9);
        assert_eq!(kept.receive(&mut [0; 4], true).unwrap_err(), ChannelError::Closed);
    }
}
