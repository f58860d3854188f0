//! What goes into a frontend's queue and what comes out of it.

use alloc::vec::Vec;

use gnttab_abi::{Abi, GrantRef};

use crate::blkif::disk::DiskInfo;
use crate::blkif::request::BadRequest;
use crate::grants::GrantError;
use crate::ring::{RingBroken, ShapeError};

/// How a frontend queue works, whoever its peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendConfig {
    /// Layout of the ring.
    pub abi: Abi,
    /// The device's number, sent along in requests.
    pub handle: u16,
    /// Most segments of an indirect request; the backend's own limit counts too. 11 or less: none are sent.
    pub max_indirect: u16,
    /// Most pages that data is bounced through; three quarters of them may be leased.
    pub max_pages: usize,
}

impl FrontendConfig {
    /// Up to 64 segments a request, twice as many as Linux: what NBD clients copy with, 256 KiB, goes in one. Pages as
    /// Linux has them, for a full ring of one page of requests of 32 segments.
    #[must_use]
    pub const fn new(abi: Abi) -> FrontendConfig {
        FrontendConfig {
            abi,
            handle: 0,
            max_indirect: 64,
            max_pages: 32 * 33,
        }
    }
}

/// What a backend said of the device and of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    /// The disk. `flush` stands for `feature-flush-cache`.
    pub disk: DiskInfo,
    /// `feature-barrier`, used where there is no flush.
    pub barrier: bool,
    /// Both sides said `feature-persistent`.
    pub persistent: bool,
    /// `feature-max-indirect-segments`; 0 for none.
    pub max_indirect: u16,
}

/// Where the data of an operation lies.
#[derive(Debug, PartialEq, Eq)]
pub enum Data {
    /// In the caller's memory: it is copied into pages that the peer can reach, or out of them.
    Own(Vec<u8>),
    /// In pages of the queue that the peer reaches as they are: nothing is copied.
    Leased(Lease),
}

/// Pages of a queue that somebody has borrowed to put data there, or to find it there.
///
/// They come from [`FrontendQueue::lease`](super::FrontendQueue::lease) and go back by
/// [`FrontendQueue::give_back`](super::FrontendQueue::give_back), unless an operation takes them along. Having
/// one tells you: the pages are nobody else's in this domain. It does not tell you what is in them: what was
/// there before, and where grants persist the peer may write them at any time.
#[derive(Debug, PartialEq, Eq)]
pub struct Lease {
    pub(super) number: u64,
    pub(super) len: usize,
}

impl Lease {
    /// Bytes that it was taken for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it was taken for no data at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Data {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Data::Own(bytes) => bytes.len(),
            Data::Leased(lease) => lease.len,
        }
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The caller's own memory, if it is that.
    #[must_use]
    pub fn into_own(self) -> Option<Vec<u8>> {
        match self {
            Data::Own(bytes) => Some(bytes),
            Data::Leased(_) => None,
        }
    }
}

impl Default for Data {
    fn default() -> Data {
        Data::Own(Vec::new())
    }
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Data {
        Data::Own(bytes)
    }
}

impl PartialEq<Vec<u8>> for Data {
    /// Whether it is the caller's memory with these bytes.
    fn eq(&self, other: &Vec<u8>) -> bool {
        matches!(self, Data::Own(bytes) if bytes == other)
    }
}

/// An operation on the device. Sectors are of 512 bytes; all must be whole logical sectors of the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Io {
    /// Fills the whole buffer from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// What to fill; its length is the length of the read.
        data: Data,
    },
    /// Writes the whole buffer from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// What to write.
        data: Data,
    },
    /// Makes all writes durable that were completed before this was submitted.
    Flush,
    /// Forgets the content of sectors.
    Discard {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
        /// For good.
        secure: bool,
    },
}

/// An operation that has ended, and the buffer it brought. Data that was leased is in memory of the caller's own if the
/// connection was lost meanwhile.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`FrontendQueue::submit`](super::FrontendQueue::submit) was given.
    pub token: u64,
    /// The operation, with the data of a read.
    pub io: Io,
    /// How it ended. After an error the content of a read's buffer, or of a write's sectors, is any mixture.
    pub result: Result<(), IoError>,
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The backend failed to do it.
    #[error("the backend reports an input/output error")]
    Failed,
    /// The backend does not do this.
    #[error("the backend does not support the operation")]
    NotSupported,
    /// There are no pages or references to do it with.
    #[error(transparent)]
    Grant(#[from] GrantError),
}

/// An operation that was not accepted; it comes back whole.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Rejected {
    /// The operation.
    pub io: Io,
    /// Why.
    pub reason: RejectReason,
}

/// Why an operation was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RejectReason {
    /// It does not fit the disk.
    #[error(transparent)]
    Request(#[from] BadRequest),
    /// The buffer is empty or no whole sectors.
    #[error("a buffer of {0} bytes is not one or more whole sectors")]
    Length(usize),
    /// The data is in pages that this queue has not lent.
    #[error("the pages of the data are not lent by this queue")]
    NotLent,
    /// Nothing is known of the device: no backend was ever connected.
    #[error("no backend was connected yet")]
    NeverConnected,
}

/// The backend broke the protocol: the device is of no use until it is connected anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceBroken {
    /// By its producer index.
    #[error(transparent)]
    Ring(#[from] RingBroken),
    /// By an identifier that is not outstanding.
    #[error("the response's identifier {0:#x} names no outstanding request")]
    UnknownId(u64),
    /// By the operation of its response.
    #[error("the response to {id:#x} names operation {got}, the request was {expected}")]
    WrongOperation {
        /// The request.
        id: u64,
        /// Its operation.
        expected: u8,
        /// The response's.
        got: u8,
    },
    /// By keeping a page mapped, without persistent grants.
    #[error("the backend still maps reference {0} of a finished request")]
    StillMapped(GrantRef),
}

/// A queue could not be opened. Nothing stays granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No such ring.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// No pages or references for it.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// There is a connection already.
    #[error("the queue is open already")]
    AlreadyOpen,
}

/// What a queue waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Awaited {
    /// Requests whose answers can be taken.
    pub answered: u32,
    /// Requests whose answers are still to come.
    pub unanswered: u32,
}

/// What a queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// Requests put on the ring.
    pub requests: u64,
    /// Responses taken from it.
    pub responses: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Operations that failed.
    pub failures: u64,
    /// Operations sent again after a reconnect.
    pub requeued: u64,
    /// Times that the peer was notified.
    pub notifications: u64,
}
