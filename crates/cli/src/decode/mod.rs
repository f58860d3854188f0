//! `gnttab decode`: grant tables and rings at rest, from a dump or a core.

mod entry;
mod guess;
mod picture;
mod ring;
mod source;

use std::collections::HashMap;

use gnttab_abi::{
    Abi, DomId, ENTRY_V1_SIZE, ENTRY_V2_SIZE, EntryFlags, EntryV1, EntryV2, GrantRef, PAGE_SIZE,
    STATUS_PER_PAGE, STATUS_WORD_SIZE, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE,
};
use gnttab_io::blkif::slot_size;
use gnttab_io::ring::RingShape;
use serde_json::json;

use crate::args::{Decode, DecodeAs, RingAbi};
use crate::failure::Failure;
use crate::output::{self, columns};
use entry::{Decoded, Finding, Severity, State};
use ring::Ring;

/// What the bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    V1,
    V2,
    Status,
    Ring,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::V1 => "v1",
            Kind::V2 => "v2",
            Kind::Status => "status",
            Kind::Ring => "ring",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Kind::V1 => "a table of version 1",
            Kind::V2 => "a table of version 2",
            Kind::Status => "status words of version 2",
            Kind::Ring => "a ring of the block protocol",
        }
    }

    /// Bytes of an entry, and entries of a frame.
    fn entry(self) -> (usize, u32) {
        match self {
            Kind::V1 | Kind::Ring => (ENTRY_V1_SIZE, V1_ENTRIES_PER_PAGE),
            Kind::V2 => (ENTRY_V2_SIZE, V2_ENTRIES_PER_PAGE),
            Kind::Status => (STATUS_WORD_SIZE, STATUS_PER_PAGE),
        }
    }
}

/// Decodes the file.
pub(crate) fn main(args: &Decode) -> Result<(), Failure> {
    let bytes = source::read(args)?;
    let abi = match args.abi {
        RingAbi::X86_64 => Abi::X86_64,
        RingAbi::X86_32 => Abi::X86_32,
        RingAbi::Arm => Abi::Arm,
    };
    // A ring begins at its first page; its length is a power of two of pages.
    let shape = RingShape::new(bytes.len() / PAGE_SIZE, slot_size(abi)).ok();
    let (kind, guess) = match args.kind {
        DecodeAs::V1 => (Kind::V1, None),
        DecodeAs::V2 => (Kind::V2, None),
        DecodeAs::Status => (Kind::Status, None),
        DecodeAs::Ring => (Kind::Ring, None),
        DecodeAs::Guess if args.status.is_some() => (Kind::V2, Some("it has status words".to_owned())),
        DecodeAs::Guess => {
            let (kind, why) = guess::guess(&bytes, shape);
            (kind, Some(why))
        }
    };
    if kind == Kind::Ring {
        return show_ring(args, &bytes, shape, abi, guess);
    }
    let status = args.status.as_deref().map(source::whole).transpose()?;
    if status.is_some() && kind != Kind::V2 {
        return Err(Failure::wrong_use(format!(
            "status words belong to a table of version 2, and this is {}",
            kind.words()
        ))
        .next("give --as v2, or leave --status out"));
    }
    let table = Table::decode(args, kind, &bytes, status.as_deref())?;
    show_table(args, &table, guess)
}

/// A table, or the status words of one.
struct Table {
    kind: Kind,
    entries: Vec<Decoded>,
    /// Bytes behind the last whole entry.
    left: usize,
}

impl Table {
    fn decode(args: &Decode, kind: Kind, bytes: &[u8], status: Option<&[u8]>) -> Result<Table, Failure> {
        let owner = args.owner.map(DomId);
        let (size, per_frame) = kind.entry();
        let first = args.first_frame.saturating_mul(per_frame);
        let words = status.map(|bytes| bytes.as_chunks::<STATUS_WORD_SIZE>().0);
        let status_of = |gref: u32| {
            let word = words?.get(usize::try_from(gref).ok()?)?;
            Some(EntryFlags::from_bits_retain(u16::from_le_bytes(*word)))
        };
        let grefs = first..;
        let mut entries: Vec<Decoded> = match kind {
            Kind::V1 | Kind::Ring => (grefs.zip(bytes.as_chunks().0))
                .map(|(gref, bytes)| entry::v1(GrantRef(gref), EntryV1::from_bytes(*bytes), owner))
                .collect(),
            Kind::V2 => (grefs.zip(bytes.as_chunks().0))
                .map(|(gref, bytes)| {
                    entry::v2(
                        GrantRef(gref),
                        EntryV2::from_bytes(*bytes),
                        status_of(gref),
                        owner,
                    )
                })
                .collect(),
            Kind::Status => (grefs.zip(bytes.as_chunks().0))
                .map(|(gref, bytes)| {
                    entry::status(
                        GrantRef(gref),
                        EntryFlags::from_bits_retain(u16::from_le_bytes(*bytes)),
                    )
                })
                .collect(),
        };
        let Some(last) = entries.last().map(|entry| entry.gref) else {
            return Err(Failure::new(format!(
                "{}: {} bytes are less than an entry of {}, which has {size}",
                args.file.display(),
                bytes.len(),
                kind.words()
            )));
        };
        if status.is_some() && status_of(last).is_none() {
            return Err(Failure::new(format!(
                "the status words end before reference {last:#x}: a table of {} entries needs {} bytes of them",
                u64::from(last) + 1,
                (u64::from(last) + 1) * STATUS_WORD_SIZE as u64
            ))
            .next("give all status frames in one file, from the first"));
        }
        find_shared_frames(&mut entries);
        Ok(Table {
            kind,
            entries,
            left: bytes.len() % size,
        })
    }
}

