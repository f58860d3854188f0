//! A range of address space that stays ours while pages come and go in it.
//!
//! What must always hold:
//! 1. The range is reserved at creation (`PROT_NONE`) and given back at drop, whole. Placing and
//!    clearing replace pages inside it with `MAP_FIXED`; they never leave a gap that an unrelated
//!    mapping could fill.
//! 2. Nothing in the range is ever seen through a reference to plain data. Copies load and store each
//!    byte once (`gnttab_io::shared`), words are atomics: another process writes here whenever it likes,
//!    and what it writes can only be a wrong value.
//! 3. An access outside the range, or to a page that holds nothing or is read-only, is an error.
//!    A page that is cleared *while* it is read faults (the process dies); whoever clears must have
//!    stopped the readers, as with any unmap.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use gnttab_abi::PAGE_SIZE;
use gnttab_io::shared;
use rustix::io::Errno;
use rustix::mm::{self, MapFlags, ProtFlags};

/// What may be done to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// Nothing is there.
    None = 0,
    /// Reading.
    Read = 1,
    /// Reading and writing.
    Write = 2,
}

/// Why memory in a window could not be placed or reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// No such pages.
    #[error("bytes {at:#x} to {end:#x} lie outside a window of {pages} pages")]
    Outside {
        /// First byte asked for, from the window's start.
        at: usize,
        /// The byte behind the last one.
        end: usize,
        /// Pages that the window has.
        pages: usize,
    },
    /// Nothing is mapped there, or not for writing.
    #[error("page {page:#x} of the window cannot be {}", if *.write { "written" } else { "read" })]
    Refused {
        /// The first page that refuses.
        page: usize,
        /// Whether it was to be written.
        write: bool,
    },
    /// A word must lie on a multiple of its size.
    #[error("byte {at:#x} is not aligned for a word of {size} bytes")]
    Misaligned {
        /// The byte asked for.
        at: usize,
        /// The word's size.
        size: usize,
    },
    /// The kernel refused the mapping: no memory, or too many mappings (65,530 a process by default).
    #[error("cannot map {pages} pages: {errno}")]
    Map {
        /// Pages to be mapped.
        pages: usize,
        /// What it said.
        errno: Errno,
    },
    /// A file was to be read into, or written from, the window.
    #[error("cannot move bytes between the window and a file: {0}")]
    File(Errno),
}

/// A reserved range of whole pages. See the module's rules.
pub struct Window {
    pub(super) start: NonNull<u8>,
    pages: usize,
    /// What each page allows. Only a hint for friendly errors: the kernel enforces it.
    access: Box<[AtomicU8]>,
}

