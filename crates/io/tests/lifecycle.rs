//! Connecting, closing, dying and coming back, in any order of watch events, with operations in flight (PVR-8).

#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use gnttab_abi::{Abi, DomId, GrantRef};
use gnttab_io::blkif::handshake::{
    BackendEvent, BackendHandshake, BackendLimits, FrontendEvent, FrontendHandshake, QueueOffer, VbdPaths,
    VbdSpec, VirtualDevice, create, is_closed, remove, replace_backend, take_offline,
};
use gnttab_io::blkif::{
    BackendConfig, BackendQueue, BlockDevice, Disk as _, DiskInfo, FrontendConfig, FrontendQueue, Io,
};
use gnttab_io::fake::{Event, FakeDomain, FakeGrantee, FakeGranter, MemoryStore, RamDisk, StoreConnection};
use gnttab_io::xenbus::{EventPort, Store as _, StoreExt as _, Tx};
use proptest::prelude::*;

const SECTORS: usize = 256;
const FRONTEND: DomId = DomId(5);

/// A backend program: what a real one does with its handshake, and no more.
struct Backend {
    store: StoreConnection,
    handshake: BackendHandshake,
    grantee: FakeGrantee,
    disk: Arc<RamDisk>,
    queues: Vec<BackendQueue<FakeGrantee>>,
    removed: bool,
}

impl Backend {
    fn start(world: &World) -> Option<Backend> {
        let mut store = world.store.connect(world.backend_id);
        let handshake = BackendHandshake::probe(&mut store, &world.paths.backend, world.limits).ok()?;
        let grantee = world.domain.grantee();
        let disk = world.disk.clone();
        Some(Backend {
            store,
            handshake,
            grantee,
            disk,
            queues: Vec::new(),
            removed: false,
        })
    }

    fn step(&mut self) {
        match self.handshake.advance(&mut self.store).unwrap() {
            BackendEvent::Idle => {}
            BackendEvent::Connect(offer) => {
                let config = BackendConfig::new(offer.abi, offer.persistent);
                let connect = |ring: &[GrantRef]| {
                    BackendQueue::connect(self.grantee.clone(), ring, config, self.disk.info())
                };
                self.queues.clear();
                match offer
                    .queues
                    .iter()
                    .map(|queue| connect(&queue.ring))
                    .collect::<Result<_, _>>()
                {
                    Ok(queues) => {
                        self.queues = queues;
                        self.handshake
                            .connected(&mut self.store, &self.disk.info())
                            .unwrap();
                    }
                    Err(error) => self.handshake.fail(&mut self.store, &error.to_string()).unwrap(),
                }
            }
            BackendEvent::Disconnect => {
                self.queues.clear();
                self.handshake.closed(&mut self.store).unwrap();
            }
            BackendEvent::Removed => {
                assert!(self.queues.is_empty());
                self.removed = true;
            }
        }
    }

    /// Serves up to `budget` requests of each queue.
    fn serve(&mut self, budget: u32) {
        for queue in &mut self.queues {
            queue
                .process(&*self.disk, &mut Event::new(), budget)
                .expect("an honest frontend");
        }
    }
}

/// A frontend program.
struct Frontend {
    store: StoreConnection,
    handshake: FrontendHandshake,
    device: BlockDevice<FakeGranter, Event>,
    queues: usize,
    setups: u32,
    removed: bool,
}

impl Frontend {
    fn start(world: &World, queues: usize) -> Frontend {
        let mut store = world.store.connect(FRONTEND);
        let handshake = FrontendHandshake::probe(&mut store, &world.paths.frontend, true).unwrap();
        let config = FrontendConfig::new(Abi::X86_64);
        let fresh = || FrontendQueue::new(world.domain.granter(), config);
        let device = BlockDevice::new((0..4).map(|_| fresh()).collect());
        Frontend {
            store,
            handshake,
            device,
            queues,
            setups: 0,
            removed: false,
        }
    }

