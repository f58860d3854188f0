//! The changes, as `cargo mutants --list --json` has them.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A place in a file, as the compiler counts: from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

/// One change.
#[derive(Clone, Debug)]
pub struct Change {
    /// From 1; 0 is none.
    pub number: u32,
    pub file: String,
    pub genre: String,
    pub name: String,
    pub replacement: String,
    pub start: Place,
    pub end: Place,
}

fn place(value: &Value) -> Place {
    let number = |name: &str| usize::try_from(value[name].as_u64().expect("a number")).expect("small");
    Place {
        line: number("line"),
        column: number("column"),
    }
}

/// All changes of the engine's files that `wanted` names (modules, or lines of them), or of all.
pub fn changes(root: &Path, wanted: &[String]) -> Vec<Change> {
    let output = Command::new("cargo")
        .args(["mutants", "-p", "gnttab-engine", "--list", "--json"])
        .current_dir(root)
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "cargo mutants --list (cargo install cargo-mutants): {output:?}"
    );
    let list: Value = serde_json::from_slice(&output.stdout).expect("the list is JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let all = list.as_array().expect("an array").iter().zip(1_u32..);
    let all = all.map(|(value, number)| Change {
        number,
        file: text(&value["file"]),
        genre: text(&value["genre"]),
        name: text(&value["name"]),
        replacement: text(&value["replacement"]),
        start: place(&value["span"]["start"]),
        end: place(&value["span"]["end"]),
    });
    all.filter(|change| wanted.is_empty() || wanted.iter().any(|wanted| change.is_in(wanted)))
        .collect()
}

impl Change {
    pub fn module(&self) -> &str {
        Path::new(&self.file)
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default()
    }

    /// `module`, or `module:line`.
    fn is_in(&self, place: &str) -> bool {
        let (module, line) = place
            .split_once(':')
            .map_or((place, None), |(module, line)| (module, Some(line)));
        self.module() == module && line.is_none_or(|line| line.parse() == Ok(self.start.line))
    }
}
