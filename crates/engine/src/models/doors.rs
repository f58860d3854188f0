//! Whole operations through the typed door, on a machine of two or three domains.
//!
//! What a model of one protocol cannot see is how operations put protocols together. Some of these
//! models are too large for every order, and say how often they let a thread be made to wait.

use alloc::sync::Arc;
use alloc::vec::Vec;

use gnttab_abi::{
    Copy, CopyFlags, CopyPtr, DomId, EntryFlags, Errno, GrantHandle, GrantRef, GrantStatus, MapFlags,
    MapGrantRef, Mfn, SwapGrantRef, Transfer, UnmapGrantRef,
};
use loom::thread;

use super::granter::{Content, Entry as Granted, OfferOutcome, Outcome};
use super::house::{Home, House};
use super::watched::Watched;
use super::{every_order, up_to_preemptions};
use crate::active::PinCounts;
use crate::domain::{Config, Domain, Limits, Vcpu, Version};
use crate::engine::{Engine, Processor};
use crate::hypervisor::DomainKind;
use crate::pages::{STATUS_PER_PAGE, status_pages_for};
use crate::table::entries_per_page;
use crate::teardown::{Release, Retired};

/// The granter, the grantee, and who stands behind a transitive grant.
const G: DomId = DomId(1);
const C: DomId = DomId(2);
const T: DomId = DomId(3);
/// The reference that is at stake: the first that a change of version does not carry over.
const GREF: GrantRef = GrantRef(1);
const OTHER: GrantRef = GrantRef(2);
/// Pages: two of G's, one of T's, one of C's.
const PAGES: [Mfn; 4] = [Mfn(0), Mfn(1), Mfn(2), Mfn(3)];

const RO: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);
const RW: MapFlags = MapFlags::HOST_MAP;

struct World {
    engine: Engine<House>,
    /// The life of G, apart from G.
    life: Arc<Watched>,
}

type Dom = Arc<Domain<House>>;

impl World {
    /// G, with a table of as many frames as the version needs to have [`GREF`] and [`OTHER`], and C.
    fn new(version: Version) -> Arc<World> {
        World::where_bytes_move(false, version)
    }

    /// The same where bytes are moved inside a table, or outside.
    fn where_bytes_move(inside: bool, version: Version) -> Arc<World> {
        let config = Config {
            processors: 3,
            ..Config::default()
        };
        let house = House::where_bytes_move(inside);
        for (mfn, owner) in PAGES.into_iter().zip([G, G, T, C]) {
            house.give(mfn, owner);
        }
        let world = World {
            engine: Engine::new(house, config),
            life: Arc::default(),
        };
        world.create(G, Arc::clone(&world.life));
        world.create(C, Arc::default());
        if version == Version::V2 {
            world.to_v2(G);
        }
        Arc::new(world)
    }

    fn create(&self, id: DomId, life: Arc<Watched>) {
        let limits = Limits {
            grant_frames: Some(2),
            maptrack_frames: Some(1),
            vcpus: 2,
            ..Limits::default()
        };
        let made = self
            .engine
            .create_domain(id, DomainKind::Pv, limits, Home::new(id, life));
        assert!(made.is_ok());
    }

    fn to_v2(&self, id: DomId) {
        self.act(0, id, 0, |cpu, vcpu| assert_eq!(cpu.set_version(vcpu, 2), Ok(())));
    }

    fn domain(&self, id: DomId) -> Dom {
        self.engine.domain(id).expect("it is there")
    }

