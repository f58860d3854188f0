//! Real threads in one engine: everybody maps, unmaps, copies and transfers everybody's pages while
//! granters rewrite entries, grow, swap, change versions, die and come back.
//!
//! What must hold at every instant is checked where it can be seen (a mapped frame is its
//! granter's, an unmap of a live handle works, exactly one of two unmaps of a handle wins). After
//! each round everything is let go, and then (QUIESCE, `advisories.md` 0.4) no pin, no mark, no
//! reference and no dead domain may be left, and every table can change its version.
//!
//! The hypervisor under the engine is the machine in memory, with a [`Shake`] in front of it that
//! makes threads give way at random points, hooks of the engine included. `GNTTAB_STRESS_SECONDS`
//! says how long to go on (2), `GNTTAB_STRESS_SEED` where to start (1).

#![cfg(feature = "machine")]
#![expect(clippy::tests_outside_test_module, reason = "this crate is nothing but tests")]

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use gnttab_abi::{
    Copy, CopyFlags, CopyPtr, DomId, EntryFlags, EntryHead, EntryType, Errno, Gfn, GrantHandle, GrantRef,
    GrantStatus, MapFlags, MapGrantRef, Mfn, SwapGrantRef, Transfer, UnmapGrantRef,
};
use gnttab_engine::machine::{Answer, Between, Guest, Machine, Page, PageOwner, Request, Verdict, Watch};
use gnttab_engine::{
    Config, Domain, DomainKind, Engine, Limits, PageWords, Processor, Release, Vcpu, Version,
};

type Hv = Between<Machine, Shake>;

/// The domains, from number 1 on.
const KINDS: [DomainKind; 5] = [
    DomainKind::Pv,
    DomainKind::Hvm,
    DomainKind::Pv,
    DomainKind::Hvm,
    DomainKind::Pv,
];
const VCPUS: usize = 2;
/// References in use: some that survive a change of version, some that forbid it while pinned.
const PLAIN: [u32; 6] = [0, 1, 3, 6, 9, 200];
/// References that may be transitive. They are not swapped: a swap while a far grant is looked up
/// moves the mark of that attempt along with the entry, in the reference as here.
const FAR: [u32; 2] = [5, 7];
/// The reference at which pages are accepted; nothing else is ever written there.
const SLOT: u32 = 300;
/// Addresses at which a domain can map.
const PLACES: u64 = 0x4000_0000;
const NR_PLACES: u64 = 1024;
/// Pages that a domain likes to have.
const PAGES: usize = 6;
/// Bytes at the start of each page that say whose it is; copies leave them alone.
const TAG: u16 = 64;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to `n - 1`.
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: std::marker::Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Makes whoever asks the hypervisor something give way now and then.
struct Shake;

thread_local! {
    static SHAKEN: Cell<u64> = const { Cell::new(0) };
}

impl Shake {
    fn shake() {
        let mut rng = Rng(SHAKEN.get());
        match rng.below(24) {
            0 => std::thread::yield_now(),
            1 => (0..rng.below(400)).for_each(|_| std::hint::spin_loop()),
            _ => {}
        }
        SHAKEN.set(rng.0);
    }
}

impl Watch for Shake {
    fn before(&self, _: &Request) -> Verdict {
        Self::shake();
        Verdict::Proceed
    }
    fn after(&self, _: &Request, _: &Answer) {
        Self::shake();
    }
}

/// The words of a shared page as its guest uses them. The only unsafe code here.
mod words {
    use super::{AtomicU32, AtomicU64, PageWords};

