//! Physmaps of translated domains, and grant mappings in them (spec 4.2.2, 4.4.2, 4.4.3, 6.2).

use gnttab_abi::{DomId, EntryFlags, Errno, Gfn, MapFlags, Mfn};

use super::frames::{HIGH, PageOwner};
use super::state::State;
use crate::domain::Reference;
use crate::hypervisor::{
    Access, DomainKind, FrameOwner, HostError, HostMapping, HostUnmapping, ResolveError, Resolved,
};
use crate::shared::PageWords;

/// Guest frame numbers end here: 48 bits of guest physical address.
pub(super) const GFN_END: u64 = 1 << 36;

/// What a gfn of a translated domain stands for. A gfn without an entry is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum P2mEntry {
    /// Ordinary memory.
    Ram(Mfn),
    /// Memory whose changes are logged.
    LogDirty(Mfn),
    /// Memory that the guest may not write; its writes are dropped.
    ReadOnlyRam(Mfn),
    /// Memory whose writes go to a device model.
    Ioreq(Mfn),
    /// Memory that comes into being when it is used.
    PopulateOnDemand,
    /// Shared by content; owned by the copy-on-write pseudo domain.
    Shared(Mfn),
    /// Paged out.
    PagedOut {
        /// Whether it is on its way back.
        requested: bool,
    },
    /// Another domain's page, mapped by a tool.
    Foreign(Mfn),
    /// A grant mapping.
    Grant(Mfn, Access),
    /// Registers of a device.
    DirectMmio(Mfn),
    /// Registers that somebody emulates.
    EmulatedMmio,
    /// Memory that went bad.
    Broken,
}

impl P2mEntry {
    /// The memory of the domain's own that it is.
    #[must_use]
    pub const fn own_ram(self) -> Option<Mfn> {
        match self {
            P2mEntry::Ram(mfn)
            | P2mEntry::LogDirty(mfn)
            | P2mEntry::ReadOnlyRam(mfn)
            | P2mEntry::Ioreq(mfn) => Some(mfn),
            _ => None,
        }
    }
}

impl State {
    fn entry(&self, domain: DomId, gfn: Gfn) -> Option<P2mEntry> {
        self.domain(domain).p2m.get(&gfn).copied()
    }

    /// The gfn at which a domain knows a page as its own memory.
    pub(super) fn gfn_of(&self, domain: DomId, mfn: Mfn) -> Option<Gfn> {
        let p2m = &self.domain(domain).p2m;
        p2m.iter()
            .find(|(_, entry)| entry.own_ram() == Some(mfn))
            .map(|(gfn, _)| *gfn)
    }

    // --- look-up ------------------------------------------------------------------------------

    /// Spec 4.2.1.
    pub(super) fn resolve_pv(&mut self, domain: DomId, gfn: Gfn) -> Result<Resolved, ResolveError> {
        self.resolve_own(domain, Mfn(gfn.0))
    }

    fn resolve_own(&mut self, domain: DomId, mfn: Mfn) -> Result<Resolved, ResolveError> {
        if !self.frames.is_owned_by(mfn, domain) {
            return Err(ResolveError::BadPage);
        }
        self.frames.reference(mfn).ok_or(ResolveError::BadPage)?;
        Ok(Resolved {
            mfn,
            owner: FrameOwner::Domain(domain),
        })
    }

