//! A hypervisor with somebody in between who sees, and may refuse, what the engine asks.

use gnttab_abi::{CacheOp, DomId, Errno, Gfn, MapFlags, Mfn};

use super::Guest;
use super::request::{Answer, Request};
use crate::hypervisor::{
    Access, FrameOwner, Hook, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError, Resolved,
    StealError,
};
use crate::observe::Answered;

/// Whether a request goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It does.
    #[default]
    Proceed,
    /// It fails as if the hypervisor could not do it. Requests that cannot fail go through.
    Refuse,
    /// It fails for now: a look-up answers "try again"; the others as for [`Verdict::Refuse`].
    RefuseForNow,
}

/// Who stands in between.
pub trait Watch: Send + Sync {
    /// Before a request that can fail: whether it goes through.
    fn before(&self, request: &Request) -> Verdict {
        let _ = request;
        Verdict::Proceed
    }

    /// After every request, with its answer, refused ones included.
    fn after(&self, request: &Request, answer: &Answer) {
        let _ = (request, answer);
    }
}

/// What a hypervisor keeps for a domain, if it knows the domain's number.
pub trait Identified {
    /// The number.
    fn domid(&self) -> DomId;
}

impl Identified for Guest {
    fn domid(&self) -> DomId {
        self.id()
    }
}

/// A hypervisor with a [`Watch`] in front of it. [`Traced`](super::Traced) and
/// [`Faulty`](super::Faulty) are two; they can be put in front of each other.
///
/// ```
/// use core::sync::atomic::{AtomicU32, Ordering};
///
/// use gnttab_abi::MapFlags;
/// use gnttab_engine::machine::{Answer, Between, Request, Scene, Watch};
///
/// /// Counts the flushes, which is what one would like to see few of.
/// #[derive(Default)]
/// struct Flushes(AtomicU32);
///
/// impl Watch for Flushes {
///     fn after(&self, request: &Request, _answer: &Answer) {
///         if let Request::Flush { .. } = request {
///             self.0.fetch_add(1, Ordering::Relaxed);
///         }
///     }
/// }
///
/// let scene = Scene::pv().build_on(|machine| Between::new(machine, Flushes::default()));
/// let mapped = scene.map(scene.place(0), MapFlags::HOST_MAP);
/// scene.unmap(scene.place(0), mapped.handle);
/// assert_eq!(scene.engine.hypervisor().watch().0.load(Ordering::Relaxed), 1);
/// ```
#[derive(Clone, Debug)]
pub struct Between<H, W> {
    hv: H,
    watch: W,
}

impl<H, W> Between<H, W> {
    /// `watch` in front of `hv`.
    pub fn new(hv: H, watch: W) -> Between<H, W> {
        Between { hv, watch }
    }

    /// The hypervisor behind.
    pub fn inner(&self) -> &H {
        &self.hv
    }

    /// Who stands in between.
    pub fn watch(&self) -> &W {
        &self.watch
    }
}

impl<H: Hypervisor, W: Watch> Between<H, W> {
    /// A request that can fail.
    fn ask<T>(
        &self,
        request: Request,
        refused: impl FnOnce(Verdict) -> T,
        call: impl FnOnce(&H) -> T,
        show: impl FnOnce(&T) -> Answer,
    ) -> T {
        let answer = match self.watch.before(&request) {
            Verdict::Proceed => call(&self.hv),
            verdict => refused(verdict),
        };
        self.watch.after(&request, &show(&answer));
        answer
    }

    /// A request that cannot fail.
    fn tell<T>(&self, request: Request, call: impl FnOnce(&H) -> T, show: impl FnOnce(&T) -> Answer) -> T {
        let answer = call(&self.hv);
        self.watch.after(&request, &show(&answer));
        answer
    }
}

fn yes_or_no(answer: &bool) -> Answer {
    if *answer { Answer::Yes } else { Answer::No }
}

fn done((): &()) -> Answer {
    Answer::Done
}

fn host(answer: &Result<(), HostError>) -> Answer {
    match answer {
        Ok(()) => Answer::Done,
        Err(HostError) => Answer::Failed("no such mapping can be made or removed there"),
    }
}

fn errno(answer: &Result<(), Errno>) -> Answer {
    match answer {
        Ok(()) => Answer::Done,
        Err(errno) => Answer::Errno(*errno),
    }
}

fn stolen(answer: &Result<(), StealError>) -> Answer {
    match answer {
        Ok(()) => Answer::Done,
        Err(StealError::BadPage) => Answer::Failed("not a free page of the domain"),
        Err(StealError::Failed) => Answer::Failed("it could not be done"),
    }
}

