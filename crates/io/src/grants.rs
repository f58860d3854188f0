//! What the ring drivers need of the grant tables, as two small traits: one for each side of a grant.
//!
//! A kernel, the host and the in-memory rig implement them; the drivers know no hypercall. Each queue of a
//! device owns its implementation, so queues can live on threads of their own; implementations that share a
//! table share it inside.

use alloc::vec::Vec;

use gnttab_abi::{GrantRef, GrantStatus};

pub use crate::shared::Access;
use crate::shared::SharedPages;

/// Pages and references of this domain that it grants to one peer.
pub trait Granter {
    /// A contiguous run of this domain's pages that can be granted.
    ///
    /// Drivers give it back through [`Granter::retire`]; one that is merely dropped may leak its pages but
    /// must not free a page that is still granted.
    type Pages: AsRef<SharedPages>;

    /// Takes `pages` contiguous, zeroed, writable pages.
    ///
    /// # Errors
    /// [`GrantError`] if there are none.
    fn alloc(&mut self, pages: usize) -> Result<Self::Pages, GrantError>;

    /// Grants page `index` of the run to the peer.
    ///
    /// # Errors
    /// [`GrantError`] if there is no reference left.
    fn grant(&mut self, pages: &Self::Pages, index: usize, access: Access) -> Result<GrantRef, GrantError>;

    /// Tries once, atomically, to end the peer's access (GST-1). `true`: access has ended for good and the
    /// reference is free. `false`: the peer still maps the page, and the grant stays in force as it was.
    fn end(&mut self, gref: GrantRef) -> bool;

    /// Takes a run back. References in `still_granted` belong to its pages and could not be ended: the pages
    /// and the references may be used again only after each has been (GST-2).
    fn retire(&mut self, pages: Self::Pages, still_granted: Vec<GrantRef>);
}

/// Why nothing was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// No page to grant.
    #[error("no page left to grant")]
    NoPages,
    /// No reference, and the table cannot grow.
    #[error("no grant reference left")]
    NoReferences,
}

/// References of one peer that this domain maps, or copies through.
pub trait Grantee {
    /// Mapped pages of the peer.
    ///
    /// Drivers give it back through [`Grantee::unmap`]; one that is merely dropped may leak its mapping.
    type Mapping: AsRef<SharedPages>;
    /// Pages of this domain that grant copies can read and write; free again when dropped.
    type Buffer: AsRef<SharedPages>;

    /// Maps one page for each reference, appending one result for each to `results`, in order.
    /// Each stands for itself: some may fail while others succeed (GST-5).
    fn map(
        &mut self,
        grefs: &[GrantRef],
        access: Access,
        results: &mut Vec<Result<Self::Mapping, GrantStatus>>,
    );

    /// Maps all references as one writable contiguous run, or nothing.
    ///
    /// # Errors
    /// The first status that was not okay.
    fn map_run(&mut self, grefs: &[GrantRef]) -> Result<Self::Mapping, GrantStatus>;

    /// Unmaps all, leaving the vector empty. Cannot fail for mappings that this trait gave.
    fn unmap(&mut self, mappings: &mut Vec<Self::Mapping>);

    /// Takes a run of `pages` pages for copies.
    ///
    /// # Errors
    /// A status such as [`GrantStatus::NO_SPACE`] if there are none, or copies are not to be had.
    fn buffer(&mut self, pages: usize) -> Result<Self::Buffer, GrantStatus>;

    /// Copies each part between the peer's page and the buffer, in one batch where possible.
    ///
    /// # Errors
    /// The first status that was not okay; other parts may have been copied.
    fn copy(
        &mut self,
        direction: CopyDirection,
        parts: &[CopyPart],
        buffer: &Self::Buffer,
    ) -> Result<(), GrantStatus>;
}

/// Which way a grant copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyDirection {
    /// From the peer's pages to the buffer.
    FromPeer,
    /// From the buffer to the peer's pages.
    ToPeer,
}

/// One part of a grant copy. Neither side crosses the end of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyPart {
    /// The peer's page.
    pub gref: GrantRef,
    /// First byte in it.
    pub offset: usize,
    /// Bytes, 1 to 4096.
    pub len: usize,
    /// First byte in the buffer.
    pub at: usize,
}

/// The sending end of an event channel to the peer.
pub trait Notify {
    /// Wakes the peer. A peer that is gone is no error.
    fn notify(&mut self);
}
