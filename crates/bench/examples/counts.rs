//! Runs the hot paths whose instructions `.ci/counts` counts, and prints what to look for.
//!
//! `valgrind --tool=callgrind target/release/examples/counts`: a line for each case, the name of the function
//! to find in callgrind's output and the items that its count is of.

use gnttab_bench::counted::{COUNTED_ITEMS, run};

fn main() {
    for name in run() {
        println!("{name} {COUNTED_ITEMS}");
    }
}
