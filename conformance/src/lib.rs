//! What the guest on a real Xen and the runner beside the engine have in common: the scripts, and
//! the player that carries one out.
//!
//! A script is played twice by the same code ([`play`]): in a free-standing PV guest whose
//! hypercalls a real Xen answers, and on the engine's machine in memory. Each step ends with one
//! word, a digest of all that came back and of all that can be seen afterwards. Frames are named,
//! not numbered, and handles are called by the order in which they came, so that the two worlds
//! may number as they like; everything else has to be equal.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "runner")]
extern crate alloc;

pub mod mailbox;
pub mod play;
pub mod puppet;
pub mod script;
