//! Caches, I/O MMUs and translations (group G).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use gnttab_abi::{CacheFlush, CacheOp, EntryFlags, Errno, GrantRef, GrantStatus, MapFlags, Mfn};
use gnttab_engine::machine::{C, G, PageOwner, Request, Scene, T};
use gnttab_engine::{Access, DomainKind, Hook, Version};

use crate::stage::{BOTH, DEV_RO, HIGH, LOW, RO, RW, Stage};

/// XSA-232, N-33: every kind of page: the caller's own, and one that it has in use by grant; no other,
/// and none is held afterwards.
#[test]
fn xsa_232_only_what_is_ones_own_or_in_use_is_flushed() {
    let stage = Stage::new(Scene::arm());
    let clean = |mfn| stage.flush_cache(mfn, CacheOp::CLEAN);
    let (own, frame) = (stage.local[0].mfn, stage.frame.mfn);
    let unowned = stage.machine.add_unowned_frame();
    let shared = stage.machine.add_shared_frame();
    let io = Mfn(0xF_0000);
    assert!(stage.machine.add_io_frame(io));
    let free = stage.guest(T, |guest| guest.add_page()).unwrap();
    stage.guest(T, |guest| guest.give_up(free.mfn));
    let held = |mfn| stage.machine.frame(mfn).map(|info| info.references);
    let all = [
        frame,
        stage.frame2.mfn,
        stage.far.mfn,
        unowned,
        shared,
        io,
        free.mfn,
        Mfn(u64::MAX >> 12),
    ];
    let before = all.map(held);
    for mfn in all {
        let answer = clean(mfn).expect_err("neither own nor in use");
        assert!(matches!(answer, Errno::Inval | Errno::Perm), "{mfn}: {answer}");
        assert_eq!(stage.audit(), [], "{mfn}");
    }
    assert_eq!(all.map(held), before);
    assert_eq!(clean(own), Ok(()));
    let handle = stage.mapped(0, LOW, 0, RO);
    assert_eq!(clean(frame), Ok(()));
    assert_eq!(clean(stage.frame2.mfn), Err(Errno::Inval), "granted by nobody");
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    assert_eq!(clean(frame), Err(Errno::Inval), "not in use any more");
    // In use, but by somebody else.
    stage.grant(G, HIGH, T, stage.frame, EntryFlags::empty());
    let item = stage.map_on((T, 0), (G, HIGH), stage.place(0), RW);
    assert_eq!(item.status, GrantStatus::OKAY);
    assert_eq!(clean(frame), Err(Errno::Inval));
    assert_eq!(stage.machine.cache_flushes().len(), 2);
    // What ends behind its page is another's too (spec 3.13 step 1).
    for (offset, length) in [(1, 4096), (4095, 2), (4096, 0), (0, 4097)] {
        let item = CacheFlush {
            dev_bus_addr: own.address(),
            offset,
            length,
            op: CacheOp::CLEAN,
        };
        let flushed = stage.processor().cache_flush(&stage.vcpu(C, 0), &[item]);
        assert_eq!(flushed, Err((0, Errno::Inval)), "{length} bytes at {offset}");
    }
    stage.finish();
}

/// N-33: the grant is unmapped between the finding and the flush: what was found stays found, the
/// frame is referenced until the flush is over.
#[test]
fn n_33_what_gave_the_right_lasts_until_the_flush_is_over() {
    let stage = Stage::new(Scene::arm());
    let handle = stage.mapped(0, LOW, 0, RW);
    let (at, mfn) = (stage.place(0), stage.frame.mfn);
    let flushing = stage.stop(Hook::CacheFound, move |stage| {
        stage.flush_cache(mfn, CacheOp::CLEAN)
    });
    // The granter gives the page up, and wants its table to itself: it does not get it.
    stage.guest(G, |guest| guest.give_up(mfn));
    let changing = stage.spawn(|stage| stage.set_version(G, 2));
    let unmapping = stage.spawn(move |stage| stage.unmap_on(1, handle, at, 0));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(!changing.is_finished(), "the flusher is inside");
    assert_eq!(stage.machine.audit(), []);
    let done = flushing.go();
    assert_eq!(unmapping.join().unwrap(), GrantStatus::OKAY);
    assert_eq!(changing.join().unwrap(), Ok(()));
    assert!(done.is_ok() || done == Err(Errno::Inval));
    assert_eq!(stage.machine.audit(), []);
    stage.finish();
}

