//! Carries a script out, in whichever world, and digests what comes of it.
//!
//! What must always hold:
//! 1. Nothing that a world numbers as it likes reaches a digest: frames go in by name, handles not
//!    at all (a stale handle whose number has been given out again is taken for one that nobody has).
//! 2. A script starts from a clean world and is cleaned up after: no mapping, no entry, version 1 on
//!    both sides, pages as at the start and where they were. What cannot be undone (the size of a table) is part of the digest.

use gnttab_abi::Op;

use crate::script::{
    CallHead, Field, Head, LIST, MOST_FIELDS, NO_HANDLE, OTHER, OTHER_ARGUMENTS, OTHER_LIST, OTHER_PAGES,
    OTHER_SLOTS_TABLE, OTHER_STATUS, OTHER_TABLE, PAGES, Place, Reader, SLOTS, SPARE, SPARES, STATUS, TABLE,
    Value, fields, is_backed,
};

/// Present, writable, user, write-through, cache-disable, attribute index, the guest's own bits
/// and no-execute: what is compared of a page-table entry.
const PTE_BITS: u64 = 1 | 2 | 8 | 16 | 1 << 7 | 7 << 9;
const PTE_FRAME: u64 = 0x000F_FFFF_FFFF_F000;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
/// Fills arguments before they are written, and lists.
const FILL: u8 = 0xA5;
/// Elements of a list that are looked at.
const LIST_SEEN: u64 = 72;
/// Handles that are remembered.
const MOST_HANDLES: usize = 4096;
/// A number that is no frame.
const NO_FRAME: u64 = 0xFFFF_FFF1;
/// Says that a number is a frame's name.
const NAMED: u64 = 1 << 62;
/// -EFAULT
const FAULT: i64 = -14;

/// References that are looked at after each step: those that scripts use, and the edges.
pub const WATCHED: [u32; 32] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 254, 255, 256, 257, 510, 511, 512,
    513, 767, 768, 1023, 1024,
];

