//! The hypervisor's half of Xen's grant tables.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod active;
mod domain;
mod engine;
mod hypervisor;
mod maptrack;
mod registry;
mod segments;
mod shared;
mod table;

pub use active::PinCounts;
pub use domain::{
    Config, CreateError, Domain, Limits, MAX_GRANT_FRAMES, MAX_MAPTRACK_FRAMES, OpSet, Reference, Vcpu,
    Version,
};
pub use engine::{Engine, Processor};
pub use hypervisor::{
    Access, DomainKind, FrameOwner, Hook, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError,
    Resolved, StealError,
};
pub use shared::PageWords;