    fn step(&mut self) {
        match self.handshake.advance(&mut self.store).unwrap() {
            FrontendEvent::Idle => {}
            FrontendEvent::Setup(limits) => {
                self.setups += 1;
                let queues = self.queues.min(usize::try_from(limits.max_queues).unwrap());
                let pages = 1 << limits.max_ring_page_order.min(1);
                let rings = self.device.open(pages, vec![Event::new(); queues]).unwrap();
                let offers: Vec<QueueOffer> = rings
                    .into_iter()
                    .map(|ring| QueueOffer {
                        ring,
                        event_channel: EventPort(9),
                    })
                    .collect();
                self.handshake
                    .publish(&mut self.store, Abi::X86_64, &offers)
                    .unwrap();
            }
            FrontendEvent::Connect(properties) => {
                self.device.start(properties);
                self.handshake.connected(&mut self.store).unwrap();
            }
            FrontendEvent::Update(properties) => self.device.start(properties),
            FrontendEvent::Disconnect => {
                self.device.close();
                self.handshake.closed(&mut self.store).unwrap();
            }
            FrontendEvent::Removed => self.removed = true,
        }
    }
}

/// The store, the toolstack and what both programs share.
struct World {
    store: MemoryStore,
    toolstack: StoreConnection,
    domain: FakeDomain,
    disk: Arc<RamDisk>,
    limits: BackendLimits,
    backend_id: DomId,
    paths: VbdPaths,
    frontend: Frontend,
    backend: Option<Backend>,
    /// What was written and acknowledged, by sector; of those in flight, what they write.
    written: BTreeMap<u64, u8>,
    in_flight: HashMap<u64, (u64, u8)>,
    next: u64,
}

impl World {
    fn new(queues: usize, limits: BackendLimits) -> World {
        let store = MemoryStore::new();
        let mut toolstack = store.connect(DomId(0));
        let backend_id = DomId(3);
        let paths = create(&mut toolstack, &spec(backend_id)).unwrap();
        let domain = FakeDomain::new();
        let disk = Arc::new(RamDisk::new(SECTORS));
        // The frontend needs a world to start in.
        let placeholder = {
            let mut store = store.connect(FRONTEND);
            let handshake = FrontendHandshake::probe(&mut store, &paths.frontend, true).unwrap();
            let queue = FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
            let device = BlockDevice::new(vec![queue]);
            Frontend {
                store,
                handshake,
                device,
                queues,
                setups: 0,
                removed: false,
            }
        };
        let mut world = World {
            store,
            toolstack,
            domain,
            disk,
            limits,
            backend_id,
            paths,
            frontend: placeholder,
            backend: None,
            written: BTreeMap::new(),
            in_flight: HashMap::new(),
            next: 0,
        };
        world.frontend = Frontend::start(&world, queues);
        world.backend = Backend::start(&world);
        world
    }

    /// Both sides look at the store until neither changes it any more.
    fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..50 {
            let before = self.store.writes();
            self.frontend.step();
            if let Some(backend) = &mut self.backend {
                backend.step();
            }
            // An event that a side has given and not written about yet is still to be acted on.
            quiet = if self.store.writes() == before {
                quiet + 1
            } else {
                0
            };
            if quiet == 4 {
                return;
            }
        }
        panic!("the two sides never come to rest");
    }

    fn states(&self) -> (String, String) {
        let get = |dir: &str| self.store.get(&format!("{dir}/state")).unwrap_or_default();
        (get(&self.paths.frontend), get(&self.paths.backend))
    }

    fn assert_connected(&self) {
        assert_eq!(self.states(), ("4".into(), "4".into()));
    }

    fn write(&mut self) {
        let sector = self.next * 7 % SECTORS as u64;
        let fill = u8::try_from(self.next % 251 + 1).unwrap();
        // One write to a sector at a time: of two at once either may win.
        if self.in_flight.values().any(|(busy, _)| *busy == sector) {
            return;
        }
        let io = Io::Write {
            sector,
            data: vec![fill; 512].into(),
        };
        if self.frontend.device.submit(self.next, io).is_ok() {
            self.in_flight.insert(self.next, (sector, fill));
        }
        self.frontend.device.kick();
        self.next += 1;
    }

    fn poll(&mut self) {
        while let Some(done) = self.frontend.device.poll().unwrap() {
            let (sector, fill) = self.in_flight.remove(&done.token).expect("completed once");
            done.result.unwrap();
            self.written.insert(sector, fill);
        }
    }

    /// With a backend connected, everything in flight completes, and the disk holds what was acknowledged.
    fn finish(&mut self) {
        for _ in 0..20 {
            self.backend.as_mut().expect("a backend").serve(100);
            self.poll();
        }
        assert!(
            self.in_flight.is_empty(),
            "{} operations were lost",
            self.in_flight.len()
        );
        let content = self.disk.content();
        for (sector, fill) in &self.written {
            let at = usize::try_from(*sector).unwrap() * 512;
            assert!(
                content[at..at + 512].iter().all(|byte| byte == fill),
                "sector {sector}"
            );
        }
    }

    fn kill_backend(&mut self) {
        self.backend = None;
        self.store.forget(self.backend_id);
    }
}

