//! The hypervisor that embeds the engine: frames are pages of memfds, mappings are descriptors sent.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use gnttab_abi::{DomId, Errno, Gfn, GrantRef, MapFlags, Mfn, PAGE_SIZE};
use gnttab_engine::{
    Access as Wanted, Answered, FrameOwner, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError,
    Resolved,
};

use super::memory::{Handout, Memory, NotMappable, mfn, parts};
use super::news::News;
use super::ports::Ports;
use super::tables::{TablePage, Tables};
use crate::protocol::{Consumer, Notice, NoticeKind, PendingEnd, Report};
use crate::sys::{Access, Channel, ChannelError, EventPort, MAX_DESCRIPTORS};

/// The memory number that stands for table pages in a machine frame number: above all others, and with
/// [`MOST_RAM_PAGES`](super::memory::MOST_RAM_PAGES) within what the engine keeps of a frame's number.
const TABLES: u64 = 1 << 21;
const _: () = assert!((TABLES + 1) * super::memory::MOST_RAM_PAGES as u64 <= 1 << 46);

/// What the monitor keeps for a domain, as far as hypercalls need it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) id: DomId,
    pub(crate) memory: Arc<Memory>,
    pub(crate) tables: Arc<Tables>,
    pub(crate) channel: Channel,
    pub(crate) ports: Ports,
    foreign: Foreign,
    /// Pages that a call has mapped and that were not sent yet.
    outbox: Mutex<Vec<(Notice, Handout)>>,
    /// What it says of its own grant table.
    said: Mutex<Option<Said>>,
    /// Why it must not run on, once it must not.
    crashed: OnceLock<&'static str>,
    /// Rung when it is to be ended.
    doorbell: Arc<EventPort>,
}

impl Guest {
    pub(crate) fn new(
        id: DomId,
        memory: Arc<Memory>,
        tables: Arc<Tables>,
        channel: Channel,
        foreign: (u32, u32),
        doorbell: Arc<EventPort>,
    ) -> Guest {
        Guest {
            id,
            memory,
            tables,
            channel,
            ports: Ports::default(),
            foreign: Foreign::new(foreign.0, foreign.1),
            outbox: Mutex::default(),
            said: Mutex::default(),
            crashed: OnceLock::new(),
            doorbell,
        }
    }

    /// Sends descriptors. A domain that does not take what is sent to it gets nothing more.
    pub(crate) fn send(&self, notice: Notice, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.channel.send(&notice.encode(), descriptors)
    }

    /// It must not run on without what could not be sent to it: it is crashed.
    ///
    /// One whose end of the channel is closed is most likely dead already. The undertaker sees to it
    /// in either case, and its end is to be told as its own, not as a fault of it.
    pub(crate) fn refused(&self, error: ChannelError, why: &'static str) {
        if error != ChannelError::Closed {
            self.crash(why);
        }
    }

    /// Lays a page out to be sent with others of the same call.
    fn post(&self, notice: Notice, handout: Handout) {
        self.outbox().push((notice, handout));
    }

    /// Sends what was laid out; to be called before the call that it belongs to is answered.
    ///
    /// The mappings exist by now. A domain that does not take them is no use, and must not run on.
    pub(crate) fn send_posted(&self) {
        // The lock is held while sending: another vCPU's call must not be answered before.
        let mut outbox = self.outbox();
        for parcels in outbox.chunks(MAX_DESCRIPTORS) {
            let notices: Vec<u8> = parcels.iter().flat_map(|(notice, _)| notice.encode()).collect();
            let pages: Vec<_> = parcels.iter().map(|(_, page)| page.as_fd()).collect();
            if let Err(error) = self.channel.send(&notices, &pages) {
                self.refused(error, "did not take the pages that it had mapped");
                break;
            }
        }
        outbox.clear();
    }

