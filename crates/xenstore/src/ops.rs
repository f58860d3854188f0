//! What a caller may do with the nodes: permissions, inheritance and quotas.
//!
//! Every operation here works on a [`Tree`], which is the store's own or the
//! one of a transaction, and notes in [`Seen`] what its outcome depended on.
//! It checks everything before it changes anything.
//!
//! One rule keeps a domain from learning of nodes it may not see: where the
//! path does not exist, the nearest node above that does decides. Who may not
//! read that one (or write it, if the request writes) is refused with `EACCES`
//! and cannot tell a missing node from a hidden one.

use crate::path::Path;
use crate::perms::{Caller, Perms, Right};
use crate::store::ConnId;
use crate::tree::{Node, Tree, name_size, size};
use crate::{Errno, Quotas};
use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Who acts, and under which limits.
#[derive(Clone, Copy)]
pub(crate) struct Actor<'q> {
    pub(crate) conn: ConnId,
    pub(crate) caller: Caller,
    pub(crate) quotas: &'q Quotas,
}

impl Actor<'_> {
    /// Refuses with `errno` what is past a limit, unless there are none for the caller.
    pub(crate) fn within(&self, used: usize, limit: usize, errno: Errno) -> Result<(), Errno> {
        if used <= limit || self.caller.is_privileged() {
            Ok(())
        } else {
            Err(errno)
        }
    }
}

/// What the outcome of operations depended on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    /// Whether the node exists, its value and its permissions.
    pub(crate) content: bool,
    /// The names of its children.
    pub(crate) list: bool,
}

/// The nodes that operations looked at: what a transaction must find unchanged
/// when it commits. Outside a transaction nobody asks, and nothing is kept.
#[derive(Debug)]
pub(crate) struct Seen(Option<Kept>);

#[derive(Default, Debug)]
struct Kept {
    nodes: BTreeMap<Path, Parts>,
    /// The bytes of all their paths.
    size: usize,
}

impl Seen {
    pub(crate) const fn not_kept() -> Seen {
        Seen(None)
    }

    pub(crate) fn kept() -> Seen {
        Seen(Some(Kept::default()))
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&Path, Parts)> {
        self.0
            .iter()
            .flat_map(|kept| &kept.nodes)
            .map(|(path, parts)| (path, *parts))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |kept| kept.nodes.len())
    }

    pub(crate) fn size(&self) -> usize {
        self.0.as_ref().map_or(0, |kept| kept.size)
    }

    fn note(&mut self, path: impl FnOnce() -> Path, parts: Parts) {
        let Some(kept) = &mut self.0 else { return };
        match kept.nodes.entry(path()) {
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.content |= parts.content;
                known.list |= parts.list;
            }
            Entry::Vacant(new) => {
                kept.size += new.key().as_str().len();
                new.insert(parts);
            }
        }
    }
}

/// The node at `path`, if it exists and the caller has this right on it.
fn find<'t>(
    tree: &'t Tree,
    actor: &Actor<'_>,
    seen: &mut Seen,
    path: &Path,
    right: Right,
) -> Result<&'t Node, Errno> {
    let nearest = tree.nearest(path);
    seen.note(
        || path.prefix(nearest.depth),
        Parts {
            content: true,
            list: false,
        },
    );
    if !nearest.exact {
        // While the first missing one is missing, so is the path.
        seen.note(
            || path.prefix(nearest.depth + 1),
            Parts {
                content: true,
                list: false,
            },
        );
    }
    if !nearest.node.perms().allow(actor.caller, right) {
        return Err(Errno::EACCES);
    }
    if nearest.exact {
        Ok(nearest.node)
    } else {
        Err(Errno::ENOENT)
    }
}

pub(crate) fn read(tree: &Tree, actor: &Actor<'_>, seen: &mut Seen, path: &Path) -> Result<Arc<[u8]>, Errno> {
    Ok(find(tree, actor, seen, path, Right::Read)?.value().clone())
}

pub(crate) fn perms(
    tree: &Tree,
    actor: &Actor<'_>,
    seen: &mut Seen,
    path: &Path,
) -> Result<Arc<Perms>, Errno> {
    Ok(find(tree, actor, seen, path, Right::Read)?.perms().clone())
}

/// The names of the children, and the generation of that list.
pub(crate) fn directory(
    tree: &Tree,
    actor: &Actor<'_>,
    seen: &mut Seen,
    path: &Path,
) -> Result<(Vec<Arc<str>>, u64), Errno> {
    let node = find(tree, actor, seen, path, Right::Read)?;
    seen.note(
        || path.clone(),
        Parts {
            content: false,
            list: true,
        },
    );
    Ok((node.names().cloned().collect(), node.list().generation))
}

/// An operation that changes nodes.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(Path, Arc<[u8]>),
    Mkdir(Path),
    Rm(Path),
    SetPerms(Path, Perms),
}

/// What an operation did, as those who watch have to know it.
#[derive(Debug)]
pub(crate) struct Change {
    /// The node it was asked for.
    pub(crate) path: Path,
    /// The permissions it had, if it existed.
    pub(crate) before: Option<Arc<Perms>>,
    /// What was taken out, if it was removed.
    pub(crate) removed: Option<Arc<Node>>,
}

