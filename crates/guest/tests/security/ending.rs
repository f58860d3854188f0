//! Ending access (XSA-396, XSA-403, XSA-441).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Wake, Waker};
use std::time::Duration;

use gnttab_abi::GrantRef;
use gnttab_guest::{Access, Config, Grant, GrantTable, Version};

use crate::fake::{Domain, OLD_CONTENT};
use crate::{BOTH, Bench, PEER};

/// T-396a in one interleaving: the peer maps where elsewhere the question was answered and the page not yet freed. Whoever
/// maps before the one attempt is seen by it; whoever comes after it is refused; in between there is nothing.
#[test]
fn xsa_396_there_is_no_moment_between_the_question_and_the_end() {
    for version in BOTH {
        let bench = Bench::of(version);
        // Before: an attempt sees it, and page and reference stay as they are.
        let grant = bench.grant(bench.me.page());
        let (gref, frame) = (grant.gref(), grant.page().frame);
        let grant = if version == Version::V1 {
            bench.me.table.begin(PEER, gref, true, false).unwrap();
            let grant = grant.try_end().unwrap_err();
            assert!(!bench.me.table.ram.is_free(frame));
            bench.me.table.end(gref, true);
            grant
        } else {
            // In the middle: marked by the hypervisor, not looked at a second time.
            let seen = Arc::new(Mutex::new(None));
            let (kept, ending) = (Arc::clone(&seen), Mutex::new(Some(grant)));
            *bench.me.table.between.lock().unwrap() = Some(Box::new(move || {
                let grant = ending.lock().unwrap().take().unwrap();
                *kept.lock().unwrap() = Some(grant.try_end());
            }));
            assert!(bench.me.table.begin(PEER, gref, true, false).is_err());
            let outcome = seen.lock().unwrap().take().unwrap();
            outcome.expect_err("the attempt saw the mark, the peer saw the attempt: neither has the page")
        };
        // After: it never succeeds.
        let (owned, page) = grant.try_end().unwrap();
        for write in [false, true] {
            for copy in [false, true] {
                assert!(
                    bench.me.table.begin(PEER, gref, write, copy).is_err(),
                    "{version:?}"
                );
            }
        }
        drop((owned, page));
        assert!(bench.me.table.ram.is_free(frame));
    }
}

/// What comes of an end is looked at, in every way that there is to end: nothing is freed before the peer has let go, nothing
/// is handed out again, nothing panics, and afterwards everything comes back once.
#[test]
fn xsa_396_a_refused_end_frees_nothing_whichever_way_it_is_made() {
    type Way = fn(Grant<Domain>);
    let ways: [(&str, Way); 6] = [
        ("drop", |grant| drop(grant)),
        ("end, drop the ticket", |grant| drop(grant.end())),
        ("end, retry, drop", |grant| drop(grant.end().unwrap_err().retry())),
        ("end, wait, drop", |grant| drop(grant.end().unwrap_err().wait(3))),
        ("try_end, drop", |grant| drop(grant.try_end())),
        ("try_end, end, drop", |grant| {
            drop(grant.try_end().unwrap_err().end())
        }),
    ];
    for version in BOTH {
        for max_pending in [0, 1, 8] {
            for (name, way) in ways {
                let bench = Bench::new(Config {
                    version,
                    max_pending,
                    ..Config::default()
                });
                let grant = bench.grant(bench.me.page());
                let (gref, frame) = (grant.gref(), grant.page().frame);
                bench.me.table.begin(PEER, gref, true, false).unwrap();
                way(grant);
                bench.table.retry_pending(usize::MAX);
                assert!(!bench.me.table.ram.is_free(frame), "{name}, {version:?}");
                let taken: Vec<_> = std::iter::from_fn(|| bench.table.alloc_one().ok()).collect();
                assert!(
                    taken.iter().all(|other| other.gref() != gref),
                    "{name}, {version:?}"
                );
                drop(taken);

                bench.me.table.end(gref, true);
                bench.table.retry_pending(usize::MAX);
                let stats = bench.table.stats();
                let kept = (bench.me.table.ram.is_free(frame), stats.leaked, stats.pending);
                // Without room to remember it, it is given up for good and counted.
                let expected = if max_pending == 0 {
                    (false, 1, 0)
                } else {
                    (true, 0, 0)
                };
                assert_eq!(kept, expected, "{name}, {version:?}, room for {max_pending}");
            }
        }
    }
}

