//! The frontend's half of one queue: reads and writes of any length go in, become requests that fit the
//! ring, and come out as completions.
//!
//! # Rules
//! 1. What the peer can reach are pages of the pool, never the caller's buffers: data is copied between the two,
//!    unless the caller leased pages of the pool and has it there.
//! 2. A response must name a request that is outstanding and its operation; each identifier is good once
//!    (PVR-3). Anything else breaks the device: nothing is read from or sent to it until it is closed and
//!    connected anew.
//! 3. Nothing that was accepted is lost: an operation stays here, with its data, until it is answered in
//!    full. After a new connection it is sent again from its start, in the order of submission.
//! 4. A page that the peer maps is never reused as private memory, whatever the peer does.

mod bounce;
mod exchange;
mod lease;
mod pool;
mod types;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::fmt;

use gnttab_abi::{GrantRef, PAGE_SIZE};

use self::bounce::put_back;
use self::lease::{Leases, Lent};
use self::pool::{For, Pool, PoolPage};
pub use self::types::{
    Awaited, Completion, Data, DeviceBroken, DeviceProperties, FrontendConfig, FrontendStats, Io, IoError,
    Lease, OpenError, RejectReason, Rejected,
};
use super::layout::{MAX_SLOT, RawResponse, SECTOR_SIZE, slot_size};
use super::request::{BadRequest, Operation};
use crate::grants::{Access, Granter, Notify};
use crate::ring::{FrontRing, RingShape, ShapeError};
use crate::shared::SharedSliceMut;

/// An operation that is not finished.
struct Pending {
    token: u64,
    io: Io,
    /// Units not yet answered: bytes, or one for an operation without data.
    left: usize,
    result: Result<(), IoError>,
}

/// The rest of an operation that was not sent yet; each operation has at most one.
#[derive(Clone, Copy)]
struct Unsent {
    io: u64,
    offset: usize,
    units: usize,
}

/// A request on the ring.
struct Sent {
    io: u64,
    answered_as: Operation,
    offset: usize,
    units: usize,
}

/// What stands behind one identifier: `index | generation << 32`.
struct Shadow<P> {
    generation: u32,
    sent: Option<Sent>,
    /// Data pages first, then indirect pages. Data pages that are leased are with their lease.
    pages: Vec<PoolPage<P>>,
}

/// A connection to one backend.
struct Link<P, N> {
    ring: FrontRing<P>,
    grefs: Vec<GrantRef>,
    port: N,
    shadows: Vec<Shadow<P>>,
    free_ids: Vec<u32>,
    /// The backend is connected and requests may be sent.
    started: bool,
    broken: Option<DeviceBroken>,
}

/// The frontend's half of one queue of a block device.
///
/// [`FrontendQueue::open`] makes a ring, [`FrontendQueue::start`] begins to send when the backend is connected,
/// [`FrontendQueue::close`] ends the connection. Operations go in by [`FrontendQueue::submit`] and come out of
/// [`FrontendQueue::poll`]; those that a connection leaves unanswered are sent again on the next. The front
/// page of the crate shows one connected to a backend.
pub struct FrontendQueue<G: Granter, N> {
    granter: G,
    config: FrontendConfig,
    /// Of the current connection, or else of the last one.
    properties: Option<DeviceProperties>,
    pool: Pool<G::Pages>,
    leases: Leases<G::Pages>,
    /// By order of submission.
    pending: BTreeMap<u64, Pending>,
    next_io: u64,
    unsent: VecDeque<Unsent>,
    done: VecDeque<Completion>,
    link: Option<Link<G::Pages, N>>,
    stats: FrontendStats,
}

impl<G: Granter, N: Notify> FrontendQueue<G, N> {
    /// A queue without a connection.
    #[must_use]
    pub fn new(granter: G, config: FrontendConfig) -> Self {
        FrontendQueue {
            granter,
            config,
            properties: None,
            pool: Pool::new(config.max_pages),
            leases: Leases::new(config.max_pages),
            pending: BTreeMap::new(),
            next_io: 0,
            unsent: VecDeque::new(),
            done: VecDeque::new(),
            link: None,
            stats: FrontendStats::default(),
        }
    }

