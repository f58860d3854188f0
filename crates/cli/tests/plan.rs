//! `gnttab plan`: what it says of a machine is what the machine then uses.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn gnttab(folder: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .env("XDG_RUNTIME_DIR", folder)
        .current_dir(folder)
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn json(folder: &Path, args: &[&str]) -> Value {
    let (status, out, err) = gnttab(folder, args);
    assert_eq!(status, Some(0), "{args:?}: {err}");
    schema::line(&out)
}

const MACHINE: &str = r#"
[[domain]]
name = "storage"
[[domain]]
name = "app"
memory = "32 MiB"
[[disk]]
image = "image"
backend = "storage"
frontend = "app"
queues = 2
ring-order = 1
sharing = "SHARING"
socket = "nbd.sock"
"#;

struct Machine {
    child: Child,
    storage: u32,
}

impl Machine {
    fn start(folder: &Path) -> Machine {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gnttab"))
            .env("XDG_RUNTIME_DIR", folder)
            .current_dir(folder)
            .args(["run", "--json", "m.toml"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut storage = 0;
        loop {
            let event = schema::line(&lines.next().unwrap().unwrap());
            if event["name"] == "storage" {
                storage = u32::try_from(event["pid"].as_u64().unwrap()).unwrap();
            }
            if event["event"] == "serving" {
                break;
            }
        }
        // Nobody reads on: what else it says goes nowhere.
        std::thread::spawn(move || lines.for_each(drop));
        Machine { child, storage }
    }

    /// Stops the backend in its tracks, or lets it go on.
    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.storage.to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.signal("CONT");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An NBD client that has written more at once than anybody reads from it.
fn fill(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    let mut writer = stream.try_clone().unwrap();
    std::thread::spawn(move || {
        for number in 0..80_u64 {
            let mut request = b"\x25\x60\x95\x13\0\0\0\x01".to_vec();
            request.extend(number.to_be_bytes());
            request.extend((number << 17).to_be_bytes());
            request.extend((128_u32 << 10).to_be_bytes());
            request.resize(request.len() + (128 << 10), 0x5a);
            // The machine ends before it has taken all of them.
            if writer.write_all(&request).is_err() {
                return;
            }
        }
    });
    stream
}

/// Waits until a number of a domain is what was planned, and stays so; it is never more.
#[track_caller]
fn settles(folder: &Path, domain: &str, what: &str, look: impl Fn(&Value) -> u64, expected: u64) {
    settles_below(folder, domain, what, look, expected, expected);
}

/// Waits until a number of a domain is `expected`, and stays so; on the way it is never more than `planned`.
#[track_caller]
fn settles_below(
    folder: &Path,
    domain: &str,
    what: &str,
    look: impl Fn(&Value) -> u64,
    expected: u64,
    planned: u64,
) {
    let until = Instant::now() + Duration::from_secs(30);
    let mut seen = 0;
    let mut last = 0;
    while seen < 3 {
        assert!(
            Instant::now() < until,
            "{what} of {domain}: {last}, planned {expected}"
        );
        last = look(&json(folder, &["dump", domain, "--json"])["domain"]);
        assert!(last <= planned, "{what} of {domain}: {last}, planned {planned}");
        seen = if last == expected { seen + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Clients, in turn of one queue and of the other, of which each may have a part of a ring's requests under way:
/// more than enough to fill both rings.
const CLIENTS: usize = 10;

/// The clients fill the rings while the backend stands still; then it goes on.
fn holds(sharing: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("image"), vec![0; 16 << 20]).unwrap();
    let file = MACHINE.replace("SHARING", sharing);
    std::fs::write(folder.join("m.toml"), file).unwrap();
    let plan = json(folder, &["plan", "m.toml", "--json"]);
    let (storage, app) = (&plan["domains"][0], &plan["domains"][1]);

    let machine = Machine::start(folder);
    let maps = |domain: &Value| domain["maps"]["2"].as_u64().unwrap_or(0);
    // At rest: the rings alone.
    settles(
        folder,
        "app",
        "granted",
        |domain| number(&domain["granted"]),
        2 * 2,
    );
    settles(folder, "storage", "mappings", maps, 2 * 2);

    machine.signal("STOP");
    let _clients: Vec<_> = (0..CLIENTS).map(|_| fill(&folder.join("nbd.sock"))).collect();
    let references = number(&app["references"]);
    settles(
        folder,
        "app",
        "granted",
        |domain| number(&domain["granted"]),
        references - 8,
    );
    let frames = |domain: &Value| number(&domain["grant_frames"][0]);
    settles(
        folder,
        "app",
        "grant frames",
        frames,
        number(&app["grant_frames"]),
    );

    machine.signal("CONT");
    if sharing == "persistent" {
        settles(folder, "storage", "mappings", maps, number(&storage["handles"]));
        let frames = |domain: &Value| number(&domain["handles"][0]).div_ceil(256);
        settles(
            folder,
            "storage",
            "maptrack frames",
            frames,
            number(&storage["maptrack_frames"]),
        );
    } else {
        // What was mapped for requests goes with them; it was never more than planned.
        settles_below(
            folder,
            "storage",
            "mappings",
            maps,
            2 * 2,
            number(&storage["handles"]),
        );
        let handles = json(folder, &["dump", "storage", "--json"])["domain"]["handles"][0].clone();
        assert!(
            number(&handles).div_ceil(256) <= number(&storage["maptrack_frames"]),
            "{handles}"
        );
    }
}

#[test]
fn a_machine_with_persistent_grants_uses_what_was_planned() {
    holds("persistent");
}

#[test]
fn a_machine_that_maps_for_a_request_uses_what_was_planned() {
    holds("mapped");
}

#[test]
fn a_machine_that_copies_uses_what_was_planned() {
    holds("copied");
}

#[test]
fn the_example_is_planned_and_shows_its_arithmetic() {
    let folder = tempfile::tempdir().unwrap();
    let (status, example, _) = gnttab(folder.path(), &["plan", "--example"]);
    assert_eq!(status, Some(0));
    std::fs::write(folder.path().join("plan.toml"), example).unwrap();
    let (status, out, err) = gnttab(folder.path(), &["plan", "plan.toml"]);
    assert_eq!((status, &*err), (Some(0), ""));
    for words in [
        "4 queues x (4 ring pages + 128 slots x (32 segments + 1 indirect))",
        "2 queues x (2 ring pages + 256 to send + 256 to receive)",
        "Limits to set",
        "max_grant_frames=",
    ] {
        assert!(out.contains(words), "no '{words}' in:\n{out}");
    }
}

#[test]
fn a_description_that_is_wrong_is_refused_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let refuses = |content: &str, words: &[&str]| {
        std::fs::write(folder.join("p.toml"), content).unwrap();
        let (status, out, err) = gnttab(folder, &["plan", "p.toml"]);
        assert_eq!((status, &*out), (Some(2), ""), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
        for word in words {
            assert!(err.contains(word), "no '{word}' in: {err}");
        }
    };
    let two = "[[domain]]\nname = \"a\"\n[[domain]]\nname = \"b\"\n";
    refuses("", &["[[domain]]", "plan --example"]);
    refuses("[[domain]]\nname = \"a\"\ncolour = 1\n", &["line 3", "colour"]);
    refuses(
        &format!("{two}[[disk]]\nbackend = \"a\"\nfrontend = \"c\"\n"),
        &["line 7", "'c'"],
    );
    refuses(
        &format!("{two}[[disk]]\nbackend = \"a\"\nfrontend = \"a\"\n"),
        &["same domain"],
    );
    refuses(
        &format!("{two}[[network]]\nbackend = \"a\"\nfrontend = \"b\"\nqueues = 99\n"),
        &["line 8", "1..=16"],
    );
    let (status, _, err) = gnttab(folder, &["plan", "none.toml"]);
    assert_eq!(status, Some(1), "{err}");
    assert_eq!(gnttab(folder, &["plan"]).0, Some(2));

    // Limits that are too low: the plan is printed, and the exit code says so.
    let low = "[[domain]]\nname = \"a\"\ngrants = 600\ngrant-frames = 1\n";
    std::fs::write(folder.join("p.toml"), low).unwrap();
    let (status, out, err) = gnttab(folder, &["plan", "p.toml", "--json"]);
    assert_eq!(status, Some(1));
    let plan = schema::line(&out);
    assert_eq!(
        (&plan["fits"], &plan["domains"][0]["grant_frames"]),
        (&false.into(), &2.into())
    );
    assert!(err.contains("too low"), "{err}");
}
