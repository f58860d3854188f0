//! Fixes that never got a number, and lessons from next door, where no other group has the test.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use gnttab_abi::{
    Abi, AcquireResource, CopyFlags, CopyPtr, DomId, EntryFlags, EntryHead, EntryV1, Errno, Gfn, GrantHandle,
    GrantRef, GrantStatus, MEMOP_ACQUIRE_RESOURCE, MapGrantRef, Op, SetupTable,
};
use gnttab_engine::machine::{C, G, P, P2mEntry, Page, PageOwner, Pte, Request, Scene, T};
use gnttab_engine::{
    Access, Call, Config, DomainKind, Engine, GuestMemory, Hook, Limits, MemoryOutcome, Outcome, Version,
};

use crate::stage::{ARGS, BOTH, HIGH, LOW, RO, RW, Stage, call};

const NONE: EntryFlags = EntryFlags::empty();

/// N-01: flags and grantee of an entry are one word: a granter that changes between "for C, read-only"
/// and "for T, writable" gives nobody the mixture, at whichever instant it changes.
#[test]
fn n_01_flags_and_grantee_are_read_as_one() {
    for version in [Version::V1, Version::V2] {
        let hooks: &[Hook] = match version {
            Version::V1 => &[Hook::HandlePeek, Hook::ClaimLoaded],
            Version::V2 => &[Hook::HandlePeek, Hook::ClaimMarked],
        };
        for hook in hooks {
            let stage = Stage::new(Scene::pv().version(G, version));
            stage.grant(G, LOW, C, stage.frame, EntryFlags::READONLY);
            stage.meanwhile(*hook, |stage| stage.grant(G, LOW, T, stage.frame, NONE));
            let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
            assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "{version:?} {hook:?}");
            assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
            // And the other way about: C may read what was for C when it was judged.
            stage.machine.hooks().clear();
            stage.grant(G, LOW, T, stage.frame, NONE);
            stage.meanwhile(*hook, |stage| {
                stage.grant(G, LOW, C, stage.frame, EntryFlags::READONLY);
            });
            let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
            assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "{version:?} {hook:?}");
            // What was judged is C's, what is marked is T's.
            stage.machine.hooks().clear();
            stage.grant(G, LOW, C, stage.frame, EntryFlags::READONLY);
            stage.meanwhile(*hook, |stage| stage.grant(G, LOW, T, stage.frame, NONE));
            let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RO);
            assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "{version:?} {hook:?}");
            let words = stage.entry(G, LOW);
            assert_eq!((words.domid(), words.flags()), (T, EntryFlags::PERMIT_ACCESS));
            stage.finish();
        }
    }
}

/// N-01, for real: the granter changes the head as fast as it can.
#[test]
fn n_01_a_granter_that_flips_gives_no_mixture() {
    let stage = Stage::pv();
    stage.grant(G, LOW, C, stage.frame, EntryFlags::READONLY);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flipper = {
        let stop = Arc::clone(&stop);
        stage.spawn(move |stage| {
            while !stop.load(Ordering::Relaxed) {
                let head = |flags, domid| EntryV1 {
                    head: EntryHead { flags, domid },
                    frame: u32::try_from(stage.frame.gfn.0).unwrap(),
                };
                stage.set_v1(G, LOW, head(EntryFlags::PERMIT_ACCESS, T));
                let readonly = EntryFlags::PERMIT_ACCESS | EntryFlags::READONLY;
                stage.set_v1(G, LOW, head(readonly, C));
            }
        })
    };
    for _ in 0..3000 {
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
        assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "C was never let write");
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
    stage.finish();
}

/// N-04, XSA-378: the guest overwrites the entry of its mapping by ordinary means, then unmaps, then
/// dies: a documented error, and every count right; the host goes on.
#[test]
fn n_04_a_mapping_removed_behind_the_engines_back() {
    for dies in [false, true] {
        let stage = Stage::pv();
        let handle = stage.mapped(0, LOW, 0, RW);
        let own = Pte::new(stage.local[0].mfn, Pte::PRESENT | Pte::USER | Pte::WRITABLE);
        assert!(stage.guest(C, |guest| guest.write_pte(stage.place(0), own)));
        if !dies {
            let status = stage.unmap_on(0, handle, stage.place(0), 0);
            assert_eq!(status, GrantStatus::GENERAL_ERROR);
            assert_eq!(stage.pins(G, LOW), [1, 0, 0, 0], "the record stands");
        }
        assert_eq!(
            stage.guest(G, |guest| guest.crashes()),
            Vec::<&str>::new(),
            "the owner is not to blame"
        );
        assert_eq!(stage.machine.audit(), []);
        stage.kill(C);
        assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
        stage.finish();
    }
}

