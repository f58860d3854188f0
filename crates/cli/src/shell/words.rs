//! What people type: a domain, then what it is to do.

use gnttab_abi::{GrantHandle, GrantRef};

use super::world::Place;

/// Every command of a domain, for help and completion.
pub(crate) const DOMAIN_COMMANDS: [(&str, &str, &str); 11] = [
    (
        "grant",
        "TO [read] [part OFFSET LENGTH]",
        "grant a fresh page, or a part of it (version 2)",
    ),
    (
        "end",
        "REF [force]",
        "end access; refused while a peer has it, unless forced",
    ),
    ("map", "OF REF [read]", "map another's page: gives a handle"),
    ("unmap", "HANDLE", "undo a mapping"),
    (
        "read",
        "REF|HANDLE [OFFSET [LENGTH]]",
        "read the own page behind a reference, or a mapped one",
    ),
    ("write", "REF|HANDLE [@OFFSET] TEXT", "write to it"),
    (
        "copy",
        "OF REF [OFFSET [LENGTH]]",
        "have the hypervisor copy from another's page, without mapping it",
    ),
    ("accept", "FROM", "wait for a page that another gives away"),
    ("transfer", "TO REF", "give a fresh page away"),
    ("version", "1|2", "switch the version of the own table"),
    ("kill", "", "die at once, with all that is mapped"),
];

/// The other commands.
pub(crate) const COMMANDS: [(&str, &str, &str); 5] = [
    ("domains", "", "the domains there are"),
    ("add", "NAME", "one domain more"),
    ("show", "DOMAIN [REF]", "what a domain has, or one entry"),
    ("help", "", "this"),
    ("quit", "", "end (or Ctrl-D)"),
];

/// A line, understood. Domains are still as they were typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    Nothing,
    Domains,
    Help,
    Quit,
    Add(&'a str),
    Show(&'a str, Option<GrantRef>),
    /// A domain is to do something.
    Do(&'a str, Act<'a>),
}

/// What a domain is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Act<'a> {
    Grant {
        to: &'a str,
        readonly: bool,
        part: Option<(u16, u16)>,
    },
    End {
        gref: GrantRef,
        force: bool,
    },
    Map {
        of: &'a str,
        gref: GrantRef,
        readonly: bool,
    },
    Unmap(GrantHandle),
    Read(Place, usize, usize),
    Write(Place, usize, &'a str),
    Copy {
        of: &'a str,
        gref: GrantRef,
        offset: u16,
        len: u16,
    },
    Accept(&'a str),
    Transfer {
        to: &'a str,
        gref: GrantRef,
    },
    Version(u32),
    Kill,
}

/// Bytes that are read when nothing is said.
const SOME: u16 = 32;

/// Understands a line, or says in one sentence what is wrong with it.
pub(crate) fn parse(line: &str) -> Result<Line<'_>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(Line::Nothing);
    }
    let mut words = Words(line);
    let first = words.next("a command")?;
    let parsed = match first {
        "domains" => Line::Domains,
        "help" | "?" => Line::Help,
        "quit" | "exit" => Line::Quit,
        "add" => Line::Add(words.next("a name")?),
        "show" => Line::Show(words.next("a domain")?, words.maybe().map(gref).transpose()?),
        domain => {
            let Some(verb) = words.maybe() else {
                return Err(format!(
                    "'{domain}' is no command; after a domain goes what it is to do (help)"
                ));
            };
            Line::Do(domain, act(verb, &mut words)?)
        }
    };
    match words.maybe() {
        Some(word) => Err(format!("'{word}' is too much")),
        None => Ok(parsed),
    }
}

