//! The words that a guest can write: the only module that touches them.
//!
//! Rules:
//! 1. Every access is one atomic of the width that the interface gives the word: 32 bits for the
//!    head of an entry, 32 for a version 1 frame, 64 for a version 2 frame, 16 for a status word.
//! 2. What was read is what is judged. No function here reads a word twice for one answer.
//! 3. No reference to plain bytes of a page is ever formed; the guest may write at any instant. Content
//!    is moved by an instruction of the processor or by atomics, which both have a meaning then: a plain
//!    access of the language has none.
//! 4. An index is checked against the page before it becomes an address, and masked, so that a
//!    mispredicted check reaches no other memory either.

#![cfg_attr(
    not(loom),
    expect(
        unsafe_code,
        reason = "the one place where shared memory is turned into atomics"
    )
)]

#[cfg(not(loom))]
use core::cell::UnsafeCell;
#[cfg(all(not(loom), any(miri, not(target_arch = "x86_64"))))]
use core::sync::atomic::AtomicU8;

#[cfg(not(loom))]
use gnttab_abi::PAGE_SIZE;
use gnttab_abi::{EntryFlags, EntryHead, EntryV1, EntryV2};

use crate::ahead::{fetch_to_read, fetch_to_write};
#[cfg(not(loom))]
use crate::bound::below_wide;
#[cfg(loom)]
use crate::pages::V1_ENTRIES_PER_PAGE;
use crate::pages::{STATUS_PER_PAGE, V2_ENTRIES_PER_PAGE};
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering, full_barrier};

/// Bytes of a cache line, and how many of them are asked for ahead of a copy.
#[cfg(not(loom))]
const LINE: usize = 64;
#[cfg(not(loom))]
const LINES_AHEAD: usize = 4;

/// One page that a guest shares, as atomic words.
///
/// Having a reference to one tells you: the 4096 bytes are there for as long as the reference
/// is. It tells you nothing about what they hold from one read to the next.
///
/// ```
/// use gnttab_engine::PageWords;
///
/// let page = PageWords::zeroed();
/// assert_eq!(page.read_bytes::<8>(4088), Some([0; 8]));
/// ```
#[cfg(not(loom))]
#[repr(C, align(4096))]
pub struct PageWords(UnsafeCell<[u8; PAGE_SIZE]>);

/// The first words of a page, for the model checker, whose atomics are no plain memory. A 64-bit access
/// is two of 32 bits there: whatever can come of one can come of two. Frames of version 2 entries and
/// status words lie apart: nobody touches them by another width.
#[cfg(loom)]
pub struct PageWords {
    words16: [AtomicU16; STATUS_PER_PAGE as usize],
    words32: [AtomicU32; V1_ENTRIES_PER_PAGE as usize * V1_HEAD_WORDS],
    frames: [AtomicU64; V2_ENTRIES_PER_PAGE as usize],
}

/// See [`PageWords`].
#[cfg(loom)]
struct Halves<'a>(&'a AtomicU32, &'a AtomicU32);

#[cfg(loom)]
impl Halves<'_> {
    fn load(&self, order: Ordering) -> u64 {
        u64::from(self.0.load(order)) | u64::from(self.1.load(order)) << 32
    }

    fn store(&self, value: u64, order: Ordering) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.0.store(u32::from_le_bytes([a, b, c, d]), order);
        self.1.store(u32::from_le_bytes([e, f, g, h]), order);
    }
}

