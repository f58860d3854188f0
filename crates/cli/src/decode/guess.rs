//! What raw bytes are, from what they hold.
//!
//! Each reading is tried, and gets a point for what only it explains and loses two for what a guest would not write. A page
//! of one kind read as another makes grants of frame 0, padding that is not zero, types that are none.

use gnttab_abi::{ENTRY_V1_SIZE, ENTRY_V2_SIZE, EntryFlags, EntryV1, EntryV2, GrantRef, STATUS_WORD_SIZE};
use gnttab_io::ring::RingShape;

use super::Kind;
use super::entry::{self, Decoded, FRAME_LIMIT, State};
use super::ring::Header;

/// The first references are for the console, the store and the like, which are not passed on.
const RESERVED: u32 = 8;

/// The likeliest kind, and why.
pub(crate) fn guess(bytes: &[u8], shape: Option<RingShape>) -> (Kind, String) {
    if bytes.iter().all(|byte| *byte == 0) {
        return (Kind::V1, "all zero: an empty table of any version".to_owned());
    }
    if shape.is_some_and(|shape| is_ring(bytes, shape)) {
        return (
            Kind::Ring,
            "it begins with ring indexes that fit each other".to_owned(),
        );
    }
    if is_status(bytes) {
        return (Kind::Status, "there is nothing in it but marks of use".to_owned());
    }
    let v1 = Score::of(
        bytes
            .as_chunks::<ENTRY_V1_SIZE>()
            .0
            .iter()
            .map(|bytes| entry::v1(GrantRef(u32::MAX), EntryV1::from_bytes(*bytes), None)),
    );
    let v2 = Score::of(
        bytes
            .as_chunks::<ENTRY_V2_SIZE>()
            .0
            .iter()
            .map(|bytes| entry::v2(GrantRef(u32::MAX), EntryV2::from_bytes(*bytes), None, None)),
    );
    let (kind, best, other, number) = if v2.points() > v1.points() {
        (Kind::V2, v2, v1, 1)
    } else {
        (Kind::V1, v1, v2, 2)
    };
    let why = format!(
        "{} make sense and {} do not; as version {number}, {} and {}",
        best.sound, best.odd, other.sound, other.odd
    );
    (kind, why)
}

#[derive(Clone, Copy)]
struct Score {
    /// Entries that grant something a guest would grant.
    sound: u32,
    /// Entries that no guest would write.
    odd: u32,
}

impl Score {
    fn of(entries: impl Iterator<Item = Decoded>) -> Score {
        let mut score = Score { sound: 0, odd: 0 };
        for entry in entries {
            // What a mapping cannot use is rare, but it is what somebody meant.
            let is_harmed = entry
                .findings
                .iter()
                .any(|finding| !matches!(finding.code, "copy-only" | "no-mapping"));
            // Legal, and what comes of entries that are read at half their size.
            let waits_far_off = entry.frame.is_some_and(|frame| frame >= FRAME_LIMIT);
            let passes_a_reserved_one_on = entry.trans_gref.is_some_and(|gref| gref < RESERVED);
            let is_odd = is_harmed || waits_far_off || passes_a_reserved_one_on;
            match entry.state {
                State::Free => {}
                // Flags of an ended grant are zero.
                State::LeftOver if entry.flag_bits == 0 => {}
                _ if is_odd => score.odd += 1,
                _ => score.sound += 1,
            }
        }
        score
    }

    fn points(self) -> i64 {
        i64::from(self.sound) - 2 * i64::from(self.odd)
    }
}

/// Nothing but what the hypervisor writes into status words.
fn is_status(bytes: &[u8]) -> bool {
    let words = bytes.as_chunks::<STATUS_WORD_SIZE>().0;
    words
        .iter()
        .all(|word| (EntryFlags::from_bits_retain(u16::from_le_bytes(*word)) - EntryFlags::IN_USE).is_empty())
}

