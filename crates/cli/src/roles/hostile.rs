//! The hostile domain of the demo, and the bait that a frontend lays out for it.
//!
//! The bait is one page that the frontend grants it for reading. The hostile domain takes that, tries to get more out of it,
//! pretends to let go and keeps what it can; then the frontend ends access and writes a secret to the page. Everything else it
//! was never granted.

use std::time::{Duration, Instant};

use gnttab_abi::{DomId, GrantRef};
use gnttab_guest::{Access, Grant, GrantTable};
use gnttab_host::hostile::{self, Outcome};
use gnttab_host::launch::Start;
use gnttab_host::runtime::Domain;
use gnttab_io::xenbus::{Store as _, Tx};
use gnttab_xenstore::client::{Client, Nodes as _};
use gnttab_xenstore::perms::{Access as StoreAccess, Perms};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::{Joined, News, RoleError, say};
use crate::demo::report::{Attempt, AttemptGroup};

/// What the frontend writes to the page after access has ended.
const SECRET: &[u8] = b"nobody but d2 may read this";
/// How long one waits for the other.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the hostile domain is to attack.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// Processes, with what to call them.
    pub(crate) processes: Vec<(String, i32)>,
    /// Domains, with what to call them.
    pub(crate) domains: Vec<(String, u16)>,
    /// The domain that lays out the bait.
    pub(crate) bait: u16,
}

fn node(domain: u16, name: &str) -> String {
    format!("/local/domain/{domain}/demo/{name}")
}

/// Tries everything, and says what came of it.
pub(super) fn run(start: Start) -> Result<(), RoleError> {
    let orders: Orders = serde_json::from_str(start.arguments.first().ok_or("no orders")?)?;
    let domain = Domain::join(start.channel)?;
    let mut store = Client::new(domain.take_store().ok_or("no connection to the store")?);
    let processes: Vec<(&str, Pid)> = orders
        .processes
        .iter()
        .filter_map(|(who, pid)| Some((who.as_str(), Pid::from_raw(*pid)?)))
        .collect();
    let domains: Vec<(&str, DomId)> = orders
        .domains
        .iter()
        .map(|(who, id)| (who.as_str(), DomId(*id)))
        .collect();

    let mut groups = Vec::new();
    let mut attempts = hostile::attack_kernel(&processes);
    for (who, _) in &processes {
        let of = format!(" of {who}");
        let (theirs, others) = attempts
            .into_iter()
            .partition(|attempt| attempt.name.ends_with(&of));
        attempts = others;
        groups.push(group(&format!("the process of {who}"), theirs));
    }
    groups.push(group("files, network, the kernel", attempts));
    groups.push(group("the store", hostile::attack_store(&mut store, &domains)));

    let deadline = Instant::now() + PATIENCE;
    let number = |value: Option<&[u8]>| std::str::from_utf8(value?).ok()?.parse::<u32>().ok();
    let gref = store.wait_for(&node(orders.bait, "gref"), deadline, number)?;
    let (attempts, kept) = hostile::attack_granted(&domain, DomId(orders.bait), GrantRef(gref))?;
    groups.push(group("a page granted for reading", attempts));
    let done = node(domain.id().0, "let-go");
    store.write(&done, "1")?;
    let perms = Perms::new(domain.id().0.into(), StoreAccess::None);
    store.set_perms(&done, &perms.with(orders.bait.into(), StoreAccess::Read))?;
    store.wait_for(&node(orders.bait, "ended"), deadline, number)?;
    groups.push(group("the same page, taken back", vec![kept.look_for(SECRET)]));
    // It is the demo's own stray descriptor, which the next attempts would find.
    drop(kept);

    groups.push(group(
        "what was never granted",
        hostile::attack_grants(&domain, &domains),
    ));
    say(0, News::Attempts(groups));
    Ok(())
}

fn group(target: &str, attempts: Vec<hostile::Attempt>) -> AttemptGroup {
    let attempt = |attempt: hostile::Attempt| {
        let succeeded = !attempt.is_refused();
        let (Outcome::Refused(answer) | Outcome::Succeeded(answer)) = attempt.outcome;
        Attempt {
            name: attempt.name,
            succeeded,
            answer,
        }
    };
    AttemptGroup {
        target: target.to_owned(),
        attempts: attempts.into_iter().map(attempt).collect(),
    }
}

/// The frontend's part: one page, granted to the hostile domain until that says that it has let go.
pub(super) struct Bait {
    hostile: u16,
    grant: Option<Grant<Domain>>,
}

impl Bait {
    /// Grants the page and says where.
    pub(super) fn lay(
        joined: &mut Joined,
        table: &GrantTable<Domain>,
        hostile: u16,
    ) -> Result<Self, RoleError> {
        let page = joined
            .domain
            .grantable(1)?
            .page(0)
            .ok_or("no page for the bait")?;
        let grant = table.grant_zeroed(table.alloc_one()?, DomId(hostile), page, Access::ReadOnly)?;
        grant.page().write(0, b"this much was granted")?;
        let gref = grant.gref().0;
        joined.store.watch(&node(hostile, "let-go"))?;
        let bait = Bait {
            hostile,
            grant: Some(grant),
        };
        bait.tell(joined, "gref", gref)?;
        Ok(bait)
    }

    /// Takes the page back once the hostile domain says that it has let go, and writes the secret.
    pub(super) fn step(&mut self, joined: &mut Joined) -> Result<(), RoleError> {
        if self.grant.is_none()
            || joined
                .store
                .read(Tx::NONE, &node(self.hostile, "let-go"))?
                .is_none()
        {
            return Ok(());
        }
        let Some(grant) = self.grant.take() else {
            return Ok(());
        };
        let (_, page) = grant
            .end()
            .map_err(|_| "the hostile domain still maps the bait")?;
        page.write(0, SECRET)?;
        self.tell(joined, "ended", 1)
    }

    fn tell(&self, joined: &mut Joined, name: &str, value: u32) -> Result<(), RoleError> {
        let own = joined.domain.id();
        let path = node(own.0, name);
        joined
            .store
            .write(Tx::NONE, &path, value.to_string().as_bytes())?;
        joined
            .store
            .set_permissions(Tx::NONE, &path, own, &[DomId(self.hostile)])?;
        Ok(())
    }
}
