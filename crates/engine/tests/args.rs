//! ENG-5, spec 1.8: arguments that are reached directly are what arguments are that the embedder is asked for.

#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use gnttab_abi::{
        Abi, Command, Copy, CopyFlags, CopyPtr, DomId, Errno, GrantHandle, MapFlags, MapGrantRef, Op,
        UnmapAndReplace, UnmapGrantRef,
    };
    use gnttab_engine::machine::{C, G, Scene};
    use gnttab_engine::{Call, Fault, GuestMemory, Outcome, PageWords, Version};

    /// Where the arguments begin: so that they lie in two pages.
    const START: usize = 4096 - 64;
    /// Several groups that are looked at together, and a part of one.
    const ITEMS: u32 = 21;

    /// Two pages of arguments.
    struct Memory {
        pages: [PageWords; 2],
        /// What is said of them, if they may be reached directly: pages, and bytes to be added to an address.
        direct: Option<(usize, usize)>,
        asked: Cell<u32>,
    }

    impl Memory {
        fn new(bytes: &[u8], direct: Option<(usize, usize)>) -> Memory {
            let memory = Memory {
                pages: [PageWords::zeroed(), PageWords::zeroed()],
                direct,
                asked: Cell::new(0),
            };
            assert!(PageWords::write_run(&memory.pages, START, bytes));
            memory
        }

        fn content(&self) -> Vec<u8> {
            let mut bytes = vec![0; 8192];
            assert!(PageWords::read_run(&self.pages, 0, &mut bytes));
            bytes
        }
    }

    fn at(addr: u64) -> usize {
        usize::try_from(addr).unwrap()
    }

    impl GuestMemory for Memory {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
            self.asked.set(self.asked.get() + 1);
            let done = PageWords::read_run(&self.pages, at(addr), into);
            done.then_some(()).ok_or(Fault { addr })
        }

        fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
            self.asked.set(self.asked.get() + 1);
            let done = PageWords::write_run(&self.pages, at(addr), bytes);
            done.then_some(()).ok_or(Fault { addr })
        }

        fn pages(&self, addr: u64, _: u64) -> Option<(&[PageWords], usize)> {
            let (pages, more) = self.direct?;
            Some((&self.pages[..pages], at(addr) + more))
        }
    }

    fn call(scene: &Scene, op: Op, memory: &Memory, count: u32) {
        let call = Call {
            command: Command::new(op),
            addr: START as u64,
            count,
        };
        let outcome = scene
            .processor()
            .hypercall(&scene.vcpu(C, 0), Abi::X86_64, call, memory, &mut || false);
        assert_eq!(outcome, Outcome::Done(Ok(())), "{op}");
    }

    /// Arguments of `size` bytes in which no byte is 0 that nobody sets.
    fn array(size: usize, mut encode: impl FnMut(u64, &mut [u8])) -> Vec<u8> {
        let mut bytes = vec![0xEE; ITEMS as usize * size];
        (0..)
            .zip(bytes.chunks_exact_mut(size))
            .for_each(|(n, raw)| encode(n, raw));
        bytes
    }

    fn maps(scene: &Scene, _: &[GrantHandle]) -> Vec<u8> {
        array(MapGrantRef::size(Abi::X86_64), |n, raw| {
            let readonly = if n % 2 == 0 {
                MapFlags::READONLY
            } else {
                MapFlags::empty()
            };
            let item = MapGrantRef {
                host_addr: scene.place(n),
                flags: MapFlags::HOST_MAP | readonly,
                gref: Scene::GREF,
                // One is another domain's, which does not exist.
                dom: if n == 13 { DomId(77) } else { G },
                dev_bus_addr: 0xEEEE_EEEE,
                ..MapGrantRef::default()
            };
            item.encode(Abi::X86_64, raw).unwrap();
        })
    }

    fn unmaps(scene: &Scene, handles: &[GrantHandle]) -> Vec<u8> {
        array(UnmapGrantRef::size(Abi::X86_64), |n, raw| {
            let item = UnmapGrantRef {
                host_addr: scene.place(n),
                handle: if n == 7 { GrantHandle(9999) } else { handles[at(n)] },
                ..UnmapGrantRef::default()
            };
            item.encode(Abi::X86_64, raw).unwrap();
        })
    }

    fn replacements(scene: &Scene, handles: &[GrantHandle]) -> Vec<u8> {
        array(UnmapAndReplace::size(Abi::X86_64), |n, raw| {
            let item = UnmapAndReplace {
                host_addr: scene.place(n),
                new_addr: scene.place(n + 40),
                handle: handles[at(n)],
                ..UnmapAndReplace::default()
            };
            item.encode(Abi::X86_64, raw).unwrap();
        })
    }

    fn copies(scene: &Scene, _: &[GrantHandle]) -> Vec<u8> {
        let local = scene.local[0];
        array(Copy::size(Abi::X86_64), |n, raw| {
            let item = Copy {
                source: CopyPtr::grant(G, Scene::GREF, 0),
                dest: CopyPtr::frame(local.gfn.0, u16::try_from(8 * n).unwrap()),
                len: if n == 13 { 4097 } else { 8 },
                flags: CopyFlags::SOURCE_GREF,
                ..Copy::default()
            };
            item.encode(Abi::X86_64, raw).unwrap();
        })
    }

    /// The arguments after each of the calls, and how often their memory was asked for in all.
    fn answers(version: Version, direct: Option<(usize, usize)>) -> (Vec<Vec<u8>>, u32) {
        let scene = Scene::pv().version(G, version).build();
        type Arguments = fn(&Scene, &[GrantHandle]) -> Vec<u8>;
        let calls: [(Op, Arguments); 5] = [
            (Op::MapGrantRef, maps),
            (Op::UnmapGrantRef, unmaps),
            (Op::MapGrantRef, maps),
            (Op::UnmapAndReplace, replacements),
            (Op::Copy, copies),
        ];
        let mut asked = 0;
        let (mut live, mut handles) = (Vec::new(), Vec::new());
        let after = calls.map(|(op, arguments)| {
            let memory = Memory::new(&arguments(&scene, &handles), direct);
            call(&scene, op, &memory, ITEMS);
            asked += memory.asked.get();
            if op == Op::MapGrantRef {
                let answers = memory.content();
                let items = answers[START..].chunks(MapGrantRef::size(Abi::X86_64));
                let item = |raw| MapGrantRef::decode(Abi::X86_64, raw).unwrap();
                handles = items.take(ITEMS as usize).map(|raw| item(raw).handle).collect();
            }
            live.push(scene.domain(C).mappings().count());
            memory.content()
        });
        assert_eq!(
            live,
            [20, 1, 21, 1, 1],
            "all was done but what is wrong by intent"
        );
        (after.to_vec(), asked)
    }

    #[test]
    fn whether_reached_directly_or_asked_for_the_answers_are_the_same() {
        for version in [Version::V1, Version::V2] {
            let (asked_for, times) = answers(version, None);
            assert!(times > 0);
            let (reached, times) = answers(version, Some((2, 0)));
            assert_eq!(times, 0, "all of it was within reach");
            assert_eq!(
                reached, asked_for,
                "byte by byte, those included that nobody sets"
            );
        }
    }

    /// Pages that do not hold the array, and an array that does not lie on words, are not believed in.
    #[test]
    fn what_cannot_be_reached_is_asked_for() {
        let (right, _) = answers(Version::V1, None);
        for wrong in [(1, 0), (0, 0), (2, 4096), (2, usize::MAX - START), (2, 4), (2, 1)] {
            let (found, times) = answers(Version::V1, Some(wrong));
            assert!(times > 0, "{wrong:?}");
            assert_eq!(found, right, "{wrong:?}");
        }
    }

    #[test]
    fn an_array_of_none_is_nothing_to_reach() {
        for direct in [None, Some((2, 0)), Some((0, 0))] {
            let scene = Scene::pv().build();
            let memory = Memory::new(&[], direct);
            for op in [Op::MapGrantRef, Op::UnmapGrantRef, Op::UnmapAndReplace, Op::Copy] {
                call(&scene, op, &memory, 0);
            }
            assert_eq!((memory.asked.get(), memory.content()), (0, vec![0; 8192]));
        }
    }

    /// Memory whose first page can only be read.
    struct HalfReadOnly(Memory);

    impl GuestMemory for HalfReadOnly {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
            self.0.read(addr, into)
        }

        fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
            if at(addr) < 4096 {
                return Err(Fault { addr });
            }
            self.0.write(addr, bytes)
        }
    }

    /// Spec 1.8, 3.3: the whole structure of a mapping is written back, what came in too, and cannot be where that
    /// cannot be written. The mapping exists.
    #[test]
    fn a_mapping_whose_structure_cannot_be_written_back_whole_is_a_fault() {
        let scene = Scene::pv().build();
        let item = MapGrantRef {
            host_addr: scene.place(0),
            flags: MapFlags::HOST_MAP,
            gref: Scene::GREF,
            dom: G,
            ..MapGrantRef::default()
        };
        let memory = HalfReadOnly(Memory::new(&[], None));
        let mut raw = [0; 32];
        item.encode(Abi::X86_64, &mut raw).unwrap();
        // All that comes out of it lies in the second page.
        assert!(PageWords::write_run(&memory.0.pages, 4096 - 16, &raw));
        let call = Call {
            command: Command::new(Op::MapGrantRef),
            addr: 4096 - 16,
            count: 1,
        };
        let outcome = scene
            .processor()
            .hypercall(&scene.vcpu(C, 0), Abi::X86_64, call, &memory, &mut || false);
        assert_eq!(outcome, Outcome::Done(Err(Errno::Fault)));
        assert_eq!(scene.domain(C).mappings().count(), 1);
    }
}
