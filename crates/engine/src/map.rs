//! `map_grant_ref` (spec 3.3).
//!
//! The checks, in order: kind of mapping asked for; flags that the caller's kind forbids; granter;
//! policy; a handle; the reference; the entry in use by another; the entry's own word; the frame;
//! the frame's owner; its type; the host mapping; the I/O MMU.

use gnttab_abi::{
    DomId, EntryFlags, Gfn, GrantHandle, GrantRef, GrantStatus, MapFlags, MapGrantRef, Mfn, Op,
};

use crate::active::{Pins, State, UseKind};
use crate::caller::Caller;
use crate::claim::{Wanted, begin_use, clear_marks, end_use, marks_to_clear};
use crate::domain::{Domain, Vcpu};
use crate::engine::Processor;
use crate::hypervisor::{
    Access, DomainKind, FrameOwner, Hook, HostMapping, HostUnmapping, Hypervisor, ResolveError, Resolved,
};
use crate::iommu;
use crate::maptrack::Record;
use crate::registry::{LEAVE_AFTER, Room, Visit};
use crate::table::Entry;

/// The access that flags ask for.
#[inline]
pub(crate) fn access_of(flags: MapFlags) -> Access {
    if flags.contains(MapFlags::READONLY) {
        Access::Read
    } else {
        Access::Write
    }
}

/// The two kinds of mapping that drivers make. Map and unmap are code of their own for each, in which what the
/// flags decide is decided.
pub(crate) const WRITABLE: MapFlags = MapFlags::HOST_MAP;
pub(crate) const READABLE: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);

/// Whether a host mapping takes the writable page type (spec 3.3 step 14c, 4.5).
#[inline]
pub(crate) fn takes_type(access: Access, grantee: DomainKind, granter: DomainKind, itself: bool) -> bool {
    access == Access::Write && grantee != DomainKind::Arm && (!granter.is_external() || itself)
}

pub(crate) fn status_of(error: ResolveError) -> GrantStatus {
    match error {
        ResolveError::BadPage => GrantStatus::BAD_PAGE,
        ResolveError::Again => GrantStatus::EAGAIN,
    }
}

/// What step 14 took, so that a failure gives back exactly that (ENG-3).
#[derive(Default)]
struct Taken {
    frames: u32,
    types: u32,
    /// Whether the type came with the look-up, until a mapping needs it; `None`: not asked for.
    found: Option<bool>,
    host: bool,
}

impl<H: Hypervisor> Processor<'_, H> {
    /// Maps grants, one after the other. Every item's `status` is written; `handle` and
    /// `dev_bus_addr` on success only.
    ///
    /// ```
    /// # #[cfg(feature = "machine")] {
    /// use gnttab_abi::{DomId, GrantRef, GrantStatus, MapFlags, MapGrantRef};
    /// use gnttab_engine::{Hypervisor, Processor, Vcpu};
    ///
    /// fn map<H: Hypervisor>(cpu: &mut Processor<'_, H>, vcpu: &Vcpu<H>, host_addr: u64) -> GrantStatus {
    ///     let flags = MapFlags::HOST_MAP | MapFlags::READONLY;
    ///     let (dom, gref) = (DomId(1), GrantRef(5));
    ///     let mut item = MapGrantRef { host_addr, flags, gref, dom, ..MapGrantRef::default() };
    ///     cpu.map(vcpu, core::slice::from_mut(&mut item));
    ///     item.status
    /// }
    /// # }
    /// ```
    pub fn map(&mut self, vcpu: &Vcpu<H>, items: &mut [MapGrantRef]) {
        let now = self.engine.hv.now();
        let (mut visit, caller) = (self.visit(), vcpu.caller());
        for items in items.chunks_mut(LEAVE_AFTER) {
            visit.leave();
            for item in items {
                *item = visit.map_item(&caller, item, now);
            }
        }
    }
}

