//! Being inside a table, and having it alone.

use alloc::sync::Arc;
use loom::thread;

use super::every_order;
use super::watched::Watched;
use crate::presence::{Gate, Presence};

/// A table as `presence` knows it. What is inside is read by whoever is inside, and written by
/// whoever has it alone; the checker fails if the two are not ordered.
struct World {
    presence: Presence,
    gate: Gate,
    inside: Watched,
}

const TAG: u32 = 1;

impl World {
    fn new(processors: usize) -> Arc<World> {
        Arc::new(World {
            presence: Presence::new(processors),
            gate: Gate::new(),
            inside: Watched::default(),
        })
    }

    fn read(&self, processor: usize) {
        let slot = self.presence.slot(processor).unwrap();
        slot.announce(TAG);
        if self.gate.is_open() {
            self.inside.used();
        }
        slot.leave();
    }

    fn change(&self) {
        self.gate.shut();
        self.presence.wait_until_left(TAG);
        self.inside.had_alone();
        self.gate.open();
    }
}

/// A reader inside a table against one who wants it alone: never both, and each sees what the other
/// did before.
#[test]
fn inside_against_alone() {
    every_order(|| {
        let world = World::new(1);
        let other = Arc::clone(&world);
        let reader = thread::spawn(move || {
            other.read(0);
            other.read(0);
        });
        world.change();
        reader.join().unwrap();
    });
}

/// Two who want a table alone, and a reader: one at a time.
#[test]
fn two_alone() {
    every_order(|| {
        let world = World::new(1);
        let threads = [false, true].map(|reads| {
            let other = Arc::clone(&world);
            thread::spawn(move || if reads { other.read(0) } else { other.change() })
        });
        world.change();
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Two who want the right to act as one processor: one gets it, and has seen what the one before did.
#[test]
fn one_processor_one_holder() {
    every_order(|| {
        let world = World::new(1);
        let other = Arc::clone(&world);
        let act = |world: &World| {
            let slot = world.presence.slot(0).unwrap();
            let taken = slot.take();
            if taken {
                world.inside.had_alone();
                slot.give_back();
            }
            taken
        };
        let thread = thread::spawn(move || act(&other));
        let first = act(&world);
        let second = thread.join().unwrap();
        assert!(first || second);
    });
}
