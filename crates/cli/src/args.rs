//! The command line. Help, errors about wrong use, and later man pages and completions come from here.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{ArgAction, Args, Parser, Subcommand};

use crate::machine::Name;
use crate::roles::Sharing;

mod at_rest;
mod watching;

pub(crate) use at_rest::{
    AtRest, Completions, Decode, DecodeAs, Explain, ExplainAs, GrantOne, Man, MapOne, Plan, RingAbi, Shell,
};
pub(crate) use watching::{Doctor, Sort, Top, Watch, Watching};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  gnttab demo                            three domains, one of them hostile; no setup, half a minute
  gnttab disk disk.img                   serve an image across granted pages, as NBD on a Unix socket
  gnttab run machine.toml                a machine from a file
  gnttab dump d1                         a domain's grant table, decoded
  gnttab bench --quick                   what grant operations cost on this machine
  gnttab top                             who shares how much with whom, how fast, what is stuck
  gnttab watch                           what happens, as it happens
  gnttab doctor                          what is wrong, what is nearly full, what to do
  gnttab decode frames.bin               a grant table from a dump or a core, and what is wrong with it
  gnttab shell                           grant, map, copy and end by hand
  gnttab plan machine.toml               the grant frames and the maptrack that domains will need
  gnttab explain -3                      what a status, a flag word or an operation means

";

const AFTER: &str = "\
Exit code: 0 done, 1 failed, 2 wrong use. Standard output is data, standard error is talk. NO_COLOR is honoured.
`gnttab COMMAND --help` starts with examples of that command.";

/// Grant tables on any Linux box: isolated domains share memory by grant reference, with no root and no Xen.
#[derive(Debug, Parser)]
#[command(
    name = "gnttab",
    version,
    styles = STYLES,
    before_help = EXAMPLES.trim_end(),
    after_help = AFTER,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 110
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(Demo),
    Disk(Disk),
    Run(Run),
    Dump(Dump),
    Bench(Bench),
    #[command(flatten)]
    Watching(Watching),
    #[command(flatten)]
    AtRest(AtRest),
}

impl Command {
    /// Its name, as typed.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Command::Demo(_) => "demo",
            Command::Disk(_) => "disk",
            Command::Run(_) => "run",
            Command::Dump(_) => "dump",
            Command::Bench(_) => "bench",
            Command::Watching(command) => command.name(),
            Command::AtRest(command) => command.name(),
        }
    }

    /// Whether standard output is to be JSON.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Command::Demo(Demo { json, .. })
            | Command::Disk(Disk { json, .. })
            | Command::Run(Run { json, .. })
            | Command::Dump(Dump { json, .. }) => *json,
            Command::Bench(bench) => bench.wants_json(),
            Command::Watching(command) => command.wants_json(),
            Command::AtRest(command) => command.wants_json(),
        }
    }
}

/// Show it: a disk served from one domain to another, and a hostile third that gets nothing.
///
/// Starts a monitor and three domains, each a process of its own: a backend that serves a disk image, a frontend that
/// reads and writes it across granted pages and checks every byte by digest, and a hostile one that tries to get at what it was
/// not granted. Ends with what was shared, with whom, how fast, what the hostile domain tried and what it got.
/// Exit code 0 only if all of it held. Takes under half a minute, needs no privileges, leaves nothing behind.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab demo
  gnttab demo --image disk.img
  gnttab demo --json | jq .held
  gnttab demo --trouble                             a machine to try top, doctor and watch on")]
