//! Numbers that a guest chooses, statuses that it reads, buffers that it names (group A).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use gnttab_abi::{
    Abi, AcquireResource, COMPAT_SETUP_TABLE_FRAMES, COMPAT_STATUS_FRAMES, CopyFlags, CopyPtr, DomId,
    EntryFlags, EntryV1, Errno, GetStatusFrames, GrantHandle, GrantRef, GrantStatus, MEMOP_ACQUIRE_RESOURCE,
    MapFlags, MapGrantRef, Mfn, Op, SetupTable, SwapGrantRef,
};
use gnttab_engine::machine::{C, Fenced, G, L2Slot, P, PageType, Pte, Request, Scene, T};
use gnttab_engine::{
    Access, Call, DomainKind, GuestMemory, Hook, Limits, MemoryOutcome, Outcome, Reference, TableResource,
    Version,
};

use crate::stage::{ARGS, BOTH, HIGH, LOW, RO, RW, Stage, call};

fn swap(stage: &Stage, id: DomId, pairs: &[(u32, u32)]) -> Vec<GrantStatus> {
    let item = |(a, b): &(u32, u32)| SwapGrantRef {
        ref_a: GrantRef(*a),
        ref_b: GrantRef(*b),
        ..SwapGrantRef::default()
    };
    let mut items: Vec<_> = pairs.iter().map(item).collect();
    stage.processor().swap(&stage.vcpu(id, 0), &mut items);
    items.iter().map(|item| item.status).collect()
}

/// XSA-18: both references of a swap are checked against the table as it is now.
#[test]
fn xsa_18_both_references_of_a_swap_are_inside_the_table() {
    let stage = Stage::pv();
    let setup = |frames| {
        let status =
            stage
                .processor()
                .setup_table(&stage.vcpu(G, 0), DomId::SELF, frames, None, &mut |_, _| true);
        assert_eq!(status, GrantStatus::OKAY);
    };
    let check = |entries: u32| {
        let before = stage.entry(G, LOW);
        for bad in [entries, entries + 1, u32::MAX] {
            let found = swap(&stage, G, &[(bad, 5), (5, bad), (bad, bad)]);
            assert_eq!(found, [GrantStatus::BAD_GNTREF; 3], "{bad:#x} of {entries:#x}");
            let found = swap(&stage, G, &[(0, 1), (bad, 5), (entries - 1, 2)]);
            let okay = GrantStatus::OKAY;
            assert_eq!(found, [okay, GrantStatus::BAD_GNTREF, okay]);
        }
        assert_eq!(swap(&stage, G, &[(5, 5)]), [GrantStatus::OKAY]);
        assert_eq!(stage.entry(G, LOW), before);
    };
    check(512);
    setup(2);
    check(1024);
    stage.set_version(G, 2).unwrap();
    check(512);
    stage.finish();
}

/// XSA-24: each operation of a 32-bit caller ends, whatever its count, and even if its result cannot
/// be written.
#[test]
fn xsa_24_every_32_bit_call_ends() {
    for (reference, writable) in [
        (Reference::Head, true),
        (Reference::Head, false),
        (Reference::V4_17, true),
        (Reference::V4_17, false),
    ] {
        let builder = Scene::pv()
            .caller_32()
            .config(|config| config.reference = reference);
        let stage = Stage::new(builder);
        let pages = stage.add_args(C, 4);
        for op in Op::ALL {
            for count in [0, 1, 2, 50, i32::MAX as u32, u32::MAX] {
                if !writable {
                    stage.guest(C, |guest| guest.map(ARGS, pages[0].gfn, Access::Read));
                }
                let done = stage.hypercall(C, Abi::X86_32, call(op, count), || false);
                let single = matches!(op, Op::SetupTable | Op::GetStatusFrames | Op::QuerySize);
                if single && count > 1 {
                    assert_eq!(done, Err(Errno::Inval), "{op} {count}");
                }
                if count == i32::MAX as u32 && !single && done.is_ok() {
                    assert!(
                        matches!(op, Op::SetVersion | Op::GetVersion),
                        "{op}: an array beyond memory"
                    );
                }
                stage.guest(C, |guest| guest.map(ARGS, pages[0].gfn, Access::Write));
                stage.poke(C, ARGS, &[0; 4096]);
            }
        }
        stage.finish();
    }
}

