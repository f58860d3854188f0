//! Asks a real Xen and the engine the same questions and compares the answers.
//!
//! ```sh
//! zcat /boot/xen-4.17-amd64.gz > xen
//! cargo run --release -p gnttab-conformance -- --xen xen --seed 1 --operations 200000
//! ```
//!
//! The last line is `operations N scripts N differences N`; the exit code is 0 only without a
//! difference. Without `--xen` only the engine is asked, and its machine's books are audited.
#![forbid(unsafe_code)]

mod engine_world;
mod generate;
mod real_xen;
mod session;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use engine_world::Settings;
use real_xen::Tools;

/// Asks a real Xen and the engine the same questions and compares the answers.
#[derive(Debug, Parser)]
struct Args {
    /// The hypervisor, decompressed: zcat /boot/xen-4.17-amd64.gz > xen.
    #[arg(long)]
    xen: Option<PathBuf>,
    /// The emulator.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Where the random programs start.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many hypercalls to make, at least.
    #[arg(long, default_value_t = 20_000)]
    operations: u64,
    /// Differences after which to stop.
    #[arg(long, default_value_t = 10)]
    most: usize,
    /// Limit of the table's frames.
    #[arg(long, default_value_t = 64)]
    max_frames: u32,
    /// Limit of the pages of mappings, 256 each.
    #[arg(long, default_value_t = 1024)]
    max_maptrack_frames: u32,
    /// One program in so many kills the other domain on its way, which costs a new start; 0: none.
    #[arg(long, default_value_t = 2000)]
    kills: u32,
    /// Prints everything as JSON before the last line.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let settings = Settings {
        max_frames: args.max_frames,
        max_maptrack_frames: args.max_maptrack_frames,
        kills: args.kills,
    };
    match run(&args, settings) {
        Ok(report) => {
            if args.json {
                match serde_json::to_string_pretty(&report) {
                    Ok(text) => println!("{text}"),
                    Err(why) => eprintln!("the report could not be written: {why}"),
                }
            }
            println!(
                "operations {} scripts {} differences {}",
                report.operations,
                report.scripts,
                report.differences.len()
            );
            if report.differences.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(why) => {
            eprintln!("gnttab-conformance: {why}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args, settings: Settings) -> Result<session::Report, real_xen::XenError> {
    let tools = match &args.xen {
        Some(xen) => Some(Tools {
            qemu: args.qemu.clone(),
            xen: xen.clone(),
            kernel: real_xen::build_kernel()?,
        }),
        None => None,
    };
    session::compare(tools.as_ref(), settings, args.seed, args.operations, args.most)
}
