//! Memory that can be handed to another process without trusting it.
//!
//! A [`SealedMemory`] is a memfd whose size is fixed for ever and whose pages all exist. The
//! seals are the first wall and stand on any kernel, also against a holder that runs as the same
//! user and reopens the descriptor through `/proc`; what confinement (`confine`) takes away
//! from a domain is the second.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use gnttab_abi::PAGE_SIZE;
use rustix::fs::{self, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::WindowError;

/// Why memory could not be made or shared.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel gave no memory or no descriptor.
    #[error("cannot make {pages} pages of shareable memory: {step}: {errno}")]
    Create {
        /// Pages asked for.
        pages: usize,
        /// The call that failed.
        step: &'static str,
        /// What it said.
        errno: Errno,
    },
    /// It could not be mapped.
    #[error(transparent)]
    Map(#[from] WindowError),
    /// The memory could not be made read-only for others.
    #[error("cannot share a page read-only: {step}: {errno}")]
    ReadOnly {
        /// The call that failed.
        step: &'static str,
        /// What it said.
        errno: Errno,
    },
}

/// A memfd of a whole number of pages that can neither shrink nor grow.
///
/// Having one tells you: an access inside it never raises SIGBUS because somebody changed its
/// size, whoever else holds it; all its pages were allocated (if asked for). It does not tell
/// you who else holds it, nor that the content stays put.
#[derive(Debug)]
pub struct SealedMemory {
    fd: OwnedFd,
    pages: usize,
}

/// Whether pages are allocated at once or when first touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Now: a lack of memory is an error here, not a fault later.
    Reserved,
    /// When first touched.
    Lazy,
}

impl SealedMemory {
    /// Makes `pages` zeroed pages. [`Backing::Reserved`] takes as much memory as there is before it
    /// fails: the caller bounds `pages`. `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// [`MemoryError::Create`] when the kernel is out of memory or descriptors.
    pub fn new(name: &str, pages: usize, backing: Backing) -> Result<Self, MemoryError> {
        let failed = |step| move |errno| MemoryError::Create { pages, step, errno };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know NOEXEC_SEAL.
        let fd = match fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => fs::memfd_create(name, flags),
            other => other,
        }
        .map_err(failed("memfd_create"))?;
        let bytes = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|bytes| u64::try_from(bytes).ok())
            .ok_or(MemoryError::Create {
                pages,
                step: "size",
                errno: Errno::OVERFLOW,
            })?;
        fs::ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
        if backing == Backing::Reserved && bytes > 0 {
            fs::fallocate(&fd, fs::FallocateFlags::empty(), 0, bytes).map_err(failed("fallocate"))?;
        }
        fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(failed("F_ADD_SEALS"))?;
        // Nobody but this user opens it anew, and nobody opens it for writing. The same user
        // could change the mode back, which is why this is not what protection rests on.
        fs::fchmod(&fd, Mode::RUSR).map_err(failed("fchmod"))?;
        Ok(SealedMemory { fd, pages })
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Forbids every *new* way to write: `mmap` for writing, `mprotect`, `write`, hole punching.
    /// Writable mappings that exist go on writing; so the owner must have mapped it before.
    ///
    /// Doing it again is harmless. It cannot be undone.
    ///
    /// # Errors
    /// [`MemoryError::ReadOnly`], for instance when a peer with a writable descriptor has forbidden
    /// further seals.
    pub fn forbid_new_writers(&self) -> Result<(), MemoryError> {
        fs::fcntl_add_seals(&self.fd, SealFlags::FUTURE_WRITE).map_err(|errno| MemoryError::ReadOnly {
            step: "F_SEAL_FUTURE_WRITE",
            errno,
        })
    }

    /// A new read-only descriptor of memory that nobody can start to write, for a peer.
    ///
    /// It needs `/proc`: a duplicate would share the access mode of the original.
    ///
    /// # Errors
    /// [`MemoryError::ReadOnly`] as [`Self::forbid_new_writers`], and when `/proc` is not there or
    /// descriptors have run out.
    pub fn read_only_descriptor(&self) -> Result<OwnedFd, MemoryError> {
        self.forbid_new_writers()?;
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            MemoryError::ReadOnly {
                step: "reopen through /proc/self/fd",
                errno,
            }
        })
    }
}

