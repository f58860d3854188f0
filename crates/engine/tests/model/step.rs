//! Random steps, mostly sensible ones.
//!
//! A step is a kind and some choices. What these mean is decided when the step is taken, with the
//! model at hand: which grants there are, what is mapped where. So most steps do something, and a
//! sequence stays sensible when proptest takes steps out of it, or a fuzzer puts some in.

use gnttab_abi::{
    Abi, Copy, CopyFlags, CopyPtr, DomId, EncodeError, Gfn, GrantHandle, GrantRef, GrantStatus, MapFlags,
    MapGrantRef, Mfn, SwapGrantRef, Transfer, Truncated, UnmapAndReplace, UnmapGrantRef,
};
use gnttab_engine::DomainKind;

use super::spec::{LINEAR, P2m};
use super::world::{Manner, REFS, Trouble, World};

/// A number of a domain that never is.
const NOBODY: DomId = DomId(9);
/// Gfns at which translated domains map grants, and their tables.
const GRANT_GFNS: u64 = 0x2000;
const TABLE_GFNS: u64 = 0x9000;
/// Places for ordinary mappings; floods go behind them.
const PLACES: usize = 12;

#[derive(Clone, std::marker::Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A guest rewrites an entry.
    Entry,
    /// A guest changes one thing of an entry, perhaps in use.
    Twist,
    Map,
    /// One grant mapped until a counter or the handles run out.
    Flood,
    Unmap,
    /// An unmap with something else between its phases.
    UnmapAround,
    Replace,
    Copy,
    /// A copy with something else while it holds its pages.
    CopyAround,
    Swap,
    Version,
    Setup,
    StatusFrames,
    Query,
    /// Any command and count at all, with arguments that cannot be read.
    Door,
    Transfer,
    Place,
    Touch,
    OwnMap,
    Page,
    Kill,
    Create,
}

#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) what: What,
    pub(crate) choices: Vec<u8>,
    /// For the steps that have something between their halves.
    pub(crate) inner: Vec<Step>,
}

/// Decides by a step's choices, and when these are used up by SplitMix64 over them.
struct Dice<'a> {
    choices: &'a [u8],
    state: u64,
}

impl Dice<'_> {
    fn of(choices: &[u8]) -> Dice<'_> {
        // FNV-1a.
        let state = choices.iter().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3)
        });
        Dice { choices, state }
    }

    /// A number of so many bytes at least.
    fn number(&mut self, bytes: usize) -> u64 {
        if let Some((chosen, rest)) = self.choices.split_at_checked(bytes) {
            self.choices = rest;
            return chosen
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte));
        }
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn next(&mut self) -> u64 {
        self.number(8)
    }

    fn below(&mut self, n: usize) -> usize {
        let bytes = if n <= 256 { 1 } else { 2 };
        usize::try_from(self.number(bytes) % n as u64).unwrap()
    }

    fn u16(&mut self) -> u16 {
        let [a, b, ..] = self.number(2).to_le_bytes();
        u16::from_le_bytes([a, b])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) << 16 | u32::from(self.u16())
    }

    fn small(&mut self, n: u16) -> u16 {
        u16::try_from(self.below(usize::from(n))).unwrap()
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// Now and then some bits of an item are anything at all, as a hostile guest has them.
    fn garble<T>(
        &mut self,
        abi: Abi,
        items: &mut [T],
        encode: impl Fn(&T, Abi, &mut [u8]) -> Result<(), EncodeError>,
        decode: impl Fn(Abi, &[u8]) -> Result<T, Truncated>,
    ) {
        if items.is_empty() || !self.percent(4) {
            return;
        }
        let item = self.below(items.len());
        let mut bytes = [0; 40];
        encode(&items[item], abi, &mut bytes).unwrap();
        for _ in 0..1 + self.below(3) {
            let at = self.below(bytes.len());
            bytes[at] ^= self.number(1).to_le_bytes()[0];
        }
        items[item] = decode(abi, &bytes).unwrap();
    }

    /// One of several, if there is any.
    fn choose<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        if from.is_empty() {
            None
        } else {
            Some(self.pick(from))
        }
    }
}

