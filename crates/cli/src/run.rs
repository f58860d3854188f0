//! `gnttab run`: a machine from a file.

use std::time::{Duration, Instant};

use gnttab_engine::{Limits, Version};
use serde_json::{Value, json};
use toml::Spanned;

use crate::args::Run;
use crate::control;
use crate::failure::Failure;
use crate::image::Image;
use crate::live::Stop;
use crate::machine::{self, Disk, Domain, Machine, Name};
use crate::nbd::listener::Listener;
use crate::nbd::server::Totals;
use crate::output;
use crate::roles::{News, Sum, Word};
use crate::session::{DiskPlan, DomainPlan, Event, JobPlan, ProgramPlan, RingPlan, Session};

/// Runs the machine until it is told to stop or every program has ended.
pub(crate) fn main(args: &Run) -> Result<(), Failure> {
    if args.example {
        output::line(machine::EXAMPLE.trim_end());
        return Ok(());
    }
    let Some(path) = &args.machine else {
        return Err(Failure::wrong_use("no machine file given").next("see: gnttab run --help"));
    };
    let machine = Machine::load(path)?;
    let talk = Talk { json: args.json };
    if args.check {
        let (domains, disks) = (machine.domains.len(), machine.disks.len());
        talk.tell(
            json!({ "event": "checked", "domains": domains, "disks": disks }),
            &format!(
                "{}: {}, {}, no mistakes found",
                path.display(),
                output::count(domains, "domain"),
                output::count(disks, "disk")
            ),
        );
        return Ok(());
    }
    let name = path
        .file_stem()
        .map_or_else(|| "machine".into(), |stem| stem.to_string_lossy().into_owned());
    run(&name, &machine, args.join, talk)
}

fn run(name: &str, machine: &Machine, join: bool, talk: Talk) -> Result<(), Failure> {
    let stop = Stop::new()?;
    let domains = machine
        .domains
        .iter()
        .map(domain_plan)
        .collect::<Result<Vec<_>, _>>()?;
    let disks = machine
        .disks
        .iter()
        .map(|disk| disk_plan(disk, machine))
        .collect::<Result<Vec<_>, _>>()?;
    let addresses: Vec<Option<String>> = disks
        .iter()
        .map(|disk| match &disk.job {
            JobPlan::Export(listener) => Some(listener.to_string()),
            JobPlan::Role(_) | JobPlan::Program => None,
        })
        .collect();
    let mut programs = domains
        .iter()
        .filter(|domain| matches!(domain.program, ProgramPlan::Executable(..)))
        .count();
    let has_programs = programs > 0;
    let started = Instant::now();
    let mut session = Session::start(name, domains, disks)?;
    if join {
        let path = control::let_join(name, session.monitor())?;
        talk.tell(
            json!({ "event": "joinable", "address": path }),
            &format!("programs may join at {}", path.display()),
        );
    }
    for domain in session.infos() {
        let pid = domain.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        talk.tell(
            json!({ "event": "started", "id": domain.id, "name": domain.name, "pid": domain.pid, "isolated": domain.isolated }),
            &format!("d{} {}, process {pid}", domain.id, domain.name),
        );
    }
    let mut bad = Vec::new();
    let mut totals = vec![Sum::default(); addresses.len()];
    let mut announced = vec![false; addresses.len()];
    while !stop.asked_within(Duration::ZERO) && (!has_programs || programs > 0) {
        match session.next_event(Duration::from_millis(200))? {
            Some(Event::Word {
                word: Word { disk, news },
                ..
            }) => {
                if let Some(totals) = totals.get_mut(disk) {
                    totals.hear(&news);
                }
                let address = addresses.get(disk).cloned().flatten();
                if news == News::Ready
                    && let Some(address) = address.filter(|_| !std::mem::replace(&mut announced[disk], true))
                {
                    talk.serving(disk, &machine.disks[disk], &address);
                }
            }
            Some(Event::Restarted { name, how }) => talk.tell(
                json!({ "event": "restarted", "domain": name, "how": how }),
                &format!("domain {name} {how}; another has taken its place"),
            ),
            Some(Event::Ended { name, how, good }) => {
                programs -= 1;
                talk.tell(
                    json!({ "event": "ended", "domain": name, "how": how }),
                    &format!("domain {name} {how}"),
                );
                bad.extend((!good).then(|| format!("domain {name} {how}")));
            }
            None => {}
        }
    }
    session.stop(|word| {
        if let Some(totals) = totals.get_mut(word.disk) {
            totals.hear(&word.news);
        }
    })?;
    let totals: Vec<Totals> = totals.iter().map(Sum::now).collect();
    let seconds = started.elapsed().as_secs_f64();
    talk.tell(
        json!({ "event": "stopped", "seconds": seconds, "disks": totals }),
        &format!("stopped after {seconds:.1} s"),
    );
    if bad.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(bad.join("; ")))
    }
}