    /// Makes a ring of `ring_pages` pages, a power of two, and grants it: the references for the backend.
    ///
    /// # Errors
    /// [`OpenError`]; nothing stays granted then.
    pub fn open(&mut self, ring_pages: usize, port: N) -> Result<Vec<GrantRef>, OpenError> {
        if self.link.is_some() {
            return Err(OpenError::AlreadyOpen);
        }
        let slot = slot_size(self.config.abi);
        if !ring_pages.is_power_of_two() {
            return Err(ShapeError {
                pages: ring_pages,
                slot_size: slot,
            }
            .into());
        }
        let slots = RingShape::new(ring_pages, slot)?.slots();
        let pages = self.granter.alloc(ring_pages)?;
        let ring = FrontRing::init(pages, slot)?;
        let mut grefs = Vec::with_capacity(ring_pages);
        for index in 0..ring_pages {
            match self.granter.grant(ring.pages(), index, Access::ReadWrite) {
                Ok(gref) => grefs.push(gref),
                Err(error) => {
                    self.retire_ring(ring, grefs);
                    return Err(error.into());
                }
            }
        }
        let new_shadow = || Shadow {
            generation: 0,
            sent: None,
            pages: Vec::new(),
        };
        self.link = Some(Link {
            ring,
            grefs: grefs.clone(),
            port,
            shadows: (0..slots).map(|_| new_shadow()).collect(),
            free_ids: (0..slots).rev().collect(),
            started: false,
            broken: None,
        });
        Ok(grefs)
    }

    /// The backend is connected and described the device: starts sending, first what an earlier connection
    /// left unanswered. On a queue that runs already it takes over changed properties.
    pub fn start(&mut self, properties: DeviceProperties) {
        let properties = match self.properties {
            // What was negotiated holds for the whole connection, whatever the keys say later.
            Some(now) if self.is_running() => DeviceProperties {
                disk: properties.disk,
                ..now
            },
            _ => properties,
        };
        self.properties = Some(properties);
        if let Some(link) = &mut self.link {
            link.started = true;
        }
        self.pump();
        self.kick();
    }

