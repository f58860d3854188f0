//! Domains with something granted, and the actors that use it.
//!
//! Up to two pairs of a granter and a grantee. A granter grants each of its frames to its grantee by one
//! reference; in cold scenes references lie a cache line apart, so that no two share one. Each actor is a
//! thread's part: a vCPU of a grantee, with argument pages of its own.

use std::sync::Arc;

use gnttab_abi::{
    Abi, Command, Copy, CopyFlags, CopyPtr, DomId, EntryBodyV2, EntryFlags, EntryHead, EntryV1, EntryV2,
    GrantHandle, GrantRef, MapFlags, MapGrantRef, Op, UnmapGrantRef,
};
use gnttab_engine::{
    Call, Config, Domain, DomainKind, Engine, GuestMemory as _, Limits, Outcome, Processor, Vcpu, Version,
};

use crate::flat::{Flat, FlatDomain, Guest, Memory};

/// Pages of an actor's own: its arguments, a list, then the pages that it copies into.
const MAP_PAGE: u64 = 0;
const UNMAP_PAGE: u64 = 2;
const OTHER_PAGE: u64 = 4;
const LIST_PAGE: u64 = 7;
const LOCAL_PAGE: u64 = 8;

/// Pages that an actor copies into, in turn.
pub(crate) const LOCALS: u32 = 32;

/// Pages of one actor.
const ACTOR_PAGES: u64 = LOCAL_PAGE + LOCALS as u64;

/// Actors that a scene has room for.
const ACTORS: u64 = 4;

/// The first frame that is no actor's.
pub(crate) const FIRST_FRAME: u64 = ACTORS * ACTOR_PAGES;

/// Items for which an actor's argument pages have room.
pub(crate) const SLOTS: u32 = 256;

/// Cache line over entry size.
fn stride(version: Version) -> u32 {
    if version == Version::V1 { 8 } else { 4 }
}

/// What a scene is to look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: DomainKind,
    pub(crate) version: Version,
    /// Pairs of a granter and a grantee.
    pub(crate) pairs: u16,
    /// References that each granter grants.
    pub(crate) grants: u32,
    /// Whether they lie a cache line apart.
    pub(crate) apart: bool,
}

impl Plan {
    /// One pair, so few references that they stay in the nearest caches.
    pub(crate) fn warm(version: Version) -> Plan {
        Plan {
            kind: DomainKind::Pv,
            version,
            pairs: 1,
            grants: SLOTS,
            apart: false,
        }
    }

    /// Distance of two references.
    fn stride(&self) -> u32 {
        if self.apart { stride(self.version) } else { 1 }
    }

    /// Frames of a granter's table.
    pub(crate) fn table_frames(&self) -> u32 {
        let per_frame = if self.version == Version::V1 { 512 } else { 256 };
        (FIRST_REF + self.grants * self.stride()).div_ceil(per_frame)
    }

    /// Frames of memory that the scene needs.
    pub(crate) fn memory(&self) -> usize {
        // Of both domains of a pair, with status frames.
        let tables = 2 * (self.table_frames() + self.table_frames().div_ceil(8));
        let frames = ACTORS * ACTOR_PAGES + u64::from(self.pairs) * u64::from(self.grants + tables);
        usize::try_from(frames).unwrap_or(usize::MAX)
    }
}

/// References below are reserved.
const FIRST_REF: u32 = 8;

/// See the module.
pub(crate) struct Scene<'m> {
    pub(crate) plan: Plan,
    pub(crate) memory: &'m Memory,
    pub(crate) engine: Engine<Flat<'m>>,
}

/// The granter and the grantee of a pair.
pub(crate) fn granter(pair: u16) -> DomId {
    DomId(1 + 2 * pair)
}

pub(crate) fn grantee(pair: u16) -> DomId {
    DomId(2 + 2 * pair)
}

impl<'m> Scene<'m> {
    /// Sets the scene in memory that is large enough for it.
    pub(crate) fn new(plan: Plan, memory: &'m Memory) -> Scene<'m> {
        let config = Config {
            max_grant_frames: plan.table_frames(),
            max_maptrack_frames: 1024,
            processors: 4,
            ..Config::default()
        };
        let scene = Scene {
            plan,
            memory,
            engine: Engine::new(Flat::new(memory), config),
        };
        for frame in 0..ACTORS * ACTOR_PAGES {
            let actor = u16::try_from(frame / ACTOR_PAGES).unwrap_or(0);
            scene.engine.hypervisor().give(frame, grantee(actor % plan.pairs));
        }
        for pair in 0..plan.pairs {
            scene.create(granter(pair));
            scene.create(grantee(pair));
            scene.grant_all(pair);
        }
        scene
    }

    fn create(&self, id: DomId) {
        let limits = Limits {
            vcpus: 2,
            ..Limits::default()
        };
        let places = (self.plan.grants * self.plan.stride()) as usize + 1024;
        self.engine
            .create_domain(id, self.plan.kind, limits, FlatDomain::new(id, places))
            .expect("a new domain");
    }

    pub(crate) fn domain(&self, id: DomId) -> Arc<Domain<Flat<'m>>> {
        self.engine.domain(id).expect("a domain of the scene")
    }

