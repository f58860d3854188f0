//! A second PV domain that does what it is told: how its address space and its only page of code
//! are laid out.
//!
//! Each of its virtual processors waits for a hypercall in a page of words, makes it, and leaves
//! the result there. Whoever can see that page (the runner in the machine's memory, the first
//! domain's kernel through a mapping) makes hypercalls as that domain.

/// Where its code is.
pub const CODE_ADDR: u64 = 0x1000;
/// Where its page of words is.
pub const WORDS_ADDR: u64 = 0x2000;
/// Where its arguments are; the page after the last is not mapped.
pub const ARGUMENTS_ADDR: u64 = 0x80_0000;
/// Where its lists are; the page after the last is not mapped.
pub const LIST_ADDR: u64 = 0xA0_0000;
/// Pages of arguments, and of lists.
pub const AREA_PAGES: usize = 16;
/// Where its places for mappings are: 4 MiB with level-1 tables.
pub const SLOTS_ADDR: u64 = 0x400_0000;

/// Words that each virtual processor has.
pub const VCPU_WORDS: usize = 16;
/// Number of the hypercall that is asked for.
pub const ASKED: usize = 0;
/// Number of the hypercall that was made.
pub const MADE: usize = 1;
/// Which hypercall.
pub const NUMBER: usize = 2;
/// Its five arguments.
pub const ARGS: usize = 3;
/// Its result.
pub const RESULT: usize = 8;

/// The code; `%rbx` points to the processor's words.
pub const CODE: [u8; 61] = [
    0x48, 0x8B, 0x03, // wait: mov (%rbx), %rax
    0x48, 0x3B, 0x43, 0x08, // cmp 8(%rbx), %rax
    0x75, 0x0D, // jne made
    0xB8, 0x1D, 0x00, 0x00, 0x00, // mov $sched_op, %eax
    0x31, 0xFF, // xor %edi, %edi (yield)
    0x31, 0xF6, // xor %esi, %esi
    0x0F, 0x05, // syscall
    0xEB, 0xEA, // jmp wait
    0x48, 0x8B, 0x43, 0x10, // made: mov 16(%rbx), %rax
    0x48, 0x8B, 0x7B, 0x18, // mov 24(%rbx), %rdi
    0x48, 0x8B, 0x73, 0x20, // mov 32(%rbx), %rsi
    0x48, 0x8B, 0x53, 0x28, // mov 40(%rbx), %rdx
    0x4C, 0x8B, 0x53, 0x30, // mov 48(%rbx), %r10
    0x4C, 0x8B, 0x43, 0x38, // mov 56(%rbx), %r8
    0x0F, 0x05, // syscall
    0x48, 0x89, 0x43, 0x40, // mov %rax, 64(%rbx)
    0x48, 0x8B, 0x03, // mov (%rbx), %rax
    0x48, 0x89, 0x43, 0x08, // mov %rax, 8(%rbx)
    0xEB, 0xC3, // jmp wait
];
