//! Random programs, mostly valid: what a PV kernel might do with grants, and what it should not.
//!
//! The generator keeps a rough picture of what its program has done so far, so that most steps
//! hit something; it knows nothing of answers. Left out are programs to which the specification
//! gives no answer or whose answer the engine does not share on purpose (`docs/differences.md`).

use fastrand::Rng;
use gnttab_abi::{CopyFlags, MapFlags, Op};
use gnttab_conformance::script::{
    AREA_PAGES, CallHead, Head, LIST, NO_HANDLE, OTHER, OTHER_ARGUMENTS, OTHER_LIST, OTHER_PAGES,
    OTHER_SLOTS_TABLE, OTHER_STATUS, OTHER_TABLE, PAGES, Place, SLOTS, SLOTS_TABLE, SPARE, SPARES, STATUS,
    Step, TABLE, Value, fields,
};

const SELF: u64 = 0x7FF0;
/// What OUT fields hold before: nothing that an answer could be.
const STATUS_BEFORE: Value = Value::Lit(0x7777);
const HANDLE_BEFORE: Value = Value::Lit(0x5A5A_5A5A);
const BUS_BEFORE: Value = Value::Lit(0x1122_3344_5566_7788);
/// Numbers that are no frame of the domain's.
const BAD_FRAMES: [u64; 4] = [0xFFFF_FFF0, 0xFFFF_FFFF, 0xF_FFFF, 0x7FFF_FFFF];
/// An address without page tables.
const NO_TABLE: u64 = 0x40_0000_0000;
/// An address that the hypervisor keeps for itself.
const RESERVED: u64 = 0xFFFF_8000_0000_0000;
#[expect(clippy::cast_possible_truncation, reason = "16 pages")]
const AREA_BYTES: u32 = 4096 * AREA_PAGES as u32;

/// A program under construction.
pub(crate) struct Generator<'r> {
    rng: &'r mut Rng,
    steps: Vec<Step>,
    /// The other domain makes the step's call.
    acting: bool,
    /// Versions of the caller's table and of the other domain's.
    version: [u32; 2],
    /// What may be granted: by the other domain, and the reference.
    granted: Vec<(bool, u32)>,
    /// Where a page may be transferred to: the other domain's table, and the reference.
    offered: Vec<(bool, u32)>,
    /// What the caller mapped, and the other domain: flags, slot.
    mapped: [Vec<(u32, u64)>; 2],
    max_frames: u32,
    /// Tables of either kind may be granted, and nothing is copied out of grants: frame numbers
    /// stand in them.
    tables: bool,
    /// The other domain is dead.
    killed: bool,
}

/// Makes one program.
///
/// One in `kills` kills the other domain on its way; 0: none does.
pub(crate) fn program(rng: &mut Rng, max_frames: u32, kills: u32) -> Vec<Step> {
    let kill = kills > 0 && rng.u32(0..kills) == 0;
    let tables = rng.u32(0..4) == 0;
    let mut generator = Generator {
        rng,
        tables,
        killed: false,
        steps: Vec::new(),
        acting: false,
        version: [1; 2],
        granted: Vec::new(),
        offered: Vec::new(),
        mapped: [Vec::new(), Vec::new()],
        max_frames,
    };
    for other in [false, true] {
        generator.acting = other;
        if generator.one_in(3) {
            generator.set_version(2);
        }
    }
    generator.acting = false;
    for _ in 0..generator.rng.u32(1..5) {
        generator.grant();
    }
    for _ in 0..generator.rng.u32(4..40) {
        generator.step();
    }
    if kill {
        generator.push(Head::Kill);
        generator.killed = true;
        for _ in 0..generator.rng.u32(4..20) {
            generator.step();
        }
    }
    generator.steps
}

fn lit(n: impl Into<u64>) -> Value {
    Value::Lit(n.into())
}

