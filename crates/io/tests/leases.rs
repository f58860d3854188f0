//! Operations whose data lies in pages of the queue: what goes through them, and what becomes of them.

#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use gnttab_io::blkif::{Data, FrontendQueue, Io, Lease, RejectReason};
use gnttab_io::fake::{Event, FakeGranter, Rig, RigConfig};
use gnttab_io::shared::SharedSlice;

type Queue = FrontendQueue<FakeGranter, Event>;

const SECTORS: usize = 4096;

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 31 + i / 4096 + seed) % 251).unwrap())
        .collect()
}

/// A lease with these bytes in it.
fn filled(queue: &mut Queue, content: &[u8]) -> Lease {
    let lease = queue.lease(content.len()).expect("pages to lend");
    assert_eq!(lease.len(), content.len());
    let mut left = content;
    for part in queue.leased(&lease, 0) {
        let (now, later) = left.split_at(part.len());
        part.copy_from(now);
        left = later;
    }
    assert!(left.is_empty());
    lease
}

fn content(queue: &Queue, lease: &Lease, from: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for part in queue.leased(lease, from) {
        let at = all.len();
        all.resize(at + part.len(), 0);
        SharedSlice::from(part).copy_to(&mut all[at..]);
    }
    all
}

/// Submits one operation and serves until it is done.
fn run(rig: &mut Rig, io: Io) -> Io {
    rig.device.queues_mut()[0]
        .submit(1, io)
        .expect("a legal operation");
    rig.device.kick();
    for _ in 0..1000 {
        rig.serve();
        if let Some(done) = rig.device.poll().expect("an honest backend") {
            assert_eq!((done.token, done.result), (1, Ok(())));
            return done.io;
        }
    }
    panic!("no answer");
}

fn lease_of(io: Io) -> Lease {
    match io {
        Io::Read {
            data: Data::Leased(lease),
            ..
        }
        | Io::Write {
            data: Data::Leased(lease),
            ..
        } => lease,
        io => panic!("not in leased pages: {io:?}"),
    }
}

/// Whole pages and parts, one request and several, with grants that persist and without: the disk gets every byte in its
/// place, and gives it back, and no page stays behind.
#[test]
fn what_is_written_from_leased_pages_is_read_into_others() {
    for persistent in [true, false] {
        for max_indirect in [0, 32] {
            let config = RigConfig {
                persistent,
                max_indirect,
                ..RigConfig::default()
            };
            let mut rig = Rig::new(config, SECTORS);
            for len in [512, 4096, 4608, 11 * 4096, 12 * 4096, 300 * 1024 + 512] {
                let wanted = bytes(len, len);
                let lease = filled(&mut rig.device.queues_mut()[0], &wanted);
                let write = Io::Write {
                    sector: 3,
                    data: Data::Leased(lease),
                };
                let lease = lease_of(run(&mut rig, write));
                assert!(rig.disk.content()[3 * 512..][..len] == wanted);
                rig.device.queues_mut()[0].give_back(lease);

                let lease = filled(&mut rig.device.queues_mut()[0], &vec![0; len]);
                let read = Io::Read {
                    sector: 3,
                    data: Data::Leased(lease),
                };
                let lease = lease_of(run(&mut rig, read));
                let queue = &mut rig.device.queues_mut()[0];
                for from in [0, 1, 511, len - 1] {
                    assert!(
                        content(queue, &lease, from) == wanted[from..],
                        "{len} from {from}"
                    );
                }
                queue.give_back(lease);
            }
            let pages = rig.device.queues()[0].pool_pages();
            for _ in 0..20 {
                let queue = &mut rig.device.queues_mut()[0];
                let lease = queue.lease(4096).unwrap();
                queue.give_back(lease);
            }
            assert_eq!(rig.device.queues()[0].pool_pages(), pages, "pages are used again");
        }
    }
}

