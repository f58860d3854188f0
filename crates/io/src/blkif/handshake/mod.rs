//! How the two sides of a block device find each other (spec 2.5 to 2.8, 6).
//!
//! The toolstack makes both directories ([`create`]); the backend's [`BackendHandshake`] and the frontend's
//! [`FrontendHandshake`] then lead each other to Connected through their states:
//!
//! | step | frontend | backend |
//! |---|---|---|
//! | 1 | 1 Initialising | says its limits, 2 InitWait |
//! | 2 | [`FrontendEvent::Setup`]: opens rings, says where, 3 Initialised | |
//! | 3 | | [`BackendEvent::Connect`]: maps them, says what the disk is, 4 Connected |
//! | 4 | [`FrontendEvent::Connect`]: 4 Connected | |
//!
//! Each is driven by `advance`, which may be called at any time: see the rules of [`xenbus`](crate::xenbus).
//! An event is repeated until the call that answers it was made.
//!
//! ```
//! use gnttab_abi::{Abi, DomId, GrantRef};
//! use gnttab_io::blkif::DiskInfo;
//! use gnttab_io::blkif::handshake::*;
//! use gnttab_io::fake::MemoryStore;
//! use gnttab_io::xenbus::EventPort;
//!
//! let store = MemoryStore::new();
//! let (mut dom0, mut dom3, mut dom5) = (store.connect(DomId(0)), store.connect(DomId(3)), store.connect(DomId(5)));
//! let paths = create(&mut dom0, &VbdSpec::new(DomId(5), DomId(3), VirtualDevice::xvd(0, 0)))?;
//!
//! let mut back = BackendHandshake::probe(&mut dom3, &paths.backend, BackendLimits::default())?;
//! let mut front = FrontendHandshake::probe(&mut dom5, &paths.frontend, true)?;
//! assert_eq!(back.advance(&mut dom3)?, BackendEvent::Idle);
//!
//! let FrontendEvent::Setup(limits) = front.advance(&mut dom5)? else { panic!("the backend waits") };
//! assert_eq!(limits.max_ring_page_order, 4);
//! let queue = QueueOffer { ring: vec![GrantRef(8)], event_channel: EventPort(1) };
//! front.publish(&mut dom5, Abi::X86_64, &[queue])?;
//!
//! let BackendEvent::Connect(offer) = back.advance(&mut dom3)? else { panic!("the frontend has spoken") };
//! assert_eq!(offer.queues[0].ring, [GrantRef(8)]);
//! back.connected(&mut dom3, &DiskInfo::new(1024))?;
//!
//! let FrontendEvent::Connect(device) = front.advance(&mut dom5)? else { panic!("the backend is ready") };
//! assert_eq!(device.disk.sectors, 1024);
//! front.connected(&mut dom5)?;
//! assert_eq!(front.advance(&mut dom5)?, FrontendEvent::Idle);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod backend;
mod frontend;
mod keys;
mod toolstack;

pub use backend::{BackendEvent, BackendHandshake};
pub use frontend::{FrontendEvent, FrontendHandshake};
pub use keys::{BackendLimits, FrontendOffer, QueueOffer};
pub use toolstack::{
    DeviceMode, VbdPaths, VbdSpec, VirtualDevice, create, is_closed, remove, replace_backend, take_offline,
};
