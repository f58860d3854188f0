//! The world in which a real Xen answers.

use core::cell::UnsafeCell;

use gnttab_conformance::play::World;
use gnttab_conformance::script::{
    AREA_PAGES, OTHER, OTHER_PAGES, OTHER_TABLE, PAGES, SLOTS, SLOTS_TABLE, STATUS, TABLE,
};

use crate::xen::{
    Pages, flush, frame_of, hypercall, load_bytes, load8, load16, load64, map, map_foreign, pte_of,
    store_bytes, store8, store16, store32, store64,
};

const GRANT_TABLE_OP: u64 = 20;
/// Frames of a table that are shown.
const TABLE_FRAMES: usize = 64;
const STATUS_FRAMES: usize = 8;
const AREA: usize = AREA_PAGES as usize;

/// Present, writable, user, accessed, dirty: what Xen makes of a 64-bit PV kernel's mappings anyway.
const RW: u64 = 0x67;
const RO: u64 = 0x25;

static SLOT: Pages<16> = Pages::new();
static PAGE: Pages<8> = Pages::new();
/// What backs the areas: the first has a page more.
static BACKING: [Pages<{ AREA + 1 }>; 3] = [Pages::new(), Pages::new(), Pages::new()];
/// Where scripts see the areas, with one page more that maps nothing.
static FRONT: [Pages<{ AREA + 2 }>; 3] = [Pages::new(), Pages::new(), Pages::new()];
static TABLE_WINDOW: Pages<TABLE_FRAMES> = Pages::new();
static STATUS_WINDOW: Pages<STATUS_FRAMES> = Pages::new();
/// Where the other domain's pages and table are seen.
static OTHER_PAGE: Pages<8> = Pages::new();
static OTHER_TABLE_WINDOW: Pages<TABLE_FRAMES> = Pages::new();
/// Arguments of the kernel's own hypercalls, and the lists that they fill.
static OWN: Pages<2> = Pages::new();

/// Words of a script's answer.
pub struct Answer {
    words: &'static UnsafeCell<[u64; Answer::MOST]>,
    used: usize,
}

struct Room(UnsafeCell<[u64; Answer::MOST]>);
// SAFETY: one processor; `RealXen` is made once and is the only one to use it.
unsafe impl Sync for Room {}
static ROOM: Room = Room(UnsafeCell::new([0; Answer::MOST]));

impl Answer {
    const MOST: usize = 60_000;

    pub fn clear(&mut self) {
        self.used = 0;
    }

    pub fn words(&self) -> &[u64] {
        // SAFETY: nothing is pushed while the words are borrowed.
        unsafe { &(&*self.words.get())[..self.used] }
    }

    fn push(&mut self, word: u64) {
        if self.used < Answer::MOST {
            // SAFETY: `&mut self` is the only user.
            unsafe { (&mut *self.words.get())[self.used] = word };
            self.used += 1;
        }
    }
}

/// See the module.
pub struct RealXen {
    pub answer: Answer,
    pub verbose: bool,
    frames: usize,
    status_frames: usize,
    version: u32,
    table: [u64; TABLE_FRAMES],
    status: [u64; STATUS_FRAMES],
    pages: [u64; PAGES as usize],
    slot_ptes: [u64; SLOTS as usize],
    slots_table: u64,
    other_pages: [u64; PAGES as usize],
    other_table: [u64; TABLE_FRAMES],
    other_frames: usize,
}

impl RealXen {
    pub fn new() -> RealXen {
        for area in 0..3 {
            let back = BACKING[area].addr();
            let front = FRONT[area].addr();
            for page in 0..AREA as u64 + 2 {
                let frame = (page <= AREA as u64).then(|| frame_of(back + page * 4096) << 12);
                let pte = match (page, frame) {
                    (page, Some(frame)) if page < AREA as u64 => frame | RW,
                    (_, Some(frame)) if area == 0 => frame | RO,
                    _ => 0,
                };
                assert!(map(front + page * 4096, pte), "an area's page");
            }
        }
        let mut world = RealXen {
            answer: Answer {
                words: &ROOM.0,
                used: 0,
            },
            verbose: false,
            frames: 0,
            status_frames: 0,
            version: 1,
            table: [0; TABLE_FRAMES],
            status: [0; STATUS_FRAMES],
            pages: core::array::from_fn(|page| frame_of(PAGE.addr() + page as u64 * 4096)),
            slot_ptes: core::array::from_fn(|slot| pte_of(SLOT.addr() + slot as u64 * 4096)),
            slots_table: 0,
            other_pages: [0; PAGES as usize],
            other_table: [0; TABLE_FRAMES],
            other_frames: 0,
        };
        world.slots_table = frame_of(world.slot_ptes[0] & !0xFFF);
        for slot in 0..SLOTS {
            assert!(world.set_pte(slot, None), "a slot");
        }
        let made = crate::domain::create(OWN.addr(), OTHER, &mut world.other_pages);
        assert!(made, "the other domain");
        for (page, frame) in (0..).zip(world.other_pages) {
            let there = OTHER_PAGE.addr() + page * 4096;
            assert!(
                map_foreign(there, frame << 12 | RW, OTHER),
                "the other domain's page"
            );
        }
        for page in (0..PAGES).chain(OTHER_PAGES..OTHER_PAGES + PAGES) {
            world.reset_page(page);
        }
        world.refresh();
        world
    }