/// N-14: clearing the marks disturbs nothing beside them: the granter rewrites the rest of the head
/// meanwhile, and finds what it wrote.
#[test]
fn n_14_clearing_marks_disturbs_no_neighbour() {
    for version in [Version::V1, Version::V2] {
        let stage = Stage::new(Scene::pv().version(G, version));
        for round in 0..16_u16 {
            let handle = stage.mapped(0, LOW, 0, RW);
            let unused = EntryFlags::from_bits_retain(0xA000);
            let odd = EntryFlags::PWT | EntryFlags::PAT | unused;
            let domid = DomId(0x100 + round);
            // Written by the guest in the middle of the unmap: grantee, cache bits, and type.
            stage.meanwhile(Hook::UnmapFlushed, move |stage| {
                let marks = stage.marks(G, LOW);
                let flags = match stage.domain(G).version() {
                    Version::V1 => odd | marks,
                    Version::V2 => odd,
                };
                stage.grant(G, LOW, domid, stage.frame2, flags);
            });
            assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
            let words = stage.entry(G, LOW);
            assert_eq!(words.flags(), EntryFlags::PERMIT_ACCESS | odd);
            assert_eq!(words.domid(), domid);
            if version == Version::V2 {
                // Bits of the status word that are the guest's own.
                stage.set_status(G, GrantRef(6), EntryFlags::from_bits_retain(0x5500));
            }
            stage.grant(G, LOW, C, stage.frame, NONE);
        }
        stage.finish();
    }
}

/// N-19: a fault at the k-th element: the status says so, what comes before is written, nothing after.
#[test]
fn n_19_a_fault_ends_the_report_where_it_happens() {
    for k in [0_u64, 1, 5, 8] {
        let stage = Stage::pv();
        stage.add_args(C, 1);
        stage.poke(C, ARGS, &[0xA5; 4096]);
        let item = SetupTable {
            dom: DomId::SELF,
            nr_frames: 9,
            frame_list: ARGS + 4096 - 8 * k,
            ..SetupTable::default()
        };
        let mut raw = [0; 24];
        item.encode(Abi::X86_64, &mut raw).unwrap();
        stage.poke(C, ARGS, &raw);
        let done = stage.hypercall(C, Abi::X86_64, call(Op::SetupTable, 1), || false);
        assert_eq!(done, Ok(()));
        let status = GrantStatus(i16::from_le_bytes(stage.peek(C, ARGS + 8)));
        assert_eq!(status, GrantStatus::BAD_VIRT_ADDR, "element {k}");
        for index in 0..k {
            let element: [u8; 8] = stage.peek(C, item.frame_list + index * 8);
            assert_ne!(element, [0xA5; 8], "{index} of {k}");
        }
        stage.finish();
    }
    // A batch whose array ends in the middle of it: whole items are done, the others are not.
    let stage = Stage::pv();
    stage.add_args(C, 1);
    let items: Vec<MapGrantRef> = (0..128)
        .map(|n| MapGrantRef {
            host_addr: stage.place(n),
            flags: RO,
            gref: LOW,
            dom: G,
            ..MapGrantRef::default()
        })
        .collect();
    for (n, item) in items.iter().enumerate() {
        let mut raw = [0; 32];
        item.encode(Abi::X86_64, &mut raw).unwrap();
        stage.poke(C, ARGS + 32 * n as u64, &raw);
    }
    let batch = Call {
        addr: ARGS + 32 * 118,
        ..call(Op::MapGrantRef, 20)
    };
    let done = stage.hypercall(C, Abi::X86_64, batch, || false);
    assert_eq!(done, Err(Errno::Fault));
    assert_eq!(
        stage.pins(G, LOW),
        [0, 10, 0, 0],
        "those that could be read, no others"
    );
    stage.finish();
}

