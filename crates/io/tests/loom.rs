//! Every interleaving, and every order that memory allows, of the two ends of a ring (spec 1.3 to
//! 1.5). No wake-up is lost, no slot is read before it is written or written before it is read.
//!
//! The files under test are compiled a second time here, with loom's atomics in place of the
//! processor's, and pages that loom watches.

#![expect(clippy::tests_outside_test_module, reason = "this crate is nothing but tests")]

#[path = "../src/ring.rs"]
#[expect(private_bounds, reason = "the pages are a stand-in")]
pub mod ring;
#[path = "../src/words.rs"]
mod words;

/// What `ring` and `words` find as their atomics.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, Ordering, fence};
}

/// What `ring` finds as the pages: four control words, and slots of which loom knows who touches
/// them.
mod shared {
    use std::sync::Mutex;

    use loom::cell::UnsafeCell;

    use super::sync::AtomicU32;
    use super::{SLOT, words};

    const SLOTS: usize = 16;

    pub(crate) struct SharedPages {
        words: [AtomicU32; 4],
        slots: [Slot; SLOTS],
    }

    struct Slot {
        touched: UnsafeCell<()>,
        bytes: Mutex<[u8; SLOT]>,
    }

    // SAFETY: there is nothing in the cell, and the checker is here to find unordered access.
    unsafe impl Sync for Slot {}

    impl SharedPages {
        pub(crate) fn new() -> SharedPages {
            SharedPages {
                words: core::array::from_fn(|_| AtomicU32::new(0)),
                slots: core::array::from_fn(|_| Slot {
                    touched: UnsafeCell::new(()),
                    bytes: Mutex::new([0; SLOT]),
                }),
            }
        }

        pub(crate) fn pages(&self) -> usize {
            1
        }

        /// Pages are made zeroed.
        pub(crate) fn zero(&self) {}

        pub(crate) fn load_u32(&self, offset: usize) -> u32 {
            words::load(&self.words[offset / 4])
        }

        pub(crate) fn store_u32(&self, offset: usize, value: u32) {
            words::store(&self.words[offset / 4], value);
        }

        fn slot(&self, offset: usize) -> &Slot {
            &self.slots[(offset - 64) / SLOT]
        }

        pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
            let slot = self.slot(offset);
            slot.touched.with(|_| ());
            into.copy_from_slice(&*slot.bytes.lock().unwrap());
        }

        pub(crate) fn write(&self, offset: usize, from: &[u8]) {
            let slot = self.slot(offset);
            slot.touched.with_mut(|_| ());
            slot.bytes.lock().unwrap().copy_from_slice(from);
        }
    }
}

use std::sync::Arc;

use loom::sync::Notify;
use ring::{BackRing, FrontRing, MAX_SLOT_SIZE};
use shared::SharedPages;

const SLOT: usize = MAX_SLOT_SIZE;

type Front = FrontRing<Arc<SharedPages>>;
type Back = BackRing<Arc<SharedPages>>;

/// A ring, and the events of both ends. Who waits for an event that never comes makes the model fail.
struct Rig {
    to_back: Notify,
    to_front: Notify,
}

impl Rig {
    /// Indexes begin just before they wrap.
    fn new() -> (Arc<Rig>, Front, Back) {
        let pages = Arc::new(SharedPages::new());
        let front = FrontRing::init_at(Arc::clone(&pages), SLOT, u32::MAX).unwrap();
        let back = BackRing::attach(pages, SLOT).unwrap();
        let rig = Rig {
            to_back: Notify::new(),
            to_front: Notify::new(),
        };
        (Arc::new(rig), front, back)
    }

    fn send(&self, front: &mut Front, message: u8) {
        front.push(&[message; SLOT]).unwrap();
        if front.publish() {
            self.to_back.notify();
        }
    }

    /// The next request, and its answer: the same bytes.
    fn answer(&self, back: &mut Back) -> u8 {
        let mut slot = [0; SLOT];
        loop {
            if let Some(owed) = back.take(&mut slot).unwrap() {
                back.respond(owed, &slot);
                if back.publish() {
                    self.to_front.notify();
                }
                return whole(&slot);
            }
            if !back.final_check().unwrap() {
                self.to_back.wait();
            }
        }
    }

