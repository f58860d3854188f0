//! `copy` (spec 5).
//!
//! The checks of an item, in order: the domains of both sides exist, source before destination;
//! policy; a source by frame says `DOMID_SELF`; the source's claim; the same for the destination,
//! and its page type; both ranges within a page; the source's granted range; the destination's.
//!
//! Between items of one call the claims of both sides are kept as long as they are for the same
//! thing. Where bytes move inside a table, and the next item does not look as if it wanted the same, what most
//! copies are is done in one go ([`Visit::copy_first`]), and nothing of it is kept. What must always hold:
//! 1. A kept claim is keyed by domains as written, by kind, and by reference or frame (D-1, D-3).
//! 2. A claim by grant is one pin and one page reference; the pin goes first (CPY-6). In one go the entry is held
//!    meanwhile, which is as good as a pin.
//! 3. The frame whose bytes move is the one that was referenced and typed (CPY-1).

use alloc::sync::Arc;

use gnttab_abi::{
    Copy, CopyFlags, CopyPtr, DomId, EntryFlags, EntryType, Gfn, GrantRef, GrantStatus, Mfn, Op, PAGE_SIZE,
};

use crate::active::{Extra, Pins, State, UseKind};
use crate::caller::Caller;
use crate::claim::{Wanted, begin_use, clear_marks, end_use, marks_to_clear};
use crate::domain::{Domain, Reference, Vcpu, Version};
use crate::engine::Processor;
use crate::hypervisor::{Access, FrameOwner, Hook, Hypervisor, Resolved};
use crate::map::{status_of, unpin};
use crate::registry::{LEAVE_AFTER, Visit};
use crate::sync::Ordering;
use crate::table::{Entry, SharedEntry};
use crate::unmap::put;

/// Times that a transitive item starts over when its entry changes underneath, before it fails
/// with *general_error* (D-4). Each restart needs the granter to interfere once more.
const RESTARTS: u32 = 64;

/// A claimed side. Having one tells you: the frame is referenced (and typed writable, for a
/// destination), and the range may be used until it is released.
#[derive(Debug)]
struct Buffer {
    key: Key,
    mfn: Mfn,
    span: Span,
    typed: bool,
}

/// What a kept buffer was claimed for: by grant, the granter and the reference; by frame, [`Key::FRAME`] and the
/// frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    granter: u32,
    what: u64,
}

impl Key {
    /// No domain's number.
    const FRAME: u32 = u32::MAX;

    #[inline(always)]
    fn grant(granter: DomId, gref: GrantRef) -> Key {
        Key {
            granter: granter.0.into(),
            what: gref.0.into(),
        }
    }

    #[inline(always)]
    fn frame(gmfn: u64) -> Key {
        Key {
            granter: Key::FRAME,
            what: gmfn,
        }
    }

    #[inline(always)]
    fn is_grant(self) -> bool {
        self.granter != Key::FRAME
    }

    /// Of a key by grant.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "as they were put in")]
    fn granted(self) -> (DomId, GrantRef) {
        (DomId(self.granter as u16), GrantRef(self.what as u32))
    }
}

/// What a call keeps from one item to the next.
pub(crate) struct Run<H: Hypervisor> {
    /// The pair of domains as written in the item, and who they are.
    pair: Option<Pair<H>>,
    source: Option<Buffer>,
    dest: Option<Buffer>,
}

/// Source and destination domain: as written, and who they are; `None` is the caller.
type Pair<H> = ((DomId, DomId), Option<Arc<Domain<H>>>, Option<Arc<Domain<H>>>);

/// A granter by number, and the domain that the policy was asked about, which may have died since and left
/// its number to another; `None`: the caller, or somebody that no policy is asked about.
type Granter<'a, H> = (DomId, Option<&'a Domain<H>>);

impl<H: Hypervisor> Run<H> {
    pub(crate) fn new() -> Run<H> {
        Run {
            pair: None,
            source: None,
            dest: None,
        }
    }

    #[inline(always)]
    fn keeps_nothing(&self) -> bool {
        self.source.is_none() && self.dest.is_none()
    }
}

/// Source and destination domain, where they are not the caller.
#[inline(always)]
fn domains_of<H: Hypervisor>(pair: Option<&Pair<H>>) -> (Option<&Domain<H>>, Option<&Domain<H>>) {
    match pair {
        Some((_, source, dest)) => (source.as_deref(), dest.as_deref()),
        None => (None, None),
    }
}

/// Why a use of an entry by grant was not had.
enum Refused {
    /// The granter changed the entry while it was let go: start over.
    Restart,
    With(GrantStatus),
}

