//! The second domain, which the runner makes: how the kernel has it make hypercalls, gives it pages
//! and kills it. `gnttab_conformance::puppet` is how it looks inside.

use gnttab_conformance::puppet::{ARGS, ASKED, MADE, NUMBER, RESULT};
use gnttab_conformance::script::OTHER;

use crate::xen::{domctl, load64, memory_op, pause, store_bytes, store64};

const DESTROY: u32 = 2;
const PAUSE: u32 = 3;
const UNPAUSE: u32 = 4;
const INCREASE_RESERVATION: u64 = 0;
const DECREASE_RESERVATION: u64 = 1;
const SELF: u64 = 0x7FF0;

/// Has it make a hypercall: number and three arguments. It runs for no longer than that takes.
pub fn call(scratch: u64, control_version: u64, words: u64, call: [u64; 4]) -> i64 {
    let word = |word: usize| words + word as u64 * 8;
    let asked = load64(word(ASKED)) + 1;
    store64(word(NUMBER), call[0]);
    for (at, argument) in (ARGS..).zip([call[1], call[2], call[3], 0, 0]) {
        store64(word(at), argument);
    }
    store64(word(ASKED), asked);
    assert_eq!(control(scratch, control_version, UNPAUSE), 0, "unpausedomain");
    while load64(word(MADE)) != asked {
        pause();
    }
    assert_eq!(control(scratch, control_version, PAUSE), 0, "pausedomain");
    load64(word(RESULT)) as i64
}

/// Kills it. Xen goes on with that as often as it takes.
pub fn destroy(scratch: u64, control_version: u64) -> i64 {
    control(scratch, control_version, DESTROY)
}

fn control(scratch: u64, control_version: u64, command: u32) -> i64 {
    for word in 0..32 {
        store64(scratch + word * 8, 0);
    }
    store64(scratch, u64::from(command) | control_version << 32);
    store_bytes(scratch + 8, &OTHER.to_le_bytes());
    domctl(scratch)
}

/// struct xen_memory_reservation, for one page.
fn reserve(scratch: u64, command: u64, other: bool) -> bool {
    store64(scratch, scratch + 64);
    store64(scratch + 8, 1);
    store64(scratch + 16, 0);
    store64(scratch + 24, if other { u64::from(OTHER) } else { SELF });
    memory_op(command, scratch) == 1
}

/// A new page for the kernel or for the other domain.
pub fn get(scratch: u64, other: bool) -> u64 {
    assert!(reserve(scratch, INCREASE_RESERVATION, other), "a page");
    load64(scratch + 64)
}

/// Frees a page of the kernel's or of the other domain's.
pub fn give_back(scratch: u64, other: bool, frame: u64) -> bool {
    store64(scratch + 64, frame);
    reserve(scratch, DECREASE_RESERVATION, other)
}
