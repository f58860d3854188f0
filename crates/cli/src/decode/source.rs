//! Where the bytes come from: a file, a part of one, a place in an ELF core, standard input.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use gnttab_abi::PAGE_SIZE;
use object::Endianness;
use object::elf::{FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader as _};
use object::read::{ReadCache, ReadRef};

use crate::args::Decode;
use crate::failure::Failure;

/// The most that is decoded at once: the largest table there may be, and more.
const MOST: u64 = 4096 * PAGE_SIZE as u64;

/// Which address of a core.
#[derive(Debug, Clone, Copy)]
enum Space {
    Virtual,
    Physical,
}

/// The bytes that were asked for.
pub(crate) fn read(args: &Decode) -> Result<Vec<u8>, Failure> {
    let length = args.frames.map(|frames| u64::from(frames) * PAGE_SIZE as u64);
    let fail = |error: io::Error| Failure::new(format!("{}: {error}", args.file.display()));
    if args.file.as_os_str() == "-" {
        return stream(args, io::stdin().lock(), length);
    }
    let mut file = open(&args.file)?;
    if file.metadata().map_err(fail)?.file_type().is_fifo() {
        return stream(args, file, length);
    }
    let mut magic = [0; 4];
    let is_elf = file.read_exact(&mut magic).is_ok() && &magic == b"\x7fELF";
    let start = match (args.address, args.physical) {
        (Some(address), _) => find(&args.file, &file, is_elf, Space::Virtual, address, length)?,
        (_, Some(address)) => find(&args.file, &file, is_elf, Space::Physical, address, length)?,
        _ if is_elf && args.offset.is_none() => {
            return Err(Failure::wrong_use(format!(
                "{}: this is an ELF file, and not said is where in it",
                args.file.display()
            ))
            .next("give --address, --physical or --offset, and --frames"));
        }
        _ => args.offset.unwrap_or(0),
    };
    file.seek(SeekFrom::Start(start)).map_err(fail)?;
    let bytes = take(file, length).map_err(fail)?;
    checked(args, bytes, length)
}

/// The bytes of what can only be read once, from its start.
fn stream(args: &Decode, mut from: impl Read, length: Option<u64>) -> Result<Vec<u8>, Failure> {
    let name = match args.file.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => args.file.display().to_string(),
    };
    if args.address.or(args.physical).is_some() {
        return Err(
            Failure::wrong_use(format!("{name}: a core cannot be read from a pipe")).next("give its file"),
        );
    }
    let fail = |error: io::Error| Failure::new(format!("{name}: {error}"));
    io::copy(&mut from.by_ref().take(args.offset.unwrap_or(0)), &mut io::sink()).map_err(fail)?;
    let bytes = take(from, length).map_err(fail)?;
    checked(args, bytes, length)
}

/// All of a small file.
pub(crate) fn whole(path: &Path) -> Result<Vec<u8>, Failure> {
    take(open(path)?, None).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn open(path: &Path) -> Result<File, Failure> {
    let fail = |error: io::Error| {
        let failure = Failure::new(format!("{}: {error}", path.display()));
        match error.kind() {
            io::ErrorKind::NotFound => failure.next("give the file that the frames were saved to"),
            _ => failure,
        }
    };
    let file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(Failure::new(format!("{}: is a directory", path.display())).next("give a file"));
    }
    Ok(file)
}

fn take(from: impl Read, length: Option<u64>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(length.unwrap_or(MOST + 1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn checked(args: &Decode, bytes: Vec<u8>, length: Option<u64>) -> Result<Vec<u8>, Failure> {
    let name = args.file.display();
    let got = bytes.len() as u64;
    if got == 0 {
        return Err(Failure::new(format!("{name}: there is nothing there")).next("look at --offset"));
    }
    match length {
        Some(length) if got < length => Err(Failure::new(format!(
            "{name}: {got} bytes are left there, and --frames asks for {length}"
        ))
        .next(match got / PAGE_SIZE as u64 {
            0 => "leave --frames out to decode what there is".to_owned(),
            whole => format!("at most --frames {whole}"),
        })),
        None if got > MOST => Err(Failure::wrong_use(format!(
            "{name}: more than {} MiB, which is no grant table",
            MOST >> 20
        ))
        .next("say which part of it with --offset and --frames")),
        _ => Ok(bytes),
    }
}

/// Where in the file an address of a core is.
fn find(
    path: &Path,
    file: &File,
    is_elf: bool,
    space: Space,
    address: u64,
    length: Option<u64>,
) -> Result<u64, Failure> {
    let name = path.display();
    if !is_elf {
        return Err(
            Failure::new(format!("{name}: not an ELF core, so it has no addresses"))
                .next("say where in the file with --offset"),
        );
    }
    let data = ReadCache::new(file);
    let broken = |error: object::Error| Failure::new(format!("{name}: {error}"));
    let is_narrow = data.read_bytes_at(4, 1).is_ok_and(|class| class == [1]);
    let found = if is_narrow {
        segment::<FileHeader32<Endianness>>(&data, space, address)
    } else {
        segment::<FileHeader64<Endianness>>(&data, space, address)
    };
    let Some((offset, left)) = found.map_err(broken)? else {
        let what = match space {
            Space::Virtual => "virtual",
            Space::Physical => "physical",
        };
        return Err(
            Failure::new(format!("{name}: no segment has {what} address {address:#x}"))
                .next("readelf -l shows the segments; a kernel's page may be there under its physical address alone"),
        );
    };
    let wanted = length.unwrap_or(left);
    if wanted > left {
        return Err(Failure::new(format!(
            "{name}: the segment ends {left} bytes behind {address:#x}, and {wanted} were asked for"
        ))
        .next(format!("at most --frames {}", left / PAGE_SIZE as u64)));
    }
    if length.is_none() && left > MOST {
        return Err(
            Failure::wrong_use(format!("{name}: not said is how much from {address:#x} on"))
                .next("give --frames"),
        );
    }
    Ok(offset)
}

/// The offset of an address in the file, and the bytes that its segment has from there.
fn segment<F: FileHeader>(
    data: &ReadCache<&File>,
    space: Space,
    address: u64,
) -> object::Result<Option<(u64, u64)>> {
    let header = F::parse(data)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, data)? {
        if segment.p_type(endian) != PT_LOAD {
            continue;
        }
        let start: u64 = match space {
            Space::Virtual => segment.p_vaddr(endian).into(),
            Space::Physical => segment.p_paddr(endian).into(),
        };
        let (offset, size) = segment.file_range(endian);
        if let Some(inside) = address.checked_sub(start).filter(|inside| *inside < size) {
            let Some(at) = offset.checked_add(inside) else {
                continue;
            };
            return Ok(Some((at, size - inside)));
        }
    }
    Ok(None)
}
