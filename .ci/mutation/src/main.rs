//! Mutation testing of the engine in one build.
//!
//! `cargo mutants` says which changes there are; it would build the tests anew for each. Here all of them
//! are in one copy of the engine, each behind a switch, and `GNTTAB_MUTANT=N` turns on one. What cannot be
//! behind a switch (constants, values of other types) is built alone if it compiles at all.
//!
//! ```sh
//! cargo run --release --manifest-path .ci/mutation/Cargo.toml -- [module|module:line...] > found.md
//! ```
//!
//! Prints a table for each module and each change that no test noticed.

mod list;
mod weave;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{env, fs};

use serde_json::Value;

use list::Change;

/// The tests that are asked, in this order, behind the unit tests.
const TESTS: [&str; 11] = [
    "args",
    "edges",
    "memory_op",
    "observed",
    "machine_backends",
    "machine_scenes",
    "model",
    "vectors",
    "found",
    "security",
    "coverage",
];
/// So many of them are quick.
const QUICK: usize = 9;
const ENGINE: &str = "crates/engine";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Noticed,
    Hung,
    Missed,
    /// It does not compile.
    Senseless,
}

/// The copy that is changed.
struct Tree {
    root: PathBuf,
    target: PathBuf,
    originals: HashMap<String, String>,
    /// How well the tests are optimised: well if they are built once and run a thousand times.
    level: &'static str,
}

impl Tree {
    /// A copy of what is in the repository, without what was built.
    fn new(from: &Path) -> Tree {
        let root = from.join("target/mutation/tree");
        let _ = fs::remove_dir_all(&root);
        let files = Command::new("git")
            .args(["ls-files", "-z"])
            .current_dir(from)
            .output()
            .expect("git runs");
        for file in String::from_utf8(files.stdout)
            .expect("names are UTF-8")
            .split_terminator('\0')
        {
            let to = root.join(file);
            fs::create_dir_all(to.parent().expect("a folder")).expect("a folder is made");
            // A link or a file that is deleted but not yet gone.
            let _ = fs::copy(from.join(file), to);
        }
        let engine = root.join(ENGINE).join("src");
        fs::write(engine.join("switch.rs"), include_str!("switch.rs")).expect("the copy can be written");
        let lib = fs::read_to_string(engine.join("lib.rs")).expect("the engine has a lib.rs");
        let (before, after) = lib.split_once("\nmod ").expect("the engine has modules");
        fs::write(
            engine.join("lib.rs"),
            format!("{before}\nmod switch;\nmod {after}"),
        )
        .expect("as above");
        Tree {
            root,
            target: from.join("target/mutation/built"),
            originals: HashMap::new(),
            level: "3",
        }
    }

    fn original(&mut self, file: &str) -> String {
        let root = &self.root;
        let read = || fs::read_to_string(root.join(file)).expect("a file of the engine");
        self.originals.entry(file.to_owned()).or_insert_with(read).clone()
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.root.join(file), text).expect("the copy can be written");
    }

    fn cargo(&self, verb: &[&str], tests: bool) -> (bool, Vec<Value>) {
        let mut command = Command::new("cargo");
        command.args(verb).args([
            "--profile",
            "mutants",
            "-p",
            "gnttab-engine",
            "--message-format",
            "json",
            "-q",
        ]);
        if tests {
            command
                .arg("--lib")
                .args(TESTS.iter().flat_map(|test| ["--test", test]));
        } else {
            command.args(["--lib", "--all-features"]);
        }
        let output = command
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_PROFILE_MUTANTS_OPT_LEVEL", self.level)
            .env("RUSTFLAGS", "--cap-lints allow")
            .stderr(Stdio::null())
            .output()
            .expect("cargo runs");
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        (
            output.status.success(),
            lines
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
        )
    }

    /// The test programs, in order.
    fn build(&self) -> Option<Vec<PathBuf>> {
        let (built, messages) = self.cargo(&["test", "--no-run"], true);
        let found: HashMap<&str, PathBuf> = messages
            .iter()
            .filter_map(|message| {
                Some((
                    message["target"]["name"].as_str()?,
                    message["executable"].as_str()?.into(),
                ))
            })
            .collect();
        let order = std::iter::once("gnttab_engine").chain(TESTS);
        built.then(|| order.map(|name| found[name].clone()).collect())
    }
}

