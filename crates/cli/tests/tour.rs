//! docs/tour.md is what the commands really say: every command in it is run again and what comes out is compared.
//!
//! `GNTTAB_TOUR=write cargo test -p gnttab --test tour` writes it anew, with the program that `GNTTAB` names or else the one
//! of this build. The text between is anybody's to edit; of the rest, this is what is understood:
//!
//! - A section (`##`) has a folder, a shell and a place for sockets of its own.
//! - In a block of kind `console`, a line that begins with `$ ` is typed, and what follows is what came out; `[1]` is the exit
//!   code, where it is not 0. A command goes on in lines that begin with `> ` while it ends in `\`, until its `<<'END'` is met, or,
//!   if it begins with `{ `, until its `; }`.
//! - `console varies`: numbers, and how much room they take, differ from run to run.
//! - `console once`: run when the tour is written, and not when it is checked: it takes long, or its lines differ each time.
//! - `<!-- until: COMMAND -->` waits until that succeeds.
//! - `<!-- open NAME WIDTHxHEIGHT: COMMAND -->` types a command in a terminal of its own, `<!-- type NAME: KEY... -->` presses
//!   keys there as tmux names them, and `<!-- show NAME -->` says that the block that follows is its screen, which varies.

#![expect(clippy::tests_outside_test_module, reason = "a file of tests is no module")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const TOUR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/tour.md");

/// What a part of the tour is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Stays as it is.
    Text,
    /// A block of commands and what they say.
    Console(Care),
    /// A block with a terminal's screen.
    Screen,
}

/// How a block is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Care {
    Exact,
    Varies,
    Once,
}

/// Lines of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    kind: Kind,
    lines: Vec<String>,
}

/// The tour, in parts; the fences of a block are text.
fn parts(tour: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let (mut kind, mut shows) = (Kind::Text, false);
    for line in tour.lines() {
        let fence = line.starts_with("```");
        if fence && kind != Kind::Text {
            kind = Kind::Text;
        }
        match parts.last_mut() {
            Some(last) if last.kind == kind => last.lines.push(line.to_owned()),
            _ => parts.push(Part {
                kind,
                lines: vec![line.to_owned()],
            }),
        }
        let opened = match line {
            "```console" => Some(Kind::Console(Care::Exact)),
            "```console varies" => Some(Kind::Console(Care::Varies)),
            "```console once" => Some(Kind::Console(Care::Once)),
            "```text" if shows => Some(Kind::Screen),
            _ => None,
        };
        shows = line.starts_with("<!-- show ");
        if let Some(opened) = opened {
            kind = opened;
            parts.push(Part {
                kind,
                lines: Vec::new(),
            });
        }
    }
    parts
}

fn joined(parts: &[Part]) -> String {
    let lines = parts.iter().flat_map(|part| &part.lines);
    lines.map(|line| format!("{line}\n")).collect()
}

/// The commands of a block, each with the lines that it is typed in.
fn commands(lines: &[String]) -> Vec<Vec<String>> {
    let mut commands: Vec<Vec<String>> = Vec::new();
    let mut open: Option<String> = None;
    for line in lines {
        if let (Some(until), Some(more)) = (&open, line.strip_prefix("> ")) {
            let last = commands.last_mut().expect("a command that goes on");
            last.push(line.clone());
            let ends = match &**until {
                "\\" => !more.ends_with('\\'),
                "; }" => more.contains("; }"),
                word => more == word,
            };
            open = open.filter(|_| !ends);
        } else if let Some(command) = line.strip_prefix("$ ") {
            open = command
                .split_once("<<'")
                .and_then(|(_, word)| Some(word.split_once('\'')?.0.to_owned()))
                .or_else(|| command.ends_with('\\').then(|| "\\".to_owned()))
                .or_else(|| {
                    (command.starts_with("{ ") && !command.contains("; }")).then(|| "; }".to_owned())
                });
            commands.push(vec![line.clone()]);
        }
    }
    commands
}

/// What the shell is told.
fn script(command: &[String]) -> String {
    let lines: Vec<&str> = command.iter().map(|line| &line[2..]).collect();
    lines.join("\n")
}

/// A section's shell, folder and terminals.
struct Session {
    folder: tempfile::TempDir,
    server: String,
    shell: Child,
    input: ChildStdin,
    output: BufReader<std::io::PipeReader>,
}

/// The exit code follows what a command said, between two of these.
const MARK: char = '\x1e';

