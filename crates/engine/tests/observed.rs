//! What those who look on are told: `dump_table`, the view of a domain. By name of the rule that each test protects.

#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use gnttab_abi::{
        CacheFlush, CacheOp, DomId, GrantRef, GrantStatus, MapFlags, MapGrantRef, Op, UnmapGrantRef,
    };
    use gnttab_engine::machine::Machine;
    use gnttab_engine::{Config, DomainKind, Engine, Limits, Vcpu};

    /// Entries of d1's table that the tests write: flags and grantee.
    const ENTRIES: [(u32, u16, u16); 6] = [
        (8, 0x0001, 2),
        (9, 0x0101, 2),
        (10, 0x0003, 2),
        (11, 0x0002, 2),
        (12, 0x0005, 3),
        (13, 0x0001, 2),
    ];

    #[test]
    fn what_dump_table_answers() {
        for kind in [DomainKind::Pv, DomainKind::Arm] {
            for version in [1, 2] {
                let machine = Machine::new();
                let engine = Engine::new(machine.clone(), Config::default());
                let [granter, grantee] = [1, 2].map(|id| {
                    let guest = machine.add_domain(DomId(id), kind).unwrap();
                    engine
                        .create_domain(DomId(id), kind, Limits::default(), guest)
                        .unwrap()
                });
                granter.private().set_control(true);
                let frame = granter.private().add_page().unwrap().gfn.0;
                let vcpu = Vcpu::take(&granter, 0).unwrap();
                let caller = Vcpu::take(&grantee, 0).unwrap();
                let mut cpu = engine.any_processor().unwrap();
                cpu.set_version(&vcpu, version).unwrap();
                let page = machine.page(granter.shared_frame(0).unwrap().mfn()).unwrap();
                let (size, at) = if version == 1 { (8, 4) } else { (16, 8) };
                for (gref, flags, domid) in ENTRIES {
                    let start = gref as usize * size;
                    assert!(page.write(start, &flags.to_le_bytes()));
                    assert!(page.write(start + 2, &domid.to_le_bytes()));
                    assert!(page.write(start + at, &frame.to_le_bytes()[..4]));
                }
                if kind == DomainKind::Arm {
                    let mut item = MapGrantRef {
                        host_addr: 0x4000_0000,
                        flags: MapFlags::HOST_MAP | MapFlags::READONLY,
                        gref: GrantRef(13),
                        dom: DomId(1),
                        ..MapGrantRef::default()
                    };
                    cpu.map(&caller, std::slice::from_mut(&mut item));
                    assert!(item.status.is_okay(), "{}", item.status);
                    // In use, though withdrawn: still told of.
                    assert!(page.write(13 * size, &[0, 0]));
                }

                let text = cpu.dump_table(&vcpu, DomId::SELF).unwrap();
                assert_eq!(cpu.dump_table(&vcpu, DomId(1)).as_ref(), Ok(&text), "by number");
                assert_eq!(cpu.dump(DomId(1)).as_ref(), Some(&text));
                assert!(text.starts_with(&format!("d1: version {version}, ")), "{text}");
                let told: Vec<&str> = text
                    .lines()
                    .skip(2)
                    .filter_map(|line| line.split_whitespace().next())
                    .collect();
                assert_eq!(
                    told,
                    ["0x8", "0x9", "0xa", "0xb", "0xc", "0xd"],
                    "entries in use, no free ones"
                );
                // One that looks at another's table needs the right to.
                let denied = Err(GrantStatus::PERMISSION_DENIED);
                assert_eq!(cpu.dump_table(&caller, DomId(1)), denied);
                assert_eq!(cpu.dump_table(&caller, DomId(9)), Err(GrantStatus::BAD_DOMAIN));
                let other = cpu.dump_table(&vcpu, DomId(2)).unwrap();
                assert!(other.starts_with("d2: ") && other.lines().count() == 2, "{other}");
                assert_eq!(cpu.dump(DomId(9)), None);

                let counts = cpu.observe(DomId(1)).unwrap().entries;
                let in_use = u32::from(kind == DomainKind::Arm);
                assert_eq!(counts.in_use, in_use);
                assert_eq!(counts.accept_transfer, 1);
                let (whole, parts, far) = if version == 1 { (4, 0, 0) } else { (3, 1, 1) };
                assert_eq!(
                    counts.permit_access + counts.sub_page,
                    whole + parts - in_use,
                    "{counts:?}"
                );
                assert!(
                    version == 1 || (counts.sub_page, counts.transitive) == (parts, far),
                    "{counts:?}"
                );
                let total = 512 / version;
                let live =
                    counts.permit_access + counts.sub_page + counts.accept_transfer + counts.transitive;
                let strange = u32::from(version == 1);
                assert!(
                    (total - live - strange..=total - live).contains(&counts.invalid),
                    "{counts:?}"
                );
            }
        }
    }

    /// Every call is counted once, by its operation and by its answer, and what it left is told.
    #[test]
    fn what_a_domain_did_and_was_answered() {
        let machine = Machine::new();
        let engine = Engine::new(machine.clone(), Config::default());
        let [granter, grantee] = [1, 2].map(|id| {
            let guest = machine.add_domain(DomId(id), DomainKind::Arm).unwrap();
            let limits = Limits {
                maptrack_frames: Some(2),
                vcpus: 2,
                ..Limits::default()
            };
            engine
                .create_domain(DomId(id), DomainKind::Arm, limits, guest)
                .unwrap()
        });
        let own = grantee.private().add_page().unwrap();
        let frame = granter.private().add_page().unwrap();
        let page = machine.page(granter.shared_frame(0).unwrap().mfn()).unwrap();
        for gref in [8, 9] {
            assert!(page.write(gref * 8, &[1, 0, 2, 0]));
            assert!(page.write(gref * 8 + 4, &frame.gfn.0.to_le_bytes()[..4]));
        }
        let mut cpu = engine.any_processor().unwrap();
        let vcpus = [0, 1].map(|number| Vcpu::take(&grantee, number).unwrap());
        let mut maps: Vec<MapGrantRef> = [(8, 0), (8, 1), (9, 2), (5000, 3)]
            .into_iter()
            .map(|(gref, place)| MapGrantRef {
                host_addr: 0x4000_0000 + place * 4096,
                flags: MapFlags::HOST_MAP | MapFlags::READONLY,
                gref: GrantRef(gref),
                dom: DomId(1),
                ..MapGrantRef::default()
            })
            .collect();
        let (first, second) = maps.split_at_mut(1);
        cpu.map(&vcpus[0], first);
        cpu.map(&vcpus[1], second);
        let mut unmap = UnmapGrantRef {
            host_addr: maps[0].host_addr,
            handle: maps[0].handle,
            ..UnmapGrantRef::default()
        };
        for expected in [GrantStatus::OKAY, GrantStatus::BAD_HANDLE] {
            cpu.unmap(&vcpus[1], std::slice::from_mut(&mut unmap));
            assert_eq!(unmap.status, expected);
        }
        assert!(cpu.query_size(&vcpus[0], DomId(9)).is_err());
        let flush = CacheFlush {
            length: 64,
            op: CacheOp::CLEAN,
            dev_bus_addr: own.mfn.address(),
            ..CacheFlush::default()
        };
        assert_eq!(cpu.cache_flush(&vcpus[0], &[flush, flush]), Ok(()));

        let view = cpu.observe(DomId(2)).unwrap();
        let done: Vec<(Op, u64)> = view
            .operations
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect();
        let expected = [
            (Op::MapGrantRef, 4),
            (Op::UnmapGrantRef, 2),
            (Op::QuerySize, 1),
            (Op::CacheFlush, 2),
        ];
        assert_eq!(done, expected);
        let mut told: Vec<(i16, u64)> = view
            .statuses
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(status, count)| (status.0, count))
            .collect();
        told.sort_unstable();
        let mut expected = [
            (GrantStatus::OKAY, 4),
            (GrantStatus::BAD_GNTREF, 1),
            (GrantStatus::BAD_HANDLE, 1),
            (GrantStatus::BAD_DOMAIN, 1),
        ]
        .map(|(status, count)| (status.0, count));
        expected.sort_unstable();
        assert_eq!(told, expected);
        assert_eq!((view.maps, view.pinned_by), ([(DomId(1), 2)].into(), [].into()));
        assert_eq!((view.max_handles, view.dying), (512, false));
        let view = cpu.observe(DomId(1)).unwrap();
        assert_eq!((view.maps, view.pinned_by), ([].into(), [(DomId(2), 2)].into()));
        assert_eq!((view.entries.in_use, view.entries.withdrawn), (2, 0));
        assert!(page.write(8 * 8, &[0, 0]));
        assert_eq!(cpu.observe(DomId(1)).unwrap().entries.withdrawn, 1);
    }
}
