//! Copies, and grants that are passed on (group E).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use gnttab_abi::{Abi, Copy, CopyFlags, CopyPtr, DomId, EntryFlags, EntryV2, GrantRef, GrantStatus, Mfn, Op};
use gnttab_engine::machine::{C, G, P, Page, Request, Scene, T};
use gnttab_engine::{Hook, Version};

use crate::stage::{ARGS, HIGH, LOW, RO, RW, Stage, call};

const NONE: EntryFlags = EntryFlags::empty();

/// All orders of three domains.
const ORDERS: [[DomId; 3]; 6] = [[G, C, T], [G, T, C], [C, G, T], [C, T, G], [T, G, C], [T, C, G]];

/// What an entry of G may grant to C.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    V1,
    Whole,
    Part,
    Far,
}

fn prepare(kind: Kind, gref: GrantRef) -> Stage {
    let version = if kind == Kind::V1 {
        Version::V1
    } else {
        Version::V2
    };
    let stage = Stage::new(Scene::pv().version(G, version));
    match kind {
        Kind::V1 | Kind::Whole => stage.grant(G, gref, C, stage.frame, NONE),
        Kind::Part => stage.grant_part(gref, 0, 64),
        Kind::Far => stage.pass_on(gref, NONE),
    }
    stage
}

/// XSA-50, XSA-411: copies over every kind of entry, in use or not, that work or fail at every step:
/// each domain, page and pin that was taken is given back, and the three can die in any order.
#[test]
fn xsa_50_what_a_copy_takes_it_gives_back() {
    let mut orders = ORDERS.iter().cycle();
    for kind in [Kind::V1, Kind::Whole, Kind::Part, Kind::Far] {
        for (mapped, write) in [(false, false), (false, true), (true, false), (true, true)] {
            for nth in 0..30 {
                let stage = prepare(kind, LOW);
                let can_be_mapped = matches!(kind, Kind::V1 | Kind::Whole);
                let held = (mapped && can_be_mapped).then(|| stage.mapped(1, LOW, 0, RO));
                let before = stage.pins(G, LOW);
                stage.faults().fail_nth(nth, |_| true);
                let status = stage.copy_grant(0, LOW, write);
                let refused = stage.faults().refused() != 0;
                assert_eq!(status.is_okay(), !refused, "{kind:?} {nth}: {status:?}");
                stage.faults().clear();
                assert_eq!(stage.pins(G, LOW), before, "{kind:?} {nth}");
                assert_eq!(stage.pins(T, GrantRef(9)), [0; 4], "{kind:?} {nth}");
                assert_eq!(stage.audit(), [], "{kind:?} {nth}");
                if let Some(handle) = held {
                    assert_eq!(stage.unmap_on(1, handle, stage.place(0), 0), GrantStatus::OKAY);
                }
                assert_eq!(stage.marks(G, LOW), NONE);
                assert_eq!(stage.marks(T, GrantRef(9)), NONE);
                let [a, b, c] = *orders.next().unwrap();
                stage.finish_in([a, b, c, P]);
                if nth > 0 && !refused {
                    break;
                }
            }
        }
    }
}

/// XSA-226: one level only, never to oneself; passing on to its own grantee's page is allowed.
#[test]
fn xsa_226_a_grant_is_passed_on_once() {
    let stage = Stage::new(
        Scene::pv()
            .granter_v2()
            .version(T, Version::V2)
            .version(C, Version::V2),
    );
    stage.pass_on(LOW, NONE);
    assert_eq!(stage.copy_grant(0, LOW, false), GrantStatus::OKAY);
    assert_eq!(stage.copy_grant(0, LOW, true), GrantStatus::OKAY);
    // Two levels: G to T to P.
    stage.grant(P, GrantRef(9), T, stage.control, NONE);
    stage.pass_on_to((T, GrantRef(10)), G, (P, GrantRef(9)), NONE);
    stage.pass_on_to((G, LOW), C, (T, GrantRef(10)), NONE);
    assert_eq!(
        stage.copy_grant(0, LOW, false),
        GrantStatus::GENERAL_ERROR,
        "two levels"
    );
    // To G itself, and round in a ring.
    stage.grant(G, HIGH, G, stage.frame2, NONE);
    stage.pass_on_to((G, LOW), C, (G, HIGH), NONE);
    assert_eq!(
        stage.copy_grant(0, LOW, false),
        GrantStatus::GENERAL_ERROR,
        "to itself"
    );
    stage.pass_on_to((T, GrantRef(10)), G, (G, LOW), NONE);
    stage.pass_on_to((G, LOW), C, (T, GrantRef(10)), NONE);
    assert_eq!(
        stage.copy_grant(0, LOW, false),
        GrantStatus::GENERAL_ERROR,
        "a ring"
    );
    // The page behind is the copier's own.
    stage.grant(C, LOW, G, stage.local[1], NONE);
    stage.pass_on_to((G, LOW), C, (C, LOW), NONE);
    assert_eq!(stage.copy_grant(0, LOW, false), GrantStatus::OKAY);
    for (id, gref) in [(G, LOW), (T, GrantRef(10)), (P, GrantRef(9)), (C, LOW)] {
        assert_eq!((stage.pins(id, gref), stage.marks(id, gref)), ([0; 4], NONE));
    }
    stage.finish();
}

