//! The driver on the engine's in-memory machine, through the raw hypercall of each calling ABI: PV and
//! translated guests, both versions. What the books of the machine say at the end is the audit.

#![expect(clippy::tests_outside_test_module, reason = "this crate is nothing but tests")]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gnttab_abi::{
    Abi, AddToPhysmap, Copy, CopyFlags, CopyPtr, DomId, Errno, Gfn, GrantRef, GrantStatus, Mfn, PAGE_SIZE,
    Transfer,
};
use gnttab_engine::machine::{C, G, Guest, Machine, Page as MachinePage, Scene, T};
use gnttab_engine::{Call as RawDoor, Domain, DomainKind, GuestMemory, Outcome, PageWords, Vcpu};
use gnttab_guest::{
    Access, Call, Config, FrameKind, GrantTable, Grantee, Granter, Hypercall, MapRequest, Mapper, OfferEnd,
    Page, Part, ReachError, TableFrame, Version, Window, reach, retry,
};

/// Where a guest's hypercall arguments lie.
const ARENA: u64 = 0x5000_0000;
const ARENA_PAGES: usize = 4;
/// Where a translated guest has its table.
const TABLE_GFN: u64 = 0xf_0000;
const STATUS_GFN: u64 = 0xf_1000;

/// A guest kernel on the machine.
struct Kernel {
    scene: Arc<Scene>,
    domain: Arc<Domain<Machine>>,
    vcpu: Mutex<Vcpu<Machine>>,
    abi: Abi,
    /// Table pages that were reached: they stay as long as this kernel does.
    frames: Mutex<Vec<(FrameKind, u32, Arc<PageWords>)>>,
}

impl Kernel {
    fn new(scene: &Arc<Scene>, id: DomId, abi: Abi) -> Arc<Kernel> {
        let domain = scene.domain(id);
        domain.private().add_memory(ARENA, ARENA_PAGES).unwrap();
        domain.private().set_narrow(abi == Abi::X86_32);
        Arc::new(Kernel {
            scene: Arc::clone(scene),
            domain,
            vcpu: Mutex::new(scene.vcpu(id, 0)),
            abi,
            frames: Mutex::default(),
        })
    }

    fn guest(&self) -> &Guest {
        self.domain.private()
    }

    fn page(&self) -> OwnPage {
        let page = self.guest().add_page().unwrap();
        OwnPage {
            page,
            words: self.scene.machine.page(page.mfn).unwrap(),
        }
    }

    fn is_translated(&self) -> bool {
        self.domain.kind() != DomainKind::Pv
    }

    fn place(&self, place: AddToPhysmap) -> Result<(), Errno> {
        let vcpu = self.vcpu.lock().unwrap();
        self.scene
            .processor()
            .place_frame(&vcpu, place.domid, place.idx, Gfn(place.gpfn))
    }
}

impl Hypercall for Kernel {
    fn grant_table_op(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let vcpu = self.vcpu.lock().unwrap();
        let mut bytes = vec![0; ARENA_PAGES * PAGE_SIZE];
        let raw = call
            .encode(self.abi, ARENA, &mut bytes)
            .map_err(|_| Errno::Inval)?;
        self.guest()
            .write(ARENA, &bytes[..raw.len])
            .map_err(|_| Errno::Fault)?;
        let mut door = RawDoor {
            command: raw.command,
            addr: ARENA,
            count: raw.count,
        };
        // The hypervisor stops wherever it may, and the guest goes on.
        let result = loop {
            let mut cpu = self.scene.processor();
            match cpu.hypercall(&vcpu, self.abi, door, self.guest(), &mut || true) {
                Outcome::Done(result) => break result,
                Outcome::Continue(rest) => door = rest,
            }
        };
        self.guest()
            .read(ARENA, &mut bytes[..raw.len])
            .map_err(|_| Errno::Fault)?;
        call.decode(self.abi, &bytes).map_err(|_| Errno::Inval)?;
        result
    }

    fn sleep_ms(&self, _ms: u32) {
        std::thread::yield_now();
    }

    fn relax(&self) {
        std::thread::yield_now();
    }
}

/// A page of a guest's memory.
#[derive(Debug)]
struct OwnPage {
    page: MachinePage,
    words: Arc<PageWords>,
}

impl OwnPage {
    fn put(&self, text: [u8; 4]) {
        assert!(self.words.write(0, &text));
    }

    fn get(&self) -> [u8; 4] {
        self.words.read_bytes(0).unwrap()
    }
}

