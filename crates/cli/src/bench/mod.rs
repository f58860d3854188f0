//! `gnttab bench`: what grant operations cost here, each beside the limit of this machine.

mod disk;
pub(crate) mod load;

use gnttab_bench::{Figure, Options, Report, run};

use crate::args::{Bench, BenchCommand};
use crate::failure::Failure;
use crate::output;

pub(crate) fn main(asked: &Bench) -> Result<(), Failure> {
    match &asked.what {
        None => engine(asked),
        Some(BenchCommand::Disk(asked)) => disk::main(asked),
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
    if !asked.wants_json() {
        output::line(&Figure::heading());
    }
    let report = run(&options, &mut |figure| {
        if !asked.wants_json() {
            output::line(&figure.line());
        }
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
