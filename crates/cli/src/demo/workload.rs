//! What the demo's frontend does with its disk: reads all of it, writes all of it anew, reads it back, and checks every
//! byte by digest; then small accesses all over it, for the rates.
//!
//! The frontend cannot see the image, so its digests are judged by whoever can: the launcher.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::block::{BlockDevice, Completion, Data, DeviceError, Operation, Request};

/// Bytes of a large access.
const LARGE: u32 = 256 << 10;
/// Large accesses under way.
const LARGE_DEPTH: usize = 8;
/// Bytes of a small access.
const SMALL: u32 = 4096;
/// Small accesses under way.
const SMALL_DEPTH: usize = 32;
/// How long small accesses go on, each way.
const SMALL_TIME: Duration = Duration::from_millis(1500);
/// A disk that answers nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was done, and what came back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Digest of the whole disk as it was found.
    pub(crate) found: String,
    /// Digest of what was then written over all of it.
    pub(crate) written: String,
    /// Digest of the whole disk as it was read afterwards.
    pub(crate) read_back: String,
    /// Small blocks read afterwards, each compared byte for byte.
    pub(crate) small_blocks_compared: u64,
    /// How many of them differed.
    pub(crate) small_blocks_wrong: u64,
    /// Reading in large accesses for the first time, in which pages become shareable.
    pub(crate) first_reads: Pace,
    /// Reading in large accesses, later on.
    pub(crate) large_reads: Pace,
    /// Writing in large accesses, with the flush at the end.
    pub(crate) large_writes: Pace,
    /// Reading 4 KiB at a time all over the disk.
    pub(crate) small_reads: Pace,
    /// Writing 4 KiB at a time all over the disk.
    pub(crate) small_writes: Pace,
}

/// How fast something went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pace {
    /// Accesses.
    pub(crate) requests: u64,
    /// Bytes.
    pub(crate) bytes: u64,
    /// Seconds.
    pub(crate) seconds: f64,
}

/// Why the workload ended before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WorkloadError {
    /// The disk failed an access.
    #[error("{operation:?} of {length} bytes at {offset:#x}: {error}")]
    Failed {
        /// What.
        operation: Operation,
        /// Where.
        offset: u64,
        /// How much.
        length: u32,
        /// Why.
        error: DeviceError,
    },
    /// The disk did not answer.
    #[error("the disk has answered nothing for {} seconds", PATIENCE.as_secs())]
    Stalled,
    /// The wait itself failed.
    #[error("waiting for the disk: {0}")]
    Wait(#[from] Errno),
}

/// Does all of it. `progress` is told each phase as it begins.
pub(crate) fn run(
    device: &mut impl BlockDevice,
    mut progress: impl FnMut(&str),
) -> Result<Outcome, WorkloadError> {
    let mut outcome = Outcome::default();
    let size = device.geometry().size;
    progress("reading the whole disk");
    (outcome.found, outcome.first_reads) = read_all(device, size)?;
    progress("writing 4 KiB blocks all over it");
    outcome.small_writes = write_small(device, size)?;
    progress("writing the whole disk");
    (outcome.written, outcome.large_writes) = write_all(device, size)?;
    progress("reading the whole disk back");
    (outcome.read_back, outcome.large_reads) = read_all(device, size)?;
    progress("reading 4 KiB blocks all over it");
    outcome.small_reads = read_small(device, size, &mut outcome)?;
    Ok(outcome)
}

fn read_all(device: &mut impl BlockDevice, size: u64) -> Result<(String, Pace), WorkloadError> {
    let mut digest = Sha256::new();
    let mut pieces = pieces(size);
    // Answers come in any order, the digest wants theirs.
    let (mut early, mut next) = (BTreeMap::new(), 0);
    let pace = Run {
        device,
        depth: LARGE_DEPTH,
        patience: PATIENCE,
    }
    .go(
        |spare| {
            let (offset, length) = pieces.next()?;
            let data = resized(spare, length);
            Some(Request {
                tag: offset,
                operation: Operation::Read,
                offset,
                length,
                data: data.into(),
            })
        },
        |request, data| {
            early.insert(request.offset, data);
            let mut spare = Vec::new();
            while let Some(data) = early.remove(&next) {
                digest.update(&data);
                next += data.len() as u64;
                spare = data;
            }
            spare
        },
    )?;
    Ok((hex(digest), pace))
}

