//! Which one of the changes is on: written into the copy of the engine that has them all.

extern crate std;

use core::sync::atomic::{AtomicU32, Ordering};

/// Nobody has looked yet.
const UNKNOWN: u32 = u32::MAX;

static ACTIVE: AtomicU32 = AtomicU32::new(UNKNOWN);

#[inline]
pub(crate) fn on(number: u32) -> bool {
    let active = ACTIVE.load(Ordering::Relaxed);
    if active == UNKNOWN { look() == number } else { active == number }
}

#[cold]
fn look() -> u32 {
    let active = std::env::var("GNTTAB_MUTANT").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    ACTIVE.store(active, Ordering::Relaxed);
    active
}
