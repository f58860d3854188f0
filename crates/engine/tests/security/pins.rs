//! Pins and marks (group C): counters equal reality, marks are cleared by whoever lowers the pins that
//! justify them and after the translations are gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use gnttab_abi::{CopyFlags, CopyPtr, EntryFlags, GrantHandle, GrantStatus, MapFlags, Mfn};
use gnttab_engine::machine::{Audit, C, G, PageType, Request, Scene, Violation};
use gnttab_engine::{DomainKind, Hook};

use crate::stage::{BOTH, DEV_RO, DEV_RW, LOW, RO, RW, Stage};

const READING: EntryFlags = EntryFlags::READING;
const NONE: EntryFlags = EntryFlags::empty();

/// XSA-218: the granter is told that its page is free by the last one who could reach it, not by one
/// who overtook it.
#[test]
fn xsa_218_marks_stay_until_the_slow_unmap_has_flushed() {
    for hook in [Hook::UnmapPass1, Hook::UnmapFlushed] {
        let stage = Stage::pv();
        let (at, second) = (stage.place(0), stage.place(1));
        let one = stage.mapped(0, LOW, 0, RW);
        let two = stage.mapped(1, LOW, 1, RW);
        let slow = stage.stop(hook, move |stage| stage.unmap_on(0, one, at, 0));
        assert_eq!(stage.unmap_on(1, two, second, 0), GrantStatus::OKAY);
        assert_eq!(stage.marks(G, LOW), EntryFlags::IN_USE, "{hook:?}: still in use");
        assert_eq!(stage.pins(G, LOW), [1, 0, 0, 0]);
        assert_eq!(slow.go(), GrantStatus::OKAY);
        assert_eq!(stage.marks(G, LOW), NONE);
        stage.finish();
    }
}

/// XSA-218, N-03, N-05: at each flush of the grantee the marks of what it unmaps are still set, there
/// is one flush for a batch, and none is forgotten.
#[test]
fn n_03_the_flush_comes_before_the_marks_go() {
    let stage = Stage::pv();
    let handles: Vec<GrantHandle> = (0..5).map(|n| stage.mapped(0, LOW, n, RW)).collect();
    let flushes = Arc::new(AtomicU32::new(0));
    let (inside, count) = (stage.clone(), Arc::clone(&flushes));
    stage.eye().after_each(
        |request| matches!(request, Request::Flush { grantee } if *grantee == C),
        move || {
            count.fetch_add(1, Ordering::Relaxed);
            assert_eq!(inside.marks(G, LOW), EntryFlags::IN_USE, "flushed too late");
        },
    );
    let mut items: Vec<_> = handles
        .iter()
        .zip(0..)
        .map(|(handle, n)| gnttab_abi::UnmapGrantRef {
            host_addr: stage.place(n),
            handle: *handle,
            ..gnttab_abi::UnmapGrantRef::default()
        })
        .collect();
    stage.processor().unmap(&stage.vcpu(C, 0), &mut items);
    assert!(items.iter().all(|item| item.status.is_okay()));
    assert_eq!(flushes.load(Ordering::Relaxed), 1, "one for the batch");
    assert_eq!(stage.marks(G, LOW), NONE);
    stage.finish();
}

/// A flush may wait for other processors, and these for a table to be left: nobody is inside one meanwhile,
/// between the phases of an unmap, nor where a mapping is undone that was just made.
#[test]
fn a_flush_that_may_wait_is_made_outside() {
    for fails in [false, true] {
        let stage = Stage::new(Scene::pv().caller_iommu());
        stage.guest(C, |guest| guest.set_iommu_failing(fails));
        let flushes = Arc::new(AtomicU32::new(0));
        let (inside, count) = (stage.clone(), Arc::clone(&flushes));
        stage.eye().after_each(
            |request| matches!(request, Request::Flush { grantee } if *grantee == C),
            move || {
                count.fetch_add(1, Ordering::Relaxed);
                assert_eq!(inside.marks(G, LOW), EntryFlags::IN_USE, "flushed too late");
                let held = |found: &Violation| found.audit == Audit::Locks;
                assert!(!inside.audit().iter().any(held), "flushed inside a table");
            },
        );
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
        if fails {
            assert_eq!(item.status, GrantStatus::GENERAL_ERROR);
        } else {
            let unmapped = stage.unmap_on(0, item.handle, stage.place(0), 0);
            assert_eq!(unmapped, GrantStatus::OKAY);
        }
        assert_eq!(flushes.load(Ordering::Relaxed), 1);
        assert_eq!((stage.marks(G, LOW), stage.pins(G, LOW)), (NONE, [0; 4]));
        stage.eye().forget();
        stage.guest(C, |guest| guest.set_iommu_failing(false));
        stage.finish();
    }
}

