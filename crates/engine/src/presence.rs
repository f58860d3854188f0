//! Being inside a table without a lock, and having it alone.
//!
//! A processor that enters a table writes the table's tag into its own slot, then looks whether it
//! may be there; it wipes the slot when it leaves. Whoever needs the table alone first makes that
//! look fail (shuts the gate, or takes the domain out of the list) and then waits until no slot
//! holds the tag. Both sides write before they look, so at least one sees the other:
//!
//! ```text
//! reader: slot = tag;  look           writer: make the look fail;  look at every slot
//! ```
//!
//! What must always hold: between a look that succeeded and the wiping of the slot, no writer gets
//! past its wait. `models` checks it.

use alloc::boxed::Box;

use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering, full_barrier, gate_opened, spin_loop};

/// A processor's slot, on a cache line of its own.
#[repr(align(64))]
pub(crate) struct Slot {
    /// Low half: 0 outside, otherwise the tag. High half: a count of visits, so that two visits to
    /// one table differ.
    inside: AtomicU64,
    taken: AtomicBool,
}

impl Slot {
    /// Takes the slot for one holder; false if it has one.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::Acquire)
    }

    pub(crate) fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }

    /// Writes the tag. What is read afterwards is read after every processor can see it.
    #[inline]
    pub(crate) fn announce(&self, tag: u32) {
        let visits = (self.inside.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        self.inside.swap(visits << 32 | u64::from(tag), Ordering::SeqCst);
        full_barrier();
    }

    /// Wipes the slot, after everything that was done inside.
    #[inline]
    pub(crate) fn leave(&self) {
        let visits = self.inside.load(Ordering::Relaxed) & !TAG;
        self.inside.store(visits, Ordering::Release);
    }
}

/// The half of a slot's word that is the tag.
const TAG: u64 = 0xFFFF_FFFF;

/// The slots of all processors.
pub(crate) struct Presence {
    slots: Box<[Slot]>,
}

impl Presence {
    pub(crate) fn new(processors: usize) -> Presence {
        let slot = |_| Slot {
            inside: AtomicU64::new(0),
            taken: AtomicBool::new(false),
        };
        Presence {
            slots: (0..processors).map(slot).collect(),
        }
    }

    pub(crate) fn slot(&self, number: usize) -> Option<&Slot> {
        self.slots.get(number)
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether any processor is inside anything.
    #[cfg(feature = "machine")]
    pub(crate) fn is_anybody_inside(&self) -> bool {
        self.slots
            .iter()
            .any(|slot| slot.inside.load(Ordering::SeqCst) & TAG != 0)
    }

    /// Waits until no processor is inside with this tag. The caller is inside nothing, and has
    /// made every later look fail.
    pub(crate) fn wait_until_left(&self, tag: u32) {
        full_barrier();
        for slot in &self.slots {
            while slot.inside.load(Ordering::SeqCst) & TAG == u64::from(tag) {
                spin_loop();
            }
        }
    }

    /// Waits until every visit that is under way now has ended. The caller is inside nothing, and
    /// has written what later visits must see.
    pub(crate) fn wait_for_all(&self) {
        full_barrier();
        for slot in &self.slots {
            let seen = slot.inside.load(Ordering::SeqCst);
            while seen & TAG != 0 && slot.inside.load(Ordering::SeqCst) == seen {
                spin_loop();
            }
        }
    }
}

/// Shut by the one who has a table alone.
pub(crate) struct Gate(AtomicU32);

impl Gate {
    pub(crate) fn new() -> Gate {
        Gate(AtomicU32::new(0))
    }

    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }

    /// Shuts the gate; waits for whoever has it shut.
    pub(crate) fn shut(&self) {
        while self
            .0
            .compare_exchange(0, 1, Ordering::SeqCst, Ordering::Relaxed)
            .is_err()
        {
            spin_loop();
        }
    }

    pub(crate) fn open(&self) {
        self.0.store(0, Ordering::SeqCst);
        gate_opened();
    }
}
