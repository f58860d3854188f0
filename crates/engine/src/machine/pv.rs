//! Page tables of PV domains, and grant mappings in them (spec 4.4.1).
//!
//! Level-1 tables are real pages, typed as such, with 64-bit entries. What lies above them is a
//! map from 2 MiB ranges to tables: enough to say what "the slot of an address" is.
//!
//! What must always hold: each present entry that maps memory holds one reference on the frame,
//! and the writable type if it is writable and the rule of spec 4.5 takes one. A grant mapping's
//! entry holds the references that the engine took for it: they move, they are not taken twice.

use alloc::vec::Vec;

use gnttab_abi::{DomId, EntryFlags, MapFlags, Mfn, PAGE_SHIFT, PAGE_SIZE};

use super::frames::{PageOwner, PageType};
use super::state::State;
use crate::hypervisor::{HostError, HostMapping, HostUnmapping};

/// End of the lower half of the address space.
const LOWER_END: u64 = 1 << 47;
/// End of the range that the hypervisor keeps, in a 64-bit domain's address space.
const HYPERVISOR_END: u64 = 0xFFFF_8800_0000_0000;
/// Start of the range that the hypervisor keeps, in a 32-bit domain's address space.
pub(super) const NARROW_HYPERVISOR_START: u64 = 0xF580_0000;
/// Bytes that one level-1 table maps, as a shift.
const TABLE_SHIFT: u32 = 21;
const ENTRIES: u64 = 512;

/// An entry of a level-1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pte(pub u64);

impl Pte {
    /// Maps something.
    pub const PRESENT: u64 = 1;
    /// May be written.
    pub const WRITABLE: u64 = 1 << 1;
    /// May be used outside the kernel; 64-bit PV kernels run outside it themselves.
    pub const USER: u64 = 1 << 2;
    /// Write-through.
    pub const PWT: u64 = 1 << 3;
    /// Cache disable.
    pub const PCD: u64 = 1 << 4;
    /// Was used.
    pub const ACCESSED: u64 = 1 << 5;
    /// Was written.
    pub const DIRTY: u64 = 1 << 6;
    /// Page attribute table index.
    pub const PAT: u64 = 1 << 7;
    /// Survives a change of page tables.
    pub const GLOBAL: u64 = 1 << 8;
    /// The lowest of the three bits that are the guest's own.
    pub const AVAIL_SHIFT: u32 = 9;
    /// Marks pages of a 64-bit guest's kernel.
    pub const GUEST_KERNEL: u64 = 1 << 52;
    /// Not for instructions.
    pub const NO_EXECUTE: u64 = 1 << 63;

    const FRAME: u64 = 0x000F_FFFF_FFFF_F000;

    /// The frame that it maps.
    #[must_use]
    pub const fn mfn(self) -> Mfn {
        Mfn((self.0 & Self::FRAME) >> PAGE_SHIFT)
    }

    /// An entry for a frame, with these bits.
    #[must_use]
    pub const fn new(mfn: Mfn, bits: u64) -> Pte {
        Pte((mfn.address() & Self::FRAME) | bits)
    }

    /// Whether all of these bits are set.
    #[must_use]
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// The entry of a grant mapping (spec 4.4.1, create, step 1).
    #[must_use]
    pub fn of_grant(mapping: &HostMapping, narrow: bool) -> Pte {
        let mut bits = Pte::PRESENT | Pte::ACCESSED | Pte::DIRTY | Pte::NO_EXECUTE;
        if !mapping.flags.contains(MapFlags::READONLY) {
            bits |= Pte::WRITABLE;
        }
        let application = mapping.flags.contains(MapFlags::APPLICATION_MAP);
        bits |= match (narrow, application) {
            (true, false) => 0,
            (true, true) => Pte::USER,
            (false, false) => Pte::USER | Pte::GUEST_KERNEL,
            (false, true) => Pte::USER | Pte::GLOBAL,
        };
        let avail = u64::from(mapping.flags.bits() >> MapFlags::GUEST_AVAIL_SHIFT) & 7;
        bits |= avail << Pte::AVAIL_SHIFT;
        let cache = [
            (EntryFlags::PWT, Pte::PWT),
            (EntryFlags::PCD, Pte::PCD),
            (EntryFlags::PAT, Pte::PAT),
        ];
        for (flag, bit) in cache {
            if mapping.cache.contains(flag) {
                bits |= bit;
            }
        }
        Pte::new(mapping.mfn, bits)
    }
}

