//! A control socket that lies: whatever it says, the commands that look end by themselves, without a panic, and send nothing to
//! the terminal that could make it do things.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

use std::io::{BufRead as _, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A domain whose numbers are all as large as they can be, or 0.
fn domain(id: u16, name: &str, most: bool) -> Value {
    let (word, long) = if most { (u32::MAX, u64::MAX) } else { (0, 0) };
    json!({
        "id": id, "name": name, "state": "running", "pid": word, "age_ms": long, "isolated": false,
        "isolation": null, "shareable_pages": long, "page_references": long, "version": word,
        "grant_frames": [word, word], "granted": word, "in_use": word,
        "entries": { "total": word, "most": long, "free": word, "permit_access": word, "sub_page": word,
            "accept_transfer": word, "transitive": word, "withdrawn": word },
        "pinned_by": { "1": word, "2": word }, "maps": { "1": word, "2": word }, "handles": [word, long],
        "oldest_mapping_ms": long, "operations": { "copy": long, "map_grant_ref": long },
        "statuses": { "okay": long, "bad_gntref": long, "eagain": long }, "ports": [],
        "says": { "age_ms": long, "refs": [word, word], "leaked": long, "pending_total": word,
            "consumers": [{ "name": "vif0", "used": word, "quota": word, "refused": long }],
            "pending": [{ "gref": word, "peer": 65535, "tries": word, "age_ms": long }] },
    })
}

/// What it says to the question of that number.
fn lie(how: &str, question: &str, number: u64) -> Vec<u8> {
    let asked: Value = serde_json::from_str(question).unwrap();
    let long = u64::MAX;
    let content = match (how, asked["content"]["get"].as_str().unwrap()) {
        ("garbage", _) => return (0..=255).chain(*b"\n").collect(),
        ("deep", _) => return [b"{\"version\":1,\"content\":", &[b'['; 100_000][..], b"\n"].concat(),
        ("version", _) => return b"{\"version\":2,\"content\":{\"new\":1}}\n".to_vec(),
        ("other", "events") => json!({ "domains": [] }),
        ("other", _) => json!("watching"),
        ("refusal", _) => json!({ "error": "not today" }),
        (_, "machine") => {
            json!({ "machine": { "program": "0", "pid": 1, "age_ms": long, "vcpus": [long, long],
            "holds": { "running": long, "dying": long, "memories": long, "shareable_pages": long,
                "page_references": long, "descriptors": long } } })
        }
        ("control", "domains") => json!({ "domains": [domain(1, "\u{1b}[2J\u{1b}]0;owned\u{7}", false)] }),
        ("twice", "domains") => json!({ "domains": [domain(1, "a", true), domain(1, "b", false)] }),
        (_, "domains") => {
            json!({ "domains": [domain(1, "huge", number % 4 < 2), domain(65535, &"w".repeat(9000), true)] })
        }
        (_, "table") => {
            let mapping = json!({ "domain": 9, "handle": u32::MAX, "granter": 1, "gref": 8, "readonly": true, "age_ms": long });
            json!({ "table": { "domain": domain(1, "huge", true), "mappings": [mapping], "mapped_by": [mapping, mapping],
                "grants": [{ "gref": 8, "kind": "no kind", "flags": "", "grantee": 65535, "frame": long, "user": 1,
                    "pins": [255, 255, 255, 255] }] } })
        }
        _ => json!("watching"),
    };
    let mut line = json!({ "version": 1, "content": content })
        .to_string()
        .into_bytes();
    line.push(b'\n');
    if content == "watching" {
        for event in [
            "granted", "mapped", "unmapped", "ended", "refused", "pending", "died",
        ] {
            let name = if how == "control" { "\u{1b}c" } else { "x" };
            let event = json!({ "time_ms": long, "event": event, "domain": 65535, "detail": name });
            for told in [json!({ "event": event }), json!({ "dropped": long })] {
                let _ = writeln!(line, "{}", json!({ "version": 1, "content": told }));
            }
        }
    }
    line
}

/// Answers until the other end has gone.
fn serve(how: &'static str, stream: &UnixStream) {
    let mut out = stream;
    let mut number = 0;
    for question in BufReader::new(stream).lines() {
        let Ok(question) = question else { return };
        number += 1;
        let long_one = vec![b'x'; 1 << 20];
        let sent = match how {
            // Without an end, as fast as it is read; and byte by byte.
            "flood" => (0..400).try_for_each(|_| out.write_all(&long_one)),
            "drip" => (0..60).try_for_each(|_| {
                sleep(Duration::from_millis(500));
                out.write_all(b"x")
            }),
            _ => out.write_all(&lie(how, &question, number)),
        };
        if sent.is_err() || question.contains("events") {
            return;
        }
    }
}

/// What a command says to it: the exit code, and both outputs.
fn ask(socket: &Path, args: &[&str]) -> (Option<i32>, String) {
    let started = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .args(args)
        .arg("--control")
        .arg(socket)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(60), "{args:?}");
    let control = |letter: char| letter.is_control() && letter != '\n';
    assert!(!text.contains(control), "{args:?}: {text:?}");
    (output.status.code(), text)
}

#[test]
fn whatever_a_machine_says_those_who_look_say_what_is_wrong_with_it() {
    let folder = tempfile::tempdir().unwrap();
    for (how, words) in [
        ("most", ""),
        ("twice", ""),
        ("control", "control characters"),
        ("garbage", "not an answer"),
        ("deep", "not an answer"),
        (
            "version",
            "version 1 of the control protocol is spoken here, not 2",
        ),
        ("other", "an unexpected answer"),
        ("refusal", "not today"),
        ("flood", "more than 256 MiB"),
        ("drip", "did not answer in time"),
    ] {
        let socket = folder.path().join(how);
        let listener = UnixListener::bind(&socket).unwrap();
        spawn(move || {
            for stream in listener.incoming().flatten() {
                spawn(move || serve(how, &stream));
            }
        });
        for args in [
            &["top", "--batch", "--count", "2", "--interval", "0.1"][..],
            &["top", "--batch", "--json", "--count", "2", "--interval", "0.1"],
            &["top", "--prometheus"],
            &["doctor", "--interval", "0.1"],
            &["watch"],
            &["dump", "1"],
        ] {
            // Slow: once is enough.
            if how == "drip" && args[0] != "doctor" || how == "flood" && args[0] != "dump" {
                continue;
            }
            let (code, text) = ask(&socket, args);
            assert!(matches!(code, Some(0 | 1)), "{how}, {args:?}: {code:?}: {text}");
            // Who only watches asks for nothing else.
            let hears = args[0] != "watch" || how != "control";
            assert!(text.contains(words) || !hears, "{how}, {args:?}: {text}");
            assert!(
                code == Some(1) || words.is_empty() || !hears,
                "{how}, {args:?}: {text}"
            );
        }
    }
}
