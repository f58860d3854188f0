//! What the fuzz targets do with their input, one module for each.
//!
//! A target is a function of bytes that panics when a rule is broken. `cargo fuzz` links it with
//! libFuzzer; `cargo test` replays the corpora without; a target's program takes files and tells what
//! happens, so that a finding can be looked at with the stable toolchain:
//!
//! ```text
//! cargo run --manifest-path fuzz/Cargo.toml --bin engine -- fuzz/artifacts/engine/crash-...
//! ```

pub mod backend;
// What the NBD connection leans on, as the command has it.
#[rustfmt::skip]
#[path = "../../crates/cli/src/block.rs"]
#[expect(dead_code, reason = "disks and servers use the rest")]
mod block;
pub mod control;
pub mod dump;
pub mod engine;
pub mod frontend;
mod input;
pub mod nbd;
pub mod xenstore;

/// A target's body: a function of bytes that panics when a rule is broken.
pub type Target = fn(&[u8]);

/// Every target, by the name of its program and its corpus.
pub const TARGETS: [(&str, Target); 7] = [
    ("engine", engine::run),
    ("backend", backend::run),
    ("frontend", frontend::run),
    ("xenstore", xenstore::run),
    ("control", control::run),
    ("dump", dump::run),
    ("nbd", nbd::run),
];

/// The program of a target: under the fuzzer its entry point, otherwise one that replays files.
#[macro_export]
macro_rules! target {
    ($run:path) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|input: &[u8]| $run(input));
        #[cfg(not(fuzzing))]
        fn main() {
            $crate::replay($run);
        }
    };
}

/// Runs the files that the command line names.
///
/// # Panics
/// If a file cannot be read, and wherever the target does.
pub fn replay(target: Target) {
    for path in std::env::args_os().skip(1) {
        let input = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        eprintln!("{}: {} bytes", path.display(), input.len());
        target(&input);
    }
}
