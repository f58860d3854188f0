//! A domain with pages to grant, and its peer's view of them, in memory.

use std::boxed::Box;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec;
use std::vec::Vec;

use gnttab_abi::{GrantRef, GrantStatus, PAGE_SIZE};

use crate::grants::{Access, CopyDirection, CopyPart, GrantError, Grantee, Granter};
use crate::ring::FrontRing;
use crate::shared::{HeapPages, Observer, SharedPages};

/// A place where [`FakeDomain::on_fault`] may make an operation fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// One reference of a map batch.
    Map(GrantRef),
    /// A run of references, for a ring.
    MapRun,
    /// A batch of copies.
    Copy,
    /// Pages for copies.
    Buffer,
}

type Fault = Box<dyn FnMut(FaultPoint) -> Option<GrantStatus> + Send>;

struct Entry {
    heap: HeapPages,
    page: usize,
    access: Access,
    mapped: usize,
}

#[derive(Default)]
struct Table {
    entries: BTreeMap<GrantRef, Entry>,
    next: u32,
    pages: usize,
    page_limit: Option<usize>,
    retired: Vec<(FakePages, Vec<GrantRef>)>,
    fault: Option<Fault>,
    observer: Option<Arc<dyn Observer>>,
    map_calls: u64,
}

/// A domain that grants pages, in memory: [`FakeDomain::granter`] is its own side, [`FakeDomain::grantee`]
/// that of its peer. Clones are the same domain. It counts everything, so that a test sees what leaks.
#[derive(Clone, Default)]
pub struct FakeDomain(Arc<Mutex<Table>>);

impl FakeDomain {
    /// A domain that has granted nothing.
    #[must_use]
    pub fn new() -> FakeDomain {
        FakeDomain::default()
    }

    /// Its own side: may be had several times, for several queues.
    #[must_use]
    pub fn granter(&self) -> FakeGranter {
        FakeGranter {
            domain: self.clone(),
            stale: false,
        }
    }

    /// Its peer's side: may be had several times.
    #[must_use]
    pub fn grantee(&self) -> FakeGrantee {
        FakeGrantee { domain: self.clone() }
    }

    /// Grants a fresh empty ring, for a test that needs no frontend.
    ///
    /// # Panics
    /// If there is no such ring.
    #[must_use]
    pub fn grant_ring(&self, pages: usize, slot_size: usize) -> Vec<GrantRef> {
        let mut granter = self.granter();
        let run = granter.alloc(pages).expect("pages");
        FrontRing::init(run.heap.view(), slot_size).expect("a ring of this shape");
        (0..pages)
            .map(|i| granter.grant(&run, i, Access::ReadWrite).expect("a reference"))
            .collect()
    }

