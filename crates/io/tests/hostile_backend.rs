//! The frontend against backends that lie. Each test names the rule (PVR-n) or the advisory's test (T-n) it holds.

#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use gnttab_abi::{Abi, GrantRef};
use gnttab_io::blkif::{
    Completion, DeviceBroken, DeviceProperties, DiscardInfo, DiskInfo, FrontendConfig, FrontendQueue, Io,
    IoError, RawResponse, RejectReason, Request, Slot,
};
use gnttab_io::fake::{Event, FakeDomain, FakeGranter, HostileBackend};
use gnttab_io::grants::GrantError;
use proptest::prelude::*;

const DISK: DiskInfo = DiskInfo {
    discard: Some(DiscardInfo {
        granularity: 512,
        alignment: 0,
        secure: true,
    }),
    ..DiskInfo::new(1024)
};

const PROPERTIES: DeviceProperties = DeviceProperties {
    disk: DISK,
    barrier: false,
    persistent: false,
    max_indirect: 64,
};

struct Victim {
    domain: FakeDomain,
    queue: FrontendQueue<FakeGranter, Event>,
    liar: HostileBackend,
    event: Event,
}

impl Victim {
    fn new(abi: Abi, properties: DeviceProperties) -> Victim {
        Victim::with(FrontendConfig::new(abi), properties)
    }

    fn with(config: FrontendConfig, properties: DeviceProperties) -> Victim {
        let domain = FakeDomain::new();
        let event = Event::new();
        let mut queue = FrontendQueue::new(domain.granter(), config);
        let ring = queue.open(1, event.clone()).unwrap();
        let liar = HostileBackend::new(&domain, config.abi, &ring).unwrap();
        queue.start(properties);
        Victim {
            domain,
            queue,
            liar,
            event,
        }
    }

    fn submit(&mut self, token: u64, io: Io) {
        self.queue.submit(token, io).unwrap();
        self.queue.kick();
    }

    /// Everything that a poll gives until it waits or breaks.
    fn poll_all(&mut self) -> (Vec<Completion>, Option<DeviceBroken>) {
        let mut done = Vec::new();
        loop {
            match self.queue.poll() {
                Ok(Some(completion)) => done.push(completion),
                Ok(None) => return (done, None),
                Err(broken) => return (done, Some(broken)),
            }
        }
    }

    fn request(&self, index: u32) -> (Slot, Request) {
        let slot = self.liar.request(index);
        (
            slot,
            Request::parse(&slot, 4096).expect("the frontend sends legal requests"),
        )
    }
}

fn read(sector: u64, sectors: usize) -> Io {
    Io::Read {
        sector,
        data: vec![0; sectors * 512].into(),
    }
}

fn response(id: u64, operation: u8, status: i16) -> RawResponse {
    RawResponse {
        id,
        operation,
        status,
    }
}

#[test]
fn tl10_responses_that_answer_nothing_break_the_device() {
    for abi in Abi::ALL {
        for persistent in [false, true] {
            let properties = DeviceProperties {
                persistent,
                ..PROPERTIES
            };
            let lies: [&dyn Fn(u64) -> RawResponse; 7] = [
                &|id| response(id + 1, 0, 0),
                &|id| response(id | 32, 0, 0),
                &|id| response(id ^ (1 << 31), 0, 0),
                &|id| response(id ^ (1 << 32), 0, 0),
                &|_| response(u64::MAX, 0, 0),
                &|id| response(id, 1, 0),
                &|id| response(id, 6, 0),
            ];
            for lie in lies {
                let mut victim = Victim::new(abi, properties);
                victim.submit(1, read(0, 8));
                let id = victim.request(0).0.id();
                victim.liar.respond(lie(id));
                let (done, broken) = victim.poll_all();
                assert!(done.is_empty() && broken.is_some());
                // An honest answer comes too late, and a new operation waits.
                victim.liar.respond(response(id, 0, 0));
                victim.submit(2, Io::Flush);
                assert_eq!(victim.poll_all(), (vec![], broken));
                assert_eq!((victim.queue.in_flight(), victim.liar.req_prod()), (2, 1));
            }
        }
    }
}

