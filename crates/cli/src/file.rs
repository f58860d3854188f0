//! A plain file as a [`BlockDevice`]: no domains, no grants. It is the baseline that `gnttab disk` is measured against, and
//! what the NBD server is tested on.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::block::{
    BlockDevice, Completion, Data, DeviceError, Geometry, NoPages, Operation, Pages, Request,
};

/// See the module. Every request is done by the time `submit` returns.
#[derive(Debug)]
pub(crate) struct FileDevice {
    file: Arc<File>,
    geometry: Geometry,
    done: Vec<Completion>,
}

impl FileDevice {
    /// One queue of the disk that `file` holds; `size` in bytes, whole sectors.
    pub(crate) fn new(file: Arc<File>, size: u64, read_only: bool) -> Self {
        let geometry = Geometry {
            size,
            block_size: 512,
            preferred_size: 4096,
            read_only,
            flush: true,
            discard: !read_only,
        };
        FileDevice {
            file,
            geometry,
            done: Vec::new(),
        }
    }

    fn perform(&self, request: &mut Request) -> io::Result<()> {
        let (offset, length) = (request.offset, u64::from(request.length));
        match request.operation {
            Operation::Read => self.file.read_exact_at(own(&mut request.data)?, offset),
            Operation::Write { fua } => {
                self.file.write_all_at(own(&mut request.data)?, offset)?;
                self.sync_if(fua)
            }
            Operation::Flush => self.file.sync_data(),
            Operation::Discard => self.punch(offset, length),
            Operation::WriteZeroes { fua, no_hole } => {
                if no_hole || self.punch(offset, length).is_err() {
                    self.write_zeroes(offset, length)?;
                }
                self.sync_if(fua)
            }
        }
    }

    fn sync_if(&self, fua: bool) -> io::Result<()> {
        if fua { self.file.sync_data() } else { Ok(()) }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&*self.file, how, offset, length)?)
    }

    fn write_zeroes(&self, mut offset: u64, length: u64) -> io::Result<()> {
        let zeroes = [0; 64 << 10];
        let end = offset + length;
        while offset < end {
            let step = (end - offset).min(zeroes.len() as u64);
            self.file
                .write_all_at(&zeroes[..usize::try_from(step).unwrap_or(zeroes.len())], offset)?;
            offset += step;
        }
        Ok(())
    }
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn pages(&mut self) -> impl Pages + '_ {
        NoPages
    }

    fn submit(&mut self, mut request: Request) {
        let result = self.perform(&mut request).map_err(|error| device_error(&error));
        self.done.push(Completion {
            tag: request.tag,
            result,
            data: request.data,
        });
    }

    fn kick(&mut self) {}

    fn completions(&mut self, into: &mut Vec<Completion>) -> bool {
        let any = !self.done.is_empty();
        into.append(&mut self.done);
        any
    }

    fn hush(&mut self) {}

    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// It lends no pages, so the data is never in any.
fn own(data: &mut Data) -> io::Result<&mut [u8]> {
    match data {
        Data::Own(bytes) => Ok(bytes),
        Data::Leased(_) => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn device_error(error: &io::Error) -> DeviceError {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => DeviceError::NoSpace,
        Some(Errno::OPNOTSUPP) => DeviceError::Unsupported,
        _ => DeviceError::Io,
    }
}
