//! Shared entries, versions 1 and 2, as their bytes lie in a grant frame (spec 1.5).

use core::fmt;

use crate::{DomId, EntryFlags, EntryType, GrantRef, PAGE_SIZE};

/// Bytes of a version 1 entry.
pub const ENTRY_V1_SIZE: usize = 8;
/// Bytes of a version 2 entry.
pub const ENTRY_V2_SIZE: usize = 16;
/// Bytes of the status word of a version 2 entry (`grant_status_t`). The hypervisor keeps the
/// bits of [`EntryFlags::IN_USE`] in it; the others are the granter's own.
pub const STATUS_WORD_SIZE: usize = 2;
/// Version 1 entries in one grant frame.
pub const V1_ENTRIES_PER_PAGE: u32 = 512;
/// Version 2 entries in one grant frame.
pub const V2_ENTRIES_PER_PAGE: u32 = 256;
/// Status words in one status frame.
pub const STATUS_PER_PAGE: u32 = 2048;
/// How many references are reserved: 0 to 7 survive a change of version and are never the
/// allocator's (`GNTTAB_NR_RESERVED_ENTRIES`).
pub const NR_RESERVED_ENTRIES: u32 = 8;
/// The console's reference, by convention (`GNTTAB_RESERVED_CONSOLE`).
pub const RESERVED_CONSOLE: GrantRef = GrantRef(0);
/// The store's reference, by convention (`GNTTAB_RESERVED_XENSTORE`).
pub const RESERVED_XENSTORE: GrantRef = GrantRef(1);

const _: () = assert!(V1_ENTRIES_PER_PAGE as usize * ENTRY_V1_SIZE == PAGE_SIZE);
const _: () = assert!(V2_ENTRIES_PER_PAGE as usize * ENTRY_V2_SIZE == PAGE_SIZE);
const _: () = assert!(STATUS_PER_PAGE as usize * STATUS_WORD_SIZE == PAGE_SIZE);

/// Status frames that a version 2 table of so many grant frames has: one for each eight (spec 1.5.3).
///
/// ```
/// assert_eq!(gnttab_abi::status_pages_for(9), 2);
/// ```
#[must_use]
pub const fn status_pages_for(grant_frames: u32) -> u32 {
    grant_frames.div_ceil(STATUS_PER_PAGE / V2_ENTRIES_PER_PAGE)
}

/// The first four bytes of an entry of either version: flags and grantee.
///
/// The hypervisor judges and marks these as one 32-bit word (spec 4.1).
///
/// ```
/// use gnttab_abi::{DomId, EntryFlags, EntryHead};
///
/// let head = EntryHead::from_word(0x0005_0019);
/// assert_eq!(head.domid, DomId(5));
/// assert_eq!(head.flags, EntryFlags::PERMIT_ACCESS | EntryFlags::IN_USE);
/// assert_eq!(head.to_string(), "permit_access|reading|writing d5");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EntryHead {
    /// Type and flags.
    pub flags: EntryFlags,
    /// The domain that may use the entry.
    pub domid: DomId,
}

impl EntryHead {
    /// The head in a 32-bit word as loaded from the entry (little endian: flags below).
    #[must_use]
    pub const fn from_word(word: u32) -> EntryHead {
        let [a, b, c, d] = word.to_le_bytes();
        EntryHead {
            flags: EntryFlags::from_bits_retain(u16::from_le_bytes([a, b])),
            domid: DomId(u16::from_le_bytes([c, d])),
        }
    }

    /// The 32-bit word of this head.
    #[must_use]
    pub const fn word(self) -> u32 {
        self.flags.bits() as u32 | (self.domid.0 as u32) << 16
    }
}

/// A version 1 entry (spec 1.5.1).
///
/// ```
/// use gnttab_abi::EntryV1;
///
/// let entry = EntryV1::from_bytes([0x05, 0, 2, 0, 0x34, 0x12, 0, 0]);
/// assert_eq!(entry.to_string(), "permit_access|readonly d2 frame 0x1234");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EntryV1 {
    /// Flags and grantee, bytes 0 to 3.
    pub head: EntryHead,
    /// The frame, bytes 4 to 7: a gfn, or an mfn once a transfer to a PV domain has completed.
    pub frame: u32,
}

impl EntryV1 {
    /// Reads the eight bytes of an entry.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; ENTRY_V1_SIZE]) -> EntryV1 {
        let [a, b, c, d, e, f, g, h] = bytes;
        EntryV1 {
            head: EntryHead::from_word(u32::from_le_bytes([a, b, c, d])),
            frame: u32::from_le_bytes([e, f, g, h]),
        }
    }

    /// The eight bytes of the entry.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; ENTRY_V1_SIZE] {
        ((self.frame as u64) << 32 | self.head.word() as u64).to_le_bytes()
    }
}

