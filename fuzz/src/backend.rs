//! A block backend against a hostile frontend.
//!
//! The frontend sends requests of any bytes, writes any index into the ring, changes what was loaded
//! right after it was ([`Observer`]), hands out read-only and unknown pages; maps, copies and the disk
//! fail now and then. What must hold: nothing panics; the disk is asked for legal things only; each
//! request that is taken gets one answer, with its own id; what is answered as done was done, byte for
//! byte, and a request that is refused changes nothing on the disk; a plain legal request works; no
//! more pages stay mapped than were agreed, and none at the end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gnttab_abi::{Abi, GrantRef, GrantStatus};
use gnttab_io::blkif::{
    BackendConfig, BackendQueue, DiscardInfo, Disk, DiskError, DiskInfo, OneShot, RawSegment, Slot, slot_size,
};
use gnttab_io::fake::{FakeDomain, FakeGrantee, HostileFrontend, NullPort, RamDisk};
use gnttab_io::grants::Access;
use gnttab_io::shared::{HeapPages, Observer, SharedPages, SharedSlice, SharedSliceMut};

use crate::input::Input;

const SECTORS: usize = 64;
const PAGE: usize = 4096;

/// Plays an input.
///
/// # Panics
/// When a rule of the module's head is broken.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let mut game = Game::new(&mut input);
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        game.step(&mut input);
    }
    game.end();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk that is asked for legal things only.
struct Strict(RamDisk);

impl Strict {
    fn check(&self, sector: u64, bytes: usize) {
        let (info, unit) = (self.info(), self.info().sector_size as usize);
        assert!(bytes > 0 && bytes.is_multiple_of(unit), "{bytes} bytes");
        assert!((sector as usize * 512).is_multiple_of(unit), "sector {sector}");
        assert!(
            sector + (bytes / 512) as u64 <= info.sectors,
            "{sector} and {bytes} bytes"
        );
    }
}

impl Disk for Strict {
    fn info(&self) -> DiskInfo {
        self.0.info()
    }

    fn read(&self, sector: u64, into: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        self.check(sector, into.iter().map(SharedSliceMut::len).sum());
        self.0.read(sector, into)
    }

    fn write(&self, sector: u64, from: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        assert!(!self.info().read_only, "a write to a read-only disk");
        self.check(sector, from.iter().map(SharedSlice::len).sum());
        self.0.write(sector, from)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.0.flush()
    }

    fn discard(&self, sector: u64, count: u64, secure: bool) -> Result<(), DiskError> {
        let info = self.info();
        let can = info.discard.expect("a disk that discards");
        assert!(!info.read_only && (can.secure || !secure));
        assert!(sector.checked_add(count).is_some_and(|end| end <= info.sectors));
        self.0.discard(sector, count, secure)
    }
}

/// Changes what was loaded, right after: a byte of spite for each load.
#[derive(Default)]
struct Spite(Mutex<Vec<u8>>);

impl Observer for Spite {
    fn loaded(&self, pages: &HeapPages, offset: usize, len: usize) {
        if let Some(byte @ 1..) = lock(&self.0).pop()
            && len > 0
        {
            pages
                .view()
                .write(offset + usize::from(byte) % len, &[byte ^ 0x5A]);
        }
    }
}

struct Game {
    domain: FakeDomain,
    disk: Strict,
    config: BackendConfig,
    liar: HostileFrontend,
    queue: BackendQueue<FakeGrantee>,
    pages: Vec<(GrantRef, SharedPages, Access)>,
    spite: Arc<Spite>,
    faults: Arc<Mutex<Vec<u8>>>,
    /// What disk and pages must hold.
    content: Vec<u8>,
    data: Vec<Vec<u8>>,
    /// Requests taken so far.
    taken: u32,
    is_broken: bool,
    disk_fails: bool,
}

