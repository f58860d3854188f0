//! The world in which the engine answers: one PV control domain on the machine in memory.

use std::sync::Arc;

use gnttab_abi::{Abi, Command, DomId, Gfn, Mfn};
use gnttab_conformance::play::{World, mix, pattern, play};
use gnttab_conformance::puppet::{ARGUMENTS_ADDR, LIST_ADDR, SLOTS_ADDR};
use gnttab_conformance::script::{
    AREA_PAGES, AREAS, OTHER, OTHER_ARGUMENTS, OTHER_LIST, OTHER_PAGES, OTHER_SLOTS_TABLE, OTHER_STATUS,
    OTHER_TABLE, PAGES, SLOTS, SLOTS_TABLE, SPARE, SPARES, STATUS, TABLE,
};
use gnttab_engine::machine::{Guest, L2Slot, Machine, Page, PageOwner, Pte};
use gnttab_engine::{
    Access, Call, Config, Domain, DomainKind, Engine, GuestMemory, Limits, Outcome, PageWords, Reference,
    Vcpu, Version,
};

const CALLER: DomId = DomId(0);
const AREA_ADDR: u64 = 0x4000_0000;
const AREA_STRIDE: u64 = 0x10_0000;
const SLOT_ADDR: u64 = 0x5000_0000;
const HOME_ADDR: u64 = 0x5800_0000;

/// What a machine is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) max_frames: u32,
    pub(crate) max_maptrack_frames: u32,
    /// One program in so many kills the other domain.
    pub(crate) kills: u32,
    /// Whose behaviour the engine has.
    pub(crate) reference: Reference,
    /// Whether it copies and flushes inside tables.
    pub(crate) inside: bool,
}

/// See the module.
pub(crate) struct EngineWorld {
    engine: Engine<Machine>,
    machine: Machine,
    domain: Arc<Domain<Machine>>,
    other: Arc<Domain<Machine>>,
    other_pages: Vec<Page>,
    vcpus: [Vcpu<Machine>; 2],
    pages: Vec<Page>,
    spares: Vec<Mfn>,
    /// Number of the next spare page.
    next_spare: u64,
    page_words: Vec<Arc<PageWords>>,
    area_words: Vec<Vec<Arc<PageWords>>>,
    slots_tables: [Mfn; 2],
    slots_words: [Arc<PageWords>; 2],
    shows_status: [bool; 2],
    /// Frames of both tables, as they were when last looked at.
    frames: [u32; 2],
    /// Of these the kernel sees so many: not what a dead domain's table has grown by.
    sees: [u32; 2],
    killed: bool,
    verbose: bool,
    /// The answer's words.
    pub(crate) answer: Vec<u64>,
    /// With `verbose`: what was seen, and at which step.
    pub(crate) seen: Vec<Seen>,
    step: usize,
}

/// One thing that was seen.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) step: usize,
    pub(crate) what: &'static str,
    pub(crate) index: u64,
    /// Place in the answer.
    pub(crate) at: usize,
}