/// ENG-1: what counts is the table as it is when an item's turn comes: a batch that is under way finds
/// an entry of a frame that the granter has got since the batch began.
#[test]
fn eng_1_a_batch_under_way_sees_the_table_grow() {
    for stage in [Stage::pv(), Stage::v2()] {
        let entries = if stage.domain(G).version() == Version::V1 {
            512
        } else {
            256
        };
        let new = GrantRef(entries);
        stage.meanwhile(Hook::MapPublish, move |stage| {
            let granter = stage.vcpu(G, 0);
            let mut cpu = stage.processor();
            let status = cpu.setup_table(&granter, DomId::SELF, 2, None, &mut |_, _| true);
            assert_eq!(status, GrantStatus::OKAY);
            stage.grant(G, new, C, stage.frame, EntryFlags::empty());
        });
        let item = |gref, place| MapGrantRef {
            host_addr: stage.place(place),
            flags: RW,
            gref,
            dom: G,
            ..MapGrantRef::default()
        };
        let mut items = [item(new, 0), item(LOW, 1), item(new, 2)];
        stage.processor().map(&stage.vcpu(C, 0), &mut items);
        let statuses = items.map(|item| item.status);
        let okay = GrantStatus::OKAY;
        assert_eq!(statuses, [GrantStatus::BAD_GNTREF, okay, okay]);
        stage.finish();
    }
}

/// XSA-73: whoever transfers waits for nobody who grows, and the other way round, wherever either is.
#[test]
fn xsa_73_transfer_and_growth_do_not_wait_for_each_other() {
    let grow = |stage: &Stage, caller: DomId, frames: u32| {
        let vcpu = stage.vcpu(caller, 1);
        let mut cpu = stage.processor();
        cpu.setup_table(&vcpu, G, frames, None, &mut |_, _| true)
    };
    let builder = Scene::pv().limits(P, |limits| limits.vcpus = 2);
    let stage = Stage::new(builder);
    let page = |stage: &Stage| stage.guest(C, |guest| guest.add_page()).unwrap();
    for (hook, frames) in [(Hook::TransferStolen, 2), (Hook::TransferCommitted, 4)] {
        stage.accept(G, HIGH, C, 0x77);
        let mfn = page(&stage).mfn;
        let sender = stage.stop(hook, move |stage| stage.transfer_as(C, mfn, G, HIGH));
        assert_eq!(grow(&stage, G, frames), GrantStatus::OKAY, "the receiver itself");
        assert_eq!(grow(&stage, P, frames + 1), GrantStatus::OKAY, "somebody for it");
        assert_eq!(sender.go(), GrantStatus::OKAY);
    }
    stage.accept(G, HIGH, C, 0x77);
    let grower = stage.stop(Hook::Grow, move |stage| grow(stage, P, 9));
    assert_eq!(stage.transfer_as(C, page(&stage).mfn, G, HIGH), GrantStatus::OKAY);
    assert_eq!(grower.go(), GrantStatus::OKAY);
    stage.finish();
}

/// XSA-98: what a guest may only read through a grant, no hypercall writes for it.
#[test]
fn xsa_98_a_read_only_mapping_is_no_buffer() {
    for kind in [DomainKind::Pv, DomainKind::Hvm, DomainKind::Arm] {
        let builder = if kind == DomainKind::Arm {
            Scene::arm()
        } else {
            Scene::pv().kind(C, kind)
        };
        let stage = Stage::new(builder);
        let own = stage.add_args(C, 1);
        stage.fill(stage.frame, 0);
        let at = stage.place(0);
        let handle = stage.mapped(0, LOW, 0, RO);
        let before = stage.machine.page(stage.frame.mfn).unwrap();
        let before = before.read_bytes::<4096>(0).unwrap();
        let write_at = |op: Op, addr: u64| {
            let call = Call { addr, ..call(op, 1) };
            stage.hypercall_once(C, Abi::X86_64, call, &mut || false)
        };
        for op in [
            Op::QuerySize,
            Op::SetupTable,
            Op::MapGrantRef,
            Op::Copy,
            Op::SetVersion,
        ] {
            let done = write_at(op, at);
            assert_eq!(done, Outcome::Done(Err(Errno::Fault)), "{kind:?} {op}");
        }
        // The structure is the caller's own, the list is not.
        let item = SetupTable {
            dom: DomId::SELF,
            nr_frames: 1,
            frame_list: at,
            ..SetupTable::default()
        };
        let mut raw = [0; 24];
        item.encode(Abi::X86_64, &mut raw).unwrap();
        stage.poke(C, ARGS, &raw);
        assert_eq!(write_at(Op::SetupTable, ARGS), Outcome::Done(Ok(())));
        let status = i16::from_le_bytes(stage.peek::<2>(C, ARGS + 8));
        assert_eq!(GrantStatus(status), GrantStatus::BAD_VIRT_ADDR);
        // Across the end of an own page into the mapping.
        stage.guest(C, |guest| guest.map(at - 4096, own[0].gfn, Access::Write));
        if stage.guest(C, |guest| guest.read(at - 8, &mut [0; 8])).is_ok() {
            let done = write_at(Op::QuerySize, at - 8);
            assert_eq!(done, Outcome::Done(Err(Errno::Fault)));
        }
        let after = stage.machine.page(stage.frame.mfn).unwrap();
        assert_eq!(after.read_bytes::<4096>(0).unwrap(), before);
        assert_eq!(stage.unmap_on(0, handle, at, 0), GrantStatus::OKAY);
        stage.finish();
    }
}

