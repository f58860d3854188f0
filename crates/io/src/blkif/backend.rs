//! The backend's half of one queue: takes requests from the ring, moves data between the peer's pages and a
//! [`Disk`], answers.
//!
//! # Rules
//! 1. A request is judged on its private copy, in the order of spec 2.2; the segments of an indirect request
//!    are copied out of their pages once, and judged on that copy.
//! 2. The peer's data pages are never looked at. They go to the disk as addresses and lengths: what the peer
//!    writes into them meanwhile changes its own data and nothing else. No `&[u8]` over them exists.
//! 3. Whatever a request holds, it gets exactly one answer, and every page that was mapped for it alone is
//!    unmapped before, on every path.
//! 4. A call of [`BackendQueue::process`] serves at most as many requests as it was told to.
//! 5. A ring that makes no sense is an error that ends this connection and concerns nobody else.
//! 6. All mappings go when the queue is dropped (PVR-9).
//!
//! With persistent grants the working set of pages stays mapped, and a request costs a look-up for each page
//! and one disk operation: no hypercall. Requests of one queue are served one after the other, which keeps
//! their order and makes barriers free; depth comes from having several queues, each on a thread of its own.

use alloc::vec::Vec;

use gnttab_abi::{Abi, GrantRef, GrantStatus, PAGE_SIZE};

use super::disk::{Disk, DiskError, DiskInfo};
use super::layout::{
    MAX_DIRECT_SEGMENTS, RawSegment, SEGMENT_SIZE, SEGMENTS_PER_INDIRECT_PAGE, Slot, response_size, slot_size,
};
use super::persistent::PersistentGrants;
use super::request::{BadRequest, Discard, Indirect, Request, Segment, Status, Transfer, answer};
use crate::grants::{Access, CopyDirection, CopyPart, Grantee, Notify};
use crate::ring::{AttachError, BackRing, RingBroken};
use crate::shared::{SharedPages, SharedSlice, SharedSliceMut};

/// How a queue serves its peer: what was negotiated, and what is ours to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendConfig {
    /// Layout of the ring.
    pub abi: Abi,
    /// Both sides said `feature-persistent`.
    pub persistent: bool,
    /// Mappings that are kept, where persistent grants were negotiated.
    pub persistent_limit: usize,
    /// Segments of an indirect request, as advertised; 0 for none, at most 4096.
    pub max_indirect: u16,
    /// What is done with pages that are not kept.
    pub one_shot: OneShot,
}

impl BackendConfig {
    /// Linux's limits: 256 indirect segments, 1056 persistent mappings, one-shot pages mapped.
    #[must_use]
    pub const fn new(abi: Abi, persistent: bool) -> BackendConfig {
        BackendConfig {
            abi,
            persistent,
            persistent_limit: 1056,
            max_indirect: 256,
            one_shot: OneShot::Map,
        }
    }
}

/// How a page that is used for one request only is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OneShot {
    /// Mapped, and unmapped before the answer.
    Map,
    /// Copied through a buffer by the hypervisor.
    Copy,
}

/// What a call of [`BackendQueue::process`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests answered. None at all: the event that led here was spurious.
    pub served: u32,
    /// The budget was used up and there may be more: call again without waiting for an event.
    pub more: bool,
}

/// What a queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Read requests done.
    pub reads: u64,
    /// Write requests done.
    pub writes: u64,
    /// Flushes and barriers done.
    pub flushes: u64,
    /// Discards done.
    pub discards: u64,
    /// Bytes read from the disk.
    pub bytes_read: u64,
    /// Bytes written to the disk.
    pub bytes_written: u64,
    /// Requests refused or failed.
    pub failures: u64,
    /// Pages mapped, for good or for one request.
    pub mapped: u64,
    /// Pages copied by the hypervisor.
    pub copied: u64,
    /// Times that the peer was notified.
    pub notifications: u64,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It was refused.
    #[error(transparent)]
    Request(#[from] BadRequest),
    /// One of its pages could not be mapped or copied.
    #[error("a page of the request: {0}")]
    Grant(GrantStatus),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl Failure {
    /// The status that answers it.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Failure::Request(bad) => bad.status(),
            Failure::Disk(DiskError::NotSupported) => Status::NotSupported,
            Failure::Grant(_) | Failure::Disk(DiskError::Failed) => Status::Error,
        }
    }
}

