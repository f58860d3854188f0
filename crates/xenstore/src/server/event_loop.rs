use super::fairness::Fairness;
use super::link::{Link, Lost};
use super::listener::Listener;
use super::{ServerError, Task};
use crate::store::{ConnId, Effect, Store};
use crate::wire::Kind;
use crate::{DomId, Errno, Quotas};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno as OsErrno;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Requests taken from one connection before the others have their turn, and
/// the time after which it is over even earlier.
const REQUESTS_A_TURN: usize = 16;
const TURN: Duration = Duration::from_millis(1);

/// Connections of the control domain on the listening socket at a time.
const LISTENED_LIMIT: usize = 256;

/// How long no connections are accepted after it has failed, as it does when
/// the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What an event of epoll is about. Connections come after these two.
const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CONN: u64 = 2;

struct Peer {
    link: Link,
    /// What epoll has been asked for.
    interest: EventFlags,
    /// Whether it came through the listening socket.
    listened: bool,
}

/// The thread that runs the store.
pub(super) struct EventLoop {
    store: Store,
    peers: BTreeMap<ConnId, Peer>,
    fairness: Fairness,
    listener: Option<Listener>,
    accept_again: Option<Instant>,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    tasks: mpsc::Receiver<Task>,
    stopping: bool,
}

