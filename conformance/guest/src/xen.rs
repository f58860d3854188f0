//! What the kernel asks of Xen, and where its own memory is.
//!
//! What must always hold: the kernel's image and the page tables that Xen built for it are mapped
//! where they were at the start ("physical" address = virtual address); only pages of [`Pages`]
//! are ever mapped anew, by [`map`].

use core::arch::asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

/// The level-4 table's address, as start info gave it.
static ROOT: AtomicU64 = AtomicU64::new(0);
/// The table of machine frames by "physical" frame.
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// Machine to physical: Xen shows every guest this table, read-only, at this address.
const MACHINE_TO_PHYSICAL: u64 = 0xFFFF_8000_0000_0000;
const PTE_FRAME: u64 = 0x000F_FFFF_FFFF_F000;

/// Pages of the kernel's own, all zero at the start.
#[repr(C, align(65536))]
pub struct Pages<const N: usize>(UnsafeCell<[[u64; 512]; N]>);

// SAFETY: the kernel has one processor and takes no interrupts; accesses are single words.
unsafe impl<const N: usize> Sync for Pages<N> {}

impl<const N: usize> Pages<N> {
    pub const fn new() -> Pages<N> {
        Pages(UnsafeCell::new([[0; 512]; N]))
    }

    pub fn addr(&self) -> u64 {
        self.0.get() as u64
    }
}

/// Remembers what start info says.
pub fn start(info: u64) {
    // The public header's offsets: pt_base, mfn_list.
    ROOT.store(load64(info + PT_BASE), Ordering::Relaxed);
    FRAMES.store(load64(info + MFN_LIST), Ordering::Relaxed);
}

const PT_BASE: u64 = 32 + 8 + 8 + 4 + 4 + 8 + 4 + 4 + 8 + 8;
const MFN_LIST: u64 = PT_BASE + 16;

/// Loads a word at an address that is mapped.
pub fn load64(addr: u64) -> u64 {
    // SAFETY: callers pass addresses of mapped memory; the load is volatile since Xen writes too.
    unsafe { (addr as *const u64).read_volatile() }
}

/// Stores a word at an address that is mapped writable.
pub fn store64(addr: u64, value: u64) {
    // SAFETY: callers pass addresses of pages of [`Pages`] or of what they mapped there.
    unsafe { (addr as *mut u64).write_volatile(value) }
}

pub fn load8(addr: u64) -> u8 {
    // SAFETY: as in `load64`.
    unsafe { (addr as *const u8).read_volatile() }
}

pub fn store8(addr: u64, value: u8) {
    // SAFETY: as in `store64`.
    unsafe { (addr as *mut u8).write_volatile(value) }
}

pub fn load16(addr: u64) -> u16 {
    // SAFETY: as in `load64`; the address is even.
    unsafe { (addr as *const u16).read_volatile() }
}

pub fn store16(addr: u64, value: u16) {
    // SAFETY: as in `store64`; the address is even.
    unsafe { (addr as *mut u16).write_volatile(value) }
}

pub fn store32(addr: u64, value: u32) {
    // SAFETY: as in `store64`; the address is a multiple of 4.
    unsafe { (addr as *mut u32).write_volatile(value) }
}

/// Copies from mapped memory, whole words where it can.
pub fn load_bytes(addr: u64, into: &mut [u8]) {
    let mut at = addr;
    let mut rest = into;
    while !rest.is_empty() {
        let whole = at.is_multiple_of(8) && rest.len() >= 8;
        let (part, after) = rest.split_at_mut(if whole { 8 } else { 1 });
        if whole {
            part.copy_from_slice(&load64(at).to_le_bytes());
        } else {
            part[0] = load8(at);
        }
        at += part.len() as u64;
        rest = after;
    }
}

/// Copies into mapped memory, whole words where it can.
pub fn store_bytes(addr: u64, bytes: &[u8]) {
    let mut at = addr;
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        match rest.first_chunk() {
            Some(word) if at.is_multiple_of(8) => {
                store64(at, u64::from_le_bytes(*word));
                (at, rest) = (at + 8, &rest[8..]);
            }
            _ => {
                store8(at, *first);
                (at, rest) = (at + 1, &rest[1..]);
            }
        }
    }
}

/// The machine frame of one of the kernel's pages, as it was at the start.
pub fn frame_of(addr: u64) -> u64 {
    load64(FRAMES.load(Ordering::Relaxed) + (addr >> 12) * 8)
}

