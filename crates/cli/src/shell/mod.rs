//! `gnttab shell`: grants by hand, between domains that do what they are told.

mod editor;
pub(crate) mod joined;
mod memory;
mod words;
pub(crate) mod world;

use std::cell::RefCell;
use std::rc::Rc;

use gnttab_abi::{DomId, GrantRef};
use serde_json::json;

use crate::args::{DomainRef, Shell};
use crate::failure::Failure;
use crate::output::{self, columns};
use editor::{Lines, Names, Read};
use joined::Running;
use memory::Memory;
use words::{Act, COMMANDS, DOMAIN_COMMANDS, Line};
use world::{Grant, Place, Refused, World};

/// Runs the shell to its end.
pub(crate) fn main(args: &Shell) -> Result<(), Failure> {
    let mut world: Box<dyn World> = if args.running || args.control.is_some() {
        Box::new(Running::find(args.control.as_deref())?)
    } else {
        Box::new(Memory::new())
    };
    for number in 1..=args.domains {
        let name = format!("hand{number}");
        world
            .add(&name)
            .map_err(|refused| Failure::new(format!("domain {name}: {refused}")))?;
    }
    let names = Rc::default();
    let lines = Lines::new(args.script.as_deref(), &names)?;
    let shell = &mut Hands {
        world,
        names,
        json: args.json,
    };
    shell.run(lines)
}

struct Hands {
    world: Box<dyn World>,
    names: Rc<RefCell<Names>>,
    json: bool,
}

/// What came of a step.
struct Step {
    /// What was done, or why it was not.
    outcome: Result<String, Refused>,
    /// The entry that it was about.
    about: Option<(DomId, GrantRef)>,
    /// The entry before it; `None`: there was none.
    before: Option<String>,
}

impl Hands {
    fn run(&mut self, mut lines: Lines) -> Result<(), Failure> {
        if !lines.is_script() {
            output::say("domains that do what they are told; 'help' says what that can be, Ctrl-D ends");
            output::say(self.domains().trim_end());
        }
        let mut number = 0;
        loop {
            self.learn_names();
            let line = match lines.read()? {
                Read::Line(line) => line,
                Read::Dropped => continue,
                Read::End => return Ok(()),
            };
            number += 1;
            if lines.is_script() && !self.json && !line.trim().is_empty() {
                output::line(&format!("> {}", line.trim()));
            }
            let done = words::parse(&line).and_then(|parsed| self.act(&line, &parsed));
            match done {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // A person tries again; a script is wrong.
                Err(why) if lines.is_script() => {
                    return Err(
                        Failure::wrong_use(format!("line {number} (`{}`): {why}", line.trim()))
                            .next("gnttab shell knows what 'help' lists"),
                    );
                }
                Err(why) => output::say(&why),
            }
        }
    }

    /// For completion.
    fn learn_names(&mut self) {
        let mut names = Names::default();
        for (dom, name) in self.world.domains() {
            names.domains.extend([dom.to_string(), name]);
            let (grefs, handles) = self.world.names(dom);
            names.things.extend(grefs.iter().map(ToString::to_string));
            names
                .things
                .extend(handles.iter().map(|handle| format!("h{handle}")));
        }
        *self.names.borrow_mut() = names;
    }

    /// Does a line. `false`: it was the last.
    fn act(&mut self, typed: &str, line: &Line<'_>) -> Result<bool, String> {
        match line {
            Line::Nothing => {}
            Line::Quit => return Ok(false),
            Line::Help => self.say_text(typed, help().trim_end()),
            Line::Domains => {
                let text = self.domains();
                self.say_text(typed, text.trim_end());
            }
            Line::Add(name) => {
                let outcome = self.world.add(name).map(|dom| format!("{dom} {name}"));
                self.tell(
                    typed,
                    Step {
                        outcome,
                        about: None,
                        before: None,
                    },
                );
            }
            Line::Show(dom, gref) => {
                let dom = self.living(dom)?;
                let text = self.show(dom, *gref);
                self.say_text(typed, text.trim_end());
            }
            Line::Do(dom, act) => {
                let dom = self.living(dom)?;
                let step = self.step(dom, act)?;
                self.tell(typed, step);
            }
        }
        Ok(true)
    }

