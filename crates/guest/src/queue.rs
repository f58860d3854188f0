//! The queue of ends that did not succeed yet: a fixed number of slots. Pure bookkeeping, under the
//! table's lock.
//!
//! What must always hold:
//! 1. It never allocates after it was made; a full queue gives back what it cannot take.
//! 2. What a slot holds is in exactly one place: in the slot, or with who attempts its end. Everybody
//!    else passes that slot by.
//! 3. Nothing is dropped here: held things and wakers go out to the caller, who has left the lock.

use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::mem;
use core::task::Waker;

use gnttab_abi::{DomId, GrantRef};

/// One end of access that did not succeed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PendingView {
    /// The reference.
    pub gref: GrantRef,
    /// The domain that still holds on.
    pub peer: DomId,
    /// How often the end was attempted.
    pub tries: u32,
}

impl PendingView {
    /// One that was attempted once.
    pub(crate) fn first(gref: GrantRef, peer: DomId) -> PendingView {
        PendingView { gref, peer, tries: 1 }
    }
}

/// Something whose end is pending, with what it holds.
pub(crate) struct Item<H> {
    pub(crate) view: PendingView,
    pub(crate) held: H,
}

/// The queue: a fixed number of slots, gone round.
pub(crate) struct Queue<H> {
    slots: Vec<Slot<H>>,
    /// The indexes of the slots that are [`Step::Vacant`].
    vacant: Vec<usize>,
    /// The next slot to look at.
    cursor: usize,
}

struct Slot<H> {
    step: Step<H>,
    view: PendingView,
    /// Whether a [`Pending`] will ask for what is held.
    ticket: bool,
    waker: Option<Waker>,
}

enum Step<H> {
    Vacant,
    Waiting(H),
    /// Somebody has taken out what was held and attempts the end.
    Tried,
    /// Ended, and not collected yet.
    Ended(H),
}

/// What a slot gives to the ticket that asks.
pub(crate) enum Taken<H> {
    /// It has ended; the slot is vacant.
    Ended(Item<H>),
    /// It is waiting: make an attempt, then vacate the slot or put this back.
    Waiting(Item<H>),
    /// Somebody else makes an attempt.
    Tried,
}

/// Who is to have what has ended.
pub(crate) enum Heir<H> {
    /// The ticket. Whoever waits with it is to be woken.
    Ticket(Option<Waker>),
    /// Nobody: the reference is to be freed, the rest to be dropped.
    Nobody(Item<H>),
}

impl<H> Queue<H> {
    /// A queue for so many.
    pub(crate) fn new(max: usize) -> Result<Queue<H>, TryReserveError> {
        let (mut slots, mut vacant) = (Vec::new(), Vec::new());
        slots.try_reserve_exact(max)?;
        vacant.try_reserve_exact(max)?;
        let view = PendingView {
            gref: GrantRef::INVALID,
            peer: DomId::INVALID,
            tries: 0,
        };
        slots.extend((0..max).map(|_| Slot {
            step: Step::Vacant,
            view,
            ticket: false,
            waker: None,
        }));
        vacant.extend((0..max).rev());
        Ok(Queue {
            slots,
            vacant,
            cursor: 0,
        })
    }

    /// How many slots are taken.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    /// Takes one in and says its slot; gives it back if the queue is full.
    pub(crate) fn push(&mut self, item: Item<H>, ticket: bool) -> Result<usize, Item<H>> {
        let Some(at) = self.vacant.pop() else {
            return Err(item);
        };
        self.slots[at] = Slot {
            step: Step::Waiting(item.held),
            view: item.view,
            ticket,
            waker: None,
        };
        Ok(at)
    }

    /// Takes out what the next waiting slot holds, for an attempt.
    pub(crate) fn next(&mut self) -> Option<(usize, Item<H>)> {
        for _ in 0..self.slots.len() {
            let at = self.cursor;
            self.cursor = (at + 1) % self.slots.len();
            if let Step::Waiting(_) = self.slots[at].step
                && let Taken::Waiting(item) = self.take(at)
            {
                return Some((at, item));
            }
        }
        None
    }

    /// Takes out what a slot holds.
    pub(crate) fn take(&mut self, at: usize) -> Taken<H> {
        let slot = &mut self.slots[at];
        match mem::replace(&mut slot.step, Step::Tried) {
            Step::Waiting(held) => {
                slot.view.tries = slot.view.tries.saturating_add(1);
                Taken::Waiting(Item {
                    view: slot.view,
                    held,
                })
            }
            Step::Ended(held) => {
                let view = slot.view;
                self.vacate(at);
                Taken::Ended(Item { view, held })
            }
            other @ (Step::Vacant | Step::Tried) => {
                slot.step = other;
                Taken::Tried
            }
        }
    }

    /// An attempt failed: puts back what was taken out for it.
    pub(crate) fn put_back(&mut self, at: usize, held: H) {
        self.slots[at].step = Step::Waiting(held);
    }

    /// An attempt by somebody else than the ticket succeeded.
    pub(crate) fn hand_on(&mut self, at: usize, item: Item<H>) -> Heir<H> {
        let slot = &mut self.slots[at];
        if slot.ticket {
            slot.step = Step::Ended(item.held);
            Heir::Ticket(slot.waker.take())
        } else {
            self.vacate(at);
            Heir::Nobody(item)
        }
    }

    /// Empties a slot; its waker, if one is left, is for the caller to drop.
    pub(crate) fn vacate(&mut self, at: usize) -> Option<Waker> {
        let slot = &mut self.slots[at];
        slot.step = Step::Vacant;
        slot.ticket = false;
        self.vacant.push(at);
        slot.waker.take()
    }

    /// What has ended, or else whom to wake then; gives back the waker that is not needed.
    pub(crate) fn poll(&mut self, at: usize, waker: Waker) -> Result<Item<H>, Option<Waker>> {
        let slot = &mut self.slots[at];
        if !matches!(slot.step, Step::Ended(_)) {
            return Err(slot.waker.replace(waker));
        }
        match self.take(at) {
            Taken::Ended(item) => Ok(item),
            Taken::Waiting(_) | Taken::Tried => Err(Some(waker)),
        }
    }

    /// The ticket goes. What has ended and was never collected comes out.
    pub(crate) fn abandon(&mut self, at: usize) -> (Option<Item<H>>, Option<Waker>) {
        let slot = &mut self.slots[at];
        slot.ticket = false;
        let waker = slot.waker.take();
        if !matches!(slot.step, Step::Ended(_)) {
            return (None, waker);
        }
        match self.take(at) {
            Taken::Ended(item) => (Some(item), waker),
            Taken::Waiting(_) | Taken::Tried => (None, waker),
        }
    }

    /// Takes out everything, for the end of the table.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = H> {
        self.slots
            .iter_mut()
            .filter_map(|slot| match mem::replace(&mut slot.step, Step::Vacant) {
                Step::Waiting(held) | Step::Ended(held) => Some(held),
                Step::Vacant | Step::Tried => None,
            })
    }

    pub(crate) fn views(&self) -> impl Iterator<Item = PendingView> {
        self.slots
            .iter()
            .filter(|slot| matches!(slot.step, Step::Waiting(_) | Step::Tried))
            .map(|slot| slot.view)
    }
}