impl Page for OwnPage {
    fn gfn(&self) -> Gfn {
        self.page.gfn
    }

    fn zero(&mut self) {
        assert!(self.words.write(0, &[0; PAGE_SIZE]));
    }
}

impl Granter for Kernel {
    type Page = OwnPage;

    fn reach(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), ReachError> {
        let mut numbers = vec![0; frames.end as usize];
        if self.is_translated() {
            let start = match kind {
                FrameKind::Shared => TABLE_GFN,
                FrameKind::Status => STATUS_GFN,
            };
            for place in reach::physmap(kind, frames.clone(), |index| Gfn(start + u64::from(index))) {
                self.place(place)?;
            }
        } else {
            match kind {
                FrameKind::Shared => reach::setup_table(self, &mut numbers)?,
                FrameKind::Status => reach::status_frames(self, &mut numbers)?,
            }
        }
        let mut reached = self.frames.lock().unwrap();
        for index in frames {
            let page = match kind {
                FrameKind::Shared => self.domain.shared_frame(index),
                FrameKind::Status => self.domain.status_frame(index),
            };
            let page = page.ok_or(ReachError::NoAddress(index))?;
            if !self.is_translated() {
                assert_eq!(Mfn(numbers[index as usize]), page.mfn());
            }
            reached.push((kind, index, self.scene.machine.page(page.mfn()).unwrap()));
        }
        Ok(())
    }

    fn frame(&self, kind: FrameKind, index: u32) -> Option<TableFrame> {
        let reached = self.frames.lock().unwrap();
        let words = &reached
            .iter()
            .rev()
            .find(|frame| (frame.0, frame.1) == (kind, index))?
            .2;
        let address = NonNull::new(words.as_ptr())?;
        // SAFETY: a page of the machine, aligned, which `frames` keeps as long as this kernel is
        // there; the engine uses the same widths, by atomics.
        Some(unsafe { TableFrame::new(address) })
    }
}

impl Grantee for Kernel {}

/// The machine, a granter with its table, and a grantee with its window.
struct Bench {
    scene: Arc<Scene>,
    front: Arc<Kernel>,
    back: Arc<Kernel>,
    table: GrantTable<Kernel>,
    mapper: Mapper<Kernel>,
}

impl Bench {
    fn new(kind: DomainKind, abi: Abi, version: Version) -> Bench {
        let builder = [G, C, T]
            .into_iter()
            .fold(Scene::pv(), |scene, id| scene.kind(id, kind));
        let scene = Arc::new(builder.build());
        let (front, back) = (Kernel::new(&scene, G, abi), Kernel::new(&scene, C, abi));
        let config = Config {
            version,
            ..Config::default()
        };
        let table = GrantTable::start(Arc::clone(&front), config).unwrap();
        assert_eq!(table.version(), version);
        let window = Window::new(scene.place(0), 256).unwrap();
        let mapper = Mapper::new(Arc::clone(&back), window).unwrap();
        Bench {
            scene,
            front,
            back,
            table,
            mapper,
        }
    }

    fn request(gref: GrantRef, access: Access) -> MapRequest {
        MapRequest { dom: G, gref, access }
    }

    fn copy(&self, item: Copy) -> GrantStatus {
        let mut items = [item];
        retry::copy(&*self.back, &mut items).unwrap();
        items[0].status
    }
}

/// Every kind of guest, calling ABI and version.
fn everywhere(test: impl Fn(Bench)) {
    let kinds = [
        (DomainKind::Hvm, Abi::X86_64),
        (DomainKind::Hvm, Abi::X86_32),
        (DomainKind::Arm, Abi::Arm),
        (DomainKind::Pv, Abi::X86_64),
        (DomainKind::Pv, Abi::X86_32),
    ];
    for (kind, abi) in kinds {
        for version in [Version::V1, Version::V2] {
            let bench = Bench::new(kind, abi, version);
            let scene = Arc::clone(&bench.scene);
            test(bench);
            assert_eq!(scene.audit(), [], "{kind:?}, {abi:?}, {version:?}");
        }
    }
}

