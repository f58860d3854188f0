//! Plays the specification's vectors on a real Xen: the engine's own files, read and run by the
//! engine's own runner, with a rig of real domains.

use std::collections::BTreeMap;

use gnttab_engine::{DomainKind, Reference};
use serde::Serialize;

use crate::accepted::Accepted;
use crate::engine_world::Settings;
use crate::real_xen::{RealXen, Tools, XenError};
use crate::rig::{CANNOT, cannot, options, set_machine, take_unseen};
use crate::run::{Case, run};
use crate::script::{Script, Vector, parse};
use crate::session::reference_of;

/// The tables of the appendix.
const TABLES: [(&str, &str); 14] = [
    (
        "a01_door.txt",
        include_str!("../../crates/engine/tests/vectors/a01_door.txt"),
    ),
    (
        "a02_map.txt",
        include_str!("../../crates/engine/tests/vectors/a02_map.txt"),
    ),
    (
        "a03_unmap.txt",
        include_str!("../../crates/engine/tests/vectors/a03_unmap.txt"),
    ),
    (
        "a04_replace.txt",
        include_str!("../../crates/engine/tests/vectors/a04_replace.txt"),
    ),
    (
        "a05_setup_table.txt",
        include_str!("../../crates/engine/tests/vectors/a05_setup_table.txt"),
    ),
    (
        "a06_query.txt",
        include_str!("../../crates/engine/tests/vectors/a06_query.txt"),
    ),
    (
        "a07_set_version.txt",
        include_str!("../../crates/engine/tests/vectors/a07_set_version.txt"),
    ),
    (
        "a08_get_status_frames.txt",
        include_str!("../../crates/engine/tests/vectors/a08_get_status_frames.txt"),
    ),
    (
        "a09_swap.txt",
        include_str!("../../crates/engine/tests/vectors/a09_swap.txt"),
    ),
    (
        "a10_transfer.txt",
        include_str!("../../crates/engine/tests/vectors/a10_transfer.txt"),
    ),
    (
        "a11_copy.txt",
        include_str!("../../crates/engine/tests/vectors/a11_copy.txt"),
    ),
    (
        "a12_cache_flush.txt",
        include_str!("../../crates/engine/tests/vectors/a12_cache_flush.txt"),
    ),
    (
        "a13_memory.txt",
        include_str!("../../crates/engine/tests/vectors/a13_memory.txt"),
    ),
    (
        "a14_life.txt",
        include_str!("../../crates/engine/tests/vectors/a14_life.txt"),
    ),
];

/// What became of the vectors.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Played {
    /// Rows that held, in how many cases.
    pub(crate) held: BTreeMap<String, u32>,
    /// Rows that did not, with what was seen.
    pub(crate) differ: BTreeMap<String, String>,
    /// Rows that did not, and that are listed.
    pub(crate) listed: BTreeMap<String, String>,
    /// Rows of which some case cannot be played, with the reason.
    pub(crate) cannot: BTreeMap<String, String>,
    /// Checks that were passed over: a real Xen does not show what they ask.
    pub(crate) unseen: u64,
}

impl Played {
    /// How many cases were played to their end.
    pub(crate) fn cases(&self) -> u64 {
        self.held.values().map(|cases| u64::from(*cases)).sum()
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        let mut rows: Vec<&String> = self.held.keys().chain(self.differ.keys()).collect();
        rows.extend(self.listed.keys().chain(self.cannot.keys()));
        rows.sort();
        rows.dedup();
        rows.len()
    }
}

/// Plays the rows whose number begins with `only`.
pub(crate) fn play(
    tools: &Tools,
    settings: Settings,
    accepted: &Accepted,
    only: &str,
) -> Result<Played, XenError> {
    let scripts: Vec<Script> = TABLES.iter().map(|(file, text)| parse(file, text)).collect();
    let mut played = Played::default();
    let mut machine = String::from("none");
    let mut reference = Reference::V4_17;
    let mut blocks: Vec<(&Script, &Vector)> = Vec::new();
    for script in &scripts {
        for vector in script.vectors.iter().filter(|vector| vector.id.starts_with(only)) {
            match cannot(vector) {
                Some(why) => {
                    played.cannot.entry(vector.id.clone()).or_insert(why);
                }
                None => blocks.push((script, vector)),
            }
        }
    }
    // One machine for all that ask for the same options.
    blocks.sort_by_key(|(_, vector)| options(vector));
    for (script, vector) in blocks {
        let wanted = options(vector);
        let there = set_machine(None);
        let xen = match there {
            Some(xen) if machine == wanted => xen,
            old => {
                drop(old);
                let xen = RealXen::start(tools, settings, &wanted)?;
                machine = wanted;
                reference = reference_of(xen.version);
                xen
            }
        };
        set_machine(Some(xen));
        if !vector.holds.references.contains(&reference) {
            let why = "a row of other versions of Xen".to_owned();
            played.cannot.entry(vector.id.clone()).or_insert(why);
            continue;
        }
        for &version in &vector.holds.versions {
            let case = Case {
                kind: DomainKind::Pv,
                version,
                reference,
                abi: gnttab_abi::Abi::X86_64,
                eager: false,
            };
            let outcome = run(script, vector, case);
            let id = vector.id.clone();
            match outcome {
                Ok(()) => *played.held.entry(id).or_default() += 1,
                Err(why) => match why.split_once(CANNOT) {
                    Some((_, why)) => {
                        played.cannot.insert(id, why.to_owned());
                    }
                    None => {
                        let what = format!("v{version}: {why}");
                        match accepted.of_vector(&vector.id, reference) {
                            Some(entry) => played.listed.insert(id, format!("{}: {what}", entry.id)),
                            None => played.differ.insert(id, what),
                        };
                    }
                },
            }
            // One that went wrong may have left anything behind.
            if played.differ.contains_key(&vector.id) || set_machine_is_gone() {
                machine = String::from("none");
            }
        }
    }
    set_machine(None);
    // Rows with several blocks: those that belong to another Xen are no news.
    played.cannot.retain(|id, _| !played.held.contains_key(id));
    played.unseen = take_unseen();
    Ok(played)
}

fn set_machine_is_gone() -> bool {
    let there = set_machine(None);
    let gone = there.is_none();
    set_machine(there);
    gone
}