#[cfg(loom)]
impl PageWords {
    /// A page of zeros.
    #[must_use]
    pub fn zeroed() -> PageWords {
        PageWords {
            words16: core::array::from_fn(|_| AtomicU16::new(0)),
            words32: core::array::from_fn(|_| AtomicU32::new(0)),
            frames: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// For the models.
    #[cfg(test)]
    pub(crate) fn u16(&self, index: usize) -> &AtomicU16 {
        &self.words16[index]
    }

    fn status_rows(&self) -> &[StatusRow] {
        self.words16.as_chunks().0
    }

    #[inline]
    pub(crate) fn u32(&self, index: usize) -> &AtomicU32 {
        &self.words32[index % self.words32.len()]
    }

    fn u64(&self, index: usize) -> Halves<'_> {
        Halves(self.u32(index * 2), self.u32(index * 2 + 1))
    }

    #[inline]
    pub(crate) fn v2_frame(&self, slot: usize) -> &AtomicU64 {
        &self.frames[slot % self.frames.len()]
    }

    /// The checker's words are no plain memory.
    pub(crate) fn words(_: &[PageWords]) -> Option<&[AtomicU64]> {
        None
    }

    /// Never asked for: there are no [`PageWords::words`].
    pub(crate) fn quarter(_: &AtomicU64, _: usize) -> &'static AtomicU16 {
        unreachable!("words of the checker's have no parts")
    }

    pub(crate) fn clear(&self) {
        for word in &self.words32 {
            word.store(0, Ordering::Relaxed);
        }
        for word in &self.words16 {
            word.store(0, Ordering::Relaxed);
        }
        for word in &self.frames {
            word.store(0, Ordering::Relaxed);
        }
    }
}

// SAFETY: every access to the bytes goes through atomics or through `carry`, which both allow
// concurrent writers; no reference to the bytes is ever handed out.
#[cfg(not(loom))]
unsafe impl Sync for PageWords {}

#[cfg(not(loom))]
impl PageWords {
    /// A page of zeros.
    #[must_use]
    pub const fn zeroed() -> PageWords {
        PageWords(UnsafeCell::new([0; PAGE_SIZE]))
    }

