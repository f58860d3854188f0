//! The memory operations through which grant-table frames are placed and read (spec 6).

use crate::DomId;
use crate::layout::structure;

/// Hypercall number of `memory_op`, `__HYPERVISOR_memory_op`.
pub const MEMORY_OP: u32 = 12;
/// Subcommand `XENMEM_add_to_physmap`: put one frame of a table at a gfn (spec 6.2).
pub const MEMOP_ADD_TO_PHYSMAP: u32 = 7;
/// Subcommand `XENMEM_add_to_physmap_batch`: the same for a list of frames (spec 6.2).
pub const MEMOP_ADD_TO_PHYSMAP_BATCH: u32 = 23;
/// Subcommand `XENMEM_acquire_resource`: get at the frames of another domain's table (spec 6.1).
pub const MEMOP_ACQUIRE_RESOURCE: u32 = 28;
/// Space of the grant table in the physmap operations, `XENMAPSPACE_grant_table`.
pub const PHYSMAP_SPACE_GRANT_TABLE: u32 = 1;
/// Bit of the index that selects status frames, `XENMAPIDX_grant_table_status`. Of a version 1
/// table it is part of the index (spec 6.2).
pub const ADD_TO_PHYSMAP_STATUS_BIT: u64 = 0x8000_0000;
/// Resource type of the grant table, `XENMEM_resource_grant_table`.
pub const RESOURCE_GRANT_TABLE: u16 = 1;
/// Resource id of the shared frames, `XENMEM_resource_grant_table_id_shared`.
pub const RESOURCE_GRANT_TABLE_SHARED: u32 = 0;
/// Resource id of the status frames, `XENMEM_resource_grant_table_id_status`.
pub const RESOURCE_GRANT_TABLE_STATUS: u32 = 1;

structure! {
    /// Argument of `XENMEM_add_to_physmap` (spec 6.2).
    ///
    /// ```
    /// use gnttab_abi::{Abi, AddToPhysmap, DomId, PHYSMAP_SPACE_GRANT_TABLE};
    ///
    /// let request = AddToPhysmap {
    ///     domid: DomId::SELF,
    ///     space: PHYSMAP_SPACE_GRANT_TABLE,
    ///     idx: 0,
    ///     gpfn: 0xfee00,
    ///     ..AddToPhysmap::default()
    /// };
    /// let mut bytes = [0; 24];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    /// assert_eq!(AddToPhysmap::decode(Abi::X86_64, &bytes)?, request);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// Argument of `XENMEM_add_to_physmap_batch` (spec 6.2).
    ///
    /// ```
    /// use gnttab_abi::{Abi, AddToPhysmapBatch, DomId};
    ///
    /// let request = AddToPhysmapBatch {
    ///     domid: DomId::SELF,
    ///     space: 1,
    ///     size: 4,
    ///     idxs: 0x1000,
    ///     gpfns: 0x2000,
    ///     errs: 0x3000,
    ///     ..AddToPhysmapBatch::default()
    /// };
    /// let mut bytes = [0; 20];
    /// request.encode(Abi::X86_32, &mut bytes)?;
    /// assert_eq!(AddToPhysmapBatch::decode(Abi::X86_32, &bytes)?, request);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    AddToPhysmapBatch [32, 20] {
        /// In: whose physmap.
        domid: fixed(DomId) @ [0, 0],
        /// In: the space, [`PHYSMAP_SPACE_GRANT_TABLE`] here.
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, AcquireResource, DomId, RESOURCE_GRANT_TABLE, RESOURCE_GRANT_TABLE_SHARED};
    ///
    /// let request = AcquireResource {
    ///     domid: DomId(5),
    ///     kind: RESOURCE_GRANT_TABLE,
    ///     id: RESOURCE_GRANT_TABLE_SHARED,
    ///     nr_frames: 1,
    ///     frame_list: 0x10_0000,
    ///     ..AcquireResource::default()
    /// };
    /// let mut bytes = [0; 28];
    /// request.encode(Abi::X86_32, &mut bytes)?;
    /// assert_eq!(AcquireResource::decode(Abi::X86_32, &bytes)?, request);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
