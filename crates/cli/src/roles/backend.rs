//! The backend: serves an image to a frontend, a thread for each queue.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use gnttab_guest::Mapper;
use gnttab_host::runtime::{Domain, Port, io::Back};
use gnttab_io::blkif::handshake::{BackendEvent, BackendHandshake, BackendLimits, QueueOffer};
use gnttab_io::blkif::{BackendConfig, BackendQueue, Disk as _};
use gnttab_io::xenbus::Store as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::{Joined, RoleError, Step, state_node};
use crate::bell::Bell;
use crate::image_disk::ImageDisk;

/// Requests served before a queue's thread looks at anything else.
const BUDGET: u32 = 64;
/// How often a queue with nothing to do looks after its mappings.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A disk to be served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// Its number in the machine. The image comes as descriptor `image-N`.
    pub(crate) disk: usize,
    /// The device's directory in the store.
    pub(crate) directory: String,
    /// The image's bytes.
    pub(crate) size: u64,
    /// No writes.
    pub(crate) read_only: bool,
    /// Most queues.
    pub(crate) queues: u32,
    /// Largest rings: 2^n pages.
    pub(crate) ring_order: u32,
    /// Offer persistent grants.
    pub(crate) persistent: bool,
}

/// The name of the descriptor that has a disk's image.
pub(crate) fn image_name(disk: usize) -> String {
    format!("image-{disk}")
}

/// One disk that this domain serves.
pub(super) struct Backend {
    orders: Orders,
    disk: Arc<ImageDisk>,
    mapper: Mapper<Domain>,
    /// `None` until the toolstack has made the directory.
    handshake: Option<BackendHandshake>,
    serving: Vec<Queue>,
}

impl Backend {
    /// All that the domain has. They share the addresses for others' pages.
    pub(super) fn all(joined: &mut Joined, orders: Vec<Orders>) -> Result<Vec<Self>, RoleError> {
        if orders.is_empty() {
            return Ok(Vec::new());
        }
        let mapper = Mapper::new(Arc::clone(&joined.domain), joined.domain.foreign_window()?)?;
        let one = |orders: Orders| {
            let image = File::from(joined.descriptor(&image_name(orders.disk))?);
            let disk = Arc::new(ImageDisk::new(image, orders.size, orders.read_only));
            joined.store.watch(&state_node(&orders.directory))?;
            Ok(Backend {
                orders,
                disk,
                mapper: mapper.clone(),
                handshake: None,
                serving: Vec::new(),
            })
        };
        orders.into_iter().map(one).collect()
    }

    /// Does what is next. A disk that was taken away may be given back, to the same frontend or another; only when
    /// `leaving` is nobody waited for.
    pub(super) fn step(&mut self, joined: &mut Joined, leaving: bool) -> Result<Step, RoleError> {
        let limits = BackendLimits {
            max_ring_page_order: self.orders.ring_order,
            max_queues: self.orders.queues,
            persistent: self.orders.persistent,
            ..BackendLimits::default()
        };
        let Some(handshake) = &mut self.handshake else {
            if leaving || !joined.is_new(&self.orders.directory)? {
                return Ok(if leaving { Step::Over } else { Step::Idle });
            }
            let handshake = BackendHandshake::probe(&mut joined.store, &self.orders.directory, limits)?;
            self.handshake = Some(handshake);
            return Ok(Step::Moved);
        };
        match handshake.advance(&mut joined.store)? {
            BackendEvent::Idle if self.serving.iter().any(Queue::has_ended) => {
                handshake.fail(&mut joined.store, "the ring is broken")?;
            }
            BackendEvent::Idle => return Ok(Step::Idle),
            BackendEvent::Connect(offer) => {
                let peer = handshake.frontend_id();
                let connect = |queue: &QueueOffer| {
                    let back = Back::new(Arc::clone(&joined.domain), self.mapper.clone(), peer);
                    let port = joined.domain.bind_port(peer, queue.event_channel.0)?;
                    let config = BackendConfig {
                        max_indirect: limits.max_indirect,
                        ..BackendConfig::new(offer.abi, offer.persistent)
                    };
                    let queue = BackendQueue::connect(back, &queue.ring, config, self.disk.info())?;
                    Ok(Queue::start(queue, port, &self.disk, &joined.bell)?)
                };
                let connected: Result<Vec<Queue>, RoleError> = offer.queues.iter().map(connect).collect();
                match connected {
                    Ok(queues) => {
                        self.serving = queues;
                        handshake.connected(&mut joined.store, &self.disk.info())?;
                    }
                    Err(error) => handshake.fail(&mut joined.store, &error.to_string())?,
                }
            }
            BackendEvent::Disconnect => {
                self.serving.clear();
                handshake.closed(&mut joined.store)?;
            }
            BackendEvent::Removed => self.handshake = None,
        }
        Ok(Step::Moved)
    }
}

/// A queue and the thread that serves it, until it is dropped.
struct Queue {
    stop: Bell,
    thread: Option<JoinHandle<()>>,
}

impl Queue {
    fn start(queue: BackendQueue<Back>, port: Port, disk: &Arc<ImageDisk>, ended: &Bell) -> io::Result<Self> {
        let stop = Bell::new()?;
        let (disk, stopped, ended) = (Arc::clone(disk), stop.clone(), ended.clone());
        let serve = move || {
            if let Err(error) = serve(queue, port, &disk, &stopped) {
                eprintln!("gnttab: backend: a queue has ended: {error}");
            }
            ended.ring();
        };
        let thread = thread::Builder::new().name("queue".to_owned()).spawn(serve)?;
        Ok(Queue {
            stop,
            thread: Some(thread),
        })
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// Serves until stopped or until the frontend's domain has gone; an error when the ring makes no sense.
fn serve(
    mut queue: BackendQueue<Back>,
    mut port: Port,
    disk: &ImageDisk,
    stop: &Bell,
) -> Result<(), RoleError> {
    let started = Instant::now();
    loop {
        // A frontend whose domain has gone sends nothing more; the store will say so too.
        let alive = port.take().is_ok();
        while queue.process(disk, &mut port, BUDGET)?.more {}
        queue.tick(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
        let mut wait = vec![PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
        if alive {
            wait.push(PollFd::from_borrowed_fd(port.as_fd(), PollFlags::IN));
        }
        match poll(&mut wait, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        if !wait[0].revents().is_empty() {
            return Ok(());
        }
    }
}
