//! One domain of the machine: setting it up, and being it.

use alloc::sync::Arc;
use alloc::vec::Vec;

use gnttab_abi::{DomId, Gfn, Mfn, PAGE_SHIFT, PAGE_SIZE};

use super::Machine;
use super::frames::PageType;
use super::p2m::P2mEntry;
use super::pv::{self, L2Slot, Pte};
use super::state::{Iommu, State};
use crate::door::{Fault, GuestMemory};
use crate::hypervisor::{Access, DomainKind};
use crate::shared::PageWords;

/// First gfn that a translated domain's memory gets by itself.
const FIRST_GFN: u64 = 0x100;

/// A page of a domain's memory, by both of its names. For a PV domain they are one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Page {
    /// As the domain names it.
    pub gfn: Gfn,
    /// As the machine names it.
    pub mfn: Mfn,
}

/// A domain as the machine keeps it: memory, address space, devices, record.
///
/// It is what the engine holds as the domain's private part; a scene reaches it by
/// [`Domain::private`](crate::Domain::private). Dropping it ends the domain's address space and
/// gives its memory up.
///
/// An address of a guest is a virtual one. A PV domain's go through its level-1 tables; a
/// translated domain's stand for the guest physical address of the same number, unless
/// [`Guest::map`] or [`Guest::unmap`] said otherwise.
///
/// ```
/// use gnttab_abi::DomId;
/// use gnttab_engine::machine::Machine;
/// use gnttab_engine::{Access, DomainKind, Fault, GuestMemory};
///
/// let machine = Machine::new();
/// let guest = machine.add_domain(DomId(1), DomainKind::Pv).unwrap();
/// let pages = guest.add_memory(0x4000_0000, 2).unwrap();
/// guest.write(0x4000_0FFE, b"1234").unwrap();
/// let mut bytes = [0; 2];
/// guest.read(0x4000_1000, &mut bytes).unwrap();
/// assert_eq!(&bytes, b"34");
///
/// guest.map(0x4000_0000, pages[0].gfn, Access::Read);
/// assert_eq!(guest.write(0x4000_0000, b"5"), Err(Fault { addr: 0x4000_0000 }));
/// ```
pub struct Guest {
    machine: Machine,
    id: DomId,
    kind: DomainKind,
}

impl Guest {
    pub(super) fn new(machine: Machine, id: DomId, kind: DomainKind) -> Guest {
        Guest { machine, id, kind }
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.id
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> DomainKind {
        self.kind
    }

    /// The machine that it lives in.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    // --- what it is ---------------------------------------------------------------------------

    /// Makes it run in 32-bit mode: 32-bit PV, 32-bit HVM, Arm32.
    pub fn set_narrow(&self, narrow: bool) {
        self.machine.lock().domain_mut(self.id).narrow = narrow;
    }

    /// Makes it a control domain, or an ordinary one.
    pub fn set_control(&self, control: bool) {
        self.machine.lock().domain_mut(self.id).control = control;
    }

    /// Makes it the device model of `target`.
    pub fn set_device_model_of(&self, target: DomId) {
        self.machine.lock().domain_mut(self.id).targets.insert(target);
    }

    /// Limits its pages; transfers to it fail beyond.
    pub fn set_max_pages(&self, max_pages: u64) {
        self.machine.lock().domain_mut(self.id).max_pages = max_pages;
    }

    /// Lets it take only frames below this number.
    pub fn set_frame_limit(&self, limit: u64) {
        self.machine.lock().domain_mut(self.id).frame_limit = limit;
    }

    /// Gives it an I/O MMU that follows its grant mappings, or takes it away.
    pub fn set_iommu(&self, present: bool) {
        self.machine.lock().domain_mut(self.id).iommu = present.then(Iommu::default);
    }

    /// Makes its I/O MMU refuse every change.
    pub fn set_iommu_failing(&self, failing: bool) {
        if let Some(iommu) = &mut self.machine.lock().domain_mut(self.id).iommu {
            iommu.failing = failing;
        }
    }

    /// Lets it grant this I/O frame.
    pub fn permit_io(&self, mfn: Mfn) {
        self.machine.lock().domain_mut(self.id).io_frames.insert(mfn);
    }

    // --- its memory ---------------------------------------------------------------------------

    /// A zeroed page more, below 2^32, at a gfn that was free; `None`: no memory.
    pub fn add_page(&self) -> Option<Page> {
        let mut state = self.machine.lock();
        let mfn = state.allocate(self.id, false)?;
        let gfn = self.enter(&mut state, mfn);
        Some(Page { gfn, mfn })
    }

    /// A zeroed page more, at a chosen frame; `None`: the frame is in use.
    pub fn add_page_at(&self, mfn: Mfn) -> Option<Page> {
        let mut state = self.machine.lock();
        let gfn = state
            .allocate_at(self.id, mfn)
            .then(|| self.enter(&mut state, mfn))?;
        Some(Page { gfn, mfn })
    }

    /// Puts a new page into the physmap, where there is one.
    fn enter(&self, state: &mut State, mfn: Mfn) -> Gfn {
        if self.kind == DomainKind::Pv {
            return Gfn(mfn.0);
        }
        let p2m = &mut state.domain_mut(self.id).p2m;
        let mut gfn = Gfn(FIRST_GFN);
        while p2m.contains_key(&gfn) {
            gfn.0 += 1;
        }
        p2m.insert(gfn, P2mEntry::Ram(mfn));
        gfn
    }

    /// New pages, mapped writable one after the other from `addr` on; `None`: no memory.
    pub fn add_memory(&self, addr: u64, pages: usize) -> Option<Vec<Page>> {
        let mut added = Vec::with_capacity(pages);
        let mut addr = addr;
        for _ in 0..pages {
            if self.kind == DomainKind::Pv && self.table(addr).is_none() {
                self.add_table(addr)?;
            }
            let page = self.add_page()?;
            if !self.map(addr, page.gfn, Access::Write) {
                return None;
            }
            added.push(page);
            addr += PAGE_SIZE as u64;
        }
        Some(added)
    }

    /// Gives a page up; it is freed once nobody else uses it.
    pub fn give_up(&self, mfn: Mfn) {
        let mut state = self.machine.lock();
        if state.frames.is_owned_by(mfn, self.id) {
            if let Some(gfn) = state.gfn_of(self.id, mfn) {
                state.domain_mut(self.id).p2m.remove(&gfn);
            }
            state.give_up(mfn);
        }
    }

    /// Pages on its account.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.machine.lock().domain(self.id).pages
    }