fn write_all(device: &mut impl BlockDevice, size: u64) -> Result<(String, Pace), WorkloadError> {
    let mut digest = Sha256::new();
    let mut pieces = pieces(size);
    let mut run = Run {
        device,
        depth: LARGE_DEPTH,
        patience: PATIENCE,
    };
    let mut pace = run.go(
        |spare| {
            let (offset, length) = pieces.next()?;
            let mut data = resized(spare, length);
            fill(offset, &mut data);
            digest.update(&data);
            Some(Request {
                tag: offset,
                operation: Operation::Write { fua: false },
                offset,
                length,
                data: data.into(),
            })
        },
        |_, data| data,
    )?;
    let mut flush = Some(Request {
        tag: 0,
        operation: Operation::Flush,
        offset: 0,
        length: 0,
        data: Data::default(),
    });
    pace.seconds += run.go(|_| flush.take(), |_, data| data)?.seconds;
    Ok((hex(digest), pace))
}

/// Writes what [`write_all`] writes to the same places.
fn write_small(device: &mut impl BlockDevice, size: u64) -> Result<Pace, WorkloadError> {
    let mut places = Places::new(size);
    Run {
        device,
        depth: SMALL_DEPTH,
        patience: PATIENCE,
    }
    .go(
        |spare| {
            let (offset, length) = places.next()?;
            let mut data = resized(spare, length);
            fill(offset, &mut data);
            Some(Request {
                tag: 0,
                operation: Operation::Write { fua: false },
                offset,
                length,
                data: data.into(),
            })
        },
        |_, data| data,
    )
}

fn read_small(
    device: &mut impl BlockDevice,
    size: u64,
    outcome: &mut Outcome,
) -> Result<Pace, WorkloadError> {
    let mut places = Places::new(size);
    let mut expected = vec![0; SMALL as usize];
    Run {
        device,
        depth: SMALL_DEPTH,
        patience: PATIENCE,
    }
    .go(
        |spare| {
            let (offset, length) = places.next()?;
            let data = resized(spare, length);
            Some(Request {
                tag: 0,
                operation: Operation::Read,
                offset,
                length,
                data: data.into(),
            })
        },
        |request, data| {
            let expected = &mut expected[..data.len()];
            fill(request.offset, expected);
            outcome.small_blocks_compared += 1;
            outcome.small_blocks_wrong += u64::from(expected != data);
            data
        },
    )
}

/// The whole disk, front to back.
fn pieces(size: u64) -> impl Iterator<Item = (u64, u32)> {
    (0..size).step_by(LARGE as usize).map(move |offset| {
        let length = (size - offset).min(u64::from(LARGE));
        (offset, u32::try_from(length).unwrap_or(LARGE))
    })
}

/// Aligned small places all over the disk, for a while.
struct Places {
    blocks: u64,
    size: u64,
    state: u64,
    until: Instant,
}

impl Places {
    fn new(size: u64) -> Self {
        let blocks = size.div_ceil(u64::from(SMALL));
        Places {
            blocks,
            size,
            state: 1,
            until: Instant::now() + SMALL_TIME,
        }
    }

    fn next(&mut self) -> Option<(u64, u32)> {
        self.state = mix(self.state);
        let offset = self.state % self.blocks * u64::from(SMALL);
        let length = (self.size - offset).min(u64::from(SMALL));
        (Instant::now() < self.until).then(|| (offset, u32::try_from(length).unwrap_or(SMALL)))
    }
}

fn resized(mut spare: Vec<u8>, length: u32) -> Vec<u8> {
    spare.resize(length as usize, 0);
    spare
}

/// The content that belongs at a place: a function of the place alone, different in every 8 bytes.
fn fill(offset: u64, data: &mut [u8]) {
    for (place, word) in (offset / 8..).zip(data.chunks_exact_mut(8)) {
        word.copy_from_slice(&mix(place).to_le_bytes());
    }
}

