//! The bytes of blkif (spec 2.1): where each field lies in the three ring ABIs.
//!
//! [`Slot`] is the raw view: a private copy of one ring slot that takes any bytes and never panics. What a
//! request *means*, and whether it may be served, is [`Request`](super::Request)'s matter.
//!
//! x86_64 and Arm align 64-bit fields to 8, x86_32 to 4: nothing else differs.

use core::fmt;

use gnttab_abi::{Abi, GrantRef};

/// Bytes of a sector on the wire, whatever the device's own sector size is.
pub const SECTOR_SIZE: usize = 512;
/// Sectors in a granted page.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Segments that a direct request holds.
pub const MAX_DIRECT_SEGMENTS: usize = 11;
/// Indirect pages that an indirect request names.
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments in one indirect page.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;
/// Segments that the format allows in an indirect request.
pub const MAX_INDIRECT_SEGMENTS: u16 = 4096;
/// Bytes of a segment, in a slot and in an indirect page.
pub const SEGMENT_SIZE: usize = 8;
/// Bytes of the larger slot.
pub const MAX_SLOT: usize = 112;

/// The value of the frontend's `protocol` key for a ring ABI.
#[must_use]
pub const fn protocol_name(abi: Abi) -> &'static str {
    match abi {
        Abi::X86_64 => "x86_64-abi",
        Abi::X86_32 => "x86_32-abi",
        Abi::Arm => "arm-abi",
    }
}

/// The ring ABI that a `protocol` key names, if it is one.
#[must_use]
pub fn protocol_from_name(name: &str) -> Option<Abi> {
    Abi::ALL.into_iter().find(|abi| protocol_name(*abi) == name)
}

/// What a missing `protocol` key means here: as Linux's backend takes it, x86_32 on x86 and the
/// architecture's own layout elsewhere.
pub const ABSENT_PROTOCOL: Abi = if cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
    Abi::X86_32
} else {
    Abi::Arm
};

/// The ring ABI of a frontend compiled for this architecture.
pub const NATIVE_PROTOCOL: Abi = if cfg!(target_arch = "x86_64") {
    Abi::X86_64
} else if cfg!(target_arch = "x86") {
    Abi::X86_32
} else {
    Abi::Arm
};

/// Where the fields lie whose place depends on the ABI.
struct Places {
    slot: usize,
    response: usize,
    id: usize,
    sector: usize,
    /// Segments of a direct request, and the sector count of a discard.
    body: usize,
    indirect_handle: usize,
    indirect_pages: usize,
}

const WIDE: Places = Places {
    slot: 112,
    response: 16,
    id: 8,
    sector: 16,
    body: 24,
    indirect_handle: 24,
    indirect_pages: 28,
};
const NARROW: Places = Places {
    slot: 108,
    response: 12,
    id: 4,
    sector: 12,
    body: 20,
    indirect_handle: 20,
    indirect_pages: 24,
};

const fn places(abi: Abi) -> &'static Places {
    match abi {
        Abi::X86_64 | Abi::Arm => &WIDE,
        Abi::X86_32 => &NARROW,
    }
}

/// Bytes of a ring slot.
#[must_use]
pub const fn slot_size(abi: Abi) -> usize {
    places(abi).slot
}

/// Bytes of a response inside its slot.
#[must_use]
pub const fn response_size(abi: Abi) -> usize {
    places(abi).response
}

/// A segment as it lies: any bytes are one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RawSegment {
    /// The granted page.
    pub gref: GrantRef,
    /// First sector of the page.
    pub first_sect: u8,
    /// Last sector of the page, inclusive.
    pub last_sect: u8,
}

