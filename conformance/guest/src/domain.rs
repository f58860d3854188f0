//! A second domain, that never runs: the kernel makes it, feeds it, and acts for it through its table.

use crate::xen::{domctl, load64, memory_op, store_bytes, store64};

/// The interface version of domain control that Xen 4.17 speaks.
const DOMCTL_VERSION: u32 = 0x15;
const CREATE: u32 = 1;
const DESTROY: u32 = 2;
const MAX_MEM: u32 = 11;
const POPULATE_PHYSMAP: u64 = 6;

/// Makes a domain with so many pages, in a scratch page of the kernel's; their frames are stored.
pub fn create(scratch: u64, number: u16, pages: &mut [u64]) -> bool {
    // struct xen_domctl_createdomain, by 32-bit words.
    let mut create = [0_u32; 17];
    create[1] = 0x6E67_7474; // a handle that is not all zero
    create[7] = 1; // vCPUs at most
    create[8] = 1023; // event channels at most
    create[9] = u32::MAX; // grant frames: the default
    create[10] = u32::MAX; // maptrack frames: the default
    create[11] = 2; // grant tables of version 2 at most
    let memory = [8 << 10, 0]; // KiB
    control(scratch, CREATE, number, &create) == 0
        && control(scratch, MAX_MEM, number, &memory) == 0
        && populate(scratch, number, pages)
}

/// Kills a domain. Xen goes on with it as often as it takes.
pub fn destroy(scratch: u64, number: u16) -> i64 {
    control(scratch, DESTROY, number, &[])
}

fn control(scratch: u64, command: u32, number: u16, what: &[u32]) -> i64 {
    for word in 0..32 {
        store64(scratch + word * 8, 0);
    }
    store_bytes(scratch, &command.to_le_bytes());
    store_bytes(scratch + 4, &DOMCTL_VERSION.to_le_bytes());
    store_bytes(scratch + 8, &number.to_le_bytes());
    for (at, word) in (scratch + 16..).step_by(4).zip(what) {
        store_bytes(at, &word.to_le_bytes());
    }
    domctl(scratch)
}

fn populate(scratch: u64, number: u16, pages: &mut [u64]) -> bool {
    let list = scratch + 2048;
    for index in 0..pages.len() as u64 {
        store64(list + index * 8, index);
    }
    store64(scratch, list);
    store64(scratch + 8, pages.len() as u64);
    store64(scratch + 16, 0);
    store64(scratch + 24, u64::from(number));
    let done = memory_op(POPULATE_PHYSMAP, scratch) == pages.len() as i64;
    for (at, page) in (list..).step_by(8).zip(pages) {
        *page = load64(at);
    }
    done
}
