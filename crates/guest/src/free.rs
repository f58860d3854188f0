//! Which numbers of a growing range are free (rule GST-7). No lock, no hypercall: pure bookkeeping,
//! for references and for the pages of a window alike.
//!
//! What must always hold: `stack` names exactly the numbers whose bit in `bits` is set, each
//! once; none is below `first` or at or above `total`; `stack` has capacity for all of them, so
//! that giving back never allocates.

use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::mem;
use core::ops::Range;

/// Memory for the bookkeeping of so many numbers. Made before a lock is taken.
#[derive(Debug)]
pub(crate) struct Room {
    stack: Vec<u32>,
    bits: Vec<u64>,
}

impl Room {
    pub(crate) fn for_total(total: u32) -> Result<Room, TryReserveError> {
        let mut room = Room {
            stack: Vec::new(),
            bits: Vec::new(),
        };
        // A count that no address space holds is refused by the reservation.
        room.stack
            .try_reserve_exact(usize::try_from(total).unwrap_or(usize::MAX))?;
        room.bits.try_reserve_exact(words_for(total))?;
        Ok(room)
    }
}

/// Free numbers in `first..total`.
#[derive(Debug)]
pub(crate) struct FreeSet {
    first: u32,
    total: u32,
    /// The last one is the next to be handed out.
    stack: Vec<u32>,
    bits: Vec<u64>,
}

impl FreeSet {
    /// Nothing free yet; numbers below `first` never will be.
    pub(crate) const fn new(first: u32) -> FreeSet {
        FreeSet {
            first,
            total: 0,
            stack: Vec::new(),
            bits: Vec::new(),
        }
    }

    /// How many are free.
    pub(crate) fn len(&self) -> u32 {
        // Its length never exceeds `total`.
        u32::try_from(self.stack.len()).unwrap_or(u32::MAX)
    }

    /// One more than the highest number there is.
    pub(crate) const fn total(&self) -> u32 {
        self.total
    }

    /// Adds the numbers up to `total`, to be handed out after all that are free already, lowest
    /// first. `room` was made for that total; what comes back is to be dropped where memory may be
    /// freed. A `total` that is not larger than before changes nothing.
    pub(crate) fn extend(&mut self, total: u32, mut room: Room) -> Room {
        let new = self.total.max(self.first)..total;
        if new.is_empty() {
            return room;
        }
        room.stack.extend(new.clone().rev());
        room.stack.extend_from_slice(&self.stack);
        room.bits.extend_from_slice(&self.bits);
        room.bits.resize(words_for(total), 0);
        let old = Room {
            stack: mem::replace(&mut self.stack, room.stack),
            bits: mem::replace(&mut self.bits, room.bits),
        };
        self.total = total;
        for number in new {
            self.set(number);
        }
        old
    }

    /// Takes one.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let number = self.stack.pop()?;
        self.clear(number);
        Some(number)
    }

    /// Takes `count` consecutive ones, the lowest such run, and says the first.
    pub(crate) fn take_run(&mut self, count: u32) -> Option<u32> {
        let run = self.find_run(count)?;
        for number in run.clone() {
            self.clear(number);
        }
        self.stack.retain(|number| !run.contains(number));
        Some(run.start)
    }

    /// How many of the highest numbers are free without a gap.
    pub(crate) fn tail(&self) -> u32 {
        let from = self.first.min(self.total);
        let tail = (from..self.total)
            .rev()
            .take_while(|&number| self.is_free(number))
            .count();
        u32::try_from(tail).unwrap_or(u32::MAX)
    }

    /// Gives one back; it is the next to be handed out. `false`, and nothing changed, for a
    /// number that is free already or was never there to be taken.
    pub(crate) fn put(&mut self, number: u32) -> bool {
        let taken = (self.first..self.total).contains(&number) && !self.is_free(number);
        if taken {
            self.set(number);
            self.stack.push(number);
        }
        taken
    }

    /// The lowest run of `count` free numbers.
    fn find_run(&self, count: u32) -> Option<Range<u32>> {
        let mut start = self.first;
        let mut number = start;
        while start.checked_add(count)? <= self.total {
            if number - start == count {
                return Some(start..number);
            }
            // A word without a free number is stepped over whole.
            if self.bits.get(word_of(number)) == Some(&0) {
                number = (number | 63).saturating_add(1);
                start = number;
            } else if self.is_free(number) {
                number += 1;
            } else {
                number += 1;
                start = number;
            }
        }
        None
    }

    fn is_free(&self, number: u32) -> bool {
        self.bits
            .get(word_of(number))
            .is_some_and(|word| word & bit_of(number) != 0)
    }

    fn set(&mut self, number: u32) {
        if let Some(word) = self.bits.get_mut(word_of(number)) {
            *word |= bit_of(number);
        }
    }

    fn clear(&mut self, number: u32) {
        if let Some(word) = self.bits.get_mut(word_of(number)) {
            *word &= !bit_of(number);
        }
    }
}

