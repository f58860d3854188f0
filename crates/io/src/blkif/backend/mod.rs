//! The backend's half of one queue: takes requests from the ring, moves data between the peer's pages and a
//! [`Disk`], answers.
//!
//! # Rules
//! 1. A request is judged on its private copy, in the order of spec 2.2; the segments of an indirect request
//!    are copied out of their pages once, and judged on that copy.
//! 2. The peer's data pages are never looked at. They go to the disk as addresses and lengths: what the peer
//!    writes into them meanwhile changes its own data and nothing else. No `&[u8]` over them exists.
//! 3. Whatever a request holds, it gets exactly one answer, and every page that was mapped for it alone is
//!    unmapped before, on every path.
//! 4. A call of [`BackendQueue::process`] serves at most as many requests as it was told to.
//! 5. A ring that makes no sense is an error that ends this connection and concerns nobody else.
//! 6. Answers are visible to the peer at once; the event that it asked for may wait for further answers, but
//!    never while nothing is being served, nor while something slower than moving data is.
//! 7. All mappings go when the queue is dropped (PVR-9).
//!
//! With persistent grants the working set of pages stays mapped, and a request costs a look-up for each page
//! and one disk operation: no hypercall. Requests of one queue are served one after the other, which keeps
//! their order and makes barriers free; depth comes from having several queues, each on a thread of its own.

mod persistent;
mod server;
mod types;

use alloc::vec::Vec;
use core::fmt;

use gnttab_abi::GrantRef;

use self::server::Server;
pub use self::types::{BackendConfig, BackendStats, ConnectError, Failure, OneShot, Progress};
use super::disk::{Disk, DiskInfo};
use super::layout::{Slot, response_size, slot_size};
use super::request::{Operation, answer};
use crate::grants::{Grantee, Notify};
use crate::ring::{BackRing, RingBroken};

/// The backend's half of one queue of a block device.
///
/// ```
/// use gnttab_abi::Abi;
/// use gnttab_io::blkif::{BackendConfig, BackendQueue, Disk as _};
/// use gnttab_io::fake::{FakeDomain, NullPort, RamDisk};
///
/// let frontend = FakeDomain::new();
/// let ring = frontend.grant_ring(1, 112);
/// let disk = RamDisk::new(64);
/// let config = BackendConfig::new(Abi::X86_64, true);
/// let mut queue = BackendQueue::connect(frontend.grantee(), &ring, config, disk.info())?;
/// let progress = queue.process(&disk, &mut NullPort, 32)?;
/// assert_eq!(progress.served, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BackendQueue<G: Grantee> {
    // `None` only while the queue is dropped.
    ring: Option<BackRing<G::Mapping>>,
    server: Server<G>,
}

/// Most answers that an event waits for, and most bytes that are moved meanwhile. A peer that is woken for
/// every answer spends its time on waking up; one that waits for long loses the time in which it could have
/// worked on what it has.
const HELD_ANSWERS: u32 = 16;
const HELD_BYTES: u64 = 256 << 10;

/// The peer's event, while it waits for more answers.
struct HeldEvent {
    /// The peer has asked for it.
    owed: bool,
    /// Answers since the last one.
    answers: u32,
    /// Bytes that had been moved then.
    since: u64,
}

impl HeldEvent {
    fn is_due(&self, stats: &BackendStats) -> bool {
        self.answers >= HELD_ANSWERS || stats.bytes() - self.since >= HELD_BYTES
    }

    /// Sends the event, if it is owed; the next one begins to wait.
    fn send(&mut self, stats: &mut BackendStats, port: &mut impl Notify) {
        if core::mem::take(&mut self.owed) {
            stats.notifications += 1;
            port.notify();
        }
        (self.answers, self.since) = (0, stats.bytes());
    }
}

impl<G: Grantee> BackendQueue<G> {
    /// Maps the ring that the frontend granted and attaches to it. A ring in use is taken up where the
    /// backend before left it.
    ///
    /// # Errors
    /// [`ConnectError`]; nothing stays mapped then.
    pub fn connect(
        mut grantee: G,
        ring: &[GrantRef],
        config: BackendConfig,
        disk: DiskInfo,
    ) -> Result<Self, ConnectError> {
        let mapping = grantee.map_run(ring).map_err(ConnectError::Map)?;
        match BackRing::attach(mapping, slot_size(config.abi)) {
            Ok(ring) => Ok(BackendQueue {
                ring: Some(ring),
                server: Server::new(grantee, config, disk),
            }),
            Err(failed) => {
                grantee.unmap(&mut Vec::from([failed.pages]));
                Err(failed.error.into())
            }
        }
    }

