//! Frontend and backend against each other: every combination of what can be negotiated, by digest.

#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use std::cell::RefCell;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use gnttab_abi::Abi;
use gnttab_io::blkif::{
    Awaited, BackendConfig, BackendQueue, Data, DeviceProperties, Disk, DiskError, DiskInfo, FrontendConfig,
    FrontendQueue, Io, OneShot,
};
use gnttab_io::fake::{Event, FakeDomain, RamDisk, Rig, RigConfig};
use gnttab_io::shared::{SharedSlice, SharedSliceMut};

/// A small generator, so that every run does the same.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len)
            .map(|_| u8::try_from(self.next() & 0xFF).unwrap())
            .collect()
    }
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

const SECTORS: u64 = 2048;

/// Fills the disk with many writes in flight, of all lengths, then reads it back in other pieces.
fn round_trip(config: RigConfig, info: DiskInfo) {
    let unit = u64::from(info.sector_size / 512);
    let random = &mut Random(7);
    let mut model = random.bytes(usize::try_from(SECTORS).unwrap() * 512);
    let mut rig = Rig::with_disk(config, RamDisk::with_info(info, model.clone()));

    let mut token = 0;
    let mut at = 0;
    while at < SECTORS {
        let count = (unit * (1 + random.below(300 / unit))).min(SECTORS - at);
        let data = random.bytes(usize::try_from(count * 512).unwrap());
        let start = usize::try_from(at * 512).unwrap();
        model[start..start + data.len()].copy_from_slice(&data);
        rig.device
            .submit(
                token,
                Io::Write {
                    sector: at,
                    data: data.into(),
                },
            )
            .unwrap();
        token += 1;
        at += count;
    }
    rig.device.submit(token, Io::Flush).unwrap();
    drain(&mut rig, token + 1);
    assert_eq!(
        digest(&rig.disk.content()),
        digest(&model),
        "written through {config:?}"
    );

    let mut at = 0;
    let mut reads = 0;
    while at < SECTORS {
        let count = (unit * (1 + random.below(200 / unit))).min(SECTORS - at);
        let data = vec![0xEE; usize::try_from(count * 512).unwrap()];
        rig.device
            .submit(
                at,
                Io::Read {
                    sector: at,
                    data: data.into(),
                },
            )
            .unwrap();
        at += count;
        reads += 1;
    }
    let mut back = vec![0; model.len()];
    for done in drain(&mut rig, reads) {
        let Io::Read {
            sector,
            data: Data::Own(data),
        } = done
        else {
            panic!("a read comes back as a read, in the memory that it brought")
        };
        let start = usize::try_from(sector * 512).unwrap();
        back[start..start + data.len()].copy_from_slice(&data);
    }
    assert_eq!(digest(&back), digest(&model), "read through {config:?}");

    let front: u64 = rig
        .device
        .queues()
        .iter()
        .map(|queue| queue.stats().requests)
        .sum();
    let stats: Vec<_> = rig.backend.iter().map(|queue| queue.stats()).collect();
    assert_eq!(
        stats.iter().map(|s| s.reads + s.writes + s.flushes).sum::<u64>(),
        front
    );
    assert!(stats.iter().all(|stats| stats.reads > 0), "every queue is used");
    assert_eq!(stats.iter().map(|stats| stats.failures).sum::<u64>(), 0);
    if !config.persistent {
        let ring_pages = config.queues << config.ring_order;
        assert_eq!(
            rig.domain.mappings(),
            ring_pages,
            "only rings stay mapped without persistent grants"
        );
        assert_eq!(rig.domain.grants(), ring_pages);
    }
    rig.device.close();
    assert!(rig.domain.grants() > 0, "the backend still maps the rings");
    rig.kill_backend();
    drop(rig.device);
    assert_eq!(
        (rig.domain.mappings(), rig.domain.grants(), rig.domain.pages()),
        (0, 0, 0),
        "{config:?}"
    );
}

/// Polls until `count` operations have completed, all with success.
fn drain(rig: &mut Rig, count: u64) -> Vec<Io> {
    let mut done = Vec::new();
    for _ in 0..10_000 {
        while let Some(completion) = rig.device.poll().unwrap() {
            assert_eq!(completion.result, Ok(()));
            done.push(completion.io);
        }
        if done.len() as u64 == count {
            assert_eq!(rig.device.in_flight(), 0);
            return done;
        }
        rig.serve();
    }
    panic!("{} of {count} operations completed", done.len());
}

