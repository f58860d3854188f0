//! A domain's table: its frames, its version, its active entries.
//!
//! What must always hold (spec 2.6):
//! 1. Version 1 has no status frames in use; version 2 has one for each eight grant frames.
//! 2. The number of frames only grows, storage first, then the number (VER-5, HND-3).
//! 3. Version, and with it the meaning of every shared word, changes only while the gate is shut
//!    and no reader is inside (see `registry`).
//! 4. `admin` serialises growth, version changes and placement; readers never take it.
//! 5. An entry whose private state was never made was never in use. It is made, some entries at a
//!    time, when a grantee first wants to use one of them.

use core::cell::Cell;

use gnttab_abi::{DomId, ENTRY_V1_SIZE, EntryHead, Gfn, GrantRef, GrantStatus};

use crate::active::{Active, Actives, Extra, State};
use crate::bound::{below, is_within};
use crate::domain::Version;
use crate::hypervisor::{Hook, Hypervisor};
use crate::lazy::Lazy;
use crate::pages::{STATUS_PER_PAGE, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE, status_pages_for};
use crate::presence::Gate;
use crate::segments::{OutOfMemory, Segments};
use crate::shared::{PageWords, SharedV1, SharedV2, StatusRow};
use crate::sync::{AtomicU32, AtomicU64, Mutex, Once, Ordering};

/// Entries whose private state is made together, and that are found together: those of a version 2 frame.
const PIECE: usize = NEIGHBOURS as usize;
const NEIGHBOURS: u32 = V2_ENTRIES_PER_PAGE;
/// Grant frames to a status frame.
const FRAMES_PER_STATUS: u32 = STATUS_PER_PAGE / V2_ENTRIES_PER_PAGE;

/// A frame of the table, and what the engine knows of its entries.
#[repr(align(64))]
struct Frame<P> {
    page: Once<P>,
    /// The status page of this frame and the seven behind it, in every eighth frame.
    status: Once<P>,
    pieces: Pieces,
}

/// The private state of a frame's entries.
type Pieces = [Lazy<Piece, 1>; PIECES];

/// How many they are.
const PIECES: usize = V1_ENTRIES_PER_PAGE as usize / PIECE;

/// The private state of neighbouring entries.
struct Piece {
    active: Actives<PIECE>,
    /// One word for each entry, once one of them needs it; see [`Extra`].
    extra: Lazy<AtomicU64, PIECE>,
}

impl Piece {
    fn new() -> Piece {
        Piece {
            active: Actives::new(),
            extra: Lazy::new(),
        }
    }
}

impl<P> Frame<P> {
    fn new() -> Frame<P> {
        Frame {
            page: Once::new(),
            status: Once::new(),
            pieces: core::array::from_fn(|_| Lazy::new()),
        }
    }
}

/// See the module.
pub(crate) struct Table<P> {
    pub(crate) gate: Gate,
    version: AtomicU32,
    nr_frames: AtomicU32,
    nr_status: AtomicU32,
    max_frames: u32,
    frames: Segments<Frame<P>, 1, 20>,
    /// Copies in flight that depend on version 2 (spec 2.4).
    pub(crate) v2_ops: AtomicU32,
    pub(crate) admin: Mutex<()>,
}

impl<P: AsRef<PageWords>> Table<P> {
    /// A version 1 table of one zeroed frame.
    pub(crate) fn new<H>(hv: &H, domain: &H::Domain, max_frames: u32) -> Option<Table<P>>
    where
        H: Hypervisor<TablePage = P>,
    {
        let table = Table {
            gate: Gate::new(),
            version: AtomicU32::new(1),
            nr_frames: AtomicU32::new(0),
            nr_status: AtomicU32::new(0),
            max_frames,
            frames: Segments::new(),
            v2_ops: AtomicU32::new(0),
            admin: Mutex::new(()),
        };
        table.grow(hv, domain, 1).ok()?;
        Some(table)
    }

    #[inline]
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

