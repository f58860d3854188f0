//! Memory that a hostile peer can write: the only module of this crate with `unsafe`.
//!
//! # Rules
//! 1. **No reference into shared memory exists**, neither `&[u8]` nor `&mut [u8]`: the compiler may read
//!    through a reference twice or assume that nobody else writes. What leaves this module is a private
//!    copy, or a raw `(pointer, length)` pair ([`SharedSlice`], [`SharedSliceMut`]) for the kernel or for
//!    a volatile copy.
//! 2. **A load happens once**, by a volatile or atomic access that the compiler can neither drop nor
//!    repeat. What was loaded is what is judged (PVR-2).
//! 3. **Every access is checked against the region's length** before a pointer is formed. Callers derive
//!    offsets from private state only, so a failing check is a bug of this crate: it panics as a slice
//!    index would and touches nothing.
//! 4. Control words (ring indexes) are atomics; everything else is copied by volatile accesses of up to
//!    eight bytes. Torn data is possible and harmless: it is the peer's own.
//! 5. A read-only region is never written: the mapping behind it would fault.
#![expect(
    unsafe_code,
    reason = "shared memory is reached through raw pointers here and nowhere else"
)]

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use gnttab_abi::PAGE_SIZE;

use crate::sync::AtomicU32;
use crate::words;

/// What may be done with a page that another domain granted, or was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Loads only.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// A contiguous run of pages of memory that a peer may read and write at any time.
///
/// Having one tells you: the pages are mapped, page-aligned and stay so while this value lives.
/// It tells you nothing about their content, which may change between two loads.
///
/// ```
/// use gnttab_io::shared::HeapPages;
///
/// let heap = HeapPages::zeroed(1);
/// let (mine, theirs) = (heap.view(), heap.view());
/// mine.store_u32(8, 7);
/// let mut copy = [0; 4];
/// theirs.read(8, &mut copy);
/// assert_eq!(copy, 7u32.to_le_bytes());
/// ```
pub struct SharedPages {
    base: NonNull<u8>,
    pages: usize,
    access: Access,
    /// Keeps heap pages alive, and says which is our first; `None` for memory whose owner is elsewhere.
    heap: Option<(HeapPages, usize)>,
}

// SAFETY: the region is plain memory that any thread may access; every access through the type is atomic
// or volatile and the constructor's contract says that the memory outlives the value.
unsafe impl Send for SharedPages {}
// SAFETY: as above; shared use is what the type is for.
unsafe impl Sync for SharedPages {}

impl SharedPages {
    /// Takes a run of mapped pages as shared memory.
    ///
    /// # Panics
    /// If `base` is not page-aligned.
    ///
    /// # Safety
    /// While the value lives:
    /// 1. `base` is page-aligned and `pages * 4096` bytes from it are mapped, readable, and writable if
    ///    `access` says so; an access never faults (no truncation of what backs it);
    /// 2. nothing in this program holds a Rust reference into those bytes.
    #[must_use]
    pub unsafe fn from_raw(base: NonNull<u8>, pages: usize, access: Access) -> SharedPages {
        assert_eq!(
            base.as_ptr().align_offset(PAGE_SIZE),
            0,
            "shared memory must be page-aligned"
        );
        SharedPages {
            base,
            pages,
            access,
            heap: None,
        }
    }

    /// Pages in the region.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes in the region.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    /// Whether there are no pages at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether stores are allowed.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Loads the little-endian word at byte `offset` once, with acquire ordering.
    ///
    /// # Panics
    /// If the offset is not a multiple of 4 inside the region, or the region is read-only: control words are
    /// shared both ways.
    #[must_use]
    pub fn load_u32(&self, offset: usize) -> u32 {
        let word = words::load(self.word(offset));
        self.loaded(offset, 4);
        word
    }

