//! Requests out, responses in: how operations and the ring's identifiers belong together.

use alloc::vec::Vec;

use gnttab_abi::PAGE_SIZE;

use super::bounce::{Bounce, put_back, segments_in_place, segments_that_fit};
use super::pool::For;
use super::types::{Completion, Data, DeviceBroken, Io, IoError};
use super::{FrontendQueue, Pending, Sent, Unsent};
use crate::blkif::layout::{RawResponse, SECTOR_SIZE, Slot};
use crate::blkif::request::{Direct, Direction, Discard, Operation, Request, Status, Transfer};
use crate::grants::{GrantError, Granter, Notify};

/// Why sending stopped.
enum Stop {
    /// No slot or no page until a response comes.
    Full,
    /// No page at all, and nothing outstanding that would bring one back.
    Grant(GrantError),
}

impl<G: Granter, N: Notify> FrontendQueue<G, N> {
    /// Sends as much as there is room for, in order.
    pub(super) fn pump(&mut self) {
        if !self.is_running() {
            return;
        }
        while let Some(rest) = self.unsent.pop_front() {
            match self.send(rest) {
                Ok(units) if units < rest.units => self.unsent.push_front(Unsent {
                    offset: rest.offset + units,
                    units: rest.units - units,
                    ..rest
                }),
                Ok(_) => {}
                Err(Stop::Full) => {
                    self.unsent.push_front(rest);
                    return;
                }
                Err(Stop::Grant(error)) => self.settle(rest.io, rest.units, Err(error.into())),
            }
        }
    }

    /// Sends the start of what is left of an operation; the units that went out.
    fn send(&mut self, rest: Unsent) -> Result<usize, Stop> {
        let (Some(pending), Some(link), Some(properties)) =
            (self.pending.get(&rest.io), &mut self.link, self.properties)
        else {
            return Ok(rest.units);
        };
        let Some(&id) = link.free_ids.last() else {
            return Err(Stop::Full);
        };
        let mut pages = Vec::new();
        let (request, units) = match &pending.io {
            Io::Flush => {
                let transfer = match (properties.disk.flush, properties.barrier) {
                    (true, _) => Transfer::Flush,
                    (false, true) => Transfer::Barrier,
                    // No cache to flush.
                    (false, false) => {
                        self.settle(rest.io, rest.units, Ok(()));
                        return Ok(rest.units);
                    }
                };
                (Direct::new(transfer, 0, &[]).map(Request::Direct), rest.units)
            }
            Io::Discard {
                sector,
                count,
                secure,
            } => match properties.disk.discard {
                Some(info) => {
                    let discard = Discard {
                        sector: *sector,
                        count: *count,
                        secure: *secure && info.secure,
                    };
                    (Ok(Request::Discard(discard)), rest.units)
                }
                None => {
                    self.settle(rest.io, rest.units, Err(IoError::NotSupported));
                    return Ok(rest.units);
                }
            },
            Io::Read { sector, data } | Io::Write { sector, data } => {
                let direction = match &pending.io {
                    Io::Read { .. } => Direction::Read,
                    _ => Direction::Write,
                };
                let wanted = rest.units.div_ceil(PAGE_SIZE);
                let max_indirect = self.config.max_indirect.min(properties.max_indirect);
                let available = self.pool.available();
                let bounce = Bounce {
                    pool: &mut self.pool,
                    granter: &mut self.granter,
                    persistent: properties.persistent,
                    pages: &mut pages,
                };
                let sector = sector + (rest.offset / SECTOR_SIZE) as u64;
                let (request, bytes) = match data {
                    Data::Own(data) => {
                        let count = segments_that_fit(wanted, max_indirect, available);
                        let bytes = rest.units.min(count * PAGE_SIZE);
                        let request = bounce.request(direction, sector, &data[rest.offset..][..bytes]);
                        (request, bytes)
                    }
                    Data::Leased(lease) => {
                        let count = segments_in_place(wanted, max_indirect, available);
                        let bytes = rest.units.min(count * PAGE_SIZE);
                        let lent = self.leases.get_mut(lease);
                        let pages = lent.map_or(&mut [][..], |lent| lent.part(rest.offset, bytes));
                        (bounce.request_in_place(direction, sector, pages, bytes), bytes)
                    }
                };
                match request {
                    Ok(request) => (request, bytes),
                    Err(error) => {
                        let stuck = link.free_ids.len() == link.shadows.len();
                        for page in pages {
                            let pool = (&mut self.pool, For::Request);
                            put_back(pool, &mut self.granter, properties.persistent, page);
                        }
                        return Err(if stuck { Stop::Grant(error) } else { Stop::Full });
                    }
                }
            }
        };
        // Put together of checked parts: refused only if this module is wrong, and then nothing is sent.
        let Ok(request) = request else {
            return Err(Stop::Full);
        };

        let shadow = &mut link.shadows[id as usize];
        let mut slot = Slot::new(self.config.abi);
        request.encode(
            u64::from(shadow.generation) << 32 | u64::from(id),
            self.config.handle,
            &mut slot,
        );
        shadow.sent = Some(Sent {
            io: rest.io,
            answered_as: request.answered_as(),
            offset: rest.offset,
            units,
        });
        shadow.pages = pages;
        link.free_ids.pop();
        // As many identifiers as slots: the ring has room.
        let pushed = link.ring.push(slot.bytes());
        debug_assert!(pushed.is_ok());
        self.stats.requests += 1;
        Ok(units)
    }

