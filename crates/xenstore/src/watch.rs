//! Who watches what.

use crate::path::{Path, Place, Special};
use crate::store::ConnId;
use crate::wire::Token;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Bound;

/// The number of a watch. Later ones are greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct WatchId(u64);

/// Where a watch is, after its path has been resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Spot {
    Node(Path),
    Special(Special),
}

#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) conn: ConnId,
    /// As the client said it: the form its events have to have.
    pub(crate) place: Place,
    pub(crate) spot: Spot,
    pub(crate) token: Token,
}

/// All watches of the store.
///
/// Every watch of `all` stands in `nodes` or `special` under its spot, and
/// nothing else does; there are no empty sets.
#[derive(Default, Debug)]
pub(crate) struct Watches {
    all: BTreeMap<WatchId, Watch>,
    nodes: BTreeMap<Path, BTreeSet<WatchId>>,
    special: BTreeMap<Special, BTreeSet<WatchId>>,
    next: u64,
}

impl Watches {
    pub(crate) fn add(&mut self, watch: Watch) -> WatchId {
        let id = WatchId(self.next);
        self.next += 1;
        match &watch.spot {
            Spot::Node(path) => self.nodes.entry(path.clone()).or_default().insert(id),
            Spot::Special(special) => self.special.entry(*special).or_default().insert(id),
        };
        self.all.insert(id, watch);
        id
    }

    pub(crate) fn remove(&mut self, id: WatchId) {
        let Some(watch) = self.all.remove(&id) else { return };
        match watch.spot {
            Spot::Node(path) => {
                if let Some(ids) = self.nodes.get_mut(&path) {
                    ids.remove(&id);
                    if ids.is_empty() {
                        self.nodes.remove(&path);
                    }
                }
            }
            Spot::Special(special) => {
                if let Some(ids) = self.special.get_mut(&special) {
                    ids.remove(&id);
                    if ids.is_empty() {
                        self.special.remove(&special);
                    }
                }
            }
        }
    }

    pub(crate) fn get(&self, id: WatchId) -> Option<&Watch> {
        self.all.get(&id)
    }

    /// The watch of a connection at this spot with this token.
    pub(crate) fn find(&self, conn: ConnId, spot: &Spot, token: &Token) -> Option<WatchId> {
        let ids = match spot {
            Spot::Node(path) => self.nodes.get(path),
            Spot::Special(special) => self.special.get(special),
        };
        let same = |id: &&WatchId| {
            self.all
                .get(id)
                .is_some_and(|watch| watch.conn == conn && watch.token == *token)
        };
        ids?.iter().find(same).copied()
    }

    /// The watches at or above a node, in the order they were set.
    pub(crate) fn covering(&self, path: &Path) -> Vec<WatchId> {
        let sets = path.and_ancestors().filter_map(|above| self.nodes.get(above));
        let mut ids: Vec<_> = sets.flatten().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// The watches below a node, each with its path.
    pub(crate) fn below(&self, path: &Path) -> Vec<(Path, WatchId)> {
        let mut start = String::from(path.as_str());
        if !path.is_root() {
            start.push('/');
        }
        let from = (Bound::Excluded(start.as_str()), Bound::Unbounded);
        self.nodes
            .range::<str, _>(from)
            .take_while(|(at, _)| at.as_str().starts_with(&start))
            .flat_map(|(at, ids)| ids.iter().map(|id| (at.clone(), *id)))
            .collect()
    }

    /// The watches on a special name.
    pub(crate) fn on(&self, special: Special) -> Vec<WatchId> {
        self.special
            .get(&special)
            .into_iter()
            .flatten()
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::NodePath;

    fn path(text: &str) -> Path {
        text.parse().unwrap()
    }

    fn watch(watches: &mut Watches, at: &str) -> WatchId {
        let place = Place::Node(NodePath::Absolute(path(at)));
        let token = Token::new(b"t").unwrap();
        let conn = ConnId::for_test(1);
        watches.add(Watch {
            conn,
            place,
            spot: Spot::Node(path(at)),
            token,
        })
    }

    #[test]
    fn at_or_above_and_below_go_by_whole_names() {
        let mut watches = Watches::default();
        let ids: Vec<_> = ["/a/b", "/", "/a", "/ab", "/a-b", "/a/b/c", "/a/b"]
            .map(|at| watch(&mut watches, at))
            .into();
        assert_eq!(watches.covering(&path("/a/b")), [ids[0], ids[1], ids[2], ids[6]]);
        let below = |at| {
            watches
                .below(&path(at))
                .into_iter()
                .map(|w| w.1)
                .collect::<Vec<_>>()
        };
        assert_eq!(below("/a"), [ids[0], ids[6], ids[5]]);
        assert_eq!(below("/").len(), 6);
        assert_eq!(below("/a/b/c"), []);
    }

    #[test]
    fn nothing_is_left_of_removed_watches() {
        let mut watches = Watches::default();
        let ids = ["/a", "/a", "/b"].map(|at| watch(&mut watches, at));
        for id in ids {
            watches.remove(id);
            watches.remove(id);
        }
        assert!(watches.all.is_empty() && watches.nodes.is_empty());
    }
}
