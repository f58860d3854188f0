//! Versions, growth and the places of table frames (group D).

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gnttab_abi::{
    CopyFlags, CopyPtr, DomId, EntryFlags, EntryV1, EntryV2, Errno, Gfn, GrantRef, GrantStatus, Mfn,
};
use gnttab_engine::machine::{C, G, P, P2mEntry, PageOwner, Pte, Request, Scene, T};
use gnttab_engine::{Config, DomainKind, Engine, Hook, Limits, Version};

use crate::stage::{HIGH, LOW, RO, RW, Stage};

/// The bit of a place that says "status frame".
const STATUS: u64 = 0x8000_0000;
const NONE: EntryFlags = EntryFlags::empty();

fn place(stage: &Stage, vcpu: usize, idx: u64, gfn: u64) -> Result<(), Errno> {
    let mut cpu = stage.processor();
    cpu.place_frame(&stage.vcpu(C, vcpu), DomId::SELF, idx, Gfn(gfn))
}

fn grow(stage: &Stage, id: DomId, frames: u32) -> GrantStatus {
    let mut cpu = stage.processor();
    cpu.setup_table(&stage.vcpu(id, 2), DomId::SELF, frames, None, &mut |_, _| true)
}

/// Where C has a frame as its own memory.
fn places(stage: &Stage, mfn: Mfn) -> Vec<u64> {
    let at = |gfn: u64| stage.guest(C, |guest| guest.physmap(Gfn(gfn)));
    let here = |gfn: &u64| at(*gfn).and_then(P2mEntry::own_ram) == Some(mfn);
    (0x100..0x900).filter(here).collect()
}

/// Gives another actor time to run into a lock, or to do what it should not be able to.
fn let_run<R>(actor: &JoinHandle<R>) {
    let deadline = Instant::now() + Duration::from_millis(30);
    while !actor.is_finished() && Instant::now() < deadline {
        std::thread::yield_now();
    }
}

/// XSA-26: versions there and back, others allocating between: no frame is lost or two domains'.
#[test]
fn xsa_26_there_and_back_leaves_the_books_straight() {
    let stage = Stage::pv();
    assert_eq!(grow(&stage, G, 9), GrantStatus::OKAY);
    let frames = |stage: &Stage| {
        let domain = stage.domain(G);
        (0..9)
            .map(|i| domain.shared_frame(i).unwrap().mfn())
            .collect::<Vec<_>>()
    };
    let before = frames(&stage);
    stage.set_version(G, 2).unwrap();
    let status = stage.domain(G).status_frame(0).unwrap().mfn();
    for round in 0..200 {
        stage.set_version(G, 1).unwrap();
        assert_eq!(stage.domain(G).frames(), (9, 0));
        let kept = stage.machine.frame(status).unwrap();
        assert_ne!(
            kept.owner,
            PageOwner::Domain(G),
            "{round}: no page of the guest's"
        );
        let other = stage.guest(T, |guest| guest.add_page()).unwrap();
        assert!(!before.contains(&other.mfn));
        stage.set_version(G, 2).unwrap();
        assert_eq!(stage.domain(G).frames(), (9, 2));
        stage.guest(T, |guest| guest.give_up(other.mfn));
        if round % 20 == 0 {
            assert_eq!(stage.audit(), []);
        }
    }
    assert_eq!(frames(&stage), before);
    stage.finish();
}

/// XSA-26: whichever page cannot be had, in creation, growth or a change of version, nothing has
/// changed that anybody can see, and the next try works.
#[test]
fn xsa_26_growth_is_all_or_nothing() {
    type Act = fn(&Stage) -> bool;
    let acts: [(&str, Version, Act); 3] = [
        ("grow v1", Version::V1, |stage| {
            grow(stage, G, 17) == GrantStatus::OKAY
        }),
        ("grow v2", Version::V2, |stage| {
            grow(stage, G, 17) == GrantStatus::OKAY
        }),
        ("version", Version::V1, |stage| stage.set_version(G, 2).is_ok()),
    ];
    for (name, version, act) in acts {
        let mut refusals = 0;
        for nth in 1.. {
            let stage = Stage::new(Scene::pv().version(G, version));
            if name == "version" {
                assert_eq!(grow(&stage, G, 17), GrantStatus::OKAY);
            }
            let before = (stage.domain(G).frames(), stage.domain(G).version());
            let which = |request: &Request| matches!(request, Request::AllocTablePage { .. });
            stage.faults().fail_nth(nth, which);
            let done = act(&stage);
            if stage.faults().refused() == 0 {
                assert!(done);
                break;
            }
            refusals += 1;
            assert!(!done, "{name}: page {nth}");
            let after = (stage.domain(G).frames(), stage.domain(G).version());
            assert_eq!(after, before, "{name}: page {nth}");
            assert_eq!(stage.audit(), []);
            let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RO);
            assert_eq!(item.status, GrantStatus::OKAY, "the table still works");
            let status = stage.unmap_on(0, item.handle, stage.place(0), 0);
            assert_eq!(status, GrantStatus::OKAY);
            stage.faults().clear();
            assert!(act(&stage), "{name}: again");
            stage.finish();
        }
        assert!(refusals >= 3, "{name}");
    }
}

