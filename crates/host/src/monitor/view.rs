//! What people and tools see of the machine. Everything here serializes to JSON as it stands.

use std::collections::BTreeMap;
use std::time::Instant;

use gnttab_abi::{DomId, EntryType, GrantRef, MapFlags, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE};
use gnttab_engine::{DomainView, EntryCounts, EntryView, EntryWords, Hypervisor, Version};
use serde::{Deserialize, Serialize};

use super::machine::Said;
use super::{Monitor, MonitorError, Process, Running, Shared};
use crate::confine::Isolation;

/// In which part of its life a domain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is being made.
    Starting,
    /// Its process runs.
    Running,
    /// Its process is dead; others still use its pages.
    Dying,
}

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    /// Its number.
    pub id: u16,
    /// What people call it; empty unless it runs.
    pub name: String,
    /// In which part of its life it is.
    pub state: State,
    /// Its process, if the monitor started it.
    pub pid: Option<u32>,
    /// A signal has stopped its process: it does nothing until another lets it go on.
    #[serde(default)]
    pub stopped: bool,
    /// How long it has been running, in milliseconds.
    pub age_ms: u64,
    /// Whether every wall that matters stands around it.
    pub isolated: bool,
    /// The walls that stand; `None` for a domain that joined, or does not run.
    pub isolation: Option<Isolation>,
    /// How many of its pages have been made shareable.
    pub shareable_pages: u64,
    /// References that others hold on its pages.
    pub page_references: u64,
    /// Version of its grant table.
    pub version: u32,
    /// Frames of its grant table, and how many there may be.
    pub grant_frames: (u32, u32),
    /// Entries that are granted, of whatever kind.
    pub granted: u32,
    /// Entries that somebody uses.
    pub in_use: u32,
    /// Entries by kind.
    pub entries: Entries,
    /// Pins on its entries, by the domain that holds them.
    pub pinned_by: BTreeMap<u16, u32>,
    /// Mappings that it holds, by granter.
    pub maps: BTreeMap<u16, u32>,
    /// Handles that exist, and how many may.
    pub handles: (u32, u64),
    /// How long its oldest mapping has existed, in milliseconds.
    pub oldest_mapping_ms: Option<u64>,
    /// Items of each operation that it called, where any.
    pub operations: BTreeMap<String, u64>,
    /// Statuses that it was given, where any.
    pub statuses: BTreeMap<String, u64>,
    /// Its event channels.
    pub ports: Vec<PortInfo>,
    /// What it says of its own grant table, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub says: Option<ReportInfo>,
}

/// What a domain says of its own grant table: its word, and nobody else's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportInfo {
    /// How long ago it said so, in milliseconds.
    pub age_ms: u64,
    /// References that its driver has, and how many of them are free.
    pub refs: (u32, u32),
    /// References that its driver has given up for good.
    pub leaked: u64,
    /// Who has how many of them.
    pub consumers: Vec<ConsumerInfo>,
    /// Ends of access that peers do not let happen yet.
    pub pending_total: u32,
    /// The first of these.
    pub pending: Vec<PendingInfo>,
}

/// A consumer of a domain's grant table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumerInfo {
    /// What it is called; empty: everybody who has no name.
    pub name: String,
    /// References that it has.
    pub used: u32,
    /// References that it may have; `None`: as many as there are.
    pub quota: Option<u32>,
    /// How often it was refused references for that.
    pub refused: u64,
}

/// An end of access that the peer does not let happen yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingInfo {
    /// The reference.
    pub gref: u32,
    /// Who still uses it.
    pub peer: u16,
    /// How often the end was attempted.
    pub tries: u32,
    /// How long the domain has been saying so, in milliseconds.
    pub age_ms: u64,
}