impl Game {
    fn new(input: &mut Input<'_>) -> Game {
        let abi = input.pick(&Abi::ALL);
        let config = BackendConfig {
            persistent_limit: input.pick(&[0, 1, 3, 1056]),
            max_indirect: input.pick(&[0, 8, 256, 4096]),
            one_shot: input.pick(&[OneShot::Map, OneShot::Copy]),
            ..BackendConfig::new(abi, input.flag())
        };
        let kind = input.byte();
        let info = DiskInfo {
            sector_size: if kind & 1 == 0 { 512 } else { 4096 },
            read_only: kind & 6 == 6,
            flush: kind & 8 == 0,
            discard: (kind & 16 == 0).then_some(DiscardInfo {
                granularity: 512,
                alignment: 0,
                secure: kind & 32 == 0,
            }),
            ..DiskInfo::new(SECTORS as u64)
        };
        let content: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512 + at) as u8).collect();
        let disk = Strict(RamDisk::with_info(info, content.clone()));
        let domain = FakeDomain::new();
        let (spite, faults) = (Arc::new(Spite::default()), Arc::new(Mutex::new(Vec::new())));
        domain.observe(spite.clone());
        let failing = Arc::clone(&faults);
        domain.on_fault(move |_| match lock(&failing).pop() {
            Some(byte @ 1..) => Some(GrantStatus(-i16::from(byte % 13) - 1)),
            _ => None,
        });
        let liar = HostileFrontend::new(&domain, abi, 1).expect("a ring");
        let accesses = [
            Access::ReadWrite,
            Access::ReadWrite,
            Access::ReadWrite,
            Access::ReadOnly,
        ];
        let pages: Vec<_> = accesses
            .into_iter()
            .map(|access| {
                let (gref, page) = liar.data_page(access).expect("a page");
                (gref, page, access)
            })
            .collect();
        let queue =
            BackendQueue::connect(domain.grantee(), liar.ring(), config, disk.info()).expect("a queue");
        Game {
            data: vec![vec![0; PAGE]; pages.len()],
            domain,
            disk,
            config,
            liar,
            queue,
            pages,
            spite,
            faults,
            content,
            taken: 0,
            is_broken: false,
            disk_fails: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(12) {
            0..4 => {
                let slot = self.slot(input);
                self.liar.send(&slot);
                self.process(8);
            }
            4 => {
                let bytes = input.bytes(slot_size(self.config.abi));
                self.liar.write_slot(self.liar.rsp_prod(), bytes);
                self.liar.set_req_prod(self.taken.wrapping_add(1));
                self.process(8);
            }
            5 => {
                let slot = self.slot(input);
                self.liar.send(&slot);
            }
            6 => {
                // Any number of requests, most of which are what lies in the ring.
                let ahead = input.pick(&[0, 1, 2, 31, 32, 33, 1 << 31, u32::MAX]);
                self.liar.set_req_prod(self.taken.wrapping_add(ahead));
                self.process(u32::from(input.byte()) % 40);
            }
            7 => {
                let at = input.below(16) * 4;
                self.liar.memory().store_u32(at, input.u32());
                self.process(4);
                self.liar.set_req_prod(self.taken);
            }
            8 => {
                // Segments of indirect requests, or data.
                let page = input.below(self.pages.len());
                let at = input.pick(&[0, 8, 16, 4088, 2048]);
                let bytes = input.bytes(8.min(PAGE - at));
                self.pages[page].1.write(at, bytes);
                self.data[page][at..at + bytes.len()].copy_from_slice(bytes);
            }
            9 => {
                let count = input.below(16);
                *lock(&self.spite.0) = input.bytes(count).to_vec();
            }
            10 => {
                let count = input.below(8);
                *lock(&self.faults) = input.bytes(count).to_vec();
            }
            _ => {
                self.disk_fails = input.byte() % 4 == 0;
                let error = input.pick(&[DiskError::Failed, DiskError::NotSupported]);
                self.disk.0.fail(self.disk_fails.then_some(error));
                self.queue.tick(u64::from(input.u16()) * 100);
            }
        }
    }

    fn some_gref(&self, input: &mut Input<'_>) -> GrantRef {
        match input.byte() {
            byte @ 0..240 => self.pages[usize::from(byte) % self.pages.len()].0,
            240..250 => self.liar.ring()[0],
            _ => GrantRef(input.u32()),
        }
    }

    /// A request, mostly legal.
    fn slot(&self, input: &mut Input<'_>) -> Slot {
        let mut slot = Slot::new(self.config.abi);
        let operation = input.pick(&[0, 1, 0, 1, 6, 6, 3, 2, 5, 4, 7, 0]);
        slot.set_operation(operation);
        slot.set_id(u64::from(input.u16()) << 40 | 7);
        let sector = input.byte();
        slot.set_sector_number(match sector {
            0..200 => u64::from(sector % 72) & if sector & 64 == 0 { !7 } else { u64::MAX },
            _ => input.u64(),
        });
        match operation {
            6 => {
                slot.set_second(input.pick(&[0, 1, 0, 1, 2, 6]));
                slot.set_half(input.pick(&[1, 2, 8, 0, 9, 512, 513, 4096, 4097, u16::MAX]));
                (0..8).for_each(|page| slot.set_indirect_page(page, self.some_gref(input)));
            }
            5 => {
                slot.set_second(input.byte() & 3);
                let count = input.byte();
                slot.set_nr_sectors(if count < 250 {
                    u64::from(count % 70)
                } else {
                    input.u64()
                });
            }
            _ => {
                let count = input.byte();
                let count = if count < 240 { count % 4 } else { count - 228 };
                slot.set_second(count);
                for segment in 0..usize::from(count).min(11) {
                    let part = input.byte();
                    let (first_sect, last_sect) = match part {
                        0..128 => (0, 7),
                        _ => (part & 7, (part >> 3 & 7) + u8::from(part > 250)),
                    };
                    let gref = self.some_gref(input);
                    slot.set_segment(
                        segment,
                        RawSegment {
                            gref,
                            first_sect,
                            last_sect,
                        },
                    );
                }
            }
        }
        slot
    }

    fn process(&mut self, budget: u32) {
        // Looking at the memory here is no load of the backend's.
        let spite = std::mem::take(&mut *lock(&self.spite.0));
        let has_faults = !lock(&self.faults).is_empty();
        let slots: Vec<Slot> = (0..32)
            .map(|ahead| {
                let mut slot = Slot::new(self.config.abi);
                slot.bytes_mut()
                    .copy_from_slice(&self.liar.slot_bytes(self.taken.wrapping_add(ahead)));
                slot
            })
            .collect();
        let is_calm = spite.is_empty() && !self.names_the_ring();
        *lock(&self.spite.0) = spite;
        let done = self.queue.process(&self.disk, &mut NullPort, budget);
        lock(&self.spite.0).clear();
        let persistent = if self.config.persistent {
            self.config.persistent_limit
        } else {
            0
        };
        assert!(self.queue.persistent_mappings() <= persistent);
        assert_eq!(
            self.domain.mappings(),
            1 + self.queue.persistent_mappings(),
            "what is mapped between calls"
        );
        let Ok(progress) = done else {
            self.is_broken = true;
            self.resync();
            return;
        };
        assert!(!self.is_broken || budget == 0, "a broken ring stays broken");
        assert!(progress.served <= budget);
        let first = self.taken;
        self.taken = self.taken.wrapping_add(progress.served);
        // More than a ring of them: answers lie where requests were, and under later ones.
        if !is_calm || progress.served > self.liar.slots() {
            return self.resync();
        }
        assert!(
            progress.served == 0 || self.liar.rsp_prod() == self.taken,
            "one answer for each"
        );
        let mut reads_failed = false;
        for (number, slot) in (0..progress.served).zip(&slots) {
            let answer = self.liar.response(first.wrapping_add(number));
            assert_eq!(answer.id, slot.id(), "the request's own id");
            assert!((-2..=0).contains(&answer.status), "{answer:?}");
            match self.plain(slot) {
                Some(parts) if answer.status == 0 => self.perform(slot, &parts),
                Some(_) if has_faults || self.disk_fails => reads_failed = true,
                Some(_) => panic!(
                    "a legal request was answered {answer:?}: {:?}",
                    self.queue.last_failure()
                ),
                // What is no plain request is not told again here.
                None if answer.status == 0 => return self.resync(),
                None => reads_failed = true,
            }
        }
        if self.disk_fails {
            return self.resync();
        }
        assert!(self.disk.0.content() == self.content, "the disk's content");
        if reads_failed {
            return self.resync();
        }
        for ((gref, page, _), data) in self.pages.iter().zip(&self.data) {
            let mut found = vec![0; PAGE];
            page.read(0, &mut found);
            assert!(found == *data, "the content of {gref}");
        }
    }

    /// Whether a request may use the ring's own page for its data, which then holds anything.
    fn names_the_ring(&self) -> bool {
        let ring = self.liar.ring()[0].0.to_le_bytes();
        let pages = self.pages.iter().map(|page| &page.1);
        pages.chain([self.liar.memory()]).any(|page| {
            let mut bytes = vec![0; PAGE];
            page.read(0, &mut bytes);
            bytes.chunks_exact(4).any(|word| word == ring)
        })
    }

    /// The pages' parts of a request that is certain to be legal: a direct read or write.
    fn plain(&self, slot: &Slot) -> Option<Vec<(usize, usize, usize)>> {
        let info = self.disk.info();
        let (is_read, count) = (slot.operation() == 0, usize::from(slot.second()));
        if slot.operation() > 1 || !is_read && info.read_only || !(1..=11).contains(&count) {
            return None;
        }
        let mut parts = Vec::new();
        for segment in (0..count).map(|number| slot.segment(number)) {
            let page = self.pages.iter().position(|page| page.0 == segment.gref)?;
            let (first, last) = (usize::from(segment.first_sect), usize::from(segment.last_sect));
            // Whether one that is read-only will do depends on what is kept mapped.
            if first > last || last > 7 || self.pages[page].2 == Access::ReadOnly {
                return None;
            }
            parts.push((page, first * 512, (last + 1 - first) * 512));
        }
        let sectors = parts.iter().map(|part| part.2 / 512).sum::<usize>() as u64;
        let unit = u64::from(info.sector_size / 512);
        let sector = slot.sector_number();
        let fits = sector.checked_add(sectors).is_some_and(|end| end <= info.sectors);
        // Each segment by itself, not only their sum.
        let is_aligned = parts.iter().all(|part| (part.2 / 512) as u64 % unit == 0);
        (fits && sector % unit == 0 && is_aligned).then_some(parts)
    }

    fn perform(&mut self, slot: &Slot, parts: &[(usize, usize, usize)]) {
        let mut at = slot.sector_number() as usize * 512;
        for &(page, from, bytes) in parts {
            let (data, disk) = (
                &mut self.data[page][from..from + bytes],
                &mut self.content[at..at + bytes],
            );
            if slot.operation() == 0 {
                data.copy_from_slice(disk);
            } else {
                disk.copy_from_slice(data);
            }
            at += bytes;
        }
    }

    fn resync(&mut self) {
        self.content = self.disk.0.content();
        for ((_, page, _), data) in self.pages.iter().zip(&mut self.data) {
            page.read(0, data);
        }
    }

    fn end(self) {
        let Game {
            domain, queue, liar, ..
        } = self;
        drop(queue);
        assert_eq!(domain.mappings(), 0, "nothing stays mapped");
        drop(liar);
    }
}
