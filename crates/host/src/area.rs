//! The hypercall area: how a vCPU calls the monitor without a message.
//!
//! An area is shared memory of one vCPU and one thread of the monitor: a head with a state word, the
//! call and its result, and a buffer for arguments. The domain fills it in, turns the state to
//! *submitted* and waits; the monitor's thread serves it and turns the state back to *idle*. Each
//! side looks for a while before it sleeps on the state word (a futex), and each tells in the word
//! that it sleeps, so that a wake-up is sent only when somebody sleeps:
//!
//! ```text
//!   domain                          state                 monitor
//!   swap -> SUBMITTED               IDLE <-> IDLE_ASLEEP  compare_exchange, then futex wait
//!   wake, if it was IDLE_ASLEEP     SUBMITTED             serve
//!   compare_exchange, then wait     SUBMITTED_ASLEEP
//!   done                            IDLE                  swap -> IDLE; wake, if ..._ASLEEP
//! ```
//!
//! One word, changed by read-modify-write only: a wake-up cannot be lost.
//!
//! What must always hold:
//! 1. The monitor reads each word of a call once and judges what it has read. A domain that rewrites
//!    the area while it is served harms its own call only.
//! 2. Whatever a domain writes into the state word, the monitor's thread never spins for long and never
//!    misses [`Closer::close`]: that is a flag of the monitor's own.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use gnttab_abi::PAGE_SIZE;
use rustix::event::Timespec;
use rustix::thread::futex;

use crate::sys::{Access, Backing, MemoryError, SealedMemory, Window, WindowError};

/// Bytes of the argument buffer.
pub const BUFFER_SIZE: usize = 64 * 1024;
/// Pages of an area: the head and the buffer.
pub const AREA_PAGES: usize = 1 + BUFFER_SIZE / PAGE_SIZE;

const STATE: usize = 0;
const NUMBER: usize = 64;
const ARGUMENTS: usize = 72;
const RESULT: usize = 128;
const BUFFER: usize = PAGE_SIZE;

const IDLE: u32 = 0;
const IDLE_ASLEEP: u32 = 1;
const SUBMITTED: u32 = 2;
const SUBMITTED_ASLEEP: u32 = 3;
const CLOSED: u32 = 4;

/// How long a side looks at the state word before it sleeps: about what a wake-up costs.
const PATIENCE: Duration = Duration::from_micros(20);
/// The same where processors are few, and the other side more likely waits for this one.
const LITTLE_PATIENCE: Duration = Duration::from_micros(5);
/// A sleeping monitor thread looks up this often, in case a hostile domain has undone a close.
const MONITOR_NAP: Duration = Duration::from_secs(5);
/// A sleeping domain checks this often that the monitor is still there.
const DOMAIN_NAP: Duration = Duration::from_millis(100);

/// A call as the domain makes it: which hypercall, and its argument words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The hypercall's number, chosen by the domain.
    pub number: u32,
    /// Its arguments, chosen by the domain. Addresses are offsets into the buffer.
    pub arguments: [u64; 4],
}

/// Why a call did not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The monitor has gone or has closed this domain.
    #[error("the monitor has closed the hypercall area")]
    Closed,
    /// An argument lies outside the buffer.
    #[error(transparent)]
    Buffer(#[from] WindowError),
}

/// Why the monitor stops serving an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// [`Closer::close`] was called.
    #[error("the area was closed")]
    Closed,
    /// The state word holds what no well-behaved domain writes.
    #[error("the domain wrote {state:#x} into the state word of its hypercall area")]
    Violation {
        /// What it wrote.
        state: u32,
    },
}

/// The domain's side of an area. One call at a time, which `&mut` says.
#[derive(Debug)]
pub struct Caller {
    window: Window,
    patience: Duration,
}

impl Caller {
    /// Maps the area that the monitor sent.
    ///
    /// # Errors
    /// [`WindowError::Map`].
    pub fn new(memory: impl AsFd) -> Result<Caller, WindowError> {
        let window = Window::of(memory, AREA_PAGES, Access::Write)?;
        Ok(Caller {
            window,
            patience: patience(),
        })
    }

    /// Writes arguments to the buffer.
    ///
    /// # Errors
    /// [`CallError::Buffer`] beyond [`BUFFER_SIZE`].
    pub fn put(&mut self, at: usize, bytes: &[u8]) -> Result<(), CallError> {
        Ok(self.window.write(in_buffer(at, bytes.len())?, bytes)?)
    }