/// XSA-26: a domain that cannot be created is not there, and what it had is free.
#[test]
fn xsa_26_a_creation_that_fails_leaves_nothing() {
    let machine = gnttab_engine::machine::Machine::new();
    let engine = Engine::new(machine.clone(), Config::default());
    let guest = machine.add_domain(DomId(1), DomainKind::Pv).unwrap();
    machine.set_shortage(true);
    let made = engine.create_domain(DomId(1), DomainKind::Pv, Limits::default(), guest);
    assert!(made.is_err());
    machine.set_shortage(false);
    assert_eq!(engine.domains().count(), 0);
    assert_eq!(machine.audit_idle(), []);
    let guest = machine
        .add_domain(DomId(1), DomainKind::Pv)
        .expect("nothing is left of it");
    let made = engine.create_domain(DomId(1), DomainKind::Pv, Limits::default(), guest);
    assert!(made.is_ok());
    assert_eq!(machine.audit_with(&engine), []);
}

/// XSA-235, N-49: no refusal of a placement keeps the table's lock, and no index wraps.
#[test]
fn xsa_235_a_refused_placement_lets_go_of_the_table() {
    for kind in [DomainKind::Hvm, DomainKind::Arm] {
        let builder = Scene::pv()
            .kind(C, kind)
            .limits(C, |limits| limits.grant_frames = Some(4));
        let stage = Stage::new(builder);
        for (idx, gfn, errno) in [
            (4, 0x300, Errno::Inval),
            (u64::from(u32::MAX), 0x300, Errno::Inval),
            (STATUS, 0x300, Errno::Inval),
            (STATUS | 3, 0x300, Errno::Inval),
            (0, u64::MAX, Errno::Inval),
            (0, 1 << 40, Errno::Inval),
        ] {
            assert_eq!(place(&stage, 0, idx, gfn), Err(errno), "{idx:#x} at {gfn:#x}");
            assert_eq!(stage.audit(), []);
        }
        stage
            .faults()
            .fail_nth(1, |request| matches!(request, Request::PlaceTablePage { .. }));
        assert_eq!(place(&stage, 0, 0, 0x300), Err(Errno::NoMem));
        assert_eq!(stage.audit(), []);
        stage.set_version(C, 2).unwrap();
        for idx in [STATUS | 1, STATUS | 0x7FFF_FFFF, STATUS | (1 << 29)] {
            assert_eq!(place(&stage, 0, idx, 0x300), Err(Errno::Inval), "{idx:#x}");
        }
        assert_eq!(place(&stage, 0, 3, 0x300), Ok(()));
        stage.grant(C, LOW, G, stage.local[0], NONE);
        let item = stage.map_on((G, 0), (C, LOW), stage.place(0), RO);
        assert_eq!(item.status, GrantStatus::OKAY, "its table is free for others");
        let status = stage.unmap_as((G, 0), item.handle, stage.place(0), 0);
        assert_eq!(status, GrantStatus::OKAY);
        stage.finish();
    }
}

