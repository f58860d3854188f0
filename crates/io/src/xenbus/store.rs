//! The store as the handshakes see it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use gnttab_abi::DomId;

/// A transaction; [`Tx::NONE`] stands for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tx(pub u32);

impl Tx {
    /// Outside of any transaction.
    pub const NONE: Tx = Tx(0);
}

/// A connection to the XenStore. Paths are absolute; values are bytes, chosen by whoever owns the node.
pub trait Store {
    /// What can go wrong: the connection, a permission, a quota. A node that is not there is no error.
    type Error;

    /// A node's value; `None` if there is no such node, or it may not be read.
    ///
    /// # Errors
    /// If the store cannot be asked.
    fn read(&mut self, tx: Tx, path: &str) -> Result<Option<Vec<u8>>, Self::Error>;

    /// Writes a node, with all directories above it.
    ///
    /// # Errors
    /// If that is not allowed or the store cannot be asked.
    fn write(&mut self, tx: Tx, path: &str, value: &[u8]) -> Result<(), Self::Error>;

    /// Removes a node and all below it; one that is not there is as good as removed.
    ///
    /// # Errors
    /// If that is not allowed or the store cannot be asked.
    fn remove(&mut self, tx: Tx, path: &str) -> Result<(), Self::Error>;

    /// The names of a node's children; `None` if there is no such node.
    ///
    /// # Errors
    /// If the store cannot be asked.
    fn directory(&mut self, tx: Tx, path: &str) -> Result<Option<Vec<String>>, Self::Error>;

    /// Makes `owner` the owner of a node, without rights for others but that `readers` may read it. New
    /// children inherit that.
    ///
    /// # Errors
    /// If that is not allowed or the store cannot be asked.
    fn set_permissions(
        &mut self,
        tx: Tx,
        path: &str,
        owner: DomId,
        readers: &[DomId],
    ) -> Result<(), Self::Error>;

    /// Begins a transaction.
    ///
    /// # Errors
    /// If there are too many, or the store cannot be asked.
    fn begin(&mut self) -> Result<Tx, Self::Error>;

    /// Ends a transaction. `false`: it met another's change and nothing was written; do it again.
    ///
    /// # Errors
    /// If the store cannot be asked.
    fn end(&mut self, tx: Tx, commit: bool) -> Result<bool, Self::Error>;

    /// Asks for an event at every change of a node or below it, and one at once.
    /// How events arrive is the implementation's; whoever gets one calls `advance`.
    ///
    /// # Errors
    /// If there are too many, or the store cannot be asked.
    fn watch(&mut self, path: &str) -> Result<(), Self::Error>;

    /// Asks for no more events.
    ///
    /// # Errors
    /// If the store cannot be asked.
    fn unwatch(&mut self, path: &str) -> Result<(), Self::Error>;
}

/// A step of a handshake could not be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XenbusError<E> {
    /// The store failed.
    #[error("the store: {0}")]
    Store(E),
    /// A key that the peer's state promises is not there.
    #[error("{path} is missing")]
    Missing {
        /// The key.
        path: String,
    },
    /// A key's value makes no sense.
    #[error("{path} is {value:?}, expected {expected}")]
    Invalid {
        /// The key.
        path: String,
        /// Its value, cut to 64 characters.
        value: String,
        /// What it ought to be.
        expected: &'static str,
    },
    /// A transaction met others' changes over and over.
    #[error("a transaction met other changes {0} times")]
    Conflicts(u32),
    /// The call does not fit the state of the handshake.
    #[error("not in this state of the handshake")]
    OutOfTurn,
}

/// How often a transaction is tried: others' changes are their doing, and must not hold us for ever.
const TRANSACTION_TRIES: u32 = 64;

