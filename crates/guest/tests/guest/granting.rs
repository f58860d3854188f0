//! What entries say, and what is refused (GST-4, GST-6).

use gnttab_abi::{DomId, EntryFlags, EntryType, GrantRef};
use gnttab_guest::{Access, Config, GrantRefused, GrantTable, OfferEnd, Part, Version};

use crate::fake::{self, OLD_CONTENT};
use crate::{BOTH, Bench, ME, PEER};

#[test]
fn a_grant_says_domain_frame_and_access() {
    for version in BOTH {
        let bench = Bench::new(version);
        for (access, flags) in [(Access::ReadOnly, 0x5), (Access::ReadWrite, 0x1)] {
            let page = bench.me.page();
            let frame = page.frame;
            let grant = bench
                .table
                .grant(bench.table.alloc_one().unwrap(), PEER, page, access)
                .unwrap();
            let words = bench.me.table.words(grant.gref());
            assert_eq!(
                (words.flags().bits(), words.load().domid),
                (flags, PEER),
                "{version:?}"
            );
            assert_eq!(words.frame, frame);
            assert_eq!((grant.peer(), grant.page().frame), (PEER, frame));
            let gref = grant.gref();
            grant.end().unwrap();
            assert_eq!(fake::kind(&bench.me.table, gref), EntryType::Invalid);
        }
    }
}

#[test]
fn gst_6_a_zeroed_grant_shows_nothing_old() {
    let bench = Bench::new(Version::V1);
    let page = bench.me.page();
    let frame = page.frame;
    assert_eq!(bench.me.table.ram.content(frame), OLD_CONTENT);
    let gref = bench.table.alloc_one().unwrap();
    let _grant = bench
        .table
        .grant_zeroed(gref, PEER, page, Access::ReadWrite)
        .unwrap();
    assert_eq!(bench.me.table.ram.content(frame), 0);
}

#[test]
fn version_2_names_frames_beyond_32_bits_and_version_1_refuses_them() {
    let wide = 0x1_2345_6789;
    let bench = Bench::new(Version::V2);
    let gref = bench.table.alloc_one().unwrap();
    let grant = bench
        .table
        .grant(gref, PEER, bench.me.page_at(wide), Access::ReadOnly)
        .unwrap();
    assert_eq!(bench.me.table.words(grant.gref()).frame, wide);

    let bench = Bench::new(Version::V1);
    let gref = bench.table.alloc_one().unwrap();
    let number = gref.gref();
    let error = bench
        .table
        .grant(gref, PEER, bench.me.page_at(wide), Access::ReadOnly)
        .unwrap_err();
    assert!(matches!(error.reason, GrantRefused::FrameTooWide(_)), "{error}");
    assert_eq!(error.given.1.frame, wide, "the page comes back");
    assert_eq!(
        bench.me.table.words(number).load().word(),
        0,
        "nothing was written"
    );
}

#[test]
fn what_cannot_be_granted_gives_everything_back() {
    let bench = Bench::new(Version::V1);
    let one = || bench.table.alloc_one().unwrap();
    let page = || bench.me.page();
    for peer in [DomId::SELF, DomId::INVALID, DomId(0xffff)] {
        let reason = bench
            .table
            .grant(one(), peer, page(), Access::ReadOnly)
            .unwrap_err()
            .reason;
        assert_eq!(reason, GrantRefused::BadDomain(peer));
    }
    let part = Part { offset: 0, len: 16 };
    let reason = bench
        .table
        .grant_part(one(), PEER, page(), Access::ReadOnly, part)
        .unwrap_err()
        .reason;
    assert_eq!(reason, GrantRefused::NeedsV2);
    let far = (ME, GrantRef(9));
    let reason = bench
        .table
        .grant_transitive(one(), PEER, far, Access::ReadOnly)
        .unwrap_err()
        .reason;
    assert_eq!(reason, GrantRefused::NeedsV2);

    let other = GrantTable::start(bench.me.clone(), Config::default()).unwrap();
    let foreign = other.alloc_one().unwrap();
    let number = foreign.gref();
    let reason = bench
        .table
        .grant(foreign, PEER, page(), Access::ReadOnly)
        .unwrap_err()
        .reason;
    assert_eq!(reason, GrantRefused::ForeignRef(number));

    let stats = bench.table.stats();
    assert_eq!(stats.free, stats.refs - 8, "all references came back");
}

#[test]
fn a_sub_page_grant_says_its_part_and_is_for_copy_only() {
    let bench = Bench::new(Version::V2);
    let one = || bench.table.alloc_one().unwrap();
    for part in [
        Part { offset: 0, len: 0 },
        Part { offset: 4095, len: 2 },
        Part {
            offset: 0xffff,
            len: 0xffff,
        },
        Part { offset: 4096, len: 1 },
    ] {
        let error = bench
            .table
            .grant_part(one(), PEER, bench.me.page(), Access::ReadOnly, part)
            .unwrap_err();
        assert_eq!(
            error.reason,
            GrantRefused::BadPart {
                offset: part.offset,
                len: part.len
            }
        );
    }
    let part = Part {
        offset: 1000,
        len: 3096,
    };
    let grant = bench
        .table
        .grant_part(one(), PEER, bench.me.page(), Access::ReadWrite, part)
        .unwrap();
    let (gref, table) = (grant.gref(), &bench.me.table);
    assert_eq!(
        table.words(gref).flags(),
        EntryFlags::PERMIT_ACCESS | EntryFlags::SUB_PAGE
    );
    assert_eq!(table.words(gref).halves, (1000, 3096));
    assert!(table.begin(PEER, gref, false, false).is_err());
    table.begin(PEER, gref, false, true).unwrap();
    let grant = grant.try_end().unwrap_err();
    table.end(gref, false);
    grant.end().unwrap();
}

