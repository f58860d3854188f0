//! What an export needs from a disk: requests go in, completions come out, many at a time.
//!
//! The NBD server stands on [`BlockDevice`] alone, so the same server runs over a plain file (the baseline to measure
//! against) and over a blkif frontend whose disk lives in another domain.
//!
//! What must hold: a device answers every request that it took exactly once, whatever happens to whoever asked;
//! a write that was answered is seen by every later read; a flush answered means that every write answered before
//! the flush was submitted, on any queue of the device, survives a crash.

use std::os::fd::BorrowedFd;

pub(crate) use gnttab_io::blkif::{Data, Lease};
use gnttab_io::shared::SharedSliceMut;

/// What a disk is and can do. The same for every queue of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes, a multiple of `block_size`.
    pub(crate) size: u64,
    /// Smallest unit of an access, in bytes; a power of two, 512 at least.
    pub(crate) block_size: u32,
    /// Size in bytes that suits the disk best for single accesses.
    pub(crate) preferred_size: u32,
    /// No writes, no discards.
    pub(crate) read_only: bool,
    /// Flush makes earlier answered writes durable. Without it there is nothing to flush.
    pub(crate) flush: bool,
    /// Discard is more than an error.
    pub(crate) discard: bool,
}

/// What to do with the bytes `offset .. offset + length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Fill `data`.
    Read,
    /// Store `data`; with `fua` it is durable before the answer.
    Write {
        /// Durable before the answer.
        fua: bool,
    },
    /// Make every write answered so far durable. Offset and length are 0.
    Flush,
    /// The content is not needed any more; afterwards it is anything.
    Discard,
    /// The content is zero afterwards.
    WriteZeroes {
        /// Durable before the answer.
        fua: bool,
        /// Keep the blocks allocated.
        no_hole: bool,
    },
}

/// One access. Whoever makes it has checked it against the [`Geometry`]: inside the disk, whole blocks, and nothing that
/// changes a read-only disk.
#[derive(Debug)]
pub(crate) struct Request {
    /// Chosen by whoever asks, given back in the completion.
    pub(crate) tag: u64,
    /// What to do.
    pub(crate) operation: Operation,
    /// First byte on the disk.
    pub(crate) offset: u64,
    /// How many bytes.
    pub(crate) length: u32,
    /// `length` bytes for a read (content irrelevant) and a write, empty otherwise. What is leased, this disk has lent.
    pub(crate) data: Data,
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub(crate) struct Completion {
    /// The request's.
    pub(crate) tag: u64,
    /// Whether it was done.
    pub(crate) result: Result<(), DeviceError>,
    /// The request's buffer, or private memory in its place; filled if it was a read that succeeded.
    pub(crate) data: Data,
}

/// Why a disk did not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The medium or the way to it failed.
    #[error("input/output error")]
    Io,
    /// The disk cannot do this operation.
    #[error("operation not supported by the disk")]
    Unsupported,
    /// The place where the image lives is full.
    #[error("no space left where the image lives")]
    NoSpace,
}

/// Pages that a disk lends, so that data goes between it and whoever asks without a copy.
pub(crate) trait Pages {
    /// Pages for `len` bytes, if there are some to lend. What is in them is anything.
    fn lease(&mut self, len: usize) -> Option<Lease>;

    /// Takes them back.
    fn give_back(&mut self, lease: Lease);

    /// Their memory, from byte `from` on. It is shared: see [`SharedSliceMut`].
    fn parts(&self, lease: &Lease, from: usize) -> Vec<SharedSliceMut<'_>>;
}

/// Of a disk that lends none.
pub(crate) struct NoPages;

impl Pages for NoPages {
    fn lease(&mut self, _: usize) -> Option<Lease> {
        None
    }

    fn give_back(&mut self, _: Lease) {}

    fn parts(&self, _: &Lease, _: usize) -> Vec<SharedSliceMut<'_>> {
        Vec::new()
    }
}

/// One queue of a disk, owned by one thread.
pub(crate) trait BlockDevice: Send {
    /// What the disk is.
    fn geometry(&self) -> Geometry;

    /// The pages that it lends.
    fn pages(&mut self) -> impl Pages + '_;

    /// Takes a request. A queue that is full keeps it until there is room; whoever submits bounds how many there are.
    fn submit(&mut self, request: Request);

    /// Tells the disk that no more requests follow for now; whatever was submitted must be under way afterwards.
    fn kick(&mut self);

    /// Adds what has been answered since the last call. Whether the disk did anything since then, be it a part of what was
    /// asked: if not, an event that came was for nothing.
    fn completions(&mut self, into: &mut Vec<Completion>) -> bool;

    /// Before sleeping until the event: waits for a moment, if `awake` and if answers are likely in it. Whether
    /// [`completions`](Self::completions) has something; only if not will the event tell. A disk without an event has
    /// nothing to wait for.
    fn linger(&mut self, _awake: bool) -> bool {
        false
    }

    /// The event was readable: makes it unreadable until there is something new.
    fn hush(&mut self);

    /// Readable when [`completions`](Self::completions) may have something new, once [`linger`](Self::linger) said no.
    /// `None`: everything is answered by the time [`kick`](Self::kick) returns.
    fn event(&self) -> Option<BorrowedFd<'_>>;
}
