//! The events that wait for a slow reader, bounded without losing one.
//!
//! A peer that can write what somebody watches could fill that somebody's
//! queue (XSA-349). Nothing is lost by saying the same thing once: whoever is
//! told of a change looks at the present value. So an event that already
//! waits is not added again; and when the queue is full, all events of one
//! watch are merged into one that names the watched path, which says
//! "something at or below this". The queue then holds at most its limit and
//! one event a watch.

use alloc::collections::{BTreeSet, VecDeque};

/// Waiting events: which watch `K`, and what changed `P`.
#[derive(Clone, Debug)]
pub(crate) struct Queue<K, P> {
    order: VecDeque<(K, P)>,
    present: BTreeSet<(K, P)>,
    limit: usize,
}

impl<K: Ord + Clone, P: Ord + Clone> Queue<K, P> {
    pub(crate) fn new(limit: usize) -> Self {
        Queue {
            order: VecDeque::new(),
            present: BTreeSet::new(),
            limit,
        }
    }

    /// Adds that `place` changed under the watch `key`, which watches `whole`.
    pub(crate) fn push(&mut self, key: K, place: P, whole: P) {
        if self.order.len() < self.limit {
            self.add((key, place));
        } else if !self.present.contains(&(key.clone(), place)) {
            self.remove(&key);
            self.add((key, whole));
        }
    }

    fn add(&mut self, event: (K, P)) {
        if self.present.insert(event.clone()) {
            self.order.push_back(event);
        }
    }

    pub(crate) fn pop(&mut self) -> Option<(K, P)> {
        let event = self.order.pop_front()?;
        self.present.remove(&event);
        Some(event)
    }

    /// Forgets the events of a watch that is no more.
    pub(crate) fn remove(&mut self, key: &K) {
        self.order.retain(|event| event.0 != *key);
        self.present.retain(|event| event.0 != *key);
    }

    /// Takes out the first event that `wanted` wants.
    #[cfg(feature = "std")]
    pub(crate) fn take(&mut self, wanted: impl Fn(&K) -> bool) -> Option<(K, P)> {
        let at = self.order.iter().position(|event| wanted(&event.0))?;
        let event = self.order.remove(at)?;
        self.present.remove(&event);
        Some(event)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn drain(queue: &mut Queue<u8, u8>) -> Vec<(u8, u8)> {
        core::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn an_event_that_waits_is_not_added_again() {
        let mut queue = Queue::new(10);
        for _ in 0..100 {
            queue.push(1, 5, 0);
            queue.push(1, 6, 0);
        }
        assert_eq!(drain(&mut queue), [(1, 5), (1, 6)]);
        queue.push(1, 5, 0);
        assert_eq!(drain(&mut queue), [(1, 5)], "but again once it was taken");
    }

    #[test]
    fn a_full_queue_merges_the_events_of_the_watch() {
        let mut queue = Queue::new(3);
        queue.push(1, 5, 0);
        queue.push(2, 5, 0);
        queue.push(1, 6, 0);
        queue.push(1, 7, 0);
        assert_eq!(drain(&mut queue), [(2, 5), (1, 0)]);
    }

    proptest! {
        /// XSA-349: bounded by limit and watches; and every change is covered
        /// by an event that waits after it: its own or one for the whole.
        #[test]
        fn bounded_and_nothing_lost(
            limit in 1..20_usize,
            changes in prop::collection::vec((0..5_u8, 1..50_u8), 0..300),
        ) {
            let mut queue = Queue::new(limit);
            for (key, place) in &changes {
                queue.push(*key, *place, 0);
                prop_assert!(queue.order.len() <= limit + 5);
                let covered = [*place, 0].iter().any(|p| queue.present.contains(&(*key, *p)));
                prop_assert!(covered);
            }
            let present = queue.present.clone();
            let order = drain(&mut queue);
            prop_assert_eq!(order.len(), present.len());
            prop_assert_eq!(order.into_iter().collect::<BTreeSet<_>>(), present);
        }
    }
}
