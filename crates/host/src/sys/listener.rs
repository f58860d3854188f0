//! A socket in the file system by which programs of the same user reach the monitor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::Channel;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// A listening socket, of packets ([`Channel`]s) or of a stream. Its path goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens at a path for [`Channel`]s. A socket that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// `EADDRINUSE` when somebody listens there or it is no socket; the kernel's for a path that cannot be.
    pub fn bind(path: &Path) -> Result<Listener, Errno> {
        Listener::bind_type(path, SocketType::SEQPACKET)
    }

    /// As [`Self::bind`], for streams.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn bind_stream(path: &Path) -> Result<Listener, Errno> {
        Listener::bind_type(path, SocketType::STREAM)
    }

    fn bind_type(path: &Path, kind: SocketType) -> Result<Listener, Errno> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket(kind)?;
        match net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                // Who is there answers; a socket that refuses is left over. So refuses a file.
                let is_socket = FileType::from_raw_mode(rustix::fs::lstat(path)?.st_mode) == FileType::Socket;
                match net::connect(&self::socket(kind)?, &address) {
                    Err(Errno::CONNREFUSED) if is_socket => rustix::fs::unlink(path)?,
                    _ => return Err(Errno::ADDRINUSE),
                }
                net::bind(&socket, &address)?;
            }
            other => other?,
        }
        let listener = Listener {
            socket,
            path: path.to_owned(),
        };
        net::listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }

    /// Takes the next connection, if it comes from this user or from root; from others it is closed.
    ///
    /// # Errors
    /// `EACCES` for another user's, `EAGAIN` when there is none; the kernel's.
    pub fn accept(&self) -> Result<Channel, Errno> {
        self.accept_socket().map(Channel::from_socket)
    }

    /// As [`Self::accept`], of a socket for streams.
    ///
    /// # Errors
    /// As [`Self::accept`].
    pub fn accept_stream(&self) -> Result<UnixStream, Errno> {
        self.accept_socket().map(UnixStream::from)
    }

    fn accept_socket(&self) -> Result<OwnedFd, Errno> {
        let socket = net::accept_with(&self.socket, SocketFlags::CLOEXEC)?;
        let peer = net::sockopt::socket_peercred(&socket)?.uid;
        if peer != rustix::process::geteuid() && !peer.is_root() {
            return Err(Errno::ACCESS);
        }
        Ok(socket)
    }
}

impl Channel {
    /// Connects to a [`Listener`].
    ///
    /// # Errors
    /// `ENOENT` or `ECONNREFUSED` when nobody listens there.
    pub fn connect(path: &Path) -> Result<Channel, Errno> {
        let socket = socket(SocketType::SEQPACKET)?;
        net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Channel::from_socket(socket))
    }
}

fn socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = rustix::fs::unlink(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_over_is_replaced_and_a_live_one_or_a_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err(), Errno::ADDRINUSE);
        let one = Channel::connect(&path).unwrap();
        let other = loop {
            // The attempt to bind above has left a connection of its own.
            let channel = listener.accept().unwrap();
            if channel.is_connected() {
                break channel;
            }
        };
        one.send_bytes(b"hello").unwrap();
        assert_eq!(other.receive_bytes(&mut [0; 8], true), Ok(5));
        // As if its process had been killed.
        let left = directory.path().join("left");
        std::fs::hard_link(&path, &left).unwrap();
        drop(listener);
        assert!(!path.exists());
        drop(Listener::bind(&left).unwrap());
        std::fs::write(&path, b"precious").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err(), Errno::ADDRINUSE);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
