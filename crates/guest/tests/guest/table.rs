//! The table itself: version, size, growth, references, resume (GST-7; L-16).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use gnttab_abi::{Errno, GrantRef, PAGE_SIZE};
use gnttab_guest::{
    Access, AllocError, Config, FrameKind, GrantTable, ReachError, StartError, Version, VersionStuck,
};

use crate::fake::{Machine, off, on};
use crate::{BOTH, Bench, ME, PEER};

fn config(version: Version) -> Config {
    Config {
        version,
        ..Config::default()
    }
}

#[test]
fn version_1_serves_wherever_version_2_is_not_granted() {
    let start = |knob: fn(&crate::fake::Domain)| {
        let me = Machine::new().domain(ME);
        knob(&me);
        GrantTable::start(me, config(Version::V2)).unwrap().version()
    };
    assert_eq!(start(|_| ()), Version::V2);
    assert_eq!(start(|me| on(&me.knobs.no_v2)), Version::V1);
    assert_eq!(start(|me| on(&me.knobs.no_versions)), Version::V1);
}

#[test]
fn a_table_that_stays_at_version_2_is_not_misread() {
    let me = Machine::new().domain(ME);
    on(&me.knobs.stuck_at_v2);
    let error = GrantTable::start(me, config(Version::V1)).unwrap_err();
    assert_eq!(error, StartError::Version(VersionStuck(Errno::Busy)));
}

#[test]
fn a_hypervisor_that_cannot_be_asked_gives_four_frames() {
    let me = Machine::new().domain_with(ME, 16);
    on(&me.knobs.no_query);
    let table = GrantTable::start(me, Config::default()).unwrap();
    assert_eq!(table.stats().max_frames, 4);
}

#[test]
fn a_hypervisor_that_allows_no_frame_gives_no_table() {
    let me = Machine::new().domain(ME);
    me.table.max_frames.store(0, Ordering::SeqCst);
    assert_eq!(
        GrantTable::start(me, Config::default()).unwrap_err(),
        StartError::NoTable
    );
}

#[test]
fn gst_7_the_table_grows_to_its_maximum_and_hands_out_every_reference_once() {
    for version in BOTH {
        let bench = Bench::new(version);
        let all = 4 * version.entries_per_frame() - 8;
        let mut batch = bench.table.alloc(all).unwrap();
        let refs: BTreeSet<_> = std::iter::from_fn(|| batch.claim())
            .map(|gref| {
                let number = gref.gref().0;
                std::mem::forget(gref);
                number
            })
            .collect();
        assert_eq!(refs, (8..all + 8).collect());
        assert_eq!(bench.table.stats().frames, 4);
    }
}

#[test]
fn gst_7_beyond_the_maximum_nothing_is_taken() {
    let bench = Bench::new(Version::V1);
    for wanted in [2041, 2048, 1 << 20] {
        let error = bench.table.alloc(wanted).unwrap_err();
        assert!(
            matches!(error, AllocError::NoSpace { max_frames: 4, .. }),
            "{error}"
        );
        let error = bench.table.alloc_run(wanted).unwrap_err();
        assert!(matches!(error, AllocError::NoSpace { .. }), "{error}");
    }
    assert!(bench.table.alloc_run(u32::MAX).is_err());
    let stats = bench.table.stats();
    assert_eq!(stats.free, stats.refs - 8);
    assert_eq!(bench.table.alloc(0).unwrap().len(), 0);
    assert_eq!(bench.table.alloc_run(0).unwrap().count(), 0);
}

#[test]
fn a_failed_growth_changes_nothing_and_may_be_tried_again() {
    let bench = Bench::new(Version::V1);
    on(&bench.me.knobs.no_reach);
    let before = bench.table.stats();
    let error = bench.table.alloc(600).unwrap_err();
    assert_eq!(error, AllocError::Reach(ReachError::Call(Errno::Inval)));
    assert_eq!(bench.table.stats(), before);
    off(&bench.me.knobs.no_reach);
    assert_eq!(bench.table.alloc(600).unwrap().len(), 600);
}

#[test]
fn frames_are_placed_last_to_first_and_status_frames_with_them() {
    let me = Machine::new().domain_with(ME, 32);
    let table = GrantTable::start(Arc::clone(&me), config(Version::V2)).unwrap();
    let _refs = table.alloc(256 * 9).unwrap();
    let (shared, status) = (FrameKind::Shared, FrameKind::Status);
    let placed = std::mem::take(&mut *me.places.lock().unwrap());
    let mut expected = vec![(shared, 0), (status, 0)];
    expected.extend((1..10).rev().map(|index| (shared, index)));
    expected.push((status, 1));
    assert_eq!(placed, expected);
}

