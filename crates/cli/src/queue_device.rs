//! One queue of a blkif frontend as a [`BlockDevice`]: what the export asks becomes what blkif has.
//!
//! blkif has no zeroing and no write that is durable by itself, so zeroing becomes writes of zeros, a piece at a time, and
//! a durable write becomes a write and then a flush. The queue is shared with whoever connects and reconnects it to its
//! backend; while it is not connected requests wait in it, and after a reconnect those that were not answered are sent
//! again.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gnttab_abi::PAGE_SIZE;
use gnttab_host::spin::Spin;
use gnttab_io::blkif::{self, Awaited, FrontendQueue, Io, IoError};
use gnttab_io::grants::{Granter, Notify};
use gnttab_io::shared::SharedSliceMut;
use rustix::event::{Timespec, epoll};

use crate::bell::Bell;
use crate::block::{BlockDevice, Completion, Data, DeviceError, Geometry, Lease, Operation, Pages, Request};
use crate::image::SECTOR;

/// As many answers, or bytes, are worth going on with, though more are to come: who turns to his client for each of many
/// wakes it for each.
const ENOUGH: u32 = 16;
const ENOUGH_BYTES: u64 = 256 << 10;

/// Bytes of zeros written at a time.
const ZEROES: u64 = 128 << 10;

/// The receiving end of a queue's event channel.
pub(crate) trait Port: Notify + Send {
    /// Forgets the events that have come.
    fn clear(&mut self);
}

/// A queue that its worker and whoever connects it share. The lock is free but for the moments of connecting.
pub(crate) struct SharedQueue<G: Granter, N> {
    queue: Mutex<FrontendQueue<G, N>>,
    /// An epoll: readable when the backend has sent an event on the current connection. What is waited on through it can change
    /// while the worker sleeps.
    event: OwnedFd,
    /// How the backend broke the protocol, until whoever connects the queue has taken note.
    broken: Mutex<Option<blkif::DeviceBroken>>,
    /// Rung then.
    bell: Bell,
}

impl<G: Granter, N: Notify> SharedQueue<G, N> {
    pub(crate) fn new(queue: FrontendQueue<G, N>, bell: Bell) -> io::Result<Self> {
        let event = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(SharedQueue {
            queue: Mutex::new(queue),
            event,
            broken: Mutex::new(None),
            bell,
        })
    }

