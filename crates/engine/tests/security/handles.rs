//! The grantee's handles (group B): one owner each, given back once, none lost.

use std::collections::BTreeSet;

use gnttab_abi::{EntryFlags, GrantHandle, GrantRef, GrantStatus, MapGrantRef};
use gnttab_engine::Hook;
use gnttab_engine::machine::{C, G, Request, Scene};

use crate::stage::{BOTH, DEV_RO, LOW, RO, RW, Stage};

/// XSA-218: two calls that take the two halves of one mapping give its handle back once, whichever
/// of them goes on first.
#[test]
fn xsa_218_the_two_halves_of_a_mapping_free_one_handle() {
    for host_first in [true, false] {
        let stage = Stage::pv();
        let bus = stage.frame.mfn.address();
        let at = stage.place(0);
        let handle = stage.mapped(2, LOW, 0, BOTH);
        let host = stage.stop(Hook::UnmapPass1, move |stage| stage.unmap_on(0, handle, at, 0));
        let device = stage.stop(Hook::UnmapPass1, move |stage| stage.unmap_on(1, handle, 0, bus));
        assert_eq!(stage.unmap_on(2, handle, at, bus), GrantStatus::BAD_HANDLE);
        let (first, second) = if host_first {
            (host, device)
        } else {
            (device, host)
        };
        assert_eq!(first.go(), GrantStatus::OKAY);
        assert_eq!(second.go(), GrantStatus::OKAY);
        assert_eq!(stage.audit(), []);
        let again = [0, 1, 2].map(|vcpu| stage.mapped(vcpu, LOW, 1 + vcpu as u64, RO));
        let distinct: BTreeSet<_> = again.iter().collect();
        assert_eq!(distinct.len(), 3, "{again:?}");
        assert_eq!(stage.audit(), []);
        stage.finish();
    }
}

/// XSA-218: of many unmaps of one handle one wins, also when it has been given out again meanwhile.
#[test]
fn xsa_218_a_handle_that_was_given_out_again_is_not_the_old_mapping() {
    let one_page = |limits: &mut gnttab_engine::Limits| limits.maptrack_frames = Some(1);
    let stage = Stage::new(Scene::pv().limits(C, one_page));
    let at = stage.place(0);
    let old = stage.mapped(0, LOW, 0, RW);
    // The first unmap has edited the record; before it is over, the handle is another mapping's: that
    // of whoever takes all handles that are free.
    let slow = stage.stop(Hook::UnmapFlushed, move |stage| stage.unmap_on(0, old, at, 0));
    let mut live = Vec::new();
    for n in 0..255_u32 {
        let gref = GrantRef(30 + n / 100);
        stage.grant(G, gref, C, stage.frame2, EntryFlags::empty());
        let item = stage.map_on((C, 1), (G, gref), stage.place(1 + u64::from(n)), RO);
        assert_eq!(item.status, GrantStatus::OKAY, "mapping {n}");
        live.push((item.handle, stage.place(1 + u64::from(n))));
    }
    assert!(
        live.iter().any(|(handle, _)| *handle == old),
        "the handle is used again"
    );
    assert_eq!(stage.unmap_on(1, old, at, 0), GrantStatus::GENERAL_ERROR);
    assert_eq!(slow.go(), GrantStatus::OKAY);
    assert_eq!(stage.pins(G, LOW), [0; 4]);
    let counts = [30, 31, 32].map(|gref| stage.pins(G, GrantRef(gref))[1]);
    assert_eq!(counts, [100, 100, 55], "the new mappings stand");
    for (handle, place) in live {
        assert_eq!(stage.unmap_on(0, handle, place, 0), GrantStatus::OKAY);
    }
    stage.finish();
}

/// XSA-218, N-24: while one vCPU makes the list of records grow, others may name any handle: one that
/// was never handed out is refused, and no record is reached that is not there yet.
#[test]
fn xsa_218_no_number_around_the_limit_is_a_handle() {
    let stage = Stage::pv();
    let guesses: Vec<u32> = (0..1100).chain([u32::MAX - 1, u32::MAX, 1 << 31]).collect();
    let guesser = stage.spawn(move |stage| {
        for _ in 0..40 {
            for guess in &guesses {
                // No address: even a live mapping loses nothing by it.
                let status = stage.unmap_on(1, GrantHandle(*guess), 0, 0);
                assert!(
                    matches!(status, GrantStatus::OKAY | GrantStatus::BAD_HANDLE),
                    "{guess}: {status:?}"
                );
            }
        }
    });
    // Grown page by page, by reading mappings of several entries (128 each).
    let mut handles = Vec::new();
    for entry in 0..9 {
        let gref = GrantRef(30 + entry);
        stage.grant(G, gref, C, stage.frame, EntryFlags::empty());
        for _ in 0..110 {
            let item = stage.map_on((C, 0), (G, gref), 0, DEV_RO);
            assert_eq!(item.status, GrantStatus::OKAY);
            handles.push(item.handle);
        }
    }
    guesser.join().unwrap();
    let distinct: BTreeSet<_> = handles.iter().collect();
    assert_eq!(distinct.len(), handles.len());
    let bus = stage.frame.mfn.address();
    for handle in handles {
        assert_eq!(stage.unmap_on(0, handle, 0, bus), GrantStatus::OKAY);
    }
    assert_eq!(stage.unmap_on(0, GrantHandle(4), 0, 0), GrantStatus::BAD_HANDLE);
    stage.finish();
}

