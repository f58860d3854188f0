//! Starting a domain's process.
//!
//! The monitor starts its own executable again. That process, the *launcher*, is told over its channel what
//! it is to become, confines itself ([`confine`]), reports which walls stand, and only then
//! runs the domain's program: a function of the same executable (a [`Role`]), or another executable. The
//! program finds the channel to the monitor and the descriptors that its role needs already open.
//!
//! A binary that starts domains begins its `main` with [`domain_main`]:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use gnttab_host::launch::{self, Role, Start};
//!
//! fn backend(start: Start) -> ExitCode {
//!     println!("a backend for {:?}", start.arguments);
//!     ExitCode::SUCCESS
//! }
//!
//! const ROLES: &[(&str, Role)] = &[("backend", backend)];
//!
//! fn main() -> ExitCode {
//!     if let Some(code) = launch::domain_main(ROLES) {
//!         return code;
//!     }
//!     // ... from here on it is the monitor, or an ordinary command.
//!     ExitCode::SUCCESS
//! }
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::confine::{self, Confinement, Isolation};
use crate::sys::{self, Channel, ChannelError, MAX_DESCRIPTORS};

/// A domain's program that is a function of the executable that starts domains.
pub type Role = fn(Start) -> ExitCode;

/// The argument that makes an executable a launcher. Not for people.
const LAUNCH: &str = "--gnttab-launch-domain";
/// Bytes that an order may have.
const ORDER_SIZE: usize = 64 * 1024;
/// How long a launcher may take to confine itself.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Where an executed program finds the number of its channel.
const CHANNEL_VARIABLE: &str = "GNTTAB_CHANNEL";
/// Where it finds the names and numbers of its descriptors, as JSON.
const DESCRIPTORS_VARIABLE: &str = "GNTTAB_DESCRIPTORS";

/// What a domain's program finds when it starts.
#[derive(Debug)]
pub struct Start {
    /// Its channel to the monitor.
    pub channel: Channel,
    /// Its arguments, as [`Program::arguments`] had them.
    pub arguments: Vec<String>,
    /// Its descriptors, by the names that [`Program::descriptors`] gave them.
    pub descriptors: HashMap<String, OwnedFd>,
}

/// A domain's program, to be started.
#[derive(Debug)]
pub struct Program {
    /// What runs.
    pub code: Code,
    /// Its arguments (without a name in front).
    pub arguments: Vec<String>,
    /// Open descriptors that it gets, with their names; up to 31.
    pub descriptors: Vec<(String, OwnedFd)>,
    /// What it may have. [`Confinement::program`] is filled in from `code`.
    pub confinement: Confinement,
    /// Its standard output.
    pub stdout: Stdio,
    /// Its standard error.
    pub stderr: Stdio,
}

/// What a domain runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Code {
    /// A function of this executable, named in the list that [`domain_main`] was given.
    Role(String),
    /// Another executable; it begins with [`Start::from_environment`].
    Executable(PathBuf),
}

impl Program {
    /// A program that runs a role, with nothing else given.
    #[must_use]
    pub fn role(name: &str) -> Program {
        Program::new(Code::Role(name.to_owned()))
    }

    /// A program that is another executable, with nothing else given.
    #[must_use]
    pub fn executable(path: impl Into<PathBuf>) -> Program {
        Program::new(Code::Executable(path.into()))
    }

    fn new(code: Code) -> Program {
        Program {
            code,
            arguments: Vec::new(),
            descriptors: Vec::new(),
            confinement: Confinement::default(),
            stdout: Stdio::null(),
            stderr: Stdio::inherit(),
        }
    }
}

