//! The world in which the engine answers: one PV control domain on the machine in memory.

use std::sync::Arc;

use gnttab_abi::{Abi, Command, DomId, Gfn, Mfn};
use gnttab_conformance::play::{World, pattern, play};
use gnttab_conformance::script::{
    AREA_PAGES, AREAS, OTHER, OTHER_PAGES, OTHER_TABLE, PAGES, SLOTS, SLOTS_TABLE, STATUS, TABLE,
};
use gnttab_engine::machine::{Guest, L2Slot, Machine, Page, Pte};
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
}

/// See the module.
pub(crate) struct EngineWorld {
    engine: Engine<Machine>,
    machine: Machine,
    domain: Arc<Domain<Machine>>,
    other: Arc<Domain<Machine>>,
    other_pages: Vec<Page>,
    vcpu: Vcpu<Machine>,
    pages: Vec<Page>,
    page_words: Vec<Arc<PageWords>>,
    area_words: Vec<Vec<Arc<PageWords>>>,
    slots_table: Mfn,
    slots_words: Arc<PageWords>,
    shows_status: bool,
    /// Frames of both tables, as they were when last looked at.
    frames: [u32; 2],
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
        let machine = Machine::with_reference(Reference::V4_17);
        let config = Config {
            max_grant_frames: settings.max_frames,
            max_maptrack_frames: settings.max_maptrack_frames,
            dump: false,
            processors: 1,
            reference: Reference::V4_17,
            ..Config::default()
        };
        let engine = Engine::new(machine.clone(), config);
        let guest = machine
            .add_domain(CALLER, DomainKind::Pv)
            .expect("the machine is empty");
        guest.set_control(true);
        let mut areas = Vec::new();
        for area in 0..AREAS as u64 {
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
        let vcpu = Vcpu::take(&domain, 0).expect("nobody else has it");
        let words = |page: &Page| machine.page(page.mfn).expect("memory");
        let mut world = EngineWorld {
            page_words: pages.iter().chain(&other_pages).map(words).collect(),
            area_words: areas
                .iter()
                .map(|area| area.iter().map(words).collect())
                .collect(),
            slots_words: machine.page(slots_table).expect("memory"),
            engine,
            machine,
            domain,
            other,
            other_pages,
            vcpu,
            pages,
            slots_table,
            shows_status: false,
            frames: [0; 2],
            verbose: false,
            answer: Vec::new(),
            seen: Vec::new(),
            step: 0,
        };
        for page in (0..PAGES).chain(OTHER_PAGES..OTHER_PAGES + PAGES) {
            world.reset_page(page);
        }
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
    fn call(&mut self, command: u64, addr: u64, count: u64) -> i64 {
        let low = |n: u64| u32::try_from(n & 0xFFFF_FFFF).unwrap_or(0);
        let mut call = Call {
            command: Command(low(command)),
            addr,
            count: low(count),
        };
        let mut processor = self.engine.any_processor().expect("nobody else is in it");
        loop {
            let outcome =
                processor.hypercall(&self.vcpu, Abi::X86_64, call, self.domain.private(), &mut || {
                    false
                });
            match outcome {
                Outcome::Done(Ok(())) => return 0,
                Outcome::Done(Err(errno)) => return errno.hypercall_result(),
                Outcome::Continue(next) => call = next,
            }
        }
    }

    fn area(&self, area: u8) -> u64 {
        AREA_ADDR + u64::from(area) * AREA_STRIDE
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
        match name {
            ..PAGES => Some(self.pages[index(name)].mfn.0),
            SLOTS_TABLE => Some(self.slots_table.0),
            TABLE..STATUS => Some(self.domain.shared_frame(low(TABLE)?)?.mfn().0),
            OTHER_PAGES..TABLE => Some(self.other_pages.get(index(name - OTHER_PAGES))?.mfn.0),
            OTHER_TABLE.. => Some(self.other.shared_frame(low(OTHER_TABLE)?)?.mfn().0),
            STATUS.. => {
                if !self.shows_status {
                    return None;
                }
                Some(self.domain.status_frame(low(STATUS)?)?.mfn().0)
            }
            _ => None,
        }
    }

    fn name(&self, frame: u64) -> Option<u64> {
        if frame == self.slots_table.0 {
            return Some(SLOTS_TABLE);
        }
        if let Some(page) = self.pages.iter().position(|page| page.mfn.0 == frame) {
            return Some(page as u64);
        }
        if let Some(page) = self.other_pages.iter().position(|page| page.mfn.0 == frame) {
            return Some(OTHER_PAGES + page as u64);
        }
        let info = self.machine.frame(Mfn(frame))?;
        if !info.special {
            return None;
        }
        let frames = (TABLE..).take_while(|name| self.frame(*name).is_some());
        let status = (STATUS..).take_while(|name| self.frame(*name).is_some());
        let others = (OTHER_TABLE..).take_while(|name| self.frame(*name).is_some());
        frames
            .chain(status)
            .chain(others)
            .find(|name| self.frame(*name) == Some(frame))
    }

    fn slot(&self, slot: u64) -> u64 {
        SLOT_ADDR + slot * 4096
    }

    fn pte_addr(&self, slot: u64) -> u64 {
        self.guest().pte_address(self.slot(slot)).unwrap_or(0)
    }

    fn pte(&self, slot: u64) -> u64 {
        let bytes = self
            .slots_words
            .read_bytes::<8>(index(slot * 8))
            .unwrap_or_default();
        u64::from_le_bytes(bytes)
    }

    fn set_pte(&mut self, slot: u64, page: Option<(u64, bool)>) -> bool {
        let addr = self.slot(slot);
        let Some((name, writable)) = page else {
            return self.guest().write_pte(addr, Pte::default());
        };
        let Some(frame) = self.frame(name) else {
            return false;
        };
        let access = if writable { Access::Write } else { Access::Read };
        self.guest().map(addr, Gfn(frame), access)
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

    fn page_word(&self, page: u64, word: usize) -> u64 {
        let bytes = self.page_words[place_of(page)].read_bytes::<8>(word * 8);
        u64::from_le_bytes(bytes.unwrap_or_default())
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
        u64::from(self.frames[usize::from(other)]) * 4096
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

    fn status_load(&self, index: u64) -> Option<u16> {
        let frame = u32::try_from(index / 2048).ok()?;
        self.frame(STATUS + u64::from(frame))?;
        let page = self.domain.status_frame(frame)?;
        let bytes = page
            .as_ref()
            .read_bytes::<2>(usize::try_from(index % 2048 * 2).ok()?)?;
        Some(u16::from_le_bytes(bytes))
    }

    fn status_store(&mut self, index: u64, value: u16) {
        if let Ok(frame) = u32::try_from(index / 2048)
            && let Ok(at) = usize::try_from(index % 2048 * 2)
            && self.frame(STATUS + u64::from(frame)).is_some()
            && let Some(page) = self.domain.status_frame(frame)
        {
            let _ = page.as_ref().write(at, &value.to_le_bytes());
        }
    }

    fn version(&self) -> u32 {
        self.domain.version().number()
    }

    fn refresh(&mut self) {
        for other in [false, true] {
            let mut frames = self.frames[usize::from(other)];
            while self.table_of(other).shared_frame(frames).is_some() {
                frames += 1;
            }
            self.frames[usize::from(other)] = frames;
        }
        let shows = self.version() == 2;
        if shows != self.shows_status {
            self.release_status();
        }
        if shows {
            // The kernel maps what it sees: each status page is in its page tables.
            self.hold_status();
        }
    }

    fn kill(&mut self) -> i64 {
        let guest = self.other.private();
        self.engine.begin_teardown(&self.other);
        guest.set_dying();
        if let Some(vcpu) = Vcpu::take(&self.other, 0) {
            let mut processor = self.engine.any_processor().expect("nobody else is in it");
            processor.release_mappings(&[vcpu], u32::MAX);
        }
        guest.drop_address_space();
        guest.give_up_memory();
        let _ = self.engine.retire(self.other.id());
        0
    }

    fn release_status(&mut self) {
        for frame in 0..STATUS_PAGES {
            self.guest().unmap(STATUS_ADDR + frame * 4096);
        }
        self.shows_status = false;
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
/// Where the kernel has its status pages.
const STATUS_ADDR: u64 = HOME_ADDR + 0x10_0000;
const STATUS_PAGES: u64 = 8;
const _: () = assert!(SLOTS <= 512);

impl EngineWorld {
    fn hold_status(&mut self) {
        self.shows_status = true;
        for frame in 0..STATUS_PAGES {
            let Some(page) = self.frame(STATUS + frame) else {
                break;
            };
            let mapped = self
                .guest()
                .map(STATUS_ADDR + frame * 4096, Gfn(page), Access::Write);
            assert!(mapped, "a status page of its own");
        }
    }
}
