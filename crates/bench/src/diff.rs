//! Two runs beside each other.
//!
//! Compared is the cost in units of `L`, measured in the same rounds as the case: a machine that ran slower
//! as a whole the second time is no change.

use crate::report::{Figure, Report};

/// A case of two runs.
#[derive(Clone, Debug)]
pub struct Change {
    /// The case.
    pub name: String,
    /// In the first run.
    pub before: Figure,
    /// In the second.
    pub after: Figure,
}

impl Change {
    /// By how much the cost in L rose, as a part of what it was.
    #[must_use]
    pub fn rise(&self) -> f64 {
        self.after.in_l() / self.before.in_l() - 1.0
    }

    /// Whether the rise lies outside what the rounds of either run differ by.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.rise().abs() > self.before.spread.max(self.after.spread).max(NOISE)
    }

    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let line = format!(
            "{:<42} {:>8.1} ns {:>7.1} L  ->  {:>8.1} ns {:>7.1} L  {:>+6.1} %",
            self.name,
            self.before.min_ns,
            self.before.in_l(),
            self.after.min_ns,
            self.after.in_l(),
            self.rise() * 100.0
        );
        if self.is_clear() {
            line
        } else {
            line + "  within the spread"
        }
    }
}

/// A change below this is none, however small the spread.
const NOISE: f64 = 0.03;

/// Every case that both runs have, the greatest rise first, and the names that only one has.
#[must_use]
pub fn diff(before: &Report, after: &Report) -> (Vec<Change>, Vec<String>) {
    let find =
        |report: &Report, name: &str| report.figures.iter().find(|figure| figure.name == name).cloned();
    let mut changes: Vec<Change> = before
        .figures
        .iter()
        .filter_map(|figure| {
            Some(Change {
                name: figure.name.clone(),
                before: figure.clone(),
                after: find(after, &figure.name)?,
            })
        })
        .collect();
    changes.sort_by(|one, other| other.rise().total_cmp(&one.rise()));
    let only = |of: &Report, other: &Report| -> Vec<String> {
        let names = of.figures.iter().map(|figure| figure.name.clone());
        names.filter(|name| find(other, name).is_none()).collect()
    };
    let mut lonely = only(before, after);
    lonely.extend(only(after, before));
    (changes, lonely)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Temperature;

    fn report(figures: &[(&str, f64, f64)]) -> Report {
        let figures = figures.iter().map(|&(name, min_ns, l_ns)| Figure {
            name: name.to_owned(),
            batch: 1,
            threads: 1,
            version: 1,
            temperature: Temperature::Warm,
            min_ns,
            median_ns: min_ns,
            spread: 0.01,
            rounds: 10,
            limit: "L".to_owned(),
            limit_ns: l_ns,
            ratio: min_ns / l_ns,
            l_ns,
        });
        Report {
            version: 1,
            l_ns: 2.0,
            processor: String::new(),
            fences: false,
            figures: figures.collect(),
            skipped: Vec::new(),
        }
    }

    #[test]
    fn a_slower_machine_is_no_change_and_the_greatest_rise_is_first() {
        let before = report(&[("same", 20.0, 2.0), ("worse", 20.0, 2.0), ("gone", 1.0, 2.0)]);
        let after = report(&[("same", 40.0, 4.0), ("worse", 30.0, 2.0), ("new", 1.0, 2.0)]);
        let (changes, lonely) = diff(&before, &after);
        let seen: Vec<_> = changes
            .iter()
            .map(|change| (change.name.as_str(), change.rise(), change.is_clear()))
            .collect();
        assert_eq!(seen, [("worse", 0.5, true), ("same", 0.0, false)]);
        assert_eq!(lonely, ["gone", "new"]);
    }
}
