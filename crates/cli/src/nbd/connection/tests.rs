//! The rules of the module head, against a disk in a vector.

use std::sync::Mutex;

use gnttab_abi::Abi;
use gnttab_io::blkif::{FrontendConfig, FrontendQueue};
use gnttab_io::fake::{Event, FakeDomain};
use proptest::prelude::*;

use super::*;
use crate::block::NoPages;

const SIZE: u64 = 64 << 10;

fn export(read_only: bool) -> Arc<Export> {
    let geometry = Geometry {
        size: SIZE,
        block_size: 512,
        preferred_size: 4096,
        read_only,
        flush: true,
        discard: true,
    };
    Arc::new(Export {
        name: "disk".to_owned(),
        description: "a test".to_owned(),
        geometry,
    })
}

/// A client and the disk it talks to.
struct Session {
    connection: Connection,
    disk: Vec<u8>,
    /// Requests that came out.
    requests: Vec<(Operation, u64, u32)>,
}

impl Session {
    fn new(read_only: bool) -> Self {
        Session {
            connection: Connection::new(export(read_only)),
            disk: vec![0xd5; 64 << 10],
            requests: Vec::new(),
        }
    }

    /// Past the handshake, with nothing waiting to be sent.
    fn ready(read_only: bool) -> Self {
        let mut session = Session::new(read_only);
        session.send(&[0, 0, 0, 3]);
        session.send(&option(wire::OPT_GO, &[0; 6]));
        session.replies();
        session
    }

    /// Sends bytes, as many at a time as are taken, and lets the disk answer.
    fn send(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Some(Room::Bytes(room)) = self.connection.input() else {
                return;
            };
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            self.connection.received(count);
            bytes = &bytes[count..];
            self.work();
        }
    }

    fn work(&mut self) {
        while let Some(request) = self.connection.next_request(&mut NoPages) {
            self.requests
                .push((request.operation, request.offset, request.length));
            let completion = self.perform(request);
            self.connection.complete(completion);
        }
    }

    fn perform(&mut self, mut request: Request) -> Completion {
        let place = usize::try_from(request.offset).unwrap()..;
        let place = &mut self.disk[place][..usize::try_from(request.length).unwrap()];
        match request.operation {
            Operation::Read => request.data = place.to_vec().into(),
            Operation::Write { .. } => place.copy_from_slice(own(&request.data)),
            Operation::WriteZeroes { .. } => place.fill(0),
            Operation::Flush | Operation::Discard => {}
        }
        Completion {
            tag: request.tag,
            result: Ok(()),
            data: request.data,
        }
    }

    /// Everything waiting to be sent.
    fn replies(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while self.connection.has_output() {
            let before = all.len();
            self.connection
                .output()
                .for_each(|(data, from)| all.extend_from_slice(&own(data)[from..]));
            self.connection.sent(all.len() - before);
        }
        all
    }

    /// Sends one request and returns the error of its reply, 0 for none.
    fn error_of(&mut self, request: &[u8]) -> u32 {
        self.send(request);
        let reply = self.replies();
        assert_eq!(reply[..4], wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }
}