/// What a script is played on: a domain's kernel, and what its hypervisor lets it see.
pub trait World {
    /// Makes a grant-table hypercall, as the caller or as the other domain.
    fn call(&mut self, other: bool, command: u64, addr: u64, count: u64) -> i64;
    /// Address of an area.
    fn area(&self, area: u8) -> u64;
    /// Stores behind the mappings of an area. What is not backed is left out.
    fn poke(&mut self, area: u8, offset: u64, bytes: &[u8]);
    /// Loads behind the mappings of an area.
    fn peek(&self, area: u8, offset: u64, into: &mut [u8]);
    /// The frame of a name.
    fn frame(&self, name: u64) -> Option<u64>;
    /// The name of a frame.
    fn name(&self, frame: u64) -> Option<u64>;
    /// Address of a slot.
    fn slot(&self, slot: u64) -> u64;
    /// Machine address of a slot's page-table entry.
    fn pte_addr(&self, slot: u64) -> u64;
    /// A slot's page-table entry.
    fn pte(&self, slot: u64) -> u64;
    /// Maps a page, or nothing, at a slot; false if the hypervisor refuses.
    fn set_pte(&mut self, slot: u64, page: Option<(u64, bool)>) -> bool;
    /// Loads a byte through a slot that maps something.
    fn load(&self, slot: u64, offset: u16) -> u8;
    /// Stores a byte through a slot that is mapped writable.
    fn store(&mut self, slot: u64, offset: u16, byte: u8);
    /// A digest of a page's content ([`mix`]); pages are the caller's and the other domain's.
    fn page_digest(&self, page: u64) -> u64;
    /// Gives a page the content that it has at the start.
    fn reset_page(&mut self, page: u64);
    /// Pages of the other domain; 0 without one.
    fn other_pages(&self) -> u64;
    /// Bytes of a table that there are.
    fn table_bytes(&self, other: bool) -> u64;
    /// Loads from a table.
    fn table_load(&self, other: bool, offset: u64, into: &mut [u8]);
    /// Stores into a table, in one access of 1, 2, 4 or 8 bytes.
    fn table_store(&mut self, other: bool, offset: u64, size: u8, value: u64);
    /// A status word.
    fn status_load(&self, other: bool, index: u64) -> Option<u16>;
    /// Stores a status word.
    fn status_store(&mut self, other: bool, index: u64, value: u16);
    /// The version of a table.
    fn version(&self, other: bool) -> u32;
    /// Whose a spare page is: the caller's, the other domain's or nobody's.
    fn owner(&mut self, spare: u64) -> Option<bool>;
    /// What its owner calls a spare page, by the machine's table.
    fn physical(&self, spare: u64) -> u64;
    /// Gives both domains new spare pages for those that are gone (as bits) or have moved.
    fn reset_spares(&mut self, gone: u64);
    /// Looks again at what the hypervisor has for the tables: they may have grown or changed version.
    fn refresh(&mut self);
    /// Kills the other domain and takes its memory, as far as nobody uses it.
    fn kill(&mut self) -> i64;
    /// Stops seeing a table's status pages.
    fn release_status(&mut self, other: bool);
    /// A word of the script's answer.
    fn emit(&mut self, word: u64);
    /// A step begins.
    fn begins(&mut self, step: usize);
    /// One thing seen, before it is digested. Only with `verbose`.
    fn seen(&mut self, what: &'static str, index: u64, value: u64);
    /// Whether things seen are wanted one by one.
    fn verbose(&self) -> bool;
}

/// Plays a script. False: what it left could not be cleaned up.
pub fn play<W: World>(world: &mut W, script: &[u8]) -> bool {
    let mut play = Play {
        world,
        handles: [[0; MOST_HANDLES]; 2],
        known: [0; 2],
        lost: [false; 2],
        acting: false,
        pages_changed: false,
        hold_status: false,
        received: 0,
        gone: 0,
        transferred: false,
        killed: false,
        digest: 0,
    };
    let mut reader = Reader::new(script);
    let mut step = 0;
    while let Some(head) = play.begin(step).and_then(|()| reader.head()) {
        play.step(head, &mut reader);
        play.look();
        play.end();
        step += 1;
    }
    let clean = play.clean_up();
    play.end();
    clean
}

struct Play<'w, W> {
    world: &'w mut W,
    /// Handles of the script's maps, in order: the caller's, the other domain's.
    handles: [[u32; MOST_HANDLES]; 2],
    known: [usize; 2],
    /// A mapping may have been made whose handle was not told.
    lost: [bool; 2],
    /// The other domain makes the call that is under way.
    acting: bool,
    /// Spare pages that were transferred with success, as bits: their owner gave them a number.
    received: u64,
    /// Those that a transfer lost: their frames may be anything by now.
    gone: u64,
    /// A transfer was tried.
    transferred: bool,
    pages_changed: bool,
    hold_status: bool,
    killed: bool,
    digest: u64,
}

