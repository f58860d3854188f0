//! Ends of event channels.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use gnttab_abi::{DomId, Errno};
use gnttab_io::grants::Notify;

use super::{Domain, Hosting};
use crate::protocol::{self, NoticeKind};
use crate::sys::EventPort;

/// One end of an event channel. Clones are the same end; when the last goes, the port is given up, which
/// the peer sees as a hang-up.
#[derive(Clone, Debug)]
pub struct Port(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    domain: Arc<Domain>,
    number: u32,
    end: EventPort,
}

impl Domain {
    /// Makes an event channel to `peer`, which takes its end by this port's number.
    ///
    /// # Errors
    /// [`Errno::NoMem`] if there are too many, [`Errno::Inval`] for what can be no domain.
    pub fn new_port(self: &Arc<Self>, peer: DomId) -> Result<Port, Errno> {
        let number = self.host_call(protocol::CALL_PORT_NEW, peer.0.into(), 0)?;
        self.port(number)
    }

    /// Takes the end of an event channel that `peer` made for this domain.
    ///
    /// # Errors
    /// [`Errno::Srch`] if there is no such domain, [`Errno::Inval`] if it made no such port for this one.
    pub fn bind_port(self: &Arc<Self>, peer: DomId, remote: u32) -> Result<Port, Errno> {
        let number = self.host_call(protocol::CALL_PORT_BIND, peer.0.into(), remote.into())?;
        self.port(number)
    }

    fn port(self: &Arc<Self>, number: u64) -> Result<Port, Errno> {
        let ends = self.received(NoticeKind::Port, number)?;
        let [incoming, outgoing] = <[_; 2]>::try_from(ends).map_err(|_| Errno::Io)?;
        let end = EventPort::from_descriptors(incoming, outgoing);
        let number = u32::try_from(number).map_err(|_| Errno::Io)?;
        let domain = Arc::clone(self);
        Ok(Port(Arc::new(Inner { domain, number, end })))
    }
}

impl Port {
    /// Its number, by which the peer takes the other end.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// Tells the peer. A peer that has gone is no error; [`Self::take`] tells.
    pub fn send(&self) {
        let _ = self.0.end.send();
    }

    /// Takes what has come: whether the peer has sent anything since the last time. Never waits.
    ///
    /// # Errors
    /// `EPIPE` when nothing has come and the peer has gone.
    pub fn take(&self) -> Result<bool, rustix::io::Errno> {
        self.0.end.take()
    }
}

impl AsFd for Port {
    /// What to poll: readable while an event is pending, hung up when the peer has gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.end.as_fd()
    }
}

impl Notify for Port {
    fn notify(&mut self) {
        self.send();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Without a monitor there is nobody to tell.
        let _ = self
            .domain
            .host_call(protocol::CALL_PORT_CLOSE, self.number.into(), 0);
    }
}
