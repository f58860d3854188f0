//! The atomics and the lock of this crate, in one place.
//!
//! The lock guards bookkeeping only, for a few instructions each time. Granting and ending touch
//! nothing but the words of their entry and never come here.

pub(crate) use core::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::Hypercall;

/// A value behind a spinning lock.
pub(crate) struct Lock<T>(spin::Mutex<T>);

impl<T> Lock<T> {
    pub(crate) const fn new(value: T) -> Lock<T> {
        Lock(spin::Mutex::new(value))
    }

    /// Runs something short with the lock held and interrupts masked as the platform wants it.
    /// `work` calls no code of others: no page is dropped in it, nobody is woken.
    pub(crate) fn with<R>(&self, x: &impl Hypercall, work: impl FnOnce(&mut T) -> R) -> R {
        let saved = x.mask_interrupts();
        let result = {
            let mut guard = self.spin(x);
            work(&mut guard)
        };
        x.restore_interrupts(saved);
        result
    }

    /// Runs something that may take long: interrupts stay as they are.
    pub(crate) fn with_long<R>(&self, x: &impl Hypercall, work: impl FnOnce(&mut T) -> R) -> R {
        work(&mut self.spin(x))
    }

    fn spin(&self, x: &impl Hypercall) -> spin::MutexGuard<'_, T> {
        loop {
            if let Some(guard) = self.0.try_lock() {
                return guard;
            }
            x.relax();
        }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}
