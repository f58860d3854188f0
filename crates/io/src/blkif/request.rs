//! Requests and responses that can only be legal (spec 2.1, 2.2).

use core::fmt;

use gnttab_abi::GrantRef;

use super::layout::{
    MAX_DIRECT_SEGMENTS, MAX_INDIRECT_PAGES, MAX_INDIRECT_SEGMENTS, RawResponse, RawSegment, SECTOR_SIZE,
    SECTORS_PER_PAGE, SEGMENTS_PER_INDIRECT_PAGE, Slot,
};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// The disk's content goes to the granted pages.
    Read = 0,
    /// The granted pages' content goes to the disk.
    Write = 1,
    /// A write, or nothing, that all earlier writes precede and all later ones follow.
    Barrier = 2,
    /// Completed writes become durable; may carry data.
    Flush = 3,
    /// Sectors whose content is no longer needed.
    Discard = 5,
    /// A read or write whose segments lie in pages of their own.
    Indirect = 6,
}

impl Operation {
    /// The operation of a code; `None` for 4, which is reserved, and for all above 6.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Operation> {
        match code {
            0 => Some(Operation::Read),
            1 => Some(Operation::Write),
            2 => Some(Operation::Barrier),
            3 => Some(Operation::Flush),
            5 => Some(Operation::Discard),
            6 => Some(Operation::Indirect),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// Part of a granted page: sectors `first..=last`.
///
/// Having one tells you: `first <= last <= 7`, so the part is not empty and lies inside its page.
/// It tells you nothing about the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    // Private: the two sectors keep an invariant.
    raw: RawSegment,
}

impl Segment {
    /// Checks a segment (spec 2.2.3).
    ///
    /// # Errors
    /// [`BadRequest::Segment`] unless `first <= last <= 7`.
    pub const fn new(raw: RawSegment) -> Result<Segment, BadRequest> {
        if raw.first_sect <= raw.last_sect && raw.last_sect < SECTORS_PER_PAGE {
            Ok(Segment { raw })
        } else {
            Err(BadRequest::Segment {
                first: raw.first_sect,
                last: raw.last_sect,
            })
        }
    }

    /// The first `sectors` sectors of a page.
    ///
    /// # Errors
    /// [`BadRequest::Segment`] unless there are 1 to 8.
    pub const fn leading(gref: GrantRef, sectors: u8) -> Result<Segment, BadRequest> {
        Segment::new(RawSegment {
            gref,
            first_sect: 0,
            last_sect: sectors.wrapping_sub(1),
        })
    }

    /// The granted page.
    #[must_use]
    pub const fn gref(self) -> GrantRef {
        self.raw.gref
    }

    /// First byte of the part in its page.
    #[must_use]
    pub const fn offset(self) -> usize {
        self.raw.first_sect as usize * SECTOR_SIZE
    }

    /// Sectors, 1 to 8.
    #[must_use]
    pub const fn sectors(self) -> u8 {
        self.raw.last_sect - self.raw.first_sect + 1
    }

    /// Bytes, 512 to 4096.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.sectors() as usize * SECTOR_SIZE
    }

    /// As it lies on the wire.
    #[must_use]
    pub const fn raw(self) -> RawSegment {
        self.raw
    }
}

/// What the data of a direct request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transfer {
    /// Disk to pages.
    Read,
    /// Pages to disk.
    Write,
    /// As [`Operation::Barrier`].
    Barrier,
    /// As [`Operation::Flush`].
    Flush,
}

impl Transfer {
    /// The wire's operation.
    #[must_use]
    pub const fn operation(self) -> Operation {
        match self {
            Transfer::Read => Operation::Read,
            Transfer::Write => Operation::Write,
            Transfer::Barrier => Operation::Barrier,
            Transfer::Flush => Operation::Flush,
        }
    }
}

/// What the data of an indirect request is for: the format allows no more than these two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Disk to pages.
    Read,
    /// Pages to disk.
    Write,
}

impl Direction {
    /// The same in a direct request.
    #[must_use]
    pub const fn transfer(self) -> Transfer {
        match self {
            Direction::Read => Transfer::Read,
            Direction::Write => Transfer::Write,
        }
    }
}

/// A read, write, barrier or flush with its segments in the slot.
///
/// Having one tells you: there are 1 to 11 segments, or none for a barrier or flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// What for.
    pub transfer: Transfer,
    /// First sector on the disk; not yet held against its size.
    pub sector: u64,
    segments: [Option<Segment>; MAX_DIRECT_SEGMENTS],
}

