//! Scripts: what a PV kernel does, step by step, in terms that both worlds understand.

use gnttab_abi::Op;

#[cfg(feature = "runner")]
use alloc::vec::Vec;

/// Pages of its own that the caller grants, copies and maps.
pub const PAGES: u64 = 8;
/// The name of the level-1 table that holds the slots' entries.
pub const SLOTS_TABLE: u64 = 8;
/// The name of the other domain's.
pub const OTHER_SLOTS_TABLE: u64 = 9;
/// The names of the other domain's pages.
pub const OTHER_PAGES: u64 = 0x10;
/// The names of pages that nobody maps, for transfers.
pub const SPARE: u64 = 0x20;
/// So many of them: half the caller's, half the other domain's.
pub const SPARES: u64 = 8;
/// The names of the frames of the caller's table.
pub const TABLE: u64 = 0x100;
/// The names of the frames of the caller's status words.
pub const STATUS: u64 = 0x200;
/// The names of the frames of the other domain's table.
pub const OTHER_TABLE: u64 = 0x300;
/// The names of the frames of the other domain's status words.
pub const OTHER_STATUS: u64 = 0x400;
/// Places for mappings that each domain has: the caller's, then the other's.
pub const SLOTS: u64 = 16;
/// Writable pages of an area; area 0 goes on with a page that is read-only, and all end with one
/// that is not mapped.
pub const AREA_PAGES: u64 = 16;
/// Areas: two of arguments and one of lists of frames, then the other domain's: one of each.
pub const AREAS: usize = 5;
/// The area of lists.
pub const LIST: u8 = 2;
/// The other domain's area of arguments.
pub const OTHER_ARGUMENTS: u8 = 3;
/// The other domain's area of lists.
pub const OTHER_LIST: u8 = 4;
/// A handle that nobody has.
pub const NO_HANDLE: u32 = 0x00FF_FFFE;
/// The number of the other domain.
pub const OTHER: u16 = 1;

/// Whether the bytes from an offset of an area are backed by memory, mapped or not.
#[must_use]
pub const fn is_backed(area: u8, offset: u64, len: u64) -> bool {
    let pages = if area == 0 { AREA_PAGES + 1 } else { AREA_PAGES };
    offset + len <= pages * 4096
}

/// A number as a script gives it: itself, or something that each world numbers as it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Itself.
    Lit(u64),
    /// Machine frame of a named page.
    Page(u64),
    /// Machine address in a named page: page and offset.
    PageAddr(u64, u16),
    /// Address of a slot, and an offset.
    Slot(u64, u16),
    /// Machine address of a slot's page-table entry, and an offset.
    Pte(u64, u16),
    /// The handle of the k-th successful map of the script by whoever makes the call, counted round.
    Handle(u64),
    /// The handle of the map with this number plus the item's.
    HandleSeq(u64),
    /// An address in an area: area and offset.
    Area(u8, u32),
}

/// Where a call's arguments are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In an area, from an offset on.
    Area(u8, u32),
    /// Nowhere: an address as it is.
    Lit(u64),
}

/// One field of an operation's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its offset in bytes.
    pub offset: usize,
    /// Its size in bytes.
    pub size: usize,
}

const fn field(name: &'static str, offset: usize, size: usize) -> Field {
    Field { name, offset, size }
}

