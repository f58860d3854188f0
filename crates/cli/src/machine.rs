//! The machine file: domains, their limits, their disks and their programs, as TOML.
//!
//! Having a [`Machine`] tells you: the file was well-formed, every name is there once and every name it refers to exists,
//! every number is within its range. It does not tell you that images and programs exist, or that there is memory enough.
//! Whatever is wrong is said with the file's line.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use crate::failure::Failure;
use crate::roles::Sharing;

/// A working machine file, with every key explained.
pub(crate) const EXAMPLE: &str = include_str!("../machine.toml");

/// A whole machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Machine {
    /// Its domains, in the order they start; the first gets domain id 1.
    #[serde(default, rename = "domain")]
    pub(crate) domains: Vec<Domain>,
    /// Disks between them.
    #[serde(default, rename = "disk")]
    pub(crate) disks: Vec<Disk>,
}

/// One domain.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Domain {
    /// Its name, by which disks refer to it.
    pub(crate) name: Spanned<Name>,
    /// Its memory.
    #[serde(default)]
    pub(crate) memory: Memory,
    /// Its virtual processors.
    #[serde(default)]
    pub(crate) vcpus: Bounded<1, 16, 1>,
    /// The most grant-table frames it may have.
    #[serde(default)]
    pub(crate) grant_frames: Bounded<1, 1024, 64>,
    /// The most maptrack frames it may have: they hold the handles of what it maps.
    #[serde(default)]
    pub(crate) maptrack_frames: Bounded<1, 4096, 1024>,
    /// The highest grant-table version it may set.
    #[serde(default)]
    pub(crate) max_grant_version: Bounded<1, 2, 2>,
    /// A program to start in it, and its arguments; without one it serves and exports its disks. A relative path starts at
    /// the machine file's folder.
    #[serde(default, deserialize_with = "program")]
    pub(crate) program: Option<(PathBuf, Vec<String>)>,
}

/// One disk from one domain to another.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Disk {
    /// The image; a relative path starts at the machine file's folder.
    pub(crate) image: Spanned<PathBuf>,
    /// The domain that serves it.
    pub(crate) backend: Spanned<Name>,
    /// The domain that uses it.
    pub(crate) frontend: Spanned<Name>,
    /// No writes.
    #[serde(default)]
    pub(crate) read_only: bool,
    /// Rings, each with a thread on both sides.
    #[serde(default)]
    pub(crate) queues: Bounded<1, 16, 1>,
    /// Each ring is 2^n pages.
    #[serde(default)]
    pub(crate) ring_order: Bounded<0, 4, 0>,
    /// How the backend reaches the frontend's pages.
    #[serde(default)]
    pub(crate) sharing: Sharing,
    /// A Unix socket where a frontend without a program exports the disk as NBD; a relative path starts at the machine
    /// file's folder.
    #[serde(default)]
    pub(crate) socket: Option<Spanned<PathBuf>>,
    /// The same on a port of 127.0.0.1.
    #[serde(default)]
    pub(crate) port: Option<Spanned<u16>>,
}

fn program<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<(PathBuf, Vec<String>)>, D::Error> {
    let mut words = Vec::<String>::deserialize(deserializer)?;
    if words.is_empty() {
        return Err(de::Error::custom("give the program's path, then its arguments"));
    }
    Ok(Some((words.remove(0).into(), words)))
}

