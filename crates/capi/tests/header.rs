//! The header that is checked in is the one that the code makes.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

use std::path::Path;

fn made() -> String {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).unwrap();
    let sources = ["engine.rs", "guest.rs"].map(|name| here.join("src").join(name));
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in sources {
        builder = builder.with_src(source);
    }
    let mut header = Vec::new();
    builder.generate().unwrap().write(&mut header);
    String::from_utf8(header).unwrap()
}

fn path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include/gnttab.h")
}

#[test]
fn the_checked_in_header_is_up_to_date() {
    let checked_in = std::fs::read_to_string(path()).unwrap_or_default();
    assert_eq!(
        checked_in,
        made(),
        "make it anew: cargo test -p gnttab-capi --test header -- --ignored"
    );
}

#[test]
#[ignore = "writes the header"]
fn make_the_header_anew() {
    std::fs::write(path(), made()).unwrap();
}