    fn outbox(&self) -> MutexGuard<'_, Vec<(Notice, Handout)>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what it says of its own grant table, and tells of the ends of access that it waits for newly.
    /// `most` is how many references the table can have.
    pub(crate) fn hear(&self, report: Report, most: u64, news: &News) {
        let now = Instant::now();
        let mut said = self.said();
        let (before, lacked) = match said.take() {
            Some(said) => (said.pending_since, said.lacks),
            None => (BTreeMap::new(), Vec::new()),
        };
        let since = |end: &PendingEnd| {
            let key = (end.gref, end.peer);
            let known = before.get(&key).copied();
            if known.is_none() {
                news.pending(self.id, end.peer, end.gref);
            }
            (key, known.unwrap_or(now))
        };
        let lacks = lacks(&report, most);
        for lack in lacks.iter().filter(|lack| !lacked.contains(lack)) {
            news.lacking(self.id, lack);
        }
        *said = Some(Said {
            at: now,
            lacks,
            pending_since: report.pending.iter().map(since).collect(),
            report,
        });
    }

    pub(crate) fn said(&self) -> MutexGuard<'_, Option<Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that it must not run on, and has that seen to.
    pub(crate) fn crash(&self, why: &'static str) {
        let _ = self.crashed.set(why);
        // The other end is the monitor's own; it is gone only when everything ends.
        let _ = self.doorbell.send();
    }

    /// Why it must not run on.
    pub(crate) fn crashed(&self) -> Option<&'static str> {
        self.crashed.get().copied()
    }

    /// The process is dead, and its mappings with it: they count no more.
    pub(crate) fn forget_mappings(&self, machine: &Machine) {
        for mapped in self.foreign.take_all() {
            machine.count_unmapped(mapped);
        }
    }
}

/// What a domain says of its own grant table. Nothing is decided by it.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) at: Instant,
    pub(crate) report: Report,
    /// Since when it says so of each end of access.
    pub(crate) pending_since: BTreeMap<(GrantRef, DomId), Instant>,
    /// What it has run out of, in words.
    pub(crate) lacks: Vec<String>,
}

/// What a domain has run out of. A consumer is said to lack references when it was refused some, each time anew.
fn lacks(report: &Report, most: u64) -> Vec<String> {
    let full = report.free == 0 && u64::from(report.refs) >= most;
    let table = full.then(|| {
        format!(
            "its grant table is full: all {} references are taken",
            report.refs
        )
    });
    let refused = report.consumers.iter().filter(|consumer| consumer.refused > 0);
    let consumers = refused.map(|consumer| {
        let Consumer {
            name, quota, refused, ..
        } = consumer;
        let times = if *refused == 1 {
            "once".to_owned()
        } else {
            format!("{refused} times")
        };
        format!("its consumer {name} may have {quota} references, and was refused {times}")
    });
    table.into_iter().chain(consumers).collect()
}

/// The window of gfns where a domain maps others' pages: what lies where.
#[derive(Debug)]
struct Foreign {
    first: u64,
    /// The frame of each page plus one; 0: nothing is there.
    slots: Box<[AtomicU64]>,
}

impl Foreign {
    fn new(first: u32, pages: u32) -> Foreign {
        let slots = (0..pages).map(|_| AtomicU64::new(0)).collect();
        Foreign {
            first: first.into(),
            slots,
        }
    }

    /// The slot at a guest address, if it is one.
    fn slot(&self, addr: u64) -> Option<&AtomicU64> {
        let page = PAGE_SIZE as u64;
        if !addr.is_multiple_of(page) {
            return None;
        }
        self.slots
            .get(usize::try_from((addr / page).checked_sub(self.first)?).ok()?)
    }

