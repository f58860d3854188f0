//! The grantee's private list of its mappings, by handle.
//!
//! A record is one word: reference, granter and flags. Flags 0 means free; a free record's other, half a
//! word, links it to the next free one, so that lists cost nothing: twelve bytes a mapping, made a page of
//! 256 at a time. Each vCPU has a list of its own, which
//! only its holder touches, without a locked operation; what a vCPU has too much of, and what is freed
//! outside of tables, goes to the domain's common list, which has a lock. When the limit is reached and
//! somebody finds nothing, all lists are *gathered* into the common one, for good: a handle that another
//! vCPU keeps to itself must not make *no_space* (HND-5). What must always hold:
//! 1. A handle is on one free list or live, never both: it leaves a list before its record is
//!    written, and its record is freed before it joins a list.
//! 2. Storage is published before the limit that admits it (HND-3).
//! 3. Only one unmap works on a record at a time: it sets `BUSY` by compare-and-swap on the whole
//!    word, so that one that saw an older record fails (HND-4).
//! 4. A vCPU's list is touched by its holder alone, from inside a table (see `presence`), and only if
//!    `gathered` was still false there; by the gatherer after it was set and everybody has left.
//!
//! With a limit of n pages exactly 256 n - 1 mappings can be live, as in the reference (spec 2.5):
//! handle numbers are ours to choose, the point at which *no_space* comes is not.

use alloc::boxed::Box;
use core::cell::Cell;

use gnttab_abi::{DomId, GrantHandle, GrantRef, MapFlags};

use crate::bound::{below, is_within};
use crate::lazy::Lazy;
use crate::segments::Segments;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering, spin_loop};

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

    #[inline]
    fn word(self) -> u64 {
        let flags = u64::from(self.flags.bits() & 0x7FFF);
        u64::from(self.gref.0) | u64::from(self.granter.0) << 32 | flags << 48
    }

    #[inline]
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

/// Records that are made together.
struct Page {
    words: [AtomicU64; RECORDS_PER_PAGE as usize],
    others: [AtomicU32; RECORDS_PER_PAGE as usize],
}

impl Page {
    fn new() -> Page {
        Page {
            words: core::array::from_fn(|_| AtomicU64::new(0)),
            others: core::array::from_fn(|_| AtomicU32::new(0)),
        }
    }
}

/// One slot of the list.
#[derive(Clone, Copy)]
struct Slot<'a> {
    page: &'a Page,
    /// Taken modulo the records of a page.
    index: usize,
}

impl<'a> Slot<'a> {
    #[inline(always)]
    fn word(self) -> &'a AtomicU64 {
        &self.page.words[self.index % RECORDS_PER_PAGE as usize]
    }

    /// While live: when the mapping was made. While on a list: the next handle there, plus one; 0 ends it.
    #[inline(always)]
    fn other(self) -> &'a AtomicU32 {
        &self.page.others[self.index % RECORDS_PER_PAGE as usize]
    }
}

/// A handle that is on no list, and whose record is free (rule 1).
#[derive(Clone, Copy)]
pub(crate) struct Free<'a> {
    pub(crate) handle: GrantHandle,
    slot: Slot<'a>,
}

impl Free<'_> {
    /// Fills the record; from here on the handle is live (HND-6: one store).
    #[inline]
    pub(crate) fn publish(self, record: Record, now: u64) -> GrantHandle {
        self.slot.other().store(birth(now), Ordering::Relaxed);
        self.slot.word().store(record.word(), Ordering::Release);
        self.handle
    }

    /// Puts it on a list that begins with `top`; what it begins with then.
    #[inline]
    fn push(self, top: u32) -> u32 {
        self.slot.other().store(top, Ordering::Relaxed);
        self.handle.0 + 1
    }
}

/// A moment of the hypervisor's clock as a record keeps it: half a word, in units of 2^24 ns, which comes
/// round after 2^56 ns, 2.3 years.
const BIRTH_SHIFT: u32 = 24;

