//! The frontend's pages that data is bounced through, with the grants that persist on them (spec 2.4).
//!
//! # Rules
//! 1. A page is in the pool, or with exactly one request.
//! 2. A page that a peer may still map is never given back as free: it is retired with its reference, and
//!    the granter keeps both until access has ended.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use gnttab_abi::GrantRef;

use crate::grants::{Access, GrantError, Granter};

/// One page and the reference that grants it, if any does.
pub(super) struct PoolPage<P> {
    pub(super) page: P,
    pub(super) gref: Option<GrantRef>,
}

impl<P> PoolPage<P> {
    /// Makes sure that it is granted.
    pub(super) fn grant<G: Granter<Pages = P>>(
        &mut self,
        granter: &mut G,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let gref = match self.gref {
            Some(gref) => gref,
            None => granter.grant(&self.page, 0, access)?,
        };
        self.gref = Some(gref);
        Ok(gref)
    }
}

/// What a page is taken for. Those for one thing are used for it again, which keeps the pages of a lease together: where
/// they are neighbours the kernel has one piece of memory to go through and not many.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    Lease,
    Request,
}

pub(super) struct Pool<P> {
    lease: VecDeque<PoolPage<P>>,
    request: VecDeque<PoolPage<P>>,
    /// Pages that exist, in the pool or with requests.
    pages: usize,
    limit: usize,
}

impl<P> Pool<P> {
    pub(super) fn new(limit: usize) -> Self {
        Pool {
            lease: VecDeque::new(),
            request: VecDeque::new(),
            pages: 0,
            limit,
        }
    }

    /// Pages that can be taken now, if the granter has them.
    pub(super) fn available(&self) -> usize {
        self.lease.len() + self.request.len() + (self.limit - self.pages)
    }

    /// Pages that exist.
    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    /// Takes a page and makes sure that it is granted; pages whose grant persists come first.
    pub(super) fn take_granted<G: Granter<Pages = P>>(
        &mut self,
        granter: &mut G,
        access: Access,
    ) -> Result<(PoolPage<P>, GrantRef), GrantError> {
        let mut taken = self.take(granter, For::Request)?;
        match taken.grant(granter, access) {
            Ok(gref) => Ok((taken, gref)),
            Err(error) => {
                self.put(taken, For::Request);
                Err(error)
            }
        }
    }

    /// Takes a page, granted or not.
    pub(super) fn take<G: Granter<Pages = P>>(
        &mut self,
        granter: &mut G,
        what: For,
    ) -> Result<PoolPage<P>, GrantError> {
        let (own, other) = match what {
            For::Lease => (&mut self.lease, &mut self.request),
            For::Request => (&mut self.request, &mut self.lease),
        };
        if let Some(page) = own.pop_front() {
            return Ok(page);
        }
        if self.pages < self.limit
            && let Ok(page) = granter.alloc(1)
        {
            self.pages += 1;
            return Ok(PoolPage { page, gref: None });
        }
        other.pop_front().ok_or(GrantError::NoPages)
    }

    /// Puts a page back: at the head if the peer still maps it, so that it is used first, else at the tail.
    pub(super) fn put(&mut self, page: PoolPage<P>, what: For) {
        let free = match what {
            For::Lease => &mut self.lease,
            For::Request => &mut self.request,
        };
        if page.gref.is_some() {
            free.push_front(page);
        } else {
            free.push_back(page);
        }
    }

    /// Gives a page up that the peer did not let go of.
    pub(super) fn retire<G: Granter<Pages = P>>(&mut self, granter: &mut G, page: PoolPage<P>) {
        self.pages -= 1;
        granter.retire(page.page, page.gref.into_iter().collect());
    }

    /// Ends every grant and gives all free pages back: the connection is over, and the next peer must see
    /// nothing of it (GST-6).
    pub(super) fn empty<G: Granter<Pages = P>>(&mut self, granter: &mut G) {
        for page in self.lease.drain(..).chain(self.request.drain(..)) {
            let still = match page.gref {
                Some(gref) if !granter.end(gref) => Vec::from([gref]),
                _ => Vec::new(),
            };
            self.pages -= 1;
            granter.retire(page.page, still);
        }
    }
}