#[test]
fn a_page_goes_there_and_comes_back() {
    everywhere(|bench| {
        // Enough references for two frames and more: the table grows.
        let mut refs = bench.table.alloc(600).unwrap();
        let page = bench.front.page();
        page.put(*b"old!");
        let gref = refs.claim().unwrap();
        let grant = bench
            .table
            .grant_zeroed(gref, C, page, Access::ReadWrite)
            .unwrap();
        let mapping = bench
            .mapper
            .map_one(Bench::request(grant.gref(), Access::ReadWrite))
            .unwrap();

        let mut seen = [1; 4];
        bench.back.guest().read(mapping.host_addr(), &mut seen).unwrap();
        assert_eq!(seen, [0; 4]);
        bench.back.guest().write(mapping.host_addr(), b"new!").unwrap();
        assert_eq!(&grant.page().get(), b"new!");

        let pending = grant.end().unwrap_err();
        assert_eq!(bench.table.retry_pending(8).still, 1);
        mapping.unmap().unwrap();
        let (gref, page) = pending.retry().unwrap();
        let number = gref.gref();
        refs.release(gref);
        assert_eq!(&page.get(), b"new!");
        let error = bench
            .mapper
            .map_one(Bench::request(number, Access::ReadOnly))
            .unwrap_err();
        assert_eq!(error.status(), GrantStatus::GENERAL_ERROR);
    });
}

#[test]
fn batches_and_runs_across_continuations() {
    everywhere(|bench| {
        let grants: Vec<_> = (0..70)
            .map(|_| {
                let gref = bench.table.alloc_one().unwrap();
                bench
                    .table
                    .grant(gref, C, bench.front.page(), Access::ReadWrite)
                    .unwrap()
            })
            .collect();
        let mut requests: Vec<_> = grants
            .iter()
            .map(|grant| Bench::request(grant.gref(), Access::ReadOnly))
            .collect();
        requests[33].gref = GrantRef(0x7fff_ffff);
        let results = bench.mapper.map(&requests).unwrap();
        for (index, result) in results.iter().enumerate() {
            let status = result
                .as_ref()
                .map_or_else(|error| error.status(), |_| GrantStatus::OKAY);
            let expected = if index == 33 {
                GrantStatus::BAD_GNTREF
            } else {
                GrantStatus::OKAY
            };
            assert_eq!(status, expected, "item {index}");
        }
        let mappings = results.into_iter().filter_map(Result::ok).collect();
        bench.mapper.unmap(mappings).unwrap();

        let refs: Vec<_> = grants[..16].iter().map(|grant| grant.gref()).collect();
        let run = bench.mapper.map_run(G, &refs, Access::ReadWrite).unwrap();
        let start = run.host_addr().unwrap();
        bench
            .back
            .guest()
            .write(start + 3 * PAGE_SIZE as u64, b"four")
            .unwrap();
        assert_eq!(&grants[3].page().get(), b"four");
        run.unmap().unwrap();
        for grant in grants {
            grant.end().unwrap();
        }
        assert_eq!(bench.mapper.window().leaked, 0);
    });
}

#[test]
fn readonly_is_enforced_and_taken_back() {
    everywhere(|bench| {
        let gref = bench.table.alloc_one().unwrap();
        let grant = bench
            .table
            .grant(gref, C, bench.front.page(), Access::ReadWrite)
            .unwrap();
        let writable = bench
            .mapper
            .map_one(Bench::request(grant.gref(), Access::ReadWrite))
            .unwrap();
        grant.make_readonly().unwrap_err();
        writable.unmap().unwrap();
        grant.make_readonly().unwrap();
        bench
            .mapper
            .map_one(Bench::request(grant.gref(), Access::ReadWrite))
            .unwrap_err();
        let read = bench
            .mapper
            .map_one(Bench::request(grant.gref(), Access::ReadOnly))
            .unwrap();
        read.unmap().unwrap();
        grant.make_writable();
        bench
            .mapper
            .map_one(Bench::request(grant.gref(), Access::ReadWrite))
            .unwrap()
            .unmap()
            .unwrap();
        grant.end().unwrap();
    });
}

