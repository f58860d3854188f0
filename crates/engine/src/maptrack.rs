//! The grantee's private list of its mappings, by handle.
//!
//! A record is one word: reference, granter and flags. Flags 0 means free. Free handles lie in a
//! list for each vCPU, taken and given back at the top; a vCPU that has none left takes from the
//! domain's growth, then from its siblings. What must always hold:
//! 1. A handle is on one free list or live, never both: it leaves a list before its record is
//!    written, and its record is freed before it joins a list.
//! 2. Storage is published before the limit that admits it (HND-3).
//! 3. Only one unmap works on a record at a time: it sets `BUSY` by compare-and-swap on the whole
//!    word, so that one that saw an older record fails (HND-4).
//!
//! With a limit of n pages exactly 256 n - 1 mappings can be live, as in the reference (spec 2.5):
//! handle numbers are ours to choose, the point at which *no_space* comes is not.

use alloc::vec::Vec;

use gnttab_abi::{DomId, GrantHandle, GrantRef, MapFlags};
use spin::Mutex;

use crate::segments::Segments;
use crate::sync::{AtomicU32, AtomicU64, Ordering, spin_loop};

/// Records in one maptrack page. Few for the model checker, to which each word is dear.
pub(crate) const RECORDS_PER_PAGE: u32 = if cfg!(loom) { 4 } else { 256 };

/// What a live record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) gref: GrantRef,
    pub(crate) granter: DomId,
    /// The low 16 bits of the flags mapped with; bit 15 is the record's own.
    pub(crate) flags: MapFlags,
}

impl Record {
    const BUSY: u64 = 1 << 63;

    fn word(self) -> u64 {
        let flags = u64::from(self.flags.bits() & 0x7FFF);
        u64::from(self.gref.0) | u64::from(self.granter.0) << 32 | flags << 48
    }

    fn from_word(word: u64) -> Option<Record> {
        let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
        let flags = u16::from_le_bytes([g, h]) & 0x7FFF;
        (flags != 0).then(|| Record {
            gref: GrantRef(u32::from_le_bytes([a, b, c, d])),
            granter: DomId(u16::from_le_bytes([e, f])),
            flags: MapFlags::from_bits_retain(u32::from(flags)),
        })
    }
}

/// One slot of the list: 16 bytes a mapping.
struct Slot {
    word: AtomicU64,
    /// When the mapping was made, in the hypervisor's clock. Meaningful while live.
    born: AtomicU64,
}

/// Free handles of one vCPU.
#[derive(Default)]
struct FreeList(Vec<GrantHandle>);

/// See the module.
pub(crate) struct Maptrack {
    slots: Segments<Slot, { RECORDS_PER_PAGE as usize }, 20>,
    /// Handles that exist: a multiple of 256.
    limit: AtomicU32,
    max_pages: u32,
    free: Vec<Mutex<FreeList>>,
    growing: Mutex<()>,
}

impl Maptrack {
    pub(crate) fn new(max_pages: u32, vcpus: usize) -> Maptrack {
        Maptrack {
            slots: Segments::new(),
            limit: AtomicU32::new(0),
            max_pages,
            free: (0..vcpus).map(|_| Mutex::default()).collect(),
            growing: Mutex::new(()),
        }
    }

