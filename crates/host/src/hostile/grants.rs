//! Attempts on other domains by way of the monitor, the store, and pages once granted.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use gnttab_abi::{
    AddToPhysmap, Copy, CopyFlags, CopyPtr, DomId, DumpTable, Errno, GetVersion, Gfn, GrantHandle, GrantRef,
    GrantStatus, MEMOP_ADD_TO_PHYSMAP, MapFlags, MapGrantRef, PAGE_SIZE, PHYSMAP_SPACE_GRANT_TABLE,
    QuerySize, SetupTable, SwapGrantRef, Transfer, UnmapAndReplace, UnmapGrantRef,
};
use gnttab_guest::{Call, Hypercall};
use gnttab_xenstore::client::{Client, Nodes};

use super::{Attempt, Outcome, attack_page, open_descriptors};
use crate::area::{BUFFER_SIZE, Request};
use crate::protocol::{self, ABI, NoticeKind};
use crate::runtime::{Domain, Hosting};
use crate::sys::{Access, Window, attack};

/// References, handles and ports tried of each victim.
const GUESSES: u32 = 4096;

/// Attempts on the pages, tables and event channels of other domains, none of which granted this one
/// anything.
#[must_use]
pub fn attack_grants(domain: &Arc<Domain>, victims: &[(&str, DomId)]) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for &(who, victim) in victims {
        attempts.extend(attack_domain(domain, who, victim));
    }
    attempts.push(forged_handles(domain));
    attempts.extend(nonsense(domain));
    attempts.push(foreign_memory(domain));
    attempts.push(stray_descriptors());
    attempts
}

/// Looks for a descriptor of memory: all that came were to be closed once mapped. A domain that was given
/// files to serve holds those too; the three standard ones are given on purpose, and may be files.
fn stray_descriptors() -> Attempt {
    let memory = |fd: &i32| *fd > 2 && attack::is_file(*fd);
    let outcome = match open_descriptors().into_iter().find(memory) {
        None => Outcome::Refused("none is open".into()),
        Some(fd) => Outcome::Succeeded(format!("descriptor {fd}")),
    };
    Attempt::new("find a descriptor of memory that was left open", outcome)
}

fn attack_domain(domain: &Domain, who: &str, victim: DomId) -> Vec<Attempt> {
    let addr = domain.hello().first_foreign().address();
    let mut attempts = Vec::new();
    let mut tried = |what: &str, outcome| attempts.push(Attempt::new(format!("{what} {who}"), outcome));

    for (what, flags) in [
        ("map every reference, to write, of", MapFlags::HOST_MAP),
        (
            "map every reference, to read, of",
            MapFlags::HOST_MAP | MapFlags::READONLY,
        ),
    ] {
        let mut maps: Vec<_> = (0..GUESSES)
            .map(|gref| MapGrantRef {
                host_addr: addr,
                flags,
                gref: GrantRef(gref),
                dom: victim,
                ..MapGrantRef::default()
            })
            .collect();
        tried(
            what,
            batch(
                domain.grant_table_op(Call::Map(&mut maps)),
                maps.iter().map(|map| map.status),
            ),
        );
    }
    let own = CopyPtr::frame(0, 0);
    for (what, source, dest, flags) in [
        (
            "read through every reference of",
            None,
            Some(own),
            CopyFlags::SOURCE_GREF,
        ),
        (
            "write through every reference of",
            Some(own),
            None,
            CopyFlags::DEST_GREF,
        ),
    ] {
        let mut copies: Vec<_> = (0..GUESSES)
            .map(|gref| {
                let theirs = CopyPtr::grant(victim, GrantRef(gref), 0);
                let (source, dest) = (source.unwrap_or(theirs), dest.unwrap_or(theirs));
                Copy {
                    source,
                    dest,
                    len: 16,
                    flags,
                    ..Copy::default()
                }
            })
            .collect();
        let called = domain.grant_table_op(Call::Copy(&mut copies));
        tried(what, batch(called, copies.iter().map(|copy| copy.status)));
    }
    // Without a grant: the other's frame, by its number.
    let theirs = CopyPtr { domid: victim, ..own };
    let mut copies = [
        Copy {
            source: theirs,
            dest: own,
            len: 16,
            ..Copy::default()
        },
        Copy {
            source: own,
            dest: theirs,
            len: 16,
            ..Copy::default()
        },
    ];
    let called = domain.grant_table_op(Call::Copy(&mut copies));
    tried(
        "copy frames without a grant of",
        batch(called, copies.iter().map(|copy| copy.status)),
    );

    let mut arg = SetupTable {
        dom: victim,
        nr_frames: 1,
        ..SetupTable::default()
    };
    let mut frames = [0];
    let called = domain.grant_table_op(Call::SetupTable {
        arg: &mut arg,
        frames: &mut frames,
    });
    tried("enlarge the grant table of", batch(called, [arg.status]));
    let mut arg = QuerySize {
        dom: victim,
        ..QuerySize::default()
    };
    let called = domain.grant_table_op(Call::QuerySize(&mut arg));
    tried(
        "ask for the size of the grant table of",
        batch(called, [arg.status]),
    );
    let mut arg = GetVersion {
        dom: victim,
        ..GetVersion::default()
    };
    let called = domain.grant_table_op(Call::GetVersion(&mut arg));
    tried(
        "ask for the version of the grant table of",
        batch(called, [GrantStatus::OKAY]),
    );
    let mut arg = [DumpTable {
        dom: victim,
        ..DumpTable::default()
    }];
    let called = domain.grant_table_op(Call::DumpTable(&mut arg));
    tried("print the grant table of", batch(called, [arg[0].status]));
    let mut arg = [Transfer {
        mfn: 0,
        domid: victim,
        gref: GrantRef(9),
        ..Transfer::default()
    }];
    let called = domain.grant_table_op(Call::Transfer(&mut arg));
    tried("give a page to", batch(called, [arg[0].status]));

    tried("place table frames of", answered(place_frame(domain, victim)));
    let ports = (1..64).map(|port| {
        domain.call(
            &request(protocol::CALL_PORT_BIND, [victim.0.into(), port, 0]),
            &[],
            &mut [],
        )
    });
    tried("take event channels of", all(ports));
    attempts
}

