//! Bytes of private state, counted by the allocator.

#![expect(unsafe_code, reason = "an allocator that counts is an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use gnttab_abi::{DomId, EntryBodyV2, EntryFlags, EntryHead, MapFlags, Op};
use gnttab_engine::{Config, DomainKind, Engine, Limits, Version};

use crate::flat::{Flat, FlatDomain, Memory};
use crate::scene::{Actor, FIRST_FRAME, Plan, SLOTS, Scene};

/// The system's allocator, and how much of it is in use.
pub struct Counting(AtomicUsize);

impl Counting {
    /// With nothing in use.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "made as a static, which a default cannot be"
    )]
    pub const fn new() -> Counting {
        Counting(AtomicUsize::new(0))
    }

    /// Bytes in use.
    pub fn in_use(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

// SAFETY: every call goes to the system's allocator as it is; counting touches no memory of the caller's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.0.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the block came from `alloc` above, with this layout, as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What something takes, and what it may take.
#[derive(Clone, Debug)]
pub struct Bytes {
    /// What.
    pub name: &'static str,
    /// Bytes each.
    pub bytes: f64,
    /// The most that is promised.
    pub promised: f64,
}

/// Domains that are counted.
const IDLE: u16 = 100;
const TABLE_FRAMES: u32 = 64;
/// Mappings that are counted: whole pages of handles.
const MAPPINGS: u32 = 32 * SLOTS;
const GRANTEE: DomId = DomId(5000);

/// Counts; `allocator` is the process's own.
#[must_use]
pub fn measure(allocator: &Counting) -> Vec<Bytes> {
    let plan = Plan {
        grants: MAPPINGS,
        ..Plan::warm(Version::V1)
    };
    let memory = Memory::new(2048);
    let config = Config {
        max_grant_frames: TABLE_FRAMES,
        ..Config::default()
    };
    let mut scene = Scene {
        plan,
        memory: &memory,
        engine: Engine::new(Flat::new(&memory), config),
    };
    let create = |scene: &Scene<'_>, id: DomId, places| {
        let private = FlatDomain::new(id, places);
        scene
            .engine
            .create_domain(id, DomainKind::Pv, Limits::default(), private)
            .expect("a new domain");
    };
    let mut figures = Vec::new();
    let mut figure = |name, bytes: usize, count: usize, promised| {
        figures.push(Bytes {
            name,
            bytes: bytes as f64 / count as f64,
            promised,
        });
    };

    let before = allocator.in_use();
    (1..=IDLE).for_each(|number| create(&scene, DomId(number), 0));
    figure(
        "a domain that grants and maps nothing",
        allocator.in_use() - before,
        usize::from(IDLE),
        1024.0,
    );

    create(&scene, GRANTEE, TABLE_FRAMES as usize * 512 + 2);
    let granters = [(3, Version::V1), (1, Version::V1), (2, Version::V2)];
    for (number, version) in granters {
        let id = DomId(number);
        scene.plan.version = version;
        drop(scene.table(id, 1));
        let before = allocator.in_use();
        let references = grant(&scene, id);
        let mut actor = scene.actor_of(0, GRANTEE, 0, id);
        for first in (0..references).step_by(SLOTS as usize) {
            let count = SLOTS.min(references - first);
            map(&mut actor, first, count);
            actor.move_handles(0, count);
            actor.call(Op::UnmapGrantRef, 0, count);
        }
        drop(actor);
        let bytes = allocator.in_use() - before;
        match number {
            1 => figure(
                "a version 1 reference that was used",
                bytes,
                references as usize,
                16.0,
            ),
            2 => figure(
                "a version 2 reference that was used",
                bytes,
                references as usize,
                24.0,
            ),
            // The first use of all makes handles, which are counted by themselves.
            _ => {}
        }
    }
    scene.plan.version = Version::V1;
    let mut actor = scene.actor_of(0, GRANTEE, 0, DomId(1));
    let before = allocator.in_use();
    for first in (0..MAPPINGS).step_by(SLOTS as usize) {
        map(&mut actor, first, SLOTS);
    }
    figure("a mapping", allocator.in_use() - before, MAPPINGS as usize, 16.0);
    figures
}

/// Grants one frame by every reference of a table of [`TABLE_FRAMES`]; how many there are.
fn grant(scene: &Scene<'_>, id: DomId) -> u32 {
    let frame = FIRST_FRAME + u64::from(id.0);
    scene.engine.hypervisor().give(frame, id);
    let table = scene.table(id, TABLE_FRAMES);
    let head = EntryHead {
        flags: EntryFlags::PERMIT_ACCESS,
        domid: GRANTEE,
    };
    let per_frame = if scene.plan.version == Version::V1 {
        512
    } else {
        256
    };
    let references = TABLE_FRAMES * per_frame - scene.gref(0).0;
    for index in 0..references {
        scene.write_entry(&table, scene.gref(index), head, EntryBodyV2::FullPage { frame });
    }
    references
}

/// Maps references from `first` on, in one call.
fn map(actor: &mut Actor<'_, '_>, first: u32, count: u32) {
    (0..count).for_each(|slot| actor.prepare_pair(slot, first + slot, MapFlags::HOST_MAP));
    actor.call(Op::MapGrantRef, 0, count);
    (0..count).for_each(|slot| actor.assert_done(Op::MapGrantRef, slot));
}
