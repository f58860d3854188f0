//! Where machines' control sockets are, and how commands reach the one that is meant.
//!
//! A machine's is `NAME.control` in the user's [folder](crate::place), and goes with the machine.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gnttab_host::control::{Client, Control, ControlError};
use gnttab_host::monitor::{DomainInfo, Monitor, MonitorError};

use crate::args::DomainRef;
use crate::failure::Failure;
use crate::place;

/// How the sockets' names end.
const ENDING: &str = "control";
/// How those end at which programs join.
pub(crate) const JOIN_ENDING: &str = "join";

/// Opens the control socket of a machine called `name`.
pub(crate) fn open(name: &str, monitor: Arc<Monitor>) -> Result<Control, Failure> {
    let folder = place::folder()?;
    // What killed machines left; a folder that cannot be read is no reason not to start.
    let _ = living(&folder);
    let path = folder.join(format!("{name}.{ENDING}"));
    Control::open(&path, monitor).map_err(|error| {
        let failure = Failure::new(format!("control socket {}: {error}", path.display()));
        match error {
            MonitorError::Io { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                failure.next("a machine of this name is running: stop it first")
            }
            _ => failure.next("set XDG_RUNTIME_DIR to a folder of yours with a short path"),
        }
    })
}

/// Lets programs of this user join a machine called `name`: where.
pub(crate) fn let_join(name: &str, monitor: &Monitor) -> Result<PathBuf, Failure> {
    let path = place::folder()?.join(format!("{name}.{JOIN_ENDING}"));
    monitor
        .listen(&path)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    Ok(path)
}

/// A caller of the machine whose control socket was named, or else of the only one that this user runs.
pub(crate) fn connect(named: Option<&Path>) -> Result<Client, Failure> {
    Client::connect(&path(named)?).map_err(failed)
}

/// The control socket that was named, or else the one of the only machine that this user runs.
pub(crate) fn path(named: Option<&Path>) -> Result<PathBuf, Failure> {
    match named {
        Some(path) => Ok(path.to_owned()),
        None => only_one(),
    }
}

/// Why a machine did not answer, and what to do about it.
pub(crate) fn failed(error: ControlError) -> Failure {
    let next = match error {
        ControlError::Connect { .. } => {
            "is the machine running? start one with: gnttab disk, gnttab run or gnttab demo"
        }
        ControlError::Silent(_) => "it is busy or stopped: try again",
        ControlError::Broken { .. } => "the machine may be ending: try again",
        ControlError::Unexpected { .. } => "the machine is of another version than this command",
        ControlError::Refused(why) => return Failure::new(why),
    };
    Failure::new(error).next(next)
}

/// The domain that a person means.
pub(crate) fn find<'a>(wanted: &DomainRef, domains: &'a [DomainInfo]) -> Result<&'a DomainInfo, Failure> {
    let found = domains.iter().find(|domain| match wanted {
        DomainRef::Id(id) => domain.id == *id,
        DomainRef::Named(name) => domain.name == name.as_str(),
    });
    found.ok_or_else(|| {
        let wanted = match wanted {
            DomainRef::Id(id) => format!("d{id}"),
            DomainRef::Named(name) => format!("'{name}'"),
        };
        let all: Vec<String> = domains
            .iter()
            .map(|domain| format!("d{} {}", domain.id, domain.name))
            .collect();
        Failure::new(format!("domain {wanted}: there is none")).next(format!("there are: {}", all.join(", ")))
    })
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
        let ask = || {
            let domains = connect(Some(&path)).and_then(|mut machine| machine.domains().map_err(failed));
            domains.unwrap_err().to_string()
        };
        let listener = UnixListener::bind(&path).unwrap();
        let busy = ask();
        assert!(
            busy.contains("did not answer in time") && !busy.contains("start one"),
            "{busy}"
        );
        drop(listener);
        let gone = ask();
        assert!(gone.contains("start one with"), "{gone}");
    }
}
