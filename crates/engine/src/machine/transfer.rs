//! Pages on their way from one domain to another (spec 3.7).
//!
//! What must always hold: a stolen page has no owner and no reference, so nobody can get at it;
//! it leaves that state by [`State::free_stolen`] or [`State::assign`] only (TRN-1, TRN-3).

use gnttab_abi::{DomId, Gfn, Mfn, PAGE_SIZE};

use super::audit::Audit;
use super::frames::{HIGH, PageOwner};
use super::state::State;
use crate::hypervisor::{DomainKind, HostError, StealError};
use crate::shared::PageWords;

/// Bytes of a page, as the copy takes them.
const WHOLE: u16 = 4096;
const _: () = assert!(WHOLE as usize == PAGE_SIZE);

impl State {
    /// Spec 3.7 steps 2 and 3.
    pub(super) fn steal(&mut self, from: DomId, mfn: Mfn) -> Result<(), StealError> {
        let sender = self.domain(from);
        if sender.kind.is_external() {
            return Err(StealError::Failed);
        }
        let iommu_fails = sender.iommu_fails();
        let frame = self.frames.live(mfn).ok_or(StealError::BadPage)?;
        let info = frame.info;
        let free = info.allocated && info.references == 1;
        if info.owner != PageOwner::Domain(from) || info.special || !free {
            return Err(StealError::BadPage);
        }
        if iommu_fails {
            return Err(StealError::Failed);
        }
        self.set_owner(mfn, PageOwner::Nobody);
        let sender = self.domain_mut(from);
        sender.pages = sender.pages.saturating_sub(1);
        sender.flushes += 1;
        Ok(())
    }

    fn set_owner(&mut self, mfn: Mfn, owner: PageOwner) {
        if let Some(frame) = self.frames.get_mut(mfn) {
            let owned = owner != PageOwner::Nobody;
            frame.info.owner = owner;
            frame.info.references = u64::from(owned);
            frame.info.allocated = owned;
            frame.info.physical = Gfn::INVALID;
        }
    }

    fn is_stolen(&self, mfn: Mfn) -> bool {
        self.frames
            .live(mfn)
            .is_some_and(|frame| frame.info.owner == PageOwner::Nobody && frame.info.references == 0)
    }

    /// Reports a page that is not on its way anywhere.
    fn check_stolen(&mut self, mfn: Mfn) -> bool {
        let stolen = self.is_stolen(mfn);
        if !stolen {
            let what = alloc::string::String::from("a transfer used it without having taken it");
            self.violation(Audit::References, Some(mfn), what);
        }
        stolen
    }

    pub(super) fn free_stolen(&mut self, mfn: Mfn) {
        if self.check_stolen(mfn) {
            self.free(mfn);
        }
    }

    /// Spec 3.7 step 7.
    pub(super) fn replace_stolen(&mut self, mfn: Mfn, receiver: DomId) -> Result<Mfn, StealError> {
        if !self.check_stolen(mfn) || self.shortage || self.low_shortage {
            return Err(StealError::Failed);
        }
        let new = self.frames.allocate(PageOwner::Nobody);
        self.set_owner(new, PageOwner::Nobody);
        if new.0 >= HIGH.min(self.domain(receiver).frame_limit) {
            self.free(new);
            return Err(StealError::Failed);
        }
        if let (Some(old), Some(new)) = (self.words(mfn), self.words(new)) {
            let copied = PageWords::copy(&old, 0, &new, 0, WHOLE);
            debug_assert!(copied, "a whole page fits a page");
        }
        self.free(mfn);
        Ok(new)
    }

    /// Spec 3.7 steps 8 and 9.
    pub(super) fn reserve(&mut self, receiver: DomId) -> Result<(), StealError> {
        let state = self.domain_mut(receiver);
        if state.dying || state.pages >= state.max_pages {
            return Err(StealError::Failed);
        }
        state.pages += 1;
        Ok(())
    }

    pub(super) fn unreserve(&mut self, receiver: DomId) {
        let state = self.domain_mut(receiver);
        state.pages = state.pages.saturating_sub(1);
    }

    /// Spec 3.7 step 11: a reservation becomes the page.
    pub(super) fn assign(&mut self, receiver: DomId, mfn: Mfn) -> Result<(), StealError> {
        if self.domain(receiver).dying || !self.check_stolen(mfn) {
            return Err(StealError::Failed);
        }
        self.set_owner(mfn, PageOwner::Domain(receiver));
        Ok(())
    }

    /// Spec 3.7 step 13.
    pub(super) fn install(&mut self, receiver: DomId, mfn: Mfn, gfn: Gfn) -> Result<(), HostError> {
        if self.domain(receiver).kind != DomainKind::Pv {
            return self.install_translated(receiver, mfn, gfn);
        }
        let frame = self.frames.get_mut(mfn).ok_or(HostError)?;
        frame.info.physical = gfn;
        Ok(())
    }
}