    /// Stores the little-endian word at byte `offset` with release ordering.
    ///
    /// # Panics
    /// If the offset is not a multiple of 4 inside the region, or the region is read-only.
    pub fn store_u32(&self, offset: usize, value: u32) {
        words::store(self.word(offset), value);
    }

    /// Copies `into.len()` bytes from byte `offset` into private memory, each byte loaded once.
    ///
    /// # Panics
    /// If the range leaves the region.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.slice(offset, into.len()).copy_to(into);
        self.loaded(offset, into.len());
    }

    /// Copies private bytes to byte `offset`.
    ///
    /// # Panics
    /// If the range leaves the region, or the region is read-only.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.slice_mut(offset, from.len()).copy_from(from);
    }

    /// Sets the whole region to zero.
    ///
    /// # Panics
    /// If the region is read-only.
    pub fn zero(&self) {
        for page in 0..self.pages {
            self.write(page * PAGE_SIZE, &[0; PAGE_SIZE]);
        }
    }

    /// A part of the region to read from.
    ///
    /// # Panics
    /// If the range leaves the region.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> SharedSlice<'_> {
        SharedSlice {
            base: self.at(offset, len),
            len,
            pages: PhantomData,
        }
    }

    /// A part of the region to write to.
    ///
    /// # Panics
    /// If the range leaves the region, or the region is read-only.
    #[must_use]
    pub fn slice_mut(&self, offset: usize, len: usize) -> SharedSliceMut<'_> {
        self.assert_writable();
        SharedSliceMut {
            base: self.at(offset, len),
            len,
            pages: PhantomData,
        }
    }

    /// The [`HeapPages`] this is a view of, by its number.
    #[must_use]
    pub fn heap_id(&self) -> Option<usize> {
        self.heap.as_ref().map(|(heap, _)| heap.id())
    }

    fn assert_writable(&self) {
        assert_eq!(self.access, Access::ReadWrite, "this shared memory is read-only");
    }

    /// The address of a checked range (rule 3).
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len() && len <= self.len() - offset,
            "range {offset}+{len} leaves the {} shared bytes",
            self.len()
        );
        // SAFETY: offset <= len(), just checked, and the region is one allocation (rule 1 of `from_raw`).
        unsafe { self.base.as_ptr().add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.assert_writable();
        assert_eq!(offset % 4, 0, "a shared word is 4-aligned");
        let word = self.at(offset, 4).cast::<u32>();
        // SAFETY: in range, aligned and writable (all just checked), valid while `self` is borrowed; an atomic is
        // no reference to plain bytes, and peers and we access ring indexes as whole aligned words.
        unsafe { AtomicU32::from_ptr(word) }
    }

    #[cfg(any(test, feature = "fake"))]
    fn loaded(&self, offset: usize, len: usize) {
        if let Some((heap, first)) = &self.heap
            && let Some(observer) = &heap.0.observer
        {
            observer.loaded(heap, first * PAGE_SIZE + offset, len);
        }
    }

    #[cfg(not(any(test, feature = "fake")))]
    #[expect(clippy::unused_self, reason = "the observed build needs it")]
    fn loaded(&self, _offset: usize, _len: usize) {}
}

impl AsRef<SharedPages> for SharedPages {
    fn as_ref(&self) -> &SharedPages {
        self
    }
}

impl fmt::Debug for SharedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedPages")
            .field("pages", &self.pages)
            .field("access", &self.access)
            .finish()
    }
}

/// Shared bytes to read from: an address and a length, laid out as `struct iovec`.
///
/// Having one tells you: the range is mapped and readable while the borrow lasts. Its bytes may change at
/// any moment, so it must never become a `&[u8]`: hand the pair to the kernel (`pwritev`), or copy.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SharedSlice<'a> {
    base: *mut u8,
    len: usize,
    pages: PhantomData<&'a SharedPages>,
}

