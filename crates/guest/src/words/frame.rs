//! From the address of a table frame to the words of an entry.

#![expect(
    unsafe_code,
    reason = "the one place where the platform's pointers become atomics"
)]

use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::ptr::{NonNull, null_mut};

use gnttab_abi::{
    ENTRY_V1_SIZE, ENTRY_V2_SIZE, GrantRef, STATUS_PER_PAGE, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE,
    status_pages_for,
};

use super::protocol::Entry;
use crate::sync::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::{FrameKind, Version};

/// The address of one frame of the grant table in this program.
///
/// Having one tells you: 4096 bytes are mapped there, and everybody in this program who touches
/// them does so with atomics. It tells you nothing about what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableFrame(NonNull<u8>);

impl TableFrame {
    /// Takes the platform's word for the address of a frame.
    ///
    /// # Safety
    /// 1. `address` is a multiple of 4096, and 4096 bytes from there are mapped: writable for
    ///    [`FrameKind::Shared`], at least readable for [`FrameKind::Status`].
    /// 2. They stay so as long as the [`Granter`](crate::Granter) that gives this value out exists.
    /// 3. Whatever else in this program reads or writes them does so with atomic accesses of the
    ///    widths that the interface has: 32 bits for the head of an entry, 16 for a status word.
    #[must_use]
    pub const unsafe fn new(address: NonNull<u8>) -> TableFrame {
        TableFrame(address)
    }
}

/// Every frame that is reachable, and the version that says what lies in them.
///
/// Looked into without a lock: an address is set once its frame is there.
pub(crate) struct Frames {
    version: AtomicU32,
    shared: Box<[AtomicPtr<u8>]>,
    status: Box<[AtomicPtr<u8>]>,
}

impl Frames {
    /// Room for the addresses of `max_frames` shared frames, none of them set.
    pub(crate) fn new(version: Version, max_frames: u32) -> Result<Frames, TryReserveError> {
        Ok(Frames {
            version: AtomicU32::new(version.number()),
            shared: unset(max_frames)?,
            status: unset(status_pages_for(max_frames))?,
        })
    }

    pub(crate) fn version(&self) -> Version {
        match self.version.load(Ordering::Relaxed) {
            2 => Version::V2,
            _ => Version::V1,
        }
    }

    /// Forgets all addresses. For a resume only: nobody uses the table meanwhile.
    pub(crate) fn clear(&self, version: Version) {
        self.version.store(version.number(), Ordering::Relaxed);
        for frame in self.shared.iter().chain(self.status.iter()) {
            frame.store(null_mut(), Ordering::Release);
        }
    }

    /// Says where a frame lies. An index past the table's maximum is ignored.
    pub(crate) fn set(&self, kind: FrameKind, index: u32, frame: TableFrame) {
        let frames = match kind {
            FrameKind::Shared => &self.shared,
            FrameKind::Status => &self.status,
        };
        if let Some(slot) = usize::try_from(index).ok().and_then(|index| frames.get(index)) {
            slot.store(frame.0.as_ptr(), Ordering::Release);
        }
    }

    /// The words of an entry, or `None` where its frame is not reachable.
    pub(crate) fn entry(&self, gref: GrantRef) -> Option<Entry<'_>> {
        match self.version() {
            Version::V1 => {
                let entry = Place::of(gref, V1_ENTRIES_PER_PAGE, ENTRY_V1_SIZE)?.in_frames(&self.shared)?;
                let frame = entry.wrapping_add(4);
                // SAFETY: `new` promises 4096 mapped bytes, `entry` is a whole entry in them,
                // aligned to its size; atomics of these widths are what the promise allows.
                let head = unsafe { AtomicU32::from_ptr(entry.cast()) };
                // SAFETY: as above; bytes 4 to 7 of the same entry.
                let frame = unsafe { AtomicU32::from_ptr(frame.cast()) };
                Some(Entry::V1 { head, frame })
            }
            Version::V2 => {
                let entry = Place::of(gref, V2_ENTRIES_PER_PAGE, ENTRY_V2_SIZE)?.in_frames(&self.shared)?;
                let status = Place::of(gref, STATUS_PER_PAGE, size_of::<u16>())?.in_frames(&self.status)?;
                let halves = entry.wrapping_add(4);
                let frame = entry.wrapping_add(8);
                // SAFETY: `new` promises 4096 mapped bytes, `entry` is a whole entry in them,
                // aligned to its size; atomics of these widths are what the promise allows.
                let head = unsafe { AtomicU32::from_ptr(entry.cast()) };
                // SAFETY: as above; bytes 4 to 7 of the same entry.
                let halves = unsafe { AtomicU32::from_ptr(halves.cast()) };
                // SAFETY: as above; bytes 8 to 15 of the same entry.
                let frame = unsafe { AtomicU64::from_ptr(frame.cast()) };
                // SAFETY: as above for the status frame. It is only ever loaded from, so that a
                // read-only mapping will do.
                let status = unsafe { AtomicU16::from_ptr(status.cast()) };
                Some(Entry::V2 {
                    head,
                    halves,
                    frame,
                    status,
                })
            }
        }
    }
}

/// `count` addresses, none of them set.
fn unset(count: u32) -> Result<Box<[AtomicPtr<u8>]>, TryReserveError> {
    let mut frames = Vec::new();
    // A count that no address space holds is refused by the reservation.
    frames.try_reserve_exact(usize::try_from(count).unwrap_or(usize::MAX))?;
    frames.extend((0..count).map(|_| AtomicPtr::new(null_mut())));
    Ok(frames.into_boxed_slice())
}

/// Where something lies that belongs to a reference.
struct Place {
    frame: usize,
    byte: usize,
}

impl Place {
    /// For an array with so many elements of that size in each frame.
    fn of(gref: GrantRef, per_frame: u32, size: usize) -> Option<Place> {
        Some(Place {
            frame: usize::try_from(gref.0 / per_frame).ok()?,
            byte: usize::try_from(gref.0 % per_frame).ok()? * size,
        })
    }

    /// Its address, if its frame is reachable.
    fn in_frames(&self, frames: &[AtomicPtr<u8>]) -> Option<*mut u8> {
        let frame = frames.get(self.frame)?.load(Ordering::Acquire);
        (!frame.is_null()).then(|| frame.wrapping_add(self.byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(gref: u32, per_frame: u32, size: usize) -> (usize, usize) {
        let place = Place::of(GrantRef(gref), per_frame, size).unwrap();
        (place.frame, place.byte)
    }

    #[test]
    fn entries_lie_where_the_header_puts_them() {
        assert_eq!(place(8, V1_ENTRIES_PER_PAGE, ENTRY_V1_SIZE), (0, 64));
        assert_eq!(place(512, V1_ENTRIES_PER_PAGE, ENTRY_V1_SIZE), (1, 0));
        assert_eq!(place(511, V2_ENTRIES_PER_PAGE, ENTRY_V2_SIZE), (1, 4080));
        assert_eq!(place(2049, STATUS_PER_PAGE, 2), (1, 2));
    }

    #[test]
    fn a_reference_without_a_frame_has_no_entry() {
        let frames = Frames::new(Version::V1, 2).unwrap();
        assert!(frames.entry(GrantRef(8)).is_none());
        assert!(frames.entry(GrantRef(1024)).is_none());
        assert!(frames.entry(GrantRef::INVALID).is_none());
    }
}
