//! A scene ready to act in: four domains, one grant.
//!
//! It is the "standard scene" of the specification's test vectors: P (0, control), G (1, granter),
//! C (2, caller) and T (3); entry 5 of G's table grants frame F to C.

use alloc::sync::Arc;
use alloc::vec::Vec;

use gnttab_abi::{
    DomId, EntryBodyV2, EntryFlags, EntryHead, EntryV1, EntryV2, GrantHandle, GrantRef, GrantStatus,
    MapFlags, MapGrantRef, PAGE_SIZE, STATUS_PER_PAGE, UnmapGrantRef, V1_ENTRIES_PER_PAGE,
    V2_ENTRIES_PER_PAGE,
};
use spin::Mutex;

use super::{Guest, Machine, Page, Violation};
use crate::domain::{Config, Domain, Limits, Reference, Vcpu, Version};
use crate::engine::{Engine, Processor};
use crate::hypervisor::{DomainKind, Hypervisor};
use crate::observe::EntryWords;
use crate::shared::{PageWords, SharedV1, SharedV2};
use crate::teardown::{Release, Retired};

/// First address at which a scene's domains can map.
const FIRST_PLACE: u64 = 0x4000_0000;

/// The control domain of a [`Scene`].
pub const P: DomId = DomId(0);
/// The granter of a [`Scene`].
pub const G: DomId = DomId(1);
/// The caller of a [`Scene`].
pub const C: DomId = DomId(2);
/// The third domain of a [`Scene`].
pub const T: DomId = DomId(3);

/// A [`Scene`] that is being set up.
#[derive(Clone, Debug)]
pub struct SceneBuilder {
    kinds: [DomainKind; 4],
    limits: [Limits; 4],
    versions: [Version; 4],
    config: Config,
    narrow: bool,
    iommu: bool,
}

/// An engine on a [`Machine`], with domains P, G, C and T and a grant from G to C.
///
/// ```
/// use gnttab_abi::{EntryFlags, GrantStatus, MapFlags};
/// use gnttab_engine::machine::{C, G, Scene};
/// use gnttab_engine::GuestMemory;
///
/// let scene = Scene::pv().granter_v2().build();
/// let place = scene.place(0);
///
/// // C maps G's page and writes through the mapping.
/// let mapped = scene.map(place, MapFlags::HOST_MAP);
/// assert_eq!(mapped.status, GrantStatus::OKAY);
/// assert!(scene.flags(G, Scene::GREF).contains(EntryFlags::WRITING));
/// scene.domain(C).private().write(place, b"hello").unwrap();
///
/// let page = scene.machine.page(scene.frame.mfn).unwrap();
/// assert_eq!(&page.read_bytes::<5>(0).unwrap(), b"hello");
///
/// // Everything is as before, and all books are straight.
/// assert_eq!(scene.unmap(place, mapped.handle), GrantStatus::OKAY);
/// assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
/// assert_eq!(scene.audit(), []);
/// ```
pub struct Scene<H: Hypervisor = Machine> {
    /// The engine.
    pub engine: Engine<H>,
    /// The machine under it.
    pub machine: Machine,
    /// F: a page of G, granted to C by entry [`Scene::GREF`].
    pub frame: Page,
    /// F2: another page of G.
    pub frame2: Page,
    /// L0 and L1: pages of C.
    pub local: [Page; 2],
    /// FT: a page of T.
    pub far: Page,
    /// PF: a page of P.
    pub control: Page,
    /// Domains that were killed and may still be held.
    killed: Mutex<Vec<DomId>>,
}

impl Scene {
    /// The reference by which G grants F to C.
    pub const GREF: GrantRef = GrantRef(5);

    /// All domains PV.
    #[must_use]
    pub fn pv() -> SceneBuilder {
        SceneBuilder::new([DomainKind::Pv; 4])
    }

    /// C is HVM, the others are PV.
    #[must_use]
    pub fn hvm() -> SceneBuilder {
        Scene::pv().kind(C, DomainKind::Hvm)
    }

    /// All domains Arm; tables can still become version 2, unlike with Xen's default there.
    #[must_use]
    pub fn arm() -> SceneBuilder {
        SceneBuilder::new([DomainKind::Arm; 4])
    }
}

