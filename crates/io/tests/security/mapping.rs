//! Catalogue 11.4: mapping and copying fail, as a peer likes.

use gnttab_abi::{Abi, GrantStatus};
use gnttab_io::blkif::{BackendQueue, ConnectError, Disk as _, Failure};
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
