//! The control socket: what a running machine tells about itself, to its own user.
//!
//! A question is one line of JSON and the answer another; a caller asks as often as it likes, or asks for
//! [events](Question::Events) and then hears them line by line until it hangs up. Nothing can be changed through
//! it. [`Client`] asks, [`Control`] answers.
//!
//! ```text
//! {"version":1,"content":{"get":"domains"}}
//! {"version":1,"content":{"domains":[{"id":1,"name":"storage", ...}]}}
//! ```
//!
//! What must always hold:
//! 1. A caller costs a thread and some memory, both bounded, and the machine nothing: what is told is read from
//!    atomics, and events are dropped, and counted, before anybody in the machine waits for a caller.
//! 2. A caller that is silent, slow or hostile keeps no other from being answered: when there are as many callers as
//!    there may be, the one that has been silent for longest makes room.
//! 3. Only this user, and root, are let in.

mod client;
mod protocol;
mod server;

pub use client::{Client, ControlError, Heard};
pub use protocol::{Answer, Question, Table, VERSION, decode_answer, decode_question, encode};
pub use server::{Control, MOST_CALLERS, MOST_WATCHERS};
