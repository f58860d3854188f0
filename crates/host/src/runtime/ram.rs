//! The domain's own pages: who has which.
//!
//! Pages that are to be granted for mapping must be shareable, which costs a call to the monitor each, once.
//! They are taken from the bottom of memory and stay shareable when they come back; others are taken from
//! the top. So the two meet only when memory is full.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use gnttab_abi::{Errno, Gfn, PAGE_SIZE};
use gnttab_guest::Page;
use gnttab_io::shared::SharedPages;

use super::{Domain, Hosting, lock, usize_of};
use crate::protocol::{self, NoticeKind};
use crate::sys::{Access, WindowError, WindowPages};

/// Pages could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPages {
    /// The domain's memory has no such run left.
    #[error("no {wanted} pages in a row are left of the domain's {total}")]
    Memory {
        /// Pages wanted.
        wanted: u32,
        /// Pages that the domain has.
        total: u32,
    },
    /// The monitor did not make them shareable.
    #[error("the monitor did not make {wanted} pages shareable: {errno}")]
    Share {
        /// Pages wanted.
        wanted: u32,
        /// What it answered; `ENOMEM` if the domain may have no more.
        errno: Errno,
    },
}

/// What the pages are used for.
#[derive(Debug)]
pub(super) struct Allocator {
    used: Box<[bool]>,
    shareable: Box<[bool]>,
}

impl Allocator {
    pub(super) fn new(pages: u32) -> Allocator {
        let no = || vec![false; usize_of(pages)].into_boxed_slice();
        Allocator {
            used: no(),
            shareable: no(),
        }
    }

    fn pages(&self) -> u32 {
        u32::try_from(self.used.len()).unwrap_or(u32::MAX)
    }

    /// The lowest, or the highest, run of free pages; taken.
    fn take(&mut self, wanted: u32, from_bottom: bool) -> Option<u32> {
        let len = usize_of(wanted);
        let last = self.used.len().checked_sub(len).filter(|_| len > 0)?;
        let free = |first: &usize| !self.used[*first..*first + len].contains(&true);
        let first = if from_bottom {
            (0..=last).find(free)
        } else {
            (0..=last).rev().find(free)
        }?;
        self.used[first..first + len].fill(true);
        u32::try_from(first).ok()
    }

    fn give_back(&mut self, run: &Range<u32>) {
        self.used[usize_of(run.start)..usize_of(run.end)].fill(false);
    }

