//! The operations that are not in the path of data.
//!
//! Those that a guest calls with one argument only (the raw door refuses more) are measured by themselves;
//! `swap_grant_ref`, `transfer` and `cache_flush` in batches. A change of version is measured on an idle
//! table, once with one frame and once with 64.

use std::time::{Duration, Instant};

use gnttab_abi::{
    Abi, CacheFlush, CacheOp, DomId, DumpTable, EntryBodyV2, EntryFlags, EntryHead, GetStatusFrames,
    GetVersion, Op, QuerySize, SetVersion, SetupTable, SwapGrantRef, Transfer,
};
use gnttab_engine::{DomainKind, Version};

use crate::flat::Memory;
use crate::mapping::{BATCHES, VERSIONS, case, l};
use crate::report::Temperature;
use crate::sampler::{Case, Sampler};
use crate::scene::{Actor, Plan, SLOTS, Scene, grantee, granter};

pub(crate) fn run(sampler: &mut Sampler<'_>) {
    for version in VERSIONS {
        single(sampler, version);
        swap(sampler, version);
        transfer(sampler, version);
        cache_flush(sampler, version);
    }
    for frames in [1, 64] {
        set_version(sampler, frames);
    }
}

fn warm(what: &str, version: Version, batch: u32) -> Case {
    case(what, version, Temperature::Warm, 1, batch)
}

/// Puts one argument into slot 0.
macro_rules! put {
    ($actor:expr, $slot:expr, $op:expr, $kind:ident, $value:expr) => {{
        let mut bytes = [0; $kind::size(Abi::X86_64)];
        $value.encode(Abi::X86_64, &mut bytes).expect("room");
        $actor.put($op, $slot, &bytes);
    }};
}

/// The calls of one argument, each on the caller's own table of one frame.
fn single(sampler: &mut Sampler<'_>, version: Version) {
    let ops = [
        Op::QuerySize,
        Op::GetVersion,
        Op::SetupTable,
        Op::GetStatusFrames,
        Op::DumpTable,
    ];
    if !sampler.wants_any(ops.map(|op| warm(op.name(), version, 1))) {
        return;
    }
    let plan = Plan::warm(version);
    let memory = Memory::new(plan.memory());
    let scene = Scene::new(plan, &memory);
    let mut actor = scene.actor_of(0, granter(0), 0, granter(0));
    let dom = DomId::SELF;
    let frame_list = actor.list();
    for op in ops {
        match op {
            Op::QuerySize => put!(
                actor,
                0,
                op,
                QuerySize,
                QuerySize {
                    dom,
                    ..QuerySize::default()
                }
            ),
            Op::GetVersion => put!(
                actor,
                0,
                op,
                GetVersion,
                GetVersion {
                    dom,
                    ..GetVersion::default()
                }
            ),
            Op::SetupTable => {
                let ask = SetupTable {
                    dom,
                    nr_frames: 1,
                    frame_list,
                    ..SetupTable::default()
                };
                put!(actor, 0, op, SetupTable, ask);
            }
            Op::GetStatusFrames if version == Version::V2 => {
                let ask = GetStatusFrames {
                    dom,
                    nr_frames: 1,
                    frame_list,
                    ..GetStatusFrames::default()
                };
                put!(actor, 0, op, GetStatusFrames, ask);
            }
            Op::DumpTable => put!(
                actor,
                0,
                op,
                DumpTable,
                DumpTable {
                    dom,
                    ..DumpTable::default()
                }
            ),
            // There are none in version 1.
            _ => continue,
        }
        let mut body = |repetitions| {
            let start = Instant::now();
            (0..repetitions).for_each(|_| actor.call(op, 0, 1));
            Some(start.elapsed())
        };
        sampler.measure(warm(op.name(), version, 1), 1, &mut body, "L", &mut l);
        actor.assert_done(op, 0);
    }
}

/// Times all slots, batch by batch.
fn slots(actor: &mut Actor<'_, '_>, op: Op, batch: u32) -> Duration {
    let start = Instant::now();
    for first in (0..SLOTS).step_by(batch as usize) {
        actor.call(op, first, batch);
    }
    start.elapsed()
}

/// Measures `op` on all slots, which need no preparation between repetitions.
fn batches(sampler: &mut Sampler<'_>, actor: &mut Actor<'_, '_>, op: Op, version: Version) {
    for batch in BATCHES {
        let mut body = |repetitions| Some((0..repetitions).map(|_| slots(actor, op, batch)).sum());
        sampler.measure(warm(op.name(), version, batch), SLOTS, &mut body, "L", &mut l);
        actor.assert_done(op, SLOTS - 1);
    }
}

