//! A client: blocking, over any stream.
//!
//! [`Client`] speaks to a store through one stream, usually the socket that
//! the monitor gave its domain. Reading and writing nodes is in the trait
//! [`Nodes`], because it is the same within a transaction.
//!
//! A client makes no system calls but those of its stream. With a Unix socket
//! on Linux these are `sendto`, `recvfrom`, and `ppoll` where there is a
//! deadline, all on that one descriptor; so a domain process may be confined to
//! them.

mod error;
mod nodes;
mod transport;

pub use error::Error;
pub use nodes::Nodes;
pub use transport::Transport;

use crate::path::Place;
use crate::queue::Queue;
use crate::wire::{self, Framer, Kind, Message, Reply, Request, Token, TxId};
use crate::{DomId, Errno};
use error::describe;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, Instant};

/// Events that wait here until they are asked for. Past it the events of one
/// watch are merged into one for the whole of what it watches.
const PENDING_EVENTS: usize = 4096;

/// How often a transaction is tried again before it is given up.
const ATTEMPTS: u32 = 64;

/// A watch that this client has set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Watch(u64);

impl Watch {
    fn token(self) -> Token {
        Token::new(self.0.to_string().as_bytes()).expect("digits have no NUL")
    }

    fn of(token: &Token) -> Option<Self> {
        wire::decimal(token.as_bytes()).map(Watch)
    }
}

/// Something changed, or a watch was just set.
///
/// Events may come without a change, and several changes may make one event.
/// So an event is a reason to look, and what is found counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Which watch it is of.
    pub watch: Watch,
    /// The node that changed, relative if the watch was; or what is watched.
    pub place: Place,
}

/// A connection to a store.
///
/// ```
/// use gnttab_xenstore::client::{Client, Nodes as _};
/// use gnttab_xenstore::server::Server;
/// use gnttab_xenstore::{DomId, Quotas};
/// use std::os::unix::net::UnixStream;
///
/// let server = Server::new(Quotas::default()).spawn()?;
/// let (mine, theirs) = UnixStream::pair()?;
/// server.add_connection(theirs, DomId::DOM0)?;
///
/// let mut client = Client::new(mine);
/// client.write("/tool/greeting", "hello")?;
/// assert_eq!(client.directory("/tool")?, ["greeting"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Client<S = UnixStream> {
    stream: S,
    framer: Framer,
    last_req: u32,
    watches: BTreeMap<Watch, Place>,
    last_watch: u64,
    events: Queue<Watch, Place>,
    patience: Option<Duration>,
    /// An answer is missing or was none: nothing that follows can be trusted
    /// to be what it seems.
    broken: bool,
}

impl Client<UnixStream> {
    /// Connects to the socket of a store; for the control domain.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`], with the path.
    pub fn connect(socket: impl AsRef<FilePath>) -> Result<Self, Error> {
        let socket: PathBuf = socket.as_ref().into();
        match UnixStream::connect(&socket) {
            Ok(stream) => Ok(Client::new(stream)),
            Err(source) => Err(Error::Connect { socket, source }),
        }
    }
}

impl<S: Transport> Client<S> {
    /// Speaks through a stream that is connected to a store already. The
    /// stream has to block.
    pub fn new(stream: S) -> Self {
        Client {
            stream,
            framer: Framer::new(),
            last_req: 0,
            watches: BTreeMap::new(),
            last_watch: 0,
            events: Queue::new(PENDING_EVENTS),
            patience: None,
            broken: false,
        }
    }