/// Pages that were lent together are lent together again, whatever requests needed meanwhile for their segments: they
/// may be neighbours, and then they are one piece of memory to the kernel.
#[test]
fn the_pages_of_a_lease_stay_together() {
    let mut rig = Rig::new(RigConfig::default(), SECTORS);
    let places = |queue: &Queue, lease: &Lease| -> Vec<_> {
        queue
            .leased(lease, 0)
            .map(|part| SharedSlice::from(part).as_ptr())
            .collect()
    };
    let leases = [1, 2].map(|seed| filled(&mut rig.device.queues_mut()[0], &bytes(16 * 4096, seed)));
    let before = leases
        .each_ref()
        .map(|lease| places(&rig.device.queues()[0], lease));
    // Both use a page for their segments.
    for lease in leases {
        let write = Io::Write {
            sector: 0,
            data: Data::Leased(lease),
        };
        let lease = lease_of(run(&mut rig, write));
        rig.device.queues_mut()[0].give_back(lease);
    }
    let queue = &mut rig.device.queues_mut()[0];
    let mut again = [(); 2].map(|()| queue.lease(16 * 4096).unwrap());
    again.reverse();
    assert_eq!(again.each_ref().map(|lease| places(queue, lease)), before);
}

/// A lease that nobody gives back cannot stop who uses memory of its own.
#[test]
fn a_quarter_of_the_pages_is_never_lent() {
    let mut rig = Rig::new(RigConfig::default(), SECTORS);
    let mut kept = Vec::new();
    while let Some(lease) = rig.device.queues_mut()[0].lease(32 * 4096) {
        kept.push(lease);
    }
    assert_eq!(kept.len(), 24, "768 of the 792 of 1056 pages that may be lent");
    let wanted = bytes(100 * 4096, 1);
    let write = Io::Write {
        sector: 0,
        data: wanted.clone().into(),
    };
    run(&mut rig, write);
    assert!(rig.disk.content()[..wanted.len()] == wanted);
    let queue = &mut rig.device.queues_mut()[0];
    kept.into_iter().for_each(|lease| queue.give_back(lease));
    assert!(queue.lease(792 * 4096).is_some());
}

/// The pages stay with the connection, the data does not: what was not answered, and what somebody has in hand, reaches
/// the next backend from memory that the one before has never mapped.
#[test]
fn a_lost_connection_loses_no_data_and_gives_none_away() {
    let mut rig = Rig::new(RigConfig::default(), SECTORS);
    let wanted = bytes(20 * 4096, 5);
    let write = |sector, lease| Io::Write {
        sector,
        data: Data::Leased(lease),
    };
    // The first backend keeps these pages mapped, and does not let go when the connection ends.
    let mapped = filled(&mut rig.device.queues_mut()[0], &bytes(40 * 4096, 1));
    let mapped = lease_of(run(&mut rig, write(2000, mapped)));
    let queue = &mut rig.device.queues_mut()[0];
    queue.give_back(mapped);
    let lease = filled(queue, &wanted);
    queue.submit(7, write(8, lease)).unwrap();
    let in_hand = filled(queue, &wanted);
    rig.device.close();
    let see = |rig: &Rig, gref| {
        let mut bytes = vec![0; 4096];
        rig.domain.peek(gref).expect("still mapped").read(0, &mut bytes);
        bytes
    };
    let old: Vec<_> = rig
        .domain
        .references()
        .into_iter()
        .map(|gref| (gref, see(&rig, gref)))
        .collect();
    assert!(old.len() > 40, "{} are still mapped", old.len());

    let queue = &mut rig.device.queues_mut()[0];
    assert!(content(queue, &in_hand, 0) == wanted);
    queue.submit(8, write(1000, in_hand)).unwrap();
    let kept = std::mem::take(&mut rig.backend);
    rig.connect();
    rig.device.kick();
    for token in [7, 8] {
        rig.serve();
        let done = rig.device.poll().unwrap().expect("an answer");
        assert_eq!((done.token, done.result), (token, Ok(())));
        let (Io::Write { data, .. } | Io::Read { data, .. }) = done.io else {
            panic!("a write comes back as a write")
        };
        assert!(data == wanted, "in memory of its own");
    }
    for sector in [8, 1000] {
        assert!(rig.disk.content()[sector * 512..][..wanted.len()] == wanted);
    }
    for (gref, before) in old {
        assert!(
            see(&rig, gref) == before,
            "the old backend sees something new in {gref}"
        );
    }
    drop(kept);
}

#[test]
fn a_lease_is_good_once() {
    let mut rig = Rig::new(RigConfig::default(), SECTORS);
    let mut other = Rig::new(RigConfig::default(), SECTORS);
    let lease = other.device.queues_mut()[0].lease(4096).unwrap();
    let read = Io::Read {
        sector: 0,
        data: Data::Leased(lease),
    };
    let refused = rig.device.queues_mut()[0].submit(1, read).unwrap_err();
    assert_eq!(refused.reason, RejectReason::NotLent);
}
