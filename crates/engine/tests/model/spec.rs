//! The reference model: sections 2 to 6 of the specification, step by step, on plain maps.
//!
//! Written from the specification and kept stupid. There is one memory, by machine frame: grant
//! tables, status pages and page tables are bytes in it, as for the real thing. Nothing is counted
//! that can be recomputed: references are looked for wherever something holds one.
//!
//! What the specification leaves open (numbers of handles and of new frames) the model is told.

use std::collections::{BTreeMap, BTreeSet};

use gnttab_abi::{
    Abi, Copy, CopyFlags, CopyPtr, DomId, Errno, Gfn, GrantStatus, MapFlags, MapGrantRef, Mfn, SwapGrantRef,
    Transfer,
};
use gnttab_engine::DomainKind;
use gnttab_engine::machine::Justified;

/// Where a PV domain's one level-1 table maps.
pub(crate) const LINEAR: u64 = 0x4000_0000;
const LINEAR_END: u64 = LINEAR + 512 * 4096;
/// Guest frame numbers of a translated domain end here.
const GFN_END: u64 = 1 << 36;
const PAGE: usize = 4096;

const TYPE: u16 = 3;
const PERMIT: u16 = 1;
const ACCEPT: u16 = 2;
const TRANSITIVE: u16 = 3;
const READONLY: u16 = 4;
const READING: u16 = 8;
const WRITING: u16 = 0x10;
const SUB_PAGE: u16 = 0x100;

type Status<T> = Result<T, GrantStatus>;
const GENERAL: GrantStatus = GrantStatus::GENERAL_ERROR;

/// A frame that somebody has a reference on.
#[derive(Clone)]
pub(crate) struct Frame {
    pub(crate) owner: DomId,
    /// The owner has not given it up.
    allocated: bool,
    /// A page of its grant table.
    special: bool,
    pub(crate) bytes: Box<[u8; PAGE]>,
}

/// What a gfn of a translated domain stands for.
#[derive(Clone, std::marker::Copy, Debug, PartialEq, Eq)]
pub(crate) enum P2m {
    Ram(Mfn),
    Grant(Mfn, bool),
    PagedOut,
    Mmio,
}

/// Pins by kind: host write, host read, device write, device read.
pub(crate) type Pins = [u32; 4];

/// An active entry in use (spec 2.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) pins: Pins,
    pub(crate) user: DomId,
    pub(crate) mfn: Mfn,
    is_sub_page: bool,
    start: u32,
    length: u32,
    src_domid: DomId,
    trans_gref: u32,
}

impl Use {
    fn is_write_pinned(&self) -> bool {
        self.pins[0] + self.pins[2] != 0
    }

    fn is_full_for(&self, wanted: Pins) -> bool {
        self.pins
            .iter()
            .zip(wanted)
            .any(|(has, wants)| wants != 0 && *has >= 128)
    }
}

/// A live maptrack record (spec 2.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) granter: DomId,
    pub(crate) gref: u32,
    pub(crate) flags: MapFlags,
}

impl Record {
    pub(crate) fn has(&self, kind: MapFlags) -> bool {
        self.flags.contains(kind)
    }
}

#[derive(Clone)]
pub(crate) struct Dom {
    pub(crate) kind: DomainKind,
    pub(crate) control: bool,
    pub(crate) dying: bool,
    retired: bool,
    pub(crate) version: u32,
    max_version: u32,
    pub(crate) max_frames: u32,
    max_handles: usize,
    pub(crate) shared: Vec<Mfn>,
    pub(crate) status: Vec<Mfn>,
    pub(crate) active: BTreeMap<u32, Use>,
    v2_ops: u32,
    pub(crate) maptrack: BTreeMap<u32, Record>,
    pub(crate) p2m: BTreeMap<Gfn, P2m>,
    pub(crate) l1: Option<Mfn>,
    pub(crate) crashes: usize,
    /// Has an I/O MMU that follows its mappings.
    iommu: bool,
}

impl Dom {
    fn external(&self) -> bool {
        self.kind != DomainKind::Pv
    }

    fn per_page(&self) -> u32 {
        if self.version == 1 { 512 } else { 256 }
    }

    /// N(GT).
    pub(crate) fn entries(&self) -> u32 {
        u32::try_from(self.shared.len()).unwrap() * self.per_page()
    }
}

/// What an unmap's first phase removed and its second gives back.
#[derive(Clone)]
struct Removed {
    grantee: DomId,
    granter: DomId,
    gref: u32,
    mfn: Mfn,
    readonly: bool,
    host: bool,
    device: bool,
}

/// A side of a copy that is claimed.
#[derive(Clone, Debug)]
struct Buffer {
    /// Table and reference, if by grant.
    grant: Option<(DomId, u32)>,
    /// The number in the item.
    number: u64,
    mfn: Mfn,
    start: u32,
    end: u32,
    typed: bool,
}

/// What a copy keeps between items.
#[derive(Clone, Default)]
pub(crate) struct Kept {
    pair: Option<(DomId, DomId)>,
    source: Option<Buffer>,
    dest: Option<Buffer>,
}

/// What an unmap or unmap_and_replace asks for.
#[derive(Clone, std::marker::Copy)]
pub(crate) struct UnmapRequest {
    pub(crate) host_addr: u64,
    pub(crate) dev_bus_addr: u64,
    pub(crate) new_addr: u64,
    pub(crate) handle: u32,
}

/// Frames of a table as the engine has them now: the numbers are the hypervisor's choice.
pub(crate) struct TableFrames {
    pub(crate) shared: Vec<Mfn>,
    pub(crate) status: Vec<Mfn>,
}

/// The world.
#[derive(Clone, Default)]
pub(crate) struct Model {
    pub(crate) doms: BTreeMap<DomId, Dom>,
    pub(crate) frames: BTreeMap<Mfn, Frame>,
    /// References of operations that are under way, and whether they hold the writable type.
    in_flight: Vec<(Mfn, bool)>,
    /// Bytes that the specification leaves undefined (overlapping copies): frame, from, to.
    pub(crate) undefined: Vec<(Mfn, usize, usize)>,
}

/// Wanted pins of a mapping (spec 3.3 step 1).
fn pins_of_mapping(flags: MapFlags) -> Pins {
    let readonly = flags.contains(MapFlags::READONLY);
    let host = u32::from(flags.contains(MapFlags::HOST_MAP));
    let device = u32::from(flags.contains(MapFlags::DEVICE_MAP));
    if readonly {
        [0, host, 0, device]
    } else {
        [host, 0, device, 0]
    }
}

fn pins_of_copy(write: bool) -> Pins {
    if write { [1, 0, 0, 0] } else { [0, 1, 0, 0] }
}

// --- memory ------------------------------------------------------------------------------------

impl Model {
    pub(crate) fn add_frame(&mut self, mfn: Mfn, owner: DomId, special: bool) {
        let frame = Frame {
            owner,
            allocated: true,
            special,
            bytes: Box::new([0; PAGE]),
        };
        assert!(
            self.frames.insert(mfn, frame).is_none(),
            "a new frame was in use: {mfn}"
        );
    }