    /// Reads results from the buffer.
    ///
    /// # Errors
    /// [`CallError::Buffer`] beyond [`BUFFER_SIZE`].
    pub fn get(&self, at: usize, into: &mut [u8]) -> Result<(), CallError> {
        Ok(self.window.read(in_buffer(at, into.len())?, into)?)
    }

    /// Makes the call and waits for its result. `alive` is asked from time to time whether the monitor
    /// is still there.
    ///
    /// # Errors
    /// [`CallError::Closed`]; no further call will succeed then.
    pub fn call(&mut self, request: &Request, alive: impl Fn() -> bool) -> Result<i64, CallError> {
        let state = self.window.atomic_u32(STATE)?;
        self.window
            .atomic_u32(NUMBER)?
            .store(request.number, Ordering::Relaxed);
        for (index, argument) in request.arguments.iter().enumerate() {
            self.window
                .atomic_u64(ARGUMENTS + 8 * index)?
                .store(*argument, Ordering::Relaxed);
        }
        match state.swap(SUBMITTED, Ordering::AcqRel) {
            IDLE_ASLEEP => wake(state),
            CLOSED => {
                state.store(CLOSED, Ordering::Release);
                return Err(CallError::Closed);
            }
            _ => {}
        }
        let mut patience = Patience::new(self.patience);
        loop {
            match state.load(Ordering::Acquire) {
                IDLE | IDLE_ASLEEP => break,
                SUBMITTED if patience.left() => {}
                SUBMITTED => {
                    let asleep = state.compare_exchange(
                        SUBMITTED,
                        SUBMITTED_ASLEEP,
                        Ordering::AcqRel,
                        Ordering::Relaxed,
                    );
                    if asleep.is_ok() {
                        sleep(state, SUBMITTED_ASLEEP, DOMAIN_NAP);
                    }
                }
                SUBMITTED_ASLEEP if alive() => sleep(state, SUBMITTED_ASLEEP, DOMAIN_NAP),
                _ => return Err(CallError::Closed),
            }
        }
        Ok(self
            .window
            .atomic_u64(RESULT)?
            .load(Ordering::Relaxed)
            .cast_signed())
    }
}

/// The monitor's side of an area.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    patience: Duration,
}

/// Ends the service of an area, from any thread.
#[derive(Clone, Debug)]
pub struct Closer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    memory: SealedMemory,
    window: Window,
    closed: AtomicBool,
}

impl Server {
    /// Makes an area.
    ///
    /// # Errors
    /// [`MemoryError`] when memory or descriptors have run out.
    pub fn new() -> Result<Server, MemoryError> {
        let memory = SealedMemory::new("gnttab-hypercalls", AREA_PAGES, Backing::Reserved)?;
        let window = Window::of(&memory, AREA_PAGES, Access::Write)?;
        let shared = Shared {
            memory,
            window,
            closed: AtomicBool::new(false),
        };
        Ok(Server {
            shared: Arc::new(shared),
            patience: patience(),
        })
    }

    /// The memory, to be sent to the domain.
    #[must_use]
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.shared.memory.as_fd()
    }

    /// What closes this area.
    #[must_use]
    pub fn closer(&self) -> Closer {
        Closer {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Waits for the next call. It must be answered with [`Self::complete`].
    ///
    /// # Errors
    /// [`ServeError`]: nothing will come any more.
    pub fn next(&self) -> Result<Request, ServeError> {
        let state = self.word();
        let mut patience = Patience::new(self.patience);
        loop {
            if self.shared.closed.load(Ordering::Acquire) {
                return Err(ServeError::Closed);
            }
            match state.load(Ordering::Acquire) {
                SUBMITTED | SUBMITTED_ASLEEP => break,
                IDLE if patience.left() => {}
                IDLE => {
                    // Whatever the outcome, the loop looks again.
                    let _ = state.compare_exchange(IDLE, IDLE_ASLEEP, Ordering::AcqRel, Ordering::Relaxed);
                }
                IDLE_ASLEEP => sleep(state, IDLE_ASLEEP, MONITOR_NAP),
                state => return Err(ServeError::Violation { state }),
            }
        }
        let window = &self.shared.window;
        let argument = |index: usize| word64(window, ARGUMENTS + 8 * index);
        Ok(Request {
            number: window
                .atomic_u32(NUMBER)
                .map_or(0, |word| word.load(Ordering::Relaxed)),
            arguments: [argument(0), argument(1), argument(2), argument(3)],
        })
    }

    /// Answers the call and lets the domain go on.
    pub fn complete(&self, result: i64) {
        if let Ok(word) = self.shared.window.atomic_u64(RESULT) {
            word.store(result.cast_unsigned(), Ordering::Relaxed);
        }
        let state = self.word();
        if state.swap(IDLE, Ordering::AcqRel) == SUBMITTED_ASLEEP {
            wake(state);
        }
        if self.shared.closed.load(Ordering::Acquire) {
            self.closer().close();
        }
    }

    /// Copies arguments out of the buffer, each byte once.
    ///
    /// # Errors
    /// [`WindowError::Outside`] beyond [`BUFFER_SIZE`]; nothing was copied then.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<(), WindowError> {
        self.shared.window.read(in_buffer_u64(at, into.len())?, into)
    }

    /// Copies results into the buffer.
    ///
    /// # Errors
    /// [`WindowError::Outside`] beyond [`BUFFER_SIZE`]; nothing was copied then.
    pub fn write(&self, at: u64, from: &[u8]) -> Result<(), WindowError> {
        self.shared.window.write(in_buffer_u64(at, from.len())?, from)
    }

    fn word(&self) -> &AtomicU32 {
        state_of(&self.shared.window)
    }
}