/// The name of a domain: letters, digits, `-`, `_` and `.`, at most 63 of them, the first a letter; and not what a domain
/// id looks like (`d5`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Name(String);

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_id = |id: &str| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit());
        if text.strip_prefix('d').is_some_and(is_id) {
            return Err(format!(
                "'{text}' would be taken for a domain id, choose another name"
            ));
        }
        let fits = text.len() <= 63
            && text.starts_with(|first: char| first.is_ascii_alphabetic())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !fits {
            return Err(format!(
                "'{text}' is not a name: a letter, then letters, digits, '-', '_', '.', at most 63 in all"
            ));
        }
        Ok(Name(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// A number within `MIN..=MAX`, and `DEFAULT` when nothing is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounded<const MIN: u32, const MAX: u32, const DEFAULT: u32>(u32);

impl<const MIN: u32, const MAX: u32, const DEFAULT: u32> Bounded<MIN, MAX, DEFAULT> {
    pub(crate) fn get(self) -> u32 {
        self.0
    }
}

impl<const MIN: u32, const MAX: u32, const DEFAULT: u32> Default for Bounded<MIN, MAX, DEFAULT> {
    fn default() -> Self {
        Bounded(DEFAULT)
    }
}

impl<'de, const MIN: u32, const MAX: u32, const DEFAULT: u32> Deserialize<'de>
    for Bounded<MIN, MAX, DEFAULT>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = i64::deserialize(deserializer)?;
        match u32::try_from(value) {
            Ok(value) if (MIN..=MAX).contains(&value) => Ok(Bounded(value)),
            _ => Err(de::Error::custom(format!("{value} is outside {MIN}..={MAX}"))),
        }
    }
}

/// A domain's memory: 1 MiB at least, 64 GiB at most, whole pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory(u64);

impl Memory {
    /// How many pages.
    pub(crate) fn pages(self) -> u64 {
        self.0 / 4096
    }
}

impl Default for Memory {
    fn default() -> Self {
        Memory(64 << 20)
    }
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit: u64 = match unit.trim() {
            "K" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            _ => {
                return Err(format!(
                    "memory of '{text}': write it like \"64 MiB\" or \"1 GiB\""
                ));
            }
        };
        match number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit))
        {
            Some(bytes) if !bytes.is_multiple_of(4096) => {
                Err(format!("memory of '{text}' is not whole pages of 4 KiB"))
            }
            Some(bytes) if (1 << 20..=64 << 30).contains(&bytes) => Ok(Memory(bytes)),
            _ => Err(format!("memory of '{text}' is outside 1 MiB to 64 GiB")),
        }
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// What is wrong with a machine file, and where.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// It could not be read.
    #[error("machine file {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of it does not fit.
    #[error("machine file {}, line {line} (`{text}`): {why}", path.display())]
    Line {
        /// Which.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The line itself, with the key.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// The file as a whole does not fit.
    #[error("machine file {}: {why}", path.display())]
    Whole {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        match &error {
            MachineError::Unreadable { .. } => Failure::new(&error),
            MachineError::Line { .. } | MachineError::Whole { .. } => Failure::wrong_use(&error),
        }
        .next("see a working one with: gnttab run --example")
    }
}

/// What is wrong, and with which bytes of the file; `None` is all of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    span: Option<Range<usize>>,
    why: String,
}

impl Wrong {
    pub(crate) fn at<T>(place: &Spanned<T>, why: impl Into<String>) -> Self {
        Wrong {
            span: Some(place.span()),
            why: why.into(),
        }
    }

    pub(crate) fn whole(why: impl Into<String>) -> Self {
        Wrong {
            span: None,
            why: why.into(),
        }
    }
}

impl From<toml::de::Error> for Wrong {
    fn from(error: toml::de::Error) -> Self {
        Wrong {
            span: error.span(),
            why: error.message().lines().collect::<Vec<_>>().join(", "),
        }
    }
}

