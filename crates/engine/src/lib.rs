//! The hypervisor's half of Xen's grant tables, for any hypervisor or VMM to embed.
//!
//! A domain *grants* another one access to a page by writing an entry into a table that it shares
//! with the hypervisor. The index of the entry, the *grant reference*, is a capability: the grantee
//! names it to the hypervisor, which checks it and then maps the page, copies through it, or takes
//! a page over. This crate is that hypervisor half: tables, entries in use, the grantee's list of
//! mappings, all thirteen operations, limits, versions, teardown. It follows the behaviour of Xen,
//! statuses and order of checks included; [`Reference`] says whose, where two versions differ.
//!
//! - [`Hypervisor`] is the one trait that an embedder implements.
//! - [`Engine`] holds the domains; [`Engine::processor`] gives the right to act as one processor,
//!   [`Vcpu::take`] the right to act as one vCPU of a domain.
//! - The **typed door** is a method of [`Processor`] for each operation. The **raw door**,
//!   [`Processor::hypercall`], takes the hypercall's registers and a [`GuestMemory`], for three
//!   calling ABIs, with batches, faults and yielding.
//! - [`Processor::observe`], [`Processor::entry`] and [`Domain::mappings`] let anybody look on.
//! - Feature `machine`: a whole machine in memory, for tests, fuzzing and examples.
//!
//! What must always hold, whatever a guest writes and whoever runs beside it:
//! 1. Pins equal live mappings and copies in flight; marks in shared memory tell the truth about
//!    pins; no page reference is lost or dropped twice.
//! 2. Shared words are read once and the copy is judged; only `shared` touches them.
//! 3. No panic, no loop without bound, no allocation on the way through map, unmap and copy but for
//!    the growth of the handle list.
//! 4. Operations on different references never wait for each other, but for the rare ones that
//!    need a table to themselves: a change of version, a swap, the removal of a domain.
//!
//! The locks, which are few: `active` explains the word that stands for a lock on an entry,
//! `registry` how a table is had exclusively without a lock on the readers' side, `maptrack` how
//! handles are found. Spec sections in the comments are those of the behavioural specification that
//! the project follows (`grant-tables.md`).
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, loom))]
extern crate std;

mod active;
mod ahead;
mod args;
mod bound;
mod cache;
mod caller;
mod claim;
mod copy;
mod domain;
mod door;
mod dump;
mod engine;
mod hypervisor;
mod iommu;
mod lazy;
#[cfg(feature = "machine")]
pub mod machine;
mod map;
mod maptrack;
mod memory_op;
#[cfg(loom)]
#[cfg(test)]
mod models;
mod observe;
mod pages;
mod presence;
mod registry;
mod segments;
mod setup;
mod shared;
mod swap;
mod sync;
mod table;
mod teardown;
mod transfer;
mod unmap;
mod version;

pub use active::PinCounts;
pub use ahead::{fetch_to_read, fetch_to_write};
pub use domain::{
    Config, CreateError, Domain, Limits, MAX_GRANT_FRAMES, MAX_MAPTRACK_FRAMES, OpSet, Reference, Vcpu,
    Version,
};
pub use door::{Call, Fault, GuestMemory, Outcome};
pub use engine::{Engine, Processor};
pub use hypervisor::{
    Access, DomainKind, FrameOwner, Hook, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError,
    Resolved, StealError,
};
pub use memory_op::MemoryOutcome;
pub use observe::{Answered, DomainView, EntryCounts, EntryView, EntryWords, MappingView};
pub use setup::{TableResource, TableSize};
pub use shared::PageWords;
pub use teardown::{InUse, Release, Retired};
pub use unmap::UNMAP_GROUP;
