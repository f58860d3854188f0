//! The argument of each operation (spec 1.6). Field by field the names of the public header,
//! but for `ref`, a word of Rust's, which is `gref` here.

use crate::layout::structure;
use crate::{
    Abi, CacheOp, CopyFlags, DomId, EncodeError, GrantHandle, GrantRef, GrantStatus, MapFlags, Mfn, Truncated,
};

structure! {
    /// Argument of [`Op::MapGrantRef`](crate::Op::MapGrantRef) (spec 3.3).
    MapGrantRef [32, 32] {
        /// In: where to map, a guest address in bytes (or a page-table entry's machine address).
        host_addr: fixed(u64) @ [0, 0],
        /// In: how to map.
        flags: fixed(MapFlags) @ [8, 8],
        /// In: which entry of the granter's table.
        gref: fixed(GrantRef) @ [12, 12],
        /// In: the granter.
        dom: fixed(DomId) @ [16, 16],
        /// Out: the status; the only field that says whether the mapping exists.
        status: fixed(GrantStatus) @ [18, 18],
        /// Out, on success only: the handle to unmap with.
        handle: fixed(GrantHandle) @ [20, 20],
        /// Out, on success only: machine address of the frame, in bytes.
        dev_bus_addr: fixed(u64) @ [24, 24],
    }
}

structure! {
    /// Argument of [`Op::UnmapGrantRef`](crate::Op::UnmapGrantRef) (spec 3.4).
    UnmapGrantRef [24, 24] {
        /// In: the host mapping to remove; 0: none.
        host_addr: fixed(u64) @ [0, 0],
        /// In: the device mapping to remove; 0: none.
        dev_bus_addr: fixed(u64) @ [8, 8],
        /// In: the mapping's handle.
        handle: fixed(GrantHandle) @ [16, 16],
        /// Out: the status.
        status: fixed(GrantStatus) @ [20, 20],
    }
}

structure! {
    /// Argument of [`Op::SetupTable`](crate::Op::SetupTable) (spec 3.5).
    SetupTable [24, 16] {
        /// In: whose table.
        dom: fixed(DomId) @ [0, 0],
        /// In: how many frames to report; a larger number than there are enlarges the table.
        nr_frames: fixed(u32) @ [4, 4],
        /// Out: the status.
        status: fixed(GrantStatus) @ [8, 8],
        /// In: guest address of an array of words that receives the frame numbers.
        frame_list: word @ [16, 12],
    }
}

structure! {
    /// Argument of [`Op::DumpTable`](crate::Op::DumpTable).
    DumpTable [4, 4] {
        /// In: whose table.
        dom: fixed(DomId) @ [0, 0],
        /// Out: the status.
        status: fixed(GrantStatus) @ [2, 2],
    }
}

structure! {
    /// Argument of [`Op::Transfer`](crate::Op::Transfer) (spec 3.7).
    Transfer [24, 16] {
        /// In: the caller's page that is given away.
        mfn: word @ [0, 0],
        /// In: the receiver.
        domid: fixed(DomId) @ [8, 4],
        /// In: the receiver's entry that accepts it.
        gref: fixed(GrantRef) @ [12, 8],
        /// Out: the status.
        status: fixed(GrantStatus) @ [16, 12],
    }
}

/// One side of a copy: a reference or a frame, and where in its page (spec 5.1).
///
/// Which of the two `u` holds, the copy's flags say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CopyPtr {
    /// The union of reference (its low four bytes) and frame number (all of it), as it lies.
    pub u: u64,
    /// The domain of the table, or [`DomId::SELF`] for a frame.
    pub domid: DomId,
    /// First byte within the page.
    pub offset: u16,
}

impl CopyPtr {
    /// A side that is an entry of `domid`'s table.
    #[must_use]
    pub const fn grant(domid: DomId, gref: GrantRef, offset: u16) -> CopyPtr {
        CopyPtr {
            u: gref.0 as u64,
            domid,
            offset,
        }
    }

    /// A side that is a frame of the caller: a gfn, for a PV caller an mfn.
    #[must_use]
    pub const fn frame(gmfn: u64, offset: u16) -> CopyPtr {
        CopyPtr {
            u: gmfn,
            domid: DomId::SELF,
            offset,
        }
    }

    /// The union read as a reference: its low four bytes.
    #[must_use]
    pub const fn gref(&self) -> GrantRef {
        let [a, b, c, d, ..] = self.u.to_le_bytes();
        GrantRef(u32::from_le_bytes([a, b, c, d]))
    }
}

/// Argument of [`Op::Copy`](crate::Op::Copy) (spec 3.8 and 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Copy {
    /// In: where bytes come from.
    pub source: CopyPtr,
    /// In: where they go.
    pub dest: CopyPtr,
    /// In: how many bytes, 0 to 4096.
    pub len: u16,
    /// In: which sides are references.
    pub flags: CopyFlags,
    /// Out: the status.
    pub status: GrantStatus,
}

/// The wire form of a copy. A module of its own, since the macro declares for the public.
mod wire {
    #![expect(
        unreachable_pub,
        reason = "`structure!` makes public items; these two sides are not"
    )]
    use crate::layout::structure;
    use crate::{CopyFlags, DomId, GrantStatus};

    structure! {
        /// The copy as it lies, its two sides taken apart.
        CopyWire [40, 24] {
            /// Source union.
            source_u: word @ [0, 0],
            /// Source domain.
            source_domid: fixed(DomId) @ [8, 4],
            /// Source offset.
            source_offset: fixed(u16) @ [10, 6],
            /// Destination union.
            dest_u: word @ [16, 8],
            /// Destination domain.
            dest_domid: fixed(DomId) @ [24, 12],
            /// Destination offset.
            dest_offset: fixed(u16) @ [26, 14],
            /// Bytes to copy.
            len: fixed(u16) @ [32, 16],
            /// Flags.
            flags: fixed(CopyFlags) @ [34, 18],
            /// Status.
            status: fixed(GrantStatus) @ [36, 20],
        }
    }
}
use wire::CopyWire;

