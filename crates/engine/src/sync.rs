//! Atomics and locks, by the name of whoever gives them: the processor, or the model checker.
//!
//! Built with `--cfg loom` the engine runs under `loom`, which tries every order that the memory
//! model allows; see `models`. Nothing else in this crate names a standard primitive, but for the
//! machine in memory, which the checker does without.

#[cfg(not(loom))]
mod real {
    pub(crate) use core::hint::spin_loop;
    pub(crate) use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};

    pub(crate) use spin::{Mutex, Once};
}

#[cfg(loom)]
mod checked {
    use std::sync::{OnceLock, PoisonError};

    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::MutexGuard;
    pub(crate) use loom::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
    };

    loom::lazy_static! {
        /// Gates opened so far; see [`Knock`](super::Knock).
        pub(super) static ref OPENED: AtomicU32 = AtomicU32::new(0);
    }

    /// The checker's lock under the name and with the signature of the spinning one.
    #[derive(Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Mutex<T> {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    /// A value that is set once. Who sets it is alone; who looks sees it if the checker lets it see
    /// that it was set.
    pub(crate) struct Once<T> {
        value: OnceLock<T>,
        set: AtomicBool,
    }

    impl<T> Once<T> {
        pub(crate) fn new() -> Once<T> {
            Once {
                value: OnceLock::new(),
                set: AtomicBool::new(false),
            }
        }

        pub(crate) fn get(&self) -> Option<&T> {
            self.set
                .load(Ordering::Acquire)
                .then(|| self.value.get())
                .flatten()
        }

        pub(crate) fn try_call_once<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<&T, E> {
            if self.value.get().is_none() {
                let value = make()?;
                assert!(self.value.set(value).is_ok(), "who sets it is alone");
                self.set.store(true, Ordering::Release);
            }
            Ok(self.value.get().expect("it was set"))
        }
    }
}

#[cfg(loom)]
pub(crate) use checked::*;
#[cfg(not(loom))]
pub(crate) use real::*;

/// A point in the single order of sequentially consistent operations.
///
/// The read-modify-writes beside it are sequentially consistent already and need no fence; `loom`
/// knows that order for fences only.
#[inline]
pub(crate) fn full_barrier() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}

/// The tries of one processor to enter a table whose gate it finds shut.
///
/// Under `loom`, which would let it knock and be turned away for ever, it knocks again only after
/// some gate was opened. What it misses are further tries that fail.
pub(crate) struct Knock {
    #[cfg(loom)]
    opened: u32,
}

impl Knock {
    #[inline]
    pub(crate) fn first() -> Knock {
        Knock {
            #[cfg(loom)]
            opened: OPENED.load(Ordering::Relaxed),
        }
    }

    /// Waits before the next try.
    #[inline]
    pub(crate) fn wait(self) -> Knock {
        spin_loop();
        #[cfg(loom)]
        while OPENED.load(Ordering::Relaxed) == self.opened {
            spin_loop();
        }
        Knock::first()
    }
}

/// A gate was opened.
#[inline]
pub(crate) fn gate_opened() {
    #[cfg(loom)]
    OPENED.fetch_add(1, Ordering::Relaxed);
}
