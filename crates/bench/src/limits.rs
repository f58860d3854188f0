//! What the hardware and the kernel charge for the least that the operations must do.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gnttab_engine::PageWords;
use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::futex;

use crate::duo::{Duo, duo};
use crate::flat::Memory;
use crate::mapping::{cold_memory, l, scattered};
use crate::report::Temperature;
use crate::sampler::{Case, Sampler};

/// A word on a cache line of its own, and of its neighbour's, which some processors fetch with it.
#[repr(align(128))]
struct Line<T>(T);

/// `L`: so many uncontended locked compare-exchanges, each after the one before.
pub(crate) fn locked_exchange(repetitions: u32) -> Duration {
    static WORD: Line<AtomicU64> = Line(AtomicU64::new(0));
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

/// Adds to a word that another thread may be adding to.
pub(crate) fn contended_add(repetitions: u32) {
    static WORD: Line<AtomicU64> = Line(AtomicU64::new(0));
    for _ in 0..repetitions {
        WORD.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Copies of `len` bytes from page to page.
pub(crate) fn copies<'p>(pairs: impl Iterator<Item = (&'p PageWords, &'p PageWords)>, len: u16) -> Duration {
    let start = Instant::now();
    for (from, to) in pairs {
        let _within = PageWords::copy(black_box(from), 0, black_box(to), 0, len);
    }
    start.elapsed()
}

/// A ticket lock, taken and let go by one who is alone.
fn ticket_lock(repetitions: u32) -> Duration {
    static LOCK: Line<(AtomicU32, AtomicU32)> = Line((AtomicU32::new(0), AtomicU32::new(0)));
    let (next, serving) = &LOCK.0;
    let start = Instant::now();
    for _ in 0..repetitions {
        let ticket = next.fetch_add(1, Ordering::Acquire);
        while serving.load(Ordering::Acquire) != ticket {
            std::hint::spin_loop();
        }
        serving.store(ticket.wrapping_add(1), Ordering::Release);
    }
    start.elapsed()
}

/// The processor waits for every load before it goes on: what Xen pays for speculation.
#[cfg(target_arch = "x86_64")]
fn fence(repetitions: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..repetitions {
        raw::lfence();
    }
    start.elapsed()
}

fn case(name: &str, threads: u32, temperature: Temperature) -> Case {
    Case {
        name: format!("limit/{name}"),
        batch: 0,
        threads,
        version: 0,
        temperature,
    }
}

pub(crate) fn run(sampler: &mut Sampler<'_>) {
    let mut simple = |name: &str, what: &mut dyn FnMut(u32) -> Duration| {
        let mut body = |repetitions| Some(what(repetitions));
        sampler.measure(case(name, 1, Temperature::Warm), 1, &mut body, "L", &mut l);
    };
    simple("locked-compare-exchange", &mut locked_exchange);
    simple("ticket-lock", &mut ticket_lock);
    #[cfg(target_arch = "x86_64")]
    simple("lfence", &mut fence);
    simple("system-call", &mut |repetitions| {
        let start = Instant::now();
        for _ in 0..repetitions {
            black_box(rustix::process::getppid());
        }
        start.elapsed()
    });
    simple("mmap-touch-munmap", &mut |repetitions| {
        let start = Instant::now();
        for _ in 0..repetitions {
            raw::map_touch_unmap();
        }
        start.elapsed()
    });
    memcpy(sampler);
    two_threads(sampler);
}

/// Bytes of the copies that are limits.
const SIZES: [u16; 2] = [64, 4096];

/// memcpy by size, and by where the source comes from.
fn memcpy(sampler: &mut Sampler<'_>) {
    // Two pages stay in the first-level cache, sixty-four in the second, 1024 in the third.
    for (level, pages) in [("L1", 2), ("L2", 64), ("L3", 1024)] {
        let memory = Memory::new(2 * pages);
        for size in SIZES {
            let frames = (0..pages as u64).map(|page| (memory.frame(2 * page), memory.frame(2 * page + 1)));
            let frames: Vec<_> = frames.filter_map(|(from, to)| Some((from?, to?))).collect();
            let mut body = |n: u32| Some(copies(frames.iter().copied().cycle().take(n as usize), size));
            let name = case(&format!("memcpy-{size}-{level}"), 1, Temperature::Warm);
            sampler.measure(name, 1, &mut body, "L", &mut l);
        }
    }
    for size in SIZES {
        let name = case(&format!("memcpy-{size}-memory"), 1, Temperature::Cold);
        if !sampler.wants(&name.name) {
            continue;
        }
        let memory = cold_memory();
        let mut next = scattered(1 << 18);
        let Some(to) = memory.frame(0) else { return };
        let mut body = |n: u32| {
            let pages = (0..n).filter_map(|_| Some((memory.frame(u64::from(next()))?, to)));
            Some(copies(pages, size))
        };
        sampler.measure(name, 1, &mut body, "L", &mut l);
    }
}

/// What two threads do to each other: jobs of a [`duo`].
const ADD: u32 = 1;
const SPIN: u32 = 2;
const FUTEX: u32 = 3;
const EVENTFD: u32 = 4;

/// Long enough for the other thread to have gone to sleep.
const ASLEEP: Duration = Duration::from_micros(50);

/// A word that two threads fight over, and how fast one wakes the other: by a store to one that spins, there
/// and back; by futex and by eventfd to one that sleeps, there, and a store back.
fn two_threads(sampler: &mut Sampler<'_>) {
    let names = ["contended-add", "wake-spin", "wake-futex", "wake-eventfd"];
    let named = names.map(|name| case(name, 2, Temperature::Warm));
    if !sampler.wants_any(named.clone()) {
        return;
    }
    let Ok(bell) = eventfd(0, EventfdFlags::empty()) else {
        sampler.skip("limit/wake-eventfd", "the kernel gave no eventfd");
        return;
    };
    let answer = |job, turns| match job {
        ADD => contended_add(turns),
        _ => (0..turns).for_each(|_| {
            match job {
                FUTEX => {
                    while TURN.0.load(Ordering::Acquire) == 0 {
                        // Woken, or not in time to sleep: either way look again.
                        let _ = futex::wait(&TURN.0, futex::Flags::PRIVATE, 0, None);
                    }
                }
                EVENTFD => {
                    let _ = rustix::io::read(&bell, &mut [0u8; 8]);
                }
                _ => {}
            }
            await_turn(1);
            TURN.0.store(0, Ordering::Release);
        }),
    };
    let ask = |job, turns| {
        let mut time = Duration::ZERO;
        for _ in 0..turns {
            if job != SPIN {
                let dozing = Instant::now();
                while dozing.elapsed() < ASLEEP {
                    std::hint::spin_loop();
                }
            }
            let start = Instant::now();
            TURN.0.store(1, Ordering::Release);
            match job {
                FUTEX => drop(futex::wake(&TURN.0, futex::Flags::PRIVATE, 1)),
                EVENTFD => drop(rustix::io::write(&bell, &1u64.to_ne_bytes())),
                _ => {}
            }
            await_turn(0);
            time += start.elapsed();
        }
        time
    };
    let done = duo(answer, |duo: &Duo<'_>| {
        for (job, case) in [ADD, SPIN, FUTEX, EVENTFD].into_iter().zip(named) {
            let mut body = |turns| match job {
                ADD => duo.round(job, turns, contended_add),
                _ => {
                    let mut time = Duration::ZERO;
                    duo.round(job, turns, |turns| time = ask(job, turns))?;
                    Some(time)
                }
            };
            sampler.measure(case, 1, &mut body, "L", &mut l);
        }
    });
    if done.is_none() {
        sampler.skip("limit/contended-add and wake-ups", "need two processors");
    }
}

/// 1: the worker's turn; 0: the other's.
static TURN: Line<AtomicU32> = Line(AtomicU32::new(0));

fn await_turn(whose: u32) {
    while TURN.0.load(Ordering::Acquire) != whose {
        std::hint::spin_loop();
    }
}

/// What is measured and cannot be said without `unsafe`.
#[expect(
    unsafe_code,
    reason = "a bare instruction, and memory mapped and unmapped by hand"
)]
mod raw {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    #[cfg(target_arch = "x86_64")]
    pub(super) fn lfence() {
        // SAFETY: part of SSE2, which every x86-64 processor has; it changes no memory.
        unsafe { std::arch::x86_64::_mm_lfence() };
    }

    /// Maps one anonymous page, writes to it, takes it away.
    pub(super) fn map_touch_unmap() {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no memory of anybody's is replaced.
        let page = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) };
        let Ok(page) = page else { return };
        // SAFETY: the page was just mapped, writable, and nobody else knows of it.
        unsafe { page.cast::<u8>().write_volatile(1) };
        // SAFETY: it was mapped above, with this length, and no reference into it is left.
        let _ = unsafe { munmap(page, 4096) };
    }
}