impl Copy {
    /// Bytes that the structure takes.
    #[must_use]
    pub const fn size(abi: Abi) -> usize {
        CopyWire::size(abi)
    }

    /// Reads the structure from the start of `bytes`; any content is accepted.
    ///
    /// # Errors
    /// [`Truncated`] if there are fewer bytes than [`Copy::size`].
    #[inline]
    pub fn decode(abi: Abi, bytes: &[u8]) -> Result<Self, Truncated> {
        let wire = CopyWire::decode(abi, bytes)?;
        Ok(Copy {
            source: CopyPtr {
                u: wire.source_u,
                domid: wire.source_domid,
                offset: wire.source_offset,
            },
            dest: CopyPtr {
                u: wire.dest_u,
                domid: wire.dest_domid,
                offset: wire.dest_offset,
            },
            len: wire.len,
            flags: wire.flags,
            status: wire.status,
        })
    }

    /// Writes every field to the start of `bytes`.
    ///
    /// # Errors
    /// [`EncodeError`] if the buffer is too short or a frame number does not fit the ABI.
    #[inline]
    pub fn encode(&self, abi: Abi, bytes: &mut [u8]) -> Result<(), EncodeError> {
        let Copy {
            source,
            dest,
            len,
            flags,
            status,
        } = *self;
        CopyWire {
            source_u: source.u,
            source_domid: source.domid,
            source_offset: source.offset,
            dest_u: dest.u,
            dest_domid: dest.domid,
            dest_offset: dest.offset,
            len,
            flags,
            status,
        }
        .encode(abi, bytes)
    }

    /// Where each field lies: its name, offset and size.
    #[must_use]
    pub const fn fields(abi: Abi) -> &'static [(&'static str, usize, usize)] {
        CopyWire::fields(abi)
    }
}

structure! {
    /// Argument of [`Op::QuerySize`](crate::Op::QuerySize) (spec 3.6).
    QuerySize [16, 16] {
        /// In: whose table.
        dom: fixed(DomId) @ [0, 0],
        /// Out: frames that the table has.
        nr_frames: fixed(u32) @ [4, 4],
        /// Out: frames that it may have.
        max_nr_frames: fixed(u32) @ [8, 8],
        /// Out: the status.
        status: fixed(GrantStatus) @ [12, 12],
    }
}

structure! {
    /// Argument of [`Op::UnmapAndReplace`](crate::Op::UnmapAndReplace) (spec 3.4.4).
    UnmapAndReplace [24, 24] {
        /// In: the host mapping to remove.
        host_addr: fixed(u64) @ [0, 0],
        /// In: the linear address whose page-table entry moves there; 0: none.
        new_addr: fixed(u64) @ [8, 8],
        /// In: the mapping's handle.
        handle: fixed(GrantHandle) @ [16, 16],
        /// Out: the status.
        status: fixed(GrantStatus) @ [20, 20],
    }
}

structure! {
    /// Argument of [`Op::SetVersion`](crate::Op::SetVersion) (spec 3.9).
    SetVersion [4, 4] {
        /// In: the version wanted, 1 or 2. Out: the version in force, also on failure.
        version: fixed(u32) @ [0, 0],
    }
}

structure! {
    /// Argument of [`Op::GetStatusFrames`](crate::Op::GetStatusFrames) (spec 3.10).
    GetStatusFrames [16, 12] {
        /// In: how many frames to report.
        nr_frames: fixed(u32) @ [0, 0],
        /// In: whose table.
        dom: fixed(DomId) @ [4, 4],
        /// Out: the status.
        status: fixed(GrantStatus) @ [6, 6],
        /// In: guest address of an array of 64-bit values that receives the frame numbers.
        frame_list: word @ [8, 8],
    }
}

structure! {
    /// Argument of [`Op::GetVersion`](crate::Op::GetVersion) (spec 3.11).
    GetVersion [8, 8] {
        /// In: whose table.
        dom: fixed(DomId) @ [0, 0],
        /// Ignored.
        pad: fixed(u16) @ [2, 2],
        /// Out, on success only: the version.
        version: fixed(u32) @ [4, 4],
    }
}

structure! {
    /// Argument of [`Op::SwapGrantRef`](crate::Op::SwapGrantRef) (spec 3.12).
    SwapGrantRef [12, 12] {
        /// In: one entry.
        ref_a: fixed(GrantRef) @ [0, 0],
        /// In: the other.
        ref_b: fixed(GrantRef) @ [4, 4],
        /// Out: the status.
        status: fixed(GrantStatus) @ [8, 8],
    }
}

structure! {
    /// Argument of [`Op::CacheFlush`](crate::Op::CacheFlush) (spec 3.13). It has no result field.
    CacheFlush [16, 16] {
        /// In: a machine address in bytes (the reference form is never accepted).
        dev_bus_addr: fixed(u64) @ [0, 0],
        /// In: first byte within the page.
        offset: fixed(u16) @ [8, 8],
        /// In: bytes.
        length: fixed(u16) @ [10, 10],
        /// In: what to do.
        op: fixed(CacheOp) @ [12, 12],
    }
}

impl CacheFlush {
    /// The frame that the address lies in.
    #[must_use]
    pub const fn mfn(&self) -> Mfn {
        Mfn::containing(self.dev_bus_addr)
    }
}