/// XSA-101, XSA-313 (what the engine shares): a frame that is placed nowhere is reported as nowhere,
/// each element is written, and new table frames hold nothing of anybody's.
#[test]
fn xsa_101_no_output_is_left_as_it_was() {
    let stage = Stage::new(Scene::hvm().version(C, Version::V2));
    stage.add_args(C, 1);
    let item = SetupTable {
        dom: DomId::SELF,
        nr_frames: 9,
        frame_list: ARGS + 64,
        ..SetupTable::default()
    };
    stage.poke(C, ARGS, &[0xA5; 4096]);
    let mut raw = [0; 24];
    item.encode(Abi::X86_64, &mut raw).unwrap();
    stage.poke(C, ARGS, &raw);
    stage
        .hypercall(C, Abi::X86_64, call(Op::SetupTable, 1), || false)
        .unwrap();
    let list = stage.peek::<72>(C, ARGS + 64);
    assert_eq!(list, [0xFF; 72], "nine times nowhere");
    assert_eq!(stage.peek::<8>(C, ARGS + 136), [0xA5; 8], "and no tenth time");
    // Frames that others have used, and freed, come back zeroed.
    for _ in 0..600 {
        let page = stage.guest(T, |guest| guest.add_page()).unwrap();
        stage.fill(page, 0xEE);
        stage.guest(T, |guest| guest.give_up(page.mfn));
    }
    let mut cpu = stage.processor();
    let status = cpu.setup_table(&stage.vcpu(C, 0), DomId::SELF, 40, None, &mut |_, _| true);
    assert_eq!(status, GrantStatus::OKAY);
    let domain = stage.domain(C);
    let (shared, status) = domain.frames();
    assert_eq!((shared, status), (40, 5));
    for index in 0..shared {
        let words: &gnttab_engine::PageWords = domain.shared_frame(index).unwrap().as_ref();
        assert_eq!(
            words.read_bytes::<4096>(0),
            Some([0; 4096]),
            "shared frame {index}"
        );
    }
    for index in 0..status {
        let words: &gnttab_engine::PageWords = domain.status_frame(index).unwrap().as_ref();
        assert_eq!(
            words.read_bytes::<4096>(0),
            Some([0; 4096]),
            "status frame {index}"
        );
    }
    drop((cpu, domain));
    stage.finish();
}

