use super::{Kind, Message, PayloadTooLong, Token, TxId, decimal, exactly, strings};
use crate::path::{NodePath, Place};
use crate::perms::Perms;
use crate::{DomId, Errno};
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// What a client asks.
///
/// Having one tells you: every path, number and list in it is legal. It does
/// *not* tell you that whoever sent it may have it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// A command to the store itself, uninterpreted.
    Control(Vec<u8>),
    /// The names of a node's children.
    Directory(NodePath),
    /// A part of those names, for lists longer than a message.
    DirectoryPart {
        /// The node.
        path: NodePath,
        /// The number of bytes of the whole list to leave out, each name
        /// counted with its NUL.
        offset: u32,
    },
    /// A node's value.
    Read(NodePath),
    /// The permissions of a node or a special name.
    GetPerms(Place),
    /// Hear of changes at or below a place.
    Watch {
        /// What to watch.
        place: Place,
        /// What to say with every event.
        token: Token,
    },
    /// Hear of them no longer.
    Unwatch {
        /// What is watched.
        place: Place,
        /// The token it was given.
        token: Token,
    },
    /// Begin a transaction.
    TransactionStart,
    /// End the transaction that the header names.
    TransactionEnd {
        /// Whether what was done in it shall be.
        commit: bool,
    },
    /// A domain exists now.
    Introduce {
        /// The domain.
        dom: DomId,
        /// The guest frame of its ring page.
        gfn: u64,
        /// The event channel port it is told on.
        port: u32,
    },
    /// A domain is gone.
    Release(DomId),
    /// Where a domain's home is.
    GetDomainPath(DomId),
    /// Set a node's value; create it, and those above it, if need be.
    Write {
        /// The node.
        path: NodePath,
        /// The new value.
        value: Arc<[u8]>,
    },
    /// Create a node with an empty value, if it is not there.
    Mkdir(NodePath),
    /// Remove a node and all below it.
    Rm(NodePath),
    /// Set the permissions of a node or a special name.
    SetPerms {
        /// The node.
        place: Place,
        /// All its permissions from now on.
        perms: Perms,
    },
    /// Does the store know a domain?
    IsDomainIntroduced(DomId),
    /// A domain that was shutting down to be suspended runs on.
    Resume(DomId),
    /// A domain acts for another and gets its rights.
    SetTarget {
        /// Who acts.
        dom: DomId,
        /// For whom.
        target: DomId,
    },
    /// Drop all watches and transactions of the connection.
    ResetWatches,
}

impl Request {
    /// Reads a raw message.
    ///
    /// # Errors
    ///
    /// What the store answers: `ENOSYS` for a kind that is no request,
    /// `EINVAL` for a payload that is not what this kind carries.
    pub fn parse(message: &Message) -> Result<Self, Errno> {
        let kind = message.kind().ok_or(Errno::ENOSYS)?;
        if matches!(kind, Kind::WatchEvent | Kind::Error) {
            return Err(Errno::ENOSYS);
        }
        Self::parse_payload(kind, message.payload()).ok_or(Errno::EINVAL)
    }

    fn parse_payload(kind: Kind, payload: &[u8]) -> Option<Self> {
        let node = |bytes| NodePath::parse(bytes).ok();
        let place = |bytes| Place::parse(bytes).ok();
        let one_node = || exactly(payload).and_then(|[path]| node(path));
        let one_dom = || exactly(payload).and_then(|[dom]| DomId::parse(dom));
        Some(match kind {
            Kind::Control => Request::Control(payload.to_vec()),
            Kind::Directory => Request::Directory(one_node()?),
            Kind::DirectoryPart => {
                let [path, offset] = exactly(payload)?;
                Request::DirectoryPart {
                    path: node(path)?,
                    offset: decimal(offset)?,
                }
            }
            Kind::Read => Request::Read(one_node()?),
            Kind::GetPerms => {
                let [path] = exactly(payload)?;
                Request::GetPerms(place(path)?)
            }
            Kind::Watch => {
                let [path, token] = exactly(payload)?;
                Request::Watch {
                    place: place(path)?,
                    token: Token::new(token)?,
                }
            }
            Kind::Unwatch => {
                let [path, token] = exactly(payload)?;
                Request::Unwatch {
                    place: place(path)?,
                    token: Token::new(token)?,
                }
            }
            // What these two carry says nothing; clients send one empty string.
            Kind::TransactionStart => Request::TransactionStart,
            Kind::ResetWatches => Request::ResetWatches,
            Kind::TransactionEnd => match exactly(payload)? {
                [b"T"] => Request::TransactionEnd { commit: true },
                [b"F"] => Request::TransactionEnd { commit: false },
                _ => return None,
            },
            Kind::Introduce => {
                let [dom, gfn, port] = exactly(payload)?;
                Request::Introduce {
                    dom: DomId::parse(dom)?,
                    gfn: decimal(gfn)?,
                    port: decimal(port)?,
                }
            }
            Kind::Release => Request::Release(one_dom()?),
            Kind::GetDomainPath => Request::GetDomainPath(one_dom()?),
            Kind::Write => {
                let end = payload.iter().position(|&byte| byte == 0)?;
                let (path, value) = (&payload[..end], &payload[end + 1..]);
                Request::Write {
                    path: node(path)?,
                    value: value.into(),
                }
            }
            Kind::Mkdir => Request::Mkdir(one_node()?),
            Kind::Rm => Request::Rm(one_node()?),
            Kind::SetPerms => {
                let mut all = strings(payload)?;
                let place = place(all.next()?)?;
                Request::SetPerms {
                    place,
                    perms: Perms::parse(all).ok()?,
                }
            }
            Kind::IsDomainIntroduced => Request::IsDomainIntroduced(one_dom()?),
            Kind::Resume => Request::Resume(one_dom()?),
            Kind::SetTarget => {
                let [dom, target] = exactly(payload)?;
                Request::SetTarget {
                    dom: DomId::parse(dom)?,
                    target: DomId::parse(target)?,
                }
            }
            Kind::WatchEvent | Kind::Error => return None,
        })
    }

