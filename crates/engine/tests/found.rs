//! What the model and the stress test found, each in as few steps as it takes.

#![cfg(feature = "machine")]

/// An actor that is stopped in the middle of what it does.
#[cfg(test)]
mod stopped {
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use gnttab_engine::Hook;
    use gnttab_engine::machine::{Hooks, Parked};

    /// What comes at all comes in far less.
    const PATIENCE: Duration = Duration::from_secs(20);

    pub(crate) struct Stopped<T> {
        hook: Hook,
        parked: Parked,
        actor: JoinHandle<T>,
    }

    impl<T: Send + 'static> Stopped<T> {
        /// Starts an actor and waits until it has come to `hook`.
        ///
        /// # Panics
        /// If it does not come there.
        pub(crate) fn at(hook: Hook, hooks: &Hooks, act: impl FnOnce() -> T + Send + 'static) -> Stopped<T> {
            let parked = hooks.park(hook);
            let actor = thread::spawn(act);
            let deadline = Instant::now() + PATIENCE;
            while !parked.arrived() {
                assert!(!actor.is_finished(), "it was over before {hook:?}");
                assert!(Instant::now() < deadline, "nobody came to {hook:?}");
                thread::yield_now();
            }
            Stopped { hook, parked, actor }
        }

        /// Lets it go on; what it comes to in the end.
        ///
        /// # Panics
        /// If it does not end.
        pub(crate) fn go_on(self) -> T {
            self.parked.release();
            let deadline = Instant::now() + PATIENCE;
            while !self.actor.is_finished() {
                assert!(Instant::now() < deadline, "it does not end after {:?}", self.hook);
                thread::yield_now();
            }
            self.actor.join().expect("it does not panic")
        }
    }
}

/// Sequences of operations.
#[cfg(test)]
mod sequences {
    use gnttab_abi::{DomId, EntryFlags, Gfn, GrantRef, GrantStatus, MapFlags};
    use gnttab_engine::Version;
    use gnttab_engine::machine::{C, G, P2mEntry, Page, PageOwner, Scene};