    #[inline]
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
        self.make_pages(hv, domain, frames, |frame| &frame.page)?;
        if self.version() == Version::V2 {
            self.make_status(hv, domain, frames)?;
            hv.hook(Hook::Grow);
            self.nr_status
                .fetch_max(status_pages_for(frames), Ordering::Release);
        }
        hv.hook(Hook::Grow);
        self.nr_frames.fetch_max(frames, Ordering::Release);
        Ok(())
    }

    /// Makes the status pages for so many grant frames exist; they count once the version does.
    pub(crate) fn make_status<H>(&self, hv: &H, domain: &H::Domain, frames: u32) -> Result<(), OutOfMemory>
    where
        H: Hypervisor<TablePage = P>,
    {
        self.frames.grow(frames as usize, Frame::new)?;
        for index in (0..frames).step_by(FRAMES_PER_STATUS as usize) {
            self.make_page(hv, domain, index, |frame| &frame.status)?;
        }
        Ok(())
    }

    fn make_pages<H>(
        &self,
        hv: &H,
        domain: &H::Domain,
        frames: u32,
        place: fn(&Frame<P>) -> &Once<P>,
    ) -> Result<(), OutOfMemory>
    where
        H: Hypervisor<TablePage = P>,
    {
        self.frames.grow(frames as usize, Frame::new)?;
        (0..frames).try_for_each(|index| self.make_page(hv, domain, index, place))
    }

    fn make_page<H>(
        &self,
        hv: &H,
        domain: &H::Domain,
        index: u32,
        place: fn(&Frame<P>) -> &Once<P>,
    ) -> Result<(), OutOfMemory>
    where
        H: Hypervisor<TablePage = P>,
    {
        let frame = self.frames.get(index as usize).ok_or(OutOfMemory)?;
        place(frame).try_call_once(|| hv.alloc_table_page(domain).ok_or(OutOfMemory))?;
        Ok(())
    }

    /// Shared page `index`, if the table has it.
    pub(crate) fn shared_page(&self, index: u32) -> Option<&P> {
        self.frames.get(below(index, self.nr_frames())?)?.page.get()
    }

    /// Status page `index`, if the table has it now.
    pub(crate) fn status_page(&self, index: u32) -> Option<&P> {
        self.made_status_page(u32::try_from(below(index, self.nr_status())?).ok()?)
    }

    /// Status page `index`, whether or not the version in force uses it.
    pub(crate) fn made_status_page(&self, index: u32) -> Option<&P> {
        let frame = below(index.checked_mul(FRAMES_PER_STATUS)?, self.nr_frames())?;
        self.frames.get(frame)?.status.get()
    }

    /// Whether an entry from `first` up is in use. Looks at those only that ever were. The table is
    /// had alone.
    pub(crate) fn is_used_from(&self, first: GrantRef) -> bool {
        let per_page = entries_per_page(self.version());
        (0..self.nr_frames()).any(|index| {
            let Some(frame) = self.frames.get(index as usize) else {
                return false;
            };
            (0u32..).step_by(PIECE).zip(&frame.pieces).any(|(start, piece)| {
                let unreserved = |slot: u32| index * per_page + start + slot >= first.0;
                let mut entries = piece
                    .get(0)
                    .into_iter()
                    .flat_map(|piece| (0..).zip(piece.active.iter()));
                entries.any(|(slot, active)| unreserved(slot) && active.load().is_pinned())
            })
        })
    }

    /// The table as it stands now. Meaningful while the caller is inside (see `registry`), which
    /// keeps the version; frames may be added meanwhile, never taken away.
    #[inline]
    pub(crate) fn view(&self) -> View<'_, P> {
        let version = self.version();
        View {
            table: self,
            version,
            entries: Cell::new(self.entries(version)),
            last: Cell::new(None),
        }
    }

    #[inline]
    fn entries(&self, version: Version) -> u32 {
        self.nr_frames() * entries_per_page(version)
    }

    /// Bytes of private state: what is known of frames and of entries.
    pub(crate) fn bytes(&self) -> usize {
        let frames = (0..self.nr_frames()).filter_map(|index| self.frames.get(index as usize));
        let pieces = |frame: &Frame<P>| {
            let extra = |piece: &Lazy<Piece, 1>| piece.get(0).map_or(0, |piece| piece.extra.bytes());
            frame.pieces.iter().map(|p| p.bytes() + extra(p)).sum::<usize>()
        };
        self.frames.bytes() + frames.map(pieces).sum::<usize>()
    }
}

/// Entries in one grant frame.
pub(crate) const fn entries_per_page(version: Version) -> u32 {
    match version {
        Version::V1 => V1_ENTRIES_PER_PAGE,
        Version::V2 => V2_ENTRIES_PER_PAGE,
    }
}

/// A table whose version cannot change while this is used. What it gives out lives no longer than it.
pub(crate) struct View<'a, P> {
    table: &'a Table<P>,
    version: Version,
    /// N(GT) when it was last looked at.
    entries: Cell<u32>,
    /// What was looked into last: the next entry is often there too.
    last: Cell<Option<Sight<'a>>>,
}

