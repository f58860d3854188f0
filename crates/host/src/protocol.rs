//! What the monitor and a domain's process say to each other.
//!
//! There are two ways. Calls go through the [hypercall areas](crate::area), one for each vCPU: a number and
//! four arguments, constants below. Descriptors come over the channel, always as the consequence of a call
//! (or at the start) and always before its answer: a [`Notice`] says what they are. A domain sends nothing
//! over the channel.
//!
//! Every layout is little-endian, of fixed size, and read with each field checked.

use std::fmt;

use gnttab_abi::{Abi, DomId, Errno, Gfn, GrantRef};

/// The calling ABI of domains on this machine.
pub const ABI: Abi = if cfg!(target_arch = "aarch64") {
    Abi::Arm
} else {
    Abi::X86_64
};

/// `grant_table_op`: command, offset of the items in the buffer, their count.
pub const CALL_GRANT_TABLE: u32 = 20;
/// `memory_op`: command, offset of the argument. Only `add_to_physmap` for the grant table; what it
/// answers is the number of the page among the domain's table pages.
pub const CALL_MEMORY: u32 = 12;
/// Makes pages shareable: first gfn, count. Each comes as a [`NoticeKind::Page`].
pub const CALL_SHARE: u32 = 0x4001;
/// Renews a page that was exposed: gfn. Answers 1 if it comes as a [`NoticeKind::Page`], 0 if it did not
/// need to; `EBUSY` while somebody maps it.
pub const CALL_RENEW: u32 = 0x4002;
/// Makes one end of an event channel: the domain that may take the other. Answers the port, which comes as
/// a [`NoticeKind::Port`].
pub const CALL_PORT_NEW: u32 = 0x4003;
/// Takes the other end: domain and its port. Answers the own port, which comes as a [`NoticeKind::Port`].
pub const CALL_PORT_BIND: u32 = 0x4004;
/// Gives a port up: its number. The descriptors are the domain's to close.
pub const CALL_PORT_CLOSE: u32 = 0x4005;

/// Says how the domain's grant table stands, as its driver knows it: offset and length of a [`Report`] in the buffer.
pub const CALL_REPORT: u32 = 0x4006;

/// Pages that one [`CALL_SHARE`] may name.
pub const MAX_SHARE: u64 = 256;

const MAGIC: u32 = 0x4754_4e47;
const VERSION: u32 = 1;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a {what}: {why}")]
pub struct BadMessage {
    what: &'static str,
    why: &'static str,
}

/// The monitor's first words: what the domain is made of.
///
/// With it come, in this order: its memory, its table pages, its exposure bytes (read-only), its
/// connection to the store. A [`NoticeKind::Vcpu`] for each vCPU follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The domain's number.
    pub domain: DomId,
    /// How many vCPUs it has.
    pub vcpus: u16,
    /// Pages of its memory: gfns from 0.
    pub ram_pages: u32,
    /// Pages for others' pages: the gfns behind its memory.
    pub foreign_pages: u32,
    /// Pages set aside for its grant table and status words.
    pub table_pages: u32,
}

/// What a program says that joins over a socket, before the monitor's [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// What people are to call the domain; up to 32 bytes are kept.
    pub name: String,
    /// How many vCPUs it is to have.
    pub vcpus: u16,
    /// Pages of its memory.
    pub ram_pages: u32,
    /// Pages for others' pages.
    pub foreign_pages: u32,
}

impl Default for Join {
    fn default() -> Self {
        Join {
            name: "joined".into(),
            vcpus: 1,
            ram_pages: 16 * 1024,
            foreign_pages: 4096,
        }
    }
}

/// Bytes of a [`Join`].
pub const JOIN_SIZE: usize = 64;
/// What the monitor says in the place of a hello begins with this, if it says why not.
pub const REFUSAL: &[u8] = b"no: ";
const JOIN_MAGIC: u32 = 0x4754_4e4a;
const NAME: usize = 32;

/// Descriptors that come with a [`Hello`].
pub const HELLO_DESCRIPTORS: usize = 4;

/// What descriptors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NoticeKind {
    /// The hypercall area of a vCPU; the key is its number.
    Vcpu,
    /// New backing of pages of the domain's own; the key is the first gfn, the others follow it.
    Page,
    /// Another domain's page that was mapped for reading; the key is `host_addr`.
    ForeignRead,
    /// Another domain's page that was mapped for writing; the key is `host_addr`.
    ForeignWrite,
    /// An event port, what comes in and what goes out; the key is its number.
    Port,
}

impl NoticeKind {
    const ALL: [NoticeKind; 5] = [
        NoticeKind::Vcpu,
        NoticeKind::Page,
        NoticeKind::ForeignRead,
        NoticeKind::ForeignWrite,
        NoticeKind::Port,
    ];
}

