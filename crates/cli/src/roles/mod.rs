//! What domains run: functions of this executable, each in a process of its own that is confined before the function begins.
//!
//! A role gets its orders as one JSON argument and its files by name. It says what happens on standard output, one JSON
//! object a line ([`Word`]), which only whoever started it reads; standard error is for the person.

pub(crate) mod backend;
pub(crate) mod frontend;
pub(crate) mod hostile;
pub(crate) mod trouble;

use std::collections::HashMap;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use gnttab_host::launch::{Role, Start};
use gnttab_host::runtime::{Domain, Reporter};
use gnttab_io::xenbus::{Store as _, Tx, XenbusState, read_state};
use gnttab_xenstore::client::Client;
use serde::{Deserialize, Serialize};

use crate::bell::Bell;
use crate::demo::report::AttemptGroup;
use crate::demo::workload::{Outcome, Pace};
use crate::nbd::server::Totals;
use crate::store::StoreClient;
use backend::Backend;
use frontend::Frontend;

/// By name, for [`domain_main`](gnttab_host::launch::domain_main).
pub(crate) const ROLES: &[(&str, Role)] = &[
    (DISKS, |start| end(DISKS, disks(start))),
    (HOSTILE, |start| end(HOSTILE, hostile::run(start))),
    (TROUBLE, |start| end(TROUBLE, trouble::run(start))),
];

/// The role of a domain that serves disks, uses disks, or both.
pub(crate) const DISKS: &str = "disks";

/// The role of the demo's hostile domain.
pub(crate) const HOSTILE: &str = "hostile";

/// The role of domains that are in trouble.
pub(crate) const TROUBLE: &str = "trouble";

/// How often a role looks around when nothing happens, and says what it has done.
const INTERVAL: Duration = Duration::from_millis(500);

/// What a domain with [`DISKS`] is to do.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// Disks that it serves.
    pub(crate) backends: Vec<backend::Orders>,
    /// Disks that it uses.
    pub(crate) frontends: Vec<frontend::Orders>,
}

/// What a role says on its standard output, about one of the machine's disks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Word {
    /// Which disk, as its orders number it.
    pub(crate) disk: usize,
    /// What about it.
    pub(crate) news: News,
}

/// How a backend reaches the pages of its frontend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sharing {
    /// They stay granted and mapped from one request to the next, as with Linux's drivers: the fastest.
    #[default]
    Persistent,
    /// They are granted for a request, and the monitor copies from them and to them: nothing stays shared.
    Copied,
    /// They are granted and mapped for a request, and get new backing before they are used again: nothing stays shared,
    /// and it is many times slower.
    Mapped,
}

impl Sharing {
    /// As it is written.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Sharing::Persistent => "persistent",
            Sharing::Copied => "copied",
            Sharing::Mapped => "mapped",
        }
    }
}

/// What a queue of a backend has done in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Served {
    /// Reads and writes of the ring.
    pub(crate) requests: u64,
    /// Pages mapped.
    pub(crate) mapped: u64,
    /// Pages copied by the monitor.
    pub(crate) copied: u64,
}

/// What happened to a disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum News {
    /// It is being exported, or worked on.
    Ready,
    /// What was done with it so far.
    Totals(Totals),
    /// The demo's workload has begun a phase.
    Phase(String),
    /// The demo's workload is done.
    Outcome(Box<Outcome>),
    /// How fast the patterns of a measuring frontend went.
    Paces(Vec<Pace>),
    /// A queue of its backend has ended.
    Served(Served),
    /// The demo's workload, or what is measured, cannot go on.
    Failed(String),
    /// What the hostile domain tried.
    Attempts(Vec<AttemptGroup>),
}

/// What was done with a disk over several frontends, one after the other: what a frontend that was killed had done since it
/// last said so is lost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum {
    before: Totals,
    last: Totals,
}

impl Sum {
    /// Takes note of what the disk's frontend says.
    pub(crate) fn hear(&mut self, news: &News) {
        match news {
            // Every frontend says so once, before anything is done.
            News::Ready => {
                *self = Sum {
                    before: self.now(),
                    last: Totals::default(),
                }
            }
            News::Totals(now) => self.last = *now,
            _ => {}
        }
    }

