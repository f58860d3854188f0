//! The control socket: what a running machine tells about itself, to its own user.
//!
//! A question is one line of JSON, the answer another, and then the connection ends. Nothing can be changed through it. The
//! socket is `NAME.control` in the user's [folder](crate::place), and goes with the machine.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use gnttab_abi::DomId;
use gnttab_host::monitor::{DomainInfo, GrantInfo, MappingInfo, Monitor, MonitorError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::bell::Bell;
use crate::failure::Failure;
use crate::nbd::listener::{ListenError, Listener};
use crate::place;

/// Raised when a key changes its meaning or goes.
const VERSION: u32 = 1;
/// Bytes of a question.
const QUESTION: u64 = 4096;
/// How long the other side may take for its part.
const PATIENCE: Duration = Duration::from_secs(2);
/// How the sockets' names end.
const ENDING: &str = "control";

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "get", rename_all = "snake_case")]
pub(crate) enum Question {
    /// Every domain.
    Domains,
    /// A domain, the entries of its table that are not free, and the mappings that it holds.
    Table {
        /// Its number.
        domain: u16,
    },
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// To [`Question::Domains`].
    Domains(Vec<DomainInfo>),
    /// To [`Question::Table`].
    Table(Box<Table>),
    /// It cannot be answered, and why.
    Error(String),
}

/// A domain's grant table, and what it maps of others'.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Table {
    /// The domain.
    pub(crate) domain: DomainInfo,
    /// Entries that are not free.
    pub(crate) grants: Vec<GrantInfo>,
    /// Mappings of others' pages.
    pub(crate) mappings: Vec<MappingInfo>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    content: T,
}

/// The control socket of a machine, open until it is dropped.
#[derive(Debug)]
pub(crate) struct Control {
    stop: Bell,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Opens the socket of a machine called `name`.
    pub(crate) fn open(name: &str, monitor: Arc<Monitor>) -> Result<Self, Failure> {
        let path = place::folder()?.join(format!("{name}.{ENDING}"));
        let listener = Listener::unix(&path).map_err(|error| {
            let failure = Failure::new(format!("control {error}"));
            match error {
                ListenError::SocketBusy(_) => {
                    failure.next("a machine of this name is running: stop it first")
                }
                _ => failure.next("set XDG_RUNTIME_DIR to a folder of yours with a short path"),
            }
        })?;
        let fail = |error: io::Error| Failure::new(format!("control socket {}: {error}", path.display()));
        let stop = Bell::new().map_err(fail)?;
        let stopped = stop.clone();
        let serve = move || serve(&listener, &stopped, &monitor);
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(serve)
            .map_err(fail)?;
        Ok(Control {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

fn serve(listener: &Listener, stop: &Bell, monitor: &Monitor) {
    loop {
        let mut wait = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        match poll(&mut wait, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        if !wait[0].revents().is_empty() {
            return;
        }
        if let Listener::Unix { socket, .. } = listener
            && let Ok((stream, _)) = socket.accept()
        {
            // Whoever asked and left needs no answer.
            let _ = answer(&stream, monitor);
        }
    }
}

fn answer(mut stream: &UnixStream, monitor: &Monitor) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(QUESTION)).read_line(&mut line)?;
    let content = match serde_json::from_str(&line) {
        Ok(Versioned {
            version: VERSION,
            content,
        }) => look_up(&content, monitor),
        Ok(Versioned { version, .. }) => Answer::Error(format!(
            "this machine speaks version {VERSION} of the control protocol, not {version}"
        )),
        Err(error) => Answer::Error(format!("not a question: {error}")),
    };
    let mut bytes = serde_json::to_vec(&Versioned {
        version: VERSION,
        content,
    })?;
    bytes.push(b'\n');
    stream.write_all(&bytes)
}

fn look_up(question: &Question, monitor: &Monitor) -> Answer {
    let table = |domain| -> Result<Answer, MonitorError> {
        let (grants, mappings) = (monitor.grants(domain)?, monitor.mappings(domain)?);
        Ok(Answer::Table(Box::new(Table {
            domain: monitor.domain(domain)?,
            grants,
            mappings,
        })))
    };
    match question {
        Question::Domains => Answer::Domains(monitor.domains()),
        Question::Table { domain } => {
            table(DomId(*domain)).unwrap_or_else(|error| Answer::Error(error.to_string()))
        }
    }
}

/// Asks a running machine.
pub(crate) fn ask(socket: &Path, question: &Question) -> Result<Answer, Failure> {
    let fail = |error: &dyn std::fmt::Display| {
        Failure::new(format!("control socket {}: {error}", socket.display()))
            .next("is the machine running? start one with: gnttab disk, gnttab run or gnttab demo")
    };
    let exchange = || -> io::Result<Answer> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = serde_json::to_vec(&Versioned {
            version: VERSION,
            content: question,
        })?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(serde_json::from_str::<Versioned<Answer>>(&answer)?.content)
    };
    match exchange() {
        Ok(Answer::Error(why)) => Err(Failure::new(why)),
        Ok(answer) => Ok(answer),
        Err(error) => Err(fail(&error)),
    }
}

/// The socket of the one machine that this user runs.
pub(crate) fn only_one() -> Result<PathBuf, Failure> {
    let folder = place::folder()?;
    let entries = std::fs::read_dir(&folder)
        .map_err(|error| Failure::new(format!("folder {}: {error}", folder.display())))?;
    let is_alive = |path: &PathBuf| {
        let is_control = path.extension().is_some_and(|ending| ending == ENDING);
        let connected = is_control.then(|| UnixStream::connect(path));
        if let Some(Err(error)) = &connected
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            // Left by one that was killed.
            let _ = std::fs::remove_file(path);
        }
        matches!(connected, Some(Ok(_)))
    };
    let mut alive: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_alive)
        .collect();
    alive.sort();
    match &alive[..] {
        [only] => Ok(only.clone()),
        [] => Err(Failure::new(format!(
            "no machine of yours is running (looked in {})",
            folder.display()
        ))
        .next("start one with: gnttab disk, gnttab run or gnttab demo")),
        [first, ..] => {
            let all: Vec<String> = alive.iter().map(|path| path.display().to_string()).collect();
            Err(Failure::new(format!(
                "{} machines of yours are running: {}",
                all.len(),
                all.join(", ")
            ))
            .next(format!("say which with: --control {}", first.display())))
        }
    }
}
