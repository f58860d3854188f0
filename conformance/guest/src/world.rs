//! The world in which a real Xen answers.

use core::cell::UnsafeCell;

use gnttab_conformance::mailbox::Meeting;
use gnttab_conformance::play::{World, mix, pattern};
use gnttab_conformance::puppet::{ARGUMENTS_ADDR, LIST_ADDR, SLOTS_ADDR};
use gnttab_conformance::script::{
    AREA_PAGES, AREAS, OTHER, OTHER_ARGUMENTS, OTHER_LIST, OTHER_PAGES, OTHER_SLOTS_TABLE, OTHER_STATUS,
    OTHER_TABLE, PAGES, SLOTS, SLOTS_TABLE, SPARE, SPARES, STATUS, TABLE,
};

use crate::other;
use crate::xen::{
    Pages, flush, frame_of, hypercall, load_bytes, load8, load16, load64, map, map_foreign, pte_of,
    set_pte_of, store_bytes, store8, store16, store32, store64,
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
/// What backs the caller's areas: the first has a page more.
static BACKING: [Pages<{ AREA + 1 }>; 3] = [Pages::new(), Pages::new(), Pages::new()];
/// Where scripts see the areas, with one page more that maps nothing.
static FRONT: [Pages<{ AREA + 2 }>; 3] = [Pages::new(), Pages::new(), Pages::new()];
/// Where the kernel sees the other domain's areas.
static OTHER_AREA: [Pages<AREA>; 2] = [Pages::new(), Pages::new()];
/// Where the shared tables are seen: the caller's, the other domain's.
static TABLE_WINDOW: [Pages<TABLE_FRAMES>; 2] = [Pages::new(), Pages::new()];
static STATUS_WINDOW: [Pages<STATUS_FRAMES>; 2] = [Pages::new(), Pages::new()];
/// Where the other domain's pages, words and page table are seen.
static OTHER_PAGE: Pages<8> = Pages::new();
static OTHER_WORDS: Pages<1> = Pages::new();
static OTHER_SLOTS: Pages<1> = Pages::new();
/// Where a page is mapped to see whether it can be.
static TRIAL: Pages<1> = Pages::new();
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

/// A shared table as the kernel sees it.
struct Table {
    other: bool,
    version: u32,
    frames: usize,
    /// Of these the kernel sees so many: not what a dead domain's table has grown by.
    seen: usize,
    frame: [u64; TABLE_FRAMES],
    status_frames: usize,
    status: [u64; STATUS_FRAMES],
}

/// See the module.
pub struct RealXen {
    pub answer: Answer,
    pub verbose: bool,
    tables: [Table; 2],
    pages: [u64; PAGES as usize],
    slot_ptes: [u64; SLOTS as usize],
    slots_table: u64,
    other: Option<Meeting>,
    other_pages: [u64; PAGES as usize],
    spares: [u64; SPARES as usize],
    killed: bool,
}

const SELF: u64 = 0x7FF0;

impl Table {
    const fn new(other: bool) -> Table {
        Table {
            other,
            version: 1,
            frames: 0,
            seen: 0,
            frame: [0; TABLE_FRAMES],
            status_frames: 0,
            status: [0; STATUS_FRAMES],
        }
    }

    fn domain(&self) -> u64 {
        if self.other { u64::from(OTHER) } else { SELF }
    }

    /// Sees a frame of the domain's.
    fn show(&self, there: u64, frame: u64) {
        let pte = frame << 12 | RW;
        let mapped = if self.other {
            map_foreign(there, pte, OTHER)
        } else {
            map(there, pte)
        };
        assert!(mapped, "a frame of a table");
    }

    /// How many frames it has; their numbers are left in a list.
    fn frames_of(&self, list: u64) -> usize {
        let dom = self.domain();
        assert_eq!(own_call(6, &dom.to_le_bytes()), 0, "query_size");
        let frames = load64(OWN.addr()) >> 32;
        let mut setup = [0; 24];
        setup[..8].copy_from_slice(&(dom | frames << 32).to_le_bytes());
        setup[16..].copy_from_slice(&list.to_le_bytes());
        assert_eq!(own_call(2, &setup), 0, "setup_table");
        frames as usize
    }

    /// Looks again: it may have grown or changed its version.
    fn refresh(&mut self, dead: bool) {
        let list = OWN.addr() + 4096;
        let frames = self.frames_of(list).min(TABLE_FRAMES);
        for index in 0..frames {
            let frame = load64(list + index as u64 * 8);
            if !dead && (index >= self.frames || self.frame[index] != frame) {
                self.show(
                    TABLE_WINDOW[usize::from(self.other)].addr() + index as u64 * 4096,
                    frame,
                );
            }
            self.frame[index] = frame;
        }
        self.frames = frames;
        if dead {
            return;
        }
        self.seen = frames;
        assert_eq!(own_call(10, &self.domain().to_le_bytes()), 0, "get_version");
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
            status[..8].copy_from_slice(&(self.domain() << 32 | wanted as u64).to_le_bytes());
            status[8..].copy_from_slice(&list.to_le_bytes());
            assert_eq!(own_call(9, &status), 0, "get_status_frames");
            for index in 0..wanted {
                let frame = load64(list + index as u64 * 8);
                if index >= self.status_frames || self.status[index] != frame {
                    self.show(
                        STATUS_WINDOW[usize::from(self.other)].addr() + index as u64 * 4096,
                        frame,
                    );
                }
                self.status[index] = frame;
            }
            self.status_frames = wanted;
        }
    }

    fn release_status(&mut self) {
        let window = STATUS_WINDOW[usize::from(self.other)].addr();
        for index in 0..self.status_frames as u64 {
            assert!(map(window + index * 4096, 0), "a status frame");
        }
        self.status_frames = 0;
    }

    fn shown(&self) -> &[u64] {
        &self.frame[..self.frames]
    }
}

