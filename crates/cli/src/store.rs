//! A connection to the XenStore as the handshakes of `gnttab-io` want it, and as a role waits on it.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use gnttab_io::xenbus::{Store, Tx};
use gnttab_xenstore::client::{Client, Error, Nodes as _, Watch};
use gnttab_xenstore::perms::{Access, Perms};
use gnttab_xenstore::wire::TxId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// See the module.
#[derive(Debug)]
pub(crate) struct StoreClient {
    client: Client<UnixStream>,
    watches: Vec<(String, Watch)>,
}

/// One thing, in or out of a transaction.
macro_rules! within {
    ($self:ident, $tx:ident, $nodes:ident => $body:expr) => {
        match TxId::new($tx.0) {
            None => {
                let $nodes = &mut $self.client;
                $body
            }
            Some(tx) => {
                let $nodes = &mut $self.client.within(tx);
                $body
            }
        }
    };
}

impl StoreClient {
    /// Speaks through this connection.
    pub(crate) fn new(client: Client<UnixStream>) -> Self {
        StoreClient {
            client,
            watches: Vec::new(),
        }
    }

    /// Waits until a watched node may have changed, `bell` is readable, `hang_up` has hung up, or `patience` is over.
    /// Which of them it was is for the caller to look up.
    pub(crate) fn wait(
        &mut self,
        bell: BorrowedFd<'_>,
        hang_up: BorrowedFd<'_>,
        patience: Duration,
    ) -> Result<(), Error> {
        if self.take_events()? {
            return Ok(());
        }
        let mut wait = [
            PollFd::from_borrowed_fd(self.client.stream().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(bell, PollFlags::IN),
            // What can be read there is for others.
            PollFd::from_borrowed_fd(hang_up, PollFlags::empty()),
        ];
        let patience = Timespec::try_from(patience).ok();
        match poll(&mut wait, patience.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::Io(errno.into())),
        }
        self.take_events().map(drop)
    }

    /// Takes the events that have come; whether there were any.
    fn take_events(&mut self) -> Result<bool, Error> {
        let mut any = false;
        while self.client.next_event(Some(Instant::now()))?.is_some() {
            any = true;
        }
        Ok(any)
    }
}

impl Store for StoreClient {
    type Error = Error;

    fn read(&mut self, tx: Tx, path: &str) -> Result<Option<Vec<u8>>, Error> {
        within!(self, tx, nodes => nodes.read_if_there(path))
    }

    fn write(&mut self, tx: Tx, path: &str, value: &[u8]) -> Result<(), Error> {
        within!(self, tx, nodes => nodes.write(path, value))
    }

    fn remove(&mut self, tx: Tx, path: &str) -> Result<(), Error> {
        match within!(self, tx, nodes => nodes.rm(path)) {
            Err(error) if error.errno() == Some(gnttab_xenstore::Errno::ENOENT) => Ok(()),
            other => other,
        }
    }

    fn directory(&mut self, tx: Tx, path: &str) -> Result<Option<Vec<String>>, Error> {
        match within!(self, tx, nodes => nodes.directory(path)) {
            Ok(names) => Ok(Some(names)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn set_permissions(&mut self, tx: Tx, path: &str, owner: DomId, readers: &[DomId]) -> Result<(), Error> {
        let owned = Perms::new(owner.0.into(), Access::None);
        let perms = readers
            .iter()
            .fold(owned, |perms, reader| perms.with(reader.0.into(), Access::Read));
        within!(self, tx, nodes => nodes.set_perms(path, &perms))
    }

    fn begin(&mut self) -> Result<Tx, Error> {
        self.client.begin().map(|tx| Tx(tx.get()))
    }

    fn end(&mut self, tx: Tx, commit: bool) -> Result<bool, Error> {
        TxId::new(tx.0).map_or(Ok(true), |tx| self.client.end(tx, commit))
    }

    fn watch(&mut self, path: &str) -> Result<(), Error> {
        let watch = self.client.watch(path)?;
        self.watches.push((path.to_owned(), watch));
        Ok(())
    }

    fn unwatch(&mut self, path: &str) -> Result<(), Error> {
        match self.watches.iter().position(|(watched, _)| watched == path) {
            Some(index) => self.client.unwatch(self.watches.swap_remove(index).1),
            None => Ok(()),
        }
    }
}