    /// Pages that are allocated, retired ones that a peer still maps included.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.lock().pages
    }

    /// References in force.
    #[must_use]
    pub fn grants(&self) -> usize {
        self.lock().entries.len()
    }

    /// Mappings that peers hold.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.lock().entries.values().map(|entry| entry.mapped).sum()
    }

    /// How often a peer asked to map or copy.
    #[must_use]
    pub fn map_calls(&self) -> u64 {
        self.lock().map_calls
    }

    /// Pages that can be allocated at most.
    pub fn limit_pages(&self, limit: usize) {
        self.lock().page_limit = Some(limit);
    }

    /// Asks `fault` at each [`FaultPoint`] whether, and how, the operation fails.
    pub fn on_fault(&self, fault: impl FnMut(FaultPoint) -> Option<GrantStatus> + Send + 'static) {
        self.lock().fault = Some(Box::new(fault));
    }

    /// Tells `observer` of every load from pages allocated from now on.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        self.lock().observer = Some(observer);
    }

    /// Another view of a granted page, past all accounting: what the domain's own program can do with its
    /// memory behind the driver's back.
    #[must_use]
    pub fn peek(&self, gref: GrantRef) -> Option<SharedPages> {
        let table = self.lock();
        let entry = table.entries.get(&gref)?;
        Some(entry.heap.view_of(entry.page, 1, Access::ReadWrite))
    }

    /// All references in force.
    #[must_use]
    pub fn references(&self) -> Vec<GrantRef> {
        self.lock().entries.keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn fault(&mut self, point: FaultPoint) -> Option<GrantStatus> {
        self.fault.as_mut().and_then(|fault| fault(point))
    }

    fn map_one(&mut self, gref: GrantRef, access: Access) -> Result<SharedPages, GrantStatus> {
        if let Some(status) = self.fault(FaultPoint::Map(gref)) {
            return Err(status);
        }
        let entry = self.entries.get_mut(&gref).ok_or(GrantStatus::BAD_GNTREF)?;
        if entry.access == Access::ReadOnly && access == Access::ReadWrite {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        entry.mapped += 1;
        Ok(entry.heap.view_of(entry.page, 1, access))
    }

    fn map_run(&mut self, grefs: &[GrantRef]) -> Result<SharedPages, GrantStatus> {
        if let Some(status) = self.fault(FaultPoint::MapRun) {
            return Err(status);
        }
        let first = grefs
            .first()
            .and_then(|gref| self.entries.get(gref))
            .ok_or(GrantStatus::BAD_GNTREF)?;
        let (heap, page) = (first.heap.clone(), first.page);
        for (i, gref) in grefs.iter().enumerate() {
            let entry = self.entries.get(gref).ok_or(GrantStatus::BAD_GNTREF)?;
            // There is no page table here to make a run of scattered pages.
            if !entry.heap.same(&heap) || entry.page != page + i || entry.access != Access::ReadWrite {
                return Err(GrantStatus::GENERAL_ERROR);
            }
        }
        for gref in grefs {
            if let Some(entry) = self.entries.get_mut(gref) {
                entry.mapped += 1;
            }
        }
        Ok(heap.view_of(page, grefs.len(), Access::ReadWrite))
    }

    fn end(&mut self, gref: GrantRef) -> bool {
        match self.entries.get(&gref) {
            Some(entry) if entry.mapped > 0 => false,
            _ => {
                self.entries.remove(&gref);
                true
            }
        }
    }

    /// Frees retired pages whose references can be ended by now.
    fn settle_retired(&mut self) {
        for (pages, mut grefs) in core::mem::take(&mut self.retired) {
            grefs.retain(|gref| !self.end(*gref));
            if grefs.is_empty() {
                self.pages -= pages.heap.pages();
            } else {
                self.retired.push((pages, grefs));
            }
        }
    }
}

/// Pages of a [`FakeDomain`].
pub struct FakePages {
    heap: HeapPages,
    view: SharedPages,
}

impl FakePages {
    /// The memory, past all accounting.
    pub(super) fn into_view(self) -> SharedPages {
        self.view
    }
}

impl AsRef<SharedPages> for FakePages {
    fn as_ref(&self) -> &SharedPages {
        &self.view
    }
}

/// The granting side of a [`FakeDomain`].
#[derive(Clone)]
pub struct FakeGranter {
    domain: FakeDomain,
    stale: bool,
}

impl FakeGranter {
    /// As is, but its fresh pages are not zeroed: to see that drivers write all that a peer can read.
    #[must_use]
    pub fn with_stale_pages(mut self) -> FakeGranter {
        self.stale = true;
        self
    }
}

impl Granter for FakeGranter {
    type Pages = FakePages;

    fn alloc(&mut self, pages: usize) -> Result<FakePages, GrantError> {
        let mut table = self.domain.lock();
        if table.page_limit.is_some_and(|limit| table.pages + pages > limit) {
            return Err(GrantError::NoPages);
        }
        table.pages += pages;
        let heap = match &table.observer {
            Some(observer) => HeapPages::observed(pages, observer.clone()),
            None => HeapPages::zeroed(pages),
        };
        let view = heap.view();
        if self.stale {
            view.write(0, &vec![0xDB; pages * PAGE_SIZE]);
        }
        Ok(FakePages { heap, view })
    }

    fn grant(&mut self, pages: &FakePages, index: usize, access: Access) -> Result<GrantRef, GrantError> {
        let mut table = self.domain.lock();
        let gref = GrantRef(table.next.max(8));
        table.next = gref.0.checked_add(1).ok_or(GrantError::NoReferences)?;
        table.entries.insert(
            gref,
            Entry {
                heap: pages.heap.clone(),
                page: index,
                access,
                mapped: 0,
            },
        );
        Ok(gref)
    }

    fn end(&mut self, gref: GrantRef) -> bool {
        self.domain.lock().end(gref)
    }

    fn retire(&mut self, pages: FakePages, still_granted: Vec<GrantRef>) {
        let mut table = self.domain.lock();
        table.retired.push((pages, still_granted));
        table.settle_retired();
    }
}

/// A mapping of a [`FakeDomain`]'s pages.
pub struct FakeMapping {
    view: SharedPages,
    grefs: Vec<GrantRef>,
}

impl FakeMapping {
    /// A mapping of nothing.
    pub(super) fn none() -> FakeMapping {
        FakeMapping {
            view: HeapPages::zeroed(0).view(),
            grefs: Vec::new(),
        }
    }
}

impl AsRef<SharedPages> for FakeMapping {
    fn as_ref(&self) -> &SharedPages {
        &self.view
    }
}

/// The mapping side of a [`FakeDomain`].
#[derive(Clone)]
pub struct FakeGrantee {
    domain: FakeDomain,
}

impl Grantee for FakeGrantee {
    type Mapping = FakeMapping;
    type Buffer = SharedPages;

    fn map(
        &mut self,
        grefs: &[GrantRef],
        access: Access,
        results: &mut Vec<Result<FakeMapping, GrantStatus>>,
    ) {
        let mut table = self.domain.lock();
        table.map_calls += 1;
        results.extend(grefs.iter().map(|gref| {
            let view = table.map_one(*gref, access)?;
            Ok(FakeMapping {
                view,
                grefs: vec![*gref],
            })
        }));
    }

    fn map_run(&mut self, grefs: &[GrantRef]) -> Result<FakeMapping, GrantStatus> {
        let view = self.domain.lock().map_run(grefs)?;
        Ok(FakeMapping {
            view,
            grefs: grefs.to_vec(),
        })
    }

    fn unmap(&mut self, mappings: &mut Vec<FakeMapping>) {
        let mut table = self.domain.lock();
        for gref in mappings.drain(..).flat_map(|mapping| mapping.grefs) {
            if let Some(entry) = table.entries.get_mut(&gref) {
                entry.mapped = entry.mapped.saturating_sub(1);
            }
        }
        table.settle_retired();
    }

    fn buffer(&mut self, pages: usize) -> Result<SharedPages, GrantStatus> {
        match self.domain.lock().fault(FaultPoint::Buffer) {
            Some(status) => Err(status),
            None => Ok(HeapPages::zeroed(pages).view()),
        }
    }

    fn copy(
        &mut self,
        direction: CopyDirection,
        parts: &[CopyPart],
        buffer: &SharedPages,
    ) -> Result<(), GrantStatus> {
        let mut table = self.domain.lock();
        table.map_calls += 1;
        if let Some(status) = table.fault(FaultPoint::Copy) {
            return Err(status);
        }
        let mut bytes = [0; PAGE_SIZE];
        for part in parts {
            let bytes = bytes.get_mut(..part.len).ok_or(GrantStatus::BAD_COPY_ARG)?;
            let entry = table.entries.get(&part.gref).ok_or(GrantStatus::BAD_GNTREF)?;
            let page = entry.heap.view_of(entry.page, 1, entry.access);
            if part.offset + part.len > PAGE_SIZE || part.at % PAGE_SIZE + part.len > PAGE_SIZE {
                return Err(GrantStatus::BAD_COPY_ARG);
            }
            match direction {
                CopyDirection::FromPeer => {
                    page.read(part.offset, bytes);
                    buffer.write(part.at, bytes);
                }
                CopyDirection::ToPeer if entry.access == Access::ReadOnly => {
                    return Err(GrantStatus::GENERAL_ERROR);
                }
                CopyDirection::ToPeer => {
                    buffer.read(part.at, bytes);
                    page.write(part.offset, bytes);
                }
            }
        }
        Ok(())
    }
}