impl SceneBuilder {
    fn new(kinds: [DomainKind; 4]) -> SceneBuilder {
        SceneBuilder {
            kinds,
            limits: [
                Limits::default(),
                Limits::default(),
                Limits::default(),
                Limits::default(),
            ],
            versions: [Version::V1; 4],
            config: Config::default(),
            narrow: false,
            iommu: false,
        }
    }

    /// Makes one of the four a domain of another kind.
    ///
    /// # Panics
    /// If `id` is not one of the four.
    #[must_use]
    pub fn kind(mut self, id: DomId, kind: DomainKind) -> SceneBuilder {
        self.kinds[usize::from(id.0)] = kind;
        self
    }

    /// Changes the limits of one of the four.
    ///
    /// # Panics
    /// If `id` is not one of the four.
    #[must_use]
    pub fn limits(mut self, id: DomId, change: impl FnOnce(&mut Limits)) -> SceneBuilder {
        change(&mut self.limits[usize::from(id.0)]);
        self
    }

    /// Changes the engine's settings; [`Config::reference`] is the machine's too.
    #[must_use]
    pub fn config(mut self, change: impl FnOnce(&mut Config)) -> SceneBuilder {
        change(&mut self.config);
        self
    }

    /// Makes engine and machine behave as Xen 4.17.7.
    #[must_use]
    pub fn v4_17(self) -> SceneBuilder {
        self.config(|config| config.reference = Reference::V4_17)
    }

    /// The version of one table, as set_version would leave it.
    ///
    /// # Panics
    /// If `id` is not one of the four.
    #[must_use]
    pub fn version(mut self, id: DomId, version: Version) -> SceneBuilder {
        self.versions[usize::from(id.0)] = version;
        self
    }

    /// G's table is version 1, which it is anyway.
    #[must_use]
    pub fn granter_v1(self) -> SceneBuilder {
        self.version(G, Version::V1)
    }

    /// G's table is version 2.
    #[must_use]
    pub fn granter_v2(self) -> SceneBuilder {
        self.version(G, Version::V2)
    }

    /// C runs in 32-bit mode.
    #[must_use]
    pub fn caller_32(mut self) -> SceneBuilder {
        self.narrow = true;
        self
    }

    /// C has an I/O MMU that follows its grant mappings.
    #[must_use]
    pub fn caller_iommu(mut self) -> SceneBuilder {
        self.iommu = true;
        self
    }

    /// The scene, with the engine directly on the machine.
    ///
    /// # Panics
    /// If the engine refuses the settings.
    #[must_use]
    pub fn build(self) -> Scene {
        self.build_on(|machine| machine)
    }

    /// The scene, with the engine on a wrapper of the machine.
    ///
    /// # Panics
    /// If the engine refuses the settings.
    #[must_use]
    pub fn build_on<H: Hypervisor<Domain = Guest>>(self, wrap: impl FnOnce(Machine) -> H) -> Scene<H> {
        let machine = Machine::with_reference(self.config.reference);
        let engine = Engine::new(wrap(machine.clone()), self.config);
        let make = |id: DomId| {
            let index = usize::from(id.0);
            let kind = self.kinds[index];
            let guest = machine.add_domain(id, kind).expect("the machine is empty");
            guest.set_control(id == P);
            guest.set_narrow(id == C && self.narrow);
            guest.set_iommu(id == C && self.iommu);
            if kind == DomainKind::Pv {
                guest.add_table(FIRST_PLACE).expect("there is memory");
            }
            let domain = engine
                .create_domain(id, kind, self.limits[index], guest)
                .unwrap_or_else(|error| panic!("the engine refuses {id}: {error}"));
            set_version(&engine, &domain, self.versions[index]);
            domain
        };
        let [p, g, c, t] = [P, G, C, T].map(make);
        let page = |domain: &Domain<H>| domain.private().add_page().expect("there is memory");
        let scene = Scene {
            frame: page(&g),
            frame2: page(&g),
            local: [page(&c), page(&c)],
            far: page(&t),
            control: page(&p),
            killed: Mutex::default(),
            engine,
            machine,
        };
        scene.grant(G, Scene::GREF, C, scene.frame, EntryFlags::empty());
        scene
    }
}