fn own(data: &Data) -> &[u8] {
    match data {
        Data::Own(bytes) => bytes,
        Data::Leased(_) => panic!("nobody lends pages here"),
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::IHAVEOPT.to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn request(command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(b"a cookie");
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The kind of an option's reply.
fn kind(reply: &[u8]) -> u32 {
    assert_eq!(reply[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
    u32::from_be_bytes(reply[12..16].try_into().unwrap())
}

#[test]
fn the_greeting_is_fixed_newstyle() {
    assert_eq!(Session::new(false).replies(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn export_name_answers_size_and_flags_with_124_zeros_unless_asked_not_to() {
    for (client_flags, length) in [(1, 134), (3, 10)] {
        let mut session = Session::new(false);
        session.replies();
        session.send(&[0, 0, 0, client_flags]);
        session.send(&option(wire::OPT_EXPORT_NAME, b"disk"));
        let reply = session.replies();
        assert_eq!(reply.len(), length);
        assert_eq!(reply[..8], SIZE.to_be_bytes());
        assert_eq!(session.error_of(&request(wire::CMD_READ, 0, 0, 512, &[])), 0);
    }
}

#[test]
fn an_unknown_export_ends_export_name_and_is_an_error_for_go() {
    let mut session = Session::new(false);
    session.send(&[0, 0, 0, 3]);
    session.replies();
    session.send(&option(wire::OPT_GO, b"\0\0\0\x05other\0\0"));
    assert_eq!(kind(&session.replies()), wire::REP_ERR_UNKNOWN);
    session.send(&option(wire::OPT_EXPORT_NAME, b"other"));
    assert!(session.connection.is_finished());
}

#[test]
fn options_that_are_unknown_malformed_or_too_long_are_refused_and_the_next_one_works() {
    let mut session = Session::new(false);
    session.send(&[0, 0, 0, 3]);
    session.replies();
    session.send(&option(8, &[]));
    assert_eq!(kind(&session.replies()), wire::REP_ERR_UNSUP);
    session.send(&option(wire::OPT_INFO, b"\xff\xff\xff\xffdisk\0\0"));
    assert_eq!(kind(&session.replies()), wire::REP_ERR_INVALID);
    session.send(&option(wire::OPT_LIST, b"x"));
    assert_eq!(kind(&session.replies()), wire::REP_ERR_INVALID);
    session.send(&option(wire::OPT_INFO, &vec![0; 1 << 20]));
    assert_eq!(kind(&session.replies()), wire::REP_ERR_TOO_BIG);
    session.send(&option(wire::OPT_LIST, &[]));
    assert_eq!(kind(&session.replies()), wire::REP_SERVER);
    session.send(&option(wire::OPT_ABORT, &[]));
    assert_eq!(kind(&session.replies()), wire::REP_ACK);
    assert!(session.connection.is_finished());
}

#[test]
fn what_is_written_is_read_however_the_bytes_are_cut() {
    for piece in [1, 7, 28, 5000, 100_000] {
        let mut session = Session::ready(false);
        let data: Vec<u8> = (0..40_960_u32)
            .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
            .collect();
        let mut stream = request(wire::CMD_WRITE, wire::CMD_FLAG_FUA, 4096, 40_960, &data);
        stream.extend(request(wire::CMD_READ, 0, 4096, 40_960, &[]));
        for bytes in stream.chunks(piece) {
            session.send(bytes);
        }
        let replies = session.replies();
        assert_eq!(replies.len(), 16 + 16 + data.len());
        assert_eq!(replies[8..16], *b"a cookie");
        assert_eq!(replies[32..], data);
        let expected = [
            (Operation::Write { fua: true }, 4096, 40_960),
            (Operation::Read, 4096, 40_960),
        ];
        assert_eq!(session.requests, expected);
    }
}

/// What follows a payload in leased pages is read with it: all of the next request's head, or what of it has come.
#[test]
fn the_next_head_comes_along_with_a_payload() {
    const LENGTH: u32 = 32 << 10;
    for come in [0, 5, wire::REQUEST_SIZE] {
        let domain = FakeDomain::new();
        let queue: FrontendQueue<_, Event> =
            FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
        let queue = Mutex::new(queue);
        let mut pages = queue.lock().unwrap();
        let mut connection = Session::ready(false).connection;
        let first = request(wire::CMD_WRITE, 0, 0, LENGTH, &[]);
        let second = request(wire::CMD_WRITE, 0, u64::from(LENGTH), LENGTH, &[]);
        let arrive = |connection: &mut Connection, bytes: &[u8]| {
            let Some(Room::Bytes(room)) = connection.input() else {
                panic!("no room for a head");
            };
            room[..bytes.len()].copy_from_slice(bytes);
            connection.received(bytes.len());
        };
        arrive(&mut connection, &first);
        assert!(connection.next_request(&mut pages).is_none());
        let Some(Room::Leased(lease, 0, next)) = connection.input() else {
            panic!("the payload has no pages");
        };
        assert_eq!((lease.len(), next.len()), (32 << 10, second.len()));
        next[..come].copy_from_slice(&second[..come]);
        connection.received((32 << 10) + come);
        let written = connection.next_request(&mut pages).expect("it is complete");
        assert_eq!((written.offset, written.length), (0, LENGTH));
        assert!(connection.next_request(&mut pages).is_none());
        if come < second.len() {
            arrive(&mut connection, &second[come..]);
            assert!(connection.next_request(&mut pages).is_none());
        }
        assert!(matches!(connection.input(), Some(Room::Leased(_, 0, _))));
    }
}

#[test]
fn requests_outside_the_disk_or_its_blocks_never_reach_it() {
    let mut session = Session::ready(false);
    let max = u32::MAX;
    for (command, offset, length, error) in [
        (wire::CMD_READ, SIZE, 512, wire::EINVAL),
        (wire::CMD_READ, SIZE - 512, 1024, wire::EINVAL),
        (wire::CMD_READ, u64::MAX - 511, 1024, wire::EINVAL),
        (wire::CMD_READ, 1, 512, wire::EINVAL),
        (wire::CMD_READ, 0, 511, wire::EINVAL),
        (wire::CMD_READ, 0, 0, wire::EINVAL),
        (wire::CMD_READ, 0, max - 511, wire::EINVAL),
        (wire::CMD_TRIM, SIZE, 512, wire::ENOSPC),
        (wire::CMD_WRITE_ZEROES, 0, max - 511, wire::ENOSPC),
        (5, 0, 512, wire::EINVAL),
        (7, 0, 512, wire::EINVAL),
        (0xffff, 0, 512, wire::EINVAL),
    ] {
        assert_eq!(
            session.error_of(&request(command, 0, offset, length, &[])),
            error,
            "{command} {offset} {length}"
        );
    }
    // A refused write's data is skipped, so that the next request is understood.
    assert_eq!(
        session.error_of(&request(wire::CMD_WRITE, 0, SIZE, 512, &[1; 512])),
        wire::ENOSPC
    );
    assert_eq!(
        session.error_of(&request(wire::CMD_WRITE, 0x80, 0, 512, &[1; 512])),
        wire::EINVAL
    );
    let too_long = (33 << 20) + 512;
    let data = vec![1; 33 << 20 | 512];
    assert_eq!(
        session.error_of(&request(wire::CMD_WRITE, 0, 0, too_long, &data)),
        wire::EINVAL
    );
    assert!(session.requests.is_empty());
    assert_eq!(session.error_of(&request(wire::CMD_FLUSH, 0, 0, 0, &[])), 0);
    assert_eq!(session.requests, [(Operation::Flush, 0, 0)]);
}

#[test]
fn nothing_changes_a_read_only_disk() {
    let mut session = Session::ready(true);
    assert_eq!(
        session.error_of(&request(wire::CMD_WRITE, 0, 0, 512, &[1; 512])),
        wire::EPERM
    );
    assert_eq!(
        session.error_of(&request(wire::CMD_TRIM, 0, 0, 512, &[])),
        wire::EPERM
    );
    assert_eq!(
        session.error_of(&request(wire::CMD_WRITE_ZEROES, 0, 0, 512, &[])),
        wire::EPERM
    );
    assert!(session.requests.is_empty());
    assert_eq!(session.error_of(&request(wire::CMD_READ, 0, 0, 512, &[])), 0);
}

#[test]
fn a_client_out_of_step_is_dropped() {
    let mut session = Session::ready(false);
    session.send(&[0; 28]);
    assert!(session.connection.is_finished());
}

#[test]
fn a_client_that_leaves_gets_its_answers_first() {
    let mut session = Session::ready(false);
    let mut stream = request(wire::CMD_READ, 0, 0, 512, &[]);
    stream.extend(request(wire::CMD_DISC, 0, 0, 0, &[]));
    session.send(&stream);
    assert!(!session.connection.is_finished());
    assert_eq!(session.replies().len(), 16 + 512);
    assert!(session.connection.is_finished());
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let mut session = Session::ready(false);
    let read = request(wire::CMD_READ, 0, 0, 64 << 10, &[]);
    let mut sent = 0;
    while session.connection.input().is_some() {
        session.send(&read);
        sent += 1;
        assert!(sent < 10_000, "nothing holds this client back");
    }
    assert!(session.connection.output.bytes <= Limits::HELD + (64 << 10) + 16);
    session.replies();
    assert!(session.connection.input().is_some());
}

#[test]
fn no_more_requests_come_out_than_the_limit() {
    let mut connection = Session::ready(false).connection;
    let mut taken = Vec::new();
    let read = request(wire::CMD_READ, 0, 0, 512, &[]);
    for _ in 0..Limits::IN_FLIGHT + 50 {
        let Some(Room::Bytes(room)) = connection.input() else {
            break;
        };
        room[..read.len()].copy_from_slice(&read);
        connection.received(read.len());
        taken.extend(connection.next_request(&mut NoPages));
    }
    assert_eq!(taken.len(), Limits::IN_FLIGHT);
    let mut tags: Vec<u64> = taken.iter().map(|request| request.tag).collect();
    tags.sort_unstable();
    tags.dedup();
    assert_eq!(tags.len(), Limits::IN_FLIGHT, "no two have the same tag");
}

/// Bytes that are nearly right get further than random ones.
fn client_bytes() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![Just(0_u32), Just(u32::MAX), 0..2048_u32, Just(512), any::<u32>()];
    let offset = prop_oneof![
        Just(0_u64),
        Just(SIZE),
        Just(u64::MAX),
        (0..200_u64).prop_map(|n| n * 512)
    ];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        (0..12_u32, proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(kind, data)| option(kind, &data)),
        (
            0..9_u16,
            0..4_u16,
            offset,
            number,
            proptest::collection::vec(any::<u8>(), 0..600)
        )
            .prop_map(|(command, flags, offset, length, data)| request(
                command, flags, offset, length, &data
            )),
        Just(option(wire::OPT_GO, &[0; 6])),
        Just(vec![0, 0, 0, 3]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The first two rules of the module: no panic, and nothing illegal reaches the disk (the disk here would panic).
    #[test]
    fn nothing_a_client_sends_does_harm(ready: bool, pieces in proptest::collection::vec(client_bytes(), 0..20)) {
        let mut session = if ready { Session::ready(false) } else { Session::new(false) };
        for piece in &pieces {
            session.send(piece);
        }
        session.replies();
        session.connection.hang_up();
        prop_assert!(session.connection.is_finished());
        for (operation, offset, length) in session.requests {
            let end = offset + u64::from(length);
            prop_assert!(operation == Operation::Flush || (length > 0 && end <= SIZE && end % 512 == 0), "{offset} {length}");
        }
    }
}
