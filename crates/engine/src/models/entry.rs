//! One entry of either version: its users, who come through `map`'s `pin` and `unpin`, and its
//! granter, who is the guest driver.

use alloc::sync::Arc;
use gnttab_abi::{DomId, EntryFlags, EntryHead, GrantStatus, Mfn};
use loom::thread;

use super::granter::{Content, Entry as Granted, Outcome};
use super::house::House;
use super::watched::Watched;
use super::{every_order, up_to_preemptions};
use crate::active::{Actives, Pins};
use crate::hypervisor::{Access, FrameOwner};
use crate::map::{pin, unpin};
use crate::shared::{PageWords, SharedV1, SharedV2};
use crate::sync::Ordering;
use crate::table::{Entry, SharedEntry};

const GRANTER: DomId = DomId(1);
const GRANTEE: DomId = DomId(2);
/// The frames that the entry ever names.
const FRAMES: [u64; 2] = [0, 1];

/// An entry, and the pages behind it. Who uses a page says so to the checker, which fails if its
/// owner writes it without being ordered after that use.
struct World {
    page: PageWords,
    status: PageWords,
    active: Actives<1>,
    version2: bool,
    house: House,
    frames: [Watched; FRAMES.len()],
}

impl World {
    fn new(version2: bool) -> Arc<World> {
        Arc::new(World {
            page: PageWords::zeroed(),
            status: PageWords::zeroed(),
            active: Actives::new(),
            version2,
            house: House::default(),
            frames: [Watched::default(), Watched::default()],
        })
    }

    fn granting(version2: bool) -> Arc<World> {
        let world = World::new(version2);
        world.grant(FRAMES[0]);
        world
    }

    fn entry(&self) -> Entry<'_> {
        let shared = if self.version2 {
            SharedEntry::V2(SharedV2::new(&self.page, 0, self.status.status_row(0)))
        } else {
            SharedEntry::V1(SharedV1::new(&self.page, 0))
        };
        Entry::alone(self.active.get(0), shared)
    }

    /// The same words, as the granter's driver sees them.
    fn granted(&self) -> Granted<'_> {
        let head = self.page.u32(0);
        if self.version2 {
            Granted::V2 {
                head,
                halves: self.page.u32(1),
                frame: self.page.v2_frame(0),
                status: self.status.u16(0),
            }
        } else {
            Granted::V1 {
                head,
                frame: self.page.u32(1),
            }
        }
    }

    fn grant(&self, frame: u64) {
        let content = Content {
            flags: EntryFlags::PERMIT_ACCESS,
            domid: GRANTEE,
            halves: (0, 0),
            frame,
        };
        self.granted().publish(&content).unwrap();
    }

    fn marks(&self) -> EntryFlags {
        let bits = if self.version2 {
            self.status.u16(0).load(Ordering::SeqCst)
        } else {
            EntryHead::from_word(self.page.u32(0).load(Ordering::SeqCst))
                .flags
                .bits()
        };
        EntryFlags::from_bits_retain(bits) & EntryFlags::IN_USE
    }

    fn map(&self, access: Access) -> Result<Mfn, GrantStatus> {
        let resolve = |gfn: gnttab_abi::Gfn| Ok((Mfn(gfn.0), FrameOwner::Domain(GRANTER)));
        let (mfn, _) = pin(&self.house, &self.entry(), GRANTEE, access, pins(access), resolve)?;
        Ok(mfn)
    }

    fn unmap(&self, access: Access) {
        unpin(self.entry(), self.entry().active.load(), pins(access), access);
    }

    /// A session of one user: map, use the page, look at the marks, unmap.
    fn session(&self, access: Access) {
        let Ok(mfn) = self.map(access) else { return };
        self.frame(mfn).used();
        let wanted = match access {
            Access::Read => EntryFlags::READING,
            Access::Write => EntryFlags::IN_USE,
        };
        assert!(
            self.marks().contains(wanted),
            "PIN-2: marks are set for as long as pins justify them"
        );
        self.unmap(access);
    }

    fn frame(&self, mfn: Mfn) -> &Watched {
        &self.frames[usize::try_from(mfn.0).unwrap()]
    }

    /// The granter has the page to itself.
    fn take_back(&self, frame: u64) {
        self.frame(Mfn(frame)).had_alone();
    }

    /// Nobody uses the entry: it has no pins and no marks.
    fn check_idle(&self) {
        assert_eq!(self.marks(), EntryFlags::empty(), "no pins, no marks");
        assert!(!self.active.get(0).load().is_pinned());
    }
}

fn pins(access: Access) -> Pins {
    match access {
        Access::Read => Pins::HOST_READ,
        Access::Write => Pins::HOST_WRITE,
    }
}

