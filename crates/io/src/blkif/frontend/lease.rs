//! Pages of the pool that are lent, by the number of the lease.
//!
//! # Rules
//! 1. At most three quarters of the pool are lent: whoever keeps a lease for long cannot stop operations on memory of the
//!    caller's own.
//! 2. A page that an earlier peer did not let go of goes to no other peer: its lease is stale, which means that it
//!    is used for nothing but to be given back.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use gnttab_abi::PAGE_SIZE;

use super::pool::PoolPage;
use super::types::Lease;
use crate::grants::Granter;
use crate::shared::{SharedPages, SharedSliceMut};

/// What stands behind one lease.
pub(super) struct Lent<P> {
    pub(super) pages: Vec<PoolPage<P>>,
    /// Some of the pages may be mapped by the peer of a connection that is over.
    pub(super) stale: bool,
}

pub(super) struct Leases<P> {
    next: u64,
    lent: BTreeMap<u64, Lent<P>>,
    pages: usize,
    limit: usize,
}

impl<P> Leases<P> {
    /// `pool`: how many pages there are in all.
    pub(super) fn new(pool: usize) -> Self {
        Leases {
            next: 0,
            lent: BTreeMap::new(),
            pages: 0,
            limit: pool / 4 * 3,
        }
    }

    /// How many pages may be lent now.
    pub(super) fn room(&self) -> usize {
        self.limit - self.pages
    }

    /// Lends pages that hold `len` bytes; no more than there is room for.
    pub(super) fn lend(&mut self, pages: Vec<PoolPage<P>>, len: usize) -> Lease {
        let number = self.next;
        self.next += 1;
        self.pages += pages.len();
        self.lent.insert(number, Lent { pages, stale: false });
        Lease { number, len }
    }

    pub(super) fn get(&self, lease: &Lease) -> Option<&Lent<P>> {
        self.lent.get(&lease.number)
    }

    pub(super) fn get_mut(&mut self, lease: &Lease) -> Option<&mut Lent<P>> {
        self.lent.get_mut(&lease.number)
    }

    /// Ends a lease.
    pub(super) fn take(&mut self, lease: &Lease) -> Option<Lent<P>> {
        let lent = self.lent.remove(&lease.number)?;
        self.pages -= lent.pages.len();
        Some(lent)
    }

    /// Ends a lease if it is stale.
    pub(super) fn take_stale(&mut self, lease: &Lease) -> Option<Lent<P>> {
        self.get(lease)?.stale.then(|| self.take(lease))?
    }

    /// Ends every lease.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Lent<P>> + use<P> {
        self.pages = 0;
        core::mem::take(&mut self.lent).into_values()
    }

    /// The connection is over: ends every grant that the peer lets go of, and notes where it does not.
    pub(super) fn end_grants<G: Granter<Pages = P>>(&mut self, granter: &mut G) {
        for lent in self.lent.values_mut() {
            for page in &mut lent.pages {
                page.gref = page.gref.filter(|gref| !granter.end(*gref));
                lent.stale |= page.gref.is_some();
            }
        }
    }
}

impl<P: AsRef<SharedPages>> Lent<P> {
    /// A private copy of its first `len` bytes.
    pub(super) fn content(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (page, into) in self.pages.iter().zip(bytes.chunks_mut(PAGE_SIZE)) {
            page.page.as_ref().read(0, into);
        }
        bytes
    }

    /// The pages of `bytes` bytes from `offset` on, which is the start of a page.
    pub(super) fn part(&mut self, offset: usize, bytes: usize) -> &mut [PoolPage<P>] {
        let first = offset / PAGE_SIZE;
        let count = bytes.div_ceil(PAGE_SIZE);
        self.pages.get_mut(first..first + count).unwrap_or_default()
    }

    /// The memory of bytes `from` to `len`, page by page.
    pub(super) fn parts(&self, from: usize, len: usize) -> impl Iterator<Item = SharedSliceMut<'_>> {
        let pages = self.pages.iter().zip((0..len).step_by(PAGE_SIZE));
        pages.skip(from / PAGE_SIZE).map(move |(page, start)| {
            let skipped = from.saturating_sub(start);
            let part = (len - start).min(PAGE_SIZE) - skipped;
            page.page.as_ref().slice_mut(skipped, part)
        })
    }
}
