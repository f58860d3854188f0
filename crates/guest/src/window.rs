//! Guest addresses to map others' pages at (rule GST-8).
//!
//! A bounded resource that is set aside before anything is mapped. An address is in exactly one
//! place at any time: free here, owned by a [`Place`], or given up for good because an unmap
//! failed and something may still lie there.

use core::ops::Range;

use gnttab_abi::PAGE_SIZE;

use crate::free::{FreeSet, Room};
use crate::sync::Lock;
use crate::{Grantee, Hypercall};

/// A range of guest addresses, whole pages, that is set aside for others' pages.
///
/// In an auto-translated guest these are guest-physical pages with nothing behind them; in a PV
/// guest virtual addresses with page tables.
///
/// ```
/// use gnttab_guest::{Window, WindowError};
///
/// let window = Window::new(0x1_0000_0000, 1024)?;
/// assert_eq!(window.addresses().end, 0x1_0040_0000);
/// assert_eq!(Window::new(0x1234, 1), Err(WindowError::Unaligned(0x1234)));
/// # Ok::<(), WindowError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    addresses: Range<u64>,
    pages: u32,
}

/// A window cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// It does not start at a page.
    #[error("a window for foreign pages cannot start at {0:#x}, which is not a multiple of 4096")]
    Unaligned(u64),
    /// It reaches past the last address.
    #[error("{pages} pages from {start:#x} reach past the last address")]
    TooLong {
        /// First address.
        start: u64,
        /// Pages.
        pages: u32,
    },
    /// The platform's own address map does not cover it.
    #[error("the addresses {:#x} to {:#x} are not all covered by this domain's own address map", .0.start, .0.end)]
    NotAdmitted(Range<u64>),
    /// No memory for its bookkeeping.
    #[error("no memory for the bookkeeping of {0} pages")]
    NoMemory(u32),
}

impl Window {
    /// The window of so many pages that starts at this address (bytes).
    ///
    /// # Errors
    /// [`WindowError`] if that is not a range of whole pages.
    pub fn new(start: u64, pages: u32) -> Result<Window, WindowError> {
        // A usize is no wider than 64 bits anywhere this is built for.
        let page = PAGE_SIZE as u64;
        if !start.is_multiple_of(page) {
            return Err(WindowError::Unaligned(start));
        }
        let len = u64::from(pages) * page;
        let end = start
            .checked_add(len)
            .ok_or(WindowError::TooLong { start, pages })?;
        Ok(Window {
            addresses: start..end,
            pages,
        })
    }

    /// Its addresses.
    #[must_use]
    pub fn addresses(&self) -> Range<u64> {
        self.addresses.clone()
    }
}

/// What is free in a window.
pub(crate) struct Places {
    start: u64,
    state: Lock<State>,
}

struct State {
    free: FreeSet,
    leaked: u32,
}

/// How the addresses of a window are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WindowStats {
    /// Pages of it.
    pub pages: u32,
    /// Pages that are free.
    pub free: u32,
    /// Pages given up for good, since something may still be mapped there.
    pub leaked: u32,
}

/// One page of the window, taken. Not `Copy`: it goes back through [`Places::put`], or is lost
/// through [`Places::leak`].
#[derive(Debug)]
pub(crate) struct Place(u32);

impl Places {
    pub(crate) fn new(x: &impl Grantee, window: Window) -> Result<Places, WindowError> {
        if !x.admits(window.addresses()) {
            return Err(WindowError::NotAdmitted(window.addresses));
        }
        let room = Room::for_total(window.pages).map_err(|_| WindowError::NoMemory(window.pages))?;
        let mut free = FreeSet::new(0);
        free.extend(window.pages, room);
        Ok(Places {
            start: window.addresses.start,
            state: Lock::new(State { free, leaked: 0 }),
        })
    }

    pub(crate) fn address(&self, place: &Place) -> u64 {
        self.start + u64::from(place.0) * PAGE_SIZE as u64
    }

    /// Calls `give` with `count` pages, or with none and says how many are free.
    pub(crate) fn take(
        &self,
        x: &impl Hypercall,
        count: u32,
        mut give: impl FnMut(Place),
    ) -> Result<(), u32> {
        self.state.with(x, |state| {
            if state.free.len() < count {
                return Err(state.free.len());
            }
            (0..count)
                .filter_map(|_| state.free.take())
                .for_each(|number| give(Place(number)));
            Ok(())
        })
    }

    /// Calls `give` with `count` pages that follow one another, or with none and says how many
    /// are free.
    pub(crate) fn take_run(
        &self,
        x: &impl Hypercall,
        count: u32,
        mut give: impl FnMut(Place),
    ) -> Result<(), u32> {
        self.state.with(x, |state| {
            let first = state.free.take_run(count).ok_or(state.free.len())?;
            (first..first + count).for_each(|number| give(Place(number)));
            Ok(())
        })
    }

    /// Nothing is mapped there any more.
    pub(crate) fn put(&self, x: &impl Hypercall, place: Place) {
        self.state.with(x, |state| state.free.put(place.0));
    }

    /// Something may be mapped there for ever.
    pub(crate) fn leak(&self, x: &impl Hypercall, place: Place) {
        let Place(_) = place;
        self.state.with(x, |state| state.leaked += 1);
    }

    pub(crate) fn stats(&self, x: &impl Hypercall) -> WindowStats {
        self.state.with(x, |state| WindowStats {
            pages: state.free.total(),
            free: state.free.len(),
            leaked: state.leaked,
        })
    }
}
