//! The block protocol (spec 2): a frontend's sectors served by a backend through granted pages.

mod backend;
mod device;
mod disk;
mod frontend;
pub mod handshake;
mod layout;
mod request;

pub use backend::{BackendConfig, BackendQueue, BackendStats, ConnectError, Failure, OneShot, Progress};
pub use device::{BlockDevice, BlockingError};
pub use disk::{DiscardInfo, Disk, DiskError, DiskInfo};
pub use frontend::{
    Awaited, Completion, Data, DeviceBroken, DeviceProperties, FrontendConfig, FrontendQueue, FrontendStats,
    Io, IoError, Lease, OpenError, RejectReason, Rejected,
};
pub use layout::{
    ABSENT_PROTOCOL, MAX_DIRECT_SEGMENTS, MAX_INDIRECT_PAGES, MAX_INDIRECT_SEGMENTS, MAX_SLOT,
    NATIVE_PROTOCOL, RawResponse, RawSegment, SECTOR_SIZE, SECTORS_PER_PAGE, SEGMENT_SIZE,
    SEGMENTS_PER_INDIRECT_PAGE, Slot, protocol_from_name, protocol_name, response_size, slot_size,
};
pub use request::{
    BadRequest, Direct, Direction, Discard, Indirect, Operation, Request, Segment, Status, Transfer, answer,
    indirect_pages_for,
};
