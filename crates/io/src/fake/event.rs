//! Event channels within a process.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::grants::Notify;

#[derive(Default)]
struct Inner {
    pending: Mutex<(bool, u64)>,
    arrived: Condvar,
}

/// One direction of an event channel: a bit that is set by sending and cleared by taking.
/// Clones are the same channel.
#[derive(Clone, Default)]
pub struct Event(Arc<Inner>);

impl Event {
    /// A channel with nothing pending.
    #[must_use]
    pub fn new() -> Event {
        Event::default()
    }

    /// Clears the bit; whether it was set.
    pub fn take(&self) -> bool {
        core::mem::take(&mut self.lock().0)
    }

    /// Waits until the bit is set, or the time is over, and clears it; whether it was set.
    pub fn wait(&self, limit: Duration) -> bool {
        let guard = self.lock();
        let waited = self
            .0
            .arrived
            .wait_timeout_while(guard, limit, |(pending, _)| !*pending);
        core::mem::take(&mut waited.unwrap_or_else(PoisonError::into_inner).0.0)
    }

    /// How often it was sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.lock().1
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (bool, u64)> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notify for Event {
    fn notify(&mut self) {
        let mut state = self.lock();
        *state = (true, state.1 + 1);
        self.0.arrived.notify_all();
    }
}

/// An event channel that nobody listens to.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullPort;

impl Notify for NullPort {
    fn notify(&mut self) {}
}
