//! A piece of private state that is made when it is first needed: an array of `N` elements, behind a
//! pointer that is set once.
//!
//! What must always hold: the pointer, once set, points to `N` elements until the piece is dropped.

#![expect(unsafe_code, reason = "lock-free publication of a piece's pointer")]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr;

use crate::segments::OutOfMemory;
use crate::sync::{AtomicPtr, Ordering};

/// See the module.
pub(crate) struct Lazy<T, const N: usize>(AtomicPtr<T>);

// SAFETY: the piece owns its elements and hands out `&T` only.
unsafe impl<T: Send, const N: usize> Send for Lazy<T, N> {}
// SAFETY: as above; `get_or_make` moves `T` in from another thread.
unsafe impl<T: Send + Sync, const N: usize> Sync for Lazy<T, N> {}

impl<T, const N: usize> Lazy<T, N> {
    pub(crate) fn new() -> Self {
        const { assert!(N.is_power_of_two()) };
        Lazy(AtomicPtr::new(ptr::null_mut()))
    }

    /// The element, if the piece was made. The index is taken modulo `N`.
    #[inline(always)]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        let base = self.0.load(Ordering::Acquire);
        if base.is_null() {
            return None;
        }
        // SAFETY: `base` points to `N` elements, and the masked index is below `N`.
        let element = unsafe { base.add(index & (N - 1)) };
        // SAFETY: the elements live as long as `self`.
        Some(unsafe { &*element })
    }

    /// The element; the piece is made if it is not there. Of several makers one wins.
    #[inline]
    pub(crate) fn get_or_make(&self, index: usize, make: fn() -> T) -> Result<&T, OutOfMemory> {
        match self.get(index) {
            Some(element) => Ok(element),
            None => self.make(make).and_then(|()| self.get(index).ok_or(OutOfMemory)),
        }
    }

    #[cold]
    fn make(&self, make: fn() -> T) -> Result<(), OutOfMemory> {
        let mut piece = Vec::new();
        piece.try_reserve_exact(N).map_err(|_| OutOfMemory)?;
        piece.resize_with(N, make);
        let piece: Box<[T]> = piece.into_boxed_slice();
        let base: *mut T = Box::into_raw(piece).cast();
        if self
            .0
            .compare_exchange(ptr::null_mut(), base, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            // SAFETY: pointer and length are those of the box given up above, which nobody else saw.
            drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(base, N)) });
        }
        Ok(())
    }

    /// Bytes of memory behind the pointer.
    pub(crate) fn bytes(&self) -> usize {
        self.get(0).map_or(0, |_| N * size_of::<T>())
    }
}

impl<T, const N: usize> Drop for Lazy<T, N> {
    fn drop(&mut self) {
        let base = self.0.load(Ordering::Acquire);
        if !base.is_null() {
            // SAFETY: pointer and length are those of the box that `make` gave up.
            drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(base, N)) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_made_once_and_stays_where_it_is() {
        let piece: Lazy<usize, 4> = Lazy::new();
        assert_eq!((piece.get(0), piece.bytes()), (None, 0));
        let first = piece.get_or_make(3, || 7).unwrap();
        assert!(ptr::eq(first, piece.get_or_make(3, || 8).unwrap()));
        assert_eq!((piece.get(0), piece.bytes()), (Some(&7), 4 * size_of::<usize>()));
        piece.make(|| 9).unwrap();
        assert_eq!(piece.get(1), Some(&7), "a late maker's piece is thrown away");
    }

    #[test]
    fn each_index_below_the_number_has_its_own_element_and_those_above_wrap() {
        let piece: Lazy<u64, 8> = Lazy::new();
        let first: *const u64 = piece.get_or_make(0, || 0).unwrap();
        for index in 0..24 {
            let element = piece.get(index).unwrap();
            assert!(ptr::eq(element, first.wrapping_add(index % 8)), "{index}");
        }
    }
}
