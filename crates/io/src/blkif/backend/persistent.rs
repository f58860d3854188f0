//! Mappings that outlive their request (spec 2.4), by grant reference.
//!
//! # Rules
//! 1. At most `limit` mappings, each under one reference.
//! 2. A mapping leaves through [`PersistentGrants::purge`] or [`PersistentGrants::drain`] only, and both hand
//!    it to the caller to unmap: none is lost (PVR-9).
//! 3. Nothing leaves while a request is served: both are called between requests.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use gnttab_abi::GrantRef;

/// Milliseconds between two looks at what can go.
const PURGE_INTERVAL: u64 = 100;
/// Milliseconds after which an unused mapping goes in any case.
const UNUSED_LIMIT: u64 = 60_000;
/// Share of the limit that goes at once when the limit was too small.
const PURGE_PERCENT: usize = 5;

struct Entry<M> {
    gref: GrantRef,
    mapping: M,
    /// Count of look-ups when it was used last: which of two is the older.
    used: u64,
    /// Time of the last use, in milliseconds.
    used_at: u64,
}

pub(super) struct PersistentGrants<M> {
    limit: usize,
    by_gref: BTreeMap<GrantRef, usize>,
    /// Where the reference is that is likely to be looked up next: pages that came together are used together.
    likely: usize,
    entries: Vec<Option<Entry<M>>>,
    vacant: Vec<usize>,
    uses: u64,
    now: u64,
    purged_at: u64,
    overflowed: bool,
}

impl<M> PersistentGrants<M> {
    pub(super) fn new(limit: usize) -> Self {
        PersistentGrants {
            limit,
            by_gref: BTreeMap::new(),
            likely: 0,
            entries: Vec::new(),
            vacant: Vec::new(),
            uses: 0,
            now: 0,
            purged_at: 0,
            overflowed: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_gref.len()
    }

    /// How many more it takes.
    pub(super) fn room(&self) -> usize {
        self.limit - self.len()
    }

    /// Where the reference's mapping is, if it is here; marks it used.
    pub(super) fn find(&mut self, gref: GrantRef) -> Option<usize> {
        let slot = match self.entries.get(self.likely) {
            Some(Some(entry)) if entry.gref == gref => self.likely,
            _ => *self.by_gref.get(&gref)?,
        };
        self.likely = slot + 1;
        self.uses += 1;
        if let Some(entry) = &mut self.entries[slot] {
            entry.used = self.uses;
            entry.used_at = self.now;
        }
        Some(slot)
    }

    /// The mapping at a place that [`PersistentGrants::find`] or [`PersistentGrants::insert`] gave since
    /// the last purge.
    pub(super) fn get(&self, slot: usize) -> Option<&M> {
        self.entries.get(slot)?.as_ref().map(|entry| &entry.mapping)
    }

    /// Takes a mapping in, or gives it back if there is no room or the reference is here already.
    pub(super) fn insert(&mut self, gref: GrantRef, mapping: M) -> Result<usize, M> {
        if self.room() == 0 || self.by_gref.contains_key(&gref) {
            return Err(mapping);
        }
        self.uses += 1;
        let entry = Some(Entry {
            gref,
            mapping,
            used: self.uses,
            used_at: self.now,
        });
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self.entries[slot] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                self.entries.len() - 1
            }
        };
        self.by_gref.insert(gref, slot);
        Ok(slot)
    }

    /// Notes that a request needed more than the limit allows.
    pub(super) fn note_overflow(&mut self) {
        self.overflowed = true;
    }

    /// Sets the time and takes out what should be unmapped now: what was unused for a minute, and, if the
    /// limit was hit, the least recently used 5 %.
    pub(super) fn purge(&mut self, now: u64) -> Vec<M> {
        self.now = now;
        if now.wrapping_sub(self.purged_at) < PURGE_INTERVAL {
            return Vec::new();
        }
        self.purged_at = now;
        let too_small = core::mem::take(&mut self.overflowed) && self.room() == 0;
        let least = if too_small {
            (self.limit * PURGE_PERCENT / 100).max(1)
        } else {
            0
        };

        let mut by_age: Vec<(u64, u64, usize)> = self
            .entries
            .iter()
            .enumerate()
            .filter_map(|(slot, entry)| entry.as_ref().map(|entry| (entry.used, entry.used_at, slot)))
            .collect();
        by_age.sort_unstable();
        by_age
            .into_iter()
            .enumerate()
            .take_while(|(rank, (_, used_at, _))| {
                *rank < least || now.saturating_sub(*used_at) >= UNUSED_LIMIT
            })
            .filter_map(|(_, (_, _, slot))| self.remove(slot))
            .collect()
    }

    /// Takes everything out.
    pub(super) fn drain(&mut self) -> Vec<M> {
        (0..self.entries.len())
            .filter_map(|slot| self.remove(slot))
            .collect()
    }

    fn remove(&mut self, slot: usize) -> Option<M> {
        let entry = self.entries[slot].take()?;
        self.by_gref.remove(&entry.gref);
        self.vacant.push(slot);
        Some(entry.mapping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(limit: u32) -> PersistentGrants<u32> {
        let mut grants = PersistentGrants::new(usize::try_from(limit).unwrap());
        for i in 0..limit {
            grants.insert(GrantRef(i), i).unwrap();
        }
        grants
    }

    #[test]
    fn the_limit_holds_and_a_reference_is_kept_once() {
        let mut grants = full(40);
        assert_eq!((grants.len(), grants.room()), (40, 0));
        assert_eq!(grants.insert(GrantRef(99), 99), Err(99));
        let mut grants = PersistentGrants::new(2);
        assert_eq!(grants.insert(GrantRef(1), 10), Ok(0));
        assert_eq!(grants.insert(GrantRef(1), 11), Err(11));
        assert_eq!(grants.get(0), Some(&10));
    }

    #[test]
    fn an_overflow_costs_the_least_recently_used_five_percent() {
        let mut grants = full(40);
        grants.find(GrantRef(0));
        assert!(grants.purge(100).is_empty(), "nothing overflowed");
        grants.note_overflow();
        assert!(grants.purge(150).is_empty(), "too early");
        assert_eq!(grants.purge(200), [1, 2]);
        assert!(grants.purge(300).is_empty(), "once an overflow");
        assert_eq!(grants.room(), 2);
        assert!(grants.find(GrantRef(1)).is_none());
        assert!(grants.find(GrantRef(0)).is_some());
    }

    /// What is looked up next is guessed; a wrong guess is none.
    #[test]
    fn every_reference_is_found_in_any_order() {
        let mut grants = full(10);
        for gref in [3, 4, 5, 9, 0, 1, 8, 7, 7] {
            let slot = grants.find(GrantRef(gref)).unwrap();
            assert_eq!(grants.get(slot), Some(&gref));
        }
        grants.find(GrantRef(3));
        grants.remove(4);
        assert!(grants.find(GrantRef(4)).is_none());
        assert!(grants.find(GrantRef(10)).is_none());
    }

    #[test]
    fn a_minute_unused_is_enough() {
        let mut grants = full(4);
        assert!(grants.purge(59_000).is_empty());
        grants.find(GrantRef(2));
        assert_eq!(grants.purge(60_000), [0, 1, 3]);
        assert_eq!(grants.purge(119_000), [2]);
    }

    #[test]
    fn everything_comes_out_at_the_end() {
        let mut grants = full(7);
        assert_eq!(grants.drain(), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!((grants.len(), grants.room()), (0, 7));
        assert!(grants.drain().is_empty());
    }
}