impl Closer {
    /// Ends the service: the monitor's thread comes back with [`ServeError::Closed`], the domain
    /// with [`CallError::Closed`]. A call that is being served is finished first.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        let state = state_of(&self.shared.window);
        state.store(CLOSED, Ordering::Release);
        wake(state);
    }
}

fn state_of(window: &Window) -> &AtomicU32 {
    window.atomic_u32(STATE).expect("the head of an area is mapped")
}

fn word64(window: &Window, at: usize) -> u64 {
    window
        .atomic_u64(at)
        .map_or(0, |word| word.load(Ordering::Relaxed))
}

fn in_buffer(at: usize, len: usize) -> Result<usize, WindowError> {
    let end = at.saturating_add(len);
    if end > BUFFER_SIZE {
        return Err(WindowError::Outside {
            at,
            end,
            pages: BUFFER_SIZE / PAGE_SIZE,
        });
    }
    Ok(BUFFER + at)
}

fn in_buffer_u64(at: u64, len: usize) -> Result<usize, WindowError> {
    in_buffer(usize::try_from(at).unwrap_or(usize::MAX), len)
}

/// Where the two sides cannot run at the same time, looking is waste.
fn patience() -> Duration {
    match std::thread::available_parallelism() {
        Ok(processors) if processors.get() > 3 => PATIENCE,
        Ok(processors) if processors.get() > 1 => LITTLE_PATIENCE,
        _ => Duration::ZERO,
    }
}

/// How often a side looks before it begins to let others run: the time of a short call.
const GLANCES: u32 = 50;

/// Looks at the word for so long. At first without a pause, which is fastest when both sides run at the
/// same time; then it yields between looks, since the other side may be waiting for this very processor.
struct Patience {
    limit: Duration,
    since: Option<Instant>,
    looks: u32,
}

impl Patience {
    fn new(limit: Duration) -> Patience {
        Patience {
            limit,
            since: None,
            looks: 0,
        }
    }

    /// Passes a moment; false once the time is up.
    fn left(&mut self) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        if self.looks < GLANCES {
            self.looks += 1;
            std::hint::spin_loop();
            return true;
        }
        std::thread::yield_now();
        self.since.get_or_insert_with(Instant::now).elapsed() < self.limit
    }
}

/// Sleeps while the word holds `value`, for `nap` at most. Comes back early for any reason.
fn sleep(word: &AtomicU32, value: u32, nap: Duration) {
    let nap = Timespec {
        tv_sec: i64::try_from(nap.as_secs()).unwrap_or(1),
        tv_nsec: nap.subsec_nanos().into(),
    };
    // The callers look at the word again, whatever came.
    let _ = futex::wait(word, futex::Flags::empty(), value, Some(&nap));
}

