//! The frontend's half of one queue: reads and writes of any length go in, become requests that fit the
//! ring, and come out as completions.
//!
//! # Rules
//! 1. Data is bounced: what the peer can reach are pages of the pool, never the caller's buffers.
//! 2. A response must name a request that is outstanding and its operation; each identifier is good once
//!    (PVR-3). Anything else breaks the device: nothing is read from or sent to it until it is closed and
//!    connected anew.
//! 3. Nothing that was accepted is lost: an operation stays here, with its data, until it is answered in
//!    full. After a new connection it is sent again from its start, in the order of submission.
//! 4. A page that the peer maps is never reused as private memory, whatever the peer does.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use gnttab_abi::{Abi, GrantRef, PAGE_SIZE};

use super::disk::DiskInfo;
use super::layout::{
    MAX_DIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS, MAX_SLOT, RawResponse, SECTOR_SIZE, SECTORS_PER_PAGE,
    SEGMENT_SIZE, SEGMENTS_PER_INDIRECT_PAGE, Slot, slot_size,
};
use super::pool::{Pool, PoolPage};
use super::request::{
    BadRequest, Direct, Direction, Discard, Indirect, Operation, Request, Segment, Status, Transfer,
    indirect_pages_for,
};
use crate::grants::{Access, GrantError, Granter, Notify};
use crate::ring::{FrontRing, RingBroken, RingShape, ShapeError};

/// How a frontend queue works, whoever its peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendConfig {
    /// Layout of the ring.
    pub abi: Abi,
    /// The device's number, sent along in requests.
    pub handle: u16,
    /// Most segments of an indirect request; the backend's own limit counts too. 11 or less: none are sent.
    pub max_indirect: u16,
    /// Most pages that data is bounced through.
    pub max_pages: usize,
}

impl FrontendConfig {
    /// Linux's limits: up to 32 segments a request, and pages for a full ring of one page of those.
    #[must_use]
    pub const fn new(abi: Abi) -> FrontendConfig {
        FrontendConfig {
            abi,
            handle: 0,
            max_indirect: 32,
            max_pages: 32 * 33,
        }
    }
}

/// What a backend said of the device and of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    /// The disk. `flush` stands for `feature-flush-cache`.
    pub disk: DiskInfo,
    /// `feature-barrier`, used where there is no flush.
    pub barrier: bool,
    /// Both sides said `feature-persistent`.
    pub persistent: bool,
    /// `feature-max-indirect-segments`; 0 for none.
    pub max_indirect: u16,
}

/// An operation on the device. Sectors are of 512 bytes; all must be whole logical sectors of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Io {
    /// Fills the whole buffer from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// What to fill; its length is the length of the read.
        data: Vec<u8>,
    },
    /// Writes the whole buffer from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Makes all writes durable that were completed before this was submitted.
    Flush,
    /// Forgets the content of sectors.
    Discard {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
        /// For good.
        secure: bool,
    },
}

/// An operation that has ended, and the buffer it brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`FrontendQueue::submit`] was given.
    pub token: u64,
    /// The operation, with the data of a read.
    pub io: Io,
    /// How it ended. After an error the content of a read's buffer, or of a write's sectors, is any mixture.
    pub result: Result<(), IoError>,
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The backend failed to do it.
    #[error("the backend reports an input/output error")]
    Failed,
    /// The backend does not do this.
    #[error("the backend does not support the operation")]
    NotSupported,
    /// There are no pages or references to do it with.
    #[error(transparent)]
    Grant(#[from] GrantError),
}

/// An operation that was not accepted; it comes back whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Rejected {
    /// The operation.
    pub io: Io,
    /// Why.
    pub reason: RejectReason,
}

/// Why an operation was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RejectReason {
    /// It does not fit the disk.
    #[error(transparent)]
    Request(#[from] BadRequest),
    /// The buffer is empty or no whole sectors.
    #[error("a buffer of {0} bytes is not one or more whole sectors")]
    Length(usize),
    /// Nothing is known of the device: no backend was ever connected.
    #[error("no backend was connected yet")]
    NeverConnected,
}