/// Says what descriptors are.
///
/// A message has one notice for all its descriptors, or one for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What they are.
    pub kind: NoticeKind,
    /// Which of that kind: see [`NoticeKind`].
    pub key: u64,
}

/// Bytes of a [`Hello`].
pub const HELLO_SIZE: usize = 32;
/// Bytes of a [`Notice`].
pub const NOTICE_SIZE: usize = 16;

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

impl Hello {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_SIZE] {
        let mut bytes = [0; HELLO_SIZE];
        let ids = u32::from(self.domain.0) | u32::from(self.vcpus) << 16;
        let words = [
            MAGIC,
            VERSION,
            ids,
            self.ram_pages,
            self.foreign_pages,
            self.table_pages,
        ];
        for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`BadMessage`] for anything that [`Self::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<Hello, BadMessage> {
        let bad = |why| BadMessage { what: "hello", why };
        if bytes.len() != HELLO_SIZE {
            return Err(bad("its length is wrong"));
        }
        if word(bytes, 0) != MAGIC {
            return Err(bad("it is no hello"));
        }
        if word(bytes, 4) != VERSION {
            return Err(bad("this program and the monitor are of different versions"));
        }
        let [a, b, c, d] = word(bytes, 8).to_le_bytes();
        let hello = Hello {
            domain: DomId(u16::from_le_bytes([a, b])),
            vcpus: u16::from_le_bytes([c, d]),
            ram_pages: word(bytes, 12),
            foreign_pages: word(bytes, 16),
            table_pages: word(bytes, 20),
        };
        if hello.vcpus == 0 || hello.ram_pages == 0 || hello.table_pages == 0 {
            return Err(bad("the domain has no vCPU, no memory or no table"));
        }
        Ok(hello)
    }

    /// The first gfn of the window for others' pages.
    #[must_use]
    pub fn first_foreign(&self) -> Gfn {
        Gfn(self.ram_pages.into())
    }
}

impl Join {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; JOIN_SIZE] {
        let mut bytes = [0; JOIN_SIZE];
        let words = [
            JOIN_MAGIC,
            VERSION,
            self.vcpus.into(),
            self.ram_pages,
            self.foreign_pages,
        ];
        for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        let name = cut(&self.name, NAME);
        bytes[NAME..NAME + name.len()].copy_from_slice(name);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`BadMessage`] for anything that [`Self::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<Join, BadMessage> {
        let bad = |why| BadMessage {
            what: "request to join",
            why,
        };
        if bytes.len() != JOIN_SIZE {
            return Err(bad("its length is wrong"));
        }
        if word(bytes, 0) != JOIN_MAGIC {
            return Err(bad("it is no request to join"));
        }
        if word(bytes, 4) != VERSION {
            return Err(bad("the program and the monitor are of different versions"));
        }
        let name = bytes[NAME..].split(|byte| *byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| bad("the name is not UTF-8"))?;
        if name.chars().any(char::is_control) {
            return Err(bad("the name is not printable"));
        }
        Ok(Join {
            name: name.to_owned(),
            vcpus: u16::try_from(word(bytes, 8)).map_err(|_| bad("there are too many vCPUs"))?,
            ram_pages: word(bytes, 12),
            foreign_pages: word(bytes, 16),
        })
    }
}

