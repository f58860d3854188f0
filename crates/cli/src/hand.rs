//! `gnttab grant` and `gnttab map`: one side each, in a terminal each, so that every order of release can be tried.

use std::io;
use std::time::Duration;

use gnttab_abi::{DomId, GrantRef};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::args::{DomainRef, GrantOne, MapOne};
use crate::control;
use crate::failure::Failure;
use crate::output;
use crate::shell::joined::{Joined, door};
use crate::shell::world::{Grant, Place, Refused};

/// How often a peer that still has the page is looked at.
const AGAIN: Duration = Duration::from_millis(100);

/// How much of a page is shown.
const SOME: usize = 64;

/// Grants a page and waits.
pub(crate) fn grant(args: &GrantOne) -> Result<(), Failure> {
    let (socket, door) = door(args.control.as_deref())?;
    let to = number(&args.to, &socket)?;
    let talk = Talk::new("grant", args.json);
    let mut joined = Joined::new(&door, &args.name)?;
    let id = joined.domain.id();
    let what = Grant {
        readonly: args.read,
        part: None,
    };
    let gref = joined.grant(to, what).map_err(failed)?;
    if let Some(text) = &args.text {
        joined
            .write(Place::Own(gref), 0, text.as_bytes())
            .map_err(failed)?;
    }
    talk.data(
        json!({ "event": "granted", "domain": id.0, "gref": gref.0, "to": to.0, "readonly": args.read }),
        &format!("{id} {gref}"),
    );
    talk.hint(&format!(
        "granted to {to}; Enter ends access, 'read' and 'write TEXT' use the page, 'quit' dies at once"
    ));
    let mut input = Input::new();
    let mut ending = false;
    loop {
        match input.line(&joined, ending.then_some(AGAIN))? {
            Heard::Line(line) => match act(&joined, Place::Own(gref), &line, &talk) {
                Next::Release => {}
                Next::Die => {
                    joined.domain.leave();
                    return Ok(());
                }
                Next::Stay => continue,
            },
            Heard::End | Heard::Nothing => {}
        }
        match joined.end(gref) {
            Ok(()) => {
                talk.data(
                    json!({ "event": "ended", "domain": id.0, "gref": gref.0 }),
                    "ended",
                );
                return Ok(());
            }
            Err(Refused(_)) if ending => {}
            Err(Refused(why)) => {
                talk.data(
                    json!({ "event": "pending", "domain": id.0, "gref": gref.0 }),
                    &format!("pending: {to} still has it"),
                );
                talk.hint(&why);
                ending = true;
            }
        }
    }
}

/// Maps a page and waits.
pub(crate) fn map(args: &MapOne) -> Result<(), Failure> {
    let (socket, door) = door(args.control.as_deref())?;
    let talk = Talk::new("map", args.json);
    let mut joined = Joined::new(&door, &args.name)?;
    let id = joined.domain.id();
    let mut input = Input::new();
    let (of, gref) = match (&args.of, args.reference) {
        (Some(of), Some(gref)) => (number(of, &socket)?, GrantRef(gref)),
        _ => {
            talk.data(json!({ "event": "joined", "domain": id.0 }), &id.to_string());
            talk.hint("what is to be mapped? DOMAIN REFERENCE, as gnttab grant prints them");
            let line = match input.line(&joined, None)? {
                Heard::Line(line) => line,
                Heard::End | Heard::Nothing => return Ok(()),
            };
            let (of, gref) = line
                .trim()
                .split_once(' ')
                .ok_or_else(|| Failure::wrong_use(format!("'{line}' is not DOMAIN REFERENCE")))?;
            let of = of.parse().map_err(Failure::wrong_use)?;
            let gref = crate::args::parse_reference(gref.trim()).map_err(Failure::wrong_use)?;
            (number(&of, &socket)?, GrantRef(gref))
        }
    };
    let handle = joined
        .map(of, gref, args.read)
        .map_err(|refused| failed(refused).next("gnttab explain says what a status means"))?;
    talk.data(
        json!({ "event": "mapped", "domain": id.0, "of": of.0, "gref": gref.0, "handle": handle.0, "readonly": args.read }),
        &format!("{id} h{handle}"),
    );
    talk.hint(&format!(
        "mapped {gref} of {of}; Enter unmaps, 'read' and 'write TEXT' use the page, 'quit' dies at once"
    ));
    loop {
        if let Heard::Line(line) = input.line(&joined, None)? {
            match act(&joined, Place::Mapped(handle), &line, &talk) {
                Next::Release => {}
                Next::Die => {
                    joined.domain.leave();
                    return Ok(());
                }
                Next::Stay => continue,
            }
        }
        joined.unmap(handle).map_err(failed)?;
        talk.data(
            json!({ "event": "unmapped", "domain": id.0, "handle": handle.0 }),
            "unmapped",
        );
        return Ok(());
    }
}