/// What a view knows of some neighbouring entries, as many as a piece has: it does not change while the version does
/// not. Any reference may be asked for: it is taken modulo the number of entries, also where the processor runs
/// ahead of the check.
#[derive(Clone, Copy)]
struct Sight<'a> {
    /// The first of the references.
    first: u32,
    piece: &'a Piece,
    page: &'a PageWords,
    /// In version 2, the status words of the page's entries.
    status: Option<&'a StatusRow>,
}

/// The shared half of a reference's entry in its page.
#[inline(always)]
fn shared_in<'a>(page: &'a PageWords, status: Option<&'a StatusRow>, gref: GrantRef) -> SharedEntry<'a> {
    let slot = gref.0 as usize;
    match status {
        None => SharedEntry::V1(SharedV1::new(page, slot)),
        Some(status) => SharedEntry::V2(SharedV2::new(page, slot, status)),
    }
}

impl<'a> Sight<'a> {
    #[inline(always)]
    fn shared(&self, gref: GrantRef) -> SharedEntry<'a> {
        shared_in(self.page, self.status, gref)
    }

    #[inline(always)]
    fn entry(&self, gref: GrantRef) -> Entry<'a> {
        let slot = gref.0 as usize;
        Entry {
            active: self.piece.active.get(slot),
            shared: self.shared(gref),
            extra: Some((&self.piece.extra, slot)),
        }
    }
}

/// A frame that a reference is in.
struct Place<'a> {
    pieces: &'a Pieces,
    page: &'a PageWords,
    status: Option<&'a StatusRow>,
}

impl<'a> Place<'a> {
    /// Where the state of a reference's entry is, or is to be.
    fn piece(&self, gref: GrantRef) -> &'a Lazy<Piece, 1> {
        &self.pieces[gref.0 as usize / PIECE % PIECES]
    }
}

impl<'a, P: AsRef<PageWords>> View<'a, P> {
    #[inline]
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// N(GT): references 0 to one less exist.
    pub(crate) fn entries(&self) -> u32 {
        self.entries.get()
    }

    /// What was looked into last, if the reference is there (ENG-1).
    #[inline(always)]
    fn sight(&self, gref: GrantRef) -> Option<Sight<'a>> {
        self.last
            .get()
            .filter(|last| is_within(gref.0, last.first, NEIGHBOURS))
    }

    /// The frame that a reference is in; `None` past the table (ENG-1). Perhaps one that there was not yet when
    /// the table was last looked at.
    fn place(&self, gref: GrantRef) -> Option<Place<'a>> {
        if gref.0 >= self.entries.get() {
            self.entries.set(self.table.entries(self.version));
        }
        let number = below(gref.0, self.entries.get())? / entries_per_page(self.version) as usize;
        let frames = &self.table.frames;
        let frame = frames.get(number)?;
        let status = match self.version {
            Version::V1 => None,
            Version::V2 => {
                let row = number % FRAMES_PER_STATUS as usize;
                let page = frames.get(number - row)?.status.get()?;
                Some(page.as_ref().status_row(row))
            }
        };
        Some(Place {
            pieces: &frame.pieces,
            page: frame.page.get()?.as_ref(),
            status,
        })
    }

    /// Looks into the piece that a reference's entry is in, which becomes the last.
    #[cold]
    #[inline(never)]
    fn look_into_piece_of(&self, gref: GrantRef) -> Option<()> {
        let place = self.place(gref)?;
        self.last.set(Some(Sight {
            first: gref.0 & !(NEIGHBOURS - 1),
            piece: place.piece(gref).get(0)?,
            page: place.page,
            status: place.status,
        }));
        Some(())
    }

    /// The shared half of a reference's entry; `None` past the table.
    #[inline(always)]
    pub(crate) fn shared(&self, gref: GrantRef) -> Option<SharedEntry<'_>> {
        match self.sight(gref) {
            Some(sight) => Some(sight.shared(gref)),
            None => self.shared_elsewhere(gref),
        }
    }

    #[cold]
    #[inline(never)]
    fn shared_elsewhere(&self, gref: GrantRef) -> Option<SharedEntry<'_>> {
        let place = self.place(gref)?;
        Some(shared_in(place.page, place.status, gref))
    }

    /// A look ahead: the frame that a reference is for `grantee`.
    #[inline(always)]
    pub(crate) fn peek_frame(&self, gref: GrantRef, grantee: DomId) -> Option<Gfn> {
        let of = |shared: SharedEntry<'_>| {
            let granted = shared.load_head().domid == grantee;
            granted.then(|| Gfn(shared.load_frame()))
        };
        match self.sight(gref) {
            Some(sight) => of(sight.shared(gref)),
            None => of(self.shared_elsewhere(gref)?),
        }
    }

    /// The entry of a reference that is in use, or was; `None` past the table, and for entries that
    /// nobody ever wanted to use.
    #[inline(always)]
    pub(crate) fn entry(&self, gref: GrantRef) -> Option<Entry<'_>> {
        loop {
            if let Some(sight) = self.sight(gref) {
                return Some(sight.entry(gref));
            }
            self.look_into_piece_of(gref)?;
        }
    }

    /// A hint: the entry of a reference will be used soon.
    #[inline(always)]
    pub(crate) fn expect(&self, gref: GrantRef) {
        if let Some(entry) = self.entry(gref) {
            entry.active.expect();
            entry.shared.expect();
        }
    }

    /// The state of a reference's entry: nobody's, if none was ever made.
    pub(crate) fn state(&self, gref: GrantRef) -> State {
        self.entry(gref)
            .map_or_else(State::default, |entry| entry.active.load())
    }

    /// The entry of a reference, for somebody who wants to use it.
    ///
    /// # Errors
    /// *bad_gntref* past the table; *general_error* if there is no memory for its state.
    #[inline(always)]
    pub(crate) fn entry_to_use(&self, gref: GrantRef) -> Result<Entry<'_>, GrantStatus> {
        loop {
            if let Some(entry) = self.entry(gref) {
                return Ok(entry);
            }
            self.make_entry(gref)?;
        }
    }

    #[cold]
    fn make_entry(&self, gref: GrantRef) -> Result<(), GrantStatus> {
        let place = self.place(gref).ok_or(GrantStatus::BAD_GNTREF)?;
        place
            .piece(gref)
            .get_or_make(0, Piece::new)
            .map(drop)
            .map_err(|OutOfMemory| GrantStatus::GENERAL_ERROR)
    }
}

