//! A complete hypervisor in memory, for tests, fuzzing, examples and documentation.
//!
//! It knows frames with owners, references and types; PV domains with real level-1 page tables;
//! translated domains (HVM and PVH, Arm) with physmaps; I/O MMUs, policies, transfers, shortage
//! and death. It decides nothing that is the engine's to decide: it is an honest
//! [`Hypervisor`], strict in its books. Whoever breaks them finds it in [`Machine::audit`].
//!
//! | to | use |
//! |---|---|
//! | begin with four domains and a grant | [`Scene`] |
//! | set domains up, be them, look at them | [`Guest`], which is also a [`GuestMemory`](crate::GuestMemory) for the raw door |
//! | look at frames, run out of memory, choose a policy | [`Machine`] |
//! | recompute every count and right | [`Scene::audit`], [`Machine::audit_with`], [`Machine::audit_idle`] |
//! | see what a call costs, and what it touches of its caller's memory | [`Effort`], [`Fenced`] |
//! | stop or act in the middle of an operation | [`Machine::hooks`] |
//! | see, or fail, what the engine asks | [`Traced`], [`Faulty`], or a [`Watch`] of one's own |
//!
//! ```
//! use gnttab_abi::{EntryFlags, GrantStatus, MapFlags};
//! use gnttab_engine::machine::{C, Faulty, G, Request, Scene, Traced};
//! use gnttab_engine::{DomainKind, GuestMemory};
//!
//! // An HVM domain maps a page of a PV domain; every call is traced, and may be made to fail.
//! let wrap = |machine| Traced::tracing(Faulty::failing(machine), 100);
//! let scene = Scene::pv().kind(C, DomainKind::Hvm).granter_v2().build_on(wrap);
//! let faults = scene.engine.hypervisor().inner().watch();
//! faults.fail_nth(1, |request| matches!(request, Request::Resolve { .. }));
//! let place = scene.place(0);
//! assert_eq!(scene.map(place, MapFlags::HOST_MAP).status, GrantStatus::BAD_PAGE);
//! assert_eq!(scene.map(place, MapFlags::HOST_MAP).status, GrantStatus::OKAY);
//! scene.domain(C).private().write(place, b"through the mapping").unwrap();
//!
//! // The grantee dies; the granter has its page back, and no book is wrong.
//! scene.kill(C);
//! assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
//! assert_eq!(scene.audit(), []);
//! for event in scene.engine.hypervisor().watch().take() {
//!     println!("{event}");
//! }
//! ```
//!
//! What must always hold:
//! 1. One lock guards all state; it is never held while anybody else's code runs: not the
//!    engine's, not a hook's, not a policy rule's. It also means that this machine says nothing
//!    about how the engine scales.
//! 2. Nothing that a guest or the engine asks for panics. Misuse by the engine is recorded as a
//!    [`Violation`] and otherwise ignored. (Misuse of a [`Scene`] by a test panics.)
//! 3. Following the reference is this machine's job only where the specification says what the
//!    backend does (spec 3.7, 4.2, 4.4, 4.5, 4.6, 6.2, 7); each place names its section.

mod audit;
mod between;
mod books;
mod effort;
mod faulty;
mod fenced;
mod frames;
mod guest;
mod hooks;
mod p2m;
mod policy;
mod pv;
mod request;
mod scene;
mod state;
mod traced;
mod transfer;

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use gnttab_abi::{CacheOp, DomId, Errno, Gfn, MapFlags, Mfn};
use spin::{Mutex, MutexGuard};

pub use audit::{Audit, Justified, Violation};
pub use between::{Between, Identified, Verdict, Watch};
pub use effort::{Budget, Effort};
pub use faulty::{Faults, Faulty};
pub use fenced::Fenced;
pub use frames::{FrameInfo, POISON, PageOwner, PageType};
pub use guest::{Guest, Page};
pub use hooks::{Hooks, Parked};
pub use p2m::P2mEntry;
pub use policy::{BasePolicy, Check};
pub use pv::{L2Slot, Pte};
pub use request::{Answer, Request};
pub use scene::{C, G, P, Scene, SceneBuilder, T};
pub use state::CacheFlushed;
pub use traced::{Event, Trace, Traced};

