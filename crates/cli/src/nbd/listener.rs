//! Where clients come in: a Unix socket, or a port of the loopback address. Never another address: NBD has no
//! authentication here, and whoever can connect can write the disk.

use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

/// Bytes of answers that a local client may leave unread before who sends them has to wait: a few large reads.
const SEND_BUFFER: usize = 1 << 20;

/// Why no clients can come in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// Somebody answers on the socket.
    #[error("socket {}: another server is listening there", .0.display())]
    SocketBusy(PathBuf),
    /// Something that is no socket has the name.
    #[error("socket {}: a file that is not a socket is in the way", .0.display())]
    NotASocket(PathBuf),
    /// A Unix socket's address has room for 107 bytes.
    #[error("socket {}: the path is {} bytes long, a Unix socket takes 107 at most", .0.display(), .0.as_os_str().len())]
    PathTooLong(PathBuf),
    /// The socket could not be made.
    #[error("socket {}: {source}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody has the port.
    #[error("port {0} on 127.0.0.1: in use by another program")]
    PortBusy(u16),
    /// The port could not be had.
    #[error("port {port} on 127.0.0.1: {source}")]
    Port {
        /// Which.
        port: u16,
        /// Why.
        source: io::Error,
    },
}

/// A place where clients come in. A Unix socket's file goes with it.
#[derive(Debug)]
pub(crate) enum Listener {
    /// A Unix socket that only its owner may connect to.
    Unix {
        /// The socket.
        socket: UnixListener,
        /// Its file; `None` when another process takes care of it.
        path: Option<PathBuf>,
    },
    /// A port of 127.0.0.1.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on a Unix socket. A socket file that nobody listens on any more is taken over.
    pub(crate) fn unix(path: &Path) -> Result<Self, ListenError> {
        let fail = |source| ListenError::Socket {
            path: path.to_owned(),
            source,
        };
        if path.as_os_str().len() > 107 {
            return Err(ListenError::PathTooLong(path.to_owned()));
        }
        if let Ok(metadata) = fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(ListenError::NotASocket(path.to_owned()));
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(fail)?;
                }
                _ => return Err(ListenError::SocketBusy(path.to_owned())),
            }
        }
        let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(mask);
        let socket = bound.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => ListenError::SocketBusy(path.to_owned()),
            _ => fail(error),
        })?;
        socket.set_nonblocking(true).map_err(fail)?;
        Ok(Listener::Unix {
            socket,
            path: Some(path.to_owned()),
        })
    }

    /// Listens on a port of 127.0.0.1; port 0 takes any that is free.
    pub(crate) fn tcp(port: u16) -> Result<Self, ListenError> {
        let socket =
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => ListenError::PortBusy(port),
                _ => ListenError::Port { port, source },
            })?;
        socket
            .set_nonblocking(true)
            .map_err(|source| ListenError::Port { port, source })?;
        Ok(Listener::Tcp(socket))
    }

    /// One that another process opened, which also takes care of a Unix socket's file.
    pub(crate) fn inherited(descriptor: OwnedFd, tcp: bool) -> Self {
        if tcp {
            Listener::Tcp(descriptor.into())
        } else {
            Listener::Unix {
                socket: descriptor.into(),
                path: None,
            }
        }
    }

    /// The same socket for another process, as [`inherited`](Self::inherited) takes it.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }

    /// Whether it is a TCP socket.
    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self, Listener::Tcp(_))
    }

    /// The next client that waits, if any.
    pub(super) fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix { socket, .. } => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                // Whatever the system allows is fine.
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER);
                Ok(Stream::Unix(stream))
            }
            Listener::Tcp(socket) => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

/// The address as `qemu-img` and `nbdinfo` take it.
impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listener::Unix { path: Some(path), .. } => {
                f.write_str("nbd+unix:///?socket=")?;
                for &byte in path.as_os_str().as_encoded_bytes() {
                    match byte {
                        b'/' | b'-' | b'_' | b'.' | b'~' => write!(f, "{}", char::from(byte))?,
                        byte if byte.is_ascii_alphanumeric() => write!(f, "{}", char::from(byte))?,
                        byte => write!(f, "%{byte:02X}")?,
                    }
                }
                Ok(())
            }
            Listener::Unix { path: None, .. } => f.write_str("nbd+unix://"),
            Listener::Tcp(socket) => {
                let port = socket.local_addr().map_or(0, |address| address.port());
                write!(f, "nbd://127.0.0.1:{port}")
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix { socket, .. } => socket.as_fd(),
            Listener::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix { path: Some(path), .. } = self {
            // Nothing can be done about a file that is already gone.
            let _ = fs::remove_file(path);
        }
    }
}

/// A client's socket, not blocking.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(into),
            Stream::Tcp(stream) => stream.read(into),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}