/// A page that two domains may write is theirs to fight over.
fn find_shared_frames(entries: &mut [Decoded]) {
    let mut writers: HashMap<u64, (u32, u16)> = HashMap::new();
    for entry in entries {
        let (State::Granted | State::SubPage, Some(frame), false) =
            (entry.state, entry.frame, entry.readonly)
        else {
            continue;
        };
        match writers.get(&frame) {
            Some((gref, domid)) if *domid != entry.domid => {
                let text = format!(
                    "frame {frame:#x} is granted to d{domid} for writing too, as reference {gref:#x}"
                );
                entry.find(Severity::Suspicious, "two-writers", text);
            }
            Some(_) => {}
            None => {
                writers.insert(frame, (entry.gref, entry.domid));
            }
        }
    }
}

fn show_table(args: &Decode, table: &Table, guess: Option<String>) -> Result<(), Failure> {
    let entries = &table.entries;
    let count = |is: &dyn Fn(&Decoded) -> bool| entries.iter().filter(|entry| is(entry)).count();
    let wrong = count(&|entry| entry.worst() == Some(Severity::Wrong));
    let suspicious = count(&|entry| entry.worst() == Some(Severity::Suspicious));
    let (live, in_use) = (count(&Decoded::is_live), count(&Decoded::is_in_use));
    if let Some(gref) = args.reference {
        let Some(entry) = entries.iter().find(|entry| entry.gref == gref) else {
            let last = entries.last().map_or(0, |entry| entry.gref);
            return Err(
                Failure::new(format!("reference {gref:#x}: not among these bytes"))
                    .next(format!("they hold {:#x} to {last:#x}", entries[0].gref)),
            );
        };
        if args.json {
            output::json(
                "decode",
                json!({ "kind": table.kind.name(), "guess": guess, "entry": entry }),
            );
        } else {
            let mut text = sentence(entry, table.kind);
            for finding in &entry.findings {
                text.push_str(&format!("\n  {}: {}", finding.severity.name(), finding.text));
            }
            output::line(&text);
        }
        return Ok(());
    }
    let shown = entries.iter().filter(|entry| {
        entry.is_live() || !entry.findings.is_empty() || args.all && entry.state != State::Free
    });
    if args.json {
        let shown: Vec<&Decoded> = shown.collect();
        output::json(
            "decode",
            json!({
                "kind": table.kind.name(), "guess": guess, "first": entries[0].gref, "count": entries.len(),
                "live": live, "in_use": in_use, "wrong": wrong, "suspicious": suspicious,
                "trailing_bytes": table.left, "entries": shown,
            }),
        );
        return Ok(());
    }
    let guessed = guess.map_or_else(String::new, |why| format!(" (guessed: {why})"));
    let mut text = format!("{}: {}{guessed}\n", args.file.display(), table.kind.words());
    let granted = match table.kind {
        Kind::Status => String::new(),
        _ => format!("{live} not free, "),
    };
    text.push_str(&format!(
        "{} entries from {:#x}: {granted}{in_use} in use, {wrong} wrong, {suspicious} suspicious\n",
        entries.len(),
        entries[0].gref
    ));
    if table.left > 0 {
        text.push_str(&format!("{} bytes at the end are no whole entry\n", table.left));
    }
    if args.picture {
        text.push('\n');
        text.push_str(&picture::draw(entries, output::colour_on_stdout()));
        output::line(&text);
        return Ok(());
    }
    let shown: Vec<&Decoded> = shown.collect();
    if !shown.is_empty() {
        text.push('\n');
        let head = ["ref", "to", "flags", "what", "in use", ""].map(str::to_owned);
        let rows = shown.iter().map(|entry| row(entry, table.kind));
        text.push_str(&columns(std::iter::once(head).chain(rows), &[0]));
    }
    text.push_str(&harm(shown.iter().flat_map(|entry| {
        entry
            .findings
            .iter()
            .map(|finding| (format!("{:#x}", entry.gref), finding))
    })));
    output::line(text.trim_end());
    Ok(())
}

