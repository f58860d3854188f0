//! The store itself: a state machine without input or output.

use crate::ops::{self, Actor, Change, Op, Seen};
use crate::path::{NodePath, Path, Place, Special, seen_from};
use crate::perms::{Access, Caller, Perms, Right};
use crate::queue::Queue;
use crate::transaction::{Refused, Transaction};
use crate::tree::{Node, Tree};
use crate::watch::{Spot, Watch, WatchId, Watches};
use crate::wire::{Event, Message, PAYLOAD_MAX, Reply, Request, Token, TxId};
use crate::{DomId, Errno, Quotas};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::ToString as _;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// One connection to the store, of some domain. Never given twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnId(u64);

impl ConnId {
    /// The number, for whoever keeps connections by number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The connection of this number, which [`get`](Self::get) gave.
    #[cfg(feature = "server")]
    pub(crate) const fn from_raw(id: u64) -> Self {
        ConnId(id)
    }

    #[cfg(test)]
    pub(crate) const fn for_test(id: u64) -> Self {
        ConnId(id)
    }
}

/// What happened besides the answer, that whoever runs the store has to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// The toolstack introduced a domain, by message or by call.
    Introduced {
        /// The domain.
        dom: DomId,
        /// The guest frame of its ring page, as the toolstack said it.
        gfn: u64,
        /// Its event channel port, as the toolstack said it.
        port: u32,
    },
    /// The store forgot a domain.
    Released(DomId),
    /// The store forgot a connection, because its domain was released.
    /// Whatever carried it is to be closed.
    Disconnected(ConnId),
    /// A transaction was refused with `EAGAIN`. If one connection wins over
    /// another again and again, whoever runs the store may let it wait a
    /// little, so that the other comes to an end as well.
    Conflict {
        /// Whose transaction it was.
        loser: ConnId,
        /// Who changed what the transaction used, if it was a connection.
        winner: Option<ConnId>,
    },
}

/// What became of a request.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The answer, which is always exactly one.
    pub reply: Message,
    /// What else happened; almost always nothing.
    pub effects: Vec<Effect>,
}

/// A [`ConnId`] of which the store knows nothing (any more).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the store has no connection {}", .0.get())]
pub struct NoSuchConnection(pub ConnId);

struct Connection {
    dom: DomId,
    watches: BTreeSet<WatchId>,
    transactions: BTreeMap<TxId, Transaction>,
    last_tx: u32,
    events: Queue<WatchId, Place>,
}

#[derive(Default)]
struct Domain {
    gfn: u64,
    port: u32,
    target: Option<DomId>,
    conns: BTreeSet<ConnId>,
}

/// The store: nodes, watches, transactions, domains and connections.
///
/// It does no input or output. Whoever runs it carries messages: it gives every
/// request to [`handle`](Store::handle) and sends back the reply, then takes
/// the events that have come up with [`ready`](Store::ready) and
/// [`next_event`](Store::next_event), at the pace of whoever reads them.
///
/// # What always holds
///
/// - A request is done wholly or not at all, and never panics.
/// - A domain learns (by answers or events) only of nodes it may read, by the
///   permissions they have or had just before.
/// - What an unprivileged domain takes up is bounded by [`Quotas`].
/// - After [`release`](Store::release) nothing is left of a domain: no
///   connection, watch, transaction, node, or mention in permissions, so that
///   the next one of the same number inherits nothing.
///
/// ```
/// use gnttab_xenstore::wire::{Reply, Request};
/// use gnttab_xenstore::{DomId, Quotas, Store};
///
/// let mut store = Store::new(Quotas::default());
/// let dom0 = store.connect(DomId::DOM0)?;
///
/// let write = Request::Write { path: "/tool/x".parse()?, value: b"1".as_slice().into() };
/// let outcome = store.handle(dom0, &write.encode(1, None)?)?;
/// assert_eq!(Reply::parse(&outcome.reply)?, Reply::Ok);
///
/// let outcome = store.handle(dom0, &Request::Read("/tool/x".parse()?).encode(2, None)?)?;
/// assert_eq!(Reply::parse(&outcome.reply)?, Reply::Value(b"1".as_slice().into()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Store {
    quotas: Quotas,
    tree: Tree,
    special_perms: BTreeMap<Special, Perms>,
    watches: Watches,
    domains: BTreeMap<DomId, Domain>,
    conns: BTreeMap<ConnId, Connection>,
    next_conn: u64,
    /// The connections with events waiting.
    ready: BTreeSet<ConnId>,
    effects: Vec<Effect>,
}

