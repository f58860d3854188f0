//! The store served on Unix sockets.
//!
//! One thread runs the [`Store`](crate::Store) and carries its messages. There are two kinds
//! of connections. Whoever connects to the *listening* socket acts for the
//! control domain; that is for the toolstack and the `xenstore-*` tools, so
//! the socket lets in only its own user and root. A domain gets a socket that
//! is *connected* already, handed over with the domain's number
//! ([`ServerHandle::add_connection`]): who it is hangs on the descriptor, and
//! nothing it sends can change that.
//!
//! # What always holds
//!
//! - A connection costs bounded memory: one message on the way in, a bounded
//!   number of bytes on the way out, and the bounded queue of the store behind
//!   that. From one that does not read its answers, no more requests are read.
//! - A connection that does not speak the protocol is closed, and no other
//!   notices.
//! - Requests are taken from connections in turn, a few at a time, so that one
//!   that floods does not starve the others. Who wins over another's
//!   transactions again and again waits a moment, so that the other one's
//!   come to an end.

mod event_loop;
mod fairness;
mod link;
mod listener;

use crate::client::Client;
use crate::{DomId, Errno, Quotas};
use event_loop::EventLoop;
use listener::Listener;
use rustix::event::{EventfdFlags, eventfd};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

/// Something to be done on the thread that runs the store.
type Task = Box<dyn FnOnce(&mut EventLoop) + Send>;

/// Why the server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The store refused: no such domain, or a number that can be none.
    #[error("the store refused domain {dom}: {errno}")]
    Domain {
        /// The domain.
        dom: DomId,
        /// Why: `ENOENT` if it is not known, `EINVAL` if it cannot be.
        errno: Errno,
    },
    /// There is a store on this socket already.
    #[error("another store is serving {}; stop it or choose another path", .socket.display())]
    InUse {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen on {}", .socket.display())]
    Listen {
        /// The socket.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The operating system refused.
    #[error("the store's server: {what}")]
    Io {
        /// What it was asked.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server has stopped.
    #[error("the store's server has stopped")]
    Stopped,
}

/// A server to be started.
///
/// ```
/// use gnttab_xenstore::client::{Client, Nodes as _};
/// use gnttab_xenstore::server::Server;
/// use gnttab_xenstore::Quotas;
///
/// let dir = tempfile::tempdir()?;
/// let socket = dir.path().join("socket");
/// let server = Server::new(Quotas::default()).listen(&socket)?.spawn()?;
///
/// let mut client = Client::connect(&socket)?; // or: XENSTORED_PATH=... xenstore-write
/// client.write("/tool/greeting", "hello")?;
///
/// server.stop();
/// assert!(!socket.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    quotas: Quotas,
    listener: Option<Listener>,
}

impl Server {
    /// A server of an empty store.
    pub fn new(quotas: Quotas) -> Self {
        Server {
            quotas,
            listener: None,
        }
    }

    /// Lets the control domain connect to a socket at this path. A socket that
    /// a dead server left there is replaced.
    ///
    /// # Errors
    ///
    /// [`ServerError::InUse`], [`ServerError::Listen`].
    pub fn listen(mut self, socket: impl AsRef<Path>) -> Result<Self, ServerError> {
        self.listener = Some(Listener::bind(socket.as_ref())?);
        Ok(self)
    }

    /// Starts serving, on a thread of its own.
    ///
    /// # Errors
    ///
    /// [`ServerError::Io`].
    pub fn spawn(self) -> Result<ServerHandle, ServerError> {
        let io = |what| move |source| ServerError::Io { what, source };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| io("no eventfd")(errno.into()))?;
        let wake = Arc::new(wake);
        let (tasks, inbox) = mpsc::channel();
        let event_loop = EventLoop::new(self.quotas, self.listener, wake.clone(), inbox)
            .map_err(|errno| io("no epoll")(errno.into()))?;
        let thread = std::thread::Builder::new()
            .name("xenstore".to_owned())
            .spawn(move || event_loop.run())
            .map_err(io("no thread"))?;
        Ok(ServerHandle {
            tasks,
            wake,
            thread: Some(thread),
        })
    }
}

/// A running server. It stops when this is dropped.
///
/// The methods can be called from any thread, and each is done when it returns.
pub struct ServerHandle {
    tasks: mpsc::Sender<Task>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// A domain exists now: it may have connections, and those who watch
    /// `@introduceDomain` hear of it.
    ///
    /// # Errors
    ///
    /// [`ServerError::Domain`] for a number no domain can have.
    pub fn introduce_domain(&self, dom: DomId) -> Result<(), ServerError> {
        self.call(move |event_loop| event_loop.introduce(dom))?
            .map_err(|errno| ServerError::Domain { dom, errno })
    }

    /// A domain is gone: its connections are closed, its nodes removed, its
    /// rights struck out, and those who watch `@releaseDomain` hear of it.
    ///
    /// # Errors
    ///
    /// [`ServerError::Domain`] if the store does not know it.
    pub fn release_domain(&self, dom: DomId) -> Result<(), ServerError> {
        self.call(move |event_loop| event_loop.release(dom))?
            .map_err(|errno| ServerError::Domain { dom, errno })
    }

    /// Serves a domain on a connected socket: whoever holds the other end is
    /// that domain. It must have been introduced.
    ///
    /// # Errors
    ///
    /// [`ServerError::Domain`] if the store does not know it.
    pub fn add_connection(&self, stream: UnixStream, dom: DomId) -> Result<(), ServerError> {
        self.call(move |event_loop| event_loop.add(stream, dom))?
    }

    /// A client for the control domain, in this process.
    ///
    /// # Errors
    ///
    /// [`ServerError::Io`] if there is no socket to be had.
    pub fn connect(&self) -> Result<Client, ServerError> {
        self.connect_domain(DomId::DOM0)
    }

    /// A client for a domain, in this process.
    ///
    /// # Errors
    ///
    /// [`ServerError::Domain`] if the store does not know it.
    pub fn connect_domain(&self, dom: DomId) -> Result<Client, ServerError> {
        let (mine, theirs) = UnixStream::pair().map_err(|source| ServerError::Io {
            what: "no pair of sockets",
            source,
        })?;
        self.add_connection(theirs, dom)?;
        Ok(Client::new(mine))
    }

    /// Stops: closes every connection, removes the socket, ends the thread.
    pub fn stop(self) {
        // The work is in `drop`.
    }

    /// Has something done by the thread that runs the store.
    fn call<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut EventLoop) -> T + Send + 'static,
    ) -> Result<T, ServerError> {
        let (done, result) = mpsc::sync_channel(1);
        let task: Task = Box::new(move |event_loop| {
            // Whoever asked is waiting, or has died of a panic.
            let _ = done.send(task(event_loop));
        });
        self.tasks.send(task).map_err(|_| ServerError::Stopped)?;
        self.wake();
        result.recv().map_err(|_| ServerError::Stopped)
    }

    fn wake(&self) {
        // It can only fail for being awake already.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        let _ = self.tasks.send(Box::new(EventLoop::stop));
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandle").finish_non_exhaustive()
    }
}