/// Why a domain's process did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The process could not be made.
    #[error("cannot start a domain's process: {0}")]
    Spawn(#[from] io::Error),
    /// The launcher was not heard.
    #[error("cannot start a domain's process: its launcher: {0}")]
    Channel(#[from] ChannelError),
    /// The order is longer than a message.
    #[error("the arguments of a domain's program take {bytes} bytes, there may be {ORDER_SIZE}")]
    Arguments {
        /// What they take.
        bytes: usize,
    },
    /// The launcher could not do what it was told.
    #[error("a domain's process did not start: {0}")]
    Refused(String),
    /// The launcher said nothing in time.
    #[error("a domain's process was not ready after {} seconds", READY_TIMEOUT.as_secs())]
    Timeout,
    /// The thread that starts processes has gone, which happens only when the monitor stops.
    #[error("the monitor is stopping")]
    Stopping,
}

/// A domain's process, confined and running its program.
#[derive(Debug)]
pub struct Launched {
    /// The process. Dropping it neither kills nor reaps.
    pub child: Child,
    /// The monitor's end of the channel.
    pub channel: Channel,
    /// The walls that stand around it.
    pub isolation: Isolation,
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    code: Code,
    arguments: Vec<String>,
    names: Vec<String>,
    confinement: Confinement,
    monitor: i32,
}

type Report = Result<Isolation, String>;

/// Starts domains' processes.
///
/// All of them are started by one thread, for they die with the thread that started them
/// (`PR_SET_PDEATHSIG`): dropping the starter ends every domain that it started.
#[derive(Debug)]
pub struct Starter {
    orders: mpsc::Sender<(Command, mpsc::SyncSender<io::Result<Child>>)>,
}

impl Starter {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`LaunchError::Spawn`] when there can be no further thread.
    pub fn new() -> Result<Starter, LaunchError> {
        let (orders, to_do) = mpsc::channel::<(Command, mpsc::SyncSender<io::Result<Child>>)>();
        thread::Builder::new().name("starter".into()).spawn(move || {
            for (mut command, answer) in to_do {
                // Nobody waits any more: the process ends when it finds its channel closed.
                let _ = answer.send(command.spawn());
            }
        })?;
        Ok(Starter { orders })
    }

    /// Starts a program in a process of its own and waits until it is confined.
    ///
    /// Whether it is confined *enough* is for the caller to judge ([`Isolation::is_isolated`]); nothing of
    /// the program has got anything from the monitor yet.
    ///
    /// # Errors
    /// [`LaunchError`]; there is no process then.
    pub fn start(&self, program: Program) -> Result<Launched, LaunchError> {
        let (channel, theirs) = Channel::pair().map_err(ChannelError::Failed)?;
        let (names, descriptors): (Vec<_>, Vec<_>) = program.descriptors.into_iter().unzip();
        let mut confinement = program.confinement;
        confinement.program = match &program.code {
            Code::Role(_) => None,
            Code::Executable(path) => Some(vec![path.clone()]),
        };
        let monitor = rustix::process::getpid().as_raw_nonzero().get();
        let order = Order {
            code: program.code,
            arguments: program.arguments,
            names,
            confinement,
            monitor,
        };
        let order = serde_json::to_vec(&order).map_err(|error| LaunchError::Refused(error.to_string()))?;
        if order.len() > ORDER_SIZE {
            return Err(LaunchError::Arguments { bytes: order.len() });
        }
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        channel.send(&order, &descriptors)?;

        let mut command = Command::new("/proc/self/exe");
        command
            .arg(LAUNCH)
            .env_clear()
            // A terminal's Ctrl-C is for the monitor, which ends domains in order.
            .process_group(0)
            .stdin(theirs.into_socket())
            .stdout(program.stdout)
            .stderr(program.stderr);
        let (answer, answered) = mpsc::sync_channel(1);
        self.orders
            .send((command, answer))
            .map_err(|_| LaunchError::Stopping)?;
        let mut child = answered.recv().map_err(|_| LaunchError::Stopping)??;
        match ready(&channel) {
            Ok(isolation) => Ok(Launched {
                child,
                channel,
                isolation,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }
}

/// The launcher's report.
fn ready(channel: &Channel) -> Result<Isolation, LaunchError> {
    if !channel.wait(READY_TIMEOUT)? {
        return Err(LaunchError::Timeout);
    }
    let mut report = vec![0; ORDER_SIZE];
    let len = channel.receive_bytes(&mut report, false)?;
    let report: Report =
        serde_json::from_slice(&report[..len]).map_err(|error| LaunchError::Refused(error.to_string()))?;
    report.map_err(LaunchError::Refused)
}

/// Call this first in `main`. If this process was started to be a domain, it becomes it: the answer is the
/// exit code of the domain's program. `None`: this is an ordinary start.
#[must_use]
pub fn domain_main(roles: &[(&str, Role)]) -> Option<ExitCode> {
    if std::env::args_os().nth(1)? != LAUNCH {
        return None;
    }
    Some(match launched(roles) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gnttab: this process was to become a domain: {error}");
            ExitCode::FAILURE
        }
    })
}

fn launched(roles: &[(&str, Role)]) -> Result<ExitCode, LaunchError> {
    let socket = sys::take_channel_from_stdin().map_err(ChannelError::Failed)?;
    let channel = Channel::from_socket(socket);
    let mut order = vec![0; ORDER_SIZE];
    let message = channel.receive(&mut order, true)?;
    let order: Order = serde_json::from_slice(&order[..message.len])
        .map_err(|error| LaunchError::Refused(format!("not an order of the monitor: {error}")))?;
    let known = match &order.code {
        Code::Role(name) => roles
            .iter()
            .find(|(role, _)| role == name)
            .map(|(_, role)| Some(*role)),
        Code::Executable(_) => Some(None),
    };
    let confined = known
        .ok_or_else(|| format!("this executable has no role {:?}", order.code))
        .and_then(|_| {
            let monitor = Pid::from_raw(order.monitor).ok_or("no monitor")?;
            confine::confine(&order.confinement, monitor).map_err(|error| error.to_string())
        });
    let report: Report = confined;
    let bytes = serde_json::to_vec(&report).map_err(|error| LaunchError::Refused(error.to_string()))?;
    channel.send_bytes(&bytes)?;
    report.map_err(LaunchError::Refused)?;

    let descriptors = order.names.into_iter().zip(message.descriptors).collect();
    let start = Start {
        channel,
        arguments: order.arguments,
        descriptors,
    };
    match (known.flatten(), order.code) {
        (Some(role), _) => Ok(role(start)),
        (None, Code::Executable(path)) => Err(start.execute(&path).into()),
        (None, Code::Role(name)) => Err(LaunchError::Refused(format!(
            "this executable has no role {name}"
        ))),
    }
}

impl Start {
    /// Replaces this process by another executable that finds the same start in its environment.
    fn execute(self, path: &std::path::Path) -> io::Error {
        let socket = self.channel.into_socket();
        for descriptor in self.descriptors.values().chain([&socket]) {
            if let Err(errno) = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()) {
                return errno.into();
            }
        }
        let numbers: HashMap<&str, i32> = self
            .descriptors
            .iter()
            .map(|(name, descriptor)| (name.as_str(), descriptor.as_raw_fd()))
            .collect();
        let numbers = match serde_json::to_string(&numbers) {
            Ok(numbers) => numbers,
            Err(error) => return error.into(),
        };
        Command::new(path)
            .args(&self.arguments)
            .env_clear()
            .env(CHANNEL_VARIABLE, socket.as_raw_fd().to_string())
            .env(DESCRIPTORS_VARIABLE, numbers)
            .exec()
    }

    /// What a launcher left for this program in its environment; for the `main` of an executable that runs
    /// as a domain. Call it once, before anything else: it takes possession of the descriptors.
    ///
    /// # Errors
    /// [`LaunchError::Refused`]: this process was not started by a monitor, or this was called before.
    pub fn from_environment() -> Result<Start, LaunchError> {
        let refused = |what: &str| LaunchError::Refused(format!("not started by a monitor: {what}"));
        let number = std::env::var(CHANNEL_VARIABLE).map_err(|_| refused("no GNTTAB_CHANNEL"))?;
        let number = number
            .parse()
            .map_err(|_| refused("GNTTAB_CHANNEL is no number"))?;
        let numbers = std::env::var(DESCRIPTORS_VARIABLE).map_err(|_| refused("no GNTTAB_DESCRIPTORS"))?;
        let numbers: HashMap<String, i32> =
            serde_json::from_str(&numbers).map_err(|_| refused("GNTTAB_DESCRIPTORS is not JSON"))?;
        let take = |number: i32| {
            sys::take_inherited(number).map_err(|_| refused("a descriptor is not open or was taken already"))
        };
        let channel = Channel::from_socket(take(number)?);
        let descriptors = numbers
            .into_iter()
            .map(|(name, number)| Ok((name, take(number)?)))
            .collect::<Result<_, LaunchError>>()?;
        Ok(Start {
            channel,
            arguments: std::env::args().skip(1).collect(),
            descriptors,
        })
    }
}

const _: () = assert!(MAX_DESCRIPTORS > 31);