/// Domains and connections.
impl Store {
    /// An empty store, in which the control domain is introduced already.
    pub fn new(quotas: Quotas) -> Self {
        let hidden = Perms::new(DomId::DOM0, Access::None);
        Store {
            quotas,
            tree: Tree::new(),
            special_perms: [Special::IntroduceDomain, Special::ReleaseDomain]
                .map(|special| (special, hidden.clone()))
                .into(),
            watches: Watches::default(),
            domains: BTreeMap::from([(DomId::DOM0, Domain::default())]),
            conns: BTreeMap::new(),
            next_conn: 0,
            ready: BTreeSet::new(),
            effects: Vec::new(),
        }
    }

    /// The limits of unprivileged domains.
    pub fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// The number of nodes, the root among them.
    pub fn nodes(&self) -> usize {
        self.tree.len()
    }

    /// A domain exists now; those who watch `@introduceDomain` hear of it.
    /// `gfn` and `port` say where its ring is, if it has one. Saying the same
    /// again is no error and does nothing.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a reserved number, or a domain known with another ring.
    pub fn introduce(&mut self, dom: DomId, gfn: u64, port: u32) -> Result<Vec<Effect>, Errno> {
        self.introduce_domain(dom, gfn, port)?;
        Ok(core::mem::take(&mut self.effects))
    }

    /// A domain is gone: its connections, watches and transactions end, the
    /// nodes it owns are removed (those who watch them hear of it), and its
    /// mention in the permissions of other nodes is struck out. Then those who
    /// watch `@releaseDomain` hear of it.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the store does not know it, `EINVAL` for the control domain.
    pub fn release(&mut self, dom: DomId) -> Result<Vec<Effect>, Errno> {
        self.release_domain(dom)?;
        Ok(core::mem::take(&mut self.effects))
    }

    /// Whether the store knows a domain.
    pub fn is_introduced(&self, dom: DomId) -> bool {
        self.domains.contains_key(&dom)
    }

    /// A new connection of a domain.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the domain was not introduced.
    pub fn connect(&mut self, dom: DomId) -> Result<ConnId, Errno> {
        let domain = self.domains.get_mut(&dom).ok_or(Errno::ENOENT)?;
        let id = ConnId(self.next_conn);
        self.next_conn += 1;
        domain.conns.insert(id);
        let conn = Connection {
            dom,
            watches: BTreeSet::new(),
            transactions: BTreeMap::new(),
            last_tx: 0,
            events: Queue::new(self.quotas.pending_events),
        };
        self.conns.insert(id, conn);
        Ok(id)
    }

    /// A connection has ended: its watches and transactions go. No error if it
    /// is gone already.
    pub fn disconnect(&mut self, id: ConnId) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        for watch in conn.watches {
            self.watches.remove(watch);
        }
        if let Some(domain) = self.domains.get_mut(&conn.dom) {
            domain.conns.remove(&id);
        }
        self.ready.remove(&id);
    }

    /// The domain that a connection belongs to.
    pub fn domain_of(&self, id: ConnId) -> Option<DomId> {
        self.conns.get(&id).map(|conn| conn.dom)
    }

    fn introduce_domain(&mut self, dom: DomId, gfn: u64, port: u32) -> Result<(), Errno> {
        if dom >= DomId::FIRST_RESERVED {
            return Err(Errno::EINVAL);
        }
        match self.domains.get(&dom) {
            Some(known) if (known.gfn, known.port) == (gfn, port) => return Ok(()),
            Some(_) => return Err(Errno::EINVAL),
            None => self.domains.insert(
                dom,
                Domain {
                    gfn,
                    port,
                    ..Domain::default()
                },
            ),
        };
        self.effects.push(Effect::Introduced { dom, gfn, port });
        self.fire_special(Special::IntroduceDomain);
        Ok(())
    }

    fn release_domain(&mut self, dom: DomId) -> Result<(), Errno> {
        if dom == DomId::DOM0 {
            return Err(Errno::EINVAL);
        }
        let domain = self.domains.get(&dom).ok_or(Errno::ENOENT)?;
        for conn in domain.conns.clone() {
            self.disconnect(conn);
            self.effects.push(Effect::Disconnected(conn));
        }
        self.domains.remove(&dom);
        for other in self.domains.values_mut() {
            other.target = other.target.filter(|target| *target != dom);
        }
        self.revoke(dom);
        self.effects.push(Effect::Released(dom));
        self.fire_special(Special::ReleaseDomain);
        Ok(())
    }

    /// Takes away every right that permissions give a domain, for the next of
    /// its number would have it too.
    fn revoke(&mut self, dom: DomId) {
        let hidden = Perms::new(DomId::DOM0, Access::None);
        let traces = self.tree.traces_of(dom);
        for (path, perms) in traces.mentioning {
            self.tree.set_perms(&path, perms, None);
        }
        for path in traces.owned {
            let before = self.tree.get(&path).map(|node| node.perms().clone());
            let removed = self.tree.remove(&path, None);
            self.fire(&Change {
                path,
                before,
                removed,
            });
        }
        // The root cannot be removed, so it is taken from a dead owner.
        if self
            .tree
            .get(&Path::root())
            .is_some_and(|root| root.perms().owner() == dom)
        {
            self.tree.set_perms(&Path::root(), hidden.clone(), None);
        }
        for perms in self.special_perms.values_mut() {
            if perms.owner() == dom {
                *perms = hidden.clone();
            } else if let Some(rest) = perms.without(dom) {
                *perms = rest;
            }
        }
    }
}

