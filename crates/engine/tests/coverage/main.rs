//! Every operation × version × caller's kind × answer, and who reaches it: `docs/coverage.md` says so
//! and is held to it.
//!
//! The vectors say what they must be answered, and are run by `vectors`. Played here are random sequences,
//! always the same ones, as `model` plays others, and calls whose arguments cannot be read. An answer that
//! none of these reaches has its reason in `reasons.txt`, which may name a test that does. A cell without
//! anything fails, and so does a reason that nothing needs.
//! `GNTTAB_COVERAGE=write cargo test -p gnttab-engine --test coverage` writes the document's part anew.
//!
//! The version is that of the table that a call is about; for a vector, of the table its head names.

#![cfg(feature = "machine")]

#[path = "../vectors/script.rs"]
#[expect(dead_code, reason = "what runs the vectors uses the rest")]
mod script;
#[path = "../model/spec.rs"]
mod spec;
#[path = "../model/step.rs"]
mod step;
#[path = "../model/strategy.rs"]
mod strategy;
#[path = "../model/world.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use gnttab_abi::{Abi, Errno, GrantStatus, Op};
use gnttab_engine::DomainKind;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use world::Seen;

/// Random sequences that are played.
const SEQUENCES: u32 = 250;
const KINDS: [&str; 3] = ["PV", "HVM", "Arm"];
const BEGIN: &str = "<!-- generated: GNTTAB_COVERAGE=write cargo test -p gnttab-engine --test coverage -->\n";
const END: &str = "<!-- end of what is generated -->\n";

/// Who reaches a cell.
#[derive(Clone, Debug, Default)]
struct Reached {
    vectors: BTreeSet<String>,
    /// A call whose arguments cannot be read, or that has a count that cannot be.
    is_door: bool,
    is_random: bool,
}

type Cells = BTreeMap<Seen, Reached>;

/// Why cells are not reached by vectors and random sequences.
struct Reason {
    line: usize,
    /// Operations, kinds, versions, answers; an empty list is all.
    holds: [Vec<String>; 4],
    why: String,
}

impl Reason {
    fn covers(&self, cell: &Seen) -> bool {
        let words = [cell.op.name(), cell.kind, &cell.version.to_string(), &cell.answer];
        let mut pairs = self.holds.iter().zip(words);
        pairs.all(|(list, word)| list.is_empty() || list.iter().any(|one| one == word))
    }
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn reasons() -> Vec<Reason> {
    let text = read(&here("tests/coverage/reasons.txt"));
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(index, line)| {
            let (holds, why) = line
                .split_once(": ")
                .unwrap_or_else(|| panic!("reasons.txt: {line}"));
            let holds: Vec<Vec<String>> = holds
                .split_whitespace()
                .map(|list| {
                    list.split(',')
                        .filter(|word| *word != "*")
                        .map(str::to_owned)
                        .collect()
                })
                .collect();
            Reason {
                line: index + 1,
                holds: holds.try_into().unwrap_or_else(|_| panic!("four lists: {line}")),
                why: why.to_owned(),
            }
        })
        .collect()
}

/// The operation of a vector's call.
fn op_of(verb: &str, words: &[String]) -> Option<Op> {
    let name = match verb {
        "map" => "map_grant_ref",
        "unmap" => "unmap_grant_ref",
        "replace" => "unmap_and_replace",
        "setup" => "setup_table",
        "status_frames" => "get_status_frames",
        "query" => "query_size",
        "setver" => "set_version",
        "getver" => "get_version",
        "swap" => "swap_grant_ref",
        "flush" => "cache_flush",
        "dump" => "dump_table",
        "call" => words.first()?,
        other => other,
    };
    Op::ALL.into_iter().find(|op| op.name() == name)
}

fn has_status(op: Op) -> bool {
    !matches!(op, Op::SetVersion | Op::GetVersion | Op::CacheFlush)
}

fn status_names() -> impl Iterator<Item = String> {
    (-13..=0)
        .filter_map(|number| GrantStatus(number).name())
        .map(str::to_lowercase)
}