// SAFETY: the range is owned by the value alone (rule 1), and all access to it is by atomics and
// system calls, which any thread may do.
unsafe impl Send for Window {}
// SAFETY: as above; `&self` methods that change mappings rely on the kernel's own locking.
unsafe impl Sync for Window {}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No address: it would help whoever reads logs to aim.
        f.debug_struct("Window")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl Window {
    /// Reserves `pages` pages (at least one) that hold nothing.
    ///
    /// # Errors
    /// [`WindowError::Map`] when the address space has no room.
    pub fn reserve(pages: usize) -> Result<Window, WindowError> {
        let refused = |errno| WindowError::Map { pages, errno };
        let bytes = pages
            .checked_mul(PAGE_SIZE)
            .filter(|&bytes| bytes > 0)
            .ok_or(refused(Errno::INVAL))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping where the kernel likes; it replaces nothing.
        let start = unsafe { mm::mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::empty(), flags) }
            .map_err(refused)?;
        let start = NonNull::new(start.cast()).ok_or(refused(Errno::NOMEM))?;
        let access = std::iter::repeat_with(|| AtomicU8::new(Access::None as u8))
            .take(pages)
            .collect();
        Ok(Window { start, pages, access })
    }

    /// Reserves a window and fills it with the whole of one memory object.
    ///
    /// # Errors
    /// As [`Self::reserve`] and [`Self::place`].
    pub fn of(memory: impl AsFd, pages: usize, access: Access) -> Result<Window, WindowError> {
        let window = Window::reserve(pages)?;
        window.place(0, memory, 0, pages, access)?;
        Ok(window)
    }

    /// How many pages it spans.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Where the range lies in this process, in bytes: for telling, and for tests that attack it.
    #[must_use]
    pub fn addresses(&self) -> Range<usize> {
        let start = self.start.addr().get();
        start..start + self.pages * PAGE_SIZE
    }

    /// What page `page` allows; [`Access::None`] also for a page outside.
    #[must_use]
    pub fn access(&self, page: usize) -> Access {
        match self.access.get(page).map(|access| access.load(Ordering::Acquire)) {
            Some(1) => Access::Read,
            Some(2) => Access::Write,
            _ => Access::None,
        }
    }

    /// Maps `pages` pages of `memory`, from its page `from` on, over the pages from `at` on.
    /// What was there is gone.
    ///
    /// # Errors
    /// [`WindowError::Outside`], or [`WindowError::Map`]: then the pages may hold nothing.
    pub fn place(
        &self,
        at: usize,
        memory: impl AsFd,
        from: usize,
        pages: usize,
        access: Access,
    ) -> Result<(), WindowError> {
        let prot = match access {
            Access::None => return self.clear(at, pages),
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        let (start, bytes) = self.page_range(at, pages)?;
        let from = from
            .checked_mul(PAGE_SIZE)
            .and_then(|from| u64::try_from(from).ok());
        let from = from.ok_or(WindowError::Map {
            pages,
            errno: Errno::OVERFLOW,
        })?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: `page_range` says that the range lies inside ours, so FIXED replaces our own pages only.
        let mapped = unsafe { mm::mmap(start, bytes, prot, flags, memory, from) };
        match mapped {
            Ok(_) => {
                self.note(at, pages, access);
                Ok(())
            }
            Err(errno) => Err(WindowError::Map { pages, errno }),
        }
    }

    /// Makes the pages hold nothing again; the range stays reserved.
    ///
    /// # Errors
    /// [`WindowError::Outside`], or [`WindowError::Map`] when the kernel cannot split the mapping.
    pub fn clear(&self, at: usize, pages: usize) -> Result<(), WindowError> {
        let (start, bytes) = self.page_range(at, pages)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        self.note(at, pages, Access::None);
        // SAFETY: `page_range` says that the range lies inside ours, so FIXED replaces our own pages only.
        let cleared = unsafe { mm::mmap_anonymous(start, bytes, ProtFlags::empty(), flags) };
        cleared
            .map(drop)
            .map_err(|errno| WindowError::Map { pages, errno })
    }

    /// Copies out. Each byte is read exactly once.
    ///
    /// # Errors
    /// [`WindowError::Outside`] or [`WindowError::Refused`]; nothing was copied then.
    pub fn read(&self, at: usize, into: &mut [u8]) -> Result<(), WindowError> {
        let from = self.bytes(at, into.len(), Access::Read)?;
        // SAFETY: the range was checked, just now; `into` is private memory.
        unsafe { shared::load_bytes(from, into) };
        Ok(())
    }

    /// Copies in. Each byte is written exactly once.
    ///
    /// # Errors
    /// [`WindowError::Outside`] or [`WindowError::Refused`]; nothing was written then.
    pub fn write(&self, at: usize, from: &[u8]) -> Result<(), WindowError> {
        let to = self.bytes(at, from.len(), Access::Write)?;
        // SAFETY: the range was checked, just now; `from` is private memory.
        unsafe { shared::store_bytes(from, to) };
        Ok(())
    }

    /// Copies between two windows, or inside one (ranges must not overlap: bytes that do are read
    /// before or after they are written).
    ///
    /// # Errors
    /// [`WindowError::Outside`] or [`WindowError::Refused`]; nothing was written then.
    pub fn copy_to(&self, at: usize, other: &Window, other_at: usize, len: usize) -> Result<(), WindowError> {
        let from = self.bytes(at, len, Access::Read)?;
        let to = other.bytes(other_at, len, Access::Write)?;
        // SAFETY: both ranges were checked, just now.
        unsafe { shared::move_bytes(from, to, len) };
        Ok(())
    }

    /// Fills a range with zeros.
    ///
    /// # Errors
    /// [`WindowError::Outside`] or [`WindowError::Refused`]; nothing was written then.
    pub fn zero(&self, at: usize, len: usize) -> Result<(), WindowError> {
        self.bytes(at, len, Access::Write)?;
        let zeros = [0; PAGE_SIZE];
        for index in (0..len).step_by(PAGE_SIZE) {
            self.write(at + index, &zeros[..PAGE_SIZE.min(len - index)])?;
        }
        Ok(())
    }

    /// A 16-bit word for atomic access. Storing needs a page that [`Access::Write`] allows.
    ///
    /// # Errors
    /// [`WindowError::Misaligned`], [`WindowError::Outside`] or [`WindowError::Refused`].
    pub fn atomic_u16(&self, at: usize) -> Result<&AtomicU16, WindowError> {
        let word = self.word::<AtomicU16>(at, Access::Write)?;
        // SAFETY: `word` checked the range and the alignment; the range is ours as long as `self` (rule 1).
        Ok(unsafe { word.as_ref() })
    }

    /// A 32-bit word for atomic access. Storing needs a page that [`Access::Write`] allows.
    ///
    /// # Errors
    /// [`WindowError::Misaligned`], [`WindowError::Outside`] or [`WindowError::Refused`].
    pub fn atomic_u32(&self, at: usize) -> Result<&AtomicU32, WindowError> {
        let word = self.word::<AtomicU32>(at, Access::Write)?;
        // SAFETY: `word` checked the range and the alignment; the range is ours as long as `self` (rule 1).
        Ok(unsafe { word.as_ref() })
    }

    /// A 64-bit word for atomic access. Storing needs a page that [`Access::Write`] allows.
    ///
    /// # Errors
    /// [`WindowError::Misaligned`], [`WindowError::Outside`] or [`WindowError::Refused`].
    pub fn atomic_u64(&self, at: usize) -> Result<&AtomicU64, WindowError> {
        let word = self.word::<AtomicU64>(at, Access::Write)?;
        // SAFETY: `word` checked the range and the alignment; the range is ours as long as `self` (rule 1).
        Ok(unsafe { word.as_ref() })
    }

    /// One byte, read once with acquire ordering.
    ///
    /// # Errors
    /// [`WindowError::Outside`] or [`WindowError::Refused`].
    pub fn load_u8(&self, at: usize) -> Result<u8, WindowError> {
        let byte = self.word::<AtomicU8>(at, Access::Read)?;
        // SAFETY: `word` checked the range; a one-byte load is fine in read-only memory.
        Ok(unsafe { byte.as_ref() }.load(Ordering::Acquire))
    }

    /// One byte, written with release ordering.
    ///
    /// # Errors
    /// [`WindowError::Outside`] or [`WindowError::Refused`].
    pub fn store_u8(&self, at: usize, value: u8) -> Result<(), WindowError> {
        let byte = self.word::<AtomicU8>(at, Access::Write)?;
        // SAFETY: `word` checked the range.
        unsafe { byte.as_ref() }.store(value, Ordering::Release);
        Ok(())
    }

    /// Reads from a file at a byte offset straight into the window; how many bytes came.
    ///
    /// # Errors
    /// [`WindowError::Outside`], [`WindowError::Refused`], or [`WindowError::File`] with the file's error.
    pub fn read_file(
        &self,
        at: usize,
        len: usize,
        file: impl AsFd,
        offset: u64,
    ) -> Result<usize, WindowError> {
        use std::os::fd::AsRawFd;
        let to = self.bytes(at, len, Access::Write)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| WindowError::File(Errno::OVERFLOW))?;
        // SAFETY: the kernel writes at most `len` bytes into the checked range.
        let got = unsafe { libc::pread(file.as_fd().as_raw_fd(), to.cast(), len, offset) };
        usize::try_from(got).map_err(|_| WindowError::File(last_errno()))
    }

    /// Writes to a file at a byte offset straight from the window; how many bytes went.
    ///
    /// # Errors
    /// [`WindowError::Outside`], [`WindowError::Refused`], or [`WindowError::File`] with the file's error.
    pub fn write_file(
        &self,
        at: usize,
        len: usize,
        file: impl AsFd,
        offset: u64,
    ) -> Result<usize, WindowError> {
        use std::os::fd::AsRawFd;
        let from = self.bytes(at, len, Access::Read)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| WindowError::File(Errno::OVERFLOW))?;
        // SAFETY: the kernel reads at most `len` bytes from the checked range.
        let put = unsafe { libc::pwrite(file.as_fd().as_raw_fd(), from.cast(), len, offset) };
        usize::try_from(put).map_err(|_| WindowError::File(last_errno()))
    }

    /// Address and length of whole pages, checked.
    fn page_range(&self, at: usize, pages: usize) -> Result<(*mut c_void, usize), WindowError> {
        let end = at.saturating_add(pages);
        if end > self.pages {
            let (at, end) = (at.saturating_mul(PAGE_SIZE), end.saturating_mul(PAGE_SIZE));
            return Err(WindowError::Outside {
                at,
                end,
                pages: self.pages,
            });
        }
        // SAFETY: at <= end <= self.pages, so the result lies inside the range or one past it.
        let start = unsafe { self.start.as_ptr().add(at * PAGE_SIZE) };
        Ok((start.cast(), pages * PAGE_SIZE))
    }

    /// Address of a byte range, checked against the window's size and the pages' access.
    fn bytes(&self, at: usize, len: usize, wanted: Access) -> Result<*mut u8, WindowError> {
        let end = at.saturating_add(len);
        if end > self.pages * PAGE_SIZE {
            return Err(WindowError::Outside {
                at,
                end,
                pages: self.pages,
            });
        }
        for page in at / PAGE_SIZE..end.div_ceil(PAGE_SIZE) {
            if (self.access(page) as u8) < wanted as u8 {
                return Err(WindowError::Refused {
                    page,
                    write: wanted == Access::Write,
                });
            }
        }
        // SAFETY: at <= the size of the range, so the result lies inside it or one past it.
        Ok(unsafe { self.start.as_ptr().add(at) })
    }

    /// Address of a word, checked as [`Self::bytes`] and for alignment.
    fn word<T>(&self, at: usize, wanted: Access) -> Result<NonNull<T>, WindowError> {
        let size = size_of::<T>();
        if !at.is_multiple_of(size) {
            return Err(WindowError::Misaligned { at, size });
        }
        let word = self.bytes(at, size, wanted)?;
        NonNull::new(word.cast()).ok_or(WindowError::Misaligned { at, size })
    }

    fn note(&self, at: usize, pages: usize, access: Access) {
        for page in &self.access[at..at + pages] {
            page.store(access as u8, Ordering::Release);
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone (rule 1) and nobody can name it any more.
        let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), self.pages * PAGE_SIZE) };
    }
}

