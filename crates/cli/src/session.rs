//! A running machine: a monitor, domains, and the disks between them, made and unmade as a whole.
//!
//! What must hold: an error on the way up leaves no process, no socket and no lock behind; a backend that dies is
//! replaced by another that serves the same image, so that users of the disk see a pause and no error; when a frontend dies
//! another exports the image; when both die, in whatever order and at whatever distance, both are replaced; and the way down is in order: users first, then frontends, then backends.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use gnttab_engine::Limits;
use gnttab_host::control::Control;
use gnttab_host::launch::Program;
use gnttab_host::monitor::{Counters, DomainInfo, DomainSpec, Ended, Monitor, MonitorError, Settings};
use gnttab_io::blkif::handshake as toolstack;
use gnttab_io::blkif::handshake::{BackendLimits, DeviceMode, VbdSpec, VirtualDevice};
use gnttab_io::xenbus::{Store as _, Tx, XenbusState, read_state};

use crate::control;
use crate::failure::Failure;
use crate::image::Image;
use crate::nbd::listener::Listener;
use crate::output;
use crate::roles::{DISKS, Orders, Sharing, Word, backend, frontend, shutdown_node};
use crate::store::StoreClient;

/// How long domains may take to let go of a disk.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often domains that are to end are looked after.
const LOOK: Duration = Duration::from_millis(100);
/// A line of a domain's output may have so many bytes.
const LINE: u64 = 64 << 10;
/// A disk whose domains end more often than this in [`RESTART_TIME`] is given up.
const RESTARTS: usize = 5;
/// See [`RESTARTS`].
const RESTART_TIME: Duration = Duration::from_secs(60);

/// A domain to be made.
#[derive(Debug, Clone)]
pub(crate) struct DomainPlan {
    /// What people call it.
    pub(crate) name: String,
    /// Pages of memory.
    pub(crate) ram_pages: u32,
    /// What its grant table may be.
    pub(crate) limits: Limits,
    /// What it runs.
    pub(crate) program: ProgramPlan,
}

/// What a domain runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ProgramPlan {
    /// It serves and uses its disks.
    Disks,
    /// Another role, with its orders.
    Role(&'static str, String),
    /// A program, with its arguments.
    Executable(PathBuf, Vec<String>),
}

impl DomainPlan {
    /// A domain of 64 MiB that serves and uses its disks.
    pub(crate) fn new(name: &str) -> Self {
        DomainPlan {
            name: name.to_owned(),
            ram_pages: 16 * 1024,
            limits: Limits::default(),
            program: ProgramPlan::Disks,
        }
    }
}

/// A disk to be made: the domains are numbered as their plans are.
#[derive(Debug)]
pub(crate) struct DiskPlan {
    /// The image; open and locked.
    pub(crate) image: Image,
    /// Who serves it.
    pub(crate) backend: usize,
    /// Who uses it.
    pub(crate) frontend: usize,
    /// How they talk.
    pub(crate) rings: RingPlan,
    /// What the frontend does with it.
    pub(crate) job: JobPlan,
}

/// How a frontend and its backend talk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingPlan {
    /// Rings.
    pub(crate) queues: u32,
    /// Each of 2^n pages.
    pub(crate) order: u32,
    /// How the backend reaches the frontend's pages.
    pub(crate) sharing: Sharing,
}

/// What a frontend does with its disk.
#[derive(Debug)]
pub(crate) enum JobPlan {
    /// Exports it here.
    Export(Listener),
    /// Something else that the role does.
    Role(frontend::Job),
    /// Whatever its program does.
    Program,
}

/// A domain that runs, or ran.
#[derive(Debug)]
struct Running {
    plan: DomainPlan,
    id: DomId,
    /// How it ended, once the monitor has said so.
    ended: Option<Ended>,
}