impl Generator<'_> {
    fn one_in(&mut self, n: u32) -> bool {
        self.rng.u32(0..n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.usize(0..from.len())]
    }

    fn push(&mut self, head: Head) {
        self.steps.push(Step {
            head,
            items: Vec::new(),
        });
    }

    fn step(&mut self) {
        self.acting = !self.killed && self.one_in(5);
        match self.rng.u32(0..100) {
            0..16 => self.grant(),
            16..22 => self.change_entry(),
            22..43 => self.map(),
            43..57 => self.unmap(),
            57..60 => self.replace(),
            60..64 => self.set_pte(),
            64..68 => self.touch(),
            68..80 => self.copy(),
            80..83 => self.swap(),
            83..86 => {
                let version = self.pick(&[1, 2, 2, 1, 2, 1, 0, 3]);
                self.set_version(version);
            }
            86..88 => self.get_version(),
            88..90 => self.query_size(),
            90..92 => self.setup_table(),
            92..94 => self.get_status_frames(),
            94..95 => self.cache_flush(),
            95..98 => self.transfer(),
            98..99 => self.raw(),
            _ => self.odd_state(),
        }
        if self.one_in(400) {
            self.thousands();
        }
    }

    /// The version of a table, as far as the picture goes.
    fn version_of(&self, other: bool) -> u32 {
        self.version[usize::from(other)]
    }

    // --- the table ------------------------------------------------------------------------------

    fn any_ref(&mut self) -> u32 {
        match self.rng.u32(0..40) {
            0 => self.pick(&[254, 255, 256, 257, 510, 511]),
            1 => self.pick(&[512, 513, 767, 768, 1023, 1024, 0x7FFF_FFFF, 0xFFFF_FFFF]),
            _ => self.rng.u32(0..20),
        }
    }

    /// A granter's number and a reference of its table.
    fn granted(&mut self) -> (u64, u32) {
        let (other, gref) = if self.granted.is_empty() || self.one_in(16) {
            (self.one_in(3), self.any_ref())
        } else {
            self.granted[self.rng.usize(0..self.granted.len())]
        };
        (u64::from(other), gref)
    }

    fn granted_ref(&mut self) -> u32 {
        self.granted().1
    }

    /// A page of either domain.
    fn any_page(&mut self) -> u64 {
        let page = self.rng.u64(0..PAGES);
        if self.one_in(2) { page } else { OTHER_PAGES + page }
    }

    /// A page of the one domain's or the other's.
    fn page_of(&mut self, other: bool) -> Value {
        let page = self.rng.u64(0..PAGES);
        Value::Page(if other { OTHER_PAGES + page } else { page })
    }

    /// A frame that a domain might call its own.
    fn any_frame(&mut self, other: bool) -> Value {
        let [slots_table, table, status] = if other {
            [OTHER_SLOTS_TABLE, OTHER_TABLE, OTHER_STATUS]
        } else {
            [SLOTS_TABLE, TABLE, STATUS]
        };
        match self.rng.u32(0..24) {
            0 if self.tables => Value::Page(slots_table),
            1 if self.tables => Value::Page(table),
            2 => lit(self.rng.choice(BAD_FRAMES).unwrap_or(BAD_FRAMES[0])),
            3 if self.version_of(other) == 2 && self.tables => Value::Page(status),
            4 => self.page_of(!other),
            5 => Value::Page(SPARE + self.rng.u64(0..SPARES)),
            _ => self.page_of(other),
        }
    }

    /// Whom an entry names: the caller mostly, or the other domain.
    fn entry_domid(&mut self, other: bool) -> u64 {
        match self.rng.u32(0..32) {
            0 | 1 => self.pick(&[2, 77, SELF, 0x7FF2, 0xFFFF]),
            2..8 => u64::from(OTHER),
            8..18 if !other => u64::from(OTHER),
            _ => 0,
        }
    }

    fn entry_flags(&mut self) -> u64 {
        match self.rng.u32(0..24) {
            0 => self.pick(&[0, 2, 3, 0x0002, 0x0006, 0x000E]),
            1 => self.pick(&[0x0009, 0x0011, 0x0019, 0x001D]),
            2 => self.pick(&[0x0201, 0x8001, 0xFE01]),
            3 => self.pick(&[0x0021, 0x0041, 0x0081, 0x00E5]),
            4 => 0x0101,
            5..10 => 5,
            _ => 1,
        }
    }

    fn store(&mut self, other: bool, offset: u32, size: u8, value: Value) {
        let version = if self.version_of(other) == 2 { 2 } else { 1 };
        self.push(Head::Entry {
            other,
            version,
            offset,
            size,
            value,
        });
    }

    /// Bytes of an entry, and where its frame is and how wide.
    fn entry_layout(&self, other: bool) -> (u32, u32, u8) {
        if self.version_of(other) == 2 {
            (16, 8, 8)
        } else {
            (8, 4, 4)
        }
    }

    fn grant(&mut self) {
        let other = self.one_in(2);
        let gref = self.any_ref() % 1025;
        let (domid, frame, mut flags) = (self.entry_domid(other), self.any_frame(other), self.entry_flags());
        let (size, at, bytes) = self.entry_layout(other);
        self.granted.push((other, gref));
        let mut part = 0;
        if size == 16 {
            if self.one_in(5) {
                flags |= 0x100;
                let start = self.pick(&[0_u64, 100, 1024, 2048, 0x8064, 4095, 4096]);
                let length = self.pick(&[0_u64, 50, 500, 2048, 4096, 0xFFFF]);
                part = start << 32 | length << 48;
            }
            if self.one_in(6) {
                // Transitive: by the far domain and its reference.
                flags = flags & !3 | 3;
                let near = u64::from(other);
                let far = self.pick(&[1 - near, 1 - near, 1 - near, 0, 1, 77, SELF]);
                let far_ref = u64::from(self.granted_ref());
                self.store(other, gref * size + 8, 8, lit(far_ref));
                self.store(other, gref * size, 8, lit(flags | domid << 16 | far << 32));
                return;
            }
        }
        self.store(other, gref * size + at, bytes, frame);
        let head = if size == 16 { 8 } else { 4 };
        self.store(other, gref * size, head, lit(flags | domid << 16 | part));
    }

    /// An entry that accepts a page.
    fn offer(&mut self, other: bool) {
        let gref = self.any_ref() % 1025;
        let (size, at, bytes) = self.entry_layout(other);
        let sender = match self.rng.u32(0..12) {
            0 => 77,
            1 | 2 => u64::from(other),
            _ => u64::from(!other),
        };
        let flags = if self.one_in(12) {
            self.pick(&[0_u64, 1, 6, 0x22, 0x0A])
        } else {
            2
        };
        self.offered.push((other, gref));
        // No frame of either world's.
        let number = self.rng.u64(0x4000_0000..0x5000_0000);
        self.store(other, gref * size + at, bytes, lit(number));
        self.store(other, gref * size, 4, lit(flags | sender << 16));
    }

    fn change_entry(&mut self) {
        let (granter, gref) = self.granted();
        let other = granter != 0;
        let gref = gref % 1025;
        let (size, at, bytes) = self.entry_layout(other);
        match self.rng.u32(0..6) {
            0 => self.store(other, gref * size, 2, lit(0_u64)),
            1 => self.store(other, gref * size, 2, lit(5_u64)),
            2 => {
                let domid = self.entry_domid(other);
                self.store(other, gref * size + 2, 2, lit(domid));
            }
            3 => {
                let frame = self.any_frame(other);
                self.store(other, gref * size + at, bytes, frame);
            }
            _ => {
                let flags = self.entry_flags();
                self.store(other, gref * size, 2, lit(flags));
            }
        }
    }

    // --- calls ----------------------------------------------------------------------------------

    /// A call whose arguments lie where they should, and whose count is theirs; seldom otherwise.
    fn call(&mut self, op: Op, items: Vec<Vec<Value>>) {
        let total = u32::try_from(items.len()).unwrap_or(1);
        self.call_repeated(op, items, total);
    }

    fn call_repeated(&mut self, op: Op, items: Vec<Vec<Value>>, total: u32) {
        debug_assert!(items.iter().all(|item| item.len() == fields(op).len()));
        let size = u32::try_from(op.arg_size(gnttab_abi::Abi::X86_64)).unwrap_or(1);
        let mut count = u64::from(total);
        let plain = if self.acting { OTHER_ARGUMENTS } else { 1 };
        let own = if self.acting { plain } else { self.rng.u8(0..2) };
        let mut place = Place::Area(own, 8 * self.rng.u32(0..200));
        if total > 100 {
            place = Place::Area(plain, 0);
        } else if self.one_in(24) {
            let fit = self.rng.u32(0..=total) * size;
            match self.rng.u32(0..6) {
                // Into what is only readable, or into nothing.
                0 | 1 if !self.acting => place = Place::Area(0, AREA_BYTES - fit),
                2 if !self.acting => place = Place::Area(0, AREA_BYTES + 4096 - fit.min(4096)),
                0..5 => place = Place::Area(plain, AREA_BYTES - fit),
                _ => {
                    place = Place::Lit(self.pick(&[NO_TABLE, RESERVED, 0xFFFF_87FF_FFFF_F000]));
                }
            }
            // An argument across the edge of what is mapped. Not across that of what is writable:
            // how much of a faulting write is done is the guest memory's affair.
            if let Place::Area(area, at) = place
                && fit >= 16
                && (area == plain || at >= AREA_BYTES)
                && self.one_in(3)
            {
                place = Place::Area(area, at + 8);
            }
        } else if self.one_in(50) {
            count = self.pick(&[0, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, 1 << 32 | u64::from(total)]);
        }
        let upper = if self.one_in(100) { 0xABCD << 32 } else { 0 };
        self.steps.push(Step {
            head: Head::Call(CallHead {
                other: self.acting,
                command: op as u64 | upper,
                op,
                place,
                count,
                total: u16::try_from(total).unwrap_or(u16::MAX),
                items: u16::try_from(items.len()).unwrap_or(0),
            }),
            items,
        });
    }

    fn few(&mut self) -> u32 {
        match self.rng.u32(0..20) {
            0 => self.rng.u32(1..17),
            1..5 => self.rng.u32(2..5),
            _ => 1,
        }
    }

    fn dom(&mut self) -> Value {
        lit(if self.one_in(30) {
            self.pick(&[SELF, 1, 77, 0x7FF1, 0x7FF2, 0x7FF4, 0x7FFF, 0xFFFF])
        } else {
            0
        })
    }

    fn self_or_dom(&mut self) -> Value {
        match self.rng.u32(0..4) {
            0 | 1 => lit(SELF),
            2 => lit(OTHER),
            _ => self.dom(),
        }
    }

    /// A slot of whoever acts.
    fn any_slot(&mut self) -> u64 {
        self.rng.u64(0..SLOTS) + if self.acting { SLOTS } else { 0 }
    }

    fn map_item(&mut self) -> Vec<Value> {
        let slot = self.any_slot();
        let (host, device) = match self.rng.u32(0..20) {
            0..4 => (false, true),
            4..8 => (true, true),
            8 => (false, false),
            _ => (true, false),
        };
        let mut flags = MapFlags::empty();
        flags.set(MapFlags::HOST_MAP, host);
        flags.set(MapFlags::DEVICE_MAP, device);
        flags.set(MapFlags::READONLY, self.one_in(3));
        flags.set(MapFlags::APPLICATION_MAP, self.one_in(8));
        let pte = self.one_in(6);
        flags.set(MapFlags::CONTAINS_PTE, pte);
        let mut bits = flags.bits();
        if self.one_in(8) {
            bits |= self.rng.u32(0..8) << 16;
        }
        if self.one_in(20) {
            bits |= self.pick(&[0x20, 0x40, 0x7FC0, 0x8000, 0xFFF8_0000]);
        }
        let offset = if self.one_in(16) {
            self.pick(&[1, 8, 0xFFF])
        } else {
            0
        };
        let mut host_addr = if pte {
            Value::Pte(slot, if offset == 8 { 0 } else { offset })
        } else {
            Value::Slot(slot, offset)
        };
        if self.one_in(24) {
            let page = self.rng.u64(0..PAGES);
            host_addr = self.pick(&[
                lit(NO_TABLE),
                lit(RESERVED),
                Value::PageAddr(page, 0),
                Value::PageAddr(TABLE, 8),
                lit(0xFFFF_FFFF_F000_u64),
                Value::Pte(slot, 0),
                Value::Slot(slot, 0),
            ]);
        }
        self.mapped[usize::from(self.acting)].push((bits, slot));
        let (granter, gref) = self.granted();
        let dom = if self.one_in(40) { self.dom() } else { lit(granter) };
        vec![
            host_addr,
            lit(bits),
            lit(gref),
            dom,
            STATUS_BEFORE,
            HANDLE_BEFORE,
            BUS_BEFORE,
        ]
    }

    fn map(&mut self) {
        if self.one_in(40) {
            return self.map_many();
        }
        let items = (0..self.few()).map(|_| self.map_item()).collect();
        self.call(Op::MapGrantRef, items);
    }

    /// As often as an entry can be used, and once more.
    fn map_many(&mut self) {
        let mut item = self.map_item();
        let readonly = if self.one_in(2) {
            MapFlags::READONLY.bits()
        } else {
            0
        };
        item[1] = lit(MapFlags::DEVICE_MAP.bits() | readonly);
        let total = self.pick(&[127, 128, 129, 130, 300]);
        self.call_repeated(Op::MapGrantRef, vec![item], total);
        if self.one_in(2) {
            let base = self.rng.u64(0..4);
            let page = self.any_page();
            let bus = if self.one_in(4) {
                lit(0_u64)
            } else {
                Value::PageAddr(page, 0)
            };
            let item = vec![lit(0_u64), bus, Value::HandleSeq(base), STATUS_BEFORE];
            let total = self.pick(&[31, 32, 33, 65, 130]);
            self.call_repeated(Op::UnmapGrantRef, vec![item], total);
        }
    }

    fn handle(&mut self) -> (Value, u32, u64) {
        let who = usize::from(self.acting);
        if self.mapped[who].is_empty() || self.one_in(24) {
            let none = self.pick(&[NO_HANDLE, 0xFFFF_FFFF, 0x7FFF_FFFF, 0x0010_0000]);
            return (lit(none), 0, 0);
        }
        let index = self.rng.usize(0..self.mapped[who].len());
        let (flags, slot) = self.mapped[who][index];
        (Value::Handle(index as u64), flags, slot)
    }

    fn host_addr(&mut self, flags: u32, slot: u64) -> Value {
        let slot = if self.one_in(12) || slot < SLOTS && self.acting {
            self.any_slot()
        } else {
            slot
        };
        let pte = MapFlags::from_bits_retain(flags).contains(MapFlags::CONTAINS_PTE) != self.one_in(30);
        let offset = if self.one_in(24) {
            self.pick(&[8, 0xFF8])
        } else {
            0
        };
        match self.rng.u32(0..24) {
            0 => lit(0_u64),
            1 => self.pick(&[lit(NO_TABLE), lit(RESERVED), lit(1_u64)]),
            _ if pte => Value::Pte(slot, 0),
            _ => Value::Slot(slot, offset),
        }
    }

    fn unmap(&mut self) {
        let items = (0..self.few())
            .map(|_| {
                let (handle, flags, slot) = self.handle();
                let host = self.host_addr(flags, slot);
                let page = self.any_page();
                let bus = match self.rng.u32(0..8) {
                    0..4 => lit(0_u64),
                    4..7 => Value::PageAddr(page, 0),
                    _ => self.pick(&[
                        Value::PageAddr(page, 1),
                        lit(4096_u64),
                        Value::PageAddr(SLOTS_TABLE, 0),
                    ]),
                };
                vec![host, bus, handle, STATUS_BEFORE]
            })
            .collect();
        self.call(Op::UnmapGrantRef, items);
    }

    fn replace(&mut self) {
        let items = (0..self.few())
            .map(|_| {
                let (handle, flags, slot) = self.handle();
                let host = self.host_addr(flags, slot);
                let other = self.any_slot();
                let new = if self.one_in(4) {
                    self.pick(&[lit(0_u64), lit(NO_TABLE), lit(RESERVED), Value::Slot(slot, 0)])
                } else {
                    Value::Slot(other, 0)
                };
                vec![host, new, handle, STATUS_BEFORE]
            })
            .collect();
        self.call(Op::UnmapAndReplace, items);
    }

    fn set_pte(&mut self) {
        let (slot, writable) = (self.rng.u8(0..if self.killed { 16 } else { 32 }), self.rng.bool());
        let page = match self.rng.u32(0..8) {
            0 => 0xFF,
            1 => 8 + self.rng.u8(0..2),
            2 | 3 => 0x10 + self.rng.u8(0..8),
            _ => self.rng.u8(0..8),
        };
        self.push(Head::SetPte { slot, page, writable });
    }

    fn touch(&mut self) {
        let (slot, offset) = (self.rng.u8(0..16), self.rng.u16(0..4096));
        let write = self.rng.bool().then(|| self.rng.u8(..));
        self.push(Head::Touch { slot, offset, write });
    }

    /// One or a few copies. In one call a side is always by grant or always by frame: for calls
    /// that mix them the reference is no model (spec 10.3, D-1 and D-3). Ranges that could overlap
    /// lie in different halves of a page (N-1).
    fn copy(&mut self) {
        let (source_gref, dest_gref) = (self.rng.bool() && !self.tables, self.rng.bool() && !self.tables);
        let mut flags = CopyFlags::empty();
        flags.set(CopyFlags::SOURCE_GREF, source_gref);
        flags.set(CopyFlags::DEST_GREF, dest_gref);
        let items = (0..self.few())
            .map(|_| {
                let source = if self.tables {
                    (self.page_of(self.acting), lit(SELF))
                } else {
                    self.side(source_gref)
                };
                let dest = self.side(dest_gref);
                let swapped = self.one_in(2);
                let (mut from, mut to) = (self.rng.u64(0..1500), self.rng.u64(2048..3500));
                if swapped {
                    (from, to) = (to, from);
                }
                let mut len: u64 = self.pick(&[1, 7, 8, 50, 100, 500]);
                match self.rng.u32(0..30) {
                    0 => len = 0,
                    1 => {
                        (from, len) =
                            self.pick(&[(0, 4097), (4095, 2), (0xFFFF, 1), (0xFFFF, 0xFFFF), (4096, 1)])
                    }
                    2 => (to, len) = self.pick(&[(1, 4096), (4095, 2), (0xFFFF, 1), (4097, 0), (4096, 1)]),
                    _ => {}
                }
                if matches!(dest.0, Value::Page(TABLE..)) {
                    // A frame number of which a part is overwritten is neither world's own, nor the same in both.
                    (to, len) = (to & !7, len & !7);
                }
                // Words that the operation ignores.
                let ignored = if self.one_in(30) { 0xFFFC } else { 0 };
                vec![
                    source.0,
                    source.1,
                    lit(from),
                    dest.0,
                    dest.1,
                    lit(to),
                    lit(len),
                    lit(u64::from(flags.bits()) | ignored),
                    STATUS_BEFORE,
                ]
            })
            .collect();
        self.call(Op::Copy, items);
    }

    fn side(&mut self, gref: bool) -> (Value, Value) {
        if gref {
            let (granter, gref) = self.granted();
            let dom = match self.rng.u32(0..40) {
                0 => self.dom(),
                1..10 if granter == u64::from(self.acting) => lit(SELF),
                _ => lit(granter),
            };
            (lit(gref), dom)
        } else {
            let frame = if self.one_in(8) {
                self.any_frame(self.acting)
            } else {
                self.page_of(self.acting)
            };
            let dom = if self.one_in(20) { self.dom() } else { lit(SELF) };
            (frame, dom)
        }
    }

    fn swap(&mut self) {
        let items = (0..self.few())
            .map(|_| vec![lit(self.granted_ref()), lit(self.any_ref()), STATUS_BEFORE])
            .collect();
        self.call(Op::SwapGrantRef, items);
    }

    fn set_version(&mut self, version: u32) {
        // What number a status page has in the next version 2 is anybody's guess.
        let version = if self.tables && version == 1 { 2 } else { version };
        if (1..=2).contains(&version) {
            // It may fail; the picture is rough.
            self.version[usize::from(self.acting)] = version;
        }
        self.call(Op::SetVersion, vec![vec![lit(version)]]);
    }

    fn get_version(&mut self) {
        let item = vec![self.self_or_dom(), lit(0x1234_u64), lit(0x5555_5555_u64)];
        self.call(Op::GetVersion, vec![item]);
    }

    fn query_size(&mut self) {
        let before = lit(0x5555_5555_u64);
        let item = vec![self.self_or_dom(), before, before, STATUS_BEFORE];
        self.call(Op::QuerySize, vec![item]);
    }

    fn list(&mut self) -> Value {
        let short = 8 * self.rng.u32(0..5);
        let list = if self.acting { OTHER_LIST } else { LIST };
        match self.rng.u32(0..12) {
            0 => Value::Area(list, AREA_BYTES - short),
            1 => lit(RESERVED),
            2 => lit(NO_TABLE),
            _ => Value::Area(list, 0),
        }
    }

    fn setup_table(&mut self) {
        let nr = match self.rng.u32(0..8) {
            0 => self.max_frames + self.rng.u32(1..3),
            1 => self.rng.u32(0..=self.max_frames),
            2 => self.pick(&[0xFFFF_FFFF, 0x8000_0000]),
            _ => self.rng.u32(0..4),
        };
        let item = vec![self.self_or_dom(), lit(nr), STATUS_BEFORE, self.list()];
        self.call(Op::SetupTable, vec![item]);
    }

    fn get_status_frames(&mut self) {
        let nr = self.pick(&[0_u64, 1, 1, 1, 2, 8, 9, 0xFFFF_FFFF]);
        let item = vec![lit(nr), self.self_or_dom(), STATUS_BEFORE, self.list()];
        self.call(Op::GetStatusFrames, vec![item]);
    }

    fn cache_flush(&mut self) {
        let items = (0..self.few())
            .map(|_| {
                let page = self.any_page();
                let addr = match self.rng.u32(0..8) {
                    0 => lit(0xFFFF_FFF0_0000_u64),
                    1 => Value::PageAddr(SLOTS_TABLE, 0),
                    _ => Value::PageAddr(page, self.pick(&[0, 0, 0xFFF])),
                };
                let (offset, length): (u64, u64) = self.pick(&[
                    (0, 4096),
                    (0, 10),
                    (4095, 1),
                    (4095, 2),
                    (4096, 0),
                    (0, 0),
                    (0, 4097),
                ]);
                let op = self.pick(&[1_u64, 3, 3, 2, 0, 4, 0x8000_0000, 0x8000_0001]);
                vec![addr, lit(offset), lit(length), lit(op)]
            })
            .collect();
        self.call(Op::CacheFlush, items);
    }

    /// Transfers: of pages that nobody uses, which go or are lost, and of pages that must stay.
    fn transfer(&mut self) {
        let to = if self.one_in(6) { self.acting } else { !self.acting };
        if !self.one_in(4) {
            self.offer(to);
        }
        let items = (0..self.few())
            .map(|_| {
                let mfn = match self.rng.u32(0..8) {
                    0 => self.any_frame(self.acting),
                    1 => Value::Page(SPARE + self.rng.u64(0..SPARES)),
                    _ => {
                        let half = SPARES / 2;
                        Value::Page(SPARE + self.rng.u64(0..half) + if self.acting { half } else { 0 })
                    }
                };
                let (table, gref) = match self.rng.choice(self.offered.iter().copied()) {
                    Some(offer) if !self.one_in(10) => offer,
                    _ => (to, self.granted_ref()),
                };
                let dom = if self.one_in(12) { self.dom() } else { lit(table) };
                vec![mfn, dom, lit(gref), STATUS_BEFORE]
            })
            .collect();
        self.call(Op::Transfer, items);
    }

    /// As many arguments as the area holds, or nearly.
    fn thousands(&mut self) {
        let op = self.pick(&[Op::SwapGrantRef, Op::UnmapGrantRef, Op::Copy, Op::MapGrantRef]);
        let item = match op {
            Op::SwapGrantRef => vec![lit(self.granted_ref()), lit(self.any_ref()), STATUS_BEFORE],
            Op::Copy => {
                let (from, to) = (self.page_of(self.acting), self.page_of(self.acting));
                let (low, high) = (lit(8_u64), lit(3000_u64));
                vec![
                    from,
                    lit(SELF),
                    low,
                    to,
                    lit(SELF),
                    high,
                    lit(40_u64),
                    lit(0_u64),
                    STATUS_BEFORE,
                ]
            }
            Op::MapGrantRef => {
                let mut item = self.map_item();
                item[1] = lit(MapFlags::DEVICE_MAP.bits());
                item
            }
            _ => vec![lit(0_u64), lit(0_u64), Value::HandleSeq(0), STATUS_BEFORE],
        };
        let size = u32::try_from(op.arg_size(gnttab_abi::Abi::X86_64)).unwrap_or(1);
        let total = AREA_BYTES / size - self.rng.u32(0..3);
        self.call_repeated(op, vec![item], total);
    }

    /// Commands that there are not.
    fn raw(&mut self) {
        let command = self.pick(&[
            3,
            13,
            99,
            0xFFF,
            0x1000,
            0x1003,
            0x1005,
            0x8000_0000,
            0xFFFF_FFFF,
            0x1_0000_0003,
            0x100D,
        ]);
        let count = self.pick(&[0, 1, 1, 2, 0x8000_0000]);
        let place = self.pick(&[
            Place::Area(0, 0),
            Place::Area(1, AREA_BYTES),
            Place::Lit(RESERVED),
        ]);
        let item = vec![lit(SELF), STATUS_BEFORE];
        self.steps.push(Step {
            head: Head::Call(CallHead {
                other: self.acting,
                command,
                op: Op::DumpTable,
                place,
                count,
                total: 1,
                items: 1,
            }),
            items: vec![item],
        });
    }

    /// States that a well-behaved kernel does not get into.
    fn odd_state(&mut self) {
        if self.one_in(2) {
            let hold = self.rng.bool();
            self.push(Head::HoldStatus(hold));
        } else {
            let (granter, index) = self.granted();
            let other = granter != 0;
            // Marks that lie are put there, but none taken away: the player looks at them.
            let value = self.pick(&[0x18, 0x8018, 0xFFFF]);
            self.push(Head::StatusWord { other, index, value });
        }
    }
}