/// N-21, N-42: spare bits of the command, and counts and addresses near every edge: an error, no wrap.
#[test]
fn n_21_spare_bits_and_edges_are_refused() {
    let stage = Stage::pv();
    stage.add_args(C, 1);
    for op in Op::ALL {
        for bit in 12..32 {
            let mut odd = call(op, 1);
            odd.command.0 |= 1 << bit;
            let done = stage.hypercall(C, Abi::X86_64, odd, || false);
            let expected = if op == Op::CacheFlush {
                Errno::NoSys
            } else {
                Errno::Inval
            };
            assert_eq!(done, Err(expected), "{op} bit {bit}");
        }
    }
    for op in Op::ALL {
        for addr in [
            0,
            u64::MAX - 7,
            0x7FFF_FFFF_FFF8,
            1 << 47,
            (1 << 63) - 8,
            0xFFFF_FFF8,
        ] {
            for count in [1, 2, 1 << 20, i32::MAX as u32, 1 << 31, u32::MAX] {
                let odd = Call {
                    addr,
                    ..call(op, count)
                };
                let done = stage.hypercall(C, Abi::X86_64, odd, || false);
                assert!(done.is_err(), "{op} of {count} at {addr:#x}");
            }
        }
    }
    assert_eq!(stage.audit(), []);
    stage.finish();
}

/// N-27, N-13: each step of a map fails once, after everything before it: no mapping, no mark, no pin,
/// in every paging mode.
#[test]
fn n_27_a_map_that_fails_late_leaves_no_mapping() {
    for kind in [DomainKind::Pv, DomainKind::Hvm] {
        for version in [Version::V1, Version::V2] {
            let mut unmapped = 0;
            for nth in 1.. {
                let stage = Stage::new(Scene::pv().kind(C, kind).version(G, version).caller_iommu());
                stage.faults().fail_nth(nth, |_| true);
                let removed = Arc::new(AtomicU32::new(0));
                let count = Arc::clone(&removed);
                stage.eye().after_each(
                    |request| matches!(request, Request::UnmapHost { .. }),
                    move || {
                        count.fetch_add(1, Ordering::Relaxed);
                    },
                );
                let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
                let refused = stage.faults().refused() != 0;
                assert_eq!(item.status == GrantStatus::OKAY, !refused);
                if refused {
                    let reached = stage.guest(C, |guest| guest.read(stage.place(0), &mut [0]));
                    assert!(reached.is_err(), "{kind:?} {nth}: it is still mapped");
                    assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
                    unmapped += removed.load(Ordering::Relaxed);
                }
                stage.finish();
                if !refused {
                    break;
                }
            }
            assert!(unmapped >= 1, "some failure came after the host mapping");
        }
    }
}

/// N-31: limits are the domain's own; "not given" is not 0; what is beyond reason is refused.
#[test]
fn n_31_limits_are_each_domains_own() {
    let machine = gnttab_engine::machine::Machine::new();
    let engine = Engine::new(machine.clone(), Config::default());
    let create = |limits: Limits| {
        let guest = machine.add_domain(DomId(5), DomainKind::Pv).unwrap();
        engine.create_domain(DomId(5), DomainKind::Pv, limits, guest)
    };
    let limits = |frames, maptrack| Limits {
        grant_frames: frames,
        maptrack_frames: maptrack,
        ..Limits::default()
    };
    for bad in [
        limits(Some(0), None),
        limits(Some(u32::MAX), None),
        limits(Some(gnttab_engine::MAX_GRANT_FRAMES + 1), None),
        limits(None, Some(gnttab_engine::MAX_MAPTRACK_FRAMES + 1)),
        limits(None, Some(u32::MAX)),
    ] {
        assert!(create(bad).is_err(), "{bad:?}");
        assert_eq!(machine.audit_idle(), []);
    }
    // Above the default, but asked for.
    let made = create(limits(Some(65), Some(1025))).unwrap();
    assert_eq!(made.limits().grant_frames, Some(65));
    assert_eq!(made.limits().maptrack_frames, Some(1025));
    drop(made);
    let stage = Stage::new(Scene::pv().limits(C, |limits| {
        limits.maptrack_frames = Some(0);
        limits.grant_frames = Some(2);
    }));
    let item = stage.map_on((C, 0), (G, LOW), stage.place(0), RO);
    assert_eq!(
        item.status,
        GrantStatus::NO_SPACE,
        "no handles: no mapping, but clean"
    );
    assert_eq!(
        stage.copy_grant(0, LOW, true),
        GrantStatus::OKAY,
        "copies need none"
    );
    let mut cpu = stage.processor();
    let mut setup = |n| cpu.setup_table(&stage.vcpu(C, 0), DomId::SELF, n, None, &mut |_, _| true);
    assert_eq!(setup(2), GrantStatus::OKAY);
    assert_eq!(setup(3), GrantStatus::GENERAL_ERROR);
    drop(cpu);
    // Every way to make it grow stops there.
    let control = stage.vcpu(P, 0);
    let resource = gnttab_engine::TableResource::Shared;
    let mut cpu = stage.processor();
    let mut take = |first| cpu.acquire_frames(&control, C, resource, first, 1, &mut |_, _| Ok(()));
    assert_eq!((take(1), take(2)), (Ok(()), Err(Errno::Inval)));
    drop((cpu, control));
    assert_eq!(stage.domain(C).frames().0, 2);
    stage.finish();
}