    pub(crate) fn vcpu(&self, id: DomId, number: usize) -> Vcpu<Flat<'m>> {
        Vcpu::take(&self.domain(id), number).expect("a vCPU that nobody has")
    }

    /// Brings a domain's table to the plan's version and a size; its frames.
    pub(crate) fn table(&self, id: DomId, frames: u32) -> Vec<u64> {
        let vcpu = self.vcpu(id, 0);
        let mut cpu = self.engine.any_processor().expect("a processor");
        cpu.set_version(&vcpu, self.plan.version.number())
            .expect("a version");
        let mut list = Vec::new();
        let status = cpu.setup_table(&vcpu, DomId::SELF, frames, None, &mut |_, gfn| {
            list.push(gfn.0);
            true
        });
        assert!(status.is_okay(), "setup_table: {status}");
        list
    }

    /// The frame that a pair's granter grants by its `index`th reference.
    pub(crate) fn frame(&self, pair: u16, index: u32) -> u64 {
        FIRST_FRAME + u64::from(pair) * u64::from(self.plan.grants) + u64::from(index)
    }

    /// The `index`th reference.
    pub(crate) fn gref(&self, index: u32) -> GrantRef {
        GrantRef(FIRST_REF + index * self.plan.stride())
    }

    fn grant_all(&self, pair: u16) {
        let frames = (0..self.plan.grants).map(|index| self.frame(pair, index));
        frames.for_each(|frame| self.engine.hypervisor().give(frame, granter(pair)));
        let table = self.table(granter(pair), self.plan.table_frames());
        let flags = EntryFlags::PERMIT_ACCESS;
        for index in 0..self.plan.grants {
            let frame = self.frame(pair, index);
            let head = EntryHead {
                flags,
                domid: grantee(pair),
            };
            self.write_entry(&table, self.gref(index), head, EntryBodyV2::FullPage { frame });
        }
    }

    /// Writes an entry, as its granter does.
    pub(crate) fn write_entry(&self, table: &[u64], gref: GrantRef, head: EntryHead, body: EntryBodyV2) {
        let at = gref.0 as usize;
        let write = |size: usize, bytes: &[u8]| {
            let page = self.memory.frame(table[at * size / 4096]).expect("a table frame");
            assert!(page.write(at * size % 4096, bytes));
        };
        match (self.plan.version, body) {
            (Version::V1, EntryBodyV2::FullPage { frame }) => {
                let frame = u32::try_from(frame).expect("a low frame");
                write(8, &EntryV1 { head, frame }.to_bytes());
            }
            (_, body) => write(16, &EntryV2::new(head, body).to_bytes()),
        }
    }

    /// The actor of that number: a vCPU of the grantee of a pair.
    pub(crate) fn actor(&self, number: u16, pair: u16, vcpu: usize) -> Actor<'_, 'm> {
        self.actor_of(number, grantee(pair), vcpu, granter(pair))
    }

    /// The actor of that number: a vCPU of a domain, and whose references it uses.
    pub(crate) fn actor_of(&self, number: u16, id: DomId, vcpu: usize, granter: DomId) -> Actor<'_, 'm> {
        let base = u64::from(number) * ACTOR_PAGES;
        Actor {
            scene: self,
            cpu: self.engine.any_processor().expect("a processor"),
            vcpu: self.vcpu(id, vcpu),
            guest: Guest::new(self.memory, base, ACTOR_PAGES),
            granter,
            base: base * 4096,
        }
    }
}

/// One thread's part in a scene.
pub(crate) struct Actor<'s, 'm> {
    pub(crate) scene: &'s Scene<'m>,
    pub(crate) cpu: Processor<'s, Flat<'m>>,
    pub(crate) vcpu: Vcpu<Flat<'m>>,
    pub(crate) guest: Guest<'m>,
    pub(crate) granter: DomId,
    base: u64,
}

impl Actor<'_, '_> {
    /// Where the argument in a slot lies.
    #[inline(always)]
    fn at(&self, op: Op, slot: u32) -> u64 {
        let page = match op {
            Op::MapGrantRef => MAP_PAGE,
            Op::UnmapGrantRef | Op::UnmapAndReplace => UNMAP_PAGE,
            _ => OTHER_PAGE,
        };
        self.base + page * 4096 + u64::from(slot) * op.arg_size(Abi::X86_64) as u64
    }

    /// The hypercall: the arguments are those in slots `first` to `first + count - 1`.
    #[inline(always)]
    pub(crate) fn call(&mut self, op: Op, first: u32, count: u32) {
        self.call_at(op, self.at(op, first), count);
    }

    #[inline(never)]
    fn call_at(&mut self, op: Op, addr: u64, count: u32) {
        let call = Call {
            command: Command::new(op),
            addr,
            count,
        };
        let outcome = self
            .cpu
            .hypercall(&self.vcpu, Abi::X86_64, call, &self.guest, &mut || false);
        assert!(outcome == Outcome::Done(Ok(())), "{op}: {outcome:?}");
    }

