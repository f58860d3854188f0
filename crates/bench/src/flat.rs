//! A lean hypervisor: what a real one must do for a grant operation, and nothing else.
//!
//! Memory is one flat array of frames, a frame's state a record of 32 bytes, a domain's page table an array
//! of 8-byte entries. What must always hold, for the figures to mean anything:
//! 1. Nothing is skipped that a real hypervisor could not skip: frames are bounds-checked and their owner is
//!    looked at, references and writable types are counted by locked operations, a mapping is found in the
//!    page table before it is removed.
//! 2. Nothing is slow that it would not have: no lock, no allocation, no table that must be searched.
//!
//! Domains see machine frames, as PV domains do; "guest addresses" are machine addresses.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use gnttab_abi::{CacheOp, DomId, Errno, Gfn, Mfn, PAGE_SIZE};
use gnttab_engine::{
    Access, Fault, FrameOwner, GuestMemory, HostError, HostMapping, HostUnmapping, Hypervisor, PageWords,
    ResolveError, Resolved, StealError, fetch_to_write,
};

/// All frames of the machine.
pub struct Memory(Box<[PageWords]>);

impl Memory {
    /// So many frames, all of them touched, so that no figure has a page fault in it.
    #[must_use]
    pub fn new(frames: usize) -> Memory {
        Memory((0..frames).map(|_| PageWords::zeroed()).collect())
    }

    /// Frames that there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A frame by number.
    #[inline]
    #[must_use]
    pub fn frame(&self, mfn: u64) -> Option<&PageWords> {
        self.0.get(usize::try_from(mfn).ok()?)
    }
}

/// No domain: the owner of a frame that nobody has.
const NOBODY: u32 = u32::MAX;

/// What the hypervisor knows of a frame: as large as Xen's record.
#[repr(align(32))]
struct Frame {
    /// References in the low half, of which 0 means on its way out, or free; writable types in the
    /// high half, of which the top bit means in use as something else. One word, so that both can be
    /// had, and dropped, in one step.
    uses: AtomicU64,
    /// The owner's number, or [`NOBODY`].
    owner: AtomicU32,
}

const REFERENCE: u64 = 1;
const REFERENCES: u64 = 0xFFFF_FFFF;
const TYPE: u64 = 1 << 32;
const OTHER_TYPE: u64 = 1 << 63;

impl Frame {
    /// One more reference, if there is one already.
    #[inline]
    fn get(&self) -> bool {
        if self.uses.fetch_add(REFERENCE, Ordering::Acquire) & REFERENCES == 0 {
            self.uses.fetch_sub(REFERENCE, Ordering::Relaxed);
            return false;
        }
        true
    }

    #[inline]
    fn get_type(&self) -> bool {
        if self.uses.fetch_add(TYPE, Ordering::Acquire) & OTHER_TYPE != 0 {
            self.uses.fetch_sub(TYPE, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// Both; `None` is neither, false the reference alone.
    #[inline]
    fn get_both(&self) -> Option<bool> {
        let before = self.uses.fetch_add(REFERENCE + TYPE, Ordering::Acquire);
        if before & REFERENCES != 0 && before & OTHER_TYPE == 0 {
            return Some(true);
        }
        self.uses.fetch_sub(TYPE, Ordering::Relaxed);
        if before & REFERENCES == 0 {
            self.uses.fetch_sub(REFERENCE, Ordering::Relaxed);
            return None;
        }
        Some(false)
    }

    /// Drops a reference, and whatever else is in `uses` of it.
    #[inline]
    fn put(&self, uses: u64) {
        if self.uses.fetch_sub(uses, Ordering::Release) & REFERENCES == 1 {
            self.release();
        }
    }

    #[cold]
    fn release(&self) {
        self.owner.store(NOBODY, Ordering::Release);
    }
}

/// What the hypervisor keeps for a domain.
pub struct FlatDomain {
    id: DomId,
    /// Its page table: one entry for each page of its address space.
    page_table: Box<[AtomicU64]>,
    /// Whether writes to its memory are being logged (for a migration, say).
    log_dirty: AtomicBool,
    /// Whether some processor may hold translations of its.
    running: AtomicBool,
    pages: AtomicU32,
}

impl FlatDomain {
    /// A domain with room for so many mappings.
    #[must_use]
    pub fn new(id: DomId, places: usize) -> FlatDomain {
        FlatDomain {
            id,
            page_table: (0..places).map(|_| AtomicU64::new(0)).collect(),
            log_dirty: AtomicBool::new(false),
            running: AtomicBool::new(false),
            pages: AtomicU32::new(0),
        }
    }

    #[inline]
    fn entry(&self, addr: u64) -> Option<&AtomicU64> {
        self.page_table.get(usize::try_from(addr / PAGE).ok()?)
    }
}

const PAGE: u64 = PAGE_SIZE as u64;

/// Present, and present and writable.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;

/// The hypervisor. See the module.
pub struct Flat<'m> {
    memory: &'m Memory,
    frames: Box<[Frame]>,
    /// The machine-to-physical table.
    m2p: Box<[AtomicU64]>,
    /// The next frame for a grant table; they are taken from the end of memory down.
    next_table: AtomicU64,
}

/// A frame of a grant table.
pub struct TableFrame<'m> {
    words: &'m PageWords,
    mfn: Mfn,
}

impl AsRef<PageWords> for TableFrame<'_> {
    fn as_ref(&self) -> &PageWords {
        self.words
    }
}