    /// The runs in a run that are not shareable yet, none longer than one call takes.
    fn not_shareable(&self, run: &Range<u32>) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for page in run.clone().filter(|page| !self.shareable[usize_of(*page)]) {
            match runs.last_mut() {
                Some(last) if last.end == page && u64::from(page - last.start) < protocol::MAX_SHARE => {
                    last.end = page + 1;
                }
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    fn note_shareable(&mut self, page: u32) {
        if let Some(shareable) = self.shareable.get_mut(usize_of(page)) {
            *shareable = true;
        }
    }
}

/// Consecutive pages of the domain's own memory, zeroed when they were taken. They go back when this and
/// every [`RamPage`] of it are gone.
#[derive(Clone)]
pub struct Run(Arc<Inner>);

struct Inner {
    domain: Arc<Domain>,
    pages: Range<u32>,
    shared: WindowPages,
}

impl Domain {
    /// Takes `count` pages in a row (at least one) that peers can be let map.
    ///
    /// # Errors
    /// [`NoPages`].
    pub fn grantable(self: &Arc<Self>, count: u32) -> Result<Run, NoPages> {
        let run = self.take(count, true)?;
        let missing = lock(&self.ram).not_shareable(&run.0.pages);
        for missing in missing {
            self.share(missing)
                .map_err(|errno| NoPages::Share { wanted: count, errno })?;
        }
        Ok(run)
    }

    /// Takes `count` pages in a row (at least one) that peers can be let map, each a run of its own.
    ///
    /// # Errors
    /// [`NoPages`].
    pub fn grantable_singly(self: &Arc<Self>, count: u32) -> Result<Vec<Run>, NoPages> {
        let run = self.grantable(count)?;
        let pages = run.0.pages.clone();
        let singles = pages.map(|page| {
            let shared = self.memory.shared_pages(usize_of(page), 1, Access::Write)?;
            Some((page, shared))
        });
        let singles: Option<Vec<(u32, WindowPages)>> = singles.collect();
        // Nobody else has the run: its pages are those of the new ones from here on.
        let (Some(singles), Some(mut inner)) = (singles, Arc::into_inner(run.0)) else {
            return Err(NoPages::Memory {
                wanted: count,
                total: lock(&self.ram).pages(),
            });
        };
        inner.pages = 0..0;
        let single = |(page, shared)| {
            Run(Arc::new(Inner {
                domain: Arc::clone(self),
                pages: page..page + 1,
                shared,
            }))
        };
        Ok(singles.into_iter().map(single).collect())
    }

    /// Takes `count` pages in a row (at least one) for the domain itself, and for copies.
    ///
    /// # Errors
    /// [`NoPages::Memory`].
    pub fn private(self: &Arc<Self>, count: u32) -> Result<Run, NoPages> {
        self.take(count, false)
    }

    fn take(self: &Arc<Self>, wanted: u32, from_bottom: bool) -> Result<Run, NoPages> {
        let mut ram = lock(&self.ram);
        let none = NoPages::Memory {
            wanted,
            total: ram.pages(),
        };
        let first = ram.take(wanted, from_bottom).ok_or(none)?;
        drop(ram);
        let pages = first..first + wanted;
        let shared = self
            .memory
            .shared_pages(usize_of(first), usize_of(wanted), Access::Write);
        let Some(shared) = shared else {
            lock(&self.ram).give_back(&pages);
            return Err(none);
        };
        let run = Run(Arc::new(Inner {
            domain: Arc::clone(self),
            pages,
            shared,
        }));
        run.as_ref().zero();
        Ok(run)
    }

    /// Has the monitor make pages shareable, and takes their new backing.
    fn share(&self, pages: Range<u32>) -> Result<(), Errno> {
        let count = pages.end - pages.start;
        let asked = self.host_call(protocol::CALL_SHARE, pages.start.into(), count.into());
        let mut page = pages.start;
        while page < pages.end {
            // On an error some may have come all the same; they must be taken in.
            let Ok(backing) = self.received(NoticeKind::Page, page.into()) else {
                break;
            };
            for backing in backing {
                self.place(Gfn(page.into()), backing, Access::Write)?;
                lock(&self.ram).note_shareable(page);
                page += 1;
            }
        }
        asked.and(if page == pages.end {
            Ok(())
        } else {
            Err(Errno::NoData)
        })
    }
}

impl Run {
    /// Its first gfn.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        Gfn(self.0.pages.start.into())
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.0.pages.end - self.0.pages.start
    }

    /// One of its pages, to be granted; `None` past the end.
    ///
    /// Whoever grants the same page twice gets it back when *one* of the grants has ended, and it cannot be
    /// renewed before the other has: grant a page once, or end both before using it for something else.
    #[must_use]
    pub fn page(&self, index: u32) -> Option<RamPage> {
        (index < self.pages()).then(|| RamPage {
            run: self.clone(),
            index,
        })
    }
}

impl AsRef<SharedPages> for Run {
    fn as_ref(&self) -> &SharedPages {
        self.0.shared.as_ref()
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Run({:#x?})", self.0.pages)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        lock(&self.domain.ram).give_back(&self.pages);
    }
}

/// A page of a [`Run`], as a grant owns it.
#[derive(Clone, Debug)]
pub struct RamPage {
    run: Run,
    index: u32,
}

impl RamPage {
    /// Copies bytes of the page out.
    ///
    /// # Errors
    /// [`WindowError::Outside`] for bytes beyond the page.
    pub fn read(&self, at: usize, into: &mut [u8]) -> Result<(), WindowError> {
        let at = self.byte(at, into.len())?;
        self.run.0.domain.memory.read(at, into)
    }

    /// Copies bytes into the page.
    ///
    /// # Errors
    /// [`WindowError::Outside`] for bytes beyond the page.
    pub fn write(&self, at: usize, from: &[u8]) -> Result<(), WindowError> {
        let at = self.byte(at, from.len())?;
        self.run.0.domain.memory.write(at, from)
    }

    fn byte(&self, at: usize, len: usize) -> Result<usize, WindowError> {
        let end = at.saturating_add(len);
        if end > PAGE_SIZE {
            return Err(WindowError::Outside { at, end, pages: 1 });
        }
        Ok(usize_of(self.run.0.pages.start + self.index) * PAGE_SIZE + at)
    }
}

impl Page for RamPage {
    fn gfn(&self) -> Gfn {
        Gfn(u64::from(self.run.0.pages.start + self.index))
    }

    fn zero(&mut self) {
        // The page is inside its domain's memory, which is writable.
        let _ = self.write(0, &[0; PAGE_SIZE]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_from_both_ends_do_not_overlap_and_come_back() {
        let mut ram = Allocator::new(8);
        assert_eq!(ram.take(2, true), Some(0));
        assert_eq!(ram.take(3, false), Some(5));
        assert_eq!(ram.take(4, true), None);
        assert_eq!(ram.take(3, true), Some(2));
        assert_eq!(ram.take(1, false), None);
        ram.give_back(&(2..5));
        assert_eq!(ram.take(3, false), Some(2));
        for nonsense in [0, 9, u32::MAX] {
            assert_eq!(ram.take(nonsense, true), None, "{nonsense}");
        }
    }

    #[test]
    fn only_what_is_not_shareable_yet_is_asked_for_and_in_bounded_calls() {
        let mut ram = Allocator::new(1000);
        assert_eq!(ram.not_shareable(&(0..600)), [0..256, 256..512, 512..600]);
        for page in [3, 4, 7] {
            ram.note_shareable(page);
        }
        assert_eq!(ram.not_shareable(&(2..8)), [2..3, 5..7]);
        ram.note_shareable(1000);
    }
}
