//! The lock-free protocols under `loom`: every interleaving that the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p gnttab-engine --release --lib models` runs them. Each says
//! what it proves; each runs the engine's own code on the checker's atomics.

use alloc::sync::Arc;

use gnttab_abi::{DomId, EntryFlags, EntryHead, GrantHandle, GrantRef, GrantStatus, MapFlags, Mfn};
use loom::thread;

use crate::active::{Active, Pins};
use crate::hypervisor::{
    Access, FrameOwner, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError, Resolved,
};
use crate::map::{pin, unpin};
use crate::maptrack::{Maptrack, Record};
use crate::presence::{Gate, Presence};
use crate::shared::{PageWords, SharedV1, SharedV2};
use crate::sync::{AtomicU32, Ordering, fence};
use crate::table::{Entry, SharedEntry};

const GRANTEE: DomId = DomId(2);
const FRAME: Mfn = Mfn(7);

/// A hypervisor that is only asked for hooks.
struct Nobody;

impl Hypervisor for Nobody {
    type Domain = ();
    type TablePage = Arc<PageWords>;
    fn resolve(&self, (): &(), _: gnttab_abi::Gfn, _: Access) -> Result<Resolved, ResolveError> {
        Err(ResolveError::BadPage)
    }
    fn get_frame(&self, _: Mfn) -> Option<FrameOwner> {
        None
    }
    fn put_frame(&self, _: Mfn) {}
    fn get_writable(&self, _: Mfn) -> bool {
        false
    }
    fn put_writable(&self, _: Mfn) {}
    fn copy(&self, _: (Mfn, u16), _: (Mfn, u16), _: u16) {}
    fn map_host(&self, (): &(), _: &HostMapping) -> Result<(), HostError> {
        Err(HostError)
    }
    fn unmap_host(&self, (): &(), _: &HostUnmapping) -> Result<(), HostError> {
        Err(HostError)
    }
    fn flush(&self, (): &()) {}
    fn crash(&self, (): &(), _: &'static str) {}
    fn alloc_table_page(&self, (): &()) -> Option<Arc<PageWords>> {
        None
    }
    fn table_page_mfn(&self, _: &Arc<PageWords>) -> Mfn {
        Mfn(0)
    }
    fn table_page_gfn(&self, (): &(), _: &Arc<PageWords>) -> gnttab_abi::Gfn {
        gnttab_abi::Gfn::INVALID
    }
}

/// One entry, granted to [`GRANTEE`], of either version.
struct World {
    page: PageWords,
    status: PageWords,
    active: Active,
    version2: bool,
}

impl World {
    fn new(version2: bool) -> Arc<World> {
        let (page, status, active) = (PageWords::zeroed(), PageWords::zeroed(), Active::new());
        let head = EntryHead {
            flags: EntryFlags::PERMIT_ACCESS,
            domid: GRANTEE,
        };
        page.u32(0).store(head.word(), Ordering::Relaxed);
        Arc::new(World {
            page,
            status,
            active,
            version2,
        })
    }

    fn entry(&self) -> Entry<'_> {
        let shared = if self.version2 {
            SharedEntry::V2(SharedV2::new(&self.page, 0, &self.status, 0))
        } else {
            SharedEntry::V1(SharedV1::new(&self.page, 0))
        };
        Entry::alone(&self.active, shared)
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

    fn map(&self, access: Access) -> Result<(), GrantStatus> {
        let resolved = Resolved {
            mfn: FRAME,
            owner: FrameOwner::Domain(DomId(1)),
        };
        let (mfn, _) = pin(&Nobody, &self.entry(), GRANTEE, access, pins(access), |_| {
            Ok(resolved)
        })?;
        assert_eq!(mfn, FRAME, "whoever holds a pin sees the frame");
        Ok(())
    }

    fn unmap(&self, access: Access) {
        unpin(&self.entry(), pins(access), access);
    }

