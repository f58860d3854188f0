//! Questions and answers, and their lines.

use serde::{Deserialize, Serialize};

use crate::monitor::{DomainInfo, EventInfo, Filter, GrantInfo, MachineInfo, MappingInfo};

/// Raised when a key changes its meaning or goes, not when one is added.
pub const VERSION: u32 = 1;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "get", rename_all = "snake_case")]
pub enum Question {
    /// The machine as a whole.
    Machine,
    /// Every domain.
    Domains,
    /// A domain, the entries of its table that are not free, and the mappings that it holds.
    Table {
        /// Its number.
        domain: u16,
    },
    /// What happens from now on, until the caller hangs up.
    Events(Filter),
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Question::Machine`].
    Machine(MachineInfo),
    /// To [`Question::Domains`].
    Domains(Vec<DomainInfo>),
    /// To [`Question::Table`].
    Table(Box<Table>),
    /// To [`Question::Events`], first: what happens from here on is told.
    Watching,
    /// To [`Question::Events`]: what happened.
    Event(EventInfo),
    /// To [`Question::Events`]: so many more happened here than this caller, or the machine, could take.
    Dropped(u64),
    /// It cannot be answered, and why.
    Error(String),
}

/// A domain's grant table, and what it maps of others'.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// The domain.
    pub domain: DomainInfo,
    /// Entries that are not free.
    pub grants: Vec<GrantInfo>,
    /// Mappings of others' pages.
    pub mappings: Vec<MappingInfo>,
    /// Mappings of its pages by others.
    pub mapped_by: Vec<MappedBy>,
}

/// A mapping by somebody else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedBy {
    /// Who has it.
    pub domain: u16,
    /// What it has; the granter is the domain that was asked about.
    #[serde(flatten)]
    pub mapping: MappingInfo,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    content: T,
}

/// One line, with its end.
///
/// ```
/// use gnttab_host::control::{Question, decode_question, encode};
///
/// let line = encode(&Question::Table { domain: 2 });
/// assert_eq!(line, b"{\"version\":1,\"content\":{\"get\":\"table\",\"domain\":2}}\n");
/// assert_eq!(decode_question(&line), Ok(Question::Table { domain: 2 }));
/// ```
pub fn encode<T: Serialize>(content: &T) -> Vec<u8> {
    let version = VERSION;
    // None of the types here has a key that is no string: this does not fail.
    let mut line = serde_json::to_vec(&Versioned { version, content }).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A question from its line; else why it is none.
///
/// # Errors
/// What is wrong with it, to be told to the caller.
pub fn decode_question(line: &[u8]) -> Result<Question, String> {
    decode(line, "a question")
}

/// An answer from its line; else why it is none.
///
/// # Errors
/// What is wrong with it.
pub fn decode_answer(line: &[u8]) -> Result<Answer, String> {
    if !is_printable(line) {
        return Err("not an answer: there are control characters in it".to_owned());
    }
    decode(line, "an answer")
}

/// Whether no control character is in any of a line's strings, as itself or escaped: a terminal would do what they say.
fn is_printable(line: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(line) else {
        return false;
    };
    let mut letters = text.strip_suffix('\n').unwrap_or(text).chars();
    while let Some(letter) = letters.next() {
        let means = match letter {
            '\\' => match letters.next() {
                Some('u') => {
                    let digits: String = letters.by_ref().take(4).collect();
                    u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32)
                }
                Some('b' | 'f' | 'n' | 'r' | 't') => return false,
                other => other,
            },
            letter => Some(letter),
        };
        if means.is_some_and(char::is_control) {
            return false;
        }
    }
    true
}

/// What an error repeats of a line, without the control characters in it.
fn harmless(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            escaped.extend(letter.escape_default());
        } else {
            escaped.push(letter);
        }
    }
    escaped
}

fn decode<'a, T: Deserialize<'a>>(line: &'a [u8], what: &str) -> Result<T, String> {
    // The version first: the content of another one may be anything.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let not = |error: serde_json::Error| format!("not {what}: {}", harmless(&error.to_string()));
    let Version { version } = serde_json::from_slice(line).map_err(not)?;
    if version != VERSION {
        return Err(format!(
            "version {VERSION} of the control protocol is spoken here, not {version}"
        ));
    }
    let Versioned { content, .. } = serde_json::from_slice::<Versioned<T>>(line).map_err(not)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_cannot_make_a_terminal_do_things() {
        for why in ["\u{1b}[2J", "\u{7f}", "\u{9b}2J", "two\nlines", "a\tb"] {
            let error = decode_answer(&encode(&Answer::Error(why.to_owned()))).unwrap_err();
            assert!(error.contains("control characters"), "{error}");
        }
        let told = Answer::Error("\"é\" \\ is no name".to_owned());
        assert_eq!(decode_answer(&encode(&told)), Ok(told));
        let escaped = br#"{"version":1,"content":{"error":"a\u001bb"}}"#;
        assert!(decode_answer(escaped).unwrap_err().contains("control characters"));
    }

    #[test]
    fn a_reason_can_be_told_whatever_the_line_was() {
        for name in ["tabl\u{7f}e", "\\u001b[2J", "\u{9b}2J"] {
            let line = format!("{{\"version\":1,\"content\":{{\"get\":\"{name}\"}}}}\n");
            let why = decode_question(line.as_bytes()).unwrap_err();
            assert!(why.contains("unknown variant"), "{why}");
            let told = Answer::Error(why);
            assert_eq!(decode_answer(&encode(&told)), Ok(told));
        }
    }

    #[test]
    fn lines_come_back_as_written() {
        for question in [
            Question::Machine,
            Question::Domains,
            Question::Table { domain: 7 },
            Question::Events(Filter::default()),
            Question::Events(Filter {
                domain: Some(3),
                status: Some("bad_gntref".into()),
                ..Filter::default()
            }),
        ] {
            assert_eq!(decode_question(&encode(&question)), Ok(question));
        }
        for answer in [
            Answer::Watching,
            Answer::Dropped(9),
            Answer::Error("no".into()),
            Answer::Domains(Vec::new()),
        ] {
            assert_eq!(decode_answer(&encode(&answer)), Ok(answer));
        }
    }

    #[test]
    fn what_is_no_question_is_told_why() {
        for (line, why) in [
            (&b""[..], "not a question"),
            (b"{}", "version"),
            (b"{\"version\":2,\"content\":{\"get\":\"domains\"}}", "not 2"),
            (b"{\"version\":2,\"content\":17}", "not 2"),
            (b"{\"version\":1,\"content\":{\"get\":\"moon\"}}", "moon"),
            (
                b"{\"version\":1,\"content\":{\"get\":\"table\",\"domain\":65536}}",
                "65536",
            ),
            (b"{\"version\":1,\"content\":{\"get\":\"table\"}}", "domain"),
            (b"\xff\xfe", "not a question"),
        ] {
            let said = decode_question(line).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    /// A line nested as deep as a question may be long is refused, and takes no stack for it.
    #[test]
    fn depth_is_bounded() {
        let mut line = b"{\"version\":1,\"content\":".to_vec();
        line.extend(std::iter::repeat_n(b'[', 4000));
        assert!(decode_question(&line).is_err());
    }
}
