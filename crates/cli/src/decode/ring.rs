//! A ring page of the block protocol, as it lies: its indexes, and what is in its slots.
//!
//! How far each side has read is private to it and in no page; so "outstanding" is what was asked and not yet answered.

use gnttab_abi::Abi;
use gnttab_io::blkif::{
    BadRequest, MAX_INDIRECT_SEGMENTS, Operation, RawResponse, Request, Slot, indirect_pages_for,
    response_size, slot_size,
};
use gnttab_io::ring::RingShape;
use serde::Serialize;

use super::entry::{Finding, Severity};

/// Bytes before the first slot, padding included.
const HEADER: usize = 64;

/// The indexes that the two sides share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Header {
    pub(crate) req_prod: u32,
    pub(crate) req_event: u32,
    pub(crate) rsp_prod: u32,
    pub(crate) rsp_event: u32,
}

impl Header {
    /// The header at the start of a ring, and its padding.
    pub(super) fn read(bytes: &[u8]) -> Option<(Header, &[u8])> {
        let (words, padding) = bytes.get(..HEADER)?.split_at(16);
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| words[at + byte]));
        let header = Header {
            req_prod: word(0),
            req_event: word(4),
            rsp_prod: word(8),
            rsp_event: word(12),
        };
        Some((header, padding))
    }

    /// Requests that were not answered yet.
    pub(super) fn outstanding(self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_prod)
    }
}

/// A request in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Asked {
    /// Its running number.
    pub(crate) index: u32,
    pub(crate) id: u64,
    /// In words; what is wrong with it, if it is no request.
    pub(crate) what: String,
    pub(crate) is_legal: bool,
    /// The references that it names.
    pub(crate) grefs: Vec<u32>,
}

/// An answer in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Answered {
    pub(crate) index: u32,
    pub(crate) id: u64,
    pub(crate) operation: u8,
    pub(crate) status: i16,
}

/// A ring, decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Ring {
    pub(crate) slots: u32,
    #[serde(flatten)]
    pub(crate) header: Header,
    pub(crate) outstanding: Vec<Asked>,
    /// The last answers, as far back as nothing was written over them.
    pub(crate) answered: Vec<Answered>,
    pub(crate) findings: Vec<Finding>,
}

/// Decodes the ring in `bytes`, which are whole pages and of that shape.
pub(crate) fn decode(bytes: &[u8], shape: RingShape, abi: Abi) -> Option<Ring> {
    let (header, padding) = Header::read(bytes)?;
    let mut findings = Vec::new();
    let mut find = |severity, code, text: String| findings.push(Finding { severity, code, text });
    let slots = shape.slots();
    let outstanding = header.outstanding();
    if outstanding > slots {
        find(
            Severity::Wrong,
            "indexes-apart",
            format!(
                "req_prod {:#x} is {} past rsp_prod {:#x}, and there are {slots} slots: each side stops using such a ring",
                header.req_prod, outstanding, header.rsp_prod
            ),
        );
    }
    if padding.iter().any(|byte| *byte != 0) {
        find(
            Severity::Suspicious,
            "padding",
            "the 48 bytes behind the indexes are not zero".to_owned(),
        );
    }
    for (name, event, producer) in [
        ("req_event", header.req_event, header.req_prod),
        ("rsp_event", header.rsp_event, header.rsp_prod),
    ] {
        // A sleeper asks for something that may still come: at most a ring ahead.
        let ahead = event.wrapping_sub(producer);
        if ahead > slots && ahead < u32::MAX / 2 {
            find(
                Severity::Suspicious,
                "never-woken",
                format!(
                    "{name} {event:#x} is more than a ring ahead of {producer:#x}: its side sleeps through everything"
                ),
            );
        }
    }
    let slot = |index: u32| {
        let at = HEADER + usize::try_from(index & (slots - 1)).ok()? * slot_size(abi);
        bytes.get(at..at + slot_size(abi))
    };
    let span = outstanding.min(slots);
    let asked: Vec<Asked> = (0..span)
        .filter_map(|ahead| {
            let index = header.rsp_prod.wrapping_add(ahead);
            Some(request(index, &Slot::from_bytes(abi, slot(index)?)))
        })
        .collect();
    for bad in asked.iter().filter(|asked| !asked.is_legal) {
        find(
            Severity::Wrong,
            "bad-request",
            format!("request {:#x}: {}", bad.index, bad.what),
        );
    }
    let answered = (1..=slots - span)
        .rev()
        // What was never produced is not there either.
        .filter(|back| *back <= header.rsp_prod)
        .filter_map(|back| {
            let index = header.rsp_prod.wrapping_sub(back);
            let RawResponse {
                id,
                operation,
                status,
            } = RawResponse::from_bytes(&slot(index)?[..response_size(abi).min(12)]);
            Some(Answered {
                index,
                id,
                operation,
                status,
            })
        })
        .collect();
    Some(Ring {
        slots,
        header,
        outstanding: asked,
        answered,
        findings,
    })
}

