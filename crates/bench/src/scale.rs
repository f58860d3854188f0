//! How the cost of a pair grows with the machine: up to 4,000 domains with tables of 64 frames, and a quarter
//! of a thousand live mappings of each, a million in all.
//!
//! At every size two figures: pairs on the references of one domain, which must cost the same whatever else
//! there is; and pairs whose every item is another domain's, picked at random, which pay for cold caches as
//! the tables outgrow them, and for nothing else.

use std::time::Instant;

use gnttab_abi::{DomId, EntryBodyV2, EntryFlags, EntryHead, MapFlags, Op};
use gnttab_engine::{Config, DomainKind, Engine, Limits, Version};

use crate::flat::{Flat, FlatDomain};
use crate::mapping::{cold_memory, l, pairs};
use crate::report::Temperature;
use crate::sampler::{Case, Sampler};
use crate::scene::{Actor, FIRST_FRAME, Plan, SLOTS, Scene};

/// Domains at each point of the curve.
const POINTS: [u16; 5] = [1, 10, 100, 1000, 4000];

/// Frames of each domain's table.
const TABLE_FRAMES: u32 = 64;

/// Live mappings of each domain's references.
const LIVE: u32 = 250;

/// References of each domain that are measured; the live ones lie behind.
const MEASURED: u32 = 32;

/// Items of a hypercall.
const BATCH: u32 = 32;

const GRANTEE: DomId = DomId(5000);

/// One address for each live mapping, and those that are measured with.
fn place(index: u64) -> u64 {
    (1 + u64::from(SLOTS) + index) * 4096
}

fn name(what: &str, domains: u16) -> Case {
    Case {
        name: format!("scale/{what}/v1/{domains}-domains"),
        batch: BATCH,
        threads: 1,
        version: 1,
        temperature: if what == "one-domain" {
            Temperature::Warm
        } else {
            Temperature::Cold
        },
    }
}

pub(crate) fn run(sampler: &mut Sampler<'_>, most: u16) {
    let points: Vec<u16> = POINTS.into_iter().filter(|&point| point <= most).collect();
    let cases = points
        .iter()
        .flat_map(|&n| ["one-domain", "all-domains"].map(|what| name(what, n)));
    if !sampler.wants_any(cases) {
        return;
    }
    let scene = Scene {
        plan: Plan::warm(Version::V1),
        memory: cold_memory(),
        engine: Engine::new(
            Flat::new(cold_memory()),
            Config {
                max_grant_frames: TABLE_FRAMES,
                max_maptrack_frames: 8192,
                processors: 4,
                ..Config::default()
            },
        ),
    };
    let places = usize::from(most) * LIVE as usize + 2 * SLOTS as usize;
    create(&scene, GRANTEE, places);
    let mut actor = scene.actor_of(0, GRANTEE, 0, DomId(1));
    let mut there = 0;
    for domains in points {
        while there < domains {
            there += 1;
            add(&scene, &mut actor, there);
        }
        actor.granter = DomId(1);
        (0..BATCH).for_each(|slot| actor.prepare_pair(slot, slot, MapFlags::HOST_MAP));
        let mut body = |repetitions| {
            let start = Instant::now();
            pairs(&mut actor, BATCH, repetitions);
            Some(start.elapsed())
        };
        sampler.measure(name("one-domain", domains), BATCH, &mut body, "L", &mut l);
        let mut state = 1_u32;
        let mut body = |repetitions| {
            let mut time = std::time::Duration::ZERO;
            for _ in 0..repetitions {
                for slot in 0..SLOTS {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let number = 1 + (state >> 8) % u32::from(domains);
                    actor.granter = DomId(u16::try_from(number).unwrap_or(1));
                    actor.prepare_pair(slot, slot % MEASURED, MapFlags::HOST_MAP);
                }
                let start = Instant::now();
                for first in (0..SLOTS).step_by(BATCH as usize) {
                    actor.call(Op::MapGrantRef, first, BATCH);
                    actor.move_handles(first, BATCH);
                    actor.call(Op::UnmapGrantRef, first, BATCH);
                }
                time += start.elapsed();
                actor.assert_done(Op::UnmapGrantRef, SLOTS - 1);
            }
            Some(time)
        };
        sampler.measure(name("all-domains", domains), SLOTS, &mut body, "L", &mut l);
    }
}

fn create(scene: &Scene<'_>, id: DomId, places: usize) {
    scene
        .engine
        .create_domain(id, DomainKind::Pv, Limits::default(), FlatDomain::new(id, places))
        .expect("a new domain");
}

/// Adds a domain that grants one frame by many references, most of which are then mapped for good.
fn add(scene: &Scene<'_>, actor: &mut Actor<'_, '_>, number: u16) {
    let id = DomId(number);
    create(scene, id, 0);
    let frame = FIRST_FRAME + u64::from(number);
    scene.engine.hypervisor().give(frame, id);
    let table = scene.table(id, TABLE_FRAMES);
    let head = EntryHead {
        flags: EntryFlags::PERMIT_ACCESS,
        domid: GRANTEE,
    };
    for index in 0..MEASURED + LIVE {
        scene.write_entry(&table, scene.gref(index), head, EntryBodyV2::FullPage { frame });
    }
    actor.granter = id;
    let first = u64::from(number - 1) * u64::from(LIVE);
    for (slot, live) in (0..LIVE).zip(first..) {
        actor.prepare_pair_at(slot, MEASURED + slot, MapFlags::HOST_MAP, place(live));
    }
    actor.call(Op::MapGrantRef, 0, LIVE);
    (0..LIVE).for_each(|slot| actor.assert_done(Op::MapGrantRef, slot));
}