/// A page that was never cleared is granted as zeros; and the next one who has the frame does not find what was granted.
#[test]
fn xsa_403_a_granted_page_holds_what_was_written_to_it_and_nothing_else() {
    for version in BOTH {
        let bench = Bench::of(version);
        let page = bench.me.page();
        let frame = page.frame;
        assert_eq!(bench.me.table.ram.content(frame), OLD_CONTENT);
        let gref = bench.table.alloc_one().unwrap();
        let grant = bench
            .table
            .grant_zeroed(gref, PEER, page, Access::ReadOnly)
            .unwrap();
        let seen = bench.me.table.begin(PEER, grant.gref(), false, false).unwrap();
        assert_eq!(
            (seen, bench.me.table.ram.content(seen)),
            (frame, 0),
            "zeroed before it could be seen"
        );
    }
}

/// Calls back into the table from where it is woken.
struct Meddler {
    table: Mutex<Option<GrantTable<Domain>>>,
    called: AtomicUsize,
}

impl Wake for Meddler {
    fn wake(self: Arc<Self>) {
        self.called.fetch_add(1, Ordering::SeqCst);
        let table = self.table.lock().unwrap().take();
        if let Some(table) = table {
            // Each of these takes the lock.
            let refs = table.alloc(3).unwrap();
            table.retry_pending(1);
            assert!(table.stats().free > 0);
            assert!(table.pending().is_empty());
            drop(refs);
        }
    }
}

/// Nobody is called with a lock held: a waker that calls back into the table, from every place that wakes, returns.
#[test]
fn xsa_441_whoever_is_woken_may_call_back() {
    let (done, end) = mpsc::channel();
    std::thread::spawn(move || {
        let bench = Bench::new(Config {
            max_frames: 1,
            ..Config::default()
        });
        let meddler = |table: &GrantTable<Domain>| {
            Arc::new(Meddler {
                table: Mutex::new(Some(table.clone())),
                called: AtomicUsize::new(0),
            })
        };
        // Woken by references that come back.
        let refs = bench.table.alloc(bench.table.stats().free).unwrap();
        let one = meddler(&bench.table);
        bench.table.on_free(8, &Waker::from(Arc::clone(&one))).unwrap();
        drop(refs);
        // Woken at once.
        let two = meddler(&bench.table);
        bench.table.on_free(8, &Waker::from(Arc::clone(&two))).unwrap();
        // Woken by an end that succeeded.
        let grant = bench.grant(bench.me.page());
        let gref = grant.gref();
        bench.me.table.begin(PEER, gref, false, false).unwrap();
        let mut pending = grant.end().unwrap_err();
        let three = meddler(&bench.table);
        let waker = Waker::from(Arc::clone(&three));
        let mut context = std::task::Context::from_waker(&waker);
        assert!(std::pin::Pin::new(&mut pending).poll(&mut context).is_pending());
        bench.me.table.end(gref, false);
        bench.table.retry_pending(8);
        let calls = [one, two, three].map(|meddler| meddler.called.load(Ordering::SeqCst));
        let _ = done.send(calls);
    });
    assert_eq!(
        end.recv_timeout(Duration::from_secs(20)),
        Ok([1, 1, 1]),
        "a lock was held"
    );
}

/// L-17: what the peer wrote while it had the page is there when the page comes back.
#[test]
fn l_17_what_was_written_through_a_mapping_comes_back_with_the_page() {
    for version in BOTH {
        let bench = Bench::of(version);
        let grant = bench.grant(bench.me.page());
        let gref = grant.gref();
        let seen = bench.me.table.begin(PEER, gref, true, false).unwrap();
        bench.me.table.ram.write(seen, 0x77);
        let pending = grant.end().unwrap_err();
        bench.me.table.end(gref, true);
        let (_, page) = pending.retry().unwrap();
        assert_eq!(bench.me.table.ram.content(page.frame), 0x77);
        assert_ne!(gref, GrantRef::INVALID);
    }
}
