//! The guest driver over hypercalls made in C.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gnttab_abi::{Abi, DomId, Errno, Gfn, GrantRef};
use gnttab_guest::{
    Access, Call, Config, FrameKind, Grant, GrantTable, Grantee, Granter, Hypercall, MapError, MapRequest,
    Mapper, Mapping, Page, Pending, ReachError, TableFrame, UnmapError, Version, Window, reach,
};

use crate::{answer, heard};

/// Bytes that a hypercall's arguments may have.
const BUFFER: usize = 4096;

/// What the surroundings do for the driver. Every function gets `ctx` first.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GuestOps {
    /// Whatever the functions need.
    pub ctx: *mut c_void,
    /// Makes the hypercall `grant_table_op` with arguments laid out as x86_64 and Arm have them: what it answers.
    pub hypercall:
        unsafe extern "C" fn(ctx: *mut c_void, command: u32, arguments: *mut c_void, count: u32) -> i32,
    /// Shows frame `index` of the table (status frames have bit 31) to this program (`add_to_physmap`): 0 or negative.
    pub place: unsafe extern "C" fn(ctx: *mut c_void, index: u64) -> i32,
    /// Where a frame lies that was placed: 4096 aligned bytes that stay there; NULL: it was not.
    pub frame: unsafe extern "C" fn(ctx: *mut c_void, index: u64) -> *mut c_void,
    /// Waits for so many milliseconds.
    pub sleep_ms: unsafe extern "C" fn(ctx: *mut c_void, ms: u32),
}

struct Surroundings(GuestOps);

// SAFETY: rule 2 of the crate: callbacks are called from every thread that calls in.
unsafe impl Send for Surroundings {}
// SAFETY: as above.
unsafe impl Sync for Surroundings {}

/// Bit 31 of a frame's index: a status frame.
fn index_of(kind: FrameKind, index: u32) -> u64 {
    match kind {
        FrameKind::Shared => u64::from(index),
        FrameKind::Status => u64::from(index) | 1 << 31,
    }
}

impl Hypercall for Surroundings {
    fn grant_table_op(&self, mut call: Call<'_>) -> Result<(), Errno> {
        // Aligned for 64-bit fields.
        let mut words = [0_u64; BUFFER / 8];
        let address = words.as_mut_ptr();
        let mut bytes = [0; BUFFER];
        let raw = call
            .encode(Abi::X86_64, address.addr() as u64, &mut bytes)
            .map_err(|_| Errno::TooBig)?;
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let ops = &self.0;
        // SAFETY: rule 4 of the crate; the arguments are ours, and the callee's for the call.
        let result =
            heard(unsafe { (ops.hypercall)(ops.ctx, raw.command.0, words.as_mut_ptr().cast(), raw.count) });
        for (word, bytes) in words.iter().zip(bytes.as_chunks_mut().0) {
            *bytes = word.to_ne_bytes();
        }
        // Items that were done before the call failed keep their results.
        call.decode(Abi::X86_64, &bytes).map_err(|_| Errno::TooBig)?;
        result
    }

    fn sleep_ms(&self, ms: u32) {
        let ops = &self.0;
        // SAFETY: rule 4 of the crate.
        unsafe { (ops.sleep_ms)(ops.ctx, ms) }
    }
}

/// A page that C owns: it answers for it until access has ended.
struct CPage(Gfn);

impl Page for CPage {
    fn gfn(&self) -> Gfn {
        self.0
    }

    fn zero(&mut self) {
        // Never asked for: pages are granted with what they hold.
    }
}

impl Granter for Surroundings {
    type Page = CPage;

    fn reach(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), ReachError> {
        let ops = &self.0;
        // Only the order is taken from there; where a frame goes is C's to say.
        for place in reach::physmap(kind, frames, |_| Gfn(0)) {
            let index = match kind {
                FrameKind::Shared => place.idx,
                FrameKind::Status => index_of(kind, u32::try_from(place.idx & 0x7fff_ffff).unwrap_or(0)),
            };
            // SAFETY: rule 4 of the crate.
            heard(unsafe { (ops.place)(ops.ctx, index) })?;
        }
        Ok(())
    }