fn spec(backend: DomId) -> VbdSpec {
    VbdSpec::new(FRONTEND, backend, VirtualDevice::xvd(0, 0))
}

fn limits(max_queues: u32, max_ring_page_order: u32) -> BackendLimits {
    BackendLimits {
        max_queues,
        max_ring_page_order,
        ..BackendLimits::default()
    }
}

#[test]
fn the_keys_are_those_of_the_tables() {
    let keys = |world: &World, dir: &str| -> Vec<String> {
        let names = world.store.paths(&format!("{dir}/"));
        names
            .iter()
            .map(|path| format!("{}={}", &path[dir.len() + 1..], world.store.get(path).unwrap()))
            .collect()
    };
    let mut world = World::new(1, limits(4, 0));
    world.settle();
    world.assert_connected();
    assert_eq!(
        keys(&world, "/local/domain/5/device/vbd/51712"),
        [
            "backend=/local/domain/3/backend/vbd/5/51712",
            "backend-id=3",
            "device-type=disk",
            "event-channel=9",
            "feature-persistent=1",
            "protocol=x86_64-abi",
            "ring-ref=8",
            "state=4",
            "trusted=0",
            "virtual-device=51712",
        ]
    );
    assert_eq!(
        keys(&world, "/local/domain/3/backend/vbd/5/51712"),
        [
            "bootable=1",
            "dev=",
            "device-type=disk",
            "discard-enable=1",
            "feature-barrier=1",
            "feature-discard=0",
            "feature-flush-cache=1",
            "feature-max-indirect-segments=256",
            "feature-persistent=1",
            "frontend=/local/domain/5/device/vbd/51712",
            "frontend-id=5",
            "info=0",
            "max-ring-page-order=0",
            "max-ring-pages=1",
            "mode=w",
            "multi-queue-max-queues=4",
            "online=1",
            "params=",
            "physical-sector-size=512",
            "removable=0",
            "sector-size=512",
            "sectors=256",
            "state=4",
            "type=file",
        ]
    );

    let mut world = World::new(2, limits(4, 4));
    world.settle();
    world.assert_connected();
    let all = keys(&world, "/local/domain/5/device/vbd/51712");
    let mine: Vec<&str> = all
        .iter()
        .map(String::as_str)
        .filter(|key| {
            ["ring", "queue", "event", "multi", "num"]
                .iter()
                .any(|start| key.starts_with(start))
        })
        .collect();
    assert_eq!(
        mine,
        [
            "multi-queue-num-queues=2",
            "num-ring-pages=2",
            "queue-0/event-channel=9",
            "queue-0/ring-ref0=8",
            "queue-0/ring-ref1=9",
            "queue-1/event-channel=9",
            "queue-1/ring-ref0=10",
            "queue-1/ring-ref1=11",
            "ring-page-order=1",
        ]
    );
}

#[test]
fn a_connection_with_fewer_queues_leaves_no_old_keys() {
    let mut world = World::new(3, limits(4, 4));
    world.settle();
    (0..40).for_each(|_| world.write());
    world.kill_backend();
    world.limits = limits(1, 0);
    let old = world.paths.clone();
    world.backend_id = DomId(4);
    world.paths = replace_backend(&mut world.toolstack, &old, &spec(DomId(4))).unwrap();
    world.settle();
    world.backend = Backend::start(&world);
    world.settle();
    world.assert_connected();
    assert!(world.store.paths("/local/domain/3/backend/").is_empty());
    let old_keys = world.store.paths("/local/domain/5/device/vbd/51712/queue-");
    assert!(old_keys.is_empty(), "{old_keys:?}");
    world.finish();
}

