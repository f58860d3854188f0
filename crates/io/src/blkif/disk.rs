//! The disk behind a backend, and what a frontend is told about it.

use super::request::BadRequest;
use crate::shared::{SharedSlice, SharedSliceMut};

/// What a disk is. Read once for each connection; a change is announced (see
/// [`BackendQueue::set_disk`](super::BackendQueue::set_disk)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical sector size: a power of two from 512 to 4096 bytes. Requests are whole logical sectors.
    pub sector_size: u32,
    /// Physical sector size in bytes, a hint.
    pub physical_sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// It is a CD-ROM.
    pub cdrom: bool,
    /// Its medium can be taken out.
    pub removable: bool,
    /// It has a cache that can be flushed.
    pub flush: bool,
    /// How it discards, if it does.
    pub discard: Option<DiscardInfo>,
}

/// How a disk discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardInfo {
    /// Bytes of the unit that is really given back.
    pub granularity: u32,
    /// Bytes by which the first unit is off the disk's start.
    pub alignment: u32,
    /// It can make content irretrievable.
    pub secure: bool,
}

const VDISK_CDROM: u32 = 1;
const VDISK_REMOVABLE: u32 = 2;
const VDISK_READONLY: u32 = 4;

impl DiskInfo {
    /// A writable disk with a cache, without discard, of 512-byte sectors.
    #[must_use]
    pub const fn new(sectors: u64) -> DiskInfo {
        DiskInfo {
            sectors,
            sector_size: 512,
            physical_sector_size: 512,
            read_only: false,
            cdrom: false,
            removable: false,
            flush: true,
            discard: None,
        }
    }

    /// The value of the `info` key.
    #[must_use]
    pub const fn info_bits(&self) -> u32 {
        (if self.cdrom { VDISK_CDROM } else { 0 })
            | (if self.removable { VDISK_REMOVABLE } else { 0 })
            | (if self.read_only { VDISK_READONLY } else { 0 })
    }

    /// Takes an `info` key's value over.
    #[must_use]
    pub const fn with_info_bits(mut self, bits: u32) -> DiskInfo {
        self.cdrom = bits & VDISK_CDROM != 0;
        self.removable = bits & VDISK_REMOVABLE != 0;
        self.read_only = bits & VDISK_READONLY != 0;
        self
    }

    /// Whether `count` sectors from `sector` lie on the disk and are whole logical sectors (spec 2.2.4, 2.2.5).
    ///
    /// # Errors
    /// [`BadRequest::OutOfRange`] or [`BadRequest::Unaligned`].
    pub fn check(&self, sector: u64, count: u64) -> Result<(), BadRequest> {
        match sector.checked_add(count) {
            Some(end) if end <= self.sectors => self.check_alignment(sector, count),
            _ => Err(BadRequest::OutOfRange {
                sector,
                count,
                size: self.sectors,
            }),
        }
    }

    /// Whether both are whole logical sectors.
    ///
    /// # Errors
    /// [`BadRequest::Unaligned`].
    pub fn check_alignment(&self, sector: u64, count: u64) -> Result<(), BadRequest> {
        let unit = u64::from(self.sector_size / 512).max(1);
        if sector.is_multiple_of(unit) && count.is_multiple_of(unit) {
            Ok(())
        } else {
            Err(BadRequest::Unaligned {
                sector,
                count,
                sector_size: self.sector_size,
            })
        }
    }
}

/// Where a backend's data lives.
///
/// Several queues use one disk at a time, from several threads, so methods take `&self`. The engine has
/// checked range, alignment and read-only before it calls. The slices of one call belong to one request and
/// are to be moved by one vectored operation where the system has one (up to 4,096 slices if the backend
/// advertises that many: split at the system's limit). They are memory that the peer may be writing: see
/// [`SharedSlice`]. A method that fails may have done its work in part.
///
/// A write that was acknowledged must survive the death of the process that runs the backend, though not
/// of the machine, before a flush: a page cache does, a buffer of the process does not. A frontend that
/// reconnects repeats only what was not answered.
pub trait Disk {
    /// What the disk is.
    fn info(&self) -> DiskInfo;

    /// Reads from `sector` on until the slices are full.
    ///
    /// # Errors
    /// [`DiskError`].
    fn read(&self, sector: u64, into: &[SharedSliceMut<'_>]) -> Result<(), DiskError>;

    /// Writes all slices from `sector` on.
    ///
    /// # Errors
    /// [`DiskError`].
    fn write(&self, sector: u64, from: &[SharedSlice<'_>]) -> Result<(), DiskError>;

    /// Makes everything written before the call durable.
    ///
    /// # Errors
    /// [`DiskError`]: durability is not certain.
    fn flush(&self) -> Result<(), DiskError>;

    /// Forgets `count` sectors from `sector` on; for good if `secure`. Called only on a disk whose
    /// information says that it can.
    ///
    /// # Errors
    /// [`DiskError`].
    fn discard(&self, sector: u64, count: u64, secure: bool) -> Result<(), DiskError>;
}

/// A disk operation failed. The cause is the disk's to log; the peer learns no more than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// It failed.
    #[error("the disk operation failed")]
    Failed,
    /// The disk turned out not to do this.
    #[error("the disk does not support the operation")]
    NotSupported,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_in_wide_arithmetic() {
        let disk = DiskInfo::new(100);
        for (sector, count, ok) in [
            (0, 100, true),
            (99, 1, true),
            (100, 0, true),
            (100, 1, false),
            (0, 101, false),
            (u64::MAX, 1, false),
            (u64::MAX, u64::MAX, false),
            (1, u64::MAX, false),
        ] {
            assert_eq!(disk.check(sector, count).is_ok(), ok, "{sector}+{count}");
        }
    }

    #[test]
    fn big_logical_sectors_want_aligned_requests() {
        let disk = DiskInfo {
            sector_size: 4096,
            ..DiskInfo::new(80)
        };
        for (sector, count, ok) in [
            (0, 8, true),
            (8, 16, true),
            (1, 8, false),
            (8, 4, false),
            (72, 8, true),
        ] {
            assert_eq!(disk.check(sector, count).is_ok(), ok, "{sector}+{count}");
        }
    }

    #[test]
    fn info_bits_are_the_headers() {
        let disk = DiskInfo {
            read_only: true,
            cdrom: true,
            ..DiskInfo::new(8)
        };
        assert_eq!(disk.info_bits(), 5);
        assert_eq!(DiskInfo::new(8).with_info_bits(5), disk);
    }
}
