//! What the demo ends with: the same outcome as a screen and as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};

use super::workload::{Outcome, Pace};
use crate::live::per_second;
use crate::output::{self, columns};

/// The outcome of a demo.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    /// Whether all of it held.
    pub(crate) held: bool,
    /// How long it took.
    pub(crate) seconds: f64,
    /// Who took part.
    pub(crate) domains: Vec<DomainLine>,
    /// Who shared what with whom, at the time of most sharing.
    pub(crate) shared: Vec<SharedLine>,
    /// The disk and what crossed it.
    pub(crate) disk: DiskReport,
    /// What the hostile domain tried.
    pub(crate) hostile: Vec<AttemptGroup>,
    /// The rules that had to hold, and whether each did.
    pub(crate) checks: Vec<Check>,
}

/// One domain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct DomainLine {
    /// Its number, as `d1`.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Its process.
    pub(crate) pid: Option<u32>,
    /// Whether every wall that matters stands.
    pub(crate) isolated: bool,
    /// What keeps it in.
    pub(crate) walls: Vec<String>,
}

/// Pages that one domain let another use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct SharedLine {
    /// The granter.
    pub(crate) granter: String,
    /// The grantee.
    pub(crate) grantee: String,
    /// Pages that the granter had granted.
    pub(crate) granted_pages: u64,
    /// Mappings that the grantee held.
    pub(crate) mapped_pages: u64,
    /// What for.
    pub(crate) purpose: String,
}

/// The disk, as it went across.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct DiskReport {
    /// The image's name.
    pub(crate) image: String,
    /// Its bytes.
    pub(crate) size: u64,
    /// Digest of the image before, taken where the frontend cannot see.
    pub(crate) digest_before: String,
    /// And after.
    pub(crate) digest_after: String,
    /// What the frontend did and saw.
    pub(crate) outcome: Outcome,
    /// Grant operations (maps, unmaps, copies) that all of it took.
    pub(crate) grant_operations: u64,
}

/// Attempts of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct AttemptGroup {
    /// On what.
    pub(crate) target: String,
    /// Each of them.
    pub(crate) attempts: Vec<Attempt>,
}

/// One thing that the hostile domain tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attempt {
    /// What.
    pub(crate) name: String,
    /// Whether it was let.
    pub(crate) succeeded: bool,
    /// What it was told.
    pub(crate) answer: String,
}

/// A rule, and whether it held.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Check {
    /// The rule.
    pub(crate) rule: String,
    /// Whether it held.
    pub(crate) held: bool,
    /// What was seen.
    pub(crate) seen: String,
}

impl Report {
    /// Attempts in all.
    pub(crate) fn tried(&self) -> usize {
        self.hostile.iter().map(|group| group.attempts.len()).sum()
    }

    /// Attempts that were let.
    pub(crate) fn got(&self) -> usize {
        self.hostile
            .iter()
            .flat_map(|group| &group.attempts)
            .filter(|attempt| attempt.succeeded)
            .count()
    }

    /// The screen.
    pub(crate) fn screen(&self, paint: Paint) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text, paint);
        text
    }

    fn write(&self, text: &mut String, paint: Paint) -> fmt::Result {
        writeln!(text, "{}", paint.title("Domains, each a process of its own"))?;
        let rows = self.domains.iter().map(|domain| {
            [
                domain.id.clone(),
                domain.name.clone(),
                process(domain.pid),
                domain.walls.join(", "),
            ]
        });
        writeln!(text, "{}", columns(rows, &[]))?;

        writeln!(text, "{}", paint.title("Shared, and with whom"))?;
        let rows = self.shared.iter().map(|shared| {
            [
                format!("{} to {}", shared.granter, shared.grantee),
                format!(
                    "{} pages granted, {} mapped",
                    shared.granted_pages, shared.mapped_pages
                ),
                shared.purpose.clone(),
            ]
        });
        writeln!(text, "{}", columns(rows, &[]))?;

        let disk = &self.disk;
        let title = format!("Disk {}, {}", disk.image, output::bytes(disk.size));
        writeln!(text, "{}", paint.title(&title))?;
        let outcome = &disk.outcome;
        let rows = [
            (
                "read for the first time, making pages shareable",
                outcome.first_reads,
            ),
            ("written, 4 KiB all over it", outcome.small_writes),
            ("written, 256 KiB at a time, then flushed", outcome.large_writes),
            ("read back, 256 KiB at a time", outcome.large_reads),
            ("read back, 4 KiB all over it", outcome.small_reads),
        ]
        .map(|(what, pace)| {
            [
                what.to_owned(),
                format!("{} in {:.2} s", output::bytes(pace.bytes), pace.seconds),
                format!("{}/s", output::bytes(per_second(pace.bytes, pace.seconds))),
                format!("{} requests/s", per_second(pace.requests, pace.seconds)),
            ]
        });
        write!(text, "{}", columns(rows, &[1, 2, 3]))?;
        let requests = self.requests();
        writeln!(
            text,
            "  {requests} requests took {} grant operations\n",
            disk.grant_operations
        )?;

        let title = format!(
            "The hostile domain tried {} things and got {}",
            self.tried(),
            self.got()
        );
        writeln!(text, "{}", paint.title(&title))?;
        let rows = self.hostile.iter().map(|group| {
            [
                group.target.clone(),
                format!("{} tried", group.attempts.len()),
                answers(group),
            ]
        });
        write!(text, "{}", columns(rows, &[1]))?;
        let let_in = self
            .hostile
            .iter()
            .flat_map(|group| &group.attempts)
            .filter(|attempt| attempt.succeeded);
        for attempt in let_in {
            writeln!(
                text,
                "  {} {}: {}",
                paint.bad("got"),
                attempt.name,
                attempt.answer
            )?;
        }
        writeln!(text)?;

        writeln!(text, "{}", paint.title("What had to hold"))?;
        for check in &self.checks {
            let mark = if check.held {
                paint.good("held  ")
            } else {
                paint.bad("BROKEN")
            };
            writeln!(text, "  {mark}  {}: {}", check.rule, check.seen)?;
        }
        writeln!(text)?;
        if self.held {
            let time = format!("in {:.1} s", self.seconds);
            writeln!(text, "{} {time}", paint.good("All of it held,"))
        } else {
            let broken = self.checks.iter().filter(|check| !check.held).count();
            writeln!(
                text,
                "{}",
                paint.bad(&format!("Not all of it held: {broken} of {}", self.checks.len()))
            )
        }
    }

    fn requests(&self) -> u64 {
        let outcome = &self.disk.outcome;
        let all = [
            outcome.first_reads,
            outcome.small_writes,
            outcome.large_writes,
            outcome.large_reads,
            outcome.small_reads,
        ];
        all.iter().map(|pace: &Pace| pace.requests).sum()
    }
}

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(|| "-".to_owned(), |pid| format!("pid {pid}"))
}