    /// Whether there is a ring that a backend may use.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.link.is_some()
    }

    /// Whether requests reach a backend.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.link
            .as_ref()
            .is_some_and(|link| link.started && link.broken.is_none())
    }

    /// Ends the connection: every grant is ended, or retired with its page if the peer does not let go.
    /// Operations that were not answered wait for the next connection.
    pub fn close(&mut self) {
        let Some(link) = self.link.take() else { return };
        self.unlease();
        self.leases.end_grants(&mut self.granter);
        for page in link.shadows.into_iter().flat_map(|shadow| shadow.pages) {
            self.pool.put(page, For::Request);
        }
        self.pool.empty(&mut self.granter);
        self.retire_ring(link.ring, link.grefs);

        self.unsent.clear();
        for (io, pending) in &mut self.pending {
            let units = units(&pending.io);
            self.stats.requeued += 1;
            pending.left = units;
            pending.result = Ok(());
            self.unsent.push_back(Unsent {
                io: *io,
                offset: 0,
                units,
            });
        }
    }

    /// Closes the queue and takes all unfinished operations out, in order of submission, with their tokens.
    pub fn take_unfinished(&mut self) -> Vec<(u64, Io)> {
        self.close();
        self.unlease();
        self.unsent.clear();
        core::mem::take(&mut self.pending)
            .into_values()
            .map(|pending| (pending.token, pending.io))
            .collect()
    }

    /// Takes an operation in, unchecked: a new one, or what another queue of the device left unfinished.
    pub(super) fn adopt(&mut self, (token, io): (u64, Io)) {
        let id = self.next_io;
        self.next_io += 1;
        let units = units(&io);
        self.pending.insert(
            id,
            Pending {
                token,
                io,
                left: units,
                result: Ok(()),
            },
        );
        self.unsent.push_back(Unsent {
            io: id,
            offset: 0,
            units,
        });
    }

    /// Forgets operations with this token: they are not sent any more, and not reported.
    pub(super) fn withdraw(&mut self, token: u64) {
        self.pending.retain(|_, pending| pending.token != token);
        self.unsent.retain(|rest| self.pending.contains_key(&rest.io));
        self.done.retain(|done| done.token != token);
    }

    /// What the current connection, or the last one, said of the device.
    #[must_use]
    pub fn properties(&self) -> Option<DeviceProperties> {
        self.properties
    }

    /// Operations accepted whose completion was not polled.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len() + self.done.len()
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> FrontendStats {
        self.stats
    }

    /// Pages that data is bounced through now.
    #[must_use]
    pub fn pool_pages(&self) -> usize {
        self.pool.pages()
    }

    /// The event channel of the current connection.
    pub fn port_mut(&mut self) -> Option<&mut N> {
        self.link.as_mut().map(|link| &mut link.port)
    }

    /// Lends pages for `len` bytes of data of one operation, which need not be copied then. `None`: no more are lent
    /// now, or there are none; memory of the caller's own always does.
    pub fn lease(&mut self, len: usize) -> Option<Lease> {
        let count = len.div_ceil(PAGE_SIZE);
        if count > self.leases.room() {
            return None;
        }
        let mut pages = Vec::with_capacity(count);
        while pages.len() < count {
            match self.pool.take(&mut self.granter, For::Lease) {
                Ok(page) => pages.push(page),
                Err(_) => {
                    pages.into_iter().for_each(|page| self.pool.put(page, For::Lease));
                    return None;
                }
            }
        }
        Some(self.leases.lend(pages, len))
    }

    /// Takes a lease of this queue back.
    pub fn give_back(&mut self, lease: Lease) {
        if let Some(lent) = self.leases.take(&lease) {
            self.take_back(lent);
        }
    }

    fn take_back(&mut self, lent: Lent<G::Pages>) {
        let persistent = !lent.stale && self.properties.is_some_and(|properties| properties.persistent);
        // The last first, so that they are lent in the same order again: neighbours stay together.
        for page in lent.pages.into_iter().rev() {
            put_back((&mut self.pool, For::Lease), &mut self.granter, persistent, page);
        }
    }

    /// The memory of a lease of this queue from byte `from` on, page by page. Where grants persist the peer may be
    /// writing it.
    pub fn leased(&self, lease: &Lease, from: usize) -> impl Iterator<Item = SharedSliceMut<'_>> {
        let lent = self.leases.get(lease).into_iter();
        lent.flat_map(move |lent| lent.parts(from, lease.len))
    }

    /// Brings data that unfinished operations have in leased pages into memory of its own, where it outlasts the
    /// connection. None of them may be on a ring any more.
    fn unlease(&mut self) {
        let mut ended = Vec::new();
        for pending in self.pending.values_mut() {
            if let Io::Read { data, .. } | Io::Write { data, .. } = &mut pending.io
                && let Data::Leased(lease) = data
                && let Some(lent) = self.leases.take(lease)
            {
                *data = Data::Own(lent.content(lease.len));
                ended.push(lent);
            }
        }
        for lent in ended {
            lent.pages
                .into_iter()
                .for_each(|page| self.pool.put(page, For::Lease));
        }
    }

    /// Accepts an operation under the caller's `token`. It is put on the ring if there is room, and waits
    /// here otherwise, also while there is no connection. Call [`FrontendQueue::kick`] after the last of
    /// several; [`FrontendQueue::poll`] does it too.
    ///
    /// # Errors
    /// [`Rejected`], which brings the operation back.
    pub fn submit(&mut self, token: u64, mut io: Io) -> Result<(), Rejected> {
        if let Err(reason) = self.check(&io) {
            return Err(Rejected { io, reason });
        }
        if let Io::Read { data, .. } | Io::Write { data, .. } = &mut io
            && let Data::Leased(lease) = data
            && let Some(lent) = self.leases.take_stale(lease)
        {
            *data = Data::Own(lent.content(lease.len));
            self.take_back(lent);
        }
        let units = units(&io);
        let id = self.next_io;
        self.next_io += 1;
        self.pending.insert(
            id,
            Pending {
                token,
                io,
                left: units,
                result: Ok(()),
            },
        );
        let all_before_went_out = self.unsent.is_empty();
        self.unsent.push_back(Unsent {
            io: id,
            offset: 0,
            units,
        });
        if all_before_went_out {
            self.pump();
        }
        Ok(())
    }

    fn check(&self, io: &Io) -> Result<(), RejectReason> {
        let disk = self.properties.ok_or(RejectReason::NeverConnected)?.disk;
        let (sector, count) = match io {
            Io::Flush => return Ok(()),
            Io::Discard { sector, count, .. } => (*sector, *count),
            Io::Read { sector, data } | Io::Write { sector, data } => {
                if data.is_empty() || data.len() % SECTOR_SIZE != 0 {
                    return Err(RejectReason::Length(data.len()));
                }
                if let Data::Leased(lease) = data
                    && self.leases.get(lease).is_none()
                {
                    return Err(RejectReason::NotLent);
                }
                (*sector, (data.len() / SECTOR_SIZE) as u64)
            }
        };
        disk.check(sector, count)?;
        if disk.read_only && !matches!(io, Io::Read { .. }) {
            return Err(BadRequest::ReadOnly.into());
        }
        Ok(())
    }

    /// Shows the backend what was submitted and wakes it if it sleeps. One that broke the protocol is shown nothing.
    pub fn kick(&mut self) {
        if let Some(link) = &mut self.link
            && link.broken.is_none()
            && link.ring.publish()
        {
            self.stats.notifications += 1;
            link.port.notify();
        }
    }

    /// The next completion, in whatever order the backend answers. `None`: nothing until the backend's next
    /// event, for which the caller may sleep.
    ///
    /// # Errors
    /// [`DeviceBroken`], now and until [`FrontendQueue::close`]. Unfinished operations are kept.
    pub fn poll(&mut self) -> Result<Option<Completion>, DeviceBroken> {
        self.poll_and(true)
    }

    /// As [`FrontendQueue::poll`], for a caller that looks again instead of sleeping: no event is asked for, so `None`
    /// is no leave to sleep, and the backend need not send one.
    ///
    /// # Errors
    /// As [`FrontendQueue::poll`].
    pub fn poll_awake(&mut self) -> Result<Option<Completion>, DeviceBroken> {
        self.poll_and(false)
    }

    /// Requests that the backend has not answered, and those whose answers lie on the ring.
    ///
    /// # Errors
    /// As [`FrontendQueue::poll`], which also notes what is broken.
    pub fn awaited(&mut self) -> Result<Awaited, DeviceBroken> {
        let Some(link) = self.link.as_mut().filter(|link| link.started) else {
            return Ok(Awaited::default());
        };
        if let Some(broken) = link.broken {
            return Err(broken);
        }
        let answered = link.ring.waiting()?;
        Ok(Awaited {
            answered,
            unanswered: link.ring.outstanding() - answered,
        })
    }

    fn poll_and(&mut self, ask: bool) -> Result<Option<Completion>, DeviceBroken> {
        loop {
            if let Some(done) = self.done.pop_front() {
                return Ok(Some(done));
            }
            let Some(link) = self.link.as_mut().filter(|link| link.started) else {
                return Ok(None);
            };
            if let Some(broken) = link.broken {
                return Err(broken);
            }
            let mut slot = [0; MAX_SLOT];
            let taken = match link.ring.take(&mut slot) {
                Ok(false) => {
                    self.pump();
                    self.kick();
                    let link = self.link.as_mut().filter(|_| ask);
                    match link.map_or(Ok(false), |link| link.ring.final_check()) {
                        Ok(false) if self.done.is_empty() => return Ok(None),
                        other => other.map(|_| None),
                    }
                }
                other => other.map(|_| Some(RawResponse::from_bytes(&slot))),
            };
            let outcome = match taken {
                Ok(None) => Ok(()),
                Ok(Some(response)) => self.complete(response),
                Err(broken) => Err(broken.into()),
            };
            if let Err(broken) = outcome {
                if let Some(link) = &mut self.link {
                    link.broken = Some(broken);
                }
                return Err(broken);
            }
        }
    }

    fn retire_ring(&mut self, ring: FrontRing<G::Pages>, grefs: Vec<GrantRef>) {
        let still = grefs
            .into_iter()
            .filter(|gref| !self.granter.end(*gref))
            .collect();
        self.granter.retire(ring.into_pages(), still);
    }
}

impl<G: Granter, N> fmt::Debug for FrontendQueue<G, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontendQueue")
            .field("config", &self.config)
            .field("properties", &self.properties)
            .field("pending", &self.pending.len())
            .field("pool_pages", &self.pool.pages())
            .field("broken", &self.link.as_ref().and_then(|link| link.broken))
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

impl<G: Granter, N> Drop for FrontendQueue<G, N> {
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            for page in link.shadows.into_iter().flat_map(|shadow| shadow.pages) {
                self.pool.put(page, For::Request);
            }
            let still = link
                .grefs
                .into_iter()
                .filter(|gref| !self.granter.end(*gref))
                .collect();
            self.granter.retire(link.ring.into_pages(), still);
        }
        for lent in self.leases.take_all() {
            lent.pages
                .into_iter()
                .for_each(|page| self.pool.put(page, For::Lease));
        }
        self.pool.empty(&mut self.granter);
    }
}

/// What an operation counts: its bytes, or one.
fn units(io: &Io) -> usize {
    match io {
        Io::Read { data, .. } | Io::Write { data, .. } => data.len(),
        Io::Flush | Io::Discard { .. } => 1,
    }
}