#[test]
fn pvr3_an_identifier_is_good_once() {
    for reuse in [false, true] {
        let mut victim = Victim::new(Abi::X86_64, PROPERTIES);
        victim.submit(1, read(0, 8));
        let first = victim.request(0).0.id();
        victim.liar.respond(response(first, 0, 0));
        assert_eq!(victim.poll_all().0.len(), 1);
        // Another request is out, which may stand where the first one stood.
        victim.submit(2, read(8, 8));
        let second = victim.request(1).0.id();
        assert_ne!(first, second);
        victim
            .liar
            .respond(response(if reuse { second } else { first }, 0, 0));
        let (done, broken) = victim.poll_all();
        if reuse {
            assert_eq!((done[0].token, broken), (2, None));
        } else {
            assert_eq!((done, broken), (vec![], Some(DeviceBroken::UnknownId(first))));
        }
    }
}

#[test]
fn pvr1_more_responses_than_requests_break_the_device() {
    for ahead in [2, 32, 33, 1 << 31, u32::MAX] {
        let mut victim = Victim::new(Abi::X86_32, PROPERTIES);
        victim.submit(1, read(0, 8));
        victim.liar.set_rsp_prod(ahead);
        let (done, broken) = victim.poll_all();
        assert!(done.is_empty());
        assert!(matches!(broken, Some(DeviceBroken::Ring(broken)) if broken.room == 1));
        let domain = victim.domain.clone();
        assert_eq!(victim.domain.pages(), 2);
        victim.queue.close();
        drop(victim.liar);
        drop(victim.queue);
        assert_eq!((domain.pages(), domain.grants()), (0, 0));
    }
}

#[test]
fn pvr10_what_the_backend_does_to_our_words_changes_nothing() {
    let mut victim = Victim::new(Abi::X86_64, PROPERTIES);
    for round in 0..100u32 {
        victim.liar.memory().store_u32(0, round.wrapping_mul(0x9E37_79B9));
        victim
            .liar
            .memory()
            .store_u32(12, round.wrapping_mul(0x1234_5678));
        victim.submit(u64::from(round), read(u64::from(round), 3));
        let (slot, request) = victim.request(round);
        assert!(matches!(request, Request::Direct(direct) if direct.sector == u64::from(round)));
        // The request is spoiled after it was read; the frontend does not look at it again.
        victim.liar.memory().write(64, &[0xFF; 4032]);
        victim.liar.respond(response(slot.id(), 0, 0));
        let (done, broken) = victim.poll_all();
        assert_eq!((done.len(), broken), (1, None));
    }
}

#[test]
fn gst2_a_page_that_is_still_mapped_is_never_used_again() {
    let mut victim = Victim::new(Abi::X86_64, PROPERTIES);
    victim.submit(
        1,
        Io::Write {
            sector: 0,
            data: vec![7; 4096].into(),
        },
    );
    let (slot, request) = victim.request(0);
    let Request::Direct(direct) = request else {
        panic!("a direct request")
    };
    let gref = direct.segments().next().unwrap().gref();
    assert!(victim.liar.hold(gref));
    victim.liar.respond(response(slot.id(), 1, 0));
    let (done, broken) = victim.poll_all();
    assert_eq!((done, broken), (vec![], Some(DeviceBroken::StillMapped(gref))));

    victim.queue.close();
    assert_eq!((victim.queue.pool_pages(), victim.queue.in_flight()), (0, 1));
    assert!(
        victim.domain.references().contains(&gref),
        "the reference is not free"
    );
    assert_eq!(
        victim.domain.pages(),
        2,
        "neither are the ring's page and the data's"
    );
    victim.liar.let_go();
    drop(victim.liar);
    assert_eq!((victim.domain.grants(), victim.domain.pages()), (0, 0));
}

#[test]
fn persistent_pages_that_the_backend_keeps_are_used_first_and_without_a_new_grant() {
    let mut victim = Victim::new(
        Abi::X86_64,
        DeviceProperties {
            persistent: true,
            ..PROPERTIES
        },
    );
    let mut kept = None;
    for round in 0..4 {
        victim.submit(
            round,
            Io::Write {
                sector: 0,
                data: vec![7; 8192].into(),
            },
        );
        let (slot, request) = victim.request(u32::try_from(round).unwrap());
        let Request::Direct(direct) = request else {
            panic!("a direct request")
        };
        let grefs: Vec<GrantRef> = direct.segments().map(|segment| segment.gref()).collect();
        if let Some(kept) = kept {
            assert_eq!(grefs[0], kept);
        } else {
            kept = Some(grefs[0]);
            assert!(victim.liar.hold(grefs[0]));
        }
        victim.liar.respond(response(slot.id(), 1, 0));
        assert_eq!(victim.poll_all().1, None);
        assert_eq!(victim.domain.grants(), 2, "the ring, and the page that is kept");
        assert_eq!(victim.queue.pool_pages(), 2);
    }
}

