use core::fmt;

/// A domain's identifier.
///
/// Only the number: having one says nothing of whether such a domain exists.
/// Printed as `d5`; the wire has the bare decimal, which [`DomId::get`] gives.
///
/// ```
/// use gnttab_xenstore::DomId;
///
/// let dom = DomId::new(5);
/// assert_eq!(dom.get(), 5);
/// assert_eq!(dom.to_string(), "d5");
/// assert!(DomId::DOM0.is_privileged());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DomId(u16);

impl DomId {
    /// The control domain: it runs the toolstack and may do everything.
    pub const DOM0: DomId = DomId(0);

    /// The first of the reserved identifiers (`DOMID_FIRST_RESERVED`), which
    /// name no ordinary domain.
    pub const FIRST_RESERVED: DomId = DomId(0x7ff0);

    /// The domain of this number.
    pub const fn new(id: u16) -> Self {
        DomId(id)
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Whether permissions and quotas do not apply to this domain.
    pub const fn is_privileged(self) -> bool {
        self.0 == Self::DOM0.0
    }

    /// Reads what the wire carries: decimal digits and nothing else.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        crate::wire::decimal(text).map(DomId)
    }
}

impl From<u16> for DomId {
    fn from(id: u16) -> Self {
        DomId(id)
    }
}

impl From<DomId> for u16 {
    fn from(dom: DomId) -> Self {
        dom.0
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}