impl AsFd for SealedMemory {
    /// The writable descriptor.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The properties that isolation rests on, tried on the kernel this runs on. Each attack is made by
/// a holder of the descriptor, as this user, without any confinement.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Access, Window, WindowError};
    use rustix::fs::FallocateFlags;
    use rustix::mm::{self, MapFlags, ProtFlags};

    fn page() -> (SealedMemory, Window) {
        let memory = SealedMemory::new("test", 1, Backing::Reserved).unwrap();
        let window = Window::of(&memory, 1, Access::Write).unwrap();
        (memory, window)
    }

    fn byte(window: &Window) -> u8 {
        window.load_u8(0).unwrap()
    }

    fn try_to_write(fd: impl AsFd) -> [Result<(), Errno>; 4] {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let reopened = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        let length = PAGE_SIZE.try_into().unwrap();
        [
            match Window::of(&fd, 1, Access::Write) {
                Err(WindowError::Map { errno, .. }) => Err(errno),
                other => other.map(drop).map_err(|_| Errno::IO),
            },
            rustix::io::pwrite(&fd, b"x", 0).map(drop),
            fs::fallocate(&fd, punch, 0, length),
            fs::open(reopened, OFlags::RDWR, Mode::empty())
                .and_then(|fd| rustix::io::pwrite(&fd, b"x", 0))
                .map(drop),
        ]
    }

    #[test]
    fn nobody_can_change_the_size() {
        let (memory, _window) = page();
        for size in [0, 1, 4095, 4097, 8192] {
            assert_eq!(fs::ftruncate(&memory, size), Err(Errno::PERM), "to {size} bytes");
        }
        assert_eq!(
            fs::fallocate(&memory, FallocateFlags::empty(), 0, 8192),
            Err(Errno::PERM)
        );
        let collapse = fs::fallocate(&memory, FallocateFlags::COLLAPSE_RANGE, 0, 4096);
        assert!(collapse.is_err(), "{collapse:?}");
    }