/// A version 2 entry as it lies: the head, the four bytes behind it, and the frame.
///
/// Every bit pattern is one; [`EntryV2::body`] says what it means (spec 1.5.2).
///
/// ```
/// use gnttab_abi::{DomId, EntryBodyV2, EntryFlags, EntryHead, EntryV2};
///
/// let head = EntryHead {
///     flags: EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE,
///     domid: DomId(2),
/// };
/// let body = EntryBodyV2::SubPage { page_off: 100, length: 50, frame: 0x55 };
/// let entry = EntryV2::new(head, body);
/// assert_eq!(entry.body(), body);
/// assert_eq!(entry.to_string(), "permit_access|sub_page d2 frame 0x55 offset 100 length 50");
/// assert_eq!(EntryV2::from_bytes(entry.to_bytes()), entry);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EntryV2 {
    /// Flags and grantee, bytes 0 to 3.
    pub head: EntryHead,
    /// Bytes 4 and 5: offset of a sub-page grant, or far domain of a transitive one.
    pub half: u16,
    /// Bytes 6 and 7: length of a sub-page grant.
    pub length: u16,
    /// Bytes 8 to 15: the frame, whose low half is a transitive grant's far reference.
    pub frame: u64,
}

/// What a version 2 entry says, by its type and [`EntryFlags::SUB_PAGE`] (spec 1.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryBodyV2 {
    /// The whole page (also what free and accept-transfer entries hold).
    FullPage {
        /// The frame.
        frame: u64,
    },
    /// Part of a page; for copy only.
    SubPage {
        /// First granted byte within the page.
        page_off: u16,
        /// Granted bytes.
        length: u16,
        /// The frame.
        frame: u64,
    },
    /// Another domain's grant; for copy only.
    Transitive {
        /// The domain that granted to this table's owner.
        trans_domid: DomId,
        /// The reference in that domain's table.
        gref: GrantRef,
    },
}

impl EntryV2 {
    /// The entry with that head and body.
    ///
    /// The head is taken as it is: [`EntryV2::body`] gives the same body back only where the
    /// head's type and sub-page flag are those of the body.
    #[must_use]
    pub const fn new(head: EntryHead, body: EntryBodyV2) -> EntryV2 {
        let (half, length, frame) = match body {
            EntryBodyV2::FullPage { frame } => (0, 0, frame),
            EntryBodyV2::SubPage {
                page_off,
                length,
                frame,
            } => (page_off, length, frame),
            EntryBodyV2::Transitive { trans_domid, gref } => (trans_domid.0, 0, gref.0 as u64),
        };
        EntryV2 {
            head,
            half,
            length,
            frame,
        }
    }

    /// Reads the sixteen bytes of an entry.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; ENTRY_V2_SIZE]) -> EntryV2 {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        EntryV2 {
            head: EntryHead::from_word(u32::from_le_bytes([a, b, c, d])),
            half: u16::from_le_bytes([e, f]),
            length: u16::from_le_bytes([g, h]),
            frame: u64::from_le_bytes([i, j, k, l, m, n, o, p]),
        }
    }

    /// The sixteen bytes of the entry.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; ENTRY_V2_SIZE] {
        let low = self.head.word() as u128 | (self.half as u128) << 32 | (self.length as u128) << 48;
        (low | (self.frame as u128) << 64).to_le_bytes()
    }

    /// What the bytes mean, by type and sub-page flag.
    #[must_use]
    pub const fn body(self) -> EntryBodyV2 {
        let flags = self.head.flags;
        match flags.kind() {
            EntryType::Transitive => EntryBodyV2::Transitive {
                trans_domid: DomId(self.half),
                gref: GrantRef(low_half(self.frame)),
            },
            EntryType::PermitAccess if flags.contains(EntryFlags::SUB_PAGE) => EntryBodyV2::SubPage {
                page_off: self.half,
                length: self.length,
                frame: self.frame,
            },
            _ => EntryBodyV2::FullPage { frame: self.frame },
        }
    }
}

/// The low 32 bits, which is where the far reference lies.
const fn low_half(frame: u64) -> u32 {
    let [a, b, c, d, ..] = frame.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Flags and grantee: `permit_access|readonly d5`.
impl fmt::Display for EntryHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.flags, self.domid)
    }
}

/// On one line: `permit_access|readonly d5 frame 0x1234`.
impl fmt::Display for EntryV1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} frame {:#x}", self.head, self.frame)
    }
}

/// On one line, the body by its type: `transitive d5 via d1 reference 0x9`.
impl fmt::Display for EntryV2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.head)?;
        match self.body() {
            EntryBodyV2::FullPage { frame } => write!(f, "frame {frame:#x}"),
            EntryBodyV2::SubPage {
                page_off,
                length,
                frame,
            } => write!(f, "frame {frame:#x} offset {page_off} length {length}"),
            EntryBodyV2::Transitive { trans_domid, gref } => write!(f, "via {trans_domid} reference {gref}"),
        }
    }
}
