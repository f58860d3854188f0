//! Measures what a hypercall and an event cost between two processes... of one machine.
//!
//! `cargo run --release -p gnttab-host --example latency`

fn main() {}
