//! `map_grant_ref` (spec 3.3).
//!
//! The checks, in order: kind of mapping asked for; flags that the caller's kind forbids; granter;
//! policy; a handle; the reference; the entry in use by another; the entry's own word; the frame;
//! the frame's owner; its type; the host mapping; the I/O MMU.

use gnttab_abi::{
    DomId, EntryFlags, Gfn, GrantHandle, GrantRef, GrantStatus, MapFlags, MapGrantRef, Mfn, Op,
};

use crate::active::{Active, Pins, State, UseKind};
use crate::caller::Caller;
use crate::claim::{Wanted, begin_use, clear_marks, end_use, marks_to_clear};
use crate::domain::{Domain, Vcpu};
use crate::engine::Processor;
use crate::hypervisor::{
    Access, FrameOwner, Hook, HostMapping, HostUnmapping, Hypervisor, ResolveError, Resolved,
};
use crate::iommu;
use crate::maptrack::{Free, Record};
use crate::registry::{LEAVE_AFTER, Room, Visit};
use crate::table::{Entry, SharedEntry};

/// The access that flags ask for.
#[inline]
pub(crate) fn access_of(flags: MapFlags) -> Access {
    if flags.contains(MapFlags::READONLY) {
        Access::Read
    } else {
        Access::Write
    }
}

