//! Who asks.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::protocol::{Answer, Question, Table, decode_answer, encode};
pub use crate::monitor::Heard;
use crate::monitor::{DomainInfo, Filter, MachineInfo};

/// How long a machine may be silent when it was asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a whole answer may take: a large table is long, and nobody waits for ever for one that comes byte by byte.
const WHOLE: Duration = Duration::from_secs(20);
/// Bytes of an answer: a table of 1024 frames that is full and mapped, as JSON, is below it.
const ANSWER: usize = 1 << 28;

/// Why a machine did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens there.
    #[error("control socket {}: {source}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is there, and says nothing, or does not come to an end.
    #[error("control socket {}: the machine is there, but did not answer in time", .0.display())]
    Silent(PathBuf),
    /// The connection broke.
    #[error("control socket {}: {source}", path.display())]
    Broken {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What it answered is not what was asked for.
    #[error("control socket {}: {why}", path.display())]
    Unexpected {
        /// Where.
        path: PathBuf,
        /// What was wrong with it.
        why: String,
    },
    /// The machine says why it cannot answer.
    #[error("{0}")]
    Refused(String),
}

/// A caller of a machine's control socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a machine.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect(path: &Path) -> Result<Client, ControlError> {
        let fail = |source| ControlError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(fail)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        Ok(Client {
            path: path.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// [`ControlError`]; an [`Answer::Error`] is [`ControlError::Refused`].
    pub fn ask(&mut self, question: &Question) -> Result<Answer, ControlError> {
        let asked = self.stream.get_mut().write_all(&encode(question));
        // Who was turned away finds why there, though it cannot ask any more.
        let answer = self.hear(Some(Instant::now() + WHOLE));
        match (asked, answer) {
            (_, Ok(Answer::Error(why))) => Err(ControlError::Refused(why)),
            (Ok(()), answer) => answer,
            (Err(source), _) => Err(self.broken(source)),
        }
    }

    /// The machine as a whole.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn machine(&mut self) -> Result<MachineInfo, ControlError> {
        match self.ask(&Question::Machine)? {
            Answer::Machine(machine) => Ok(machine),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Every domain.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn domains(&mut self) -> Result<Vec<DomainInfo>, ControlError> {
        match self.ask(&Question::Domains)? {
            Answer::Domains(domains) => Ok(domains),
            other => Err(self.unexpected(&other)),
        }
    }

    /// A domain's table.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn table(&mut self, domain: u16) -> Result<Table, ControlError> {
        match self.ask(&Question::Table { domain })? {
            Answer::Table(table) => Ok(*table),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Hears what happens from now on, one thing after the other; ends when the machine does.
    ///
    /// ```no_run
    /// use std::path::Path;
    /// use gnttab_host::control::{Client, Heard};
    /// use gnttab_host::monitor::Filter;
    ///
    /// let client = Client::connect(Path::new("/run/user/1000/gnttab/mine.control"))?;
    /// for heard in client.events(Filter { domain: Some(2), ..Filter::default() })? {
    ///     match heard? {
    ///         Heard::Event(event) => println!("d{} {:?}", event.domain, event.event),
    ///         Heard::Dropped(count) => println!("{count} more"),
    ///     }
    /// }
    /// # Ok::<(), gnttab_host::control::ControlError>(())
    /// ```
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn events(
        mut self,
        filter: Filter,
    ) -> Result<impl Iterator<Item = Result<Heard, ControlError>>, ControlError> {
        match self.ask(&Question::Events(filter))? {
            Answer::Watching => {}
            other => return Err(self.unexpected(&other)),
        }
        let waits = self.stream.get_mut().set_read_timeout(None);
        waits.map_err(|source| self.broken(source))?;
        Ok(std::iter::from_fn(move || match self.hear(None) {
            Ok(Answer::Event(event)) => Some(Ok(Heard::Event(event))),
            Ok(Answer::Dropped(count)) => Some(Ok(Heard::Dropped(count))),
            Ok(other) => Some(Err(self.unexpected(&other))),
            Err(ControlError::Broken { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => Some(Err(error)),
        }))
    }

    /// The next answer, which has to be there whole by `deadline`.
    fn hear(&mut self, deadline: Option<Instant>) -> Result<Answer, ControlError> {
        let unexpected = |path: &Path, why: String| ControlError::Unexpected {
            path: path.to_owned(),
            why,
        };
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            if deadline.is_some_and(|deadline| deadline < Instant::now()) {
                return Err(ControlError::Silent(self.path.clone()));
            }
            let some = match self.stream.fill_buf() {
                Ok([]) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(some) => some,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(ControlError::Silent(self.path.clone()));
                }
                Err(error) => return Err(self.broken(error)),
            };
            let end = some.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(some.len(), |end| end + 1);
            line.extend_from_slice(&some[..taken]);
            self.stream.consume(taken);
            if line.len() > ANSWER {
                let why = format!("an answer of more than {} MiB", ANSWER >> 20);
                return Err(unexpected(&self.path, why));
            }
        }
        decode_answer(&line).map_err(|why| unexpected(&self.path, why))
    }

    fn broken(&self, source: io::Error) -> ControlError {
        ControlError::Broken {
            path: self.path.clone(),
            source,
        }
    }

    fn unexpected(&self, answer: &Answer) -> ControlError {
        let mut said = format!("{answer:?}");
        said.truncate(said.char_indices().nth(60).map_or(said.len(), |(at, _)| at));
        ControlError::Unexpected {
            path: self.path.clone(),
            why: format!("an unexpected answer: {said}"),
        }
    }
}