/// Indexes that a running ring can have, and the zero padding behind them.
fn is_ring(bytes: &[u8], shape: RingShape) -> bool {
    let Some((header, padding)) = Header::read(bytes) else {
        return false;
    };
    let slots = shape.slots();
    let near = |event: u32| event.wrapping_sub(header.rsp_prod.wrapping_sub(slots)) <= 2 * slots + 1;
    padding.iter().all(|byte| *byte == 0)
        && header.outstanding() <= slots
        && (header.req_event, header.rsp_event) != (0, 0)
        && near(header.req_event)
        && near(header.rsp_event)
}

#[cfg(test)]
mod tests {
    use gnttab_abi::{DomId, EntryBodyV2, EntryHead};
    use proptest::prelude::*;

    use super::*;

    fn guessed(bytes: &[u8]) -> Kind {
        guess(bytes, RingShape::new(1, 112).ok()).0
    }

    fn head(flags: u16, domid: u16) -> EntryHead {
        EntryHead {
            flags: EntryFlags::from_bits_retain(flags),
            domid: DomId(domid),
        }
    }

    /// What a guest has in its table: where, the flags (0 is an ended grant), to whom, which frame.
    fn table() -> impl Strategy<Value = Vec<(usize, u16, u16, u32)>> {
        let flags = prop::sample::select(vec![0, 1, 1, 5, 5]);
        let entry = (0..256_usize, flags, 0..100_u16, 1..0x200_0000_u32);
        prop::collection::vec(entry, 1..200).prop_filter("something is granted", |entries| {
            entries.iter().any(|entry| entry.1 != 0)
        })
    }

    proptest! {
        #[test]
        fn the_version_of_a_table_is_found(entries in table(), marks in any::<bool>()) {
            let (mut v1, mut v2) = (vec![0; 4096], vec![0; 4096]);
            for (at, flags, domid, frame) in entries {
                let in_use = if marks && flags & 3 == 1 { 0x8 } else { 0 };
                let entry = EntryV1 { head: head(flags | in_use, domid), frame };
                v1[at * 8..][..8].copy_from_slice(&entry.to_bytes());
                let entry = EntryV2::new(head(flags, domid), EntryBodyV2::FullPage { frame: frame.into() });
                v2[at * 16..][..16].copy_from_slice(&entry.to_bytes());
            }
            // A later entry may have ended the only grant of an earlier one.
            prop_assume!(v1.as_chunks::<8>().0.iter().any(|entry| entry[0] & 3 == 1));
            prop_assert_eq!(guessed(&v1), Kind::V1);
            prop_assert_eq!(guessed(&v2), Kind::V2);
        }

        #[test]
        fn any_bytes_are_guessed(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            let _ = guess(&bytes, RingShape::new(1, 112).ok());
        }
    }

    #[test]
    fn a_table_of_version_1_is_found_though_half_of_it_is_damaged() {
        let mut table = vec![0; 4096];
        for (at, (flags, domid, frame)) in [
            (0x19, 2, 0x1004),
            (0x05, 3, 0x1005),
            (0x02, 4, 0),
            (0x1001, 2, 0x1006),
            (0x03, 2, 0x1007),
        ]
        .into_iter()
        .enumerate()
        {
            let entry = EntryV1 {
                head: head(flags, domid),
                frame,
            };
            table[(8 + at) * 8..][..8].copy_from_slice(&entry.to_bytes());
        }
        assert_eq!(guessed(&table), Kind::V1);
    }

    #[test]
    fn status_words_and_rings_are_found() {
        let mut status = vec![0; 4096];
        (status[18], status[40]) = (0x18, 0x08);
        assert_eq!(guessed(&status), Kind::Status);
        let mut ring = vec![0; 4096];
        for (at, index) in [(0, 0x1_0005_u32), (4, 0x1_0006), (8, 0x1_0003), (12, 0x1_0004)] {
            ring[at..at + 4].copy_from_slice(&index.to_le_bytes());
        }
        ring[64 + 3 * 112] = 1;
        assert_eq!(guessed(&ring), Kind::Ring);
        assert_eq!(guessed(&[0; 4096]), Kind::V1);
    }
}