/// XSA-255, XSA-268: while anybody can reach a status frame, there is no way back to version 1, and
/// refused, everything of version 2 works.
#[test]
fn xsa_255_a_status_frame_that_is_mapped_keeps_version_2() {
    for last in [false, true] {
        for held_by_tool in [false, true] {
            let stage = Stage::v2();
            assert_eq!(grow(&stage, G, 17), GrantStatus::OKAY);
            let index = if last { 2 } else { 0 };
            let mfn = stage.domain(G).status_frame(index).unwrap().mfn();
            let at = stage.place(50);
            let pte = Pte::new(mfn, Pte::PRESENT | Pte::USER | Pte::WRITABLE);
            if held_by_tool {
                assert!(stage.machine.hold(mfn));
            } else {
                assert!(stage.guest(G, |guest| guest.write_pte(at, pte)));
            }
            assert_eq!(stage.set_version(G, 1), Err(Errno::Busy));
            assert_eq!(stage.domain(G).version(), Version::V2);
            assert_eq!(stage.domain(G).frames(), (17, 3));
            for index in 0..3 {
                let mfn = stage.domain(G).status_frame(index).unwrap().mfn();
                let info = stage.machine.frame(mfn).unwrap();
                assert_eq!(info.owner, PageOwner::Domain(G), "status frame {index}");
            }
            let handle = stage.mapped(0, LOW, 0, RW);
            assert_eq!(stage.marks(G, LOW), EntryFlags::IN_USE, "the status words work");
            assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
            if held_by_tool {
                stage.machine.let_go(mfn);
            } else {
                assert!(stage.guest(G, |guest| guest.write_pte(at, Pte::default())));
            }
            assert_eq!(stage.set_version(G, 1), Ok(()));
            stage.finish();
        }
    }
}

/// XSA-255, XSA-268: the same for a translated domain: placed frames are taken out, frames that a tool
/// maps stop it, and what the shared frames' places are told apart from the status frames'.
#[test]
fn xsa_268_a_translated_domain_goes_back_with_no_place_left() {
    for kind in [DomainKind::Hvm, DomainKind::Arm] {
        let stage = Stage::new(Scene::pv().kind(C, kind).version(C, Version::V2));
        assert_eq!(grow(&stage, C, 9), GrantStatus::OKAY);
        let frame = |index, status: bool| {
            let domain = stage.domain(C);
            let page = if status {
                domain.status_frame(index)
            } else {
                domain.shared_frame(index)
            };
            page.unwrap().mfn()
        };
        let (shared, status) = (frame(0, false), frame(0, true));
        assert_eq!(place(&stage, 0, 0, 0x300), Ok(()));
        assert_eq!(place(&stage, 0, STATUS, 0x301), Ok(()));
        assert_eq!(place(&stage, 0, STATUS | 1, 0x302), Ok(()));
        assert_eq!(
            (places(&stage, shared), places(&stage, status)),
            (vec![0x300], vec![0x301])
        );
        assert!(stage.machine.hold(frame(1, true)));
        assert_eq!(stage.set_version(C, 1), Err(Errno::Busy));
        assert_eq!(places(&stage, status), [0x301], "back where it was");
        assert_eq!(stage.domain(C).version(), Version::V2);
        stage.machine.let_go(frame(1, true));
        assert_eq!(stage.set_version(C, 1), Ok(()));
        assert_eq!(
            (places(&stage, shared), places(&stage, status)),
            (vec![0x300], vec![])
        );
        stage.finish();
    }
}

/// XSA-268: a version that a domain may not have is refused at the front door, and nothing of it is
/// there.
#[test]
fn xsa_268_a_version_that_is_not_allowed_is_refused() {
    let builder = Scene::pv().limits(G, |limits| limits.version = Version::V1);
    let stage = Stage::new(builder);
    assert_eq!(stage.set_version(G, 2), Err(Errno::NoSys));
    assert_eq!(stage.set_version(G, 3), Err(Errno::Inval));
    assert_eq!(stage.set_version(G, 0), Err(Errno::Inval));
    let mut cpu = stage.processor();
    let vcpu = stage.vcpu(G, 0);
    assert_eq!(cpu.get_version(&vcpu, DomId::SELF), Ok(Version::V1));
    let status = cpu.get_status_frames(&vcpu, DomId::SELF, 1, None, &mut |_, _| true);
    assert_eq!(status, GrantStatus::GENERAL_ERROR);
    let control = stage.vcpu(P, 0);
    let resource = gnttab_engine::TableResource::Status;
    let got = cpu.acquire_frames(&control, G, resource, 0, 1, &mut |_, _| Ok(()));
    assert_eq!(got, Err(Errno::Inval));
    drop((cpu, vcpu, control));
    stage.finish();
}