impl Direct {
    /// Puts a direct request together.
    ///
    /// # Errors
    /// [`BadRequest::SegmentCount`] for more than 11 segments, or none where the operation needs data.
    pub fn new(transfer: Transfer, sector: u64, segments: &[Segment]) -> Result<Direct, BadRequest> {
        let may_be_empty = matches!(transfer, Transfer::Barrier | Transfer::Flush);
        if segments.len() > MAX_DIRECT_SEGMENTS || (segments.is_empty() && !may_be_empty) {
            return Err(BadRequest::SegmentCount {
                count: segments.len(),
                max: MAX_DIRECT_SEGMENTS,
            });
        }
        let segments = core::array::from_fn(|i| segments.get(i).copied());
        Ok(Direct {
            transfer,
            sector,
            segments,
        })
    }

    /// The segments in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        self.segments.into_iter().map_while(|segment| segment)
    }
}

/// A read or write whose segments lie in granted pages of their own.
///
/// Having one tells you: it claims 1 to `max` segments, `max` being what the backend advertised, and names
/// exactly the pages that hold that many. It tells you nothing about the segments themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indirect {
    /// What for.
    pub direction: Direction,
    /// First sector on the disk; not yet held against its size.
    pub sector: u64,
    count: u16,
    pages: [GrantRef; MAX_INDIRECT_PAGES],
}

impl Indirect {
    /// Puts an indirect request together: `pages` hold `count` segments.
    ///
    /// # Errors
    /// [`BadRequest::SegmentCount`] unless there are 1 to 4096 segments and just the pages they need.
    pub fn new(
        direction: Direction,
        sector: u64,
        count: u16,
        pages: &[GrantRef],
    ) -> Result<Indirect, BadRequest> {
        let fits = (1..=MAX_INDIRECT_SEGMENTS).contains(&count) && pages.len() == indirect_pages_for(count);
        if !fits {
            let (count, max) = (usize::from(count), usize::from(MAX_INDIRECT_SEGMENTS));
            return Err(BadRequest::SegmentCount { count, max });
        }
        let pages = core::array::from_fn(|i| pages.get(i).copied().unwrap_or_default());
        Ok(Indirect {
            direction,
            sector,
            count,
            pages,
        })
    }

    /// Segments claimed.
    #[must_use]
    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    /// The pages that hold them, 512 in each but the last.
    #[must_use]
    pub fn pages(&self) -> &[GrantRef] {
        &self.pages[..indirect_pages_for(self.count)]
    }
}

/// Pages that hold `count` segments.
#[must_use]
pub fn indirect_pages_for(count: u16) -> usize {
    usize::from(count).div_ceil(SEGMENTS_PER_INDIRECT_PAGE)
}

/// A discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// First sector; not yet held against the disk's size.
    pub sector: u64,
    /// Sectors.
    pub count: u64,
    /// Whether the content must become irretrievable.
    pub secure: bool,
}

/// A request whose form is legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Segments in the slot.
    Direct(Direct),
    /// Segments in pages of their own.
    Indirect(Indirect),
    /// No data.
    Discard(Discard),
}

const DISCARD_SECURE: u8 = 1;

impl Request {
    /// Judges a private copy of a slot by steps 1 to 3 of spec 2.2; `max_indirect` is what the backend
    /// advertised, 0 for none.
    ///
    /// # Errors
    /// What is wrong. Nothing of the request may be used then but its id.
    ///
    /// ```
    /// use gnttab_abi::Abi;
    /// use gnttab_io::blkif::{BadRequest, Request, Slot};
    ///
    /// let mut slot = Slot::new(Abi::X86_64);
    /// slot.set_operation(9);
    /// assert_eq!(Request::parse(&slot, 256), Err(BadRequest::Operation(9)));
    /// ```
    pub fn parse(slot: &Slot, max_indirect: u16) -> Result<Request, BadRequest> {
        let code = slot.operation();
        let transfer = match Operation::from_code(code).ok_or(BadRequest::Operation(code))? {
            Operation::Read => Transfer::Read,
            Operation::Write => Transfer::Write,
            Operation::Barrier => Transfer::Barrier,
            Operation::Flush => Transfer::Flush,
            Operation::Discard => {
                return Ok(Request::Discard(Discard {
                    sector: slot.sector_number(),
                    count: slot.nr_sectors(),
                    secure: slot.second() & DISCARD_SECURE != 0,
                }));
            }
            Operation::Indirect => return Self::parse_indirect(slot, max_indirect).map(Request::Indirect),
        };
        let count = usize::from(slot.second());
        if count > MAX_DIRECT_SEGMENTS {
            return Err(BadRequest::SegmentCount {
                count,
                max: MAX_DIRECT_SEGMENTS,
            });
        }
        let mut segments = [Segment {
            raw: RawSegment::default(),
        }; MAX_DIRECT_SEGMENTS];
        for (i, segment) in segments[..count].iter_mut().enumerate() {
            *segment = Segment::new(slot.segment(i))?;
        }
        Direct::new(transfer, slot.sector_number(), &segments[..count]).map(Request::Direct)
    }