/// The changes that the compiler complains of, by what it says of the woven files.
fn blamed(tree: &Tree, messages: &[Value]) -> BTreeSet<u32> {
    let mut blamed = BTreeSet::new();
    for message in messages
        .iter()
        .map(|message| &message["message"])
        .filter(|message| message["level"] == "error")
    {
        for span in message["spans"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|span| span["is_primary"] == true)
        {
            let (Some(file), Some(line)) = (span["file_name"].as_str(), span["line_start"].as_u64()) else {
                continue;
            };
            let text = fs::read_to_string(tree.root.join(file)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().take(usize::try_from(line).unwrap_or(0)).collect();
            let switch = lines
                .iter()
                .rev()
                .find_map(|line| line.rsplit_once("crate::switch::on("));
            let number = switch
                .and_then(|(_, rest)| rest.split_once(')'))
                .and_then(|(number, _)| number.parse::<u32>().ok());
            blamed.extend(number);
        }
    }
    blamed
}

/// Weaves as many of the changes as compile together; the numbers of those.
fn weave_all(tree: &mut Tree, changes: &[Change]) -> BTreeSet<u32> {
    let files: BTreeSet<&str> = changes.iter().map(|change| change.file.as_str()).collect();
    let mut left: BTreeSet<u32> = changes.iter().map(|change| change.number).collect();
    loop {
        let mut woven = BTreeSet::new();
        for file in &files {
            let of_file = changes
                .iter()
                .filter(|change| change.file == *file && left.contains(&change.number));
            let (text, numbers) = weave::weave(&tree.original(file), &of_file.collect::<Vec<_>>());
            tree.write(file, &text);
            woven.extend(numbers);
        }
        left = woven;
        // The first is quick; the second sees what is there for tests only.
        let (mut good, mut messages) = tree.cargo(&["check"], false);
        if good {
            (good, messages) = tree.cargo(&["test", "--no-run"], true);
        }
        if good {
            return left;
        }
        let blamed = blamed(tree, &messages);
        eprintln!("{} woven, {} cannot be", left.len(), blamed.len());
        let before = left.len();
        left.retain(|number| !blamed.contains(number));
        assert!(left.len() < before, "nobody is to blame: {messages:#?}");
    }
}

/// One test program with one change on, until one of its tests fails; what it takes longer than
/// `patience` is a hang.
fn run(program: &Path, number: u32, folder: &Path, patience: Duration) -> End {
    let until = Instant::now() + patience;
    let mut child = Command::new(program)
        .current_dir(folder)
        .env("GNTTAB_MUTANT", number.to_string())
        .env("GNTTAB_MODEL_SHRINK", "0")
        .env("GNTTAB_MODEL_CASES", "25")
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a test program starts");
    let said = BufReader::new(child.stdout.take().expect("it was asked for"));
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        said.lines()
            .map_while(Result::ok)
            .try_for_each(|line| tell.send(line))
    });
    loop {
        match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) if !line.ends_with("FAILED") => continue,
            Ok(_) => child.kill().expect("a child can be killed"),
            Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                child.kill().expect("a child can be killed");
                child.wait().expect("a child can be waited for");
                return End::Hung;
            }
        }
        let status = child.wait().expect("a child can be waited for");
        return if status.success() {
            End::Missed
        } else {
            End::Noticed
        };
    }
}

/// How long each test may take: several times what it does without any change.
fn patience(programs: &[PathBuf], folder: &Path) -> Vec<Duration> {
    let timed = programs.iter().map(|program| {
        let begun = Instant::now();
        let end = run(program, 0, folder, Duration::from_secs(600));
        assert_eq!(end, End::Missed, "{} fails without any change", program.display());
        begun.elapsed() * 4 + Duration::from_secs(5)
    });
    timed.collect()
}

