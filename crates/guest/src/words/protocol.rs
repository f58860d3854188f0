//! The order in which the words of an entry are written and read (spec 9).
//!
//! Rules:
//! 1. What a reference means is written first, its flags last, with a release between
//!    (rule GST-4). A head is always stored whole: 32 bits, flags and grantee together, which is
//!    how the hypervisor reads and marks it.
//! 2. Ending is one attempt whose outcome counts; there is no "is it in use?" to ask first
//!    (rule GST-1). In version 1 the attempt is a compare-and-swap of the head; in version 2 the
//!    flags go, then a full barrier, then the status word tells.
//! 3. An outcome of "ended" is an acquire: whatever the peer did to the page is visible, and
//!    nothing more will come.
//! 4. No loop here is as long as a peer likes: after [`ATTEMPTS`] the entry counts as in use.
//!
//! `tests/loom.rs` compiles this very file with loom's atomics; so do the models of the engine, against the
//! engine itself.

use gnttab_abi::{DomId, EntryFlags, EntryHead};

use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// How often a change of a head is tried while the hypervisor keeps changing it.
const ATTEMPTS: u32 = 64;

/// The words of one entry.
pub(crate) enum Entry<'a> {
    V1 {
        head: &'a AtomicU32,
        frame: &'a AtomicU32,
    },
    V2 {
        head: &'a AtomicU32,
        /// Offset and length of a sub-page grant; far domain of a transitive one.
        halves: &'a AtomicU32,
        frame: &'a AtomicU64,
        status: &'a AtomicU16,
    },
}

/// What an entry is to say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content {
    pub(crate) flags: EntryFlags,
    pub(crate) domid: DomId,
    /// Bytes 4 to 7 of a version 2 entry, low half first.
    pub(crate) halves: (u16, u16),
    pub(crate) frame: u64,
}

/// The frame's number has more bits than the field of a version 1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameTooWide;

/// What an attempt to end or to restrict access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nobody uses the entry (so), and nobody newly can.
    Done,
    /// The peer uses it.
    InUse,
}

/// What an attempt to end an offer for a transfer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OfferOutcome {
    /// Nobody had taken it up.
    Withdrawn,
    /// A page arrived: this is its frame.
    Received(u64),
    /// Promised to the peer's page, which has not arrived.
    Committed,
}

