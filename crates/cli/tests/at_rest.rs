//! `gnttab decode` and `gnttab explain`: on files as people have them, and on what is none.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use assert_cmd::Command;
use gnttab_abi::{DomId, EntryBodyV2, EntryFlags, EntryHead, EntryV1, EntryV2, GrantRef};
use serde_json::Value;
use tempfile::TempDir;

fn gnttab(args: &[&str], stdin: &[u8]) -> (Option<i32>, String, String) {
    let output = Command::cargo_bin("gnttab")
        .unwrap()
        .args(args)
        .write_stdin(stdin)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[track_caller]
fn text(args: &[&str]) -> String {
    let (status, out, err) = gnttab(args, b"");
    assert_eq!((status, &*err), (Some(0), ""), "{args:?}");
    out
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    schema::line(&text(&[args, &["--json"]].concat()))
}

/// The command fails with `code` and says one line with all of `words` in it.
#[track_caller]
fn refuses(args: &[&str], code: i32, words: &[&str]) {
    let (status, out, err) = gnttab(args, b"");
    assert_eq!(status, Some(code), "{args:?}: {err}");
    assert_eq!(out, "", "{args:?}");
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    for word in words {
        assert!(err.contains(word), "{args:?}: no '{word}' in: {err}");
    }
}

fn save(folder: &TempDir, name: &str, content: &[u8]) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

fn head(flags: u16, domid: u16) -> EntryHead {
    EntryHead {
        flags: EntryFlags::from_bits_retain(flags),
        domid: DomId(domid),
    }
}

fn v1_frame() -> Vec<u8> {
    let mut frame = vec![0; 4096];
    let entries = [
        (1, 0x1, 0, 0x3000),
        (8, 0x19, 2, 0x1234),
        (9, 0x5, 2, 0x1235),
        (10, 0x10, 2, 0x1236),
    ];
    for (at, flags, domid, page) in entries {
        let entry = EntryV1 {
            head: head(flags, domid),
            frame: page,
        };
        frame[at * 8..][..8].copy_from_slice(&entry.to_bytes());
    }
    frame
}

fn v2_frame() -> Vec<u8> {
    let mut frame = vec![0; 4096];
    let part = EntryBodyV2::SubPage {
        page_off: 4000,
        length: 200,
        frame: 0x77,
    };
    let own = EntryBodyV2::Transitive {
        trans_domid: DomId(5),
        gref: GrantRef(3),
    };
    let page = EntryBodyV2::FullPage { frame: 0x1_0000_0000 };
    for (at, flags, body) in [(8, 0x1, page), (9, 0x101, part), (10, 0x3, own)] {
        let entry = EntryV2::new(head(flags, 2), body);
        frame[at * 16..][..16].copy_from_slice(&entry.to_bytes());
    }
    frame
}

/// An ELF core with one segment: `content` at a virtual and at a physical address.
fn core(content: &[u8], vaddr: u64, paddr: u64) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    bytes[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0");
    bytes[20] = 1;
    bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
    for (at, value) in [(52, 64_u16), (54, 56), (56, 1)] {
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let size = content.len() as u64;
    bytes[64] = 1;
    for (at, value) in [(72, 0x1000), (80, vaddr), (88, paddr), (96, size), (104, size)] {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes.extend_from_slice(content);
    bytes
}

fn finding<'a>(entry: &'a Value, code: &str) -> &'a Value {
    let found = entry["findings"].as_array().unwrap().iter();
    found
        .into_iter()
        .find(|finding| finding["code"] == code)
        .unwrap_or_else(|| panic!("no {code} in {entry}"))
}

#[test]
fn a_table_of_version_1_is_guessed_and_decoded() {
    let folder = tempfile::tempdir().unwrap();
    let file = save(&folder, "frame", &v1_frame());
    let table = json(&["decode", &file]);
    assert_eq!(
        (
            &table["version"],
            &table["kind"],
            &table["count"],
            &table["in_use"]
        ),
        (&1.into(), &"v1".into(), &512.into(), &2.into())
    );
    let entries = table["entries"].as_array().unwrap();
    let grefs: Vec<u64> = entries
        .iter()
        .map(|entry| entry["gref"].as_u64().unwrap())
        .collect();
    assert_eq!(grefs, [1, 8, 9, 10]);
    assert_eq!(
        (&entries[1]["frame"], &entries[1]["writing"]),
        (&0x1234.into(), &true.into())
    );
    assert_eq!(finding(&entries[3], "freed-in-use")["severity"], "wrong");

    let people = text(&["decode", &file]);
    assert!(people.contains("a table of version 1 (guessed: "), "{people}");
    assert!(
        people.contains("0x8  d2  permit_access|reading|writing  frame 0x1234"),
        "{people}"
    );
    let picture = text(&["decode", &file, "--picture"]);
    assert!(picture.contains("·▒······█░!·"), "{picture}");
    let one = text(&["decode", &file, "--reference", "8"]);
    assert!(
        one.starts_with("reference 0x8: ") && one.contains("in use, write"),
        "{one}"
    );
    assert!(text(&["decode", &file, "--reference", "0x30"]).contains("0x30: free"));
}

#[test]
fn a_table_of_version_2_has_status_words_and_an_owner() {
    let folder = tempfile::tempdir().unwrap();
    let file = save(&folder, "frame", &v2_frame());
    let mut words = vec![0; 4096];
    words[16] = 0x18;
    let status = save(&folder, "status", &words);
    assert_eq!(json(&["decode", &file])["kind"], "v2");
    assert_eq!(json(&["decode", &status])["kind"], "status");
    let table = json(&["decode", &file, "--status", &status, "--owner", "d5"]);
    let entries = table["entries"].as_array().unwrap();
    assert_eq!(
        (&entries[0]["frame"], &entries[0]["writing"]),
        (&0x1_0000_0000_u64.into(), &true.into())
    );
    finding(&entries[1], "past-page");
    finding(&entries[2], "transitive-to-itself");
    // The second frame of a longer table.
    let table = json(&["decode", &file, "--as", "v2", "--first-frame", "1"]);
    assert_eq!(table["entries"][0]["gref"], 256 + 8);
}

#[test]
fn frames_are_found_in_a_core_by_address_and_by_offset() {
    let folder = tempfile::tempdir().unwrap();
    let content = [vec![0xff; 4096], v1_frame()].concat();
    let core = save(&folder, "core", &core(&content, 0xffff_8880_0000_0000, 0x10_0000));
    for place in [
        &["--address", "0xffff888000001000"][..],
        &["--physical", "0x101000"],
        &["--offset", "0x2000"],
    ] {
        let table = json(&[&["decode", &core, "--frames", "1"][..], place].concat());
        assert_eq!(
            (&table["kind"], &table["entries"][1]["frame"]),
            (&"v1".into(), &0x1234.into()),
            "{place:?}"
        );
    }
    refuses(&["decode", &core], 2, &["ELF", "--address"]);
    refuses(&["decode", &core, "--address", "0x5"], 1, &["no segment", "0x5"]);
    refuses(
        &["decode", &core, "--physical", "0x101000", "--frames", "2"],
        1,
        &["4096 bytes", "--frames 1"],
    );
    let plain = save(&folder, "plain", &v1_frame());
    refuses(
        &["decode", &plain, "--address", "0x5"],
        1,
        &["not an ELF core", "--offset"],
    );
}

#[test]
fn a_table_comes_from_standard_input_too() {
    let (status, out, err) = gnttab(
        &["decode", "-", "--json", "--offset", "8"],
        &[&[0; 8], &v1_frame()[..]].concat(),
    );
    assert_eq!(status, Some(0), "{err}");
    let table = schema::line(&out);
    assert_eq!(table["entries"][1]["gref"], 8);
}

/// As `gnttab decode <(command)` has it.
#[test]
fn a_table_comes_from_a_pipe_too() {
    let folder = TempDir::new().unwrap();
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let path = pipe.to_str().unwrap().to_owned();
    let writer = std::thread::spawn(move || std::fs::write(pipe, v1_frame()));
    let table = json(&["decode", &path, "--offset", "64"]);
    assert_eq!(
        (&table["kind"], &table["count"]),
        (&Value::from("v1"), &Value::from(504))
    );
    writer.join().unwrap().unwrap();
    refuses(
        &["decode", "-", "--address", "0x1000"],
        2,
        &["standard input", "give its file"],
    );
}

#[test]
fn what_cannot_be_decoded_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = save(&folder, "frame", &v1_frame());
    refuses(&["decode", "/nowhere/frame"], 1, &["/nowhere/frame"]);
    refuses(
        &["decode", folder.path().to_str().unwrap()],
        1,
        &["is a directory"],
    );
    refuses(&["decode", &save(&folder, "empty", b"")], 1, &["nothing there"]);
    refuses(
        &["decode", &save(&folder, "short", b"abc"), "--as", "v2"],
        1,
        &["3 bytes", "16"],
    );
    refuses(
        &["decode", &file, "--frames", "2"],
        1,
        &["4096 bytes", "--frames 1"],
    );
    refuses(
        &["decode", &file, "--offset", "9999999"],
        1,
        &["nothing there", "--offset"],
    );
    refuses(
        &["decode", &file, "--as", "v1", "--status", &file],
        2,
        &["version 2"],
    );
    refuses(&["decode", &file, "--reference", "512"], 1, &["0x200", "0x1ff"]);
    refuses(&["decode", &file, "--as", "ring", "--picture"], 2, &["ring"]);
    let ring = save(&folder, "little", &[0; 100]);
    refuses(&["decode", &ring, "--as", "ring"], 1, &["100 bytes", "page"]);
    for args in [
        &["decode"][..],
        &["decode", &file, "--as", "v3"],
        &["decode", &file, "--offset", "x"],
        &["decode", &file, "--owner", "disk"],
        &["decode", &file, "--frames", "0"],
        &["decode", &file, "--address", "1", "--physical", "2"],
    ] {
        let (status, out, err) = gnttab(args, b"");
        assert_eq!((status, &*out), (Some(2), ""), "{args:?}: {err}");
    }
}

#[test]
fn explanations_are_text_and_data() {
    let out = text(&["explain", "-3"]);
    assert!(out.starts_with("status: bad_gntref (-3)\n"), "{out}");
    assert!(out.contains("Usual causes"), "{out}");
    let data = json(&["explain", "0x19", "--as", "entry"]);
    let parts = data["explanations"][0]["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["permit_access", "reading", "writing"]);
    let all = text(&["explain"]);
    for name in [
        "no_space (-13)",
        "-EFAULT (-14)",
        "swap_grant_ref",
        "contains_pte (0x10)",
    ] {
        assert!(all.contains(name), "{name}");
    }
    refuses(&["explain", "bad_weather"], 2, &["bad_weather", "gnttab explain"]);
    refuses(&["explain", "copy", "--as", "status"], 2, &["no status"]);
}
