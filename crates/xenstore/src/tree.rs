//! The nodes, and nothing of who may do what with them.
//!
//! A persistent tree: nodes are shared by reference, a clone of the whole
//! costs one count, and a change copies the nodes from the root to it only if
//! a clone still holds them. That is what makes the snapshot of a transaction
//! cheap.
//!
//! # Invariants
//!
//! - The root always exists.
//! - `owned` counts, for every domain, the nodes whose permissions name it as
//!   owner; there is no entry for a count of zero.
//! - `names_len` of a node is the sum of its children's names, each with a NUL.
//! - A generation is never given twice in one tree, so two trees that came
//!   from one snapshot and agree on a generation agree on what it stands for,
//!   as long as only one of them went on.

use crate::DomId;
use crate::path::Path;
use crate::perms::{Access, Perms};
use crate::store::ConnId;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// The last change of something: when, and through which connection if it was
/// through one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stamp {
    pub(crate) generation: u64,
    pub(crate) by: Option<ConnId>,
}

/// One node.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    value: Arc<[u8]>,
    perms: Arc<Perms>,
    children: BTreeMap<Arc<str>, Arc<Node>>,
    names_len: usize,
    content: Stamp,
    list: Stamp,
}

impl Node {
    pub(crate) fn value(&self) -> &Arc<[u8]> {
        &self.value
    }

    pub(crate) fn perms(&self) -> &Arc<Perms> {
        &self.perms
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.children.keys()
    }

    /// Changes with the value and the permissions.
    pub(crate) fn content(&self) -> Stamp {
        self.content
    }

    /// Changes with the set of children.
    pub(crate) fn list(&self) -> Stamp {
        self.list
    }

    /// What the quota on the size of a node counts.
    pub(crate) fn size(&self) -> usize {
        size(&self.value, &self.perms) + self.names_len
    }

    /// The node that `names` lead to from here.
    pub(crate) fn descend<'n>(&self, names: impl Iterator<Item = &'n str>) -> Option<&Node> {
        let mut node = self;
        for name in names {
            node = node.children.get(name)?;
        }
        Some(node)
    }

    fn adopt(&mut self, name: &str, child: Node) {
        let old = self.children.insert(Arc::from(name), Arc::new(child));
        debug_assert!(old.is_none(), "{name} was there");
        self.names_len += name_size(name);
    }

    /// This node and all below it.
    fn visit(&self, each: &mut impl FnMut(&Node)) {
        each(self);
        for child in self.children.values() {
            child.visit(each);
        }
    }
}

/// The size of a node with this value and these permissions and no children.
pub(crate) fn size(value: &[u8], perms: &Perms) -> usize {
    value.len() + 8 * perms.len()
}

/// What a child of this name adds to the size of its parent.
pub(crate) fn name_size(name: &str) -> usize {
    name.len() + 1
}

/// How far down a path the nodes go.
pub(crate) struct Nearest<'t> {
    /// The last node that exists.
    pub(crate) node: &'t Node,
    /// How many names lead to it; all of them if the path itself exists.
    pub(crate) depth: usize,
    /// Whether the path itself exists.
    pub(crate) exact: bool,
}

/// All nodes.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: Arc<Node>,
    owned: BTreeMap<DomId, usize>,
    last_generation: u64,
}

impl Tree {
    /// The root alone, which the control domain owns and nobody else may see.
    pub(crate) fn new() -> Self {
        let never = Stamp {
            generation: 0,
            by: None,
        };
        let root = Node {
            value: Arc::from([]),
            perms: Arc::new(Perms::new(DomId::DOM0, Access::None)),
            children: BTreeMap::new(),
            names_len: 0,
            content: never,
            list: never,
        };
        Tree {
            root: Arc::new(root),
            owned: BTreeMap::from([(DomId::DOM0, 1)]),
            last_generation: 0,
        }
    }

    pub(crate) fn get(&self, path: &Path) -> Option<&Node> {
        self.root.descend(path.names())
    }