/// Findings as a section, or nothing.
fn harm<'a>(findings: impl Iterator<Item = (String, &'a Finding)>) -> String {
    let rows: Vec<[String; 3]> = findings
        .map(|(place, finding)| {
            [
                place,
                finding.severity.name().to_owned(),
                format!("{} ({})", finding.text, finding.code),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\nWrong or suspicious\n{}", columns(rows, &[0]))
}

fn row(entry: &Decoded, kind: Kind) -> [String; 6] {
    let dash = || "-".to_owned();
    [
        format!("{:#x}", entry.gref),
        match kind {
            Kind::Status => dash(),
            _ => DomId(entry.domid).to_string(),
        },
        match kind {
            Kind::Status => dash(),
            _ => entry.flags.clone(),
        },
        what(entry),
        in_use(entry, kind).to_owned(),
        reserved(entry).to_owned(),
    ]
}

fn reserved(entry: &Decoded) -> &'static str {
    entry::reserved_name(entry.gref).unwrap_or("")
}

/// What the entry is about.
fn what(entry: &Decoded) -> String {
    match (entry.frame, entry.trans_domid, entry.trans_gref) {
        (_, Some(domid), Some(gref)) => format!("{gref:#x} of d{domid}"),
        (Some(frame), ..) => match (entry.page_off, entry.length) {
            (Some(page_off), Some(length)) => format!("frame {frame:#x} bytes {page_off}+{length}"),
            _ => format!("frame {frame:#x}"),
        },
        _ => "-".to_owned(),
    }
}

fn in_use(entry: &Decoded, kind: Kind) -> &'static str {
    match (kind, entry.status, entry.reading, entry.writing) {
        (Kind::V2, None, ..) => "?",
        (_, _, _, true) => "write",
        (_, _, true, false) => "read",
        _ => "-",
    }
}

fn sentence(entry: &Decoded, kind: Kind) -> String {
    let place = match entry::reserved_name(entry.gref) {
        Some(name) => format!("reference {:#x} ({name})", entry.gref),
        None => format!("reference {:#x}", entry.gref),
    };
    let used = match in_use(entry, kind) {
        "-" => "not in use".to_owned(),
        "?" => "whether it is in use is in the status words (--status)".to_owned(),
        access => format!("in use, {access}"),
    };
    match (kind, entry.state) {
        (Kind::Status, _) => format!("{place}: {used}"),
        (_, State::Free) => format!("{place}: free"),
        (_, State::LeftOver) => format!(
            "{place}: free, left over from {}: {}; {used}",
            DomId(entry.domid),
            what(entry)
        ),
        _ => format!(
            "{place}: {} to {}, {}; {used}",
            entry.flags,
            DomId(entry.domid),
            what(entry)
        ),
    }
}

fn show_ring(
    args: &Decode,
    bytes: &[u8],
    shape: Option<RingShape>,
    abi: Abi,
    guess: Option<String>,
) -> Result<(), Failure> {
    if args.picture || args.reference.is_some() || args.status.is_some() {
        return Err(Failure::wrong_use(
            "a ring has no entries: --picture, --reference and --status are for tables",
        )
        .next("say what it is with --as"));
    }
    let ring = shape.and_then(|shape| ring::decode(bytes, shape, abi));
    let Some(ring) = ring else {
        return Err(Failure::new(format!(
            "{}: {} bytes are no whole page, which a ring has at least",
            args.file.display(),
            bytes.len()
        )));
    };
    if args.json {
        let mut fields = json!({ "kind": "ring", "guess": guess });
        if let (Some(fields), Ok(serde_json::Value::Object(ring))) =
            (fields.as_object_mut(), serde_json::to_value(&ring))
        {
            fields.extend(ring);
        }
        output::json("decode", fields);
        return Ok(());
    }
    output::line(ring_text(args, &ring, guess).trim_end());
    Ok(())
}

fn ring_text(args: &Decode, ring: &Ring, guess: Option<String>) -> String {
    let guessed = guess.map_or_else(String::new, |why| format!(" (guessed: {why})"));
    let header = ring.header;
    let mut text = format!(
        "{}: {}{guessed}\n{} slots; requests made {:#x}, wake at {:#x}; responses made {:#x}, wake at {:#x}; {} outstanding\n",
        args.file.display(),
        Kind::Ring.words(),
        ring.slots,
        header.req_prod,
        header.req_event,
        header.rsp_prod,
        header.rsp_event,
        ring.outstanding.len(),
    );
    if !ring.outstanding.is_empty() {
        text.push_str("\nOutstanding\n");
        let head = ["request", "id", "what", "references"].map(str::to_owned);
        let rows = ring.outstanding.iter().map(|asked| {
            let grefs: Vec<String> = asked.grefs.iter().map(|gref| format!("{gref:#x}")).collect();
            [
                format!("{:#x}", asked.index),
                format!("{:#x}", asked.id),
                asked.what.clone(),
                grefs.join(" "),
            ]
        });
        text.push_str(&columns(std::iter::once(head).chain(rows), &[0, 1]));
    }
    if args.all && !ring.answered.is_empty() {
        text.push_str("\nAnswered\n");
        let head = ["response", "id", "operation", "status"].map(str::to_owned);
        let rows = ring.answered.iter().map(|answered| {
            [
                format!("{:#x}", answered.index),
                format!("{:#x}", answered.id),
                answered.operation.to_string(),
                answered.status.to_string(),
            ]
        });
        text.push_str(&columns(std::iter::once(head).chain(rows), &[0, 1, 2, 3]));
    }
    text.push_str(&harm(
        ring.findings.iter().map(|finding| (String::new(), finding)),
    ));
    text
}
