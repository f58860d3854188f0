//! The engine over a hypervisor written in C.

use std::ffi::c_void;
use std::ptr::NonNull;

use gnttab_abi::{
    Copy, CopyFlags, CopyPtr, DomId, Errno, Gfn, GrantHandle, GrantRef, GrantStatus, MapFlags, MapGrantRef,
    Mfn, UnmapGrantRef,
};
use gnttab_engine::{
    Access, Config, DomainKind, Engine, FrameOwner, HostError, HostMapping, HostUnmapping, Hypervisor,
    Limits, PageWords, Processor, Release, ResolveError, Resolved, Retired, Vcpu,
};

use crate::{answer, heard};

/// What a hypervisor does for the engine. Every function gets `ctx` first; domains go by their numbers.
///
/// A reference taken on a frame keeps its memory alive until it is put, whatever its owner does.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HypervisorOps {
    /// Whatever the functions need.
    pub ctx: *mut c_void,
    /// The frame behind a guest frame number of a domain, with one reference taken: 0, -EINVAL (not a page that it may
    /// grant) or -EAGAIN.
    pub resolve:
        unsafe extern "C" fn(ctx: *mut c_void, domain: u16, gfn: u64, write: bool, mfn: *mut u64) -> i32,
    /// One more reference on a frame, and whose it is: 0, or negative if it is on its way out.
    pub get_frame: unsafe extern "C" fn(ctx: *mut c_void, mfn: u64, owner: *mut u16) -> i32,
    /// One reference less.
    pub put_frame: unsafe extern "C" fn(ctx: *mut c_void, mfn: u64),
    /// Takes the right to write to a frame; false if it is in use as something else.
    pub get_writable: unsafe extern "C" fn(ctx: *mut c_void, mfn: u64) -> bool,
    /// Gives that right back.
    pub put_writable: unsafe extern "C" fn(ctx: *mut c_void, mfn: u64),
    /// Copies bytes from one frame to another.
    pub copy: unsafe extern "C" fn(
        ctx: *mut c_void,
        source: u64,
        source_offset: u16,
        dest: u64,
        dest_offset: u16,
        len: u16,
    ),
    /// Makes a mapping for processors of a domain: all of it, or nothing and negative.
    pub map_host:
        unsafe extern "C" fn(ctx: *mut c_void, domain: u16, addr: u64, mfn: u64, readonly: bool) -> i32,
    /// Removes it: all of it, or nothing and negative if that frame is not mapped there.
    pub unmap_host: unsafe extern "C" fn(ctx: *mut c_void, domain: u16, addr: u64, mfn: u64) -> i32,
    /// Makes sure that no processor of a domain still uses a translation that was removed.
    pub flush: unsafe extern "C" fn(ctx: *mut c_void, domain: u16),
    /// A zeroed page for a domain's table, aligned to 4096 bytes; NULL: no memory.
    pub alloc_table_page: unsafe extern "C" fn(ctx: *mut c_void, domain: u16) -> *mut c_void,
    /// Takes such a page back.
    pub free_table_page: unsafe extern "C" fn(ctx: *mut c_void, page: *mut c_void),
    /// Shows a page of its table to a domain at a guest frame number: 0 or negative.
    pub place_table_page:
        unsafe extern "C" fn(ctx: *mut c_void, domain: u16, page: *mut c_void, gfn: u64) -> i32,
}

/// A mapping request: the public interface's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MapItem {
    /// Where.
    pub host_addr: u64,
    /// `GNTMAP_*`.
    pub flags: u32,
    /// The reference.
    pub gref: u32,
    /// The granter.
    pub dom: u16,
    /// Out: `GNTST_*`.
    pub status: i16,
    /// Out: the handle.
    pub handle: u32,
    /// Out: the frame's address.
    pub dev_bus_addr: u64,
}

