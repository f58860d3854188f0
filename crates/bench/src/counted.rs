//! Hot paths as functions to count the instructions of: exact, where time is noisy.
//!
//! Each case is one function that nobody inlines, so that callgrind's inclusive count of it, divided by its
//! items, is the cost of an item: the operation, the lean hypervisor under it, and for pairs the guest's
//! moving of handles. Scenes are set outside, and a turn before the counted one has grown what grows.

use std::hint::black_box;

use gnttab_abi::{MapFlags, Op};
use gnttab_engine::Version;

use crate::flat::Memory;
use crate::mapping::pairs;
use crate::scene::{Actor, Plan, SLOTS, Scene};

/// Items that a counted function does: a whole number of every batch.
pub const COUNTED_ITEMS: u32 = SLOTS;

fn all_pairs(actor: &mut Actor<'_, '_>, batch: u32) {
    pairs(actor, batch, COUNTED_ITEMS / batch);
}

fn all_copies(actor: &mut Actor<'_, '_>, batch: u32) {
    for first in (0..SLOTS).step_by(batch as usize) {
        actor.call(Op::Copy, first, batch);
    }
}

/// A counted case: its name, how the scene is prepared, and its function.
struct Counted {
    name: &'static str,
    version: Version,
    prepare: fn(&Actor<'_, '_>),
    warm_up: fn(&mut Actor<'_, '_>),
    run: fn(&mut Actor<'_, '_>),
}

/// Declares each case as a function of its name.
macro_rules! counted {
    ($($name:ident: $version:ident, $prepare:expr, $all:ident($batch:literal);)*) => {
        $(
            #[inline(never)]
            fn $name(actor: &mut Actor<'_, '_>) {
                // A body unlike any other's: equal ones would be merged, and their counts with them.
                black_box(stringify!($name));
                $all(actor, $batch);
            }
        )*

        const ALL: &[Counted] = &[$(Counted {
            name: stringify!($name),
            version: Version::$version,
            prepare: $prepare,
            warm_up: |actor| $all(actor, $batch),
            run: $name,
        }),*];
    };
}

fn to_write(actor: &Actor<'_, '_>) {
    (0..SLOTS).for_each(|slot| actor.prepare_pair(slot, slot, MapFlags::HOST_MAP));
}

fn to_read(actor: &Actor<'_, '_>) {
    let flags = MapFlags::HOST_MAP | MapFlags::READONLY;
    (0..SLOTS).for_each(|slot| actor.prepare_pair(slot, slot, flags));
}

fn copies<const LEN: u16, const INTO_GRANT: bool>(actor: &Actor<'_, '_>) {
    (0..SLOTS).for_each(|slot| actor.prepare_copy(slot, slot % 32, LEN, INTO_GRANT));
}

counted! {
    counted_pair_v1_b1: V1, to_write, all_pairs(1);
    counted_pair_v1_b32: V1, to_write, all_pairs(32);
    counted_pair_v2_b1: V2, to_write, all_pairs(1);
    counted_pair_v2_b32: V2, to_write, all_pairs(32);
    counted_pair_readonly_v1_b32: V1, to_read, all_pairs(32);
    counted_pair_readonly_v2_b32: V2, to_read, all_pairs(32);
    counted_copy_from_64_v1_b1: V1, copies::<64, false>, all_copies(1);
    counted_copy_from_64_v1_b32: V1, copies::<64, false>, all_copies(32);
    counted_copy_from_64_v2_b32: V2, copies::<64, false>, all_copies(32);
    counted_copy_to_64_v1_b32: V1, copies::<64, true>, all_copies(32);
    counted_copy_to_64_v2_b32: V2, copies::<64, true>, all_copies(32);
    counted_copy_from_4096_v1_b32: V1, copies::<4096, false>, all_copies(32);
    counted_copy_from_4096_v2_b32: V2, copies::<4096, false>, all_copies(32);
}

/// Runs every case once uncounted and once counted; the names of the counted functions.
#[must_use]
pub fn run() -> Vec<&'static str> {
    for version in [Version::V1, Version::V2] {
        let plan = Plan::warm(version);
        let memory = Memory::new(plan.memory());
        let scene = Scene::new(plan, &memory);
        let mut actor = scene.actor(0, 0, 0);
        for case in ALL.iter().filter(|case| case.version == version) {
            (case.prepare)(&actor);
            // What grows has grown, and every kind of call has been made once.
            (case.warm_up)(&mut actor);
            (case.run)(&mut actor);
        }
    }
    ALL.iter().map(|case| case.name).collect()
}