/// XSA-134: a domain that has done nothing yet, one that does not exist, and those that only have a
/// number: every operation of and on them ends in a documented status.
#[test]
fn xsa_134_a_domain_without_a_history_is_no_trap() {
    let stage = Stage::pv();
    let new = DomId(9);
    let guest = stage.machine.add_domain(new, DomainKind::Pv).unwrap();
    let domain = stage
        .engine
        .create_domain(new, DomainKind::Pv, Limits::default(), guest)
        .unwrap();
    drop(domain);
    assert_eq!(
        swap(&stage, new, &[(0, 1), (0, 512)]),
        [GrantStatus::OKAY, GrantStatus::BAD_GNTREF]
    );
    assert_eq!(
        stage.unmap_as((new, 0), GrantHandle(0), 0x1000, 0),
        GrantStatus::BAD_HANDLE
    );
    let mapped = stage.map_on((new, 0), (G, LOW), 0x1000, RW);
    assert_eq!(mapped.status, GrantStatus::GENERAL_ERROR, "not its grant");
    let reserved = [
        DomId(0x7FF0),
        DomId(0x7FF1),
        DomId(0x7FF2),
        DomId(0x7FF3),
        DomId(0x7FF4),
        DomId(0x7FFF),
        DomId(0xFFFF),
        DomId(77),
    ];
    for (target, exists) in reserved.into_iter().map(|id| (id, false)).chain([(new, true)]) {
        let miss = |there, gone| if exists { there } else { gone };
        let page = stage.guest(C, |guest| guest.add_page()).unwrap();
        let refused = miss(GrantStatus::GENERAL_ERROR, GrantStatus::BAD_DOMAIN);
        let map = stage.map_on((C, 0), (target, LOW), stage.place(1), RW);
        assert_eq!(map.status, refused, "map {target}");
        if target != DomId::SELF {
            let dest = CopyPtr::frame(stage.local[0].gfn.0, 0);
            let copy = stage.copy_on(
                (C, 0),
                CopyPtr::grant(target, LOW, 0),
                dest,
                CopyFlags::SOURCE_GREF,
            );
            assert_eq!(copy, refused, "copy {target}");
        }
        let given = stage.transfer_as(C, page.mfn, target, LOW);
        assert_eq!(given, refused, "transfer {target}");
        let mut cpu = stage.processor();
        let vcpu = stage.vcpu(P, 0);
        if target != DomId::SELF {
            let size = cpu.query_size(&vcpu, target).map(|size| size.frames);
            assert_eq!(
                size,
                if exists {
                    Ok(1)
                } else {
                    Err(GrantStatus::BAD_DOMAIN)
                }
            );
            let version = cpu.get_version(&vcpu, target);
            assert_eq!(version, if exists { Ok(Version::V1) } else { Err(Errno::Srch) });
            let status = cpu.get_status_frames(&vcpu, target, 1, None, &mut |_, _| true);
            assert_eq!(status, refused, "status frames of {target}");
        }
        let got = cpu.acquire_frames(&vcpu, target, TableResource::Status, 0, 1, &mut |_, _| Ok(()));
        let errno = if exists { Errno::Inval } else { Errno::Srch };
        assert_eq!(got, Err(errno), "resource of {target}");
    }
    assert_eq!(stage.kill(new), gnttab_engine::Retired::Gone);
    stage.finish();
}

/// XSA-227: an entry that is named by its machine address is one aligned entry of a leaf table of the
/// caller's own, or nothing happens.
#[test]
fn xsa_227_an_entry_named_by_address_is_a_whole_one() {
    let stage = Stage::pv();
    let table = |addr| stage.guest(C, |guest| guest.pte_address(addr)).unwrap();
    let flags = RW | MapFlags::CONTAINS_PTE;
    let first = table(stage.place(0));
    let frame = Mfn::containing(first);
    let bytes = || stage.machine.page(frame).unwrap().read_bytes::<4096>(0).unwrap();
    let next = || {
        let page = stage.machine.page(Mfn(frame.0 + 1));
        page.map(|page| page.read_bytes::<64>(0))
    };
    let map = |addr| stage.map_on((C, 0), (G, LOW), addr, flags);
    let before = (bytes(), next());
    let last = frame.address() + 4096 - 8;
    for entry in [first, first + 8 * 100, last] {
        for off in 1..8 {
            let status = map(entry + off).status;
            assert_eq!(status, GrantStatus::GENERAL_ERROR, "{off} bytes off");
            assert_eq!((bytes(), next()), before, "no neighbour is touched");
            assert_eq!(stage.audit(), []);
        }
    }
    for (place, what) in [
        (stage.frame.mfn.address(), "another's page"),
        (stage.local[0].mfn.address(), "no page table"),
        (Mfn(0xDEAD_BEEF).address(), "no memory"),
        (!7, "no address"),
    ] {
        assert_eq!(map(place).status, GrantStatus::GENERAL_ERROR, "{what}");
    }
    let other = stage.local[1].mfn;
    assert!(stage.guest(C, |guest| guest.use_as(other, PageType::Other)));
    assert_eq!(
        map(other.address()).status,
        GrantStatus::GENERAL_ERROR,
        "no leaf table"
    );
    stage.guest(C, |guest| guest.stop_use(other));
    assert_eq!((bytes(), next()), before);
    let good = map(last);
    assert_eq!(good.status, GrantStatus::OKAY);
    assert_eq!(stage.unmap_on(0, good.handle, last, 0), GrantStatus::OKAY);
    assert_eq!((bytes(), next()), before);
    stage.finish();
}