/// How long ago a mapping was made that a record says was made at `born`, both in the hypervisor's clock.
pub(crate) fn age(born: u64, now: u64) -> u64 {
    let units = (now >> BIRTH_SHIFT).wrapping_sub(born >> BIRTH_SHIFT) & u64::from(u32::MAX);
    units << BIRTH_SHIFT
}

#[expect(clippy::cast_possible_truncation, reason = "the clock comes round")]
fn birth(now: u64) -> u32 {
    (now >> BIRTH_SHIFT) as u32
}

/// Free handles of one vCPU, on a cache line of their own (rule 4).
#[repr(align(64))]
struct Own {
    /// The first handle, plus one; 0: none.
    top: AtomicU32,
    length: AtomicU32,
}

/// The most handles that a vCPU keeps to itself.
const OWN_MOST: u32 = 2 * RECORDS_PER_PAGE;

/// Free handles that any vCPU may take: the first, plus one; 0: none.
struct Common(u32);

/// See the module.
pub(crate) struct Maptrack {
    /// Pages of records; the pointers are few, and doubled as they grow.
    pages: Segments<Lazy<Page, 1>, 4, 18>,
    /// Handles that exist: a multiple of 256.
    limit: AtomicU32,
    max_pages: u32,
    /// Whether lists of their own are over.
    gathered: AtomicBool,
    own: Box<[Own]>,
    common: Mutex<Common>,
    gathering: Mutex<()>,
}

impl Maptrack {
    pub(crate) fn new(max_pages: u32, vcpus: usize) -> Maptrack {
        let own = |_| Own {
            top: AtomicU32::new(0),
            length: AtomicU32::new(0),
        };
        Maptrack {
            pages: Segments::new(),
            limit: AtomicU32::new(0),
            max_pages,
            gathered: AtomicBool::new(false),
            own: (0..vcpus).map(own).collect(),
            common: Mutex::new(Common(0)),
            gathering: Mutex::new(()),
        }
    }

