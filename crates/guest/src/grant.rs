//! Granting a page, and ending that.

use alloc::sync::Arc;
use core::fmt;

use gnttab_abi::{DomId, EntryFlags, Gfn, GrantRef, PAGE_SIZE};

use crate::pending::Bare;
use crate::queue::{Item, PendingView};
use crate::table::Shared;
use crate::words::{Content, FrameTooWide, Outcome};
use crate::{GrantTable, Granter, OwnedRef, Page, Pending, Version};

/// What the peer may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read it.
    ReadOnly,
    /// Read and write it.
    ReadWrite,
}

impl Access {
    pub(crate) fn entry_flags(self) -> EntryFlags {
        match self {
            Access::ReadOnly => EntryFlags::READONLY,
            Access::ReadWrite => EntryFlags::empty(),
        }
    }
}

/// Why something was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantRefused {
    /// The peer's number is not that of an ordinary domain.
    #[error("{0} is not an ordinary domain to grant to")]
    BadDomain(DomId),
    /// The frame's number does not fit an entry of a version 1 table.
    #[error("frame {0} needs more than the 32 bits of a version 1 entry")]
    FrameTooWide(Gfn),
    /// Sub-page and transitive grants need a version 2 table.
    #[error("only a version 2 grant table has this kind of grant")]
    NeedsV2,
    /// The part is empty or does not lie in one page.
    #[error("bytes {offset} to {offset}+{len} are not a part of one page")]
    BadPart {
        /// First byte.
        offset: u16,
        /// How many.
        len: u16,
    },
    /// The reference is one of another table.
    #[error("reference {0} belongs to another grant table")]
    ForeignRef(GrantRef),
    /// The entry is out of reach: the table was not resumed.
    #[error("the entry of reference {0} is out of reach until the grant table is resumed")]
    OutOfReach(GrantRef),
}

/// Nothing was granted, and everything that was given for it comes back.
#[derive(thiserror::Error)]
#[error("{reason}")]
pub struct GrantError<T> {
    /// Why.
    pub reason: GrantRefused,
    /// What was given: the reference, and the page where there was one.
    pub given: T,
}

impl<T> fmt::Debug for GrantError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantError")
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

/// Which bytes of a page a sub-page grant covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// First byte, below 4096.
    pub offset: u16,
    /// How many bytes, at least 1.
    pub len: u16,
}

/// What comes of an attempt to grant a page: the grant, or what was given for it.
pub type GrantResult<X> = Result<Grant<X>, GrantError<(OwnedRef<X>, <X as Granter>::Page)>>;

impl<X: Granter> GrantTable<X> {
    /// Fills a page with zeros and grants it. What the peer can see is then only what is written
    /// to it from now on (rule GST-6).
    ///
    /// # Errors
    /// [`GrantError`] with the reference and the page.
    pub fn grant_zeroed(
        &self,
        gref: OwnedRef<X>,
        peer: DomId,
        mut page: X::Page,
        access: Access,
    ) -> GrantResult<X> {
        page.zero();
        self.grant(gref, peer, page, access)
    }

    /// Grants a page with what it holds. Every byte of it becomes the peer's to see: the page
    /// must hold nothing but what is meant for the peer (rule GST-6).
    ///
    /// # Errors
    /// [`GrantError`] with the reference and the page.
    pub fn grant(&self, gref: OwnedRef<X>, peer: DomId, page: X::Page, access: Access) -> GrantResult<X> {
        let flags = EntryFlags::PERMIT_ACCESS | access.entry_flags();
        self.grant_as(gref, peer, page, flags, (0, 0))
    }

    /// Grants part of a page, for copying only. Needs a version 2 table.
    ///
    /// # Errors
    /// [`GrantError`] with the reference and the page.
    pub fn grant_part(
        &self,
        gref: OwnedRef<X>,
        peer: DomId,
        page: X::Page,
        access: Access,
        part: Part,
    ) -> GrantResult<X> {
        let Part { offset, len } = part;
        let refused = if self.version() != Version::V2 {
            GrantRefused::NeedsV2
        } else if len == 0 || usize::from(offset) + usize::from(len) > PAGE_SIZE {
            GrantRefused::BadPart { offset, len }
        } else {
            let flags = EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE | access.entry_flags();
            return self.grant_as(gref, peer, page, flags, (offset, len));
        };
        Err(GrantError {
            reason: refused,
            given: (gref, page),
        })
    }