    /// Puts a frame into an empty slot.
    fn put(&self, addr: u64, mfn: Mfn) -> bool {
        self.slot(addr).is_some_and(|slot| {
            slot.compare_exchange(0, mfn.0 + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// Takes this frame out of its slot.
    fn take(&self, addr: u64, mfn: Mfn) -> bool {
        self.slot(addr).is_some_and(|slot| {
            slot.compare_exchange(mfn.0 + 1, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    fn take_all(&self) -> impl Iterator<Item = Mfn> + '_ {
        let taken = self.slots.iter().map(|slot| slot.swap(0, Ordering::AcqRel));
        taken.filter_map(|value| value.checked_sub(1).map(Mfn))
    }
}

/// The hypervisor: every domain's memory, by number.
#[derive(Debug)]
pub(crate) struct Machine {
    memories: RwLock<HashMap<u64, Arc<Memory>>>,
    next_memory: AtomicU64,
    started: Instant,
    /// What domains had printed, newest last.
    console: Mutex<String>,
    /// What happens, for those who watch.
    pub(super) news: News,
}

/// Bytes of console text that are kept.
const CONSOLE_SIZE: usize = 64 * 1024;

impl Machine {
    pub(crate) fn new() -> Machine {
        Machine {
            memories: RwLock::new(HashMap::new()),
            next_memory: AtomicU64::new(1),
            started: Instant::now(),
            console: Mutex::new(String::new()),
            news: News::new(),
        }
    }

    /// A number for a new memory. One is used again only after all others, and when nothing refers to what
    /// had it.
    pub(crate) fn memory_number(&self) -> u64 {
        loop {
            let number = self.next_memory.fetch_add(1, Ordering::Relaxed) % TABLES;
            if number != 0 && self.memory(number).is_none() {
                return number;
            }
        }
    }

    pub(crate) fn add_memory(&self, memory: &Arc<Memory>) {
        let mut memories = self.memories.write().unwrap_or_else(PoisonError::into_inner);
        memories.insert(memory.number(), Arc::clone(memory));
    }

    /// A dead domain's memory: it goes now, or with the last reference.
    pub(crate) fn retire_memory(&self, memory: &Memory) {
        if memory.retire() {
            self.remove_memory(memory.number());
        }
    }

    fn remove_memory(&self, number: u64) {
        let removed = self
            .memories
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&number);
        // Outside the lock: this unmaps and closes.
        drop(removed);
    }

    /// Every memory that exists.
    pub(crate) fn memories(&self) -> Vec<Arc<Memory>> {
        self.memories
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    fn memory(&self, number: u64) -> Option<Arc<Memory>> {
        self.memories
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&number)
            .cloned()
    }

    fn count_unmapped(&self, mfn: Mfn) {
        let (number, gfn) = parts(mfn);
        if let Some(memory) = self.memory(number) {
            memory.unmap(gfn);
        }
    }

    /// Keeps text that a domain had printed.
    pub(crate) fn print(&self, text: &str) {
        let mut console = self.console();
        console.push_str(text);
        let excess = console.len().saturating_sub(CONSOLE_SIZE);
        if excess > 0 {
            let at = (excess..console.len()).find(|at| console.is_char_boundary(*at));
            console.drain(..at.unwrap_or(0));
        }
    }

    pub(crate) fn console(&self) -> MutexGuard<'_, String> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hypervisor for Machine {
    type Domain = Guest;
    type TablePage = TablePage;

    fn resolve(&self, domain: &Guest, gfn: Gfn, _: Wanted) -> Result<Resolved, ResolveError> {
        let mfn = domain.memory.mfn(gfn).ok_or(ResolveError::BadPage)?;
        if !domain.memory.take_reference() {
            return Err(ResolveError::BadPage);
        }
        Ok(Resolved {
            mfn,
            owner: FrameOwner::Domain(domain.id),
        })
    }

    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        let memory = self.memory(parts(mfn).0)?;
        memory
            .take_reference()
            .then(|| FrameOwner::Domain(memory.owner()))
    }

    fn put_frame(&self, mfn: Mfn) {
        let (number, _) = parts(mfn);
        let last = self.memory(number).is_some_and(|memory| memory.drop_reference());
        if last {
            self.remove_memory(number);
        }
    }

    /// A page is a page: nothing else that a frame could be in use as.
    fn get_writable(&self, _: Mfn) -> bool {
        true
    }

    fn put_writable(&self, _: Mfn) {}

    fn copy(&self, source: (Mfn, u16), dest: (Mfn, u16), len: u16) {
        let ((from_memory, from), (to_memory, to)) = (parts(source.0), parts(dest.0));
        if let (Some(from_memory), Some(to_memory)) = (self.memory(from_memory), self.memory(to_memory)) {
            from_memory.copy_to((from, source.1), &to_memory, (to, dest.1), len);
        }
    }

    fn map_host(&self, grantee: &Guest, mapping: &HostMapping) -> Result<(), HostError> {
        let (number, gfn) = parts(mapping.mfn);
        let memory = self.memory(number).ok_or(HostError)?;
        if !grantee.foreign.put(mapping.addr, mapping.mfn) {
            return Err(HostError);
        }
        let (access, kind) = if mapping.flags.contains(MapFlags::READONLY) {
            (Access::Read, NoticeKind::ForeignRead)
        } else {
            (Access::Write, NoticeKind::ForeignWrite)
        };
        match memory.map(gfn, access) {
            Ok(handout) => {
                let key = mapping.addr;
                grantee.post(Notice { kind, key }, handout);
                Ok(())
            }
            Err(NotMappable) => {
                grantee.foreign.take(mapping.addr, mapping.mfn);
                Err(HostError)
            }
        }
    }

    fn unmap_host(&self, grantee: &Guest, unmapping: &HostUnmapping) -> Result<(), HostError> {
        // As for every auto-translated guest, nothing can take a mapping's place.
        if unmapping.new_addr != 0 || !grantee.foreign.take(unmapping.addr, unmapping.mfn) {
            return Err(HostError);
        }
        self.count_unmapped(unmapping.mfn);
        Ok(())
    }

    /// The monitor cannot flush another process's translations; renewal stands in for it.
    fn flush(&self, _: &Guest) {}

    fn crash(&self, domain: &Guest, why: &'static str) {
        domain.crash(why);
    }

    fn alloc_table_page(&self, domain: &Guest) -> Option<TablePage> {
        domain.tables.alloc()
    }

    fn table_page_mfn(&self, page: &TablePage) -> Mfn {
        mfn(TABLES, page.number() as u64)
    }

    fn table_page_gfn(&self, domain: &Guest, page: &TablePage) -> Gfn {
        domain.tables.gfn(page).unwrap_or(Gfn::INVALID)
    }

    fn place_table_page(&self, domain: &Guest, page: &TablePage, gfn: Gfn) -> Result<(), Errno> {
        domain.tables.place(page, Some(gfn));
        Ok(())
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    #[inline]
    fn answered(&self, answered: &Answered) {
        self.news.answered(answered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_pages_lie_in_their_window_and_nowhere_else() {
        let foreign = Foreign::new(16, 2);
        let page = PAGE_SIZE as u64;
        for addr in [0, 15 * page, 18 * page, 16 * page + 1, u64::MAX, u64::MAX - 4095] {
            assert!(!foreign.put(addr, Mfn(5)), "{addr:#x}");
        }
        assert!(foreign.put(17 * page, Mfn(0)));
        assert!(!foreign.put(17 * page, Mfn(1)), "one page in one place");
        assert!(!foreign.take(17 * page, Mfn(1)), "only what is there is taken");
        assert!(foreign.put(16 * page, Mfn(7)));
        assert_eq!(foreign.take_all().collect::<Vec<_>>(), [Mfn(7), Mfn(0)]);
        assert_eq!(foreign.take_all().count(), 0);
    }

    /// Rule 4 of a hypervisor, however many domains there have been: a frame's number fits 46 bits, and two
    /// memories that exist differ in theirs.
    #[test]
    fn memory_numbers_come_round_and_pass_over_those_in_use() {
        let machine = Machine::new();
        let memory = |number| Arc::new(Memory::new(number, DomId(1), 1, 1).unwrap());
        let (first, second) = (machine.memory_number(), machine.memory_number());
        machine.add_memory(&memory(second));
        machine.next_memory.store(TABLES - 1, Ordering::Relaxed);
        let last = machine.memory_number();
        assert_eq!((first, second, last), (1, 2, TABLES - 1));
        assert_eq!(
            mfn(last, u64::from(super::super::memory::MOST_RAM_PAGES) - 1).0 >> 46,
            0
        );
        assert_eq!(machine.memory_number(), first, "0 is nobody's");
        assert_eq!(machine.memory_number(), second + 1, "the second is in use");
    }

    #[test]
    fn the_console_keeps_the_newest_text() {
        let machine = Machine::new();
        for _ in 0..CONSOLE_SIZE {
            machine.print("é");
        }
        machine.print("the end");
        assert!(machine.console().len() <= CONSOLE_SIZE);
        assert!(machine.console().ends_with("éthe end"));
    }
}