    /// How long to wait for an answer; for ever if none. After an answer that
    /// did not come in time the connection is of no use any more.
    pub fn set_reply_timeout(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// The stream, to wait for events together with other things: when it is
    /// readable, call [`next_event`](Self::next_event) with a deadline that has
    /// passed, until there is none.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    // ---- watches -----------------------------------------------------------------

    /// Watches a node with all below it, or a special name. An event comes at
    /// once, and then one for every change.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with `E2BIG` if the quota of watches is used up.
    pub fn watch(&mut self, path: &str) -> Result<Watch, Error> {
        let place = nodes::place(path)?;
        self.last_watch += 1;
        let watch = Watch(self.last_watch);
        // First, because the event may come before the answer is read.
        self.watches.insert(watch, place.clone());
        let result = nodes::done(
            self,
            &Request::Watch {
                place,
                token: watch.token(),
            },
        );
        if result.is_err() {
            self.forget(watch);
        }
        result.map(|()| watch)
    }

    /// Ends a watch. None of its events come afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with `ENOENT` if it has been ended before.
    pub fn unwatch(&mut self, watch: Watch) -> Result<(), Error> {
        let Some(place) = self.watches.get(&watch).cloned() else {
            let token = watch.token();
            return Err(Error::Refused {
                request: format!("UNWATCH {token}"),
                errno: Errno::ENOENT,
            });
        };
        let result = nodes::done(
            self,
            &Request::Unwatch {
                place,
                token: watch.token(),
            },
        );
        self.forget(watch);
        result
    }

    /// Drops all watches and all transactions of this connection.
    ///
    /// # Errors
    ///
    /// As every request.
    pub fn reset_watches(&mut self) -> Result<(), Error> {
        nodes::done(self, &Request::ResetWatches)?;
        for watch in std::mem::take(&mut self.watches).into_keys() {
            self.events.remove(&watch);
        }
        Ok(())
    }

    /// The next event of any watch. Waits until the deadline, or for ever if
    /// there is none, and gives `None` if none came.
    ///
    /// # Errors
    ///
    /// As every request.
    pub fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, Error> {
        self.next_event_of(deadline, |_| true)
    }

    /// Waits until a node's value is what is wanted.
    ///
    /// `accept` is shown the value, or `None` while the node is missing or
    /// hidden, at first and whenever it may have changed. What it gives ends the wait. Other watches'
    /// events are kept for [`next_event`](Self::next_event).
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], with the last value, when the deadline has passed.
    pub fn wait_for<T>(
        &mut self,
        path: &str,
        deadline: Instant,
        accept: impl FnMut(Option<&[u8]>) -> Option<T>,
    ) -> Result<T, Error> {
        let watch = self.watch(path)?;
        let result = self.wait_with(watch, path, deadline, accept);
        let ended = self.unwatch(watch);
        let value = result?;
        ended.map(|()| value)
    }

    fn wait_with<T>(
        &mut self,
        watch: Watch,
        path: &str,
        deadline: Instant,
        mut accept: impl FnMut(Option<&[u8]>) -> Option<T>,
    ) -> Result<T, Error> {
        loop {
            let value = match self.read(path) {
                Ok(value) => Some(value),
                Err(error) if error.is_missing() => None,
                Err(error) => return Err(error),
            };
            if let Some(result) = accept(value.as_deref()) {
                return Ok(result);
            }
            if self.next_event_of(Some(deadline), |of| *of == watch)?.is_none() {
                let value = value.map(|value| value.escape_ascii().to_string());
                return Err(Error::TimedOut {
                    path: path.to_owned(),
                    value,
                });
            }
        }
    }

    fn next_event_of(
        &mut self,
        deadline: Option<Instant>,
        wanted: impl Fn(&Watch) -> bool,
    ) -> Result<Option<Event>, Error> {
        loop {
            if let Some((watch, place)) = self.events.take(&wanted) {
                return Ok(Some(Event { watch, place }));
            }
            match self.receive(deadline)? {
                Some(message) if message.kind() == Some(Kind::WatchEvent) => {
                    self.keep_event(&message)?;
                }
                Some(message) => return Err(self.break_off(Error::Unexpected(message))),
                None => return Ok(None),
            }
        }
    }

    fn keep_event(&mut self, message: &Message) -> Result<(), Error> {
        let event = match wire::Event::parse(message) {
            Ok(event) => event,
            Err(error) => return Err(self.break_off(Error::Unexpected(error.0))),
        };
        // Of a watch just ended, events may still be on their way.
        if let Some(watch) = Watch::of(&event.token)
            && let Some(whole) = self.watches.get(&watch)
        {
            self.events.push(watch, event.place, whole.clone());
        }
        Ok(())
    }

    fn forget(&mut self, watch: Watch) {
        self.watches.remove(&watch);
        self.events.remove(&watch);
    }

    // ---- transactions ------------------------------------------------------------

    /// Does several things at once: others see all of it or none, and it sees
    /// none of what others do meanwhile.
    ///
    /// If others changed what `body` used, it is run again, a limited number of
    /// times; it should do nothing but use the nodes it is given. If it fails,
    /// nothing of it remains.
    ///
    /// # Errors
    ///
    /// What `body` gives; [`Error::Conflict`] if others always came in between.
    pub fn transaction<T>(
        &mut self,
        mut body: impl FnMut(&mut Transaction<'_, S>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for _ in 0..ATTEMPTS {
            let tx = self.begin()?;
            match body(&mut self.within(tx)) {
                Ok(value) if self.end(tx, true)? => return Ok(value),
                Ok(_) => {}
                Err(error) => {
                    // If that fails too, the first error says more.
                    let _ = self.end(tx, false);
                    return Err(error);
                }
            }
        }
        Err(Error::Conflict { attempts: ATTEMPTS })
    }

