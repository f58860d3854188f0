//! What a hypervisor provides, as one trait.
//!
//! The engine decides; the hypervisor does. It knows which frame a domain means, counts the
//! references on frames, edits page tables, moves bytes and flushes translations. It never sees
//! a grant entry.
//!
//! What an implementation must uphold:
//! 1. A reference taken on a frame ([`Hypervisor::resolve`], [`Hypervisor::get_frame`]) keeps the
//!    frame's memory alive until [`Hypervisor::put_frame`], whatever its owner does.
//! 2. [`Hypervisor::map_host`] and [`Hypervisor::unmap_host`] either do the whole job or nothing,
//!    but for what their documentation names.
//! 3. References and types of an I/O frame are not counted: dropping one does nothing.
//! 4. A frame's number is below 2^46: 58 bits of address.
//! 5. No method calls back into the engine, and none waits for another domain.

use gnttab_abi::{CacheOp, DomId, EntryFlags, Errno, Gfn, MapFlags, Mfn};

use crate::observe::Answered;
use crate::shared::PageWords;

/// What a use wants to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    Write,
}

/// Who owns a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameOwner {
    /// A domain.
    Domain(DomId),
    /// The copy-on-write pseudo domain: the frame may be used for reading only.
    CopyOnWrite,
    /// The I/O pseudo domain: not memory.
    Io,
}

/// A frame that a domain's gfn stands for, with one reference held (spec 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The frame.
    pub mfn: Mfn,
    /// Its owner at the time of the look-up.
    pub owner: FrameOwner,
}

/// Why a gfn gave no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Not a page that the domain may grant.
    #[error("not a page that the domain may grant")]
    BadPage,
    /// Being paged in or un-shared: try again.
    #[error("the page is not there yet")]
    Again,
}

/// A host mapping could not be made or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such mapping can be made or removed there")]
pub struct HostError;

/// Why a page could not be taken from its domain for a transfer (spec 3.7 steps 2 and 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StealError {
    /// Not a page of the domain's own, special, or still referenced.
    #[error("not a free page of the domain")]
    BadPage,
    /// The page is the domain's, but could not be taken.
    #[error("the page could not be taken")]
    Failed,
}

/// A host mapping to be made (spec 4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMapping {
    /// Where: the caller's `host_addr`, in bytes, unchecked.
    pub addr: u64,
    /// The frame; a reference (and the writable type, where taken) is held for the mapping.
    pub mfn: Mfn,
    /// The caller's flags, all 32 bits; `HOST_MAP` is set.
    pub flags: MapFlags,
    /// Cache attributes (PWT, PCD, PAT only), for I/O frames; empty for memory.
    pub cache: EntryFlags,
    /// The granter.
    pub granter: DomId,
}

/// A host mapping to be removed or replaced (spec 4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostUnmapping {
    /// Where: the caller's `host_addr`, not 0.
    pub addr: u64,
    /// What takes its place: the linear address whose entry moves there; 0: nothing.
    pub new_addr: u64,
    /// The frame that must be found there.
    pub mfn: Mfn,
    /// The flags the mapping was made with, low 16 bits.
    pub flags: MapFlags,
}

/// The kinds of domain, which differ in what they may call and how they are mapped into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DomainKind {
    /// x86 PV: page tables of its own, machine frame numbers; not translated, not external.
    Pv,
    /// x86 HVM or PVH: translated and external.
    Hvm,
    /// Arm, either width: translated and external.
    Arm,
}

impl DomainKind {
    /// The hypervisor, not the guest, owns the page tables that matter.
    #[must_use]
    pub const fn is_external(self) -> bool {
        !matches!(self, DomainKind::Pv)
    }

    /// The guest's frame numbers go through a table of the hypervisor's.
    #[must_use]
    pub const fn is_translated(self) -> bool {
        self.is_external()
    }
}