/// An unmapping request: the public interface's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UnmapItem {
    /// Where.
    pub host_addr: u64,
    /// The frame's address for device mappings; 0.
    pub dev_bus_addr: u64,
    /// The handle.
    pub handle: u32,
    /// Out: `GNTST_*`.
    pub status: i16,
}

/// One side of a copy: the public interface's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CopySide {
    /// The reference, or a frame of the caller's.
    pub u: u64,
    /// Whose table, or `DOMID_SELF`.
    pub domid: u16,
    /// First byte.
    pub offset: u16,
}

/// A copy: the public interface's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CopyItem {
    /// From where.
    pub source: CopySide,
    /// To where.
    pub dest: CopySide,
    /// Bytes.
    pub len: u16,
    /// `GNTCOPY_*`.
    pub flags: u16,
    /// Out: `GNTST_*`.
    pub status: i16,
}

/// The size of a table: the public interface's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct QueryItem {
    /// Whose.
    pub dom: u16,
    /// Out: frames that there are.
    pub nr_frames: u32,
    /// Out: frames that there may be.
    pub max_nr_frames: u32,
    /// Out: `GNTST_*`.
    pub status: i16,
}

/// The hypervisor behind the callbacks.
#[derive(Clone, Copy)]
struct CHypervisor(HypervisorOps);

// SAFETY: rule 2 of the crate: callbacks are called from every thread that calls in.
unsafe impl Send for CHypervisor {}
// SAFETY: as above.
unsafe impl Sync for CHypervisor {}

/// A page of a table, in memory of the hypervisor's.
struct TablePage {
    page: NonNull<PageWords>,
    hypervisor: CHypervisor,
}

// SAFETY: the page is shared with a guest anyway and touched by atomics alone; its callbacks are rule 2's.
unsafe impl Send for TablePage {}
// SAFETY: as above.
unsafe impl Sync for TablePage {}

impl AsRef<PageWords> for TablePage {
    fn as_ref(&self) -> &PageWords {
        // SAFETY: rule 4: alloc_table_page gave a page of 4096 aligned bytes, which is there until drop gives it back.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for TablePage {
    fn drop(&mut self) {
        let HypervisorOps {
            ctx, free_table_page, ..
        } = self.hypervisor.0;
        // SAFETY: rule 4; the page came from alloc_table_page and goes back once.
        unsafe { free_table_page(ctx, self.page.as_ptr().cast()) }
    }
}

/// Calls a callback.
macro_rules! call {
    ($self:ident.$name:ident($($argument:expr),* $(,)?)) => {{
        let ops = &$self.0;
        // SAFETY: rule 4 of the crate; the arguments are plain numbers, or pointers to locals.
        unsafe { (ops.$name)(ops.ctx, $($argument),*) }
    }};
}

impl Hypervisor for CHypervisor {
    type Domain = DomId;
    type TablePage = TablePage;

    fn resolve(&self, domain: &DomId, gfn: Gfn, access: Access) -> Result<Resolved, ResolveError> {
        let mut mfn = 0;
        match heard(call!(self.resolve(
            domain.0,
            gfn.0,
            access == Access::Write,
            &raw mut mfn
        ))) {
            Ok(()) => Ok(Resolved {
                mfn: Mfn(mfn),
                owner: FrameOwner::Domain(*domain),
            }),
            Err(Errno::Again) => Err(ResolveError::Again),
            Err(_) => Err(ResolveError::BadPage),
        }
    }

    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        let mut owner = 0;
        let taken = heard(call!(self.get_frame(mfn.0, &raw mut owner)));
        taken.ok().map(|()| FrameOwner::Domain(DomId(owner)))
    }

    fn put_frame(&self, mfn: Mfn) {
        call!(self.put_frame(mfn.0));
    }

    fn get_writable(&self, mfn: Mfn) -> bool {
        call!(self.get_writable(mfn.0))
    }