/// Reads a file of ours with the parser for it.
pub(crate) fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, Wrong>) -> Result<T, MachineError> {
    let text = std::fs::read_to_string(path).map_err(|source| MachineError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    parse(&text).map_err(|Wrong { span, why }| {
        let (path, why) = (path.to_owned(), short(&why, 400));
        match span {
            Some(span) => {
                let (line, text) = line_at(&text, span.start);
                MachineError::Line {
                    path,
                    line,
                    text,
                    why,
                }
            }
            None => MachineError::Whole { path, why },
        }
    })
}

impl Machine {
    /// Reads and checks a machine file.
    pub(crate) fn load(path: &Path) -> Result<Self, MachineError> {
        let mut machine = read(path, Self::parse)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for (path, _) in machine
            .domains
            .iter_mut()
            .filter_map(|domain| domain.program.as_mut())
        {
            *path = folder.join(&*path);
        }
        for disk in &mut machine.disks {
            for path in std::iter::once(&mut disk.image).chain(&mut disk.socket) {
                let from_folder = folder.join(path.get_ref());
                *path.get_mut() = from_folder;
            }
        }
        Ok(machine)
    }

    fn parse(text: &str) -> Result<Self, Wrong> {
        let machine: Machine = toml::from_str(text)?;
        machine.check_domains()?;
        machine.check_disks()?;
        Ok(machine)
    }

    fn check_domains(&self) -> Result<(), Wrong> {
        if self.domains.is_empty() {
            return Err(Wrong::whole("there is no [[domain]] in it"));
        }
        for (index, domain) in self.domains.iter().enumerate() {
            if self.domains[..index]
                .iter()
                .any(|other| other.name == domain.name)
            {
                let why = format!("there is a domain '{}' already", domain.name.get_ref());
                return Err(Wrong::at(&domain.name, why));
            }
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), Wrong> {
        let mut images = HashMap::new();
        for disk in &self.disks {
            self.domain(&disk.backend)?;
            let frontend = self.domain(&disk.frontend)?;
            if disk.backend == disk.frontend {
                return Err(Wrong::at(
                    &disk.frontend,
                    "backend and frontend are the same domain",
                ));
            }
            let shared = images.insert(disk.image.get_ref(), disk.read_only);
            if shared.is_some_and(|read_only| !(read_only && disk.read_only)) {
                let why = "another disk has this image; they can share it only if both are read-only";
                return Err(Wrong::at(&disk.image, why));
            }
            let name = frontend.name.get_ref();
            match (&frontend.program, &disk.socket, &disk.port) {
                (None, Some(_), None) | (None, None, Some(_)) | (Some(_), None, None) => {}
                (_, Some(socket), Some(_)) => {
                    return Err(Wrong::at(socket, "give a socket or a port, not both"));
                }
                (None, None, None) => {
                    let why =
                        format!("'{name}' runs no program and so exports the disk: give a socket or a port");
                    return Err(Wrong::at(&disk.frontend, why));
                }
                (Some(_), socket, port) => {
                    let span = socket
                        .as_ref()
                        .map(Spanned::span)
                        .or(port.as_ref().map(Spanned::span));
                    let why = format!(
                        "'{name}' runs a program of its own, which has the disk: nothing is exported"
                    );
                    return Err(Wrong { span, why });
                }
            }
        }
        Ok(())
    }

    /// The domain that a disk refers to.
    fn domain(&self, name: &Spanned<Name>) -> Result<&Domain, Wrong> {
        let found = self.domains.iter().find(|domain| domain.name == *name);
        found.ok_or_else(|| {
            let all: Vec<&str> = self
                .domains
                .iter()
                .map(|domain| domain.name.get_ref().as_str())
                .collect();
            Wrong::at(
                name,
                format!(
                    "no domain is called '{}' (there are: {})",
                    name.get_ref(),
                    all.join(", ")
                ),
            )
        })
    }
}

/// The number (from 1) and the text of the line that has byte `offset`.
fn line_at(text: &str, offset: usize) -> (usize, String) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let content = text.lines().nth(line - 1).unwrap_or_default();
    (line, short(content.trim(), 80))
}

/// A text of which only the ends are left if it has more characters than `most`.
fn short(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let start: String = text.chars().take(most / 2).collect();
    let end: String = text.chars().skip(count - most / 2).collect();
    format!("{start} ... {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_a_machine() {
        let machine = Machine::parse(EXAMPLE).unwrap();
        assert_eq!(machine.domains.len(), 2);
        assert_eq!(machine.domains[0].memory.pages(), 64 * 256);
        assert_eq!(machine.disks[0].queues.get(), 2);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        const HEAD: &str = "[[domain]]\nname = \"a\"\n[[domain]]\nname = \"b\"\n";
        let disk = |more: &str| format!("{HEAD}[[disk]]\nimage = \"i\"\nbackend = \"a\"\n{more}");
        for (text, line, why) in [
            ("[[domain]]\nname = \"a b\"".to_owned(), 2, "is not a name"),
            ("[[domain]]\nname = \"d5\"".to_owned(), 2, "taken for a domain id"),
            (
                "[[domain]]\nname = \"a\"\nvcpus = 0".to_owned(),
                3,
                "0 is outside 1..=16",
            ),
            (
                "[[domain]]\nname = \"a\"\nmemory = \"64\"".to_owned(),
                3,
                "write it like",
            ),
            (
                "[[domain]]\nname = \"a\"\nmemory = \"900 KiB\"".to_owned(),
                3,
                "outside 1 MiB",
            ),
            (
                "[[domain]]\nname = \"a\"\ncolour = 1".to_owned(),
                3,
                "unknown field `colour`",
            ),
            (
                "[[domain]]\nmemory = \"64 MiB\"".to_owned(),
                1,
                "missing field `name`",
            ),
            (
                "[[domain]]\nname = \"a\"\nname = \"b\"".to_owned(),
                3,
                "duplicate key",
            ),
            ("[[domain]\n".to_owned(), 1, ""),
            (
                format!("{HEAD}[[domain]]\nname = \"a\""),
                6,
                "a domain 'a' already",
            ),
            (format!("{HEAD}program = []"), 5, "give the program's path"),
            (
                disk("frontend = \"c\"\nport = 1"),
                8,
                "no domain is called 'c' (there are: a, b)",
            ),
            (disk("frontend = \"a\"\nport = 1"), 8, "the same domain"),
            (disk("frontend = \"b\""), 8, "give a socket or a port"),
            (disk("frontend = \"b\"\nport = 99999"), 9, "99999"),
            (disk("frontend = \"b\"\nsocket = \"s\"\nport = 1"), 9, "not both"),
            (
                disk("frontend = \"b\"\nring-order = 5\nport = 1"),
                9,
                "5 is outside 0..=4",
            ),
        ] {
            let wrong = Machine::parse(&text).expect_err(&text);
            let span = wrong
                .span
                .clone()
                .unwrap_or_else(|| panic!("no place: {wrong:?} in\n{text}"));
            assert_eq!(line_at(&text, span.start).0, line, "{wrong:?} in\n{text}");
            assert!(wrong.why.contains(why), "{wrong:?} in\n{text}");
        }
        assert!(Machine::parse("").unwrap_err().why.contains("no [[domain]]"));
    }

    /// Whatever the file quotes at us, it is not repeated in full.
    #[test]
    fn what_is_wrong_is_said_in_few_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let long = "é".repeat(100_000);
        for text in [
            format!("[[domain]]\nname = \"{long}\""),
            format!("[[domain]]\nname = \"a\"\n\"{long}\" = 1"),
            format!("[[domain]]\nname = \"a\"\nmemory = \"{long}\""),
            format!("[[domain]]\nname = \"a\"\nvcpus = \"{long}\""),
            format!("[[domain]]\nname = \"a\"\n{long}"),
        ] {
            std::fs::write(&path, text).unwrap();
            let said = Machine::load(&path).expect_err("it is wrong").to_string();
            let said = said.replace(&path.display().to_string(), "m");
            assert!(said.chars().count() < 600, "{said}");
            assert!(
                said.starts_with("machine file m, line ") && said.contains(" ... "),
                "{said}"
            );
        }
        assert_eq!(short("abcdefg", 7), "abcdefg");
        assert_eq!(short("abcdefgh", 6), "abc ... fgh");
    }

    #[test]
    fn two_disks_share_an_image_only_if_neither_writes_it() {
        let machine = |first: bool, second: bool| {
            let disk = |read_only| {
                format!(
                    "[[disk]]\nimage = \"i\"\nbackend = \"a\"\nfrontend = \"b\"\nport = 1\nread-only = {read_only}\n"
                )
            };
            Machine::parse(&format!(
                "[[domain]]\nname = \"a\"\n[[domain]]\nname = \"b\"\n{}{}",
                disk(first),
                disk(second)
            ))
        };
        assert!(machine(true, true).is_ok());
        assert!(machine(false, true).is_err());
        assert!(machine(true, false).is_err());
    }
}
