//! The names of things: domains, references, handles and frames.

use core::fmt;

/// Bytes in a page, on every architecture (spec 0.1).
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// A domain's number (`domid_t`, 16 bits; spec 1.1).
///
/// Ordinary domains lie below [`DomId::FIRST_RESERVED`]. Having one says nothing
/// about whether such a domain exists.
///
/// ```
/// use gnttab_abi::DomId;
///
/// assert!(DomId(5).is_ordinary());
/// assert!(!DomId::SELF.is_ordinary());
/// assert_eq!(DomId(5).to_string(), "d5");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(pub u16);

impl DomId {
    /// First number that is not an ordinary domain's.
    pub const FIRST_RESERVED: DomId = DomId(0x7FF0);
    /// "The caller", where an operation allows it.
    pub const SELF: DomId = DomId(0x7FF0);
    /// Pseudo domain that owns memory-mapped I/O.
    pub const IO: DomId = DomId(0x7FF1);
    /// Pseudo domain that owns the hypervisor's shared frames.
    pub const XEN: DomId = DomId(0x7FF2);
    /// Pseudo domain that owns copy-on-write frames.
    pub const COW: DomId = DomId(0x7FF3);
    /// No domain.
    pub const INVALID: DomId = DomId(0x7FF4);
    /// Any domain (newer headers).
    pub const ANY: DomId = DomId(0x7FF5);
    /// The idle domain.
    pub const IDLE: DomId = DomId(0x7FFF);

    /// Whether this is the number of an ordinary domain.
    #[must_use]
    pub const fn is_ordinary(self) -> bool {
        self.0 < Self::FIRST_RESERVED.0
    }
}

/// `d5`; the special number of the caller as `self`.
impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            DomId::SELF => f.write_str("self"),
            DomId(id) => write!(f, "d{id}"),
        }
    }
}

/// A grant reference (`grant_ref_t`): the index of an entry in its granter's table.
///
/// Chosen by the granter; for everybody else it is an untrusted number. 32 bits (spec 1.1).
///
/// ```
/// use gnttab_abi::GrantRef;
///
/// assert_eq!(GrantRef(0x679a).to_string(), "0x679a");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantRef(pub u32);

impl GrantRef {
    /// The number that drivers use for "no reference".
    pub const INVALID: GrantRef = GrantRef(u32::MAX);
}

/// In hexadecimal.
impl fmt::Display for GrantRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The handle of one mapping (`grant_handle_t`), given out by map, used up by unmap.
///
/// Opaque to the domain that holds it. 32 bits (spec 1.1).
///
/// ```
/// use gnttab_abi::GrantHandle;
///
/// assert_eq!(GrantHandle(256).to_string(), "256");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantHandle(pub u32);

impl GrantHandle {
    /// The number that drivers use for "no handle".
    pub const INVALID: GrantHandle = GrantHandle(u32::MAX);
}

/// In decimal.
impl fmt::Display for GrantHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A guest frame number: a page as its domain names it.
///
/// For a PV domain that is the machine frame (spec 0.1).
///
/// ```
/// use gnttab_abi::Gfn;
///
/// assert_eq!(Gfn::containing(0x1234_5678), Gfn(0x1_2345));
/// assert_eq!(Gfn(0x1_2345).address(), 0x1234_5000);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// "No frame": what table look-ups answer for a page that is not mapped (spec 3.5 step 9).
    pub const INVALID: Gfn = Gfn(u64::MAX);

    /// The frame that holds a guest address (bytes); its low 12 bits are dropped.
    #[must_use]
    pub const fn containing(address: u64) -> Gfn {
        Gfn(address >> PAGE_SHIFT)
    }

    /// First byte of the frame, wrapping for numbers that no address reaches.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

/// In hexadecimal.
impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A machine frame number: a page as the hypervisor names it (spec 0.1).
///
/// ```
/// use gnttab_abi::Mfn;
///
/// assert_eq!(Mfn::containing(0xfff), Mfn(0));
/// assert_eq!(Mfn(0x55).address(), 0x5_5000);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mfn(pub u64);

impl Mfn {
    /// First machine byte of the frame, wrapping for numbers that no address reaches.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The frame that holds a machine address (bytes).
    #[must_use]
    pub const fn containing(address: u64) -> Mfn {
        Mfn(address >> PAGE_SHIFT)
    }
}

/// In hexadecimal.
impl fmt::Display for Mfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