/// Which word of the bitmap a number's bit is in.
fn word_of(number: u32) -> usize {
    usize::try_from(number / 64).unwrap_or(usize::MAX)
}

fn words_for(total: u32) -> usize {
    usize::try_from(total.div_ceil(64)).unwrap_or(usize::MAX)
}

const fn bit_of(number: u32) -> u64 {
    1 << (number % 64)
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;
    use alloc::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn grow(set: &mut FreeSet, total: u32) {
        set.extend(total, Room::for_total(total).unwrap());
    }

    fn set_of(first: u32, total: u32) -> FreeSet {
        let mut set = FreeSet::new(first);
        grow(&mut set, total);
        set
    }

    #[test]
    fn gst_7_reserved_numbers_are_never_handed_out_or_taken_back() {
        let mut set = set_of(8, 512);
        assert_eq!(set.len(), 504);
        let all: BTreeSet<u32> = core::iter::from_fn(|| set.take()).collect();
        assert_eq!(all, (8..512).collect());
        assert!((0..8).all(|number| !set.put(number)));
        assert!(!set.put(512));
        assert_eq!(set.take(), None);
    }

    #[test]
    fn gst_7_what_is_free_cannot_be_freed() {
        let mut set = set_of(8, 64);
        let taken = set.take().unwrap();
        assert!(set.put(taken));
        assert!(!set.put(taken));
        assert_eq!(set.len(), 56);
    }

    #[test]
    fn freed_last_is_handed_out_first() {
        let mut set = set_of(8, 512);
        let taken: Vec<u32> = (0..3).filter_map(|_| set.take()).collect();
        for &number in &taken {
            set.put(number);
        }
        assert_eq!(set.take(), taken.last().copied());
    }

    #[test]
    fn new_numbers_come_after_those_that_were_free() {
        let mut set = set_of(8, 16);
        grow(&mut set, 32);
        assert_eq!(
            core::iter::from_fn(|| set.take()).collect::<Vec<_>>(),
            (8..32).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_run_is_found_across_words_and_beside_gaps() {
        let mut set = set_of(8, 256);
        assert_eq!(set.take_run(100), Some(8));
        assert!(set.put(50));
        assert_eq!(set.take_run(2), Some(108));
        assert_eq!(set.take_run(146), Some(110));
        assert_eq!(set.take_run(1), Some(50));
        assert_eq!(set.take_run(1), None);
        assert_eq!(set.len(), 0);
    }

    #[test]
    fn gst_7_counts_that_overflow_find_nothing() {
        let mut set = set_of(8, 64);
        for count in [57, 64, 65, u32::MAX - 8, u32::MAX] {
            assert_eq!(set.take_run(count), None);
        }
        assert_eq!(set.len(), 56);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take,
        Run(u32),
        Put(u32),
        Grow(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Take),
            2 => (1..80u32).prop_map(Step::Run),
            6 => (0..600u32).prop_map(Step::Put),
            1 => (0..130u32).prop_map(Step::Grow),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// GST-7 against a model that keeps a plain set and looks at every number.
        #[test]
        fn gst_7_behaves_as_a_plain_set(steps in proptest::collection::vec(step(), 1..120)) {
            let mut set = set_of(8, 128);
            let mut free: BTreeSet<u32> = (8..128).collect();
            let mut total = 128;
            for step in steps {
                match step {
                    Step::Take => match set.take() {
                        Some(number) => prop_assert!(free.remove(&number)),
                        None => prop_assert!(free.is_empty()),
                    },
                    Step::Run(count) => {
                        let expected = (8..total).find(|start| {
                            (*start..start + count).all(|number| free.contains(&number))
                        });
                        prop_assert_eq!(set.take_run(count), expected);
                        for number in expected.into_iter().flat_map(|start| start..start + count) {
                            free.remove(&number);
                        }
                    }
                    Step::Put(number) => {
                        let may = (8..total).contains(&number) && !free.contains(&number);
                        prop_assert_eq!(set.put(number), may);
                        if may {
                            free.insert(number);
                            prop_assert_eq!(set.stack.last(), Some(&number));
                        }
                    }
                    Step::Grow(by) => {
                        grow(&mut set, total + by);
                        free.extend(total..total + by);
                        total += by;
                    }
                }
                prop_assert_eq!(set.len() as usize, free.len());
                prop_assert_eq!(set.stack.iter().copied().collect::<BTreeSet<_>>(), free.clone());
                let tail = (8..total).rev().take_while(|number| free.contains(number)).count();
                prop_assert_eq!(set.tail() as usize, tail);
                prop_assert!(set.stack.capacity() >= (total - 8) as usize);
            }
        }
    }
}
