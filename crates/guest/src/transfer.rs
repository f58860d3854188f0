//! Accepting a page that another domain gives away (spec 3.7, guest-driver 4.5).

use alloc::sync::Arc;
use core::fmt;

use gnttab_abi::{DomId, EntryFlags, Gfn, GrantRef};

use crate::pending::Bare;
use crate::queue::PendingView;
use crate::words::{Content, OfferOutcome};
use crate::{GrantError, GrantTable, Granter, OwnedRef};

/// A slot for a page that another domain may give.
///
/// Dropping it withdraws it; where a page is on its way the reference goes to the queue until
/// the page is there, which is then counted as lost.
#[must_use = "dropping an offer withdraws it"]
pub struct TransferOffer<X: Granter> {
    gref: Option<OwnedRef<X>>,
    peer: DomId,
}

/// How an offer ended.
pub enum OfferEnd<X: Granter> {
    /// Nobody had taken it up.
    Withdrawn(OwnedRef<X>),
    /// A page arrived and is this domain's own.
    Received {
        /// The reference, free again.
        gref: OwnedRef<X>,
        /// The frame: for PV the machine frame, else the slot that was offered.
        frame: Gfn,
    },
}

impl<X: Granter> GrantTable<X> {
    /// Offers `peer` to take over a page of its. `slot` is the guest frame that the page is to
    /// fill, or frame 0 where there is none.
    ///
    /// ```
    /// use gnttab_abi::{DomId, Gfn};
    /// use gnttab_guest::{GrantTable, Granter, OfferEnd, OwnedRef};
    ///
    /// /// Waits until the peer was told the reference, then takes what came.
    /// fn receive<X: Granter>(table: &GrantTable<X>, gref: OwnedRef<X>, tell: impl Fn(u32)) -> Option<Gfn> {
    ///     let offer = table.offer(gref, DomId(2), Gfn(0)).ok()?;
    ///     tell(offer.gref().0);
    ///     match offer.end() {
    ///         Ok(OfferEnd::Received { frame, .. }) => Some(frame),
    ///         Ok(OfferEnd::Withdrawn(_)) => None,
    ///         Err(_still_on_its_way) => None, // kept by the queue
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// [`GrantError`] with the reference.
    pub fn offer(
        &self,
        gref: OwnedRef<X>,
        peer: DomId,
        slot: Gfn,
    ) -> Result<TransferOffer<X>, GrantError<OwnedRef<X>>> {
        let flags = EntryFlags::ACCEPT_TRANSFER;
        match self.publish(
            &gref,
            &Content {
                flags,
                domid: peer,
                halves: (0, 0),
                frame: slot.0,
            },
        ) {
            Ok(()) => Ok(TransferOffer {
                gref: Some(gref),
                peer,
            }),
            Err(reason) => Err(GrantError { reason, given: gref }),
        }
    }
}

impl<X: Granter> TransferOffer<X> {
    /// The reference, as the peer is told it.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.gref.as_ref().map_or(GrantRef::INVALID, OwnedRef::gref)
    }

    /// Ends the offer, one way or the other: one attempt.
    ///
    /// # Errors
    /// The offer itself, while a page is on its way. That is short, unless the transfer failed
    /// half-way in the hypervisor; then it lasts for ever.
    pub fn end(mut self) -> Result<OfferEnd<X>, TransferOffer<X>> {
        let Some(gref) = self.gref.take() else {
            return Err(self);
        };
        match gref.table().end_offer(gref.gref()) {
            OfferOutcome::Withdrawn => Ok(OfferEnd::Withdrawn(gref)),
            OfferOutcome::Received(frame) => Ok(OfferEnd::Received {
                gref,
                frame: Gfn(frame),
            }),
            OfferOutcome::Committed => {
                self.gref = Some(gref);
                Err(self)
            }
        }
    }
}

impl<X: Granter> fmt::Debug for OfferEnd<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OfferEnd::Withdrawn(gref) => write!(f, "Withdrawn({})", gref.gref()),
            OfferEnd::Received { gref, frame } => write!(f, "Received({frame} by {})", gref.gref()),
        }
    }
}

impl<X: Granter> Drop for TransferOffer<X> {
    fn drop(&mut self) {
        if let Some(gref) = self.gref.take()
            && !gref.table().end_bare(gref.gref(), Bare::Offer)
        {
            let table = Arc::clone(gref.table());
            table.abandon_bare(PendingView::first(gref.into_gref(), self.peer), Bare::Offer);
        }
    }
}

impl<X: Granter> fmt::Debug for TransferOffer<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransferOffer({} to {})", self.gref(), self.peer)
    }
}
