//! What grant operations cost, each beside the limit that the hardware sets.
//!
//! `gnttab bench` and `cargo bench -p gnttab-bench` run the same code, which is why it is a crate of its
//! own: the command cannot reach into another crate's `benches`, nor should the engine depend on this.
//!
//! The engine is measured through its raw door, embedded in a hypervisor ([`flat`]) that does what a real
//! one must do and nothing else: operation structures are copied in from and out to guest memory, a mapping
//! is one 8-byte store into a page table, frame references and writable types are taken and dropped with a
//! locked operation each. Left out, as from every figure of Xen's that stands beside ours: the way from the
//! guest into the hypervisor, translation shoot-downs, nested page walks.
//!
//! How a figure comes about (`sampler`): many short rounds, in each of them first `L` (an uncontended
//! locked compare-exchange), then the limit that the case is held against, then the case. The figure is the
//! least of its rounds, since everything that disturbs a round makes it longer; beside it the median, and
//! the spread, by which a figure that cannot be trusted gives itself away.
//!
//! ```
//! use gnttab_bench::{Options, run};
//!
//! let options = Options { filter: Some("get_version".to_owned()), ..Options::quick() };
//! let report = run(&options, &mut |figure| println!("{}", figure.line()));
//! assert!(report.figures.iter().all(|figure| figure.min_ns > 0.0));
//! ```

#![deny(unsafe_code)]

mod control;
mod copying;
pub mod counted;
pub mod diff;
mod duo;
pub mod flat;
mod limits;
mod mapping;
pub mod memory;
pub mod plot;
mod report;
mod sampler;
mod scale;
mod scene;
pub mod xen;

use std::time::Duration;

pub use report::{Figure, Report, Temperature};
use sampler::Sampler;

/// What to measure, and for how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only cases whose name contains this.
    pub filter: Option<String>,
    /// Time for the rounds of one case.
    pub budget: Duration,
    /// How many domains the curve of scale goes up to.
    pub domains: u16,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            filter: None,
            budget: Duration::from_millis(120),
            domains: 4000,
        }
    }
}

impl Options {
    /// A look at everything, at figures one does not quote.
    #[must_use]
    pub fn quick() -> Options {
        Options {
            budget: Duration::from_millis(12),
            domains: 100,
            ..Options::default()
        }
    }
}

/// Measures every case asked for, and tells each figure as it is known.
pub fn run(options: &Options, tell: &mut dyn FnMut(&Figure)) -> Report {
    let mut sampler = Sampler::new(options, tell);
    limits::run(&mut sampler);
    mapping::run(&mut sampler);
    copying::run(&mut sampler);
    control::run(&mut sampler);
    scale::run(&mut sampler, options.domains);
    sampler.into_report()
}