    pub(super) fn word32(page: &PageWords, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset < 4096);
        // SAFETY: inside the page, aligned, alive as long as `page`; the engine's accesses to the
        // same words are atomic too.
        unsafe { &*page.as_ptr().wrapping_add(offset).cast::<AtomicU32>() }
    }

    pub(super) fn word64(page: &PageWords, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < 4096);
        // SAFETY: as for 32 bits.
        unsafe { &*page.as_ptr().wrapping_add(offset).cast::<AtomicU64>() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapping that a domain made. Its place is free again when nobody tries to unmap it any more.
struct Held {
    handle: GrantHandle,
    place: u64,
    flags: MapFlags,
    bus: u64,
    granter: DomId,
    /// More than one unmap may be under way.
    contested: AtomicBool,
    done: AtomicBool,
    places: Arc<Mutex<Vec<u64>>>,
}

impl Held {
    fn unmap_item(&self) -> UnmapGrantRef {
        UnmapGrantRef {
            host_addr: if self.flags.contains(MapFlags::HOST_MAP) {
                self.place
            } else {
                0
            },
            dev_bus_addr: if self.flags.contains(MapFlags::DEVICE_MAP) {
                self.bus
            } else {
                0
            },
            handle: self.handle,
            ..UnmapGrantRef::default()
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.places).push(self.place);
    }
}

/// A live domain, and what its guest knows.
struct Home {
    domain: Arc<Domain<Hv>>,
    pages: Mutex<Vec<Page>>,
    held: Mutex<Vec<Arc<Held>>>,
    places: Arc<Mutex<Vec<u64>>>,
    /// A guest does not write entries while it changes their layout.
    layout: RwLock<()>,
}

impl Home {
    fn guest(&self) -> &Guest {
        self.domain.private()
    }

    fn id(&self) -> DomId {
        self.domain.id()
    }

    fn is_pv(&self) -> bool {
        self.domain.kind() == DomainKind::Pv
    }

    /// A page with its tag.
    fn new_page(&self) -> Page {
        let page = self.guest().add_page().expect("there is memory");
        let words = self.guest().machine().page(page.mfn).unwrap();
        assert!(words.write(0, &tag(self.id()).to_le_bytes()));
        page
    }

    fn some_page(&self, rng: &mut Rng) -> Page {
        let mut pages = lock(&self.pages);
        while pages.len() < PAGES {
            pages.push(self.new_page());
        }
        rng.pick(&pages)
    }

    fn take_page(&self, rng: &mut Rng) -> Option<Page> {
        let mut pages = lock(&self.pages);
        let index = rng.below(pages.len().max(1));
        (index < pages.len()).then(|| pages.swap_remove(index))
    }
}

fn tag(id: DomId) -> u64 {
    0xD011_0000 | u64::from(id.0)
}

struct World {
    machine: Machine,
    engine: Engine<Hv>,
    /// Read by whoever acts as the domain, written by whoever kills or creates it.
    homes: Vec<RwLock<Option<Home>>>,
    /// What was done with what result, to see that the test tests something.
    done: Vec<AtomicU64>,
}

/// Indexes of [`World::done`].
#[derive(Clone, std::marker::Copy)]
enum Did {
    Map,
    MapOkay,
    Unmap,
    Copy,
    CopyOkay,
    Transfer,
    TransferOkay,
    Version,
    VersionOkay,
    Swap,
    SwapOkay,
    Kill,
    KillHeld,
    Lost,
}
const DID: [&str; 14] = [
    "maps",
    "okay",
    "unmaps",
    "copies",
    "okay",
    "transfers",
    "okay",
    "versions",
    "okay",
    "swaps",
    "okay",
    "kills",
    "held",
    "contests lost",
];

fn id_of(index: usize) -> DomId {
    DomId(u16::try_from(index + 1).unwrap())
}

fn some_id(rng: &mut Rng) -> DomId {
    id_of(rng.below(KINDS.len()))
}

impl World {
    fn new(inside: bool) -> World {
        let machine = Machine::new();
        machine.work_inside(inside);
        let config = Config {
            processors: threads() + 2,
            ..Config::default()
        };
        let world = World {
            engine: Engine::new(Between::new(machine.clone(), Shake), config),
            machine,
            homes: KINDS.iter().map(|_| RwLock::new(None)).collect(),
            done: DID.iter().map(|_| AtomicU64::new(0)).collect(),
        };
        (0..KINDS.len()).for_each(|index| world.create(index));
        world
    }

    fn did(&self, what: Did, times: usize) {
        self.done[what as usize].fetch_add(times as u64, Ordering::Relaxed);
    }

    /// Creates a domain where there is none, if its number is free again.
    fn create(&self, index: usize) {
        let mut home = self.homes[index].write().unwrap();
        if home.is_some() || self.engine.domain(id_of(index)).is_some() {
            return;
        }
        let Ok(guest) = self.machine.add_domain(id_of(index), KINDS[index]) else {
            return;
        };
        let mut places = Vec::new();
        for page in 0..NR_PLACES {
            let addr = PLACES + page * 4096;
            if KINDS[index] == DomainKind::Pv && guest.table(addr).is_none() {
                guest.add_table(addr).expect("there is memory");
            }
            places.push(addr);
        }
        let limits = Limits {
            grant_frames: Some(6),
            vcpus: VCPUS,
            ..Limits::default()
        };
        let domain = self
            .engine
            .create_domain(id_of(index), KINDS[index], limits, guest)
            .expect("the number is free");
        *home = Some(Home {
            domain,
            pages: Mutex::default(),
            held: Mutex::default(),
            places: Arc::new(Mutex::new(places)),
            layout: RwLock::new(()),
        });
    }

    /// The whole of a domain's death. Its pages in use elsewhere outlive it.
    fn kill(&self, index: usize, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let mut place = self.homes[index].write().unwrap();
        let Some(home) = place.take() else { return };
        self.did(Did::Kill, 1);
        let Home { domain, held, .. } = home;
        domain.private().set_dying();
        self.engine.begin_teardown(&domain);
        let vcpus: Vec<_> = (0..VCPUS)
            .map(|number| Vcpu::take(&domain, number).expect("nobody acts as it"))
            .collect();
        // First, so that no entry of its page tables still holds a frame of a granter whose last
        // pin goes.
        domain.private().drop_address_space();
        let budget = u32::try_from(1 + rng.below(300)).unwrap();
        while let Release::More { .. } = cpu.release_mappings(&vcpus, budget) {}
        assert_eq!(domain.mappings().count(), 0, "a dead domain maps nothing");
        drop(vcpus);
        domain.private().give_up_memory();
        lock(&held).clear();
        let id = domain.id();
        drop(domain);
        if self.engine.retire(id) != gnttab_engine::Retired::Gone {
            self.did(Did::KillHeld, 1);
        }
    }

    fn act(&self, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let index = rng.below(KINDS.len());
        let choice = rng.below(1000);
        if choice < 2 {
            return self.kill(index, cpu, rng);
        }
        let place = self.homes[index].read().unwrap();
        let Some(home) = &*place else {
            drop(place);
            return self.create(index);
        };
        if choice < 200 {
            return write_entry(home, rng);
        }
        let Some(vcpu) = Vcpu::take(&home.domain, rng.below(VCPUS)) else {
            return;
        };
        match choice {
            200..450 => self.map(home, &vcpu, cpu, rng),
            450..700 => self.unmap(home, &vcpu, cpu, rng),
            700..900 => self.copy(home, &vcpu, cpu, rng),
            900..930 => self.transfer(home, &vcpu, cpu, rng),
            930..940 => self.grow(home, &vcpu, cpu, rng),
            940..970 => self.swap(&vcpu, cpu, rng),
            970..990 => self.change_version(home, &vcpu, cpu),
            _ => {
                // The page may be granted and mapped: its frame must live as long as that lasts.
                if let Some(page) = home.take_page(rng) {
                    home.guest().give_up(page.mfn);
                }
            }
        }
    }

    fn map(&self, home: &Home, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let mut items = Vec::new();
        for _ in 0..1 + rng.below(8) {
            let (dom, gref) = some_grant(home, rng);
            // A translated domain that maps its own page loses it from its physmap.
            if !home.is_pv() && dom == home.id() {
                continue;
            }
            let Some(host_addr) = lock(&home.places).pop() else {
                break;
            };
            let mut flags = MapFlags::HOST_MAP;
            if home.is_pv() && rng.one_in(4) {
                flags = rng.pick(&[MapFlags::DEVICE_MAP, MapFlags::DEVICE_MAP | MapFlags::HOST_MAP]);
            }
            flags.set(MapFlags::READONLY, rng.one_in(2));
            let gref = if rng.one_in(40) { GrantRef(5000) } else { gref };
            items.push(MapGrantRef {
                host_addr,
                flags,
                gref,
                dom,
                ..MapGrantRef::default()
            });
        }
        cpu.map(vcpu, &mut items);
        self.did(Did::Map, items.len());
        for item in items {
            match item.status {
                GrantStatus::OKAY => {
                    self.did(Did::MapOkay, 1);
                    self.check_mapped(home, cpu, &item);
                    lock(&home.held).push(Arc::new(Held {
                        handle: item.handle,
                        place: item.host_addr,
                        flags: item.flags,
                        bus: item.dev_bus_addr,
                        granter: item.dom,
                        contested: AtomicBool::new(false),
                        done: AtomicBool::new(false),
                        places: Arc::clone(&home.places),
                    }));
                }
                GrantStatus::GENERAL_ERROR
                | GrantStatus::BAD_GNTREF
                | GrantStatus::BAD_DOMAIN
                | GrantStatus::BAD_PAGE => lock(&home.places).push(item.host_addr),
                other => panic!("map of {item:?} says {other}"),
            }
        }
    }

    /// What must be true of a mapping that nobody else knows of yet.
    fn check_mapped(&self, home: &Home, cpu: &mut Processor<'_, Hv>, item: &MapGrantRef) {
        let entry = cpu.entry(item.dom, item.gref).expect("a pinned entry exists");
        assert!(entry.pins.any(), "PIN-1: a mapped entry is pinned: {entry:?}");
        assert_eq!(entry.user, Some(home.id()));
        let mfn = entry.mfn.unwrap();
        assert_eq!(
            mfn.address(),
            item.dev_bus_addr,
            "PIN-5: the frame is that of the first use"
        );
        let info = self.machine.frame(mfn).unwrap();
        assert_eq!(info.owner, PageOwner::Domain(item.dom), "{item:?} {info:?}");
        let words = self.machine.page(mfn).expect("a mapped page is there");
        let bytes = words.read_bytes::<8>(0).unwrap();
        assert_eq!(
            u64::from_le_bytes(bytes),
            tag(item.dom),
            "the granter's own page is mapped"
        );
    }

    fn unmap(&self, home: &Home, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let mut victims = Vec::new();
        {
            let mut held = lock(&home.held);
            for _ in 0..1 + rng.below(40) {
                if held.is_empty() {
                    break;
                }
                let index = rng.below(held.len());
                // A handle of a device mapping could be in use again for one that fits by chance.
                if !home.is_pv() && rng.one_in(4) {
                    held[index].contested.store(true, Ordering::Relaxed);
                    victims.push(Arc::clone(&held[index]));
                } else {
                    victims.push(held.swap_remove(index));
                }
            }
        }
        let mut items: Vec<_> = victims.iter().map(|held| held.unmap_item()).collect();
        cpu.unmap(vcpu, &mut items);
        self.did(Did::Unmap, items.len());
        for (item, held) in items.iter().zip(&victims) {
            self.check_unmapped(item, held);
        }
        lock(&home.held).retain(|held| !held.done.load(Ordering::Relaxed));
    }

    fn check_unmapped(&self, item: &UnmapGrantRef, held: &Held) {
        if item.status == GrantStatus::OKAY {
            assert!(
                !held.done.swap(true, Ordering::AcqRel),
                "HND-1: {item:?} was unmapped twice"
            );
            return;
        }
        // Lost against another unmap; the handle may even be somebody else's mapping by now.
        let lost = [GrantStatus::BAD_HANDLE, GrantStatus::GENERAL_ERROR].contains(&item.status);
        let contested = held.contested.load(Ordering::Relaxed);
        assert!(
            contested && lost,
            "unmap of {item:?}, a mapping of {}, failed",
            held.granter
        );
        self.did(Did::Lost, 1);
    }

    fn copy(&self, home: &Home, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let mut items = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let mut flags = CopyFlags::empty();
            let mut side = |rng: &mut Rng, flag| {
                let offset = TAG + u16::try_from(rng.below(1000)).unwrap();
                if rng.one_in(2) {
                    return CopyPtr::frame(home.some_page(rng).gfn.0, offset);
                }
                flags |= flag;
                let (dom, gref) = some_grant(home, rng);
                CopyPtr::grant(if dom == home.id() { DomId::SELF } else { dom }, gref, offset)
            };
            let source = side(rng, CopyFlags::SOURCE_GREF);
            let dest = side(rng, CopyFlags::DEST_GREF);
            let len = u16::try_from(rng.below(64)).unwrap();
            items.push(Copy {
                source,
                dest,
                len,
                flags,
                ..Copy::default()
            });
            // Runs on the same pages keep what they claimed.
            while rng.one_in(2) {
                items.push(items[items.len() - 1]);
            }
        }
        cpu.copy(vcpu, &mut items);
        self.did(Did::Copy, items.len());
        for item in items {
            match item.status {
                GrantStatus::OKAY => self.did(Did::CopyOkay, 1),
                GrantStatus::GENERAL_ERROR
                | GrantStatus::BAD_GNTREF
                | GrantStatus::BAD_DOMAIN
                | GrantStatus::BAD_PAGE => {}
                other => panic!("copy {item:?} says {other}"),
            }
        }
    }

    fn transfer(&self, home: &Home, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        if !home.is_pv() {
            return;
        }
        let Some(page) = home.take_page(rng) else { return };
        let mut items = [Transfer {
            mfn: page.mfn.0,
            domid: some_id(rng),
            gref: GrantRef(SLOT),
            ..Transfer::default()
        }];
        cpu.transfer(vcpu, &mut items);
        self.did(Did::Transfer, 1);
        match items[0].status {
            GrantStatus::OKAY => self.did(Did::TransferOkay, 1),
            // Granted and in use, which is what most pages are: it stays.
            GrantStatus::BAD_PAGE => lock(&home.pages).push(page),
            GrantStatus::BAD_DOMAIN | GrantStatus::GENERAL_ERROR => {}
            other => panic!("transfer {items:?} says {other}"),
        }
    }

    fn grow(&self, home: &Home, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let frames = u32::try_from(rng.below(8)).unwrap();
        let mut seen = BTreeSet::new();
        let status = cpu.setup_table(vcpu, DomId::SELF, frames, None, &mut |_, gfn: Gfn| {
            seen.insert(gfn);
            true
        });
        assert_eq!(status.is_okay(), frames <= 6, "{status} for {frames} frames");
        if home.is_pv() && status.is_okay() {
            assert_eq!(seen.len(), frames as usize, "each frame is another");
            assert!(seen.iter().all(|gfn| self.machine.frame(Mfn(gfn.0)).is_some()));
        }
    }

    fn swap(&self, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>, rng: &mut Rng) {
        let mut items = [SwapGrantRef::default(); 3];
        for item in &mut items {
            (item.ref_a, item.ref_b) = (GrantRef(rng.pick(&PLAIN)), GrantRef(rng.pick(&PLAIN)));
        }
        cpu.swap(vcpu, &mut items);
        for item in items {
            self.did(Did::Swap, 1);
            match item.status {
                GrantStatus::OKAY => self.did(Did::SwapOkay, 1),
                GrantStatus::EAGAIN => {}
                other => panic!("swap {item:?} says {other}"),
            }
        }
    }

    fn change_version(&self, home: &Home, vcpu: &Vcpu<Hv>, cpu: &mut Processor<'_, Hv>) {
        let _layout = home.layout.write().unwrap();
        let before = home.domain.version();
        let wanted = match before {
            Version::V1 => 2,
            Version::V2 => 1,
        };
        self.did(Did::Version, 1);
        match cpu.set_version(vcpu, wanted) {
            Ok(()) => {
                self.did(Did::VersionOkay, 1);
                assert_eq!(home.domain.version().number(), wanted);
            }
            Err(Errno::Busy | Errno::Again | Errno::Range) => assert_eq!(home.domain.version(), before),
            Err(other) => panic!("set_version says {}", other.name()),
        }
    }

    /// Everything is let go; then nothing may be left of it.
    fn quiesce(&self, rng: &mut Rng) {
        let mut cpu = self.engine.any_processor().expect("nobody acts");
        for home in &self.homes {
            let home = home.read().unwrap();
            let Some(home) = &*home else { continue };
            let vcpu = Vcpu::take(&home.domain, 0).expect("nobody acts as it");
            let held = std::mem::take(&mut *lock(&home.held));
            let mut items: Vec<_> = held.iter().map(|held| held.unmap_item()).collect();
            cpu.unmap(&vcpu, &mut items);
            for item in items {
                assert_eq!(
                    item.status,
                    GrantStatus::OKAY,
                    "a live handle can be unmapped: {item:?}"
                );
            }
            assert_eq!(
                home.domain.mappings().count(),
                0,
                "AUD-HND: every live handle was known"
            );
        }
        drop(cpu);
        assert_eq!(self.machine.audit_with(&self.engine), []);
        let there: Vec<DomId> = self.engine.domains().collect();
        for (index, home) in self.homes.iter().enumerate() {
            let home = home.read().unwrap();
            let live = home.is_some();
            assert_eq!(
                there.contains(&id_of(index)),
                live,
                "TDN: the dead are gone once unused"
            );
            if let Some(home) = &*home {
                self.check_idle(home);
            }
        }
        if rng.one_in(3) {
            let mut cpu = self.engine.any_processor().expect("nobody acts");
            (0..KINDS.len()).for_each(|index| self.kill(index, &mut cpu, rng));
            assert_eq!(self.engine.domains().next(), None, "everybody can be destroyed");
            assert_eq!(self.machine.audit_idle(), []);
            (0..KINDS.len()).for_each(|index| self.create(index));
        }
    }

    /// A table that nobody uses has no pins and no marks, and can change its version.
    fn check_idle(&self, home: &Home) {
        let mut cpu = self.engine.any_processor().expect("nobody acts");
        for gref in (0..).map(GrantRef) {
            let Some(entry) = cpu.entry(home.id(), gref) else {
                break;
            };
            assert!(!entry.pins.any(), "{} {entry:?}", home.id());
            let flags = entry.words.flags();
            let marked = flags.kind() != EntryType::AcceptTransfer && flags.intersects(EntryFlags::IN_USE);
            assert!(!marked || gref.0 == SLOT, "{} is marked: {entry:?}", home.id());
        }
        let vcpu = Vcpu::take(&home.domain, 1).expect("nobody acts as it");
        for gref in 0..8 {
            at(home, gref).store(EntryHead::default().word(), Ordering::Relaxed);
        }
        for _ in 0..2 {
            let wanted = 3 - home.domain.version().number();
            let changed = cpu.set_version(&vcpu, wanted);
            assert_eq!(changed, Ok(()), "{} to version {wanted}", home.id());
        }
    }
}