/// Where the page-table entry for an address lies.
pub fn pte_of(addr: u64) -> u64 {
    let mut table = ROOT.load(Ordering::Relaxed);
    for level in [39, 30, 21] {
        let entry = load64(table + (addr >> level) % 512 * 8);
        let frame = (entry & PTE_FRAME) >> 12;
        table = load64(MACHINE_TO_PHYSICAL + frame * 8) << 12;
    }
    table + (addr >> 12) % 512 * 8
}

/// A hypercall of up to four arguments.
pub fn hypercall(number: u64, a: u64, b: u64, c: u64, d: u64) -> i64 {
    hypercall5(number, [a, b, c, d, 0])
}

/// A hypercall. The registers may come back changed.
pub fn hypercall5(number: u64, [a, b, c, d, e]: [u64; 5]) -> i64 {
    unsafe extern "C" {
        static hypercall_page: u8;
    }
    let result: i64;
    // SAFETY: Xen filled the page at the start: 32 bytes for each call. What the call does to
    // memory is what its arguments say; the compiler is told that memory may change.
    unsafe {
        let entry = (&raw const hypercall_page).wrapping_add(number as usize * 32);
        asm!("call {entry}", entry = in(reg) entry, inlateout("rax") number => result,
            inlateout("rdi") a => _, inlateout("rsi") b => _, inlateout("rdx") c => _,
            inlateout("r10") d => _, inlateout("r8") e => _, out("r9") _, out("rcx") _, out("r11") _);
    }
    result
}

const MMU_UPDATE: u64 = 1;
const MEMORY_OP: u64 = 12;
const UPDATE_VA_MAPPING: u64 = 14;
const UPDATE_VA_MAPPING_OTHERDOMAIN: u64 = 22;
const MMUEXT_OP: u64 = 26;
const DOMCTL: u64 = 36;
const INVLPG_LOCAL: u64 = 7;
const DOMID_SELF: u64 = 0x7FF0;
const CONSOLE_IO: u64 = 18;
const SCHED_OP: u64 = 29;
/// Flush this processor's translation of the one address.
const INVALIDATE: u64 = 2;

/// Puts an entry into the kernel's page tables; false if Xen refuses.
pub fn map(addr: u64, pte: u64) -> bool {
    hypercall(UPDATE_VA_MAPPING, addr, pte, INVALIDATE, 0) == 0
}

/// Puts an entry for another domain's frame into the kernel's page tables; false if Xen refuses.
pub fn map_foreign(addr: u64, pte: u64, domain: u16) -> bool {
    let domain = u64::from(domain);
    hypercall(UPDATE_VA_MAPPING_OTHERDOMAIN, addr, pte, INVALIDATE, domain) == 0
}

/// Puts an entry for a page of `owner`'s at a place in a domain's page tables.
pub fn set_pte_of(domain: u16, place: u64, pte: u64, owner: u64) -> bool {
    // struct mmu_update: place and value; the tables' domain is in the upper half, plus one.
    let update = [place, pte];
    let domains = (u64::from(domain) + 1) << 16 | owner;
    hypercall(MMU_UPDATE, (&raw const update) as u64, 1, 0, domains) == 0
}

/// What a frame's owner calls it.
pub fn physical(frame: u64) -> u64 {
    load64(MACHINE_TO_PHYSICAL + frame * 8)
}

/// Forgets this processor's translation of an address.
pub fn flush(addr: u64) {
    // struct mmuext_op: command, linear address, nothing.
    let operation = [INVLPG_LOCAL, addr, 0];
    hypercall(MMUEXT_OP, (&raw const operation) as u64, 1, 0, DOMID_SELF);
}

/// A memory operation on a structure at an address.
pub fn memory_op(command: u64, addr: u64) -> i64 {
    hypercall(MEMORY_OP, command, addr, 0, 0)
}

/// A domain-control operation on a structure at an address.
pub fn domctl(addr: u64) -> i64 {
    hypercall(DOMCTL, addr, 0, 0, 0)
}

/// Gives the processor up for a moment.
pub fn pause() {
    hypercall(SCHED_OP, 0, 0, 0, 0);
}

/// Ends the machine.
pub fn shutdown() -> ! {
    let reason = 1_u32; // reboot, which `-no-reboot` makes the end
    loop {
        hypercall(SCHED_OP, 2, (&raw const reason) as u64, 0, 0);
    }
}

/// Xen's console.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        hypercall(CONSOLE_IO, 0, text.len() as u64, text.as_ptr() as u64, 0);
        Ok(())
    }
}
