//! What happens on the machine, told to those who watch.
//!
//! What must always hold:
//! 1. Nobody in the machine waits for a watcher. What happens goes into a channel with an end, which the herald
//!    empties; what finds it full is dropped and counted. From there it goes into another one for each watcher, with
//!    the same rule.
//! 2. With nobody watching, telling costs one load; and with somebody, no system call: the herald is never waiting
//!    on the channel, it looks into it every [`BEAT`].
//!
//! A grant is made, and access ended, by writing to shared memory, which calls nobody. So the herald looks at the tables,
//! every [`LOOK`] at most and for a twentieth of the time at most, and compares. A grant that comes and goes between two
//! looks is seen only if it was mapped meanwhile.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gnttab_abi::{DomId, EntryType, GrantRef, GrantStatus, Op};
use gnttab_engine::{Answered, EntryView, EntryWords};
use serde::{Deserialize, Serialize};

use super::{Monitor, Shared};

/// How often the herald empties the channel.
const BEAT: Duration = Duration::from_millis(10);
/// How often the herald looks at the tables.
const LOOK: Duration = Duration::from_millis(50);
/// Looking takes one part in so many of the time.
const SHARE: u32 = 20;
/// Events between two beats.
const MACHINE_ROOM: usize = 4096;
/// Events that a watcher has not taken yet.
const WATCHER_ROOM: usize = 2048;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A domain granted a page.
    Granted,
    /// A domain mapped another's page.
    Mapped,
    /// A domain gave a mapping up.
    Unmapped,
    /// A domain took a grant back, and nobody uses it.
    Ended,
    /// An operation answered with an error; or a domain says that its own table has no reference left for it.
    Refused,
    /// A domain wants a grant back that its peer still uses.
    Pending,
    /// A domain ended.
    Died,
}

impl EventKind {
    /// All of them.
    pub const ALL: [EventKind; 7] = [
        EventKind::Granted,
        EventKind::Mapped,
        EventKind::Unmapped,
        EventKind::Ended,
        EventKind::Refused,
        EventKind::Pending,
        EventKind::Died,
    ];

    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            EventKind::Granted => "granted",
            EventKind::Mapped => "mapped",
            EventKind::Unmapped => "unmapped",
            EventKind::Ended => "ended",
            EventKind::Refused => "refused",
            EventKind::Pending => "pending",
            EventKind::Died => "died",
        }
    }

    /// Whether the tables have to be looked at for it.
    const fn is_looked_for(self) -> bool {
        matches!(self, EventKind::Granted | EventKind::Ended | EventKind::Pending)
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventInfo {
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// What.
    pub event: EventKind,
    /// Whose doing it was: who granted, mapped, asked, wants back or died.
    pub domain: u16,
    /// The other domain: who is granted to, whose page it is, who still uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<u16>,
    /// The reference, in the granter's table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gref: Option<u32>,
    /// The operation that was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// Its status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Of a death: how. Of a refusal without an operation: what the domain says that it ran out of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Which events somebody wants to hear. What is left out is not asked about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// What happened, any of these; none: everything.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<EventKind>,
    /// A domain, on either side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<u16>,
    /// A reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gref: Option<u32>,
    /// An operation, by the name of [`Op::name`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// A status, by the name of [`GrantStatus::name`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
}

/// A filter names what does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFilter {
    /// No such operation.
    #[error("there is no operation called {0:?}")]
    Operation(String),
    /// No such status.
    #[error("there is no status called {0:?}")]
    Status(String),
}

/// A filter whose names were looked up.
#[derive(Debug)]
struct Wanted {
    events: Vec<EventKind>,
    domain: Option<DomId>,
    gref: Option<GrantRef>,
    operation: Option<Op>,
    status: Option<GrantStatus>,
}

