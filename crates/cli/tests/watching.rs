//! `top`, `doctor` and `watch` on a machine that is in trouble: each finds what is wrong, and says who.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A machine with a page that is not given back, a full table, a consumer at its quota and a flood of refusals.
struct Trouble {
    folder: tempfile::TempDir,
    machine: Child,
}

fn gnttab(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gnttab"));
    command.env("XDG_RUNTIME_DIR", folder).args(args);
    command
}

impl Trouble {
    fn start() -> Trouble {
        let folder = tempfile::tempdir().unwrap();
        let mut machine = gnttab(folder.path(), &["demo", "--trouble", "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(machine.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains("\"ready\""), "{line}");
        Trouble { folder, machine }
    }

    fn run(&self, args: &[&str]) -> Output {
        gnttab(self.folder.path(), args).output().unwrap()
    }

    /// Every line as JSON.
    fn json(&self, args: &[&str]) -> Vec<Value> {
        let output = self.run(args);
        let lines = String::from_utf8(output.stdout).unwrap();
        lines.lines().map(schema::line).collect()
    }

    /// Looks until everything has gone wrong that will.
    fn wait(&self) -> Value {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let report = self.json(&["doctor", "--json", "--interval", "0.5"]).remove(0);
            if report["findings"].as_array().unwrap().len() >= 4 {
                return report;
            }
            assert!(Instant::now() < deadline, "{report}");
        }
    }
}

impl Drop for Trouble {
    fn drop(&mut self) {
        let _ = self.machine.kill();
        let _ = self.machine.wait();
    }
}

/// What was found: what, of which domain.
fn found(report: &Value) -> Vec<(&str, &str)> {
    let findings = report["findings"].as_array().unwrap();
    findings
        .iter()
        .map(|finding| {
            (
                finding["kind"].as_str().unwrap(),
                finding["name"].as_str().unwrap(),
            )
        })
        .collect()
}

const TROUBLE: [(&str, &str); 4] = [
    ("stuck", "lender"),
    ("full", "hoarder"),
    ("refused", "knocker"),
    ("quota", "lender"),
];

#[test]
fn doctor_top_and_watch_each_find_what_is_wrong_by_name() {
    let trouble = Trouble::start();
    let report = trouble.wait();
    assert_eq!(found(&report), TROUBLE);
    let stuck = &report["findings"][0];
    assert_eq!(
        (&stuck["peer"], &stuck["gref"]),
        (&Value::from(1), &Value::from(8))
    );
    assert!(stuck["what"].as_str().unwrap().contains("d1 keeper"), "{stuck}");

    let told = trouble.run(&["doctor"]);
    assert_eq!(told.status.code(), Some(1));
    let text = String::from_utf8(told.stdout).unwrap();
    for words in [
        "problem, stuck: d2 lender: wants reference 0x8 back; d1 keeper has kept it for",
        "problem, full: d3 hoarder: its grant table is full: 504 of 504 references",
        "problem, refused: d4 knocker: is refused",
        "mostly bad_gntref",
        "warning, quota: d2 lender: its consumer vif0 has 8 of its 8 references, refused once",
        "grant-frames = 2",
    ] {
        assert!(text.contains(words), "no '{words}' in:\n{text}");
    }

    let samples = trouble.json(&["top", "--batch", "--json", "--interval", "0.3", "--count", "2"]);
    assert_eq!(samples.len(), 2);
    for sample in &samples {
        assert_eq!(found(sample), TROUBLE);
    }
    let knocker = &samples[1]["domains"][3];
    assert!(
        knocker["per_second"]["errors"].as_f64().unwrap() > 10.0,
        "{knocker}"
    );
    let lines = String::from_utf8(
        trouble
            .run(&["top", "--batch", "--count", "1", "--sort", "errors"])
            .stdout,
    )
    .unwrap();
    assert!(lines.lines().nth(2).unwrap().contains("knocker"), "{lines}");
    assert!(
        lines.contains("! stuck: d2 lender: wants reference 0x8 back"),
        "{lines}"
    );

    let pending = trouble.json(&["watch", "--json", "--event", "pending", "--count", "1"]);
    assert_eq!(
        (&pending[0]["name"], &pending[0]["peer_name"], &pending[0]["gref"]),
        (&Value::from("lender"), &Value::from("keeper"), &Value::from(8))
    );
    let of_hoarder = trouble.json(&["watch", "--json", "--domain", "hoarder", "--count", "1"]);
    let detail = of_hoarder[0]["detail"].as_str().unwrap();
    assert!(detail.contains("its grant table is full"), "{detail}");
    let refused = trouble.json(&[
        "watch",
        "--json",
        "--status",
        "-3",
        "--operation",
        "map_grant_ref",
        "--count",
        "3",
    ]);
    for event in &refused {
        assert_eq!(
            (&event["event"], &event["name"], &event["status"]),
            (
                &Value::from("refused"),
                &Value::from("knocker"),
                &Value::from("bad_gntref")
            )
        );
    }
    let line = String::from_utf8(
        trouble
            .run(&["watch", "--event", "refused", "--domain", "d4", "--count", "1"])
            .stdout,
    );
    let line = line.unwrap();
    assert!(
        line.contains("refused   d4 knocker map_grant_ref ref 0x"),
        "{line}"
    );
    assert!(line.contains("of d1 keeper: bad_gntref"), "{line}");
}