    pub(crate) fn read(&self, mfn: Mfn, at: usize, len: usize) -> u64 {
        let bytes = &self.frames[&mfn].bytes[at..at + len];
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub(crate) fn write(&mut self, mfn: Mfn, at: usize, bytes: &[u8]) {
        let frame = self.frames.get_mut(&mfn).expect("the frame is in use");
        frame.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn read16(&self, (mfn, at): (Mfn, usize)) -> u16 {
        u16::try_from(self.read(mfn, at, 2)).unwrap()
    }

    fn write16(&mut self, (mfn, at): (Mfn, usize), value: u16) {
        self.write(mfn, at, &value.to_le_bytes());
    }

    /// Where an entry starts.
    pub(crate) fn entry_at(&self, r: DomId, gref: u32) -> (Mfn, usize) {
        let dom = &self.doms[&r];
        let size = PAGE / dom.per_page() as usize;
        let page = dom.shared[(gref / dom.per_page()) as usize];
        (page, (gref % dom.per_page()) as usize * size)
    }

    /// Where the reading and writing marks of an entry are.
    pub(crate) fn marks_at(&self, r: DomId, gref: u32) -> (Mfn, usize) {
        let dom = &self.doms[&r];
        if dom.version == 1 {
            return self.entry_at(r, gref);
        }
        (dom.status[(gref / 2048) as usize], (gref % 2048) as usize * 2)
    }

    pub(crate) fn flags(&self, r: DomId, gref: u32) -> u16 {
        self.read16(self.entry_at(r, gref))
    }

    pub(crate) fn entry_domid(&self, r: DomId, gref: u32) -> DomId {
        let (mfn, at) = self.entry_at(r, gref);
        DomId(self.read16((mfn, at + 2)))
    }

    /// The frame of an ordinary entry.
    pub(crate) fn entry_frame(&self, r: DomId, gref: u32) -> Gfn {
        let (mfn, at) = self.entry_at(r, gref);
        Gfn(if self.doms[&r].version == 1 {
            self.read(mfn, at + 4, 4)
        } else {
            self.read(mfn, at + 8, 8)
        })
    }

    fn change_marks(&mut self, r: DomId, gref: u32, set: u16, clear: u16) {
        let at = self.marks_at(r, gref);
        let marks = self.read16(at);
        self.write16(at, (marks | set) & !clear);
    }

    /// PV: the frame of the page-table entries that exist, one for each.
    fn ptes(&self) -> impl Iterator<Item = (DomId, u64)> + '_ {
        let tables = self.doms.iter().filter_map(|(id, dom)| Some((*id, dom.l1?)));
        tables.flat_map(move |(id, l1)| {
            let (words, _) = self.frames[&l1].bytes.as_chunks::<8>();
            let all = words.iter().map(move |word| (id, u64::from_le_bytes(*word)));
            all.filter(|(_, pte)| pte & 1 != 0)
        })
    }

    /// References and types that mappings and operations hold beyond page-table entries (4.5).
    pub(crate) fn claims(&self) -> BTreeMap<Mfn, Justified> {
        let mut claims: BTreeMap<Mfn, Justified> = BTreeMap::new();
        let mut claim = |mfn: Mfn, typed: bool| {
            let claim = claims.entry(mfn).or_default();
            claim.references += 1;
            claim.types += u64::from(typed);
        };
        for (id, dom) in &self.doms {
            for record in dom.maptrack.values() {
                let mfn = self.doms[&record.granter].active[&record.gref].mfn;
                let write = !record.has(MapFlags::READONLY);
                if record.has(MapFlags::DEVICE_MAP) {
                    claim(mfn, write);
                }
                if record.has(MapFlags::HOST_MAP) && dom.external() {
                    claim(mfn, write && self.takes_type(*id, record.granter));
                }
            }
        }
        self.in_flight.iter().for_each(|(mfn, typed)| claim(*mfn, *typed));
        claims
    }

    /// Whether a writable host mapping takes the writable type (spec 3.3 step 14c).
    fn takes_type(&self, l: DomId, r: DomId) -> bool {
        self.doms[&l].kind != DomainKind::Arm && (r == l || !self.doms[&r].external())
    }

    /// Frames that the devices of a domain can reach by grant (spec 4.6).
    fn iommu_reach(&self, l: DomId) -> BTreeSet<Mfn> {
        let dom = &self.doms[&l];
        let all = if dom.iommu { Some(&dom.maptrack) } else { None };
        let foreign = all
            .into_iter()
            .flat_map(BTreeMap::values)
            .filter(|record| record.granter != l);
        foreign
            .map(|record| self.doms[&record.granter].active[&record.gref].mfn)
            .collect()
    }

    /// References on every frame, wherever something holds one.
    fn all_references(&self) -> BTreeMap<Mfn, u64> {
        let allocated = self
            .frames
            .iter()
            .map(|(mfn, frame)| (*mfn, u64::from(frame.allocated)));
        let tables = self.doms.values().filter_map(|dom| Some((dom.l1?, 1)));
        let ptes = self.ptes().map(|(_, pte)| (Mfn(pte >> 12 & 0xFF_FFFF_FFFF), 1));
        let claims = self
            .claims()
            .into_iter()
            .map(|(mfn, claim)| (mfn, claim.references));
        let devices = self
            .doms
            .keys()
            .flat_map(|id| self.iommu_reach(*id))
            .map(|mfn| (mfn, 1));
        let mut sum: BTreeMap<Mfn, u64> = BTreeMap::new();
        for (mfn, count) in allocated.chain(tables).chain(ptes).chain(claims).chain(devices) {
            *sum.entry(mfn).or_default() += count;
        }
        sum
    }

    fn references(&self, mfn: Mfn) -> u64 {
        self.all_references()[&mfn]
    }

    /// Frees what nobody references, and lets go of dead domains that nobody uses.
    pub(crate) fn sweep(&mut self) {
        let free_unused = |model: &mut Model| {
            // What its owner has not given up is referenced by that.
            if model.frames.values().all(|frame| frame.allocated) {
                return;
            }
            let references = model.all_references();
            assert!(
                references.keys().all(|mfn| model.frames.contains_key(mfn)),
                "only frames are referenced"
            );
            model.frames.retain(|mfn, _| references[mfn] != 0);
        };
        free_unused(self);
        let gone = |model: &Model| {
            let held = |id| {
                model
                    .frames
                    .values()
                    .any(|frame| frame.owner == id && !frame.special)
            };
            let mut dead = model
                .doms
                .iter()
                .filter(|(_, dom)| dom.retired && dom.active.is_empty());
            dead.find(|(id, _)| !held(**id)).map(|(id, _)| *id)
        };
        while let Some(id) = gone(self) {
            let dom = self.doms.remove(&id).unwrap();
            for mfn in dom.shared.into_iter().chain(dom.status) {
                self.frames.get_mut(&mfn).unwrap().allocated = false;
            }
            free_unused(self);
        }
    }

    /// Spec 4.2.3.
    fn can_be_written(&self, mfn: Mfn) -> bool {
        self.doms.values().all(|dom| dom.l1 != Some(mfn))
    }

    /// The gfn at which a domain knows a page as its own memory.
    fn gfn_of(&self, id: DomId, mfn: Mfn) -> Option<Gfn> {
        let p2m = &self.doms[&id].p2m;
        p2m.iter()
            .find(|(_, entry)| **entry == P2m::Ram(mfn))
            .map(|(gfn, _)| *gfn)
    }

    /// Spec 3.1.1, and what each operation says of its count, for arguments that cannot be read.
    pub(crate) fn door(&self, l: DomId, abi: Abi, command: u32, count: u32) -> Result<(), Errno> {
        let kind = self.doms[&l].kind;
        let is_negative = count >> 31 != 0;
        let (number, opaque) = (command & 0xFFF, command & !0xFFF);
        if kind == DomainKind::Hvm && ![0, 1, 2, 5, 6, 8, 10, 11].contains(&command) {
            return Err(Errno::NoSys);
        }
        if abi == Abi::X86_32 && [2, 4, 5, 9].contains(&command) {
            return match count {
                _ if is_negative => Err(Errno::Inval),
                0 => Ok(()),
                2.. if command == 2 || command == 9 => Err(Errno::Inval),
                _ => Err(Errno::Fault),
            };
        }
        if is_negative || number != 12 && opaque != 0 {
            return Err(Errno::Inval);
        }
        match number {
            12 if kind != DomainKind::Arm => Err(Errno::NoSys),
            13.. => Err(Errno::NoSys),
            4 if kind != DomainKind::Pv => Err(Errno::OpNotSupp),
            2 | 3 | 6 | 9 if count != 1 => Err(Errno::Inval),
            0 | 1 | 4 | 5 | 7 | 11 | 12 if count == 0 => Ok(()),
            _ => Err(Errno::Fault),
        }
    }

    /// Spec 4.2.
    fn resolve(&self, d: DomId, gfn: Gfn) -> Status<Mfn> {
        let own = |mfn: Mfn| match self.frames.get(&mfn) {
            Some(frame) if frame.owner == d => Ok(mfn),
            _ => Err(GrantStatus::BAD_PAGE),
        };
        let dom = &self.doms[&d];
        if dom.kind == DomainKind::Pv {
            return own(Mfn(gfn.0));
        }
        match dom.p2m.get(&gfn) {
            Some(P2m::Ram(mfn)) => own(*mfn),
            Some(P2m::PagedOut) => Err(GrantStatus::EAGAIN),
            Some(P2m::Grant(mfn, _)) if dom.kind == DomainKind::Arm => own(*mfn),
            Some(P2m::Grant(..) | P2m::Mmio) | None => Err(GrantStatus::BAD_PAGE),
        }
    }

    /// lookup: any domain that is not gone, by number (spec 1.1).
    fn lookup(&self, id: DomId) -> Option<DomId> {
        self.doms.contains_key(&id).then_some(id)
    }

    fn lookup_any(&self, l: DomId, id: DomId) -> Option<DomId> {
        self.lookup(if id == DomId::SELF { l } else { id })
    }

    /// The default policy's setup and query (spec 3.2).
    fn may_manage(&self, l: DomId, d: DomId) -> bool {
        l == d || self.doms[&l].control
    }
}

// --- building blocks ---------------------------------------------------------------------------

impl Model {
    /// Spec 4.1.
    fn begin_use(&mut self, r: DomId, gref: u32, user: DomId, write: bool, copying: bool) -> Result<(), ()> {
        let mask = if copying { TYPE } else { TYPE | SUB_PAGE };
        let pinned = self.doms[&r].active.contains_key(&gref);
        let flags = self.flags(r, gref);
        let version2 = self.doms[&r].version == 2;
        let accepted = flags & mask == PERMIT || (version2 && copying && flags & mask == TRANSITIVE);
        if !pinned && (!accepted || self.entry_domid(r, gref) != user) {
            return Err(());
        }
        if write && flags & READONLY != 0 {
            return Err(());
        }
        self.change_marks(r, gref, if write { READING | WRITING } else { READING }, 0);
        Ok(())
    }