    const RO: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);

    fn set_version(scene: &Scene, id: DomId, version: u32) {
        let vcpu = scene.vcpu(id, 0);
        assert_eq!(scene.processor().set_version(&vcpu, version), Ok(()));
    }

    /// IOM-5: a PV guest overwrites the page-table entry of a mapping, and the entry's reference goes;
    /// its devices still reach the frame, which must stay.
    #[test]
    fn a_frame_that_devices_reach_is_not_freed() {
        let scene = Scene::pv().caller_iommu().build();
        assert_eq!(scene.map(scene.place(0), RO).status, GrantStatus::OKAY);
        let mfn = scene.frame.mfn;
        scene.domain(C).private().unmap(scene.place(0));
        scene.domain(G).private().give_up(mfn);
        assert!(scene.domain(C).private().iommu_right(mfn).is_some());
        assert_eq!(scene.machine.frame(mfn).unwrap().owner, PageOwner::Domain(G));
        assert_eq!(scene.audit(), []);
        scene.kill(C);
        assert_eq!(scene.machine.frame(mfn).unwrap().owner, PageOwner::Free);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 3.9 step 8: the status pages of a table that went back to version 1 are not its domain's.
    #[test]
    fn a_status_page_given_up_cannot_be_granted() {
        let scene = Scene::pv().granter_v2().build();
        let mfn = scene.domain(G).status_frame(0).unwrap().mfn();
        let page = Page { gfn: Gfn(mfn.0), mfn };
        set_version(&scene, G, 1);
        scene.grant(G, Scene::GREF, C, page, EntryFlags::empty());
        assert_eq!(scene.map(scene.place(0), RO).status, GrantStatus::BAD_PAGE);
        set_version(&scene, G, 2);
        let mfn = scene.domain(G).status_frame(0).unwrap().mfn();
        let page = Page { gfn: Gfn(mfn.0), mfn };
        scene.grant(G, Scene::GREF, C, page, EntryFlags::empty());
        assert_eq!(scene.map(scene.place(0), RO).status, GrantStatus::OKAY);
        assert_eq!(scene.audit(), []);
    }

    /// VER-3: the status pages of the next version 2 are new ones, and are mapped nowhere; least of all
    /// over what the guest has put where the old ones were.
    #[test]
    fn a_new_status_page_is_mapped_nowhere() {
        let scene = Scene::hvm().version(C, Version::V2).build();
        let gfn = Gfn::containing(scene.place(0));
        let domain = scene.domain(C);
        let placed = scene
            .processor()
            .place_frame(&scene.vcpu(C, 0), DomId::SELF, 0x8000_0000, gfn);
        assert_eq!(placed, Ok(()));
        set_version(&scene, C, 1);
        assert_eq!(domain.private().physmap(gfn), None, "V-22");
        let mapped = scene.map(scene.place(0), RO);
        assert_eq!(mapped.status, GrantStatus::OKAY);
        set_version(&scene, C, 2);
        let grant = P2mEntry::Grant(scene.frame.mfn, gnttab_engine::Access::Read);
        assert_eq!(domain.private().physmap(gfn), Some(grant));
        assert_eq!(scene.unmap(scene.place(0), mapped.handle), GrantStatus::OKAY);
        assert_eq!(scene.audit(), []);
    }

    /// M-79: what a copy holds as a part of a page cannot be mapped, whatever the entry says by now.
    #[test]
    fn a_part_in_use_cannot_be_mapped() {
        use gnttab_abi::{Copy, CopyFlags, CopyPtr, EntryBodyV2, EntryHead, EntryV2};
        use gnttab_engine::Hook;
        use std::sync::Arc;

        use super::stopped::Stopped;

        let builder = Scene::pv().granter_v2().limits(C, |limits| limits.vcpus = 2);
        let scene = Arc::new(builder.build());
        scene.machine.hooks().set_relax(std::thread::yield_now);
        let flags = EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE;
        let body = EntryBodyV2::SubPage {
            page_off: 0,
            length: 8,
            frame: scene.frame.gfn.0,
        };
        scene.set_v2(G, Scene::GREF, EntryV2::new(EntryHead { flags, domid: C }, body));
        let inside = Arc::clone(&scene);
        let copier = Stopped::at(Hook::CopyMapped, scene.machine.hooks(), move || {
            let source = CopyPtr::grant(G, Scene::GREF, 0);
            let dest = CopyPtr::frame(inside.local[0].gfn.0, 0);
            let flags = CopyFlags::SOURCE_GREF;
            let mut items = [Copy {
                source,
                dest,
                len: 8,
                flags,
                ..Copy::default()
            }];
            inside.processor().copy(&inside.vcpu(C, 1), &mut items);
            items[0].status
        });
        scene.grant(G, Scene::GREF, C, scene.frame, EntryFlags::empty());
        assert_eq!(scene.map(scene.place(0), RO).status, GrantStatus::GENERAL_ERROR);
        assert_eq!(copier.go_on(), GrantStatus::OKAY);
        assert_eq!(scene.map(scene.place(0), RO).status, GrantStatus::OKAY);
        assert_eq!(
            scene.entry(G, GrantRef(5)).flags(),
            EntryFlags::PERMIT_ACCESS | EntryFlags::READING
        );
        assert_eq!(scene.audit(), []);
    }
}

/// Interleavings of two or three actors, each forced by stopping one of them.
#[cfg(test)]
mod interleavings {
    use std::sync::{Arc, Mutex, mpsc};
    use std::thread;
    use std::time::Duration;

    use gnttab_abi::{
        Copy, CopyFlags, CopyPtr, DomId, EntryBodyV2, EntryFlags, EntryHead, EntryV2, GrantRef, GrantStatus,
        MapFlags, UnmapGrantRef,
    };
    use gnttab_engine::machine::{
        Answer, Between, C, G, Machine, Request, Scene, SceneBuilder, T, Verdict, Watch,
    };
    use gnttab_engine::{Hook, Retired, Version};

    use super::stopped::Stopped;

    /// What to wait for, and what to do then.
    type Wait = (fn(&Request) -> bool, Box<dyn FnOnce() + Send>);