    /// Spec 4.2.2.
    pub(super) fn resolve_translated(
        &mut self,
        domain: DomId,
        gfn: Gfn,
        access: Access,
    ) -> Result<Resolved, ResolveError> {
        match self.entry(domain, gfn).ok_or(ResolveError::BadPage)? {
            P2mEntry::Ram(mfn)
            | P2mEntry::LogDirty(mfn)
            | P2mEntry::ReadOnlyRam(mfn)
            | P2mEntry::Ioreq(mfn) => self.resolve_own(domain, mfn),
            P2mEntry::PopulateOnDemand => {
                let mfn = self.populate(domain, gfn).ok_or(ResolveError::BadPage)?;
                self.resolve_own(domain, mfn)
            }
            P2mEntry::Shared(mfn) if access == Access::Read => {
                self.frames.reference(mfn).ok_or(ResolveError::BadPage)?;
                Ok(Resolved {
                    mfn,
                    owner: FrameOwner::CopyOnWrite,
                })
            }
            P2mEntry::Shared(mfn) => {
                let own = self.unshare(domain, gfn, mfn).ok_or(ResolveError::Again)?;
                self.resolve_own(domain, own)
            }
            P2mEntry::PagedOut { .. } => {
                let entry = P2mEntry::PagedOut { requested: true };
                self.domain_mut(domain).p2m.insert(gfn, entry);
                Err(ResolveError::Again)
            }
            P2mEntry::Grant(mfn, _) if self.regrants(domain) => self.resolve_own(domain, mfn),
            P2mEntry::Foreign(_)
            | P2mEntry::Grant(..)
            | P2mEntry::DirectMmio(_)
            | P2mEntry::EmulatedMmio
            | P2mEntry::Broken => Err(ResolveError::BadPage),
        }
    }

    /// Whether a gfn that is a grant mapping of the domain's own page can be granted (spec 10.1
    /// item 8, and 4.2.2 for Arm).
    fn regrants(&self, domain: DomId) -> bool {
        self.domain(domain).kind == DomainKind::Arm || self.reference == Reference::V4_17
    }

    pub(super) fn populate(&mut self, domain: DomId, gfn: Gfn) -> Option<Mfn> {
        let mfn = self.allocate(domain, false)?;
        let state = self.domain_mut(domain);
        state.outstanding = state.outstanding.saturating_sub(1);
        state.p2m.insert(gfn, P2mEntry::Ram(mfn));
        Some(mfn)
    }

    pub(super) fn unshare(&mut self, domain: DomId, gfn: Gfn, shared: Mfn) -> Option<Mfn> {
        let own = self.allocate(domain, false)?;
        let (from, to) = (self.words(shared)?, self.words(own)?);
        let copied = PageWords::copy(&from, 0, &to, 0, 4096);
        debug_assert!(copied, "a whole page fits a page");
        self.domain_mut(domain).p2m.insert(gfn, P2mEntry::Ram(own));
        Some(own)
    }

    // --- host mappings ------------------------------------------------------------------------

    /// Spec 4.4.2 and 4.4.3, create, step 1: what a translated caller may ask for.
    fn grant_entry(mapping: &HostMapping) -> Result<P2mEntry, HostError> {
        let plain = mapping.flags - MapFlags::READONLY == MapFlags::HOST_MAP;
        if mapping.cache != EntryFlags::empty() || !plain {
            return Err(HostError);
        }
        let readonly = mapping.flags.contains(MapFlags::READONLY);
        let access = if readonly { Access::Read } else { Access::Write };
        Ok(P2mEntry::Grant(mapping.mfn, access))
    }

    fn checked_gfn(gfn: Gfn) -> Result<Gfn, HostError> {
        if gfn.0 < GFN_END { Ok(gfn) } else { Err(HostError) }
    }

    /// Spec 4.4.2, create.
    pub(super) fn hvm_map(&mut self, domain: DomId, mapping: &HostMapping) -> Result<(), HostError> {
        let entry = Self::grant_entry(mapping)?;
        let gfn = Self::checked_gfn(Gfn::containing(mapping.addr))?;
        match self.entry(domain, gfn) {
            Some(P2mEntry::Grant(..) | P2mEntry::Foreign(_) | P2mEntry::DirectMmio(_)) => {
                let crashes = &mut self.domain_mut(domain).crashes;
                crashes.push("a grant mapping would replace a mapping that is not its own memory");
                return Err(HostError);
            }
            Some(P2mEntry::PopulateOnDemand) => {
                let state = self.domain_mut(domain);
                state.outstanding = state.outstanding.saturating_sub(1);
            }
            _ => {}
        }
        if self.frames.is_owned_by(mapping.mfn, domain)
            && let Some(known_at) = self.gfn_of(domain, mapping.mfn)
        {
            self.domain_mut(domain).p2m.remove(&known_at);
        }
        self.domain_mut(domain).p2m.insert(gfn, entry);
        Ok(())
    }

