//! The ring against a model, around the wrap of its indexes, and between real threads.

#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gnttab_io::fake::Event;
use gnttab_io::grants::Notify as _;
use gnttab_io::ring::{BackRing, FrontRing, Owed, RingBroken, RingShape};
use gnttab_io::shared::{HeapPages, Observer, SharedPages};
use proptest::prelude::*;

const SLOT: usize = 16;

fn pair(start: u32) -> (HeapPages, FrontRing<SharedPages>, BackRing<SharedPages>) {
    let heap = HeapPages::zeroed(1);
    let front = FrontRing::init_at(heap.view(), SLOT, start).unwrap();
    let back = BackRing::attach(heap.view(), SLOT).unwrap();
    (heap, front, back)
}

#[test]
fn shapes_are_those_of_the_table() {
    for (slot, per_pages) in [
        (112, [32, 64, 128, 256, 512]),
        (108, [32, 64, 128, 256, 512]),
        (12, [256, 512, 1024, 2048, 4096]),
    ] {
        for (order, slots) in per_pages.into_iter().enumerate() {
            assert_eq!(
                RingShape::new(1 << order, slot).unwrap().slots(),
                slots,
                "{slot} {order}"
            );
        }
    }
    assert_eq!(RingShape::new(1, 8).unwrap().slots(), 256);
    for (pages, slot) in [(0, 112), (1, 0), (1, 129), (usize::MAX, 112)] {
        assert!(RingShape::new(pages, slot).is_err());
    }
}

#[test]
fn a_fresh_ring_has_the_words_of_the_spec() {
    let (heap, ..) = pair(0);
    let words: Vec<u32> = (0..4).map(|i| heap.view().load_u32(i * 4)).collect();
    assert_eq!(words, [0, 1, 0, 1]);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Push,
    FrontPublish,
    FrontTake,
    FrontSleep,
    BackTake,
    Respond,
    BackPublish,
    BackSleep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Push),
        2 => Just(Step::FrontPublish),
        4 => Just(Step::FrontTake),
        1 => Just(Step::FrontSleep),
        4 => Just(Step::BackTake),
        4 => Just(Step::Respond),
        2 => Just(Step::BackPublish),
        1 => Just(Step::BackSleep),
    ];
    prop::collection::vec(step, 0..600)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Requests arrive in order, once; responses too; the room is the model's; and whoever sleeps is woken by
    /// the first entry published after that.
    #[test]
    fn the_ring_is_two_queues(steps in steps(), start in prop_oneof![Just(0), Just(u32::MAX - 100), any::<u32>()]) {
        let (_heap, mut front, mut back) = pair(start);
        let slots = front.shape().slots();
        // What was written and not published, and what was published and not taken, on either way.
        let (mut pushed, mut requests) = (VecDeque::new(), VecDeque::new());
        let (mut written, mut responses) = (VecDeque::new(), VecDeque::new());
        let mut owed: VecDeque<(Owed, u64)> = VecDeque::new();
        let (mut front_sleeps, mut back_sleeps) = (false, true);
        let mut next = 0u64;
        let mut outstanding = 0;
        let mut slot = [0; SLOT];

        for step in steps {
            match step {
                Step::Push => {
                    let room = outstanding < slots;
                    prop_assert_eq!(front.free(), slots - outstanding);
                    prop_assert_eq!(front.push(&next.to_le_bytes()).is_ok(), room);
                    if room {
                        pushed.push_back(next);
                        outstanding += 1;
                        next += 1;
                    }
                }
                Step::FrontPublish => {
                    let notify = front.publish();
                    if pushed.is_empty() {
                        prop_assert!(!notify, "nothing was published");
                    } else if back_sleeps {
                        prop_assert!(notify, "the backend sleeps on");
                        back_sleeps = false;
                    }
                    requests.append(&mut pushed);
                }
                Step::BackTake => match back.take(&mut slot).unwrap() {
                    Some(token) => {
                        let number = u64::from_le_bytes(slot[..8].try_into().unwrap());
                        prop_assert_eq!(Some(number), requests.pop_front());
                        prop_assert!(slot[8..].iter().all(|byte| *byte == 0));
                        owed.push_back((token, number));
                        back_sleeps = false;
                    }
                    None => prop_assert!(requests.is_empty()),
                },
                Step::BackSleep => {
                    back_sleeps = !back.final_check().unwrap();
                    prop_assert_eq!(back_sleeps, requests.is_empty());
                }
                Step::Respond => if let Some((token, number)) = owed.pop_back() {
                    // In any order.
                    back.respond(token, &number.to_le_bytes());
                    written.push_back(number);
                },
                Step::BackPublish => {
                    let notify = back.publish();
                    if written.is_empty() {
                        prop_assert!(!notify);
                    } else if front_sleeps {
                        prop_assert!(notify, "the frontend sleeps on");
                        front_sleeps = false;
                    }
                    responses.append(&mut written);
                }
                Step::FrontTake => {
                    let taken = front.take(&mut slot).unwrap();
                    prop_assert_eq!(taken, !responses.is_empty());
                    if taken {
                        let number = u64::from_le_bytes(slot[..8].try_into().unwrap());
                        prop_assert_eq!(Some(number), responses.pop_front());
                        outstanding -= 1;
                        front_sleeps = false;
                    }
                }
                Step::FrontSleep => {
                    front_sleeps = !front.final_check().unwrap();
                    prop_assert_eq!(front_sleeps, responses.is_empty());
                }
            }
        }
    }

    /// T-38, T-39: whatever a peer writes into the shared words, at any moment, a side takes at most what the
    /// ring holds, and is broken or not by distance alone.
    #[test]
    fn t38_no_words_break_more_than_the_ring(
        words in prop::collection::vec(any::<u32>(), 1..40),
        start in any::<u32>(),
    ) {
        let (heap, mut front, mut back) = pair(start);
        let shared = heap.view();
        let slots = front.shape().slots();
        let mut slot = [0; SLOT];
        for word in words {
            let mut taken = 0;
            shared.store_u32(0, word);
            while let Ok(Some(owed)) = back.take(&mut slot) {
                back.respond(owed, &[]);
                taken += 1;
                prop_assert!(taken <= slots);
            }
            back.publish();
            shared.store_u32(8, word);
            prop_assert!(front.take(&mut slot).is_err() || word == start, "nothing was asked");
        }
    }
}