    /// Does something just before the first request that it waits for.
    #[derive(Default)]
    struct Before(Mutex<Option<Wait>>);

    impl Before {
        fn first(&self, which: fn(&Request) -> bool, action: impl FnOnce() + Send + 'static) {
            *self.0.lock().unwrap() = Some((which, Box::new(action)));
        }
    }

    impl Watch for Before {
        fn before(&self, request: &Request) -> Verdict {
            let mut waiting = self.0.lock().unwrap();
            if let Some((_, action)) = waiting.take_if(|(which, _)| which(request)) {
                drop(waiting);
                action();
            }
            Verdict::Proceed
        }
        fn after(&self, _: &Request, _: &Answer) {}
    }

    type Watched = Scene<Between<Machine, Before>>;

    fn scene(builder: SceneBuilder) -> Arc<Watched> {
        let builder = builder.limits(C, |limits| limits.vcpus = 2);
        let scene = builder.build_on(|machine| Between::new(machine, Before::default()));
        scene.machine.hooks().set_relax(thread::yield_now);
        Arc::new(scene)
    }

    /// C copies, as its vCPU `vcpu`.
    fn copy(scene: &Watched, vcpu: usize, source: CopyPtr, dest: CopyPtr, flags: CopyFlags) -> GrantStatus {
        let mut items = [Copy {
            source,
            dest,
            len: 8,
            flags,
            ..Copy::default()
        }];
        scene.processor().copy(&scene.vcpu(C, vcpu), &mut items);
        items[0].status
    }

    /// C copies from or to G's entry 5.
    fn copy_grant(scene: &Watched, vcpu: usize, write: bool) -> GrantStatus {
        let granted = CopyPtr::grant(G, Scene::GREF, 0);
        let own = CopyPtr::frame(scene.local[0].gfn.0, 0);
        if write {
            copy(scene, vcpu, own, granted, CopyFlags::DEST_GREF)
        } else {
            copy(scene, vcpu, granted, own, CopyFlags::SOURCE_GREF)
        }
    }

    /// A copy by vCPU 0 of C, stopped while it holds both its pages.
    fn copy_in_flight(scene: &Arc<Watched>, write: bool) -> Stopped<GrantStatus> {
        let inside = Arc::clone(scene);
        let hooks = scene.machine.hooks();
        Stopped::at(Hook::CopyMapped, hooks, move || copy_grant(&inside, 0, write))
    }

    /// G's entry 5 passes T's entry 9 on to C.
    fn pass_on(scene: &Watched, flags: EntryFlags) {
        scene.grant(T, GrantRef(9), G, scene.far, EntryFlags::empty());
        pass_on_entry(scene, GrantRef(9), flags);
    }

    /// G's entry 5 passes an entry of T's on to C.
    fn pass_on_entry(scene: &Watched, gref: GrantRef, flags: EntryFlags) {
        let head = EntryHead {
            flags: EntryFlags::TRANSITIVE | flags,
            domid: C,
        };
        let body = EntryBodyV2::Transitive { trans_domid: T, gref };
        scene.set_v2(G, Scene::GREF, EntryV2::new(head, body));
    }

    fn is_there(scene: &Watched, id: DomId) -> bool {
        scene.engine.domain(id).is_some()
    }

    /// The far granter of a copy went while the copy still held its frame.
    #[test]
    fn a_far_granter_stays_until_its_frame_is_let_go() {
        let scene = scene(Scene::pv().granter_v2());
        pass_on(&scene, EntryFlags::empty());
        let copier = copy_in_flight(&scene, false);
        assert_eq!(scene.kill(T), Retired::Held);
        assert!(scene.machine.frame(scene.far.mfn).unwrap().references > 0);
        assert_eq!(copier.go_on(), GrantStatus::OKAY);
        assert!(!is_there(&scene, T));
        assert_eq!(scene.audit(), []);
    }

