//! Every interleaving, and every order that memory allows, of the granter's half of an entry
//! against the hypervisor's (GST-1, GST-4; spec 4.1, 8.2).
//!
//! The file under test is compiled a second time here, with loom's atomics in place of the
//! processor's.

#![expect(clippy::tests_outside_test_module, reason = "this crate is nothing but tests")]

#[path = "../src/words/protocol.rs"]
#[expect(dead_code, reason = "not every model uses all of the file")]
mod protocol;

/// What `protocol` finds as its atomics.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
}

use gnttab_abi::{DomId, EntryFlags, EntryHead};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use protocol::{Content, Entry, Outcome};
use sync::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

const PEER: DomId = DomId(2);
const FRAME: u64 = 0x55;

/// The words of one entry, and the page behind it, which loom watches: two who touch it at once
/// without an order between them fail the model.
struct Cell {
    v2: bool,
    head: AtomicU32,
    halves: AtomicU32,
    frame32: AtomicU32,
    frame: AtomicU64,
    status: AtomicU16,
    page: UnsafeCell<u32>,
}

impl Cell {
    fn new(v2: bool) -> Cell {
        Cell {
            v2,
            head: AtomicU32::new(0),
            halves: AtomicU32::new(0),
            frame32: AtomicU32::new(0),
            frame: AtomicU64::new(0),
            status: AtomicU16::new(0),
            page: UnsafeCell::new(0),
        }
    }

