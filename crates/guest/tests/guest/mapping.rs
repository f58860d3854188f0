//! Mapping others' pages while the granter and the hypervisor do what they like (GST-5, GST-8).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gnttab_abi::{Copy, CopyFlags, CopyPtr, DomId, Errno, GrantRef, GrantStatus};
use gnttab_guest::{
    Access, Grant, MapError, MapRequest, Mapper, Mapping, UnmapFailure, Version, Window, WindowError, retry,
};

use crate::fake::{Domain, on};
use crate::{Bench, ME, PEER};

const WINDOW: u64 = 0x1_0000_0000;

/// The other bench: domain 1 has granted pages, domain 2 maps them.
struct Pair {
    bench: Bench,
    grants: Vec<Grant<Domain>>,
    mapper: Mapper<Domain>,
}

impl Pair {
    fn new(pages: usize, window: u32) -> Pair {
        let bench = Bench::new(Version::V1);
        let mut refs = bench.table.alloc(pages as u32).unwrap();
        let grants = (0..pages)
            .map(|_| {
                let page = bench.me.page();
                bench
                    .table
                    .grant(refs.claim().unwrap(), PEER, page, Access::ReadWrite)
                    .unwrap()
            })
            .collect();
        let mapper = Mapper::new(Arc::clone(&bench.peer), Window::new(WINDOW, window).unwrap()).unwrap();
        Pair {
            bench,
            grants,
            mapper,
        }
    }

    fn refs(&self) -> Vec<GrantRef> {
        self.grants.iter().map(Grant::gref).collect()
    }

    fn requests(&self) -> Vec<MapRequest> {
        let access = Access::ReadWrite;
        self.refs()
            .into_iter()
            .map(|gref| MapRequest {
                dom: ME,
                gref,
                access,
            })
            .collect()
    }

    fn script(&self, gref: GrantRef, statuses: impl IntoIterator<Item = GrantStatus>) {
        let statuses: VecDeque<_> = statuses.into_iter().collect();
        self.bench
            .peer
            .knobs
            .script
            .lock()
            .unwrap()
            .insert(gref, statuses);
    }

    fn live(&self) -> usize {
        self.bench.peer.live()
    }

    /// Nothing is mapped, nothing is lost: what a test ends with.
    fn assert_clean(&self) {
        let window = self.mapper.window();
        assert_eq!((self.live(), window.free, window.leaked), (0, window.pages, 0));
    }
}

#[test]
fn a_guard_maps_and_unmaps() {
    let pair = Pair::new(1, 4);
    let mapping = pair.mapper.map_one(pair.requests()[0]).unwrap();
    assert_eq!((mapping.granter(), mapping.gref()), (ME, pair.refs()[0]));
    assert_eq!((mapping.host_addr(), mapping.dev_bus_addr()), (WINDOW, None));
    assert_eq!(pair.live(), 1);
    drop(mapping);
    pair.assert_clean();
    pair.mapper.map_one(pair.requests()[0]).unwrap().unmap().unwrap();
    pair.assert_clean();
}

#[test]
fn read_only_is_asked_for_and_more_than_granted_fails() {
    let pair = Pair::new(1, 4);
    pair.grants[0].make_readonly().unwrap();
    let request = pair.requests()[0];
    let error = pair.mapper.map_one(request).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Status {
                status: GrantStatus::GENERAL_ERROR,
                ..
            }
        ),
        "{error}"
    );
    let request = MapRequest {
        access: Access::ReadOnly,
        ..request
    };
    assert!(pair.mapper.map_one(request).is_ok());
}

