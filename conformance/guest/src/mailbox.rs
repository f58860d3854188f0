//! The kernel's end of the mailbox (`gnttab_conformance::mailbox`).

use core::sync::atomic::{Ordering, fence};

use gnttab_conformance::mailbox::{
    CLEAN, IN_BYTES, IN_FRAMES, IN_PAGES, KIND, OUT_FRAMES, OUT_PAGES, OUT_WORDS, PLAYED, PLAYING, REQUEST,
    RESPONSE, SCRATCH_FRAMES,
};
use gnttab_conformance::puppet::{AREA_PAGES, ARGUMENTS_ADDR, LIST_ADDR};

use crate::xen::{Pages, frame_of, load64, store64};

/// Arguments and lists of the hypercalls that the runner asks for: where other domains have theirs.
#[unsafe(link_section = ".scratch.arguments")]
static ARGUMENTS: Pages<AREA_PAGES> = Pages::new();
#[unsafe(link_section = ".scratch.lists")]
static LISTS: Pages<AREA_PAGES> = Pages::new();
static HEADER: Pages<1> = Pages::new();
static INPUT: Pages<IN_PAGES> = Pages::new();
static OUTPUT: Pages<OUT_PAGES> = Pages::new();

/// Where the batch is being read and its answer written.
pub struct Mailbox {
    number: u64,
    bytes: usize,
    read: usize,
    written: usize,
    played: u64,
}

fn header(word: usize) -> u64 {
    load64(HEADER.addr() + word as u64 * 8)
}

fn set_header(word: usize, value: u64) {
    store64(HEADER.addr() + word as u64 * 8, value);
}

fn input() -> &'static [u8] {
    // SAFETY: the runner writes these pages only before it counts REQUEST up, and then waits.
    unsafe { core::slice::from_raw_parts(INPUT.addr() as *const u8, IN_PAGES * 4096) }
}

impl Mailbox {
    pub fn new() -> Mailbox {
        for page in 0..IN_PAGES {
            set_header(IN_FRAMES + page, frame_of(INPUT.addr() + page as u64 * 4096));
        }
        for page in 0..OUT_PAGES {
            set_header(OUT_FRAMES + page, frame_of(OUTPUT.addr() + page as u64 * 4096));
        }
        assert_eq!((ARGUMENTS.addr(), LISTS.addr()), (ARGUMENTS_ADDR, LIST_ADDR));
        for page in 0..AREA_PAGES {
            let at = page as u64 * 4096;
            set_header(SCRATCH_FRAMES + page, frame_of(ARGUMENTS_ADDR + at));
            set_header(SCRATCH_FRAMES + AREA_PAGES + page, frame_of(LIST_ADDR + at));
        }
        Mailbox {
            number: 0,
            bytes: 0,
            read: 0,
            written: 0,
            played: 0,
        }
    }

    /// The machine frame of the header.
    pub fn frame(&self) -> u64 {
        frame_of(HEADER.addr())
    }

    /// Waits for a batch.
    pub fn wait(&mut self) {
        while header(REQUEST) == self.number {
            crate::xen::pause();
        }
        fence(Ordering::SeqCst);
        *self = Mailbox {
            number: header(REQUEST),
            bytes: (header(IN_BYTES) as usize).min(IN_PAGES * 4096),
            read: 0,
            written: 0,
            played: 0,
        };
    }

    /// What the batch is.
    pub fn kind(&self) -> u64 {
        header(KIND)
    }

    /// The next words of a batch that consists of words.
    pub fn next_words<const N: usize>(&mut self) -> Option<[u64; N]> {
        if self.read + N * 8 > self.bytes {
            return None;
        }
        let at = INPUT.addr() + self.read as u64;
        self.read += N * 8;
        Some(core::array::from_fn(|word| load64(at + word as u64 * 8)))
    }

    /// Adds a word to the answer, if there is room.
    pub fn answer_word(&mut self, word: u64) {
        if self.written < OUT_PAGES * 512 {
            store64(OUTPUT.addr() + self.written as u64 * 8, word);
            self.written += 1;
        }
    }

    pub fn next_script(&mut self) -> Option<&'static [u8]> {
        let rest = input().get(self.read..self.bytes)?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let script = rest.get(..u32::from_le_bytes(*length) as usize)?;
        self.read += 4 + script.len();
        set_header(PLAYING, self.played);
        Some(script)
    }

    /// Adds a script's answer; false if there is no room, and the script counts as not played.
    pub fn answer(&mut self, answer: &crate::world::Answer) -> bool {
        let words = answer.words();
        if self.written + words.len() + 1 > OUT_PAGES * 512 {
            return false;
        }
        for word in [words.len() as u64].iter().chain(words) {
            store64(OUTPUT.addr() + self.written as u64 * 8, *word);
            self.written += 1;
        }
        self.played += 1;
        true
    }

    pub fn finish(&mut self, clean: bool) {
        set_header(CLEAN, u64::from(clean));
        set_header(OUT_WORDS, self.written as u64);
        set_header(PLAYED, self.played);
        fence(Ordering::SeqCst);
        set_header(RESPONSE, self.number);
    }
}