/// Places in the engine where a test can park an actor (`advisories.md` 0.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hook {
    /// Between the first load of a shared entry's head and the compare-and-swap that marks it (v1).
    ClaimLoaded,
    /// Version 2: the status word is marked, the head not yet looked at again.
    ClaimMarked,
    /// Map: entry checked and marked, pin not yet raised.
    MapValidated,
    /// Map: pin raised, entry and table let go, page not yet referenced.
    MapPinned,
    /// Map: something failed, nothing undone yet.
    MapUnwind,
    /// Map: everything held, the handle's record not yet published.
    MapPublish,
    /// Unmap: mapping removed and record edited, translations not yet flushed.
    UnmapPass1,
    /// Unmap: translations flushed, pins not yet lowered.
    UnmapFlushed,
    /// Copy of a transitive grant: outer table let go, far table not yet visited.
    CopyUnlocked,
    /// Copy of a transitive grant: far table visited, outer table not yet taken again.
    CopyBack,
    /// Copy: both pages held, bytes not yet moved.
    CopyMapped,
    /// Transfer: page taken from the sender, receiver not yet consulted.
    TransferStolen,
    /// Transfer: the receiver's slot is committed, the page not yet its own.
    TransferCommitted,
    /// Version change: checks passed, nothing changed.
    VersionChecked,
    /// Placing a table frame: frame known, not yet inserted.
    PlaceFrame,
    /// Cache flush: the right to flush is established, nothing flushed yet.
    CacheFound,
    /// Handle allocation: a free handle was seen, not yet taken.
    HandlePeek,
    /// Growth: after each single publication step.
    Grow,
    /// Teardown: between two handles.
    Teardown,
}

/// The hypervisor that embeds the engine.
///
/// Everything from [`Hypervisor::may_map`] down has a default: the plain policy, no I/O MMU, no
/// transfers, no frames placed by the guest. [`machine`](crate::machine) is a complete example.
pub trait Hypervisor: Send + Sync + Sized {
    /// What the hypervisor keeps for a domain.
    type Domain: Send + Sync;
    /// A frame of a grant table, readable and writable as words; freed when dropped.
    type TablePage: AsRef<PageWords> + Send + Sync;

    // --- frames -------------------------------------------------------------------------------

    /// Finds the frame behind `gfn` of `domain` and takes a reference on it (spec 4.2).
    ///
    /// # Errors
    /// As [`ResolveError`] says; nothing is held then.
    fn resolve(&self, domain: &Self::Domain, gfn: Gfn, access: Access) -> Result<Resolved, ResolveError>;

    /// Takes a further reference on a frame that is in use, and tells its owner. `None` if the
    /// frame is on its way out.
    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner>;

    /// Drops a reference.
    fn put_frame(&self, mfn: Mfn);

    /// [`Hypervisor::resolve`] for writing and [`Hypervisor::get_writable`] in one, for embedders that
    /// can do both in one step. True: the type was had too; false: the reference alone.
    ///
    /// # Errors
    /// As [`ResolveError`] says; nothing is held then.
    #[inline]
    fn resolve_writable(&self, domain: &Self::Domain, gfn: Gfn) -> Result<(Resolved, bool), ResolveError> {
        let resolved = self.resolve(domain, gfn, Access::Write)?;
        Ok((resolved, self.get_writable(resolved.mfn)))
    }

    /// [`Hypervisor::get_frame`] and [`Hypervisor::get_writable`] in one, likewise. `None`: nothing was had.
    #[inline]
    fn get_writable_frame(&self, mfn: Mfn) -> Option<(FrameOwner, bool)> {
        let owner = self.get_frame(mfn)?;
        Some((owner, self.get_writable(mfn)))
    }

    /// [`Hypervisor::put_writable`] and [`Hypervisor::put_frame`] in one.
    #[inline]
    fn put_writable_frame(&self, mfn: Mfn) {
        self.put_writable(mfn);
        self.put_frame(mfn);
    }

    /// Takes the writable page type (spec 4.2.3); false: the page is in use as something else.
    fn get_writable(&self, mfn: Mfn) -> bool;

    /// Drops the writable page type.
    fn put_writable(&self, mfn: Mfn);

