//! The scene that vectors play in: the in-memory machine, the engine, and four domains.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use gnttab_abi::*;
use gnttab_engine::machine::{BasePolicy, Check, Guest, L2Slot, Machine, P2mEntry, PageOwner, PageType, Pte};
use gnttab_engine::{
    Access, Call, Config, Domain, DomainKind, Engine, EntryView, EntryWords, Fault, GuestMemory, Hook,
    Limits, Outcome as Called, PinCounts, Processor, Reference, Release, TableResource, Vcpu, Version,
};

use crate::run::{Case, Outcome, id_of, letter, number, reached, same};
use crate::script::{Step, Vector};

/// Where callers keep their arguments and lists.
pub(crate) const ARGUMENTS: u64 = 0x100_0000;
pub(crate) const LIST: u64 = 0x200_0000;
/// Where mappings are put: 4 MiB with level-1 tables (PV), or holes of the physmap.
const PLACES: u64 = 0x4000_0000;
/// A range of a PV domain that has no level-1 table.
const NO_TABLE: u64 = 0x7000_0000;
/// A range of a PV domain that is one large mapping.
const HUGE: u64 = 0x6000_0000;
/// A number that is no frame of anybody's and fits a version 1 entry.
const BAD: Mfn = Mfn(0xFFFF_FFF0);
/// Registers of a device.
const MMIO: Mfn = Mfn(0xFEE00);
/// A frame whose number does not fit a version 1 entry.
const HIGH: Mfn = Mfn(0x1_0000_0042);
/// Pages that each vCPU has for arguments, and each domain for lists.
const AREA: usize = 8;

/// Places in the engine by the names that scripts use.
const HOOKS: [(&str, Hook, fn()); 6] = [
    ("MapValidated", Hook::MapValidated, || reached("MapValidated")),
    ("ClaimLoaded", Hook::ClaimLoaded, || reached("ClaimLoaded")),
    ("ClaimMarked", Hook::ClaimMarked, || reached("ClaimMarked")),
    ("CopyMapped", Hook::CopyMapped, || reached("CopyMapped")),
    ("TransferStolen", Hook::TransferStolen, || {
        reached("TransferStolen")
    }),
    ("TransferCommitted", Hook::TransferCommitted, || {
        reached("TransferCommitted")
    }),
];

/// A place for a mapping.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// One of many that will do.
    Free(usize),
    /// PV: no level-1 table.
    NoTable,
    /// PV: a large mapping.
    Huge,
}

/// What a step made of some guest addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    Open,
    ReadOnly,
    Unmapped,
}

/// The statuses of a batch that is under way, as the runner laid it out.
#[derive(Clone, Copy)]
struct Watched {
    domain: char,
    base: u64,
    size: u64,
    status: u64,
    items: u64,
}

pub(crate) struct Rig {
    engine: Engine<Machine>,
    machine: Machine,
    case: Case,
    /// Whether the processor is wanted for something else before each item.
    eager: bool,
    frames: RefCell<BTreeMap<String, Mfn>>,
    denied: RefCell<Vec<(char, Range<u64>, Protection)>>,
    watched: RefCell<Option<Watched>>,
    /// References that steps hold by hand.
    held: RefCell<Vec<Mfn>>,
    /// Frames that steps made page tables, and whose they are.
    typed: RefCell<Vec<(char, Mfn)>>,
    /// Where C sees its frames before anything is mapped.
    at_first: RefCell<BTreeMap<String, Gfn>>,
}