impl From<GrantStatus> for Refused {
    fn from(status: GrantStatus) -> Refused {
        Refused::With(status)
    }
}

/// A use of an entry by grant.
struct Grip {
    mfn: Mfn,
    span: Span,
    /// Whether the writable type was had with the reference; `None`: not asked for.
    typed: Option<bool>,
}

#[inline]
fn pins_of(access: Access) -> Pins {
    match access {
        Access::Read => Pins::HOST_READ,
        Access::Write => Pins::HOST_WRITE,
    }
}

impl<H: Hypervisor> Processor<'_, H> {
    /// Copies bytes through grants, item after item. Every item's `status` is written; bytes move
    /// only for *okay*.
    pub fn copy(&mut self, vcpu: &Vcpu<H>, items: &mut [Copy]) {
        let (mut visit, caller) = (self.visit(&vcpu.domain), vcpu.caller());
        let mut run = Run::new();
        for index in 0..items.len() {
            if index.is_multiple_of(LEAVE_AFTER) {
                visit.leave();
            }
            if let Some((item, rest)) = items.get_mut(index..).and_then(<[Copy]>::split_first_mut) {
                let alone = rest.first().is_none_or(|next| shares_nothing(item, next));
                item.status = visit.copy_item(&caller, &mut run, item, alone);
            }
        }
        visit.end_copy(&mut run);
    }
}