    /// Spec 4.3.
    fn end_use(&mut self, r: DomId, gref: u32, readonly: bool) {
        let used = self.doms[&r].active.get(&gref);
        let mut mask = 0;
        if used.is_none() {
            mask |= READING;
        }
        if !readonly && !used.is_some_and(Use::is_write_pinned) {
            mask |= WRITING;
        }
        self.change_marks(r, gref, 0, mask);
    }

    fn raise(&mut self, r: DomId, gref: u32, pins: Pins) {
        let used = self.doms.get_mut(&r).unwrap().active.get_mut(&gref).unwrap();
        used.pins
            .iter_mut()
            .zip(pins)
            .for_each(|(has, more)| *has += more);
    }

    /// Lowers pins. An entry without any is not in use; what it was in use for comes back.
    fn lower(&mut self, r: DomId, gref: u32, pins: Pins) -> Option<Use> {
        let active = &mut self.doms.get_mut(&r).unwrap().active;
        let used = active.get_mut(&gref).expect("PIN-1: what is lowered is there");
        for (has, less) in used.pins.iter_mut().zip(pins) {
            *has = has.checked_sub(less).expect("PIN-1: no pin is lowered twice");
        }
        if used.pins == [0; 4] {
            active.remove(&gref)
        } else {
            None
        }
    }

    fn whole(r: DomId, gref: u32, user: DomId, mfn: Mfn) -> Use {
        Use {
            pins: [0; 4],
            user,
            mfn,
            is_sub_page: false,
            start: 0,
            length: 4096,
            src_domid: r,
            trans_gref: gref,
        }
    }

    fn pte_of_grant(mfn: Mfn, flags: MapFlags) -> u64 {
        let mut pte = mfn.0 << 12 | 1 | 1 << 5 | 1 << 6 | 1 << 63;
        if !flags.contains(MapFlags::READONLY) {
            pte |= 1 << 1;
        }
        // User, and global for an application or the mark of a guest kernel's page.
        pte |= 1 << 2;
        pte |= if flags.contains(MapFlags::APPLICATION_MAP) {
            1 << 8
        } else {
            1 << 52
        };
        pte | u64::from(flags.bits() >> 16 & 7) << 9
    }

    /// PV: the slot that an address names (spec 4.4.1 create steps 2 and 3), as place in the table.
    fn pv_slot(&self, l: DomId, addr: u64, flags: MapFlags) -> Result<(Mfn, usize), ()> {
        let l1 = self.doms[&l].l1.ok_or(())?;
        if flags.contains(MapFlags::CONTAINS_PTE) {
            let fits = addr.is_multiple_of(8) && addr / 4096 == l1.0;
            return if fits {
                Ok((l1, usize::try_from(addr % 4096).unwrap()))
            } else {
                Err(())
            };
        }
        if !(LINEAR..LINEAR_END).contains(&addr) {
            return Err(());
        }
        Ok((l1, usize::try_from((addr - LINEAR) / 4096).unwrap() * 8))
    }

    /// Spec 4.4, create. Cache bits are 0: all frames are RAM.
    fn create(&mut self, l: DomId, addr: u64, mfn: Mfn, flags: MapFlags) -> Result<(), ()> {
        let kind = self.doms[&l].kind;
        if kind == DomainKind::Pv {
            let (l1, at) = self.pv_slot(l, addr, flags)?;
            self.write(l1, at, &Self::pte_of_grant(mfn, flags).to_le_bytes());
            return Ok(());
        }
        let gfn = Gfn(addr / 4096);
        if flags - MapFlags::READONLY != MapFlags::HOST_MAP || gfn.0 >= GFN_END {
            return Err(());
        }
        let own_at = self.gfn_of(l, mfn);
        let dom = self.doms.get_mut(&l).unwrap();
        if kind == DomainKind::Hvm {
            if let Some(P2m::Grant(..) | P2m::Mmio) = dom.p2m.get(&gfn) {
                dom.crashes += 1;
                return Err(());
            }
            if let Some(own_at) = own_at {
                dom.p2m.remove(&own_at);
            }
        } else if dom.dying {
            return Err(());
        }
        dom.p2m
            .insert(gfn, P2m::Grant(mfn, !flags.contains(MapFlags::READONLY)));
        Ok(())
    }

