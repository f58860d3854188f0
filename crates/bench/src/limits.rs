//! What the hardware and the kernel charge for the least that the operations must do.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gnttab_engine::PageWords;

use crate::report::Temperature;
use crate::sampler::{Case, Sampler};

/// A word on a cache line of its own.
#[repr(align(128))]
struct Line(AtomicU64);

/// `L`: so many uncontended locked compare-exchanges, each after the one before.
pub(crate) fn locked_exchange(repetitions: u32) -> Duration {
    static WORD: Line = Line(AtomicU64::new(0));
    let start = Instant::now();
    let mut value = WORD.0.load(Ordering::Relaxed);
    for _ in 0..repetitions {
        let new = value.wrapping_add(1);
        let _ = WORD
            .0
            .compare_exchange(black_box(value), new, Ordering::AcqRel, Ordering::Relaxed);
        value = new;
    }
    start.elapsed()
}

/// Copies of `len` bytes, page after page of `pages`.
pub(crate) fn copies<'p>(pairs: impl Iterator<Item = (&'p PageWords, &'p PageWords)>, len: u16) -> Duration {
    let start = Instant::now();
    for (from, to) in pairs {
        let _within = PageWords::copy(black_box(from), 0, black_box(to), 0, len);
    }
    start.elapsed()
}

pub(crate) fn run(sampler: &mut Sampler<'_>) {
    let case = |name: &str| Case {
        name: format!("limit/{name}"),
        batch: 0,
        threads: 1,
        version: 0,
        temperature: Temperature::Warm,
    };
    let mut l = |repetitions| Some(locked_exchange(repetitions));
    sampler.measure(
        case("locked-compare-exchange"),
        1,
        &mut |repetitions| Some(locked_exchange(repetitions)),
        "L",
        &mut l,
    );
    let mut syscall = |repetitions| {
        let start = Instant::now();
        for _ in 0..repetitions {
            black_box(rustix::process::getppid());
        }
        Some(start.elapsed())
    };
    sampler.measure(case("system-call"), 1, &mut syscall, "L", &mut l);
}

/// Adds to a word that another thread may be adding to.
pub(crate) fn contended_add(repetitions: u32) {
    static WORD: Line = Line(AtomicU64::new(0));
    for _ in 0..repetitions {
        WORD.0.fetch_add(1, Ordering::AcqRel);
    }
}
