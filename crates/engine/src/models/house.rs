//! The hypervisor of the models: it counts references, and tells the checker who touches which page.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::{Mutex, MutexGuard};

use gnttab_abi::{DomId, Gfn, Mfn};

use crate::hypervisor::{
    Access, FrameOwner, HostError, HostMapping, HostUnmapping, Hypervisor, ResolveError, Resolved, StealError,
};
use crate::shared::PageWords;

use super::watched::Watched;

/// Frames of the machine.
const FRAMES: usize = 4;

/// What the hypervisor keeps for a domain.
pub(super) struct Home {
    id: DomId,
    /// Used by every call for the domain; had alone by whoever was told that the domain is gone.
    life: Arc<Watched>,
}

impl Home {
    pub(super) fn new(id: DomId, life: Arc<Watched>) -> Home {
        Home { id, life }
    }

    fn is_there(&self) {
        self.life.used();
    }
}

/// A frame: whose, how often referenced and typed writable, and whether it is on its way from one
/// domain to another.
#[derive(Clone, Copy, Default)]
struct Frame {
    owner: Option<DomId>,
    references: u32,
    types: u32,
}

/// See the module. Its own lock is no matter of the model: nothing that the checker knows happens
/// while it is held.
#[derive(Default)]
pub(super) struct House {
    /// Bytes are moved inside a table.
    inside: bool,
    frames: Mutex<[Frame; FRAMES]>,
    /// Addresses at which something is mapped.
    mapped: Mutex<Vec<u64>>,
    pages: [Watched; FRAMES],
}

impl House {
    /// Inside a table, or outside.
    pub(super) fn where_bytes_move(inside: bool) -> House {
        House {
            inside,
            ..House::default()
        }
    }

    fn frames(&self) -> MutexGuard<'_, [Frame; FRAMES]> {
        self.frames.lock().expect("a panic ends the model")
    }

    fn mapped(&self) -> MutexGuard<'_, Vec<u64>> {
        self.mapped.lock().expect("a panic ends the model")
    }

    pub(super) fn give(&self, mfn: Mfn, owner: DomId) {
        self.frames()[index(mfn)].owner = Some(owner);
    }

    pub(super) fn owner(&self, mfn: Mfn) -> Option<DomId> {
        self.frames()[index(mfn)].owner
    }

    /// Somebody who was given access uses a page.
    pub(super) fn touch(&self, mfn: Mfn) {
        self.pages[index(mfn)].used();
    }

    /// Its owner has a page to itself: the checker fails if somebody else's use is not over.
    pub(super) fn take_back(&self, mfn: Mfn) {
        self.pages[index(mfn)].had_alone();
    }

    pub(super) fn references(&self, mfn: Mfn) -> u32 {
        self.frames()[index(mfn)].references
    }

    /// Nothing is mapped, and nothing referenced.
    pub(super) fn check_idle(&self) {
        for frame in self.frames().iter() {
            assert_eq!((frame.references, frame.types), (0, 0), "no reference is lost");
        }
        assert!(self.mapped().is_empty(), "no mapping is lost");
    }
}

fn index(mfn: Mfn) -> usize {
    usize::try_from(mfn.0).unwrap()
}

impl Hypervisor for House {
    type Domain = Home;
    type TablePage = Arc<PageWords>;

    fn resolve(&self, domain: &Home, gfn: Gfn, _: Access) -> Result<Resolved, ResolveError> {
        domain.is_there();
        let mfn = Mfn(gfn.0);
        let frame = &mut self.frames()[index(mfn)];
        if frame.owner != Some(domain.id) {
            return Err(ResolveError::BadPage);
        }
        frame.references += 1;
        let owner = FrameOwner::Domain(domain.id);
        Ok(Resolved { mfn, owner })
    }

    fn get_frame(&self, mfn: Mfn) -> Option<FrameOwner> {
        let frame = &mut self.frames()[index(mfn)];
        frame.references += 1;
        frame.owner.map(FrameOwner::Domain)
    }

    fn put_frame(&self, mfn: Mfn) {
        let frame = &mut self.frames()[index(mfn)];
        frame.references = frame.references.checked_sub(1).expect("dropped once");
    }

    fn get_writable(&self, mfn: Mfn) -> bool {
        self.frames()[index(mfn)].types += 1;
        true
    }

    fn put_writable(&self, mfn: Mfn) {
        let frame = &mut self.frames()[index(mfn)];
        frame.types = frame.types.checked_sub(1).expect("dropped once");
    }

    fn copy_waits(&self) -> bool {
        !self.inside
    }

    fn copy(&self, (source, _): (Mfn, u16), (dest, _): (Mfn, u16), _: u16) {
        self.touch(source);
        self.touch(dest);
    }

    fn mark_dirty(&self, granter: &Home, _: Mfn) {
        granter.is_there();
    }

    fn map_host(&self, grantee: &Home, mapping: &HostMapping) -> Result<(), HostError> {
        grantee.is_there();
        self.mapped().push(mapping.addr);
        self.touch(mapping.mfn);
        Ok(())
    }

    fn unmap_host(&self, grantee: &Home, unmapping: &HostUnmapping) -> Result<(), HostError> {
        grantee.is_there();
        self.touch(unmapping.mfn);
        let mut mapped = self.mapped();
        let place = mapped.iter().position(|addr| *addr == unmapping.addr);
        mapped.swap_remove(place.ok_or(HostError)?);
        Ok(())
    }

    fn flush(&self, grantee: &Home) {
        grantee.is_there();
    }

    fn crash(&self, domain: &Home, why: &'static str) {
        panic!("{} crashes: {why}", domain.id);
    }

    fn alloc_table_page(&self, _: &Home) -> Option<Arc<PageWords>> {
        Some(Arc::new(PageWords::zeroed()))
    }

    fn table_page_mfn(&self, _: &Arc<PageWords>) -> Mfn {
        Mfn(0)
    }

    fn table_page_gfn(&self, _: &Home, _: &Arc<PageWords>) -> Gfn {
        Gfn(0)
    }

    fn may_setup(&self, _: &Home, target: &Home) -> bool {
        target.is_there();
        true
    }

    fn steal(&self, from: &Home, mfn: Mfn) -> Result<(), StealError> {
        let frame = &mut self.frames()[index(mfn)];
        if frame.owner != Some(from.id) || frame.references != 0 {
            return Err(StealError::BadPage);
        }
        frame.owner = None;
        Ok(())
    }

    fn reserve(&self, _: &Home) -> Result<(), StealError> {
        Ok(())
    }

    fn assign(&self, receiver: &Home, mfn: Mfn) -> Result<(), StealError> {
        self.give(mfn, receiver.id);
        Ok(())
    }

    fn install(&self, receiver: &Home, _: Mfn, _: Gfn) -> Result<(), HostError> {
        receiver.is_there();
        Ok(())
    }
}