#[test]
fn every_combination_carries_the_same_bytes() {
    for abi in Abi::ALL {
        for queues in 1..=4 {
            for ring_order in 0..=2 {
                for max_indirect in [0, 32, 256] {
                    for (persistent, one_shot) in [
                        (true, OneShot::Map),
                        (false, OneShot::Map),
                        (false, OneShot::Copy),
                    ] {
                        let config = RigConfig {
                            abi,
                            queues,
                            ring_order,
                            max_indirect,
                            persistent,
                            one_shot,
                            ..RigConfig::default()
                        };
                        round_trip(config, DiskInfo::new(SECTORS));
                    }
                }
            }
        }
    }
}

#[test]
fn too_few_persistent_mappings_change_nothing_but_the_cost() {
    for one_shot in [OneShot::Map, OneShot::Copy] {
        for persistent_limit in [0, 1, 40] {
            let config = RigConfig {
                persistent_limit,
                one_shot,
                ..RigConfig::default()
            };
            round_trip(config, DiskInfo::new(SECTORS));
        }
    }
}

#[test]
fn disks_with_big_sectors() {
    let info = DiskInfo {
        sector_size: 4096,
        ..DiskInfo::new(SECTORS)
    };
    round_trip(RigConfig::default(), info);
    round_trip(
        RigConfig {
            max_indirect: 0,
            persistent: false,
            ..RigConfig::default()
        },
        info,
    );
}

#[test]
fn persistent_grants_stop_mapping_once_the_pages_are_known() {
    let mut rig = Rig::new(RigConfig::default(), 2048);
    let domain = rig.domain.clone();
    let (device, mut wait) = rig.split();
    device.write(0, &[1; 128 * 1024], &mut wait).unwrap();
    let mapped = domain.map_calls();
    for sector in 0..100 {
        device.write(sector, &[2; 64 * 1024], &mut wait).unwrap();
    }
    assert_eq!(domain.map_calls(), mapped, "no request maps anything");
}

#[test]
fn operations_of_many_requests_survive_a_reconnect_whole() {
    // More requests than both rings hold, so that of some a part has been sent and the rest not.
    const WRITES: u8 = 12;
    for answered in 0..6 {
        let config = RigConfig {
            queues: 2,
            max_indirect: 0,
            ..RigConfig::default()
        };
        let mut rig = Rig::new(config, 12_000);
        for fill in 1..=WRITES {
            let io = Io::Write {
                sector: u64::from(fill) * 600,
                data: vec![fill; 300 * 1024].into(),
            };
            rig.device.submit(u64::from(fill), io).unwrap();
        }
        rig.device.kick();
        for (queue, event) in rig.backend.iter_mut().zip(&mut rig.to_frontend) {
            let progress = queue.process(&rig.disk, event, answered).unwrap();
            assert_eq!(progress.served, answered);
        }
        assert_eq!(
            rig.device.poll().unwrap(),
            None,
            "no operation is answered in full"
        );
        rig.kill_backend();
        rig.device.close();
        rig.connect();
        drain(&mut rig, u64::from(WRITES));
        let written: u64 = rig.backend.iter().map(|queue| queue.stats().bytes_written).sum();
        assert_eq!(
            written,
            u64::from(WRITES) * 300 * 1024,
            "each is sent whole, and once"
        );
        let content = rig.disk.content();
        for fill in 1..=WRITES {
            let written = &content[usize::from(fill) * 600 * 512..][..300 * 1024];
            assert!(written.iter().all(|byte| *byte == fill));
        }
    }
}

/// A disk that notes, at each call, how many events the backend has sent so far.
struct Watching<'a> {
    disk: RamDisk,
    event: &'a Event,
    seen: RefCell<Vec<(&'static str, u64)>>,
}

impl Watching<'_> {
    fn note(&self, call: &'static str) {
        self.seen.borrow_mut().push((call, self.event.sent()));
    }
}

impl Disk for Watching<'_> {
    fn info(&self) -> DiskInfo {
        self.disk.info()
    }

    fn read(&self, sector: u64, into: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        self.note("read");
        self.disk.read(sector, into)
    }

    fn write(&self, sector: u64, from: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        self.note("write");
        self.disk.write(sector, from)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.note("flush");
        self.disk.flush()
    }

    fn discard(&self, sector: u64, count: u64, secure: bool) -> Result<(), DiskError> {
        self.disk.discard(sector, count, secure)
    }
}

