//! Every type, constant and byte layout of Xen's public grant-table interface.
//!
//! This crate is the dictionary that the hypervisor's half (`gnttab-engine`)
//! and the guest's half (`gnttab-guest`) share. It encodes and decodes; it holds
//! no state, takes no decision and needs neither `std` nor `alloc` nor `unsafe`.
//!
//! What must always hold:
//! 1. Decoding accepts any bytes and never panics; what a guest wrote is shown as
//!    it is, unknown bits included.
//! 2. Encoding refuses a value that its field cannot hold; it never cuts it.
//! 3. A number that names a domain, a reference, a handle or a frame is never a
//!    plain integer.
//!
//! ```
//! use gnttab_abi::{Abi, DomId, GrantRef, MapFlags, MapGrantRef};
//!
//! let map = MapGrantRef {
//!     host_addr: 0x4000_0000,
//!     flags: MapFlags::HOST_MAP | MapFlags::READONLY,
//!     gref: GrantRef(0x67a),
//!     dom: DomId(5),
//!     ..MapGrantRef::default()
//! };
//! let mut bytes = [0; 32];
//! map.encode(Abi::X86_64, &mut bytes).unwrap();
//! assert_eq!(MapGrantRef::decode(Abi::X86_64, &bytes).unwrap(), map);
//! ```

#![no_std]
#![forbid(unsafe_code)]

mod args;
mod entry;
mod errno;
mod flags;
mod ids;
mod layout;
mod memory;
mod op;
mod status;

pub use args::{
    COMPAT_AREA_SIZE, COMPAT_COPY_CHUNK, COMPAT_SETUP_TABLE_FRAMES, COMPAT_STATUS_FRAMES,
    COMPAT_TRANSFER_CHUNK, CacheFlush, Copy, CopyPtr, DumpTable, GetStatusFrames, GetVersion, MapGrantRef,
    QuerySize, SetVersion, SetupTable, SwapGrantRef, Transfer, UnmapAndReplace, UnmapGrantRef,
};
pub use entry::{
    ENTRY_V1_SIZE, ENTRY_V2_SIZE, EntryBodyV2, EntryHead, EntryV1, EntryV2, NR_RESERVED_ENTRIES,
    RESERVED_CONSOLE, RESERVED_XENSTORE, STATUS_PER_PAGE, STATUS_WORD_SIZE, V1_ENTRIES_PER_PAGE,
    V2_ENTRIES_PER_PAGE, status_pages_for,
};
pub use errno::Errno;
pub use flags::{CacheOp, CopyFlags, EntryFlags, EntryType, FEATURE_GNTTAB_MAP_AVAIL_BITS, MapFlags};
pub use ids::{DomId, Gfn, GrantHandle, GrantRef, Mfn, PAGE_SHIFT, PAGE_SIZE};
pub use layout::{Abi, EncodeError, Truncated, Word};
pub use memory::{
    ADD_TO_PHYSMAP_STATUS_BIT, AcquireResource, AddToPhysmap, AddToPhysmapBatch, MEMOP_ACQUIRE_RESOURCE,
    MEMOP_ADD_TO_PHYSMAP, MEMOP_ADD_TO_PHYSMAP_BATCH, MEMORY_OP, PHYSMAP_SPACE_GRANT_TABLE,
    RESOURCE_GRANT_TABLE, RESOURCE_GRANT_TABLE_SHARED, RESOURCE_GRANT_TABLE_STATUS,
};
pub use op::{Command, GRANT_TABLE_OP, INTERFACE_SETUP_TABLE_PFNS, INTERFACE_VERSION_2_TABLES, Op};
pub use status::GrantStatus;
