//! Disk images: files (or block devices) that are served as they are, byte for byte.
//!
//! Having an [`Image`] tells you: it is a readable (and unless asked otherwise writable) file of whole sectors, one at
//! least, and no other `gnttab` writes it as long as this one is open. It does not tell you that other programs
//! keep away.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, MemfdFlags, flock, memfd_create};
use rustix::io::Errno;

use crate::failure::Failure;

/// Bytes of a sector, the unit of every block protocol here.
pub(crate) const SECTOR: u64 = 512;

/// Why a file cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// It is not there.
    #[error("image {}: no such file", .0.display())]
    Missing(PathBuf),
    /// It is a directory.
    #[error("image {}: is a directory, not a disk image", .0.display())]
    Directory(PathBuf),
    /// It is a socket, a pipe or the like.
    #[error("image {}: is neither a file nor a block device", .0.display())]
    Special(PathBuf),
    /// It may not be read.
    #[error("image {}: permission to read it is denied", .0.display())]
    Unreadable(PathBuf),
    /// It may be read, but not written.
    #[error("image {}: permission to write it is denied", .0.display())]
    Unwritable(PathBuf),
    /// It has no bytes.
    #[error("image {}: is empty", .0.display())]
    Empty(PathBuf),
    /// Its end is inside a sector.
    #[error("image {}: its size of {size} bytes is not a whole number of {SECTOR}-byte sectors", path.display())]
    PartialSector {
        /// Which.
        path: PathBuf,
        /// How long.
        size: u64,
    },
    /// Another process serves it.
    #[error("image {}: locked, another process is serving it", .0.display())]
    Locked(PathBuf),
    /// Anything else the system says.
    #[error("image {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        let next = match &error {
            ImageError::Missing(path) => format!("make one with: truncate -s 1G {}", path.display()),
            ImageError::Directory(path) => {
                format!(
                    "make an image of it with: mke2fs -t ext4 -d {} disk.img 1G",
                    path.display()
                )
            }
            ImageError::Special(_) => "give a raw image file or a block device".to_owned(),
            ImageError::Unreadable(path) => format!("look at: ls -l {}", path.display()),
            ImageError::Unwritable(_) => "serve it with --read-only, or get the right to write it".to_owned(),
            ImageError::Empty(path) => format!("give it a size with: truncate -s 1G {}", path.display()),
            ImageError::PartialSector { path, size } => {
                format!(
                    "round it up with: truncate -s {} {}",
                    size.next_multiple_of(SECTOR),
                    path.display()
                )
            }
            ImageError::Locked(path) => format!(
                "find and stop the other one (fuser {}), or serve it with --read-only in both",
                path.display()
            ),
            ImageError::Io { path, .. } => format!("check it with: dd if={} of=/dev/null", path.display()),
        };
        Failure::new(&error).next(next)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    name: String,
    size: u64,
    read_only: bool,
}

impl Image {
    /// Opens and locks a disk image: shared with other readers if `read_only`, else for this process alone. The lock goes
    /// with the last copy of the descriptor, so it lasts as long as whichever process serves the image.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let name = || path.to_owned();
        let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing(name()),
            io::ErrorKind::PermissionDenied => ImageError::Unreadable(name()),
            _ => ImageError::Io { path: name(), source },
        })?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(ImageError::Directory(name()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Special(name()));
        }
        let file = open_file(path, read_only)?;
        lock(&file, path, read_only)?;
        let size = measure(&file).map_err(|source| ImageError::Io { path: name(), source })?;
        if size == 0 {
            return Err(ImageError::Empty(name()));
        }
        if size % SECTOR != 0 {
            return Err(ImageError::PartialSector { path: name(), size });
        }
        let name = path
            .file_name()
            .map_or_else(|| "disk".into(), |name| name.to_string_lossy());
        Ok(Image {
            file,
            name: name.into_owned(),
            size,
            read_only,
        })
    }

    /// An image in memory whose content follows from its size alone: one block of 4 KiB in eight is zero, all others
    /// differ. `size` is made whole blocks, one at least.
    pub(crate) fn generate(size: u64) -> io::Result<Self> {
        const BLOCK: usize = 4096;
        let mut file = memory_file()?;
        let blocks = size.div_ceil(BLOCK as u64).max(1);
        let mut block = [0_u8; BLOCK];
        let mut state = 0;
        for number in 0..blocks {
            if number % 8 == 7 {
                block.fill(0);
            } else {
                for word in block.chunks_exact_mut(8) {
                    word.copy_from_slice(&split_mix(&mut state).to_le_bytes());
                }
            }
            file.write_all(&block)?;
        }
        Ok(Image {
            file,
            name: "generated".to_owned(),
            size: blocks * BLOCK as u64,
            read_only: false,
        })
    }

    /// A copy in memory of the first `at_most` bytes (whole sectors, one at least), to write to without touching the
    /// original.
    pub(crate) fn copy_to_memory(&self, at_most: u64) -> io::Result<Self> {
        let size = self.size.min((at_most / SECTOR).max(1) * SECTOR);
        let mut copy = memory_file()?;
        let mut original = &self.file;
        original.rewind()?;
        if io::copy(&mut original.take(size), &mut copy)? != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Image {
            file: copy,
            name: self.name.clone(),
            size,
            read_only: false,
        })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The file's own name, without folders.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes: whole sectors, one at least.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Opened for reading alone.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// A format other than raw that the first bytes look like. It is served as raw bytes all the same, which is
    /// seldom what was meant.
    pub(crate) fn looks_like(&self) -> Option<&'static str> {
        let mut magic = [0; 8];
        self.file.read_exact_at(&mut magic, 0).ok()?;
        match &magic {
            [b'Q', b'F', b'I', 0xfb, ..] => Some("qcow2"),
            [b'K', b'D', b'M', b'V', ..] => Some("vmdk"),
            b"vhdxfile" => Some("vhdx"),
            b"conectix" => Some("vpc"),
            _ => None,
        }
    }
}

