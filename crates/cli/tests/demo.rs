//! `gnttab demo`, as a person and as a program see it.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::process::Command;
use std::time::{Duration, Instant};

fn demo(args: &[&str]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gnttab"));
    let output = command
        .env("XDG_RUNTIME_DIR", folder.path())
        .arg("demo")
        .args(args)
        .output()
        .unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path().join("gnttab")).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn all_of_it_holds_and_is_said_as_data() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let content: Vec<u8> = (0..4_u32 << 20)
        .map(|n| n.to_le_bytes()[1] ^ n.to_le_bytes()[0])
        .collect();
    std::fs::write(&image, &content).unwrap();
    let started = Instant::now();
    let (status, out, err) = demo(&["--json", "--image", image.to_str().unwrap()]);
    assert_eq!(status, Some(0), "{out}{err}");
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!(err, "");
    let report = schema::line(&out);
    assert_eq!(report["version"], 1);
    assert_eq!(report["held"], true);
    assert_eq!(report["domains"].as_array().unwrap().len(), 3);
    assert!(
        report["domains"]
            .as_array()
            .unwrap()
            .iter()
            .all(|domain| domain["isolated"] == true)
    );
    assert!(
        report["checks"]
            .as_array()
            .unwrap()
            .iter()
            .all(|check| check["held"] == true)
    );
    // The digest is that of the image, and the image is as it was.
    assert_eq!(
        report["disk"]["digest_before"],
        report["disk"]["outcome"]["found"]
    );
    assert_ne!(report["disk"]["digest_before"], report["disk"]["digest_after"]);
    assert!(std::fs::read(&image).unwrap() == content);
    let tried: usize = report["hostile"]
        .as_array()
        .unwrap()
        .iter()
        .map(|group| group["attempts"].as_array().unwrap().len())
        .sum();
    assert!(tried > 100, "only {tried} attempts");
    let shared = &report["shared"][0];
    assert_eq!(
        (&shared["granter"], &shared["grantee"]),
        (&"d2 frontend".into(), &"d1 backend".into())
    );
    assert!(shared["mapped_pages"].as_u64().unwrap() > 0);
}

#[test]
fn the_screen_is_for_people() {
    let (status, out, err) = demo(&[]);
    assert_eq!(status, Some(0), "{out}{err}");
    for words in [
        "Shared, and with whom",
        "The hostile domain tried",
        "and got 0",
        "All of it held",
    ] {
        assert!(out.contains(words), "no '{words}' in:\n{out}");
    }
    assert!(!out.contains('\x1b'), "colour without a terminal");
}

#[test]
fn an_image_that_is_none_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().to_str().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .env("XDG_RUNTIME_DIR", folder.path())
        .args(["demo", "--image", here])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("is a directory")
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
