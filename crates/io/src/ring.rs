//! The shared request/response ring (spec 1.1 to 1.5), for either side, over one page or several.
//!
//! A frontend puts requests into slots and counts them in `req_prod`; the backend takes them, and puts
//! responses into slots it has emptied, counted in `rsp_prod`. All indexes run freely and wrap at 2^32.
//! Next to each producer index stands an event threshold, through which a sleeper says when to be woken.
//!
//! # Rules
//! 1. Only the *peer's* producer index and event threshold are ever read from shared memory. Our own
//!    position is private, so a peer that rewrites the page changes nothing we rely on (PVR-10).
//! 2. The peer's producer index is read once a pass and must lie in the room that the protocol leaves it,
//!    else the ring is dead for good: [`RingBroken`], at every later call too (PVR-1).
//! 3. A slot is copied to private memory once, and written whole: what is not a field is zero (PVR-2, PVR-4).
//! 4. No wake-up is lost: a producer publishes its index *before* it reads the threshold, a consumer sets
//!    its threshold *before* it looks a last time, with a full barrier in between on both sides.
//!
//! `tests/loom.rs` compiles this very file with the checker's atomics.
//!
//! ```
//! use gnttab_io::ring::{BackRing, FrontRing};
//! use gnttab_io::shared::HeapPages;
//!
//! let heap = HeapPages::zeroed(1);
//! let mut front = FrontRing::init(heap.view(), 112)?;
//! let mut back = BackRing::attach(heap.view(), 112)?;
//!
//! front.push(b"request")?;
//! assert!(front.publish(), "the backend sleeps until the first request");
//!
//! let mut slot = [0; 112];
//! let owed = back.take(&mut slot)?.expect("a request");
//! assert_eq!(&slot[..7], b"request");
//! back.respond(owed, b"done");
//! assert!(back.publish());
//! assert!(!back.final_check()?, "nothing more to take");
//!
//! assert!(front.take(&mut slot)?);
//! assert_eq!(&slot[..4], b"done");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use core::fmt;

use gnttab_abi::PAGE_SIZE;

use crate::shared::SharedPages;
use crate::sync::{Ordering, fence};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
/// Bytes before the first slot.
const HEADER: usize = 64;
/// Bytes of the largest slot that a ring takes.
pub const MAX_SLOT_SIZE: usize = 128;

/// How many slots of which size a ring has (spec 1.1).
///
/// Having one tells you: the number is a power of two, and slot `i & (slots - 1)` lies inside the pages for
/// every `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingShape {
    slot_size: usize,
    slots: u32,
}

impl RingShape {
    /// The ring that `pages` pages hold: the largest power of two of slots behind the 64-byte header.
    ///
    /// # Errors
    /// [`ShapeError`] if there is no page, or slots are empty or above [`MAX_SLOT_SIZE`] bytes.
    pub fn new(pages: usize, slot_size: usize) -> Result<RingShape, ShapeError> {
        let error = ShapeError { pages, slot_size };
        if pages == 0 || slot_size == 0 || slot_size > MAX_SLOT_SIZE {
            return Err(error);
        }
        let bytes = pages.checked_mul(PAGE_SIZE).ok_or(error)? - HEADER;
        let slots = u32::try_from(bytes / slot_size).map_err(|_| error)?;
        Ok(RingShape {
            slot_size,
            slots: 1 << slots.ilog2(),
        })
    }

    /// Slots, a power of two.
    #[must_use]
    pub fn slots(self) -> u32 {
        self.slots
    }

    /// Bytes of a slot.
    #[must_use]
    pub fn slot_size(self) -> usize {
        self.slot_size
    }

    fn offset(self, index: u32) -> usize {
        HEADER + (index & (self.slots - 1)) as usize * self.slot_size
    }

    fn read_slot(self, pages: &SharedPages, index: u32, slot: &mut [u8]) {
        pages.read(self.offset(index), &mut slot[..self.slot_size]);
    }

