//! The monitor: one process that is the hypervisor of this machine.
//!
//! It embeds the engine, holds the memory of every domain, serves the hypercalls of each vCPU on a thread,
//! introduces the ends of event channels to each other, runs the store, starts domains and buries them.
//!
//! ```no_run
//! use gnttab_host::launch::Program;
//! use gnttab_host::monitor::{DomainSpec, Monitor, Settings};
//!
//! let monitor = Monitor::start(Settings::default())?;
//! let backend = monitor.create(DomainSpec::new("backend", Program::role("backend")))?;
//! let frontend = monitor.create(DomainSpec::new("frontend", Program::role("frontend")))?;
//! println!("{:?}", monitor.wait(frontend)?);
//! monitor.destroy(backend)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What must always hold:
//! 1. A domain's death, at any instant and by any cause, ends in this order: no call of it is served any
//!    more, its process is dead, its mappings are released, its ends of event channels closed, the store
//!    told, its memory given up. Whoever is told (by a hang-up, by the store) can then end every grant that
//!    the dead one had mapped.
//! 2. Nothing a domain does stalls the monitor: descriptors are sent without waiting, calls are served on
//!    a thread of the calling vCPU's own, and no lock is held while waiting for a domain.
//! 3. Dropping the monitor ends every domain.

mod join;
mod life;
mod machine;
mod memory;
mod news;
mod ports;
mod tables;
mod vcpu;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use gnttab_engine::{Config, CreateError, Domain, Engine, Limits, Processor};
use gnttab_xenstore::Quotas;
use gnttab_xenstore::server::{self, ServerError, ServerHandle};
use rustix::io::Errno;

pub use news::{BadFilter, EventInfo, EventKind, Filter, Heard, Watch};
pub use view::{
    ConsumerInfo, Counters, DomainInfo, Entries, GrantInfo, MachineInfo, MappingInfo, PendingInfo, PortInfo,
    ReportInfo, State,
};

use crate::area::Closer;
use crate::confine::Isolation;
use crate::launch::{LaunchError, Program, Starter};
use crate::sys::{self, ChannelError, EventPort, MemoryError, Poller};
use join::Door;
use life::{DOORBELL, SERVICE_PROCESSOR};
use machine::Machine;
use memory::MOST_RAM_PAGES;

/// How a monitor is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The engine's settings. [`Config::processors`] is filled in from `max_vcpus`.
    pub engine: Config,
    /// vCPUs of all domains together.
    pub max_vcpus: usize,
    /// Where tools reach the store as the control domain (`XENSTORED_PATH`); `None`: nowhere.
    pub store_socket: Option<PathBuf>,
    /// What domains may do to the store.
    pub quotas: Quotas,
    /// The first of the users that domains become, where the monitor is root.
    pub first_user: u32,
    /// Refuse a domain that is not isolated.
    pub require_isolation: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            engine: Config::default(),
            max_vcpus: 255,
            store_socket: None,
            quotas: Quotas::default(),
            first_user: first_user(),
            require_isolation: true,
        }
    }
}

/// Above every range that distributions and containers hand out, and another for each monitor: two that
/// run at the same time as root do not share users, but by chance.
fn first_user() -> u32 {
    const FIRST: u32 = 1_900_000_000;
    const MONITORS: u32 = 7000;
    FIRST + std::process::id() % MONITORS * (u32::from(DomId::FIRST_RESERVED.0) + 1)
}

/// A domain to be made.
#[derive(Debug)]
pub struct DomainSpec {
    /// What people call it.
    pub name: String,
    /// What it runs.
    pub program: Program,
    /// Its number; `None`: the next one that is free.
    pub id: Option<DomId>,
    /// Pages of its memory.
    pub ram_pages: u32,
    /// How many of them may be granted for mapping. Each costs the monitor a descriptor and a mapping.
    pub shareable_pages: u32,
    /// Pages of others that it can have mapped at a time.
    pub foreign_pages: u32,
    /// What its grant table may be. [`Limits::vcpus`] is how many vCPUs it has.
    pub limits: Limits,
}

impl DomainSpec {
    /// A domain of 64 MiB with one vCPU.
    #[must_use]
    pub fn new(name: &str, program: Program) -> DomainSpec {
        DomainSpec {
            name: name.to_owned(),
            program,
            id: None,
            ram_pages: 16 * 1024,
            shareable_pages: 4096,
            foreign_pages: 4096,
            limits: Limits::default(),
        }
    }
}