/// One step of taking a mapping down: addresses given, and what is left if it works.
type Undo = (&'static str, fn(u64, u64) -> (u64, u64));

/// XSA-224: every combination of kinds, access and page, taken down in every way: after each step the
/// references are those of what is left.
#[test]
fn xsa_224_each_kind_holds_and_gives_back_its_own() {
    let host: Undo = ("host", |at, _| (at, 0));
    let device: Undo = ("device", |_, bus| (0, bus));
    let both: Undo = ("both", |at, bus| (at, bus));
    let none: Undo = ("none", |_, _| (0, 0));
    let wrong: Undo = ("wrong bus", |_, bus| (0, bus + 0x10_0000));
    let low: Undo = ("low bits of bus", |_, bus| (0, bus + 0x18));
    let ways: [&[Undo]; 8] = [
        &[both],
        &[host, device],
        &[device, host],
        &[host, host, device],
        &[device, device, host],
        &[wrong, low, both],
        &[none, none, host, none, device],
        &[wrong, host, low, device],
    ];
    for kinds in [RW, DEV_RW, BOTH] {
        for readonly in [false, true] {
            for way in ways {
                take_down(kinds, readonly, way);
            }
        }
    }
}

fn take_down(kinds: MapFlags, readonly: bool, way: &[Undo]) {
    let stage = Stage::new(Scene::pv().caller_iommu());
    let mfn = stage.frame.mfn;
    let mut flags = kinds;
    flags.set(MapFlags::READONLY, readonly);
    let baseline = stage.machine.frame(mfn).unwrap();
    let item = stage.map_on((C, 0), (G, LOW), stage.place(0), flags);
    let what = format!("{flags}");
    assert_eq!(item.status, GrantStatus::OKAY, "{what}");
    let placed = stage.guest(C, |guest| guest.pte(stage.place(0))).unwrap();
    let wanted = kinds.contains(MapFlags::HOST_MAP);
    assert_eq!(
        placed != gnttab_engine::machine::Pte::default(),
        wanted,
        "{what}: asked for"
    );
    let mut left = kinds;
    for (name, addresses) in way {
        let (at, bus) = addresses(stage.place(0), mfn.address());
        let status = stage.unmap_on(0, item.handle, at, bus);
        let bad_bus = bus != 0 && bus != mfn.address() && left.contains(MapFlags::DEVICE_MAP);
        let expected = if left.is_empty() {
            GrantStatus::BAD_HANDLE
        } else if bad_bus {
            GrantStatus::BAD_DEV_ADDR
        } else {
            GrantStatus::OKAY
        };
        assert_eq!(status, expected, "{what}, {name}");
        if expected == GrantStatus::OKAY {
            if at != 0 {
                left.remove(MapFlags::HOST_MAP);
            }
            if bus != 0 {
                left.remove(MapFlags::DEVICE_MAP);
            }
        }
        let pins = stage.pins(G, LOW);
        let of = |kind| u8::from(left.contains(kind));
        let (host, device) = (of(MapFlags::HOST_MAP), of(MapFlags::DEVICE_MAP));
        let due = if readonly {
            [0, host, 0, device]
        } else {
            [host, 0, device, 0]
        };
        assert_eq!(pins, due, "{what}, {name}");
        assert_eq!(stage.audit(), [], "{what}, {name}");
    }
    if left.is_empty() {
        assert_eq!(stage.machine.frame(mfn).unwrap(), baseline, "{what}");
        assert_eq!(stage.guest(C, |guest| guest.iommu_right(mfn)), None);
    }
    stage.finish();
}

/// XSA-224: an I/O frame is no memory to be granted, by whomever it may be used (spec 4.2.1).
#[test]
fn xsa_224_an_io_frame_is_not_granted() {
    for permitted in [false, true] {
        let stage = Stage::pv();
        let mfn = Mfn(0xF_0000);
        assert!(stage.machine.add_io_frame(mfn));
        if permitted {
            stage.guest(G, |guest| guest.permit_io(mfn));
        }
        let gfn = gnttab_abi::Gfn(mfn.0);
        stage.grant(G, LOW, C, gnttab_engine::machine::Page { gfn, mfn }, NONE);
        for flags in [RO, RW, DEV_RW, BOTH] {
            let item = stage.map_on((C, 0), (G, LOW), stage.place(0), flags);
            assert_eq!(item.status, GrantStatus::BAD_PAGE);
            assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
        }
        stage.finish();
    }
}

/// XSA-224: the second reference, or either type, cannot be had: nothing of the mapping remains, and
/// nothing that somebody else holds goes.
#[test]
fn xsa_224_a_reference_that_cannot_be_had_fails_the_map() {
    let asked: [fn(&Request) -> bool; 2] = [
        |request| matches!(request, Request::GetFrame(_)),
        |request| matches!(request, Request::GetWritable(_)),
    ];
    for which in asked {
        for nth in 1..=2 {
            let stage = Stage::pv();
            let other = stage.mapped(1, LOW, 1, RW);
            let before = stage.machine.frame(stage.frame.mfn).unwrap();
            stage.faults().fail_nth(nth, which);
            let item = stage.map_on((C, 0), (G, LOW), stage.place(0), BOTH);
            assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "request {nth}");
            assert_eq!(stage.faults().refused(), 1);
            assert_eq!(stage.machine.frame(stage.frame.mfn).unwrap(), before);
            assert_eq!(stage.pins(G, LOW), [1, 0, 0, 0]);
            assert_eq!(stage.marks(G, LOW), EntryFlags::IN_USE, "the other mapping's");
            assert_eq!(stage.unmap_on(1, other, stage.place(1), 0), GrantStatus::OKAY);
            stage.finish();
        }
    }
}