/// A queue could not be connected. Nothing stays mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The ring's pages could not be mapped.
    #[error("mapping the ring: {0}")]
    Map(GrantStatus),
    /// They hold no ring.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// The backend's half of one queue of a block device.
///
/// ```
/// use gnttab_abi::Abi;
/// use gnttab_io::blkif::{BackendConfig, BackendQueue, Disk as _};
/// use gnttab_io::fake::{FakeDomain, NullPort, RamDisk};
///
/// let frontend = FakeDomain::new();
/// let ring = frontend.grant_ring(1, 112);
/// let disk = RamDisk::new(64);
/// let config = BackendConfig::new(Abi::X86_64, true);
/// let mut queue = BackendQueue::connect(frontend.grantee(), &ring, config, disk.info())?;
/// let progress = queue.process(&disk, &mut NullPort, 32)?;
/// assert_eq!(progress.served, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BackendQueue<G: Grantee> {
    // `None` only while the queue is dropped.
    ring: Option<BackRing<G::Mapping>>,
    server: Server<G>,
}

impl<G: Grantee> BackendQueue<G> {
    /// Maps the ring that the frontend granted and attaches to it. A ring in use is taken up where the
    /// backend before left it.
    ///
    /// # Errors
    /// [`ConnectError`]; nothing stays mapped then.
    pub fn connect(
        mut grantee: G,
        ring: &[GrantRef],
        config: BackendConfig,
        disk: DiskInfo,
    ) -> Result<Self, ConnectError> {
        let mapping = grantee.map_run(ring).map_err(ConnectError::Map)?;
        match BackRing::attach(mapping, slot_size(config.abi)) {
            Ok(ring) => Ok(BackendQueue {
                ring: Some(ring),
                server: Server::new(grantee, config, disk),
            }),
            Err(failed) => {
                grantee.unmap(&mut Vec::from([failed.pages]));
                Err(failed.error.into())
            }
        }
    }

    /// Serves up to `budget` requests. Call it when the peer has sent an event, and again while
    /// [`Progress::more`] says so; otherwise wait for the next event.
    ///
    /// # Errors
    /// [`RingBroken`]: the ring is dead, now and at every later call. Disconnect.
    pub fn process(
        &mut self,
        disk: &impl Disk,
        port: &mut impl Notify,
        budget: u32,
    ) -> Result<Progress, RingBroken> {
        let BackendQueue {
            ring: Some(ring),
            server,
        } = self
        else {
            return Ok(Progress {
                served: 0,
                more: false,
            });
        };
        let abi = server.config.abi;
        let mut slot = Slot::new(abi);
        let mut served = 0;
        loop {
            while served < budget
                && let Some(owed) = ring.take(slot.bytes_mut())?
            {
                let status = server.serve(&slot, disk);
                ring.respond(owed, &answer(&slot, status).to_bytes()[..response_size(abi)]);
                if ring.publish() {
                    server.stats.notifications += 1;
                    port.notify();
                }
                served += 1;
            }
            if served >= budget {
                return Ok(Progress { served, more: true });
            }
            if !ring.final_check()? {
                return Ok(Progress { served, more: false });
            }
        }
    }

    /// Tells the queue the time, in milliseconds from any start: from time to time it lets go of persistent
    /// mappings that nobody uses. Every 100 ms is enough.
    pub fn tick(&mut self, now_ms: u64) {
        let mut old = self.server.persistent.purge(now_ms);
        self.server.grantee.unmap(&mut old);
    }

