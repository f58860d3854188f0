//! Engine and model side by side: every step is done to both, then everything that can be seen is
//! compared.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;

use gnttab_abi::{
    Abi, Command, Copy, CopyFlags, DomId, Errno, GetStatusFrames, GetVersion, Gfn, GrantStatus, MapGrantRef,
    Mfn, Op, QuerySize, SetVersion, SetupTable, SwapGrantRef, Transfer, UnmapAndReplace, UnmapGrantRef,
};
use gnttab_engine::machine::{Audit, Machine, P2mEntry, PageOwner};
use gnttab_engine::{
    Access, Call, Config, Domain, DomainKind, Engine, Fault, GuestMemory, Hook, Outcome, Release, Vcpu,
    Version,
};

use super::spec::{self, Kept, LINEAR, Limits, Model, P2m, TableFrames, UnmapRequest};

/// References that scenes use.
pub(crate) const REFS: [u32; 14] = [0, 1, 2, 5, 7, 8, 9, 30, 255, 256, 300, 511, 600, 1100];
/// Where a guest's arguments lie.
const ARGS: u64 = 0x7000;
/// What lies behind them.
const CANARY: [u8; 24] = [0xA5; 24];

pub(crate) type Dom = Arc<Domain<Machine>>;

/// The arguments of one hypercall, in memory that can fault (AUD-BUF: the rest is canaries).
struct Args {
    bytes: Mutex<Vec<u8>>,
    unreadable: Range<usize>,
    unwritable: Range<usize>,
}

impl Args {
    fn range(&self, addr: u64, len: usize) -> Result<Range<usize>, Fault> {
        let start = usize::try_from(addr.wrapping_sub(ARGS)).map_err(|_| Fault { addr })?;
        let end = start.checked_add(len).ok_or(Fault { addr })?;
        if end <= self.bytes.lock().unwrap().len() {
            Ok(start..end)
        } else {
            Err(Fault { addr })
        }
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

impl GuestMemory for Args {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let range = self.range(addr, into.len())?;
        if overlap(&range, &self.unreadable) {
            return Err(Fault { addr });
        }
        into.copy_from_slice(&self.bytes.lock().unwrap()[range]);
        Ok(())
    }
    fn peek(&self, addr: u64, into: &mut [u8]) -> bool {
        self.read(addr, into).is_ok()
    }
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        let range = self.range(addr, bytes.len())?;
        if overlap(&range, &self.unwritable) {
            return Err(Fault { addr });
        }
        self.bytes.lock().unwrap()[range].copy_from_slice(bytes);
        Ok(())
    }
}

/// Where guest memory fails a batch: reading an item, or writing one back.
#[derive(Clone, std::marker::Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    None,
    Read(usize),
    Write(usize),
}

impl Trouble {
    /// How many of `n` items are executed, and how many of these are written back.
    fn limits(self, n: usize) -> (usize, usize) {
        match self {
            Trouble::None => (n, n),
            Trouble::Read(item) => (item, item),
            Trouble::Write(item) => (item + 1, item),
        }
    }
}

/// How a batch is made.
#[derive(Clone, std::marker::Copy, Debug)]
pub(crate) struct Manner {
    pub(crate) vcpu: usize,
    pub(crate) abi: Abi,
    /// Whether to stop, bit by bit, each time that the engine asks.
    pub(crate) yields: u32,
    pub(crate) trouble: Trouble,
}

impl Manner {
    const PLAIN: Manner = Manner {
        vcpu: 1,
        abi: Abi::X86_64,
        yields: 0,
        trouble: Trouble::None,
    };
}

/// A hypercall as it came out.
struct Called {
    result: Result<(), Errno>,
    bytes: Vec<u8>,
    /// Items at which it was restarted.
    restarts: Vec<usize>,
}

struct Request {
    op: Op,
    size: usize,
    count: u32,
    bytes: Vec<u8>,
}

fn hypercall(engine: &Engine<Machine>, domain: &Dom, manner: Manner, request: &Request) -> Called {
    let size = request.size;
    let item = |at: usize| at * size..(at + 1) * size;
    let args = Args {
        bytes: Mutex::new(request.bytes.clone()),
        unreadable: if let Trouble::Read(at) = manner.trouble {
            item(at)
        } else {
            0..0
        },
        unwritable: if let Trouble::Write(at) = manner.trouble {
            item(at)
        } else {
            0..0
        },
    };
    let vcpu = Vcpu::take(domain, manner.vcpu).expect("the vCPU is free");
    let mut cpu = engine.any_processor().expect("a processor is free");
    let command = Command(request.op as u32);
    let mut call = Call {
        command,
        addr: ARGS,
        count: request.count,
    };
    let (mut yields, mut restarts) = (manner.yields, Vec::new());
    let mut yield_now = || {
        let now = yields & 1 != 0;
        yields >>= 1;
        now
    };
    let result = loop {
        match cpu.hypercall(&vcpu, manner.abi, call, &args, &mut yield_now) {
            Outcome::Done(result) => break result,
            Outcome::Continue(next) => {
                let at = usize::try_from(next.addr - ARGS).unwrap() / size;
                assert_eq!(next.command, command);
                assert_eq!(
                    next.count as usize,
                    request.count as usize - at,
                    "the rest is left"
                );
                assert!(
                    next.addr > call.addr,
                    "ENG-4: a call that goes on has got somewhere"
                );
                restarts.push(at);
                call = next;
            }
        }
    };
    let bytes = args.bytes.into_inner().unwrap();
    Called {
        result,
        bytes,
        restarts,
    }
}

/// Something that happens in the middle of an operation of somebody else.
pub(crate) type Meanwhile<'a> = &'a mut dyn FnMut(&mut World);

/// An answer: to which operation, about a table of which version, to a caller of which kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    pub(crate) op: Op,
    pub(crate) version: u32,
    pub(crate) kind: &'static str,
    /// A status's name, or an errno's with its sign.
    pub(crate) answer: String,
}

