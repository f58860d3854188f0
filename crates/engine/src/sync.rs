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

/// A lock that spins; under the model checker one that it knows.
#[cfg(not(loom))]
pub(crate) use spin::Mutex;

/// A lock that the model checker knows.
#[cfg(loom)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

#[cfg(loom)]
impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Mutex<T> {
        Mutex(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        match self.0.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}
