//! Input and output of pages that a peer may be writing: `preadv` and `pwritev` between them and a file, in full, and
//! `readv` and `writev` between them and a socket, as far as that goes.
//!
//! Such memory must never become a `&[u8]`, so the safe wrappers that exist cannot take it. Addresses go to the kernel as they are.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd as _};

use gnttab_io::shared::{SharedSlice, SharedSliceMut};

/// The kernel takes so many pieces at once (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Fills the slices from byte `offset` of the file on.
///
/// # Errors
/// The system's, or `UnexpectedEof` if the file ends before; some of the slices may be filled then.
pub(crate) fn read_at(file: &File, offset: u64, into: &[SharedSliceMut<'_>]) -> io::Result<()> {
    let pieces = joined(into.iter().map(|slice| piece(slice.as_ptr(), slice.len())));
    in_full(offset, pieces, |pieces, count, offset| {
        // SAFETY: each piece is mapped and writable as long as `into` is borrowed; `count` of them are there. Nobody has a
        // reference to their bytes, and whoever else writes them harms only what is read.
        unsafe { libc::preadv(file.as_raw_fd(), pieces, count, offset) }
    })
}

/// Writes the slices from byte `offset` of the file on.
///
/// # Errors
/// The system's; some of it may be written then.
pub(crate) fn write_at(file: &File, offset: u64, from: &[SharedSlice<'_>]) -> io::Result<()> {
    let pieces = joined(
        from.iter()
            .map(|slice| piece(slice.as_ptr().cast_mut(), slice.len())),
    );
    in_full(offset, pieces, |pieces, count, offset| {
        // SAFETY: each piece is mapped and readable as long as `from` is borrowed, and is only read; `count` of them are
        // there.
        unsafe { libc::pwritev(file.as_raw_fd(), pieces, count, offset) }
    })
}

/// Memory to be written to a socket, private and shared, in order.
#[derive(Debug, Default)]
pub(crate) struct Pieces<'a> {
    list: Vec<libc::iovec>,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Pieces<'a> {
    /// Adds private memory.
    pub(crate) fn push(&mut self, bytes: &'a [u8]) {
        join(&mut self.list, piece(bytes.as_ptr().cast_mut(), bytes.len()));
    }

    /// Adds shared memory.
    pub(crate) fn push_shared(&mut self, slice: &SharedSlice<'a>) {
        join(&mut self.list, piece(slice.as_ptr().cast_mut(), slice.len()));
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Writes them as far as they go; how many bytes went.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn send(&self, socket: impl AsFd) -> io::Result<usize> {
        let count = count(self.list.len())?;
        // SAFETY: each piece is mapped and readable as long as the borrow that it was made of lasts, and is only read;
        // `count` of them are there.
        let sent = unsafe { libc::writev(socket.as_fd().as_raw_fd(), self.list.as_ptr(), count) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Reads what has come into the slices, and what comes after that into private memory; how many bytes came.
///
/// # Errors
/// The system's.
pub(crate) fn receive(socket: impl AsFd, into: &[SharedSliceMut<'_>], then: &mut [u8]) -> io::Result<usize> {
    let shared = into.iter().map(|slice| piece(slice.as_ptr(), slice.len()));
    let pieces = joined(shared.chain([piece(then.as_mut_ptr(), then.len())]));
    let count = count(pieces.len())?;
    // SAFETY: each piece is mapped and writable as long as `into` and `then` are borrowed; `count` of them are there.
    // Nobody has a reference to the bytes of the shared ones, and whoever else writes them harms only what is received.
    let received = unsafe { libc::readv(socket.as_fd().as_raw_fd(), pieces.as_ptr(), count) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// As many pieces of so many as one call takes.
fn count(pieces: usize) -> io::Result<libc::c_int> {
    libc::c_int::try_from(pieces.min(MAX_PIECES)).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Adds a piece; to the last one, if it begins where that ends: the kernel has less to go through.
fn join(pieces: &mut Vec<libc::iovec>, piece: libc::iovec) {
    match pieces.last_mut() {
        Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == piece.iov_base => {
            last.iov_len += piece.iov_len;
        }
        _ => pieces.push(piece),
    }
}

fn joined(pieces: impl Iterator<Item = libc::iovec>) -> Vec<libc::iovec> {
    let mut list = Vec::new();
    pieces.for_each(|piece| join(&mut list, piece));
    list
}

fn piece(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    }
}

/// Calls until all pieces are done.
fn in_full(
    mut offset: u64,
    mut pieces: Vec<libc::iovec>,
    call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut rest = &mut pieces[..];
    while let Some(first) = rest.iter().position(|piece| piece.iov_len > 0) {
        rest = &mut rest[first..];
        let count = count(rest.len())?;
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        match usize::try_from(call(rest.as_ptr(), count, at)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                offset += done as u64;
                advance(rest, done);
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Takes `done` bytes off the front.
fn advance(pieces: &mut [libc::iovec], mut done: usize) {
    for piece in pieces {
        let step = piece.iov_len.min(done);
        piece.iov_base = piece.iov_base.wrapping_byte_add(step);
        piece.iov_len -= step;
        done -= step;
        if done == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use gnttab_io::grants::Access;
    use gnttab_io::shared::HeapPages;

    use super::*;

    #[test]
    fn neighbours_are_one_piece() {
        let heap = HeapPages::zeroed(4);
        let pages = heap.view_of(0, 4, Access::ReadWrite);
        let lengths = |places: &[(usize, usize)]| -> Vec<usize> {
            let pieces = places.iter().map(|&(at, len)| {
                let slice = pages.slice(at, len);
                piece(slice.as_ptr().cast_mut(), slice.len())
            });
            joined(pieces).iter().map(|piece| piece.iov_len).collect()
        };
        assert_eq!(
            lengths(&[(0, 4096), (4096, 4096), (8192, 512), (12_288, 4096)]),
            [8704, 4096]
        );
        assert_eq!(lengths(&[(4096, 4096), (0, 4096)]), [4096, 4096]);
    }

    /// More pieces than one call takes, of odd lengths.
    #[test]
    fn what_is_written_in_pieces_is_read_in_others() {
        let file = tempfile::tempfile().unwrap();
        let heap = HeapPages::zeroed(16);
        let pages = heap.view_of(0, 16, Access::ReadWrite);
        let content: Vec<u8> = (0..16 * 4096_u32)
            .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
            .collect();
        pages.write(0, &content);
        // The second half of each pair first in memory: no two are neighbours.
        let slices: Vec<SharedSlice<'_>> = (0..16 * 4096 / 32)
            .map(|i| pages.slice((i ^ 1) * 32, 32))
            .collect();
        assert!(slices.len() > MAX_PIECES);
        write_at(&file, 512, &slices).unwrap();
        let mut bytes = vec![0; content.len()];
        file.read_exact_at(&mut bytes, 512).unwrap();
        for (i, wanted) in content.chunks(32).enumerate() {
            assert_eq!(bytes[(i ^ 1) * 32..][..32], *wanted);
        }
        write_at(&file, 512, &[pages.slice(0, content.len())]).unwrap();

        pages.zero();
        read_at(
            &file,
            512,
            &[
                pages.slice_mut(0, 5),
                pages.slice_mut(5, 0),
                pages.slice_mut(5, 16 * 4096 - 5),
            ],
        )
        .unwrap();
        pages.read(0, &mut bytes);
        assert_eq!(bytes, content);

        let short = read_at(&file, 4096, &[pages.slice_mut(0, 16 * 4096)]).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
    }
}