/// XSA-379: two placements of one frame at the same time: it ends at one place, the other is free.
#[test]
fn xsa_379_a_frame_ends_at_one_place() {
    let stage = Stage::new(Scene::hvm().version(C, Version::V2));
    let mfn = stage.domain(C).status_frame(0).unwrap().mfn();
    for round in 0..4 {
        let (x, y) = (0x300 + round, 0x400 + round);
        let first = stage.stop(Hook::PlaceFrame, move |stage| place(stage, 0, STATUS, x));
        let second = stage.spawn(move |stage| place(stage, 1, STATUS, y));
        let_run(&second);
        assert!(!second.is_finished(), "one at a time");
        assert_eq!(first.go(), Ok(()));
        assert_eq!(second.join().unwrap(), Ok(()));
        let found = places(&stage, mfn);
        assert_eq!(found.len(), 1, "{found:x?}");
        assert!(found[0] == x || found[0] == y);
        assert_eq!(stage.audit(), []);
    }
    stage.set_version(C, 1).unwrap();
    assert_eq!(places(&stage, mfn), []);
    stage.finish();
}

/// XSA-384, XSA-486: a placement stopped between knowing the frame and inserting it, against the way
/// back to version 1: one is refused, or they come one after the other.
#[test]
fn xsa_384_no_placement_outlives_the_frame() {
    let stage = Stage::new(Scene::hvm().version(C, Version::V2));
    let mfn = stage.domain(C).status_frame(0).unwrap().mfn();
    let placing = stage.stop(Hook::PlaceFrame, |stage| place(stage, 0, STATUS, 0x300));
    let version = stage.spawn(|stage| stage.set_version(C, 1));
    let_run(&version);
    let placed = placing.go();
    let changed = version.join().unwrap();
    assert_eq!(stage.audit(), []);
    assert!(placed.is_ok() || changed.is_ok());
    assert!(
        changed.is_err() || places(&stage, mfn).is_empty(),
        "a place of a frame that is gone"
    );
    assert_eq!(stage.domain(C).version() == Version::V1, changed.is_ok());
    stage.finish();
}

/// XSA-486: the mirror image: the change of version stopped after its checks, against a placement.
#[test]
fn xsa_486_no_placement_slips_into_the_way_back() {
    let stage = Stage::new(Scene::hvm().version(C, Version::V2));
    let mfn = stage.domain(C).status_frame(0).unwrap().mfn();
    for placed_before in [false, true] {
        if placed_before {
            assert_eq!(place(&stage, 0, STATUS, 0x310), Ok(()));
        }
        let changing = stage.stop(Hook::VersionChecked, |stage| stage.set_version(C, 1));
        let placing = stage.spawn(|stage| place(stage, 0, STATUS, 0x300));
        let_run(&placing);
        let changed = changing.go();
        let placed = placing.join().unwrap();
        assert_eq!(stage.audit(), []);
        let live = !places(&stage, mfn).is_empty();
        assert_ne!(changed.is_ok(), live, "changed {changed:?}, placed {placed:?}");
        assert_eq!(stage.set_version(C, 2), Ok(()));
    }
    stage.finish();
}

/// XSA-501: a map that fails late in an entry that survives a change of version rolls back in the
/// table as it is then.
#[test]
fn xsa_501_a_late_failure_rolls_back_in_the_table_that_is() {
    for gref in [LOW, HIGH] {
        let stage = Stage::v2();
        stage.grant(G, gref, C, stage.frame, NONE);
        stage
            .faults()
            .fail_nth(1, |request| matches!(request, Request::MapHost { .. }));
        let mapping = stage.stop(Hook::MapUnwind, move |stage| {
            stage.map_on((C, 0), (G, gref), stage.place(0), RW).status
        });
        let version = stage.spawn(|stage| stage.set_version(G, 1));
        let_run(&version);
        assert_eq!(mapping.go(), GrantStatus::GENERAL_ERROR);
        let changed = version.join().unwrap();
        assert!(changed == Ok(()) || changed == Err(Errno::Busy), "{changed:?}");
        assert_eq!(stage.marks(G, gref), NONE);
        assert_eq!(stage.pins(G, gref), [0; 4]);
        if changed.is_ok() && gref == LOW {
            assert_eq!(
                stage.flags(G, gref),
                EntryFlags::PERMIT_ACCESS,
                "it survived, unmarked"
            );
        }
        stage.finish();
    }
}

