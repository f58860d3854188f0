//! How the data of an operation becomes a request: through pages of the pool, as many as there are, or in the
//! leased pages where it lies.

use alloc::vec::Vec;

use gnttab_abi::{GrantRef, PAGE_SIZE};

use super::pool::{For, Pool, PoolPage};
use crate::blkif::layout::{
    MAX_DIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS, SECTOR_SIZE, SECTORS_PER_PAGE, SEGMENT_SIZE,
    SEGMENTS_PER_INDIRECT_PAGE,
};
use crate::blkif::request::{BadRequest, Direct, Direction, Indirect, Request, Segment, indirect_pages_for};
use crate::grants::{Access, GrantError, Granter};

/// How many of `wanted` data pages a request can take: by its form, and by the pages there are, those of an
/// indirect request's segments included.
pub(super) fn segments_that_fit(wanted: usize, max_indirect: u16, available: usize) -> usize {
    let max = usize::from(max_indirect.min(MAX_INDIRECT_SEGMENTS));
    let count = wanted.min(max.max(MAX_DIRECT_SEGMENTS));
    let indirect_pages = count.div_ceil(SEGMENTS_PER_INDIRECT_PAGE);
    if count <= MAX_DIRECT_SEGMENTS || count + indirect_pages > available {
        count
            .min(MAX_DIRECT_SEGMENTS.max(available.saturating_sub(indirect_pages)))
            .min(available)
    } else {
        count
    }
}

/// As [`segments_that_fit`], where only the pages of an indirect request's segments are still to be had.
pub(super) fn segments_in_place(wanted: usize, max_indirect: u16, available: usize) -> usize {
    let max = usize::from(max_indirect.min(MAX_INDIRECT_SEGMENTS));
    let by_pages = (available * SEGMENTS_PER_INDIRECT_PAGE).max(MAX_DIRECT_SEGMENTS);
    wanted.min(max.max(MAX_DIRECT_SEGMENTS)).min(by_pages)
}

/// Ends a page's grant unless it may persist, and puts it back. For pages that no request used.
pub(super) fn put_back<G: Granter>(
    (pool, what): (&mut Pool<G::Pages>, For),
    granter: &mut G,
    persistent: bool,
    mut page: PoolPage<G::Pages>,
) {
    match page.gref {
        Some(gref) if !persistent && !granter.end(gref) => pool.retire(granter, page),
        Some(_) if persistent => pool.put(page, what),
        _ => {
            page.gref = None;
            pool.put(page, what);
        }
    }
}

/// Makes one request, of data that it puts into pages or of pages as they are.
pub(super) struct Bounce<'a, G: Granter> {
    pub(super) pool: &'a mut Pool<G::Pages>,
    pub(super) granter: &'a mut G,
    pub(super) persistent: bool,
    /// Receives every page taken, also when there are not enough.
    pub(super) pages: &'a mut Vec<PoolPage<G::Pages>>,
}

