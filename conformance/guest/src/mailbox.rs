//! The kernel's end of the mailbox (`gnttab_conformance::mailbox`).

use core::sync::atomic::{Ordering, fence};

use gnttab_conformance::mailbox::{
    CLEAN, IN_BYTES, IN_FRAMES, IN_PAGES, OUT_FRAMES, OUT_PAGES, OUT_WORDS, PLAYED, PLAYING, REQUEST,
    RESPONSE,
};

use crate::xen::{Pages, frame_of, load64, store64};

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