impl World {
    pub(crate) fn take(&mut self, step: &Step) {
        let mut dice = Dice::of(&step.choices);
        if step.what == What::Create {
            let id = DomId(1 + dice.small(3));
            if !self.model.doms.contains_key(&id) {
                self.create(id);
            }
            return;
        }
        let running = self.running();
        let again = self.caller.filter(|_| dice.percent(40));
        let Some(l) = again.or(dice.choose(&running)) else {
            return;
        };
        match step.what {
            What::Entry => self.some_entry(l, &mut dice),
            What::Twist => self.twist(l, &mut dice),
            What::Map => self.some_maps(l, &mut dice),
            What::Flood => self.flood(l, &mut dice),
            What::Unmap => self.some_unmaps(l, &mut dice, None),
            What::UnmapAround => self.some_unmaps(l, &mut dice, Some(&step.inner)),
            What::Replace => self.some_replaces(l, &mut dice),
            What::Copy => self.some_copies(l, &mut dice, None),
            What::CopyAround => self.some_copies(l, &mut dice, Some(&step.inner)),
            What::Swap => self.some_swaps(l, &mut dice),
            What::Version => self.some_version(l, &mut dice),
            What::Setup => {
                let (dom, max) = (self.some_target(l, &mut dice), 13);
                let frames = u32::from(dice.small(max));
                let manner = self.manner(l, &mut dice, 1);
                self.setup_table(l, manner, dom, frames);
            }
            What::StatusFrames => {
                let (dom, frames) = (self.some_target(l, &mut dice), u32::from(dice.small(3)));
                let manner = self.manner(l, &mut dice, 1);
                self.get_status_frames(l, manner, dom, frames);
            }
            What::Query => {
                let dom = self.some_target(l, &mut dice);
                let manner = self.manner(l, &mut dice, 1);
                if dice.percent(50) {
                    self.query_size(l, manner, dom);
                } else {
                    self.get_version(l, manner, dom);
                }
            }
            What::Door => self.some_door(l, &mut dice),
            What::Transfer => self.some_transfer(l, &mut dice),
            What::Place => {
                let dom = self.some_target(l, &mut dice);
                let status = if dice.percent(40) { 0x8000_0000 } else { 0 };
                let idx = u64::from(dice.small(3)) | status;
                let mut gfn = Gfn(TABLE_GFNS + u64::from(dice.small(4)));
                if dice.percent(15) {
                    gfn = dice.pick(&[Gfn(0x80), Gfn(0x101), Gfn(GRANT_GFNS), Gfn::INVALID]);
                }
                let vcpu = self.free_vcpu();
                self.place(l, vcpu, dom, idx, gfn);
            }
            What::Touch => self.some_touch(l, &mut dice),
            What::OwnMap => self.some_own_map(l, &mut dice),
            What::Page => self.some_paging(l, &mut dice),
            What::Kill => {
                // Not one that is in the middle of something.
                if self.caller != Some(l) {
                    self.kill(l);
                }
            }
            What::Create => {}
        }
        self.model.sweep();
    }

    /// Version 2 has more in it: a guest stays there longer, and fills its table at once.
    fn some_version(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let now = self.model.doms[&l].version;
        let version = match dice.below(100) {
            0..8 => dice.pick(&[0, 1, 2, 3, u32::MAX]),
            8..40 if now == 2 => 2,
            _ => 3 - now,
        };
        let manner = self.manner(l, dice, 1);
        self.set_version(l, manner, version);
        if self.model.doms[&l].version == 2 && now == 1 {
            (0..5).for_each(|_| self.some_entry(l, dice));
        }
    }

    fn some_abi(&self, l: DomId, dice: &mut Dice<'_>) -> Abi {
        match self.model.doms[&l].kind {
            DomainKind::Arm => Abi::Arm,
            DomainKind::Hvm | DomainKind::Pv if dice.percent(25) => Abi::X86_32,
            DomainKind::Hvm | DomainKind::Pv => Abi::X86_64,
        }
    }

