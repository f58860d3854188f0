//! `gnttab demo`: a disk served from one domain to another, and a hostile third.

pub(crate) mod report;
mod trouble;
pub(crate) mod workload;

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::Path;
use std::time::{Duration, Instant};

use gnttab_host::monitor::{Counters, DomainInfo};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha256};

use crate::args::Demo;
use crate::failure::Failure;
use crate::image::Image;
use crate::live::Stop;
use crate::output;
use crate::roles::{News, Sharing, Word, frontend::Job, hostile};
use crate::session::{DiskPlan, DomainPlan, Event, JobPlan, ProgramPlan, RingPlan, Session};
use report::{AttemptGroup, Check, DiskReport, DomainLine, Paint, Report, SharedLine};
use workload::Outcome;

/// Bytes of the generated image.
const GENERATED: u64 = 64 << 20;
/// The most that is used of a given one.
const MOST: u64 = 256 << 20;
/// The whole demo takes less than this, or has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// The number of the hostile domain: the third.
const HOSTILE: u16 = 3;

/// Runs the demo and shows what came of it.
pub(crate) fn main(args: &Demo) -> Result<(), Failure> {
    if args.trouble {
        return trouble::main(args);
    }
    let started = Instant::now();
    let stop = Stop::new()?;
    let mut talk = Talk::new(args.json);
    talk.phase("making the disk");
    let image = image(args.image.as_deref())?;
    let disk = image.file().try_clone().map_err(|error| no_image(&error))?;
    let digest_before = digest(&disk)?;
    let (name, size) = (image.name().to_owned(), image.size());

    talk.phase("starting a monitor and three domains");
    let rings = RingPlan {
        queues: 1,
        order: 1,
        sharing: Sharing::Persistent,
    };
    let job = JobPlan::Role(Job::Work { bait: HOSTILE });
    let plan = DiskPlan {
        image,
        backend: 0,
        frontend: 1,
        rings,
        job,
    };
    let domains = vec![DomainPlan::new("backend"), DomainPlan::new("frontend")];
    let mut session = Session::start(&format!("demo-{}", std::process::id()), domains, vec![plan])?;
    let victims = session.infos();
    session.add(hostile_plan(&victims)?)?;
    let domains = session.infos();

    let mut seen = Seen::default();
    while seen.outcome.is_none() || seen.attempts.is_none() {
        if stop.asked_within(Duration::ZERO) {
            return Err(Failure::new("interrupted before the end"));
        }
        if started.elapsed() > PATIENCE {
            return Err(Failure::new(format!("not done after {} s", PATIENCE.as_secs())).next(seen.missing()));
        }
        match session.next_event(Duration::from_millis(100))? {
            Some(Event::Word {
                domain,
                word: Word { news, .. },
            }) => {
                seen.hear(domain, news, &session, &mut talk)?;
            }
            Some(Event::Restarted { name, how }) => return Err(Failure::new(format!("domain {name} {how}"))),
            Some(Event::Ended {
                name,
                how,
                good: false,
            }) => {
                return Err(Failure::new(format!("domain {name} {how}")));
            }
            Some(Event::Ended { .. }) | None => {}
        }
    }
    talk.phase("taking everything down");
    let left = session.stop(|_| {})?;
    let digest_after = digest(&disk)?;
    talk.end();

    let (Some(outcome), Some(hostile)) = (seen.outcome, seen.attempts) else {
        return Ok(());
    };
    let disk = DiskReport {
        image: name,
        size,
        digest_before,
        digest_after,
        outcome: *outcome,
        grant_operations: seen.grant_operations,
    };
    let checks = checks(&domains, &disk, &hostile, left);
    let report = Report {
        held: checks.iter().all(|check| check.held),
        seconds: started.elapsed().as_secs_f64(),
        domains: domains.iter().map(line).collect(),
        shared: seen.shared,
        disk,
        hostile,
        checks,
    };
    show(args, &report)
}

