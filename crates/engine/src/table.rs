//! A domain's table: its frames, its version, its active entries.
//!
//! What must always hold (spec 2.6):
//! 1. Version 1 has no status frames in use; version 2 has one for each eight grant frames.
//! 2. The number of frames only grows, storage first, then the number (VER-5, HND-3).
//! 3. Version, and with it the meaning of every shared word, changes only while the gate is shut
//!    and no reader is inside (see `registry`).
//! 4. `admin` serialises growth, version changes and placement; readers never take it.

use gnttab_abi::{
    DomId, ENTRY_V1_SIZE, EntryHead, GrantRef, STATUS_PER_PAGE, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE,
    status_pages_for,
};
use spin::{Mutex, Once};

use crate::active::{Active, Extra};
use crate::domain::Version;
use crate::hypervisor::{Hook, Hypervisor};
use crate::presence::Gate;
use crate::segments::{OutOfMemory, Segments};
use crate::shared::{PageWords, SharedV1, SharedV2};
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// See the module.
pub(crate) struct Table<P> {
    pub(crate) gate: Gate,
    pub(crate) admin: Mutex<()>,
    version: AtomicU32,
    max_frames: u32,
    nr_frames: AtomicU32,
    nr_status: AtomicU32,
    shared: Segments<Once<P>, 1, 20>,
    status: Segments<Once<P>, 1, 18>,
    active: Segments<Active, { V1_ENTRIES_PER_PAGE as usize }, 20>,
    /// One word for each version 2 reference; see [`Extra`].
    extra: Segments<AtomicU64, { V2_ENTRIES_PER_PAGE as usize }, 20>,
    /// Copies in flight that depend on version 2 (spec 2.4).
    pub(crate) v2_ops: AtomicU32,
}

impl<P: AsRef<PageWords>> Table<P> {
    /// A version 1 table of one zeroed frame.
    pub(crate) fn new<H>(hv: &H, domain: &H::Domain, max_frames: u32) -> Option<Table<P>>
    where
        H: Hypervisor<TablePage = P>,
    {
        let table = Table {
            gate: Gate::new(),
            admin: Mutex::new(()),
            version: AtomicU32::new(1),
            max_frames,
            nr_frames: AtomicU32::new(0),
            nr_status: AtomicU32::new(0),
            shared: Segments::new(),
            status: Segments::new(),
            active: Segments::new(),
            extra: Segments::new(),
            v2_ops: AtomicU32::new(0),
        };
        table.grow(hv, domain, 1).ok()?;
        Some(table)
    }

    pub(crate) fn version(&self) -> Version {
        if self.version.load(Ordering::Acquire) == 2 {
            Version::V2
        } else {
            Version::V1
        }
    }

    /// Changes the version. The gate is shut and `admin` held.
    pub(crate) fn set_version(&self, version: Version) {
        let status = if version == Version::V2 {
            status_pages_for(self.nr_frames())
        } else {
            0
        };
        self.nr_status.store(status, Ordering::Release);
        self.version.store(version.number(), Ordering::Release);
    }

    pub(crate) fn max_frames(&self) -> u32 {
        self.max_frames
    }

    pub(crate) fn nr_frames(&self) -> u32 {
        self.nr_frames.load(Ordering::Acquire)
    }

    pub(crate) fn nr_status(&self) -> u32 {
        self.nr_status.load(Ordering::Acquire)
    }

    /// Makes frames exist up to `frames`, with status frames in version 2 (spec 3.5 step 8). All
    /// or nothing as far as anybody can see. `admin` is held, or nobody else knows the table.
    pub(crate) fn grow<H>(&self, hv: &H, domain: &H::Domain, frames: u32) -> Result<(), OutOfMemory>
    where
        H: Hypervisor<TablePage = P>,
    {
        if frames > self.max_frames {
            return Err(OutOfMemory);
        }
        let version = self.version();
        self.make_entries(version, frames)?;
        Self::make_pages(hv, domain, &self.shared, frames)?;
        if version == Version::V2 {
            self.make_status(hv, domain, frames)?;
            hv.hook(Hook::Grow);
            self.nr_status
                .fetch_max(status_pages_for(frames), Ordering::Release);
        }
        hv.hook(Hook::Grow);
        self.nr_frames.fetch_max(frames, Ordering::Release);
        Ok(())
    }

    /// Room for the private state of every reference of so many frames.
    pub(crate) fn make_entries(&self, version: Version, frames: u32) -> Result<(), OutOfMemory> {
        let frames = frames as usize;
        match version {
            Version::V1 => self
                .active
                .grow(frames * V1_ENTRIES_PER_PAGE as usize, Active::new),
            Version::V2 => {
                let entries = frames * V2_ENTRIES_PER_PAGE as usize;
                self.active.grow(entries, Active::new)?;
                self.extra.grow(entries, || AtomicU64::new(0))
            }
        }
    }

    /// Makes the status pages for so many grant frames exist; they count once the version does.
    pub(crate) fn make_status<H>(&self, hv: &H, domain: &H::Domain, frames: u32) -> Result<(), OutOfMemory>
    where
        H: Hypervisor<TablePage = P>,
    {
        Self::make_pages(hv, domain, &self.status, status_pages_for(frames))
    }

