//! `gnttab run`: a machine from a file, with two disks one way and one the other, and a program of its own.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

struct Machine {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Machine {
    fn start(folder: &Path, file: &str) -> Machine {
        std::fs::write(folder.join("m.toml"), file).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_gnttab"))
            .env("XDG_RUNTIME_DIR", folder)
            .args(["run", "--json"])
            .arg(folder.join("m.toml"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Machine { child, lines }
    }

    fn event(&mut self, name: &str) -> Value {
        let event = schema::line(&self.lines.next().expect("a line").unwrap());
        assert_eq!(event["event"], name, "{event}");
        event
    }

    fn stop(mut self) -> bool {
        let stopped = Command::new("kill")
            .args(["-s", "TERM", &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(stopped.success());
        self.event("stopped");
        self.child.wait().unwrap().success()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const HEAD: &str = "[[domain]]\nname = \"one\"\n[[domain]]\nname = \"two\"\nmemory = \"32 MiB\"\nvcpus = 2\n";

fn disk(name: &str, backend: &str, frontend: &str) -> String {
    format!(
        "[[disk]]\nimage = \"{name}\"\nbackend = \"{backend}\"\nfrontend = \"{frontend}\"\nsocket = \"{name}.sock\"\n"
    )
}

#[test]
fn a_domain_serves_several_disks_and_uses_others() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (name, byte) in [("a", 1), ("b", 2), ("c", 3)] {
        std::fs::write(at(name), vec![byte; 1 << 20]).unwrap();
    }
    let file = format!(
        "{HEAD}{}{}{}",
        disk("a", "one", "two"),
        disk("b", "one", "two"),
        disk("c", "two", "one")
    );
    let mut machine = Machine::start(folder.path(), &file);
    for _ in 0..2 {
        assert_eq!(machine.event("started")["isolated"], true);
    }
    for _ in 0..3 {
        machine.event("serving");
    }
    let quiet = Command::new("qemu-img")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if quiet.is_err() {
        eprintln!("skipped the reading: qemu-img is not installed");
    } else {
        for name in ["a", "b", "c"] {
            let uri = format!("nbd+unix:///?socket={}", at(&format!("{name}.sock")).display());
            let compared = Command::new("qemu-img")
                .args(["compare", "-f", "raw", "-F", "raw", &uri])
                .arg(at(name))
                .output()
                .unwrap();
            assert!(compared.status.success(), "{name}: {compared:?}");
        }
    }
    assert!(machine.stop());
    for name in ["a.sock", "b.sock", "c.sock", "gnttab/m.control"] {
        assert!(!at(name).exists(), "{name} is left");
    }
}

#[test]
fn an_image_that_is_missing_makes_no_half_machine() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a"), vec![0; 4096]).unwrap();
    let file = format!("{HEAD}{}{}", disk("a", "one", "two"), disk("none", "one", "two"));
    std::fs::write(folder.path().join("m.toml"), file).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .env("XDG_RUNTIME_DIR", folder.path())
        .arg("run")
        .arg(folder.path().join("m.toml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("none: no such file"), "{error}");
    assert!(!folder.path().join("a.sock").exists());
}
