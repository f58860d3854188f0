// A hypervisor just large enough to hold this crate to its word: it marks entries as the
// spec says (4.1, 4.3), pins them, and lets a test step in between.
//
// The documentation of the crate runs its session on it too (`include!`), hence no inner
// attributes here.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};

use gnttab_abi::{
    DomId, EntryFlags, EntryHead, EntryType, Errno, Gfn, GrantHandle, GrantRef, GrantStatus, MapFlags,
    MapGrantRef, UnmapGrantRef,
};
use gnttab_guest::{Call, FrameKind, Grantee, Granter, Hypercall, Page, ReachError, TableFrame, reach};

/// What a page holds that was never zeroed.
pub(crate) const OLD_CONTENT: u64 = 0x0bad_0bad_0bad_0bad;

/// The machine: every domain's table.
#[derive(Default)]
pub(crate) struct Machine {
    tables: Mutex<BTreeMap<DomId, Arc<Table>>>,
}

impl Machine {
    pub(crate) fn new() -> Arc<Machine> {
        Arc::default()
    }

    /// A new domain with a table of at most 4 frames.
    pub(crate) fn domain(self: &Arc<Self>, id: DomId) -> Arc<Domain> {
        self.domain_with(id, 4)
    }

    pub(crate) fn domain_with(self: &Arc<Self>, id: DomId, max_frames: u32) -> Arc<Domain> {
        let table = Arc::new(Table::new(max_frames));
        self.tables.lock().unwrap().insert(id, Arc::clone(&table));
        Arc::new(Domain {
            id,
            machine: Arc::clone(self),
            table,
            knobs: Knobs::default(),
            mappings: Mutex::default(),
            next_handle: AtomicU32::new(0),
            places: Mutex::default(),
            slept: Mutex::default(),
        })
    }
}

type Between = Box<dyn FnOnce() + Send>;

/// One domain's table as the hypervisor has it, and the domain's memory.
pub(crate) struct Table {
    shared: Vec<Box<Frame>>,
    status: Vec<Box<Frame>>,
    pub(crate) version: AtomicU32,
    pub(crate) frames: AtomicU32,
    pub(crate) max_frames: AtomicU32,
    /// Readers and writers of every entry in use.
    pins: Mutex<BTreeMap<u32, (u32, u32)>>,
    /// Runs once in the middle of the next claim of a version 2 entry: after the mark, before
    /// the second look.
    pub(crate) between: Mutex<Option<Between>>,
    pub(crate) ram: Arc<Ram>,
}

#[repr(C, align(4096))]
struct Frame(std::cell::UnsafeCell<[u8; 4096]>);

// SAFETY: the bytes are reached through atomics only, here and in the crate under test.
unsafe impl Sync for Frame {}
// SAFETY: plain memory.
unsafe impl Send for Frame {}

impl Frame {
    fn zeroed() -> Box<Frame> {
        Box::new(Frame([0; 4096].into()))
    }

    fn at<T>(&self, byte: usize) -> *mut T {
        assert!(byte + size_of::<T>() <= 4096 && byte.is_multiple_of(size_of::<T>()));
        self.0.get().cast::<u8>().wrapping_add(byte).cast()
    }

    fn u16(&self, byte: usize) -> &AtomicU16 {
        // SAFETY: inside the frame, aligned, and only ever an atomic.
        unsafe { AtomicU16::from_ptr(self.at(byte)) }
    }

    fn u32(&self, byte: usize) -> &AtomicU32 {
        // SAFETY: inside the frame, aligned, and only ever an atomic.
        unsafe { AtomicU32::from_ptr(self.at(byte)) }
    }

    fn u64(&self, byte: usize) -> &AtomicU64 {
        // SAFETY: inside the frame, aligned, and only ever an atomic.
        unsafe { AtomicU64::from_ptr(self.at(byte)) }
    }

    fn clear(&self) {
        (0..1024).for_each(|word| self.u32(word * 4).store(0, Ordering::Relaxed));
    }
}

/// The words of an entry, as the hypervisor sees them.
pub(crate) struct Words<'a> {
    pub(crate) head: &'a AtomicU32,
    pub(crate) frame: u64,
    pub(crate) halves: (u16, u16),
    pub(crate) status: &'a AtomicU16,
}

impl Words<'_> {
    pub(crate) fn load(&self) -> EntryHead {
        EntryHead::from_word(self.head.load(Ordering::Acquire))
    }

    pub(crate) fn flags(&self) -> EntryFlags {
        self.load().flags
    }
}