    /// The kind of message that carries it.
    pub fn kind(&self) -> Kind {
        match self {
            Request::Control(_) => Kind::Control,
            Request::Directory(_) => Kind::Directory,
            Request::DirectoryPart { .. } => Kind::DirectoryPart,
            Request::Read(_) => Kind::Read,
            Request::GetPerms(_) => Kind::GetPerms,
            Request::Watch { .. } => Kind::Watch,
            Request::Unwatch { .. } => Kind::Unwatch,
            Request::TransactionStart => Kind::TransactionStart,
            Request::TransactionEnd { .. } => Kind::TransactionEnd,
            Request::Introduce { .. } => Kind::Introduce,
            Request::Release(_) => Kind::Release,
            Request::GetDomainPath(_) => Kind::GetDomainPath,
            Request::Write { .. } => Kind::Write,
            Request::Mkdir(_) => Kind::Mkdir,
            Request::Rm(_) => Kind::Rm,
            Request::SetPerms { .. } => Kind::SetPerms,
            Request::IsDomainIntroduced(_) => Kind::IsDomainIntroduced,
            Request::Resume(_) => Kind::Resume,
            Request::SetTarget { .. } => Kind::SetTarget,
            Request::ResetWatches => Kind::ResetWatches,
        }
    }

    /// The message that carries it.
    ///
    /// # Errors
    ///
    /// [`PayloadTooLong`] if path and value, or path and token, do not fit one.
    pub fn encode(&self, req_id: u32, tx: Option<TxId>) -> Result<Message, PayloadTooLong> {
        let mut payload = Vec::new();
        let mut string = |text: &[u8]| {
            payload.extend_from_slice(text);
            payload.push(0);
        };
        match self {
            Request::Control(bytes) => payload.extend_from_slice(bytes),
            Request::Directory(path) | Request::Read(path) | Request::Mkdir(path) | Request::Rm(path) => {
                string(path.as_str().as_bytes())
            }
            Request::GetPerms(place) => string(place.as_str().as_bytes()),
            Request::DirectoryPart { path, offset } => {
                string(path.as_str().as_bytes());
                string(format!("{offset}").as_bytes());
            }
            Request::Watch { place, token } | Request::Unwatch { place, token } => {
                string(place.as_str().as_bytes());
                string(token.as_bytes());
            }
            Request::TransactionStart | Request::ResetWatches => string(b""),
            Request::TransactionEnd { commit } => string(if *commit { b"T" } else { b"F" }),
            Request::Introduce { dom, gfn, port } => {
                string(format!("{}", dom.get()).as_bytes());
                string(format!("{gfn}").as_bytes());
                string(format!("{port}").as_bytes());
            }
            Request::Release(dom)
            | Request::GetDomainPath(dom)
            | Request::IsDomainIntroduced(dom)
            | Request::Resume(dom) => string(format!("{}", dom.get()).as_bytes()),
            Request::Write { path, value } => {
                string(path.as_str().as_bytes());
                payload.extend_from_slice(value);
            }
            Request::SetPerms { place, perms } => {
                string(place.as_str().as_bytes());
                perms.encode(&mut payload);
            }
            Request::SetTarget { dom, target } => {
                string(format!("{}", dom.get()).as_bytes());
                string(format!("{}", target.get()).as_bytes());
            }
        }
        Message::new(self.kind().code(), req_id, tx.map_or(0, TxId::get), payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(kind: Kind, payload: &[u8]) -> Result<Request, Errno> {
        Request::parse(&Message::new(kind.code(), 1, 0, payload.to_vec()).unwrap())
    }

    #[test]
    fn payloads_that_are_not_what_the_kind_carries_are_einval() {
        for (kind, payload) in [
            (Kind::Read, b"".as_slice()),
            (Kind::Read, b"/a"),
            (Kind::Read, b"/a\0\0"),
            (Kind::Read, b"/a\0/b\0"),
            (Kind::Read, b"\0"),
            (Kind::Read, b"@releaseDomain\0"),
            (Kind::Write, b"/a"),
            (Kind::Write, b""),
            (Kind::Watch, b"/a\0"),
            (Kind::Watch, b"/a\0tok"),
            (Kind::Watch, b"/a\0tok\0more\0"),
            (Kind::Watch, b"@otherName\0tok\0"),
            (Kind::TransactionEnd, b"\0"),
            (Kind::TransactionEnd, b"t\0"),
            (Kind::TransactionEnd, b"T"),
            (Kind::SetPerms, b"/a\0"),
            (Kind::SetPerms, b"/a\0n0"),
            (Kind::SetPerms, b"/a\0x0\0"),
            (Kind::GetDomainPath, b"-1\0"),
            (Kind::GetDomainPath, b"65536\0"),
            (Kind::Introduce, b"1\x002\0"),
            (Kind::SetTarget, b"1\0"),
            (Kind::DirectoryPart, b"/a\0"),
            (Kind::DirectoryPart, b"/a\0-1\0"),
        ] {
            assert_eq!(parse(kind, payload), Err(Errno::EINVAL), "{kind} {payload:?}");
        }
    }

    #[test]
    fn kinds_that_are_no_requests_are_enosys() {
        for code in [15, 16, 20, 23, 26, 0xffff, u32::MAX] {
            let message = Message::new(code, 1, 0, b"/a\0".to_vec()).unwrap();
            assert_eq!(Request::parse(&message), Err(Errno::ENOSYS));
        }
    }

    #[test]
    fn golden_bytes() {
        let golden = |request: Request, tx, kind: u8, payload: &[u8]| {
            let message = request.encode(0x0102_0304, TxId::new(tx)).unwrap();
            let mut bytes = alloc::vec![kind, 0, 0, 0, 4, 3, 2, 1];
            bytes.extend_from_slice(&tx.to_le_bytes());
            bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(payload);
            assert_eq!(message.to_bytes(), bytes);
            assert_eq!(Request::parse(&Message::from_bytes(&bytes).unwrap()), Ok(request));
        };
        let node = |text: &str| text.parse::<NodePath>().unwrap();
        let place = |text: &str| text.parse::<Place>().unwrap();
        let token = Token::new(b"tok").unwrap();
        let dom = DomId::new(5);
        golden(Request::Control(b"print\0x\0".to_vec()), 0, 0, b"print\0x\0");
        golden(Request::Directory(node("/")), 9, 1, b"/\0");
        golden(Request::Read(node("/a/b")), 9, 2, b"/a/b\0");
        golden(Request::GetPerms(place("name")), 9, 3, b"name\0");
        let watch = Request::Watch {
            place: place("@introduceDomain"),
            token: token.clone(),
        };
        golden(watch, 0, 4, b"@introduceDomain\0tok\0");
        golden(
            Request::Unwatch {
                place: place("device"),
                token,
            },
            0,
            5,
            b"device\0tok\0",
        );
        golden(Request::TransactionStart, 0, 6, b"\0");
        golden(Request::TransactionEnd { commit: true }, 9, 7, b"T\0");
        golden(Request::TransactionEnd { commit: false }, 9, 7, b"F\0");
        golden(
            Request::Introduce {
                dom,
                gfn: 0xfeff,
                port: 3,
            },
            0,
            8,
            b"5\x0065279\x003\0",
        );
        golden(Request::Release(dom), 0, 9, b"5\0");
        golden(Request::GetDomainPath(dom), 0, 10, b"5\0");
        let value = b"v\0v".as_slice().into();
        golden(
            Request::Write {
                path: node("/a"),
                value,
            },
            9,
            11,
            b"/a\0v\0v",
        );
        golden(Request::Mkdir(node("a")), 9, 12, b"a\0");
        golden(Request::Rm(node("a")), 9, 13, b"a\0");
        let perms: Perms = "n5,r0".parse().unwrap();
        golden(
            Request::SetPerms {
                place: place("/a"),
                perms,
            },
            9,
            14,
            b"/a\0n5\0r0\0",
        );
        golden(Request::IsDomainIntroduced(dom), 0, 17, b"5\0");
        golden(Request::Resume(dom), 0, 18, b"5\0");
        golden(
            Request::SetTarget {
                dom,
                target: DomId::new(6),
            },
            0,
            19,
            b"5\x006\0",
        );
        golden(Request::ResetWatches, 0, 21, b"\0");
        golden(
            Request::DirectoryPart {
                path: node("/a"),
                offset: 12,
            },
            0,
            22,
            b"/a\x0012\0",
        );
    }

    proptest! {
        /// Whatever is understood is a fixed point: saying it again says the same.
        #[test]
        fn any_payload_is_read_or_refused(
            kind in 0..24_u32,
            payload in prop::collection::vec(prop::sample::select(b"/a@0nrT\0\xff-".as_slice()), 0..12),
        ) {
            let message = Message::new(kind, 1, 2, payload).unwrap();
            if let Ok(request) = Request::parse(&message) {
                let again = request.encode(1, TxId::new(2)).unwrap();
                prop_assert_eq!(Request::parse(&again), Ok(request));
            }
        }
    }
}
