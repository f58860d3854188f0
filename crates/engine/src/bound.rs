//! Indexes that a guest chooses, kept inside even where the processor runs ahead of the check.
//!
//! A mispredicted bounds check lets loads run with an index past the end, and what they bring into
//! the cache tells the guest what was there (ENG-12). [`below`] checks an index and clamps it by
//! arithmetic that no prediction skips, for a cycle or two: past the bound, the index is 0. Feature
//! `fences` puts a barrier behind each check instead, for processors or policies that want one.

#![cfg_attr(
    all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)),
    expect(unsafe_code, reason = "the compiler must not see that a clamp is redundant")
)]

/// The index, if it is below `bound`.
#[inline(always)]
pub(crate) fn below(index: u32, bound: u32) -> Option<usize> {
    below_wide(index as usize, bound as usize)
}

/// As [`below`], for any number.
#[inline(always)]
pub(crate) fn below_wide(index: usize, bound: usize) -> Option<usize> {
    if index >= bound {
        return None;
    }
    #[cfg(feature = "fences")]
    barrier();
    Some(index & mask(index, bound))
}

/// Whether an index is one of the `length` from `first` on. For places that take any index modulo `length`.
#[inline(always)]
pub(crate) fn is_within(index: u32, first: u32, length: u32) -> bool {
    if index.wrapping_sub(first) >= length {
        return false;
    }
    #[cfg(feature = "fences")]
    barrier();
    true
}

/// All ones if `index` is below `bound`, otherwise 0; without a branch.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
fn mask(index: usize, bound: usize) -> usize {
    let mask: usize;
    // SAFETY: two instructions on registers that are named as operands.
    unsafe {
        core::arch::asm!(
            "cmp {index}, {bound}",
            "sbb {mask}, {mask}",
            index = in(reg) index,
            bound = in(reg) bound,
            mask = lateout(reg) mask,
            options(pure, nomem, nostack),
        );
    }
    mask
}

/// All ones if `index` is below `bound`, otherwise 0; without a branch.
#[cfg(all(target_arch = "aarch64", not(miri)))]
#[inline(always)]
fn mask(index: usize, bound: usize) -> usize {
    let mask: usize;
    // SAFETY: three instructions on registers that are named as operands.
    unsafe {
        core::arch::asm!(
            "cmp {index}, {bound}",
            "csetm {mask}, lo",
            "hint #20",
            index = in(reg) index,
            bound = in(reg) bound,
            mask = lateout(reg) mask,
            options(pure, nomem, nostack),
        );
    }
    mask
}

/// All ones if `index` is below `bound`, otherwise 0; without a branch where the compiler agrees.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[inline(always)]
fn mask(index: usize, bound: usize) -> usize {
    let (index, bound) = core::hint::black_box((index, bound));
    // The borrow of the difference, as the processor's flag has it.
    let borrow = (!index & bound) | ((!index | bound) & index.wrapping_sub(bound));
    0usize.wrapping_sub(borrow >> (usize::BITS - 1))
}

/// Nothing behind this runs before everything ahead of it is known.
#[cfg(feature = "fences")]
#[inline(always)]
fn barrier() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a fence; it touches nothing.
    unsafe {
        core::arch::asm!("lfence", options(nostack, preserves_flags));
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("dsb sy", "isb", options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_let_through_or_clamped() {
        let edges = [
            0,
            1,
            2,
            254,
            255,
            256,
            257,
            usize::MAX / 2,
            usize::MAX / 2 + 1,
            usize::MAX - 1,
            usize::MAX,
        ];
        for bound in edges {
            for index in edges {
                let inside = index < bound;
                assert_eq!(mask(index, bound), if inside { usize::MAX } else { 0 });
                assert_eq!(below_wide(index, bound), inside.then_some(index));
            }
        }
        for (index, first, found) in [
            (4, 5, false),
            (5, 5, true),
            (8, 5, true),
            (9, 5, false),
            (u32::MAX, 5, false),
        ] {
            assert_eq!(is_within(index, first, 4), found);
        }
        assert_eq!(below(u32::MAX, u32::MAX), None);
        assert_eq!(below(u32::MAX - 1, u32::MAX), Some(u32::MAX as usize - 1));
    }
}
