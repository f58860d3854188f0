//! Transactions: a snapshot to read, a log to replay.
//!
//! A transaction works on a tree of its own, a clone of the store's as it was
//! at the start. It keeps two lists: which nodes its outcome depended on, and
//! what it changed. To commit, every node of the first list must be in the
//! store as it was in the snapshot; then replaying the second on the store
//! gives what the transaction saw. So a committed transaction is as if it had
//! happened at once at its end, and one that changed nothing, as if at its
//! start: that one never conflicts.

use crate::Errno;
use crate::ops::{Actor, Change, Op, Parts, Seen};
use crate::path::Path;
use crate::store::ConnId;
use crate::tree::{Stamp, Tree};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

#[derive(Debug)]
pub(crate) struct Transaction {
    base: Tree,
    tree: Tree,
    seen: Seen,
    log: Vec<Op>,
    log_size: usize,
}

impl Transaction {
    pub(crate) fn new(tree: &Tree) -> Self {
        Transaction {
            base: tree.clone(),
            tree: tree.clone(),
            seen: Seen::kept(),
            log: Vec::new(),
            log_size: 0,
        }
    }

    /// The bytes it remembers, for the quota.
    pub(crate) fn size(&self) -> usize {
        self.log_size + self.seen.size()
    }

    /// Refuses an operation that would make it remember too many nodes.
    fn check_quota(&self, actor: &Actor<'_>) -> Result<(), Errno> {
        // An operation adds at most two nodes seen and one change.
        let used = (self.seen.len() + 2).max(self.log.len() + 1);
        actor.within(used, actor.quotas.transaction_nodes, Errno::ENOSPC)
    }

    /// Looks at something, as it is in this transaction.
    pub(crate) fn look<T>(
        &mut self,
        actor: &Actor<'_>,
        what: impl FnOnce(&Tree, &mut Seen) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.check_quota(actor)?;
        what(&self.tree, &mut self.seen)
    }

    /// Changes something within this transaction only.
    pub(crate) fn apply(&mut self, actor: &Actor<'_>, op: Op) -> Result<(), Errno> {
        self.check_quota(actor)?;
        if op.apply(&mut self.tree, actor, &mut self.seen)?.is_some() {
            self.log_size += op.size();
            self.log.push(op);
        }
        Ok(())
    }

    /// Puts its changes into the store's tree, all or none, and says what they were.
    pub(crate) fn commit(self, tree: &mut Tree, actor: &Actor<'_>) -> Result<Vec<Change>, Refused> {
        if self.log.is_empty() {
            return Ok(Vec::new());
        }
        for (path, parts) in self.seen.nodes() {
            if let Some(winner) = changed_by(&self.base, tree, path, parts) {
                return Err(Refused::Conflict { winner });
            }
        }
        let before = tree.clone();
        let mut after = tree.clone();
        // One change a path, in the order of the first: those who watch compare
        // before with after, and what was only in between does not concern them.
        let mut changes: Vec<Change> = Vec::new();
        let mut known = BTreeMap::<Path, usize>::new();
        for op in &self.log {
            let change = match op.apply(&mut after, actor, &mut Seen::not_kept()) {
                Ok(Some(change)) => change,
                Ok(None) => continue,
                Err(Errno::ENOSPC) => return Err(Refused::NoSpace),
                // Its rights have changed otherwise than by permissions.
                Err(_) => return Err(Refused::Conflict { winner: None }),
            };
            let at = *known.entry(change.path.clone()).or_insert(changes.len());
            if at == changes.len() {
                let before = before.get(&change.path).map(|node| node.perms().clone());
                changes.push(Change {
                    path: change.path,
                    before,
                    removed: change.removed,
                });
            } else if changes[at].removed.is_none() {
                changes[at].removed = change.removed;
            }
        }
        *tree = after;
        Ok(changes)
    }
}

/// Why a transaction was not committed.
pub(crate) enum Refused {
    /// Something it used has been changed since its start, the last time
    /// through this connection if through any.
    Conflict { winner: Option<ConnId> },
    /// Others have used up the room that there was at the start.
    NoSpace,
}

/// Who has changed these parts of a node since the snapshot, if they have changed.
fn changed_by(base: &Tree, now: &Tree, path: &Path, parts: Parts) -> Option<Option<ConnId>> {
    let changed = |then: Stamp, now: Stamp| (then.generation != now.generation).then_some(now.by);
    match (base.get(path), now.get(path)) {
        (None, None) => None,
        (Some(base), Some(now)) => {
            let content = changed(base.content(), now.content()).filter(|_| parts.content);
            content.or_else(|| changed(base.list(), now.list()).filter(|_| parts.list))
        }
        (None, Some(created)) => Some(created.content().by),
        // Who removed it, or one above it, has changed the list in which it was.
        (Some(_), None) => Some(now.nearest(path).node.list().by),
    }
}