impl<H: Hypervisor> Visit<'_, H> {
    /// One item, with what the call has kept so far; `alone` says that nothing of it is worth keeping for the next.
    #[inline(always)]
    pub(crate) fn copy_item(
        &mut self,
        caller: &Caller<'_, H>,
        run: &mut Run<H>,
        item: &Copy,
        alone: bool,
    ) -> GrantStatus {
        let status = match self.copy_one(caller.domain, run, item, alone) {
            Ok(()) => GrantStatus::OKAY,
            Err(status) => {
                self.drop_buffers(run);
                status
            }
        };
        let grant = if item.flags.contains(CopyFlags::SOURCE_GREF) {
            Some(&item.source)
        } else if item.flags.contains(CopyFlags::DEST_GREF) {
            Some(&item.dest)
        } else {
            None
        };
        let (peer, gref) = (grant.map(|side| side.domid), grant.map(|side| side.gref()));
        caller.answer(&self.engine.hv, Op::Copy, peer, gref, status);
        status
    }

    /// Releases what a call has kept; before it ends, is restarted, or fails.
    pub(crate) fn end_copy(&mut self, run: &mut Run<H>) {
        self.drop_buffers(run);
        run.pair = None;
    }

    #[inline(always)]
    fn copy_one(
        &mut self,
        caller: &Domain<H>,
        run: &mut Run<H>,
        item: &Copy,
        alone: bool,
    ) -> Result<(), GrantStatus> {
        // 0
        if item.len == 0 && self.engine.config.reference != Reference::V4_17 {
            self.begin_item();
            return Ok(());
        }
        // 1
        if run
            .pair
            .as_ref()
            .is_none_or(|kept| kept.0 != (item.source.domid, item.dest.domid))
            && let Err(status) = self.copy_domains(caller, run, (item.source.domid, item.dest.domid))
        {
            // Of two sides that are the caller's no table was entered, and so none left.
            self.begin_item();
            self.end_copy(run);
            return Err(status);
        }
        let by_grant = |flag| item.flags.contains(flag);
        let sides = (by_grant(CopyFlags::SOURCE_GREF), by_grant(CopyFlags::DEST_GREF));
        let done = if alone && run.keeps_nothing() && !self.engine.hv.copy_waits() {
            match sides {
                (true, false) => self.copy_first::<true>(caller, run, item),
                (false, true) => self.copy_first::<false>(caller, run, item),
                _ => None,
            }
        } else {
            None
        };
        if let Some(done) = done {
            return done;
        }
        let Copy {
            source, dest, len, ..
        } = *item;
        match sides {
            (true, false) => self.copy_kept::<true, false>(caller, run, source, dest, len),
            (false, true) => self.copy_kept::<false, true>(caller, run, source, dest, len),
            (true, true) => self.copy_kept::<true, true>(caller, run, source, dest, len),
            (false, false) => self.copy_kept::<false, false>(caller, run, source, dest, len),
        }
    }

    /// Steps 2 to 7 in one go of what most copies are: one side by grant, through an entry of a whole page that
    /// nobody uses. `None`, and nothing done, where something is otherwise. The table is not left meanwhile.
    #[inline(always)]
    fn copy_first<const FROM_GRANT: bool>(
        &mut self,
        caller: &Domain<H>,
        run: &Run<H>,
        item: &Copy,
    ) -> Option<Result<(), GrantStatus>> {
        let engine = self.engine;
        let hv = &engine.hv;
        let (source, dest) = domains_of(run.pair.as_ref());
        let (granted, own, judged) = if FROM_GRANT {
            (&item.source, &item.dest, source)
        } else {
            (&item.dest, &item.source, dest)
        };
        let access = if FROM_GRANT { Access::Read } else { Access::Write };
        // 4 to 6
        if by_frame_is_own(own, false).is_err() || check_ranges(item, Span::WHOLE, Span::WHOLE).is_err() {
            return None;
        }
        // 2, 3: the source first, for a claim that comes to nothing takes marks off the entry, whosever they were
        let granter = (number_of(granted, caller), judged);
        let room = self.enter_or_stay(granter.0)?;
        let entry = room.view.entry(granted.gref())?;
        if !room.is(granter.1) || (!FROM_GRANT && !entry.active.is_unused()) {
            return None;
        }
        let own_source = if FROM_GRANT {
            None
        } else {
            match frame_of(hv, caller, own.u, Access::Read) {
                Ok(mfn) => Some(mfn),
                Err(status) => return Some(Err(status)),
            }
        };
        // The claim of the entry stands for the pin.
        let claim = match entry.active.claim(State::default()) {
            Some(claim)
                if begin_use(hv, &entry.shared, false, caller.id(), access, Wanted::Whole).is_ok() =>
            {
                claim
            }
            _ => {
                if let Some(mfn) = own_source {
                    put(hv, mfn, false);
                }
                return None;
            }
        };
        let theirs = entry.shared.load_frame();
        let source = match own_source {
            Some(mfn) => Ok(mfn),
            None => frame_of(hv, room, theirs, Access::Read),
        };
        let (to, gfn) = if FROM_GRANT {
            (caller, own.u)
        } else {
            (&**room, theirs)
        };
        let dest = match source {
            Ok(_) => frame_of(hv, to, gfn, Access::Write),
            Err(status) => Err(status),
        };
        // 7
        if let (Ok(source), Ok(dest)) = (source, dest) {
            move_bytes(hv, item, source, dest, to);
        }
        // The marks and the claim go before the references that they stand for.
        end_use(&entry.shared, State::default(), access);
        drop(claim);
        if let Ok(mfn) = source {
            put(hv, mfn, false);
        }
        if let Ok(mfn) = dest {
            put(hv, mfn, true);
        }
        if room.is_dying() {
            self.leave();
            engine.reap(granter.0);
        }
        Some(dest.map(drop))
    }

    /// Steps 2 to 7 one by one, with what is kept, and to be kept, of each side. The item comes in parts, so that it
    /// needs no place in memory otherwise.
    #[inline(never)]
    fn copy_kept<const FROM_GRANT: bool, const TO_GRANT: bool>(
        &mut self,
        caller: &Domain<H>,
        run: &mut Run<H>,
        source: CopyPtr,
        dest: CopyPtr,
        len: u16,
    ) -> Result<(), GrantStatus> {
        let engine = self.engine;
        let item = Copy {
            source,
            dest,
            len,
            ..Copy::default()
        };
        self.begin_item();
        let (source_domain, dest_domain) = domains_of(run.pair.as_ref());
        // 2, 3
        by_frame_is_own(&item.source, FROM_GRANT)?;
        let judged = (source_domain, Access::Read);
        self.keep_or_claim(caller, &mut run.source, &item.source, FROM_GRANT, judged)?;
        by_frame_is_own(&item.dest, TO_GRANT)?;
        let judged = (dest_domain, Access::Write);
        self.keep_or_claim(caller, &mut run.dest, &item.dest, TO_GRANT, judged)?;
        let (Some(from), Some(to)) = (&run.source, &run.dest) else {
            return Err(GrantStatus::GENERAL_ERROR);
        };
        // 4 to 6
        check_ranges(&item, from.span, to.span)?;
        // 7, outside, where a copy may take its time: whoever wants a table alone need not wait for the bytes
        if engine.hv.copy_waits() {
            self.leave();
        }
        move_bytes(&engine.hv, &item, from.mfn, to.mfn, dest_domain.unwrap_or(caller));
        Ok(())
    }

    /// Step 1 where the pair is not the one before: both domains, and whether the policy lets bytes go from one
    /// to the other.
    #[inline(never)]
    fn copy_domains(
        &mut self,
        caller: &Domain<H>,
        run: &mut Run<H>,
        pair: (DomId, DomId),
    ) -> Result<(), GrantStatus> {
        self.end_copy(run);
        let source = self.copy_domain(caller, pair.0)?;
        let dest = self.copy_domain(caller, pair.1)?;
        let (from, to) = (
            source.as_deref().unwrap_or(caller),
            dest.as_deref().unwrap_or(caller),
        );
        if !self
            .engine
            .hv
            .may_copy(caller.private(), from.private(), to.private())
        {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        run.pair = Some((pair, source, dest));
        Ok(())
    }

    #[inline]
    fn copy_domain(&mut self, caller: &Domain<H>, id: DomId) -> Result<Option<Arc<Domain<H>>>, GrantStatus> {
        if id == DomId::SELF || id == caller.id() {
            return Ok(None);
        }
        self.hold(id).map(Some).ok_or(GrantStatus::BAD_DOMAIN)
    }

    /// Steps 2 and 3: the kept buffer if it is for the same thing, else a new claim (spec 5.3).
    #[inline(always)]
    fn keep_or_claim(
        &mut self,
        caller: &Domain<H>,
        place: &mut Option<Buffer>,
        side: &CopyPtr,
        by_grant: bool,
        (judged, access): (Option<&Domain<H>>, Access),
    ) -> Result<(), GrantStatus> {
        let engine = self.engine;
        let hv = &engine.hv;
        let domid = number_of(side, caller);
        let key = if by_grant {
            Key::grant(domid, side.gref())
        } else {
            Key::frame(side.u)
        };
        if place.as_ref().is_some_and(|kept| kept.key == key) {
            return Ok(());
        }
        if let Some(kept) = place.take() {
            self.drop_buffer(&kept, access);
        }
        let writes = access == Access::Write;
        let grip = if by_grant {
            self.acquire((domid, judged), side.gref(), caller.id(), access, true)?
        } else {
            let (resolved, typed) = resolve(hv, caller, Gfn(side.u), access, writes)?;
            Grip::whole(resolved.mfn, typed)
        };
        let typed = writes && grip.typed.unwrap_or_else(|| hv.get_writable(grip.mfn));
        let buffer = Buffer {
            key,
            mfn: grip.mfn,
            span: grip.span,
            typed,
        };
        if writes && !typed {
            self.drop_buffer(&buffer, access);
            return Err(GrantStatus::GENERAL_ERROR);
        }
        *place = Some(buffer);
        Ok(())
    }

    #[inline]
    fn drop_buffers(&mut self, run: &mut Run<H>) {
        if let Some(buffer) = run.source.take() {
            self.drop_buffer(&buffer, Access::Read);
        }
        if let Some(buffer) = run.dest.take() {
            self.drop_buffer(&buffer, Access::Write);
        }
    }

    #[inline(always)]
    fn drop_buffer(&mut self, buffer: &Buffer, access: Access) {
        let engine = self.engine;
        if buffer.key.is_grant() {
            self.release(buffer.key.granted(), access, (buffer.mfn, buffer.typed));
        } else {
            put(&engine.hv, buffer.mfn, buffer.typed);
        }
    }

    /// Acquires a use of an entry by grant: one pin in it, and one reference on the frame (spec
    /// 5.4). `user` must be the grantee; `transitive` says whether a far grant may be followed.
    #[inline(always)]
    fn acquire(
        &mut self,
        granter: Granter<'_, H>,
        gref: GrantRef,
        user: DomId,
        access: Access,
        transitive: bool,
    ) -> Result<Grip, GrantStatus> {
        let mut done = self.acquire_once(granter, gref, user, access, transitive);
        if matches!(done, Err(Refused::Restart)) {
            done = self.acquire_again(granter, gref, user, access, transitive);
        }
        done.map_err(|refused| match refused {
            Refused::With(status) => status,
            Refused::Restart => GrantStatus::GENERAL_ERROR,
        })
    }

    #[cold]
    fn acquire_again(
        &mut self,
        granter: Granter<'_, H>,
        gref: GrantRef,
        user: DomId,
        access: Access,
        transitive: bool,
    ) -> Result<Grip, Refused> {
        (1..RESTARTS)
            .map(|_| self.acquire_once(granter, gref, user, access, transitive))
            .find(|done| !matches!(done, Err(Refused::Restart)))
            .unwrap_or(Err(Refused::Restart))
    }

    #[inline(always)]
    fn acquire_once(
        &mut self,
        granter: Granter<'_, H>,
        gref: GrantRef,
        user: DomId,
        access: Access,
        transitive: bool,
    ) -> Result<Grip, Refused> {
        let engine = self.engine;
        let hv = &engine.hv;
        let domain = self.enter_judged(granter).ok_or(GrantStatus::BAD_DOMAIN)?;
        let view = &domain.view;
        // 1
        let entry = view.entry_to_use(gref)?;
        let wanted = pins_of(access);
        loop {
            // 2
            let state = entry.active.load();
            let pinned = state.is_pinned();
            if pinned && (state.grantee() != user || state.is_full_for(wanted)) {
                return Err(GrantStatus::GENERAL_ERROR.into());
            }
            let sufficient = suffices(state, access);
            // 3
            if view.version() == Version::V2 && entry.shared.load_head().flags.kind() == EntryType::Transitive
            {
                // 7a
                if !sufficient {
                    let Some(_claim) = entry.active.claim(state) else {
                        continue;
                    };
                    begin_use(hv, &entry.shared, pinned, user, access, Wanted::Transitive)
                        .map_err(|_| Refused::With(GrantStatus::GENERAL_ERROR))?;
                }
                // 7b
                let allowed = transitive && engine.config.transitive && domain.limits().transitive;
                let far = far_of(&entry);
                // 7c
                if !allowed || far.0 == granter.0 {
                    end_attempt(entry, state, access);
                    return Err(GrantStatus::GENERAL_ERROR.into());
                }
                domain.table.v2_ops.fetch_add(1, Ordering::SeqCst);
                return self.acquire_far(granter, gref, user, access, state, far);
            }
            // 5
            if sufficient {
                // A far domain's frame is not the granter's.
                if state.is_transitive() {
                    return Err(GrantStatus::BAD_DOMAIN.into());
                }
                if !entry.active.add_pins(state, wanted) {
                    continue;
                }
                let mfn = entry.active.mfn();
                let owner = hv.get_frame(mfn);
                if owner == Some(FrameOwner::Domain(granter.0)) && !domain.is_dying() {
                    let (span, typed) = (span_of(&entry, state), None);
                    return Ok(Grip { mfn, span, typed });
                }
                lower(domain, &entry, access, entry.active.load());
                if owner.is_some() {
                    hv.put_frame(mfn);
                }
                return Err(GrantStatus::BAD_DOMAIN.into());
            }
            // 4
            let Some(claim) = entry.active.claim(state) else {
                continue;
            };
            let head = begin_use(hv, &entry.shared, pinned, user, access, Wanted::Permit)
                .map_err(|_| Refused::With(GrantStatus::GENERAL_ERROR))?;
            let part = sub_page_of(&entry, head.flags);
            // Once for each few entries ever: room for what a part needs to be known by.
            if part.is_some() && entry.make_extra().is_err() {
                end_use(&entry.shared, state, access);
                return Err(GrantStatus::GENERAL_ERROR.into());
            }
            let gfn = Gfn(entry.shared.load_frame());
            // A far granter's frame goes without the type, which the last step may still take.
            let typed = access == Access::Write && transitive;
            let (resolved, typed) = match resolve(hv, domain, gfn, access, typed) {
                Ok(resolved) => resolved,
                Err(status) => {
                    end_use(&entry.shared, state, access);
                    return Err(status.into());
                }
            };
            if pinned {
                let same = resolved.mfn == entry.active.mfn()
                    && !state.is_transitive()
                    && (!state.is_partial() || part == Some(entry.extra()));
                if !same {
                    end_use(&entry.shared, state, access);
                    drop(claim);
                    put(hv, resolved.mfn, typed == Some(true));
                    return Err(GrantStatus::GENERAL_ERROR.into());
                }
                let span = span_of(&entry, state);
                claim.publish_more(wanted);
                return Ok(Grip {
                    mfn: resolved.mfn,
                    span,
                    typed,
                });
            }
            let kind = if part.is_some() {
                UseKind::SubPage
            } else {
                UseKind::Whole
            };
            if let Some(part) = part {
                entry.set_extra(part.kept());
                domain.table.v2_ops.fetch_add(1, Ordering::SeqCst);
            }
            let first = State::first(user, kind, wanted);
            let span = span_of(&entry, first);
            claim.publish_first(resolved.mfn, first);
            return Ok(Grip {
                mfn: resolved.mfn,
                span,
                typed,
            });
        }
    }

    /// Steps 7d to 7g: the far grant is acquired for the near granter, with the near table let go,
    /// and the near entry is pinned if it still is what it was.
    #[cold]
    fn acquire_far(
        &mut self,
        granter: Granter<'_, H>,
        gref: GrantRef,
        user: DomId,
        access: Access,
        seen: State,
        far: (DomId, GrantRef),
    ) -> Result<Grip, Refused> {
        let engine = self.engine;
        let hv = &engine.hv;
        self.leave();
        hv.hook(Hook::CopyUnlocked);
        // 7d, 7e
        let inner = if self.enter(far.0).is_none() {
            Err(GrantStatus::GENERAL_ERROR)
        } else {
            self.acquire((far.0, None), far.1, granter.0, access, false)
        };
        self.leave();
        hv.hook(Hook::CopyBack);
        // 7f
        let Some(domain) = self.enter_judged(granter) else {
            if let Ok(inner) = inner {
                self.release_far(far, access, (inner.mfn, inner.typed == Some(true)));
            }
            return Err(GrantStatus::BAD_DOMAIN.into());
        };
        let entry = domain.view.entry_to_use(gref);
        let pinned = match (&entry, &inner) {
            (Err(status), _) => Err((*status).into()),
            (Ok(entry), Err(status)) => {
                end_attempt(*entry, seen, access);
                Err((*status).into())
            }
            (Ok(entry), Ok(inner)) => pin_far(hv, entry, user, access, seen, far, inner.mfn),
        };
        // The first use keeps the count up for as long as it lasts (spec 2.4).
        if pinned.is_err() || seen.is_pinned() {
            domain.table.v2_ops.fetch_sub(1, Ordering::SeqCst);
        }
        if pinned.is_err()
            && let Ok(inner) = &inner
        {
            self.release_far(far, access, (inner.mfn, inner.typed == Some(true)));
        }
        pinned.and(inner.map_err(Refused::With))
    }

    /// Ends a use by grant (spec 5.5), and that of the far grant behind a transitive one. What was held of
    /// the frame, a reference and perhaps the type, is dropped after the pins and before its owner can go.
    #[inline(always)]
    fn release(&mut self, (granter, gref): (DomId, GrantRef), access: Access, held: (Mfn, bool)) {
        let engine = self.engine;
        let put = || put(&engine.hv, held.0, held.1);
        let Some(domain) = self.enter(granter) else {
            return put();
        };
        let Some(entry) = domain.view.entry(gref) else {
            return put();
        };
        // A pin of the caller's own is left: what the state says besides the pins is fixed.
        let state = entry.active.load();
        let far = state.is_transitive().then(|| entry.extra().far());
        if access == Access::Write {
            engine.hv.mark_dirty(domain.private(), entry.active.mfn());
        }
        lower(domain, &entry, access, state);
        if far.is_none() {
            put();
        }
        if domain.is_dying() {
            self.leave();
            engine.reap(granter);
        }
        if let Some(far) = far {
            self.release_far(far, access, held);
        }
    }

    #[cold]
    fn release_far(&mut self, far: (DomId, GrantRef), access: Access, held: (Mfn, bool)) {
        self.release(far, access, held);
    }
}

