//! The list of mappings: handles and their records.

use alloc::sync::Arc;
use alloc::vec::Vec;
use gnttab_abi::{DomId, GrantHandle, GrantRef, MapFlags};
use loom::thread;

use super::watched::Watched;
use super::{every_order, up_to_preemptions};
use crate::maptrack::{Maptrack, RECORDS_PER_PAGE, Record};
use crate::presence::Presence;

fn record(gref: u32) -> Record {
    Record {
        gref: GrantRef(gref),
        granter: DomId(1),
        flags: MapFlags::HOST_MAP,
    }
}

/// A list, the processors that may use it (each vCPU on one of its own), and for each handle something
/// that its holder has to itself.
struct World {
    maptrack: Maptrack,
    presence: Presence,
    owned: Vec<Watched>,
}

impl World {
    fn new(pages: u32, vcpus: usize) -> Arc<World> {
        Arc::new(World {
            maptrack: Maptrack::new(pages, vcpus),
            presence: Presence::new(vcpus),
            owned: (0..pages * RECORDS_PER_PAGE)
                .map(|_| Watched::default())
                .collect(),
        })
    }

    /// Does something from inside a table, as maps and unmaps do.
    fn inside<R>(&self, vcpu: usize, work: impl FnOnce(&Maptrack) -> R) -> R {
        let slot = self.presence.slot(vcpu).unwrap();
        slot.announce(1);
        let result = work(&self.maptrack);
        slot.leave();
        result
    }

    /// What a map does for a handle (spec 3.3 step 5).
    fn take(&self, vcpu: usize) -> Option<GrantHandle> {
        let take = || self.inside(vcpu, |maptrack| Some(maptrack.handles(vcpu).allocate()?.handle));
        let handle = take().or_else(|| {
            self.maptrack.gather(|| self.presence.wait_for_all());
            take()
        })?;
        self.own(handle);
        assert_eq!(self.maptrack.look(handle), None, "a free handle's record is free");
        Some(handle)
    }

    fn publish(&self, handle: GrantHandle, record: Record, now: u64) {
        self.maptrack.free(handle).unwrap().publish(record, now);
    }

    fn own(&self, handle: GrantHandle) {
        self.owned[handle.0 as usize].had_alone();
    }

    fn give_back(&self, vcpu: usize, handle: GrantHandle) {
        self.own(handle);
        self.inside(vcpu, |maptrack| {
            maptrack.handles(vcpu).release(maptrack.free(handle).unwrap())
        });
    }

    /// How many handles there are to be had.
    fn drain(&self, vcpu: usize) -> u32 {
        let mut count = 0;
        while self.take(vcpu).is_some() {
            count += 1;
        }
        count
    }
}

/// Allocation against release across processors: one gives back to its own list what the other had
/// taken, and the other, who has none left, gets all lists gathered. No handle has two holders, none
/// is lost, and who finds none had a moment at which there was none (HND-1, HND-2, HND-5).
#[test]
fn allocation_against_release_across_processors() {
    every_order(|| {
        let world = World::new(1, 2);
        let first = world.take(0).unwrap();
        let second = world.take(0).unwrap();
        let _third = world.take(0).unwrap();
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || {
            other.give_back(1, first);
            other.give_back(1, second);
            other.take(1)
        });
        let mine = world.take(0);
        let theirs = thread.join().unwrap();
        assert!(
            theirs.is_some(),
            "two were free, and nobody else took more than one"
        );
        let held = 1 + u32::from(mine.is_some());
        assert_eq!(world.drain(0) + held, 2, "none is lost");
    });
}

/// Taking and giving back on a list of one's own against its being gathered by somebody else: it is
/// touched by one of them at a time, and no handle is on two lists or on none.
#[test]
fn own_list_against_gathering() {
    every_order(|| {
        let world = World::new(1, 2);
        let first = world.take(0).unwrap();
        let other = Arc::clone(&world);
        // All that is free is the first vCPU's own.
        let thread = thread::spawn(move || other.take(1));
        let second = world.take(0);
        world.give_back(0, first);
        let theirs = thread.join().unwrap();
        let held = u32::from(second.is_some()) + u32::from(theirs.is_some());
        assert_eq!(held, 2);
        assert_eq!(world.drain(0), RECORDS_PER_PAGE - 1 - held, "none is lost");
    });
}