impl<W: World> Play<'_, W> {
    fn begin(&mut self, step: usize) -> Option<()> {
        self.world.begins(step);
        self.digest = 0xCBF2_9CE4_8422_2325;
        Some(())
    }

    fn end(&mut self) {
        let digest = self.digest;
        self.world.emit(digest);
    }

    fn see(&mut self, what: &'static str, index: u64, value: u64) {
        if self.world.verbose() {
            self.world.seen(what, index, value);
        }
        self.digest = (self.digest ^ value)
            .wrapping_mul(0x0000_0100_0000_01B3)
            .rotate_left(29);
    }

    fn name(&self, frame: u64) -> u64 {
        if frame == 0 {
            return 0;
        }
        self.world.name(frame).map_or(frame, |name| NAMED | name)
    }

    /// A machine address, its frame by name.
    fn name_addr(&self, addr: u64) -> u64 {
        (self.name(addr >> 12) << 12) ^ (addr & 0xFFF)
    }

    fn handle(&self, k: u64) -> u32 {
        let who = usize::from(self.acting);
        let known = &self.handles[who][..self.known[who].min(MOST_HANDLES)];
        let Some(index) = usize::try_from(k).ok().and_then(|k| k.checked_rem(known.len())) else {
            return NO_HANDLE;
        };
        let handle = known[index];
        if known[index + 1..].contains(&handle) {
            NO_HANDLE
        } else {
            handle
        }
    }

    /// Whether a copy uses a transitive entry that somebody has in use: if that use is of another
    /// kind, a real Xen starts the item over for ever (spec 5.6).
    fn is_endless(&self, values: &[Value; MOST_FIELDS]) -> bool {
        let [source, source_dom, _, dest, dest_dom, _, _, flags, _] =
            values.map(|value| self.value(value, 0));
        let endless = |by_grant: bool, dom: u64, gref: u64| {
            let other = match dom {
                0 => false,
                0x7FF0 => self.acting,
                _ => dom == u64::from(OTHER),
            };
            let mut flags = [0; 2];
            if !by_grant || self.world.version(other) != 2 || (gref + 1) * 16 > self.world.table_bytes(other)
            {
                return false;
            }
            self.world.table_load(other, gref * 16, &mut flags);
            let used = self
                .world
                .status_load(other, gref)
                .is_none_or(|status| status & 0x18 != 0);
            flags[0] & 3 == 3 && used
        };
        endless(flags & 1 != 0, source_dom, source & 0xFFFF_FFFF)
            || endless(flags & 2 != 0, dest_dom, dest & 0xFFFF_FFFF)
    }

    /// Before a map that may not tell its handle: a number that has been given back could come
    /// again unseen, so that it stands for nobody from here on.
    fn forget_dead_handles(&mut self) {
        let who = usize::from(self.acting);
        for start in (0..self.known[who]).step_by(GROUP) {
            let mut handles = [0; GROUP];
            let group = start..self.known[who].min(start + GROUP);
            handles[..group.len()].copy_from_slice(&self.handles[who][group.clone()]);
            let live = self.live(&handles[..group.len()]);
            for (at, handle) in self.handles[who][group].iter_mut().enumerate() {
                if live & 1 << at == 0 {
                    *handle = NO_HANDLE;
                }
            }
        }
    }

    /// The frame of a name, or no frame at all.
    fn frame(&self, name: u64) -> u64 {
        let gone = (SPARE..SPARE + SPARES).contains(&name) && self.gone & 1 << (name - SPARE) != 0;
        let frame = if gone { None } else { self.world.frame(name) };
        frame.unwrap_or(NO_FRAME)
    }

    fn value(&self, value: Value, item: u64) -> u64 {
        match value {
            Value::Lit(n) => n,
            Value::Page(name) => self.frame(name),
            Value::PageAddr(name, offset) => (self.frame(name) << 12) + u64::from(offset),
            Value::Slot(slot, offset) => self.world.slot(slot % (2 * SLOTS)) + u64::from(offset),
            Value::Pte(slot, offset) => self.world.pte_addr(slot % (2 * SLOTS)) + u64::from(offset),
            Value::Handle(k) => u64::from(self.handle(k)),
            Value::HandleSeq(base) => u64::from(self.handle(base + item)),
            Value::Area(area, offset) => self.world.area(area) + u64::from(offset),
        }
    }

    fn step(&mut self, head: Head, reader: &mut Reader<'_>) {
        match head {
            Head::Call(call) => self.call(call, reader),
            Head::Entry {
                other,
                version,
                offset,
                size,
                value,
            } => {
                let (offset, value) = (u64::from(offset), self.value(value, 0));
                let is = self.world.version(other);
                if is == u32::from(version) && offset + u64::from(size) <= self.world.table_bytes(other) {
                    self.world.table_store(other, offset, size, value);
                }
            }
            Head::StatusWord { other, index, value } => {
                self.world.status_store(other, u64::from(index), value);
            }
            Head::SetPte { slot, page, writable } => {
                if self.killed && u64::from(page) == OTHER_SLOTS_TABLE {
                    // A dead domain's page tables are anybody's memory, or nobody's.
                    return self.see("left out", 0, 1);
                }
                let page = (page != 0xFF).then_some((u64::from(page), writable));
                let done = self.world.set_pte(u64::from(slot) % (2 * SLOTS), page);
                self.see("page-table entry set", u64::from(slot), u64::from(done));
            }
            Head::Touch { slot, offset, write } => self.touch(u64::from(slot) % SLOTS, offset % 4096, write),
            Head::HoldStatus(hold) => self.hold_status = hold,
            Head::Kill => {
                self.killed = true;
                let result = self.world.kill();
                self.see("killed", 0, result.cast_unsigned());
            }
        }
    }

    fn touch(&mut self, slot: u64, offset: u16, write: Option<u8>) {
        let pte = self.world.pte(slot);
        if pte & PRESENT == 0 {
            return;
        }
        // A page table and a table of grants hold frame numbers, and are not to be overwritten by
        // the way.
        let named = self.world.name((pte & PTE_FRAME) >> 12);
        let ordinary = named.is_some_and(|name| name < PAGES || self.is_other_page(name));
        if ordinary {
            let byte = self.world.load(slot, offset);
            self.see("byte at slot", slot, u64::from(byte));
        }
        if let Some(byte) = write
            && pte & WRITABLE != 0
            && ordinary
        {
            self.world.store(slot, offset, byte);
            self.pages_changed = true;
        }
    }

    fn is_other_page(&self, name: u64) -> bool {
        (OTHER_PAGES..OTHER_PAGES + self.world.other_pages()).contains(&name)
    }

    fn call(&mut self, call: CallHead, reader: &mut Reader<'_>) {
        let CallHead { op, place, .. } = call;
        self.acting = call.other;
        let mut given = [[Value::Lit(0); MOST_FIELDS]; MOST_ITEMS];
        let layout = fields(op);
        let items = usize::from(call.items).min(MOST_ITEMS);
        for item in 0..usize::from(call.items) {
            for place in &mut given[item.min(MOST_ITEMS - 1)][..layout.len()] {
                let Some(value) = reader.value() else { return };
                *place = value;
            }
        }
        let size = op.arg_size(gnttab_abi::Abi::X86_64);
        let total = if items == 0 { 0 } else { u64::from(call.total) };
        if op == Op::Copy && given[..items].iter().any(|values| self.is_endless(values)) {
            self.see("left out", 0, 1);
            return;
        }
        if op == Op::MapGrantRef
            && let Place::Area(_, start) = place
            && u64::from(start) + total * size as u64 > AREA_END
        {
            self.forget_dead_handles();
        }
        if let Place::Area(area, start) = place {
            for item in 0..total {
                let values = &given[usize::try_from(item).unwrap_or(0) % items];
                let mut bytes = [FILL; 40];
                self.lay_out(layout, values, item, &mut bytes);
                let offset = u64::from(start) + item * size as u64;
                if is_backed(area, offset, size as u64) {
                    self.world.poke(area, offset, &bytes[..size]);
                }
            }
        }
        let list = if call.other { OTHER_LIST } else { LIST };
        let listed = matches!(op, Op::SetupTable | Op::GetStatusFrames);
        if listed {
            for element in list_seen() {
                self.world.poke(list, element * 8, &[FILL; 8]);
            }
        }
        if op == Op::SetVersion && (call.other || !self.hold_status) {
            self.world.release_status(call.other);
        }
        let addr = match place {
            Place::Lit(addr) => addr,
            Place::Area(area, start) => self.world.area(area) + u64::from(start),
        };
        let result = self.world.call(call.other, call.command, addr, call.count);
        self.see("result", 0, result.cast_unsigned());
        if matches!(op, Op::SetupTable | Op::SetVersion) {
            self.world.refresh();
        }
        self.lost[usize::from(call.other)] |= op == Op::MapGrantRef && result == FAULT;
        if let Place::Area(area, start) = place {
            for item in 0..total {
                let values = &given[usize::try_from(item).unwrap_or(0) % items];
                let offset = u64::from(start) + item * size as u64;
                if is_backed(area, offset, size as u64) {
                    let mut was = [FILL; 40];
                    self.lay_out(layout, values, item, &mut was);
                    let mut is = [FILL; 40];
                    self.world.peek(area, offset, &mut is[..size]);
                    self.compare(op, item, &was, &is);
                    if op == Op::Transfer && is[16..18] == [0, 0] && was[16..18] != [0, 0] {
                        self.remember_received(load(&was, fields(op)[0]));
                    }
                }
            }
        }
        if listed {
            self.look_at_list(list);
        }
        if op == Op::Transfer {
            self.transferred = true;
            self.look_at_spares();
        }
        if op == Op::Copy {
            self.pages_changed = true;
            self.look_at_pages();
        }
    }

    /// A spare page is gone, and its frame may come again as anything: no entry is to name it.
    fn forget(&mut self, spare: u64) {
        self.gone |= 1 << spare;
        for other in [false, true] {
            let (size, at) = if self.world.version(other) == 2 {
                (16, 8)
            } else {
                (8, 4)
            };
            for gref in WATCHED.into_iter().map(u64::from) {
                let place = gref * size + at;
                if (gref + 1) * size > self.world.table_bytes(other) {
                    break;
                }
                let mut bytes = [0; 8];
                let wide = usize::try_from(size - at).unwrap_or(8);
                self.world.table_load(other, place, &mut bytes[..wide]);
                if self.world.frame(SPARE + spare) == Some(word(&bytes)) {
                    let width = if wide == 8 { 8 } else { 4 };
                    self.world.table_store(other, place, width, NO_FRAME);
                }
            }
        }
    }

    fn remember_received(&mut self, frame: u64) {
        if let Some(name) = self.world.name(frame)
            && (SPARE..SPARE + SPARES).contains(&name)
        {
            self.received |= 1 << (name - SPARE);
        }
    }

    /// Whose the spare pages are, and under which number those that came by transfer.
    fn look_at_spares(&mut self) {
        for spare in 0..SPARES {
            let mut owner = None;
            if self.gone & 1 << spare == 0 {
                owner = self.world.owner(spare);
                if owner.is_none() {
                    self.forget(spare);
                }
            }
            self.see("owner of spare", spare, owner.map_or(2, u64::from));
            if owner.is_some() && self.received & 1 << spare != 0 {
                let physical = self.world.physical(spare);
                let physical = self.name(physical);
                self.see("number of spare", spare, physical);
            }
        }
    }

    fn lay_out(&self, layout: &[Field], values: &[Value; MOST_FIELDS], item: u64, bytes: &mut [u8; 40]) {
        for (field, value) in layout.iter().zip(values) {
            let value = self.value(*value, item).to_le_bytes();
            bytes[field.offset..field.offset + field.size].copy_from_slice(&value[..field.size]);
        }
    }

    /// What became of an argument, field by field.
    fn compare(&mut self, op: Op, item: u64, was: &[u8; 40], is: &[u8; 40]) {
        let okay = op == Op::MapGrantRef && is[18..20] == [0, 0] && was[18..20] != [0, 0];
        for field in fields(op) {
            let (before, after) = (load(was, *field), load(is, *field));
            let value = match (op, field.name) {
                (Op::MapGrantRef, "handle") if okay => {
                    let who = usize::from(self.acting);
                    if self.known[who] < MOST_HANDLES {
                        self.handles[who][self.known[who]] = u32::try_from(after).unwrap_or(NO_HANDLE);
                        self.known[who] += 1;
                    }
                    u64::from(self.known[who] < MOST_HANDLES)
                }
                (Op::MapGrantRef, "dev_bus_addr") if okay => self.name_addr(after),
                _ if before == after => UNCHANGED,
                _ => after,
            };
            self.see(field.name, item, value);
        }
        // What lies between the fields.
        let mut inside = 0_u64;
        for field in fields(op) {
            inside |= ((1 << field.size) - 1) << field.offset;
        }
        let mut between = 0;
        for (at, (was, is)) in was.iter().zip(is).enumerate() {
            if inside & 1 << at == 0 {
                between |= u64::from(was ^ is);
            }
        }
        self.see("padding", item, between);
    }

    /// The list that setup_table and get_status_frames fill, at both ends of its area.
    fn look_at_list(&mut self, list: u8) {
        for element in list_seen() {
            let mut bytes = [0; 8];
            self.world.peek(list, element * 8, &mut bytes);
            let name = self.name(u64::from_le_bytes(bytes));
            self.see("list", element, name);
        }
    }

    fn look_at_pages(&mut self) {
        let other = OTHER_PAGES..OTHER_PAGES + self.world.other_pages();
        for page in (0..PAGES).chain(other) {
            let digest = self.world.page_digest(page);
            self.see("page", page, digest);
        }
    }

    /// Everything that can be seen between two steps.
    fn look(&mut self) {
        self.look_at_table(false);
        self.look_at_table(true);
        // A dead domain's page tables are anybody's memory.
        for slot in 0..if self.killed { SLOTS } else { 2 * SLOTS } {
            let pte = self.world.pte(slot);
            let seen = if pte & PRESENT == 0 {
                0
            } else {
                (self.name((pte & PTE_FRAME) >> 12) << 12) | (pte & PTE_BITS)
            };
            self.see("slot", slot, seen);
        }
    }

    fn look_at_table(&mut self, other: bool) {
        let version = self.world.version(other);
        let bytes = self.world.table_bytes(other);
        self.see("version", u64::from(other), u64::from(version));
        self.see("table bytes", u64::from(other), bytes);
        let entry = if version == 2 { 16 } else { 8 };
        for gref in WATCHED.into_iter().map(u64::from) {
            if (gref + 1) * entry > bytes {
                break;
            }
            let mut words = [0; 16];
            let words = &mut words[..if version == 2 { 16 } else { 8 }];
            self.world.table_load(other, gref * entry, words);
            let (head, frame) = words.split_at(words.len() / 2);
            let (head, frame) = (word(head), word(frame));
            self.see(if other { "other's entry" } else { "entry" }, gref, head);
            let frame = self.name(frame);
            self.see("frame of entry", gref, frame);
            if version == 2 {
                let status = self.world.status_load(other, gref).map_or(UNCHANGED, u64::from);
                self.see("status word", gref, status);
            }
        }
    }

    // --- cleaning up ----------------------------------------------------------------------------

    /// Unmaps, as whoever acts: places, bus addresses and handles.
    fn unmap(&mut self, items: &[(u64, u64, u32)], statuses: &mut [i16]) {
        let area = if self.acting { OTHER_ARGUMENTS } else { 1 };
        for (index, (host, dev, handle)) in (0_u64..).zip(items) {
            let mut bytes = [0; 24];
            bytes[..8].copy_from_slice(&host.to_le_bytes());
            bytes[8..16].copy_from_slice(&dev.to_le_bytes());
            bytes[16..20].copy_from_slice(&handle.to_le_bytes());
            self.world.poke(area, index * 24, &bytes);
        }
        let (addr, count) = (self.world.area(area), items.len() as u64);
        self.world.call(self.acting, 1, addr, count);
        for (index, status) in (0_u64..).zip(&mut statuses[..items.len()]) {
            let mut bytes = [0; 2];
            self.world.peek(area, index * 24 + 20, &mut bytes);
            *status = i16::from_le_bytes(bytes);
        }
    }

    /// Which of some handles stand for a mapping, as bits: unmapping nothing of it says so. Each call
    /// is dear, the other domain's above all: one for all of them.
    fn live(&mut self, handles: &[u32]) -> u64 {
        let mut items = [(0, 0, 0); GROUP];
        let mut statuses = [0; GROUP];
        for (item, handle) in items.iter_mut().zip(handles) {
            item.2 = *handle;
        }
        let handles = handles.len().min(GROUP);
        if handles > 0 {
            self.unmap(&items[..handles], &mut statuses);
        }
        let live = (0..handles).filter(|at| statuses[*at] == 0);
        live.fold(0, |bits, at| bits | 1 << at)
    }

    /// Ends every mapping of a domain's that is left; how many there were, and how many are left.
    fn end_mappings(&mut self, other: bool) -> (u64, u64) {
        self.acting = other;
        let who = usize::from(other);
        let mut most = 0;
        for handle in &self.handles[who][..self.known[who]] {
            if *handle != NO_HANDLE {
                most = most.max(*handle + 1);
            }
        }
        let (mut live, mut left) = (0, 0);
        let mut group = ([0; GROUP], 0);
        let mut add = |play: &mut Self, handle: Option<u32>| {
            if let Some(handle) = handle {
                group.0[group.1] = handle;
                group.1 += 1;
            }
            if group.1 == GROUP || handle.is_none() {
                let bits = play.live(&group.0[..group.1]);
                live += u64::from(bits.count_ones());
                left += play.end_group(&group.0, bits);
                group.1 = 0;
            }
        };
        if self.lost[who] {
            // Handles are dense: one that was not told is near those that were.
            for handle in 0..(most + 512).next_multiple_of(256) {
                add(self, Some(handle));
            }
        } else {
            let mut known = [0_u64; KNOWN / 64];
            for index in 0..self.known[who] {
                let handle = self.handles[who][index];
                let again = match known.get_mut(handle as usize / 64) {
                    Some(word) => {
                        let bit = 1 << (handle % 64);
                        let again = *word & bit != 0;
                        *word |= bit;
                        again
                    }
                    None => handle == NO_HANDLE || self.handles[who][..index].contains(&handle),
                };
                if !again {
                    add(self, Some(handle));
                }
            }
        }
        add(self, None);
        self.see("live mappings at the end", u64::from(other), live);
        self.see("mappings that could not be ended", u64::from(other), left);
        (live, left)
    }

    /// Makes a table as it was; the result of the change of version.
    fn empty_table(&mut self, other: bool) -> i64 {
        // First: a change to version 1 minds what stands in the reserved entries.
        let entry = if self.world.version(other) == 2 { 16 } else { 8 };
        for gref in WATCHED.into_iter().map(u64::from) {
            for at in (gref * entry..(gref + 1) * entry).step_by(8) {
                if at + 8 <= self.world.table_bytes(other) {
                    self.world.table_store(other, at, 8, 0);
                }
            }
        }
        let mut result = 0;
        if self.world.version(other) == 2 {
            let area = if other { OTHER_ARGUMENTS } else { 1 };
            self.world.release_status(other);
            self.world.poke(area, 0, &1_u32.to_le_bytes());
            let addr = self.world.area(area);
            result = self.world.call(other, 8, addr, 1);
            self.world.refresh();
        }
        self.see("back to version 1", u64::from(other), result.cast_unsigned());
        result
    }

    /// Ends what is left, says how much there was, and makes everything as it was.
    fn clean_up(&mut self) -> bool {
        let acts = !self.killed;
        let (_, mut left) = self.end_mappings(false);
        if acts {
            left += self.end_mappings(true).1;
        }
        for slot in 0..if acts { 2 * SLOTS } else { SLOTS } {
            if self.world.pte(slot) & PRESENT != 0 {
                self.world.set_pte(slot, None);
            }
        }
        let mut failed = self.empty_table(false);
        if acts {
            failed |= self.empty_table(true);
            if self.transferred {
                self.world.reset_spares(self.gone);
            }
        }
        if self.pages_changed {
            let other = OTHER_PAGES..OTHER_PAGES + self.world.other_pages();
            for page in (0..PAGES).chain(other) {
                self.world.reset_page(page);
            }
        }
        left == 0 && failed == 0 && acts
    }

    /// Ends those of some mappings that are live, wherever they are; how many are left.
    fn end_group(&mut self, handles: &[u32; GROUP], mut live: u64) -> u64 {
        let mut left = 0;
        while live != 0 {
            // As many at once as there is room for.
            let mut items = [(0, 0, 0); ENDED * PLACES];
            let (mut ends, mut used) = ([0; ENDED], 0);
            while live != 0 && used < ENDED {
                let handle = handles[live.trailing_zeros() as usize];
                live &= live - 1;
                self.places(handle, &mut items[used * PLACES..][..PLACES]);
                ends[used] = handle;
                used += 1;
            }
            let mut statuses = [0; ENDED * PLACES];
            self.unmap(&items[..used * PLACES], &mut statuses);
            for (handle, statuses) in ends[..used].iter().zip(statuses.chunks(PLACES)) {
                if statuses[PLACES - 1] == 0 {
                    left += u64::from(!self.end_lost(*handle));
                }
            }
        }
        left
    }

    /// Where a mapping may be: at each of its domain's slots, by either name of it. Then a look
    /// whether there is still one.
    fn places(&self, handle: u32, items: &mut [(u64, u64, u32)]) {
        let first = if self.acting { SLOTS } else { 0 };
        for (pair, slot) in items.chunks_mut(2).zip(first..first + SLOTS) {
            pair[0] = (self.world.slot(slot), 0, handle);
            pair[1] = (self.world.pte_addr(slot), 0, handle);
        }
        items[PLACES - 1] = (0, 0, handle);
    }

    /// Ends a mapping for a device, or one whose page-table entry is gone: that is made again, with
    /// all pages in turn.
    fn end_lost(&mut self, handle: u32) -> bool {
        let first = if self.acting { SLOTS } else { 0 };
        let other = OTHER_PAGES..OTHER_PAGES + self.world.other_pages();
        let named = || {
            (0..=OTHER_SLOTS_TABLE)
                .chain(other.clone())
                .chain(SPARE..SPARE + SPARES)
                .chain([TABLE, STATUS, OTHER_TABLE, OTHER_STATUS])
        };
        let mut items = [(0, 0, handle); GROUP];
        let mut statuses = [0; GROUP];
        let frames = named().filter_map(|page| self.world.frame(page));
        let mut asked = 0;
        for (item, frame) in items[..GROUP - 1].iter_mut().zip(frames) {
            item.1 = frame << 12;
            asked += 1;
        }
        self.unmap(&items[..=asked], &mut statuses);
        if statuses[asked] != 0 {
            return true;
        }
        let mut items = [(0, 0, 0); PLACES];
        self.places(handle, &mut items);
        for writable in [true, false] {
            let mut pages = named();
            loop {
                let mut slots = 0;
                for (slot, page) in (first..first + SLOTS).zip(pages.by_ref()) {
                    self.world.set_pte(slot, None);
                    self.world.set_pte(slot, Some((page, writable)));
                    slots += 1;
                }
                if slots == 0 {
                    break;
                }
                self.unmap(&items, &mut statuses);
                if statuses[PLACES - 1] != 0 {
                    return true;
                }
            }
        }
        false
    }
}

