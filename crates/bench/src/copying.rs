//! `copy`: by size, temperature and direction.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use gnttab_abi::Op;
use gnttab_engine::Version;

use crate::flat::Memory;
use crate::limits::copies;
use crate::mapping::{BATCHES, VERSIONS, cold_memory, cold_plan, scattered, use_each_once};
use crate::report::Temperature;
use crate::sampler::{Case, Sampler};
use crate::scene::{Actor, Plan, SLOTS, Scene};

/// Bytes of a copy.
const SIZES: [u16; 4] = [64, 512, 1500, 4096];

pub(crate) fn run(sampler: &mut Sampler<'_>) {
    for version in VERSIONS {
        for size in SIZES {
            warm(sampler, version, size, false);
            warm(sampler, version, size, true);
            cold(sampler, version, size);
        }
    }
}

fn case(size: u16, into_grant: bool, version: Version, temperature: Temperature, batch: u32) -> Case {
    let what = if into_grant { "copy-to" } else { "copy-from" };
    Case {
        name: format!(
            "{what}-{size}/v{}/{}/b{batch}",
            version.number(),
            temperature.name()
        ),
        batch,
        threads: 1,
        version: version.number(),
        temperature,
    }
}

/// As many pages as there are items in a batch, up to 32, in turn: all in the second-level cache.
fn warm(sampler: &mut Sampler<'_>, version: Version, size: u16, into_grant: bool) {
    let name = |batch| case(size, into_grant, version, Temperature::Warm, batch);
    if !sampler.wants_any(BATCHES.map(name)) {
        return;
    }
    let plan = Plan::warm(version);
    let memory = Memory::new(plan.memory());
    let scene = Scene::new(plan, &memory);
    let mut actor = scene.actor(0, 0, 0);
    (0..SLOTS).for_each(|slot| actor.prepare_copy(slot, slot % 32, size, into_grant));
    for batch in BATCHES {
        assert_copy(&mut actor, batch);
        let frames: Vec<_> = (0..32)
            .map(|slot| {
                let granted = memory.frame(scene.frame(0, slot)).expect("a frame");
                let local = memory.frame(actor.local(slot)).expect("a frame");
                if into_grant {
                    (local, granted)
                } else {
                    (granted, local)
                }
            })
            .collect();
        let mut body = |repetitions| {
            let slots = batch.max(32);
            let start = Instant::now();
            let mut first = 0;
            for _ in 0..repetitions {
                actor.call(Op::Copy, first, batch);
                first = (first + batch) % slots;
            }
            Some(start.elapsed())
        };
        let mut limit = |repetitions: u32| {
            let pages = frames.iter().copied().cycle().take(repetitions as usize);
            Some(copies(pages, size))
        };
        sampler.measure(name(batch), batch, &mut body, "memcpy, warm", &mut limit);
    }
}

fn assert_copy(actor: &mut Actor<'_, '_>, batch: u32) {
    actor.call(Op::Copy, 0, batch);
    (0..batch).for_each(|slot| actor.assert_done(Op::Copy, slot));
}

/// Sources that no cache holds, references likewise; destinations are few.
fn cold(sampler: &mut Sampler<'_>, version: Version, size: u16) {
    let name = |batch| case(size, false, version, Temperature::Cold, batch);
    if !sampler.wants_any(BATCHES.map(name)) {
        return;
    }
    let plan = cold_plan(version);
    let memory = cold_memory();
    let scene = Scene::new(plan, memory);
    let mut actor = scene.actor(0, 0, 0);
    use_each_once(&mut actor);
    // One turn for both: what one of them has read, the other does not find in a cache.
    let next = RefCell::new(scattered(plan.grants));
    let next = || (next.borrow_mut())();
    for batch in BATCHES {
        let locals: Vec<_> = (0..32)
            .map(|slot| memory.frame(actor.local(slot)).expect("a frame"))
            .collect();
        let mut body = |repetitions| {
            let mut time = Duration::ZERO;
            for _ in 0..repetitions {
                (0..SLOTS).for_each(|slot| actor.prepare_copy(slot, next(), size, false));
                let start = Instant::now();
                for first in (0..SLOTS).step_by(batch as usize) {
                    actor.call(Op::Copy, first, batch);
                }
                time += start.elapsed();
                actor.assert_done(Op::Copy, SLOTS - 1);
            }
            Some(time)
        };
        let mut limit = |repetitions: u32| {
            let pages = (0..repetitions).zip(locals.iter().cycle()).map(|(_, local)| {
                let page = memory.frame(scene.frame(0, next())).expect("a frame");
                (page, *local)
            });
            Some(copies(pages, size))
        };
        sampler.measure(name(batch), SLOTS, &mut body, "memcpy, cold", &mut limit);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use gnttab_abi::{Op, PAGE_SIZE};
    use gnttab_engine::{Hypervisor as _, Version};

    use crate::flat::Memory;
    use crate::scene::{Plan, SLOTS, Scene, granter};

    /// Copies are made inside a table, whole pages too, and changes of its version get it alone beside them.
    #[test]
    fn copies_inside_a_table_and_changes_of_its_version_go_on_beside_each_other() {
        let plan = Plan::warm(Version::V1);
        let memory = Memory::new(plan.memory());
        let scene = Scene::new(plan, &memory);
        assert!(!scene.engine.hypervisor().copy_waits());
        let mut actor = scene.actor(0, 0, 0);
        let page = u16::try_from(PAGE_SIZE).unwrap();
        (0..SLOTS).for_each(|slot| actor.prepare_copy(slot, slot, page, false));
        actor.call(Op::Copy, 0, SLOTS);
        (0..SLOTS).for_each(|slot| actor.assert_done(Op::Copy, slot));

        let changed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let vcpu = scene.vcpu(granter(0), 0);
                let mut cpu = scene.engine.any_processor().expect("a processor");
                for version in [2, 1].into_iter().cycle().take(100) {
                    // Copies that are under way keep the old version for as long as their pins last.
                    while cpu.set_version(&vcpu, version).is_err() {
                        std::thread::yield_now();
                    }
                }
                changed.store(true, Ordering::Release);
            });
            while !changed.load(Ordering::Acquire) {
                actor.call(Op::Copy, 0, SLOTS);
            }
        });
    }
}
