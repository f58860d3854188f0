//! Event channels: one bit of news from one domain to another, without the monitor.
//!
//! A channel is two pipes, one a direction; sending is a byte written, taking is the pipe emptied.
//! Why not eventfds: both sides would hold the same open file, so a hostile peer could clear its
//! `O_NONBLOCK`, fill its counter and leave the other side waiting in `write(2)` or `read(2)` for ever.
//! The ends of a pipe are two open files; what a peer does to its own end changes nothing of ours.
//! A full pipe means that the news is pending already. A peer that has gone shows as a hang-up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::pipe::{self, PipeFlags};

/// One domain's end of an event channel.
#[derive(Debug)]
pub struct EventPort {
    incoming: OwnedFd,
    outgoing: OwnedFd,
}

impl EventPort {
    /// The two ends of a new channel.
    ///
    /// # Errors
    /// The kernel's, when descriptors or memory have run out.
    pub fn pair() -> Result<(EventPort, EventPort), Errno> {
        let pipe = || {
            let ends = pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            // One page is enough; the kernel rations a user's pipe pages. It may refuse, that is fine.
            let _ = pipe::fcntl_setpipe_size(&ends.1, gnttab_abi::PAGE_SIZE);
            Ok(ends)
        };
        let ((to_one, from_other), (to_other, from_one)): ((OwnedFd, OwnedFd), (OwnedFd, OwnedFd)) =
            (pipe()?, pipe()?);
        Ok((
            EventPort {
                incoming: to_one,
                outgoing: from_one,
            },
            EventPort {
                incoming: to_other,
                outgoing: from_other,
            },
        ))
    }

    /// Puts an end together from the descriptors that the monitor sent: what comes in, what goes out.
    #[must_use]
    pub fn from_descriptors(incoming: OwnedFd, outgoing: OwnedFd) -> EventPort {
        EventPort { incoming, outgoing }
    }

    /// The descriptors of this end, to be sent to its domain: what comes in, what goes out.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.incoming.as_fd(), self.outgoing.as_fd()]
    }

    /// Keeps the sending half only: as long as somebody has it, the peer sees no hang-up.
    #[must_use]
    pub fn into_sending(self) -> OwnedFd {
        self.outgoing
    }

    /// Tells the peer. Several sends before it looks are one event. Never waits.
    ///
    /// # Errors
    /// `EPIPE` when the peer has gone.
    pub fn send(&self) -> Result<(), Errno> {
        match rustix::io::write(&self.outgoing, &[1]) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Takes what has come since the last time: whether the peer has sent anything. Never waits.
    ///
    /// # Errors
    /// `EPIPE` when nothing has come and the peer has gone.
    pub fn take(&self) -> Result<bool, Errno> {
        // The whole pipe in one read, so that a peer that floods it costs one call.
        let mut bytes = [0; gnttab_abi::PAGE_SIZE];
        match rustix::io::read(&self.incoming, &mut bytes) {
            Ok(0) => Err(Errno::PIPE),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for EventPort {
    /// What to poll for reading: it is readable while an event is pending, and hangs up with the peer.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.incoming.as_fd()
    }
}

/// What a [`Poller`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The number that the descriptor was added with.
    pub token: u64,
    /// There is something to read.
    pub readable: bool,
    /// The other side has gone, or the descriptor has failed.
    pub hung_up: bool,
}

/// Waits for several descriptors at once.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// Waits for nothing yet.
    ///
    /// # Errors
    /// The kernel's, when descriptors or memory have run out.
    pub fn new() -> Result<Poller, Errno> {
        Ok(Poller {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    /// Waits for `source` too, under a number of the caller's choice. As long as it is readable,
    /// each [`Self::wait`] says so.
    ///
    /// # Errors
    /// `EEXIST` when it is waited for already; the kernel's when memory has run out.
    pub fn add(&self, source: impl AsFd, token: u64) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(token);
        epoll::add(
            &self.epoll,
            source,
            data,
            epoll::EventFlags::IN | epoll::EventFlags::RDHUP,
        )
    }

    /// Waits for the end of `source` only: what it has to read is not told.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_end(&self, source: impl AsFd, token: u64) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(token);
        // A hang-up is always told.
        epoll::add(&self.epoll, source, data, epoll::EventFlags::empty())
    }

    /// Stops waiting for `source`. A descriptor that is closed everywhere leaves by itself.
    ///
    /// # Errors
    /// `ENOENT` when it was not waited for.
    pub fn remove(&self, source: impl AsFd) -> Result<(), Errno> {
        epoll::delete(&self.epoll, source)
    }

    /// Waits until something happens or `timeout` (none: for ever) has passed, and says what.
    /// Empty after the timeout, or when a signal came.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Vec<Event>, Errno> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let mut events = Vec::with_capacity(64);
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(events.into_iter().map(seen).collect())
    }
}

fn seen(event: epoll::Event) -> Event {
    let flags = event.flags;
    let gone = epoll::EventFlags::HUP | epoll::EventFlags::RDHUP | epoll::EventFlags::ERR;
    Event {
        token: event.data.u64(),
        readable: flags.contains(epoll::EventFlags::IN),
        hung_up: flags.intersects(gone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::OFlags;

    #[test]
    fn sends_before_a_look_are_one_event() {
        let (one, other) = EventPort::pair().unwrap();
        assert!(!other.take().unwrap());
        for _ in 0..3 {
            one.send().unwrap();
        }
        assert!(other.take().unwrap());
        assert!(!other.take().unwrap());
        assert!(!one.take().unwrap(), "an event must not come back to its sender");
    }

    /// The attack that eventfds fall to: a peer makes its end blocking and keeps it full.
    #[test]
    fn a_hostile_peer_cannot_make_sending_or_taking_wait() {
        let (one, hostile) = EventPort::pair().unwrap();
        for end in hostile.descriptors() {
            rustix::fs::fcntl_setfl(end, OFlags::empty()).unwrap();
        }
        for _ in 0..100_000 {
            one.send().unwrap();
        }
        assert!(!one.take().unwrap());
    }

    #[test]
    fn a_flood_is_taken_in_one_call() {
        let (one, other) = EventPort::pair().unwrap();
        for _ in 0..100_000 {
            one.send().unwrap();
        }
        assert!(other.take().unwrap());
        assert!(!other.take().unwrap());
    }

    #[test]
    fn several_channels_are_waited_for_at_once_and_a_peer_that_goes_is_seen() {
        let (one, other) = EventPort::pair().unwrap();
        let (second, other_second) = EventPort::pair().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(&other, 1).unwrap();
        poller.add(&other_second, 2).unwrap();
        assert_eq!(poller.wait(Some(Duration::from_millis(1))).unwrap(), []);
        second.send().unwrap();
        let events = poller.wait(None).unwrap();
        assert_eq!(
            events,
            [Event {
                token: 2,
                readable: true,
                hung_up: false
            }]
        );
        assert!(other_second.take().unwrap());
        drop(one);
        let events = poller.wait(None).unwrap();
        assert_eq!((events[0].token, events[0].hung_up), (1, true));
        assert_eq!(other.take().unwrap_err(), Errno::PIPE);
        assert_eq!(other.send().unwrap_err(), Errno::PIPE);
    }
}
