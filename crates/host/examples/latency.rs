//! What a hypercall, a mapping, a copy and an event cost between processes.
//!
//! Run it with `cargo run --release -p gnttab-host --example latency`. It starts a monitor and two domains:
//! one grants pages, the other measures. Printed are, for each item: the least, the median and the 99th
//! percentile of the time that it took, and the processor time that it cost the domain and the monitor, by
//! which one sees what spinning is paid with. "After a rest" is a call that finds the monitor's thread asleep.

use std::error::Error;
use std::io::{BufRead as _, BufReader};
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
    let (said, says) = std::io::pipe()?;
    let meter = Program {
        stdout: Stdio::from(says),
        ..Program::role("meter")
    };
    let meter = monitor.create(DomainSpec::new("meter", meter))?;
    println!(
        "{:<36} {:>9} {:>9} {:>9} {:>11} {:>11}",
        "an item", "least", "median", "99 %", "domain CPU", "monitor CPU"
    );
    // The monitor is this process: what it has used since the line before is what the line cost it.
    let mut before = processor_time();
    for line in BufReader::new(said).lines() {
        let line = line?;
        let now = processor_time();
        if let Some((text, items)) = line.rsplit_once(' ') {
            let each = (now - before).div_f64(items.parse()?);
            println!("{text} {:>11}", format!("{each:.1?}"));
        }
        before = now;
    }
    monitor.wait(meter)?;
    monitor.destroy(granter)?;
    Ok(())
}

/// What this process has used of the processors.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
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
    let buffer = domain.private(PAGES)?;

    let nothing = Request::default();
    let mut empty = || {
        let _ = domain.call(&nothing, &[], &mut []);
        Ok(())
    };
    measure("empty hypercall", 1, BUSY, &mut empty)?;
    measure("empty hypercall, after a rest", 1, RESTED, &mut empty)?;
    let request = |gref| MapRequest {
        dom: GRANTER,
        gref,
        access: Access::ReadWrite,
    };
    measure("map and unmap, batch 1", 1, BUSY, || {
        Ok(mapper.map_one(request(grefs[0]))?.unmap()?)
    })?;
    let batch: Vec<MapRequest> = grefs.iter().map(|&gref| request(gref)).collect();
    let mut map = || {
        let mapped = mapper.map(&batch)?.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(mapper.unmap(mapped)?)
    };
    measure("map and unmap, batch 32", PAGES, BUSY, &mut map)?;
    measure("map and unmap, batch 32, after a rest", PAGES, RESTED, &mut map)?;
    let parts: Vec<CopyPart> = (0..)
        .zip(&grefs)
        .map(|(index, &gref)| CopyPart {
            gref,
            offset: 0,
            len: 4096,
            at: index * 4096,
        })
        .collect();
    measure("copy 4 KiB, batch 1", 1, BUSY, || {
        Ok(back.copy(CopyDirection::FromPeer, &parts[..1], &buffer)?)
    })?;
    measure("copy 4 KiB, batch 32", PAGES, BUSY, || {
        Ok(back.copy(CopyDirection::FromPeer, &parts, &buffer)?)
    })?;
    let poller = Poller::new()?;
    poller.add(&port, 0)?;
    measure("event to the other domain and back", 1, BUSY, || {
        round_trip(&port, &poller)
    })?;
    Ok(())
}

/// How often, and the rest before each. A thread that waits for a call spins for far less than this.
type Pace = (usize, Duration);
const BUSY: Pace = (2000, Duration::ZERO);
const RESTED: Pace = (200, Duration::from_millis(2));

fn round_trip(port: &Port, poller: &Poller) -> Outcome {
    port.send();
    loop {
        poller.wait(None)?;
        if port.take()? {
            return Ok(());
        }
    }
}

/// Says what one item of `act` takes: for people, and at the end of the line how many were done, for the monitor.
fn measure(what: &str, items: u32, (rounds, rest): Pace, mut act: impl FnMut() -> Outcome) -> Outcome {
    let mut times = Vec::with_capacity(rounds);
    let used = processor_time();
    for _ in 0..rounds {
        std::thread::sleep(rest);
        let start = Instant::now();
        act()?;
        times.push(start.elapsed() / items);
    }
    let done = u32::try_from(rounds)? * items;
    let used = (processor_time() - used) / done;
    times.sort_unstable();
    let text = |time: Duration| format!("{time:.1?}");
    println!(
        "{what:<36} {:>9} {:>9} {:>9} {:>11} {done}",
        text(times[0]),
        text(times[rounds / 2]),
        text(times[rounds * 99 / 100]),
        text(used),
    );
    Ok(())
}