    /// First byte, for embedders that map the page elsewhere.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.0.get().cast()
    }

    #[inline]
    fn u16(&self, index: usize) -> &AtomicU16 {
        let index = index & (PAGE_SIZE / 2 - 1);
        // SAFETY: the masked index lies within the page, the page is aligned for u16, it lives as
        // long as `self`, and all access to it is atomic.
        unsafe { &*self.as_ptr().cast::<AtomicU16>().wrapping_add(index) }
    }

    #[inline]
    fn u32(&self, index: usize) -> &AtomicU32 {
        let index = index & (PAGE_SIZE / 4 - 1);
        // SAFETY: as for u16, aligned for u32.
        unsafe { &*self.as_ptr().cast::<AtomicU32>().wrapping_add(index) }
    }

    #[inline]
    fn u64(&self, index: usize) -> &AtomicU64 {
        let index = index & (PAGE_SIZE / 8 - 1);
        // SAFETY: as for u16, aligned for u64.
        unsafe { &*self.as_ptr().cast::<AtomicU64>().wrapping_add(index) }
    }

    fn status_rows(&self) -> &[StatusRow; (STATUS_PER_PAGE / V2_ENTRIES_PER_PAGE) as usize] {
        const { assert!(size_of::<[u16; STATUS_PER_PAGE as usize]>() == PAGE_SIZE) };
        // SAFETY: the page's own bytes, as many as are named, aligned for u16; they live as long as `self`,
        // and all access to them is atomic.
        unsafe { &*self.as_ptr().cast() }
    }

    /// The frame of version 2 entry `slot`: the upper half of its 16 bytes.
    fn v2_frame(&self, slot: usize) -> &AtomicU64 {
        self.u64(slot * 2 + 1)
    }

    /// The words of pages that lie one behind the other; `None` where memory is not made of such words.
    #[inline]
    pub(crate) fn words(pages: &[PageWords]) -> Option<&[AtomicU64]> {
        let words = pages.as_ptr().cast();
        // SAFETY: the pages' own bytes, aligned for u64; they live as long as the slice, and all access to them
        // is atomic.
        Some(unsafe { core::slice::from_raw_parts(words, pages.len() * (PAGE_SIZE / 8)) })
    }

    /// The `at`th 16 bits of a word of a page, counted from the least significant; the number is taken modulo
    /// four.
    #[inline(always)]
    pub(crate) fn quarter(word: &AtomicU64, at: usize) -> &AtomicU16 {
        let quarters: *const AtomicU16 = core::ptr::from_ref(word).cast();
        let at = if cfg!(target_endian = "little") {
            at % 4
        } else {
            3 - at % 4
        };
        // SAFETY: within the word, which is aligned for more, lives as long as the reference, and is accessed by
        // atomics only.
        unsafe { &*quarters.wrapping_add(at) }
    }

    /// Reads `N` bytes at `offset`, in any order; `None` past the end of the page. For argument
    /// structures and observers, not for entries.
    #[must_use]
    pub fn read_bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes).then_some(bytes)
    }

    /// Copies bytes out of the page; false, and nothing done, past its end.
    #[must_use]
    #[inline(always)]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        PageWords::read_run(core::slice::from_ref(self), offset, into)
    }

    /// Copies bytes into the page; false, and nothing done, past its end.
    #[must_use]
    #[inline(always)]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        PageWords::write_run(core::slice::from_ref(self), offset, bytes)
    }

    /// Copies bytes out of pages that lie one behind the other, `offset` counted from the first; false, and
    /// nothing done, past the end of the last.
    ///
    /// ```
    /// use gnttab_engine::PageWords;
    ///
    /// let pages = [PageWords::zeroed(), PageWords::zeroed()];
    /// assert!(PageWords::write_run(&pages, 4094, b"both"));
    /// assert_eq!(pages[1].read_bytes::<2>(0), Some(*b"th"));
    /// let mut bytes = [0; 4];
    /// assert!(PageWords::read_run(&pages, 4094, &mut bytes));
    /// assert_eq!(&bytes, b"both");
    /// assert!(!PageWords::read_run(&pages, 8190, &mut bytes));
    /// ```
    #[must_use]
    #[inline(always)]
    pub fn read_run(pages: &[PageWords], offset: usize, into: &mut [u8]) -> bool {
        let len = into.len();
        let Some(run) = Run::at(pages, offset, len) else {
            return false;
        };
        match Form::of(offset, len) {
            Form::Words => {
                for (at, word) in into.as_chunks_mut().0.iter_mut().enumerate() {
                    *word = run.u64(at).load(Ordering::Relaxed).to_le_bytes();
                }
            }
            Form::Half => into.copy_from_slice(&run.u32().load(Ordering::Relaxed).to_le_bytes()),
            Form::Quarter => into.copy_from_slice(&run.u16().load(Ordering::Relaxed).to_le_bytes()),
            // What lies in registers otherwise stays there: the bytes of an argument are not to be given an
            // address for the sake of the few that lie across words.
            Form::Askew => into.copy_from_slice(&load_askew(pages, run.offset, len)[..len]),
            Form::Bytes => run.load(into),
        }
        true
    }

    /// Copies bytes into pages that lie one behind the other; otherwise as [`PageWords::read_run`].
    #[must_use]
    #[inline(always)]
    pub fn write_run(pages: &[PageWords], offset: usize, bytes: &[u8]) -> bool {
        let len = bytes.len();
        let Some(run) = Run::at(pages, offset, len) else {
            return false;
        };
        match Form::of(offset, len) {
            Form::Words => {
                for (at, word) in bytes.as_chunks().0.iter().enumerate() {
                    run.u64(at).store(u64::from_le_bytes(*word), Ordering::Relaxed);
                }
            }
            Form::Half => {
                let word = bytes.first_chunk().copied().unwrap_or_default();
                run.u32().store(u32::from_le_bytes(word), Ordering::Relaxed);
            }
            Form::Quarter => {
                let word = bytes.first_chunk().copied().unwrap_or_default();
                run.u16().store(u16::from_le_bytes(word), Ordering::Relaxed);
            }
            Form::Askew => {
                let mut few = [0; FEW];
                few[..len].copy_from_slice(bytes);
                store_askew(pages, run.offset, few, len);
            }
            Form::Bytes => run.store(bytes),
        }
        true
    }

    /// Moves `len` bytes from one page to another, or within one; false, and nothing done, if a
    /// range passes the end of its page. Overlapping ranges end as an ascending copy may leave
    /// them. Either side may be written by guests meanwhile: the bytes are data to nobody here.
    #[must_use]
    #[inline(always)]
    pub fn copy(source: &PageWords, from: u16, dest: &PageWords, to: u16, len: u16) -> bool {
        let (from, to, len) = (usize::from(from), usize::from(to), usize::from(len));
        if from + len > PAGE_SIZE || to + len > PAGE_SIZE {
            return false;
        }
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: both ranges were checked to lie in their pages, which anybody may write.
        unsafe {
            carry(
                source.as_ptr().wrapping_add(from),
                dest.as_ptr().wrapping_add(to),
                len,
            );
        }
        #[cfg(any(miri, not(target_arch = "x86_64")))]
        {
            let aligned = from.is_multiple_of(8) && to.is_multiple_of(8);
            let words = if aligned { len / 8 } else { 0 };
            for at in 0..words {
                let word = source.u64(from / 8 + at).load(Ordering::Relaxed);
                dest.u64(to / 8 + at).store(word, Ordering::Relaxed);
            }
            let side = |page, offset| Run::at(core::slice::from_ref(page), offset, len);
            if let (Some(source), Some(dest)) = (side(source, from), side(dest, to)) {
                for at in words * 8..len {
                    dest.u8(at)
                        .store(source.u8(at).load(Ordering::Relaxed), Ordering::Relaxed);
                }
            }
        }
        true
    }

    /// A hint: `len` bytes from `from` will be read soon. The first lines are asked for; once these are
    /// used, the processor sees for itself where the reading goes.
    #[inline]
    pub fn fetch_bytes_to_read(&self, from: u16, len: u16) {
        let line = |number: usize| {
            let offset = (usize::from(from) + number * LINE) % PAGE_SIZE;
            fetch_to_read(self.u16(offset / 2));
        };
        if len > 0 {
            line(0);
        }
        if usize::from(len) > LINE {
            (1..usize::from(len).div_ceil(LINE).min(LINES_AHEAD)).for_each(line);
        }
    }

    /// Zeroes the page.
    pub(crate) fn clear(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: the page's own bytes, which `&self` lets anybody write; the direction flag is clear
        // wherever Rust code runs.
        unsafe {
            core::arch::asm!(
                "rep stosq",
                inout("rcx") PAGE_SIZE / 8 => _, inout("rdi") self.as_ptr() => _, in("rax") 0,
                options(nostack, preserves_flags),
            );
        }
        #[cfg(any(miri, not(target_arch = "x86_64")))]
        for i in 0..PAGE_SIZE / 8 {
            self.u64(i).store(0, Ordering::Relaxed);
        }
    }
}

