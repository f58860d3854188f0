//! Random sequences of operations, done to the engine and to a slow, obviously right model.
//!
//! After every step everything is compared: statuses and every byte of the arguments, the bytes of
//! every frame (so all entries, status words, page-table entries and data), physmaps, handles, pins
//! and their users, which domains there are; and the audits AUD-PIN, AUD-REF, AUD-HND, AUD-P2M,
//! AUD-IOM, AUD-MEM and AUD-BUF of `advisories.md` 0.4 (AUD-FLG is in the bytes).
//!
//! `GNTTAB_MODEL_CASES` says how many sequences (150), `GNTTAB_MODEL_SEED` which (0). A failure is
//! made as short as it will go, in `GNTTAB_MODEL_SHRINK` tries (20,000), and told in words. The
//! fuzzer in `fuzz/` takes the same steps by choices of its own.

#![cfg(feature = "machine")]

mod spec;
mod step;
mod strategy;
mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

use proptest::prelude::any;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use spec::Limits;
use step::Step;
use world::World;

/// Where and why the last panic was.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// How often each answer was given, in all sequences.
type Seen = BTreeMap<world::Seen, u32>;

fn run(limits: &[Limits], steps: &[Step], inside: bool, seen: &mut Seen) -> Result<(), TestCaseError> {
    let mut world = World::new(limits).with_work_inside(inside);
    let mut trace = Vec::new();
    let done = panic::catch_unwind(AssertUnwindSafe(|| {
        let checked = panic::catch_unwind(AssertUnwindSafe(|| {
            world.check();
            for step in steps {
                world.take(step);
                world.check();
            }
        }));
        trace = std::mem::take(&mut world.trace);
        for (what, times) in &world.seen {
            *seen.entry(what.clone()).or_default() += times;
        }
        match checked {
            Ok(()) => world.end(),
            Err(why) => {
                // What is left of the world may be in no state to be taken down.
                std::mem::forget(world);
                panic::resume_unwind(why)
            }
        }
    }));
    done.map_err(|_| {
        let why = PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone();
        TestCaseError::fail(format!("{}\n{why}", trace.join("\n")))
    })
}

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_and_model_agree() {
        // Failures are told once, by the runner, when they are as short as they get.
        panic::set_hook(Box::new(|info| {
            *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
        }));
        let seed = setting("GNTTAB_MODEL_SEED", 0);
        let config = Config {
            cases: setting("GNTTAB_MODEL_CASES", 150),
            max_shrink_iters: setting("GNTTAB_MODEL_SHRINK", 20_000),
            failure_persistence: None,
            ..Config::default()
        };
        let mut seed_bytes = [0; 32];
        seed_bytes[..4].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed_bytes);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let seen = RefCell::new(Seen::new());
        let cases = (strategy::scene(), strategy::steps(80), any::<bool>());
        let done = runner.run(&cases, |(limits, steps, inside)| {
            run(&limits, &steps, inside, &mut seen.borrow_mut())
        });
        let _ = panic::take_hook();
        for (seen, times) in seen.into_inner() {
            println!("{seen:?}: {times}");
        }
        if let Err(error) = done {
            panic!("seed {seed}: {error}");
        }
    }
}
