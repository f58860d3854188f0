//! Catalogue 11.6 and 13: connecting, leaving and coming back in any order, and what the other side writes into the store.

use gnttab_abi::{Abi, DomId, GrantRef};
use gnttab_io::blkif::handshake::{
    BackendEvent, BackendHandshake, BackendLimits, FrontendEvent, FrontendHandshake, QueueOffer, VbdPaths,
    VbdSpec, VirtualDevice, create,
};
use gnttab_io::blkif::{DeviceProperties, DiskInfo, FrontendConfig, FrontendQueue, RawResponse};
use gnttab_io::fake::{Event, FakeDomain, HostileBackend, MemoryStore, StoreConnection};
use gnttab_io::xenbus::{EventPort, Store as _, StoreExt as _, Tx};

use crate::rig::{Auditor, PROPERTIES, Used, read, write};

/// What may happen to a frontend, in any order.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// It is connected, or was and is set up anew.
    Connect,
    /// It is suspended: the connection ends, what is under way waits.
    Suspend,
    /// The backend answers what it was asked.
    Answer,
    /// The backend lies, and keeps a page.
    Break,
    /// Somebody uses the device, also when it is not connected.
    Use,
    /// It is removed, and plugged in again.
    Remove,
}

const ACTS: [Act; 6] = [
    Act::Connect,
    Act::Suspend,
    Act::Answer,
    Act::Break,
    Act::Use,
    Act::Remove,
];

/// T-465: all sequences of six. No panic, every page with one owner (the [`Auditor`] sees to it), nothing left.
#[test]
fn xsa_465_every_order_of_six() {
    for sequence in 0..ACTS.len().pow(6) {
        let domain = FakeDomain::new();
        // Pages for less than what it is asked, so that something always waits to be sent.
        let config = FrontendConfig {
            max_pages: 3,
            ..FrontendConfig::new(Abi::X86_64)
        };
        let new = || FrontendQueue::new(Auditor::new(domain.granter()), config);
        let mut queue = new();
        let mut backend: Option<HostileBackend> = None;
        let mut rest = sequence;
        for step in 0..6 {
            let act = ACTS[rest % ACTS.len()];
            rest /= ACTS.len();
            match act {
                Act::Connect => {
                    if let Ok(ring) = queue.open(1, Event::new()) {
                        // The backend before keeps what it has until there is another.
                        let fresh = HostileBackend::new(&domain, Abi::X86_64, &ring);
                        backend = Some(fresh.expect("the ring was just granted"));
                    }
                    queue.start(PROPERTIES);
                }
                Act::Suspend => queue.close(),
                Act::Answer | Act::Break => {
                    let Some(backend) = &mut backend else { continue };
                    let slot = backend.request(0);
                    let mut response = RawResponse {
                        id: slot.id(),
                        operation: slot.operation(),
                        status: 0,
                    };
                    if let Act::Break = act {
                        backend.hold(slot.segment(0).gref);
                        response.id ^= 5;
                    }
                    if backend.req_prod() > 0 {
                        backend.respond(response);
                    }
                }
                Act::Use => {
                    let _ = queue.submit(step, write(step, 12, 1));
                    let _ = queue.submit(step, read(step, 12));
                    queue.kick();
                }
                Act::Remove => {
                    queue.take_unfinished();
                    queue = new();
                }
            }
            while let Ok(Some(_)) = queue.poll() {}
        }
        drop(queue);
        drop(backend);
        assert_eq!(
            (domain.pages(), domain.grants(), domain.mappings()),
            (0, 0, 0),
            "sequence {sequence}"
        );
    }
}

/// A device that broke is left alone until it is closed: nothing is shown to its backend any more, and nobody is woken.
#[test]
fn xsa_391_a_broken_device_says_nothing_more() {
    let domain = FakeDomain::new();
    let event = Event::new();
    let mut queue = FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
    let ring = queue.open(1, event.clone()).unwrap();
    let backend = HostileBackend::new(&domain, Abi::X86_64, &ring).unwrap();
    queue.start(PROPERTIES);
    queue.submit(1, read(0, 8)).unwrap();
    queue.kick();
    // On the ring and not yet shown when the device breaks.
    queue.submit(2, read(8, 8)).unwrap();
    let mut backend = backend;
    backend.respond(RawResponse {
        id: 0xBAD,
        operation: 0,
        status: 0,
    });
    assert!(queue.poll().is_err());
    // The backend asks to be told of everything.
    backend.memory().store_u32(4, backend.req_prod() + 1);
    let (shown, told) = (backend.req_prod(), event.sent());
    for _ in 0..3 {
        queue.submit(3, read(16, 8)).unwrap();
        queue.kick();
        assert!(queue.poll().is_err());
    }
    assert_eq!((backend.req_prod(), event.sent()), (shown, told));
}

/// Taking down what is down already is nothing, on either side.
#[test]
fn xsa_484_what_is_taken_down_twice_is_taken_down_once() {
    let domain = FakeDomain::new();
    let mut used = Used::with(domain.clone(), Auditor::new(domain.granter()), PROPERTIES);
    used.submit(1, write(0, 20, 1));
    let held = used.liar.request(0).segment(0).gref;
    assert!(used.liar.hold(held));
    for _ in 0..3 {
        used.queue.close();
        assert_eq!(used.queue.in_flight(), 1);
    }
    assert_eq!(used.queue.take_unfinished().len(), 1);
    assert_eq!(used.queue.take_unfinished(), []);
    assert!(domain.references().contains(&held), "the peer has it");
    drop(used);
    assert_eq!((domain.pages(), domain.grants()), (0, 0));
}

