//! A XenStore: tree, permissions, watches, transactions, quotas and wire protocol.
//!
//! The XenStore is the small database through which the domains of a machine
//! find each other: a tree of short values, in which the toolstack describes
//! devices, and frontends and backends tell each other ring references, event
//! channels and states. This crate is the whole of one, in layers of which each
//! knows only those above it in this list:
//!
//! - [`path`] and [`perms`]: what a path and a list of permissions can be;
//! - [`wire`]: the messages, raw and typed, from any source of bytes;
//! - [`Store`]: the database, a state machine without input or output;
//! - `client` (feature `std`): a blocking client over any stream;
//! - `server` (feature `server`): the store served on Unix sockets, for
//!   domains that are processes, and for the `xenstore-*` tools unchanged.
//!
//! Without its default features it is `no_std` and needs `alloc` only.
//!
//! # A session
//!
//! ```
//! # #[cfg(feature = "server")] {
//! use gnttab_xenstore::client::Nodes as _;
//! use gnttab_xenstore::server::Server;
//! use gnttab_xenstore::{DomId, Quotas};
//! use std::time::{Duration, Instant};
//!
//! // The monitor of the machine runs the store and prepares a domain's home.
//! let server = Server::new(Quotas::default()).spawn()?;
//! let mut toolstack = server.connect()?;
//! let guest = DomId::new(5);
//! server.introduce_domain(guest)?;
//! toolstack.mkdir("/local/domain/5/device/vbd/51712")?;
//! toolstack.set_perms("/local/domain/5/device/vbd/51712", &"n5,r0".parse()?)?;
//! toolstack.write("/local/domain/5/device/vbd/51712/state", "1")?;
//!
//! // The domain has a socket, and what it may do hangs on that socket.
//! let mut frontend = server.connect_domain(guest)?;
//! frontend.transaction(|tx| {
//!     tx.write("device/vbd/51712/ring-ref", "8")?;
//!     tx.write("device/vbd/51712/state", "3")
//! })?;
//!
//! // Whoever waits for a state is told.
//! let deadline = Instant::now() + Duration::from_secs(5);
//! toolstack.wait_for("/local/domain/5/device/vbd/51712/state", deadline, |state| {
//!     (state == Some(b"3")).then_some(())
//! })?;
//! assert_eq!(toolstack.read("/local/domain/5/device/vbd/51712/ring-ref")?, b"8");
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(all(test, not(feature = "std")))]
extern crate std;

mod dom;
mod errno;
mod ops;
pub mod path;
pub mod perms;
mod queue;
mod quota;
mod store;
mod transaction;
mod tree;
mod watch;
pub mod wire;

#[cfg(feature = "std")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;

pub use dom::DomId;
pub use errno::Errno;
pub use quota::Quotas;
pub use store::{ConnId, Effect, NoSuchConnection, Outcome, Store};