/// The two kinds of mapping that drivers make. They are code of their own, in which what the flags decide is
/// decided.
pub(crate) const WRITABLE: MapFlags = MapFlags::HOST_MAP;
pub(crate) const READABLE: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);

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
        let (mut visit, caller) = (self.visit(&vcpu.domain), vcpu.caller());
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
        let first = if item.flags == WRITABLE {
            self.map_first(caller, item, Access::Write, now)
        } else if item.flags == READABLE {
            self.map_first(caller, item, Access::Read, now)
        } else {
            Err(Rest::All)
        };
        let (status, handle, dev_bus_addr) = match first {
            Ok((handle, mfn)) => (GrantStatus::OKAY, handle, mfn.address()),
            Err(rest) => {
                match self.map_rest(caller, item.host_addr, item.flags, item.gref, item.dom, now, rest) {
                    Ok((handle, mfn)) => (GrantStatus::OKAY, handle, mfn.address()),
                    Err(status) => (status, item.handle, item.dev_bus_addr),
                }
            }
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

    /// All steps of what most mappings are: of a domain's own memory, through an entry that nobody uses.
    #[inline(always)]
    fn map_first(
        &mut self,
        caller: &Caller<'_, H>,
        item: &MapGrantRef,
        access: Access,
        now: u64,
    ) -> Result<(GrantHandle, Mfn), Rest> {
        let hv = &self.engine.hv;
        let (domain, flags) = (caller.domain, item.flags);
        let granter = self.enter_or_stay(item.dom).ok_or(Rest::All)?;
        let free = caller.handles.first().ok_or(Rest::All)?;
        let entry = granter.view.entry(item.gref).ok_or(Rest::All)?;
        if !entry.active.is_unused() {
            return Err(Rest::All);
        }
        // 4
        if !hv.may_map(domain.private(), granter.private(), flags) {
            return Err(Rest::Refused(GrantStatus::PERMISSION_DENIED));
        }
        hv.hook(Hook::HandlePeek);
        // 7 to 9
        let claim = entry.active.claim(State::default()).ok_or(Rest::All)?;
        begin_use(hv, &entry.shared, false, domain.id(), access, Wanted::Whole)
            .map_err(|_| Rest::Refused(GrantStatus::GENERAL_ERROR))?;
        hv.hook(Hook::MapValidated);
        // 10, and of 12 to 14 what comes with the look-up
        let gfn = Gfn(entry.shared.load_frame());
        let typed = granter.takes_type(access);
        let found = if typed {
            hv.resolve_writable(granter.private(), gfn)
        } else {
            hv.resolve(granter.private(), gfn, access)
                .map(|found| (found, false))
        };
        let (Resolved { mfn, owner }, had) = match found {
            Ok(found) => found,
            Err(error) => {
                end_use(&entry.shared, State::default(), access);
                return Err(Rest::Refused(status_of(error)));
            }
        };
        claim.publish_first(
            mfn,
            State::first(domain.id(), UseKind::Whole, Pins::of_mapping(flags)),
        );
        hv.hook(Hook::MapPinned);
        if owner != FrameOwner::Domain(item.dom) || had != typed {
            return Err(Rest::Install(mfn, (owner, typed.then_some(had))));
        }
        // 14
        let mapping = HostMapping {
            addr: item.host_addr,
            mfn,
            flags,
            cache: EntryFlags::empty(),
            granter: item.dom,
        };
        if hv.map_host(domain.private(), &mapping).is_err() {
            return Err(Rest::Undo { mfn, mapped: false });
        }
        // 16
        if item.dom != domain.id()
            && hv.iommu_follows(domain.private())
            && iommu::add(hv, domain, mfn, access).is_err()
        {
            return Err(Rest::Undo { mfn, mapped: true });
        }
        // 17
        hv.hook(Hook::MapPublish);
        caller.handles.take(free);
        Ok((free.publish(record_of(item), now), mfn))
    }

    /// What is left to do of an item. It comes in parts, so that it needs no place in memory otherwise.
    #[inline(never)]
    #[expect(clippy::too_many_arguments, reason = "the parts of an item")]
    fn map_rest(
        &mut self,
        caller: &Caller<'_, H>,
        host_addr: u64,
        flags: MapFlags,
        gref: GrantRef,
        dom: DomId,
        now: u64,
        rest: Rest,
    ) -> Result<(GrantHandle, Mfn), GrantStatus> {
        let item = MapGrantRef {
            host_addr,
            flags,
            gref,
            dom,
            ..MapGrantRef::default()
        };
        let (mfn, found) = match rest {
            Rest::All => {
                self.begin_item();
                return self.map_any(caller, &item, now, false);
            }
            Rest::Refused(status) => return Err(status),
            Rest::Install(mfn, found) => (mfn, Ok(found)),
            Rest::Undo { mfn, mapped } => (mfn, Err(mapped)),
        };
        let engine = self.engine;
        let (hv, domain) = (&engine.hv, caller.domain);
        // The table of before, which was not left, and so the handle of before.
        let (Some(granter), Some(free)) = (self.enter(dom), caller.handles.take_first()) else {
            return Err(GrantStatus::GENERAL_ERROR);
        };
        let mapping = Mapping::new(hv, domain, granter, &item);
        let made = match found {
            Ok(found) => mapping.install_all(mfn, Some(found)),
            Err(mapped) => Err(mapping.unmade(
                mfn,
                &Taken {
                    frames: 1,
                    types: mapping.host_type.into(),
                    found: None,
                    host: mapped,
                },
            )),
        };
        self.end_map(caller, &item, free, made, now)
    }

    /// Steps 1 to 17 one by one.
    fn map_any(
        &mut self,
        caller: &Caller<'_, H>,
        item: &MapGrantRef,
        now: u64,
        gathered: bool,
    ) -> Result<(GrantHandle, Mfn), GrantStatus> {
        let flags = item.flags;
        let hv = &self.engine.hv;
        let domain = caller.domain;
        // 1, 2
        if Pins::of_mapping(flags).is_empty() {
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
            return self.map_with_gathered(caller, item, now, gathered);
        };
        // 6 to 16
        let made = Mapping::new(hv, domain, granter, item).make();
        self.end_map(caller, item, free, made, now)
    }

    /// Step 17, or what a failure gives back.
    fn end_map<'h>(
        &mut self,
        caller: &Caller<'h, H>,
        item: &MapGrantRef,
        free: Free<'h>,
        made: Result<Mfn, Unmade>,
        now: u64,
    ) -> Result<(GrantHandle, Mfn), GrantStatus> {
        match made {
            Ok(mfn) => {
                self.engine.hv.hook(Hook::MapPublish);
                Ok((free.publish(record_of(item), now), mfn))
            }
            Err(unmade) => {
                caller.handles.release(free);
                Err(match unmade {
                    Unmade::Refused(status) => status,
                    Unmade::Undo(undo) => self.undo(caller.domain, undo),
                })
            }
        }
    }

    /// Step 5 once more, with what other vCPUs keep to themselves.
    #[cold]
    fn map_with_gathered(
        &mut self,
        caller: &Caller<'_, H>,
        item: &MapGrantRef,
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

    /// Gives back what was taken; the pins go before the references that they stand for (CPY-6). The status of
    /// such an item.
    #[cold]
    #[inline(never)]
    fn undo(&mut self, caller: &Domain<H>, undo: Undo) -> GrantStatus {
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
            unpin(entry, entry.active.load(), undo.pins, undo.access);
        }
        (0..undo.types).for_each(|_| hv.put_writable(undo.mfn));
        (0..undo.frames).for_each(|_| hv.put_frame(undo.mfn));
        if inside.is_some_and(|granter| granter.is_dying()) {
            self.leave();
            engine.reap(undo.granter);
        }
        GrantStatus::GENERAL_ERROR
    }
}