fn forged_handles(domain: &Domain) -> Attempt {
    let addr = domain.hello().first_foreign().address();
    let mut unmaps: Vec<_> = (0..GUESSES)
        .chain([u32::MAX - 1, u32::MAX])
        .map(|handle| UnmapGrantRef {
            host_addr: addr,
            handle: GrantHandle(handle),
            ..UnmapGrantRef::default()
        })
        .collect();
    let called = domain.grant_table_op(Call::Unmap(&mut unmaps));
    Attempt::new(
        "undo every mapping by its handle",
        batch(called, unmaps.iter().map(|unmap| unmap.status)),
    )
}

/// Calls that make no sense: out of its own memory, past the buffer, unknown.
fn nonsense(domain: &Domain) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut tried = |what: &str, outcome| attempts.push(Attempt::new(what, outcome));
    let pages = u64::from(domain.hello().ram_pages);
    let mut copies = [pages, pages + 1, 1 << 24, u64::MAX >> 12, u64::MAX].map(|frame| Copy {
        source: CopyPtr::frame(frame, 0),
        dest: CopyPtr::frame(0, 0),
        len: 16,
        ..Copy::default()
    });
    let called = domain.grant_table_op(Call::Copy(&mut copies));
    tried(
        "copy from frames past its own memory",
        batch(called, copies.iter().map(|copy| copy.status)),
    );
    let mut swap = [SwapGrantRef {
        ref_a: GrantRef(u32::MAX),
        ref_b: GrantRef(9),
        ..SwapGrantRef::default()
    }];
    let called = domain.grant_table_op(Call::Swap(&mut swap));
    tried("swap entries past its table", batch(called, [swap[0].status]));
    let mut replace = [UnmapAndReplace {
        host_addr: 4096,
        new_addr: 8192,
        ..UnmapAndReplace::default()
    }];
    let called = domain.grant_table_op(Call::UnmapAndReplace(&mut replace));
    tried(
        "replace a mapping that it has not",
        batch(called, [replace[0].status]),
    );

    let bad_arguments = [
        [0, BUFFER_SIZE as u64, 1],
        [0, u64::MAX, 1],
        [0, 0, u64::from(u32::MAX)],
        [0, 0, u64::MAX],
        [u64::MAX, 0, 1],
        [99, 0, 1],
    ];
    let calls = bad_arguments
        .into_iter()
        .map(|arguments| domain.call(&request(protocol::CALL_GRANT_TABLE, arguments), &[], &mut []));
    tried("hypercalls past the argument buffer", all(calls));
    let unknown = [0, 1, 32, 0x4000, 0x4006, u32::MAX];
    let calls = unknown
        .into_iter()
        .map(|number| domain.call(&request(number, [0; 3]), &[], &mut []));
    tried("unknown hypercalls", all(calls));
    let shares = [(pages, 1), (u64::MAX, 1), (0, u64::MAX), (0, 257)];
    let calls = shares
        .into_iter()
        .map(|(first, count)| domain.call(&request(protocol::CALL_SHARE, [first, count, 0]), &[], &mut []));
    tried("share pages past its own memory", all(calls));
    let calls = [pages, u64::MAX]
        .into_iter()
        .map(|gfn| domain.call(&request(protocol::CALL_RENEW, [gfn, 0, 0]), &[], &mut []));
    tried("renew pages past its own memory", all(calls));
    attempts
}

