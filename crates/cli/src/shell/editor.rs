//! Where lines come from: a person at a terminal, with history and completion, or a script.

use std::cell::RefCell;
use std::io::{BufRead, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Context, Editor, Helper};

use super::words::{COMMANDS, DOMAIN_COMMANDS};
use crate::failure::Failure;

const PROMPT: &str = "gnttab> ";

/// A line, or the end.
pub(super) enum Read {
    Line(String),
    /// Ctrl-C: nothing is done with the line.
    Dropped,
    End,
}

/// What can be completed now: shared with the shell, which keeps it true.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Domains, by number and by name.
    pub(super) domains: Vec<String>,
    /// References and handles of all of them.
    pub(super) things: Vec<String>,
}

/// See the module.
pub(super) enum Lines {
    Person {
        editor: Box<Editor<Helping, FileHistory>>,
        history: Option<PathBuf>,
    },
    Script(Box<dyn BufRead>),
}

impl Lines {
    /// A script's, if there is one; a person's, if one is there; else what comes in.
    pub(super) fn new(script: Option<&Path>, names: &Rc<RefCell<Names>>) -> Result<Lines, Failure> {
        if let Some(path) = script {
            let file = std::fs::File::open(path)
                .map_err(|error| Failure::new(format!("script {}: {error}", path.display())))?;
            return Ok(Lines::Script(Box::new(std::io::BufReader::new(file))));
        }
        if !std::io::stdin().is_terminal() {
            return Ok(Lines::Script(Box::new(std::io::BufReader::new(std::io::stdin()))));
        }
        let fail = |error: ReadlineError| Failure::new(format!("the terminal: {error}"));
        let mut editor = Editor::new().map_err(fail)?;
        editor.set_helper(Some(Helping(Rc::clone(names))));
        let history = history();
        if let Some(path) = &history {
            // There is none before the first time.
            let _ = editor.load_history(path);
        }
        Ok(Lines::Person {
            editor: Box::new(editor),
            history,
        })
    }

    /// Whether what is read has to be shown, for the answers to make sense.
    pub(super) fn is_script(&self) -> bool {
        matches!(self, Lines::Script(_))
    }

    pub(super) fn read(&mut self) -> Result<Read, Failure> {
        match self {
            Lines::Script(lines) => {
                let mut line = String::new();
                match lines.read_line(&mut line) {
                    Ok(0) => Ok(Read::End),
                    Ok(_) => Ok(Read::Line(line.trim_end().to_owned())),
                    Err(error) => Err(Failure::new(format!("the script: {error}"))),
                }
            }
            Lines::Person { editor, history } => match editor.readline(PROMPT) {
                Ok(line) => {
                    // What cannot be kept is still done.
                    let _ = editor.add_history_entry(&line);
                    if let Some(path) = history {
                        let _ = editor.save_history(path);
                    }
                    Ok(Read::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Read::Dropped),
                Err(ReadlineError::Eof) => Ok(Read::End),
                Err(error) => Err(Failure::new(format!("the terminal: {error}"))),
            },
        }
    }
}

/// `$XDG_STATE_HOME/gnttab/history`; without a home there is none.
fn history() -> Option<PathBuf> {
    let folder = match std::env::var_os("XDG_STATE_HOME").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".local/state"),
    };
    let folder = folder.join("gnttab");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// The completer.
pub(super) struct Helping(Rc<RefCell<Names>>);

/// What could stand where the line ends, by what stands before; and where the word to complete begins.
fn candidates(line: &str, names: &Names) -> (usize, Vec<String>) {
    let start = line.rfind(char::is_whitespace).map_or(0, |at| at + 1);
    let before: Vec<&str> = line[..start].split_whitespace().collect();
    let word = &line[start..];
    let commands = || COMMANDS.iter().map(|(name, ..)| (*name).to_owned());
    let all: Vec<String> = match &before[..] {
        [] => commands().chain(names.domains.iter().cloned()).collect(),
        ["show"] => names.domains.clone(),
        ["show", _] => names.things.clone(),
        [first] if !commands().any(|name| name == *first) => DOMAIN_COMMANDS
            .iter()
            .map(|(name, ..)| (*name).to_owned())
            .collect(),
        [_, "grant" | "map" | "copy" | "accept" | "transfer"] => names.domains.clone(),
        [_, "end" | "unmap" | "read" | "write"] | [_, "map" | "copy" | "transfer", _] => names.things.clone(),
        [_, "grant", _] => vec!["read".to_owned(), "part".to_owned()],
        [_, "map", _, _] => vec!["read".to_owned()],
        [_, "end", _] => vec!["force".to_owned()],
        _ => Vec::new(),
    };
    (
        start,
        all.into_iter().filter(|name| name.starts_with(word)).collect(),
    )
}

impl Completer for Helping {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let (start, mut found) = candidates(line.get(..pos).unwrap_or(line), &self.0.borrow());
        if let [only] = &mut found[..] {
            // The next word can be typed at once, as in a shell.
            only.push(' ');
        }
        Ok((start, found))
    }
}

impl Hinter for Helping {
    type Hint = String;
}

impl Highlighter for Helping {}
impl Validator for Helping {}
impl Helper for Helping {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_where_they_fit() {
        let names = Names {
            domains: vec!["d1".to_owned(), "d2".to_owned(), "disk".to_owned()],
            things: vec!["0x8".to_owned(), "h0".to_owned()],
        };
        for (line, expected) in [
            ("d", &["domains", "d1", "d2", "disk"][..]),
            ("d1 gr", &["grant"]),
            ("d1 grant di", &["disk"]),
            ("d2 map d1 0", &["0x8"]),
            ("d2 unmap h", &["h0"]),
            ("d1 grant d2 re", &["read"]),
            ("show di", &["disk"]),
            ("d1 kill ", &[]),
        ] {
            let (start, found) = candidates(line, &names);
            assert_eq!(found, expected, "{line}");
            assert!(start <= line.len());
        }
    }
}
