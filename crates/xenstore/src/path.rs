//! Paths: where a node is, and what can be watched.
//!
//! A path in a message is absolute (`/local/domain/5/name`) or relative to
//! the home of the domain that sent it (`name`, the home of domain 5 being
//! `/local/domain/5`). The store itself knows absolute paths only; the
//! relative form is kept where an answer has to be relative as well, as in
//! the events of a watch that was set with a relative path.

use crate::DomId;
use alloc::borrow::ToOwned as _;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::borrow::Borrow;
use core::fmt;
use core::str::FromStr;

/// The longest absolute path, in bytes (`XENSTORE_ABS_PATH_MAX`).
pub const ABSOLUTE_MAX: usize = 3072;

/// The longest relative path, in bytes (`XENSTORE_REL_PATH_MAX`).
pub const RELATIVE_MAX: usize = 2048;

/// Why a text is not a path. The store answers each of them with `EINVAL`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// There is no text.
    #[error("a path cannot be empty")]
    Empty,
    /// It is longer than the protocol allows for its form.
    #[error("a path of {len} bytes is too long: the limit is {max}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The longest allowed: [`ABSOLUTE_MAX`] or [`RELATIVE_MAX`].
        max: usize,
    },
    /// A byte that is none of `A-Za-z0-9-/_@`.
    #[error("byte {byte:#04x} at {at} cannot be in a path: only A-Z a-z 0-9 - / _ @")]
    BadByte {
        /// Where, from 0.
        at: usize,
        /// The byte.
        byte: u8,
    },
    /// Two slashes in a row, or one at the end.
    #[error("the path has an empty name at {at}: `//` and a trailing `/` are not allowed")]
    EmptyName {
        /// Where the name should begin, from 0.
        at: usize,
    },
    /// It begins with `@`, as only the special names do.
    #[error("a name that begins with `@` is no node: only @introduceDomain and @releaseDomain exist")]
    Special,
}

/// Checks the names that follow the leading slash, or the whole of a relative path.
fn check_names(text: &[u8], start: usize) -> Result<(), PathError> {
    let mut name_start = start;
    for (at, &byte) in text.iter().enumerate().skip(start) {
        match byte {
            b'/' if at == name_start => return Err(PathError::EmptyName { at }),
            b'/' => name_start = at + 1,
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'@' => {}
            _ => return Err(PathError::BadByte { at, byte }),
        }
    }
    if name_start == text.len() {
        return Err(PathError::EmptyName { at: name_start });
    }
    Ok(())
}

/// The text of bytes of which [`check_names`] has found that they are ASCII.
fn text(checked: &[u8]) -> Arc<str> {
    debug_assert!(checked.is_ascii());
    Arc::from(String::from_utf8_lossy(checked))
}

/// An absolute path of a node.
///
/// Having one tells you: it begins with `/`; it is `/` alone (the root) or a
/// sequence of names, each of at least one of `A-Za-z0-9-_@`; it does not end
/// in `/`; it has at most [`ABSOLUTE_MAX`] bytes. It does *not* tell you that
/// there is such a node.
///
/// ```
/// use gnttab_xenstore::path::Path;
///
/// let path: Path = "/local/domain/5/name".parse()?;
/// assert_eq!(path.parent().unwrap().as_str(), "/local/domain/5");
/// assert!("/local//domain".parse::<Path>().is_err());
/// # Ok::<(), gnttab_xenstore::path::PathError>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Path(Arc<str>);

impl Path {
    /// `/`, the one node that always exists.
    pub fn root() -> Self {
        Path(Arc::from("/"))
    }

    /// The home of a domain, `/local/domain/<id>`: what its relative paths are relative to.
    pub fn home(dom: DomId) -> Self {
        Path(Arc::from(format!("/local/domain/{}", dom.get())))
    }

