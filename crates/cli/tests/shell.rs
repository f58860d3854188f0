//! `gnttab shell`, `gnttab grant` and `gnttab map`: what the steps do to the entry, in memory and on a running machine.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What the steps of a script came to: done or not, the words, and the entry before and after.
fn play(script: &str) -> Vec<Value> {
    let output = assert_cmd::Command::cargo_bin("gnttab")
        .unwrap()
        .args(["shell", "--json"])
        .write_stdin(script)
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{err}");
    let out = String::from_utf8(output.stdout).unwrap();
    out.lines().map(schema::line).collect()
}

#[track_caller]
fn done(step: &Value, done: bool, words: &str) {
    assert_eq!(step["done"], done, "{step}");
    assert!(step["outcome"].as_str().unwrap().contains(words), "{step}");
}

/// The entry's 32-bit words before and after.
fn entry(step: &Value) -> (String, String) {
    let side = |side: &str| {
        let text = step["entry"][side].as_str().unwrap_or("-");
        text.split("  ").next().unwrap().to_owned()
    };
    (side("before"), side("after"))
}

#[test]
fn a_grants_life_is_seen_in_its_words() {
    let steps = play(
        "d1 grant d2\nd1 write 8 @4 hello\nd2 map d1 8\nd2 read h0 4 5\nd1 end 8\nd2 write h0 bye\nd1 read 8\n\
         d2 unmap h0\nd2 unmap h0\nd1 end 8\nd2 map d1 8\n",
    );
    done(&steps[0], true, "d1 reference 0x8");
    assert!(entry(&steps[0]).1.starts_with("00020001 "), "{}", steps[0]);
    done(&steps[2], true, "d2 handle h0");
    let (before, after) = entry(&steps[2]);
    assert!(
        before.starts_with("00020001 ") && after.starts_with("00020019 "),
        "{before} {after}"
    );
    done(&steps[3], true, "\"hello\"");
    done(&steps[4], false, "d2 still has it");
    done(&steps[6], true, "bye");
    done(&steps[7], true, "unmapped");
    assert!(entry(&steps[7]).1.starts_with("00020001 "), "{}", steps[7]);
    done(&steps[8], false, "bad_handle (-4)");
    done(&steps[9], true, "ended");
    assert!(entry(&steps[9]).1.starts_with("00020000 "), "{}", steps[9]);
    done(&steps[10], false, "general_error (-1)");
}

#[test]
fn rights_and_parts_are_kept() {
    let steps = play(
        "d1 grant d2 read\nd2 map d1 8\nd2 map d1 8 read\nd2 write h0 no\nd1 version 2\nd2 unmap h0\nd1 version 2\n\
         d1 grant d2 part 100 50\nd2 map d1 8\nd1 write 8 @100 part\nd2 copy d1 8 100 4\nd2 copy d1 8 99 4\n",
    );
    done(&steps[1], false, "general_error");
    done(&steps[2], true, "h0");
    done(&steps[3], false, "may not write");
    done(&steps[4], false, "-EBUSY");
    done(&steps[6], true, "version 2");
    done(&steps[7], true, "0x8");
    done(&steps[8], false, "general_error");
    done(&steps[10], true, "\"part\"");
    done(&steps[11], false, "general_error");
}

#[test]
fn a_page_is_transferred_and_a_domain_dies_holding_one() {
    let steps = play(
        "d1 accept d2\nd2 transfer d1 8\nd2 transfer d1 8\nd1 grant d2\nd2 map d1 9\nd2 kill\nd1 end 9\n",
    );
    done(&steps[0], true, "waits");
    let (before, after) = entry(&steps[1]);
    assert!(
        before.starts_with("00020002 ") && after.starts_with("0002000e "),
        "{before} {after}"
    );
    done(&steps[2], false, "general_error");
    let (before, after) = entry(&steps[5]);
    assert!(
        before.starts_with("00020019 ") && after.starts_with("00020001 "),
        "{before} {after}"
    );
}

