//! What the domains of these tests run.

use std::collections::VecDeque;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gnttab_abi::{DomId, GrantRef};
use gnttab_guest::{Access, Config, GrantTable, MapRequest, Mapper, Part, Version};
use gnttab_host::area::AREA_PAGES;
use gnttab_host::hostile;
use gnttab_host::launch::{Role, Start};
use gnttab_host::protocol::{ABI, Join};
use gnttab_host::runtime::io::{Back, Front};
use gnttab_host::runtime::{Domain, Port};
use gnttab_host::sys::{self, Poller, Window};
use gnttab_io::blkif::{
    BackendConfig, BackendQueue, DeviceProperties, DiskInfo, FrontendConfig, FrontendQueue, Io,
};
use gnttab_io::fake::RamDisk;
use gnttab_io::grants::{CopyDirection, CopyPart, Grantee};
use gnttab_xenstore::client::{Client, Nodes};
use gnttab_xenstore::perms::{self, Perms};
use rustix::process::Pid;
use rustix::thread::futex;

pub(crate) const ROLES: &[(&str, Role)] = &[
    ("granter", |start| end(granter(start))),
    ("slow granter", |start| {
        let outcome = granter(start);
        std::thread::sleep(Duration::from_millis(300));
        end(outcome)
    }),
    ("grantee", |start| end(grantee(start))),
    ("hostile", |start| end(hostile(start))),
    ("victim", |start| end(victim(start))),
    ("keeper", |start| end(keeper(start))),
    ("copier", |start| end(copier(start))),
    ("block front", |start| end(block_front(start))),
    ("block back", |start| end(block_back(start))),
    ("busy granter", |start| end(busy_granter(start))),
    ("busy grantee", |start| end(busy_grantee(start))),
    ("many threads", |start| end(many_threads(start))),
    ("sleep", |start| end(sleep(start))),
    ("silent", |start| end(silent(start))),
    ("garbage", |start| end(garbage(start))),
    ("glutton", |start| end(glutton(start))),
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

/// What this executable does when it is not a role but the program itself.
pub(crate) fn executed(start: Start) -> ExitCode {
    end(grantee(start))
}

/// What it does as a plain process that joins.
pub(crate) fn joining(path: &Path) -> ExitCode {
    let join = Join {
        name: "visitor".into(),
        ..Join::default()
    };
    let outcome = Domain::join_at(path, &join)
        .map_err(Box::from)
        .and_then(|domain| {
            let store = Client::new(domain.take_store().ok_or("no store")?);
            map_and_answer(Joined {
                domain,
                store,
                peer: DomId(1),
            })
        });
    end(outcome)
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
        let perms = Perms::new(self.domain.id().0.into(), perms::Access::None);
        let perms = perms.with(self.peer.0.into(), perms::Access::Read);
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

/// Pages taken together, each for itself: neighbours, each of which goes back by itself.
fn pages_for_themselves(domain: &Arc<Domain>) -> Outcome {
    let mut singles = domain.grantable_singly(3)?;
    let gfns: Vec<u64> = singles.iter().map(|run| run.gfn().0).collect();
    let [first, second, _] = gfns[..] else {
        return Err("not three".into());
    };
    if gfns != [first, first + 1, first + 2] || singles.iter().any(|run| run.pages() != 1) {
        return Err(format!("no neighbours: {gfns:?}").into());
    }
    drop(singles.remove(1));
    let again = domain.grantable(1)?.gfn().0;
    drop(singles);
    let all = domain.grantable(3)?.gfn().0;
    if (again, all) != (second, first) {
        return Err(format!("{gfns:?} went back, but then came {again} and {all}").into());
    }
    Ok(())
}

fn granter(start: Start) -> Outcome {
    let mut joined = join(start)?;
    pages_for_themselves(&joined.domain)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let page = joined.domain.grantable(1)?.page(0).ok_or("no page")?;
    let grant = table.grant_zeroed(table.alloc_one()?, joined.peer, page, Access::ReadWrite)?;
    grant.page().write(0, b"hello")?;
    let port = joined.domain.new_port(joined.peer)?;
    joined.say("gref", grant.gref().0)?;
    joined.say("port", port.number())?;
    // The peer has written, or has died of something else.
    wait(&port)?;
    let mut seen = [0; 5];
    grant.page().read(0, &mut seen)?;
    while wait(&port)? {}
    let (_, page) = grant.end().map_err(|_| "the peer still has the page")?;
    page.write(0, b"private")?;
    println!("saw {}, got the page back", String::from_utf8_lossy(&seen));
    Ok(())
}

fn grantee(start: Start) -> Outcome {
    map_and_answer(join(start)?)
}

fn map_and_answer(mut joined: Joined) -> Outcome {
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
    // So that an observer can see this domain.
    std::thread::sleep(Duration::from_millis(50));
    port.send();
    println!("saw {}, wrote world", String::from_utf8_lossy(&seen));
    Ok(())
}

const SECRET: &[u8] = b"the secret of a later time";

/// Grants a page for reading to a hostile peer, and writes a secret into it when access has ended.
fn victim(start: Start) -> Outcome {
    let mut joined = join(start)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let page = joined.domain.grantable(1)?.page(0).ok_or("no page")?;
    let port = joined.domain.new_port(joined.peer)?;
    let grant = table.grant_zeroed(table.alloc_one()?, joined.peer, page, Access::ReadOnly)?;
    grant.page().write(0, b"public")?;
    joined.say("gref", grant.gref().0)?;
    joined.say("port", port.number())?;
    // The peer says that it has let go.
    assert!(wait(&port)?);
    let gref = grant.gref().0;
    let (_, page) = grant
        .end()
        .map_err(|_| format!("reference {gref} is still in use"))?;
    let mut content = [0; 6];
    page.read(0, &mut content)?;
    assert_eq!(&content, b"public", "the content moves along");
    page.write(0, SECRET)?;
    port.send();
    // Until the peer has looked.
    while wait(&port)? {}
    println!("kept the secret");
    Ok(())
}

/// Attacks everybody: arguments are the victim, its process, and the monitor's.
fn hostile(start: Start) -> Outcome {
    let pid = |index: usize| Pid::from_raw(start.arguments.get(index)?.parse().ok()?);
    let (victim, monitor) = (pid(1).ok_or("no victim")?, pid(2).ok_or("no monitor")?);
    let mut joined = join(start)?;
    let peer = joined.peer;
    let gref = GrantRef(joined.hear("gref")?);
    let port = joined.hear("port")?;
    let port = joined.domain.bind_port(peer, port)?;
    let mut attempts = hostile::attack_kernel(&[("the monitor", monitor), ("the victim", victim)]);
    attempts.extend(hostile::attack_store(&mut joined.store, &[("the victim", peer)]));
    let (more, kept) = hostile::attack_granted(&joined.domain, peer, gref)?;
    attempts.extend(more);
    port.send();
    assert!(wait(&port)?);
    attempts.push(kept.look_for(SECRET));
    // Now that nothing is granted any more, and nothing kept.
    drop(kept);
    attempts.extend(hostile::attack_grants(&joined.domain, &[("the victim", peer)]));
    println!("{}", serde_json::to_string(&attempts)?);
    Ok(())
}

/// Maps the peer's page and does not let go until it is killed.
fn keeper(start: Start) -> Outcome {
    let mut joined = join(start)?;
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let (gref, port) = (GrantRef(joined.hear("gref")?), joined.hear("port")?);
    let port = joined.domain.bind_port(joined.peer, port)?;
    let request = MapRequest {
        dom: joined.peer,
        gref,
        access: Access::ReadWrite,
    };
    let _mapping = mapper.map_one(request)?;
    port.send();
    loop {
        wait(&port)?;
    }
}

/// Copies through a version 2 table: a part of a page, both ways refused where not granted.
fn copier(start: Start) -> Outcome {
    let granter = start.arguments.get(1).map(String::as_str) == Some("granter");
    let mut joined = join(start)?;
    let peer = joined.peer;
    if granter {
        let config = Config {
            version: Version::V2,
            ..Config::default()
        };
        let table = GrantTable::start(Arc::clone(&joined.domain), config)?;
        assert_eq!(table.version(), Version::V2);
        let page = joined.domain.private(1)?.page(0).ok_or("no page")?;
        page.write(100, b"only this")?;
        let part = Part { offset: 100, len: 9 };
        let grant = table.grant_part(table.alloc_one()?, peer, page, Access::ReadOnly, part)?;
        let port = joined.domain.new_port(peer)?;
        joined.say("gref", grant.gref().0)?;
        joined.say("port", port.number())?;
        while wait(&port)? {}
        grant.end().map_err(|_| "the peer still uses the page")?;
        println!("gave a part");
        return Ok(());
    }
    let (gref, port) = (GrantRef(joined.hear("gref")?), joined.hear("port")?);
    let _port = joined.domain.bind_port(peer, port)?;
    let own = joined.domain.private(1)?;
    let mut back = Back::new(
        Arc::clone(&joined.domain),
        Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?,
        peer,
    );
    let mut copy = |direction, offset, len| {
        back.copy(
            direction,
            &[CopyPart {
                gref,
                offset,
                len,
                at: 7,
            }],
            &own,
        )
    };
    copy(CopyDirection::FromPeer, 100, 9)?;
    assert!(copy(CopyDirection::FromPeer, 99, 9).is_err());
    assert!(copy(CopyDirection::FromPeer, 101, 9).is_err());
    assert!(copy(CopyDirection::ToPeer, 100, 9).is_err());
    let mut seen = [0; 9];
    own.as_ref().read(7, &mut seen);
    println!("saw {}", String::from_utf8_lossy(&seen));
    Ok(())
}

/// A small block device: writes and reads back, through indirect requests too. Arguments: the peer,
/// whether grants are persistent.
fn block_front(start: Start) -> Outcome {
    let persistent = start.arguments.get(1).map(String::as_str) == Some("persistent");
    let mut joined = join(start)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let front = Front::new(table, joined.peer);
    let mut queue = FrontendQueue::new(front, FrontendConfig::new(ABI));
    let port = joined.domain.new_port(joined.peer)?;
    let ring = queue.open(1, port.clone())?;
    joined.say("gref", ring[0].0)?;
    joined.say("port", port.number())?;
    queue.start(DeviceProperties {
        disk: DiskInfo::new(SECTORS),
        barrier: false,
        persistent,
        max_indirect: 256,
    });
    let complete = |queue: &mut FrontendQueue<Front, Port>, io: Io| -> Result<Io, Box<dyn Error>> {
        queue.submit(1, io)?;
        queue.kick();
        loop {
            if let Some(completion) = queue.poll()? {
                completion.result?;
                return Ok(completion.io);
            }
            if !wait(&port)? {
                return Err("the backend has gone".into());
            }
        }
    };
    for (round, sectors) in [1_u64, 8, 64, 256].into_iter().cycle().take(100).enumerate() {
        let bytes = usize::try_from(sectors * 512)?;
        let data: Vec<u8> = (0..bytes)
            .map(|i| u8::try_from((i * 7 + round) % 251).unwrap_or(0))
            .collect();
        let sector = u64::try_from(round)? % (SECTORS - sectors);
        complete(
            &mut queue,
            Io::Write {
                sector,
                data: data.clone().into(),
            },
        )?;
        match complete(
            &mut queue,
            Io::Read {
                sector,
                data: vec![0; bytes].into(),
            },
        )? {
            Io::Read { data: read, .. } if read == data => {}
            _ => return Err(format!("round {round} read something else than it wrote").into()),
        }
    }
    complete(&mut queue, Io::Flush)?;
    queue.close();
    println!("every byte came back");
    Ok(())
}

const SECTORS: u64 = 2048;

fn block_back(start: Start) -> Outcome {
    let persistent = start.arguments.get(1).map(String::as_str) == Some("persistent");
    let mut joined = join(start)?;
    let (gref, port) = (GrantRef(joined.hear("gref")?), joined.hear("port")?);
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let back = Back::new(Arc::clone(&joined.domain), mapper, joined.peer);
    let mut port = joined.domain.bind_port(joined.peer, port)?;
    let disk = RamDisk::new(usize::try_from(SECTORS)?);
    let config = BackendConfig::new(ABI, persistent);
    let mut queue = BackendQueue::connect(back, &[gref], config, DiskInfo::new(SECTORS))?;
    loop {
        while queue.process(&disk, &mut port, 32)?.more {}
        if !wait(&port)? {
            break;
        }
    }
    println!("{} persistent mappings", queue.persistent_mappings());
    Ok(())
}

/// Grants, and ends, as fast as it can, until it is killed.
fn busy_granter(start: Start) -> Outcome {
    let joined = join(start)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let run = joined.domain.grantable(16)?;
    let mut grants = VecDeque::new();
    let _port = joined.domain.new_port(joined.peer)?;
    loop {
        for index in 0..16 {
            let page = run.page(index).ok_or("no page")?;
            let access = if index % 2 == 0 {
                Access::ReadWrite
            } else {
                Access::ReadOnly
            };
            if let Ok(gref) = table.alloc_one() {
                grants.push_back(table.grant(gref, joined.peer, page, access)?);
            }
        }
        while grants.len() > 32 {
            drop(grants.pop_front());
        }
        table.retry_pending(64);
    }
}

/// Maps, copies and unmaps whatever the peer grants, until it is killed.
fn busy_grantee(start: Start) -> Outcome {
    let joined = join(start)?;
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let mut back = Back::new(Arc::clone(&joined.domain), mapper.clone(), joined.peer);
    let own = joined.domain.private(1)?;
    let mut held = VecDeque::new();
    let mut gref = 8;
    loop {
        let access = if gref % 2 == 0 {
            Access::ReadWrite
        } else {
            Access::ReadOnly
        };
        let request = |gref| MapRequest {
            dom: joined.peer,
            gref: GrantRef(gref),
            access,
        };
        let requests: Vec<MapRequest> = (gref..gref + 8).map(request).collect();
        held.extend(mapper.map(&requests)?.into_iter().flatten());
        let part = CopyPart {
            gref: GrantRef(gref),
            offset: 0,
            len: 4096,
            at: 0,
        };
        let _ = back.copy(CopyDirection::FromPeer, &[part], &own);
        while held.len() > 24 {
            drop(held.pop_front());
        }
        gref = if gref > 64 { 8 } else { gref + 4 };
        let _ = joined.domain.bind_port(joined.peer, 1);
    }
}

/// More threads than the domain has vCPUs grant to the domain itself, map, write, look and end.
fn many_threads(start: Start) -> Outcome {
    let joined = join(start)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    let own = joined.domain.id();
    let (joined, table, mapper) = (&joined, &table, &mapper);
    let work = |number: u8| -> Result<(), String> {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        for round in 0..100 {
            let page = joined
                .domain
                .grantable(1)
                .map_err(|e| failed(&e))?
                .page(0)
                .ok_or("no page")?;
            let gref = table.alloc_one().map_err(|e| failed(&e))?;
            let access = if round % 2 == 0 {
                Access::ReadWrite
            } else {
                Access::ReadOnly
            };
            let grant = table
                .grant_zeroed(gref, own, page, access)
                .map_err(|e| failed(&e))?;
            grant.page().write(9, &[number]).map_err(|e| failed(&e))?;
            let request = MapRequest {
                dom: own,
                gref: grant.gref(),
                access,
            };
            let mapping = mapper.map_one(request).map_err(|e| failed(&e))?;
            let at = usize::try_from(mapping.host_addr()).map_err(|e| failed(&e))?;
            let mut seen = [0];
            joined
                .domain
                .memory()
                .read(at + 9, &mut seen)
                .map_err(|e| failed(&e))?;
            if seen != [number] {
                return Err(format!("thread {number} saw what thread {} wrote", seen[0]));
            }
            mapping.unmap().map_err(|e| failed(&e))?;
            grant.end().map_err(|_| "the page is still in use".to_owned())?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=6).map(|number| scope.spawn(move || work(number))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a panic".to_owned())?)
    })?;
    println!("each saw its own");
    Ok(())
}

fn sleep(start: Start) -> Outcome {
    let domain = Domain::join(start.channel)?;
    let poller = Poller::new()?;
    poller.add(domain.hang_up(), 0)?;
    poller.wait(None)?;
    Ok(())
}

/// Closes its channel and lives on.
fn silent(start: Start) -> Outcome {
    let mut bytes = [0; 64];
    start.channel.receive(&mut bytes, true)?;
    start.channel.receive(&mut bytes, true)?;
    drop(start.channel);
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// Writes garbage into its hypercall area instead of calling.
fn garbage(start: Start) -> Outcome {
    let mut bytes = [0; 64];
    start.channel.receive(&mut bytes, true)?;
    let mut message = start.channel.receive(&mut bytes, true)?;
    let area = message.descriptors.pop().ok_or("no hypercall area")?;
    let window = Window::of(&area, AREA_PAGES, sys::Access::Write)?;
    let state = window.atomic_u32(0)?;
    loop {
        state.store(0xdead_beef, Ordering::SeqCst);
        let _ = futex::wake(state, futex::Flags::empty(), 1);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Takes all that it can get of everything.
fn glutton(start: Start) -> Outcome {
    let joined = join(start)?;
    let mut runs = Vec::new();
    while let Ok(run) = joined.domain.grantable(64) {
        runs.push(run);
    }
    let mut ports = Vec::new();
    while let Ok(port) = joined.domain.new_port(joined.peer) {
        ports.push(port);
    }
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let mut refs = Vec::new();
    while let Ok(gref) = table.alloc_one() {
        refs.push(gref);
    }
    println!(
        "{} pages, {} ports, {} references",
        runs.len() * 64,
        ports.len(),
        refs.len()
    );
    Ok(())
}