    /// How many frames a table has; their numbers are left in a list.
    fn frames_of(&self, dom: u64, list: u64) -> usize {
        assert_eq!(self.own_call(6, &dom.to_le_bytes()), 0, "query_size");
        let frames = load64(OWN.addr()) >> 32;
        let mut setup = [0; 24];
        setup[..8].copy_from_slice(&(dom | frames << 32).to_le_bytes());
        setup[16..].copy_from_slice(&list.to_le_bytes());
        assert_eq!(self.own_call(2, &setup), 0, "setup_table");
        frames as usize
    }

    fn own_call(&self, op: u64, bytes: &[u8]) -> i64 {
        store_bytes(OWN.addr(), bytes);
        hypercall(GRANT_TABLE_OP, op, OWN.addr(), 1, 0)
    }
}

fn window_of(other: bool) -> u64 {
    if other {
        OTHER_TABLE_WINDOW.addr()
    } else {
        TABLE_WINDOW.addr()
    }
}

/// Where a page is seen whatever happens to the slots.
fn home_of(page: u64) -> u64 {
    let window = if page < PAGES {
        PAGE.addr()
    } else {
        OTHER_PAGE.addr()
    };
    window + page % 8 * 4096
}

fn area_of(area: u8) -> usize {
    usize::from(area).min(2)
}

impl World for RealXen {
    fn call(&mut self, command: u64, addr: u64, count: u64) -> i64 {
        hypercall(GRANT_TABLE_OP, command, addr, count, 0)
    }

    fn area(&self, area: u8) -> u64 {
        FRONT[area_of(area)].addr()
    }

    fn poke(&mut self, area: u8, offset: u64, bytes: &[u8]) {
        store_bytes(BACKING[area_of(area)].addr() + offset, bytes);
    }

    fn peek(&self, area: u8, offset: u64, into: &mut [u8]) {
        load_bytes(BACKING[area_of(area)].addr() + offset, into);
    }

    fn frame(&self, name: u64) -> Option<u64> {
        match name {
            ..PAGES => Some(self.pages[name as usize]),
            SLOTS_TABLE => Some(self.slots_table),
            TABLE..STATUS => self.table[..self.frames].get((name - TABLE) as usize).copied(),
            OTHER_PAGES..TABLE => self.other_pages.get((name - OTHER_PAGES) as usize).copied(),
            OTHER_TABLE.. => self.other_table[..self.other_frames]
                .get((name - OTHER_TABLE) as usize)
                .copied(),
            STATUS.. => self.status[..self.status_frames]
                .get((name - STATUS) as usize)
                .copied(),
            _ => None,
        }
    }

    fn name(&self, frame: u64) -> Option<u64> {
        let find = |frames: &[u64], base| {
            let at = frames.iter().position(|known| *known == frame)?;
            Some(base + at as u64)
        };
        if frame == self.slots_table {
            return Some(SLOTS_TABLE);
        }
        find(&self.pages, 0)
            .or_else(|| find(&self.table[..self.frames], TABLE))
            .or_else(|| find(&self.status[..self.status_frames], STATUS))
            .or_else(|| find(&self.other_pages, OTHER_PAGES))
            .or_else(|| find(&self.other_table[..self.other_frames], OTHER_TABLE))
    }

    fn slot(&self, slot: u64) -> u64 {
        SLOT.addr() + slot * 4096
    }

    fn pte_addr(&self, slot: u64) -> u64 {
        (self.slots_table << 12) | (self.slot_ptes[slot as usize] & 0xFFF)
    }

    fn pte(&self, slot: u64) -> u64 {
        load64(self.slot_ptes[slot as usize])
    }

    fn set_pte(&mut self, slot: u64, page: Option<(u64, bool)>) -> bool {
        let pte = match page {
            None => 0,
            Some((name, writable)) => {
                let Some(frame) = self.frame(name) else {
                    return false;
                };
                frame << 12 | if writable { RW } else { RO }
            }
        };
        if page.is_some_and(|(name, _)| (OTHER_PAGES..TABLE).contains(&name) || name >= OTHER_TABLE) {
            return map_foreign(self.slot(slot), pte, OTHER);
        }
        map(self.slot(slot), pte)
    }