#[test]
fn a_granter_that_dies_stays_until_its_peer_lets_go() {
    let steps = play("d1 grant d2\nd2 map d1 8\nd1 kill\nd2 read h0\nd2 unmap h0\nadd again\ndomains\n");
    done(&steps[2], true, "others still have pages");
    done(&steps[3], true, "all zero");
    done(&steps[5], true, "d3 again");
    assert!(
        !steps[6]["outcome"].as_str().unwrap().contains("d1"),
        "{}",
        steps[6]
    );
}

#[test]
fn a_script_that_is_wrong_is_said_with_its_line() {
    for (script, words) in [
        ("d1 grant d2\nd1 fly\n", &["line 2", "'fly'", "help"][..]),
        ("d9 kill\n", &["line 1", "'d9'", "d1 hand1"]),
        ("d1 map nobody 8\n", &["'nobody'"]),
    ] {
        let output = assert_cmd::Command::cargo_bin("gnttab")
            .unwrap()
            .arg("shell")
            .write_stdin(script)
            .output()
            .unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), err.lines().count()), (Some(2), 1), "{err}");
        for word in words {
            assert!(err.contains(word), "no '{word}' in: {err}");
        }
    }
    let none = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .args(["shell", "--script", "/nowhere/script"])
        .output()
        .unwrap();
    assert_eq!(none.status.code(), Some(1));
}

/// A machine that programs may join.
struct Machine(Child);

impl Machine {
    fn start(folder: &Path, join: bool) -> Machine {
        std::fs::write(
            folder.join("m.toml"),
            "[[domain]]\nname = \"one\"\nmemory = \"4 MiB\"\n",
        )
        .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_gnttab"))
            .env("XDG_RUNTIME_DIR", folder)
            .args(["run", "--json"])
            .args(join.then_some("--join"))
            .arg(folder.join("m.toml"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let last = if join { "joinable" } else { "started" };
        let machine = Machine(child);
        loop {
            let event = schema::line(&lines.next().unwrap().unwrap());
            if event["event"] == last {
                return machine;
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = Command::new("kill")
            .args(["-s", "TERM", &self.0.id().to_string()])
            .status();
        let _ = self.0.wait();
    }
}

/// One side in a terminal of its own.
struct Side {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Side {
    fn start(folder: &Path, args: &[&str]) -> Side {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gnttab"))
            .env("XDG_RUNTIME_DIR", folder)
            .args(args)
            .arg("--json")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Side {
            input: child.stdin.take(),
            lines: BufReader::new(child.stdout.take().unwrap()).lines(),
            child,
        }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    #[track_caller]
    fn hears(&mut self, event: &str) -> Value {
        let line = self.lines.next().expect("a line").unwrap();
        let heard = schema::line(&line);
        assert_eq!(heard["event"], event, "{heard}");
        heard
    }

    fn ends(mut self) -> Option<i32> {
        self.input = None;
        self.child.wait().unwrap().code()
    }
}

fn both(folder: &Path) -> (Side, Side) {
    let mut map = Side::start(folder, &["map"]);
    let grantee = map.hears("joined")["domain"].to_string();
    let mut grant = Side::start(folder, &["grant", &grantee, "--text", "hello"]);
    let granted = grant.hears("granted");
    map.say(&format!("d{} {}", granted["domain"], granted["gref"]));
    map.hears("mapped");
    (grant, map)
}

#[test]
fn either_side_may_let_go_first() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let _machine = Machine::start(folder, true);

    // The grantee first.
    let (mut grant, mut map) = both(folder);
    map.say("read");
    assert_eq!(map.hears("read")["text"], "hello");
    map.say("write bye");
    map.hears("written");
    grant.say("read");
    assert_eq!(grant.hears("read")["text"], "byelo");
    map.say("");
    map.hears("unmapped");
    grant.say("");
    grant.hears("ended");
    assert_eq!((grant.ends(), map.ends()), (Some(0), Some(0)));

    // The granter first: access is pending until the grantee unmaps.
    let (mut grant, mut map) = both(folder);
    grant.say("end");
    grant.hears("pending");
    map.say("read");
    assert_eq!(map.hears("read")["text"], "hello");
    map.say("");
    map.hears("unmapped");
    grant.hears("ended");
    assert_eq!((grant.ends(), map.ends()), (Some(0), Some(0)));

    // The grantee dies.
    let (mut grant, mut map) = both(folder);
    grant.say("end");
    grant.hears("pending");
    map.say("quit");
    grant.hears("ended");
    assert_eq!((grant.ends(), map.ends()), (Some(0), Some(0)));

    // The granter dies; what is mapped stays mapped until it is unmapped.
    let (mut grant, mut map) = both(folder);
    grant.say("quit");
    assert_eq!(grant.ends(), Some(0));
    map.say("read");
    assert_eq!(map.hears("read")["text"], "hello");
    map.say("");
    map.hears("unmapped");
    assert_eq!(map.ends(), Some(0));
}

#[test]
fn what_was_not_granted_is_not_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let _machine = Machine::start(folder, true);
    let mut grant = Side::start(folder, &["grant", "one", "--read"]);
    let granted = grant.hears("granted");
    let refused = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
            .env("XDG_RUNTIME_DIR", folder)
            .args(args)
            .output()
            .unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), err.lines().count()), (Some(1), 1), "{err}");
        err
    };
    let (granter, gref) = (granted["domain"].to_string(), granted["gref"].to_string());
    assert!(refused(&["map", &granter, &gref]).contains("general_error (-1)"));
    assert!(refused(&["map", &granter, "99999"]).contains("bad_gntref (-3)"));
    assert!(refused(&["map", "77", &gref]).contains("bad_domain (-2)"));
    assert!(refused(&["map", "nobody", &gref]).contains("nobody"));
}