impl EngineWorld {
    pub(crate) fn new(settings: Settings) -> EngineWorld {
        let machine = Machine::with_reference(settings.reference);
        machine.work_inside(settings.inside);
        let config = Config {
            max_grant_frames: settings.max_frames,
            max_maptrack_frames: settings.max_maptrack_frames,
            dump: false,
            processors: 1,
            reference: settings.reference,
            ..Config::default()
        };
        let engine = Engine::new(machine.clone(), config);
        let guest = machine
            .add_domain(CALLER, DomainKind::Pv)
            .expect("the machine is empty");
        guest.set_control(true);
        let mut areas = Vec::new();
        for area in 0..u64::from(OTHER_ARGUMENTS) {
            let base = AREA_ADDR + area * AREA_STRIDE;
            let mut pages = guest
                .add_memory(base, usize::try_from(AREA_PAGES).expect("16"))
                .expect("memory");
            if area == 0 {
                let last = guest.add_page().expect("memory");
                assert!(guest.map(base + AREA_PAGES * 4096, last.gfn, Access::Read));
                pages.push(last);
            }
            areas.push(pages);
        }
        let slots_table = guest.add_table(SLOT_ADDR).expect("memory");
        guest.add_table(HOME_ADDR).expect("memory");
        let pages = named_pages(&guest, 0);
        for (page, there) in pages.iter().zip((HOME_ADDR..).step_by(4096)) {
            assert!(guest.map(there, page.gfn, Access::Write));
        }
        assert_eq!(guest.table(SLOT_ADDR), Some(L2Slot::Table(slots_table)));
        let limits = Limits {
            version: Version::V2,
            ..Limits::default()
        };
        let domain = engine
            .create_domain(CALLER, DomainKind::Pv, limits, guest)
            .expect("a new domain");
        let number = DomId(OTHER);
        let guest = machine.add_domain(number, DomainKind::Pv).expect("a new number");
        let other_pages = named_pages(&guest, PAGES);
        for addr in [ARGUMENTS_ADDR, LIST_ADDR] {
            let pages = guest.add_memory(addr, usize::try_from(AREA_PAGES).expect("16"));
            areas.push(pages.expect("memory"));
        }
        let other_slots = guest.add_table(SLOTS_ADDR).expect("memory");
        let other = engine
            .create_domain(number, DomainKind::Pv, limits, guest)
            .expect("a new domain");
        domain.private().add_table(OTHER_HOME_ADDR).expect("memory");
        for (page, there) in other_pages.iter().zip((OTHER_HOME_ADDR..).step_by(4096)) {
            assert!(
                domain.private().map(there, page.gfn, Access::Write),
                "seen by the caller"
            );
        }
        let vcpus = [&domain, &other].map(|domain| Vcpu::take(domain, 0).expect("nobody else has it"));
        let words = |page: &Page| machine.page(page.mfn).expect("memory");
        let mut world = EngineWorld {
            page_words: pages.iter().chain(&other_pages).map(words).collect(),
            area_words: areas
                .iter()
                .map(|area| area.iter().map(words).collect())
                .collect(),
            slots_words: [slots_table, other_slots].map(|table| machine.page(table).expect("memory")),
            engine,
            machine,
            domain,
            other,
            other_pages,
            vcpus,
            pages,
            spares: vec![Mfn(0); index(SPARES)],
            next_spare: FRAMES + 2 * PAGES,
            slots_tables: [slots_table, other_slots],
            shows_status: [false; 2],
            frames: [0; 2],
            sees: [0; 2],
            killed: false,
            verbose: false,
            answer: Vec::new(),
            seen: Vec::new(),
            step: 0,
        };
        for page in (0..PAGES).chain(OTHER_PAGES..OTHER_PAGES + PAGES) {
            world.reset_page(page);
        }
        world.reset_spares(u64::MAX);
        world.refresh();
        world
    }

    /// Plays a script from the start; false if it could not be cleaned up after.
    pub(crate) fn run(&mut self, script: &[u8], verbose: bool) -> bool {
        self.answer.clear();
        self.seen.clear();
        self.verbose = verbose;
        play(self, script)
    }

    /// Frames of the caller's table and of the other domain's.
    pub(crate) fn frames(&self) -> [u32; 2] {
        self.frames
    }

    /// What the machine's books say is wrong, with nothing under way.
    pub(crate) fn audit(&self) -> Vec<String> {
        self.machine
            .audit_idle()
            .iter()
            .map(|what| format!("{what:?}"))
            .collect()
    }

    fn guest(&self) -> &Guest {
        self.domain.private()
    }

    /// Whose a slot is.
    fn guest_of(&self, slot: u64) -> &Guest {
        self.table_of(slot >= SLOTS).private()
    }

    fn backing(&self, area: u8, offset: u64) -> Option<(&PageWords, usize)> {
        let page = usize::try_from(offset / 4096).ok()?;
        let words = self.area_words[usize::from(area) % AREAS].get(page)?;
        Some((words, usize::try_from(offset % 4096).ok()?))
    }

    fn table_of(&self, other: bool) -> &Domain<Machine> {
        if other { &self.other } else { &self.domain }
    }

    fn table_words(&self, offset: u64) -> Option<(u32, usize)> {
        Some((
            u32::try_from(offset / 4096).ok()?,
            usize::try_from(offset % 4096).ok()?,
        ))
    }
}