    /// An entry was made an ordinary one while a transitive use of it was in flight; a second copy then
    /// took the count of uses that depend on version 2 with it, and the table could never go back.
    #[test]
    fn rewriting_a_transitive_entry_in_use_does_not_pin_the_version() {
        let scene = scene(Scene::pv().granter_v2());
        pass_on(&scene, EntryFlags::empty());
        let copier = copy_in_flight(&scene, false);
        scene.grant(G, Scene::GREF, C, scene.frame, EntryFlags::empty());
        let copier = Arc::new(Mutex::new(Some(copier)));
        let finish = move || {
            if let Some(copier) = copier.lock().unwrap().take() {
                assert_eq!(copier.go_on(), GrantStatus::OKAY);
            }
        };
        let watch = scene.engine.hypervisor().watch();
        watch.first(|request| matches!(request, Request::GetFrame(_)), finish.clone());
        // Spec 5.4 step 5: the frame in use is not G's.
        assert_eq!(copy_grant(&scene, 1, false), GrantStatus::BAD_DOMAIN);
        finish();
        let mut cpu = scene.processor();
        assert_eq!(cpu.set_version(&scene.vcpu(G, 0), 1), Ok(()));
        assert_eq!(scene.domain(G).version(), Version::V1);
        drop(cpu);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 5.4 step 7a: an entry that is pinned for writing already is not looked at again, so that a
    /// granter who makes it read-only does not stop a further copy to it.
    #[test]
    fn a_transitive_entry_in_use_for_writing_takes_one_more() {
        let scene = scene(Scene::pv().granter_v2());
        pass_on(&scene, EntryFlags::empty());
        let copier = copy_in_flight(&scene, true);
        pass_on(&scene, EntryFlags::READONLY);
        assert_eq!(copy_grant(&scene, 1, true), GrantStatus::OKAY);
        assert!(scene.flags(G, Scene::GREF).contains(EntryFlags::IN_USE), "PIN-2");
        assert_eq!(copier.go_on(), GrantStatus::OKAY);
        let marks = scene.flags(G, Scene::GREF) & EntryFlags::IN_USE;
        assert_eq!(marks, EntryFlags::empty());
        assert_eq!(copy_grant(&scene, 1, true), GrantStatus::GENERAL_ERROR);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 5.4 step 7f: an entry in use that passes another far entry on by now, of the same frame at that,
    /// is not counted as a use of what it passed on: each far entry is let go as often as it was taken.
    #[test]
    fn an_entry_in_use_is_not_taken_for_another_far_entry() {
        let scene = scene(Scene::pv().granter_v2());
        pass_on(&scene, EntryFlags::empty());
        let copier = copy_in_flight(&scene, false);
        scene.grant(T, GrantRef(10), G, scene.far, EntryFlags::empty());
        pass_on_entry(&scene, GrantRef(10), EntryFlags::empty());
        assert_eq!(copy_grant(&scene, 1, true), GrantStatus::GENERAL_ERROR, "D-4");
        assert_eq!(scene.flags(T, GrantRef(10)), EntryFlags::PERMIT_ACCESS);
        assert_eq!(copier.go_on(), GrantStatus::OKAY);
        assert_eq!(scene.flags(T, GrantRef(9)), EntryFlags::PERMIT_ACCESS);
        assert_eq!(copy_grant(&scene, 1, true), GrantStatus::OKAY);
        assert_eq!(scene.audit(), []);
    }

    /// As above, of an entry that is in use as a part of a page: the part's numbers are the far entry's.
    #[test]
    fn a_part_in_use_is_not_taken_for_a_far_entry() {
        let scene = scene(Scene::pv().granter_v2());
        let head = EntryHead {
            flags: EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE,
            domid: C,
        };
        let body = EntryBodyV2::SubPage {
            page_off: 3,
            length: 9,
            frame: scene.frame.gfn.0,
        };
        assert_eq!(T.0, 3);
        scene.set_v2(G, Scene::GREF, EntryV2::new(head, body));
        let inside = Arc::clone(&scene);
        let copier = Stopped::at(Hook::CopyMapped, scene.machine.hooks(), move || {
            let own = CopyPtr::frame(inside.local[0].gfn.0, 0);
            let part = CopyPtr::grant(G, Scene::GREF, 3);
            copy(&inside, 0, part, own, CopyFlags::SOURCE_GREF)
        });
        pass_on(&scene, EntryFlags::empty());
        assert_eq!(copy_grant(&scene, 1, true), GrantStatus::GENERAL_ERROR, "D-4");
        assert_eq!(scene.flags(T, GrantRef(9)), EntryFlags::PERMIT_ACCESS);
        assert_eq!(copier.go_on(), GrantStatus::OKAY);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 3.4: who unmaps while somebody else fails to is not told that the handle is bad: it is not.
    #[test]
    fn an_unmap_that_fails_takes_no_handle_from_another() {
        let scene = scene(Scene::pv());
        let mapped = scene.map(scene.place(0), MapFlags::HOST_MAP);
        assert_eq!(mapped.status, GrantStatus::OKAY);
        let unmap = move |scene: &Watched, vcpu, place| {
            let mut items = [UnmapGrantRef {
                host_addr: scene.place(place),
                handle: mapped.handle,
                ..UnmapGrantRef::default()
            }];
            scene.processor().unmap(&scene.vcpu(C, vcpu), &mut items);
            items[0].status
        };
        let (tell, told) = mpsc::channel();
        let inside = Arc::clone(&scene);
        // In the middle of the one that fails, since nothing is mapped where it looks.
        let meanwhile = move || {
            let other = thread::spawn(move || unmap(&inside, 1, 0));
            // For it to come as far as it can; it waits for this one then.
            thread::sleep(Duration::from_millis(20));
            tell.send(other).unwrap();
        };
        let watch = scene.engine.hypervisor().watch();
        watch.first(|request| matches!(request, Request::UnmapHost { .. }), meanwhile);
        assert_eq!(unmap(&scene, 0, 1), GrantStatus::GENERAL_ERROR);
        assert_eq!(told.recv().unwrap().join().unwrap(), GrantStatus::OKAY);
        assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 4.1.2, 5.4 step 7a: an entry that stops being transitive after it was marked as such is not used
    /// as one, and no mark stays.
    #[test]
    fn an_entry_that_changes_while_it_is_marked_is_refused() {
        let scene = scene(Scene::pv().granter_v2());
        pass_on(&scene, EntryFlags::empty());
        let inside = Arc::clone(&scene);
        let rewrite = move || inside.grant(G, Scene::GREF, C, inside.frame, EntryFlags::empty());
        scene.machine.hooks().once(Hook::ClaimMarked, rewrite);
        assert_eq!(copy_grant(&scene, 0, false), GrantStatus::GENERAL_ERROR);
        assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
        assert_eq!(scene.flags(T, GrantRef(9)), EntryFlags::PERMIT_ACCESS);
        assert_eq!(copy_grant(&scene, 0, false), GrantStatus::OKAY);
        assert_eq!(scene.audit(), []);
    }

    /// Spec 5.4 step 5: of an entry in use as a part it is kept which part that is, apart from what is kept of
    /// its neighbours.
    #[test]
    fn parts_in_use_are_kept_apart() {
        let scene = scene(Scene::pv().granter_v2());
        let head = EntryHead {
            flags: EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE,
            domid: C,
        };
        for (gref, page_off) in [(Scene::GREF, 0), (GrantRef(6), 100)] {
            let body = EntryBodyV2::SubPage {
                page_off,
                length: 8,
                frame: scene.frame.gfn.0,
            };
            scene.set_v2(G, gref, EntryV2::new(head, body));
        }
        let copier = copy_in_flight(&scene, false);
        let part = |gref, offset| {
            let own = CopyPtr::frame(scene.local[0].gfn.0, 0);
            copy(
                &scene,
                1,
                CopyPtr::grant(G, gref, offset),
                own,
                CopyFlags::SOURCE_GREF,
            )
        };
        assert_eq!(part(GrantRef(6), 100), GrantStatus::OKAY);
        assert_eq!(part(Scene::GREF, 0), GrantStatus::OKAY);
        assert_eq!(part(Scene::GREF, 100), GrantStatus::GENERAL_ERROR);
        assert_eq!(copier.go_on(), GrantStatus::OKAY);
        assert_eq!(scene.audit(), []);
    }
}
