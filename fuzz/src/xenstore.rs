//! The XenStore's wire, down to the tree: a control domain and two guests send what they like.
//!
//! Bytes go through the [`Framer`] that the server uses, in pieces of any size, to the [`Store`]. What
//! must hold: every whole message gets one answer, with its own numbers, that a client can read and
//! that fits a message; events can be sent; a guest changes nothing that is not its own, stays within
//! its quotas, and leaves nothing behind when it is released.

use gnttab_xenstore::wire::{Framer, Kind, Message, Reply, Request};
use gnttab_xenstore::{ConnId, DomId, Quotas, Store};

use crate::input::Input;

/// What a byte above 0x7F of a payload stands for.
const WORDS: [&str; 32] = [
    "/",
    "/local",
    "/local/domain/5",
    "/local/domain/6",
    "/local/domain/5/a",
    "/local/domain/6/b",
    "/mine",
    "/tool",
    "device",
    "device/vbd/51712",
    "a",
    "a/b",
    "state",
    "@introduceDomain",
    "@releaseDomain",
    "n5",
    "n6",
    "r5",
    "w6",
    "b0",
    "T",
    "F",
    "5",
    "6",
    "0",
    "1",
    "7",
    "65535",
    "",
    "tok",
    "-",
    "//",
];

const QUOTAS: Quotas = Quotas {
    nodes: 12,
    node_size: 256,
    perms: 3,
    watches: 4,
    transactions: 2,
    transaction_nodes: 16,
    transaction_bytes: 1024,
    pending_events: 6,
};

/// Plays an input.
///
/// # Panics
/// When a rule of the module's head is broken.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let mut world = World::new();
    world.is_dom0_in = input.byte() % 4 == 0;
    for _ in 0..512 {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.end();
}

struct Caller {
    dom: DomId,
    conn: Option<ConnId>,
    framer: Framer,
    /// The number of the last transaction it was given.
    transaction: u32,
}

struct World {
    store: Store,
    callers: Vec<Caller>,
    /// The control domain joins in.
    is_dom0_in: bool,
    /// It has done something itself: what is where is its own affair.
    is_managed: bool,
    /// Nodes that were there before the guests.
    nodes: usize,
}

fn message(request: &Request) -> Message {
    request.encode(1, None).expect("a request that fits")
}