impl Wanted {
    fn new(filter: Filter) -> Result<Wanted, BadFilter> {
        let operation = |name: String| {
            let found = Op::ALL.into_iter().find(|op| op.name() == name);
            found.ok_or(BadFilter::Operation(name))
        };
        let status = |name: String| {
            let found = GrantStatus::ALL
                .iter()
                .find(|status| status.name() == Some(name.as_str()));
            found.copied().ok_or(BadFilter::Status(name))
        };
        Ok(Wanted {
            events: filter.events,
            domain: filter.domain.map(DomId),
            gref: filter.gref.map(GrantRef),
            operation: filter.operation.map(operation).transpose()?,
            status: filter.status.map(status).transpose()?,
        })
    }

    fn wants(&self, event: &Event) -> bool {
        fn is<T: PartialEq>(asked: Option<T>, found: Option<T>) -> bool {
            asked.is_none() || asked == found
        }
        (self.events.is_empty() || self.events.contains(&event.kind))
            && (is(self.domain, Some(event.domain)) || is(self.domain, event.peer))
            && is(self.gref, event.gref)
            && is(self.operation, event.operation)
            && is(self.status, event.status)
    }

    fn looks(&self) -> bool {
        self.events.is_empty() || self.events.iter().any(|kind| kind.is_looked_for())
    }
}

/// An event on its way.
#[derive(Debug)]
struct Event {
    at: SystemTime,
    kind: EventKind,
    domain: DomId,
    peer: Option<DomId>,
    gref: Option<GrantRef>,
    operation: Option<Op>,
    status: Option<GrantStatus>,
    detail: Option<String>,
}

impl Event {
    fn new(kind: EventKind, domain: DomId, peer: Option<DomId>, gref: Option<GrantRef>) -> Event {
        Event {
            at: SystemTime::now(),
            kind,
            domain,
            peer,
            gref,
            operation: None,
            status: None,
            detail: None,
        }
    }
}

impl Event {
    fn lack(domain: DomId, lack: &str) -> Event {
        Event {
            detail: Some(lack.to_owned()),
            ..Event::new(EventKind::Refused, domain, None, None)
        }
    }
}

impl From<&Event> for EventInfo {
    fn from(event: &Event) -> EventInfo {
        let since = event.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        EventInfo {
            time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            event: event.kind,
            domain: event.domain.0,
            peer: event.peer.map(|peer| peer.0),
            gref: event.gref.map(|gref| gref.0),
            operation: event.operation.map(|op| op.name().to_owned()),
            status: event
                .status
                .map(|status| status.name().unwrap_or("unknown").to_owned()),
            detail: event.detail.clone(),
        }
    }
}

/// What a watcher hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Something happened.
    Event(EventInfo),
    /// So many more happened here than could be told.
    Dropped(u64),
}

/// Where events go.
#[derive(Debug)]
pub(crate) struct News {
    /// Somebody watches.
    watched: AtomicBool,
    sender: SyncSender<Event>,
    /// Events that found the channel full.
    lost: AtomicU64,
    receiver: Mutex<Option<Receiver<Event>>>,
    watchers: Mutex<Watchers>,
    /// Signalled when there is a first watcher, or nothing more to tell.
    change: Condvar,
}

#[derive(Debug, Default)]
struct Watchers {
    all: Vec<Watcher>,
    stopping: bool,
}

#[derive(Debug)]
struct Watcher {
    wanted: Wanted,
    sender: SyncSender<EventInfo>,
    dropped: Arc<AtomicU64>,
    gone: bool,
}

impl Watcher {
    fn tell(&mut self, event: &Event) {
        if !self.wanted.wants(event) {
            return;
        }
        match self.sender.try_send(event.into()) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            Err(TrySendError::Disconnected(_)) => self.gone = true,
        }
    }
}

/// What happens on a machine, as one watcher hears it. Dropping it ends that.
#[derive(Debug)]
pub struct Watch {
    receiver: Receiver<EventInfo>,
    dropped: Arc<AtomicU64>,
}

impl Watch {
    /// What happened next; `None`: nothing within that time, or the monitor has gone.
    pub fn next(&self, patience: Duration) -> Option<Heard> {
        // What was dropped found the channel full: it is newer than what is in there. Told when that has been
        // heard, it stands where the gap is, or a little late.
        if let Ok(event) = self.receiver.try_recv() {
            return Some(Heard::Event(event));
        }
        match self.dropped.swap(0, Ordering::Relaxed) {
            0 => {}
            count => return Some(Heard::Dropped(count)),
        }
        match self.receiver.recv_timeout(patience) {
            Ok(event) => Some(Heard::Event(event)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(patience);
                None
            }
        }
    }
}

