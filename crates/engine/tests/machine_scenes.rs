//! Scenes, hooks, policies and wrappers of the in-memory machine, with the engine on it.

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::thread;

    use gnttab_abi::{
        Copy, CopyFlags, CopyPtr, DomId, EntryFlags, Errno, GrantRef, GrantStatus, MapFlags, Transfer,
    };
    use gnttab_engine::machine::{
        Answer, Audit, BasePolicy, C, Check, Faulty, G, Guest, Machine, P, PageOwner, Pte, Request, Scene,
        SceneBuilder, T, Traced, Verdict,
    };
    use gnttab_engine::{
        DomainKind, EntryWords, GuestMemory, Hook, Hypervisor, Retired, UNMAP_GROUP, Version,
    };

    const RW: MapFlags = MapFlags::HOST_MAP;
    const RO: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);

    fn every_kind() -> [(&'static str, SceneBuilder); 4] {
        [
            ("PV", Scene::pv()),
            ("HVM", Scene::hvm()),
            ("HVM granter", Scene::pv().kind(G, DomainKind::Hvm)),
            ("Arm", Scene::arm()),
        ]
    }

    fn marks<H: Hypervisor<Domain = Guest>>(scene: &Scene<H>) -> EntryFlags {
        scene.flags(G, Scene::GREF)
    }

    // --- the standard scene ---------------------------------------------------------------------

    /// The scene is what Appendix A says it is.
    #[test]
    fn standard_scene() {
        for (name, builder) in every_kind() {
            for version in [Version::V1, Version::V2] {
                let scene = builder.clone().version(G, version).build();
                assert_eq!(scene.engine.domains().collect::<Vec<_>>(), [P, G, C, T]);
                let words = scene.entry(G, Scene::GREF);
                assert_eq!((words.flags(), words.domid()), (EntryFlags::PERMIT_ACCESS, C));
                let frame = match words {
                    EntryWords::V1(entry) => u64::from(entry.frame),
                    EntryWords::V2(entry, _) => entry.frame,
                };
                assert_eq!(frame, scene.frame.gfn.0, "{name}");
                assert_eq!(scene.flags(G, GrantRef(6)), EntryFlags::empty());
                let info = scene.machine.frame(scene.frame.mfn).unwrap();
                assert_eq!(
                    (info.owner, info.references, info.type_count),
                    (PageOwner::Domain(G), 1, 0)
                );
                assert!(scene.engine.hypervisor().is_control(scene.domain(P).private()));
                assert_eq!(scene.audit(), []);
            }
        }
    }

    /// Map, use and unmap leave everything as it was, for every kind of caller and granter.
    #[test]
    fn a_mapping_comes_and_goes() {
        for (name, builder) in every_kind() {
            for version in [Version::V1, Version::V2] {
                let scene = builder.clone().version(G, version).build();
                let place = scene.place(3);
                let mapped = scene.map(place, RW);
                assert_eq!(mapped.status, GrantStatus::OKAY, "{name}");
                assert_eq!(mapped.dev_bus_addr, scene.frame.mfn.address());
                assert!(marks(&scene).contains(EntryFlags::IN_USE));
                assert_eq!(scene.audit(), [], "{name}");
                scene.domain(C).private().write(place + 9, b"bytes").unwrap();
                let page = scene.machine.page(scene.frame.mfn).unwrap();
                assert_eq!(page.read_bytes(9), Some(*b"bytes"));
                assert_eq!(scene.unmap(place, mapped.handle), GrantStatus::OKAY);
                assert_eq!(marks(&scene), EntryFlags::PERMIT_ACCESS);
                assert_eq!(scene.domain(C).private().read(place, &mut [0]).ok(), None);
                assert_eq!(scene.domain(G).private().dirty(), [scene.frame.mfn]);
                assert_eq!(scene.machine.audit_idle(), [], "{name}");
            }
        }
    }

    /// Read-only is read-only in the address space too.
    #[test]
    fn a_readonly_mapping_cannot_be_written() {
        for (name, builder) in every_kind() {
            let scene = builder.build();
            let place = scene.place(0);
            assert_eq!(scene.map(place, RO).status, GrantStatus::OKAY);
            let domain = scene.domain(C);
            assert!(domain.private().read(place, &mut [0; 16]).is_ok());
            assert!(domain.private().write(place, b"x").is_err(), "{name}");
        }
    }

    /// Death in either order returns every frame (spec 7.2, 7.3; L-11, L-13, L-14).
    #[test]
    fn death_of_either_side() {
        for (name, builder) in every_kind() {
            let scene = builder.clone().build();
            scene.map(scene.place(0), RW);
            assert_eq!(scene.kill(C), Retired::Gone, "{name}");
            assert_eq!(marks(&scene), EntryFlags::PERMIT_ACCESS);
            assert_eq!(scene.audit(), [], "{name}");
            assert_eq!(scene.machine.audit_idle(), [], "{name}");

            let scene = builder.build();
            let place = scene.place(0);
            let mapped = scene.map(place, RW);
            assert_eq!(scene.kill(G), Retired::Held);
            scene.domain(C).private().write(place, b"still here").unwrap();
            assert_eq!(scene.unmap(place, mapped.handle), GrantStatus::OKAY);
            assert!(scene.engine.domain(G).is_none(), "{name}");
            assert_eq!(
                scene.machine.frame(scene.frame.mfn).unwrap().owner,
                PageOwner::Free
            );
            assert_eq!(scene.machine.audit_idle(), [], "{name}");
        }
    }

    /// A dead granter goes with the dead grantee's page tables, which held its page last.
    #[test]
    fn death_of_both_sides() {
        for (name, builder) in every_kind() {
            let scene = builder.build();
            scene.map(scene.place(0), RW);
            assert_eq!(scene.kill(G), Retired::Held, "{name}");
            assert_eq!(scene.kill(C), Retired::Gone, "{name}");
            assert_eq!(scene.engine.domains().collect::<Vec<_>>(), [P, T], "{name}");
            assert_eq!(scene.machine.audit_idle(), [], "{name}");
        }
    }

    /// A transfer moves the page, and the machine's books with it (T-01, T-12).
    #[test]
    fn a_page_is_transferred() {
        let scene = Scene::pv().build();
        let entry = gnttab_abi::EntryV1 {
            head: gnttab_abi::EntryHead {
                flags: EntryFlags::ACCEPT_TRANSFER,
                domid: C,
            },
            frame: 0x55,
        };
        scene.set_v1(G, GrantRef(9), entry);
        let [given, lost] = scene.local.map(|page| page.mfn);
        let item = |mfn: gnttab_abi::Mfn, domid| Transfer {
            mfn: mfn.0,
            domid,
            gref: GrantRef(9),
            ..Transfer::default()
        };
        let mut items = [item(given, G), item(lost, DomId(77))];
        scene.processor().transfer(&scene.vcpu(C, 0), &mut items);
        assert_eq!(
            items.map(|item| item.status),
            [GrantStatus::OKAY, GrantStatus::BAD_DOMAIN]
        );
        assert_eq!(scene.machine.frame(given).unwrap().owner, PageOwner::Domain(G));
        assert_eq!(scene.machine.frame(lost).unwrap().owner, PageOwner::Free);
        assert_eq!(
            (
                scene.domain(G).private().pages(),
                scene.domain(C).private().pages()
            ),
            (4, 1)
        );
        assert_eq!(scene.machine.audit_idle(), []);
    }

    /// A 32-bit caller, an I/O MMU, Xen 4.17, and limits, as the builder is told.
    #[test]
    fn the_builder_does_what_it_says() {
        let scene = Scene::pv().caller_32().build();
        assert_eq!(scene.map(0x1_0000_0000, RW).status, GrantStatus::GENERAL_ERROR);
        let scene = Scene::pv().caller_iommu().build();
        scene.map(scene.place(0), RO);
        let right = scene.domain(C).private().iommu_right(scene.frame.mfn);
        assert_eq!(right, Some(gnttab_engine::Access::Read));
        assert_eq!(scene.audit(), []);
        let scene = Scene::pv()
            .limits(C, |limits| limits.maptrack_frames = Some(0))
            .build();
        assert_eq!(scene.map(scene.place(0), RW).status, GrantStatus::NO_SPACE);
        let scene = Scene::pv().v4_17().build();
        assert_eq!(scene.engine.config().reference, gnttab_engine::Reference::V4_17);
    }

    // --- audits of both books -------------------------------------------------------------------

    fn audits<H: Hypervisor<Domain = Guest>>(scene: &Scene<H>) -> Vec<Audit> {
        scene.audit().iter().map(|violation| violation.audit).collect()
    }

    /// AUD-FLG: a guest that wipes the mark of an entry in use is seen.
    #[test]
    fn audit_sees_a_missing_mark() {
        let scene = Scene::pv().build();
        scene.map(scene.place(0), RO);
        scene.grant(G, Scene::GREF, C, scene.frame, EntryFlags::empty());
        assert_eq!(audits(&scene), [Audit::Marks]);
    }

    /// AUD-REF with the engine's claims: a mapping whose reference somebody dropped, where no page
    /// table accounts for it.
    #[test]
    fn audit_sees_a_missing_reference_of_a_translated_mapping() {
        let scene = Scene::hvm().build();
        scene.map(scene.place(0), RO);
        scene.machine.put_frame(scene.frame.mfn);
        assert_eq!(scene.machine.audit(), [], "the machine alone cannot tell");
        assert_eq!(audits(&scene), [Audit::References]);
    }

    /// AUD-P2M and AUD-IOM: reach without a live mapping.
    #[test]
    fn audit_sees_reach_without_a_grant() {
        let scene = Scene::pv().caller_iommu().build();
        let domain = scene.domain(C);
        let machine = scene.engine.hypervisor();
        machine
            .iommu_set(
                domain.private(),
                scene.frame.mfn,
                Some(gnttab_engine::Access::Write),
            )
            .unwrap();
        machine.get_frame(scene.frame.mfn).unwrap();
        assert_eq!(audits(&scene), [Audit::Iommu]);
        let scene = Scene::pv().build();
        let bits = Pte::PRESENT | Pte::USER;
        assert!(
            scene
                .domain(C)
                .private()
                .write_pte(scene.place(0), Pte::new(scene.frame.mfn, bits))
        );
        assert_eq!(audits(&scene), [Audit::Physmap]);
    }

    // --- hooks ----------------------------------------------------------------------------------

    /// A hook acts in the middle of an operation; the engine judges what it read before.
    #[test]
    fn a_hook_acts_in_the_middle() {
        let scene = Arc::new(Scene::pv().build());
        let inside = Arc::downgrade(&scene);
        scene.machine.hooks().once(Hook::ClaimLoaded, move || {
            let scene = inside.upgrade().expect("the scene is there");
            scene.grant(G, Scene::GREF, T, scene.frame, EntryFlags::empty());
        });
        let mapped = scene.map(scene.place(0), RW);
        assert_eq!(
            mapped.status,
            GrantStatus::GENERAL_ERROR,
            "the entry was given to another"
        );
        assert_eq!(marks(&scene), EntryFlags::PERMIT_ACCESS);
        assert_eq!(scene.audit(), []);
    }

    /// Actions run in order, each time, until they are cleared; an action does not set off itself.
    #[test]
    fn hooks_run_in_order_and_not_within_themselves() {
        let machine = Machine::new();
        let count = Arc::new(AtomicU32::new(0));
        for digit in [1, 2] {
            let (count, machine_again) = (Arc::clone(&count), machine.clone());
            machine.hooks().at(Hook::Grow, move || {
                count.store(count.load(Ordering::Relaxed) * 10 + digit, Ordering::Relaxed);
                if digit == 2 {
                    machine_again.hook(Hook::MapPublish);
                }
            });
        }
        machine.hook(Hook::Grow);
        assert_eq!(count.load(Ordering::Relaxed), 12);
        machine.hook(Hook::Grow);
        assert_eq!(count.load(Ordering::Relaxed), 1212);
        machine.hooks().clear();
        machine.hook(Hook::Grow);
        assert_eq!(count.load(Ordering::Relaxed), 1212);

        let again = machine.clone();
        let runs = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&runs);
        machine.hooks().at(Hook::Grow, move || {
            counted.fetch_add(1, Ordering::Relaxed);
            again.hook(Hook::Grow);
        });
        machine.hook(Hook::Grow);
        assert_eq!(runs.load(Ordering::Relaxed), 1);
    }

    /// An actor parked in the middle of an unmap holds the grant; released, it lets go. Statuses
    /// come before the release, which comes after the flush (spec 3.4.1).
    #[test]
    fn a_parked_unmap_keeps_the_grant() {
        let scene = Scene::pv().build();
        scene.machine.hooks().set_relax(thread::yield_now);
        let mapped = scene.map(scene.place(0), RW);
        let parked = scene.machine.hooks().park(Hook::UnmapFlushed);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let actor = scope.spawn(|| {
                assert_eq!(scene.unmap(scene.place(0), mapped.handle), GrantStatus::OKAY);
                done.store(true, Ordering::Release);
            });
            while !parked.arrived() {
                assert!(!actor.is_finished(), "it was over before it was flushed");
                thread::yield_now();
            }
            assert!(!done.load(Ordering::Acquire));
            assert!(marks(&scene).contains(EntryFlags::IN_USE), "not let go yet");
            assert_eq!(
                scene.domain(C).private().pte(scene.place(0)),
                Some(Pte::default())
            );
            assert_eq!(scene.domain(C).private().flushes(), 1);
            parked.release();
        });
        assert_eq!(marks(&scene), EntryFlags::PERMIT_ACCESS);
        assert_eq!(scene.audit(), []);
    }

    // --- policies -------------------------------------------------------------------------------

    /// Spec 3.2: SILO lets nobody share but with a control domain or with themselves.
    #[test]
    fn silo() {
        let scene = Scene::pv().build();
        scene.machine.set_policy(BasePolicy::Silo);
        assert_eq!(
            scene.map(scene.place(0), RW).status,
            GrantStatus::PERMISSION_DENIED
        );
        scene.domain(C).private().set_control(true);
        assert_eq!(scene.map(scene.place(0), RW).status, GrantStatus::OKAY);
        scene.domain(C).private().set_control(false);
        scene.grant(C, GrantRef(9), C, scene.local[0], EntryFlags::empty());
        let itself = scene.map_as(C, C, GrantRef(9), scene.place(1), RW);
        assert_eq!(itself.status, GrantStatus::OKAY);
        let mut items = [Copy {
            source: CopyPtr::grant(G, Scene::GREF, 0),
            dest: CopyPtr {
                domid: DomId::SELF,
                ..CopyPtr::frame(scene.local[1].gfn.0, 0)
            },
            len: 1,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        }];
        scene.processor().copy(&scene.vcpu(C, 0), &mut items);
        assert_eq!(items[0].status, GrantStatus::PERMISSION_DENIED);
    }

    /// Spec 3.2: other domains' tables are for control domains and device models.
    #[test]
    fn tables_of_others() {
        let scene = Scene::pv().build();
        let query = |id| scene.processor().query_size(&scene.vcpu(id, 0), G).err();
        assert_eq!(query(C), Some(GrantStatus::PERMISSION_DENIED));
        assert_eq!(query(P), None);
        scene.domain(C).private().set_device_model_of(G);
        assert_eq!(query(C), None);
    }

    /// A rule in front of the policy decides, and names the errno of get_version; it may use the
    /// machine.
    #[test]
    fn rules_come_first() {
        let scene = Scene::pv().build();
        let machine = scene.machine.clone();
        scene.machine.set_rule(move |check| match check {
            Check::Query(..) => Some(false),
            Check::Map(caller, ..) if *caller == C => Some(machine.audit().is_empty()),
            _ => None,
        });
        scene.machine.set_query_errno(Errno::Acces);
        let version = scene.processor().get_version(&scene.vcpu(P, 0), G);
        assert_eq!(version, Err(Errno::Acces));
        assert_eq!(scene.map(scene.place(0), RW).status, GrantStatus::OKAY);
    }

    // --- wrappers -------------------------------------------------------------------------------

    /// The order of a map and an unmap, as a trace shows it.
    #[test]
    fn a_trace_of_a_mapping() {
        let scene = Scene::pv().build_on(|machine| Traced::tracing(machine, 64));
        let trace = scene.engine.hypervisor().watch();
        trace.take();
        let steps = || -> Vec<String> {
            let told = |request: &Request| !matches!(request, Request::Hook(_) | Request::Now);
            let events = trace.take().into_iter().filter(|event| told(&event.request));
            events.map(|event| event.to_string()).collect()
        };
        let mapped = scene.map(scene.place(0), RW);
        let mfn = scene.frame.mfn;
        assert_eq!(
            steps(),
            [
                "may_map d2 d1 host_map -> yes".to_owned(),
                format!("resolve d1 gfn {mfn} rw -> frame {mfn} of d1"),
                format!("get_writable {mfn} -> yes"),
                format!("map_host d2 0x40000000 frame {mfn} of d1 host_map -> done"),
                "iommu_follows d2 -> no".to_owned(),
            ]
        );
        scene.unmap(scene.place(0), mapped.handle);
        assert_eq!(
            steps(),
            [
                "may_unmap d2 d1 -> yes".to_owned(),
                format!("unmap_host d2 0x40000000 frame {mfn} host_map -> done"),
                "iommu_follows d2 -> no".to_owned(),
                format!("mark_dirty d1 {mfn} -> done"),
                "flush d2 -> done".to_owned(),
                format!("put_writable {mfn} -> done"),
                format!("put_frame {mfn} -> done"),
            ]
        );
    }

    /// A trace is bounded, and says what it lost.
    #[test]
    fn traces_are_bounded() {
        let hv = Traced::tracing(Machine::new(), 2);
        for hook in [Hook::Grow, Hook::MapPinned, Hook::MapPublish] {
            hv.hook(hook);
        }
        let kept: Vec<Request> = hv.watch().take().iter().map(|event| event.request).collect();
        assert_eq!(
            kept,
            [Request::Hook(Hook::MapPinned), Request::Hook(Hook::MapPublish)]
        );
        assert_eq!(hv.watch().dropped(), 1);
        let nothing = Traced::tracing(Machine::new(), 0);
        nothing.hook(Hook::Grow);
        assert_eq!(nothing.watch().take(), []);
    }

    /// Each single request of a map that can fail, failing: the item says so, and nothing is held.
    #[test]
    fn every_failure_of_a_map_leaves_nothing() {
        let mut failed = 0;
        for (name, builder) in every_kind() {
            for nth in 1.. {
                let scene = builder.clone().caller_iommu().build_on(Faulty::failing);
                let faults = scene.engine.hypervisor().watch();
                faults.fail_nth(nth, |_| true);
                let mapped = scene.map(scene.place(0), RW);
                if faults.refused() == 0 {
                    assert_eq!(mapped.status, GrantStatus::OKAY);
                    break;
                }
                assert_ne!(mapped.status, GrantStatus::OKAY, "{name} {nth}");
                assert_eq!(marks(&scene), EntryFlags::PERMIT_ACCESS, "{name} {nth}");
                assert_eq!(scene.audit(), [], "{name} {nth}");
                assert_eq!(scene.machine.audit_idle(), [], "{name} {nth}");
                failed += 1;
            }
        }
        assert!(failed >= 4 * 3, "look-up, mapping and I/O MMU at least: {failed}");
    }

    /// The same for copies, transfers, growth and changes of version: whichever request fails, no
    /// reference, pin or page is lost.
    #[test]
    fn every_failure_of_the_others_leaves_nothing() {
        type Act = fn(&Scene<Faulty<Machine>>) -> bool;
        let copy: Act = |scene| {
            let mut items = [Copy {
                source: CopyPtr::grant(G, Scene::GREF, 0),
                dest: CopyPtr {
                    domid: DomId::SELF,
                    ..CopyPtr::frame(scene.local[1].gfn.0, 0)
                },
                len: 100,
                flags: CopyFlags::SOURCE_GREF,
                ..Copy::default()
            }];
            scene.processor().copy(&scene.vcpu(C, 0), &mut items);
            items[0].status.is_okay()
        };
        let transfer: Act = |scene| {
            let entry = gnttab_abi::EntryV1 {
                head: gnttab_abi::EntryHead {
                    flags: EntryFlags::ACCEPT_TRANSFER,
                    domid: C,
                },
                frame: 0x55,
            };
            scene.set_v1(G, GrantRef(9), entry);
            let high = scene.domain(C).private().add_page_at(gnttab_abi::Mfn(1 << 32));
            let mut items = [Transfer {
                mfn: high.expect("nobody has it").mfn.0,
                domid: G,
                gref: GrantRef(9),
                ..Transfer::default()
            }];
            scene.processor().transfer(&scene.vcpu(C, 0), &mut items);
            items[0].status.is_okay()
        };
        let grow: Act = |scene| {
            let store = &mut |_, _| true;
            let status = scene
                .processor()
                .setup_table(&scene.vcpu(C, 0), DomId::SELF, 20, None, store);
            status.is_okay()
        };
        let version: Act = |scene| {
            let there_and_back = |cpu: &mut gnttab_engine::Processor<'_, _>| {
                let vcpu = scene.vcpu(C, 0);
                cpu.set_version(&vcpu, 2)?;
                cpu.set_version(&vcpu, 1)
            };
            there_and_back(&mut scene.processor()).is_ok()
        };
        let kinds = [Scene::pv(), Scene::hvm(), Scene::arm()];
        let acts = [
            ("copy", copy),
            ("transfer", transfer),
            ("grow", grow),
            ("version", version),
        ];
        for (name, act) in acts {
            for builder in kinds.iter().take(if name == "transfer" { 1 } else { 3 }) {
                for nth in 1..100 {
                    let scene = builder.clone().build_on(Faulty::failing);
                    let faults = scene.engine.hypervisor().watch();
                    faults.fail_nth(nth, |_| true);
                    let okay = act(&scene);
                    assert_eq!(scene.audit(), [], "{name} {nth}");
                    assert_eq!(scene.machine.audit_idle(), [], "{name} {nth}");
                    assert_eq!(marks(&scene), EntryFlags::PERMIT_ACCESS, "{name} {nth}");
                    assert_eq!(okay, faults.refused() == 0, "{name} {nth}");
                    faults.clear();
                    for id in [C, T, G, P] {
                        assert_eq!(scene.kill(id), Retired::Gone, "{name} {nth}");
                    }
                    assert_eq!(scene.machine.audit_idle(), [], "{name} {nth}");
                    if okay {
                        assert!(nth > 1, "{name} asks for something that can fail");
                        break;
                    }
                }
            }
        }
    }

    /// A look-up that fails for now is *eagain*; retried, it works.
    #[test]
    fn refusing_for_now() {
        let scene = Scene::hvm().build_on(Faulty::failing);
        let faults = scene.engine.hypervisor().watch();
        let mut times = 2;
        faults.rule(move |request| match request {
            Request::Resolve { .. } if times > 0 => {
                times -= 1;
                Verdict::RefuseForNow
            }
            _ => Verdict::Proceed,
        });
        for status in [GrantStatus::EAGAIN, GrantStatus::EAGAIN, GrantStatus::OKAY] {
            assert_eq!(scene.map(scene.place(0), RW).status, status);
        }
        assert_eq!(faults.refused(), 2);
        faults.clear();
        assert_eq!(scene.audit(), []);
    }

    /// Random failures are the seed's, and about as many as asked for.
    #[test]
    fn random_failures_follow_the_seed() {
        let pattern = |seed, one_in| -> Vec<bool> {
            let scene = Scene::pv().build_on(Faulty::failing);
            let faults = scene.engine.hypervisor().watch();
            faults.fail_randomly(seed, one_in, |request| matches!(request, Request::MapHost { .. }));
            (0..100)
                .map(|n| scene.map(scene.place(n), RO).status.is_okay())
                .collect()
        };
        assert_eq!(pattern(1, 4), pattern(1, 4));
        assert_ne!(pattern(1, 4), pattern(2, 4));
        let failed = pattern(1, 4).iter().filter(|okay| !**okay).count();
        assert!((10..45).contains(&failed), "{failed} of 100 at one in four");
        assert!(pattern(1, 0).iter().all(|okay| *okay));
    }

    /// Wrappers stand in front of each other: the trace shows what the faults did.
    #[test]
    fn wrappers_compose() {
        let wrap = |machine| Traced::tracing(Faulty::failing(machine), 1000);
        let scene = Scene::pv().build_on(wrap);
        let traced = scene.engine.hypervisor();
        traced
            .inner()
            .watch()
            .fail(|request| matches!(request, Request::GetWritable(_)));
        assert_eq!(scene.map(scene.place(0), RW).status, GrantStatus::GENERAL_ERROR);
        let refused = |event: &gnttab_engine::machine::Event| {
            matches!(event.request, Request::GetWritable(_)) && event.answer == Answer::No
        };
        assert!(traced.watch().take().iter().any(refused));
        assert_eq!(scene.audit(), []);
    }

    /// Every call of the trait reaches the machine through a wrapper, policies and transfers too.
    #[test]
    fn wrappers_forward_everything() {
        let scene = Scene::pv().build_on(|machine| Traced::tracing(machine, 1000));
        let entry = gnttab_abi::EntryV1 {
            head: gnttab_abi::EntryHead {
                flags: EntryFlags::ACCEPT_TRANSFER,
                domid: C,
            },
            frame: 0x55,
        };
        scene.set_v1(G, GrantRef(9), entry);
        let mut items = [Transfer {
            mfn: scene.local[0].mfn.0,
            domid: G,
            gref: GrantRef(9),
            ..Transfer::default()
        }];
        scene.processor().transfer(&scene.vcpu(C, 0), &mut items);
        assert_eq!(items[0].status, GrantStatus::OKAY);
        scene.machine.set_clock(7);
        assert_eq!(scene.engine.hypervisor().now(), 7);
        assert_eq!(scene.machine.audit_idle(), []);
    }

    /// A method with a default that a wrapper or the machine does not have would quietly be the
    /// default's: each has them all.
    #[test]
    fn no_method_is_left_to_its_default() {
        let names = |text: &'static str, from: &str| -> Vec<&'static str> {
            let start = text.find(from).expect("the trait, or its implementation");
            let body = text[start..].lines().take_while(|line| *line != "}");
            body.filter_map(|line| line.strip_prefix("    fn "))
                .filter_map(|rest| rest.split(['(', '<']).next())
                .collect()
        };
        // Made of two others each: left to their default, wrappers see both.
        let made_of_others = ["resolve_writable", "get_writable_frame", "put_writable_frame"];
        // And hints do nothing that could be seen.
        let hints = ["expect_frame", "expect_mapping"];
        let mut wanted = names(include_str!("../src/hypervisor.rs"), "pub trait Hypervisor");
        wanted.retain(|name| !made_of_others.contains(name) && !hints.contains(name));
        assert!(wanted.len() > 35, "{wanted:?}");
        let wrapper = names(
            include_str!("../src/machine/between.rs"),
            "Hypervisor for Between",
        );
        let machine = names(
            include_str!("../src/machine/mod.rs"),
            "impl Hypervisor for Machine",
        );
        assert_eq!(wrapper, wanted);
        // Nobody listens to the machine itself.
        wanted.retain(|name| *name != "answered");
        assert_eq!(machine, wanted);
    }

    /// One flush for a group of unmaps (spec 3.1.5), as the machine counts them.
    /// Spec 3.2: under SILO the current domain's rights count too, whoever the two sides are.
    #[test]
    fn silo_lets_a_control_domain_copy_between_others() {
        let scene = Scene::pv().build();
        scene.machine.set_policy(BasePolicy::Silo);
        let (g, t) = (scene.engine.domain(G).unwrap(), scene.engine.domain(T).unwrap());
        for (caller, allowed) in [(P, true), (C, false)] {
            let caller = scene.engine.domain(caller).unwrap();
            let may = scene
                .engine
                .hypervisor()
                .may_copy(caller.private(), g.private(), t.private());
            assert_eq!(may, allowed, "{caller:?}");
        }
    }

    #[test]
    fn one_flush_for_a_group() {
        let scene = Scene::pv().build();
        let handles: Vec<_> = (0..40).map(|n| scene.map(scene.place(n), RO).handle).collect();
        let mut items: Vec<_> = (0..)
            .zip(handles)
            .map(|(n, handle)| gnttab_abi::UnmapGrantRef {
                host_addr: scene.place(n),
                handle,
                ..gnttab_abi::UnmapGrantRef::default()
            })
            .collect();
        scene.processor().unmap(&scene.vcpu(C, 0), &mut items);
        assert!(items.iter().all(|item| item.status.is_okay()));
        assert_eq!(
            scene.domain(C).private().flushes(),
            40_usize.div_ceil(UNMAP_GROUP) as u64
        );
        assert_eq!(scene.machine.audit_idle(), []);
    }
}
