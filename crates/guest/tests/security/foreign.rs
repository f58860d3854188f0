//! Mapping others' pages (XSA-361, XSA-300, XSA-406; L-02 to L-08).

use std::collections::BTreeSet;
use std::sync::Arc;

use gnttab_abi::{Errno, GrantStatus};
use gnttab_guest::{Access, MapError, Mapper, Version, Window};

use crate::fake::{off, on};
use crate::{Bench, ME, request};

/// L-03: the k-th page of a run fails, for all k and in each half of the mapping: nothing stays, and the next run goes well.
#[test]
fn l_03_a_run_that_fails_half_way_leaves_nothing() {
    for own_tables in [false, true] {
        for fails in 0..6 {
            let bench = Bench::of(Version::V1);
            let (grants, mapper) = bench.pages(6, 6);
            let refs: Vec<_> = grants.iter().map(|grant| grant.gref()).collect();
            let knobs = &bench.peer.knobs;
            if own_tables {
                knobs.not_entered.lock().unwrap().push(refs[fails]);
            } else {
                let status = [GrantStatus::BAD_PAGE].into();
                knobs.script.lock().unwrap().insert(refs[fails], status);
            }
            let error = mapper.map_run(ME, &refs, Access::ReadWrite).unwrap_err();
            let named = match error {
                MapError::Status { gref, .. } | MapError::NotEntered { gref, .. } => gref,
                other => panic!("{other}"),
            };
            assert_eq!(named, refs[fails]);
            assert_eq!(
                (bench.peer.live(), mapper.window().free, mapper.window().leaked),
                (0, 6, 0)
            );
            knobs.not_entered.lock().unwrap().clear();
            let run = mapper.map_run(ME, &refs, Access::ReadWrite).unwrap();
            assert_eq!(bench.peer.live(), 6);
            drop(run);
            assert_eq!(bench.peer.live(), 0);
        }
    }
}

/// L-04: all patterns of holes in six pages, and every sub-range of each given up: what remains is exactly the rest.
#[test]
fn l_04_every_range_with_every_pattern_of_holes() {
    for holes in 0u32..64 {
        for first in 0..6 {
            for last in first..6 {
                let bench = Bench::of(Version::V1);
                let (grants, mapper) = bench.pages(6, 6);
                let requests: Vec<_> = grants.iter().map(|grant| request(grant.gref())).collect();
                for (index, request) in requests.iter().enumerate() {
                    if holes & (1 << index) != 0 {
                        let status = [GrantStatus::BAD_PAGE].into();
                        bench
                            .peer
                            .knobs
                            .script
                            .lock()
                            .unwrap()
                            .insert(request.gref, status);
                    }
                }
                let mut kept = mapper.map(&requests).unwrap();
                let going: Vec<_> = kept.drain(first..=last).flatten().collect();
                mapper.unmap(going).unwrap();
                let expected: Vec<_> = (0..6)
                    .filter(|index| holes & (1 << index) == 0 && !(first..=last).contains(index))
                    .map(|index| requests[index].gref)
                    .collect();
                assert_eq!(bench.peer.live_refs(), expected, "{holes:#b} {first}..={last}");
                drop(kept);
                assert_eq!((bench.peer.live(), mapper.window().free), (0, 6));
            }
        }
    }
}

/// L-05, L-06: a page that several hold is unmapped once, by the last of them, in whatever order they go; and mapped again in
/// the meantime it is another mapping.
#[test]
fn l_06_a_page_is_unmapped_once_by_its_last_user() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let bench = Bench::of(Version::V2);
        let (grants, mapper) = bench.pages(1, 2);
        let first = Arc::new(mapper.map_one(request(grants[0].gref())).unwrap());
        let mut users: Vec<_> = (0..3).map(|_| Some(Arc::clone(&first))).collect();
        let (handle, address) = (first.handle(), first.host_addr());
        drop(first);
        let again = mapper.map_one(request(grants[0].gref())).unwrap();
        assert_ne!((again.handle(), again.host_addr()), (handle, address));
        for (gone, user) in order.into_iter().enumerate() {
            assert_eq!(bench.peer.live(), 2, "after {gone}");
            users[user] = None;
        }
        assert_eq!(bench.peer.live(), 1, "the other mapping is not touched");
        again.unmap().unwrap();
        assert_eq!((bench.peer.live(), mapper.window().free), (0, 2));
    }
}