/// XSA-226: two vCPUs copy through one entry at once, stopped on either side of the far visit.
#[test]
fn xsa_226_two_copies_through_one_passed_on_grant() {
    for hook in [Hook::CopyUnlocked, Hook::CopyBack, Hook::CopyMapped] {
        for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
            let stage = prepare(Kind::Far, HIGH);
            let one = stage.stop(hook, move |stage| stage.copy_grant(0, HIGH, first));
            assert_eq!(stage.copy_grant(1, HIGH, second), GrantStatus::OKAY);
            assert_eq!(one.go(), GrantStatus::OKAY, "{hook:?}");
            for (id, gref) in [(G, HIGH), (T, GrantRef(9))] {
                assert_eq!((stage.pins(id, gref), stage.marks(id, gref)), ([0; 4], NONE));
            }
            assert_eq!(stage.set_version(G, 1), Ok(()), "nothing counts as under way");
            stage.finish();
        }
    }
}

/// XSA-226: while a copy is on the far side, the entry becomes another: what is copied was granted by
/// one state of the entry, or nothing is.
#[test]
fn xsa_226_an_entry_that_changes_under_a_copy() {
    type Change = fn(&Stage);
    let changes: [(&str, Change); 4] = [
        ("another far grant", |stage| {
            let page = stage.guest(T, |guest| guest.add_page()).unwrap();
            stage.fill(page, 0x33);
            stage.grant(T, GrantRef(11), G, page, NONE);
            stage.pass_on_to((G, HIGH), C, (T, GrantRef(11)), NONE);
        }),
        ("an ordinary one", |stage| {
            stage.grant(G, HIGH, C, stage.frame, NONE)
        }),
        ("none", |stage| stage.set_v2(G, HIGH, EntryV2::default())),
        ("another's", |stage| {
            stage.pass_on_to((G, HIGH), P, (T, GrantRef(9)), NONE);
        }),
    ];
    for hook in [Hook::CopyUnlocked, Hook::CopyBack] {
        for (name, change) in changes {
            let stage = prepare(Kind::Far, HIGH);
            for (page, byte) in [(stage.far, 0x11), (stage.frame, 0x22), (stage.local[0], 0x00)] {
                stage.fill(page, byte);
            }
            stage.meanwhile(hook, change);
            let status = stage.copy_grant(0, HIGH, false);
            let found = stage.bytes(stage.local[0])[0];
            let allowed = match status {
                // As it was, or as it became.
                GrantStatus::OKAY => [0x11, 0x22, 0x33].contains(&found),
                _ => found == 0,
            };
            assert!(allowed, "{name} at {hook:?}: {status:?}, {found:#x}");
            if name == "none" && status == GrantStatus::OKAY {
                assert_eq!(found, 0x11);
            }
            for (id, gref) in [(G, HIGH), (T, GrantRef(9))] {
                assert_eq!(stage.pins(id, gref), [0; 4], "{name} at {hook:?}");
                assert_eq!(stage.marks(id, gref), NONE, "{name} at {hook:?}");
            }
            assert_eq!(stage.audit(), [], "{name} at {hook:?}");
            assert_eq!(stage.set_version(G, 1), Ok(()), "{name} at {hook:?}");
            stage.finish();
        }
    }
}

/// XSA-226: an entry in use through one far grant is made to lead to another: a further copy does not
/// hide behind the first one's use, and each far grant gets its own pins back.
#[test]
fn xsa_226_a_use_of_one_far_grant_is_none_of_another() {
    for (first, second) in [(false, false), (true, false), (true, true)] {
        let stage = prepare(Kind::Far, HIGH);
        let other = stage.guest(T, |guest| guest.add_page()).unwrap();
        for (page, byte) in [(stage.far, 0x11), (other, 0x22), (stage.local[1], 0x44)] {
            stage.fill(page, byte);
        }
        stage.grant(T, GrantRef(11), G, other, NONE);
        let one = stage.stop(Hook::CopyMapped, move |stage| stage.copy_grant(0, HIGH, first));
        stage.pass_on_to((G, HIGH), C, (T, GrantRef(11)), NONE);
        let status = stage.counted(8, || stage.copy_grant(1, HIGH, second));
        assert_eq!(status, GrantStatus::GENERAL_ERROR, "{first} {second}");
        assert_eq!(stage.bytes(other), [0x22; 8]);
        assert_eq!(one.go(), GrantStatus::OKAY);
        for (id, gref) in [(G, HIGH), (T, GrantRef(9)), (T, GrantRef(11))] {
            assert_eq!(
                (stage.pins(id, gref), stage.marks(id, gref)),
                ([0; 4], NONE),
                "{id} {gref}"
            );
        }
        assert_eq!(stage.set_version(G, 1), Ok(()));
        stage.finish();
    }
}