/// See the module.
pub(crate) struct World {
    pub(crate) machine: Machine,
    engine: Arc<Engine<Machine>>,
    pub(crate) model: Model,
    limits: BTreeMap<DomId, Limits>,
    /// Address and bus address that a handle was mapped with.
    pub(crate) mapped_at: BTreeMap<(DomId, u32), (u64, u64)>,
    /// Every frame that was ever part of a domain's table.
    pub(crate) table_frames: Vec<Mfn>,
    /// What was done, in words, if it `tells`.
    pub(crate) trace: Vec<String>,
    pub(crate) tells: bool,
    /// How often which answer was given.
    pub(crate) seen: BTreeMap<Seen, u32>,
    in_flight: bool,
    /// Copies and flushes are made inside tables, where nobody can be stopped.
    inside: bool,
    /// Who is in the middle of something.
    pub(crate) caller: Option<DomId>,
}

/// What both sides must say alike.
fn same<T: PartialEq + Debug>(what: impl std::fmt::Display, engine: T, model: T) {
    assert!(
        engine == model,
        "{what}\n  engine: {engine:x?}\n   model: {model:x?}"
    );
}

impl World {
    pub(crate) fn new(limits: &[Limits]) -> World {
        let machine = Machine::new();
        machine.hooks().set_relax(thread::yield_now);
        let engine = Arc::new(Engine::new(machine.clone(), Config::default()));
        let ids = (1..).map(DomId);
        let mut world = World {
            machine,
            engine,
            model: Model::default(),
            limits: ids.zip(limits.iter().copied()).collect(),
            mapped_at: BTreeMap::new(),
            table_frames: Vec::new(),
            trace: Vec::new(),
            tells: true,
            seen: BTreeMap::new(),
            in_flight: false,
            inside: false,
            caller: None,
        };
        let ids: Vec<DomId> = world.limits.keys().copied().collect();
        ids.into_iter().for_each(|id| world.create(id));
        world
    }

    /// Has copies and flushes made inside tables, or not.
    pub(crate) fn with_work_inside(mut self, inside: bool) -> World {
        self.machine.work_inside(inside);
        self.inside = inside;
        self
    }

    pub(crate) fn domain(&self, id: DomId) -> Option<Dom> {
        self.engine.domain(id)
    }

    fn there(&self, id: DomId) -> Dom {
        self.domain(id).expect("the model knows it")
    }

    /// Domains whose guests run.
    pub(crate) fn running(&self) -> Vec<DomId> {
        let live = self.model.doms.iter().filter(|(_, dom)| !dom.dying);
        live.map(|(id, _)| *id).collect()
    }

    /// The vCPU that is certainly free.
    pub(crate) fn free_vcpu(&self) -> usize {
        usize::from(self.in_flight)
    }

    fn note(&mut self, what: impl std::fmt::Display) {
        if self.tells {
            let indent = if self.in_flight { "    " } else { "" };
            self.trace.push(format!("{indent}{what}"));
        }
    }

    fn table_of(&self, id: DomId) -> TableFrames {
        let Some(domain) = self.domain(id) else {
            return TableFrames {
                shared: Vec::new(),
                status: Vec::new(),
            };
        };
        let (shared, status) = domain.frames();
        TableFrames {
            shared: (0..shared)
                .map(|i| domain.shared_frame(i).unwrap().mfn())
                .collect(),
            status: (0..status)
                .map(|i| domain.status_frame(i).unwrap().mfn())
                .collect(),
        }
    }

    // --- life ------------------------------------------------------------------------------------

    /// Creates a domain of the scene that is not there: true.
    pub(crate) fn create(&mut self, id: DomId) {
        let Ok(guest) = self.machine.add_domain(id, self.limits[&id].kind) else {
            return;
        };
        let limits = self.limits[&id];
        self.note(format_args!("create {id} {limits:?}"));
        let control = id == DomId(1);
        guest.set_control(control);
        guest.set_iommu(limits.iommu);
        let engine_limits = gnttab_engine::Limits {
            grant_frames: Some(limits.max_frames),
            maptrack_frames: Some(limits.maptrack_frames),
            version: if limits.max_version == 1 {
                Version::V1
            } else {
                Version::V2
            },
            vcpus: 2,
            ..gnttab_engine::Limits::default()
        };
        let domain = self
            .engine
            .create_domain(id, limits.kind, engine_limits, guest)
            .expect("it is new");
        self.model.create_domain(id, control, limits, &self.table_of(id));
        if limits.kind == DomainKind::Pv {
            let l1 = domain.private().add_table(LINEAR).unwrap();
            self.model.add_frame(l1, id, false);
            self.model.doms.get_mut(&id).unwrap().l1 = Some(l1);
        } else {
            let p2m = &mut self.model.doms.get_mut(&id).unwrap().p2m;
            p2m.insert(Gfn(0x80), P2m::Mmio);
            assert!(
                domain
                    .private()
                    .set_physmap(Gfn(0x80), Some(P2mEntry::DirectMmio(Mfn(0xFEE00))))
            );
        }
        (0..4).for_each(|_| self.add_page(id));
        // Something to begin with: a few grants, to each of the others and to itself.
        self.set_version(id, Manner::PLAIN, limits.version);
        let frame_at = if limits.version == 2 { 8 } else { 4 };
        for (gref, grantee) in [
            (0, 1u16),
            (1, 2),
            (5, 1),
            (7, 2),
            (8, 1),
            (9, 2),
            (30, 3),
            (300, 1),
        ] {
            if gref >= self.model.doms[&id].entries() {
                continue;
            }
            let (mfn, at) = self.model.entry_at(id, gref);
            let own = self.model.own_pages(id);
            let frame = own[gref as usize % own.len()].0.0.to_le_bytes();
            let grantee = 1 + (id.0 - 1 + grantee) % 3;
            let flags = if gref == 9 { 5 } else { 1 };
            self.write_frame(mfn, at + frame_at, &frame[..4]);
            self.write_frame(mfn, at, &[flags, 0, grantee.to_le_bytes()[0], 0]);
        }
    }

