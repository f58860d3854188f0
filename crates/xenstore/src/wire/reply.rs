use super::{Kind, Message, PAYLOAD_MAX, PayloadTooLong, TxId, decimal, exactly, strings};
use crate::Errno;
use crate::path::{Path, Place, is_name};
use crate::perms::Perms;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

/// What a client gives with a watch and gets back with each of its events, to
/// tell them apart.
///
/// Having one tells you: there is no NUL in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(Arc<[u8]>);

impl Token {
    /// A token of these bytes; none if there is a NUL among them.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (!bytes.contains(&0)).then(|| Token(bytes.into()))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Something changed at or below a watched place.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Event {
    /// What changed, in the form the watch was set: relative if that was.
    pub place: Place,
    /// The token of the watch.
    pub token: Token,
}

impl Event {
    /// The message that carries it; events have no numbers.
    ///
    /// # Errors
    ///
    /// [`PayloadTooLong`] if path and token do not fit one.
    pub fn encode(&self) -> Result<Message, PayloadTooLong> {
        let mut payload = Vec::with_capacity(self.payload_len());
        payload.extend_from_slice(self.place.as_str().as_bytes());
        payload.push(0);
        payload.extend_from_slice(self.token.as_bytes());
        payload.push(0);
        Message::new(Kind::WatchEvent.code(), 0, 0, payload)
    }

    /// Whether it fits a message.
    pub(crate) fn fits(&self) -> bool {
        self.payload_len() <= PAYLOAD_MAX
    }

    fn payload_len(&self) -> usize {
        self.place.as_str().len() + self.token.as_bytes().len() + 2
    }

    /// Reads the payload of an event.
    ///
    /// # Errors
    ///
    /// [`BadReply`].
    pub fn parse(message: &Message) -> Result<Self, BadReply> {
        let event = || {
            let [place, token] = exactly(message.payload())?;
            Some(Event {
                place: Place::parse(place).ok()?,
                token: Token::new(token)?,
            })
        };
        match message.kind() {
            Some(Kind::WatchEvent) => event().ok_or_else(|| BadReply(message.clone())),
            _ => Err(BadReply(message.clone())),
        }
    }
}

/// A message that is not what a store answers.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the store sent what is no answer: {0}")]
pub struct BadReply(pub Message);

/// What the store answers.
///
/// Having one tells you: it is a legal answer to some request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// It was done.
    Ok,
    /// It was refused.
    Error(Errno),
    /// The value of a node.
    Value(Arc<[u8]>),
    /// The names of all children of a node.
    Names(Vec<Arc<str>>),
    /// Some of the names of a node's children.
    Part {
        /// Changes whenever a child comes or goes. A reader that sees it
        /// change begins again.
        generation: u64,
        /// The names.
        names: Vec<Arc<str>>,
        /// Whether these are the last.
        last: bool,
    },
    /// The permissions of a node.
    Perms(Perms),
    /// The number of a new transaction.
    Transaction(TxId),
    /// The home of a domain.
    DomainPath(Path),
    /// Whether the store knows a domain.
    Introduced(bool),
}

impl Reply {
    /// The message that answers `request` with it.
    ///
    /// # Errors
    ///
    /// [`PayloadTooLong`] if it does not fit one.
    pub fn encode(&self, request: &Message) -> Result<Message, PayloadTooLong> {
        let mut payload = Vec::new();
        match self {
            Reply::Ok => payload.extend_from_slice(b"OK\0"),
            Reply::Error(errno) => {
                payload.extend_from_slice(errno.name().as_bytes());
                payload.push(0);
                return request.answer(Kind::Error.code(), payload);
            }
            Reply::Value(value) => payload.extend_from_slice(value),
            Reply::Names(names) => push_names(&mut payload, names),
            Reply::Part {
                generation,
                names,
                last,
            } => {
                payload.extend_from_slice(format!("{generation}\0").as_bytes());
                push_names(&mut payload, names);
                if *last {
                    payload.push(0);
                }
            }
            Reply::Perms(perms) => perms.encode(&mut payload),
            Reply::Transaction(tx) => payload.extend_from_slice(format!("{tx}\0").as_bytes()),
            Reply::DomainPath(path) => payload.extend_from_slice(format!("{path}\0").as_bytes()),
            Reply::Introduced(yes) => payload.extend_from_slice(if *yes { b"T\0" } else { b"F\0" }),
        }
        request.echo(payload)
    }

    /// Reads a raw message that is no event.
    ///
    /// # Errors
    ///
    /// [`BadReply`].
    pub fn parse(message: &Message) -> Result<Self, BadReply> {
        message
            .kind()
            .and_then(|kind| Self::parse_payload(kind, message.payload()))
            .ok_or_else(|| BadReply(message.clone()))
    }

