//! The flag words: of entries, mapping requests, copies and cache maintenance.

use core::fmt;

use bitflags::bitflags;

/// Feature that tells a PV guest that [`MapFlags::GUEST_AVAIL_MASK`] works,
/// `XENFEAT_gnttab_map_avail_bits` (spec 1.7).
pub const FEATURE_GNTTAB_MAP_AVAIL_BITS: u32 = 7;

bitflags! {
    /// The flags of a shared entry (`GTF_*`, 16 bits; spec 1.5.4).
    ///
    /// The two lowest bits are not flags but the entry's type: see [`EntryFlags::kind`].
    /// Any bit pattern is kept, since a guest may write any.
    ///
    /// ```
    /// use gnttab_abi::{EntryFlags, EntryType};
    ///
    /// let flags = EntryFlags::from_bits_retain(0x800d);
    /// assert_eq!(flags.kind(), EntryType::PermitAccess);
    /// assert_eq!(flags.to_string(), "permit_access|readonly|reading|0x8000");
    /// // The same bits of an entry that waits for a transfer:
    /// let flags = EntryFlags::from_bits_retain(0x000e);
    /// assert_eq!(flags.to_string(), "accept_transfer|transfer_committed|transfer_completed");
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct EntryFlags: u16 {
        /// The grantee may only read (permit_access, transitive). Written by the granter.
        const READONLY = 0x0004;
        /// A transfer was promised the slot (accept_transfer). Written by the hypervisor.
        const TRANSFER_COMMITTED = 0x0004;
        /// In use for reading. Written by the hypervisor: v1 here, v2 in the status word.
        const READING = 0x0008;
        /// A transfer has ended (accept_transfer). Written by the hypervisor.
        const TRANSFER_COMPLETED = 0x0008;
        /// In use for writing. Written by the hypervisor, as [`EntryFlags::READING`].
        const WRITING = 0x0010;
        /// Page write-through, an x86 cache attribute (spec 4.4).
        const PWT = 0x0020;
        /// Page cache disable, an x86 cache attribute (spec 4.4).
        const PCD = 0x0040;
        /// Page attribute table index, an x86 cache attribute (spec 4.4).
        const PAT = 0x0080;
        /// Only part of the page is granted (v2 permit_access); such a grant is for copy only.
        const SUB_PAGE = 0x0100;
        const _ = !0;
    }
}

impl EntryFlags {
    /// The bits that hold the type (`GTF_type_mask`).
    pub const TYPE_MASK: EntryFlags = EntryFlags::from_bits_retain(0x0003);
    /// Type 1 by itself: grant access, read and write.
    pub const PERMIT_ACCESS: EntryFlags = EntryFlags::from_bits_retain(0x0001);
    /// Type 2 by itself: wait for a transfer.
    pub const ACCEPT_TRANSFER: EntryFlags = EntryFlags::from_bits_retain(0x0002);
    /// Type 3 by itself: pass another domain's grant on (v2).
    pub const TRANSITIVE: EntryFlags = EntryFlags::from_bits_retain(0x0003);
    /// Both busy bits: of a v1 entry's flags or of a v2 status word.
    pub const IN_USE: EntryFlags = EntryFlags::from_bits_retain(0x0018);

    /// The type in the two lowest bits.
    #[must_use]
    pub const fn kind(self) -> EntryType {
        match self.bits() & 3 {
            0 => EntryType::Invalid,
            1 => EntryType::PermitAccess,
            2 => EntryType::AcceptTransfer,
            _ => EntryType::Transitive,
        }
    }
}

/// What an entry is for: the two lowest bits of its flags (spec 1.5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryType {
    /// Nothing: the entry is free.
    Invalid,
    /// The page may be mapped and copied.
    PermitAccess,
    /// A page may be transferred in.
    AcceptTransfer,
    /// Another domain's grant, passed on; v2 and copy only. Just an invalid type in v1.
    Transitive,
}

bitflags! {
    /// The flags of a mapping request (`GNTMAP_*`, 32 bits; spec 1.7).
    ///
    /// ```
    /// use gnttab_abi::MapFlags;
    ///
    /// let flags = MapFlags::HOST_MAP | MapFlags::READONLY | MapFlags::from_bits_retain(0x1_0020);
    /// assert_eq!(flags.to_string(), "host_map|readonly|0x10020");
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct MapFlags: u32 {
        /// Map for devices.
        const DEVICE_MAP = 0x1;
        /// Map for processors.
        const HOST_MAP = 0x2;
        /// Both kinds read-only.
        const READONLY = 0x4;
        /// PV: the mapping is accessible to user mode.
        const APPLICATION_MAP = 0x8;
        /// PV: the host address is the machine address of a page-table entry.
        const CONTAINS_PTE = 0x10;
        const _ = !0;
    }
}

