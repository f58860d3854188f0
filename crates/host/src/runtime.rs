//! What a domain's program links: its memory, its hypercalls, its events.
//!
//! A program that was started as a domain takes its [`Start`](crate::launch::Start) and joins:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use std::sync::Arc;
//! use gnttab_abi::DomId;
//! use gnttab_guest::{Access, Config, GrantTable};
//! use gnttab_host::launch::Start;
//! use gnttab_host::runtime::Domain;
//!
//! fn frontend(start: Start) -> ExitCode {
//!     match share_a_page(start) {
//!         Ok(()) => ExitCode::SUCCESS,
//!         Err(error) => {
//!             eprintln!("frontend: {error}");
//!             ExitCode::FAILURE
//!         }
//!     }
//! }
//!
//! fn share_a_page(start: Start) -> Result<(), Box<dyn std::error::Error>> {
//!     let domain = Domain::join(start.channel)?;
//!     let table = GrantTable::start(Arc::clone(&domain), Config::default())?;
//!     let page = domain.grantable(1)?.page(0).ok_or("no page")?;
//!     let grant = table.grant_zeroed(table.alloc_one()?, DomId(1), page, Access::ReadWrite)?;
//!     grant.page().write(0, b"hello, d1")?;
//!     println!("page granted as reference {}", grant.gref());
//!     Ok(())
//! }
//! ```
//!
//! [`Domain`] is the surroundings that `gnttab-guest` asks for (its three traits), over a hypercall area and
//! memfds; [`io`] is what the ring drivers of `gnttab-io` ask for, over that. What a domain's process does
//! for its domain is in one small trait, [`Hosting`]: a process that runs a virtual machine implements it
//! with the exits of its vCPUs, the memory slots of its machine and injected interrupts, and neither the
//! monitor nor the drivers can tell the two apart.

pub mod io;

mod guest;
mod port;
mod ram;
mod reporter;
mod vcpus;

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gnttab_abi::{DomId, Errno, Gfn, PAGE_SIZE};

use crate::area::{CallError, Caller, Request};
use crate::protocol::{
    self, BadMessage, HELLO_DESCRIPTORS, Hello, JOIN_SIZE, Join, NOTICE_SIZE, Notice, NoticeKind, REFUSAL,
};
use crate::sys::{self, Access, Channel, ChannelError, MAX_DESCRIPTORS, Window, WindowError};
use guest::Frames;
use ram::Allocator;
use vcpus::Vcpus;

pub use port::Port;
pub use ram::{NoPages, RamPage, Run};
pub use reporter::Reporter;