/// XSA-226, PIN-7: an attempt to write that is given up takes its own mark back, though somebody else
/// has begun to read meanwhile.
#[test]
fn xsa_226_an_attempt_given_up_takes_its_mark_back() {
    let stage = prepare(Kind::Far, HIGH);
    let reader = Arc::new(std::sync::Mutex::new(None));
    let slot = Arc::clone(&reader);
    stage.meanwhile(Hook::CopyBack, move |stage| {
        let inside = stage.stop(Hook::CopyMapped, |stage| stage.copy_grant(1, HIGH, false));
        *slot.lock().unwrap() = Some(inside);
        stage.pass_on(HIGH, EntryFlags::READONLY);
    });
    assert_eq!(stage.copy_grant(0, HIGH, true), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.marks(G, HIGH), EntryFlags::READING, "the reader's");
    let reader = reader.lock().unwrap().take().expect("it began to read");
    assert_eq!(reader.go(), GrantStatus::OKAY);
    assert_eq!((stage.pins(G, HIGH), stage.marks(G, HIGH)), ([0; 4], NONE));
    stage.finish();
}

/// XSA-226: an entry that never keeps still costs a bounded number of tries and a constant depth.
#[test]
fn xsa_226_an_entry_that_never_keeps_still_is_given_up_on() {
    let stage = prepare(Kind::Far, HIGH);
    stage.grant(T, GrantRef(10), G, stage.far, NONE);
    let depth = |stage: &Stage| {
        stage.counted(4, || {
            let mut items = [Copy {
                source: CopyPtr::grant(G, HIGH, 0),
                dest: CopyPtr::frame(stage.local[0].gfn.0, 0),
                len: 8,
                flags: CopyFlags::SOURCE_GREF,
                ..Copy::default()
            }];
            stage.processor().copy(&stage.vcpu(C, 0), &mut items);
            items[0].status
        })
    };
    assert_eq!(depth(&stage), GrantStatus::OKAY);
    let calm = stage.eye().effort.depth();
    // Another copy comes and goes each time, so that the entry is never as it was seen.
    let inside = stage.clone();
    let times = AtomicU32::new(0);
    let seen = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&seen);
    stage.machine.hooks().at(Hook::CopyBack, move || {
        let far = 9 + times.fetch_add(1, Ordering::Relaxed) % 2;
        count.fetch_add(1, Ordering::Relaxed);
        inside.pass_on_to((G, HIGH), C, (T, GrantRef(19 - far)), NONE);
        let holder = inside.map_on((C, 2), (G, LOW), inside.place(0), RO);
        assert_eq!(holder.status, GrantStatus::OKAY);
        assert_eq!(
            inside.unmap_on(2, holder.handle, inside.place(0), 0),
            GrantStatus::OKAY
        );
    });
    let status = stage.counted(64, || stage.copy_grant(0, HIGH, false));
    assert!(status == GrantStatus::OKAY || status == GrantStatus::GENERAL_ERROR);
    assert!(seen.load(Ordering::Relaxed) <= 64, "a bounded number of tries");
    assert!(stage.eye().effort.depth() < 4 * calm + (8 << 10), "no recursion");
    stage.machine.hooks().clear();
    stage.finish();
}

/// XSA-236: neither a pin nor a use by somebody else stands for a reference: of a dying domain nothing
/// new is copied, and no page is touched that nobody holds for it.
#[test]
fn xsa_236_a_pin_is_no_reference() {
    for kind in [Kind::V1, Kind::Whole] {
        let stage = prepare(kind, LOW);
        let frame = stage.frame;
        let mapping = stage.stop(Hook::MapPinned, |stage| {
            stage.map_on((C, 0), (G, LOW), stage.place(0), RW)
        });
        // G dies under it, and gives its memory up.
        stage.guest(G, |guest| guest.set_dying());
        stage.engine.begin_teardown(&stage.domain(G));
        stage.guest(G, |guest| guest.give_up_memory());
        for write in [false, true] {
            assert_eq!(stage.copy_grant(1, LOW, write), GrantStatus::BAD_DOMAIN);
        }
        let item = mapping.go();
        assert_eq!(stage.machine.audit(), [], "nobody touched what was free");
        if item.status == GrantStatus::OKAY {
            assert!(stage.machine.frame(frame.mfn).unwrap().references > 0);
            assert_eq!(
                stage.unmap_on(0, item.handle, stage.place(0), 0),
                GrantStatus::OKAY
            );
        }
        assert_eq!(stage.kill(G), gnttab_engine::Retired::Gone);
        stage.finish();
    }
}

