use super::{HEADER_LEN, Header, Message, PayloadTooLong};
use alloc::vec;
use alloc::vec::Vec;

/// Puts messages together from a stream of bytes.
///
/// It asks for the bytes of one message at a time and never for more: first
/// the header, then exactly the payload. So whoever reads for it takes no byte
/// of the next message, and its memory is bounded by one message.
///
/// ```
/// use gnttab_xenstore::wire::Framer;
///
/// let stream = *b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0/a\0";
/// let (mut framer, mut rest) = (Framer::new(), stream.as_slice());
/// let message = loop {
///     let space = framer.space();
///     let n = space.len().min(rest.len());
///     space[..n].copy_from_slice(&rest[..n]); // or: read from a socket
///     rest = &rest[n..];
///     if let Some(message) = framer.advance(n)? {
///         break message;
///     }
/// };
/// assert_eq!(message.to_string(), "READ req 1 tx 0: /a|");
/// # Ok::<(), gnttab_xenstore::wire::PayloadTooLong>(())
/// ```
#[derive(Clone, Debug)]
pub struct Framer {
    /// As long as what is known to be wanted: the header, later the payload too.
    buffer: Vec<u8>,
    filled: usize,
}

impl Framer {
    /// Waits for a first header.
    pub fn new() -> Self {
        Framer {
            buffer: vec![0; HEADER_LEN],
            filled: 0,
        }
    }

    /// Where the next bytes go. Never empty.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..]
    }

    /// Whether a message has begun and is not whole yet.
    pub fn is_midway(&self) -> bool {
        self.filled > 0
    }

    /// The first `n` bytes of [`space`](Self::space) have been filled. Gives a
    /// message when it is whole.
    ///
    /// # Errors
    ///
    /// [`PayloadTooLong`]: the peer does not speak this protocol, what follows
    /// cannot be told apart, and the stream must be given up.
    pub fn advance(&mut self, n: usize) -> Result<Option<Message>, PayloadTooLong> {
        self.filled = (self.filled + n).min(self.buffer.len());
        if self.filled < self.buffer.len() {
            return Ok(None);
        }
        let Some((header, payload)) = self.buffer.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None); // the buffer is never shorter than a header
        };
        let header = Header::from_bytes(*header);
        let len = header.payload_len()?;
        if payload.len() < len {
            self.buffer.resize(HEADER_LEN + len, 0);
            return Ok(None);
        }
        let message = Message::new(header.kind, header.req_id, header.tx_id, payload.to_vec())?;
        self.buffer.truncate(HEADER_LEN);
        self.filled = 0;
        Ok(Some(message))
    }
}

impl Default for Framer {
    fn default() -> Self {
        Framer::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds a stream in pieces of the given sizes, over and over.
    fn feed(mut stream: &[u8], sizes: &[usize]) -> Result<Vec<Message>, PayloadTooLong> {
        let (mut framer, mut messages) = (Framer::new(), Vec::new());
        for &size in sizes.iter().cycle() {
            if stream.is_empty() {
                break;
            }
            let space = framer.space();
            let n = size.min(space.len()).min(stream.len());
            space[..n].copy_from_slice(&stream[..n]);
            stream = &stream[n..];
            messages.extend(framer.advance(n)?);
        }
        Ok(messages)
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(
            sent in prop::collection::vec((any::<[u32; 3]>(), prop::collection::vec(any::<u8>(), 0..50)), 0..10),
            sizes in prop::collection::vec(1..40_usize, 1..10),
        ) {
            let sent: Vec<_> = sent.into_iter()
                .map(|([kind, req, tx], payload)| Message::new(kind, req, tx, payload).unwrap())
                .collect();
            let stream: Vec<u8> = sent.iter().flat_map(Message::to_bytes).collect();
            prop_assert_eq!(feed(&stream, &sizes).unwrap(), sent);
        }

        #[test]
        fn any_bytes_are_read_or_refused(stream in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = feed(&stream, &[7]);
        }
    }

    #[test]
    fn a_giant_length_is_refused_at_the_header() {
        for len in [4097, u32::MAX] {
            let header = Header {
                kind: 2,
                req_id: 0,
                tx_id: 0,
                len,
            };
            assert_eq!(feed(&header.to_bytes(), &[16]), Err(PayloadTooLong { len }));
        }
    }
}
