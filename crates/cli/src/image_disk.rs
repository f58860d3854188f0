//! A backend's disk in a file that the launcher opened: straight between the file and the pages that the frontend granted.
//!
//! What was acknowledged before a flush is in the page cache, so it survives the death of this process; after a flush
//! it survives the machine's.

use std::fs::File;
use std::io;

use gnttab_io::blkif::{DiscardInfo, Disk, DiskError, DiskInfo};
use gnttab_io::shared::{SharedSlice, SharedSliceMut};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::image::SECTOR;
use crate::vectored;

/// See the module.
#[derive(Debug)]
pub(crate) struct ImageDisk {
    file: File,
    info: DiskInfo,
}

impl ImageDisk {
    /// The disk in `file`, of `size` bytes, whole sectors.
    pub(crate) fn new(file: File, size: u64, read_only: bool) -> Self {
        let discard = DiscardInfo {
            granularity: 4096,
            alignment: 0,
            secure: false,
        };
        let info = DiskInfo {
            read_only,
            discard: (!read_only).then_some(discard),
            ..DiskInfo::new(size / SECTOR)
        };
        ImageDisk { file, info }
    }
}

impl Disk for ImageDisk {
    fn info(&self) -> DiskInfo {
        self.info
    }

    fn read(&self, sector: u64, into: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        vectored::read_at(&self.file, sector * SECTOR, into).map_err(|error| failed("read", sector, &error))
    }

    fn write(&self, sector: u64, from: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        vectored::write_at(&self.file, sector * SECTOR, from).map_err(|error| failed("write", sector, &error))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|error| failed("flush", 0, &error))
    }

    fn discard(&self, sector: u64, count: u64, _secure: bool) -> Result<(), DiskError> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, how, sector * SECTOR, count * SECTOR) {
            Ok(()) => Ok(()),
            // The file system has no holes, or the confinement of this process has no such call.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => Err(DiskError::NotSupported),
            Err(errno) => Err(failed("discard", sector, &errno.into())),
        }
    }
}

/// The peer learns that it failed; why is for the person.
fn failed(what: &str, sector: u64, error: &io::Error) -> DiskError {
    eprintln!("gnttab: backend: {what} at sector {sector}: {error}");
    DiskError::Failed
}