/// Something to tell the person about.
#[derive(Debug)]
pub(crate) enum Event {
    /// A domain said something. Whether it may say that of itself is for whoever hears it to judge.
    Word {
        /// Which, as the plans number them.
        domain: usize,
        /// What.
        word: Word,
    },
    /// A domain ended by itself, and another has taken its place.
    Restarted {
        /// Its name.
        name: String,
        /// How it had ended.
        how: String,
    },
    /// A domain with something else to do than disks has ended.
    Ended {
        /// Its name.
        name: String,
        /// How.
        how: String,
        /// With exit code 0.
        good: bool,
    },
}

/// Both ends of what domains say, with their numbers.
type Words = (mpsc::Sender<(usize, Word)>, mpsc::Receiver<(usize, Word)>);

/// See the module. Dropping it ends every domain at once; [`Session::stop`] does it in order.
#[derive(Debug)]
pub(crate) struct Session {
    // Declared first: nobody asks about a machine that is going away.
    _control: Control,
    monitor: Arc<Monitor>,
    store: StoreClient,
    disks: Vec<DiskPlan>,
    domains: Vec<Running>,
    words: Words,
    restarts: Vec<Instant>,
}

impl Session {
    /// Makes a machine. `name` is what its control socket is called.
    pub(crate) fn start(name: &str, domains: Vec<DomainPlan>, disks: Vec<DiskPlan>) -> Result<Self, Failure> {
        let monitor = Arc::new(Monitor::start(Settings::default()).map_err(failed)?);
        let control = control::open(name, Arc::clone(&monitor))?;
        let store = StoreClient::new(monitor.store().connect().map_err(failed)?);
        let mut session = Session {
            _control: control,
            monitor,
            store,
            disks,
            domains: Vec::new(),
            words: mpsc::channel(),
            restarts: Vec::new(),
        };
        // Numbers first: orders name the directories of both sides.
        for (plan, number) in domains.into_iter().zip(1..) {
            session.domains.push(Running {
                plan,
                id: DomId(number),
                ended: None,
            });
        }
        for index in 0..session.domains.len() {
            session.create(index)?;
        }
        for disk in 0..session.disks.len() {
            let spec = session.vbd(disk);
            toolstack::create(&mut session.store, &spec).map_err(failed)?;
        }
        Ok(session)
    }

    /// Adds a domain, which has no disks.
    pub(crate) fn add(&mut self, plan: DomainPlan) -> Result<(), Failure> {
        let number = u16::try_from(self.domains.len() + 1).map_err(|_| Failure::new("too many domains"))?;
        self.domains.push(Running {
            plan,
            id: DomId(number),
            ended: None,
        });
        self.create(self.domains.len() - 1)
    }

    /// The monitor, to look at.
    pub(crate) fn monitor(&self) -> &Arc<Monitor> {
        &self.monitor
    }

    /// What is known of every domain.
    pub(crate) fn infos(&self) -> Vec<DomainInfo> {
        self.monitor.domains()
    }

    /// Waits a while for something to happen; `None`: nothing did.
    pub(crate) fn next_event(&mut self, patience: Duration) -> Result<Option<Event>, Failure> {
        match self.words.1.recv_timeout(patience) {
            Ok((domain, word)) => Ok(Some(Event::Word { domain, word })),
            Err(_) => self.look_after_domains(),
        }
    }

