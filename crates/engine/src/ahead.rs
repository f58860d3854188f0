//! What a batch will need soon, fetched while earlier items are still at work.
//!
//! An item that meets a cold table misses its entry, the entry's private state, the frame's record and the
//! bytes one after the other, because each says where the next one is. A batch knows its items beforehand:
//! the entries of later ones are asked for first, then, when these have come, what the entries lead to.
//!
//! What must always hold: nothing here is judged. An argument or an entry that is looked at ahead of its
//! turn is looked at again, once, when its turn comes, and only that look counts (ENG-5); no look ahead
//! fails, or is told to anybody, and it waits for nothing but a gate, inside no table, as an item does. An
//! entry that is for somebody else leads to nothing. Indexes that a guest chose are clamped as everywhere.

#![cfg_attr(
    all(any(target_arch = "x86_64", target_arch = "aarch64"), not(any(loom, miri))),
    expect(unsafe_code, reason = "instructions that fetch a cache line")
)]

use core::marker::PhantomData;
use core::ops::Range;

use gnttab_abi::{Abi, Copy, CopyFlags, DomId, Gfn, GrantRef, MapGrantRef};

use crate::args::{Arguments, LARGEST};
use crate::domain::Domain;
use crate::hypervisor::Hypervisor;
use crate::registry::{Room, Visit};

/// Items that are looked at together, a group ahead of the one at work.
const GROUP: u32 = 8;
/// Batches below this are over before anything asked for has come.
const SMALLEST: u32 = 4;

/// Entries of version 2 in one cache line; of version 1, and of what else is known of an entry, there are more.
const IN_A_LINE: u32 = 4;

/// A kind of item that is looked at ahead of its turn.
pub(crate) trait Foresee {
    /// Bytes of an item.
    const SIZE: usize;
    /// Whether it moves bytes.
    const MOVES: bool;
    /// What an item will use.
    fn uses(raw: &[u8], caller: DomId) -> Option<Uses>;
    /// Asks for what it needs of the caller's own.
    fn expect_own<H: Hypervisor>(hv: &H, caller: &H::Domain, uses: &Uses);
}

/// What an item will use. Where bytes of a page are wanted: the first, and how many.
#[derive(Clone, core::marker::Copy)]
pub(crate) struct Uses {
    granter: DomId,
    gref: GrantRef,
    bytes: (u16, u16),
    /// The caller's own: where a page is to be mapped, or a frame.
    own: u64,
    own_bytes: (u16, u16),
}

impl Uses {
    const NONE: Uses = Uses {
        granter: DomId::INVALID,
        gref: GrantRef(0),
        bytes: (0, 0),
        own: 0,
        own_bytes: (0, 0),
    };
}

impl Foresee for MapGrantRef {
    const SIZE: usize = MapGrantRef::size(Abi::X86_64);
    const MOVES: bool = false;

    #[inline(always)]
    fn uses(raw: &[u8], _: DomId) -> Option<Uses> {
        // The same for every calling ABI.
        let item = MapGrantRef::decode(Abi::X86_64, raw).ok()?;
        Some(Uses {
            granter: item.dom,
            gref: item.gref,
            bytes: (0, 0),
            own: item.host_addr,
            own_bytes: (0, 0),
        })
    }

    #[inline(always)]
    fn expect_own<H: Hypervisor>(hv: &H, caller: &H::Domain, uses: &Uses) {
        hv.expect_mapping(caller, uses.own);
    }
}

impl Foresee for Copy {
    const SIZE: usize = Copy::size(Abi::X86_64);
    const MOVES: bool = true;

    #[inline(always)]
    fn uses(raw: &[u8], caller: DomId) -> Option<Uses> {
        let item = Copy::decode(Abi::X86_64, raw).ok()?;
        // Of two grants the source's: its bytes are read.
        let (granted, own) = if item.flags.contains(CopyFlags::SOURCE_GREF) {
            (item.source, item.dest)
        } else {
            (item.dest, item.source)
        };
        Some(Uses {
            granter: if granted.domid == DomId::SELF {
                caller
            } else {
                granted.domid
            },
            gref: granted.gref(),
            bytes: (granted.offset, item.len),
            own: own.u,
            own_bytes: (own.offset, item.len),
        })
    }

    #[inline(always)]
    fn expect_own<H: Hypervisor>(hv: &H, caller: &H::Domain, uses: &Uses) {
        hv.expect_frame(caller, Gfn(uses.own), uses.own_bytes);
    }
}

/// What is known of the group behind the one at work.
pub(crate) struct Ahead<T> {
    uses: [Uses; GROUP as usize],
    /// So many of them.
    known: usize,
    kind: PhantomData<T>,
}

impl<T: Foresee> Ahead<T> {
    /// For a batch of so many items, if it is one that a look ahead is worth while for.
    #[inline]
    pub(crate) fn of(count: u32) -> Option<Ahead<T>> {
        (count >= SMALLEST).then_some(Ahead {
            uses: [Uses::NONE; GROUP as usize],
            known: 0,
            kind: PhantomData,
        })
    }