/// Events.
impl Store {
    /// The connections for which events wait.
    pub fn ready(&self) -> impl Iterator<Item = ConnId> {
        self.ready.iter().copied()
    }

    /// Whether events wait for a connection.
    pub fn has_events(&self, id: ConnId) -> bool {
        self.ready.contains(&id)
    }

    /// Takes the oldest event that waits for a connection.
    pub fn next_event(&mut self, id: ConnId) -> Option<Event> {
        let conn = self.conns.get_mut(&id)?;
        let event = conn.events.pop();
        if conn.events.is_empty() {
            self.ready.remove(&id);
        }
        let (watch, place) = event?;
        // A watch that is gone has taken its events with it.
        let token = self.watches.get(watch)?.token.clone();
        Some(Event { place, token })
    }

    /// Queues one event of a watch: for `place`, or for what is watched.
    fn push_event(&mut self, id: WatchId, place: Option<Place>) {
        let Some(watch) = self.watches.get(id) else { return };
        let Some(conn) = self.conns.get_mut(&watch.conn) else {
            return;
        };
        let whole = watch.place.clone();
        let fits = |place: &Place| {
            Event {
                place: place.clone(),
                token: watch.token.clone(),
            }
            .fits()
        };
        // The whole always fits: the request that set the watch had the same strings.
        let place = place.filter(fits).unwrap_or_else(|| whole.clone());
        conn.events.push(id, place, whole);
        self.ready.insert(watch.conn);
    }

    /// Tells those who watch, and may know, what has changed in the tree.
    fn fire(&mut self, change: &Change) {
        let Change {
            path,
            before,
            removed,
        } = change;
        let perms_at = |path: &Path| self.tree.get(path).map(Node::perms).cloned();
        let after = perms_at(path);
        if before.is_none() && after.is_none() {
            return;
        }
        // Whoever may list the parent sees a child come and go, even one it may not read.
        let listed = before.is_some() != after.is_some();
        let parent = path
            .parent()
            .filter(|_| listed)
            .and_then(|parent| perms_at(&parent));
        let visible = [before.clone(), after, parent];
        for id in self.watches.covering(path) {
            self.fire_one(id, path, &visible);
        }

        // Whatever was below has gone too. A watch above has heard of it, in the
        // event just sent; one on a node of its own has not.
        let Some(removed) = removed else { return };
        for (at, id) in self.watches.below(path) {
            let Some(rest) = at.below(path) else { continue };
            let names = || rest.split('/');
            let Some(node) = removed.descend(names()) else {
                continue;
            };
            let above = removed.descend(names().take(names().count() - 1));
            let visible = [Some(node.perms().clone()), above.map(|node| node.perms().clone())];
            self.fire_one(id, &at, &visible);
        }
    }

    /// Tells one watch of a change at `path`, if one of `visible` lets it know.
    fn fire_one(&mut self, id: WatchId, path: &Path, visible: &[Option<Arc<Perms>>]) {
        let Some(watch) = self.watches.get(id) else { return };
        let Some(caller) = self.caller(watch.conn) else {
            return;
        };
        if !visible
            .iter()
            .flatten()
            .any(|perms| perms.allow(caller, Right::Read))
        {
            return;
        }
        let relative = matches!(watch.place, Place::Node(NodePath::Relative(_)));
        let place = seen_from(path, caller.dom, relative).map(Place::Node);
        self.push_event(id, place);
    }

