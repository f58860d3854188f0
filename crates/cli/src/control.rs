//! The control socket: what a running machine tells about itself, to its own user.
//!
//! A question is one line of JSON, the answer another, and then the connection ends. Nothing can be changed through it. The
//! socket is `NAME.control` in the user's [folder](crate::place), and goes with the machine.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
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
        let folder = place::folder()?;
        // What killed machines left; a folder that cannot be read is no reason not to start.
        let _ = living(&folder);
        let path = folder.join(format!("{name}.{ENDING}"));
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
    let fail = |error: io::Error| Failure::new(format!("control socket {}: {error}", socket.display()));
    let mut stream = UnixStream::connect(socket).map_err(|error| {
        fail(error).next("is the machine running? start one with: gnttab disk, gnttab run or gnttab demo")
    })?;
    let mut exchange = || -> io::Result<Answer> {
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
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            let why = format!(
                "control socket {}: the machine is there, but did not answer within {} s",
                socket.display(),
                PATIENCE.as_secs()
            );
            Err(Failure::new(why).next("it is busy or stopped: try again"))
        }
        Err(error) => Err(fail(error).next("the machine may be ending: try again")),
    }
}

/// The control sockets in a folder that somebody answers on. The others, left by machines that were killed, are removed;
/// what is no socket is left alone.
fn living(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_alive = |path: &PathBuf| match UnixStream::connect(path) {
        Ok(_) => true,
        Err(error) => {
            if error.kind() == io::ErrorKind::ConnectionRefused {
                // Another may have been faster.
                let _ = std::fs::remove_file(path);
            }
            false
        }
    };
    let mut alive: Vec<PathBuf> = std::fs::read_dir(folder)?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == ENDING))
        .filter(is_alive)
        .collect();
    alive.sort();
    Ok(alive)
}

/// The socket of the one machine that this user runs.
pub(crate) fn only_one() -> Result<PathBuf, Failure> {
    let folder = place::folder()?;
    let alive =
        living(&folder).map_err(|error| Failure::new(format!("folder {}: {error}", folder.display())))?;
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn sockets_that_nobody_answers_on_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for dead in ["dead.control", "dead.nbd"] {
            drop(UnixListener::bind(path(dead)).unwrap());
        }
        let alive = path("alive.control");
        let _listener = UnixListener::bind(&alive).unwrap();
        std::fs::write(path("file.control"), "precious").unwrap();
        std::os::unix::fs::symlink("file.control", path("link.control")).unwrap();
        assert_eq!(living(folder.path()).unwrap(), [alive]);
        let mut left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(
            left,
            ["alive.control", "dead.nbd", "file.control", "link.control"]
        );
    }

    #[test]
    fn a_machine_that_does_not_answer_need_not_be_started() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("busy.control");
        let ask = || ask(&path, &Question::Domains).unwrap_err().to_string();
        let listener = UnixListener::bind(&path).unwrap();
        let busy = ask();
        assert!(
            busy.contains("did not answer within 2 s") && !busy.contains("start one"),
            "{busy}"
        );
        drop(listener);
        let gone = ask();
        assert!(gone.contains("start one with"), "{gone}");
    }
}