fn acquire(stage: &Stage, abi: Abi, item: AcquireResource) -> (Result<(), Errno>, AcquireResource) {
    let mut raw = [0; 32];
    item.encode(abi, &mut raw).unwrap();
    stage.poke(P, ARGS, &raw);
    let domain = stage.domain(P);
    let done = stage.processor().memory_op(
        &stage.vcpu(P, 0),
        abi,
        MEMOP_ACQUIRE_RESOURCE,
        ARGS,
        domain.private(),
    );
    let MemoryOutcome::Done(done) = done else {
        panic!("it is about the grant table")
    };
    let back = AcquireResource::decode(abi, &stage.peek::<32>(P, ARGS)).unwrap();
    (done, back)
}

/// N-32, XSA-276: the size that is told can be had, all of it, beyond any slice; frame numbers are not
/// cut; a mapping of a table frame by a tool holds the frame.
#[test]
fn n_32_the_whole_table_can_be_acquired() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        let stage = Stage::new(Scene::pv().granter_v2());
        stage.add_args(P, 1);
        let ask = AcquireResource {
            domid: G,
            kind: 1,
            ..AcquireResource::default()
        };
        let (done, size) = acquire(&stage, abi, ask);
        assert_eq!((done, size.nr_frames), (Ok(()), 64));
        let list = ARGS + 64;
        let all = AcquireResource {
            nr_frames: 64,
            frame_list: list,
            ..ask
        };
        assert_eq!(acquire(&stage, abi, all).0, Ok(()));
        let domain = stage.domain(G);
        for index in 0..64 {
            let mfn = domain.shared_frame(index).unwrap().mfn().0;
            let width = abi.word_size() as u64;
            let bytes: [u8; 8] = stage.peek(P, list + u64::from(index) * width);
            let mut word = [0; 8];
            word[..abi.word_size()].copy_from_slice(&bytes[..abi.word_size()]);
            assert_eq!(u64::from_le_bytes(word), mfn, "frame {index}");
        }
        drop(domain);
        for frame in [63 + 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, u64::MAX] {
            let odd = AcquireResource {
                frame,
                nr_frames: 1,
                frame_list: list,
                ..ask
            };
            assert_eq!(acquire(&stage, abi, odd).0, Err(Errno::Inval), "{frame:#x}");
        }
        let status = AcquireResource {
            id: 1,
            nr_frames: 9,
            frame_list: list,
            ..ask
        };
        assert_eq!(
            acquire(&stage, abi, status).0,
            Err(Errno::Inval),
            "there are eight"
        );
        stage.finish();
    }
    // A translated tool maps the frame: a reference keeps it.
    let stage = Stage::new(Scene::pv().kind(P, DomainKind::Hvm));
    stage.add_args(P, 1);
    stage.poke(P, ARGS + 64, &0x900_u64.to_le_bytes());
    let one = AcquireResource {
        domid: G,
        kind: 1,
        nr_frames: 1,
        frame_list: ARGS + 64,
        ..AcquireResource::default()
    };
    assert_eq!(acquire(&stage, Abi::X86_64, one).0, Ok(()));
    let mfn = stage.domain(G).shared_frame(0).unwrap().mfn();
    assert_eq!(
        stage.guest(P, |guest| guest.physmap(Gfn(0x900))),
        Some(P2mEntry::Foreign(mfn))
    );
    assert_eq!(stage.machine.frame(mfn).unwrap().references, 2);
    assert_eq!(stage.audit(), []);
    assert_eq!(
        stage.kill(G),
        gnttab_engine::Retired::Held,
        "the tool still reaches it"
    );
    assert_eq!(stage.machine.audit(), []);
    stage.finish();
}