    /// Frames that are still its own, given up or not, special ones not counted.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.machine.lock().frames_of(self.id)
    }

    /// Uses one of its frames as a page table or another thing that nobody may write; false if
    /// it is not its own, or in use as something else.
    pub fn use_as(&self, mfn: Mfn, page_type: PageType) -> bool {
        let mut state = self.machine.lock();
        state.frames.is_owned_by(mfn, self.id) && state.use_as(mfn, page_type)
    }

    /// Ends [`Guest::use_as`].
    pub fn stop_use(&self, mfn: Mfn) {
        self.machine.lock().stop_use(mfn);
    }

    // --- its address space --------------------------------------------------------------------

    /// Maps a page of its own at the page of `addr`. False if it cannot: no table there (PV), or
    /// not a page that may be mapped so.
    pub fn map(&self, addr: u64, gfn: Gfn, access: Access) -> bool {
        if self.kind == DomainKind::Pv {
            let mut bits = Pte::PRESENT | Pte::USER | Pte::ACCESSED;
            if access == Access::Write {
                bits |= Pte::WRITABLE | Pte::DIRTY;
            }
            return self.write_pte(addr, Pte::new(Mfn(gfn.0), bits));
        }
        let mut state = self.machine.lock();
        let tables = &mut state.domain_mut(self.id).own_tables;
        tables.insert(addr >> PAGE_SHIFT, Some((gfn, access)));
        true
    }

    /// Maps nothing at the page of `addr`.
    pub fn unmap(&self, addr: u64) {
        if self.kind == DomainKind::Pv {
            self.write_pte(addr, Pte::default());
            return;
        }
        let mut state = self.machine.lock();
        state
            .domain_mut(self.id)
            .own_tables
            .insert(addr >> PAGE_SHIFT, None);
    }

    /// PV: a new level-1 table for the 2 MiB around `addr`; `None`: no memory.
    pub fn add_table(&self, addr: u64) -> Option<Mfn> {
        self.machine.lock().add_table(self.id, addr)
    }

    /// PV: what the domain has for the 2 MiB around `addr`.
    #[must_use]
    pub fn table(&self, addr: u64) -> Option<L2Slot> {
        let state = self.machine.lock();
        state.domain(self.id).tables.get(&pv::table_number(addr)).copied()
    }

    /// PV: puts anything there, unchecked: a superpage, a foreign table, nothing.
    pub fn set_table(&self, addr: u64, slot: Option<L2Slot>) {
        let mut state = self.machine.lock();
        let tables = &mut state.domain_mut(self.id).tables;
        match slot {
            Some(slot) => tables.insert(pv::table_number(addr), slot),
            None => tables.remove(&pv::table_number(addr)),
        };
    }

    /// PV: the page-table entry for `addr`; `None` without a table.
    #[must_use]
    pub fn pte(&self, addr: u64) -> Option<Pte> {
        self.machine.lock().find_pte(self.id, addr)
    }

    /// PV: machine address of the entry for `addr`, as a mapping with
    /// [`MapFlags::CONTAINS_PTE`](gnttab_abi::MapFlags::CONTAINS_PTE) names it.
    #[must_use]
    pub fn pte_address(&self, addr: u64) -> Option<u64> {
        match self.table(addr)? {
            L2Slot::Table(table) => Some(table.address() + (addr >> PAGE_SHIFT) % 512 * 8),
            L2Slot::Superpage(_) => None,
        }
    }

    /// PV: the domain's own change of an entry; what stood there is let go, translations are
    /// flushed. False, and nothing done, if it may not.
    pub fn write_pte(&self, addr: u64, pte: Pte) -> bool {
        self.machine.lock().edit_pte(self.id, addr, pte)
    }

    /// PV: sets bits of an entry and nothing else.
    pub fn set_pte_bits(&self, addr: u64, bits: u64) -> bool {
        self.machine.lock().set_pte_bits(self.id, addr, bits)
    }

    /// Translated: what a gfn stands for; `None`: a hole.
    #[must_use]
    pub fn physmap(&self, gfn: Gfn) -> Option<P2mEntry> {
        self.machine.lock().domain(self.id).p2m.get(&gfn).copied()
    }

    /// Translated: makes a gfn stand for anything, unchecked. A [`P2mEntry::Foreign`] takes a
    /// reference; false, and nothing done, if it cannot be had.
    pub fn set_physmap(&self, gfn: Gfn, entry: Option<P2mEntry>) -> bool {
        let mut state = self.machine.lock();
        if let Some(P2mEntry::Foreign(mfn)) = entry
            && state.frames.reference(mfn).is_none()
        {
            return false;
        }
        let domain = state.domain_mut(self.id);
        domain.outstanding += u64::from(entry == Some(P2mEntry::PopulateOnDemand));
        let old = match entry {
            Some(entry) => domain.p2m.insert(gfn, entry),
            None => domain.p2m.remove(&gfn),
        };
        state.drop_entry(old);
        true
    }

    /// Translated: brings a paged-out gfn back with a new page; `None`: it is not out, or there
    /// is no memory.
    pub fn page_in(&self, gfn: Gfn) -> Option<Page> {
        let mut state = self.machine.lock();
        let entry = state.domain(self.id).p2m.get(&gfn).copied();
        let Some(P2mEntry::PagedOut { .. }) = entry else {
            return None;
        };
        let mfn = state.allocate(self.id, false)?;
        state.domain_mut(self.id).p2m.insert(gfn, P2mEntry::Ram(mfn));
        Some(Page { gfn, mfn })
    }

    /// Translated: populate-on-demand pages not yet populated.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.machine.lock().domain(self.id).outstanding
    }

    // --- its record ---------------------------------------------------------------------------

    /// Why it must not run again; empty while it may.
    #[must_use]
    pub fn crashes(&self) -> Vec<&'static str> {
        self.machine.lock().domain(self.id).crashes.clone()
    }

    /// Its frames that grantees have written to, in order.
    #[must_use]
    pub fn dirty(&self) -> Vec<Mfn> {
        self.machine
            .lock()
            .domain(self.id)
            .dirty
            .iter()
            .copied()
            .collect()
    }

    /// Forgets what was written to.
    pub fn clear_dirty(&self) {
        self.machine.lock().domain_mut(self.id).dirty.clear();
    }

    /// How often its translations were flushed.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.machine.lock().domain(self.id).flushes
    }

    /// What its devices may do with another domain's frame.
    #[must_use]
    pub fn iommu_right(&self, mfn: Mfn) -> Option<Access> {
        let state = self.machine.lock();
        let iommu = state.domain(self.id).iommu.as_ref()?;
        iommu.rights.get(&mfn).copied()
    }

    // --- its end ------------------------------------------------------------------------------

    /// Begins its death: no page, no mapping comes in any more.
    pub fn set_dying(&self) {
        self.machine.lock().domain_mut(self.id).dying = true;
    }

    /// Ends its address space: page tables, physmap, I/O MMU. Entries of page tables drop the
    /// references that they hold (spec 7.2).
    pub fn drop_address_space(&self) {
        let mut state = self.machine.lock();
        state.drop_tables(self.id);
        state.drop_p2m(self.id);
        let domain = state.domain_mut(self.id);
        domain.own_tables.clear();
        domain.stale.clear();
        if let Some(iommu) = &mut domain.iommu {
            iommu.rights.clear();
        }
    }

    /// Gives up all its memory (spec 7.3); frames that others use stay until they do not.
    pub fn give_up_memory(&self) {
        self.machine.lock().give_up_all(self.id);
    }

    // --- being it -----------------------------------------------------------------------------

    /// The pages under a range, each checked.
    fn spans(&self, addr: u64, len: usize, access: Access) -> Result<Vec<Span>, Fault> {
        let mut state = self.machine.lock();
        let (mut spans, mut addr, mut left) = (Vec::new(), addr, len);
        while left != 0 {
            let fault = Fault { addr };
            let offset = usize::try_from(addr % PAGE_SIZE as u64).map_err(|_| fault)?;
            let len = left.min(PAGE_SIZE - offset);
            let words = state.reach(self.id, addr, access).ok_or(fault)?;
            spans.push(Span { words, offset, len });
            left -= len;
            addr = addr.wrapping_add(len as u64);
        }
        Ok(spans)
    }
}

