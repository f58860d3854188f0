//! A XenStore in memory: tree, permissions, transactions, watches.

use std::collections::{BTreeMap, BTreeSet};
use std::format;
use std::string::{String, ToString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

use gnttab_abi::DomId;

use crate::xenbus::{Store, Tx};

#[derive(Clone)]
struct Node {
    value: Vec<u8>,
    owner: DomId,
    readers: Vec<DomId>,
}

#[derive(Default)]
struct Inner {
    nodes: BTreeMap<String, Node>,
    /// Counts changes, to see whether a transaction met any.
    generation: u64,
    transactions: BTreeMap<u32, Transaction>,
    next_transaction: u32,
    watches: BTreeMap<DomId, BTreeSet<String>>,
    pending: BTreeSet<(DomId, String)>,
    conflicts: u32,
    writes: u64,
}

struct Transaction {
    nodes: BTreeMap<String, Node>,
    begun_at: u64,
    changed: Vec<String>,
}

/// Why the [`MemoryStore`] refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryStoreError {
    /// The node is another domain's.
    #[error("{domain} may not write {path}")]
    Denied {
        /// Who tried.
        domain: DomId,
        /// What.
        path: String,
    },
    /// No such transaction.
    #[error("there is no transaction {0}")]
    NoTransaction(u32),
}

/// A XenStore in memory. Clones are the same store.
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Inner>>);

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    /// A domain's connection. Domain 0 may write anything.
    #[must_use]
    pub fn connect(&self, domain: DomId) -> StoreConnection {
        StoreConnection {
            store: self.clone(),
            domain,
        }
    }

    /// Makes the next so many commits meet a change that was not there.
    pub fn force_conflicts(&self, count: u32) {
        self.lock().conflicts = count;
    }

    /// Writes so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.lock().writes
    }

    /// Removes a domain's watches, as its death does.
    pub fn forget(&self, domain: DomId) {
        let mut inner = self.lock();
        inner.watches.remove(&domain);
        inner.pending.retain(|(owner, _)| *owner != domain);
    }

    /// The text of a node.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<String> {
        let inner = self.lock();
        inner
            .nodes
            .get(path)
            .map(|node| String::from_utf8_lossy(&node.value).into_owned())
    }

    /// All paths that begin with `prefix`.
    #[must_use]
    pub fn paths(&self, prefix: &str) -> Vec<String> {
        self.lock()
            .nodes
            .keys()
            .filter(|path| path.starts_with(prefix))
            .cloned()
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn nodes(&mut self, tx: Tx) -> Result<&mut BTreeMap<String, Node>, MemoryStoreError> {
        if tx == Tx::NONE {
            return Ok(&mut self.nodes);
        }
        let transaction = self
            .transactions
            .get_mut(&tx.0)
            .ok_or(MemoryStoreError::NoTransaction(tx.0))?;
        Ok(&mut transaction.nodes)
    }

    fn changed(&mut self, tx: Tx, path: &str) {
        if let Some(transaction) = self.transactions.get_mut(&tx.0) {
            transaction.changed.push(path.to_string());
            return;
        }
        self.generation += 1;
        self.writes += 1;
        for (domain, watches) in &self.watches {
            // A node above that is removed takes the watched one along.
            for watched in watches
                .iter()
                .filter(|watched| is_below(path, watched) || is_below(watched, path))
            {
                self.pending.insert((*domain, watched.clone()));
            }
        }
    }
}

fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// One domain's connection to a [`MemoryStore`].
#[derive(Clone)]
pub struct StoreConnection {
    store: MemoryStore,
    domain: DomId,
}

impl StoreConnection {
    /// The watches that fired since the last call, each once.
    pub fn events(&mut self) -> Vec<String> {
        let mut inner = self.store.lock();
        let (mine, others) = core::mem::take(&mut inner.pending)
            .into_iter()
            .partition(|(domain, _)| *domain == self.domain);
        inner.pending = others;
        let mine: BTreeSet<(DomId, String)> = mine;
        mine.into_iter().map(|(_, path)| path).collect()
    }

    fn may_write(&self, nodes: &BTreeMap<String, Node>, path: &str) -> Result<(), MemoryStoreError> {
        let denied = || MemoryStoreError::Denied {
            domain: self.domain,
            path: path.to_string(),
        };
        if self.domain == DomId(0) || is_below(path, &format!("/local/domain/{}/error", self.domain.0)) {
            return Ok(());
        }
        match nearest(nodes, path) {
            Some(node) if node.owner == self.domain => Ok(()),
            _ => Err(denied()),
        }
    }
}