    fn some_door(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let number = match dice.below(8) {
            0 => dice.u32(),
            1 => 13,
            _ => u32::from(dice.small(13)),
        };
        let opaque = if dice.percent(20) { dice.u32() & !0xFFF } else { 0 };
        let counts = [0, 0, 1, 2, 5, u32::MAX >> 1, 1 << 31, u32::MAX];
        let (count, abi) = (dice.pick(&counts), self.some_abi(l, dice));
        self.door(l, abi, number | opaque, count);
    }

    /// How a batch of so many items is made.
    fn manner(&self, l: DomId, dice: &mut Dice<'_>, items: usize) -> Manner {
        let abi = self.some_abi(l, dice);
        let narrow = abi == Abi::X86_32;
        let mut manner = Manner {
            vcpu: self.free_vcpu(),
            abi,
            yields: 0,
            trouble: Trouble::None,
        };
        if items > 1 && dice.percent(20) {
            manner.yields = dice.u32() & 0xFF;
        }
        if !narrow && items > 1 && dice.percent(8) {
            let item = dice.below(items);
            manner.trouble = dice.pick(&[Trouble::Read(item), Trouble::Write(item)]);
        }
        manner
    }

    fn some_domain(&self, dice: &mut Dice<'_>) -> DomId {
        let all: Vec<DomId> = self.model.doms.keys().copied().collect();
        match dice.below(100) {
            0 => NOBODY,
            1 => DomId::SELF,
            _ => dice.pick(&all),
        }
    }

    fn some_target(&self, l: DomId, dice: &mut Dice<'_>) -> DomId {
        if dice.percent(60) {
            dice.pick(&[DomId::SELF, l])
        } else {
            self.some_domain(dice)
        }
    }

    /// A reference that the table of `d` has.
    fn some_ref(&self, d: DomId, dice: &mut Dice<'_>) -> u32 {
        let entries = self.model.doms[&d].entries();
        let refs: Vec<u32> = REFS.into_iter().filter(|gref| *gref < entries).collect();
        dice.pick(&refs)
    }

    /// References that are in use, or say that they may be used.
    fn live_refs(&self, d: DomId) -> Vec<u32> {
        let entries = self.model.doms[&d].entries();
        let refs = REFS
            .into_iter()
            .filter(|gref| *gref < entries && self.model.flags(d, *gref) & 3 != 0);
        self.model.doms[&d].active.keys().copied().chain(refs).collect()
    }

    /// A grant for `l`, mostly one that can work. `copy`: transitive ones too.
    fn some_grant(&self, l: DomId, dice: &mut Dice<'_>, copy: bool) -> (DomId, u32) {
        let mut good = Vec::new();
        for (id, dom) in &self.model.doms {
            for gref in self.live_refs(*id) {
                let used = dom.active.get(&gref).is_some_and(|used| used.user == l);
                let kind = self.model.flags(*id, gref) & 3;
                let granted = (kind == 1 || copy && kind == 3) && self.model.entry_domid(*id, gref) == l;
                if used || granted {
                    good.push((*id, gref));
                }
            }
        }
        let used = |(id, gref): &(DomId, u32)| self.model.doms[id].active.contains_key(gref);
        let in_use: Vec<_> = good.iter().copied().filter(used).collect();
        if self.caller.is_some()
            && dice.percent(60)
            && let Some(grant) = dice.choose(&in_use)
        {
            return grant;
        }
        if dice.percent(90)
            && let Some(grant) = dice.choose(&good)
        {
            return grant;
        }
        (self.some_domain(dice), dice.pick(&REFS))
    }

