//! A frontend domain at work on the disk of its backend domain: how fast it goes, and what it costs the two of them and the
//! monitor.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::load::Pattern;
use crate::demo::workload::Pace;
use crate::failure::Failure;
use crate::image::Image;
use crate::roles::{News, Served, Sharing, frontend};
use crate::session::{DiskPlan, DomainPlan, Event, JobPlan, RingPlan, Session};

/// How long the domains may take to connect.
const READY: Duration = Duration::from_secs(10);

/// What came of it.
pub(super) struct Outcome {
    /// By pattern.
    pub(super) paces: Vec<Pace>,
    pub(super) cost: Cost,
}

/// What all of it cost, the time before the figures count included.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    served: Served,
    frontend: Duration,
    backend: Duration,
    monitor: Duration,
}

impl Cost {
    /// Pages mapped for a request of the ring.
    pub(super) fn maps(&self) -> f64 {
        self.a_request(self.served.mapped as f64)
    }

    /// Pages copied by the monitor for a request of the ring.
    pub(super) fn copies(&self) -> f64 {
        self.a_request(self.served.copied as f64)
    }

    /// Microseconds of processor time a request of the ring: the frontend's, the backend's, the monitor's.
    pub(super) fn processor(&self) -> [f64; 3] {
        [self.frontend, self.backend, self.monitor].map(|time| self.a_request(time.as_secs_f64() * 1e6))
    }

    fn a_request(&self, amount: f64) -> f64 {
        amount / self.served.requests.max(1) as f64
    }

    pub(super) fn to_json(self) -> Value {
        let [frontend, backend, monitor] = self.processor();
        json!({
            "ring_requests": self.served.requests,
            "maps_a_request": self.maps(),
            "copies_a_request": self.copies(),
            "processor_us_a_request": { "frontend": frontend, "backend": backend, "monitor": monitor },
        })
    }
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [frontend, backend, monitor] = self.processor();
        write!(
            f,
            "{:.4} maps, {:.2} copies, {frontend:.1} + {backend:.1} + {monitor:.1} us of processor",
            self.maps(),
            self.copies(),
        )
    }
}

/// Runs the patterns, each for `time`.
pub(super) fn measure(
    image: &Path,
    sharing: Sharing,
    patterns: &[Pattern],
    time: Duration,
) -> Result<Outcome, Failure> {
    let disk = DiskPlan {
        image: Image::open(image, false)?,
        backend: 0,
        frontend: 1,
        rings: RingPlan {
            queues: 1,
            order: 0,
            sharing,
        },
        job: JobPlan::Role(frontend::Job::Measure {
            patterns: patterns.to_vec(),
            milliseconds: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        }),
    };
    let domains = vec![DomainPlan::new("backend"), DomainPlan::new("frontend")];
    let name = format!("bench-{}", std::process::id());
    let mut session = Session::start(&name, domains, vec![disk])?;
    let monitor = processor_time(std::process::id());
    let paces = wait(
        &mut session,
        READY + 2 * time * u32::try_from(patterns.len()).unwrap_or(1),
    )?;
    let mut cost = Cost {
        monitor: processor_time(std::process::id()).saturating_sub(monitor),
        ..Cost::default()
    };
    for info in session.infos() {
        let used = info.pid.map(processor_time).unwrap_or_default();
        match info.name.as_str() {
            "backend" => cost.backend = used,
            _ => cost.frontend = used,
        }
    }
    session.stop(|word| {
        if let News::Served(served) = word.news {
            cost.served = served;
        }
    })?;
    Ok(Outcome { paces, cost })
}

fn wait(session: &mut Session, patience: Duration) -> Result<Vec<Pace>, Failure> {
    let started = Instant::now();
    while started.elapsed() < patience {
        match session.next_event(Duration::from_millis(200))? {
            Some(Event::Word { word, .. }) => match word.news {
                News::Paces(paces) => return Ok(paces),
                News::Failed(why) => return Err(Failure::new(format!("domain to domain: {why}"))),
                _ => {}
            },
            Some(Event::Restarted { name, how } | Event::Ended { name, how, .. }) => {
                return Err(Failure::new(format!("domain {name} {how}")));
            }
            None => {}
        }
    }
    Err(Failure::new("domain to domain: no figures came"))
}

/// What a process has used so far, threads that have ended included; to a hundredth of a second.
fn processor_time(pid: u32) -> Duration {
    let used = || {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Behind the name, which may have anything in it: user and system time are the twelfth and thirteenth.
        let (_, fields) = text.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(Duration::from_millis(
            ticks * 1000 / rustix::param::clock_ticks_per_second(),
        ))
    };
    used().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_uses_time_also_when_its_thread_has_ended() {
        let before = processor_time(std::process::id());
        let work = || {
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(300) {
                std::hint::spin_loop();
            }
            rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)
        };
        let used = std::thread::spawn(work).join().unwrap();
        let used = Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec.try_into().unwrap());
        let seen = processor_time(std::process::id()) - before;
        assert!(seen + Duration::from_millis(20) >= used, "{seen:?} of {used:?}");
    }
}