impl Session {
    fn new(number: usize) -> Session {
        let folder = tempfile::tempdir().unwrap();
        let (run, bin) = (folder.path().join(".run"), folder.path().join(".bin"));
        for made in [&run, &bin] {
            std::fs::create_dir(made).unwrap();
        }
        let program = std::env::var_os("GNTTAB").map_or(env!("CARGO_BIN_EXE_gnttab").into(), PathBuf::from);
        let program = std::fs::canonicalize(program).expect("GNTTAB names a program");
        std::os::unix::fs::symlink(program, bin.join("gnttab")).unwrap();
        let (output, both) = std::io::pipe().unwrap();
        let path = std::env::var("PATH").unwrap();
        let mut shell = Command::new("bash");
        shell
            .args(["--norc", "--noprofile"])
            .current_dir(folder.path())
            .env("PATH", format!("{}:{path}", bin.display()))
            .env("XDG_RUNTIME_DIR", &run)
            .env("REPOSITORY", Path::new(TOUR).parent().unwrap().parent().unwrap())
            .envs([
                ("NO_COLOR", "1"),
                ("LC_ALL", "C.UTF-8"),
                ("TERM", "dumb"),
                ("COLUMNS", "110"),
            ])
            .env("PS1", "$ ")
            .env_remove("GNTTAB_TRACE")
            .stdin(Stdio::piped())
            .stdout(both.try_clone().unwrap())
            .stderr(both);
        let mut shell = shell.spawn().unwrap();
        Session {
            server: format!("gnttab-tour-{}-{number}", std::process::id()),
            folder,
            input: shell.stdin.take().unwrap(),
            output: BufReader::new(output),
            shell,
        }
    }

    /// Types a command; what came out, and the exit code.
    fn run(&mut self, command: &str) -> (Vec<String>, String) {
        writeln!(
            self.input,
            "{{ {command}\n}} </dev/null; printf '{MARK}%s{MARK}\\n' $?"
        )
        .unwrap();
        let mut said = String::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "{command}: {said}");
            said.push_str(&line);
            if let Some((before, after)) = said.split_once(MARK)
                && let Some((code, _)) = after.split_once(MARK)
            {
                return (before.lines().map(str::to_owned).collect(), code.to_owned());
            }
        }
    }

    /// The block with what its commands say now.
    fn console(&mut self, lines: &[String]) -> Vec<String> {
        let mut all = Vec::new();
        for command in commands(lines) {
            let (said, code) = self.run(&script(&command));
            let here = self.folder.path().to_str().unwrap().to_owned();
            all.extend(command);
            // What is in the folder has no path, as far as the tour goes.
            all.extend(said.iter().map(|line| {
                let line = line.replace(&format!("{here}/.run"), "/run/user/1000");
                line.replace(&format!("{here}/"), "").trim_end().to_owned()
            }));
            all.extend((code != "0").then(|| format!("[{code}]")));
        }
        all
    }

    fn until(&mut self, command: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (said, code) = self.run(command);
            if code == "0" {
                return;
            }
            assert!(Instant::now() < deadline, "{command}: {said:?}");
            sleep(Duration::from_millis(100));
        }
    }

    fn tmux(&self, args: &[&str]) -> Output {
        let output = Command::new("tmux")
            .args(["-L", &self.server, "-f", "/dev/null"])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        output
    }

    /// A terminal in which a command was typed.
    fn open(&self, name: &str, size: &str, command: &str) {
        let (width, height) = size.split_once('x').unwrap();
        let path = std::env::var("PATH").unwrap();
        let here = self.folder.path().display();
        let shell = format!(
            "cd '{here}'; export PATH='{here}/.bin:{path}' XDG_RUNTIME_DIR='{here}/.run' NO_COLOR=1 LC_ALL=C.UTF-8 PS1='$ '; \
             exec bash --norc --noprofile"
        );
        self.tmux(&["new-session", "-d", "-x", width, "-y", height, "-s", name, &shell]);
        sleep(Duration::from_millis(500));
        self.tmux(&["send-keys", "-t", name, command, "Enter"]);
        sleep(Duration::from_secs(3));
    }

    fn keys(&self, name: &str, keys: &str) {
        for key in keys.split(' ') {
            self.tmux(&["send-keys", "-t", name, key]);
            sleep(Duration::from_millis(300));
        }
        sleep(Duration::from_millis(1200));
    }

    fn screen(&self, name: &str) -> Vec<String> {
        let output = self.tmux(&["capture-pane", "-p", "-t", name]);
        let text = String::from_utf8(output.stdout).unwrap();
        text.trim_end().lines().map(str::to_owned).collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-L", &self.server, "kill-server"])
            .output();
        // Jobs that still run end in order.
        let _ = writeln!(self.input, "kill $(jobs -p) 2>/dev/null; wait; exit");
        let _ = self.shell.wait();
    }
}

/// A directive's words after its name.
fn directive<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.strip_prefix("<!-- ")?
        .strip_suffix(" -->")?
        .strip_prefix(name)
}

/// A section as it comes out now.
fn run(section: &[Part], number: usize, write: bool) -> Vec<Part> {
    let mut session = Session::new(number);
    let has_tmux = Command::new("tmux").arg("-V").output().is_ok();
    let mut shown = String::new();
    let mut now = Vec::new();
    for part in section {
        let lines = match part.kind {
            Kind::Text => {
                for line in &part.lines {
                    if let Some(command) = directive(line, "until: ") {
                        session.until(command);
                    } else if let Some(name) = directive(line, "show ") {
                        name.clone_into(&mut shown);
                    } else if !has_tmux {
                        continue;
                    } else if let Some(rest) = directive(line, "open ") {
                        let (place, command) = rest.split_once(": ").unwrap();
                        let (name, size) = place.split_once(' ').unwrap();
                        session.open(name, size, command);
                    } else if let Some((name, keys)) =
                        directive(line, "type ").and_then(|rest| rest.split_once(": "))
                    {
                        session.keys(name, keys);
                    }
                }
                part.lines.clone()
            }
            Kind::Console(Care::Once) if !write => part.lines.clone(),
            Kind::Console(_) => session.console(&part.lines),
            Kind::Screen if has_tmux => session.screen(&shown),
            Kind::Screen => part.lines.clone(),
        };
        now.push(Part {
            kind: part.kind,
            lines,
        });
    }
    now
}

