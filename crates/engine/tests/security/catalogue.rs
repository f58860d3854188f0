//! `docs/advisories.md` answers for every number of the catalogue, and each answer can be followed to
//! a test that exists and runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, iter};

/// The numbers, one a line.
const NUMBERS: &str = include_str!("catalogue.txt");

/// How a last cell begins that says why there is no test.
const NO_TEST: &str = "cannot apply: ";

/// A row of one of the chapter's tables that begins with numbers of the catalogue.
struct Row {
    numbers: Vec<String>,
    cells: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn chapter() -> String {
    fs::read_to_string(root().join("docs/advisories.md")).expect("the chapter is there")
}

fn numbers() -> BTreeSet<&'static str> {
    let lines = NUMBERS.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

/// Whether something has the form of a number: `XSA-18`, `N-04`, `L-16`, `R-03`.
fn is_number(text: &str) -> bool {
    text.split_once('-').is_some_and(|(kind, digits)| {
        ["XSA", "N", "L", "R"].contains(&kind)
            && !digits.is_empty()
            && digits.bytes().all(|b| b.is_ascii_digit())
    })
}

/// The tables' rows: the first cell is one number or several, each perhaps with a remark in brackets.
fn rows(chapter: &str) -> Vec<Row> {
    let lines = chapter.lines().filter_map(|line| {
        let inside = line.trim().strip_prefix('|')?.strip_suffix('|')?;
        Some(inside.split('|').map(|cell| cell.trim().to_owned()).collect())
    });
    let rows = lines.map(|cells: Vec<String>| {
        let names = cells[0].split(',').map(|name| {
            let name = name.split_once('(').map_or(name, |(name, _)| name);
            name.trim().to_owned()
        });
        let numbers = names.filter(|name| is_number(name)).collect();
        Row { numbers, cells }
    });
    rows.filter(|row| !row.numbers.is_empty()).collect()
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Tests of a source file: functions with a `test` attribute that nothing switches off.
fn tests_of(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let (mut test, mut off) = (false, false);
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[") {
            test |= line.starts_with("#[test]") || line.contains("::test]");
            off |= line.starts_with("#[ignore");
        } else if let Some(name) = function(line) {
            if test && !off {
                found.insert(name.to_owned());
            }
            (test, off) = (false, false);
        }
    }
    found
}

fn function(line: &str) -> Option<&str> {
    let line = line.strip_prefix("async ").unwrap_or(line);
    let rest = line.strip_prefix("fn ")?;
    rest.split_once(['(', '<']).map(|(name, _)| name)
}

/// Where a cell leads: `crate/path::function` is a test in `crates/crate/path.rs`,
/// `crate/path.ext: words` a file that has these words.
struct Sources(BTreeMap<PathBuf, BTreeSet<String>>);

impl Sources {
    fn check(&mut self, target: &str) -> Result<(), String> {
        let crates = root().join("crates");
        if let Some((path, name)) = target.rsplit_once("::") {
            let path = crates.join(path).with_extension("rs");
            if !self.0.contains_key(&path) {
                let source = fs::read_to_string(&path).map_err(|_| format!("no file for `{target}`"))?;
                self.0.insert(path.clone(), tests_of(&source));
            }
            let known = self.0[&path].contains(name);
            return known.then_some(()).ok_or(format!("no test `{target}`"));
        }
        let (path, words) = target
            .split_once(": ")
            .ok_or(format!("`{target}` leads nowhere"))?;
        let text = fs::read_to_string(crates.join(path)).map_err(|_| format!("no file for `{target}`"))?;
        let known = text.contains(words);
        known.then_some(()).ok_or(format!("nothing like `{target}`"))
    }
}

/// Everything that is wrong with a row.
fn faults(row: &Row, sources: &mut Sources) -> Vec<String> {
    let name = row.numbers.join(", ");
    let mut faults = Vec::new();
    if row.cells.len() != 4 {
        faults.push(format!("{name}: {} cells, not 4", row.cells.len()));
    }
    if row.cells.iter().any(String::is_empty) {
        faults.push(format!("{name}: an empty cell"));
    }
    let last = row.cells.last().map_or("", String::as_str);
    if row.cells.iter().any(|cell| cell == "open") {
        faults.push(format!("{name}: a cell that is still open"));
    }
    if let Some(reason) = last.strip_prefix(NO_TEST) {
        if reason.len() < 20 {
            faults.push(format!("{name}: `{reason}` is no reason"));
        }
        return faults;
    }
    let targets = quoted(last);
    if targets.is_empty() {
        faults.push(format!("{name}: names neither a test nor why there is none"));
    }
    let wrong = targets.iter().filter_map(|target| sources.check(target).err());
    faults.extend(wrong.map(|wrong| format!("{name}: {wrong}")));
    faults
}

#[test]
fn every_number_has_a_row_and_every_row_a_test() {
    let rows = rows(&chapter());
    let mut sources = Sources(BTreeMap::new());
    let mut wrong: Vec<String> = rows.iter().flat_map(|row| faults(row, &mut sources)).collect();
    let answered: BTreeSet<&str> = rows
        .iter()
        .flat_map(|row| row.numbers.iter().map(String::as_str))
        .collect();
    let numbers = numbers();
    assert_eq!(numbers.len(), 93 + 38 + 50 + 18 + 15, "the catalogue is whole");
    wrong.extend(numbers.difference(&answered).map(|n| format!("{n}: no row")));
    wrong.extend(
        answered
            .difference(&numbers)
            .map(|n| format!("{n}: not in the catalogue")),
    );
    assert!(wrong.is_empty(), "docs/advisories.md:\n{}", wrong.join("\n"));
}

/// The check checks: each of these rows is wrong.
#[test]
fn a_bad_row_is_seen() {
    let this = "engine/tests/security/catalogue";
    let good = format!("| XSA-1 (part) | wrong | rule | `{this}::a_bad_row_is_seen` |");
    let vector = "| N-01 | wrong | rule | `engine/tests/vectors/a02_map.txt: M-01` |";
    let excused = "| L-01, L-02 | wrong | rule | cannot apply: there is nothing of that kind here |";
    let bad = [
        format!("| XSA-1 | | rule | `{this}::a_bad_row_is_seen` |"),
        format!("| XSA-1 | wrong | rule | `{this}::no_such_test` |"),
        format!("| XSA-1 | wrong | rule | `{this}::faults` |"),
        "| XSA-1 | wrong | rule | `engine/tests/security/nowhere::test` |".into(),
        "| XSA-1 | wrong | rule | `engine/tests/vectors/a02_map.txt: M-9999` |".into(),
        "| XSA-1 | open | rule | `engine/tests/vectors/a02_map.txt: M-01` |".into(),
        "| XSA-1 | wrong | rule | somewhere |".into(),
        "| XSA-1 | wrong | rule | cannot apply: so |".into(),
        "| XSA-1 | wrong | rule |".into(),
    ];
    let good = [good, vector.into(), excused.into()].map(|row| (row, true));
    let all = good.into_iter().chain(bad.into_iter().zip(iter::repeat(false)));
    for (row, is_good) in all {
        let parsed = rows(&row);
        assert_eq!(parsed.len(), 1, "{row}");
        let faults = faults(&parsed[0], &mut Sources(BTreeMap::new()));
        assert_eq!(faults.is_empty(), is_good, "{row}: {faults:?}");
    }
}