/// What happens, for people or programs.
#[derive(Debug, Clone, Copy)]
struct Talk {
    json: bool,
}

impl Talk {
    fn tell(self, event: Value, text: &str) {
        if self.json {
            output::json("run", event);
        } else {
            output::say(text);
        }
    }

    /// The address alone is data.
    fn serving(self, number: usize, disk: &Disk, address: &str) {
        let image = disk.image.get_ref();
        if self.json {
            output::json(
                "run",
                json!({ "event": "serving", "disk": number, "image": image, "address": address }),
            );
        } else {
            output::line(&format!("{} {address}", image.display()));
        }
    }
}

fn domain_plan(domain: &Domain) -> Result<DomainPlan, Failure> {
    let name = domain.name.get_ref();
    let version = if domain.max_grant_version.get() == 1 {
        Version::V1
    } else {
        Version::V2
    };
    let limits = Limits {
        grant_frames: Some(domain.grant_frames.get()),
        maptrack_frames: Some(domain.maptrack_frames.get()),
        version,
        vcpus: usize::try_from(domain.vcpus.get()).unwrap_or(1),
        ..Limits::default()
    };
    let program = match &domain.program {
        None => ProgramPlan::Disks,
        Some((path, arguments)) => {
            if !path.is_file() {
                return Err(
                    Failure::new(format!("domain {name}: program {}: no such file", path.display()))
                        .next("build it, or correct the machine file's path"),
                );
            }
            ProgramPlan::Executable(path.clone(), arguments.clone())
        }
    };
    let ram_pages = u32::try_from(domain.memory.pages()).unwrap_or(u32::MAX);
    Ok(DomainPlan {
        name: name.to_string(),
        ram_pages,
        limits,
        program,
    })
}

fn disk_plan(disk: &Disk, machine: &Machine) -> Result<DiskPlan, Failure> {
    let number = |name: &Spanned<Name>| {
        machine
            .domains
            .iter()
            .position(|domain| domain.name == *name)
            .unwrap_or(0)
    };
    let image = Image::open(disk.image.get_ref(), disk.read_only)?;
    let listener = match (&disk.socket, &disk.port) {
        (Some(path), _) => Some(Listener::unix(path.get_ref())),
        (None, Some(port)) => Some(Listener::tcp(*port.get_ref())),
        (None, None) => None,
    };
    let job = match listener {
        Some(Ok(listener)) => JobPlan::Export(listener),
        Some(Err(error)) => {
            return Err(Failure::new(error).next("choose another in the machine file"));
        }
        None => JobPlan::Program,
    };
    Ok(DiskPlan {
        image,
        backend: number(&disk.backend),
        frontend: number(&disk.frontend),
        rings: RingPlan {
            queues: disk.queues.get(),
            order: disk.ring_order.get(),
            sharing: disk.sharing,
        },
        job,
    })
}