fn users(version2: bool, first: Access, second: Access) {
    every_order(move || {
        let world = World::granting(version2);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || other.session(second));
        world.session(first);
        thread.join().unwrap();
        world.check_idle();
    });
}

/// Map against map, and against unmap, on one reference, both reading: no mark of a user is cleared
/// by another, none is left behind, whoever holds a pin sees the frame (PIN-1, PIN-2).
#[test]
fn two_readers() {
    users(false, Access::Read, Access::Read);
    users(true, Access::Read, Access::Read);
}

/// The same with an upgrade to writing and the end of the last write.
#[test]
fn reader_and_writer() {
    users(false, Access::Read, Access::Write);
    users(true, Access::Read, Access::Write);
}

/// The same with two writers.
#[test]
fn two_writers() {
    users(false, Access::Write, Access::Write);
    users(true, Access::Write, Access::Write);
}

/// The same with three users at once.
#[test]
fn three_users() {
    for version2 in [false, true] {
        up_to_preemptions(1, move || {
            let world = World::granting(version2);
            let threads = [Access::Read, Access::Write].map(|access| {
                let other = Arc::clone(&world);
                thread::spawn(move || other.session(access))
            });
            world.session(Access::Read);
            for thread in threads {
                thread.join().unwrap();
            }
            world.check_idle();
        });
    }
}

/// A first map against the granter ending access: never both (spec 8.2 items 2 and 3).
#[test]
fn first_map_against_end_of_access() {
    for (version2, access) in [false, true]
        .into_iter()
        .flat_map(|v| [(v, Access::Read), (v, Access::Write)])
    {
        every_order(move || {
            let world = World::granting(version2);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.map(access).is_ok());
            let ended = world.granted().end() == Outcome::Done;
            let mapped = thread.join().unwrap();
            assert!(
                !(ended && mapped),
                "the granter has its page back and the grantee has it mapped"
            );
        });
    }
}

/// A map, a use and an unmap against the granter ending access: when access has ended, every use of
/// the page is over and seen, and nobody newly gets in (GST-1, spec 8.2).
#[test]
fn session_against_end_of_access() {
    for version2 in [false, true] {
        every_order(move || {
            let world = World::granting(version2);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.session(Access::Write));
            let ended = world.granted().end() == Outcome::Done;
            if ended {
                world.take_back(FRAMES[0]);
            }
            thread.join().unwrap();
            // Version 2 has refused new uses whether or not it ended; version 1 only if it did.
            assert_eq!(world.map(Access::Read).is_err(), ended || version2);
        });
    }
}

/// A map against an entry that is granted, ended and granted again with another page: the frame that
/// is mapped is one that the granter does not have back.
#[test]
fn session_against_an_entry_used_again() {
    for version2 in [false, true] {
        every_order(move || {
            let world = World::granting(version2);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.session(Access::Read));
            if world.granted().end() == Outcome::Done {
                world.take_back(FRAMES[0]);
                world.grant(FRAMES[1]);
            }
            thread.join().unwrap();
            world.check_idle();
        });
    }
}

/// A first map against the granter making the grant: who finds it granted finds the frame, and what
/// the granter had written to the page (GST-4).
#[test]
fn session_against_granting() {
    for version2 in [false, true] {
        every_order(move || {
            let world = World::new(version2);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.session(Access::Write));
            world.take_back(FRAMES[1]);
            world.grant(FRAMES[1]);
            thread.join().unwrap();
            world.check_idle();
        });
    }
}

/// A writable map against the granter turning the grant read-only: when that is done, every write is
/// over and seen, and nobody newly gets in to write.
#[test]
fn writer_against_read_only() {
    for version2 in [false, true] {
        every_order(move || {
            let world = World::granting(version2);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.session(Access::Write));
            let done = world.granted().make_readonly() == Outcome::Done;
            if done {
                world.take_back(FRAMES[0]);
            }
            thread.join().unwrap();
            assert_eq!(world.map(Access::Write).is_err(), done || version2);
        });
    }
}

/// The upgrade of a read-only use to a writable one, against the granter turning the grant read-only
/// under it: never both.
#[test]
fn upgrade_against_read_only() {
    for version2 in [false, true] {
        every_order(move || {
            let world = World::granting(version2);
            assert!(world.map(Access::Read).is_ok());
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || other.map(Access::Write).is_ok());
            let done = world.granted().make_readonly() == Outcome::Done;
            let writes = thread.join().unwrap();
            assert!(
                !(done && writes),
                "the granter counts on nobody writing, and somebody may"
            );
        });
    }
}