    /// Spec 4.4, remove/replace.
    fn remove(&mut self, l: DomId, addr: u64, mfn: Mfn, new_addr: u64, flags: MapFlags) -> Result<(), ()> {
        if self.doms[&l].kind == DomainKind::Pv {
            return self.pv_remove(l, addr, mfn, new_addr, flags);
        }
        if new_addr != 0 || flags.contains(MapFlags::CONTAINS_PTE) {
            return Err(());
        }
        let p2m = &mut self.doms.get_mut(&l).unwrap().p2m;
        match p2m.get(&Gfn(addr / 4096)) {
            Some(P2m::Grant(found, _)) if *found == mfn => {
                p2m.remove(&Gfn(addr / 4096));
                Ok(())
            }
            _ => Err(()),
        }
    }

    fn pv_remove(&mut self, l: DomId, addr: u64, mfn: Mfn, new_addr: u64, flags: MapFlags) -> Result<(), ()> {
        if flags.contains(MapFlags::CONTAINS_PTE) && new_addr != 0 {
            return Err(());
        }
        let mut moved = 0;
        if new_addr != 0 {
            let (l1, at) = self.pv_slot(l, new_addr, MapFlags::empty())?;
            moved = self.read(l1, at, 8);
            self.write(l1, at, &[0; 8]);
        }
        // From here on a failure destroys what was taken from `new_addr`: it is nowhere any more.
        let (l1, at) = self.pv_slot(l, addr, flags)?;
        let found = self.read(l1, at, 8);
        let writable = u64::from(!flags.contains(MapFlags::READONLY));
        if found & 1 == 0 || found >> 12 & 0xFF_FFFF_FFFF != mfn.0 || found >> 1 & 1 != writable {
            return Err(());
        }
        self.write(l1, at, &moved.to_le_bytes());
        Ok(())
    }
}

// --- map and unmap -----------------------------------------------------------------------------

impl Model {
    /// Spec 3.3. `handle` is the engine's choice, used on success. Returns the bus address.
    pub(crate) fn map(&mut self, l: DomId, item: &MapGrantRef, handle: u32) -> Status<u64> {
        let flags = item.flags;
        // 1
        let wanted = pins_of_mapping(flags);
        if wanted == [0; 4] {
            return Err(GrantStatus::BAD_GNTREF);
        }
        // 2
        let pv_only = MapFlags::DEVICE_MAP | MapFlags::APPLICATION_MAP | MapFlags::CONTAINS_PTE;
        if self.doms[&l].external() && flags.intersects(pv_only) {
            return Err(GENERAL);
        }
        // 3, 4: the default policy lets everybody
        let r = self.lookup(item.dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        // 5
        if self.doms[&l].maptrack.len() >= self.doms[&l].max_handles {
            return Err(GrantStatus::NO_SPACE);
        }
        // 6
        let gref = item.gref.0;
        if gref >= self.doms[&r].entries() {
            return Err(GrantStatus::BAD_GNTREF);
        }
        // 7
        let write = !flags.contains(MapFlags::READONLY);
        let used = self.doms[&r].active.get(&gref).cloned();
        if let Some(used) = &used
            && (used.user != l || used.is_full_for(wanted) || used.is_sub_page)
        {
            return Err(GENERAL);
        }
        // 8
        if used.as_ref().is_none_or(|used| write && !used.is_write_pinned()) {
            self.begin_use(r, gref, l, write, false).map_err(|()| GENERAL)?;
        }
        // 9
        if used.is_none() {
            match self.resolve(r, self.entry_frame(r, gref)) {
                Ok(mfn) => {
                    let active = &mut self.doms.get_mut(&r).unwrap().active;
                    active.insert(gref, Self::whole(r, gref, l, mfn));
                }
                Err(status) => {
                    self.end_use(r, gref, !write);
                    return Err(status);
                }
            }
        }
        // 10
        self.raise(r, gref, wanted);
        let mfn = self.doms[&r].active[&gref].mfn;
        // 12 to 16
        if self.install(l, r, mfn, item).is_err() {
            self.lower(r, gref, wanted);
            self.end_use(r, gref, !write);
            return Err(GENERAL);
        }
        // 17
        let record = Record {
            granter: r,
            gref,
            flags: flags & MapFlags::from_bits_retain(0x7FFF),
        };
        let old = self.doms.get_mut(&l).unwrap().maptrack.insert(handle, record);
        assert_eq!(old, None, "HND-1: handle {handle} of {l} was given out twice");
        Ok(mfn.0 * 4096)
    }

    fn install(&mut self, l: DomId, r: DomId, mfn: Mfn, item: &MapGrantRef) -> Result<(), ()> {
        // 12, 15: a stuck handle's frame may be anybody's by now
        if self.frames.get(&mfn).is_none_or(|frame| frame.owner != r) {
            return Err(());
        }
        let write = !item.flags.contains(MapFlags::READONLY);
        let host = item.flags.contains(MapFlags::HOST_MAP);
        // 14a, 14c
        let typed = item.flags.contains(MapFlags::DEVICE_MAP) || self.takes_type(l, r);
        if write && typed && !self.can_be_written(mfn) {
            return Err(());
        }
        // 14d
        if host {
            self.create(l, item.host_addr, mfn, item.flags)?;
        }
        Ok(())
    }

    /// Spec 3.4.2. What was removed is in flight until [`Model::unmap_second`].
    fn unmap_first(&mut self, l: DomId, request: &UnmapRequest) -> (GrantStatus, Option<Removed>) {
        let refuse = |status| (status, None);
        // 1, 2
        let Some(record) = self.doms[&l].maptrack.get(&request.handle).cloned() else {
            return refuse(GrantStatus::BAD_HANDLE);
        };
        // 3 to 6 cannot fail here
        let mfn = self.doms[&record.granter].active[&record.gref].mfn;
        // 7
        let bus = request.dev_bus_addr;
        if bus != 0 && record.has(MapFlags::DEVICE_MAP) && bus != mfn.0 * 4096 {
            return refuse(GrantStatus::BAD_DEV_ADDR);
        }
        // 8
        let host = request.host_addr != 0 && record.has(MapFlags::HOST_MAP);
        let new_addr = request.new_addr;
        if host
            && self
                .remove(l, request.host_addr, mfn, new_addr, record.flags)
                .is_err()
        {
            return refuse(GENERAL);
        }
        // 9
        let device = bus != 0 && record.has(MapFlags::DEVICE_MAP);
        // 10
        let maptrack = &mut self.doms.get_mut(&l).unwrap().maptrack;
        let left = maptrack.get_mut(&request.handle).unwrap();
        left.flags
            .set(MapFlags::HOST_MAP, record.has(MapFlags::HOST_MAP) && !host);
        left.flags
            .set(MapFlags::DEVICE_MAP, record.has(MapFlags::DEVICE_MAP) && !device);
        if !left.flags.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
            maptrack.remove(&request.handle);
        }
        let removed = Removed {
            grantee: l,
            granter: record.granter,
            gref: record.gref,
            mfn,
            readonly: record.has(MapFlags::READONLY),
            host,
            device,
        };
        self.in_flight.extend(self.held_for(&removed));
        (GrantStatus::OKAY, (host || device).then_some(removed))
    }

