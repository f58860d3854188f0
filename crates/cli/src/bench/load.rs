//! A load on a disk: accesses of one pattern, so many under way, for a while. What a measuring frontend runs.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::block::{BlockDevice, Operation, Request};
use crate::demo::workload::{Pace, Run, WorkloadError};

/// A disk that answers nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pattern {
    /// Writes, not reads.
    pub(crate) write: bool,
    /// All over the disk, not front to back.
    pub(crate) random: bool,
    /// Bytes of an access.
    pub(crate) length: u32,
    /// Accesses under way.
    pub(crate) depth: u32,
}

impl Pattern {
    /// What fio calls it.
    pub(crate) fn fio(self) -> &'static str {
        match (self.random, self.write) {
            (true, false) => "randread",
            (true, true) => "randwrite",
            (false, false) => "read",
            (false, true) => "write",
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}k-depth{}", self.fio(), self.length >> 10, self.depth)
    }
}

/// Runs each pattern for `time`, after a quarter of it that does not count: pages are granted and mapped then.
pub(crate) fn run(
    device: &mut impl BlockDevice,
    patterns: &[Pattern],
    time: Duration,
) -> Result<Vec<Pace>, WorkloadError> {
    let each = |pattern: &Pattern| {
        go(device, *pattern, time / 4)?;
        go(device, *pattern, time)
    };
    patterns.iter().map(each).collect()
}

fn go(device: &mut impl BlockDevice, pattern: Pattern, time: Duration) -> Result<Pace, WorkloadError> {
    let places = device.geometry().size / u64::from(pattern.length);
    let until = Instant::now() + time;
    let mut state = 1_u64;
    let mut next = 0;
    let operation = if pattern.write {
        Operation::Write { fua: false }
    } else {
        Operation::Read
    };
    Run {
        device,
        depth: usize::try_from(pattern.depth).unwrap_or(1),
        patience: PATIENCE,
    }
    .go(
        |mut data| {
            if Instant::now() >= until {
                return None;
            }
            // A linear congruential generator's high bits: no two runs differ.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let place = if pattern.random {
                (state >> 33) % places
            } else {
                next % places
            };
            next += 1;
            data.resize(pattern.length as usize, 0x5a);
            Some(Request {
                tag: 0,
                operation,
                offset: place * u64::from(pattern.length),
                length: pattern.length,
                data: data.into(),
            })
        },
        |_, data| data,
    )
}