/// Both take until none is left, while the list grows under them: each handle is had once, and
/// there are as many as the limit says.
#[test]
fn both_take_all() {
    up_to_preemptions(3, || {
        let world = World::new(1, 2);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || other.drain(1));
        let first = world.drain(0);
        let second = thread.join().unwrap();
        assert_eq!(first + second, RECORDS_PER_PAGE - 1);
    });
}

/// A record that is looked up while it is written: it is there whole, or not at all (HND-6), and who
/// finds it sees what went before the mapping.
#[test]
fn look_against_publication() {
    every_order(|| {
        let world = World::new(1, 1);
        let handle = world.take(0).unwrap();
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || {
            if let Some((found, born)) = other.maptrack.look_with_birth(handle) {
                assert_eq!((found, born), (record(9), 5 << 24));
                other.own(handle);
            }
        });
        world.own(handle);
        world.publish(handle, record(9), 5 << 24);
        thread.join().unwrap();
    });
}

fn unmap(world: &World, handle: GrantHandle, expected: Record) -> bool {
    let Some(mut claim) = world.maptrack.claim(handle, expected) else {
        return false;
    };
    // Only one at a time works on a mapping.
    world.own(handle);
    claim.remove(MapFlags::HOST_MAP);
    world.maptrack.release_common(claim.finish().unwrap().handle);
    true
}

/// Two unmaps of one handle: exactly one succeeds (spec 8.2 item 8, HND-4).
#[test]
fn unmap_against_unmap() {
    every_order(|| {
        let world = World::new(1, 1);
        let handle = world.take(0).unwrap();
        world.publish(handle, record(9), 0);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || unmap(&other, handle, record(9)));
        let first = unmap(&world, handle, record(9));
        let second = thread.join().unwrap();
        assert!(first ^ second);
        assert_eq!(world.maptrack.look(handle), None);
    });
}

/// An unmap that was overtaken, by an unmap and a map that got the same handle for another grant:
/// it leaves the new mapping alone (HND-4).
#[test]
fn unmap_against_a_handle_used_again() {
    every_order(|| {
        let world = World::new(1, 1);
        let handle = world.take(0).unwrap();
        world.publish(handle, record(9), 0);
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || unmap(&other, handle, record(9)));
        if unmap(&world, handle, record(9)) {
            let again = world.take(0).unwrap();
            world.publish(again, record(10), 0);
            let late = thread.join().unwrap();
            assert!(!late, "it looked at a mapping that is gone");
            assert_eq!(world.maptrack.look(again), Some(record(10)));
        } else {
            assert!(thread.join().unwrap());
        }
    });
}

/// A mapping of two kinds, host and device, each removed by another processor: both succeed or one
/// finds that the record has changed; what is left says what is still mapped.
#[test]
fn unmaps_of_two_kinds() {
    every_order(|| {
        let both = Record {
            flags: MapFlags::HOST_MAP | MapFlags::DEVICE_MAP,
            ..record(9)
        };
        let world = World::new(1, 1);
        let handle = world.take(0).unwrap();
        world.publish(handle, both, 0);
        let remove = move |world: &World, kind: MapFlags| {
            let Some(seen) = world.maptrack.look(handle) else {
                return false;
            };
            let Some(mut claim) = world.maptrack.claim(handle, seen) else {
                return false;
            };
            claim.remove(kind);
            true
        };
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || remove(&other, MapFlags::DEVICE_MAP));
        let host = remove(&world, MapFlags::HOST_MAP);
        let device = thread.join().unwrap();
        let left = world.maptrack.look(handle).map(|record| record.flags);
        match (host, device) {
            (true, true) => assert_eq!(left, None),
            (true, false) => assert_eq!(left, Some(MapFlags::DEVICE_MAP)),
            (false, true) => assert_eq!(left, Some(MapFlags::HOST_MAP)),
            (false, false) => panic!("one of two is first"),
        }
    });
}