    /// Whether there is something to do before an item.
    #[inline(always)]
    pub(crate) fn is_due(index: u32) -> bool {
        index.is_multiple_of(HALF)
    }

    /// Called before item `index` of a batch of `count`, where it is due. Works for the table that the
    /// processor is inside, or the first that it comes upon.
    #[inline(never)]
    pub(crate) fn step<H: Hypervisor>(
        &mut self,
        visit: &mut Visit<'_, H>,
        caller: &Domain<H>,
        index: u32,
        count: u32,
        args: impl Arguments,
    ) {
        if index == 0 {
            // Nobody was ahead of the first.
            self.expect_entries(visit, caller, 0..GROUP.min(count), args);
            self.expect_frames(visit, caller.id());
        }
        if index.is_multiple_of(GROUP) {
            let next = index + GROUP;
            self.expect_entries(visit, caller, next..count.min(next + GROUP), args);
        } else {
            self.expect_frames(visit, caller.id());
        }
    }

    /// Looks at the items of a group, and asks for their entries and for what is the caller's own.
    #[inline(always)]
    fn expect_entries<H: Hypervisor>(
        &mut self,
        visit: &mut Visit<'_, H>,
        caller: &Domain<H>,
        items: Range<u32>,
        args: impl Arguments,
    ) {
        let hv = &visit.engine.hv;
        let mut known = 0;
        for (index, place) in items.zip(&mut self.uses) {
            let mut raw = [0; LARGEST];
            if !args.peek(index, T::SIZE, &mut raw) {
                break;
            }
            let Some(uses) = T::uses(&raw, caller.id()) else {
                break;
            };
            *place = uses;
            known += 1;
            T::expect_own(hv, caller.private(), &uses);
        }
        self.known = known;
        let Some(granter) = self.granter(visit) else {
            return;
        };
        let id = granter.id();
        // References that follow each other often share their lines: those of the one before are on their way.
        let mut last = None;
        for uses in self.known().iter().filter(|uses| uses.granter == id) {
            let line = Some(uses.gref.0 / IN_A_LINE);
            if last != line {
                granter.view.expect(uses.gref);
                last = line;
            }
        }
    }

    /// Asks for what the entries of the group lead to, where they are for the caller.
    #[inline(always)]
    fn expect_frames<H: Hypervisor>(&self, visit: &mut Visit<'_, H>, caller: DomId) {
        let hv = &visit.engine.hv;
        let Some(granter) = self.granter(visit) else {
            return;
        };
        let id = granter.id();
        for uses in self.known().iter().filter(|uses| uses.granter == id) {
            if let Some(shared) = granter.view.shared(uses.gref)
                && shared.load_head().domid == caller
            {
                let gfn = Gfn(shared.load_frame());
                let bytes = if T::MOVES { uses.bytes } else { (0, 0) };
                hv.expect_frame(granter.private(), gfn, bytes);
            }
        }
    }

    /// What is known of the group.
    #[inline(always)]
    fn known(&self) -> &[Uses] {
        self.uses.get(..self.known).unwrap_or_default()
    }

    /// The granter whose table the processor is inside; if none, that of the group's first item, if it has any.
    #[inline(always)]
    fn granter<'v, 'a, H: Hypervisor>(&self, visit: &'v mut Visit<'a, H>) -> Option<&'v Room<'a, H>> {
        visit.inside_any(self.known().first()?.granter)
    }
}

/// Half a group on, what the entries lead to is asked for.
const HALF: u32 = GROUP / 2;

/// Asks for the cache line of a place that will be written, or changed by a locked operation: one journey
/// instead of two where another processor has it. A hint, for an embedder's
/// [`expect_frame`](Hypervisor::expect_frame) too.
#[inline(always)]
pub fn fetch_to_write<T>(place: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri), not(loom)))]
    // SAFETY: a hint; it changes no memory and no register, and no address makes it fault.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) core::ptr::from_ref(place),
            options(nostack, preserves_flags, readonly));
    }
    #[cfg(all(target_arch = "aarch64", not(miri), not(loom)))]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("prfm pstl1keep, [{}]", in(reg) core::ptr::from_ref(place),
            options(nostack, preserves_flags, readonly));
    }
    #[cfg(any(miri, loom, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = place;
}

/// Asks for the cache line of a place that will be read; otherwise as [`fetch_to_write`].
#[inline(always)]
pub fn fetch_to_read<T>(place: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri), not(loom)))]
    // SAFETY: as in `fetch_to_write`.
    unsafe {
        core::arch::asm!("prefetcht0 [{}]", in(reg) core::ptr::from_ref(place),
            options(nostack, preserves_flags, readonly));
    }
    #[cfg(all(target_arch = "aarch64", not(miri), not(loom)))]
    // SAFETY: as in `fetch_to_write`.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) core::ptr::from_ref(place),
            options(nostack, preserves_flags, readonly));
    }
    #[cfg(any(miri, loom, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = place;
}