/// XSA-236, XSA-219: at the release of a copy the pin goes first, while the page is still held; and at
/// the copy itself both pages are held.
#[test]
fn xsa_236_the_pin_goes_before_the_page() {
    for kind in [Kind::V1, Kind::Whole, Kind::Part] {
        let stage = prepare(kind, LOW);
        let (inside, mfn) = (stage.clone(), stage.frame.mfn);
        let puts = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&puts);
        stage.eye().after_each(
            move |request| *request == Request::PutFrame(mfn),
            move || {
                count.fetch_add(1, Ordering::Relaxed);
                assert_eq!(inside.pins(G, LOW), [0; 4], "the page went first");
            },
        );
        let inside = stage.clone();
        stage.machine.hooks().at(Hook::CopyMapped, move || {
            assert!(inside.machine.frame(mfn).unwrap().references >= 2);
            assert_eq!(inside.pins(G, LOW).iter().sum::<u8>(), 1);
        });
        assert_eq!(stage.copy_grant(0, LOW, false), GrantStatus::OKAY);
        assert_eq!(puts.load(Ordering::Relaxed), 1);
        stage.finish();
    }
}

/// XSA-318, XSA-111, XSA-145: a batch of copies that is interrupted before any of its items, the
/// first one included, says so; in the end each item was done once and has its status.
#[test]
fn xsa_318_an_interrupted_batch_goes_on_where_it_stopped() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        for transitive in [false, true] {
            let builder = if abi == Abi::X86_32 {
                Scene::pv().caller_32()
            } else {
                Scene::pv()
            };
            let stage = Stage::new(builder.granter_v2());
            stage.add_args(C, 4);
            if transitive {
                stage.pass_on(HIGH, NONE);
            } else {
                stage.grant(G, HIGH, C, stage.frame, NONE);
            }
            let (size, status_at) = match abi {
                Abi::X86_32 => (24, 20),
                _ => (40, 36),
            };
            let from = if transitive { stage.far } else { stage.frame };
            for count in [1_u16, 2, 5, 210] {
                stage.fill(stage.local[0], 0);
                let page = stage.machine.page(from.mfn).unwrap();
                for n in 0..count {
                    assert!(page.write(usize::from(n), &[u8::try_from(n % 251).unwrap() + 1]));
                    let item = Copy {
                        source: CopyPtr::grant(G, HIGH, n),
                        dest: CopyPtr::frame(stage.local[0].gfn.0, n),
                        len: 1,
                        flags: CopyFlags::SOURCE_GREF,
                        status: GrantStatus(0x5A5A),
                    };
                    let mut raw = [0; 40];
                    item.encode(abi, &mut raw).unwrap();
                    stage.poke(
                        C,
                        ARGS + u64::from(n) * size,
                        &raw[..usize::try_from(size).unwrap()],
                    );
                }
                let copied = Arc::new(AtomicU64::new(0));
                let counter = Arc::clone(&copied);
                stage.eye().after_each(
                    |request| matches!(request, Request::Copy { .. }),
                    move || {
                        counter.fetch_add(1, Ordering::Relaxed);
                    },
                );
                // Wanted elsewhere each time that it asks.
                let done = stage.hypercall(C, abi, call(Op::Copy, u32::from(count)), || true);
                assert_eq!(done, Ok(()));
                assert_eq!(copied.load(Ordering::Relaxed), u64::from(count), "once each");
                let to = stage.machine.page(stage.local[0].mfn).unwrap();
                for n in 0..count {
                    let at = ARGS + u64::from(n) * size + status_at;
                    assert_eq!(stage.peek::<2>(C, at), [0, 0], "item {n} of {count}");
                    let byte = to.read_bytes::<1>(usize::from(n));
                    assert_eq!(byte, Some([u8::try_from(n % 251).unwrap() + 1]));
                }
                stage.eye().forget();
            }
            stage.finish();
        }
    }
}

