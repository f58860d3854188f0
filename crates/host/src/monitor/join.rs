//! Programs that nobody started as domains, and that join over a socket.
//!
//! Such a program is as trusted as its user: the monitor knows nothing of what it can reach, and never calls
//! it isolated. What it gets of others is bounded all the same by what was granted to it.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{DomainSpec, Monitor, MonitorError, Shared};
use crate::launch::Program;
use crate::protocol::{JOIN_SIZE, Join, REFUSAL};
use crate::sys::{Channel, EventPort, Listener, Poller};

/// How long who connects may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(2);
const LISTENER: u64 = 0;
const STOP: u64 = 1;

/// The thread that lets programs join.
#[derive(Debug)]
pub(super) struct Door {
    stop: Option<EventPort>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Lets programs of this user, or of root, join as domains over a socket at `path`, until the monitor
    /// is dropped. They call [`Domain::join_at`](crate::runtime::Domain::join_at).
    ///
    /// # Errors
    /// [`MonitorError::Io`] for a path that cannot be listened at.
    pub fn listen(&self, path: &Path) -> Result<(), MonitorError> {
        let listener = Listener::bind(path).map_err(MonitorError::errno("the socket for joining"))?;
        let (stop, stopped) = EventPort::pair().map_err(MonitorError::errno("doorbell"))?;
        let poller = Poller::new().map_err(MonitorError::errno("epoll"))?;
        poller
            .add(&listener, LISTENER)
            .map_err(MonitorError::errno("epoll"))?;
        poller.add(&stopped, STOP).map_err(MonitorError::errno("epoll"))?;
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name("door".into())
            .spawn(move || {
                let _open = stopped;
                while let Ok(events) = poller.wait(None) {
                    if events.iter().any(|event| event.token == STOP) {
                        return;
                    }
                    if let Ok(channel) = listener.accept() {
                        shared.let_in(channel);
                    }
                }
            })
            .map_err(MonitorError::io("thread"))?;
        let door = Door {
            stop: Some(stop),
            thread: Some(thread),
        };
        self.doors
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(door);
        Ok(())
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // A hang-up is what the thread waits for.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Makes who has connected a domain, or says why not.
    fn let_in(self: &Arc<Self>, channel: Channel) {
        let mut bytes = [0; JOIN_SIZE];
        if !matches!(channel.wait(PATIENCE), Ok(true)) {
            return;
        }
        let Ok(len) = channel.receive_bytes(&mut bytes, false) else {
            return;
        };
        let refuse = |channel: &Channel, why: &str| {
            let mut text = [REFUSAL, why.as_bytes()].concat();
            text.truncate(JOIN_SIZE);
            // Who does not listen does not learn.
            let _ = channel.send_bytes(&text);
        };
        match Join::decode(bytes.get(..len).unwrap_or_default()) {
            Ok(join) => {
                let mut spec = DomainSpec::new(&join.name, Program::role(""));
                spec.ram_pages = join.ram_pages;
                spec.foreign_pages = join.foreign_pages;
                spec.limits.vcpus = join.vcpus.into();
                let Ok(voice) = channel.try_clone() else { return };
                if let Err(error) = self.admit(&spec, channel) {
                    refuse(&voice, &error.to_string());
                }
            }
            Err(error) => refuse(&channel, &error.to_string()),
        }
    }
}