    fn entry(&self) -> Entry<'_> {
        if self.v2 {
            Entry::V2 {
                head: &self.head,
                halves: &self.halves,
                frame: &self.frame,
                status: &self.status,
            }
        } else {
            Entry::V1 {
                head: &self.head,
                frame: &self.frame32,
            }
        }
    }

    fn grant(&self) {
        let content = Content {
            flags: EntryFlags::PERMIT_ACCESS,
            domid: PEER,
            halves: (0, 0),
            frame: FRAME,
        };
        self.entry().publish(&content).unwrap();
    }

    fn load(&self) -> EntryHead {
        EntryHead::from_word(self.head.load(Ordering::Acquire))
    }

    /// The hypervisor claims the entry for writing (spec 4.1), first use.
    fn claim(&self) -> bool {
        let fits = |head: EntryHead| {
            head.flags.bits() & 0x103 == 1 && head.domid == PEER && !head.flags.contains(EntryFlags::READONLY)
        };
        let head = self.load();
        if !fits(head) {
            return false;
        }
        if !self.v2 {
            let marked = EntryHead {
                flags: head.flags | EntryFlags::IN_USE,
                ..head
            };
            return self
                .head
                .compare_exchange(head.word(), marked.word(), Ordering::AcqRel, Ordering::Acquire)
                .is_ok();
        }
        self.status.fetch_or(EntryFlags::IN_USE.bits(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if fits(self.load()) {
            return true;
        }
        self.status
            .fetch_and(!EntryFlags::IN_USE.bits(), Ordering::Release);
        false
    }

    /// The hypervisor gives it back (spec 4.3).
    fn give_back(&self) {
        if self.v2 {
            self.status
                .fetch_and(!EntryFlags::IN_USE.bits(), Ordering::Release);
        } else {
            self.head
                .fetch_and(!u32::from(EntryFlags::IN_USE.bits()), Ordering::Release);
        }
    }

    fn frame(&self) -> u64 {
        if self.v2 {
            self.frame.load(Ordering::Relaxed)
        } else {
            self.frame32.load(Ordering::Relaxed).into()
        }
    }

    /// Somebody writes the page. loom fails the model if somebody else may be at it.
    fn touch(&self) {
        self.page.with_mut(|page| {
            // SAFETY: loom checks that nobody else has access at the same time.
            unsafe { *page += 1 }
        });
    }
}

/// The granter ends while the peer maps, writes and unmaps. If the end succeeded the page is the
/// granter's alone: loom sees any write of the peer that is not ordered before it.
fn end_against_map(v2: bool) {
    loom::model(move || {
        let cell = Arc::new(Cell::new(v2));
        cell.grant();
        let peer = loom::thread::spawn({
            let cell = Arc::clone(&cell);
            move || {
                if cell.claim() {
                    cell.touch();
                    cell.give_back();
                }
            }
        });
        if cell.entry().end() == Outcome::Done {
            cell.touch();
            assert!(!cell.claim(), "an ended entry is not claimed");
        }
        peer.join().unwrap();
        // With the peer gone the end succeeds, also a second time.
        assert_eq!(cell.entry().end(), Outcome::Done);
        cell.touch();
    });
}

#[test]
fn t_396d_end_against_map_version_1() {
    end_against_map(false);
}

#[test]
fn t_396d_end_against_map_version_2() {
    end_against_map(true);
}

/// Whoever finds the entry granted finds the frame and the content that were written before.
fn publish_against_map(v2: bool) {
    loom::model(move || {
        let cell = Arc::new(Cell::new(v2));
        let peer = loom::thread::spawn({
            let cell = Arc::clone(&cell);
            move || {
                if cell.claim() {
                    assert_eq!(cell.frame(), FRAME);
                    cell.touch();
                    cell.give_back();
                }
            }
        });
        cell.touch();
        cell.grant();
        peer.join().unwrap();
    });
}

#[test]
fn gst_4_flags_come_last_version_1() {
    publish_against_map(false);
}

#[test]
fn gst_4_flags_come_last_version_2() {
    publish_against_map(true);
}

/// Once a grant was made read-only, nobody writes the page any more.
fn readonly_against_map(v2: bool) {
    loom::model(move || {
        let cell = Arc::new(Cell::new(v2));
        cell.grant();
        let peer = loom::thread::spawn({
            let cell = Arc::clone(&cell);
            move || {
                if cell.claim() {
                    cell.touch();
                    cell.give_back();
                }
            }
        });
        if cell.entry().make_readonly() == Outcome::Done {
            cell.touch();
        }
        peer.join().unwrap();
    });
}

#[test]
fn readonly_against_map_version_1() {
    readonly_against_map(false);
}

#[test]
fn readonly_against_map_version_2() {
    readonly_against_map(true);
}

/// A committed offer is not touched before it is completed, and its frame is read after.
#[test]
fn an_offer_ends_against_a_transfer() {
    use protocol::OfferOutcome;

    for v2 in [false, true] {
        loom::model(move || {
            let cell = Arc::new(Cell::new(v2));
            let content = Content {
                flags: EntryFlags::ACCEPT_TRANSFER,
                domid: PEER,
                halves: (0, 0),
                frame: 0,
            };
            cell.entry().publish(&content).unwrap();
            let hypervisor = loom::thread::spawn({
                let cell = Arc::clone(&cell);
                move || {
                    let offered = EntryHead {
                        flags: EntryFlags::ACCEPT_TRANSFER,
                        domid: PEER,
                    };
                    let committed = offered.word() | u32::from(EntryFlags::TRANSFER_COMMITTED.bits());
                    let taken = cell.head.compare_exchange(
                        offered.word(),
                        committed,
                        Ordering::AcqRel,
                        Ordering::Relaxed,
                    );
                    if taken.is_err() {
                        return false;
                    }
                    cell.frame32.store(0x99, Ordering::Relaxed);
                    cell.frame.store(0x99, Ordering::Relaxed);
                    let now = cell.head.load(Ordering::Relaxed);
                    assert_eq!(now, committed, "nobody touches a committed entry");
                    let completed = now | u32::from(EntryFlags::TRANSFER_COMPLETED.bits());
                    cell.head.store(completed, Ordering::Release);
                    true
                }
            });
            let first = cell.entry().end_offer();
            let transferred = hypervisor.join().unwrap();
            match first {
                OfferOutcome::Withdrawn => assert!(!transferred),
                OfferOutcome::Received(frame) => assert_eq!(frame, 0x99),
                OfferOutcome::Committed => {
                    assert_eq!(cell.entry().end_offer(), OfferOutcome::Received(0x99));
                }
            }
        });
    }
}