/// Takes a use by grant out of an entry's pins, and out of the table's count if it was the last
/// that depends on version 2 (spec 2.4). Whether it does is fixed while the entry is pinned.
#[inline(always)]
fn lower<H: Hypervisor>(domain: &Domain<H>, entry: &Entry<'_>, access: Access, seen: State) {
    if seen.is_partial() {
        return lower_partial(domain, *entry, access, seen);
    }
    unpin(*entry, seen, pins_of(access), access);
}

#[cold]
#[inline(never)]
fn lower_partial<H: Hypervisor>(domain: &Domain<H>, entry: Entry<'_>, access: Access, seen: State) {
    let ends = |left: State| !left.is_pinned();
    entry.active.drop_pins(
        seen,
        pins_of(access),
        |left| {
            let marks = marks_to_clear(left, access);
            (ends(left) || marks.is_some()).then_some((left, marks))
        },
        |(left, marks)| {
            if let Some(marks) = marks {
                clear_marks(&entry.shared, marks);
            }
            if ends(left) {
                domain.table.v2_ops.fetch_sub(1, Ordering::SeqCst);
            }
        },
    );
}

/// Bytes of a page that may be used: the first, and in the upper half how many. One word, which is
/// handed on as one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span(u32);

impl Span {
    const WHOLE: Span = Span::new(0, 4096);