fn request(index: u32, slot: &Slot) -> Asked {
    let parsed = Request::parse(slot, MAX_INDIRECT_SEGMENTS);
    let grefs = match &parsed {
        Ok(Request::Direct(direct)) => direct.segments().map(|segment| segment.gref().0).collect(),
        Ok(Request::Indirect(indirect)) => indirect.pages().iter().map(|gref| gref.0).collect(),
        Ok(Request::Discard(_)) => Vec::new(),
        Err(_) => claimed(slot),
    };
    Asked {
        index,
        id: slot.id(),
        what: parsed
            .as_ref()
            .map_or_else(BadRequest::to_string, Request::to_string),
        is_legal: parsed.is_ok(),
        grefs,
    }
}

/// The references that a request that is none seems to name.
fn claimed(slot: &Slot) -> Vec<u32> {
    match Operation::from_code(slot.operation()) {
        Some(Operation::Indirect) => (0..indirect_pages_for(slot.half().min(MAX_INDIRECT_SEGMENTS)))
            .map(|page| slot.indirect_page(page).0)
            .collect(),
        Some(Operation::Discard) | None => Vec::new(),
        Some(_) => (0..usize::from(slot.second()).min(gnttab_io::blkif::MAX_DIRECT_SEGMENTS))
            .map(|segment| slot.segment(segment).gref.0)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use gnttab_abi::GrantRef;
    use gnttab_io::blkif::{RawSegment, Status, answer};
    use gnttab_io::ring::{BackRing, FrontRing};
    use gnttab_io::shared::HeapPages;

    use super::*;

    fn write(id: u64, last_sect: u8) -> Slot {
        let mut slot = Slot::new(Abi::X86_64);
        slot.set_operation(Operation::Write.code());
        slot.set_second(1);
        slot.set_id(id);
        slot.set_sector_number(8);
        slot.set_segment(
            0,
            RawSegment {
                gref: GrantRef(0x21),
                first_sect: 0,
                last_sect,
            },
        );
        slot
    }

    fn shape() -> RingShape {
        RingShape::new(1, slot_size(Abi::X86_64)).unwrap()
    }

    /// Two requests by the drivers' own code, the first answered.
    fn page(last_sect: u8) -> Vec<u8> {
        let heap = HeapPages::zeroed(1);
        let size = slot_size(Abi::X86_64);
        let mut front = FrontRing::init(heap.view(), size).unwrap();
        let mut back = BackRing::attach(heap.view(), size).unwrap();
        front.push(write(7, 7).bytes()).unwrap();
        front.push(write(8, last_sect).bytes()).unwrap();
        front.publish();
        let mut taken = Slot::new(Abi::X86_64);
        let owed = back.take(taken.bytes_mut()).unwrap().unwrap();
        back.respond(owed, &answer(&taken, Status::Okay).to_bytes());
        back.publish();
        let mut bytes = vec![0; 4096];
        heap.view().read(0, &mut bytes);
        bytes
    }

    #[test]
    fn a_ring_that_drivers_made_is_read_back() {
        let ring = decode(&page(3), shape(), Abi::X86_64).unwrap();
        assert_eq!(ring.findings, []);
        assert_eq!((ring.header.req_prod, ring.header.rsp_prod), (2, 1));
        let [asked] = &ring.outstanding[..] else {
            panic!("{ring:?}")
        };
        assert_eq!((asked.id, &asked.grefs[..]), (8, &[0x21][..]));
        let [answered] = &ring.answered[..] else {
            panic!("{ring:?}")
        };
        assert_eq!((answered.id, answered.operation, answered.status), (7, 1, 0));
    }

    #[test]
    fn harm_in_a_ring_is_found() {
        let codes = |bytes: &[u8]| -> Vec<&'static str> {
            let ring = decode(bytes, shape(), Abi::X86_64).unwrap();
            ring.findings.iter().map(|finding| finding.code).collect()
        };
        assert_eq!(codes(&page(8)), ["bad-request"]);
        let mut apart = page(3);
        apart[8..12].copy_from_slice(&3_u32.to_le_bytes());
        assert!(codes(&apart).contains(&"indexes-apart"));
        let mut asleep = page(3);
        asleep[4..8].copy_from_slice(&100_u32.to_le_bytes());
        assert_eq!(codes(&asleep), ["never-woken"]);
        let mut padded = page(3);
        padded[63] = 1;
        assert_eq!(codes(&padded), ["padding"]);
    }
}
