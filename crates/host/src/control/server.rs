//! Who answers: a thread that lets callers in, and one for each caller.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::protocol::{Answer, MappedBy, Question, Table, decode_question, encode};
use crate::monitor::{Heard, Monitor, MonitorError};
use crate::sys::{EventPort, Listener, Poller};

/// Callers at a time.
pub const MOST_CALLERS: usize = 32;
/// Callers that are told events, at a time.
pub const MOST_WATCHERS: usize = 8;
/// Bytes of a question.
const QUESTION: u64 = 4096;
/// How long a caller may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a watcher's thread looks whether the caller is still there.
const LOOK: Duration = Duration::from_millis(500);
/// Bytes of stack of a caller's thread.
const STACK: usize = 512 * 1024;
const LISTENER: u64 = 0;
const STOP: u64 = 1;

/// The control socket of a machine, open until it is dropped.
///
/// ```no_run
/// use std::path::Path;
/// use std::sync::Arc;
/// use gnttab_host::control::{Client, Control};
/// use gnttab_host::monitor::{Monitor, Settings};
///
/// let monitor = Arc::new(Monitor::start(Settings::default())?);
/// let control = Control::open(Path::new("/run/user/1000/gnttab/mine.control"), Arc::clone(&monitor))?;
/// let mut caller = Client::connect(Path::new("/run/user/1000/gnttab/mine.control"))?;
/// println!("{} domains", caller.domains()?.len());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Control {
    /// A hang-up is what the thread waits for.
    stop: Option<EventPort>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Opens the socket at `path`. One that a killed machine has left there is replaced.
    ///
    /// # Errors
    /// [`MonitorError::Io`]; of kind [`AddrInUse`](io::ErrorKind::AddrInUse) if somebody answers there or it is no socket.
    pub fn open(path: &Path, monitor: Arc<Monitor>) -> Result<Control, MonitorError> {
        let listener = Listener::bind_stream(path).map_err(MonitorError::errno("the control socket"))?;
        let (stop, stopped) = EventPort::pair().map_err(MonitorError::errno("doorbell"))?;
        let poller = Poller::new().map_err(MonitorError::errno("epoll"))?;
        poller
            .add(&listener, LISTENER)
            .map_err(MonitorError::errno("epoll"))?;
        poller.add(&stopped, STOP).map_err(MonitorError::errno("epoll"))?;
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                let _open = stopped;
                let callers = Callers::new(monitor);
                while let Ok(events) = poller.wait(None) {
                    if events.iter().any(|event| event.token == STOP) {
                        break;
                    }
                    // Others' connections, and those that are gone again, are closed by now.
                    if let Ok(stream) = listener.accept_stream() {
                        callers.let_in(stream);
                    }
                }
                callers.dismiss();
            })
            .map_err(MonitorError::io("thread"))?;
        Ok(Control {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// Those who are connected.
struct Callers {
    monitor: Arc<Monitor>,
    book: Arc<Mutex<Book>>,
}

#[derive(Default)]
struct Book {
    next: u64,
    callers: BTreeMap<u64, Caller>,
    /// Threads of callers that had to make room.
    leaving: Vec<JoinHandle<()>>,
}

struct Caller {
    /// To hang up with.
    stream: UnixStream,
    thread: JoinHandle<()>,
    doing: Doing,
    since: Instant,
}

/// What a caller's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It waits for a question.
    Waiting,
    /// It looks something up, or writes.
    Answering,
    /// It tells events.
    Watching,
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Callers {
    fn new(monitor: Arc<Monitor>) -> Callers {
        Callers {
            monitor,
            book: Arc::default(),
        }
    }

    /// Gives a caller a thread; with too many callers, the one that has been silent for longest makes room.
    fn let_in(&self, stream: UnixStream) {
        let mut book = lock(&self.book);
        book.leaving.retain(|thread| !thread.is_finished());
        if book.callers.len() >= MOST_CALLERS && !book.make_room() {
            drop(book);
            let _ = stream.set_nonblocking(true);
            let why = format!("{MOST_CALLERS} callers are being answered, which is as many as there may be");
            // An empty socket has room for this, and who does not read it does not learn.
            let _ = (&stream).write(&encode(&Answer::Error(why)));
            return;
        }
        let number = book.next;
        book.next += 1;
        let Ok(own) = stream.try_clone() else { return };
        let (monitor, desk) = (Arc::clone(&self.monitor), Arc::clone(&self.book));
        let thread = thread::Builder::new()
            .name("caller".into())
            .stack_size(STACK)
            .spawn(move || {
                // The book is held by who started this thread until the caller is in it.
                let turn = Turn { number, book: &desk };
                // Whoever asked and left needs no answer.
                let _ = serve(&own, &monitor, &turn);
                // Before the caller is gone for those who wait for it: this may be the last one who has it.
                drop(monitor);
                lock(&desk).callers.remove(&number);
            });
        let Ok(thread) = thread else { return };
        let caller = Caller {
            stream,
            thread,
            doing: Doing::Waiting,
            since: Instant::now(),
        };
        book.callers.insert(number, caller);
    }

    /// Hangs up on everybody, and waits until their threads have gone.
    fn dismiss(self) {
        let mut book = lock(&self.book);
        let mut threads = std::mem::take(&mut book.leaving);
        for caller in std::mem::take(&mut book.callers).into_values() {
            let _ = caller.stream.shutdown(Shutdown::Both);
            threads.push(caller.thread);
        }
        drop(book);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Book {
    fn make_room(&mut self) -> bool {
        let silent = self
            .callers
            .iter()
            .filter(|(_, caller)| caller.doing == Doing::Waiting)
            .min_by_key(|(_, caller)| caller.since);
        let Some((&number, _)) = silent else { return false };
        if let Some(caller) = self.callers.remove(&number) {
            let _ = caller.stream.shutdown(Shutdown::Both);
            self.leaving.push(caller.thread);
        }
        true
    }
}

/// A caller's place in the book.
struct Turn<'a> {
    number: u64,
    book: &'a Mutex<Book>,
}

impl Turn<'_> {
    fn now(&self, doing: Doing) {
        if let Some(caller) = lock(self.book).callers.get_mut(&self.number) {
            (caller.doing, caller.since) = (doing, Instant::now());
        }
    }

    /// Becomes one of those that are told events, if there may be one more.
    fn watch(&self) -> bool {
        let mut book = lock(self.book);
        let watching = book
            .callers
            .values()
            .filter(|caller| caller.doing == Doing::Watching);
        let room = watching.count() < MOST_WATCHERS;
        if room && let Some(caller) = book.callers.get_mut(&self.number) {
            caller.doing = Doing::Watching;
        }
        room
    }
}

/// Answers one caller until it hangs up.
fn serve(stream: &UnixStream, monitor: &Monitor, turn: &Turn<'_>) -> io::Result<()> {
    let mut lines = BufReader::new(stream);
    loop {
        turn.now(Doing::Waiting);
        let mut line = Vec::new();
        if (&mut lines).take(QUESTION).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        turn.now(Doing::Answering);
        let whole = line.ends_with(b"\n");
        match decode_question(&line) {
            Ok(Question::Events(filter)) if turn.watch() => return tell(stream, monitor, filter),
            Ok(Question::Events(_)) => {
                let why =
                    format!("{MOST_WATCHERS} callers are told events, which is as many as there may be");
                write(stream, &Answer::Error(why))?;
            }
            Ok(question) => write(stream, &look_up(&question, monitor))?,
            Err(why) => write(stream, &Answer::Error(why))?,
        }
        if !whole {
            // What comes next would be the rest of this line.
            return Ok(());
        }
    }
}

/// Tells events until the caller hangs up.
fn tell(stream: &UnixStream, monitor: &Monitor, filter: crate::monitor::Filter) -> io::Result<()> {
    let watch = match monitor.watch(filter) {
        Ok(watch) => watch,
        Err(why) => return write(stream, &Answer::Error(why.to_string())),
    };
    write(stream, &Answer::Watching)?;
    loop {
        match watch.next(LOOK) {
            Some(Heard::Event(event)) => write(stream, &Answer::Event(event))?,
            Some(Heard::Dropped(count)) => write(stream, &Answer::Dropped(count))?,
            None if has_hung_up(stream) => return Ok(()),
            None => {}
        }
    }
}

/// Whether the caller has gone. Whatever it says while it is told events is not listened to.
fn has_hung_up(stream: &UnixStream) -> bool {
    match rustix::net::recv(stream, &mut [0; 512][..], RecvFlags::DONTWAIT) {
        Ok((_, 0)) => true,
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => false,
        Err(_) => true,
    }
}

/// Writes an answer whole, within [`PATIENCE`] however little the caller takes at a time.
fn write(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let bytes = encode(answer);
    let deadline = Instant::now() + PATIENCE;
    let mut left = &bytes[..];
    while !left.is_empty() {
        let time = deadline.saturating_duration_since(Instant::now());
        if time.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(time))?;
        match stream.write(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => left = left.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn look_up(question: &Question, monitor: &Monitor) -> Answer {
    match question {
        Question::Machine => Answer::Machine(monitor.machine()),
        Question::Domains => Answer::Domains(monitor.domains()),
        Question::Table { domain } => match table(monitor, DomId(*domain)) {
            Ok(table) => Answer::Table(Box::new(table)),
            Err(error) => Answer::Error(error.to_string()),
        },
        // Not looked up: heard.
        Question::Events(_) => Answer::Watching,
    }
}

fn table(monitor: &Monitor, id: DomId) -> Result<Table, MonitorError> {
    let (grants, mappings) = (monitor.grants(id)?, monitor.mappings(id)?);
    Ok(Table {
        domain: monitor.domain(id)?,
        grants,
        mappings,
        mapped_by: monitor
            .mapped_by(id)
            .into_iter()
            .map(|(domain, mapping)| MappedBy {
                domain: domain.0,
                mapping,
            })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::control::{Client, ControlError};
    use crate::monitor::{Filter, Settings};

    struct Rig {
        _folder: tempfile::TempDir,
        path: PathBuf,
        monitor: Arc<Monitor>,
        control: Control,
    }

    /// A machine without domains.
    fn rig() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let monitor = Arc::new(Monitor::start(Settings::default()).unwrap());
        let control = Control::open(&path, Arc::clone(&monitor)).unwrap();
        Rig {
            _folder: folder,
            path,
            monitor,
            control,
        }
    }

    impl Rig {
        fn client(&self) -> Client {
            Client::connect(&self.path).unwrap()
        }

        fn silent(&self) -> UnixStream {
            UnixStream::connect(&self.path).unwrap()
        }
    }

    #[test]
    fn several_callers_ask_at_once_and_each_as_often_as_it_likes() {
        let rig = rig();
        let mut callers: Vec<Client> = (0..10).map(|_| rig.client()).collect();
        for _ in 0..3 {
            for caller in callers.iter_mut().rev() {
                assert_eq!(caller.domains().unwrap(), []);
            }
        }
        assert_eq!(callers[0].machine().unwrap().pid, std::process::id());
        let error = callers[1].table(7).unwrap_err();
        assert!(
            matches!(&error, ControlError::Refused(why) if why == "there is no domain d7"),
            "{error}"
        );
        assert_eq!(callers[1].domains().unwrap(), [], "an error does not end it");
    }

    #[test]
    fn silent_callers_make_room_for_those_who_ask() {
        let rig = rig();
        let mut first = rig.client();
        assert_eq!(first.domains().unwrap(), []);
        let silent: Vec<UnixStream> = (0..2 * MOST_CALLERS).map(|_| rig.silent()).collect();
        for _ in 0..3 {
            assert_eq!(rig.client().domains().unwrap(), []);
        }
        // The one that asked longest ago had to go first.
        assert!(first.domains().is_err());
        let mut gone = &silent[0];
        assert_eq!(gone.read(&mut [0]).unwrap(), 0);
        let mut half = &silent[2 * MOST_CALLERS - 1];
        half.write_all(b"{\"version\":").unwrap();
        assert_eq!(rig.client().domains().unwrap(), []);
    }

    #[test]
    fn a_caller_that_asks_and_never_reads_keeps_nobody_waiting() {
        let rig = rig();
        let stuck: Vec<UnixStream> = (0..4).map(|_| rig.silent()).collect();
        for mut stream in &stuck {
            stream.set_nonblocking(true).unwrap();
            // Until neither side's buffer takes any more.
            while stream.write(&encode(&Question::Machine)).is_ok() {}
        }
        for _ in 0..20 {
            assert_eq!(rig.client().domains().unwrap(), []);
        }
    }

    #[test]
    fn garbage_is_answered_with_what_is_wrong_with_it() {
        let rig = rig();
        let mut stream = rig.silent();
        stream.write_all(b"hello\n").unwrap();
        let mut lines = BufReader::new(&stream);
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line.contains("not a question"), "{line}");
        // A line without an end is answered once, and that is all.
        (&stream).write_all(&[b'x'; 2 * 4096]).unwrap();
        line.clear();
        lines.read_line(&mut line).unwrap();
        assert!(line.contains("not a question"), "{line}");
        line.clear();
        assert!(matches!(lines.read_line(&mut line), Ok(0) | Err(_)), "{line}");
        assert_eq!(rig.client().domains().unwrap(), []);
    }

    #[test]
    fn so_many_are_told_events_and_no_more() {
        let rig = rig();
        let watching: Vec<_> = (0..MOST_WATCHERS)
            .map(|_| rig.client().events(Filter::default()).unwrap())
            .collect();
        let refused = rig.client().events(Filter::default()).err().unwrap().to_string();
        assert!(refused.contains("8 callers are told events"), "{refused}");
        let unknown = Filter {
            operation: Some("fly".into()),
            ..Filter::default()
        };
        drop(watching);
        // Those who have gone are found out in time.
        let deadline = Instant::now() + Duration::from_secs(5);
        let why = loop {
            let why = rig.client().events(unknown.clone()).err().unwrap().to_string();
            if !why.contains("8 callers") || Instant::now() > deadline {
                break why;
            }
            thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(why, "there is no operation called \"fly\"");
    }

    #[test]
    fn closing_the_socket_hangs_up_on_everybody_and_lets_go_of_the_machine() {
        let rig = rig();
        let mut idle = rig.client();
        assert_eq!(idle.domains().unwrap(), []);
        let mut events = rig.client().events(Filter::default()).unwrap();
        drop(rig.control);
        assert!(events.next().is_none());
        assert!(idle.domains().is_err());
        assert!(!rig.path.exists());
        assert_eq!(Arc::strong_count(&rig.monitor), 1);
    }
}