/// XSA-501: a page was promised to a slot of the upper half, which version 2 does not have any more.
#[test]
fn xsa_501_a_slot_that_is_gone_is_not_written() {
    let stage = Stage::pv();
    let slot = GrantRef(300);
    stage.accept(G, slot, C, 0x77);
    let mfn = stage.local[0].mfn;
    let (before, given) = (stage.guest(G, |g| g.pages()), stage.guest(C, |c| c.pages()));
    stage.meanwhile(Hook::TransferCommitted, |stage| {
        assert_eq!(stage.set_version(G, 2), Ok(()));
    });
    assert_eq!(stage.transfer_as(C, mfn, G, slot), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.guest(G, |g| g.pages()), before + 1, "accounted once");
    assert_eq!(stage.guest(C, |c| c.pages()), given - 1);
    let domain = stage.domain(G);
    let words: &gnttab_engine::PageWords = domain.shared_frame(0).unwrap().as_ref();
    let reserved = 8 * 16;
    let bytes = words.read_bytes::<4096>(0).unwrap();
    assert!(
        bytes[reserved..].iter().all(|byte| *byte == 0),
        "nothing was written to the new table"
    );
    let words: &gnttab_engine::PageWords = domain.status_frame(0).unwrap().as_ref();
    assert_eq!(words.read_bytes::<4096>(0), Some([0; 4096]));
    drop(domain);
    stage.finish();
}

/// XSA-501: nor one whose meaning has changed with the version.
#[test]
fn xsa_501_a_slot_of_another_version_is_not_written() {
    let stage = Stage::v2();
    let slot = GrantRef(12);
    stage.accept(G, slot, C, 0x77);
    stage.meanwhile(Hook::TransferCommitted, |stage| {
        assert_eq!(stage.set_version(G, 1), Ok(()));
    });
    let status = stage.transfer_as(C, stage.local[0].mfn, G, slot);
    assert_eq!(status, GrantStatus::GENERAL_ERROR);
    let domain = stage.domain(G);
    let words: &gnttab_engine::PageWords = domain.shared_frame(0).unwrap().as_ref();
    let bytes = words.read_bytes::<4096>(0).unwrap();
    assert!(bytes[8 * 8..].iter().all(|byte| *byte == 0));
    drop(domain);
    stage.finish();
}

/// XSA-501: a copy that depends on version 2 keeps it, in whatever entry and wherever it is.
#[test]
fn xsa_501_a_copy_that_depends_on_version_2_keeps_it() {
    let copy = |stage: &Stage, gref| {
        let dest = CopyPtr::frame(stage.local[0].gfn.0, 0);
        stage.copy_on((C, 0), CopyPtr::grant(G, gref, 0), dest, CopyFlags::SOURCE_GREF)
    };
    for gref in [LOW, HIGH] {
        for (transitive, hook) in [
            (true, Hook::CopyUnlocked),
            (true, Hook::CopyBack),
            (true, Hook::CopyMapped),
            (false, Hook::CopyMapped),
        ] {
            let stage = Stage::v2();
            if transitive {
                stage.pass_on(gref, NONE);
            } else {
                stage.grant_part(gref, 0, 64);
            }
            let copying = stage.stop(hook, move |stage| copy(stage, gref));
            // Its entry's own type forbids the way back of a reserved transitive one as well.
            if transitive && gref == LOW {
                stage.set_v2(G, GrantRef(7), EntryV2::default());
            }
            let refused = stage.set_version(G, 1);
            let pinned = hook == Hook::CopyMapped && gref == HIGH;
            let errno = if pinned { Errno::Busy } else { Errno::Again };
            assert_eq!(refused, Err(errno), "{gref} {hook:?}");
            assert_eq!(stage.domain(G).version(), Version::V2);
            assert_eq!(copying.go(), GrantStatus::OKAY);
            stage.set_v2(G, gref, EntryV2::default());
            assert_eq!(
                stage.set_version(G, 1),
                Ok(()),
                "{gref} {hook:?}: and then it works"
            );
            stage.finish();
        }
    }
}

