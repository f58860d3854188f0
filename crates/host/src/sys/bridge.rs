//! Where a page of a [`Window`] becomes the type that another crate sees shared memory through.

use std::ptr::NonNull;
use std::sync::Arc;

use gnttab_abi::PAGE_SIZE;
use gnttab_engine::PageWords;
use gnttab_guest::TableFrame;
use gnttab_io::shared::{self, SharedPages};

use super::{Access, Window};

impl Window {
    /// A page as the engine sees it: words that a guest can write at any moment. `None` outside, or if the
    /// page cannot be written.
    #[must_use]
    pub fn page_words(&self, page: usize) -> Option<&PageWords> {
        let at = self.page_address(page, 1, Access::Write)?;
        // SAFETY: 4096 aligned bytes that stay mapped as long as `self` (the window's rule 1), of a type
        // that is nothing but bytes in a cell.
        Some(unsafe { at.cast::<PageWords>().as_ref() })
    }

    /// A page as the guest's driver sees it: a frame of the grant table. `None` outside, or if the page
    /// cannot be written. The window is one that is never given back.
    #[must_use]
    pub fn table_frame(&'static self, page: usize) -> Option<TableFrame> {
        let at = self.page_address(page, 1, Access::Write)?;
        // SAFETY: mapped, aligned and writable, and reserved for ever ('static, the window's rule 1);
        // everything in this process reaches windows by atomics (its rule 2).
        Some(unsafe { TableFrame::new(at) })
    }

    /// A window that is never given back, for what lasts as long as the process.
    #[must_use]
    pub fn leak(self) -> &'static Window {
        Box::leak(Box::new(self))
    }

    /// Pages as a driver of rings sees them. `None` outside, or if one of them does not allow `access`.
    ///
    /// Whoever clears them while the value lives makes the next access a fault.
    #[must_use]
    pub fn shared_pages(self: &Arc<Self>, page: usize, pages: usize, access: Access) -> Option<WindowPages> {
        let at = self.page_address(page, pages, access)?;
        let access = match access {
            Access::None => return None,
            Access::Read => shared::Access::ReadOnly,
            Access::Write => shared::Access::ReadWrite,
        };
        // SAFETY: aligned and mapped with that access; they stay reserved as long as `window` below does
        // (its rule 1), and what lies there is reached by atomics and system calls only (its rule 2).
        let pages = unsafe { SharedPages::from_raw(at, pages, access) };
        Some(WindowPages {
            pages,
            _window: Arc::clone(self),
        })
    }

    fn page_address(&self, page: usize, pages: usize, wanted: Access) -> Option<NonNull<u8>> {
        let end = page.checked_add(pages).filter(|&end| end <= self.pages())?;
        let all = (page..end).all(|page| self.access(page) as u8 >= wanted as u8);
        if !all {
            return None;
        }
        NonNull::new(self.start.as_ptr().wrapping_add(page * PAGE_SIZE))
    }
}

/// Pages of a window, which stays as long as this does.
#[derive(Debug)]
pub struct WindowPages {
    pages: SharedPages,
    _window: Arc<Window>,
}

impl AsRef<SharedPages> for WindowPages {
    fn as_ref(&self) -> &SharedPages {
        &self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Backing, SealedMemory};

    #[test]
    fn pages_are_lent_with_no_more_access_than_they_have() {
        let memory = SealedMemory::new("test", 1, Backing::Lazy).unwrap();
        let window = Arc::new(Window::reserve(3).unwrap());
        window.place(0, &memory, 0, 1, Access::Write).unwrap();
        window.place(1, &memory, 0, 1, Access::Read).unwrap();
        assert!(window.page_words(0).is_some());
        assert!(window.page_words(1).is_none());
        assert!(window.page_words(3).is_none());
        assert!(window.shared_pages(0, 2, Access::Read).is_some());
        assert!(window.shared_pages(0, 2, Access::Write).is_none());
        assert!(window.shared_pages(1, 2, Access::Read).is_none());
        assert!(window.shared_pages(usize::MAX, 2, Access::Read).is_none());
        let pages = window.shared_pages(0, 1, Access::Write).unwrap();
        pages.as_ref().write(4, b"word");
        let mut word = [0; 4];
        window.read(PAGE_SIZE + 4, &mut word).unwrap();
        assert_eq!(&word, b"word");
    }
}
