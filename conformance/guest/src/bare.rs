//! What the compiler expects to find: an entry point, a panic handler, four memory functions. In an
//! emulated processor a repeated instruction costs by how often it is repeated: words before bytes.

use core::arch::global_asm;
use core::fmt::Write;

use crate::xen::{Console, shutdown};

// Xen starts the kernel with the address of the start-info page in %rsi. The hypercall page is
// filled by Xen. The notes (public header elfnote.h): type, then text or number.
global_asm!(
    r#"
    .macro note type, what:vararg
        .align 4
        .long 4, 2f - 1f, \type
        .asciz "Xen"
    1:  \what
    2:  .align 4
    .endm

    .section .hypercall_page, "ax"
    .globl hypercall_page
    .align 4096
    hypercall_page: .skip 4096

    .section .note.xen, "a", @note
    note 6, .asciz "gnttab-conformance"
    note 7, .asciz "1"
    note 5, .asciz "xen-3.0"
    note 3, .quad 0
    note 1, .quad _start
    note 2, .quad hypercall_page
    note 9, .asciz "yes"
    note 8, .asciz "generic"

    .section .bss.stack, "aw", @nobits
    .align 4096
    .skip 131072
    stack_top:

    .text
    .globl _start
    _start:
        cld
        lea stack_top(%rip), %rsp
        xor %ebp, %ebp
        mov %rsi, %rdi
        call {start}
        ud2
    "#,
    start = sym crate::start,
    options(att_syntax)
);

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "gnttab-conformance: {info}");
    shutdown()
}

/// The compiled `core` names the handler that unwinding would use. Nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller gives two ranges of n bytes; they are copied upwards, words first.
    unsafe {
        core::arch::asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) n % 8,
            inout("rcx") n / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
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
    let word = u64::from(byte as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller gives a range of n bytes; they are filled upwards, words first.
    unsafe {
        core::arch::asm!("rep stosq", "mov rcx, {rest}", "rep stosb", rest = in(reg) n % 8,
            inout("rcx") n / 8 => _, inout("rdi") to => _, in("rax") word,
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

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, n) }
}
