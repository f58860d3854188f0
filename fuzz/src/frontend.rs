//! A block frontend against a hostile backend.
//!
//! The backend answers what it likes, writes any index into the ring and any bytes over the requests,
//! keeps pages mapped, and comes and goes. What must hold: nothing panics; an operation ends once, is
//! the one that was submitted, and a write keeps its data; a broken device stays broken until it is
//! closed; requests are legal as they are sent; at the end nothing is granted and no page is lost.

use std::collections::BTreeMap;

use gnttab_abi::Abi;
use gnttab_io::blkif::{
    Data, DeviceProperties, DiscardInfo, DiskInfo, FrontendConfig, FrontendQueue, Io, RawResponse, Request,
};
use gnttab_io::fake::{Event, FakeDomain, FakeGranter, HostileBackend};

use crate::input::Input;

const SECTORS: u64 = 256;

/// Plays an input.
///
/// # Panics
/// When a rule of the module's head is broken.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let mut game = Game::new(&mut input);
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        game.step(&mut input);
        assert_eq!(game.queue.in_flight(), game.out.len(), "operations under way");
    }
    game.end();
}

struct Game {
    domain: FakeDomain,
    config: FrontendConfig,
    properties: DeviceProperties,
    queue: FrontendQueue<FakeGranter, Event>,
    liar: Option<HostileBackend>,
    /// Requests on the ring that were not answered, and those that were: id, operation.
    seen: Vec<(u64, u8)>,
    old: Vec<(u64, u8)>,
    /// What was answered must break the device.
    must_break: bool,
    /// Requests looked at so far.
    looked: u32,
    /// The ring's memory is as the frontend left it.
    is_calm: bool,
    is_broken: bool,
    out: BTreeMap<u64, Io>,
    next: u64,
}

impl Game {
    fn new(input: &mut Input<'_>) -> Game {
        let abi = input.pick(&Abi::ALL);
        let kind = input.byte();
        let config = FrontendConfig {
            max_indirect: input.pick(&[0, 11, 32, 300]),
            max_pages: input.pick(&[1, 4, 64, 1056]),
            ..FrontendConfig::new(abi)
        };
        let disk = DiskInfo {
            sector_size: if kind & 1 == 0 { 512 } else { 4096 },
            read_only: kind & 6 == 6,
            flush: kind & 8 == 0,
            discard: (kind & 16 == 0).then_some(DiscardInfo {
                granularity: 512,
                alignment: 0,
                secure: kind & 32 == 0,
            }),
            ..DiskInfo::new(SECTORS)
        };
        let properties = DeviceProperties {
            disk,
            barrier: kind & 64 == 0,
            persistent: kind & 128 == 0,
            max_indirect: input.pick(&[0, 8, 64, 4096]),
        };
        let domain = FakeDomain::new();
        if input.byte() > 200 {
            domain.limit_pages(usize::from(input.byte() % 8) + 1);
        }
        let queue = FrontendQueue::new(domain.granter().with_stale_pages(), config);
        let mut game = Game {
            domain,
            config,
            properties,
            queue,
            liar: None,
            seen: Vec::new(),
            old: Vec::new(),
            must_break: false,
            looked: 0,
            is_calm: true,
            is_broken: false,
            out: BTreeMap::new(),
            next: 0,
        };
        game.connect(1);
        game
    }

    fn connect(&mut self, pages: usize) {
        if self.queue.is_open() {
            return;
        }
        let Ok(ring) = self.queue.open(pages, Event::new()) else {
            return;
        };
        self.liar = HostileBackend::new(&self.domain, self.config.abi, &ring);
        assert!(self.liar.is_some(), "a ring that was granted can be mapped");
        (self.looked, self.is_calm, self.is_broken, self.must_break) = (0, true, false, false);
        self.seen.clear();
        self.old.clear();
        self.queue.start(self.properties);
        self.look();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(14) {
            0..4 => {
                self.submit(input);
                self.queue.kick();
                self.look();
            }
            4 => self.submit(input),
            5..8 => {
                self.answer(input);
                self.poll();
            }
            8 => self.poll(),
            9 => {
                let ahead = input.pick(&[0, 1, 2, 31, 32, 33, 1 << 31, u32::MAX]);
                if let Some(liar) = &mut self.liar {
                    self.is_calm &= ahead == 0;
                    let now = liar.memory().load_u32(8);
                    liar.set_rsp_prod(now.wrapping_add(ahead));
                }
                self.poll();
            }
            10 => {
                let (at, bytes) = (input.u16(), input.bytes(8));
                if let Some(liar) = &self.liar {
                    let memory = liar.memory();
                    memory.write(usize::from(at) % (memory.len() - 8), bytes);
                    self.is_calm = false;
                }
            }
            11 => {
                let all = self.domain.references();
                if let Some(liar) = &mut self.liar
                    && !all.is_empty()
                {
                    liar.hold(input.pick(&all));
                }
            }
            12 => {
                if let Some(liar) = &mut self.liar {
                    liar.let_go();
                }
            }
            _ => {
                // Either side goes first.
                let liar = self.liar.take();
                if input.flag() {
                    drop(liar);
                    self.close();
                } else {
                    self.close();
                    drop(liar);
                }
                let pages = input.pick(&[1, 2, 4]);
                self.connect(pages);
            }
        }
    }

