//! Grant tables on plain Linux: a monitor, and domains that are processes.
//!
//! No root, no kernel module, no Xen, no KVM. One process is the hypervisor ([`monitor`]): it embeds
//! `gnttab-engine`, holds every domain's memory, serves hypercalls and starts domains. Every domain is a
//! process of its own ([`launch`], [`confine`]), whose program links [`runtime`] and so `gnttab-guest` and
//! `gnttab-io`. What keeps domains apart is the Linux kernel:
//!
//! | a domain's | is | so that |
//! |---|---|---|
//! | memory | a memfd that only it and the monitor map | no other process has a way to it |
//! | page that peers may map | a memfd of its own, its size sealed | a descriptor of it gives access to nothing else, and truncating it can crash nobody |
//! | page granted for reading | sealed against new writers | not even a peer that keeps the descriptor can write |
//! | page whose access has ended | a new memfd with the same content ([renewal](runtime)) | what a peer has kept shows nothing that is written later |
//! | grant table | a memfd that it and the engine map | granting and ending make no call |
//! | hypercall | words in shared memory and a futex ([`area`]) | a batch costs one wake-up, or none |
//! | event channel | two pipes | the monitor is not in the way, and no peer can make the other wait |
//! | process | confined before its program runs | it reaches its memory, its descriptors, and nothing else ([but for what files are](confine)) |
//!
//! The data path is the guests' own: rings in granted pages and event channels. The monitor is not in it.
//!
//! What is trusted: the monitor and the launcher (this crate), the engine, the store's server, the kernel. A
//! domain's program is not. [`hostile`] holds what one would try; the tests run it, and show that the same
//! attempts succeed where nothing confines them.
//!
//! ```no_run
//! use std::process::ExitCode;
//! use std::sync::Arc;
//! use gnttab_host::launch::{self, Program, Role, Start};
//! use gnttab_host::monitor::{DomainSpec, Monitor, Settings};
//! use gnttab_host::runtime::Domain;
//!
//! /// What runs in the domain's own, confined process.
//! fn guest(start: Start) -> ExitCode {
//!     match Domain::join(start.channel) {
//!         Ok(domain) => {
//!             println!("this is {}", domain.id());
//!             ExitCode::SUCCESS
//!         }
//!         Err(error) => {
//!             eprintln!("{error}");
//!             ExitCode::FAILURE
//!         }
//!     }
//! }
//!
//! const ROLES: &[(&str, Role)] = &[("guest", guest)];
//!
//! fn main() -> ExitCode {
//!     // Domains are this executable, started again.
//!     if let Some(code) = launch::domain_main(ROLES) {
//!         return code;
//!     }
//!     match machine() {
//!         Ok(()) => ExitCode::SUCCESS,
//!         Err(error) => {
//!             eprintln!("{error}");
//!             ExitCode::FAILURE
//!         }
//!     }
//! }
//!
//! fn machine() -> Result<(), Box<dyn std::error::Error>> {
//!     let monitor = Monitor::start(Settings::default())?;
//!     let guest = monitor.create(DomainSpec::new("guest", Program::role("guest")))?;
//!     assert!(monitor.domain(guest)?.isolated);
//!     monitor.wait(guest)?;
//!     Ok(())
//! }
//! ```
//!
//! # Limits
//! * A page costs the monitor a descriptor and a mapping from when it can first be mapped by peers
//!   ([`DomainSpec::shareable_pages`](monitor::DomainSpec::shareable_pages)); the kernel allows a process
//!   65,530 mappings by default, and as many descriptors as `ulimit -Hn` says.
//! * A page that was granted for reading and mapped cannot be mapped for writing, by whomever, until its
//!   access has ended and it was renewed; such a map answers `general_error`.
//! * A page that was not made shareable cannot be mapped (`general_error`); copies reach every page.
//! * An unmap is the domain's own: the monitor cannot see whether a hostile one really did. Renewal makes
//!   up for that before the granter is told that access has ended.
//! * Domains are 64-bit and auto-translated (HVM on x86, Arm), as the engine sees them.

#![deny(unsafe_code)]

#[expect(
    unsafe_code,
    reason = "the one place for system calls and memory that other processes write"
)]
pub mod sys;

pub mod area;
pub mod confine;
pub mod control;
pub mod hostile;
pub mod launch;
pub mod monitor;
pub mod protocol;
pub mod runtime;
pub mod spin;