fn ask(programs: &[PathBuf], patience: &[Duration], number: u32, folder: &Path) -> End {
    let each = programs.iter().zip(patience);
    let mut ends = each.map(|(program, patience)| run(program, number, folder, *patience));
    ends.find(|end| *end != End::Missed).unwrap_or(End::Missed)
}

/// Every fourth, then every fourth of the rest and so on: a run that is cut short has seen all modules.
fn in_turn(changes: &[Change]) -> impl Iterator<Item = &Change> {
    (0..4).flat_map(|turn| changes.iter().skip(turn).step_by(4))
}

fn report(changes: &[Change], ends: &BTreeMap<u32, End>) {
    let modules: BTreeSet<&str> = changes.iter().map(Change::module).collect();
    println!(
        "| module | changes | no sense | noticed | by hanging | not noticed | score |\n|---|---|---|---|---|---|---|"
    );
    let line = |name: &str, of: &[&Change]| {
        let count = |end: End| {
            of.iter()
                .filter(|change| ends.get(&change.number) == Some(&end))
                .count()
        };
        let (noticed, hung, missed) = (count(End::Noticed), count(End::Hung), count(End::Missed));
        let (good, sense) = (noticed + hung, noticed + hung + missed);
        let percent = (good * 100).checked_div(sense).unwrap_or(100);
        let senseless = count(End::Senseless);
        let all = senseless + sense;
        println!(
            "| {name} | {all} | {senseless} | {noticed} | {hung} | {missed} | {good} of {sense}, {percent} % |"
        );
    };
    for module in modules {
        line(
            &format!("`{module}`"),
            &changes
                .iter()
                .filter(|change| change.module() == module)
                .collect::<Vec<_>>(),
        );
    }
    line("all", &changes.iter().collect::<Vec<_>>());
    println!();
    for change in changes
        .iter()
        .filter(|change| ends.get(&change.number) == Some(&End::Missed))
    {
        println!("- {}", change.name);
    }
}

fn main() {
    let modules: Vec<String> = env::args().skip(1).collect();
    let here = env::current_dir().expect("a folder");
    let mut tree = Tree::new(&here);
    let mut changes = list::changes(&here, &modules);
    changes.retain(|change| weave::seen(&tree.original(&change.file), change));
    let folder = tree.root.join(ENGINE);
    let mut ends: BTreeMap<u32, End> = BTreeMap::new();

    let woven = weave_all(&mut tree, &changes);
    let programs = tree.build().expect("what is woven compiles");
    let patience = patience(&programs, &folder);
    eprintln!(
        "{} of {} changes in one build; patience {patience:?}",
        woven.len(),
        changes.len()
    );
    // All are shown to the quick tests first; the slow ones see what is left.
    for asked in [0..QUICK + 1, QUICK + 1..programs.len()] {
        for change in in_turn(&changes).filter(|change| woven.contains(&change.number)) {
            if ends.get(&change.number).is_none_or(|end| *end == End::Missed) {
                let end = ask(
                    &programs[asked.clone()],
                    &patience[asked.clone()],
                    change.number,
                    &folder,
                );
                ends.insert(change.number, end);
                eprintln!("{end:?}: {}", change.name);
            }
        }
    }

    tree.level = "1";
    for file in changes.iter().map(|change| &change.file) {
        let original = tree.original(file);
        tree.write(file, &original);
    }
    for change in changes.iter().filter(|change| !woven.contains(&change.number)) {
        let original = tree.original(&change.file);
        tree.write(&change.file, &weave::alone(&original, change));
        let end = match tree.cargo(&["check"], false) {
            (false, _) => End::Senseless,
            // What compiles without the tests and not with them is noticed by a unit test's types.
            (true, _) => tree
                .build()
                .map_or(End::Noticed, |programs| ask(&programs, &patience, 0, &folder)),
        };
        tree.write(&change.file, &original);
        ends.insert(change.number, end);
        eprintln!("alone: {end:?}: {}", change.name);
    }
    report(&changes, &ends);
}
