//! Transactions: a snapshot to read, a log to replay.
//!
//! A transaction works on a tree of its own, a clone of the store's as it was
//! at the start. It keeps two lists: which nodes its outcome depended on, and
//! what it changed. To commit, every node of the first list must be in the
//! store as it was in the snapshot; then replaying the second on the store
//! gives what the transaction saw. So a committed transaction is as if it had
//! happened at once at its end, and one that only read, as if at its start:
//! that one never conflicts.

use crate::Errno;
use crate::ops::{Actor, Change, Op, Parts, Seen};
use crate::path::Path;
use crate::tree::Tree;
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
    pub(crate) fn commit(self, tree: &mut Tree, actor: &Actor<'_>) -> Result<Vec<Change>, Errno> {
        if self.log.is_empty() {
            return Ok(Vec::new());
        }
        for (path, parts) in self.seen.nodes() {
            if !unchanged(&self.base, tree, path, parts) {
                return Err(Errno::EAGAIN);
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
                // Others have used up the room that there was at the start.
                Err(Errno::ENOSPC) => return Err(Errno::ENOSPC),
                Err(_) => return Err(Errno::EAGAIN),
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

fn unchanged(base: &Tree, now: &Tree, path: &Path, parts: Parts) -> bool {
    match (base.get(path), now.get(path)) {
        (None, None) => true,
        (Some(base), Some(now)) => {
            (!parts.content || base.content_generation() == now.content_generation())
                && (!parts.list || base.list_generation() == now.list_generation())
        }
        _ => false,
    }
}