/// What the vectors must be answered.
fn vectors(cells: &mut Cells) {
    let folder = here("tests/vectors");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the vectors")
        .map(|file| file.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "txt"))
        .collect();
    files.sort();
    for path in files {
        let script = script::parse(&path.display().to_string(), &read(&path));
        for vector in &script.vectors {
            if vector.cannot.is_some() || vector.fails.is_some() {
                continue;
            }
            for step in &vector.steps {
                let script::Action::Call(call) = &step.action else {
                    continue;
                };
                let Some(op) = op_of(&call.verb, call.items.first().map_or(&[][..], Vec::as_slice)) else {
                    continue;
                };
                // C is the caller that the head is about.
                if step.actor.0 != 'C' {
                    continue;
                }
                let mut answers: BTreeSet<String> = BTreeSet::new();
                if call.rc != "0" {
                    answers.insert(call.rc.clone());
                } else if !has_status(op) {
                    answers.insert("okay".to_owned());
                }
                for word in call.results.iter().filter_map(|result| result.first()) {
                    let name = if word == "ok" { "okay" } else { word };
                    if status_names().any(|known| known == name) {
                        answers.insert(name.to_owned());
                    }
                }
                for kind in &vector.holds.kinds {
                    for version in &vector.holds.versions {
                        for answer in &answers {
                            let cell = Seen {
                                op,
                                version: *version,
                                kind: match kind {
                                    DomainKind::Pv => "PV",
                                    DomainKind::Hvm => "HVM",
                                    DomainKind::Arm => "Arm",
                                },
                                answer: answer.clone(),
                            };
                            cells.entry(cell).or_default().vectors.insert(vector.id.clone());
                        }
                    }
                }
            }
        }
    }
}

