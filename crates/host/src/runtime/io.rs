//! What the ring drivers of `gnttab-io` ask for: pages to grant to one peer, and one peer's pages.

use std::sync::Arc;

use gnttab_abi::{Copy, CopyFlags, CopyPtr, DomId, GrantRef, GrantStatus, PAGE_SIZE};
use gnttab_guest::{Access, Grant, GrantTable, MapError, MapRequest, MappedRun, Mapper, Mapping, retry};
use gnttab_io::grants::{self, CopyDirection, CopyPart, GrantError};
use gnttab_io::shared::SharedPages;

use super::{Domain, Run, usize_of};
use crate::sys::{self, WindowPages};

/// Ends of access tried again before pages are taken.
const RETRIES: usize = 64;
/// Pages taken at a time, if there are so many in a row.
const NEIGHBOURS: u32 = 32;

/// Pages of this domain, granted to one peer: what a frontend's queue owns.
#[derive(Debug)]
pub struct Front {
    table: GrantTable<Domain>,
    peer: DomId,
    /// Pages that nobody has asked for yet, the next one last.
    spare: Vec<Run>,
    /// By reference: they are small numbers, and each is looked up for each request that it serves.
    live: Vec<Option<Grant<Domain>>>,
}

impl Front {
    /// Grants to `peer` out of this table. Queues share a table; each has its own `Front`.
    #[must_use]
    pub fn new(table: GrantTable<Domain>, peer: DomId) -> Front {
        Front {
            table,
            peer,
            spare: Vec::new(),
            live: Vec::new(),
        }
    }
}

impl grants::Granter for Front {
    type Pages = Run;

    fn alloc(&mut self, pages: usize) -> Result<Run, GrantError> {
        if let (1, Some(page)) = (pages, self.spare.pop()) {
            return Ok(page);
        }
        // What a peer has let go of since it was retired comes back when pages are wanted.
        self.table.retry_pending(RETRIES);
        let pages = u32::try_from(pages).map_err(|_| GrantError::NoPages)?;
        // One by one they would be neighbours of another queue's; and each would be a call to the monitor.
        if pages == 1
            && let Ok(mut neighbours) = self.table.platform().grantable_singly(NEIGHBOURS)
        {
            neighbours.reverse();
            self.spare = neighbours;
            return self.spare.pop().ok_or(GrantError::NoPages);
        }
        self.table
            .platform()
            .grantable(pages)
            .map_err(|_| GrantError::NoPages)
    }

    fn grant(&mut self, pages: &Run, index: usize, access: grants::Access) -> Result<GrantRef, GrantError> {
        let page = u32::try_from(index)
            .ok()
            .and_then(|index| pages.page(index))
            .ok_or(GrantError::NoPages)?;
        let gref = self.table.alloc_one().map_err(|_| GrantError::NoReferences)?;
        let granted = self.table.grant(gref, self.peer, page, access_of(access));
        // The other reasons do not come up: the page has a small number, the reference is this table's.
        let grant = granted.map_err(|_| GrantError::NoReferences)?;
        let gref = grant.gref();
        let place = place(gref);
        if self.live.len() <= place {
            self.live.resize_with(place + 1, || None);
        }
        self.live[place] = Some(grant);
        Ok(gref)
    }

    fn end(&mut self, gref: GrantRef) -> bool {
        // Where grants persist this is the usual answer, for every page of every request.
        let Some(live) = self.live.get_mut(place(gref)) else {
            return true;
        };
        if live.as_ref().is_some_and(Grant::is_used) {
            return false;
        }
        if let Some(Err(grant)) = live.take().map(Grant::try_end) {
            *live = Some(grant);
        }
        live.is_none()
    }

    /// What could not be ended goes to the table's queue, which keeps the pages until it can.
    fn retire(&mut self, pages: Run, still_granted: Vec<GrantRef>) {
        for gref in still_granted {
            drop(self.live.get_mut(place(gref)).and_then(Option::take));
        }
        drop(pages);
    }
}

fn place(gref: GrantRef) -> usize {
    usize::try_from(gref.0).unwrap_or(usize::MAX)
}

/// One peer's pages, mapped or copied: what a backend's queue owns.
#[derive(Debug)]
pub struct Back {
    domain: Arc<Domain>,
    mapper: Mapper<Domain>,
    peer: DomId,
}

/// Pages of the peer, mapped.
#[derive(Debug)]
pub struct Mapped {
    // Declared first: no access is possible any more when the mapping goes.
    pages: WindowPages,
    mapping: Held,
}

/// What unmaps when it is dropped.
#[derive(Debug)]
enum Held {
    One(Mapping<Domain>),
    Run(MappedRun<Domain>),
}

impl AsRef<SharedPages> for Mapped {
    fn as_ref(&self) -> &SharedPages {
        self.pages.as_ref()
    }
}

impl Back {
    /// Maps pages of `peer`. Queues share a mapper; each has its own `Back`.
    #[must_use]
    pub fn new(domain: Arc<Domain>, mapper: Mapper<Domain>, peer: DomId) -> Back {
        Back { domain, mapper, peer }
    }

