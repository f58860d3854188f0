//! The own table: started, grown, resumed, looked at.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;
use core::ops::Range;
use core::task::Waker;

use gnttab_abi::{GrantRef, NR_RESERVED_ENTRIES, V1_ENTRIES_PER_PAGE, status_pages_for};

use crate::consumer::{ConsumerId, Consumers, OverQuota, Taker};
use crate::free::{FreeSet, Room};
use crate::pending::Bare;
use crate::queue::Queue;
use crate::sync::Lock;
use crate::version::{self, VersionStuck};
use crate::words::{Frames, OfferOutcome, Outcome};
use crate::{FrameKind, Granter, ReachError, Version};

/// More frames than this are never asked for: every reference must stay below "no reference" in
/// either version.
const MOST_FRAMES: u32 = u32::MAX / V1_ENTRIES_PER_PAGE;

/// How a table is set up.
///
/// ```
/// use gnttab_guest::{Config, Version};
///
/// let config = Config { version: Version::for_address_bits(46), ..Config::default() };
/// assert_eq!(config.version, Version::V2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The version to ask for; see [`Version::for_address_bits`].
    pub version: Version,
    /// Frames to have from the start; at least 1.
    pub first_frames: u32,
    /// Frames never to exceed, whatever more the hypervisor allows.
    pub max_frames: u32,
    /// How many ended grants whose peer still holds on can be queued.
    pub max_pending: usize,
    /// How many can wait for free references at a time.
    pub max_waiters: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            version: Version::V1,
            first_frames: 1,
            max_frames: MOST_FRAMES,
            max_pending: 1024,
            max_waiters: 64,
        }
    }
}

/// A table could not be started or resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The hypervisor keeps a version that was not asked for.
    #[error(transparent)]
    Version(#[from] VersionStuck),
    /// The hypervisor gives this domain no grant table.
    #[error("the hypervisor allows this domain no grant-table frame")]
    NoTable,
    /// After a resume: fewer frames are allowed than are in use.
    #[error("{needed} grant-table frames are in use, the hypervisor now allows {max}")]
    Shrunk {
        /// Frames in use.
        needed: u32,
        /// Frames allowed.
        max: u32,
    },
    /// The first frames could not be had.
    #[error(transparent)]
    Frames(#[from] AllocError),
}

/// References could not be had. Nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocError {
    /// The table is as large as it may be.
    #[error("no {wanted} grant references: {free} are free in a table of at most {max_frames} frames")]
    NoSpace {
        /// How many were asked for (as a run, where it was one).
        wanted: u32,
        /// How many are free.
        free: u32,
        /// Frames that the table may have.
        max_frames: u32,
    },
    /// The consumer has as many as it may have ([`GrantTable::consumer`]).
    #[error("no {wanted} grant references: this consumer has {used} of the {quota} that it may have")]
    Quota {
        /// How many were asked for.
        wanted: u32,
        /// How many it has.
        used: u32,
        /// How many it may have.
        quota: u32,
    },
    /// The table could not be enlarged.
    #[error("cannot enlarge the grant table: {0}")]
    Reach(#[from] ReachError),
    /// This program has no memory left for its bookkeeping.
    #[error("no memory for the bookkeeping of grant references")]
    NoMemory,
}

/// As many wait for free references as [`Config::max_waiters`] allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} already wait for free grant references")]
pub struct TooManyWaiters(pub usize);

/// A domain's own grant table. Clones are the same table.
///
/// References are taken from it, made into grants, and come back when the peer has let go:
///
/// * [`alloc_one`](GrantTable::alloc_one), [`alloc`](GrantTable::alloc) (a private
///   [`Batch`](crate::Batch)) and [`alloc_run`](GrantTable::alloc_run) (consecutive ones);
/// * [`grant_zeroed`](GrantTable::grant_zeroed), [`grant`](GrantTable::grant),
///   [`grant_part`](GrantTable::grant_part), [`grant_transitive`](GrantTable::grant_transitive),
///   [`offer`](GrantTable::offer);
/// * [`retry_pending`](GrantTable::retry_pending), from a timer, about once a second while
///   [`TableStats::pending`] is not 0.
///
/// Granting and ending take no lock. Allocating takes one for a few instructions, and may make
/// hypercalls when the table has to grow; interrupt handlers therefore claim from a batch.
pub struct GrantTable<X: Granter>(pub(crate) Arc<Shared<X>>, pub(crate) ConsumerId);

/// What is the same for all clones of a table and for everything taken from it.
pub(crate) struct Shared<X: Granter> {
    pub(crate) x: Arc<X>,
    pub(crate) frames: Frames,
    pub(crate) state: Lock<State<X>>,
    /// Held while the table grows or is resumed. Taken before `state`, never after.
    growth: Lock<()>,
    config: Config,
}

/// The bookkeeping, under one lock.
pub(crate) struct State<X: Granter> {
    size: Size,
    free: FreeSet,
    pub(crate) consumers: Consumers,
    waiters: Vec<Waiter>,
    pub(crate) pages: Queue<X::Page>,
    pub(crate) bare: Queue<Bare>,
    pub(crate) leaked: u64,
    pub(crate) lost_frames: u64,
}

#[derive(Clone, Copy)]
struct Size {
    frames: u32,
    max_frames: u32,
}

impl<X: Granter> State<X> {
    /// Takes one off the list who waits for no more references than there are.
    fn satisfied(&mut self) -> Option<Waiter> {
        let free = self.free.len();
        let room = |waiter: &Waiter| free.min(self.consumers.room(waiter.consumer));
        let at = self
            .waiters
            .iter()
            .position(|waiter| waiter.wanted <= room(waiter))?;
        Some(self.waiters.swap_remove(at))
    }
}

/// Why references could not be taken.
enum Short {
    /// So many are lacking in a table of that size.
    Free(u32, Size),
    Quota(AllocError),
}

struct Waiter {
    wanted: u32,
    consumer: ConsumerId,
    waker: Waker,
}

/// How a table stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableStats {
    /// The version in force.
    pub version: Version,
    /// Frames that the table has.
    pub frames: u32,
    /// Frames that it may have.
    pub max_frames: u32,
    /// References that exist, the eight reserved ones among them.
    pub refs: u32,
    /// References that are free.
    pub free: u32,
    /// Ended grants on the queue, whose peer still holds on.
    pub pending: usize,
    /// References, with their pages, given up for good because the queue was full.
    pub leaked: u64,
    /// Frames that arrived by transfer for an offer that nobody waited for any more.
    pub lost_frames: u64,
}