    fn step(&mut self, dom: DomId, act: &Act<'_>) -> Result<Step, String> {
        let world = &mut *self.world;
        let mut about = None;
        let mut before = None;
        let mut look = |world: &mut dyn World, dom, gref| {
            about = Some((dom, gref));
            before = world.entry(dom, gref);
        };
        let outcome = match act {
            Act::Grant { to, readonly, part } => {
                let to = peer(world, to)?;
                let grant = Grant {
                    readonly: *readonly,
                    part: *part,
                };
                let granted = world.grant(dom, to, grant);
                // It was free before.
                about = granted.as_ref().ok().map(|gref| (dom, *gref));
                granted.map(|gref| format!("{dom} reference {gref}"))
            }
            Act::End { gref, force } => {
                look(world, dom, *gref);
                world.end(dom, *gref, *force).map(|()| "ended".to_owned())
            }
            Act::Map { of, gref, readonly } => {
                let of = peer(world, of)?;
                look(world, of, *gref);
                let mapped = world.map(dom, of, *gref, *readonly);
                mapped.map(|handle| format!("{dom} handle h{handle}"))
            }
            Act::Unmap(handle) => {
                if let Some((granter, gref)) = world.granted(dom, *handle) {
                    look(world, granter, gref);
                }
                world.unmap(dom, *handle).map(|()| "unmapped".to_owned())
            }
            Act::Read(place, offset, len) => {
                let mut bytes = vec![0; *len];
                let read = world.read(dom, *place, *offset, &mut bytes);
                read.map(|()| readable(&bytes))
            }
            Act::Write(place, offset, text) => {
                let written = world.write(dom, *place, *offset, text.as_bytes());
                written.map(|()| format!("{} bytes written", text.len()))
            }
            Act::Copy {
                of,
                gref,
                offset,
                len,
            } => {
                let of = peer(world, of)?;
                look(world, of, *gref);
                world
                    .copy(dom, of, *gref, *offset, *len)
                    .map(|bytes| readable(&bytes))
            }
            Act::Accept(from) => {
                let from = peer(world, from)?;
                let accepted = world.accept(dom, from);
                about = accepted.as_ref().ok().map(|gref| (dom, *gref));
                accepted.map(|gref| format!("{dom} reference {gref} waits for a page of {from}"))
            }
            Act::Transfer { to, gref } => {
                let to = peer(world, to)?;
                look(world, to, *gref);
                world
                    .transfer(dom, to, *gref)
                    .map(|()| format!("the page is {to}'s"))
            }
            Act::Version(version) => world
                .set_version(dom, *version)
                .map(|()| format!("{dom} has a table of version {version}; its grants are gone")),
            Act::Kill => {
                // What it had mapped is let go, which its granters see.
                if let Some((granter, gref)) = {
                    let (_, handles) = world.names(dom);
                    handles.first().and_then(|handle| world.granted(dom, *handle))
                } {
                    look(world, granter, gref);
                }
                world.kill(dom)
            }
        };
        if let Act::Read(Place::Own(gref), ..) | Act::Write(Place::Own(gref), ..) = act {
            about = about.or(Some((dom, *gref)));
        }
        Ok(Step {
            outcome,
            about,
            before,
        })
    }

    /// Says what came of a step, with the entry before and after.
    fn tell(&mut self, typed: &str, step: Step) {
        let after = step.about.and_then(|(dom, gref)| self.world.entry(dom, gref));
        let is_done = step.outcome.is_ok();
        let text = match &step.outcome {
            Ok(text) => text.clone(),
            Err(refused) => format!("refused: {refused}"),
        };
        if self.json {
            let about = step
                .about
                .map(|(dom, gref)| json!({ "domain": dom.0, "gref": gref.0, "before": step.before, "after": after }));
            output::json(
                "shell",
                json!({ "line": typed.trim(), "done": is_done, "outcome": text, "entry": about }),
            );
            return;
        }
        output::line(&text);
        if let Some((dom, gref)) = step.about {
            let free = || "-".to_owned();
            let (before, after) = (step.before, after.unwrap_or_else(free));
            if before.as_ref().is_some_and(|before| *before != after) {
                output::line(&format!("  {dom} {gref} before  {}", before.unwrap_or_else(free)));
                output::line(&format!("  {dom} {gref} after   {after}"));
            } else {
                output::line(&format!("  {dom} {gref}  {after}"));
            }
        }
    }