/// XSA-411: two domains copy through each other's passed-on grants, and both have to undo: neither
/// holds its own table while it lets go of the other's.
#[test]
fn xsa_411_undoing_a_far_use_holds_no_table() {
    let stage = Stage::new(Scene::pv().version(G, Version::V2).version(T, Version::V2));
    // G passes on T's page, T passes on G's.
    stage.grant(T, GrantRef(9), G, stage.far, NONE);
    stage.grant(G, GrantRef(9), T, stage.frame, NONE);
    stage.pass_on_to((G, HIGH), C, (T, GrantRef(9)), NONE);
    stage.pass_on_to((T, HIGH), C, (G, GrantRef(9)), NONE);
    let source = |vcpu: usize| {
        let from = if vcpu == 0 { G } else { T };
        move |stage: &Stage| {
            let dest = CopyPtr::frame(stage.local[vcpu].gfn.0, 0);
            stage.copy_on(
                (C, vcpu),
                CopyPtr::grant(from, HIGH, 0),
                dest,
                CopyFlags::SOURCE_GREF,
            )
        }
    };
    // Each time that one is let go of the far side, the entries change, so that both undo.
    for _ in 0..30 {
        let one = stage.stop(Hook::CopyBack, source(0));
        let two = stage.stop(Hook::CopyBack, source(1));
        stage.grant(G, HIGH, C, stage.frame2, NONE);
        stage.set_v2(T, HIGH, EntryV2::default());
        let (one, two) = (one.start(), two.start());
        let deadline = Instant::now() + Duration::from_secs(20);
        while !(one.is_finished() && two.is_finished()) {
            assert!(Instant::now() < deadline, "they wait for each other");
            thread::yield_now();
        }
        for (done, id) in [(one, G), (two, T)] {
            let status = done.join().unwrap();
            assert!(GrantStatus::ALL.contains(&status), "{id}: {status:?}");
        }
        for (id, gref) in [(G, HIGH), (T, HIGH), (G, GrantRef(9)), (T, GrantRef(9))] {
            assert_eq!(stage.pins(id, gref), [0; 4]);
        }
        stage.pass_on_to((G, HIGH), C, (T, GrantRef(9)), NONE);
        stage.pass_on_to((T, HIGH), C, (G, GrantRef(9)), NONE);
    }
    // A change of either version would wait for whoever is inside: at each hook of the far visit
    // nobody is.
    for hook in [Hook::CopyUnlocked, Hook::CopyBack] {
        let copy = stage.stop(hook, source(0));
        let refused = stage.set_version(G, 1);
        assert!(refused.is_err(), "counted as under way");
        assert_eq!(stage.set_version(T, 2), Ok(()));
        let swapped = {
            let mut items = [gnttab_abi::SwapGrantRef {
                ref_a: GrantRef(1),
                ref_b: GrantRef(2),
                ..gnttab_abi::SwapGrantRef::default()
            }];
            stage.processor().swap(&stage.vcpu(T, 0), &mut items);
            stage.processor().swap(&stage.vcpu(G, 0), &mut items);
            items[0].status
        };
        assert_eq!(swapped, GrantStatus::OKAY, "either table can be had alone");
        assert_eq!(copy.go(), GrantStatus::OKAY);
    }
    stage.finish();
}

/// XSA-500: a grant in use for reading whose entry the granter has rewritten: a write through it goes
/// to the page that was checked, or nowhere.
#[test]
fn xsa_500_the_page_that_is_checked_is_the_page_that_is_written() {
    type Rewrite = fn(&Stage);
    let rewrites: [(&str, Rewrite, bool); 6] = [
        (
            "the same",
            |stage| stage.grant(G, LOW, C, stage.frame, NONE),
            true,
        ),
        (
            "another page",
            |stage| stage.grant(G, LOW, C, stage.frame2, NONE),
            false,
        ),
        (
            "not its page",
            |stage| stage.grant(G, LOW, C, stage.far, NONE),
            false,
        ),
        ("passed on", |stage| stage.pass_on(LOW, NONE), false),
        (
            "for reading",
            |stage| stage.grant(G, LOW, C, stage.frame, EntryFlags::READONLY),
            false,
        ),
        (
            "another domain's",
            |stage| stage.grant(G, LOW, T, stage.frame, NONE),
            true,
        ),
    ];
    for (name, rewrite, works) in rewrites {
        let stage = Stage::v2();
        for (page, byte) in [
            (stage.frame, 1),
            (stage.frame2, 2),
            (stage.far, 3),
            (stage.local[0], 4),
        ] {
            stage.fill(page, byte);
        }
        let handle = stage.mapped(1, LOW, 0, RO);
        let held = |page: Page| stage.machine.frame(page.mfn).unwrap().references;
        let before = [held(stage.frame), held(stage.frame2), held(stage.far)];
        rewrite(&stage);
        // An entry that was passed on since is tried again a bounded number of times.
        let status = stage.counted(8, || stage.copy_grant(0, LOW, true));
        assert_eq!(status == GrantStatus::OKAY, works, "{name}: {status:?}");
        let written = if works { 4 } else { 1 };
        assert_eq!(stage.bytes(stage.frame), [written; 8], "{name}");
        assert_eq!(stage.bytes(stage.frame2), [2; 8], "{name}");
        assert_eq!(stage.bytes(stage.far), [3; 8], "{name}");
        let after = [held(stage.frame), held(stage.frame2), held(stage.far)];
        assert_eq!(after, before, "{name}: references");
        assert_eq!(stage.pins(G, LOW), [0, 1, 0, 0], "{name}");
        assert_eq!(stage.audit(), [], "{name}");
        assert_eq!(stage.unmap_on(1, handle, stage.place(0), 0), GrantStatus::OKAY);
        stage.finish();
    }
}