/// The backend broke the protocol: the device is of no use until it is connected anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceBroken {
    /// By its producer index.
    #[error(transparent)]
    Ring(#[from] RingBroken),
    /// By an identifier that is not outstanding.
    #[error("the response's identifier {0:#x} names no outstanding request")]
    UnknownId(u64),
    /// By the operation of its response.
    #[error("the response to {id:#x} names operation {got}, the request was {expected}")]
    WrongOperation {
        /// The request.
        id: u64,
        /// Its operation.
        expected: u8,
        /// The response's.
        got: u8,
    },
    /// By keeping a page mapped, without persistent grants.
    #[error("the backend still maps reference {0} of a finished request")]
    StillMapped(GrantRef),
}

/// A queue could not be opened. Nothing stays granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No such ring.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// No pages or references for it.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// There is a connection already.
    #[error("the queue is open already")]
    AlreadyOpen,
}

/// What a queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// Requests put on the ring.
    pub requests: u64,
    /// Responses taken from it.
    pub responses: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Operations that failed.
    pub failures: u64,
    /// Operations sent again after a reconnect.
    pub requeued: u64,
    /// Times that the peer was notified.
    pub notifications: u64,
}

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
    /// Data pages first, then indirect pages.
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
    /// By order of submission.
    pending: BTreeMap<u64, Pending>,
    next_io: u64,
    unsent: VecDeque<Unsent>,
    done: VecDeque<Completion>,
    link: Option<Link<G::Pages, N>>,
    stats: FrontendStats,
}

