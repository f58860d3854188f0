//! The in-memory machine's own rules, one test each, at the trait that the engine uses.

#[cfg(test)]
mod tests {
    use gnttab_abi::{CacheOp, DomId, EntryFlags, Errno, Gfn, MapFlags, Mfn, PAGE_SIZE};
    use gnttab_engine::machine::{
        Audit, Guest, L2Slot, Machine, P2mEntry, POISON, Page, PageOwner, PageType, Pte,
    };
    use gnttab_engine::{
        Access, DomainKind, Fault, FrameOwner, GuestMemory, HostError, HostMapping, HostUnmapping,
        Hypervisor, Reference, ResolveError, Resolved, StealError,
    };

    const G: DomId = DomId(1);
    const C: DomId = DomId(2);
    const X: u64 = 0x4000_0000;
    const Y: u64 = X + 0x1000;
    const RW: MapFlags = MapFlags::HOST_MAP;
    const RO: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);
    const PTE: MapFlags = MapFlags::HOST_MAP.union(MapFlags::CONTAINS_PTE);

    /// A granter with a page, and a caller with level-1 tables if it is PV.
    struct Pair {
        machine: Machine,
        g: Guest,
        c: Guest,
        page: Page,
    }

    impl Pair {
        fn new(granter: DomainKind, caller: DomainKind) -> Pair {
            Pair::on(Machine::new(), granter, caller)
        }

        fn on(machine: Machine, granter: DomainKind, caller: DomainKind) -> Pair {
            let g = machine.add_domain(G, granter).unwrap();
            let c = machine.add_domain(C, caller).unwrap();
            if caller == DomainKind::Pv {
                c.add_table(X).unwrap();
            }
            let page = g.add_page().unwrap();
            Pair { machine, g, c, page }
        }

        fn pv() -> Pair {
            Pair::new(DomainKind::Pv, DomainKind::Pv)
        }

        /// What the engine does for a host mapping, references first.
        fn map(&self, addr: u64, flags: MapFlags) -> Result<(), HostError> {
            self.map_frame(addr, self.page.mfn, flags)
        }

        fn map_frame(&self, addr: u64, mfn: Mfn, flags: MapFlags) -> Result<(), HostError> {
            let typed = self.typed(flags);
            assert!(self.machine.get_frame(mfn).is_some());
            assert!(!typed || self.machine.get_writable(mfn));
            let mapping = HostMapping {
                addr,
                mfn,
                flags,
                cache: EntryFlags::empty(),
                granter: G,
            };
            let done = self.machine.map_host(&self.c, &mapping);
            if done.is_err() {
                self.drop_references(mfn, typed);
            }
            done
        }

        fn typed(&self, flags: MapFlags) -> bool {
            !flags.contains(MapFlags::READONLY)
                && self.c.kind() != DomainKind::Arm
                && self.g.kind() == DomainKind::Pv
        }

        fn unmap(&self, addr: u64, new_addr: u64, flags: MapFlags) -> Result<(), HostError> {
            let unmapping = HostUnmapping {
                addr,
                new_addr,
                mfn: self.page.mfn,
                flags,
            };
            self.machine.unmap_host(&self.c, &unmapping)?;
            self.machine.flush(&self.c);
            self.drop_references(self.page.mfn, self.typed(flags));
            Ok(())
        }

        fn drop_references(&self, mfn: Mfn, typed: bool) {
            if typed {
                self.machine.put_writable(mfn);
            }
            self.machine.put_frame(mfn);
        }

        fn references(&self) -> (u64, u64) {
            let info = self.machine.frame(self.page.mfn).unwrap();
            (info.references, info.type_count)
        }
    }

    fn found(pair: &Pair, mfn: Mfn) -> Result<Resolved, ResolveError> {
        Ok(Resolved {
            mfn,
            owner: FrameOwner::Domain(pair.g.id()),
        })
    }

    // --- resolving, spec 4.2 --------------------------------------------------------------------

    /// Spec 4.2.1: memory that the domain owns, whatever it is used as, and nothing else.
    #[test]
    fn pv_resolves_own_memory_only() {
        let pair = Pair::pv();
        let resolve = |gfn| pair.machine.resolve(&pair.g, Gfn(gfn), Access::Write);
        assert_eq!(resolve(pair.page.mfn.0), found(&pair, pair.page.mfn));
        assert_eq!(pair.references().0, 2);

        let foreign = pair.c.add_page().unwrap().mfn;
        assert!(pair.machine.add_io_frame(Mfn(0xFEE00)));
        for number in [foreign.0, 0xFEE00, 0xFFFF_FFFF, u64::MAX] {
            assert_eq!(resolve(number), Err(ResolveError::BadPage), "{number:#x}");
        }
        let table = pair.machine.alloc_table_page(&pair.g).unwrap();
        assert!(
            resolve(table.mfn().0).is_ok(),
            "its own table's frames are grantable"
        );
    }

    /// Spec 4.2.1: a frame that was given up and is held by nobody is no longer the domain's.
    #[test]
    fn pv_does_not_resolve_what_was_freed() {
        let pair = Pair::pv();
        pair.g.give_up(pair.page.mfn);
        let resolved = pair.machine.resolve(&pair.g, pair.page.gfn, Access::Read);
        assert_eq!(resolved, Err(ResolveError::BadPage));
    }

    /// Spec 4.2.2, row by row.
    #[test]
    fn translated_resolves_by_the_kind_of_entry() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        let own = pair.page.mfn;
        let foreign = pair.c.add_page().unwrap().mfn;
        let shared = pair.machine.add_shared_frame();
        let at = |entry, access| {
            let gfn = Gfn(0x5000);
            assert!(pair.g.set_physmap(gfn, entry));
            let resolved = pair.machine.resolve(&pair.g, gfn, access);
            if let Ok(resolved) = resolved {
                pair.machine.put_frame(resolved.mfn);
            }
            resolved
        };
        let both = [Access::Read, Access::Write];
        for access in both {
            for entry in [
                P2mEntry::Ram(own),
                P2mEntry::LogDirty(own),
                P2mEntry::ReadOnlyRam(own),
                P2mEntry::Ioreq(own),
            ] {
                assert_eq!(at(Some(entry), access), found(&pair, own), "{entry:?}");
            }
            for entry in [
                None,
                Some(P2mEntry::Ram(foreign)),
                Some(P2mEntry::Foreign(foreign)),
                Some(P2mEntry::Grant(foreign, Access::Write)),
                Some(P2mEntry::Grant(own, Access::Write)),
                Some(P2mEntry::DirectMmio(Mfn(0xFEE00))),
                Some(P2mEntry::EmulatedMmio),
                Some(P2mEntry::Broken),
            ] {
                assert_eq!(at(entry, access), Err(ResolveError::BadPage), "{entry:?}");
            }
            let out = P2mEntry::PagedOut { requested: false };
            assert_eq!(at(Some(out), access), Err(ResolveError::Again));
            let requested = P2mEntry::PagedOut { requested: true };
            assert_eq!(pair.g.physmap(Gfn(0x5000)), Some(requested));
        }
        let cow = Resolved {
            mfn: shared,
            owner: FrameOwner::CopyOnWrite,
        };
        assert_eq!(at(Some(P2mEntry::Shared(shared)), Access::Read), Ok(cow));
        for far in [1 << 36, u64::MAX] {
            let resolved = pair.machine.resolve(&pair.g, Gfn(far), Access::Read);
            assert_eq!(resolved, Err(ResolveError::BadPage));
        }
    }

    /// Spec 4.2.2: populate-on-demand comes into being; without memory it does not.
    #[test]
    fn populates_on_demand() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        let gfn = Gfn(0x5000);
        assert!(pair.g.set_physmap(gfn, Some(P2mEntry::PopulateOnDemand)));
        assert_eq!(pair.g.outstanding(), 1);
        pair.machine.set_shortage(true);
        let resolve = || pair.machine.resolve(&pair.g, gfn, Access::Read);
        assert_eq!(resolve(), Err(ResolveError::BadPage));
        pair.machine.set_shortage(false);
        let resolved = resolve().unwrap();
        assert_eq!(pair.g.physmap(gfn), Some(P2mEntry::Ram(resolved.mfn)));
        assert_eq!((pair.g.outstanding(), pair.g.pages()), (0, 2));
    }

    /// Spec 4.2.2: writing to a shared page gives the domain one of its own, with what it held.
    #[test]
    fn unshares_for_writing() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        let (gfn, shared) = (Gfn(0x5000), pair.machine.add_shared_frame());
        assert!(pair.machine.page(shared).unwrap().write(7, b"seven"));
        assert!(pair.g.set_physmap(gfn, Some(P2mEntry::Shared(shared))));
        let resolve = || pair.machine.resolve(&pair.g, gfn, Access::Write);
        pair.machine.set_shortage(true);
        assert_eq!(resolve(), Err(ResolveError::Again));
        pair.machine.set_shortage(false);
        let own = resolve().unwrap();
        assert_eq!(own.owner, FrameOwner::Domain(G));
        assert_ne!(own.mfn, shared);
        assert_eq!(pair.machine.page(own.mfn).unwrap().read_bytes(7), Some(*b"seven"));
    }

    /// Spec 4.2.2 and 10.1 item 8: a grant mapping of the domain's own page can be granted on Arm,
    /// and in Xen 4.17.
    #[test]
    fn regrants_own_pages_where_the_reference_does() {
        for (reference, kind, may) in [
            (Reference::Head, DomainKind::Hvm, false),
            (Reference::V4_17, DomainKind::Hvm, true),
            (Reference::Head, DomainKind::Arm, true),
            (Reference::V4_17, DomainKind::Arm, true),
        ] {
            let pair = Pair::on(Machine::with_reference(reference), kind, DomainKind::Pv);
            let foreign = pair.c.add_page().unwrap().mfn;
            let grant = |mfn| {
                let entry = P2mEntry::Grant(mfn, Access::Write);
                assert!(pair.g.set_physmap(Gfn(0x5000), Some(entry)));
                pair.machine.resolve(&pair.g, Gfn(0x5000), Access::Read).is_ok()
            };
            assert_eq!(grant(pair.page.mfn), may, "{reference:?} {kind:?}");
            assert!(!grant(foreign), "never a page of another domain");
        }
    }

    /// A paged-out page comes back as a page of the domain's.
    #[test]
    fn pages_in() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        let gfn = Gfn(0x5000);
        assert_eq!(pair.g.page_in(gfn), None);
        assert!(
            pair.g
                .set_physmap(gfn, Some(P2mEntry::PagedOut { requested: false }))
        );
        let page = pair.g.page_in(gfn).unwrap();
        assert_eq!(
            pair.machine.resolve(&pair.g, gfn, Access::Read),
            found(&pair, page.mfn)
        );
    }

    // --- types and references, spec 4.2.3, 4.5 --------------------------------------------------

    /// Spec 4.2.3: a page table cannot be had writable, nor a writable page as a page table.
    #[test]
    fn one_type_at_a_time() {
        let pair = Pair::pv();
        let mfn = pair.page.mfn;
        assert!(pair.g.use_as(mfn, PageType::L1Table));
        assert!(!pair.machine.get_writable(mfn));
        pair.g.stop_use(mfn);
        assert!(pair.machine.get_writable(mfn));
        assert!(pair.machine.get_writable(mfn));
        assert!(!pair.g.use_as(mfn, PageType::L1Table), "as long as it is held");
        pair.machine.put_writable(mfn);
        pair.machine.put_writable(mfn);
        assert!(pair.g.use_as(mfn, PageType::Other));
        assert!(!pair.machine.get_writable(mfn));
        pair.g.stop_use(mfn);
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Spec 4.2.3: on Arm the type is always had, and nothing is counted.
    #[test]
    fn arm_has_no_types() {
        let pair = Pair::new(DomainKind::Arm, DomainKind::Arm);
        assert!(pair.machine.get_writable(pair.page.mfn));
        assert_eq!(pair.references(), (1, 0));
        pair.machine.put_writable(pair.page.mfn);
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Spec 4.5: a frame that its owner gave up lives until the last reference goes, then it is
    /// poisoned and no longer on its owner's account.
    #[test]
    fn references_keep_a_frame_alive() {
        let pair = Pair::pv();
        let mfn = pair.page.mfn;
        assert_eq!(pair.machine.get_frame(mfn), Some(FrameOwner::Domain(G)));
        pair.g.give_up(mfn);
        let info = pair.machine.frame(mfn).unwrap();
        assert_eq!((info.owner, info.references), (PageOwner::Domain(G), 1));
        assert_eq!(pair.g.pages(), 1);
        let words = pair.machine.page(mfn).unwrap();
        pair.machine.put_frame(mfn);
        assert_eq!(pair.machine.frame(mfn).unwrap().owner, PageOwner::Free);
        assert_eq!(pair.g.pages(), 0);
        assert_eq!(words.read_bytes(4095), Some([POISON]));
        assert_eq!(pair.machine.get_frame(mfn), None);
    }

    /// I/O frames are not counted.
    #[test]
    fn io_frames_have_no_references() {
        let machine = Machine::new();
        assert!(machine.add_io_frame(Mfn(0xFEE00)));
        assert!(!machine.add_io_frame(Mfn(0xFEE00)), "it is there already");
        assert_eq!(machine.get_frame(Mfn(0xFEE00)), Some(FrameOwner::Io));
        machine.put_frame(Mfn(0xFEE00));
        machine.put_frame(Mfn(0xFEE00));
        assert_eq!(machine.audit_idle(), []);
        assert_eq!(machine.frame_owner(Mfn(0xFEE00)), Err(ResolveError::BadPage));
    }

    // --- PV mappings, spec 4.4.1 ----------------------------------------------------------------

    /// Create, step 1: the entry's bits, by flags and width.
    #[test]
    fn pv_entry_bits() {
        let base = Pte::PRESENT | Pte::ACCESSED | Pte::DIRTY | Pte::NO_EXECUTE;
        let kernel = base | Pte::USER | Pte::GUEST_KERNEL;
        let application = MapFlags::APPLICATION_MAP;
        for (flags, narrow, bits) in [
            (RW, false, kernel | Pte::WRITABLE),
            (RO, false, kernel),
            (RO | application, false, base | Pte::USER | Pte::GLOBAL),
            (RO, true, base),
            (RO | application, true, base | Pte::USER),
            (RO | MapFlags::from_bits_retain(0x7_0000), false, kernel | 0xE00),
            (RO | MapFlags::from_bits_retain(0xFFF8_0020), false, kernel),
        ] {
            let pair = Pair::pv();
            pair.c.set_narrow(narrow);
            pair.map(X, flags).unwrap();
            assert_eq!(
                pair.c.pte(X),
                Some(Pte::new(pair.page.mfn, bits)),
                "{flags:?} {narrow}"
            );
        }
    }

    /// Create: the cache bits stand for the entry's bits of the same names.
    #[test]
    fn pv_entry_cache_bits() {
        let pair = Pair::pv();
        let mfn = Mfn(0xFEE00);
        assert!(pair.machine.add_io_frame(mfn));
        let cache = EntryFlags::PWT | EntryFlags::PAT;
        let mapping = HostMapping {
            addr: X,
            mfn,
            flags: RO,
            cache,
            granter: G,
        };
        pair.machine.map_host(&pair.c, &mapping).unwrap();
        let pte = pair.c.pte(X).unwrap();
        assert!(pte.has(Pte::PWT | Pte::PAT));
        assert!(!pte.has(Pte::PCD));
    }

    /// Create, step 2, linear: each address that cannot be.
    #[test]
    fn pv_refuses_bad_linear_addresses() {
        let pair = Pair::pv();
        let foreign = pair.g.add_page().unwrap().mfn;
        let plain = pair.c.add_page().unwrap().mfn;
        pair.c.set_table(0x6000_0000, Some(L2Slot::Superpage(plain)));
        pair.c.set_table(0x6020_0000, Some(L2Slot::Table(foreign)));
        pair.c.set_table(0x6040_0000, Some(L2Slot::Table(plain)));
        for (addr, why) in [
            (0x7000_0000, "no level-1 table"),
            (0x6000_0000, "a large page"),
            (0x6020_0000, "a table of another domain"),
            (0x6040_0000, "a page that is no table"),
            (0xFFFF_8000_0000_0000, "the hypervisor's range"),
            (0x8000_0000_0000, "no address"),
        ] {
            assert_eq!(pair.map(addr, RW), Err(HostError), "{why}");
        }
        assert_eq!(pair.references(), (1, 0));
        pair.map(X + 123, RW).unwrap();
        assert_eq!(
            pair.c.pte(X).unwrap().mfn(),
            pair.page.mfn,
            "low bits do not count"
        );
    }

    /// Create, step 2: a 32-bit caller's addresses end at 2^32, and before the hypervisor.
    #[test]
    fn pv_refuses_wide_addresses_of_narrow_callers() {
        let pair = Pair::pv();
        pair.c.set_narrow(true);
        for addr in [0x1_0000_0000, 0xF580_0000] {
            pair.c.add_table(addr).unwrap();
            assert_eq!(pair.map(addr, RW), Err(HostError), "{addr:#x}");
        }
    }

    /// Create, step 2, contains_pte: alignment, ownership, type.
    #[test]
    fn pv_maps_by_machine_address_of_the_entry() {
        let pair = Pair::pv();
        let slot = pair.c.pte_address(Y).unwrap();
        let plain = pair.c.add_page().unwrap().mfn.address();
        let foreign = pair.g.add_page().unwrap().mfn.address();
        for addr in [slot + 4, plain, foreign, 0xFFFF_FFFF_F000] {
            assert_eq!(pair.map(addr, PTE), Err(HostError), "{addr:#x}");
        }
        pair.map(slot, PTE).unwrap();
        assert_eq!(pair.c.pte(Y).unwrap().mfn(), pair.page.mfn);
        assert_eq!(pair.unmap(slot + 4, 0, PTE), Err(HostError));
        assert_eq!(
            pair.unmap(slot, X, PTE),
            Err(HostError),
            "nothing may be moved there"
        );
        pair.unmap(slot, 0, PTE).unwrap();
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Create, step 4: what stood there is dropped as if the guest had replaced it.
    #[test]
    fn pv_mapping_drops_what_stood_there() {
        let pair = Pair::pv();
        let own = pair.c.add_memory(X, 1).unwrap()[0].mfn;
        assert_eq!(pair.machine.frame(own).unwrap().references, 2);
        pair.map(X, RW).unwrap();
        let info = pair.machine.frame(own).unwrap();
        assert_eq!((info.references, info.type_count), (1, 0));
        // The same for an older grant mapping, of which the engine keeps the handle.
        pair.map(X, RO).unwrap();
        assert_eq!(pair.references(), (2, 0));
        assert_eq!(pair.machine.audit(), []);
    }

    /// Remove, step 4: exactly that frame, present, as writable as the record.
    #[test]
    fn pv_unmaps_only_what_agrees() {
        let pair = Pair::pv();
        pair.map(X, RO).unwrap();
        assert_eq!(pair.unmap(X, 0, RW), Err(HostError), "not writable");
        assert_eq!(pair.unmap(Y, 0, RO), Err(HostError), "not present");
        let other = HostUnmapping {
            addr: X,
            new_addr: 0,
            mfn: Mfn(pair.page.mfn.0 + 1),
            flags: RO,
        };
        assert_eq!(
            pair.machine.unmap_host(&pair.c, &other),
            Err(HostError),
            "not the frame"
        );
        assert!(
            pair.c.set_pte_bits(X, 7 << Pte::AVAIL_SHIFT | Pte::PCD),
            "other bits do not count"
        );
        pair.unmap(X, 0, RO).unwrap();
        assert_eq!(pair.c.pte(X), Some(Pte::default()));
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Replace: the entry of `new_addr` moves, with its references.
    #[test]
    fn pv_replaces_by_another_entry() {
        let pair = Pair::pv();
        let own = pair.c.add_memory(Y, 1).unwrap()[0].mfn;
        pair.map(X, RW).unwrap();
        pair.unmap(X, Y, RW).unwrap();
        assert_eq!(pair.c.pte(X).unwrap().mfn(), own);
        assert_eq!(pair.c.pte(Y), Some(Pte::default()));
        assert_eq!(pair.machine.frame(own).unwrap().references, 2);
        // Once more, with nothing at `new_addr`.
        pair.map(X, RO).unwrap();
        pair.unmap(X, Y, RO).unwrap();
        assert_eq!(pair.c.pte(X), Some(Pte::default()));
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Replace, step 6 and spec 10.2 item 14: `new_addr`'s mapping is lost when the rest fails
    ///
    #[test]
    fn pv_failed_replace_loses_the_other_entry() {
        let pair = Pair::pv();
        let own = pair.c.add_memory(Y, 1).unwrap()[0].mfn;
        pair.map(X, RW).unwrap();
        assert_eq!(
            pair.unmap(X, 0x7000_0000, RW),
            Err(HostError),
            "no table: nothing is touched"
        );
        assert_eq!(pair.unmap(X + 0x5000, Y, RW), Err(HostError));
        assert_eq!(pair.c.pte(Y), Some(Pte::default()));
        assert_eq!(pair.machine.frame(own).unwrap().references, 1);
        assert_eq!(pair.c.pte(X).unwrap().mfn(), pair.page.mfn, "the grant stands");
        // At the same slot the grant mapping itself is lost, with what it held.
        assert_eq!(pair.unmap(X, X, RW), Err(HostError));
        assert_eq!(pair.c.pte(X), Some(Pte::default()));
        assert_eq!(pair.references(), (1, 0));
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Replace by a 32-bit caller: neither address may be above 2^32.
    #[test]
    fn pv_narrow_replace_stays_below_4g() {
        let pair = Pair::pv();
        pair.c.set_narrow(true);
        pair.map(X, RW).unwrap();
        pair.c.add_memory(Y, 1).unwrap();
        assert_eq!(pair.unmap(X, 0x1_0000_0000, RW), Err(HostError));
        assert_eq!(pair.unmap(0x1_0000_0000 + X, Y, RW), Err(HostError));
        assert_ne!(pair.c.pte(Y), Some(Pte::default()), "nothing was taken yet");
    }

    /// U-38: an entry that the guest replaced itself is no longer the mapping, and what it held is
    /// gone with it.
    #[test]
    fn pv_guest_overwrites_its_mapping() {
        let pair = Pair::pv();
        pair.map(X, RW).unwrap();
        assert!(pair.c.write_pte(X, Pte::default()));
        assert_eq!(pair.references(), (1, 0));
        assert_eq!(pair.unmap(X, 0, RW), Err(HostError));
    }

    /// Spec 7.2: tearing page tables down drops what their entries hold.
    #[test]
    fn pv_teardown_drops_mappings() {
        let pair = Pair::pv();
        pair.map(X, RW).unwrap();
        pair.map(Y, RO).unwrap();
        assert_eq!(pair.references(), (3, 1));
        pair.c.set_dying();
        pair.c.drop_address_space();
        assert_eq!(pair.references(), (1, 0));
        pair.c.give_up_memory();
        assert_eq!(pair.c.frames(), 0);
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Spec 4.5: a writable entry for a page of a foreign translated domain holds no type.
    #[test]
    fn pv_entry_for_an_external_granter_holds_no_type() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        pair.map(X, RW).unwrap();
        assert_eq!(pair.references(), (2, 0));
        assert!(pair.c.write_pte(X, Pte::default()));
        assert_eq!(pair.references(), (1, 0));
        assert_eq!(pair.machine.audit_idle(), []);
    }

    // --- HVM mappings, spec 4.4.2 ---------------------------------------------------------------

    /// Create, step 1: nothing but host_map, with or without readonly.
    #[test]
    fn translated_refuses_other_flags() {
        for kind in [DomainKind::Hvm, DomainKind::Arm] {
            let pair = Pair::new(kind, kind);
            for bits in [0x20, 0x1_0000, 0x8000_0000, 0x8, 0x10, 0x1] {
                let flags = RW | MapFlags::from_bits_retain(bits);
                assert_eq!(pair.map(X, flags), Err(HostError), "{kind:?} {flags:?}");
            }
            let (addr, mfn, granter) = (X, pair.page.mfn, G);
            let mapping = HostMapping {
                addr,
                mfn,
                flags: RO,
                cache: EntryFlags::PCD,
                granter,
            };
            assert_eq!(pair.machine.map_host(&pair.c, &mapping), Err(HostError));
        }
    }

    /// Create, step 2: what is there decides.
    #[test]
    fn hvm_maps_over_what_may_be_covered() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Hvm);
        let own = pair.c.add_page().unwrap();
        assert!(pair.c.set_physmap(Gfn(0x40001), Some(P2mEntry::EmulatedMmio)));
        assert!(pair.c.set_physmap(Gfn(0x40002), Some(P2mEntry::PopulateOnDemand)));
        for addr in [X + 123, Y, Y + 0x1000, own.gfn.address()] {
            pair.map(addr, RW).unwrap();
            let entry = P2mEntry::Grant(pair.page.mfn, Access::Write);
            assert_eq!(pair.c.physmap(Gfn::containing(addr)), Some(entry));
        }
        assert_eq!(pair.c.outstanding(), 0);
        assert_eq!(pair.c.pages(), 1, "the covered page is still its own");
        pair.unmap(own.gfn.address(), 0, RW).unwrap();
        assert_eq!(pair.c.physmap(own.gfn), None, "and has no gfn any more");
        assert_eq!(pair.map(0xFFFF_FFFF_FFFF_F000, RW), Err(HostError), "no such gfn");
        assert_eq!(pair.c.crashes(), [] as [&str; 0]);
    }

    /// Create, step 2: mapping over a mapping crashes the caller.
    #[test]
    fn hvm_crashes_over_a_mapping() {
        for entry in [
            P2mEntry::Grant(Mfn(0x1000), Access::Read),
            P2mEntry::Foreign(Mfn(0x1000)),
            P2mEntry::DirectMmio(Mfn(0xFEE00)),
        ] {
            let pair = Pair::new(DomainKind::Hvm, DomainKind::Hvm);
            assert!(pair.c.set_physmap(Gfn::containing(X), Some(entry)));
            assert_eq!(pair.map(X, RW), Err(HostError));
            assert_eq!(pair.c.crashes().len(), 1, "{entry:?}");
            assert_eq!(pair.c.physmap(Gfn::containing(X)), Some(entry));
        }
    }

    /// Create, step 3: a self grant takes the page's own gfn away; Arm leaves it.
    #[test]
    fn self_grants_move_on_hvm_and_stay_on_arm() {
        for (kind, stays) in [(DomainKind::Hvm, false), (DomainKind::Arm, true)] {
            let pair = Pair::new(kind, kind);
            let own = pair.c.add_page().unwrap();
            pair.map_frame(X, own.mfn, RW).unwrap();
            assert_eq!(pair.c.physmap(own.gfn).is_some(), stays, "{kind:?}");
            // At its own gfn: the entry becomes the grant's, and a hole with it.
            let own = pair.c.add_page().unwrap();
            pair.map_frame(own.gfn.address(), own.mfn, RO).unwrap();
            let entry = Some(P2mEntry::Grant(own.mfn, Access::Read));
            assert_eq!(pair.c.physmap(own.gfn), entry);
        }
    }

    /// Remove: a grant mapping of that frame, of either kind, and no more.
    #[test]
    fn translated_unmaps_any_grant_of_the_frame() {
        for kind in [DomainKind::Hvm, DomainKind::Arm] {
            let pair = Pair::new(kind, kind);
            let other = pair.g.add_page().unwrap().mfn;
            pair.map(X, RW).unwrap();
            pair.map_frame(Y, other, RW).unwrap();
            assert_eq!(pair.unmap(Y, 0, RW), Err(HostError), "another frame");
            assert_eq!(pair.unmap(Y + 0x1000, 0, RW), Err(HostError), "nothing (D-2)");
            assert_eq!(pair.unmap(X, Y, RW), Err(HostError), "nothing can be moved there");
            assert_eq!(
                pair.unmap(X, 0, PTE),
                Err(HostError),
                "the record cannot be of an entry"
            );
            pair.unmap(X + 0xFFF, 0, RO).unwrap();
            assert_eq!(pair.c.physmap(Gfn::containing(X)), None);
        }
    }

    // --- Arm mappings, spec 4.4.3 ---------------------------------------------------------------

    /// Create: whatever is there is replaced without complaint; a dying domain gets nothing.
    #[test]
    fn arm_replaces_anything_but_not_for_the_dying() {
        let pair = Pair::new(DomainKind::Arm, DomainKind::Arm);
        let other = pair.g.add_page().unwrap().mfn;
        pair.map_frame(X, other, RW).unwrap();
        pair.map(X, RO).unwrap();
        let entry = P2mEntry::Grant(pair.page.mfn, Access::Read);
        assert_eq!(pair.c.physmap(Gfn::containing(X)), Some(entry));
        assert!(pair.c.crashes().is_empty());
        pair.c.set_dying();
        assert_eq!(pair.map(Y, RO), Err(HostError));
    }

    /// Spec 10.1 item 9: Xen 4.17 cuts the addresses of 32-bit guests.
    #[test]
    fn arm32_addresses_are_cut_in_4_17_only() {
        for (reference, narrow, gfn) in [
            (Reference::V4_17, true, 0x40000),
            (Reference::V4_17, false, 0x14_0000),
            (Reference::Head, true, 0x14_0000),
        ] {
            let machine = Machine::with_reference(reference);
            let pair = Pair::on(machine, DomainKind::Arm, DomainKind::Arm);
            pair.c.set_narrow(narrow);
            pair.map(0x1_4000_0000, RW).unwrap();
            assert!(pair.c.physmap(Gfn(gfn)).is_some(), "{reference:?} {narrow}");
            pair.unmap(0x1_4000_0000, 0, RW).unwrap();
        }
    }

    // --- table frames, spec 3.9 step 8, 6.2 step 8 ----------------------------------------------

    /// Spec 3.5 step 9: a PV domain sees table frames by mfn, a translated one where they are.
    #[test]
    fn table_frames_are_seen_where_they_are() {
        let pair = Pair::new(DomainKind::Pv, DomainKind::Hvm);
        let page = pair.machine.alloc_table_page(&pair.g).unwrap();
        assert_eq!(pair.machine.table_page_gfn(&pair.g, &page), Gfn(page.mfn().0));
        let page = pair.machine.alloc_table_page(&pair.c).unwrap();
        assert_eq!(pair.machine.table_page_gfn(&pair.c, &page), Gfn::INVALID);
        pair.machine
            .place_table_page(&pair.c, &page, Gfn(0x1234))
            .unwrap();
        assert_eq!(pair.machine.table_page_gfn(&pair.c, &page), Gfn(0x1234));
    }

    /// Spec 6.2 step 8, x86: the page moves; what was there is unhooked, freed or refused.
    #[test]
    fn hvm_places_table_frames() {
        let pair = Pair::new(DomainKind::Pv, DomainKind::Hvm);
        let page = pair.machine.alloc_table_page(&pair.c).unwrap();
        let other = pair.machine.alloc_table_page(&pair.c).unwrap();
        let own = pair.c.add_page().unwrap();
        let place = |page, gfn| pair.machine.place_table_page(&pair.c, page, gfn);
        let (a, b) = (Gfn(0x800), Gfn(0x801));
        assert_eq!(place(&page, a), Ok(()));
        assert_eq!(place(&page, a), Ok(()), "again");
        assert_eq!(place(&page, b), Ok(()));
        assert_eq!(
            (pair.c.physmap(a), pair.c.physmap(b)),
            (None, Some(P2mEntry::Ram(page.mfn())))
        );
        assert_eq!(place(&other, b), Ok(()), "another table page is unhooked");
        assert_eq!(pair.machine.table_page_gfn(&pair.c, &page), Gfn::INVALID);
        assert_eq!(place(&page, own.gfn), Ok(()), "own memory is freed");
        assert_eq!(pair.machine.frame(own.mfn).unwrap().owner, PageOwner::Free);
        for (entry, errno) in [
            (P2mEntry::DirectMmio(Mfn(0xFEE00)), Errno::Perm),
            (P2mEntry::Grant(pair.page.mfn, Access::Write), Errno::Nxio),
            (P2mEntry::Foreign(pair.page.mfn), Errno::Nxio),
        ] {
            assert!(pair.c.set_physmap(a, Some(entry)));
            assert_eq!(place(&page, a), Err(errno), "{entry:?}");
        }
        assert_eq!(pair.machine.table_page_gfn(&pair.c, &page), own.gfn, "it stayed");
    }

    /// Spec 6.1 step 10: a toolstack's mapping of a foreign frame holds a reference, and keeps the
    /// frame's domain.
    #[test]
    fn foreign_mappings_hold_a_reference() {
        for kind in [DomainKind::Hvm, DomainKind::Arm] {
            let pair = Pair::new(DomainKind::Pv, kind);
            let page = pair.machine.alloc_table_page(&pair.g).unwrap();
            let (mfn, gfn) = (page.mfn(), Gfn(0x800));
            pair.g.give_up_memory();
            assert!(!pair.machine.is_held(&pair.g));
            let map = |gfn| pair.machine.map_foreign(&pair.c, gfn, mfn);
            assert_eq!(map(gfn), Ok(()));
            assert_eq!(map(Gfn(u64::MAX)), Err(Errno::Inval));
            assert_eq!(pair.c.physmap(gfn), Some(P2mEntry::Foreign(mfn)));
            assert!(pair.machine.is_held(&pair.g));
            drop(page);
            assert!(pair.machine.is_held(&pair.g));
            assert!(pair.c.set_physmap(gfn, None));
            assert_eq!(pair.machine.frame(mfn).unwrap().owner, PageOwner::Free);
            assert!(!pair.machine.is_held(&pair.g));
            assert_eq!(pair.machine.audit_idle(), []);
        }
    }

    /// Spec 6.2 step 8, Arm: once, over anything.
    #[test]
    fn arm_places_table_frames_once() {
        let pair = Pair::new(DomainKind::Arm, DomainKind::Arm);
        let page = pair.machine.alloc_table_page(&pair.c).unwrap();
        let own = pair.c.add_page().unwrap();
        let place = |gfn| pair.machine.place_table_page(&pair.c, &page, gfn);
        assert_eq!(place(own.gfn), Ok(()));
        assert_eq!(pair.c.physmap(own.gfn), Some(P2mEntry::Ram(page.mfn())));
        assert_eq!(place(own.gfn), Err(Errno::Busy));
        assert_eq!(place(Gfn(0x800)), Err(Errno::Busy));
    }

    /// Spec 3.9 step 8: a status page goes out of the physmap, and back; a referenced one stays.
    #[test]
    fn retracts_what_nobody_references() {
        let pair = Pair::new(DomainKind::Pv, DomainKind::Hvm);
        let page = pair.machine.alloc_table_page(&pair.c).unwrap();
        pair.machine.place_table_page(&pair.c, &page, Gfn(0x800)).unwrap();
        assert!(pair.machine.hold(page.mfn()));
        assert!(!pair.machine.retract_table_page(&pair.c, &page));
        assert_eq!(pair.machine.table_page_gfn(&pair.c, &page), Gfn(0x800));
        pair.machine.let_go(page.mfn());
        assert!(pair.machine.retract_table_page(&pair.c, &page));
        assert_eq!(pair.c.physmap(Gfn(0x800)), None);
        pair.machine.restore_table_page(&pair.c, &page);
        assert_eq!(pair.machine.table_page_gfn(&pair.c, &page), Gfn(0x800));
        // A PV domain's page tables reference, too.
        let page = pair.machine.alloc_table_page(&pair.g).unwrap();
        pair.g.add_table(X).unwrap();
        assert!(pair.g.map(X, Gfn(page.mfn().0), Access::Write));
        assert!(!pair.machine.retract_table_page(&pair.g, &page));
        pair.g.unmap(X);
        assert!(pair.machine.retract_table_page(&pair.g, &page));
    }

    /// Table frames are zeroed, special, and freed with their page.
    #[test]
    fn table_frames_come_and_go() {
        let pair = Pair::pv();
        let page = pair.machine.alloc_table_page(&pair.g).unwrap();
        let mfn = page.mfn();
        assert_eq!(page.as_ref().read_bytes(0), Some([0; PAGE_SIZE]));
        assert!(pair.machine.frame(mfn).unwrap().special);
        assert_eq!(pair.g.pages(), 1, "not on its account");
        drop(page);
        assert_eq!(pair.machine.frame(mfn).unwrap().owner, PageOwner::Free);
        pair.machine.set_shortage(true);
        assert!(pair.machine.alloc_table_page(&pair.g).is_none());
    }

    // --- transfer, spec 3.7 ---------------------------------------------------------------------

    /// Steps 2 and 3: each page that cannot be taken, and why.
    #[test]
    fn steals_only_free_pages_of_pv_domains() {
        let pair = Pair::pv();
        let steal = |mfn| pair.machine.steal(&pair.g, mfn);
        let table = pair.machine.alloc_table_page(&pair.g).unwrap();
        let foreign = pair.c.add_page().unwrap().mfn;
        assert!(pair.machine.add_io_frame(Mfn(0xFEE00)));
        for mfn in [table.mfn(), foreign, Mfn(0xFEE00), Mfn(0x77_7777)] {
            assert_eq!(steal(mfn), Err(StealError::BadPage), "{mfn}");
        }
        assert!(pair.machine.hold(pair.page.mfn));
        assert_eq!(
            steal(pair.page.mfn),
            Err(StealError::BadPage),
            "somebody references it"
        );
        pair.machine.let_go(pair.page.mfn);
        pair.g.set_iommu(true);
        pair.g.set_iommu_failing(true);
        assert_eq!(
            steal(pair.page.mfn),
            Err(StealError::Failed),
            "the I/O MMU keeps it"
        );
        pair.g.set_iommu_failing(false);
        assert_eq!(steal(pair.page.mfn), Ok(()));
        assert_eq!(pair.g.pages(), 0);
        assert_eq!(
            pair.machine.frame(pair.page.mfn).unwrap().owner,
            PageOwner::Nobody
        );
        assert_eq!(
            pair.machine.get_frame(pair.page.mfn),
            None,
            "out of anybody's reach"
        );
        assert_eq!(pair.machine.frame_owner(pair.page.mfn), Ok(None));

        let hvm = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        let stolen = hvm.machine.steal(&hvm.g, hvm.page.mfn);
        assert_eq!(
            stolen,
            Err(StealError::Failed),
            "external callers have no pages to give"
        );
    }

    /// Step 4: a page that is not delivered is freed.
    #[test]
    fn frees_what_was_stolen() {
        let pair = Pair::pv();
        pair.machine.steal(&pair.g, pair.page.mfn).unwrap();
        pair.machine.free_stolen(pair.page.mfn);
        assert_eq!(pair.machine.frame(pair.page.mfn).unwrap().owner, PageOwner::Free);
        assert_eq!(pair.machine.audit_idle(), []);
    }

    /// Step 7: a copy below 2^32, or below the receiver's limit, if there is memory.
    #[test]
    fn replaces_high_pages() {
        let pair = Pair::pv();
        let high = pair.g.add_page_at(Mfn(0x1_0000_0042)).unwrap().mfn;
        assert!(pair.machine.page(high).unwrap().write(0, b"high"));
        pair.machine.steal(&pair.g, high).unwrap();
        pair.machine.set_low_shortage(true);
        assert_eq!(
            pair.machine.replace_stolen(high, &pair.c),
            Err(StealError::Failed)
        );
        pair.machine.set_low_shortage(false);
        pair.c.set_frame_limit(0x100);
        assert_eq!(
            pair.machine.replace_stolen(high, &pair.c),
            Err(StealError::Failed)
        );
        assert!(!pair.machine.fits(&pair.c, Mfn(0x100)));
        pair.c.set_frame_limit(u64::MAX);
        let low = pair.machine.replace_stolen(high, &pair.c).unwrap();
        assert!(low.0 < 1 << 32);
        assert_eq!(pair.machine.page(low).unwrap().read_bytes(0), Some(*b"high"));
        assert_eq!(pair.machine.frame(high).unwrap().owner, PageOwner::Free);
    }

    /// Steps 8, 9 and 11: a full or dying receiver gets nothing; the account is right throughout.
    #[test]
    fn reserves_and_assigns() {
        let pair = Pair::pv();
        let (machine, c) = (&pair.machine, &pair.c);
        let before = c.pages();
        machine.steal(&pair.g, pair.page.mfn).unwrap();
        c.set_max_pages(before);
        assert_eq!(machine.reserve(c), Err(StealError::Failed), "full");
        c.set_max_pages(before + 1);
        machine.reserve(c).unwrap();
        assert_eq!(
            machine.reserve(c),
            Err(StealError::Failed),
            "full with the reservation"
        );
        machine.unreserve(c);
        machine.reserve(c).unwrap();
        c.set_dying();
        assert_eq!(machine.assign(c, pair.page.mfn), Err(StealError::Failed), "dying");
        assert_eq!(
            c.pages(),
            before + 1,
            "the reservation is the engine's to give back"
        );
        machine.unreserve(c);
        assert_eq!(machine.reserve(c), Err(StealError::Failed), "dying");
        machine.free_stolen(pair.page.mfn);
        assert_eq!(c.pages(), before);
    }

    /// Steps 11 and 13: the page is the receiver's, at the number that it chose.
    #[test]
    fn installs_what_was_assigned() {
        for kind in [DomainKind::Pv, DomainKind::Hvm] {
            let pair = Pair::new(DomainKind::Pv, kind);
            let (mfn, gfn) = (pair.page.mfn, Gfn(0x55));
            pair.machine.steal(&pair.g, mfn).unwrap();
            pair.machine.reserve(&pair.c).unwrap();
            pair.machine.assign(&pair.c, mfn).unwrap();
            pair.machine.install(&pair.c, mfn, gfn).unwrap();
            let info = pair.machine.frame(mfn).unwrap();
            assert_eq!((info.owner, info.references), (PageOwner::Domain(C), 1));
            match kind {
                DomainKind::Pv => assert_eq!(info.physical, gfn),
                _ => assert_eq!(pair.c.physmap(gfn), Some(P2mEntry::Ram(mfn))),
            }
            assert_eq!(pair.machine.audit_idle(), []);
        }
        let pair = Pair::new(DomainKind::Pv, DomainKind::Hvm);
        assert_eq!(
            pair.machine.install(&pair.c, pair.page.mfn, Gfn(u64::MAX)),
            Err(HostError)
        );
    }

    // --- devices, caches, clock -----------------------------------------------------------------

    /// Spec 4.6: rights come, change and go; a failing I/O MMU changes nothing.
    #[test]
    fn iommu_follows_and_fails() {
        let pair = Pair::pv();
        let set = |access| pair.machine.iommu_set(&pair.c, pair.page.mfn, access);
        assert!(!pair.machine.iommu_follows(&pair.c));
        pair.c.set_iommu(true);
        assert!(pair.machine.iommu_follows(&pair.c));
        set(Some(Access::Write)).unwrap();
        assert_eq!(pair.c.iommu_right(pair.page.mfn), Some(Access::Write));
        pair.c.set_iommu_failing(true);
        assert_eq!(set(Some(Access::Read)), Err(HostError));
        assert_eq!(pair.c.iommu_right(pair.page.mfn), Some(Access::Write));
        pair.c.set_iommu_failing(false);
        set(None).unwrap();
        assert_eq!(pair.c.iommu_right(pair.page.mfn), None);
    }

    /// Spec 3.13 step 7: x86 cannot invalidate alone; everything else is done and noted.
    #[test]
    fn cache_flushes_are_noted() {
        for (kind, op, done) in [
            (DomainKind::Arm, CacheOp::INVAL, Ok(())),
            (DomainKind::Pv, CacheOp::INVAL, Err(Errno::OpNotSupp)),
            (DomainKind::Pv, CacheOp::CLEAN | CacheOp::INVAL, Ok(())),
        ] {
            let pair = Pair::new(kind, kind);
            assert_eq!(pair.machine.cache_flush(pair.page.mfn, 8, 16, op), done);
            let flushes = pair.machine.cache_flushes();
            assert_eq!(flushes.len(), usize::from(done.is_ok()));
            for flushed in flushes {
                assert_eq!(
                    (flushed.mfn, flushed.offset, flushed.length),
                    (pair.page.mfn, 8, 16)
                );
            }
        }
        let machine = Machine::new();
        assert_eq!(machine.frame_owner(machine.add_unowned_frame()), Ok(None));
    }

    /// The clock is what it was set to.
    #[test]
    fn the_clock_is_set() {
        let machine = Machine::new();
        assert_eq!(machine.now(), 0);
        machine.set_clock(5_000);
        assert_eq!(machine.now(), 5_000);
    }

    // --- guest memory, spec 3.1.2 ---------------------------------------------------------------

    /// Only a PV domain's addresses are judged beforehand, and only by where they start.
    #[test]
    fn plausible_addresses() {
        let pair = Pair::new(DomainKind::Hvm, DomainKind::Pv);
        for (addr, plausible) in [
            (0, true),
            (0x7FFF_FFFF_FFFF, true),
            (0x8000_0000_0000, false),
            (0xFFFF_8000_0000_0000, false),
            (0xFFFF_87FF_FFFF_FFFF, false),
            (0xFFFF_8800_0000_0000, true),
        ] {
            assert_eq!(pair.c.plausible(addr, u64::MAX), plausible, "{addr:#x}");
            assert!(pair.g.plausible(addr, u64::MAX));
        }
    }

    /// A PV domain's addresses go through its page tables, page by page, all or nothing.
    #[test]
    fn pv_memory_goes_through_page_tables() {
        let pair = Pair::pv();
        let page = pair.c.add_memory(X, 1).unwrap()[0];
        let fault = |addr| Err(Fault { addr });
        assert_eq!(pair.c.write(Y - 2, b"abcd"), fault(Y), "half of it is not there");
        let mut bytes = [1; 2];
        pair.c.read(Y - 2, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 2], "so nothing was written");
        assert!(pair.c.map(Y, page.gfn, Access::Read));
        pair.c.read(Y - 2, &mut [0; 4]).unwrap();
        assert_eq!(pair.c.write(Y, b"a"), fault(Y));
        assert_eq!(
            pair.c.read(0xFFFF_8000_0000_0000, &mut [0]),
            fault(0xFFFF_8000_0000_0000)
        );
        pair.c.read(u64::MAX, &mut [0; 0]).unwrap();
    }

    /// A translated domain's addresses are guest physical ones unless its own page tables say
    /// otherwise; the physmap has the last word.
    #[test]
    fn translated_memory_goes_through_the_physmap() {
        let pair = Pair::new(DomainKind::Pv, DomainKind::Hvm);
        let own = pair.c.add_page().unwrap();
        let addr = own.gfn.address();
        pair.c.write(addr, b"abcd").unwrap();
        assert_eq!(pair.machine.page(own.mfn).unwrap().read_bytes(0), Some(*b"abcd"));
        let at = |entry, access| {
            assert!(pair.c.set_physmap(Gfn::containing(X), entry));
            match access {
                Access::Read => pair.c.read(X, &mut [0; 4]).is_ok(),
                Access::Write => pair.c.write(X, b"wxyz").is_ok(),
            }
        };
        let mfn = pair.page.mfn;
        let holds = || pair.machine.page(mfn).unwrap().read_bytes::<4>(0).unwrap();
        assert!(!at(None, Access::Read));
        assert!(!at(Some(P2mEntry::DirectMmio(mfn)), Access::Read));
        assert!(!at(Some(P2mEntry::PagedOut { requested: false }), Access::Read));
        assert!(
            at(Some(P2mEntry::ReadOnlyRam(mfn)), Access::Write),
            "dropped without a word"
        );
        assert!(
            at(Some(P2mEntry::Ioreq(mfn)), Access::Write),
            "the device model's"
        );
        assert!(at(Some(P2mEntry::Grant(mfn, Access::Read)), Access::Read));
        assert!(!at(Some(P2mEntry::Grant(mfn, Access::Read)), Access::Write));
        assert_eq!(holds(), [0; 4]);
        assert!(at(Some(P2mEntry::Grant(mfn, Access::Write)), Access::Write));
        assert_eq!(holds(), *b"wxyz");
        assert!(at(Some(P2mEntry::PopulateOnDemand), Access::Write));

        assert!(pair.c.map(addr, own.gfn, Access::Read));
        assert_eq!(
            pair.c.write(addr, b"a"),
            Err(Fault { addr }),
            "read-only by its own tables"
        );
        pair.c.unmap(addr);
        assert_eq!(pair.c.read(addr, &mut [0]), Err(Fault { addr }));
    }

    // --- audits ---------------------------------------------------------------------------------

    fn kinds(machine: &Machine) -> Vec<Audit> {
        machine.audit().iter().map(|violation| violation.audit).collect()
    }

    /// AUD-REF: a reference dropped twice, and one too few.
    #[test]
    fn audit_sees_wrong_references() {
        let pair = Pair::pv();
        pair.machine.put_writable(pair.page.mfn);
        assert_eq!(kinds(&pair.machine), [Audit::References]);
        let pair = Pair::pv();
        pair.map(X, RW).unwrap();
        pair.machine.put_frame(pair.page.mfn);
        assert_eq!(kinds(&pair.machine), [Audit::References]);
        let pair = Pair::pv();
        assert!(pair.machine.get_frame(pair.page.mfn).is_some());
        assert_eq!(kinds(&pair.machine), [], "somebody may hold it");
        assert_eq!(pair.machine.audit_idle().len(), 1, "but not when all is idle");
        let machine = Machine::new();
        machine.put_frame(Mfn(5));
        assert_eq!(kinds(&machine), [Audit::References]);
    }

    /// AUD-MEM: a write through an old path to a page that is free, and a page that is freed while
    /// a stale translation can reach it.
    #[test]
    fn audit_sees_use_after_free() {
        let pair = Pair::pv();
        let words = pair.machine.page(pair.page.mfn).unwrap();
        pair.g.give_up(pair.page.mfn);
        assert_eq!(kinds(&pair.machine), []);
        assert!(words.write(100, &[1]));
        assert_eq!(kinds(&pair.machine), [Audit::Memory]);

        let pair = Pair::pv();
        pair.map(X, RO).unwrap();
        let unmapping = HostUnmapping {
            addr: X,
            new_addr: 0,
            mfn: pair.page.mfn,
            flags: RO,
        };
        pair.machine.unmap_host(&pair.c, &unmapping).unwrap();
        pair.machine.put_frame(pair.page.mfn);
        pair.g.give_up(pair.page.mfn);
        assert_eq!(kinds(&pair.machine), [Audit::Memory], "nobody flushed");

        let pair = Pair::pv();
        let free = pair.c.add_page().unwrap().mfn;
        pair.c.give_up(free);
        pair.machine.copy((free, 0), (pair.page.mfn, 0), 1);
        assert_eq!(kinds(&pair.machine), [Audit::Memory]);
    }

    /// AUD-P2M: a frame at two places, a frame of somebody else, a mapping of nothing.
    #[test]
    fn audit_sees_wrong_physmaps() {
        let pair = Pair::new(DomainKind::Pv, DomainKind::Hvm);
        let own = pair.c.add_page().unwrap().mfn;
        assert!(pair.c.set_physmap(Gfn(0x900), Some(P2mEntry::Ram(own))));
        assert_eq!(kinds(&pair.machine), [Audit::Physmap]);
        assert!(pair.c.set_physmap(Gfn(0x900), Some(P2mEntry::Ram(pair.page.mfn))));
        assert_eq!(kinds(&pair.machine), [Audit::Physmap]);
        let gone = P2mEntry::Grant(Mfn(0x77_7777), Access::Read);
        assert!(pair.c.set_physmap(Gfn(0x900), Some(gone)));
        assert_eq!(kinds(&pair.machine), [Audit::Physmap]);
    }

    /// AUD-IOM, AUD-REF: devices that reach the domain's own page, one that nobody holds for them,
    /// or a free one, by grant.
    #[test]
    fn audit_sees_wrong_iommu_entries() {
        let pair = Pair::pv();
        pair.c.set_iommu(true);
        let own = pair.c.add_page().unwrap().mfn;
        pair.machine.iommu_set(&pair.c, own, Some(Access::Read)).unwrap();
        assert_eq!(kinds(&pair.machine), [Audit::References, Audit::Iommu]);
        pair.machine.iommu_set(&pair.c, own, None).unwrap();
        let mfn = pair.page.mfn;
        pair.machine.iommu_set(&pair.c, mfn, Some(Access::Read)).unwrap();
        assert_eq!(kinds(&pair.machine), [Audit::References]);
        pair.machine.get_frame(mfn).unwrap();
        assert_eq!(kinds(&pair.machine), []);
        pair.machine.put_frame(mfn);
        pair.g.give_up(mfn);
        assert_eq!(kinds(&pair.machine), [Audit::Iommu]);
    }

    /// A domain number can be used again once the domain is gone, and not before.
    #[test]
    fn numbers_are_unique_while_in_use() {
        let machine = Machine::new();
        let first = machine.add_domain(G, DomainKind::Pv).unwrap();
        assert!(machine.add_domain(G, DomainKind::Hvm).is_err());
        drop(first);
        assert!(machine.add_domain(G, DomainKind::Hvm).is_ok());
    }
}
