//! Encode and decode, for any value and any bytes (rules 1 and 2 at the head of the crate).

use gnttab_abi::*;
use proptest::prelude::*;

/// What an untouched byte holds.
const UNTOUCHED: u8 = 0xcc;

/// Checks one structure with arbitrary bytes, in one ABI.
macro_rules! check {
    ($type:ident, $abi:expr, $bytes:expr) => {{
        let (abi, bytes): (Abi, &[u8]) = ($abi, $bytes);
        let size = $type::size(abi);

        // Any bytes decode if there are enough of them, and only then.
        match $type::decode(abi, bytes) {
            Ok(value) => {
                prop_assert!(bytes.len() >= size);
                let mut again = [UNTOUCHED; 64];
                value
                    .encode(abi, &mut again)
                    .expect("what was decoded fits the ABI");
                for &(_, offset, length) in $type::fields(abi) {
                    let field = offset..offset + length;
                    prop_assert_eq!(&again[field.clone()], &bytes[field.clone()]);
                    again[field].fill(UNTOUCHED);
                }
                prop_assert_eq!(again, [UNTOUCHED; 64], "padding and what follows are left alone");
            }
            Err(error) => prop_assert_eq!(
                error,
                Truncated {
                    needed: size,
                    got: bytes.len()
                }
            ),
        }

        // Any value comes back, or is refused with nothing written. The wide layout holds all.
        let mut wide = [0; 64];
        wide[..bytes.len()].copy_from_slice(bytes);
        let value = $type::decode(Abi::X86_64, &wide).expect("64 bytes are enough");
        let mut encoded = [UNTOUCHED; 64];
        match value.encode(abi, &mut encoded) {
            Ok(()) => prop_assert_eq!($type::decode(abi, &encoded), Ok(value)),
            Err(EncodeError::TooWide { field, value }) => {
                prop_assert!($type::fields(abi).iter().any(|(name, ..)| *name == field));
                prop_assert!(value > u64::from(u32::MAX) && abi == Abi::X86_32);
                prop_assert_eq!(
                    encoded,
                    [UNTOUCHED; 64],
                    "nothing is written when a field does not fit"
                );
            }
            Err(error) => prop_assert!(false, "{error} with 64 bytes at hand"),
        }
        let mut short = vec![UNTOUCHED; size - 1];
        prop_assert!(value.encode(abi, &mut short).is_err());
        prop_assert!(
            short.iter().all(|byte| *byte == UNTOUCHED),
            "nothing is written to a short buffer"
        );
    }};
}

/// Bytes of a guest: any number up to that of the largest structure and more, with the upper halves
/// of words clear now and then, so that narrow layouts get their share.
fn guest_bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => Just(0), 2 => any::<u8>()];
    proptest::collection::vec(byte, 0..=48)
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

        #[test]
        fn arguments_decode_from_anything_and_encode_what_fits(
            bytes in guest_bytes(),
            abi in prop::sample::select(&Abi::ALL[..]),
        ) {
            check!(MapGrantRef, abi, &bytes);
            check!(UnmapGrantRef, abi, &bytes);
            check!(SetupTable, abi, &bytes);
            check!(DumpTable, abi, &bytes);
            check!(Transfer, abi, &bytes);
            check!(Copy, abi, &bytes);
            check!(QuerySize, abi, &bytes);
            check!(UnmapAndReplace, abi, &bytes);
            check!(SetVersion, abi, &bytes);
            check!(GetStatusFrames, abi, &bytes);
            check!(GetVersion, abi, &bytes);
            check!(SwapGrantRef, abi, &bytes);
            check!(CacheFlush, abi, &bytes);
            check!(AddToPhysmap, abi, &bytes);
            check!(AddToPhysmapBatch, abi, &bytes);
            check!(AcquireResource, abi, &bytes);
        }

        #[test]
        fn entries_keep_every_bit(v1: [u8; ENTRY_V1_SIZE], v2: [u8; ENTRY_V2_SIZE]) {
            prop_assert_eq!(EntryV1::from_bytes(v1).to_bytes(), v1);
            let entry = EntryV2::from_bytes(v2);
            prop_assert_eq!(entry.to_bytes(), v2);
            // A body survives being taken out and put back.
            prop_assert_eq!(EntryV2::new(entry.head, entry.body()).body(), entry.body());
        }

        #[test]
        fn everything_can_be_shown(v2: [u8; ENTRY_V2_SIZE], bits: u32) {
            let entry = EntryV2::from_bytes(v2);
            prop_assert_eq!(entry.to_string().lines().count(), 1);
            // No bit goes unmentioned: reading the text gives all of them back.
            let text = MapFlags::from_bits_retain(bits).to_string();
            let read = |part: &str| match part.strip_prefix("0x") {
                Some(digits) => u32::from_str_radix(digits, 16).expect("hexadecimal digits"),
                None => MapFlags::from_name(&part.to_uppercase()).map_or(0, |flag| flag.bits()),
            };
            prop_assert_eq!(text.split('|').map(read).sum::<u32>(), bits);
        }

        #[test]
        fn commands_split_into_operation_and_opaque_bits(bits: u32) {
            let command = Command(bits);
            prop_assert_eq!(command.opaque() % 4096, 0);
            prop_assert_eq!(command.op().map(Op::number), Some(bits & 0xfff).filter(|number| *number < 13));
            prop_assert_eq!(command.opaque() | (bits & 0xfff), bits);
        }
    }
}
