//! Catalogue 11.2: counts, lengths and chains that a peer writes, and what happens on the way out of a bad request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use gnttab_abi::{Abi, DomId, GrantRef, GrantStatus};
use gnttab_io::blkif::handshake::{
    BackendEvent, BackendHandshake, BackendLimits, FrontendHandshake, QueueOffer, VbdSpec, VirtualDevice,
    create,
};
use gnttab_io::blkif::{BackendConfig, BackendQueue, Disk, DiskError, DiskInfo, RawSegment, Slot};
use gnttab_io::fake::{
    Call, FakeDomain, FakeGrantee, FakeMapping, HostileFrontend, MemoryStore, NullPort, RamDisk,
};
use gnttab_io::grants::{Access, CopyDirection, CopyPart, Grantee, Granter as _, Notify};
use gnttab_io::shared::{SharedPages, SharedSlice, SharedSliceMut};
use gnttab_io::xenbus::{EventPort, StoreExt as _, Tx, XenbusError};

use crate::rig::{SECTORS, Served, content, direct, indirect, part, ways};

/// Offset plus length, at every edge: accepted if and only if the range lies on the disk, and never by a sum that wrapped.
#[test]
fn xsa_270_a_range_is_accepted_iff_it_lies_on_the_disk() {
    let abi = Abi::X86_64;
    let edges = [
        0,
        1,
        SECTORS - 1,
        SECTORS,
        SECTORS + 1,
        u64::from(u32::MAX),
        u64::MAX - SECTORS,
        u64::MAX - 1,
        u64::MAX,
    ];
    let info = DiskInfo {
        discard: Some(gnttab_io::blkif::DiscardInfo {
            granularity: 512,
            alignment: 0,
            secure: false,
        }),
        ..DiskInfo::new(SECTORS)
    };
    let mut served = Served::new(BackendConfig::new(abi, false));
    served.disk.set_info(|now| *now = info);
    served.queue.set_disk(info);
    let (gref, _page) = served.page();
    for sector in edges {
        for count in edges {
            let lies_on_it = sector <= SECTORS && count <= SECTORS - sector;
            assert_eq!(
                info.check(sector, count).is_ok(),
                lies_on_it,
                "{count} from {sector}"
            );
            let mut slot = direct(abi, 5, sector, &[]);
            slot.set_nr_sectors(count);
            assert_eq!(served.ask(&slot).status == 0, lies_on_it, "{count} from {sector}");
        }
        let fits = sector <= SECTORS - 8;
        assert_eq!(
            served.ask(&direct(abi, 1, sector, &[part(gref, 0, 7)])).status == 0,
            fits
        );
    }
    for call in served.disk.calls() {
        let (sector, count) = match call {
            Call::Discard(sector, count, _) => (sector, count),
            Call::Write(sector, bytes) => (sector, bytes as u64 / 512),
            other => panic!("{other:?}"),
        };
        assert!(sector + count <= SECTORS);
    }
}

/// Each way to reach pages has room for as many segments as the backend accepts, direct and indirect, and refuses one more
/// before it touches the disk.
#[test]
fn xsa_513_every_path_has_room_for_what_it_accepts_and_no_more() {
    for max_indirect in [0, 1, 10, 11, 12, 512, 513, 700] {
        for way in ways(Abi::X86_64) {
            let config = BackendConfig { max_indirect, ..way };
            let mut served = Served::new(config);
            let pages: Vec<_> = (0..700).map(|_| served.page()).collect();
            for (i, (_, page)) in pages.iter().enumerate() {
                page.write(0, &[u8::try_from(i % 251).unwrap(); 4096]);
            }
            let parts: Vec<RawSegment> = pages
                .iter()
                .enumerate()
                .map(|(i, (gref, _))| {
                    let first = u8::try_from(i % 8).unwrap();
                    part(*gref, first, first.max(6))
                })
                .collect();
            let eleven = direct(config.abi, 1, 0, &parts[..11]);
            assert_eq!(served.ask(&eleven).status, 0, "{config:?}");
            assert_on_disk(&served, &parts[..11]);
            assert_eq!(served.ask(&direct(config.abi, 1, 0, &parts[..12])).status, -1);
            let most = usize::from(max_indirect);
            if most > 0 {
                let full = indirect(&served, 1, 0, &parts[..most]);
                assert_eq!(served.ask(&full).status, 0, "{config:?}");
                assert_on_disk(&served, &parts[..most]);
                // And back, into those sectors alone.
                pages.iter().for_each(|(_, page)| page.write(0, &[0xEE; 4096]));
                let back = indirect(&served, 0, 0, &parts[..most]);
                assert_eq!(served.ask(&back).status, 0);
                for (i, (part, (_, page))) in parts[..most].iter().zip(&pages).enumerate() {
                    let inside = usize::from(part.first_sect) * 512..(usize::from(part.last_sect) + 1) * 512;
                    for (at, byte) in content(page).into_iter().enumerate() {
                        let expected = if inside.contains(&at) {
                            u8::try_from(i % 251).unwrap()
                        } else {
                            0xEE
                        };
                        assert_eq!(byte, expected, "byte {at} of page {i}");
                    }
                }
            }
            served.disk.calls();
            if let Some(one_more) = parts.get(..=most) {
                let slot = indirect(&served, 1, 0, one_more);
                assert_eq!(served.ask(&slot).status, -1);
            }
            assert_eq!(served.disk.calls(), []);
        }
    }
}

