//! The memory of domains, as the monitor holds it.
//!
//! A domain's memory is one memfd, which only it and the monitor map. A page that a peer is to map must
//! have a memfd of its own first (*shareable*), since a descriptor gives access to all of a file. From then on:
//!
//! * a peer that maps it gets its descriptor; the page is *exposed* then, which the domain reads in a byte;
//! * for a peer that may only read, the file is sealed against new writers first, so nobody can map it for
//!   writing any more until it is renewed;
//! * when access has ended the domain has the page *renewed*: a new file with the same content. Whatever a
//!   hostile peer kept is the old file, to which nobody writes any more.
//!
//! What must always hold:
//! 1. A frame is renewed only while no mapping of it is counted, and exposed before its descriptor leaves.
//! 2. The monitor maps every file that it has handed out (for copies, and so that no peer can seal it
//!    against its owner).
//! 3. Memory is freed when its domain is dead and the last reference on any of its frames was dropped.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gnttab_abi::{DomId, Errno, Gfn, Mfn, PAGE_SIZE};

use crate::sys::{Access, Backing, MemoryError, SealedMemory, Window};

/// Most pages of one domain's memory: what a machine frame number has bits for.
pub(crate) const MOST_RAM_PAGES: u32 = 1 << GFN_BITS;
const GFN_BITS: u32 = 24;

/// Bits of a machine frame number: which memory, and which of its pages.
pub(crate) fn mfn(memory: u64, gfn: u64) -> Mfn {
    Mfn(memory << GFN_BITS | gfn)
}

/// Which memory a frame belongs to, and which of its pages it is.
pub(crate) fn parts(mfn: Mfn) -> (u64, u64) {
    (mfn.0 >> GFN_BITS, mfn.0 & (u64::from(MOST_RAM_PAGES) - 1))
}

/// A page with a file of its own.
#[derive(Debug)]
pub(crate) struct Page {
    file: SealedMemory,
    window: Window,
}

impl Page {
    fn new() -> Result<Page, MemoryError> {
        let file = SealedMemory::new("gnttab-page", 1, Backing::Reserved)?;
        let window = Window::of(&file, 1, Access::Write)?;
        Ok(Page { file, window })
    }
}

/// A frame of a domain's memory, if it has a file of its own.
#[derive(Debug, Default)]
struct Frame {
    /// `None`: the page lies in the domain's own file.
    page: Option<Arc<Page>>,
    /// Mappings by peers that exist now.
    mapped: u32,
    /// No new writer can map this file.
    read_only: bool,
}

/// What a peer that maps a frame is sent.
#[derive(Debug)]
pub(crate) enum Handout {
    Writable(Arc<Page>),
    ReadOnly(OwnedFd),
}

impl AsFd for Handout {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Handout::Writable(page) => page.file.as_fd(),
            Handout::ReadOnly(descriptor) => descriptor.as_fd(),
        }
    }
}

/// Why a peer cannot map a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotMappable;

/// All of one domain's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    number: u64,
    owner: DomId,
    ram: SealedMemory,
    window: Window,
    exposure: SealedMemory,
    exposed: Window,
    frames: Box<[Mutex<Frame>]>,
    /// Whether it may go.
    hold: Hold,
    /// Frames that have a file of their own, and how many may.
    shareable: AtomicU64,
    shareable_limit: u64,
}

/// What keeps a memory: its living domain, and the references that the engine holds on frames. One word, so that whoever
/// takes the last of these away is one, and nobody comes after: the low bit says that the domain is dead, the rest counts.
#[derive(Debug, Default)]
struct Hold(AtomicU64);

impl Hold {
    const RETIRED: u64 = 1;
    const REFERENCE: u64 = 2;

    /// Takes a reference; false if nothing kept the memory any more.
    fn take(&self) -> bool {
        let take = |now| (now != Self::RETIRED).then_some(now + Self::REFERENCE);
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .is_ok()
    }

