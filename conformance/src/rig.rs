//! The scene that the specification's vectors play in, on a real Xen: three domains that do what
//! they are told beside the first one, which is in control.
//!
//! The vectors and their runner are the engine's (`crates/engine/tests/vectors`); this module is in
//! the place of the rig that they have there. Tables, pages and page tables are looked at in the
//! machine's memory. What a real Xen does not show (how often an entry is used, references on
//! frames) is passed over and counted; what it cannot be brought to is said by [`CANNOT`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gnttab_abi::*;
use gnttab_conformance::puppet::{AREA_PAGES, ARGUMENTS_ADDR, LIST_ADDR, SLOTS_ADDR};
use gnttab_engine::Reference;

use crate::puppets::{self, Plan, Puppet, control, domctl};
use crate::real_xen::{RealXen, XenError};
use crate::run::{Case, Outcome, id_of, letter, number, same};
use crate::script::Vector;

/// Where callers keep their arguments and lists.
pub(crate) const ARGUMENTS: u64 = ARGUMENTS_ADDR;
pub(crate) const LIST: u64 = LIST_ADDR;
/// A number that is no frame of anybody's and fits a version 1 entry.
const BAD: Mfn = Mfn(0xFFFF_FFF0);
/// Registers of a device.
const MMIO: Mfn = Mfn(0xFEE00);
/// A range without level-1 table.
const NO_TABLE: u64 = 0x1000_0000;
/// Begins what a step says that a real Xen cannot be brought to.
pub(crate) const CANNOT: &str = "not on this Xen: ";
/// Machine to physical, as every PV kernel sees it.
const MACHINE_TO_PHYSICAL: u64 = 0xFFFF_8000_0000_0000;
/// Present, writable, user, accessed, dirty.
const DATA: u64 = 0x67;
const PTE_FRAME: u64 = 0x000F_FFFF_FFFF_F000;

/// Hypercalls.
mod call {
    pub(super) const MEMORY_OP: u64 = 12;
    pub(super) const UPDATE_VA_MAPPING: u64 = 14;
    pub(super) const GRANT_TABLE_OP: u64 = 20;
    pub(super) const UPDATE_VA_MAPPING_OTHERDOMAIN: u64 = 22;
    pub(super) const MMUEXT_OP: u64 = 26;
}

thread_local! {
    /// The machine that vectors play on.
    static MACHINE: RefCell<Option<RealXen>> = const { RefCell::new(None) };
    /// Checks passed over.
    static UNSEEN: Cell<u64> = const { Cell::new(0) };
}

/// Puts the machine there that the next vectors play on; the one that was there.
pub(crate) fn set_machine(xen: Option<RealXen>) -> Option<RealXen> {
    MACHINE.replace(xen)
}

/// Checks that were passed over since the last time, since a real Xen does not show these things.
pub(crate) fn take_unseen() -> u64 {
    UNSEEN.replace(0)
}

/// A place for a mapping.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// One of many that will do.
    Free(usize),
    /// No level-1 table.
    NoTable,
    /// A large mapping.
    Huge,
}

/// What a step made of some guest addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    Open,
    ReadOnly,
    Unmapped,
}

/// A table's frames, as they were when last asked for.
#[derive(Clone, Default)]
struct Table {
    version: u32,
    shared: Vec<u64>,
    status: Vec<u64>,
}

pub(crate) struct Rig {
    xen: RefCell<Option<RealXen>>,
    puppets: BTreeMap<char, Puppet>,
    frames: BTreeMap<String, Mfn>,
    tables: RefCell<BTreeMap<char, Table>>,
    /// Pages that steps took away.
    denied: RefCell<Vec<(char, u64)>>,
    /// Pages may have changed hands.
    moved: Cell<bool>,
    /// The first domain has a page of G's mapped, so that G stays when it dies.
    holds: Cell<bool>,
    dead: RefCell<Vec<char>>,
    held: Cell<Option<(char, u64)>>,
}

