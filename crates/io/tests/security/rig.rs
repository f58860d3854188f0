//! Both victims: a backend served by a frontend that lies, a frontend served by a backend that lies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use gnttab_abi::{Abi, GrantRef, PAGE_SIZE};
use gnttab_io::blkif::{
    BackendConfig, BackendQueue, Completion, DeviceBroken, DeviceProperties, Disk as _, DiskInfo,
    FrontendConfig, FrontendQueue, Io, OneShot, RawResponse, RawSegment, Slot,
};
use gnttab_io::fake::{
    Event, FakeDomain, FakeGrantee, FakeGranter, FakePages, HostileBackend, HostileFrontend, NullPort,
    RamDisk,
};
use gnttab_io::grants::{Access, GrantError, Granter};
use gnttab_io::shared::SharedPages;

/// Sectors of the backend's disk.
pub(crate) const SECTORS: u64 = 6000;

/// A backend whose frontend lies.
pub(crate) struct Served {
    pub(crate) domain: FakeDomain,
    pub(crate) disk: RamDisk,
    pub(crate) liar: HostileFrontend,
    pub(crate) queue: BackendQueue<FakeGrantee>,
    sent: u32,
}

impl Served {
    pub(crate) fn new(config: BackendConfig) -> Served {
        let domain = FakeDomain::new();
        let disk = RamDisk::new(usize::try_from(SECTORS).unwrap());
        let liar = HostileFrontend::new(&domain, config.abi, 1).unwrap();
        let queue = BackendQueue::connect(domain.grantee(), liar.ring(), config, disk.info()).unwrap();
        Served {
            domain,
            disk,
            liar,
            queue,
            sent: 0,
        }
    }

    pub(crate) fn page(&self) -> (GrantRef, SharedPages) {
        self.liar.data_page(Access::ReadWrite).unwrap()
    }

    /// Sends one request; its answer, which is one.
    pub(crate) fn ask(&mut self, slot: &Slot) -> RawResponse {
        self.liar.send(slot);
        let progress = self.queue.process(&self.disk, &mut NullPort, 8).unwrap();
        assert_eq!(progress.served, 1);
        self.sent += 1;
        assert_eq!(self.liar.rsp_prod(), self.sent);
        let response = self.liar.response(self.sent - 1);
        assert_eq!(response.id, slot.id());
        response
    }
}

/// Every way in which a backend reaches pages.
pub(crate) fn ways(abi: Abi) -> [BackendConfig; 4] {
    [
        (true, OneShot::Map),
        (false, OneShot::Map),
        (false, OneShot::Copy),
        (true, OneShot::Copy),
    ]
    .map(|(persistent, one_shot)| BackendConfig {
        one_shot,
        ..BackendConfig::new(abi, persistent)
    })
}

/// Sectors `first_sect..=last_sect` of a page.
pub(crate) fn part(gref: GrantRef, first_sect: u8, last_sect: u8) -> RawSegment {
    RawSegment {
        gref,
        first_sect,
        last_sect,
    }
}

/// A direct request of any number of segments, of which eleven fit.
pub(crate) fn direct(abi: Abi, operation: u8, sector: u64, segments: &[RawSegment]) -> Slot {
    let mut slot = Slot::new(abi);
    slot.set_operation(operation);
    slot.set_second(u8::try_from(segments.len()).unwrap());
    slot.set_id(0xFEDC_BA98_7654_3210);
    slot.set_sector_number(sector);
    for (i, segment) in segments.iter().take(11).enumerate() {
        slot.set_segment(i, *segment);
    }
    slot
}

/// An indirect request of these segments, in pages of their own, of which eight fit.
pub(crate) fn indirect(served: &Served, inner: u8, sector: u64, segments: &[RawSegment]) -> Slot {
    let mut slot = Slot::new(served.liar.abi());
    slot.set_operation(6);
    slot.set_second(inner);
    slot.set_half(u16::try_from(segments.len()).unwrap());
    slot.set_id(0x0123_4567_89AB_CDEF);
    slot.set_sector_number(sector);
    for (i, some) in segments.chunks(512).take(8).enumerate() {
        let (gref, page) = served.page();
        for (place, segment) in some.iter().enumerate() {
            page.write(place * 8, &segment.to_bytes());
        }
        slot.set_indirect_page(i, gref);
    }
    slot
}

/// Bytes of a page.
pub(crate) fn content(page: &SharedPages) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    page.read(0, &mut bytes);
    bytes
}

/// What a backend says that does nothing special.
pub(crate) const PROPERTIES: DeviceProperties = DeviceProperties {
    disk: DiskInfo::new(SECTORS),
    barrier: false,
    persistent: false,
    max_indirect: 64,
};

