//! Everything that needs `unsafe` or a raw system call: memory, descriptors, processes.
//!
//! What must always hold:
//! 1. Memory that another process can write is reached through [`Window`] only, by copies and
//!    atomics, never through a Rust reference to plain data.
//! 2. An address range belongs to one [`Window`] from its creation to its drop. What happens
//!    inside it (placing, clearing) never lets the range go, so a stale offset meets the new
//!    page or faults; it never meets memory of somebody else.
//! 3. A memfd that leaves this process cannot change its size any more ([`SealedMemory`]), so a
//!    peer can never turn an access of ours into a SIGBUS.
//! 4. Every descriptor is close-on-exec and is received with that flag set.

pub(crate) mod attack;
mod bridge;
mod channel;
mod event;
mod listener;
mod memory;
mod process;
mod window;

pub use bridge::WindowPages;
pub use channel::{Channel, ChannelError, MAX_DESCRIPTORS, Message};
pub use event::{Event, EventPort, Poller};
pub use listener::Listener;
pub use memory::{Backing, MemoryError, SealedMemory};
pub(crate) use process::{
    become_undumpable, become_user, die_with_parent, give_up_capabilities, give_up_new_privileges,
    leave_file_system, limit, raise_descriptor_limit, take_channel_from_stdin, take_inherited,
};
pub use window::{Access, Window, WindowError};