    pub(crate) fn nearest(&self, path: &Path) -> Nearest<'_> {
        let (mut node, mut depth) = (&*self.root, 0);
        for name in path.names() {
            let Some(child) = node.children.get(name) else {
                return Nearest {
                    node,
                    depth,
                    exact: false,
                };
            };
            (node, depth) = (child, depth + 1);
        }
        Nearest {
            node,
            depth,
            exact: true,
        }
    }

    /// The nodes a domain owns.
    pub(crate) fn owned(&self, dom: DomId) -> usize {
        self.owned.get(&dom).copied().unwrap_or(0)
    }

    /// All nodes there are.
    pub(crate) fn len(&self) -> usize {
        self.owned.values().sum()
    }

    /// Sets the value of a node that exists.
    pub(crate) fn set_value(&mut self, path: &Path, value: Arc<[u8]>, by: Option<ConnId>) {
        let stamp = self.stamp(by);
        if let Some(node) = self.get_mut(path) {
            node.value = value;
            node.content = stamp;
        }
    }

    /// Sets the permissions of a node that exists.
    pub(crate) fn set_perms(&mut self, path: &Path, perms: Perms, by: Option<ConnId>) {
        let stamp = self.stamp(by);
        let owner = perms.owner();
        let Some(node) = self.get_mut(path) else { return };
        let old = node.perms.owner();
        node.perms = Arc::new(perms);
        node.content = stamp;
        self.disown(old, 1);
        *self.owned.entry(owner).or_default() += 1;
    }

    /// Adds a node that does not exist, and those missing above it with an
    /// empty value, all with the same permissions. One walk, however deep: a
    /// path has room for 1,500 names.
    pub(crate) fn create(&mut self, path: &Path, value: Arc<[u8]>, perms: Arc<Perms>, by: Option<ConnId>) {
        let depth = self.nearest(path).depth;
        let names: Vec<&str> = path.names().skip(depth).collect();
        let Some((first, below)) = names.split_first() else {
            return;
        };
        let stamp = self.stamp(by);
        let empty = Node {
            value: Arc::from([]),
            perms: perms.clone(),
            children: BTreeMap::new(),
            names_len: 0,
            content: stamp,
            list: stamp,
        };
        let last = Node {
            value,
            ..empty.clone()
        };
        let chain = below.iter().rev().fold(last, |child, name| {
            let mut node = empty.clone();
            node.adopt(name, child);
            node
        });
        let Some(parent) = self.get_mut(&path.prefix(depth)) else {
            return;
        };
        parent.adopt(first, chain);
        parent.list = stamp;
        *self.owned.entry(perms.owner()).or_default() += names.len();
    }

    /// Takes out a node and all below it. The root stays.
    pub(crate) fn remove(&mut self, path: &Path, by: Option<ConnId>) -> Option<Arc<Node>> {
        let stamp = self.stamp(by);
        let (parent, name) = (path.parent()?, path.name()?);
        let parent = self.get_mut(&parent)?;
        let node = parent.children.remove(name)?;
        parent.names_len -= name_size(name);
        parent.list = stamp;
        let mut owners = BTreeMap::<_, usize>::new();
        node.visit(&mut |node| *owners.entry(node.perms.owner()).or_default() += 1);
        for (owner, count) in owners {
            self.disown(owner, count);
        }
        Some(node)
    }

    /// What has to be done so that nothing is left of a domain's rights: the
    /// topmost nodes it owns, and new permissions for nodes that mention it.
    pub(crate) fn traces_of(&self, dom: DomId) -> Traces {
        let mut traces = Traces {
            owned: Vec::new(),
            mentioning: Vec::new(),
        };
        traces.collect(&self.root, &Path::root(), dom);
        traces
    }

    fn stamp(&mut self, by: Option<ConnId>) -> Stamp {
        self.last_generation += 1;
        Stamp {
            generation: self.last_generation,
            by,
        }
    }

    fn disown(&mut self, owner: DomId, nodes: usize) {
        if let Some(count) = self.owned.get_mut(&owner) {
            *count = count.saturating_sub(nodes);
            if *count == 0 {
                self.owned.remove(&owner);
            }
        }
    }

    /// A node to be changed, copied if a snapshot has it too.
    fn get_mut(&mut self, path: &Path) -> Option<&mut Node> {
        let mut node = Arc::make_mut(&mut self.root);
        for name in path.names() {
            node = Arc::make_mut(node.children.get_mut(name)?);
        }
        Some(node)
    }

    /// Counts everything again and compares.
    #[cfg(test)]
    pub(crate) fn audit(&self) {
        let mut owned = BTreeMap::new();
        self.root.visit(&mut |node| {
            *owned.entry(node.perms.owner()).or_default() += 1;
            assert_eq!(
                node.names_len,
                node.names().map(|name| name_size(name)).sum::<usize>()
            );
            assert!(node.content.generation <= self.last_generation);
            assert!(node.list.generation <= self.last_generation);
        });
        assert_eq!(owned, self.owned);
    }
}