const INDEXES: [u32; 10] = [0, 1, 127, 128, 129, 255, 256, 257, 1 << 31, u32::MAX];

#[test]
fn t38_a_backend_accepts_up_to_a_full_ring_and_no_more() {
    for start in INDEXES {
        for ahead in INDEXES {
            let (heap, front, mut back) = pair(start);
            let slots = front.shape().slots();
            assert_eq!(slots, 128, "252 slots of 16 bytes fit");
            heap.view().store_u32(0, start.wrapping_add(ahead));
            let mut slot = [0; SLOT];
            let mut taken = 0;
            let result = loop {
                match back.take(&mut slot) {
                    Ok(Some(owed)) => {
                        back.respond(owed, &[]);
                        taken += 1;
                    }
                    Ok(None) => break Ok(()),
                    Err(broken) => break Err(broken),
                }
            };
            if ahead <= slots {
                assert_eq!((result, taken), (Ok(()), ahead), "{start} {ahead}");
            } else {
                let producer = start.wrapping_add(ahead);
                let broken = RingBroken {
                    producer,
                    consumer: start,
                    room: slots,
                };
                assert_eq!((result, taken), (Err(broken), 0));
                // For good, even if the peer repents.
                heap.view().store_u32(0, start);
                assert_eq!(back.take(&mut slot).map(drop), Err(broken));
                assert_eq!(back.final_check(), Err(broken));
            }
        }
    }
}

#[test]
fn t38_a_frontend_accepts_as_many_responses_as_requests() {
    for start in INDEXES {
        for asked in [0, 1, 5, 128] {
            for ahead in INDEXES {
                let (heap, mut front, _) = pair(start);
                for _ in 0..asked {
                    front.push(b"?").unwrap();
                }
                front.publish();
                // Not shown to the peer, so it cannot answer it. Does not fit when the ring is full.
                let _ = front.push(b"!");
                heap.view().store_u32(8, start.wrapping_add(ahead));
                let mut slot = [0; SLOT];
                let mut taken = 0;
                let broken = loop {
                    match front.take(&mut slot) {
                        Ok(true) => taken += 1,
                        Ok(false) => break false,
                        Err(_) => break true,
                    }
                };
                assert_eq!(
                    (broken, taken),
                    if ahead <= asked { (false, ahead) } else { (true, 0) }
                );
            }
        }
    }
}

#[test]
fn a_backend_takes_over_where_another_left_off() {
    let (heap, mut front, mut back) = pair(u32::MAX - 3);
    let mut slot = [0; SLOT];
    for number in 0..10u8 {
        front.push(&[number]).unwrap();
    }
    front.publish();
    for _ in 0..4 {
        let owed = back.take(&mut slot).unwrap().unwrap();
        back.respond(owed, &slot[..1]);
    }
    back.publish();
    let lost = back.take(&mut slot).unwrap();
    assert_eq!(slot[0], 4, "taken, and never answered");
    drop((lost, back));

    let mut back = BackRing::attach(heap.view(), SLOT).unwrap();
    for number in 4..10 {
        let owed = back.take(&mut slot).unwrap().unwrap();
        assert_eq!(slot[0], number);
        back.respond(owed, &slot[..1]);
    }
    back.publish();
    for number in 0..10 {
        assert!(front.take(&mut slot).unwrap());
        assert_eq!(slot[0], number);
    }

    heap.view().store_u32(0, u32::MAX);
    assert!(
        BackRing::attach(heap.view(), SLOT).is_err(),
        "more unanswered than there are slots"
    );
}