impl EventLoop {
    pub(super) fn new(
        quotas: Quotas,
        listener: Option<Listener>,
        wake: Arc<OwnedFd>,
        tasks: mpsc::Receiver<Task>,
    ) -> Result<Self, OsErrno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        if let Some(listener) = &listener {
            epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        }
        Ok(EventLoop {
            store: Store::new(quotas),
            peers: BTreeMap::new(),
            fairness: Fairness::default(),
            listener,
            accept_again: None,
            epoll,
            wake,
            tasks,
            stopping: false,
        })
    }

    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        while !self.stopping {
            events.clear();
            let next = self
                .accept_again
                .into_iter()
                .chain(self.fairness.next_expiry())
                .min();
            let left = next.map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(OsErrno::INTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the store's server cannot wait and stops");
                    return;
                }
            }
            self.resume_accepting();
            let expired = self.fairness.expired(Instant::now());
            self.free(&expired);
            for event in &events {
                match event.data.u64() {
                    WAKE => self.run_tasks(),
                    LISTENER => self.accept(),
                    key => self.serve(ConnId::from_raw(key - FIRST_CONN), event.flags),
                }
            }
            self.deliver();
        }
    }

    // ---- what the handle asks ----------------------------------------------------

    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    pub(super) fn introduce(&mut self, dom: DomId) -> Result<(), Errno> {
        let effects = self.store.introduce(dom, 0, 0)?;
        self.follow(&effects);
        Ok(())
    }

    pub(super) fn release(&mut self, dom: DomId) -> Result<(), Errno> {
        let effects = self.store.release(dom)?;
        self.follow(&effects);
        Ok(())
    }

    pub(super) fn add(&mut self, stream: UnixStream, dom: DomId) -> Result<(), ServerError> {
        let io = |source| ServerError::Io {
            what: "cannot serve this socket",
            source,
        };
        stream.set_nonblocking(true).map_err(io)?;
        self.add_link(Link::new(stream.into()), dom, false)
    }

    fn run_tasks(&mut self) {
        let mut count = [0; 8];
        // Whatever it says: awake we are.
        let _ = rustix::io::read(&*self.wake, &mut count);
        while let Ok(task) = self.tasks.try_recv() {
            task(self);
        }
    }

    // ---- connections come and go -------------------------------------------------

    fn add_link(&mut self, link: Link, dom: DomId, listened: bool) -> Result<(), ServerError> {
        let id = self
            .store
            .connect(dom)
            .map_err(|errno| ServerError::Domain { dom, errno })?;
        let interest = EventFlags::IN;
        if let Err(errno) = epoll::add(&self.epoll, &link, conn_data(id), interest) {
            self.store.disconnect(id);
            return Err(ServerError::Io {
                what: "cannot wait for this socket",
                source: errno.into(),
            });
        }
        let peer = Peer {
            link,
            interest,
            listened,
        };
        self.peers.insert(id, peer);
        Ok(())
    }

    fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            let result = match listener.accept() {
                Ok(None) => return,
                Ok(Some(_)) if self.listened() >= LISTENED_LIMIT => {
                    tracing::warn!("turned away a connection: there are {LISTENED_LIMIT} already");
                    continue;
                }
                Ok(Some(socket)) => self.add_link(Link::new(socket), DomId::DOM0, true),
                Err(errno) => {
                    tracing::warn!(%errno, "cannot accept a connection");
                    self.pause_accepting();
                    return;
                }
            };
            if let Err(error) = result {
                tracing::warn!(%error, "cannot serve a connection");
            }
        }
    }

    fn listened(&self) -> usize {
        self.peers.values().filter(|peer| peer.listened).count()
    }

    fn pause_accepting(&mut self) {
        self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
        self.watch_listener(EventFlags::empty());
    }

    fn resume_accepting(&mut self) {
        if self.accept_again.is_some_and(|at| at <= Instant::now()) {
            self.accept_again = None;
            self.watch_listener(EventFlags::IN);
        }
    }

    fn watch_listener(&self, interest: EventFlags) {
        if let Some(listener) = &self.listener {
            let data = EventData::new_u64(LISTENER);
            if let Err(errno) = epoll::modify(&self.epoll, listener, data, interest) {
                tracing::error!(%errno, "cannot wait for connections");
            }
        }
    }

    /// Gives a connection up. Closing its socket takes it out of epoll.
    fn lose(&mut self, id: ConnId, why: Lost) {
        if self.peers.remove(&id).is_some() {
            let dom = self.store.domain_of(id);
            tracing::debug!(conn = id.get(), ?dom, %why, "a connection of the store has ended");
            self.store.disconnect(id);
            let held = self.fairness.done(id);
            self.free(&held);
        }
    }

    fn follow(&mut self, effects: &[Effect]) {
        for effect in effects {
            match *effect {
                Effect::Disconnected(id) => self.lose(id, Lost::Released),
                Effect::Conflict {
                    loser,
                    winner: Some(winner),
                } => self.hold(loser, winner),
                Effect::Conflict { winner: None, .. } | Effect::Introduced { .. } | Effect::Released(_) => {}
            }
        }
    }

    /// Lets the winner wait, if the loser has lost too often.
    fn hold(&mut self, loser: ConnId, winner: ConnId) {
        let privileged = |id| self.store.domain_of(id).is_some_and(DomId::is_privileged);
        let may_hold = privileged(loser) || !privileged(winner);
        if self.fairness.lost(loser, winner, may_hold, Instant::now()) {
            tracing::debug!(loser = loser.get(), winner = winner.get(), "lets the winner wait");
            self.ask_epoll(winner);
        }
    }

    /// Reads again from those who have waited.
    fn free(&mut self, held: &[ConnId]) {
        for id in held {
            self.ask_epoll(*id);
        }
    }

    /// Whether nothing may be read from a connection now.
    fn has_to_wait(&self, id: ConnId, peer: &Peer) -> bool {
        peer.link.is_full() || self.fairness.is_held(id)
    }

    /// Asks epoll for what a connection is waiting for now.
    fn ask_epoll(&mut self, id: ConnId) {
        let Some(peer) = self.peers.get(&id) else { return };
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, !self.has_to_wait(id, peer));
        interest.set(EventFlags::OUT, peer.link.has_output());
        if interest == peer.interest {
            return;
        }
        if let Err(errno) = epoll::modify(&self.epoll, &peer.link, conn_data(id), interest) {
            self.lose(id, errno.into());
        } else if let Some(peer) = self.peers.get_mut(&id) {
            peer.interest = interest;
        }
    }

    // ---- messages ----------------------------------------------------------------

    /// Takes some requests from a connection and answers them.
    fn serve(&mut self, id: ConnId, flags: EventFlags) {
        let start = Instant::now();
        for _ in 0..REQUESTS_A_TURN {
            let Some(peer) = self.peers.get(&id) else { return };
            if self.has_to_wait(id, peer) {
                if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
                    // Nobody will ever read its answers, and epoll would not
                    // cease to say so.
                    return self.lose(id, Lost::Closed);
                }
                break;
            }
            let Some(peer) = self.peers.get_mut(&id) else {
                return;
            };
            let message = match peer.link.receive() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(why) => {
                    // It may have closed one direction only.
                    let _ = peer.link.flush();
                    return self.lose(id, why);
                }
            };
            tracing::trace!(conn = id.get(), %message, "request");
            let Ok(outcome) = self.store.handle(id, &message) else {
                return self.lose(id, Lost::Released);
            };
            peer.link.push(&outcome.reply);
            if message.kind() == Some(Kind::TransactionEnd) && outcome.effects.is_empty() {
                let held = self.fairness.done(id);
                self.free(&held);
            }
            self.follow(&outcome.effects);
            if start.elapsed() > TURN {
                break;
            }
        }
        self.send(id);
    }

    /// Takes events to all for whom some wait.
    fn deliver(&mut self) {
        let ready: Vec<_> = self.store.ready().collect();
        for id in ready {
            self.send(id);
        }
    }

    /// Sends a connection its answers and then its events, as far as it takes them.
    fn send(&mut self, id: ConnId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        loop {
            while !peer.link.is_full()
                && let Some(event) = self.store.next_event(id)
            {
                // Events of the store are made to fit a message.
                if let Ok(message) = event.encode() {
                    peer.link.push(&message);
                }
            }
            if let Err(why) = peer.link.flush() {
                return self.lose(id, why);
            }
            // What is left over goes on when epoll says that there is room, so
            // nothing may be left over while there is.
            if peer.link.has_output() || !self.store.has_events(id) {
                break;
            }
        }
        self.ask_epoll(id);
    }
}

/// What epoll is to say of a connection.
fn conn_data(id: ConnId) -> EventData {
    EventData::new_u64(FIRST_CONN + id.get())
}
