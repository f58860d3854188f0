//! The guest's half of Xen's grant tables: allocate references, grant pages, end that, and map
//! what others grant.
//!
//! `no_std` with `alloc`. The same code runs in a kernel with one processor or many, in a process
//! that is a domain, and against a machine in memory: what differs between them is behind three
//! small traits, [`Hypercall`], [`Granter`] and [`Grantee`].
//!
//! What must always hold, whatever the other domain does:
//! 1. A page that a peer may use is owned by its [`Grant`], then by the [`Pending`] end or the
//!    queue. It comes out when one atomic attempt to end access has succeeded, and in no other way.
//! 2. The same for the reference: an [`OwnedRef`] is not `Copy`, and is either free, granted or
//!    pending.
//! 3. A peer that never lets go costs the page that it was given, and nothing else: no panic, no
//!    wait without end, no reuse.
//! 4. The status of every item of every batch is looked at; an address where a foreign page may
//!    still lie is never used again.
//! 5. Words of the table are touched in one module, through atomics, in the header's order; that
//!    module is the only one with `unsafe`, and its order is model-checked.
//!
//! # One session
//!
//! Domain 1 grants a page to domain 2, which maps it; domain 1 wants it back while domain 2 still
//! has it. `front` and `back` are what each domain runs on.
//!
//! ```
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/fake.rs"));
//! use gnttab_guest::{Access, Config, GrantTable, MapRequest, Mapper, Window};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let machine = Machine::new();
//! # let (front, back) = (machine.domain(DomId(1)), machine.domain(DomId(2)));
//! // Domain 1: the table once, a private list of references for each device.
//! let table = GrantTable::start(Arc::clone(&front), Config::default())?;
//! let mut refs = table.alloc(32)?;
//!
//! // For a request: a reference and a page become a grant.
//! let gref = refs.claim().ok_or("all references are in flight")?;
//! let grant = table.grant_zeroed(gref, DomId(2), front.page(), Access::ReadWrite)?;
//!
//! // Domain 2 was told the number, over a ring or the store. It maps into addresses set aside.
//! let mapper = Mapper::new(Arc::clone(&back), Window::new(0x1_0000_0000, 64)?)?;
//! let request = MapRequest { dom: DomId(1), gref: grant.gref(), access: Access::ReadWrite };
//! let mapping = mapper.map_one(request)?;
//! assert_eq!(mapping.host_addr(), 0x1_0000_0000);
//!
//! // Domain 1 wants its page back, too early: it gets a ticket instead of the page.
//! let pending = grant.end().expect_err("domain 2 still has it");
//! assert_eq!(table.pending()[0].peer, DomId(2));
//!
//! // Domain 2 lets go; now both come back, and the reference can be claimed again.
//! mapping.unmap()?;
//! let (gref, page) = pending.retry().expect("nobody has it");
//! refs.release(gref);
//! # drop(page);
//! # Ok(())
//! # }
//! ```
//!
//! # Where to start
//!
//! * To bring this to a new kernel: implement [`Hypercall`] and [`Granter`]; [`Call::encode`] and
//!   [`Call::decode`] do the bytes of a raw hypercall, [`reach`] the placing of table frames.
//! * A frontend: [`GrantTable`], and a timer that calls [`GrantTable::retry_pending`].
//! * A backend: [`Grantee`] and a [`Mapper`]; [`retry::copy`] where copying is enough.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod call;
mod consumer;
mod free;
mod grant;
mod map_error;
mod mapping;
mod pending;
mod platform;
mod queue;
pub mod reach;
mod refs;
pub mod retry;
mod sync;
mod table;
mod transfer;
mod version;
mod window;
mod words;

pub use call::{Call, RawCall, RawCallError};
pub use consumer::{ConsumerStats, TooManyConsumers};
pub use grant::{Access, Grant, GrantError, GrantRefused, GrantResult, Part, StillWritable, TransitiveGrant};
pub use map_error::{MapError, UnmapError, UnmapFailure};
pub use mapping::{MapRequest, MappedRun, Mapper, Mapping};
pub use pending::{Pending, Retried};
pub use platform::{FrameKind, Grantee, Granter, Hypercall, Page};
pub use queue::PendingView;
pub use reach::ReachError;
pub use refs::{Batch, OwnedRef, Run};
pub use table::{AllocError, Config, GrantTable, StartError, TableStats, TooManyWaiters};
pub use transfer::{OfferEnd, TransferOffer};
pub use version::{Version, VersionStuck};
pub use window::{Window, WindowError, WindowStats};
pub use words::TableFrame;