/// Part of a page; no words: writes to it are dropped.
struct Span {
    words: Option<Arc<PageWords>>,
    offset: usize,
    len: usize,
}

impl State {
    /// The page under a guest's address, if it can be reached so; `Some(None)`: it can, and what
    /// is written is dropped.
    fn reach(&mut self, domain: DomId, addr: u64, access: Access) -> Option<Option<Arc<PageWords>>> {
        let mfn = if self.domain(domain).kind == DomainKind::Pv {
            Some(self.reach_linear(domain, addr, access)?)
        } else {
            self.reach_physical(domain, addr, access)?
        };
        match mfn {
            Some(mfn) => self.words(mfn).map(Some),
            None => Some(None),
        }
    }

    fn reach_linear(&self, domain: DomId, addr: u64, access: Access) -> Option<Mfn> {
        if let Some(L2Slot::Superpage(first)) = self.domain(domain).tables.get(&pv::table_number(addr)) {
            return Some(Mfn(first.0 + (addr >> PAGE_SHIFT) % 512));
        }
        let pte = self.find_pte(domain, addr)?;
        let needed = match access {
            Access::Read => Pte::PRESENT,
            Access::Write => Pte::PRESENT | Pte::WRITABLE,
        };
        pte.has(needed).then(|| pte.mfn())
    }

