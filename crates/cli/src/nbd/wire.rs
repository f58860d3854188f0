//! The numbers and byte layouts of the NBD protocol, as its published description has them. All big-endian.

/// First words of the server, then of every option of the client.
pub(super) const NBDMAGIC: &[u8; 8] = b"NBDMAGIC";
pub(super) const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags, both ways.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Options of the client.
pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;

/// Replies to options.
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

/// Kinds of information in `REP_INFO`.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_DESCRIPTION: u16 = 2;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags: what the export can do.
pub(super) const TX_HAS_FLAGS: u16 = 1 << 0;
pub(super) const TX_READ_ONLY: u16 = 1 << 1;
pub(super) const TX_SEND_FLUSH: u16 = 1 << 2;
pub(super) const TX_SEND_FUA: u16 = 1 << 3;
pub(super) const TX_SEND_TRIM: u16 = 1 << 5;
pub(super) const TX_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const TX_CAN_MULTI_CONN: u16 = 1 << 8;

/// Commands.
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

/// Command flags.
pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// Errors in replies.
pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const ENOTSUP: u32 = 95;

/// Bytes of a request's head.
pub(super) const REQUEST_SIZE: usize = 28;
/// Bytes of a simple reply's head.
pub(super) const REPLY_SIZE: usize = 16;
/// Bytes of an option's head.
pub(super) const OPTION_SIZE: usize = 16;

/// A request's head, any bytes but with the right magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestHead {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl RequestHead {
    /// `None`: wrong magic. After that nothing can be told apart in the stream.
    pub(super) fn decode(bytes: &[u8; REQUEST_SIZE]) -> Option<Self> {
        let mut take = Take(bytes);
        (take.u32() == Some(REQUEST_MAGIC)).then_some(())?;
        Some(RequestHead {
            flags: take.u16()?,
            command: take.u16()?,
            cookie: take.u64()?,
            offset: take.u64()?,
            length: take.u32()?,
        })
    }
}

/// The head of a simple reply; `error` 0 is success.
pub(super) fn simple_reply(error: u32, cookie: u64) -> [u8; REPLY_SIZE] {
    let mut head = [0; REPLY_SIZE];
    head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&error.to_be_bytes());
    head[8..].copy_from_slice(&cookie.to_be_bytes());
    head
}

/// Takes numbers and runs of bytes off the front of what a client sent; `None` when it is too short.
pub(super) struct Take<'a>(pub(super) &'a [u8]);

impl<'a> Take<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_head_is_28_big_endian_bytes() {
        let bytes = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0x10, 0,
        ];
        let head = RequestHead::decode(&bytes).unwrap();
        assert_eq!(
            head,
            RequestHead {
                flags: CMD_FLAG_FUA,
                command: CMD_WRITE_ZEROES,
                cookie: 0x0102_0304_0506_0708,
                offset: 0x1_0000_0200,
                length: 4096,
            }
        );
        let mut wrong = bytes;
        wrong[3] ^= 1;
        assert_eq!(RequestHead::decode(&wrong), None);
    }

    #[test]
    fn a_simple_reply_is_magic_error_cookie() {
        assert_eq!(
            simple_reply(ENOSPC, 0xa1b2),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0xa1, 0xb2]
        );
    }
}
