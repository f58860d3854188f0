//! Every rule of the store, through the messages that a client would send.
#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

mod domains;
mod hostile;
mod nodes;
mod permissions;
mod quotas;
mod transactions;
mod watches;
mod world;
