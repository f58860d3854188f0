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
    Shell(Shell),
    Grant(GrantOne),
    Map(MapOne),
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
            AtRest::Shell(_) => "shell",
            AtRest::Grant(_) => "grant",
            AtRest::Map(_) => "map",
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
            AtRest::Shell(shell) => shell.json,
            AtRest::Grant(grant) => grant.json,
            AtRest::Map(map) => map.json,
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

/// Grant, map, read, write, copy, unmap, end, transfer by hand, between domains that do what they are told.
///
/// Each step shows the entry's words before and after. The domains are in memory, or join a machine that was started with
/// `gnttab run --join`. At a terminal there are history and completion; a script says the same, a line a step.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab shell                                      two domains in memory: d1 and d2
  echo 'd1 grant d2' | gnttab shell                 a script on standard input
  gnttab shell --script order.txt --json
  gnttab shell --running                            domains that join the machine that runs")]
pub(crate) struct Shell {
    /// Do what is in this file, and end.
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// How many domains there are to begin with.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=16))]
    pub(crate) domains: u16,
    /// Join a running machine, started with `gnttab run --join`.
    #[arg(long)]
    pub(crate) running: bool,
    /// Its control socket [default: the only one there is].
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Print each step as JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Join a running machine, grant a page, print domain and reference, and wait to be told to end access.
///
/// The machine is one of `gnttab run --join`. With `gnttab map` in another terminal every order of release can be tried:
/// Enter ends access, `quit` dies at once. Access that a peer still has is pending until it lets go.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab grant d4                                   prints, say: d3 0x8
  gnttab grant app --read --text 'hello'")]
pub(crate) struct GrantOne {
    /// To whom: 5, d5, or a name; one that does not exist yet may join later.
    pub(crate) to: super::DomainRef,
    /// For reading alone.
    #[arg(long)]
    pub(crate) read: bool,
    /// What to write into the page first.
    #[arg(long)]
    pub(crate) text: Option<String>,
    /// What the domain that joins is called.
    #[arg(long, default_value = "granter")]
    pub(crate) name: String,
    /// The running machine's control socket [default: the only one there is].
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Print what happens as JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Join a running machine, map a page that was granted, and wait to be told to unmap.
///
/// The other half of `gnttab grant`. Without a domain and a reference it prints its own number, for the granter to
/// name, and asks for them on standard input.
#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  gnttab map                                        prints, say: d4, and asks what to map
  gnttab map d3 0x8
  gnttab map d3 0x8 --read")]
pub(crate) struct MapOne {
    /// Who granted it: 5, d5, or a name.
    #[arg(requires = "reference")]
    pub(crate) of: Option<super::DomainRef>,
    /// The reference (0x12 or 18).
    #[arg(value_parser = parse_reference)]
    pub(crate) reference: Option<u32>,
    /// For reading alone: what a read-only grant needs.
    #[arg(long)]
    pub(crate) read: bool,
    /// What the domain that joins is called.
    #[arg(long, default_value = "grantee")]
    pub(crate) name: String,
    /// The running machine's control socket [default: the only one there is].
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Print what happens as JSON, one object a line.
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