/// The longest argument, and what is moved by words of the processor's.
#[cfg(not(loom))]
const FEW: usize = 40;

/// How bytes are best moved between a page and registers.
#[cfg(not(loom))]
#[derive(Clone, Copy)]
enum Form {
    /// Whole aligned words of 64 bits, few of them.
    Words,
    Half,
    Quarter,
    /// As many as these, but across words.
    Askew,
    Bytes,
}

#[cfg(not(loom))]
impl Form {
    #[inline(always)]
    fn of(offset: usize, len: usize) -> Form {
        let aligned = |size| offset.is_multiple_of(size);
        match len {
            8 | 16 | 24 | 32 | FEW if aligned(8) => Form::Words,
            4 if aligned(4) => Form::Half,
            2 if aligned(2) => Form::Quarter,
            2 | 4 | 8 | 16 | 24 | 32 | FEW => Form::Askew,
            _ => Form::Bytes,
        }
    }
}

/// Bytes of pages that lie one behind the other. Having one tells you: they are there, all `len` of them, at
/// the place that was asked for, or, where the processor runs ahead of the check, at the first.
#[cfg(not(loom))]
#[derive(Clone, Copy)]
struct Run<'a> {
    pages: &'a [PageWords],
    offset: usize,
}

#[cfg(not(loom))]
impl<'a> Run<'a> {
    #[inline(always)]
    fn at(pages: &'a [PageWords], offset: usize, len: usize) -> Option<Run<'a>> {
        let places = size_of_val(pages).checked_sub(len)? + 1;
        let offset = below_wide(offset, places)?;
        Some(Run { pages, offset })
    }

    #[inline(always)]
    fn start(self) -> *mut u8 {
        // The bytes of a page may be written through `&PageWords`; a slice of them is no different.
        self.pages
            .as_ptr()
            .cast_mut()
            .cast::<u8>()
            .wrapping_add(self.offset)
    }

    /// The `at`th byte.
    #[cfg(any(miri, not(target_arch = "x86_64")))]
    #[inline]
    fn u8(self, at: usize) -> &'a AtomicU8 {
        // SAFETY: callers stay below the length that `Run::at` checked; the pages live for `'a`, and all
        // access to them is atomic.
        unsafe { &*self.start().cast::<AtomicU8>().wrapping_add(at) }
    }

