//! The arguments of a call: an array of structures in guest memory.
//!
//! Where the embedder says so, they are reached directly, as words of the pages that they lie in
//! ([`Window`]); otherwise one by one, by asking it ([`Args`]). What must always hold, either way:
//! 1. An argument is copied in once, and the copy is what is judged (ENG-5); a look ahead of its turn is for
//!    hints alone.
//! 2. Guest memory is touched by words as wide as they are aligned: what a guest writes meanwhile is seen as
//!    it was before or after, word by word.

use core::ops::Range;

use gnttab_abi::GrantStatus;

use crate::bound::below_wide;
use crate::door::{Fault, GuestMemory};
use crate::shared::PageWords;
use crate::sync::{AtomicU64, Ordering};

/// Largest structure of the interface.
pub(crate) const LARGEST: usize = 40;

/// The bytes of one argument, as they were read.
pub(crate) type Raw = [u8; LARGEST];

/// An array of arguments. Sizes are passed along, so that they are constants where the calling ABI does not
/// matter.
pub(crate) trait Arguments: Copy {
    /// The one read of an argument, into `raw`.
    fn read(self, index: u32, size: usize, raw: &mut Raw) -> Result<(), Fault>;

    /// A look at an argument ahead of its turn, if there is one.
    fn glimpse(self, index: u32, size: usize) -> Option<Raw>;

    /// A look at arguments ahead of their turn, one after the other, as far as there are any.
    fn peek(self, items: Range<u32>, size: usize, look: impl FnMut(&Raw));

    /// Writes an argument whose bytes before `from`, which begins a word, are as they were read: where they can be
    /// written for certain, they need not be.
    fn write(self, index: u32, size: usize, from: usize, raw: Raw) -> Result<(), Fault>;

    /// Writes an argument's status, at `offset`.
    fn write_status(self, index: u32, size: usize, offset: usize, status: GrantStatus) -> Result<(), Fault>;
}

/// Arguments that the embedder is asked for.
pub(crate) struct Args<'a, M: ?Sized> {
    pub(crate) memory: &'a M,
    pub(crate) addr: u64,
}

impl<M: ?Sized> Clone for Args<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: ?Sized> Copy for Args<'_, M> {}

impl<'a, M: GuestMemory + ?Sized> Args<'a, M> {
    /// Where an argument of this size lies.
    #[inline(always)]
    pub(crate) fn at(self, index: u32, size: usize) -> u64 {
        self.addr.wrapping_add(u64::from(index) * size as u64)
    }

    /// Writes the start of an argument.
    pub(crate) fn write_start(self, index: u32, size: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.memory.write(self.at(index, size), bytes)
    }

    /// So many of these arguments, reached directly.
    #[inline]
    pub(crate) fn window(self, count: u32, size: usize) -> Option<Window<'a>> {
        let bytes = u64::from(count) * size as u64;
        let (pages, offset) = self.memory.pages(self.addr, bytes)?;
        let length = usize::try_from(bytes).ok()?;
        if !offset.is_multiple_of(8) || !length.is_multiple_of(8) {
            return None;
        }
        // A guest chooses both how many words there are and the first: clamped one after the other, they stay
        // within the pages also where the processor runs ahead of the checks, the embedder's among them.
        let words = PageWords::words(pages)?;
        let length = below_wide(length / 8, words.len() + 1)?;
        let first = below_wide(offset / 8, words.len() - length + 1)?;
        let words = words.get(first..)?.get(..length)?;
        Some(Window { words })
    }
}

