//! `gnttab explain`: what a status, an error, an operation or a flag word means.

mod words;

use gnttab_abi::{CacheOp, CopyFlags, EntryFlags, EntryType, Errno, GrantStatus, MapFlags, Op};
use serde::Serialize;
use serde_json::json;

use crate::args::{Explain, ExplainAs};
use crate::failure::Failure;
use crate::output::{self, columns};
use words::{CACHE_FLAGS, COPY_FLAGS, ENTRY_FLAGS, ENTRY_TYPES, Flag, MAP_FLAGS, TRANSFER_FLAGS, Words};

/// One thing, explained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Explanation {
    /// What kind of thing.
    kind: &'static str,
    /// Its name, and its number where it has one.
    title: String,
    /// The number, flags as their word.
    value: i64,
    means: String,
    /// Usual causes, or what else to know.
    causes: Vec<&'static str>,
    /// The parts of a flag word.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parts: Vec<Part>,
}

/// A part of a flag word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Part {
    bits: u32,
    name: String,
    means: &'static str,
}

/// Explains it.
pub(crate) fn main(args: &Explain) -> Result<(), Failure> {
    let Some(what) = &args.what else {
        return list(args);
    };
    let found = look_up(what, args.kind);
    if found.is_empty() {
        return Err(Failure::wrong_use(format!("'{what}' is {}", nothing(args.kind)))
            .next("gnttab explain lists what there is"));
    }
    if args.json {
        output::json("explain", json!({ "asked": what, "explanations": found }));
        return Ok(());
    }
    let texts: Vec<String> = found.iter().map(text).collect();
    output::line(texts.join("\n").trim_end());
    Ok(())
}

fn nothing(kind: Option<ExplainAs>) -> &'static str {
    match kind {
        None => "no status, error, operation or flag of grant tables",
        Some(ExplainAs::Status) => "no status",
        Some(ExplainAs::Errno) => "no error that a hypercall answers",
        Some(ExplainAs::Op) => "no operation",
        Some(ExplainAs::Entry) => "no flag word of an entry: 16 bits, or names joined by |",
        Some(ExplainAs::Map) => "no flag word of a mapping: 32 bits, or names joined by |",
        Some(ExplainAs::Copy) => "no flag word of a copy: 16 bits, or names joined by |",
        Some(ExplainAs::Cache) => "no flag word of a cache flush: 32 bits, or names joined by |",
    }
}

