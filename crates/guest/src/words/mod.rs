//! The words that the hypervisor shares with this domain: the only module that touches them.
//!
//! [`frame`] turns pointers into atomics and is the only place with `unsafe`; [`protocol`] says
//! in which order the atomics are used and is where to look for the header's rules.

mod frame;
mod protocol;

pub(crate) use frame::Frames;
pub use frame::TableFrame;
pub(crate) use protocol::{Content, FrameTooWide, OfferOutcome, Outcome};