/// N-33: arguments first, and in their order; nothing to do is done; an error ends the batch; the match
/// is found in the last entry of a large table, and the search can be interrupted.
#[test]
fn n_33_a_search_is_bounded_and_an_error_ends_the_batch() {
    let limits = |limits: &mut gnttab_engine::Limits| limits.grant_frames = Some(20);
    let stage = Stage::new(Scene::arm().limits(G, limits));
    let mut cpu = stage.processor();
    let grown = cpu.setup_table(
        &stage.vcpu(G, 0),
        gnttab_abi::DomId::SELF,
        20,
        None,
        &mut |_, _| true,
    );
    assert_eq!(grown, GrantStatus::OKAY);
    drop(cpu);
    let last = GrantRef(20 * 512 - 1);
    stage.grant(G, last, C, stage.frame, EntryFlags::empty());
    let handle = stage.mapped(0, last, 0, RW);
    let item = CacheFlush {
        dev_bus_addr: stage.frame.mfn.address(),
        length: 64,
        op: CacheOp::CLEAN,
        ..CacheFlush::default()
    };
    stage.add_args(C, 1);
    let mut raw = [0; 32];
    item.encode(gnttab_abi::Abi::Arm, &mut raw).unwrap();
    stage.poke(
        C,
        crate::stage::ARGS,
        &raw[..CacheFlush::size(gnttab_abi::Abi::Arm)],
    );
    let mut asked = 0;
    let call = crate::stage::call(gnttab_abi::Op::CacheFlush, 1);
    let done = stage.hypercall(C, gnttab_abi::Abi::Arm, call, || {
        asked += 1;
        true
    });
    assert_eq!(done, Ok(()));
    assert!(asked >= 2, "10239 entries, and a look up every 4096");
    let flush = |items: &[CacheFlush]| stage.processor().cache_flush(&stage.vcpu(C, 0), items);
    let nothing = CacheFlush { length: 0, ..item };
    let bad = CacheFlush {
        offset: 4095,
        length: 2,
        ..item
    };
    let nobody = CacheFlush {
        dev_bus_addr: stage.far.mfn.address(),
        ..item
    };
    assert_eq!(flush(&[nothing]), Ok(()));
    let worse = CacheFlush {
        offset: 4096,
        length: 0,
        ..nobody
    };
    assert_eq!(flush(&[worse]), Err((0, Errno::Inval)), "arguments come first");
    let before = stage.machine.cache_flushes().len();
    assert_eq!(flush(&[item, bad, item]), Err((1, Errno::Inval)));
    assert_eq!(stage.machine.cache_flushes().len(), before + 1);
    assert_eq!(flush(&[nobody, item]), Err((0, Errno::Inval)));
    assert_eq!(stage.machine.cache_flushes().len(), before + 1);
    // A search may not be continued for nothing.
    let mut resumed = call;
    resumed.command = gnttab_abi::Command(call.command.0 | 4096);
    let mut empty = [0; 32];
    nothing.encode(gnttab_abi::Abi::Arm, &mut empty).unwrap();
    stage.poke(
        C,
        crate::stage::ARGS,
        &empty[..CacheFlush::size(gnttab_abi::Abi::Arm)],
    );
    let done = stage.hypercall(C, gnttab_abi::Abi::Arm, resumed, || false);
    assert_eq!(done, Err(Errno::IlSeq));
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    stage.finish();
}