fn list(args: &Explain) -> Result<(), Failure> {
    let is_wanted = |kind| args.kind.is_none_or(|wanted| wanted == kind);
    let mut all = Vec::new();
    if is_wanted(ExplainAs::Status) {
        all.extend(GrantStatus::ALL.iter().filter_map(|known| status(*known)));
    }
    if is_wanted(ExplainAs::Errno) {
        all.extend(Errno::ALL.iter().map(|known| errno(*known)));
    }
    if is_wanted(ExplainAs::Op) {
        all.extend(Op::ALL.iter().map(|known| op(*known)));
    }
    let flags: [(ExplainAs, &'static str, &[Flag]); 6] = [
        (ExplainAs::Entry, "type of an entry", &ENTRY_TYPES),
        (ExplainAs::Entry, "flag of an entry", &ENTRY_FLAGS),
        (ExplainAs::Entry, "flag of an entry", &TRANSFER_FLAGS),
        (ExplainAs::Map, "flag of a mapping", &MAP_FLAGS),
        (ExplainAs::Copy, "flag of a copy", &COPY_FLAGS),
        (ExplainAs::Cache, "flag of a cache flush", &CACHE_FLAGS),
    ];
    for (_, kind, flags) in flags.into_iter().filter(|(wanted, ..)| is_wanted(*wanted)) {
        all.extend(flags.iter().map(|(bits, name, means)| Explanation {
            kind,
            title: format!("{name} ({bits:#x})"),
            value: (*bits).into(),
            means: (*means).to_owned(),
            causes: Vec::new(),
            parts: Vec::new(),
        }));
    }
    if args.json {
        output::json("explain", json!({ "asked": null, "explanations": all }));
        return Ok(());
    }
    let rows = all.iter().map(|one| {
        // The first sentence.
        let (first, _) = one.means.split_once(". ").unwrap_or((&one.means, ""));
        [
            one.kind.to_owned(),
            one.title.clone(),
            first.trim_end_matches('.').to_owned(),
        ]
    });
    output::line(columns(rows, &[]).trim_end());
    Ok(())
}

/// Everything that the words or the number can be, likeliest first.
fn look_up(what: &str, kind: Option<ExplainAs>) -> Vec<Explanation> {
    let is_wanted = |one| kind.is_none_or(|wanted| wanted == one);
    let number = number(what);
    let name = plain(what);
    let mut found = Vec::new();
    if is_wanted(ExplainAs::Status) {
        let by_name = GrantStatus::ALL.iter().find(|known| known.name() == Some(&name));
        // A status is negative or zero; people leave the sign out. A word of bits in hexadecimal is none.
        let by_number = number
            .filter(|_| kind.is_some() || !what.starts_with("0x"))
            .and_then(|number| i16::try_from(-number.abs()).ok());
        let given = by_name.copied().or(by_number.map(GrantStatus));
        found.extend(given.and_then(status));
    }
    if is_wanted(ExplainAs::Errno) {
        let by_name = Errno::ALL
            .iter()
            .find(|known| known.name().eq_ignore_ascii_case(what.trim_start_matches('-')));
        let by_number = number
            .filter(|number| *number < 0 || kind.is_some())
            .and_then(|number| u16::try_from(number.abs()).ok())
            .and_then(Errno::from_number);
        found.extend(by_name.copied().or(by_number).map(errno));
    }
    if is_wanted(ExplainAs::Op) {
        let by_name = Op::ALL.into_iter().find(|known| known.name() == name);
        let short = match &*name {
            "map" => Some(Op::MapGrantRef),
            "unmap" => Some(Op::UnmapGrantRef),
            "swap" => Some(Op::SwapGrantRef),
            _ => None,
        };
        let by_number = number
            .filter(|_| kind.is_some())
            .and_then(|number| u32::try_from(number).ok())
            .and_then(Op::from_number);
        found.extend(by_name.or(short).or(by_number).map(op));
    }
    let word = number.and_then(|number| u32::try_from(number).ok());
    for (one, explain) in [
        (ExplainAs::Entry, entry_flags as fn(u32) -> Option<Explanation>),
        (ExplainAs::Map, map_flags),
        (ExplainAs::Copy, copy_flags),
        (ExplainAs::Cache, cache_flags),
    ] {
        if !is_wanted(one) {
            continue;
        }
        let given = match word {
            // A small decimal number is hardly a flag word, unless it is said to be one.
            Some(word) if kind.is_some() || what.starts_with("0x") => Some(word),
            Some(_) => None,
            None => from_names(what, one),
        };
        // Of bits that a kind does not have, nothing can be said.
        let given = given.filter(|word| kind.is_some() || word & !known(one) == 0);
        found.extend(given.and_then(explain));
    }
    found
}

/// A name as the program writes it: small letters, no prefix of a header.
fn plain(what: &str) -> String {
    let mut name = what.to_ascii_lowercase();
    for prefix in [
        "gntst_",
        "gnttabop_",
        "gtf_",
        "gntmap_",
        "gntcopy_",
        "gnttab_cache_",
    ] {
        if let Some(rest) = name.strip_prefix(prefix) {
            name = rest.to_owned();
            break;
        }
    }
    // The header's own spelling.
    if name == "generr" {
        "general_error".to_owned()
    } else {
        name
    }
}

/// `-3`, `3`, `0x19`; at most 32 bits.
fn number(what: &str) -> Option<i64> {
    match what.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok().map(i64::from),
        None => what
            .parse()
            .ok()
            .filter(|number: &i64| number.unsigned_abs() <= u32::MAX.into()),
    }
}

/// Every bit that a kind of flag word gives a meaning.
fn known(kind: ExplainAs) -> u32 {
    let bits = |flags: &[Flag]| flags.iter().fold(0, |all, (bits, ..)| all | bits);
    match kind {
        // Unused bits of an entry are the findings of people who look at tables.
        ExplainAs::Entry => 0xffff,
        ExplainAs::Map => bits(&MAP_FLAGS) | MapFlags::GUEST_AVAIL_MASK.bits(),
        ExplainAs::Copy => bits(&COPY_FLAGS),
        ExplainAs::Cache => bits(&CACHE_FLAGS),
        ExplainAs::Status | ExplainAs::Errno | ExplainAs::Op => 0,
    }
}