    /// Acts as a vCPU of a domain, on a processor of its own.
    fn act<R>(
        &self,
        processor: usize,
        id: DomId,
        number: usize,
        work: impl FnOnce(&mut Processor<'_, House>, &Vcpu<House>) -> R,
    ) -> R {
        let mut cpu = self.engine.processor(processor).expect("nobody else is it");
        let vcpu = Vcpu::take(&self.domain(id), number).expect("nobody else is it");
        work(&mut cpu, &vcpu)
    }

    fn house(&self) -> &House {
        self.engine.hypervisor()
    }

    /// What G's driver does with the words of an entry.
    fn guest<R>(&self, id: DomId, gref: GrantRef, work: impl FnOnce(&Granted<'_>) -> R) -> R {
        let domain = self.domain(id);
        let version = domain.version();
        let (index, per_page) = (gref.0 as usize, entries_per_page(version) as usize);
        let frame = u32::try_from(index / per_page).unwrap();
        let page = domain.shared_frame(frame).expect("the frame is there");
        let slot = index % per_page;
        let status = domain.status_frame(gref.0 / STATUS_PER_PAGE);
        let entry = match (version, status) {
            (Version::V2, Some(status)) => Granted::V2 {
                head: page.u32(slot * 4),
                halves: page.u32(slot * 4 + 1),
                frame: page.v2_frame(slot),
                status: status.u16(index % STATUS_PER_PAGE as usize),
            },
            _ => Granted::V1 {
                head: page.u32(slot * 2),
                frame: page.u32(slot * 2 + 1),
            },
        };
        work(&entry)
    }

    fn write(&self, id: DomId, gref: GrantRef, content: Content) {
        self.guest(id, gref, |entry| entry.publish(&content).unwrap());
    }

    fn grant(&self, id: DomId, gref: GrantRef, to: DomId, mfn: Mfn) {
        self.write(
            id,
            gref,
            Content {
                flags: EntryFlags::PERMIT_ACCESS,
                domid: to,
                halves: (0, 0),
                frame: mfn.0,
            },
        );
    }

    /// Nothing of what was done is left.
    fn check_idle(&self) {
        self.house().check_idle();
        let mut cpu = self.engine.processor(0).expect("nobody else is it");
        for id in self.engine.domains() {
            for gref in (0..).map(GrantRef) {
                let Some(entry) = cpu.entry(id, gref) else { break };
                assert_eq!(entry.pins, PinCounts::default(), "{id} {gref} is pinned");
                let marks = entry.words.flags() & EntryFlags::IN_USE;
                assert!(
                    marks.is_empty() || entry.words.flags().bits() & 3 == 2,
                    "{id} {gref} is marked"
                );
            }
            let domain = self.domain(id);
            assert_eq!(domain.table.v2_ops.load(crate::sync::Ordering::SeqCst), 0);
            assert_eq!(domain.mappings().count(), 0);
        }
    }
}

fn map(cpu: &mut Processor<'_, House>, vcpu: &Vcpu<House>, gref: GrantRef, flags: MapFlags) -> MapGrantRef {
    let mut item = MapGrantRef {
        host_addr: 0x1000 * (vcpu.number as u64 + 1),
        flags,
        gref,
        dom: G,
        ..MapGrantRef::default()
    };
    cpu.map(vcpu, core::slice::from_mut(&mut item));
    item
}

fn unmap(
    cpu: &mut Processor<'_, House>,
    vcpu: &Vcpu<House>,
    host_addr: u64,
    handle: GrantHandle,
) -> GrantStatus {
    let mut item = UnmapGrantRef {
        host_addr,
        handle,
        ..UnmapGrantRef::default()
    };
    cpu.unmap(vcpu, core::slice::from_mut(&mut item));
    item.status
}

/// C maps, uses the page and unmaps; the result is the map's status.
fn session(world: &World, number: usize, gref: GrantRef, flags: MapFlags) -> GrantStatus {
    world.act(number + 1, C, number, |cpu, vcpu| {
        let mapped = map(cpu, vcpu, gref, flags);
        if mapped.status.is_okay() {
            world.house().touch(Mfn(mapped.dev_bus_addr >> 12));
            let done = unmap(cpu, vcpu, mapped.host_addr, mapped.handle);
            assert_eq!(done, GrantStatus::OKAY, "a live mapping can be unmapped");
        }
        mapped.status
    })
}

/// A mapping that C has.
fn mapped(world: &World, flags: MapFlags) -> MapGrantRef {
    let mapped = world.act(1, C, 0, |cpu, vcpu| map(cpu, vcpu, GREF, flags));
    assert_eq!(mapped.status, GrantStatus::OKAY);
    mapped
}

/// Two sessions of one grantee on one reference: maps, unmaps and all they are made of, handles
/// included. Every reference, type, pin, mark and handle is given back once.
#[test]
fn sessions_of_two_processors() {
    for version in [Version::V1, Version::V2] {
        up_to_preemptions(2, move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || session(&other, 0, GREF, RW));
            assert_eq!(session(&world, 1, GREF, RO), GrantStatus::OKAY);
            assert_eq!(thread.join().unwrap(), GrantStatus::OKAY);
            world.check_idle();
        });
    }
}

