//! The security catalogue against rings, frontends and backends: for each advisory that concerns them a test that fails on
//! code with that hole. `docs/advisories.md` says what went wrong elsewhere, and which of these tests (or of those beside
//! this folder) shows that it cannot here.

#![expect(clippy::tests_outside_test_module, reason = "this whole crate is tests")]

mod answers;
mod content;
mod floods;
mod indexes;
mod life;
mod mapping;
mod rig;