    /// Of a run of two bytes at an even offset.
    #[inline(always)]
    fn u16(self) -> &'a AtomicU16 {
        // SAFETY: as for u8; `Form` saw that the offset is a multiple of 2, and pages are aligned.
        unsafe { &*self.start().cast::<AtomicU16>() }
    }

    /// Of a run of four bytes.
    #[inline(always)]
    fn u32(self) -> &'a AtomicU32 {
        // SAFETY: as for u16, of 4.
        unsafe { &*self.start().cast::<AtomicU32>() }
    }

    /// The `at`th word of a run of whole words.
    #[inline(always)]
    fn u64(self, at: usize) -> &'a AtomicU64 {
        // SAFETY: as for u16, of 8; callers stay below the length in words.
        unsafe { &*self.start().cast::<AtomicU64>().wrapping_add(at) }
    }

    /// Fills `into`, which is as long as the run.
    #[inline(always)]
    fn load(self, into: &mut [u8]) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: the run is there; `into` is exclusive memory elsewhere.
        unsafe {
            carry(self.start(), into.as_mut_ptr(), into.len());
        }
        #[cfg(any(miri, not(target_arch = "x86_64")))]
        for (at, byte) in into.iter_mut().enumerate() {
            *byte = self.u8(at).load(Ordering::Relaxed);
        }
    }

    /// Writes `bytes`, as many as the run has.
    #[inline(always)]
    fn store(self, bytes: &[u8]) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: the run is there, and `&PageWords` lets anybody write it.
        unsafe {
            carry(bytes.as_ptr(), self.start(), bytes.len());
        }
        #[cfg(any(miri, not(target_arch = "x86_64")))]
        for (at, byte) in bytes.iter().enumerate() {
            self.u8(at).store(*byte, Ordering::Relaxed);
        }
    }
}

#[cfg(not(loom))]
#[cold]
fn load_askew(pages: &[PageWords], offset: usize, len: usize) -> [u8; FEW] {
    let mut few = [0; FEW];
    if let Some(run) = Run::at(pages, offset, len) {
        run.load(&mut few[..len]);
    }
    few
}

#[cfg(not(loom))]
#[cold]
fn store_askew(pages: &[PageWords], offset: usize, few: [u8; FEW], len: usize) {
    if let Some(run) = Run::at(pages, offset, len) {
        run.store(&few[..len]);
    }
}

