use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A stream of bytes to a store and back, that can be waited for.
///
/// A Unix socket is one; so can be anything else that carries bytes in order,
/// as the ring page between a guest and the store.
pub trait Transport: Read + Write {
    /// Waits until there is something to read, or the other end has gone.
    /// `false` if that was not so within the time.
    ///
    /// # Errors
    ///
    /// What the operating system says; `Interrupted` makes the caller try again.
    fn wait_readable(&self, timeout: Duration) -> io::Result<bool>;
}

impl Transport for UnixStream {
    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        // A time too long to be expressed is as good as for ever.
        let timeout = Timespec::try_from(timeout).ok();
        let ready = poll(&mut [PollFd::new(self, PollFlags::IN)], timeout.as_ref())?;
        Ok(ready > 0)
    }
}
