//! The argument of each operation (spec 1.6). Field by field the names of the public header,
//! but for `ref`, a word of Rust's, which is `gref` here.

use crate::layout::structure;
use crate::{
    Abi, CacheOp, CopyFlags, DomId, EncodeError, GrantHandle, GrantRef, GrantStatus, MapFlags, Mfn,
    PAGE_SIZE, Truncated,
};

/// Bytes of the area into which real Xen widens the arguments of a 32-bit caller (spec 3.1.4).
/// What fits into it bounds the four operations that need widening.
pub const COMPAT_AREA_SIZE: usize = 2 * PAGE_SIZE;
/// Items of a 32-bit caller's transfer that are read before the first of them is executed.
pub const COMPAT_TRANSFER_CHUNK: usize = COMPAT_AREA_SIZE / Transfer::size(Abi::X86_64);
/// Items of a 32-bit caller's copy that are read before the first of them is executed.
pub const COMPAT_COPY_CHUNK: usize = COMPAT_AREA_SIZE / Copy::size(Abi::X86_64);
/// Frames that setup_table can report to a 32-bit caller; a request for more is *general_error*.
pub const COMPAT_SETUP_TABLE_FRAMES: usize = (COMPAT_AREA_SIZE - SetupTable::size(Abi::X86_64)) / 8;
/// Frames that get_status_frames of Xen 4.17 can report to a 32-bit caller. Later: no such bound.
pub const COMPAT_STATUS_FRAMES: usize = (COMPAT_AREA_SIZE - GetStatusFrames::size(Abi::X86_64)) / 8;

structure! {
    /// Argument of [`Op::MapGrantRef`](crate::Op::MapGrantRef) (spec 3.3).
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, GrantRef, MapFlags, MapGrantRef};
    ///
    /// let request = MapGrantRef {
    ///     host_addr: 0x4000_0000,
    ///     flags: MapFlags::HOST_MAP | MapFlags::READONLY,
    ///     gref: GrantRef(0x67a),
    ///     dom: DomId(5),
    ///     ..MapGrantRef::default()
    /// };
    /// let mut bytes = [0; 32];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    ///
    /// // The hypervisor answers in the same bytes; only `status` says whether the rest holds.
    /// let answer = MapGrantRef::decode(Abi::X86_64, &bytes)?;
    /// assert!(answer.status.is_okay());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, GrantHandle, UnmapGrantRef};
    ///
    /// let request = UnmapGrantRef {
    ///     host_addr: 0x4000_0000,
    ///     handle: GrantHandle(3),
    ///     ..UnmapGrantRef::default()
    /// };
    /// let mut bytes = [0; 24];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    /// assert_eq!(bytes[16], 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, SetupTable};
    ///
    /// let request = SetupTable {
    ///     dom: DomId::SELF,
    ///     nr_frames: 4,
    ///     frame_list: 0x10_0000,
    ///     ..SetupTable::default()
    /// };
    /// let mut bytes = [0; 16];
    /// request.encode(Abi::X86_32, &mut bytes)?;
    /// assert_eq!(SetupTable::decode(Abi::X86_32, &bytes)?, request);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// Argument of [`Op::DumpTable`](crate::Op::DumpTable) (spec 3.14).
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, DumpTable};
    ///
    /// let request = DumpTable {
    ///     dom: DomId::SELF,
    ///     ..DumpTable::default()
    /// };
    /// let mut bytes = [0; 4];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    /// assert_eq!(bytes, [0xf0, 0x7f, 0, 0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    DumpTable [4, 4] {
        /// In: whose table.
        dom: fixed(DomId) @ [0, 0],
        /// Out: the status.
        status: fixed(GrantStatus) @ [2, 2],
    }
}

structure! {
    /// Argument of [`Op::Transfer`](crate::Op::Transfer) (spec 3.7).
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, GrantRef, Transfer};
    ///
    /// let request = Transfer {
    ///     mfn: 0x1_0000_0000,
    ///     domid: DomId(1),
    ///     gref: GrantRef(9),
    ///     ..Transfer::default()
    /// };
    /// let mut bytes = [0; 24];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    ///
    /// // The frame number does not fit a word of the 32-bit ABI.
    /// assert!(request.encode(Abi::X86_32, &mut bytes).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