    /// Passes another domain's grant on, for copying only. Needs a version 2 table.
    ///
    /// # Errors
    /// [`GrantError`] with the reference.
    pub fn grant_transitive(
        &self,
        gref: OwnedRef<X>,
        peer: DomId,
        far: (DomId, GrantRef),
        access: Access,
    ) -> Result<TransitiveGrant<X>, GrantError<OwnedRef<X>>> {
        let (far_domain, far_gref) = far;
        let content = Content {
            flags: EntryFlags::TRANSITIVE | access.entry_flags(),
            domid: peer,
            halves: (far_domain.0, 0),
            frame: far_gref.0.into(),
        };
        let refused = match self.version() {
            Version::V1 => Err(GrantRefused::NeedsV2),
            Version::V2 => self.publish(&gref, &content),
        };
        match refused {
            Ok(()) => Ok(TransitiveGrant {
                gref: Some(gref),
                peer,
            }),
            Err(reason) => Err(GrantError { reason, given: gref }),
        }
    }

    fn grant_as(
        &self,
        gref: OwnedRef<X>,
        peer: DomId,
        page: X::Page,
        flags: EntryFlags,
        halves: (u16, u16),
    ) -> GrantResult<X> {
        let content = Content {
            flags,
            domid: peer,
            halves,
            frame: page.gfn().0,
        };
        match self.publish(&gref, &content) {
            Ok(()) => Ok(Grant {
                live: Some((gref, page)),
                peer,
            }),
            Err(reason) => Err(GrantError {
                reason,
                given: (gref, page),
            }),
        }
    }

    /// Checks what is common to all kinds of entries, and writes one.
    pub(crate) fn publish(&self, gref: &OwnedRef<X>, content: &Content) -> Result<(), GrantRefused> {
        let number = gref.gref();
        if !Arc::ptr_eq(&self.0, gref.table()) {
            return Err(GrantRefused::ForeignRef(number));
        }
        if !content.domid.is_ordinary() {
            return Err(GrantRefused::BadDomain(content.domid));
        }
        let entry = self
            .0
            .frames
            .entry(number)
            .ok_or(GrantRefused::OutOfReach(number))?;
        entry
            .publish(content)
            .map_err(|FrameTooWide| GrantRefused::FrameTooWide(Gfn(content.frame)))
    }
}

/// The peer uses the page in a way that the change would forbid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{peer} still has writable use of reference {gref}")]
pub struct StillWritable {
    /// The reference.
    pub gref: GrantRef,
    /// The domain that it is granted to.
    pub peer: DomId,
}

/// A page that is granted to another domain.
///
/// Having one tells you: the peer may use the page at this very moment, and nobody else gets it
/// before the peer has let go. The page comes back through [`end`](Grant::end) and in no other
/// way; dropping a grant ends it too, and leaves the page to the queue where the peer holds on.
///
/// ```compile_fail,E0507
/// fn steal<X: gnttab_guest::Granter>(grant: &gnttab_guest::Grant<X>) -> X::Page {
///     *grant.page() // a page cannot be moved out while it is granted
/// }
/// ```
/// ```compile_fail,E0382
/// fn use_after_end<X: gnttab_guest::Granter>(grant: gnttab_guest::Grant<X>) {
///     let _ = grant.end();
///     grant.gref(); // it has ended
/// }
/// ```
/// ```compile_fail,E0596
/// fn swap<X: gnttab_guest::Granter>(grant: &mut gnttab_guest::Grant<X>, other: &mut X::Page) {
///     std::mem::swap(&mut *grant.page(), other); // nor exchanged
/// }
/// ```
#[must_use = "dropping a grant ends it"]
pub struct Grant<X: Granter> {
    /// Always there; taken out when the grant goes.
    live: Option<(OwnedRef<X>, X::Page)>,
    peer: DomId,
}