/// XSA-402's lesson: who may only read does not throw away what others wrote.
#[test]
fn xsa_402_a_reader_throws_nothing_away() {
    let stage = Stage::new(Scene::arm());
    let handle = stage.mapped(0, LOW, 0, RO);
    assert_eq!(stage.flush_cache(stage.frame.mfn, CacheOp::INVAL), Ok(()));
    let both = CacheOp::INVAL | CacheOp::CLEAN;
    assert_eq!(stage.machine.cache_flushes()[0].op, both, "cleaned as well");
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    let handle = stage.mapped(0, LOW, 0, RW);
    assert_eq!(stage.flush_cache(stage.frame.mfn, CacheOp::INVAL), Ok(()));
    assert_eq!(stage.machine.cache_flushes()[1].op, CacheOp::INVAL);
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    stage.finish();
}

/// XSA-380, N-24: one mapping more costs the same among none and among thousands.
#[test]
fn xsa_380_a_mapping_costs_the_same_among_thousands() {
    let stage = Stage::new(Scene::pv().caller_iommu());
    let frames: Vec<_> = (0..40_u32)
        .map(|n| {
            let page = stage.guest(G, |guest| guest.add_page()).unwrap();
            stage.grant(G, GrantRef(30 + n), C, page, EntryFlags::empty());
            page
        })
        .collect();
    let cost = || {
        let at = stage.place(500);
        let handle = stage.map_on((C, 0), (G, LOW), at, RW).handle;
        let made = stage.eye().effort.steps();
        assert_eq!(stage.unmap_on(0, handle, at, 0), GrantStatus::OKAY);
        (made, stage.eye().effort.steps())
    };
    let alone = cost();
    let mut live = Vec::new();
    for n in 0..40_u32 {
        for _ in 0..100 {
            let item = stage.map_on((C, 1), (G, GrantRef(30 + n)), 0, DEV_RO);
            assert_eq!(item.status, GrantStatus::OKAY);
            live.push((item.handle, frames[n as usize].mfn.address()));
        }
    }
    assert_eq!(cost(), alone, "in steps");
    for (handle, bus) in live {
        assert_eq!(stage.unmap_on(1, handle, 0, bus), GrantStatus::OKAY);
    }
    stage.finish();
}

/// XSA-394: a mapping counts once in the I/O MMU's books, whatever number of calls take it down.
#[test]
fn xsa_394_a_mapping_is_uncounted_once() {
    for another in [false, true] {
        let stage = Stage::new(Scene::pv().caller_iommu());
        let mfn = stage.frame.mfn;
        let right = |stage: &Stage| stage.guest(C, |guest| guest.iommu_right(mfn));
        let second = another.then(|| stage.mapped(1, LOW, 1, RO));
        let (at, bus) = (stage.place(0), mfn.address());
        let handle = stage.mapped(0, LOW, 0, BOTH);
        for _ in 0..10 {
            assert_eq!(
                stage.unmap_on(0, handle, 0, 0),
                GrantStatus::OKAY,
                "nothing to do"
            );
        }
        assert_eq!(right(&stage), Some(Access::Write));
        assert_eq!(stage.unmap_on(0, handle, at, 0), GrantStatus::OKAY);
        assert_eq!(right(&stage), Some(Access::Write), "half of it is left");
        assert_eq!(stage.unmap_on(0, handle, 0, bus), GrantStatus::OKAY);
        let left = another.then_some(Access::Read);
        assert_eq!(right(&stage), left);
        assert_eq!(stage.unmap_on(0, handle, 0, bus), GrantStatus::BAD_HANDLE);
        assert_eq!(right(&stage), left);
        assert_eq!(stage.audit(), []);
        if let Some(handle) = second {
            assert_eq!(stage.unmap_on(1, handle, stage.place(1), 0), GrantStatus::OKAY);
            assert_eq!(right(&stage), None);
        }
        stage.finish();
    }
}

