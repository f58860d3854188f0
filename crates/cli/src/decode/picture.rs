//! A table in blocks: a mark an entry, 64 a line.

use std::fmt::Write as _;

use super::entry::{Decoded, Severity, State};

/// Entries on a line.
const WIDTH: usize = 64;

/// What the marks mean.
const LEGEND: &str = "\
  · free   ░ granted, read   ▒ granted, write   ▓ in use, read   █ in use, write
  p part of a page   t transitive   x transfer   ! wrong   ? suspicious";

/// One mark for an entry; harm goes first, but that of the kinds that have letters, which is their nature.
fn mark(entry: &Decoded) -> char {
    let is_of_kind = |code| matches!(code, "copy-only" | "no-mapping");
    let worst = entry
        .findings
        .iter()
        .filter(|finding| !is_of_kind(finding.code))
        .map(|finding| finding.severity)
        .min();
    match (worst, entry.state) {
        (Some(Severity::Wrong), _) => '!',
        (Some(Severity::Suspicious), _) => '?',
        (None, State::Free | State::LeftOver) => '·',
        (None, State::SubPage) => 'p',
        (None, State::Transitive) => 't',
        (None, State::Transfer) => 'x',
        (None, State::Granted | State::Invalid) if entry.writing => '█',
        (None, State::Granted | State::Invalid) if entry.reading => '▓',
        (None, State::Granted | State::Invalid) if entry.readonly => '░',
        (None, State::Granted | State::Invalid) => '▒',
    }
}

fn colour(mark: char) -> Option<&'static str> {
    match mark {
        '!' => Some("31"),
        '?' => Some("33"),
        '·' => Some("2"),
        '▓' | '█' => Some("32"),
        _ => None,
    }
}

/// The picture; runs of lines that are free throughout are one line.
pub(crate) fn draw(entries: &[Decoded], in_colour: bool) -> String {
    let mut text = String::new();
    let mut free = 0;
    let say_free = |text: &mut String, lines: usize| {
        if lines > 0 {
            // Writing to a string does not fail.
            let _ = writeln!(text, "           {} free", lines * WIDTH);
        }
    };
    for line in entries.chunks(WIDTH) {
        if line.iter().all(|entry| mark(entry) == '·') && line.len() == WIDTH {
            free += 1;
            continue;
        }
        say_free(&mut text, std::mem::take(&mut free));
        let _ = write!(text, "{:#8x}  ", line[0].gref);
        for (at, entry) in line.iter().enumerate() {
            let mark = mark(entry);
            if at > 0 && at % 16 == 0 {
                text.push(' ');
            }
            match colour(mark).filter(|_| in_colour) {
                Some(colour) => {
                    let _ = write!(text, "\x1b[{colour}m{mark}\x1b[0m");
                }
                None => text.push(mark),
            }
        }
        text.push('\n');
    }
    say_free(&mut text, free);
    text.push_str(LEGEND);
    text
}

#[cfg(test)]
mod tests {
    use gnttab_abi::{DomId, EntryFlags, EntryHead, EntryV1, GrantRef};

    use super::super::entry::v1;
    use super::*;

    #[test]
    fn each_entry_has_its_mark_and_free_lines_are_one() {
        let entries: Vec<Decoded> = (0..320)
            .map(|gref| {
                let flags = match gref {
                    8 => 0x1,
                    9 => 0x5,
                    10 => 0x9,
                    11 => 0x19,
                    12 => 0x3,
                    13 => 0xe,
                    14 => 0x8001,
                    _ => 0,
                };
                let head = EntryHead {
                    flags: EntryFlags::from_bits_retain(flags),
                    domid: DomId(if flags == 0 { 0 } else { 2 }),
                };
                let frame = if flags == 0 { 0 } else { 7 };
                v1(GrantRef(gref), EntryV1 { head, frame }, None)
            })
            .collect();
        let picture = draw(&entries, false);
        let lines: Vec<&str> = picture.lines().collect();
        let rest = "·".repeat(16);
        assert_eq!(
            lines[0],
            format!("     0x0  ········▒░▓█!x?· {rest} {rest} {rest}")
        );
        assert_eq!(lines[1].trim(), "256 free");
        assert!(draw(&entries, true).contains("\x1b[31m!\x1b[0m"));
    }
}
