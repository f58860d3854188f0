//! Every test vector of the specification's appendix A, run against the engine.
//!
//! The vectors are data: see `README.md` beside this file for their language. A vector that is
//! missing here, or has neither steps nor a reason for having none, fails the test.

#[expect(dead_code, reason = "the runner follows the engine's doors")]
mod script;

use script::{Script, parse};

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
}