/// How long the monitor may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a process could not become a domain.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The monitor was not heard.
    #[error("cannot join the machine: {0}")]
    Channel(#[from] ChannelError),
    /// It said something else than it should.
    #[error("cannot join the machine: {0}")]
    Message(#[from] BadMessage),
    /// It does not take this program in.
    #[error("cannot join the machine: {0}")]
    Refused(String),
    /// There is no monitor.
    #[error("cannot join the machine at {}: {errno}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        errno: rustix::io::Errno,
    },
    /// Descriptors are missing.
    #[error("cannot join the machine: {got} descriptors came with the {what}, expected {expected}")]
    Descriptors {
        /// With what.
        what: &'static str,
        /// How many came.
        got: usize,
        /// How many should have.
        expected: usize,
    },
    /// There is no room for its memory.
    #[error("cannot join the machine: {0}")]
    Memory(#[from] WindowError),
    /// It said nothing in time.
    #[error("cannot join the machine: the monitor was silent for {} seconds", HELLO_TIMEOUT.as_secs())]
    Timeout,
    /// The process could not be closed to others.
    #[error("cannot join the machine: PR_SET_DUMPABLE: {0}")]
    Dumpable(rustix::io::Errno),
}

/// What a domain's process does for its domain.
pub trait Hosting: Send + Sync {
    /// Makes a call to the monitor: `input` goes to the start of the argument buffer, and what is there
    /// afterwards comes back in `output`. What it answers is not negative.
    ///
    /// # Errors
    /// What the monitor answered; [`Errno::Io`] if it has gone.
    fn call(&self, request: &Request, input: &[u8], output: &mut [u8]) -> Result<u64, Errno>;

    /// The descriptors that came with a call.
    ///
    /// # Errors
    /// [`Errno::NoData`] if there are none of that kind and key.
    fn received(&self, kind: NoticeKind, key: u64) -> Result<Vec<OwnedFd>, Errno>;

    /// Shows the domain a page at `gfn`: another domain's, or new backing of its own.
    ///
    /// # Errors
    /// [`Errno::NoMem`] when the process has no room for it, [`Errno::Inval`] when there is no such gfn.
    fn place(&self, gfn: Gfn, page: OwnedFd, access: Access) -> Result<(), Errno>;

    /// Takes a page from the domain's sight.
    ///
    /// # Errors
    /// As [`Hosting::place`].
    fn clear(&self, gfn: Gfn) -> Result<(), Errno>;
}

/// This process's domain.
///
/// Having one tells you: the monitor knows this process as that domain, and its memory is mapped. Any
/// number of threads may use it; as many calls as it has vCPUs are made at the same time.
pub struct Domain {
    hello: Hello,
    memory: Arc<Window>,
    tables: &'static Window,
    exposure: Window,
    vcpus: Vcpus,
    inbox: Mutex<Inbox>,
    /// A call was answered since the inbox was last filled.
    called: AtomicBool,
    channel: Channel,
    ram: Mutex<Allocator>,
    frames: Frames,
    store: Mutex<Option<UnixStream>>,
}

/// Descriptors that came and that nobody has asked for yet.
#[derive(Debug, Default)]
struct Inbox {
    parcels: HashMap<(NoticeKind, u64), Vec<OwnedFd>>,
}

impl Inbox {
    /// Takes in everything that has come.
    fn fill(&mut self, channel: &Channel) {
        let mut bytes = [0; NOTICE_SIZE * MAX_DESCRIPTORS];
        while let Ok(message) = channel.receive(&mut bytes, false) {
            let notices = bytes.get(..message.len).unwrap_or_default().chunks(NOTICE_SIZE);
            let mut notices: Vec<Notice> = notices.map_while(|bytes| Notice::decode(bytes).ok()).collect();
            // What came for a mapping that then failed makes room for the next one at that address.
            if notices.len() == message.descriptors.len() {
                let each = notices.into_iter().zip(message.descriptors);
                self.parcels
                    .extend(each.map(|(notice, one)| ((notice.kind, notice.key), vec![one])));
            } else if let Some(notice) = notices.pop() {
                self.parcels
                    .insert((notice.kind, notice.key), message.descriptors);
            }
        }
    }
}

impl Domain {
    /// Becomes the domain that the monitor says at the other end of the channel.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn join(channel: Channel) -> Result<Arc<Domain>, JoinError> {
        sys::become_undumpable().map_err(JoinError::Dumpable)?;
        let mut bytes = [0; JOIN_SIZE];
        let message = listen(&channel, &mut bytes)?;
        let said = bytes.get(..message.len).unwrap_or_default();
        if let Some(why) = said.strip_prefix(REFUSAL) {
            return Err(JoinError::Refused(String::from_utf8_lossy(why).into_owned()));
        }
        let hello = Hello::decode(said)?;
        let [ram, tables, exposure, store] = exactly::<HELLO_DESCRIPTORS>("hello", message.descriptors)?;

        let ram_pages = usize_of(hello.ram_pages);
        let memory = Window::reserve(ram_pages.saturating_add(usize_of(hello.foreign_pages)))?;
        memory.place(0, ram, 0, ram_pages, Access::Write)?;
        let tables = Window::of(tables, usize_of(hello.table_pages), Access::Write)?.leak();
        let exposure = Window::of(exposure, ram_pages.div_ceil(PAGE_SIZE), Access::Read)?;
        let mut callers = Vec::new();
        for number in 0..hello.vcpus {
            let mut bytes = [0; NOTICE_SIZE];
            let message = listen(&channel, &mut bytes)?;
            let notice = Notice::decode(bytes.get(..message.len).unwrap_or_default())?;
            let [area] = exactly("hypercall area", message.descriptors)?;
            if notice
                != (Notice {
                    kind: NoticeKind::Vcpu,
                    key: number.into(),
                })
            {
                let expected = hello.vcpus.into();
                return Err(JoinError::Descriptors {
                    what: "hypercall areas",
                    got: number.into(),
                    expected,
                });
            }
            callers.push(Caller::new(area)?);
        }
        Ok(Arc::new(Domain {
            hello,
            memory: Arc::new(memory),
            tables,
            exposure,
            vcpus: Vcpus::new(callers),
            inbox: Mutex::default(),
            called: AtomicBool::new(false),
            channel,
            ram: Mutex::new(Allocator::new(hello.ram_pages)),
            frames: Frames::default(),
            store: Mutex::new(Some(store.into())),
        }))
    }

    /// Becomes a domain of the machine whose monitor listens at `path`
    /// ([`Monitor::listen`](crate::monitor::Monitor::listen)). Such a domain is never called isolated.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn join_at(path: &Path, join: &Join) -> Result<Arc<Domain>, JoinError> {
        let refused = |errno| JoinError::Connect {
            path: path.to_owned(),
            errno,
        };
        let channel = Channel::connect(path).map_err(refused)?;
        channel.send_bytes(&join.encode())?;
        Domain::join(channel)
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.hello.domain
    }

    /// What it is made of.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Its whole address space as one window, page by gfn: its memory, then others' pages.
    #[must_use]
    pub fn memory(&self) -> &Arc<Window> {
        &self.memory
    }

    /// Its connection to the store; the first who asks gets it.
    #[must_use]
    pub fn take_store(&self) -> Option<UnixStream> {
        lock(&self.store).take()
    }

    /// The addresses for others' pages, for a [`Mapper`](gnttab_guest::Mapper). One mapper has all of them.
    ///
    /// # Errors
    /// [`gnttab_guest::WindowError`] for a domain without such addresses.
    pub fn foreign_window(&self) -> Result<gnttab_guest::Window, gnttab_guest::WindowError> {
        gnttab_guest::Window::new(self.hello.first_foreign().address(), self.hello.foreign_pages)
    }

    /// Whether the monitor still holds its end.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.channel.is_connected()
    }

    /// Leaves the machine at once, as death does: the monitor takes everything back, and calls fail from now on.
    pub fn leave(&self) {
        self.channel.hang_up();
    }

    /// What hangs up when the monitor does, to poll.
    #[must_use]
    pub fn hang_up(&self) -> impl AsFd + '_ {
        self.channel.as_fd()
    }

    fn host_call(&self, number: u32, first: u64, second: u64) -> Result<u64, Errno> {
        self.call(
            &Request {
                number,
                arguments: [first, second, 0, 0],
            },
            &[],
            &mut [],
        )
    }

    /// Whether a peer has mapped the page since it was last renewed.
    fn is_exposed(&self, gfn: Gfn) -> bool {
        let byte = usize::try_from(gfn.0).map(|at| self.exposure.load_u8(at));
        !matches!(byte, Ok(Ok(0)))
    }

    /// Gives a page new backing if a peer could still see the old one.
    fn renew(&self, gfn: Gfn) -> Result<(), Errno> {
        if !self.is_exposed(gfn) || self.host_call(protocol::CALL_RENEW, gfn.0, 0)? == 0 {
            return Ok(());
        }
        let page = single(self.received(NoticeKind::Page, gfn.0)?)?;
        self.place(gfn, page, Access::Write)
    }
}