/// What is left to do of an item that was not mapped in one go.
enum Rest {
    /// All of it.
    All,
    /// Nothing.
    Refused(GrantStatus),
    /// Pinned, with what the look-up of its frame found: steps 11 to 17.
    Install(Mfn, Found),
    /// To undo it: pinned, with the reference and, where a mapping takes it, the type, and mapped or not.
    Undo { mfn: Mfn, mapped: bool },
}

/// The owner of a frame that was referenced, and whether the writable type was had with it; `None`: not asked for.
type Found = (FrameOwner, Option<bool>);

/// The record of an item that was mapped.
#[inline(always)]
fn record_of(item: &MapGrantRef) -> Record {
    Record {
        gref: item.gref,
        granter: item.dom,
        flags: item.flags,
    }
}

/// One item on its way through steps 6 to 16.
struct Mapping<'a, 'r, H: Hypervisor> {
    hv: &'a H,
    caller: &'a Domain<H>,
    granter: &'a Room<'r, H>,
    item: &'a MapGrantRef,
    pins: Pins,
    access: Access,
    /// Whether the host mapping takes the writable type of the granter's page.
    host_type: bool,
    /// Whether any mapping does.
    any_type: bool,
}

impl<'a, 'r, H: Hypervisor> Mapping<'a, 'r, H> {
    fn new(hv: &'a H, caller: &'a Domain<H>, granter: &'a Room<'r, H>, item: &'a MapGrantRef) -> Self {
        let flags = item.flags;
        let access = access_of(flags);
        let host_type = flags.contains(MapFlags::HOST_MAP) && granter.takes_type(access);
        let device_type = flags.contains(MapFlags::DEVICE_MAP) && access == Access::Write;
        Mapping {
            hv,
            caller,
            granter,
            item,
            pins: Pins::of_mapping(flags),
            access,
            host_type,
            any_type: host_type || device_type,
        }
    }

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
        self.install_all(mfn, found)
    }

    /// Steps 11 to 16 for an entry that is pinned; `None`: its frame could not be referenced.
    fn install_all(&self, mfn: Mfn, found: Option<Found>) -> Result<Mfn, Unmade> {
        let (owner, typed) = found.map_or((None, None), |(owner, typed)| (Some(owner), typed));
        let mut taken = Taken {
            frames: u32::from(owner.is_some()),
            types: u32::from(typed == Some(true)),
            found: typed,
            host: false,
        };
        match self.install(mfn, owner, &mut taken) {
            Ok(()) => Ok(mfn),
            Err(Failed) => Err(self.unmade(mfn, &taken)),
        }
    }

    /// What is to be given back of an item that fails.
    fn unmade(&self, mfn: Mfn, taken: &Taken) -> Unmade {
        self.hv.hook(Hook::MapUnwind);
        let unmapping = taken.host.then_some(HostUnmapping {
            addr: self.item.host_addr,
            new_addr: 0,
            mfn,
            flags: self.item.flags,
        });
        Unmade::Undo(Undo {
            granter: self.granter.id(),
            gref: self.item.gref,
            pins: self.pins,
            access: self.access,
            mfn,
            unmapping,
            types: taken.types,
            frames: taken.frames,
        })
    }

    /// Steps 13 to 16: references, types and mappings.
    fn install(&self, mfn: Mfn, owner: Option<FrameOwner>, taken: &mut Taken) -> Result<(), Failed> {
        let Mapping {
            hv, caller, granter, ..
        } = self;
        let flags = self.item.flags;
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
                    let entry = granter.view.shared(self.item.gref).ok_or(Failed)?;
                    let cache = EntryFlags::PWT | EntryFlags::PCD | EntryFlags::PAT;
                    self.map_host(mfn, entry.load_head().flags & cache, taken)?;
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

    fn map_host(&self, mfn: Mfn, cache: EntryFlags, taken: &mut Taken) -> Result<(), Failed> {
        let mapping = HostMapping {
            addr: self.item.host_addr,
            mfn,
            flags: self.item.flags,
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

/// Lowers pins in a state that was `seen`, and tells the shared entry if that ends a use (spec 4.3).
#[inline(always)]
pub(crate) fn unpin(entry: Entry<'_>, seen: State, pins: Pins, ended: Access) {
    // Nearly always it is the only use.
    if seen.is_just(pins)
        && let Some(claim) = entry.active.claim(seen)
    {
        end_use(&entry.shared, State::default(), ended);
        return claim.publish_unused();
    }
    unpin_one_of(entry.active, entry.shared, seen, pins, ended);
}

#[inline(never)]
fn unpin_one_of(active: Active<'_>, shared: SharedEntry<'_>, seen: State, pins: Pins, ended: Access) {
    active.drop_pins(
        seen,
        pins,
        |left| marks_to_clear(left, ended),
        |marks| clear_marks(&shared, marks),
    );
}

#[cfg(feature = "machine")]
#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::machine::{C, G, PageType, Scene};

    /// HND-5: who gathers handles waits for those inside tables, and a mapping that is inside one then keeps to the
    /// handle it saw. Of its granter's page table it may not give back a type that it never had.
    #[test]
    fn a_mapping_that_handles_are_gathered_around_fails_for_its_own_reasons_only() {
        let scene = Scene::pv()
            .limits(C, |limits| limits.maptrack_frames = Some(1))
            .build();
        let read_only = MapFlags::HOST_MAP | MapFlags::READONLY;
        // The caller's handles and the state of the entries are there from here on.
        let mapped = scene.map(scene.place(0), read_only);
        assert_eq!(scene.unmap(scene.place(0), mapped.handle), GrantStatus::OKAY);
        assert!(
            scene
                .domain(G)
                .private()
                .use_as(scene.frame.mfn, PageType::L1Table)
        );

        let (began, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let wait_for = |flag: &AtomicBool| {
            while !flag.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        };
        let parked = scene.machine.hooks().park(Hook::MapPinned);
        let caller = scene.domain(C);
        let status = std::thread::scope(|scope| {
            let mapping = scope.spawn(|| scene.map(scene.place(1), MapFlags::HOST_MAP).status);
            parked.wait();
            scope.spawn(|| {
                caller.maptrack.gather(|| {
                    began.store(true, Ordering::SeqCst);
                    wait_for(&ended);
                });
            });
            wait_for(&began);
            parked.release();
            let status = mapping.join();
            ended.store(true, Ordering::SeqCst);
            status.unwrap()
        });
        assert_eq!(status, GrantStatus::GENERAL_ERROR);
        assert_eq!(scene.audit(), []);
        assert_eq!(scene.map(scene.place(1), read_only).status, GrantStatus::OKAY);
    }
}
