//! Seeing whether the raw door keeps to what it may touch of a guest's memory.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use gnttab_abi::{
    Abi, Copy, DumpTable, GetStatusFrames, GetVersion, MapGrantRef, Op, QuerySize, SetVersion, SetupTable,
    SwapGrantRef, Transfer, UnmapAndReplace, UnmapGrantRef,
};
use spin::Mutex;

use super::audit::{Audit, Violation};
use crate::door::{Call, Fault, GuestMemory};

/// A caller's memory with a fence around what a call may write, and an eye on what it reads twice
/// (AUD-BUF).
///
/// ```
/// use gnttab_abi::{Abi, Command};
/// use gnttab_engine::machine::{C, Fenced, Scene};
/// use gnttab_engine::{Call, GuestMemory};
///
/// let scene = Scene::pv().build();
/// let domain = scene.domain(C);
/// domain.private().add_memory(0x5000_0000, 1).unwrap();
/// let call = Call { command: Command(6), addr: 0x5000_0000, count: 1 };
/// let memory = Fenced::around(domain.private(), Abi::X86_64, call);
/// scene.processor().hypercall(&scene.vcpu(C, 0), Abi::X86_64, call, &memory, &mut || false);
/// assert_eq!(memory.audit(), []);
/// ```
pub struct Fenced<'a> {
    memory: &'a dyn GuestMemory,
    /// Where bytes may change.
    open: Vec<Range<u64>>,
    log: Mutex<Log>,
    /// Items and list elements of the call.
    items: u64,
    /// More accesses than this are an endless loop (AUD-WRK).
    most: u64,
}

#[derive(Default)]
struct Log {
    read: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    accesses: u64,
    found: Vec<Violation>,
}

/// Accesses that a call may make for each of its items and list elements, and for itself.
const PER_ITEM: u64 = 4;

impl<'a> Fenced<'a> {
    /// The fence for one call: open at the OUT fields that the interface documents (spec 1.8), and
    /// at the list that a call names.
    pub fn around(memory: &'a dyn GuestMemory, abi: Abi, call: Call) -> Fenced<'a> {
        let mut open = Vec::new();
        let mut items = u64::from(call.count);
        if let Some(op) = call.command.op() {
            let size = op.arg_size(abi) as u64;
            if matches!(op, Op::SetVersion | Op::GetVersion) {
                // They ignore the count (spec 3.1.5).
                items = 1;
            }
            for index in 0..items.min(1 << 16) {
                let item = call.addr.wrapping_add(index * size);
                for (_, offset, len) in outs(op, abi) {
                    let start = item.wrapping_add(offset as u64);
                    open.push(start..start.wrapping_add(len as u64));
                }
            }
            if let Some((list, elements, width)) = list_of(memory, op, abi, call.addr) {
                open.push(list..list.wrapping_add(u64::from(elements) * width));
                items += u64::from(elements);
            }
        }
        Fenced {
            items,
            ..Fenced::allowing(memory, open, PER_ITEM * (items + 1))
        }
    }

    /// A fence that is open at these addresses, for a call that may make so many accesses.
    #[must_use]
    pub fn allowing(memory: &'a dyn GuestMemory, open: Vec<Range<u64>>, most: u64) -> Fenced<'a> {
        Fenced {
            memory,
            open,
            log: Mutex::default(),
            items: 0,
            most,
        }
    }

    /// What the call did that it must not. Empty: nothing.
    #[must_use]
    pub fn audit(&self) -> Vec<Violation> {
        self.log.lock().found.clone()
    }

    /// Items of the call, and elements of the list that it names: what its cost may grow with.
    #[must_use]
    pub fn items(&self) -> u64 {
        self.items
    }

    /// Where the call wrote, in order.
    #[must_use]
    pub fn written(&self) -> Vec<Range<u64>> {
        self.log.lock().written.clone()
    }

    fn report(&self, audit: Audit, what: String) {
        self.log.lock().found.push(Violation {
            audit,
            mfn: None,
            what,
        });
    }

    /// # Panics
    /// If the call goes on for ever: nothing else would end it.
    fn count(&self) {
        let mut log = self.log.lock();
        log.accesses += 1;
        let accesses = log.accesses;
        drop(log);
        assert!(
            accesses <= self.most,
            "AUD-WRK: {accesses} accesses to guest memory in one call"
        );
    }

    fn is_open(&self, at: u64) -> bool {
        self.open.iter().any(|range| range.contains(&at))
    }
}

impl GuestMemory for Fenced<'_> {
    fn plausible(&self, addr: u64, bytes: u64) -> bool {
        self.memory.plausible(addr, bytes)
    }

    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.count();
        let range = addr..addr.wrapping_add(into.len() as u64);
        let again = {
            let mut log = self.log.lock();
            let overlaps = |seen: &Range<u64>| seen.start < range.end && range.start < seen.end;
            let again = log.read.iter().any(overlaps);
            log.read.push(range);
            again
        };
        if again {
            self.report(Audit::Buffers, format!("bytes at {addr:#x} were read twice"));
        }
        self.memory.read(addr, into)
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.count();
        let mut before = vec![0; bytes.len()];
        let known = self.memory.read(addr, &mut before).is_ok();
        for ((new, old), at) in bytes.iter().zip(&before).zip(addr..) {
            if !self.is_open(at) && (!known || new != old) {
                self.report(
                    Audit::Buffers,
                    format!("the byte at {at:#x} is no OUT field, but changed"),
                );
                break;
            }
        }
        let end = addr.wrapping_add(bytes.len() as u64);
        self.log.lock().written.push(addr..end);
        self.memory.write(addr, bytes)
    }