pub(super) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Backing, SealedMemory};

    fn memory(pages: usize) -> SealedMemory {
        SealedMemory::new("test", pages, Backing::Lazy).unwrap()
    }

    #[test]
    fn bytes_of_any_alignment_and_length_come_back_as_written() {
        let window = Window::of(memory(3), 3, Access::Write).unwrap();
        let other = Window::of(memory(3), 3, Access::Write).unwrap();
        let pattern: Vec<u8> = (0..PAGE_SIZE + 40)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        for at in [0, 1, 7, 8, 4090, 4096] {
            for len in [0, 1, 7, 8, 9, 511, 513, PAGE_SIZE + 33] {
                window.write(at, &pattern[..len]).unwrap();
                let mut back = vec![0; len];
                window.read(at, &mut back).unwrap();
                assert_eq!(back, pattern[..len], "{len} bytes at {at}");
                window.copy_to(at, &other, at + 3, len).unwrap();
                other.read(at + 3, &mut back).unwrap();
                assert_eq!(back, pattern[..len], "{len} bytes copied from {at}");
                other.zero(at + 3, len).unwrap();
                other.read(at + 3, &mut back).unwrap();
                assert!(back.iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn an_access_outside_or_against_the_protection_is_an_error() {
        let window = Window::reserve(3).unwrap();
        window.place(0, memory(1), 0, 1, Access::Write).unwrap();
        window.place(1, memory(1), 0, 1, Access::Read).unwrap();
        let refused = |page, write| Err(WindowError::Refused { page, write });
        assert_eq!(window.write(PAGE_SIZE - 1, &[1, 2]), refused(1, true));
        assert_eq!(window.read(2 * PAGE_SIZE - 1, &mut [0; 2]), refused(2, false));
        assert_eq!(window.read(PAGE_SIZE - 1, &mut [0; 2]), Ok(()));
        let outside = WindowError::Outside {
            at: 3 * PAGE_SIZE,
            end: 3 * PAGE_SIZE + 1,
            pages: 3,
        };
        assert_eq!(window.read(3 * PAGE_SIZE, &mut [0; 1]), Err(outside));
        assert!(matches!(
            window.read(usize::MAX, &mut [0; 2]),
            Err(WindowError::Outside { .. })
        ));
        assert!(matches!(window.clear(2, 2), Err(WindowError::Outside { .. })));
        assert!(matches!(
            window.clear(usize::MAX, 2),
            Err(WindowError::Outside { .. })
        ));
        assert_eq!(
            window.atomic_u32(2).unwrap_err(),
            WindowError::Misaligned { at: 2, size: 4 }
        );
        assert_eq!(
            window.atomic_u32(PAGE_SIZE).unwrap_err(),
            WindowError::Refused { page: 1, write: true }
        );
        window.clear(0, 1).unwrap();
        assert_eq!(
            window.load_u8(0),
            Err(WindowError::Refused {
                page: 0,
                write: false
            })
        );
    }

    #[test]
    fn two_windows_of_one_memory_see_each_other() {
        let memory = memory(2);
        let one = Window::of(&memory, 2, Access::Write).unwrap();
        let other = Window::of(&memory, 2, Access::Read).unwrap();
        one.atomic_u64(4096 + 8)
            .unwrap()
            .store(u64::from_ne_bytes(*b"shared!!"), Ordering::Release);
        let mut seen = [0; 8];
        other.read(4096 + 8, &mut seen).unwrap();
        assert_eq!(&seen, b"shared!!");
    }

    #[test]
    fn a_file_is_read_into_and_written_from_a_window() {
        let file = memory(2);
        let window = Window::of(memory(2), 2, Access::Write).unwrap();
        window.write(10, b"through the file").unwrap();
        assert_eq!(window.write_file(10, 16, &file, 4000).unwrap(), 16);
        assert_eq!(window.read_file(8000, 16, &file, 4000).unwrap(), 16);
        let mut back = [0; 16];
        window.read(8000, &mut back).unwrap();
        assert_eq!(&back, b"through the file");
        assert_eq!(window.read_file(0, 16, &file, 8190).unwrap(), 2);
        assert!(matches!(
            window.read_file(8192, 1, &file, 0),
            Err(WindowError::Outside { .. })
        ));
        window.clear(0, 1).unwrap();
        assert!(matches!(
            window.read_file(0, 1, &file, 0),
            Err(WindowError::Refused { .. })
        ));
    }
}
