//! The sockets and threads around [`Connection`]: one thread for each queue of the disk, which owns the queue and the
//! connections that were given to it, and one that lets clients in.
//!
//! A worker sleeps in one `poll` over its clients, its queue's event and its mailbox; on the way from a client's request
//! to the disk and back no other thread is woken.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use gnttab_io::throttle::EventThrottle;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::connection::{Connection, Export, Room};
use super::listener::{Listener, Stream};
use crate::bell::Bell;
use crate::block::{BlockDevice, Completion, Data, Operation, Pages, Request};
use crate::vectored::{self, Pieces};

/// Clients at a time, over all queues; the next one takes the place of one that has never asked for anything, or else is
/// turned away by closing its connection. With what one of them can make us hold (a request of 32 MiB and a little) this
/// bounds the server's memory.
const MAX_CLIENTS: usize = 16;

/// Bytes that are submitted for a client before answers are sent: about what stays in the processor's cache.
const ROUND: usize = 512 << 10;

/// With more requests than these under way nobody waits for one.
const FEW: usize = 4;

/// The most pieces of memory that one write takes.
const PIECES: usize = 256;

/// How long clients may take, since places are few.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For the handshake: whoever is not through with it by then is hung up on.
    pub(super) handshake: Duration,
    /// To ask for something: whoever has not by then loses its place when another wants it. Who has asked once keeps it:
    /// behind that may be a mounted disk, at which nobody is working.
    pub(super) first_request: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            handshake: Duration::from_secs(5),
            first_request: Duration::from_secs(30),
        }
    }
}

/// How long a stop waits for requests under way and for clients to take their answers.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What the server has done so far. Read at any time without stopping it.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    clients: AtomicUsize,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Totals {
    /// Clients connected now.
    pub(crate) clients: usize,
    /// Reads done.
    pub(crate) reads: u64,
    /// Writes and zeroings done.
    pub(crate) writes: u64,
    /// Flushes done.
    pub(crate) flushes: u64,
    /// Discards done.
    pub(crate) discards: u64,
    /// Bytes read.
    pub(crate) bytes_read: u64,
    /// Bytes written or zeroed.
    pub(crate) bytes_written: u64,
    /// Requests that the disk failed.
    pub(crate) errors: u64,
}

impl Totals {
    /// The sum; the clients are the other's.
    pub(crate) fn plus(&self, other: &Totals) -> Totals {
        Totals {
            clients: other.clients,
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            flushes: self.flushes + other.flushes,
            discards: self.discards + other.discards,
            bytes_read: self.bytes_read + other.bytes_read,
            bytes_written: self.bytes_written + other.bytes_written,
            errors: self.errors + other.errors,
        }
    }
}

impl Counters {
    /// What they are now.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            clients: self.clients.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            flushes: self.flushes.load(Ordering::Relaxed),
            discards: self.discards.load(Ordering::Relaxed),
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }

    fn count(&self, operation: Operation, length: u32, ok: bool) {
        if !ok {
            self.errors.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (count, bytes) = match operation {
            Operation::Read => (&self.reads, Some(&self.bytes_read)),
            Operation::Write { .. } | Operation::WriteZeroes { .. } => {
                (&self.writes, Some(&self.bytes_written))
            }
            Operation::Flush => (&self.flushes, None),
            Operation::Discard => (&self.discards, None),
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(bytes) = bytes {
            bytes.fetch_add(u64::from(length), Ordering::Relaxed);
        }
    }
}

/// A running server. [`stop`](Server::stop) it; dropping it stops it too.
#[derive(Debug)]
pub(crate) struct Server {
    counters: Arc<Counters>,
    stop: Bell,
    acceptor: Option<JoinHandle<Listener>>,
}

impl Server {
    /// Serves one disk whose queues are `devices` (one at least) to whoever connects to `listener`.
    pub(crate) fn start<D: BlockDevice + 'static>(
        listener: Listener,
        export: Export,
        devices: Vec<D>,
    ) -> io::Result<Self> {
        Self::start_with_patience(listener, export, devices, Patience::default())
    }

    /// [`start`](Self::start), with the time that clients may take.
    pub(super) fn start_with_patience<D: BlockDevice + 'static>(
        listener: Listener,
        export: Export,
        devices: Vec<D>,
        patience: Patience,
    ) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let stop = Bell::new()?;
        let export = Arc::new(export);
        let began = Instant::now();
        let mut workers = Vec::new();
        for (index, device) in devices.into_iter().enumerate() {
            let bell = Bell::new()?;
            let (mail, mailbox) = mpsc::channel();
            let load = Arc::new(Load {
                clients: AtomicUsize::new(0),
                mute_since: AtomicU64::new(NOBODY),
            });
            let worker = Worker {
                device,
                export: Arc::clone(&export),
                patience,
                counters: Arc::clone(&counters),
                load: Arc::clone(&load),
                bell: bell.clone(),
                mailbox,
                clients: Vec::new(),
                next_id: 0,
                began,
                throttle: EventThrottle::default(),
                woken: false,
                deaf_until: None,
            };
            let thread = thread::Builder::new()
                .name(format!("queue {index}"))
                .spawn(move || worker.run())?;
            workers.push(WorkerHandle {
                mail: Some(mail),
                bell,
                load,
                thread: Some(thread),
            });
        }
        let acceptor = Acceptor {
            listener,
            workers,
            counters: Arc::clone(&counters),
            stop: stop.clone(),
        };
        let acceptor = thread::Builder::new()
            .name("accept".to_owned())
            .spawn(move || acceptor.run())?;
        Ok(Server {
            counters,
            stop,
            acceptor: Some(acceptor),
        })
    }

    /// What the server has done so far.
    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Lets nobody in any more, finishes what is under way (for some seconds at most), and ends.
    pub(crate) fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            self.stop.ring();
            // A thread that panicked has said so itself.
            let _ = acceptor.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// What others see of a worker's clients.
