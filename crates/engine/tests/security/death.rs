//! The end of domains (group H): each handle once, each page until its last use, in any order.

use gnttab_abi::{DomId, EntryFlags, Errno, Gfn, GrantRef, GrantStatus};
use gnttab_engine::machine::{C, G, P, PageOwner, Scene, T};
use gnttab_engine::{DomainKind, Engine, GuestMemory, Hook, Release, Retired, Vcpu, Version};

use crate::stage::{BOTH, DEV_RO, HIGH, Hv, LOW, RO, RW, Stage};

const NONE: EntryFlags = EntryFlags::empty();
/// An entry that passes a grant on.
const FAR: GrantRef = GrantRef(6);

fn die(stage: &Stage, id: DomId) -> Vec<Vcpu<Hv>> {
    stage.guest(id, |guest| guest.set_dying());
    let domain = stage.domain(id);
    stage.engine.begin_teardown(&domain);
    let count = domain.limits().vcpus;
    (0..count).map(|number| stage.vcpu(id, number)).collect()
}

/// XSA-380, TDN-1: thousands of mappings are released in steps of any size, each once, from the top
/// down, each step within its budget; a granter that dies as well does not disturb it.
#[test]
fn xsa_380_a_dead_grantee_lets_go_step_by_step() {
    for (budget, granter_dies) in [(1, false), (7, true), (300, false), (u32::MAX, true)] {
        let stage = Stage::pv();
        let mut made = 0_u32;
        for n in 0..5_u32 {
            let gref = GrantRef(30 + n);
            stage.grant(G, gref, C, stage.frame, NONE);
            for _ in 0..100 {
                let item = stage.map_on((C, 0), (G, gref), 0, DEV_RO);
                assert_eq!(item.status, GrantStatus::OKAY);
                made += 1;
            }
        }
        let vcpus = die(&stage, C);
        if granter_dies {
            die(&stage, G);
        }
        let (mut released, mut steps) = (0, 0);
        loop {
            let live = stage.domain(C).mappings().count();
            let items = u64::from(budget).min(600);
            let done = stage.counted(items, || stage.processor().release_mappings(&vcpus, budget));
            let (Release::More { released: now } | Release::Done { released: now }) = done else {
                panic!("it is dying, and everybody is here");
            };
            assert!(now <= budget);
            let left = stage.domain(C).mappings().count();
            assert_eq!(live - left, now as usize, "each once");
            released += now;
            steps += 1;
            let top = stage.domain(C).mappings().map(|mapping| mapping.handle.0).max();
            assert!(top.is_none_or(|top| u64::from(top) < 512_u64.saturating_sub(u64::from(budget) * steps)));
            if matches!(done, Release::Done { .. }) {
                break;
            }
        }
        assert_eq!(released, made);
        for n in 0..5 {
            assert_eq!(stage.pins(G, GrantRef(30 + n)), [0; 4]);
            assert_eq!(stage.marks(G, GrantRef(30 + n)), NONE);
        }
        drop(vcpus);
        stage.finish();
    }
}

/// XSA-147: three that let go of one frame at once: the granter's death, the last unmap, and its removal
/// from the granter; it is freed once.
#[test]
fn xsa_147_a_frame_is_freed_once() {
    for hook in [Hook::UnmapPass1, Hook::UnmapFlushed] {
        for kind in [DomainKind::Pv, DomainKind::Arm] {
            let builder = if kind == DomainKind::Arm {
                Scene::arm()
            } else {
                Scene::pv()
            };
            let stage = Stage::new(builder);
            let (at, mfn) = (stage.place(0), stage.frame.mfn);
            let handle = stage.mapped(0, LOW, 0, RW);
            let unmapping = stage.stop(hook, move |stage| stage.unmap_on(0, handle, at, 0));
            drop(die(&stage, G));
            stage.guest(G, |guest| guest.give_up(mfn));
            stage.guest(G, |guest| guest.drop_address_space());
            stage.guest(G, |guest| guest.give_up_memory());
            if kind == DomainKind::Arm || hook == Hook::UnmapFlushed {
                assert_ne!(stage.machine.frame(mfn).unwrap().owner, PageOwner::Free);
            }
            assert_eq!(unmapping.go(), GrantStatus::OKAY);
            assert_eq!(stage.machine.frame(mfn).unwrap().owner, PageOwner::Free);
            assert_eq!(stage.machine.audit(), [], "{kind:?} {hook:?}");
            stage.finish();
        }
    }
}

