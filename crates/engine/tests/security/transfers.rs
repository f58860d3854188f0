//! Pages that change hands (group F): each is its sender's, its receiver's or free, never two of them.

use std::sync::{Arc, Mutex};

use gnttab_abi::{EntryFlags, Gfn, GrantRef, GrantStatus, Mfn};
use gnttab_engine::machine::{C, G, PageOwner, PageType, Request, Scene, T};
use gnttab_engine::{Access, DomainKind, GuestMemory, Hook, Hypervisor, Version};

use crate::stage::{HIGH, LOW, RW, Stage};

const DONE: EntryFlags = EntryFlags::TRANSFER_COMMITTED.union(EntryFlags::TRANSFER_COMPLETED);

/// XSA-214: a page that had a special use is what it was never used as, for its next owner.
#[test]
fn xsa_214_a_page_arrives_without_a_type() {
    for kind in [PageType::L1Table, PageType::Other] {
        let stage = Stage::pv();
        let mfn = stage.local[0].mfn;
        assert!(stage.guest(C, |guest| guest.use_as(mfn, kind)));
        stage.accept(G, HIGH, C, 0x55);
        assert_eq!(
            stage.transfer_as(C, mfn, G, HIGH),
            GrantStatus::BAD_PAGE,
            "in use"
        );
        assert_eq!(stage.machine.frame(mfn).unwrap().owner, PageOwner::Domain(C));
        assert_eq!(stage.flags(G, HIGH), EntryFlags::ACCEPT_TRANSFER);
        stage.guest(C, |guest| guest.stop_use(mfn));
        assert_eq!(stage.transfer_as(C, mfn, G, HIGH), GrantStatus::OKAY);
        let info = stage.machine.frame(mfn).unwrap();
        assert_eq!((info.owner, info.type_count), (PageOwner::Domain(G), 0));
        assert_eq!((info.references, info.allocated), (1, true));
        for other in [PageType::L1Table, PageType::Other] {
            assert!(stage.guest(G, |guest| guest.use_as(mfn, other)), "{other:?}");
            stage.guest(G, |guest| guest.stop_use(mfn));
        }
        stage.finish();
    }
}

/// XSA-217: a translated domain has no page to give; after a transfer no translation of the sender's is
/// left, before anybody else can have the page.
#[test]
fn xsa_217_no_stale_translation_of_a_page_that_was_given() {
    let stage = Stage::new(Scene::hvm());
    stage.accept(G, HIGH, C, 0x55);
    let status = stage.transfer_as(C, stage.local[0].mfn, G, HIGH);
    assert_eq!(status, GrantStatus::GENERAL_ERROR);
    let owner = stage.machine.frame(stage.local[0].mfn).unwrap().owner;
    assert_eq!(owner, PageOwner::Domain(C));
    stage.finish();
    let stage = Stage::pv();
    stage.accept(G, HIGH, C, 0x55);
    let before = stage.guest(C, |guest| guest.flushes());
    let inside = stage.clone();
    stage.machine.hooks().once(Hook::TransferStolen, move || {
        assert!(
            inside.guest(C, |guest| guest.flushes()) > before,
            "flushed by then"
        );
    });
    // The engine asks for the flush itself, whatever the taking of the page did.
    let first = Arc::new(Mutex::new(None));
    let note = Arc::clone(&first);
    stage.eye().after_each(
        |request| matches!(request, Request::Flush { grantee } if *grantee == C),
        move || {
            note.lock().unwrap().get_or_insert("flush");
        },
    );
    let note = Arc::clone(&first);
    stage.eye().after_each(
        |request| matches!(request, Request::Reserve { .. }),
        move || {
            note.lock().unwrap().get_or_insert("reserve");
        },
    );
    assert_eq!(
        stage.transfer_as(C, stage.local[0].mfn, G, HIGH),
        GrantStatus::OKAY
    );
    assert_eq!(
        *first.lock().unwrap(),
        Some("flush"),
        "before the receiver is consulted"
    );
    stage.finish();
}