impl<H, W> Hypervisor for Between<H, W>
where
    H: Hypervisor<Domain: Identified>,
    W: Watch,
{
    type Domain = H::Domain;
    type TablePage = H::TablePage;

    fn resolve(&self, domain: &H::Domain, gfn: Gfn, access: Access) -> Result<Resolved, ResolveError> {
        let request = Request::Resolve {
            domain: domain.domid(),
            gfn,
            access,
        };
        let refused = |verdict| match verdict {
            Verdict::RefuseForNow => Err(ResolveError::Again),
            _ => Err(ResolveError::BadPage),
        };
        let show = |answer: &Result<Resolved, ResolveError>| match answer {
            Ok(resolved) => Answer::Resolved(*resolved),
            Err(ResolveError::BadPage) => Answer::Failed("not a page that the domain may grant"),
            Err(ResolveError::Again) => Answer::Failed("the page is not there yet"),
        };
        self.ask(request, refused, |hv| hv.resolve(domain, gfn, access), show)
    }

    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        let show = |answer: &Option<FrameOwner>| match answer {
            Some(owner) => Answer::Owner(*owner),
            None => Answer::Failed("the frame is on its way out"),
        };
        self.ask(Request::GetFrame(mfn), |_| None, |hv| hv.get_frame(mfn), show)
    }

    fn put_frame(&self, mfn: Mfn) {
        self.tell(Request::PutFrame(mfn), |hv| hv.put_frame(mfn), done);
    }

    fn get_writable(&self, mfn: Mfn) -> bool {
        self.ask(
            Request::GetWritable(mfn),
            |_| false,
            |hv| hv.get_writable(mfn),
            yes_or_no,
        )
    }

    fn put_writable(&self, mfn: Mfn) {
        self.tell(Request::PutWritable(mfn), |hv| hv.put_writable(mfn), done);
    }

    fn copy_waits(&self) -> bool {
        self.hv.copy_waits()
    }

    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16) {
        self.tell(
            Request::Copy { source, dest, len },
            |hv| hv.copy(source, dest, len),
            done,
        );
    }

    fn mark_dirty(&self, granter: &H::Domain, mfn: Mfn) {
        let request = Request::MarkDirty {
            granter: granter.domid(),
            mfn,
        };
        self.tell(request, |hv| hv.mark_dirty(granter, mfn), done);
    }

    fn map_host(&self, grantee: &H::Domain, mapping: &HostMapping) -> Result<(), HostError> {
        let request = Request::MapHost {
            grantee: grantee.domid(),
            mapping: *mapping,
        };
        self.ask(
            request,
            |_| Err(HostError),
            |hv| hv.map_host(grantee, mapping),
            host,
        )
    }

    fn unmap_host(&self, grantee: &H::Domain, unmapping: &HostUnmapping) -> Result<(), HostError> {
        let request = Request::UnmapHost {
            grantee: grantee.domid(),
            unmapping: *unmapping,
        };
        self.ask(
            request,
            |_| Err(HostError),
            |hv| hv.unmap_host(grantee, unmapping),
            host,
        )
    }

    fn flush(&self, grantee: &H::Domain) {
        let request = Request::Flush {
            grantee: grantee.domid(),
        };
        self.tell(request, |hv| hv.flush(grantee), done);
    }

    fn flush_waits(&self, grantee: &H::Domain) -> bool {
        self.hv.flush_waits(grantee)
    }

    fn crash(&self, domain: &H::Domain, why: &'static str) {
        let request = Request::Crash {
            domain: domain.domid(),
            why,
        };
        self.tell(request, |hv| hv.crash(domain, why), done);
    }

    fn is_held(&self, domain: &H::Domain) -> bool {
        let request = Request::IsHeld {
            domain: domain.domid(),
        };
        self.tell(request, |hv| hv.is_held(domain), yes_or_no)
    }

    fn alloc_table_page(&self, domain: &H::Domain) -> Option<H::TablePage> {
        let show = |answer: &Option<H::TablePage>| match answer {
            Some(page) => Answer::Frame(self.hv.table_page_mfn(page)),
            None => Answer::Failed("no memory"),
        };
        let request = Request::AllocTablePage {
            domain: domain.domid(),
        };
        self.ask(request, |_| None, |hv| hv.alloc_table_page(domain), show)
    }

    fn table_page_mfn(&self, page: &H::TablePage) -> Mfn {
        let mfn = self.hv.table_page_mfn(page);
        self.tell(
            Request::TablePageMfn { page: mfn },
            |_| mfn,
            |mfn| Answer::Frame(*mfn),
        )
    }

    fn table_page_gfn(&self, domain: &H::Domain, page: &H::TablePage) -> Gfn {
        let mfn = self.hv.table_page_mfn(page);
        let request = Request::TablePageGfn {
            domain: domain.domid(),
            page: mfn,
        };
        self.tell(
            request,
            |hv| hv.table_page_gfn(domain, page),
            |gfn| Answer::Gfn(*gfn),
        )
    }

    fn retract_table_page(&self, domain: &H::Domain, page: &H::TablePage) -> bool {
        let mfn = self.hv.table_page_mfn(page);
        let request = Request::RetractTablePage {
            domain: domain.domid(),
            page: mfn,
        };
        self.ask(
            request,
            |_| false,
            |hv| hv.retract_table_page(domain, page),
            yes_or_no,
        )
    }

    fn restore_table_page(&self, domain: &H::Domain, page: &H::TablePage) {
        let mfn = self.hv.table_page_mfn(page);
        let request = Request::RestoreTablePage {
            domain: domain.domid(),
            page: mfn,
        };
        self.tell(request, |hv| hv.restore_table_page(domain, page), done);
    }

    fn renew_table_page(&self, domain: &H::Domain, page: &H::TablePage) {
        let mfn = self.hv.table_page_mfn(page);
        let request = Request::RenewTablePage {
            domain: domain.domid(),
            page: mfn,
        };
        self.tell(request, |hv| hv.renew_table_page(domain, page), done);
    }

    fn place_table_page(&self, domain: &H::Domain, page: &H::TablePage, gfn: Gfn) -> Result<(), Errno> {
        let mfn = self.hv.table_page_mfn(page);
        let request = Request::PlaceTablePage {
            domain: domain.domid(),
            page: mfn,
            gfn,
        };
        let call = |hv: &H| hv.place_table_page(domain, page, gfn);
        self.ask(request, |_| Err(Errno::NoMem), call, errno)
    }

    fn map_foreign(&self, caller: &H::Domain, gfn: Gfn, mfn: Mfn) -> Result<(), Errno> {
        let request = Request::MapForeign {
            caller: caller.domid(),
            gfn,
            mfn,
        };
        let call = |hv: &H| hv.map_foreign(caller, gfn, mfn);
        self.ask(request, |_| Err(Errno::NoMem), call, errno)
    }

    fn is_control(&self, domain: &H::Domain) -> bool {
        let request = Request::IsControl {
            domain: domain.domid(),
        };
        self.tell(request, |hv| hv.is_control(domain), yes_or_no)
    }

    fn is_device_model_of(&self, caller: &H::Domain, target: &H::Domain) -> bool {
        let request = Request::IsDeviceModelOf {
            caller: caller.domid(),
            target: target.domid(),
        };
        self.tell(request, |hv| hv.is_device_model_of(caller, target), yes_or_no)
    }

    fn may_map(&self, caller: &H::Domain, granter: &H::Domain, flags: MapFlags) -> bool {
        let request = Request::MayMap {
            caller: caller.domid(),
            granter: granter.domid(),
            flags,
        };
        self.ask(
            request,
            |_| false,
            |hv| hv.may_map(caller, granter, flags),
            yes_or_no,
        )
    }

    fn may_unmap(&self, caller: &H::Domain, granter: &H::Domain) -> bool {
        let request = Request::MayUnmap {
            caller: caller.domid(),
            granter: granter.domid(),
        };
        self.ask(request, |_| false, |hv| hv.may_unmap(caller, granter), yes_or_no)
    }

    fn may_copy(&self, caller: &H::Domain, source: &H::Domain, dest: &H::Domain) -> bool {
        let request = Request::MayCopy {
            caller: caller.domid(),
            source: source.domid(),
            dest: dest.domid(),
        };
        self.ask(
            request,
            |_| false,
            |hv| hv.may_copy(caller, source, dest),
            yes_or_no,
        )
    }

    fn may_transfer(&self, caller: &H::Domain, receiver: &H::Domain) -> bool {
        let request = Request::MayTransfer {
            caller: caller.domid(),
            receiver: receiver.domid(),
        };
        self.ask(
            request,
            |_| false,
            |hv| hv.may_transfer(caller, receiver),
            yes_or_no,
        )
    }

    fn may_setup(&self, caller: &H::Domain, target: &H::Domain) -> bool {
        let request = Request::MaySetup {
            caller: caller.domid(),
            target: target.domid(),
        };
        self.ask(request, |_| false, |hv| hv.may_setup(caller, target), yes_or_no)
    }

    fn may_query(&self, caller: &H::Domain, target: &H::Domain) -> bool {
        let request = Request::MayQuery {
            caller: caller.domid(),
            target: target.domid(),
        };
        self.ask(request, |_| false, |hv| hv.may_query(caller, target), yes_or_no)
    }

    fn query_errno(&self) -> Errno {
        self.tell(Request::QueryErrno, H::query_errno, |errno| Answer::Errno(*errno))
    }

    fn may_grant_io(&self, granter: &H::Domain, mfn: Mfn) -> bool {
        let request = Request::MayGrantIo {
            granter: granter.domid(),
            mfn,
        };
        self.ask(request, |_| false, |hv| hv.may_grant_io(granter, mfn), yes_or_no)
    }

    fn iommu_follows(&self, grantee: &H::Domain) -> bool {
        let request = Request::IommuFollows {
            grantee: grantee.domid(),
        };
        self.tell(request, |hv| hv.iommu_follows(grantee), yes_or_no)
    }

    fn iommu_set(&self, grantee: &H::Domain, mfn: Mfn, access: Option<Access>) -> Result<(), HostError> {
        let request = Request::IommuSet {
            grantee: grantee.domid(),
            mfn,
            access,
        };
        self.ask(
            request,
            |_| Err(HostError),
            |hv| hv.iommu_set(grantee, mfn, access),
            host,
        )
    }

    fn cache_flush(&self, mfn: Mfn, offset: u16, length: u16, op: CacheOp) -> Result<(), Errno> {
        let request = Request::CacheFlush {
            mfn,
            offset,
            length,
            op,
        };
        let call = |hv: &H| hv.cache_flush(mfn, offset, length, op);
        self.ask(request, |_| Err(Errno::OpNotSupp), call, errno)
    }

    fn frame_owner(&self, mfn: Mfn) -> Result<Option<DomId>, ResolveError> {
        let show = |answer: &Result<Option<DomId>, ResolveError>| match answer {
            Ok(owner) => Answer::Domain(*owner),
            Err(_) => Answer::Failed("no such frame"),
        };
        let refused = |_| Err(ResolveError::BadPage);
        self.ask(Request::FrameOwner(mfn), refused, |hv| hv.frame_owner(mfn), show)
    }

    fn steal(&self, from: &H::Domain, mfn: Mfn) -> Result<(), StealError> {
        let request = Request::Steal {
            from: from.domid(),
            mfn,
        };
        self.ask(
            request,
            |_| Err(StealError::Failed),
            |hv| hv.steal(from, mfn),
            stolen,
        )
    }

    fn free_stolen(&self, mfn: Mfn) {
        self.tell(Request::FreeStolen(mfn), |hv| hv.free_stolen(mfn), done);
    }

    fn replace_stolen(&self, mfn: Mfn, receiver: &H::Domain) -> Result<Mfn, StealError> {
        let request = Request::ReplaceStolen {
            mfn,
            receiver: receiver.domid(),
        };
        let show = |answer: &Result<Mfn, StealError>| match answer {
            Ok(mfn) => Answer::Frame(*mfn),
            Err(_) => Answer::Failed("there is no such page"),
        };
        let call = |hv: &H| hv.replace_stolen(mfn, receiver);
        self.ask(request, |_| Err(StealError::Failed), call, show)
    }

    fn fits(&self, receiver: &H::Domain, mfn: Mfn) -> bool {
        let request = Request::Fits {
            receiver: receiver.domid(),
            mfn,
        };
        self.tell(request, |hv| hv.fits(receiver, mfn), yes_or_no)
    }

    fn reserve(&self, receiver: &H::Domain) -> Result<(), StealError> {
        let request = Request::Reserve {
            receiver: receiver.domid(),
        };
        self.ask(
            request,
            |_| Err(StealError::Failed),
            |hv| hv.reserve(receiver),
            stolen,
        )
    }

    fn unreserve(&self, receiver: &H::Domain) {
        let request = Request::Unreserve {
            receiver: receiver.domid(),
        };
        self.tell(request, |hv| hv.unreserve(receiver), done);
    }

    fn assign(&self, receiver: &H::Domain, mfn: Mfn) -> Result<(), StealError> {
        let request = Request::Assign {
            receiver: receiver.domid(),
            mfn,
        };
        self.ask(
            request,
            |_| Err(StealError::Failed),
            |hv| hv.assign(receiver, mfn),
            stolen,
        )
    }

    fn install(&self, receiver: &H::Domain, mfn: Mfn, gfn: Gfn) -> Result<(), HostError> {
        let request = Request::Install {
            receiver: receiver.domid(),
            mfn,
            gfn,
        };
        self.ask(
            request,
            |_| Err(HostError),
            |hv| hv.install(receiver, mfn, gfn),
            host,
        )
    }

    fn now(&self) -> u64 {
        self.tell(Request::Now, H::now, |now| Answer::Time(*now))
    }

    fn answered(&self, answered: &Answered) {
        self.hv.answered(answered);
    }

    fn hook(&self, hook: Hook) {
        self.tell(Request::Hook(hook), |hv| hv.hook(hook), done);
    }
}