    /// References and types that phase 2 drops.
    fn held_for(&self, removed: &Removed) -> Vec<(Mfn, bool)> {
        let write = !removed.readonly;
        let typed = write && self.takes_type(removed.grantee, removed.granter);
        let host = removed.host.then_some((removed.mfn, typed));
        let device = removed.device.then_some((removed.mfn, write));
        host.into_iter().chain(device).collect()
    }

    fn let_go(&mut self, held: (Mfn, bool)) {
        let place = self.in_flight.iter().position(|flight| *flight == held);
        self.in_flight
            .swap_remove(place.expect("what is let go was held"));
    }

    /// Spec 3.4.3.
    fn unmap_second(&mut self, removed: Removed) {
        for held in self.held_for(&removed) {
            self.let_go(held);
        }
        let mut flags = MapFlags::empty();
        flags.set(MapFlags::HOST_MAP, removed.host);
        flags.set(MapFlags::DEVICE_MAP, removed.device);
        flags.set(MapFlags::READONLY, removed.readonly);
        self.lower(removed.granter, removed.gref, pins_of_mapping(flags));
        self.end_use(removed.granter, removed.gref, removed.readonly);
        self.sweep();
    }

    /// Spec 3.4.1, for as many items as are read before one faults: statuses of those. `between`
    /// runs after the first phase of the first group that removes anything.
    pub(crate) fn unmap(
        &mut self,
        l: DomId,
        requests: &[UnmapRequest],
        between: &mut dyn FnMut(&mut Model),
    ) -> Vec<GrantStatus> {
        let mut between = Some(between);
        let mut statuses = Vec::new();
        for group in requests.chunks(32) {
            let mut all = Vec::new();
            for request in group {
                let (status, removed) = self.unmap_first(l, request);
                statuses.push(status);
                all.extend(removed);
                self.sweep();
            }
            if !all.is_empty()
                && let Some(between) = between.take()
            {
                between(self);
            }
            all.into_iter().for_each(|removed| self.unmap_second(removed));
        }
        statuses
    }
}

// --- copy --------------------------------------------------------------------------------------

/// How an attempt to use an entry ended other than well.
enum Failed {
    Status(GrantStatus),
    /// Spec 5.6.
    Restart,
}

impl From<GrantStatus> for Failed {
    fn from(status: GrantStatus) -> Failed {
        Failed::Status(status)
    }
}

/// Frame and range.
type Grip = (Mfn, u32, u32);

impl Model {
    /// Spec 5.4. Nothing changes while the model runs, so that a restart would go on for ever: it
    /// is *general_error* (D-4).
    fn acquire(&mut self, r: DomId, gref: u32, user: DomId, write: bool, transitive: bool) -> Status<Grip> {
        match self.acquire_once(r, gref, user, write, transitive) {
            Ok(grip) => Ok(grip),
            Err(Failed::Status(status)) => Err(status),
            Err(Failed::Restart) => Err(GENERAL),
        }
    }

    fn acquire_once(
        &mut self,
        r: DomId,
        gref: u32,
        user: DomId,
        write: bool,
        transitive: bool,
    ) -> Result<Grip, Failed> {
        // 1
        if gref >= self.doms[&r].entries() {
            return Err(GrantStatus::BAD_GNTREF.into());
        }
        // 2
        let wanted = pins_of_copy(write);
        let used = self.doms[&r].active.get(&gref).cloned();
        if let Some(used) = &used
            && (used.user != user || used.is_full_for(wanted))
        {
            return Err(GENERAL.into());
        }
        // 3
        let version2 = self.doms[&r].version == 2;
        if version2 && self.flags(r, gref) & TYPE == TRANSITIVE {
            return self.acquire_far(r, gref, user, write, transitive, used);
        }
        let suffices = used.as_ref().is_some_and(|used| !write || used.is_write_pinned());
        if let (true, Some(used)) = (suffices, &used) {
            // 5
            let owner = self.frames.get(&used.mfn).map(|frame| frame.owner);
            if owner != Some(r) || self.doms[&r].dying {
                self.end_use(r, gref, !write);
                return Err(GrantStatus::BAD_DOMAIN.into());
            }
        } else {
            // 4
            self.begin_use(r, gref, user, write, true).map_err(|()| GENERAL)?;
            let is_sub_page = version2 && self.flags(r, gref) & SUB_PAGE != 0;
            let (mut start, mut length) = (0, 4096);
            if is_sub_page {
                let (mfn, at) = self.entry_at(r, gref);
                start = u32::from(self.read16((mfn, at + 4)));
                length = u32::from(self.read16((mfn, at + 6)));
            }
            let mfn = match self.resolve(r, self.entry_frame(r, gref)) {
                Ok(mfn) => mfn,
                Err(status) => {
                    self.end_use(r, gref, !write);
                    return Err(status.into());
                }
            };
            if let Some(used) = used {
                let same_part = is_sub_page && (start, length) == (used.start, used.length);
                let same = used.mfn == mfn
                    && used.src_domid == r
                    && used.trans_gref == gref
                    && (!used.is_sub_page || same_part);
                if !same {
                    self.end_use(r, gref, !write);
                    return Err(GENERAL.into());
                }
            } else {
                let dom = self.doms.get_mut(&r).unwrap();
                // Only 15 bits are kept, so that an upgrade never finds a larger offset unchanged.
                let start = start & 0x7FFF;
                let used = Use {
                    is_sub_page,
                    start,
                    length,
                    ..Self::whole(r, gref, user, mfn)
                };
                dom.active.insert(gref, used);
                dom.v2_ops += u32::from(is_sub_page);
            }
        }
        // 6
        self.raise(r, gref, wanted);
        let used = &self.doms[&r].active[&gref];
        Ok((used.mfn, used.start, used.start + used.length))
    }

    /// Spec 5.4 step 7.
    fn acquire_far(
        &mut self,
        r: DomId,
        gref: u32,
        user: DomId,
        write: bool,
        transitive: bool,
        used: Option<Use>,
    ) -> Result<Grip, Failed> {
        // a
        if used.as_ref().is_none_or(|used| write && !used.is_write_pinned()) {
            self.begin_use(r, gref, user, write, true).map_err(|()| GENERAL)?;
        }
        // b, c, d
        let (mfn, at) = self.entry_at(r, gref);
        let trans_domid = DomId(self.read16((mfn, at + 4)));
        let far_gref = u32::try_from(self.read(mfn, at + 8, 4)).unwrap();
        let far = self.lookup(trans_domid).filter(|far| transitive && *far != r);
        let Some(t) = far else {
            self.end_use(r, gref, !write);
            return Err(GENERAL.into());
        };
        // e
        let (mfn, start, end) = match self.acquire(t, far_gref, r, write, false) {
            Ok(grip) => grip,
            Err(status) => {
                self.end_use(r, gref, !write);
                return Err(status.into());
            }
        };
        // f: version and pins cannot have changed
        if let Some(used) = &used {
            let same = used.is_sub_page
                && (used.mfn, used.start, used.length) == (mfn, start, end - start)
                && (used.src_domid, used.trans_gref) == (t, far_gref);
            if !same {
                self.release(t, far_gref, write);
                self.end_use(r, gref, !write);
                return Err(Failed::Restart);
            }
        } else {
            // g
            let dom = self.doms.get_mut(&r).unwrap();
            let used = Use {
                is_sub_page: true,
                start,
                length: end - start,
                src_domid: t,
                trans_gref: far_gref,
                ..Self::whole(r, gref, user, mfn)
            };
            dom.active.insert(gref, used);
            dom.v2_ops += 1;
        }
        // 6
        self.raise(r, gref, pins_of_copy(write));
        Ok((mfn, start, end))
    }