/// Moves bytes by instructions that have a meaning whatever is written meanwhile, also to the same bytes,
/// which accesses of the language have not. Of every 64 bytes all are loaded before the first is stored. (A string
/// instruction is no faster within a cache, and what comes behind it waits for its end.)
///
/// # Safety
///
/// `from` can be read and `to` written for `len` bytes, and nobody but the holders of a [`PageWords`]
/// reaches them meanwhile.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
#[expect(clippy::multiple_unsafe_ops_per_block, reason = "one arm of them runs")]
#[inline(always)]
unsafe fn carry(mut from: *const u8, mut to: *mut u8, mut len: usize) {
    use core::arch::asm;

    /// Two moves of one width: the first bytes, and the last, which may be some of the same.
    macro_rules! ends {
        ($class:ident, $mov:literal, $($form:literal)?, $width:literal) => {
            asm!(
                concat!($mov, " {a", $($form,)? "}, [{from}]"),
                concat!($mov, " {b", $($form,)? "}, [{from} + {len} - ", $width, "]"),
                concat!($mov, " [{to}], {a", $($form,)? "}"),
                concat!($mov, " [{to} + {len} - ", $width, "], {b", $($form,)? "}"),
                from = in(reg) from, to = in(reg) to, len = in(reg) len,
                a = out($class) _, b = out($class) _,
                options(nostack, preserves_flags),
            )
        };
    }
    while len > LINE {
        // SAFETY: the caller's promise; more than these bytes are left.
        unsafe {
            asm!(
                "movups {a}, [{from}]",
                "movups {b}, [{from} + 16]",
                "movups {c}, [{from} + 32]",
                "movups {d}, [{from} + 48]",
                "movups [{to}], {a}",
                "movups [{to} + 16], {b}",
                "movups [{to} + 32], {c}",
                "movups [{to} + 48], {d}",
                from = in(reg) from, to = in(reg) to,
                a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _,
                options(nostack, preserves_flags),
            );
        }
        (from, to, len) = (from.wrapping_add(LINE), to.wrapping_add(LINE), len - LINE);
    }
    // SAFETY: the caller's promise; each arm stays within `len` bytes, which its range says it has.
    unsafe {
        match len {
            33.. => asm!(
                "movups {a}, [{from}]",
                "movups {b}, [{from} + 16]",
                "movups {c}, [{from} + {len} - 32]",
                "movups {d}, [{from} + {len} - 16]",
                "movups [{to}], {a}",
                "movups [{to} + 16], {b}",
                "movups [{to} + {len} - 32], {c}",
                "movups [{to} + {len} - 16], {d}",
                from = in(reg) from, to = in(reg) to, len = in(reg) len,
                a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _,
                options(nostack, preserves_flags),
            ),
            16.. => ends!(xmm_reg, "movups", , 16),
            8.. => ends!(reg, "mov", , 8),
            4.. => ends!(reg, "mov", ":e", 4),
            2.. => ends!(reg, "mov", ":x", 2),
            1 => asm!("mov {a}, [{from}]", "mov [{to}], {a}",
                from = in(reg) from, to = in(reg) to, a = out(reg_byte) _,
                options(nostack, preserves_flags)),
            0 => {}
        }
    }
}

impl Default for PageWords {
    fn default() -> Self {
        PageWords::zeroed()
    }
}

impl core::fmt::Debug for PageWords {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("PageWords(..)")
    }
}

/// The status words of one frame's entries: a part of a status page.
pub(crate) type StatusRow = [AtomicU16; STATUS_ROW];
const STATUS_ROW: usize = V2_ENTRIES_PER_PAGE as usize;

impl PageWords {
    /// The `row`th part of a status page. The number is taken modulo that of the parts.
    pub(crate) fn status_row(&self, row: usize) -> &StatusRow {
        let rows = self.status_rows();
        &rows[row % rows.len()]
    }
}

/// Words of the head of an entry, per version.
const V1_HEAD_WORDS: usize = 2;
const V2_HEAD_WORDS: usize = 4;

/// A version 1 entry in its page. Having one tells you: the index was inside the table. The slot is taken modulo the
/// entries of a page.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct SharedV1<'a> {
    page: &'a PageWords,
    slot: usize,
}

impl<'a> SharedV1<'a> {
    #[inline]
    pub(crate) fn new(page: &'a PageWords, slot: usize) -> Self {
        SharedV1 { page, slot }
    }