    fn frame(&self, kind: FrameKind, index: u32) -> Option<TableFrame> {
        let ops = &self.0;
        // SAFETY: rule 4 of the crate.
        let address = unsafe { (ops.frame)(ops.ctx, index_of(kind, index)) };
        let address = NonNull::new(address.cast())?;
        // SAFETY: rule 4 of the crate: 4096 aligned bytes that stay there.
        Some(unsafe { TableFrame::new(address) })
    }
}

impl Grantee for Surroundings {}

/// A domain's driver; opaque to C.
pub struct GuestHandle {
    table: GrantTable<Surroundings>,
    mapper: Option<Mapper<Surroundings>>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    grants: BTreeMap<GrantRef, Grant<Surroundings>>,
    pending: BTreeMap<GrantRef, Pending<Surroundings>>,
    mapped: BTreeMap<u32, Mapping<Surroundings>>,
}

impl std::fmt::Debug for GuestHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestHandle").finish_non_exhaustive()
    }
}

impl GuestHandle {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a domain's driver: 0 and `*guest`, or a negative errno. `window` is where others' pages are mapped, in bytes,
/// and `window_pages` how many fit; 0 for a domain that maps none.
///
/// # Safety
/// `ops` points to callbacks that keep the rules of the crate, which are copied; `guest` to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_guest_new(
    ops: *const GuestOps,
    version: u32,
    window: u64,
    window_pages: u32,
    guest: *mut *mut GuestHandle,
) -> i32 {
    // SAFETY: the caller's promise.
    let ops = unsafe { ops.as_ref() };
    // SAFETY: the caller's promise.
    let place = unsafe { guest.as_mut() };
    let (Some(ops), Some(place)) = (ops, place) else {
        return answer(Err(Errno::Fault));
    };
    let start = || {
        let version = match version {
            1 => Version::V1,
            2 => Version::V2,
            _ => return Err(Errno::Inval),
        };
        let surroundings = Arc::new(Surroundings(*ops));
        let config = Config {
            version,
            ..Config::default()
        };
        let table = GrantTable::start(Arc::clone(&surroundings), config).map_err(|_| Errno::NoMem)?;
        let mapper = match window_pages {
            0 => None,
            pages => {
                let window = Window::new(window, pages).map_err(|_| Errno::Inval)?;
                Some(Mapper::new(surroundings, window).map_err(|_| Errno::Inval)?)
            }
        };
        Ok(GuestHandle {
            table,
            mapper,
            held: Mutex::default(),
        })
    };
    match start() {
        Ok(started) => {
            *place = Box::into_raw(Box::new(started));
            0
        }
        Err(errno) => answer(Err(errno)),
    }
}

/// Ends the driver: what it had mapped is unmapped and what it had granted is ended, where peers let go.
///
/// # Safety
/// Rule 1 of the crate; `guest` is used no more. NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_guest_free(guest: *mut GuestHandle) {
    if !guest.is_null() {
        // SAFETY: rule 1: it came from Box::into_raw, and goes once.
        drop(unsafe { Box::from_raw(guest) });
    }
}