/// Shared bytes to write to: an address and a length, laid out as `struct iovec`.
///
/// Having one tells you: the range is mapped and writable while the borrow lasts, and a peer may be
/// writing it too. Hand the pair to the kernel (`preadv`), or copy into it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SharedSliceMut<'a> {
    base: *mut u8,
    len: usize,
    pages: PhantomData<&'a SharedPages>,
}

macro_rules! raw_pair {
    ($name:ident, $pointer:ty) => {
        // SAFETY: an address and a length of memory that any thread may access (see `SharedPages`).
        unsafe impl Send for $name<'_> {}
        // SAFETY: as above.
        unsafe impl Sync for $name<'_> {}

        impl $name<'_> {
            /// First byte.
            #[must_use]
            pub fn as_ptr(&self) -> $pointer {
                self.base
            }

            /// Bytes.
            #[must_use]
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are no bytes.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }
        }

        impl fmt::Debug for $name<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} shared bytes", self.len)
            }
        }
    };
}
raw_pair!(SharedSlice, *const u8);
raw_pair!(SharedSliceMut, *mut u8);

impl<'a> From<SharedSliceMut<'a>> for SharedSlice<'a> {
    fn from(slice: SharedSliceMut<'a>) -> Self {
        let SharedSliceMut { base, len, pages } = slice;
        SharedSlice { base, len, pages }
    }
}

impl SharedSlice<'_> {
    /// Copies all bytes into private memory of the same length, each loaded once.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, into: &mut [u8]) {
        assert_eq!(into.len(), self.len, "copy between slices of different length");
        // SAFETY: `self.len` bytes are readable here, and private memory is no part of a shared region.
        unsafe { load_bytes(self.base, into) };
    }
}

impl SharedSliceMut<'_> {
    /// The first `len` bytes.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn first(&self, len: usize) -> Self {
        assert!(len <= self.len, "{len} of {} shared bytes", self.len);
        SharedSliceMut { len, ..*self }
    }

    /// Copies private bytes of the same length over all of these.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&self, from: &[u8]) {
        assert_eq!(from.len(), self.len, "copy between slices of different length");
        // SAFETY: `self.len` bytes are writable here, and private memory is no part of a shared region.
        unsafe { store_bytes(from, self.base) };
    }
}

/// Bytes of the wide accesses.
const WORD: usize = size_of::<u64>();

/// Bytes from which on the processor's own copy is faster than a loop of words.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const LONG: usize = 256;
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
const LONG: usize = usize::MAX;

/// Copies by one instruction that the compiler can neither drop nor repeat, and that loads each byte once.
///
/// # Safety
/// `len` bytes from `from` are readable and as many from `to` writable.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy_long(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: it touches the two ranges of the contract and nothing else; the direction flag is clear.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// No length is long here.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
unsafe fn copy_long(_from: *const u8, _to: *mut u8, _len: usize) {}

/// Copies bytes that others may write meanwhile, each loaded once: for owners of such memory that have it
/// under no type of this module.
///
/// # Safety
/// `into.len()` bytes from `from` are readable, and `into` is no part of them.
pub unsafe fn load_bytes(from: *const u8, into: &mut [u8]) {
    if into.len() >= LONG {
        // SAFETY: the contract's; `into` is private memory of that length.
        return unsafe { copy_long(from, into.as_mut_ptr(), into.len()) };
    }
    let head = bytes_to_alignment(from, into.len());
    let (first, rest) = into.split_at_mut(head);
    let mut words = rest.chunks_exact_mut(WORD);
    let mut from = from;
    for byte in first {
        from = load_byte(from, byte);
    }
    for word in &mut words {
        // SAFETY: WORD readable bytes are left at `from`, which is aligned after the head.
        let value = unsafe { from.cast::<u64>().read_volatile() };
        word.copy_from_slice(&value.to_ne_bytes());
        // SAFETY: at most one past the last byte.
        from = unsafe { from.add(WORD) };
    }
    for byte in words.into_remainder() {
        from = load_byte(from, byte);
    }
}