    #[test]
    fn seals_cannot_be_taken_away_and_a_mapped_page_cannot_be_sealed_against_its_owner() {
        let (memory, window) = page();
        assert_eq!(fs::fcntl_add_seals(&memory, SealFlags::WRITE), Err(Errno::BUSY));
        fs::fcntl_add_seals(&memory, SealFlags::FUTURE_WRITE).unwrap();
        let seals = fs::fcntl_get_seals(&memory).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE));
        window.store_u8(0, 7).unwrap();
        assert_eq!(byte(&window), 7);
    }

    #[test]
    fn a_writable_peer_can_write() {
        let (memory, _window) = page();
        assert_eq!(try_to_write(&memory)[..3], [Ok(()); 3]);
    }

    #[test]
    fn a_read_only_peer_cannot_write_by_any_way() {
        let (memory, window) = page();
        window.store_u8(0, b'o').unwrap();
        let peer = memory.read_only_descriptor().unwrap();
        for (way, outcome) in ["mmap", "pwrite", "punch", "reopen"]
            .iter()
            .zip(try_to_write(&peer))
        {
            assert!(outcome.is_err(), "{way}");
        }
        // Even a peer that has kept a writable descriptor from before.
        for (way, outcome) in ["mmap", "pwrite", "punch", "reopen"]
            .iter()
            .zip(try_to_write(&memory))
        {
            assert!(
                matches!(outcome, Err(Errno::PERM | Errno::ACCESS)),
                "{way}: {outcome:?}"
            );
        }
        // Through a descriptor that reads only, nobody seals.
        assert_eq!(fs::fcntl_add_seals(&peer, SealFlags::SEAL), Err(Errno::PERM));
        assert_eq!(byte(&window), b'o');
    }

    #[test]
    fn a_read_only_mapping_cannot_be_made_writable() {
        let (memory, window) = page();
        let peer = memory.read_only_descriptor().unwrap();
        let mapped = Window::of(&peer, 1, Access::Read).unwrap();
        // Also one that was made from a writable descriptor after the seal.
        let other = Window::of(&memory, 1, Access::Read).unwrap();
        for mapping in [&mapped, &other] {
            let start = std::ptr::with_exposed_provenance_mut(mapping.addresses().start);
            // SAFETY: the range is the whole of a window that lives; giving more access breaks nothing.
            let outcome = unsafe { mm::mprotect(start, PAGE_SIZE, mm::MprotectFlags::WRITE) };
            assert_eq!(outcome, Err(Errno::ACCESS));
            // SAFETY: as above; punching a hole changes content only, which anybody may.
            let outcome = unsafe { mm::madvise(start, PAGE_SIZE, mm::Advice::LinuxRemove) };
            assert!(outcome.is_err());
        }
        window.store_u8(0, 9).unwrap();
        assert_eq!(byte(&mapped), 9, "the owner's mapping goes on writing");
    }

    /// `/proc/self/mem` writes where `mprotect` would not let: not into a shared mapping.
    #[test]
    fn a_read_only_mapping_cannot_be_written_through_proc_self_mem() {
        let (memory, window) = page();
        window.store_u8(0, b'o').unwrap();
        let peer = memory.read_only_descriptor().unwrap();
        let mapped = Window::of(&peer, 1, Access::Read).unwrap();
        let mem = fs::open("/proc/self/mem", OFlags::RDWR, Mode::empty()).unwrap();
        let address = u64::try_from(mapped.addresses().start).unwrap();
        let outcome = rustix::io::pwrite(&mem, b"x", address);
        assert!(outcome.is_err(), "{outcome:?}");
        assert_eq!(byte(&window), b'o');
    }

    #[test]
    fn a_private_mapping_of_a_read_only_page_writes_to_a_copy() {
        let (memory, window) = page();
        window.store_u8(0, b'o').unwrap();
        let peer = memory.read_only_descriptor().unwrap();
        let null = std::ptr::null_mut();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let copy = unsafe { mm::mmap(null, PAGE_SIZE, prot, MapFlags::PRIVATE, &peer, 0) }.unwrap();
        // SAFETY: just mapped, writable.
        unsafe { copy.cast::<u8>().write_volatile(b'x') };
        assert_eq!(byte(&window), b'o');
        // SAFETY: mapped above, used no more.
        unsafe { mm::munmap(copy, PAGE_SIZE) }.unwrap();
    }

    /// What renewal does: whoever kept the old page keeps the old content.
    #[test]
    fn a_stale_mapping_does_not_see_what_is_written_after_renewal() {
        let (old, owner) = page();
        let stale = Window::of(&old, 1, Access::Write).unwrap();
        owner.store_u8(0, 1).unwrap();
        assert_eq!(byte(&stale), 1);
        let renewed = SealedMemory::new("test", 1, Backing::Reserved).unwrap();
        Window::of(&renewed, 1, Access::Write)
            .unwrap()
            .store_u8(0, 1)
            .unwrap();
        owner.place(0, &renewed, 0, 1, Access::Write).unwrap();
        assert_eq!(byte(&owner), 1, "the content moves along");
        owner.store_u8(0, 2).unwrap();
        assert_eq!(byte(&stale), 1);
        stale.store_u8(0, 66).unwrap();
        assert_eq!(byte(&owner), 2);
    }

    #[test]
    fn a_size_that_no_machine_has_is_an_error() {
        for pages in [usize::MAX, usize::MAX / PAGE_SIZE] {
            let made = SealedMemory::new("test", pages, Backing::Reserved);
            assert!(matches!(made, Err(MemoryError::Create { .. })), "{pages}");
        }
    }
}