    const fn new(start: u16, length: u16) -> Span {
        Span(start as u32 | (length as u32) << 16)
    }

    /// Whether bytes from `start` up to `end`, that one left out, are among them.
    #[inline(always)]
    fn has(self, (start, end): (u32, u32)) -> bool {
        let first = self.0 & 0xFFFF;
        start >= first && end <= first + (self.0 >> 16)
    }
}

impl Grip {
    fn whole(mfn: Mfn, typed: Option<bool>) -> Grip {
        let span = Span::WHOLE;
        Grip { mfn, span, typed }
    }
}

/// Steps 4 to 6: both ranges lie within a page, and within what was granted.
#[inline(always)]
fn check_ranges(item: &Copy, from: Span, to: Span) -> Result<(), GrantStatus> {
    let len = u32::from(item.len);
    let range = |side: &CopyPtr| (u32::from(side.offset), u32::from(side.offset) + len);
    let (source, dest) = (range(&item.source), range(&item.dest));
    let page = u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX);
    if source.1 > page || dest.1 > page {
        return Err(GrantStatus::BAD_COPY_ARG);
    }
    if !from.has(source) || !to.has(dest) {
        return Err(GrantStatus::GENERAL_ERROR);
    }
    Ok(())
}

/// Step 7; `owner` is the destination's domain.
#[inline(always)]
fn move_bytes<H: Hypervisor>(hv: &H, item: &Copy, from: Mfn, to: Mfn, owner: &Domain<H>) {
    hv.hook(Hook::CopyMapped);
    hv.copy((from, item.source.offset), (to, item.dest.offset), item.len);
    hv.mark_dirty(owner.private(), to);
}