/// Copies bytes to where others may read and write them meanwhile; otherwise as [`load_bytes`].
///
/// # Safety
/// `from.len()` bytes from `to` are writable, and `from` is no part of them.
pub unsafe fn store_bytes(from: &[u8], to: *mut u8) {
    if from.len() >= LONG {
        // SAFETY: the contract's; `from` is private memory of that length.
        return unsafe { copy_long(from.as_ptr(), to, from.len()) };
    }
    let head = bytes_to_alignment(to, from.len());
    let (first, rest) = from.split_at(head);
    let words = rest.chunks_exact(WORD);
    let last = words.remainder();
    let mut to = to;
    for byte in first {
        to = store_byte(to, *byte);
    }
    for word in words {
        let mut value = [0; WORD];
        value.copy_from_slice(word);
        // SAFETY: WORD writable bytes are left at `to`, which is aligned after the head.
        unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(value)) };
        // SAFETY: at most one past the last byte.
        to = unsafe { to.add(WORD) };
    }
    for byte in last {
        to = store_byte(to, *byte);
    }
}

/// Copies from shared memory to shared memory; otherwise as [`load_bytes`]. Bytes of ranges that overlap are
/// loaded before or after they are stored.
///
/// # Safety
/// `len` bytes from `from` are readable, and as many from `to` writable.
pub unsafe fn move_bytes(from: *const u8, to: *mut u8, len: usize) {
    if len >= LONG {
        // SAFETY: the contract's.
        return unsafe { copy_long(from, to, len) };
    }
    let mut buffer = [0; 256];
    for index in (0..len).step_by(buffer.len()) {
        let chunk = &mut buffer[..(len - index).min(256)];
        // SAFETY: index + the chunk's length <= len, which both ranges span.
        unsafe { load_bytes(from.wrapping_add(index), chunk) };
        // SAFETY: as above.
        unsafe { store_bytes(chunk, to.wrapping_add(index)) };
    }
}

/// How many of `len` bytes lie before the first aligned word.
fn bytes_to_alignment(base: *const u8, len: usize) -> usize {
    (base.addr().next_multiple_of(WORD) - base.addr()).min(len)
}

/// Loads the byte at `from` and returns the address behind it. Private to the loops above, which hold the
/// range that it belongs to.
#[inline(always)]
fn load_byte(from: *const u8, into: &mut u8) -> *const u8 {
    // SAFETY: the caller's loop is inside a checked range (rule 3).
    *into = unsafe { from.read_volatile() };
    // SAFETY: at most one past the last byte of the region.
    unsafe { from.add(1) }
}

/// Stores a byte at `to` and returns the address behind it, as [`load_byte`].
#[inline(always)]
fn store_byte(to: *mut u8, byte: u8) -> *mut u8 {
    // SAFETY: the caller's loop is inside a checked range (rule 3).
    unsafe { to.write_volatile(byte) };
    // SAFETY: at most one past the last byte of the region.
    unsafe { to.add(1) }
}

#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; PAGE_SIZE]>);

struct Heap {
    pages: Box<[Page]>,
    #[cfg(any(test, feature = "fake"))]
    observer: Option<Arc<dyn Observer>>,
}

// SAFETY: the pages are reached through `SharedPages` only, whose accesses are atomic or volatile.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

/// Zeroed pages of this program's heap, to share between threads: what tests, benches and programs that
/// connect both ends in one address space use. Clones are the same memory.
#[derive(Clone)]
pub struct HeapPages(Arc<Heap>);

impl HeapPages {
    /// `pages` zeroed, contiguous pages.
    #[must_use]
    pub fn zeroed(pages: usize) -> HeapPages {
        HeapPages(Arc::new(Heap {
            pages: Self::fresh(pages),
            #[cfg(any(test, feature = "fake"))]
            observer: None,
        }))
    }

