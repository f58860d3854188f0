//! An array that grows and never moves: readers take no lock.
//!
//! Segment `k` holds `FIRST << k` elements, so `n` elements need about log2(n) segments, and an
//! element keeps its address for as long as the array lives. What must always hold:
//! 1. A segment's pointer is stored once, after the segment is filled, and never changed until
//!    the array is dropped.
//! 2. Growing is serialised by whoever owns the array; reading is not.

#![expect(unsafe_code, reason = "lock-free publication of a segment's pointer")]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr;

use crate::sync::{AtomicPtr, Ordering};

/// No memory for a further segment; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfMemory;

/// See the module. `FIRST` is the size of the first segment, a power of two; `SEGMENTS` bounds
/// the whole at `FIRST * (2^SEGMENTS - 1)` elements.
pub(crate) struct Segments<T, const FIRST: usize, const SEGMENTS: usize> {
    segments: [AtomicPtr<T>; SEGMENTS],
}

// SAFETY: the array owns its elements and hands out `&T` only.
unsafe impl<T: Send, const F: usize, const S: usize> Send for Segments<T, F, S> {}
// SAFETY: as above; shared access gives `&T`, and growing moves `T` in from another thread.
unsafe impl<T: Send + Sync, const F: usize, const S: usize> Sync for Segments<T, F, S> {}

impl<T, const FIRST: usize, const SEGMENTS: usize> Segments<T, FIRST, SEGMENTS> {
    /// Elements that the array can ever hold.
    #[cfg(test)]
    const LIMIT: usize = FIRST * ((1 << SEGMENTS) - 1);

    pub(crate) fn new() -> Self {
        const { assert!(FIRST.is_power_of_two()) };
        Segments {
            segments: core::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
        }
    }

    const fn size(segment: usize) -> usize {
        FIRST << segment
    }

    /// The segment of an index and the place in it.
    #[inline(always)]
    const fn locate(index: usize) -> (usize, usize) {
        let shifted = index + FIRST;
        let top = shifted.ilog2();
        ((top - FIRST.ilog2()) as usize, shifted - (1 << top))
    }

    /// The element, if its segment is there. Whether the index is inside what the owner calls
    /// the array's length is the owner's to check first.
    #[inline(always)]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        let (segment, place) = Self::locate(index);
        let base = self.segments.get(segment)?.load(Ordering::Acquire);
        if base.is_null() {
            return None;
        }
        // SAFETY: `base` points to `size(segment)` elements (rule 1), and `place` is below that by
        // construction of `locate`.
        let element = unsafe { base.add(place) };
        // SAFETY: the elements live as long as `self`.
        Some(unsafe { &*element })
    }

    /// Makes elements 0 to `len - 1` exist, made by `make`. The caller serialises growth.
    ///
    /// All or nothing: a segment that could not be had leaves the array as it was, apart from
    /// whole segments already added, which stay for the next try.
    pub(crate) fn grow(&self, len: usize, mut make: impl FnMut() -> T) -> Result<(), OutOfMemory> {
        let mut have = 0;
        for (k, slot) in self.segments.iter().enumerate() {
            if have >= len {
                return Ok(());
            }
            let size = Self::size(k);
            have += size;
            if !slot.load(Ordering::Relaxed).is_null() {
                continue;
            }
            let mut segment = Vec::new();
            segment.try_reserve_exact(size).map_err(|_| OutOfMemory)?;
            segment.resize_with(size, &mut make);
            let segment: Box<[T]> = segment.into_boxed_slice();
            slot.store(Box::into_raw(segment).cast(), Ordering::Release);
        }
        if have >= len { Ok(()) } else { Err(OutOfMemory) }
    }

    /// Elements that there are.
    pub(crate) fn made(&self) -> usize {
        let there = self
            .segments
            .iter()
            .take_while(|slot| !slot.load(Ordering::Acquire).is_null());
        (0..there.count()).map(Self::size).sum()
    }

    /// Bytes of memory behind the array.
    pub(crate) fn bytes(&self) -> usize {
        let live = |(k, s): (usize, &AtomicPtr<T>)| {
            if s.load(Ordering::Relaxed).is_null() {
                0
            } else {
                Self::size(k) * size_of::<T>()
            }
        };
        self.segments.iter().enumerate().map(live).sum()
    }
}

impl<T, const FIRST: usize, const SEGMENTS: usize> Drop for Segments<T, FIRST, SEGMENTS> {
    fn drop(&mut self) {
        for (k, slot) in self.segments.iter().enumerate() {
            let base = slot.load(Ordering::Acquire);
            if !base.is_null() {
                let segment = ptr::slice_from_raw_parts_mut(base, Self::size(k));
                // SAFETY: pointer and length are those of the box that `grow` gave up.
                drop(unsafe { Box::from_raw(segment) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Small = Segments<usize, 4, 4>;

    #[test]
    fn every_index_has_its_own_place() {
        let array = Small::new();
        let mut next = 0;
        array
            .grow(Small::LIMIT, || {
                next += 1;
                next
            })
            .unwrap();
        for i in 0..Small::LIMIT {
            assert_eq!(array.get(i), Some(&(i + 1)));
        }
        assert_eq!(array.get(Small::LIMIT), None);
    }

    #[test]
    fn growth_keeps_what_is_there_and_stops_at_the_limit() {
        let array = Small::new();
        array.grow(1, || 7).unwrap();
        let first = array.get(0).unwrap();
        assert_eq!(array.get(4), None);
        array.grow(5, || 8).unwrap();
        assert!(ptr::eq(first, array.get(0).unwrap()));
        assert_eq!((first, array.get(4)), (&7, Some(&8)));
        assert_eq!(array.grow(Small::LIMIT + 1, || 9), Err(OutOfMemory));
    }
}