#[test]
fn statuses_mean_what_the_spec_says() {
    let mut victim = Victim::new(Abi::X86_64, PROPERTIES);
    let mut next = 0;
    let mut ask = |victim: &mut Victim, io: Io, status: i16| {
        victim.submit(0, io);
        if victim.liar.req_prod() == next {
            return (victim.poll_all().0[0].result, false);
        }
        let (slot, request) = victim.request(next);
        next += 1;
        victim
            .liar
            .respond(response(slot.id(), request.answered_as().code(), status));
        let (done, broken) = victim.poll_all();
        assert_eq!(broken, None);
        (done[0].result, true)
    };
    let discard = || Io::Discard {
        sector: 0,
        count: 8,
        secure: false,
    };
    let failed = Err(IoError::Failed);
    for status in [-1, -2, -3, i16::MIN, 1, i16::MAX] {
        assert_eq!(ask(&mut victim, read(0, 8), status), (failed, true));
    }
    assert_eq!(ask(&mut victim, discard(), -1), (failed, true));
    assert_eq!(
        ask(&mut victim, discard(), -2),
        (Err(IoError::NotSupported), true)
    );
    assert_eq!(
        ask(&mut victim, discard(), 0),
        (Err(IoError::NotSupported), false),
        "never sent again"
    );
    assert_eq!(ask(&mut victim, Io::Flush, 0), (Ok(()), true));
    // What is on the disk is not certain: that must not look like success.
    assert_eq!(ask(&mut victim, Io::Flush, -1), (failed, true));
    assert_eq!(ask(&mut victim, Io::Flush, -2), (Ok(()), true));
    assert_eq!(
        ask(&mut victim, Io::Flush, 0),
        (Ok(()), false),
        "never sent again"
    );
    assert_eq!(ask(&mut victim, read(0, 8), 0), (Ok(()), true));
    assert_eq!(victim.queue.stats().failures, 10);
}

#[test]
fn flushes_go_out_as_what_the_backend_knows() {
    for (flush, barrier, operation) in [
        (true, true, Some(3)),
        (true, false, Some(3)),
        (false, true, Some(2)),
        (false, false, None),
    ] {
        let disk = DiskInfo { flush, ..DISK };
        let mut victim = Victim::new(
            Abi::Arm,
            DeviceProperties {
                disk,
                barrier,
                ..PROPERTIES
            },
        );
        victim.submit(1, Io::Flush);
        assert_eq!(victim.liar.req_prod(), u32::from(operation.is_some()));
        if let Some(operation) = operation {
            assert_eq!(victim.liar.request(0).operation(), operation);
            assert!(victim.event.take());
        } else {
            assert_eq!(victim.poll_all().0[0].result, Ok(()));
        }
    }
}

#[test]
fn what_does_not_fit_the_disk_comes_back() {
    let mut victim = Victim::new(Abi::X86_64, PROPERTIES);
    let unfit = || {
        [
            read(0, 0),
            Io::Write {
                sector: 0,
                data: vec![0; 511].into(),
            },
            read(1024, 1),
            read(u64::MAX, 1),
            Io::Discard {
                sector: 1000,
                count: u64::MAX,
                secure: true,
            },
        ]
    };
    for (io, again) in unfit().into_iter().zip(unfit()) {
        assert_eq!(victim.queue.submit(1, io).unwrap_err().io, again);
    }
    victim.queue.start(DeviceProperties {
        disk: DiskInfo {
            read_only: true,
            ..DISK
        },
        ..PROPERTIES
    });
    assert!(
        victim
            .queue
            .submit(
                1,
                Io::Write {
                    sector: 0,
                    data: vec![0; 512].into()
                }
            )
            .is_err()
    );
    assert!(victim.queue.submit(1, read(0, 1)).is_ok());
    let mut unconnected =
        FrontendQueue::<_, Event>::new(victim.domain.granter(), FrontendConfig::new(Abi::X86_64));
    let rejected = unconnected.submit(1, Io::Flush).unwrap_err();
    assert_eq!(rejected.reason, RejectReason::NeverConnected);
}