impl World {
    fn new() -> World {
        let mut store = Store::new(QUOTAS);
        let dom0 = store.connect(DomId::DOM0).expect("the control domain");
        let mut done = |request: Request| {
            let outcome = store.handle(dom0, &message(&request)).expect("a connection");
            assert_eq!(Reply::parse(&outcome.reply), Ok(Reply::Ok));
        };
        done(Request::Write {
            path: "/mine".parse().expect("a path"),
            value: b"v".as_slice().into(),
        });
        done(Request::Mkdir("/local/domain".parse().expect("a path")));
        let nodes = store.nodes();
        let mut callers = vec![(DomId::DOM0, Some(dom0))];
        for id in [5, 6] {
            let dom = DomId::new(id);
            store.introduce(dom, 0, 0).expect("a domain");
            let home: gnttab_xenstore::path::NodePath =
                format!("/local/domain/{id}").parse().expect("a path");
            for request in [
                Request::Mkdir(home.clone()),
                Request::SetPerms {
                    place: home.to_string().parse().expect("a place"),
                    perms: format!("n{id}").parse().expect("permissions"),
                },
            ] {
                let outcome = store.handle(dom0, &message(&request)).expect("a connection");
                assert_eq!(Reply::parse(&outcome.reply), Ok(Reply::Ok));
            }
            callers.push((dom, Some(store.connect(dom).expect("a known domain"))));
        }
        let callers = callers
            .into_iter()
            .map(|(dom, conn)| Caller {
                dom,
                conn,
                framer: Framer::new(),
                transaction: 0,
            })
            .collect();
        World {
            store,
            callers,
            is_dom0_in: false,
            is_managed: false,
            nodes,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let head = input.byte();
        // Mostly the guests: they are who is not trusted.
        let who = match head & 7 {
            7 if self.is_dom0_in => 0,
            other => usize::from(other % 2) + 1,
        };
        match head >> 3 {
            0..24 => {
                let kind = input.byte();
                let kind = if kind < 240 {
                    u32::from(kind) % 24
                } else {
                    input.u32()
                };
                let tx = match input.byte() {
                    0..160 => 0,
                    160..240 => self.callers[who].transaction,
                    _ => input.u32(),
                };
                let count = usize::from(input.byte());
                let mut payload = Vec::new();
                for byte in input.bytes(count) {
                    match byte {
                        0..0x80 => payload.push(*byte),
                        0x80..0xC0 => payload.extend(WORDS[usize::from(byte % 32)].as_bytes()),
                        _ => {
                            payload.extend(WORDS[usize::from(byte % 32)].as_bytes());
                            payload.push(0);
                        }
                    }
                }
                payload.truncate(4096);
                let message = Message::new(kind, u32::from(head), tx, payload).expect("at most 4096 bytes");
                self.send(who, &message.to_bytes(), usize::from(head) + 1);
            }
            24..28 => {
                let count = usize::from(input.byte());
                let bytes = input.bytes(count);
                self.send(who, bytes, usize::from(head % 17) + 1);
            }
            28..30 => self.take_events(who),
            // A guest goes, and comes back.
            30 if who != 0 => {
                if let Some(conn) = self.callers[who].conn.take() {
                    self.store.disconnect(conn);
                }
                let dom = self.callers[who].dom;
                if self.store.is_introduced(dom) || !self.is_managed {
                    let conn = self.store.connect(dom).expect("a known domain");
                    self.callers[who].conn = Some(conn);
                    self.callers[who].framer = Framer::new();
                }
            }
            _ => {
                let _ = self.store.ready().count();
            }
        }
    }

    /// Sends a stream in pieces.
    fn send(&mut self, who: usize, mut bytes: &[u8], piece: usize) {
        while !bytes.is_empty() {
            let caller = &mut self.callers[who];
            let Some(conn) = caller.conn else { return };
            let space = caller.framer.space();
            assert!(!space.is_empty(), "a framer always wants something");
            let count = piece.min(space.len()).min(bytes.len());
            space[..count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            match caller.framer.advance(count) {
                Ok(None) => {}
                Ok(Some(message)) => self.handle(who, conn, &message),
                Err(_) => {
                    // What a server does: the stream is given up.
                    self.store.disconnect(conn);
                    self.callers[who].conn = self.store.connect(self.callers[who].dom).ok();
                    self.callers[who].framer = Framer::new();
                    return;
                }
            }
        }
    }

    fn handle(&mut self, who: usize, conn: ConnId, message: &Message) {
        assert_eq!(
            Message::from_bytes(&message.to_bytes()).as_ref(),
            Ok(message),
            "bytes and back"
        );
        if let Ok(request) = Request::parse(message) {
            let tx = gnttab_xenstore::wire::TxId::new(message.tx_id());
            let again = request
                .encode(message.req_id(), tx)
                .expect("it came in one message");
            assert_eq!(
                Request::parse(&again).as_ref(),
                Ok(&request),
                "what was understood can be said"
            );
        }
        let before = self.store.nodes();
        let Ok(outcome) = self.store.handle(conn, message) else {
            // The control domain had the guest released.
            assert!(self.is_managed, "a connection is there until it is closed");
            self.callers[who].conn = None;
            return;
        };
        let reply = &outcome.reply;
        assert_eq!(
            (reply.req_id(), reply.tx_id()),
            (message.req_id(), message.tx_id()),
            "its own numbers"
        );
        assert!(reply.payload().len() <= 4096);
        let parsed = Reply::parse(reply).unwrap_or_else(|_| panic!("{message} -> {reply}"));
        if matches!(parsed, Reply::Error(_)) {
            assert_eq!(
                self.store.nodes(),
                before,
                "what is refused changes nothing: {message}"
            );
        }
        if let Reply::Transaction(id) = parsed {
            self.callers[who].transaction = id.get();
        }
        if who == 0 {
            self.is_managed |= !matches!(parsed, Reply::Error(_));
        } else {
            assert!(
                outcome.effects.is_empty(),
                "a guest commands the machine: {message}"
            );
            if !self.is_managed {
                assert_eq!(self.read("/mine"), Some(b"v".to_vec()), "{message}");
                // A home, and what the quota allows below it.
                let most = self.nodes + 2 * (1 + QUOTAS.nodes);
                assert!(self.store.nodes() <= most, "{} nodes", self.store.nodes());
            }
        }
    }

    fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        let conn = self.callers[0].conn?;
        let request = Request::Read(path.parse().expect("a path"));
        let outcome = self.store.handle(conn, &message(&request)).ok()?;
        match Reply::parse(&outcome.reply) {
            Ok(Reply::Value(value)) => Some(value.to_vec()),
            _ => None,
        }
    }

    fn take_events(&mut self, who: usize) {
        let Some(conn) = self.callers[who].conn else {
            return;
        };
        let mut taken = 0;
        while let Some(event) = self.store.next_event(conn) {
            let message = event.encode().expect("an event fits a message");
            assert_eq!(message.kind(), Some(Kind::WatchEvent));
            taken += 1;
            // The control domain is not limited in watches.
            let most = if who == 0 {
                usize::MAX
            } else {
                QUOTAS.pending_events + QUOTAS.watches
            };
            assert!(taken <= most, "{taken} events waited");
        }
        assert!(self.store.ready().all(|ready| ready != conn));
    }

    fn end(mut self) {
        if self.is_managed {
            return;
        }
        for who in [1, 2] {
            self.take_events(who);
            let dom = self.callers[who].dom;
            self.store.release(dom).expect("a known domain");
            assert!(
                self.store.connect(dom).is_err(),
                "a domain that is gone has no connection"
            );
        }
        assert_eq!(self.store.nodes(), self.nodes, "nothing of the guests stays");
    }
}