/// XSA-500: the same of a part of a page in use by another copy: its window does not move.
#[test]
fn xsa_500_the_window_that_is_checked_is_the_window_that_is_written() {
    for (name, page_off, length, works) in [
        ("the same", 0, 8, true),
        ("a larger one", 0, 64, false),
        ("another", 8, 8, false),
    ] {
        let stage = Stage::v2();
        stage.grant_part(LOW, 0, 8);
        let reader = stage.stop(Hook::CopyMapped, |stage| stage.copy_grant(1, LOW, false));
        stage.grant_part(LOW, page_off, length);
        let own = CopyPtr::frame(stage.local[0].gfn.0, 0);
        let write = |offset, len| {
            let mut items = [Copy {
                source: own,
                dest: CopyPtr::grant(G, LOW, offset),
                len,
                flags: CopyFlags::DEST_GREF,
                ..Copy::default()
            }];
            stage.processor().copy(&stage.vcpu(C, 0), &mut items);
            items[0].status
        };
        assert_eq!(write(0, 8) == GrantStatus::OKAY, works, "{name}");
        assert_ne!(
            write(8, 8),
            GrantStatus::OKAY,
            "{name}: outside of what is in use"
        );
        assert_eq!(reader.go(), GrantStatus::OKAY);
        assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
        stage.finish();
    }
}

fn batch(stage: &Stage, items: &mut [Copy]) -> Vec<GrantStatus> {
    stage.processor().copy(&stage.vcpu(C, 0), items);
    items.iter().map(|item| item.status).collect()
}

/// XSA-448: nothing to copy is nothing to look at.
#[test]
fn xsa_448_a_copy_of_nothing_touches_nothing() {
    let stage = Stage::pv();
    let good = Copy {
        source: CopyPtr::grant(G, LOW, 0),
        dest: CopyPtr::frame(stage.local[0].gfn.0, 0),
        len: 8,
        flags: CopyFlags::SOURCE_GREF,
        ..Copy::default()
    };
    let nonsense = [
        CopyPtr::grant(DomId(77), GrantRef(u32::MAX), u16::MAX),
        CopyPtr::grant(DomId(0x7FF2), LOW, 4096),
        CopyPtr::frame(u64::MAX, 5000),
    ];
    for side in nonsense {
        for flags in [CopyFlags::SOURCE_GREF | CopyFlags::DEST_GREF, CopyFlags::empty()] {
            let bad = |len| Copy {
                source: side,
                dest: side,
                len,
                flags,
                ..Copy::default()
            };
            let requests = stage.counted(3, || batch(&stage, &mut [bad(0)]));
            assert_eq!(requests, [GrantStatus::OKAY]);
            assert_eq!(
                stage.eye().effort.steps(),
                0,
                "the hypervisor was not asked anything"
            );
            assert_ne!(batch(&stage, &mut [bad(1)]), [GrantStatus::OKAY]);
            // What its neighbours have claimed stays claimed: one look-up for both.
            let looked = Arc::new(AtomicU32::new(0));
            let count = Arc::clone(&looked);
            stage.eye().after_each(
                |request| matches!(request, Request::Resolve { domain, .. } if *domain == G),
                move || {
                    count.fetch_add(1, Ordering::Relaxed);
                },
            );
            let all = batch(&stage, &mut [good, bad(0), good]);
            assert_eq!(all, [GrantStatus::OKAY; 3]);
            assert_eq!(looked.load(Ordering::Relaxed), 1);
            stage.eye().forget();
        }
    }
    assert_eq!(stage.pins(G, LOW), [0; 4]);
    stage.finish();
}