    #[inline]
    fn head(&self) -> &'a AtomicU32 {
        self.page.u32(self.slot * V1_HEAD_WORDS)
    }

    #[inline]
    fn frame_word(&self) -> &'a AtomicU32 {
        self.page.u32(self.slot * V1_HEAD_WORDS + 1)
    }

    /// A hint: the entry will be marked soon.
    #[inline(always)]
    pub(crate) fn expect(&self) {
        fetch_to_write(self.head());
    }

    /// One load of flags and grantee.
    #[inline]
    pub(crate) fn load_head(&self) -> EntryHead {
        EntryHead::from_word(self.head().load(Ordering::Acquire))
    }

    /// Replaces the head if it still is `old`; otherwise what was found.
    #[inline]
    pub(crate) fn swap_head(&self, old: EntryHead, new: EntryHead) -> Result<(), EntryHead> {
        self.head()
            .compare_exchange(old.word(), new.word(), Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(EntryHead::from_word)
    }

    /// Clears flags, and nothing else, in one step.
    #[inline]
    pub(crate) fn clear_flags(&self, flags: EntryFlags) {
        self.head().fetch_and(!u32::from(flags.bits()), Ordering::Release);
    }

    /// Sets flags, and nothing else, after all earlier stores.
    pub(crate) fn set_flags(&self, flags: EntryFlags) {
        self.head().fetch_or(u32::from(flags.bits()), Ordering::Release);
    }

    #[inline]
    pub(crate) fn load_frame(&self) -> u32 {
        self.frame_word().load(Ordering::Relaxed)
    }

    pub(crate) fn store_frame(&self, frame: u32) {
        self.frame_word().store(frame, Ordering::Relaxed);
    }

    /// The whole entry, in one load.
    pub(crate) fn load(&self) -> EntryV1 {
        EntryV1::from_bytes(self.page.u64(self.slot).load(Ordering::Relaxed).to_le_bytes())
    }

    pub(crate) fn store(&self, entry: EntryV1) {
        self.page
            .u64(self.slot)
            .store(u64::from_le_bytes(entry.to_bytes()), Ordering::Relaxed);
    }
}

/// A version 2 entry and its status word. Having one tells you: the index was inside the table. The slot is taken
/// modulo the entries of a page.
///
/// The status words come first: so the two versions have page and slot at the same place wherever it may be
/// either, and only the status words tell them apart.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct SharedV2<'a> {
    status: &'a StatusRow,
    page: &'a PageWords,
    slot: usize,
}

impl<'a> SharedV2<'a> {
    #[inline]
    pub(crate) fn new(page: &'a PageWords, slot: usize, status: &'a StatusRow) -> Self {
        SharedV2 { status, page, slot }
    }