    fn fire_special(&mut self, special: Special) {
        for id in self.watches.on(special) {
            let Some(watch) = self.watches.get(id) else {
                continue;
            };
            let Some(caller) = self.caller(watch.conn) else {
                continue;
            };
            if self.special_perms[&special].allow(caller, Right::Read) {
                self.push_event(id, None);
            }
        }
    }
}

/// Requests.
impl Store {
    /// Does what a message asks and says what to answer.
    ///
    /// A message that makes no sense is answered with an error like any other;
    /// only what is not a message at all (a payload too long) has to be dealt
    /// with by whoever carries the bytes.
    ///
    /// # Errors
    ///
    /// [`NoSuchConnection`]; it is the only reason for not having an answer.
    pub fn handle(&mut self, id: ConnId, message: &Message) -> Result<Outcome, NoSuchConnection> {
        let caller = self.caller(id).ok_or(NoSuchConnection(id))?;
        let result = Request::parse(message)
            .and_then(|request| self.execute(id, caller, TxId::new(message.tx_id()), request));
        let reply = result.unwrap_or_else(Reply::Error);
        let reply = reply
            .encode(message)
            .or_else(|_| Reply::Error(Errno::E2BIG).encode(message))
            .unwrap_or_else(|_| message.clone()); // the name of an errno always fits
        Ok(Outcome {
            reply,
            effects: core::mem::take(&mut self.effects),
        })
    }

    fn execute(
        &mut self,
        id: ConnId,
        caller: Caller,
        tx: Option<TxId>,
        request: Request,
    ) -> Result<Reply, Errno> {
        let node = |path: &NodePath| path.resolve(caller.dom);
        match request {
            Request::Directory(path) => {
                let path = node(&path);
                let (names, _) = self.look(id, tx, |t, actor, seen| ops::directory(t, actor, seen, &path))?;
                Ok(Reply::Names(names))
            }
            Request::DirectoryPart { path, offset } => {
                let path = node(&path);
                let (names, generation) =
                    self.look(id, tx, |t, actor, seen| ops::directory(t, actor, seen, &path))?;
                part(names, generation, offset)
            }
            Request::Read(path) => {
                let path = node(&path);
                self.look(id, tx, |t, actor, seen| ops::read(t, actor, seen, &path))
                    .map(Reply::Value)
            }
            Request::GetPerms(Place::Node(path)) => {
                let path = node(&path);
                let perms = self.look(id, tx, |t, actor, seen| ops::perms(t, actor, seen, &path))?;
                Ok(Reply::Perms(Perms::clone(&perms)))
            }
            Request::GetPerms(Place::Special(special)) => {
                let perms = &self.special_perms[&special];
                if !perms.allow(caller, Right::Read) {
                    return Err(Errno::EACCES);
                }
                Ok(Reply::Perms(perms.clone()))
            }

            Request::Write { path, value } => self.change(id, tx, Op::Write(node(&path), value)),
            Request::Mkdir(path) => self.change(id, tx, Op::Mkdir(node(&path))),
            Request::Rm(path) => self.change(id, tx, Op::Rm(node(&path))),
            Request::SetPerms {
                place: Place::Node(path),
                perms,
            } => self.change(id, tx, Op::SetPerms(node(&path), perms)),
            Request::SetPerms {
                place: Place::Special(special),
                perms,
            } => {
                if !caller.is_privileged() {
                    return Err(Errno::EACCES);
                }
                self.special_perms.insert(special, perms);
                Ok(Reply::Ok)
            }

            Request::Watch { place, token } => self.watch(id, caller, place, token),
            Request::Unwatch { place, token } => self.unwatch(id, caller, &place, &token),
            Request::ResetWatches => self.reset(id),

            Request::TransactionStart if tx.is_some() => Err(Errno::EBUSY),
            Request::TransactionStart => self.start_transaction(id),
            Request::TransactionEnd { commit } => self.end_transaction(id, tx, commit),

            Request::GetDomainPath(dom) => Ok(Reply::DomainPath(Path::home(dom))),

            // The rest is the toolstack's.
            _ if !caller.is_privileged() => Err(Errno::EACCES),
            Request::Introduce { dom, gfn, port } => {
                self.introduce_domain(dom, gfn, port).map(|()| Reply::Ok)
            }
            Request::Release(dom) => self.release_domain(dom).map(|()| Reply::Ok),
            Request::IsDomainIntroduced(dom) => Ok(Reply::Introduced(self.is_introduced(dom))),
            // There is no state of a suspended domain in here that could be cleared.
            Request::Resume(dom) if self.is_introduced(dom) => Ok(Reply::Ok),
            Request::Resume(_) => Err(Errno::ENOENT),
            Request::SetTarget { dom, target } => self.set_target(dom, target),
            Request::Control(_) => Err(Errno::ENOSYS),
        }
    }

