use super::{HEADER_LEN, Kind, PAYLOAD_MAX};
use alloc::vec::Vec;
use core::fmt;

/// The four words at the beginning of every message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What it is: a [`Kind`] code, or anything else a peer may send.
    pub kind: u32,
    /// Chosen by who asks, echoed in the answer; 0 in events.
    pub req_id: u32,
    /// The transaction it belongs to, or 0.
    pub tx_id: u32,
    /// The length of the payload in bytes, as the sender claims it.
    pub len: u32,
}

impl Header {
    /// Reads the words. Any bytes are a header.
    pub fn from_bytes(bytes: [u8; HEADER_LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Header {
            kind: word(0),
            req_id: word(4),
            tx_id: word(8),
            len: word(12),
        }
    }

    /// Writes the words.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        for (at, word) in [self.kind, self.req_id, self.tx_id, self.len]
            .into_iter()
            .enumerate()
        {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The length of the payload.
    ///
    /// # Errors
    ///
    /// [`PayloadTooLong`] if it is more than the protocol allows.
    pub fn payload_len(self) -> Result<usize, PayloadTooLong> {
        match usize::try_from(self.len) {
            Ok(len) if len <= PAYLOAD_MAX => Ok(len),
            _ => Err(PayloadTooLong { len: self.len }),
        }
    }
}

/// A payload longer than [`PAYLOAD_MAX`]: it cannot be sent, and who sends it
/// does not speak this protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a payload of {len} bytes is too long: the limit is 4096")]
pub struct PayloadTooLong {
    /// Its length, in bytes.
    pub len: u32,
}

/// Why bytes are not one message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header promises more than a message may have.
    #[error(transparent)]
    PayloadTooLong(#[from] PayloadTooLong),
    /// There are fewer or more bytes than the header promises.
    #[error("{len} bytes are not one message: its header asks for {wanted}")]
    WrongLength {
        /// The number of bytes there are.
        len: usize,
        /// The number of bytes that header and payload take.
        wanted: usize,
    },
}

/// A message, raw: any kind and any payload.
///
/// Having one tells you: the payload has at most [`PAYLOAD_MAX`] bytes. It
/// does *not* tell you that the kind is known or the payload makes sense:
/// [`Request::parse`](super::Request::parse) and
/// [`Reply::parse`](super::Reply::parse) tell that.
///
/// Printed as a packet dump: the kind, the two numbers, and the payload with
/// `|` for NUL.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    kind: u32,
    req_id: u32,
    tx_id: u32,
    payload: Vec<u8>,
}

impl Message {
    /// A message of these parts.
    ///
    /// # Errors
    ///
    /// [`PayloadTooLong`].
    pub fn new(kind: u32, req_id: u32, tx_id: u32, payload: Vec<u8>) -> Result<Self, PayloadTooLong> {
        if payload.len() > PAYLOAD_MAX {
            return Err(PayloadTooLong {
                len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            });
        }
        Ok(Message {
            kind,
            req_id,
            tx_id,
            payload,
        })
    }

    /// Reads bytes that are one whole message.
    ///
    /// # Errors
    ///
    /// [`FrameError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FrameError> {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Err(FrameError::WrongLength {
                len: bytes.len(),
                wanted: HEADER_LEN,
            });
        };
        let header = Header::from_bytes(*header);
        let len = header.payload_len()?;
        if payload.len() != len {
            return Err(FrameError::WrongLength {
                len: bytes.len(),
                wanted: HEADER_LEN + len,
            });
        }
        let Header {
            kind, req_id, tx_id, ..
        } = header;
        Ok(Message {
            kind,
            req_id,
            tx_id,
            payload: payload.to_vec(),
        })
    }

    /// Header and payload.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(&self.header().to_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The header.
    pub fn header(&self) -> Header {
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX); // at most 4096
        Header {
            kind: self.kind,
            req_id: self.req_id,
            tx_id: self.tx_id,
            len,
        }
    }

    /// The kind, if it is one of the protocol's.
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_code(self.kind)
    }

    /// The number of the request.
    pub fn req_id(&self) -> u32 {
        self.req_id
    }

    /// The number of the transaction, or 0.
    pub fn tx_id(&self) -> u32 {
        self.tx_id
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// An answer to this message: its numbers, with another kind and payload.
    pub(super) fn answer(&self, kind: u32, payload: Vec<u8>) -> Result<Message, PayloadTooLong> {
        Message::new(kind, self.req_id, self.tx_id, payload)
    }

    /// The same kind with another payload.
    pub(super) fn echo(&self, payload: Vec<u8>) -> Result<Message, PayloadTooLong> {
        self.answer(self.kind, payload)
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            Some(kind) => write!(f, "{kind}")?,
            None => write!(f, "TYPE_{}", self.kind)?,
        }
        write!(f, " req {} tx {}: ", self.req_id, self.tx_id)?;
        for &byte in &self.payload {
            match byte {
                0 => f.write_str("|")?,
                // A bar of the payload's own must not pass for the end of a string.
                b'|' => f.write_str("\\x7c")?,
                byte => write!(f, "{}", byte.escape_ascii())?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{self}>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString as _;
    use alloc::vec;

    #[test]
    fn a_payload_has_a_limit() {
        assert!(Message::new(2, 0, 0, vec![0; 4096]).is_ok());
        assert_eq!(
            Message::new(2, 0, 0, vec![0; 4097]),
            Err(PayloadTooLong { len: 4097 })
        );
    }

    #[test]
    fn bytes_must_be_exactly_one_message() {
        let bytes = Message::new(2, 3, 4, b"/a\0".to_vec()).unwrap().to_bytes();
        assert!(Message::from_bytes(&bytes).is_ok());
        assert_eq!(
            Message::from_bytes(&bytes[..18]),
            Err(FrameError::WrongLength { len: 18, wanted: 19 })
        );
        assert_eq!(
            Message::from_bytes(&bytes[..15]),
            Err(FrameError::WrongLength { len: 15, wanted: 16 })
        );
        let giant = Header {
            kind: 2,
            req_id: 0,
            tx_id: 0,
            len: u32::MAX,
        };
        assert!(matches!(
            Message::from_bytes(&giant.to_bytes()),
            Err(FrameError::PayloadTooLong(PayloadTooLong { len: u32::MAX }))
        ));
    }

    #[test]
    fn a_dump_shows_every_byte() {
        let dump = |kind, payload: &[u8]| Message::new(kind, 7, 3, payload.to_vec()).unwrap().to_string();
        assert_eq!(dump(11, b"a/b\0x|\xff\n"), "WRITE req 7 tx 3: a/b|x\\x7c\\xff\\n");
        assert_eq!(dump(99, b""), "TYPE_99 req 7 tx 3: ");
    }
}
