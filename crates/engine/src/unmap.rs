//! `unmap_grant_ref` and `unmap_and_replace` (spec 3.4).
//!
//! Two phases: the first removes the mapping and edits the record, the second, after stale
//! translations are gone, lowers pins and drops references. Statuses are known after the first.
//! The checks, in order: the handle; the granter; policy; the record still the same; the bus
//! address; the host mapping.

use gnttab_abi::{
    DomId, GrantHandle, GrantRef, GrantStatus, MapFlags, Mfn, Op, UnmapAndReplace, UnmapGrantRef,
};

use crate::active::Pins;
use crate::caller::Caller;
use crate::domain::{Domain, Vcpu};
use crate::engine::Processor;
use crate::hypervisor::{Access, Hook, HostUnmapping, Hypervisor};
use crate::iommu;
use crate::map::{READABLE, WRITABLE, access_of, unpin};
use crate::maptrack::Live;
use crate::registry::Visit;

/// Items between two flushes (spec 3.4.1).
pub const UNMAP_GROUP: usize = 32;

/// What both operations ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) host_addr: u64,
    pub(crate) dev_bus_addr: u64,
    pub(crate) new_addr: u64,
    pub(crate) handle: GrantHandle,
}

impl From<&UnmapGrantRef> for Request {
    fn from(item: &UnmapGrantRef) -> Request {
        Request {
            host_addr: item.host_addr,
            dev_bus_addr: item.dev_bus_addr,
            new_addr: 0,
            handle: item.handle,
        }
    }
}

impl From<&UnmapAndReplace> for Request {
    fn from(item: &UnmapAndReplace) -> Request {
        Request {
            host_addr: item.host_addr,
            dev_bus_addr: 0,
            new_addr: item.new_addr,
            handle: item.handle,
        }
    }
}

/// What phase 1 removed and phase 2 has to give back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Removed {
    mfn: Mfn,
    gref: GrantRef,
    granter: DomId,
    /// The kinds that were removed, host, device or both, and whether they were read-only.
    flags: MapFlags,
}

impl Removed {
    const NOTHING: Removed = Removed {
        mfn: Mfn(0),
        gref: GrantRef(0),
        granter: DomId(0),
        flags: MapFlags::empty(),
    };
}

/// What phase 1 removed for a group of `N` items.
pub(crate) struct Group<const N: usize> {
    removed: [Removed; N],
    length: usize,
}

impl<const N: usize> Group<N> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Group {
            removed: [Removed::NOTHING; N],
            length: 0,
        }
    }

    #[inline(always)]
    fn push(&mut self, removed: Removed) {
        if let Some(place) = self.removed.get_mut(self.length) {
            *place = removed;
            self.length += 1;
        }
    }

    #[inline(always)]
    fn iter(&self) -> impl Iterator<Item = &Removed> {
        self.removed.iter().take(self.length)
    }
}

impl<H: Hypervisor> Processor<'_, H> {
    /// Unmaps grants in groups of [`UNMAP_GROUP`]. Every item's `status` is written.
    pub fn unmap(&mut self, vcpu: &Vcpu<H>, items: &mut [UnmapGrantRef]) {
        self.unmap_all(vcpu, Op::UnmapGrantRef, items, |item| &mut item.status);
    }

    /// Unmaps grants and puts the page-table entries of `new_addr` in their place.
    pub fn unmap_and_replace(&mut self, vcpu: &Vcpu<H>, items: &mut [UnmapAndReplace]) {
        self.unmap_all(vcpu, Op::UnmapAndReplace, items, |item| &mut item.status);
    }

    fn unmap_all<T>(
        &mut self,
        vcpu: &Vcpu<H>,
        op: Op,
        items: &mut [T],
        status: impl Fn(&mut T) -> &mut GrantStatus,
    ) where
        for<'i> Request: From<&'i T>,
    {
        let (mut visit, caller) = (self.visit(&vcpu.domain), vcpu.caller());
        for items in items.chunks_mut(UNMAP_GROUP) {
            visit.leave();
            let mut group: Group<UNMAP_GROUP> = Group::new();
            for item in items {
                *status(item) = visit.unmap_first(&caller, op, (&*item).into(), &mut group);
            }
            visit.unmap_second(&caller, &group);
        }
    }

    /// Gives back a live record of a domain that is being torn down (spec 7.2).
    pub(crate) fn forget_mapping(&mut self, vcpu: &Vcpu<H>, handle: GrantHandle) -> bool {
        self.visit(&vcpu.domain).forget_mapping(vcpu, handle)
    }
}

