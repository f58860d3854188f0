//! A domain's timer: ends of access that are pending are tried again, and the monitor is told how the table stands.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use gnttab_abi::Errno;
use gnttab_guest::GrantTable;

use super::{Domain, Hosting};
use crate::area::Request;
use crate::protocol::{self, Consumer, PendingEnd, Report};

/// How often it looks.
const INTERVAL: Duration = Duration::from_millis(500);
/// Pending ends that are tried at a time.
const TRIES: usize = 64;

/// The thread that does it, until it is dropped.
#[derive(Debug)]
pub struct Reporter {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Domain {
    /// Tells the monitor how a grant table of this domain stands: its consumers and their quotas, the ends of access that
    /// peers do not let happen. `gnttab top` shows it as what the domain says of itself.
    ///
    /// # Errors
    /// What the call answered.
    pub fn report(&self, table: &GrantTable<Domain>) -> Result<(), Errno> {
        self.send_report(&report(table))
    }

    /// Does so twice a second where something has changed, and tries pending ends again
    /// ([`GrantTable::retry_pending`]).
    ///
    /// # Errors
    /// The system's, when there can be no further thread.
    pub fn keep_reporting(table: &GrantTable<Domain>) -> std::io::Result<Reporter> {
        let table = table.clone();
        let (stop, stopped) = mpsc::channel();
        let thread = thread::Builder::new().name("reporter".into()).spawn(move || {
            let mut last = None;
            loop {
                table.retry_pending(TRIES);
                let mut now = report(&table);
                // How often something was tried is no news.
                let mut compared = now.clone();
                compared.pending.iter_mut().for_each(|end| end.tries = 0);
                if last.as_ref() != Some(&compared) {
                    let domain: &Arc<Domain> = table.platform();
                    now.pending.truncate(protocol::MOST_PENDING);
                    if domain.send_report(&now).is_ok() {
                        last = Some(compared);
                    }
                }
                if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Reporter {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    fn send_report(&self, report: &Report) -> Result<(), Errno> {
        let bytes = report.encode();
        let request = Request {
            number: protocol::CALL_REPORT,
            arguments: [0, bytes.len() as u64, 0, 0],
        };
        self.call(&request, &bytes, &mut []).map(drop)
    }
}

fn report(table: &GrantTable<Domain>) -> Report {
    let stats = table.stats();
    let pending = table.pending().into_iter().map(|end| PendingEnd {
        gref: end.gref,
        peer: end.peer,
        tries: end.tries,
    });
    let consumers = table.consumers().into_iter().map(|consumer| Consumer {
        name: consumer.name,
        used: consumer.used,
        quota: consumer.quota,
        refused: consumer.refused,
    });
    Report {
        refs: stats.refs,
        free: stats.free,
        leaked: stats.leaked,
        pending_total: u32::try_from(stats.pending).unwrap_or(u32::MAX),
        pending: pending.collect(),
        consumers: consumers.collect(),
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