    fn parse_payload(kind: Kind, payload: &[u8]) -> Option<Self> {
        Some(match kind {
            Kind::Error => {
                let [name] = exactly(payload)?;
                Reply::Error(Errno::from_name(name)?)
            }
            Kind::Read | Kind::Control => Reply::Value(payload.into()),
            Kind::Directory => Reply::Names(names(strings(payload)?)?),
            Kind::DirectoryPart => {
                let mut all = strings(payload)?;
                let generation = decimal(all.next()?)?;
                let last = all.clone().last().is_some_and(<[u8]>::is_empty);
                let count = all.clone().count() - usize::from(last);
                Reply::Part {
                    generation,
                    names: names(all.take(count))?,
                    last,
                }
            }
            Kind::GetPerms => Reply::Perms(Perms::parse(strings(payload)?).ok()?),
            Kind::TransactionStart => {
                let [id] = exactly(payload)?;
                Reply::Transaction(TxId::new(decimal(id)?)?)
            }
            Kind::GetDomainPath => {
                let [path] = exactly(payload)?;
                Reply::DomainPath(Path::parse(path).ok()?)
            }
            Kind::IsDomainIntroduced => match exactly(payload)? {
                [b"T"] => Reply::Introduced(true),
                [b"F"] => Reply::Introduced(false),
                _ => return None,
            },
            Kind::WatchEvent => return None,
            _ => match exactly(payload)? {
                [b"OK"] => Reply::Ok,
                _ => return None,
            },
        })
    }
}

fn push_names(payload: &mut Vec<u8>, names: &[Arc<str>]) {
    for name in names {
        payload.extend_from_slice(name.as_bytes());
        payload.push(0);
    }
}

fn names<'a>(all: impl Iterator<Item = &'a [u8]>) -> Option<Vec<Arc<str>>> {
    all.map(|name| {
        let text = String::from_utf8_lossy(name);
        is_name(name).then(|| Arc::from(text))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let golden = |kind: Kind, reply: Reply, answer: u8, payload: &[u8]| {
            let request = Message::new(kind.code(), 0x0102_0304, 9, Vec::new()).unwrap();
            let message = reply.encode(&request).unwrap();
            let mut bytes = vec![answer, 0, 0, 0, 4, 3, 2, 1, 9, 0, 0, 0];
            bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(payload);
            assert_eq!(message.to_bytes(), bytes);
            assert_eq!(Reply::parse(&message), Ok(reply));
        };
        let names = |all: &[&str]| all.iter().map(|&name| Arc::from(name)).collect::<Vec<_>>();
        golden(Kind::Write, Reply::Ok, 11, b"OK\0");
        golden(Kind::Write, Reply::Error(Errno::E2BIG), 16, b"E2BIG\0");
        golden(Kind::Read, Reply::Value(b"v\0".as_slice().into()), 2, b"v\0");
        golden(Kind::Directory, Reply::Names(Vec::new()), 1, b"");
        golden(Kind::Directory, Reply::Names(names(&["a", "b"])), 1, b"a\0b\0");
        let part = Reply::Part {
            generation: 7,
            names: names(&["a", "b"]),
            last: false,
        };
        golden(Kind::DirectoryPart, part, 22, b"7\0a\0b\0");
        let part = Reply::Part {
            generation: 7,
            names: names(&["c"]),
            last: true,
        };
        golden(Kind::DirectoryPart, part, 22, b"7\0c\0\0");
        golden(
            Kind::GetPerms,
            Reply::Perms("n5,r0".parse().unwrap()),
            3,
            b"n5\0r0\0",
        );
        golden(
            Kind::TransactionStart,
            Reply::Transaction(TxId::new(12).unwrap()),
            6,
            b"12\0",
        );
        let home = "/local/domain/5".parse().unwrap();
        golden(
            Kind::GetDomainPath,
            Reply::DomainPath(home),
            10,
            b"/local/domain/5\0",
        );
        golden(Kind::IsDomainIntroduced, Reply::Introduced(true), 17, b"T\0");
        golden(Kind::IsDomainIntroduced, Reply::Introduced(false), 17, b"F\0");

        let event = Event {
            place: "device/vbd".parse().unwrap(),
            token: Token::new(b"tok").unwrap(),
        };
        let message = event.encode().unwrap();
        assert_eq!(
            message.to_bytes(),
            b"\x0f\0\0\0\0\0\0\0\0\0\0\0\x0f\0\0\0device/vbd\0tok\0"
        );
        assert_eq!(Event::parse(&message), Ok(event));
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        for (kind, payload) in [
            (Kind::Error, b"EWHAT\0".as_slice()),
            (Kind::Write, b"ok\0"),
            (Kind::Write, b""),
            (Kind::TransactionStart, b"0\0"),
            (Kind::Directory, b"a/b\0"),
            (Kind::Directory, b"a"),
            (Kind::WatchEvent, b"/a\0t\0"),
        ] {
            let message = Message::new(kind.code(), 0, 0, payload.to_vec()).unwrap();
            assert_eq!(Reply::parse(&message), Err(BadReply(message)));
        }
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(
            kind in 0..24_u32,
            payload in prop::collection::vec(prop::sample::select(b"/a@0nrT\0\xff-".as_slice()), 0..12),
        ) {
            let message = Message::new(kind, 1, 2, payload).unwrap();
            let _ = Event::parse(&message);
            if let Ok(reply) = Reply::parse(&message) {
                prop_assert_eq!(Reply::parse(&reply.encode(&message).unwrap()), Ok(reply));
            }
        }
    }
}
