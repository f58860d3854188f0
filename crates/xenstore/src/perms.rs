//! Permissions: who may read and write a node.
//!
//! On the wire a node's permissions are a list such as `n5 r0 b7`. The first
//! entry names the owner, domain 5, who may always do everything, and its
//! letter is what all *others* may do; the entries after it are exceptions
//! for single domains. The control domain may always do everything.

use crate::DomId;
use alloc::string::{String, ToString as _};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

/// What a list of permissions allows a domain: one of four letters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Access {
    /// `n`: nothing.
    None,
    /// `r`: to read the value, the children's names and the permissions.
    Read,
    /// `w`: to write the value, create children, remove the node.
    Write,
    /// `b`: both.
    Both,
}

impl Access {
    /// The letter on the wire.
    pub const fn letter(self) -> char {
        match self {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        }
    }

    fn from_letter(letter: u8) -> Option<Self> {
        match letter {
            b'n' => Some(Access::None),
            b'r' => Some(Access::Read),
            b'w' => Some(Access::Write),
            b'b' => Some(Access::Both),
            _ => None,
        }
    }

    const fn includes(self, right: Right) -> bool {
        match right {
            Right::Read => matches!(self, Access::Read | Access::Both),
            Right::Write => matches!(self, Access::Write | Access::Both),
            Right::Own => false,
        }
    }
}

/// What a request needs of the permissions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Right {
    /// To look at the node.
    Read,
    /// To change or remove it.
    Write,
    /// To change its permissions, as only its owner may.
    Own,
}

/// Who asks: a domain, and the domain it acts for if the toolstack has set one
/// (a device model acting for its guest).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The domain.
    pub dom: DomId,
    /// The domain whose rights it has as well.
    pub target: Option<DomId>,
}

impl Caller {
    /// The domain itself, acting for nobody.
    pub const fn new(dom: DomId) -> Self {
        Caller { dom, target: None }
    }

    /// Whether permissions and quotas do not apply.
    pub const fn is_privileged(self) -> bool {
        self.dom.is_privileged()
    }
}

/// Why a text is not a list of permissions.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PermsError {
    /// The list is empty: a node must have an owner.
    #[error("permissions need at least one entry, which names the owner")]
    NoOwner,
    /// An entry that is not a letter of `nrwb` and a domain number.
    #[error("`{0}` is no permission: one of n, r, w, b and a domain number, as in r5")]
    BadEntry(String),
}

/// The permissions of a node.
///
/// Having one tells you: there is exactly one owner, and every entry names a
/// 16-bit domain id. It does *not* tell you that these domains exist.
///
/// ```
/// use gnttab_xenstore::DomId;
/// use gnttab_xenstore::perms::{Caller, Perms, Right};
///
/// let perms: Perms = "n5,r7".parse()?;
/// assert!(perms.allow(Caller::new(DomId::new(5)), Right::Write)); // the owner
/// assert!(perms.allow(Caller::new(DomId::new(7)), Right::Read));
/// assert!(!perms.allow(Caller::new(DomId::new(7)), Right::Write));
/// assert!(!perms.allow(Caller::new(DomId::new(8)), Right::Read)); // all others: n
/// # Ok::<(), gnttab_xenstore::perms::PermsError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Perms {
    owner: DomId,
    others: Access,
    entries: Vec<(DomId, Access)>,
}

impl Perms {
    /// Permissions with an owner and what all others may do.
    pub const fn new(owner: DomId, others: Access) -> Self {
        Perms {
            owner,
            others,
            entries: Vec::new(),
        }
    }

    /// The same with an exception for one domain.
    #[must_use]
    pub fn with(mut self, dom: DomId, access: Access) -> Self {
        self.entries.push((dom, access));
        self
    }

    /// The owner.
    pub const fn owner(&self) -> DomId {
        self.owner
    }

    /// What all domains may do that have no entry of their own.
    pub const fn others(&self) -> Access {
        self.others
    }

    /// The exceptions for single domains. Of two for one domain the first counts.
    pub fn entries(&self) -> &[(DomId, Access)] {
        &self.entries
    }

    /// The number of entries with the owner's, as the quota counts them.
    pub(crate) fn len(&self) -> usize {
        1 + self.entries.len()
    }

    /// Whether the caller has this right, itself or through its target.
    pub fn allow(&self, caller: Caller, right: Right) -> bool {
        caller.is_privileged()
            || self.allow_domain(caller.dom, right)
            || caller
                .target
                .is_some_and(|target| self.allow_domain(target, right))
    }

    fn allow_domain(&self, dom: DomId, right: Right) -> bool {
        if dom == self.owner {
            return true;
        }
        let own = self.entries.iter().find(|entry| entry.0 == dom);
        own.map_or(self.others, |entry| entry.1).includes(right)
    }

