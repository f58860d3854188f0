//! How a backend's queue is set, and what it reports.

use gnttab_abi::{Abi, GrantStatus};

use crate::blkif::disk::DiskError;
use crate::blkif::request::{BadRequest, Status};
use crate::ring::AttachError;

/// How a queue serves its peer: what was negotiated, and what is ours to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendConfig {
    /// Layout of the ring.
    pub abi: Abi,
    /// Both sides said `feature-persistent`.
    pub persistent: bool,
    /// Mappings that are kept, where persistent grants were negotiated.
    pub persistent_limit: usize,
    /// Segments of an indirect request, as advertised; 0 for none, at most 4096.
    pub max_indirect: u16,
    /// What is done with pages that are not kept.
    pub one_shot: OneShot,
}

impl BackendConfig {
    /// Linux's limits: 256 indirect segments, 1056 persistent mappings, one-shot pages mapped.
    #[must_use]
    pub const fn new(abi: Abi, persistent: bool) -> BackendConfig {
        BackendConfig {
            abi,
            persistent,
            persistent_limit: 1056,
            max_indirect: 256,
            one_shot: OneShot::Map,
        }
    }
}

/// How a page that is used for one request only is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OneShot {
    /// Mapped, and unmapped before the answer.
    Map,
    /// Copied through a buffer by the hypervisor.
    Copy,
}

/// What a call of [`BackendQueue::process`](super::BackendQueue::process) did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests answered. None at all: the event that led here was spurious.
    pub served: u32,
    /// The budget was used up and there may be more: call again without waiting for an event.
    pub more: bool,
}

/// What a queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Read requests done.
    pub reads: u64,
    /// Write requests done.
    pub writes: u64,
    /// Flushes and barriers done.
    pub flushes: u64,
    /// Discards done.
    pub discards: u64,
    /// Bytes read from the disk.
    pub bytes_read: u64,
    /// Bytes written to the disk.
    pub bytes_written: u64,
    /// Requests refused or failed.
    pub failures: u64,
    /// Pages mapped, for good or for one request.
    pub mapped: u64,
    /// Pages copied by the hypervisor.
    pub copied: u64,
    /// Times that the peer was notified.
    pub notifications: u64,
}

impl BackendStats {
    /// Bytes moved, either way.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes_read + self.bytes_written
    }
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It was refused.
    #[error(transparent)]
    Request(#[from] BadRequest),
    /// One of its pages could not be mapped or copied.
    #[error("a page of the request: {0}")]
    Grant(GrantStatus),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl Failure {
    /// The status that answers it.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Failure::Request(bad) => bad.status(),
            Failure::Disk(DiskError::NotSupported) => Status::NotSupported,
            Failure::Grant(_) | Failure::Disk(DiskError::Failed) => Status::Error,
        }
    }
}

/// A queue could not be connected. Nothing stays mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The ring's pages could not be mapped.
    #[error("mapping the ring: {0}")]
    Map(GrantStatus),
    /// They hold no ring.
    #[error(transparent)]
    Attach(#[from] AttachError),
}