    fn reach_physical(&mut self, domain: DomId, addr: u64, access: Access) -> Option<Option<Mfn>> {
        let page = addr >> PAGE_SHIFT;
        let (gfn, allowed) = match self.domain(domain).own_tables.get(&page) {
            Some(entry) => (*entry)?,
            None => (Gfn(page), Access::Write),
        };
        let write = access == Access::Write;
        if write && allowed == Access::Read {
            return None;
        }
        let mfn = match *self.domain(domain).p2m.get(&gfn)? {
            P2mEntry::ReadOnlyRam(_) | P2mEntry::Ioreq(_) if write => return Some(None),
            P2mEntry::Ram(mfn)
            | P2mEntry::LogDirty(mfn)
            | P2mEntry::ReadOnlyRam(mfn)
            | P2mEntry::Ioreq(mfn)
            | P2mEntry::Foreign(mfn)
            | P2mEntry::Grant(mfn, Access::Write) => mfn,
            P2mEntry::Grant(mfn, Access::Read) | P2mEntry::Shared(mfn) if !write => mfn,
            P2mEntry::Shared(mfn) => self.unshare(domain, gfn, mfn)?,
            P2mEntry::PopulateOnDemand => self.populate(domain, gfn)?,
            P2mEntry::Grant(_, Access::Read)
            | P2mEntry::PagedOut { .. }
            | P2mEntry::DirectMmio(_)
            | P2mEntry::EmulatedMmio
            | P2mEntry::Broken => return None,
        };
        Some(Some(mfn))
    }
}

/// What the domain itself can do with memory. A read or write that faults has done nothing.
impl GuestMemory for Guest {
    fn plausible(&self, addr: u64, _bytes: u64) -> bool {
        self.kind != DomainKind::Pv || pv::plausible(addr)
    }

    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let spans = self.spans(addr, into.len(), Access::Read)?;
        let mut rest = into;
        for Span { words, offset, len } in spans {
            let (here, after) = rest.split_at_mut(len);
            rest = after;
            if !words.is_some_and(|words| words.read(offset, here)) {
                return Err(Fault { addr });
            }
        }
        Ok(())
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        let spans = self.spans(addr, bytes.len(), Access::Write)?;
        let mut rest = bytes;
        for Span { words, offset, len } in spans {
            let (here, after) = rest.split_at(len);
            rest = after;
            if words.is_some_and(|words| !words.write(offset, here)) {
                return Err(Fault { addr });
            }
        }
        Ok(())
    }

    fn peek(&self, addr: u64, into: &mut [u8]) -> bool {
        self.read(addr, into).is_ok()
    }

    fn print(&self, text: &str) {
        self.machine.lock().console.push_str(text);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.drop_address_space();
        let mut state = self.machine.lock();
        state.give_up_all(self.id);
        state.check_forgotten(self.id);
        state.domains.remove(&self.id);
    }
}

impl core::fmt::Debug for Guest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Guest")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}