/// Why the monitor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// A thread, a socket or an epoll could not be made.
    #[error("the monitor: {what}: {source}")]
    Io {
        /// What it was for.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The store could not be started or did not do what it was asked.
    #[error(transparent)]
    Store(#[from] ServerError),
    /// The store did not take a domain's part in.
    #[error("the store: {0}")]
    StoreClient(#[from] gnttab_xenstore::client::Error),
    /// A domain's process could not be started.
    #[error("domain {name}: {source}")]
    Launch {
        /// The domain.
        name: String,
        /// Why.
        source: LaunchError,
    },
    /// A domain's process is not isolated, and it was asked that every one be.
    #[error("domain {name} would not be isolated: this machine lacks: {}", .missing.join(", "))]
    NotIsolated {
        /// The domain.
        name: String,
        /// The walls that are missing.
        missing: Vec<&'static str>,
    },
    /// Its memory could not be had.
    #[error("domain {name}: {source}")]
    Memory {
        /// The domain.
        name: String,
        /// Why.
        source: MemoryError,
    },
    /// More memory than a domain can have.
    #[error("domain {name}: {asked} pages of memory; there may be 1 to {MOST_RAM_PAGES}")]
    RamPages {
        /// The domain.
        name: String,
        /// What was asked for.
        asked: u32,
    },
    /// The engine refused.
    #[error("domain {name}: {source}")]
    Create {
        /// The domain.
        name: String,
        /// Why.
        source: CreateError,
    },
    /// As many vCPUs as [`Settings::max_vcpus`] allows exist.
    #[error("domain {name}: {asked} more vCPUs would be more than the {most} that this monitor serves")]
    TooManyVcpus {
        /// The domain.
        name: String,
        /// What was asked for.
        asked: usize,
        /// What there may be of all domains together.
        most: usize,
    },
    /// The process did not take what was sent to it.
    #[error("domain {name}: cannot send it its memory: {source}")]
    Channel {
        /// The domain.
        name: String,
        /// Why.
        source: ChannelError,
    },
    /// Not the number of a domain that can be made.
    #[error("{0} cannot be the number of a domain: those are 1 to 32751")]
    BadNumber(DomId),
    /// There is a domain of that number, or it is on its way.
    #[error("there is a domain {0} already")]
    Exists(DomId),
    /// Every number of a domain is in use.
    #[error("every domain number is in use")]
    NoNumber,
    /// There is no such domain.
    #[error("there is no domain {0}")]
    NoDomain(DomId),
    /// The monitor is stopping.
    #[error("the monitor is stopping")]
    Stopping,
}

impl MonitorError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> MonitorError {
        move |source| MonitorError::Io { what, source }
    }

    pub(crate) fn errno(what: &'static str) -> impl FnOnce(Errno) -> MonitorError {
        move |errno| MonitorError::Io {
            what,
            source: errno.into(),
        }
    }
}

/// How a domain ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How its process ended; `None` for one that joined and hung up.
    pub status: Option<ExitStatus>,
    /// What it did that the monitor ended it for.
    pub crashed: Option<&'static str>,
}

/// `killed by signal 9`, `exit code 0`.
impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use std::os::unix::process::ExitStatusExt as _;
        match (self.crashed, self.status) {
            (Some(why), _) => write!(f, "ended by the monitor: {why}"),
            (None, Some(status)) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "exit code {code}"),
                (None, Some(signal)) => write!(f, "killed by signal {signal}"),
                (None, None) => f.write_str("ended"),
            },
            (None, None) => f.write_str("hung up"),
        }
    }
}

/// A running monitor. Dropping it ends every domain.
pub struct Monitor {
    doors: Mutex<Vec<Door>>,
    shared: Arc<Shared>,
    undertaker: Option<JoinHandle<()>>,
    herald: Option<JoinHandle<()>>,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

/// What the monitor's threads share.
struct Shared {
    engine: Arc<Engine<Machine>>,
    settings: Settings,
    starter: Starter,
    store: ServerHandle,
    /// Where processes and channels are watched.
    poller: Poller,
    /// Rung to make the undertaker look around.
    doorbell: Arc<EventPort>,
    heard: EventPort,
    state: Mutex<MonitorState>,
    /// Signalled when a domain has ended.
    ended: Condvar,
    /// Held while the service processor is in use.
    service: Mutex<()>,
    /// Held while the observers' processor is in use.
    observing: Mutex<()>,
    started: Instant,
}

#[derive(Debug, Default)]
struct MonitorState {
    running: BTreeMap<DomId, Running>,
    ended: BTreeMap<DomId, Ended>,
    /// Domains that are being made or buried.
    busy: BTreeSet<DomId>,
    /// Numbers of processors that threads have.
    processors: BTreeSet<usize>,
    next_id: u16,
    stopping: bool,
}

/// A domain that runs.
#[derive(Debug)]
struct Running {
    name: String,
    domain: Arc<Domain<Machine>>,
    isolation: Option<Isolation>,
    process: Option<Process>,
    vcpus: Vec<Serving>,
    /// When its process closed its channel.
    silent_since: Option<Instant>,
    since: Instant,
}

#[derive(Debug)]
struct Process {
    child: Child,
    pidfd: OwnedFd,
}

/// A thread that serves a vCPU.
#[derive(Debug)]
struct Serving {
    closer: Closer,
    thread: JoinHandle<()>,
    processor: usize,
}

impl Monitor {
    /// Starts the monitor in this process, which it closes to others of the same user
    /// (`PR_SET_DUMPABLE`) and whose limit of descriptors it raises as far as it goes.
    ///
    /// # Errors
    /// [`MonitorError::Io`] or [`MonitorError::Store`].
    pub fn start(mut settings: Settings) -> Result<Monitor, MonitorError> {
        sys::raise_descriptor_limit();
        sys::become_undumpable().map_err(MonitorError::errno("PR_SET_DUMPABLE"))?;
        settings.engine.processors = settings.max_vcpus + 2;
        let mut store = server::Server::new(settings.quotas);
        if let Some(socket) = &settings.store_socket {
            store = store.listen(socket)?;
        }
        let (doorbell, heard) = EventPort::pair().map_err(MonitorError::errno("doorbell"))?;
        let poller = Poller::new().map_err(MonitorError::errno("epoll"))?;
        poller
            .add(&heard, DOORBELL)
            .map_err(MonitorError::errno("epoll"))?;
        let starter = Starter::new().map_err(|source| MonitorError::Launch {
            name: "-".into(),
            source,
        })?;
        let shared = Arc::new(Shared {
            engine: Arc::new(Engine::new(Machine::new(), settings.engine.clone())),
            settings,
            starter,
            store: store.spawn()?,
            poller,
            doorbell: Arc::new(doorbell),
            heard,
            state: Mutex::new(MonitorState {
                next_id: 1,
                ..MonitorState::default()
            }),
            ended: Condvar::new(),
            service: Mutex::new(()),
            observing: Mutex::new(()),
            started: Instant::now(),
        });
        let watched = Arc::clone(&shared);
        let undertaker = thread::Builder::new()
            .name("undertaker".into())
            .spawn(move || watched.watch())
            .map_err(MonitorError::io("thread"))?;
        let told = Arc::clone(&shared);
        let herald = thread::Builder::new()
            .name("herald".into())
            .spawn(move || told.herald());
        // From here on its drop ends what was started.
        let mut monitor = Monitor {
            doors: Mutex::default(),
            shared,
            undertaker: Some(undertaker),
            herald: None,
        };
        monitor.herald = Some(herald.map_err(MonitorError::io("thread"))?);
        Ok(monitor)
    }