    /// Starts a domain in place of its plan's number.
    fn create(&mut self, index: usize) -> Result<(), Failure> {
        let running = &self.domains[index];
        let mut program = match &running.plan.program {
            ProgramPlan::Disks => Program::role(DISKS),
            ProgramPlan::Role(name, orders) => Program {
                arguments: vec![orders.clone()],
                ..Program::role(name)
            },
            ProgramPlan::Executable(path, arguments) => Program {
                arguments: arguments.clone(),
                ..Program::executable(path)
            },
        };
        let (mut orders, mut writes) = (Orders::default(), false);
        let (mut granted_pages, mut mapped_pages) = (64, 64);
        for (number, disk) in self.disks.iter().enumerate() {
            let paths = self.vbd(number).paths();
            let RingPlan {
                queues,
                order,
                sharing,
            } = disk.rings;
            if disk.backend == index {
                let image = disk
                    .image
                    .file()
                    .try_clone()
                    .map_err(|error| self.failed_at(index, &error))?;
                program
                    .descriptors
                    .push((backend::image_name(number), image.into()));
                writes |= !disk.image.is_read_only();
                // Linux's persistent mappings, those of one request beyond them, and the ring.
                mapped_pages += queues * (1056 + 512 + (1 << order));
                orders.backends.push(backend::Orders {
                    disk: number,
                    directory: paths.backend,
                    size: disk.image.size(),
                    read_only: disk.image.is_read_only(),
                    queues,
                    ring_order: order,
                    sharing,
                });
                if sharing == Sharing::Copied {
                    // The buffer that is copied through.
                    granted_pages += queues * u32::from(BackendLimits::default().max_indirect);
                }
            } else if disk.frontend == index {
                granted_pages += queues * (1056 + (1 << order));
                let job = match &disk.job {
                    JobPlan::Export(listener) => {
                        let socket = listener
                            .descriptor()
                            .map_err(|error| self.failed_at(index, &error))?;
                        program
                            .descriptors
                            .push((frontend::listener_name(number), socket));
                        let name = disk.image.name().to_owned();
                        let description = format!(
                            "{name}, served by {} to {} across granted pages",
                            self.domains[disk.backend].plan.name, running.plan.name
                        );
                        frontend::Job::Export {
                            name,
                            description,
                            tcp: listener.is_tcp(),
                        }
                    }
                    JobPlan::Role(job) => job.clone(),
                    JobPlan::Program => continue,
                };
                orders.frontends.push(frontend::Orders {
                    disk: number,
                    directory: paths.frontend,
                    queues,
                    ring_order: order,
                    persistent: sharing == Sharing::Persistent,
                    job,
                });
            }
        }
        if running.plan.program == ProgramPlan::Disks {
            let orders = serde_json::to_string(&orders).map_err(|error| self.failed_at(index, &error))?;
            program.arguments = vec![orders];
        }
        let outputs = match running.plan.program {
            ProgramPlan::Executable(..) => self.talk_of(index),
            ProgramPlan::Disks | ProgramPlan::Role(..) => self.words_of(index),
        };
        program.stdout = outputs.map_err(|error| self.failed_at(index, &error))?;
        program.stderr = self
            .talk_of(index)
            .map_err(|error| self.failed_at(index, &error))?;
        program.confinement.discard = writes;
        // An export holds what its clients have under way.
        program.confinement.private_memory = 2 << 30;
        let spec = DomainSpec {
            id: Some(running.id),
            ram_pages: running.plan.ram_pages,
            shareable_pages: granted_pages,
            foreign_pages: mapped_pages,
            limits: running.plan.limits,
            ..DomainSpec::new(&running.plan.name, program)
        };
        self.monitor.create(spec).map_err(failed)?;
        self.domains[index].ended = None;
        Ok(())
    }

    /// A pipe for a role's standard output, whose lines become [`Event::Word`]s. What is no word is dropped.
    fn words_of(&self, domain: usize) -> std::io::Result<Stdio> {
        let words = self.words.0.clone();
        each_line(move |line| match serde_json::from_slice(line) {
            Ok(word) => words.send((domain, word)).is_ok(),
            Err(_) => true,
        })
    }

    /// A pipe for what a domain says to people: a domain gets no descriptor of the person's terminal or files.
    fn talk_of(&self, domain: usize) -> std::io::Result<Stdio> {
        let Running { plan, id, .. } = &self.domains[domain];
        let name = format!("d{} {}", id.0, plan.name);
        each_line(move |line| {
            let text = String::from_utf8_lossy(line);
            let plain: String = text
                .trim_end()
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect();
            output::say(&format!("{name}: {plain}"));
            true
        })
    }