/// A grant that a domain may well have: most entries name the domain that follows from their place.
fn some_grant(home: &Home, rng: &mut Rng) -> (DomId, GrantRef) {
    loop {
        let (dom, gref) = (some_id(rng), some_ref(rng));
        if usual_grantee(dom, gref) == home.id() || rng.one_in(6) {
            return (dom, GrantRef(gref));
        }
    }
}

fn usual_grantee(granter: DomId, gref: u32) -> DomId {
    id_of((granter.0 as usize + gref as usize) % KINDS.len())
}

fn some_ref(rng: &mut Rng) -> u32 {
    if rng.one_in(3) {
        rng.pick(&FAR)
    } else {
        rng.pick(&PLAIN)
    }
}

/// The head of an entry, in the version that the table has.
fn at(home: &Home, gref: u32) -> &AtomicU32 {
    let (page, offset) = locate(home, gref).expect("the first entries are there");
    words::word32(page, offset)
}

/// Page and offset of an entry; `None` past the table.
fn locate(home: &Home, gref: u32) -> Option<(&PageWords, usize)> {
    let size = match home.domain.version() {
        Version::V1 => 8,
        Version::V2 => 16,
    };
    let byte = gref as usize * size;
    let page = home.domain.shared_frame(u32::try_from(byte / 4096).unwrap())?;
    Some((page.as_ref(), byte % 4096))
}

