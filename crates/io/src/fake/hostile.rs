//! Peers that lie: each end of a ring, with every word and every slot free to write.

use std::vec::Vec;

use gnttab_abi::{Abi, GrantRef};

use super::domain::{FakeDomain, FakeGrantee, FakeMapping};
use crate::blkif::{RawResponse, Slot, response_size, slot_size};
use crate::grants::{Access, GrantError, Grantee, Granter};
use crate::ring::RingShape;
use crate::shared::SharedPages;

const REQ_PROD: usize = 0;
const RSP_PROD: usize = 8;
const HEADER: usize = 64;

/// A frontend that writes what it likes into the ring and into its granted pages.
///
/// ```
/// use gnttab_abi::Abi;
/// use gnttab_io::blkif::{BackendConfig, BackendQueue, Disk as _, RawResponse, Slot};
/// use gnttab_io::fake::{FakeDomain, HostileFrontend, NullPort, RamDisk};
///
/// let domain = FakeDomain::new();
/// let disk = RamDisk::new(64);
/// let mut liar = HostileFrontend::new(&domain, Abi::X86_32, 1)?;
/// let config = BackendConfig::new(Abi::X86_32, false);
/// let mut queue = BackendQueue::connect(domain.grantee(), liar.ring(), config, disk.info())?;
///
/// let mut slot = Slot::new(Abi::X86_32);
/// slot.set_operation(77);
/// slot.set_id(5);
/// liar.send(&slot);
/// queue.process(&disk, &mut NullPort, 32)?;
/// assert_eq!(liar.response(0), RawResponse { id: 5, operation: 77, status: -2 });
///
/// liar.set_req_prod(1000);
/// assert!(queue.process(&disk, &mut NullPort, 32).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct HostileFrontend {
    domain: FakeDomain,
    abi: Abi,
    shape: RingShape,
    pages: SharedPages,
    grefs: Vec<GrantRef>,
    req_prod: u32,
}

impl HostileFrontend {
    /// Grants an empty ring.
    ///
    /// # Errors
    /// [`GrantError`] if the domain has no pages left.
    ///
    /// # Panics
    /// If there is no ring of that many pages.
    pub fn new(domain: &FakeDomain, abi: Abi, ring_pages: usize) -> Result<HostileFrontend, GrantError> {
        let shape = RingShape::new(ring_pages, slot_size(abi)).expect("a ring of this shape");
        let mut granter = domain.granter();
        let run = granter.alloc(ring_pages)?;
        let grefs = (0..ring_pages)
            .map(|page| granter.grant(&run, page, Access::ReadWrite))
            .collect::<Result<Vec<_>, _>>()?;
        let pages = run.into_view();
        pages.store_u32(4, 1);
        pages.store_u32(12, 1);
        Ok(HostileFrontend {
            domain: domain.clone(),
            abi,
            shape,
            pages,
            grefs,
            req_prod: 0,
        })
    }

    /// Layout of the ring.
    #[must_use]
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// The ring's references.
    #[must_use]
    pub fn ring(&self) -> &[GrantRef] {
        &self.grefs
    }

