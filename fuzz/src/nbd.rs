//! The NBD server's protocol machine against a hostile client.
//!
//! Bytes in pieces of any size, requests that are mostly right, a disk that answers late, in any order,
//! and fails now and then. What must hold: nothing panics, only legal requests reach the disk, no more
//! than agreed are under way, and every request of the client is answered once.

#[rustfmt::skip]
#[path = "../../crates/cli/src/nbd/connection.rs"]
#[expect(dead_code, reason = "the server's socket uses the rest")]
mod connection;
#[rustfmt::skip]
#[path = "../../crates/cli/src/nbd/wire.rs"]
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::connection::{Connection, Export, Room};
use crate::block::{Completion, DeviceError, Geometry, NoPages, Operation, Request};
use crate::input::Input;
use gnttab_io::blkif::Data;

const SIZE: u64 = 64 << 10;

/// Plays an input.
///
/// # Panics
/// When a rule of the module's head is broken.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let head = input.byte();
    let geometry = Geometry {
        size: SIZE,
        block_size: if head & 1 == 0 { 512 } else { 4096 },
        preferred_size: 4096,
        read_only: head & 6 == 6,
        flush: head & 8 == 0,
        discard: head & 16 == 0,
    };
    let mut game = Game {
        connection: Connection::new(Arc::new(Export {
            name: "disk".to_owned(),
            description: "a test".to_owned(),
            geometry,
        })),
        geometry,
        disk: vec![0xD5; SIZE as usize],
        under_way: BTreeMap::new(),
        sent: Vec::new(),
        asked: (head & 32 == 0).then(Vec::new),
        next_cookie: 1,
    };
    if game.asked.is_some() {
        game.send(&[0, 0, 0, 3], 4);
        game.send(&option(wire::OPT_GO, &[0; 6]), 64);
        game.take_output(usize::MAX);
        game.sent.clear();
    }
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        game.step(&mut input);
    }
    game.end();
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::IHAVEOPT.to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).expect("a short option").to_be_bytes());
    bytes.extend(data);
    bytes
}

struct Game {
    connection: Connection,
    geometry: Geometry,
    disk: Vec<u8>,
    under_way: BTreeMap<u64, Request>,
    /// Everything that the server has sent.
    sent: Vec<u8>,
    /// Cookies of the requests, and how much a good answer brings; none once the client has sent anything
    /// that is no request.
    asked: Option<Vec<(u64, usize)>>,
    next_cookie: u64,
}