///
/// ```
/// use gnttab_abi::{CopyPtr, DomId, GrantRef};
///
/// let granted = CopyPtr::grant(DomId(1), GrantRef(5), 100);
/// assert_eq!((granted.gref(), granted.offset), (GrantRef(5), 100));
/// assert_eq!(CopyPtr::frame(0x1_0000_0005, 0).gref(), GrantRef(5));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CopyPtr {
    /// The union of reference (its low four bytes) and frame number (all of it), as it lies.
    pub u: u64,
    /// The domain of the table, or [`DomId::SELF`] for a frame.
    pub domid: DomId,
    /// First byte within the page, 0 to 4095 where the copy is to succeed.
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
///
/// ```
/// use gnttab_abi::{Abi, Copy, CopyFlags, CopyPtr, DomId, GrantRef};
///
/// let copy = Copy {
///     source: CopyPtr::grant(DomId(1), GrantRef(5), 0),
///     dest: CopyPtr::frame(0x1234, 0),
///     len: 4096,
///     flags: CopyFlags::SOURCE_GREF,
///     ..Copy::default()
/// };
/// let mut bytes = [0; 24];
/// copy.encode(Abi::X86_32, &mut bytes).unwrap();
/// assert_eq!(Copy::decode(Abi::X86_32, &bytes), Ok(copy));
/// ```
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
    /// Bytes that the structure takes: 40, or 24 with [`Abi::X86_32`].
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

    /// Writes every field to the start of `bytes`; padding is left as it was.
    ///
    /// # Errors
    /// [`EncodeError`] if the buffer is too short or a frame number does not fit the ABI; nothing
    /// is written then.
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

    /// Where each field lies: its name, offset and size in bytes. The two sides appear field by
    /// field, as `source_u`, `source_domid`, `source_offset` and so on.
    #[must_use]
    pub const fn fields(abi: Abi) -> &'static [(&'static str, usize, usize)] {
        CopyWire::fields(abi)
    }
}

structure! {
    /// Argument of [`Op::QuerySize`](crate::Op::QuerySize) (spec 3.6).
    ///
    /// ```
    /// use gnttab_abi::{Abi, QuerySize};
    ///
    /// let answer = [0xf0, 0x7f, 0, 0, 1, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0];
    /// let size = QuerySize::decode(Abi::X86_64, &answer)?;
    /// assert_eq!((size.nr_frames, size.max_nr_frames), (1, 64));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, GrantHandle, UnmapAndReplace};
    ///
    /// let request = UnmapAndReplace {
    ///     host_addr: 0x4000_0000,
    ///     new_addr: 0x5000_0000,
    ///     handle: GrantHandle(3),
    ///     ..UnmapAndReplace::default()
    /// };
    /// let mut bytes = [0; 24];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    /// assert_eq!(UnmapAndReplace::decode(Abi::X86_64, &bytes)?, request);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, SetVersion};
    ///
    /// let mut bytes = [0; 4];
    /// SetVersion { version: 2 }.encode(Abi::Arm, &mut bytes)?;
    /// assert_eq!(bytes, [2, 0, 0, 0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    SetVersion [4, 4] {
        /// In: the version wanted, 1 or 2. Out: the version in force, also on failure.
        version: fixed(u32) @ [0, 0],
    }
}

structure! {
    /// Argument of [`Op::GetStatusFrames`](crate::Op::GetStatusFrames) (spec 3.10).
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, GetStatusFrames};
    ///
    /// let request = GetStatusFrames {
    ///     nr_frames: 1,
    ///     dom: DomId::SELF,
    ///     frame_list: 0x10_0000,
    ///     ..GetStatusFrames::default()
    /// };
    /// let mut bytes = [0; 16];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    /// assert_eq!(GetStatusFrames::decode(Abi::X86_64, &bytes)?, request);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, GetVersion};
    ///
    /// let version = GetVersion::decode(Abi::Arm, &[5, 0, 0xff, 0xff, 1, 0, 0, 0])?;
    /// assert_eq!((version.dom, version.version), (DomId(5), 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, GrantRef, SwapGrantRef};
    ///
    /// let request = SwapGrantRef {
    ///     ref_a: GrantRef(8),
    ///     ref_b: GrantRef(9),
    ///     ..SwapGrantRef::default()
    /// };
    /// let mut bytes = [0; 12];
    /// request.encode(Abi::X86_64, &mut bytes)?;
    /// assert_eq!(bytes, [8, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    ///
    /// ```
    /// use gnttab_abi::{Abi, CacheFlush, CacheOp, Mfn};
    ///
    /// let request = CacheFlush {
    ///     dev_bus_addr: 0x5_5000,
    ///     offset: 64,
    ///     length: 128,
    ///     op: CacheOp::CLEAN | CacheOp::INVAL,
    /// };
    /// let mut bytes = [0; 16];
    /// request.encode(Abi::Arm, &mut bytes)?;
    /// assert_eq!(CacheFlush::decode(Abi::Arm, &bytes)?.mfn(), Mfn(0x55));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    CacheFlush [16, 16] {
        /// In: a machine address in bytes (the reference form is never accepted).
        dev_bus_addr: fixed(u64) @ [0, 0],
        /// In: first byte within the page.
        offset: fixed(u16) @ [8, 8],
        /// In: bytes, at most to the end of the page.
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