    pub(crate) fn add_page(&mut self, id: DomId) {
        let page = self.there(id).private().add_page().unwrap();
        self.note(format_args!("{id} gets page {} {}", page.gfn, page.mfn));
        self.model.add_frame(page.mfn, id, false);
        if self.limits[&id].kind != DomainKind::Pv {
            self.model
                .doms
                .get_mut(&id)
                .unwrap()
                .p2m
                .insert(page.gfn, P2m::Ram(page.mfn));
        }
        let content = [page.mfn.0.to_le_bytes()[0]; 4096];
        self.write_frame(page.mfn, 0, &content);
    }

    pub(crate) fn give_up(&mut self, id: DomId, mfn: Mfn) {
        self.note(format_args!("{id} gives up {mfn}"));
        self.there(id).private().give_up(mfn);
        self.model.give_up(mfn);
    }

    /// A translated domain's page is paged out, or brought back.
    pub(crate) fn page_out(&mut self, id: DomId, gfn: Gfn, mfn: Mfn) {
        self.give_up(id, mfn);
        self.note(format_args!("{gfn} is paged out"));
        let entry = P2mEntry::PagedOut { requested: false };
        assert!(self.there(id).private().set_physmap(gfn, Some(entry)));
        self.model
            .doms
            .get_mut(&id)
            .unwrap()
            .p2m
            .insert(gfn, P2m::PagedOut);
    }

    pub(crate) fn page_in(&mut self, id: DomId, gfn: Gfn) {
        self.note(format_args!("{id}: {gfn} is paged in"));
        let page = self.there(id).private().page_in(gfn).expect("it was out");
        self.model.add_frame(page.mfn, id, false);
        self.model
            .doms
            .get_mut(&id)
            .unwrap()
            .p2m
            .insert(gfn, P2m::Ram(page.mfn));
    }

    pub(crate) fn kill(&mut self, id: DomId) {
        self.note(format_args!("kill {id}"));
        let domain = self.there(id);
        domain.private().set_dying();
        self.engine.begin_teardown(&domain);
        domain.private().drop_address_space();
        let vcpus: Vec<_> = (0..2)
            .map(|n| Vcpu::take(&domain, n).expect("it does nothing"))
            .collect();
        let mut cpu = self.engine.any_processor().unwrap();
        while let Release::More { .. } = cpu.release_mappings(&vcpus, 70) {}
        drop((vcpus, cpu));
        domain.private().give_up_memory();
        drop(domain);
        let _ = self.engine.retire(id);
        self.model.kill(id);
        self.mapped_at.retain(|(dom, _), _| *dom != id);
    }

    // --- what guests do to memory ----------------------------------------------------------------

    /// A guest writes to a frame that it can reach.
    pub(crate) fn write_frame(&mut self, mfn: Mfn, at: usize, bytes: &[u8]) {
        if bytes.len() < 100 {
            self.note(format_args!("write {mfn} + {at:#x}: {bytes:x?}"));
        }
        assert!(self.machine.page(mfn).expect("a frame in use").write(at, bytes));
        self.model.write(mfn, at, bytes);
    }

    /// A guest writes through an address: both sides must agree whether it can.
    pub(crate) fn touch(&mut self, id: DomId, addr: u64, bytes: &[u8]) {
        let at = usize::try_from(addr % 4096).unwrap();
        let dom = &self.model.doms[&id];
        let target = if dom.kind == DomainKind::Pv {
            let slot = usize::try_from((addr - LINEAR) / 4096).unwrap();
            let pte = dom.l1.map_or(0, |l1| self.model.read(l1, slot * 8, 8));
            (pte & 3 == 3).then_some(Mfn(pte >> 12 & 0xFF_FFFF_FFFF))
        } else {
            match dom.p2m.get(&Gfn(addr / 4096)) {
                Some(P2m::Ram(mfn) | P2m::Grant(mfn, true)) => Some(*mfn),
                _ => None,
            }
        };
        self.note(format_args!(
            "{id} writes {} bytes at {addr:#x}: frame {target:x?}",
            bytes.len()
        ));
        let written = self.there(id).private().write(addr, bytes);
        same("a write through a mapping", written.is_ok(), target.is_some());
        if let Some(mfn) = target {
            self.model.write(mfn, at, bytes);
        }
    }

    /// A PV guest edits an entry of its own page table: maps a page of its own, or nothing.
    pub(crate) fn own_map(&mut self, id: DomId, addr: u64, page: Option<Mfn>, writable: bool) {
        self.note(format_args!(
            "{id} itself maps {page:x?} at {addr:#x}, writable: {writable}"
        ));
        let domain = self.there(id);
        let l1 = self.model.doms[&id].l1.expect("a PV domain");
        let at = usize::try_from((addr - LINEAR) / 4096).unwrap() * 8;
        let Some(mfn) = page else {
            domain.private().unmap(addr);
            self.model.write(l1, at, &[0; 8]);
            return self.model.sweep();
        };
        let access = if writable { Access::Write } else { Access::Read };
        let done = domain.private().map(addr, Gfn(mfn.0), access);
        same("the edit of a page table", done, !(writable && mfn == l1));
        if done {
            let pte = mfn.0 << 12 | 1 | 1 << 2 | 1 << 5 | if writable { 1 << 1 | 1 << 6 } else { 0 };
            self.model.write(l1, at, &pte.to_le_bytes());
            self.model.sweep();
        }
    }

    // --- hypercalls ------------------------------------------------------------------------------

