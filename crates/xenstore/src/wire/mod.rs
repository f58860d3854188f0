//! The messages, as they stand on the wire.
//!
//! Two layers. [`Message`] is the raw one: any kind, any bytes, checked for
//! nothing but the length that the protocol promises, and put together from a
//! byte stream by [`Framer`]. [`Request`] and [`Reply`] are the typed one: they
//! can only be legal, and reading one from a raw message is where everything a
//! peer may have got wrong is found. Nothing in here knows what carries the
//! bytes.
//!
//! A message is a header of four little-endian words (`type`, `req_id`,
//! `tx_id`, `len`) and `len` bytes of payload, at most [`PAYLOAD_MAX`].
//!
//! ```
//! use gnttab_xenstore::wire::{Message, Reply, Request};
//!
//! let request = Request::Read("/local/domain/5/name".parse()?);
//! let message = request.encode(1, None)?;
//! assert_eq!(message.to_string(), "READ req 1 tx 0: /local/domain/5/name|");
//! assert_eq!(Request::parse(&message), Ok(request));
//!
//! let reply = Reply::Value(b"guest".as_slice().into()).encode(&message)?;
//! assert_eq!(reply.to_string(), "READ req 1 tx 0: guest");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod frame;
mod message;
mod reply;
mod request;

pub use frame::Framer;
pub use message::{FrameError, Header, Message, PayloadTooLong};
pub use reply::{BadReply, Event, Reply, Token};
pub use request::Request;

use core::fmt;
use core::num::NonZeroU32;
use core::str::FromStr;

/// The length of a header, in bytes.
pub const HEADER_LEN: usize = 16;

/// The longest payload, in bytes (`XENSTORE_PAYLOAD_MAX`). Whoever sends a
/// longer one loses its connection.
pub const PAYLOAD_MAX: usize = 4096;

macro_rules! kinds {
    ($($name:ident = $code:literal, $text:literal, $doc:literal;)*) => {
        /// What a message is: its `type` word.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u32)]
        pub enum Kind {
            $(#[doc = $doc] $name = $code,)*
        }

        impl Kind {
            /// Every kind there is.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// The kind with this `type` word.
            pub const fn from_code(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Kind::$name),)*
                    _ => None,
                }
            }

            /// The `type` word.
            pub const fn code(self) -> u32 {
                match self {
                    $(Kind::$name => $code,)*
                }
            }

            /// The name in `xs_wire.h`, without `XS_`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Kind::$name => $text,)*
                }
            }
        }
    };
}

kinds! {
    Control = 0, "CONTROL", "Commands to the store itself.";
    Directory = 1, "DIRECTORY", "The names of a node's children.";
    Read = 2, "READ", "The value of a node.";
    GetPerms = 3, "GET_PERMS", "The permissions of a node.";
    Watch = 4, "WATCH", "Hear of changes at or below a path.";
    Unwatch = 5, "UNWATCH", "Hear of them no longer.";
    TransactionStart = 6, "TRANSACTION_START", "Begin a transaction.";
    TransactionEnd = 7, "TRANSACTION_END", "Commit or abort a transaction.";
    Introduce = 8, "INTRODUCE", "Toolstack: a domain exists now.";
    Release = 9, "RELEASE", "Toolstack: a domain is gone.";
    GetDomainPath = 10, "GET_DOMAIN_PATH", "The home of a domain.";
    Write = 11, "WRITE", "Set the value of a node.";
    Mkdir = 12, "MKDIR", "Create a node.";
    Rm = 13, "RM", "Remove a node and all below it.";
    SetPerms = 14, "SET_PERMS", "Set the permissions of a node.";
    WatchEvent = 15, "WATCH_EVENT", "From the store: something changed.";
    Error = 16, "ERROR", "From the store: the request was refused.";
    IsDomainIntroduced = 17, "IS_DOMAIN_INTRODUCED", "Toolstack: does the store know a domain?";
    Resume = 18, "RESUME", "Toolstack: a domain runs on after all.";
    SetTarget = 19, "SET_TARGET", "Toolstack: a domain acts for another.";
    ResetWatches = 21, "RESET_WATCHES", "Drop all watches and transactions of the connection.";
    DirectoryPart = 22, "DIRECTORY_PART", "A part of the names of a node's children.";
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The number of a transaction, which is never zero: zero in a header means
/// that the request stands alone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TxId(NonZeroU32);

impl TxId {
    /// The transaction of this number; none for zero.
    pub const fn new(id: u32) -> Option<Self> {
        match NonZeroU32::new(id) {
            Some(id) => Some(TxId(id)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads a number as the wire has it: one or more decimal digits, nothing else.
pub(crate) fn decimal<T: FromStr>(text: &[u8]) -> Option<T> {
    // `from_str` would take a sign as well.
    if !text.first()?.is_ascii_digit() {
        return None;
    }
    core::str::from_utf8(text).ok()?.parse().ok()
}

/// The payload as strings, each ended by a NUL; none if the last is not ended.
fn strings(payload: &[u8]) -> Option<impl Iterator<Item = &[u8]> + Clone> {
    let body = match payload {
        [] => payload,
        [body @ .., 0] => body,
        _ => return None,
    };
    let all = body.split(|&byte| byte == 0);
    // Nothing at all is no string, but split() makes one of it.
    Some(all.take(if payload.is_empty() { 0 } else { usize::MAX }))
}

/// The payload as exactly `N` strings.
fn exactly<const N: usize>(payload: &[u8]) -> Option<[&[u8]; N]> {
    let mut all = strings(payload)?;
    let mut found = [&payload[..0]; N];
    for place in &mut found {
        *place = all.next()?;
    }
    all.next().is_none().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn kinds_and_codes_are_one_to_one() {
        for &kind in Kind::ALL {
            assert_eq!(Kind::from_code(kind.code()), Some(kind));
        }
        for code in [20, 23, 26, 0xffff, u32::MAX] {
            assert_eq!(Kind::from_code(code), None);
        }
    }

    #[test]
    fn strings_must_be_ended() {
        let all = |bytes| strings(bytes).map(|s| s.map(<[u8]>::to_vec).collect::<Vec<_>>());
        assert_eq!(all(b""), Some(Vec::new()));
        assert_eq!(all(b"\0"), Some(alloc::vec![b"".to_vec()]));
        assert_eq!(all(b"a\0\0"), Some(alloc::vec![b"a".to_vec(), b"".to_vec()]));
        assert_eq!(all(b"a"), None);
        assert_eq!(all(b"a\0b"), None);
    }

    #[test]
    fn numbers_are_digits_only() {
        assert_eq!(decimal::<u16>(b"65535"), Some(65535));
        for text in [b"".as_slice(), b"+1", b"-1", b" 1", b"1 ", b"65536", b"1\xff"] {
            assert_eq!(decimal::<u16>(text), None);
        }
    }
}
