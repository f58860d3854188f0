//! The commands that look at a running machine.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use gnttab_abi::{GrantStatus, Op};
use gnttab_host::monitor::EventKind;

use super::{DomainRef, parse_reference};

/// What to look at.
#[derive(Debug, Subcommand)]
pub(crate) enum Watching {
    Top(Top),
    Watch(Watch),
    Doctor(Doctor),
}

impl Watching {
    /// Its name, as typed.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Watching::Top(_) => "top",
            Watching::Watch(_) => "watch",
            Watching::Doctor(_) => "doctor",
        }
    }

    /// Whether standard output is to be JSON.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Watching::Top(Top { json, .. })
            | Watching::Watch(Watch { json, .. })
            | Watching::Doctor(Doctor { json, .. }) => *json,
        }
    }
}

/// Which running machine.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The running machine's control socket [default: the only one there is].
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
}

/// Watch a running machine: who shares how much with whom, how fast, and what is stuck or nearly full.
///
/// Keys are those of top and htop; ? shows them. With --batch it prints the same, sample after sample.
/// Reading it stops nobody: everything comes from counters that the machine keeps anyway.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab top                                        q leaves, ? helps, Enter shows a domain's entries
  gnttab top --batch --interval 5 --count 12        a minute of lines
  gnttab top --batch --json | jq '.findings[]'      what is wrong, as it becomes so
  gnttab top --prometheus --listen 9464             for Prometheus to scrape")]
pub(crate) struct Top {
    /// Print samples instead of drawing.
    #[arg(long)]
    pub(crate) batch: bool,
    /// Seconds between samples.
    #[arg(long, value_name = "S", default_value = "1", value_parser = parse_interval)]
    pub(crate) interval: Duration,
    /// Stop after so many samples.
    #[arg(long, value_name = "N", requires = "batch", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// By what to sort.
    #[arg(long, value_name = "COLUMN", default_value = "id")]
    pub(crate) sort: Sort,
    /// Only domains with this in their name or number.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) filter: String,
    #[command(flatten)]
    pub(crate) which: Which,
    /// Print samples as JSON: one object a line.
    #[arg(long, requires = "batch")]
    pub(crate) json: bool,
    /// Print what the machine counts as Prometheus text, once.
    #[arg(long, conflicts_with = "batch")]
    pub(crate) prometheus: bool,
    /// Let it be scraped instead, at this port of 127.0.0.1; 0 takes one that is free. Every user of this computer may.
    #[arg(long, value_name = "PORT", requires = "prometheus")]
    pub(crate) listen: Option<u16>,
}

/// A column to sort by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// The domain's number.
    Id,
    /// Its name.
    Name,
    /// Frames of its grant table.
    Frames,
    /// Entries that are granted.
    Granted,
    /// Entries that others use.
    Used,
    /// Mappings that it holds.
    Maptrack,
    /// Operations a second.
    Operations,
    /// Errors a second.
    Errors,
    /// Age of its oldest mapping.
    Age,
}

/// Tell what happens on a running machine: granted, mapped, unmapped, ended, refused, pending, died.
///
/// One event a line. Grants are words in memory that domains share with the monitor: they are seen when the tables are
/// looked at, 20 times a second, or when they are mapped, whichever comes first; one that nobody mapped and that ended sooner is
/// not seen. If more happens than can be told, how much was left out is told instead, and the machine is not slowed down.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab watch
  gnttab watch --event refused --event pending
  gnttab watch --domain app --reference 0x8
  gnttab watch --json --status bad_gntref --count 1")]
pub(crate) struct Watch {
    /// Only this kind of event; may be given several times.
    #[arg(long, value_name = "EVENT", value_parser = parse_event)]
    pub(crate) event: Vec<EventKind>,
    /// Only what this domain does or has done to it: 5, d5, or its name.
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) domain: Option<DomainRef>,
    /// Only this grant reference (0x12 or 18).
    #[arg(long, value_name = "REF", value_parser = parse_reference)]
    pub(crate) reference: Option<u32>,
    /// Only this operation, as in map_grant_ref.
    #[arg(long, value_name = "OP", value_parser = parse_operation)]
    pub(crate) operation: Option<Op>,
    /// Only this status, as in bad_gntref or -3.
    #[arg(long, value_name = "STATUS", allow_hyphen_values = true, value_parser = parse_status)]
    pub(crate) status: Option<GrantStatus>,
    /// Stop after so many events.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) which: Which,
    /// Print events as JSON: one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Say what is wrong with a running machine, what is near its limit, and what to do about it.
///
/// Looks twice, an interval apart. Exit code 0: nothing is wrong; 1: something is (or it could not be looked at).
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab doctor
  gnttab doctor --interval 10                       rates over ten seconds
  gnttab doctor --json | jq '.findings[] | select(.level == \"problem\")'")]
pub(crate) struct Doctor {
    /// Seconds between the two looks.
    #[arg(long, value_name = "S", default_value = "1", value_parser = parse_interval)]
    pub(crate) interval: Duration,
    #[command(flatten)]
    pub(crate) which: Which,
    /// Print it as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("an interval is 0.1 to 86400 seconds".to_owned()),
    }
}

fn parse_event(text: &str) -> Result<EventKind, String> {
    let names = EventKind::ALL.map(EventKind::name).join(", ");
    let found = EventKind::ALL.into_iter().find(|kind| kind.name() == text);
    found.ok_or(format!("events are: {names}"))
}

fn parse_operation(text: &str) -> Result<Op, String> {
    let names = Op::ALL.map(Op::name).join(", ");
    let found = Op::ALL.into_iter().find(|op| op.name() == text);
    found.ok_or(format!("operations are: {names}"))
}

fn parse_status(text: &str) -> Result<GrantStatus, String> {
    let number = text.parse::<i16>().ok().map(GrantStatus);
    let found = GrantStatus::ALL
        .iter()
        .copied()
        .find(|status| status.name() == Some(text) || number == Some(*status));
    found.ok_or_else(|| {
        let names: Vec<&str> = GrantStatus::ALL
            .iter()
            .filter_map(|status| status.name())
            .collect();
        format!("statuses are 0 to -13, or: {}", names.join(", "))
    })
}