/// XSA-234: an unmap finds what the map installed (present, frame, writability), or gives nothing back;
/// while any writable view is left, the frame cannot become a page table.
#[test]
fn xsa_234_what_is_removed_is_what_was_installed() {
    let stage = Stage::pv();
    stage.grant(G, HIGH, C, stage.frame2, EntryFlags::empty());
    let at = |n| stage.place(n);
    let f1 = stage.frame.mfn;
    let retype = || {
        let done = stage.guest(G, |guest| guest.use_as(f1, PageType::L1Table));
        if done {
            stage.guest(G, |guest| guest.stop_use(f1));
        }
        done
    };
    let one = stage.mapped(0, LOW, 0, RW);
    let installed = stage.guest(C, |guest| guest.pte(at(0))).unwrap();
    let two = stage.mapped(0, HIGH, 1, RO);
    // Something else stands there: nothing, another frame, the same frame for reading only.
    let pte = |mfn, bits| Pte::new(mfn, Pte::PRESENT | Pte::USER | bits);
    let own = stage.local[0].mfn;
    let table = stage.guest(C, |guest| guest.table(at(0))).unwrap();
    let L2Slot::Table(table) = table else {
        panic!("a table of its own")
    };
    let raw = |entry: Pte| {
        let words = stage.machine.page(table).unwrap();
        assert!(words.write(0, &entry.0.to_le_bytes()));
    };
    for other in [Pte::default(), pte(own, Pte::WRITABLE), pte(f1, 0)] {
        raw(other);
        let refused = stage.unmap_on(0, one, at(0), 0);
        assert_eq!(
            refused,
            GrantStatus::GENERAL_ERROR,
            "{other:?} is not what was made"
        );
        assert_eq!(stage.pins(G, LOW), [1, 0, 0, 0], "nothing was given back");
        assert!(!retype(), "a writable view is left");
        raw(installed);
        assert_eq!(stage.audit(), []);
    }
    // The trick itself: exchange the mapping for an entry of the caller's, which is then a read-only
    // view of the same frame.
    assert!(stage.guest(C, |guest| guest.set_pte_bits(at(1), 0)));
    let mut items = [gnttab_abi::UnmapAndReplace {
        host_addr: at(1),
        new_addr: at(0),
        handle: two,
        ..gnttab_abi::UnmapAndReplace::default()
    }];
    stage.processor().unmap_and_replace(&stage.vcpu(C, 0), &mut items);
    assert_eq!(items[0].status, GrantStatus::OKAY);
    assert_eq!(
        stage.guest(C, |guest| guest.pte(at(1))),
        Some(installed),
        "the entry moved"
    );
    assert_eq!(stage.unmap_on(0, one, at(0), 0), GrantStatus::GENERAL_ERROR);
    assert!(!retype());
    // Bits that are the guest's own may differ.
    stage.guest(C, |guest| guest.set_pte_bits(at(1), 7 << Pte::AVAIL_SHIFT));
    assert_eq!(stage.unmap_on(0, one, at(1), 0), GrantStatus::OKAY);
    assert!(retype());
    stage.finish();
}

/// XSA-295: a granter that keeps changing an entry costs a bounded number of attempts, and leaves no
/// mark; one that changes it less often does not stop a mapping.
#[test]
fn xsa_295_a_granter_that_interferes_is_given_up_on() {
    for (times, works) in [(0, true), (3, true), (4, true), (5, false), (u32::MAX, false)] {
        let stage = Stage::pv();
        let left = Arc::new(AtomicU32::new(times));
        let (inside, count) = (stage.clone(), Arc::clone(&left));
        stage.machine.hooks().at(Hook::ClaimLoaded, move || {
            let more = |left: u32| left.checked_sub(1);
            if let Ok(now) = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
                let flags = if now % 2 == 0 {
                    EntryFlags::PWT
                } else {
                    EntryFlags::PCD
                };
                inside.grant(G, LOW, C, inside.frame, flags);
            }
        });
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
        let expected = if works {
            GrantStatus::OKAY
        } else {
            GrantStatus::GENERAL_ERROR
        };
        assert_eq!(item.status, expected, "{times} changes");
        if !works {
            assert_eq!(stage.marks(G, LOW), EntryFlags::empty());
            assert_eq!(stage.pins(G, LOW), [0; 4]);
            let status = stage.copy_grant(0, LOW, true);
            assert_eq!(status == GrantStatus::OKAY, times == 5, "a copy too");
        }
        stage.finish();
    }
}