    fn put_writable(&self, mfn: Mfn) {
        call!(self.put_writable(mfn.0));
    }

    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16) {
        call!(self.copy(source.0.0, source.1, dest.0.0, dest.1, len));
    }

    fn map_host(&self, grantee: &DomId, mapping: &HostMapping) -> Result<(), HostError> {
        let readonly = mapping.flags.contains(MapFlags::READONLY);
        heard(call!(self.map_host(
            grantee.0,
            mapping.addr,
            mapping.mfn.0,
            readonly
        )))
        .map_err(|_| HostError)
    }

    fn unmap_host(&self, grantee: &DomId, unmapping: &HostUnmapping) -> Result<(), HostError> {
        if unmapping.new_addr != 0 {
            return Err(HostError);
        }
        heard(call!(self.unmap_host(grantee.0, unmapping.addr, unmapping.mfn.0))).map_err(|_| HostError)
    }

    fn flush(&self, grantee: &DomId) {
        call!(self.flush(grantee.0));
    }

    fn crash(&self, _domain: &DomId, _why: &'static str) {
        // Only what PV guests and a change of version can provoke; such guests are not to be had from here.
    }

    fn alloc_table_page(&self, domain: &DomId) -> Option<TablePage> {
        let page = NonNull::new(call!(self.alloc_table_page(domain.0)))?;
        Some(TablePage {
            page: page.cast(),
            hypervisor: *self,
        })
    }

    fn table_page_mfn(&self, page: &TablePage) -> Mfn {
        Mfn(page.page.as_ptr().addr() as u64 >> 12)
    }

    fn table_page_gfn(&self, _domain: &DomId, _page: &TablePage) -> Gfn {
        // Where a guest sees its table is said by whoever placed it.
        Gfn::INVALID
    }

    fn place_table_page(&self, domain: &DomId, page: &TablePage, gfn: Gfn) -> Result<(), Errno> {
        heard(call!(self.place_table_page(
            domain.0,
            page.page.as_ptr().cast(),
            gfn.0
        )))
    }
}

/// An engine; opaque to C.
pub struct EngineHandle(Engine<CHypervisor>);

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").finish_non_exhaustive()
    }
}

impl EngineHandle {
    fn act<T>(
        &self,
        caller: u16,
        act: impl FnOnce(&mut Processor<'_, CHypervisor>, &Vcpu<CHypervisor>) -> T,
    ) -> Result<T, Errno> {
        let domain = self.0.domain(DomId(caller)).ok_or(Errno::Srch)?;
        let vcpu = Vcpu::take(&domain, 0).ok_or(Errno::Busy)?;
        let mut processor = self.0.any_processor().ok_or(Errno::Busy)?;
        Ok(act(&mut processor, &vcpu))
    }
}

/// An engine over a hypervisor, for as many threads at a time as `processors` says; NULL if that is 0.
///
/// # Safety
/// `ops` points to callbacks that keep the rules of the crate; they are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_engine_new(ops: *const HypervisorOps, processors: u32) -> *mut EngineHandle {
    // SAFETY: the caller's promise.
    let Some(ops) = (unsafe { ops.as_ref() }) else {
        return std::ptr::null_mut();
    };
    let Some(processors) = usize::try_from(processors).ok().filter(|count| *count > 0) else {
        return std::ptr::null_mut();
    };
    let config = Config {
        processors,
        ..Config::default()
    };
    Box::into_raw(Box::new(EngineHandle(Engine::new(CHypervisor(*ops), config))))
}

/// Ends an engine. Domains that are left lose their tables; destroy them first.
///
/// # Safety
/// Rule 1 of the crate; `engine` is used no more. NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_engine_free(engine: *mut EngineHandle) {
    if !engine.is_null() {
        // SAFETY: rule 1: it came from Box::into_raw, and goes once.
        drop(unsafe { Box::from_raw(engine) });
    }
}