impl Rig {
    pub(crate) fn new(table: char, vector: &Vector, case: Case) -> Result<Rig, String> {
        let holds = &vector.holds;
        let setting = |name: &str| {
            holds
                .setting(name)
                .map(|value| value.parse::<u32>().expect("a number"))
        };
        let version = |number| Version::from_number(number).expect("1 or 2");
        let config = Config {
            max_grant_frames: setting("frames").unwrap_or(64).max(64),
            max_version: match holds.setting("defaults") {
                Some(_) => Version::V1,
                None => Version::V2,
            },
            transitive: holds.setting("no-transitive").is_none(),
            transfer: holds.setting("no-transfer").is_none(),
            dump: holds.setting("no-dump").is_none(),
            processors: 4,
            reference: case.reference,
            ..Config::default()
        };
        let machine = Machine::with_reference(case.reference);
        let engine = Engine::new(machine.clone(), config.clone());
        let others = if case.kind == DomainKind::Arm {
            DomainKind::Arm
        } else {
            DomainKind::Pv
        };
        for name in ['P', 'G', 'C', 'T'] {
            let kind = match (name, holds.setting("G")) {
                ('C', _) => case.kind,
                ('G', Some("HVM")) => DomainKind::Hvm,
                _ => others,
            };
            let mut limits = Limits {
                version: config.max_version,
                ..Limits::default()
            };
            if name == 'C' {
                limits.grant_frames = setting("frames");
                limits.maptrack_frames = setting("maptrack");
                limits.vcpus = setting("vcpus").map_or(1, |vcpus| usize::try_from(vcpus).expect("few"));
                limits.version = setting("maxver").map_or(limits.version, version);
            }
            let guest = machine.add_domain(id_of(name), kind).expect("a new number");
            let narrow = name == 'C' && (case.abi == Abi::X86_32 || holds.setting("arm32").is_some());
            guest.set_narrow(narrow);
            guest.set_control(name == 'P');
            guest.add_memory(ARGUMENTS, 2 * AREA).expect("memory");
            guest.add_memory(LIST, AREA).expect("memory");
            if kind == DomainKind::Pv {
                guest.add_table(PLACES).expect("memory");
                guest.add_table(PLACES + (2 << 20)).expect("memory");
                guest.set_table(HUGE, Some(L2Slot::Superpage(BAD)));
            }
            engine
                .create_domain(id_of(name), kind, limits, guest)
                .expect("a new domain");
        }
        let rig = Rig {
            engine,
            machine,
            case,
            eager: case.eager,
            frames: RefCell::default(),
            denied: RefCell::default(),
            watched: RefCell::default(),
            held: RefCell::default(),
            typed: RefCell::default(),
            at_first: RefCell::default(),
        };
        rig.add_frames();
        rig.set_the_scene(table, vector);
        Ok(rig)
    }

    fn add_frames(&self) {
        for (owner, name) in [
            ('G', "F"),
            ('G', "F2"),
            ('T', "FT"),
            ('C', "L0"),
            ('C', "L1"),
            ('P', "PF"),
        ] {
            let page = self.guest(owner).private().add_page().expect("memory");
            self.add_frame(name, page.mfn);
        }
        for name in ["L0", "L1"] {
            let gfn = self.frame('C', name).and_then(|mfn| self.gfn_of('C', mfn));
            let gfn = gfn.expect("C has it");
            self.at_first.borrow_mut().insert(name.to_owned(), gfn);
        }
        if self.case.kind == DomainKind::Pv {
            let page = self
                .guest('C')
                .private()
                .add_page_at(HIGH)
                .expect("nobody has it");
            self.add_frame("LH", page.mfn);
        }
        self.add_frame("UNOWNED", self.machine.add_unowned_frame());
        assert!(self.machine.add_io_frame(MMIO), "nobody has it");
        let mut frames = self.frames.borrow_mut();
        frames.insert("mmio".to_owned(), MMIO);
        frames.insert("bad".to_owned(), BAD);
    }

    /// Names a frame and fills it with bytes that no other one has.
    fn add_frame(&self, name: &str, mfn: Mfn) {
        let mut frames = self.frames.borrow_mut();
        let seed = frames.len() + 1;
        let bytes: Vec<u8> = (0..PAGE_SIZE)
            .map(|at| u8::try_from((at * 7 + at / 256 + seed * 31) % 251).expect("below 251"))
            .collect();
        let words = self.machine.page(mfn).expect("a frame");
        assert!(words.write(0, &bytes), "a page fits a page");
        frames.insert(name.to_owned(), mfn);
    }

    fn set_the_scene(&self, table: char, vector: &Vector) {
        let holds = &vector.holds;
        match holds.setting("policy") {
            Some("silo") => self.machine.set_policy(BasePolicy::Silo),
            Some("flask-no-unmap") => {
                self.machine
                    .set_rule(|check| matches!(check, Check::Unmap(..)).then_some(false));
            }
            Some("flask-no-query") => {
                self.machine
                    .set_rule(|check| matches!(check, Check::Query(..)).then_some(false));
                self.machine.set_query_errno(Errno::Acces);
            }
            other => assert_eq!(other, None, "no policy of that name"),
        }
        self.guest('C')
            .private()
            .set_iommu(holds.setting("iommu").is_some());
        if self.case.version == 2 {
            self.set_version(table, 2);
        }
        let frame = self
            .gfn_of('G', self.frame('G', "F").expect("named"))
            .expect("a page of G")
            .0;
        let head = EntryHead {
            flags: EntryFlags::PERMIT_ACCESS,
            domid: id_of('C'),
        };
        let entry = EntryV2::new(head, EntryBodyV2::FullPage { frame });
        self.set_entry('G', GrantRef(5), entry)
            .expect("there is an entry 5");
        let waits = |name: &str| {
            let at = |step: &Step| step.on.as_ref().is_some_and(|(place, _)| place == name);
            vector.steps.iter().any(at)
        };
        for (_, hook, action) in HOOKS.into_iter().filter(|(name, ..)| waits(name)) {
            self.machine.hooks().at(hook, action);
        }
    }

