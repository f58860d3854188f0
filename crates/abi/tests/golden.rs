//! The bytes of every structure in every ABI, written out, for machines without Xen's headers.
//!
//! Each field holds its own pattern, so that a field out of place, too wide or turned round shows.
//! `--` is padding, which encoding must leave alone.

use gnttab_abi::*;

/// What padding holds before and after.
const PADDING: u8 = 0xcc;

/// The bytes that a line of hexadecimal digits stands for, blanks being for the eye.
fn bytes(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    assert!(digits.len().is_multiple_of(2), "half a byte in {text}");
    (0..digits.len())
        .step_by(2)
        .map(|at| match &digits[at..at + 2] {
            "--" => PADDING,
            byte => u8::from_str_radix(byte, 16).expect("hexadecimal digits"),
        })
        .collect()
}

/// Encodes and decodes a value and compares it with the bytes of the wide layout (x86_64 and Arm)
/// and of the narrow one (x86_32).
macro_rules! golden {
    ($type:ident $fields:tt, $wide:literal, $narrow:literal) => {{
        let value = $type $fields;
        for (abi, text) in [(Abi::X86_64, $wide), (Abi::Arm, $wide), (Abi::X86_32, $narrow)] {
            let golden = bytes(text);
            assert_eq!($type::size(abi), golden.len(), "size in {abi:?}");
            let mut encoded = vec![PADDING; golden.len()];
            value.encode(abi, &mut encoded).expect("it fits");
            assert_eq!(encoded, golden, "bytes in {abi:?}");
            assert_eq!($type::decode(abi, &golden), Ok(value), "value in {abi:?}");
        }
    }};
}