    fn close(&mut self) {
        self.queue.close();
        self.must_break = false;
        self.is_broken = false;
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let sector = match input.byte() {
            byte @ 0..250 => u64::from(byte) & if byte & 1 == 0 { !7 } else { u64::MAX },
            _ => input.u64(),
        };
        let length = input.pick(&[512, 4096, 8192, 45_056, 49_152, 0, 100, 65_536]);
        let io = match input.below(8) {
            0..3 => Io::Read {
                sector,
                data: vec![0; length].into(),
            },
            3..6 => Io::Write {
                sector,
                data: vec![input.byte(); length].into(),
            },
            6 => Io::Flush,
            _ => Io::Discard {
                sector,
                count: u64::from(input.byte()),
                secure: input.flag(),
            },
        };
        let token = self.next;
        self.next += 1;
        match self.queue.submit(token, copy_of(&io)) {
            Ok(()) => {
                self.out.insert(token, io);
            }
            Err(rejected) => assert!(rejected.io == io, "it comes back whole"),
        }
    }

    /// What the frontend has put on the ring since the last time.
    fn look(&mut self) {
        let Some(liar) = &self.liar else { return };
        if !self.is_calm || self.is_broken {
            return;
        }
        let end = liar.req_prod();
        while self.looked != end {
            let slot = liar.request(self.looked);
            let limit = self.properties.max_indirect;
            let request = Request::parse(&slot, limit).expect("the frontend sends legal requests");
            self.seen.push((slot.id(), request.answered_as().code()));
            self.looked = self.looked.wrapping_add(1);
        }
    }

    fn answer(&mut self, input: &mut Input<'_>) {
        // An answer may be written over a request that is not shown yet.
        self.queue.kick();
        self.look();
        let lie = input.byte();
        let some = |of: &[(u64, u8)]| match of.len() {
            0 => None,
            number => Some(of[usize::from(lie) % number]),
        };
        let (id, operation) = match (lie, some(&self.seen), some(&self.old)) {
            (0..200, Some(known), _) | (200..220, _, Some(known)) => known,
            (220..240, Some((id, operation)), _) => (id ^ 1 << (input.byte() % 64), operation),
            (240..245, Some((id, operation)), _) => (id, operation ^ 1),
            _ => (input.u64(), input.byte()),
        };
        match self.seen.iter().position(|known| *known == (id, operation)) {
            Some(answered) => self.old.push(self.seen.swap_remove(answered)),
            None => self.must_break |= self.is_calm && !self.is_broken && self.liar.is_some(),
        }
        let status = input.pick(&[0, 0, 0, -1, -2, 1, i16::MIN]);
        if let Some(liar) = &mut self.liar {
            liar.respond(RawResponse {
                id,
                operation,
                status,
            });
        }
    }

    fn poll(&mut self) {
        for _ in 0..64 {
            match self.queue.poll() {
                Ok(Some(completion)) => {
                    let submitted = self
                        .out
                        .remove(&completion.token)
                        .expect("an operation under way");
                    match (&submitted, &completion.io) {
                        (
                            Io::Read { sector, data },
                            Io::Read {
                                sector: same,
                                data: filled,
                            },
                        ) => {
                            assert!(sector == same && data.len() == filled.len());
                        }
                        (submitted, same) => assert!(submitted == same, "it comes back whole"),
                    }
                }
                Ok(None) => {
                    assert!(!self.is_broken, "broken until it is closed");
                    let waits = self.queue.is_running();
                    assert!(!(waits && self.must_break && self.is_calm), "a lie was believed");
                    break;
                }
                Err(_) => {
                    // Closed, it has nothing to be broken by.
                    assert!(self.queue.is_open());
                    self.is_broken = true;
                    break;
                }
            }
        }
        self.look();
    }

    fn end(mut self) {
        for (token, io) in self.queue.take_unfinished() {
            let submitted = self.out.remove(&token).expect("an operation under way");
            match (submitted, io) {
                (Io::Read { data, .. }, Io::Read { data: same, .. }) => assert_eq!(data.len(), same.len()),
                (submitted, same) => assert!(submitted == same, "it comes back whole"),
            }
        }
        // What had ended already is still told.
        (self.is_broken, self.is_calm) = (false, false);
        self.poll();
        assert!(
            self.out.is_empty(),
            "every operation ended or is unfinished: {:?}",
            self.out.keys()
        );
        let Game {
            domain, queue, liar, ..
        } = self;
        drop(liar);
        drop(queue);
        assert_eq!(
            (domain.pages(), domain.grants()),
            (0, 0),
            "nothing stays granted, no page is lost"
        );
    }
}

fn bytes(data: &Data) -> &[u8] {
    match data {
        Data::Own(bytes) => bytes,
        Data::Leased(_) => panic!("nobody was lent pages"),
    }
}

fn copy_of(io: &Io) -> Io {
    let copy = |data| Data::Own(bytes(data).to_vec());
    match *io {
        Io::Read { sector, ref data } => Io::Read {
            sector,
            data: copy(data),
        },
        Io::Write { sector, ref data } => Io::Write {
            sector,
            data: copy(data),
        },
        Io::Flush => Io::Flush,
        Io::Discard {
            sector,
            count,
            secure,
        } => Io::Discard {
            sector,
            count,
            secure,
        },
    }
}