/// What a guest does with one of its entries.
fn write_entry(home: &Home, rng: &mut Rng) {
    let _layout = home.layout.read().unwrap();
    let gref = if rng.one_in(12) { SLOT } else { some_ref(rng) };
    let Some((page, offset)) = locate(home, gref) else {
        return;
    };
    let head = words::word32(page, offset);
    let readonly = u32::from(EntryFlags::READONLY.bits());
    let marks = u32::from(EntryFlags::IN_USE.bits());
    let grantee = if rng.one_in(6) {
        some_id(rng)
    } else {
        usual_grantee(home.id(), gref)
    };
    let store = |flags: EntryFlags, domid, halves: u32, frame: u64| {
        if home.domain.version() == Version::V1 {
            words::word32(page, offset + 4).store(u32::try_from(frame).unwrap(), Ordering::Relaxed);
        } else {
            words::word32(page, offset + 4).store(halves, Ordering::Relaxed);
            words::word64(page, offset + 8).store(frame, Ordering::Relaxed);
        }
        head.store(EntryHead { flags, domid }.word(), Ordering::Release);
    };
    if gref == SLOT {
        return store(EntryFlags::ACCEPT_TRANSFER, some_id(rng), 0, 0x9000);
    }
    match rng.below(10) {
        // The end of a grant, as the protocols have it (spec 9).
        0 => {
            let found = head.load(Ordering::Relaxed);
            if home.domain.version() == Version::V2 || found & marks == 0 {
                let _ = head.compare_exchange(found, found & !0xFFFF, Ordering::SeqCst, Ordering::Relaxed);
            }
        }
        // And as a careless guest does it.
        1 => head.store(0, Ordering::Relaxed),
        2 => {
            head.fetch_or(readonly, Ordering::SeqCst);
        }
        3 | 4 => {
            head.fetch_and(!readonly, Ordering::SeqCst);
        }
        5 if home.domain.version() == Version::V2 && FAR.contains(&gref) => {
            let (far, far_ref) = some_grant(home, rng);
            let flags = EntryFlags::TRANSITIVE;
            store(flags, grantee, u32::from(far.0), u64::from(far_ref.0));
        }
        6 if home.domain.version() == Version::V2 => {
            let (start, length) = (rng.pick(&[0, 64, 500]), rng.pick(&[4096, 1000, 200]));
            let flags = EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE;
            store(flags, grantee, start | length << 16, home.some_page(rng).gfn.0);
        }
        kind => {
            let mut flags = EntryFlags::PERMIT_ACCESS;
            flags.set(EntryFlags::READONLY, kind == 7);
            store(flags, grantee, 0, home.some_page(rng).gfn.0);
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Counts a thread out, however it ends.
struct Left<'a>(&'a AtomicU32);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// As many as can run at once: who waits for a thread that does not run learns nothing.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4))
}

#[test]
fn quiesce_after_everybody_did_everything() {
    everybody_does_everything(false);
}

/// The same where copies and flushes are made inside tables.
#[test]
fn quiesce_after_everybody_did_everything_inside() {
    everybody_does_everything(true);
}

fn everybody_does_everything(inside: bool) {
    let until = Instant::now() + Duration::from_secs(setting("GNTTAB_STRESS_SECONDS", 2));
    let seed = setting("GNTTAB_STRESS_SEED", 1);
    let world = World::new(inside);
    let mut rng = Rng(seed);
    let mut rounds = 0;
    while Instant::now() < until {
        let stop = Instant::now() + Duration::from_millis(200);
        let left = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for number in 0..threads() {
                let (world, left, mut rng) = (&world, &left, Rng(rng.next()));
                left.fetch_add(1, Ordering::Relaxed);
                scope.spawn(move || {
                    SHAKEN.set(rng.next());
                    let _left = Left(left);
                    let mut cpu = world.engine.processor(number).expect("each thread has its own");
                    while Instant::now() < stop {
                        world.act(&mut cpu, &mut rng);
                    }
                });
            }
            // ENG-4: whoever waits for ever has found a fault, and must not look like a slow machine.
            let patience = stop + Duration::from_secs(60);
            while left.load(Ordering::Relaxed) != 0 {
                if Instant::now() > patience {
                    eprintln!("seed {seed}, round {rounds}: a thread does not come back");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        world.quiesce(&mut rng);
        rounds += 1;
    }
    let done: Vec<String> = DID
        .iter()
        .zip(&world.done)
        .map(|(name, count)| format!("{} {name}", count.load(Ordering::Relaxed)))
        .collect();
    println!("seed {seed}, {rounds} rounds: {}", done.join(", "));
}