#[test]
fn copies_of_whole_parts_and_passed_on_pages() {
    everywhere(|bench| {
        let page = bench.front.page();
        page.put(*b"text");
        let gref = bench.table.alloc_one().unwrap();
        let grant = bench.table.grant(gref, C, page, Access::ReadOnly).unwrap();
        let target = bench.back.page();
        let copy = |gref, offset| Copy {
            source: CopyPtr::grant(G, gref, offset),
            dest: CopyPtr::frame(target.page.gfn.0, 0),
            len: 4,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        assert_eq!(bench.copy(copy(grant.gref(), 0)), GrantStatus::OKAY);
        assert_eq!(&target.get(), b"text");
        let (gref, page) = grant.end().unwrap();
        if bench.table.version() == Version::V1 {
            return;
        }

        let part = Part { offset: 0, len: 4 };
        let grant = bench
            .table
            .grant_part(gref, C, page, Access::ReadOnly, part)
            .unwrap();
        target.put([0; 4]);
        assert_eq!(bench.copy(copy(grant.gref(), 0)), GrantStatus::OKAY);
        assert_eq!(&target.get(), b"text");
        assert_eq!(bench.copy(copy(grant.gref(), 4)), GrantStatus::GENERAL_ERROR);
        let request = Bench::request(grant.gref(), Access::ReadOnly);
        bench.mapper.map_one(request).unwrap_err();
        grant.end().unwrap();

        // T grants to G, which passes it on to C.
        let far = Kernel::new(&bench.scene, T, bench.front.abi);
        let far_table = GrantTable::start(Arc::clone(&far), Config::default()).unwrap();
        let far_page = far.page();
        far_page.put(*b"far!");
        let far_grant = far_table
            .grant(far_table.alloc_one().unwrap(), G, far_page, Access::ReadOnly)
            .unwrap();
        let passed = bench
            .table
            .grant_transitive(
                bench.table.alloc_one().unwrap(),
                C,
                (T, far_grant.gref()),
                Access::ReadOnly,
            )
            .unwrap();
        assert_eq!(bench.copy(copy(passed.gref(), 0)), GrantStatus::OKAY);
        assert_eq!(&target.get(), b"far!");
        passed.end().unwrap();
        far_grant.end().unwrap();
    });
}

#[test]
fn a_page_is_received_by_transfer() {
    for version in [Version::V1, Version::V2] {
        let bench = Bench::new(DomainKind::Pv, Abi::X86_64, version);
        let gref = bench.table.alloc_one().unwrap();
        let offer = bench.table.offer(gref, C, Gfn(0)).unwrap();
        let page = bench.back.page();
        page.put(*b"gift");
        let mfn = page.page.mfn;
        drop(page);
        let mut items = [Transfer {
            mfn: mfn.0,
            domid: G,
            gref: offer.gref(),
            status: GrantStatus::GENERAL_ERROR,
        }];
        bench.back.grant_table_op(Call::Transfer(&mut items)).unwrap();
        assert_eq!(items[0].status, GrantStatus::OKAY);
        let Ok(OfferEnd::Received { frame, .. }) = offer.end() else {
            panic!("the page is there")
        };
        assert_eq!(frame, Gfn(mfn.0));
        let words = bench.scene.machine.page(mfn).unwrap();
        assert_eq!(words.read_bytes(0), Some(*b"gift"));
        assert_eq!(bench.scene.audit(), []);
    }
}

/// T-396a on the engine: a peer that maps and unmaps without pause never reads what the granter
/// writes once it has its page back.
#[test]
fn t_396a_against_the_engine() {
    const SECRET: [u8; 4] = *b"mine";
    for version in [Version::V1, Version::V2] {
        let bench = Bench::new(DomainKind::Hvm, Abi::X86_64, version);
        let (stop, mapped) = (AtomicBool::new(false), AtomicU32::new(0));
        let gref = bench.table.alloc_one().unwrap();
        let number = gref.gref();
        let mut page = bench.front.page();
        page.zero();
        std::thread::scope(|scope| {
            let peer = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mapping) = bench.mapper.map_one(Bench::request(number, Access::ReadOnly)) else {
                        continue;
                    };
                    let mut seen = [0; 4];
                    bench.back.guest().read(mapping.host_addr(), &mut seen).unwrap();
                    assert_ne!(seen, SECRET);
                    mapped.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut given = Some((gref, page));
            let mut rounds = 0;
            // Until they have met often enough; on a busy machine that may take too long.
            let deadline = Instant::now() + Duration::from_secs(3);
            while !peer.is_finished()
                && Instant::now() < deadline
                && (rounds < 300 || mapped.load(Ordering::Relaxed) < 20)
            {
                rounds += 1;
                let (gref, page) = given.take().unwrap();
                let mut grant = bench.table.grant_zeroed(gref, C, page, Access::ReadOnly).unwrap();
                std::thread::yield_now();
                let (gref, page) = loop {
                    match grant.try_end() {
                        Ok(ended) => break ended,
                        Err(busy) => grant = busy,
                    }
                };
                page.put(SECRET);
                given = Some((gref, page));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(bench.scene.audit(), []);
    }
}