impl RawSegment {
    /// Reads the eight bytes of a segment; its padding is ignored.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; SEGMENT_SIZE]) -> RawSegment {
        let [a, b, c, d, first_sect, last_sect, _, _] = bytes;
        RawSegment {
            gref: GrantRef(u32::from_le_bytes([a, b, c, d])),
            first_sect,
            last_sect,
        }
    }

    /// The eight bytes of the segment, padding zero.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; SEGMENT_SIZE] {
        let [a, b, c, d] = self.gref.0.to_le_bytes();
        [a, b, c, d, self.first_sect, self.last_sect, 0, 0]
    }
}

/// A private copy of one ring slot that holds a request: every accessor works on every content.
///
/// Accessors named for one kind of request read whatever lies there in the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    abi: Abi,
    bytes: [u8; MAX_SLOT],
}

impl Slot {
    /// An all-zero slot.
    #[must_use]
    pub const fn new(abi: Abi) -> Slot {
        Slot {
            abi,
            bytes: [0; MAX_SLOT],
        }
    }

    /// Takes the start of `bytes` as a slot; what is missing is zero.
    #[must_use]
    pub fn from_bytes(abi: Abi, bytes: &[u8]) -> Slot {
        let mut slot = Slot::new(abi);
        let len = bytes.len().min(slot_size(abi));
        slot.bytes[..len].copy_from_slice(&bytes[..len]);
        slot
    }

    /// The ABI that it is read by.
    #[must_use]
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// The slot's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..slot_size(self.abi)]
    }

    /// The slot's bytes, to copy a request into.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..slot_size(self.abi)]
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        core::array::from_fn(|i| self.bytes[at + i])
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn places(&self) -> &'static Places {
        places(self.abi)
    }

    /// Operation code, byte 0 of every request.
    #[must_use]
    pub fn operation(&self) -> u8 {
        self.bytes[0]
    }

    /// Sets the operation code.
    pub fn set_operation(&mut self, operation: u8) {
        self.bytes[0] = operation;
    }

    /// Byte 1: segments of a direct request, flags of a discard, inner operation of an indirect request.
    #[must_use]
    pub fn second(&self) -> u8 {
        self.bytes[1]
    }

    /// Sets byte 1.
    pub fn set_second(&mut self, value: u8) {
        self.bytes[1] = value;
    }

    /// Bytes 2 and 3: segments of an indirect request, device handle of the others.
    #[must_use]
    pub fn half(&self) -> u16 {
        u16::from_le_bytes(self.get(2))
    }

    /// Sets bytes 2 and 3.
    pub fn set_half(&mut self, value: u16) {
        self.set(2, &value.to_le_bytes());
    }

    /// The frontend's identifier, in the same place in every request.
    #[must_use]
    pub fn id(&self) -> u64 {
        u64::from_le_bytes(self.get(self.places().id))
    }

    /// Sets the identifier.
    pub fn set_id(&mut self, id: u64) {
        self.set(self.places().id, &id.to_le_bytes());
    }

    /// First sector on the disk.
    #[must_use]
    pub fn sector_number(&self) -> u64 {
        u64::from_le_bytes(self.get(self.places().sector))
    }

    /// Sets the first sector.
    pub fn set_sector_number(&mut self, sector: u64) {
        self.set(self.places().sector, &sector.to_le_bytes());
    }

    /// Segment `index` of a direct request; a zero one beyond the eleventh.
    #[must_use]
    pub fn segment(&self, index: usize) -> RawSegment {
        if index >= MAX_DIRECT_SEGMENTS {
            return RawSegment::default();
        }
        RawSegment::from_bytes(self.get(self.places().body + index * SEGMENT_SIZE))
    }

    /// Sets segment `index` of a direct request; nothing beyond the eleventh.
    pub fn set_segment(&mut self, index: usize, segment: RawSegment) {
        if index < MAX_DIRECT_SEGMENTS {
            self.set(self.places().body + index * SEGMENT_SIZE, &segment.to_bytes());
        }
    }

    /// Sectors of a discard.
    #[must_use]
    pub fn nr_sectors(&self) -> u64 {
        u64::from_le_bytes(self.get(self.places().body))
    }

    /// Sets the sectors of a discard.
    pub fn set_nr_sectors(&mut self, sectors: u64) {
        self.set(self.places().body, &sectors.to_le_bytes());
    }

    /// Device handle of an indirect request.
    #[must_use]
    pub fn indirect_handle(&self) -> u16 {
        u16::from_le_bytes(self.get(self.places().indirect_handle))
    }

    /// Sets the device handle of an indirect request.
    pub fn set_indirect_handle(&mut self, handle: u16) {
        self.set(self.places().indirect_handle, &handle.to_le_bytes());
    }

    /// Indirect page `index`; reference 0 beyond the eighth.
    #[must_use]
    pub fn indirect_page(&self, index: usize) -> GrantRef {
        if index >= MAX_INDIRECT_PAGES {
            return GrantRef(0);
        }
        GrantRef(u32::from_le_bytes(
            self.get(self.places().indirect_pages + index * 4),
        ))
    }

    /// Sets indirect page `index`; nothing beyond the eighth.
    pub fn set_indirect_page(&mut self, index: usize, page: GrantRef) {
        if index < MAX_INDIRECT_PAGES {
            self.set(self.places().indirect_pages + index * 4, &page.0.to_le_bytes());
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Slot({:?}: operation {}, {}, {}, id {:#x}, sector {})",
            self.abi,
            self.operation(),
            self.second(),
            self.half(),
            self.id(),
            self.sector_number()
        )
    }
}

/// A response as it lies: any bytes are one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RawResponse {
    /// The request's identifier, bit for bit.
    pub id: u64,
    /// The request's operation; the inner one of an indirect request.
    pub operation: u8,
    /// 0, or a negative status.
    pub status: i16,
}