#[test]
fn a_transitive_grant_says_whose_it_is() {
    let bench = Bench::new(Version::V2);
    let gref = bench.table.alloc_one().unwrap();
    let far = (DomId(7), GrantRef(0x679a));
    let grant = bench
        .table
        .grant_transitive(gref, PEER, far, Access::ReadOnly)
        .unwrap();
    let (gref, table) = (grant.gref(), &bench.me.table);
    let words = table.words(gref);
    assert_eq!(words.flags(), EntryFlags::TRANSITIVE | EntryFlags::READONLY);
    assert_eq!((words.halves.0, words.frame), (7, 0x679a));

    // In use: the handle stays, and what is dropped goes to the queue.
    table.begin(PEER, gref, false, true).unwrap();
    let grant = grant.end().unwrap_err();
    drop(grant);
    assert_eq!(bench.table.pending()[0].gref, gref);
    assert_eq!(bench.table.retry_pending(8).still, 1);
    table.end(gref, false);
    assert_eq!(bench.table.retry_pending(8).ended, 1);
    assert_eq!(bench.table.alloc_one().unwrap().gref(), gref);
}

#[test]
fn readonly_and_back() {
    for version in BOTH {
        let bench = Bench::new(version);
        let gref = bench.table.alloc_one().unwrap();
        let grant = bench
            .table
            .grant(gref, PEER, bench.me.page(), Access::ReadWrite)
            .unwrap();
        let (gref, table) = (grant.gref(), &bench.me.table);

        table.begin(PEER, gref, true, false).unwrap();
        let error = grant.make_readonly().unwrap_err();
        assert_eq!((error.gref, error.peer), (gref, PEER));
        table.end(gref, true);

        // A reader is no hindrance, and is still in when the right to write has gone.
        table.begin(PEER, gref, false, false).unwrap();
        grant.make_readonly().unwrap();
        assert!(table.words(gref).flags().contains(EntryFlags::READONLY));
        assert!(table.begin(PEER, gref, true, false).is_err(), "{version:?}");
        grant.make_writable();
        table.begin(PEER, gref, true, false).unwrap();
        table.end(gref, true);
        table.end(gref, false);
        grant.end().unwrap();
    }
}

#[test]
fn an_offer_is_withdrawn_or_received() {
    for version in BOTH {
        let bench = Bench::new(version);
        let (me, table) = (&bench.me.table, &bench.table);
        let offer = |slot| {
            table
                .offer(table.alloc_one().unwrap(), PEER, gnttab_abi::Gfn(slot))
                .unwrap()
        };

        let withdrawn = offer(0x55);
        assert_eq!(me.words(withdrawn.gref()).flags(), EntryFlags::ACCEPT_TRANSFER);
        assert_eq!(me.words(withdrawn.gref()).frame, 0x55);
        let gref = withdrawn.gref();
        assert!(matches!(withdrawn.end(), Ok(OfferEnd::Withdrawn(_))));
        assert!(
            !me.commit(PEER, gref),
            "{version:?}: a withdrawn offer is not taken up"
        );

        let taken = offer(0);
        let gref = taken.gref();
        assert!(!me.commit(ME, gref), "only the peer may");
        assert!(me.commit(PEER, gref));
        let committed = me.words(gref).load();
        let taken = taken.end().unwrap_err();
        assert_eq!(
            me.words(gref).load(),
            committed,
            "a committed entry is not touched"
        );
        me.complete(gref, 0x9876);
        let Ok(OfferEnd::Received { frame, .. }) = taken.end() else {
            panic!("the page is there")
        };
        assert_eq!(frame.0, 0x9876);
        assert_eq!(fake::kind(me, gref), EntryType::Invalid);
    }
}

#[test]
fn gst_2_an_abandoned_offer_keeps_its_reference_until_the_page_is_there() {
    let bench = Bench::new(Version::V1);
    let (me, table) = (&bench.me.table, &bench.table);
    let offer = table
        .offer(table.alloc_one().unwrap(), PEER, gnttab_abi::Gfn(0))
        .unwrap();
    let gref = offer.gref();
    assert!(me.commit(PEER, gref));
    drop(offer);
    assert_ne!(table.alloc_one().unwrap().gref(), gref);
    assert_eq!(table.retry_pending(8).still, 1);
    me.complete(gref, 5);
    assert_eq!(table.retry_pending(8).ended, 1);
    assert_eq!(table.stats().lost_frames, 1);
    assert_eq!(table.alloc_one().unwrap().gref(), gref);
}