/// Says that a field is as it was.
const UNCHANGED: u64 = 0xFFFF_FFFF_FFFF_FFFE;
/// Most arguments that a call gives one by one.
const MOST_ITEMS: usize = 16;
/// Handles that are asked after at once.
const GROUP: usize = 64;
/// Mappings that are ended at once.
const ENDED: usize = 16;
/// Where a mapping may be, and one more to see whether it is there.
const PLACES: usize = 33;
const _: () = assert!(PLACES as u64 == 2 * SLOTS + 1);
/// Handles below this are known again by a bit.
const KNOWN: usize = 0x8000;
const _: () = assert!((ENDED * PLACES) as u64 * 24 <= AREA_END);
/// Where an area of lists ends.
const AREA_END: u64 = crate::script::AREA_PAGES * 4096;

/// The elements of a list that are looked at: those at both ends of its area.
fn list_seen() -> impl Iterator<Item = u64> {
    let end = AREA_END / 8;
    (0..LIST_SEEN).chain(end - LIST_SEEN..end)
}

fn load(bytes: &[u8; 40], field: Field) -> u64 {
    word(&bytes[field.offset..field.offset + field.size])
}

/// A little-endian number of up to 8 bytes.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Adds a word to the digest of a page's content: not more than an emulated processor does in a moment.
#[must_use]
pub const fn mix(digest: u64, word: u64) -> u64 {
    digest.rotate_left(23).wrapping_add(word)
}

/// A word of what a page holds at the start.
#[must_use]
pub const fn pattern(page: u64, word: u64) -> u64 {
    (page + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ word.wrapping_mul(0xD6E8_FEB8_6659_FD93)
}