impl<X: Granter> GrantTable<X> {
    /// Chooses the version, asks for the size and makes the first frames reachable.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(x: Arc<X>, config: Config) -> Result<GrantTable<X>, StartError> {
        let version = version::choose(&*x, config.version)?;
        let max_frames = version::max_frames(&*x).min(config.max_frames).min(MOST_FRAMES);
        if max_frames == 0 {
            return Err(StartError::NoTable);
        }
        let mut waiters = Vec::new();
        waiters
            .try_reserve_exact(config.max_waiters)
            .map_err(|_| AllocError::NoMemory)?;
        let state = State {
            size: Size {
                frames: 0,
                max_frames,
            },
            free: FreeSet::new(NR_RESERVED_ENTRIES),
            consumers: Consumers::new(),
            waiters,
            pages: Queue::new(config.max_pending).map_err(|_| AllocError::NoMemory)?,
            bare: Queue::new(config.max_pending).map_err(|_| AllocError::NoMemory)?,
            leaked: 0,
            lost_frames: 0,
        };
        let shared = Shared {
            x,
            frames: Frames::new(version, max_frames).map_err(|_| AllocError::NoMemory)?,
            state: Lock::new(state),
            growth: Lock::new(()),
            config,
        };
        shared.grow_to(config.first_frames.clamp(1, max_frames))?;
        Ok(GrantTable(Arc::new(shared), ConsumerId::default()))
    }

    /// Puts the table back in place after a migration or a resume: the version is asked for
    /// again, and every frame is made reachable again.
    ///
    /// The table then is as the hypervisor has it, on a new host empty: frontends end their
    /// grants, which succeeds there, and grant anew. The version may drop to 1 and never rises;
    /// the maximum may shrink and never grows.
    ///
    /// Nothing else may use the table meanwhile; what does finds its entries out of reach.
    ///
    /// # Errors
    /// [`StartError`]; the table is out of reach then, grants fail and ends stay pending, until a
    /// resume succeeds.
    pub fn resume(&self) -> Result<(), StartError> {
        let shared = &*self.0;
        let x = &*shared.x;
        shared.growth.with_long(x, |()| {
            let before = shared.frames.version();
            let version = version::choose(x, before)?;
            shared.frames.clear(version);
            let offered = version::max_frames(x);
            let (frames, max_frames) = shared.state.with(x, |state| {
                let frames = state.free.total().div_ceil(version.entries_per_frame());
                state.size = Size {
                    frames,
                    max_frames: state.size.max_frames.min(offered),
                };
                (frames, state.size.max_frames)
            });
            if frames > max_frames {
                return Err(StartError::Shrunk {
                    needed: frames,
                    max: max_frames,
                });
            }
            shared.place(version, 0..frames).map_err(AllocError::from)?;
            Ok(())
        })
    }

    /// The version in force.
    #[must_use]
    pub fn version(&self) -> Version {
        self.0.frames.version()
    }

    /// How the table stands.
    #[must_use]
    pub fn stats(&self) -> TableStats {
        let version = self.version();
        self.0.state.with(&*self.0.x, |state| TableStats {
            version,
            frames: state.size.frames,
            max_frames: state.size.max_frames,
            refs: state.free.total(),
            free: state.free.len(),
            pending: state.pages.len() + state.bare.len(),
            leaked: state.leaked,
            lost_frames: state.lost_frames,
        })
    }

    /// Wakes `waker`, once, when at least `wanted` references are free, and within the quota of a
    /// [consumer](GrantTable::consumer) that asks; at once if they are.
    /// Asking again with a waker that would wake the same task only changes the number.
    ///
    /// A kernel without tasks makes a waker of any callback with [`alloc::task::Wake`]:
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/fake.rs"));
    /// use std::task::{Wake, Waker};
    ///
    /// use gnttab_guest::{Config, GrantTable};
    ///
    /// /// A queue of a device, stopped for want of references.
    /// struct Queue(AtomicBool);
    ///
    /// impl Wake for Queue {
    ///     fn wake(self: Arc<Self>) {
    ///         self.0.store(true, Ordering::Relaxed); // runs again
    ///     }
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let table = GrantTable::start(Machine::new().domain(DomId(1)), Config { max_frames: 1, ..Config::default() })?;
    /// let refs = table.alloc(table.stats().free)?;
    /// let queue = Arc::new(Queue(AtomicBool::new(false)));
    /// table.on_free(16, &Waker::from(queue.clone()))?;
    /// assert!(!queue.0.load(Ordering::Relaxed));
    /// drop(refs);
    /// assert!(queue.0.load(Ordering::Relaxed));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`TooManyWaiters`].
    pub fn on_free(&self, wanted: u32, waker: &Waker) -> Result<(), TooManyWaiters> {
        let max = self.0.config.max_waiters;
        let new = Waiter {
            wanted,
            consumer: self.1,
            waker: waker.clone(),
        };
        let unused = self.0.state.with(&*self.0.x, |state| {
            let waiters = &mut state.waiters;
            match waiters
                .iter()
                .position(|waiter| waiter.waker.will_wake(&new.waker))
            {
                Some(at) => {
                    (waiters[at].wanted, waiters[at].consumer) = (wanted, self.1);
                    Ok(Some(new))
                }
                None if waiters.len() < max => {
                    waiters.push(new);
                    Ok(None)
                }
                None => Err(new),
            }
        });
        // Wakers are dropped outside the lock, whether they were taken in or not.
        if unused.map(drop).is_err() {
            return Err(TooManyWaiters(max));
        }
        self.0.wake_waiters();
        Ok(())
    }

    /// Forgets a waker given to [`GrantTable::on_free`]; says whether it still waited.
    pub fn cancel_on_free(&self, waker: &Waker) -> bool {
        let cancelled = self.0.state.with(&*self.0.x, |state| {
            let at = state
                .waiters
                .iter()
                .position(|waiter| waiter.waker.will_wake(waker))?;
            Some(state.waiters.swap_remove(at))
        });
        cancelled.is_some()
    }

    /// The platform that the table was started with.
    #[must_use]
    pub fn platform(&self) -> &Arc<X> {
        &self.0.x
    }
}

