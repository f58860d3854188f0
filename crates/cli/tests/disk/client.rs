//! A small NBD client, so that tests see each acknowledgement.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// A connection past its handshake.
pub(crate) struct Client {
    stream: UnixStream,
    pub(crate) size: u64,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> io::Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.read_exact(&mut [0; 18])?;
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut reply = [0; 10];
        stream.read_exact(&mut reply)?;
        let size = u64::from_be_bytes(reply[..8].try_into().unwrap());
        Ok(Client { stream, size })
    }

    fn send(&mut self, command: u16, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        let mut request = b"\x25\x60\x95\x13\0\0".to_vec();
        request.extend(command.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(length).unwrap().to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)
    }

    /// The offset of the request that was answered.
    fn reply(&mut self) -> io::Result<u64> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], *b"\x67\x44\x66\x98");
        match u32::from_be_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(u64::from_be_bytes(reply[8..].try_into().unwrap())),
            error => Err(io::Error::other(format!("NBD error {error}"))),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        self.send(READ, offset, length, &[])?;
        self.reply()?;
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes several places at once; the offsets that were acknowledged before anything went wrong.
    pub(crate) fn write_all(&mut self, writes: &[(u64, Vec<u8>)]) -> (Vec<u64>, io::Result<()>) {
        let mut acknowledged = Vec::new();
        let outcome = (|| {
            for (offset, data) in writes {
                self.send(WRITE, *offset, data.len(), data)?;
            }
            for _ in writes {
                acknowledged.push(self.reply()?);
            }
            Ok(())
        })();
        (acknowledged, outcome)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.send(FLUSH, 0, 0, &[])?;
        self.reply().map(drop)
    }
}

/// Bytes that follow from a seed.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}