impl<X: Granter> Grant<X> {
    /// The reference, as the peer is told it.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.live().0.gref()
    }

    /// The domain that it is granted to.
    #[must_use]
    pub fn peer(&self) -> DomId {
        self.peer
    }

    /// The page, which the peer may be changing.
    #[must_use]
    pub fn page(&self) -> &X::Page {
        &self.live().1
    }

    /// Whether the peer uses the page at this moment: a look that changes nothing, and costs less than an attempt to
    /// end access that would fail. It may begin to right after; only [`end`](Grant::end) shuts it out.
    #[must_use]
    pub fn is_used(&self) -> bool {
        let (gref, _) = self.live();
        let entry = gref.table().frames.entry(gref.gref());
        entry.is_some_and(|entry| entry.is_used())
    }

    /// Takes the right to write away, unless the peer has writable use of the page.
    ///
    /// # Errors
    /// [`StillWritable`]. A version 1 grant is unchanged then; a version 2 grant admits no new
    /// writer, and calling this again tells when the last one is gone.
    pub fn make_readonly(&self) -> Result<(), StillWritable> {
        let (gref, _) = self.live();
        let entry = gref.table().frames.entry(gref.gref());
        match entry.map(|entry| entry.make_readonly()) {
            Some(Outcome::Done) => Ok(()),
            Some(Outcome::InUse) | None => Err(StillWritable {
                gref: gref.gref(),
                peer: self.peer,
            }),
        }
    }

    /// Gives the right to write.
    pub fn make_writable(&self) {
        let (gref, _) = self.live();
        if let Some(entry) = gref.table().frames.entry(gref.gref()) {
            entry.make_writable();
        }
    }

    /// Ends access: one attempt, and its outcome is the answer to "does the peer still use it?".
    /// On success the reference and the page are the caller's own again, and nothing that the
    /// peer does can reach the page.
    ///
    /// # Errors
    /// [`Pending`], if the peer still uses the page: a ticket for both, which are on the queue.
    pub fn end(self) -> Result<(OwnedRef<X>, X::Page), Pending<X>> {
        self.try_end().map_err(|mut grant| {
            let (table, item) = grant
                .live
                .take()
                .map(|live| pending_item(live, grant.peer))
                .expect(LIVE);
            Pending::new(table, item)
        })
    }

    /// Ends access as [`Grant::end`] does.
    ///
    /// # Errors
    /// The grant itself, if the peer still uses the page: a version 1 grant is as it was, a
    /// version 2 grant admits no new use. Also if the owner cannot take the page back yet
    /// ([`Granter::page_back`]); then the peer is shut out already.
    pub fn try_end(mut self) -> Result<(OwnedRef<X>, X::Page), Grant<X>> {
        let (gref, page) = self.live_mut();
        if !gref.table().end_page(gref.gref(), page) {
            return Err(self);
        }
        Ok(self.live.take().expect(LIVE))
    }

    fn live(&self) -> &(OwnedRef<X>, X::Page) {
        self.live.as_ref().expect(LIVE)
    }

    fn live_mut(&mut self) -> &mut (OwnedRef<X>, X::Page) {
        self.live.as_mut().expect(LIVE)
    }
}

/// Why the two are there whenever somebody holds a grant.
const LIVE: &str = "a grant is consumed by what takes its page out";

/// What the queue keeps of a grant whose end did not succeed.
fn pending_item<X: Granter>(live: (OwnedRef<X>, X::Page), peer: DomId) -> (Arc<Shared<X>>, Item<X::Page>) {
    let (gref, held) = live;
    let table = Arc::clone(gref.table());
    let view = PendingView::first(gref.into_gref(), peer);
    (table, Item { view, held })
}

impl<X: Granter> Drop for Grant<X> {
    fn drop(&mut self) {
        let Some(mut live) = self.live.take() else {
            return;
        };
        let (gref, page) = &mut live;
        if !gref.table().end_page(gref.gref(), page) {
            let (table, item) = pending_item(live, self.peer);
            table.abandon_page(item);
        }
    }
}

impl<X: Granter> fmt::Debug for Grant<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Grant({} to {})", self.gref(), self.peer)
    }
}

/// Another domain's grant, passed on. No page of this domain hangs on it.
///
/// Dropping it ends it, and leaves the reference to the queue while the peer copies through it.
#[must_use = "dropping a grant ends it"]
pub struct TransitiveGrant<X: Granter> {
    gref: Option<OwnedRef<X>>,
    peer: DomId,
}

impl<X: Granter> TransitiveGrant<X> {
    /// The reference, as the peer is told it.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.gref.as_ref().map_or(GrantRef::INVALID, OwnedRef::gref)
    }

    /// Ends access: one attempt.
    ///
    /// # Errors
    /// The grant itself, if the peer copies through it at this moment. It admits no new use.
    pub fn end(mut self) -> Result<OwnedRef<X>, TransitiveGrant<X>> {
        self.gref
            .take_if(|gref| gref.table().end_entry(gref.gref()))
            .ok_or(self)
    }
}

impl<X: Granter> Drop for TransitiveGrant<X> {
    fn drop(&mut self) {
        if let Some(gref) = self.gref.take()
            && !gref.table().end_entry(gref.gref())
        {
            let table = Arc::clone(gref.table());
            table.abandon_bare(PendingView::first(gref.into_gref(), self.peer), Bare::Transitive);
        }
    }
}

impl<X: Granter> fmt::Debug for TransitiveGrant<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransitiveGrant({} to {})", self.gref(), self.peer)
    }
}
