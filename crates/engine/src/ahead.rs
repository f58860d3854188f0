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

use core::ops::Range;

use gnttab_abi::{Abi, Copy, CopyFlags, DomId, Gfn, GrantRef, MapGrantRef};

use crate::args::{Arguments, Raw};
use crate::domain::Domain;
use crate::hypervisor::Hypervisor;
use crate::registry::{Room, Visit};

/// Items that are looked at together, a group ahead of the one at work.
const GROUP: u32 = 8;
/// Half a group on, what the entries lead to is asked for.
const HALF: u32 = GROUP / 2;
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
    fn uses(raw: &Raw, caller: DomId) -> Option<Uses>;
    /// Asks for what it needs of the caller's own.
    fn expect_own<H: Hypervisor>(hv: &H, caller: &H::Domain, uses: &Uses);
}

/// What an item will use. Where bytes of a page are wanted: the first, and how many.
pub(crate) struct Uses {
    granter: DomId,
    gref: GrantRef,
    bytes: (u16, u16),
    /// The caller's own: where a page is to be mapped, or a frame.
    own: u64,
    own_bytes: (u16, u16),
}

impl Foresee for MapGrantRef {
    const SIZE: usize = MapGrantRef::size(Abi::X86_64);
    const MOVES: bool = false;

    #[inline(always)]
    fn uses(raw: &Raw, _: DomId) -> Option<Uses> {
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
    fn uses(raw: &Raw, caller: DomId) -> Option<Uses> {
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

/// The items of a batch, as many at a time as there are between two looks ahead.
#[inline(always)]
pub(crate) fn in_steps(count: u32) -> impl Iterator<Item = Range<u32>> {
    let mut next = 0;
    core::iter::from_fn(move || {
        let first = next;
        next = count.min(first + HALF);
        (first < count).then_some(first..next)
    })
}

/// Called before item `index` of a batch of `count`, the first of some of [`in_steps`]. Works for the table that the
/// processor is inside; if it is inside none, for that of the item's granter.
#[inline(always)]
pub(crate) fn look<T: Foresee, H: Hypervisor>(
    visit: &mut Visit<'_, H>,
    caller: &Domain<H>,
    index: u32,
    count: u32,
    args: impl Arguments,
) {
    if count < SMALLEST {
        return;
    }
    let hv = &visit.engine.hv;
    let granter_of_item = || {
        let raw = args.glimpse(index, T::SIZE)?;
        Some(T::uses(&raw, caller.id())?.granter)
    };
    let Some(granter) = visit.inside_any(granter_of_item) else {
        return;
    };
    let group = |first: u32| first..count.min(first + GROUP);
    if index == 0 {
        // Nobody was ahead of the first.
        expect_entries::<T, H>(hv, granter, caller, group(0), args);
        expect_frames::<T, H>(hv, granter, caller, group(0), args);
    }
    if index.is_multiple_of(GROUP) {
        expect_entries::<T, H>(hv, granter, caller, group(index + GROUP), args);
    } else {
        expect_frames::<T, H>(hv, granter, caller, group(index + HALF), args);
    }
}

/// Asks for the entries of items, and for what is the caller's own.
#[inline(never)]
fn expect_entries<T: Foresee, H: Hypervisor>(
    hv: &H,
    granter: &Room<'_, H>,
    caller: &Domain<H>,
    items: Range<u32>,
    args: impl Arguments,
) {
    // References that follow each other often share their lines: those of the one before are on their way.
    let mut last = u32::MAX;
    uses_of::<T, H>(granter, caller, items, args, |uses| {
        T::expect_own(hv, caller.private(), &uses);
        let line = uses.gref.0 / IN_A_LINE;
        if last != line {
            granter.view.expect(uses.gref);
            last = line;
        }
    });
}

/// Asks for what the entries of items lead to, where they are for the caller.
#[inline(never)]
fn expect_frames<T: Foresee, H: Hypervisor>(
    hv: &H,
    granter: &Room<'_, H>,
    caller: &Domain<H>,
    items: Range<u32>,
    args: impl Arguments,
) {
    uses_of::<T, H>(granter, caller, items, args, |uses| {
        if let Some(gfn) = granter.view.peek_frame(uses.gref, caller.id()) {
            let bytes = if T::MOVES { uses.bytes } else { (0, 0) };
            hv.expect_frame(granter.private(), gfn, bytes);
        }
    });
}

/// What the items will use that are for this granter.
#[inline(always)]
fn uses_of<T: Foresee, H: Hypervisor>(
    granter: &Room<'_, H>,
    caller: &Domain<H>,
    items: Range<u32>,
    args: impl Arguments,
    mut each: impl FnMut(Uses),
) {
    args.peek(items, T::SIZE, |raw| {
        if let Some(uses) = T::uses(raw, caller.id())
            && uses.granter == granter.id()
        {
            each(uses);
        }
    });
}

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
