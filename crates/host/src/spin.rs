//! Looking again for a while before sleeping.
//!
//! A sleep and a wake-up cost many microseconds, two switches and two system calls; what one waits for is often there
//! sooner. But to look is a waste where it comes late, and worse where the one who would bring it, or anybody else, waits
//! for this very processor. So a [`Spin`] goes by what came of it: as long as things come soon while it looks, it looks;
//! each time that they do not, or that it was interrupted for long, it sleeps at once for twice as many waits as the time
//! before, up to a thousand.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a wait may be spent looking: longer than it takes to wake a processor that rests deeply, or the first look
/// after a sleep would always be in vain.
const LIMIT: Duration = Duration::from_micros(100);
/// Looking for longer costs more than a sleep would have.
const WORTH: Duration = Duration::from_micros(50);
/// Between two looks at the clock so much passes only when somebody else had the processor meanwhile.
const INTERRUPTION: Duration = Duration::from_micros(10);
/// The most waits without a look.
const LONGEST_PAUSE: u32 = 1023;
/// Looks between two at the clock.
const GLANCES: u32 = 8;

/// One thread's waiting for one thing, again and again.
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
/// use gnttab_host::spin::Spin;
///
/// fn wait(spin: &mut Spin, flag: &AtomicBool, sleep: impl Fn()) {
///     while !flag.load(Ordering::Acquire) {
///         if !spin.again() {
///             sleep();
///         }
///     }
///     spin.came();
/// }
/// # wait(&mut Spin::default(), &AtomicBool::new(true), || ());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Spin {
    /// Since when the wait is on, and the last look at the clock.
    wait: Option<(Instant, Instant)>,
    looks: u32,
    /// Somebody else had the processor during this wait.
    interrupted: bool,
    /// Waits that are still to be slept through.
    pause: u32,
    /// As many were it the last time.
    last_pause: u32,
    /// This is the first wait that is spent looking after others that were not: the other side may have to be woken.
    first: bool,
}

impl Spin {
    /// Whether to look again instead of sleeping. The first call of a wait begins it.
    pub fn again(&mut self) -> bool {
        let resting = self.pause > 0 || !has_company();
        let Some((since, last)) = self.wait else {
            let now = Instant::now();
            self.wait = Some((now, now));
            (self.looks, self.interrupted) = (0, false);
            return !resting;
        };
        if resting || self.interrupted {
            return false;
        }
        // Others are not let run between looks: where one wants this processor for long, a yield would last as long.
        std::hint::spin_loop();
        self.looks += 1;
        if !self.looks.is_multiple_of(GLANCES) {
            return true;
        }
        let now = Instant::now();
        self.wait = Some((since, now));
        self.interrupted = now - last >= INTERRUPTION;
        !self.interrupted && now - since < LIMIT
    }

    /// What was waited for is there: the wait, if there was one, is over.
    pub fn came(&mut self) {
        if let Some((since, _)) = self.wait.take() {
            self.learn(since.elapsed());
        }
    }

    fn learn(&mut self, waited: Duration) {
        if self.pause > 0 {
            self.pause -= 1;
            self.first = true;
            return;
        }
        let first = std::mem::take(&mut self.first);
        if self.interrupted || waited >= if first { LIMIT } else { WORTH } {
            self.last_pause = (2 * self.last_pause + 1).min(LONGEST_PAUSE);
            self.pause = self.last_pause;
        } else if !first {
            self.last_pause /= 2;
        }
    }
}

/// Whether another thread can run at the same time.
fn has_company() -> bool {
    static COMPANY: OnceLock<bool> = OnceLock::new();
    *COMPANY.get_or_init(|| std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(5);
    const LATER: Duration = Duration::from_micros(130);
    const MUCH_LATER: Duration = Duration::from_millis(5);

    /// How many of `waits` are spent looking.
    fn looks(spin: &mut Spin, waits: u32, mut how_long: impl FnMut(bool) -> Duration) -> u32 {
        let mut looks = 0;
        for _ in 0..waits {
            let looking = spin.pause == 0;
            looks += u32::from(looking);
            spin.learn(how_long(looking));
        }
        looks
    }

    #[test]
    fn it_looks_as_long_as_that_pays() {
        let mut spin = Spin::default();
        assert_eq!(looks(&mut spin, 1000, |_| SOON), 1000);
        // One late answer does not end it for long.
        assert_eq!(looks(&mut spin, 1, |_| MUCH_LATER), 1);
        assert_eq!(looks(&mut spin, 1000, |_| SOON), 999);
    }

    /// Where the other side runs only while this one sleeps, sleeping is short and looking is in vain.
    #[test]
    fn it_does_not_keep_the_processor_from_the_one_it_waits_for() {
        let mut spin = Spin::default();
        let in_turns = |looking| if looking { LATER } else { SOON };
        assert!(looks(&mut spin, 10_000, in_turns) < 20);
        assert!(looks(&mut spin, 100_000, in_turns) < 110);
        // When that is over, it is found out.
        looks(&mut spin, 2000, |_| SOON);
        assert!(looks(&mut spin, 10_000, |_| SOON) > 9000);
    }

    #[test]
    fn who_is_left_in_peace_hardly_looks() {
        assert!(looks(&mut Spin::default(), 1_000_000, |_| MUCH_LATER) < 1000);
    }

    /// Answers that come while one looks, but late: to look costs more than it saves.
    #[test]
    fn it_does_not_look_for_long() {
        assert!(looks(&mut Spin::default(), 10_000, |_| Duration::from_micros(70)) < 60);
    }

    /// The first answer may come late: the other side sleeps as well.
    #[test]
    fn it_gives_the_other_side_time_to_wake_up() {
        let mut spin = Spin::default();
        looks(&mut spin, 100, |_| MUCH_LATER);
        let mut awake = false;
        let wakes_up = |looking: bool| match std::mem::replace(&mut awake, looking) {
            true => SOON,
            false => Duration::from_micros(70),
        };
        assert!(looks(&mut spin, 10_000, wakes_up) > 9000);
    }

    #[test]
    fn an_interruption_counts_as_a_look_in_vain() {
        let mut spin = Spin::default();
        for _ in 0..10_000 {
            spin.interrupted = spin.pause == 0;
            spin.learn(SOON);
        }
        assert_eq!(spin.last_pause, LONGEST_PAUSE);
    }

    #[test]
    fn a_wait_begins_with_its_first_look_and_ends() {
        let mut spin = Spin::default();
        spin.came();
        assert_eq!(spin.last_pause, 0, "there was no wait");
        while spin.again() {}
        let (since, _) = spin.wait.unwrap();
        assert!(spin.interrupted || !has_company() || since.elapsed() >= LIMIT);
        spin.came();
        assert!(spin.wait.is_none());
    }
}