/// A line without what differs from run to run: numbers, how much room they take, and bars.
fn masked(line: &str) -> String {
    let mut masked = String::new();
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter.is_ascii_digit() {
            masked.push('0');
            if letter == '0' && letters.next_if_eq(&'x').is_some() {
                while letters.next_if(char::is_ascii_hexdigit).is_some() {}
                continue;
            }
            while letters
                .next_if(|next| next.is_ascii_digit() || ".,".contains(*next))
                .is_some()
            {}
            // Thousands have a letter.
            letters.next_if(|next| "kM".contains(*next));
        } else if !('▁'..='█').contains(&letter) {
            masked.push(letter);
        }
    }
    masked.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Where two versions of a section differ.
fn difference(was: &[Part], now: &[Part]) -> Option<String> {
    for (was, now) in was.iter().zip(now) {
        let mask = matches!(was.kind, Kind::Screen | Kind::Console(Care::Varies));
        let seen = |part: &Part| -> Vec<String> {
            let lines = part.lines.iter();
            if mask {
                lines.map(|line| masked(line)).collect()
            } else {
                lines.cloned().collect()
            }
        };
        let (before, after) = (seen(was), seen(now));
        if before != after {
            let same = before
                .iter()
                .zip(&after)
                .take_while(|(was, now)| was == now)
                .count();
            let line = |lines: &[String]| lines.get(same).cloned().unwrap_or_default();
            return Some(format!(
                "in docs/tour.md: {}\nnow:             {}\nof:\n{}",
                line(&was.lines),
                line(&now.lines),
                now.lines.join("\n")
            ));
        }
    }
    None
}

/// The parts of each section.
fn sections(parts: Vec<Part>) -> Vec<Vec<Part>> {
    let text: Vec<String> = joined(&parts).lines().map(str::to_owned).collect();
    let mut sections: Vec<Vec<String>> = vec![Vec::new()];
    for line in text {
        if line.starts_with("## ") {
            sections.push(Vec::new());
        }
        sections.last_mut().expect("one").push(line);
    }
    let whole = |lines: &Vec<String>| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    sections.iter().map(|lines| self::parts(&whole(lines))).collect()
}

#[test]
fn the_tour_is_what_the_commands_say() {
    let write = std::env::var_os("GNTTAB_TOUR").is_some_and(|asked| asked == "write");
    let tour = std::fs::read_to_string(TOUR).unwrap();
    let sections = sections(parts(&tour));
    let mut written = String::new();
    let mut differences = Vec::new();
    for (number, section) in sections.iter().enumerate() {
        let mut now = run(section, number, write);
        // A machine that is busy with something else may be late, though not each time.
        for _ in 0..3 {
            if !write && difference(section, &now).is_some() {
                now = run(section, number, write);
            }
        }
        if !write {
            differences.extend(difference(section, &now));
        }
        written.push_str(&joined(&now));
    }
    if write {
        std::fs::write(TOUR, written).unwrap();
    } else {
        assert!(differences.is_empty(), "{}", differences.join("\n\n"));
    }
}

#[test]
fn the_tour_shows_every_command() {
    let help = Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .arg("--help")
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let list = help
        .split("\nCommands:\n")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    let names: Vec<&str> = list
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(names.len() > 10, "{names:?}");
    let tour = std::fs::read_to_string(TOUR).unwrap();
    for name in names {
        let shown = tour
            .lines()
            .any(|line| line.starts_with("$ ") && format!("{line} ").contains(&format!("gnttab {name} ")));
        assert!(shown, "docs/tour.md shows no `gnttab {name}`");
    }
}

#[test]
fn a_part_comes_back_as_it_was_and_a_difference_is_found() {
    let text = "# A\n```console\n$ a <<'END'\n> b\n> END\n> c\n[1]\n$ d \\\n> e\n```\n<!-- show x -->\n```text\nat 9.5k ▁█ x\n```\n";
    let was = parts(text);
    assert_eq!(joined(&was), text);
    let typed: Vec<String> = commands(&was[1].lines)
        .iter()
        .map(|command| script(command))
        .collect();
    assert_eq!(typed, ["a <<'END'\nb\nEND", "d \\\ne"]);
    for other in ["12   ▃", "0x3f"] {
        assert_eq!(difference(&was, &parts(&text.replace("9.5k ▁█", other))), None);
    }
    assert!(difference(&was, &parts(&text.replace("at 9", "on 9"))).is_some());
    assert!(difference(&was, &parts(&text.replace("> c", "> 7"))).is_some());
}