impl<G: Granter> Bounce<'_, G> {
    /// A request for `data`, which is copied if it is to be written.
    pub(super) fn request(
        mut self,
        direction: Direction,
        sector: u64,
        data: &[u8],
    ) -> Result<Result<Request, BadRequest>, GrantError> {
        let mut segments = Vec::with_capacity(data.len().div_ceil(PAGE_SIZE));
        for chunk in data.chunks(PAGE_SIZE) {
            let from = if direction == Direction::Write { chunk } else { &[] };
            let gref = self.page(access_for(direction), from)?;
            segments.push((gref, chunk.len()));
        }
        self.assemble(direction, sector, &segments)
    }

    /// A request for the first `bytes` bytes of pages that are used as they are.
    pub(super) fn request_in_place(
        self,
        direction: Direction,
        sector: u64,
        pages: &mut [PoolPage<G::Pages>],
        bytes: usize,
    ) -> Result<Result<Request, BadRequest>, GrantError> {
        let access = self.access(access_for(direction));
        let mut segments = Vec::with_capacity(pages.len());
        for (page, start) in pages.iter_mut().zip((0..bytes).step_by(PAGE_SIZE)) {
            segments.push((page.grant(self.granter, access)?, (bytes - start).min(PAGE_SIZE)));
        }
        self.assemble(direction, sector, &segments)
    }

    /// A request of these pages, each with its bytes; the segments of many go into pages of their own.
    fn assemble(
        mut self,
        direction: Direction,
        sector: u64,
        pages: &[(GrantRef, usize)],
    ) -> Result<Result<Request, BadRequest>, GrantError> {
        if pages.is_empty() {
            return Err(GrantError::NoPages);
        }
        let segment = |&(gref, bytes): &(GrantRef, usize)| {
            Segment::leading(
                gref,
                u8::try_from(bytes / SECTOR_SIZE).unwrap_or(SECTORS_PER_PAGE),
            )
        };
        let mut segments = Vec::with_capacity(pages.len());
        for page in pages {
            match segment(page) {
                Ok(segment) => segments.push(segment),
                Err(bad) => return Ok(Err(bad)),
            }
        }
        if segments.len() <= MAX_DIRECT_SEGMENTS {
            return Ok(Direct::new(direction.transfer(), sector, &segments).map(Request::Direct));
        }
        let count = u16::try_from(segments.len()).unwrap_or(u16::MAX);
        let mut pages = Vec::with_capacity(indirect_pages_for(count));
        for some in segments.chunks(SEGMENTS_PER_INDIRECT_PAGE) {
            let mut bytes = [0; PAGE_SIZE];
            for (place, segment) in bytes.chunks_exact_mut(SEGMENT_SIZE).zip(some) {
                place.copy_from_slice(&segment.raw().to_bytes());
            }
            pages.push(self.page(Access::ReadOnly, &bytes)?);
        }
        Ok(Indirect::new(direction, sector, count, &pages).map(Request::Indirect))
    }

    /// A grant that may persist has to serve reads as well as writes.
    fn access(&self, access: Access) -> Access {
        if self.persistent {
            Access::ReadWrite
        } else {
            access
        }
    }

    fn page(&mut self, access: Access, content: &[u8]) -> Result<GrantRef, GrantError> {
        let access = self.access(access);
        let (page, gref) = self.pool.take_granted(self.granter, access)?;
        page.page.as_ref().write(0, content);
        self.pages.push(page);
        Ok(gref)
    }
}

/// What the peer has to do with the data's pages.
fn access_for(direction: Direction) -> Access {
    match direction {
        Direction::Read => Access::ReadWrite,
        Direction::Write => Access::ReadOnly,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_take_what_the_pages_allow() {
        // wanted, indirect, available -> segments
        for (wanted, max, available, expected) in [
            (1, 0, 100, 1),
            (50, 0, 100, 11),
            (50, 11, 100, 11),
            (50, 32, 100, 32),
            (20, 32, 100, 20),
            (50, 32, 33, 32),
            (50, 32, 32, 31),
            (50, 32, 12, 11),
            (50, 32, 5, 5),
            (50, 32, 0, 0),
            (600, 4096, 10_000, 600),
            (5000, u16::MAX, 10_000, 4096),
        ] {
            assert_eq!(
                segments_that_fit(wanted, max, available),
                expected,
                "{wanted} {max} {available}"
            );
        }
    }

    #[test]
    fn requests_in_place_take_what_their_segments_lie_in() {
        for (wanted, max, available, expected) in [
            (1, 0, 0, 1),
            (64, 32, 10, 32),
            (64, 32, 0, 11),
            (64, 0, 10, 11),
            (600, 4096, 1, 512),
            (600, 4096, 2, 600),
        ] {
            assert_eq!(
                segments_in_place(wanted, max, available),
                expected,
                "{wanted} {max} {available}"
            );
        }
    }
}
