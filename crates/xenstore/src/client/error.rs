use crate::Errno;
use crate::path::PathError;
use crate::wire::{Message, PayloadTooLong, Request};
use std::io;
use std::path::PathBuf;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store refused.
    #[error("the store refused {request}: {errno}")]
    Refused {
        /// What was asked.
        request: String,
        /// Why not.
        errno: Errno,
    },
    /// The path is none, so nothing was asked.
    #[error("`{path}` is no path")]
    Path {
        /// The text.
        path: String,
        /// What is wrong with it.
        #[source]
        source: PathError,
    },
    /// Path and value do not fit one message, so nothing was asked.
    #[error("{request} does not fit a message")]
    TooLong {
        /// What was to be asked.
        request: String,
        /// By how much.
        #[source]
        source: PayloadTooLong,
    },
    /// A value that is not what it should be.
    #[error("the value of {path} is `{value}`, which is no {wanted}")]
    Value {
        /// The node.
        path: String,
        /// Its value, escaped.
        value: String,
        /// What it should have been.
        wanted: &'static str,
    },
    /// The deadline passed before the node was as wanted.
    #[error("waited in vain for {path}, which is {}", .value.as_deref().unwrap_or("missing"))]
    TimedOut {
        /// The node.
        path: String,
        /// Its last value, escaped; none if it was missing or hidden.
        value: Option<String>,
    },
    /// Others changed what a transaction used, every time it was tried.
    #[error("gave up a transaction after {attempts} conflicts with others")]
    Conflict {
        /// How often it was tried.
        attempts: u32,
    },
    /// The store did not answer in time. The connection cannot be used any more.
    #[error("the store did not answer {request} in time")]
    NoAnswer {
        /// What was asked.
        request: String,
    },
    /// The store sent what is no answer to what was asked. The connection
    /// cannot be used any more.
    #[error("the store sent what was not asked for: {0}")]
    Unexpected(Message),
    /// The store sent what is no message at all. The connection cannot be used
    /// any more.
    #[error("the store sent what is no message")]
    NoMessage(#[source] PayloadTooLong),
    /// The store has closed the connection, or it was given up after an
    /// earlier error.
    #[error("the connection to the store is closed")]
    Closed,
    /// There is no connecting to the socket.
    #[error("cannot connect to the store at {}", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The stream failed. The connection cannot be used any more.
    #[error("the connection to the store failed")]
    Io(#[from] io::Error),
}

impl Error {
    /// The store's own error, if it was the store that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether it says that a node is not there, or hidden, which a domain
    /// often cannot tell apart.
    pub fn is_missing(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOENT | Errno::EACCES))
    }
}

/// A request as an error text names it.
pub(super) fn describe(request: &Request) -> String {
    let kind = request.kind();
    match request {
        Request::Directory(path)
        | Request::DirectoryPart { path, .. }
        | Request::Read(path)
        | Request::Write { path, .. }
        | Request::Mkdir(path)
        | Request::Rm(path) => format!("{kind} {path}"),
        Request::GetPerms(place)
        | Request::SetPerms { place, .. }
        | Request::Watch { place, .. }
        | Request::Unwatch { place, .. } => format!("{kind} {place}"),
        _ => kind.to_string(),
    }
}