    /// Makes a domain and starts its program. When this returns, the program runs.
    ///
    /// # Errors
    /// [`MonitorError`]; there is no such domain and no process then.
    pub fn create(&self, spec: DomainSpec) -> Result<DomId, MonitorError> {
        self.shared.create(spec)
    }

    /// Ends a domain: kills its process and takes everything back. When this returns, it is gone.
    ///
    /// # Errors
    /// [`MonitorError::NoDomain`].
    pub fn destroy(&self, id: DomId) -> Result<Ended, MonitorError> {
        if let Some(running) = self.shared.state().running.get(&id) {
            match &running.process {
                Some(process) => process.kill(),
                None => running.domain.private().crash("destroyed"),
            }
        }
        self.wait(id)
    }

    /// Waits until a domain has ended and everything it had was taken back.
    ///
    /// # Errors
    /// [`MonitorError::NoDomain`]: there is none of that number, and was none lately.
    pub fn wait(&self, id: DomId) -> Result<Ended, MonitorError> {
        loop {
            if let Some(ended) = self.wait_for(id, Duration::from_secs(3600))? {
                return Ok(ended);
            }
        }
    }

    /// As [`Self::wait`], for so long at most; `None`: it still runs.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_for(&self, id: DomId, at_most: Duration) -> Result<Option<Ended>, MonitorError> {
        let until = Instant::now() + at_most;
        let mut state = self.shared.state();
        loop {
            if let Some(ended) = state.ended.get(&id) {
                return Ok(Some(ended.clone()));
            }
            if !state.exists(id) {
                return Err(MonitorError::NoDomain(id));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.shared.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets every domain go on whose process a signal has stopped: nobody who is stopped can end in order, or let go of
    /// what another who is to end has.
    pub fn let_go_on(&self) {
        for running in self.shared.state().running.values() {
            if let Some(process) = &running.process
                && process.is_stopped()
            {
                process.go_on();
            }
        }
    }

    /// The store, to write what domains are to find there, as the control domain.
    #[must_use]
    pub fn store(&self) -> &ServerHandle {
        &self.shared.store
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.doors
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.shared.state().stopping = true;
        // The undertaker holds the other end.
        let _ = self.shared.doorbell.send();
        if let Some(undertaker) = self.undertaker.take() {
            let _ = undertaker.join();
        }
        self.shared.engine.hypervisor().news.stop();
        if let Some(herald) = self.herald.take() {
            let _ = herald.join();
        }
    }
}

impl Shared {
    /// Acts in the engine for a burial.
    fn with_processor<T>(&self, act: impl FnOnce(&mut Processor<'_, Machine>) -> T) -> Option<T> {
        let _held = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        let mut processor = self.engine.processor(SERVICE_PROCESSOR)?;
        Some(act(&mut processor))
    }

    /// Looks at the engine. Observers wait for each other, and nobody else for them.
    fn observe<T>(&self, look: impl FnOnce(&mut Processor<'_, Machine>) -> T) -> Option<T> {
        let _held = self.observing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut processor = self.engine.processor(self.settings.max_vcpus + 1)?;
        Some(look(&mut processor))
    }
}