impl Hosting for Domain {
    fn call(&self, request: &Request, input: &[u8], output: &mut [u8]) -> Result<u64, Errno> {
        self.vcpus.with_one(|caller| {
            let alive = || self.channel.is_connected();
            let result = caller
                .put(0, input)
                .and_then(|()| caller.call(request, alive))
                .and_then(|result| caller.get(0, output).map(|()| result));
            self.called.store(true, Ordering::Release);
            match result {
                Ok(result) => protocol::answer(result),
                Err(CallError::Closed) => Err(Errno::Io),
                Err(CallError::Buffer(_)) => Err(Errno::TooBig),
            }
        })
    }

    fn received(&self, kind: NoticeKind, key: u64) -> Result<Vec<OwnedFd>, Errno> {
        let mut inbox = lock(&self.inbox);
        // What came was sent before the call that it belongs to was answered: one look for each call.
        if self.called.swap(false, Ordering::AcqRel) {
            inbox.fill(&self.channel);
        }
        inbox.parcels.remove(&(kind, key)).ok_or(Errno::NoData)
    }

    fn place(&self, gfn: Gfn, page: OwnedFd, access: Access) -> Result<(), Errno> {
        let at = usize::try_from(gfn.0).map_err(|_| Errno::Inval)?;
        self.memory.place(at, page, 0, 1, access).map_err(errno_of)
    }

    fn clear(&self, gfn: Gfn) -> Result<(), Errno> {
        let at = usize::try_from(gfn.0).map_err(|_| Errno::Inval)?;
        self.memory.clear(at, 1).map_err(errno_of)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("hello", &self.hello)
            .finish_non_exhaustive()
    }
}

fn listen(channel: &Channel, bytes: &mut [u8]) -> Result<sys::Message, JoinError> {
    if !channel.wait(HELLO_TIMEOUT)? {
        return Err(JoinError::Timeout);
    }
    Ok(channel.receive(bytes, false)?)
}

fn exactly<const N: usize>(what: &'static str, descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; N], JoinError> {
    let wrong = |descriptors: Vec<OwnedFd>| JoinError::Descriptors {
        what,
        got: descriptors.len(),
        expected: N,
    };
    descriptors.try_into().map_err(wrong)
}

/// The one descriptor of a message that has one.
fn single(descriptors: Vec<OwnedFd>) -> Result<OwnedFd, Errno> {
    let [one] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| Errno::Io)?;
    Ok(one)
}

fn errno_of(error: WindowError) -> Errno {
    match error {
        WindowError::Map { .. } => Errno::NoMem,
        _ => Errno::Inval,
    }
}

fn usize_of(pages: u32) -> usize {
    usize::try_from(pages).unwrap_or(usize::MAX)
}

/// Nothing panics while it holds one of this module's locks; and if, each value is right by itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
