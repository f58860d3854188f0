//! References that are taken and not yet granted: one, a private list, a run.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;

use gnttab_abi::GrantRef;

use crate::table::Shared;
use crate::{AllocError, GrantTable, Granter};

/// A reference of the own table that is taken and unused.
///
/// Having one tells you: nobody else has this number, and its entry is free. It is not `Copy`;
/// it goes into a grant and comes out again when the peer has let go. Dropping it gives the
/// number back to the table.
///
/// ```compile_fail,E0382
/// fn twice<X: gnttab_guest::Granter>(gref: gnttab_guest::OwnedRef<X>) {
///     drop(gref);
///     drop(gref);
/// }
/// ```
pub struct OwnedRef<X: Granter> {
    table: Arc<Shared<X>>,
    /// [`GrantRef::INVALID`] once the number went elsewhere.
    gref: GrantRef,
}

impl<X: Granter> OwnedRef<X> {
    pub(crate) fn new(table: &Arc<Shared<X>>, gref: GrantRef) -> OwnedRef<X> {
        OwnedRef {
            table: Arc::clone(table),
            gref,
        }
    }

    /// The number, as the peer is told it.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.gref
    }

    pub(crate) fn table(&self) -> &Arc<Shared<X>> {
        &self.table
    }

    /// The bare number; whoever calls this answers for it from here on.
    pub(crate) fn into_gref(mut self) -> GrantRef {
        mem::replace(&mut self.gref, GrantRef::INVALID)
    }
}

impl<X: Granter> Drop for OwnedRef<X> {
    fn drop(&mut self) {
        if self.gref != GrantRef::INVALID {
            self.table.free(&[self.gref]);
        }
    }
}

impl<X: Granter> fmt::Debug for OwnedRef<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedRef({})", self.gref)
    }
}

/// A private list of references: taken when a device starts, claimed and released with each
/// request, without a lock. What is in it when it is dropped goes back to the table.
pub struct Batch<X: Granter> {
    table: Arc<Shared<X>>,
    /// Never holds more than its capacity: releasing does not allocate.
    refs: Vec<GrantRef>,
}

impl<X: Granter> Batch<X> {
    /// Takes one from the list.
    pub fn claim(&mut self) -> Option<OwnedRef<X>> {
        self.refs.pop().map(|gref| OwnedRef::new(&self.table, gref))
    }

    /// Puts one onto the list; it is the next to be claimed. One of another table, or one more
    /// than the list was made for, goes back to its table instead.
    pub fn release(&mut self, gref: OwnedRef<X>) {
        if Arc::ptr_eq(&self.table, gref.table()) && self.refs.len() < self.refs.capacity() {
            self.refs.push(gref.into_gref());
        }
    }

    /// How many there are to claim.
    #[must_use]
    pub fn len(&self) -> usize {
        self.refs.len()
    }

    /// Whether there is none to claim.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.refs.is_empty()
    }
}

impl<X: Granter> Drop for Batch<X> {
    fn drop(&mut self) {
        self.table.free(&self.refs);
    }
}

impl<X: Granter> fmt::Debug for Batch<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Batch").field(&self.refs).finish()
    }
}

/// Consecutive references, lowest first. An iterator; those not asked for go back to the table
/// with it.
pub struct Run<X: Granter> {
    table: Arc<Shared<X>>,
    next: u32,
    end: u32,
}

impl<X: Granter> Run<X> {
    /// The lowest that is left.
    #[must_use]
    pub fn first(&self) -> Option<GrantRef> {
        (self.next < self.end).then_some(GrantRef(self.next))
    }
}

impl<X: Granter> Iterator for Run<X> {
    type Item = OwnedRef<X>;

    fn next(&mut self) -> Option<OwnedRef<X>> {
        let gref = self.first()?;
        self.next += 1;
        Some(OwnedRef::new(&self.table, gref))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.end - self.next).unwrap_or(usize::MAX);
        (left, Some(left))
    }
}

impl<X: Granter> ExactSizeIterator for Run<X> {}

impl<X: Granter> Drop for Run<X> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

impl<X: Granter> fmt::Debug for Run<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Run({}..{})", GrantRef(self.next), GrantRef(self.end))
    }
}

impl<X: Granter> GrantTable<X> {
    /// Takes one reference; the table grows if none is free.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn alloc_one(&self) -> Result<OwnedRef<X>, AllocError> {
        let number = self.0.obtain(self.1, 1, |free| free.take().ok_or(1))?;
        Ok(OwnedRef::new(&self.0, GrantRef(number)))
    }

    /// Takes `count` references as a private list; the table grows if fewer are free.
    ///
    /// # Errors
    /// [`AllocError`]; nothing is taken then.
    pub fn alloc(&self, count: u32) -> Result<Batch<X>, AllocError> {
        let mut refs = Vec::new();
        let room = usize::try_from(count).map_err(|_| AllocError::NoMemory)?;
        refs.try_reserve_exact(room).map_err(|_| AllocError::NoMemory)?;
        self.0
            .obtain(self.1, count, |free| match count.saturating_sub(free.len()) {
                0 => {
                    refs.extend((0..count).filter_map(|_| free.take()).map(GrantRef));
                    Ok(())
                }
                lack => Err(lack),
            })?;
        // The end of the list is claimed first: the lowest, as the table would have it.
        refs.reverse();
        Ok(Batch {
            table: Arc::clone(&self.0),
            refs,
        })
    }

    /// Takes `count` consecutive references; the table grows if there is no such run.
    ///
    /// # Errors
    /// [`AllocError`]; nothing is taken then.
    pub fn alloc_run(&self, count: u32) -> Result<Run<X>, AllocError> {
        let next = self.0.obtain(self.1, count, |free| {
            free.take_run(count)
                .ok_or_else(|| count.saturating_sub(free.tail()))
        })?;
        Ok(Run {
            table: Arc::clone(&self.0),
            next,
            end: next + count,
        })
    }
}