impl RawResponse {
    /// Reads a response from the start of a slot's bytes; what is missing is zero.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> RawResponse {
        let get = |at: usize| bytes.get(at).copied().unwrap_or(0);
        RawResponse {
            id: u64::from_le_bytes(core::array::from_fn(get)),
            operation: get(8),
            status: i16::from_le_bytes([get(10), get(11)]),
        }
    }

    /// The response's bytes, padding zero: [`response_size`] of them are the ABI's.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8] = self.operation;
        bytes[10..12].copy_from_slice(&self.status.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A different byte in every field, to hold against bytes written by hand from the table of spec 2.1.
    fn rw(abi: Abi) -> Slot {
        let mut slot = Slot::new(abi);
        slot.set_operation(1);
        slot.set_second(2);
        slot.set_half(0x0403);
        slot.set_id(0x0C0B_0A09_0807_0605);
        slot.set_sector_number(0x1413_1211_100F_0E0D);
        slot.set_segment(
            0,
            RawSegment {
                gref: GrantRef(0x1817_1615),
                first_sect: 0,
                last_sect: 7,
            },
        );
        slot.set_segment(
            10,
            RawSegment {
                gref: GrantRef(0x1C1B_1A19),
                first_sect: 3,
                last_sect: 4,
            },
        );
        slot
    }

    #[test]
    fn golden_bytes_of_a_direct_request() {
        let mut wide = [0; 112];
        wide[..28].copy_from_slice(&[
            1, 2, 3, 4, 0, 0, 0, 0, // operation, segments, handle, padding
            5, 6, 7, 8, 9, 10, 11, 12, // id
            13, 14, 15, 16, 17, 18, 19, 20, // sector
            0x15, 0x16, 0x17, 0x18, // first segment
        ]);
        wide[28..30].copy_from_slice(&[0, 7]);
        wide[104..110].copy_from_slice(&[0x19, 0x1A, 0x1B, 0x1C, 3, 4]);
        assert_eq!(rw(Abi::X86_64).bytes(), wide);
        assert_eq!(rw(Abi::Arm).bytes(), wide);

        let mut narrow = [0; 108];
        narrow[..4].copy_from_slice(&wide[..4]);
        narrow[4..].copy_from_slice(&wide[8..]);
        assert_eq!(rw(Abi::X86_32).bytes(), narrow);
    }

    #[test]
    fn golden_bytes_of_a_discard() {
        for (abi, shift) in [(Abi::X86_64, 4), (Abi::Arm, 4), (Abi::X86_32, 0)] {
            let mut slot = Slot::new(abi);
            slot.set_operation(5);
            slot.set_second(1);
            slot.set_id(0x0102);
            slot.set_sector_number(0x0304);
            slot.set_nr_sectors(0x0506);
            let mut bytes = [0; 112];
            bytes[..2].copy_from_slice(&[5, 1]);
            bytes[4 + shift..6 + shift].copy_from_slice(&[2, 1]);
            bytes[12 + shift..14 + shift].copy_from_slice(&[4, 3]);
            bytes[20 + shift..22 + shift].copy_from_slice(&[6, 5]);
            assert_eq!(slot.bytes(), &bytes[..slot_size(abi)], "{abi:?}");
        }
    }

    #[test]
    fn golden_bytes_of_an_indirect_request() {
        for (abi, shift) in [(Abi::X86_64, 4), (Abi::Arm, 4), (Abi::X86_32, 0)] {
            let mut slot = Slot::new(abi);
            slot.set_operation(6);
            slot.set_second(1);
            slot.set_half(0x0123);
            slot.set_id(0x0102);
            slot.set_sector_number(0x0304);
            slot.set_indirect_handle(0x0506);
            slot.set_indirect_page(0, GrantRef(0x0708));
            slot.set_indirect_page(7, GrantRef(0x090A));
            let mut bytes = [0; 112];
            bytes[..4].copy_from_slice(&[6, 1, 0x23, 1]);
            bytes[4 + shift..6 + shift].copy_from_slice(&[2, 1]);
            bytes[12 + shift..14 + shift].copy_from_slice(&[4, 3]);
            bytes[20 + shift..22 + shift].copy_from_slice(&[6, 5]);
            bytes[24 + shift..26 + shift].copy_from_slice(&[8, 7]);
            bytes[52 + shift..54 + shift].copy_from_slice(&[0x0A, 9]);
            assert_eq!(slot.bytes(), &bytes[..slot_size(abi)], "{abi:?}");
        }
    }

    #[test]
    fn golden_bytes_of_a_response() {
        let response = RawResponse {
            id: 0x0807_0605_0403_0201,
            operation: 3,
            status: -2,
        };
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 3, 0, 0xFE, 0xFF, 0, 0, 0, 0];
        assert_eq!(response.to_bytes(), bytes);
        for abi in Abi::ALL {
            assert_eq!(RawResponse::from_bytes(&bytes[..response_size(abi)]), response);
        }
        assert_eq!(Abi::ALL.map(response_size), [16, 12, 16]);
    }

    #[test]
    fn a_slot_reads_back_what_was_set() {
        for abi in Abi::ALL {
            let slot = rw(abi);
            assert_eq!(Slot::from_bytes(abi, slot.bytes()), slot);
            assert_eq!((slot.operation(), slot.second(), slot.half()), (1, 2, 0x0403));
            assert_eq!(slot.id(), 0x0C0B_0A09_0807_0605);
            assert_eq!(slot.sector_number(), 0x1413_1211_100F_0E0D);
            assert_eq!(slot.segment(10).last_sect, 4);
            assert_eq!(slot.segment(11), RawSegment::default());
        }
    }

    #[test]
    fn protocols_have_the_names_of_the_header() {
        assert_eq!(
            Abi::ALL.map(protocol_name),
            ["x86_64-abi", "x86_32-abi", "arm-abi"]
        );
        assert_eq!(
            Abi::ALL.map(|abi| protocol_from_name(protocol_name(abi))),
            Abi::ALL.map(Some)
        );
        assert_eq!(protocol_from_name("riscv-abi"), None);
    }
}