/// N-35: a bus address matters only where there is a device mapping; a mismatch and a shortage of
/// handles have their own codes.
#[test]
fn n_35_a_bus_address_matters_only_to_a_device_mapping() {
    let stage = Stage::pv();
    let wrong = stage.frame.mfn.address() + 4096;
    let host = stage.mapped(0, LOW, 0, RW);
    assert_eq!(stage.unmap_on(0, host, stage.place(0), wrong), GrantStatus::OKAY);
    let both = stage.mapped(0, LOW, 0, BOTH);
    assert_eq!(
        stage.unmap_on(0, both, stage.place(0), wrong),
        GrantStatus::BAD_DEV_ADDR
    );
    assert_eq!(stage.pins(G, LOW), [1, 0, 1, 0], "nothing of it was done");
    let pte = stage.guest(C, |guest| guest.pte(stage.place(0))).unwrap();
    assert!(pte.has(Pte::PRESENT));
    let bus = stage.frame.mfn.address();
    assert_eq!(stage.unmap_on(0, both, stage.place(0), bus), GrantStatus::OKAY);
    stage.finish();
}

/// N-36: the receiver's map does not take the page: that is no success.
#[test]
fn n_36_a_page_that_cannot_be_entered_is_no_success() {
    let stage = Stage::new(Scene::pv().kind(G, DomainKind::Hvm));
    stage.accept(G, HIGH, C, 0x700);
    stage
        .faults()
        .fail_nth(1, |request| matches!(request, Request::Install { .. }));
    let mfn = stage.local[0].mfn;
    assert_eq!(stage.transfer_as(C, mfn, G, HIGH), GrantStatus::GENERAL_ERROR);
    assert_eq!(
        stage.machine.frame(mfn).unwrap().owner,
        PageOwner::Domain(G),
        "accounted, once"
    );
    stage.finish();
}

/// N-30, N-41, XSA-296: wide addresses of narrow guests are refused, and what their words cannot hold
/// is not cut short.
#[test]
fn n_30_nothing_of_a_narrow_guest_is_cut_short() {
    let stage = Stage::new(Scene::pv().caller_32());
    for high in [1_u64 << 32, 1 << 40, 0xFFFF_FFFF_0000_0000] {
        let item = stage.map_on((C, 0), (G, LOW), stage.place(0) | high, RW);
        assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "{high:#x}");
        assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
    }
    let handle = stage.mapped(0, LOW, 0, RW);
    let wide = stage.place(0) | 1 << 32;
    assert_eq!(stage.unmap_on(0, handle, wide, 0), GrantStatus::GENERAL_ERROR);
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    stage.finish();
    // A frame number above 32 bits in a 32-bit list: nothing is stored in its place.
    let stage = Stage::new(Scene::hvm().caller_32());
    stage.add_args(C, 1);
    let item = SetupTable {
        dom: DomId::SELF,
        nr_frames: 1,
        frame_list: ARGS + 64,
        ..SetupTable::default()
    };
    let mut raw = [0; 16];
    item.encode(Abi::X86_32, &mut raw).unwrap();
    stage.poke(C, ARGS, &raw);
    stage.poke(C, ARGS + 64, &[0xA5; 8]);
    stage
        .hypercall(C, Abi::X86_32, call(Op::SetupTable, 1), || false)
        .unwrap();
    assert_eq!(stage.peek::<4>(C, ARGS + 64), [0xA5; 4], "'nowhere' does not fit");
    stage.finish();
}