impl Monitor {
    /// Hears what happens from now on.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use gnttab_host::monitor::{EventKind, Filter, Heard, Monitor, Settings};
    ///
    /// let monitor = Monitor::start(Settings::default())?;
    /// let watch = monitor.watch(Filter { events: vec![EventKind::Refused], ..Filter::default() })?;
    /// while let Some(Heard::Event(event)) = watch.next(Duration::from_secs(1)) {
    ///     println!("d{} was refused: {:?}", event.domain, event.status);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`BadFilter`].
    pub fn watch(&self, filter: Filter) -> Result<Watch, BadFilter> {
        let wanted = Wanted::new(filter)?;
        // What is the matter already is told first.
        let engine = &self.shared.engine;
        let mut standing = Vec::new();
        for domain in engine.domains().filter_map(|id| engine.domain(id)) {
            let guest = domain.private();
            if let Some(said) = &*guest.said() {
                let ends = said
                    .report
                    .pending
                    .iter()
                    .map(|end| Event::new(EventKind::Pending, guest.id, Some(end.peer), Some(end.gref)));
                standing.extend(ends);
                standing.extend(said.lacks.iter().map(|lack| Event::lack(guest.id, lack)));
            }
        }
        Ok(engine.hypervisor().news.watch(wanted, &standing))
    }
}

impl News {
    pub(crate) fn new() -> News {
        let (sender, receiver) = sync_channel(MACHINE_ROOM);
        News {
            watched: AtomicBool::new(false),
            sender,
            lost: AtomicU64::new(0),
            receiver: Mutex::new(Some(receiver)),
            watchers: Mutex::default(),
            change: Condvar::new(),
        }
    }

    fn watchers(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, wanted: Wanted, standing: &[Event]) -> Watch {
        let (sender, receiver) = sync_channel(WATCHER_ROOM);
        let dropped = Arc::default();
        let mut watcher = Watcher {
            wanted,
            sender,
            dropped: Arc::clone(&dropped),
            gone: false,
        };
        standing.iter().for_each(|event| watcher.tell(event));
        let mut watchers = self.watchers();
        watchers.all.push(watcher);
        self.watched.store(true, Ordering::Relaxed);
        self.change.notify_all();
        Watch { receiver, dropped }
    }