impl Table {
    fn new(max_frames: u32) -> Table {
        Table {
            shared: (0..max_frames).map(|_| Frame::zeroed()).collect(),
            status: (0..max_frames.div_ceil(8)).map(|_| Frame::zeroed()).collect(),
            version: AtomicU32::new(1),
            frames: AtomicU32::new(1),
            max_frames: AtomicU32::new(max_frames),
            pins: Mutex::default(),
            between: Mutex::default(),
            ram: Arc::default(),
        }
    }

    pub(crate) fn words(&self, gref: GrantRef) -> Words<'_> {
        let index = gref.0 as usize;
        let status = |index: usize| self.status[index / 2048].u16(index % 2048 * 2);
        match self.version.load(Ordering::Relaxed) {
            1 => {
                let (frame, byte) = (&self.shared[index / 512], index % 512 * 8);
                Words {
                    head: frame.u32(byte),
                    frame: frame.u32(byte + 4).load(Ordering::Relaxed).into(),
                    halves: (0, 0),
                    status: status(0),
                }
            }
            _ => {
                let (frame, byte) = (&self.shared[index / 256], index % 256 * 16);
                let [a, b, c, d] = frame.u32(byte + 4).load(Ordering::Relaxed).to_le_bytes();
                Words {
                    head: frame.u32(byte),
                    frame: frame.u64(byte + 8).load(Ordering::Relaxed),
                    halves: (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
                    status: status(index),
                }
            }
        }
    }

    /// Begins a use and says the frame (spec 4.1).
    pub(crate) fn begin(
        &self,
        user: DomId,
        gref: GrantRef,
        write: bool,
        copy: bool,
    ) -> Result<u64, GrantStatus> {
        let mut pins = self.pins.lock().unwrap();
        let per_frame = if self.version.load(Ordering::Relaxed) == 1 {
            512
        } else {
            256
        };
        if gref.0 / per_frame >= self.frames.load(Ordering::Relaxed) {
            return Err(GrantStatus::BAD_GNTREF);
        }
        let (readers, writers) = pins.get(&gref.0).copied().unwrap_or((0, 0));
        let pinned = readers + writers > 0;
        if !pinned || (write && writers == 0) {
            self.claim(user, gref, write, copy, pinned)
                .ok_or(GrantStatus::GENERAL_ERROR)?;
        }
        let pin = pins.entry(gref.0).or_default();
        if write {
            pin.1 += 1
        } else {
            pin.0 += 1
        }
        Ok(self.words(gref).frame)
    }