/// How many entries of a table are what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries {
    /// In all, in the frames that there are.
    pub total: u32,
    /// In all, with every frame that there may be.
    pub most: u64,
    /// Free, and used by nobody.
    pub free: u32,
    /// Granted, whole pages.
    pub permit_access: u32,
    /// Granted, parts of pages.
    pub sub_page: u32,
    /// Waiting for, or done with, a transfer.
    pub accept_transfer: u32,
    /// Passing another domain's grant on.
    pub transitive: u32,
    /// Withdrawn, and still in use.
    pub withdrawn: u32,
}

/// The machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// The version of the program that runs it.
    pub program: String,
    /// The monitor's process.
    pub pid: u32,
    /// How long it has been running, in milliseconds.
    pub age_ms: u64,
    /// vCPUs of all domains together, and how many there may be.
    pub vcpus: (usize, usize),
    /// What it holds in all.
    pub holds: Counters,
}

/// An event channel, from one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortInfo {
    /// The port.
    pub port: u32,
    /// Whose the other end is.
    pub peer: u16,
    /// The peer's port, once it has taken it.
    pub peer_port: Option<u32>,
}

/// An entry of a grant table that is not free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantInfo {
    /// The reference.
    pub gref: u32,
    /// What it is for: `permit_access`, `accept_transfer`, `transitive`, or `invalid` if it was withdrawn
    /// while in use.
    pub kind: String,
    /// Flags, as text: `readonly|reading`.
    pub flags: String,
    /// The domain that it names.
    pub grantee: u16,
    /// The frame as the granter named it.
    pub frame: u64,
    /// The domain that uses it.
    pub user: Option<u16>,
    /// How often it is used: host write, host read, device write, device read.
    pub pins: [u8; 4],
}

/// A mapping that a domain holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingInfo {
    /// The handle.
    pub handle: u32,
    /// The granter.
    pub granter: u16,
    /// The reference in the granter's table.
    pub gref: u32,
    /// Whether it is for reading only.
    pub readonly: bool,
    /// How long it has existed, in milliseconds.
    pub age_ms: u64,
}

/// What the monitor holds in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Domains that run.
    pub running: usize,
    /// Dead domains whose pages others still use.
    pub dying: usize,
    /// Domains' memories that exist.
    pub memories: usize,
    /// Pages with a file of their own.
    pub shareable_pages: u64,
    /// References on pages.
    pub page_references: u64,
    /// Descriptors that the monitor's process has open.
    pub descriptors: usize,
}

const NANOS_PER_MS: u64 = 1_000_000;

impl Monitor {
    /// Every domain, by number.
    #[must_use]
    pub fn domains(&self) -> Vec<DomainInfo> {
        self.shared
            .engine
            .domains()
            .filter_map(|id| self.shared.info(id))
            .collect()
    }

    /// One domain.
    ///
    /// # Errors
    /// [`MonitorError::NoDomain`].
    pub fn domain(&self, id: DomId) -> Result<DomainInfo, MonitorError> {
        self.shared.info(id).ok_or(MonitorError::NoDomain(id))
    }

    /// The entries of a domain's table that are not free.
    ///
    /// # Errors
    /// [`MonitorError::NoDomain`].
    pub fn grants(&self, id: DomId) -> Result<Vec<GrantInfo>, MonitorError> {
        self.shared.grants(id).ok_or(MonitorError::NoDomain(id))
    }

    /// The mappings that a domain holds.
    ///
    /// # Errors
    /// [`MonitorError::NoDomain`].
    pub fn mappings(&self, id: DomId) -> Result<Vec<MappingInfo>, MonitorError> {
        self.shared.mappings(id).ok_or(MonitorError::NoDomain(id))
    }

    /// The mappings of a domain's pages, by others or itself, with who has them.
    #[must_use]
    pub fn mapped_by(&self, id: DomId) -> Vec<(DomId, MappingInfo)> {
        let of_all = self.shared.engine.domains().map(|other| {
            let mut theirs = self.shared.mappings(other).unwrap_or_default();
            theirs.retain(|mapping| mapping.granter == id.0);
            theirs.into_iter().map(move |mapping| (other, mapping))
        });
        of_all.flatten().collect()
    }

