//! Counts that a program chooses, and entries that are not its to have (L-01, L-09, L-16; XSA-369).

use std::collections::BTreeSet;

use gnttab_guest::{Access, AllocError, Config, Version, Window, WindowError};

use crate::{BOTH, Bench, ME, PEER};

/// Counts at every edge, of references, of runs and of pages: refused before anything is taken or reserved, and by no sum
/// that wrapped.
#[test]
fn l_01_counts_of_any_size_take_nothing() {
    for version in BOTH {
        let bench = Bench::of(version);
        let before = bench.table.stats();
        let edges = [
            1 << 20,
            1 << 31,
            (1 << 31) + 1,
            u32::MAX - 8,
            u32::MAX - 1,
            u32::MAX,
        ];
        for count in edges {
            let refused =
                |error: AllocError| matches!(error, AllocError::NoSpace { .. } | AllocError::NoMemory);
            assert!(bench.table.alloc(count).is_err_and(refused), "{count}");
            assert!(bench.table.alloc_run(count).is_err_and(refused), "{count}");
            assert_eq!(bench.table.stats(), before, "{count}");
        }
        assert_eq!(bench.table.alloc(0).unwrap().len(), 0);
        assert_eq!(bench.table.alloc_run(0).unwrap().first(), None);
        assert_eq!(bench.table.stats(), before);
    }
}

/// Windows of any place and size: a product or a sum that does not fit is an error and not another window.
#[test]
fn l_09_a_window_is_what_was_asked_for_or_an_error() {
    let starts = [
        0,
        4096,
        1 << 63,
        u64::MAX - 0xfff,
        u64::MAX - 0x1fff,
        !0xfff << 20,
    ];
    for start in starts {
        for pages in [0, 1, 2, 1 << 20, 1 << 31, u32::MAX] {
            let end = u128::from(start) + u128::from(pages) * 4096;
            match Window::new(start, pages) {
                Ok(window) => {
                    let addresses = window.addresses();
                    assert_eq!(u128::from(addresses.end), end);
                    assert_eq!(addresses.start, start);
                }
                Err(error) => {
                    assert_eq!(error, WindowError::TooLong { start, pages });
                    assert!(end > u128::from(u64::MAX));
                }
            }
        }
    }
    for crooked in [1, 4095, u64::MAX] {
        assert_eq!(Window::new(crooked, 1), Err(WindowError::Unaligned(crooked)));
    }
}

/// The entries that others fill in are never handed out, in whatever way references are had, and whatever was freed before.
#[test]
fn l_16_reserved_entries_are_nobodys() {
    for version in BOTH {
        let bench = Bench::of(version);
        for _ in 0..3 {
            let mut seen = BTreeSet::new();
            let run = bench.table.alloc_run(100).unwrap();
            let mut batch = bench.table.alloc(100).unwrap();
            let run: Vec<_> = run.collect();
            let batch: Vec<_> = std::iter::from_fn(|| batch.claim()).collect();
            let rest: Vec<_> = std::iter::from_fn(|| bench.table.alloc_one().ok()).collect();
            for gref in run.iter().chain(&batch).chain(&rest) {
                assert!(gref.gref().0 >= 8, "{} is reserved", gref.gref());
                assert!(seen.insert(gref.gref()), "{} was handed out twice", gref.gref());
            }
            assert_eq!(seen.len(), bench.table.stats().refs as usize - 8);
        }
        for gref in 0..8 {
            assert_eq!(
                bench
                    .me
                    .table
                    .words(gnttab_abi::GrantRef(gref))
                    .head
                    .load(std::sync::atomic::Ordering::SeqCst),
                0
            );
        }
    }
}

/// A frame that an entry cannot name, or a peer that is none: nothing is written, and page and reference come back.
#[test]
fn l_01_a_frame_that_does_not_fit_is_not_cut() {
    let bench = Bench::of(Version::V1);
    for frame in [1 << 32, (1 << 32) + 7, u64::MAX >> 12] {
        let gref = bench.table.alloc_one().unwrap();
        let number = gref.gref();
        let error = bench
            .table
            .grant(gref, PEER, bench.me.page_at(frame), Access::ReadOnly)
            .unwrap_err();
        let (gref, page) = error.given;
        assert_eq!((gref.gref(), page.frame), (number, frame));
        assert!(bench.me.table.begin(PEER, number, false, false).is_err());
    }
    let bench = Bench::new(Config {
        version: Version::V2,
        ..Config::default()
    });
    for nobody in [
        gnttab_abi::DomId::SELF,
        gnttab_abi::DomId::INVALID,
        gnttab_abi::DomId(0x7ff1),
    ] {
        let gref = bench.table.alloc_one().unwrap();
        let number = gref.gref();
        bench
            .table
            .grant(gref, nobody, bench.me.page(), Access::ReadOnly)
            .unwrap_err();
        assert!(bench.me.table.begin(nobody, number, false, false).is_err());
        assert!(bench.me.table.begin(ME, number, false, false).is_err());
    }
}