/// Whether two items look as if neither side were the same.
#[inline(always)]
pub(crate) fn shares_nothing(item: &Copy, next: &Copy) -> bool {
    item.source.u != next.source.u && item.dest.u != next.dest.u
}

/// The domain that a side names.
#[inline(always)]
fn number_of<H: Hypervisor>(side: &CopyPtr, caller: &Domain<H>) -> DomId {
    if side.domid == DomId::SELF {
        caller.id()
    } else {
        side.domid
    }
}

/// A frame of a domain's with a reference, and with the writable type if it is to be written.
#[inline(always)]
fn frame_of<H: Hypervisor>(hv: &H, domain: &Domain<H>, gfn: u64, access: Access) -> Result<Mfn, GrantStatus> {
    let writes = access == Access::Write;
    let (Resolved { mfn, .. }, typed) = resolve(hv, domain, Gfn(gfn), access, writes)?;
    if writes && typed != Some(true) {
        put(hv, mfn, false);
        return Err(GrantStatus::GENERAL_ERROR);
    }
    Ok(mfn)
}

/// Finds a frame and takes a reference on it, with the writable type where it is wanted and can be had
/// along with it.
#[inline(always)]
fn resolve<H: Hypervisor>(
    hv: &H,
    domain: &Domain<H>,
    gfn: Gfn,
    access: Access,
    typed: bool,
) -> Result<(Resolved, Option<bool>), GrantStatus> {
    let resolved = if typed {
        hv.resolve_writable(domain.private(), gfn)
            .map(|(resolved, had)| (resolved, Some(had)))
    } else {
        hv.resolve(domain.private(), gfn, access)
            .map(|resolved| (resolved, None))
    };
    resolved.map_err(status_of)
}