impl<H: Hypervisor> Visit<'_, H> {
    #[inline(always)]
    pub(crate) fn map_item(&mut self, caller: &Caller<'_, H>, item: &MapGrantRef, now: u64) -> MapGrantRef {
        self.begin_item();
        let done = if item.flags == WRITABLE {
            self.map_one(caller, item, WRITABLE, now, false)
        } else if item.flags == READABLE {
            self.map_one(caller, item, READABLE, now, false)
        } else {
            self.map_any(caller, *item, now, false)
        };
        let (status, handle, dev_bus_addr) = match done {
            Ok((handle, mfn)) => (GrantStatus::OKAY, handle, mfn.address()),
            Err(status) => (status, item.handle, item.dev_bus_addr),
        };
        let (peer, gref) = (Some(item.dom), Some(item.gref));
        caller.answer(&self.engine.hv, Op::MapGrantRef, peer, gref, status);
        MapGrantRef {
            status,
            handle,
            dev_bus_addr,
            ..*item
        }
    }

    /// As [`Visit::map_one`], whatever the flags.
    #[inline(never)]
    fn map_any(
        &mut self,
        caller: &Caller<'_, H>,
        item: MapGrantRef,
        now: u64,
        gathered: bool,
    ) -> Result<(GrantHandle, Mfn), GrantStatus> {
        self.map_one(caller, &item, item.flags, now, gathered)
    }

    /// Steps 1 to 17 with the item's flags.
    #[inline(always)]
    fn map_one(
        &mut self,
        caller: &Caller<'_, H>,
        item: &MapGrantRef,
        flags: MapFlags,
        now: u64,
        gathered: bool,
    ) -> Result<(GrantHandle, Mfn), GrantStatus> {
        let hv = &self.engine.hv;
        let domain = caller.domain;
        // 1, 2
        let pins = Pins::of_mapping(flags);
        if pins.is_empty() {
            return Err(GrantStatus::BAD_GNTREF);
        }
        let pv_only = MapFlags::DEVICE_MAP | MapFlags::APPLICATION_MAP | MapFlags::CONTAINS_PTE;
        if flags.intersects(pv_only) && domain.kind().is_external() {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        // 3, 4
        let granter = self.enter(item.dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !hv.may_map(domain.private(), granter.private(), flags) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        // 5
        hv.hook(Hook::HandlePeek);
        let Some(free) = caller.handles.allocate() else {
            return self.map_with_gathered(caller, *item, now, gathered);
        };
        let done = Mapping::new(hv, domain, granter, item, flags).make();
        if done.is_err() {
            caller.handles.release(free);
        }
        let mfn = match done {
            Ok(mfn) => mfn,
            Err(Unmade::Refused(status)) => return Err(status),
            Err(Unmade::Undo(undo)) => {
                self.undo(domain, undo);
                return Err(GrantStatus::GENERAL_ERROR);
            }
        };
        // 17
        hv.hook(Hook::MapPublish);
        let record = Record {
            gref: item.gref,
            granter: granter.id(),
            flags,
        };
        Ok((free.publish(record, now), mfn))
    }

    /// Step 5 once more, with what other vCPUs keep to themselves.
    #[cold]
    fn map_with_gathered(
        &mut self,
        caller: &Caller<'_, H>,
        item: MapGrantRef,
        now: u64,
        gathered: bool,
    ) -> Result<(GrantHandle, Mfn), GrantStatus> {
        if gathered {
            return Err(GrantStatus::NO_SPACE);
        }
        self.leave();
        let registry = &self.engine.registry;
        caller.domain.maptrack.gather(|| registry.wait_for_all());
        self.map_any(caller, item, now, true)
    }

    /// Gives back what was taken; the pins go before the references that they stand for (CPY-6).
    #[cold]
    #[inline(never)]
    fn undo(&mut self, caller: &Domain<H>, undo: Undo) {
        let engine = self.engine;
        let hv = &engine.hv;
        if let Some(unmapping) = undo.unmapping {
            // What was just made is there, unless the caller's own processors tore it down.
            let _ = hv.unmap_host(caller.private(), &unmapping);
            // As between the phases of an unmap: the pins keep the granter and its entry meanwhile.
            self.flush(caller);
        }
        let inside = self.enter(undo.granter);
        if let Some(granter) = inside
            && let Some(entry) = granter.view.entry(undo.gref)
        {
            unpin(&entry, undo.pins, undo.access);
        }
        (0..undo.types).for_each(|_| hv.put_writable(undo.mfn));
        (0..undo.frames).for_each(|_| hv.put_frame(undo.mfn));
        if inside.is_some_and(|granter| granter.is_dying()) {
            self.leave();
            engine.reap(undo.granter);
        }
    }
}

/// One item on its way through steps 6 to 16.
struct Mapping<'a, 'r, H: Hypervisor> {
    hv: &'a H,
    caller: &'a Domain<H>,
    granter: &'a Room<'r, H>,
    item: &'a MapGrantRef,
    flags: MapFlags,
    pins: Pins,
    access: Access,
    /// Whether the host mapping takes the writable type of the granter's page.
    host_type: bool,
    /// Whether any mapping does.
    any_type: bool,
}

impl<'a, 'r, H: Hypervisor> Mapping<'a, 'r, H> {
    #[inline(always)]
    fn new(
        hv: &'a H,
        caller: &'a Domain<H>,
        granter: &'a Room<'r, H>,
        item: &'a MapGrantRef,
        flags: MapFlags,
    ) -> Self {
        let access = access_of(flags);
        let itself = granter.id() == caller.id();
        let host_type =
            flags.contains(MapFlags::HOST_MAP) && takes_type(access, caller.kind(), granter.kind(), itself);
        let device_type = flags.contains(MapFlags::DEVICE_MAP) && access == Access::Write;
        Mapping {
            hv,
            caller,
            granter,
            item,
            flags,
            pins: Pins::of_mapping(flags),
            access,
            host_type,
            any_type: host_type || device_type,
        }
    }

    #[inline(always)]
    fn make(&self) -> Result<Mfn, Unmade> {
        // 6
        let entry = self.granter.view.entry_to_use(self.item.gref)?;
        // 7 to 10; a type that will be needed comes with the look-up
        let access = self.access;
        let resolve = |gfn| {
            let granter = self.granter.private();
            if self.any_type {
                let (Resolved { mfn, owner }, had) = self.hv.resolve_writable(granter, gfn)?;
                Ok((mfn, (owner, Some(had))))
            } else {
                let Resolved { mfn, owner } = self.hv.resolve(granter, gfn, access)?;
                Ok((mfn, (owner, None)))
            }
        };
        let (mfn, found) = pin(self.hv, &entry, self.caller.id(), access, self.pins, resolve)?;
        self.hv.hook(Hook::MapPinned);
        // 12: one reference, which a first use has from its look-up
        let found = found.or_else(|| {
            if self.any_type {
                let (owner, had) = self.hv.get_writable_frame(mfn)?;
                Some((owner, Some(had)))
            } else {
                Some((self.hv.get_frame(mfn)?, None))
            }
        });
        let (owner, typed) = found.map_or((None, None), |(owner, typed)| (Some(owner), typed));
        let mut taken = Taken {
            frames: u32::from(owner.is_some()),
            types: u32::from(typed == Some(true)),
            found: typed,
            host: false,
        };
        // 11, 13 to 16
        let Err(Failed) = self.install(&entry, mfn, owner, &mut taken) else {
            return Ok(mfn);
        };
        self.hv.hook(Hook::MapUnwind);
        let unmapping = taken.host.then_some(HostUnmapping {
            addr: self.item.host_addr,
            new_addr: 0,
            mfn,
            flags: self.flags,
        });
        Err(Unmade::Undo(Undo {
            granter: self.granter.id(),
            gref: self.item.gref,
            pins: self.pins,
            access,
            mfn,
            unmapping,
            types: taken.types,
            frames: taken.frames,
        }))
    }

    /// Steps 13 to 16: references, types and mappings.
    #[inline(always)]
    fn install(
        &self,
        entry: &Entry<'_>,
        mfn: Mfn,
        owner: Option<FrameOwner>,
        taken: &mut Taken,
    ) -> Result<(), Failed> {
        let Mapping {
            hv,
            caller,
            granter,
            flags,
            ..
        } = self;
        let access = self.access;
        let host = flags.contains(MapFlags::HOST_MAP);
        let device = flags.contains(MapFlags::DEVICE_MAP);
        let itself = granter.id() == caller.id();
        match owner {
            // 13
            Some(FrameOwner::Io) => {
                if caller.kind().is_external() || !hv.may_grant_io(granter.private(), mfn) {
                    return Err(Failed);
                }
                if host {
                    // 11: the cache bits as they are now
                    let cache = EntryFlags::PWT | EntryFlags::PCD | EntryFlags::PAT;
                    self.map_host(mfn, entry.shared.load_head().flags & cache, taken)?;
                }
            }
            // 14
            Some(owner)
                if owner == FrameOwner::Domain(granter.id())
                    || (owner == FrameOwner::CopyOnWrite && access == Access::Read) =>
            {
                if device && access == Access::Write {
                    self.take_type(mfn, taken)?;
                }
                if host && device {
                    hv.get_frame(mfn).ok_or(Failed)?;
                    taken.frames += 1;
                }
                if host {
                    if self.host_type {
                        self.take_type(mfn, taken)?;
                    }
                    self.map_host(mfn, EntryFlags::empty(), taken)?;
                }
            }
            // 15
            _ => return Err(Failed),
        }
        // 16
        if !itself && hv.iommu_follows(caller.private()) {
            iommu::add(*hv, caller, mfn, access).map_err(|_| Failed)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn take_type(&self, mfn: Mfn, taken: &mut Taken) -> Result<(), Failed> {
        if let Some(had) = taken.found.take() {
            return if had { Ok(()) } else { Err(Failed) };
        }
        if !self.hv.get_writable(mfn) {
            return Err(Failed);
        }
        taken.types += 1;
        Ok(())
    }

    #[inline(always)]
    fn map_host(&self, mfn: Mfn, cache: EntryFlags, taken: &mut Taken) -> Result<(), Failed> {
        let mapping = HostMapping {
            addr: self.item.host_addr,
            mfn,
            flags: self.flags,
            cache,
            granter: self.granter.id(),
        };
        self.hv
            .map_host(self.caller.private(), &mapping)
            .map_err(|_| Failed)?;
        taken.host = true;
        Ok(())
    }
}

/// Why a mapping was not made.
enum Unmade {
    Refused(GrantStatus),
    /// A step of 13 to 16 failed, and this is to be given back: *general_error*.
    Undo(Undo),
}

impl From<GrantStatus> for Unmade {
    fn from(status: GrantStatus) -> Unmade {
        Unmade::Refused(status)
    }
}

/// What a mapping had taken by the time that it failed.
struct Undo {
    granter: DomId,
    gref: GrantRef,
    pins: Pins,
    access: Access,
    mfn: Mfn,
    unmapping: Option<HostUnmapping>,
    types: u32,
    frames: u32,
}

/// A step of 13 to 16 failed.
#[derive(Debug)]
struct Failed;

/// Steps 7 to 10: a share in the entry, and the frame. A first use also holds the reference that
/// its look-up took, and tells what the look-up found.
#[inline(always)]
pub(crate) fn pin<H: Hypervisor, R>(
    hv: &H,
    entry: &Entry<'_>,
    user: DomId,
    access: Access,
    wanted: Pins,
    resolve: impl Fn(Gfn) -> Result<(Mfn, R), ResolveError>,
) -> Result<(Mfn, Option<R>), GrantStatus> {
    loop {
        let state = entry.active.load();
        let pinned = state.is_pinned();
        if pinned && (state.grantee() != user || state.is_full_for(wanted) || state.is_partial()) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        if pinned && (access == Access::Read || state.is_write_pinned()) {
            if entry.active.add_pins(state, wanted) {
                return Ok((entry.active.mfn(), None));
            }
            continue;
        }
        let Some(claim) = entry.active.claim(state) else {
            continue;
        };
        begin_use(hv, &entry.shared, pinned, user, access, Wanted::Whole)
            .map_err(|_| GrantStatus::GENERAL_ERROR)?;
        hv.hook(Hook::MapValidated);
        if pinned {
            claim.publish_more(wanted);
            return Ok((entry.active.mfn(), None));
        }
        match resolve(Gfn(entry.shared.load_frame())) {
            Ok((mfn, found)) => {
                claim.publish_first(mfn, State::first(user, UseKind::Whole, wanted));
                return Ok((mfn, Some(found)));
            }
            Err(error) => {
                end_use(&entry.shared, state, access);
                return Err(status_of(error));
            }
        }
    }
}

/// Lowers pins and tells the shared entry if that ends a use (spec 4.3).
#[inline(always)]
pub(crate) fn unpin(entry: &Entry<'_>, pins: Pins, ended: Access) {
    entry.active.drop_pins(
        entry.active.load(),
        pins,
        |left| marks_to_clear(left, ended),
        |marks| clear_marks(&entry.shared, marks),
    );
}
