//! How runner and guest talk: pages of the guest's memory, which the runner sees as a file.
//!
//! The guest prints the machine frame of the header on its console, after [`GREETING`]. The header
//! is 512 words. The runner stores a batch in the input pages, its length, and then the next
//! number in [`REQUEST`]; the guest stores words in the output pages, their count, and then the
//! same number in [`RESPONSE`].
//!
//! A batch is a sequence of scripts, each preceded by its length as 32 bits. For each script the
//! answer is a count of words and the words.

/// What the guest prints before the frame number, in hexadecimal.
pub const GREETING: &str = "gnttab-conformance: mailbox ";

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
/// Header word: the first of the input pages' frame numbers.
pub const IN_FRAMES: usize = 16;
/// Input pages.
pub const IN_PAGES: usize = 256;
/// Header word: the first of the output pages' frame numbers.
pub const OUT_FRAMES: usize = IN_FRAMES + IN_PAGES;
/// Output pages.
pub const OUT_PAGES: usize = 128;

const _: () = assert!(OUT_FRAMES + OUT_PAGES <= 512);