    fn caller(&self, id: ConnId) -> Option<Caller> {
        let dom = self.conns.get(&id)?.dom;
        let target = self.domains.get(&dom).and_then(|domain| domain.target);
        Some(Caller { dom, target })
    }

    /// Looks at the nodes, in a transaction or outside.
    fn look<T>(
        &mut self,
        id: ConnId,
        tx: Option<TxId>,
        what: impl FnOnce(&Tree, &Actor<'_>, &mut Seen) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let caller = self.caller(id).ok_or(Errno::EIO)?;
        let actor = Actor {
            conn: id,
            caller,
            quotas: &self.quotas,
        };
        self.check_transaction_bytes(&actor, tx, 0)?;
        match tx {
            None => what(&self.tree, &actor, &mut Seen::not_kept()),
            Some(tx) => {
                transaction(&mut self.conns, id, tx)?.look(&actor, |tree, seen| what(tree, &actor, seen))
            }
        }
    }

    /// Changes a node, in a transaction or outside.
    fn change(&mut self, id: ConnId, tx: Option<TxId>, op: Op) -> Result<Reply, Errno> {
        let caller = self.caller(id).ok_or(Errno::EIO)?;
        let actor = Actor {
            conn: id,
            caller,
            quotas: &self.quotas,
        };
        self.check_transaction_bytes(&actor, tx, op.size())?;
        if let Some(tx) = tx {
            transaction(&mut self.conns, id, tx)?.apply(&actor, op)?;
        } else if let Some(change) = op.apply(&mut self.tree, &actor, &mut Seen::not_kept())? {
            self.fire(&change);
        }
        Ok(Reply::Ok)
    }

    fn watch(&mut self, id: ConnId, caller: Caller, place: Place, token: Token) -> Result<Reply, Errno> {
        let spot = spot(&place, caller.dom);
        if self.watches.find(id, &spot, &token).is_some() {
            return Err(Errno::EEXIST);
        }
        let used = self.sum(caller.dom, |conn| conn.watches.len());
        let actor = Actor {
            conn: id,
            caller,
            quotas: &self.quotas,
        };
        actor.within(used + 1, self.quotas.watches, Errno::E2BIG)?;
        let watch = self.watches.add(Watch {
            conn: id,
            place,
            spot,
            token,
        });
        self.conns.get_mut(&id).ok_or(Errno::EIO)?.watches.insert(watch);
        // Once at once, whether or not there is anything: it tells the watcher
        // no more than what it said itself.
        self.push_event(watch, None);
        Ok(Reply::Ok)
    }

    fn unwatch(&mut self, id: ConnId, caller: Caller, place: &Place, token: &Token) -> Result<Reply, Errno> {
        let spot = spot(place, caller.dom);
        let watch = self.watches.find(id, &spot, token).ok_or(Errno::ENOENT)?;
        self.forget_watch(id, watch);
        Ok(Reply::Ok)
    }

    fn forget_watch(&mut self, id: ConnId, watch: WatchId) {
        self.watches.remove(watch);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.watches.remove(&watch);
            conn.events.remove(&watch);
            if conn.events.is_empty() {
                self.ready.remove(&id);
            }
        }
    }

    fn reset(&mut self, id: ConnId) -> Result<Reply, Errno> {
        let conn = self.conns.get_mut(&id).ok_or(Errno::EIO)?;
        conn.transactions.clear();
        for watch in conn.watches.clone() {
            self.forget_watch(id, watch);
        }
        Ok(Reply::Ok)
    }