    fn set_version(&self, table: char, version: u32) {
        let vcpu = self.vcpu(table, 0);
        self.processor()
            .set_version(&vcpu, version)
            .expect("nothing is in use");
    }

    // --- domains --------------------------------------------------------------------------------

    /// A domain, which for as long as the vector runs is there or remembered as dead.
    fn guest(&self, name: char) -> Arc<Domain<Machine>> {
        self.engine
            .domain(id_of(name))
            .expect("one of the scene's domains that is there")
    }

    fn vcpu(&self, name: char, number: usize) -> Vcpu<Machine> {
        Vcpu::take(&self.guest(name), number).expect("a vCPU that does nothing else")
    }

    fn processor(&self) -> Processor<'_, Machine> {
        self.engine
            .any_processor()
            .expect("a processor that does nothing else")
    }

    pub(crate) fn abi_of(&self, name: char) -> Abi {
        match self.guest(name).kind() {
            _ if name == 'C' => self.case.abi,
            DomainKind::Arm => Abi::Arm,
            DomainKind::Pv | DomainKind::Hvm => Abi::X86_64,
        }
    }

    pub(crate) fn version(&self, name: char) -> u32 {
        self.guest(name).version().number()
    }

    // --- frames and places ----------------------------------------------------------------------

    /// A frame by the name that scripts use; `own`: the first of the domain's table.
    pub(crate) fn frame(&self, domain: char, name: &str) -> Result<Mfn, String> {
        if name == "own" {
            return Ok(self
                .guest(domain)
                .shared_frame(0)
                .expect("a table has a frame")
                .mfn());
        }
        self.frames
            .borrow()
            .get(name)
            .copied()
            .ok_or(format!("no frame is called {name}"))
    }

    pub(crate) fn frame_name(&self, mfn: Mfn) -> String {
        let frames = self.frames.borrow();
        let found = frames.iter().find(|(_, frame)| **frame == mfn);
        found.map_or(mfn.to_string(), |(name, _)| name.clone())
    }

    /// What `domain` calls a frame of its own.
    pub(crate) fn gfn_of(&self, domain: char, mfn: Mfn) -> Result<Gfn, String> {
        let guest = self.guest(domain);
        if guest.kind() == DomainKind::Pv || mfn == BAD {
            return Ok(Gfn(mfn.0));
        }
        let has = |gfn: &Gfn| guest.private().physmap(*gfn).and_then(P2mEntry::own_ram) == Some(mfn);
        let known = (0..0x1000).map(Gfn).find(has);
        known.ok_or(format!("{domain} has no {}", self.frame_name(mfn)))
    }

    /// Where C saw a frame of its own when the scene began.
    pub(crate) fn at_first(&self, frame: &str) -> Result<Gfn, String> {
        self.at_first
            .borrow()
            .get(frame)
            .copied()
            .ok_or(format!("C never had {frame}"))
    }

    pub(crate) fn many(&self, count: u32) -> Outcome {
        for number in 0..count {
            let page = self.guest('C').private().add_page().ok_or("no memory")?;
            self.add_frame(&format!("many{number}"), page.mfn);
        }
        Ok(())
    }

    /// What every named frame holds.
    pub(crate) fn contents(&self) -> BTreeMap<Mfn, Vec<u8>> {
        let frames: BTreeSet<Mfn> = self.frames.borrow().values().copied().collect();
        let read = |mfn: Mfn| {
            let mut bytes = vec![0; PAGE_SIZE];
            let words = self.machine.page(mfn)?;
            words.read(0, &mut bytes).then_some((mfn, bytes))
        };
        frames.into_iter().filter_map(read).collect()
    }

    pub(crate) fn place(&self, domain: char, place: Place) -> u64 {
        match (place, self.guest(domain).kind()) {
            (Place::Free(index), _) => PLACES + u64::try_from(index).unwrap_or_default() * 4096,
            (Place::NoTable, _) => NO_TABLE,
            (Place::Huge, _) => HUGE,
        }
    }

    pub(crate) fn pte_address(&self, domain: char, addr: u64) -> u64 {
        self.guest(domain)
            .private()
            .pte_address(addr)
            .expect("a place with a level-1 table")
    }

    // --- tables ---------------------------------------------------------------------------------

    fn view(&self, table: char, gref: GrantRef) -> Result<EntryView, String> {
        self.processor()
            .entry(id_of(table), gref)
            .ok_or("no such entry".to_owned())
    }

    /// An entry, in the form that holds both versions.
    pub(crate) fn entry(&self, table: char, gref: GrantRef) -> Result<EntryV2, String> {
        Ok(match self.view(table, gref)?.words {
            EntryWords::V1(EntryV1 { head, frame }) => EntryV2 {
                head,
                frame: frame.into(),
                ..EntryV2::default()
            },
            EntryWords::V2(entry, _) => entry,
        })
    }

    pub(crate) fn status(&self, table: char, gref: GrantRef) -> Result<u16, String> {
        match self.view(table, gref)?.words {
            EntryWords::V1(_) => Err("a version 1 table has no status words".to_owned()),
            EntryWords::V2(_, status) => Ok(status.bits()),
        }
    }

    /// Writes guest's words of an entry, as its owner could.
    fn write_entry(&self, table: char, gref: GrantRef, offset: usize, bytes: &[u8]) -> Outcome {
        let guest = self.guest(table);
        let (size, per_page) = match guest.version() {
            Version::V1 => (ENTRY_V1_SIZE, V1_ENTRIES_PER_PAGE),
            Version::V2 => (ENTRY_V2_SIZE, V2_ENTRIES_PER_PAGE),
        };
        let page = guest.shared_frame(gref.0 / per_page).ok_or("no such entry")?;
        let index = usize::try_from(gref.0 % per_page).map_err(|error| error.to_string())?;
        let done = page.as_ref().write(index * size + offset, bytes);
        same("written", done, true)
    }

    pub(crate) fn set_head(&self, table: char, gref: GrantRef, head: EntryHead) -> Outcome {
        self.write_entry(table, gref, 0, &head.word().to_le_bytes())
    }

    pub(crate) fn set_frame(&self, table: char, gref: GrantRef, frame: u64) -> Outcome {
        match self.version(table) {
            1 => {
                let frame = u32::try_from(frame).map_err(|_| "the frame does not fit version 1")?;
                self.write_entry(table, gref, 4, &frame.to_le_bytes())
            }
            _ => self.write_entry(table, gref, 8, &frame.to_le_bytes()),
        }
    }

    pub(crate) fn set_entry(&self, table: char, gref: GrantRef, entry: EntryV2) -> Outcome {
        match self.version(table) {
            1 => {
                self.set_frame(table, gref, entry.frame)?;
                self.set_head(table, gref, entry.head)
            }
            _ => self.write_entry(table, gref, 0, &entry.to_bytes()),
        }
    }

    pub(crate) fn set_status(&self, table: char, gref: GrantRef, status: u16) -> Outcome {
        let guest = self.guest(table);
        let page = guest
            .status_frame(gref.0 / STATUS_PER_PAGE)
            .ok_or("no such status word")?;
        let index = usize::try_from(gref.0 % STATUS_PER_PAGE).map_err(|error| error.to_string())?;
        let done = page
            .as_ref()
            .write(index * STATUS_WORD_SIZE, &status.to_le_bytes());
        same("written", done, true)
    }

    // --- guest memory ---------------------------------------------------------------------------

    pub(crate) fn write_guest(&self, domain: char, addr: u64, bytes: &[u8]) {
        self.guest(domain)
            .private()
            .write(addr, bytes)
            .expect("an area of the scene");
    }

    pub(crate) fn read_guest(&self, domain: char, addr: u64, into: &mut [u8]) {
        self.guest(domain)
            .private()
            .read(addr, into)
            .expect("an area of the scene");
    }

    pub(crate) fn protect(&self, domain: char, addr: u64, bytes: u64, protection: Protection) {
        let range = addr..addr + bytes;
        let mut denied = self.denied.borrow_mut();
        denied.retain(|(whose, old, _)| (*whose, old.start) != (domain, addr));
        match protection {
            Protection::Open => {
                denied.retain(|(whose, old, _)| *whose != domain || !range.contains(&old.start))
            }
            _ => denied.push((domain, range, protection)),
        }
    }

    /// From now on writes to these statuses are places that steps can wait for.
    pub(crate) fn expect_statuses(
        &self,
        domain: char,
        base: u64,
        size: usize,
        status: Option<usize>,
        items: usize,
    ) {
        let wide = |number: usize| u64::try_from(number).unwrap_or_default();
        *self.watched.borrow_mut() = status.map(|status| Watched {
            domain,
            base,
            size: wide(size),
            status: wide(status),
            items: wide(items),
        });
    }

    // --- calls ----------------------------------------------------------------------------------

    /// A hypercall with these registers, continued until it is done.
    pub(crate) fn hypercall(&self, actor: (char, usize), abi: Abi, registers: [u64; 3]) -> i64 {
        let [command, addr, count] = registers;
        let low = |register: u64| u32::try_from(register & 0xFFFF_FFFF).expect("32 bits are left");
        let mut call = Call {
            command: Command(low(command)),
            addr,
            count: low(count),
        };
        let vcpu = self.vcpu(actor.0, actor.1);
        let memory = Memory {
            rig: self,
            domain: actor.0,
            guest: vcpu.domain().clone(),
        };
        let mut cpu = self.processor();
        loop {
            let mut wanted = || self.eager;
            match cpu.hypercall(&vcpu, abi, call, &memory, &mut wanted) {
                Called::Done(result) => return result.err().map_or(0, Errno::hypercall_result),
                Called::Continue(rest) => {
                    assert!(rest.count > 0, "nothing is left to go on with");
                    call = rest;
                }
            }
        }
    }

    pub(crate) fn add_to_physmap(&self, actor: (char, usize), request: AddToPhysmap) -> i64 {
        let vcpu = self.vcpu(actor.0, actor.1);
        let placed = self
            .processor()
            .place_frame(&vcpu, request.domid, request.idx, Gfn(request.gpfn));
        placed.err().map_or(0, Errno::hypercall_result)
    }

    /// The result, and the number of frames that it answers with.
    pub(crate) fn acquire_resource(&self, actor: (char, usize), request: AcquireResource) -> (i64, u32) {
        let vcpu = self.vcpu(actor.0, actor.1);
        let resource = match request.id {
            RESOURCE_GRANT_TABLE_SHARED => TableResource::Shared,
            _ => TableResource::Status,
        };
        let mut cpu = self.processor();
        let done = if request.frame_list == 0 {
            cpu.resource_size(&vcpu, request.domid, resource)
        } else {
            let first = u32::try_from(request.frame).expect("the embedder sees to that");
            let mut store = |_, mfn: Mfn| {
                let used = self.machine.frame(mfn).is_some_and(|frame| frame.special);
                if used { Ok(()) } else { Err(Errno::Io) }
            };
            let acquired = cpu.acquire_frames(
                &vcpu,
                request.domid,
                resource,
                first,
                request.nr_frames,
                &mut store,
            );
            acquired.map(|()| request.nr_frames)
        };
        match done {
            Ok(count) => (0, count),
            Err(errno) => (errno.hypercall_result(), 0),
        }
    }

    /// Creates a domain in an engine of its own: what of its limits stands, or that it is refused.
    pub(crate) fn create(&self, case: Case, words: &[String], results: &[Vec<String>], rc: &str) -> Outcome {
        let mut config = Config {
            reference: case.reference,
            ..Config::default()
        };
        let mut limits = Limits::default();
        for word in words {
            let (name, value) = word.split_once('=').ok_or(format!("what is {word}"))?;
            let number = || number(value).and_then(|n| u32::try_from(n).map_err(|error| error.to_string()));
            match (name, value) {
                ("frames", "default") => limits.grant_frames = None,
                ("frames", _) => limits.grant_frames = Some(number()?),
                ("maptrack", _) => limits.maptrack_frames = Some(number()?),
                ("maxver", _) => limits.version = Version::from_number(number()?).ok_or("1 or 2")?,
                ("machine-maxver", _) => {
                    config.max_version = Version::from_number(number()?).ok_or("1 or 2")?
                }
                _ => return Err(format!("what is {word}")),
            }
        }
        let machine = Machine::with_reference(case.reference);
        let guest = machine
            .add_domain(DomId(9), case.kind)
            .map_err(|error| error.to_string())?;
        let engine = Engine::new(machine, config);
        let created = engine.create_domain(DomId(9), case.kind, limits, guest);
        same("created", created.is_ok(), rc == "0")?;
        for word in results.iter().flatten() {
            if let (Some(frames), Ok(domain)) = (word.strip_prefix("frames="), &created) {
                same(
                    "max_grant_frames",
                    u64::from(domain.max_grant_frames()),
                    number(frames)?,
                )?;
            }
        }
        Ok(())
    }

    // --- the world ------------------------------------------------------------------------------

    /// `C at X == F rw`.
    pub(crate) fn holds_at(&self, domain: char, addr: u64, is: &[&str]) -> Outcome {
        let guest = self.guest(domain);
        let (found, bits) = if guest.kind() == DomainKind::Pv {
            let pte = guest.private().pte(addr).unwrap_or_default();
            let access = if pte.has(Pte::WRITABLE) {
                Access::Write
            } else {
                Access::Read
            };
            (pte.has(Pte::PRESENT).then(|| (pte.mfn(), access)), pte.0)
        } else {
            let found = match guest.private().physmap(Gfn::containing(addr)) {
                None => None,
                Some(P2mEntry::Grant(mfn, access)) => Some((mfn, access)),
                Some(other) => other.own_ram().map(|mfn| (mfn, Access::Write)),
            };
            (found, 0)
        };
        let (name, rest) = is.split_first().ok_or("what is there")?;
        let wanted = match *name {
            "none" => return same("what is there", found, None),
            "table0" => guest.shared_frame(0).map(|page| page.mfn()),
            "status0" => guest.status_frame(0).map(|page| page.mfn()),
            name => Some(self.frame(domain, name)?),
        };
        same("the frame there", found.map(|(mfn, _)| mfn), wanted)?;
        for word in rest {
            match *word {
                "rw" => same("access", found.map(|(_, access)| access), Some(Access::Write))?,
                "ro" => same("access", found.map(|(_, access)| access), Some(Access::Read))?,
                "wb" => same("cache bits", bits & (Pte::PWT | Pte::PCD | Pte::PAT), 0)?,
                _ => return Err(format!("what is {word}")),
            }
        }
        Ok(())
    }

    /// The three bits of a page-table entry that are the guest's own.
    pub(crate) fn guest_bits(&self, domain: char, addr: u64) -> Result<u64, String> {
        let pte = self.guest(domain).private().pte(addr).ok_or("no entry there")?;
        Ok(pte.0 >> Pte::AVAIL_SHIFT & 7)
    }

    pub(crate) fn set_guest_bits(&self, domain: char, addr: u64, bits: u64) -> Outcome {
        same("set", self.guest(domain).private().set_pte_bits(addr, bits), true)
    }

    /// The domain maps a frame of its own by itself.
    pub(crate) fn set_pte(&self, domain: char, addr: u64, frame: Mfn) -> Outcome {
        let gfn = self.gfn_of(domain, frame)?;
        same(
            "mapped",
            self.guest(domain).private().map(addr, gfn, Access::Write),
            true,
        )
    }

    pub(crate) fn set_p2m(&self, domain: char, gfn: Gfn, kind: &str, frame: Option<Mfn>) -> Outcome {
        let frame = |why| frame.ok_or(format!("{why} of which frame"));
        let guest = self.guest(domain);
        let own = guest.private().physmap(gfn).and_then(P2mEntry::own_ram);
        let entry = match kind {
            "hole" => None,
            "pod" => Some(P2mEntry::PopulateOnDemand),
            "foreign" => Some(P2mEntry::Foreign(frame(kind)?)),
            "grant" => Some(P2mEntry::Grant(frame(kind)?, Access::Write)),
            "mmio" => Some(P2mEntry::DirectMmio(MMIO)),
            "paged" => Some(P2mEntry::PagedOut { requested: false }),
            "readonly" => Some(P2mEntry::ReadOnlyRam(own.ok_or("no memory there")?)),
            _ => return Err(format!("no gfn is {kind}")),
        };
        same("entered", guest.private().set_physmap(gfn, entry), true)
    }

    /// Everything that needs no word of the runner's.
    pub(crate) fn world(&self, words: &[&str], is: &[&str]) -> Outcome {
        let of = |domain: &str| self.guest(letter(domain));
        let observed = |domain: &str| {
            let view = self.processor().observe(id_of(letter(domain)));
            view.ok_or(format!("{domain} is gone"))
        };
        match (words, is) {
            (["live", domain, count], []) => same(
                "mappings",
                u64::try_from(of(domain).mappings().count()).unwrap_or_default(),
                number(count)?,
            ),
            (["handles", domain], [count]) => {
                same("handles", observed(domain)?.handles.into(), number(count)?)
            }
            (["frames", domain], [count]) => same("frames", observed(domain)?.frames.into(), number(count)?),
            (["status_frames_of", domain], [count]) => same(
                "status frames",
                observed(domain)?.status_frames.into(),
                number(count)?,
            ),
            (["version", domain], [version]) => {
                same("version", of(domain).version().number().into(), number(version)?)
            }
            (["pins", table, gref], pins) => {
                let gref = GrantRef(u32::try_from(number(gref)?).map_err(|error| error.to_string())?);
                same("pins", self.view(letter(table), gref)?.pins, pin_counts(pins)?)
            }
            (["owner", frame], [owner]) => {
                let info = self.machine.frame(self.frame('C', frame)?).ok_or("no frame")?;
                let found = match info.owner {
                    PageOwner::Domain(id) => Some(id),
                    _ => None,
                };
                let wanted = if *owner == "nobody" {
                    None
                } else {
                    Some(id_of(letter(owner)))
                };
                same("owner", found, wanted)
            }
            (["idle", frame], []) => {
                let info = self.machine.frame(self.frame('G', frame)?).ok_or("no frame")?;
                same("references", info.references, 1)?;
                same("type count", info.type_count, 0)
            }
            (["writable", frame], [count]) => {
                let info = self.machine.frame(self.frame('G', frame)?).ok_or("no frame")?;
                same("type count", info.type_count, number(count)?)
            }
            (["m2p", frame], [number_]) => {
                let info = self.machine.frame(self.frame('C', frame)?).ok_or("no frame")?;
                same("machine to physical", info.physical, Gfn(number(number_)?))
            }
            (["exists", domain, there], []) => {
                let domain = self.engine.domain(id_of(letter(domain)));
                same("exists", domain.is_some(), *there == "yes")
            }
            (["crashed", domain], []) => same("crashed", of(domain).private().crashes().is_empty(), false),
            (["dirty", domain, frame], []) => {
                let frame = self.frame(letter(domain), frame)?;
                same("dirty", of(domain).private().dirty().contains(&frame), true)
            }
            (["iommu", domain, frame], [right]) => {
                let found = of(domain)
                    .private()
                    .iommu_right(self.frame(letter(domain), frame)?);
                let wanted = match *right {
                    "rw" => Some(Access::Write),
                    "ro" => Some(Access::Read),
                    _ => None,
                };
                same("devices may", found, wanted)
            }
            (["flushed", "nothing"], []) => same("flushed", self.machine.cache_flushes().as_slice(), &[]),
            (["flushed", frame, offset, length, op], []) => {
                let flushes = self.machine.cache_flushes();
                same("flushes", flushes.len(), 1)?;
                let found = flushes[0];
                same("frame", found.mfn, self.frame('C', frame)?)?;
                same("offset", found.offset.into(), number(offset)?)?;
                same("length", found.length.into(), number(length)?)?;
                same("op", found.op.bits().into(), number(op)?)
            }
            (["last_frame_is_zero", domain], []) => {
                let guest = of(domain);
                let page = guest.shared_frame(guest.frames().0 - 1).ok_or("no frame")?;
                let mut bytes = [0xFF; PAGE_SIZE];
                same("read", page.as_ref().read(0, &mut bytes), true)?;
                same("all zero", bytes.iter().all(|byte| *byte == 0), true)
            }
            (words, []) => self.change(words),
            _ => Err(format!("what is {words:?} {is:?}")),
        }
    }

    /// What changes the world.
    fn change(&self, words: &[&str]) -> Outcome {
        let of = |domain: &str| self.guest(letter(domain));
        match words {
            ["control", domain] => of(domain).private().set_control(true),
            ["dm", model, target] => of(model).private().set_device_model_of(id_of(letter(target))),
            ["nomem"] => self.machine.set_shortage(true),
            ["nolow"] => self.machine.set_low_shortage(true),
            ["full", domain] => {
                let guest = of(domain);
                guest.private().set_max_pages(guest.private().pages());
            }
            ["iommu_refuses", domain] => of(domain).private().set_iommu_failing(true),
            ["pagetable", frame] => {
                let mfn = self.frame('C', frame)?;
                let owner = if frame.starts_with('L') { 'C' } else { 'G' };
                self.typed.borrow_mut().push((owner, mfn));
                return same(
                    "typed",
                    self.guest(owner).private().use_as(mfn, PageType::L1Table),
                    true,
                );
            }
            ["dying", domain] => self.begin_to_die(letter(domain)),
            ["kill", domain] => self.kill(letter(domain)),
            ["relinquish", frame] => {
                // Nothing to do if its owner is gone with all it had.
                if let Some(guest) = self.engine.domain(id_of('G')) {
                    guest.private().give_up(self.frame('G', frame)?);
                }
            }
            ["hold_status", domain] => {
                let mfn = of(domain).status_frame(0).ok_or("no status frame")?.mfn();
                same("held", self.machine.hold(mfn), true)?;
                self.held.borrow_mut().push(mfn);
            }
            ["unhold_status", _] => {
                let mfn = self.held.borrow_mut().pop().ok_or("nothing is held")?;
                self.machine.let_go(mfn);
            }
            _ => return Err(format!("what is {words:?}")),
        }
        Ok(())
    }

    /// What a frame of the domain's own holds.
    pub(crate) fn owned_bytes(&self, domain: char, mfn: Mfn) -> Result<Vec<u8>, String> {
        let info = self.machine.frame(mfn).ok_or("no frame")?;
        same("owner", info.owner, PageOwner::Domain(id_of(domain)))?;
        let mut bytes = vec![0; PAGE_SIZE];
        let words = self.machine.page(mfn).ok_or("no frame")?;
        same("read", words.read(0, &mut bytes), true)?;
        Ok(bytes)
    }

    fn begin_to_die(&self, domain: char) {
        let guest = self.guest(domain);
        self.engine.begin_teardown(&guest);
        guest.private().set_dying();
    }

    /// The whole of a domain's death, as far as the uses of its entries let it.
    fn kill(&self, domain: char) {
        self.begin_to_die(domain);
        let guest = self.guest(domain);
        // First, so that no page-table entry still holds a frame of a granter whose last pin goes.
        guest.private().drop_address_space();
        {
            let vcpus: Vec<_> = (0..guest.limits().vcpus)
                .map(|number| self.vcpu(domain, number))
                .collect();
            let mut cpu = self.processor();
            while let Release::More { .. } = cpu.release_mappings(&vcpus, 100) {}
        }
        guest.private().give_up_memory();
        drop(guest);
        self.engine.retire(id_of(domain));
    }

    /// After a vector: the books must be right; and once everybody is dead, nothing may be left.
    pub(crate) fn settle(&self) -> Outcome {
        self.machine.hooks().clear();
        same("what is wrong in the books", self.machine.audit(), vec![])?;
        for mfn in self.held.borrow_mut().drain(..) {
            self.machine.let_go(mfn);
        }
        let there = |name: char| self.engine.domain(id_of(name)).is_some();
        for (owner, mfn) in self.typed.borrow_mut().drain(..) {
            if there(owner) {
                self.guest(owner).private().stop_use(mfn);
            }
        }
        let all = ['C', 'T', 'G', 'P'];
        for name in all.into_iter().filter(|name| there(*name)) {
            self.guest(name).private().drop_address_space();
        }
        for name in all {
            if there(name) {
                self.kill(name);
            }
        }
        let left: Vec<DomId> = self.engine.domains().collect();
        same("domains that cannot go", left, vec![])?;
        same("what is left in the books", self.machine.audit_idle(), vec![])
    }
}

