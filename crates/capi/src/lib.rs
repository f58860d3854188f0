//! Grant tables for C: the guest driver ([`guest`]), and the engine's typed door over a hypervisor written in C
//! ([`engine`]). The header is `include/gnttab.h`; `examples/c` uses both.
//!
//! What must hold at every call, and is each function's `# Safety`:
//! 1. A pointer to an engine or a guest came from its `_new` and has not gone to its `_free`.
//! 2. Callbacks may be called from every thread that calls in here, and do not call back into the same engine.
//! 3. Pointers to items are valid for so many as the count says, and nobody else uses them meanwhile.
//! 4. The callbacks themselves keep what their documentation asks.
//!
//! Everything unsafe of this crate follows from these four.

#![expect(unsafe_code, reason = "C has pointers, and nothing else to say who owns what")]

pub mod engine;
pub mod guest;

use gnttab_abi::Errno;

/// What a function answers: 0, or the negative errno.
fn answer(result: Result<(), Errno>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(errno) => -i32::from(errno.number()),
    }
}

/// What a callback answered.
fn heard(answer: i32) -> Result<(), Errno> {
    match u16::try_from(answer.unsigned_abs()).ok() {
        Some(0) => Ok(()),
        Some(number) if answer < 0 => Err(Errno::from_number(number).unwrap_or(Errno::Io)),
        _ => Err(Errno::Io),
    }
}