    fn parse_indirect(slot: &Slot, max: u16) -> Result<Indirect, BadRequest> {
        let direction = match Operation::from_code(slot.second()) {
            Some(Operation::Read) => Direction::Read,
            Some(Operation::Write) => Direction::Write,
            _ => return Err(BadRequest::InnerOperation(slot.second())),
        };
        let count = slot.half();
        if count > max {
            return Err(BadRequest::SegmentCount {
                count: usize::from(count),
                max: usize::from(max),
            });
        }
        let pages: [GrantRef; MAX_INDIRECT_PAGES] = core::array::from_fn(|i| slot.indirect_page(i));
        let needed = indirect_pages_for(count).min(MAX_INDIRECT_PAGES);
        Indirect::new(direction, slot.sector_number(), count, &pages[..needed])
    }

    /// Writes the request into an empty slot; `handle` names the device (the frontend's device number).
    pub fn encode(&self, id: u64, handle: u16, slot: &mut Slot) {
        *slot = Slot::new(slot.abi());
        slot.set_id(id);
        match self {
            Request::Direct(direct) => {
                slot.set_operation(direct.transfer.operation().code());
                slot.set_half(handle);
                slot.set_sector_number(direct.sector);
                let mut count = 0;
                for (i, segment) in direct.segments().enumerate() {
                    slot.set_segment(i, segment.raw());
                    count += 1;
                }
                slot.set_second(count);
            }
            Request::Indirect(indirect) => {
                slot.set_operation(Operation::Indirect.code());
                slot.set_second(indirect.direction.transfer().operation().code());
                slot.set_half(indirect.count);
                slot.set_sector_number(indirect.sector);
                slot.set_indirect_handle(handle);
                for (i, page) in indirect.pages().iter().enumerate() {
                    slot.set_indirect_page(i, *page);
                }
            }
            Request::Discard(discard) => {
                slot.set_operation(Operation::Discard.code());
                slot.set_second(if discard.secure { DISCARD_SECURE } else { 0 });
                slot.set_half(handle);
                slot.set_sector_number(discard.sector);
                slot.set_nr_sectors(discard.count);
            }
        }
    }