    fn pages(&self, host_addr: u64, pages: usize, access: sys::Access) -> Result<WindowPages, GrantStatus> {
        let first = usize::try_from(host_addr).map_err(|_| GrantStatus::BAD_VIRT_ADDR)? / PAGE_SIZE;
        // The mapper has placed them; if not, there is nothing to give.
        self.domain
            .memory()
            .shared_pages(first, pages, access)
            .ok_or(GrantStatus::BAD_VIRT_ADDR)
    }
}

impl grants::Grantee for Back {
    type Mapping = Mapped;
    type Buffer = Run;

    fn map(
        &mut self,
        grefs: &[GrantRef],
        access: grants::Access,
        results: &mut Vec<Result<Mapped, GrantStatus>>,
    ) {
        let requests: Vec<MapRequest> = grefs
            .iter()
            .map(|&gref| MapRequest {
                dom: self.peer,
                gref,
                access: access_of(access),
            })
            .collect();
        let window_access = match access {
            grants::Access::ReadOnly => sys::Access::Read,
            grants::Access::ReadWrite => sys::Access::Write,
        };
        match self.mapper.map(&requests) {
            Ok(mapped) => results.extend(mapped.into_iter().map(|mapping| {
                let mapping = mapping.map_err(status_of)?;
                let pages = self.pages(mapping.host_addr(), 1, window_access)?;
                Ok(Mapped {
                    pages,
                    mapping: Held::One(mapping),
                })
            })),
            Err(error) => results.extend(grefs.iter().map(|_| Err(status_of(error)))),
        }
    }

    fn map_run(&mut self, grefs: &[GrantRef]) -> Result<Mapped, GrantStatus> {
        let run = self
            .mapper
            .map_run(self.peer, grefs, Access::ReadWrite)
            .map_err(status_of)?;
        let first = run.host_addr().ok_or(GrantStatus::BAD_GNTREF)?;
        let pages = self.pages(first, grefs.len(), sys::Access::Write)?;
        Ok(Mapped {
            pages,
            mapping: Held::Run(run),
        })
    }

    fn unmap(&mut self, mappings: &mut Vec<Mapped>) {
        let mut single = Vec::with_capacity(mappings.len());
        for Mapped { pages, mapping } in mappings.drain(..) {
            drop(pages);
            match mapping {
                Held::One(mapping) => single.push(mapping),
                Held::Run(run) => drop(run),
            }
        }
        // One that could not be undone keeps its address for ever, which the mapper's window shows.
        let _ = self.mapper.unmap(single);
    }

    fn buffer(&mut self, pages: usize) -> Result<Run, GrantStatus> {
        let pages = u32::try_from(pages).map_err(|_| GrantStatus::NO_SPACE)?;
        self.domain.private(pages).map_err(|_| GrantStatus::NO_SPACE)
    }

    fn copy(
        &mut self,
        direction: CopyDirection,
        parts: &[CopyPart],
        buffer: &Run,
    ) -> Result<(), GrantStatus> {
        let mut items = Vec::with_capacity(parts.len());
        for part in parts {
            items.push(
                self.copy_item(direction, part, buffer)
                    .ok_or(GrantStatus::BAD_COPY_ARG)?,
            );
        }
        retry::copy(&*self.domain, &mut items).map_err(|_| GrantStatus::GENERAL_ERROR)?;
        retry::check(&items).map_err(|failed| failed.status)
    }
}

impl Back {
    fn copy_item(&self, direction: CopyDirection, part: &CopyPart, buffer: &Run) -> Option<Copy> {
        let offset = |byte: usize| u16::try_from(byte).ok();
        if part.at / PAGE_SIZE >= usize_of(buffer.pages()) {
            return None;
        }
        let frame = buffer.gfn().0 + u64::try_from(part.at / PAGE_SIZE).ok()?;
        let own = CopyPtr::frame(frame, offset(part.at % PAGE_SIZE)?);
        let theirs = CopyPtr::grant(self.peer, part.gref, offset(part.offset)?);
        let (source, dest, flags) = match direction {
            CopyDirection::FromPeer => (theirs, own, CopyFlags::SOURCE_GREF),
            CopyDirection::ToPeer => (own, theirs, CopyFlags::DEST_GREF),
        };
        Some(Copy {
            source,
            dest,
            len: offset(part.len)?,
            flags,
            ..Copy::default()
        })
    }
}

fn access_of(access: grants::Access) -> Access {
    match access {
        grants::Access::ReadOnly => Access::ReadOnly,
        grants::Access::ReadWrite => Access::ReadWrite,
    }
}

fn status_of(error: MapError) -> GrantStatus {
    match error {
        MapError::Status { status, .. } => status,
        MapError::WindowFull { .. } | MapError::NoMemory(_) => GrantStatus::NO_SPACE,
        MapError::Call { .. } | MapError::NotEntered { .. } => GrantStatus::GENERAL_ERROR,
    }
}