    /// As [`HeapPages::zeroed`], and tells `observer` of every load through a view.
    #[cfg(any(test, feature = "fake"))]
    #[must_use]
    pub fn observed(pages: usize, observer: Arc<dyn Observer>) -> HeapPages {
        HeapPages(Arc::new(Heap {
            pages: Self::fresh(pages),
            observer: Some(observer),
        }))
    }

    fn fresh(pages: usize) -> Box<[Page]> {
        core::iter::repeat_with(|| Page(UnsafeCell::new([0; PAGE_SIZE])))
            .take(pages)
            .collect()
    }

    /// Pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.0.pages.len()
    }

    /// A number that tells one run from another while both live.
    #[must_use]
    pub fn id(&self) -> usize {
        self.0.pages.as_ptr().addr()
    }

    /// Whether both are the same memory.
    #[must_use]
    pub fn same(&self, other: &HeapPages) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The whole run, writable.
    #[must_use]
    pub fn view(&self) -> SharedPages {
        self.view_of(0, self.pages(), Access::ReadWrite)
    }

    /// `pages` pages from page `first`.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn view_of(&self, first: usize, pages: usize, access: Access) -> SharedPages {
        let part = &self.0.pages[first..][..pages];
        // The cell lets the pointer of a shared slice be written through.
        let base = NonNull::from(part).cast::<u8>();
        SharedPages {
            base,
            pages,
            access,
            heap: Some((self.clone(), first)),
        }
    }
}

impl fmt::Debug for HeapPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HeapPages({})", self.pages())
    }
}

/// Watches loads from [`HeapPages`], and may rewrite the memory after each: how tests show that nothing
/// that was judged is read a second time (T-155).
#[cfg(any(test, feature = "fake"))]
pub trait Observer: Send + Sync {
    /// `len` bytes at byte `offset` of the whole run were loaded.
    fn loaded(&self, pages: &HeapPages, offset: usize, len: usize);
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn copies_keep_every_byte_at_every_alignment() {
        let heap = HeapPages::zeroed(1);
        let pages = heap.view();
        let pattern: vec::Vec<u8> = (1..=251).cycle().take(1024).collect();
        let lengths = (0..40).chain(250..262).chain(1000..1004);
        for offset in 0..9 {
            for len in lengths.clone() {
                pages.zero();
                pages.write(offset, &pattern[..len]);
                let mut whole = vec![0xEE; PAGE_SIZE];
                pages.read(0, &mut whole);
                assert!(whole[..offset].iter().all(|byte| *byte == 0));
                assert_eq!(&whole[offset..][..len], &pattern[..len]);
                assert!(whole[offset + len..].iter().all(|byte| *byte == 0));
                let mut back = vec![0; len];
                pages.read(offset, &mut back);
                assert_eq!(back, &pattern[..len]);
            }
        }
    }

    fn refused(access: impl FnOnce(&SharedPages) + std::panic::UnwindSafe) -> bool {
        std::panic::catch_unwind(move || access(&HeapPages::zeroed(1).view())).is_err()
    }

    #[test]
    fn nothing_outside_the_region_is_touched() {
        assert!(refused(|pages| pages.write(4095, &[0; 2])));
        assert!(refused(|pages| pages.read(usize::MAX, &mut [0; 2])));
        assert!(refused(|pages| assert_eq!(pages.load_u32(4096), 0)));
        assert!(refused(|pages| assert_eq!(pages.load_u32(2), 0)));
        assert!(!refused(|pages| assert_eq!(pages.load_u32(4092), 0)));
    }

    #[test]
    fn a_read_only_region_is_never_written() {
        let read_only = || HeapPages::zeroed(1).view_of(0, 1, Access::ReadOnly);
        assert!(std::panic::catch_unwind(|| read_only().write(0, &[1])).is_err());
        assert!(std::panic::catch_unwind(|| read_only().store_u32(0, 1)).is_err());
        assert!(std::panic::catch_unwind(|| assert_eq!(read_only().slice_mut(0, 1).len(), 1)).is_err());
    }
}