    /// The operation that the response must name: the inner one of an indirect request.
    #[must_use]
    pub fn answered_as(&self) -> Operation {
        match self {
            Request::Direct(direct) => direct.transfer.operation(),
            Request::Indirect(indirect) => indirect.direction.transfer().operation(),
            Request::Discard(_) => Operation::Discard,
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::Direct(direct) => {
                write!(f, "{:?} at sector {}", direct.transfer, direct.sector)?;
                for segment in direct.segments() {
                    let RawSegment {
                        gref,
                        first_sect,
                        last_sect,
                    } = segment.raw();
                    write!(f, ", {gref}[{first_sect}..={last_sect}]")?;
                }
                Ok(())
            }
            Request::Indirect(indirect) => write!(
                f,
                "{:?} at sector {}, {} segments in {} pages",
                indirect.direction,
                indirect.sector,
                indirect.count,
                indirect.pages().len()
            ),
            Request::Discard(Discard {
                sector,
                count,
                secure,
            }) => {
                write!(
                    f,
                    "{}discard of {count} sectors at {sector}",
                    if *secure { "secure " } else { "" }
                )
            }
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Done (0).
    Okay,
    /// Not done, or in part (-1, and every other negative number).
    Error,
    /// The backend does not do this (-2).
    NotSupported,
}

impl Status {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> i16 {
        match self {
            Status::Okay => 0,
            Status::Error => -1,
            Status::NotSupported => -2,
        }
    }

    /// What a number on the wire means; everything unknown is an error.
    #[must_use]
    pub const fn from_code(code: i16) -> Status {
        match code {
            0 => Status::Okay,
            -2 => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// The answer to a slot: its id bit for bit and the operation that its sender will look for, whatever the
/// slot holds.
#[must_use]
pub fn answer(slot: &Slot, status: Status) -> RawResponse {
    let operation = match Operation::from_code(slot.operation()) {
        Some(Operation::Indirect) => slot.second(),
        _ => slot.operation(),
    };
    RawResponse {
        id: slot.id(),
        operation,
        status: status.code(),
    }
}

/// Why a request was refused (spec 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Step 1.
    #[error("operation {0} does not exist")]
    Operation(u8),
    /// Step 2.
    #[error("inner operation {0} of an indirect request is neither read nor write")]
    InnerOperation(u8),
    /// Step 2.
    #[error("{count} segments, where 1 to {max} are allowed")]
    SegmentCount {
        /// Segments claimed.
        count: usize,
        /// Most that were allowed.
        max: usize,
    },
    /// Step 3.
    #[error("segment of sectors {first} to {last} of a page of 8")]
    Segment {
        /// First sector.
        first: u8,
        /// Last sector.
        last: u8,
    },
    /// Step 4.
    #[error("{count} sectors from {sector} leave the disk of {size}")]
    OutOfRange {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
        /// Sectors of the disk.
        size: u64,
    },
    /// Step 4.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Step 5.
    #[error("{count} sectors from {sector} are no whole logical sectors of {sector_size} bytes")]
    Unaligned {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
        /// Bytes of the disk's logical sector.
        sector_size: u32,
    },
    /// The disk does not flush, or does not discard.
    #[error("the disk cannot do this")]
    NotSupported,
}

impl BadRequest {
    /// The status that answers it.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            BadRequest::Operation(_) | BadRequest::NotSupported => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gnttab_abi::Abi;

    fn slot(operation: u8, second: u8) -> Slot {
        let mut slot = Slot::new(Abi::X86_64);
        slot.set_operation(operation);
        slot.set_second(second);
        slot
    }

    #[test]
    fn t513_a_segment_is_accepted_iff_first_le_last_le_7() {
        for first in 0..=255 {
            for last in 0..=255 {
                let raw = RawSegment {
                    gref: GrantRef(9),
                    first_sect: first,
                    last_sect: last,
                };
                assert_eq!(
                    Segment::new(raw).is_ok(),
                    first <= last && last <= 7,
                    "{first}..={last}"
                );
                if let Ok(segment) = Segment::new(raw) {
                    assert!(segment.offset() + segment.bytes() <= 4096);
                }
            }
        }
    }

    #[test]
    fn t513_direct_segment_counts() {
        for operation in [0, 1, 2, 3] {
            for count in 0..=255 {
                let accepted = Request::parse(&slot(operation, count), 4096).is_ok();
                let legal = count <= 11 && (count > 0 || operation >= 2);
                assert_eq!(accepted, legal, "operation {operation}, {count} segments");
            }
        }
    }

    #[test]
    fn t513_indirect_segment_counts() {
        for max in [0, 32, 256, 4096] {
            for count in 0..=u16::MAX {
                let mut slot = slot(6, 1);
                slot.set_half(count);
                match Request::parse(&slot, max) {
                    Ok(Request::Indirect(indirect)) => {
                        assert!(count > 0 && count <= max);
                        assert_eq!(indirect.pages().len(), usize::from(count).div_ceil(512));
                    }
                    other => assert!(other.is_err() && (count == 0 || count > max)),
                }
            }
        }
    }

    #[test]
    fn unknown_operations_are_not_supported() {
        for code in (0..=255).filter(|code| !matches!(code, 0..=3 | 5 | 6)) {
            let bad = Request::parse(&slot(code, 1), 4096).unwrap_err();
            assert_eq!(
                (bad, bad.status()),
                (BadRequest::Operation(code), Status::NotSupported)
            );
        }
        for inner in 2..=255 {
            assert_eq!(
                Request::parse(&slot(6, inner), 4096),
                Err(BadRequest::InnerOperation(inner))
            );
        }
    }

    #[test]
    fn requests_come_back_from_their_slots() {
        let segments: [Segment; 11] = core::array::from_fn(|i| {
            let first_sect = u8::try_from(i % 8).unwrap();
            Segment::new(RawSegment {
                gref: GrantRef(u32::MAX - 5),
                first_sect,
                last_sect: 7,
            })
            .unwrap()
        });
        let requests = [
            Request::Direct(Direct::new(Transfer::Read, 5, &segments).unwrap()),
            Request::Direct(Direct::new(Transfer::Write, u64::MAX, &segments[..1]).unwrap()),
            Request::Direct(Direct::new(Transfer::Flush, 0, &[]).unwrap()),
            Request::Direct(Direct::new(Transfer::Barrier, 0, &segments[2..4]).unwrap()),
            Request::Indirect(Indirect::new(Direction::Write, 77, 513, &[GrantRef(8), GrantRef(9)]).unwrap()),
            Request::Discard(Discard {
                sector: 1,
                count: u64::MAX,
                secure: true,
            }),
        ];
        for abi in Abi::ALL {
            for request in requests {
                let mut slot = Slot::new(abi);
                request.encode(0xDEAD_BEEF_0000_0001, 51712, &mut slot);
                assert_eq!(Request::parse(&slot, 4096), Ok(request));
                let response = answer(&slot, Status::Okay);
                assert_eq!(response.id, 0xDEAD_BEEF_0000_0001);
                assert_eq!(response.operation, request.answered_as().code());
            }
        }
    }
}