    /// Handles that exist so far, live and free.
    #[inline]
    pub(crate) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Acquire)
    }

    pub(crate) fn max_pages(&self) -> u32 {
        self.max_pages
    }

    /// A vCPU's way to the handles, for one call of its holder.
    #[inline]
    pub(crate) fn handles(&self, vcpu: usize) -> Handles<'_> {
        Handles {
            maptrack: self,
            own: &self.own[vcpu],
            last: Cell::new(None),
        }
    }

    #[cold]
    fn allocate_common(&self, own: Option<&Own>) -> Option<Free<'_>> {
        let mut common = self.common.lock();
        if let Some((free, next)) = self.first(common.0) {
            common.0 = next;
            return Some(free);
        }
        self.grow(&mut common, own)
    }

    /// Adds a page of records and hands its first out; the rest go to `own`, or to the common list.
    /// The very last record of the limit stays out, as the reference never hands its last one out.
    fn grow(&self, common: &mut Common, own: Option<&Own>) -> Option<Free<'_>> {
        let old = self.limit.load(Ordering::Relaxed);
        if old / RECORDS_PER_PAGE >= self.max_pages {
            return None;
        }
        let new = old.checked_add(RECORDS_PER_PAGE)?;
        let page = (old / RECORDS_PER_PAGE) as usize;
        self.pages.grow(page + 1, Lazy::new).ok()?;
        self.pages.get(page)?.get_or_make(0, Page::new).ok()?;
        self.limit.store(new, Ordering::Release);
        let last = if new / RECORDS_PER_PAGE == self.max_pages {
            new - 1
        } else {
            new
        };
        for handle in (old + 1..last).rev().map(GrantHandle) {
            let free = self.free(handle)?;
            match own {
                Some(own) => push_own(own, free),
                None => common.0 = free.push(common.0),
            }
        }
        if old < last {
            self.free(GrantHandle(old))
        } else {
            None
        }
    }

    /// Gives a handle back to the domain. By number: what is in registers where nobody comes here is to stay
    /// there.
    #[cold]
    pub(crate) fn release_common(&self, handle: GrantHandle) {
        let mut common = self.common.lock();
        if let Some(free) = self.free(handle) {
            common.0 = free.push(common.0);
        }
    }

    /// Makes the handles of all vCPUs common. Called when [`Handles::allocate`] found none, from
    /// outside of all tables; `wait_for_all` returns when everybody who was inside one has left it.
    /// Afterwards they are, whoever did it.
    pub(crate) fn gather(&self, wait_for_all: impl FnOnce()) {
        let _one = self.gathering.lock();
        if self.gathered.load(Ordering::Relaxed) {
            return;
        }
        self.gathered.store(true, Ordering::SeqCst);
        wait_for_all();
        let mut common = self.common.lock();
        for own in &self.own {
            while let Some((free, next)) = self.first(own.top.load(Ordering::Relaxed)) {
                own.top.store(next, Ordering::Relaxed);
                common.0 = free.push(common.0);
            }
        }
    }

    /// The first handle of a list, and what the list begins with after it.
    #[inline]
    fn first(&self, top: u32) -> Option<(Free<'_>, u32)> {
        let free = self.free(GrantHandle(top.checked_sub(1)?))?;
        Some((free, free.slot.other().load(Ordering::Relaxed)))
    }

    /// A handle that the caller knows to be free; `None` if it does not exist.
    #[inline]
    pub(crate) fn free(&self, handle: GrantHandle) -> Option<Free<'_>> {
        let slot = self.slot(handle)?;
        Some(Free { handle, slot })
    }

    #[inline]
    fn slot(&self, handle: GrantHandle) -> Option<Slot<'_>> {
        let index = below(handle.0, self.limit())?;
        let page = self.pages.get(index / RECORDS_PER_PAGE as usize)?.get(0)?;
        Some(Slot { page, index })
    }

    /// The record of a live handle.
    pub(crate) fn look(&self, handle: GrantHandle) -> Option<Record> {
        Some(live(handle, self.slot(handle)?)?.record)
    }

    /// The record of a live handle and when it was made (see [`age`]), for observers.
    pub(crate) fn look_with_birth(&self, handle: GrantHandle) -> Option<(Record, u64)> {
        let record = self.look(handle)?;
        let born = u64::from(self.slot(handle)?.other().load(Ordering::Relaxed)) << BIRTH_SHIFT;
        Some((record, born))
    }

    /// Takes a live record for one unmap, if it still says `expected`.
    #[cfg(test)]
    pub(crate) fn claim(&self, handle: GrantHandle, expected: Record) -> Option<RecordClaim<'_>> {
        let slot = self.slot(handle)?;
        let live = Live {
            handle,
            slot,
            word: expected.word(),
            record: expected,
        };
        live.claim()
    }

    /// Handles on free lists, for audits while nobody acts.
    #[cfg(feature = "machine")]
    pub(crate) fn free_handles(&self) -> alloc::vec::Vec<GrantHandle> {
        let tops = self.own.iter().map(|own| own.top.load(Ordering::Relaxed));
        let mut free = alloc::vec::Vec::new();
        for mut top in tops.chain([self.common.lock().0]) {
            // A handle that is there twice makes a circle: once round is enough.
            while let Some((found, next)) = self.first(top).filter(|_| free.len() <= self.limit() as usize) {
                free.push(found.handle);
                top = next;
            }
        }
        free
    }

    /// Whether somebody holds a lock, for audits while nobody acts.
    #[cfg(feature = "machine")]
    pub(crate) fn is_locked(&self) -> bool {
        self.common.is_locked() || self.gathering.is_locked()
    }

    /// Bytes of memory behind the records.
    pub(crate) fn bytes(&self) -> usize {
        let pages = (self.limit() / RECORDS_PER_PAGE) as usize;
        self.pages.bytes() + pages * size_of::<Page>()
    }
}