    /// Takes over a disk whose size or nature has changed.
    pub fn set_disk(&mut self, disk: DiskInfo) {
        self.server.disk = disk;
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> BackendStats {
        self.server.stats
    }

    /// Persistent mappings held now.
    #[must_use]
    pub fn persistent_mappings(&self) -> usize {
        self.server.persistent.len()
    }

    /// Why the last request that failed did.
    #[must_use]
    pub fn last_failure(&self) -> Option<Failure> {
        self.server.last_failure
    }

    /// Unmaps everything, as dropping does.
    pub fn disconnect(self) {}
}

impl<G: Grantee> Drop for BackendQueue<G> {
    fn drop(&mut self) {
        let Server {
            persistent,
            one_shot,
            grantee,
            ..
        } = &mut self.server;
        let mut all = persistent.drain();
        all.append(one_shot);
        all.extend(self.ring.take().map(BackRing::into_pages));
        grantee.unmap(&mut all);
    }
}

/// Where the data of one segment is reached.
#[derive(Clone, Copy)]
enum Place {
    /// In a mapping that is kept.
    Persistent(usize),
    /// In a mapping for this request alone.
    OneShot(usize),
    /// In this page of the buffer, to and from which it is copied.
    Buffer(usize),
}

/// Everything but the ring: what serves one request after the other.
struct Server<G: Grantee> {
    grantee: G,
    config: BackendConfig,
    disk: DiskInfo,
    persistent: PersistentGrants<G::Mapping>,
    /// Made when the first copy needs it.
    buffer: Option<G::Buffer>,
    stats: BackendStats,
    last_failure: Option<Failure>,
    // What follows belongs to the request being served, kept to reuse its memory.
    segments: Vec<Segment>,
    wanted: Vec<GrantRef>,
    places: Vec<Place>,
    one_shot: Vec<G::Mapping>,
}

impl<G: Grantee> Server<G> {
    fn new(grantee: G, config: BackendConfig, disk: DiskInfo) -> Self {
        let limit = if config.persistent {
            config.persistent_limit
        } else {
            0
        };
        Server {
            grantee,
            config,
            disk,
            persistent: PersistentGrants::new(limit),
            buffer: None,
            stats: BackendStats::default(),
            last_failure: None,
            segments: Vec::new(),
            wanted: Vec::new(),
            places: Vec::new(),
            one_shot: Vec::new(),
        }
    }

    fn serve(&mut self, slot: &Slot, disk: &impl Disk) -> Status {
        let result = self.try_serve(slot, disk);
        self.release();
        match result {
            Ok(()) => Status::Okay,
            Err(failure) => {
                self.stats.failures += 1;
                self.last_failure = Some(failure);
                failure.status()
            }
        }
    }

    fn try_serve(&mut self, slot: &Slot, disk: &impl Disk) -> Result<(), Failure> {
        match Request::parse(slot, self.config.max_indirect)? {
            Request::Direct(direct) => {
                self.segments.clear();
                self.segments.extend(direct.segments());
                self.transfer(direct.transfer, direct.sector, disk)
            }
            Request::Indirect(indirect) => {
                self.fetch_segments(&indirect)?;
                self.transfer(indirect.direction.transfer(), indirect.sector, disk)
            }
            Request::Discard(discard) => self.discard(discard, disk),
        }
    }

    /// Copies the segments of an indirect request out of its pages, once, and checks each.
    fn fetch_segments(&mut self, indirect: &Indirect) -> Result<(), Failure> {
        self.wanted.clear();
        self.wanted.extend(indirect.pages());
        self.acquire(Access::ReadOnly)?;
        if self.uses_buffer() {
            let parts: Vec<CopyPart> = self
                .wanted
                .iter()
                .zip(&self.places)
                .filter_map(|(gref, place)| match place {
                    Place::Buffer(index) => Some(CopyPart {
                        gref: *gref,
                        offset: 0,
                        len: PAGE_SIZE,
                        at: index * PAGE_SIZE,
                    }),
                    _ => None,
                })
                .collect();
            self.copy(CopyDirection::FromPeer, &parts)?;
        }
        let mut segments = core::mem::take(&mut self.segments);
        segments.clear();
        let read = self.read_segments(indirect.count(), &mut segments);
        self.segments = segments;
        self.release();
        read
    }

    /// Copies `count` raw segments out of the pages at `self.places`, each page once.
    fn read_segments(&self, count: usize, segments: &mut Vec<Segment>) -> Result<(), Failure> {
        let mut raw = [0; SEGMENTS_PER_INDIRECT_PAGE * SEGMENT_SIZE];
        let mut left = count;
        for place in &self.places {
            let raw = &mut raw[..left.min(SEGMENTS_PER_INDIRECT_PAGE) * SEGMENT_SIZE];
            let (page, base) = self.page(*place).ok_or(LOST)?;
            page.read(base, raw);
            for bytes in raw.chunks_exact(SEGMENT_SIZE) {
                let bytes = core::array::from_fn(|i| bytes[i]);
                segments.push(Segment::new(RawSegment::from_bytes(bytes))?);
                left -= 1;
            }
        }
        Ok(())
    }

