//! The last of what is allowed and the first of what is not, and what is asked of an embedder with which
//! numbers: each test fails on a change of one of them.

#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use gnttab_abi::{
        Abi, Command, Copy, CopyFlags, CopyPtr, DomId, EntryFlags, Errno, GetStatusFrames, Gfn, GrantRef,
        GrantStatus, MapFlags, MapGrantRef, Op, SetupTable, SwapGrantRef, UnmapAndReplace, UnmapGrantRef,
    };
    use gnttab_engine::machine::{Between, C, G, Guest, P2mEntry, Page, Request, Scene, T, Verdict, Watch};
    use gnttab_engine::{
        Access, Call, DomainKind, EntryWords, Fault, GuestMemory, Outcome, PageWords, Release, Vcpu, Version,
    };

    const AT: u64 = 0x10_0000;

    /// A caller's memory, from [`AT`] on, that remembers of which ranges it was asked whether they could be
    /// its own.
    struct Memory {
        bytes: RefCell<Vec<u8>>,
        asked: RefCell<Vec<(u64, u64)>>,
        plausible: bool,
    }

    impl Memory {
        fn new(bytes: Vec<u8>) -> Memory {
            Memory {
                bytes: RefCell::new(bytes),
                asked: RefCell::default(),
                plausible: true,
            }
        }

        fn of<T>(items: &[T], size: usize, encode: impl Fn(&T, &mut [u8])) -> Memory {
            let mut bytes = vec![0; items.len() * size];
            for (item, bytes) in items.iter().zip(bytes.chunks_mut(size)) {
                encode(item, bytes);
            }
            Memory::new(bytes)
        }

        fn at(&self, addr: u64, len: usize) -> Result<std::ops::Range<usize>, Fault> {
            let start = usize::try_from(addr.wrapping_sub(AT)).map_err(|_| Fault { addr })?;
            let end = start.checked_add(len).ok_or(Fault { addr })?;
            if end <= self.bytes.borrow().len() {
                Ok(start..end)
            } else {
                Err(Fault { addr })
            }
        }

        fn word(&self, at: usize) -> u64 {
            let bytes = self.bytes.borrow();
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        }
    }

    impl GuestMemory for Memory {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
            into.copy_from_slice(&self.bytes.borrow()[self.at(addr, into.len())?]);
            Ok(())
        }
        fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
            let range = self.at(addr, bytes.len())?;
            self.bytes.borrow_mut()[range].copy_from_slice(bytes);
            Ok(())
        }
        fn plausible(&self, addr: u64, bytes: u64) -> bool {
            self.asked.borrow_mut().push((addr, bytes));
            self.plausible
        }
    }

    fn call(scene: &Scene, abi: Abi, op: Op, count: u32, memory: &Memory) -> Outcome {
        call_until(scene, abi, op, count, memory, &mut || false)
    }

    fn call_until(
        scene: &Scene,
        abi: Abi,
        op: Op,
        count: u32,
        memory: &Memory,
        yield_now: &mut dyn FnMut() -> bool,
    ) -> Outcome {
        let call = Call {
            command: Command(op as u32),
            addr: AT,
            count,
        };
        scene
            .processor()
            .hypercall(&scene.vcpu(C, 0), abi, call, memory, yield_now)
    }

    /// A domain's table has so many frames from now on.
    fn grow(scene: &Scene, id: DomId, frames: u32) {
        let vcpu = scene.vcpu(id, 0);
        let grown = scene
            .processor()
            .setup_table(&vcpu, DomId::SELF, frames, None, &mut |_, _| true);
        assert_eq!(grown, GrantStatus::OKAY);
    }

    const OKAY: Outcome = Outcome::Done(Ok(()));

    fn failed(errno: Errno) -> Outcome {
        Outcome::Done(Err(errno))
    }

    // --- the door -------------------------------------------------------------------------------

    /// Spec 3.1.1 step 6 and 3.1.4 step 1: the array must be plausible for all of its items, of the size
    /// that they have for this caller.
    #[test]
    fn an_array_is_plausible_for_count_items() {
        let scene = Scene::pv().build();
        for (abi, op, size) in [
            (Abi::X86_64, Op::MapGrantRef, MapGrantRef::size(Abi::X86_64)),
            (Abi::X86_64, Op::UnmapGrantRef, UnmapGrantRef::size(Abi::X86_64)),
            (Abi::X86_64, Op::Copy, Copy::size(Abi::X86_64)),
            (Abi::X86_64, Op::SwapGrantRef, SwapGrantRef::size(Abi::X86_64)),
            (Abi::X86_32, Op::Copy, Copy::size(Abi::X86_32)),
            (Abi::X86_32, Op::MapGrantRef, MapGrantRef::size(Abi::X86_32)),
            (Abi::X86_32, Op::SetupTable, SetupTable::size(Abi::X86_32)),
            (
                Abi::X86_32,
                Op::GetStatusFrames,
                GetStatusFrames::size(Abi::X86_32),
            ),
        ] {
            for count in [3, 0x7FFF_FFFF] {
                let memory = Memory {
                    plausible: false,
                    ..Memory::new(vec![0; 4096])
                };
                let done = call(&scene, abi, op, count, &memory);
                assert_eq!(done, failed(Errno::Fault), "{op:?}, {count} items");
                let bytes = u64::from(count) * size as u64;
                assert_eq!(*memory.asked.borrow(), [(AT, bytes)], "{op:?}, {count} items");
            }
            // Step 2 of 3.1.4, step 3 of 3.1.1: a count that is negative.
            let memory = Memory {
                plausible: false,
                ..Memory::new(vec![0; 4096])
            };
            let done = call(&scene, abi, op, 0x8000_0000, &memory);
            assert_eq!(done, failed(Errno::Inval), "{op:?}");
        }
    }

    /// Spec 3.1.1 step 6 is of arrays: where a count means nothing, no array of that length is asked for.
    #[test]
    fn a_count_that_is_ignored_asks_for_no_array() {
        let scene = Scene::pv().build();
        for op in [Op::SetVersion, Op::GetVersion] {
            let memory = Memory::new(vec![0; 8]);
            memory.bytes.borrow_mut()[..4].copy_from_slice(&2_u32.to_le_bytes());
            let done = call(&scene, Abi::X86_64, op, 0x7FFF_FFFF, &memory);
            assert_eq!(done, OKAY, "{op:?}");
            assert_eq!(*memory.asked.borrow(), []);
        }
    }

    /// Spec 3.1.4 steps 4 and 5, 3.5, 3.10: the list must be plausible for as many elements as are asked
    /// for, of the width that they have.
    #[test]
    fn a_list_is_plausible_for_its_elements() {
        for (abi, width) in [(Abi::X86_64, 8), (Abi::X86_32, 4)] {
            let scene = Scene::pv().build();
            let item = SetupTable {
                dom: DomId::SELF,
                nr_frames: 3,
                frame_list: AT + 64,
                ..SetupTable::default()
            };
            let memory = Memory::new(vec![0; 4096]);
            item.encode(abi, &mut memory.bytes.borrow_mut()).unwrap();
            assert_eq!(call(&scene, abi, Op::SetupTable, 1, &memory), OKAY);
            assert!(memory.asked.borrow().contains(&(AT + 64, 3 * width)), "{abi:?}");
        }
    }

    /// Spec 3.10 step 7: the numbers of status frames lie 8 bytes apart, for every caller.
    #[test]
    fn status_frames_are_listed_one_behind_the_other() {
        for abi in [Abi::X86_64, Abi::X86_32] {
            let scene = Scene::pv().version(C, Version::V2).build();
            grow(&scene, C, 9);
            let item = GetStatusFrames {
                nr_frames: 2,
                dom: DomId::SELF,
                frame_list: AT + 64,
                ..GetStatusFrames::default()
            };
            let memory = Memory::new(vec![0; 4096]);
            item.encode(abi, &mut memory.bytes.borrow_mut()).unwrap();
            assert_eq!(call(&scene, abi, Op::GetStatusFrames, 1, &memory), OKAY);
            assert!(memory.asked.borrow().contains(&(AT + 64, 16)), "{abi:?}");
            for index in [0, 1] {
                let frame = scene.domain(C).status_frame(index).unwrap().mfn();
                assert_eq!(memory.word(64 + index as usize * 8), frame.0, "{abi:?}");
            }
        }
    }

    /// Copies of one byte within a page, as a 32-bit caller's: `count` to be made, and some behind them that
    /// are not.
    fn copies(scene: &Scene, count: usize) -> Memory {
        let page = CopyPtr::frame(scene.local[0].gfn.0, 0);
        let item = Copy {
            source: page,
            dest: CopyPtr { offset: 1, ..page },
            len: 1,
            flags: CopyFlags::empty(),
            status: GrantStatus(99),
        };
        let size = Copy::size(Abi::X86_32);
        Memory::of(&vec![item; count], size, |item, bytes| {
            item.encode(Abi::X86_32, bytes).unwrap();
        })
    }

    fn statuses(memory: &Memory) -> Vec<i16> {
        let bytes = memory.bytes.borrow();
        let items = bytes.chunks(Copy::size(Abi::X86_32));
        items
            .map(|item| i16::from_le_bytes([item[20], item[21]]))
            .collect()
    }

    /// Spec 3.1.4 step 6: the last chunk ends with the array.
    #[test]
    fn the_last_chunk_of_a_32_bit_batch_ends_with_it() {
        let scene = Scene::pv().caller_32().build();
        let memory = copies(&scene, 700);
        assert_eq!(call(&scene, Abi::X86_32, Op::Copy, 250, &memory), OKAY);
        let statuses = statuses(&memory);
        assert_eq!(statuses[..250], [0; 250]);
        assert_eq!(statuses[250..], [99; 450]);
    }

    /// Spec 0.5: a batch that is asked to stop does so, within a chunk too, once it has got somewhere.
    #[test]
    fn a_32_bit_batch_stops_when_it_is_asked_to() {
        let scene = Scene::pv().caller_32().build();
        let memory = copies(&scene, 20);
        let mut asked = 0;
        let mut once = || {
            asked += 1;
            asked == 5
        };
        let stopped = call_until(&scene, Abi::X86_32, Op::Copy, 20, &memory, &mut once);
        let Outcome::Continue(rest) = stopped else {
            panic!("it went on: {stopped:?}");
        };
        let done = 20 - rest.count as usize;
        assert!((1..20).contains(&done), "{done} were made");
        let statuses = statuses(&memory);
        assert_eq!(statuses[..done], vec![0; done]);
        assert_eq!(statuses[done..], vec![99; 20 - done]);
    }

    // --- map ------------------------------------------------------------------------------------

    /// Spec 3.3 step 14: a page that is shared by its content can be mapped for reading, and by nobody for
    /// writing while it is: not even through an entry that is in use.
    #[test]
    fn a_page_shared_by_content_is_mapped_for_reading_only() {
        let scene = Scene::pv().kind(G, DomainKind::Hvm).build();
        let mfn = scene.machine.add_shared_frame();
        let gfn = Gfn(0x5000);
        let granter = scene.domain(G);
        let guest: &Guest = granter.private();
        assert!(guest.set_physmap(gfn, Some(P2mEntry::Shared(mfn))));
        scene.grant(G, Scene::GREF, C, Page { gfn, mfn }, EntryFlags::empty());
        let read_only = MapFlags::HOST_MAP | MapFlags::READONLY;
        let first = scene.map(scene.place(0), read_only);
        assert_eq!(first.status, GrantStatus::OKAY);
        assert_eq!(first.dev_bus_addr, mfn.address());
        for flags in [MapFlags::HOST_MAP, MapFlags::DEVICE_MAP] {
            let write = scene.map(scene.place(1), flags);
            assert_eq!(write.status, GrantStatus::GENERAL_ERROR, "{flags}");
        }
        let second = scene.map(scene.place(2), read_only);
        assert_eq!(second.status, GrantStatus::OKAY);
        assert_eq!(guest.physmap(gfn), Some(P2mEntry::Shared(mfn)));
        assert_eq!(scene.unmap(scene.place(0), first.handle), GrantStatus::OKAY);
        assert_eq!(scene.unmap(scene.place(2), second.handle), GrantStatus::OKAY);
        assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 3.3 step 14 c: who maps for writing takes the writable type of a PV granter's page, so that it
    /// can become no page table meanwhile; who reads does not.
    #[test]
    fn a_writable_mapping_takes_the_type() {
        for (flags, types) in [
            (MapFlags::HOST_MAP, 1),
            (MapFlags::HOST_MAP | MapFlags::READONLY, 0),
            (MapFlags::DEVICE_MAP, 1),
            (MapFlags::DEVICE_MAP | MapFlags::READONLY, 0),
            (MapFlags::HOST_MAP | MapFlags::DEVICE_MAP, 2),
        ] {
            let scene = Scene::pv().build();
            let before = scene.machine.frame(scene.frame.mfn).unwrap();
            let mapped = scene.map(scene.place(0), flags);
            assert_eq!(mapped.status, GrantStatus::OKAY);
            let info = scene.machine.frame(scene.frame.mfn).unwrap();
            assert_eq!(info.type_count - before.type_count, types, "{flags}");
            assert_eq!(scene.audit(), []);
        }
    }

    /// Spec 1.5.3: an entry's status word has the entry's number, whichever page either lies in.
    #[test]
    fn every_entry_has_its_own_status_word() {
        let scene = Scene::pv().granter_v2().build();
        grow(&scene, G, 18);
        let granter = scene.domain(G);
        for gref in [0, 5, 255, 256, 300, 511, 512, 1100, 2047, 2048, 2305, 4096, 4607] {
            scene.grant(G, GrantRef(gref), C, scene.frame, EntryFlags::empty());
            let mapped = scene.map_as(C, G, GrantRef(gref), scene.place(0), MapFlags::HOST_MAP);
            assert_eq!(mapped.status, GrantStatus::OKAY);
            let marked: Vec<u32> = (0..4608)
                .filter(|word| {
                    let page = granter.status_frame(word / 2048).unwrap();
                    page.as_ref().read_bytes::<2>(*word as usize % 2048 * 2) != Some([0; 2])
                })
                .collect();
            assert_eq!(marked, [gref]);
            assert_eq!(scene.unmap(scene.place(0), mapped.handle), GrantStatus::OKAY);
        }
    }

    /// Spec 3.4 step 12: an unmap says that a page is dirty if it could be written.
    #[test]
    fn the_end_of_a_writable_mapping_makes_dirty() {
        for (flags, pages) in [
            (MapFlags::HOST_MAP, 1),
            (MapFlags::HOST_MAP | MapFlags::READONLY, 0),
        ] {
            let scene = Scene::pv().build();
            let mapped = scene.map(scene.place(0), flags);
            assert_eq!(scene.unmap(scene.place(0), mapped.handle), GrantStatus::OKAY);
            assert_eq!(scene.domain(G).private().dirty().len(), pages, "{flags}");
        }
    }

    /// Spec 3.4.4, by the typed door: two items, of which the second has nothing to replace.
    #[test]
    fn what_is_replaced_is_said_of_each_item() {
        let scene = Scene::pv().build();
        let mapped = scene.map(scene.place(0), MapFlags::HOST_MAP);
        let guest = scene.domain(C);
        let own = scene.local[0];
        assert!(guest.private().map(scene.place(1), own.gfn, Access::Write));
        let item = UnmapAndReplace {
            host_addr: scene.place(0),
            new_addr: scene.place(1),
            handle: mapped.handle,
            status: GrantStatus(99),
        };
        let mut items = [item, item];
        scene.processor().unmap_and_replace(&scene.vcpu(C, 0), &mut items);
        let statuses = items.map(|item| item.status);
        assert_eq!(statuses, [GrantStatus::OKAY, GrantStatus::BAD_HANDLE]);
        assert_eq!(guest.private().pte(scene.place(0)).unwrap().mfn(), own.mfn);
        assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
        assert_eq!(scene.audit(), []);
    }

    // --- whose affair it is ---------------------------------------------------------------------

    /// Refuses whatever the policy is asked for.
    struct Strict;

    impl Watch for Strict {
        fn before(&self, request: &Request) -> Verdict {
            if matches!(request, Request::MaySetup { .. }) {
                Verdict::Refuse
            } else {
                Verdict::Proceed
            }
        }
    }

    /// Spec 3.5, 3.6, 3.10, 6.2: of a domain's own table nobody is asked, whatever it calls itself.
    #[test]
    fn of_its_own_table_a_domain_asks_nobody() {
        let builder = Scene::pv().kind(C, DomainKind::Hvm).version(C, Version::V2);
        let scene = builder.build_on(|machine| Between::new(machine, Strict));
        let vcpu = scene.vcpu(C, 0);
        let mut cpu = scene.processor();
        for (dom, okay) in [(DomId::SELF, true), (C, true), (G, false)] {
            let status = if okay {
                GrantStatus::OKAY
            } else {
                GrantStatus::PERMISSION_DENIED
            };
            assert_eq!(cpu.setup_table(&vcpu, dom, 1, None, &mut |_, _| true), status);
            assert_eq!(cpu.query_size(&vcpu, dom).err(), (!okay).then_some(status));
            let frames = u32::from(okay);
            assert_eq!(
                cpu.get_status_frames(&vcpu, dom, frames, None, &mut |_, _| true),
                status
            );
        }
        for (dom, gfn) in [(DomId::SELF, 0x300), (C, 0x301)] {
            assert_eq!(cpu.place_frame(&vcpu, dom, 0, Gfn(gfn)), Ok(()), "{dom}");
        }
    }

    /// A page of words ends where it ends: its last byte is there, the one behind it is not, and nothing at
    /// all can be moved at its end.
    #[test]
    fn a_page_of_words_ends_with_its_last_byte() {
        let page = PageWords::zeroed();
        for (offset, len, there) in [
            (4095, 1, true),
            (4096, 0, true),
            (4064, 32, true),
            (0, 4096, true),
            (4095, 2, false),
            (4096, 1, false),
            (4097, 0, false),
            (4072, 32, false),
            (usize::MAX, 2, false),
        ] {
            let mut bytes = vec![7; len];
            assert_eq!(page.write(offset, &bytes), there, "{offset}, {len}");
            assert_eq!(page.read(offset, &mut bytes), there, "{offset}, {len}");
            assert_eq!(bytes, vec![7; len]);
        }
    }

    // --- copy -----------------------------------------------------------------------------------

    /// Spec 5.5: what was written through an entry is dirty, and what was only read is not.
    #[test]
    fn a_copy_that_reads_makes_nothing_dirty() {
        [false, true].into_iter().for_each(reads_make_nothing_dirty);
    }

    fn reads_make_nothing_dirty(inside: bool) {
        let scene = Scene::pv().build();
        scene.machine.work_inside(inside);
        let granted = CopyPtr::grant(G, Scene::GREF, 0);
        let own = CopyPtr::frame(scene.local[0].gfn.0, 0);
        let dirty = || scene.domain(G).private().dirty();
        for (source, dest, flags, expected) in [
            (granted, own, CopyFlags::SOURCE_GREF, vec![]),
            (own, granted, CopyFlags::DEST_GREF, vec![scene.frame.mfn]),
        ] {
            let mut items = [Copy {
                source,
                dest,
                len: 8,
                flags,
                ..Copy::default()
            }];
            scene.processor().copy(&scene.vcpu(C, 0), &mut items);
            assert_eq!(items[0].status, GrantStatus::OKAY);
            assert_eq!(dirty(), expected);
        }
    }

    /// Spec 5.2: the source is claimed before the destination, which is not touched if there is none: not even a
    /// mark that its granter left there goes. So inside a table as outside.
    #[test]
    fn of_two_sides_the_source_is_claimed_first() {
        const LEFT: EntryFlags = EntryFlags::PERMIT_ACCESS.union(EntryFlags::WRITING);
        for (inside, version) in [(false, Version::V1), (true, Version::V1), (true, Version::V2)] {
            let scene = Scene::pv().version(G, version).build();
            scene.machine.work_inside(inside);
            let into_grant = |gfn| {
                let mut items = [Copy {
                    source: CopyPtr::frame(gfn, 0),
                    dest: CopyPtr::grant(G, Scene::GREF, 0),
                    len: 8,
                    flags: CopyFlags::DEST_GREF,
                    ..Copy::default()
                }];
                scene.processor().copy(&scene.vcpu(C, 0), &mut items);
                items[0].status
            };
            let own = scene.local[0].gfn.0;
            assert_eq!(into_grant(own), GrantStatus::OKAY);
            let leave = || match version {
                Version::V1 => {
                    let EntryWords::V1(mut entry) = scene.entry(G, Scene::GREF) else {
                        unreachable!("the table's version")
                    };
                    entry.head.flags = LEFT;
                    scene.set_v1(G, Scene::GREF, entry);
                }
                Version::V2 => scene.set_status(G, Scene::GREF, EntryFlags::WRITING),
            };
            leave();
            assert_eq!(into_grant(0xF_FFFF), GrantStatus::BAD_PAGE);
            assert_eq!(scene.flags(G, Scene::GREF), LEFT, "inside: {inside}");
            assert_eq!(into_grant(own), GrantStatus::OKAY);
            assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
            assert_eq!(scene.audit(), []);
        }
    }

    // --- the end of a domain --------------------------------------------------------------------

    /// Spec 7.2: mappings are taken from a domain only when it is dying and with every vCPU of it, and of
    /// nobody else, in hand.
    #[test]
    fn mappings_are_released_with_all_vcpus_of_a_dying_domain() {
        let builder = [C, T].into_iter().fold(Scene::pv(), |builder, id| {
            builder.limits(id, |limits| limits.vcpus = 2)
        });
        let scene = builder.build();
        let mapped = scene.map(scene.place(0), MapFlags::HOST_MAP);
        assert_eq!(mapped.status, GrantStatus::OKAY);
        let release = |vcpus: &[Vcpu<_>]| scene.processor().release_mappings(vcpus, u32::MAX);
        let of = |id, number| scene.vcpu(id, number);
        assert_eq!(release(&[of(C, 0), of(C, 1)]), Release::StillRunning, "it lives");
        scene.engine.begin_teardown(&scene.domain(C));
        assert_eq!(release(&[]), Release::StillRunning);
        assert_eq!(release(&[of(C, 0)]), Release::StillRunning, "one may be inside");
        assert_eq!(release(&[of(C, 0), of(T, 1)]), Release::StillRunning, "another's");
        assert!(scene.flags(G, Scene::GREF).contains(EntryFlags::IN_USE));
        assert_eq!(release(&[of(C, 0), of(C, 1)]), Release::Done { released: 1 });
        assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
    }

    /// Spec 3.9 step 5: an entry in use keeps the table's version, wherever it lies, from the first that is
    /// not reserved on.
    #[test]
    fn an_entry_in_use_anywhere_keeps_the_version() {
        for (version, other, entries) in [(Version::V1, 2, 512), (Version::V2, 1, 256)] {
            for gref in [8, 9, 63, 64, 65, 128, entries - 1, entries, entries + 7].map(GrantRef) {
                let scene = Scene::pv().version(G, version).build();
                grow(&scene, G, 2);
                let change = || scene.processor().set_version(&scene.vcpu(G, 0), other);
                scene.grant(G, gref, C, scene.frame, EntryFlags::empty());
                let mapped = scene.map_as(C, G, gref, scene.place(0), MapFlags::HOST_MAP);
                assert_eq!(mapped.status, GrantStatus::OKAY);
                assert_eq!(change(), Err(Errno::Busy), "{gref}");
                assert_eq!(scene.unmap(scene.place(0), mapped.handle), GrantStatus::OKAY);
                assert_eq!(change(), Ok(()), "{gref}");
            }
        }
    }

    /// Spec 7.4: a soft reset counts all entries in use, and names ten.
    #[test]
    fn a_soft_reset_names_ten_and_counts_all() {
        let scene = Scene::pv().build();
        for number in 0..12 {
            let gref = GrantRef(20 + number);
            scene.grant(G, gref, C, scene.frame, EntryFlags::empty());
            let mapped = scene.map_as(C, G, gref, scene.place(number.into()), MapFlags::HOST_MAP);
            assert_eq!(mapped.status, GrantStatus::OKAY);
        }
        let found = scene.processor().soft_reset(G).unwrap();
        assert_eq!((found.total, found.entries.len()), (12, 10));
    }

    /// Spec 6.2 step 4: whose table another domain may place is the embedder's to say.
    #[test]
    fn who_places_a_frame_is_asked_for_another_domain_only() {
        let scene = Scene::pv()
            .kind(C, DomainKind::Hvm)
            .kind(T, DomainKind::Hvm)
            .build();
        let place = |dom, gfn| scene.processor().place_frame(&scene.vcpu(C, 0), dom, 0, Gfn(gfn));
        assert_eq!(place(T, 0x300), Err(Errno::Perm), "C is no control domain");
        assert_eq!(place(C, 0x300), Ok(()), "by its own number");
        assert_eq!(place(DomId::SELF, 0x301), Ok(()));
        let there = scene.domain(C).private().physmap(Gfn(0x301));
        assert_eq!(
            there.and_then(P2mEntry::own_ram),
            Some(scene.domain(C).shared_frame(0).unwrap().mfn())
        );
    }
}
