//! What happens between the items of a batch, and what a batch may keep from others.

#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use gnttab_abi::{
        Abi, Command, Copy, CopyFlags, CopyPtr, DomId, EncodeError, EntryFlags, GrantRef, GrantStatus,
        MapFlags, MapGrantRef, Op,
    };
    use gnttab_engine::machine::{C, Check, G, Scene};
    use gnttab_engine::{Call, DomainKind, Fault, GuestMemory, Limits, Outcome, Retired};

    /// Arguments: the first, and then the second for ever.
    struct Items<'a> {
        items: [Vec<u8>; 2],
        /// Whether the engine may look ahead.
        peek: bool,
        before_second: &'a (dyn Fn() + Sync),
    }

    const ABI: Abi = Abi::X86_64;
    /// More items than can be done while somebody waits, and few enough to come to an end if they wait for it.
    const MANY: u32 = 20_000_000;

    fn maps(items: [MapGrantRef; 2]) -> [Vec<u8>; 2] {
        raw(MapGrantRef::size(ABI), items, |item, bytes| {
            item.encode(ABI, bytes)
        })
    }

    fn copies(items: [Copy; 2]) -> [Vec<u8>; 2] {
        raw(Copy::size(ABI), items, |item, bytes| item.encode(ABI, bytes))
    }

    fn raw<T>(
        size: usize,
        items: [T; 2],
        encode: impl Fn(T, &mut [u8]) -> Result<(), EncodeError>,
    ) -> [Vec<u8>; 2] {
        items.map(|item| {
            let mut bytes = vec![0; size];
            encode(item, &mut bytes).unwrap();
            bytes
        })
    }

    impl GuestMemory for Items<'_> {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
            let index = usize::from(addr > 0);
            if index == 1 {
                (self.before_second)();
            }
            into.copy_from_slice(&self.items[index][..into.len()]);
            Ok(())
        }

        fn write(&self, _: u64, _: &[u8]) -> Result<(), Fault> {
            Ok(())
        }

        fn peek(&self, _: u64, into: &mut [u8]) -> bool {
            for item in into.chunks_mut(self.items[1].len()) {
                item.copy_from_slice(&self.items[1][..item.len()]);
            }
            self.peek
        }
    }

    fn call(
        scene: &Scene,
        op: Op,
        count: u32,
        memory: &Items<'_>,
        yield_now: &mut dyn FnMut() -> bool,
    ) -> Outcome {
        let call = Call {
            command: Command::new(op),
            addr: 0,
            count,
        };
        scene
            .processor()
            .hypercall(&scene.vcpu(C, 0), Abi::X86_64, call, memory, yield_now)
    }

    /// A batch whose first item enters the granter's table, and whose others enter none, because they are
    /// refused before or have nothing to do, keeps nobody waiting who needs that table alone.
    #[test]
    fn a_batch_that_enters_no_table_keeps_none() {
        let map = |flags| MapGrantRef {
            flags,
            gref: GrantRef(100),
            dom: G,
            ..MapGrantRef::default()
        };
        let copy = |len| Copy {
            source: CopyPtr::grant(G, GrantRef(100), 0),
            dest: CopyPtr::frame(0, 0),
            len,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        let by_frame = Copy {
            flags: CopyFlags::empty(),
            ..copy(8)
        };
        for peek in [false, true] {
            let started = AtomicBool::new(false);
            let start = || started.store(true, Ordering::SeqCst);
            let refused = [map(MapFlags::HOST_MAP), map(MapFlags::empty())];
            for (op, items) in [
                (Op::MapGrantRef, maps(refused)),
                (Op::Copy, copies([copy(8), copy(0)])),
                (Op::Copy, copies([copy(8), by_frame])),
            ] {
                let memory = Items {
                    items,
                    peek,
                    before_second: &start,
                };
                let scene = Scene::pv().build();
                let done = AtomicBool::new(false);
                started.store(false, Ordering::SeqCst);
                thread::scope(|scope| {
                    scope.spawn(|| {
                        while !started.load(Ordering::SeqCst) {
                            thread::yield_now();
                        }
                        let vcpu = scene.vcpu(G, 0);
                        scene.processor().set_version(&vcpu, 2).unwrap();
                        done.store(true, Ordering::SeqCst);
                    });
                    let outcome = call(&scene, op, MANY, &memory, &mut || done.load(Ordering::SeqCst));
                    assert!(
                        matches!(outcome, Outcome::Continue(_)),
                        "{op}, peek {peek}: the table was kept until the batch was over"
                    );
                });
            }
        }
    }

    /// HND-5: who gathers handles waits until all have left whatever table they are in. A batch that stays in
    /// one, which nobody wants alone, leaves it all the same.
    #[test]
    fn a_batch_that_stays_in_a_table_lets_handles_be_gathered() {
        let scene = Scene::pv()
            .limits(C, |limits| (limits.maptrack_frames, limits.vcpus) = (Some(1), 2))
            .build();
        let read_only = MapFlags::HOST_MAP | MapFlags::READONLY;
        // All handles that there can be are this vCPU's own now.
        assert_eq!(scene.map(scene.place(0), read_only).status, GrantStatus::OKAY);
        let (started, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let start = || started.store(true, Ordering::SeqCst);
        // Refused by the entry, with the processor inside.
        let refused = Copy {
            source: CopyPtr::grant(G, GrantRef(100), 0),
            dest: CopyPtr::frame(scene.local[0].gfn.0, 0),
            len: 8,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        let memory = Items {
            items: copies([refused, refused]),
            peek: false,
            before_second: &start,
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                while !started.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                let mut items = [MapGrantRef {
                    host_addr: scene.place(1),
                    flags: read_only,
                    gref: Scene::GREF,
                    dom: G,
                    ..MapGrantRef::default()
                }];
                scene.processor().map(&scene.vcpu(C, 1), &mut items);
                assert_eq!(items[0].status, GrantStatus::OKAY);
                done.store(true, Ordering::SeqCst);
            });
            let outcome = call(&scene, Op::Copy, MANY, &memory, &mut || {
                done.load(Ordering::SeqCst)
            });
            assert!(
                matches!(outcome, Outcome::Continue(_)),
                "the gatherer waited until the batch was over"
            );
        });
    }

    /// ENG-13, D-1: the policy's answer for a batch is about two domains, not two numbers: one that gets the
    /// number of a granter that dies in mid-batch is not the one that was asked about.
    #[test]
    fn a_policy_asked_about_one_domain_does_not_let_another_of_its_number_be_read() {
        [false, true].into_iter().for_each(another_of_its_number);
    }

    fn another_of_its_number(inside: bool) {
        const LATER: DomId = DomId(9);
        let scene = Scene::pv().limits(C, |limits| limits.vcpus = 2).build();
        scene.machine.work_inside(inside);
        scene
            .machine
            .set_rule(|check| matches!(check, Check::Copy(_, LATER, _)).then_some(false));
        let replaced = AtomicBool::new(false);
        let replace = || {
            if replaced.swap(true, Ordering::SeqCst) {
                return;
            }
            assert_eq!(scene.kill(G), Retired::Gone);
            let guest = scene.machine.add_domain(LATER, DomainKind::Pv).unwrap();
            let other = scene
                .engine
                .create_domain(G, DomainKind::Pv, Limits::default(), guest)
                .unwrap();
            let page = other.private().add_page().unwrap();
            assert!(scene.machine.page(page.mfn).unwrap().write(0, b"secret!!"));
            scene.grant(G, Scene::GREF, C, page, EntryFlags::empty());
            // An entry that somebody wanted before can be had in one go.
            let mut item = MapGrantRef {
                host_addr: scene.place(0),
                flags: MapFlags::HOST_MAP,
                gref: Scene::GREF,
                dom: G,
                ..MapGrantRef::default()
            };
            scene
                .processor()
                .map(&scene.vcpu(C, 1), std::slice::from_mut(&mut item));
            assert_eq!(item.status, GrantStatus::GENERAL_ERROR, "no page of G's");
        };
        let own = scene.local[0];
        // By frame of another: refused, with the pair of domains looked up and judged.
        let refused = Copy {
            source: CopyPtr {
                domid: G,
                ..CopyPtr::frame(0, 0)
            },
            dest: CopyPtr::frame(own.gfn.0, 0),
            len: 8,
            ..Copy::default()
        };
        let granted = Copy {
            source: CopyPtr::grant(G, Scene::GREF, 0),
            flags: CopyFlags::SOURCE_GREF,
            ..refused
        };
        let memory = Items {
            items: copies([refused, granted]),
            peek: false,
            before_second: &replace,
        };
        let outcome = call(&scene, Op::Copy, 2, &memory, &mut || false);
        assert_eq!(outcome, Outcome::Done(Ok(())));
        assert!(replaced.load(Ordering::SeqCst));
        let found = scene.machine.page(own.mfn).unwrap().read_bytes::<8>(0);
        assert_eq!(found, Some([0; 8]), "bytes that the policy keeps from the caller");
        // Asked about anew, it is refused.
        let mut items = [granted];
        scene.processor().copy(&scene.vcpu(C, 0), &mut items);
        assert_eq!(items[0].status, GrantStatus::PERMISSION_DENIED);
    }
}