/// `hr1 hw2`, or `none`.
fn pin_counts(words: &[&str]) -> Result<PinCounts, String> {
    let mut pins = PinCounts::default();
    for word in words.iter().filter(|word| **word != "none") {
        let (kind, count) = word.split_at_checked(2).ok_or("which pins")?;
        let count = count.parse().map_err(|_| format!("{word} has no count"))?;
        match kind {
            "hw" => pins.host_write = count,
            "hr" => pins.host_read = count,
            "dw" => pins.device_write = count,
            "dr" => pins.device_read = count,
            _ => return Err(format!("no pins are called {kind}")),
        }
    }
    Ok(pins)
}

/// A domain's memory as the door sees it, but for what a step took away.
struct Memory<'r> {
    rig: &'r Rig,
    domain: char,
    guest: Arc<Domain<Machine>>,
}

impl Memory<'_> {
    fn check(&self, addr: u64, bytes: usize, write: bool) -> Result<(), Fault> {
        let end = addr.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
        let hit = |(domain, range, protection): &(char, Range<u64>, Protection)| {
            let touches = range.start < end && addr < range.end;
            *domain == self.domain && touches && (write || *protection == Protection::Unmapped)
        };
        if self.rig.denied.borrow().iter().any(hit) {
            Err(Fault { addr })
        } else {
            Ok(())
        }
    }

    fn private(&self) -> &Guest {
        self.guest.private()
    }
}

impl GuestMemory for Memory<'_> {
    fn plausible(&self, addr: u64, bytes: u64) -> bool {
        self.private().plausible(addr, bytes)
    }

    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.check(addr, into.len(), false)?;
        self.private().read(addr, into).map_err(|_| Fault { addr })
    }

    fn peek(&self, addr: u64, into: &mut [u8]) -> bool {
        self.private().peek(addr, into)
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        let watched = *self.rig.watched.borrow();
        if let Some(watched) = watched.filter(|watched| watched.domain == self.domain) {
            let end = addr + u64::try_from(bytes.len()).unwrap_or_default();
            for item in 0..watched.items {
                let status = watched.base + item * watched.size + watched.status;
                if addr <= status && status < end {
                    reached(&format!("write:{item}"));
                }
            }
        }
        self.check(addr, bytes.len(), true)?;
        self.private().write(addr, bytes).map_err(|_| Fault { addr })
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