    /// Writes an argument.
    pub(crate) fn put(&self, op: Op, slot: u32, bytes: &[u8]) {
        self.guest
            .write(self.at(op, slot), bytes)
            .expect("the actor's own page");
    }

    /// Reads part of an argument.
    fn get<const N: usize>(&self, op: Op, slot: u32, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.guest
            .read(self.at(op, slot) + offset, &mut bytes)
            .expect("the actor's own page");
        bytes
    }

    /// Asserts that an item was done.
    pub(crate) fn assert_done(&self, op: Op, slot: u32) {
        let offset = match op {
            Op::MapGrantRef => 18,
            Op::UnmapGrantRef | Op::UnmapAndReplace => 20,
            Op::Copy => 36,
            Op::Transfer => 16,
            Op::QuerySize => 12,
            Op::SwapGrantRef | Op::SetupTable => 8,
            Op::GetStatusFrames => 6,
            _ => return,
        };
        let status = i16::from_le_bytes(self.get(op, slot, offset));
        assert_eq!(status, 0, "{op} of slot {slot} was refused");
    }

    /// Where the `index`th reference is mapped.
    pub(crate) fn place(&self, index: u32) -> u64 {
        (1 + u64::from(index) * u64::from(self.scene.plan.stride())) * 4096
    }

    /// Prepares to map the `index`th reference at `host_addr`, and to unmap it.
    pub(crate) fn prepare_pair_at(&self, slot: u32, index: u32, flags: MapFlags, host_addr: u64) {
        let map = MapGrantRef {
            host_addr,
            flags,
            gref: self.scene.gref(index),
            dom: self.granter,
            ..MapGrantRef::default()
        };
        let mut bytes = [0; MapGrantRef::size(Abi::X86_64)];
        map.encode(Abi::X86_64, &mut bytes).expect("room");
        self.put(Op::MapGrantRef, slot, &bytes);
        let unmap = UnmapGrantRef {
            host_addr,
            handle: GrantHandle(u32::MAX),
            ..UnmapGrantRef::default()
        };
        let mut bytes = [0; UnmapGrantRef::size(Abi::X86_64)];
        unmap.encode(Abi::X86_64, &mut bytes).expect("room");
        self.put(Op::UnmapGrantRef, slot, &bytes);
    }

    /// As [`Actor::prepare_pair_at`], at the reference's own place.
    pub(crate) fn prepare_pair(&self, slot: u32, index: u32, flags: MapFlags) {
        self.prepare_pair_at(slot, index, flags, self.place(index));
    }

    /// What a guest does between mapping and unmapping: it puts the handles that it was given into the
    /// arguments of its unmap.
    #[inline]
    pub(crate) fn move_handles(&self, first: u32, count: u32) {
        let mut from = self.at(Op::MapGrantRef, first) + 20;
        let mut to = self.at(Op::UnmapGrantRef, first) + 16;
        for _ in 0..count {
            self.guest.move_word(from, to).expect("the actor's own page");
            from += Op::MapGrantRef.arg_size(Abi::X86_64) as u64;
            to += Op::UnmapGrantRef.arg_size(Abi::X86_64) as u64;
        }
    }

    /// Prepares a copy of `len` bytes out of the `index`th reference's page.
    pub(crate) fn prepare_copy(&self, slot: u32, index: u32, len: u16, into_grant: bool) {
        let local = self.base / 4096 + LOCAL_PAGE + u64::from(slot % LOCALS);
        let granted = CopyPtr::grant(self.granter, self.scene.gref(index), 0);
        let own = CopyPtr::frame(local, 0);
        let copy = if into_grant {
            Copy {
                source: own,
                dest: granted,
                len,
                flags: CopyFlags::DEST_GREF,
                ..Copy::default()
            }
        } else {
            Copy {
                source: granted,
                dest: own,
                len,
                flags: CopyFlags::SOURCE_GREF,
                ..Copy::default()
            }
        };
        let mut bytes = [0; Copy::size(Abi::X86_64)];
        copy.encode(Abi::X86_64, &mut bytes).expect("room");
        self.put(Op::Copy, slot, &bytes);
    }

    /// An actor's own page, for the limits: where copies go, and `LOCALS` pages on.
    pub(crate) fn local(&self, slot: u32) -> u64 {
        self.base / 4096 + LOCAL_PAGE + u64::from(slot % LOCALS)
    }

    /// A page of the actor's own, for lists that operations write.
    pub(crate) fn list(&self) -> u64 {
        self.base + LIST_PAGE * 4096
    }

    /// Says where `unmap_and_replace` finds what takes a mapping's place; 0: an `unmap_grant_ref` again.
    pub(crate) fn prepare_replacement(&self, slot: u32, new_addr: u64) {
        let at = self.at(Op::UnmapAndReplace, slot) + 8;
        self.guest
            .write(at, &new_addr.to_le_bytes())
            .expect("the actor's own page");
    }
}