/// XSA-295: a transfer's slot, too.
#[test]
fn xsa_295_a_receiver_that_interferes_is_given_up_on() {
    for (times, works) in [(4, true), (5, false), (u32::MAX, false)] {
        let stage = Stage::pv();
        stage.accept(G, HIGH, C, 0x40);
        let left = Arc::new(AtomicU32::new(times));
        let (inside, count) = (stage.clone(), Arc::clone(&left));
        // The compare-and-swap fails, and what was found is the open slot again: nothing but the
        // bound ends this.
        stage.machine.hooks().at(Hook::ClaimLoaded, move || {
            let more = |left: u32| left.checked_sub(1);
            if count
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
                .is_ok()
            {
                inside.set_v1(G, HIGH, EntryV1::default());
            }
        });
        let mfn = stage.local[0].mfn;
        let status = stage.transfer_as(C, mfn, G, HIGH);
        assert_eq!(status, GrantStatus::GENERAL_ERROR, "{times} changes, {works}");
        assert_eq!(
            stage.machine.frame(mfn).unwrap().owner,
            gnttab_engine::machine::PageOwner::Free
        );
        stage.finish();
    }
}

/// XSA-295: clearing the marks cannot be held up: it is no loop at all.
#[test]
fn xsa_295_no_granter_holds_up_an_unmap() {
    let stage = Stage::pv();
    let stop = Arc::new(AtomicBool::new(false));
    let hammer = {
        let stop = Arc::clone(&stop);
        stage.spawn(move |stage| {
            let page = stage.domain(G);
            let page: &gnttab_engine::PageWords = page.shared_frame(0).unwrap().as_ref();
            // The byte of the flags that no mark lies in.
            for bit in [0_u8, 1].into_iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                assert!(page.write(5 * 8 + 1, &[bit]));
            }
        })
    };
    for _ in 0..2000 {
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
        if item.status == GrantStatus::OKAY {
            assert_eq!(
                stage.unmap_on(0, item.handle, stage.place(0), 0),
                GrantStatus::OKAY
            );
        }
        assert_eq!(stage.marks(G, LOW), EntryFlags::empty());
    }
    stop.store(true, Ordering::Relaxed);
    hammer.join().unwrap();
    stage.finish();
}

/// XSA-316: whichever request of whichever operation fails, the status is a documented one, and
/// negative.
#[test]
fn xsa_316_a_failure_is_a_negative_documented_status() {
    type Act = fn(&Stage) -> GrantStatus;
    let acts: [(&str, Act); 6] = [
        ("map", |stage| {
            stage.map_on((C, 0), (G, LOW), stage.place(0), RW).status
        }),
        ("device", |stage| {
            stage.map_on((C, 0), (G, LOW), stage.place(0), BOTH).status
        }),
        ("unmap", |stage| {
            let made = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
            if made.status != GrantStatus::OKAY {
                return made.status;
            }
            stage.unmap_on(0, made.handle, stage.place(0), 0)
        }),
        ("copy", |stage| stage.copy_grant(0, LOW, true)),
        ("transfer", |stage| {
            stage.accept(G, HIGH, C, 0x40);
            let page = stage.guest(C, |guest| guest.add_page_at(Mfn(1 << 33)));
            stage.transfer_as(C, page.unwrap().mfn, G, HIGH)
        }),
        ("setup", |stage| {
            let mut cpu = stage.processor();
            cpu.setup_table(&stage.vcpu(P, 0), G, 9, None, &mut |_, _| true)
        }),
    ];
    for (name, act) in acts {
        let mut failures = 0;
        for nth in 1.. {
            let stage = Stage::new(Scene::pv().caller_iommu());
            // An I/O MMU that does not let go of a frame is another matter (IOM-3).
            let lets_go = |request: &Request| matches!(request, Request::IommuSet { access: None, .. });
            stage.faults().fail_nth(nth, move |request| !lets_go(request));
            let status = act(&stage);
            let refused = stage.faults().refused();
            assert!(GrantStatus::ALL.contains(&status), "{name} {nth}: {status:?}");
            assert_eq!(status.0 < 0, refused != 0, "{name} {nth}: {status:?}");
            stage.finish();
            if refused == 0 {
                break;
            }
            failures += 1;
        }
        assert!(failures >= 2, "{name} can fail in more than one way");
    }
}