fn failed(refused: Refused) -> Failure {
    Failure::new(refused)
}

/// A domain's number, from the machine where it was given by name.
fn number(domain: &DomainRef, socket: &std::path::Path) -> Result<DomId, Failure> {
    match domain {
        DomainRef::Id(id) => Ok(DomId(*id)),
        DomainRef::Named(_) => {
            let domains = control::connect(Some(socket))?
                .domains()
                .map_err(control::failed)?;
            control::find(domain, &domains).map(|found| DomId(found.id))
        }
    }
}

enum Next {
    Release,
    Die,
    Stay,
}

/// Does what a line says with the page.
fn act(joined: &Joined, place: Place, line: &str, talk: &Talk) -> Next {
    let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    match word {
        "" | "end" | "unmap" => return Next::Release,
        "quit" => return Next::Die,
        "read" => {
            let mut bytes = [0; SOME];
            match joined.read(place, 0, &mut bytes) {
                Ok(()) => {
                    let end = bytes
                        .iter()
                        .rposition(|byte| *byte != 0)
                        .map_or(0, |last| last + 1);
                    let text = bytes[..end].escape_ascii().to_string();
                    talk.data(json!({ "event": "read", "text": text }), &format!("\"{text}\""));
                }
                Err(refused) => talk.refused(&refused),
            }
        }
        "write" => match joined.write(place, 0, rest.as_bytes()) {
            Ok(()) => talk.data(
                json!({ "event": "written", "bytes": rest.len() }),
                &format!("{} bytes written", rest.len()),
            ),
            Err(refused) => talk.refused(&refused),
        },
        _ => talk.hint(&format!(
            "'{word}' is none of: read, write TEXT, quit, or just Enter"
        )),
    }
    Next::Stay
}

struct Talk {
    command: &'static str,
    json: bool,
}

impl Talk {
    fn new(command: &'static str, json: bool) -> Talk {
        Talk { command, json }
    }

    fn data(&self, event: Value, text: &str) {
        if self.json {
            output::json(self.command, event);
        } else {
            output::line(text);
        }
    }

    fn refused(&self, refused: &Refused) {
        self.data(
            json!({ "event": "refused", "why": refused.to_string() }),
            &format!("refused: {refused}"),
        );
    }

    fn hint(&self, text: &str) {
        if !self.json {
            output::say(text);
        }
    }
}

enum Heard {
    Line(String),
    Nothing,
    End,
}

/// Lines of standard input, waited for together with the machine's end.
struct Input {
    bytes: Vec<u8>,
}

impl Input {
    fn new() -> Input {
        Input { bytes: Vec::new() }
    }

    /// The next line; nothing, if there is none within `patience`.
    fn line(&mut self, joined: &Joined, patience: Option<Duration>) -> Result<Heard, Failure> {
        let fail = |errno: Errno| Failure::new(format!("standard input: {}", io::Error::from(errno)));
        let stdin = io::stdin();
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return Ok(Heard::Line(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            let hang_up = joined.domain.hang_up();
            let mut wait = [
                PollFd::new(&stdin, PollFlags::IN),
                PollFd::from_borrowed_fd(std::os::fd::AsFd::as_fd(&hang_up), PollFlags::empty()),
            ];
            let timeout = patience.map(|patience| Timespec {
                tv_sec: 0,
                tv_nsec: patience.subsec_nanos().into(),
            });
            match poll(&mut wait, timeout.as_ref()) {
                Ok(0) => return Ok(Heard::Nothing),
                Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(fail(errno)),
            }
            if !wait[1].revents().is_empty() {
                return Err(Failure::new("the machine has gone, and the domain with it"));
            }
            let mut some = [0; 256];
            match rustix::io::read(&stdin, &mut some) {
                Ok(0) => {
                    // While a peer is waited for, the end of the input is heard again and again.
                    if let Some(patience) = patience {
                        std::thread::sleep(patience);
                        return Ok(Heard::Nothing);
                    }
                    return Ok(Heard::End);
                }
                Ok(len) => self.bytes.extend_from_slice(&some[..len]),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(fail(errno)),
            }
        }
    }
}