/// Two unmaps of one handle: one does it, the other is told that the handle is bad; references and
/// pins go once (HND-1, spec 8.2 item 8).
#[test]
fn unmap_against_unmap() {
    every_order(|| {
        let world = World::new(Version::V1);
        world.grant(G, GREF, C, PAGES[0]);
        let item = mapped(&world, RW);
        let other = Arc::clone(&world);
        let again = move |world: &World, number| {
            world.act(number + 1, C, number, |cpu, vcpu| {
                unmap(cpu, vcpu, item.host_addr, item.handle)
            })
        };
        let thread = thread::spawn(move || again(&other, 0));
        let first = again(&world, 1);
        let second = thread.join().unwrap();
        let (won, lost) = if first.is_okay() {
            (first, second)
        } else {
            (second, first)
        };
        assert_eq!((won, lost), (GrantStatus::OKAY, GrantStatus::BAD_HANDLE));
        world.check_idle();
    });
}

/// The last unmap of a reference against a first map of it by the same grantee: the mark and the
/// frame of the new use outlive the old one (spec 8.3).
#[test]
fn first_map_against_last_unmap() {
    for version in [Version::V1, Version::V2] {
        every_order(move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let item = mapped(&world, RW);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || {
                other.act(1, C, 0, |cpu, vcpu| unmap(cpu, vcpu, item.host_addr, item.handle))
            });
            let again = world.act(2, C, 1, |cpu, vcpu| map(cpu, vcpu, GREF, RW));
            assert_eq!(again.status, GrantStatus::OKAY);
            assert_eq!(thread.join().unwrap(), GrantStatus::OKAY);
            let entry = world.act(1, C, 0, |cpu, _| cpu.entry(G, GREF)).unwrap();
            assert_eq!(entry.pins.host_write, 1);
            assert!(entry.words.flags().contains(EntryFlags::IN_USE), "PIN-2");
            assert_eq!(world.house().references(PAGES[0]), 1);
        });
    }
}

/// Sessions against the granter ending access and giving the reference to another page: what is
/// mapped is never what the granter has back.
#[test]
fn session_against_end_of_access() {
    for version in [Version::V1, Version::V2] {
        every_order(move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || session(&other, 0, GREF, RW));
            if world.guest(G, GREF, |entry| entry.end()) == Outcome::Done {
                world.house().take_back(PAGES[0]);
                world.grant(G, GREF, C, PAGES[1]);
            }
            let _ = thread.join().unwrap();
            world.check_idle();
        });
    }
}

/// A session against a change of version: the version does not change while the reference is mapped
/// or being mapped, and after the change the old layout means nothing.
#[test]
fn session_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        up_to_preemptions(3, move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || session(&other, 0, GREF, RW));
            let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
            let status = thread.join().unwrap();
            match changed {
                Ok(()) => assert_eq!(world.domain(G).version().number(), wanted),
                Err(errno) => {
                    assert_eq!((errno, status), (Errno::Busy, GrantStatus::OKAY));
                    assert_eq!(world.domain(G).version(), version);
                }
            }
            world.check_idle();
        });
    }
}

/// A map that lasts, against a change of version: one of the two is refused (VER-1).
#[test]
fn map_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        every_order(move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.act(1, C, 0, |cpu, vcpu| map(cpu, vcpu, GREF, RO)));
            let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
            let item = thread.join().unwrap();
            assert!(item.status.is_okay() != changed.is_ok(), "one of the two");
            if item.status.is_okay() {
                let entry = world.act(1, C, 0, |cpu, _| cpu.entry(G, GREF)).unwrap();
                assert!(entry.words.flags().contains(EntryFlags::READING), "PIN-2");
            }
        });
    }
}

/// An unmap against a change of version: the unmap works in the version that it finds, and what it
/// clears it clears where the mark is.
#[test]
fn unmap_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        every_order(move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let item = mapped(&world, RW);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || {
                other.act(1, C, 0, |cpu, vcpu| unmap(cpu, vcpu, item.host_addr, item.handle))
            });
            let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
            assert!(matches!(changed, Ok(()) | Err(Errno::Busy)));
            assert_eq!(thread.join().unwrap(), GrantStatus::OKAY);
            world.check_idle();
        });
    }
}

/// Growth against a change of version: afterwards the table has its frames, and status frames for all
/// of them or for none (spec 2.6).
#[test]
fn growth_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        every_order(move || {
            let world = World::new(version);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || {
                other.act(1, G, 1, |cpu, vcpu| {
                    cpu.setup_table(vcpu, DomId::SELF, 2, None, &mut |_, _| true)
                })
            });
            let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
            assert_eq!((thread.join().unwrap(), changed), (GrantStatus::OKAY, Ok(())));
            let status = if wanted == 2 { status_pages_for(2) } else { 0 };
            let domain = world.domain(G);
            assert_eq!(domain.frames(), (2, status));
            assert!((0..2).all(|index| domain.shared_frame(index).is_some()));
            assert!((0..status).all(|index| domain.status_frame(index).is_some()));
        });
    }
}