/// T-TDN1: the grantee is to die while one of its calls is stopped at any hook: nothing is released
/// before the call is over, and then everything is.
#[test]
fn tdn_1_a_grantee_dies_in_the_middle_of_anything() {
    type Act = fn(&Stage) -> GrantStatus;
    let map: Act = |stage| stage.map_on((C, 0), (G, HIGH), stage.place(0), RW).status;
    let unmap: Act = |stage| {
        let handle = stage.domain(C).mappings().next().unwrap().handle;
        stage.unmap_on(0, handle, stage.place(1), stage.frame.mfn.address())
    };
    let copy: Act = |stage| stage.copy_grant(0, HIGH, true);
    let far: Act = |stage| {
        stage.pass_on(FAR, NONE);
        stage.copy_grant(0, FAR, false)
    };
    let cases: [(Act, &[Hook]); 4] = [
        (
            map,
            &[
                Hook::HandlePeek,
                Hook::ClaimMarked,
                Hook::MapValidated,
                Hook::MapPinned,
                Hook::MapPublish,
            ],
        ),
        (unmap, &[Hook::UnmapPass1, Hook::UnmapFlushed]),
        (copy, &[Hook::ClaimMarked, Hook::CopyMapped]),
        (far, &[Hook::CopyUnlocked, Hook::CopyBack, Hook::CopyMapped]),
    ];
    for (act, hooks) in cases {
        for hook in hooks {
            let stage = Stage::v2();
            stage.grant(G, HIGH, C, stage.frame, NONE);
            stage.mapped(1, LOW, 1, BOTH);
            let acting = stage.stop(*hook, act);
            stage.guest(C, |guest| guest.set_dying());
            stage.engine.begin_teardown(&stage.domain(C));
            // Whoever has not got all its vCPUs cannot release anything.
            let one = [stage.vcpu(C, 2)];
            let early = stage.processor().release_mappings(&one, 100);
            assert_eq!(early, Release::StillRunning);
            drop(one);
            acting.go();
            stage.kill(C);
            for gref in [LOW, HIGH] {
                assert_eq!(
                    (stage.pins(G, gref), stage.marks(G, gref)),
                    ([0; 4], NONE),
                    "{hook:?}"
                );
            }
            assert_eq!(
                (stage.pins(T, GrantRef(9)), stage.marks(T, GrantRef(9))),
                ([0; 4], NONE)
            );
            // The granter can use the entry again.
            stage.grant(G, HIGH, T, stage.frame, NONE);
            let item = stage.map_on((T, 0), (G, HIGH), stage.place(0), RW);
            assert_eq!(item.status, GrantStatus::OKAY);
            stage.finish();
        }
    }
}

/// T-TDN2, XSA-236: the granter dies under a mapping: the page is there, with its content, until the
/// grantee has unmapped; nothing new begins; only then the granter goes.
#[test]
fn tdn_2_a_dead_granters_page_lasts_as_long_as_its_mapping() {
    for kind in [DomainKind::Pv, DomainKind::Hvm] {
        let stage = Stage::new(Scene::pv().kind(C, kind));
        stage.fill(stage.frame, 0x77);
        let handle = stage.mapped(0, LOW, 0, RW);
        assert_eq!(stage.kill(G), Retired::Held);
        stage
            .guest(C, |guest| guest.write(stage.place(0) + 8, b"still"))
            .unwrap();
        assert_eq!(stage.bytes(stage.frame), [0x77; 8]);
        assert_eq!(stage.machine.audit(), []);
        stage.grant(G, HIGH, C, stage.frame2, NONE);
        let new = stage.map_on((C, 0), (G, HIGH), stage.place(1), RW);
        assert_ne!(new.status, GrantStatus::OKAY, "TDN-3");
        assert!(
            stage.machine.add_domain(G, DomainKind::Pv).is_err(),
            "its number is taken"
        );
        assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
        assert!(stage.engine.domain(G).is_none() || stage.engine.retire(G) == Retired::Gone);
        assert_eq!(
            stage.machine.frame(stage.frame.mfn).unwrap().owner,
            PageOwner::Free
        );
        stage.finish();
    }
}

