//! The raw hypercall door, in three ABIs, against the slow reference model.
//!
//! The model and everything that is compared after each step are those of
//! `crates/engine/tests/model`, which proptest plays too: statuses and every byte of the arguments,
//! every frame's content, physmaps, handles, pins and their users, limits; every few steps the books
//! (references, types, free handles, locks); at the end everybody dies and nothing may be left. Here
//! the steps come from the fuzzer, which sees which code of the engine they reach.
//!
//! An input is a head of six bytes, two for each of three domains, and records of 16: a kind of
//! step and its choices. A record of a step that has something else in its middle takes up to three
//! of the records that follow for that.

// The same files as in the engine's own test: what one of them does not use, the other does.
#[rustfmt::skip]
#[path = "../../crates/engine/tests/model/spec.rs"]
mod spec;
#[rustfmt::skip]
#[path = "../../crates/engine/tests/model/step.rs"]
mod step;
#[rustfmt::skip]
#[path = "../../crates/engine/tests/model/world.rs"]
mod world;

use gnttab_engine::DomainKind;

use self::spec::Limits;
use self::step::{Step, What};
use self::world::World;
use crate::input::Input;

const RECORD: usize = 16;
/// Longer inputs say nothing that several short ones do not.
const MOST_STEPS: usize = 40;
/// The books are audited after so many steps, and at the end: what is wrong in them stays wrong, and an
/// audit takes as long as all the rest. A replay audits after each, to tell which step it was.
const AUDITED: u32 = 8;

const KINDS: [What; 22] = [
    What::Entry,
    What::Twist,
    What::Map,
    What::Unmap,
    What::Copy,
    What::UnmapAround,
    What::CopyAround,
    What::Replace,
    What::Swap,
    What::Version,
    What::Setup,
    What::StatusFrames,
    What::Query,
    What::Door,
    What::Transfer,
    What::Place,
    What::Touch,
    What::OwnMap,
    What::Page,
    What::Kill,
    What::Create,
    What::Flood,
];

/// Plays an input on engine and model.
///
/// # Panics
/// When they differ, or an audit finds something.
pub fn run(input: &[u8]) {
    let (head, records) = input.split_at(input.len().min(6));
    let limits = scene(&mut Input::new(head));
    let inside = records.len() % 2 == 1;
    let mut world = Told(World::new(&limits).with_work_inside(inside));
    // A finding is told when it is replayed.
    world.0.tells = !cfg!(fuzzing);
    world.0.check();
    let mut records = records.chunks(RECORD).take(MOST_STEPS);
    let mut taken = 0;
    while let Some(record) = records.next() {
        let mut step = plain(record);
        if matches!(step.what, What::UnmapAround | What::CopyAround) {
            let inner = usize::from(record[0]) / KINDS.len() % 3 + 1;
            let inner = records.by_ref().take(inner).map(plain);
            step.inner = inner.filter(|step| is_plain(step.what)).collect();
        }
        world.0.take(&step);
        world.0.compare_all();
        taken += 1;
        if taken % AUDITED == 0 || !cfg!(fuzzing) {
            world.0.audit();
        }
    }
    world.0.audit();
    world.0.end();
}

/// The world, which says what was done to it if something is wrong.
struct Told(World);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0.trace.join("\n"));
        }
    }
}

fn is_plain(what: What) -> bool {
    !matches!(what, What::UnmapAround | What::CopyAround)
}

fn plain(record: &[u8]) -> Step {
    Step {
        what: KINDS[usize::from(record[0]) % KINDS.len()],
        choices: record[1..].to_vec(),
        inner: Vec::new(),
    }
}

/// Three domains of x86 or of Arm.
fn scene(head: &mut Input<'_>) -> Vec<Limits> {
    let mut arm = None;
    (0..3)
        .map(|_| {
            let (who, size) = (head.byte(), head.byte());
            let arm = *arm.get_or_insert(who & 0xF0 == 0xF0);
            let kind = match who & 1 {
                _ if arm => DomainKind::Arm,
                0 => DomainKind::Pv,
                _ => DomainKind::Hvm,
            };
            let max_version = if who & 14 == 14 { 1 } else { 2 };
            Limits {
                kind,
                max_version,
                version: if size & 0x40 == 0 { max_version } else { 1 },
                max_frames: 1 + u32::from(size & 15) % 11,
                maptrack_frames: [1, 1, 2, 0][usize::from(size >> 4 & 3)],
                iommu: size & 0x80 != 0 && kind == DomainKind::Pv,
            }
        })
        .collect()
}