/// XSA-291, XSA-285, XSA-288: the I/O MMU cannot follow: the whole map is undone; on the way out the
/// books are put straight all the same, and the frame is not used for anything else.
#[test]
fn xsa_291_a_failing_iommu_undoes_the_whole_map() {
    for flags in [RO, RW, BOTH, BOTH | MapFlags::READONLY, DEV_RO] {
        let stage = Stage::new(Scene::pv().caller_iommu());
        let before = stage.machine.frame(stage.frame.mfn);
        stage.guest(C, |guest| guest.set_iommu_failing(true));
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0), flags);
        assert_eq!(item.status, GrantStatus::GENERAL_ERROR);
        assert_eq!(stage.machine.frame(stage.frame.mfn), before);
        assert_eq!(
            (stage.pins(G, LOW), stage.marks(G, LOW)),
            ([0; 4], EntryFlags::empty())
        );
        let pte = stage.guest(C, |guest| guest.pte(stage.place(0)));
        assert_eq!(pte, Some(gnttab_engine::machine::Pte::default()), "N-27");
        assert_eq!(stage.audit(), []);
        stage.guest(C, |guest| guest.set_iommu_failing(false));
        stage.finish();
    }
    // On the way out.
    let stage = Stage::new(Scene::pv().caller_iommu());
    let mfn = stage.frame.mfn;
    let handle = stage.mapped(0, LOW, 0, RW);
    stage.guest(C, |guest| guest.set_iommu_failing(true));
    assert_eq!(
        stage.unmap_on(0, handle, stage.place(0), 0),
        GrantStatus::GENERAL_ERROR
    );
    assert_eq!(
        (stage.pins(G, LOW), stage.marks(G, LOW)),
        ([0; 4], EntryFlags::empty())
    );
    assert_eq!(
        stage.unmap_on(0, handle, stage.place(0), 0),
        GrantStatus::BAD_HANDLE
    );
    stage.guest(G, |guest| guest.give_up(mfn));
    let info = stage.machine.frame(mfn).unwrap();
    assert_eq!(
        info.owner,
        PageOwner::Domain(G),
        "devices may still reach it: it is never used again"
    );
}

/// N-10: read-only then writable and back, in all orders; a second mapper at the same time; one's own
/// page; each leaves devices exactly the rights of what is mapped.
#[test]
fn n_10_devices_may_do_what_the_strongest_mapping_may() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for made in orders {
        for gone in orders {
            let stage = Stage::new(Scene::pv().caller_iommu());
            let mfn = stage.frame.mfn;
            let kinds = [RO, RW, RO];
            let mut live: [Option<gnttab_abi::GrantHandle>; 3] = [None; 3];
            let check = |stage: &Stage, live: &[Option<_>; 3]| {
                let due = match (live[1].is_some(), live[0].is_some() || live[2].is_some()) {
                    (true, _) => Some(Access::Write),
                    (false, true) => Some(Access::Read),
                    _ => None,
                };
                assert_eq!(stage.guest(C, |guest| guest.iommu_right(mfn)), due);
            };
            for which in made {
                live[which] = Some(stage.mapped(0, LOW, which as u64, kinds[which]));
                check(&stage, &live);
            }
            for which in gone {
                let handle = live[which].take().unwrap();
                let at = stage.place(which as u64);
                assert_eq!(stage.unmap_on(0, handle, at, 0), GrantStatus::OKAY);
                check(&stage, &live);
            }
            stage.finish();
        }
    }
    // The first mapper is stopped before it reached the I/O MMU; the second one's devices work when it
    // returns.
    let stage = Stage::new(Scene::pv().caller_iommu());
    let mfn = stage.frame.mfn;
    let first = stage.stop(Hook::MapPinned, |stage| stage.mapped(0, LOW, 0, RW));
    let second = stage.mapped(1, LOW, 1, RO);
    assert!(stage.guest(C, |guest| guest.iommu_right(mfn)).is_some());
    let first = first.go();
    assert_eq!(
        stage.guest(C, |guest| guest.iommu_right(mfn)),
        Some(Access::Write)
    );
    assert_eq!(stage.unmap_on(0, first, stage.place(0), 0), GrantStatus::OKAY);
    assert_eq!(stage.guest(C, |guest| guest.iommu_right(mfn)), Some(Access::Read));
    assert_eq!(stage.unmap_on(1, second, stage.place(1), 0), GrantStatus::OKAY);
    // One's own page: the I/O MMU is not asked at all.
    stage.grant(C, LOW, C, stage.local[0], EntryFlags::empty());
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    stage.eye().after_each(
        |request| matches!(request, Request::IommuSet { .. }),
        move || {
            count.fetch_add(1, Ordering::Relaxed);
        },
    );
    let own = stage.map_on((C, 0), (C, LOW), stage.place(0), RW);
    assert_eq!(own.status, GrantStatus::OKAY);
    assert_eq!(
        stage.unmap_on(0, own.handle, stage.place(0), 0),
        GrantStatus::OKAY
    );
    assert_eq!(asked.load(Ordering::Relaxed), 0, "IOM-2");
    stage.finish();
}