use crate::domain::Reference;
use crate::hypervisor::{
    Access, DomainKind, FrameOwner, Hook, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError,
    Resolved, StealError,
};
use crate::shared::PageWords;
use state::{DomainState, State};

/// The machine. Clones are the same machine: one goes into the engine, one stays with the test.
///
/// ```
/// use gnttab_abi::{DomId, Gfn};
/// use gnttab_engine::machine::Machine;
/// use gnttab_engine::{Access, Config, DomainKind, Engine, Hypervisor, Limits};
///
/// let machine = Machine::new();
/// let engine = Engine::new(machine.clone(), Config::default());
/// let guest = machine.add_domain(DomId(1), DomainKind::Hvm).unwrap();
/// let domain = engine.create_domain(DomId(1), DomainKind::Hvm, Limits::default(), guest).unwrap();
///
/// let page = domain.private().add_page().unwrap();
/// let resolved = machine.resolve(domain.private(), page.gfn, Access::Read).unwrap();
/// assert_eq!(resolved.mfn, page.mfn);
/// machine.put_frame(resolved.mfn);
/// assert_eq!(machine.audit_idle(), []);
/// ```
#[derive(Clone)]
pub struct Machine(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    hooks: Hooks,
    clock: AtomicU64,
    inside: AtomicBool,
}

/// A domain could not be added to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has a domain {0} already")]
pub struct Exists(pub DomId);

impl Machine {
    /// A machine without domains, that behaves as [`Reference::Head`].
    #[must_use]
    pub fn new() -> Machine {
        Machine::with_reference(Reference::Head)
    }

    /// A machine without domains, that behaves as the given Xen. The engine's
    /// [`Config::reference`](crate::Config::reference) should say the same.
    #[must_use]
    pub fn with_reference(reference: Reference) -> Machine {
        Machine(Arc::new(Inner {
            state: Mutex::new(State::new(reference)),
            hooks: Hooks::default(),
            clock: AtomicU64::new(0),
            inside: AtomicBool::new(false),
        }))
    }