#[test]
fn a_machine_that_nobody_may_join_lets_nobody_in() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let _machine = Machine::start(folder, false);
    for args in [&["map"][..], &["grant", "1"], &["shell", "--running"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
            .env("XDG_RUNTIME_DIR", folder)
            .args(args)
            .output()
            .unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("gnttab run --join"), "{err}");
    }
}

#[test]
fn the_shell_joins_a_running_machine() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let _machine = Machine::start(folder, true);
    let mut shell = Side::start(folder, &["shell", "--running"]);
    let mut step = |line: &str| -> Value {
        shell.say(line);
        schema::line(&shell.lines.next().expect("a line").unwrap())
    };
    done(&step("domains"), true, "d3");
    done(&step("hand1 version 2"), true, "version 2");
    done(&step("hand1 grant hand2"), true, "d2 reference 0x8");
    done(&step("d2 write 8 hello"), true, "5 bytes");
    let mapped = step("d3 map d2 8");
    done(&mapped, true, "handle");
    assert!(
        mapped["entry"]["before"].as_str().unwrap().contains("not in use"),
        "{mapped}"
    );
    assert!(
        mapped["entry"]["after"]
            .as_str()
            .unwrap()
            .contains("in use by d3"),
        "{mapped}"
    );
    let handle = mapped["outcome"]
        .as_str()
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .to_owned();
    done(&step(&format!("d3 read {handle}")), true, "hello");
    done(&step("d3 copy d2 8 0 4"), true, "hell");
    done(&step("d2 end 8"), false, "still has it");
    done(&step("d3 transfer d2 8"), false, "-ENOSYS");
    done(&step("d3 kill"), true, "hung up");
    let until = Instant::now() + Duration::from_secs(20);
    while step("d2 end 8")["done"] == false {
        assert!(Instant::now() < until, "the dead one's mapping is never released");
        std::thread::sleep(Duration::from_millis(20));
    }
    done(&step("show d2 8"), true, "free");
    assert_eq!(shell.ends(), Some(0));
}
