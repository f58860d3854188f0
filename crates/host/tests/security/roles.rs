//! What the domains of these tests run.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use gnttab_abi::{Copy, CopyPtr, DomId, GrantRef, PAGE_SIZE};
use gnttab_guest::{Access, Call, Config, GrantTable, Hypercall, MapRequest, Mapper};
use gnttab_host::area::{AREA_PAGES, BUFFER_SIZE};
use gnttab_host::launch::{Role, Start};
use gnttab_host::protocol;
use gnttab_host::runtime::io::Front;
use gnttab_host::runtime::{Domain, Hosting};
use gnttab_io::grants::{self, Granter};
use gnttab_xenstore::client::{Client, Nodes};
use gnttab_xenstore::perms::{self, Perms};

pub(crate) const ROLES: &[(&str, Role)] = &[
    ("allocator", |start| end(allocator(start))),
    ("holder", |start| end(holder(start))),
    ("forgetful", |start| end(forgetful(start))),
    ("long", |start| end(long(start))),
    ("sharer", |start| end(sharer(start))),
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

const KEPT: u32 = 16;

/// Grants sixteen of its pages, which the peer keeps; then all of its memory is wanted.
fn allocator(start: Start) -> Outcome {
    let mut joined = join(start)?;
    let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
    let mut front = Front::new(table.clone(), joined.peer);
    let mut runs = Vec::new();
    for number in 0..KEPT {
        let run = front.alloc(1)?;
        let gref = front.grant(&run, 0, grants::Access::ReadWrite)?;
        joined.say(&format!("gref{number}"), gref.0)?;
        runs.push((run, gref));
    }
    joined.say("ready", 1)?;
    joined.hear("holds")?;
    for (run, gref) in runs {
        assert!(!front.end(gref), "the peer has the page");
        front.retire(run, vec![gref]);
    }
    // What is left can be had, and not a page more.
    let rest = joined.domain.hello().ram_pages - KEPT;
    let others: Vec<_> = std::iter::from_fn(|| front.alloc(1).ok()).collect();
    assert_eq!(others.len(), usize::try_from(rest)?);
    assert_eq!(table.stats().pending, usize::try_from(KEPT)?);
    joined.say("retired", 1)?;
    joined.hear("gone")?;
    for _ in 0..KEPT {
        front.alloc(1).map(std::mem::forget)?;
    }
    assert_eq!(table.stats().pending, 0);
    println!("{KEPT} pages were kept, and came back");
    Ok(())
}

/// Maps the peer's pages, and lets go of them when the peer has given up.
fn holder(start: Start) -> Outcome {
    let mut joined = join(start)?;
    let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
    joined.hear("ready")?;
    let mut held = Vec::new();
    for number in 0..KEPT {
        let gref = GrantRef(joined.hear(&format!("gref{number}"))?);
        let access = Access::ReadWrite;
        let dom = joined.peer;
        held.push(mapper.map_one(MapRequest { dom, gref, access })?);
    }
    joined.say("holds", 1)?;
    joined.hear("retired")?;
    mapper.unmap(held)?;
    joined.say("gone", 1)?;
    // Until the peer has read it.
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// Writes all over its memory, gives it back, and looks at what it gets.
fn forgetful(start: Start) -> Outcome {
    let joined = join(start)?;
    let domain = &joined.domain;
    let shareable = 16;
    for _ in 0..3 {
        let runs = [
            domain.grantable(shareable)?,
            domain.private(domain.hello().ram_pages - shareable)?,
        ];
        for run in &runs {
            for page in (0..run.pages()).filter_map(|page| run.page(page)) {
                let mut content = [1; PAGE_SIZE];
                page.read(0, &mut content)?;
                assert_eq!(content, [0; PAGE_SIZE]);
                page.write(0, &[0xA5; PAGE_SIZE])?;
            }
        }
    }
    println!("zeros");
    Ok(())
}

/// Calls with lengths, counts and addresses of every size.
fn long(start: Start) -> Outcome {
    let joined = join(start)?;
    let domain = &joined.domain;
    let buffer = BUFFER_SIZE as u64;
    let pages = u64::from(domain.hello().ram_pages);
    let call = |number, arguments| domain.call(&protocol_request(number, arguments), &[], &mut []);
    let edges = [1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX];
    for edge in edges {
        // Command, address and count of a grant-table operation; of a memory operation.
        for arguments in [
            [edge, 0, 1, 0],
            [0, edge, 1, 0],
            [0, buffer - 31, 1, 0],
            [0, buffer - 32, 2, 0],
        ] {
            assert!(
                call(protocol::CALL_GRANT_TABLE, arguments).is_err(),
                "{arguments:?}"
            );
        }
        assert!(call(protocol::CALL_MEMORY, [7, edge, 0, 0]).is_err());
        for arguments in [
            [edge, 1, 0, 0],
            [0, edge, 0, 0],
            [pages - 1, 2, 0, 0],
            [0, protocol::MAX_SHARE + 1, 0, 0],
        ] {
            assert!(call(protocol::CALL_SHARE, arguments).is_err(), "{arguments:?}");
        }
        for number in [protocol::CALL_RENEW, protocol::CALL_PORT_CLOSE] {
            assert!(call(number, [edge, 0, 0, 0]).is_err());
        }
        assert!(call(protocol::CALL_PORT_BIND, [edge, edge, 0, 0]).is_err());
        assert!(call(protocol::CALL_PORT_NEW, [edge, 0, 0, 0]).is_err());
    }
    // What does not fit the buffer never leaves this process.
    let too_long = vec![0; BUFFER_SIZE + 1];
    assert!(
        domain
            .call(&protocol_request(99, [0; 4]), &too_long, &mut [])
            .is_err()
    );
    assert!(
        domain
            .call(&protocol_request(99, [0; 4]), &[], &mut too_long.clone())
            .is_err()
    );
    assert_eq!(AREA_PAGES * PAGE_SIZE, BUFFER_SIZE + PAGE_SIZE);
    domain.grantable(1)?;
    println!("all refused, and served on");
    Ok(())
}

fn protocol_request(number: u32, arguments: [u64; 4]) -> gnttab_host::area::Request {
    gnttab_host::area::Request { number, arguments }
}

/// Asks for too many shareable pages, then sees to it that every page of its memory is one page: what it writes is what the
/// hypervisor copies.
fn sharer(start: Start) -> Outcome {
    let joined = join(start)?;
    let domain = &joined.domain;
    for wanted in [16, 11, 12] {
        assert!(domain.grantable(wanted).is_err(), "it may have ten");
        let pages = domain.hello().ram_pages;
        let all = domain.private(pages)?;
        let window = pages - 1;
        for index in 0..window {
            let page = all.page(index).ok_or("no page")?;
            let target = all.page(window).ok_or("no page")?;
            let pattern = [u8::try_from(index)? + 1; 64];
            page.write(100, &pattern)?;
            target.write(0, &[0; 64])?;
            let mut copy = [Copy {
                source: CopyPtr::frame(index.into(), 100),
                dest: CopyPtr::frame(window.into(), 0),
                len: 64,
                ..Copy::default()
            }];
            domain.grant_table_op(Call::Copy(&mut copy))?;
            copy[0].status.result()?;
            let mut copied = [0; 64];
            target.read(0, &mut copied)?;
            assert_eq!(copied, pattern, "page {index}, after {wanted} were wanted");
        }
    }
    // Those ten it still gets.
    domain.grantable(10)?;
    println!("every page is whole");
    Ok(())
}