/// A map of a reference in a frame that is being added: it is past the table, or there whole.
#[test]
fn map_against_growth() {
    for version in [Version::V1, Version::V2] {
        every_order(move || {
            let world = World::new(version);
            let gref = GrantRef(entries_per_page(version));
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || session(&other, 0, gref, RW));
            let grown = world.act(2, G, 0, |cpu, vcpu| {
                cpu.setup_table(vcpu, DomId::SELF, 2, None, &mut |_, _| true)
            });
            assert_eq!(grown, GrantStatus::OKAY);
            world.house().take_back(PAGES[0]);
            world.grant(G, gref, C, PAGES[0]);
            let _ = thread.join().unwrap();
            assert_eq!(session(&world, 0, gref, RW), GrantStatus::OKAY);
            world.check_idle();
        });
    }
}

/// G swaps the two references.
fn swap(world: &World, number: usize) -> GrantStatus {
    world.act(2 - number, G, number, |cpu, vcpu| {
        let mut item = SwapGrantRef {
            ref_a: GREF,
            ref_b: OTHER,
            ..SwapGrantRef::default()
        };
        cpu.swap(vcpu, core::slice::from_mut(&mut item));
        item.status
    })
}

/// A swap against a change of version: both are done, one after the other, and nothing of the old layout
/// is found in the new one.
#[test]
fn swap_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        every_order(move || {
            let world = World::new(version);
            world.grant(G, GREF, C, PAGES[0]);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || swap(&other, 1));
            let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
            // A table of version 2 has half as many entries.
            let statuses = [GrantStatus::OKAY, GrantStatus::BAD_GNTREF];
            assert!(statuses.contains(&thread.join().unwrap()));
            assert_eq!(changed, Ok(()));
            for gref in [GREF, OTHER] {
                let entry = world.act(2, G, 0, |cpu, _| cpu.entry(G, gref));
                assert!(entry.is_none_or(|entry| entry.words.flags().is_empty()));
            }
        });
    }
}

/// A map against a swap of its reference with another: the map gets the page of the entry that it
/// found, marks go with nobody, and an entry in use is not moved.
#[test]
fn session_against_swap() {
    up_to_preemptions(3, || {
        let world = World::new(Version::V1);
        world.grant(G, GREF, C, PAGES[0]);
        world.grant(G, OTHER, T, PAGES[1]);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || session(&other, 0, GREF, RW));
        let swapped = swap(&world, 0);
        let status = thread.join().unwrap();
        if swapped.is_okay() {
            assert!([GrantStatus::OKAY, GrantStatus::GENERAL_ERROR].contains(&status));
        } else {
            assert_eq!((swapped, status), (GrantStatus::EAGAIN, GrantStatus::OKAY));
        }
        world.check_idle();
    });
}

/// What a toolstack does with a dead domain.
fn bury(world: &World, domain: &Dom) -> Retired {
    world.engine.begin_teardown(domain);
    world.engine.retire(domain.id())
}

/// A map in flight against the death of its granter: who was told that the granter is gone finds
/// nobody inside its table any more, and nothing of it mapped; it goes with the last use, exactly then.
#[test]
fn session_against_death_of_the_granter() {
    up_to_preemptions(3, || {
        let world = World::new(Version::V1);
        world.grant(G, GREF, C, PAGES[0]);
        let domain = world.domain(G);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || session(&other, 0, GREF, RW));
        if bury(&world, &domain) == Retired::Gone {
            world.life.had_alone();
            world.house().take_back(PAGES[0]);
        }
        drop(domain);
        let _ = thread.join().unwrap();
        assert!(
            world.engine.domain(G).is_none(),
            "TDN: the dead go with the last use"
        );
        assert_eq!(Arc::strong_count(&world.life), 1, "and their memory with them");
        world.house().check_idle();
    });
}