fn own_call(op: u64, bytes: &[u8]) -> i64 {
    store_bytes(OWN.addr(), bytes);
    hypercall(GRANT_TABLE_OP, op, OWN.addr(), 1, 0)
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
            tables: [Table::new(false), Table::new(true)],
            pages: core::array::from_fn(|page| frame_of(PAGE.addr() + page as u64 * 4096)),
            slot_ptes: core::array::from_fn(|slot| pte_of(SLOT.addr() + slot as u64 * 4096)),
            slots_table: 0,
            other: None,
            other_pages: [0; PAGES as usize],
            spares: [0; SPARES as usize],
            killed: false,
        };
        world.slots_table = frame_of(world.slot_ptes[0] & !0xFFF);
        for slot in 0..SLOTS {
            assert!(world.set_pte(slot, None), "a slot");
        }
        world
    }

    /// Gets to know the other domain, that the runner has made.
    pub fn meet(&mut self, other: &Meeting) {
        let see = |there: u64, frame: u64, bits: u64| {
            assert!(
                map_foreign(there, frame << 12 | bits, OTHER),
                "the other domain's page"
            );
        };
        for (page, frame) in (0..).zip(other.pages) {
            see(OTHER_PAGE.addr() + page * 4096, frame, RW);
        }
        for (area, frames) in [other.arguments, other.lists].iter().enumerate() {
            for (page, frame) in (0..).zip(frames) {
                see(OTHER_AREA[area].addr() + page * 4096, *frame, RW);
            }
        }
        see(OTHER_WORDS.addr(), other.words, RW);
        see(OTHER_SLOTS.addr(), other.slots_table, RO);
        self.other_pages = other.pages;
        self.spares = other.spares;
        self.other = Some(*other);
        for page in (0..PAGES).chain(OTHER_PAGES..OTHER_PAGES + PAGES) {
            self.reset_page(page);
        }
        self.refresh();
    }

    fn met(&self) -> &Meeting {
        self.other
            .as_ref()
            .expect("the runner tells of the other domain first")
    }

    /// A new page holds what its last owner left in it.
    fn empty_page(&self, other: bool, frame: u64) {
        let (there, pte) = (TRIAL.addr(), frame << 12 | RW);
        let shown = if other {
            map_foreign(there, pte, OTHER)
        } else {
            map(there, pte)
        };
        assert!(shown, "a new page");
        for word in 0..512 {
            store64(there + word * 8, 0);
        }
        assert!(map(there, 0), "a new page");
    }

    /// Whether a domain owns a page: whether it can be mapped as that domain's.
    fn owns(&self, other: bool, frame: u64) -> bool {
        let there = TRIAL.addr();
        let pte = frame << 12 | RO;
        let done = if other {
            map_foreign(there, pte, OTHER)
        } else {
            map(there, pte)
        };
        done && map(there, 0)
    }
}

