//! Bytes of the engine's private state: for a domain that grants nothing, a reference, a mapping.
//!
//! `cargo run --release -p gnttab-bench --example memory`. Counted by the allocator, so nothing is missed;
//! frames that guests see are the hypervisor's and do not count. Fails if a promise is broken.

use std::process::ExitCode;

use gnttab_bench::memory::{Counting, measure};

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

fn main() -> ExitCode {
    let mut kept = true;
    for figure in measure(&ALLOCATOR) {
        let verdict = if figure.bytes <= figure.promised {
            ""
        } else {
            "  BROKEN"
        };
        println!(
            "{:<44} {:>7.1} bytes, promised {:>6.0}{verdict}",
            figure.name, figure.bytes, figure.promised
        );
        kept &= figure.bytes <= figure.promised;
    }
    if kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
