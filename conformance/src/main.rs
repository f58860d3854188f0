//! Asks a real Xen and the engine the same questions and compares the answers.
//!
//! ```sh
//! zcat /boot/xen-4.17-amd64.gz > xen
//! cargo run --release -p gnttab-conformance -- --xen xen --seed 1 --operations 200000
//! ```
//!
//! First the specification's vectors are played on the real Xen, then random programs on both. The last
//! line is `operations N scripts N differences N`; the exit code is 0 only without a difference that
//! `docs/differences.json` does not list. Without `--xen` only the engine is asked, and its machine's
//! books are audited.
#![forbid(unsafe_code)]

mod accepted;
mod engine_world;
mod generate;
mod puppets;
mod real_xen;
mod rig;
#[path = "../../crates/engine/tests/vectors/run.rs"]
#[expect(
    dead_code,
    reason = "shared with the engine's tests, which interrupt operations too"
)]
mod run;
#[path = "../../crates/engine/tests/vectors/script.rs"]
#[expect(dead_code, reason = "shared with the engine's tests")]
mod script;
mod session;
mod vectors;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use gnttab_engine::Reference;
use serde::Serialize;

use accepted::Accepted;
use engine_world::Settings;
use real_xen::{Tools, XenError};

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
    /// How many hypercalls to make in random programs, at least.
    #[arg(long, default_value_t = 20_000)]
    operations: u64,
    /// The specification's vectors to play: all, none, or those whose number begins so, as C-6.
    #[arg(long, default_value = "all")]
    vectors: String,
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
    /// Machines that run at once, each with programs of its own: as many as there are processors.
    #[arg(long)]
    machines: Option<u32>,
    /// Prints everything as JSON before the last line.
    #[arg(long)]
    json: bool,
}

/// What a run found.
#[derive(Debug, Serialize)]
struct Whole {
    /// What the report's form is.
    version: u32,
    vectors: Option<vectors::Played>,
    programs: session::Report,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let settings = Settings {
        max_frames: args.max_frames,
        max_maptrack_frames: args.max_maptrack_frames,
        kills: args.kills,
        reference: Reference::V4_17,
        inside: true,
    };
    let whole = match run_all(&args, settings) {
        Ok(whole) => whole,
        Err(why) => {
            eprintln!("gnttab-conformance: {why}");
            return ExitCode::from(2);
        }
    };
    if args.json {
        match serde_json::to_string_pretty(&whole) {
            Ok(text) => println!("{text}"),
            Err(why) => eprintln!("the report could not be written: {why}"),
        }
    }
    let (mut scripts, mut differences) = (whole.programs.scripts, whole.programs.unlisted());
    if let Some(played) = &whole.vectors {
        told(played);
        scripts += played.cases();
        differences += played.differ.len();
    }
    let listed = whole.programs.differences.len() - whole.programs.unlisted();
    if listed > 0 {
        eprintln!("programs: {listed} differ as listed");
    }
    println!(
        "operations {} scripts {scripts} differences {differences}",
        whole.programs.operations
    );
    if differences == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Says what became of the vectors.
fn told(played: &vectors::Played) {
    for (row, what) in &played.differ {
        eprintln!("{row} differs: {what}");
    }
    eprintln!(
        "vectors: {} rows, {} hold in {} cases, {} differ as listed, {} differ, {} cannot be played, {} checks \
         not seen",
        played.rows(),
        played.held.len(),
        played.cases(),
        played.listed.len(),
        played.differ.len(),
        played.cannot.len(),
        played.unseen
    );
}

fn run_all(args: &Args, settings: Settings) -> Result<Whole, XenError> {
    let accepted = Accepted::read()?;
    let tools = match &args.xen {
        Some(xen) => Some(Tools {
            qemu: args.qemu.clone(),
            xen: xen.clone(),
            kernel: real_xen::build_kernel()?,
        }),
        None => None,
    };
    let vectors = match (&tools, args.vectors.as_str()) {
        (None, _) | (_, "none") => None,
        (Some(tools), "all") => Some(vectors::play(tools, settings, &accepted, "")?),
        (Some(tools), only) => Some(vectors::play(tools, settings, &accepted, only)?),
    };
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let processors = u32::try_from(processors).unwrap_or(u32::MAX);
    let programs = session::compare(
        tools.as_ref(),
        settings,
        &accepted,
        args.seed,
        args.operations,
        args.most,
        args.machines.unwrap_or(processors),
    )?;
    Ok(Whole {
        version: 1,
        vectors,
        programs,
    })
}