/// N-22: offsets and lengths in arithmetic that is wide enough, and what was claimed for one item
/// serves another only if it is for the same domain, kind and reference.
#[test]
fn n_22_ranges_are_wide_and_claims_are_keyed() {
    let stage = Stage::pv();
    let own = |offset| CopyPtr::frame(stage.local[0].gfn.0, offset);
    for (offset, len, fits) in [
        (0, 4096, true),
        (4095, 1, true),
        (4096, 1, false),
        (4095, 2, false),
        (0, 4097, false),
        (u16::MAX, 1, false),
        (u16::MAX, u16::MAX, false),
        (1, u16::MAX, false),
    ] {
        for source_side in [true, false] {
            let (a, b) = if source_side { (offset, 0) } else { (0, offset) };
            let item = Copy {
                source: CopyPtr::grant(G, LOW, a),
                dest: own(b),
                len,
                flags: CopyFlags::SOURCE_GREF,
                ..Copy::default()
            };
            let expected = if fits {
                GrantStatus::OKAY
            } else {
                GrantStatus::BAD_COPY_ARG
            };
            assert_eq!(batch(&stage, &mut [item]), [expected], "{offset} {len}");
        }
    }
    // Equal reference numbers of different domains, and a frame number equal to a reference.
    let number = GrantRef(u32::try_from(stage.local[1].gfn.0).unwrap());
    stage.grant(T, LOW, C, stage.far, NONE);
    for (page, byte) in [(stage.frame, 0x41), (stage.far, 0x42), (stage.local[1], 0x43)] {
        stage.fill(page, byte);
    }
    let item = |source: CopyPtr, flags| Copy {
        source,
        dest: own(0),
        len: 1,
        flags,
        ..Copy::default()
    };
    let sources = [
        (item(CopyPtr::grant(G, LOW, 0), CopyFlags::SOURCE_GREF), 0x41),
        (item(CopyPtr::grant(T, LOW, 0), CopyFlags::SOURCE_GREF), 0x42),
        (
            item(CopyPtr::frame(stage.local[1].gfn.0, 0), CopyFlags::empty()),
            0x43,
        ),
        (item(CopyPtr::grant(G, LOW, 0), CopyFlags::SOURCE_GREF), 0x41),
    ];
    let mut items = Vec::new();
    for (n, (source, _)) in sources.iter().enumerate() {
        let offset = u16::try_from(n).unwrap();
        items.push(Copy {
            dest: own(offset),
            ..*source
        });
    }
    // A reference of the number of a frame that was just claimed as a frame.
    items.push(item(CopyPtr::grant(G, number, 0), CopyFlags::SOURCE_GREF));
    let statuses = batch(&stage, &mut items);
    assert_eq!(statuses[..4], [GrantStatus::OKAY; 4]);
    assert_eq!(statuses[4], GrantStatus::BAD_GNTREF);
    let found = stage.bytes(stage.local[0]);
    assert_eq!(found[..4], sources.map(|(_, byte)| byte));
    stage.finish();
}

/// N-11, N-18: the bytes move in the page that was referenced, also if its owner gives it up
/// meanwhile; a page that is not there yet leaves no mark.
#[test]
fn n_11_bytes_move_in_the_page_that_is_held() {
    let stage = Stage::new(Scene::pv().kind(G, gnttab_engine::DomainKind::Hvm));
    let frame = stage.frame;
    stage.fill(frame, 7);
    let inside = stage.clone();
    stage.machine.hooks().once(Hook::CopyMapped, move || {
        inside.guest(G, |guest| {
            guest.give_up(frame.mfn);
            let other = guest.add_page().unwrap();
            assert!(guest.set_physmap(other.gfn, None));
            let ram = gnttab_engine::machine::P2mEntry::Ram(other.mfn);
            assert!(guest.set_physmap(frame.gfn, Some(ram)));
        });
    });
    assert_eq!(stage.copy_grant(0, LOW, false), GrantStatus::OKAY);
    assert_eq!(stage.bytes(stage.local[0]), [7; 8]);
    let info = stage.machine.frame(frame.mfn).unwrap();
    assert_eq!(
        info.owner,
        gnttab_engine::machine::PageOwner::Free,
        "and then it goes"
    );
    assert_eq!(stage.machine.audit(), []);
    let gone = gnttab_engine::machine::P2mEntry::PagedOut { requested: false };
    let gfn = frame.gfn;
    stage.guest(G, |guest| guest.set_physmap(gfn, Some(gone)));
    for write in [false, true] {
        assert_eq!(stage.copy_grant(0, LOW, write), GrantStatus::EAGAIN);
        assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
    }
    let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
    assert_eq!(item.status, GrantStatus::EAGAIN);
    assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
    stage.finish();
}

