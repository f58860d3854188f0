//! The line that is drawn over and over while something runs, and the wait for the person to stop it.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::Failure;
use crate::nbd::server::Totals;
use crate::output;

/// SIGINT, SIGTERM or SIGHUP, caught from [`Stop::new`] on: what has to be cleaned up is cleaned up.
#[derive(Debug)]
pub(crate) struct Stop {
    asked: mpsc::Receiver<()>,
}

impl Stop {
    /// Starts catching.
    pub(crate) fn new() -> Result<Self, Failure> {
        let fail = |error| Failure::new(format!("signals: cannot be caught: {error}"));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(fail)?;
        let (ask, asked) = mpsc::channel();
        let forward = move || {
            for _ in signals.forever() {
                if ask.send(()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(forward)
            .map_err(fail)?;
        Ok(Stop { asked })
    }

    /// Waits for a signal; `false` after `patience` without one.
    pub(crate) fn asked_within(&self, patience: Duration) -> bool {
        match self.asked.recv_timeout(patience) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => true,
            Err(RecvTimeoutError::Timeout) => false,
        }
    }
}

/// One line with the rates of a served disk, drawn only where a person sees it.
#[derive(Debug)]
pub(crate) struct Rates {
    line: ProgressBar,
    last: (Instant, Totals),
}

impl Rates {
    /// Draws nothing yet. With `quiet`, or with no terminal on standard error, never.
    pub(crate) fn new(quiet: bool) -> Self {
        let line = if quiet || !output::stderr_is_live() {
            ProgressBar::hidden()
        } else {
            let style = ProgressStyle::with_template("{spinner} {msg}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        };
        Rates {
            line,
            last: (Instant::now(), Totals::default()),
        }
    }

    /// Draws what was done since the last time.
    pub(crate) fn draw(&mut self, now: Totals) {
        let (then, before) = std::mem::replace(&mut self.last, (Instant::now(), now));
        let seconds = then.elapsed().as_secs_f64().max(0.001);
        let clients = if now.clients == 1 {
            "1 client".to_owned()
        } else {
            format!("{} clients", now.clients)
        };
        let errors = if now.errors == 0 {
            String::new()
        } else {
            format!("   {} errors", now.errors)
        };
        self.line.set_message(format!(
            "{clients}   read {}   write {}{errors}",
            rate(
                now.bytes_read - before.bytes_read,
                now.reads - before.reads,
                seconds
            ),
            rate(
                now.bytes_written - before.bytes_written,
                now.writes - before.writes,
                seconds
            ),
        ));
        self.line.tick();
    }

    /// Takes the line away.
    pub(crate) fn clear(&self) {
        self.line.finish_and_clear();
    }
}

/// `12.3 MiB/s (3148/s)`.
fn rate(bytes: u64, requests: u64, seconds: f64) -> String {
    format!(
        "{}/s ({:.0}/s)",
        output::bytes(per_second(bytes, seconds)),
        requests as f64 / seconds
    )
}

/// `count` spread over `seconds`, rounded.
pub(crate) fn per_second(count: u64, seconds: f64) -> u64 {
    let rate = count as f64 / seconds.max(0.000_001);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "float casts saturate, which is right"
    )]
    let rate = rate.round() as u64;
    rate
}