    /// The machine as a whole.
    #[must_use]
    pub fn machine(&self) -> MachineInfo {
        let vcpus = self.shared.state().processors.len();
        MachineInfo {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            age_ms: u64::try_from(self.shared.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            vcpus: (vcpus, self.shared.settings.max_vcpus),
            holds: self.counters(),
        }
    }

    /// A domain's table as the debug key of a hypervisor prints it.
    ///
    /// # Errors
    /// [`MonitorError::NoDomain`].
    pub fn dump(&self, id: DomId) -> Result<String, MonitorError> {
        self.shared.dump(id).ok_or(MonitorError::NoDomain(id))
    }

    /// What the monitor holds in all.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// What domains had printed.
    #[must_use]
    pub fn console(&self) -> String {
        self.shared.engine.hypervisor().console().clone()
    }
}

impl Shared {
    pub(crate) fn info(&self, id: DomId) -> Option<DomainInfo> {
        let view = self.observe(|processor| processor.observe(id))??;
        let domain = self.engine.domain(id)?;
        let guest = domain.private();
        let state = self.state();
        let running = state.running.get(&id);
        Some(DomainInfo {
            id: id.0,
            name: running.map(|running| running.name.clone()).unwrap_or_default(),
            state: match running {
                Some(_) => State::Running,
                None if domain.is_dying() => State::Dying,
                None => State::Starting,
            },
            pid: running.and_then(|running| Some(running.process.as_ref()?.child.id())),
            stopped: running
                .and_then(|running| running.process.as_ref())
                .is_some_and(Process::is_stopped),
            age_ms: running.map_or(0, age_ms),
            isolated: running
                .is_some_and(|running| running.isolation.as_ref().is_some_and(Isolation::is_isolated)),
            isolation: running.and_then(|running| running.isolation.clone()),
            shareable_pages: guest.memory.shareable(),
            page_references: guest.memory.references(),
            ports: guest.ports.view().into_iter().map(PortInfo::from).collect(),
            oldest_mapping_ms: view.oldest_mapping.map(|age| age / NANOS_PER_MS),
            version: view.version.number(),
            grant_frames: (view.frames, view.max_frames),
            granted: granted(&view),
            in_use: view.entries.in_use,
            entries: entries(&view),
            handles: (view.handles, view.max_handles),
            operations: some(view.operations.iter().map(|(op, count)| (op.name(), *count))),
            statuses: some(
                view.statuses
                    .iter()
                    .map(|(status, count)| (status.name().unwrap_or("unknown"), *count)),
            ),
            says: guest.said().as_ref().map(ReportInfo::from),
            pinned_by: numbers(view.pinned_by),
            maps: numbers(view.maps),
        })
    }

    pub(crate) fn grants(&self, id: DomId) -> Option<Vec<GrantInfo>> {
        self.observe(|processor| {
            processor.engine().domain(id)?;
            let entries = (0..).map_while(|gref| processor.entry(id, GrantRef(gref)));
            let busy = entries.filter(|entry| entry.user.is_some() || kind(entry) != EntryType::Invalid);
            Some(busy.map(|entry| GrantInfo::from(&entry)).collect())
        })?
    }

    pub(crate) fn mappings(&self, id: DomId) -> Option<Vec<MappingInfo>> {
        let domain = self.engine.domain(id)?;
        let now = self.engine.hypervisor().now();
        let mappings = domain.mappings().map(|mapping| MappingInfo {
            handle: mapping.handle.0,
            granter: mapping.granter.0,
            gref: mapping.gref.0,
            readonly: mapping.flags.contains(MapFlags::READONLY),
            age_ms: mapping.age(now) / NANOS_PER_MS,
        });
        Some(mappings.collect())
    }

    pub(crate) fn dump(&self, id: DomId) -> Option<String> {
        self.observe(|processor| processor.dump(id))?
    }