    /// The granter ends access (spec 9); true: it has its page back.
    fn end(&self) -> bool {
        if self.version2 {
            // A release store and a full fence are what the guest driver does.
            self.page.u32(0).store(0, Ordering::Release);
            fence(Ordering::SeqCst);
            return self.status.u16(0).load(Ordering::Acquire) & EntryFlags::IN_USE.bits() == 0;
        }
        let word = self.page.u32(0).load(Ordering::Acquire);
        let idle = !EntryHead::from_word(word).flags.intersects(EntryFlags::IN_USE);
        let head = self.page.u32(0);
        idle && head
            .compare_exchange(word, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

fn pins(access: Access) -> Pins {
    match access {
        Access::Read => Pins::HOST_READ,
        Access::Write => Pins::HOST_WRITE,
    }
}

/// A session of one user: map, look at the marks, unmap.
fn session(world: &World, access: Access) {
    if world.map(access).is_ok() {
        let wanted = match access {
            Access::Read => EntryFlags::READING,
            Access::Write => EntryFlags::IN_USE,
        };
        assert!(
            world.marks().contains(wanted),
            "marks are set for as long as pins justify them"
        );
        world.unmap(access);
    }
}

fn two_users(version2: bool, first: Access, second: Access) {
    loom::model(move || {
        let world = World::new(version2);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || session(&other, second));
        session(&world, first);
        thread.join().unwrap();
        assert_eq!(world.marks(), EntryFlags::empty(), "no pins, no marks");
        assert!(!world.active.load().is_pinned());
    });
}

/// First pin against last unpin, in both directions: no mark of a user is cleared by another, none
/// is left behind (PIN-1, PIN-2).
#[test]
fn two_readers() {
    two_users(false, Access::Read, Access::Read);
    two_users(true, Access::Read, Access::Read);
}

/// The same with an upgrade to writing and the end of the last write.
#[test]
fn reader_and_writer() {
    two_users(false, Access::Read, Access::Write);
    two_users(true, Access::Read, Access::Write);
}

/// The same with two writers.
#[test]
fn two_writers() {
    two_users(false, Access::Write, Access::Write);
    two_users(true, Access::Write, Access::Write);
}

fn map_against_end(version2: bool, access: Access) {
    loom::model(move || {
        let world = World::new(version2);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || other.map(access).is_ok());
        let ended = world.end();
        let mapped = thread.join().unwrap();
        assert!(
            !(ended && mapped),
            "the granter has its page back and the grantee has it mapped"
        );
    });
}

/// A first map against the granter ending access: never both (spec 8.2 items 2 and 3).
#[test]
fn first_map_against_end_of_access() {
    for version2 in [false, true] {
        map_against_end(version2, Access::Read);
        map_against_end(version2, Access::Write);
    }
}

/// A map and its unmap against the granter ending access: when access has ended, nobody is in.
#[test]
fn map_and_unmap_against_end_of_access() {
    for version2 in [false, true] {
        loom::model(move || {
            let world = World::new(version2);
            let other = Arc::clone(&world);
            let thread = thread::spawn(move || session(&other, Access::Write));
            let ended = world.end();
            thread.join().unwrap();
            // Version 2 has refused new uses whether or not it ended; version 1 only if it did.
            assert_eq!(world.map(Access::Read).is_err(), ended || version2);
        });
    }
}

/// A reader inside a table against one who wants it alone: never both (presence).
#[test]
fn inside_against_alone() {
    loom::model(|| {
        let world = Arc::new((Presence::new(1), Gate::new(), AtomicU32::new(0)));
        let other = Arc::clone(&world);
        let reader = thread::spawn(move || {
            let (presence, gate, version) = &*other;
            let slot = presence.slot(0).unwrap();
            slot.announce(1);
            if gate.is_open() {
                let before = version.load(Ordering::Relaxed);
                assert_eq!(
                    version.load(Ordering::Relaxed),
                    before,
                    "the version moved under a reader"
                );
                assert_ne!(before, 1, "a reader saw a change half made");
            }
            slot.leave();
        });
        let (presence, gate, version) = &*world;
        gate.shut();
        presence.wait_until_left(1);
        version.store(1, Ordering::Relaxed);
        version.store(2, Ordering::Relaxed);
        gate.open();
        reader.join().unwrap();
    });
}

/// Two unmaps of one handle: exactly one succeeds (spec 8.2 item 8, HND-4).
#[test]
fn unmap_against_unmap() {
    loom::model(|| {
        let maptrack = Arc::new(Maptrack::new(1, 1));
        let handle: GrantHandle = maptrack.allocate(0).unwrap();
        let record = Record {
            gref: GrantRef(9),
            granter: DomId(1),
            flags: MapFlags::HOST_MAP,
        };
        maptrack.publish(handle, record, 0);
        let unmap = move |maptrack: &Maptrack| match maptrack.claim(handle, record) {
            Some(mut claim) => {
                claim.remove(MapFlags::HOST_MAP);
                true
            }
            None => false,
        };
        let other = Arc::clone(&maptrack);
        let thread = thread::spawn(move || unmap(&other));
        let first = unmap(&maptrack);
        let second = thread.join().unwrap();
        assert!(first ^ second);
        assert_eq!(maptrack.look(handle), None);
    });
}