    /// A read, write, barrier or flush of `self.segments`: spec 2.2 from step 3 on.
    fn transfer(&mut self, transfer: Transfer, sector: u64, disk: &impl Disk) -> Result<(), Failure> {
        let mut count = 0;
        for segment in &self.segments {
            let sectors = u64::from(segment.sectors());
            self.disk.check_alignment(0, sectors)?;
            count += sectors;
        }
        if count > 0 {
            self.disk.check(sector, count)?;
            if self.disk.read_only && transfer != Transfer::Read {
                return Err(BadRequest::ReadOnly.into());
            }
        }
        let flushes = matches!(transfer, Transfer::Barrier | Transfer::Flush);
        if flushes && !self.disk.flush {
            return Err(BadRequest::NotSupported.into());
        }
        self.wanted.clear();
        self.wanted
            .extend(self.segments.iter().map(|segment| segment.gref()));
        match transfer {
            Transfer::Read => {
                self.read(sector, disk)?;
                self.stats.reads += 1;
                self.stats.bytes_read += count * 512;
                return Ok(());
            }
            Transfer::Write => {
                self.write(sector, disk)?;
                self.stats.writes += 1;
            }
            // Served in order, so all that came before is complete. The data of a flush is written before
            // it, so that it is durable too; that of a barrier stands between two.
            Transfer::Flush | Transfer::Barrier => {
                if count > 0 {
                    if transfer == Transfer::Barrier {
                        disk.flush()?;
                    }
                    self.write(sector, disk)?;
                }
                disk.flush()?;
                self.stats.flushes += 1;
            }
        }
        self.stats.bytes_written += count * 512;
        Ok(())
    }

    fn read(&mut self, sector: u64, disk: &impl Disk) -> Result<(), Failure> {
        self.acquire(Access::ReadWrite)?;
        let into: Option<Vec<SharedSliceMut<'_>>> = self
            .data()
            .map(|data| data.map(|(page, at, len)| page.slice_mut(at, len)))
            .collect();
        disk.read(sector, &into.ok_or(LOST)?)?;
        self.copy_data(CopyDirection::ToPeer)
    }

    fn write(&mut self, sector: u64, disk: &impl Disk) -> Result<(), Failure> {
        self.acquire(Access::ReadOnly)?;
        self.copy_data(CopyDirection::FromPeer)?;
        let from: Option<Vec<SharedSlice<'_>>> = self
            .data()
            .map(|data| data.map(|(page, at, len)| page.slice(at, len)))
            .collect();
        Ok(disk.write(sector, &from.ok_or(LOST)?)?)
    }

    fn discard(&mut self, discard: Discard, disk: &impl Disk) -> Result<(), Failure> {
        let info = self.disk.discard.ok_or(BadRequest::NotSupported)?;
        self.disk.check(discard.sector, discard.count)?;
        if self.disk.read_only {
            return Err(BadRequest::ReadOnly.into());
        }
        disk.discard(discard.sector, discard.count, discard.secure && info.secure)?;
        self.stats.discards += 1;
        Ok(())
    }

    /// Makes the pages of `self.wanted` reachable and notes where, one place for each. Pages that were
    /// mapped before an error stay in the records, which [`Server::release`] and the persistent grants keep.
    fn acquire(&mut self, access: Access) -> Result<(), Failure> {
        self.release();
        let mut missing = Vec::new();
        for (index, gref) in self.wanted.iter().enumerate() {
            let slot = self.persistent.find(*gref).unwrap_or_else(|| {
                missing.push(index);
                usize::MAX
            });
            self.places.push(Place::Persistent(slot));
        }
        if missing.is_empty() {
            return Ok(());
        }
        let (keep, rest) = missing.split_at(missing.len().min(self.persistent.room()));
        // A page that is kept will serve reads as well as writes.
        let kept = self.map(keep, Access::ReadWrite, true);
        if rest.is_empty() {
            return kept;
        }
        self.persistent.note_overflow();
        let rested = match self.config.one_shot {
            OneShot::Map => self.map(rest, access, false),
            OneShot::Copy => self.reserve_buffer(rest),
        };
        kept.and(rested)
    }