/// XSA-316: each refusal by the state of the entry has its own code.
#[test]
fn xsa_316_each_refusal_has_its_code() {
    let stage = Stage::v2();
    let status = |dom, gref, flags| stage.map_on((C, 0), (dom, gref), stage.place(0), flags).status;
    assert_eq!(status(DomId(77), LOW, RW), GrantStatus::BAD_DOMAIN);
    assert_eq!(status(G, GrantRef(256), RW), GrantStatus::BAD_GNTREF);
    assert_eq!(status(G, LOW, MapFlags::empty()), GrantStatus::BAD_GNTREF);
    assert_eq!(status(G, HIGH, RW), GrantStatus::GENERAL_ERROR, "a free entry");
    stage.grant(G, HIGH, T, stage.frame, EntryFlags::empty());
    assert_eq!(status(G, HIGH, RW), GrantStatus::GENERAL_ERROR, "another's grant");
    stage.grant(G, HIGH, C, stage.frame, EntryFlags::READONLY);
    assert_eq!(
        status(G, HIGH, RW),
        GrantStatus::GENERAL_ERROR,
        "for reading only"
    );
    stage.accept(G, HIGH, C, 1);
    assert_eq!(
        status(G, HIGH, RW),
        GrantStatus::GENERAL_ERROR,
        "waits for a page"
    );
    stage.grant(G, HIGH, C, stage.far, EntryFlags::empty());
    assert_eq!(
        status(G, HIGH, RW),
        GrantStatus::BAD_PAGE,
        "not the granter's page"
    );
    stage
        .machine
        .set_rule(|check| matches!(check, gnttab_engine::machine::Check::Map(..)).then_some(false));
    assert_eq!(status(G, LOW, RW), GrantStatus::PERMISSION_DENIED);
    assert_eq!(stage.marks(G, HIGH), EntryFlags::empty());
    stage.finish();
}

fn acquire(stage: &Stage, caller: DomId, item: AcquireResource) -> Result<(), Errno> {
    let mut raw = [0; 32];
    item.encode(Abi::X86_64, &mut raw).unwrap();
    stage.poke(caller, ARGS, &raw);
    let domain = stage.domain(caller);
    let open = ARGS..ARGS + 4096;
    let memory = Fenced::allowing(domain.private(), std::iter::once(open).collect(), 4096);
    let vcpu = stage.vcpu(caller, 0);
    let mut cpu = stage.processor();
    match cpu.memory_op(&vcpu, Abi::X86_64, MEMOP_ACQUIRE_RESOURCE, ARGS, &memory) {
        MemoryOutcome::Done(done) => done,
        MemoryOutcome::NotOurs => panic!("it is about the grant table"),
    }
}

/// XSA-334: no refusal of a resource request stays inside the target's table, which can still go.
#[test]
fn xsa_334_a_refused_resource_request_lets_go_of_its_target() {
    let stage = Stage::pv();
    stage.add_args(P, 1);
    stage.add_args(C, 1);
    let good = AcquireResource {
        domid: G,
        kind: 1,
        nr_frames: 1,
        frame_list: ARGS + 64,
        ..AcquireResource::default()
    };
    let refusals = [
        (
            P,
            AcquireResource {
                domid: DomId(77),
                ..good
            },
            Errno::Srch,
        ),
        (C, good, Errno::Perm),
        (P, AcquireResource { domid: P, ..good }, Errno::Perm),
        (P, AcquireResource { id: 7, ..good }, Errno::Inval),
        (P, AcquireResource { frame: 64, ..good }, Errno::Inval),
        (
            P,
            AcquireResource {
                frame: u64::MAX,
                ..good
            },
            Errno::Inval,
        ),
        (P, AcquireResource { nr_frames: 0, ..good }, Errno::Inval),
        (P, AcquireResource { id: 1, ..good }, Errno::Inval),
        (
            P,
            AcquireResource {
                frame_list: 0x7000_0000,
                ..good
            },
            Errno::Fault,
        ),
    ];
    for (caller, item, errno) in refusals {
        assert_eq!(acquire(&stage, caller, item), Err(errno), "{item:?}");
        assert_eq!(stage.audit(), [], "{item:?}");
    }
    let size = AcquireResource {
        nr_frames: 0,
        frame_list: 0,
        ..good
    };
    assert_eq!(acquire(&stage, P, size), Ok(()));
    stage
        .faults()
        .fail_nth(1, |request| matches!(request, Request::AllocTablePage { .. }));
    let grown = AcquireResource { frame: 1, ..good };
    assert!(acquire(&stage, P, grown).is_err());
    assert_eq!(stage.audit(), []);
    assert_eq!(stage.kill(G), gnttab_engine::Retired::Gone);
    assert!(
        stage.machine.add_domain(G, DomainKind::Pv).is_ok(),
        "nothing of it is left"
    );
    stage.finish();
}