/// Whether the uses that an entry is in need no look at the shared entry for one more.
#[inline]
fn suffices(state: State, access: Access) -> bool {
    state.is_pinned() && (access == Access::Read || state.is_write_pinned())
}

/// A side by frame must say `DOMID_SELF`, and neither another id nor the caller's own number. Asked
/// for every item, whatever is kept (D-1), before the side is claimed: a real Xen looks for both
/// domains first, and claims the source before it minds what the destination says.
#[inline]
fn by_frame_is_own(side: &CopyPtr, by_grant: bool) -> Result<(), GrantStatus> {
    if by_grant || side.domid == DomId::SELF {
        Ok(())
    } else {
        Err(GrantStatus::PERMISSION_DENIED)
    }
}

/// What an entry in a given state gives; of a transitive one, what its far entry gives, which this does
/// not know.
#[inline(always)]
fn span_of(entry: &Entry<'_>, state: State) -> Span {
    if state.is_partial() && !state.is_transitive() {
        let (start, length) = entry.extra().range();
        Span::new(start, length)
    } else {
        Span::WHOLE
    }
}

/// The part that a sub-page entry grants, as it is written, read once. Of the offset 15 bits are kept
/// (spec 2.3), so that a use with more bits is never found unchanged when it is to become a write.
#[inline(always)]
fn sub_page_of(entry: &Entry<'_>, flags: EntryFlags) -> Option<Extra> {
    match &entry.shared {
        SharedEntry::V2(shared) if flags.contains(EntryFlags::SUB_PAGE) => {
            let (page_off, length) = shared.load_halves();
            Some(Extra::sub_page(page_off, length))
        }
        _ => None,
    }
}