fn wake(word: &AtomicU32) {
    // It fails only for addresses that are no futex; this one is.
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX.cast_unsigned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Answers every call with the sum of its number, first argument and first byte of the buffer.
    fn serve(server: Server) -> thread::JoinHandle<ServeError> {
        thread::spawn(move || {
            loop {
                let request = match server.next() {
                    Ok(request) => request,
                    Err(error) => return error,
                };
                let mut byte = [0];
                server.read(0, &mut byte).unwrap();
                let sum = u64::from(request.number) + request.arguments[0] + u64::from(byte[0]);
                server.write(1, &byte).unwrap();
                server.complete(i64::try_from(sum).unwrap());
            }
        })
    }

    fn pair() -> (Caller, Closer, thread::JoinHandle<ServeError>) {
        let server = Server::new().unwrap();
        let caller = Caller::new(server.memory()).unwrap();
        let closer = server.closer();
        (caller, closer, serve(server))
    }

    #[test]
    fn each_call_is_answered_once_with_or_without_sleep_between() {
        let (mut caller, closer, serving) = pair();
        for (round, patience) in (0..4000).zip([PATIENCE, Duration::ZERO].into_iter().cycle()) {
            caller.patience = patience;
            caller.put(0, &[u8::try_from(round % 200).unwrap()]).unwrap();
            let request = Request {
                number: 20,
                arguments: [round, 0, 0, 0],
            };
            let sum = 20 + round + round % 200;
            assert_eq!(caller.call(&request, || true), Ok(i64::try_from(sum).unwrap()));
            if round % 500 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let mut byte = [0];
        caller.get(1, &mut byte).unwrap();
        assert_eq!(byte, [199]);
        closer.close();
        assert_eq!(serving.join().unwrap(), ServeError::Closed);
        assert_eq!(caller.call(&Request::default(), || true), Err(CallError::Closed));
        assert_eq!(caller.call(&Request::default(), || true), Err(CallError::Closed));
    }

    #[test]
    fn closing_wakes_both_sides() {
        // A server that never answers.
        let server = Server::new().unwrap();
        let mut caller = Caller::new(server.memory()).unwrap();
        let closer = server.closer();
        let calling = thread::spawn(move || caller.call(&Request::default(), || true));
        server.next().unwrap();
        thread::sleep(Duration::from_millis(5));
        closer.close();
        assert_eq!(calling.join().unwrap(), Err(CallError::Closed));
        assert_eq!(server.next(), Err(ServeError::Closed));
    }

    #[test]
    fn a_domain_notices_that_the_monitor_has_gone() {
        let server = Server::new().unwrap();
        let mut caller = Caller::new(server.memory()).unwrap();
        drop(server);
        assert_eq!(caller.call(&Request::default(), || false), Err(CallError::Closed));
    }

    #[test]
    fn a_close_during_a_call_is_not_lost() {
        let server = Server::new().unwrap();
        let mut caller = Caller::new(server.memory()).unwrap();
        let calling = thread::spawn(move || {
            let first = caller.call(&Request::default(), || true);
            (first, caller.call(&Request::default(), || true))
        });
        server.next().unwrap();
        server.closer().close();
        server.complete(5);
        let (first, second) = calling.join().unwrap();
        assert!(matches!(first, Ok(5) | Err(CallError::Closed)), "{first:?}");
        assert_eq!(second, Err(CallError::Closed));
    }

    #[test]
    fn garbage_in_the_state_word_ends_the_service_and_not_the_monitor() {
        for garbage in [5, 0xffff_ffff] {
            let (caller, _closer, serving) = pair();
            caller
                .window
                .atomic_u32(STATE)
                .unwrap()
                .store(garbage, Ordering::SeqCst);
            wake(caller.window.atomic_u32(STATE).unwrap());
            assert_eq!(serving.join().unwrap(), ServeError::Violation { state: garbage });
        }
    }

    #[test]
    fn a_domain_that_undoes_a_close_is_not_served() {
        let server = Server::new().unwrap();
        let caller = Caller::new(server.memory()).unwrap();
        server.closer().close();
        caller
            .window
            .atomic_u32(STATE)
            .unwrap()
            .store(SUBMITTED, Ordering::SeqCst);
        assert_eq!(server.next(), Err(ServeError::Closed));
    }

    #[test]
    fn arguments_beyond_the_buffer_are_refused_on_both_sides() {
        let server = Server::new().unwrap();
        let mut caller = Caller::new(server.memory()).unwrap();
        caller.put(BUFFER_SIZE - 1, &[1]).unwrap();
        assert!(matches!(caller.put(BUFFER_SIZE, &[1]), Err(CallError::Buffer(_))));
        assert!(matches!(
            caller.get(usize::MAX, &mut [1]),
            Err(CallError::Buffer(_))
        ));
        for at in [65536, u64::MAX, u64::MAX - 4096, 0xffff_f001] {
            assert!(
                matches!(server.read(at, &mut [0]), Err(WindowError::Outside { .. })),
                "{at:#x}"
            );
            assert!(
                matches!(server.write(at, &[0]), Err(WindowError::Outside { .. })),
                "{at:#x}"
            );
        }
    }
}
