//! The order in which the control words of a ring are loaded and stored (spec 1.3 to 1.5).
//!
//! A producer index is stored after the slots that it counts were written, and loaded before they are
//! read: release and acquire. Event thresholds need the full barrier besides, which [`ring`](crate::ring)
//! puts where rule 4 says.

use crate::sync::{AtomicU32, Ordering};

/// Loads a little-endian word once.
pub(crate) fn load(word: &AtomicU32) -> u32 {
    u32::from_le(word.load(Ordering::Acquire))
}

/// Stores a little-endian word.
pub(crate) fn store(word: &AtomicU32, value: u32) {
    word.store(value.to_le(), Ordering::Release);
}