/// The disk holds these parts of pages, one after the other.
fn assert_on_disk(served: &Served, parts: &[RawSegment]) {
    let disk = served.disk.content();
    let mut at = 0;
    for (i, part) in parts.iter().enumerate() {
        let len = usize::from(part.last_sect - part.first_sect + 1) * 512;
        assert!(
            disk[at..at + len]
                .iter()
                .all(|byte| usize::from(*byte) == i % 251),
            "segment {i}"
        );
        at += len;
    }
}

/// Notes the pieces of memory that it is given.
#[derive(Default)]
struct Pieces(Mutex<Vec<(usize, usize)>>);

impl Disk for Pieces {
    fn info(&self) -> DiskInfo {
        DiskInfo::new(SECTORS)
    }

    fn read(&self, _: u64, into: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        let pieces = into.iter().map(|piece| (piece.as_ptr().addr(), piece.len()));
        self.0.lock().unwrap().extend(pieces);
        Ok(())
    }

    fn write(&self, _: u64, from: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        let pieces = from.iter().map(|piece| (piece.as_ptr().addr(), piece.len()));
        self.0.lock().unwrap().extend(pieces);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64, _: bool) -> Result<(), DiskError> {
        Ok(())
    }
}

/// Pages of two grants may be neighbours where they are mapped and far apart for a device: a segment stays one piece, in one
/// page.
#[test]
fn xsa_229_neighbours_are_not_made_one() {
    let domain = FakeDomain::new();
    let liar = HostileFrontend::new(&domain, Abi::X86_64, 1).unwrap();
    let mut granter = domain.granter();
    let run = granter.alloc(4).unwrap();
    let grefs: Vec<GrantRef> = (0..4)
        .map(|page| granter.grant(&run, page, Access::ReadWrite).unwrap())
        .collect();
    for way in ways(Abi::X86_64) {
        let mut liar = HostileFrontend::new(&domain, Abi::X86_64, 1).unwrap();
        let disk = Pieces::default();
        let mut queue = BackendQueue::connect(domain.grantee(), liar.ring(), way, disk.info()).unwrap();
        let parts: Vec<RawSegment> = grefs.iter().map(|gref| part(*gref, 0, 7)).collect();
        for operation in [0, 1] {
            liar.send(&direct(Abi::X86_64, operation, 0, &parts));
            assert_eq!(queue.process(&disk, &mut NullPort, 1).unwrap().served, 1);
            let pieces = std::mem::take(&mut *disk.0.lock().unwrap());
            assert_eq!(pieces.len(), 4);
            for (address, len) in pieces {
                assert_eq!((address % 4096, len), (0, 4096));
            }
        }
    }
    drop(liar);
}

/// A grantee, a disk and a port in one, none of which may be called while it says so: as code that must not sleep.
struct Strict {
    inner: FakeGrantee,
    atomic: Arc<AtomicBool>,
}

fn may_sleep(atomic: &AtomicBool) {
    assert!(
        !atomic.load(Ordering::SeqCst),
        "something that may sleep was called"
    );
}

impl Grantee for Strict {
    type Mapping = FakeMapping;
    type Buffer = SharedPages;

    fn map(
        &mut self,
        grefs: &[GrantRef],
        access: Access,
        results: &mut Vec<Result<FakeMapping, GrantStatus>>,
    ) {
        may_sleep(&self.atomic);
        self.inner.map(grefs, access, results);
    }

    fn map_run(&mut self, grefs: &[GrantRef]) -> Result<FakeMapping, GrantStatus> {
        may_sleep(&self.atomic);
        self.inner.map_run(grefs)
    }

    fn unmap(&mut self, mappings: &mut Vec<FakeMapping>) {
        may_sleep(&self.atomic);
        self.inner.unmap(mappings);
    }

    fn buffer(&mut self, pages: usize) -> Result<SharedPages, GrantStatus> {
        may_sleep(&self.atomic);
        self.inner.buffer(pages)
    }

    fn copy(
        &mut self,
        direction: CopyDirection,
        parts: &[CopyPart],
        buffer: &SharedPages,
    ) -> Result<(), GrantStatus> {
        may_sleep(&self.atomic);
        self.inner.copy(direction, parts, buffer)
    }
}

struct StrictPort(Arc<AtomicBool>);

impl Notify for StrictPort {
    fn notify(&mut self) {
        may_sleep(&self.0);
    }
}

