//! What those who look on are told: `dump_table`, the view of a domain. By name of the rule that each test protects.

#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use gnttab_abi::{DomId, GrantRef, GrantStatus, MapFlags, MapGrantRef};
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
}