    /// Writes a slot whole: the message, then zeros (rule 3).
    fn write_slot(self, pages: &SharedPages, index: u32, message: &[u8]) {
        let mut slot = [0; MAX_SLOT_SIZE];
        slot[..message.len()].copy_from_slice(message);
        pages.write(self.offset(index), &slot[..self.slot_size]);
    }
}

/// No ring fits that many pages and that slot size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no ring of {slot_size}-byte slots in {pages} pages")]
pub struct ShapeError {
    /// Pages.
    pub pages: usize,
    /// Bytes of a slot.
    pub slot_size: usize,
}

/// The peer's producer index makes no sense: the ring is dead until a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer's producer index {producer:#x} is not within {room} of {consumer:#x}")]
pub struct RingBroken {
    /// What the peer wrote.
    pub producer: u32,
    /// How far we have consumed.
    pub consumer: u32,
    /// How many entries it could have produced beyond that.
    pub room: u32,
}

/// Why a ring could not be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The pages hold no ring.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// Its indexes are nonsense.
    #[error(transparent)]
    Broken(#[from] RingBroken),
}

/// A ring could not be attached; its pages come back to be unmapped.
pub struct AttachFailed<P> {
    /// The pages.
    pub pages: P,
    /// Why.
    pub error: AttachError,
}

impl<P> fmt::Debug for AttachFailed<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

impl<P> fmt::Display for AttachFailed<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<P> core::error::Error for AttachFailed<P> {}

/// Every slot is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all {0} slots of the ring are in use")]
pub struct RingFull(pub u32);

/// Where one direction's words lie in the header.
struct Direction {
    producer: usize,
    event: usize,
}
const REQUESTS: Direction = Direction {
    producer: REQ_PROD,
    event: REQ_EVENT,
};
const RESPONSES: Direction = Direction {
    producer: RSP_PROD,
    event: RSP_EVENT,
};

