//! A frontend and a backend in one process, connected.

use std::vec::Vec;

use gnttab_abi::{Abi, GrantRef};

use super::disk::RamDisk;
use super::domain::{FakeDomain, FakeGrantee, FakeGranter};
use super::event::Event;
use crate::blkif::{
    BackendConfig, BackendQueue, BlockDevice, DeviceProperties, Disk, FrontendConfig, FrontendQueue, OneShot,
};

/// How the two ends of a [`Rig`] are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RigConfig {
    /// Layout of the rings.
    pub abi: Abi,
    /// Queues.
    pub queues: usize,
    /// log2 of the pages of a ring.
    pub ring_order: u32,
    /// Segments of an indirect request that either side allows; 0 for none.
    pub max_indirect: u16,
    /// Both sides want persistent grants.
    pub persistent: bool,
    /// Persistent mappings that the backend keeps for each queue.
    pub persistent_limit: usize,
    /// How the backend reaches other pages.
    pub one_shot: OneShot,
}

impl Default for RigConfig {
    fn default() -> RigConfig {
        RigConfig {
            abi: Abi::X86_64,
            queues: 1,
            ring_order: 0,
            max_indirect: 32,
            persistent: true,
            persistent_limit: 1056,
            one_shot: OneShot::Map,
        }
    }
}

/// A frontend and a backend of one disk, connected through heap pages; the handshake is left out.
pub struct Rig {
    /// The frontend's domain.
    pub domain: FakeDomain,
    /// The backend's disk.
    pub disk: RamDisk,
    /// The frontend.
    pub device: BlockDevice<FakeGranter, Event>,
    /// The backend's queues; none after [`Rig::kill_backend`].
    pub backend: Vec<BackendQueue<FakeGrantee>>,
    /// The rings that the frontend granted.
    pub rings: Vec<Vec<GrantRef>>,
    /// Event channels to the frontend, one for each queue.
    pub to_frontend: Vec<Event>,
    /// Event channels to the backend, one for each queue.
    pub to_backend: Vec<Event>,
    config: RigConfig,
}

impl Rig {
    /// Connects both ends over a zeroed disk of so many sectors.
    #[must_use]
    pub fn new(config: RigConfig, sectors: usize) -> Rig {
        Rig::with_disk(config, RamDisk::new(sectors))
    }

    /// Connects both ends over a disk.
    #[must_use]
    pub fn with_disk(config: RigConfig, disk: RamDisk) -> Rig {
        let domain = FakeDomain::new();
        let front = FrontendConfig {
            max_indirect: config.max_indirect,
            ..FrontendConfig::new(config.abi)
        };
        let queues = (0..config.queues)
            .map(|_| FrontendQueue::new(domain.granter(), front))
            .collect();
        let events = || (0..config.queues).map(|_| Event::new()).collect();
        let mut rig = Rig {
            domain,
            disk,
            device: BlockDevice::new(queues),
            backend: Vec::new(),
            rings: Vec::new(),
            to_frontend: events(),
            to_backend: events(),
            config,
        };
        rig.connect();
        rig
    }

    /// Opens new rings and connects a new backend to them; the device starts.
    ///
    /// # Panics
    /// If that fails.
    pub fn connect(&mut self) {
        let ports = self.to_backend.clone();
        self.rings = self
            .device
            .open(1 << self.config.ring_order, ports)
            .expect("open the device");
        self.attach_backend();
        self.device.start(self.properties());
    }

    /// Attaches a new backend to the rings as they are.
    ///
    /// # Panics
    /// If that fails.
    pub fn attach_backend(&mut self) {
        let config = BackendConfig {
            max_indirect: self.config.max_indirect,
            persistent_limit: self.config.persistent_limit,
            one_shot: self.config.one_shot,
            ..BackendConfig::new(self.config.abi, self.config.persistent)
        };
        let connect = |ring: &Vec<GrantRef>| {
            BackendQueue::connect(self.domain.grantee(), ring, config, self.disk.info()).expect("a backend")
        };
        self.backend = self.rings.iter().map(connect).collect();
    }

    /// The backend's domain dies: its mappings are gone.
    pub fn kill_backend(&mut self) {
        self.backend.clear();
    }

    /// What the backend says of the device.
    #[must_use]
    pub fn properties(&self) -> DeviceProperties {
        DeviceProperties {
            disk: self.disk.info(),
            barrier: self.disk.info().flush,
            persistent: self.config.persistent,
            max_indirect: self.config.max_indirect,
        }
    }

    /// The frontend, and a way to wait: it lets the backend work. The backend must not break.
    pub fn split(&mut self) -> (&mut BlockDevice<FakeGranter, Event>, impl FnMut() -> bool) {
        let Rig {
            device,
            backend,
            disk,
            to_frontend,
            ..
        } = self;
        let wait = move || serve(backend, disk, to_frontend) > 0;
        (device, wait)
    }

    /// Lets the backend work until it has nothing to do; the requests that it served.
    pub fn serve(&mut self) -> u32 {
        serve(&mut self.backend, &self.disk, &mut self.to_frontend)
    }
}

fn serve(backend: &mut [BackendQueue<FakeGrantee>], disk: &RamDisk, events: &mut [Event]) -> u32 {
    let mut served = 0;
    for (queue, event) in backend.iter_mut().zip(events) {
        loop {
            let progress = queue.process(disk, event, 8).expect("an honest frontend");
            served += progress.served;
            if !progress.more {
                break;
            }
        }
    }
    served
}