/// What a live handle says; `None` of a free one.
#[inline]
fn live<'a>(handle: GrantHandle, slot: Slot<'a>) -> Option<Live<'a>> {
    let word = slot.word().load(Ordering::Acquire);
    let record = Record::from_word(word)?;
    Some(Live {
        handle,
        slot,
        word,
        record,
    })
}

/// See [`Maptrack::handles`].
pub(crate) struct Handles<'a> {
    maptrack: &'a Maptrack,
    own: &'a Own,
    /// The page of records that was looked into last, and its first handle: the next is often there too.
    last: Cell<Option<(u32, &'a Page)>>,
}

impl<'a> Handles<'a> {
    /// The vCPU's own list, while there are such lists.
    #[inline]
    fn own(&self) -> Option<&'a Own> {
        // Sequentially consistent: the other half of the gatherer's store and wait.
        (!self.maptrack.gathered.load(Ordering::SeqCst)).then_some(self.own)
    }

    /// Takes a free handle; called from inside a table. `None`: there is none but what other vCPUs may
    /// keep to themselves (see [`Maptrack::gather`]).
    #[inline(always)]
    pub(crate) fn allocate(&self) -> Option<Free<'a>> {
        if let Some(free) = self.first() {
            self.take(free);
            return Some(free);
        }
        self.maptrack.allocate_common(self.own())
    }

    /// The first free handle of the vCPU's own, which stays where it is; called from inside a table.
    #[inline(always)]
    pub(crate) fn first(&self) -> Option<Free<'a>> {
        self.first_of(self.own()?)
    }

    #[inline(always)]
    fn first_of(&self, own: &Own) -> Option<Free<'a>> {
        let handle = GrantHandle(own.top.load(Ordering::Relaxed).checked_sub(1)?);
        let slot = self.slot(handle)?;
        Some(Free { handle, slot })
    }

    /// Finds once more, and takes, what [`Handles::first`] gave, likewise. Somebody may have begun to gather since:
    /// the list is the vCPU's own until the table is left.
    pub(crate) fn take_first(&self) -> Option<Free<'a>> {
        let free = self.first_of(self.own)?;
        self.take(free);
        Some(free)
    }

    /// Takes what [`Handles::first`] gave, with nothing done to the list, and no table left, in between.
    #[inline(always)]
    pub(crate) fn take(&self, first: Free<'a>) {
        let next = first.slot.other().load(Ordering::Relaxed);
        self.own.top.store(next, Ordering::Relaxed);
        let length = self.own.length.load(Ordering::Relaxed);
        self.own.length.store(length.wrapping_sub(1), Ordering::Relaxed);
    }

    /// Gives a handle back; called from inside a table.
    #[inline(always)]
    pub(crate) fn release(&self, free: Free<'a>) {
        match self.own() {
            Some(own) if own.length.load(Ordering::Relaxed) < OWN_MOST => push_own(own, free),
            _ => self.maptrack.release_common(free.handle),
        }
    }

    /// A live handle.
    #[inline(always)]
    pub(crate) fn find(&self, handle: GrantHandle) -> Option<Live<'a>> {
        live(handle, self.slot(handle)?)
    }

    #[inline(always)]
    fn slot(&self, handle: GrantHandle) -> Option<Slot<'a>> {
        loop {
            if let Some((first, page)) = self.last.get()
                && is_within(handle.0, first, RECORDS_PER_PAGE)
            {
                let index = handle.0 as usize;
                return Some(Slot { page, index });
            }
            self.look_into_page_of(handle)?;
        }
    }

    #[cold]
    #[inline(never)]
    fn look_into_page_of(&self, handle: GrantHandle) -> Option<()> {
        let page = self.maptrack.slot(handle)?.page;
        self.last
            .set(Some((handle.0 - handle.0 % RECORDS_PER_PAGE, page)));
        Some(())
    }
}

