//! `transfer` (spec 3.7).
//!
//! The steps, in order: the page is the caller's and free; it is taken away; the receiver; policy;
//! the width of its number; room at the receiver; the receiver's slot is committed; the page
//! becomes the receiver's; the slot is filled and completed. From the moment that the page is taken
//! it is either delivered or freed (TRN-3).

use gnttab_abi::{DomId, EntryFlags, EntryHead, Gfn, GrantRef, GrantStatus, Mfn, Op, Transfer};

use crate::domain::{Domain, Vcpu, Version};
use crate::engine::Processor;
use crate::hypervisor::{DomainKind, Hook, Hypervisor, StealError};
use crate::table::SharedEntry;

/// Compare-and-swaps before a receiver that keeps interfering is given up on.
const ATTEMPTS: u32 = 5;

impl<H: Hypervisor> Processor<'_, H> {
    /// Gives pages of the caller away, one after the other. Every item's `status` is written.
    ///
    /// Only PV callers have pages to give; the raw door refuses others, and this answers
    /// *general_error* for them.
    pub fn transfer(&mut self, vcpu: &Vcpu<H>, items: &mut [Transfer]) {
        for item in items {
            item.status = self.transfer_item(vcpu, item);
        }
    }

    pub(crate) fn transfer_item(&mut self, vcpu: &Vcpu<H>, item: &Transfer) -> GrantStatus {
        let status = match self.transfer_one(vcpu, item) {
            Ok(()) => GrantStatus::OKAY,
            Err(status) => status,
        };
        let (peer, gref) = (Some(item.domid), Some(item.gref));
        vcpu.caller()
            .answer(&self.engine.hv, Op::Transfer, peer, gref, status);
        status
    }

    fn transfer_one(&mut self, vcpu: &Vcpu<H>, item: &Transfer) -> Result<(), GrantStatus> {
        let hv = &self.engine.hv;
        let caller = &*vcpu.domain;
        // 2, 3
        if caller.kind().is_external() {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let mfn = Mfn(item.mfn);
        hv.steal(caller.private(), mfn).map_err(|error| match error {
            StealError::BadPage => GrantStatus::BAD_PAGE,
            StealError::Failed => GrantStatus::GENERAL_ERROR,
        })?;
        // 4
        hv.flush(caller.private());
        hv.hook(Hook::TransferStolen);
        let mut page = Stolen {
            hv,
            mfn,
            delivered: false,
        };
        // 5, 6
        let receiver = self.hold(item.domid).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !hv.may_transfer(caller.private(), receiver.private()) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        // 7: the substitute is what all later steps use (TRN-5)
        let narrow = receiver.table.version() == Version::V1 && !receiver.kind().is_translated();
        let wide = narrow && page.mfn.0 > u64::from(u32::MAX);
        if wide || !hv.fits(receiver.private(), page.mfn) {
            let substitute = hv.replace_stolen(page.mfn, receiver.private());
            page.mfn = substitute.map_err(|_| GrantStatus::ADDRESS_TOO_BIG)?;
        }
        // 8, 9
        hv.reserve(receiver.private())
            .map_err(|_| GrantStatus::GENERAL_ERROR)?;
        self.deliver(&receiver, caller.id(), item.gref, &mut page)
    }

    /// Steps 10 to 16, with one page reserved at the receiver.
    fn deliver(
        &mut self,
        receiver: &Domain<H>,
        sender: DomId,
        gref: GrantRef,
        page: &mut Stolen<'_, H>,
    ) -> Result<(), GrantStatus> {
        let hv = &self.engine.hv;
        // 10
        let Some(version) = self.commit(receiver, sender, gref) else {
            hv.unreserve(receiver.private());
            return Err(GrantStatus::GENERAL_ERROR);
        };
        hv.hook(Hook::TransferCommitted);
        // 11: a receiver that died leaves its slot committed for ever
        if hv.assign(receiver.private(), page.mfn).is_err() {
            hv.unreserve(receiver.private());
            return Err(GrantStatus::GENERAL_ERROR);
        }
        page.delivered = true;
        // 12
        let inside = self.enter(receiver.id()).ok_or(GrantStatus::GENERAL_ERROR)?;
        let view = inside.table.view();
        let entry = view.shared(gref).filter(|_| view.version() == version);
        let entry = entry.ok_or(GrantStatus::GENERAL_ERROR)?;
        // 13
        let gfn = Gfn(entry.load_frame());
        let installed = hv.install(receiver.private(), page.mfn, gfn);
        // 14, 15: the frame is there before "completed" is
        let tell_frame = receiver.kind() == DomainKind::Pv;
        match &entry {
            SharedEntry::V1(shared) => {
                if tell_frame {
                    let [a, b, c, d, ..] = page.mfn.0.to_le_bytes();
                    shared.store_frame(u32::from_le_bytes([a, b, c, d]));
                }
                shared.set_flags(EntryFlags::TRANSFER_COMPLETED);
            }
            SharedEntry::V2(shared) => {
                if tell_frame {
                    shared.store_frame(page.mfn.0);
                }
                shared.set_flags(EntryFlags::TRANSFER_COMPLETED);
            }
        }
        // 16
        installed.map_err(|_| GrantStatus::GENERAL_ERROR)
    }

    /// Step 10: promises the page to the receiver's slot. `None`: the slot does not take it.
    fn commit(&mut self, receiver: &Domain<H>, sender: DomId, gref: GrantRef) -> Option<Version> {
        let hv = &self.engine.hv;
        let inside = self.enter(receiver.id())?;
        let view = inside.table.view();
        let entry = view.shared(gref)?;
        let open = EntryHead {
            flags: EntryFlags::ACCEPT_TRANSFER,
            domid: sender,
        };
        let flags = EntryFlags::ACCEPT_TRANSFER | EntryFlags::TRANSFER_COMMITTED;
        let committed = EntryHead { flags, domid: sender };
        let mut head = entry.load_head();
        for _ in 0..ATTEMPTS {
            if head != open {
                return None;
            }
            hv.hook(Hook::ClaimLoaded);
            match entry.swap_head(head, committed) {
                Ok(()) => return Some(view.version()),
                Err(found) => head = found,
            }
        }
        None
    }
}

/// A page that was taken from its domain. Dropped undelivered, it is freed.
struct Stolen<'a, H: Hypervisor> {
    hv: &'a H,
    mfn: Mfn,
    delivered: bool,
}

impl<H: Hypervisor> Drop for Stolen<'_, H> {
    fn drop(&mut self) {
        if !self.delivered {
            self.hv.free_stolen(self.mfn);
        }
    }
}
