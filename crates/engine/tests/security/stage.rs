//! The stage on which the tests play: a [`Scene`] whose every request can be counted, refused or
//! stopped at, raw hypercalls with a fence around them, and a [`Stage::finish`] that runs all audits
//! and takes the whole scene down.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use gnttab_abi::{
    Abi, CacheFlush, CacheOp, Command, Copy, CopyFlags, CopyPtr, DomId, EntryBodyV2, EntryFlags, EntryHead,
    EntryV1, EntryV2, GrantHandle, GrantRef, GrantStatus, MapFlags, MapGrantRef, Mfn, Op, Transfer,
    UnmapGrantRef,
};
use gnttab_engine::machine::{
    Answer, Between, Budget, C, Effort, Faults, Fenced, G, Guest, Machine, P, Page, Parked, Request, Scene,
    SceneBuilder, T, Verdict, Violation, Watch,
};
use gnttab_engine::{Call, GuestMemory, Hook, Outcome};

/// The hypervisor of a stage.
pub(crate) type Hv = Between<Machine, Eye>;

pub(crate) const RO: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);
pub(crate) const RW: MapFlags = MapFlags::HOST_MAP;
pub(crate) const DEV_RO: MapFlags = MapFlags::DEVICE_MAP.union(MapFlags::READONLY);
pub(crate) const DEV_RW: MapFlags = MapFlags::DEVICE_MAP;
pub(crate) const BOTH: MapFlags = MapFlags::HOST_MAP.union(MapFlags::DEVICE_MAP);

/// Entry 5 of G: one that survives a change of version.
pub(crate) const LOW: GrantRef = Scene::GREF;
/// An entry that forbids a change of version while it is in use.
pub(crate) const HIGH: GrantRef = GrantRef(20);
/// Where callers' argument arrays lie.
pub(crate) const ARGS: u64 = 0x5000_0000;

type Which = Box<dyn Fn(&Request) -> bool + Send>;
type Action = Box<dyn FnMut() + Send>;

/// Counts, refuses, and does something when it sees a request.
#[derive(Default)]
pub(crate) struct Eye {
    pub(crate) effort: Effort,
    pub(crate) faults: Faults,
    /// Who makes the call that is counted.
    counted: Mutex<Option<ThreadId>>,
    waiting: Mutex<Vec<(Which, Action)>>,
}

impl Eye {
    /// Does something just after each request of a kind.
    pub(crate) fn after_each(
        &self,
        which: impl Fn(&Request) -> bool + Send + 'static,
        action: impl FnMut() + Send + 'static,
    ) {
        let waiting = (Box::new(which) as Which, Box::new(action) as Action);
        lock(&self.waiting).push(waiting);
    }

    /// Does nothing any more when it sees a request.
    pub(crate) fn forget(&self) {
        lock(&self.waiting).clear();
    }
}

impl Watch for Eye {
    fn before(&self, request: &Request) -> Verdict {
        self.faults.before(request)
    }

    fn after(&self, request: &Request, answer: &Answer) {
        if *lock(&self.counted) == Some(thread::current().id()) {
            self.effort.after(request, answer);
        }
        // Taken out while they run: what they do asks for things too.
        let mut here: Vec<_> = {
            let mut waiting = lock(&self.waiting);
            waiting.extract_if(.., |(which, _)| which(request)).collect()
        };
        here.iter_mut().for_each(|(_, action)| action());
        lock(&self.waiting).append(&mut here);
    }
}

pub(crate) fn lock<X>(mutex: &Mutex<X>) -> std::sync::MutexGuard<'_, X> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module. Clones are the same stage.
#[derive(Clone)]
pub(crate) struct Stage(Arc<Scene<Hv>>);

impl Deref for Stage {
    type Target = Scene<Hv>;
    fn deref(&self) -> &Scene<Hv> {
        &self.0
    }
}

/// An actor that is stopped somewhere, until it is let go or the test fails.
pub(crate) struct Stopped<R> {
    parked: Option<Parked>,
    actor: JoinHandle<R>,
}

impl<R> Stopped<R> {
    /// Lets it go, and waits for what it has to say.
    pub(crate) fn go(mut self) -> R {
        self.parked.take();
        self.actor.join().expect("the actor panicked")
    }

    /// Lets it go without waiting.
    pub(crate) fn start(mut self) -> JoinHandle<R> {
        self.parked.take();
        self.actor
    }
}

