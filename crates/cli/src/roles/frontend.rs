//! The frontend: grants pages to its backend, and either exports the disk as NBD or does the demo's work on it.
//!
//! When the backend goes and another takes its place, the queues are opened anew and what was not answered is sent again; who
//! uses the disk notices a pause.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use gnttab_abi::DomId;
use gnttab_guest::{Config, GrantTable};
use gnttab_host::protocol::ABI;
use gnttab_host::runtime::{Domain, Port, io::Front};
use gnttab_io::blkif::handshake::{BackendLimits, FrontendEvent, FrontendHandshake, QueueOffer};
use gnttab_io::blkif::{DeviceProperties, FrontendConfig, FrontendQueue};
use gnttab_io::xenbus::{EventPort, Store as _};
use serde::{Deserialize, Serialize};

use super::hostile::Bait;
use super::{Joined, News, RoleError, Step, say, state_node};
use crate::bell::Bell;
use crate::bench::load::{self, Pattern};
use crate::block::Geometry;
use crate::demo::workload;
use crate::image::SECTOR;
use crate::nbd::connection::Export;
use crate::nbd::listener::Listener;
use crate::nbd::server::{Server, Totals};
use crate::queue_device::{self, QueueDevice, SharedQueue};

/// A disk to be used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// Its number in the machine.
    pub(crate) disk: usize,
    /// The device's directory in the store.
    pub(crate) directory: String,
    /// Queues, if the backend allows as many.
    pub(crate) queues: u32,
    /// Rings of 2^n pages, if the backend allows them.
    pub(crate) ring_order: u32,
    /// Offer persistent grants.
    pub(crate) persistent: bool,
    /// What to do with it.
    pub(crate) job: Job,
}

/// What a frontend does with its disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Job {
    /// Export it; the listening socket comes as descriptor `listener-N`.
    Export {
        /// The export's name.
        name: String,
        /// One line for people.
        description: String,
        /// The listener is a TCP socket, not a Unix one.
        tcp: bool,
    },
    /// Read and write it, for the demo, and lay out a bait for the hostile domain.
    Work {
        /// The hostile domain.
        bait: u16,
    },
    /// Accesses it for a while in each of these ways.
    Measure {
        /// Ways.
        patterns: Vec<Pattern>,
        /// How long each.
        milliseconds: u64,
    },
}

type Queue = SharedQueue<Front, Port>;

impl queue_device::Port for Port {
    fn clear(&mut self) {
        // That the peer has gone is for the handshake to notice.
        let _ = self.take();
    }
}

/// The name of the descriptor that has a disk's listening socket.
pub(crate) fn listener_name(disk: usize) -> String {
    format!("listener-{disk}")
}

/// One disk that this domain uses.
pub(super) struct Frontend {
    orders: Orders,
    device: Device,
    /// `None` until the toolstack has made the directory.
    handshake: Option<FrontendHandshake>,
    job: Option<Running>,
    leaving: bool,
}

impl Frontend {
    /// All that the domain has. They share its grant table.
    pub(super) fn all(joined: &mut Joined, orders: Vec<Orders>) -> Result<Vec<Self>, RoleError> {
        if orders.is_empty() {
            return Ok(Vec::new());
        }
        let table = GrantTable::start(Arc::clone(&joined.domain), Config::default())?;
        joined.reporter = Some(Domain::keep_reporting(&table)?);
        let one = |orders: Orders| {
            joined.store.watch(&state_node(&orders.directory))?;
            // What the disk's rings and requests need at most; others' disks have theirs.
            let quota = orders.queues.saturating_mul(1056 + (1 << orders.ring_order)) + 1;
            let device = Device {
                table: table.consumer(&format!("disk{}", orders.disk), quota)?,
                queues: Vec::new(),
                bell: joined.bell.clone(),
            };
            Ok(Frontend {
                orders,
                device,
                handshake: None,
                job: None,
                leaving: false,
            })
        };
        orders.into_iter().map(one).collect()
    }

    /// Gives the disk up: what its users have under way is finished first.
    pub(super) fn leave(&mut self, joined: &mut Joined) -> Result<(), RoleError> {
        if !std::mem::replace(&mut self.leaving, true) {
            if let Some(Running::Export(server)) = self.job.take() {
                say(self.orders.disk, News::Totals(stop(server)));
            }
            if let Some(handshake) = &mut self.handshake {
                handshake.close(&mut joined.store)?;
            }
        }
        Ok(())
    }

    pub(super) fn step(&mut self, joined: &mut Joined) -> Result<Step, RoleError> {
        let Some(handshake) = &mut self.handshake else {
            if self.leaving {
                return Ok(Step::Over);
            }
            if !joined.is_new(&self.orders.directory)? {
                return Ok(Step::Idle);
            }
            let (directory, persistent) = (&self.orders.directory, self.orders.persistent);
            self.handshake = Some(FrontendHandshake::probe(
                &mut joined.store,
                directory,
                persistent,
            )?);
            return Ok(Step::Moved);
        };
        match handshake.advance(&mut joined.store)? {
            FrontendEvent::Idle if self.leaving && !self.device.is_open() => return Ok(Step::Over),
            FrontendEvent::Idle => {
                match &mut self.job {
                    Some(Running::Export(server)) => {
                        say(self.orders.disk, News::Totals(server.counters().totals()));
                    }
                    Some(Running::Work(bait)) => bait.step(joined)?,
                    Some(Running::Measure) | None => {}
                }
                let Some(why) = self.device.broken() else {
                    return Ok(Step::Idle);
                };
                handshake.fail(&mut joined.store, &why)?;
            }
            FrontendEvent::Setup(limits) => {
                let peer = handshake.backend_id();
                match self.device.open(&joined.domain, peer, &self.orders, &limits) {
                    Ok(offers) => handshake.publish(&mut joined.store, ABI, &offers)?,
                    Err(error) => handshake.fail(&mut joined.store, &error.to_string())?,
                }
            }
            FrontendEvent::Connect(properties) => {
                self.device.start(properties);
                handshake.connected(&mut joined.store)?;
                if self.job.is_none() && !self.leaving {
                    self.job = Some(begin(joined, &self.orders, &self.device, &properties)?);
                    say(self.orders.disk, News::Ready);
                }
            }
            FrontendEvent::Update(properties) => self.device.start(properties),
            FrontendEvent::Disconnect => {
                self.device.close();
                handshake.closed(&mut joined.store)?;
            }
            FrontendEvent::Removed => return Ok(Step::Over),
        }
        Ok(Step::Moved)
    }
}