impl Op {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Op::Write(path, _) | Op::Mkdir(path) | Op::Rm(path) | Op::SetPerms(path, _) => path,
        }
    }

    /// The bytes that remembering it takes.
    pub(crate) fn size(&self) -> usize {
        let rest = match self {
            Op::Write(_, value) => value.len(),
            Op::SetPerms(_, perms) => 8 * perms.len(),
            Op::Mkdir(_) | Op::Rm(_) => 0,
        };
        self.path().as_str().len() + rest
    }

    /// Does it, wholly or not at all. No change if all is as it should be already.
    pub(crate) fn apply(
        &self,
        tree: &mut Tree,
        actor: &Actor<'_>,
        seen: &mut Seen,
    ) -> Result<Option<Change>, Errno> {
        match self {
            Op::Write(path, value) => write(tree, actor, seen, path, value).map(Some),
            Op::Mkdir(path) => mkdir(tree, actor, seen, path),
            Op::Rm(path) => rm(tree, actor, seen, path),
            Op::SetPerms(path, perms) => set_perms(tree, actor, seen, path, perms).map(Some),
        }
    }
}

fn write(
    tree: &mut Tree,
    actor: &Actor<'_>,
    seen: &mut Seen,
    path: &Path,
    value: &Arc<[u8]>,
) -> Result<Change, Errno> {
    match find(tree, actor, seen, path, Right::Write) {
        Ok(node) => {
            let new_size = node.size() - node.value().len() + value.len();
            actor.within(new_size, actor.quotas.node_size, Errno::ENOSPC)?;
            let before = Some(node.perms().clone());
            tree.set_value(path, value.clone(), Some(actor.conn));
            Ok(Change {
                path: path.clone(),
                before,
                removed: None,
            })
        }
        Err(Errno::ENOENT) => create(tree, actor, path, value),
        Err(errno) => Err(errno),
    }
}

fn mkdir(tree: &mut Tree, actor: &Actor<'_>, seen: &mut Seen, path: &Path) -> Result<Option<Change>, Errno> {
    match find(tree, actor, seen, path, Right::Write) {
        Ok(_) => Ok(None),
        Err(Errno::ENOENT) => create(tree, actor, path, &Arc::from([])).map(Some),
        Err(errno) => Err(errno),
    }
}

/// Creates a node and those missing above it, under a node the caller may write.
fn create(tree: &mut Tree, actor: &Actor<'_>, path: &Path, value: &Arc<[u8]>) -> Result<Change, Errno> {
    let Actor { conn, caller, quotas } = *actor;
    let nearest = tree.nearest(path);
    let mut size_above = nearest.node.size();
    let perms = Arc::new(nearest.node.perms().inherited_by(caller));
    let names: Vec<&str> = path.names().skip(nearest.depth).collect();

    actor.within(tree.owned(caller.dom) + names.len(), quotas.nodes, Errno::ENOSPC)?;
    actor.within(perms.len(), quotas.perms, Errno::ENOSPC)?;
    for name in &names {
        actor.within(size_above + name_size(name), quotas.node_size, Errno::ENOSPC)?;
        size_above = size(&[], &perms);
    }
    actor.within(size(value, &perms), quotas.node_size, Errno::ENOSPC)?;

    tree.create(path, value.clone(), perms, Some(conn));
    Ok(Change {
        path: path.clone(),
        before: None,
        removed: None,
    })
}

fn rm(tree: &mut Tree, actor: &Actor<'_>, seen: &mut Seen, path: &Path) -> Result<Option<Change>, Errno> {
    match find(tree, actor, seen, path, Right::Write) {
        Ok(_) if path.is_root() => Err(Errno::EINVAL),
        Ok(node) => {
            let before = Some(node.perms().clone());
            let removed = tree.remove(path, Some(actor.conn));
            Ok(Some(Change {
                path: path.clone(),
                before,
                removed,
            }))
        }
        // What is not there need not be removed, if it could have been there.
        Err(Errno::ENOENT) if path.parent().is_some_and(|p| tree.get(&p).is_some()) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn set_perms(
    tree: &mut Tree,
    actor: &Actor<'_>,
    seen: &mut Seen,
    path: &Path,
    perms: &Perms,
) -> Result<Change, Errno> {
    let node = find(tree, actor, seen, path, Right::Own)?;
    if perms.owner() != node.perms().owner() && !actor.caller.is_privileged() {
        // Else a domain could use up the quota of another.
        return Err(Errno::EPERM);
    }
    actor.within(perms.len(), actor.quotas.perms, Errno::ENOSPC)?;
    let new_size = node.size() - 8 * node.perms().len() + 8 * perms.len();
    actor.within(new_size, actor.quotas.node_size, Errno::ENOSPC)?;
    let before = Some(node.perms().clone());
    tree.set_perms(path, perms.clone(), Some(actor.conn));
    Ok(Change {
        path: path.clone(),
        before,
        removed: None,
    })
}