fn mix(n: u64) -> u64 {
    let z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A SHA-256 digest as text.
pub(crate) fn hex(digest: Sha256) -> String {
    digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Keeps a number of accesses under way until there are no more.
pub(crate) struct Run<'a, D> {
    /// The disk.
    pub(crate) device: &'a mut D,
    /// How many.
    pub(crate) depth: usize,
    /// How long the disk may be silent.
    pub(crate) patience: Duration,
}

impl<D: BlockDevice> Run<'_, D> {
    /// `next` makes a request, of a buffer that is free if it likes; `done` gets what it became, and gives a buffer
    /// back.
    pub(crate) fn go(
        &mut self,
        mut next: impl FnMut(Vec<u8>) -> Option<Request>,
        mut done: impl FnMut(&Request, Vec<u8>) -> Vec<u8>,
    ) -> Result<Pace, WorkloadError> {
        let started = Instant::now();
        let mut pace = Pace::default();
        // By tag, without their data.
        let mut under_way: Vec<Option<Request>> = (0..self.depth).map(|_| None).collect();
        let mut spare = Vec::new();
        let mut more = true;
        let mut completions = Vec::new();
        loop {
            for (tag, slot) in (0..).zip(&mut under_way).filter(|(_, slot)| slot.is_none()) {
                let Some(mut request) = more.then(|| next(spare.pop().unwrap_or_default())).flatten() else {
                    more = false;
                    break;
                };
                request.tag = tag;
                *slot = Some(Request {
                    data: Data::default(),
                    ..request
                });
                self.device.submit(request);
            }
            if under_way.iter().all(Option::is_none) {
                pace.seconds = started.elapsed().as_secs_f64();
                return Ok(pace);
            }
            self.device.kick();
            self.wait(&mut completions)?;
            for Completion { tag, result, data } in completions.drain(..) {
                let slot = usize::try_from(tag).ok().and_then(|tag| under_way.get_mut(tag));
                let Some(request) = slot.and_then(Option::take) else {
                    continue;
                };
                result.map_err(|error| WorkloadError::Failed {
                    operation: request.operation,
                    offset: request.offset,
                    length: request.length,
                    error,
                })?;
                pace.requests += 1;
                pace.bytes += u64::from(request.length);
                // It was not leased.
                spare.push(done(&request, data.into_own().unwrap_or_default()));
            }
        }
    }

    /// At least one completion.
    fn wait(&mut self, completions: &mut Vec<Completion>) -> Result<(), WorkloadError> {
        let since = Instant::now();
        loop {
            self.device.completions(completions);
            if !completions.is_empty() {
                return Ok(());
            }
            if self.device.linger(true) {
                continue;
            }
            if since.elapsed() > self.patience {
                return Err(WorkloadError::Stalled);
            }
            if let Some(event) = self.device.event() {
                let timeout = Timespec {
                    tv_sec: 0,
                    tv_nsec: 200_000_000,
                };
                match poll(
                    &mut [PollFd::from_borrowed_fd(event, PollFlags::IN)],
                    Some(&timeout),
                ) {
                    Ok(_) => self.device.hush(),
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _};
    use std::sync::Arc;

    use super::*;
    use crate::file::FileDevice;
    use crate::image::Image;

    fn digest_of(mut file: &File) -> String {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        hex(Sha256::new_with_prefix(bytes))
    }

    /// The digests that the frontend reports are those of the image, before and after.
    #[test]
    fn digests_are_those_of_the_image() {
        let image = Image::generate(3 << 20 | 4096).unwrap();
        let before = digest_of(image.file());
        let file = Arc::new(image.file().try_clone().unwrap());
        let mut device = FileDevice::new(file, image.size(), false);
        let mut phases = Vec::new();
        let outcome = run(&mut device, |phase| phases.push(phase.to_owned())).unwrap();
        assert_eq!(outcome.found, before);
        assert_eq!(outcome.written, digest_of(image.file()));
        assert_eq!(outcome.read_back, outcome.written);
        assert_ne!(outcome.written, before);
        assert!(outcome.small_blocks_compared > 0);
        assert_eq!(outcome.small_blocks_wrong, 0);
        assert_eq!(outcome.large_reads.bytes, image.size());
        assert_eq!(phases.len(), 5);
    }

    /// A disk that turns one bit round.
    struct Lying(FileDevice);

    impl BlockDevice for Lying {
        fn geometry(&self) -> crate::block::Geometry {
            self.0.geometry()
        }
        fn pages(&mut self) -> impl crate::block::Pages + '_ {
            self.0.pages()
        }
        fn submit(&mut self, request: Request) {
            self.0.submit(request);
        }
        fn kick(&mut self) {}
        fn completions(&mut self, into: &mut Vec<Completion>) -> bool {
            let any = self.0.completions(into);
            for completion in into {
                if let Data::Own(data) = &mut completion.data
                    && let Some(byte) = data.get_mut(77)
                {
                    *byte ^= 1;
                }
            }
            any
        }
        fn hush(&mut self) {}
        fn event(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            None
        }
    }

    #[test]
    fn one_wrong_bit_shows() {
        let image = Image::generate(1 << 20).unwrap();
        let file = Arc::new(image.file().try_clone().unwrap());
        let outcome = run(&mut Lying(FileDevice::new(file, image.size(), false)), |_| {}).unwrap();
        assert_ne!(outcome.found, digest_of(Image::generate(1 << 20).unwrap().file()));
        assert_ne!(outcome.read_back, outcome.written);
        assert_eq!(outcome.small_blocks_wrong, outcome.small_blocks_compared);
    }
}