/// N-41, R-14: every operation through both layouts gives the same results.
#[test]
fn n_41_both_layouts_give_the_same_results() {
    let outcome = |abi: Abi, op: Op, seed: u8| {
        let builder = if abi == Abi::X86_32 {
            Scene::pv().caller_32()
        } else {
            Scene::pv()
        };
        let stage = Stage::new(builder.granter_v2());
        stage.add_args(C, 1);
        stage.poke(C, ARGS, &[0; 4096]);
        let mut raw = [0; 40];
        let local = stage.local[0].gfn.0;
        let (g, own) = (CopyPtr::grant(G, LOW, u16::from(seed)), CopyPtr::frame(local, 0));
        let encoded = match op {
            Op::Copy => gnttab_abi::Copy {
                source: g,
                dest: own,
                len: u16::from(seed),
                flags: CopyFlags::SOURCE_GREF,
                ..gnttab_abi::Copy::default()
            }
            .encode(abi, &mut raw),
            Op::SetupTable => SetupTable {
                dom: if seed.is_multiple_of(3) {
                    DomId::SELF
                } else {
                    DomId(77)
                },
                nr_frames: u32::from(seed),
                frame_list: ARGS + 512,
                ..SetupTable::default()
            }
            .encode(abi, &mut raw),
            Op::GetStatusFrames => gnttab_abi::GetStatusFrames {
                dom: DomId::SELF,
                nr_frames: u32::from(seed % 3),
                frame_list: ARGS + 512,
                ..gnttab_abi::GetStatusFrames::default()
            }
            .encode(abi, &mut raw),
            Op::Transfer => gnttab_abi::Transfer {
                mfn: if seed.is_multiple_of(2) { local } else { 5 },
                domid: G,
                gref: LOW,
                ..gnttab_abi::Transfer::default()
            }
            .encode(abi, &mut raw),
            _ => {
                raw = [seed; 40];
                Ok(())
            }
        };
        encoded.unwrap();
        let size = op.arg_size(abi);
        stage.poke(C, ARGS, &raw[..size]);
        let done = stage.hypercall(C, abi, call(op, 1), || false);
        let after: [u8; 40] = stage.peek(C, ARGS);
        let status_at = |wide: usize, narrow: usize| {
            let at = if abi == Abi::X86_32 { narrow } else { wide };
            i16::from_le_bytes([after[at], after[at + 1]])
        };
        let status = match op {
            Op::Copy => status_at(36, 20),
            Op::SetupTable => status_at(8, 8),
            Op::GetStatusFrames => status_at(6, 6),
            Op::Transfer => status_at(16, 12),
            _ => 0,
        };
        let pins = stage.pins(G, LOW);
        let frames = stage.domain(C).frames();
        stage.finish();
        (done, status, pins, frames)
    };
    for op in Op::ALL {
        for seed in [0, 1, 2, 3, 65, 200] {
            let (wide, narrow) = (outcome(Abi::X86_64, op, seed), outcome(Abi::X86_32, op, seed));
            assert_eq!(wide, narrow, "{op} {seed}");
        }
    }
}

/// XSA-114: mappings without end do not keep a growth or a change of version waiting for ever.
#[test]
fn xsa_114_readers_do_not_starve_who_needs_the_table() {
    let stage = Stage::new(Scene::pv().config(|config| config.processors = 8));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..3_usize)
        .map(|vcpu| {
            let stop = Arc::clone(&stop);
            stage.spawn(move |stage| {
                let place = stage.place(vcpu as u64);
                while !stop.load(Ordering::Relaxed) {
                    let item = stage.map_on((C, vcpu), (G, LOW), place, RO);
                    if item.status.is_okay() {
                        assert_eq!(stage.unmap_on(vcpu, item.handle, place, 0), GrantStatus::OKAY);
                    }
                }
            })
        })
        .collect();
    let begin = std::time::Instant::now();
    for round in 0..20 {
        let mut cpu = stage.processor();
        let frames = 2 + round;
        let status = cpu.setup_table(&stage.vcpu(G, 0), DomId::SELF, frames, None, &mut |_, _| true);
        assert_eq!(status, GrantStatus::OKAY);
        drop(cpu);
        assert_eq!(stage.set_version(G, 1 + (round + 1) % 2), Ok(()));
    }
    assert!(begin.elapsed() < std::time::Duration::from_secs(20));
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    stage.finish();
}