/// Publishes entries up to `new` and says whether the peer asked to be woken for one of them (spec 1.3).
fn publish(pages: &SharedPages, direction: &Direction, old: u32, new: u32) -> bool {
    if new == old {
        return false;
    }
    pages.store_u32(direction.producer, new);
    fence(Ordering::SeqCst);
    let event = pages.load_u32(direction.event);
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// Asks to be woken for the entry `ahead` beyond `consumer`; the caller then looks a last time (spec 1.4).
fn ask(pages: &SharedPages, direction: &Direction, consumer: u32, ahead: u32) {
    pages.store_u32(direction.event, consumer.wrapping_add(ahead));
    fence(Ordering::SeqCst);
}

/// Reads the peer's producer index once and checks it (rule 2).
fn look(pages: &SharedPages, direction: &Direction, consumer: u32, room: u32) -> Result<u32, RingBroken> {
    let producer = pages.load_u32(direction.producer);
    if producer.wrapping_sub(consumer) > room {
        return Err(RingBroken {
            producer,
            consumer,
            room,
        });
    }
    Ok(producer)
}

/// The frontend's end: produces requests, consumes responses.
#[derive(Debug)]
pub struct FrontRing<P> {
    pages: P,
    shape: RingShape,
    /// Requests written.
    req_prod: u32,
    /// Requests the peer may see.
    published: u32,
    /// Responses taken.
    rsp_cons: u32,
    /// Responses that the last look saw.
    rsp_seen: u32,
    broken: Option<RingBroken>,
}

impl<P: AsRef<SharedPages>> FrontRing<P> {
    /// Makes an empty ring of pages that no peer can reach yet (spec 1.2).
    ///
    /// # Errors
    /// [`ShapeError`] if the pages hold no ring of such slots.
    pub fn init(pages: P, slot_size: usize) -> Result<Self, ShapeError> {
        Self::init_at(pages, slot_size, 0)
    }

    /// As [`FrontRing::init`], with indexes that start at `start` instead of 0, to meet their wrap early.
    ///
    /// # Errors
    /// As [`FrontRing::init`].
    pub fn init_at(pages: P, slot_size: usize, start: u32) -> Result<Self, ShapeError> {
        let shared = pages.as_ref();
        let shape = RingShape::new(shared.pages(), slot_size)?;
        shared.zero();
        shared.store_u32(REQ_PROD, start);
        shared.store_u32(RSP_PROD, start);
        shared.store_u32(REQ_EVENT, start.wrapping_add(1));
        shared.store_u32(RSP_EVENT, start.wrapping_add(1));
        Ok(FrontRing {
            pages,
            shape,
            req_prod: start,
            published: start,
            rsp_cons: start,
            rsp_seen: start,
            broken: None,
        })
    }

    /// Slot count and size.
    #[must_use]
    pub fn shape(&self) -> RingShape {
        self.shape
    }

    /// Requests that can be pushed now.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.shape.slots - self.outstanding()
    }

    /// Requests pushed whose responses were not taken.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Writes a request into the next slot, unseen by the peer until [`FrontRing::publish`].
    ///
    /// # Errors
    /// [`RingFull`] if there is no slot.
    ///
    /// # Panics
    /// If the message is longer than a slot.
    pub fn push(&mut self, message: &[u8]) -> Result<(), RingFull> {
        if self.free() == 0 {
            return Err(RingFull(self.shape.slots));
        }
        self.shape.write_slot(self.pages.as_ref(), self.req_prod, message);
        self.req_prod = self.req_prod.wrapping_add(1);
        Ok(())
    }

    /// Shows the peer all requests pushed; `true` means that it must be notified.
    pub fn publish(&mut self) -> bool {
        let old = core::mem::replace(&mut self.published, self.req_prod);
        publish(self.pages.as_ref(), &REQUESTS, old, self.req_prod)
    }

    /// Copies the next response out; `false` if there is none.
    ///
    /// # Errors
    /// [`RingBroken`] if the peer claims more responses than there were requests.
    ///
    /// # Panics
    /// If `slot` is shorter than a slot.
    pub fn take(&mut self, slot: &mut [u8]) -> Result<bool, RingBroken> {
        if self.rsp_cons == self.rsp_seen {
            self.look()?;
        }
        if self.rsp_cons == self.rsp_seen {
            return Ok(false);
        }
        self.shape.read_slot(self.pages.as_ref(), self.rsp_cons, slot);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(true)
    }

    /// Looks how many responses can be taken now.
    ///
    /// # Errors
    /// As [`FrontRing::take`].
    pub fn waiting(&mut self) -> Result<u32, RingBroken> {
        self.look()?;
        Ok(self.rsp_seen.wrapping_sub(self.rsp_cons))
    }

    /// Before sleeping: asks for an event at the next response, then looks once more. `true` means that
    /// there is something to take now.
    ///
    /// # Errors
    /// As [`FrontRing::take`].
    pub fn final_check(&mut self) -> Result<bool, RingBroken> {
        ask(self.pages.as_ref(), &RESPONSES, self.rsp_cons, 1);
        self.look()?;
        Ok(self.rsp_cons != self.rsp_seen)
    }

    fn look(&mut self) -> Result<(), RingBroken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        // A peer can have answered what it was shown, and nothing else.
        let room = self.published.wrapping_sub(self.rsp_cons);
        match look(self.pages.as_ref(), &RESPONSES, self.rsp_cons, room) {
            Ok(seen) => self.rsp_seen = seen,
            Err(broken) => {
                self.broken = Some(broken);
                return Err(broken);
            }
        }
        Ok(())
    }

    /// The pages the ring lies in.
    pub fn pages(&self) -> &P {
        &self.pages
    }

    /// Gives the pages back.
    pub fn into_pages(self) -> P {
        self.pages
    }
}

/// One response owed: what [`BackRing::take`] gives and [`BackRing::respond`] uses up, so that no request
/// is answered twice.
#[derive(Debug)]
#[must_use = "every request taken must be answered"]
pub struct Owed(());