impl Notice {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; NOTICE_SIZE] {
        let mut bytes = [0; NOTICE_SIZE];
        let kind = NoticeKind::ALL
            .iter()
            .zip(1_u32..)
            .find(|(kind, _)| **kind == self.kind);
        bytes[..4].copy_from_slice(&kind.map_or(0, |(_, number)| number).to_le_bytes());
        bytes[8..].copy_from_slice(&self.key.to_le_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`BadMessage`] for anything that [`Self::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<Notice, BadMessage> {
        let bad = |why| BadMessage { what: "notice", why };
        let bytes: &[u8; NOTICE_SIZE] = bytes.try_into().map_err(|_| bad("its length is wrong"))?;
        let number = word(bytes, 0);
        let kind = NoticeKind::ALL
            .iter()
            .zip(1_u32..)
            .find(|(_, known)| *known == number);
        let (kind, _) = kind.ok_or(bad("its kind is unknown"))?;
        let key = u64::from(word(bytes, 8)) | u64::from(word(bytes, 12)) << 32;
        Ok(Notice { kind: *kind, key })
    }
}

/// What a domain says of its own grant table, which only its driver knows. The monitor shows it to people and acts on none
/// of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// References that exist.
    pub refs: u32,
    /// References that are free.
    pub free: u32,
    /// References, with their pages, that the driver has given up for good.
    pub leaked: u64,
    /// Ends of access that peers do not let happen yet.
    pub pending_total: u32,
    /// The first of these, [`MOST_PENDING`] at most.
    pub pending: Vec<PendingEnd>,
    /// Who has how many references, [`MOST_CONSUMERS`] at most.
    pub consumers: Vec<Consumer>,
}

/// An end of access that the peer does not let happen yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingEnd {
    /// The reference.
    pub gref: GrantRef,
    /// Who still uses it.
    pub peer: DomId,
    /// How often the end was attempted.
    pub tries: u32,
}

/// A consumer of a grant table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consumer {
    /// What it is called; 16 bytes are kept.
    pub name: String,
    /// References that it has.
    pub used: u32,
    /// References that it may have.
    pub quota: u32,
    /// How often it was refused references for that.
    pub refused: u64,
}

/// Ends of access in one [`Report`].
pub const MOST_PENDING: usize = 256;
/// Consumers in one [`Report`].
pub const MOST_CONSUMERS: usize = 64;
const REPORT_MAGIC: u32 = 0x4754_4e52;
const REPORT_HEAD: usize = 40;
const PENDING_SIZE: usize = 12;
const CONSUMER_SIZE: usize = 32;
const CONSUMER_NAME: usize = 16;
/// Bytes of the longest [`Report`].
pub const REPORT_SIZE: usize = REPORT_HEAD + MOST_PENDING * PENDING_SIZE + MOST_CONSUMERS * CONSUMER_SIZE;

impl Report {
    /// As bytes; what is beyond the numbers that it may have is left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let pending = &self.pending[..self.pending.len().min(MOST_PENDING)];
        let consumers = &self.consumers[..self.consumers.len().min(MOST_CONSUMERS)];
        let mut bytes = Vec::new();
        let put = |bytes: &mut Vec<u8>, words: &[u32]| {
            words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        };
        put(
            &mut bytes,
            &[
                REPORT_MAGIC,
                VERSION,
                count(pending.len()),
                count(consumers.len()),
            ],
        );
        put(&mut bytes, &[self.refs, self.free, self.pending_total, 0]);
        bytes.extend(self.leaked.to_le_bytes());
        for end in pending {
            put(&mut bytes, &[end.gref.0, end.peer.0.into(), end.tries]);
        }
        for consumer in consumers {
            let mut name = [0; CONSUMER_NAME];
            let kept = cut(&consumer.name, CONSUMER_NAME);
            name[..kept.len()].copy_from_slice(kept);
            bytes.extend(name);
            put(&mut bytes, &[consumer.used, consumer.quota]);
            bytes.extend(consumer.refused.to_le_bytes());
        }
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`BadMessage`] for anything that [`Self::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<Report, BadMessage> {
        let bad = |why| BadMessage { what: "report", why };
        if bytes.len() < REPORT_HEAD || word(bytes, 0) != REPORT_MAGIC {
            return Err(bad("it is no report"));
        }
        if word(bytes, 4) != VERSION {
            return Err(bad("the program and the monitor are of different versions"));
        }
        let count = |at, most| {
            usize::try_from(word(bytes, at))
                .ok()
                .filter(|count| *count <= most)
        };
        let pending = count(8, MOST_PENDING).ok_or(bad("too many pending ends"))?;
        let consumers = count(12, MOST_CONSUMERS).ok_or(bad("too many consumers"))?;
        let (head, rest) = bytes.split_at(REPORT_HEAD);
        if rest.len() != pending * PENDING_SIZE + consumers * CONSUMER_SIZE {
            return Err(bad("its length is wrong"));
        }
        let long = |bytes: &[u8], at| u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32;
        let (ends, rest) = rest.split_at(pending * PENDING_SIZE);
        let end = |bytes: &[u8]| {
            Ok(PendingEnd {
                gref: GrantRef(word(bytes, 0)),
                peer: DomId(u16::try_from(word(bytes, 4)).map_err(|_| bad("a peer is no domain"))?),
                tries: word(bytes, 8),
            })
        };
        let consumer = |bytes: &[u8]| {
            let name = bytes[..CONSUMER_NAME].split(|byte| *byte == 0).next();
            let name =
                std::str::from_utf8(name.unwrap_or_default()).map_err(|_| bad("a name is not UTF-8"))?;
            if name.chars().any(char::is_control) {
                return Err(bad("a name is not printable"));
            }
            Ok(Consumer {
                name: name.to_owned(),
                used: word(bytes, 16),
                quota: word(bytes, 20),
                refused: long(bytes, 24),
            })
        };
        Ok(Report {
            refs: word(head, 16),
            free: word(head, 20),
            pending_total: word(head, 24),
            leaked: long(head, 32),
            pending: ends
                .chunks_exact(PENDING_SIZE)
                .map(end)
                .collect::<Result<_, _>>()?,
            consumers: rest
                .chunks_exact(CONSUMER_SIZE)
                .map(consumer)
                .collect::<Result<_, _>>()?,
        })
    }
}

/// As much of a text as so many bytes hold.
fn cut(text: &str, most: usize) -> &[u8] {
    let at = (0..=most.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    text.get(..at.unwrap_or(0)).unwrap_or_default().as_bytes()
}

/// What a call answered: a number that is not negative, or an error.
///
/// # Errors
/// The error whose negative number it is; [`Errno::Io`] for one that is not known.
pub fn answer(result: i64) -> Result<u64, Errno> {
    match u64::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) => Err(u16::try_from(result.unsigned_abs())
            .ok()
            .and_then(Errno::from_number)
            .unwrap_or(Errno::Io)),
    }
}