impl<M: GuestMemory + ?Sized> Arguments for Args<'_, M> {
    #[inline(always)]
    fn read(self, index: u32, size: usize, raw: &mut Raw) -> Result<(), Fault> {
        self.memory.read(self.at(index, size), &mut raw[..size])
    }

    #[inline(always)]
    fn glimpse(self, index: u32, size: usize) -> Option<Raw> {
        let mut raw = [0; LARGEST];
        self.memory
            .peek(self.at(index, size), &mut raw[..size])
            .then_some(raw)
    }

    #[inline(always)]
    fn peek(self, items: Range<u32>, size: usize, mut look: impl FnMut(&Raw)) {
        for index in items {
            let Some(raw) = self.glimpse(index, size) else {
                return;
            };
            look(&raw);
        }
    }

    #[inline(always)]
    fn write(self, index: u32, size: usize, _: usize, raw: Raw) -> Result<(), Fault> {
        self.memory.write(self.at(index, size), &raw[..size])
    }

    #[inline(always)]
    fn write_status(self, index: u32, size: usize, offset: usize, status: GrantStatus) -> Result<(), Fault> {
        let at = self.at(index, size).wrapping_add(offset as u64);
        self.memory.write(at, &status.0.to_le_bytes())
    }
}

/// Arguments that lie in pages within reach, whole words each.
#[derive(Clone, Copy)]
pub(crate) struct Window<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Window<'a> {
    /// The words of an argument; of the first, where the processor runs past the last one.
    #[inline(always)]
    fn at(self, index: u32, size: usize) -> Option<&'a [AtomicU64]> {
        fn nth<const N: usize>(words: &[AtomicU64], index: u32) -> Option<&[AtomicU64]> {
            let all = words.as_chunks::<N>().0;
            Some(all.get(below_wide(index as usize, all.len())?)?)
        }
        match size {
            24 => nth::<3>(self.words, index),
            32 => nth::<4>(self.words, index),
            40 => nth::<5>(self.words, index),
            _ => None,
        }
    }

    #[cold]
    fn fault() -> Fault {
        // Nobody asks for more arguments than the window was opened for.
        Fault { addr: 0 }
    }
}

/// Reads an argument's words.
#[inline(always)]
fn load(words: &[AtomicU64], raw: &mut Raw) {
    for (bytes, word) in raw.as_chunks_mut().0.iter_mut().zip(words) {
        *bytes = word.load(Ordering::Relaxed).to_le_bytes();
    }
}

impl Arguments for Window<'_> {
    #[inline(always)]
    fn read(self, index: u32, size: usize, raw: &mut Raw) -> Result<(), Fault> {
        load(self.at(index, size).ok_or_else(Self::fault)?, raw);
        Ok(())
    }

    #[inline(always)]
    fn glimpse(self, index: u32, size: usize) -> Option<Raw> {
        let mut raw = [0; LARGEST];
        load(self.at(index, size)?, &mut raw);
        Some(raw)
    }

    #[inline(always)]
    fn peek(self, items: Range<u32>, size: usize, mut look: impl FnMut(&Raw)) {
        let words = size / 8;
        // Clamped as everywhere, and then gone through without further questions.
        let Some(first) = below_wide(items.start as usize * words, self.words.len()) else {
            return;
        };
        let behind = self.words.get(first..).unwrap_or_default();
        let Some(length) = below_wide(items.len() * words, behind.len() + 1) else {
            return;
        };
        for words in behind.get(..length).unwrap_or_default().chunks_exact(words) {
            let mut raw = [0; LARGEST];
            load(words, &mut raw);
            look(&raw);
        }
    }

    #[inline(always)]
    fn write(self, index: u32, size: usize, from: usize, raw: Raw) -> Result<(), Fault> {
        let words = self.at(index, size).ok_or_else(Self::fault)?;
        let from = from / 8;
        let bytes = raw.as_chunks().0.get(from..).unwrap_or_default();
        for (bytes, word) in bytes.iter().zip(words.get(from..).unwrap_or_default()) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        Ok(())
    }

    #[inline(always)]
    fn write_status(self, index: u32, size: usize, offset: usize, status: GrantStatus) -> Result<(), Fault> {
        let words = self.at(index, size).ok_or_else(Self::fault)?;
        let word = words.get(offset / 8).ok_or_else(Self::fault)?;
        PageWords::quarter(word, offset / 2).store(status.0.cast_unsigned(), Ordering::Relaxed);
        Ok(())
    }
}