#[inline]
fn push_own(own: &Own, free: Free<'_>) {
    own.top
        .store(free.push(own.top.load(Ordering::Relaxed)), Ordering::Relaxed);
    let length = own.length.load(Ordering::Relaxed);
    own.length.store(length.wrapping_add(1), Ordering::Relaxed);
}

/// A handle that was live when it was looked at, and what its record said.
#[derive(Clone, Copy)]
pub(crate) struct Live<'a> {
    handle: GrantHandle,
    slot: Slot<'a>,
    word: u64,
    pub(crate) record: Record,
}

impl<'a> Live<'a> {
    /// As [`Live::claim`], if nobody else is at it.
    #[inline(always)]
    pub(crate) fn claim_at_once(self) -> Option<RecordClaim<'a>> {
        take(self.slot.word(), self.idle()).then(|| self.claimed())
    }

    /// Takes the record for one unmap, if it still says the same.
    #[inline(always)]
    pub(crate) fn claim(self) -> Option<RecordClaim<'a>> {
        let (word, idle) = (self.slot.word(), self.idle());
        (take(word, idle) || take_later(word, idle)).then(|| self.claimed())
    }

    /// The record without the mark of who is at it.
    #[inline(always)]
    fn idle(self) -> u64 {
        self.word & !Record::BUSY
    }

    /// The claim of who has set that mark.
    #[inline(always)]
    fn claimed(self) -> RecordClaim<'a> {
        let Live { handle, slot, .. } = self;
        RecordClaim {
            free: Free { handle, slot },
            left: self.idle(),
        }
    }
}

/// Sets the busy mark of a record that says `idle`.
#[inline(always)]
fn take(word: &AtomicU64, idle: u64) -> bool {
    word.compare_exchange(idle, idle | Record::BUSY, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
}

/// As [`take`], once another unmap that holds the record has ended. False: it left something else behind.
#[cold]
fn take_later(word: &AtomicU64, idle: u64) -> bool {
    loop {
        match word.load(Ordering::Relaxed) {
            found if found == idle | Record::BUSY => spin_loop(),
            found if found != idle => return false,
            _ if take(word, idle) => return true,
            _ => {}
        }
    }
}

/// A record held for one unmap. Dropped, it says what is left of the mapping.
pub(crate) struct RecordClaim<'a> {
    /// As it is once neither kind is left.
    free: Free<'a>,
    /// The record's word as it will be; kinds that were removed are missing in it.
    left: u64,
}

impl<'a> RecordClaim<'a> {
    /// Takes a kind of mapping out of the record.
    #[inline]
    pub(crate) fn remove(&mut self, kind: MapFlags) {
        self.left &= !(u64::from(kind.bits() & 0x7FFF) << 48);
    }

    /// Whether neither kind is left.
    #[inline]
    fn is_empty(&self) -> bool {
        let kinds = MapFlags::HOST_MAP | MapFlags::DEVICE_MAP;
        self.left & u64::from(kinds.bits()) << 48 == 0
    }

    /// Says that nothing is left; the handle.
    #[inline]
    pub(crate) fn end(mut self) -> Free<'a> {
        self.left = 0;
        self.free
    }

    /// Says what is left; the handle, if nothing is.
    #[inline]
    pub(crate) fn finish(self) -> Option<Free<'a>> {
        self.is_empty().then_some(self.free)
    }
}

