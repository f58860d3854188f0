//! Figures as data and as lines.

use serde::{Deserialize, Serialize};

/// Goes into the JSON: raised when a key changes its meaning or goes, not when one is added.
pub(crate) const REPORT_VERSION: u32 = 1;

/// From where the memory that a case touches comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Temperature {
    /// The same few references and pages again and again.
    Warm,
    /// References and pages in random order, far more of them than any cache holds.
    Cold,
}

impl Temperature {
    /// As it is written in names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Temperature::Warm => "warm",
            Temperature::Cold => "cold",
        }
    }
}

/// One case, measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What and under which circumstances, all in one word.
    pub name: String,
    /// Items of one hypercall; 0 where there is no such thing.
    pub batch: u32,
    /// Threads at work.
    pub threads: u32,
    /// Version of the granter's table; 0 where there is none.
    pub version: u32,
    /// Where memory comes from.
    pub temperature: Temperature,
    /// The least of all rounds, nanoseconds an item.
    pub min_ns: f64,
    /// The median.
    pub median_ns: f64,
    /// How far the third quartile lies above the least, as a part of it.
    pub spread: f64,
    /// Rounds measured.
    pub rounds: usize,
    /// What the case is held against.
    pub limit: String,
    /// The least of the limit's rounds, which alternate with the case's.
    pub limit_ns: f64,
    /// `min_ns` / `limit_ns`.
    pub ratio: f64,
    /// An uncontended locked compare-exchange, in the same rounds.
    #[serde(rename = "L_ns")]
    pub l_ns: f64,
}

/// A spread above this makes a figure one not to quote.
const WIDE: f64 = 0.5;

impl Figure {
    /// The case in units of an uncontended locked compare-exchange.
    #[must_use]
    pub fn in_l(&self) -> f64 {
        self.min_ns / self.l_ns
    }

    /// Whether the rounds differ too much for the figure to be quoted.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        self.spread > WIDE
    }

    /// The heading over [`Figure::line`]s.
    #[must_use]
    pub fn heading() -> String {
        format!(
            "{:<42} {:>9} {:>9} {:>7} {:>7}  {:>6}  {:<24} {:>9}",
            "case (nanoseconds an item)", "min", "median", "spread", "in L", "ratio", "to", "which is"
        )
    }

    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let line = format!(
            "{:<42} {:>9} {:>9} {:>6.0}% {:>7.1}  {:>6.2}  {:<24} {:>9}",
            self.name,
            nanoseconds(self.min_ns),
            nanoseconds(self.median_ns),
            self.spread * 100.0,
            self.in_l(),
            self.ratio,
            self.limit,
            nanoseconds(self.limit_ns),
        );
        if self.is_wide() { line + "  wide" } else { line }
    }
}

/// Three digits at least.
fn nanoseconds(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 1000.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Of this form of the data.
    pub version: u32,
    /// The least `L` of the run.
    #[serde(rename = "L_ns")]
    pub l_ns: f64,
    /// The machine's processor, as it calls itself.
    pub processor: String,
    /// Whether a barrier stood behind each check of an index (the engine's feature `fences`).
    #[serde(default)]
    pub fences: bool,
    /// In the order in which they were measured.
    pub figures: Vec<Figure>,
    /// What could not be measured, and why.
    pub skipped: Vec<String>,
}