/// The word of names joined by bars, each of which the kind must have.
fn from_names(what: &str, kind: ExplainAs) -> Option<u32> {
    let flags: Vec<&Flag> = match kind {
        ExplainAs::Entry => ENTRY_TYPES
            .iter()
            .chain(&ENTRY_FLAGS)
            .chain(&TRANSFER_FLAGS)
            .collect(),
        ExplainAs::Map => MAP_FLAGS.iter().collect(),
        ExplainAs::Copy => COPY_FLAGS.iter().collect(),
        ExplainAs::Cache => CACHE_FLAGS.iter().collect(),
        ExplainAs::Status | ExplainAs::Errno | ExplainAs::Op => return None,
    };
    // A header's prefix says of which kind a name is.
    let prefix = match kind {
        ExplainAs::Entry => "GTF_",
        ExplainAs::Map => "GNTMAP_",
        ExplainAs::Copy => "GNTCOPY_",
        _ => "GNTTAB_CACHE_",
    };
    let mut word = 0;
    for name in what.split('|') {
        let name = name.trim();
        let has_other_prefix = name
            .split_once('_')
            .is_some_and(|(start, _)| matches!(start, "GTF" | "GNTMAP" | "GNTCOPY" | "GNTTAB"))
            && !name.starts_with(prefix);
        if has_other_prefix {
            return None;
        }
        let plain = plain(name);
        let (bits, ..) = flags
            .iter()
            .find(|(_, known, _)| known.eq_ignore_ascii_case(&plain))?;
        word |= bits;
    }
    Some(word)
}

fn status(status: GrantStatus) -> Option<Explanation> {
    let Words { means, causes } = words::status(status)?;
    let message = status.message().unwrap_or_default();
    Some(Explanation {
        kind: "status",
        title: status.to_string(),
        value: status.0.into(),
        means: format!("{means} Xen's own message: \"{message}\"."),
        causes: causes.to_vec(),
        parts: Vec::new(),
    })
}

fn errno(errno: Errno) -> Explanation {
    let Words { means, causes } = words::errno(errno);
    Explanation {
        kind: "hypercall error",
        title: errno.to_string(),
        value: errno.hypercall_result(),
        means: means.to_owned(),
        causes: causes.to_vec(),
        parts: Vec::new(),
    }
}

fn op(op: Op) -> Explanation {
    let Words { means, causes } = words::op(op);
    Explanation {
        kind: "operation",
        title: format!("{op} (operation {})", op.number()),
        value: op.number().into(),
        means: means.to_owned(),
        causes: causes.to_vec(),
        parts: Vec::new(),
    }
}

/// The parts of a word, and one for the bits that have no name.
fn parts(word: u32, flags: &[Flag], rest: &'static str) -> Vec<Part> {
    let part = |(bits, name, means): &Flag| Part {
        bits: *bits,
        name: (*name).to_owned(),
        means,
    };
    let mut parts: Vec<Part> = flags
        .iter()
        .filter(|(bits, ..)| word & bits != 0)
        .map(part)
        .collect();
    let left = flags.iter().fold(word, |word, (bits, ..)| word & !bits);
    if left != 0 {
        parts.push(Part {
            bits: left,
            name: format!("{left:#x}"),
            means: rest,
        });
    }
    parts
}

fn entry_flags(word: u32) -> Option<Explanation> {
    let bits = u16::try_from(word).ok()?;
    let flags = EntryFlags::from_bits_retain(bits);
    let (type_bits, name, type_means) = ENTRY_TYPES[usize::from(bits & 3)];
    let mut of_type = vec![Part {
        bits: type_bits,
        name: name.to_owned(),
        means: type_means,
    }];
    let rest = word & !3;
    let unused = "unused bits: map and copy ignore them, a transfer fails";
    of_type.extend(match flags.kind() {
        EntryType::AcceptTransfer => parts(
            rest,
            &TRANSFER_FLAGS,
            "bits that a waiting entry may not have: no transfer can come",
        ),
        _ => parts(rest, &ENTRY_FLAGS, unused),
    });
    let means = match (flags.kind(), flags.intersects(EntryFlags::IN_USE)) {
        (EntryType::Invalid, false) => "The flags of a free entry.",
        (EntryType::Invalid, true) => {
            "An entry that was ended while a peer had it: its reference must not be used again before the marks are gone. Of a version 2 status word: in use."
        }
        (EntryType::AcceptTransfer, _) if bits & !0xe != 0 => {
            "An entry that waits for a transfer which cannot come."
        }
        (EntryType::AcceptTransfer, _) => "An entry for a transfer.",
        (_, true) => {
            "A grant that a peer is using (in version 1; in version 2 these marks are in the status word)."
        }
        (_, false) => "A grant that nobody is using (in version 2 that is said by the status word).",
    };
    Some(Explanation {
        kind: "flags of an entry",
        title: format!("{flags} ({bits:#06x})"),
        value: bits.into(),
        means: means.to_owned(),
        causes: Vec::new(),
        parts: of_type,
    })
}