/// Grants a page with what it holds: 0 and `*gref`. The page is the driver's until [`gnttab_guest_end`] answers 0 for it.
/// -ENOMEM: no reference is free; -EINVAL: no such domain, or the frame does not fit.
///
/// # Safety
/// Rule 1 of the crate; `gref` points to room for a reference.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_guest_grant(
    guest: *const GuestHandle,
    peer: u16,
    gfn: u64,
    readonly: bool,
    gref: *mut u32,
) -> i32 {
    // SAFETY: rule 1.
    let guest = unsafe { guest.as_ref() };
    // SAFETY: the caller's promise.
    let place = unsafe { gref.as_mut() };
    let (Some(guest), Some(place)) = (guest, place) else {
        return answer(Err(Errno::Fault));
    };
    let grant = || {
        let gref = guest.table.alloc_one().map_err(|_| Errno::NoMem)?;
        let granted = guest
            .table
            .grant(gref, DomId(peer), CPage(Gfn(gfn)), access(readonly));
        let granted = granted.map_err(|_| Errno::Inval)?;
        let gref = granted.gref();
        guest.held().grants.insert(gref, granted);
        Ok(gref)
    };
    match grant() {
        Ok(gref) => {
            *place = gref.0;
            0
        }
        Err(errno) => answer(Err(errno)),
    }
}

/// Ends access: 0, and the page is the caller's again; -EBUSY while the peer still has it, to be asked again; -EINVAL for
/// a reference that is not granted.
///
/// # Safety
/// Rule 1 of the crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_guest_end(guest: *const GuestHandle, gref: u32) -> i32 {
    // SAFETY: rule 1.
    let Some(guest) = (unsafe { guest.as_ref() }) else {
        return answer(Err(Errno::Fault));
    };
    let gref = GrantRef(gref);
    let (grant, pending) = {
        let mut held = guest.held();
        (held.grants.remove(&gref), held.pending.remove(&gref))
    };
    let ended = match (grant, pending) {
        (Some(grant), _) => grant.end(),
        (None, Some(pending)) => pending.retry(),
        (None, None) => return answer(Err(Errno::Inval)),
    };
    answer(match ended {
        Ok(_) => Ok(()),
        Err(pending) => {
            guest.held().pending.insert(gref, pending);
            Err(Errno::Busy)
        }
    })
}

/// Maps another's page: 0, `*addr` and `*handle`; or the negative status (`GNTST_*`, -1 to -13) if the hypervisor
/// refused it, or a negative errno below those.
///
/// # Safety
/// Rule 1 of the crate; `addr` and `handle` point to room for their numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_guest_map(
    guest: *const GuestHandle,
    peer: u16,
    gref: u32,
    readonly: bool,
    addr: *mut u64,
    handle: *mut u32,
) -> i32 {
    // SAFETY: rule 1.
    let guest = unsafe { guest.as_ref() };
    // SAFETY: the caller's promise.
    let addr = unsafe { addr.as_mut() };
    // SAFETY: the caller's promise.
    let handle = unsafe { handle.as_mut() };
    let (Some(guest), Some(addr), Some(handle)) = (guest, addr, handle) else {
        return answer(Err(Errno::Fault));
    };
    let Some(mapper) = &guest.mapper else {
        return answer(Err(Errno::NoSys));
    };
    let request = MapRequest {
        dom: DomId(peer),
        gref: GrantRef(gref),
        access: access(readonly),
    };
    match mapper.map_one(request) {
        Ok(mapping) => {
            (*addr, *handle) = (mapping.host_addr(), mapping.handle().0);
            guest.held().mapped.insert(mapping.handle().0, mapping);
            0
        }
        Err(error @ MapError::Status { .. }) => error.status().0.into(),
        Err(_) => answer(Err(Errno::Fault)),
    }
}

/// Unmaps: 0; -EINVAL for a handle that this driver does not have, -EIO if the hypervisor refused (the address is then
/// never used again).
///
/// # Safety
/// Rule 1 of the crate; the page is used no more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gnttab_guest_unmap(guest: *const GuestHandle, handle: u32) -> i32 {
    // SAFETY: rule 1.
    let Some(guest) = (unsafe { guest.as_ref() }) else {
        return answer(Err(Errno::Fault));
    };
    let mapping = guest.held().mapped.remove(&handle);
    let unmapped = mapping.map(|mapping| mapping.unmap().map_err(|_: UnmapError| Errno::Io));
    answer(unmapped.unwrap_or(Err(Errno::Inval)))
}

fn access(readonly: bool) -> Access {
    if readonly {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    }
}
