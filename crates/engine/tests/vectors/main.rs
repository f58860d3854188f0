//! Every test vector of the specification's appendix A, run against the engine.
//!
//! The vectors are data: see `README.md` beside this file for their language. A vector that is
//! missing here, or has neither steps nor a reason for having none, fails the test.

#![cfg(feature = "machine")]

mod rig;
mod run;
mod script;

use gnttab_engine::DomainKind;
use run::{Case, run};
use script::{Script, Step, Vector, parse};

/// The tables of the appendix: how many rows each has, and our file of it.
const TABLES: [(char, usize, &str, &str); 14] = [
    ('H', 28, "a01_door.txt", include_str!("a01_door.txt")),
    ('M', 110, "a02_map.txt", include_str!("a02_map.txt")),
    ('U', 47, "a03_unmap.txt", include_str!("a03_unmap.txt")),
    ('R', 15, "a04_replace.txt", include_str!("a04_replace.txt")),
    (
        'S',
        26,
        "a05_setup_table.txt",
        include_str!("a05_setup_table.txt"),
    ),
    ('Q', 14, "a06_query.txt", include_str!("a06_query.txt")),
    (
        'V',
        29,
        "a07_set_version.txt",
        include_str!("a07_set_version.txt"),
    ),
    (
        'F',
        12,
        "a08_get_status_frames.txt",
        include_str!("a08_get_status_frames.txt"),
    ),
    ('W', 12, "a09_swap.txt", include_str!("a09_swap.txt")),
    ('T', 31, "a10_transfer.txt", include_str!("a10_transfer.txt")),
    ('C', 81, "a11_copy.txt", include_str!("a11_copy.txt")),
    (
        'K',
        22,
        "a12_cache_flush.txt",
        include_str!("a12_cache_flush.txt"),
    ),
    ('X', 34, "a13_memory.txt", include_str!("a13_memory.txt")),
    ('L', 18, "a14_life.txt", include_str!("a14_life.txt")),
];

/// The file of a table, read.
fn script(letter: char) -> Script {
    let table = TABLES.iter().find(|table| table.0 == letter);
    let (_, _, file, text) = table.expect("a table of the appendix");
    parse(file, text)
}

/// Every case that a vector's head asks for: kinds of caller, versions, references, and batches
/// once whole and once broken off before every item.
fn cases(vector: &Vector) -> Vec<Case> {
    let holds = &vector.holds;
    let batches = vector.steps.iter().any(Step::is_batch);
    let breaking = match batches && holds.setting("whole").is_none() {
        true => &[false, true][..],
        false => &[false],
    };
    let mut cases = Vec::new();
    for &kind in &holds.kinds {
        for &version in &holds.versions {
            for &reference in &holds.references {
                for &eager in breaking {
                    let abi = holds.abi(kind);
                    cases.push(Case {
                        kind,
                        version,
                        reference,
                        abi,
                        eager,
                    });
                }
            }
        }
    }
    cases
}

/// Runs a table's vectors and panics with all that went wrong.
fn run_table(letter: char) {
    let script = script(letter);
    let mut wrong = Vec::new();
    for vector in &script.vectors {
        let mut failed = Vec::new();
        for case in cases(vector) {
            if vector.cannot.is_some() {
                continue;
            }
            if let Err(what) = run(&script, vector, case) {
                let Case {
                    kind,
                    version,
                    reference,
                    abi,
                    eager,
                } = case;
                let reference = rig::reference_name(reference);
                let kind = match kind {
                    DomainKind::Pv => "PV",
                    DomainKind::Hvm => "HVM",
                    DomainKind::Arm => "Arm",
                };
                let how = if eager { ", broken off" } else { "" };
                failed.push(format!(
                    "{} ({kind} {abi:?}, v{version}, {reference}{how}): {what}",
                    vector.id
                ));
            }
        }
        match &vector.fails {
            None => wrong.extend(failed),
            Some(why) if failed.is_empty() => {
                wrong.push(format!("{} does not fail any more ({why})", vector.id))
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{} failed:\n{}", wrong.len(), wrong.join("\n"));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_vector_of_the_specification_is_here() {
        for (letter, rows, file, _) in TABLES {
            let script = script(letter);
            let ours: BTreeSet<_> = script.vectors.iter().map(|vector| vector.id.clone()).collect();
            let theirs: BTreeSet<_> = (1..=rows).map(|row| format!("{letter}-{row:02}")).collect();
            assert_eq!(ours, theirs, "{file}");
        }
        assert_eq!(TABLES.iter().map(|table| table.1).sum::<usize>(), 479);
    }

    #[test]
    fn door() {
        run_table('H');
    }

    #[test]
    fn map() {
        run_table('M');
    }

    #[test]
    fn unmap_grant_ref() {
        run_table('U');
    }

    #[test]
    fn unmap_and_replace() {
        run_table('R');
    }

    #[test]
    fn setup_table() {
        run_table('S');
    }

    #[test]
    fn query_size_and_get_version() {
        run_table('Q');
    }

    #[test]
    fn set_version() {
        run_table('V');
    }

    #[test]
    fn get_status_frames() {
        run_table('F');
    }

    #[test]
    fn swap_grant_ref() {
        run_table('W');
    }

    #[test]
    fn transfer() {
        run_table('T');
    }

    #[test]
    fn copy() {
        run_table('C');
    }

    #[test]
    fn cache_flush() {
        run_table('K');
    }

    #[test]
    fn memory_operations() {
        run_table('X');
    }

    #[test]
    fn creation_and_death() {
        run_table('L');
    }
}