/// XSA-92, XSA-378, XSA-507: what stands at an address that a table frame or a grant is to replace: a
/// grant, a tool's mapping and a device stay; a special page is not freed as memory.
#[test]
fn xsa_507_table_frames_and_grants_are_not_memory_to_be_reclaimed() {
    let stage = Stage::new(Scene::hvm());
    let place = |idx: u64, gfn: u64| {
        let mut cpu = stage.processor();
        cpu.place_frame(&stage.vcpu(C, 0), DomId::SELF, idx, Gfn(gfn))
    };
    assert_eq!(place(0, 0x300), Ok(()));
    let table = stage.domain(C).shared_frame(0).unwrap().mfn();
    // Another table frame at the same place: the first is unhooked, not freed.
    assert_eq!(place(1, 0x300), Ok(()));
    assert_eq!(stage.machine.frame(table).unwrap().owner, PageOwner::Domain(C));
    assert!(stage.machine.frame(table).unwrap().allocated);
    stage.grant(C, LOW, T, stage.local[0], NONE);
    let item = stage.map_on((T, 0), (C, LOW), stage.place(3), RO);
    assert_eq!(item.status, GrantStatus::OKAY, "the table works");
    // A grant mapping is removed by an unmap only.
    let handle = stage.mapped(0, LOW, 0, RW);
    let at = stage.place(0) >> 12;
    assert_eq!(place(2, at), Err(Errno::Nxio));
    let over = stage.map_on((C, 0), (G, LOW), stage.place(0), RO);
    assert_eq!(over.status, GrantStatus::GENERAL_ERROR, "nor replaced by another");
    assert!(
        !stage.guest(C, |guest| guest.crashes()).is_empty(),
        "spec 4.4.2: the caller is to blame"
    );
    let entry = stage.guest(C, |guest| guest.physmap(Gfn(at)));
    assert_eq!(entry, Some(P2mEntry::Grant(stage.frame.mfn, Access::Write)));
    assert_eq!(stage.unmap_on(0, handle, stage.place(0), 0), GrantStatus::OKAY);
    stage.finish();
}

/// XSA-290, XSA-299, XSA-310, XSA-111: every batch, interrupted between all its items, does each once.
#[test]
fn xsa_310_an_interrupted_batch_does_each_item_once() {
    for (abi, narrow) in [(Abi::X86_64, false), (Abi::X86_32, true)] {
        let builder = if narrow {
            Scene::pv().caller_32()
        } else {
            Scene::pv()
        };
        let stage = Stage::new(builder);
        stage.add_args(C, 4);
        for n in 0..70_u64 {
            let item = MapGrantRef {
                host_addr: stage.place(n),
                flags: RO,
                gref: LOW,
                dom: G,
                ..MapGrantRef::default()
            };
            let mut raw = [0; 32];
            item.encode(abi, &mut raw).unwrap();
            stage.poke(C, ARGS + 32 * n, &raw);
        }
        let mut stops = 0;
        let done = stage.hypercall(C, abi, call(Op::MapGrantRef, 70), || {
            stops += 1;
            true
        });
        assert_eq!((done, stops), (Ok(()), 69), "it stops between all items");
        assert_eq!(stage.pins(G, LOW), [0, 70, 0, 0]);
        let handles: Vec<GrantHandle> = (0..70_u64)
            .map(|n| {
                let raw: [u8; 32] = stage.peek(C, ARGS + 32 * n);
                let item = MapGrantRef::decode(abi, &raw).unwrap();
                assert_eq!(item.status, GrantStatus::OKAY);
                item.handle
            })
            .collect();
        for (handle, n) in handles.iter().zip(0..) {
            let item = gnttab_abi::UnmapGrantRef {
                host_addr: stage.place(n),
                handle: *handle,
                ..gnttab_abi::UnmapGrantRef::default()
            };
            let mut raw = [0; 24];
            item.encode(abi, &mut raw).unwrap();
            stage.poke(C, ARGS + 24 * n, &raw);
        }
        // Groups of 32: what was unmapped is flushed and given back before the call stops.
        let mut outcome = stage.hypercall_once(C, abi, call(Op::UnmapGrantRef, 70), &mut || true);
        let mut left = 70;
        while let Outcome::Continue(next) = outcome {
            left -= 32;
            assert_eq!(next.count, left);
            assert_eq!(stage.pins(G, LOW)[1], u8::try_from(left).unwrap());
            assert_eq!(stage.audit(), []);
            outcome = stage.hypercall_once(C, abi, next, &mut || true);
        }
        assert_eq!(
            (outcome, left),
            (Outcome::Done(Ok(())), 6),
            "it stops behind each group"
        );
        assert_eq!(stage.pins(G, LOW), [0; 4]);
        stage.finish();
    }
}

