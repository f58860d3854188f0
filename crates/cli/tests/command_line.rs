//! What the command says to wrong input: one line with the next step, and the right exit code.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::path::Path;

use assert_cmd::Command;

fn gnttab(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::cargo_bin("gnttab").unwrap().args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The command fails with `code`, says one line with all of `words` in it, and prints no data.
#[track_caller]
fn refuses(args: &[&str], code: i32, words: &[&str]) {
    let (status, out, err) = gnttab(args);
    assert_eq!(status, Some(code), "{args:?}: {err}");
    assert_eq!(out, "", "{args:?}");
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    for word in words {
        assert!(err.contains(word), "{args:?}: no '{word}' in: {err}");
    }
}

fn path(folder: &tempfile::TempDir, name: &str, content: &[u8]) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn help_starts_with_examples() {
    for args in [
        &["--help"][..],
        &["demo", "--help"],
        &["disk", "--help"],
        &["run", "--help"],
        &["dump", "--help"],
        &["decode", "--help"],
        &["explain", "--help"],
        &["plan", "--help"],
        &["shell", "--help"],
        &["grant", "--help"],
        &["map", "--help"],
        &["completions", "--help"],
        &["man", "--help"],
    ] {
        let (status, out, _) = gnttab(args);
        assert_eq!(status, Some(0));
        assert!(out.starts_with("Examples:\n  gnttab "), "{args:?}: {out}");
    }
}

#[test]
fn wrong_use_is_exit_code_2() {
    for args in [
        &[][..],
        &["fly"],
        &["disk"],
        &["disk", "x", "--queues", "0"],
        &["disk", "x", "--ring-order", "5"],
        &["disk", "x", "--sharing", "maybe"],
        &["disk", "x", "--tcp", "65536"],
        &["disk", "x", "--tcp", "1", "--socket", "s"],
        &["run"],
        &["dump"],
        &["dump", "40000"],
        &["dump", "d1", "--reference", "many"],
    ] {
        let (status, out, err) = gnttab(args);
        assert_eq!(status, Some(2), "{args:?}: {err}");
        assert_eq!(out, "", "{args:?}");
        assert!(!err.is_empty(), "{args:?}");
    }
}

#[test]
fn an_image_that_cannot_be_served_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().to_str().unwrap();
    refuses(
        &["disk", &format!("{here}/none")],
        1,
        &["none", "no such file", "truncate -s"],
    );
    refuses(&["disk", here], 1, &["is a directory", "mke2fs"]);
    refuses(
        &["bench", "nosuchcase"],
        2,
        &["no case", "nosuchcase", "names are"],
    );
    refuses(
        &["disk", &path(&folder, "empty", b"")],
        1,
        &["is empty", "truncate -s"],
    );
    refuses(
        &["disk", &path(&folder, "odd", &[0; 1000])],
        1,
        &["1000 bytes", "512-byte", "truncate -s 1024"],
    );
    refuses(&["disk", "/dev/null"], 1, &["neither a file nor a block device"]);
}

#[test]
fn a_socket_that_cannot_be_had_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let image = path(&folder, "image", &[0; 4096]);
    let file = path(&folder, "file", b"precious");
    refuses(
        &["disk", &image, "--socket", &file],
        1,
        &["not a socket", "--socket PATH"],
    );
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    refuses(
        &["disk", &image, "--socket", "/nowhere/s"],
        1,
        &["/nowhere/s", "--socket PATH"],
    );
    let _busy = std::os::unix::net::UnixListener::bind(folder.path().join("busy")).unwrap();
    let busy = folder.path().join("busy");
    refuses(
        &["disk", &image, "--socket", busy.to_str().unwrap()],
        1,
        &["another server", "--socket PATH"],
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    refuses(
        &["disk", &image, "--tcp", &port],
        1,
        &[&port, "in use", "--tcp 0"],
    );
}

#[test]
fn a_damaged_machine_file_is_refused_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = path(&folder, "m.toml", b"[[domain]]\nname = \"a\"\nvcpus = 99\n");
    refuses(
        &["run", &file],
        2,
        &[
            "m.toml, line 3 (`vcpus = 99`)",
            "outside 1..=16",
            "gnttab run --example",
        ],
    );
    refuses(&["run", &path(&folder, "empty", b"")], 2, &["no [[domain]]"]);
    refuses(&["run", &path(&folder, "binary", b"\xff\xfe")], 1, &["binary"]);
    refuses(
        &["run", "/nowhere/m.toml"],
        1,
        &["/nowhere/m.toml", "gnttab run --example"],
    );
}

#[test]
fn the_example_machine_has_no_mistakes() {
    let folder = tempfile::tempdir().unwrap();
    let (status, example, _) = gnttab(&["run", "--example"]);
    assert_eq!(status, Some(0));
    let file = path(&folder, "m.toml", example.as_bytes());
    let (status, out, _) = gnttab(&["run", "--check", &file, "--json"]);
    assert_eq!(status, Some(0));
    let seen = schema::line(&out);
    assert_eq!(seen["version"], 1);
    assert_eq!(seen["domains"], 2);
}

#[test]
fn json_has_the_failure_too() {
    let (status, out, err) = gnttab(&["disk", "/nowhere/disk.img", "--json"]);
    assert_eq!(status, Some(1));
    let seen = schema::line(&out);
    assert_eq!(seen["version"], 1);
    assert_eq!(seen["command"], "disk");
    assert!(seen["error"]["what"].as_str().unwrap().contains("no such file"));
    assert!(err.contains("no such file"));
    assert!(!Path::new("/nowhere").exists());
}