/// Lets the peer act right after one of our loads: all that can come between two of our own accesses and matters.
struct AfterLoad {
    offset: usize,
    act: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Observer for AfterLoad {
    fn loaded(&self, _: &HeapPages, offset: usize, _: usize) {
        if offset == self.offset
            && let Some(act) = self.act.lock().unwrap().take()
        {
            act();
        }
    }
}

/// The two orders in which a sleeper and a producer can meet, each at its tightest: whoever acts inside the
/// other's critical stretch, either an event is sent or the entry is seen.
#[test]
fn whoever_comes_second_sees_the_first() {
    // The consumer falls asleep right after the producer has read its threshold.
    let observer = Arc::new(AfterLoad {
        offset: 4,
        act: Mutex::new(None),
    });
    let heap = HeapPages::observed(1, observer.clone());
    let mut front = FrontRing::init(heap.view(), SLOT).unwrap();
    let mut back = BackRing::attach(heap.view(), SLOT).unwrap();
    // It was awake: the threshold is an old one.
    heap.view().store_u32(4, 1000);
    front.push(b"?").unwrap();
    let saw = Arc::new(Mutex::new(None));
    let seen = saw.clone();
    *observer.act.lock().unwrap() = Some(Box::new(move || {
        *seen.lock().unwrap() = Some(back.final_check().unwrap())
    }));
    assert!(!front.publish());
    assert_eq!(
        *saw.lock().unwrap(),
        Some(true),
        "not notified, so it must see the request itself"
    );

    // The producer publishes right after the consumer has looked a last time.
    let observer = Arc::new(AfterLoad {
        offset: 0,
        act: Mutex::new(None),
    });
    let heap = HeapPages::observed(1, observer.clone());
    let mut front = FrontRing::init(heap.view(), SLOT).unwrap();
    let mut back = BackRing::attach(heap.view(), SLOT).unwrap();
    heap.view().store_u32(4, 1000);
    front.push(b"?").unwrap();
    let sent = Arc::new(Mutex::new(None));
    let told = sent.clone();
    *observer.act.lock().unwrap() = Some(Box::new(move || *told.lock().unwrap() = Some(front.publish())));
    assert!(!back.final_check().unwrap());
    assert_eq!(
        *sent.lock().unwrap(),
        Some(true),
        "not seen, so it must be notified"
    );
}

/// Two threads that sleep whenever the ring lets them: a lost wake-up would run into the time limit.
#[test]
fn no_wake_up_is_lost_between_threads() {
    const MESSAGES: u32 = 200_000;
    const LIMIT: Duration = Duration::from_secs(20);
    let (_heap, mut front, mut back) = pair(u32::MAX - MESSAGES / 2);
    let (to_back, to_front) = (Event::new(), Event::new());
    let (mut wake_back, mut wake_front) = (to_back.clone(), to_front.clone());
    let server = std::thread::spawn(move || {
        let mut slot = [0; SLOT];
        let mut served = 0;
        while served < MESSAGES {
            while let Some(owed) = back.take(&mut slot).unwrap() {
                back.respond(owed, &slot);
                served += 1;
            }
            if back.publish() {
                wake_front.notify();
            }
            if !back.final_check().unwrap() && served < MESSAGES {
                assert!(to_back.wait(LIMIT), "the backend was not woken after {served}");
            }
        }
    });
    let mut slot = [0; SLOT];
    let (mut sent, mut received) = (0u32, 0u32);
    while received < MESSAGES {
        // Bursts of different length, so that both sides sleep at every distance.
        let burst = 1 + sent.wrapping_mul(2_654_435_761) % 7;
        for _ in 0..burst {
            if sent < MESSAGES && front.push(&sent.to_le_bytes()).is_ok() {
                sent += 1;
            }
        }
        if front.publish() {
            wake_back.notify();
        }
        while front.take(&mut slot).unwrap() {
            assert_eq!(slot[..4], received.to_le_bytes());
            received += 1;
        }
        if (sent == MESSAGES || front.free() == 0) && received < MESSAGES && !front.final_check().unwrap() {
            assert!(
                to_front.wait(LIMIT),
                "the frontend was not woken after {received}"
            );
        }
    }
    server.join().unwrap();
}
