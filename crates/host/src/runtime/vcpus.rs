//! The vCPUs of a domain, lent to the threads of its process.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::area::Caller;

/// The vCPUs that no thread uses.
#[derive(Debug)]
pub(super) struct Vcpus {
    free: Mutex<Vec<Caller>>,
    given_back: Condvar,
}

impl Vcpus {
    pub(super) fn new(callers: Vec<Caller>) -> Vcpus {
        Vcpus {
            free: Mutex::new(callers),
            given_back: Condvar::new(),
        }
    }

    /// Does something as one of them; waits for one if all are in use.
    pub(super) fn with_one<T>(&self, act: impl FnOnce(&mut Caller) -> T) -> T {
        let mut caller = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                match free.pop() {
                    Some(caller) => break caller,
                    None => free = self.given_back.wait(free).unwrap_or_else(PoisonError::into_inner),
                }
            }
        };
        let result = act(&mut caller);
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(caller);
        self.given_back.notify_one();
        result
    }
}
