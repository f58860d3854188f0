use crate::wire::{Framer, Message, PayloadTooLong};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes that may wait to be sent before no more requests are taken. One
/// answer or event may be added beyond it.
const OUT_LIMIT: usize = 64 * 1024;

/// Why a connection is given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the other end has closed")]
    Closed,
    #[error("the other end has closed amid a message")]
    ClosedMidway,
    #[error("what came is no message")]
    NoMessage(#[from] PayloadTooLong),
    #[error("the socket failed")]
    Failed(#[from] Errno),
    #[error("the domain was released")]
    Released,
}

/// One connection: its socket, the message on the way in, the bytes on the way
/// out.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    framer: Framer,
    out: VecDeque<u8>,
}

impl Link {
    /// The socket must not block.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Link {
            socket,
            framer: Framer::new(),
            out: VecDeque::new(),
        }
    }

    /// Whether so much waits to be sent that nothing more may be added.
    pub(super) fn is_full(&self) -> bool {
        self.out.len() >= OUT_LIMIT
    }

    pub(super) fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// The next message, or none if it is not here yet.
    pub(super) fn receive(&mut self) -> Result<Option<Message>, Lost> {
        loop {
            match rustix::io::read(&self.socket, self.framer.space()) {
                Ok(0) if self.framer.is_midway() => return Err(Lost::ClosedMidway),
                Ok(0) => return Err(Lost::Closed),
                Ok(n) => {
                    if let Some(message) = self.framer.advance(n)? {
                        return Ok(Some(message));
                    }
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Adds a message to what is to be sent.
    pub(super) fn push(&mut self, message: &Message) {
        self.out.extend(message.to_bytes());
    }

    /// Sends what can be sent now.
    pub(super) fn flush(&mut self) -> Result<(), Lost> {
        while !self.out.is_empty() {
            match send(&self.socket, self.out.as_slices().0, SendFlags::NOSIGNAL) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