/// XSA-113, N-15, N-43: after every refusal that a policy can give, at every place where it is asked,
/// nothing is held.
#[test]
fn n_15_a_refusal_by_policy_holds_nothing() {
    type Act = fn(&Stage);
    let acts: [Act; 7] = [
        |stage| {
            stage.map_on((C, 0), (G, LOW), stage.place(0), RW);
        },
        |stage| {
            stage.copy_grant(0, LOW, true);
            stage.copy_grant(0, LOW, false);
        },
        |stage| {
            stage.transfer_as(C, stage.local[1].mfn, G, HIGH);
        },
        |stage| {
            let _ = stage.processor().query_size(&stage.vcpu(C, 0), G);
        },
        |stage| {
            let _ = stage.processor().get_version(&stage.vcpu(C, 0), G);
        },
        |stage| {
            let mut cpu = stage.processor();
            cpu.setup_table(&stage.vcpu(C, 0), G, 3, None, &mut |_, _| true);
        },
        |stage| {
            let mut cpu = stage.processor();
            cpu.get_status_frames(&stage.vcpu(C, 0), G, 1, None, &mut |_, _| true);
        },
    ];
    for act in acts {
        let stage = Stage::v2();
        let live = stage.mapped(1, LOW, 5, RO);
        stage.machine.set_rule(|_| Some(false));
        act(&stage);
        assert_eq!(
            stage.unmap_on(1, live, stage.place(5), 0),
            GrantStatus::PERMISSION_DENIED
        );
        assert_eq!(stage.audit(), []);
        stage.machine.set_rule(|_| None);
        assert_eq!(stage.unmap_on(1, live, stage.place(5), 0), GrantStatus::OKAY);
        assert_eq!(stage.pins(G, LOW), [0; 4]);
        stage.finish();
    }
}

/// XSA-252, PIN-4: what one mapping holds, no other operation gives back.
#[test]
fn xsa_252_no_operation_gives_back_what_another_holds() {
    let stage = Stage::pv();
    let keep = stage.mapped(0, LOW, 0, BOTH);
    let due = [1, 0, 1, 0];
    for _ in 0..3 {
        stage.copy_grant(1, LOW, true);
        stage.copy_grant(1, LOW, false);
        let more = stage.mapped(1, LOW, 1, RO);
        assert_eq!(stage.unmap_on(1, more, stage.place(1), 0), GrantStatus::OKAY);
        stage
            .faults()
            .fail_nth(1, |request| matches!(request, Request::MapHost { .. }));
        let failed = stage.map_on((C, 1), (G, LOW), stage.place(2), BOTH);
        assert_eq!(failed.status, GrantStatus::GENERAL_ERROR);
        stage.faults().clear();
        assert_eq!(
            stage.unmap_on(1, keep, stage.place(3), 0),
            GrantStatus::GENERAL_ERROR
        );
        assert_eq!(stage.pins(G, LOW), due);
        assert_eq!(stage.audit(), []);
    }
    stage.finish();
}

/// XSA-364, XSA-100: a page that comes back from a dead domain, or was freed, shows nothing of it.
#[test]
fn xsa_364_a_page_comes_back_clean() {
    let stage = Stage::pv();
    let old: Vec<Page> = (0..600)
        .map(|_| {
            let page = stage.guest(T, |guest| guest.add_page()).unwrap();
            stage.fill(page, 0x99);
            page
        })
        .collect();
    stage.kill(T);
    let mut reused = 0;
    for _ in 0..600 {
        let page = stage.guest(C, |guest| guest.add_page()).unwrap();
        assert_eq!(stage.bytes(page), [0; 8]);
        reused += u32::from(old.iter().any(|was| was.mfn == page.mfn));
    }
    assert!(reused > 0, "some of the frames are the same");
    stage.finish();
}

/// N-41: a wide Arm address is not cut to fit.
#[test]
fn n_41_an_arm_address_is_not_cut() {
    let stage = Stage::new(Scene::arm().caller_32());
    let wide = stage.place(0) | 1 << 49;
    let item = stage.map_on((C, 0), (G, LOW), wide, RW);
    assert_eq!(item.status, GrantStatus::GENERAL_ERROR);
    assert_eq!((stage.pins(G, LOW), stage.marks(G, LOW)), ([0; 4], NONE));
    stage.finish();
}