fn window_of(other: bool) -> u64 {
    TABLE_WINDOW[usize::from(other)].addr()
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

/// Where the kernel sees what backs an area.
fn backing_of(area: u8) -> u64 {
    match area {
        OTHER_ARGUMENTS => OTHER_AREA[0].addr(),
        OTHER_LIST => OTHER_AREA[1].addr(),
        _ => BACKING[usize::from(area).min(2)].addr(),
    }
}

const _: () = assert!(AREAS == 5);

impl World for RealXen {
    fn call(&mut self, other: bool, command: u64, addr: u64, count: u64) -> i64 {
        if other {
            if self.killed {
                return 0;
            }
            let call = [GRANT_TABLE_OP, command, addr, count];
            return other::call(OWN.addr(), self.met().control_version, OTHER_WORDS.addr(), call);
        }
        hypercall(GRANT_TABLE_OP, command, addr, count, 0)
    }

    fn area(&self, area: u8) -> u64 {
        match area {
            OTHER_ARGUMENTS => ARGUMENTS_ADDR,
            OTHER_LIST => LIST_ADDR,
            _ => FRONT[usize::from(area).min(2)].addr(),
        }
    }

    fn poke(&mut self, area: u8, offset: u64, bytes: &[u8]) {
        store_bytes(backing_of(area) + offset, bytes);
    }

    fn peek(&self, area: u8, offset: u64, into: &mut [u8]) {
        load_bytes(backing_of(area) + offset, into);
    }

    fn frame(&self, name: u64) -> Option<u64> {
        let at = |frames: &[u64], base: u64| frames.get((name - base) as usize).copied();
        let [own, others] = &self.tables;
        match name {
            ..PAGES => at(&self.pages, 0),
            SLOTS_TABLE => Some(self.slots_table),
            OTHER_SLOTS_TABLE => Some(self.met().slots_table),
            OTHER_PAGES..SPARE => at(&self.other_pages, OTHER_PAGES),
            SPARE..TABLE => at(&self.spares, SPARE),
            TABLE..STATUS => at(own.shown(), TABLE),
            STATUS..OTHER_TABLE => at(&own.status[..own.status_frames], STATUS),
            OTHER_TABLE..OTHER_STATUS => at(others.shown(), OTHER_TABLE),
            OTHER_STATUS.. => at(&others.status[..others.status_frames], OTHER_STATUS),
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
        if self.other.is_some_and(|other| frame == other.slots_table) {
            return Some(OTHER_SLOTS_TABLE);
        }
        let [own, others] = &self.tables;
        find(&self.pages, 0)
            .or_else(|| find(&self.other_pages, OTHER_PAGES))
            .or_else(|| find(own.shown(), TABLE))
            .or_else(|| find(&own.status[..own.status_frames], STATUS))
            .or_else(|| find(others.shown(), OTHER_TABLE))
            .or_else(|| find(&others.status[..others.status_frames], OTHER_STATUS))
            .or_else(|| find(&self.spares, SPARE))
    }

    fn slot(&self, slot: u64) -> u64 {
        match slot.checked_sub(SLOTS) {
            Some(others) => SLOTS_ADDR + others * 4096,
            None => SLOT.addr() + slot * 4096,
        }
    }

    fn pte_addr(&self, slot: u64) -> u64 {
        match slot.checked_sub(SLOTS) {
            Some(others) => (self.met().slots_table << 12) + others * 8,
            None => (self.slots_table << 12) | (self.slot_ptes[slot as usize] & 0xFFF),
        }
    }

    fn pte(&self, slot: u64) -> u64 {
        match slot.checked_sub(SLOTS) {
            Some(others) => load64(OTHER_SLOTS.addr() + others * 8),
            None => load64(self.slot_ptes[slot as usize]),
        }
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
        let others = page.is_some_and(|(name, _)| {
            (SPARE..TABLE).contains(&name) && self.owner(name - SPARE) == Some(true)
                || name == OTHER_SLOTS_TABLE
                || (OTHER_PAGES..SPARE).contains(&name)
                || name >= OTHER_TABLE
        });
        if slot >= SLOTS {
            // The kernel may write the other domain's page tables, with its pages and its own.
            let owner = if others { u64::from(OTHER) } else { SELF };
            return set_pte_of(OTHER, self.pte_addr(slot), pte, owner);
        }
        if others {
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

    fn page_digest(&self, page: u64) -> u64 {
        let words = (home_of(page)..).step_by(8).take(512);
        words.fold(0, |digest, at| mix(digest, load64(at)))
    }

    fn reset_page(&mut self, page: u64) {
        let home = home_of(page);
        for word in 0..512 {
            store64(home + word * 8, pattern(page, word));
        }
    }

    fn other_pages(&self) -> u64 {
        PAGES
    }

    fn table_bytes(&self, other: bool) -> u64 {
        4096 * self.tables[usize::from(other)].seen as u64
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

    fn status_load(&self, other: bool, index: u64) -> Option<u16> {
        let who = usize::from(other);
        let there = index < self.tables[who].status_frames as u64 * 2048;
        there.then(|| load16(STATUS_WINDOW[who].addr() + index * 2))
    }

    fn status_store(&mut self, other: bool, index: u64, value: u16) {
        let who = usize::from(other);
        if index < self.tables[who].status_frames as u64 * 2048 {
            store16(STATUS_WINDOW[who].addr() + index * 2, value);
        }
    }

    fn version(&self, other: bool) -> u32 {
        self.tables[usize::from(other)].version
    }

    fn owner(&mut self, spare: u64) -> Option<bool> {
        let frame = self.spares[spare as usize];
        [false, true].into_iter().find(|other| self.owns(*other, frame))
    }

    fn physical(&self, spare: u64) -> u64 {
        crate::xen::physical(self.spares[spare as usize])
    }

    fn reset_spares(&mut self, gone: u64) {
        // First all owners: a frame that is gone may be given out again as another spare page.
        let owners: [Option<bool>; SPARES as usize] = core::array::from_fn(|spare| {
            let is_gone = gone & 1 << spare != 0;
            if is_gone { None } else { self.owner(spare as u64) }
        });
        for (at, owner) in owners.into_iter().enumerate() {
            let wanted = at as u64 >= SPARES / 2;
            if owner == Some(wanted) {
                continue;
            }
            if let Some(owner) = owner {
                let back = other::give_back(OWN.addr(), owner, self.spares[at]);
                assert!(back, "a spare page");
            }
            self.spares[at] = other::get(OWN.addr(), wanted);
            self.empty_page(wanted, self.spares[at]);
        }
    }

    fn refresh(&mut self) {
        self.tables[0].refresh(false);
        self.tables[1].refresh(self.killed);
    }

    fn kill(&mut self) -> i64 {
        self.killed = true;
        other::destroy(OWN.addr(), self.met().control_version)
    }

    fn release_status(&mut self, other: bool) {
        self.tables[usize::from(other)].release_status();
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