    /// Serves up to `budget` requests. Call it when the peer has sent an event, and again while
    /// [`Progress::more`] says so; otherwise wait for the next event.
    ///
    /// # Errors
    /// [`RingBroken`]: the ring is dead, now and at every later call. Disconnect.
    pub fn process(
        &mut self,
        disk: &impl Disk,
        port: &mut impl Notify,
        budget: u32,
    ) -> Result<Progress, RingBroken> {
        self.process_and(true, disk, port, budget)
    }

    /// As [`BackendQueue::process`], for a caller that looks again instead of sleeping: no event is asked for, and the
    /// frontend need not send one.
    ///
    /// # Errors
    /// As [`BackendQueue::process`].
    pub fn process_awake(
        &mut self,
        disk: &impl Disk,
        port: &mut impl Notify,
        budget: u32,
    ) -> Result<Progress, RingBroken> {
        self.process_and(false, disk, port, budget)
    }

    fn process_and(
        &mut self,
        ask: bool,
        disk: &impl Disk,
        port: &mut impl Notify,
        budget: u32,
    ) -> Result<Progress, RingBroken> {
        let BackendQueue {
            ring: Some(ring),
            server,
        } = self
        else {
            return Ok(Progress {
                served: 0,
                more: false,
            });
        };
        let mut event = HeldEvent {
            owed: false,
            answers: 0,
            since: server.stats.bytes(),
        };
        let outcome = serve_all(ring, server, disk, port, (budget, ask), &mut event);
        // On every way out: a peer that asked for an event gets it.
        event.send(&mut server.stats, port);
        outcome
    }

    /// Tells the queue the time, in milliseconds from any start: from time to time it lets go of persistent
    /// mappings that nobody uses. Every 100 ms is enough.
    pub fn tick(&mut self, now_ms: u64) {
        let mut old = self.server.persistent.purge(now_ms);
        self.server.grantee.unmap(&mut old);
    }

    /// Takes over a disk whose size or nature has changed.
    pub fn set_disk(&mut self, disk: DiskInfo) {
        self.server.disk = disk;
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> BackendStats {
        self.server.stats
    }

    /// Persistent mappings held now.
    #[must_use]
    pub fn persistent_mappings(&self) -> usize {
        self.server.persistent.len()
    }

    /// Why the last request that failed did.
    #[must_use]
    pub fn last_failure(&self) -> Option<Failure> {
        self.server.last_failure
    }

    /// Unmaps everything, as dropping does.
    pub fn disconnect(self) {}
}

/// Serves up to `budget` requests, and asks for an event at the next one if it should; one for the peer may still be held
/// afterwards.
fn serve_all<G: Grantee>(
    ring: &mut BackRing<G::Mapping>,
    server: &mut Server<G>,
    disk: &impl Disk,
    port: &mut impl Notify,
    (budget, ask): (u32, bool),
    event: &mut HeldEvent,
) -> Result<Progress, RingBroken> {
    let abi = server.config.abi;
    let mut slot = Slot::new(abi);
    let mut served = 0;
    loop {
        while served < budget
            && let Some(owed) = ring.take(slot.bytes_mut())?
        {
            if !moves_data(&slot) {
                event.send(&mut server.stats, port);
            }
            let status = server.serve(&slot, disk);
            ring.respond(owed, &answer(&slot, status).to_bytes()[..response_size(abi)]);
            event.owed |= ring.publish();
            event.answers += 1;
            if event.is_due(&server.stats) {
                event.send(&mut server.stats, port);
            }
            served += 1;
        }
        if served >= budget {
            return Ok(Progress { served, more: true });
        }
        if !ask || !ring.final_check()? {
            return Ok(Progress { served, more: false });
        }
    }
}

/// Whether a request is a plain read or write, by what its slot says.
fn moves_data(slot: &Slot) -> bool {
    [Operation::Read, Operation::Write, Operation::Indirect]
        .iter()
        .any(|operation| operation.code() == slot.operation())
}

impl<G: Grantee> fmt::Debug for BackendQueue<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendQueue")
            .field("config", &self.server.config)
            .field("persistent_mappings", &self.persistent_mappings())
            .field("stats", &self.server.stats)
            .finish_non_exhaustive()
    }
}

impl<G: Grantee> Drop for BackendQueue<G> {
    fn drop(&mut self) {
        let Server {
            persistent,
            one_shot,
            grantee,
            ..
        } = &mut self.server;
        let mut all = persistent.drain();
        all.append(one_shot);
        all.extend(self.ring.take().map(BackRing::into_pages));
        grantee.unmap(&mut all);
    }
}