/// Both sides of a device, as far as the store goes.
struct Pair {
    store: MemoryStore,
    dom3: StoreConnection,
    dom5: StoreConnection,
    paths: VbdPaths,
    back: BackendHandshake,
    front: FrontendHandshake,
}

impl Pair {
    fn new() -> Pair {
        let store = MemoryStore::new();
        let (mut dom0, mut dom3, mut dom5) = (
            store.connect(DomId(0)),
            store.connect(DomId(3)),
            store.connect(DomId(5)),
        );
        let spec = VbdSpec::new(DomId(5), DomId(3), VirtualDevice::xvd(0, 0));
        let paths = create(&mut dom0, &spec).unwrap();
        let back = BackendHandshake::probe(&mut dom3, &paths.backend, BackendLimits::default()).unwrap();
        let front = FrontendHandshake::probe(&mut dom5, &paths.frontend, true).unwrap();
        Pair {
            store,
            dom3,
            dom5,
            paths,
            back,
            front,
        }
    }

    /// Until the backend has said what the disk is.
    fn offered(disk: DiskInfo) -> Pair {
        let mut pair = Pair::new();
        assert!(matches!(
            pair.front.advance(&mut pair.dom5),
            Ok(FrontendEvent::Setup(_))
        ));
        let queue = QueueOffer {
            ring: vec![GrantRef(8)],
            event_channel: EventPort(1),
        };
        pair.front.publish(&mut pair.dom5, Abi::X86_64, &[queue]).unwrap();
        assert!(matches!(
            pair.back.advance(&mut pair.dom3),
            Ok(BackendEvent::Connect(_))
        ));
        pair.back.connected(&mut pair.dom3, &disk).unwrap();
        pair
    }
}

/// A number that a backend writes is one that can be reckoned with: a disk whose bytes no number holds, or block sizes that
/// are none, end the connection and not the frontend (also XSA-175, XSA-178).
#[test]
fn xsa_57_sizes_that_no_disk_has_are_refused() {
    for (key, value, accepted) in [
        ("sectors", "18014398509481983", true),
        ("sectors", "18014398509481984", false),
        ("sectors", "18446744073709551615", false),
        ("physical-sector-size", "4096", true),
        ("physical-sector-size", "16777216", true),
        ("physical-sector-size", "0", false),
        ("physical-sector-size", "5000", false),
        ("physical-sector-size", "33554432", false),
        ("physical-sector-size", "4294967295", false),
        ("physical-sector-size", "2147483648", false),
    ] {
        let mut pair = Pair::offered(DiskInfo::new(1024));
        pair.dom3.put(Tx::NONE, &pair.paths.backend, key, value).unwrap();
        let event = pair.front.advance(&mut pair.dom5).unwrap();
        match event {
            FrontendEvent::Connect(properties) => {
                assert!(accepted, "{key} {value}");
                let disk = properties.disk;
                assert!(
                    disk.sectors
                        .checked_mul(512)
                        .is_some_and(|bytes| i64::try_from(bytes).is_ok())
                );
                assert!(disk.physical_sector_size.is_power_of_two());
                assert!(disk.physical_sector_size >= disk.sector_size);
            }
            FrontendEvent::Disconnect => {
                assert!(!accepted, "{key} {value}");
                let said = pair.store.get("/local/domain/5/error/device/vbd/51712/error");
                assert!(said.is_some_and(|said| said.contains(key)), "{key} {value}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A unit of discards that is nothing, by which somebody may want to divide, is as if it were not there.
#[test]
fn xsa_57_a_unit_of_nothing_is_not_taken() {
    let mut pair = Pair::offered(DiskInfo::new(1024));
    for (key, value) in [("feature-discard", 1), ("discard-granularity", 0)] {
        pair.dom3.put(Tx::NONE, &pair.paths.backend, key, value).unwrap();
    }
    let event = pair.front.advance(&mut pair.dom5).unwrap();
    let FrontendEvent::Connect(DeviceProperties { disk, .. }) = event else {
        panic!("{event:?}")
    };
    assert_eq!(disk.discard.map(|discard| discard.granularity), Some(512));
}

/// What was agreed on when the connection was made holds as long as it lasts, whatever the keys say later.
#[test]
fn l_18_persistence_is_agreed_on_once_a_connection() {
    for agreed in [true, false] {
        let properties = DeviceProperties {
            persistent: agreed,
            ..PROPERTIES
        };
        let mut used = Used::new(properties);
        let other = DeviceProperties {
            persistent: !agreed,
            max_indirect: 0,
            disk: DiskInfo::new(77),
            ..PROPERTIES
        };
        used.queue.start(other);
        let now = used.queue.properties().unwrap();
        assert_eq!(
            (now.persistent, now.max_indirect, now.disk.sectors),
            (agreed, 64, 77)
        );
        // The backend keeps the page, as it may if that was agreed on.
        used.submit(1, read(0, 1));
        let gref = used.liar.request(0).segment(0).gref;
        assert!(used.liar.hold(gref));
        used.answer(0, 0);
        assert_eq!(used.poll_all().1.is_none(), agreed);
    }
    // On the backend's side: read with the offer, and not again while connected.
    let mut pair = Pair::offered(DiskInfo::new(8));
    let before = pair.store.writes();
    pair.dom5
        .put(Tx::NONE, &pair.paths.frontend, "feature-persistent", 0)
        .unwrap();
    assert_eq!(pair.back.advance(&mut pair.dom3).unwrap(), BackendEvent::Idle);
    assert_eq!(pair.store.writes(), before + 1);
    pair.dom5.remove(Tx::NONE, &pair.paths.frontend).unwrap();
    assert_eq!(
        pair.back.advance(&mut pair.dom3).unwrap(),
        BackendEvent::Disconnect
    );
}