impl Stage {
    /// C, G and T have four vCPUs each.
    pub(crate) fn new(builder: SceneBuilder) -> Stage {
        let builder = [C, G, T].into_iter().fold(builder, |builder, id| {
            builder.limits(id, |limits| limits.vcpus = 4)
        });
        Stage::exactly(builder)
    }

    /// With the builder's own limits.
    pub(crate) fn exactly(builder: SceneBuilder) -> Stage {
        let scene = builder.build_on(|machine| Between::new(machine, Eye::default()));
        scene.machine.hooks().set_relax(thread::yield_now);
        Stage(Arc::new(scene))
    }

    pub(crate) fn pv() -> Stage {
        Stage::new(Scene::pv())
    }

    pub(crate) fn v2() -> Stage {
        Stage::new(Scene::pv().granter_v2())
    }

    pub(crate) fn eye(&self) -> &Eye {
        self.engine.hypervisor().watch()
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.eye().faults
    }

    pub(crate) fn guest<X>(&self, id: DomId, f: impl FnOnce(&Guest) -> X) -> X {
        f(self.domain(id).private())
    }

    // --- interleavings --------------------------------------------------------------------------

    /// Another actor begins something and is stopped at a hook.
    pub(crate) fn stop<R: Send + 'static>(
        &self,
        hook: Hook,
        act: impl FnOnce(&Stage) -> R + Send + 'static,
    ) -> Stopped<R> {
        let parked = self.machine.hooks().park(hook);
        let actor = self.spawn(act);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !parked.arrived() {
            assert!(Instant::now() < deadline, "nobody came to {hook:?}");
            assert!(!actor.is_finished(), "it was over before {hook:?}");
            thread::yield_now();
        }
        Stopped {
            parked: Some(parked),
            actor,
        }
    }

    /// Another actor does something.
    pub(crate) fn spawn<R: Send + 'static>(
        &self,
        act: impl FnOnce(&Stage) -> R + Send + 'static,
    ) -> JoinHandle<R> {
        let stage = self.clone();
        thread::spawn(move || act(&stage))
    }

    /// Somebody else does something, once, in the middle of what reaches the hook.
    pub(crate) fn meanwhile(&self, hook: Hook, act: impl FnOnce(&Stage) + Send + 'static) {
        let stage = self.clone();
        self.machine.hooks().once(hook, move || act(&stage));
    }

    // --- what guests do -------------------------------------------------------------------------

    pub(crate) fn map_on(
        &self,
        (caller, vcpu): (DomId, usize),
        (dom, gref): (DomId, GrantRef),
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
        self.call(|| self.processor().map(&self.vcpu(caller, vcpu), &mut items));
        items[0]
    }

    /// C's vCPU maps an entry of G, which must work.
    pub(crate) fn mapped(&self, vcpu: usize, gref: GrantRef, place: u64, flags: MapFlags) -> GrantHandle {
        let item = self.map_on((C, vcpu), (G, gref), self.place(place), flags);
        assert_eq!(item.status, GrantStatus::OKAY);
        item.handle
    }

    /// C's vCPU unmaps a host mapping, a device mapping, or both: addresses of 0 name none.
    pub(crate) fn unmap_on(&self, vcpu: usize, handle: GrantHandle, host_addr: u64, bus: u64) -> GrantStatus {
        self.unmap_as((C, vcpu), handle, host_addr, bus)
    }

    pub(crate) fn unmap_as(
        &self,
        (caller, vcpu): (DomId, usize),
        handle: GrantHandle,
        host_addr: u64,
        dev_bus_addr: u64,
    ) -> GrantStatus {
        let mut items = [UnmapGrantRef {
            host_addr,
            dev_bus_addr,
            handle,
            ..UnmapGrantRef::default()
        }];
        self.call(|| self.processor().unmap(&self.vcpu(caller, vcpu), &mut items));
        items[0].status
    }

    /// A vCPU of some domain copies 8 bytes.
    pub(crate) fn copy_on(
        &self,
        (caller, vcpu): (DomId, usize),
        source: CopyPtr,
        dest: CopyPtr,
        flags: CopyFlags,
    ) -> GrantStatus {
        let mut items = [Copy {
            source,
            dest,
            len: 8,
            flags,
            ..Copy::default()
        }];
        self.call(|| self.processor().copy(&self.vcpu(caller, vcpu), &mut items));
        items[0].status
    }

    /// C's vCPU copies 8 bytes from, or to, the start of what an entry of G grants.
    pub(crate) fn copy_grant(&self, vcpu: usize, gref: GrantRef, write: bool) -> GrantStatus {
        let granted = CopyPtr::grant(G, gref, 0);
        let own = CopyPtr::frame(self.local[vcpu % 2].gfn.0, 0);
        if write {
            self.copy_on((C, vcpu), own, granted, CopyFlags::DEST_GREF)
        } else {
            self.copy_on((C, vcpu), granted, own, CopyFlags::SOURCE_GREF)
        }
    }

    pub(crate) fn transfer_as(
        &self,
        sender: DomId,
        mfn: Mfn,
        receiver: DomId,
        gref: GrantRef,
    ) -> GrantStatus {
        let mut items = [Transfer {
            mfn: mfn.0,
            domid: receiver,
            gref,
            ..Transfer::default()
        }];
        self.call(|| self.processor().transfer(&self.vcpu(sender, 0), &mut items));
        items[0].status
    }

    pub(crate) fn set_version(&self, id: DomId, version: u32) -> Result<(), gnttab_abi::Errno> {
        self.processor().set_version(&self.vcpu(id, 3), version)
    }

    /// C asks for cache maintenance of the start of a frame.
    pub(crate) fn flush_cache(&self, mfn: Mfn, op: CacheOp) -> Result<(), gnttab_abi::Errno> {
        let item = CacheFlush {
            dev_bus_addr: mfn.address(),
            length: 64,
            op,
            ..CacheFlush::default()
        };
        let done = self.call(|| self.processor().cache_flush(&self.vcpu(C, 0), &[item]));
        done.map_err(|(_, errno)| errno)
    }

    /// An entry that accepts a page.
    pub(crate) fn accept(&self, receiver: DomId, gref: GrantRef, sender: DomId, frame: u32) {
        let head = EntryHead {
            flags: EntryFlags::ACCEPT_TRANSFER,
            domid: sender,
        };
        if self.domain(receiver).version() == gnttab_engine::Version::V1 {
            self.set_v1(receiver, gref, EntryV1 { head, frame });
        } else {
            let body = EntryBodyV2::FullPage {
                frame: u64::from(frame),
            };
            self.set_v2(receiver, gref, EntryV2::new(head, body));
        }
    }

    /// G grants part of F, by a version 2 entry.
    pub(crate) fn grant_part(&self, gref: GrantRef, page_off: u16, length: u16) {
        let flags = EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE;
        let frame = self.frame.gfn.0;
        let body = EntryBodyV2::SubPage {
            page_off,
            length,
            frame,
        };
        self.set_v2(G, gref, EntryV2::new(EntryHead { flags, domid: C }, body));
    }

    /// T's entry 9 grants FT to G, and G passes it on to C.
    pub(crate) fn pass_on(&self, gref: GrantRef, flags: EntryFlags) {
        self.grant(T, GrantRef(9), G, self.far, EntryFlags::empty());
        self.pass_on_to((G, gref), C, (T, GrantRef(9)), flags);
    }

    pub(crate) fn pass_on_to(
        &self,
        (id, gref): (DomId, GrantRef),
        domid: DomId,
        (trans_domid, far): (DomId, GrantRef),
        flags: EntryFlags,
    ) {
        let flags = EntryFlags::TRANSITIVE | flags;
        let body = EntryBodyV2::Transitive {
            trans_domid,
            gref: far,
        };
        self.set_v2(id, gref, EntryV2::new(EntryHead { flags, domid }, body));
    }

    /// The busy marks of an entry.
    pub(crate) fn marks(&self, id: DomId, gref: GrantRef) -> EntryFlags {
        self.flags(id, gref) & EntryFlags::IN_USE
    }

    /// Pins of an entry: host writes and reads, device writes and reads.
    pub(crate) fn pins(&self, id: DomId, gref: GrantRef) -> [u8; 4] {
        let view = self.processor().entry(id, gref).expect("the entry exists");
        let pins = view.pins;
        [
            pins.host_write,
            pins.host_read,
            pins.device_write,
            pins.device_read,
        ]
    }

    pub(crate) fn bytes(&self, page: Page) -> [u8; 8] {
        let words = self.machine.page(page.mfn).expect("the frame is memory");
        words.read_bytes::<8>(0).expect("the bytes lie in the page")
    }

    pub(crate) fn fill(&self, page: Page, byte: u8) {
        let words = self.machine.page(page.mfn).expect("the frame is memory");
        assert!(words.write(0, &[byte; 4096]));
    }

    // --- the raw door ---------------------------------------------------------------------------

    /// Memory for a caller's arguments, from [`ARGS`] on.
    pub(crate) fn add_args(&self, id: DomId, pages: usize) -> Vec<Page> {
        self.guest(id, |guest| guest.add_memory(ARGS, pages))
            .expect("there is memory")
    }

    /// One raw hypercall of a domain's vCPU 0, fenced; continued until it is done. `wanted` says
    /// between items whether the processor is wanted elsewhere.
    pub(crate) fn hypercall(
        &self,
        caller: DomId,
        abi: Abi,
        call: Call,
        mut wanted: impl FnMut() -> bool,
    ) -> Result<(), gnttab_abi::Errno> {
        let mut call = call;
        for _ in 0..=call.count.min(1 << 16) + 4096 {
            match self.hypercall_once(caller, abi, call, &mut wanted) {
                Outcome::Done(done) => return done,
                Outcome::Continue(next) => call = next,
            }
        }
        panic!("AUD-WRK: a call that is continued for ever");
    }

    pub(crate) fn hypercall_once(
        &self,
        caller: DomId,
        abi: Abi,
        call: Call,
        wanted: &mut dyn FnMut() -> bool,
    ) -> Outcome {
        let domain = self.domain(caller);
        let memory = Fenced::around(domain.private(), abi, call);
        let outcome = self.counted(memory.items(), || {
            self.processor()
                .hypercall(&self.vcpu(caller, 0), abi, call, &memory, wanted)
        });
        assert_eq!(memory.audit(), [], "AUD-BUF");
        outcome
    }

    /// Argument memory as the guest itself sees it.
    pub(crate) fn poke(&self, id: DomId, addr: u64, bytes: &[u8]) {
        self.guest(id, |guest| guest.write(addr, bytes))
            .expect("its own memory");
    }

    pub(crate) fn peek<const N: usize>(&self, id: DomId, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.guest(id, |guest| guest.read(addr, &mut bytes))
            .expect("its own memory");
        bytes
    }

    // --- the end --------------------------------------------------------------------------------

    /// A call of one item. It is held to its budget, unless one that is counted already goes on.
    fn call<R>(&self, call: impl FnOnce() -> R) -> R {
        self.counted(1, call)
    }

    /// A call of so many items, held to its budget (AUD-WRK).
    pub(crate) fn counted<R>(&self, items: u64, call: impl FnOnce() -> R) -> R {
        let eye = self.eye();
        {
            let mut counted = lock(&eye.counted);
            if counted.is_some() {
                drop(counted);
                return call();
            }
            *counted = Some(thread::current().id());
        }
        let result = eye.effort.call(Budget::items(items), call);
        *lock(&eye.counted) = None;
        result
    }

    /// All audits, with no operation under way.
    pub(crate) fn audit(&self) -> Vec<Violation> {
        let mut found = self.0.audit();
        found.extend(self.eye().effort.audit());
        found
    }

    /// All audits; then everybody dies, grantees first, and nothing is left (QUIESCE).
    pub(crate) fn finish(self) {
        self.finish_in([C, T, P, G]);
    }

    /// As [`Stage::finish`], in that order.
    pub(crate) fn finish_in(self, order: [DomId; 4]) {
        self.machine.hooks().clear();
        self.eye().forget();
        self.faults().clear();
        self.machine.set_shortage(false);
        assert_eq!(self.audit(), [], "all audits");
        let ids: Vec<DomId> = self.engine.domains().collect();
        for id in &ids {
            // The list's count, and the one that is being looked through.
            let counts = Arc::strong_count(&self.domain(*id));
            assert_eq!(counts, 2, "AUD-LCK: somebody still holds {id}");
        }
        for id in order {
            // One that is dead already goes with what the others held of it.
            if self.engine.domain(id).is_some() {
                self.kill(id);
                assert_eq!(self.machine.audit(), [], "after the death of {id}");
            }
        }
        assert_eq!(self.engine.domains().count(), 0, "QUIESCE: everybody has gone");
        assert_eq!(
            self.machine.audit_idle(),
            [],
            "QUIESCE: every count is at its baseline"
        );
    }
}

/// A call of one operation.
pub(crate) fn call(op: Op, count: u32) -> Call {
    Call {
        command: Command(op.number()),
        addr: ARGS,
        count,
    }
}
