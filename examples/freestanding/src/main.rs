//! Both halves of grant tables in a binary without an operating system.
//!
//! There is no standard library, no C library and no start-up code here: a bump allocator, a panic
//! handler and an entry point are all that the engine and the guest driver need. The hypervisor is
//! [`Bare`], which is as small as one can be. One domain grants a page, another maps it, copies from
//! it and lets go. It links for the host's own target, so that it can also be run: the exit status
//! is 0 if every step answered as it has to, otherwise the number of the step.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::slice::from_mut;
use core::sync::atomic::{AtomicUsize, Ordering};

use gnttab_abi::{
    Copy, CopyFlags, CopyPtr, DomId, Errno, Gfn, GrantStatus, MapFlags, MapGrantRef, Mfn, UnmapGrantRef,
};
use gnttab_engine::{
    Access, Config, Domain, DomainKind, Engine, FrameOwner, HostError, HostMapping, HostUnmapping,
    Hypervisor, Limits, PageWords, ResolveError, Resolved, Vcpu,
};
use gnttab_guest as guest;

const PAGES: u64 = 8;
const GRANTER: DomId = DomId(1);
const GRANTEE: DomId = DomId(2);

/// A hypervisor of sixteen pages, the first eight the granter's. It counts no references, since
/// nothing here is ever freed.
struct Bare {
    pages: Vec<Arc<PageWords>>,
}

impl Bare {
    fn page(&self, mfn: Mfn) -> Option<&PageWords> {
        self.pages.get(usize::try_from(mfn.0).ok()?).map(|page| &**page)
    }
}

impl Hypervisor for Bare {
    /// A domain is its number.
    type Domain = DomId;
    type TablePage = Arc<PageWords>;

    fn resolve(&self, domain: &DomId, gfn: Gfn, _access: Access) -> Result<Resolved, ResolveError> {
        if gfn.0 >= PAGES {
            return Err(ResolveError::BadPage);
        }
        let first = if *domain == GRANTER { 0 } else { PAGES };
        Ok(Resolved {
            mfn: Mfn(first + gfn.0),
            owner: FrameOwner::Domain(*domain),
        })
    }

    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        Some(FrameOwner::Domain(if mfn.0 < PAGES { GRANTER } else { GRANTEE }))
    }

    fn put_frame(&self, _mfn: Mfn) {}

    fn get_writable(&self, _mfn: Mfn) -> bool {
        true
    }

    fn put_writable(&self, _mfn: Mfn) {}

    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16) {
        if let (Some(from), Some(to)) = (self.page(source.0), self.page(dest.0)) {
            let _ = PageWords::copy(from, source.1, to, dest.1, len);
        }
    }

    fn map_host(&self, _grantee: &DomId, _mapping: &HostMapping) -> Result<(), HostError> {
        Ok(())
    }

    fn unmap_host(&self, _grantee: &DomId, _unmapping: &HostUnmapping) -> Result<(), HostError> {
        Ok(())
    }

    fn flush(&self, _grantee: &DomId) {}

    fn crash(&self, _domain: &DomId, _why: &'static str) {
        exit(99)
    }

    fn alloc_table_page(&self, _domain: &DomId) -> Option<Arc<PageWords>> {
        Some(Arc::new(PageWords::zeroed()))
    }

    fn table_page_mfn(&self, _page: &Arc<PageWords>) -> Mfn {
        Mfn(u64::MAX)
    }

    fn table_page_gfn(&self, _domain: &DomId, _page: &Arc<PageWords>) -> Gfn {
        Gfn::INVALID
    }
}

/// The granter, as its driver sees the world: hypercalls that no one answers, because granting
/// needs none, and a table that lies where the engine put it.
struct Kernel {
    domain: Arc<Domain<Bare>>,
}

impl guest::Hypercall for Kernel {
    fn grant_table_op(&self, call: guest::Call<'_>) -> Result<(), Errno> {
        match call {
            guest::Call::QuerySize(item) => {
                (item.nr_frames, item.max_nr_frames) = (1, 1);
                item.status = GrantStatus::OKAY;
                Ok(())
            }
            guest::Call::SetVersion(item) if item.version == 1 => Ok(()),
            _ => Err(Errno::NoSys),
        }
    }

    fn sleep_ms(&self, _ms: u32) {}
}

/// A page of the granter's memory.
struct GuestPage(Gfn);

impl guest::Page for GuestPage {
    fn gfn(&self) -> Gfn {
        self.0
    }

    fn zero(&mut self) {}
}

impl guest::Granter for Kernel {
    type Page = GuestPage;

    fn reach(&self, _kind: guest::FrameKind, frames: core::ops::Range<u32>) -> Result<(), guest::ReachError> {
        if frames.end <= 1 {
            Ok(())
        } else {
            Err(guest::ReachError::Call(Errno::NoMem))
        }
    }

    fn frame(&self, kind: guest::FrameKind, index: u32) -> Option<guest::TableFrame> {
        let page = match kind {
            guest::FrameKind::Shared => self.domain.shared_frame(index)?,
            guest::FrameKind::Status => self.domain.status_frame(index)?,
        };
        let pointer = core::ptr::NonNull::new(page.as_ptr())?;
        // SAFETY: the page lives as long as its domain, which `self` holds, and everybody uses it by
        // atomics.
        Some(unsafe { guest::TableFrame::new(pointer) })
    }
}

/// Ends with the number of the step if `condition` does not hold.
fn check(step: i32, condition: bool) {
    if !condition {
        exit(step);
    }
}