/// The parts of a range of bytes by the pages that they lie in.
fn chunks(offset: u64, len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let first = (4096 - index(offset % 4096)).min(len);
    [0..first, first..len]
        .into_iter()
        .filter(|chunk| !chunk.is_empty())
}

/// Pages for a domain. Their numbers are past the end of any table, as a real machine's are, so that
/// a frame in the place of a reference is a bad one in both worlds.
fn named_pages(guest: &Guest, from: u64) -> Vec<Page> {
    let first = Mfn(FRAMES + from).0;
    (first..first + PAGES)
        .map(|frame| guest.add_page_at(Mfn(frame)).expect("nobody has it"))
        .collect()
}

/// Where a page's words are kept.
fn place_of(page: u64) -> usize {
    index(if page < PAGES {
        page
    } else {
        PAGES + page - OTHER_PAGES
    })
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl World for EngineWorld {
    fn call(&mut self, other: bool, command: u64, addr: u64, count: u64) -> i64 {
        if other && self.killed {
            return 0;
        }
        let low = |n: u64| u32::try_from(n & 0xFFFF_FFFF).unwrap_or(0);
        let mut call = Call {
            command: Command(low(command)),
            addr,
            count: low(count),
        };
        let (vcpu, domain) = (&self.vcpus[usize::from(other)], self.table_of(other));
        let mut processor = self.engine.any_processor().expect("nobody else is in it");
        loop {
            let outcome = processor.hypercall(vcpu, Abi::X86_64, call, domain.private(), &mut || false);
            match outcome {
                Outcome::Done(Ok(())) => return 0,
                Outcome::Done(Err(errno)) => return errno.hypercall_result(),
                Outcome::Continue(next) => call = next,
            }
        }
    }

    fn area(&self, area: u8) -> u64 {
        match area {
            OTHER_ARGUMENTS => ARGUMENTS_ADDR,
            OTHER_LIST => LIST_ADDR,
            _ => AREA_ADDR + u64::from(area) * AREA_STRIDE,
        }
    }

    fn poke(&mut self, area: u8, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        for chunk in chunks(offset, bytes.len()) {
            if let Some((words, place)) = self.backing(area, at) {
                let _ = words.write(place, &bytes[chunk.clone()]);
            }
            at += chunk.len() as u64;
        }
    }

    fn peek(&self, area: u8, offset: u64, into: &mut [u8]) {
        let mut at = offset;
        for chunk in chunks(offset, into.len()) {
            if let Some((words, place)) = self.backing(area, at) {
                let _ = words.read(place, &mut into[chunk.clone()]);
            }
            at += chunk.len() as u64;
        }
    }

    fn frame(&self, name: u64) -> Option<u64> {
        let low = |from: u64| u32::try_from(name - from).ok();
        let status = |other: bool, from: u64| {
            let shown = self.shows_status[usize::from(other)];
            let page = self.table_of(other).status_frame(low(from)?)?;
            shown.then_some(page.mfn().0)
        };
        let shared = |other: bool, from: u64| Some(self.table_of(other).shared_frame(low(from)?)?.mfn().0);
        match name {
            ..PAGES => Some(self.pages[index(name)].mfn.0),
            SLOTS_TABLE => Some(self.slots_tables[0].0),
            OTHER_SLOTS_TABLE => Some(self.slots_tables[1].0),
            OTHER_PAGES..SPARE => Some(self.other_pages.get(index(name - OTHER_PAGES))?.mfn.0),
            SPARE..TABLE => Some(self.spares.get(index(name - SPARE))?.0),
            TABLE..STATUS => shared(false, TABLE),
            STATUS..OTHER_TABLE => status(false, STATUS),
            OTHER_TABLE..OTHER_STATUS => shared(true, OTHER_TABLE),
            OTHER_STATUS.. => status(true, OTHER_STATUS),
            _ => None,
        }
    }

    fn name(&self, frame: u64) -> Option<u64> {
        if let Some(who) = self.slots_tables.iter().position(|table| table.0 == frame) {
            return Some(SLOTS_TABLE + who as u64);
        }
        if let Some(page) = self.pages.iter().position(|page| page.mfn.0 == frame) {
            return Some(page as u64);
        }
        if let Some(page) = self.other_pages.iter().position(|page| page.mfn.0 == frame) {
            return Some(OTHER_PAGES + page as u64);
        }
        if let Some(page) = self.spares.iter().position(|spare| spare.0 == frame) {
            return Some(SPARE + page as u64);
        }
        let info = self.machine.frame(Mfn(frame))?;
        if !info.special {
            return None;
        }
        [TABLE, STATUS, OTHER_TABLE, OTHER_STATUS]
            .into_iter()
            .flat_map(|first| (first..).take_while(|name| self.frame(*name).is_some()))
            .find(|name| self.frame(*name) == Some(frame))
    }

    fn slot(&self, slot: u64) -> u64 {
        match slot.checked_sub(SLOTS) {
            Some(others) => SLOTS_ADDR + others * 4096,
            None => SLOT_ADDR + slot * 4096,
        }
    }

    fn pte_addr(&self, slot: u64) -> u64 {
        let guest = self.guest_of(slot);
        guest.pte_address(self.slot(slot)).unwrap_or(0)
    }

    fn pte(&self, slot: u64) -> u64 {
        let who = usize::from(slot >= SLOTS);
        let bytes = self.slots_words[who].read_bytes::<8>(index(slot % SLOTS * 8));
        u64::from_le_bytes(bytes.unwrap_or_default())
    }

    fn set_pte(&mut self, slot: u64, page: Option<(u64, bool)>) -> bool {
        let addr = self.slot(slot);
        let guest = self.guest_of(slot);
        let Some((name, writable)) = page else {
            return guest.write_pte(addr, Pte::default());
        };
        let Some(frame) = self.frame(name) else {
            return false;
        };
        let access = if writable { Access::Write } else { Access::Read };
        // The caller is a control domain: it writes the other's page tables too, with any page.
        guest.map(addr, Gfn(frame), access)
    }

    fn load(&self, slot: u64, offset: u16) -> u8 {
        let mut byte = [0];
        let done = self.guest().read(self.slot(slot) + u64::from(offset), &mut byte);
        done.expect("it maps something");
        byte[0]
    }

    fn store(&mut self, slot: u64, offset: u16, byte: u8) {
        let done = self.guest().write(self.slot(slot) + u64::from(offset), &[byte]);
        done.expect("it is writable");
    }

    fn page_digest(&self, page: u64) -> u64 {
        let mut bytes = [0; 4096];
        let _ = self.page_words[place_of(page)].read(0, &mut bytes);
        let (words, _) = bytes.as_chunks::<8>();
        words
            .iter()
            .fold(0, |digest, word| mix(digest, u64::from_le_bytes(*word)))
    }

    fn reset_page(&mut self, page: u64) {
        let bytes: Vec<u8> = (0..512)
            .flat_map(|word| pattern(page, word).to_le_bytes())
            .collect();
        let _ = self.page_words[place_of(page)].write(0, &bytes);
    }

    fn other_pages(&self) -> u64 {
        PAGES
    }

    fn table_bytes(&self, other: bool) -> u64 {
        u64::from(self.sees[usize::from(other)]) * 4096
    }

    fn table_load(&self, other: bool, offset: u64, into: &mut [u8]) {
        if let Some((frame, at)) = self.table_words(offset)
            && let Some(page) = self.table_of(other).shared_frame(frame)
        {
            let _ = page.as_ref().read(at, into);
        }
    }

    fn table_store(&mut self, other: bool, offset: u64, size: u8, value: u64) {
        let size = usize::from(size);
        if let Some((frame, at)) = self.table_words(offset)
            && let Some(page) = self.table_of(other).shared_frame(frame)
        {
            let _ = page.as_ref().write(at - at % size, &value.to_le_bytes()[..size]);
        }
    }

    fn status_load(&self, other: bool, index: u64) -> Option<u16> {
        let (page, at) = self.status_word(other, index)?;
        page.read_bytes::<2>(at).map(u16::from_le_bytes)
    }

    fn status_store(&mut self, other: bool, index: u64, value: u16) {
        if let Some((page, at)) = self.status_word(other, index) {
            let _ = page.write(at, &value.to_le_bytes());
        }
    }

    fn version(&self, other: bool) -> u32 {
        self.table_of(other).version().number()
    }

    fn owner(&mut self, spare: u64) -> Option<bool> {
        match self.machine.frame(self.spares[index(spare)])?.owner {
            PageOwner::Domain(id) => Some(id != CALLER),
            _ => None,
        }
    }

    fn physical(&self, spare: u64) -> u64 {
        let frame = self.machine.frame(self.spares[index(spare)]);
        frame.map_or(0, |frame| frame.physical.0)
    }

    fn reset_spares(&mut self, gone: u64) {
        for spare in 0..SPARES {
            let wanted = spare >= SPARES / 2;
            let is_gone = gone & 1 << spare != 0;
            let owner = if is_gone { None } else { self.owner(spare) };
            if owner == Some(wanted) {
                continue;
            }
            if let Some(owner) = owner {
                let old = self.spares[index(spare)];
                self.table_of(owner).private().give_up(old);
            }
            let new = Mfn(self.next_spare);
            self.next_spare += 1;
            let page = self.table_of(wanted).private().add_page_at(new);
            self.spares[index(spare)] = page.expect("nobody has it").mfn;
        }
    }

    fn refresh(&mut self) {
        for other in [false, true] {
            let who = usize::from(other);
            let mut frames = self.frames[who];
            while self.table_of(other).shared_frame(frames).is_some() {
                frames += 1;
            }
            self.frames[who] = frames;
            if other && self.killed {
                continue;
            }
            self.sees[who] = frames;
            let shows = self.version(other) == 2;
            if shows != self.shows_status[who] {
                self.release_status(other);
            }
            if shows {
                // The kernel maps what it sees: each status page is in its page tables.
                self.hold_status(other);
            }
        }
    }

    fn kill(&mut self) -> i64 {
        self.killed = true;
        let guest = self.other.private();
        self.engine.begin_teardown(&self.other);
        guest.set_dying();
        {
            let mut processor = self.engine.any_processor().expect("nobody else is in it");
            processor.release_mappings(std::slice::from_ref(&self.vcpus[1]), u32::MAX);
        }
        guest.drop_address_space();
        guest.give_up_memory();
        let _ = self.engine.retire(self.other.id());
        0
    }

    fn release_status(&mut self, other: bool) {
        for frame in 0..STATUS_PAGES {
            self.guest().unmap(status_addr(other, frame));
        }
        self.shows_status[usize::from(other)] = false;
    }

    fn emit(&mut self, word: u64) {
        self.answer.push(word);
    }

    fn begins(&mut self, step: usize) {
        self.step = step;
    }

    fn seen(&mut self, what: &'static str, index: u64, value: u64) {
        self.seen.push(Seen {
            step: self.step,
            what,
            index,
            at: self.answer.len(),
        });
        self.answer.push(value);
    }

    fn verbose(&self) -> bool {
        self.verbose
    }
}

/// The first of the named pages' frames.
const FRAMES: u64 = 0xE000;
/// Where the kernel sees the other domain's pages.
const OTHER_HOME_ADDR: u64 = 0x6000_0000;
/// Where the kernel has status pages.
const STATUS_ADDR: u64 = HOME_ADDR + 0x10_0000;
const STATUS_PAGES: u64 = 8;
const _: () = assert!(SLOTS <= 512 && AREAS == 5);

fn status_addr(other: bool, frame: u64) -> u64 {
    STATUS_ADDR + (u64::from(other) * STATUS_PAGES + frame) * 4096
}

impl EngineWorld {
    fn hold_status(&mut self, other: bool) {
        self.shows_status[usize::from(other)] = true;
        let first = if other { OTHER_STATUS } else { STATUS };
        for frame in 0..STATUS_PAGES {
            let Some(page) = self.frame(first + frame) else {
                break;
            };
            let mapped = self
                .guest()
                .map(status_addr(other, frame), Gfn(page), Access::Write);
            assert!(mapped, "a status page");
        }
    }

    fn status_word(&self, other: bool, word: u64) -> Option<(&PageWords, usize)> {
        let frame = u32::try_from(word / 2048).ok()?;
        if !self.shows_status[usize::from(other)] {
            return None;
        }
        let page = self.table_of(other).status_frame(frame)?;
        Some((page.as_ref(), usize::try_from(word % 2048 * 2).ok()?))
    }
}