fn act<'a>(verb: &str, words: &mut Words<'a>) -> Result<Act<'a>, String> {
    Ok(match verb {
        "grant" => {
            let to = words.next("the domain to grant to")?;
            let readonly = words.take("read");
            let part = if words.take("part") {
                let (offset, len) = (words.next("the part's offset")?, words.next("the part's length")?);
                Some((small(offset)?, small(len)?))
            } else {
                None
            };
            Act::Grant { to, readonly, part }
        }
        "end" => Act::End {
            gref: gref(words.next("a reference")?)?,
            force: words.take("force"),
        },
        "map" => Act::Map {
            of: words.next("the domain that granted it")?,
            gref: gref(words.next("a reference")?)?,
            readonly: words.take("read"),
        },
        "unmap" => Act::Unmap(handle(words.next("a handle")?)?),
        "read" => {
            let place = place(words.next("a reference or a handle")?)?;
            let offset = words.maybe().map(small).transpose()?.unwrap_or(0);
            let len = words.maybe().map(small).transpose()?.unwrap_or(SOME);
            Act::Read(place, offset.into(), len.into())
        }
        "write" => {
            let place = place(words.next("a reference or a handle")?)?;
            let offset = match words.peek().and_then(|word| word.strip_prefix('@')) {
                Some(offset) => {
                    words.maybe();
                    small(offset)?
                }
                None => 0,
            };
            let text = std::mem::take(&mut words.0).trim();
            if text.is_empty() {
                return Err("what is to be written?".to_owned());
            }
            Act::Write(place, offset.into(), text)
        }
        "copy" => Act::Copy {
            of: words.next("the domain that granted it")?,
            gref: gref(words.next("a reference")?)?,
            offset: words.maybe().map(small).transpose()?.unwrap_or(0),
            len: words.maybe().map(small).transpose()?.unwrap_or(SOME),
        },
        "accept" => Act::Accept(words.next("the domain that gives")?),
        "transfer" => Act::Transfer {
            to: words.next("the domain to give to")?,
            gref: gref(words.next("its reference")?)?,
        },
        "version" => Act::Version(small(words.next("1 or 2")?)?.into()),
        "kill" => Act::Kill,
        _ => return Err(format!("'{verb}' is nothing that a domain can do (help)")),
    })
}

struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.0.split_whitespace().next()
    }

    fn maybe(&mut self) -> Option<&'a str> {
        let word = self.peek()?;
        self.0 = &self.0.trim_start()[word.len()..];
        Some(word)
    }

    fn next(&mut self, what: &str) -> Result<&'a str, String> {
        self.maybe().ok_or_else(|| format!("missing: {what}"))
    }

    fn take(&mut self, wanted: &str) -> bool {
        let is_it = self.peek() == Some(wanted);
        if is_it {
            self.maybe();
        }
        is_it
    }
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn gref(text: &str) -> Result<GrantRef, String> {
    let wrong = || format!("'{text}' is no reference: a number like 0x8");
    number(text).map(GrantRef).ok_or_else(wrong)
}

fn handle(text: &str) -> Result<GrantHandle, String> {
    let wrong = || format!("'{text}' is no handle: h and a number, like h0");
    let number = text.strip_prefix('h').and_then(number);
    number.map(GrantHandle).ok_or_else(wrong)
}

fn place(text: &str) -> Result<Place, String> {
    if text.starts_with('h') {
        handle(text).map(Place::Mapped)
    } else {
        gref(text).map(Place::Own)
    }
}

fn small(text: &str) -> Result<u16, String> {
    number(text)
        .and_then(|number| u16::try_from(number).ok())
        .ok_or_else(|| format!("'{text}' is no number from 0 to 65535"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_understood() {
        let own = Place::Own(GrantRef(8));
        for (line, expected) in [
            ("", Line::Nothing),
            ("# note", Line::Nothing),
            ("domains", Line::Domains),
            ("show d1 0x8", Line::Show("d1", Some(GrantRef(8)))),
            (
                "d1 grant d2 read part 100 0x32",
                Line::Do(
                    "d1",
                    Act::Grant {
                        to: "d2",
                        readonly: true,
                        part: Some((100, 50)),
                    },
                ),
            ),
            (
                "d1 write 8 @4  two words ",
                Line::Do("d1", Act::Write(own, 4, "two words")),
            ),
            (
                "app read h3 1 2",
                Line::Do("app", Act::Read(Place::Mapped(GrantHandle(3)), 1, 2)),
            ),
            ("2 kill", Line::Do("2", Act::Kill)),
        ] {
            assert_eq!(parse(line), Ok(expected), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, word) in [
            ("fly", "no command"),
            ("d1 fly", "'fly'"),
            ("d1 map d2", "missing: a reference"),
            ("d1 unmap 8", "'8' is no handle"),
            ("d1 end 0xg", "'0xg'"),
            ("d1 kill now", "'now' is too much"),
            ("d1 read 8 70000", "70000"),
            ("d1 write 8 @9", "what is to be written"),
        ] {
            let wrong = parse(line).unwrap_err();
            assert!(wrong.contains(word), "{line}: {wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "\\PC*|(d1|h|0x|@|grant|write| )*") {
            let _ = parse(&line);
        }
    }
}