    fn load(&self, slot: u64, offset: u16) -> u8 {
        // A grant mapped over another mapping leaves the old translation to the kernel to flush.
        flush(self.slot(slot));
        load8(self.slot(slot) + u64::from(offset))
    }

    fn store(&mut self, slot: u64, offset: u16, byte: u8) {
        flush(self.slot(slot));
        store8(self.slot(slot) + u64::from(offset), byte);
    }

    fn page_word(&self, page: u64, word: usize) -> u64 {
        load64(home_of(page) + word as u64 * 8)
    }

    fn reset_page(&mut self, page: u64) {
        for word in 0..512 {
            store64(
                home_of(page) + word * 8,
                gnttab_conformance::play::pattern(page, word),
            );
        }
    }

    fn other_pages(&self) -> u64 {
        PAGES
    }

    fn table_bytes(&self, other: bool) -> u64 {
        4096 * if other { self.other_frames } else { self.frames } as u64
    }

    fn table_load(&self, other: bool, offset: u64, into: &mut [u8]) {
        load_bytes(window_of(other) + offset, into);
    }

    fn table_store(&mut self, other: bool, offset: u64, size: u8, value: u64) {
        let at = window_of(other) + offset;
        let [byte, ..] = value.to_le_bytes();
        match size {
            1 => store8(at, byte),
            2 => store16(at & !1, value as u16),
            4 => store32(at & !3, value as u32),
            _ => store64(at & !7, value),
        }
    }

    fn status_load(&self, index: u64) -> Option<u16> {
        (index < self.status_frames as u64 * 2048).then(|| load16(STATUS_WINDOW.addr() + index * 2))
    }

    fn status_store(&mut self, index: u64, value: u16) {
        if index < self.status_frames as u64 * 2048 {
            store16(STATUS_WINDOW.addr() + index * 2, value);
        }
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn refresh(&mut self) {
        const SELF: u64 = 0x7FF0;
        let list = OWN.addr() + 4096;
        let frames = self.frames_of(u64::from(OTHER), list);
        for index in 0..frames.min(TABLE_FRAMES) {
            let frame = load64(list + index as u64 * 8);
            if index >= self.other_frames {
                let there = OTHER_TABLE_WINDOW.addr() + index as u64 * 4096;
                let mapped = map_foreign(there, frame << 12 | RW, OTHER);
                assert!(mapped, "a frame of the other's table");
            }
            self.other_table[index] = frame;
        }
        self.other_frames = frames.min(TABLE_FRAMES);
        let frames = self.frames_of(SELF, list);
        for index in 0..frames.min(TABLE_FRAMES) {
            let frame = load64(list + index as u64 * 8);
            if index >= self.frames || self.table[index] != frame {
                let there = TABLE_WINDOW.addr() + index as u64 * 4096;
                assert!(map(there, frame << 12 | RW), "a frame of the table");
            }
            self.table[index] = frame;
        }
        self.frames = frames.min(TABLE_FRAMES);
        assert_eq!(self.own_call(10, &SELF.to_le_bytes()), 0, "get_version");
        self.version = (load64(OWN.addr()) >> 32) as u32;
        let wanted = if self.version == 2 {
            self.frames.div_ceil(8)
        } else {
            0
        };
        if wanted < self.status_frames {
            self.release_status();
        }
        if wanted > 0 {
            let mut status = [0; 16];
            status[..8].copy_from_slice(&(SELF << 32 | wanted as u64).to_le_bytes());
            status[8..].copy_from_slice(&list.to_le_bytes());
            assert_eq!(self.own_call(9, &status), 0, "get_status_frames");
            for index in 0..wanted {
                let frame = load64(list + index as u64 * 8);
                let there = STATUS_WINDOW.addr() + index as u64 * 4096;
                if index >= self.status_frames || self.status[index] != frame {
                    assert!(map(there, frame << 12 | RW), "a status frame");
                }
                self.status[index] = frame;
            }
            self.status_frames = wanted;
        }
    }

    fn kill(&mut self) -> i64 {
        crate::domain::destroy(OWN.addr(), OTHER)
    }

    fn release_status(&mut self) {
        for index in 0..self.status_frames as u64 {
            assert!(map(STATUS_WINDOW.addr() + index * 4096, 0), "a status frame");
        }
        self.status_frames = 0;
    }

    fn emit(&mut self, word: u64) {
        self.answer.push(word);
    }

    fn begins(&mut self, _step: usize) {}

    fn seen(&mut self, _what: &'static str, _index: u64, value: u64) {
        self.answer.push(value);
    }

    fn verbose(&self) -> bool {
        self.verbose
    }
}
