//! `map_grant_ref`, `unmap_grant_ref`, `unmap_and_replace`: alone, in pairs, and by two threads.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use gnttab_abi::{MapFlags, Op};
use gnttab_engine::Version;

use crate::duo::{Duo, duo};
use crate::flat::Memory;
use crate::limits::{contended_add, locked_exchange};
use crate::report::Temperature;
use crate::sampler::{Case, Sampler};
use crate::scene::{Actor, Plan, SLOTS, Scene};

/// Items of a hypercall.
pub(crate) const BATCHES: [u32; 4] = [1, 8, 32, 128];

/// Versions of the granter's table.
pub(crate) const VERSIONS: [Version; 2] = [Version::V1, Version::V2];

/// References of a cold scene: with a cache line each for entry, private state, frame record and
/// page-table entry, several times the largest cache.
const COLD: u32 = 1 << 18;

const WRITE: MapFlags = MapFlags::HOST_MAP;
const READ: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);

/// The plan of a cold scene.
pub(crate) fn cold_plan(version: Version) -> Plan {
    Plan {
        grants: COLD,
        apart: true,
        ..Plan::warm(version)
    }
}

/// Memory for the largest cold scene, made when one is first wanted.
pub(crate) fn cold_memory() -> &'static Memory {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let frames = VERSIONS.map(|version| cold_plan(version).memory());
        Memory::new(frames[0].max(frames[1]))
    })
}

/// The numbers below `count`, a power of two, in an order that no prefetcher follows, for ever.
pub(crate) fn scattered(count: u32) -> impl FnMut() -> u32 {
    // A linear congruential generator of full period: every number once a turn.
    let mut state = 1u32;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) & (count - 1);
        state
    }
}

pub(crate) fn run(sampler: &mut Sampler<'_>) {
    for version in VERSIONS {
        warm(sampler, version);
        cold(sampler, version);
        two_threads(sampler, version);
    }
}