/// XSA-224, the framework's oracle: both halves of one mapping gone, an ordinary writable one is left.
#[test]
fn xsa_224_a_frame_with_a_writable_view_does_not_become_a_page_table() {
    let stage = Stage::pv();
    let (mfn, bus) = (stage.frame.mfn, stage.frame.mfn.address());
    let plain = stage.mapped(0, LOW, 0, RW);
    let halves = stage.mapped(0, LOW, 1, BOTH);
    let retype = || stage.guest(G, |guest| guest.use_as(mfn, PageType::L1Table));
    assert_eq!(stage.unmap_on(0, halves, stage.place(1), 0), GrantStatus::OKAY);
    assert!(!retype());
    assert_eq!(stage.unmap_on(0, halves, 0, bus), GrantStatus::OKAY);
    assert!(!retype(), "a writable mapping is left");
    assert_eq!(stage.unmap_on(0, plain, stage.place(0), 0), GrantStatus::OKAY);
    assert!(retype());
    stage.guest(G, |guest| guest.stop_use(mfn));
    stage.finish();
}

/// XSA-224, N-06: which mappings hold the writable type depends on who grants and who maps.
#[test]
fn n_06_a_translated_granters_page_takes_no_type() {
    for (granter, grantee, typed) in [
        (DomainKind::Pv, DomainKind::Pv, 1),
        (DomainKind::Hvm, DomainKind::Pv, 0),
        (DomainKind::Pv, DomainKind::Hvm, 1),
        (DomainKind::Hvm, DomainKind::Hvm, 0),
    ] {
        let stage = Stage::new(Scene::pv().kind(G, granter).kind(C, grantee));
        let handle = stage.mapped(0, LOW, 0, RW);
        let info = stage.machine.frame(stage.frame.mfn).unwrap();
        assert_eq!(info.type_count, typed, "{granter:?} to {grantee:?}");
        assert_eq!(stage.audit(), []);
        assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
        assert_eq!(stage.machine.frame(stage.frame.mfn).unwrap().type_count, 0);
        stage.finish();
    }
}