    /// A disk as the toolstack describes it.
    fn vbd(&self, number: usize) -> VbdSpec {
        let disk = &self.disks[number];
        let (backend, frontend) = (self.domains[disk.backend].id, self.domains[disk.frontend].id);
        let device = VirtualDevice::xvd(u32::try_from(number).unwrap_or(u32::MAX), 0);
        let mut spec = VbdSpec::new(frontend, backend, device);
        if disk.image.is_read_only() {
            spec.mode = DeviceMode::ReadOnly;
            spec.discard = false;
        }
        spec.name = format!("disk{number}");
        spec.params = disk.image.name().to_owned();
        spec
    }

    fn failed_at(&self, index: usize, error: &dyn std::fmt::Display) -> Failure {
        Failure::new(format!("domain {}: {error}", self.domains[index].plan.name))
    }

    /// Finds a domain that has ended and puts another in its place.
    fn look_after_domains(&mut self) -> Result<Option<Event>, Failure> {
        for index in 0..self.domains.len() {
            if self.domains[index].ended.is_some() {
                continue;
            }
            let Some(ended) = self
                .monitor
                .wait_for(self.domains[index].id, Duration::ZERO)
                .map_err(failed)?
            else {
                continue;
            };
            let (name, how) = (self.domains[index].plan.name.clone(), describe(&ended));
            let good = ended.status.is_some_and(|status| status.success());
            self.domains[index].ended = Some(ended);
            if self.domains[index].plan.program != ProgramPlan::Disks {
                return Ok(Some(Event::Ended { name, how, good }));
            }
            self.count_restart(&name, &how)?;
            self.replace(index)?;
            return Ok(Some(Event::Restarted { name, how }));
        }
        Ok(None)
    }

    fn count_restart(&mut self, name: &str, how: &str) -> Result<(), Failure> {
        self.restarts.retain(|then| then.elapsed() < RESTART_TIME);
        self.restarts.push(Instant::now());
        if self.restarts.len() > RESTARTS {
            let why = format!(
                "domain {name}: {how}; domains ended {} times in a minute",
                self.restarts.len()
            );
            return Err(Failure::new(why).next("what they said before is above"));
        }
        Ok(())
    }

