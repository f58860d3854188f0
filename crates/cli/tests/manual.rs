//! Manual pages and completions come from the parser, and say what it says.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

use std::process::Command;

fn gnttab(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The commands, as the help lists them.
fn commands() -> Vec<String> {
    let (_, help, _) = gnttab(&["--help"]);
    let list = help
        .split("Commands:")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    list.lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_command_has_a_page_that_starts_with_its_examples() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().to_str().unwrap();
    assert_eq!(gnttab(&["man", "--to", to]).0, Some(0));
    let commands = commands();
    assert!(commands.len() > 6, "{commands:?}");
    for command in &commands {
        let page = std::fs::read_to_string(folder.path().join(format!("gnttab-{command}.1"))).unwrap();
        let section = |name: &str| {
            page.find(&format!(".SH {name}"))
                .unwrap_or_else(|| panic!("no {name} in {page}"))
        };
        assert!(
            section("NAME") < section("EXAMPLES") && section("EXAMPLES") < section("SYNOPSIS"),
            "{page}"
        );
        assert!(page.contains("\\fBgnttab"), "{page}");
        let (_, help, _) = gnttab(&[command, "--help"]);
        let first = help.lines().nth(1).unwrap().trim();
        let unescaped = page
            .replace("\\-", "-")
            .replace("\\(aq", "'")
            .replace("\\e", "\\");
        assert!(unescaped.contains(first), "no '{first}' in {page}");
    }
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        commands.len() + 1
    );
    let (status, _, err) = gnttab(&["man", "nonsense"]);
    assert_eq!((status, err.lines().count()), (Some(2), 1), "{err}");
    assert!(err.contains("decode"), "{err}");
    assert_eq!(gnttab(&["man", "--to", "/nowhere"]).0, Some(1));
}

#[test]
fn man_formats_a_page_without_complaint() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().to_str().unwrap();
    assert_eq!(gnttab(&["man", "--to", to]).0, Some(0));
    for page in std::fs::read_dir(folder.path()).unwrap() {
        let page = page.unwrap().path();
        let Ok(formatted) = Command::new("groff")
            .args(["-man", "-Tutf8", "-ww"])
            .arg(&page)
            .output()
        else {
            eprintln!("skipped: groff is not installed");
            return;
        };
        assert!(formatted.status.success());
        let complaints = String::from_utf8_lossy(&formatted.stderr);
        assert_eq!(complaints, "", "{}", page.display());
    }
}

/// Asks bash itself what it would complete.
#[test]
fn bash_completes_commands_and_options() {
    let complete = |words: &str| {
        let script = format!(
            "source <(\"$0\" completions bash); COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _gnttab gnttab \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash")
            .args(["-c", &script, env!("CARGO_BIN_EXE_gnttab")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(complete("gnttab dec").trim(), "decode");
    assert_eq!(complete("gnttab decode --pic").trim(), "--picture");
    assert!(complete("gnttab decode --as ''").contains("status"));
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let (status, out, _) = gnttab(&["completions", shell]);
        assert_eq!(status, Some(0));
        assert!(out.contains("decode"), "{shell}");
    }
    assert_eq!(gnttab(&["completions", "cobol"]).0, Some(2));
}
