//! Two threads at work in the same instant.
//!
//! A round counts only if both were at it nearly all the time: a thread that the scheduler held back would
//! leave the other alone, and the round would flatter. Its time is that from the first's start to the
//! last's end.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What is posted to the worker. A job of 0 sends it home.
struct Post {
    epoch: Instant,
    job: AtomicU32,
    repetitions: AtomicU32,
    /// Raised by the poster, one a round; the worker raises its own when it is at the line.
    posted: AtomicU32,
    ready: AtomicU32,
    go: AtomicU32,
    done: AtomicU32,
    start: AtomicU64,
    end: AtomicU64,
    dead: AtomicBool,
}

/// The one who posts.
pub(crate) struct Duo<'p>(&'p Post);

/// Least part of the longer one's time that both must share. Threads that fight over one line do not get
/// equal parts of it, and one ends before the other even if nobody disturbs them.
const TOGETHER: f64 = 0.7;

/// Runs `main` with a worker at its side that can do `work`, jobs by number from 1, on another processor.
/// `None` on a machine that has no second one.
pub(crate) fn duo<R>(mut work: impl FnMut(u32, u32) + Send, main: impl FnOnce(&Duo<'_>) -> R) -> Option<R> {
    let allowed = sched_getaffinity(None).ok()?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
    let (here, there) = (cpus.next()?, cpus.next()?);
    let post = Post {
        epoch: Instant::now(),
        job: AtomicU32::new(0),
        repetitions: AtomicU32::new(0),
        posted: AtomicU32::new(0),
        ready: AtomicU32::new(0),
        go: AtomicU32::new(0),
        done: AtomicU32::new(0),
        start: AtomicU64::new(0),
        end: AtomicU64::new(0),
        dead: AtomicBool::new(false),
    };
    let result = thread::scope(|scope| {
        let post = &post;
        scope.spawn(move || {
            pin(there);
            let _dead = Dead(&post.dead);
            let mut turn = 0;
            loop {
                turn += 1;
                wait(&post.posted, turn);
                let job = post.job.load(Ordering::Acquire);
                if job == 0 {
                    return;
                }
                let repetitions = post.repetitions.load(Ordering::Acquire);
                post.ready.store(turn, Ordering::Release);
                wait(&post.go, turn);
                post.start.store(since(post.epoch), Ordering::Relaxed);
                work(job, repetitions);
                post.end.store(since(post.epoch), Ordering::Relaxed);
                post.done.store(turn, Ordering::Release);
            }
        });
        pin(here);
        let result = main(&Duo(post));
        post.job.store(0, Ordering::Release);
        post.posted.fetch_add(1, Ordering::Release);
        result
    });
    // Back to wherever the scheduler likes.
    let _ = sched_setaffinity(None, &allowed);
    Some(result)
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    // A machine that does not let us is told by the figures' spread.
    let _ = sched_setaffinity(None, &set);
}

/// Says that the worker is gone, should it panic: nobody must wait for it then.
struct Dead<'p>(&'p AtomicBool);

impl Drop for Dead<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn wait(word: &AtomicU32, value: u32) {
    let mut spins = 0u32;
    while word.load(Ordering::Acquire) != value {
        std::hint::spin_loop();
        spins += 1;
        if spins.is_multiple_of(1 << 14) {
            thread::yield_now();
        }
    }
}

fn since(epoch: Instant) -> u64 {
    u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Duo<'_> {
    /// A round: the worker does `job` while `own` runs here.
    pub(crate) fn round(&self, job: u32, repetitions: u32, own: impl FnOnce(u32)) -> Option<Duration> {
        let post = self.0;
        post.job.store(job, Ordering::Release);
        post.repetitions.store(repetitions, Ordering::Release);
        let turn = post.posted.load(Ordering::Relaxed) + 1;
        post.posted.store(turn, Ordering::Release);
        self.wait(&post.ready, turn);
        post.go.store(turn, Ordering::Release);
        let start = since(post.epoch);
        own(repetitions);
        let end = since(post.epoch);
        self.wait(&post.done, turn);
        let other = (
            post.start.load(Ordering::Relaxed),
            post.end.load(Ordering::Relaxed),
        );
        let longest = (end - start).max(other.1 - other.0);
        let shared = end.min(other.1).saturating_sub(start.max(other.0));
        if (shared as f64) < longest as f64 * TOGETHER {
            return None;
        }
        Some(Duration::from_nanos(end.max(other.1) - start.min(other.0)))
    }

    fn wait(&self, word: &AtomicU32, value: u32) {
        let mut spins = 0u32;
        while word.load(Ordering::Acquire) != value {
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(1 << 14) {
                assert!(!self.0.dead.load(Ordering::Acquire), "the worker has ended");
                thread::yield_now();
            }
        }
    }
}