    /// Drops a reference; whether nothing keeps the memory any more.
    fn drop_one(&self) -> bool {
        self.0.fetch_sub(Self::REFERENCE, Ordering::SeqCst) == Self::RETIRED + Self::REFERENCE
    }

    /// The domain is dead; whether nothing keeps the memory any more.
    fn retire(&self) -> bool {
        self.0.fetch_or(Self::RETIRED, Ordering::SeqCst) == 0
    }

    fn references(&self) -> u64 {
        self.0.load(Ordering::SeqCst) / Self::REFERENCE
    }
}

impl Memory {
    /// Makes the memory of a domain, zeroed.
    pub(crate) fn new(
        number: u64,
        owner: DomId,
        pages: u32,
        shareable_limit: u32,
    ) -> Result<Memory, MemoryError> {
        let pages = usize::try_from(pages.min(MOST_RAM_PAGES)).unwrap_or(0);
        let ram = SealedMemory::new("gnttab-ram", pages, Backing::Lazy)?;
        let window = Window::of(&ram, pages, Access::Write)?;
        let bytes = pages.div_ceil(PAGE_SIZE);
        let exposure = SealedMemory::new("gnttab-exposure", bytes, Backing::Reserved)?;
        let exposed = Window::of(&exposure, bytes, Access::Write)?;
        let frames = std::iter::repeat_with(Mutex::default).take(pages).collect();
        Ok(Memory {
            number,
            owner,
            ram,
            window,
            exposure,
            exposed,
            frames,
            hold: Hold::default(),
            shareable: AtomicU64::new(0),
            shareable_limit: shareable_limit.into(),
        })
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn owner(&self) -> DomId {
        self.owner
    }

    /// The domain's file.
    pub(crate) fn ram(&self) -> BorrowedFd<'_> {
        self.ram.as_fd()
    }

    /// The exposure bytes, for the domain to read.
    pub(crate) fn exposure(&self) -> Result<OwnedFd, MemoryError> {
        self.exposure.read_only_descriptor()
    }

    /// How many frames have a file of their own.
    pub(crate) fn shareable(&self) -> u64 {
        self.shareable.load(Ordering::Relaxed)
    }

    /// The frame of a page, if there is such a page.
    pub(crate) fn mfn(&self, gfn: Gfn) -> Option<Mfn> {
        let index = usize::try_from(gfn.0).ok()?;
        (index < self.frames.len()).then(|| mfn(self.number, gfn.0))
    }

    // --- references ------------------------------------------------------------------------------------

    /// Takes a reference on some frame; false once the memory is on its way out.
    pub(crate) fn take_reference(&self) -> bool {
        self.hold.take()
    }

    /// Drops a reference; whether that was the last one of a dead domain's memory.
    pub(crate) fn drop_reference(&self) -> bool {
        self.hold.drop_one()
    }

    /// Its domain is dead. Whether nobody holds a reference.
    pub(crate) fn retire(&self) -> bool {
        self.hold.retire()
    }

    pub(crate) fn references(&self) -> u64 {
        self.hold.references()
    }

    // --- content ---------------------------------------------------------------------------------------

    /// Copies bytes from a frame of this memory to a frame of another (or this). Both ranges lie in their
    /// pages.
    pub(crate) fn copy_to(&self, from: (u64, u16), other: &Memory, to: (u64, u16), len: u16) {
        let (source, dest) = (self.page(from.0), other.page(to.0));
        let (source, from) = self.place(source.as_deref(), from);
        let (dest, to) = other.place(dest.as_deref(), to);
        // The engine has checked both ranges; one that is wrong all the same copies nothing.
        let _ = source.copy_to(from, dest, to, len.into());
    }

    fn page(&self, gfn: u64) -> Option<Arc<Page>> {
        self.frame(gfn).and_then(|frame| frame.page.clone())
    }

