//! The protocols between processors under [loom](https://docs.rs/loom), which tries the orders that
//! the memory model allows. Each model runs the engine's own code on the checker's primitives (see
//! `sync`), and where a granter takes part, the guest driver's own `words/protocol.rs`.
//!
//! - `entry`: one grant entry, its users and its granter, to the last order.
//! - `handles`, `presence`, `growth`: the list of mappings, being inside a table, arrays that grow.
//! - `doors`: whole operations through the typed door, on a machine of two domains.
//!
//! A model's comment says what it proves. `docs/models.md` repeats it with the figures of a run;
//! `tests/models_listed.rs` holds it to these files. To run them:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p gnttab-engine --release --lib models
//! ```

#[path = "../../../guest/src/words/protocol.rs"]
#[expect(dead_code, reason = "not every model uses all of the granter's half")]
mod granter;

mod doors;
mod entry;
mod growth;
mod handles;
mod house;
mod presence;
mod watched;

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

/// Tries every order.
fn every_order(model: impl Fn() + Send + Sync + 'static) {
    check(None, model);
}

/// Tries every order in which at most so many times a thread that could go on is made to wait. What
/// a load may find is tried in full.
fn up_to_preemptions(bound: usize, model: impl Fn() + Send + Sync + 'static) {
    check(Some(bound), model);
}

fn check(bound: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.max_branches = 3_000;
    let orders = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&orders);
    let start = Instant::now();
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let (seconds, name) = (start.elapsed().as_secs_f64(), std::thread::current());
    let name = name.name().unwrap_or_default();
    // For `docs/models.md`; see `.ci/models`.
    std::println!("model {name} {} {seconds:.2}", orders.load(Ordering::Relaxed));
}