#[test]
fn runs_are_consecutive_and_grow_the_table_by_what_the_end_lacks() {
    let bench = Bench::new(Version::V1);
    let hole = bench.table.alloc(500).unwrap();
    drop(hole);
    let kept = bench.table.alloc_one().unwrap();
    let run = bench.table.alloc_run(1000).unwrap();
    let first = run.first().unwrap().0;
    let refs: Vec<_> = run.collect();
    assert!(
        refs.iter()
            .zip(first..)
            .all(|(gref, number)| gref.gref() == GrantRef(number))
    );
    assert_eq!(refs.len(), 1000);
    assert_eq!(bench.table.stats().frames, 2);
    drop(refs);
    drop(kept);
    assert_eq!(bench.table.stats().free, 1024 - 8);
}

#[test]
fn a_batch_claims_what_was_released_last_and_keeps_its_size() {
    let bench = Bench::new(Version::V1);
    let mut batch = bench.table.alloc(4).unwrap();
    let (one, two) = (batch.claim().unwrap(), batch.claim().unwrap());
    let last = two.gref();
    batch.release(one);
    batch.release(two);
    assert_eq!(batch.claim().unwrap().gref(), last);
    while batch.claim().is_some() {}
    assert!(batch.is_empty());
    // One more than it was made for goes back to the table.
    let mut small = bench.table.alloc(1).unwrap();
    let free = bench.table.stats().free;
    small.release(bench.table.alloc_one().unwrap());
    assert_eq!((small.len(), bench.table.stats().free), (1, free));
    drop(small);
    assert_eq!(bench.table.stats().free, free + 1);
}

/// TL-16: growth from several processors at once.
#[test]
fn l_16_concurrent_growth_hands_out_every_reference_once() {
    let bench = Bench::new(Version::V2);
    let taken: Vec<Vec<_>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| std::iter::from_fn(|| bench.table.alloc_one().ok()).collect::<Vec<_>>()))
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let refs: Vec<_> = taken.iter().flatten().map(|gref| gref.gref().0).collect();
    assert_eq!(refs.len(), 4 * 256 - 8);
    assert_eq!(refs.into_iter().collect::<BTreeSet<_>>(), (8..4 * 256).collect());
    assert_eq!(
        bench.me.places.lock().unwrap().len(),
        5,
        "each frame was placed once"
    );
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn who_waits_for_references_is_called_once_when_there_are_enough() {
    let bench = Bench::with(Config {
        max_frames: 1,
        max_waiters: 1,
        ..Config::default()
    });
    let mut refs = bench.table.alloc(504).unwrap();
    let mut held: Vec<_> = std::iter::from_fn(|| refs.claim()).collect();
    let counter = Arc::new(Counter::default());
    let waker = Waker::from(Arc::clone(&counter));
    let told = || counter.0.load(Ordering::SeqCst);

    bench.table.on_free(2, &waker).unwrap();
    bench.table.on_free(2, &waker).unwrap();
    let other = Waker::from(Arc::new(Counter::default()));
    assert!(bench.table.on_free(1, &other).is_err(), "the list is bounded");
    held.pop();
    assert_eq!(told(), 0);
    held.pop();
    assert_eq!(told(), 1);
    held.pop();
    assert_eq!(told(), 1, "once");

    bench.table.on_free(4, &waker).unwrap();
    assert!(bench.table.cancel_on_free(&waker));
    assert!(!bench.table.cancel_on_free(&waker));
    held.clear();
    assert_eq!(told(), 1);
    bench.table.on_free(1, &waker).unwrap();
    assert_eq!(told(), 2, "at once, if there are enough");
}

#[test]
fn after_a_resume_old_grants_end_and_new_ones_are_seen() {
    for version in BOTH {
        let bench = Bench::new(version);
        let table = &bench.table;
        let grant = |table: &GrantTable<_>| {
            let gref = table.alloc_one().unwrap();
            table
                .grant(gref, PEER, bench.me.page(), Access::ReadWrite)
                .unwrap()
        };
        let _more = table.alloc(600).unwrap();
        let old = grant(table);
        bench.me.table.begin(PEER, old.gref(), true, false).unwrap();
        let pending = grant(table);
        bench.me.table.begin(PEER, pending.gref(), true, false).unwrap();
        let pending = pending.end().unwrap_err();

        bench.me.table.forget();
        bench.me.places.lock().unwrap().clear();
        table.resume().unwrap();
        assert_eq!(table.version(), version, "asked for again");
        assert_eq!(bench.me.table.frames.load(Ordering::SeqCst), table.stats().frames);
        old.end().unwrap();
        pending.retry().unwrap();
        let new = grant(table);
        assert!(bench.me.table.begin(PEER, new.gref(), false, false).is_ok());
    }
}

