//! A running `gnttab disk`.

use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::schema;

/// `gnttab disk` in a process, serving an image in a folder of its own. Killed when dropped.
pub(crate) struct Served {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) uri: String,
    child: Child,
    out: BufReader<ChildStdout>,
    serving: Value,
}

impl Served {
    /// Serves the image that `make` makes, with more arguments. Waits until clients can come.
    pub(crate) fn new(args: &[&str], make: impl FnOnce(&Path)) -> Served {
        let folder = tempfile::tempdir().unwrap();
        make(&folder.path().join("disk.img"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_gnttab"));
        command
            .current_dir(folder.path())
            .env("XDG_RUNTIME_DIR", folder.path())
            .args(["disk", "disk.img", "--socket", "disk.sock", "--json"])
            .args(args)
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let serving = read_event(&mut out);
        assert_eq!(serving["event"], "serving", "{serving}");
        let uri = format!(
            "nbd+unix:///?socket={}",
            folder.path().join("disk.sock").display()
        );
        Served {
            folder,
            uri,
            child,
            out,
            serving,
        }
    }

    /// An image of `bytes` with content that differs everywhere.
    pub(crate) fn patterned(args: &[&str], bytes: usize) -> Served {
        Served::new(args, |path| {
            std::fs::write(path, super::client::pattern(7, bytes)).unwrap()
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.path("disk.img")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("disk.sock")
    }

    /// The process of a domain, by its name.
    pub(crate) fn pid(&self, domain: &str) -> i32 {
        let domains = self.serving["domains"].as_array().unwrap();
        let found = domains.iter().find(|other| other["name"] == domain).unwrap();
        found["pid"].as_i64().unwrap().try_into().unwrap()
    }

    /// The process of the command itself, which is the monitor.
    pub(crate) fn monitor(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// The next line of its output.
    pub(crate) fn event(&mut self) -> Value {
        read_event(&mut self.out)
    }

    /// Asks it to stop, as Ctrl-C does, and waits for its end and its last words.
    pub(crate) fn stop(mut self) -> (ExitStatus, Value) {
        kill(self.monitor(), "INT");
        let stopped = self.event();
        (self.wait(), stopped)
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_event(out: &mut impl std::io::BufRead) -> Value {
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    schema::line(&line)
}

/// Sends a signal to a process that this test started.
pub(crate) fn kill(pid: i32, signal: &str) {
    assert!(
        Command::new("kill")
            .args(["-s", signal, &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// Whether a program is there; says so if not.
pub(crate) fn have(program: &str) -> bool {
    let quiet = || Stdio::null();
    let found = Command::new(program)
        .arg("--help")
        .stdout(quiet())
        .stderr(quiet())
        .stdin(quiet())
        .status();
    if found.is_err() {
        eprintln!("skipped: {program} is not installed");
    }
    found.is_ok()
}

/// Runs a program that must succeed; what it printed.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{program} {args:?}\n{out}{err}");
    out.into_owned()
}
