//! Something that the checker watches: a page, a handle, a domain's life.

#![expect(unsafe_code, reason = "what is watched is shared between threads")]

use loom::cell::UnsafeCell;

/// Used by many at a time, or had by one alone. The checker fails if one has it and nothing orders
/// that with another's use.
pub(super) struct Watched(UnsafeCell<()>);

// SAFETY: there is nothing in the cell, and the checker is here to find unordered access.
unsafe impl Sync for Watched {}

impl Default for Watched {
    fn default() -> Watched {
        Watched(UnsafeCell::new(()))
    }
}

impl Watched {
    /// Somebody uses it.
    pub(super) fn used(&self) {
        self.0.with(|_| ());
    }

    /// Somebody has it alone.
    pub(super) fn had_alone(&self) {
        self.0.with_mut(|_| ());
    }
}
