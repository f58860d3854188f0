//! The pages of a domain's grant table and of its status words.
//!
//! All that a domain may ever have lie in one file, which it and the monitor map whole at the start. The
//! engine takes pages out of it and gives them back; a domain learns which page is which frame when it
//! places the frame (`add_to_physmap`), as an auto-translated guest does anyhow.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gnttab_abi::{Gfn, PAGE_SIZE, status_pages_for};
use gnttab_engine::PageWords;

use crate::sys::{Access, Backing, MemoryError, SealedMemory, Window};

/// All table pages of a domain.
#[derive(Debug)]
pub(crate) struct Tables {
    file: SealedMemory,
    window: Window,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: Vec<usize>,
    /// Where the domain sees each page.
    placed: Vec<Option<Gfn>>,
}

/// A page that the engine has taken. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct TablePage {
    tables: Arc<Tables>,
    page: usize,
}

impl Tables {
    /// Pages for a table of so many frames and its status words.
    pub(crate) fn new(max_frames: u32) -> Result<Tables, MemoryError> {
        let pages = max_frames.saturating_add(status_pages_for(max_frames));
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        let file = SealedMemory::new("gnttab-table", pages, Backing::Lazy)?;
        let window = Window::of(&file, pages, Access::Write)?;
        let state = State {
            free: (0..pages).rev().collect(),
            placed: vec![None; pages],
        };
        Ok(Tables {
            file,
            window,
            state: Mutex::new(state),
        })
    }

    pub(crate) fn pages(&self) -> usize {
        self.window.pages()
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A zeroed page.
    pub(crate) fn alloc(self: &Arc<Self>) -> Option<TablePage> {
        let page = self.state().free.pop()?;
        let page = TablePage {
            tables: Arc::clone(self),
            page,
        };
        // The domain may have written to it meanwhile.
        self.window.zero(page.page * PAGE_SIZE, PAGE_SIZE).ok()?;
        Some(page)
    }

    /// Where the domain sees a page.
    pub(crate) fn gfn(&self, page: &TablePage) -> Option<Gfn> {
        self.state().placed.get(page.page).copied().flatten()
    }

    /// The domain sees a page there from now on, and there no other.
    pub(crate) fn place(&self, page: &TablePage, gfn: Option<Gfn>) {
        let mut state = self.state();
        for place in state
            .placed
            .iter_mut()
            .filter(|place| gfn.is_some() && **place == gfn)
        {
            *place = None;
        }
        if let Some(place) = state.placed.get_mut(page.page) {
            *place = gfn;
        }
    }

    /// Which page the domain sees at a gfn.
    pub(crate) fn page_at(&self, gfn: Gfn) -> Option<usize> {
        self.state().placed.iter().position(|place| *place == Some(gfn))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TablePage {
    /// Its number among the domain's table pages.
    pub(crate) fn number(&self) -> usize {
        self.page
    }
}

impl AsRef<PageWords> for TablePage {
    fn as_ref(&self) -> &PageWords {
        /// Never used: every page of the window is writable, and the number lies in it.
        static NOWHERE: PageWords = PageWords::zeroed();
        self.tables.window.page_words(self.page).unwrap_or(&NOWHERE)
    }
}

impl Drop for TablePage {
    fn drop(&mut self) {
        let mut state = self.tables.state();
        state.free.push(self.page);
        if let Some(place) = state.placed.get_mut(self.page) {
            *place = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_zeroed_are_as_many_as_promised_and_come_back() {
        let tables = Arc::new(Tables::new(3).unwrap());
        assert_eq!(tables.pages(), 3 + 1);
        let pages: Vec<TablePage> = std::iter::from_fn(|| tables.alloc()).collect();
        assert_eq!(pages.len(), 4);
        let first = pages.into_iter().next().unwrap();
        assert!(first.as_ref().write(8, &[1, 2, 3]));
        drop(first);
        let again: Vec<TablePage> = std::iter::from_fn(|| tables.alloc()).collect();
        assert_eq!(again.len(), 4);
        for page in &again {
            assert_eq!(page.as_ref().read_bytes::<16>(0), Some([0; 16]));
        }
    }

    #[test]
    fn a_gfn_shows_one_page_and_a_page_is_seen_at_one_gfn() {
        let tables = Arc::new(Tables::new(3).unwrap());
        let (one, other) = (tables.alloc().unwrap(), tables.alloc().unwrap());
        tables.place(&one, Some(Gfn(9)));
        assert_eq!(tables.page_at(Gfn(9)), Some(one.number()));
        tables.place(&other, Some(Gfn(9)));
        assert_eq!((tables.gfn(&one), tables.gfn(&other)), (None, Some(Gfn(9))));
        tables.place(&other, Some(Gfn(10)));
        assert_eq!(tables.page_at(Gfn(9)), None);
        tables.place(&other, None);
        assert_eq!(tables.page_at(Gfn(10)), None);
        tables.place(&one, Some(Gfn(11)));
        drop(one);
        assert_eq!(tables.page_at(Gfn(11)), None);
    }
}