/// XSA-230: the end of a copy clears no mark that a device mapping justifies.
#[test]
fn xsa_230_a_copy_leaves_the_marks_of_a_device_mapping() {
    for version2 in [false, true] {
        let builder = if version2 {
            Scene::pv().granter_v2()
        } else {
            Scene::pv()
        };
        let stage = Stage::new(builder);
        let bus = stage.frame.mfn.address();
        let device = stage.mapped(0, LOW, 0, DEV_RW);
        for write in [true, false, true] {
            assert_eq!(stage.copy_grant(1, LOW, write), GrantStatus::OKAY);
            assert_eq!(stage.marks(G, LOW), EntryFlags::IN_USE);
        }
        assert_eq!(stage.unmap_on(0, device, 0, bus), GrantStatus::OKAY);
        assert_eq!(stage.marks(G, LOW), NONE);
        let device = stage.mapped(0, LOW, 0, DEV_RO);
        assert_eq!(stage.marks(G, LOW), READING);
        assert_eq!(stage.copy_grant(1, LOW, true), GrantStatus::OKAY);
        assert_eq!(stage.marks(G, LOW), READING, "the writing is over");
        assert_eq!(stage.unmap_on(0, device, 0, bus), GrantStatus::OKAY);
        assert_eq!(stage.marks(G, LOW), NONE);
        stage.finish();
    }
}

/// XSA-230: any order of mappings and copies of all kinds: the marks are what the pins say, each time.
#[test]
fn xsa_230_marks_follow_the_pins_through_anything() {
    let mut state = 230_u64;
    let mut next = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % n
    };
    for round in 0..60 {
        let builder = if round % 2 == 0 {
            Scene::pv()
        } else {
            Scene::pv().granter_v2()
        };
        let stage = Stage::new(builder);
        let bus = stage.frame.mfn.address();
        let mut live: Vec<(GrantHandle, u64, MapFlags)> = Vec::new();
        for step in 0..60 {
            match next(4) {
                0 | 1 => {
                    let mut flags = [RW, DEV_RW, BOTH][usize::try_from(next(3)).unwrap()];
                    flags.set(MapFlags::READONLY, next(2) == 0);
                    let place = stage.place(step);
                    let item = stage.map_on((C, 0), (G, LOW), place, flags);
                    assert_eq!(item.status, GrantStatus::OKAY);
                    live.push((item.handle, place, flags));
                }
                2 if !live.is_empty() => {
                    let which = usize::try_from(next(live.len() as u64)).unwrap();
                    let (handle, place, flags) = live.swap_remove(which);
                    let at = if flags.contains(MapFlags::HOST_MAP) {
                        place
                    } else {
                        0
                    };
                    assert_eq!(stage.unmap_on(0, handle, at, bus), GrantStatus::OKAY);
                }
                _ => assert_eq!(stage.copy_grant(1, LOW, next(2) == 0), GrantStatus::OKAY),
            }
            let [hw, hr, dw, dr] = stage.pins(G, LOW);
            let mut due = NONE;
            due.set(EntryFlags::READING, hw + hr + dw + dr != 0);
            due.set(EntryFlags::WRITING, hw + dw != 0);
            assert_eq!(stage.marks(G, LOW), due, "round {round} step {step}");
        }
        stage.finish();
    }
}