/// The fields of an operation's argument, OUT fields included (spec 1.6, the 64-bit layout).
#[must_use]
pub const fn fields(op: Op) -> &'static [Field] {
    match op {
        Op::MapGrantRef => {
            const {
                &[
                    field("host_addr", 0, 8),
                    field("flags", 8, 4),
                    field("ref", 12, 4),
                    field("dom", 16, 2),
                    field("status", 18, 2),
                    field("handle", 20, 4),
                    field("dev_bus_addr", 24, 8),
                ]
            }
        }
        Op::UnmapGrantRef => {
            const {
                &[
                    field("host_addr", 0, 8),
                    field("dev_bus_addr", 8, 8),
                    field("handle", 16, 4),
                    field("status", 20, 2),
                ]
            }
        }
        Op::UnmapAndReplace => {
            const {
                &[
                    field("host_addr", 0, 8),
                    field("new_addr", 8, 8),
                    field("handle", 16, 4),
                    field("status", 20, 2),
                ]
            }
        }
        Op::SetupTable => {
            const {
                &[
                    field("dom", 0, 2),
                    field("nr_frames", 4, 4),
                    field("status", 8, 2),
                    field("frame_list", 16, 8),
                ]
            }
        }
        Op::DumpTable => const { &[field("dom", 0, 2), field("status", 2, 2)] },
        Op::Transfer => {
            const {
                &[
                    field("mfn", 0, 8),
                    field("domid", 8, 2),
                    field("ref", 12, 4),
                    field("status", 16, 2),
                ]
            }
        }
        Op::Copy => {
            const {
                &[
                    field("source", 0, 8),
                    field("source.domid", 8, 2),
                    field("source.offset", 10, 2),
                    field("dest", 16, 8),
                    field("dest.domid", 24, 2),
                    field("dest.offset", 26, 2),
                    field("len", 32, 2),
                    field("flags", 34, 2),
                    field("status", 36, 2),
                ]
            }
        }
        Op::QuerySize => {
            const {
                &[
                    field("dom", 0, 2),
                    field("nr_frames", 4, 4),
                    field("max_nr_frames", 8, 4),
                    field("status", 12, 2),
                ]
            }
        }
        Op::SetVersion => const { &[field("version", 0, 4)] },
        Op::GetStatusFrames => {
            const {
                &[
                    field("nr_frames", 0, 4),
                    field("dom", 4, 2),
                    field("status", 6, 2),
                    field("frame_list", 8, 8),
                ]
            }
        }
        Op::GetVersion => const { &[field("dom", 0, 2), field("pad", 2, 2), field("version", 4, 4)] },
        Op::SwapGrantRef => const { &[field("ref_a", 0, 4), field("ref_b", 4, 4), field("status", 8, 2)] },
        Op::CacheFlush => {
            const {
                &[
                    field("address", 0, 8),
                    field("offset", 8, 2),
                    field("length", 10, 2),
                    field("op", 12, 4),
                ]
            }
        }
    }
}

/// Most fields that an argument has.
pub const MOST_FIELDS: usize = 9;

/// The call step, without its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallHead {
    /// The other domain makes it.
    pub other: bool,
    /// The command register.
    pub command: u64,
    /// The operation whose arguments are laid out.
    pub op: Op,
    /// Where.
    pub place: Place,
    /// The count register.
    pub count: u64,
    /// Arguments laid out: the given ones, one after the other and round again.
    pub total: u16,
    /// Arguments given.
    pub items: u16,
}

/// What a step says, but for a call's items, which follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A grant-table hypercall.
    Call(CallHead),
    /// A store of 1, 2, 4 or 8 bytes into a shared table.
    Entry {
        /// Of the other domain, not of the caller.
        other: bool,
        /// Only while the table has this version: in the other one the bytes mean something else.
        version: u8,
        /// Where in the table, in bytes.
        offset: u32,
        /// Bytes.
        size: u8,
        /// What.
        value: Value,
    },
    /// A store of 2 bytes into a table's status words.
    StatusWord {
        /// Of the other domain, not of the caller.
        other: bool,
        /// Which.
        index: u32,
        /// What.
        value: u16,
    },
    /// A domain's own change of a slot's page-table entry.
    SetPte {
        /// Which slot.
        slot: u8,
        /// A named page, or none with 0xFF.
        page: u8,
        /// Writable.
        writable: bool,
    },
    /// A byte read, and perhaps written, through a slot.
    Touch {
        /// Which slot.
        slot: u8,
        /// Where.
        offset: u16,
        /// What to store.
        write: Option<u8>,
    },
    /// The other domain is killed, whatever of its is mapped. There is no cleaning up after this.
    Kill,
    /// Keeps the status pages mapped through a change to version 1, or not.
    HoldStatus(bool),
}