    /// Puts a new domain, of the same number, in the place of one that has ended.
    fn replace(&mut self, index: usize) -> Result<(), Failure> {
        self.wait_until_let_go(index)?;
        self.create(index)?;
        for number in 0..self.disks.len() {
            let spec = self.vbd(number);
            if self.disks[number].backend == index {
                self.replace_backend(&spec)?;
            } else if self.disks[number].frontend == index {
                // Its backend finds the old directories gone, lets go, and finds new ones.
                toolstack::create(&mut self.store, &spec).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Waits until nobody uses pages of a domain that has ended any more: its number is free then.
    fn wait_until_let_go(&self, index: usize) -> Result<(), Failure> {
        let Running { id, plan, .. } = &self.domains[index];
        let deadline = Instant::now() + PATIENCE;
        while self.monitor.domain(*id).is_ok() {
            if Instant::now() > deadline {
                let why = format!(
                    "domain {}: others still use its pages, {PATIENCE:?} after its end",
                    plan.name
                );
                return Err(Failure::new(why)
                    .next("the process at the other end of its disks hangs: look why, and start again"));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Gives a disk its new backend. When its frontend has gone too there is nothing to give it to: whatever comes in that
    /// frontend's place finds both directories made anew.
    fn replace_backend(&mut self, spec: &VbdSpec) -> Result<(), Failure> {
        let paths = spec.paths();
        self.wait_until_noticed(&paths.frontend)?;
        match toolstack::replace_backend(&mut self.store, &paths, spec) {
            Ok(_) => Ok(()),
            Err(error) => match read_state(&mut self.store, &paths.frontend).map_err(failed)? {
                // A domain's end takes its directories along, at any moment.
                XenbusState::Unknown => Ok(()),
                _ => Err(failed(error)),
            },
        }
    }

    /// Waits until a frontend has noticed that its backend has gone: what it must see is the gap between two backends.
    fn wait_until_noticed(&mut self, directory: &str) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            match read_state(&mut self.store, directory).map_err(failed)? {
                XenbusState::Connected | XenbusState::Initialised => thread::sleep(Duration::from_millis(2)),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Ends everything in order; what domains said until then goes to `heard`. What the monitor still held when all were
    /// gone.
    pub(crate) fn stop(mut self, mut heard: impl FnMut(Word)) -> Result<Counters, Failure> {
        let mut stubborn = Vec::new();
        let (last, first): (Vec<usize>, Vec<usize>) =
            (0..self.domains.len()).partition(|index| self.disks.iter().any(|disk| disk.backend == *index));
        for (domains, offline) in [(first, false), (last, true)] {
            for number in (0..self.disks.len()).filter(|_| offline) {
                let paths = self.vbd(number).paths();
                toolstack::take_offline(&mut self.store, &paths).map_err(failed)?;
            }
            for &index in domains
                .iter()
                .filter(|&&index| self.domains[index].ended.is_none())
            {
                let node = shutdown_node(self.domains[index].id.0);
                self.store.write(Tx::NONE, &node, b"poweroff").map_err(failed)?;
            }
            let deadline = Instant::now() + PATIENCE;
            for index in domains {
                stubborn.extend(self.wait_until_ended(index, deadline)?);
            }
        }
        let left = self.monitor.counters();
        drop(self.words.0);
        drop(self._control);
        drop(self.store);
        drop(self.monitor);
        // Every writer has gone, so this ends.
        self.words.1.iter().for_each(|(_, word)| heard(word));
        match &stubborn[..] {
            [] => Ok(left),
            some => Err(Failure::new(format!(
                "stop: {} did not end in time and were killed",
                some.join(", ")
            ))
            .next("what was flushed is in the image; check what was not")),
        }
    }

    /// `None`: it has ended well, or had ended before; else its name.
    fn wait_until_ended(&mut self, index: usize, deadline: Instant) -> Result<Option<String>, Failure> {
        let running = &mut self.domains[index];
        if running.ended.is_none() {
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                running.ended = self
                    .monitor
                    .wait_for(running.id, left.min(LOOK))
                    .map_err(failed)?;
                if running.ended.is_some() || left.is_zero() {
                    break;
                }
                self.monitor.let_go_on();
            }
        }
        Ok(running.ended.is_none().then(|| running.plan.name.clone()))
    }
}

/// The writing end of a pipe each of whose lines is given to `heard`, until that returns `false` or nobody writes any more. A
/// domain may be hostile, so lines are bounded: a longer one comes in pieces.
fn each_line(mut heard: impl FnMut(&[u8]) -> bool + Send + 'static) -> std::io::Result<Stdio> {
    let (read, write) = std::io::pipe()?;
    let listen = move || {
        let mut lines = BufReader::new(read);
        let mut line = Vec::new();
        while matches!((&mut lines).take(LINE).read_until(b'\n', &mut line), Ok(1..)) && heard(&line) {
            line.clear();
        }
    };
    thread::Builder::new().name("listener".to_owned()).spawn(listen)?;
    Ok(write.into())
}

fn describe(ended: &Ended) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (ended.crashed, ended.status) {
        (Some(why), _) => format!("was ended: {why}"),
        (None, Some(status)) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        },
        (None, None) => "hung up".to_owned(),
    }
}

/// What the monitor or the store refuses.
fn failed(error: impl std::fmt::Display + 'static) -> Failure {
    let text = error.to_string();
    let any: &dyn std::any::Any = &error;
    let next = match any.downcast_ref::<MonitorError>() {
        Some(MonitorError::NotIsolated { .. }) => "a kernel with seccomp is needed, or root",
        Some(MonitorError::Memory { .. } | MonitorError::RamPages { .. }) => {
            "give the domain less memory, or raise the limits (ulimit -n, ulimit -v)"
        }
        _ => return Failure::new(text),
    };
    Failure::new(text).next(next)
}