/// Makes an auto-translated domain (HVM or PVH): 0, -EBUSY if there is one of that number, -EINVAL for limits out of
/// range, -ENOMEM. Limits of 0 are the defaults.
///
/// # Safety
/// Rule 1 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_domain_create(
    engine: *const EngineHandle,
    domain: u16,
    grant_frames: u32,
    maptrack_frames: u32,
) -> i32 {
    // SAFETY: rule 1.
    let Some(engine) = (unsafe { engine.as_ref() }) else {
        return answer(Err(Errno::Inval));
    };
    let limits = Limits {
        grant_frames: Some(grant_frames).filter(|frames| *frames > 0),
        maptrack_frames: Some(maptrack_frames).filter(|frames| *frames > 0),
        ..Limits::default()
    };
    let id = DomId(domain);
    let created = engine.0.create_domain(id, DomainKind::Hvm, limits, id);
    answer(created.map(drop).map_err(|error| match error {
        gnttab_engine::CreateError::Exists(_) => Errno::Busy,
        gnttab_engine::CreateError::NoMemory => Errno::NoMem,
        _ => Errno::Inval,
    }))
}

/// Ends a domain: its mappings are released. 0: gone; -EBUSY: others still use pages of it, call again when they have
/// let go; -ESRCH: there is none.
///
/// # Safety
/// Rule 1 of the crate; no call of that domain is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_domain_destroy(engine: *const EngineHandle, domain: u16) -> i32 {
    // SAFETY: rule 1.
    let Some(engine) = (unsafe { engine.as_ref() }) else {
        return answer(Err(Errno::Inval));
    };
    let end = || {
        let held = engine.0.domain(DomId(domain)).ok_or(Errno::Srch)?;
        engine.0.begin_teardown(&held);
        let vcpus = [Vcpu::take(&held, 0).ok_or(Errno::Busy)?];
        let mut processor = engine.0.any_processor().ok_or(Errno::Busy)?;
        while let Release::More { .. } = processor.release_mappings(&vcpus, 256) {}
        drop((processor, vcpus, held));
        match engine.0.retire(DomId(domain)) {
            Retired::Held => Err(Errno::Busy),
            _ => Ok(()),
        }
    };
    answer(end())
}

/// Gives items to `act` as a slice; -EINVAL for no engine or no items where there should be some.
///
/// # Safety
/// Rules 1 and 3 of the crate.
unsafe fn each<T>(
    engine: *const EngineHandle,
    caller: u16,
    items: *mut T,
    count: u32,
    act: impl Fn(&mut Processor<'_, CHypervisor>, &Vcpu<CHypervisor>, &mut T),
) -> i32 {
    // SAFETY: rule 1.
    let engine = unsafe { engine.as_ref() };
    let (Some(engine), Ok(count)) = (engine, usize::try_from(count)) else {
        return answer(Err(Errno::Inval));
    };
    if items.is_null() {
        return answer(if count == 0 { Ok(()) } else { Err(Errno::Fault) });
    }
    // SAFETY: rule 3.
    let items = unsafe { std::slice::from_raw_parts_mut(items, count) };
    answer(engine.act(caller, |processor, vcpu| {
        items.iter_mut().for_each(|item| act(processor, vcpu, item));
    }))
}

/// Maps grants for a domain; each item has its status.
///
/// # Safety
/// Rules 1 and 3 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_map(
    engine: *const EngineHandle,
    caller: u16,
    items: *mut MapItem,
    count: u32,
) -> i32 {
    let act = |processor: &mut Processor<'_, CHypervisor>, vcpu: &Vcpu<CHypervisor>, item: &mut MapItem| {
        let mut one = [MapGrantRef {
            host_addr: item.host_addr,
            flags: MapFlags::from_bits_retain(item.flags),
            gref: GrantRef(item.gref),
            dom: DomId(item.dom),
            status: GrantStatus::OKAY,
            handle: GrantHandle(item.handle),
            dev_bus_addr: item.dev_bus_addr,
        }];
        processor.map(vcpu, &mut one);
        let [one] = one;
        (item.status, item.handle, item.dev_bus_addr) = (one.status.0, one.handle.0, one.dev_bus_addr);
    };
    // SAFETY: this function's own.
    unsafe { each(engine, caller, items, count, act) }
}

