//! Atomics, by the name of whoever gives them: the processor, or the model checker.
//!
//! Built with `--cfg loom` the engine's lock-free protocols run under `loom`, which tries every
//! order that the memory model allows; see `models`.

#[cfg(not(loom))]
pub(crate) use core::hint::spin_loop;
#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};
#[cfg(loom)]
pub(crate) use loom::hint::spin_loop;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};

/// A point in the single order of sequentially consistent operations.
///
/// The read-modify-writes beside it are sequentially consistent already and need no fence; `loom`
/// knows that order for fences only.
#[inline]
pub(crate) fn full_barrier() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}
