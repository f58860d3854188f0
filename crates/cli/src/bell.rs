//! An eventfd that wakes a thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// See the module. Clones are the same bell.
#[derive(Debug, Clone)]
pub(crate) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Bell(Arc::new(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?)))
    }

    /// Wakes whoever polls it.
    pub(crate) fn ring(&self) {
        // It can only fail when the counter is full, and then the thread is being woken.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }

    /// Whether somebody rang since it was made silent.
    pub(crate) fn is_ringing(&self) -> bool {
        let mut look = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut look, Some(&Timespec::default())).is_ok_and(|ringing| ringing > 0)
    }

    /// Makes it silent until the next ring.
    pub(crate) fn hush(&self) {
        // It can only fail when nobody rang.
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