/// T-361: every subset of a batch of eight fails, at the hypervisor or in this domain's own
/// tables; exactly the others are mapped, and dropping them unmaps exactly those.
#[test]
fn gst_5_t_361_every_subset_of_failures() {
    let pair = Pair::new(8, 8);
    let (refs, requests) = (pair.refs(), pair.requests());
    for own_tables in [false, true] {
        for set in 0u32..256 {
            let fails = |index: usize| set & (1 << index) != 0;
            let failing = || (0..8).filter(|&index| fails(index)).map(|index| refs[index]);
            if own_tables {
                *pair.bench.peer.knobs.not_entered.lock().unwrap() = failing().collect();
            } else {
                failing().for_each(|gref| pair.script(gref, [GrantStatus::BAD_PAGE]));
            }
            let results = pair.mapper.map(&requests).unwrap();
            for (index, result) in results.iter().enumerate() {
                assert_eq!(result.is_err(), fails(index));
                match result {
                    Err(MapError::NotEntered {
                        gref,
                        errno: Errno::NoMem,
                        ..
                    }) if own_tables => {
                        assert_eq!(*gref, refs[index]);
                    }
                    Err(MapError::Status {
                        gref,
                        status: GrantStatus::BAD_PAGE,
                        ..
                    }) if !own_tables => {
                        assert_eq!(*gref, refs[index]);
                    }
                    Err(other) => panic!("{other}"),
                    Ok(mapping) => assert_eq!(mapping.gref(), refs[index]),
                }
            }
            let mapped: Vec<_> = (0..8)
                .filter(|&index| !fails(index))
                .map(|index| refs[index])
                .collect();
            assert_eq!(pair.bench.peer.live_refs(), mapped);
            drop(results);
            pair.assert_clean();

            // A run is all or nothing.
            if !own_tables {
                failing().for_each(|gref| pair.script(gref, [GrantStatus::BAD_PAGE]));
            }
            let run = pair.mapper.map_run(ME, &refs, Access::ReadWrite);
            assert_eq!(run.is_ok(), set == 0);
            assert_eq!(pair.live(), if set == 0 { 8 } else { 0 });
            drop(run);
            pair.assert_clean();
        }
    }
}

/// T-362: each failure that the interface knows, and one that it does not, is an error.
#[test]
fn gst_5_t_362_every_status_is_an_error() {
    let pair = Pair::new(2, 2);
    let unknown = [GrantStatus(-100), GrantStatus(7)];
    for &status in GrantStatus::ALL.iter().chain(&unknown) {
        if status.is_okay() || status == GrantStatus::EAGAIN {
            continue;
        }
        pair.script(pair.refs()[1], [status]);
        let results = pair.mapper.map(&pair.requests()).unwrap();
        assert!(results[0].is_ok());
        let error = results[1].as_ref().unwrap_err();
        assert_eq!(
            *error,
            MapError::Status {
                dom: ME,
                gref: pair.refs()[1],
                status
            }
        );
        drop(results);
        pair.assert_clean();
    }
}

#[test]
fn what_was_put_off_is_asked_for_again_alone() {
    let pair = Pair::new(3, 3);
    let refs = pair.refs();
    pair.script(refs[0], [GrantStatus::EAGAIN; 3]);
    pair.script(refs[2], [GrantStatus::EAGAIN, GrantStatus::BAD_PAGE]);
    let results = pair.mapper.map(&pair.requests()).unwrap();
    assert!(results[0].is_ok() && results[1].is_ok());
    assert!(matches!(
        results[2],
        Err(MapError::Status {
            status: GrantStatus::BAD_PAGE,
            ..
        })
    ));
    assert_eq!(*pair.bench.peer.slept.lock().unwrap(), [1, 2, 3, 1]);
}