/// Rule 6 of the backend: an event waits for further answers, not for ever, not for a flush, not for nothing.
#[test]
fn an_event_waits_for_answers_at_hand_and_for_nothing_else() {
    let event = Event::new();
    let disk = Watching {
        disk: RamDisk::new(2048),
        event: &event,
        seen: RefCell::default(),
    };
    let domain = FakeDomain::new();
    let mut front = FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
    let ring = front.open(1, Event::new()).unwrap();
    let config = BackendConfig::new(Abi::X86_64, true);
    let mut back = BackendQueue::connect(domain.grantee(), &ring, config, disk.info()).unwrap();
    front.start(DeviceProperties {
        disk: disk.info(),
        barrier: false,
        persistent: true,
        max_indirect: 32,
    });
    let mut run = |ios: Vec<Io>| {
        let count = ios.len();
        disk.seen.borrow_mut().clear();
        let before = event.sent();
        for (token, io) in (0..).zip(ios) {
            front.submit(token, io).unwrap();
        }
        front.kick();
        back.process(&disk, &mut event.clone(), 64).unwrap();
        assert_eq!(std::iter::from_fn(|| front.poll().unwrap()).count(), count);
        let seen: Vec<_> = disk
            .seen
            .borrow()
            .iter()
            .map(|&(call, sent)| (call, sent - before))
            .collect();
        (seen, event.sent() - before)
    };
    let read = |pages: usize| Io::Read {
        sector: 0,
        data: vec![0; pages * 4096].into(),
    };

    // Nothing else at hand: told at once, once.
    assert_eq!(run(vec![read(1)]), (vec![("read", 0)], 1));
    // Four at hand: one event, after the last.
    let four = (0..4).map(|_| read(1)).collect();
    assert_eq!(run(four), (vec![("read", 0); 4], 1));
    // A flush may take long: what is answered before it is told before it.
    let (seen, sent) = run(vec![read(1), Io::Flush]);
    assert_eq!((seen, sent), (vec![("read", 0), ("flush", 1)], 1));
    // Not for ever: the seventeenth is served after the event; so is what follows 256 KiB.
    let (seen, _) = run((0..20).map(|_| read(1)).collect());
    assert_eq!((seen[15], seen[16]), (("read", 0), ("read", 1)));
    let (seen, _) = run(vec![read(32), read(32), read(32)]);
    assert_eq!(seen, [("read", 0), ("read", 0), ("read", 1)]);
}

/// Who stays awake is sent no events, and who goes to sleep is.
#[test]
fn only_who_sleeps_is_woken() {
    let (to_front, to_back) = (Event::new(), Event::new());
    let disk = RamDisk::new(2048);
    let domain = FakeDomain::new();
    let mut front = FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
    assert_eq!(front.awaited(), Ok(Awaited::default()));
    let ring = front.open(1, to_back.clone()).unwrap();
    let config = BackendConfig::new(Abi::X86_64, true);
    let mut back = BackendQueue::connect(domain.grantee(), &ring, config, disk.info()).unwrap();
    front.start(DeviceProperties {
        disk: disk.info(),
        barrier: false,
        persistent: true,
        max_indirect: 32,
    });
    let awaited = |answered, unanswered| Ok(Awaited { answered, unanswered });
    let mut run = |awake: bool| {
        let before = (to_back.sent(), to_front.sent());
        for token in 0..2 {
            let read = Io::Read {
                sector: 0,
                data: vec![0; 4096].into(),
            };
            front.submit(token, read).unwrap();
        }
        front.kick();
        assert_eq!(front.awaited(), awaited(0, 2));
        let progress = if awake {
            back.process_awake(&disk, &mut to_front.clone(), 64)
        } else {
            back.process(&disk, &mut to_front.clone(), 64)
        };
        assert_eq!(progress.map(|progress| progress.served), Ok(2));
        assert_eq!(front.awaited(), awaited(2, 0));
        let poll = || if awake { front.poll_awake() } else { front.poll() }.unwrap();
        assert_eq!(std::iter::from_fn(poll).count(), 2);
        (to_back.sent() - before.0, to_front.sent() - before.1)
    };
    assert_eq!(run(true), (1, 1), "both sleep at first");
    assert_eq!(run(true), (0, 0));
    assert_eq!(run(false), (0, 0), "both are awake until the end of this");
    assert_eq!(run(false), (1, 1));
}
