//! Makes PV domains on a real Xen that do what they are told (`gnttab_conformance::puppet`).
//!
//! The first domain's kernel makes the hypercalls of a toolstack; what these take and what the new
//! domain has in its pages is stored straight into the machine's memory.

use std::time::{Duration, Instant};

use gnttab_conformance::puppet::{
    AREA_PAGES, ARGS, ARGUMENTS_ADDR, ASKED, CODE, CODE_ADDR, LIST_ADDR, MADE, NUMBER, RESULT, SLOTS_ADDR,
    VCPU_WORDS, WORDS_ADDR,
};

use crate::real_xen::{RealXen, XenError};

const MEMORY_OP: u64 = 12;
const DOMCTL: u64 = 36;
const POPULATE_PHYSMAP: u64 = 6;
const DOMID_SELF: u64 = 0x7FF0;

/// Operations of domain control.
pub(crate) mod control {
    pub(crate) const CREATE: u32 = 1;
    pub(crate) const DESTROY: u32 = 2;
    pub(crate) const PAUSE: u32 = 3;
    pub(crate) const UNPAUSE: u32 = 4;
    pub(crate) const GET_INFO: u32 = 5;
    pub(crate) const MAX_MEM: u32 = 11;
    pub(crate) const SET_VCPU_CONTEXT: u32 = 12;
    pub(crate) const MAX_VCPUS: u32 = 15;
    pub(crate) const GET_PAGE_FRAME_INFO: u32 = 61;
}

/// The interface version of domain control that a hypervisor speaks; what is used of it is laid out
/// alike in all of them.
pub(crate) fn control_version(xen: u32) -> u64 {
    match xen {
        ..0x4_0012 => 0x15,
        0x4_0012 => 0x16,
        _ => 0x17,
    }
}

/// What a domain is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) id: u16,
    pub(crate) vcpus: usize,
    /// Limits; none: the hypervisor's.
    pub(crate) grant_frames: Option<u32>,
    pub(crate) maptrack_frames: Option<u32>,
    /// Highest version of its table.
    pub(crate) version: u32,
    /// Pages that nobody maps.
    pub(crate) pages: usize,
}

/// Pages of a domain, by what they are for.
mod at {
    use super::AREA_PAGES;

    /// Page tables of levels 4, 3 and 2, then of level 1 for code, arguments, lists and twice slots.
    pub(super) const TABLES: usize = 0;
    pub(super) const SLOTS: usize = 6;
    pub(super) const CODE: usize = 8;
    pub(super) const WORDS: usize = 9;
    pub(super) const ARGUMENTS: usize = 10;
    pub(super) const LISTS: usize = ARGUMENTS + AREA_PAGES;
    pub(super) const OTHERS: usize = LISTS + AREA_PAGES;
}

/// A domain.
#[derive(Debug)]
pub(crate) struct Puppet {
    pub(crate) id: u16,
    pages: Vec<u64>,
}

/// An operation of domain control on a domain, with what it takes; what it returned, and what it left.
pub(crate) fn domctl(
    xen: &mut RealXen,
    command: u32,
    domain: u16,
    takes: &[u8],
) -> Result<(i64, [u8; 128]), XenError> {
    let mut bytes = vec![0; 16 + 128];
    let head = u64::from(command) | control_version(xen.version) << 32;
    bytes[..8].copy_from_slice(&head.to_le_bytes());
    bytes[8..10].copy_from_slice(&domain.to_le_bytes());
    bytes[16..16 + takes.len()].copy_from_slice(takes);
    let place = xen.scratch[0] << 12;
    xen.write(place, &bytes)?;
    let result = xen.hypercall([DOMCTL, ARGUMENTS_ADDR, 0, 0, 0, 0])?;
    let mut left = [0; 128];
    xen.read(place + 16, &mut left)?;
    Ok((result, left))
}

/// A memory operation on pages of one domain (struct xen_memory_reservation): their numbers go in
/// and come out. How many were done.
pub(crate) fn reserve(
    xen: &mut RealXen,
    command: u64,
    domain: u64,
    numbers: &mut [u64],
) -> Result<i64, XenError> {
    let list: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    xen.write(xen.scratch[1] << 12, &list)?;
    let head: Vec<u8> = [ARGUMENTS_ADDR + 4096, numbers.len() as u64, 0, domain]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    xen.write(xen.scratch[0] << 12, &head)?;
    let done = xen.hypercall([MEMORY_OP, command, ARGUMENTS_ADDR, 0, 0, 0])?;
    let mut list = vec![0; numbers.len() * 8];
    xen.read(xen.scratch[1] << 12, &mut list)?;
    for (number, bytes) in numbers.iter_mut().zip(list.as_chunks::<8>().0) {
        *number = u64::from_le_bytes(*bytes);
    }
    Ok(done)
}