/// Looks for anything readable where others' pages would be.
fn foreign_memory(domain: &Domain) -> Attempt {
    let name = "find others' pages in its address space";
    let Ok((_reader, writer)) = std::io::pipe() else {
        return Attempt::new(
            name,
            scan(domain, |at| domain.memory().access(at) != Access::None),
        );
    };
    let start = domain.memory().addresses().start;
    // The kernel is asked, not the window's own notes.
    let readable = |at: usize| attack::readable(start + at * PAGE_SIZE, writer.as_fd());
    Attempt::new(name, scan(domain, readable))
}

fn scan(domain: &Domain, readable: impl Fn(usize) -> bool) -> Outcome {
    let first = usize::try_from(domain.hello().ram_pages).unwrap_or(0);
    let pages = first..domain.memory().pages();
    let count = pages.len();
    match pages.filter(|&page| readable(page)).count() {
        0 => Outcome::Refused(format!("none of {count} pages can be read")),
        found => Outcome::Succeeded(format!("{found} of {count} pages can be read")),
    }
}

/// A page that was granted for reading, kept against the rules: by its descriptor, and by a mapping of
/// which nobody was told that it stays.
#[derive(Debug)]
pub struct KeptPage {
    descriptor: OwnedFd,
    window: Window,
}

/// Takes what a grant for reading gives and tries to get more. Then pretends to let go: the hypervisor is
/// told that the page is unmapped, while descriptor and mapping are kept.
///
/// # Errors
/// Why the grant could not even be mapped for reading.
pub fn attack_granted(
    domain: &Domain,
    granter: DomId,
    gref: GrantRef,
) -> Result<(Vec<Attempt>, KeptPage), GrantStatus> {
    let host_addr = domain.hello().first_foreign().address();
    let mut attempts = Vec::new();
    let map = |host_addr, flags| {
        let mut item = [MapGrantRef {
            host_addr,
            flags,
            gref,
            dom: granter,
            ..MapGrantRef::default()
        }];
        let called = domain.grant_table_op(Call::Map(&mut item));
        (batch(called, [item[0].status]), item[0])
    };
    let name = |what: &str| format!("{what} a page granted for reading");
    attempts.push(Attempt::new(
        name("map for writing, by the hypercall,"),
        map(host_addr, MapFlags::HOST_MAP).0,
    ));
    let readonly = MapFlags::HOST_MAP | MapFlags::READONLY;
    let own_memory = [0, 4096, host_addr + 1, host_addr - 4096, u64::MAX - 4095, 1 << 46];
    for at in own_memory {
        let (outcome, _) = map(at, readonly);
        attempts.push(Attempt::new(
            format!("map outside its window (at {at:#x})"),
            outcome,
        ));
    }
    let mut copy = [Copy {
        source: CopyPtr::frame(0, 0),
        dest: CopyPtr::grant(granter, gref, 0),
        len: 16,
        flags: CopyFlags::DEST_GREF,
        ..Copy::default()
    }];
    let called = domain.grant_table_op(Call::Copy(&mut copy));
    attempts.push(Attempt::new(name("copy to"), batch(called, [copy[0].status])));

    let (_, mapped) = map(host_addr, readonly);
    mapped.status.result()?;
    let descriptors = domain.received(NoticeKind::ForeignRead, host_addr);
    let descriptor = descriptors
        .ok()
        .and_then(|mut all| all.pop())
        .ok_or(GrantStatus::GENERAL_ERROR)?;
    let window = Window::of(&descriptor, 1, Access::Read).map_err(|_| GrantStatus::GENERAL_ERROR)?;
    attempts.push(Attempt::new(
        name("map a second time in one place"),
        map(host_addr, readonly).0,
    ));
    attempts.extend(attack_page(descriptor.as_fd(), &window, 0));

    let mut unmap = [UnmapGrantRef {
        host_addr,
        handle: mapped.handle,
        ..UnmapGrantRef::default()
    }];
    let called = domain.grant_table_op(Call::Unmap(&mut unmap));
    called.map_err(|_| GrantStatus::GENERAL_ERROR)?;
    unmap[0].status.result()?;
    let called = domain.grant_table_op(Call::Unmap(&mut unmap));
    attempts.push(Attempt::new(
        "unmap twice by one handle",
        batch(called, [unmap[0].status]),
    ));
    Ok((attempts, KeptPage { descriptor, window }))
}