impl<'m> Flat<'m> {
    /// A hypervisor of that memory, of which nobody owns anything yet.
    #[must_use]
    pub fn new(memory: &'m Memory) -> Flat<'m> {
        let frame = |_| Frame {
            uses: AtomicU64::new(0),
            owner: AtomicU32::new(NOBODY),
        };
        Flat {
            memory,
            frames: (0..memory.len()).map(frame).collect(),
            m2p: (0..memory.len()).map(|_| AtomicU64::new(0)).collect(),
            next_table: AtomicU64::new(memory.len() as u64),
        }
    }

    /// Makes a frame a domain's.
    ///
    /// # Panics
    /// If there is no such frame.
    pub fn give(&self, mfn: u64, to: DomId) {
        let frame = self.frame(Mfn(mfn)).expect("a frame of the machine");
        frame.owner.store(u32::from(to.0), Ordering::Relaxed);
        frame.uses.store(REFERENCE, Ordering::Release);
    }

    #[inline]
    fn frame(&self, mfn: Mfn) -> Option<&Frame> {
        self.frames.get(usize::try_from(mfn.0).ok()?)
    }
}

impl<'m> Hypervisor for Flat<'m> {
    type Domain = FlatDomain;
    type TablePage = TableFrame<'m>;

    #[inline(always)]
    fn resolve(&self, domain: &FlatDomain, gfn: Gfn, _: Access) -> Result<Resolved, ResolveError> {
        let mfn = Mfn(gfn.0);
        let frame = self.frame(mfn).ok_or(ResolveError::BadPage)?;
        if !frame.get() {
            return Err(ResolveError::BadPage);
        }
        if frame.owner.load(Ordering::Relaxed) != u32::from(domain.id.0) {
            frame.put(REFERENCE);
            return Err(ResolveError::BadPage);
        }
        Ok(Resolved {
            mfn,
            owner: FrameOwner::Domain(domain.id),
        })
    }

    #[inline(always)]
    fn resolve_writable(&self, domain: &FlatDomain, gfn: Gfn) -> Result<(Resolved, bool), ResolveError> {
        let mfn = Mfn(gfn.0);
        let frame = self.frame(mfn).ok_or(ResolveError::BadPage)?;
        let typed = frame.get_both().ok_or(ResolveError::BadPage)?;
        if frame.owner.load(Ordering::Relaxed) != u32::from(domain.id.0) {
            frame.put(if typed { REFERENCE + TYPE } else { REFERENCE });
            return Err(ResolveError::BadPage);
        }
        let owner = FrameOwner::Domain(domain.id);
        Ok((Resolved { mfn, owner }, typed))
    }

    #[inline(always)]
    fn get_writable_frame(&self, mfn: Mfn) -> Option<(FrameOwner, bool)> {
        let frame = self.frame(mfn)?;
        let typed = frame.get_both()?;
        let Ok(owner) = u16::try_from(frame.owner.load(Ordering::Relaxed)) else {
            frame.put(if typed { REFERENCE + TYPE } else { REFERENCE });
            return None;
        };
        Some((FrameOwner::Domain(DomId(owner)), typed))
    }

    #[inline(always)]
    fn put_writable_frame(&self, mfn: Mfn) {
        if let Some(frame) = self.frame(mfn) {
            frame.put(REFERENCE + TYPE);
        }
    }

    #[inline(always)]
    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        let frame = self.frame(mfn)?;
        if !frame.get() {
            return None;
        }
        let owner = u16::try_from(frame.owner.load(Ordering::Relaxed)).ok()?;
        Some(FrameOwner::Domain(DomId(owner)))
    }