/// XSA-222, N-36: each request of a transfer fails once: the page is its sender's, its receiver's or
/// free, and the status says which of them it can be.
#[test]
fn xsa_222_after_any_failure_the_page_is_somewhere() {
    let mut outcomes = std::collections::BTreeSet::new();
    for nth in 1.. {
        let stage = Stage::pv();
        stage.accept(G, HIGH, C, 0x55);
        let page = stage.guest(C, |guest| guest.add_page_at(Mfn(1 << 33))).unwrap();
        let (given, got) = (stage.guest(C, |c| c.pages()), stage.guest(G, |g| g.pages()));
        stage.faults().fail_nth(nth, |_| true);
        let status = stage.transfer_as(C, page.mfn, G, HIGH);
        let refused = stage.faults().refused() != 0;
        assert_eq!(status == GrantStatus::OKAY, !refused, "{nth}: {status:?}");
        let owner = stage.machine.frame(page.mfn).unwrap().owner;
        let (given, got) = (
            given - stage.guest(C, |c| c.pages()),
            stage.guest(G, |g| g.pages()) - got,
        );
        let flags = stage.flags(G, HIGH);
        match owner {
            PageOwner::Domain(C) => {
                let kept = matches!(status, GrantStatus::BAD_PAGE | GrantStatus::GENERAL_ERROR);
                assert!(kept && (given, got) == (0, 0), "{nth}: kept, {status:?}");
                assert_eq!(flags, EntryFlags::ACCEPT_TRANSFER);
            }
            PageOwner::Free => {
                assert_eq!(given, 1, "{nth}");
                assert!(got <= 1, "{nth}");
                // With a substitute it may have arrived all the same.
                assert_eq!(got == 1, flags.contains(EntryFlags::TRANSFER_COMPLETED), "{nth}");
            }
            other => panic!("{nth}: {other:?}"),
        }
        outcomes.insert((status.0, given, got));
        stage.finish();
        if !refused {
            break;
        }
    }
    assert!(outcomes.len() >= 4, "{outcomes:?}");
}

/// XSA-284, N-23: a page whose number is too large for its receiver arrives as another one with the
/// same content; the old one is nobody's; and all that is said is about the new one.
#[test]
fn xsa_284_a_substitute_is_the_page_from_then_on() {
    for (version, limit, number, replaced) in [
        (Version::V1, None, (1_u64 << 32) - 1, false),
        (Version::V1, None, 1 << 32, true),
        (Version::V1, None, 1 << 33, true),
        (Version::V2, None, 1 << 33, false),
        (Version::V2, Some(1_u64 << 31), (1 << 31) - 1, false),
        (Version::V2, Some(1 << 31), 1 << 31, true),
        (Version::V1, Some(1 << 31), 1 << 31, true),
    ] {
        let stage = Stage::new(Scene::pv().version(G, version).caller_iommu());
        if let Some(limit) = limit {
            stage.guest(G, |guest| guest.set_frame_limit(limit));
        }
        stage.accept(G, HIGH, C, 0x55);
        let page = stage.guest(C, |guest| guest.add_page_at(Mfn(number))).unwrap();
        stage.fill(page, 0x6B);
        let got = stage.guest(G, |guest| guest.pages());
        assert_eq!(stage.transfer_as(C, page.mfn, G, HIGH), GrantStatus::OKAY);
        assert_eq!(stage.guest(G, |guest| guest.pages()), got + 1);
        let told = match stage.entry(G, HIGH) {
            gnttab_engine::EntryWords::V1(entry) => u64::from(entry.frame),
            gnttab_engine::EntryWords::V2(entry, _) => entry.frame,
        };
        assert_eq!(told != number, replaced, "{number:#x}: told {told:#x}");
        let info = stage.machine.frame(Mfn(told)).unwrap();
        assert_eq!(info.owner, PageOwner::Domain(G));
        assert_eq!((info.references, info.allocated), (1, true));
        assert_eq!(info.physical, Gfn(0x55));
        let page = gnttab_engine::machine::Page {
            gfn: Gfn(told),
            mfn: Mfn(told),
        };
        assert_eq!(stage.bytes(page), [0x6B; 8]);
        if replaced {
            assert_eq!(stage.machine.frame(Mfn(number)).unwrap().owner, PageOwner::Free);
        }
        assert!(stage.flags(G, HIGH).contains(DONE));
        stage.finish();
    }
    // No page to be had below the limit: the old one is gone, as every error but bad_page says.
    let stage = Stage::pv();
    stage.accept(G, HIGH, C, 0x55);
    let page = stage.guest(C, |guest| guest.add_page_at(Mfn(1 << 32))).unwrap();
    stage.machine.set_low_shortage(true);
    assert_eq!(
        stage.transfer_as(C, page.mfn, G, HIGH),
        GrantStatus::ADDRESS_TOO_BIG
    );
    stage.machine.set_low_shortage(false);
    assert_eq!(stage.machine.frame(page.mfn).unwrap().owner, PageOwner::Free);
    assert_eq!(stage.flags(G, HIGH), EntryFlags::ACCEPT_TRANSFER);
    stage.finish();
}