/// What runs on the disk.
enum Running {
    Export(Server),
    Work(Bait),
    /// In a thread that says what came of it.
    Measure,
}

fn begin(
    joined: &mut Joined,
    orders: &Orders,
    device: &Device,
    properties: &DeviceProperties,
) -> Result<Running, RoleError> {
    let disk = orders.disk;
    let geometry = geometry(properties);
    let mut devices = device.devices(geometry);
    match &orders.job {
        Job::Export {
            name,
            description,
            tcp,
        } => {
            let listener = Listener::inherited(joined.descriptor(&listener_name(disk))?, *tcp);
            let export = Export {
                name: name.clone(),
                description: description.clone(),
                geometry,
            };
            Ok(Running::Export(Server::start(listener, export, devices)?))
        }
        Job::Work { bait } => {
            let mut first = devices.remove(0);
            let work = move || {
                let outcome = workload::run(&mut first, |phase| say(disk, News::Phase(phase.to_owned())));
                say(
                    disk,
                    match outcome {
                        Ok(outcome) => News::Outcome(Box::new(outcome)),
                        Err(error) => News::Failed(error.to_string()),
                    },
                );
            };
            thread::Builder::new().name("work".to_owned()).spawn(work)?;
            Ok(Running::Work(Bait::lay(joined, &device.table, *bait)?))
        }
        Job::Measure {
            patterns,
            milliseconds,
        } => {
            let mut first = devices.remove(0);
            let (patterns, time) = (patterns.clone(), Duration::from_millis(*milliseconds));
            let measure = move || {
                say(
                    disk,
                    match load::run(&mut first, &patterns, time) {
                        Ok(paces) => News::Paces(paces),
                        Err(error) => News::Failed(error.to_string()),
                    },
                );
            };
            thread::Builder::new().name("measure".to_owned()).spawn(measure)?;
            Ok(Running::Measure)
        }
    }
}

/// Ends the export; what it has done in all.
fn stop(server: Server) -> Totals {
    let counters = Arc::clone(server.counters());
    server.stop();
    counters.totals()
}

fn geometry(properties: &DeviceProperties) -> Geometry {
    let disk = &properties.disk;
    Geometry {
        size: disk.sectors * SECTOR,
        block_size: disk.sector_size,
        preferred_size: 4096.max(disk.physical_sector_size),
        read_only: disk.read_only,
        flush: disk.flush || properties.barrier,
        discard: disk.discard.is_some(),
    }
}

/// The queues of the disk.
struct Device {
    table: GrantTable<Domain>,
    queues: Vec<Arc<Queue>>,
    bell: Bell,
}

impl Device {
    /// Opens every queue to `peer`: with the first backend the queues are made, and later ones must allow as many.
    fn open(
        &mut self,
        domain: &Arc<Domain>,
        peer: DomId,
        orders: &Orders,
        limits: &BackendLimits,
    ) -> Result<Vec<QueueOffer>, RoleError> {
        let most = usize::try_from(limits.max_queues)?;
        if self.queues.is_empty() {
            let count = most.min(usize::try_from(orders.queues)?);
            for _ in 0..count {
                let front = Front::new(self.table.clone(), peer);
                let queue = FrontendQueue::new(front, FrontendConfig::new(ABI));
                self.queues
                    .push(Arc::new(SharedQueue::new(queue, self.bell.clone())?));
            }
        }
        if self.queues.len() > most {
            return Err(format!(
                "{} queues are in use, the backend allows {most}",
                self.queues.len()
            )
            .into());
        }
        let pages = 1 << orders.ring_order.min(limits.max_ring_page_order);
        let offers = self.queues.iter().map(|shared| {
            let port = domain.new_port(peer)?;
            let event_channel = EventPort(port.number());
            shared.watch(&port)?;
            Ok(QueueOffer {
                ring: shared.lock().open(pages, port)?,
                event_channel,
            })
        });
        let offers: Result<Vec<QueueOffer>, RoleError> = offers.collect();
        if offers.is_err() {
            self.close();
        }
        offers
    }

    fn start(&self, properties: DeviceProperties) {
        for queue in &self.queues {
            queue.lock().start(properties);
        }
    }

    fn close(&self) {
        for queue in &self.queues {
            queue.lock().close();
        }
    }

    fn is_open(&self) -> bool {
        self.queues.iter().any(|queue| queue.lock().is_open())
    }

    /// How the backend broke the protocol, once it did.
    fn broken(&self) -> Option<String> {
        self.queues
            .iter()
            .find_map(|queue| queue.take_broken())
            .map(|broken| broken.to_string())
    }

    fn devices(&self, geometry: Geometry) -> Vec<QueueDevice<Front, Port>> {
        self.queues
            .iter()
            .map(|queue| QueueDevice::new(Arc::clone(queue), geometry))
            .collect()
    }
}