    /// Reads an absolute path.
    ///
    /// # Errors
    ///
    /// [`PathError`], also for a path that does not begin with a slash.
    pub fn parse(bytes: &[u8]) -> Result<Self, PathError> {
        match bytes.first() {
            None => return Err(PathError::Empty),
            Some(b'/') => {}
            Some(&byte) => return Err(PathError::BadByte { at: 0, byte }),
        }
        if bytes.len() > ABSOLUTE_MAX {
            return Err(PathError::TooLong {
                len: bytes.len(),
                max: ABSOLUTE_MAX,
            });
        }
        if bytes.len() > 1 {
            check_names(bytes, 1)?;
        }
        Ok(Path(text(bytes)))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `/`.
    pub fn is_root(&self) -> bool {
        self.0.len() == 1
    }

    /// The names from the root down; none for the root.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }

    /// The last name; none for the root.
    pub fn name(&self) -> Option<&str> {
        self.names().last()
    }

    /// The path one level up; none for the root.
    pub fn parent(&self) -> Option<Path> {
        let (head, name) = self.0.rsplit_once('/')?;
        match (head, name) {
            ("", "") => None,
            ("", _) => Some(Path::root()),
            (head, _) => Some(Path(Arc::from(head))),
        }
    }

    /// The text of this path and of those above it, the root last.
    pub fn and_ancestors(&self) -> impl Iterator<Item = &str> {
        core::iter::successors(Some(self.as_str()), |path| {
            let path: &str = path;
            match path.rfind('/')? {
                _ if path.len() == 1 => None,
                0 => Some(&path[..1]),
                end => Some(&path[..end]),
            }
        })
    }

    /// What is left of this path below `above`: the empty string if it is
    /// `above` itself, none if it is not at or below it.
    pub fn below(&self, above: &Path) -> Option<&str> {
        if above.is_root() {
            return Some(&self.0[1..]);
        }
        match self.0.strip_prefix(above.as_str())? {
            "" => Some(""),
            rest => rest.strip_prefix('/'),
        }
    }

    /// The path of a child.
    ///
    /// # Errors
    ///
    /// [`PathError`] if `name` is not one legal name, or the whole is too long.
    pub fn child(&self, name: &str) -> Result<Path, PathError> {
        if let Some(at) = name.find('/') {
            return Err(PathError::BadByte { at, byte: b'/' });
        }
        let parent = if self.is_root() { "" } else { self.as_str() };
        Path::parse(format!("{parent}/{name}").as_bytes())
    }

    /// The first `depth` names of this path.
    pub(crate) fn prefix(&self, depth: usize) -> Path {
        if depth == 0 {
            return Path::root();
        }
        match self.0.match_indices('/').nth(depth) {
            Some((end, _)) => Path(Arc::from(&self.0[..end])),
            None => self.clone(),
        }
    }
}

impl Borrow<str> for Path {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for Path {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        Path::parse(text.as_bytes())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A path relative to the home of some domain.
///
/// Having one tells you: it does not begin with `/` or `@`, is not empty, has
/// legal names only and at most [`RELATIVE_MAX`] bytes. With any home in front
/// of it, it is a legal [`Path`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelativePath(Arc<str>);

impl RelativePath {
    /// Reads a relative path.
    ///
    /// # Errors
    ///
    /// [`PathError`], also for a path that begins with a slash.
    pub fn parse(bytes: &[u8]) -> Result<Self, PathError> {
        match bytes.first() {
            None => return Err(PathError::Empty),
            Some(b'@') => return Err(PathError::Special),
            Some(_) => {}
        }
        if bytes.len() > RELATIVE_MAX {
            return Err(PathError::TooLong {
                len: bytes.len(),
                max: RELATIVE_MAX,
            });
        }
        check_names(bytes, 0)?;
        Ok(RelativePath(text(bytes)))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A node's path as a message carries it: absolute, or relative to the home
/// of the domain that sent it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum NodePath {
    /// From the root.
    Absolute(Path),
    /// From the home of the sender.
    Relative(RelativePath),
}

impl NodePath {
    /// Reads either form.
    ///
    /// # Errors
    ///
    /// [`PathError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, PathError> {
        if bytes.first() == Some(&b'/') {
            Path::parse(bytes).map(NodePath::Absolute)
        } else {
            RelativePath::parse(bytes).map(NodePath::Relative)
        }
    }

    /// The node meant when `dom` says this path.
    pub fn resolve(&self, dom: DomId) -> Path {
        match self {
            NodePath::Absolute(path) => path.clone(),
            // Legal by what a `RelativePath` is, and 2048 + "/local/domain/65535/" < 3072.
            NodePath::Relative(rest) => Path(Arc::from(format!("{}/{rest}", Path::home(dom)))),
        }
    }

    /// The text, as it was sent.
    pub fn as_str(&self) -> &str {
        match self {
            NodePath::Absolute(path) => path.as_str(),
            NodePath::Relative(path) => path.as_str(),
        }
    }
}

impl FromStr for NodePath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        NodePath::parse(text.as_bytes())
    }
}

impl From<Path> for NodePath {
    fn from(path: Path) -> Self {
        NodePath::Absolute(path)
    }
}

impl fmt::Display for NodePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The names that are no nodes but can be watched, and have permissions that
/// say who hears of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Special {
    /// `@introduceDomain`: a domain became known to the store.
    IntroduceDomain,
    /// `@releaseDomain`: a domain is gone.
    ReleaseDomain,
}

impl Special {
    /// The name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Special::IntroduceDomain => "@introduceDomain",
            Special::ReleaseDomain => "@releaseDomain",
        }
    }
}

/// What can be watched: a node or a [`Special`] name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    /// A node, present or not.
    Node(NodePath),
    /// A special name.
    Special(Special),
}