    /// Handles that exist so far, live and free.
    pub(crate) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Acquire)
    }

    pub(crate) fn max_pages(&self) -> u32 {
        self.max_pages
    }

    /// Takes a free handle for `vcpu`; `None` when growth and siblings are used up too.
    pub(crate) fn allocate(&self, vcpu: usize) -> Option<GrantHandle> {
        let own = self.free.get(vcpu)?;
        if let Some(handle) = own.lock().0.pop() {
            return Some(handle);
        }
        if let Some(handle) = self.grow(vcpu) {
            return Some(handle);
        }
        let siblings = self.free.len();
        (1..=siblings).find_map(|step| self.free[(vcpu + step) % siblings].lock().0.pop())
    }

    /// Adds a page of records and hands its first out; the rest go to `vcpu`'s list. The very last
    /// record of the limit stays out, as the reference never hands its last one out.
    fn grow(&self, vcpu: usize) -> Option<GrantHandle> {
        let _growing = self.growing.lock();
        // Somebody may have grown, or given handles back, while this waited.
        if let Some(handle) = self.free[vcpu].lock().0.pop() {
            return Some(handle);
        }
        let old = self.limit.load(Ordering::Relaxed);
        if old / RECORDS_PER_PAGE >= self.max_pages {
            return None;
        }
        let new = old.checked_add(RECORDS_PER_PAGE)?;
        // A list never grows on the way back: room for every handle is made here (ENG-4).
        for list in &self.free {
            let mut list = list.lock();
            let room = new as usize - list.0.len();
            list.0.try_reserve_exact(room).ok()?;
        }
        let free = || Slot {
            word: AtomicU64::new(0),
            born: AtomicU64::new(0),
        };
        self.slots.grow(new as usize, free).ok()?;
        self.limit.store(new, Ordering::Release);
        let last = if new / RECORDS_PER_PAGE == self.max_pages {
            new - 1
        } else {
            new
        };
        let mut list = self.free[vcpu].lock();
        list.0.extend((old + 1..last).rev().map(GrantHandle));
        (old < last).then_some(GrantHandle(old))
    }

    /// Gives a handle back to `vcpu`'s list. Its record is free.
    pub(crate) fn release(&self, vcpu: usize, handle: GrantHandle) {
        if let Some(list) = self.free.get(vcpu) {
            list.lock().0.push(handle);
        }
    }

    fn slot(&self, handle: GrantHandle) -> Option<&Slot> {
        if handle.0 >= self.limit() {
            return None;
        }
        self.slots.get(handle.0 as usize)
    }

    /// Fills the record of an allocated handle; from here on it is live (HND-6: one store).
    pub(crate) fn publish(&self, handle: GrantHandle, record: Record, now: u64) {
        if let Some(slot) = self.slot(handle) {
            slot.born.store(now, Ordering::Relaxed);
            slot.word.store(record.word(), Ordering::Release);
        }
    }

    /// The record of a live handle.
    pub(crate) fn look(&self, handle: GrantHandle) -> Option<Record> {
        Record::from_word(self.slot(handle)?.word.load(Ordering::Acquire))
    }

    /// The record of a live handle and when it was made, for observers.
    pub(crate) fn look_with_birth(&self, handle: GrantHandle) -> Option<(Record, u64)> {
        let record = self.look(handle)?;
        Some((record, self.slot(handle)?.born.load(Ordering::Relaxed)))
    }

    /// Takes a live record for one unmap, if it still says `expected`.
    pub(crate) fn claim(&self, handle: GrantHandle, expected: Record) -> Option<RecordClaim<'_>> {
        let slot = self.slot(handle)?;
        let idle = expected.word();
        loop {
            match slot
                .word
                .compare_exchange(idle, idle | Record::BUSY, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Some(RecordClaim { slot, left: expected }),
                Err(found) if found == idle | Record::BUSY => spin_loop(),
                Err(_) => return None,
            }
        }
    }

    /// Handles on free lists, for audits while nobody acts.
    #[cfg(feature = "machine")]
    pub(crate) fn free_handles(&self) -> Vec<GrantHandle> {
        self.free.iter().flat_map(|list| list.lock().0.clone()).collect()
    }

    /// Whether somebody holds a lock, for audits while nobody acts.
    #[cfg(feature = "machine")]
    pub(crate) fn is_locked(&self) -> bool {
        self.growing.is_locked() || self.free.iter().any(Mutex::is_locked)
    }

    /// Bytes of memory behind the records.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.bytes()
    }
}

/// A record held for one unmap. Dropped, it says what is left of the mapping.
pub(crate) struct RecordClaim<'a> {
    slot: &'a Slot,
    left: Record,
}

impl RecordClaim<'_> {
    /// Takes a kind of mapping out of the record.
    pub(crate) fn remove(&mut self, kind: MapFlags) {
        self.left.flags.remove(kind);
    }

    /// Whether neither kind is left.
    pub(crate) fn is_empty(&self) -> bool {
        !self
            .left
            .flags
            .intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP)
    }
}

impl Drop for RecordClaim<'_> {
    fn drop(&mut self) {
        let word = if self.is_empty() { 0 } else { self.left.word() };
        self.slot.word.store(word, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(flags: MapFlags) -> Record {
        Record {
            gref: GrantRef(9),
            granter: DomId(1),
            flags,
        }
    }

    #[test]
    fn a_limit_of_n_pages_gives_256_n_less_one() {
        for pages in 0..4 {
            let maptrack = Maptrack::new(pages, 1);
            let live = core::iter::from_fn(|| maptrack.allocate(0)).count();
            assert_eq!(live, (pages * RECORDS_PER_PAGE).saturating_sub(1) as usize);
        }
    }

    #[test]
    fn a_vcpu_without_handles_takes_its_siblings() {
        let maptrack = Maptrack::new(1, 2);
        let first = maptrack.allocate(0).unwrap();
        assert!(
            maptrack.allocate(1).is_some(),
            "HND-5: other sources are tried first"
        );
        maptrack.release(1, first);
        assert_eq!(maptrack.allocate(1), Some(first));
    }

    #[test]
    fn handles_are_unique_while_live() {
        let maptrack = Maptrack::new(3, 2);
        let mut seen = alloc::collections::BTreeSet::new();
        for i in 0..3 * 256 - 1 {
            assert!(seen.insert(maptrack.allocate(i % 2).unwrap()));
        }
        assert_eq!(maptrack.allocate(0), None);
    }

    #[test]
    fn of_two_unmaps_one_wins() {
        let maptrack = Maptrack::new(1, 1);
        let handle = maptrack.allocate(0).unwrap();
        let live = record(MapFlags::HOST_MAP);
        assert_eq!(maptrack.look(handle), None);
        maptrack.publish(handle, live, 5);
        assert_eq!(maptrack.look_with_birth(handle), Some((live, 5)));
        let mut claim = maptrack.claim(handle, live).unwrap();
        claim.remove(MapFlags::HOST_MAP);
        assert!(claim.is_empty());
        drop(claim);
        assert!(maptrack.claim(handle, live).is_none());
        assert_eq!(maptrack.look(handle), None);
    }

    #[test]
    fn a_record_that_changed_is_not_claimed() {
        let maptrack = Maptrack::new(1, 1);
        let handle = maptrack.allocate(0).unwrap();
        maptrack.publish(handle, record(MapFlags::HOST_MAP), 0);
        let old = record(MapFlags::HOST_MAP | MapFlags::READONLY);
        assert!(maptrack.claim(handle, old).is_none());
        assert!(maptrack.look(GrantHandle(256)).is_none(), "past the limit");
    }
}
