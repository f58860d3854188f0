//! What other implementations of grant tables got wrong, as tests that fail on an engine that does it
//! too. `docs/advisories.md` is the chapter that goes with them, and names a test for every number of
//! the catalogue; `catalogue` holds the chapter to that.

#![cfg(feature = "machine")]
#![expect(clippy::tests_outside_test_module, reason = "this crate is nothing but tests")]

mod audits;
mod bounds;
mod catalogue;
mod copies;
mod death;
mod devices;
mod handles;
mod pins;
mod rest;
mod stage;
mod transfers;
mod versions;