    /// What a domain may put into an entry as a frame, mostly a page of its own.
    fn some_frame(&self, d: DomId, dice: &mut Dice<'_>) -> Gfn {
        let dom = &self.model.doms[&d];
        let own = self.model.own_pages(d);
        let special: Vec<Gfn> = if dom.kind == DomainKind::Pv {
            self.table_frames
                .iter()
                .chain(&dom.l1)
                .chain(&dom.shared)
                .map(|mfn| Gfn(mfn.0))
                .collect()
        } else {
            dom.p2m.keys().copied().collect()
        };
        match dice.below(100) {
            0..75 if !own.is_empty() => dice.pick(&own).0,
            75..93 if !special.is_empty() => dice.pick(&special),
            93..97 => Gfn(self.model.frames.keys().next().map_or(0, |mfn| mfn.0) + dice.next() % 40),
            _ => Gfn(dice.pick(&[0, u64::from(u32::MAX), 1 << 32, u64::MAX])),
        }
    }

    fn some_entry(&mut self, d: DomId, dice: &mut Dice<'_>) {
        let gref = self.some_ref(d, dice);
        let (mfn, at) = self.model.entry_at(d, gref);
        let mut flags = dice.pick(&[1, 1, 1, 1, 1, 1, 5, 5, 2, 0]);
        let mut domid = self.some_domain(dice).0;
        let (mut half, mut length) = (0, 0);
        let mut frame = self.some_frame(d, dice).0;
        let version2 = self.model.doms[&d].version == 2;
        match dice.below(100) {
            0..15 if version2 => {
                flags = flags & 4 | 0x101;
                half = dice.pick(&[0, 0, 100, 100, 4000, 0x8064]);
                length = dice.pick(&[4096, 4000, 50, 0xFFFF, 0]);
            }
            15..35 if version2 => {
                flags = flags & 4 | 3;
                let (far, far_ref) = self.some_grant(d, dice, false);
                (half, frame) = (far.0, u64::from(far_ref));
            }
            35..40 => {
                // Anything at all.
                flags = dice.u16();
                domid = if dice.percent(50) { domid } else { dice.u16() };
                (half, length) = (dice.u16(), dice.u16());
            }
            40..50 => flags |= dice.u16() & 0xE0,
            50..60 => flags = 2,
            _ => {}
        }
        let [f0, f1] = flags.to_le_bytes();
        let [d0, d1] = domid.to_le_bytes();
        if version2 {
            let mut bytes = vec![f0, f1, d0, d1];
            bytes.extend(half.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(frame.to_le_bytes());
            self.write_frame(mfn, at, &bytes);
        } else {
            let mut bytes = vec![f0, f1, d0, d1];
            bytes.extend(&frame.to_le_bytes()[..4]);
            self.write_frame(mfn, at, &bytes);
        }
    }

    fn twist(&mut self, d: DomId, dice: &mut Dice<'_>) {
        let Some(gref) = dice.choose(&self.live_refs(d)) else {
            return;
        };
        let (mfn, at) = self.model.entry_at(d, gref);
        let flags = self.model.flags(d, gref);
        let version2 = self.model.doms[&d].version == 2;
        match dice.below(10) {
            0..4 => self.write_frame(mfn, at, &(flags ^ 4).to_le_bytes()),
            4 => self.write_frame(mfn, at, &[0, 0]),
            5 => {
                let domid = self.some_domain(dice).0;
                self.write_frame(mfn, at + 2, &domid.to_le_bytes());
            }
            6 => {
                let frame = self.some_frame(d, dice).0.to_le_bytes();
                if version2 {
                    self.write_frame(mfn, at + 8, &frame);
                } else {
                    self.write_frame(mfn, at + 4, &frame[..4]);
                }
            }
            7 => {
                let changed = flags & !3 | dice.pick(&[1, 3]);
                self.write_frame(mfn, at, &changed.to_le_bytes());
            }
            8 if dice.percent(50) => self.write_frame(mfn, at, &(flags ^ 0x100).to_le_bytes()),
            _ if dice.percent(60) => {
                let (mfn, at) = self.model.marks_at(d, gref);
                let marks = (dice.u16() & 0x18) | flags & !0x18;
                self.write_frame(mfn, at, &marks.to_le_bytes());
            }
            _ if version2 => {
                let half: u16 = dice.pick(&[0, 100, 101]);
                self.write_frame(mfn, at + 4, &half.to_le_bytes());
            }
            _ => {}
        }
    }

    /// An address where nothing is mapped yet, mostly.
    fn some_place(&self, l: DomId, dice: &mut Dice<'_>, number: usize) -> u64 {
        let dom = &self.model.doms[&l];
        let pv = dom.kind == DomainKind::Pv;
        let base = if pv { LINEAR } else { GRANT_GFNS * 4096 };
        let free = |slot: &usize| {
            if pv {
                dom.l1.is_some_and(|l1| self.model.read(l1, slot * 8, 8) == 0)
            } else {
                !dom.p2m.contains_key(&Gfn(GRANT_GFNS + *slot as u64))
            }
        };
        let free: Vec<usize> = (0..PLACES).filter(free).collect();
        match dice.below(100) {
            0..88 if number < free.len() => base + free[number] as u64 * 4096,
            0..96 => base + dice.below(PLACES) as u64 * 4096 + dice.next() % 4096,
            _ => dice.pick(&[
                0,
                1,
                0x100 * 4096,
                0x80_0000_0000,
                LINEAR + 600 * 4096,
                1 << 50,
                u64::MAX,
            ]),
        }
    }

    fn some_map(&self, l: DomId, dice: &mut Dice<'_>, number: usize) -> MapGrantRef {
        let dom = &self.model.doms[&l];
        let (granter, gref) = self.some_grant(l, dice, false);
        let mut flags = MapFlags::HOST_MAP;
        let mut host_addr = self.some_place(l, dice, number);
        if dom.kind == DomainKind::Pv {
            match dice.below(100) {
                0..12 => flags = MapFlags::DEVICE_MAP,
                12..27 => flags |= MapFlags::DEVICE_MAP,
                27..34 => {
                    flags |= MapFlags::CONTAINS_PTE;
                    let slot = dice.below(PLACES) as u64 * 8;
                    let odd = if dice.percent(10) { 4 } else { 0 };
                    let table = dom.l1.map_or(0, |l1| l1.0) + u64::from(dice.percent(10));
                    host_addr = table * 4096 + slot + odd;
                }
                34..38 => flags |= MapFlags::APPLICATION_MAP,
                38..46 => flags |= MapFlags::from_bits_retain(dice.u32() & 0xFFFF_0060),
                _ => {}
            }
        } else if dice.percent(4) {
            flags |= MapFlags::from_bits_retain(1 << dice.below(32));
        }
        if dice.percent(2) {
            flags = MapFlags::empty();
        }
        flags.set(MapFlags::READONLY, dice.percent(50));
        MapGrantRef {
            host_addr,
            flags,
            gref: GrantRef(gref),
            dom: granter,
            status: GrantStatus(7),
            handle: GrantHandle(99),
            dev_bus_addr: 98,
        }
    }

    fn some_maps(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let mut items: Vec<_> = (0..1 + dice.below(4))
            .map(|number| self.some_map(l, dice, number))
            .collect();
        let manner = self.manner(l, dice, items.len());
        dice.garble(manner.abi, &mut items, MapGrantRef::encode, MapGrantRef::decode);
        self.map(l, manner, &items);
    }

    /// Spec 2.3: 128 uses of a kind; spec 2.5: 255 handles a page.
    fn flood(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let mut item = self.some_map(l, dice, 0);
        let pv = self.model.doms[&l].kind == DomainKind::Pv;
        item.flags = if pv && dice.percent(40) {
            MapFlags::DEVICE_MAP
        } else {
            MapFlags::HOST_MAP
        };
        item.flags.set(MapFlags::READONLY, dice.percent(70));
        let first = if pv { LINEAR + 16 * 4096 } else { 0x3000 * 4096 };
        let count = dice.pick(&[127u64, 128, 129, 131]);
        let from = first + dice.pick(&[0, 140, 280]) * 4096;
        let items: Vec<_> = (0..count)
            .map(|i| MapGrantRef {
                host_addr: from + i * 4096,
                ..item
            })
            .collect();
        let manner = self.manner(l, dice, 1);
        // A translated domain that maps over a grant mapping is crashed each time.
        let taken = !pv && self.model.doms[&l].p2m.contains_key(&Gfn(from / 4096));
        self.map(l, manner, if taken { &items[..2] } else { &items });
    }

    fn some_handles(&self, l: DomId, dice: &mut Dice<'_>) -> Vec<u32> {
        let mut live: Vec<u32> = self.model.doms[&l].maptrack.keys().copied().collect();
        let many = live.len() > 60 || dice.percent(10);
        let mut handles = Vec::new();
        for _ in 0..if many { 140 } else { 1 + dice.below(4) } {
            if live.is_empty() || dice.percent(if many { 1 } else { 8 }) {
                handles.push(dice.pick(&[0, 1, 5, 255, 256, u32::MAX]));
            } else if dice.percent(97) {
                handles.push(live.swap_remove(dice.below(live.len())));
            } else {
                handles.push(dice.pick(&live));
            }
            if many && live.is_empty() {
                break;
            }
        }
        handles
    }

    fn some_unmaps(&mut self, l: DomId, dice: &mut Dice<'_>, inner: Option<&Vec<Step>>) {
        let mut items = Vec::new();
        for handle in self.some_handles(l, dice) {
            let (addr, bus) = self
                .mapped_at
                .get(&(l, handle))
                .copied()
                .unwrap_or((LINEAR, 0x1000));
            let mut item = UnmapGrantRef {
                host_addr: addr,
                dev_bus_addr: bus,
                handle: GrantHandle(handle),
                status: GrantStatus(7),
            };
            match dice.below(100) {
                0..6 => item.host_addr = 0,
                6..9 => item.host_addr = self.some_place(l, dice, 0),
                9..15 => item.dev_bus_addr = 0,
                15..18 => item.dev_bus_addr += 1,
                18..20 => item.host_addr += 4,
                _ => {}
            }
            items.push(item);
        }
        let mut manner = self.manner(l, dice, items.len());
        dice.garble(
            manner.abi,
            &mut items,
            UnmapGrantRef::encode,
            UnmapGrantRef::decode,
        );
        if let Some(inner) = inner {
            (manner.yields, manner.trouble) = (0, Trouble::None);
            self.during(l, inner, |world, meanwhile| {
                world.unmap(l, manner, &items, Some(meanwhile))
            });
        } else {
            self.unmap(l, manner, &items, None);
        }
    }

    /// Does something with `inner` in the middle of it.
    fn during(
        &mut self,
        l: DomId,
        inner: &[Step],
        outer: impl FnOnce(&mut World, &mut dyn FnMut(&mut World)),
    ) {
        self.caller = Some(l);
        outer(self, &mut |world| {
            for step in inner {
                world.take(step);
                world.check();
            }
        });
        self.caller = None;
    }

    fn some_replaces(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let mut items = Vec::new();
        for handle in self.some_handles(l, dice).into_iter().take(4) {
            let (addr, _) = self.mapped_at.get(&(l, handle)).copied().unwrap_or((LINEAR, 0));
            let other = self.some_place(l, dice, 0);
            let host_addr = dice.pick(&[addr, addr, addr, addr, addr, 0, other]);
            let occupied = LINEAR + dice.below(PLACES) as u64 * 4096;
            let new_addr = dice.pick(&[0, occupied, occupied, occupied, addr, 0x7000_0000]);
            let (handle, status) = (GrantHandle(handle), GrantStatus(7));
            items.push(UnmapAndReplace {
                host_addr,
                new_addr,
                handle,
                status,
            });
        }
        let manner = self.manner(l, dice, items.len());
        dice.garble(
            manner.abi,
            &mut items,
            UnmapAndReplace::encode,
            UnmapAndReplace::decode,
        );
        self.replace(l, manner, &items);
    }

    /// Where a sub-page entry starts, and how long it is.
    fn part_of(&self, d: DomId, gref: u32) -> Option<(u16, u16)> {
        let dom = self.model.doms.get(&d)?;
        if dom.version == 1 || gref >= dom.entries() || self.model.flags(d, gref) & 0x103 != 0x101 {
            return None;
        }
        let (mfn, at) = self.model.entry_at(d, gref);
        let half = |at| u16::try_from(self.model.read(mfn, at, 2)).unwrap();
        Some((half(at + 4) & 0x7FFF, half(at + 6)))
    }

    fn some_copies(&mut self, l: DomId, dice: &mut Dice<'_>, inner: Option<&Vec<Step>>) {
        let mut items: Vec<Copy> = Vec::new();
        let whole = dice.percent(80);
        for _ in 0..1 + dice.below(4) {
            if let Some(last) = items.last().copied()
                && dice.percent(40)
            {
                items.push(Copy {
                    len: dice.small(60),
                    ..last
                });
                continue;
            }
            let (mut flags, mut part) = (CopyFlags::empty(), None);
            let mut side = |dice: &mut Dice<'_>, flag, grants| {
                let mut offset = dice.pick(&[0, 0, 8, 8, 100, 101, 120, 2000, 4000]);
                if dice.percent(6) {
                    offset = dice.pick(&[4095, 4096, 0xFFFF]);
                }
                if dice.percent(grants) {
                    flags |= flag;
                    let (dom, gref) = self.some_grant(l, dice, true);
                    if let Some((start, length)) = self.part_of(dom, gref)
                        && dice.percent(70)
                    {
                        offset = start.wrapping_add(dice.pick(&[0, 0, 0, 0, 1, u16::MAX]));
                        part = Some(length);
                    }
                    let dom = if dom == l && dice.percent(50) {
                        DomId::SELF
                    } else {
                        dom
                    };
                    return CopyPtr::grant(dom, GrantRef(gref), offset);
                }
                let mut side = CopyPtr::frame(self.some_frame(l, dice).0, offset);
                if dice.percent(3) {
                    side.domid = dice.pick(&[l, NOBODY]);
                }
                side
            };
            let source = side(dice, CopyFlags::SOURCE_GREF, 70);
            let dest = side(dice, CopyFlags::DEST_GREF, 50);
            let len = match part {
                Some(length) => dice.pick(&[length, length, length.wrapping_add(1), 1]),
                None if whole => dice.pick(&[1, 8, 16, 40]),
                None => dice.pick(&[0, 1, 50, 51, 96, 2000, 4096, 4097]),
            };
            items.push(Copy {
                source,
                dest,
                len,
                flags,
                status: GrantStatus(7),
            });
        }
        let mut manner = self.manner(l, dice, items.len());
        if manner.abi == Abi::X86_32 {
            for side in items
                .iter_mut()
                .flat_map(|item| [&mut item.source, &mut item.dest])
            {
                side.u &= u64::from(u32::MAX);
            }
        }
        dice.garble(manner.abi, &mut items, Copy::encode, Copy::decode);
        if let Some(inner) = inner {
            (manner.yields, manner.trouble) = (0, Trouble::None);
            self.during(l, inner, |world, meanwhile| {
                world.copy(l, manner, &items, Some(meanwhile))
            });
        } else {
            self.copy(l, manner, &items, None);
        }
    }