    fn place<'a>(&'a self, page: Option<&'a Page>, (gfn, offset): (u64, u16)) -> (&'a Window, usize) {
        match page {
            Some(page) => (&page.window, offset.into()),
            None => (&self.window, byte_of(gfn).saturating_add(offset.into())),
        }
    }

    fn frame(&self, gfn: u64) -> Option<MutexGuard<'_, Frame>> {
        let frame = self.frames.get(usize::try_from(gfn).ok()?)?;
        // Nothing panics while it holds one; and if, each field is right by itself.
        Some(frame.lock().unwrap_or_else(PoisonError::into_inner))
    }

    // --- sharing ---------------------------------------------------------------------------------------

    /// Gives a page a file of its own, with the same content, and `send`s that to the domain, which maps it
    /// over the page. A page that has one already is sent again.
    pub(crate) fn share(
        &self,
        gfn: u64,
        send: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut frame = self.frame(gfn).ok_or(Errno::Inval)?;
        if let Some(page) = &frame.page {
            return if frame.read_only {
                Err(Errno::Busy)
            } else {
                send(page.file.as_fd())
            };
        }
        if self.shareable.fetch_add(1, Ordering::Relaxed) >= self.shareable_limit {
            self.shareable.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::NoMem);
        }
        let made = Page::new().map_err(|_| Errno::NoMem).and_then(|page| {
            let copied = self.window.copy_to(byte_of(gfn), &page.window, 0, PAGE_SIZE);
            copied.map_err(|_| Errno::Fault)?;
            send(page.file.as_fd())?;
            Ok(page)
        });
        match made {
            Ok(page) => frame.page = Some(Arc::new(page)),
            Err(errno) => {
                self.shareable.fetch_sub(1, Ordering::Relaxed);
                return Err(errno);
            }
        }
        // The domain's own file keeps no copy: it would be memory that nobody uses.
        let (at, len) = (u64::try_from(byte_of(gfn)).unwrap_or(0), PAGE_SIZE as u64);
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(&self.ram, punch, at, len);
        Ok(())
    }

    /// Gives an exposed page a new file with the same content, sent as in [`Self::share`]. Whether it was
    /// needed; `EBUSY` while a mapping is counted.
    pub(crate) fn renew(
        &self,
        gfn: u64,
        send: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> Result<bool, Errno> {
        let mut frame = self.frame(gfn).ok_or(Errno::Inval)?;
        if frame.mapped > 0 {
            return Err(Errno::Busy);
        }
        let Some(old) = frame.page.as_ref().filter(|_| self.is_exposed(gfn)) else {
            return Ok(false);
        };
        let new = Page::new().map_err(|_| Errno::NoMem)?;
        old.window
            .copy_to(0, &new.window, 0, PAGE_SIZE)
            .map_err(|_| Errno::Fault)?;
        send(new.file.as_fd())?;
        frame.page = Some(Arc::new(new));
        frame.read_only = false;
        self.expose(gfn, false);
        Ok(true)
    }

    /// A peer maps a frame: counts the mapping and gives what the peer is to be sent.
    pub(crate) fn map(&self, gfn: u64, access: Access) -> Result<Handout, NotMappable> {
        let mut frame = self.frame(gfn).ok_or(NotMappable)?;
        let page = frame.page.clone().ok_or(NotMappable)?;
        if access == Access::Write && frame.read_only {
            return Err(NotMappable);
        }
        // The bit before the descriptor: whoever sees the mapping gone sees that there was one.
        self.expose(gfn, true);
        let handout = if access == Access::Write {
            Handout::Writable(page)
        } else {
            frame.read_only = true;
            Handout::ReadOnly(page.file.read_only_descriptor().map_err(|_| NotMappable)?)
        };
        frame.mapped += 1;
        Ok(handout)
    }

    /// A mapping is gone.
    pub(crate) fn unmap(&self, gfn: u64) {
        if let Some(mut frame) = self.frame(gfn) {
            frame.mapped = frame.mapped.saturating_sub(1);
        }
    }

    fn is_exposed(&self, gfn: u64) -> bool {
        usize::try_from(gfn).is_ok_and(|at| self.exposed.load_u8(at) != Ok(0))
    }

    fn expose(&self, gfn: u64, yes: bool) {
        if let Ok(at) = usize::try_from(gfn) {
            // Inside: there is a byte for every frame.
            let _ = self.exposed.store_u8(at, yes.into());
        }
    }
}