    /// Slots of the ring.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.shape.slots()
    }

    /// The ring's memory, free to write.
    #[must_use]
    pub fn memory(&self) -> &SharedPages {
        &self.pages
    }

    /// Grants a data page and gives a free view of it.
    ///
    /// # Errors
    /// [`GrantError`] if the domain has no pages left.
    pub fn data_page(&self, access: Access) -> Result<(GrantRef, SharedPages), GrantError> {
        let mut granter = self.domain.granter();
        let page = granter.alloc(1)?;
        let gref = granter.grant(&page, 0, access)?;
        Ok((gref, page.into_view()))
    }

    /// Puts any bytes into the slot of an index, without counting it.
    pub fn write_slot(&self, index: u32, bytes: &[u8]) {
        let len = bytes.len().min(self.shape.slot_size());
        self.pages.write(self.offset(index), &bytes[..len]);
    }

    /// Puts a request into the next slot and counts it, as an honest frontend would.
    pub fn send(&mut self, slot: &Slot) {
        self.write_slot(self.req_prod, slot.bytes());
        self.set_req_prod(self.req_prod.wrapping_add(1));
    }

    /// Writes any producer index.
    pub fn set_req_prod(&mut self, value: u32) {
        self.req_prod = value;
        self.pages.store_u32(REQ_PROD, value);
    }

    /// How many responses the backend published.
    #[must_use]
    pub fn rsp_prod(&self) -> u32 {
        self.pages.load_u32(RSP_PROD)
    }

    /// The response in the slot of an index.
    #[must_use]
    pub fn response(&self, index: u32) -> RawResponse {
        RawResponse::from_bytes(&self.slot_bytes(index)[..response_size(self.abi)])
    }

    /// All bytes of the slot of an index.
    #[must_use]
    pub fn slot_bytes(&self, index: u32) -> Vec<u8> {
        let mut bytes = std::vec![0; self.shape.slot_size()];
        self.pages.read(self.offset(index), &mut bytes);
        bytes
    }

    fn offset(&self, index: u32) -> usize {
        HEADER + (index & (self.shape.slots() - 1)) as usize * self.shape.slot_size()
    }
}

/// A backend that maps a frontend's ring and answers what it likes.
pub struct HostileBackend {
    grantee: FakeGrantee,
    abi: Abi,
    shape: RingShape,
    ring: FakeMapping,
    kept: Vec<FakeMapping>,
    rsp_prod: u32,
}

impl HostileBackend {
    /// Maps the ring; `None` if that fails.
    #[must_use]
    pub fn new(domain: &FakeDomain, abi: Abi, grefs: &[GrantRef]) -> Option<HostileBackend> {
        let mut grantee = domain.grantee();
        let shape = RingShape::new(grefs.len(), slot_size(abi)).ok()?;
        let ring = grantee.map_run(grefs).ok()?;
        let rsp_prod = ring.as_ref().load_u32(RSP_PROD);
        Some(HostileBackend {
            grantee,
            abi,
            shape,
            ring,
            kept: Vec::new(),
            rsp_prod,
        })
    }

    /// The ring's memory, free to write.
    #[must_use]
    pub fn memory(&self) -> &SharedPages {
        self.ring.as_ref()
    }

    /// How many requests the frontend published.
    #[must_use]
    pub fn req_prod(&self) -> u32 {
        self.memory().load_u32(REQ_PROD)
    }

    /// The request in the slot of an index.
    #[must_use]
    pub fn request(&self, index: u32) -> Slot {
        let mut slot = Slot::new(self.abi);
        self.memory().read(self.offset(index), slot.bytes_mut());
        slot
    }

    /// Puts a response into the next slot and counts it.
    pub fn respond(&mut self, response: RawResponse) {
        let bytes = response.to_bytes();
        self.memory()
            .write(self.offset(self.rsp_prod), &bytes[..response_size(self.abi)]);
        self.set_rsp_prod(self.rsp_prod.wrapping_add(1));
    }

    /// Writes any producer index.
    pub fn set_rsp_prod(&mut self, value: u32) {
        self.rsp_prod = value;
        self.memory().store_u32(RSP_PROD, value);
    }

    /// Maps a page and keeps it.
    pub fn hold(&mut self, gref: GrantRef) -> bool {
        let mut results = Vec::new();
        self.grantee.map(&[gref], Access::ReadOnly, &mut results);
        let before = self.kept.len();
        self.kept.extend(results.into_iter().flatten());
        self.kept.len() > before
    }

    /// Unmaps what [`HostileBackend::hold`] kept.
    pub fn let_go(&mut self) {
        self.grantee.unmap(&mut self.kept);
    }

    fn offset(&self, index: u32) -> usize {
        HEADER + (index & (self.shape.slots() - 1)) as usize * self.shape.slot_size()
    }
}

impl Drop for HostileBackend {
    fn drop(&mut self) {
        self.let_go();
        let ring = core::mem::replace(&mut self.ring, FakeMapping::none());
        self.grantee.unmap(&mut Vec::from([ring]));
    }
}
