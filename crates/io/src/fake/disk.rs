//! A disk in memory.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::vec;
use std::vec::Vec;

use crate::blkif::{Disk, DiskError, DiskInfo, SECTOR_SIZE};
use crate::shared::{SharedSlice, SharedSliceMut};

/// A disk in memory, whose properties a test may change, and that can be made to fail.
pub struct RamDisk {
    content: RwLock<Vec<u8>>,
    info: Mutex<DiskInfo>,
    failing: Mutex<Option<DiskError>>,
    calls: Mutex<Vec<Call>>,
}

/// What a [`RamDisk`] was asked, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A read of so many bytes at a sector.
    Read(u64, usize),
    /// A write of so many bytes at a sector.
    Write(u64, usize),
    /// A flush.
    Flush,
    /// A discard of so many sectors at a sector.
    Discard(u64, u64, bool),
}

impl RamDisk {
    /// A zeroed disk of so many 512-byte sectors.
    #[must_use]
    pub fn new(sectors: usize) -> RamDisk {
        RamDisk::with_info(DiskInfo::new(sectors as u64), vec![0; sectors * SECTOR_SIZE])
    }

    /// A disk of this content.
    #[must_use]
    pub fn with_info(info: DiskInfo, content: Vec<u8>) -> RamDisk {
        RamDisk {
            content: RwLock::new(content),
            info: Mutex::new(info),
            failing: Mutex::new(None),
            calls: Mutex::new(Vec::new()),
        }
    }

    /// Changes what [`Disk::info`] says.
    pub fn set_info(&self, change: impl FnOnce(&mut DiskInfo)) {
        change(&mut lock(&self.info));
    }

    /// Makes every operation fail from now on, or none.
    pub fn fail(&self, error: Option<DiskError>) {
        *lock(&self.failing) = error;
    }

    /// A copy of the whole content.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.content
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What it was asked since the last time, in order.
    pub fn calls(&self) -> Vec<Call> {
        core::mem::take(&mut lock(&self.calls))
    }

    fn begin(&self, call: Call) -> Result<(), DiskError> {
        let mut calls = lock(&self.calls);
        // Tests look at the last few; a bench must not fill memory.
        if calls.len() < 10_000 {
            calls.push(call);
        }
        match *lock(&self.failing) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn range(sector: u64, bytes: usize, len: usize) -> Result<core::ops::Range<usize>, DiskError> {
    let start = usize::try_from(sector)
        .ok()
        .and_then(|sector| sector.checked_mul(SECTOR_SIZE));
    let range = start.and_then(|start| Some(start..start.checked_add(bytes)?));
    range.filter(|range| range.end <= len).ok_or(DiskError::Failed)
}

impl Disk for RamDisk {
    fn info(&self) -> DiskInfo {
        *lock(&self.info)
    }

    fn read(&self, sector: u64, into: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        let bytes = into.iter().map(SharedSliceMut::len).sum();
        self.begin(Call::Read(sector, bytes))?;
        let content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        let mut from = &content[range(sector, bytes, content.len())?];
        for slice in into {
            let (part, rest) = from.split_at(slice.len());
            slice.copy_from(part);
            from = rest;
        }
        Ok(())
    }

    fn write(&self, sector: u64, from: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        let bytes = from.iter().map(SharedSlice::len).sum();
        self.begin(Call::Write(sector, bytes))?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        let range = range(sector, bytes, content.len())?;
        let mut into = &mut content[range];
        for slice in from {
            let (part, rest) = into.split_at_mut(slice.len());
            slice.copy_to(part);
            into = rest;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.begin(Call::Flush)
    }

    fn discard(&self, sector: u64, count: u64, secure: bool) -> Result<(), DiskError> {
        self.begin(Call::Discard(sector, count, secure))?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        let bytes = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(SECTOR_SIZE));
        let range = range(sector, bytes.ok_or(DiskError::Failed)?, content.len())?;
        content[range].fill(0);
        Ok(())
    }
}