fn show(args: &Demo, report: &Report) -> Result<(), Failure> {
    if args.json {
        let report = serde_json::to_value(report).map_err(|error| Failure::new(format!("JSON: {error}")))?;
        output::json("demo", report);
    } else {
        output::line(report.screen(Paint(output::colour_on_stdout())).trim_end());
    }
    if report.held {
        Ok(())
    } else {
        Err(Failure::new("not all of it held")
            .next("what did not is above")
            .in_data())
    }
}

/// What was heard from the domains, and looked up.
#[derive(Default)]
struct Seen {
    outcome: Option<Box<Outcome>>,
    attempts: Option<Vec<AttemptGroup>>,
    shared: Vec<SharedLine>,
    grant_operations: u64,
}

impl Seen {
    /// Each domain is believed about its own part only.
    fn hear(&mut self, domain: usize, news: News, session: &Session, talk: &mut Talk) -> Result<(), Failure> {
        match news {
            News::Attempts(attempts) if domain == 2 => self.attempts = Some(attempts),
            _ if domain != 1 => {}
            News::Phase(phase) => talk.phase(&format!("d2 frontend: {phase}")),
            News::Outcome(outcome) => {
                self.shared = shared(session);
                let operations = session.infos().into_iter().filter(|domain| domain.id != HOSTILE);
                self.grant_operations = operations
                    .flat_map(|domain| domain.operations.into_values())
                    .sum();
                self.outcome = Some(outcome);
            }
            News::Failed(why) => return Err(Failure::new(format!("d2 frontend: {why}"))),
            News::Ready | News::Totals(_) | News::Attempts(_) | News::Paces(_) | News::Served(_) => {}
        }
        Ok(())
    }

    fn missing(&self) -> &'static str {
        match (&self.outcome, &self.attempts) {
            (None, _) => "the frontend had not finished; is the machine very busy?",
            _ => "the hostile domain had not finished; is the machine very busy?",
        }
    }
}

/// The image that the demo writes to: in memory, so that nothing of the person's is changed.
fn image(path: Option<&Path>) -> Result<Image, Failure> {
    match path {
        None => Image::generate(GENERATED).map_err(|error| no_image(&error)),
        Some(path) => Image::open(path, true)?
            .copy_to_memory(MOST)
            .map_err(|error| no_image(&error)),
    }
}

fn no_image(error: &io::Error) -> Failure {
    Failure::new(format!("image in memory: {error}")).next("is there memory enough? the demo needs 512 MiB")
}

fn digest(mut file: &File) -> Result<String, Failure> {
    let mut digest = Sha256::new();
    let mut bytes = vec![0; 1 << 20];
    file.rewind().map_err(|error| no_image(&error))?;
    loop {
        match file.read(&mut bytes).map_err(|error| no_image(&error))? {
            0 => return Ok(workload::hex(digest)),
            count => digest.update(&bytes[..count]),
        }
    }
}

fn hostile_plan(victims: &[DomainInfo]) -> Result<DomainPlan, Failure> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let pid = |domain: &DomainInfo| domain.pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
    let named = |domain: &DomainInfo| format!("the {}", domain.name);
    let mut processes = vec![("the monitor".to_owned(), own)];
    processes.extend(victims.iter().map(|domain| (named(domain), pid(domain))));
    let orders = hostile::Orders {
        processes,
        domains: victims.iter().map(|domain| (named(domain), domain.id)).collect(),
        bait: 2,
    };
    let orders = serde_json::to_string(&orders).map_err(|error| Failure::new(format!("orders: {error}")))?;
    Ok(DomainPlan {
        program: ProgramPlan::Role("hostile", orders),
        ..DomainPlan::new("hostile")
    })
}