/// T-TDN3, XSA-322, XSA-325: a chain over three domains, in use or not, dies in any order.
#[test]
fn tdn_3_a_chain_of_three_dies_in_any_order() {
    let orders = [[G, C, T], [G, T, C], [C, G, T], [C, T, G], [T, G, C], [T, C, G]];
    for order in orders {
        for kind in [DomainKind::Pv, DomainKind::Hvm] {
            let builder = Scene::pv()
                .kind(C, kind)
                .version(G, Version::V2)
                .version(T, Version::V2);
            let stage = Stage::new(builder);
            stage.pass_on(HIGH, NONE);
            stage.mapped(0, LOW, 0, RW);
            stage.grant(T, GrantRef(11), G, stage.far, NONE);
            let item = stage.map_on((G, 0), (T, GrantRef(11)), stage.place(0), RO);
            assert_eq!(item.status, GrantStatus::OKAY);
            stage.grant(C, GrantRef(11), T, stage.local[0], NONE);
            let item = stage.map_on((T, 0), (C, GrantRef(11)), stage.place(0), RO);
            assert_eq!(item.status, GrantStatus::OKAY);
            let [a, b, c] = order;
            stage.finish_in([a, b, c, P]);
        }
    }
}

/// T-TDN3: the domains of a copy die while it is under way, the far one too; it ends, and they go.
#[test]
fn tdn_3_the_domains_of_a_copy_die_under_it() {
    for victim in [G, T] {
        for hook in [Hook::CopyUnlocked, Hook::CopyBack, Hook::CopyMapped] {
            let stage = Stage::v2();
            stage.pass_on(HIGH, NONE);
            stage.fill(stage.far, 0x31);
            let copying = stage.stop(hook, |stage| stage.copy_grant(0, HIGH, false));
            let end = stage.kill(victim);
            let held = (hook == Hook::CopyMapped) || (hook == Hook::CopyBack && victim == T);
            assert_eq!(end == Retired::Held, held, "{victim} at {hook:?}");
            let status = copying.go();
            let copied = stage.bytes(stage.local[0]);
            assert!(
                status != GrantStatus::OKAY || copied == [0x31; 8],
                "{victim} at {hook:?}: {status:?} {copied:x?}"
            );
            assert_eq!(stage.machine.audit(), []);
            assert!(
                stage.engine.domain(victim).is_none(),
                "{victim} at {hook:?}: gone"
            );
            stage.finish();
        }
    }
}

/// T-TDN4: a soft reset with grants in use names them, revokes none, and the table goes on working.
#[test]
fn tdn_4_a_soft_reset_names_what_is_in_use() {
    let stage = Stage::v2();
    stage.grant(G, HIGH, C, stage.frame2, NONE);
    let one = stage.mapped(0, LOW, 0, RW);
    let two = stage.mapped(0, HIGH, 1, DEV_RO);
    let found = stage.processor().soft_reset(G).unwrap();
    assert_eq!(found.total, 2);
    let named: Vec<GrantRef> = found.entries.iter().map(|entry| entry.gref).collect();
    assert_eq!(named, [LOW, HIGH]);
    assert!(found.entries.iter().all(|entry| entry.user == Some(C)));
    assert_eq!(stage.unmap_on(0, one, stage.place(0), 0), GrantStatus::OKAY);
    let bus = stage.frame2.mfn.address();
    assert_eq!(stage.unmap_on(0, two, 0, bus), GrantStatus::OKAY);
    assert_eq!(stage.processor().soft_reset(G).unwrap().total, 0);
    assert!(stage.processor().soft_reset(DomId(77)).is_none());
    stage.finish();
}