/// What handshakes do with any store.
pub trait StoreExt: Store + Sized {
    /// Does `work` in a transaction, again when it met others' changes.
    ///
    /// # Errors
    /// What `work` says, [`XenbusError::Store`], or [`XenbusError::Conflicts`].
    fn transaction<T>(
        &mut self,
        mut work: impl FnMut(&mut Self, Tx) -> Result<T, XenbusError<Self::Error>>,
    ) -> Result<T, XenbusError<Self::Error>> {
        for _ in 0..TRANSACTION_TRIES {
            let tx = self.begin().map_err(XenbusError::Store)?;
            match work(self, tx) {
                Ok(done) => {
                    if self.end(tx, true).map_err(XenbusError::Store)? {
                        return Ok(done);
                    }
                }
                Err(error) => {
                    self.end(tx, false).map_err(XenbusError::Store)?;
                    return Err(error);
                }
            }
        }
        Err(XenbusError::Conflicts(TRANSACTION_TRIES))
    }

    /// Writes `directory/key`.
    ///
    /// # Errors
    /// [`XenbusError::Store`].
    fn put(
        &mut self,
        tx: Tx,
        directory: &str,
        key: &str,
        value: impl fmt::Display,
    ) -> Result<(), XenbusError<Self::Error>> {
        let path = format!("{directory}/{key}");
        self.write(tx, &path, value.to_string().as_bytes())
            .map_err(XenbusError::Store)
    }

    /// The text of `directory/key`, if it is there.
    ///
    /// # Errors
    /// [`XenbusError::Store`], or [`XenbusError::Invalid`] if it is no text.
    fn text(
        &mut self,
        tx: Tx,
        directory: &str,
        key: &str,
    ) -> Result<Option<String>, XenbusError<Self::Error>> {
        let path = format!("{directory}/{key}");
        match self.read(tx, &path).map_err(XenbusError::Store)? {
            None => Ok(None),
            Some(value) => match String::from_utf8(value) {
                Ok(text) => Ok(Some(text)),
                Err(error) => Err(invalid(path, &String::from_utf8_lossy(error.as_bytes()), "text")),
            },
        }
    }

    /// The decimal number in `directory/key`, if it is there.
    ///
    /// # Errors
    /// [`XenbusError::Store`], or [`XenbusError::Invalid`] if it is no number of that size.
    fn number<T: TryFrom<u64>>(
        &mut self,
        tx: Tx,
        directory: &str,
        key: &str,
    ) -> Result<Option<T>, XenbusError<Self::Error>> {
        let Some(text) = self.text(tx, directory, key)? else {
            return Ok(None);
        };
        let number = decimal(&text).and_then(|number| T::try_from(number).ok());
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(
                format!("{directory}/{key}"),
                &text,
                "a decimal number in range",
            )),
        }
    }

    /// As [`StoreExt::number`], for a key that must be there.
    ///
    /// # Errors
    /// As [`StoreExt::number`], or [`XenbusError::Missing`].
    fn required<T: TryFrom<u64>>(
        &mut self,
        tx: Tx,
        directory: &str,
        key: &str,
    ) -> Result<T, XenbusError<Self::Error>> {
        self.number(tx, directory, key)?
            .ok_or_else(|| XenbusError::Missing {
                path: format!("{directory}/{key}"),
            })
    }

    /// Whether `directory/key` holds a number other than 0; a key that is not there is 0.
    ///
    /// # Errors
    /// As [`StoreExt::number`].
    fn flag(&mut self, tx: Tx, directory: &str, key: &str) -> Result<bool, XenbusError<Self::Error>> {
        Ok(self
            .number::<u64>(tx, directory, key)?
            .is_some_and(|value| value != 0))
    }
}

impl<S: Store> StoreExt for S {}

/// Digits and nothing else.
fn decimal(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// [`XenbusError::Invalid`], with a value of bounded length.
pub(crate) fn invalid<E>(path: String, value: &str, expected: &'static str) -> XenbusError<E> {
    XenbusError::Invalid {
        path,
        value: value.chars().take(64).collect(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_digits_only() {
        assert_eq!(decimal("18446744073709551615"), Some(u64::MAX));
        assert_eq!(decimal("007"), Some(7));
        for text in [
            "",
            "+1",
            "-1",
            " 1",
            "1 ",
            "0x1",
            "1\n",
            "18446744073709551616",
            "\u{661}",
        ] {
            assert_eq!(decimal(text), None, "{text:?}");
        }
    }
}
