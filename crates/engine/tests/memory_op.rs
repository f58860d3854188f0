//! The raw door of the memory operations (spec 6, vectors) and soft reset (7.4).
#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use gnttab_abi::{
        Abi, AcquireResource, AddToPhysmap, AddToPhysmapBatch, DomId, Errno, Gfn, MEMOP_ACQUIRE_RESOURCE,
        MEMOP_ADD_TO_PHYSMAP, MEMOP_ADD_TO_PHYSMAP_BATCH, MapFlags,
    };
    use gnttab_engine::machine::{C, G, P, P2mEntry, Scene};
    use gnttab_engine::{Config, DomainKind, Fault, GuestMemory, MemoryOutcome, Reference, Vcpu};

    /// One page of a caller's memory, at address 0x1000.
    struct Page(RefCell<[u8; 4096]>);

    const AT: u64 = 0x1000;

    impl Page {
        fn range(&self, addr: u64, len: usize) -> Result<std::ops::Range<usize>, Fault> {
            let start = usize::try_from(addr.wrapping_sub(AT)).map_err(|_| Fault { addr })?;
            let end = start
                .checked_add(len)
                .filter(|end| *end <= 4096)
                .ok_or(Fault { addr })?;
            Ok(start..end)
        }
    }

    impl GuestMemory for Page {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
            let range = self.range(addr, into.len())?;
            into.copy_from_slice(&self.0.borrow()[range]);
            Ok(())
        }
        fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
            let range = self.range(addr, bytes.len())?;
            self.0.borrow_mut()[range].copy_from_slice(bytes);
            Ok(())
        }
    }

    fn acquire(scene: &Scene, caller: DomId, abi: Abi, call: &AcquireResource) -> (MemoryOutcome, Page) {
        let page = Page(RefCell::new([0; 4096]));
        call.encode(abi, &mut page.0.borrow_mut()[..]).unwrap();
        let domain = scene.engine.domain(caller).unwrap();
        let vcpu = Vcpu::take(&domain, 0).unwrap();
        let mut cpu = scene.engine.any_processor().unwrap();
        (cpu.memory_op(&vcpu, abi, MEMOP_ACQUIRE_RESOURCE, AT, &page), page)
    }

    fn resource() -> AcquireResource {
        AcquireResource {
            domid: G,
            kind: 1,
            ..AcquireResource::default()
        }
    }

    fn failed(errno: Errno) -> MemoryOutcome {
        MemoryOutcome::Done(Err(errno))
    }

    const OKAY: MemoryOutcome = MemoryOutcome::Done(Ok(()));

    #[test]
    fn x20_to_x22_the_size_is_asked_for_without_a_list() {
        let scene = Scene::pv().build();
        for abi in Abi::ALL {
            for (id, size) in [(0, 64), (1, 8)] {
                let (done, page) = acquire(&scene, P, abi, &AcquireResource { id, ..resource() });
                assert_eq!(done, OKAY);
                let answer = AcquireResource::decode(abi, &page.0.borrow()[..]).unwrap();
                assert_eq!(answer.nr_frames, size);
            }
            let unknown = AcquireResource { id: 2, ..resource() };
            assert_eq!(acquire(&scene, P, abi, &unknown).0, failed(Errno::Inval));
        }
    }

    #[test]
    fn x23_and_x24_frames_are_made_and_stored() {
        let scene = Scene::pv().build();
        let call = AcquireResource {
            nr_frames: 1,
            frame: 63,
            frame_list: AT + 64,
            ..resource()
        };
        let (done, page) = acquire(&scene, P, Abi::X86_64, &call);
        assert_eq!(done, OKAY);
        assert_ne!(page.0.borrow()[64..72], [0; 8]);
        assert_eq!(scene.engine.domain(G).unwrap().frames().0, 64);
    }

    #[test]
    fn x26_x32_and_x33_arguments_are_checked() {
        let scene = Scene::pv().build();
        let list = AT + 64;
        for call in [
            AcquireResource {
                frame_list: list,
                ..resource()
            },
            AcquireResource {
                nr_frames: 1,
                frame_list: list,
                frame: 1 << 32,
                ..resource()
            },
            AcquireResource {
                nr_frames: 1,
                frame_list: list,
                frame: u64::from(u32::MAX),
                ..resource()
            },
            AcquireResource {
                nr_frames: 1,
                frame_list: list,
                pad: 1,
                ..resource()
            },
            AcquireResource {
                nr_frames: 2,
                frame_list: list,
                frame: 63,
                ..resource()
            },
            AcquireResource {
                nr_frames: 1,
                ..resource()
            },
        ] {
            assert_eq!(
                acquire(&scene, P, Abi::X86_64, &call).0,
                failed(Errno::Inval),
                "{call:?}"
            );
        }
    }

    #[test]
    fn x29_to_x31_and_x34_who_may_acquire() {
        let scene = Scene::pv().build();
        let of = |domid| AcquireResource { domid, ..resource() };
        assert_eq!(
            acquire(&scene, P, Abi::X86_64, &of(DomId::SELF)).0,
            failed(Errno::Srch)
        );
        assert_eq!(acquire(&scene, P, Abi::X86_64, &of(P)).0, failed(Errno::Perm));
        assert_eq!(acquire(&scene, C, Abi::X86_64, &of(G)).0, failed(Errno::Perm));
        let old = Scene::hvm()
            .config(|config: &mut Config| config.reference = Reference::V4_17)
            .build();
        assert_eq!(acquire(&old, C, Abi::X86_64, &of(G)).0, failed(Errno::Acces));
    }

    #[test]
    fn a_list_that_faults_is_a_fault_and_what_exists_stays() {
        let scene = Scene::pv().build();
        let call = AcquireResource {
            nr_frames: 40,
            frame_list: AT + 4096 - 8,
            ..resource()
        };
        assert_eq!(acquire(&scene, P, Abi::X86_64, &call).0, failed(Errno::Fault));
        assert!(scene.engine.domain(G).unwrap().frames().0 >= 32);
    }

    /// Spec 6.1 step 1: what 4.17 denies, it denies translated callers that are not in control, and only
    /// 4.17 does.
    #[test]
    fn x34_only_4_17_denies_and_only_translated_callers() {
        let wrong = AcquireResource { pad: 1, ..resource() };
        for (kind, old, expected) in [
            (DomainKind::Hvm, true, Errno::Acces),
            (DomainKind::Hvm, false, Errno::Inval),
            (DomainKind::Pv, true, Errno::Inval),
            (DomainKind::Pv, false, Errno::Inval),
        ] {
            let builder = Scene::pv().kind(C, kind);
            let scene = if old { builder.v4_17() } else { builder }.build();
            let done = acquire(&scene, C, Abi::X86_64, &wrong).0;
            assert_eq!(done, failed(expected), "{kind:?}, 4.17: {old}");
        }
    }

    /// Spec 6.1 step 9: the last number that is allowed comes as far as the list, which is not there.
    #[test]
    fn the_last_allowed_number_of_frames() {
        for (nr_frames, expected) in [(0x3FF_FFFF, Errno::Fault), (0x400_0000, Errno::Inval)] {
            let scene = Scene::pv().build();
            let call = AcquireResource {
                nr_frames,
                frame_list: 0x9_0000,
                ..resource()
            };
            let done = acquire(&scene, P, Abi::X86_64, &call).0;
            assert_eq!(done, failed(expected), "{nr_frames:#x}");
        }
    }

    /// Spec 6.1 step 10: the last slice ends with what was asked for: no frame is made beyond, and no
    /// element of the list written.
    #[test]
    fn the_last_slice_ends_with_the_list() {
        let scene = Scene::pv().build();
        let call = AcquireResource {
            nr_frames: 40,
            frame: 1,
            frame_list: AT + 64,
            ..resource()
        };
        let (done, page) = acquire(&scene, P, Abi::X86_64, &call);
        assert_eq!(done, OKAY);
        let granter = scene.engine.domain(G).unwrap();
        assert_eq!(granter.frames().0, 41);
        for element in 0..42_u32 {
            let at = 64 + element as usize * 8;
            let number = u64::from_le_bytes(page.0.borrow()[at..at + 8].try_into().unwrap());
            let frame = if element < 40 {
                granter.shared_frame(1 + element).unwrap().mfn().0
            } else {
                0
            };
            assert_eq!(number, frame, "element {element}");
        }
    }

    /// Spec 6.1 step 10, a translated caller: a place that cannot be had gives its own reason if it is the
    /// first of a slice, and -EIO if it comes later; what is placed by then stays.
    #[test]
    fn a_place_that_cannot_be_had_says_why_if_it_is_the_first() {
        let scene = Scene::pv().kind(P, DomainKind::Hvm).build();
        let caller = scene.engine.domain(P).unwrap();
        let mmio = Gfn(0x402);
        let registers = P2mEntry::DirectMmio(gnttab_abi::Mfn(0xF_EE00));
        assert!(caller.private().set_physmap(mmio, Some(registers)));
        for (places, expected) in [
            ([0x402, 0x400], failed(Errno::Perm)),
            ([0x400, 0x402], failed(Errno::Io)),
            ([0x403, 0x401], OKAY),
        ] {
            let call = AcquireResource {
                nr_frames: 2,
                frame_list: AT + 64,
                ..resource()
            };
            let page = Page(RefCell::new([0; 4096]));
            call.encode(Abi::X86_64, &mut page.0.borrow_mut()[..]).unwrap();
            for (at, place) in (AT + 64..).step_by(8).zip(places) {
                page.write(at, &u64::to_le_bytes(place)).unwrap();
            }
            let vcpu = Vcpu::take(&caller, 0).unwrap();
            let mut cpu = scene.engine.any_processor().unwrap();
            let done = cpu.memory_op(&vcpu, Abi::X86_64, MEMOP_ACQUIRE_RESOURCE, AT, &page);
            assert_eq!(done, expected, "{places:x?}");
        }
        let table = |index| scene.engine.domain(G).unwrap().shared_frame(index).unwrap().mfn();
        for (index, place) in [(0, 0x400), (0, 0x403), (1, 0x401)] {
            let there = caller.private().physmap(Gfn(place));
            assert_eq!(there, Some(P2mEntry::Foreign(table(index))));
        }
    }

    #[test]
    fn other_spaces_resources_and_commands_are_the_embedders() {
        let scene = Scene::pv().build();
        let other = AcquireResource {
            kind: 0,
            ..resource()
        };
        assert_eq!(acquire(&scene, P, Abi::X86_64, &other).0, MemoryOutcome::NotOurs);
        let page = Page(RefCell::new([0; 4096]));
        let call = AddToPhysmap {
            domid: DomId::SELF,
            space: 2,
            ..AddToPhysmap::default()
        };
        call.encode(Abi::X86_64, &mut page.0.borrow_mut()[..]).unwrap();
        let domain = scene.engine.domain(C).unwrap();
        let vcpu = Vcpu::take(&domain, 0).unwrap();
        let mut cpu = scene.engine.any_processor().unwrap();
        for command in [MEMOP_ADD_TO_PHYSMAP, 6] {
            let done = cpu.memory_op(&vcpu, Abi::X86_64, command, AT, &page);
            assert_eq!(done, MemoryOutcome::NotOurs);
        }
    }

    #[test]
    fn a_guest_of_32_bits_places_a_frame_and_all_ones_are_no_place() {
        let scene = Scene::pv().kind(C, DomainKind::Hvm).build();
        let domain = scene.engine.domain(C).unwrap();
        let vcpu = Vcpu::take(&domain, 0).unwrap();
        let mut cpu = scene.engine.any_processor().unwrap();
        for (gpfn, expected) in [(0x7_7777, OKAY), (u64::from(u32::MAX), failed(Errno::Inval))] {
            let page = Page(RefCell::new([0; 4096]));
            let call = AddToPhysmap {
                domid: DomId::SELF,
                space: 1,
                idx: 0,
                gpfn,
                ..AddToPhysmap::default()
            };
            call.encode(Abi::X86_32, &mut page.0.borrow_mut()[..]).unwrap();
            let done = cpu.memory_op(&vcpu, Abi::X86_32, MEMOP_ADD_TO_PHYSMAP, AT, &page);
            assert_eq!(done, expected);
        }
    }

    /// Spec 6.2, the batch: each element has its index, its place and its answer, and one that fails ends
    /// nothing.
    #[test]
    fn each_element_of_a_batch_is_its_own() {
        for (abi, kind) in [
            (Abi::X86_64, DomainKind::Hvm),
            (Abi::X86_32, DomainKind::Hvm),
            (Abi::Arm, DomainKind::Arm),
        ] {
            let scene = Scene::pv().kind(C, kind).build();
            let domain = scene.engine.domain(C).unwrap();
            let vcpu = Vcpu::take(&domain, 0).unwrap();
            let mut cpu = scene.engine.any_processor().unwrap();
            let page = Page(RefCell::new([0xEE; 4096]));
            let call = AddToPhysmapBatch {
                domid: DomId::SELF,
                space: 1,
                size: 4,
                idxs: AT + 256,
                gpfns: AT + 512,
                errs: AT + 768,
                ..AddToPhysmapBatch::default()
            };
            call.encode(abi, &mut page.0.borrow_mut()[..]).unwrap();
            let width = abi.word_size();
            let places = [0x301, 0x300, 0x302, 0x303];
            for (at, (idx, gfn)) in [2_u64, 0, 4000, 1].into_iter().zip(places).enumerate() {
                let at = u64::try_from(at * width).unwrap();
                page.write(AT + 256 + at, &idx.to_le_bytes()[..width]).unwrap();
                page.write(AT + 512 + at, &u64::to_le_bytes(gfn)[..width])
                    .unwrap();
            }
            let done = cpu.memory_op(&vcpu, abi, MEMOP_ADD_TO_PHYSMAP_BATCH, AT, &page);
            assert_eq!(done, OKAY);
            let mut answers = [0; 20];
            page.read(AT + 768, &mut answers).unwrap();
            let mut expected = [0; 20];
            expected[8..12].copy_from_slice(&(-22_i32).to_le_bytes());
            expected[16..].fill(0xEE);
            assert_eq!(answers, expected, "{abi:?}");
            let frame = |index| domain.shared_frame(index).unwrap().mfn();
            for (index, gfn) in [(2, 0x301), (0, 0x300), (1, 0x303)] {
                let there = domain.private().physmap(Gfn(gfn)).and_then(P2mEntry::own_ram);
                assert_eq!(there, Some(frame(index)), "{abi:?}: frame {index}");
            }
            assert_eq!(domain.private().physmap(Gfn(0x302)), None);
        }
    }

    #[test]
    fn l17_a_soft_reset_names_what_is_in_use_and_revokes_nothing() {
        let scene = Scene::hvm().build();
        let mapped = scene.map(scene.place(0), MapFlags::HOST_MAP);
        assert!(mapped.status.is_okay());
        let found = scene.engine.any_processor().unwrap().soft_reset(G).unwrap();
        assert_eq!((found.total, found.entries.len()), (1, 1));
        assert_eq!(found.entries[0].gref, Scene::GREF);
        assert!(scene.unmap(scene.place(0), mapped.handle).is_okay());
        assert_eq!(scene.audit(), []);
    }
}