    /// Begins a transaction that [`end`](Self::end) is to end, for those to
    /// whom [`transaction`](Self::transaction) does not fit.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with `ENOSPC` if the quota of open ones is used up.
    pub fn begin(&mut self) -> Result<TxId, Error> {
        match self.ask(None, &Request::TransactionStart)? {
            Reply::Transaction(tx) => Ok(tx),
            _ => Err(self.break_off(Error::Closed)),
        }
    }

    /// The nodes as an open transaction sees them.
    pub fn within(&mut self, tx: TxId) -> Transaction<'_, S> {
        Transaction { client: self, tx }
    }

    /// Ends a transaction. `false`: others changed what it used, nothing of it
    /// was done, and it has to be begun again.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with `ENOENT` if it is not open, with `ENOSPC` if
    /// there is no room any more for what it was to do.
    pub fn end(&mut self, tx: TxId, commit: bool) -> Result<bool, Error> {
        match self.ask(Some(tx), &Request::TransactionEnd { commit }) {
            Ok(_) => Ok(true),
            Err(error) if error.errno() == Some(Errno::EAGAIN) => Ok(false),
            Err(error) => Err(error),
        }
    }

    // ---- domains -----------------------------------------------------------------

    /// Where the home of a domain is.
    ///
    /// # Errors
    ///
    /// As every request.
    pub fn domain_path(&mut self, dom: DomId) -> Result<String, Error> {
        match self.ask(None, &Request::GetDomainPath(dom))? {
            Reply::DomainPath(path) => Ok(path.to_string()),
            _ => Err(self.break_off(Error::Closed)),
        }
    }

    // ---- messages ----------------------------------------------------------------

    /// Sends a request and waits for its answer; events that come before it are kept.
    fn ask(&mut self, tx: Option<TxId>, request: &Request) -> Result<Reply, Error> {
        if self.broken {
            return Err(Error::Closed);
        }
        self.last_req = self.last_req.wrapping_add(1);
        let message = request
            .encode(self.last_req, tx)
            .map_err(|source| Error::TooLong {
                request: describe(request),
                source,
            })?;
        if let Err(error) = self.stream.write_all(&message.to_bytes()) {
            return Err(self.break_off(error.into()));
        }
        let deadline = self.patience.map(|patience| Instant::now() + patience);
        loop {
            let Some(answer) = self.receive(deadline)? else {
                return Err(self.break_off(Error::NoAnswer {
                    request: describe(request),
                }));
            };
            if answer.kind() == Some(Kind::WatchEvent) {
                self.keep_event(&answer)?;
                continue;
            }
            let fits = answer.req_id() == message.req_id()
                && (answer.kind() == message.kind() || answer.kind() == Some(Kind::Error));
            return match Reply::parse(&answer) {
                Ok(Reply::Error(errno)) if fits => Err(Error::Refused {
                    request: describe(request),
                    errno,
                }),
                Ok(reply) if fits => Ok(reply),
                _ => Err(self.break_off(Error::Unexpected(answer))),
            };
        }
    }

    /// The next message, or none by the deadline.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<Message>, Error> {
        if self.broken {
            return Err(Error::Closed);
        }
        loop {
            let read = match self.is_readable(deadline) {
                Ok(true) => self.stream.read(self.framer.space()),
                Ok(false) => return Ok(None),
                Err(error) => Err(error),
            };
            match read {
                Ok(0) => return Err(self.break_off(Error::Closed)),
                Ok(n) => match self.framer.advance(n) {
                    Ok(None) => {}
                    Ok(Some(message)) => return Ok(Some(message)),
                    Err(source) => return Err(self.break_off(Error::NoMessage(source))),
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.break_off(error.into())),
            }
        }
    }

    /// Waits until reading will not block past the deadline.
    fn is_readable(&self, deadline: Option<Instant>) -> io::Result<bool> {
        let Some(deadline) = deadline else { return Ok(true) };
        self.stream
            .wait_readable(deadline.saturating_duration_since(Instant::now()))
    }

    fn break_off(&mut self, error: Error) -> Error {
        self.broken = true;
        error
    }
}

impl<S: Transport> Nodes for Client<S> {
    fn request(&mut self, request: &Request) -> Result<Reply, Error> {
        self.ask(None, request)
    }
}

/// A transaction in the making: nodes as they were at its start, with its own
/// changes. See [`Client::transaction`].
#[derive(Debug)]
pub struct Transaction<'c, S = UnixStream> {
    client: &'c mut Client<S>,
    tx: TxId,
}

impl<S: Transport> Nodes for Transaction<'_, S> {
    fn request(&mut self, request: &Request) -> Result<Reply, Error> {
        self.client.ask(Some(self.tx), request)
    }
}