impl Game {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(16) {
            0..8 => self.request(input),
            8 => {
                let number = input.pick(&[1, 2, 3, 6, 7, 8, 5, u32::MAX]);
                let name = input.pick(&[&b"disk"[..], b"", b"other"]);
                let mut data = u32::try_from(name.len())
                    .expect("a short name")
                    .to_be_bytes()
                    .to_vec();
                data.extend(name);
                data.extend([0, input.byte() & 3, 0, 0, 0, 1, 0, 3]);
                let most = input.byte();
                data.truncate(usize::from(most));
                self.asked = None;
                self.send(&option(number, &data), usize::from(most % 31) + 1);
            }
            9 => {
                let count = usize::from(input.byte());
                let bytes = input.bytes(count);
                self.asked = None;
                self.send(bytes, count % 17 + 1);
            }
            10..13 => self.answer(input),
            13 => {
                while !self.under_way.is_empty() {
                    self.answer(input);
                }
            }
            14 => self.take_output(usize::from(input.byte()) * 16),
            _ => self.take_output(usize::MAX),
        }
    }

    fn request(&mut self, input: &mut Input<'_>) {
        let command = match input.byte() {
            250.. => wire::CMD_DISC,
            byte => [0, 1, 0, 1, 3, 4, 6, 5, 7][usize::from(byte) % 9],
        };
        let flags = if input.byte() < 200 { 0 } else { input.u16() };
        let unit = u64::from(self.geometry.block_size);
        let offset = match input.byte() {
            byte @ 0..100 => u64::from(byte) * unit % SIZE,
            byte @ 100..220 => SIZE.saturating_sub(u64::from(byte % 8) * unit),
            byte @ 220..240 => u64::from(byte) * 100,
            _ => input.u64(),
        };
        let length = match input.byte() {
            byte @ 0..220 => (u32::from(byte) % 5) * self.geometry.block_size,
            byte @ 220..250 => u32::from(byte),
            _ => input.u32() % (64 << 20),
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(u16::to_be_bytes(command));
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        let data = if command == wire::CMD_WRITE { length } else { 0 };
        if data > 1 << 16 {
            // Its data never comes: what follows is taken for it.
            self.asked = None;
        } else {
            bytes.extend(std::iter::repeat_n(input.byte(), data as usize));
        }
        if command == wire::CMD_DISC {
            self.asked = None;
        }
        if let Some(asked) = &mut self.asked {
            asked.push((
                cookie,
                if command == wire::CMD_READ {
                    length as usize
                } else {
                    0
                },
            ));
        }
        let piece = usize::from(input.byte()) * 8 + 1;
        self.send(&bytes, piece);
    }

    fn send(&mut self, mut bytes: &[u8], piece: usize) {
        while !bytes.is_empty() {
            let Some(Room::Bytes(room)) = self.connection.input() else {
                // A server would wait; what is left of the stream is lost here.
                self.asked = None;
                return;
            };
            assert!(!room.is_empty());
            let count = room.len().min(bytes.len()).min(piece);
            room[..count].copy_from_slice(&bytes[..count]);
            self.connection.received(count);
            bytes = &bytes[count..];
            while let Some(request) = self.connection.next_request(&mut NoPages) {
                self.check(&request);
                let tag = request.tag;
                assert!(
                    self.under_way.insert(tag, request).is_none(),
                    "tag {tag} is under way"
                );
                assert!(self.under_way.len() <= Connection::MAX_IN_FLIGHT);
            }
        }
    }

    fn check(&self, request: &Request) {
        let Geometry { block_size, .. } = self.geometry;
        let end = request
            .offset
            .checked_add(u64::from(request.length))
            .expect("an end");
        assert!(end <= SIZE, "{request:?}");
        assert!(
            request.offset.is_multiple_of(u64::from(block_size)) && request.length.is_multiple_of(block_size)
        );
        let has_data = matches!(request.operation, Operation::Read | Operation::Write { .. });
        assert_eq!(
            request.data.len(),
            if has_data { request.length as usize } else { 0 }
        );
        let changes = !matches!(request.operation, Operation::Read | Operation::Flush);
        assert!(!(changes && self.geometry.read_only), "{request:?}");
        assert!(self.geometry.discard || request.operation != Operation::Discard);
        assert!(request.operation != Operation::Flush || request.length == 0);
    }

    /// The disk answers one of what it was asked.
    fn answer(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let Some(tag) = self
            .under_way
            .keys()
            .nth(usize::from(choice) % self.under_way.len().max(1))
            .copied()
        else {
            return;
        };
        let mut request = self.under_way.remove(&tag).expect("it is under way");
        let at = request.offset as usize;
        let place = &mut self.disk[at..at + request.length as usize];
        match request.operation {
            Operation::Read => request.data = place.to_vec().into(),
            Operation::Write { .. } => place.copy_from_slice(own(&request.data)),
            Operation::WriteZeroes { .. } => place.fill(0),
            Operation::Flush | Operation::Discard => {}
        }
        let result = match choice {
            0..250 => Ok(()),
            250..252 => Err(DeviceError::Io),
            252..254 => Err(DeviceError::Unsupported),
            _ => Err(DeviceError::NoSpace),
        };
        self.connection.complete(Completion {
            tag,
            result,
            data: request.data,
        });
    }

    fn take_output(&mut self, most: usize) {
        let mut left = most;
        while left > 0 && self.connection.has_output() {
            let (data, from) = self.connection.output().next().expect("there is output");
            let first = &own(data)[from..];
            let count = first.len().min(left);
            self.sent.extend_from_slice(&first[..count]);
            self.connection.sent(count);
            left -= count;
        }
        assert!(most < usize::MAX || self.connection.output().next().is_none());
    }

    fn end(mut self) {
        while !self.under_way.is_empty() {
            self.answer(&mut Input::new(&[]));
        }
        // What waited for room may be taken now.
        while let Some(request) = self.connection.next_request(&mut NoPages) {
            self.check(&request);
            self.under_way.insert(request.tag, request);
            while !self.under_way.is_empty() {
                self.answer(&mut Input::new(&[]));
            }
        }
        self.take_output(usize::MAX);
        let Some(asked) = self.asked else { return };
        let mut left: BTreeMap<u64, usize> = asked.into_iter().collect();
        let mut stream = &self.sent[..];
        while let Some((head, rest)) = stream.split_first_chunk::<{ wire::REPLY_SIZE }>() {
            assert_eq!(head[..4], wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
            let error = u32::from_be_bytes(head[4..8].try_into().expect("four bytes"));
            let cookie = u64::from_be_bytes(head[8..].try_into().expect("eight bytes"));
            let brings = left
                .remove(&cookie)
                .unwrap_or_else(|| panic!("cookie {cookie} is not asked for"));
            stream = &rest[if error == 0 { brings } else { 0 }..];
        }
        assert!(stream.is_empty());
        assert!(left.is_empty(), "every request is answered: {left:?} are not");
    }
}

fn own(data: &Data) -> &[u8] {
    match data {
        Data::Own(bytes) => bytes,
        Data::Leased(_) => panic!("nobody lends pages here"),
    }
}