impl<'a> Entry<'a> {
    fn head(&self) -> &'a AtomicU32 {
        match *self {
            Entry::V1 { head, .. } | Entry::V2 { head, .. } => head,
        }
    }

    /// Makes an unused entry say `content`. Nothing is written if the frame does not fit.
    pub(crate) fn publish(&self, content: &Content) -> Result<(), FrameTooWide> {
        let Content {
            flags,
            domid,
            halves,
            frame: number,
        } = *content;
        let unused = EntryHead {
            flags: EntryFlags::empty(),
            domid,
        };
        match *self {
            Entry::V1 { head, frame } => {
                let number = u32::try_from(number).map_err(|_| FrameTooWide)?;
                head.store(unused.word(), Ordering::Relaxed);
                frame.store(number, Ordering::Relaxed);
            }
            Entry::V2 {
                head,
                halves: word,
                frame,
                ..
            } => {
                head.store(unused.word(), Ordering::Relaxed);
                word.store(u32::from(halves.0) | u32::from(halves.1) << 16, Ordering::Relaxed);
                frame.store(number, Ordering::Relaxed);
            }
        }
        self.head()
            .store(EntryHead { flags, domid }.word(), Ordering::Release);
        Ok(())
    }

    /// Whether the peer uses the entry at this moment. Nothing is changed, so it may begin to right after.
    pub(crate) fn is_used(&self) -> bool {
        let marks = match *self {
            Entry::V1 { head, .. } => EntryHead::from_word(head.load(Ordering::Relaxed)).flags,
            Entry::V2 { status, .. } => EntryFlags::from_bits_retain(status.load(Ordering::Relaxed)),
        };
        marks.intersects(EntryFlags::IN_USE)
    }

    /// Ends access, if the peer does not use it.
    ///
    /// In use, a version 1 entry is left as it was; a version 2 entry admits no new first use
    /// any more. Ending again is how one waits; ending what has ended is [`Outcome::Done`].
    pub(crate) fn end(&self) -> Outcome {
        match *self {
            Entry::V1 { .. } => self.change_unless(EntryFlags::IN_USE, |_| EntryFlags::empty()),
            Entry::V2 { head, status, .. } => {
                let now = EntryHead::from_word(head.load(Ordering::Relaxed));
                let closed = EntryHead {
                    flags: EntryFlags::empty(),
                    ..now
                };
                head.store(closed.word(), Ordering::Relaxed);
                unused_in(status, EntryFlags::IN_USE)
            }
        }
    }

    /// Turns a writable grant into a read-only one, if the peer has no writable use of it.
    ///
    /// In use, a version 1 entry is left as it was; a version 2 entry admits no new writer.
    pub(crate) fn make_readonly(&self) -> Outcome {
        match *self {
            Entry::V1 { .. } => self.change_unless(EntryFlags::WRITING, |flags| flags | EntryFlags::READONLY),
            Entry::V2 { head, status, .. } => {
                head.fetch_or(u32::from(EntryFlags::READONLY.bits()), Ordering::Relaxed);
                unused_in(status, EntryFlags::WRITING)
            }
        }
    }

    /// Turns a read-only grant into a writable one.
    pub(crate) fn make_writable(&self) {
        self.head()
            .fetch_and(!u32::from(EntryFlags::READONLY.bits()), Ordering::Release);
    }

    /// Ends an offer for a transfer. A committed entry is not touched until the page is there.
    pub(crate) fn end_offer(&self) -> OfferOutcome {
        let head = self.head();
        if self.change_unless(EntryFlags::TRANSFER_COMMITTED, |_| EntryFlags::empty()) == Outcome::Done {
            return OfferOutcome::Withdrawn;
        }
        let now = EntryHead::from_word(head.load(Ordering::Acquire));
        if !now.flags.contains(EntryFlags::TRANSFER_COMPLETED) {
            return OfferOutcome::Committed;
        }
        let number = match *self {
            Entry::V1 { frame, .. } => frame.load(Ordering::Relaxed).into(),
            Entry::V2 { frame, .. } => frame.load(Ordering::Relaxed),
        };
        let free = EntryHead {
            flags: EntryFlags::empty(),
            ..now
        };
        head.store(free.word(), Ordering::Relaxed);
        OfferOutcome::Received(number)
    }

    /// Changes the flags in one step, as long as none of `marks` is among them.
    fn change_unless(&self, marks: EntryFlags, change: impl Fn(EntryFlags) -> EntryFlags) -> Outcome {
        let head = self.head();
        let mut word = head.load(Ordering::Relaxed);
        for _ in 0..ATTEMPTS {
            let now = EntryHead::from_word(word);
            if now.flags.intersects(marks) {
                return Outcome::InUse;
            }
            let new = EntryHead {
                flags: change(now.flags),
                ..now
            };
            match head.compare_exchange(word, new.word(), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Outcome::Done,
                Err(found) => word = found,
            }
        }
        Outcome::InUse
    }
}

/// The granter's half of the version 2 handshake. The head was changed before; the hypervisor
/// marks the status word, then looks at the head again. With a full barrier in the middle on both
/// sides at least one of them sees the other (spec 8.2).
fn unused_in(status: &AtomicU16, marks: EntryFlags) -> Outcome {
    fence(Ordering::SeqCst);
    let status = EntryFlags::from_bits_retain(status.load(Ordering::Acquire));
    if status.intersects(marks) {
        Outcome::InUse
    } else {
        Outcome::Done
    }
}