/// The last unmap against the removal of its dead granter: one of the two lets it go.
#[test]
fn last_unmap_against_retirement() {
    up_to_preemptions(3, || {
        let world = World::new(Version::V1);
        world.grant(G, GREF, C, PAGES[0]);
        let item = mapped(&world, RW);
        let domain = world.domain(G);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || {
            other.act(1, C, 0, |cpu, vcpu| unmap(cpu, vcpu, item.host_addr, item.handle))
        });
        if bury(&world, &domain) == Retired::Gone {
            world.life.had_alone();
        }
        drop(domain);
        assert_eq!(thread.join().unwrap(), GrantStatus::OKAY);
        assert!(
            world.engine.domain(G).is_none(),
            "TDN: the dead go with the last use"
        );
        world.house().check_idle();
    });
}

/// The release of a dead grantee's mappings against the removal of its dead granter: both go.
#[test]
fn both_die() {
    up_to_preemptions(3, || {
        let world = World::new(Version::V1);
        world.grant(G, GREF, C, PAGES[0]);
        let _ = mapped(&world, RO);
        let (granter, grantee) = (world.domain(G), world.domain(C));
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || {
            other.engine.begin_teardown(&grantee);
            let mut cpu = other.engine.processor(1).expect("nobody else is it");
            let vcpus: Vec<_> = (0..2).filter_map(|number| Vcpu::take(&grantee, number)).collect();
            let released = cpu.release_mappings(&vcpus, u32::MAX);
            assert_eq!(released, Release::Done { released: 1 });
            assert_eq!(other.engine.retire(C), Retired::Gone);
        });
        let _ = bury(&world, &granter);
        drop(granter);
        thread.join().unwrap();
        assert_eq!(world.engine.domains().next(), None);
        assert_eq!(Arc::strong_count(&world.life), 1);
    });
}

fn copy(world: &World, number: usize) -> GrantStatus {
    world.act(number + 1, C, number, |cpu, vcpu| {
        let mut item = Copy {
            source: CopyPtr::grant(G, GREF, 0),
            dest: CopyPtr::frame(PAGES[3].0, 0),
            len: 8,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        cpu.copy(vcpu, core::slice::from_mut(&mut item));
        item.status
    })
}

/// A copy against a session of the same reference, to write: copies pin and mark as maps do.
#[test]
fn copy_against_session() {
    for version in [Version::V1, Version::V2] {
        a_copy_against_a_session(false, version);
    }
}

/// The same where bytes move inside the table, and the copy holds the entry instead.
#[test]
fn copy_inside_against_session() {
    for version in [Version::V1, Version::V2] {
        a_copy_against_a_session(true, version);
    }
}

fn a_copy_against_a_session(inside: bool, version: Version) {
    up_to_preemptions(3, move || {
        let world = World::where_bytes_move(inside, version);
        world.grant(G, GREF, C, PAGES[0]);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || session(&other, 0, GREF, RW));
        assert_eq!(copy(&world, 1), GrantStatus::OKAY);
        assert_eq!(thread.join().unwrap(), GrantStatus::OKAY);
        world.check_idle();
    });
}

/// A copy inside the table against the granter ending access and giving the reference to another page: what is
/// read is never what the granter has back.
#[test]
fn copy_inside_against_end_of_access() {
    for version in [Version::V1, Version::V2] {
        every_order(move || {
            let world = World::where_bytes_move(true, version);
            world.grant(G, GREF, C, PAGES[0]);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || copy(&other, 0));
            if world.guest(G, GREF, |entry| entry.end()) == Outcome::Done {
                world.house().take_back(PAGES[0]);
                world.grant(G, GREF, C, PAGES[1]);
            }
            let _ = thread.join().unwrap();
            world.check_idle();
        });
    }
}

/// A copy against a change of version: the version does not change while the copy holds the page, and
/// what comes later finds nothing granted.
#[test]
fn copy_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        a_copy_against_a_change_of_version(false, version, wanted);
    }
}

/// The same where bytes move inside the table.
#[test]
fn copy_inside_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        a_copy_against_a_change_of_version(true, version, wanted);
    }
}

fn a_copy_against_a_change_of_version(inside: bool, version: Version, wanted: u32) {
    up_to_preemptions(3, move || {
        let world = World::where_bytes_move(inside, version);
        world.grant(G, GREF, C, PAGES[0]);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || copy(&other, 0));
        let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
        let status = thread.join().unwrap();
        match changed {
            Ok(()) => assert_eq!(world.domain(G).version().number(), wanted),
            Err(errno) => assert_eq!((errno, status), (Errno::Busy, GrantStatus::OKAY)),
        }
        world.check_idle();
    });
}