#[test]
fn who_watches_hears_of_deaths_and_of_the_machines_end() {
    let mut trouble = Trouble::start();
    let report = trouble.wait();
    assert_eq!(report["domains"][0]["name"], "keeper");
    let top = trouble.json(&["top", "--batch", "--json", "--count", "1"]);
    let pid = top[0]["domains"][2]["pid"].as_u64().unwrap().to_string();
    let watch = gnttab(trouble.folder.path(), &["watch", "--json", "--event", "died"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It watches when the machine counts one more descriptor; it tells nothing before.
    std::thread::sleep(Duration::from_millis(500));
    let killed = Command::new("kill").args(["-s", "KILL", &pid]).status().unwrap();
    assert!(killed.success());
    // The demo ends when one of its domains does.
    assert!(!trouble.machine.wait().unwrap().success());
    let output = watch.wait_with_output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let event = schema::line(lines.lines().next().unwrap());
    assert_eq!(
        (&event["domain"], &event["detail"]),
        (&Value::from(3), &Value::from("killed by signal 9"))
    );
    assert!(output.status.success());
}

#[test]
fn without_a_machine_or_a_terminal_the_tools_say_so() {
    let folder = tempfile::tempdir().unwrap();
    for args in [&["top", "--batch"][..], &["doctor"], &["watch"]] {
        let output = gnttab(folder.path(), args).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("no machine of yours is running"), "{error}");
    }
    for args in [
        &["top", "--json"][..],
        &["top", "--interval", "0", "--batch"],
        &["watch", "--event", "flown"],
        &["watch", "--status", "fine"],
        &["doctor", "--interval", "x"],
    ] {
        let output = gnttab(folder.path(), args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

/// The processes whose command line contains a word.
fn processes_that_say(word: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.starts_with(env!("CARGO_BIN_EXE_gnttab")) && line.contains(word))
        .collect()
}

/// A terminal that is hung up ends `top`, which would otherwise read it for ever.
#[test]
fn top_ends_with_its_terminal() {
    let trouble = Trouble::start();
    let word = format!("--filter=hung-up-{}", std::process::id());
    let command = format!("exec {} top --interval 0.5 {word}", env!("CARGO_BIN_EXE_gnttab"));
    let terminal = Command::new("script")
        .args(["-qfc", &command, "/dev/null"])
        .env("XDG_RUNTIME_DIR", trouble.folder.path())
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    let Ok(mut terminal) = terminal else {
        println!("skipped: there is no script(1) to make a terminal");
        return;
    };
    let wait_until = |there: bool| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while processes_that_say(&word).is_empty() == there {
            assert!(Instant::now() < deadline, "top is there: {}", !there);
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    wait_until(true);
    // Long enough for it to have drawn something, and to wait for keys.
    std::thread::sleep(Duration::from_secs(2));
    assert!(!processes_that_say(&word).is_empty(), "top left by itself");
    terminal.kill().unwrap();
    terminal.wait().unwrap();
    wait_until(false);
}
