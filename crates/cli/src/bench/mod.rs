//! `gnttab bench`: what grant operations cost here, each beside the limit of this machine.

mod disk;
mod grants;
pub(crate) mod load;
mod pair;

use std::path::Path;

use gnttab_bench::diff::Change;
use gnttab_bench::{Figure, Options, Report, run};
use serde_json::json;

use crate::args::{Bench, BenchCommand, BenchDiff, BenchPlot};
use crate::failure::Failure;
use crate::output;

pub(crate) fn main(asked: &Bench) -> Result<(), Failure> {
    match &asked.what {
        None => engine(asked),
        Some(BenchCommand::Disk(asked)) => disk::main(asked),
        Some(BenchCommand::Grants(asked)) => grants::main(asked),
        Some(BenchCommand::Diff(asked)) => diff(asked),
        Some(BenchCommand::Plot(asked)) => plot(asked),
    }
}

/// The engine's operations.
fn engine(asked: &Bench) -> Result<(), Failure> {
    let mut options = if asked.quick {
        Options::quick()
    } else {
        Options::default()
    };
    options.filter.clone_from(&asked.filter);
    let mut headed = false;
    let report = run(&options, &mut |figure| {
        if asked.wants_json() {
            return;
        }
        if !std::mem::replace(&mut headed, true) {
            output::line(&Figure::heading());
        }
        output::line(&figure.line());
    });
    for skipped in &report.skipped {
        output::say(&format!("left out: {skipped}"));
    }
    if report.figures.is_empty() {
        return Err(nothing(asked, &report));
    }
    if asked.wants_json() {
        let report = serde_json::to_value(&report).map_err(Failure::new)?;
        output::json("bench", report);
    }
    Ok(())
}

/// A run, as it was printed.
fn read(path: &Path) -> Result<Report, Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::new(format!("figures {}: {error}", path.display()))
            .next("write some with: gnttab bench --json > figures.json")
    };
    let text = std::fs::read(path).map_err(|error| failed(&error))?;
    serde_json::from_slice(&text).map_err(|error| failed(&error))
}

fn diff(asked: &BenchDiff) -> Result<(), Failure> {
    let (before, after) = (read(&asked.before)?, read(&asked.after)?);
    let (changes, lonely) = gnttab_bench::diff::diff(&before, &after);
    if asked.json {
        let change = |change: &Change| {
            json!({
                "name": change.name,
                "before_ns": change.before.min_ns,
                "after_ns": change.after.min_ns,
                "before_in_L": change.before.in_l(),
                "after_in_L": change.after.in_l(),
                "rise": change.rise(),
                "clear": change.is_clear(),
            })
        };
        let changes: Vec<_> = changes.iter().map(change).collect();
        output::json("bench diff", json!({ "changes": changes, "only_in_one": lonely }));
        return Ok(());
    }
    for change in &changes {
        output::line(&change.line());
    }
    for name in &lonely {
        output::say(&format!("only in one of them: {name}"));
    }
    Ok(())
}

fn plot(asked: &BenchPlot) -> Result<(), Failure> {
    let report = read(&asked.figures)?;
    let plots = gnttab_bench::plot::plots(&report);
    if plots.is_empty() {
        return Err(Failure::new(format!(
            "figures {}: nothing that could be drawn",
            asked.figures.display()
        ))
        .next("measure more of them: gnttab bench --json > figures.json"));
    }
    std::fs::create_dir_all(&asked.folder)
        .map_err(|error| Failure::new(format!("folder {}: {error}", asked.folder.display())))?;
    for plot in plots {
        let path = asked.folder.join(plot.file);
        std::fs::write(&path, plot.svg)
            .map_err(|error| Failure::new(format!("plot {}: {error}", path.display())))?;
        output::say(&format!("wrote {}", path.display()));
    }
    output::line(gnttab_bench::plot::table(&report).trim_end());
    Ok(())
}

/// No case was measured.
fn nothing(asked: &Bench, report: &Report) -> Failure {
    match &asked.filter {
        Some(filter) if report.skipped.is_empty() => {
            Failure::wrong_use(format!("no case is called anything with \"{filter}\" in it"))
                .next("names are like pair/v1/warm/b32; `gnttab bench --quick` shows them all")
        }
        _ => Failure::new("nothing could be measured").next("see what was said about each case"),
    }
}