    /// Wakes the worker by this port too. It leaves by itself when it is closed.
    pub(crate) fn watch(&self, port: impl AsFd) -> io::Result<()> {
        // Edge by edge, so that a backend that has hung up wakes the worker once and not for ever.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.event,
            port,
            epoll::EventData::new_u64(0),
            flags,
        )?)
    }

    /// How the backend broke the protocol, if it did since the last call.
    pub(crate) fn take_broken(&self) -> Option<blkif::DeviceBroken> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set_broken(&self, broken: blkif::DeviceBroken) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(broken);
        self.bell.ring();
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, FrontendQueue<G, N>> {
        // Nothing that is done under the lock panics half-way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
pub(crate) struct QueueDevice<G: Granter, N> {
    shared: Arc<SharedQueue<G, N>>,
    geometry: Geometry,
    /// By token.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    ready: Vec<Completion>,
    /// What the backend had answered when it was last looked at.
    responses: u64,
    spin: Spin,
}

/// A request of the export, and what of it is still to be done.
#[derive(Debug)]
struct Job {
    tag: u64,
    length: u32,
    /// Zeroing: what has not been sent, first byte and the byte after the last.
    zeroes: std::ops::Range<u64>,
    /// A flush is to follow.
    flush: bool,
}

impl<G: Granter, N: Port> QueueDevice<G, N> {
    pub(crate) fn new(shared: Arc<SharedQueue<G, N>>, geometry: Geometry) -> Self {
        QueueDevice {
            shared,
            geometry,
            jobs: Vec::new(),
            free: Vec::new(),
            ready: Vec::new(),
            responses: 0,
            spin: Spin::default(),
        }
    }

    /// How many answers to so many requests are worth going on with.
    fn enough(&self, requests: u32) -> u32 {
        let bytes: u64 = self.jobs.iter().flatten().map(|job| u64::from(job.length)).sum();
        let each = bytes / u64::from(requests.max(1));
        let count = ENOUGH_BYTES
            .checked_div(each)
            .and_then(|count| u32::try_from(count).ok());
        count.unwrap_or(ENOUGH).clamp(1, ENOUGH)
    }

    fn begin(&mut self, job: Job) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[slot] = Some(job);
        slot
    }

    fn send(&mut self, queue: &mut FrontendQueue<G, N>, slot: usize, io: Io) {
        if let Err(rejected) = queue.submit(slot as u64, io) {
            // The export checked the request against the geometry. A disk that has shrunk since then is an error.
            self.end(slot, Err(DeviceError::Io), data_of(rejected.io));
        }
    }

    fn end(&mut self, slot: usize, result: Result<(), DeviceError>, data: Data) {
        if let Some(job) = self.jobs.get_mut(slot).and_then(Option::take) {
            self.free.push(slot);
            self.ready.push(Completion {
                tag: job.tag,
                result,
                data,
            });
        }
    }

    /// The next step of a job that has taken one, or its end.
    fn go_on(&mut self, queue: &mut FrontendQueue<G, N>, done: blkif::Completion) {
        let Ok(slot) = usize::try_from(done.token) else {
            return;
        };
        let Some(job) = self.jobs.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        let mut data = data_of(done.io);
        if let Err(error) = done.result {
            let error = match error {
                IoError::NotSupported => DeviceError::Unsupported,
                IoError::Failed | IoError::Grant(_) => DeviceError::Io,
            };
            self.end(slot, Err(error), data);
        } else if !job.zeroes.is_empty() {
            let (start, length) = next_zeroes(&mut job.zeroes);
            if let Data::Own(zeroes) = &mut data {
                zeroes.truncate(length);
            }
            self.send(
                queue,
                slot,
                Io::Write {
                    sector: start / SECTOR,
                    data,
                },
            );
        } else if std::mem::take(&mut job.flush) {
            self.send(queue, slot, Io::Flush);
        } else {
            self.end(slot, Ok(()), data);
        }
    }
}

/// Takes the next piece off the front: where it starts, and its bytes.
fn next_zeroes(left: &mut std::ops::Range<u64>) -> (u64, usize) {
    let start = left.start;
    let length = (left.end - start).min(ZEROES);
    left.start += length;
    (start, usize::try_from(length).unwrap_or(0))
}

fn data_of(io: Io) -> Data {
    match io {
        Io::Read { data, .. } | Io::Write { data, .. } => data,
        Io::Flush | Io::Discard { .. } => Data::default(),
    }
}

impl<G: Granter, N: Notify> Pages for MutexGuard<'_, FrontendQueue<G, N>> {
    fn lease(&mut self, len: usize) -> Option<Lease> {
        (**self).lease(len)
    }

    fn give_back(&mut self, lease: Lease) {
        (**self).give_back(lease);
    }

    fn parts(&self, lease: &Lease, from: usize) -> Vec<SharedSliceMut<'_>> {
        let mut parts = Vec::with_capacity(lease.len().saturating_sub(from).div_ceil(PAGE_SIZE) + 1);
        parts.extend(self.leased(lease, from));
        parts
    }
}