/// Neighbours change places.
fn swap(sampler: &mut Sampler<'_>, version: Version) {
    if !sampler.wants_any(BATCHES.map(|batch| warm(Op::SwapGrantRef.name(), version, batch))) {
        return;
    }
    let plan = Plan::warm(version);
    let memory = Memory::new(plan.memory());
    let scene = Scene::new(plan, &memory);
    let mut actor = scene.actor_of(0, granter(0), 0, granter(0));
    for slot in 0..SLOTS {
        let ask = SwapGrantRef {
            ref_a: scene.gref(slot & !1),
            ref_b: scene.gref(slot | 1),
            ..SwapGrantRef::default()
        };
        put!(actor, slot, Op::SwapGrantRef, SwapGrantRef, ask);
    }
    batches(sampler, &mut actor, Op::SwapGrantRef, version);
}

/// The caller's own pages, as a driver does before it hands them to a device. Arm domains alone may call it.
fn cache_flush(sampler: &mut Sampler<'_>, version: Version) {
    if !sampler.wants_any(BATCHES.map(|batch| warm(Op::CacheFlush.name(), version, batch))) {
        return;
    }
    let plan = Plan {
        kind: DomainKind::Arm,
        ..Plan::warm(version)
    };
    let memory = Memory::new(plan.memory());
    let scene = Scene::new(plan, &memory);
    let mut actor = scene.actor(0, 0, 0);
    for slot in 0..SLOTS {
        let ask = CacheFlush {
            dev_bus_addr: actor.local(slot) * 4096,
            offset: 0,
            length: 64,
            op: CacheOp::CLEAN,
        };
        put!(actor, slot, Op::CacheFlush, CacheFlush, ask);
    }
    batches(sampler, &mut actor, Op::CacheFlush, version);
}

/// Pages go over to the other domain and come back.
fn transfer(sampler: &mut Sampler<'_>, version: Version) {
    if !sampler.wants_any(BATCHES.map(|batch| warm(Op::Transfer.name(), version, batch))) {
        return;
    }
    let plan = Plan::warm(version);
    let memory = Memory::new(plan.memory());
    let scene = Scene::new(plan, &memory);
    let (one, other) = (granter(0), grantee(0));
    let frames = plan.table_frames();
    let tables = [one, other].map(|id| scene.table(id, frames));
    let mut actors =
        [(0, one, other), (1, other, one)].map(|(number, from, to)| scene.actor_of(number, from, 0, to));
    for slot in 0..SLOTS {
        for actor in &actors {
            let ask = Transfer {
                mfn: scene.frame(0, slot),
                domid: actor.granter,
                gref: scene.gref(slot),
                ..Transfer::default()
            };
            put!(actor, slot, Op::Transfer, Transfer, ask);
        }
    }
    for batch in BATCHES {
        let mut body = |repetitions| {
            let mut time = Duration::ZERO;
            for _ in 0..repetitions {
                for (actor, (receivers, giver)) in actors.iter_mut().zip([(1, one), (0, other)]) {
                    let head = EntryHead {
                        flags: EntryFlags::ACCEPT_TRANSFER,
                        domid: giver,
                    };
                    for slot in 0..SLOTS {
                        let body = EntryBodyV2::FullPage {
                            frame: u64::from(slot),
                        };
                        scene.write_entry(&tables[receivers], scene.gref(slot), head, body);
                    }
                    time += slots(actor, Op::Transfer, batch);
                    actor.assert_done(Op::Transfer, SLOTS - 1);
                }
            }
            Some(time)
        };
        let name = warm(Op::Transfer.name(), version, batch);
        sampler.measure(name, 2 * SLOTS, &mut body, "L", &mut l);
    }
}

/// To version 2 and back: two changes a repetition.
fn set_version(sampler: &mut Sampler<'_>, frames: u32) {
    let name = Case {
        name: format!("{}-{frames}/warm", Op::SetVersion.name()),
        ..warm(Op::SetVersion.name(), Version::V2, 1)
    };
    if !sampler.wants(&name.name) {
        return;
    }
    let plan = Plan {
        grants: frames * 512 - 8,
        ..Plan::warm(Version::V1)
    };
    let memory = Memory::new(plan.memory() + frames as usize);
    let scene = Scene::new(plan, &memory);
    let mut actor = scene.actor_of(0, granter(0), 0, granter(0));
    let mut body = |repetitions| {
        let start = Instant::now();
        for _ in 0..repetitions {
            for version in [2, 1] {
                put!(actor, 0, Op::SetVersion, SetVersion, SetVersion { version });
                actor.call(Op::SetVersion, 0, 1);
            }
        }
        Some(start.elapsed())
    };
    sampler.measure(name, 2, &mut body, "L", &mut l);
}
