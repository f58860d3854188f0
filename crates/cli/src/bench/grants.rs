//! `gnttab bench grants`: grants that persist, a copy for each request and a map for each request, from one domain to
//! another.
//!
//! Every figure is of a frontend and a backend started for it. Rounds take turns over the three ways, so that whatever else
//! the machine does disturbs all of them; what counts is the best round.

use std::time::Duration;

use serde_json::{Value, json};

use super::disk::{Folder, fill, spread};
use super::load::Pattern;
use super::pair::{self, Cost};
use crate::args::BenchGrants;
use crate::failure::Failure;
use crate::output;
use crate::roles::Sharing;

const WAYS: [Sharing; 3] = [Sharing::Persistent, Sharing::Copied, Sharing::Mapped];

fn patterns() -> Vec<Pattern> {
    let mut all = Vec::new();
    for length in [4 << 10, 32 << 10, 128 << 10] {
        for depth in [1, 32] {
            for write in [false, true] {
                all.push(Pattern {
                    write,
                    random: true,
                    length,
                    depth,
                });
            }
        }
    }
    all
}

/// A way's figures for one pattern.
struct Case {
    pattern: Pattern,
    way: Sharing,
    /// Accesses a second, by round.
    rates: Vec<f64>,
    /// Of the best round.
    cost: Cost,
}

impl Case {
    fn best(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }
}

pub(crate) fn main(args: &BenchGrants) -> Result<(), Failure> {
    let (rounds, time) = if args.quick {
        (1, Duration::from_millis(200))
    } else {
        (3, Duration::from_secs(1))
    };
    let folder = Folder::new()?;
    let image = folder.path("grants.img");
    fill(&image).map_err(|error| Failure::new(format!("image {}: {error}", image.display())))?;
    let mut cases: Vec<Case> = Vec::new();
    for pattern in patterns() {
        for way in WAYS {
            cases.push(Case {
                pattern,
                way,
                rates: Vec::new(),
                cost: Cost::default(),
            });
        }
    }
    for round in 1..=rounds {
        output::say(&format!("round {round} of {rounds}"));
        for case in &mut cases {
            let outcome = pair::measure(&image, case.way, &[case.pattern], time)?;
            let pace = outcome
                .paces
                .first()
                .ok_or_else(|| Failure::new("no figure came"))?;
            let rate = pace.requests as f64 / pace.seconds;
            if rate > case.best() {
                case.cost = outcome.cost;
            }
            case.rates.push(rate);
        }
    }
    report(args, &cases);
    Ok(())
}

fn report(args: &BenchGrants, cases: &[Case]) {
    let mut objects = Vec::new();
    for three in cases.chunks(WAYS.len()) {
        let Some(persistent) = three.first().map(Case::best) else {
            continue;
        };
        for case in three {
            let ratio = case.best() / persistent;
            if args.json {
                objects.push(to_json(case, ratio));
            } else {
                output::line(&line(case, ratio));
            }
        }
    }
    if args.json {
        output::json("bench grants", json!({ "cases": objects }));
    }
}

fn to_json(case: &Case, ratio: f64) -> Value {
    json!({
        "name": case.pattern.to_string(),
        "way": case.way,
        "per_second": case.best(),
        "rounds": case.rates,
        "spread": spread(&case.rates),
        "compared_with": Sharing::Persistent,
        "ratio": ratio,
        "cost": case.cost.to_json(),
    })
}

fn line(case: &Case, ratio: f64) -> String {
    let wide = if spread(&case.rates) > 0.5 { " (wide)" } else { "" };
    format!(
        "{:<22} {:<10} {:>8.0} a second  {ratio:>5.2} x  {}{wide}",
        case.pattern.to_string(),
        case.way.name(),
        case.best(),
        case.cost,
    )
}