impl<G, N> BlockDevice for QueueDevice<G, N>
where
    G: Granter + Send,
    G::Pages: Send,
    N: Port,
{
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The queue is locked as long as the pages are looked at.
    fn pages(&mut self) -> impl Pages + '_ {
        self.shared.lock()
    }

    fn submit(&mut self, request: Request) {
        let sector = request.offset / SECTOR;
        let mut job = Job {
            tag: request.tag,
            length: request.length,
            zeroes: 0..0,
            flush: false,
        };
        let io = match request.operation {
            Operation::Read => Io::Read {
                sector,
                data: request.data,
            },
            Operation::Write { fua } => {
                job.flush = fua;
                Io::Write {
                    sector,
                    data: request.data,
                }
            }
            Operation::Flush => Io::Flush,
            Operation::Discard => Io::Discard {
                sector,
                count: u64::from(request.length) / SECTOR,
                secure: false,
            },
            Operation::WriteZeroes { fua, .. } => {
                job.flush = fua;
                job.zeroes = request.offset..request.offset + u64::from(request.length);
                let (_, length) = next_zeroes(&mut job.zeroes);
                Io::Write {
                    sector,
                    data: vec![0; length].into(),
                }
            }
        };
        let slot = self.begin(job);
        let shared = Arc::clone(&self.shared);
        self.send(&mut shared.lock(), slot, io);
    }

    fn kick(&mut self) {
        self.shared.lock().kick();
    }

    fn completions(&mut self, into: &mut Vec<Completion>) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut queue = shared.lock();
        loop {
            match queue.poll_awake() {
                Ok(Some(done)) => self.go_on(&mut queue, done),
                Ok(None) => break,
                Err(broken) => {
                    shared.set_broken(broken);
                    break;
                }
            }
        }
        let before = std::mem::replace(&mut self.responses, queue.stats().responses);
        drop(queue);
        let any = self.responses != before || !self.ready.is_empty();
        if any {
            self.spin.came();
        }
        into.append(&mut self.ready);
        any
    }

    fn linger(&mut self, awake: bool) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut queue = shared.lock();
        let mut enough = None;
        while awake
            && let Ok(Awaited { answered, unanswered }) = queue.awaited()
            && unanswered > 0
            && answered < *enough.get_or_insert_with(|| self.enough(answered + unanswered))
            && self.spin.again()
        {}
        let outcome = queue.awaited().and_then(|awaited| {
            match awaited {
                // Nothing to wait for, so no event is asked for either, which would come in the next wait's way.
                Awaited {
                    answered: 0,
                    unanswered: 0,
                } => return Ok(false),
                Awaited { answered: 0, .. } => {}
                _ => return Ok(true),
            }
            let done = queue.poll()?;
            let any = done.is_some();
            done.into_iter().for_each(|done| self.go_on(&mut queue, done));
            Ok(any)
        });
        outcome.unwrap_or_else(|broken| {
            shared.set_broken(broken);
            false
        })
    }

    fn hush(&mut self) {
        let mut events = [MaybeUninit::uninit(); 4];
        // It cannot fail but by an interruption, and then it is called again.
        let _ = epoll::wait(&self.shared.event, &mut events, Some(&Timespec::default()));
        if let Some(port) = self.shared.lock().port_mut() {
            port.clear();
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.event.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use gnttab_abi::Abi;
    use gnttab_io::blkif::{BackendConfig, BackendQueue, DeviceProperties, Disk as _, FrontendConfig};
    use gnttab_io::fake::{Event, FakeDomain, FakeGrantee, FakeGranter};

    use super::*;
    use crate::image::Image;
    use crate::image_disk::ImageDisk;

    impl Port for Event {
        fn clear(&mut self) {}
    }

    const SIZE: u64 = 4 << 20;

    /// A frontend's device and the backend behind it, in one thread.
    struct Pair {
        device: QueueDevice<FakeGranter, Event>,
        backend: BackendQueue<FakeGrantee>,
        disk: ImageDisk,
        image: Image,
        /// What the backend sends.
        event: Event,
        domain: FakeDomain,
        ring: gnttab_abi::GrantRef,
    }

    impl Pair {
        fn new() -> Self {
            let image = Image::generate(SIZE).unwrap();
            let disk = ImageDisk::new(image.file().try_clone().unwrap(), SIZE, false);
            let domain = FakeDomain::new();
            let mut front = FrontendQueue::new(domain.granter(), FrontendConfig::new(Abi::X86_64));
            let ring = front.open(1, Event::new()).unwrap();
            let config = BackendConfig::new(Abi::X86_64, true);
            let backend = BackendQueue::connect(domain.grantee(), &ring, config, disk.info()).unwrap();
            front.start(DeviceProperties {
                disk: disk.info(),
                barrier: false,
                persistent: true,
                max_indirect: 256,
            });
            let shared = Arc::new(SharedQueue::new(front, Bell::new().unwrap()).unwrap());
            let geometry = Geometry {
                size: SIZE,
                block_size: 512,
                preferred_size: 4096,
                read_only: false,
                flush: true,
                discard: true,
            };
            Pair {
                device: QueueDevice::new(shared, geometry),
                backend,
                disk,
                image,
                event: Event::new(),
                domain,
                ring: ring[0],
            }
        }

        fn read(&mut self) {
            self.device.submit(Request {
                tag: 7,
                operation: Operation::Read,
                offset: 0,
                length: 4096,
                data: vec![0; 4096].into(),
            });
            self.device.kick();
        }

        fn serve(&mut self) {
            let served = self.backend.process(&self.disk, &mut self.event, 64);
            assert_eq!(served.unwrap().served, 1);
        }

        fn run(&mut self, operation: Operation, offset: u64, length: usize, data: Vec<u8>) -> Completion {
            let length = u32::try_from(length).unwrap();
            self.device.submit(Request {
                tag: 7,
                operation,
                offset,
                length,
                data: data.into(),
            });
            let mut done = Vec::new();
            for _ in 0..1000 {
                self.device.kick();
                self.backend.process(&self.disk, &mut Event::new(), 64).unwrap();
                self.device.completions(&mut done);
                if let Some(completion) = done.pop() {
                    assert_eq!(completion.tag, 7);
                    return completion;
                }
            }
            panic!("no answer");
        }

        fn content(&self, offset: u64, length: usize) -> Vec<u8> {
            use std::os::unix::fs::FileExt as _;
            let mut bytes = vec![0; length];
            self.image.file().read_exact_at(&mut bytes, offset).unwrap();
            bytes
        }
    }

    #[test]
    fn reads_and_writes_of_any_length_cross_the_ring() {
        let mut pair = Pair::new();
        let read = pair.run(Operation::Read, 512, 1 << 20, vec![0; 1 << 20]);
        assert_eq!(read.result, Ok(()));
        assert!(read.data == pair.content(512, 1 << 20));
        let data: Vec<u8> = (0..300 * 1024_u32).map(|i| i.to_le_bytes()[1] ^ 0x5a).collect();
        let write = pair.run(Operation::Write { fua: false }, 4096, data.len(), data.clone());
        assert_eq!(write.result, Ok(()));
        assert!(pair.content(4096, data.len()) == data);
    }

    /// blkif has no write with forced unit access: it must flush behind the write, and only there.
    #[test]
    fn a_durable_write_is_a_write_and_a_flush() {
        let mut pair = Pair::new();
        pair.run(Operation::Write { fua: false }, 0, 512, vec![1; 512]);
        assert_eq!(pair.backend.stats().flushes, 0);
        pair.run(Operation::Write { fua: true }, 0, 512, vec![2; 512]);
        assert_eq!(
            (pair.backend.stats().writes, pair.backend.stats().flushes),
            (2, 1)
        );
    }

    #[test]
    fn zeroing_writes_zeros_over_all_of_it_and_nothing_else() {
        let mut pair = Pair::new();
        let (offset, length) = (1024, 3 * 128 * 1024 + 512);
        let (before, after) = (pair.content(0, 1024), pair.content(offset + length as u64, 1024));
        assert_eq!(
            pair.run(
                Operation::WriteZeroes {
                    fua: true,
                    no_hole: true
                },
                offset,
                length,
                Vec::new()
            )
            .result,
            Ok(())
        );
        assert!(pair.content(offset, length).iter().all(|&byte| byte == 0));
        assert_eq!(
            (pair.content(0, 1024), pair.content(offset + length as u64, 1024)),
            (before, after)
        );
        assert_eq!(pair.backend.stats().flushes, 1);
    }

    #[test]
    fn what_is_discarded_reads_as_zeros_from_a_file() {
        let mut pair = Pair::new();
        assert_eq!(
            pair.run(Operation::Discard, 8192, 8192, Vec::new()).result,
            Ok(())
        );
        assert_eq!(pair.content(8192, 8192), [0; 8192]);
    }

    #[test]
    fn a_request_past_the_disk_is_an_error() {
        let mut pair = Pair::new();
        let past = pair.run(Operation::Read, SIZE, 512, vec![0; 512]);
        assert_eq!(past.result, Err(DeviceError::Io));
    }

    /// An event behind which is a part of what was asked is not one for nothing: who took it for that listened less and
    /// less to an honest backend.
    #[test]
    fn a_part_that_is_done_is_progress_though_it_is_no_answer() {
        let mut pair = Pair::new();
        let pieces = 3;
        pair.device.submit(Request {
            tag: 7,
            operation: Operation::WriteZeroes {
                fua: false,
                no_hole: true,
            },
            offset: 0,
            length: pieces * (128 << 10),
            data: Data::default(),
        });
        let mut done = Vec::new();
        for piece in 1..=pieces {
            pair.device.kick();
            assert!(!pair.device.completions(&mut done), "nothing was served");
            pair.backend.process(&pair.disk, &mut Event::new(), 64).unwrap();
            assert!(pair.device.completions(&mut done));
            assert_eq!(done.len(), usize::from(piece == pieces));
        }
    }

    /// An event comes for an answer that is waited for asleep, and for no other.
    #[test]
    fn who_lingers_is_woken_only_when_that_did_not_help() {
        let mut pair = Pair::new();
        let mut done = Vec::new();
        assert!(!pair.device.linger(true), "there is nothing to wait for");
        pair.read();
        pair.serve();
        assert!(pair.device.linger(false), "it is answered already");
        assert!(pair.device.completions(&mut done));
        // The ring began with an event asked for.
        assert_eq!((done.len(), pair.event.sent()), (1, 1));
        pair.read();
        assert!(!pair.device.completions(&mut done));
        pair.serve();
        assert!(pair.device.completions(&mut done));
        assert!(!pair.device.linger(true));
        assert_eq!((done.len(), pair.event.sent()), (2, 1), "nobody slept");
        for awake in [true, false] {
            let before = pair.event.sent();
            pair.read();
            assert!(!pair.device.linger(awake), "nobody answers");
            pair.serve();
            assert_eq!(pair.event.sent(), before + 1);
            assert!(pair.device.linger(awake));
            assert!(pair.device.completions(&mut done));
        }
    }

    /// There is nothing to wait for on a broken ring, and the one who can mend that is told.
    #[test]
    fn nobody_lingers_on_a_broken_ring() {
        let mut pair = Pair::new();
        pair.read();
        let domain = pair.domain.clone();
        let ring = domain.peek(pair.ring).unwrap();
        ring.write(8, &7_u32.to_le_bytes());
        assert!(!pair.device.linger(true));
        assert!(pair.device.shared.take_broken().is_some());
    }

    #[test]
    fn what_is_waited_for_at_most_is_what_an_event_waits_for() {
        let mut pair = Pair::new();
        assert_eq!(pair.device.enough(0), ENOUGH);
        pair.read();
        assert_eq!(pair.device.enough(1), ENOUGH);
        pair.device.submit(Request {
            tag: 8,
            operation: Operation::Read,
            offset: 0,
            length: 128 << 10,
            data: vec![0; 128 << 10].into(),
        });
        assert_eq!(pair.device.enough(1), 1);
        assert_eq!(pair.device.enough(2), 3);
    }
}
