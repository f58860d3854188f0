//! What a shell needs of a machine, be it in memory or running.

use gnttab_abi::{DomId, GrantHandle, GrantRef};

/// Why something was not done: for people, with the status where there is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

impl Refused {
    pub(crate) fn new(why: impl std::fmt::Display) -> Refused {
        Refused(why.to_string())
    }
}

/// What is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Grant {
    pub(crate) readonly: bool,
    /// First byte and length of a part of the page.
    pub(crate) part: Option<(u16, u16)>,
}

/// A page that a domain can read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The one that it has granted by this reference.
    Own(GrantRef),
    /// Another's, that it has mapped.
    Mapped(GrantHandle),
}

/// A machine with domains that do what they are told.
pub(crate) trait World {
    /// The domains that can be told something, and their names.
    fn domains(&self) -> Vec<(DomId, String)>;

    /// One domain more.
    fn add(&mut self, name: &str) -> Result<DomId, Refused>;

    /// Grants a fresh page.
    fn grant(&mut self, dom: DomId, to: DomId, grant: Grant) -> Result<GrantRef, Refused>;

    /// Ends access, unless a peer still has it; `force`: writes the entry free all the same, as a broken driver would.
    fn end(&mut self, dom: DomId, gref: GrantRef, force: bool) -> Result<(), Refused>;

    fn map(
        &mut self,
        dom: DomId,
        granter: DomId,
        gref: GrantRef,
        readonly: bool,
    ) -> Result<GrantHandle, Refused>;

    fn unmap(&mut self, dom: DomId, handle: GrantHandle) -> Result<(), Refused>;

    fn read(&mut self, dom: DomId, place: Place, offset: usize, into: &mut [u8]) -> Result<(), Refused>;

    fn write(&mut self, dom: DomId, place: Place, offset: usize, bytes: &[u8]) -> Result<(), Refused>;

    /// Has the hypervisor copy from another's reference into memory of the caller's: the bytes.
    fn copy(
        &mut self,
        dom: DomId,
        granter: DomId,
        gref: GrantRef,
        offset: u16,
        len: u16,
    ) -> Result<Vec<u8>, Refused>;

    /// Waits for a page that `from` gives away.
    fn accept(&mut self, dom: DomId, from: DomId) -> Result<GrantRef, Refused>;

    /// Gives a fresh page away.
    fn transfer(&mut self, dom: DomId, to: DomId, gref: GrantRef) -> Result<(), Refused>;

    fn set_version(&mut self, dom: DomId, version: u32) -> Result<(), Refused>;

    /// Ends a domain at once, with all that it has mapped: what became of it.
    fn kill(&mut self, dom: DomId) -> Result<String, Refused>;

    /// An entry as it lies and as it reads; `None`: past the table, or no such domain.
    fn entry(&mut self, dom: DomId, gref: GrantRef) -> Option<String>;

    /// Who granted what a handle maps.
    fn granted(&self, dom: DomId, handle: GrantHandle) -> Option<(DomId, GrantRef)>;

    /// References that a domain has in use, and handles that it has.
    fn names(&self, dom: DomId) -> (Vec<GrantRef>, Vec<GrantHandle>);
}