#[test]
fn persistent_grants_need_both_sides() {
    let mut world = World::new(
        1,
        BackendLimits {
            persistent: false,
            ..limits(1, 0)
        },
    );
    world.settle();
    world.assert_connected();
    (0..10).for_each(|_| world.write());
    world.finish();
    assert!(!world.frontend.device.properties().unwrap().persistent);
    assert_eq!(
        (world.domain.mappings(), world.domain.grants()),
        (1, 1),
        "the ring's and no other"
    );
}

#[test]
fn closing_is_agreed_upon_and_grants_end_after_the_backend_has_unmapped() {
    let mut world = World::new(2, limits(2, 1));
    world.settle();
    (0..30).for_each(|_| world.write());
    world.finish();
    assert!(world.domain.mappings() > 4);
    take_offline(&mut world.toolstack, &world.paths).unwrap();
    // Step by step, to see that nothing is granted away under the backend.
    for _ in 0..6 {
        world.frontend.step();
        let backend = world.backend.as_mut().unwrap();
        let mapped = world.domain.mappings() > 0;
        assert!(!mapped || world.domain.grants() > 0);
        backend.step();
    }
    assert!(is_closed(&mut world.toolstack, &world.paths).unwrap());
    assert_eq!(
        (
            world.domain.mappings(),
            world.domain.grants(),
            world.domain.pages()
        ),
        (0, 0, 0)
    );
    assert!(world.backend.as_ref().unwrap().removed);
    world.write();
    remove(&mut world.toolstack, &world.paths).unwrap();
    world.settle();
    assert!(world.frontend.removed);
    assert_eq!(world.frontend.device.in_flight(), 1, "for the caller to take out");
    assert!(world.store.paths("/local/domain/5/device/vbd/51712").is_empty());
}

#[test]
fn a_frontend_that_leaves_may_come_again() {
    let mut world = World::new(1, limits(1, 0));
    world.settle();
    for _ in 0..3 {
        (0..10).for_each(|_| world.write());
        world.finish();
        world.frontend.handshake.close(&mut world.frontend.store).unwrap();
        world.settle();
        assert_eq!(world.states(), ("6".into(), "6".into()));
        assert_eq!(
            (
                world.domain.mappings(),
                world.domain.grants(),
                world.domain.pages()
            ),
            (0, 0, 0)
        );
        world.frontend = Frontend::start(&world, 1);
        world.settle();
        world.assert_connected();
    }
}

#[test]
fn a_frontend_driver_that_died_is_cleaned_up_after() {
    let mut world = World::new(1, limits(1, 0));
    for acts in 0..6 {
        for _ in 0..acts {
            world.frontend.step();
            world.backend.as_mut().unwrap().step();
        }
        // The driver is gone without a word; the domain, its references and its pages are still there.
        let fresh = Frontend::start(&world, 1);
        let old = std::mem::replace(&mut world.frontend, fresh);
        world.settle();
        world.assert_connected();
        world.in_flight.clear();
        (0..10).for_each(|_| world.write());
        world.finish();
        drop(old);
        world.frontend.handshake.close(&mut world.frontend.store).unwrap();
        world.settle();
        world.frontend = Frontend::start(&world, 1);
    }
}

#[test]
fn a_backend_of_the_same_domain_takes_the_rings_over_unnoticed() {
    for serve in [0, 1, 5] {
        let mut world = World::new(2, limits(2, 0));
        world.settle();
        for round in 0..5 {
            (0..20).for_each(|_| world.write());
            // Some are answered, of which some are not polled.
            world.backend.as_mut().unwrap().serve(serve);
            if round % 2 == 0 {
                world.poll();
            }
            world.kill_backend();
            world.settle();
            world.write();
            world.backend = Backend::start(&world);
            world.settle();
            world.assert_connected();
        }
        world.finish();
        assert_eq!(world.frontend.setups, 1);
    }
}

#[test]
fn another_domain_takes_over_and_everything_in_flight_is_sent_again() {
    for serve in [0, 3] {
        let mut world = World::new(2, limits(2, 0));
        world.settle();
        for round in 0..4 {
            (0..20).for_each(|_| world.write());
            world.backend.as_mut().unwrap().serve(serve);
            world.kill_backend();
            // The third is of the domain that the second was of.
            world.backend_id = DomId(10 + round / 2);
            let old = world.paths.clone();
            world.paths = replace_backend(&mut world.toolstack, &old, &spec(world.backend_id)).unwrap();
            // Either side may be the first to look.
            if round % 2 == 0 {
                world.settle();
            }
            world.backend = Backend::start(&world);
            world.settle();
            world.assert_connected();
            assert_eq!(world.frontend.handshake.backend_id(), world.backend_id);
        }
        world.finish();
        assert_eq!(world.frontend.setups, 5);
        assert!(
            world
                .frontend
                .device
                .queues()
                .iter()
                .any(|queue| queue.stats().requeued > 0)
        );
    }
}