/// G passes on to C what T granted to G.
fn transitive() -> Arc<World> {
    let world = World::new(Version::V2);
    world.create(T, Arc::default());
    world.grant(T, OTHER, G, PAGES[2]);
    let content = Content {
        flags: EntryFlags::TRANSITIVE,
        domid: C,
        halves: (T.0, 0),
        frame: u64::from(OTHER.0),
    };
    world.write(G, GREF, content);
    world
}

/// Two copies through one transitive grant: they share the use of both entries, or each has its own;
/// every pin, mark and count is given back (PIN-7, spec 2.4).
#[test]
fn copies_through_a_transitive_grant() {
    up_to_preemptions(2, || {
        let world = transitive();
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || copy(&other, 0));
        assert_eq!(copy(&world, 1), GrantStatus::OKAY);
        assert_eq!(thread.join().unwrap(), GrantStatus::OKAY);
        world.check_idle();
    });
}

/// A copy through a transitive grant against the end of the near grant, and a new one in its place:
/// when access has ended the copy is over, and never do bytes of the far page pass through a grant
/// that is another one now.
#[test]
fn transitive_copy_against_end_of_access() {
    every_order(|| {
        let world = transitive();
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || copy(&other, 0));
        if world.guest(G, GREF, |entry| entry.end()) == Outcome::Done {
            // Through this reference nobody reads the far page any more.
            world.house().take_back(PAGES[2]);
            world.grant(G, GREF, T, PAGES[0]);
        }
        let _ = thread.join().unwrap();
        world.check_idle();
    });
}

/// A copy through a transitive grant against the way back to version 1: refused while the copy needs
/// version 2 (spec 2.4), and the copy is over or never begins afterwards.
#[test]
fn transitive_copy_against_change_of_version() {
    up_to_preemptions(3, || {
        let world = transitive();
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || copy(&other, 0));
        let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, 1));
        assert!(matches!(changed, Ok(()) | Err(Errno::Again | Errno::Busy)));
        let _ = thread.join().unwrap();
        world.check_idle();
    });
}

/// G offers to take a page of C's.
fn offer(world: &World) {
    let content = Content {
        flags: EntryFlags::ACCEPT_TRANSFER,
        domid: C,
        halves: (0, 0),
        frame: 0,
    };
    world.write(G, GREF, content);
}

/// C gives it one.
fn transfer(world: &World) -> GrantStatus {
    world.act(1, C, 0, |cpu, vcpu| {
        let mut item = Transfer {
            mfn: PAGES[3].0,
            domid: G,
            gref: GREF,
            ..Transfer::default()
        };
        cpu.transfer(vcpu, core::slice::from_mut(&mut item));
        item.status
    })
}

/// A page that is given away, against a change of the receiver's version: the offer went with the old
/// layout, and what comes late writes nothing into the new one (VER-4, XSA-501).
#[test]
fn transfer_against_change_of_version() {
    for (version, wanted) in [(Version::V1, 2), (Version::V2, 1)] {
        every_order(move || {
            let world = World::new(version);
            offer(&world);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || transfer(&other));
            let changed = world.act(2, G, 0, |cpu, vcpu| cpu.set_version(vcpu, wanted));
            let status = thread.join().unwrap();
            assert_eq!(changed, Ok(()));
            assert!([GrantStatus::OKAY, GrantStatus::GENERAL_ERROR].contains(&status));
            let entry = world.act(2, G, 0, |cpu, _| cpu.entry(G, GREF)).unwrap();
            assert!(entry.words.flags().is_empty(), "{entry:?}");
        });
    }
}

/// A page that is given away, against the end of the offer that it takes: the receiver withdraws the
/// offer, or gets the page, and reads its number when it is there (TRN-6).
#[test]
fn transfer_against_end_of_the_offer() {
    for version in [Version::V1, Version::V2] {
        every_order(move || {
            let world = World::new(version);
            offer(&world);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || transfer(&other));
            let first = world.guest(G, GREF, |entry| entry.end_offer());
            let status = thread.join().unwrap();
            let last = match first {
                OfferOutcome::Committed => world.guest(G, GREF, |entry| entry.end_offer()),
                early => early,
            };
            match last {
                OfferOutcome::Withdrawn => assert_eq!(status, GrantStatus::GENERAL_ERROR),
                OfferOutcome::Received(frame) => {
                    assert_eq!((frame, status), (PAGES[3].0, GrantStatus::OKAY));
                    assert_eq!(world.house().owner(PAGES[3]), Some(G));
                }
                OfferOutcome::Committed => panic!("the page is there"),
            }
        });
    }
}