    /// Maps those of `self.wanted` in one batch. The first failure is the result; what succeeded is recorded
    /// all the same.
    fn map(&mut self, indexes: &[usize], access: Access, keep: bool) -> Result<(), Failure> {
        if indexes.is_empty() {
            return Ok(());
        }
        let grefs: Vec<GrantRef> = indexes.iter().map(|index| self.wanted[*index]).collect();
        let mut results = Vec::with_capacity(grefs.len());
        self.grantee.map(&grefs, access, &mut results);
        let mut first = if results.len() == grefs.len() {
            Ok(())
        } else {
            Err(LOST)
        };
        for ((index, gref), result) in indexes.iter().zip(&grefs).zip(results) {
            let mapping = match result {
                Ok(mapping) => mapping,
                Err(status) => {
                    first = first.and(Err(Failure::Grant(status)));
                    continue;
                }
            };
            self.stats.mapped += 1;
            let inserted = if keep {
                self.persistent.insert(*gref, mapping)
            } else {
                Err(mapping)
            };
            self.places[*index] = match inserted {
                Ok(slot) => Place::Persistent(slot),
                // A reference that stands twice in a request is kept once.
                Err(mapping) => {
                    self.one_shot.push(mapping);
                    Place::OneShot(self.one_shot.len() - 1)
                }
            };
        }
        first
    }

    /// Gives each a page of the buffer, that of its index.
    fn reserve_buffer(&mut self, indexes: &[usize]) -> Result<(), Failure> {
        if self.buffer.is_none() {
            let pages = usize::from(self.config.max_indirect).max(MAX_DIRECT_SEGMENTS);
            self.buffer = Some(self.grantee.buffer(pages).map_err(Failure::Grant)?);
        }
        for index in indexes {
            self.places[*index] = Place::Buffer(*index);
        }
        Ok(())
    }

    /// Copies the data of those segments that go through the buffer.
    fn copy_data(&mut self, direction: CopyDirection) -> Result<(), Failure> {
        if !self.uses_buffer() {
            return Ok(());
        }
        let parts: Vec<CopyPart> = self
            .segments
            .iter()
            .zip(&self.places)
            .filter_map(|(segment, place)| match place {
                Place::Buffer(index) => Some(CopyPart {
                    gref: segment.gref(),
                    offset: segment.offset(),
                    len: segment.bytes(),
                    at: index * PAGE_SIZE + segment.offset(),
                }),
                _ => None,
            })
            .collect();
        self.copy(direction, &parts)
    }

    fn uses_buffer(&self) -> bool {
        self.places.iter().any(|place| matches!(place, Place::Buffer(_)))
    }

    fn copy(&mut self, direction: CopyDirection, parts: &[CopyPart]) -> Result<(), Failure> {
        let buffer = self.buffer.as_ref().ok_or(LOST)?;
        self.grantee
            .copy(direction, parts, buffer)
            .map_err(Failure::Grant)?;
        self.stats.copied += parts.len() as u64;
        Ok(())
    }

    /// The memory of each segment: its pages, first byte and length.
    fn data(&self) -> impl Iterator<Item = Option<(&SharedPages, usize, usize)>> {
        self.segments.iter().zip(&self.places).map(|(segment, place)| {
            let (page, base) = self.page(*place)?;
            Some((page, base + segment.offset(), segment.bytes()))
        })
    }

    /// The pages a place lies in, and its first byte in them.
    fn page(&self, place: Place) -> Option<(&SharedPages, usize)> {
        match place {
            Place::Persistent(slot) => Some((self.persistent.get(slot)?.as_ref(), 0)),
            Place::OneShot(index) => Some((self.one_shot.get(index)?.as_ref(), 0)),
            Place::Buffer(index) => Some((self.buffer.as_ref()?.as_ref(), index * PAGE_SIZE)),
        }
    }

    /// Unmaps what was mapped for this request alone.
    fn release(&mut self) {
        self.places.clear();
        if !self.one_shot.is_empty() {
            self.grantee.unmap(&mut self.one_shot);
            self.one_shot.clear();
        }
    }
}

/// A place without memory behind it: an implementation of [`Grantee`] broke its word.
const LOST: Failure = Failure::Grant(GrantStatus::GENERAL_ERROR);