    fn say_text(&self, typed: &str, text: &str) {
        if self.json {
            output::json(
                "shell",
                json!({ "line": typed.trim(), "done": true, "outcome": text, "entry": null }),
            );
        } else {
            output::line(text);
        }
    }

    fn domains(&mut self) -> String {
        let rows: Vec<[String; 2]> = self
            .world
            .domains()
            .into_iter()
            .map(|(dom, name)| [dom.to_string(), name])
            .collect();
        if rows.is_empty() {
            return "there is no domain; add one with: add NAME".to_owned();
        }
        columns(rows, &[])
    }

    fn show(&mut self, dom: DomId, gref: Option<GrantRef>) -> String {
        let (grefs, handles) = match gref {
            Some(gref) => (vec![gref], Vec::new()),
            None => self.world.names(dom),
        };
        let mut rows = Vec::new();
        for gref in grefs {
            let words = self.world.entry(dom, gref);
            rows.push([
                gref.to_string(),
                words.unwrap_or_else(|| "past the table".to_owned()),
            ]);
        }
        for handle in handles {
            if let Some((granter, gref)) = self.world.granted(dom, handle) {
                rows.push([format!("h{handle}"), format!("maps {gref} of {granter}")]);
            }
        }
        if rows.is_empty() {
            return format!("{dom} grants nothing and maps nothing");
        }
        columns(rows, &[])
    }

    /// One of the domains that can be told something.
    fn living(&self, typed: &str) -> Result<DomId, String> {
        let wanted: DomainRef = typed.parse()?;
        let all = self.world.domains();
        let found = all.iter().find(|(dom, name)| match &wanted {
            DomainRef::Id(id) => dom.0 == *id,
            DomainRef::Named(wanted) => name == wanted.as_str(),
        });
        found.map(|(dom, _)| *dom).ok_or_else(|| {
            let all: Vec<String> = all.iter().map(|(dom, name)| format!("{dom} {name}")).collect();
            format!("'{typed}' is none of the domains here: {}", all.join(", "))
        })
    }
}

/// Somebody to do something with, who need not be there: what a domain may name is for the hypervisor to judge.
fn peer(world: &dyn World, typed: &str) -> Result<DomId, String> {
    match typed.parse::<DomainRef>()? {
        DomainRef::Id(id) => Ok(DomId(id)),
        DomainRef::Named(wanted) => {
            let found = world
                .domains()
                .into_iter()
                .find(|(_, name)| name == wanted.as_str());
            found
                .map(|(dom, _)| dom)
                .ok_or_else(|| format!("no domain here is called '{typed}'"))
        }
    }
}

/// Bytes as text where they are, up to the zeros at the end.
fn readable(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    if end == 0 {
        return format!("{} bytes, all zero", bytes.len());
    }
    format!("\"{}\"", bytes[..end].escape_ascii())
}

fn help() -> String {
    let row = |prefix: &str, (name, words, means): &(&str, &str, &str)| {
        [
            format!("{prefix}{name} {words}").trim_end().to_owned(),
            (*means).to_owned(),
        ]
    };
    let acts = DOMAIN_COMMANDS.iter().map(|command| row("DOMAIN ", command));
    let others = COMMANDS.iter().map(|command| row("", command));
    format!(
        "{}A domain is d1, 1 or its name; a reference 0x8 or 8; a handle h0. Lines that begin with # are skipped.\n",
        columns(acts.chain(others), &[])
    )
}