impl Place {
    /// Reads a path or a special name.
    ///
    /// # Errors
    ///
    /// [`PathError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, PathError> {
        for special in [Special::IntroduceDomain, Special::ReleaseDomain] {
            if bytes == special.as_str().as_bytes() {
                return Ok(Place::Special(special));
            }
        }
        NodePath::parse(bytes).map(Place::Node)
    }

    /// The text, as it was sent.
    pub fn as_str(&self) -> &str {
        match self {
            Place::Node(path) => path.as_str(),
            Place::Special(special) => special.as_str(),
        }
    }
}

impl FromStr for Place {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        Place::parse(text.as_bytes())
    }
}

impl From<NodePath> for Place {
    fn from(path: NodePath) -> Self {
        Place::Node(path)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A single name, as a directory lists it.
pub(crate) fn is_name(bytes: &[u8]) -> bool {
    !bytes.contains(&b'/') && check_names(bytes, 0).is_ok()
}

/// `path` as its watcher wants to see it: relative to the home of `dom` where
/// that is asked for and where the result is a legal relative path.
pub(crate) fn seen_from(path: &Path, dom: DomId, relative: bool) -> Option<NodePath> {
    if !relative {
        return Some(NodePath::Absolute(path.clone()));
    }
    let rest = path.below(&Path::home(dom))?.to_owned();
    RelativePath::parse(rest.as_bytes()).ok().map(NodePath::Relative)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString as _;
    use alloc::vec::Vec;

    fn path(text: &str) -> Path {
        text.parse().unwrap()
    }

    #[test]
    fn legal_paths_keep_their_text() {
        for text in ["/", "/a", "/local/domain/5", "/A-z_0/@9"] {
            assert_eq!(path(text).to_string(), text);
        }
        assert!(matches!(NodePath::parse(b"a/b"), Ok(NodePath::Relative(_))));
    }

    #[test]
    fn illegal_paths_are_told_why() {
        let bad = |text: &[u8]| NodePath::parse(text).unwrap_err();
        assert_eq!(bad(b""), PathError::Empty);
        assert_eq!(bad(b"//"), PathError::EmptyName { at: 1 });
        assert_eq!(bad(b"/a//b"), PathError::EmptyName { at: 3 });
        assert_eq!(bad(b"/a/"), PathError::EmptyName { at: 3 });
        assert_eq!(bad(b"a/"), PathError::EmptyName { at: 2 });
        assert_eq!(bad(b"/a b"), PathError::BadByte { at: 2, byte: b' ' });
        assert_eq!(bad(b"/a\0"), PathError::BadByte { at: 2, byte: 0 });
        assert_eq!(bad(b"/\xff"), PathError::BadByte { at: 1, byte: 0xff });
        assert_eq!(bad(b"/a.b"), PathError::BadByte { at: 2, byte: b'.' });
        assert_eq!(bad(b"@other"), PathError::Special);
        assert_eq!(bad(b"@releaseDomain"), PathError::Special);
    }

    #[test]
    fn length_limits_are_exact() {
        let of = |head: &str, len: usize| {
            let mut text = head.as_bytes().to_vec();
            text.resize(len, b'x');
            NodePath::parse(&text)
        };
        assert!(of("/", ABSOLUTE_MAX).is_ok());
        assert_eq!(
            of("/", ABSOLUTE_MAX + 1),
            Err(PathError::TooLong { len: 3073, max: 3072 })
        );
        assert!(of("x", RELATIVE_MAX).is_ok());
        assert_eq!(
            of("x", RELATIVE_MAX + 1),
            Err(PathError::TooLong { len: 2049, max: 2048 })
        );
    }

    #[test]
    fn parents_end_at_the_root() {
        let all = |text| path(text).and_ancestors().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(all("/a/b"), ["/a/b", "/a", "/"]);
        assert_eq!(all("/"), ["/"]);
        assert_eq!(Path::root().parent(), None);
    }

    #[test]
    fn below_takes_whole_names() {
        assert_eq!(path("/a/b/c").below(&path("/a")), Some("b/c"));
        assert_eq!(path("/a").below(&path("/a")), Some(""));
        assert_eq!(path("/ab").below(&path("/a")), None);
        assert_eq!(path("/a").below(&Path::root()), Some("a"));
    }

    #[test]
    fn prefix_counts_names() {
        assert_eq!(path("/a/b/c").prefix(0), Path::root());
        assert_eq!(path("/a/b/c").prefix(2), path("/a/b"));
        assert_eq!(path("/a/b/c").prefix(3), path("/a/b/c"));
    }

    #[test]
    fn relative_paths_begin_at_the_senders_home() {
        let sent: NodePath = "device/vbd".parse().unwrap();
        assert_eq!(sent.resolve(DomId::new(7)), path("/local/domain/7/device/vbd"));
        let back = seen_from(&path("/local/domain/7/device/vbd/0"), DomId::new(7), true);
        assert_eq!(back.unwrap().as_str(), "device/vbd/0");
        assert_eq!(seen_from(&path("/local/domain/70/x"), DomId::new(7), true), None);
    }
}