    /// A call that may come as far as its arguments, which cannot be read.
    pub(crate) fn door(&mut self, l: DomId, abi: Abi, command: u32, count: u32) {
        let args = Args {
            bytes: Mutex::default(),
            unreadable: 0..0,
            unwritable: 0..0,
        };
        let vcpu = Vcpu::take(&self.there(l), self.free_vcpu()).expect("the vCPU is free");
        let mut cpu = self.engine.any_processor().expect("a processor is free");
        let call = Call {
            command: Command(command),
            addr: ARGS,
            count,
        };
        let outcome = cpu.hypercall(&vcpu, abi, call, &args, &mut || false);
        drop((cpu, vcpu));
        let answer = self.model.door(l, abi, command, count);
        self.note(format_args!(
            "{l} calls {command:#x} {count}, {abi:?} -> {answer:?}"
        ));
        if let (Some(op), Err(errno)) = (Op::from_number(command & 0xFFF), answer) {
            self.saw(l, op, l, format!("-{}", errno.name()));
        }
        same("the door's answer", outcome, Outcome::Done(answer));
    }

    fn request<T>(op: Op, size: usize, items: &[T], encode: impl Fn(&T, &mut [u8])) -> Request {
        let mut bytes = vec![0; items.len() * size];
        for (item, bytes) in items.iter().zip(bytes.chunks_mut(size)) {
            encode(item, bytes);
        }
        bytes.extend(CANARY);
        Request {
            op,
            size,
            count: u32::try_from(items.len()).unwrap(),
            bytes,
        }
    }

    fn call(&self, l: DomId, manner: Manner, request: &Request) -> Called {
        hypercall(&self.engine, &self.there(l), manner, request)
    }

    /// Remembers an answer to `l` about the table of `about`; its own if there is no such domain.
    fn saw(&mut self, l: DomId, op: Op, about: DomId, answer: String) {
        let caller = &self.model.doms[&l];
        let kind = match caller.kind {
            DomainKind::Pv => "PV",
            DomainKind::Hvm => "HVM",
            DomainKind::Arm => "Arm",
        };
        let version = self.model.doms.get(&about).unwrap_or(caller).version;
        let seen = Seen {
            op,
            version,
            kind,
            answer,
        };
        *self.seen.entry(seen).or_default() += 1;
    }

    fn saw_status(&mut self, l: DomId, op: Op, about: DomId, status: GrantStatus) {
        self.saw(l, op, about, status_name(status));
    }

    fn saw_result<E>(
        &mut self,
        l: DomId,
        op: Op,
        about: DomId,
        result: Result<(), E>,
        name: impl Fn(E) -> String,
    ) {
        self.saw(l, op, about, result.map_or_else(name, |()| "okay".to_owned()));
    }

    /// Compares what a batch left in the guest's memory.
    fn compare(
        &mut self,
        l: DomId,
        op: Op,
        called: &Called,
        expected: &[u8],
        manner: Manner,
        statuses: &[GrantStatus],
    ) {
        if manner.trouble != Trouble::None {
            self.saw(l, op, l, "-EFAULT".to_owned());
        }
        let names: Vec<String> = statuses.iter().map(ToString::to_string).collect();
        self.note(format_args!("  -> {}", names.join(", ")));
        let result = if manner.trouble == Trouble::None {
            Ok(())
        } else {
            Err(Errno::Fault)
        };
        same("the hypercall's result", called.result, result);
        same("the arguments afterwards", &called.bytes[..], expected);
    }

    fn put_status(bytes: &mut [u8], at: usize, status: GrantStatus) {
        bytes[at..at + 2].copy_from_slice(&status.0.to_le_bytes());
    }

