//! How mapping and unmapping fail.

use gnttab_abi::{DomId, Errno, GrantHandle, GrantRef, GrantStatus};

/// A page was not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The hypervisor refused it.
    #[error("cannot map reference {gref} of {dom}: {status}")]
    Status {
        /// The domain that granted it, or did not.
        dom: DomId,
        /// The reference.
        gref: GrantRef,
        /// Why.
        status: GrantStatus,
    },
    /// The hypercall ended before it came to this page, or while it was at it.
    #[error("cannot map reference {gref} of {dom}: the hypercall answered {errno}")]
    Call {
        /// The domain that granted it.
        dom: DomId,
        /// The reference.
        gref: GrantRef,
        /// What the hypercall answered.
        errno: Errno,
    },
    /// This domain could not enter the page in tables of its own; it was unmapped again.
    #[error("reference {gref} of {dom} was mapped, but this domain could not take it in: {errno}")]
    NotEntered {
        /// The domain that granted it.
        dom: DomId,
        /// The reference.
        gref: GrantRef,
        /// What [`Grantee::after_map`](crate::Grantee::after_map) said.
        errno: Errno,
    },
    /// The window has too few free pages (following one another, for a run). Nothing was mapped.
    #[error("no addresses for {wanted} foreign pages: {free} are free")]
    WindowFull {
        /// Pages wanted.
        wanted: u32,
        /// Pages free.
        free: u32,
    },
    /// No memory for the bookkeeping of the batch. Nothing was mapped.
    #[error("no memory to map {0} foreign pages at once")]
    NoMemory(usize),
}

impl MapError {
    /// The status to pass on where only a status can be told: the hypervisor's own, and for what
    /// failed on this side *no_space* or *general_error*.
    #[must_use]
    pub const fn status(&self) -> GrantStatus {
        match self {
            MapError::Status { status, .. } => *status,
            MapError::Call { .. } | MapError::NotEntered { .. } => GrantStatus::GENERAL_ERROR,
            MapError::WindowFull { .. } | MapError::NoMemory(_) => GrantStatus::NO_SPACE,
        }
    }
}

/// Why one mapping could not be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnmapFailure {
    /// The hypervisor refused.
    #[error("{0}")]
    Status(GrantStatus),
    /// The hypercall ended before it came to it, or while it was at it.
    #[error("the hypercall answered {0}")]
    Call(Errno),
    /// This domain could not take it out of tables of its own.
    #[error("this domain could not take it out of its own tables: {0}")]
    NotLeft(Errno),
}

/// Some mappings could not be undone. Their addresses are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{failed} of {total} mappings could not be undone; the one at {host_addr:#x} (handle {handle}): {reason}"
)]
pub struct UnmapError {
    /// How many failed.
    pub failed: usize,
    /// How many were to be undone.
    pub total: usize,
    /// The address of the first that failed.
    pub host_addr: u64,
    /// Its handle.
    pub handle: GrantHandle,
    /// Why it failed.
    pub reason: UnmapFailure,
}

/// How a number of unmaps went.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) total: usize,
    failed: usize,
    first: Option<(u64, GrantHandle, UnmapFailure)>,
}

impl Tally {
    pub(crate) fn note(&mut self, host_addr: u64, handle: GrantHandle, reason: UnmapFailure) {
        self.failed += 1;
        self.first.get_or_insert((host_addr, handle, reason));
    }

    pub(crate) fn result(self) -> Result<(), UnmapError> {
        let Tally { total, failed, first } = self;
        match first {
            None => Ok(()),
            Some((host_addr, handle, reason)) => Err(UnmapError {
                failed,
                total,
                host_addr,
                handle,
                reason,
            }),
        }
    }
}