/// Reads a script from its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// From the start.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let taken = self.bytes.get(self.at..self.at + N)?.try_into().ok()?;
        self.at += N;
        Some(taken)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The next value.
    pub fn value(&mut self) -> Option<Value> {
        let (kind, small, n) = (self.u8()?, self.u16()?, self.u64()?);
        Some(match kind {
            0 => Value::Lit(n),
            1 => Value::Page(n),
            2 => Value::PageAddr(n, small),
            3 => Value::Slot(n, small),
            4 => Value::Pte(n, small),
            5 => Value::Handle(n),
            6 => Value::HandleSeq(n),
            7 => Value::Area(u8::try_from(small).ok()?, u32::try_from(n).ok()?),
            _ => return None,
        })
    }

    /// The next step; `None` at the end.
    pub fn head(&mut self) -> Option<Head> {
        Some(match self.u8()? {
            1 => {
                let other = self.u8()? != 0;
                let command = self.u64()?;
                let op = Op::from_number(u32::from(self.u8()?))?;
                let place = match self.u8()? {
                    0xFF => Place::Lit(self.u64()?),
                    area => Place::Area(area, self.u32()?),
                };
                Head::Call(CallHead {
                    other,
                    command,
                    op,
                    place,
                    count: self.u64()?,
                    total: self.u16()?,
                    items: self.u16()?,
                })
            }
            2 => Head::Entry {
                other: self.u8()? != 0,
                version: self.u8()?,
                offset: self.u32()?,
                size: self.u8()?,
                value: self.value()?,
            },
            3 => Head::SetPte {
                slot: self.u8()?,
                page: self.u8()?,
                writable: self.u8()? != 0,
            },
            4 => Head::Touch {
                slot: self.u8()?,
                offset: self.u16()?,
                write: match self.u16()? {
                    0xFFFF => None,
                    byte => Some(byte.to_le_bytes()[0]),
                },
            },
            5 => Head::HoldStatus(self.u8()? != 0),
            6 => Head::StatusWord {
                other: self.u8()? != 0,
                index: self.u32()?,
                value: self.u16()?,
            },
            7 => Head::Kill,
            _ => return None,
        })
    }
}

/// One step of a script.
#[cfg(feature = "runner")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it says.
    pub head: Head,
    /// A call's arguments: for each, a value for each field.
    pub items: Vec<Vec<Value>>,
}

#[cfg(feature = "runner")]
impl Step {
    /// Writes the step's bytes.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self.head {
            Head::Call(call) => {
                to.extend([1, u8::from(call.other)]);
                to.extend(call.command.to_le_bytes());
                to.push(call.op as u8);
                match call.place {
                    Place::Lit(addr) => {
                        to.push(0xFF);
                        to.extend(addr.to_le_bytes());
                    }
                    Place::Area(area, offset) => {
                        to.push(area);
                        to.extend(offset.to_le_bytes());
                    }
                }
                to.extend(call.count.to_le_bytes());
                to.extend(call.total.to_le_bytes());
                to.extend(call.items.to_le_bytes());
                for value in self.items.iter().flatten() {
                    encode_value(*value, to);
                }
            }
            Head::Entry {
                other,
                version,
                offset,
                size,
                value,
            } => {
                to.extend([2, u8::from(other), version]);
                to.extend(offset.to_le_bytes());
                to.push(size);
                encode_value(value, to);
            }
            Head::SetPte { slot, page, writable } => to.extend([3, slot, page, u8::from(writable)]),
            Head::Touch { slot, offset, write } => {
                to.extend([4, slot]);
                to.extend(offset.to_le_bytes());
                to.extend(write.map_or(0xFFFF, u16::from).to_le_bytes());
            }
            Head::Kill => to.push(7),
            Head::HoldStatus(hold) => to.extend([5, u8::from(hold)]),
            Head::StatusWord { other, index, value } => {
                to.extend([6, u8::from(other)]);
                to.extend(index.to_le_bytes());
                to.extend(value.to_le_bytes());
            }
        }
    }
}

#[cfg(feature = "runner")]
fn encode_value(value: Value, to: &mut Vec<u8>) {
    let (kind, small, n) = match value {
        Value::Lit(n) => (0, 0, n),
        Value::Page(n) => (1, 0, n),
        Value::PageAddr(n, offset) => (2, offset, n),
        Value::Slot(n, offset) => (3, offset, n),
        Value::Pte(n, offset) => (4, offset, n),
        Value::Handle(n) => (5, 0, n),
        Value::HandleSeq(n) => (6, 0, n),
        Value::Area(area, offset) => (7, u16::from(area), u64::from(offset)),
    };
    to.push(kind);
    to.extend(u16::to_le_bytes(small));
    to.extend(n.to_le_bytes());
}