/// Why sending stopped.
enum Stop {
    /// No slot or no page until a response comes.
    Full,
    /// No page at all, and nothing outstanding that would bring one back.
    Grant(GrantError),
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
        for page in link.shadows.into_iter().flat_map(|shadow| shadow.pages) {
            self.pool.put(page);
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

    /// Takes all unfinished operations out, in order of submission, with their tokens. For a closed queue.
    pub fn take_unfinished(&mut self) -> Vec<(u64, Io)> {
        debug_assert!(self.link.is_none(), "the backend may still work on them");
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

    /// Accepts an operation under the caller's `token`. It is put on the ring if there is room, and waits
    /// here otherwise, also while there is no connection. Call [`FrontendQueue::kick`] after the last of
    /// several; [`FrontendQueue::poll`] does it too.
    ///
    /// # Errors
    /// [`Rejected`], which brings the operation back.
    pub fn submit(&mut self, token: u64, io: Io) -> Result<(), Rejected> {
        if let Err(reason) = self.check(&io) {
            return Err(Rejected { io, reason });
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
                (*sector, (data.len() / SECTOR_SIZE) as u64)
            }
        };
        disk.check(sector, count)?;
        if disk.read_only && !matches!(io, Io::Read { .. }) {
            return Err(BadRequest::ReadOnly.into());
        }
        Ok(())
    }

    /// Shows the backend what was submitted and wakes it if it sleeps.
    pub fn kick(&mut self) {
        if let Some(link) = &mut self.link
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
                    match self
                        .link
                        .as_mut()
                        .map_or(Ok(false), |link| link.ring.final_check())
                    {
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

    /// Sends as much as there is room for, in order.
    fn pump(&mut self) {
        if !self.is_running() {
            return;
        }
        while let Some(rest) = self.unsent.pop_front() {
            match self.send(rest) {
                Ok(units) if units < rest.units => self.unsent.push_front(Unsent {
                    offset: rest.offset + units,
                    units: rest.units - units,
                    ..rest
                }),
                Ok(_) => {}
                Err(Stop::Full) => {
                    self.unsent.push_front(rest);
                    return;
                }
                Err(Stop::Grant(error)) => self.settle(rest.io, rest.units, Err(error.into())),
            }
        }
    }

    /// Sends the start of what is left of an operation; the units that went out.
    fn send(&mut self, rest: Unsent) -> Result<usize, Stop> {
        let (Some(pending), Some(link), Some(properties)) =
            (self.pending.get(&rest.io), &mut self.link, self.properties)
        else {
            return Ok(rest.units);
        };
        let Some(&id) = link.free_ids.last() else {
            return Err(Stop::Full);
        };
        let mut pages = Vec::new();
        let (request, units) = match &pending.io {
            Io::Flush => {
                let transfer = match (properties.disk.flush, properties.barrier) {
                    (true, _) => Transfer::Flush,
                    (false, true) => Transfer::Barrier,
                    // No cache to flush.
                    (false, false) => {
                        self.settle(rest.io, rest.units, Ok(()));
                        return Ok(rest.units);
                    }
                };
                (Direct::new(transfer, 0, &[]).map(Request::Direct), rest.units)
            }
            Io::Discard {
                sector,
                count,
                secure,
            } => match properties.disk.discard {
                Some(info) => {
                    let discard = Discard {
                        sector: *sector,
                        count: *count,
                        secure: *secure && info.secure,
                    };
                    (Ok(Request::Discard(discard)), rest.units)
                }
                None => {
                    self.settle(rest.io, rest.units, Err(IoError::NotSupported));
                    return Ok(rest.units);
                }
            },
            Io::Read { sector, data } | Io::Write { sector, data } => {
                let direction = match &pending.io {
                    Io::Read { .. } => Direction::Read,
                    _ => Direction::Write,
                };
                let max_indirect = self.config.max_indirect.min(properties.max_indirect);
                let count = segments_that_fit(
                    rest.units.div_ceil(PAGE_SIZE),
                    max_indirect,
                    self.pool.available(),
                );
                let bytes = rest.units.min(count * PAGE_SIZE);
                let bounce = Bounce {
                    pool: &mut self.pool,
                    granter: &mut self.granter,
                    persistent: properties.persistent,
                    pages: &mut pages,
                };
                let sector = sector + (rest.offset / SECTOR_SIZE) as u64;
                let request = bounce.request(direction, sector, &data[rest.offset..][..bytes]);
                match request {
                    Ok(request) => (request, bytes),
                    Err(error) => {
                        let stuck = link.free_ids.len() == link.shadows.len();
                        for page in pages {
                            put_back(&mut self.pool, &mut self.granter, properties.persistent, page);
                        }
                        return Err(if stuck { Stop::Grant(error) } else { Stop::Full });
                    }
                }
            }
        };
        // Put together of checked parts: refused only if this module is wrong, and then nothing is sent.
        let Ok(request) = request else {
            return Err(Stop::Full);
        };

        let shadow = &mut link.shadows[id as usize];
        let mut slot = Slot::new(self.config.abi);
        request.encode(
            u64::from(shadow.generation) << 32 | u64::from(id),
            self.config.handle,
            &mut slot,
        );
        shadow.sent = Some(Sent {
            io: rest.io,
            answered_as: request.answered_as(),
            offset: rest.offset,
            units,
        });
        shadow.pages = pages;
        link.free_ids.pop();
        // As many identifiers as slots: the ring has room.
        let pushed = link.ring.push(slot.bytes());
        debug_assert!(pushed.is_ok());
        self.stats.requests += 1;
        Ok(units)
    }

    /// Takes a response: rules 2 and 4 (spec 2.3).
    fn complete(&mut self, response: RawResponse) -> Result<(), DeviceBroken> {
        let (Some(link), Some(properties)) = (&mut self.link, &mut self.properties) else {
            return Ok(());
        };
        let (Ok(index), generation) = (u32::try_from(response.id & 0xFFFF_FFFF), response.id >> 32) else {
            return Err(DeviceBroken::UnknownId(response.id));
        };
        let sent = link
            .shadows
            .get_mut(index as usize)
            .filter(|shadow| u64::from(shadow.generation) == generation)
            .and_then(|shadow| {
                shadow
                    .sent
                    .as_ref()
                    .map(|sent| sent.answered_as)
                    .map(|op| (shadow, op))
            });
        let Some((shadow, operation)) = sent else {
            return Err(DeviceBroken::UnknownId(response.id));
        };
        if response.operation != operation.code() {
            return Err(DeviceBroken::WrongOperation {
                id: response.id,
                expected: operation.code(),
                got: response.operation,
            });
        }
        // Access ends first, so that what is copied below is final (except where grants persist).
        for page in &mut shadow.pages {
            if let Some(gref) = page.gref {
                if self.granter.end(gref) {
                    page.gref = None;
                } else if !properties.persistent {
                    return Err(DeviceBroken::StillMapped(gref));
                }
            }
        }
        let Some(sent) = shadow.sent.take() else {
            return Ok(());
        };
        shadow.generation = shadow.generation.wrapping_add(1);
        let pages = core::mem::take(&mut shadow.pages);
        link.free_ids.push(index);
        self.stats.responses += 1;

        let result = match Status::from_code(response.status) {
            Status::Okay => Ok(()),
            Status::Error => Err(IoError::Failed),
            Status::NotSupported => match operation {
                // It said that it could and cannot: from now on nothing is flushed, as if it had not.
                Operation::Flush | Operation::Barrier => {
                    properties.disk.flush = false;
                    properties.barrier = false;
                    Ok(())
                }
                Operation::Discard => {
                    properties.disk.discard = None;
                    Err(IoError::NotSupported)
                }
                _ => Err(IoError::Failed),
            },
        };
        if result.is_ok()
            && let Some(Pending {
                io: Io::Read { data, .. },
                ..
            }) = self.pending.get_mut(&sent.io)
        {
            let into = data[sent.offset..][..sent.units].chunks_mut(PAGE_SIZE);
            for (into, page) in into.zip(&pages) {
                page.page.as_ref().read(0, into);
            }
        }
        for page in pages {
            self.pool.put(page);
        }
        self.settle(sent.io, sent.units, result);
        Ok(())
    }

    /// Counts units of an operation as answered, and completes it with the last. After a failure what was
    /// not sent of it is not sent any more: its remainder, if any, is in `unsent`.
    fn settle(&mut self, io: u64, units: usize, result: Result<(), IoError>) {
        let Some(pending) = self.pending.get_mut(&io) else {
            return;
        };
        pending.left -= units;
        pending.result = pending.result.and(result);
        if pending.result.is_err()
            && let Some(at) = self.unsent.iter().position(|rest| rest.io == io)
            && let Some(rest) = self.unsent.remove(at)
        {
            pending.left -= rest.units;
        }
        if pending.left > 0 {
            return;
        }
        let Some(Pending {
            token, io, result, ..
        }) = self.pending.remove(&io)
        else {
            return;
        };
        match (&io, result) {
            (_, Err(_)) => self.stats.failures += 1,
            (Io::Read { data, .. }, Ok(())) => self.stats.bytes_read += data.len() as u64,
            (Io::Write { data, .. }, Ok(())) => self.stats.bytes_written += data.len() as u64,
            _ => {}
        }
        self.done.push_back(Completion { token, io, result });
    }

    fn retire_ring(&mut self, ring: FrontRing<G::Pages>, grefs: Vec<GrantRef>) {
        let still = grefs
            .into_iter()
            .filter(|gref| !self.granter.end(*gref))
            .collect();
        self.granter.retire(ring.into_pages(), still);
    }
}

impl<G: Granter, N> Drop for FrontendQueue<G, N> {
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            for page in link.shadows.into_iter().flat_map(|shadow| shadow.pages) {
                self.pool.put(page);
            }
            let still = link
                .grefs
                .into_iter()
                .filter(|gref| !self.granter.end(*gref))
                .collect();
            self.granter.retire(link.ring.into_pages(), still);
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

/// How many of `wanted` data pages a request can take: by its form, and by the pages there are, those of an
/// indirect request's segments included.
fn segments_that_fit(wanted: usize, max_indirect: u16, available: usize) -> usize {
    let max = usize::from(max_indirect.min(MAX_INDIRECT_SEGMENTS));
    let count = wanted.min(max.max(MAX_DIRECT_SEGMENTS));
    let indirect_pages = count.div_ceil(SEGMENTS_PER_INDIRECT_PAGE);
    if count <= MAX_DIRECT_SEGMENTS || count + indirect_pages > available {
        count
            .min(MAX_DIRECT_SEGMENTS.max(available.saturating_sub(indirect_pages)))
            .min(available)
    } else {
        count
    }
}

/// Ends a page's grant unless it may persist, and puts it back. For pages that no request used.
fn put_back<G: Granter>(
    pool: &mut Pool<G::Pages>,
    granter: &mut G,
    persistent: bool,
    mut page: PoolPage<G::Pages>,
) {
    match page.gref {
        Some(gref) if !persistent && !granter.end(gref) => pool.retire(granter, page),
        Some(_) if persistent => pool.put(page),
        _ => {
            page.gref = None;
            pool.put(page);
        }
    }
}

/// Puts the data of one request into pages.
struct Bounce<'a, G: Granter> {
    pool: &'a mut Pool<G::Pages>,
    granter: &'a mut G,
    persistent: bool,
    /// Receives every page taken, also when there are not enough.
    pages: &'a mut Vec<PoolPage<G::Pages>>,
}

impl<G: Granter> Bounce<'_, G> {
    /// A request for `data`, which is copied if it is to be written.
    fn request(
        mut self,
        direction: Direction,
        sector: u64,
        data: &[u8],
    ) -> Result<Result<Request, BadRequest>, GrantError> {
        let access = match direction {
            Direction::Read => Access::ReadWrite,
            Direction::Write => Access::ReadOnly,
        };
        let mut segments = Vec::with_capacity(data.len().div_ceil(PAGE_SIZE));
        if data.is_empty() {
            return Err(GrantError::NoPages);
        }
        for chunk in data.chunks(PAGE_SIZE) {
            let from = if direction == Direction::Write { chunk } else { &[] };
            let gref = self.page(access, from)?;
            let sectors = u8::try_from(chunk.len() / SECTOR_SIZE).unwrap_or(SECTORS_PER_PAGE);
            match Segment::leading(gref, sectors) {
                Ok(segment) => segments.push(segment),
                Err(bad) => return Ok(Err(bad)),
            }
        }
        if segments.len() <= MAX_DIRECT_SEGMENTS {
            return Ok(Direct::new(direction.transfer(), sector, &segments).map(Request::Direct));
        }
        let count = u16::try_from(segments.len()).unwrap_or(u16::MAX);
        let mut pages = Vec::with_capacity(indirect_pages_for(count));
        for some in segments.chunks(SEGMENTS_PER_INDIRECT_PAGE) {
            let mut bytes = [0; PAGE_SIZE];
            for (place, segment) in bytes.chunks_exact_mut(SEGMENT_SIZE).zip(some) {
                place.copy_from_slice(&segment.raw().to_bytes());
            }
            pages.push(self.page(Access::ReadOnly, &bytes)?);
        }
        Ok(Indirect::new(direction, sector, count, &pages).map(Request::Indirect))
    }

    fn page(&mut self, access: Access, content: &[u8]) -> Result<GrantRef, GrantError> {
        // A grant that may persist has to serve reads as well as writes.
        let access = if self.persistent {
            Access::ReadWrite
        } else {
            access
        };
        let (page, gref) = self.pool.take(self.granter, access)?;
        page.page.as_ref().write(0, content);
        self.pages.push(page);
        Ok(gref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_take_what_the_pages_allow() {
        // wanted, indirect, available -> segments
        for (wanted, max, available, expected) in [
            (1, 0, 100, 1),
            (50, 0, 100, 11),
            (50, 11, 100, 11),
            (50, 32, 100, 32),
            (20, 32, 100, 20),
            (50, 32, 33, 32),
            (50, 32, 32, 31),
            (50, 32, 12, 11),
            (50, 32, 5, 5),
            (50, 32, 0, 0),
            (600, 4096, 10_000, 600),
            (5000, u16::MAX, 10_000, 4096),
        ] {
            assert_eq!(
                segments_that_fit(wanted, max, available),
                expected,
                "{wanted} {max} {available}"
            );
        }
    }
}