/// What random sequences are answered: always the same ones.
fn sequences(cells: &mut Cells) {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[0xC0; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = (strategy::scene(), strategy::steps(80));
    for number in 0..SEQUENCES {
        let (limits, steps) = strategy.new_tree(&mut runner).expect("a sequence").current();
        let mut world = world::World::new(&limits).with_work_inside(number % 8 == 7);
        steps.iter().for_each(|step| world.take(step));
        world.check();
        for seen in std::mem::take(&mut world.seen).into_keys() {
            let answer = seen.answer.to_owned();
            cells.entry(Seen { answer, ..seen }).or_default().is_random = true;
        }
        world.end();
    }
}

/// What each operation is answered at the door where its arguments cannot be read, with a count of one, of
/// two and of more than there can be, and as if it went on: by the engine and the slow model alike.
fn door(cells: &mut Cells) {
    use DomainKind::{Arm, Hvm, Pv};
    for (kinds, abi) in [([Pv, Hvm], Abi::X86_64), ([Arm, Arm], Abi::Arm)] {
        let pairs = kinds
            .into_iter()
            .flat_map(|kind| [1, 2].map(|version| (kind, version)));
        let limits: Vec<spec::Limits> = pairs
            .map(|(kind, version)| spec::Limits {
                kind,
                max_version: 2,
                version,
                max_frames: 4,
                maptrack_frames: 1,
                iommu: false,
            })
            .collect();
        let mut world = world::World::new(&limits);
        for caller in world.running() {
            for op in Op::ALL {
                for (opaque, count) in [(0, 1), (0, 2), (0, u32::MAX >> 1), (0, 1 << 31), (1 << 12, 1)] {
                    world.door(caller, abi, op.number() | opaque, count);
                }
            }
        }
        for seen in std::mem::take(&mut world.seen).into_keys() {
            cells.entry(seen).or_default().is_door = true;
        }
        world.end();
    }
}

/// Every cell that there is.
fn universe() -> impl Iterator<Item = Seen> {
    Op::ALL.into_iter().flat_map(|op| {
        let statuses = status_names().filter(move |name| has_status(op) || name == "okay");
        let errnos = Errno::ALL.iter().map(|errno| format!("-{}", errno.name()));
        statuses.chain(errnos).flat_map(move |answer| {
            KINDS.into_iter().flat_map(move |kind| {
                let answer = answer.clone();
                [1, 2].into_iter().map(move |version| Seen {
                    op,
                    version,
                    kind,
                    answer: answer.clone(),
                })
            })
        })
    })
}

fn show(reached: &Reached) -> String {
    let mut text = reached.vectors.first().cloned().unwrap_or_default();
    if reached.vectors.len() > 1 {
        let _ = write!(text, " +{}", reached.vectors.len() - 1);
    }
    for (letter, is_so) in [("D", reached.is_door), ("R", reached.is_random)] {
        if is_so {
            text.push_str(if text.is_empty() { "" } else { ", " });
            text.push_str(letter);
        }
    }
    text
}

/// The generated part of the document.
fn document(cells: &Cells, reasons: &[Reason]) -> String {
    let mut text = String::from(BEGIN);
    let note = |cell: &Seen| {
        let found = reasons.iter().position(|reason| reason.covers(cell));
        found.map_or("nobody".to_owned(), |index| format!("[{}]", index + 1))
    };
    for op in Op::ALL {
        let _ = write!(text, "\n### {op}\n\n| answer |");
        for kind in KINDS {
            let _ = write!(text, " {kind} v1 | {kind} v2 |");
        }
        text.push_str("\n|---|---|---|---|---|---|---|\n");
        let mut never: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let of_op: Vec<Seen> = universe().filter(|cell| cell.op == op).collect();
        for row in of_op.chunks(6) {
            let answer = &row[0].answer;
            if row.iter().all(|cell| !cells.contains_key(cell)) {
                let notes: BTreeSet<String> = row.iter().map(note).collect();
                let notes: Vec<String> = notes.into_iter().collect();
                never.entry(notes.join(" ")).or_default().push(answer.clone());
                continue;
            }
            let _ = write!(text, "| {answer} |");
            for cell in row {
                let _ = write!(text, " {} |", cells.get(cell).map_or_else(|| note(cell), show));
            }
            text.push('\n');
        }
        for (note, answers) in never {
            let _ = write!(text, "\nNever {}: {note}.\n", answers.join(", "));
        }
    }
    text.push_str("\n### Why not\n\n");
    for (index, reason) in reasons.iter().enumerate() {
        let _ = writeln!(text, "{}. {}", index + 1, reason.why);
    }
    text.push('\n');
    text.push_str(END);
    text
}

/// The tests that reasons name are there: ``test `FILE` `NAME` ``.
fn named_tests_are_there(reasons: &[Reason]) {
    for reason in reasons {
        let mut words = reason.why.split('`').skip(1).step_by(2);
        while let Some(file) = words.next() {
            if !file.ends_with(".rs") || !file.contains('/') {
                continue;
            }
            let name = words.next().expect("a file, then a test");
            let text = read(&here("../..").join(file));
            assert!(
                text.contains(&format!("fn {name}(")),
                "reasons.txt:{}: no {name} in {file}",
                reason.line
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_reached_or_says_why_not() {
        let mut cells = Cells::new();
        vectors(&mut cells);
        door(&mut cells);
        sequences(&mut cells);
        let reasons = reasons();
        named_tests_are_there(&reasons);

        let known: BTreeSet<Seen> = universe().collect();
        let mut wrong: Vec<String> = cells
            .keys()
            .filter(|cell| !known.contains(cell))
            .map(|cell| format!("reached, and no cell: {cell:?}"))
            .collect();
        let open = known.iter().filter(|cell| !cells.contains_key(cell));
        let open = open.filter(|cell| !reasons.iter().any(|reason| reason.covers(cell)));
        wrong.extend(open.map(|cell| {
            let Seen {
                op,
                version,
                kind,
                answer,
            } = cell;
            format!(
                "{} {kind} {version} {answer}: nobody reaches it, and reasons.txt does not say why",
                op.name()
            )
        }));
        for (index, reason) in reasons.iter().enumerate() {
            // The first reason that fits is the one that is given.
            let earlier = &reasons[..index];
            let given = known
                .iter()
                .filter(|cell| !cells.contains_key(cell) && reason.covers(cell));
            if !given
                .into_iter()
                .any(|cell| !earlier.iter().any(|other| other.covers(cell)))
            {
                wrong.push(format!("reasons.txt:{}: is the reason for nothing", reason.line));
            }
        }

        let path = here("../../docs/coverage.md");
        let old = read(&path);
        let (before, rest) = old.split_once(BEGIN).expect("where the generated part begins");
        let (_, after) = rest.split_once(END).expect("where the generated part ends");
        let new = format!("{before}{}{after}", document(&cells, &reasons));
        if std::env::var_os("GNTTAB_COVERAGE").is_some_and(|what| what == "write") {
            std::fs::write(&path, new).expect("docs/coverage.md can be written");
        } else if new != old {
            wrong.push(format!("docs/coverage.md is old: {}", BEGIN.trim()));
        }
        assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}
