//! Ending access while the peer does what it likes (GST-1, GST-2, GST-3; XSA-396).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use gnttab_abi::GrantRef;
use gnttab_guest::{Access, Config, Grant, Version};

use crate::fake::{Domain, OwnPage, off, on};
use crate::{BOTH, Bench, PEER};

impl Bench {
    fn grant(&self) -> Grant<Domain> {
        self.grant_page(self.me.page())
    }

    fn grant_page(&self, page: OwnPage) -> Grant<Domain> {
        let gref = self.table.alloc_one().unwrap();
        self.table.grant(gref, PEER, page, Access::ReadWrite).unwrap()
    }

    /// The peer starts to use it.
    fn hold(&self, gref: GrantRef) {
        self.me.table.begin(PEER, gref, true, false).unwrap();
    }

    /// The peer lets go.
    fn let_go(&self, gref: GrantRef) {
        self.me.table.end(gref, true);
    }

    fn is_free(&self, frame: u64) -> bool {
        self.me.table.ram.is_free(frame)
    }
}

/// A waker that counts.
#[derive(Default)]
struct Counter(AtomicUsize);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll<F: Future + Unpin>(future: &mut F, counter: &Arc<Counter>) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(&Waker::from(Arc::clone(counter))))
}

#[test]
fn gst_1_ending_gives_reference_and_page_and_shuts_the_peer_out() {
    for version in BOTH {
        let bench = Bench::new(version);
        let grant = bench.grant();
        let (number, frame) = (grant.gref(), grant.page().frame);
        let (gref, page) = grant.end().unwrap();
        assert_eq!((gref.gref(), page.frame), (number, frame));
        assert!(
            bench.me.table.begin(PEER, number, false, false).is_err(),
            "{version:?}"
        );
        assert_eq!(bench.me.knobs.pages_back.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn gst_2_what_the_peer_uses_comes_back_when_it_lets_go() {
    for version in BOTH {
        let bench = Bench::new(version);
        let grant = bench.grant();
        let (gref, frame) = (grant.gref(), grant.page().frame);
        assert!(!grant.is_used());
        bench.hold(gref);
        let before = bench.me.table.words(gref).load();

        assert!(grant.is_used());
        assert_eq!(
            bench.me.table.words(gref).load(),
            before,
            "a look changes nothing"
        );
        let grant = grant.try_end().unwrap_err();
        let after = bench.me.table.words(gref).load();
        match version {
            Version::V1 => assert_eq!(after, before, "a busy entry is not touched"),
            Version::V2 => assert!(after.flags.is_empty(), "no new use"),
        }

        let pending = grant.end().unwrap_err();
        assert_eq!(bench.table.pending().len(), 1);
        assert_eq!(
            (bench.table.pending()[0].gref, bench.table.pending()[0].peer),
            (gref, PEER)
        );
        assert!(!bench.is_free(frame));
        assert_ne!(bench.table.alloc_one().unwrap().gref(), gref);

        let pending = pending.retry().unwrap_err();
        assert_eq!(bench.table.retry_pending(8).still, 1);
        bench.let_go(gref);
        let (owned, page) = pending.retry().unwrap();
        assert_eq!((owned.gref(), page.frame), (gref, frame));
        assert_eq!(bench.table.stats().pending, 0);
    }
}

#[test]
fn t_396b_what_is_dropped_in_use_is_freed_once_when_the_peer_lets_go() {
    for version in BOTH {
        let bench = Bench::new(version);
        let grant = bench.grant();
        let (gref, frame) = (grant.gref(), grant.page().frame);
        bench.hold(gref);
        drop(grant);
        for _ in 0..3 {
            assert_eq!(bench.table.retry_pending(usize::MAX).still, 1);
        }
        assert_eq!(bench.table.pending()[0].tries, 4);
        assert!(!bench.is_free(frame));
        bench.let_go(gref);
        let retried = bench.table.retry_pending(usize::MAX);
        assert_eq!((retried.ended, retried.still), (1, 0));
        assert!(bench.is_free(frame));
        assert_eq!(bench.table.alloc_one().unwrap().gref(), gref);
        assert_eq!(
            bench.table.retry_pending(usize::MAX),
            gnttab_guest::Retried::default()
        );
    }
}

#[test]
fn t_396b_a_full_queue_leaks_and_counts_and_never_frees() {
    let bench = Bench::with(Config {
        max_pending: 1,
        ..Config::default()
    });
    let grants = [bench.grant(), bench.grant(), bench.grant()];
    let refs: Vec<_> = grants.iter().map(Grant::gref).collect();
    let frames: Vec<_> = grants.iter().map(|grant| grant.page().frame).collect();
    refs.iter().for_each(|&gref| bench.hold(gref));
    let [first, second, third] = grants;
    drop(first);
    assert_eq!(bench.table.stats().leaked, 0);
    drop(second);
    assert_eq!((bench.table.stats().pending, bench.table.stats().leaked), (1, 1));
    // Whoever asks for the page keeps it, queue or not.
    let pending = third.end().unwrap_err();
    assert_eq!(bench.table.stats().leaked, 1);

    refs.iter().for_each(|&gref| bench.let_go(gref));
    let (owned, page) = pending.retry().unwrap();
    assert_eq!((owned.gref(), page.frame), (refs[2], frames[2]));
    assert_eq!(bench.table.retry_pending(8).ended, 1);
    assert!(bench.is_free(frames[0]));
    assert!(!bench.is_free(frames[1]), "leaked for good");
}

#[test]
fn a_ticket_that_found_the_queue_full_moves_up_when_there_is_room() {
    let bench = Bench::with(Config {
        max_pending: 1,
        ..Config::default()
    });
    let (one, two) = (bench.grant(), bench.grant());
    let (first, second) = (one.gref(), two.gref());
    bench.hold(first);
    bench.hold(second);
    drop(one);
    let pending = two.end().unwrap_err();
    bench.let_go(first);
    assert_eq!(bench.table.retry_pending(8).ended, 1);
    let pending = pending.retry().unwrap_err();
    assert_eq!(bench.table.pending()[0].gref, second);
    drop(pending);
    bench.let_go(second);
    assert_eq!(bench.table.retry_pending(8).ended, 1);
    assert_eq!(bench.table.stats().leaked, 0);
}

#[test]
fn whoever_waits_is_told_when_the_peer_lets_go() {
    let bench = Bench::new(Version::V1);
    let grant = bench.grant();
    let gref = grant.gref();
    bench.hold(gref);
    let mut pending = grant.end().unwrap_err();
    let counter = Arc::new(Counter::default());
    assert!(poll(&mut pending, &counter).is_pending());
    bench.table.retry_pending(8);
    assert_eq!(counter.0.load(Ordering::SeqCst), 0);
    bench.let_go(gref);
    assert_eq!(bench.table.retry_pending(8).ended, 1);
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
    let Poll::Ready((owned, _page)) = poll(&mut pending, &counter) else {
        panic!("told, and not so")
    };
    assert_eq!(owned.gref(), gref);
    assert!(
        poll(&mut pending, &counter).is_pending(),
        "once it is done it stays pending"
    );
    assert_eq!(bench.table.stats().pending, 0);
}

#[test]
fn a_ticket_dropped_after_its_end_frees_both() {
    let bench = Bench::new(Version::V1);
    let grant = bench.grant();
    let (gref, frame) = (grant.gref(), grant.page().frame);
    bench.hold(gref);
    let pending = grant.end().unwrap_err();
    bench.let_go(gref);
    assert_eq!(bench.table.retry_pending(8).ended, 1);
    assert!(!bench.is_free(frame), "the ticket may still ask");
    drop(pending);
    assert!(bench.is_free(frame));
    assert_eq!(bench.table.alloc_one().unwrap().gref(), gref);
}

#[test]
fn waiting_pauses_longer_each_time_and_gives_up() {
    let bench = Bench::new(Version::V1);
    let grant = bench.grant();
    let gref = grant.gref();
    bench.hold(gref);
    let pending = grant.end().unwrap_err().wait(200).unwrap_err();
    assert_eq!(*bench.me.slept.lock().unwrap(), [1, 2, 4, 8, 16, 32, 64, 64, 9]);
    bench.let_go(gref);
    assert!(pending.wait(0).is_ok());
}

#[test]
fn a_budget_is_kept_and_everybody_gets_a_turn() {
    let bench = Bench::new(Version::V1);
    let grants: Vec<_> = (0..10).map(|_| bench.grant()).collect();
    let refs: Vec<_> = grants.iter().map(Grant::gref).collect();
    refs.iter().for_each(|&gref| bench.hold(gref));
    drop(grants);
    assert_eq!(bench.table.retry_pending(0).still, 0);
    assert_eq!(bench.table.retry_pending(4).still, 4);
    assert_eq!(bench.table.retry_pending(6).still, 6);
    assert!(
        bench.table.pending().iter().all(|view| view.tries == 2),
        "each had one retry"
    );
}

#[test]
fn a_page_comes_back_only_when_its_owner_can_take_it() {
    for version in BOTH {
        let bench = Bench::new(version);
        let grant = bench.grant();
        let (gref, frame) = (grant.gref(), grant.page().frame);
        on(&bench.me.knobs.page_back_busy);
        let pending = grant.end().unwrap_err();
        assert!(
            bench.me.table.begin(PEER, gref, false, false).is_err(),
            "the entry has ended"
        );
        assert!(!bench.is_free(frame));
        let pending = pending.retry().unwrap_err();
        off(&bench.me.knobs.page_back_busy);
        pending.retry().unwrap();
        assert_eq!(bench.me.knobs.pages_back.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn gst_3_a_table_that_goes_frees_no_page_in_use() {
    let bench = Bench::new(Version::V1);
    let grant = bench.grant();
    let (gref, frame) = (grant.gref(), grant.page().frame);
    bench.hold(gref);
    drop(grant);
    let Bench { me, table, .. } = bench;
    drop(table);
    assert!(!me.table.ram.is_free(frame));
}

/// The peer claims in the middle of the granter's end, and the granter ends in the middle of
/// the peer's claim: one of them sees the other (spec 8.2).
#[test]
fn t_396d_version_2_end_in_the_middle_of_a_claim() {
    let bench = Bench::new(Version::V2);
    let grant = bench.grant();
    let (gref, frame) = (grant.gref(), grant.page().frame);
    let outcome = Arc::new(std::sync::Mutex::new(None));
    let kept = Arc::clone(&outcome);
    *bench.me.table.between.lock().unwrap() = Some(Box::new(move || {
        *kept.lock().unwrap() = Some(grant.end());
    }));
    // Marked, then the granter ends, then the second look.
    assert!(
        bench.me.table.begin(PEER, gref, true, false).is_err(),
        "the claim sees the end"
    );
    let outcome = outcome.lock().unwrap().take().unwrap();
    let pending = outcome.unwrap_err();
    assert!(!bench.is_free(frame), "the end saw the mark");
    let (_, page) = pending.retry().unwrap();
    assert_eq!(page.frame, frame);
}

/// T-396a: the peer maps and unmaps as fast as it can while the guest ends, puts a secret in
/// the page, and grants it anew under the same reference. The peer never sees the secret.
#[test]
fn t_396a_a_racing_peer_never_sees_what_is_written_after_the_end() {
    const SECRET: u64 = 0x5ec7e7;
    for version in BOTH {
        let bench = Bench::new(version);
        let (stop, uses) = (AtomicBool::new(false), AtomicUsize::new(0));
        let mut given = Some((bench.table.alloc_one().unwrap(), bench.me.page()));
        let number = given.as_ref().unwrap().0.gref();
        std::thread::scope(|scope| {
            let table = &bench.me.table;
            let peer = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(frame) = table.begin(PEER, number, true, false) {
                        assert_ne!(table.ram.content(frame), SECRET);
                        // Where both share a processor, the other one runs here or below.
                        let meet = uses.fetch_add(1, Ordering::Relaxed) % 4 == 0;
                        if meet {
                            std::thread::yield_now();
                        }
                        assert_ne!(table.ram.content(frame), SECRET);
                        table.end(number, true);
                        if !meet {
                            std::thread::yield_now();
                        }
                    }
                }
            });
            let (mut rounds, mut waited) = (0, 0);
            // Until they have met often enough; on a busy machine that may take too long.
            let deadline = Instant::now() + Duration::from_secs(3);
            while !peer.is_finished()
                && Instant::now() < deadline
                && (rounds < 300 || waited == 0 || uses.load(Ordering::Relaxed) < 20)
            {
                rounds += 1;
                let (gref, page) = given.take().unwrap();
                let mut grant = bench
                    .table
                    .grant_zeroed(gref, PEER, page, Access::ReadWrite)
                    .unwrap();
                std::thread::yield_now();
                let ended = loop {
                    match grant.try_end() {
                        Ok(ended) => break ended,
                        // A version 2 entry is closed now; version 1 must be outrun.
                        Err(busy) => grant = busy,
                    }
                    waited += 1;
                    std::thread::yield_now();
                };
                table.ram.write(ended.1.frame, SECRET);
                given = Some(ended);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn tickets_and_the_queue_can_be_used_from_several_threads() {
    let bench = Bench::new(Version::V2);
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                bench.table.retry_pending(3);
                std::thread::yield_now();
            }
        });
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                let bench = &bench;
                scope.spawn(move || {
                    for round in 0..100 {
                        let grant = bench.grant();
                        let gref = grant.gref();
                        bench.hold(gref);
                        let pending = grant.end().unwrap_err();
                        bench.let_go(gref);
                        if (worker + round) % 3 == 0 {
                            drop(pending);
                        } else {
                            let mut pending = pending;
                            while let Err(busy) = pending.retry() {
                                pending = busy;
                            }
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        sweeper.join().unwrap();
    });
    bench.table.retry_pending(usize::MAX);
    let stats = bench.table.stats();
    assert_eq!((stats.pending, stats.leaked, stats.free), (0, 0, stats.refs - 8));
}