pub(crate) struct Demo {
    /// Use the first 256 MiB of this image instead of a generated one. The file itself is not changed.
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// Instead: four domains with a page that is not given back, a full table, a consumer at its quota and a flood of
    /// refusals, until SIGINT or SIGTERM. For trying `gnttab top`, `doctor` and `watch`.
    #[arg(long, conflicts_with = "image")]
    pub(crate) trouble: bool,
    /// Print the outcome as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Serve a disk image from one domain to another, and export it there as NBD.
///
/// A backend domain has the image and nothing else; a frontend domain reaches it only across granted pages, and
/// lets NBD clients in. Stays up until SIGINT or SIGTERM; then what is under way is finished, written down, and
/// the domains end.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab disk disk.img
  gnttab disk disk.img --socket /tmp/disk.sock      then: qemu-img info 'nbd+unix:///?socket=/tmp/disk.sock'
  gnttab disk disk.img --tcp 10809                  then: nbdinfo nbd://127.0.0.1
  gnttab disk disk.img --read-only --queues 2 --ring-order 2")]
pub(crate) struct Disk {
    /// A raw image file or a block device.
    pub(crate) image: PathBuf,
    /// Let NBD clients in at this Unix socket [default: one under $XDG_RUNTIME_DIR/gnttab or /tmp/gnttab-$UID].
    #[arg(long, value_name = "PATH", conflicts_with = "tcp")]
    pub(crate) socket: Option<PathBuf>,
    /// Let NBD clients in at this port of 127.0.0.1; 0 takes one that is free.
    #[arg(long, value_name = "PORT")]
    pub(crate) tcp: Option<u16>,
    /// Serve it for reading alone.
    #[arg(long)]
    pub(crate) read_only: bool,
    #[command(flatten)]
    pub(crate) rings: Rings,
    /// Serve the file with no domains between: the baseline to measure against.
    #[arg(long, hide = true)]
    pub(crate) direct: bool,
    /// Print what is served, and at the end what was done, as JSON: one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How frontend and backend talk.
#[derive(Debug, Args)]
pub(crate) struct Rings {
    /// Rings between frontend and backend, each with a thread on both sides. The connections of a client are spread over
    /// them.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) queues: u8,
    /// Each ring is 2^N pages.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=4))]
    pub(crate) ring_order: u8,
    /// How the backend reaches the frontend's pages.
    #[arg(long, value_name = "HOW", default_value = "persistent")]
    pub(crate) sharing: Sharing,
}

/// Run a machine from a file.
///
/// The file names domains, their memory and limits, the disks between them, and the programs to start. Stays up until
/// SIGINT or SIGTERM, or until every program has ended.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab run --example > machine.toml               a file to start from
  gnttab run --check machine.toml                   look for mistakes, start nothing
  gnttab run machine.toml")]
pub(crate) struct Run {
    /// The machine file.
    #[arg(required_unless_present = "example")]
    pub(crate) machine: Option<PathBuf>,
    /// Read the file and check it, and start nothing.
    #[arg(long)]
    pub(crate) check: bool,
    /// Print a machine file to start from.
    #[arg(long, exclusive = true)]
    pub(crate) example: bool,
    /// Let programs of this user join as domains, `gnttab shell`, `grant` and `map` among them. They are not isolated
    /// from their user, and get of others what is granted to them.
    #[arg(long)]
    pub(crate) join: bool,
    /// Print what happens as JSON: one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show a domain's grant table, decoded: its own entries and what it maps of others.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab dump d1                                    the table of domain 1
  gnttab dump storage --reference 0x12              one entry of it
  gnttab dump 2 --json | jq '.entries[] | select((.pins | add) > 0)'")]
pub(crate) struct Dump {
    /// The domain: 5, d5, or its name.
    pub(crate) domain: DomainRef,
    /// Only this entry (0x12 or 18), said in full even if it is free.
    #[arg(long, value_name = "REF", value_parser = parse_reference)]
    pub(crate) reference: Option<u32>,
    /// The running machine's control socket [default: the only one there is].
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Print it as JSON.
    #[arg(long, action = ArgAction::SetTrue)]
    pub(crate) json: bool,
}

/// Measure what grant operations cost here, each beside the limit that this machine sets.
///
/// The limits are measured in the same rounds as the operations, and every figure is the least of many short rounds: a busy
/// machine makes it take longer to find, and the spread says how far to believe it.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    before_help = "\
Examples:
  gnttab bench                                      every operation, version, batch and temperature
  gnttab bench pair/v1                              the cases with that in their names
  gnttab bench --quick --json > now.json
  gnttab bench diff before.json now.json            what has changed, the greatest rise first
  gnttab bench plot now.json docs/performance       SVG plots, and a table beside Xen's figures
  gnttab bench disk                                 the block path, beside the file and beside qemu-nbd
  gnttab bench grants                               grants that persist, copies, and maps for each request"
)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) what: Option<BenchCommand>,
    /// Only cases whose name contains this.
    pub(crate) filter: Option<String>,
    /// A tenth of the time: a look, not figures to quote.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print one JSON object with a figure for each case.
    #[arg(long)]
    json: bool,
}

