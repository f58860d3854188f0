//! Shared rings and the split-driver protocols on them: blkif, frontend and backend.
//!
//! # The parts
//! | module | what it is |
//! |---|---|
//! | [`shared`] | memory that a hostile peer can write; the one module with `unsafe` |
//! | [`ring`] | the request/response ring, both ends, over one page or several |
//! | [`grants`] | what the drivers need of grant tables: [`Granter`](grants::Granter), [`Grantee`](grants::Grantee), [`Notify`](grants::Notify) |
//! | [`throttle`] | how long to ignore a peer that sends events for nothing |
//! | [`blkif`] | the block protocol: layouts of three ABIs, typed requests, [`BackendQueue`](blkif::BackendQueue), [`FrontendQueue`](blkif::FrontendQueue) |
//! | [`blkif::handshake`] | how the two sides of a block device find each other in the XenStore, and the toolstack's part |
//! | [`xenbus`] | what every handshake needs: states, and a small [`Store`](xenbus::Store) trait |
//! | `fake` | (feature `fake`) both ends in one process: an in-memory granter and grantee, a RAM disk, hostile peers |
//!
//! # To put it on a machine
//! A **backend** program implements [`Grantee`](grants::Grantee) (map, unmap and copy a peer's references),
//! [`Notify`](grants::Notify) and [`Disk`](blkif::Disk), then for each queue: `BackendQueue::connect`, and
//! `process` at every event. A **frontend** program implements [`Granter`](grants::Granter) and `Notify`, then
//! for each queue: `FrontendQueue::open` (gives the references to publish), `start` once the backend is
//! connected, and `submit`, `kick`, `poll`.
//!
//! Both drive a handshake over their [`Store`](xenbus::Store), which says when to do what: see
//! [`blkif::handshake`], where the toolstack's part is too. [`BlockDevice`](blkif::BlockDevice) puts several
//! frontend queues and a blocking form on top, for one thread.
//!
//! Raw mapped memory comes in through [`SharedPages::from_raw`](shared::SharedPages::from_raw), and goes to
//! the disk as [`SharedSlice`](shared::SharedSlice), which has the layout of `struct iovec`.
//!
//! The crate is `no_std` with `alloc`. It takes no clock, no thread and no lock; time is told to it.
//!
//! # The other side is hostile
//! Each rule of the security catalogue (PVR-1 to PVR-10), where it is kept, and the test that fails without it:
//!
//! | rule | kept by | held by (in `tests/`) |
//! |---|---|---|
//! | 1 indexes are checked before any loop | [`ring`], rule 2 | `ring.rs` `t38_*`; `t39_*`, `pvr1_*` in `hostile_*.rs` |
//! | 2 copied out of shared memory once | [`shared`], rules 1 and 2 | `hostile_frontend.rs` `t155_*` |
//! | 3 identifiers name something outstanding, once | `blkif/frontend`, rule 2 | `hostile_backend.rs` `tl10_*`, `pvr3_*` |
//! | 4 what is written is whole | [`ring`], rule 3 | `hostile_frontend.rs` `t216_*`, `ring.rs` |
//! | 5 lengths and ranges in wide arithmetic | [`blkif::Segment`], [`blkif::Request::parse`], [`blkif::DiskInfo::check`] | `t513_*` beside them, `pvr5_*` in `hostile_frontend.rs` and `lifecycle.rs` |
//! | 6 error paths release once | `blkif/backend`, rule 3 | `hostile_frontend.rs` `t365_*` (T-71, T-362, T-371) |
//! | 7 bounded use | budgets, limits, [`throttle`] | `pvr7_*`, `pvr9_*`, `t332_*` |
//! | 8 any order of connecting and leaving | [`blkif::handshake`] | `lifecycle.rs` `any_order_*` (T-350, T-465) |
//! | 9 persistent mappings are counted and freed | `blkif/backend/persistent.rs` | `hostile_frontend.rs` `pvr9_*`, `data_path.rs` |
//! | 10 private state decides | [`ring`], rule 1 | `pvr10_*` in `hostile_*.rs`, T-313 in `t155_*` |
//!
//! ```
//! use gnttab_abi::Abi;
//! use gnttab_io::blkif::*;
//! use gnttab_io::fake::{Event, FakeDomain, RamDisk};
//!
//! let disk = RamDisk::new(1024);
//! let domain = FakeDomain::new();
//! let (to_backend, to_frontend) = (Event::new(), Event::new());
//!
//! // The frontend makes and grants a ring of one page, the backend maps it.
//! let mut front = FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
//! let ring = front.open(1, to_backend.clone())?;
//! let config = BackendConfig::new(Abi::X86_64, true);
//! let mut back = BackendQueue::connect(domain.grantee(), &ring, config, disk.info())?;
//! front.start(DeviceProperties { disk: disk.info(), barrier: false, persistent: true, max_indirect: 256 });
//!
//! front.submit(1, Io::Write { sector: 8, data: vec![0xA5; 4096].into() })?;
//! front.submit(2, Io::Flush)?;
//! front.kick();
//! assert!(to_backend.take());
//! back.process(&disk, &mut to_frontend.clone(), 32)?;
//! assert!(to_frontend.take());
//! assert_eq!(front.poll()?.expect("the write").result, Ok(()));
//! assert_eq!(front.poll()?.expect("the flush").result, Ok(()));
//! assert_eq!(front.poll()?, None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "fake"))]
extern crate std;

pub mod blkif;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod grants;
pub mod ring;
pub mod shared;
mod sync;
pub mod throttle;
mod words;
pub mod xenbus;