impl<X: Granter> Clone for GrantTable<X> {
    fn clone(&self) -> Self {
        GrantTable(Arc::clone(&self.0), self.1)
    }
}

impl<X: Granter> fmt::Debug for GrantTable<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GrantTable").field(&self.stats()).finish()
    }
}

impl<X: Granter> Shared<X> {
    /// Takes references for a consumer with `attempt`, which says how many it lacked; the table grows by as
    /// many as it takes.
    pub(crate) fn obtain<R>(
        &self,
        consumer: ConsumerId,
        wanted: u32,
        mut attempt: impl FnMut(&mut Taker<'_>) -> Result<R, u32>,
    ) -> Result<R, AllocError> {
        let x = &*self.x;
        let mut take = || {
            self.state.with(x, |state| {
                let State { free, consumers, .. } = state;
                if let Err(OverQuota { used, quota }) = consumers.check(consumer, wanted) {
                    return Err(Short::Quota(AllocError::Quota { wanted, used, quota }));
                }
                let mut taker = Taker {
                    free,
                    consumers,
                    consumer,
                };
                attempt(&mut taker).map_err(|lack| Short::Free(lack, state.size))
            })
        };
        match take() {
            Ok(taken) => return Ok(taken),
            Err(Short::Quota(error)) => return Err(error),
            Err(Short::Free(..)) => {}
        }
        // One grows the table at a time; who waited for that looks again first. Others may take
        // what was grown before we do: each round adds frames, so the maximum ends this.
        self.growth.with_long(x, |()| {
            loop {
                let (lack, size) = match take() {
                    Ok(taken) => return Ok(taken),
                    Err(Short::Quota(error)) => return Err(error),
                    Err(Short::Free(lack, size)) => (lack, size),
                };
                let more = lack.div_ceil(self.frames.version().entries_per_frame()).max(1);
                match size.frames.checked_add(more) {
                    Some(frames) if frames <= size.max_frames => self.grow_to(frames)?,
                    _ => return Err(self.no_space(wanted)),
                }
            }
        })
    }

    fn no_space(&self, wanted: u32) -> AllocError {
        self.state.with(&*self.x, |state| AllocError::NoSpace {
            wanted,
            free: state.free.len(),
            max_frames: state.size.max_frames,
        })
    }

    /// Enlarges the table to so many frames. The caller has `growth` and checked the maximum.
    fn grow_to(&self, frames: u32) -> Result<(), AllocError> {
        let version = self.frames.version();
        // `MOST_FRAMES` keeps the product below the largest number.
        let total = frames.saturating_mul(version.entries_per_frame());
        let room = Room::for_total(total).map_err(|_| AllocError::NoMemory)?;
        let mut owner = Vec::new();
        owner
            .try_reserve_exact(usize::try_from(total).unwrap_or(usize::MAX))
            .map_err(|_| AllocError::NoMemory)?;
        let has = self.state.with(&*self.x, |state| state.size.frames);
        self.place(version, has..frames)?;
        let old = self.state.with(&*self.x, |state| {
            state.size.frames = frames;
            (
                state.free.extend(total, room),
                state.consumers.extend(total, owner),
            )
        });
        drop(old);
        self.wake_waiters();
        Ok(())
    }

    /// Makes these frames reachable, with the status frames that come with them.
    fn place(&self, version: Version, frames: Range<u32>) -> Result<(), ReachError> {
        self.place_kind(FrameKind::Shared, frames.clone())?;
        match version {
            Version::V1 => Ok(()),
            Version::V2 => {
                let status = status_pages_for(frames.start)..status_pages_for(frames.end);
                self.place_kind(FrameKind::Status, status)
            }
        }
    }

    fn place_kind(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), ReachError> {
        if frames.is_empty() {
            return Ok(());
        }
        self.x.reach(kind, frames.clone())?;
        for index in frames {
            let frame = self.x.frame(kind, index).ok_or(ReachError::NoAddress(index))?;
            self.frames.set(kind, index, frame);
        }
        Ok(())
    }

    /// Gives references back to everybody.
    pub(crate) fn free(&self, refs: &[GrantRef]) {
        // A long list is no reason to hold the lock for long.
        for some in refs.chunks(64) {
            let mut satisfied = self.state.with(&*self.x, |state| {
                for gref in some {
                    let was_taken = state.free.put(gref.0);
                    debug_assert!(was_taken, "reference {gref} was freed twice");
                    if was_taken {
                        state.consumers.discharge(gref.0);
                    }
                }
                state.satisfied()
            });
            while let Some(waiter) = satisfied {
                waiter.waker.wake();
                satisfied = self.state.with(&*self.x, State::satisfied);
            }
        }
    }

    /// Wakes whoever waits for no more references than there are.
    pub(crate) fn wake_waiters(&self) {
        while let Some(waiter) = self.state.with(&*self.x, State::satisfied) {
            waiter.waker.wake();
        }
    }

    /// One attempt to end access through an entry. What is out of reach counts as in use.
    pub(crate) fn end_entry(&self, gref: GrantRef) -> bool {
        self.frames
            .entry(gref)
            .is_some_and(|entry| entry.end() == Outcome::Done)
    }

    /// One attempt to end access to a page and to have it back.
    pub(crate) fn end_page(&self, gref: GrantRef, page: &mut X::Page) -> bool {
        self.end_entry(gref) && self.x.page_back(page).is_ok()
    }

    /// One attempt to end an offer for a transfer.
    pub(crate) fn end_offer(&self, gref: GrantRef) -> OfferOutcome {
        self.frames
            .entry(gref)
            .map_or(OfferOutcome::Committed, |entry| entry.end_offer())
    }

    /// One attempt to end what no page hangs on.
    pub(crate) fn end_bare(&self, gref: GrantRef, bare: Bare) -> bool {
        match bare {
            Bare::Transitive => self.end_entry(gref),
            Bare::Offer => match self.end_offer(gref) {
                OfferOutcome::Withdrawn => true,
                OfferOutcome::Received(_) => {
                    self.state.with(&*self.x, |state| state.lost_frames += 1);
                    true
                }
                OfferOutcome::Committed => false,
            },
        }
    }
}

impl<X: Granter> Drop for Shared<X> {
    /// The table goes, and with it who could retry. A page that a peer may still use is never
    /// given back (rule GST-3).
    fn drop(&mut self) {
        for page in self.state.get_mut().pages.drain() {
            mem::forget(page);
        }
    }
}
