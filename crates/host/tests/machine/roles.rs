//! What the domains of these tests run.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use gnttab_abi::{DomId, GrantRef};
use gnttab_guest::{Access, Config, GrantTable, MapRequest, Mapper};
use gnttab_host::launch::{Role, Start};
use gnttab_host::runtime::{Domain, Port};
use gnttab_host::sys::Poller;
use gnttab_xenstore::client::{Client, Nodes};

pub(crate) const ROLES: &[(&str, Role)] = &[
    ("granter", |start| end(granter(start))),
    ("grantee", |start| end(grantee(start))),
];

type Outcome = Result<(), Box<dyn Error>>;

fn end(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("a domain of a test failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A domain that has joined, with its store and the number of its peer, which is its first argument.
struct Joined {
    domain: Arc<Domain>,
    store: Client,
    peer: DomId,
}

fn join(start: Start) -> Result<Joined, Box<dyn Error>> {
    let domain = Domain::join(start.channel)?;
    let store = Client::new(domain.take_store().ok_or("no store")?);
    let peer = DomId(start.arguments.first().ok_or("no peer")?.parse()?);
    Ok(Joined { domain, store, peer })
}

impl Joined {
    /// Says something to the peer, which reads it with `hear`.
    fn say(&mut self, what: &str, value: u32) -> Outcome {
        let path = format!("/local/domain/{}/{what}", self.domain.id().0);
        self.store.write(&path, value.to_string())?;
        let perms = gnttab_xenstore::perms::Perms::new(
            self.domain.id().0.into(),
            gnttab_xenstore::perms::Access::None,
        );
        let perms = perms.with(self.peer.0.into(), gnttab_xenstore::perms::Access::Read);
        Ok(self.store.set_perms(&path, &perms)?)
    }

    fn hear(&mut self, what: &str) -> Result<u32, Box<dyn Error>> {
        let path = format!("/local/domain/{}/{what}", self.peer.0);
        for _ in 0..2000 {
            if let Ok(number) = self.store.read_number(&path) {
                return Ok(number);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(format!("the peer did not say its {what}").into())
    }
}

/// Waits for an event; false if the peer has gone.
fn wait(port: &Port) -> Result<bool, Box<dyn Error>> {
    let poller = Poller::new()?;
    poller.add(port, 0)?;
    if poller.wait(Some(Duration::from_secs(20)))?.is_empty() {
        return Err("no event came".into());
    }
    Ok(port.take().is_ok())
}

fn granter(start: Start) -> Outcome {
    let mut joined = join(start)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let page = joined.domain.grantable(1)?.page(0).ok_or("no page")?;
    let grant = table.grant_zeroed(table.alloc_one()?, joined.peer, page, Access::ReadWrite)?;
    grant.page().write(0, b"hello")?;
    let port = joined.domain.new_port(joined.peer)?;
    joined.say("gref", grant.gref().0)?;
    joined.say("port", port.number())?;
    // The peer has written, and has ended after unmapping.
    assert!(wait(&port)?);
    let mut seen = [0; 5];
    grant.page().read(0, &mut seen)?;
    while wait(&port)? {}
    let (_, page) = grant.end().map_err(|_| "the peer still has the page")?;
    page.write(0, b"private")?;
    println!("saw {}, got the page back", String::from_utf8_lossy(&seen));
    Ok(())
}

fn grantee(start: Start) -> Outcome {
    let mut joined = join(start)?;
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let (gref, port) = (GrantRef(joined.hear("gref")?), joined.hear("port")?);
    let port = joined.domain.bind_port(joined.peer, port)?;
    let request = MapRequest {
        dom: joined.peer,
        gref,
        access: Access::ReadWrite,
    };
    let mapping = mapper.map_one(request)?;
    let at = usize::try_from(mapping.host_addr())?;
    let mut seen = [0; 5];
    joined.domain.memory().read(at, &mut seen)?;
    joined.domain.memory().write(at, b"world")?;
    mapping.unmap()?;
    port.send();
    println!("saw {}, wrote world", String::from_utf8_lossy(&seen));
    Ok(())
}
