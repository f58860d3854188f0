use super::Error;
use crate::Errno;
use crate::path::{NodePath, Place};
use crate::perms::Perms;
use crate::wire::{Reply, Request};
use std::str::FromStr;

/// Reading and writing nodes: of a [`Client`](super::Client) directly, or of a
/// [`Transaction`](super::Transaction).
///
/// Paths are absolute, or relative to the home of the domain whose connection
/// it is. Every method fails as [`Error`] has it: with [`Error::Path`] before
/// anything is sent if the path is none, with [`Error::Refused`] and the
/// store's reason if the store refuses.
pub trait Nodes {
    /// Sends any request and gives the store's answer; what the store refuses
    /// is an error. The other methods are made of it.
    ///
    /// # Errors
    ///
    /// Every [`Error`] but those of single methods.
    fn request(&mut self, request: &Request) -> Result<Reply, Error>;

    /// The value of a node.
    ///
    /// # Errors
    ///
    /// `ENOENT` or `EACCES` if it is missing or hidden; see [`Error::is_missing`].
    fn read(&mut self, path: &str) -> Result<Vec<u8>, Error> {
        match self.request(&Request::Read(node(path)?))? {
            Reply::Value(value) => Ok(value.to_vec()),
            _ => Err(Error::Closed),
        }
    }

    /// The value of a node, or `None` if it is missing or hidden.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), but for these two.
    fn read_if_there(&mut self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        match self.read(path) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value of a node, as text.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if it is not UTF-8.
    fn read_text(&mut self, path: &str) -> Result<String, Error> {
        let value = self.read(path)?;
        String::from_utf8(value).map_err(|error| bad_value(path, error.as_bytes(), "text"))
    }

    /// The value of a node, as a decimal number that fits `T`: what the other
    /// side wrote is checked here, once.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if it is none.
    fn read_number<T: FromStr>(&mut self, path: &str) -> Result<T, Error> {
        let value = self.read(path)?;
        let number = std::str::from_utf8(&value)
            .ok()
            .and_then(|text| text.parse().ok());
        number.ok_or_else(|| bad_value(path, &value, "number of the wanted range"))
    }

    /// Sets the value of a node. Creates it, and those above it, if need be.
    ///
    /// # Errors
    ///
    /// `EACCES`, `ENOSPC`; [`Error::TooLong`] if it does not fit a message.
    fn write(&mut self, path: &str, value: impl AsRef<[u8]>) -> Result<(), Error> {
        done(
            self,
            &Request::Write {
                path: node(path)?,
                value: value.as_ref().into(),
            },
        )
    }

    /// Creates a node with an empty value, and those above it, if they are missing.
    ///
    /// # Errors
    ///
    /// `EACCES`, `ENOSPC`.
    fn mkdir(&mut self, path: &str) -> Result<(), Error> {
        done(self, &Request::Mkdir(node(path)?))
    }

    /// Removes a node and all below it. No error if only it is missing.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the node above is missing too, `EACCES`.
    fn rm(&mut self, path: &str) -> Result<(), Error> {
        done(self, &Request::Rm(node(path)?))
    }

    /// The names of a node's children, in order. A list longer than a message
    /// is read in parts, from the start again if it changes meanwhile.
    ///
    /// # Errors
    ///
    /// `ENOENT`, `EACCES`; `E2BIG` if it is long and never stays the same.
    fn directory(&mut self, path: &str) -> Result<Vec<String>, Error> {
        let path = node(path)?;
        match self.request(&Request::Directory(path.clone())) {
            Ok(Reply::Names(names)) => Ok(owned(&names)),
            Ok(_) => Err(Error::Closed),
            Err(error) if error.errno() == Some(Errno::E2BIG) => {
                for _ in 0..super::ATTEMPTS {
                    if let Some(names) = directory_in_parts(self, &path)? {
                        return Ok(names);
                    }
                }
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The permissions of a node or a special name.
    ///
    /// # Errors
    ///
    /// `ENOENT`, `EACCES`.
    fn perms(&mut self, path: &str) -> Result<Perms, Error> {
        match self.request(&Request::GetPerms(place(path)?))? {
            Reply::Perms(perms) => Ok(perms),
            _ => Err(Error::Closed),
        }
    }

    /// Sets the permissions of a node or a special name; its owner may.
    ///
    /// # Errors
    ///
    /// `ENOENT`, `EACCES`, `ENOSPC`; `EPERM` for another owner.
    fn set_perms(&mut self, path: &str, perms: &Perms) -> Result<(), Error> {
        done(
            self,
            &Request::SetPerms {
                place: place(path)?,
                perms: perms.clone(),
            },
        )
    }
}

fn owned(names: &[std::sync::Arc<str>]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

fn node(path: &str) -> Result<NodePath, Error> {
    path.parse().map_err(|source| Error::Path {
        path: path.to_owned(),
        source,
    })
}

pub(super) fn place(path: &str) -> Result<Place, Error> {
    path.parse().map_err(|source| Error::Path {
        path: path.to_owned(),
        source,
    })
}

fn bad_value(path: &str, value: &[u8], wanted: &'static str) -> Error {
    Error::Value {
        path: path.to_owned(),
        value: value.escape_ascii().to_string(),
        wanted,
    }
}

/// A request whose answer is that it was done.
pub(super) fn done(nodes: &mut (impl Nodes + ?Sized), request: &Request) -> Result<(), Error> {
    nodes.request(request).map(|_| ())
}

/// One try at reading a list in parts; none if it changed meanwhile.
fn directory_in_parts(
    nodes: &mut (impl Nodes + ?Sized),
    path: &NodePath,
) -> Result<Option<Vec<String>>, Error> {
    let (mut all, mut offset, mut first) = (Vec::new(), 0_usize, None);
    loop {
        let at = u32::try_from(offset).map_err(|_| Error::Closed)?;
        let request = Request::DirectoryPart {
            path: path.clone(),
            offset: at,
        };
        let (generation, names, last) = match nodes.request(&request) {
            Ok(Reply::Part {
                generation,
                names,
                last,
            }) => (generation, names, last),
            Ok(_) => return Err(Error::Closed),
            // The list has become shorter than what was read of it.
            Err(error) if offset > 0 && error.errno() == Some(Errno::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        };
        if *first.get_or_insert(generation) != generation {
            return Ok(None);
        }
        offset += names.iter().map(|name| name.len() + 1).sum::<usize>();
        all.extend(owned(&names));
        if last {
            return Ok(Some(all));
        }
    }
}
