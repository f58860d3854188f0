//! The flag words: of entries, mapping requests, copies and cache maintenance.

use bitflags::bitflags;

bitflags! {
    /// The flags of a shared entry (`GTF_*`, 16 bits; spec 1.5.4).
    ///
    /// The two lowest bits are not flags but the entry's type: see [`EntryFlags::kind`].
    /// Any bit pattern is kept, since a guest may write any.
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
        /// Cache attribute of the same name (x86).
        const PWT = 0x0020;
        /// Cache attribute of the same name (x86).
        const PCD = 0x0040;
        /// Cache attribute of the same name (x86).
        const PAT = 0x0080;
        /// Only part of the page is granted (v2 permit_access); such a grant is for copy only.
        const SUB_PAGE = 0x0100;
        const _ = !0;
    }
}

impl EntryFlags {
    /// The bits that hold the type.
    pub const TYPE_MASK: EntryFlags = EntryFlags::from_bits_retain(0x0003);
    /// Type 1 by itself: grant access, read and write.
    pub const PERMIT_ACCESS: EntryFlags = EntryFlags::from_bits_retain(0x0001);
    /// Type 2 by itself: wait for a transfer.
    pub const ACCEPT_TRANSFER: EntryFlags = EntryFlags::from_bits_retain(0x0002);
    /// Type 3 by itself: pass another domain's grant on (v2).
    pub const TRANSITIVE: EntryFlags = EntryFlags::from_bits_retain(0x0003);
    /// Both busy bits.
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

/// What an entry is for (`GTF_type_mask`).
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
    /// Where the guest's own page-table bits start.
    pub const GUEST_AVAIL_SHIFT: u32 = 16;
    /// The guest's own page-table bits; 16 to 18 reach the page table of a PV guest.
    pub const GUEST_AVAIL_MASK: MapFlags = MapFlags::from_bits_retain(0xFFFF_0000);
}

bitflags! {
    /// The flags of a copy (`GNTCOPY_*`, 16 bits). Unknown bits are ignored (spec 1.6).
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
