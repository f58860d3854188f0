//! How runner and guest talk: pages of the guest's memory, which the runner sees as a file.
//!
//! The guest prints the machine frame of the header on its console, after [`GREETING`]. The header
//! is 512 words. The runner stores a batch in the input pages, its length, and then the next
//! number in [`REQUEST`]; the guest stores words in the output pages, their count, and then the
//! same number in [`RESPONSE`].
//!
//! [`KIND`] says what a batch is. [`SCRIPTS`]: a sequence of scripts, each preceded by its length as
//! 32 bits; for each the answer is a count of words and the words. [`HYPERCALLS`]: six words each,
//! number and arguments, made one after the other; the answer is their results. [`MEET`]: the words
//! that tell the kernel of the second domain, [`Meeting`].

use crate::puppet::AREA_PAGES;
use crate::script::{PAGES, SPARES};

/// What the guest prints before the frame number, in hexadecimal.
pub const GREETING: &str = "gnttab-conformance: mailbox ";

/// [`PAGES`], as a length.
#[expect(clippy::cast_possible_truncation, reason = "a few dozen")]
pub const OWN_PAGES: usize = PAGES as usize;
/// [`SPARES`], as a length.
#[expect(clippy::cast_possible_truncation, reason = "a few dozen")]
pub const OWN_SPARES: usize = SPARES as usize;

/// Header word: number of the batch asked for.
pub const REQUEST: usize = 1;
/// Header word: number of the batch answered.
pub const RESPONSE: usize = 2;
/// Header word: bytes of the batch.
pub const IN_BYTES: usize = 3;
/// Header word: words of the answer.
pub const OUT_WORDS: usize = 4;
/// Header word: how many scripts of the batch were played: all, or as many as the answer had room
/// for, or up to the first that could not be cleaned up after.
pub const PLAYED: usize = 5;
/// Header word: 1 if everything could be cleaned up after. 0: this guest should be asked no more.
pub const CLEAN: usize = 6;
/// Header word: the script of the batch that is being played, counted from 0.
pub const PLAYING: usize = 7;
/// Header word: what the batch is.
pub const KIND: usize = 8;
/// Scripts to be played.
pub const SCRIPTS: u64 = 0;
/// Hypercalls to be made.
pub const HYPERCALLS: u64 = 1;
/// The second domain's frames.
pub const MEET: u64 = 2;
/// Stands for a hypercall's number: the word at the address that is the first argument.
pub const PEEK: u64 = u64::MAX;
/// Header word: the first of the input pages' frame numbers.
pub const IN_FRAMES: usize = 16;
/// Input pages.
pub const IN_PAGES: usize = 256;
/// Header word: the first of the output pages' frame numbers.
pub const OUT_FRAMES: usize = IN_FRAMES + IN_PAGES;
/// Output pages.
pub const OUT_PAGES: usize = 128;

/// Header word: the first of the frames of the pages for hypercalls' arguments, which the kernel
/// has at [`ARGUMENTS_ADDR`](crate::puppet::ARGUMENTS_ADDR); then those of the lists.
pub const SCRATCH_FRAMES: usize = OUT_FRAMES + OUT_PAGES;

const _: () = assert!(SCRATCH_FRAMES + 2 * AREA_PAGES <= 512);

/// What the kernel has to know of the second domain.
#[derive(Clone, Copy, Debug)]
pub struct Meeting {
    /// Interface version of domain control.
    pub control_version: u64,
    /// Its page of words.
    pub words: u64,
    /// Its pages that scripts name.
    pub pages: [u64; OWN_PAGES],
    /// Pages that nobody maps, for transfers: the kernel's own, then its.
    pub spares: [u64; OWN_SPARES],
    /// Its pages of arguments.
    pub arguments: [u64; AREA_PAGES],
    /// Its pages of lists.
    pub lists: [u64; AREA_PAGES],
    /// The level-1 table of its slots.
    pub slots_table: u64,
}

impl Meeting {
    /// How many words there are.
    pub const WORDS: usize = 3 + OWN_PAGES + OWN_SPARES + 2 * AREA_PAGES;

    /// In one row.
    #[must_use]
    pub fn to_words(&self) -> [u64; Meeting::WORDS] {
        let mut words = [0; Meeting::WORDS];
        let all = [self.control_version, self.words, self.slots_table];
        let parts = [&all[..], &self.pages, &self.spares, &self.arguments, &self.lists];
        for (to, from) in words.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        words
    }

    /// From the row.
    #[must_use]
    pub fn from_words(words: &[u64; Meeting::WORDS]) -> Meeting {
        let mut rest = words.iter().copied();
        let mut next = || rest.next().unwrap_or(0);
        let [control_version, at, slots_table] = [next(), next(), next()];
        Meeting {
            control_version,
            words: at,
            slots_table,
            pages: core::array::from_fn(|_| next()),
            spares: core::array::from_fn(|_| next()),
            arguments: core::array::from_fn(|_| next()),
            lists: core::array::from_fn(|_| next()),
        }
    }
}
