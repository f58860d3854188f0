//! The domain as the surroundings of `gnttab-guest`: its three traits.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use gnttab_abi::{AddToPhysmap, Errno, GRANT_TABLE_OP, Gfn, MEMOP_ADD_TO_PHYSMAP, MapFlags, MapGrantRef};
use gnttab_guest::{Call, FrameKind, Grantee, Granter, Hypercall, Page, ReachError, TableFrame, reach};

use super::ram::RamPage;
use super::{Domain, Hosting, lock, single};
use crate::area::{BUFFER_SIZE, Request};
use crate::protocol::{self, ABI, NoticeKind};
use crate::sys::Access;

/// Which table page is which frame of the grant table.
#[derive(Debug, Default)]
pub(super) struct Frames(Mutex<BTreeMap<(bool, u32), usize>>);

impl Frames {
    fn set(&self, kind: FrameKind, index: u32, page: usize) {
        lock(&self.0).insert((kind == FrameKind::Status, index), page);
    }

    fn get(&self, kind: FrameKind, index: u32) -> Option<usize> {
        lock(&self.0).get(&(kind == FrameKind::Status, index)).copied()
    }
}

/// Makes a batch that is too long for the buffer in several calls.
macro_rules! in_parts {
    ($domain:expr, $call:expr; $($kind:ident: $item:ident),*) => {
        match $call {
            $(Call::$kind(items) if items.len() > BUFFER_SIZE / gnttab_abi::$item::size(ABI) => {
                for part in items.chunks_mut(BUFFER_SIZE / gnttab_abi::$item::size(ABI)) {
                    $domain.one_call(Call::$kind(part))?;
                }
                Ok(())
            })*
            call => $domain.one_call(call),
        }
    };
}

impl Domain {
    /// Makes a grant-table call whose arguments fit the buffer.
    fn one_call(&self, mut call: Call<'_>) -> Result<(), Errno> {
        // Enough for most, on the stack; a batch takes what it needs from the heap.
        let mut small = [0; 2048];
        let mut large;
        let bytes = match call.encode(ABI, 0, &mut small) {
            Ok(_) => &mut small[..],
            Err(_) => {
                large = vec![0; BUFFER_SIZE];
                &mut large[..]
            }
        };
        let raw = call.encode(ABI, 0, bytes).map_err(|_| Errno::TooBig)?;
        let bytes = bytes.get_mut(..raw.len).ok_or(Errno::TooBig)?;
        let arguments = [raw.command.0.into(), 0, raw.count.into(), 0];
        let request = Request {
            number: GRANT_TABLE_OP,
            arguments,
        };
        let input = bytes.to_vec();
        let result = self.call(&request, &input, bytes);
        // Items before the one that ended the batch have their results.
        call.decode(ABI, bytes).map_err(|_| Errno::Fault)?;
        result.map(drop)
    }

    /// The gfn at which a table frame is placed: behind everything else.
    fn table_gfn(&self, kind: FrameKind, index: u32) -> Gfn {
        let first = u64::from(self.hello().ram_pages) + u64::from(self.hello().foreign_pages);
        let most = u64::from(self.hello().table_pages);
        let half = if kind == FrameKind::Status { most } else { 0 };
        Gfn(first + half + u64::from(index))
    }
}

impl Hypercall for Domain {
    fn grant_table_op(&self, call: Call<'_>) -> Result<(), Errno> {
        in_parts!(self, call;
            Map: MapGrantRef, Unmap: UnmapGrantRef, DumpTable: DumpTable, Transfer: Transfer, Copy: Copy,
            UnmapAndReplace: UnmapAndReplace, Swap: SwapGrantRef, CacheFlush: CacheFlush)
    }

    fn sleep_ms(&self, ms: u32) {
        std::thread::sleep(Duration::from_millis(ms.into()));
    }

    fn relax(&self) {
        std::thread::yield_now();
    }
}

impl Granter for Domain {
    type Page = RamPage;

    fn reach(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), ReachError> {
        for place in reach::physmap(kind, frames, |index| self.table_gfn(kind, index)) {
            let mut bytes = [0; 32];
            let bytes = bytes.get_mut(..AddToPhysmap::size(ABI)).ok_or(Errno::Fault)?;
            place.encode(ABI, bytes).map_err(|_| Errno::Range)?;
            let arguments = [MEMOP_ADD_TO_PHYSMAP.into(), 0, 0, 0];
            let request = Request {
                number: protocol::CALL_MEMORY,
                arguments,
            };
            let page = self.call(&request, bytes, &mut [])?;
            let page = usize::try_from(page).map_err(|_| Errno::Range)?;
            // The status bit is above what an index of this domain's table has.
            let index = u32::try_from(place.idx & 0x7fff_ffff).map_err(|_| Errno::Range)?;
            self.frames.set(kind, index, page);
        }
        Ok(())
    }

    fn frame(&self, kind: FrameKind, index: u32) -> Option<TableFrame> {
        self.tables.table_frame(self.frames.get(kind, index)?)
    }

    /// Whoever had the page mapped may have kept it: it gets new backing.
    fn page_back(&self, page: &mut RamPage) -> Result<(), Errno> {
        self.renew(page.gfn())
    }
}

impl Grantee for Domain {
    fn admits(&self, addresses: Range<u64>) -> bool {
        let first = self.hello().first_foreign();
        let last = Gfn(first.0 + u64::from(self.hello().foreign_pages));
        first.address() <= addresses.start && addresses.end <= last.address()
    }

    fn after_map(&self, map: &MapGrantRef) -> Result<(), Errno> {
        let (kind, access) = if map.flags.contains(MapFlags::READONLY) {
            (NoticeKind::ForeignRead, Access::Read)
        } else {
            (NoticeKind::ForeignWrite, Access::Write)
        };
        let page = single(self.received(kind, map.host_addr)?)?;
        self.place(Gfn::containing(map.host_addr), page, access)
    }

    fn before_unmap(&self, host_addr: u64) -> Result<(), Errno> {
        self.clear(Gfn::containing(host_addr))
    }
}

const _: () = assert!(GRANT_TABLE_OP == protocol::CALL_GRANT_TABLE);