fn unwrap<T, E>(step: i32, result: Result<T, E>) -> T {
    result.unwrap_or_else(|_| exit(step))
}

fn some<T>(step: i32, option: Option<T>) -> T {
    option.unwrap_or_else(|| exit(step))
}

fn session() {
    // The hypervisor and its two domains.
    let pages = (0..2 * PAGES).map(|_| Arc::new(PageWords::zeroed())).collect();
    let engine = Engine::new(
        Bare { pages },
        Config {
            processors: 1,
            ..Config::default()
        },
    );
    let create = |id| engine.create_domain(id, DomainKind::Hvm, Limits::default(), id);
    let granter = unwrap(1, create(GRANTER));
    let grantee = unwrap(2, create(GRANTEE));
    let vcpu = some(3, Vcpu::take(&grantee, 0));
    let mut cpu = some(4, engine.processor(0));

    // The granter's driver grants its page 3, which holds a word.
    let word = *b"granted!";
    check(5, some(5, engine.hypervisor().page(Mfn(3))).write(100, &word));
    let kernel = Arc::new(Kernel { domain: granter });
    let table = unwrap(6, guest::GrantTable::start(kernel, guest::Config::default()));
    let gref = unwrap(7, table.alloc_one());
    let grant = unwrap(
        8,
        table.grant(gref, GRANTEE, GuestPage(Gfn(3)), guest::Access::ReadOnly),
    );

    // The grantee maps it, and copies from it into its page 0.
    let flags = MapFlags::HOST_MAP | MapFlags::READONLY;
    let (dom, gref) = (GRANTER, grant.gref());
    let mut map = MapGrantRef {
        host_addr: 0x10_0000,
        flags,
        gref,
        dom,
        ..MapGrantRef::default()
    };
    cpu.map(&vcpu, from_mut(&mut map));
    check(9, map.status == GrantStatus::OKAY);
    let mut copy = Copy {
        source: CopyPtr::grant(GRANTER, gref, 100),
        dest: CopyPtr::frame(0, 0),
        len: 8,
        flags: CopyFlags::SOURCE_GREF,
        ..Copy::default()
    };
    cpu.copy(&vcpu, from_mut(&mut copy));
    check(10, copy.status == GrantStatus::OKAY);
    let copied = some(11, engine.hypervisor().page(Mfn(PAGES))).read_bytes::<8>(0);
    check(11, copied == Some(word));

    // It may not write, and while it maps, the granter does not get its page back.
    let mut wide = MapGrantRef {
        flags: MapFlags::HOST_MAP,
        ..map
    };
    cpu.map(&vcpu, from_mut(&mut wide));
    check(12, wide.status == GrantStatus::GENERAL_ERROR);
    let Err(grant) = grant.try_end() else { exit(13) };
    let (host_addr, handle) = (map.host_addr, map.handle);
    let mut unmap = UnmapGrantRef {
        host_addr,
        handle,
        ..UnmapGrantRef::default()
    };
    cpu.unmap(&vcpu, from_mut(&mut unmap));
    check(14, unmap.status == GrantStatus::OKAY);
    check(15, grant.try_end().is_ok());
    exit(0);
}

// --- what an operating system would give -------------------------------------------------------

/// Memory that is handed out and never taken back.
struct Bump {
    heap: UnsafeCell<[u8; Bump::SIZE]>,
    used: AtomicUsize,
}

impl Bump {
    const SIZE: usize = 8 << 20;
}

// SAFETY: every byte of the heap is handed out once, by an atomic addition.
unsafe impl Sync for Bump {}

// SAFETY: blocks are aligned as asked, do not overlap, and lie in the heap.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let most = layout.size().saturating_add(layout.align());
        let start = self.used.fetch_add(most, Ordering::Relaxed);
        if start.saturating_add(most) > Bump::SIZE {
            return core::ptr::null_mut();
        }
        let base = self.heap.get().cast::<u8>().wrapping_add(start);
        base.wrapping_add(base.align_offset(layout.align()))
    }

    unsafe fn dealloc(&self, _block: *mut u8, _layout: Layout) {}
}

#[global_allocator]
static HEAP: Bump = Bump {
    heap: UnsafeCell::new([0; Bump::SIZE]),
    used: AtomicUsize::new(0),
};

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    exit(98)
}

/// The compiled `alloc` names the handler that unwinding would use. Nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Ends the process: the one thing asked of whatever runs this.
fn exit(code: i32) -> ! {
    // SAFETY: system call 231 (exit_group) takes the code and does not return.
    unsafe { asm!("syscall", in("rax") 231, in("rdi") code, options(noreturn, nostack)) }
}

// The kernel starts a process with the stack pointer aligned; a call wants it 8 off.
global_asm!(".globl _start", "_start:", "xor %ebp, %ebp", "call {start}", "ud2", start = sym start, options(att_syntax));

extern "C" fn start() -> ! {
    session();
    exit(97)
}

/// What the compiler expects from a C library: plain, slow and right.
mod memory_functions {
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        // SAFETY: the caller gives two ranges of n bytes; `rep movsb` copies them upwards.
        unsafe {
            core::arch::asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= n {
            // SAFETY: an upward copy does not overwrite what it has still to read.
            return unsafe { memcpy(to, from, n) };
        }
        for i in (0..n).rev() {
            // SAFETY: i is below n; volatile keeps this from being turned into a call of itself.
            unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
        // SAFETY: the caller gives a range of n bytes.
        unsafe {
            core::arch::asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        for i in 0..n {
            // SAFETY: i is below n, and both ranges have n bytes.
            let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
        }
        0
    }
}
