//! `cargo bench -p gnttab-bench [-- FILTER]`: what `gnttab bench` measures.

use gnttab_bench::{Figure, Options, run};

fn main() {
    // Cargo itself passes `--bench`.
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    let options = Options {
        filter,
        ..Options::default()
    };
    println!("{}", Figure::heading());
    run(&options, &mut |figure| println!("{}", figure.line()));
}
