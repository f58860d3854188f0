//! Rounds: how a case becomes a figure.

use std::time::{Duration, Instant};

use crate::Options;
use crate::limits::locked_exchange;
use crate::report::{Figure, REPORT_VERSION, Report, Temperature};

/// A round lasts at least this long, so that reading the clock is no part of the figure.
const ROUND: Duration = Duration::from_micros(20);

/// Items in a round that can hardly be too short.
const SHORT: u32 = 1024;

/// Rounds before the first that counts.
const WARM_UP: usize = 2;

/// Fewest undisturbed rounds that make a figure; if the time is over before, it goes on for up to
/// [`PATIENCE`] times as long.
const FEWEST: usize = 8;
const PATIENCE: u32 = 10;

/// What is run: so many repetitions, and how long they took; `None` if the round was disturbed in a way
/// that could make it too short.
pub(crate) type Body<'a> = &'a mut dyn FnMut(u32) -> Option<Duration>;

/// A case by name and circumstances.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) batch: u32,
    pub(crate) threads: u32,
    pub(crate) version: u32,
    pub(crate) temperature: Temperature,
}

/// See the module.
pub(crate) struct Sampler<'a> {
    filter: Option<String>,
    budget: Duration,
    figures: Vec<Figure>,
    skipped: Vec<String>,
    tell: &'a mut dyn FnMut(&Figure),
}

/// Repetitions that fill a round, and the nanoseconds each repetition took, round by round.
struct Series<'b> {
    body: Body<'b>,
    repetitions: u32,
    items: u32,
    each: Vec<f64>,
}

impl<'b> Series<'b> {
    fn new(items: u32, body: Body<'b>) -> Series<'b> {
        let mut repetitions = 1;
        // A disturbed round tells nothing about its length, but very short ones are disturbed by their
        // own start: not many tries, and not for ever.
        for _ in 0..64 {
            match body(repetitions) {
                Some(time) if time >= ROUND => break,
                None if repetitions * items >= SHORT => {}
                _ => repetitions *= 2,
            }
        }
        Series {
            body,
            repetitions,
            items,
            each: Vec::new(),
        }
    }

    fn round(&mut self) {
        if let Some(time) = (self.body)(self.repetitions) {
            let items = f64::from(self.repetitions) * f64::from(self.items);
            self.each.push(time.as_secs_f64() * 1e9 / items);
        }
    }

    fn sorted(mut self) -> Vec<f64> {
        self.each.sort_by(f64::total_cmp);
        self.each
    }
}

impl<'a> Sampler<'a> {
    pub(crate) fn new(options: &Options, tell: &'a mut dyn FnMut(&Figure)) -> Sampler<'a> {
        Sampler {
            filter: options.filter.clone(),
            budget: options.budget,
            figures: Vec::new(),
            skipped: Vec::new(),
            tell,
        }
    }

    /// Whether a case of this name is asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter))
    }

    /// Whether any of them is.
    pub(crate) fn wants_any(&self, cases: impl IntoIterator<Item = Case>) -> bool {
        cases.into_iter().any(|case| self.wants(&case.name))
    }

    /// Says that a case was left out, and why.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.skipped.push(format!("{name}: {why}"));
    }

    /// Measures a case whose repetitions do `items` items each, in turns with its limit, one item a
    /// repetition.
    pub(crate) fn measure(
        &mut self,
        case: Case,
        items: u32,
        body: Body<'_>,
        limit: &str,
        limit_body: Body<'_>,
    ) {
        if !self.wants(&case.name) {
            return;
        }
        let mut l_body = |repetitions| Some(locked_exchange(repetitions));
        let mut l = Series::new(1, &mut l_body);
        let mut bound = Series::new(1, limit_body);
        let mut subject = Series::new(items, body);
        let start = Instant::now();
        let mut rounds = 0;
        while (subject.each.len() < FEWEST && start.elapsed() < PATIENCE * self.budget)
            || start.elapsed() < self.budget
        {
            l.round();
            bound.round();
            subject.round();
            rounds += 1;
            if rounds == WARM_UP {
                for series in [&mut l, &mut bound, &mut subject] {
                    series.each.clear();
                }
            }
        }
        let (l, bound, each) = (l.sorted(), bound.sorted(), subject.sorted());
        let (Some(&l_ns), Some(&limit_ns), Some(&min_ns)) = (l.first(), bound.first(), each.first()) else {
            self.skip(&case.name, "no round was undisturbed");
            return;
        };
        let figure = Figure {
            name: case.name,
            batch: case.batch,
            threads: case.threads,
            version: case.version,
            temperature: case.temperature,
            min_ns,
            median_ns: each[each.len() / 2],
            spread: each[each.len() * 3 / 4] / min_ns - 1.0,
            rounds: each.len(),
            limit: limit.to_owned(),
            limit_ns,
            ratio: min_ns / limit_ns,
            l_ns,
        };
        (self.tell)(&figure);
        self.figures.push(figure);
    }

    pub(crate) fn into_report(self) -> Report {
        let l_ns = self
            .figures
            .iter()
            .map(|figure| figure.l_ns)
            .fold(f64::INFINITY, f64::min);
        Report {
            version: REPORT_VERSION,
            l_ns: if l_ns.is_finite() { l_ns } else { 0.0 },
            processor: processor(),
            fences: cfg!(feature = "fences"),
            figures: self.figures,
            skipped: self.skipped,
        }
    }
}

/// What the processor calls itself.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map(|(_, name)| name.trim().to_owned());
    name.unwrap_or_else(|| "unknown".to_owned())
}