    fn make_pages<H, const S: usize>(
        hv: &H,
        domain: &H::Domain,
        pages: &Segments<Once<P>, 1, S>,
        count: u32,
    ) -> Result<(), OutOfMemory>
    where
        H: Hypervisor<TablePage = P>,
    {
        pages.grow(count as usize, Once::new)?;
        for i in 0..count as usize {
            let slot = pages.get(i).ok_or(OutOfMemory)?;
            slot.try_call_once(|| hv.alloc_table_page(domain).ok_or(OutOfMemory))?;
        }
        Ok(())
    }

    /// Shared page `index`, if the table has it.
    pub(crate) fn shared_page(&self, index: u32) -> Option<&P> {
        if index >= self.nr_frames() {
            return None;
        }
        self.shared.get(index as usize)?.get()
    }

    /// Status page `index`, if the table has it now.
    pub(crate) fn status_page(&self, index: u32) -> Option<&P> {
        if index >= self.nr_status() {
            return None;
        }
        self.made_status_page(index)
    }

    /// Status page `index`, whether or not the version in force uses it.
    pub(crate) fn made_status_page(&self, index: u32) -> Option<&P> {
        self.status.get(index as usize)?.get()
    }

    /// The table as it stands now. Meaningful while the caller is inside (see `registry`), which
    /// keeps the version; frames may be added meanwhile, never taken away.
    pub(crate) fn view(&self) -> View<'_, P> {
        let version = self.version();
        View {
            table: self,
            version,
            entries: self.nr_frames() * entries_per_page(version),
        }
    }

    /// Bytes of private state: active entries and extra words.
    pub(crate) fn bytes(&self) -> usize {
        self.active.bytes() + self.extra.bytes() + self.shared.bytes() + self.status.bytes()
    }
}

/// Entries in one grant frame.
pub(crate) const fn entries_per_page(version: Version) -> u32 {
    match version {
        Version::V1 => V1_ENTRIES_PER_PAGE,
        Version::V2 => V2_ENTRIES_PER_PAGE,
    }
}

/// A table whose version cannot change while this is used.
pub(crate) struct View<'a, P> {
    table: &'a Table<P>,
    version: Version,
    entries: u32,
}

impl<'a, P: AsRef<PageWords>> View<'a, P> {
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// N(GT): references 0 to one less exist.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// The entry of a reference; `None` past the table (ENG-1).
    #[inline]
    pub(crate) fn entry(&self, gref: GrantRef) -> Option<Entry<'a>> {
        if gref.0 >= self.entries {
            return None;
        }
        let index = gref.0 as usize;
        let active = self.table.active.get(index)?;
        let per_page = entries_per_page(self.version) as usize;
        let page = self.table.shared.get(index / per_page)?.get()?.as_ref();
        let (shared, extra) = match self.version {
            Version::V1 => (SharedEntry::V1(SharedV1::new(page, index % per_page)), None),
            Version::V2 => {
                let status = index / STATUS_PER_PAGE as usize;
                let status_page = self.table.status.get(status)?.get()?.as_ref();
                let status_slot = index % STATUS_PER_PAGE as usize;
                let shared = SharedV2::new(page, index % per_page, status_page, status_slot);
                (SharedEntry::V2(shared), self.table.extra.get(index))
            }
        };
        Some(Entry {
            active,
            shared,
            extra,
        })
    }
}

/// One entry, private and shared half. Having one tells you: the reference was inside the table,
/// and the version is the one that `shared` says.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) active: &'a Active,
    pub(crate) shared: SharedEntry<'a>,
    extra: Option<&'a AtomicU64>,
}

#[cfg(all(test, loom))]
impl<'a> Entry<'a> {
    /// An entry of no table, for the models.
    pub(crate) fn alone(active: &'a Active, shared: SharedEntry<'a>) -> Entry<'a> {
        Entry {
            active,
            shared,
            extra: None,
        }
    }
}

impl Entry<'_> {
    /// See [`Extra`]. Stable while pinned.
    pub(crate) fn extra(&self) -> Extra {
        Extra(self.extra.map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    /// Written while the entry is claimed.
    pub(crate) fn set_extra(&self, extra: Extra) {
        if let Some(word) = self.extra {
            word.store(extra.0, Ordering::Relaxed);
        }
    }
}

/// The shared half, by version.
#[derive(Clone, Copy)]
pub(crate) enum SharedEntry<'a> {
    V1(SharedV1<'a>),
    V2(SharedV2<'a>),
}

impl SharedEntry<'_> {
    pub(crate) fn load_head(&self) -> EntryHead {
        match self {
            SharedEntry::V1(entry) => entry.load_head(),
            SharedEntry::V2(entry) => entry.load_head(),
        }
    }

    /// Replaces the head if it still is `old`; otherwise what was found.
    pub(crate) fn swap_head(&self, old: EntryHead, new: EntryHead) -> Result<(), EntryHead> {
        match self {
            SharedEntry::V1(entry) => entry.swap_head(old, new),
            SharedEntry::V2(entry) => entry.swap_head(old, new),
        }
    }

    /// The frame of an ordinary entry, in one load.
    pub(crate) fn load_frame(&self) -> u64 {
        match self {
            SharedEntry::V1(entry) => u64::from(entry.load_frame()),
            SharedEntry::V2(entry) => entry.load_frame(),
        }
    }
}

const _: () = assert!(ENTRY_V1_SIZE == size_of::<u64>());
const _: () = assert!(size_of::<Active>() == 16);
const _: () = assert!(DomId::FIRST_RESERVED.0 <= 0x7FFF);