    /// Takes a response: rules 2 and 4 (spec 2.3).
    pub(super) fn complete(&mut self, response: RawResponse) -> Result<(), DeviceBroken> {
        let (Some(link), Some(properties)) = (&mut self.link, &mut self.properties) else {
            return Ok(());
        };
        let (Ok(index), generation) = (u32::try_from(response.id & 0xFFFF_FFFF), response.id >> 32) else {
            return Err(DeviceBroken::UnknownId(response.id));
        };
        let sent = link
            .shadows
            .get_mut(index as usize)
            .filter(|shadow| u64::from(shadow.generation) == generation)
            .and_then(|shadow| {
                shadow
                    .sent
                    .as_ref()
                    .map(|sent| sent.answered_as)
                    .map(|op| (shadow, op))
            });
        let Some((shadow, operation)) = sent else {
            return Err(DeviceBroken::UnknownId(response.id));
        };
        if response.operation != operation.code() {
            return Err(DeviceBroken::WrongOperation {
                id: response.id,
                expected: operation.code(),
                got: response.operation,
            });
        }
        // Access ends first, so that what is copied below is final (except where grants persist).
        let leased = shadow.sent.as_ref().and_then(|sent| {
            let (Io::Read { data, .. } | Io::Write { data, .. }) = &self.pending.get(&sent.io)?.io else {
                return None;
            };
            let Data::Leased(lease) = data else { return None };
            Some(self.leases.get_mut(lease)?.part(sent.offset, sent.units))
        });
        for page in shadow.pages.iter_mut().chain(leased.into_iter().flatten()) {
            if let Some(gref) = page.gref {
                if self.granter.end(gref) {
                    page.gref = None;
                } else if !properties.persistent {
                    return Err(DeviceBroken::StillMapped(gref));
                }
            }
        }
        let Some(sent) = shadow.sent.take() else {
            return Ok(());
        };
        shadow.generation = shadow.generation.wrapping_add(1);
        let pages = core::mem::take(&mut shadow.pages);
        link.free_ids.push(index);
        self.stats.responses += 1;

        let result = match Status::from_code(response.status) {
            Status::Okay => Ok(()),
            Status::Error => Err(IoError::Failed),
            Status::NotSupported => match operation {
                // It said that it could and cannot: from now on nothing is flushed, as if it had not.
                Operation::Flush | Operation::Barrier => {
                    properties.disk.flush = false;
                    properties.barrier = false;
                    Ok(())
                }
                Operation::Discard => {
                    properties.disk.discard = None;
                    Err(IoError::NotSupported)
                }
                _ => Err(IoError::Failed),
            },
        };
        if result.is_ok()
            && let Some(Pending {
                io:
                    Io::Read {
                        data: Data::Own(data),
                        ..
                    },
                ..
            }) = self.pending.get_mut(&sent.io)
        {
            let into = data[sent.offset..][..sent.units].chunks_mut(PAGE_SIZE);
            for (into, page) in into.zip(&pages) {
                page.page.as_ref().read(0, into);
            }
        }
        for page in pages {
            self.pool.put(page, For::Request);
        }
        self.settle(sent.io, sent.units, result);
        Ok(())
    }

    /// Counts units of an operation as answered, and completes it with the last. After a failure what was
    /// not sent of it is not sent any more: its remainder, if any, is in `unsent`.
    fn settle(&mut self, io: u64, units: usize, result: Result<(), IoError>) {
        let Some(pending) = self.pending.get_mut(&io) else {
            return;
        };
        pending.left -= units;
        pending.result = pending.result.and(result);
        if pending.result.is_err()
            && let Some(at) = self.unsent.iter().position(|rest| rest.io == io)
            && let Some(rest) = self.unsent.remove(at)
        {
            pending.left -= rest.units;
        }
        if pending.left > 0 {
            return;
        }
        let Some(Pending {
            token, io, result, ..
        }) = self.pending.remove(&io)
        else {
            return;
        };
        match (&io, result) {
            (_, Err(_)) => self.stats.failures += 1,
            (Io::Read { data, .. }, Ok(())) => self.stats.bytes_read += data.len() as u64,
            (Io::Write { data, .. }, Ok(())) => self.stats.bytes_written += data.len() as u64,
            _ => {}
        }
        self.done.push_back(Completion { token, io, result });
    }
}
