//! `setup_table`, `query_size` and `get_status_frames` (spec 3.5, 3.6, 3.10), and the memory
//! operations that place a table's frames (spec 6).

use alloc::sync::Arc;

use gnttab_abi::{ADD_TO_PHYSMAP_STATUS_BIT, DomId, Errno, Gfn, GrantStatus, Mfn, Op};

use crate::domain::{Domain, Vcpu, Version};
use crate::engine::Processor;
use crate::hypervisor::{DomainKind, Hook, Hypervisor};
use crate::pages::status_pages_for;

/// Sizes of a table, as query_size reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSize {
    /// Frames that it has.
    pub frames: u32,
    /// Frames that it may have.
    pub max_frames: u32,
}

/// Which frames of a table a toolstack asks for (spec 6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableResource {
    /// Grant frames.
    Shared,
    /// Status frames.
    Status,
}

impl<H: Hypervisor> Processor<'_, H> {
    /// The domain that `dom` names for a caller, itself included (spec 1.1, *lookup_any*).
    fn lookup_any(&mut self, caller: &Arc<Domain<H>>, dom: DomId) -> Option<Arc<Domain<H>>> {
        if dom == DomId::SELF || dom == caller.id() {
            return Some(Arc::clone(caller));
        }
        self.hold(dom)
    }

    /// Enlarges a table to at least `nr_frames` frames and reports that many frame numbers, one
    /// after the other, to `store`. A `store` that says false (the guest's list faulted) ends the
    /// report, or with [`Reference::V4_17`](crate::Reference) only spoils the status.
    ///
    /// `capacity` is the most frames that the calling ABI can name: [`COMPAT_SETUP_TABLE_FRAMES`](gnttab_abi::COMPAT_SETUP_TABLE_FRAMES) for
    /// 32-bit callers.
    pub fn setup_table(
        &mut self,
        vcpu: &Vcpu<H>,
        dom: DomId,
        nr_frames: u32,
        capacity: Option<usize>,
        store: &mut dyn FnMut(u32, Gfn) -> bool,
    ) -> GrantStatus {
        let done = self.setup_table_one(vcpu, dom, nr_frames, capacity, store);
        let status = done.err().unwrap_or(GrantStatus::OKAY);
        vcpu.caller()
            .answer(&self.engine.hv, Op::SetupTable, Some(dom), None, status);
        status
    }

    fn setup_table_one(
        &mut self,
        vcpu: &Vcpu<H>,
        dom: DomId,
        nr_frames: u32,
        capacity: Option<usize>,
        store: &mut dyn FnMut(u32, Gfn) -> bool,
    ) -> Result<(), GrantStatus> {
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        // 4, 5
        let target = self.lookup_any(caller, dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        let itself = target.id() == caller.id();
        if !itself && !hv.may_setup(caller.private(), target.private()) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        // 6, 7
        if nr_frames > target.max_grant_frames() || capacity.is_some_and(|most| nr_frames as usize > most) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        // 8
        let _admin = target.table.admin.lock();
        if nr_frames > target.table.nr_frames() {
            let grown = target.table.grow(hv, target.private(), nr_frames);
            grown.map_err(|_| GrantStatus::GENERAL_ERROR)?;
        }
        // 9
        let page = |index| target.table.shared_page(index);
        self.report(&target, nr_frames, page, store)
    }

    /// Reports where a domain sees pages of its table (step 9 of setup_table, 7 of
    /// get_status_frames).
    fn report<'p>(
        &self,
        target: &'p Domain<H>,
        count: u32,
        page: impl Fn(u32) -> Option<&'p H::TablePage>,
        store: &mut dyn FnMut(u32, Gfn) -> bool,
    ) -> Result<(), GrantStatus> {
        let engine = self.engine;
        let mut stored = Ok(());
        for index in 0..count {
            let Some(page) = page(index) else {
                return Err(GrantStatus::GENERAL_ERROR);
            };
            let gfn = engine.hv.table_page_gfn(target.private(), page);
            if !store(index, gfn) {
                stored = Err(GrantStatus::BAD_VIRT_ADDR);
                if engine.config.reference != crate::Reference::V4_17 {
                    break;
                }
            }
        }
        stored
    }

    /// The sizes of a table.
    ///
    /// # Errors
    /// `BAD_DOMAIN` or `PERMISSION_DENIED`.
    pub fn query_size(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<TableSize, GrantStatus> {
        let result = self.query_size_one(vcpu, dom);
        let status = result.err().unwrap_or(GrantStatus::OKAY);
        vcpu.caller()
            .answer(&self.engine.hv, Op::QuerySize, Some(dom), None, status);
        result
    }

    fn query_size_one(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<TableSize, GrantStatus> {
        let hv = &self.engine.hv;
        let caller = &*vcpu.domain;
        let size = |domain: &Domain<H>| TableSize {
            frames: domain.table.nr_frames(),
            max_frames: domain.max_grant_frames(),
        };
        if dom == DomId::SELF || dom == caller.id() {
            return Ok(size(caller));
        }
        let target = self.enter(dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !hv.may_query(caller.private(), target.private()) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        Ok(size(&target))
    }

    /// Reports the frame numbers of a version 2 table's first `nr_frames` status frames to
    /// `store`, as [`Processor::setup_table`] does. The table is never enlarged.
    pub fn get_status_frames(
        &mut self,
        vcpu: &Vcpu<H>,
        dom: DomId,
        nr_frames: u32,
        capacity: Option<usize>,
        store: &mut dyn FnMut(u32, Gfn) -> bool,
    ) -> GrantStatus {
        let done = self.get_status_frames_one(vcpu, dom, nr_frames, capacity, store);
        let status = done.err().unwrap_or(GrantStatus::OKAY);
        vcpu.caller()
            .answer(&self.engine.hv, Op::GetStatusFrames, Some(dom), None, status);
        status
    }

    fn get_status_frames_one(
        &mut self,
        vcpu: &Vcpu<H>,
        dom: DomId,
        nr_frames: u32,
        capacity: Option<usize>,
        store: &mut dyn FnMut(u32, Gfn) -> bool,
    ) -> Result<(), GrantStatus> {
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        // 4, 5
        let target = self.lookup_any(caller, dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if target.id() != caller.id() && !hv.may_setup(caller.private(), target.private()) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        // 6
        let _admin = target.table.admin.lock();
        if nr_frames > target.table.nr_status() || capacity.is_some_and(|most| nr_frames as usize > most) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        // 7
        let page = |index| target.table.status_page(index);
        self.report(&target, nr_frames, page, store)
    }

    /// `XENMEM_add_to_physmap` for the grant table (spec 6.2): makes frame `idx` of `dom`'s table
    /// exist and puts it at `gfn` of that domain.
    ///
    /// # Errors
    /// The errno of the memory operation; a table that grew stays grown.
    pub fn place_frame(&mut self, vcpu: &Vcpu<H>, dom: DomId, idx: u64, gfn: Gfn) -> Result<(), Errno> {
        let hv = &self.engine.hv;
        // 2 to 5
        let target = self.may_place(vcpu, dom)?;
        if gfn == Gfn::INVALID {
            return Err(Errno::Inval);
        }
        // 6
        let _admin = target.table.admin.lock();
        let [a, b, c, d, ..] = idx.to_le_bytes();
        let index = u32::from_le_bytes([a, b, c, d]);
        let page = if target.table.version() == Version::V2 && idx & ADD_TO_PHYSMAP_STATUS_BIT != 0 {
            self.exist(&target, TableResource::Status, index & !STATUS_BIT)?
        } else {
            self.exist(&target, TableResource::Shared, index)?
        };
        // 7
        if target.is_dying() {
            return Err(Errno::Busy);
        }
        hv.hook(Hook::PlaceFrame);
        // 8
        hv.place_table_page(target.private(), page, gfn)
    }

    /// The domain whose table frames the caller may place (spec 6.2 steps 2 to 4).
    pub(crate) fn may_place(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<Arc<Domain<H>>, Errno> {
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        let target = self.lookup_any(caller, dom).ok_or(Errno::Srch)?;
        if !target.kind().is_translated() {
            return Err(Errno::Acces);
        }
        if target.id() != caller.id() && !hv.may_setup(caller.private(), target.private()) {
            return Err(Errno::Perm);
        }
        Ok(target)
    }

    /// Makes one frame of a table exist (spec 6.3). The target's `admin` is held.
    fn exist<'d>(
        &self,
        target: &'d Domain<H>,
        resource: TableResource,
        index: u32,
    ) -> Result<&'d H::TablePage, Errno> {
        let table = &target.table;
        let needed = match resource {
            TableResource::Shared => index.checked_add(1),
            TableResource::Status if table.version() == Version::V1 => None,
            TableResource::Status if index < table.nr_status() => Some(table.nr_frames()),
            TableResource::Status => index.checked_add(1).and_then(|n| n.checked_mul(8)),
        };
        let needed = needed
            .filter(|n| *n <= target.max_grant_frames())
            .ok_or(Errno::Inval)?;
        if needed > table.nr_frames() {
            table
                .grow(&self.engine.hv, target.private(), needed)
                .map_err(|_| Errno::Inval)?;
        }
        let page = match resource {
            TableResource::Shared => table.shared_page(index),
            TableResource::Status => table.status_page(index),
        };
        page.ok_or(Errno::Inval)
    }

    /// How many frames of a kind `XENMEM_acquire_resource` can give (spec 6.1 steps 5 to 8).
    ///
    /// # Errors
    /// The errno of the memory operation.
    pub fn resource_size(
        &mut self,
        vcpu: &Vcpu<H>,
        dom: DomId,
        resource: TableResource,
    ) -> Result<u32, Errno> {
        let target = self.resource_target(vcpu, dom)?;
        match resource {
            TableResource::Shared => Ok(target.max_grant_frames()),
            TableResource::Status if target.kind() == DomainKind::Arm => Err(Errno::Inval),
            TableResource::Status => Ok(status_pages_for(target.max_grant_frames())),
        }
    }

    fn resource_target(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<Arc<Domain<H>>, Errno> {
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        let target = self.hold(dom).ok_or(Errno::Srch)?;
        if target.id() == caller.id() || !hv.may_setup(caller.private(), target.private()) {
            return Err(Errno::Perm);
        }
        Ok(target)
    }

    /// The machine frames of part of a table, for a toolstack to map (spec 6.1 step 10). They are
    /// made to exist and given to `store` one after the other.
    ///
    /// # Errors
    /// The errno of the memory operation, or whatever `store` says; frames that exist stay.
    pub fn acquire_frames(
        &mut self,
        vcpu: &Vcpu<H>,
        dom: DomId,
        resource: TableResource,
        first: u32,
        count: u32,
        store: &mut dyn FnMut(u32, Mfn) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let size = self.resource_size(vcpu, dom, resource)?;
        let target = self.resource_target(vcpu, dom)?;
        if count == 0 || count > 0x3FF_FFFF || size == 0 {
            return Err(Errno::Inval);
        }
        let last = first.checked_add(count - 1).ok_or(Errno::Inval)?;
        let _admin = target.table.admin.lock();
        self.exist(&target, resource, last)?;
        for index in first..=last {
            let page = self.exist(&target, resource, index)?;
            store(index - first, self.engine.hv.table_page_mfn(page))?;
        }
        Ok(())
    }
}

/// The status bit as it lies in the low half of the index.
const STATUS_BIT: u32 = 0x8000_0000;