/// Unmaps; each item has its status.
///
/// # Safety
/// Rules 1 and 3 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_unmap(
    engine: *const EngineHandle,
    caller: u16,
    items: *mut UnmapItem,
    count: u32,
) -> i32 {
    let act = |processor: &mut Processor<'_, CHypervisor>, vcpu: &Vcpu<CHypervisor>, item: &mut UnmapItem| {
        let mut one = [UnmapGrantRef {
            host_addr: item.host_addr,
            dev_bus_addr: item.dev_bus_addr,
            handle: GrantHandle(item.handle),
            ..UnmapGrantRef::default()
        }];
        processor.unmap(vcpu, &mut one);
        item.status = one[0].status.0;
    };
    // SAFETY: this function's own.
    unsafe { each(engine, caller, items, count, act) }
}

/// Copies through grants; each item has its status.
///
/// # Safety
/// Rules 1 and 3 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_copy(
    engine: *const EngineHandle,
    caller: u16,
    items: *mut CopyItem,
    count: u32,
) -> i32 {
    let side = |side: CopySide| CopyPtr {
        u: side.u,
        domid: DomId(side.domid),
        offset: side.offset,
    };
    let act = |processor: &mut Processor<'_, CHypervisor>, vcpu: &Vcpu<CHypervisor>, item: &mut CopyItem| {
        let mut one = [Copy {
            source: side(item.source),
            dest: side(item.dest),
            len: item.len,
            flags: CopyFlags::from_bits_retain(item.flags),
            ..Copy::default()
        }];
        processor.copy(vcpu, &mut one);
        item.status = one[0].status.0;
    };
    // SAFETY: this function's own.
    unsafe { each(engine, caller, items, count, act) }
}

/// Asks for the size of a table.
///
/// # Safety
/// Rules 1 and 3 of the crate, for one item.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_query_size(
    engine: *const EngineHandle,
    caller: u16,
    item: *mut QueryItem,
) -> i32 {
    let act = |processor: &mut Processor<'_, CHypervisor>, vcpu: &Vcpu<CHypervisor>, item: &mut QueryItem| {
        item.status = match processor.query_size(vcpu, DomId(item.dom)) {
            Ok(size) => {
                (item.nr_frames, item.max_nr_frames) = (size.frames, size.max_frames);
                GrantStatus::OKAY.0
            }
            Err(status) => status.0,
        };
    };
    // SAFETY: this function's own.
    unsafe { each(engine, caller, item, 1, act) }
}

/// Chooses the version of the caller's table: 0, or what the hypercall answers.
///
/// # Safety
/// Rule 1 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_set_version(engine: *const EngineHandle, caller: u16, version: u32) -> i32 {
    // SAFETY: rule 1.
    let Some(engine) = (unsafe { engine.as_ref() }) else {
        return answer(Err(Errno::Inval));
    };
    let set = engine.act(caller, |processor, vcpu| processor.set_version(vcpu, version));
    answer(set.and_then(|result| result))
}

/// Makes frame `index` of the caller's table exist and shows it at `gfn` (add_to_physmap): 0 or a negative errno. Status
/// frames have bit 31 of the index.
///
/// # Safety
/// Rule 1 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_place_frame(
    engine: *const EngineHandle,
    caller: u16,
    index: u64,
    gfn: u64,
) -> i32 {
    // SAFETY: rule 1.
    let Some(engine) = (unsafe { engine.as_ref() }) else {
        return answer(Err(Errno::Inval));
    };
    let placed = engine.act(caller, |processor, vcpu| {
        processor.place_frame(vcpu, DomId::SELF, index, Gfn(gfn))
    });
    answer(placed.and_then(|result| result))
}