/// XSA-382: what a 32-bit caller's answer has room for is counted in what is stored there.
#[test]
fn xsa_382_room_is_counted_in_what_is_stored() {
    // Status frames, of which eight times fewer are needed: 4.17 collects them in the area.
    let room = u32::try_from(COMPAT_STATUS_FRAMES).unwrap();
    let limits = |limits: &mut Limits| limits.grant_frames = Some(8 * (room + 2));
    let builder = Scene::pv()
        .caller_32()
        .config(|config| {
            config.reference = Reference::V4_17;
            config.max_grant_frames = 8 * (room + 2);
        })
        .version(C, Version::V2)
        .limits(C, limits);
    let stage = Stage::exactly(builder);
    stage.add_args(C, 4);
    let mut cpu = stage.processor();
    let frames = 8 * (room + 2);
    let status = cpu.setup_table(&stage.vcpu(C, 0), DomId::SELF, frames, None, &mut |_, _| true);
    assert_eq!(status, GrantStatus::OKAY);
    drop(cpu);
    assert_eq!(stage.domain(C).frames().1, room + 2);
    let list = ARGS + 64;
    let ask = |nr_frames: u32| {
        stage.poke(C, ARGS, &[0xA5; 3 * 4096]);
        let item = GetStatusFrames {
            dom: DomId::SELF,
            nr_frames,
            frame_list: list,
            ..GetStatusFrames::default()
        };
        let mut raw = [0; 24];
        item.encode(Abi::X86_32, &mut raw).unwrap();
        stage.poke(C, ARGS, &raw[..GetStatusFrames::size(Abi::X86_32)]);
        let done = stage.hypercall(C, Abi::X86_32, call(Op::GetStatusFrames, 1), || false);
        let back = GetStatusFrames::decode(Abi::X86_32, &stage.peek::<24>(C, ARGS)).unwrap();
        let first = stage.peek::<8>(C, list);
        let behind = stage.peek::<8>(C, list + u64::from(nr_frames.min(room)) * 8);
        (done, back.status, first != [0xA5; 8], behind == [0xA5; 8])
    };
    assert_eq!(ask(room), (Ok(()), GrantStatus::OKAY, true, true));
    for nr_frames in [room + 1, room + 2] {
        assert_eq!(ask(nr_frames), (Ok(()), GrantStatus::GENERAL_ERROR, false, true));
    }
    assert_eq!(ask(8 * room).1, GrantStatus::GENERAL_ERROR);
    let (done, status, stored, _) = ask(u32::MAX);
    assert!(done == Err(Errno::Fault) || status == GrantStatus::GENERAL_ERROR);
    assert!(!stored);
    stage.finish();
}

/// XSA-382: the same of setup_table.
#[test]
fn xsa_382_setup_of_more_frames_than_there_is_room_for() {
    let room = u32::try_from(COMPAT_SETUP_TABLE_FRAMES).unwrap();
    let limits = |limits: &mut Limits| limits.grant_frames = Some(room + 5);
    for reference in [Reference::Head, Reference::V4_17] {
        let builder = Scene::pv().caller_32().limits(C, limits).config(|config| {
            config.reference = reference;
            config.max_grant_frames = room + 5;
        });
        let stage = Stage::exactly(builder);
        stage.add_args(C, 2);
        for (nr_frames, works) in [
            (room, true),
            (room + 1, false),
            (room + 5, false),
            (u32::MAX, false),
        ] {
            stage.poke(C, ARGS, &[0xA5; 8192]);
            let item = SetupTable {
                dom: DomId::SELF,
                nr_frames,
                frame_list: ARGS + 16,
                ..SetupTable::default()
            };
            let mut raw = [0; 16];
            item.encode(Abi::X86_32, &mut raw).unwrap();
            stage.poke(C, ARGS, &raw);
            let done = stage.hypercall(C, Abi::X86_32, call(Op::SetupTable, 1), || false);
            let back = SetupTable::decode(Abi::X86_32, &stage.peek::<16>(C, ARGS)).unwrap();
            let okay = done.is_ok() && back.status == GrantStatus::OKAY;
            assert_eq!(okay, works, "{nr_frames}");
            assert_eq!(stage.peek::<4>(C, ARGS + 16) == [0xA5; 4], !works);
            let behind = ARGS + 16 + u64::from(room) * 4;
            assert_eq!(stage.peek::<8>(C, behind), [0xA5; 8], "what lies behind");
        }
        assert_eq!(stage.domain(C).frames().0, room, "what was refused made nothing");
        stage.finish();
    }
}
