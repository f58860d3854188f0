//! A grant-table hypercall with its arguments, typed, and its raw form.

use gnttab_abi::{
    Abi, CacheFlush, Command, Copy, DumpTable, EncodeError, GetStatusFrames, GetVersion, MapGrantRef, Op,
    QuerySize, SetVersion, SetupTable, SwapGrantRef, Transfer, Truncated, UnmapAndReplace, UnmapGrantRef,
};

/// One `grant_table_op` hypercall: an operation and the items it is asked to do.
///
/// Who makes it fills in the OUT fields of every item that the hypervisor answered.
#[derive(Debug)]
pub enum Call<'a> {
    /// Map others' pages.
    Map(&'a mut [MapGrantRef]),
    /// Undo mappings.
    Unmap(&'a mut [UnmapGrantRef]),
    /// Learn the first `arg.nr_frames` frames of the table, and enlarge it to so many.
    SetupTable {
        /// The argument; `frame_list` is left to whoever encodes it.
        arg: &'a mut SetupTable,
        /// Receives the frame numbers; at least `arg.nr_frames` of them.
        frames: &'a mut [u64],
    },
    /// Print tables.
    DumpTable(&'a mut [DumpTable]),
    /// Give pages away.
    Transfer(&'a mut [Transfer]),
    /// Copy bytes through grants.
    Copy(&'a mut [Copy]),
    /// Ask for the size of a table.
    QuerySize(&'a mut QuerySize),
    /// Undo mappings and put others in their place.
    UnmapAndReplace(&'a mut [UnmapAndReplace]),
    /// Choose the version of the own table.
    SetVersion(&'a mut SetVersion),
    /// Learn the first `arg.nr_frames` status frames.
    GetStatusFrames {
        /// The argument; `frame_list` is left to whoever encodes it.
        arg: &'a mut GetStatusFrames,
        /// Receives the frame numbers; at least `arg.nr_frames` of them.
        frames: &'a mut [u64],
    },
    /// Ask for the version of a table.
    GetVersion(&'a mut GetVersion),
    /// Exchange entries of the own table.
    Swap(&'a mut [SwapGrantRef]),
    /// Maintain caches.
    CacheFlush(&'a mut [CacheFlush]),
}

/// What to put in the registers for a call that was encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawCall {
    /// The command.
    pub command: Command,
    /// How many items lie at the start of the buffer.
    pub count: u32,
    /// Bytes of the buffer that the call uses, from its start.
    pub len: usize,
}

/// A call has no raw form, or its raw form cannot be read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RawCallError {
    /// An item does not fit the buffer or the ABI.
    #[error("{op}: {source}", op = .op.name())]
    Item {
        /// The operation.
        op: Op,
        /// What does not fit.
        source: EncodeError,
    },
    /// More items than a hypercall can count.
    #[error("{op}: {items} items are more than one hypercall takes", op = .op.name())]
    TooMany {
        /// The operation.
        op: Op,
        /// How many there are.
        items: usize,
    },
    /// The list for frame numbers is shorter than what is asked for.
    #[error("{op}: {nr_frames} frames are asked for, the list has room for {room}", op = .op.name())]
    ListTooShort {
        /// The operation.
        op: Op,
        /// How many frames are asked for.
        nr_frames: u32,
        /// How many the list can receive.
        room: usize,
    },
}

/// A list of frame numbers starts at a multiple of this, whatever the ABI.
const LIST_ALIGN: usize = 8;

/// Runs an expression for the slice of items of a call, whatever their type.
macro_rules! for_items {
    ($call:expr, $items:ident => $each:expr) => {
        match $call {
            Call::Map($items) => $each,
            Call::Unmap($items) => $each,
            Call::DumpTable($items) => $each,
            Call::Transfer($items) => $each,
            Call::Copy($items) => $each,
            Call::UnmapAndReplace($items) => $each,
            Call::Swap($items) => $each,
            Call::CacheFlush($items) => $each,
            Call::QuerySize(arg) => {
                let $items = core::slice::from_mut(&mut **arg);
                $each
            }
            Call::SetVersion(arg) => {
                let $items = core::slice::from_mut(&mut **arg);
                $each
            }
            Call::GetVersion(arg) => {
                let $items = core::slice::from_mut(&mut **arg);
                $each
            }
            Call::SetupTable { arg, .. } => {
                let $items = core::slice::from_mut(&mut **arg);
                $each
            }
            Call::GetStatusFrames { arg, .. } => {
                let $items = core::slice::from_mut(&mut **arg);
                $each
            }
        }
    };
}

impl Call<'_> {
    /// The operation.
    #[must_use]
    pub const fn op(&self) -> Op {
        match self {
            Call::Map(_) => Op::MapGrantRef,
            Call::Unmap(_) => Op::UnmapGrantRef,
            Call::SetupTable { .. } => Op::SetupTable,
            Call::DumpTable(_) => Op::DumpTable,
            Call::Transfer(_) => Op::Transfer,
            Call::Copy(_) => Op::Copy,
            Call::QuerySize(_) => Op::QuerySize,
            Call::UnmapAndReplace(_) => Op::UnmapAndReplace,
            Call::SetVersion(_) => Op::SetVersion,
            Call::GetStatusFrames { .. } => Op::GetStatusFrames,
            Call::GetVersion(_) => Op::GetVersion,
            Call::Swap(_) => Op::SwapGrantRef,
            Call::CacheFlush(_) => Op::CacheFlush,
        }
    }

    /// Writes the items, and room for a list of frames, to the start of `bytes`. `address` is
    /// where the hypervisor finds `bytes`: a guest address, for the pointer to the list.
    ///
    /// # Errors
    /// [`RawCallError`]; the content of `bytes` is then of no use.
    ///
    /// ```
    /// use gnttab_abi::{Abi, DomId, GrantRef, GrantStatus, MapFlags, MapGrantRef, Op};
    /// use gnttab_guest::Call;
    ///
    /// let mut maps = [MapGrantRef {
    ///     host_addr: 0x4000_0000,
    ///     flags: MapFlags::HOST_MAP,
    ///     gref: GrantRef(9),
    ///     dom: DomId(1),
    ///     ..MapGrantRef::default()
    /// }];
    /// let mut call = Call::Map(&mut maps);
    /// let mut bytes = [0; 4096];
    /// let raw = call.encode(Abi::X86_64, 0x1000, &mut bytes)?;
    /// assert_eq!((raw.command.op(), raw.count, raw.len), (Some(Op::MapGrantRef), 1, 32));
    ///
    /// // The hypervisor answers in place: status bad_gntref.
    /// bytes[18..20].copy_from_slice(&(-3i16).to_le_bytes());
    /// call.decode(Abi::X86_64, &bytes)?;
    /// assert_eq!(maps[0].status, GrantStatus::BAD_GNTREF);
    /// # Ok::<(), gnttab_guest::RawCallError>(())
    /// ```
    pub fn encode(&mut self, abi: Abi, address: u64, bytes: &mut [u8]) -> Result<RawCall, RawCallError> {
        let op = self.op();
        let list = self.list(abi)?;
        self.set_frame_list(address.wrapping_add(list.at.try_into().unwrap_or(0)));
        let (items, mut len) = for_items!(self, items => {
            let mut rest = &mut bytes[..];
            let mut len = 0;
            for item in items.iter() {
                item.encode(abi, rest).map_err(|source| RawCallError::Item { op, source })?;
                let size = item.size_in(abi);
                rest = rest.get_mut(size..).unwrap_or_default();
                len += size;
            }
            (items.len(), len)
        });
        if list.len > 0 {
            len = list.at + list.len;
            let got = bytes.len();
            bytes
                .get_mut(list.at..len)
                .ok_or_else(|| short(op, len, got))?
                .fill(0);
        }
        // The hypercall's count is a signed 32-bit number.
        let count = match u32::try_from(items) {
            Ok(count) if count <= i32::MAX.unsigned_abs() => count,
            _ => return Err(RawCallError::TooMany { op, items }),
        };
        Ok(RawCall {
            command: Command::new(op),
            count,
            len,
        })
    }

    /// Reads back what the hypervisor answered. `bytes` is what [`Call::encode`] wrote, after the
    /// hypercall.
    ///
    /// # Errors
    /// [`RawCallError`] if `bytes` is shorter than what was encoded.
    pub fn decode(&mut self, abi: Abi, bytes: &[u8]) -> Result<(), RawCallError> {
        let op = self.op();
        let list = self.list(abi)?;
        for_items!(self, items => {
            let mut rest = bytes;
            for item in items.iter_mut() {
                item.answer(abi, rest).map_err(|source| RawCallError::Item { op, source: source.into() })?;
                rest = rest.get(item.size_in(abi)..).unwrap_or_default();
            }
        });
        if let (true, Call::SetupTable { frames, .. } | Call::GetStatusFrames { frames, .. }) =
            (list.len > 0, &mut *self)
        {
            let end = list.at + list.len;
            let numbers = bytes
                .get(list.at..end)
                .ok_or_else(|| short(op, end, bytes.len()))?;
            for (frame, number) in frames.iter_mut().zip(numbers.chunks_exact(list.word)) {
                let mut wide = [0; 8];
                wide[..list.word].copy_from_slice(number);
                *frame = u64::from_le_bytes(wide);
            }
        }
        Ok(())
    }

    /// Where the list of frame numbers lies in the buffer; empty for most operations.
    fn list(&self, abi: Abi) -> Result<List, RawCallError> {
        let op = self.op();
        let (nr_frames, room, size, word) = match self {
            Call::SetupTable { arg, frames } => (
                arg.nr_frames,
                frames.len(),
                SetupTable::size(abi),
                abi.word_size(),
            ),
            Call::GetStatusFrames { arg, frames } => (
                arg.nr_frames,
                frames.len(),
                GetStatusFrames::size(abi),
                size_of::<u64>(),
            ),
            _ => {
                return Ok(List {
                    at: 0,
                    len: 0,
                    word: size_of::<u64>(),
                });
            }
        };
        let at = size.next_multiple_of(LIST_ALIGN);
        match usize::try_from(nr_frames) {
            // As many numbers as a slice holds have a length that fits.
            Ok(numbers) if numbers <= room => Ok(List {
                at,
                len: numbers * word,
                word,
            }),
            _ => Err(RawCallError::ListTooShort { op, nr_frames, room }),
        }
    }

    fn set_frame_list(&mut self, address: u64) {
        match self {
            Call::SetupTable { arg, .. } => arg.frame_list = address,
            Call::GetStatusFrames { arg, .. } => arg.frame_list = address,
            _ => {}
        }
    }
}

/// A list of frame numbers in the buffer: offset, length and width of a number, in bytes.
struct List {
    at: usize,
    len: usize,
    word: usize,
}

fn short(op: Op, needed: usize, got: usize) -> RawCallError {
    RawCallError::Item {
        op,
        source: Truncated { needed, got }.into(),
    }
}

/// An item of some operation.
trait Item: Sized {
    fn size_in(&self, abi: Abi) -> usize;
    /// Takes the OUT fields from the bytes; what this program asked for stays as it was.
    fn answer(&mut self, abi: Abi, bytes: &[u8]) -> Result<(), Truncated>;
}

macro_rules! items {
    ($($name:ident { $($out:ident),* })*) => {$(
        impl Item for $name {
            fn size_in(&self, abi: Abi) -> usize {
                $name::size(abi)
            }
            fn answer(&mut self, abi: Abi, bytes: &[u8]) -> Result<(), Truncated> {
                let _answer = $name::decode(abi, bytes)?;
                $(self.$out = _answer.$out;)*
                Ok(())
            }
        }
    )*};
}
items! {
    MapGrantRef { status, handle, dev_bus_addr }
    UnmapGrantRef { status }
    SetupTable { status }
    DumpTable { status }
    Transfer { status }
    Copy { status }
    QuerySize { nr_frames, max_nr_frames, status }
    UnmapAndReplace { status }
    SetVersion { version }
    GetStatusFrames { status }
    GetVersion { version }
    SwapGrantRef { status }
    CacheFlush {}
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use gnttab_abi::{CopyFlags, CopyPtr, DomId, GrantRef, GrantStatus};

    use super::*;

    #[test]
    fn a_frame_list_lies_behind_its_argument() {
        for (abi, at, word) in [(Abi::X86_64, 24, 8), (Abi::Arm, 24, 8), (Abi::X86_32, 16, 4)] {
            let mut arg = SetupTable {
                dom: DomId::SELF,
                nr_frames: 3,
                ..SetupTable::default()
            };
            let mut frames = [0; 3];
            let mut bytes = vec![0xaa; 64];
            let mut call = Call::SetupTable {
                arg: &mut arg,
                frames: &mut frames,
            };
            let raw = call.encode(abi, 0x5000, &mut bytes).unwrap();
            assert_eq!((raw.count, raw.len), (1, at + 3 * word));
            assert_eq!(
                SetupTable::decode(abi, &bytes).unwrap().frame_list,
                0x5000 + at as u64
            );
            for (i, number) in bytes[at..at + 3 * word].chunks_exact_mut(word).enumerate() {
                number[0] = 0x70 + u8::try_from(i).unwrap();
            }
            call.decode(abi, &bytes).unwrap();
            assert_eq!(frames, [0x70, 0x71, 0x72]);
        }
    }

    #[test]
    fn status_frames_are_64_bit_in_every_abi() {
        for abi in Abi::ALL {
            let mut arg = GetStatusFrames {
                nr_frames: 2,
                ..GetStatusFrames::default()
            };
            let mut frames = [0; 2];
            let mut bytes = vec![0; 64];
            let mut call = Call::GetStatusFrames {
                arg: &mut arg,
                frames: &mut frames,
            };
            assert_eq!(call.encode(abi, 0, &mut bytes).unwrap().len, 16 + 16);
            bytes[24..32].copy_from_slice(&0x1_0000_0002u64.to_le_bytes());
            call.decode(abi, &bytes).unwrap();
            assert_eq!(frames, [0, 0x1_0000_0002]);
        }
    }

    #[test]
    fn only_out_fields_come_back() {
        let mut items = [Copy {
            source: CopyPtr::grant(DomId(3), GrantRef(9), 4),
            len: 16,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        }];
        let asked = items[0];
        let mut bytes = [0; 40];
        let mut call = Call::Copy(&mut items);
        call.encode(Abi::X86_64, 0, &mut bytes).unwrap();
        bytes.fill(0xff);
        call.decode(Abi::X86_64, &bytes).unwrap();
        assert_eq!(
            items[0],
            Copy {
                status: GrantStatus(-1),
                ..asked
            }
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut items = [MapGrantRef::default(); 3];
        let mut bytes = [0; 95];
        let error = Call::Map(&mut items)
            .encode(Abi::X86_64, 0, &mut bytes)
            .unwrap_err();
        assert!(
            matches!(
                error,
                RawCallError::Item {
                    op: Op::MapGrantRef,
                    ..
                }
            ),
            "{error}"
        );

        let mut arg = SetupTable {
            nr_frames: 3,
            ..SetupTable::default()
        };
        let mut call = Call::SetupTable {
            arg: &mut arg,
            frames: &mut [0; 2],
        };
        let error = call.encode(Abi::X86_64, 0, &mut bytes).unwrap_err();
        assert!(
            matches!(
                error,
                RawCallError::ListTooShort {
                    nr_frames: 3,
                    room: 2,
                    ..
                }
            ),
            "{error}"
        );
        assert!(call.decode(Abi::X86_64, &bytes).is_err());
    }

    #[test]
    fn every_operation_has_its_number_and_size() {
        let mut bytes = [0; 64];
        let mut check = |mut call: Call<'_>, number: u32, size: usize| {
            let raw = call.encode(Abi::X86_64, 0, &mut bytes).unwrap();
            assert_eq!((raw.command.0, raw.count, raw.len), (number, 1, size));
            call.decode(Abi::X86_64, &bytes).unwrap();
        };
        check(Call::Map(&mut [MapGrantRef::default()]), 0, 32);
        check(Call::Unmap(&mut [UnmapGrantRef::default()]), 1, 24);
        check(
            Call::SetupTable {
                arg: &mut SetupTable::default(),
                frames: &mut [],
            },
            2,
            24,
        );
        check(Call::DumpTable(&mut [DumpTable::default()]), 3, 4);
        check(Call::Transfer(&mut [Transfer::default()]), 4, 24);
        check(Call::Copy(&mut [Copy::default()]), 5, 40);
        check(Call::QuerySize(&mut QuerySize::default()), 6, 16);
        check(Call::UnmapAndReplace(&mut [UnmapAndReplace::default()]), 7, 24);
        check(Call::SetVersion(&mut SetVersion::default()), 8, 4);
        check(
            Call::GetStatusFrames {
                arg: &mut GetStatusFrames::default(),
                frames: &mut [],
            },
            9,
            16,
        );
        check(Call::GetVersion(&mut GetVersion::default()), 10, 8);
        check(Call::Swap(&mut [SwapGrantRef::default()]), 11, 12);
        check(Call::CacheFlush(&mut [CacheFlush::default()]), 12, 16);
    }
}