impl MapFlags {
    /// Where the guest's own page-table bits start: a bit number (`_GNTMAP_guest_avail0`).
    pub const GUEST_AVAIL_SHIFT: u32 = 16;
    /// The guest's own page-table bits; 16 to 18 reach the page table of a PV guest.
    pub const GUEST_AVAIL_MASK: MapFlags = MapFlags::from_bits_retain(0xFFFF_0000);
}

bitflags! {
    /// The flags of a copy (`GNTCOPY_*`, 16 bits). Unknown bits are ignored (spec 1.6).
    ///
    /// ```
    /// assert_eq!(gnttab_abi::CopyFlags::DEST_GREF.to_string(), "dest_gref");
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct CopyFlags: u16 {
        /// The source is a grant reference; clear: a frame of the caller.
        const SOURCE_GREF = 0x1;
        /// The destination is a grant reference; clear: a frame of the caller.
        const DEST_GREF = 0x2;
        const _ = !0;
    }
}

bitflags! {
    /// What a cache flush does (`GNTTAB_CACHE_*`, 32 bits; spec 3.13).
    ///
    /// ```
    /// use gnttab_abi::CacheOp;
    ///
    /// assert_eq!((CacheOp::CLEAN | CacheOp::INVAL).to_string(), "clean|inval");
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct CacheOp: u32 {
        /// Write dirty lines back.
        const CLEAN = 0x1;
        /// Drop lines.
        const INVAL = 0x2;
        /// The operand is a reference. No version of Xen accepts it (spec 10.2).
        const SOURCE_GREF = 0x8000_0000;
        const _ = !0;
    }
}

/// Names of the public header, joined by bars; bits without a name follow in hexadecimal.
///
/// Bits 2 and 3 are named as the type has it. No bit at all: `invalid`.
impl fmt::Display for EntryFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bit2, bit3) = match self.kind() {
            EntryType::AcceptTransfer => ("transfer_committed", "transfer_completed"),
            _ => ("readonly", "reading"),
        };
        f.write_str(match self.kind() {
            EntryType::Invalid => "invalid",
            EntryType::PermitAccess => "permit_access",
            EntryType::AcceptTransfer => "accept_transfer",
            EntryType::Transitive => "transitive",
        })?;
        let names = [
            (EntryFlags::READONLY, bit2),
            (EntryFlags::READING, bit3),
            (EntryFlags::WRITING, "writing"),
            (EntryFlags::PWT, "PWT"),
            (EntryFlags::PCD, "PCD"),
            (EntryFlags::PAT, "PAT"),
            (EntryFlags::SUB_PAGE, "sub_page"),
        ];
        let names = names.map(|(flag, name)| (u32::from(flag.bits()), name));
        write_bits(f, true, u32::from((*self - Self::TYPE_MASK).bits()), &names)
    }
}

/// Names of the public header, joined by bars; bits without a name follow in hexadecimal. No
/// bit at all: `0`.
impl fmt::Display for MapFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (MapFlags::DEVICE_MAP, "device_map"),
            (MapFlags::HOST_MAP, "host_map"),
            (MapFlags::READONLY, "readonly"),
            (MapFlags::APPLICATION_MAP, "application_map"),
            (MapFlags::CONTAINS_PTE, "contains_pte"),
        ];
        write_bits(
            f,
            false,
            self.bits(),
            &names.map(|(flag, name)| (flag.bits(), name)),
        )
    }
}

/// As of [`MapFlags`].
impl fmt::Display for CopyFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (CopyFlags::SOURCE_GREF, "source_gref"),
            (CopyFlags::DEST_GREF, "dest_gref"),
        ];
        let names = names.map(|(flag, name)| (u32::from(flag.bits()), name));
        write_bits(f, false, u32::from(self.bits()), &names)
    }
}

/// As of [`MapFlags`].
impl fmt::Display for CacheOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (CacheOp::CLEAN, "clean"),
            (CacheOp::INVAL, "inval"),
            (CacheOp::SOURCE_GREF, "source_gref"),
        ];
        write_bits(
            f,
            false,
            self.bits(),
            &names.map(|(flag, name)| (flag.bits(), name)),
        )
    }
}

/// Writes the names of the bits that are set and the rest as a number, joined by bars; `begun`
/// says that something stands before them.
fn write_bits(f: &mut fmt::Formatter<'_>, mut begun: bool, bits: u32, names: &[(u32, &str)]) -> fmt::Result {
    let mut rest = bits;
    for &(bit, name) in names {
        if rest & bit != 0 {
            f.write_str(if begun { "|" } else { "" })?;
            f.write_str(name)?;
            begun = true;
            rest &= !bit;
        }
    }
    match (begun, rest) {
        (true, 0) => Ok(()),
        (true, rest) => write!(f, "|{rest:#x}"),
        (false, 0) => f.write_str("0"),
        (false, rest) => write!(f, "{rest:#x}"),
    }
}