/// What [`Tree::traces_of`] found.
pub(crate) struct Traces {
    /// Nodes the domain owns, but those below another of them.
    pub(crate) owned: Vec<Path>,
    /// Nodes that it does not own and whose permissions mention it, with the
    /// permissions that do not.
    pub(crate) mentioning: Vec<(Path, Perms)>,
}

impl Traces {
    fn collect(&mut self, node: &Node, path: &Path, dom: DomId) {
        if node.perms.owner() == dom && !path.is_root() {
            self.owned.push(path.clone());
            return;
        }
        if let Some(perms) = node.perms.without(dom) {
            self.mentioning.push((path.clone(), perms));
        }
        for (name, child) in &node.children {
            // A node's path is legal: it was created by one.
            if let Ok(path) = path.child(name) {
                self.collect(child, &path, dom);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        text.parse().unwrap()
    }

    fn perms(text: &str) -> Arc<Perms> {
        Arc::new(text.parse().unwrap())
    }

    #[test]
    fn a_snapshot_does_not_see_later_changes() {
        let mut tree = Tree::new();
        tree.create(&path("/a"), Arc::from(*b"1"), perms("n5"), None);
        let snapshot = tree.clone();
        tree.set_value(&path("/a"), Arc::from(*b"2"), None);
        tree.create(&path("/a/b"), Arc::from(*b""), perms("n5"), None);
        assert_eq!(&**snapshot.get(&path("/a")).unwrap().value(), b"1");
        assert!(snapshot.get(&path("/a/b")).is_none());
        assert_eq!((snapshot.owned(DomId::new(5)), tree.owned(DomId::new(5))), (1, 2));
        snapshot.audit();
        tree.audit();
    }

    #[test]
    fn without_a_snapshot_nothing_is_copied() {
        let mut tree = Tree::new();
        tree.create(&path("/a"), Arc::from([]), perms("n0"), None);
        let before: *const Node = tree.get(&path("/a")).unwrap();
        tree.set_value(&path("/a"), Arc::from(*b"x"), None);
        assert!(core::ptr::eq(before, tree.get(&path("/a")).unwrap()));
    }

    #[test]
    fn owners_are_counted_through_every_change() {
        let (mut tree, five, six) = (Tree::new(), DomId::new(5), DomId::new(6));
        tree.create(&path("/a"), Arc::from([]), perms("n5"), None);
        tree.create(&path("/a/b"), Arc::from([]), perms("n6"), None);
        tree.create(&path("/a/c"), Arc::from([]), perms("n5"), None);
        assert_eq!((tree.owned(five), tree.owned(six), tree.len()), (2, 1, 4));
        tree.set_perms(&path("/a/c"), Perms::clone(&perms("n6")), None);
        assert_eq!((tree.owned(five), tree.owned(six)), (1, 2));
        assert!(tree.remove(&path("/a"), None).is_some());
        assert_eq!((tree.owned(five), tree.owned(six), tree.len()), (0, 0, 1));
        tree.audit();
    }

    #[test]
    fn the_root_cannot_be_removed() {
        let mut tree = Tree::new();
        assert!(tree.remove(&Path::root(), None).is_none());
        assert!(tree.get(&Path::root()).is_some());
    }

    #[test]
    fn the_deepest_legal_tree_can_be_built_searched_and_dropped() {
        let mut tree = Tree::new();
        let deepest = path(&"/a".repeat(crate::path::ABSOLUTE_MAX / 2));
        tree.create(&deepest, Arc::from([]), perms("n0,r5"), None);
        assert_eq!(tree.len(), 1537);
        assert_eq!(tree.traces_of(DomId::new(5)).mentioning.len(), 1536);
        let snapshot = tree.clone();
        tree.set_value(&deepest, Arc::from(*b"x"), None);
        tree.audit();
        assert!(tree.remove(&path("/a"), None).is_some());
        drop((tree, snapshot));
    }
}