    pub(crate) fn counters(&self) -> Counters {
        let memories = self.engine.hypervisor().memories();
        let running = self.state().running.len();
        Counters {
            running,
            dying: self.engine.domains().count().saturating_sub(running),
            memories: memories.len(),
            shareable_pages: memories.iter().map(|memory| memory.shareable()).sum(),
            page_references: memories.iter().map(|memory| memory.references()).sum(),
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        }
    }
}

fn age_ms(running: &Running) -> u64 {
    u64::try_from(running.since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn entries(view: &DomainView) -> Entries {
    let EntryCounts {
        invalid,
        permit_access,
        sub_page,
        accept_transfer,
        transitive,
        withdrawn,
        ..
    } = view.entries;
    let per_frame = match view.version {
        Version::V1 => V1_ENTRIES_PER_PAGE,
        Version::V2 => V2_ENTRIES_PER_PAGE,
    };
    Entries {
        total: view.frames.saturating_mul(per_frame),
        most: u64::from(view.max_frames) * u64::from(per_frame),
        free: invalid.saturating_sub(withdrawn),
        permit_access,
        sub_page,
        accept_transfer,
        transitive,
        withdrawn,
    }
}

fn granted(view: &DomainView) -> u32 {
    let entries = &view.entries;
    entries.permit_access + entries.sub_page + entries.accept_transfer + entries.transitive
}

fn numbers(by_domain: BTreeMap<DomId, u32>) -> BTreeMap<u16, u32> {
    by_domain.into_iter().map(|(id, count)| (id.0, count)).collect()
}

fn some<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> BTreeMap<String, u64> {
    counts
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}

fn kind(entry: &EntryView) -> EntryType {
    entry.words.flags().kind()
}

impl From<&Said> for ReportInfo {
    fn from(said: &Said) -> ReportInfo {
        let millis = |at: Instant| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        let report = &said.report;
        let consumers = report.consumers.iter().map(|consumer| ConsumerInfo {
            name: consumer.name.clone(),
            used: consumer.used,
            quota: (consumer.quota != u32::MAX).then_some(consumer.quota),
            refused: consumer.refused,
        });
        let pending = report.pending.iter().map(|end| PendingInfo {
            gref: end.gref.0,
            peer: end.peer.0,
            tries: end.tries,
            age_ms: said
                .pending_since
                .get(&(end.gref, end.peer))
                .map_or(0, |since| millis(*since)),
        });
        ReportInfo {
            age_ms: millis(said.at),
            refs: (report.refs, report.free),
            leaked: report.leaked,
            consumers: consumers.collect(),
            pending_total: report.pending_total,
            pending: pending.collect(),
        }
    }
}

impl From<(u32, DomId, Option<u32>)> for PortInfo {
    fn from((port, peer, peer_port): (u32, DomId, Option<u32>)) -> PortInfo {
        PortInfo {
            port,
            peer: peer.0,
            peer_port,
        }
    }
}

impl From<&EntryView> for GrantInfo {
    fn from(entry: &EntryView) -> GrantInfo {
        let flags = entry.words.flags();
        let kind = match flags.kind() {
            EntryType::Invalid => "invalid",
            EntryType::PermitAccess => "permit_access",
            EntryType::AcceptTransfer => "accept_transfer",
            EntryType::Transitive => "transitive",
        };
        let frame = match entry.words {
            EntryWords::V1(words) => words.frame.into(),
            EntryWords::V2(words, _) => words.frame,
        };
        let pins = &entry.pins;
        GrantInfo {
            gref: entry.gref.0,
            kind: kind.to_owned(),
            // Behind the kind, which stands for itself.
            flags: flags
                .to_string()
                .split_once('|')
                .map_or_else(String::new, |(_, flags)| flags.to_owned()),
            grantee: entry.words.domid().0,
            frame,
            user: entry.user.map(|user| user.0),
            pins: [
                pins.host_write,
                pins.host_read,
                pins.device_write,
                pins.device_read,
            ],
        }
    }
}
