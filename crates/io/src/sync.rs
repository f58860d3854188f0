//! The atomics of this crate, in one place, so that the model checker can put its own there
//! (`tests/loom.rs`). There is no lock: every structure has one holder.

pub(crate) use core::sync::atomic::{AtomicU32, Ordering, fence};
