//! Ends of access that the peer does not let happen yet.
//!
//! What must always hold:
//! 1. A page whose end has not succeeded is held here or by its [`Pending`]; it is not dropped,
//!    and its reference is not freed (rule GST-2).
//! 2. The queue never allocates after the table was started. When it is full, what is abandoned
//!    is given up for good and counted: never freed, never a panic (rule GST-3).
//! 3. Attempts are made, pages dropped and wakers woken without the lock held. Who attempts an
//!    end takes what the slot holds out of it meanwhile; everybody else passes the slot by.

use alloc::collections::TryReserveError;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::mem;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use gnttab_abi::{DomId, GrantRef};

use crate::table::{Shared, State};
use crate::{GrantTable, Granter, OwnedRef};

/// The longest pause between two attempts of [`Pending::wait`].
const LONGEST_PAUSE_MS: u32 = 64;

/// What a reference without a page stood for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bare {
    Transitive,
    Offer,
}

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

/// What [`GrantTable::retry_pending`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retried {
    /// Ends that succeeded.
    pub ended: usize,
    /// Ends that were attempted and did not succeed.
    pub still: usize,
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
enum Taken<H> {
    /// It has ended; the slot is vacant.
    Ended(Item<H>),
    /// It is waiting: make an attempt, then vacate the slot or put this back.
    Waiting(Item<H>),
    /// Somebody else makes an attempt.
    Tried,
}

