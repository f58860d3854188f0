//! Both ends in one process, for tests, benches, fuzzing and examples: an in-memory [`FakeDomain`] whose
//! pages are granted and mapped for real, a [`RamDisk`], an [`Event`] to wait on, and peers that lie.
//!
//! Needs `std`; behind the feature `fake`.

mod disk;
mod domain;
mod event;
mod hostile;
mod rig;
mod store;

pub use disk::{Call, RamDisk};
pub use domain::{FakeDomain, FakeGrantee, FakeGranter, FakeMapping, FakePages, FaultPoint};
pub use event::{Event, NullPort};
pub use hostile::{HostileBackend, HostileFrontend};
pub use rig::{Rig, RigConfig};
pub use store::{MemoryStore, MemoryStoreError, StoreConnection};