    fn tell(&self, event: Event) {
        if self.sender.try_send(event).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An item of an operation was answered.
    #[inline]
    pub(crate) fn answered(&self, answered: &Answered) {
        if self.watched.load(Ordering::Relaxed) {
            self.tell_answered(answered);
        }
    }

    #[cold]
    fn tell_answered(&self, answered: &Answered) {
        let Answered {
            caller,
            operation,
            peer,
            gref,
            status,
        } = *answered;
        let kind = match (operation, status) {
            (Op::MapGrantRef, GrantStatus::OKAY) => EventKind::Mapped,
            // Of an unmap that had nothing to do the granter is not known.
            (Op::UnmapGrantRef | Op::UnmapAndReplace, GrantStatus::OKAY) if peer.is_some() => {
                EventKind::Unmapped
            }
            (_, GrantStatus::OKAY) => return,
            _ => EventKind::Refused,
        };
        self.tell(Event {
            operation: Some(operation),
            status: Some(status),
            ..Event::new(kind, caller, peer, gref)
        });
    }

    /// A domain says that its peer does not let it end access.
    pub(crate) fn pending(&self, domain: DomId, peer: DomId, gref: GrantRef) {
        if self.watched.load(Ordering::Relaxed) {
            self.tell(Event::new(EventKind::Pending, domain, Some(peer), Some(gref)));
        }
    }

    /// A domain says what it has run out of.
    pub(crate) fn lacking(&self, domain: DomId, lack: &str) {
        if self.watched.load(Ordering::Relaxed) {
            self.tell(Event::lack(domain, lack));
        }
    }

    /// A domain has ended.
    pub(crate) fn died(&self, domain: DomId, how: impl FnOnce() -> String) {
        if self.watched.load(Ordering::Relaxed) {
            self.tell(Event {
                detail: Some(how()),
                ..Event::new(EventKind::Died, domain, None, None)
            });
        }
    }

    /// Nothing more will happen.
    pub(crate) fn stop(&self) {
        self.watchers().stopping = true;
        self.change.notify_all();
    }
}

impl Shared {
    /// The herald's work: until the monitor stops, tells watchers what happens.
    pub(super) fn herald(&self) {
        let news = &self.engine.hypervisor().news;
        let receiver = news
            .receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(receiver) = receiver else { return };
        let mut seen = Seen::default();
        loop {
            let mut watchers = news.watchers();
            while watchers.all.is_empty() && !watchers.stopping {
                news.watched.store(false, Ordering::Relaxed);
                seen = Seen::default();
                watchers = news.change.wait(watchers).unwrap_or_else(PoisonError::into_inner);
                // What was told when somebody watched before is nobody's news now.
                receiver.try_iter().for_each(drop);
                news.lost.store(0, Ordering::Relaxed);
            }
            if watchers.stopping {
                watchers.all.clear();
                return;
            }
            let looks = watchers.all.iter().any(|watcher| watcher.wanted.looks());
            // Looking may take a while, and who wants to watch is not to wait for it.
            drop(watchers);
            let mut events = Vec::new();
            if looks && !seen.started {
                self.look(&mut seen, &mut Vec::new());
                seen.started = true;
            }
            for event in receiver.try_iter().take(MACHINE_ROOM) {
                if looks {
                    self.look_before(&mut seen, &event, &mut events);
                }
                if !looks || seen.takes_in(&event) {
                    events.push(event);
                }
            }
            if looks && seen.next_look <= Instant::now() {
                self.look(&mut seen, &mut events);
            }
            let lost = news.lost.swap(0, Ordering::Relaxed);
            let mut watchers = news.watchers();
            for watcher in &mut watchers.all {
                events.iter().for_each(|event| watcher.tell(event));
                watcher.dropped.fetch_add(lost, Ordering::Relaxed);
            }
            watchers
                .all
                .retain(|watcher| !watcher.gone && Arc::strong_count(&watcher.dropped) > 1);
            if !watchers.all.is_empty() && !watchers.stopping {
                // Woken early only to stop, or for a new watcher.
                drop(news.change.wait_timeout(watchers, BEAT));
            }
        }
    }

    /// Looks at every table.
    fn look(&self, seen: &mut Seen, events: &mut Vec<Event>) {
        let started = Instant::now();
        let alive: Vec<DomId> = self.engine.domains().collect();
        seen.tables.retain(|id, _| alive.contains(id));
        for id in alive {
            let table = seen.tables.entry(id).or_default();
            let mut gref = 0;
            while let Some(entry) = self
                .observe(|processor| processor.entry(id, GrantRef(gref)))
                .flatten()
            {
                note(table, id, &entry, events);
                gref += 1;
            }
        }
        let took = started.elapsed();
        seen.next_look = Instant::now() + LOOK.max(took * SHARE);
    }

    /// Looks at an entry that is about to be told of, so that its granting is told first.
    fn look_before(&self, seen: &mut Seen, event: &Event, events: &mut Vec<Event>) {
        let (EventKind::Mapped, Some(granter), Some(gref)) = (event.kind, event.peer, event.gref) else {
            return;
        };
        let entry = self.observe(|processor| processor.entry(granter, gref)).flatten();
        let entry = entry.filter(|entry| !is_free(entry));
        let first = events.len();
        note_mapped(
            seen.tables.entry(granter).or_default(),
            event,
            entry.as_ref(),
            events,
        );
        // It was granted before it was mapped, whenever it was looked at.
        events[first..]
            .iter_mut()
            .for_each(|granted| granted.at = event.at);
    }
}

/// What the herald saw in the tables.
#[derive(Debug)]
struct Seen {
    started: bool,
    tables: BTreeMap<DomId, BTreeMap<u32, Granted>>,
    next_look: Instant,
}

impl Default for Seen {
    fn default() -> Seen {
        Seen {
            started: false,
            tables: BTreeMap::new(),
            next_look: Instant::now(),
        }
    }
}

/// An entry that is not free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Granted {
    to: DomId,
    frame: u64,
    pending: bool,
}