    /// Not counted: what is seen ahead of its turn is not what is judged.
    fn peek(&self, addr: u64, into: &mut [u8]) -> bool {
        self.memory.peek(addr, into)
    }

    fn print(&self, text: &str) {
        self.memory.print(text);
    }
}

impl core::fmt::Debug for Fenced<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Fenced")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

/// Name, offset and size.
type Field = (&'static str, usize, usize);

/// The OUT fields of an operation's items.
fn outs(op: Op, abi: Abi) -> impl Iterator<Item = Field> {
    let fields: &'static [Field] = match op {
        Op::MapGrantRef => MapGrantRef::fields(abi),
        Op::UnmapGrantRef => UnmapGrantRef::fields(abi),
        Op::SetupTable => SetupTable::fields(abi),
        Op::DumpTable => DumpTable::fields(abi),
        Op::Transfer => Transfer::fields(abi),
        Op::Copy => Copy::fields(abi),
        Op::QuerySize => QuerySize::fields(abi),
        Op::UnmapAndReplace => UnmapAndReplace::fields(abi),
        Op::SetVersion => SetVersion::fields(abi),
        Op::GetStatusFrames => GetStatusFrames::fields(abi),
        Op::GetVersion => GetVersion::fields(abi),
        Op::SwapGrantRef => SwapGrantRef::fields(abi),
        Op::CacheFlush => &[],
    };
    let is_out = move |field: &Field| match field.0 {
        "status" => true,
        "handle" | "dev_bus_addr" => op == Op::MapGrantRef,
        "nr_frames" | "max_nr_frames" => op == Op::QuerySize,
        "version" => matches!(op, Op::SetVersion | Op::GetVersion),
        _ => false,
    };
    fields.iter().copied().filter(is_out)
}

/// The list that an operation fills: where, how many elements, and how wide each.
fn list_of(memory: &dyn GuestMemory, op: Op, abi: Abi, addr: u64) -> Option<(u64, u32, u64)> {
    let mut raw = [0; 24];
    let bytes = raw.get_mut(..op.arg_size(abi))?;
    match op {
        Op::SetupTable => {
            memory.read(addr, bytes).ok()?;
            let item = SetupTable::decode(abi, bytes).ok()?;
            Some((item.frame_list, item.nr_frames, abi.word_size() as u64))
        }
        Op::GetStatusFrames => {
            memory.read(addr, bytes).ok()?;
            let item = GetStatusFrames::decode(abi, bytes).ok()?;
            Some((item.frame_list, item.nr_frames, 8))
        }
        _ => None,
    }
}