/// Why a vector cannot be played on a real Xen at all.
pub(crate) fn cannot(vector: &Vector) -> Option<String> {
    let holds = &vector.holds;
    if !holds.kinds.contains(&gnttab_engine::DomainKind::Pv) {
        return Some("no PV caller".to_owned());
    }
    if let Some(why) = &vector.cannot {
        return Some(format!("nothing to play: {why}"));
    }
    if holds.narrow {
        return Some("32-bit PV callers: Debian builds Xen without them (CONFIG_PV32)".to_owned());
    }
    if holds.setting("policy").is_some() {
        return Some("other policies: Debian builds Xen without them (CONFIG_XSM)".to_owned());
    }
    if holds.setting("iommu").is_some() {
        return Some("the emulated machine has no IOMMU".to_owned());
    }
    if holds.setting("G").is_some() {
        return Some("a translated granter".to_owned());
    }
    if vector.steps.iter().any(|step| step.on.is_some()) {
        return Some("a step in the middle of an operation".to_owned());
    }
    let words = |step: &crate::script::Step| {
        step.text
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for step in &vector.steps {
        for word in words(step) {
            let why = match word.as_str() {
                "huge" => "a PV guest has no large mappings",
                "nomem" | "nolow" => "memory cannot be made short for one call",
                "LH" => "the emulated machine has no frame above 4 GiB",
                "dm" => "only an HVM domain has a device model",
                "control" => "only the first domain is in control",
                _ if word.starts_with("@list:hole:") => "one element of a page cannot be unmapped",
                _ if word.starts_with("machine-maxver") => "a machine of its own for one creation",
                _ => continue,
            };
            return Some(why.to_owned());
        }
    }
    match vector.id.as_str() {
        "M-103" | "C-55" => {
            Some("a dying domain that still has its memory: its death does not stop there".to_owned())
        }
        _ => None,
    }
}

/// Words for Xen's command line that a vector asks for.
pub(crate) fn options(vector: &Vector) -> String {
    let mut options = String::new();
    for (setting, words) in [
        ("no-transfer", " gnttab=no-transfer"),
        ("no-transitive", " gnttab=no-transitive"),
        ("frames", " gnttab_max_frames=2000"),
    ] {
        let roomy = || setting != "frames" || vector.holds.setting(setting) == Some("2000");
        if vector.holds.setting(setting).is_some() && roomy() {
            options.push_str(words);
        }
    }
    options
}

fn told(why: XenError) -> String {
    why.to_string()
}

impl Rig {
    pub(crate) fn new(table: char, vector: &Vector, case: Case) -> Result<Rig, String> {
        let mut xen = set_machine(None).ok_or("no machine")?;
        let made = Rig::make(&mut xen, table, vector, case);
        match made {
            Ok(mut rig) => {
                rig.xen = RefCell::new(Some(xen));
                rig.set_the_scene(table, case)?;
                Ok(rig)
            }
            Err(why) => {
                for id in 1..=3 {
                    let _ = domctl(&mut xen, control::DESTROY, id, &[]);
                }
                set_machine(Some(xen));
                Err(why)
            }
        }
    }

    fn make(xen: &mut RealXen, _: char, vector: &Vector, _: Case) -> Result<Rig, String> {
        let holds = &vector.holds;
        let setting = |name: &str| {
            holds
                .setting(name)
                .map(|value| value.parse::<u32>().expect("a number"))
        };
        let mut puppets = BTreeMap::new();
        for (name, pages) in [('G', 3), ('C', 2), ('T', 1)] {
            let mut plan = Plan {
                id: id_of(name).0,
                vcpus: 1,
                grant_frames: Some(64),
                maptrack_frames: None,
                version: 2,
                pages,
            };
            if name == 'C' {
                plan.vcpus = setting("vcpus").map_or(1, |vcpus| usize::try_from(vcpus).expect("few"));
                plan.grant_frames = setting("frames").or(plan.grant_frames);
                plan.maptrack_frames = setting("maptrack");
                plan.version = setting("maxver").unwrap_or(2);
            }
            puppets.insert(name, Puppet::create(xen, &plan).map_err(told)?);
        }
        let mut rig = Rig {
            xen: RefCell::new(None),
            puppets,
            frames: BTreeMap::new(),
            tables: RefCell::default(),
            denied: RefCell::default(),
            moved: Cell::new(false),
            holds: Cell::new(false),
            dead: RefCell::default(),
            held: Cell::new(None),
        };
        for (seed, (owner, name, page)) in [
            ('G', "F", 0),
            ('G', "F2", 1),
            ('T', "FT", 0),
            ('C', "L0", 0),
            ('C', "L1", 1),
        ]
        .into_iter()
        .enumerate()
        {
            let mfn = rig.puppets[&owner].page(page);
            // Even bytes: such a page is also a page table that maps nothing.
            let bytes: Vec<u8> = (0..PAGE_SIZE)
                .map(|at| {
                    u8::try_from((at * 7 + at / 256 + (seed + 1) * 31) % 251).expect("below 251") & 0xFE
                })
                .collect();
            xen.write(mfn << 12, &bytes).map_err(told)?;
            rig.frames.insert(name.to_owned(), Mfn(mfn));
        }
        rig.frames.insert("mmio".to_owned(), MMIO);
        rig.frames.insert("bad".to_owned(), BAD);
        Ok(rig)
    }

    fn set_the_scene(&self, table: char, case: Case) -> Result<(), String> {
        if case.version == 2 {
            self.write_guest(table, ARGUMENTS, &2_u32.to_le_bytes());
            let result = self.hypercall((table, 0), Abi::X86_64, [8, ARGUMENTS, 1]);
            same("version 2 in the scene", result, 0)?;
        }
        let frame = self.frame('G', "F")?.0;
        let head = EntryHead {
            flags: EntryFlags::PERMIT_ACCESS,
            domid: id_of('C'),
        };
        self.set_entry(
            'G',
            GrantRef(5),
            EntryV2::new(head, EntryBodyV2::FullPage { frame }),
        )
    }

    /// Does something with the machine.
    fn with<T>(&self, act: impl FnOnce(&mut RealXen) -> Result<T, XenError>) -> Result<T, String> {
        let mut xen = self.xen.borrow_mut();
        act(xen.as_mut().ok_or("no machine")?).map_err(told)
    }

    fn puppet(&self, name: char) -> Result<&Puppet, String> {
        self.puppets
            .get(&name)
            .ok_or(format!("{CANNOT}{name} is the first domain"))
    }

    /// A hypercall by a domain, whatever it is.
    fn raw_call(&self, actor: (char, usize), call: [u64; 6]) -> Result<i64, String> {
        match self.puppets.get(&actor.0) {
            Some(puppet) => self.with(|xen| puppet.call(xen, actor.1, call)),
            None => self.with(|xen| xen.hypercall(call)),
        }
    }

    pub(crate) fn abi_of(&self, _: char) -> Abi {
        Abi::X86_64
    }

    pub(crate) fn version(&self, name: char) -> u32 {
        self.table(name).map_or(0, |table| table.version)
    }

    /// A grant-table operation of the first domain's, with what it takes; its result and what it left.
    fn own_op(&self, op: u64, takes: &[u8]) -> Result<(i64, Vec<u8>), String> {
        self.with(|xen| {
            let place = xen.scratch[0] << 12;
            xen.write(place, takes)?;
            let result = xen.hypercall([call::GRANT_TABLE_OP, op, ARGUMENTS_ADDR, 1, 0, 0])?;
            let mut left = vec![0; takes.len()];
            xen.read(place, &mut left)?;
            Ok((result, left))
        })
    }

    /// Frames and version of a domain's table, through the first domain.
    fn table(&self, name: char) -> Result<Table, String> {
        if let Some(table) = self.tables.borrow().get(&name) {
            return Ok(table.clone());
        }
        let dom = id_of(name).0.to_le_bytes();
        let mut query = [0; 16];
        query[..2].copy_from_slice(&dom);
        let (_, left) = self.own_op(6, &query)?;
        same("query_size", left[12..14].to_vec(), vec![0, 0])?;
        let frames = u32::from_le_bytes([left[4], left[5], left[6], left[7]]);
        let mut setup = [0; 24];
        setup[..2].copy_from_slice(&dom);
        setup[4..8].copy_from_slice(&frames.to_le_bytes());
        setup[16..].copy_from_slice(&LIST_ADDR.to_le_bytes());
        let (_, left) = self.own_op(2, &setup)?;
        same("setup_table", left[8..10].to_vec(), vec![0, 0])?;
        let shared = self.list(frames)?;
        let mut version = [0; 8];
        version[..2].copy_from_slice(&dom);
        let (_, left) = self.own_op(10, &version)?;
        let version = u32::from(left[4]);
        let mut status = Vec::new();
        if version == 2 {
            let frames = frames.div_ceil(8);
            let mut get = [0; 16];
            get[..4].copy_from_slice(&frames.to_le_bytes());
            get[4..6].copy_from_slice(&dom);
            get[8..].copy_from_slice(&LIST_ADDR.to_le_bytes());
            let (_, left) = self.own_op(9, &get)?;
            same("get_status_frames", left[6..8].to_vec(), vec![0, 0])?;
            status = self.list(frames)?;
        }
        let table = Table {
            version,
            shared,
            status,
        };
        self.tables.borrow_mut().insert(name, table.clone());
        Ok(table)
    }

    fn list(&self, count: u32) -> Result<Vec<u64>, String> {
        let mut bytes = vec![0; usize::try_from(count).map_err(|error| error.to_string())? * 8];
        self.with(|xen| {
            for (page, part) in (AREA_PAGES..).zip(bytes.chunks_mut(4096)) {
                xen.read(xen.scratch[page] << 12, part)?;
            }
            Ok(())
        })?;
        Ok(bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|number| u64::from_le_bytes(*number))
            .collect())
    }

    // --- frames and places ----------------------------------------------------------------------

    /// A frame by the name that scripts use; `own`: the first of the domain's table.
    pub(crate) fn frame(&self, domain: char, name: &str) -> Result<Mfn, String> {
        if name == "own" {
            return Ok(Mfn(self.table(domain)?.shared[0]));
        }
        let found = self.frames.get(name).copied();
        found.ok_or(format!("{CANNOT}no frame is called {name}"))
    }

    pub(crate) fn frame_name(&self, mfn: Mfn) -> String {
        let found = self.frames.iter().find(|(_, frame)| **frame == mfn);
        found.map_or(mfn.to_string(), |(name, _)| name.clone())
    }

    /// What `domain` calls a frame of its own: all of them are PV.
    pub(crate) fn gfn_of(&self, _: char, mfn: Mfn) -> Result<Gfn, String> {
        Ok(Gfn(mfn.0))
    }

    pub(crate) fn at_first(&self, frame: &str) -> Result<Gfn, String> {
        Err(format!("{CANNOT}{frame} has no gfn"))
    }

    pub(crate) fn many(&self, _: u32) -> Outcome {
        Err(format!("{CANNOT}so many pages"))
    }

    /// What every named frame holds that still belongs to somebody.
    pub(crate) fn contents(&self) -> BTreeMap<Mfn, Vec<u8>> {
        let mut contents = BTreeMap::new();
        for mfn in self.frames.values().filter(|mfn| **mfn != BAD && **mfn != MMIO) {
            if self.moved.get() && self.owner(*mfn).ok().flatten().is_none() {
                continue;
            }
            let mut bytes = vec![0; PAGE_SIZE];
            if self.with(|xen| xen.read(mfn.0 << 12, &mut bytes)).is_ok() {
                contents.insert(*mfn, bytes);
            }
        }
        contents
    }

    /// Which of the scene's domains a frame belongs to.
    fn owner(&self, mfn: Mfn) -> Result<Option<char>, String> {
        const NO_PAGE: u64 = 0xF << 28;
        for name in ['G', 'C', 'T'] {
            let found = self.with(|xen| {
                xen.write(xen.scratch[1] << 12, &mfn.0.to_le_bytes())?;
                let mut takes = [0; 16];
                takes[0] = 1;
                takes[8..].copy_from_slice(&(ARGUMENTS_ADDR + 4096).to_le_bytes());
                let (result, _) = domctl(xen, control::GET_PAGE_FRAME_INFO, id_of(name).0, &takes)?;
                let mut kind = [0; 8];
                xen.read(xen.scratch[1] << 12, &mut kind)?;
                Ok(result == 0 && u64::from_le_bytes(kind) & NO_PAGE != NO_PAGE)
            })?;
            if found {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    pub(crate) fn place(&self, _: char, place: Place) -> u64 {
        match place {
            Place::Free(index) => SLOTS_ADDR + u64::try_from(index).unwrap_or_default() * 4096,
            Place::NoTable | Place::Huge => NO_TABLE,
        }
    }

    pub(crate) fn pte_address(&self, domain: char, addr: u64) -> u64 {
        let address = self
            .puppets
            .get(&domain)
            .and_then(|puppet| puppet.pte_address(addr));
        address.expect("a place with a level-1 table")
    }

    fn pte(&self, domain: char, addr: u64) -> Result<u64, String> {
        let mut bytes = [0; 8];
        let place = self.pte_address(domain, addr);
        self.with(|xen| xen.read(place, &mut bytes))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The domain changes a page-table entry of its own.
    fn write_pte(&self, domain: char, addr: u64, pte: u64) -> Outcome {
        const INVALIDATE: u64 = 2;
        let result = self.raw_call(
            (domain, 0),
            [call::UPDATE_VA_MAPPING, addr, pte, INVALIDATE, 0, 0],
        )?;
        same("update_va_mapping", result, 0)
    }

    // --- tables ---------------------------------------------------------------------------------

    /// Where in the machine bytes of an entry lie.
    fn entry_address(&self, table: char, gref: GrantRef, offset: u64) -> Result<u64, String> {
        let table = self.table(table)?;
        let size = if table.version == 2 { 16 } else { 8 };
        let at = u64::from(gref.0) * size;
        let page = usize::try_from(at / 4096)
            .ok()
            .and_then(|page| table.shared.get(page));
        Ok((page.ok_or("no such entry")? << 12) + at % 4096 + offset)
    }

    fn write_entry(&self, table: char, gref: GrantRef, offset: u64, bytes: &[u8]) -> Outcome {
        let place = self.entry_address(table, gref, offset)?;
        self.with(|xen| xen.write(place, bytes))
    }

    /// An entry, in the form that holds both versions.
    pub(crate) fn entry(&self, table: char, gref: GrantRef) -> Result<EntryV2, String> {
        let place = self.entry_address(table, gref, 0)?;
        let mut bytes = [0; ENTRY_V2_SIZE];
        if self.version(table) == 2 {
            self.with(|xen| xen.read(place, &mut bytes))?;
            return Ok(EntryV2::from_bytes(bytes));
        }
        self.with(|xen| xen.read(place, &mut bytes[..8]))?;
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let frame = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        Ok(EntryV2 {
            head: EntryHead::from_word(word),
            frame: frame.into(),
            ..EntryV2::default()
        })
    }

    fn status_address(&self, table: char, gref: GrantRef) -> Result<u64, String> {
        let at = u64::from(gref.0) * 2;
        let table = self.table(table)?;
        let page = usize::try_from(at / 4096)
            .ok()
            .and_then(|page| table.status.get(page));
        Ok((page.ok_or("a version 1 table has no status words")? << 12) + at % 4096)
    }

    pub(crate) fn status(&self, table: char, gref: GrantRef) -> Result<u16, String> {
        let place = self.status_address(table, gref)?;
        let mut bytes = [0; 2];
        self.with(|xen| xen.read(place, &mut bytes))?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(crate) fn set_status(&self, table: char, gref: GrantRef, status: u16) -> Outcome {
        let place = self.status_address(table, gref)?;
        self.with(|xen| xen.write(place, &status.to_le_bytes()))
    }

    pub(crate) fn set_head(&self, table: char, gref: GrantRef, head: EntryHead) -> Outcome {
        self.write_entry(table, gref, 0, &head.word().to_le_bytes())
    }

    pub(crate) fn set_frame(&self, table: char, gref: GrantRef, frame: u64) -> Outcome {
        if self.version(table) == 2 {
            return self.write_entry(table, gref, 8, &frame.to_le_bytes());
        }
        let frame = u32::try_from(frame).map_err(|_| "the frame does not fit version 1")?;
        self.write_entry(table, gref, 4, &frame.to_le_bytes())
    }

    pub(crate) fn set_entry(&self, table: char, gref: GrantRef, entry: EntryV2) -> Outcome {
        if self.version(table) == 2 {
            return self.write_entry(table, gref, 0, &entry.to_bytes());
        }
        self.set_frame(table, gref, entry.frame)?;
        self.set_head(table, gref, entry.head)
    }

    // --- guest memory ---------------------------------------------------------------------------

    /// The frame behind a page of a domain's arguments or lists, and where in it an address is.
    fn backing(&self, domain: char, addr: u64) -> Option<(u64, u64)> {
        let (lists, page) = match addr {
            ARGUMENTS_ADDR..LIST_ADDR => (false, (addr - ARGUMENTS_ADDR) / 4096),
            LIST_ADDR.. => (true, (addr - LIST_ADDR) / 4096),
            _ => return None,
        };
        let page = usize::try_from(page).ok().filter(|page| *page < AREA_PAGES)?;
        let frame = match (self.puppets.get(&domain), lists) {
            (Some(puppet), false) => puppet.argument_frame(page),
            (Some(puppet), true) => puppet.list_frame(page),
            (None, _) => {
                let xen = self.xen.borrow();
                xen.as_ref()?.scratch[page + if lists { AREA_PAGES } else { 0 }]
            }
        };
        Some((frame, addr % 4096))
    }

    fn guest_bytes(&self, domain: char, addr: u64, len: usize) -> Vec<(u64, std::ops::Range<usize>)> {
        let mut parts = Vec::new();
        let mut at = 0;
        while at < len {
            let here = addr + u64::try_from(at).unwrap_or_default();
            let (frame, offset) = self.backing(domain, here).expect("an area of the scene");
            let end = len.min(at + 4096 - usize::try_from(offset).unwrap_or_default());
            parts.push(((frame << 12) + offset, at..end));
            at = end;
        }
        parts
    }

    pub(crate) fn write_guest(&self, domain: char, addr: u64, bytes: &[u8]) {
        for (place, range) in self.guest_bytes(domain, addr, bytes.len()) {
            let done = self.with(|xen| xen.write(place, &bytes[range]));
            done.expect("the machine's memory");
        }
    }

    pub(crate) fn read_guest(&self, domain: char, addr: u64, into: &mut [u8]) {
        for (place, range) in self.guest_bytes(domain, addr, into.len()) {
            let done = self.with(|xen| xen.read(place, &mut into[range]));
            done.expect("the machine's memory");
        }
    }

    pub(crate) fn protect(&self, domain: char, addr: u64, bytes: u64, protection: Protection) {
        let pte = |addr: u64| {
            let (frame, _) = self.backing(domain, addr)?;
            Some(match protection {
                Protection::Open => frame << 12 | DATA,
                Protection::ReadOnly => frame << 12 | DATA & !2,
                Protection::Unmapped => 0,
            })
        };
        let range = addr..addr + bytes;
        let pages: Vec<u64> = if protection == Protection::Open {
            let mut denied = self.denied.borrow_mut();
            denied
                .extract_if(.., |(whose, page)| *whose == domain && range.contains(page))
                .map(|(_, page)| page)
                .collect()
        } else {
            range.step_by(4096).collect()
        };
        for page in pages {
            let Some(pte) = pte(page) else { continue };
            self.write_pte(domain, page, pte).expect("an area of the scene");
            if protection != Protection::Open {
                self.denied.borrow_mut().push((domain, page));
            }
        }
    }

    /// A real Xen shows nothing in the middle of a call.
    pub(crate) fn expect_statuses(&self, _: char, _: u64, _: usize, _: Option<usize>, _: usize) {}

    // --- calls ----------------------------------------------------------------------------------

    pub(crate) fn hypercall(&self, actor: (char, usize), _: Abi, registers: [u64; 3]) -> i64 {
        let [command, addr, count] = registers;
        self.tables.borrow_mut().clear();
        self.moved.set(self.moved.get() || command & 0xFFF == 4);
        let call = [call::GRANT_TABLE_OP, command, addr, count, 0, 0];
        self.raw_call(actor, call).expect("a processor that answers")
    }

    fn memory_op(&self, actor: (char, usize), command: u64, bytes: &[u8]) -> i64 {
        self.tables.borrow_mut().clear();
        self.write_guest(actor.0, ARGUMENTS, bytes);
        let call = [call::MEMORY_OP, command, ARGUMENTS, 0, 0, 0];
        self.raw_call(actor, call).expect("a processor that answers")
    }

    pub(crate) fn add_to_physmap(&self, actor: (char, usize), request: AddToPhysmap) -> i64 {
        let mut bytes = [0; 24];
        request.encode(Abi::X86_64, &mut bytes).expect("it fits");
        self.memory_op(actor, 7, &bytes)
    }

    /// The result, and the number of frames that it answers with.
    pub(crate) fn acquire_resource(&self, actor: (char, usize), request: AcquireResource) -> (i64, u32) {
        let mut bytes = [0; 32];
        request.encode(Abi::X86_64, &mut bytes).expect("it fits");
        let result = self.memory_op(actor, 28, &bytes);
        self.read_guest(actor.0, ARGUMENTS, &mut bytes);
        let answer = AcquireResource::decode(Abi::X86_64, &bytes).expect("it was there");
        (result, answer.nr_frames)
    }

    /// Creates a domain: what of its limits stands, or that it is refused.
    pub(crate) fn create(&self, _: Case, words: &[String], results: &[Vec<String>], rc: &str) -> Outcome {
        const ID: u16 = 9;
        let mut plan = Plan {
            id: ID,
            vcpus: 1,
            grant_frames: None,
            maptrack_frames: None,
            version: 2,
            pages: 0,
        };
        for word in words {
            let (name, value) = word.split_once('=').ok_or(format!("what is {word}"))?;
            let number = || number(value).and_then(|n| u32::try_from(n).map_err(|error| error.to_string()));
            match (name, value) {
                ("frames", "default") => plan.grant_frames = None,
                ("frames", _) => plan.grant_frames = Some(number()?),
                ("maptrack", _) => plan.maptrack_frames = Some(number()?),
                ("maxver", _) => plan.version = number()?,
                _ => return Err(format!("what is {word}")),
            }
        }
        let (result, _) = self.with(|xen| domctl(xen, control::CREATE, ID, &puppets::creation(&plan)))?;
        let mut query = [0; 16];
        query[..2].copy_from_slice(&ID.to_le_bytes());
        let (_, left) = self.own_op(6, &query)?;
        self.with(|xen| domctl(xen, control::DESTROY, ID, &[]))?;
        same("created", result == 0, rc == "0")?;
        for word in results.iter().flatten() {
            if let Some(frames) = word.strip_prefix("frames=") {
                let most = u32::from_le_bytes([left[8], left[9], left[10], left[11]]);
                same("max_grant_frames", u64::from(most), number(frames)?)?;
            }
        }
        Ok(())
    }

    // --- the world ------------------------------------------------------------------------------

    /// `C at X == F rw`.
    pub(crate) fn holds_at(&self, domain: char, addr: u64, is: &[&str]) -> Outcome {
        let pte = self.pte(domain, addr)?;
        let found = (pte & 1 != 0).then_some(Mfn((pte & PTE_FRAME) >> 12));
        let (name, rest) = is.split_first().ok_or("what is there")?;
        let wanted = match *name {
            "none" => return same("what is there", found, None),
            name => Some(self.frame(domain, name)?),
        };
        same("the frame there", found, wanted)?;
        for word in rest {
            match *word {
                "rw" => same("writable", pte & 2 != 0, true)?,
                "ro" => same("writable", pte & 2 != 0, false)?,
                "wb" => same("cache bits", pte & (1 << 3 | 1 << 4 | 1 << 7), 0)?,
                _ => return Err(format!("what is {word}")),
            }
        }
        Ok(())
    }

    /// The three bits of a page-table entry that are the guest's own.
    pub(crate) fn guest_bits(&self, domain: char, addr: u64) -> Result<u64, String> {
        Ok(self.pte(domain, addr)? >> 9 & 7)
    }

    pub(crate) fn set_guest_bits(&self, domain: char, addr: u64, bits: u64) -> Outcome {
        let pte = self.pte(domain, addr)? & (PTE_FRAME | 0xFF | 1 << 63);
        self.write_pte(domain, addr, pte | bits)
    }

    /// The domain maps a frame of its own by itself.
    pub(crate) fn set_pte(&self, domain: char, addr: u64, frame: Mfn) -> Outcome {
        self.write_pte(domain, addr, frame.0 << 12 | DATA)
    }

    pub(crate) fn set_p2m(&self, _: char, _: Gfn, _: &str, _: Option<Mfn>) -> Outcome {
        Err(format!("{CANNOT}a PV domain has no physmap"))
    }

    /// How many handles of a domain's are live: an unmap of nothing says it.
    fn live(&self, domain: char) -> Result<u64, String> {
        const HANDLES: u32 = 512;
        let mut bytes = Vec::new();
        for handle in 0..HANDLES {
            bytes.extend([0; 16]);
            bytes.extend(handle.to_le_bytes());
            bytes.extend([0; 4]);
        }
        self.write_guest(domain, ARGUMENTS, &bytes);
        let result = self.hypercall((domain, 0), Abi::X86_64, [1, ARGUMENTS, HANDLES.into()]);
        same("unmap_grant_ref", result, 0)?;
        self.read_guest(domain, ARGUMENTS, &mut bytes);
        let live = bytes.chunks(24).filter(|item| item[20..22] == [0, 0]).count();
        u64::try_from(live).map_err(|error| error.to_string())
    }

    /// Whether a domain is there, dead or alive. One that may go gets a moment for it.
    fn exists(&self, domain: char, wanted: bool) -> Result<bool, String> {
        let started = Instant::now();
        let id = id_of(domain).0;
        loop {
            let found = self.with(|xen| {
                let (result, left) = domctl(xen, control::GET_INFO, id, &[])?;
                Ok(result == 0 && left[..2] == id.to_le_bytes())
            })?;
            if found == wanted || started.elapsed() > Duration::from_secs(1) {
                return Ok(found);
            }
        }
    }

    /// Everything that needs no word of the runner's.
    pub(crate) fn world(&self, words: &[&str], is: &[&str]) -> Outcome {
        match (words, is) {
            (["live", domain, count], []) => same("mappings", self.live(letter(domain))?, number(count)?),
            (["frames", domain], [count]) => {
                let frames = self.table(letter(domain))?.shared.len();
                same(
                    "frames",
                    u64::try_from(frames).unwrap_or_default(),
                    number(count)?,
                )
            }
            (["status_frames_of", domain], [count]) => {
                let frames = self.table(letter(domain))?.status.len();
                same(
                    "status frames",
                    u64::try_from(frames).unwrap_or_default(),
                    number(count)?,
                )
            }
            (["version", domain], [version]) => {
                same("version", self.version(letter(domain)).into(), number(version)?)
            }
            (["owner", frame], [owner]) => {
                let wanted = (*owner != "nobody").then(|| letter(owner));
                same("owner", self.owner(self.frame('C', frame)?)?, wanted)
            }
            (["m2p", frame], [gfn]) => {
                let place = MACHINE_TO_PHYSICAL + self.frame('C', frame)?.0 * 8;
                let found = self.with(|xen| xen.peek(place))?;
                same("machine to physical", found, number(gfn)?)
            }
            (["exists", domain, there], []) => {
                let wanted = *there == "yes";
                same("exists", self.exists(letter(domain), wanted)?, wanted)
            }
            (["last_frame_is_zero", domain], []) => {
                let table = self.table(letter(domain))?;
                let frame = table.shared.last().ok_or("no frame")?;
                let mut bytes = [0xFF; PAGE_SIZE];
                self.with(|xen| xen.read(frame << 12, &mut bytes))?;
                same("all zero", bytes.iter().all(|byte| *byte == 0), true)
            }
            // Only an engine's own books say these.
            (
                [
                    "handles" | "pins" | "idle" | "writable" | "dirty" | "iommu" | "flushed" | "crashed",
                    ..,
                ],
                _,
            ) => {
                UNSEEN.set(UNSEEN.get() + 1);
                Ok(())
            }
            (words, []) => self.change(words),
            _ => Err(format!("what is {words:?} {is:?}")),
        }
    }

    /// What changes the world.
    fn change(&self, words: &[&str]) -> Outcome {
        match words {
            ["full", domain] => {
                let id = id_of(letter(domain)).0;
                let (result, info) = self.with(|xen| domctl(xen, control::GET_INFO, id, &[]))?;
                same("getdomaininfo", result, 0)?;
                let mut pages = [0; 8];
                pages.copy_from_slice(&info[8..16]);
                let kib = u64::from_le_bytes(pages) * 4;
                let (result, _) = self.with(|xen| domctl(xen, control::MAX_MEM, id, &kib.to_le_bytes()))?;
                same("max_mem", result, 0)
            }
            ["pagetable", frame] => {
                let mfn = self.frame('C', frame)?;
                let owner = id_of(if frame.starts_with('L') { 'C' } else { 'G' });
                // MMUEXT_PIN_L1_TABLE is 0.
                let result = self.with(|xen| {
                    let op: Vec<u8> = [0, mfn.0, 0].into_iter().flat_map(u64::to_le_bytes).collect();
                    xen.write(xen.scratch[0] << 12, &op)?;
                    xen.hypercall([call::MMUEXT_OP, ARGUMENTS_ADDR, 1, 0, u64::from(owner.0), 0])
                })?;
                same("pinned", result, 0)
            }
            ["dying", domain] => {
                self.hold_domain(letter(domain))?;
                self.kill(letter(domain))
            }
            ["kill", domain] => self.kill(letter(domain)),
            // Dying domains gave everything up that nobody uses.
            ["relinquish", _] => Ok(()),
            ["hold_status", domain] => {
                let domain = letter(domain);
                let frame = *self.table(domain)?.status.first().ok_or("no status frame")?;
                let addr = self.place(domain, Place::Free(1000));
                self.held.set(Some((domain, addr)));
                self.write_pte(domain, addr, frame << 12 | DATA)
            }
            ["unhold_status", _] => {
                let (domain, addr) = self.held.take().ok_or("nothing is held")?;
                self.write_pte(domain, addr, 0)
            }
            _ => Err(format!("{CANNOT}{}", words.join(" "))),
        }
    }

    pub(crate) fn owned_bytes(&self, _: char, _: Mfn) -> Result<Vec<u8>, String> {
        Err(format!("{CANNOT}a frame above 4 GiB"))
    }

    /// The first domain's page that stands for one of another domain's while that one is held.
    fn hold_domain(&self, domain: char) -> Outcome {
        let puppet = self.puppet(domain)?;
        let (addr, frame) = (LIST_ADDR + (AREA_PAGES as u64 - 1) * 4096, puppet.words_frame());
        let result = self.with(|xen| {
            let domain = u64::from(puppet.id);
            xen.hypercall([
                call::UPDATE_VA_MAPPING_OTHERDOMAIN,
                addr,
                frame << 12 | 0x25,
                2,
                domain,
                0,
            ])
        })?;
        self.holds.set(true);
        same("held", result, 0)
    }

    fn let_go(&self) -> Outcome {
        if !self.holds.replace(false) {
            return Ok(());
        }
        let addr = LIST_ADDR + (AREA_PAGES as u64 - 1) * 4096;
        let result = self.with(|xen| {
            let pte = xen.scratch[2 * AREA_PAGES - 1] << 12 | DATA;
            xen.hypercall([call::UPDATE_VA_MAPPING, addr, pte, 2, 0, 0])
        })?;
        same("let go", result, 0)
    }

    fn kill(&self, domain: char) -> Outcome {
        self.moved.set(true);
        self.tables.borrow_mut().clear();
        self.dead.borrow_mut().push(domain);
        let id = id_of(domain).0;
        let (result, _) = self.with(|xen| domctl(xen, control::DESTROY, id, &[]))?;
        same("destroydomain", result, 0)
    }

    /// After a vector: everybody dies, and nobody may stay.
    pub(crate) fn settle(&self) -> Outcome {
        self.let_go()?;
        for name in ['C', 'T', 'G'] {
            if !self.dead.borrow().contains(&name) {
                self.kill(name)?;
            }
        }
        for name in ['C', 'T', 'G'] {
            same("a dead domain is gone", !self.exists(name, false)?, true)?;
        }
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.xen.borrow().is_some() {
            // A vector that failed settled nothing.
            let _ = self.settle();
            set_machine(self.xen.take());
        }
    }
}

/// Whose behaviour, in words.
pub(crate) fn reference_name(reference: Reference) -> &'static str {
    match reference {
        Reference::Head => "HEAD",
        Reference::V4_20 => "4.20",
        Reference::V4_17 => "4.17",
    }
}