    fn receive(&self, front: &mut Front) -> u8 {
        let mut slot = [0; SLOT];
        loop {
            if front.take(&mut slot).unwrap() {
                return whole(&slot);
            }
            if !front.final_check().unwrap() {
                self.to_front.wait();
            }
        }
    }
}

fn whole(slot: &[u8]) -> u8 {
    assert!(slot.iter().all(|byte| *byte == slot[0]), "a message is whole");
    slot[0]
}

/// Tries every order in which at most so many times an end that could go on is made to wait, and says
/// how many there were, for `docs/models.md`.
fn up_to_preemptions(bound: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    let orders = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (count, start) = (Arc::clone(&orders), std::time::Instant::now());
    builder.check(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    let (orders, name) = (
        orders.load(std::sync::atomic::Ordering::Relaxed),
        std::thread::current(),
    );
    let (name, seconds) = (name.name().unwrap_or_default(), start.elapsed().as_secs_f64());
    println!("model {name} {orders} {seconds:.2}");
}

/// A frontend that sends requests against a backend that goes to sleep between them: each request is
/// seen, in order and whole, and the backend never sleeps while there is one (spec 1.3, 1.4).
#[test]
fn requests_against_a_sleeping_backend() {
    up_to_preemptions(3, || {
        let (rig, mut front, mut back) = Rig::new();
        let other = Arc::clone(&rig);
        let backend = loom::thread::spawn(move || [other.answer(&mut back), other.answer(&mut back)]);
        rig.send(&mut front, 1);
        rig.send(&mut front, 2);
        assert_eq!(backend.join().unwrap(), [1, 2]);
    });
}

/// A backend that answers against a frontend that goes to sleep between answers: the same the other
/// way.
#[test]
fn responses_against_a_sleeping_frontend() {
    up_to_preemptions(3, || {
        let (rig, mut front, mut back) = Rig::new();
        rig.send(&mut front, 1);
        rig.send(&mut front, 2);
        let other = Arc::clone(&rig);
        let backend = loom::thread::spawn(move || {
            other.answer(&mut back);
            other.answer(&mut back);
        });
        assert_eq!([rig.receive(&mut front), rig.receive(&mut front)], [1, 2]);
        backend.join().unwrap();
    });
}

/// A request, its answer, and the next request: both ends sleep whenever they have nothing to do, and
/// nobody sleeps for ever.
#[test]
fn to_and_fro() {
    up_to_preemptions(2, || {
        let (rig, mut front, mut back) = Rig::new();
        let other = Arc::clone(&rig);
        let backend = loom::thread::spawn(move || {
            other.answer(&mut back);
            other.answer(&mut back);
        });
        for message in [1, 2] {
            rig.send(&mut front, message);
            assert_eq!(rig.receive(&mut front), message);
        }
        backend.join().unwrap();
    });
}

/// A full ring, whose first slot is used again as soon as its answer was taken: the new request is
/// never seen as the old one, nor torn by the answer.
#[test]
fn a_slot_used_again() {
    up_to_preemptions(3, || {
        let (rig, mut front, mut back) = Rig::new();
        let slots = u8::try_from(front.shape().slots()).unwrap();
        for message in 0..slots {
            front.push(&[message; SLOT]).unwrap();
        }
        assert!(front.publish());
        assert!(front.push(&[0; SLOT]).is_err(), "it is full");
        // All but the last are answered before anything happens at once.
        for message in 0..slots - 1 {
            assert_eq!(rig.answer(&mut back), message);
        }
        let other = Arc::clone(&rig);
        let backend = loom::thread::spawn(move || [other.answer(&mut back), other.answer(&mut back)]);
        assert_eq!(rig.receive(&mut front), 0);
        rig.send(&mut front, slots);
        for message in 1..=slots {
            assert_eq!(rig.receive(&mut front), message);
        }
        assert_eq!(backend.join().unwrap(), [slots - 1, slots]);
    });
}