impl Seen {
    /// Whether an event is news.
    fn takes_in(&mut self, event: &Event) -> bool {
        match (event.kind, event.gref) {
            (EventKind::Pending, Some(gref)) => {
                let table = self.tables.entry(event.domain).or_default();
                let Some(granted) = table.get_mut(&gref.0) else {
                    return false;
                };
                !std::mem::replace(&mut granted.pending, true)
            }
            (EventKind::Died, _) => {
                // Its grants go with it.
                self.tables.remove(&event.domain);
                true
            }
            _ => true,
        }
    }
}

/// A mapping is about to be told of: of its entry, as it is now, or `None` if it is free by now. Then it was granted all the same,
/// and the next look tells that it ended.
fn note_mapped(
    table: &mut BTreeMap<u32, Granted>,
    mapped: &Event,
    entry: Option<&EntryView>,
    events: &mut Vec<Event>,
) {
    let (Some(granter), Some(gref)) = (mapped.peer, mapped.gref) else {
        return;
    };
    match entry {
        Some(entry) => note(table, granter, entry, events),
        None if table.contains_key(&gref.0) => {}
        None => {
            let to = mapped.domain;
            // No frame has that number: another grant of this reference is another grant.
            let (frame, pending) = (u64::MAX, false);
            table.insert(gref.0, Granted { to, frame, pending });
            events.push(Event::new(EventKind::Granted, granter, Some(to), Some(gref)));
        }
    }
}

fn is_free(entry: &EntryView) -> bool {
    entry.words.flags().kind() == EntryType::Invalid
}

