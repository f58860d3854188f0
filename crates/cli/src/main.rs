//! The `gnttab` command.

fn main() {}