/// Who is to have what has ended.
enum Heir<H> {
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
    fn next(&mut self) -> Option<(usize, Item<H>)> {
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
    fn take(&mut self, at: usize) -> Taken<H> {
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
    fn put_back(&mut self, at: usize, held: H) {
        self.slots[at].step = Step::Waiting(held);
    }

    /// An attempt by somebody else than the ticket succeeded.
    fn hand_on(&mut self, at: usize, item: Item<H>) -> Heir<H> {
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
    fn vacate(&mut self, at: usize) -> Option<Waker> {
        let slot = &mut self.slots[at];
        slot.step = Step::Vacant;
        slot.ticket = false;
        self.vacant.push(at);
        slot.waker.take()
    }

    /// What has ended, or else whom to wake then; gives back the waker that is not needed.
    fn poll(&mut self, at: usize, waker: Waker) -> Result<Item<H>, Option<Waker>> {
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
    fn abandon(&mut self, at: usize) -> (Option<Item<H>>, Option<Waker>) {
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

    fn views(&self) -> impl Iterator<Item = PendingView> {
        self.slots
            .iter()
            .filter(|slot| matches!(slot.step, Step::Waiting(_) | Step::Tried))
            .map(|slot| slot.view)
    }
}

/// An ended grant whose peer still holds on: a ticket for the page and the reference.
///
/// Neither can be reused until the peer lets go. Ways to wait:
/// * [`retry`](Pending::retry) attempts it now;
/// * [`wait`](Pending::wait) attempts it with pauses, for a while;
/// * `.await` is told by whoever calls [`GrantTable::retry_pending`];
/// * dropping it leaves it to the queue, which drops the page and frees the reference when it may.
///
/// ```
/// use gnttab_guest::{Grant, Granter, OwnedRef};
///
/// /// Shuts a device down: the page comes back, however long the peer takes.
/// async fn take_back<X: Granter>(grant: Grant<X>) -> (OwnedRef<X>, X::Page) {
///     match grant.end() {
///         Ok(own) => own,
///         Err(pending) => pending.await,
///     }
/// }
/// ```
#[must_use = "dropping it leaves the page to the queue"]
pub struct Pending<X: Granter> {
    table: Arc<Shared<X>>,
    gref: GrantRef,
    place: Place<X::Page>,
}

enum Place<P> {
    /// In this slot of the queue.
    Queued(usize),
    /// Here, since the queue was full.
    Here(Item<P>),
    /// Collected.
    Gone,
}

impl<X: Granter> Pending<X> {
    pub(crate) fn new(table: Arc<Shared<X>>, item: Item<X::Page>) -> Pending<X> {
        let gref = item.view.gref;
        let place = enqueue(&table, item);
        Pending { table, gref, place }
    }

    /// The reference, which is still in use.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.gref
    }

    /// Attempts the end now.
    ///
    /// # Errors
    /// The ticket itself, if the peer still holds on.
    pub fn retry(mut self) -> Result<(OwnedRef<X>, X::Page), Pending<X>> {
        self.attempt().ok_or(self)
    }

    /// Attempts the end, with pauses in between, until it succeeds or about `ms` milliseconds
    /// are over.
    ///
    /// # Errors
    /// The ticket itself, if the peer still holds on.
    pub fn wait(mut self, ms: u32) -> Result<(OwnedRef<X>, X::Page), Pending<X>> {
        let mut left = ms;
        let mut pause = 1;
        loop {
            if let Some(done) = self.attempt() {
                return Ok(done);
            }
            if left == 0 {
                return Err(self);
            }
            let now = left.min(pause);
            self.table.x.sleep_ms(now);
            left -= now;
            pause = (pause * 2).min(LONGEST_PAUSE_MS);
        }
    }

    fn attempt(&mut self) -> Option<(OwnedRef<X>, X::Page)> {
        let table = &self.table;
        let x = &*table.x;
        match mem::replace(&mut self.place, Place::Gone) {
            Place::Queued(at) => {
                match table.state.with(x, |state| state.pages.take(at)) {
                    Taken::Ended(item) => return Some(self.collect(item)),
                    Taken::Waiting(mut item) => {
                        if table.end_page(item.view.gref, &mut item.held) {
                            let waker = table.state.with(x, |state| state.pages.vacate(at));
                            drop(waker);
                            return Some(self.collect(item));
                        }
                        table.state.with(x, |state| state.pages.put_back(at, item.held));
                    }
                    Taken::Tried => {}
                }
                self.place = Place::Queued(at);
            }
            Place::Here(mut item) => {
                item.view.tries = item.view.tries.saturating_add(1);
                if table.end_page(item.view.gref, &mut item.held) {
                    return Some(self.collect(item));
                }
                self.place = enqueue(table, item);
            }
            Place::Gone => {}
        }
        None
    }

    fn collect(&self, item: Item<X::Page>) -> (OwnedRef<X>, X::Page) {
        (OwnedRef::new(&self.table, item.view.gref), item.held)
    }
}

/// Puts a page onto the queue, for a ticket; where the queue is full the ticket holds it itself.
fn enqueue<X: Granter>(table: &Shared<X>, item: Item<X::Page>) -> Place<X::Page> {
    match table.state.with(&*table.x, |state| state.pages.push(item, true)) {
        Ok(at) => Place::Queued(at),
        Err(item) => Place::Here(item),
    }
}

/// Nothing in a ticket is ever pinned.
impl<X: Granter> Unpin for Pending<X> {}

/// Done when the peer has let go, as far as somebody calls [`GrantTable::retry_pending`] now and
/// then. Once it is done it stays pending.
impl<X: Granter> Future for Pending<X> {
    type Output = (OwnedRef<X>, X::Page);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Place::Here(_) = this.place
            && let Some(done) = this.attempt()
        {
            return Poll::Ready(done);
        }
        match this.place {
            Place::Queued(at) => {
                let waker = cx.waker().clone();
                match this
                    .table
                    .state
                    .with(&*this.table.x, |state| state.pages.poll(at, waker))
                {
                    Ok(item) => {
                        this.place = Place::Gone;
                        Poll::Ready(this.collect(item))
                    }
                    Err(_unneeded) => Poll::Pending,
                }
            }
            Place::Here(_) => {
                // Nobody retries what is not on the queue: ask again.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Place::Gone => Poll::Pending,
        }
    }
}

impl<X: Granter> Drop for Pending<X> {
    fn drop(&mut self) {
        let table = &self.table;
        match mem::replace(&mut self.place, Place::Gone) {
            Place::Queued(at) => {
                let (ended, _waker) = table.state.with(&*table.x, |state| state.pages.abandon(at));
                if let Some(item) = ended {
                    table.free(&[item.view.gref]);
                }
            }
            Place::Here(mut item) => {
                if table.end_page(item.view.gref, &mut item.held) {
                    table.free(&[item.view.gref]);
                } else {
                    table.abandon_page(item);
                }
            }
            Place::Gone => {}
        }
    }
}

impl<X: Granter> fmt::Debug for Pending<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({})", self.gref)
    }
}

impl<X: Granter> GrantTable<X> {
    /// Attempts up to `budget` of the ends on the queue, each at most once, going on where the
    /// last call stopped. Who waits for one that succeeds is woken; of those that nobody waits
    /// for, the pages are dropped and the references freed.
    ///
    /// To be called from a timer, about once a second, as long as [`TableStats::pending`] is
    /// not 0.
    ///
    /// [`TableStats::pending`]: crate::TableStats::pending
    pub fn retry_pending(&self, budget: usize) -> Retried {
        let pages = self.0.retry(|state| &mut state.pages, Shared::end_page, budget);
        let bare = self.0.retry(
            |state| &mut state.bare,
            |table, gref, bare| table.end_bare(gref, *bare),
            budget.saturating_sub(pages.ended + pages.still),
        );
        Retried {
            ended: pages.ended + bare.ended,
            still: pages.still + bare.still,
        }
    }

    /// The ends that wait on the queue, in no particular order.
    #[must_use]
    pub fn pending(&self) -> Vec<PendingView> {
        // Room first: nothing is allocated with the lock held. Without memory there is less to see.
        let mut views = Vec::new();
        let _ = views.try_reserve_exact(self.stats().pending);
        self.0.state.with(&*self.0.x, |state| {
            let room = views.capacity();
            views.extend(state.pages.views().chain(state.bare.views()).take(room));
        });
        views
    }
}

impl<X: Granter> Shared<X> {
    fn retry<H>(
        &self,
        queue: impl Fn(&mut State<X>) -> &mut Queue<H>,
        end: impl Fn(&Self, GrantRef, &mut H) -> bool,
        budget: usize,
    ) -> Retried {
        let x = &*self.x;
        let mut retried = Retried::default();
        let waiting = self.state.with(x, |state| queue(state).views().count());
        for _ in 0..waiting.min(budget) {
            let Some((at, mut item)) = self.state.with(x, |state| queue(state).next()) else {
                break;
            };
            if !end(self, item.view.gref, &mut item.held) {
                retried.still += 1;
                self.state.with(x, |state| queue(state).put_back(at, item.held));
                continue;
            }
            retried.ended += 1;
            match self.state.with(x, |state| queue(state).hand_on(at, item)) {
                Heir::Ticket(None) => {}
                Heir::Ticket(Some(waker)) => waker.wake(),
                Heir::Nobody(item) => self.free(&[item.view.gref]),
            }
        }
        retried
    }

    /// Leaves a page to the queue; where that is full, page and reference are given up for good.
    pub(crate) fn abandon_page(&self, item: Item<X::Page>) {
        if let Err(item) = self.state.with(&*self.x, |state| state.pages.push(item, false)) {
            mem::forget(item.held);
            self.state.with(&*self.x, |state| state.leaked += 1);
        }
    }

    /// The same for a reference on which no page hangs.
    pub(crate) fn abandon_bare(&self, view: PendingView, held: Bare) {
        self.state.with(&*self.x, |state| {
            if state.bare.push(Item { view, held }, false).is_err() {
                state.leaked += 1;
            }
        });
    }
}