#[test]
fn what_is_put_off_for_too_long_is_a_bad_page() {
    let pair = Pair::new(1, 1);
    pair.script(pair.refs()[0], [GrantStatus::EAGAIN; 1000]);
    let error = pair.mapper.map_one(pair.requests()[0]).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Status {
                status: GrantStatus::BAD_PAGE,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(
        *pair.bench.peer.slept.lock().unwrap(),
        (1..=255).collect::<Vec<_>>()
    );
    pair.assert_clean();
}

#[test]
fn copies_are_retried_and_each_is_looked_at() {
    let pair = Pair::new(2, 1);
    let item = |gref| Copy {
        source: CopyPtr::grant(ME, gref, 0),
        dest: CopyPtr::frame(1, 0),
        len: 64,
        flags: CopyFlags::SOURCE_GREF,
        ..Copy::default()
    };
    let mut items = [item(pair.refs()[0]), item(GrantRef(0x7fff)), item(pair.refs()[1])];
    pair.script(pair.refs()[1], [GrantStatus::EAGAIN]);
    retry::copy(&*pair.bench.peer, &mut items).unwrap();
    let failed = retry::check(&items).unwrap_err();
    assert_eq!((failed.first, failed.failed, failed.items), (1, 1, 3));
    assert_eq!(failed.status, GrantStatus::BAD_GNTREF);
    assert!(items[2].status.is_okay());
    assert_eq!(retry::check(&items[..1]), Ok(()));
}

/// T-300: the window bounds what others can make this domain map, and what was refused leaves
/// nothing behind.
#[test]
fn gst_8_t_300_a_full_window_refuses_before_it_maps() {
    let pair = Pair::new(3, 2);
    let requests = pair.requests();
    let error = pair.mapper.map(&requests).unwrap_err();
    assert_eq!(error, MapError::WindowFull { wanted: 3, free: 2 });
    assert_eq!(pair.live(), 0);
    let kept = pair.mapper.map_one(requests[0]).unwrap();
    assert!(
        pair.mapper
            .map_run(ME, &pair.refs()[..2], Access::ReadOnly)
            .is_err()
    );
    drop(kept);
    assert!(
        pair.mapper
            .map_run(ME, &pair.refs()[..2], Access::ReadOnly)
            .is_ok()
    );
    pair.assert_clean();
}

/// T-369: addresses that this domain's own map does not cover are refused before any hypercall.
#[test]
fn gst_8_t_369_a_window_outside_the_own_map_is_refused() {
    let bench = Bench::new(Version::V1);
    on(&bench.peer.knobs.not_admitted);
    let window = Window::new(WINDOW, 4).unwrap();
    let error = Mapper::new(Arc::clone(&bench.peer), window).unwrap_err();
    assert_eq!(error, WindowError::NotAdmitted(WINDOW..WINDOW + 0x4000));
    assert_eq!(
        Window::new(!0xfff, 2),
        Err(WindowError::TooLong {
            start: !0xfff,
            pages: 2
        })
    );
}

#[test]
fn a_run_has_consecutive_addresses() {
    let pair = Pair::new(5, 8);
    let first = pair.mapper.map_one(pair.requests()[0]).unwrap();
    let run = pair.mapper.map_run(ME, &pair.refs(), Access::ReadWrite).unwrap();
    let start = run.host_addr().unwrap();
    let addresses: Vec<_> = run.pages().iter().map(Mapping::host_addr).collect();
    assert_eq!(
        addresses,
        (0..5).map(|page| start + page * 4096).collect::<Vec<_>>()
    );
    drop(first);
    run.unmap().unwrap();
    pair.assert_clean();
    assert_eq!(
        pair.mapper
            .map_run(ME, &[], Access::ReadWrite)
            .unwrap()
            .host_addr(),
        None
    );
}

#[test]
fn many_are_unmapped_in_batches() {
    let pair = Pair::new(100, 128);
    let results = pair.mapper.map(&pair.requests()).unwrap();
    let mappings: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    assert_eq!(pair.live(), 100);
    pair.mapper.unmap(mappings).unwrap();
    pair.assert_clean();
}

#[test]
fn an_address_whose_unmap_failed_is_never_used_again() {
    let pair = Pair::new(2, 2);
    let mut mappings: Vec<_> = pair
        .mapper
        .map(&pair.requests())
        .unwrap()
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let last = mappings.pop().unwrap();
    on(&pair.bench.peer.knobs.unmap_fails);
    let error = last.unmap().unwrap_err();
    assert_eq!(
        (error.failed, error.total, error.host_addr),
        (1, 1, WINDOW + 4096)
    );
    assert_eq!(error.reason, UnmapFailure::Status(GrantStatus::GENERAL_ERROR));
    drop(mappings);
    let window = pair.mapper.window();
    assert_eq!((window.free, window.leaked, pair.live()), (0, 2, 2));
    assert!(matches!(
        pair.mapper.map_one(pair.requests()[0]),
        Err(MapError::WindowFull { .. })
    ));
}

#[test]
fn what_this_domain_cannot_take_out_of_its_tables_is_not_unmapped() {
    let pair = Pair::new(1, 1);
    let mapping = pair.mapper.map_one(pair.requests()[0]).unwrap();
    on(&pair.bench.peer.knobs.before_unmap_fails);
    let error = mapping.unmap().unwrap_err();
    assert_eq!(error.reason, UnmapFailure::NotLeft(Errno::Fault));
    assert_eq!((pair.live(), pair.mapper.window().leaked), (1, 1));
}

/// After a fault a mapping may exist of which no item tells: its address is lost, and what did
/// succeed is there to be unmapped.
#[test]
fn gst_5_a_hypercall_that_ends_early_leaves_nothing_unaccounted() {
    let pair = Pair::new(4, 4);
    *pair.bench.peer.knobs.map_ends.lock().unwrap() = Some((2, Errno::Fault));
    let results = pair.mapper.map(&pair.requests()).unwrap();
    assert!(results[0].is_ok() && results[1].is_ok());
    for result in &results[2..] {
        assert!(
            matches!(
                result,
                Err(MapError::Call {
                    errno: Errno::Fault,
                    ..
                })
            ),
            "{result:?}"
        );
    }
    drop(results);
    let window = pair.mapper.window();
    assert_eq!((pair.live(), window.free, window.leaked), (0, 2, 2));

    // What the door refuses was never begun.
    let pair = Pair::new(1, 1);
    *pair.bench.peer.knobs.map_ends.lock().unwrap() = Some((0, Errno::NoSys));
    assert!(matches!(
        pair.mapper.map_one(pair.requests()[0]),
        Err(MapError::Call { .. })
    ));
    pair.assert_clean();
}

/// TL-05: a page that is still in use is unmapped later, and then once.
#[test]
fn l_05_a_page_in_use_is_unmapped_by_its_last_user() {
    let pair = Pair::new(1, 1);
    let mapping = Arc::new(pair.mapper.map_one(pair.requests()[0]).unwrap());
    let in_flight = Arc::clone(&mapping);
    drop(mapping);
    assert_eq!(pair.live(), 1);
    drop(in_flight);
    pair.assert_clean();
}

/// T-406, in small: the books agree after concurrent use. They live inside the lock.
#[test]
fn gst_8_t_406_concurrent_mapping_keeps_the_books_right() {
    let pair = Pair::new(4, 16);
    std::thread::scope(|scope| {
        for gref in pair.refs() {
            let mapper = &pair.mapper;
            scope.spawn(move || {
                for round in 0..500 {
                    let access = if round % 2 == 0 {
                        Access::ReadOnly
                    } else {
                        Access::ReadWrite
                    };
                    let mapping = mapper
                        .map_one(MapRequest {
                            dom: ME,
                            gref,
                            access,
                        })
                        .unwrap();
                    if round % 3 == 0 {
                        mapping.unmap().unwrap();
                    }
                }
            });
        }
    });
    pair.assert_clean();
    assert!(pair.bench.peer.knobs.script.lock().unwrap().is_empty());
}

#[test]
fn a_domain_that_is_not_there_is_an_error() {
    let pair = Pair::new(1, 1);
    let request = MapRequest {
        dom: DomId(77),
        ..pair.requests()[0]
    };
    let error = pair.mapper.map_one(request).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Status {
                status: GrantStatus::BAD_DOMAIN,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        format!("cannot map reference {} of d77: bad_domain (-2)", request.gref)
    );
}

#[test]
fn the_granter_ends_when_the_grantee_has_unmapped() {
    let mut pair = Pair::new(1, 1);
    let mapping = pair.mapper.map_one(pair.requests()[0]).unwrap();
    let pending = pair.grants.remove(0).end().unwrap_err();
    mapping.unmap().unwrap();
    pending.retry().unwrap();
    assert_eq!(pair.bench.me.knobs.pages_back.load(Ordering::SeqCst), 1);
}
