//! The backend: serves an image to a frontend, a thread for each queue.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use gnttab_guest::Mapper;
use gnttab_host::runtime::{Domain, Port, io::Back};
use gnttab_host::spin::Spin;
use gnttab_io::blkif::handshake::{BackendEvent, BackendHandshake, BackendLimits, QueueOffer};
use gnttab_io::blkif::{BackendConfig, BackendQueue, Disk, OneShot};
use gnttab_io::grants::{Grantee, Notify};
use gnttab_io::throttle::EventThrottle;
use gnttab_io::xenbus::Store as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::{Joined, News, RoleError, Served, Sharing, Step, say, state_node};
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
    /// How the frontend's pages are reached.
    pub(crate) sharing: Sharing,
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
            persistent: self.orders.sharing == Sharing::Persistent,
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
                let number = self.orders.disk;
                let one_shot = match self.orders.sharing {
                    Sharing::Copied => OneShot::Copy,
                    Sharing::Persistent | Sharing::Mapped => OneShot::Map,
                };
                let connect = |queue: &QueueOffer| {
                    let back = Back::new(Arc::clone(&joined.domain), self.mapper.clone(), peer);
                    let port = joined.domain.bind_port(peer, queue.event_channel.0)?;
                    let config = BackendConfig {
                        max_indirect: limits.max_indirect,
                        one_shot,
                        ..BackendConfig::new(offer.abi, offer.persistent)
                    };
                    let queue = BackendQueue::connect(back, &queue.ring, config, self.disk.info())?;
                    Ok(Queue::start(queue, port, number, &self.disk, &joined.bell)?)
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
    fn start(
        mut queue: BackendQueue<Back>,
        port: Port,
        number: usize,
        disk: &Arc<ImageDisk>,
        ended: &Bell,
    ) -> io::Result<Self> {
        let disk = Arc::clone(disk);
        Queue::spawn(ended, move |stop| {
            let outcome = serve(&mut queue, port, &*disk, stop);
            let stats = queue.stats();
            let served = Served {
                requests: stats.reads + stats.writes,
                mapped: stats.mapped,
                copied: stats.copied,
            };
            say(number, News::Served(served));
            outcome
        })
    }

    fn spawn(
        ended: &Bell,
        work: impl FnOnce(&Bell) -> Result<(), RoleError> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Bell::new()?;
        let (stopped, ended) = (stop.clone(), ended.clone());
        let run = move || {
            if let Err(error) = work(&stopped) {
                complain(&error);
            }
            ended.ring();
        };
        let thread = thread::Builder::new().name("queue".to_owned()).spawn(run)?;
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

/// What a frontend can make this domain say, in all.
const MOST_COMPLAINTS: u32 = 20;

/// Says that a queue has ended before its time. A hostile frontend may come back with a broken ring as often as it likes.
fn complain(error: &RoleError) {
    static SAID: AtomicU32 = AtomicU32::new(0);
    let said = SAID.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |said| {
        (said < MOST_COMPLAINTS).then_some(said + 1)
    });
    match said {
        Ok(said) if said + 1 < MOST_COMPLAINTS => eprintln!("gnttab: backend: a queue has ended: {error}"),
        Ok(_) => eprintln!("gnttab: backend: a queue has ended: {error}; the next ones will not be told"),
        Err(_) => {}
    }
}

/// The own end of an event channel, as a queue's thread listens to it.
trait Channel: Notify + AsFd {
    /// Whether an event has come since the last time; an error once the peer has gone.
    fn take(&self) -> rustix::io::Result<bool>;
}

impl Channel for Port {
    fn take(&self) -> rustix::io::Result<bool> {
        Port::take(self)
    }
}

/// Serves until stopped or until the frontend's domain has gone; an error when the ring makes no sense.
///
/// The frontend may be hostile: one that never runs out of requests cannot keep the thread from ending, and one that sends
/// events for nothing is listened to less and less.
fn serve<G: Grantee>(
    queue: &mut BackendQueue<G>,
    mut port: impl Channel,
    disk: &impl Disk,
    stop: &Bell,
) -> Result<(), RoleError> {
    let started = Instant::now();
    let mut throttle = EventThrottle::default();
    let mut spin = Spin::default();
    loop {
        let event = port.take();
        let (mut left, mut awake) = (BUDGET, true);
        // Whether there are requests without end or none, the rest of this loop has its turn.
        while left > 0 {
            let progress = if awake {
                queue.process_awake(disk, &mut port, left)?
            } else {
                queue.process(disk, &mut port, left)?
            };
            left -= progress.served;
            if progress.served > 0 {
                spin.came();
                awake = true;
            } else if !awake {
                break;
            } else {
                awake = spin.again();
            }
        }
        queue.tick(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
        if left == 0 {
            throttle.after(true);
            if stop.is_ringing() {
                return Ok(());
            }
            continue;
        }
        let served = left < BUDGET;
        let pause = if served || event == Ok(true) {
            throttle.after(served)
        } else {
            0
        };
        let mut wait = vec![PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
        let mut patience = TICK;
        if pause > 0 {
            patience.tv_nsec = i64::from(pause % 1000) * 1_000_000;
            patience.tv_sec = (pause / 1000).into();
        } else if event.is_ok() {
            // A frontend whose domain has gone sends nothing more; the store will say so too.
            wait.push(PollFd::from_borrowed_fd(port.as_fd(), PollFlags::IN));
        }
        match poll(&mut wait, Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        if !wait[0].revents().is_empty() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{BorrowedFd, OwnedFd};
    use std::sync::Mutex;
    use std::sync::mpsc;
    use std::time::Duration;

    use gnttab_abi::Abi;
    use gnttab_io::blkif::{DiskError, DiskInfo, RawSegment, Slot};
    use gnttab_io::fake::{FakeDomain, FakeGrantee, HostileFrontend};
    use gnttab_io::grants::Access;
    use gnttab_io::shared::{SharedSlice, SharedSliceMut};

    use super::*;

    /// A channel on which an event is always pending.
    struct Flood {
        pending: OwnedFd,
        looks: Arc<AtomicU32>,
    }

    impl Flood {
        fn new() -> Flood {
            let flags = rustix::event::EventfdFlags::empty();
            Flood {
                pending: rustix::event::eventfd(1, flags).unwrap(),
                looks: Arc::default(),
            }
        }
    }

    impl Notify for Flood {
        fn notify(&mut self) {}
    }

    impl AsFd for Flood {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.pending.as_fd()
        }
    }

    impl Channel for Flood {
        fn take(&self) -> rustix::io::Result<bool> {
            self.looks.fetch_add(1, Ordering::SeqCst);
            Ok(true)
        }
    }

    /// A disk by which a frontend learns that it was served, and asks again before it is answered.
    struct Insatiable {
        frontend: Mutex<(HostileFrontend, Slot)>,
        served: AtomicU32,
        /// Rung at the thousandth request.
        stop: Bell,
    }

    impl Disk for Insatiable {
        fn info(&self) -> DiskInfo {
            DiskInfo::new(64)
        }

        fn read(&self, _: u64, _: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
            let (frontend, slot) = &mut *self.frontend.lock().unwrap();
            frontend.send(slot);
            if self.served.fetch_add(1, Ordering::SeqCst) == 1000 {
                self.stop.ring();
            }
            Ok(())
        }

        fn write(&self, _: u64, _: &[SharedSlice<'_>]) -> Result<(), DiskError> {
            Ok(())
        }

        fn flush(&self) -> Result<(), DiskError> {
            Ok(())
        }

        fn discard(&self, _: u64, _: u64, _: bool) -> Result<(), DiskError> {
            Ok(())
        }
    }

    fn hostile(domain: &FakeDomain) -> (HostileFrontend, BackendQueue<FakeGrantee>) {
        let frontend = HostileFrontend::new(domain, Abi::X86_64, 1).unwrap();
        let config = BackendConfig::new(Abi::X86_64, true);
        let queue = BackendQueue::connect(domain.grantee(), frontend.ring(), config, DiskInfo::new(64));
        (frontend, queue.unwrap())
    }

    /// PVR-8: who is stopped stops, though there is always one more request.
    #[test]
    fn a_frontend_that_never_runs_out_of_requests_cannot_keep_its_queue_alive() {
        let domain = FakeDomain::new();
        let (mut frontend, mut queue) = hostile(&domain);
        let (gref, _page) = frontend.data_page(Access::ReadWrite).unwrap();
        let mut slot = Slot::new(Abi::X86_64);
        slot.set_second(1);
        let (first_sect, last_sect) = (0, 7);
        slot.set_segment(
            0,
            RawSegment {
                gref,
                first_sect,
                last_sect,
            },
        );
        frontend.send(&slot);
        let stop = Bell::new().unwrap();
        let disk = Insatiable {
            frontend: Mutex::new((frontend, slot)),
            served: AtomicU32::new(0),
            stop: stop.clone(),
        };
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            let outcome = serve(&mut queue, Flood::new(), &disk, &stop).map_err(|error| error.to_string());
            drop(queue);
            let _ = ended.send((outcome, disk.served.load(Ordering::SeqCst)));
        });
        let (outcome, served) = end
            .recv_timeout(Duration::from_secs(20))
            .expect("it serves on and on");
        assert_eq!(outcome, Ok(()));
        assert!(served <= 1001 + BUDGET, "{served} requests");
        assert_eq!(domain.mappings(), 0);
    }

    /// XSA-332: a frontend that sends events as fast as it can, for nothing, does not keep the thread busy.
    #[test]
    fn a_flood_of_events_for_nothing_costs_a_few_looks() {
        let domain = FakeDomain::new();
        let (frontend, mut queue) = hostile(&domain);
        let stop = Bell::new().unwrap();
        let flood = Flood::new();
        let looks = Arc::clone(&flood.looks);
        let disk = Insatiable {
            frontend: Mutex::new((frontend, Slot::new(Abi::X86_64))),
            served: AtomicU32::new(0),
            stop: stop.clone(),
        };
        let stopped = stop.clone();
        let server = thread::spawn(move || serve(&mut queue, flood, &disk, &stopped).is_ok());
        thread::sleep(Duration::from_millis(400));
        stop.ring();
        assert!(server.join().unwrap());
        let looks = looks.load(Ordering::SeqCst);
        assert!((3..50).contains(&looks), "{looks} looks in 400 ms");
    }

    /// XSA-350, XSA-374: stopped before it has begun, stopped after it has failed, stopped twice: joined once.
    #[test]
    fn a_queue_ends_once_however_fast_it_is_stopped() {
        let ended = Bell::new().unwrap();
        for round in 0..300 {
            let domain = FakeDomain::new();
            let (mut frontend, mut queue) = hostile(&domain);
            if round % 3 == 0 {
                frontend.set_req_prod(1 << 30);
            }
            let queue = Queue::spawn(&ended, move |stop| {
                let image = crate::image::Image::generate(4096)?;
                let disk = ImageDisk::new(image.file().try_clone()?, 4096, false);
                serve(&mut queue, Flood::new(), &disk, stop)
            })
            .unwrap();
            if round % 3 == 1 {
                thread::yield_now();
            }
            if round % 2 == 0 {
                queue.stop.ring();
            }
            drop(queue);
            assert_eq!(
                domain.mappings(),
                0,
                "round {round}: everything is unmapped when the queue is gone"
            );
        }
    }
}
