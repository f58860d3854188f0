//! Programs that nobody here wrote, on a disk in another domain.

use std::path::Path;

use super::client::{Client, pattern};
use super::schema;
use super::served::{Served, have, run};

/// An ext4 file system of 64 MiB with this crate's sources in it.
fn ext4(path: &Path) {
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", sources, path.to_str().unwrap(), "64M"],
    );
}

#[test]
fn a_file_system_reads_identical_and_is_clean_after_being_written() {
    if !(have("qemu-img") && have("mke2fs") && have("e2fsck")) {
        return;
    }
    let served = Served::new(&["--queues", "2", "--ring-order", "2"], ext4);
    let (image, copy) = (served.image(), served.path("copy"));
    let (image, copy) = (
        image.to_str().unwrap().to_owned(),
        copy.to_str().unwrap().to_owned(),
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &served.uri, &image],
    );

    // Another file system, written over it through the export.
    run(
        "mke2fs",
        &[
            "-q",
            "-t",
            "ext4",
            "-d",
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests"),
            &copy,
            "64M",
        ],
    );
    run(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &copy, &served.uri],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &served.uri, &copy],
    );
    // While it is still served: the file has what was written, and is clean.
    run("e2fsck", &["-fn", &image]);
    let (status, stopped) = served.stop();
    assert!(status.success());
    assert_eq!(stopped["totals"]["errors"], 0);
}

#[test]
fn qemu_io_reads_what_it_wrote_zeroed_and_discarded() {
    if !have("qemu-io") {
        return;
    }
    for sharing in ["persistent", "copied", "mapped"] {
        let served = Served::patterned(&["--sharing", sharing], 16 << 20);
        let commands = [
            "write -P 0xa5 1M 3M",
            "write -z 2M 64k",
            "write -z -u 5M 1M",
            "write -f -P 0x5a 512 512",
            "discard 8M 1M",
            "flush",
            "read -P 0xa5 1M 1M",
            "read -P 0 2M 64k",
            "read -P 0 5M 1M",
            "read -P 0x5a 512 512",
        ];
        let mut args = vec!["-f", "raw"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(&served.uri);
        let out = run("qemu-io", &args);
        assert!(!out.contains("verification failed"), "{out}");
    }
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    let served = Served::patterned(&["--read-only"], 1 << 20);
    let mut client = Client::connect(&served.socket()).unwrap();
    assert_eq!(client.size, 1 << 20);
    assert!(client.read(0, 1 << 20).unwrap() == pattern(7, 1 << 20));
    let (acknowledged, outcome) = client.write_all(&[(0, vec![1; 512])]);
    assert!(acknowledged.is_empty());
    assert_eq!(outcome.unwrap_err().to_string(), "NBD error 1");
    assert!(std::fs::read(served.image()).unwrap() == pattern(7, 1 << 20));
}

#[test]
fn an_image_is_served_by_one_writer_only() {
    let served = Served::patterned(&[], 1 << 20);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .env("XDG_RUNTIME_DIR", served.folder.path())
        .args(["disk", "--read-only"])
        .arg(served.image())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("disk.img: locked"), "{error}");
    assert!(served.stop().0.success());
}

#[test]
fn a_stop_leaves_no_process_no_socket_and_no_lock() {
    let served = Served::patterned(&[], 1 << 20);
    let pids = [served.pid("backend"), served.pid("frontend")];
    let folder = served.folder.path().to_owned();
    let image = served.image();
    let mut client = Client::connect(&served.socket()).unwrap();
    let (acknowledged, _) = client.write_all(&[(4096, pattern(1, 4096))]);
    assert_eq!(acknowledged, [4096]);
    let copy = folder.with_extension("kept");
    std::fs::rename(&image, &copy).unwrap();
    let (status, stopped) = served.stop();
    assert!(status.success(), "{stopped}");
    assert_eq!(stopped["totals"]["writes"], 1);
    assert!(std::fs::read(&copy).unwrap()[4096..8192] == pattern(1, 4096));
    std::fs::remove_file(&copy).unwrap();
    for pid in pids {
        assert!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} is left"
        );
    }
}

#[test]
fn dump_shows_who_granted_what_to_whom() {
    let served = Served::patterned(&[], 1 << 20);
    Client::connect(&served.socket())
        .unwrap()
        .read(0, 64 << 10)
        .unwrap();
    let dump = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gnttab"));
        let output = command
            .env("XDG_RUNTIME_DIR", served.folder.path())
            .arg("dump")
            .args(args)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (status, out, err) = dump(&["frontend", "--json"]);
    assert_eq!(status, Some(0), "{err}");
    let table = schema::line(&out);
    let entries = table["entries"].as_array().unwrap();
    let backend = table["entries"][0]["grantee"].as_u64().unwrap();
    assert!(
        entries
            .iter()
            .all(|entry| entry["kind"] == "permit_access" && entry["grantee"] == backend)
    );
    assert!(
        entries.iter().any(|entry| entry["user"] == backend),
        "nobody maps the ring: {out}"
    );

    let (status, out, _) = dump(&["backend"]);
    assert_eq!(status, Some(0));
    assert!(out.contains("What it maps of others"), "{out}");

    let (status, out, err) = dump(&["frontend", "--reference", "0x3fffffff"]);
    assert_eq!((status, &*out), (Some(1), ""));
    assert!(
        err.contains("bad_gntref (-3)") && err.contains("past the table"),
        "{err}"
    );
    let (status, _, err) = dump(&["d77"]);
    assert_eq!(status, Some(1));
    assert!(err.contains("domain d77: there is none; there are: "), "{err}");
}