/// A frontend whose backend lies.
pub(crate) struct Used<G: Granter = FakeGranter> {
    pub(crate) domain: FakeDomain,
    pub(crate) queue: FrontendQueue<G, Event>,
    pub(crate) liar: HostileBackend,
}

impl Used {
    pub(crate) fn new(properties: DeviceProperties) -> Used {
        let domain = FakeDomain::new();
        Used::with(domain.clone(), domain.granter(), properties)
    }
}

impl<G: Granter> Used<G> {
    pub(crate) fn with(domain: FakeDomain, granter: G, properties: DeviceProperties) -> Used<G> {
        let mut queue = FrontendQueue::new(granter, FrontendConfig::new(Abi::X86_64));
        let ring = queue.open(1, Event::new()).unwrap();
        let liar = HostileBackend::new(&domain, Abi::X86_64, &ring).unwrap();
        queue.start(properties);
        Used { domain, queue, liar }
    }

    pub(crate) fn submit(&mut self, token: u64, io: Io) {
        self.queue.submit(token, io).unwrap();
        self.queue.kick();
    }

    /// Everything that a poll gives until it waits or breaks.
    pub(crate) fn poll_all(&mut self) -> (Vec<Completion>, Option<DeviceBroken>) {
        let mut done = Vec::new();
        loop {
            match self.queue.poll() {
                Ok(Some(completion)) => done.push(completion),
                Ok(None) => return (done, None),
                Err(broken) => return (done, Some(broken)),
            }
        }
    }

    /// Answers a request as its sender expects it.
    pub(crate) fn answer(&mut self, index: u32, status: i16) {
        let slot = self.liar.request(index);
        let operation = if slot.operation() == 6 {
            slot.second()
        } else {
            slot.operation()
        };
        self.liar.respond(RawResponse {
            id: slot.id(),
            operation,
            status,
        });
    }
}

pub(crate) fn read(sector: u64, sectors: usize) -> Io {
    Io::Read {
        sector,
        data: vec![0; sectors * 512].into(),
    }
}

pub(crate) fn write(sector: u64, sectors: usize, fill: u8) -> Io {
    Io::Write {
        sector,
        data: vec![fill; sectors * 512].into(),
    }
}

/// What an [`Auditor`] saw of a page at the moment when it was granted.
pub(crate) type AtGrant = (GrantRef, [u8; PAGE_SIZE]);

/// A granter that holds its driver to its word: a page is granted once at a time, and comes back with every reference that
/// still grants it, and with no other.
#[derive(Clone)]
pub(crate) struct Auditor {
    inner: FakeGranter,
    books: Arc<Mutex<Books>>,
}

#[derive(Default)]
struct Books {
    /// References in force, by run of pages.
    live: BTreeMap<usize, BTreeSet<GrantRef>>,
    at_grant: Vec<AtGrant>,
}

impl Auditor {
    pub(crate) fn new(inner: FakeGranter) -> Auditor {
        Auditor {
            inner,
            books: Arc::default(),
        }
    }

    /// What was granted, and what the page held then.
    pub(crate) fn at_grant(&self) -> Vec<AtGrant> {
        self.books.lock().unwrap().at_grant.clone()
    }
}

fn run_of(pages: &FakePages) -> usize {
    pages.as_ref().heap_id().expect("pages of a heap")
}

impl Granter for Auditor {
    type Pages = FakePages;

    fn alloc(&mut self, pages: usize) -> Result<FakePages, GrantError> {
        self.inner.alloc(pages)
    }

    fn grant(&mut self, pages: &FakePages, index: usize, access: Access) -> Result<GrantRef, GrantError> {
        let gref = self.inner.grant(pages, index, access)?;
        let mut bytes = [0; PAGE_SIZE];
        pages.as_ref().read(index * PAGE_SIZE, &mut bytes);
        let mut books = self.books.lock().unwrap();
        let live = books.live.entry(run_of(pages)).or_default();
        live.insert(gref);
        assert!(
            live.len() <= pages.as_ref().pages(),
            "a page was granted twice at a time"
        );
        books.at_grant.push((gref, bytes));
        Ok(gref)
    }

    fn end(&mut self, gref: GrantRef) -> bool {
        let ended = self.inner.end(gref);
        if ended {
            let mut books = self.books.lock().unwrap();
            let known = books
                .live
                .values_mut()
                .filter_map(|live| live.take(&gref))
                .count();
            assert_eq!(known, 1, "{gref} was ended twice");
        }
        ended
    }

    fn retire(&mut self, pages: FakePages, still_granted: Vec<GrantRef>) {
        let live = self.books.lock().unwrap().live.remove(&run_of(&pages));
        assert_eq!(
            live.unwrap_or_default(),
            still_granted.iter().copied().collect(),
            "pages came back with other references than grant them"
        );
        self.inner.retire(pages, still_granted);
    }
}
