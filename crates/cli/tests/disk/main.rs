//! `gnttab disk` end to end: real clients, a real file system, and processes killed in mid-write.

#![expect(clippy::tests_outside_test_module, reason = "a folder of tests is no module")]

mod client;
mod kill;
#[path = "../schema/mod.rs"]
mod schema;
mod served;
mod tools;