/// XSA-241, XSA-346, XSA-355 and others, N-05, IOM-5: no frame is used again while a translation of it
/// may be left, through unmap, replace, failure and death.
#[test]
fn iom_5_no_frame_is_free_while_a_translation_is_left() {
    for way in 0..4 {
        let stage = Stage::pv();
        let mfn = stage.frame.mfn;
        let handle = stage.mapped(0, LOW, 0, RW);
        stage.guest(G, |guest| guest.give_up(mfn));
        assert_eq!(stage.machine.frame(mfn).unwrap().owner, PageOwner::Domain(G));
        match way {
            0 => assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY),
            1 => {
                let mut items = [gnttab_abi::UnmapAndReplace {
                    host_addr: stage.place(0),
                    new_addr: stage.place(7),
                    handle,
                    ..gnttab_abi::UnmapAndReplace::default()
                }];
                stage.processor().unmap_and_replace(&stage.vcpu(C, 0), &mut items);
                assert_eq!(items[0].status, GrantStatus::OKAY);
            }
            2 => {
                stage.kill(C);
            }
            _ => {
                // The guest overwrites the entry, and unmaps nothing.
                stage.guest(C, |guest| guest.unmap(stage.place(0)));
                assert_eq!(
                    stage.unmap_on(0, handle, stage.place(0), 0),
                    GrantStatus::GENERAL_ERROR
                );
            }
        }
        assert_eq!(
            stage.machine.audit(),
            [],
            "way {way}: freed while it could be reached"
        );
        assert_eq!(
            stage.machine.frame(mfn).unwrap().owner,
            PageOwner::Free,
            "way {way}"
        );
        if way != 2 {
            stage.kill(C);
        }
        stage.finish();
    }
}

/// N-08, N-45: a mapping may be read, or read and written: never executed, and memory is cached as
/// memory, whatever cache flags the granter wrote.
#[test]
fn n_08_a_mapping_is_not_executable_and_cached_as_memory() {
    use gnttab_engine::machine::Pte;
    for version in [Version::V1, Version::V2] {
        let stage = Stage::new(Scene::pv().version(G, version));
        let odd = EntryFlags::PWT | EntryFlags::PCD | EntryFlags::PAT;
        stage.grant(G, LOW, C, stage.frame, odd);
        for (flags, writable) in [(RO, false), (RW, true)] {
            let handle = stage.mapped(0, LOW, 0, flags);
            let pte = stage.guest(C, |guest| guest.pte(stage.place(0))).unwrap();
            assert!(pte.has(Pte::PRESENT | Pte::NO_EXECUTE));
            assert_eq!(pte.has(Pte::WRITABLE), writable);
            for bit in [Pte::PWT, Pte::PCD, Pte::PAT] {
                assert!(!pte.has(bit), "memory is cached");
            }
            assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
        }
        stage.finish();
    }
    // A translated grantee: a grant entry of one of two kinds, which no implementation executes.
    let stage = Stage::new(Scene::pv().kind(C, DomainKind::Hvm));
    for (flags, access) in [(RO, Access::Read), (RW, Access::Write)] {
        let handle = stage.mapped(0, LOW, 0, flags);
        let at = gnttab_abi::Gfn::containing(stage.place(0));
        let entry = stage.guest(C, |guest| guest.physmap(at));
        let grant = gnttab_engine::machine::P2mEntry::Grant(stage.frame.mfn, access);
        assert_eq!(entry, Some(grant));
        assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    }
    stage.finish();
}