    /// Spec 4.4.3, create.
    pub(super) fn arm_map(&mut self, domain: DomId, mapping: &HostMapping) -> Result<(), HostError> {
        let entry = Self::grant_entry(mapping)?;
        let gfn = self.arm_gfn(domain, mapping.addr)?;
        if self.domain(domain).dying {
            return Err(HostError);
        }
        let old = self.domain_mut(domain).p2m.insert(gfn, entry);
        self.drop_entry(old);
        Ok(())
    }

    fn arm_gfn(&self, domain: DomId, addr: u64) -> Result<Gfn, HostError> {
        let cut = self.domain(domain).narrow && self.reference == Reference::V4_17;
        let addr = if cut { addr % HIGH } else { addr };
        Self::checked_gfn(Gfn::containing(addr))
    }

    /// Spec 4.4.2 and 4.4.3, remove: the entry must be a grant mapping of exactly this frame.
    pub(super) fn translated_unmap(
        &mut self,
        domain: DomId,
        unmapping: &HostUnmapping,
    ) -> Result<(), HostError> {
        if unmapping.new_addr != 0 || unmapping.flags.contains(MapFlags::CONTAINS_PTE) {
            return Err(HostError);
        }
        let gfn = match self.domain(domain).kind {
            DomainKind::Arm => self.arm_gfn(domain, unmapping.addr)?,
            _ => Self::checked_gfn(Gfn::containing(unmapping.addr))?,
        };
        match self.entry(domain, gfn) {
            Some(P2mEntry::Grant(mfn, _)) if mfn == unmapping.mfn => {
                self.domain_mut(domain).p2m.remove(&gfn);
                Ok(())
            }
            _ => Err(HostError),
        }
    }

    /// Drops what a physmap entry held by itself: only foreign mappings do. A grant mapping's
    /// references belong to its handle.
    pub(super) fn drop_entry(&mut self, entry: Option<P2mEntry>) {
        if let Some(P2mEntry::Foreign(mfn)) = entry {
            self.put(mfn);
        }
    }

    pub(super) fn drop_p2m(&mut self, domain: DomId) {
        for (_, entry) in core::mem::take(&mut self.domain_mut(domain).p2m) {
            self.drop_entry(Some(entry));
        }
    }

    // --- frames of tables ---------------------------------------------------------------------

    /// Spec 6.2 step 8.
    pub(super) fn place(&mut self, domain: DomId, page: Mfn, gfn: Gfn) -> Result<(), Errno> {
        match self.domain(domain).kind {
            DomainKind::Pv => Err(Errno::Acces),
            DomainKind::Hvm => self.place_hvm(domain, page, gfn),
            DomainKind::Arm => self.place_arm(domain, page, gfn),
        }
    }

    fn place_hvm(&mut self, domain: DomId, page: Mfn, gfn: Gfn) -> Result<(), Errno> {
        self.vacate(domain, gfn)?;
        if let Some(elsewhere) = self.gfn_of(domain, page) {
            self.domain_mut(domain).p2m.remove(&elsewhere);
        }
        self.domain_mut(domain).p2m.insert(gfn, P2mEntry::Ram(page));
        Ok(())
    }