/// How the attempts of a group were answered, most frequent first.
fn answers(group: &AttemptGroup) -> String {
    let mut counts = BTreeMap::<&str, usize>::new();
    for attempt in group.attempts.iter().filter(|attempt| !attempt.succeeded) {
        *counts.entry(&attempt.answer).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let shown = counts
        .iter()
        .take(3)
        .map(|(answer, count)| format!("{answer} ({count})"));
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if counts.len() > 2 {
        text.push_str(", ...");
    }
    text
}

/// Colours, or none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint(pub(crate) bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn title(self, text: &str) -> String {
        self.with("1", text)
    }

    fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    fn bad(self, text: &str) -> String {
        self.with("1;31", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(succeeded: bool) -> Report {
        let pace = Pace {
            requests: 256,
            bytes: 64 << 20,
            seconds: 0.5,
        };
        let attempt = |name: &str, answer: &str| Attempt {
            name: name.to_owned(),
            succeeded: succeeded && name == "ptrace",
            answer: answer.to_owned(),
        };
        Report {
            held: !succeeded,
            seconds: 6.25,
            domains: vec![DomainLine {
                id: "d1".to_owned(),
                name: "backend".to_owned(),
                pid: Some(4711),
                isolated: true,
                walls: vec!["seccomp".to_owned(), "Landlock".to_owned()],
            }],
            shared: vec![SharedLine {
                granter: "d2".to_owned(),
                grantee: "d1".to_owned(),
                granted_pages: 1060,
                mapped_pages: 1060,
                purpose: "ring and data".to_owned(),
            }],
            disk: DiskReport {
                image: "generated".to_owned(),
                size: 64 << 20,
                digest_before: "aa".to_owned(),
                digest_after: "bb".to_owned(),
                outcome: Outcome {
                    large_reads: pace,
                    ..Outcome::default()
                },
                grant_operations: 12,
            },
            hostile: vec![AttemptGroup {
                target: "the monitor".to_owned(),
                attempts: vec![
                    attempt("ptrace", "EPERM"),
                    attempt("kill", "EPERM"),
                    attempt("open", "EACCES"),
                ],
            }],
            checks: vec![Check {
                rule: "the hostile domain gets nothing".to_owned(),
                held: !succeeded,
                seen: "3 attempts".to_owned(),
            }],
        }
    }

    #[test]
    fn the_screen_says_what_was_tried_and_what_it_got() {
        let screen = report(false).screen(Paint(false));
        for words in [
            "The hostile domain tried 3 things and got 0",
            "EPERM (2), EACCES (1)",
            "d2 to d1",
            "128 MiB/s",
            "256 requests took 12 grant operations",
            "All of it held, in 6.2 s",
        ] {
            assert!(screen.contains(words), "no '{words}' in:\n{screen}");
        }
        assert!(!screen.contains('\x1b'));
    }

    #[test]
    fn what_succeeded_is_said_by_name() {
        let screen = report(true).screen(Paint(true));
        for words in [
            "tried 3 things and got 1",
            "ptrace: EPERM",
            "BROKEN",
            "Not all of it held: 1 of 1",
            "\x1b[1;31m",
        ] {
            assert!(screen.contains(words), "no '{words}' in:\n{screen}");
        }
    }
}
