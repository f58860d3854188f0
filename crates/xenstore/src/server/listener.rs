use super::ServerError;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use rustix::process::geteuid;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Connections the system may hold for us until we accept them.
const BACKLOG: i32 = 64;

/// The socket on which whoever connects is the control domain.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    pub(super) fn bind(path: &Path) -> Result<Self, ServerError> {
        let failed = |source: io::Error| ServerError::Listen {
            socket: path.into(),
            source,
        };
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|errno| failed(errno.into()))?;
        // Before it has a name: Linux gives the file the mode of the socket, so
        // there is no moment at which others could connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| failed(errno.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_dead(path)?;
                bind(&socket, &address).map_err(|errno| failed(errno.into()))?;
            }
            result => result.map_err(|errno| failed(errno.into()))?,
        }
        let listener = Listener {
            socket,
            path: path.into(),
        };
        listen(&listener.socket, BACKLOG).map_err(|errno| failed(errno.into()))?;
        Ok(listener)
    }

    /// The next connection, if one waits. It is of our own user, or of root.
    pub(super) fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let peer = socket_peercred(&socket)?.uid;
                    if peer.is_root() || peer == geteuid() {
                        return Ok(Some(socket));
                    }
                    tracing::warn!(uid = peer.as_raw(), "turned away a stranger");
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Not there any more is as good as removed.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes a socket on which nobody listens any more, and nothing else.
fn remove_dead(path: &Path) -> Result<(), ServerError> {
    let failed = |source| ServerError::Listen {
        socket: path.into(),
        source,
    };
    if !std::fs::symlink_metadata(path)
        .map_err(failed)?
        .file_type()
        .is_socket()
    {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(source) => Err(failed(source)),
        Ok(_) => Err(ServerError::InUse { socket: path.into() }),
    }
}