impl Bench {
    /// Whether standard output is to be JSON, whatever is measured.
    pub(crate) fn wants_json(&self) -> bool {
        match &self.what {
            None => self.json,
            Some(BenchCommand::Disk(disk)) => disk.json,
            Some(BenchCommand::Grants(grants)) => grants.json,
            Some(BenchCommand::Diff(diff)) => diff.json,
            Some(BenchCommand::Plot(_)) => false,
        }
    }
}

/// What else to measure, and what to do with figures.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    Disk(BenchDisk),
    Grants(BenchGrants),
    Diff(BenchDiff),
    Plot(BenchPlot),
}

/// Measure the block path: domain to domain beside the file itself, and the NBD export beside qemu's.
///
/// Needs fio, nbdcopy, qemu-nbd and qemu-storage-daemon, and 1.3 GiB of memory for five copies of an image.
#[derive(Debug, Args)]
pub(crate) struct BenchDisk {
    /// One short round: a look, not figures to quote.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print one JSON object with a figure for each case.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measure the three ways of a backend to its frontend's pages: kept mapped, copied by the monitor, mapped for each request.
///
/// Two domains and a file in memory, by size, depth and direction. Beside each rate: the maps and copies of a request, and
/// the processor time that it cost frontend, backend and monitor.
#[derive(Debug, Args)]
pub(crate) struct BenchGrants {
    /// One short round: a look, not figures to quote.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print one JSON object with a figure for each case.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Compare two runs, case by case, the greatest rise first.
///
/// Compared is the cost in units of L, a locked compare-exchange of the same run: a machine that was slower as a whole is no
/// change.
#[derive(Debug, Args)]
pub(crate) struct BenchDiff {
    /// What `gnttab bench --json` printed then.
    pub(crate) before: PathBuf,
    /// And now.
    pub(crate) after: PathBuf,
    /// Print one JSON object with a change for each case.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Draw a run: cost by batch, size, thread and scale. Prints a table of it beside Xen's figures.
#[derive(Debug, Args)]
pub(crate) struct BenchPlot {
    /// What `gnttab bench --json` printed.
    pub(crate) figures: PathBuf,
    /// The folder for the plots.
    pub(crate) folder: PathBuf,
}

/// A domain as people write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DomainRef {
    /// `5` or `d5`.
    Id(u16),
    /// By name.
    Named(Name),
}

impl FromStr for DomainRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('d').unwrap_or(text);
        if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return match digits.parse() {
                // 0x7ff0 and above are reserved (DOMID_FIRST_RESERVED).
                Ok(id) if id < 0x7ff0 => Ok(DomainRef::Id(id)),
                _ => Err("a domain id is below 32752".to_owned()),
            };
        }
        text.parse().map(DomainRef::Named)
    }
}

/// A number: hexadecimal with `0x`, else decimal.
fn parse_number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
        _ => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is not a number like 0x1000 or 4096"))
}

/// A grant reference: hexadecimal with `0x`, else decimal.
pub(crate) fn parse_reference(text: &str) -> Result<u32, String> {
    let parsed = parse_number(text)
        .ok()
        .and_then(|number| u32::try_from(number).ok());
    parsed.ok_or_else(|| "a grant reference is a number like 0x12 or 18".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_parser_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_domain_is_a_number_a_d_number_or_a_name() {
        assert_eq!("5".parse(), Ok(DomainRef::Id(5)));
        assert_eq!("d5".parse(), Ok(DomainRef::Id(5)));
        assert_eq!("disk".parse(), Ok(DomainRef::Named("disk".parse().unwrap())));
        assert!("32752".parse::<DomainRef>().is_err());
        assert!("99999999".parse::<DomainRef>().is_err());
        assert!("".parse::<DomainRef>().is_err());
        assert!("-1".parse::<DomainRef>().is_err());
    }

    #[test]
    fn a_reference_is_hexadecimal_or_decimal() {
        assert_eq!(parse_reference("0x12"), Ok(0x12));
        assert_eq!(parse_reference("18"), Ok(18));
        assert!(parse_reference("0x1_0000_0000").is_err());
        assert!(parse_reference("4294967296").is_err());
    }
}
