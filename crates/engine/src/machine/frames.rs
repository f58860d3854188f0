//! The machine's frames: who owns each, how often it is referenced, and what it is used as.
//!
//! What must always hold:
//! 1. A frame is free if and only if nothing references it and no transfer is carrying it.
//! 2. A frame has one type at a time; the type may change only while its count is 0 (spec 4.2.3).
//! 3. A free frame holds nothing but poison, from the moment it is freed until it is used again.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;

use gnttab_abi::{DomId, Gfn, Mfn, PAGE_SIZE};

use crate::shared::PageWords;

/// Byte that fills a free frame.
pub const POISON: u8 = 0xC5;

/// First frame number that is given out by itself.
const FIRST: u64 = 0x1000;
/// First frame number above what a version 1 entry can hold.
pub(super) const HIGH: u64 = 1 << 32;
/// So many frames stay poisoned before the oldest is used again.
const QUARANTINE: usize = 256;
/// A reference count at its limit: no further reference can be taken.
const SATURATED: u64 = (1 << 54) - 1;

/// Whose a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageOwner {
    /// A domain's, alive or dying.
    Domain(DomId),
    /// The copy-on-write pseudo domain's.
    CopyOnWrite,
    /// Not memory: registers of a device.
    Io,
    /// In use, but nobody's, as is a page on its way between two domains.
    Nobody,
    /// Free.
    Free,
}

/// What a frame is used as (spec 4.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageType {
    /// Writable memory.
    Writable,
    /// A level-1 page table of a PV domain.
    L1Table,
    /// Something else that nobody may write: a descriptor table, a higher page table, a page
    /// that the hypervisor shares for reading.
    Other,
}

/// What the machine knows of a frame, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameInfo {
    /// Its owner.
    pub owner: PageOwner,
    /// References, the owner's own (the allocation) included.
    pub references: u64,
    /// Whether its owner still holds the allocation.
    pub allocated: bool,
    /// Its type; meaningless while the count is 0.
    pub page_type: PageType,
    /// Uses as that type; 0: it may become anything.
    pub type_count: u64,
    /// Shared between hypervisor and owner (a table's page, shared_info): not to be transferred.
    pub special: bool,
    /// Machine-to-physical: the number that a PV owner gave it.
    pub physical: Gfn,
}

pub(super) struct Frame {
    pub(super) info: FrameInfo,
    /// References and types that the machine itself holds for a page-table page.
    pub(super) in_use_as_table: bool,
    /// References that a test or a tool holds by hand.
    pub(super) held: u64,
    pub(super) words: Arc<PageWords>,
}

impl Frame {
    fn new(owner: PageOwner) -> Frame {
        Frame {
            info: FrameInfo {
                owner,
                references: 0,
                allocated: false,
                page_type: PageType::Writable,
                type_count: 0,
                special: false,
                physical: Gfn::INVALID,
            },
            in_use_as_table: false,
            held: 0,
            words: Arc::new(PageWords::zeroed()),
        }
    }

    fn take_over(&mut self, owner: PageOwner) {
        self.words.clear();
        self.info = Frame::new(owner).info;
        self.info.references = 1;
        self.info.allocated = true;
        self.in_use_as_table = false;
        self.held = 0;
    }

    pub(super) fn is_memory(&self) -> bool {
        self.info.owner != PageOwner::Io
    }

    pub(super) fn is_poisoned(&self) -> bool {
        let mut bytes = [0; PAGE_SIZE];
        self.words.read(0, &mut bytes) && bytes == [POISON; PAGE_SIZE]
    }
}

/// All frames. A number that is not in it is no memory at all.
#[derive(Default)]
pub(super) struct Frames {
    frames: BTreeMap<Mfn, Frame>,
    free: VecDeque<Mfn>,
    next: u64,
}

impl Frames {
    pub(super) fn get(&self, mfn: Mfn) -> Option<&Frame> {
        self.frames.get(&mfn)
    }

    pub(super) fn get_mut(&mut self, mfn: Mfn) -> Option<&mut Frame> {
        self.frames.get_mut(&mfn)
    }

    /// A frame that is memory and not free.
    pub(super) fn live(&self, mfn: Mfn) -> Option<&Frame> {
        self.get(mfn)
            .filter(|frame| frame.is_memory() && frame.info.owner != PageOwner::Free)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Mfn, &Frame)> {
        self.frames.iter().map(|(mfn, frame)| (*mfn, frame))
    }

    pub(super) fn owner(&self, mfn: Mfn) -> Option<PageOwner> {
        self.live(mfn).map(|frame| frame.info.owner)
    }

    pub(super) fn is_owned_by(&self, mfn: Mfn, domain: DomId) -> bool {
        self.owner(mfn) == Some(PageOwner::Domain(domain))
    }

    /// A zeroed frame below 2^32, with its allocation reference.
    pub(super) fn allocate(&mut self, owner: PageOwner) -> Mfn {
        let mfn = if self.free.len() > QUARANTINE
            && let Some(place) = self.free.iter().position(|mfn| mfn.0 < HIGH)
            && let Some(mfn) = self.free.remove(place)
        {
            mfn
        } else {
            loop {
                let mfn = Mfn(FIRST + self.next);
                self.next += 1;
                if !self.frames.contains_key(&mfn) {
                    break mfn;
                }
            }
        };
        self.frames
            .entry(mfn)
            .or_insert_with(|| Frame::new(owner))
            .take_over(owner);
        mfn
    }

    /// A zeroed frame at a chosen number; false if it is in use.
    pub(super) fn allocate_at(&mut self, mfn: Mfn, owner: PageOwner) -> bool {
        if self
            .get(mfn)
            .is_some_and(|frame| frame.info.owner != PageOwner::Free)
        {
            return false;
        }
        self.free.retain(|free| *free != mfn);
        self.frames
            .entry(mfn)
            .or_insert_with(|| Frame::new(owner))
            .take_over(owner);
        true
    }

    /// Takes a reference on a frame that has one already.
    pub(super) fn reference(&mut self, mfn: Mfn) -> Option<PageOwner> {
        let frame = self.get_mut(mfn)?;
        match frame.info.owner {
            PageOwner::Io => Some(PageOwner::Io),
            PageOwner::Free => None,
            _ if frame.info.references == 0 || frame.info.references >= SATURATED => None,
            owner => {
                frame.info.references += 1;
                Some(owner)
            }
        }
    }

    /// Takes a type; false if the frame is in use as another.
    pub(super) fn take_type(&mut self, mfn: Mfn, page_type: PageType) -> bool {
        let Some(frame) = self.get_mut(mfn) else {
            return false;
        };
        let info = &mut frame.info;
        if info.type_count != 0 && info.page_type != page_type {
            return false;
        }
        info.page_type = page_type;
        info.type_count += 1;
        true
    }

    /// Makes the frame free: poisoned, and last in the queue for new use.
    pub(super) fn release(&mut self, mfn: Mfn) {
        let Some(frame) = self.frames.get_mut(&mfn) else {
            return;
        };
        let poisoned = frame.words.write(0, &[POISON; PAGE_SIZE]);
        debug_assert!(poisoned, "the whole page lies in the page");
        frame.info = Frame::new(PageOwner::Free).info;
        self.free.push_back(mfn);
    }
}