/// Where a transitive entry leads, read once.
#[inline]
fn far_of(entry: &Entry<'_>) -> (DomId, GrantRef) {
    match &entry.shared {
        SharedEntry::V2(shared) => {
            let (trans_domid, _) = shared.load_halves();
            let [a, b, c, d, ..] = shared.load_frame().to_le_bytes();
            (DomId(trans_domid), GrantRef(u32::from_le_bytes([a, b, c, d])))
        }
        SharedEntry::V1(_) => (DomId::INVALID, GrantRef::INVALID),
    }
}

/// Takes back the marks of an attempt on a transitive entry, as far as the pins that are there
/// now do not justify them (PIN-7).
#[cold]
fn end_attempt(entry: Entry<'_>, seen: State, access: Access) {
    if suffices(seen, access) {
        return;
    }
    loop {
        let now = entry.active.load();
        if let Some(_claim) = entry.active.claim(now) {
            end_use(&entry.shared, now, access);
            return;
        }
    }
}

/// Steps 7f and 7g on the near entry: pinned, if nothing has changed since `seen`.
fn pin_far<H: Hypervisor>(
    hv: &H,
    entry: &Entry<'_>,
    user: DomId,
    access: Access,
    seen: State,
    far: (DomId, GrantRef),
    mfn: Mfn,
) -> Result<(), Refused> {
    let wanted = pins_of(access);
    let extra = Extra::transitive(far.0, far.1);
    let same_use =
        !seen.is_pinned() || (seen.is_transitive() && entry.active.mfn() == mfn && entry.extra() == extra);
    let Some(claim) = entry.active.claim(seen).filter(|_| same_use) else {
        end_attempt(*entry, seen, access);
        return Err(Refused::Restart);
    };
    // Somebody else's use may have come and gone since the marks were set: set them again.
    if !suffices(seen, access)
        && begin_use(
            hv,
            &entry.shared,
            seen.is_pinned(),
            user,
            access,
            Wanted::Transitive,
        )
        .is_err()
    {
        end_use(&entry.shared, seen, access);
        return Err(Refused::Restart);
    }
    if seen.is_pinned() {
        claim.publish_more(wanted);
    } else {
        if entry.make_extra().is_err() {
            end_use(&entry.shared, seen, access);
            return Err(Refused::Restart);
        }
        entry.set_extra(extra);
        claim.publish_first(mfn, State::first(user, UseKind::Transitive, wanted));
    }
    Ok(())
}

#[cfg(feature = "machine")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{C, Check, G, Scene};

    /// Every item gives way, one too that is refused before it comes to a table.
    #[test]
    fn an_item_that_the_policy_refuses_gives_way_to_who_wants_the_table_alone() {
        let scene = Scene::pv().build();
        scene
            .machine
            .set_rule(|check| matches!(check, Check::Copy(_, C, C)).then_some(false));
        let own = CopyPtr::frame(scene.local[0].gfn.0, 0);
        let granted = Copy {
            source: CopyPtr::grant(G, Scene::GREF, 0),
            dest: own,
            len: 8,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        let refused = Copy {
            source: own,
            flags: CopyFlags::empty(),
            ..granted
        };
        // Of such a copy nothing is kept, and the table not left.
        scene.machine.work_inside(true);
        let (mut cpu, vcpu, granter) = (scene.processor(), scene.vcpu(C, 0), scene.domain(G));
        let (mut visit, caller, mut run) = (cpu.visit(&vcpu.domain), vcpu.caller(), Run::new());
        // The first makes the entry's state.
        for _ in 0..2 {
            let status = visit.copy_item(&caller, &mut run, &granted, true);
            assert_eq!(status, GrantStatus::OKAY);
            if !run.keeps_nothing() {
                visit.end_copy(&mut run);
            }
        }
        assert!(run.keeps_nothing() && scene.engine.registry.is_anybody_inside());
        granter.table.gate.shut();
        let status = visit.copy_item(&caller, &mut run, &refused, true);
        let kept = scene.engine.registry.is_anybody_inside();
        granter.table.gate.open();
        assert_eq!((status, kept), (GrantStatus::PERMISSION_DENIED, false));
    }
}