/// The first byte of a page in its memory. Frames are numbers of a few bits (`MOST_RAM_PAGES`).
fn byte_of(gfn: u64) -> usize {
    usize::try_from(gfn)
        .unwrap_or(usize::MAX)
        .saturating_mul(PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        Memory::new(3, DomId(1), 8, 2).unwrap()
    }

    fn mapped(fd: BorrowedFd<'_>, access: Access) -> Window {
        Window::of(fd, 1, access).unwrap()
    }

    /// Shares a page and gives the domain's new mapping of it.
    fn share(memory: &Memory, gfn: u64) -> Window {
        let mut window = None;
        memory
            .share(gfn, |fd| {
                window = Some(mapped(fd, Access::Write));
                Ok(())
            })
            .unwrap();
        window.unwrap()
    }

    fn map(memory: &Memory, gfn: u64, access: Access) -> Option<Window> {
        let handout = memory.map(gfn, access).ok()?;
        Some(mapped(handout.as_fd(), access))
    }

    fn exposed(memory: &Memory, gfn: usize) -> bool {
        memory.exposed.load_u8(gfn).unwrap() == 1
    }

    #[test]
    fn frame_numbers_name_one_page_of_one_memory() {
        let memory = memory();
        assert_eq!(memory.mfn(Gfn(7)), Some(Mfn(3 << 24 | 7)));
        assert_eq!(memory.mfn(Gfn(8)), None);
        assert_eq!(memory.mfn(Gfn::INVALID), None);
        assert_eq!(parts(Mfn(3 << 24 | 7)), (3, 7));
    }

    #[test]
    fn a_page_keeps_its_content_when_it_becomes_shareable() {
        let memory = memory();
        memory.window.write(5 * PAGE_SIZE, b"content").unwrap();
        let domain = share(&memory, 5);
        let mut content = [0; 7];
        domain.read(0, &mut content).unwrap();
        assert_eq!(&content, b"content");
        domain.write(0, b"changed").unwrap();
        memory.copy_to((5, 0), &memory, (6, 100), 7);
        memory.window.read(6 * PAGE_SIZE + 100, &mut content).unwrap();
        assert_eq!(&content, b"changed", "copies go through the page's own file");
    }

    #[test]
    fn only_a_shareable_page_can_be_mapped_and_so_many_and_no_more() {
        let memory = memory();
        assert!(map(&memory, 1, Access::Write).is_none());
        assert!(!exposed(&memory, 1));
        share(&memory, 1);
        share(&memory, 2);
        share(&memory, 2);
        assert_eq!(memory.share(3, |_| Ok(())), Err(Errno::NoMem));
        assert_eq!(memory.share(8, |_| Ok(())), Err(Errno::Inval));
        assert_eq!(memory.share(u64::MAX, |_| Ok(())), Err(Errno::Inval));
        assert_eq!(memory.shareable(), 2);
        assert!(map(&memory, 1, Access::Write).is_some());
    }

    #[test]
    fn a_page_that_could_not_be_sent_stays_as_it_was() {
        let memory = memory();
        memory.window.write(0, b"content").unwrap();
        assert_eq!(memory.share(0, |_| Err(Errno::Again)), Err(Errno::Again));
        assert_eq!(memory.shareable(), 0);
        let domain = share(&memory, 0);
        map(&memory, 0, Access::Write).unwrap();
        memory.unmap(0);
        assert_eq!(memory.renew(0, |_| Err(Errno::Again)), Err(Errno::Again));
        assert!(exposed(&memory, 0));
        domain.write(0, b"go on..").unwrap();
        let peer = map(&memory, 0, Access::Read).unwrap();
        let mut content = [0; 7];
        peer.read(0, &mut content).unwrap();
        assert_eq!(&content, b"go on..");
    }

    #[test]
    fn a_renewed_page_is_out_of_reach_of_who_had_it() {
        let memory = memory();
        let domain = share(&memory, 0);
        let stale = map(&memory, 0, Access::Write).unwrap();
        assert!(exposed(&memory, 0));
        assert_eq!(
            memory.renew(0, |_| Ok(())),
            Err(Errno::Busy),
            "while it is mapped"
        );
        memory.unmap(0);
        domain.store_u8(0, 1).unwrap();
        let mut renewed = None;
        let again = memory.renew(0, |fd| {
            renewed = Some(mapped(fd, Access::Write));
            Ok(())
        });
        assert_eq!(again, Ok(true));
        assert!(!exposed(&memory, 0));
        let renewed = renewed.unwrap();
        assert_eq!(renewed.load_u8(0), Ok(1), "the content moves along");
        renewed.store_u8(0, 2).unwrap();
        assert_eq!(stale.load_u8(0), Ok(1));
        stale.store_u8(0, 66).unwrap();
        assert_eq!(renewed.load_u8(0), Ok(2));
        assert_eq!(memory.renew(0, |_| Ok(())), Ok(false), "once is enough");
    }

    #[test]
    fn a_page_mapped_for_reading_takes_no_new_writer_until_it_is_renewed() {
        let memory = memory();
        share(&memory, 0);
        let writer = map(&memory, 0, Access::Write);
        assert!(writer.is_some());
        assert!(map(&memory, 0, Access::Read).is_some());
        assert!(map(&memory, 0, Access::Write).is_none());
        assert!(map(&memory, 0, Access::Read).is_some());
        for _ in 0..3 {
            memory.unmap(0);
        }
        assert_eq!(memory.renew(0, |_| Ok(())), Ok(true));
        assert!(map(&memory, 0, Access::Write).is_some());
    }

    #[test]
    fn memory_of_a_dead_domain_goes_with_its_last_reference() {
        let memory = memory();
        assert!(memory.take_reference());
        assert!(memory.take_reference());
        assert!(!memory.drop_reference());
        assert!(!memory.retire());
        assert!(memory.take_reference(), "while it is there");
        assert!(!memory.drop_reference());
        assert!(memory.drop_reference(), "that was the last");
        assert!(!memory.take_reference(), "and there is no way back");
        assert_eq!(memory.references(), 0);
        assert!(!memory.retire(), "it goes once");
    }

    /// Each step is one change of one word, so these orders are all there are: two that take and drop, one that retires. In each
    /// of them one step lets the memory go, it is the last that kept it, and nobody takes it afterwards.
    #[test]
    fn in_every_order_one_lets_the_memory_go() {
        for order in 0..3_usize.pow(5) {
            let hold = Hold::default();
            let (mut held, mut retired, mut gone) = ([None; 2], false, 0);
            let mut rest = order;
            for _ in 0..5 {
                let who = rest % 3;
                rest /= 3;
                let kept = held.contains(&Some(true)) || !retired;
                match held.get_mut(who) {
                    None if !retired => {
                        retired = true;
                        gone += u32::from(hold.retire());
                    }
                    Some(step @ None) => {
                        *step = Some(hold.take());
                        assert_eq!(*step, Some(kept), "order {order}");
                    }
                    Some(step @ Some(true)) => {
                        *step = Some(false);
                        gone += u32::from(hold.drop_one());
                    }
                    _ => {}
                }
                let kept = held.contains(&Some(true)) || !retired;
                assert_eq!(gone, u32::from(!kept), "order {order}");
            }
        }
    }
}