/// What a PV domain's tables have for 2 MiB of its address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Slot {
    /// A level-1 table.
    Table(Mfn),
    /// A mapping of 2 MiB, from this frame on.
    Superpage(Mfn),
}

/// Place of an entry: a page that the domain owns and that is typed level-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    table: Mfn,
    index: u16,
}

/// Whether the hypervisor lets a domain name this address at all (spec 3.1.2).
pub(super) const fn plausible(addr: u64) -> bool {
    addr < LOWER_END || addr >= HYPERVISOR_END
}

/// Key of the level-1 table for an address.
pub(super) const fn table_number(addr: u64) -> u64 {
    addr >> TABLE_SHIFT
}

fn index(addr: u64, shift: u32) -> u16 {
    u16::try_from((addr >> shift) % ENTRIES).unwrap_or(0)
}

impl State {
    fn linear_slot(&self, domain: DomId, addr: u64) -> Result<Slot, HostError> {
        let guest = self.domain(domain);
        let reserved = if guest.narrow {
            addr >= NARROW_HYPERVISOR_START
        } else {
            !plausible(addr)
        };
        if reserved {
            return Err(HostError);
        }
        let Some(L2Slot::Table(table)) = guest.tables.get(&table_number(addr)).copied() else {
            return Err(HostError);
        };
        self.checked_slot(domain, table, index(addr, PAGE_SHIFT))
    }

    fn pte_slot(&self, domain: DomId, addr: u64) -> Result<Slot, HostError> {
        if !addr.is_multiple_of(8) {
            return Err(HostError);
        }
        self.checked_slot(domain, Mfn::containing(addr), index(addr, 3))
    }

    fn checked_slot(&self, domain: DomId, table: Mfn, index: u16) -> Result<Slot, HostError> {
        let frame = self.frames.live(table).ok_or(HostError)?;
        let typed = frame.info.type_count != 0 && frame.info.page_type == PageType::L1Table;
        if frame.info.owner != PageOwner::Domain(domain) || !typed {
            return Err(HostError);
        }
        Ok(Slot { table, index })
    }

    fn slot(&self, domain: DomId, addr: u64, flags: MapFlags) -> Result<Slot, HostError> {
        if flags.contains(MapFlags::CONTAINS_PTE) {
            self.pte_slot(domain, addr)
        } else {
            self.linear_slot(domain, addr)
        }
    }

    fn load_pte(&self, slot: Slot) -> Pte {
        let bytes = self
            .frames
            .get(slot.table)
            .and_then(|table| table.words.read_bytes::<8>(usize::from(slot.index) * 8));
        Pte(bytes.map_or(0, u64::from_le_bytes))
    }

    fn store_pte(&self, slot: Slot, pte: Pte) {
        if let Some(table) = self.frames.get(slot.table) {
            let stored = table
                .words
                .write(usize::from(slot.index) * 8, &pte.0.to_le_bytes());
            debug_assert!(stored, "an index is below 512");
        }
    }

    /// Whether an entry of `domain`'s tables that maps this frame writable holds the type.
    pub(super) fn entry_holds_type(&self, domain: DomId, pte: Pte) -> bool {
        pte.has(Pte::WRITABLE)
            && match self.frames.owner(pte.mfn()) {
                Some(PageOwner::Domain(owner)) => owner == domain || !self.is_external(owner),
                _ => true,
            }
    }

    /// Drops what an entry that is no longer there held.
    fn drop_pte(&mut self, domain: DomId, pte: Pte) {
        if !pte.has(Pte::PRESENT) || !self.frames.get(pte.mfn()).is_some_and(|frame| frame.is_memory()) {
            return;
        }
        if self.entry_holds_type(domain, pte) {
            self.put_type(pte.mfn());
        }
        self.put(pte.mfn());
    }

    /// Spec 4.4.1, create.
    pub(super) fn pv_map(&mut self, domain: DomId, mapping: &HostMapping) -> Result<(), HostError> {
        let slot = self.slot(domain, mapping.addr, mapping.flags)?;
        let old = self.load_pte(slot);
        self.store_pte(slot, Pte::of_grant(mapping, self.domain(domain).narrow));
        self.drop_pte(domain, old);
        Ok(())
    }