    pub(crate) fn map(&mut self, l: DomId, manner: Manner, items: &[MapGrantRef]) {
        self.note(format_args!("{l} maps, {manner:?}"));
        for item in items {
            let MapGrantRef {
                dom,
                gref,
                flags,
                host_addr,
                ..
            } = item;
            self.note(format_args!("  {dom} {gref} {flags} at {host_addr:#x}"));
        }
        let size = MapGrantRef::size(manner.abi);
        let request = Self::request(Op::MapGrantRef, size, items, |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        let called = self.call(l, manner, &request);
        let (executed, written) = manner.trouble.limits(items.len());
        let mut expected = request.bytes.clone();
        let mut statuses = Vec::new();
        for (index, item) in items[..executed].iter().enumerate() {
            let here = index * size..(index + 1) * size;
            let handle = if index < written {
                MapGrantRef::decode(manner.abi, &called.bytes[here.clone()])
                    .unwrap()
                    .handle
                    .0
            } else {
                self.lost_handle(l)
            };
            let mut after = *item;
            after.status = match self.model.map(l, item, handle) {
                Ok(bus) => {
                    after.handle.0 = handle;
                    after.dev_bus_addr = bus;
                    self.mapped_at.insert((l, handle), (item.host_addr, bus));
                    GrantStatus::OKAY
                }
                Err(status) => status,
            };
            self.saw_status(l, Op::MapGrantRef, item.dom, after.status);
            self.model.sweep();
            statuses.push(after.status);
            if index < written {
                after.encode(manner.abi, &mut expected[here]).unwrap();
            }
        }
        self.compare(l, request.op, &called, &expected, manner, &statuses);
    }

    /// The handle of a mapping that the guest was never told (spec 3.3: a fault on writing back).
    fn lost_handle(&self, l: DomId) -> u32 {
        let known = &self.model.doms[&l].maptrack;
        let handles: Vec<u32> = self.there(l).mappings().map(|mapping| mapping.handle.0).collect();
        handles
            .into_iter()
            .find(|handle| !known.contains_key(handle))
            .unwrap_or(u32::MAX)
    }

    pub(crate) fn unmap(
        &mut self,
        l: DomId,
        manner: Manner,
        items: &[UnmapGrantRef],
        meanwhile: Option<Meanwhile<'_>>,
    ) {
        let size = UnmapGrantRef::size(manner.abi);
        let request = Self::request(Op::UnmapGrantRef, size, items, |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        let requests: Vec<_> = items
            .iter()
            .map(|item| UnmapRequest {
                host_addr: item.host_addr,
                dev_bus_addr: item.dev_bus_addr,
                new_addr: 0,
                handle: item.handle.0,
            })
            .collect();
        self.unmap_both(l, manner, &request, &requests, meanwhile);
    }

    pub(crate) fn replace(&mut self, l: DomId, manner: Manner, items: &[UnmapAndReplace]) {
        let size = UnmapAndReplace::size(manner.abi);
        let request = Self::request(Op::UnmapAndReplace, size, items, |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        let requests: Vec<_> = items
            .iter()
            .map(|item| UnmapRequest {
                host_addr: item.host_addr,
                dev_bus_addr: 0,
                new_addr: item.new_addr,
                handle: item.handle.0,
            })
            .collect();
        self.unmap_both(l, manner, &request, &requests, None);
    }

    fn unmap_both(
        &mut self,
        l: DomId,
        manner: Manner,
        request: &Request,
        requests: &[UnmapRequest],
        meanwhile: Option<Meanwhile<'_>>,
    ) {
        self.note(format_args!("{l} {:?}, {manner:?}", request.op));
        for UnmapRequest {
            host_addr,
            dev_bus_addr,
            new_addr,
            handle,
        } in requests
        {
            self.note(format_args!(
                "  h{handle} host {host_addr:#x} bus {dev_bus_addr:#x} new {new_addr:#x}"
            ));
        }
        if request.op == Op::UnmapAndReplace && self.model.doms[&l].kind == DomainKind::Hvm {
            let called = self.call(
                l,
                Manner {
                    trouble: Trouble::None,
                    ..manner
                },
                request,
            );
            same("unmap_and_replace by HVM", called.result, Err(Errno::NoSys));
            self.saw(l, request.op, l, "-ENOSYS".to_owned());
            return same("its arguments", called.bytes, request.bytes.clone());
        }
        let (executed, written) = manner.trouble.limits(requests.len());
        let requests = &requests[..executed];
        let granter = |request: &UnmapRequest| {
            let record = self.model.doms[&l].maptrack.get(&request.handle);
            record.map_or(l, |record| record.granter)
        };
        let granters: Vec<DomId> = requests.iter().map(granter).collect();
        let (called, statuses) = self.around(
            l,
            manner,
            request,
            Hook::UnmapFlushed,
            meanwhile,
            |model, between| model.unmap(l, requests, between),
        );
        let mut expected = request.bytes.clone();
        for (index, status) in statuses[..written].iter().enumerate() {
            Self::put_status(&mut expected, index * request.size + 20, *status);
        }
        for (granter, status) in granters.into_iter().zip(&statuses) {
            self.saw_status(l, request.op, granter, *status);
        }
        let maptrack = &self.model.doms[&l].maptrack;
        self.mapped_at
            .retain(|(dom, handle), _| *dom != l || maptrack.contains_key(handle));
        self.compare(l, request.op, &called, &expected, manner, &statuses);
    }

    /// Makes a call on both sides. With a `meanwhile`, and if the model says that the call comes to
    /// `hook`, the engine's side is stopped there, where it can be, until that is done.
    fn around<T>(
        &mut self,
        l: DomId,
        manner: Manner,
        request: &Request,
        hook: Hook,
        meanwhile: Option<Meanwhile<'_>>,
        mut on_model: impl FnMut(&mut Model, &mut dyn FnMut(&mut Model)) -> T,
    ) -> (Called, T) {
        let mut comes_there = false;
        on_model(&mut self.model.clone(), &mut |_| comes_there = true);
        let Some(meanwhile) = meanwhile.filter(|_| comes_there && !self.inside) else {
            let called = self.call(l, manner, request);
            let result = on_model(&mut self.model, &mut |_| {});
            return (called, result);
        };
        let called = thread::scope(|scope| {
            // In here, so that a panic lets the caller go before it is waited for.
            let mut parked = Some(self.machine.hooks().park(hook));
            let (engine, domain) = (Arc::clone(&self.engine), self.there(l));
            let caller = scope.spawn(move || hypercall(&engine, &domain, manner, request));
            while !parked.as_ref().unwrap().arrived() && !caller.is_finished() {
                thread::yield_now();
            }
            self.in_flight = true;
            self.note(format_args!("  stopped at {hook:?}; meanwhile"));
            // The model is given to the world for as long as the engine's side stands still.
            let mut model = std::mem::take(&mut self.model);
            let result = on_model(&mut model, &mut |model| {
                std::mem::swap(&mut self.model, model);
                self.check();
                meanwhile(self);
                std::mem::swap(&mut self.model, model);
                self.note("go on");
                parked = None;
            });
            self.model = model;
            self.in_flight = false;
            (caller.join().expect("the call ends"), result)
        });
        self.machine.hooks().clear();
        called
    }

    pub(crate) fn copy(
        &mut self,
        l: DomId,
        manner: Manner,
        items: &[Copy],
        meanwhile: Option<Meanwhile<'_>>,
    ) {
        self.note(format_args!("{l} copies, {manner:?}"));
        for Copy {
            source,
            dest,
            len,
            flags,
            ..
        } in items
        {
            self.note(format_args!("  {flags}: {source:x?} -> {dest:x?}, {len}"));
        }
        let size = Copy::size(manner.abi);
        let request = Self::request(Op::Copy, size, items, |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        let (executed, written) = manner.trouble.limits(items.len());
        // Where the engine stops is its own affair; the model has to release there too.
        let restarts = if manner.yields == 0 {
            Vec::new()
        } else {
            assert!(meanwhile.is_none(), "one thing at a time");
            let called = self.call(l, manner, &request);
            let statuses = self.copy_on_model(l, &items[..executed], &called.restarts);
            self.saw_copies(l, &items[..executed], &statuses);
            return self.compare_copy(l, &called, &request, manner, &statuses, written);
        };
        let items = &items[..executed];
        let (called, statuses) = self.around(
            l,
            manner,
            &request,
            Hook::CopyMapped,
            meanwhile,
            |model, between| run_copies(model, l, items, &restarts, Some(between)),
        );
        self.saw_copies(l, items, &statuses);
        self.compare_copy(l, &called, &request, manner, &statuses, written);
    }

    fn copy_on_model(&mut self, l: DomId, items: &[Copy], restarts: &[usize]) -> Vec<GrantStatus> {
        run_copies(&mut self.model, l, items, restarts, None)
    }

    /// About the source's table if it is by grant, else the destination's.
    fn saw_copies(&mut self, l: DomId, items: &[Copy], statuses: &[GrantStatus]) {
        for (item, status) in items.iter().zip(statuses) {
            let about = if item.flags.contains(CopyFlags::SOURCE_GREF) {
                item.source.domid
            } else {
                item.dest.domid
            };
            self.saw_status(l, Op::Copy, about, *status);
        }
    }

    fn compare_copy(
        &mut self,
        l: DomId,
        called: &Called,
        request: &Request,
        manner: Manner,
        statuses: &[GrantStatus],
        written: usize,
    ) {
        let offset = if manner.abi == Abi::X86_32 { 20 } else { 36 };
        let mut expected = request.bytes.clone();
        for (index, status) in statuses[..written].iter().enumerate() {
            Self::put_status(&mut expected, index * request.size + offset, *status);
        }
        for (mfn, from, to) in std::mem::take(&mut self.model.undefined) {
            let mut bytes = vec![0; to - from];
            if let Some(page) = self.machine.page(mfn) {
                assert!(page.read(from, &mut bytes));
                self.model.write(mfn, from, &bytes);
            }
        }
        self.compare(l, request.op, called, &expected, manner, statuses);
    }

    pub(crate) fn swap(&mut self, l: DomId, manner: Manner, items: &[SwapGrantRef]) {
        self.note(format_args!("{l} swaps {items:x?}, {manner:?}"));
        let size = SwapGrantRef::size(manner.abi);
        let request = Self::request(Op::SwapGrantRef, size, items, |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        let called = self.call(l, manner, &request);
        let (executed, written) = manner.trouble.limits(items.len());
        let swaps = items[..executed].iter().map(|item| self.model.swap(l, item));
        let statuses: Vec<_> = swaps
            .map(|done| done.err().unwrap_or(GrantStatus::OKAY))
            .collect();
        for status in &statuses {
            self.saw_status(l, Op::SwapGrantRef, l, *status);
        }
        let mut expected = request.bytes.clone();
        for (index, status) in statuses[..written].iter().enumerate() {
            Self::put_status(&mut expected, index * size + 8, *status);
        }
        self.compare(l, request.op, &called, &expected, manner, &statuses);
    }

    pub(crate) fn transfer(&mut self, l: DomId, manner: Manner, item: Transfer) {
        self.note(format_args!("{l} transfers {item:x?}"));
        let size = Transfer::size(manner.abi);
        let request = Self::request(Op::Transfer, size, &[item], |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        let called = self.call(l, manner, &request);
        let refused = match self.model.doms[&l].kind {
            DomainKind::Pv => None,
            DomainKind::Hvm => Some(Errno::NoSys),
            DomainKind::Arm => Some(Errno::OpNotSupp),
        };
        if let Some(errno) = refused {
            self.saw(l, Op::Transfer, l, format!("-{}", errno.name()));
            same("a transfer by a translated domain", called.result, Err(errno));
            return same("its arguments", called.bytes, request.bytes);
        }
        let status = self.model.transfer(l, &item).err().unwrap_or(GrantStatus::OKAY);
        self.saw_status(l, Op::Transfer, item.domid, status);
        self.model.sweep();
        let mut expected = request.bytes.clone();
        Self::put_status(
            &mut expected,
            if manner.abi == Abi::X86_32 { 12 } else { 16 },
            status,
        );
        self.compare(l, request.op, &called, &expected, manner, &[status]);
    }

    /// What setup_table and get_status_frames leave: a status and a list.
    fn compare_list(
        manner: Manner,
        request: &Request,
        called: Called,
        status_at: usize,
        list: Status<Vec<u64>>,
    ) {
        let compat_setup = request.op == Op::SetupTable && manner.abi == Abi::X86_32;
        let width = if compat_setup { 4 } else { 8 };
        let mut expected = request.bytes.clone();
        Self::put_status(
            &mut expected,
            status_at,
            list.as_ref().err().copied().unwrap_or(GrantStatus::OKAY),
        );
        for (index, number) in list.into_iter().flatten().enumerate() {
            // Spec 3.1.4: what does not fit ends the list, and nobody is told.
            if compat_setup && number > u64::from(u32::MAX) {
                break;
            }
            let at = request.size + index * width;
            expected[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        same("the result", called.result, Ok(()));
        same("structure and list", called.bytes, expected);
    }

    fn call_noted(&mut self, l: DomId, manner: Manner, request: &Request, what: &dyn Debug) -> Called {
        self.note(format_args!("{l} {:?} -> {what:x?}", request.op));
        self.call(l, manner, request)
    }

    pub(crate) fn setup_table(&mut self, l: DomId, manner: Manner, dom: DomId, nr_frames: u32) {
        self.note(format_args!("{l} setup_table {dom} {nr_frames}"));
        let size = SetupTable::size(manner.abi);
        let frame_list = ARGS + size as u64;
        let item = SetupTable {
            dom,
            nr_frames,
            frame_list,
            ..SetupTable::default()
        };
        let mut request = Self::request(Op::SetupTable, size, &[item], |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        request.bytes.extend([0xEE; 128]);
        let called = self.call(l, manner, &request);
        let now = self.table_of(if dom == DomId::SELF { l } else { dom });
        let list = self.model.setup_table(l, dom, nr_frames, &now);
        self.note(format_args!("  -> {list:x?}"));
        self.saw_result(
            l,
            Op::SetupTable,
            dom,
            list.as_ref().map(drop).map_err(|e| *e),
            status_name,
        );
        self.table_frames.extend(now.shared.into_iter().chain(now.status));
        Self::compare_list(manner, &request, called, 8, list);
    }

    pub(crate) fn get_status_frames(&mut self, l: DomId, manner: Manner, dom: DomId, nr_frames: u32) {
        let size = GetStatusFrames::size(manner.abi);
        let frame_list = ARGS + size as u64;
        let item = GetStatusFrames {
            nr_frames,
            dom,
            frame_list,
            ..GetStatusFrames::default()
        };
        let mut request = Self::request(Op::GetStatusFrames, size, &[item], |item, bytes| {
            item.encode(manner.abi, bytes).unwrap();
        });
        request.bytes.extend([0xEE; 128]);
        if self.model.doms[&l].kind == DomainKind::Hvm {
            let called = self.call(l, manner, &request);
            self.saw(l, Op::GetStatusFrames, dom, "-ENOSYS".to_owned());
            return same("get_status_frames by HVM", called.result, Err(Errno::NoSys));
        }
        let list = self.model.get_status_frames(l, dom, nr_frames);
        self.saw_result(
            l,
            Op::GetStatusFrames,
            dom,
            list.as_ref().map(drop).map_err(|e| *e),
            status_name,
        );
        let called = self.call_noted(l, manner, &request, &list);
        Self::compare_list(manner, &request, called, 6, list);
    }

    pub(crate) fn query_size(&mut self, l: DomId, manner: Manner, dom: DomId) {
        let mut item = QuerySize {
            dom,
            nr_frames: 77,
            max_nr_frames: 78,
            ..QuerySize::default()
        };
        let encode = |item: &QuerySize, bytes: &mut [u8]| item.encode(manner.abi, bytes).unwrap();
        let request = Self::request(Op::QuerySize, QuerySize::size(manner.abi), &[item], encode);
        let answer = self.model.query_size(l, dom);
        self.saw_result(l, Op::QuerySize, dom, answer.map(drop), status_name);
        match answer {
            Ok((frames, max)) => (item.nr_frames, item.max_nr_frames) = (frames, max),
            Err(status) => item.status = status,
        }
        let called = self.call_noted(l, manner, &request, &item);
        let expected = Self::request(Op::QuerySize, request.size, &[item], encode).bytes;
        same("query_size", (called.result, called.bytes), (Ok(()), expected));
    }

    pub(crate) fn get_version(&mut self, l: DomId, manner: Manner, dom: DomId) {
        let mut item = GetVersion {
            dom,
            version: 99,
            ..GetVersion::default()
        };
        let encode = |item: &GetVersion, bytes: &mut [u8]| item.encode(manner.abi, bytes).unwrap();
        let request = Self::request(Op::GetVersion, GetVersion::size(manner.abi), &[item], encode);
        let answer = self.model.get_version(l, dom);
        self.saw_result(l, Op::GetVersion, dom, answer.map(drop), errno_name);
        if let Ok(version) = answer {
            item.version = version;
        }
        let called = self.call_noted(l, manner, &request, &answer);
        let expected = Self::request(Op::GetVersion, request.size, &[item], encode).bytes;
        same(
            "get_version",
            (called.result, called.bytes),
            (answer.map(drop), expected),
        );
    }

    pub(crate) fn set_version(&mut self, l: DomId, manner: Manner, version: u32) {
        let mut item = SetVersion { version };
        let encode = |item: &SetVersion, bytes: &mut [u8]| item.encode(manner.abi, bytes).unwrap();
        let request = Self::request(Op::SetVersion, SetVersion::size(manner.abi), &[item], encode);
        let called = self.call_noted(l, manner, &request, &version);
        let now = self.table_of(l);
        let answer = self.model.set_version(l, version, &now);
        self.model.sweep();
        self.note(format_args!("  -> {answer:?}"));
        self.saw_result(l, Op::SetVersion, l, answer, errno_name);
        self.table_frames.extend(now.status);
        item.version = self.model.doms[&l].version;
        let expected = Self::request(Op::SetVersion, request.size, &[item], encode).bytes;
        same("set_version", (called.result, called.bytes), (answer, expected));
    }

    /// XENMEM_add_to_physmap of a frame of a table.
    pub(crate) fn place(&mut self, l: DomId, vcpu: usize, dom: DomId, idx: u64, gfn: Gfn) {
        self.note(format_args!("{l} places {dom} {idx:#x} at {gfn}"));
        let vcpu = Vcpu::take(&self.there(l), vcpu).expect("the vCPU is free");
        let placed = self
            .engine
            .any_processor()
            .unwrap()
            .place_frame(&vcpu, dom, idx, gfn);
        let now = self.table_of(if dom == DomId::SELF { l } else { dom });
        let answer = self.model.place(l, dom, idx, gfn, &now);
        self.model.sweep();
        self.table_frames.extend(now.shared.into_iter().chain(now.status));
        self.note(format_args!("  -> {answer:?}"));
        same("add_to_physmap", placed, answer);
    }

    // --- comparing -------------------------------------------------------------------------------

    /// Everything that can be seen, on both sides, and the books.
    pub(crate) fn check(&self) {
        self.compare_all();
        self.audit();
    }

    /// Everything that can be seen, on both sides.
    pub(crate) fn compare_all(&self) {
        let there: Vec<DomId> = self.engine.domains().collect();
        let expected: Vec<DomId> = self.model.doms.keys().copied().collect();
        same("domains", there, expected);
        for (id, dom) in &self.model.doms {
            self.check_domain(*id, dom);
        }
        for (mfn, frame) in &self.model.frames {
            let info = self.machine.frame(*mfn).expect("a frame");
            same(
                format_args!("owner of {mfn}"),
                info.owner,
                PageOwner::Domain(frame.owner),
            );
            let mut bytes = [0; 4096];
            assert!(self.machine.page(*mfn).expect("a live frame").read(0, &mut bytes));
            // At once first: a fuzzer counts each comparison of a byte.
            if bytes[..] != frame.bytes[..]
                && let Some(at) = (0..4096).find(|at| bytes[*at] != frame.bytes[*at])
            {
                let near = at & !15..(at & !15) + 16;
                same(
                    format_args!("{mfn} + {:#x}", near.start),
                    &bytes[near.clone()],
                    &frame.bytes[near.clone()],
                );
            }
        }
    }

    /// The books of machine and engine. What is wrong in them stays wrong.
    pub(crate) fn audit(&self) {
        // AUD-REF, AUD-MEM, AUD-P2M.
        same(
            "the machine's books",
            self.machine.audit_against(&self.model.claims()),
            vec![],
        );
        if !self.in_flight {
            let mut found = self.machine.audit_with(&self.engine);
            // Guests here write over marks as they like; words are compared above.
            found.retain(|violation| violation.audit != Audit::Marks);
            same("the books of engine and machine", found, vec![]);
        }
    }

    fn check_domain(&self, id: DomId, dom: &spec::Dom) {
        let domain = self.there(id);
        same(
            format_args!("version of {id}"),
            domain.version().number(),
            dom.version,
        );
        let now = self.table_of(id);
        same(
            format_args!("table of {id}"),
            (now.shared, now.status),
            (dom.shared.clone(), dom.status.clone()),
        );
        // AUD-HND
        let mappings: BTreeMap<u32, spec::Record> = domain
            .mappings()
            .map(|mapping| {
                let record = spec::Record {
                    granter: mapping.granter,
                    gref: mapping.gref.0,
                    flags: mapping.flags,
                };
                (mapping.handle.0, record)
            })
            .collect();
        same(format_args!("mappings of {id}"), &mappings, &dom.maptrack);
        same(
            format_args!("crashes of {id}"),
            domain.private().crashes().len(),
            dom.crashes,
        );
        if dom.kind != DomainKind::Pv {
            self.check_physmap(id, &domain, dom);
        }
        let mut cpu = self.engine.any_processor().unwrap();
        let refs = REFS.into_iter().chain(dom.active.keys().copied());
        for gref in refs.filter(|gref| *gref < dom.entries()) {
            let view = cpu
                .entry(id, gnttab_abi::GrantRef(gref))
                .expect("inside the table");
            let used = dom.active.get(&gref);
            let pins = [
                view.pins.host_write,
                view.pins.host_read,
                view.pins.device_write,
                view.pins.device_read,
            ];
            let pins = pins.map(u32::from);
            let expected = used.map_or([0; 4], |used| used.pins);
            same(format_args!("pins of {id} {gref:#x}"), pins, expected);
            same(
                format_args!("use of {id} {gref:#x}"),
                (view.user, view.mfn),
                (used.map(|u| u.user), used.map(|u| u.mfn)),
            );
            if !self.in_flight {
                same(
                    format_args!("AUD-PIN {id} {gref:#x}"),
                    pins,
                    self.model.mapped_pins(id, gref),
                );
            }
        }
    }

    fn check_physmap(&self, id: DomId, domain: &Dom, dom: &spec::Dom) {
        let usual = [0x80..0x81, 0x100..0x118, 0x2000..0x2010, 0x9000..0x9010]
            .into_iter()
            .flatten();
        for gfn in usual.map(Gfn).chain(dom.p2m.keys().copied()) {
            let found = domain.private().physmap(gfn).map(|entry| match entry {
                P2mEntry::Ram(mfn) => P2m::Ram(mfn),
                P2mEntry::Grant(mfn, access) => P2m::Grant(mfn, access == Access::Write),
                P2mEntry::PagedOut { .. } => P2m::PagedOut,
                P2mEntry::DirectMmio(_) => P2m::Mmio,
                other => panic!("{id} has {other:?} at {gfn}"),
            });
            same(format_args!("{id} at {gfn}"), found, dom.p2m.get(&gfn).copied());
        }
    }

    /// The end: everybody dies, nothing is left (QUIESCE).
    pub(crate) fn end(&mut self) {
        for (id, dom) in &self.model.doms {
            let mut cpu = self.engine.any_processor().unwrap();
            for gref in 0..dom.entries() {
                let view = cpu
                    .entry(*id, gnttab_abi::GrantRef(gref))
                    .expect("inside the table");
                same(
                    format_args!("{id} {gref:#x} is pinned"),
                    view.pins.any(),
                    dom.active.contains_key(&gref),
                );
            }
        }
        for id in self.running() {
            self.kill(id);
            self.check();
        }
        same("domains left", self.engine.domains().count(), 0);
        same("books left", self.machine.audit_idle(), vec![]);
    }
}

type Status<T> = Result<T, GrantStatus>;

fn status_name(status: GrantStatus) -> String {
    status.name().unwrap_or("unknown").to_owned()
}

fn errno_name(errno: Errno) -> String {
    format!("-{}", errno.name())
}

fn run_copies(
    model: &mut Model,
    l: DomId,
    items: &[Copy],
    restarts: &[usize],
    mut between: Option<&mut dyn FnMut(&mut Model)>,
) -> Vec<GrantStatus> {
    let mut kept = Kept::default();
    let mut statuses = Vec::new();
    for (index, item) in items.iter().enumerate() {
        if restarts.contains(&index) {
            model.copy_end(&mut kept);
        }
        statuses.push(model.copy_item(l, item, &mut kept, &mut between));
    }
    model.copy_end(&mut kept);
    statuses
}