    #[inline(always)]
    fn put_frame(&self, mfn: Mfn) {
        if let Some(frame) = self.frame(mfn) {
            frame.put(REFERENCE);
        }
    }

    #[inline]
    fn get_writable(&self, mfn: Mfn) -> bool {
        self.frame(mfn).is_some_and(Frame::get_type)
    }

    #[inline]
    fn put_writable(&self, mfn: Mfn) {
        if let Some(frame) = self.frame(mfn) {
            frame.uses.fetch_sub(TYPE, Ordering::Release);
        }
    }

    #[inline(always)]
    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16) {
        if let (Some(from), Some(to)) = (self.memory.frame(source.0.0), self.memory.frame(dest.0.0)) {
            let _within = PageWords::copy(from, source.1, to, dest.1, len);
        }
    }

    #[inline(always)]
    fn expect_frame(&self, _: &FlatDomain, gfn: Gfn, bytes: (u16, u16)) {
        if let Some(frame) = self.frame(Mfn(gfn.0)) {
            fetch_to_write(frame);
        }
        if let Some(page) = self.memory.frame(gfn.0) {
            page.fetch_bytes_to_read(bytes.0, bytes.1);
        }
    }

    #[inline(always)]
    fn expect_mapping(&self, grantee: &FlatDomain, addr: u64) {
        if let Some(entry) = grantee.entry(addr) {
            fetch_to_write(entry);
        }
    }

    #[inline]
    fn mark_dirty(&self, granter: &FlatDomain, mfn: Mfn) {
        if granter.log_dirty.load(Ordering::Relaxed) {
            log(mfn);
        }
    }

    #[inline]
    fn map_host(&self, grantee: &FlatDomain, mapping: &HostMapping) -> Result<(), HostError> {
        let entry = grantee.entry(mapping.addr).ok_or(HostError)?;
        if entry.load(Ordering::Relaxed) & PRESENT != 0 {
            return Err(HostError);
        }
        let writable = if mapping.flags.contains(gnttab_abi::MapFlags::READONLY) {
            0
        } else {
            WRITABLE
        };
        entry.store(mapping.mfn.address() | writable | PRESENT, Ordering::Relaxed);
        Ok(())
    }

    #[inline]
    fn unmap_host(&self, grantee: &FlatDomain, unmapping: &HostUnmapping) -> Result<(), HostError> {
        let entry = grantee.entry(unmapping.addr).ok_or(HostError)?;
        let found = entry.load(Ordering::Relaxed);
        if found & PRESENT == 0 || found & !(PAGE - 1) != unmapping.mfn.address() {
            return Err(HostError);
        }
        let mut new = 0;
        if unmapping.new_addr != 0 {
            let moved = grantee.entry(unmapping.new_addr).ok_or(HostError)?;
            new = moved.load(Ordering::Relaxed);
            moved.store(0, Ordering::Relaxed);
        }
        entry.store(new, Ordering::Relaxed);
        Ok(())
    }

    /// A copy is a plain one.
    #[inline(always)]
    fn copy_waits(&self) -> bool {
        false
    }

    #[inline]
    fn flush_waits(&self, grantee: &FlatDomain) -> bool {
        grantee.running.load(Ordering::Relaxed)
    }

    #[inline]
    fn flush(&self, grantee: &FlatDomain) {
        // The shoot-down itself is left out, as from Xen's figures: no other processor runs the domain.
        if grantee.running.load(Ordering::Relaxed) {
            shoot_down();
        }
    }

    fn crash(&self, domain: &FlatDomain, why: &'static str) {
        panic!("{} crashed: {why}", domain.id);
    }

    fn alloc_table_page(&self, domain: &FlatDomain) -> Option<TableFrame<'m>> {
        let mfn = self.next_table.fetch_sub(1, Ordering::Relaxed).checked_sub(1)?;
        let words = self.memory.frame(mfn)?;
        if self.frame(Mfn(mfn))?.owner.load(Ordering::Relaxed) != NOBODY {
            return None;
        }
        self.give(mfn, domain.id);
        words
            .write(0, &[0; PAGE_SIZE])
            .then_some(TableFrame { words, mfn: Mfn(mfn) })
    }

    fn table_page_mfn(&self, page: &TableFrame<'m>) -> Mfn {
        page.mfn
    }

    fn table_page_gfn(&self, _: &FlatDomain, page: &TableFrame<'m>) -> Gfn {
        Gfn(page.mfn.0)
    }

    fn cache_flush(&self, _: Mfn, _: u16, _: u16, _: CacheOp) -> Result<(), Errno> {
        // The maintenance instructions are the processor's cost, not the engine's.
        Ok(())
    }

    fn frame_owner(&self, mfn: Mfn) -> Result<Option<DomId>, ResolveError> {
        let frame = self.frame(mfn).ok_or(ResolveError::BadPage)?;
        Ok(u16::try_from(frame.owner.load(Ordering::Relaxed)).ok().map(DomId))
    }

    fn steal(&self, from: &FlatDomain, mfn: Mfn) -> Result<(), StealError> {
        let frame = self.frame(mfn).ok_or(StealError::BadPage)?;
        if frame.owner.load(Ordering::Relaxed) != u32::from(from.id.0) {
            return Err(StealError::BadPage);
        }
        frame
            .uses
            .compare_exchange(REFERENCE, 0, Ordering::AcqRel, Ordering::Relaxed)
            .map_err(|_| StealError::BadPage)?;
        frame.owner.store(NOBODY, Ordering::Release);
        from.pages.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    fn reserve(&self, receiver: &FlatDomain) -> Result<(), StealError> {
        receiver.pages.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn unreserve(&self, receiver: &FlatDomain) {
        receiver.pages.fetch_sub(1, Ordering::Relaxed);
    }

    fn assign(&self, receiver: &FlatDomain, mfn: Mfn) -> Result<(), StealError> {
        self.give(mfn.0, receiver.id);
        Ok(())
    }

    fn install(&self, _: &FlatDomain, mfn: Mfn, gfn: Gfn) -> Result<(), HostError> {
        let place = usize::try_from(mfn.0).ok().and_then(|mfn| self.m2p.get(mfn));
        place.ok_or(HostError)?.store(gfn.0, Ordering::Relaxed);
        Ok(())
    }

    fn is_control(&self, domain: &FlatDomain) -> bool {
        domain.id == DomId(0)
    }
}

#[cold]
fn log(mfn: Mfn) {
    std::hint::black_box(mfn);
}

#[cold]
fn shoot_down() {
    std::hint::black_box(());
}

/// A guest's memory as the raw door reaches it: machine addresses within the guest's own frames.
pub struct Guest<'m> {
    pages: &'m [PageWords],
    /// The address of the first.
    start: u64,
}