/// XSA-287: while the page is on its way nobody can take hold of it, and its sender can neither free
/// nor give it again.
#[test]
fn xsa_287_nobody_takes_hold_of_a_page_on_its_way() {
    for hook in [Hook::TransferStolen, Hook::TransferCommitted] {
        let stage = Stage::pv();
        stage.accept(G, HIGH, C, 0x55);
        stage.accept(T, HIGH, C, 0x56);
        let page = stage.local[0];
        // Granted by its sender; somebody tries to use the grant meanwhile.
        stage.grant(C, LOW, T, page, EntryFlags::empty());
        stage.meanwhile(hook, move |stage| {
            assert_eq!(stage.machine.frame(page.mfn).unwrap().owner, PageOwner::Nobody);
            assert!(stage.machine.get_frame(page.mfn).is_none());
            assert!(!stage.machine.hold(page.mfn));
            let item = stage.map_on((T, 1), (C, LOW), stage.place(0), RW);
            assert_eq!(item.status, GrantStatus::BAD_PAGE);
            stage.guest(C, |guest| guest.give_up(page.mfn));
            let vcpu = stage.vcpu(C, 1);
            let mut again = [gnttab_abi::Transfer {
                mfn: page.mfn.0,
                domid: T,
                gref: HIGH,
                ..gnttab_abi::Transfer::default()
            }];
            stage.processor().transfer(&vcpu, &mut again);
            assert_eq!(again[0].status, GrantStatus::BAD_PAGE);
            assert_eq!(stage.machine.audit(), []);
        });
        assert_eq!(stage.transfer_as(C, page.mfn, G, HIGH), GrantStatus::OKAY);
        assert_eq!(stage.machine.frame(page.mfn).unwrap().owner, PageOwner::Domain(G));
        assert_eq!(stage.flags(T, HIGH), EntryFlags::ACCEPT_TRANSFER, "untouched");
        stage.finish();
    }
}

/// XSA-287: a page that anybody holds is not given at all: mapped by grant, in a page table, or held
/// by a tool.
#[test]
fn xsa_287_a_page_in_use_is_not_given() {
    let stage = Stage::pv();
    stage.accept(G, HIGH, C, 0x55);
    let page = stage.local[0];
    let refused = |what: &str| {
        let status = stage.transfer_as(C, page.mfn, G, HIGH);
        assert_eq!(status, GrantStatus::BAD_PAGE, "{what}");
        assert_eq!(stage.machine.frame(page.mfn).unwrap().owner, PageOwner::Domain(C));
    };
    stage.grant(C, LOW, T, page, EntryFlags::empty());
    let item = stage.map_on((T, 0), (C, LOW), stage.place(0), RW);
    refused("mapped");
    let status = stage.unmap_as((T, 0), item.handle, stage.place(0), 0);
    assert_eq!(status, GrantStatus::OKAY);
    stage.guest(C, |guest| {
        assert!(guest.map(stage.place(9), page.gfn, Access::Read))
    });
    refused("in its own page table");
    stage.guest(C, |guest| guest.unmap(stage.place(9)));
    assert!(stage.machine.hold(page.mfn));
    refused("held");
    stage.machine.let_go(page.mfn);
    let table = stage.domain(C).shared_frame(0).unwrap().mfn();
    assert_eq!(
        stage.transfer_as(C, table, G, HIGH),
        GrantStatus::BAD_PAGE,
        "XSA-507: special"
    );
    assert_eq!(
        stage.transfer_as(C, stage.far.mfn, G, HIGH),
        GrantStatus::BAD_PAGE,
        "another's"
    );
    assert_eq!(stage.transfer_as(C, page.mfn, G, HIGH), GrantStatus::OKAY);
    stage.finish();
}