/// XSA-228: who takes handles from another vCPU's list, while that one takes and gives back its own,
/// gets each handle once; the owner of the list acts between the thief's look and its grip.
#[test]
fn xsa_228_thieves_and_the_owner_of_a_list_share_no_handle() {
    let builder = Scene::pv().limits(C, |limits| {
        limits.maptrack_frames = Some(1);
    });
    let stage = Stage::new(builder);
    // All 255 are on vCPU 0's list.
    let first = stage.mapped(0, LOW, 0, RO);
    let mut live = vec![(first, stage.place(0))];
    for round in 0..60_u64 {
        let inside = stage.clone();
        let at = stage.place(300);
        stage.machine.hooks().once(Hook::HandlePeek, move || {
            // The owner takes what the thief has seen, frees it, and takes another.
            let taken = inside.map_on((C, 0), (G, LOW), at, RO);
            assert_eq!(taken.status, GrantStatus::OKAY);
            assert_eq!(inside.unmap_on(0, taken.handle, at, 0), GrantStatus::OKAY);
        });
        let thief = 1 + usize::try_from(round % 3).unwrap();
        let place = stage.place(1 + round);
        let stolen = stage.map_on((C, thief), (G, LOW), place, RO);
        assert_eq!(stolen.status, GrantStatus::OKAY);
        live.push((stolen.handle, place));
        assert_eq!(stage.audit(), [], "round {round}");
    }
    // Threads as well: three thieves and the owner.
    let workers: Vec<_> = (0..4_usize)
        .map(|vcpu| {
            stage.spawn(move |stage| {
                for _ in 0..300 {
                    let place = stage.place(400 + vcpu as u64);
                    let item = stage.map_on((C, vcpu), (G, LOW), place, RO);
                    assert_eq!(item.status, GrantStatus::OKAY);
                    let status = stage.unmap_on(vcpu, item.handle, place, 0);
                    assert_eq!(status, GrantStatus::OKAY);
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    let distinct: BTreeSet<_> = live.iter().map(|(handle, _)| *handle).collect();
    assert_eq!(distinct.len(), live.len());
    for (handle, place) in live {
        assert_eq!(stage.unmap_on(0, handle, place, 0), GrantStatus::OKAY);
    }
    stage.finish();
}

/// N-17, N-29: exactly as many mappings as there are handles; one more is *no_space*, one fewer makes
/// room for one; and a vCPU whose list is empty takes from the others when there is no memory.
#[test]
fn n_17_handles_end_exactly_where_they_should() {
    for pages in [0_u32, 1, 2] {
        let builder = Scene::pv().limits(C, |limits| limits.maptrack_frames = Some(pages));
        let stage = Stage::new(builder);
        let most = (256 * pages).saturating_sub(1);
        let mut items = Vec::new();
        for entry in 0..5_u32 {
            let gref = GrantRef(30 + entry);
            stage.grant(G, gref, C, stage.frame, EntryFlags::empty());
            items.extend((0..120_u64).map(|_| MapGrantRef {
                flags: DEV_RO,
                gref,
                dom: G,
                ..MapGrantRef::default()
            }));
        }
        for (n, chunk) in items.chunks_mut(64).enumerate() {
            stage.processor().map(&stage.vcpu(C, n % 4), chunk);
        }
        let made: Vec<_> = items.iter().filter(|item| item.status.is_okay()).collect();
        assert_eq!(made.len(), most as usize, "{pages} pages");
        assert!(
            items[made.len()..]
                .iter()
                .all(|item| item.status == GrantStatus::NO_SPACE)
        );
        let pinned = stage.pins(G, GrantRef(34));
        assert_eq!(pinned[0], 0, "what got no handle left nothing");
        let bus = stage.frame.mfn.address();
        if let Some(one) = made.first() {
            assert_eq!(stage.unmap_on(3, one.handle, 0, bus), GrantStatus::OKAY);
            let again = stage.map_on((C, 1), (G, LOW), stage.place(0), RO);
            assert_eq!(again.status, GrantStatus::OKAY, "another vCPU gets it");
            let none = stage.map_on((C, 1), (G, LOW), stage.place(1), RO);
            assert_eq!(none.status, GrantStatus::NO_SPACE);
        }
        stage.finish();
    }
}

/// XSA-316's sweep, for handles: no failing map keeps its handle, whatever it failed at.
#[test]
fn xsa_218_a_map_that_fails_gives_its_handle_back() {
    for nth in 1..40 {
        let stage = Stage::new(Scene::pv().caller_iommu());
        stage.faults().fail_nth(nth, |_| true);
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0), BOTH);
        let handles = |stage: &Stage| stage.audit();
        assert_eq!(handles(&stage), [], "{nth}: {:?}", item.status);
        let over = stage.faults().refused() == 0;
        stage.finish();
        if over {
            assert!(nth > 4);
            return;
        }
    }
    panic!("it never worked");
}

/// HND-4: the record changes between an unmap's look and its grip.
#[test]
fn hnd_4_a_record_that_moved_is_refused() {
    let stage = Stage::pv();
    let at = stage.place(0);
    let handle = stage.mapped(0, LOW, 0, RW);
    let inside = stage.clone();
    let done = std::sync::Mutex::new(false);
    // The policy is asked between the look at the record and the grip on it.
    stage.eye().after_each(
        |request| matches!(request, Request::MayUnmap { .. }),
        move || {
            let first = !std::mem::replace(&mut *done.lock().unwrap(), true);
            if first {
                assert_eq!(inside.unmap_on(1, handle, at, 0), GrantStatus::OKAY);
            }
        },
    );
    assert_eq!(stage.unmap_on(0, handle, at, 0), GrantStatus::BAD_HANDLE);
    assert_eq!(stage.pins(G, LOW), [0; 4]);
    assert_eq!(stage.marks(G, LOW), EntryFlags::empty());
    stage.finish();
}