    /// Whether [`Hypervisor::copy`] may wait for anything, which is the default: then the table is left for each
    /// copy and entered again, which takes as long as some hundred bytes. Otherwise it is called from inside a
    /// table, as the other functions are; who wants the table alone, or the same entry, waits for the bytes of one
    /// copy at most.
    #[inline(always)]
    fn copy_waits(&self) -> bool {
        true
    }

    /// Copies `len` bytes between two referenced frames. Both ranges lie within their pages.
    /// Guests may write to either at the same time; the bytes mean nothing to the copier.
    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16);

    /// A hint: `gfn` of `domain` will be resolved soon, and `bytes` of it moved, the first and how many
    /// (none for a page that is only to be mapped). An implementation may ask its caches for what it will
    /// look at then. It may not wait, and nothing may depend on it: what a guest wrote has not been judged,
    /// and the frame that a granter names may be anybody's. Where a processor lets guests guess at what its
    /// first cache holds, fetch no bytes here.
    #[inline(always)]
    fn expect_frame(&self, domain: &Self::Domain, gfn: Gfn, bytes: (u16, u16)) {
        let _ = (domain, gfn, bytes);
    }

    /// A hint: something will be mapped at `addr` soon, likewise.
    #[inline(always)]
    fn expect_mapping(&self, grantee: &Self::Domain, addr: u64) {
        let _ = (grantee, addr);
    }

    /// Notes that a grantee has written to a frame of `granter`.
    fn mark_dirty(&self, granter: &Self::Domain, mfn: Mfn) {
        let _ = (granter, mfn);
    }

    // --- mappings -----------------------------------------------------------------------------

    /// Makes a host mapping (spec 4.4, *create*).
    ///
    /// # Errors
    /// [`HostError`]: nothing was changed (or the grantee was crashed).
    fn map_host(&self, grantee: &Self::Domain, mapping: &HostMapping) -> Result<(), HostError>;

    /// Removes or replaces a host mapping (spec 4.4, *remove*).
    ///
    /// # Errors
    /// [`HostError`]: the mapping stands. A PV guest's entry at `new_addr` may be lost all the
    /// same (spec 10.2 item 14).
    fn unmap_host(&self, grantee: &Self::Domain, unmapping: &HostUnmapping) -> Result<(), HostError>;

    /// Flushes every stale translation of `grantee`. Called once a group of unmaps, and once a mapping is undone
    /// that was just made, for domains that are not external; external ones are flushed by `unmap_host` itself.
    fn flush(&self, grantee: &Self::Domain);

    /// Whether [`Hypervisor::flush`] of that grantee may wait for anything: for other processors, which may hold
    /// translations of its. If not, it is called from inside a table; otherwise, which is the default, the table
    /// is left for it and entered again. Asked of external grantees too, whom `unmap_host` has flushed by then.
    #[inline]
    fn flush_waits(&self, grantee: &Self::Domain) -> bool {
        let _ = grantee;
        true
    }

    /// The domain did what no live guest can: it must not run again.
    fn crash(&self, domain: &Self::Domain, why: &'static str);

    /// Whether others still hold references on frames of a dying domain. Such a domain keeps its
    /// number and its table; when the last reference has gone, the embedder calls
    /// [`Engine::retire`](crate::Engine::retire) again.
    fn is_held(&self, domain: &Self::Domain) -> bool {
        let _ = domain;
        false
    }

    // --- the table's own frames ---------------------------------------------------------------

    /// A zeroed page for a grant table or status words, owned by `domain`; `None`: no memory.
    fn alloc_table_page(&self, domain: &Self::Domain) -> Option<Self::TablePage>;

    /// The machine frame of a table page.
    fn table_page_mfn(&self, page: &Self::TablePage) -> Mfn;

    /// Where the domain sees a table page: for a PV domain its mfn, for a translated one the gfn
    /// at which it is mapped, or [`Gfn::INVALID`].
    fn table_page_gfn(&self, domain: &Self::Domain, page: &Self::TablePage) -> Gfn;

    /// Takes a status page back from its domain before a return to version 1: out of its
    /// physmap, and referenced by nobody (spec 3.9 step 8). From then on it is no page of the
    /// domain's, which can neither map nor grant it. False: still referenced; the page stays where
    /// it is.
    fn retract_table_page(&self, domain: &Self::Domain, page: &Self::TablePage) -> bool {
        let _ = (domain, page);
        true
    }

    /// Undoes [`Hypervisor::retract_table_page`] when a later page could not be retracted: the page
    /// is where it was.
    fn restore_table_page(&self, domain: &Self::Domain, page: &Self::TablePage) {
        let _ = (domain, page);
    }

    /// A status page, zeroed, becomes its domain's once more, because the table is version 2 again:
    /// as a new one it is mapped nowhere. Also called for pages that never were retracted.
    fn renew_table_page(&self, domain: &Self::Domain, page: &Self::TablePage) {
        let _ = (domain, page);
    }

    /// Puts a table page at `gfn` of a translated domain (spec 6.2 step 8).
    ///
    /// # Errors
    /// The errno of the memory operation.
    fn place_table_page(&self, domain: &Self::Domain, page: &Self::TablePage, gfn: Gfn) -> Result<(), Errno> {
        let _ = (domain, page, gfn);
        Err(Errno::NoSys)
    }

    /// Maps a foreign frame at `gfn` of a translated toolstack domain (spec 6.1 step 10).
    ///
    /// # Errors
    /// The errno of the memory operation.
    fn map_foreign(&self, caller: &Self::Domain, gfn: Gfn, mfn: Mfn) -> Result<(), Errno> {
        let _ = (caller, gfn, mfn);
        Err(Errno::NoSys)
    }

    // --- policy (spec 3.2); the defaults are Xen's plain policy ---------------------------------

    /// Whether `domain` is a control domain.
    fn is_control(&self, domain: &Self::Domain) -> bool {
        let _ = domain;
        false
    }

    /// Whether `caller` is the device model of `target`.
    fn is_device_model_of(&self, caller: &Self::Domain, target: &Self::Domain) -> bool {
        let _ = (caller, target);
        false
    }

    /// Policy check of map.
    fn may_map(&self, caller: &Self::Domain, granter: &Self::Domain, flags: MapFlags) -> bool {
        let _ = (caller, granter, flags);
        true
    }

    /// Policy check of unmap and unmap_and_replace.
    fn may_unmap(&self, caller: &Self::Domain, granter: &Self::Domain) -> bool {
        let _ = (caller, granter);
        true
    }

    /// Policy check of copy: who calls, and the domains of the two sides.
    fn may_copy(&self, caller: &Self::Domain, source: &Self::Domain, dest: &Self::Domain) -> bool {
        let _ = (caller, source, dest);
        true
    }

    /// Policy check of transfer.
    fn may_transfer(&self, caller: &Self::Domain, receiver: &Self::Domain) -> bool {
        let _ = (caller, receiver);
        true
    }

    /// Policy check of setup_table and get_status_frames on another domain's table.
    fn may_setup(&self, caller: &Self::Domain, target: &Self::Domain) -> bool {
        self.is_device_model_of(caller, target) || self.is_control(caller)
    }

    /// Policy check of query_size and get_version on another domain's table.
    fn may_query(&self, caller: &Self::Domain, target: &Self::Domain) -> bool {
        self.is_device_model_of(caller, target) || self.is_control(caller)
    }

    /// What get_version answers when [`Hypervisor::may_query`] says no.
    fn query_errno(&self) -> Errno {
        Errno::Perm
    }

    // --- devices ------------------------------------------------------------------------------

    /// Whether `granter` may grant this I/O frame (spec 3.3 step 13).
    fn may_grant_io(&self, granter: &Self::Domain, mfn: Mfn) -> bool {
        let _ = (granter, mfn);
        false
    }

    /// Whether the domain's I/O MMU has to follow its grant mappings (spec 4.6).
    fn iommu_follows(&self, grantee: &Self::Domain) -> bool {
        let _ = grantee;
        false
    }

    /// Sets what the grantee's devices may do with a frame at bus address mfn * 4096; `None`
    /// takes it away.
    ///
    /// # Errors
    /// [`HostError`]: nothing was changed.
    fn iommu_set(&self, grantee: &Self::Domain, mfn: Mfn, access: Option<Access>) -> Result<(), HostError> {
        let _ = (grantee, mfn, access);
        Ok(())
    }

    /// Maintains data caches for bytes of a frame (spec 3.13 step 7).
    ///
    /// # Errors
    /// The errno of the hypercall.
    fn cache_flush(&self, mfn: Mfn, offset: u16, length: u16, op: CacheOp) -> Result<(), Errno> {
        let _ = (mfn, offset, length, op);
        Ok(())
    }

    /// Who owns a frame, without a reference; `Err` if the number is no memory frame, `Ok(None)`
    /// if nobody owns it.
    ///
    /// # Errors
    /// [`ResolveError::BadPage`] if there is no such frame.
    fn frame_owner(&self, mfn: Mfn) -> Result<Option<DomId>, ResolveError> {
        let _ = mfn;
        Err(ResolveError::BadPage)
    }

    // --- transfer (spec 3.7) ------------------------------------------------------------------

    /// Takes a page away from a PV domain: on success it has no owner, and nobody can reach it.
    ///
    /// # Errors
    /// As [`StealError`] says; the page stays with its domain.
    fn steal(&self, from: &Self::Domain, mfn: Mfn) -> Result<(), StealError> {
        let _ = (from, mfn);
        Err(StealError::BadPage)
    }

    /// Frees a page that [`Hypervisor::steal`] took.
    fn free_stolen(&self, mfn: Mfn) {
        let _ = mfn;
    }

    /// Replaces a stolen page by one below 2^32 (or the receiver's own, lower limit), with the
    /// same content; the old one is freed. Called only if `mfn` does not fit.
    ///
    /// # Errors
    /// [`StealError::Failed`]: there is no such page; the old one is still stolen.
    fn replace_stolen(&self, mfn: Mfn, receiver: &Self::Domain) -> Result<Mfn, StealError> {
        let _ = (mfn, receiver);
        Err(StealError::Failed)
    }

    /// Whether frame numbers of this size fit the receiver, beyond what its table's version
    /// demands.
    fn fits(&self, receiver: &Self::Domain, mfn: Mfn) -> bool {
        let _ = (receiver, mfn);
        true
    }

    /// Reserves one page in the receiver's count.
    ///
    /// # Errors
    /// [`StealError::Failed`]: the receiver is dying or full.
    fn reserve(&self, receiver: &Self::Domain) -> Result<(), StealError> {
        let _ = receiver;
        Err(StealError::Failed)
    }

    /// Gives a reservation back.
    fn unreserve(&self, receiver: &Self::Domain) {
        let _ = receiver;
    }

    /// Makes a stolen page the receiver's, on a reservation.
    ///
    /// # Errors
    /// [`StealError::Failed`]: the receiver began to die; page and reservation are as before.
    fn assign(&self, receiver: &Self::Domain, mfn: Mfn) -> Result<(), StealError> {
        let _ = (receiver, mfn);
        Err(StealError::Failed)
    }

    /// Enters an assigned page into the receiver's address space at `gfn` (for a PV receiver:
    /// the machine-to-physical number).
    ///
    /// # Errors
    /// [`HostError`]: the page is the receiver's all the same.
    fn install(&self, receiver: &Self::Domain, mfn: Mfn, gfn: Gfn) -> Result<(), HostError> {
        let _ = (receiver, mfn, gfn);
        Err(HostError)
    }

    // --- observation --------------------------------------------------------------------------

    /// Monotonic time in nanoseconds, for the ages of mappings; 0 where there is no clock.
    fn now(&self) -> u64 {
        0
    }

    /// Called with each item that an operation has answered, where operations have statuses; does nothing,
    /// at no cost, unless the embedder overrides it. The calling domain waits meanwhile.
    #[inline(always)]
    fn answered(&self, answered: &Answered) {
        let _ = answered;
    }

    /// Called at each [`Hook`]; does nothing, at no cost, unless a test overrides it.
    #[inline(always)]
    fn hook(&self, hook: Hook) {
        let _ = hook;
    }
}