    /// Has the engine copy and flush inside tables ([`Hypervisor::copy_waits`], [`Hypervisor::flush_waits`]), or,
    /// as at first, outside: who listens there may use the engine only then. To be said before the engine is used.
    pub fn work_inside(&self, inside: bool) {
        self.0.inside.store(inside, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    /// A domain without memory; it is the engine's to keep
    /// ([`Engine::create_domain`](crate::Engine::create_domain)).
    ///
    /// # Errors
    /// [`Exists`] if there is one of that number.
    pub fn add_domain(&self, id: DomId, kind: DomainKind) -> Result<Guest, Exists> {
        let mut state = self.lock();
        if state.domains.contains_key(&id) {
            return Err(Exists(id));
        }
        state.domains.insert(id, DomainState::new(kind));
        Ok(Guest::new(self.clone(), id, kind))
    }

    /// Makes a frame number stand for a device's registers; false if it is memory in use.
    pub fn add_io_frame(&self, mfn: Mfn) -> bool {
        self.lock().frames.allocate_at(mfn, PageOwner::Io)
    }

    /// A frame in use that nobody owns.
    #[must_use]
    pub fn add_unowned_frame(&self) -> Mfn {
        self.lock().frames.allocate(PageOwner::Nobody)
    }

    /// A frame of the copy-on-write pseudo domain, for [`P2mEntry::Shared`].
    #[must_use]
    pub fn add_shared_frame(&self) -> Mfn {
        self.lock().frames.allocate(PageOwner::CopyOnWrite)
    }

    /// What is known of a frame; `None` if the number is no frame.
    #[must_use]
    pub fn frame(&self, mfn: Mfn) -> Option<FrameInfo> {
        self.lock().frames.get(mfn).map(|frame| frame.info)
    }

    /// The bytes of a frame, as whoever maps it sees them, now and later.
    #[must_use]
    pub fn page(&self, mfn: Mfn) -> Option<Arc<PageWords>> {
        self.lock().frames.live(mfn).map(|frame| Arc::clone(&frame.words))
    }

    /// Takes a reference by hand, as a tool that maps the frame does; false if it cannot be had.
    #[must_use]
    pub fn hold(&self, mfn: Mfn) -> bool {
        let mut state = self.lock();
        let done = state.frames.reference(mfn).is_some();
        if done && let Some(frame) = state.frames.get_mut(mfn) {
            frame.held += 1;
        }
        done
    }

    /// Ends [`Machine::hold`].
    pub fn let_go(&self, mfn: Mfn) {
        let mut state = self.lock();
        if let Some(frame) = state.frames.get_mut(mfn) {
            frame.held = frame.held.saturating_sub(1);
        }
        state.put(mfn);
    }

    /// Runs the machine out of memory, or ends that.
    pub fn set_shortage(&self, shortage: bool) {
        self.lock().shortage = shortage;
    }

    /// Runs the machine out of memory below 2^32, or ends that.
    pub fn set_low_shortage(&self, shortage: bool) {
        self.lock().low_shortage = shortage;
    }

    /// Chooses between Xen's policies.
    pub fn set_policy(&self, base: BasePolicy) {
        self.lock().policy.base = base;
    }

    /// Puts a rule in front of the policy: `Some` decides, `None` leaves it to the policy.
    ///
    /// ```
    /// use gnttab_engine::machine::{Check, Machine};
    ///
    /// let machine = Machine::new();
    /// machine.set_rule(|check| matches!(check, Check::Unmap(..)).then_some(false));
    /// ```
    pub fn set_rule(&self, rule: impl Fn(&Check) -> Option<bool> + Send + Sync + 'static) {
        self.lock().policy.rule = Some(Arc::new(rule));
    }

    /// What a denied get_version answers: `-EPERM`, or a policy module's `-EACCES`.
    pub fn set_query_errno(&self, errno: Errno) {
        self.lock().policy.query_errno = errno;
    }

    /// Sets the clock, in nanoseconds.
    pub fn set_clock(&self, now: u64) {
        self.0.clock.store(now, Ordering::Relaxed);
    }

    /// Maintenance of data caches so far, in order.
    #[must_use]
    pub fn cache_flushes(&self) -> Vec<CacheFlushed> {
        self.lock().cache_flushes.clone()
    }

    /// What the engine printed on the console, which it does for dump_table.
    #[must_use]
    pub fn console(&self) -> String {
        self.lock().console.clone()
    }

    /// Where tests stop or act in the middle of an operation.
    #[must_use]
    pub fn hooks(&self) -> &Hooks {
        &self.0.hooks
    }

    fn allows(&self, check: Check) -> bool {
        let rule = self.lock().policy.rule.clone();
        match rule.and_then(|rule| rule(&check)) {
            Some(answer) => answer,
            None => self.lock().base_allows(&check),
        }
    }
}

impl Default for Machine {
    fn default() -> Self {
        Machine::new()
    }
}

impl core::fmt::Debug for Machine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Machine(..)")
    }
}

/// A page of a grant table: a special frame of its domain, given up when dropped.
pub struct TablePage {
    machine: Machine,
    mfn: Mfn,
    words: Arc<PageWords>,
}

impl TablePage {
    /// Its frame.
    #[must_use]
    pub fn mfn(&self) -> Mfn {
        self.mfn
    }
}

impl AsRef<PageWords> for TablePage {
    fn as_ref(&self) -> &PageWords {
        &self.words
    }
}

impl Drop for TablePage {
    fn drop(&mut self) {
        self.machine.lock().give_up(self.mfn);
    }
}

impl core::fmt::Debug for TablePage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "TablePage({})", self.mfn)
    }
}

impl Hypervisor for Machine {
    type Domain = Guest;
    type TablePage = TablePage;

