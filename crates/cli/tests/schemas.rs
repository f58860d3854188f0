//! docs/schema.json has every command that prints JSON. What they print is held to it wherever a test reads it; here are
//! the commands that no other test runs.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

mod schema;

use std::process::Command;

fn gnttab(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands below one, as its help lists them, and the commands below those.
fn commands(of: &[&str]) -> Vec<String> {
    let help = gnttab(&[of, &["--help"]].concat());
    let list = help.split("\nCommands:\n").nth(1).unwrap_or_default();
    let list = list.split("\n\n").next().unwrap();
    let names = list
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next());
    names
        .flat_map(|name| {
            let whole = [of, &[name]].concat();
            let mut all = commands(&whole);
            all.push(whole.join(" "));
            all
        })
        .collect()
}

#[test]
fn every_command_that_prints_json_is_in_the_schema() {
    let commands = commands(&[]);
    assert!(commands.contains(&"bench diff".to_owned()), "{commands:?}");
    for command in commands {
        let args: Vec<&str> = command.split(' ').chain(["-h"]).collect();
        let prints = gnttab(&args)
            .lines()
            .any(|line| line.trim_start().starts_with("--json "));
        assert_eq!(schema::knows(&command), prints, "{command}");
    }
}

#[test]
#[should_panic(expected = "docs/schema.json")]
fn a_key_that_the_schema_does_not_have_is_found() {
    let more = gnttab(&["explain", "-3", "--json"]).replacen('{', "{\"more\":1,", 1);
    schema::line(&more);
}

#[test]
#[should_panic(expected = "\"explanations\" is a required property")]
fn a_key_that_is_not_there_is_found() {
    let less = gnttab(&["explain", "-3", "--json"]).replacen("\"explanations\"", "\"explained\"", 1);
    schema::line(&less);
}

#[test]
fn measurements_are_what_the_schema_says() {
    let folder = tempfile::tempdir().unwrap();
    let figures = gnttab(&["bench", "pair/v1/warm", "--quick", "--json"]);
    let measured = schema::line(&figures);
    assert!(!measured["figures"].as_array().unwrap().is_empty());
    let path = folder.path().join("figures.json");
    std::fs::write(&path, figures).unwrap();
    let path = path.to_str().unwrap();
    let compared = schema::line(&gnttab(&["bench", "diff", path, path, "--json"]));
    assert_eq!(
        compared["changes"].as_array().unwrap().len(),
        measured["figures"].as_array().unwrap().len()
    );
}

#[test]
fn explanations_are_what_the_schema_says() {
    for args in [
        &["explain", "--json"][..],
        &["explain", "0x19", "--as", "entry", "--json"],
    ] {
        schema::line(&gnttab(args));
    }
}

/// Two domains for every figure; that bytes arrive is for other tests.
#[test]
fn every_way_to_share_pages_is_measured() {
    let measured = schema::line(&gnttab(&["bench", "grants", "--quick", "--json"]));
    let cases = measured["cases"].as_array().unwrap();
    for (way, maps, copies) in [
        ("persistent", 0.5, 0.0),
        ("copied", 0.0, 1.0),
        ("mapped", 1.0, 0.0),
    ] {
        let of_way: Vec<_> = cases.iter().filter(|case| case["way"] == way).collect();
        assert_eq!(of_way.len(), 12, "{way}");
        let first = of_way[0];
        assert_eq!(first["name"], "randread-4k-depth1");
        let amount = |what: &str| first["cost"][what].as_f64().unwrap();
        match way {
            "persistent" => assert!(amount("maps_a_request") < maps, "{first}"),
            // The ring's page is mapped in any case, and is not counted.
            _ => assert!((amount("maps_a_request") - maps).abs() < 1e-9, "{first}"),
        }
        assert!((amount("copies_a_request") - copies).abs() < 1e-9, "{first}");
    }
}