fn open_file(path: &Path, read_only: bool) -> Result<File, ImageError> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                if !read_only && File::open(path).is_ok() =>
            {
                ImageError::Unwritable(path.to_owned())
            }
            io::ErrorKind::PermissionDenied => ImageError::Unreadable(path.to_owned()),
            _ => ImageError::Io {
                path: path.to_owned(),
                source,
            },
        })
}

fn lock(file: &File, path: &Path, shared: bool) -> Result<(), ImageError> {
    let how = if shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, how) {
        // Some network file systems have no such locks; the image can be served all the same.
        Ok(()) | Err(Errno::NOLCK | Errno::OPNOTSUPP) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(ImageError::Locked(path.to_owned())),
        Err(error) => Err(ImageError::Io {
            path: path.to_owned(),
            source: error.into(),
        }),
    }
}

/// Bytes of a file or of a block device (whose metadata has none).
fn measure(mut file: &File) -> io::Result<u64> {
    let size = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(size)
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create("gnttab-demo-disk", MemfdFlags::CLOEXEC)?))
}

/// One step of the SplitMix64 generator.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn an_image_must_be_a_file_of_whole_sectors() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            Image::open(folder.path(), false),
            Err(ImageError::Directory(_))
        ));
        assert!(matches!(
            Image::open(&folder.path().join("none"), false),
            Err(ImageError::Missing(_))
        ));
        assert!(matches!(
            Image::open(Path::new("/dev/null"), false),
            Err(ImageError::Special(_))
        ));
        assert!(matches!(
            Image::open(file_of(b"").path(), false),
            Err(ImageError::Empty(_))
        ));
        let odd = file_of(&[1; 513]);
        assert!(matches!(
            Image::open(odd.path(), false),
            Err(ImageError::PartialSector { size: 513, .. })
        ));
        let good = file_of(&[1; 1024]);
        assert_eq!(Image::open(good.path(), false).unwrap().size(), 1024);
    }

    #[test]
    fn a_writer_keeps_everybody_else_out_and_readers_share() {
        let file = file_of(&[0; 512]);
        let writer = Image::open(file.path(), false).unwrap();
        assert!(matches!(
            Image::open(file.path(), false),
            Err(ImageError::Locked(_))
        ));
        assert!(matches!(
            Image::open(file.path(), true),
            Err(ImageError::Locked(_))
        ));
        drop(writer);
        let _reader = Image::open(file.path(), true).unwrap();
        let _another = Image::open(file.path(), true).unwrap();
        assert!(matches!(
            Image::open(file.path(), false),
            Err(ImageError::Locked(_))
        ));
    }

    #[test]
    fn the_generated_image_is_the_same_every_time_and_no_two_blocks_are() {
        let contents = [(); 2].map(|()| {
            let mut image = Image::generate(1 << 20).unwrap();
            image.file.rewind().unwrap();
            let mut bytes = Vec::new();
            image.file.read_to_end(&mut bytes).unwrap();
            bytes
        });
        assert_eq!(contents[0], contents[1]);
        let blocks: std::collections::HashSet<&[u8]> = contents[0].chunks(4096).collect();
        assert_eq!(blocks.len(), 256 - 256 / 8 + 1, "all but the zero blocks differ");
    }

    #[test]
    fn a_copy_in_memory_has_the_bytes_and_leaves_the_original_alone() {
        let original = Image::open(file_of(&[7; 2048]).path(), true).unwrap();
        let copy = original.copy_to_memory(1024).unwrap();
        assert_eq!(copy.size(), 1024);
        copy.file.write_all_at(&[9; 512], 0).unwrap();
        let mut bytes = [0; 512];
        original.file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 512]);
        copy.file.read_exact_at(&mut bytes, 512).unwrap();
        assert_eq!(bytes, [7; 512]);
    }

    #[test]
    fn a_foreign_format_is_recognised() {
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.resize(512, 0);
        assert_eq!(
            Image::open(file_of(&bytes).path(), true).unwrap().looks_like(),
            Some("qcow2")
        );
        assert_eq!(
            Image::open(file_of(&[0; 512]).path(), true).unwrap().looks_like(),
            None
        );
    }
}