/// One entry, private and shared half. Having one tells you: the reference was inside the table,
/// and the version is the one that `shared` says.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) active: Active<'a>,
    pub(crate) shared: SharedEntry<'a>,
    extra: Option<(&'a Lazy<AtomicU64, PIECE>, usize)>,
}

#[cfg(all(test, loom))]
impl<'a> Entry<'a> {
    /// An entry of no table, for the models.
    pub(crate) fn alone(active: Active<'a>, shared: SharedEntry<'a>) -> Entry<'a> {
        Entry {
            active,
            shared,
            extra: None,
        }
    }
}

impl Entry<'_> {
    /// See [`Extra`]. Stable while pinned.
    #[inline]
    pub(crate) fn extra(self) -> Extra {
        let word = self.extra.and_then(|(piece, slot)| piece.get(slot));
        Extra(word.map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    /// Makes room for an [`Extra`], which few entries need.
    #[cold]
    pub(crate) fn make_extra(self) -> Result<(), OutOfMemory> {
        let (piece, slot) = self.extra.ok_or(OutOfMemory)?;
        piece.get_or_make(slot, || AtomicU64::new(0)).map(drop)
    }

    /// Written while the entry is claimed, after [`Entry::make_extra`].
    pub(crate) fn set_extra(self, extra: Extra) {
        if let Some(word) = self.extra.and_then(|(piece, slot)| piece.get(slot)) {
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
    /// A hint: the entry will be marked soon.
    #[inline(always)]
    fn expect(&self) {
        match self {
            SharedEntry::V1(entry) => entry.expect(),
            SharedEntry::V2(entry) => entry.expect(),
        }
    }

    #[inline]
    pub(crate) fn load_head(&self) -> EntryHead {
        match self {
            SharedEntry::V1(entry) => entry.load_head(),
            SharedEntry::V2(entry) => entry.load_head(),
        }
    }

    /// Replaces the head if it still is `old`; otherwise what was found.
    #[inline]
    pub(crate) fn swap_head(&self, old: EntryHead, new: EntryHead) -> Result<(), EntryHead> {
        match self {
            SharedEntry::V1(entry) => entry.swap_head(old, new),
            SharedEntry::V2(entry) => entry.swap_head(old, new),
        }
    }

    /// The frame of an ordinary entry, in one load.
    #[inline]
    pub(crate) fn load_frame(&self) -> u64 {
        match self {
            SharedEntry::V1(entry) => u64::from(entry.load_frame()),
            SharedEntry::V2(entry) => entry.load_frame(),
        }
    }
}

const _: () = assert!(ENTRY_V1_SIZE == size_of::<u64>());
#[cfg(not(loom))]
const _: () = assert!(size_of::<Actives<PIECE>>() == 12 * PIECE);
const _: () = assert!(DomId::FIRST_RESERVED.0 <= 0x7FFF);