impl fmt::Display for NoticeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoticeKind::Vcpu => "hypercall area",
            NoticeKind::Page => "page",
            NoticeKind::ForeignRead => "foreign page for reading",
            NoticeKind::ForeignWrite => "foreign page for writing",
            NoticeKind::Port => "event port",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_sent() {
        let hello = Hello {
            domain: DomId(7),
            vcpus: 2,
            ram_pages: 4096,
            foreign_pages: 100,
            table_pages: 72,
        };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        for kind in NoticeKind::ALL {
            let notice = Notice {
                kind,
                key: 0x1234_5678_9abc_def0,
            };
            assert_eq!(Notice::decode(&notice.encode()), Ok(notice));
        }
    }

    #[test]
    fn a_request_to_join_comes_back_as_sent_and_others_are_refused() {
        let join = Join {
            name: "front".into(),
            vcpus: 3,
            ram_pages: 77,
            foreign_pages: 5,
        };
        assert_eq!(Join::decode(&join.encode()), Ok(join.clone()));
        let long = Join {
            name: "é".repeat(40),
            ..join.clone()
        };
        assert_eq!(Join::decode(&long.encode()).unwrap().name, "é".repeat(16));
        for len in 0..JOIN_SIZE {
            assert!(Join::decode(&join.encode()[..len]).is_err());
        }
        for (at, value) in [(0, 0), (4, 9), (10, 1), (32, 0xff), (33, 0x1b)] {
            let mut bytes = join.encode();
            bytes[at] = value;
            assert!(Join::decode(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_message_cut_in_half_or_from_elsewhere_is_refused() {
        let hello = Hello {
            domain: DomId(7),
            vcpus: 1,
            ram_pages: 1,
            foreign_pages: 0,
            table_pages: 1,
        };
        let bytes = hello.encode();
        for len in 0..bytes.len() {
            assert!(Hello::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        for (at, value) in [(0, 0), (4, 9), (10, 0), (12, 0), (20, 0)] {
            let mut other = bytes;
            other[at] = value;
            assert!(Hello::decode(&other).is_err(), "byte {at}");
        }
        let notice = Notice {
            kind: NoticeKind::Port,
            key: 1,
        }
        .encode();
        for len in 0..notice.len() {
            assert!(Notice::decode(&notice[..len]).is_err(), "{len} bytes");
        }
        for kind in [0, 6, 255] {
            let mut other = notice;
            other[0] = kind;
            assert!(Notice::decode(&other).is_err(), "kind {kind}");
        }
    }

    #[test]
    fn a_report_comes_back_as_sent_and_others_are_refused() {
        let report = Report {
            refs: 512,
            free: 7,
            leaked: 1 << 40,
            pending_total: 300,
            pending: vec![PendingEnd {
                gref: GrantRef(8),
                peer: DomId(2),
                tries: 5,
            }],
            consumers: vec![
                Consumer {
                    name: String::new(),
                    used: 1,
                    quota: u32::MAX,
                    refused: 0,
                },
                Consumer {
                    name: "vbd51712".into(),
                    used: 32,
                    quota: 32,
                    refused: 1 << 33,
                },
            ],
        };
        let bytes = report.encode();
        assert_eq!(Report::decode(&bytes), Ok(report));
        for len in 0..bytes.len() {
            assert!(Report::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        for (at, value) in [(0, 0), (4, 9), (9, 9), (12, 65), (46, 1), (84, 0xff), (84, 0x1b)] {
            let mut other = bytes.clone();
            other[at] = value;
            assert!(Report::decode(&other).is_err(), "byte {at}");
        }
        let end = PendingEnd {
            gref: GrantRef(1),
            peer: DomId(1),
            tries: 1,
        };
        let many = Report {
            pending: vec![end; MOST_PENDING + 1],
            ..Report::default()
        };
        assert_eq!(
            Report::decode(&many.encode()).unwrap().pending.len(),
            MOST_PENDING
        );
        assert!(many.encode().len() <= REPORT_SIZE);
    }

    #[test]
    fn answers_are_numbers_or_known_errors() {
        assert_eq!(answer(5), Ok(5));
        assert_eq!(answer(-16), Err(Errno::Busy));
        assert_eq!(answer(i64::MIN + 1), Err(Errno::Io));
    }
}