    /// Spec 5.5.
    fn release(&mut self, r: DomId, gref: u32, write: bool) {
        let used = self.doms[&r].active[&gref].clone();
        let last = self.lower(r, gref, pins_of_copy(write)).is_some();
        self.end_use(r, gref, !write);
        if last && used.is_sub_page {
            self.doms.get_mut(&r).unwrap().v2_ops -= 1;
        }
        if used.src_domid != r {
            self.release(used.src_domid, used.trans_gref, write);
        }
    }

    fn drop_buffer(&mut self, buffer: Option<Buffer>, write: bool) {
        let Some(buffer) = buffer else { return };
        if let Some((r, gref)) = buffer.grant {
            self.release(r, gref, write);
        }
        self.let_go((buffer.mfn, buffer.typed));
        self.sweep();
    }

    fn drop_buffers(&mut self, kept: &mut Kept) {
        self.drop_buffer(kept.source.take(), false);
        self.drop_buffer(kept.dest.take(), true);
    }

    /// The end of a call, or of the part of it before a restart.
    pub(crate) fn copy_end(&mut self, kept: &mut Kept) {
        self.drop_buffers(kept);
        kept.pair = None;
    }

    /// Spec 5.2 for one item. `between` runs once, where both buffers are held.
    pub(crate) fn copy_item(
        &mut self,
        l: DomId,
        item: &Copy,
        kept: &mut Kept,
        between: &mut Option<&mut dyn FnMut(&mut Model)>,
    ) -> GrantStatus {
        // 0
        if item.len == 0 {
            return GrantStatus::OKAY;
        }
        match self.copy_one(l, item, kept, between) {
            Ok(()) => GrantStatus::OKAY,
            Err(status) => {
                self.drop_buffers(kept);
                status
            }
        }
    }

    fn copy_one(
        &mut self,
        l: DomId,
        item: &Copy,
        kept: &mut Kept,
        between: &mut Option<&mut dyn FnMut(&mut Model)>,
    ) -> Status<()> {
        // 1
        let pair = (item.source.domid, item.dest.domid);
        if kept.pair.is_some_and(|kept| kept != pair) {
            self.copy_end(kept);
        }
        for side in [item.source, item.dest] {
            if self.lookup_any(l, side.domid).is_none() {
                self.copy_end(kept);
                return Err(GrantStatus::BAD_DOMAIN);
            }
        }
        kept.pair = Some(pair);
        // 2, 3: with the by-frame test of steps 1a and 1b where a real Xen 4.17 was seen to make it
        let by_grant = |flag| item.flags.contains(flag);
        let own = |side: CopyPtr, flag| {
            if by_grant(flag) || side.domid == DomId::SELF {
                Ok(())
            } else {
                Err(GrantStatus::PERMISSION_DENIED)
            }
        };
        let flag = CopyFlags::SOURCE_GREF;
        own(item.source, flag)?;
        kept.source = Some(self.claim(l, kept.source.take(), item.source, by_grant(flag), false)?);
        let flag = CopyFlags::DEST_GREF;
        own(item.dest, flag)?;
        kept.dest = Some(self.claim(l, kept.dest.take(), item.dest, by_grant(flag), true)?);
        let (Some(source), Some(dest)) = (kept.source.clone(), kept.dest.clone()) else {
            unreachable!()
        };
        // 4
        let len = u32::from(item.len);
        let end = |side: CopyPtr| u32::from(side.offset) + len;
        if end(item.source) > 4096 || end(item.dest) > 4096 {
            return Err(GrantStatus::BAD_COPY_ARG);
        }
        // 5, 6
        let within = |side: CopyPtr, buffer: &Buffer| {
            u32::from(side.offset) >= buffer.start && end(side) <= buffer.end
        };
        if !within(item.source, &source) || !within(item.dest, &dest) {
            return Err(GENERAL);
        }
        // 7
        if let Some(between) = between.take() {
            between(self);
        }
        let (from, to, len) = (
            usize::from(item.source.offset),
            usize::from(item.dest.offset),
            usize::from(item.len),
        );
        let bytes = self.frames[&source.mfn].bytes[from..from + len].to_vec();
        self.write(dest.mfn, to, &bytes);
        if source.mfn == dest.mfn && from.abs_diff(to) < len {
            self.undefined.push((dest.mfn, to, to + len));
        }
        Ok(())
    }

    /// Spec 5.2 steps 2 and 3, 5.3.
    fn claim(
        &mut self,
        l: DomId,
        kept: Option<Buffer>,
        side: CopyPtr,
        by_grant: bool,
        write: bool,
    ) -> Status<Buffer> {
        let number = if by_grant {
            u64::from(side.gref().0)
        } else {
            side.u
        };
        if let Some(kept) = kept {
            if kept.grant.is_some() == by_grant && kept.number == number {
                return Ok(kept);
            }
            self.drop_buffer(Some(kept), write);
        }
        let r = self.lookup_any(l, side.domid).ok_or(GrantStatus::BAD_DOMAIN)?;
        let grant = by_grant.then_some((r, side.gref().0));
        let (mfn, start, end) = match grant {
            Some((r, gref)) => self.acquire(r, gref, l, write, true)?,
            None => (self.resolve(l, Gfn(side.u))?, 0, 4096),
        };
        let mut buffer = Buffer {
            grant,
            number,
            mfn,
            start,
            end,
            typed: false,
        };
        self.in_flight.push((mfn, false));
        if write {
            if !self.can_be_written(mfn) {
                self.drop_buffer(Some(buffer), write);
                return Err(GENERAL);
            }
            self.let_go((mfn, false));
            // Arm frames have no types to hold.
            let owner = self.frames[&mfn].owner;
            buffer.typed = self.doms[&owner].kind != DomainKind::Arm;
            self.in_flight.push((mfn, buffer.typed));
        }
        Ok(buffer)
    }
}

// --- the table ---------------------------------------------------------------------------------

impl Model {
    fn grow(&mut self, d: DomId, frames: u32, now: &TableFrames) {
        let dom = self.doms.get_mut(&d).unwrap();
        let status = if dom.version == 2 { frames.div_ceil(8) } else { 0 };
        let (had, had_status) = (dom.shared.len(), dom.status.len());
        assert_eq!(
            now.shared.len(),
            frames as usize,
            "the table has as many frames as it should"
        );
        assert_eq!(now.status.len(), status as usize, "and as many status frames");
        assert_eq!(dom.shared, now.shared[..had], "growth moves no frame");
        assert_eq!(
            dom.status,
            now.status[..had_status],
            "growth moves no status frame"
        );
        dom.shared.clone_from(&now.shared);
        dom.status.clone_from(&now.status);
        for mfn in now.shared[had..].iter().chain(&now.status[had_status..]) {
            self.add_frame(*mfn, d, true);
        }
    }