    /// What a child gets that is created under a node with these permissions:
    /// the same, owned by whoever creates it. A privileged caller leaves the
    /// owner as it is, so that the toolstack can fill a guest's directory.
    pub(crate) fn inherited_by(&self, creator: Caller) -> Perms {
        let owner = if creator.is_privileged() {
            self.owner
        } else {
            creator.dom
        };
        Perms {
            owner,
            others: self.others,
            entries: self.entries.clone(),
        }
    }

    /// The same without the entries of `dom`; none if there are none.
    pub(crate) fn without(&self, dom: DomId) -> Option<Perms> {
        let entries: Vec<_> = self
            .entries
            .iter()
            .copied()
            .filter(|entry| entry.0 != dom)
            .collect();
        (entries.len() < self.entries.len()).then_some(Perms { entries, ..*self })
    }

    /// Reads entries as the wire has them, one string each.
    ///
    /// # Errors
    ///
    /// [`PermsError`].
    pub fn parse<'a>(entries: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, PermsError> {
        let mut entries = entries.into_iter().map(|text| {
            let entry = text
                .split_first()
                .and_then(|(&letter, digits)| Some((DomId::parse(digits)?, Access::from_letter(letter)?)));
            entry.ok_or_else(|| PermsError::BadEntry(text.escape_ascii().to_string()))
        });
        let (owner, others) = entries.next().ok_or(PermsError::NoOwner)??;
        Ok(Perms {
            owner,
            others,
            entries: entries.collect::<Result<_, _>>()?,
        })
    }

    /// Writes the entries as the wire has them, each ended by a NUL.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        for (dom, access) in self.all() {
            out.extend_from_slice(alloc::format!("{}{}\0", access.letter(), dom.get()).as_bytes());
        }
    }

    fn all(&self) -> impl Iterator<Item = (DomId, Access)> {
        core::iter::once((self.owner, self.others)).chain(self.entries.iter().copied())
    }
}

impl FromStr for Perms {
    type Err = PermsError;

    /// Reads a comma-separated list, as `xenstore-ls -p` prints it.
    fn from_str(text: &str) -> Result<Self, PermsError> {
        if text.is_empty() {
            return Err(PermsError::NoOwner);
        }
        Perms::parse(text.split(',').map(str::as_bytes))
    }
}

impl fmt::Display for Perms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (dom, access)) in self.all().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}{}", access.letter(), dom.get())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn perms(text: &str) -> Perms {
        text.parse().unwrap()
    }

    fn dom(id: u16) -> Caller {
        Caller::new(DomId::new(id))
    }

    #[test]
    fn the_first_entry_is_owner_and_default() {
        let p = perms("r5,n6,w7,b8");
        assert_eq!(p.owner(), DomId::new(5));
        let can = |id| (p.allow(dom(id), Right::Read), p.allow(dom(id), Right::Write));
        assert_eq!(can(5), (true, true));
        assert_eq!(can(6), (false, false));
        assert_eq!(can(7), (false, true));
        assert_eq!(can(8), (true, true));
        assert_eq!(can(9), (true, false));
        assert_eq!(can(0), (true, true), "the control domain");
    }

    #[test]
    fn only_owner_and_control_domain_own() {
        let p = perms("b5,b6");
        assert!(p.allow(dom(5), Right::Own));
        assert!(p.allow(dom(0), Right::Own));
        assert!(!p.allow(dom(6), Right::Own));
        assert!(!p.allow(dom(7), Right::Own));
    }

    #[test]
    fn of_two_entries_the_first_counts() {
        assert!(!perms("n5,n6,b6").allow(dom(6), Right::Read));
    }

    #[test]
    fn a_target_lends_its_rights() {
        let stub = Caller {
            dom: DomId::new(9),
            target: Some(DomId::new(5)),
        };
        assert!(perms("n5").allow(stub, Right::Own));
        assert!(!perms("n6").allow(stub, Right::Read));
        // Its own rights are not narrowed by the target's.
        assert!(perms("n6,r9,n5").allow(stub, Right::Read));
    }

    #[test]
    fn creators_own_what_they_create_but_the_toolstack_does_not() {
        let parent = perms("n5,r7");
        assert_eq!(parent.inherited_by(dom(6)), perms("n6,r7"));
        assert_eq!(parent.inherited_by(dom(0)), perms("n5,r7"));
    }

    #[test]
    fn lists_print_as_they_are_read() {
        for text in ["n0", "r5,b65535", "w1,n2,r3"] {
            assert_eq!(perms(text).to_string(), text);
        }
        for text in ["", "x5", "r", "5", "r-1", "r65536", "r 5", "R5", "r5,", "r+5"] {
            assert!(text.parse::<Perms>().is_err(), "{text}");
        }
    }
}