#[test]
fn pvr7_pages_run_out_without_a_deadlock() {
    // Fewer pages than the operation has, and then fewer than any request needs.
    let config = FrontendConfig {
        max_pages: 3,
        ..FrontendConfig::new(Abi::X86_64)
    };
    let mut victim = Victim::with(config, PROPERTIES);
    victim.submit(1, read(0, 80));
    for index in 0..4 {
        let (slot, request) = victim.request(index);
        let Request::Direct(direct) = request else {
            panic!("a direct request")
        };
        assert_eq!(direct.segments().count(), if index < 3 { 3 } else { 1 });
        victim.liar.respond(response(slot.id(), 0, 0));
        assert_eq!(victim.poll_all().0.len(), usize::from(index == 3));
    }
    victim.domain.limit_pages(0);
    let mut victim = Victim::with(
        FrontendConfig {
            max_pages: 0,
            ..config
        },
        PROPERTIES,
    );
    victim.submit(1, read(0, 8));
    assert_eq!(
        victim.poll_all().0[0].result,
        Err(IoError::Grant(GrantError::NoPages))
    );
}

#[test]
fn an_operation_that_failed_in_part_sends_no_more_and_ends_once() {
    let config = FrontendConfig {
        max_pages: 3,
        ..FrontendConfig::new(Abi::X86_64)
    };
    let mut victim = Victim::with(config, PROPERTIES);
    victim.submit(1, read(0, 80));
    victim.submit(2, read(100, 8));
    let first = victim.request(0).0.id();
    victim.liar.respond(response(first, 0, -1));
    let (done, broken) = victim.poll_all();
    assert_eq!((done.len(), broken), (1, None));
    assert_eq!((done[0].token, done[0].result), (1, Err(IoError::Failed)));
    let (slot, request) = victim.request(1);
    assert!(
        matches!(request, Request::Direct(direct) if direct.sector == 100),
        "the next operation's"
    );
    victim.liar.respond(response(slot.id(), 0, 0));
    assert_eq!(victim.poll_all().0[0].result, Ok(()));
    assert_eq!((victim.liar.req_prod(), victim.queue.in_flight()), (2, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Whatever a backend answers: no panic, an operation completes at most once, and with success only if
    /// every one of its requests was answered with it.
    #[test]
    fn any_responses_complete_nothing_twice(
        persistent in any::<bool>(),
        lies in prop::collection::vec((0..12u8, any::<u64>(), any::<i16>()), 0..60),
    ) {
        let mut victim = Victim::new(Abi::X86_64, DeviceProperties { persistent, ..PROPERTIES });
        for token in 0..20 {
            victim.submit(token, read(token, 100));
        }
        let mut seen = [false; 20];
        let mut honest = 0;
        for (kind, number, status) in lies {
            let pending = victim.liar.req_prod();
            match kind {
                0 => victim.liar.set_rsp_prod(u32::try_from(number & 0xFFFF_FFFF).unwrap()),
                1 => victim.liar.respond(response(number, 0, status)),
                2 => victim.liar.respond(response(number & 31, 0, status)),
                _ if honest < pending => {
                    let id = victim.liar.request(honest).id();
                    victim.liar.respond(response(id, 0, if kind == 3 { status } else { 0 }));
                    honest += 1;
                }
                _ => {}
            }
            let (done, broken) = victim.poll_all();
            for completion in done {
                let token = usize::try_from(completion.token).unwrap();
                prop_assert!(!seen[token]);
                seen[token] = true;
            }
            if broken.is_some() {
                break;
            }
        }
        let done = seen.iter().filter(|seen| **seen).count();
        prop_assert_eq!(victim.queue.in_flight(), 20 - done);
        let domain = victim.domain.clone();
        victim.queue.close();
        prop_assert_eq!(victim.queue.take_unfinished().len(), 20 - done);
        drop(victim);
        prop_assert_eq!((domain.pages(), domain.grants(), domain.mappings()), (0, 0, 0));
    }
}