/// N-46, N-26: a frame of the caller's that is itself a grant mapping, or no memory of its own, is no
/// side of a copy or a transfer.
#[test]
fn n_46_a_grant_mapping_is_not_the_callers_page() {
    let stage = Stage::new(Scene::hvm());
    let handle = stage.mapped(0, LOW, 0, RW);
    let mapped_at = stage.place(0) >> 12;
    let far = CopyPtr::grant(G, LOW, 0);
    let status = stage.copy_on((C, 0), far, CopyPtr::frame(mapped_at, 0), CopyFlags::SOURCE_GREF);
    assert_eq!(status, GrantStatus::BAD_PAGE);
    // Nor can it be granted on.
    let page = Page {
        gfn: gnttab_abi::Gfn(mapped_at),
        mfn: stage.frame.mfn,
    };
    stage.grant(C, LOW, T, page, NONE);
    let item = stage.map_on((T, 0), (C, LOW), stage.place(0), RO);
    assert_eq!(item.status, GrantStatus::BAD_PAGE);
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    let pv = Stage::pv();
    let handle = pv.mapped(0, LOW, 0, RW);
    let mine = CopyPtr::frame(pv.frame.gfn.0, 0);
    let own = CopyPtr::frame(pv.local[0].gfn.0, 0);
    assert_eq!(
        pv.copy_on((C, 0), own, mine, CopyFlags::empty()),
        GrantStatus::BAD_PAGE
    );
    assert_eq!(pv.transfer_as(C, pv.frame.mfn, G, HIGH), GrantStatus::BAD_PAGE);
    assert_eq!(pv.transfer_as(C, Mfn(u64::MAX), G, HIGH), GrantStatus::BAD_PAGE);
    assert_eq!(pv.unmap_on(0, handle, pv.place(0), 0), GrantStatus::OKAY);
    stage.finish();
    pv.finish();
}

/// N-20: each off switch: the operation refuses as documented, and nothing has happened.
#[test]
fn n_20_what_is_switched_off_does_nothing() {
    let stage = Stage::new(
        Scene::pv()
            .granter_v2()
            .config(|config| config.transitive = false),
    );
    stage.pass_on(LOW, NONE);
    assert_eq!(stage.copy_grant(0, LOW, false), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.marks(G, LOW), NONE);
    stage.finish();
    let stage = Stage::new(
        Scene::pv()
            .granter_v2()
            .limits(G, |limits| limits.transitive = false),
    );
    stage.pass_on(LOW, NONE);
    assert_eq!(stage.copy_grant(0, LOW, false), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.marks(G, LOW), NONE);
    stage.finish();
    let stage = Stage::new(Scene::pv().config(|config| config.transfer = false));
    stage.add_args(C, 1);
    let done = stage.hypercall(C, Abi::X86_64, call(Op::Transfer, 1), || false);
    assert_eq!(done, Err(gnttab_abi::Errno::OpNotSupp));
    stage.finish();
    for op in Op::ALL {
        if matches!(op, Op::DumpTable | Op::CacheFlush) {
            continue;
        }
        let builder = Scene::pv().limits(C, |limits| limits.operations = limits.operations.without(op));
        let stage = Stage::new(builder);
        stage.add_args(C, 1);
        let done = stage.hypercall(C, Abi::X86_64, call(op, 1), || false);
        let errno = if op == Op::Transfer {
            gnttab_abi::Errno::OpNotSupp
        } else {
            gnttab_abi::Errno::NoSys
        };
        assert_eq!(done, Err(errno), "{op}");
        stage.finish();
    }
    // Each policy check, refused.
    use gnttab_engine::machine::Check;
    let stage = Stage::pv();
    let handle = stage.mapped(0, LOW, 0, RO);
    let denied = GrantStatus::PERMISSION_DENIED;
    let before = (stage.pins(G, LOW), stage.machine.frame(stage.frame.mfn));
    stage.machine.set_rule(|_: &Check| Some(false));
    assert_eq!(stage.map_on((C, 0), (G, LOW), stage.place(1), RW).status, denied);
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), denied);
    assert_eq!(stage.copy_grant(0, LOW, false), denied);
    assert_eq!(before, (stage.pins(G, LOW), stage.machine.frame(stage.frame.mfn)));
    assert_eq!(stage.audit(), []);
    stage.accept(G, HIGH, C, 1);
    assert_eq!(
        stage.transfer_as(C, stage.local[0].mfn, G, HIGH),
        denied,
        "and the page is gone"
    );
    assert_eq!(stage.flags(G, HIGH), EntryFlags::ACCEPT_TRANSFER);
    stage.machine.set_rule(|_: &Check| None);
    stage.finish();
}
