//! Debian's `xenstore-*` tools, which nobody here wrote, on our socket.
//!
//! They find it through `XENSTORED_PATH`. Where the package `xenstore-utils` is
//! not installed these tests say so and do nothing.
#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use gnttab_xenstore::Quotas;
use gnttab_xenstore::client::{Client, Nodes as _};
use gnttab_xenstore::server::{Server, ServerHandle};
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

struct Tools {
    _server: ServerHandle,
    dir: tempfile::TempDir,
}

impl Tools {
    /// A store for the tools, if they are there.
    fn new() -> Option<Self> {
        if Command::new("xenstore-ls").arg("--help").output().is_err() {
            eprintln!("skipped: there is no xenstore-ls; install xenstore-utils");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let server = Server::new(Quotas::default())
            .listen(dir.path().join("socket"))
            .unwrap()
            .spawn()
            .unwrap();
        Some(Tools { _server: server, dir })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn command(&self, line: &str) -> Command {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env("XENSTORED_PATH", self.socket());
        command
    }

    /// What a tool prints, if it says that it succeeded.
    fn run(&self, line: &str) -> Result<String, String> {
        let output = self.command(line).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        if output.status.success() {
            Ok(text(output.stdout))
        } else {
            Err(text(output.stderr))
        }
    }
}

#[test]
fn write_read_list_exists_and_rm() {
    let Some(tools) = Tools::new() else { return };
    tools.run("xenstore-write /tool/a/b one /tool/c two").unwrap();
    assert_eq!(tools.run("xenstore-read /tool/a/b").unwrap(), "one\n");
    assert_eq!(tools.run("xenstore-read -p /tool/c").unwrap(), "/tool/c: two\n");
    assert_eq!(tools.run("xenstore-list /tool").unwrap(), "a\nc\n");
    tools.run("xenstore-exists /tool/a/b").unwrap();
    tools.run("xenstore-exists /tool/x").unwrap_err();
    tools.run("xenstore-rm /tool/a").unwrap();
    tools.run("xenstore-exists /tool/a/b").unwrap_err();
    assert!(
        tools
            .run("xenstore-read /tool/a")
            .unwrap_err()
            .contains("/tool/a")
    );
    tools.run("xenstore-write /tool//a x").unwrap_err();
}

#[test]
fn rm_tidies_empty_directories_above() {
    let Some(tools) = Tools::new() else { return };
    tools.run("xenstore-write /tool/a/b/c one /tool/d two").unwrap();
    tools.run("xenstore-rm -t /tool/a/b/c").unwrap();
    assert_eq!(tools.run("xenstore-list /tool").unwrap(), "d\n");
}

#[test]
fn ls_draws_the_tree_with_permissions() {
    let Some(tools) = Tools::new() else { return };
    tools.run("xenstore-write /tool/a/b one").unwrap();
    tools.run("xenstore-chmod /tool/a n5 r7").unwrap();
    assert_eq!(
        tools.run("xenstore-ls").unwrap(),
        "tool = \"\"\n a = \"\"\n  b = \"one\"\n"
    );
    assert_eq!(
        tools.run("xenstore-ls -f /tool").unwrap(),
        "/tool/a = \"\"\n/tool/a/b = \"one\"\n"
    );
    let with_permissions = tools.run("xenstore-ls -p /tool").unwrap();
    assert!(with_permissions.contains("(n5,r7)") && with_permissions.contains("(n0)"));
}

#[test]
fn chmod_goes_down_and_up() {
    let Some(tools) = Tools::new() else { return };
    tools.run("xenstore-write /tool/a/b one").unwrap();
    tools.run("xenstore-chmod -r /tool/a n5 b7").unwrap();
    let mut client = Client::connect(tools.socket()).unwrap();
    assert_eq!(client.perms("/tool/a/b").unwrap().to_string(), "n5,b7");
    tools.run("xenstore-chmod -u /tool/a/b r6").unwrap();
    assert_eq!(client.perms("/tool").unwrap().to_string(), "r6");
}

#[test]
fn watch_prints_what_changes() {
    let Some(tools) = Tools::new() else { return };
    let mut watch = tools
        .command("xenstore-watch -n 3 /tool")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "/tool");
    tools.run("xenstore-write /tool/a one").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "/tool/a");
    tools.run("xenstore-rm /tool/a").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "/tool/a");
    assert!(watch.wait().unwrap().success());
}

#[test]
fn a_directory_too_long_for_a_message_is_listed() {
    let Some(tools) = Tools::new() else { return };
    let mut client = Client::connect(tools.socket()).unwrap();
    let names: Vec<_> = (0..500).map(|i| format!("a-rather-long-name-{i:03}")).collect();
    for name in &names {
        client.mkdir(&format!("/many/{name}")).unwrap();
    }
    let listed = tools.run("xenstore-list /many").unwrap();
    assert_eq!(listed.lines().collect::<Vec<_>>(), names);
}

#[test]
fn values_with_any_bytes_are_shown() {
    let Some(tools) = Tools::new() else { return };
    let mut client = Client::connect(tools.socket()).unwrap();
    client.write("/tool/raw", b"a\0\xff\n").unwrap();
    assert_eq!(
        tools.run("xenstore-ls -f").unwrap(),
        "/tool = \"\"\n/tool/raw = \"a\\000\\xff\\n\"\n"
    );
}