/// The node itself, or the nearest one above.
fn nearest<'a>(nodes: &'a BTreeMap<String, Node>, path: &str) -> Option<&'a Node> {
    let mut path = path;
    loop {
        if let Some(node) = nodes.get(path) {
            return Some(node);
        }
        path = path.rsplit_once('/')?.0;
    }
}

impl Store for StoreConnection {
    type Error = MemoryStoreError;

    fn read(&mut self, tx: Tx, path: &str) -> Result<Option<Vec<u8>>, MemoryStoreError> {
        let mut inner = self.store.lock();
        let node = inner.nodes(tx)?.get(path);
        let may = |node: &&Node| {
            self.domain == DomId(0) || node.owner == self.domain || node.readers.contains(&self.domain)
        };
        Ok(node.filter(may).map(|node| node.value.clone()))
    }

    fn write(&mut self, tx: Tx, path: &str, value: &[u8]) -> Result<(), MemoryStoreError> {
        let mut inner = self.store.lock();
        let nodes = inner.nodes(tx)?;
        self.may_write(nodes, path)?;
        let (owner, readers) = nearest(nodes, path).map_or((self.domain, Vec::new()), |node| {
            (node.owner, node.readers.clone())
        });
        nodes.insert(
            path.to_string(),
            Node {
                value: value.to_vec(),
                owner,
                readers,
            },
        );
        inner.changed(tx, path);
        Ok(())
    }

    fn remove(&mut self, tx: Tx, path: &str) -> Result<(), MemoryStoreError> {
        let mut inner = self.store.lock();
        let nodes = inner.nodes(tx)?;
        self.may_write(nodes, path)?;
        nodes.retain(|node, _| !is_below(node, path));
        inner.changed(tx, path);
        Ok(())
    }

    fn directory(&mut self, tx: Tx, path: &str) -> Result<Option<Vec<String>>, MemoryStoreError> {
        let mut inner = self.store.lock();
        let nodes = inner.nodes(tx)?;
        let prefix = format!("{path}/");
        let names: BTreeSet<String> = nodes
            .keys()
            .filter_map(|node| node.strip_prefix(&prefix))
            .filter_map(|rest| rest.split('/').next())
            .map(ToString::to_string)
            .collect();
        let there = nodes.contains_key(path) || !names.is_empty();
        Ok(there.then(|| names.into_iter().collect()))
    }

    fn set_permissions(
        &mut self,
        tx: Tx,
        path: &str,
        owner: DomId,
        readers: &[DomId],
    ) -> Result<(), MemoryStoreError> {
        let mut inner = self.store.lock();
        let nodes = inner.nodes(tx)?;
        self.may_write(nodes, path)?;
        if let Some(node) = nodes.get_mut(path) {
            node.owner = owner;
            node.readers = readers.to_vec();
        }
        inner.changed(tx, path);
        Ok(())
    }

    fn begin(&mut self) -> Result<Tx, MemoryStoreError> {
        let mut inner = self.store.lock();
        inner.next_transaction += 1;
        let id = inner.next_transaction;
        let transaction = Transaction {
            nodes: inner.nodes.clone(),
            begun_at: inner.generation,
            changed: Vec::new(),
        };
        inner.transactions.insert(id, transaction);
        Ok(Tx(id))
    }

    fn end(&mut self, tx: Tx, commit: bool) -> Result<bool, MemoryStoreError> {
        let mut inner = self.store.lock();
        let transaction = inner
            .transactions
            .remove(&tx.0)
            .ok_or(MemoryStoreError::NoTransaction(tx.0))?;
        if !commit {
            return Ok(true);
        }
        if inner.conflicts > 0 {
            inner.conflicts -= 1;
            return Ok(false);
        }
        if inner.generation != transaction.begun_at {
            return Ok(false);
        }
        inner.nodes = transaction.nodes;
        for path in transaction.changed {
            inner.changed(Tx::NONE, &path);
        }
        Ok(true)
    }

    fn watch(&mut self, path: &str) -> Result<(), MemoryStoreError> {
        let mut inner = self.store.lock();
        inner
            .watches
            .entry(self.domain)
            .or_default()
            .insert(path.to_string());
        inner.pending.insert((self.domain, path.to_string()));
        Ok(())
    }

    fn unwatch(&mut self, path: &str) -> Result<(), MemoryStoreError> {
        let mut inner = self.store.lock();
        if let Some(watches) = inner.watches.get_mut(&self.domain) {
            watches.remove(path);
        }
        inner.pending.remove(&(self.domain, path.to_string()));
        Ok(())
    }
}
