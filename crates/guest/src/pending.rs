//! Ends of access that the peer does not let happen yet.
//!
//! What must always hold:
//! 1. A page whose end has not succeeded is held here or by its [`Pending`]; it is not dropped,
//!    and its reference is not freed (rule GST-2).
//! 2. When the queue is full, what is abandoned is given up for good and counted: never freed,
//!    never a panic (rule GST-3).
//! 3. Attempts are made, pages dropped and wakers woken without the lock held.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::mem;
use core::pin::Pin;
use core::task::{Context, Poll};

use gnttab_abi::GrantRef;

use crate::queue::{Heir, Item, PendingView, Queue, Taken};
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

/// What [`GrantTable::retry_pending`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retried {
    /// Ends that succeeded.
    pub ended: usize,
    /// Ends that were attempted and did not succeed.
    pub still: usize,
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