/// N-02: domains with lists of records of every size come and go: the number of frames in use stays.
#[test]
fn n_02_records_of_any_number_go_with_their_domain() {
    let machine = gnttab_engine::machine::Machine::new();
    let engine = Engine::new(machine.clone(), gnttab_engine::Config::default());
    let create = |id: u16, limits: gnttab_engine::Limits| {
        let guest = machine.add_domain(DomId(id), DomainKind::Pv).unwrap();
        engine
            .create_domain(DomId(id), DomainKind::Pv, limits, guest)
            .unwrap()
    };
    let granter = create(1, gnttab_engine::Limits::default());
    let page = granter.private().add_page().unwrap();
    let words: &gnttab_engine::PageWords = granter.shared_frame(0).unwrap().as_ref();
    for gref in 0..8_usize {
        // permit_access, domain 2, the page.
        let frame = u32::try_from(page.gfn.0).unwrap().to_le_bytes();
        assert!(words.write(gref * 8, &[1, 0, 2, 0]));
        assert!(words.write(gref * 8 + 4, &frame));
    }
    let baseline = machine.frame(page.mfn).unwrap();
    for pages in 0..4_u32 {
        let limits = gnttab_engine::Limits {
            maptrack_frames: Some(pages),
            ..gnttab_engine::Limits::default()
        };
        let grantee = create(2, limits);
        let vcpu = Vcpu::take(&grantee, 0).unwrap();
        let mut items: Vec<_> = (0..8_u32)
            .flat_map(|gref| {
                (0..120).map(move |_| gnttab_abi::MapGrantRef {
                    flags: DEV_RO,
                    gref: GrantRef(gref),
                    dom: DomId(1),
                    ..gnttab_abi::MapGrantRef::default()
                })
            })
            .collect();
        let mut cpu = engine.any_processor().unwrap();
        cpu.map(&vcpu, &mut items);
        let live = items.iter().filter(|item| item.status.is_okay()).count();
        assert_eq!(live, (256 * pages as usize).saturating_sub(1).min(960));
        grantee.private().set_dying();
        engine.begin_teardown(&grantee);
        let vcpus = [vcpu];
        while let Release::More { .. } = cpu.release_mappings(&vcpus, 100) {}
        drop((vcpus, cpu));
        grantee.private().drop_address_space();
        grantee.private().give_up_memory();
        drop(grantee);
        assert_eq!(engine.retire(DomId(2)), Retired::Gone);
        assert_eq!(machine.frame(page.mfn).unwrap(), baseline);
        assert_eq!(machine.audit_with(&engine), []);
    }
}

/// N-48: who is refused because a domain dies leaves nothing with it.
#[test]
fn n_48_what_a_dying_domain_refuses_leaves_nothing() {
    let stage = Stage::pv();
    stage.accept(G, HIGH, C, 0x55);
    stage.guest(G, |guest| guest.set_dying());
    stage.engine.begin_teardown(&stage.domain(G));
    stage.guest(G, |guest| guest.give_up_memory());
    let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
    assert_eq!(item.status, GrantStatus::BAD_PAGE);
    assert_ne!(stage.copy_grant(0, LOW, false), GrantStatus::OKAY);
    let mfn = stage.local[1].mfn;
    assert_eq!(stage.transfer_as(C, mfn, G, HIGH), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.machine.frame(mfn).unwrap().owner, PageOwner::Free);
    assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
    assert_eq!(stage.audit(), []);
    stage.finish();

    // Nor does the placement of a frame that its table has.
    let stage = Stage::new(Scene::hvm());
    stage.guest(C, |guest| guest.set_dying());
    stage.engine.begin_teardown(&stage.domain(C));
    let placed = stage
        .processor()
        .place_frame(&stage.vcpu(C, 0), DomId::SELF, 0, Gfn(0x300));
    assert_eq!(placed, Err(Errno::Busy));
    assert_eq!(stage.audit(), [], "AUD-LCK");
    stage.finish();
}