    /// Makes a gfn of an HVM domain a hole: special pages are unhooked, other memory of its own
    /// is freed, and what is not its own stays (spec 6.2 step 8).
    fn vacate(&mut self, domain: DomId, gfn: Gfn) -> Result<(), Errno> {
        Self::checked_gfn(gfn).map_err(|_| Errno::Inval)?;
        let old = self.entry(domain, gfn);
        match old {
            Some(P2mEntry::DirectMmio(_)) => return Err(Errno::Perm),
            Some(P2mEntry::Grant(..) | P2mEntry::Foreign(_) | P2mEntry::Shared(_)) => {
                return Err(Errno::Nxio);
            }
            Some(P2mEntry::PopulateOnDemand) => {
                let state = self.domain_mut(domain);
                state.outstanding = state.outstanding.saturating_sub(1);
            }
            _ => {}
        }
        if let Some(mfn) = old.and_then(P2mEntry::own_ram) {
            match self.frames.live(mfn) {
                Some(frame) if frame.info.special => {}
                Some(frame) if frame.info.owner == PageOwner::Domain(domain) => self.give_up(mfn),
                _ => return Err(Errno::Nxio),
            }
        }
        self.domain_mut(domain).p2m.remove(&gfn);
        Ok(())
    }

    /// A toolstack maps another domain's frame (spec 6.1 step 10). The entry holds a reference.
    pub(super) fn map_foreign(&mut self, domain: DomId, gfn: Gfn, mfn: Mfn) -> Result<(), Errno> {
        match self.domain(domain).kind {
            DomainKind::Pv => return Err(Errno::NoSys),
            DomainKind::Hvm => self.vacate(domain, gfn)?,
            DomainKind::Arm => {
                Self::checked_gfn(gfn).map_err(|_| Errno::Inval)?;
            }
        }
        self.frames.reference(mfn).ok_or(Errno::Inval)?;
        let entry = P2mEntry::Foreign(mfn);
        let old = self.domain_mut(domain).p2m.insert(gfn, entry);
        self.drop_entry(old);
        Ok(())
    }

    fn place_arm(&mut self, domain: DomId, page: Mfn, gfn: Gfn) -> Result<(), Errno> {
        if self.gfn_of(domain, page).is_some() {
            return Err(Errno::Busy);
        }
        let gfn = Self::checked_gfn(gfn).map_err(|_| Errno::Inval)?;
        let old = self.domain_mut(domain).p2m.insert(gfn, P2mEntry::Ram(page));
        self.drop_entry(old);
        Ok(())
    }

    /// Spec 3.9 step 8: out of the physmap and the domain's hands, if nobody else references it.
    pub(super) fn retract(&mut self, domain: DomId, page: Mfn) -> bool {
        let own_gfn = self.gfn_of(domain, page);
        match self.frames.get_mut(page) {
            Some(frame) if frame.info.references == 1 => frame.info.owner = PageOwner::Nobody,
            _ => return false,
        }
        if let Some(gfn) = own_gfn {
            let state = self.domain_mut(domain);
            state.p2m.remove(&gfn);
            state.retracted.insert(page, gfn);
        }
        true
    }

    /// Puts a retracted page back where it was.
    pub(super) fn restore(&mut self, domain: DomId, page: Mfn) {
        let gfn = self.domain_mut(domain).retracted.get(&page).copied();
        self.renew(domain, page);
        if let Some(gfn) = gfn {
            self.domain_mut(domain).p2m.insert(gfn, P2mEntry::Ram(page));
        }
    }

    /// Gives a retracted page back, mapped nowhere.
    pub(super) fn renew(&mut self, domain: DomId, page: Mfn) {
        self.domain_mut(domain).retracted.remove(&page);
        if let Some(frame) = self.frames.get_mut(page) {
            frame.info.owner = PageOwner::Domain(domain);
        }
    }

    /// A page that a transfer brought, put into its new owner's physmap.
    pub(super) fn install_translated(&mut self, domain: DomId, mfn: Mfn, gfn: Gfn) -> Result<(), HostError> {
        let gfn = Self::checked_gfn(gfn)?;
        match self.entry(domain, gfn) {
            Some(P2mEntry::Grant(..) | P2mEntry::Foreign(_) | P2mEntry::DirectMmio(_)) => Err(HostError),
            _ => {
                self.domain_mut(domain).p2m.insert(gfn, P2mEntry::Ram(mfn));
                Ok(())
            }
        }
    }
}
