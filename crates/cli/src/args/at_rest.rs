//! The commands that need no running machine.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{parse_number, parse_reference};

/// See the module.
#[derive(Debug, Subcommand)]
pub(crate) enum AtRest {
    Decode(Box<Decode>),
    Explain(Explain),
    Plan(Plan),
    Completions(Completions),
    Man(Man),
}

impl AtRest {
    /// Its name, as typed.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            AtRest::Decode(_) => "decode",
            AtRest::Explain(_) => "explain",
            AtRest::Plan(_) => "plan",
            AtRest::Completions(_) => "completions",
            AtRest::Man(_) => "man",
        }
    }

    /// Whether standard output is to be JSON.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            AtRest::Decode(decode) => decode.json,
            AtRest::Explain(explain) => explain.json,
            AtRest::Plan(plan) => plan.json,
            AtRest::Completions(_) | AtRest::Man(_) => false,
        }
    }
}

/// Decode raw grant frames, status frames or a ring page, and say what is wrong with them.
///
/// Takes the bytes as they lie in a dump or a core: whole frames or a part, from the start of a file or from a place in
/// it. The kind is guessed from what they hold, and the guess and its reason are said.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab decode frames.bin                          what it is, each entry, what is wrong or suspicious
  gnttab decode frames.bin --as v2 --status status.bin --owner d5
  gnttab decode core --address 0xffff888004000000 --frames 4
  gnttab decode frames.bin --picture                the table in blocks, a mark an entry
  gnttab decode ring.bin --as ring --json | jq .outstanding")]
pub(crate) struct Decode {
    /// The file; - is standard input.
    pub(crate) file: PathBuf,
    /// What it holds.
    #[arg(long = "as", value_name = "KIND", default_value = "guess")]
    pub(crate) kind: DecodeAs,
    /// Begin at this byte of the file (0x1000 or 4096).
    #[arg(long, value_name = "BYTE", value_parser = parse_number, conflicts_with_all = ["address", "physical"])]
    pub(crate) offset: Option<u64>,
    /// Begin at this virtual address of an ELF core.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_number, conflicts_with = "physical")]
    pub(crate) address: Option<u64>,
    /// Begin at this physical address of an ELF core, as the dump of a whole guest has them.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_number)]
    pub(crate) physical: Option<u64>,
    /// How many frames of 4 KiB [default: to the end].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) frames: Option<u32>,
    /// The first frame's number in its table, where the bytes are not the table's start.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=0xf_ffff))]
    pub(crate) first_frame: u32,
    /// The status words of a version 2 table, from their first.
    #[arg(long, value_name = "FILE")]
    pub(crate) status: Option<PathBuf>,
    /// The domain whose table it is (5 or d5): finds grants to itself.
    #[arg(long, value_name = "DOMAIN", value_parser = parse_domain)]
    pub(crate) owner: Option<u16>,
    /// The frontend's calling ABI, by which a ring is laid out.
    #[arg(long, value_name = "ABI", default_value = "x86_64")]
    pub(crate) abi: RingAbi,
    /// Only this entry (0x12 or 18), said in full even if it is free.
    #[arg(long, value_name = "REF", value_parser = parse_reference)]
    pub(crate) reference: Option<u32>,
    /// Free entries that still hold something, and answered slots of a ring, too.
    #[arg(long)]
    pub(crate) all: bool,
    /// Draw the table: a mark an entry, 64 a line.
    #[arg(long, conflicts_with_all = ["json", "reference"])]
    pub(crate) picture: bool,
    /// Print it as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What bytes hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DecodeAs {
    /// Whatever makes most sense of them.
    Guess,
    /// Grant frames of version 1.
    V1,
    /// Grant frames of version 2.
    V2,
    /// Status frames of version 2.
    Status,
    /// A shared ring of the block protocol.
    Ring,
}

/// A ring's layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RingAbi {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "x86_32")]
    X86_32,
    Arm,
}

/// Say in plain words what a status, an error, a flag word or an operation means, with the usual causes.
///
/// Takes a name as headers, logs and this program write it, with or without prefix, or a number. A number that can be
/// several things is explained as each, unless --as says which.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab explain -3                                 a status
  gnttab explain GNTST_eagain
  gnttab explain -ENOSYS                            what a whole hypercall answered
  gnttab explain 0x19 --as entry                    a flag word
  gnttab explain 'host_map|readonly'
  gnttab explain map_grant_ref                      an operation
  gnttab explain                                    everything that can be explained")]
pub(crate) struct Explain {
    /// The name or the number [default: list them all].
    #[arg(allow_hyphen_values = true, value_name = "STATUS|FLAGS|OP")]
    pub(crate) what: Option<String>,
    /// What kind of thing it is.
    #[arg(long = "as", value_name = "KIND")]
    pub(crate) kind: Option<ExplainAs>,
    /// Print it as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What can be explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExplainAs {
    /// The status of one item (`GNTST_*`).
    Status,
    /// What a whole hypercall answers.
    Errno,
    /// An operation (`GNTTABOP_*`).
    Op,
    /// The flags of a shared entry (`GTF_*`).
    Entry,
    /// The flags of a mapping (`GNTMAP_*`).
    Map,
    /// The flags of a copy (`GNTCOPY_*`).
    Copy,
    /// What a cache flush is to do (`GNTTAB_CACHE_*`).
    Cache,
}

/// Say how many grant frames and how much maptrack domains will need, and the limits to set.
///
/// From a description of domains and their disks and network interfaces, which a machine file of `gnttab run` is already.
/// The arithmetic is shown. Exit code 1 if a limit that the description has is too low.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab plan --example > plan.toml                 a description to start from
  gnttab plan plan.toml
  gnttab plan machine.toml                          what a machine of `gnttab run` will use at most
  gnttab plan plan.toml --json | jq '.domains[].grant_frames_to_set'")]
pub(crate) struct Plan {
    /// The description.
    #[arg(required_unless_present = "example")]
    pub(crate) description: Option<PathBuf>,
    /// Print a description to start from.
    #[arg(long, exclusive = true)]
    pub(crate) example: bool,
    /// Print it as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Print the completions of this command for a shell.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab completions bash > ~/.local/share/bash-completion/completions/gnttab
  gnttab completions zsh > ~/.zfunc/_gnttab
  gnttab completions fish > ~/.config/fish/completions/gnttab.fish")]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

/// Print the manual page of this command or of a part of it, or write all of them.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab man decode | man -l -
  gnttab man --to /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// The part, as in gnttab PART.
    pub(crate) part: Option<String>,
    /// Write all pages into this folder.
    #[arg(long, value_name = "FOLDER", conflicts_with = "part")]
    pub(crate) to: Option<PathBuf>,
}

fn parse_domain(text: &str) -> Result<u16, String> {
    match text.parse()? {
        super::DomainRef::Id(id) => Ok(id),
        super::DomainRef::Named(_) => Err("a dump knows no names: give a number like 5 or d5".to_owned()),
    }
}
