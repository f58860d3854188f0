//! Domains that are in trouble, or make it, for people and tests to look at: `gnttab demo --trouble`.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use gnttab_abi::{DomId, GrantRef};
use gnttab_guest::{Access, AllocError, Config, Grant, GrantTable, MapRequest, Mapper};
use gnttab_host::launch::Start;
use gnttab_host::runtime::Domain;
use gnttab_io::xenbus::{Store as _, Tx};
use gnttab_xenstore::client::Client;
use serde::{Deserialize, Serialize};

use super::{Joined, RoleError, shutdown_node};
use crate::bell::Bell;
use crate::store::StoreClient;

/// The first reference that a driver hands out: the eight below are reserved.
const FIRST: GrantRef = GrantRef(8);
/// How long the lender is content.
const CONTENT: Duration = Duration::from_secs(1);
/// References that the lender's network driver may have.
const QUOTA: u32 = 8;

/// What a domain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Orders {
    /// Maps the first page that this domain grants, and keeps it.
    Keeper(u16),
    /// Grants this domain a page, and wants it back; has a driver that has used its quota up.
    Lender(u16),
    /// Grants this domain pages until its table is full.
    Hoarder(u16),
    /// Asks for references of this domain that do not exist, as fast as it is answered.
    Knocker(u16),
}

/// Does it until asked to end.
pub(super) fn run(start: Start) -> Result<(), RoleError> {
    let orders: Orders = serde_json::from_str(start.arguments.first().ok_or("no orders")?)?;
    let domain = Domain::join(start.channel)?;
    let connection = domain.take_store().ok_or("no connection to the store")?;
    let mut joined = Joined {
        domain,
        store: StoreClient::new(Client::new(connection)),
        descriptors: start.descriptors,
        bell: Bell::new()?,
        reporter: None,
    };
    joined.store.watch(&shutdown_node(joined.domain.id().0))?;
    match orders {
        Orders::Keeper(lender) => keep(&mut joined, DomId(lender)),
        Orders::Lender(keeper) => lend(&mut joined, DomId(keeper)),
        Orders::Hoarder(to) => hoard(&mut joined, DomId(to)),
        Orders::Knocker(at) => knock(&mut joined, DomId(at)),
    }
}

fn is_asked_to_end(joined: &mut Joined) -> Result<bool, RoleError> {
    let node = shutdown_node(joined.domain.id().0);
    let value = joined.store.read(Tx::NONE, &node)?;
    Ok(value.is_some_and(|value| !value.is_empty()))
}

fn until_asked_to_end(joined: &mut Joined) -> Result<(), RoleError> {
    while !is_asked_to_end(joined)? {
        joined.wait()?;
    }
    Ok(())
}

fn keep(joined: &mut Joined, lender: DomId) -> Result<(), RoleError> {
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let request = MapRequest {
        dom: lender,
        gref: FIRST,
        access: Access::ReadWrite,
    };
    let kept = loop {
        match mapper.map_one(request) {
            Ok(mapping) => break mapping,
            Err(_) if is_asked_to_end(joined)? => return Ok(()),
            // It has not granted it yet.
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    };
    until_asked_to_end(joined)?;
    drop(kept);
    Ok(())
}

fn table(joined: &mut Joined) -> Result<GrantTable<Domain>, RoleError> {
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    joined.reporter = Some(Domain::keep_reporting(&table)?);
    Ok(table)
}

fn lend(joined: &mut Joined, keeper: DomId) -> Result<(), RoleError> {
    let table = table(joined)?;
    let page = joined.domain.grantable(1)?.page(0).ok_or("no page")?;
    let disk = table.consumer("vbd0", 64)?;
    let grant = disk.grant_zeroed(disk.alloc_one()?, keeper, page, Access::ReadWrite)?;
    let network = table.consumer("vif0", QUOTA)?;
    let _all = network.alloc(QUOTA)?;
    if network.alloc_one().is_ok() {
        return Err("a consumer had more than its quota".into());
    }
    thread::sleep(CONTENT);
    // Left to the queue, which the reporter tries again and again.
    drop(grant);
    until_asked_to_end(joined)
}

fn hoard(joined: &mut Joined, to: DomId) -> Result<(), RoleError> {
    let table = table(joined)?;
    let mut hoard: Vec<Grant<Domain>> = Vec::new();
    let pages = joined.domain.grantable(1)?;
    loop {
        match table.alloc_one() {
            // All of them the same page: it is the references that run out.
            Ok(gref) => {
                let page = pages.page(0).ok_or("no page")?;
                hoard.push(table.grant(gref, to, page, Access::ReadOnly)?);
            }
            Err(AllocError::NoSpace { .. }) => break,
            Err(error) => return Err(error.into()),
        }
    }
    until_asked_to_end(joined)
}

fn knock(joined: &mut Joined, at: DomId) -> Result<(), RoleError> {
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let doors = (0x3_0000..).map(|gref| MapRequest {
        dom: at,
        gref: GrantRef(gref),
        access: Access::ReadOnly,
    });
    for (number, door) in doors.enumerate() {
        if mapper.map_one(door).is_ok() {
            return Err("a reference past the table was mapped".into());
        }
        // A flood, but one that leaves this machine to others.
        thread::sleep(Duration::from_micros(500));
        if number % 64 == 0 && is_asked_to_end(joined)? {
            return Ok(());
        }
    }
    Ok(())
}