impl Drop for RecordClaim<'_> {
    #[inline]
    fn drop(&mut self) {
        let word = if self.is_empty() { 0 } else { self.left };
        self.free.slot.word().store(word, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    fn take(maptrack: &Maptrack, vcpu: usize) -> Option<GrantHandle> {
        maptrack.handles(vcpu).allocate().map(|free| free.handle)
    }

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
            let live = core::iter::from_fn(|| maptrack.handles(0).allocate()).count();
            assert_eq!(live, (pages * RECORDS_PER_PAGE).saturating_sub(1) as usize);
        }
    }

    #[test]
    fn a_vcpu_without_handles_gets_its_siblings_once_they_are_gathered() {
        let maptrack = Maptrack::new(1, 2);
        let first = take(&maptrack, 0).unwrap();
        assert_eq!(take(&maptrack, 1), None, "the rest is the other vCPU's own");
        maptrack.gather(|| ());
        assert!(
            maptrack.handles(1).allocate().is_some(),
            "HND-5: other sources are tried first"
        );
        maptrack.handles(1).release(maptrack.free(first).unwrap());
        assert_eq!(take(&maptrack, 0), Some(first));
    }

    #[test]
    fn a_vcpu_keeps_only_so_many_handles_to_itself() {
        let maptrack = Maptrack::new(8, 2);
        let all: Vec<GrantHandle> = core::iter::from_fn(|| take(&maptrack, 0)).collect();
        for handle in &all {
            maptrack.handles(1).release(maptrack.free(*handle).unwrap());
        }
        let own = core::iter::from_fn(|| maptrack.handles(1).allocate()).count();
        assert_eq!(own, all.len(), "nothing is lost");
        assert_eq!(take(&maptrack, 0), None);
        for handle in all.iter().take(OWN_MOST as usize + 7) {
            maptrack.handles(1).release(maptrack.free(*handle).unwrap());
        }
        let common = core::iter::from_fn(|| maptrack.handles(0).allocate()).count();
        assert_eq!(common, 7, "what is more than it may keep is everybody's");
    }

    #[test]
    fn handles_are_unique_while_live() {
        let maptrack = Maptrack::new(3, 2);
        let mut seen = alloc::collections::BTreeSet::new();
        for i in 0..3 * 256 - 1 {
            let handle = take(&maptrack, i % 2).or_else(|| {
                maptrack.gather(|| ());
                take(&maptrack, i % 2)
            });
            assert!(seen.insert(handle.unwrap()));
        }
        assert_eq!(take(&maptrack, 0), None);
    }

    #[test]
    fn of_two_unmaps_one_wins() {
        let maptrack = Maptrack::new(1, 1);
        let handle = take(&maptrack, 0).unwrap();
        let live = record(MapFlags::HOST_MAP);
        assert_eq!(maptrack.look(handle), None);
        let born = 5 << BIRTH_SHIFT;
        maptrack.free(handle).unwrap().publish(live, born + 1);
        assert_eq!(maptrack.look_with_birth(handle), Some((live, born)));
        let mut claim = maptrack.claim(handle, live).unwrap();
        claim.remove(MapFlags::HOST_MAP);
        assert_eq!(claim.finish().map(|free| free.handle), Some(handle));
        assert!(maptrack.claim(handle, live).is_none());
        assert_eq!(maptrack.look(handle), None);
    }

    #[test]
    fn an_age_outlives_the_clock_of_the_records() {
        let hour = 3_600_000_000_000;
        for now in [hour, (1 << 56) + hour / 2, u64::MAX] {
            let (handle, maptrack) = (GrantHandle(0), Maptrack::new(1, 1));
            assert_eq!(take(&maptrack, 0), Some(handle));
            maptrack
                .free(handle)
                .unwrap()
                .publish(record(MapFlags::HOST_MAP), now.wrapping_sub(hour));
            let (_, born) = maptrack.look_with_birth(handle).unwrap();
            assert!(age(born, now).abs_diff(hour) <= 1 << BIRTH_SHIFT, "at {now}");
        }
    }

    #[test]
    fn a_record_that_changed_is_not_claimed() {
        let maptrack = Maptrack::new(1, 1);
        let handle = take(&maptrack, 0).unwrap();
        maptrack
            .free(handle)
            .unwrap()
            .publish(record(MapFlags::HOST_MAP), 0);
        let old = record(MapFlags::HOST_MAP | MapFlags::READONLY);
        assert!(maptrack.claim(handle, old).is_none());
        assert!(maptrack.look(GrantHandle(256)).is_none(), "past the limit");
    }
}