/// N-37: each counter has 128 steps and its own limit; a request for two of them fails if either is
/// full, before anything has been done.
#[test]
fn n_37_the_129th_use_of_a_kind_fails_and_no_other() {
    let bus = |stage: &Stage| stage.frame.mfn.address();
    for full in [RW, RO, DEV_RW, DEV_RO] {
        let stage = Stage::pv();
        let handles: Vec<_> = (0..128).map(|n| stage.mapped(0, LOW, n, full)).collect();
        let before = (stage.pins(G, LOW), stage.machine.frame(stage.frame.mfn));
        let more = |flags| stage.map_on((C, 0), (G, LOW), stage.place(200), flags);
        assert_eq!(more(full).status, GrantStatus::GENERAL_ERROR);
        assert_eq!(
            more(full | BOTH).status,
            GrantStatus::GENERAL_ERROR,
            "either is full"
        );
        let copies = [
            full == RO && stage.copy_grant(0, LOW, false) == GrantStatus::OKAY,
            full == RW && stage.copy_grant(0, LOW, true) == GrantStatus::OKAY,
        ];
        assert_eq!(copies, [false; 2], "a copy counts as well");
        let after = (stage.pins(G, LOW), stage.machine.frame(stage.frame.mfn));
        assert_eq!(before, after);
        assert_eq!(stage.audit(), []);
        for other in [RW, RO, DEV_RW, DEV_RO].into_iter().filter(|kind| *kind != full) {
            let item = more(other);
            assert_eq!(item.status, GrantStatus::OKAY, "{full} full, {other}");
            let at = if other.contains(MapFlags::HOST_MAP) {
                stage.place(200)
            } else {
                0
            };
            assert_eq!(stage.unmap_on(0, item.handle, at, bus(&stage)), GrantStatus::OKAY);
        }
        let at = if full.contains(MapFlags::HOST_MAP) {
            stage.place(0)
        } else {
            0
        };
        assert_eq!(stage.unmap_on(0, handles[0], at, bus(&stage)), GrantStatus::OKAY);
        assert_eq!(more(full).status, GrantStatus::OKAY);
        stage.finish();
    }
}

/// N-38: what may only be copied through, or is no grant at all, is never mapped, in use or not.
#[test]
fn n_38_only_a_whole_page_is_mapped() {
    let stage = Stage::v2();
    let low = |stage: &Stage| stage.map_on((C, 1), (G, LOW), stage.place(0), RO).status;
    // The union of a transitive entry, misread as a frame, is a page of the granter.
    let far = gnttab_abi::GrantRef(u32::try_from(stage.frame2.gfn.0).unwrap());
    let before = stage.machine.frame(stage.frame2.mfn);
    stage.pass_on_to((G, LOW), C, (gnttab_engine::machine::T, far), NONE);
    assert_eq!(low(&stage), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.machine.frame(stage.frame2.mfn), before);
    stage.grant_part(LOW, 0, 4096);
    assert_eq!(low(&stage), GrantStatus::GENERAL_ERROR);
    stage.accept(G, LOW, C, 5);
    assert_eq!(low(&stage), GrantStatus::GENERAL_ERROR);
    stage.set_v2(G, LOW, gnttab_abi::EntryV2::default());
    assert_eq!(low(&stage), GrantStatus::GENERAL_ERROR);
    // In use by a copy.
    for transitive in [true, false] {
        if transitive {
            stage.pass_on(LOW, NONE);
        } else {
            stage.grant_part(LOW, 0, 64);
        }
        let copy = stage.stop(Hook::CopyMapped, |stage| {
            let dest = CopyPtr::frame(stage.local[0].gfn.0, 0);
            stage.copy_on((C, 0), CopyPtr::grant(G, LOW, 0), dest, CopyFlags::SOURCE_GREF)
        });
        assert_eq!(low(&stage), GrantStatus::GENERAL_ERROR, "in use, as it is");
        stage.grant(G, LOW, C, stage.frame, NONE);
        assert_eq!(low(&stage), GrantStatus::GENERAL_ERROR, "in use, rewritten");
        assert_eq!(copy.go(), GrantStatus::OKAY);
        assert_eq!(stage.marks(G, LOW), NONE);
    }
    stage.finish();
}
