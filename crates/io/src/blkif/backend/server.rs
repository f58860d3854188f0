//! Serving one request after the other: spec 2.2, step by step.

use alloc::vec::Vec;

use gnttab_abi::{GrantRef, GrantStatus, PAGE_SIZE};

use super::persistent::PersistentGrants;
use super::types::{BackendConfig, BackendStats, Failure, OneShot};
use crate::blkif::disk::{Disk, DiskInfo};
use crate::blkif::layout::{MAX_DIRECT_SEGMENTS, RawSegment, SEGMENT_SIZE, SEGMENTS_PER_INDIRECT_PAGE, Slot};
use crate::blkif::request::{BadRequest, Discard, Indirect, Request, Segment, Status, Transfer};
use crate::grants::{Access, CopyDirection, CopyPart, Grantee};
use crate::shared::{SharedPages, SharedSlice, SharedSliceMut};

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
pub(super) struct Server<G: Grantee> {
    pub(super) grantee: G,
    pub(super) config: BackendConfig,
    pub(super) disk: DiskInfo,
    pub(super) persistent: PersistentGrants<G::Mapping>,
    /// Made when the first copy needs it.
    buffer: Option<G::Buffer>,
    pub(super) stats: BackendStats,
    pub(super) last_failure: Option<Failure>,
    // What follows belongs to the request being served, kept to reuse its memory.
    segments: Vec<Segment>,
    wanted: Vec<GrantRef>,
    places: Vec<Place>,
    pub(super) one_shot: Vec<G::Mapping>,
}

impl<G: Grantee> Server<G> {
    pub(super) fn new(grantee: G, config: BackendConfig, disk: DiskInfo) -> Self {
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

    pub(super) fn serve(&mut self, slot: &Slot, disk: &impl Disk) -> Status {
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
        let mut into: Vec<SharedSliceMut<'_>> = Vec::with_capacity(self.segments.len());
        for data in self.data() {
            let (page, at, len) = data.ok_or(LOST)?;
            into.push(page.slice_mut(at, len));
        }
        disk.read(sector, &into)?;
        self.copy_data(CopyDirection::ToPeer)
    }

    fn write(&mut self, sector: u64, disk: &impl Disk) -> Result<(), Failure> {
        self.acquire(Access::ReadOnly)?;
        self.copy_data(CopyDirection::FromPeer)?;
        let mut from: Vec<SharedSlice<'_>> = Vec::with_capacity(self.segments.len());
        for data in self.data() {
            let (page, at, len) = data.ok_or(LOST)?;
            from.push(page.slice(at, len));
        }
        Ok(disk.write(sector, &from)?)
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
