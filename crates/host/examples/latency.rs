//! What a hypercall, a mapping, a copy and an event cost between processes.
//!
//! Run it with `cargo run --release -p gnttab-host --example latency`. It starts a monitor and two domains:
//! one grants pages, the other measures and prints the median and the 99th percentile of each.

use std::error::Error;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gnttab_abi::{DomId, GrantRef};
use gnttab_guest::{Access, Config, Grant, GrantTable, MapRequest, Mapper};
use gnttab_host::area::Request;
use gnttab_host::launch::{self, Program, Role, Start};
use gnttab_host::monitor::{DomainSpec, Monitor, Settings};
use gnttab_host::runtime::io::Back;
use gnttab_host::runtime::{Domain, Hosting, Port};
use gnttab_host::sys::Poller;
use gnttab_io::grants::{CopyDirection, CopyPart, Grantee};
use gnttab_xenstore::client::{Client, Nodes};

const ROLES: &[(&str, Role)] = &[
    ("granter", |start| end(granter(start))),
    ("meter", |start| end(meter(start))),
];
/// The two domains' numbers.
const GRANTER: DomId = DomId(1);
const METER: DomId = DomId(2);
/// Pages granted, and the batch that is measured.
const PAGES: u32 = 32;
const ROUNDS: usize = 2000;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    if let Some(code) = launch::domain_main(ROLES) {
        return code;
    }
    end(machine())
}

fn end(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("latency: {error}");
            ExitCode::FAILURE
        }
    }
}

fn machine() -> Outcome {
    let monitor = Monitor::start(Settings::default())?;
    let granter = monitor.create(DomainSpec::new("granter", Program::role("granter")))?;
    let meter = Program {
        stdout: Stdio::inherit(),
        ..Program::role("meter")
    };
    let meter = monitor.create(DomainSpec::new("meter", meter))?;
    monitor.wait(meter)?;
    monitor.destroy(granter)?;
    Ok(())
}

/// Grants pages, says so in the store, and sends every event back.
fn granter(start: Start) -> Outcome {
    let domain = Domain::join(start.channel)?;
    let table = GrantTable::start(Arc::clone(&domain), Config::default())?;
    let run = domain.grantable(PAGES)?;
    let mut grants: Vec<Grant<Domain>> = Vec::new();
    for index in 0..PAGES {
        let page = run.page(index).ok_or("no page")?;
        grants.push(table.grant_zeroed(table.alloc_one()?, METER, page, Access::ReadWrite)?);
    }
    let port = domain.new_port(METER)?;
    let mut store = Client::new(domain.take_store().ok_or("no store")?);
    let said: Vec<String> = grants.iter().map(|grant| grant.gref().0.to_string()).collect();
    let said = format!("{} {}", port.number(), said.join(" "));
    store.write("latency", &said)?;
    let everyone = gnttab_xenstore::perms::Perms::new(GRANTER.0.into(), gnttab_xenstore::perms::Access::Read);
    store.set_perms("latency", &everyone)?;
    let poller = Poller::new()?;
    poller.add(&port, 0)?;
    while poller.wait(None).is_ok() && port.take().is_ok() {
        port.send();
    }
    Ok(())
}

fn meter(start: Start) -> Outcome {
    let domain = Domain::join(start.channel)?;
    let mut store = Client::new(domain.take_store().ok_or("no store")?);
    let deadline = Instant::now() + Duration::from_secs(10);
    let said = store.wait_for(
        &format!("/local/domain/{}/latency", GRANTER.0),
        deadline,
        |value| Some(String::from_utf8_lossy(value?).into_owned()),
    )?;
    let mut numbers = said.split(' ').map(str::parse::<u32>);
    let port = domain.bind_port(GRANTER, numbers.next().ok_or("no port")??)?;
    let grefs: Vec<GrantRef> = numbers.map(|gref| gref.map(GrantRef)).collect::<Result<_, _>>()?;
    let mapper = Mapper::new(Arc::clone(&domain), domain.foreign_window()?)?;
    let mut back = Back::new(Arc::clone(&domain), mapper.clone(), GRANTER);
    let buffer = domain.private(1)?;

    println!("{:<44} {:>10} {:>10}", "", "median", "99 %");
    let nothing = Request::default();
    measure("empty hypercall", || {
        let _ = domain.call(&nothing, &[], &mut []);
        Ok(())
    })?;
    let request = |gref| MapRequest {
        dom: GRANTER,
        gref,
        access: Access::ReadWrite,
    };
    measure("map and unmap one page", || {
        Ok(mapper.map_one(request(grefs[0]))?.unmap()?)
    })?;
    let batch: Vec<MapRequest> = grefs.iter().map(|&gref| request(gref)).collect();
    measure("map and unmap 32 pages in one batch", || {
        let mapped = mapper.map(&batch)?.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(mapper.unmap(mapped)?)
    })?;
    let parts = [CopyPart {
        gref: grefs[0],
        offset: 0,
        len: 4096,
        at: 0,
    }];
    measure("copy 4 KiB through a grant", || {
        Ok(back.copy(CopyDirection::FromPeer, &parts, &buffer)?)
    })?;
    let poller = Poller::new()?;
    poller.add(&port, 0)?;
    measure("event to the other domain and back", || {
        round_trip(&port, &poller)
    })?;
    Ok(())
}

fn round_trip(port: &Port, poller: &Poller) -> Outcome {
    port.send();
    loop {
        poller.wait(None)?;
        if port.take()? {
            return Ok(());
        }
    }
}

fn measure(what: &str, mut act: impl FnMut() -> Outcome) -> Outcome {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        act()?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let (median, late) = (times[ROUNDS / 2], times[ROUNDS * 99 / 100]);
    println!(
        "{what:<44} {:>10} {:>10}",
        format!("{median:.1?}"),
        format!("{late:.1?}")
    );
    Ok(())
}