/// A ring that makes no sense is told and nothing more: no unmapping, no notification, no disk, so that the caller can be
/// anywhere. What is to be taken down is taken down when the queue is dropped, by whom and when its owner likes.
#[test]
fn xsa_90_a_fatal_error_can_be_met_where_nobody_may_sleep() {
    let domain = FakeDomain::new();
    let disk = RamDisk::new(64);
    let atomic = Arc::new(AtomicBool::new(false));
    let mut liar = HostileFrontend::new(&domain, Abi::X86_64, 1).unwrap();
    let (gref, _page) = liar.data_page(Access::ReadWrite).unwrap();
    let strict = Strict {
        inner: domain.grantee(),
        atomic: Arc::clone(&atomic),
    };
    let config = BackendConfig::new(Abi::X86_64, true);
    let mut queue = BackendQueue::connect(strict, liar.ring(), config, disk.info()).unwrap();
    let mut port = StrictPort(Arc::clone(&atomic));
    liar.send(&direct(Abi::X86_64, 0, 0, &[part(gref, 0, 7)]));
    assert_eq!(queue.process(&disk, &mut port, 8).unwrap().served, 1);

    liar.set_req_prod(1 << 31);
    atomic.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        assert!(queue.process(&disk, &mut port, 8).is_err());
    }
    atomic.store(false, Ordering::SeqCst);
    assert_eq!(domain.mappings(), 2);
    // T-374: broken, then disconnected, then nothing more: once.
    queue.disconnect();
    assert_eq!(domain.mappings(), 0);
}

/// A backend's driver that calls out of turn, in every state and twice: refused, and nothing is written.
#[test]
fn xsa_157_every_call_in_every_state() {
    let disk = DiskInfo::new(8);
    for steps in 0..5 {
        let store = MemoryStore::new();
        let (mut dom0, mut dom3, mut dom5) = (
            store.connect(DomId(0)),
            store.connect(DomId(3)),
            store.connect(DomId(5)),
        );
        let spec = VbdSpec::new(DomId(5), DomId(3), VirtualDevice::xvd(0, 0));
        let paths = create(&mut dom0, &spec).unwrap();
        let mut back = BackendHandshake::probe(&mut dom3, &paths.backend, BackendLimits::default()).unwrap();
        let mut front = FrontendHandshake::probe(&mut dom5, &paths.frontend, true).unwrap();
        // Waiting, connecting, connected, stopping, closed.
        if steps > 0 {
            front.advance(&mut dom5).unwrap();
            let queue = QueueOffer {
                ring: vec![GrantRef(8)],
                event_channel: EventPort(1),
            };
            front.publish(&mut dom5, Abi::X86_64, &[queue]).unwrap();
            assert!(matches!(back.advance(&mut dom3), Ok(BackendEvent::Connect(_))));
        }
        if steps > 1 {
            back.connected(&mut dom3, &disk).unwrap();
        }
        if steps > 2 {
            dom5.put(Tx::NONE, &paths.frontend, "state", 6).unwrap();
            assert_eq!(back.advance(&mut dom3).unwrap(), BackendEvent::Disconnect);
        }
        if steps > 3 {
            back.closed(&mut dom3).unwrap();
        }
        let before = store.writes();
        for _ in 0..3 {
            if steps != 1 {
                assert_eq!(back.connected(&mut dom3, &disk), Err(XenbusError::OutOfTurn));
            }
            if steps != 2 {
                assert_eq!(back.resized(&mut dom3, &disk), Err(XenbusError::OutOfTurn));
            }
            if steps != 3 {
                assert_eq!(back.closed(&mut dom3), Err(XenbusError::OutOfTurn));
            }
        }
        assert_eq!(store.writes(), before, "after {steps} steps");
    }
}

/// Segments without a sector do not exist, wherever they stand, and a request of nothing but those is none.
#[test]
fn xsa_448_empty_parts_are_refused_wherever_they_stand() {
    for way in ways(Abi::X86_32) {
        let mut served = Served::new(way);
        let (gref, _page) = served.page();
        let (whole, empty) = (part(gref, 0, 7), part(gref, 4, 3));
        for set in 1..32u8 {
            let parts: Vec<RawSegment> = (0..5)
                .map(|place| if set & (1 << place) == 0 { whole } else { empty })
                .collect();
            for operation in [0, 1, 2, 3] {
                assert_eq!(served.ask(&direct(Abi::X86_32, operation, 0, &parts)).status, -1);
            }
            for inner in [0, 1] {
                let slot = indirect(&served, inner, 0, &parts);
                assert_eq!(served.ask(&slot).status, -1);
            }
        }
        let none: [Slot; 2] = [indirect(&served, 0, 0, &[]), direct(Abi::X86_32, 0, 0, &[])];
        for slot in none {
            assert_eq!(served.ask(&slot).status, -1);
        }
        assert_eq!(served.disk.calls(), [], "the disk was never asked");
    }
}