/// Compares an entry with what was seen of it before.
fn note(table: &mut BTreeMap<u32, Granted>, granter: DomId, entry: &EntryView, events: &mut Vec<Event>) {
    let gref = entry.gref;
    let mut tell = |kind, peer| events.push(Event::new(kind, granter, Some(peer), Some(gref)));
    let now = (!is_free(entry)).then(|| Granted {
        to: entry.words.domid(),
        frame: match entry.words {
            EntryWords::V1(words) => words.frame.into(),
            EntryWords::V2(words, _) => words.frame,
        },
        pending: false,
    });
    match (table.get_mut(&gref.0), now, entry.user) {
        (None, None, _) => {}
        (None, Some(now), _) => {
            table.insert(gref.0, now);
            tell(EventKind::Granted, now.to);
        }
        // Withdrawn, and still used.
        (Some(before), None, Some(user)) => {
            if !std::mem::replace(&mut before.pending, true) {
                tell(EventKind::Pending, user);
            }
        }
        (Some(before), None, None) => {
            tell(EventKind::Ended, before.to);
            table.remove(&gref.0);
        }
        (Some(before), Some(now), _) => {
            if (before.to, before.frame) != (now.to, now.frame) {
                tell(EventKind::Ended, before.to);
                tell(EventKind::Granted, now.to);
                *before = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(filter: Filter) -> Wanted {
        Wanted::new(filter).unwrap()
    }

    fn refused(domain: u16, peer: u16, gref: u32) -> Event {
        Event {
            operation: Some(Op::MapGrantRef),
            status: Some(GrantStatus::BAD_GNTREF),
            ..Event::new(
                EventKind::Refused,
                DomId(domain),
                Some(DomId(peer)),
                Some(GrantRef(gref)),
            )
        }
    }

    #[test]
    fn what_was_mapped_was_granted_though_it_has_ended_before_anybody_looked() {
        let mapped = Event::new(EventKind::Mapped, DomId(3), Some(DomId(2)), Some(GrantRef(8)));
        let (mut table, mut events) = (BTreeMap::new(), Vec::new());
        note_mapped(&mut table, &mapped, None, &mut events);
        let told: Vec<_> = events
            .iter()
            .map(|event| (event.kind, event.domain, event.peer))
            .collect();
        assert_eq!(told, [(EventKind::Granted, DomId(2), Some(DomId(3)))]);
        // A second mapping of it is no second grant.
        note_mapped(&mut table, &mapped, None, &mut events);
        assert_eq!(events.len(), 1);
        // It is in the table, so that the next look finds that it has ended.
        assert!(table.contains_key(&8));
    }

    #[test]
    fn a_filter_asks_for_all_that_it_names() {
        let event = refused(3, 1, 8);
        let named = |name: &str| Some(name.to_owned());
        for (asked, wanted) in [
            (Filter::default(), true),
            (
                Filter {
                    domain: Some(3),
                    ..Filter::default()
                },
                true,
            ),
            (
                Filter {
                    domain: Some(1),
                    ..Filter::default()
                },
                true,
            ),
            (
                Filter {
                    domain: Some(2),
                    ..Filter::default()
                },
                false,
            ),
            (
                Filter {
                    gref: Some(8),
                    ..Filter::default()
                },
                true,
            ),
            (
                Filter {
                    gref: Some(9),
                    ..Filter::default()
                },
                false,
            ),
            (
                Filter {
                    events: vec![EventKind::Refused, EventKind::Died],
                    ..Filter::default()
                },
                true,
            ),
            (
                Filter {
                    events: vec![EventKind::Mapped],
                    ..Filter::default()
                },
                false,
            ),
            (
                Filter {
                    operation: named("map_grant_ref"),
                    ..Filter::default()
                },
                true,
            ),
            (
                Filter {
                    operation: named("copy"),
                    ..Filter::default()
                },
                false,
            ),
            (
                Filter {
                    status: named("bad_gntref"),
                    ..Filter::default()
                },
                true,
            ),
            (
                Filter {
                    status: named("okay"),
                    ..Filter::default()
                },
                false,
            ),
            (
                Filter {
                    domain: Some(3),
                    gref: Some(9),
                    ..Filter::default()
                },
                false,
            ),
        ] {
            assert_eq!(filter(asked.clone()).wants(&event), wanted, "{asked:?}");
        }
        let death = Event::new(EventKind::Died, DomId(3), None, None);
        assert!(
            !filter(Filter {
                gref: Some(8),
                ..Filter::default()
            })
            .wants(&death)
        );
        assert_eq!(
            Wanted::new(Filter {
                status: named("fine"),
                ..Filter::default()
            })
            .unwrap_err(),
            BadFilter::Status("fine".into())
        );
    }

    #[test]
    fn a_watcher_who_does_not_listen_loses_events_and_is_told_how_many() {
        let news = News::new();
        let watch = news.watch(filter(Filter::default()), &[]);
        let mut watchers = news.watchers();
        let count = WATCHER_ROOM as u64 + 5;
        for _ in 0..count {
            watchers.all[0].tell(&refused(1, 2, 3));
        }
        drop(watchers);
        let (mut told, mut dropped) = (0, 0);
        while let Some(heard) = watch.next(Duration::ZERO) {
            match heard {
                Heard::Event(_) => told += 1,
                Heard::Dropped(count) => dropped += count,
            }
        }
        assert_eq!((told, dropped), (WATCHER_ROOM as u64, 5));
    }

    #[test]
    fn with_no_herald_to_empty_it_telling_loses_events_and_does_not_wait() {
        let news = News::new();
        let answered = Answered {
            caller: DomId(1),
            operation: Op::Copy,
            peer: None,
            gref: None,
            status: GrantStatus::BAD_PAGE,
        };
        news.answered(&answered);
        assert_eq!(
            news.lost.load(Ordering::Relaxed),
            0,
            "nobody watches, nothing is told"
        );
        let _watch = news.watch(filter(Filter::default()), &[]);
        for _ in 0..MACHINE_ROOM + 7 {
            news.answered(&answered);
        }
        assert_eq!(news.lost.load(Ordering::Relaxed), 7);
    }
}