#[derive(Debug)]
struct Load {
    clients: AtomicUsize,
    /// Since when the longest of those who have never asked for anything is there: milliseconds of the server's life;
    /// [`NOBODY`] if all have.
    mute_since: AtomicU64,
}

const NOBODY: u64 = u64::MAX;

/// A client that comes in.
struct Newcomer {
    stream: Stream,
    /// All places are taken: somebody else's, or none.
    instead: bool,
}

struct WorkerHandle {
    /// Dropped to end the worker.
    mail: Option<mpsc::Sender<Newcomer>>,
    bell: Bell,
    load: Arc<Load>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.mail = None;
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

struct Acceptor {
    listener: Listener,
    workers: Vec<WorkerHandle>,
    counters: Arc<Counters>,
    stop: Bell,
}

impl Acceptor {
    fn run(mut self) -> Listener {
        loop {
            let mut wait = [
                PollFd::new(&self.stop, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            match poll(&mut wait, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => break,
            }
            if !wait[0].revents().is_empty() {
                break;
            }
            match self.listener.accept() {
                Ok(stream) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Out of descriptors or memory, or the client is gone again: the next one may fare better.
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
        // All at once, so that they finish side by side; then each is waited for.
        for worker in &mut self.workers {
            worker.mail = None;
            worker.bell.ring();
        }
        self.workers.clear();
        self.listener
    }

    fn admit(&self, stream: Stream) {
        let clients = &self.counters.clients;
        let instead = clients.load(Ordering::Relaxed) >= MAX_CLIENTS;
        let chosen = if instead {
            let mute_since = |worker: &&WorkerHandle| worker.load.mute_since.load(Ordering::Relaxed);
            self.workers.iter().min_by_key(mute_since)
        } else {
            let load = |worker: &&WorkerHandle| worker.load.clients.load(Ordering::Relaxed);
            self.workers.iter().min_by_key(load)
        };
        let Some(worker) = chosen else { return };
        let Some(mail) = &worker.mail else { return };
        clients.fetch_add(1, Ordering::Relaxed);
        worker.load.clients.fetch_add(1, Ordering::Relaxed);
        if mail.send(Newcomer { stream, instead }).is_err() {
            clients.fetch_sub(1, Ordering::Relaxed);
            worker.load.clients.fetch_sub(1, Ordering::Relaxed);
        }
        worker.bell.ring();
    }
}

struct Client {
    id: u32,
    stream: Stream,
    connection: Connection,
    since: Instant,
    /// It has asked for something.
    has_asked: bool,
    /// All that had come was read: to try again is in vain until it is ready.
    is_dry: bool,
    /// Operation and length by tag, for the counters.
    requests: Box<[(Operation, u32)]>,
}

struct Worker<D> {
    device: D,
    export: Arc<Export>,
    patience: Patience,
    counters: Arc<Counters>,
    load: Arc<Load>,
    bell: Bell,
    mailbox: mpsc::Receiver<Newcomer>,
    clients: Vec<Client>,
    next_id: u32,
    began: Instant,
    throttle: EventThrottle,
    /// The device's event has come.
    woken: bool,
    /// The backend sends events for nothing: until then none is listened to.
    deaf_until: Option<Instant>,
}

impl<D: BlockDevice> Worker<D> {
    fn run(mut self) {
        let mut open = true;
        let mut deadline = None;
        loop {
            if open && !self.take_mail() {
                open = false;
                deadline = Some(Instant::now() + STOP_PATIENCE);
                for client in &mut self.clients {
                    client.connection.drain();
                }
            }
            let handshake_end = self.hurry();
            let moved = self.work();
            self.judge_event(moved);
            self.bury();
            let next = deadline
                .into_iter()
                .chain(handshake_end)
                .chain(self.deaf_until)
                .min();
            let patience = next.map(|next| next.saturating_duration_since(Instant::now()));
            if !open && (self.clients.is_empty() || deadline.is_some_and(|end| end <= Instant::now())) {
                return;
            }
            if let Err(error) = self.sleep(patience) {
                eprintln!("gnttab: nbd queue stopped: poll: {error}");
                return;
            }
        }
    }

    /// New clients; `false` when no more will come.
    fn take_mail(&mut self) -> bool {
        loop {
            match self.mailbox.try_recv() {
                Ok(Newcomer { instead, .. }) if instead && !self.make_room() => {
                    self.load.clients.fetch_sub(1, Ordering::Relaxed);
                    self.counters.clients.fetch_sub(1, Ordering::Relaxed);
                }
                Ok(Newcomer { stream, .. }) => {
                    self.next_id = self.next_id.wrapping_add(1);
                    self.clients.push(Client {
                        id: self.next_id,
                        stream,
                        connection: Connection::new(Arc::clone(&self.export)),
                        since: Instant::now(),
                        has_asked: false,
                        is_dry: true,
                        requests: vec![(Operation::Flush, 0); Connection::MAX_IN_FLIGHT].into(),
                    });
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Hangs up on the client that has been there longest without asking for anything; whether there was one.
    fn make_room(&mut self) -> bool {
        let patience = self.patience.first_request;
        let mute = |client: &&mut Client| !client.has_asked && client.since.elapsed() >= patience;
        let longest = self
            .clients
            .iter_mut()
            .filter(mute)
            .min_by_key(|client| client.since);
        let found = longest.map(|client| client.connection.hang_up());
        self.bury();
        found.is_some()
    }

    /// Hangs up on clients whose handshake took too long; when the next one's time is over.
    fn hurry(&mut self) -> Option<Instant> {
        let mut next = None;
        for client in &mut self.clients {
            if !client.connection.is_negotiating() {
                continue;
            }
            let end = client.since + self.patience.handshake;
            if end <= Instant::now() {
                client.connection.hang_up();
            } else {
                next = Some(next.map_or(end, |next: Instant| next.min(end)));
            }
        }
        next
    }

    /// Listens less and less to a backend whose events have nothing behind them.
    fn judge_event(&mut self, moved: bool) {
        if std::mem::take(&mut self.woken) || moved {
            let pause = u64::from(self.throttle.after(moved));
            self.deaf_until = (pause > 0).then(|| Instant::now() + Duration::from_millis(pause));
        } else if self.deaf_until.is_some_and(|end| end <= Instant::now()) {
            self.deaf_until = None;
        }
    }

    /// Moves everything that can move: requests in, completions out, answers sent. Whether the device did anything.
    fn work(&mut self) -> bool {
        let mut completions = Vec::new();
        let mut any = false;
        loop {
            let submitted = self.submit();
            self.device.kick();
            let moved = self.device.completions(&mut completions);
            any |= moved;
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            let mut sent = false;
            for client in &mut self.clients {
                sent |= client.send(&self.device.pages());
            }
            self.return_leases();
            // What was sent may have made room for requests that have come already.
            if !submitted && !moved && !sent && !self.linger() {
                return any;
            }
        }
    }

    /// Waits a moment for the disk, if it has little to do: otherwise the processor is better spent on the clients, which
    /// have more to ask.
    fn linger(&mut self) -> bool {
        let under_way: usize = self
            .clients
            .iter()
            .map(|client| client.connection.in_flight())
            .sum();
        self.device.linger(under_way <= FEW)
    }

    /// Gives the disk some of what clients ask for; each is bounded in what it may have under way.
    fn submit(&mut self) -> bool {
        let mut any = false;
        for client in &mut self.clients {
            let mut bytes = 0;
            while bytes < ROUND
                && let Some(mut request) = client.next_request(&mut self.device)
            {
                bytes += request.data.len();
                client.has_asked = true;
                if let Some(slot) = usize::try_from(request.tag)
                    .ok()
                    .and_then(|tag| client.requests.get_mut(tag))
                {
                    *slot = (request.operation, request.length);
                }
                request.tag |= u64::from(client.id) << 32;
                self.device.submit(request);
                any = true;
            }
        }
        any
    }

    fn complete(&mut self, mut completion: Completion) {
        let id = completion.tag >> 32;
        completion.tag &= 0xffff_ffff;
        let Some(client) = self.clients.iter_mut().find(|client| u64::from(client.id) == id) else {
            return;
        };
        let asked = usize::try_from(completion.tag)
            .ok()
            .and_then(|tag| client.requests.get(tag));
        if let Some(&(operation, length)) = asked {
            self.counters.count(operation, length, completion.result.is_ok());
        }
        client.connection.complete(completion);
    }

    /// Gives the disk back what it has lent and nobody needs any more.
    fn return_leases(&mut self) {
        for client in &mut self.clients {
            let returned = client.connection.take_returned();
            if !returned.is_empty() {
                let mut pages = self.device.pages();
                returned.into_iter().for_each(|lease| pages.give_back(lease));
            }
        }
    }

    /// Drops the clients that are done, and says who is left.
    fn bury(&mut self) {
        self.return_leases();
        let before = self.clients.len();
        self.clients.retain(|client| !client.connection.is_finished());
        let gone = before - self.clients.len();
        self.load.clients.fetch_sub(gone, Ordering::Relaxed);
        self.counters.clients.fetch_sub(gone, Ordering::Relaxed);
        let mute = self.clients.iter().filter(|client| !client.has_asked);
        let since = mute
            .map(|client| client.since.saturating_duration_since(self.began))
            .min();
        let since = since.map_or(NOBODY, |since| u64::try_from(since.as_millis()).unwrap_or(NOBODY));
        self.load.mute_since.store(since, Ordering::Relaxed);
    }

    /// Waits until something can move, and reads what clients have sent.
    fn sleep(&mut self, patience: Option<Duration>) -> io::Result<()> {
        let mut wait = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
        if self.deaf_until.is_none()
            && let Some(event) = self.device.event()
        {
            wait.push(PollFd::from_borrowed_fd(event, PollFlags::IN));
        }
        let first_client = wait.len();
        let mut polled = Vec::new();
        for (index, client) in self.clients.iter_mut().enumerate() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, client.connection.input().is_some());
            flags.set(PollFlags::OUT, client.connection.has_output());
            // One that waits for the disk only is left out: its hang-up would wake us again and again.
            if !flags.is_empty() {
                wait.push(PollFd::from_borrowed_fd(client.stream.as_fd(), flags));
                polled.push(index);
            }
        }
        let timeout = patience.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut wait, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let rung = !wait[0].revents().is_empty();
        let ready: Vec<PollFlags> = wait[first_client..].iter().map(PollFd::revents).collect();
        let woken = first_client == 2 && !wait[1].revents().is_empty();
        drop(wait);
        if rung {
            self.bell.hush();
        }
        if woken {
            self.device.hush();
            self.woken = true;
        }
        for (index, ready) in polled.into_iter().zip(ready) {
            let client = &mut self.clients[index];
            if ready.intersects(PollFlags::IN) {
                client.receive(&self.device.pages());
            } else if ready.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
                client.connection.hang_up();
            }
        }
        Ok(())
    }
}

impl Client {
    /// The next request for the disk. A large payload is read as far as it has come; what else has come waits until the
    /// others have had their turn.
    fn next_request(&mut self, device: &mut impl BlockDevice) -> Option<Request> {
        let mut pages = device.pages();
        loop {
            let request = self.connection.next_request(&mut pages);
            if request.is_some() || self.is_dry || !self.connection.is_straight() || !self.receive(&pages) {
                return request;
            }
        }
    }

    /// Reads once what has arrived: a client that sends without end must not keep the others waiting. Whether anything
    /// came.
    fn receive(&mut self, pages: &impl Pages) -> bool {
        let (room, received) = match self.connection.input() {
            None => return false,
            Some(Room::Bytes(bytes)) => (bytes.len(), self.stream.read(bytes)),
            Some(Room::Leased(lease, from, next)) => (
                lease.len() - from + next.len(),
                vectored::receive(&self.stream, &pages.parts(lease, from), next),
            ),
        };
        match received {
            Ok(0) => self.connection.hang_up(),
            Ok(count) => {
                self.connection.received(count);
                self.is_dry = count < room;
                return true;
            }
            Err(error) if is_passing(&error) => self.is_dry = true,
            Err(_) => self.connection.hang_up(),
        }
        false
    }

    /// Sends what the client takes; whether it took anything.
    fn send(&mut self, pages: &impl Pages) -> bool {
        let mut any = false;
        while self.connection.has_output() {
            let mut pieces = Pieces::default();
            for (data, from) in self.connection.output() {
                match data {
                    Data::Own(bytes) => pieces.push(bytes.get(from..).unwrap_or_default()),
                    Data::Leased(lease) => {
                        for part in pages.parts(lease, from) {
                            pieces.push_shared(&part.into());
                        }
                    }
                }
                if pieces.len() >= PIECES {
                    break;
                }
            }
            match pieces.send(&self.stream) {
                Ok(count) if count > 0 => {
                    self.connection.sent(count);
                    any = true;
                }
                Err(error) if is_passing(&error) => break,
                Ok(_) | Err(_) => {
                    self.connection.hang_up();
                    break;
                }
            }
        }
        any
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
