//! The crate against a small hypervisor that marks entries as the spec says, lets a hostile peer
//! step in between, and fails where it is told to. Each test names the rule that it protects.

#![expect(
    clippy::cast_possible_truncation,
    clippy::tests_outside_test_module,
    reason = "small numbers that the tests choose themselves; this crate is nothing but tests"
)]

mod ending;
mod fake;
mod granting;
mod mapping;
mod table;

use std::sync::Arc;

use fake::{Domain, Machine};
use gnttab_abi::DomId;
use gnttab_guest::{Config, GrantTable, Version};

/// The granter under test, and its peer.
const ME: DomId = DomId(1);
const PEER: DomId = DomId(2);

/// A machine with both domains, and the granter's table.
struct Bench {
    me: Arc<Domain>,
    peer: Arc<Domain>,
    table: GrantTable<Domain>,
}

impl Bench {
    fn new(version: Version) -> Bench {
        Bench::with(Config {
            version,
            ..Config::default()
        })
    }

    fn with(config: Config) -> Bench {
        let machine = Machine::new();
        let (me, peer) = (machine.domain(ME), machine.domain(PEER));
        let table = GrantTable::start(Arc::clone(&me), config).unwrap();
        assert_eq!(table.version(), config.version);
        Bench { me, peer, table }
    }
}

const BOTH: [Version; 2] = [Version::V1, Version::V2];