/// Who has granted what to whom, and how much of it is mapped.
fn shared(session: &Session) -> Vec<SharedLine> {
    let mut lines = Vec::new();
    let domains = session.infos();
    for granter in &domains {
        let grants = session
            .monitor()
            .grants(gnttab_abi::DomId(granter.id))
            .unwrap_or_default();
        for grantee in &domains {
            let granted = grants.iter().filter(|grant| grant.grantee == grantee.id).count();
            if granted > 0 {
                lines.push(SharedLine {
                    granter: format!("d{} {}", granter.id, granter.name),
                    grantee: format!("d{} {}", grantee.id, grantee.name),
                    granted_pages: granted as u64,
                    mapped_pages: grantee.maps.get(&granter.id).copied().unwrap_or(0).into(),
                    purpose: if grantee.id == HOSTILE {
                        "bait"
                    } else {
                        "rings and data of the disk"
                    }
                    .to_owned(),
                });
            }
        }
    }
    lines
}

fn line(domain: &DomainInfo) -> DomainLine {
    let mut walls = Vec::new();
    if let Some(isolation) = &domain.isolation {
        for (there, wall) in [
            (isolation.system_calls, "seccomp".to_owned()),
            (
                isolation.landlock.files,
                format!("Landlock {}", isolation.landlock.abi),
            ),
            (
                isolation.own_user.is_some(),
                format!("user {}", isolation.own_user.unwrap_or(0)),
            ),
            (isolation.no_capabilities, "no capabilities".to_owned()),
            (isolation.undumpable, "undumpable".to_owned()),
            (isolation.nameless, "no file names".to_owned()),
        ] {
            if there {
                walls.push(wall);
            }
        }
    }
    DomainLine {
        id: format!("d{}", domain.id),
        name: domain.name.clone(),
        pid: domain.pid,
        isolated: domain.isolated,
        walls,
    }
}

/// The rules that had to hold.
fn checks(domains: &[DomainInfo], disk: &DiskReport, hostile: &[AttemptGroup], left: Counters) -> Vec<Check> {
    let outcome = &disk.outcome;
    let same = |rule: &str, one: &str, other: &str| Check {
        rule: rule.to_owned(),
        held: one == other && !one.is_empty(),
        seen: if one == other {
            format!("sha256 {}", short(one))
        } else {
            format!("{} is not {}", short(one), short(other))
        },
    };
    let isolated = domains.iter().filter(|domain| domain.isolated).count();
    let attempts = hostile.iter().flat_map(|group| &group.attempts);
    let (tried, got) = (
        attempts.clone().count(),
        attempts.filter(|attempt| attempt.succeeded).count(),
    );
    let (compared, wrong) = (outcome.small_blocks_compared, outcome.small_blocks_wrong);
    vec![
        Check {
            rule: "every domain is isolated".to_owned(),
            held: isolated == domains.len() && isolated == 3,
            seen: format!("{isolated} of {}", domains.len()),
        },
        same(
            "the frontend read what the image held",
            &outcome.found,
            &disk.digest_before,
        ),
        same(
            "what it read back is what it had written",
            &outcome.read_back,
            &outcome.written,
        ),
        same(
            "what it wrote is in the image",
            &outcome.written,
            &disk.digest_after,
        ),
        Check {
            rule: "every 4 KiB block was the right one".to_owned(),
            held: wrong == 0 && compared > 0,
            seen: format!("{compared} compared, {wrong} wrong"),
        },
        Check {
            rule: "the hostile domain got nothing".to_owned(),
            held: got == 0 && tried > 0,
            seen: format!("{tried} tried, {got} let in"),
        },
        Check {
            rule: "nothing was left behind".to_owned(),
            held: left.running == 0 && left.dying == 0 && left.memories == 0 && left.page_references == 0,
            seen: format!(
                "{} domains, {} pages referenced",
                left.running + left.dying,
                left.page_references
            ),
        },
    ]
}

fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

/// What is said while it runs.
struct Talk {
    line: ProgressBar,
}

impl Talk {
    fn new(quiet: bool) -> Self {
        let line = if quiet || !output::stderr_is_live() {
            ProgressBar::hidden()
        } else {
            let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        };
        line.enable_steady_tick(Duration::from_millis(100));
        Talk { line }
    }

    fn phase(&mut self, phase: &str) {
        self.line.set_message(phase.to_owned());
    }

    fn end(&self) {
        self.line.finish_and_clear();
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.end();
    }
}