    fn resolve(&self, domain: &Guest, gfn: Gfn, access: Access) -> Result<Resolved, ResolveError> {
        let mut state = self.lock();
        match domain.kind() {
            DomainKind::Pv => state.resolve_pv(domain.id(), gfn),
            DomainKind::Hvm | DomainKind::Arm => state.resolve_translated(domain.id(), gfn, access),
        }
    }

    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        let mut state = self.lock();
        match state.frames.reference(mfn)? {
            PageOwner::Domain(id) => Some(FrameOwner::Domain(id)),
            PageOwner::CopyOnWrite => Some(FrameOwner::CopyOnWrite),
            PageOwner::Io => Some(FrameOwner::Io),
            PageOwner::Nobody | PageOwner::Free => {
                state.put(mfn);
                None
            }
        }
    }

    fn put_frame(&self, mfn: Mfn) {
        self.lock().put(mfn);
    }

    fn get_writable(&self, mfn: Mfn) -> bool {
        self.lock().get_type(mfn)
    }

    fn put_writable(&self, mfn: Mfn) {
        self.lock().put_type(mfn);
    }

    fn copy_waits(&self) -> bool {
        !self.0.inside.load(Ordering::Relaxed)
    }

    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16) {
        let (from, to) = {
            let mut state = self.lock();
            (state.words(source.0), state.words(dest.0))
        };
        // A missing page was recorded by `words`.
        if let (Some(from), Some(to)) = (from, to)
            && !PageWords::copy(&from, source.1, &to, dest.1, len)
        {
            let what = alloc::format!("a copy of {len} bytes passes the end of a page");
            self.lock().violation(Audit::Memory, Some(dest.0), what);
        }
    }

    fn mark_dirty(&self, granter: &Guest, mfn: Mfn) {
        self.lock().domain_mut(granter.id()).dirty.insert(mfn);
    }

    fn map_host(&self, grantee: &Guest, mapping: &HostMapping) -> Result<(), HostError> {
        let mut state = self.lock();
        match grantee.kind() {
            DomainKind::Pv => state.pv_map(grantee.id(), mapping),
            DomainKind::Hvm => state.hvm_map(grantee.id(), mapping),
            DomainKind::Arm => state.arm_map(grantee.id(), mapping),
        }
    }

    fn unmap_host(&self, grantee: &Guest, unmapping: &HostUnmapping) -> Result<(), HostError> {
        let mut state = self.lock();
        match grantee.kind() {
            DomainKind::Pv => state.pv_unmap(grantee.id(), unmapping),
            DomainKind::Hvm | DomainKind::Arm => state.translated_unmap(grantee.id(), unmapping),
        }
    }

    fn flush(&self, grantee: &Guest) {
        let mut state = self.lock();
        let domain = state.domain_mut(grantee.id());
        domain.flushes += 1;
        domain.stale.clear();
    }

    fn flush_waits(&self, _: &Guest) -> bool {
        !self.0.inside.load(Ordering::Relaxed)
    }

    fn crash(&self, domain: &Guest, why: &'static str) {
        self.lock().domain_mut(domain.id()).crashes.push(why);
    }

    fn is_held(&self, domain: &Guest) -> bool {
        self.lock().is_held(domain.id())
    }

    fn alloc_table_page(&self, domain: &Guest) -> Option<TablePage> {
        let mut state = self.lock();
        let mfn = state.allocate(domain.id(), true)?;
        let words = state.words(mfn)?;
        Some(TablePage {
            machine: self.clone(),
            mfn,
            words,
        })
    }

    fn table_page_mfn(&self, page: &TablePage) -> Mfn {
        page.mfn
    }

    fn table_page_gfn(&self, domain: &Guest, page: &TablePage) -> Gfn {
        if domain.kind() == DomainKind::Pv {
            return Gfn(page.mfn.0);
        }
        self.lock().gfn_of(domain.id(), page.mfn).unwrap_or(Gfn::INVALID)
    }

    fn retract_table_page(&self, domain: &Guest, page: &TablePage) -> bool {
        self.lock().retract(domain.id(), page.mfn)
    }

    fn restore_table_page(&self, domain: &Guest, page: &TablePage) {
        self.lock().restore(domain.id(), page.mfn);
    }

    fn renew_table_page(&self, domain: &Guest, page: &TablePage) {
        self.lock().renew(domain.id(), page.mfn);
    }

    fn place_table_page(&self, domain: &Guest, page: &TablePage, gfn: Gfn) -> Result<(), Errno> {
        self.lock().place(domain.id(), page.mfn, gfn)
    }

    fn map_foreign(&self, caller: &Guest, gfn: Gfn, mfn: Mfn) -> Result<(), Errno> {
        self.lock().map_foreign(caller.id(), gfn, mfn)
    }

    fn is_control(&self, domain: &Guest) -> bool {
        self.lock().domain(domain.id()).control
    }

    fn is_device_model_of(&self, caller: &Guest, target: &Guest) -> bool {
        self.lock().domain(caller.id()).targets.contains(&target.id())
    }

    fn may_map(&self, caller: &Guest, granter: &Guest, flags: MapFlags) -> bool {
        self.allows(Check::Map(caller.id(), granter.id(), flags))
    }

    fn may_unmap(&self, caller: &Guest, granter: &Guest) -> bool {
        self.allows(Check::Unmap(caller.id(), granter.id()))
    }

    fn may_copy(&self, caller: &Guest, source: &Guest, dest: &Guest) -> bool {
        self.allows(Check::Copy(caller.id(), source.id(), dest.id()))
    }

    fn may_transfer(&self, caller: &Guest, receiver: &Guest) -> bool {
        self.allows(Check::Transfer(caller.id(), receiver.id()))
    }

    fn may_setup(&self, caller: &Guest, target: &Guest) -> bool {
        self.allows(Check::Setup(caller.id(), target.id()))
    }

    fn may_query(&self, caller: &Guest, target: &Guest) -> bool {
        self.allows(Check::Query(caller.id(), target.id()))
    }

    fn query_errno(&self) -> Errno {
        self.lock().policy.query_errno
    }

    fn may_grant_io(&self, granter: &Guest, mfn: Mfn) -> bool {
        self.lock().domain(granter.id()).io_frames.contains(&mfn)
    }

    fn iommu_follows(&self, grantee: &Guest) -> bool {
        self.lock().domain(grantee.id()).iommu.is_some()
    }

    fn iommu_set(&self, grantee: &Guest, mfn: Mfn, access: Option<Access>) -> Result<(), HostError> {
        let mut state = self.lock();
        let iommu = state.domain_mut(grantee.id()).iommu.as_mut().ok_or(HostError)?;
        if iommu.failing {
            return Err(HostError);
        }
        match access {
            Some(access) => iommu.rights.insert(mfn, access),
            None => iommu.rights.remove(&mfn),
        };
        Ok(())
    }

    fn cache_flush(&self, mfn: Mfn, offset: u16, length: u16, op: CacheOp) -> Result<(), Errno> {
        let mut state = self.lock();
        let x86 = match state.frames.owner(mfn) {
            Some(PageOwner::Domain(id)) => state
                .domains
                .get(&id)
                .is_none_or(|domain| domain.kind != DomainKind::Arm),
            _ => false,
        };
        if x86 && op == CacheOp::INVAL {
            return Err(Errno::OpNotSupp);
        }
        state.cache_flushes.push(CacheFlushed {
            mfn,
            offset,
            length,
            op,
        });
        Ok(())
    }

    fn frame_owner(&self, mfn: Mfn) -> Result<Option<DomId>, ResolveError> {
        match self.lock().frames.get(mfn).map(|frame| frame.info.owner) {
            None | Some(PageOwner::Io) => Err(ResolveError::BadPage),
            Some(PageOwner::Domain(id)) => Ok(Some(id)),
            Some(PageOwner::CopyOnWrite | PageOwner::Nobody | PageOwner::Free) => Ok(None),
        }
    }

    fn steal(&self, from: &Guest, mfn: Mfn) -> Result<(), StealError> {
        self.lock().steal(from.id(), mfn)
    }

    fn free_stolen(&self, mfn: Mfn) {
        self.lock().free_stolen(mfn);
    }

    fn replace_stolen(&self, mfn: Mfn, receiver: &Guest) -> Result<Mfn, StealError> {
        self.lock().replace_stolen(mfn, receiver.id())
    }

    fn fits(&self, receiver: &Guest, mfn: Mfn) -> bool {
        mfn.0 < self.lock().domain(receiver.id()).frame_limit
    }

    fn reserve(&self, receiver: &Guest) -> Result<(), StealError> {
        self.lock().reserve(receiver.id())
    }

    fn unreserve(&self, receiver: &Guest) {
        self.lock().unreserve(receiver.id());
    }

    fn assign(&self, receiver: &Guest, mfn: Mfn) -> Result<(), StealError> {
        self.lock().assign(receiver.id(), mfn)
    }

    fn install(&self, receiver: &Guest, mfn: Mfn, gfn: Gfn) -> Result<(), HostError> {
        self.lock().install(receiver.id(), mfn, gfn)
    }

    fn now(&self) -> u64 {
        self.0.clock.load(Ordering::Relaxed)
    }

    fn hook(&self, hook: Hook) {
        self.0.hooks.reached(hook);
    }
}
