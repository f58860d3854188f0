//! A connection to the XenStore as the handshakes of `gnttab-io` want it, and as a role waits on it.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use gnttab_io::xenbus::{Store, Tx};
use gnttab_xenstore::client::{Client, Error, Nodes as _, Transport, Watch};
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

    fn take_events(&mut self) -> Result<bool, Error> {
        take_events(&mut self.client)
    }
}

/// Events taken before the store is looked at again: a peer may write what is watched as fast as it likes.
const MOST_EVENTS: usize = 256;

/// Takes the events that have come, as far as they are not too many; whether there were any.
fn take_events(client: &mut Client<impl Transport>) -> Result<bool, Error> {
    for taken in 0..MOST_EVENTS {
        if client.next_event(Some(Instant::now()))?.is_none() {
            return Ok(taken > 0);
        }
    }
    Ok(true)
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::{self, Read, Write};
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// A store that agrees to the first request, a watch, and then sends events of it without end.
    struct Endless(VecDeque<u8>);

    impl Endless {
        fn say(&mut self, kind: u32, request: u32, payload: &[u8]) {
            let length = u32::try_from(payload.len()).unwrap();
            for word in [kind, request, 0, length] {
                self.0.extend(word.to_ne_bytes());
            }
            self.0.extend(payload);
        }
    }

    impl Read for Endless {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                self.say(15, 0, b"/local/domain/5/device/vbd/51712/state\x001\0");
            }
            self.0.read(into)
        }
    }

    impl Write for Endless {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Transport for Endless {
        fn wait_readable(&self, _: Duration) -> io::Result<bool> {
            Ok(true)
        }
    }

    /// XSA-349: a peer that writes a watched node without end does not keep a domain from its other work.
    #[test]
    fn events_without_end_are_taken_a_few_at_a_time() {
        let mut store = Endless(VecDeque::new());
        store.say(4, 1, b"OK\0");
        let mut client = Client::new(store);
        client.watch("/local/domain/5/device/vbd/51712/state").unwrap();
        let (done, end) = mpsc::channel();
        thread::spawn(move || {
            let _ = done.send(take_events(&mut client).unwrap());
        });
        assert_eq!(end.recv_timeout(Duration::from_secs(20)), Ok(true));
    }
}
