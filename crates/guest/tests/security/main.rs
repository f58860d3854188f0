//! The security catalogue against the guest's driver: for each advisory that concerns it, and for the fixes in guests that
//! never got a number, a test that fails on code with that hole. `docs/advisories.md` says what went wrong elsewhere, and
//! which of these tests (or of those beside this folder) shows that it cannot here.

#![expect(clippy::tests_outside_test_module, reason = "this whole crate is tests")]

mod ending;
#[path = "../guest/fake.rs"]
#[expect(dead_code, reason = "made for the other tests of this crate too")]
mod fake;
mod foreign;
mod table;

use std::sync::Arc;

use fake::{Domain, Machine, OwnPage};
use gnttab_abi::{DomId, GrantRef};
use gnttab_guest::{Access, Config, Grant, GrantTable, MapRequest, Mapper, Version, Window};

/// The granter under test, and its peer.
const ME: DomId = DomId(1);
const PEER: DomId = DomId(2);
const BOTH: [Version; 2] = [Version::V1, Version::V2];

/// A machine with both domains, and the granter's table.
struct Bench {
    me: Arc<Domain>,
    peer: Arc<Domain>,
    table: GrantTable<Domain>,
}

impl Bench {
    fn new(config: Config) -> Bench {
        let machine = Machine::new();
        let (me, peer) = (machine.domain(ME), machine.domain(PEER));
        let table = GrantTable::start(Arc::clone(&me), config).unwrap();
        Bench { me, peer, table }
    }

    fn of(version: Version) -> Bench {
        Bench::new(Config {
            version,
            ..Config::default()
        })
    }

    fn grant(&self, page: OwnPage) -> Grant<Domain> {
        let gref = self.table.alloc_one().unwrap();
        self.table.grant(gref, PEER, page, Access::ReadWrite).unwrap()
    }

    /// Grants of so many pages, and the peer's mapper with a window of so many.
    fn pages(&self, pages: usize, window: u32) -> (Vec<Grant<Domain>>, Mapper<Domain>) {
        let grants = (0..pages).map(|_| self.grant(self.me.page())).collect();
        let window = Window::new(0x1_0000_0000, window).unwrap();
        (grants, Mapper::new(Arc::clone(&self.peer), window).unwrap())
    }
}

fn request(gref: GrantRef) -> MapRequest {
    MapRequest {
        dom: ME,
        gref,
        access: Access::ReadWrite,
    }
}
