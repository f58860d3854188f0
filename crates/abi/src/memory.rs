//! The memory operations through which grant-table frames are placed and read (spec 6).

use crate::DomId;
use crate::layout::structure;

/// Subcommand `XENMEM_add_to_physmap`.
pub const MEMOP_ADD_TO_PHYSMAP: u32 = 7;
/// Subcommand `XENMEM_add_to_physmap_batch`.
pub const MEMOP_ADD_TO_PHYSMAP_BATCH: u32 = 23;
/// Subcommand `XENMEM_acquire_resource`.
pub const MEMOP_ACQUIRE_RESOURCE: u32 = 28;
/// Space of the grant table in the physmap operations.
pub const PHYSMAP_SPACE_GRANT_TABLE: u32 = 1;
/// Bit of the index that selects status frames (version 2 tables only).
pub const ADD_TO_PHYSMAP_STATUS_BIT: u64 = 0x8000_0000;
/// Resource type of the grant table.
pub const RESOURCE_GRANT_TABLE: u16 = 1;
/// Resource id of the shared frames.
pub const RESOURCE_GRANT_TABLE_SHARED: u32 = 0;
/// Resource id of the status frames.
pub const RESOURCE_GRANT_TABLE_STATUS: u32 = 1;

structure! {
    /// Argument of `XENMEM_add_to_physmap` (spec 6.2).
    AddToPhysmap [24, 16] {
        /// In: whose physmap.
        domid: fixed(DomId) @ [0, 0],
        /// In: ignored for the grant table.
        size: fixed(u16) @ [2, 2],
        /// In: the space, [`PHYSMAP_SPACE_GRANT_TABLE`] here.
        space: fixed(u32) @ [4, 4],
        /// In: which frame of the table.
        idx: word @ [8, 8],
        /// In: where it goes.
        gpfn: word @ [16, 12],
    }
}

structure! {
    /// Argument of `XENMEM_add_to_physmap_batch`.
    AddToPhysmapBatch [32, 20] {
        /// In: whose physmap.
        domid: fixed(DomId) @ [0, 0],
        /// In: the space.
        space: fixed(u16) @ [2, 2],
        /// In: number of elements.
        size: fixed(u16) @ [4, 4],
        /// In: the far domain, for spaces that have one.
        foreign_domid: fixed(DomId) @ [6, 6],
        /// In: guest address of the indexes, words.
        idxs: word @ [8, 8],
        /// In: guest address of the places, words.
        gpfns: word @ [16, 12],
        /// In: guest address of the results, 32-bit errnos.
        errs: word @ [24, 16],
    }
}

structure! {
    /// Argument of `XENMEM_acquire_resource` (spec 6.1).
    AcquireResource [32, 28] {
        /// In: whose resource.
        domid: fixed(DomId) @ [0, 0],
        /// In: the type, [`RESOURCE_GRANT_TABLE`] here.
        kind: fixed(u16) @ [2, 2],
        /// In: shared or status frames.
        id: fixed(u32) @ [4, 4],
        /// In: how many frames; out: how many there can be, if asked with no list.
        nr_frames: fixed(u32) @ [8, 8],
        /// In: must be 0.
        pad: fixed(u32) @ [12, 12],
        /// In: the first frame.
        frame: fixed(u64) @ [16, 16],
        /// In: guest address of the list: words.
        frame_list: word @ [24, 24],
    }
}