impl KeptPage {
    /// Looks for something that the granter wrote after access had ended.
    #[must_use]
    pub fn look_for(&self, secret: &[u8]) -> Attempt {
        let mut through_mapping = [0; PAGE_SIZE];
        let mut through_descriptor = [0; PAGE_SIZE];
        let _ = self.window.read(0, &mut through_mapping);
        let _ = rustix::io::pread(&self.descriptor, &mut through_descriptor, 0);
        let sees = |page: &[u8]| page.windows(secret.len().max(1)).any(|bytes| bytes == secret);
        let outcome = match (sees(&through_mapping), sees(&through_descriptor)) {
            (false, false) => Outcome::Refused("the old page shows the old content".into()),
            (true, _) => Outcome::Succeeded("seen through a stale mapping".into()),
            (_, true) => Outcome::Succeeded("seen through a stale descriptor".into()),
        };
        Attempt::new("read a page after access has ended", outcome)
    }
}

/// Attempts on the parts of the store that belong to others.
#[must_use]
pub fn attack_store(store: &mut Client, victims: &[(&str, DomId)]) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut tried = |name: String, outcome: Result<(), gnttab_xenstore::client::Error>| {
        let outcome = match outcome {
            Ok(()) => Outcome::Succeeded("done".into()),
            Err(error) => match error.errno() {
                Some(errno) => Outcome::Refused(errno.to_string()),
                None => Outcome::Succeeded(format!("let in: {error}")),
            },
        };
        attempts.push(Attempt::new(name, outcome));
    };
    for (who, victim) in victims {
        let home = format!("/local/domain/{}", victim.0);
        tried(
            format!("read the store of {who}"),
            store.read(&format!("{home}/name")).map(drop),
        );
        tried(
            format!("write the store of {who}"),
            store.write(&format!("{home}/backdoor"), "x"),
        );
        tried(format!("remove the store of {who}"), store.rm(&home));
    }
    tried(
        "write the root of the store".into(),
        store.write("/backdoor", "x"),
    );
    tried(
        "write the tools' part of the store".into(),
        store.write("/tool/backdoor", "x"),
    );
    attempts
}

fn request(number: u32, [first, second, third]: [u64; 3]) -> Request {
    Request {
        number,
        arguments: [first, second, third, 0],
    }
}

fn place_frame(domain: &Domain, victim: DomId) -> Result<u64, Errno> {
    let place = AddToPhysmap {
        domid: victim,
        size: 0,
        space: PHYSMAP_SPACE_GRANT_TABLE,
        idx: 0,
        gpfn: Gfn(1 << 20).0,
    };
    let mut bytes = [0; 32];
    place.encode(ABI, &mut bytes).map_err(|_| Errno::Inval)?;
    domain.call(
        &request(protocol::CALL_MEMORY, [MEMOP_ADD_TO_PHYSMAP.into(), 0, 0]),
        &bytes,
        &mut [],
    )
}

fn answered(answer: Result<u64, Errno>) -> Outcome {
    match answer {
        Ok(value) => Outcome::Succeeded(format!("answer {value}")),
        Err(errno) => Outcome::Refused(errno.to_string()),
    }
}

/// Refused only if all are.
fn all(answers: impl Iterator<Item = Result<u64, Errno>>) -> Outcome {
    let mut said = BTreeMap::new();
    for answer in answers {
        match answer {
            Ok(value) => return Outcome::Succeeded(format!("answer {value}")),
            Err(errno) => *said.entry(errno.to_string()).or_insert(0) += 1,
        }
    }
    Outcome::Refused(counts(said))
}

/// Refused only if every item is, or the whole call.
fn batch(called: Result<(), Errno>, statuses: impl IntoIterator<Item = GrantStatus>) -> Outcome {
    if let Err(errno) = called {
        return Outcome::Refused(errno.to_string());
    }
    let mut said = BTreeMap::new();
    for (item, status) in statuses.into_iter().enumerate() {
        if status.is_okay() {
            return Outcome::Succeeded(format!("item {item}"));
        }
        *said.entry(status.to_string()).or_insert(0) += 1;
    }
    Outcome::Refused(counts(said))
}

fn counts(said: BTreeMap<String, u32>) -> String {
    let said = said.into_iter().map(|(what, count)| {
        if count == 1 {
            what
        } else {
            format!("{count} x {what}")
        }
    });
    said.collect::<Vec<_>>().join(", ")
}