/// L-07: a mapping has two halves, the hypervisor's and this domain's own. Either fails on the way in or out: the other is
/// undone, or the address is never used again; and which it is, is told.
#[test]
fn l_07_either_half_fails_on_either_way() {
    // In, the own half: undone.
    let bench = Bench::of(Version::V1);
    let (grants, mapper) = bench.pages(2, 2);
    bench
        .peer
        .knobs
        .not_entered
        .lock()
        .unwrap()
        .push(grants[0].gref());
    let error = mapper.map_one(request(grants[0].gref())).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::NotEntered {
                errno: Errno::NoMem,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!((bench.peer.live(), mapper.window().free), (0, 2));
    // In, the own half, and then the undoing fails too: the address is lost, and counted.
    on(&bench.peer.knobs.unmap_fails);
    mapper.map_one(request(grants[0].gref())).unwrap_err();
    off(&bench.peer.knobs.unmap_fails);
    assert_eq!((mapper.window().free, mapper.window().leaked), (1, 1));
    // Out, the own half: nothing is unmapped under whoever still sees it.
    let mapping = mapper.map_one(request(grants[1].gref())).unwrap();
    let before = bench.peer.live();
    on(&bench.peer.knobs.before_unmap_fails);
    mapping.unmap().unwrap_err();
    off(&bench.peer.knobs.before_unmap_fails);
    assert_eq!(bench.peer.live(), before);
    assert_eq!((mapper.window().free, mapper.window().leaked), (0, 2));
}

/// What one peer's driver may take is set aside for it: it uses all of it up, and another's is as it was.
#[test]
fn xsa_300_a_window_that_is_full_takes_from_nobody_else() {
    let bench = Bench::of(Version::V1);
    let (grants, greedy) = bench.pages(8, 4);
    let window = Window::new(0x2_0000_0000, 4).unwrap();
    let other = Mapper::new(Arc::clone(&bench.peer), window).unwrap();
    let mut held = Vec::new();
    for grant in &grants {
        match greedy.map_one(request(grant.gref())) {
            Ok(mapping) => held.push(mapping),
            Err(error) => assert_eq!(error, MapError::WindowFull { wanted: 1, free: 0 }),
        }
    }
    assert_eq!(held.len(), 4);
    let requests: Vec<_> = grants[4..].iter().map(|grant| request(grant.gref())).collect();
    let mapped = other.map(&requests).unwrap();
    assert!(mapped.iter().all(Result::is_ok));
    held.pop();
    assert!(
        greedy.map_one(request(grants[7].gref())).is_ok(),
        "what is given back is had again"
    );
}

/// T-406: four threads map and unmap overlapping sets of pages. Each address is with one mapping at a time (the hypervisor of
/// this test stops at the first that is not), and at the end the books are as at the start.
#[test]
fn xsa_406_books_kept_by_several_at_once_are_right() {
    let bench = Bench::of(Version::V1);
    let (grants, mapper) = bench.pages(6, 12);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (grants, mapper) = (&grants, &mapper);
            scope.spawn(move || {
                for round in 0..6000 {
                    let some: Vec<_> = (0..1 + (round + worker) % 3)
                        .map(|index| request(grants[(round + index) % 6].gref()))
                        .collect();
                    let mapped = mapper.map(&some).unwrap();
                    let addresses: BTreeSet<_> = mapped.iter().flatten().map(|m| m.host_addr()).collect();
                    assert_eq!(addresses.len(), some.len());
                    if round % 2 == 0 {
                        mapper.unmap(mapped.into_iter().flatten().collect()).unwrap();
                    }
                }
            });
        }
    });
    let window = mapper.window();
    assert_eq!((bench.peer.live(), window.free, window.leaked), (0, 12, 0));
    let run = mapper
        .map_run(ME, &[grants[0].gref(); 12], Access::ReadOnly)
        .unwrap();
    assert_eq!(run.pages().len(), 12, "each address is there once");
}