    /// All of it. The clients are those of the last.
    pub(crate) fn now(&self) -> Totals {
        self.before.plus(&self.last)
    }
}

/// Says it. With nobody to hear it there is nothing to be done.
fn say(disk: usize, news: News) {
    let mut line = serde_json::to_vec(&Word { disk, news }).unwrap_or_default();
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(&line).and_then(|()| out.flush());
}

/// Why a role ended before its time.
pub(crate) type RoleError = Box<dyn std::error::Error>;

fn end(role: &str, outcome: Result<(), RoleError>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gnttab: {role}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A process that has become a domain, and what all its drivers share.
struct Joined {
    domain: Arc<Domain>,
    store: StoreClient,
    descriptors: HashMap<String, OwnedFd>,
    /// Rung when a thread of a driver wants the control loop to look.
    bell: Bell,
    /// Tells the monitor how the own grant table stands, once there is one.
    reporter: Option<Reporter>,
}

impl Joined {
    fn descriptor(&mut self, name: &str) -> Result<OwnedFd, RoleError> {
        self.descriptors
            .remove(name)
            .ok_or_else(|| format!("no descriptor called {name}").into())
    }

    /// Waits for a change in the store, for the bell, or for a while; an error once the monitor has gone.
    fn wait(&mut self) -> Result<(), RoleError> {
        let hang_up = self.domain.hang_up();
        self.store.wait(self.bell.as_fd(), hang_up.as_fd(), INTERVAL)?;
        self.bell.hush();
        if self.domain.is_connected() {
            Ok(())
        } else {
            Err("the monitor has gone".into())
        }
    }

    /// Whether the toolstack has made a device's directory, and nobody has used it yet.
    fn is_new(&mut self, directory: &str) -> Result<bool, RoleError> {
        Ok(read_state(&mut self.store, directory)? == XenbusState::Initialising)
    }
}

/// What came of a step of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Something was done, there may be more.
    Moved,
    /// Nothing until something happens.
    Idle,
    /// There is nothing to be done any more.
    Over,
}

/// Serves and uses disks until asked to end, and all of them are given up.
fn disks(start: Start) -> Result<(), RoleError> {
    let orders: Orders = serde_json::from_str(start.arguments.first().ok_or("no orders")?)?;
    let domain = Domain::join(start.channel)?;
    let connection = domain.take_store().ok_or("no connection to the store")?;
    let shutdown = shutdown_node(domain.id().0);
    let mut joined = Joined {
        domain,
        store: StoreClient::new(Client::new(connection)),
        descriptors: start.descriptors,
        bell: Bell::new()?,
        reporter: None,
    };
    joined.store.watch(&shutdown)?;
    let mut backends = Backend::all(&mut joined, orders.backends)?;
    let mut frontends = Frontend::all(&mut joined, orders.frontends)?;
    loop {
        let leave = joined
            .store
            .read(Tx::NONE, &shutdown)?
            .is_some_and(|value| !value.is_empty());
        let mut steps = Vec::new();
        for frontend in &mut frontends {
            if leave {
                frontend.leave(&mut joined)?;
            }
            steps.push(frontend.step(&mut joined)?);
        }
        for backend in &mut backends {
            steps.push(backend.step(&mut joined, leave)?);
        }
        // A domain without disks is there for others to look at.
        if steps.iter().all(|step| *step == Step::Over) && (leave || !steps.is_empty()) {
            return Ok(());
        }
        if !steps.contains(&Step::Moved) {
            joined.wait()?;
        }
    }
}

/// The node by which a domain is asked to end, as toolstacks do.
pub(crate) fn shutdown_node(domain: u16) -> String {
    format!("/local/domain/{domain}/control/shutdown")
}

fn state_node(directory: &str) -> String {
    format!("{directory}/state")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whichever of two frontends has done more.
    #[test]
    fn a_sum_counts_every_frontend() {
        let done = |reads| {
            News::Totals(Totals {
                reads,
                clients: 1,
                ..Totals::default()
            })
        };
        for (first, second) in [(3, 9), (9, 3)] {
            let mut sum = Sum::default();
            for news in [
                News::Ready,
                done(1),
                done(first),
                News::Ready,
                done(1),
                done(second),
            ] {
                sum.hear(&news);
            }
            assert_eq!((sum.now().reads, sum.now().clients), (12, 1));
        }
    }
}