    /// What a domain sees a page of its table at.
    fn seen_at(&self, d: DomId, mfn: Mfn) -> u64 {
        if self.doms[&d].external() {
            self.gfn_of(d, mfn).map_or(u64::MAX, |gfn| gfn.0)
        } else {
            mfn.0
        }
    }

    /// Spec 3.5 steps 4 to 9.
    pub(crate) fn setup_table(
        &mut self,
        l: DomId,
        dom: DomId,
        frames: u32,
        now: &TableFrames,
    ) -> Status<Vec<u64>> {
        let d = self.lookup_any(l, dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !self.may_manage(l, d) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        if frames > self.doms[&d].max_frames {
            return Err(GENERAL);
        }
        if frames as usize > self.doms[&d].shared.len() {
            self.grow(d, frames, now);
        }
        let shared = &self.doms[&d].shared[..frames as usize];
        Ok(shared.iter().map(|mfn| self.seen_at(d, *mfn)).collect())
    }

    /// Spec 3.10 steps 4 to 7.
    pub(crate) fn get_status_frames(&self, l: DomId, dom: DomId, frames: u32) -> Status<Vec<u64>> {
        let d = self.lookup_any(l, dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !self.may_manage(l, d) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        let status = self.doms[&d].status.get(..frames as usize).ok_or(GENERAL)?;
        Ok(status.iter().map(|mfn| self.seen_at(d, *mfn)).collect())
    }

    /// Spec 3.6.
    pub(crate) fn query_size(&self, l: DomId, dom: DomId) -> Status<(u32, u32)> {
        let d = self.lookup_any(l, dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !self.may_manage(l, d) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        let dom = &self.doms[&d];
        Ok((u32::try_from(dom.shared.len()).unwrap(), dom.max_frames))
    }

    /// Spec 3.11.
    pub(crate) fn get_version(&self, l: DomId, dom: DomId) -> Result<u32, Errno> {
        let d = self.lookup_any(l, dom).ok_or(Errno::Srch)?;
        if !self.may_manage(l, d) {
            return Err(Errno::Perm);
        }
        Ok(self.doms[&d].version)
    }

    /// Spec 3.9.
    pub(crate) fn set_version(&mut self, l: DomId, version: u32, now: &TableFrames) -> Result<(), Errno> {
        let dom = &self.doms[&l];
        // 2, 3, 4
        if version != 1 && version != 2 {
            return Err(Errno::Inval);
        }
        if version > dom.max_version {
            return Err(Errno::NoSys);
        }
        if version == dom.version {
            return Ok(());
        }
        // 5
        if dom.active.keys().any(|gref| *gref >= 8) {
            return Err(Errno::Busy);
        }
        // 6
        if version == 1 && dom.v2_ops != 0 {
            return Err(Errno::Again);
        }
        if version == 1 {
            for gref in 0..8 {
                let kind = self.flags(l, gref) & TYPE;
                let wide = kind == PERMIT && self.entry_frame(l, gref).0 >> 32 != 0;
                if wide || kind == TRANSITIVE {
                    return Err(Errno::Range);
                }
            }
        }
        // 7
        let reserved: Vec<_> = (0..8).map(|gref| self.as_version_1(l, gref)).collect();
        // 8
        if version == 1 {
            self.give_up_status(l)?;
        }
        // 9
        for mfn in self.doms[&l].shared.clone() {
            self.write(mfn, 0, &[0; PAGE]);
        }
        // 10, 11
        let dom = self.doms.get_mut(&l).unwrap();
        dom.version = version;
        let frames = u32::try_from(dom.shared.len()).unwrap();
        self.grow(l, frames, now);
        for (gref, (flags, domid, frame)) in (0..).zip(reserved) {
            let (mfn, at) = self.entry_at(l, gref);
            let frame = u32::try_from(frame).unwrap();
            self.write16((mfn, at + 2), domid);
            if version == 1 {
                self.write16((mfn, at), flags);
                self.write(mfn, at + 4, &frame.to_le_bytes());
            } else {
                self.write16((mfn, at), flags & !0x18);
                self.write(mfn, at + 8, &u64::from(frame).to_le_bytes());
                self.change_marks(l, gref, flags & 0x18, 0);
            }
        }
        Ok(())
    }

    /// A reserved entry as version 1 would have it (step 7).
    fn as_version_1(&self, l: DomId, gref: u32) -> (u16, u16, u64) {
        let (flags, domid) = (self.flags(l, gref), self.entry_domid(l, gref).0);
        let frame = self.entry_frame(l, gref).0;
        if self.doms[&l].version == 1 {
            (flags, domid, frame)
        } else if flags & TYPE == PERMIT {
            (flags | self.read16(self.marks_at(l, gref)), domid, frame)
        } else {
            (0, 0, 0)
        }
    }

    /// Step 8.
    fn give_up_status(&mut self, l: DomId) -> Result<(), Errno> {
        let status = self.doms[&l].status.clone();
        let external = self.doms[&l].external();
        if status.iter().any(|mfn| self.references(*mfn) > 1) {
            if external {
                self.doms.get_mut(&l).unwrap().crashes += 1;
            }
            return Err(Errno::Busy);
        }
        for mfn in status {
            if let Some(gfn) = self.gfn_of(l, mfn) {
                self.doms.get_mut(&l).unwrap().p2m.remove(&gfn);
            }
            self.frames.remove(&mfn);
        }
        self.doms.get_mut(&l).unwrap().status.clear();
        Ok(())
    }

    /// Spec 3.12.
    pub(crate) fn swap(&mut self, l: DomId, item: &SwapGrantRef) -> Status<()> {
        let (a, b) = (item.ref_a.0, item.ref_b.0);
        let dom = &self.doms[&l];
        if a >= dom.entries() || b >= dom.entries() {
            return Err(GrantStatus::BAD_GNTREF);
        }
        if a == b {
            return Ok(());
        }
        if dom.active.contains_key(&a) || dom.active.contains_key(&b) {
            return Err(GrantStatus::EAGAIN);
        }
        let version2 = dom.version == 2;
        let size = if version2 { 16 } else { 8 };
        self.exchange(self.entry_at(l, a), self.entry_at(l, b), size);
        if version2 {
            self.exchange(self.marks_at(l, a), self.marks_at(l, b), 2);
        }
        Ok(())
    }

    fn exchange(&mut self, a: (Mfn, usize), b: (Mfn, usize), len: usize) {
        let bytes = |model: &Model, (mfn, at): (Mfn, usize)| model.frames[&mfn].bytes[at..at + len].to_vec();
        let (of_a, of_b) = (bytes(self, a), bytes(self, b));
        self.write(a.0, a.1, &of_b);
        self.write(b.0, b.1, &of_a);
    }

    /// Spec 6.2 steps 2 to 8, for the grant-table space.
    pub(crate) fn place(
        &mut self,
        l: DomId,
        dom: DomId,
        idx: u64,
        gfn: Gfn,
        now: &TableFrames,
    ) -> Result<(), Errno> {
        let d = self.lookup_any(l, dom).ok_or(Errno::Srch)?;
        let kind = self.doms[&d].kind;
        if kind == DomainKind::Pv {
            return Err(Errno::Acces);
        }
        if !self.may_manage(l, d) {
            return Err(Errno::Perm);
        }
        if gfn == Gfn::INVALID {
            return Err(Errno::Inval);
        }
        // 6, 6.3
        let status = self.doms[&d].version == 2 && idx & 0x8000_0000 != 0;
        let index = idx & if status { 0x7FFF_FFFF } else { 0xFFFF_FFFF };
        let dom = &self.doms[&d];
        let (have, needed) = if status {
            (dom.status.len(), (index + 1) * 8)
        } else {
            (dom.shared.len(), index + 1)
        };
        if index >= have as u64 {
            if needed > u64::from(dom.max_frames) {
                return Err(Errno::Inval);
            }
            self.grow(d, u32::try_from(needed).unwrap(), now);
        }
        let dom = &self.doms[&d];
        let pages = if status { &dom.status } else { &dom.shared };
        let page = pages[usize::try_from(index).unwrap()];
        // 7
        if dom.dying {
            return Err(Errno::Busy);
        }
        // 8
        let mapped_at = self.gfn_of(d, page);
        if kind == DomainKind::Arm {
            if mapped_at.is_some() {
                return Err(Errno::Busy);
            }
        } else {
            match dom.p2m.get(&gfn).copied() {
                Some(P2m::Mmio) => return Err(Errno::Perm),
                Some(P2m::Grant(..)) => return Err(Errno::Nxio),
                Some(P2m::Ram(mfn)) if !self.frames[&mfn].special => {
                    self.frames.get_mut(&mfn).unwrap().allocated = false;
                }
                _ => {}
            }
        }
        let p2m = &mut self.doms.get_mut(&d).unwrap().p2m;
        p2m.remove(&gfn);
        if let Some(mapped_at) = mapped_at {
            p2m.remove(&mapped_at);
        }
        p2m.insert(gfn, P2m::Ram(page));
        Ok(())
    }

    /// Spec 3.7, for a PV caller.
    pub(crate) fn transfer(&mut self, l: DomId, item: &Transfer) -> Status<()> {
        // 2, 3
        let mfn = Mfn(item.mfn);
        let frame = self.frames.get(&mfn).ok_or(GrantStatus::BAD_PAGE)?;
        if frame.owner != l || frame.special || !frame.allocated || self.references(mfn) != 1 {
            return Err(GrantStatus::BAD_PAGE);
        }
        let mut frame = self.frames.remove(&mfn).unwrap();
        // 5, 6, 7, 8
        let e = self.lookup(item.domid).ok_or(GrantStatus::BAD_DOMAIN)?;
        let gref = item.gref.0;
        if self.doms[&e].dying || gref >= self.doms[&e].entries() {
            return Err(GENERAL);
        }
        // 10
        if self.flags(e, gref) != ACCEPT || self.entry_domid(e, gref) != l {
            return Err(GENERAL);
        }
        let at = self.entry_at(e, gref);
        // 11
        frame.owner = e;
        self.frames.insert(mfn, frame);
        // 13
        let gfn = self.entry_frame(e, gref);
        let version2 = self.doms[&e].version == 2;
        let mut entered = Ok(());
        if self.doms[&e].external() {
            let p2m = &mut self.doms.get_mut(&e).unwrap().p2m;
            if gfn.0 >= GFN_END || matches!(p2m.get(&gfn), Some(P2m::Grant(..) | P2m::Mmio)) {
                entered = Err(GENERAL);
            } else {
                p2m.insert(gfn, P2m::Ram(mfn));
            }
        } else if version2 {
            // 14
            self.write(at.0, at.1 + 8, &mfn.0.to_le_bytes());
        } else {
            self.write(at.0, at.1 + 4, &u32::try_from(mfn.0).unwrap().to_le_bytes());
        }
        // 15
        self.write16(at, ACCEPT | 4 | 8);
        entered
    }
}

// --- life --------------------------------------------------------------------------------------

/// What a domain is created with.
#[derive(Clone, std::marker::Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) kind: DomainKind,
    pub(crate) max_version: u32,
    /// The one that its guest starts with.
    pub(crate) version: u32,
    pub(crate) max_frames: u32,
    pub(crate) maptrack_frames: u32,
    pub(crate) iommu: bool,
}

impl Model {
    /// Spec 7.1.
    pub(crate) fn create_domain(&mut self, id: DomId, control: bool, limits: Limits, now: &TableFrames) {
        let dom = Dom {
            kind: limits.kind,
            control,
            dying: false,
            retired: false,
            version: 1,
            max_version: limits.max_version,
            max_frames: limits.max_frames,
            max_handles: (limits.maptrack_frames as usize * 256).saturating_sub(1),
            shared: Vec::new(),
            status: Vec::new(),
            active: BTreeMap::new(),
            v2_ops: 0,
            maptrack: BTreeMap::new(),
            p2m: BTreeMap::new(),
            l1: None,
            crashes: 0,
            iommu: limits.iommu,
        };
        assert!(self.doms.insert(id, dom).is_none(), "{id} is there already");
        self.grow(id, 1, now);
    }

    /// The owner gives a page up.
    pub(crate) fn give_up(&mut self, mfn: Mfn) {
        let frame = self.frames.get_mut(&mfn).unwrap();
        frame.allocated = false;
        let owner = frame.owner;
        if let Some(gfn) = self.gfn_of(owner, mfn) {
            self.doms.get_mut(&owner).unwrap().p2m.remove(&gfn);
        }
        self.sweep();
    }

    /// Spec 7.2 and 7.3: the whole of a domain's death.
    pub(crate) fn kill(&mut self, id: DomId) {
        let dom = self.doms.get_mut(&id).unwrap();
        dom.dying = true;
        dom.l1 = None;
        dom.p2m.clear();
        for record in std::mem::take(&mut dom.maptrack).into_values() {
            self.lower(record.granter, record.gref, pins_of_mapping(record.flags));
            self.end_use(record.granter, record.gref, record.has(MapFlags::READONLY));
        }
        let own = self
            .frames
            .values_mut()
            .filter(|frame| frame.owner == id && !frame.special);
        own.for_each(|frame| frame.allocated = false);
        self.doms.get_mut(&id).unwrap().retired = true;
        self.sweep();
    }

    /// Pages of a domain that it has not given up: gfn and frame.
    pub(crate) fn own_pages(&self, id: DomId) -> Vec<(Gfn, Mfn)> {
        let own = self
            .frames
            .iter()
            .filter(|(_, frame)| frame.owner == id && frame.allocated);
        let plain = own.filter(|(_, frame)| !frame.special);
        let gfn = |mfn: Mfn| {
            if self.doms[&id].external() {
                self.gfn_of(id, mfn)
            } else {
                Some(Gfn(mfn.0))
            }
        };
        plain.filter_map(|(mfn, _)| Some((gfn(*mfn)?, *mfn))).collect()
    }

    // --- AUD-* by themselves -------------------------------------------------------------------

    /// AUD-PIN on the model: pins equal live mappings by kind, copies in flight left out.
    pub(crate) fn mapped_pins(&self, r: DomId, gref: u32) -> Pins {
        let mut sum = [0; 4];
        let records = self.doms.values().flat_map(|dom| dom.maptrack.values());
        for record in records.filter(|record| record.granter == r && record.gref == gref) {
            let pins = pins_of_mapping(record.flags);
            sum.iter_mut().zip(pins).for_each(|(sum, pin)| *sum += pin);
        }
        sum
    }
}