pub(crate) fn case(name: &str, version: Version, temperature: Temperature, threads: u32, batch: u32) -> Case {
    Case {
        name: format!("{name}/v{}/{}/b{batch}", version.number(), temperature.name()),
        batch,
        threads,
        version: version.number(),
        temperature,
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the form of a body")]
pub(crate) fn l(repetitions: u32) -> Option<Duration> {
    Some(locked_exchange(repetitions))
}

/// One pair of calls of `batch` items each, with what the guest does between them.
fn pair(actor: &mut Actor<'_, '_>, first: u32, batch: u32) {
    actor.call(Op::MapGrantRef, first, batch);
    actor.move_handles(first, batch);
    actor.call(Op::UnmapGrantRef, first, batch);
}

/// Pairs of calls over the slots in turn; there are as many items in use as a batch has, 32 at least.
pub(crate) fn pairs(actor: &mut Actor<'_, '_>, batch: u32, repetitions: u32) {
    let slots = batch.max(32);
    let mut first = 0;
    for _ in 0..repetitions {
        pair(actor, first, batch);
        first += batch;
        if first == slots {
            first = 0;
        }
    }
}

/// Asserts that the first batch's pair works.
fn assert_pair(actor: &mut Actor<'_, '_>, batch: u32) {
    pair(actor, 0, batch);
    for slot in 0..batch {
        actor.assert_done(Op::MapGrantRef, slot);
        actor.assert_done(Op::UnmapGrantRef, slot);
    }
}

fn warm(sampler: &mut Sampler<'_>, version: Version) {
    let name = |what: &str, batch| case(what, version, Temperature::Warm, 1, batch);
    let cases = |batch| ["pair", "pair-readonly", "map", "unmap", "replace"].map(|what| name(what, batch));
    if !sampler.wants_any(BATCHES.into_iter().flat_map(cases)) {
        return;
    }
    let plan = Plan::warm(version);
    let memory = Memory::new(plan.memory());
    let scene = Scene::new(plan, &memory);
    let mut actor = scene.actor(0, 0, 0);
    for batch in BATCHES {
        for (what, flags) in [("pair", WRITE), ("pair-readonly", READ)] {
            (0..SLOTS).for_each(|slot| actor.prepare_pair(slot, slot, flags));
            assert_pair(&mut actor, batch);
            let mut body = |repetitions| {
                let start = Instant::now();
                pairs(&mut actor, batch, repetitions);
                Some(start.elapsed())
            };
            sampler.measure(name(what, batch), batch, &mut body, "L", &mut l);
        }
        (0..SLOTS).for_each(|slot| actor.prepare_pair(slot, slot, WRITE));
        halves(sampler, &mut actor, &|what| name(what, batch), batch, &mut |_| {});
        replace(sampler, &mut actor, name("replace", batch), batch);
    }
}

/// Maps and unmaps every reference: what the engine makes when one is first used is there afterwards, as
/// in Xen, which makes it when a table grows.
pub(crate) fn use_each_once(actor: &mut Actor<'_, '_>) {
    for first in (0..actor.scene.plan.grants).step_by(SLOTS as usize) {
        (0..SLOTS).for_each(|slot| actor.prepare_pair(slot, first + slot, READ));
        pair(actor, 0, SLOTS);
        actor.assert_done(Op::UnmapGrantRef, SLOTS - 1);
    }
}

/// Map and unmap each by itself: every slot is mapped, batch by batch, then unmapped.
fn halves(
    sampler: &mut Sampler<'_>,
    actor: &mut Actor<'_, '_>,
    name: &dyn Fn(&str) -> Case,
    batch: u32,
    prepare: &mut dyn FnMut(&Actor<'_, '_>),
) {
    for (what, timed) in [("map", Op::MapGrantRef), ("unmap", Op::UnmapGrantRef)] {
        let mut body = |repetitions| {
            let mut time = Duration::ZERO;
            for _ in 0..repetitions {
                prepare(actor);
                time += chunk(actor, batch, timed);
            }
            Some(time)
        };
        sampler.measure(name(what), SLOTS, &mut body, "L", &mut l);
    }
}

/// Maps all slots and unmaps them; the time of one of the two.
fn chunk(actor: &mut Actor<'_, '_>, batch: u32, timed: Op) -> Duration {
    let mut time = Duration::ZERO;
    for op in [Op::MapGrantRef, Op::UnmapGrantRef] {
        let start = Instant::now();
        for first in (0..SLOTS).step_by(batch as usize) {
            actor.call(op, first, batch);
        }
        if op == timed {
            time = start.elapsed();
        }
        if op == Op::MapGrantRef {
            actor.move_handles(0, SLOTS);
        }
    }
    actor.assert_done(Op::MapGrantRef, SLOTS - 1);
    actor.assert_done(Op::UnmapGrantRef, SLOTS - 1);
    time
}

/// `unmap_and_replace` in the place of `unmap_grant_ref`.
fn replace(sampler: &mut Sampler<'_>, actor: &mut Actor<'_, '_>, case: Case, batch: u32) {
    (0..SLOTS).for_each(|slot| actor.prepare_replacement(slot, actor.place(SLOTS + slot)));
    let mut body = |repetitions| {
        let mut time = Duration::ZERO;
        for _ in 0..repetitions {
            for first in (0..SLOTS).step_by(batch as usize) {
                actor.call(Op::MapGrantRef, first, batch);
            }
            actor.move_handles(0, SLOTS);
            let start = Instant::now();
            for first in (0..SLOTS).step_by(batch as usize) {
                actor.call(Op::UnmapAndReplace, first, batch);
            }
            time += start.elapsed();
            actor.assert_done(Op::UnmapAndReplace, SLOTS - 1);
        }
        Some(time)
    };
    sampler.measure(case, SLOTS, &mut body, "L", &mut l);
    (0..SLOTS).for_each(|slot| actor.prepare_replacement(slot, 0));
}

fn cold(sampler: &mut Sampler<'_>, version: Version) {
    let name = |what: &str, batch| case(what, version, Temperature::Cold, 1, batch);
    if !sampler.wants_any(
        BATCHES
            .into_iter()
            .flat_map(|batch| ["map", "unmap"].map(|what| name(what, batch))),
    ) {
        return;
    }
    let scene = Scene::new(cold_plan(version), cold_memory());
    let mut next = scattered(COLD);
    let mut actor = scene.actor(0, 0, 0);
    use_each_once(&mut actor);
    for batch in BATCHES {
        let mut prepare = |actor: &Actor<'_, '_>| {
            (0..SLOTS).for_each(|slot| actor.prepare_pair(slot, next(), WRITE));
        };
        halves(
            sampler,
            &mut actor,
            &|what| name(what, batch),
            batch,
            &mut prepare,
        );
    }
}

/// Two threads: pairs of their own, one granter, one reference.
fn two_threads(sampler: &mut Sampler<'_>, version: Version) {
    let arrangements = [
        ("pair-2-separate", 2),
        ("pair-2-one-granter", 1),
        ("pair-2-one-reference", 1),
    ];
    for (what, pairs_of_domains) in arrangements {
        let name = |batch| case(what, version, Temperature::Warm, 2, batch);
        if !sampler.wants_any(BATCHES.map(name)) {
            continue;
        }
        let plan = Plan {
            pairs: pairs_of_domains,
            ..Plan::warm(version)
        };
        let memory = Memory::new(plan.memory());
        let scene = Scene::new(plan, &memory);
        let mut first = scene.actor(0, 0, 0);
        let mut second = if pairs_of_domains == 2 {
            scene.actor(1, 1, 0)
        } else {
            scene.actor(1, 0, 1)
        };
        let same = what.ends_with("reference");
        for (actor, half) in [(&first, 0), (&second, SLOTS / 2)] {
            for slot in 0..SLOTS / 2 {
                let index = if same { 0 } else { half + slot };
                // Mappings are at places of their own, whatever the reference.
                actor.prepare_pair_at(slot, index, WRITE, actor.place(half + slot));
            }
        }
        assert_pair(&mut first, 32);
        assert_pair(&mut second, 32);
        let work = |job: u32, repetitions| {
            if job == JOB_ADD {
                contended_add(repetitions);
            } else {
                pairs(&mut second, job - JOB_BATCH, repetitions);
            }
        };
        let done = duo(work, |duo| {
            for batch in BATCHES {
                let first = std::cell::RefCell::new(&mut first);
                let mut both = |repetitions| {
                    duo.round(JOB_BATCH + batch, repetitions, |n| {
                        pairs(&mut first.borrow_mut(), batch, n)
                    })
                };
                let mut alone = |repetitions| {
                    let start = Instant::now();
                    pairs(&mut first.borrow_mut(), batch, repetitions);
                    Some(start.elapsed() / batch)
                };
                if same {
                    sampler.measure(name(batch), batch, &mut both, "contended add", &mut add(duo));
                } else {
                    sampler.measure(name(batch), batch, &mut both, "one thread", &mut alone);
                }
            }
        });
        if done.is_none() {
            sampler.skip(what, "needs two processors");
        }
    }
}

const JOB_ADD: u32 = 1;
const JOB_BATCH: u32 = 2;

/// Both threads add to one word.
fn add<'d>(duo: &'d Duo<'_>) -> impl FnMut(u32) -> Option<Duration> + 'd {
    |repetitions| duo.round(JOB_ADD, repetitions, contended_add)
}