/// XSA-501: an unmap of a reserved entry goes on after the version has changed, and back.
#[test]
fn xsa_501_an_unmap_goes_on_in_the_other_version() {
    for (from, to) in [(1, 2), (2, 1)] {
        for back in [false, true] {
            for hook in [Hook::UnmapPass1, Hook::UnmapFlushed] {
                let version = Version::from_number(from).unwrap();
                let stage = Stage::new(Scene::pv().version(G, version));
                let handle = stage.mapped(1, LOW, 0, RW);
                let at = stage.place(0);
                // At the first hook the granter's table is still entered: the change has to wait.
                let unmapping = stage.stop(hook, move |stage| stage.unmap_on(0, handle, at, 0));
                let changing = stage.spawn(move |stage| {
                    stage.set_version(G, to).unwrap();
                    if back {
                        stage.set_version(G, from).unwrap();
                    }
                });
                let_run(&changing);
                if hook == Hook::UnmapFlushed {
                    changing.join().unwrap();
                    assert_eq!(stage.marks(G, LOW), EntryFlags::IN_USE, "the marks came along");
                    assert_eq!(unmapping.go(), GrantStatus::OKAY);
                } else {
                    assert_eq!(unmapping.go(), GrantStatus::OKAY);
                    changing.join().unwrap();
                }
                assert_eq!(stage.pins(G, LOW), [0; 4]);
                assert_eq!(stage.marks(G, LOW), NONE);
                stage.finish();
            }
        }
    }
}

/// N-09: the version in force can be asked for with entries in use; two that switch in opposite
/// directions come one after the other.
#[test]
fn n_09_the_version_in_force_is_compared_under_the_lock() {
    let stage = Stage::v2();
    stage.grant(G, HIGH, C, stage.frame, NONE);
    let handle = stage.mapped(0, HIGH, 0, RW);
    assert_eq!(stage.set_version(G, 2), Ok(()));
    assert_eq!(stage.set_version(G, 1), Err(Errno::Busy));
    assert_eq!(stage.domain(G).version(), Version::V2);
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    for _ in 0..5 {
        let down = stage.stop(Hook::VersionChecked, |stage| {
            stage.processor().set_version(&stage.vcpu(G, 0), 1)
        });
        let up = stage.spawn(|stage| stage.processor().set_version(&stage.vcpu(G, 1), 2));
        let_run(&up);
        assert_eq!(down.go(), Ok(()));
        assert_eq!(up.join().unwrap(), Ok(()));
        // "2" was asked for while 2 was in force or after it was not: either order ends in one of them.
        let version = stage.domain(G).version();
        assert_eq!(version, Version::V2, "whoever came second found version 1");
        assert_eq!(stage.audit(), []);
    }
    stage.finish();
}

/// N-12, N-25: reserved entries of each kind survive; what does not fit stops the change, untouched.
#[test]
fn n_12_reserved_entries_survive_or_stop_the_change() {
    let stage = Stage::pv();
    let entries: [(u32, EntryFlags, DomId, u32); 4] = [
        (0, EntryFlags::PERMIT_ACCESS, P, 0x11),
        (1, EntryFlags::PERMIT_ACCESS | EntryFlags::READONLY, T, 0x22),
        (2, EntryFlags::ACCEPT_TRANSFER, C, 0x33),
        (7, EntryFlags::PERMIT_ACCESS, C, u32::MAX),
    ];
    for (gref, flags, domid, frame) in entries {
        let head = gnttab_abi::EntryHead { flags, domid };
        stage.set_v1(G, GrantRef(gref), EntryV1 { head, frame });
    }
    let handle = stage.mapped(0, LOW, 0, RW);
    let grants = |stage: &Stage| {
        [0, 1, 5, 7].map(|gref| {
            let words = stage.entry(G, GrantRef(gref));
            (words.flags(), words.domid())
        })
    };
    let before = grants(&stage);
    assert_eq!(stage.set_version(G, 2), Ok(()));
    assert_eq!(grants(&stage), before);
    assert_eq!(stage.marks(G, LOW), EntryFlags::IN_USE);
    // A frame that version 1 cannot name, and what it does not know at all.
    let page = gnttab_engine::machine::Page {
        gfn: Gfn(1 << 32),
        mfn: Mfn(1 << 32),
    };
    stage.grant(G, GrantRef(6), C, page, NONE);
    let whole = stage.entry(G, GrantRef(6));
    assert_eq!(stage.set_version(G, 1), Err(Errno::Range));
    assert_eq!((stage.entry(G, GrantRef(6)), grants(&stage)), (whole, before));
    stage.pass_on(GrantRef(6), NONE);
    assert_eq!(
        stage.set_version(G, 1),
        Err(Errno::Range),
        "XSA-226: a transitive entry"
    );
    assert_eq!(stage.domain(G).version(), Version::V2);
    stage.set_v2(G, GrantRef(6), EntryV2::default());
    assert_eq!(stage.set_version(G, 1), Ok(()));
    assert_eq!(grants(&stage), before);
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    assert_eq!(stage.marks(G, LOW), NONE);
    stage.finish();
}