/// New pages for the first domain, that nobody maps.
pub(crate) fn new_pages(xen: &mut RealXen, numbers: &mut [u64]) -> Result<(), XenError> {
    const INCREASE_RESERVATION: u64 = 0;
    numbers.fill(0);
    let done = reserve(xen, INCREASE_RESERVATION, DOMID_SELF, numbers)?;
    done_is("increase_reservation", 0, done, numbers.len())
}

fn done_is(what: &'static str, domain: u16, result: i64, wanted: usize) -> Result<(), XenError> {
    if usize::try_from(result) == Ok(wanted) {
        Ok(())
    } else {
        Err(XenError::Domain { domain, what, result })
    }
}

/// struct xen_domctl_createdomain.
pub(crate) fn creation(plan: &Plan) -> Vec<u8> {
    let mut words = [0_u32; 17];
    words[1] = 0x6E67_7474; // a handle that is not all zero
    words[7] = u32::try_from(plan.vcpus).unwrap_or(1);
    words[8] = 1023; // event channels
    words[9] = plan.grant_frames.unwrap_or(u32::MAX);
    words[10] = plan.maptrack_frames.unwrap_or(u32::MAX);
    words[11] = plan.version;
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Puppet {
    /// Makes a domain, paused. Its number may have to become free first.
    pub(crate) fn create(xen: &mut RealXen, plan: &Plan) -> Result<Puppet, XenError> {
        const EXISTS: i64 = -17;
        const MOST_KIB: u64 = 16 << 10;
        let started = Instant::now();
        let id = plan.id;
        let creation = creation(plan);
        let created = loop {
            let (result, _) = domctl(xen, control::CREATE, id, &creation)?;
            if result != EXISTS || started.elapsed() > Duration::from_secs(2) {
                break result;
            }
        };
        done_is("createdomain", id, created, 0)?;
        let (result, _) = domctl(xen, control::MAX_MEM, id, &MOST_KIB.to_le_bytes())?;
        done_is("max_mem", id, result, 0)?;
        let vcpus = u32::try_from(plan.vcpus).unwrap_or(1);
        let (result, _) = domctl(xen, control::MAX_VCPUS, id, &vcpus.to_le_bytes())?;
        done_is("max_vcpus", id, result, 0)?;
        let mut pages: Vec<u64> = (0..(at::OTHERS + plan.pages) as u64).collect();
        let done = reserve(xen, POPULATE_PHYSMAP, u64::from(id), &mut pages)?;
        done_is("populate_physmap", id, done, pages.len())?;
        let puppet = Puppet { id, pages };
        puppet.fill(xen)?;
        for vcpu in 0..plan.vcpus {
            puppet.set_context(xen, vcpu)?;
        }
        Ok(puppet)
    }

    /// Writes page tables and code.
    fn fill(&self, xen: &RealXen) -> Result<(), XenError> {
        const TABLE: u64 = 0x27; // present, writable, user, accessed
        const DATA: u64 = 0x67; // and dirty
        const CODE_BITS: u64 = 0x25;
        let frame = |page: usize| self.pages[page] << 12;
        for page in 0..at::OTHERS {
            xen.write(frame(page), &[0; 4096])?;
        }
        let entry = |table: usize, addr: u64, level: u32, to: u64| {
            let index = addr >> (12 + 9 * (level - 1)) & 511;
            xen.write(frame(table) + index * 8, &to.to_le_bytes())
        };
        entry(at::TABLES, 0, 4, frame(at::TABLES + 1) | TABLE)?;
        entry(at::TABLES + 1, 0, 3, frame(at::TABLES + 2) | TABLE)?;
        let ranges = [0, ARGUMENTS_ADDR, LIST_ADDR, SLOTS_ADDR, SLOTS_ADDR + (2 << 20)];
        for (table, addr) in (at::TABLES + 3..).zip(ranges) {
            entry(at::TABLES + 2, addr, 2, frame(table) | TABLE)?;
        }
        let [code, arguments, lists] = [3, 4, 5].map(|table| at::TABLES + table);
        entry(code, CODE_ADDR, 1, frame(at::CODE) | CODE_BITS)?;
        entry(code, WORDS_ADDR, 1, frame(at::WORDS) | DATA)?;
        for page in 0..AREA_PAGES {
            let addr = page as u64 * 4096;
            entry(arguments, addr, 1, frame(at::ARGUMENTS + page) | DATA)?;
            entry(lists, addr, 1, frame(at::LISTS + page) | DATA)?;
        }
        xen.write(frame(at::CODE), &CODE)
    }

    /// struct vcpu_guest_context, by the public header's offsets.
    fn set_context(&self, xen: &mut RealXen, vcpu: usize) -> Result<(), XenError> {
        const SIZE: usize = 5168;
        const IN_KERNEL_AND_ONLINE: u64 = 1 << 2 | 1 << 5;
        const CODE_SELECTOR: u64 = 0xE033;
        const DATA_SELECTOR: u64 = 0xE02B;
        const INTERRUPTS: u64 = 1 << 9;
        let words = WORDS_ADDR + (vcpu * VCPU_WORDS * 8) as u64;
        let mut context = [0; SIZE];
        for (offset, word) in [
            (512, IN_KERNEL_AND_ONLINE),
            (560, words),                // rbx
            (648, CODE_ADDR),            // rip
            (656, CODE_SELECTOR),        // cs
            (664, INTERRUPTS),           // rflags
            (680, DATA_SELECTOR),        // ss
            (4968, DATA_SELECTOR),       // the kernel's ss
            (5008, self.pages[0] << 12), // cr3
        ] {
            context[offset..offset + 8].copy_from_slice(&word.to_le_bytes());
        }
        for (page, part) in (1..).zip(context.chunks(4096)) {
            xen.write(xen.scratch[page] << 12, part)?;
        }
        let takes: Vec<u8> = [vcpu as u64, ARGUMENTS_ADDR + 4096]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        let (result, _) = domctl(xen, control::SET_VCPU_CONTEXT, self.id, &takes)?;
        done_is("setvcpucontext", self.id, result, 0)
    }

    /// A page that nobody maps.
    pub(crate) fn page(&self, number: usize) -> u64 {
        self.pages[at::OTHERS + number]
    }

    pub(crate) fn argument_frame(&self, page: usize) -> u64 {
        self.pages[at::ARGUMENTS + page]
    }

    pub(crate) fn list_frame(&self, page: usize) -> u64 {
        self.pages[at::LISTS + page]
    }

    pub(crate) fn words_frame(&self) -> u64 {
        self.pages[at::WORDS]
    }

    /// The first of the two level-1 tables of its slots.
    pub(crate) fn slots_table(&self) -> u64 {
        self.pages[at::SLOTS]
    }

    /// Where the page-table entry for an address lies in the machine, if there is a table for it.
    pub(crate) fn pte_address(&self, addr: u64) -> Option<u64> {
        let ranges = [0, ARGUMENTS_ADDR, LIST_ADDR, SLOTS_ADDR, SLOTS_ADDR + (2 << 20)];
        let range = ranges.iter().position(|range| *range == addr & !0x1F_FFFF)?;
        Some((self.pages[at::TABLES + 3 + range] << 12) + (addr >> 12 & 511) * 8)
    }

    /// Has one of its processors make a hypercall.
    pub(crate) fn call(&self, xen: &mut RealXen, vcpu: usize, call: [u64; 6]) -> Result<i64, XenError> {
        const PATIENCE: Duration = Duration::from_secs(20);
        let place = |word: usize| (self.words_frame() << 12) + ((vcpu * VCPU_WORDS + word) * 8) as u64;
        let load = |xen: &RealXen, word: usize| {
            let mut bytes = [0; 8];
            xen.read(place(word), &mut bytes)?;
            Ok::<u64, XenError>(u64::from_le_bytes(bytes))
        };
        let asked = load(xen, ASKED)? + 1;
        let [number, args @ ..] = call;
        xen.write(place(NUMBER), &number.to_le_bytes())?;
        for (word, arg) in (ARGS..).zip(args) {
            xen.write(place(word), &arg.to_le_bytes())?;
        }
        xen.write(place(ASKED), &asked.to_le_bytes())?;
        domctl(xen, control::UNPAUSE, self.id, &[])?;
        let started = Instant::now();
        while load(xen, MADE)? != asked {
            if started.elapsed() > PATIENCE {
                let result = i64::MIN;
                let what = "a hypercall of its own";
                return Err(XenError::Domain {
                    domain: self.id,
                    what,
                    result,
                });
            }
            std::thread::yield_now();
        }
        domctl(xen, control::PAUSE, self.id, &[])?;
        Ok(load(xen, RESULT)?.cast_signed())
    }
}