fn map_flags(word: u32) -> Option<Explanation> {
    let flags = MapFlags::from_bits_retain(word);
    let means = if flags.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
        "How a page is to be mapped."
    } else {
        "Neither host_map nor device_map: such a map answers bad_gntref (-3)."
    };
    Some(Explanation {
        kind: "flags of a mapping",
        title: format!("{flags} ({word:#x})"),
        value: word.into(),
        means: means.to_owned(),
        causes: Vec::new(),
        parts: parts(
            word,
            &MAP_FLAGS,
            "bits 16 to 18 go into a PV guest's page table, the others are ignored; HVM and Arm guests are refused any",
        ),
    })
}

fn copy_flags(word: u32) -> Option<Explanation> {
    let bits = u16::try_from(word).ok()?;
    Some(Explanation {
        kind: "flags of a copy",
        title: format!("{} ({bits:#x})", CopyFlags::from_bits_retain(bits)),
        value: bits.into(),
        means: "Which sides of a copy are references.".to_owned(),
        causes: Vec::new(),
        parts: parts(word, &COPY_FLAGS, "unknown bits are ignored"),
    })
}

fn cache_flags(word: u32) -> Option<Explanation> {
    Some(Explanation {
        kind: "flags of a cache flush",
        title: format!("{} ({word:#x})", CacheOp::from_bits_retain(word)),
        value: word.into(),
        means: "What is to be done with the caches.".to_owned(),
        causes: Vec::new(),
        parts: parts(word, &CACHE_FLAGS, "unknown bits: -EINVAL"),
    })
}

fn text(one: &Explanation) -> String {
    let mut text = format!("{}: {}\n", one.kind, one.title);
    text.push_str(&format!("  {}\n", one.means));
    if !one.parts.is_empty() {
        let rows = one.parts.iter().map(|part| {
            [
                format!("{:#x}", part.bits),
                part.name.clone(),
                part.means.to_owned(),
            ]
        });
        text.push_str(&columns(rows, &[0]));
    }
    if !one.causes.is_empty() {
        text.push_str(match one.kind {
            "operation" => "  To know\n",
            _ => "  Usual causes\n",
        });
        for cause in &one.causes {
            text.push_str(&format!("    - {cause}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titles(what: &str, kind: Option<ExplainAs>) -> Vec<String> {
        look_up(what, kind).into_iter().map(|one| one.title).collect()
    }

    #[test]
    fn names_are_found_however_they_are_written() {
        for what in ["-3", "3", "bad_gntref", "GNTST_bad_gntref", "BAD_GNTREF"] {
            let found = titles(what, None);
            assert_eq!(
                found.first().map(String::as_str),
                Some("bad_gntref (-3)"),
                "{what}"
            );
        }
        assert_eq!(titles("ENOSYS", None), ["-ENOSYS (-38)"]);
        assert_eq!(titles("-enosys", None), ["-ENOSYS (-38)"]);
        assert_eq!(
            titles("GNTTABOP_map_grant_ref", None),
            ["map_grant_ref (operation 0)"]
        );
        assert_eq!(titles("5", Some(ExplainAs::Op)), ["copy (operation 5)"]);
        assert_eq!(
            titles("GNTMAP_host_map|GNTMAP_readonly", None),
            ["host_map|readonly (0x6)"]
        );
        assert_eq!(
            titles("GTF_permit_access|GTF_readonly", None),
            ["permit_access|readonly (0x0005)"]
        );
    }

    #[test]
    fn a_number_that_can_be_several_things_is_each() {
        assert_eq!(titles("-12", None), ["eagain (-12)", "-ENOMEM (-12)"]);
        let found = titles("0x3", None);
        assert_eq!(
            found,
            [
                "transitive (0x0003)",
                "device_map|host_map (0x3)",
                "source_gref|dest_gref (0x3)",
                "clean|inval (0x3)"
            ]
        );
        assert_eq!(
            titles("0x19", Some(ExplainAs::Entry)),
            ["permit_access|reading|writing (0x0019)"]
        );
    }

    #[test]
    fn what_is_none_is_not_explained() {
        for what in [
            "",
            "nonsense",
            "-99",
            "|",
            "host_map|nonsense",
            "0x",
            "0x1ffffffff",
            "99999999999999999999",
        ] {
            assert_eq!(titles(what, None), [""; 0], "{what}");
        }
        assert_eq!(titles("0x10000", Some(ExplainAs::Entry)), [""; 0]);
        assert_eq!(titles("bad_gntref", Some(ExplainAs::Op)), [""; 0]);
    }

    #[test]
    fn bits_without_a_name_are_said() {
        let [entry] = &look_up("0x8001", Some(ExplainAs::Entry))[..] else {
            panic!()
        };
        assert_eq!(entry.parts.last().map(|part| part.bits), Some(0x8000));
    }
}