    fn claim(&self, user: DomId, gref: GrantRef, write: bool, copy: bool, pinned: bool) -> Option<()> {
        let words = self.words(gref);
        let mask = if copy { 0x003 } else { 0x103 };
        let v1 = self.version.load(Ordering::Relaxed) == 1;
        let fits = |head: EntryHead| {
            let kind = head.flags.bits() & mask;
            let accepted = kind == 1 || (!v1 && copy && kind == 3);
            (pinned || (accepted && head.domid == user))
                && !(write && head.flags.contains(EntryFlags::READONLY))
        };
        let mark = if write {
            EntryFlags::IN_USE
        } else {
            EntryFlags::READING
        };
        let mut head = words.load();
        if !fits(head) {
            return None;
        }
        if v1 {
            for _ in 0..5 {
                let marked = EntryHead {
                    flags: head.flags | mark,
                    ..head
                };
                match words.head.compare_exchange(
                    head.word(),
                    marked.word(),
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => return Some(()),
                    Err(found) => head = EntryHead::from_word(found),
                }
                if !fits(head) {
                    return None;
                }
            }
            return None;
        }
        words.status.fetch_or(mark.bits(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(step) = self.between.lock().unwrap().take() {
            step();
        }
        if !fits(words.load()) {
            let undo = if pinned {
                EntryFlags::WRITING
            } else {
                EntryFlags::IN_USE
            };
            words.status.fetch_and(!undo.bits(), Ordering::Release);
            return None;
        }
        Some(())
    }

    /// Ends a use (spec 4.3).
    pub(crate) fn end(&self, gref: GrantRef, write: bool) {
        let mut pins = self.pins.lock().unwrap();
        let pin = pins.get_mut(&gref.0).expect("in use");
        if write {
            pin.1 -= 1
        } else {
            pin.0 -= 1
        }
        let mut mask = EntryFlags::empty();
        if *pin == (0, 0) {
            mask |= EntryFlags::READING;
        }
        if write && pin.1 == 0 {
            mask |= EntryFlags::WRITING;
        }
        if *pin == (0, 0) {
            pins.remove(&gref.0);
        }
        let words = self.words(gref);
        if self.version.load(Ordering::Relaxed) == 1 {
            words.head.fetch_and(!u32::from(mask.bits()), Ordering::Release);
        } else {
            words.status.fetch_and(!mask.bits(), Ordering::Release);
        }
    }

    /// First half of a transfer into an entry (spec 3.7 step 10).
    pub(crate) fn commit(&self, giver: DomId, gref: GrantRef) -> bool {
        let words = self.words(gref);
        let offered = EntryHead {
            flags: EntryFlags::ACCEPT_TRANSFER,
            domid: giver,
        };
        let committed = EntryHead {
            flags: offered.flags | EntryFlags::TRANSFER_COMMITTED,
            ..offered
        };
        words
            .head
            .compare_exchange(
                offered.word(),
                committed.word(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok()
    }

    /// Second half (steps 14 and 15).
    pub(crate) fn complete(&self, gref: GrantRef, frame: u64) {
        let index = gref.0 as usize;
        match self.version.load(Ordering::Relaxed) {
            1 => {
                let frame = u32::try_from(frame).unwrap();
                self.shared[index / 512]
                    .u32(index % 512 * 8 + 4)
                    .store(frame, Ordering::Relaxed);
            }
            _ => self.shared[index / 256]
                .u64(index % 256 * 16 + 8)
                .store(frame, Ordering::Relaxed),
        }
        let completed = u32::from(EntryFlags::TRANSFER_COMPLETED.bits());
        self.words(gref).head.fetch_or(completed, Ordering::Release);
    }

    /// As after a migration: a table that knows nothing.
    pub(crate) fn forget(&self) {
        self.pins.lock().unwrap().clear();
        self.shared
            .iter()
            .chain(&self.status)
            .for_each(|frame| frame.clear());
        self.frames.store(1, Ordering::Relaxed);
        self.version.store(1, Ordering::Relaxed);
    }
}

/// A domain's memory: one word stands for a page's content.
#[derive(Default)]
pub(crate) struct Ram {
    /// By frame: in use or free, and the content.
    pages: Mutex<BTreeMap<u64, (bool, u64)>>,
}

impl Ram {
    pub(crate) fn content(&self, frame: u64) -> u64 {
        self.pages.lock().unwrap()[&frame].1
    }

    pub(crate) fn write(&self, frame: u64, content: u64) {
        self.pages.lock().unwrap().get_mut(&frame).unwrap().1 = content;
    }

    pub(crate) fn is_free(&self, frame: u64) -> bool {
        !self.pages.lock().unwrap()[&frame].0
    }
}

/// A page of a domain's memory. Dropping it frees it.
pub(crate) struct OwnPage {
    pub(crate) frame: u64,
    ram: Arc<Ram>,
}

impl std::fmt::Debug for OwnPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OwnPage({:#x})", self.frame)
    }
}

impl Page for OwnPage {
    fn gfn(&self) -> Gfn {
        Gfn(self.frame)
    }
    fn zero(&mut self) {
        self.ram.write(self.frame, 0);
    }
}

impl Drop for OwnPage {
    fn drop(&mut self) {
        let mut pages = self.ram.pages.lock().unwrap();
        let page = pages.get_mut(&self.frame).unwrap();
        assert!(page.0, "frame {:#x} freed twice", self.frame);
        page.0 = false;
    }
}

/// What a test turns to make things fail.
#[derive(Default)]
pub(crate) struct Knobs {
    /// Highest version that the hypervisor admits; 0 for no `set_version` at all.
    pub(crate) no_v2: AtomicBool,
    pub(crate) no_versions: AtomicBool,
    pub(crate) stuck_at_v2: AtomicBool,
    pub(crate) no_query: AtomicBool,
    pub(crate) no_reach: AtomicBool,
    pub(crate) not_admitted: AtomicBool,
    /// Pages come back only when this is off.
    pub(crate) page_back_busy: AtomicBool,
    pub(crate) pages_back: AtomicUsize,
    /// Statuses that map and copy give for a reference before they give their own.
    pub(crate) script: Mutex<BTreeMap<GrantRef, VecDeque<GrantStatus>>>,
    /// References that `after_map` refuses.
    pub(crate) not_entered: Mutex<Vec<GrantRef>>,
    pub(crate) before_unmap_fails: AtomicBool,
    pub(crate) unmap_fails: AtomicBool,
    /// The hypercall ends with this after so many items of a map.
    pub(crate) map_ends: Mutex<Option<(usize, Errno)>>,
}

pub(crate) fn on(knob: &AtomicBool) {
    knob.store(true, Ordering::SeqCst);
}

pub(crate) fn off(knob: &AtomicBool) {
    knob.store(false, Ordering::SeqCst);
}

fn is_on(knob: &AtomicBool) -> bool {
    knob.load(Ordering::SeqCst)
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    dom: DomId,
    gref: GrantRef,
    write: bool,
    host_addr: u64,
}

/// A domain: the platform that the crate under test runs on.
pub(crate) struct Domain {
    id: DomId,
    machine: Arc<Machine>,
    pub(crate) table: Arc<Table>,
    pub(crate) knobs: Knobs,
    mappings: Mutex<BTreeMap<GrantHandle, Mapped>>,
    next_handle: AtomicU32,
    /// Frames in the order in which they were placed.
    pub(crate) places: Mutex<Vec<(FrameKind, u32)>>,
    pub(crate) slept: Mutex<Vec<u32>>,
}

impl Domain {
    /// A page of this domain's memory, with old content in it.
    pub(crate) fn page(&self) -> OwnPage {
        let mut pages = self.table.ram.pages.lock().unwrap();
        let free = pages.iter().find(|(_, page)| !page.0).map(|(frame, _)| *frame);
        let frame = free.unwrap_or(0x100 + pages.len() as u64);
        pages.insert(frame, (true, OLD_CONTENT));
        OwnPage {
            frame,
            ram: Arc::clone(&self.table.ram),
        }
    }

    /// A page whose frame number is chosen.
    pub(crate) fn page_at(&self, frame: u64) -> OwnPage {
        self.table
            .ram
            .pages
            .lock()
            .unwrap()
            .insert(frame, (true, OLD_CONTENT));
        OwnPage {
            frame,
            ram: Arc::clone(&self.table.ram),
        }
    }

    /// How many mappings the hypervisor has for this domain.
    pub(crate) fn live(&self) -> usize {
        self.mappings.lock().unwrap().len()
    }

    pub(crate) fn live_refs(&self) -> Vec<GrantRef> {
        let mut refs: Vec<_> = self
            .mappings
            .lock()
            .unwrap()
            .values()
            .map(|mapped| mapped.gref)
            .collect();
        refs.sort();
        refs
    }

    fn scripted(&self, gref: GrantRef) -> Option<GrantStatus> {
        self.knobs.script.lock().unwrap().get_mut(&gref)?.pop_front()
    }

    fn of(&self, dom: DomId) -> Result<Arc<Table>, GrantStatus> {
        self.machine
            .tables
            .lock()
            .unwrap()
            .get(&dom)
            .cloned()
            .ok_or(GrantStatus::BAD_DOMAIN)
    }

    fn map(&self, item: &mut MapGrantRef) -> Result<(), GrantStatus> {
        if let Some(status) = self.scripted(item.gref) {
            return status.result();
        }
        let write = !item.flags.contains(MapFlags::READONLY);
        let taken = self
            .mappings
            .lock()
            .unwrap()
            .values()
            .any(|mapped| mapped.host_addr == item.host_addr);
        assert!(!taken, "{:#x} is mapped already", item.host_addr);
        item.dev_bus_addr = self.of(item.dom)?.begin(self.id, item.gref, write, false)? << 12;
        item.handle = GrantHandle(self.next_handle.fetch_add(1, Ordering::Relaxed));
        let mapped = Mapped {
            dom: item.dom,
            gref: item.gref,
            write,
            host_addr: item.host_addr,
        };
        self.mappings.lock().unwrap().insert(item.handle, mapped);
        Ok(())
    }

    fn unmap(&self, item: &UnmapGrantRef) -> Result<(), GrantStatus> {
        if is_on(&self.knobs.unmap_fails) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let mut mappings = self.mappings.lock().unwrap();
        let mapped = *mappings.get(&item.handle).ok_or(GrantStatus::BAD_HANDLE)?;
        if mapped.host_addr != item.host_addr {
            return Err(GrantStatus::BAD_VIRT_ADDR);
        }
        mappings.remove(&item.handle);
        drop(mappings);
        self.of(mapped.dom)?.end(mapped.gref, mapped.write);
        Ok(())
    }

    fn grow(&self, frames: u32) -> Result<(), GrantStatus> {
        if frames > self.table.max_frames.load(Ordering::SeqCst) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        self.table.frames.fetch_max(frames, Ordering::SeqCst);
        Ok(())
    }
}

fn status_of(result: Result<(), GrantStatus>) -> GrantStatus {
    result.err().unwrap_or(GrantStatus::OKAY)
}

impl Hypercall for Domain {
    fn grant_table_op(&self, call: Call<'_>) -> Result<(), Errno> {
        let knobs = &self.knobs;
        match call {
            Call::Map(items) => {
                let ends = *knobs.map_ends.lock().unwrap();
                for (index, item) in items.iter_mut().enumerate() {
                    if let Some((at, errno)) = ends
                        && at == index
                    {
                        return Err(errno);
                    }
                    item.status = status_of(self.map(item));
                }
            }
            Call::Unmap(items) => {
                for item in items {
                    item.status = status_of(self.unmap(item));
                }
            }
            Call::Copy(items) => {
                for item in items {
                    let gref = item.source.gref();
                    item.status = self.scripted(gref).unwrap_or_else(|| {
                        status_of(self.of(item.source.domid).and_then(|table| {
                            table.begin(self.id, gref, false, true)?;
                            table.end(gref, false);
                            Ok(())
                        }))
                    });
                }
            }
            Call::SetupTable { arg, .. } => arg.status = status_of(self.grow(arg.nr_frames)),
            Call::QuerySize(arg) => {
                if is_on(&knobs.no_query) {
                    return Err(Errno::NoSys);
                }
                arg.nr_frames = self.table.frames.load(Ordering::SeqCst);
                arg.max_nr_frames = self.table.max_frames.load(Ordering::SeqCst);
                arg.status = GrantStatus::OKAY;
            }
            Call::SetVersion(arg) => {
                if is_on(&knobs.no_versions) {
                    return Err(Errno::NoSys);
                }
                if is_on(&knobs.stuck_at_v2) {
                    arg.version = 2;
                    return Err(Errno::Busy);
                }
                if arg.version == 2 && is_on(&knobs.no_v2) {
                    arg.version = 1;
                    return Err(Errno::NoSys);
                }
                self.table.version.store(arg.version, Ordering::SeqCst);
            }
            _ => return Err(Errno::NoSys),
        }
        Ok(())
    }

    fn sleep_ms(&self, ms: u32) {
        self.slept.lock().unwrap().push(ms);
    }

    fn relax(&self) {
        std::thread::yield_now();
    }
}

impl Granter for Domain {
    type Page = OwnPage;

    fn reach(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), ReachError> {
        if is_on(&self.knobs.no_reach) {
            return Err(Errno::Inval.into());
        }
        for place in reach::physmap(kind, frames, |index| Gfn(index.into())) {
            let index = u32::try_from(place.gpfn).unwrap();
            match kind {
                FrameKind::Shared => self.grow(index + 1).map_err(|_| Errno::Inval)?,
                FrameKind::Status => {
                    let there = self.table.frames.load(Ordering::SeqCst).div_ceil(8);
                    assert!(index < there, "status frame {index} of {there}");
                }
            }
            self.places.lock().unwrap().push((kind, index));
        }
        Ok(())
    }

    fn frame(&self, kind: FrameKind, index: u32) -> Option<TableFrame> {
        let frames = match kind {
            FrameKind::Shared => &self.table.shared,
            FrameKind::Status => &self.table.status,
        };
        let address = NonNull::new(frames.get(index as usize)?.at(0))?;
        // SAFETY: 4096 aligned bytes of a box that lives as long as this domain, whose table never
        // drops a frame; everybody uses atomics of the widths that the interface has.
        Some(unsafe { TableFrame::new(address) })
    }

    fn page_back(&self, _page: &mut OwnPage) -> Result<(), Errno> {
        if is_on(&self.knobs.page_back_busy) {
            return Err(Errno::Busy);
        }
        self.knobs.pages_back.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Grantee for Domain {
    fn admits(&self, _addresses: Range<u64>) -> bool {
        !is_on(&self.knobs.not_admitted)
    }

    fn after_map(&self, map: &MapGrantRef) -> Result<(), Errno> {
        assert_eq!(map.status, GrantStatus::OKAY);
        if self.knobs.not_entered.lock().unwrap().contains(&map.gref) {
            return Err(Errno::NoMem);
        }
        Ok(())
    }

    fn before_unmap(&self, _host_addr: u64) -> Result<(), Errno> {
        if is_on(&self.knobs.before_unmap_fails) {
            return Err(Errno::Fault);
        }
        Ok(())
    }
}

/// The type in an entry.
pub(crate) fn kind(table: &Table, gref: GrantRef) -> EntryType {
    table.words(gref).flags().kind()
}