    /// Spec 4.4.1, remove/replace.
    pub(super) fn pv_unmap(&mut self, domain: DomId, unmapping: &HostUnmapping) -> Result<(), HostError> {
        let moved = match (
            unmapping.flags.contains(MapFlags::CONTAINS_PTE),
            unmapping.new_addr,
        ) {
            (_, 0) => None,
            (true, _) => return Err(HostError),
            (false, new_addr) => {
                if self.domain(domain).narrow && unmapping.addr >= super::frames::HIGH {
                    return Err(HostError);
                }
                let slot = self.linear_slot(domain, new_addr)?;
                let pte = self.load_pte(slot);
                self.store_pte(slot, Pte::default());
                Some(pte)
            }
        };
        let done = self.take_mapping(domain, unmapping, moved.unwrap_or_default());
        if let (Err(_), Some(pte)) = (done, moved) {
            // Step 6: what stood at `new_addr` is lost.
            self.drop_pte(domain, pte);
        }
        done
    }

    /// Steps 2 to 5: finds the mapping, compares it with the record and puts `other` in its place.
    fn take_mapping(
        &mut self,
        domain: DomId,
        unmapping: &HostUnmapping,
        other: Pte,
    ) -> Result<(), HostError> {
        let slot = self.slot(domain, unmapping.addr, unmapping.flags)?;
        let found = self.load_pte(slot);
        let writable = !unmapping.flags.contains(MapFlags::READONLY);
        if !found.has(Pte::PRESENT) || found.mfn() != unmapping.mfn || found.has(Pte::WRITABLE) != writable {
            return Err(HostError);
        }
        self.store_pte(slot, other);
        self.domain_mut(domain).stale.push(unmapping.mfn);
        Ok(())
    }

    /// Makes one of the domain's own frames, or a new one, the level-1 table for `addr`.
    pub(super) fn add_table(&mut self, domain: DomId, addr: u64) -> Option<Mfn> {
        let mfn = self.allocate(domain, false)?;
        self.use_as(mfn, PageType::L1Table).then(|| {
            let slot = L2Slot::Table(mfn);
            self.domain_mut(domain).tables.insert(table_number(addr), slot);
            mfn
        })
    }

    /// The domain's own edit of the entry for a linear address. True if the entry is that now.
    pub(super) fn edit_pte(&mut self, domain: DomId, addr: u64, new: Pte) -> bool {
        let Ok(slot) = self.linear_slot(domain, addr) else {
            return false;
        };
        if new.has(Pte::PRESENT) {
            if self.frames.reference(new.mfn()).is_none() {
                return false;
            }
            let memory = self.frames.live(new.mfn()).is_some();
            if memory && self.entry_holds_type(domain, new) && !self.get_type(new.mfn()) {
                self.put(new.mfn());
                return false;
            }
        }
        let old = self.load_pte(slot);
        self.store_pte(slot, new);
        self.drop_pte(domain, old);
        true
    }

    /// Changes bits of an entry and nothing else.
    pub(super) fn set_pte_bits(&mut self, domain: DomId, addr: u64, bits: u64) -> bool {
        let Ok(slot) = self.linear_slot(domain, addr) else {
            return false;
        };
        self.store_pte(slot, Pte(self.load_pte(slot).0 | bits));
        true
    }

    /// The entry for a linear address; `None` without a table.
    pub(super) fn find_pte(&self, domain: DomId, addr: u64) -> Option<Pte> {
        self.linear_slot(domain, addr)
            .ok()
            .map(|slot| self.load_pte(slot))
    }

    /// All present entries of a domain's level-1 tables.
    pub(super) fn present_ptes(&self, domain: DomId) -> Vec<Pte> {
        let mut ptes = Vec::new();
        for table in self.own_tables(domain) {
            for index in 0..u16::try_from(PAGE_SIZE / 8).unwrap_or(0) {
                let pte = self.load_pte(Slot { table, index });
                if pte.has(Pte::PRESENT) {
                    ptes.push(pte);
                }
            }
        }
        ptes
    }

    /// The level-1 tables that are the domain's; a scene may also have hung in others.
    fn own_tables(&self, domain: DomId) -> Vec<Mfn> {
        let slots = self.domain(domain).tables.values();
        let tables = slots.filter_map(|slot| match slot {
            L2Slot::Table(table) => Some(*table),
            L2Slot::Superpage(_) => None,
        });
        tables
            .filter(|table| self.frames.is_owned_by(*table, domain))
            .collect()
    }

    /// Tears a domain's page tables down: every entry drops what it held (spec 7.2).
    pub(super) fn drop_tables(&mut self, domain: DomId) {
        for pte in self.present_ptes(domain) {
            self.drop_pte(domain, pte);
        }
        for table in self.own_tables(domain) {
            self.stop_use(table);
        }
        self.domain_mut(domain).tables.clear();
    }
}