/// N-28: the number of status frames, while the table grows: what is reported is there.
#[test]
fn n_28_status_frames_that_are_reported_are_there() {
    let stage = Stage::v2();
    let report = |stage: &Stage, frames| {
        let mut seen = Vec::new();
        let mut cpu = stage.processor();
        let status = cpu.get_status_frames(&stage.vcpu(G, 1), DomId::SELF, frames, None, &mut |_, gfn| {
            seen.push(gfn);
            true
        });
        (status, seen.len())
    };
    // Growth publishes status frames first, then the frames that need them.
    let grower = stage.stop(Hook::Grow, |stage| grow(stage, G, 9));
    let asker = stage.spawn(move |stage| report(stage, 2));
    let_run(&asker);
    assert_eq!(grower.go(), GrantStatus::OKAY);
    let (status, seen) = asker.join().unwrap();
    assert!(
        (status, seen) == (GrantStatus::OKAY, 2) || (status, seen) == (GrantStatus::GENERAL_ERROR, 0),
        "{status:?} {seen}"
    );
    assert_eq!(report(&stage, 2), (GrantStatus::OKAY, 2));
    assert_eq!(report(&stage, 3), (GrantStatus::GENERAL_ERROR, 0));
    stage.finish();
}

/// VER-5: an entry beyond the old end is found only once everything behind it is there.
#[test]
fn ver_5_no_entry_is_found_before_its_storage() {
    for version in [Version::V1, Version::V2] {
        let stage = Stage::new(Scene::pv().version(G, version));
        let per_page = if version == Version::V1 { 512 } else { 256 };
        let beyond = GrantRef(per_page + 3);
        let grower = stage.stop(Hook::Grow, |stage| grow(stage, G, 2));
        let item = stage.map_on((C, 0), (G, beyond), stage.place(0), RO);
        assert_eq!(item.status, GrantStatus::BAD_GNTREF);
        assert_eq!(stage.domain(G).frames().0, 1);
        assert_eq!(grower.go(), GrantStatus::OKAY);
        stage.grant(G, beyond, C, stage.frame, NONE);
        let item = stage.map_on((C, 0), (G, beyond), stage.place(0), RO);
        assert_eq!(item.status, GrantStatus::OKAY);
        stage.finish();
    }
}

/// N-40: a place that the guest has put to another use is not touched when the frame moves on.
#[test]
fn n_40_what_the_guest_put_in_an_old_place_stays() {
    let stage = Stage::new(Scene::hvm());
    assert_eq!(place(&stage, 0, 0, 0x300), Ok(()));
    assert!(stage.guest(C, |guest| guest.set_physmap(Gfn(0x300), None)));
    let ram = stage.guest(C, |guest| guest.add_page()).unwrap();
    stage.guest(C, |guest| {
        assert!(guest.set_physmap(ram.gfn, None));
        assert!(guest.set_physmap(Gfn(0x300), Some(P2mEntry::Ram(ram.mfn))));
    });
    assert_eq!(place(&stage, 0, 0, 0x301), Ok(()));
    let there = stage.guest(C, |guest| guest.physmap(Gfn(0x300)));
    assert_eq!(
        there,
        Some(P2mEntry::Ram(ram.mfn)),
        "RAM at the old place survives"
    );
    let table = stage.domain(C).shared_frame(0).unwrap().mfn();
    assert_eq!(places(&stage, table), [0x301]);
    assert_eq!(place(&stage, 0, 0, 0x302), Ok(()), "and once more");
    assert_eq!(places(&stage, table), [0x302]);
    stage.finish();
}