    fn start_transaction(&mut self, id: ConnId) -> Result<Reply, Errno> {
        let caller = self.caller(id).ok_or(Errno::EIO)?;
        let open = self.sum(caller.dom, |conn| conn.transactions.len());
        let actor = Actor {
            conn: id,
            caller,
            quotas: &self.quotas,
        };
        actor.within(open + 1, self.quotas.transactions, Errno::ENOSPC)?;
        let conn = self.conns.get_mut(&id).ok_or(Errno::EIO)?;
        let tx = loop {
            conn.last_tx = conn.last_tx.wrapping_add(1);
            match TxId::new(conn.last_tx) {
                Some(tx) if !conn.transactions.contains_key(&tx) => break tx,
                _ => {}
            }
        };
        conn.transactions.insert(tx, Transaction::new(&self.tree));
        Ok(Reply::Transaction(tx))
    }

    fn end_transaction(&mut self, id: ConnId, tx: Option<TxId>, commit: bool) -> Result<Reply, Errno> {
        let caller = self.caller(id).ok_or(Errno::EIO)?;
        let conn = self.conns.get_mut(&id).ok_or(Errno::EIO)?;
        let transaction = tx
            .and_then(|tx| conn.transactions.remove(&tx))
            .ok_or(Errno::ENOENT)?;
        if !commit {
            return Ok(Reply::Ok);
        }
        let actor = Actor {
            conn: id,
            caller,
            quotas: &self.quotas,
        };
        match transaction.commit(&mut self.tree, &actor) {
            Ok(changes) => {
                for change in changes {
                    self.fire(&change);
                }
                Ok(Reply::Ok)
            }
            Err(Refused::NoSpace) => Err(Errno::ENOSPC),
            Err(Refused::Conflict { winner }) => {
                self.effects.push(Effect::Conflict { loser: id, winner });
                Err(Errno::EAGAIN)
            }
        }
    }

    fn set_target(&mut self, dom: DomId, target: DomId) -> Result<Reply, Errno> {
        if dom == target {
            return Err(Errno::EINVAL);
        }
        if !self.is_introduced(target) {
            return Err(Errno::ENOENT);
        }
        self.domains.get_mut(&dom).ok_or(Errno::ENOENT)?.target = Some(target);
        Ok(Reply::Ok)
    }

    /// Refuses what would make the transactions of a domain remember too much.
    fn check_transaction_bytes(&self, actor: &Actor<'_>, tx: Option<TxId>, more: usize) -> Result<(), Errno> {
        if tx.is_none() || actor.caller.is_privileged() {
            return Ok(());
        }
        let used = self.sum(actor.caller.dom, |conn| {
            conn.transactions.values().map(Transaction::size).sum()
        });
        actor.within(used + more, self.quotas.transaction_bytes, Errno::ENOSPC)
    }

    /// Adds up something over all connections of a domain.
    fn sum(&self, dom: DomId, what: impl Fn(&Connection) -> usize) -> usize {
        let ids = self
            .domains
            .get(&dom)
            .into_iter()
            .flat_map(|domain| &domain.conns);
        ids.filter_map(|id| self.conns.get(id)).map(what).sum()
    }
}

impl core::fmt::Debug for Store {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Store")
            .field("nodes", &self.nodes())
            .field("domains", &self.domains.len())
            .field("connections", &self.conns.len())
            .finish_non_exhaustive()
    }
}

/// Where a place is, when `dom` says it.
fn spot(place: &Place, dom: DomId) -> Spot {
    match place {
        Place::Node(path) => Spot::Node(path.resolve(dom)),
        Place::Special(special) => Spot::Special(*special),
    }
}

fn transaction(
    conns: &mut BTreeMap<ConnId, Connection>,
    id: ConnId,
    tx: TxId,
) -> Result<&mut Transaction, Errno> {
    let conn = conns.get_mut(&id).ok_or(Errno::EIO)?;
    conn.transactions.get_mut(&tx).ok_or(Errno::ENOENT)
}

/// The part of a list of names that begins `offset` bytes into it and fits a message.
fn part(names: Vec<Arc<str>>, generation: u64, offset: u32) -> Result<Reply, Errno> {
    let mut skip = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // The generation, its NUL, and the NUL that says it is the last part.
    let mut room = PAYLOAD_MAX - generation.to_string().len() - 2;
    let (mut taken, mut last) = (Vec::new(), true);
    for name in names {
        let len = name.len() + 1;
        if skip >= len {
            skip -= len;
        } else if skip > 0 {
            return Err(Errno::EINVAL); // amid a name
        } else if len > room {
            last = false;
            break;
        } else {
            room -= len;
            taken.push(name);
        }
    }
    if skip > 0 {
        return Err(Errno::EINVAL); // past the end
    }
    Ok(Reply::Part {
        generation,
        names: taken,
        last,
    })
}