const STATUS: GrantStatus = GrantStatus(-3); // fdff

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_grant_ref() {
        golden!(
            MapGrantRef {
                host_addr: 0x0807_0605_0403_0201,
                flags: MapFlags::from_bits_retain(0x1413_1211),
                gref: GrantRef(0x2423_2221),
                dom: DomId(0x3231),
                status: STATUS,
                handle: GrantHandle(0x4443_4241),
                dev_bus_addr: 0x5857_5655_5453_5251,
            },
            "0102030405060708 11121314 21222324 3132 fdff 41424344 5152535455565758",
            "0102030405060708 11121314 21222324 3132 fdff 41424344 5152535455565758"
        );
    }

    #[test]
    fn unmap_grant_ref() {
        golden!(
            UnmapGrantRef {
                host_addr: 0x0807_0605_0403_0201,
                dev_bus_addr: 0x1817_1615_1413_1211,
                handle: GrantHandle(0x2423_2221),
                status: STATUS,
            },
            "0102030405060708 1112131415161718 21222324 fdff ----",
            "0102030405060708 1112131415161718 21222324 fdff ----"
        );
    }

    #[test]
    fn setup_table() {
        golden!(
            SetupTable {
                dom: DomId(0x0201),
                nr_frames: 0x1413_1211,
                status: STATUS,
                frame_list: 0x2423_2221,
            },
            "0102 ---- 11121314 fdff ------------ 2122232400000000",
            "0102 ---- 11121314 fdff ---- 21222324"
        );
    }

    #[test]
    fn dump_table() {
        golden!(
            DumpTable {
                dom: DomId(0x0201),
                status: STATUS,
            },
            "0102 fdff",
            "0102 fdff"
        );
    }

    #[test]
    fn transfer() {
        golden!(
            Transfer {
                mfn: 0x0403_0201,
                domid: DomId(0x1211),
                gref: GrantRef(0x2423_2221),
                status: STATUS,
            },
            "0102030400000000 1112 ---- 21222324 fdff ------------",
            "01020304 1112 ---- 21222324 fdff ----"
        );
    }

    #[test]
    fn copy() {
        golden!(
            Copy {
                source: CopyPtr {
                    u: 0x0403_0201,
                    domid: DomId(0x1211),
                    offset: 0x2221,
                },
                dest: CopyPtr {
                    u: 0x3433_3231,
                    domid: DomId(0x4241),
                    offset: 0x5251,
                },
                len: 0x6261,
                flags: CopyFlags::from_bits_retain(0x7271),
                status: STATUS,
            },
            "0102030400000000 1112 2122 -------- 3132333400000000 4142 5152 -------- 6162 7172 fdff ----",
            "01020304 1112 2122 31323334 4142 5152 6162 7172 fdff ----"
        );
    }

    #[test]
    fn query_size() {
        golden!(
            QuerySize {
                dom: DomId(0x0201),
                nr_frames: 0x1413_1211,
                max_nr_frames: 0x2423_2221,
                status: STATUS,
            },
            "0102 ---- 11121314 21222324 fdff ----",
            "0102 ---- 11121314 21222324 fdff ----"
        );
    }

    #[test]
    fn unmap_and_replace() {
        golden!(
            UnmapAndReplace {
                host_addr: 0x0807_0605_0403_0201,
                new_addr: 0x1817_1615_1413_1211,
                handle: GrantHandle(0x2423_2221),
                status: STATUS,
            },
            "0102030405060708 1112131415161718 21222324 fdff ----",
            "0102030405060708 1112131415161718 21222324 fdff ----"
        );
    }

    #[test]
    fn set_version() {
        golden!(SetVersion { version: 0x0403_0201 }, "01020304", "01020304");
    }

    #[test]
    fn get_status_frames() {
        golden!(
            GetStatusFrames {
                nr_frames: 0x0403_0201,
                dom: DomId(0x1211),
                status: STATUS,
                frame_list: 0x2423_2221,
            },
            "01020304 1112 fdff 2122232400000000",
            "01020304 1112 fdff 21222324"
        );
    }

    #[test]
    fn get_version() {
        golden!(
            GetVersion {
                dom: DomId(0x0201),
                pad: 0x1211,
                version: 0x2423_2221,
            },
            "0102 1112 21222324",
            "0102 1112 21222324"
        );
    }

    #[test]
    fn swap_grant_ref() {
        golden!(
            SwapGrantRef {
                ref_a: GrantRef(0x0403_0201),
                ref_b: GrantRef(0x1413_1211),
                status: STATUS,
            },
            "01020304 11121314 fdff ----",
            "01020304 11121314 fdff ----"
        );
    }

    #[test]
    fn cache_flush() {
        golden!(
            CacheFlush {
                dev_bus_addr: 0x0807_0605_0403_0201,
                offset: 0x1211,
                length: 0x2221,
                op: CacheOp::from_bits_retain(0x3433_3231),
            },
            "0102030405060708 1112 2122 31323334",
            "0102030405060708 1112 2122 31323334"
        );
    }

    #[test]
    fn add_to_physmap() {
        golden!(
            AddToPhysmap {
                domid: DomId(0x0201),
                size: 0x1211,
                space: 0x2423_2221,
                idx: 0x3433_3231,
                gpfn: 0x4443_4241,
            },
            "0102 1112 21222324 3132333400000000 4142434400000000",
            "0102 1112 21222324 31323334 41424344"
        );
    }

    #[test]
    fn add_to_physmap_batch() {
        golden!(
            AddToPhysmapBatch {
                domid: DomId(0x0201),
                space: 0x1211,
                size: 0x2221,
                foreign_domid: DomId(0x3231),
                idxs: 0x4443_4241,
                gpfns: 0x5453_5251,
                errs: 0x6463_6261,
            },
            "0102 1112 2122 3132 4142434400000000 5152535400000000 6162636400000000",
            "0102 1112 2122 3132 41424344 51525354 61626364"
        );
    }

    #[test]
    fn acquire_resource() {
        golden!(
            AcquireResource {
                domid: DomId(0x0201),
                kind: 0x1211,
                id: 0x2423_2221,
                nr_frames: 0x3433_3231,
                pad: 0x4443_4241,
                frame: 0x5857_5655_5453_5251,
                frame_list: 0x6463_6261,
            },
            "0102 1112 21222324 31323334 41424344 5152535455565758 6162636400000000",
            "0102 1112 21222324 31323334 41424344 5152535455565758 61626364"
        );
    }

    /// A word of the wide layout has all its eight bytes.
    #[test]
    fn wide_words_keep_their_upper_half() {
        let list = SetupTable {
            frame_list: 0x0807_0605_0403_0201,
            ..SetupTable::default()
        };
        let mut encoded = [0; 24];
        list.encode(Abi::Arm, &mut encoded).expect("it fits");
        assert_eq!(encoded[16..], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(SetupTable::decode(Abi::X86_64, &encoded), Ok(list));
    }

    const HEAD: EntryHead = EntryHead {
        flags: EntryFlags::from_bits_retain(0x0201),
        domid: DomId(0x1211),
    };

    #[test]
    fn entry_version_1() {
        let entry = EntryV1 {
            head: HEAD,
            frame: 0x2423_2221,
        };
        let golden = bytes("0102 1112 21222324");
        assert_eq!(entry.to_bytes()[..], golden);
        assert_eq!(golden.try_into().map(EntryV1::from_bytes), Ok(entry));
    }

    #[test]
    fn entry_version_2() {
        let entry = EntryV2 {
            head: HEAD,
            half: 0x2221,
            length: 0x3231,
            frame: 0x4847_4645_4443_4241,
        };
        let golden = bytes("0102 1112 2122 3132 4142434445464748");
        assert_eq!(entry.to_bytes()[..], golden);
        assert_eq!(golden.try_into().map(EntryV2::from_bytes), Ok(entry));
    }

    #[test]
    fn entry_version_2_by_its_type() {
        let of_type = |flags| EntryHead {
            flags: EntryFlags::from_bits_retain(flags),
            domid: DomId(0x1211),
        };
        let frame = 0x4847_4645_4443_4241;
        let sub_page = EntryBodyV2::SubPage {
            page_off: 0x2221,
            length: 0x3231,
            frame,
        };
        let transitive = EntryBodyV2::Transitive {
            trans_domid: DomId(0x2221),
            gref: GrantRef(0x4443_4241),
        };
        for (head, body, golden) in [
            (
                of_type(0x0001),
                EntryBodyV2::FullPage { frame },
                "0100 1112 00000000 4142434445464748",
            ),
            (
                of_type(0x0002),
                EntryBodyV2::FullPage { frame },
                "0200 1112 00000000 4142434445464748",
            ),
            (of_type(0x0101), sub_page, "0101 1112 2122 3132 4142434445464748"),
            (
                of_type(0x0003),
                transitive,
                "0300 1112 2122 0000 4142434400000000",
            ),
            // The sub-page flag means nothing to a transitive grant.
            (
                of_type(0x0103),
                transitive,
                "0301 1112 2122 0000 4142434400000000",
            ),
        ] {
            let entry = EntryV2::new(head, body);
            assert_eq!(entry.to_bytes()[..], bytes(golden), "{entry}");
            assert_eq!(entry.body(), body, "{entry}");
        }
    }

    #[test]
    fn the_head_is_the_first_word_of_both_versions() {
        assert_eq!(HEAD.word(), 0x1211_0201);
        assert_eq!(EntryHead::from_word(0x1211_0201), HEAD);
    }

    #[test]
    fn what_fits_into_a_page() {
        assert_eq!((ENTRY_V1_SIZE, V1_ENTRIES_PER_PAGE), (8, 512));
        assert_eq!((ENTRY_V2_SIZE, V2_ENTRIES_PER_PAGE), (16, 256));
        assert_eq!((STATUS_WORD_SIZE, STATUS_PER_PAGE), (2, 2048));
        assert_eq!([0, 1, 8, 9, 64].map(status_pages_for), [0, 1, 1, 2, 8]);
    }

    /// Spec 3.1.4 steps 4 to 6.
    #[test]
    fn what_fits_into_a_32_bit_callers_area() {
        assert_eq!(COMPAT_TRANSFER_CHUNK, 341);
        assert_eq!(COMPAT_COPY_CHUNK, 204);
        assert_eq!(COMPAT_SETUP_TABLE_FRAMES, 1021);
        assert_eq!(COMPAT_STATUS_FRAMES, 1022);
    }

    /// Spec 1.3, both columns, in order.
    #[test]
    fn statuses() {
        let table = [
            ("okay", "okay"),
            ("general_error", "undefined error"),
            ("bad_domain", "unrecognised domain id"),
            ("bad_gntref", "invalid grant reference"),
            ("bad_handle", "invalid mapping handle"),
            ("bad_virt_addr", "invalid virtual address"),
            ("bad_dev_addr", "invalid device address"),
            ("no_device_space", "no spare translation slot in the I/O MMU"),
            ("permission_denied", "permission denied"),
            ("bad_page", "bad page"),
            ("bad_copy_arg", "copy arguments cross page boundary"),
            ("address_too_big", "page address size too large"),
            ("eagain", "operation not done; try again"),
            ("no_space", "out of space"),
        ];
        assert_eq!(GrantStatus::ALL.len(), table.len());
        for ((status, (name, message)), number) in GrantStatus::ALL.iter().zip(table).zip((-13..=0).rev()) {
            assert_eq!(status.0, number);
            assert_eq!(status.name(), Some(name));
            assert_eq!(status.message(), Some(message));
        }
        for unknown in [1, -14, i16::MIN] {
            assert_eq!(GrantStatus(unknown).name(), None);
            assert_eq!(GrantStatus(unknown).message(), None);
            assert_eq!(GrantStatus(unknown).result(), Err(GrantStatus(unknown)));
        }
    }

    /// Spec 0.3 and 1.2.
    #[test]
    fn errnos_and_operations_go_by_their_numbers() {
        for errno in Errno::ALL {
            assert_eq!(Errno::from_number(errno.number()), Some(*errno));
            assert_eq!(errno.hypercall_result(), -i64::from(errno.number()));
        }
        let numbers: Vec<_> = Errno::ALL.iter().map(|errno| errno.number()).collect();
        assert_eq!(
            numbers,
            [
                1, 3, 5, 6, 7, 11, 12, 13, 14, 16, 18, 22, 33, 34, 38, 61, 75, 84, 95
            ]
        );
        assert_eq!((Errno::from_number(0), Errno::from_number(85)), (None, None));
        for (op, number) in Op::ALL.into_iter().zip(0..) {
            assert_eq!(op.number(), number);
            assert_eq!(Op::from_number(number), Some(op));
        }
        assert_eq!((Op::from_number(13), Op::from_number(u32::MAX)), (None, None));
    }

    /// Spec 1.1, 1.2, 1.5.4 and 6.
    #[test]
    fn numbers() {
        let ids = [
            DomId::SELF,
            DomId::IO,
            DomId::XEN,
            DomId::COW,
            DomId::INVALID,
            DomId::ANY,
        ];
        assert_eq!(
            ids.map(|id| id.0),
            [0x7ff0, 0x7ff1, 0x7ff2, 0x7ff3, 0x7ff4, 0x7ff5]
        );
        assert_eq!((DomId::FIRST_RESERVED.0, DomId::IDLE.0), (0x7ff0, 0x7fff));
        assert_eq!((GRANT_TABLE_OP, MEMORY_OP), (20, 12));
        let reserved = [NR_RESERVED_ENTRIES, RESERVED_CONSOLE.0, RESERVED_XENSTORE.0];
        assert_eq!(reserved, [8, 0, 1]);
        let memory_ops = [
            MEMOP_ADD_TO_PHYSMAP,
            MEMOP_ADD_TO_PHYSMAP_BATCH,
            MEMOP_ACQUIRE_RESOURCE,
        ];
        assert_eq!(memory_ops, [7, 23, 28]);
        assert_eq!(
            (PHYSMAP_SPACE_GRANT_TABLE, ADD_TO_PHYSMAP_STATUS_BIT),
            (1, 0x8000_0000)
        );
        assert_eq!(RESOURCE_GRANT_TABLE, 1);
        assert_eq!((RESOURCE_GRANT_TABLE_SHARED, RESOURCE_GRANT_TABLE_STATUS), (0, 1));
    }

    #[test]
    fn flags_are_shown_by_name_and_the_rest_in_hexadecimal() {
        for (bits, text) in [
            (0x0000, "invalid"),
            (0x0018, "invalid|reading|writing"),
            (0x000d, "permit_access|readonly|reading"),
            (0x01e1, "permit_access|PWT|PCD|PAT|sub_page"),
            (0xfe01, "permit_access|0xfe00"),
            (0x0006, "accept_transfer|transfer_committed"),
            (0x0003, "transitive"),
        ] {
            assert_eq!(EntryFlags::from_bits_retain(bits).to_string(), text);
        }
        for (bits, text) in [
            (0, "0"),
            (0x20, "0x20"),
            (0x1f, "device_map|host_map|readonly|application_map|contains_pte"),
            (0x8000_0002, "host_map|0x80000000"),
        ] {
            assert_eq!(MapFlags::from_bits_retain(bits).to_string(), text);
        }
        assert_eq!(
            CacheOp::from_bits_retain(0x8000_0007).to_string(),
            "clean|inval|source_gref|0x4"
        );
        assert_eq!(CopyFlags::all().to_string(), "source_gref|dest_gref|0xfffc");
    }
}