/// XSA-385: the receiver's allowance is exact, at every limit, and of four that come for the last place
/// one gets it.
#[test]
fn xsa_385_the_receivers_allowance_is_exact() {
    for room in [0_u64, 1, 2] {
        let stage = Stage::pv();
        let now = stage.guest(G, |guest| guest.pages());
        stage.guest(G, |guest| guest.set_max_pages(now + room));
        // A slot that does not take it: the place that was kept for it is given back.
        for _ in 0..2 {
            let mfn = stage.guest(C, |guest| guest.add_page()).unwrap().mfn;
            assert_eq!(stage.transfer_as(C, mfn, G, HIGH), GrantStatus::GENERAL_ERROR);
            assert_eq!(stage.guest(G, |guest| guest.pages()), now);
        }
        for n in 0..4 {
            let slot = GrantRef(20 + u32::try_from(n).unwrap());
            stage.accept(G, slot, C, 0x55);
            let mfn = stage.guest(C, |guest| guest.add_page()).unwrap().mfn;
            let status = stage.transfer_as(C, mfn, G, slot);
            let works = n < room;
            assert_eq!(status == GrantStatus::OKAY, works, "page {n} of {room}");
            let committed = stage.flags(G, slot).contains(EntryFlags::TRANSFER_COMMITTED);
            assert_eq!(committed, works, "a refused page promises nothing");
        }
        assert_eq!(stage.guest(G, |guest| guest.pages()), now + room);
        stage.finish();
    }
    // Four senders, the others while the first is between promise and delivery.
    for hook in [Hook::TransferStolen, Hook::TransferCommitted] {
        let stage = Stage::pv();
        let now = stage.guest(G, |guest| guest.pages());
        stage.guest(G, |guest| guest.set_max_pages(now + 1));
        let slots: Vec<GrantRef> = (20..24).map(GrantRef).collect();
        for slot in &slots {
            stage.accept(G, *slot, C, 0x55);
        }
        let pages: Vec<Mfn> = (0..4)
            .map(|_| stage.guest(C, |guest| guest.add_page()).unwrap().mfn)
            .collect();
        let (mfn, slot) = (pages[0], slots[0]);
        let first = stage.stop(hook, move |stage| stage.transfer_as(C, mfn, G, slot));
        let mut arrived = 0;
        for n in 1..4 {
            let mut items = [gnttab_abi::Transfer {
                mfn: pages[n].0,
                domid: G,
                gref: slots[n],
                ..gnttab_abi::Transfer::default()
            }];
            stage.processor().transfer(&stage.vcpu(C, n), &mut items);
            arrived += u32::from(items[0].status == GrantStatus::OKAY);
        }
        arrived += u32::from(first.go() == GrantStatus::OKAY);
        assert_eq!(arrived, 1, "{hook:?}");
        assert_eq!(stage.guest(G, |guest| guest.pages()), now + 1);
        stage.finish();
    }
}

/// TRN-6: one slot, two senders: the second finds it taken.
#[test]
fn trn_6_a_slot_takes_one_page() {
    for hook in [Hook::ClaimLoaded, Hook::TransferCommitted] {
        let stage = Stage::pv();
        stage.accept(G, HIGH, C, 0x55);
        let other = stage.local[1].mfn;
        let second = Arc::new(Mutex::new(GrantStatus::OKAY));
        let result = Arc::clone(&second);
        stage.meanwhile(hook, move |stage| {
            let mut items = [gnttab_abi::Transfer {
                mfn: other.0,
                domid: G,
                gref: HIGH,
                ..gnttab_abi::Transfer::default()
            }];
            stage.processor().transfer(&stage.vcpu(C, 1), &mut items);
            *result.lock().unwrap() = items[0].status;
        });
        let got = stage.guest(G, |guest| guest.pages());
        let first = stage.transfer_as(C, stage.local[0].mfn, G, HIGH);
        let second = *second.lock().unwrap();
        assert!(
            first.is_okay() != second.is_okay(),
            "{hook:?}: {first:?} and {second:?}"
        );
        assert_eq!(stage.guest(G, |guest| guest.pages()), got + 1);
        stage.finish();
    }
}

/// XSA-222, TDN-3: a receiver that begins to die between promise and delivery gets nothing.
#[test]
fn tdn_3_the_dying_receive_nothing() {
    let stage = Stage::pv();
    stage.accept(G, HIGH, C, 0x55);
    let mfn = stage.local[0].mfn;
    stage.meanwhile(Hook::TransferCommitted, |stage| {
        stage.guest(G, |guest| guest.set_dying());
        stage.engine.begin_teardown(&stage.domain(G));
    });
    let got = stage.guest(G, |guest| guest.pages());
    assert_eq!(stage.transfer_as(C, mfn, G, HIGH), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.guest(G, |guest| guest.pages()), got);
    assert_eq!(stage.machine.frame(mfn).unwrap().owner, PageOwner::Free);
    stage.finish();
}

/// N-23: a translated receiver is not told machine frames.
#[test]
fn n_23_a_translated_receiver_learns_no_machine_frame() {
    let stage = Stage::new(Scene::pv().kind(G, DomainKind::Hvm));
    stage.accept(G, HIGH, C, 0x700);
    let mfn = stage.local[0].mfn;
    assert_eq!(stage.transfer_as(C, mfn, G, HIGH), GrantStatus::OKAY);
    let gnttab_engine::EntryWords::V1(entry) = stage.entry(G, HIGH) else {
        panic!("version 1")
    };
    assert_eq!(entry.frame, 0x700, "as the guest wrote it");
    stage
        .guest(G, |guest| guest.write(0x70_0000, b"mine"))
        .expect("it is at the gfn");
    stage.finish();
}
