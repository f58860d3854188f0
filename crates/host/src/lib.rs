//! Grant tables on plain Linux: a monitor, and domains that are processes.

#![deny(unsafe_code)]

#[expect(
    unsafe_code,
    reason = "the one place for system calls and memory that other processes write"
)]
pub mod sys;

pub mod area;
pub mod confine;
pub mod hostile;
pub mod launch;
pub mod monitor;
pub mod protocol;
pub mod runtime;