#[test]
fn a_link_to_another_backend_is_followed_although_the_old_one_is_still_there() {
    let mut world = World::new(1, limits(1, 0));
    world.settle();
    (0..10).for_each(|_| world.write());
    let old = world.paths.clone();
    world.backend_id = DomId(4);
    // To nowhere, so that what is at the old place stays.
    let nowhere = VbdPaths {
        backend: "/local/domain/9/backend/vbd/5/51712".into(),
        ..old
    };
    world.paths = replace_backend(&mut world.toolstack, &nowhere, &spec(DomId(4))).unwrap();
    let mut zombie = world.backend.take().unwrap();
    world.backend = Backend::start(&world);
    world.settle();
    world.assert_connected();
    assert_eq!(world.frontend.handshake.backend_id(), DomId(4));
    world.finish();
    zombie.serve(100);
    zombie.step();
    assert!(
        zombie.queues.is_empty(),
        "its frontend has gone through Initialising"
    );
}

#[test]
fn pvr8_a_frontend_that_starts_over_without_a_word_is_disconnected() {
    let mut world = World::new(1, limits(1, 0));
    world.settle();
    world.write();
    world.finish();
    for state in ["1", "0", "6", "nonsense"] {
        let mut liar = world.store.connect(FRONTEND);
        liar.put(Tx::NONE, &world.paths.frontend, "state", state).unwrap();
        let backend = world.backend.as_mut().unwrap();
        backend.step();
        assert!(backend.queues.is_empty(), "state {state}");
        world.settle();
        world.frontend = Frontend::start(&world, 1);
        world.backend = Backend::start(&world);
        world.settle();
        world.assert_connected();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// T-350: a hostile frontend toggles its state and its keys as it likes. The backend never panics, and has
    /// let go of everything whenever the two agree on Closed.
    #[test]
    fn pvr8_any_states_and_keys_of_a_frontend(
        acts in prop::collection::vec((0..12u8, 0..8usize, 0..6usize), 0..80),
    ) {
        let mut world = World::new(2, limits(2, 2));
        world.settle();
        let mut liar = world.store.connect(FRONTEND);
        let dir = world.paths.frontend.clone();
        for (state, key, value) in acts {
            if state < 9 {
                liar.put(Tx::NONE, &dir, "state", state).unwrap();
            } else {
                let key = [
                    "protocol", "ring-page-order", "multi-queue-num-queues", "queue-0/ring-ref0",
                    "queue-1/ring-ref1", "ring-ref", "event-channel", "feature-persistent",
                ][key];
                let value = ["0", "1", "2", "8", "-1", "x86_32-abi"][value];
                liar.put(Tx::NONE, &dir, key, value).unwrap();
            }
            let backend = world.backend.as_mut().unwrap();
            backend.step();
            for queue in &mut backend.queues {
                let _ = queue.process(&*backend.disk, &mut Event::new(), 10);
            }
            if world.states() == ("6".into(), "6".into()) {
                prop_assert_eq!(world.domain.mappings(), 0);
            }
        }
        for _ in 0..3 {
            liar.put(Tx::NONE, &dir, "state", 6).unwrap();
            world.backend.as_mut().unwrap().step();
        }
        prop_assert_eq!(world.domain.mappings(), 0);
        prop_assert_eq!(world.states().1, "6");
    }
}

#[test]
fn a_ring_that_broke_ends_the_connection_and_the_next_one_works() {
    let mut world = World::new(1, limits(1, 0));
    world.settle();
    (0..10).for_each(|_| world.write());
    let backend = world.backend.as_mut().unwrap();
    backend
        .handshake
        .fail(&mut backend.store, "the ring is broken")
        .unwrap();
    world.settle();
    world.assert_connected();
    assert_eq!(world.frontend.setups, 2);
    assert_eq!(
        world
            .store
            .get("/local/domain/3/error/backend/vbd/5/51712/error")
            .as_deref(),
        Some("the ring is broken")
    );
    world.finish();
    let frontend = &mut world.frontend;
    frontend
        .handshake
        .fail(&mut frontend.store, "the backend lies")
        .unwrap();
    world.settle();
    world.assert_connected();
    assert_eq!(world.frontend.setups, 3);
}

#[test]
fn a_resize_is_seen() {
    let mut world = World::new(1, limits(1, 0));
    world.settle();
    let bigger = DiskInfo::new(4096);
    let backend = world.backend.as_mut().unwrap();
    backend.handshake.resized(&mut backend.store, &bigger).unwrap();
    world.settle();
    assert_eq!(world.frontend.device.properties().unwrap().disk.sectors, 4096);
    assert_eq!(world.frontend.setups, 1);
    world.assert_connected();
}

#[test]
fn conflicts_are_retried_and_bounded() {
    let mut world = World::new(1, limits(1, 0));
    world.store.force_conflicts(10);
    world.settle();
    world.assert_connected();
    world.store.force_conflicts(u32::MAX);
    let error = take_offline(&mut world.toolstack, &world.paths).unwrap_err();
    assert_eq!(error.to_string(), "a transaction met other changes 64 times");
}

#[test]
fn pvr5_a_frontends_keys_are_checked_and_nonsense_ends_the_connection() {
    for (key, value) in [
        ("protocol", "powerpc-abi"),
        ("protocol", ""),
        ("multi-queue-num-queues", "0"),
        ("multi-queue-num-queues", "3"),
        ("multi-queue-num-queues", "4294967297"),
        ("multi-queue-num-queues", "-1"),
        ("multi-queue-num-queues", "2"),
        ("ring-page-order", "3"),
        ("ring-page-order", "64"),
        ("ring-page-order", "2"),
        ("ring-ref0", "4294967296"),
        ("ring-ref1", "x"),
        ("ring-ref0", "-"),
        ("ring-ref0", "-7"),
        ("event-channel", " 9"),
        ("event-channel", "-"),
        ("feature-persistent", "yes"),
        ("ring-ref1", "99999"),
    ] {
        let mut world = World::new(1, limits(2, 2));
        world.frontend.step();
        assert_eq!(world.states(), ("3".into(), "2".into()));
        let path = format!("{}/{key}", world.paths.frontend);
        let mut liar = world.store.connect(FRONTEND);
        if value == "-" {
            liar.remove(Tx::NONE, &path).unwrap();
        } else {
            liar.write(Tx::NONE, &path, value.as_bytes()).unwrap();
        }
        world.settle();
        let error = world.store.get("/local/domain/3/error/backend/vbd/5/51712/error");
        assert!(error.is_some(), "{key} = {value:?} was taken");
        assert_eq!(world.states(), ("6".into(), "6".into()), "{key} = {value:?}");
        assert_eq!((world.domain.mappings(), world.domain.grants()), (0, 0));
        assert_eq!(world.frontend.setups, 1, "no endless coming back");
    }
}

#[test]
fn pvr5_a_backends_keys_are_checked_and_nonsense_ends_the_connection() {
    for (key, value) in [
        ("sectors", "-"),
        ("sectors", "many"),
        ("sectors", "18446744073709551616"),
        ("sector-size", "0"),
        ("sector-size", "513"),
        ("sector-size", "8192"),
        ("sector-size", "-"),
        ("info", "-"),
        ("info", "4294967296"),
        ("feature-discard", "\u{fffd}"),
    ] {
        let mut world = World::new(1, limits(2, 2));
        world.frontend.step();
        world.backend.as_mut().unwrap().step();
        assert_eq!(world.states(), ("3".into(), "4".into()));
        let path = format!("{}/{key}", world.paths.backend);
        let mut liar = world.store.connect(world.backend_id);
        if value == "-" {
            liar.remove(Tx::NONE, &path).unwrap();
        } else {
            liar.write(Tx::NONE, &path, value.as_bytes()).unwrap();
        }
        world.settle();
        assert!(
            world
                .store
                .get("/local/domain/5/error/device/vbd/51712/error")
                .is_some(),
            "{key} {value:?}"
        );
        assert_eq!(world.states(), ("6".into(), "6".into()), "{key} = {value:?}");
        assert_eq!((world.domain.mappings(), world.domain.grants()), (0, 0));
    }
}

#[test]
fn each_side_writes_its_own_directory_only() {
    let mut world = World::new(1, limits(1, 0));
    let paths = world.paths.clone();
    let (mut front, mut back) = (
        world.store.connect(FRONTEND),
        world.store.connect(world.backend_id),
    );
    assert!(front.put(Tx::NONE, &paths.backend, "sectors", 1).is_err());
    assert!(back.put(Tx::NONE, &paths.frontend, "state", 4).is_err());
    let mut stranger = world.store.connect(DomId(77));
    assert_eq!(
        stranger
            .read(Tx::NONE, &format!("{}/state", paths.frontend))
            .unwrap(),
        None
    );
    world.settle();
    world.assert_connected();
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Front,
    Back,
    Write,
    Serve,
    Poll,
    RestartBackend,
    ReplaceBackend,
    ReplaceInPlace,
    Leave,
    FailFrontend,
    FailBackend,
    Resize,
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// T-350, T-465: whatever happens in whatever order, the two sides find each other again, nothing that was
    /// accepted is lost, nothing that was acknowledged is undone, and at the end nothing is left.
    #[test]
    fn any_order_of_events_converges(
        acts in prop::collection::vec(
            prop_oneof![
                6 => Just(Act::Front), 6 => Just(Act::Back), 8 => Just(Act::Write), 4 => Just(Act::Serve),
                4 => Just(Act::Poll), 1 => Just(Act::RestartBackend), 1 => Just(Act::ReplaceBackend),
                1 => Just(Act::ReplaceInPlace),
                1 => Just(Act::Leave), 1 => Just(Act::FailFrontend), 1 => Just(Act::FailBackend),
                1 => Just(Act::Resize),
            ],
            0..120,
        ),
        queues in 1..4usize,
    ) {
        let mut world = World::new(queues, limits(3, 1));
        let mut left = false;
        for act in acts {
            match act {
                Act::Front => world.frontend.step(),
                Act::Back => if let Some(backend) = &mut world.backend { backend.step() },
                Act::Write => world.write(),
                Act::Serve => if let Some(backend) = &mut world.backend { backend.serve(3) },
                Act::Poll => world.poll(),
                Act::RestartBackend => {
                    world.kill_backend();
                    world.backend = Backend::start(&world);
                }
                Act::ReplaceBackend | Act::ReplaceInPlace => {
                    world.kill_backend();
                    if matches!(act, Act::ReplaceBackend) {
                        world.backend_id = DomId(world.backend_id.0 + 1);
                    }
                    let old = world.paths.clone();
                    world.paths = replace_backend(&mut world.toolstack, &old, &spec(world.backend_id)).unwrap();
                    world.backend = Backend::start(&world);
                }
                Act::Leave => {
                    world.frontend.handshake.close(&mut world.frontend.store).unwrap();
                    left = true;
                }
                Act::FailFrontend => {
                    let frontend = &mut world.frontend;
                    frontend.handshake.fail(&mut frontend.store, "test").unwrap();
                }
                Act::FailBackend => if let Some(backend) = &mut world.backend {
                    backend.handshake.fail(&mut backend.store, "test").unwrap();
                },
                Act::Resize => if let Some(backend) = &mut world.backend {
                    let _ = backend.handshake.resized(&mut backend.store, &DiskInfo::new(SECTORS as u64));
                },
            }
        }
        // A connection that failed before it was used stays down until somebody puts another backend there.
        world.settle();
        if left {
            prop_assert_eq!(world.states().0, "6");
            world.frontend.device.close();
        } else {
            world.kill_backend();
            world.backend_id = DomId(world.backend_id.0 + 1);
            let old = world.paths.clone();
            world.paths = replace_backend(&mut world.toolstack, &old, &spec(world.backend_id)).unwrap();
            world.backend = Backend::start(&world);
            world.settle();
            world.assert_connected();
            world.finish();
            take_offline(&mut world.toolstack, &world.paths).unwrap();
            world.settle();
            prop_assert!(is_closed(&mut world.toolstack, &world.paths).unwrap());
        }
        if let Some(backend) = &world.backend {
            prop_assert!(backend.queues.is_empty());
        }
        let counts = (world.domain.mappings(), world.domain.grants(), world.domain.pages());
        prop_assert_eq!(counts, (0, 0, 0));
    }
}