#[test]
fn a_resume_may_drop_to_version_1_and_to_fewer_frames() {
    let bench = Bench::new(Version::V2);
    let refs = bench.table.alloc(700).unwrap();
    assert_eq!(bench.table.stats().frames, 3);
    bench.me.table.forget();
    on(&bench.me.knobs.no_v2);
    bench.me.table.max_frames.store(2, Ordering::SeqCst);
    bench.table.resume().unwrap();
    let stats = bench.table.stats();
    assert_eq!(
        (stats.version, stats.frames, stats.max_frames),
        (Version::V1, 2, 2)
    );
    // 768 references exist; the second frame has room for 1024.
    drop(refs);
    assert_eq!(stats.refs, 768);
    assert!(bench.table.alloc(1024 - 8).is_err(), "no more frames");
    assert_eq!(bench.table.alloc(768 - 8).unwrap().len(), 760);
}

#[test]
fn gst_3_a_failed_resume_keeps_everything_pending() {
    let bench = Bench::new(Version::V1);
    let one = || bench.table.alloc_one().unwrap();
    let grant = bench
        .table
        .grant(one(), PEER, bench.me.page(), Access::ReadOnly)
        .unwrap();
    let frame = grant.page().frame;
    bench.me.table.forget();
    on(&bench.me.knobs.no_reach);
    bench.table.resume().unwrap_err();
    let error = bench
        .table
        .grant(one(), PEER, bench.me.page(), Access::ReadOnly)
        .unwrap_err();
    assert!(error.to_string().contains("out of reach"), "{error}");
    let pending = grant.end().unwrap_err();
    assert!(!bench.me.table.ram.is_free(frame));
    off(&bench.me.knobs.no_reach);
    bench.table.resume().unwrap();
    pending.retry().unwrap();
}

#[test]
fn a_resume_onto_a_host_with_too_few_frames_says_so() {
    let bench = Bench::new(Version::V1);
    let _refs = bench.table.alloc(1000).unwrap();
    bench.me.table.forget();
    bench.me.table.max_frames.store(1, Ordering::SeqCst);
    assert_eq!(
        bench.table.resume().unwrap_err(),
        StartError::Shrunk { needed: 2, max: 1 }
    );
}

#[test]
fn the_table_takes_as_many_bytes_as_the_header_says() {
    assert_eq!(Version::V1.entries_per_frame() as usize * 8, PAGE_SIZE);
    assert_eq!(Version::V2.entries_per_frame() as usize * 16, PAGE_SIZE);
}

#[test]
fn a_consumer_never_has_more_than_its_quota_whatever_becomes_of_its_references() {
    let bench = Bench::new(Version::V1);
    let (net, disk) = (
        bench.table.consumer("vif0", 8).unwrap(),
        bench.table.consumer("vbd0", 4000).unwrap(),
    );
    let used = |at: usize| bench.table.consumers()[at].used;
    let one = net.alloc_one().unwrap();
    let gref = one.gref();
    let batch = net.clone().alloc(3).unwrap();
    let run = net.alloc_run(4).unwrap();
    assert_eq!(
        net.alloc(1).unwrap_err(),
        AllocError::Quota {
            wanted: 1,
            used: 8,
            quota: 8
        }
    );
    assert!(net.alloc_run(1).is_err());
    assert_eq!(used(1), 8);
    // The others do not notice, and the table grows for them.
    let much = disk.alloc(2000).unwrap();
    assert_eq!((used(0), used(2)), (0, 2000));
    drop((run, much));
    assert_eq!((used(1), used(2)), (4, 0));
    // What a peer keeps stays charged until the peer lets go.
    let grant = bench
        .table
        .grant(one, PEER, bench.me.page(), Access::ReadWrite)
        .unwrap();
    let peer = bench.me.table.begin(PEER, gref, true, true).unwrap();
    drop(grant);
    drop(batch);
    assert_eq!((used(1), bench.table.stats().pending), (1, 1));
    let _ = peer;
    bench.me.table.end(gref, true);
    bench.table.retry_pending(8);
    assert_eq!((used(1), bench.table.stats().pending), (0, 0));
    assert_eq!(bench.table.consumers()[1].refused, 2);
    // By the same name it goes on with what it has.
    let same = bench.table.consumer("vif0", 1).unwrap();
    let _one = net.alloc_one().unwrap();
    assert!(same.alloc_one().is_err());
    assert_eq!(bench.table.consumers().len(), 3);
}

#[test]
fn a_consumer_at_its_quota_waits_for_its_own_references() {
    let bench = Bench::new(Version::V1);
    let net = bench.table.consumer("vif0", 2).unwrap();
    let woken = Arc::new(Counter::default());
    let waker = Waker::from(Arc::clone(&woken));
    let woken = || woken.0.load(Ordering::SeqCst);
    let held = net.alloc(2).unwrap();
    net.on_free(1, &waker).unwrap();
    assert_eq!(woken(), 0, "others' references are not for it");
    drop(bench.table.alloc(4).unwrap());
    assert_eq!(woken(), 0);
    drop(held);
    assert_eq!(woken(), 1);
    let _held = net.alloc(2).unwrap();
    net.on_free(1, &waker).unwrap();
    bench.table.consumer("vif0", 3).unwrap();
    assert_eq!(woken(), 2, "a larger quota is room too");
}