impl<'m> Guest<'m> {
    /// A guest whose memory is `frames` frames from `first`.
    ///
    /// # Panics
    /// If the machine has not that many.
    #[must_use]
    pub fn new(memory: &'m Memory, first: u64, frames: u64) -> Guest<'m> {
        let [from, to] = [first, first + frames].map(|frame| usize::try_from(frame).unwrap_or(usize::MAX));
        Guest {
            pages: &memory.0[from..to],
            start: first * PAGE,
        }
    }

    /// What the guest itself does: moves four bytes, aligned, within its memory.
    #[inline(always)]
    pub(crate) fn move_word(&self, from: u64, to: u64) -> Result<(), Fault> {
        let mut word = [0; 4];
        self.read(from, &mut word)?;
        self.write(to, &word)
    }

    /// How far behind the first byte an address is; addresses before it are far behind.
    #[inline(always)]
    fn offset(&self, addr: u64) -> usize {
        usize::try_from(addr.wrapping_sub(self.start)).unwrap_or(usize::MAX)
    }
}

impl GuestMemory for Guest<'_> {
    #[inline]
    fn plausible(&self, addr: u64, bytes: u64) -> bool {
        let end = self.start + size_of_val(self.pages) as u64;
        addr.checked_add(bytes).is_some_and(|last| last <= end)
    }

    #[inline]
    fn pages(&self, addr: u64, bytes: u64) -> Option<(&[PageWords], usize)> {
        let reach = self.plausible(addr, bytes) && addr >= self.start;
        reach.then(|| (self.pages, self.offset(addr)))
    }

    #[inline(always)]
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let done = PageWords::read_run(self.pages, self.offset(addr), into);
        if done { Ok(()) } else { Err(Fault { addr }) }
    }

    #[inline(always)]
    fn peek(&self, addr: u64, into: &mut [u8]) -> bool {
        self.read(addr, into).is_ok()
    }

    #[inline(always)]
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        let done = PageWords::write_run(self.pages, self.offset(addr), bytes);
        if done { Ok(()) } else { Err(Fault { addr }) }
    }
}