    fn some_swaps(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let some = |dice: &mut Dice<'_>| {
            GrantRef(if dice.percent(95) {
                self.some_ref(l, dice)
            } else {
                dice.pick(&[512, u32::MAX])
            })
        };
        let mut items: Vec<_> = (0..1 + dice.below(3))
            .map(|_| SwapGrantRef {
                ref_a: some(dice),
                ref_b: some(dice),
                status: GrantStatus(7),
            })
            .collect();
        let manner = self.manner(l, dice, items.len());
        dice.garble(manner.abi, &mut items, SwapGrantRef::encode, SwapGrantRef::decode);
        self.swap(l, manner, &items);
    }

    fn some_transfer(&mut self, l: DomId, dice: &mut Dice<'_>) {
        if dice.percent(60) {
            let receiver = dice.pick(&self.running());
            let sender = if dice.percent(85) {
                l
            } else {
                self.some_domain(dice)
            };
            let (mfn, at) = self.model.entry_at(receiver, self.some_ref(receiver, dice));
            let gfn = (0x9008 + dice.next() % 4).to_le_bytes();
            let to = if self.model.doms[&receiver].version == 2 {
                8
            } else {
                4
            };
            self.write_frame(mfn, at + to, &gfn[..4]);
            let [low, high] = sender.0.to_le_bytes();
            self.write_frame(mfn, at, &[2, 0, low, high]);
        }
        let strangers = dice.percent(30);
        let mut slots = Vec::new();
        for id in self.model.doms.keys() {
            let refs = self.live_refs(*id).into_iter();
            let open = refs.filter(|gref| {
                let offered = self.model.entry_domid(*id, *gref) == l || strangers;
                self.model.flags(*id, *gref) & 3 == 2 && offered
            });
            slots.extend(open.map(|gref| (*id, gref)));
        }
        // A slot that nobody offers loses the page: once is enough.
        if slots.is_empty() && dice.percent(80) {
            return;
        }
        let slot = if dice.percent(90) {
            dice.choose(&slots)
        } else {
            None
        };
        let (domid, gref) = slot.unwrap_or_else(|| (self.some_domain(dice), dice.pick(&REFS)));
        let mut mfn = self.some_frame(l, dice).0;
        let manner = self.manner(l, dice, 1);
        if manner.abi == Abi::X86_32 {
            mfn &= u64::from(u32::MAX);
        }
        let mut items = [Transfer {
            mfn,
            domid,
            gref: GrantRef(gref),
            status: GrantStatus(7),
        }];
        dice.garble(manner.abi, &mut items, Transfer::encode, Transfer::decode);
        let [item] = items;
        self.transfer(l, manner, item);
    }

    fn some_touch(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let dom = &self.model.doms[&l];
        let page = if dom.kind == DomainKind::Pv {
            LINEAR / 4096 + dice.below(PLACES) as u64
        } else {
            let gfns: Vec<Gfn> = dom.p2m.keys().copied().collect();
            dice.pick(&gfns).0
        };
        let addr = page * 4096 + u64::from(dice.small(4080));
        let bytes: Vec<u8> = (0..1 + dice.below(16))
            .map(|_| dice.u16().to_le_bytes()[0])
            .collect();
        self.touch(l, addr, &bytes);
    }

    fn some_own_map(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let dom = &self.model.doms[&l];
        let Some(l1) = dom.l1 else { return };
        let own: Vec<Mfn> = self
            .model
            .own_pages(l)
            .into_iter()
            .map(|(_, mfn)| mfn)
            .chain([l1])
            .collect();
        let page = if dice.percent(75) { dice.choose(&own) } else { None };
        let addr = LINEAR + dice.below(PLACES) as u64 * 4096;
        let writable = dice.percent(60);
        self.own_map(l, addr, page, writable);
    }

    fn some_paging(&mut self, l: DomId, dice: &mut Dice<'_>) {
        let dom = &self.model.doms[&l];
        let out: Vec<Gfn> = dom
            .p2m
            .iter()
            .filter(|(_, entry)| **entry == P2m::PagedOut)
            .map(|(gfn, _)| *gfn)
            .collect();
        let own: Vec<(Gfn, Mfn)> = self
            .model
            .own_pages(l)
            .into_iter()
            .filter(|(_, mfn)| dom.l1 != Some(*mfn))
            .collect();
        if own.len() < 4 {
            return self.add_page(l);
        }
        if let Some(gfn) = dice.choose(&out)
            && dice.percent(60)
        {
            return self.page_in(l, gfn);
        }
        let (gfn, mfn) = dice.pick(&own);
        if dom.kind != DomainKind::Pv && dice.percent(50) {
            self.page_out(l, gfn, mfn);
        } else {
            self.give_up(l, mfn);
        }
    }
}