impl<H: Hypervisor> Visit<'_, H> {
    /// Phase 1 of one item (spec 3.4.2), counted. What it removed joins the group.
    #[inline(always)]
    pub(crate) fn unmap_first<const N: usize>(
        &mut self,
        caller: &Caller<'_, H>,
        op: Op,
        request: Request,
        group: &mut Group<N>,
    ) -> GrantStatus {
        let before = group.length;
        let usual = match caller.handles.find(request.handle) {
            Some(live) if live.record.flags == WRITABLE => {
                self.unmap_usual(caller, request, live, Access::Write, group)
            }
            Some(live) if live.record.flags == READABLE => {
                self.unmap_usual(caller, request, live, Access::Read, group)
            }
            _ => None,
        };
        let status = match usual {
            Some(status) => status,
            None => {
                let Request {
                    host_addr,
                    dev_bus_addr,
                    new_addr,
                    handle,
                } = request;
                self.unmap_any(caller, host_addr, dev_bus_addr, new_addr, handle, group)
            }
        };
        let removed = group.iter().nth(before);
        let (peer, gref) = (removed.map(|r| r.granter), removed.map(|r| r.gref));
        caller.answer(&self.engine.hv, op, peer, gref, status);
        status
    }

    /// Steps 3 to 12 for what most mappings are, a host mapping and nothing else, where nobody else is at it. `None`,
    /// and nothing done, where something is otherwise.
    #[inline(always)]
    fn unmap_usual<'h, const N: usize>(
        &mut self,
        caller: &Caller<'h, H>,
        request: Request,
        live: Live<'h>,
        access: Access,
        group: &mut Group<N>,
    ) -> Option<GrantStatus> {
        let hv = &self.engine.hv;
        let domain = caller.domain;
        let record = live.record;
        if request.host_addr == 0 {
            return None;
        }
        // 3, 4
        let granter = self.enter_or_stay(record.granter)?;
        if !hv.may_unmap(domain.private(), granter.private()) {
            return Some(GrantStatus::PERMISSION_DENIED);
        }
        // 5, 6
        let entry = granter.view.entry(record.gref)?;
        let claim = live.claim_at_once()?;
        let mfn = entry.active.mfn();
        // 8
        let unmapping = HostUnmapping {
            addr: request.host_addr,
            new_addr: request.new_addr,
            mfn,
            flags: record.flags,
        };
        if hv.unmap_host(domain.private(), &unmapping).is_err() {
            return Some(GrantStatus::GENERAL_ERROR);
        }
        // 10
        caller.handles.release(claim.end());
        hv.hook(Hook::UnmapPass1);
        // 11
        let follows = record.granter != domain.id() && hv.iommu_follows(domain.private());
        let mut status = GrantStatus::OKAY;
        if follows && iommu::remove(hv, domain, mfn, access).is_err() {
            status = GrantStatus::GENERAL_ERROR;
        }
        // 12
        if access == Access::Write && status.is_okay() {
            hv.mark_dirty(granter.private(), mfn);
        }
        group.push(Removed {
            mfn,
            gref: record.gref,
            granter: record.granter,
            flags: record.flags,
        });
        Some(status)
    }

    /// Steps 1 to 12 one by one. The request comes in parts, so that it needs no place in memory otherwise.
    #[inline(never)]
    fn unmap_any<const N: usize>(
        &mut self,
        caller: &Caller<'_, H>,
        host_addr: u64,
        dev_bus_addr: u64,
        new_addr: u64,
        handle: GrantHandle,
        group: &mut Group<N>,
    ) -> GrantStatus {
        self.begin_item();
        // 1, 2
        let Some(live) = caller.handles.find(handle) else {
            return GrantStatus::BAD_HANDLE;
        };
        let engine = self.engine;
        let hv = &engine.hv;
        let domain = caller.domain;
        let record = live.record;
        let flags = record.flags;
        // 3, 4
        let Some(granter) = self.enter(record.granter) else {
            hv.crash(domain.private(), "a mapping outlived its granter");
            return GrantStatus::GENERAL_ERROR;
        };
        if !hv.may_unmap(domain.private(), granter.private()) {
            return GrantStatus::PERMISSION_DENIED;
        }
        // 5
        let Some(entry) = granter.view.entry(record.gref) else {
            return GrantStatus::BAD_HANDLE;
        };
        // 6: from here on this record, and so the entry's frame, is this call's
        let Some(mut claim) = live.claim() else {
            return GrantStatus::BAD_HANDLE;
        };
        let mfn = entry.active.mfn();
        let has = |kind| flags.contains(kind);
        // 7
        let bus = dev_bus_addr;
        if bus != 0 && has(MapFlags::DEVICE_MAP) && bus != mfn.address() {
            return GrantStatus::BAD_DEV_ADDR;
        }
        // 8
        let mut kinds = MapFlags::empty();
        if host_addr != 0 && has(MapFlags::HOST_MAP) {
            let unmapping = HostUnmapping {
                addr: host_addr,
                new_addr,
                mfn,
                flags,
            };
            if hv.unmap_host(domain.private(), &unmapping).is_err() {
                return GrantStatus::GENERAL_ERROR;
            }
            claim.remove(MapFlags::HOST_MAP);
            kinds |= MapFlags::HOST_MAP;
        }
        // 9
        if bus != 0 && has(MapFlags::DEVICE_MAP) {
            claim.remove(MapFlags::DEVICE_MAP);
            kinds |= MapFlags::DEVICE_MAP;
        }
        // 10
        let free = claim.finish();
        if let Some(free) = free {
            caller.handles.release(free);
        }
        hv.hook(Hook::UnmapPass1);
        // 11
        let access = access_of(flags);
        let mut status = GrantStatus::OKAY;
        let follows = free.is_some() && granter.id() != domain.id() && hv.iommu_follows(domain.private());
        if follows && iommu::remove(hv, domain, mfn, access).is_err() {
            status = GrantStatus::GENERAL_ERROR;
        }
        // 12
        if access == Access::Write && status.is_okay() {
            hv.mark_dirty(granter.private(), mfn);
        }
        if !kinds.is_empty() {
            group.push(Removed {
                mfn,
                gref: record.gref,
                granter: record.granter,
                flags: kinds | flags & MapFlags::READONLY,
            });
        }
        status
    }

    /// The flush, then phase 2 for a group (spec 3.4.1, 3.4.3).
    #[inline(always)]
    pub(crate) fn unmap_second<const N: usize>(&mut self, caller: &Caller<'_, H>, group: &Group<N>) {
        let domain = caller.domain;
        if group.length == 0 {
            return;
        }
        self.flush(domain);
        self.engine.hv.hook(Hook::UnmapFlushed);
        for removed in group.iter() {
            if removed.flags == WRITABLE {
                self.give_back(removed, WRITABLE, WRITABLE);
            } else if removed.flags == READABLE {
                self.give_back(removed, READABLE, READABLE);
            } else {
                self.give_any_back(*removed, removed.flags);
            }
        }
    }

    /// Flushes what may be left of mappings that were taken from a grantee; `unmap_host` has flushed an external
    /// one.
    #[inline(always)]
    pub(crate) fn flush(&mut self, grantee: &Domain<H>) {
        let hv = &self.engine.hv;
        // A flush that waits for other processors may take long: whoever wants a table alone need not.
        if hv.flush_waits(grantee.private()) {
            self.leave();
        }
        if !grantee.kind().is_external() {
            hv.flush(grantee.private());
        }
    }

    /// As [`Visit::give_back`], whatever the flags.
    #[inline(never)]
    fn give_any_back(&mut self, removed: Removed, referenced: MapFlags) {
        self.give_back(&removed, removed.flags, referenced);
    }

    /// Lowers the pins of what was removed, with these flags, then drops types and references for the kinds in
    /// `referenced`.
    #[inline(always)]
    fn give_back(&mut self, removed: &Removed, flags: MapFlags, referenced: MapFlags) {
        let engine = self.engine;
        let hv = &engine.hv;
        let Removed {
            mfn, gref, granter, ..
        } = *removed;
        let access = access_of(flags);
        let inside = self.enter_or_stay(granter);
        let mut host_type = false;
        if let Some(granter) = inside {
            if let Some(entry) = granter.view.entry(gref) {
                unpin(entry, entry.active.load(), Pins::of_mapping(flags), access);
            }
            host_type = granter.takes_type(access);
        }
        // Still inside: once it is left, a dying granter can go, and nothing of it may be held then.
        if referenced.contains(MapFlags::DEVICE_MAP) {
            put(hv, mfn, access == Access::Write);
        }
        if referenced.contains(MapFlags::HOST_MAP) {
            put(hv, mfn, host_type);
        }
        if inside.is_some_and(|granter| granter.is_dying()) {
            self.leave();
            engine.reap(granter);
        }
    }

    /// Gives back a live record of a domain that is being torn down (spec 7.2). References of a
    /// PV domain's host mappings go with its page tables, not here.
    fn forget_mapping(&mut self, vcpu: &Vcpu<H>, handle: GrantHandle) -> bool {
        let engine = self.engine;
        let hv = &engine.hv;
        let caller = &*vcpu.domain;
        let Some(live) = vcpu.caller().handles.find(handle) else {
            return false;
        };
        let record = live.record;
        let Some(mut claim) = live.claim() else {
            return false;
        };
        let both = MapFlags::HOST_MAP | MapFlags::DEVICE_MAP;
        let kinds = record.flags & both;
        claim.remove(both);
        let free = claim.finish();
        let access = access_of(record.flags);
        let mfn = match self.enter(record.granter) {
            Some(granter) => granter.view.entry(record.gref).map(|entry| entry.active.mfn()),
            None => None,
        };
        if let Some(mfn) = mfn {
            if record.granter != caller.id() && hv.iommu_follows(caller.private()) {
                // The domain is gone; its I/O MMU tables go with it.
                let _ = iommu::remove(hv, caller, mfn, access);
            }
            let referenced = if caller.kind().is_external() {
                kinds
            } else {
                kinds & MapFlags::DEVICE_MAP
            };
            let removed = Removed {
                mfn,
                gref: record.gref,
                granter: record.granter,
                flags: kinds | record.flags & MapFlags::READONLY,
            };
            self.give_any_back(removed, referenced);
        }
        if let Some(free) = free {
            caller.maptrack.release_common(free.handle);
        }
        true
    }
}

/// Drops a reference, and the writable type with it where it was taken.
#[inline]
pub(crate) fn put<H: Hypervisor>(hv: &H, mfn: Mfn, typed: bool) {
    if typed {
        hv.put_writable_frame(mfn);
    } else {
        hv.put_frame(mfn);
    }
}
