//! How much lies in a page: the interface's numbers. For the model checker, to which each word is
//! dear, pages are tiny, so that a table of two frames is a handful of words and its growth shows.

#[cfg(not(loom))]
pub(crate) use gnttab_abi::{
    NR_RESERVED_ENTRIES, STATUS_PER_PAGE, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE, status_pages_for,
};

#[cfg(loom)]
mod tiny {
    pub(crate) const V1_ENTRIES_PER_PAGE: u32 = 4;
    pub(crate) const V2_ENTRIES_PER_PAGE: u32 = 2;
    pub(crate) const STATUS_PER_PAGE: u32 = 2;
    pub(crate) const NR_RESERVED_ENTRIES: u32 = 1;

    pub(crate) const fn status_pages_for(frames: u32) -> u32 {
        frames
    }
}

#[cfg(loom)]
pub(crate) use tiny::*;