fn set_version<H: Hypervisor>(engine: &Engine<H>, domain: &Arc<Domain<H>>, version: Version) {
    if version != domain.version() {
        let mut cpu = engine.any_processor().expect("nobody acts yet");
        let vcpu = Vcpu::take(domain, 0).expect("nobody acts yet");
        cpu.set_version(&vcpu, version.number())
            .expect("an empty table changes its version");
    }
}

/// A place in a table at which a guest writes. Having one tells you: the entry exists.
struct Place<'a> {
    page: &'a PageWords,
    slot: usize,
}

impl<H: Hypervisor<Domain = Guest>> Scene<H> {
    /// One of the domains, as the engine has it; its [`Guest`] is
    /// [`private`](Domain::private).
    ///
    /// # Panics
    /// If there is none of that number.
    #[must_use]
    pub fn domain(&self, id: DomId) -> Arc<Domain<H>> {
        self.engine
            .domain(id)
            .unwrap_or_else(|| panic!("there is no domain {id}"))
    }

    /// The right to act as some processor.
    ///
    /// # Panics
    /// If all are in use.
    #[must_use]
    pub fn processor(&self) -> Processor<'_, H> {
        self.engine.any_processor().expect("a processor is free")
    }

    /// The right to act as a vCPU of a domain.
    ///
    /// # Panics
    /// If somebody has it, or there is no such vCPU.
    #[must_use]
    pub fn vcpu(&self, id: DomId, number: usize) -> Vcpu<H> {
        Vcpu::take(&self.domain(id), number)
            .unwrap_or_else(|| panic!("vCPU {number} of {id} is not to be had"))
    }

    /// Address number `number`, 0 to 511, at which every domain of the scene can map a grant.
    #[must_use]
    pub fn place(&self, number: u64) -> u64 {
        FIRST_PLACE + number % 512 * PAGE_SIZE as u64
    }

    // --- what guests do to their tables ---------------------------------------------------------

    /// Grants a page: writes an entry as the granter would, in the version of its table. `flags`
    /// are those beside the type.
    ///
    /// # Panics
    /// If the reference is beyond the table, or the frame too large for a version 1 entry.
    pub fn grant(&self, granter: DomId, gref: GrantRef, grantee: DomId, page: Page, flags: EntryFlags) {
        let head = EntryHead {
            flags: EntryFlags::PERMIT_ACCESS | flags,
            domid: grantee,
        };
        match self.domain(granter).version() {
            Version::V1 => {
                let frame = u32::try_from(page.gfn.0).expect("version 1 entries hold 32-bit frames");
                self.set_v1(granter, gref, EntryV1 { head, frame });
            }
            Version::V2 => {
                let body = EntryBodyV2::FullPage { frame: page.gfn.0 };
                self.set_v2(granter, gref, EntryV2::new(head, body));
            }
        }
    }

    /// Writes a version 1 entry as its domain would, whatever the table's version.
    ///
    /// # Panics
    /// If the reference is beyond the table.
    pub fn set_v1(&self, id: DomId, gref: GrantRef, entry: EntryV1) {
        self.shared(id, gref, V1_ENTRIES_PER_PAGE, |place| {
            SharedV1::new(place.page, place.slot).store(entry);
        });
    }

    /// Writes a version 2 entry as its domain would, whatever the table's version. Its status
    /// word stays.
    ///
    /// # Panics
    /// If the reference is beyond the table.
    pub fn set_v2(&self, id: DomId, gref: GrantRef, entry: EntryV2) {
        self.shared(id, gref, V2_ENTRIES_PER_PAGE, |place| {
            SharedV2::new(place.page, place.slot, place.page.status_row(0)).store(entry);
        });
    }

    /// Writes a status word as its domain could.
    ///
    /// # Panics
    /// If there is no such status word.
    pub fn set_status(&self, id: DomId, gref: GrantRef, status: EntryFlags) {
        let domain = self.domain(id);
        let page = domain.status_frame(gref.0 / STATUS_PER_PAGE);
        let page = page.unwrap_or_else(|| panic!("{id} has no status word {gref}"));
        let slot = (gref.0 % STATUS_PER_PAGE) as usize;
        let row = page.as_ref().status_row(slot / V2_ENTRIES_PER_PAGE as usize);
        SharedV2::new(page.as_ref(), slot % V2_ENTRIES_PER_PAGE as usize, row).store_status(status);
    }

    fn shared(&self, id: DomId, gref: GrantRef, per_page: u32, store: impl FnOnce(Place<'_>)) {
        let domain = self.domain(id);
        let page = domain.shared_frame(gref.0 / per_page);
        let page = page.unwrap_or_else(|| panic!("{id} has no entry {gref}"));
        store(Place {
            page: page.as_ref(),
            slot: (gref.0 % per_page) as usize,
        });
    }

    /// An entry as it lies in shared memory, with its status word.
    ///
    /// # Panics
    /// If the reference is beyond the table.
    #[must_use]
    pub fn entry(&self, id: DomId, gref: GrantRef) -> EntryWords {
        let view = self.processor().entry(id, gref);
        view.unwrap_or_else(|| panic!("{id} has no entry {gref}")).words
    }

    /// Type and flags of an entry; in version 2 with the status word's busy bits.
    ///
    /// # Panics
    /// If the reference is beyond the table.
    #[must_use]
    pub fn flags(&self, id: DomId, gref: GrantRef) -> EntryFlags {
        self.entry(id, gref).flags()
    }

    // --- the commonest calls --------------------------------------------------------------------

    /// C maps entry [`Scene::GREF`] of G.
    ///
    /// # Panics
    /// If vCPU 0 of C is in use.
    pub fn map(&self, host_addr: u64, flags: MapFlags) -> MapGrantRef {
        self.map_as(C, G, Scene::GREF, host_addr, flags)
    }

    /// A domain's vCPU 0 maps a grant.
    ///
    /// # Panics
    /// If the vCPU is in use.
    pub fn map_as(
        &self,
        caller: DomId,
        dom: DomId,
        gref: GrantRef,
        host_addr: u64,
        flags: MapFlags,
    ) -> MapGrantRef {
        let mut items = [MapGrantRef {
            host_addr,
            flags,
            gref,
            dom,
            ..MapGrantRef::default()
        }];
        self.processor().map(&self.vcpu(caller, 0), &mut items);
        let [item] = items;
        item
    }

    /// C unmaps a host mapping.
    ///
    /// # Panics
    /// If vCPU 0 of C is in use.
    pub fn unmap(&self, host_addr: u64, handle: GrantHandle) -> GrantStatus {
        let mut items = [UnmapGrantRef {
            host_addr,
            handle,
            ..UnmapGrantRef::default()
        }];
        self.processor().unmap(&self.vcpu(C, 0), &mut items);
        items[0].status
    }

    /// Ends a domain, from the mark to the memory (spec 7.2, 7.3). If others still use its
    /// pages, it stays until they let go.
    ///
    /// # Panics
    /// If a vCPU of it is in use.
    pub fn kill(&self, id: DomId) -> Retired {
        let domain = self.domain(id);
        domain.private().set_dying();
        self.engine.begin_teardown(&domain);
        let vcpus: Vec<Vcpu<H>> = (0..domain.limits().vcpus).map(|n| self.vcpu(id, n)).collect();
        while let Release::More { .. } = self.processor().release_mappings(&vcpus, 256) {}
        drop(vcpus);
        domain.private().drop_address_space();
        domain.private().give_up_memory();
        drop(domain);
        // Those killed earlier may have been waiting for what this one held.
        let mut killed = self.killed.lock();
        killed.push(id);
        let mut end = Retired::Gone;
        killed.retain(|held| {
            let retired = self.engine.retire(*held);
            if *held == id {
                end = retired;
            }
            retired == Retired::Held
        });
        end
    }

    /// Everything that is wrong, with engine and machine held against each other. For moments at
    /// which no operation is under way.
    #[must_use]
    pub fn audit(&self) -> Vec<Violation> {
        self.machine.audit_with(&self.engine)
    }
}

impl<H: Hypervisor> core::fmt::Debug for Scene<H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let domains: Vec<DomId> = self.engine.domains().collect();
        f.debug_struct("Scene")
            .field("domains", &domains)
            .finish_non_exhaustive()
    }
}
