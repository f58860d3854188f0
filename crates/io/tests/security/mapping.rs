//! Catalogue 11.4: mapping and copying fail, as a peer likes.

use gnttab_abi::{Abi, GrantRef, GrantStatus};
use gnttab_io::blkif::{BackendConfig, BackendQueue, ConnectError, Disk as _, Failure, OneShot, RawSegment};
use gnttab_io::fake::{FakeDomain, FaultPoint, HostileFrontend, RamDisk};

use crate::rig::{Served, direct, indirect, part, ways};

/// Every status that the interface knows, and two that it does not.
fn failures() -> impl Iterator<Item = GrantStatus> {
    let unknown = [GrantStatus(-100), GrantStatus(7)];
    GrantStatus::ALL
        .iter()
        .copied()
        .chain(unknown)
        .filter(|status| !status.is_okay())
}

/// T-71, T-365: every subset of a request's pages fails to map and the others do not, in one batch or two, before and behind
/// the first that fails: an error, nothing lost track of, and the next request goes well.
#[test]
fn xsa_71_every_subset_of_pages_that_fail_to_map() {
    for way in ways(Abi::X86_64) {
        for persistent_limit in [0, 2, 100] {
            for set in 1u32..64 {
                let config = BackendConfig {
                    persistent_limit,
                    ..way
                };
                let mut served = Served::new(config);
                let grefs: Vec<GrantRef> = (0..6).map(|_| served.page().0).collect();
                let parts: Vec<RawSegment> = grefs.iter().map(|gref| part(*gref, 0, 7)).collect();
                let failing: Vec<GrantRef> = (0..6)
                    .filter(|index| set & (1 << index) != 0)
                    .map(|index| grefs[index])
                    .collect();
                let (first, meant) = (failing[0], failing.clone());
                served.domain.on_fault(move |point| match point {
                    FaultPoint::Map(gref) if meant.contains(&gref) => {
                        let status = if gref == first { -30 } else { -31 };
                        Some(GrantStatus(status))
                    }
                    _ => None,
                });
                let slot = direct(config.abi, 1, 0, &parts);
                let answered = served.ask(&slot).status;
                let maps = config.one_shot == OneShot::Map;
                // What is copied is not mapped, and does not fail here.
                if maps {
                    assert_eq!(answered, -1, "{set:#b} {config:?}");
                }
                if maps && persistent_limit != 2 {
                    // One batch: the first in it.
                    let said = Failure::Grant(GrantStatus(-30));
                    assert_eq!(served.queue.last_failure(), Some(said), "{set:#b} {config:?}");
                }
                let kept = served.queue.persistent_mappings();
                assert_eq!(served.domain.mappings(), 1 + kept, "{set:#b} {config:?}");
                served.domain.on_fault(|_| None);
                assert_eq!(served.ask(&slot).status, 0);
                let domain = served.domain.clone();
                drop(served);
                assert_eq!(domain.mappings(), 0, "XSA-371");
            }
        }
    }
}

/// Each call that a peer can make fail, with each status: an answer to the request, and nothing left.
#[test]
fn xsa_362_every_status_becomes_an_answer() {
    for status in failures() {
        for way in ways(Abi::X86_64) {
            let mut served = Served::new(way);
            let (gref, _page) = served.page();
            let segments = [part(gref, 0, 7), part(gref, 1, 1)];
            let requests = [
                direct(way.abi, 0, 0, &segments),
                direct(way.abi, 1, 0, &segments),
                indirect(&served, 0, 0, &segments),
                indirect(&served, 1, 0, &segments),
            ];
            served.domain.on_fault(move |point| match point {
                FaultPoint::MapRun => None,
                _ => Some(status),
            });
            for slot in &requests {
                assert_eq!(served.ask(slot).status, -1, "{status:?} {way:?}");
                assert_eq!(served.queue.last_failure(), Some(Failure::Grant(status)));
                assert_eq!(served.domain.mappings(), 1);
            }
            served.domain.on_fault(|_| None);
            for slot in &requests {
                assert_eq!(served.ask(slot).status, 0);
            }
            let domain = served.domain.clone();
            drop(served);
            assert_eq!(domain.mappings(), 0);
        }
        let domain = FakeDomain::new();
        let liar = HostileFrontend::new(&domain, Abi::X86_64, 1).unwrap();
        let disk = RamDisk::new(8);
        domain.on_fault(move |_| Some(status));
        let [config, ..] = ways(Abi::X86_64);
        let connected = BackendQueue::connect(domain.grantee(), liar.ring(), config, disk.info());
        assert!(matches!(connected, Err(ConnectError::Map(said)) if said == status));
        assert_eq!(domain.mappings(), 0);
    }
}