    #[inline]
    fn head(&self) -> &'a AtomicU32 {
        self.page.u32(self.slot * V2_HEAD_WORDS)
    }

    #[inline]
    fn status(&self) -> &'a AtomicU16 {
        &self.status[self.slot % STATUS_ROW]
    }

    /// A hint: the entry will be read and its status word marked soon.
    #[inline(always)]
    pub(crate) fn expect(&self) {
        fetch_to_read(self.head());
        fetch_to_write(self.status());
    }

    /// One load of flags and grantee.
    #[inline]
    pub(crate) fn load_head(&self) -> EntryHead {
        EntryHead::from_word(self.head().load(Ordering::Acquire))
    }

    /// Marks the status word, then loads the head again, with a full barrier between: either the
    /// granter sees the mark or this sees the granter's change (spec 4.1.2 steps 3 to 5).
    #[inline]
    pub(crate) fn mark_then_load_head(&self, mark: EntryFlags, between: impl FnOnce()) -> EntryHead {
        self.status().fetch_or(mark.bits(), Ordering::SeqCst);
        full_barrier();
        between();
        EntryHead::from_word(self.head().load(Ordering::SeqCst))
    }

    /// Clears bits of the status word, and nothing else, in one step.
    #[inline]
    pub(crate) fn clear_status(&self, flags: EntryFlags) {
        self.status().fetch_and(!flags.bits(), Ordering::Release);
    }

    pub(crate) fn load_status(&self) -> EntryFlags {
        EntryFlags::from_bits_retain(self.status().load(Ordering::Relaxed))
    }

    pub(crate) fn store_status(&self, flags: EntryFlags) {
        self.status().store(flags.bits(), Ordering::Relaxed);
    }

    /// Replaces the head if it still is `old`; otherwise what was found.
    #[inline]
    pub(crate) fn swap_head(&self, old: EntryHead, new: EntryHead) -> Result<(), EntryHead> {
        self.head()
            .compare_exchange(old.word(), new.word(), Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(EntryHead::from_word)
    }

    /// Sets flags of the head, and nothing else, after all earlier stores.
    pub(crate) fn set_flags(&self, flags: EntryFlags) {
        self.head().fetch_or(u32::from(flags.bits()), Ordering::Release);
    }

    /// The frame, in one 64-bit load.
    #[inline]
    pub(crate) fn load_frame(&self) -> u64 {
        self.page.v2_frame(self.slot).load(Ordering::Relaxed)
    }

    pub(crate) fn store_frame(&self, frame: u64) {
        self.page.v2_frame(self.slot).store(frame, Ordering::Relaxed);
    }

    /// Offset and length of a sub-page grant, or far domain and padding of a transitive one: one
    /// 32-bit load.
    pub(crate) fn load_halves(&self) -> (u16, u16) {
        let [a, b, c, d] = self
            .page
            .u32(self.slot * V2_HEAD_WORDS + 1)
            .load(Ordering::Relaxed)
            .to_le_bytes();
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }

    /// The whole entry. The guest can change it between the two loads; for entries that nobody
    /// is judged by (swap, version change, observers).
    pub(crate) fn load(&self) -> EntryV2 {
        let low = self.page.u64(self.slot * 2).load(Ordering::Relaxed);
        let all = u128::from(low) | u128::from(self.load_frame()) << 64;
        EntryV2::from_bytes(all.to_le_bytes())
    }

    pub(crate) fn store(&self, entry: EntryV2) {
        let [a, b, c, d, e, f, g, h, ..] = entry.to_bytes();
        self.page
            .u64(self.slot * 2)
            .store(u64::from_le_bytes([a, b, c, d, e, f, g, h]), Ordering::Relaxed);
        self.store_frame(entry.frame);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::PageWords;

    /// A page whose neighbouring bytes all differ.
    fn numbered() -> (PageWords, Vec<u8>) {
        let bytes: Vec<u8> = (0..4096_u32)
            .map(|at| (at * 7 + at / 256).to_le_bytes()[0])
            .collect();
        let page = PageWords::zeroed();
        assert!(page.write(0, &bytes));
        (page, bytes)
    }

    fn content(page: &PageWords) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        assert!(page.read(0, &mut bytes));
        bytes
    }

    #[test]
    fn whatever_the_alignment_the_bytes_named_move_and_no_others() {
        let (page, bytes) = numbered();
        for (from, to) in [(0, 0), (8, 16), (16, 8), (3, 8), (8, 3), (5, 13), (4000, 1)] {
            for len in [0, 1, 2, 7, 8, 9, 16, 24, 32, 40, 63, 64, 65, 96] {
                let (at, end, there) = (usize::from(from), usize::from(from + len), usize::from(to));
                let mut expected = vec![0; 4096];
                expected[there..there + usize::from(len)].copy_from_slice(&bytes[at..end]);

                let dest = PageWords::zeroed();
                assert!(PageWords::copy(&page, from, &dest, to, len));
                assert_eq!(content(&dest), expected, "copy of {len} from {from} to {to}");

                let dest = PageWords::zeroed();
                let mut taken = vec![0; usize::from(len)];
                assert!(page.read(at, &mut taken));
                assert!(dest.write(there, &taken));
                assert_eq!(content(&dest), expected, "{len} read at {from}, written at {to}");
            }
        }
    }

    #[test]
    fn what_would_pass_the_end_is_not_begun() {
        let (page, bytes) = numbered();
        for (at, len) in [(4096, 1), (4095, 2), (0, 4097), (4097, 0), (usize::MAX, 2)] {
            let mut into = vec![0xEE; len];
            assert!(!page.read(at, &mut into));
            assert!(into.iter().all(|byte| *byte == 0xEE));
            assert!(!page.write(at, &into));
        }
        let other = PageWords::zeroed();
        for (from, to, len) in [(1, 0, 4096), (0, 1, 4096), (u16::MAX, 0, 1), (0, 0, u16::MAX)] {
            assert!(!PageWords::copy(&other, from, &page, to, len));
        }
        assert_eq!(content(&page), bytes);
        assert!(PageWords::copy(&page, 0, &other, 0, 4096));
        assert_eq!(content(&other), bytes);
    }
}