/// The backend's end: consumes requests, produces responses.
#[derive(Debug)]
pub struct BackRing<P> {
    pages: P,
    shape: RingShape,
    /// Requests taken.
    req_cons: u32,
    /// Requests that the last look saw.
    req_seen: u32,
    /// Responses written.
    rsp_prod: u32,
    /// Responses the peer may see.
    published: u32,
    broken: Option<RingBroken>,
}

impl<P: AsRef<SharedPages>> BackRing<P> {
    /// Attaches to a peer's ring, fresh or in use: what was not answered is taken again (spec 1.2).
    ///
    /// # Errors
    /// [`AttachFailed`] if the pages hold no such ring, or more is unanswered than it has slots.
    pub fn attach(pages: P, slot_size: usize) -> Result<Self, AttachFailed<P>> {
        match Self::read_position(pages.as_ref(), slot_size) {
            Ok((shape, start, req_seen)) => Ok(BackRing {
                pages,
                shape,
                req_cons: start,
                req_seen,
                rsp_prod: start,
                published: start,
                broken: None,
            }),
            Err(error) => Err(AttachFailed { pages, error }),
        }
    }

    fn read_position(shared: &SharedPages, slot_size: usize) -> Result<(RingShape, u32, u32), AttachError> {
        let shape = RingShape::new(shared.pages(), slot_size)?;
        let start = shared.load_u32(RSP_PROD);
        let seen = look(shared, &REQUESTS, start, shape.slots)?;
        Ok((shape, start, seen))
    }

    /// Slot count and size.
    #[must_use]
    pub fn shape(&self) -> RingShape {
        self.shape
    }

    /// Requests taken and not answered.
    #[must_use]
    pub fn owed(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Copies the next request out; `None` if there is none, or no slot to answer it in.
    ///
    /// # Errors
    /// [`RingBroken`] if the peer claims more requests than the ring holds, or takes some back.
    ///
    /// # Panics
    /// If `slot` is shorter than a slot.
    pub fn take(&mut self, slot: &mut [u8]) -> Result<Option<Owed>, RingBroken> {
        if self.req_cons == self.req_seen {
            self.look()?;
        }
        if self.req_cons == self.req_seen || self.owed() >= self.shape.slots {
            return Ok(None);
        }
        self.shape.read_slot(self.pages.as_ref(), self.req_cons, slot);
        self.req_cons = self.req_cons.wrapping_add(1);
        Ok(Some(Owed(())))
    }

    /// Writes a response into the next slot, unseen by the peer until [`BackRing::publish`].
    ///
    /// # Panics
    /// If the message is longer than a slot.
    pub fn respond(&mut self, owed: Owed, message: &[u8]) {
        let Owed(()) = owed;
        self.shape.write_slot(self.pages.as_ref(), self.rsp_prod, message);
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
    }

    /// Shows the peer all responses written; `true` means that it must be notified.
    pub fn publish(&mut self) -> bool {
        let old = core::mem::replace(&mut self.published, self.rsp_prod);
        publish(self.pages.as_ref(), &RESPONSES, old, self.rsp_prod)
    }

    /// Before sleeping: asks for an event at the next request, then looks once more. `true` means that
    /// there is something to take now.
    ///
    /// # Errors
    /// As [`BackRing::take`].
    pub fn final_check(&mut self) -> Result<bool, RingBroken> {
        ask(self.pages.as_ref(), &REQUESTS, self.req_cons, 1);
        self.look()?;
        Ok(self.req_cons != self.req_seen)
    }

    fn look(&mut self) -> Result<(), RingBroken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let room = self.shape.slots - self.owed();
        match look(self.pages.as_ref(), &REQUESTS, self.req_cons, room) {
            Ok(seen) => self.req_seen = seen,
            Err(broken) => {
                self.broken = Some(broken);
                return Err(broken);
            }
        }
        Ok(())
    }

    /// Gives the pages back.
    pub fn into_pages(self) -> P {
        self.pages
    }
}
