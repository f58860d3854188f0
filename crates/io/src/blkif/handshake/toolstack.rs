//! The toolstack's part: it makes the directories of a device, takes it offline and removes it (spec 2.6, 6.2).

use alloc::format;
use alloc::string::{String, ToString};

use gnttab_abi::DomId;

use crate::xenbus::{Store, StoreExt, Tx, XenbusError, XenbusState, read_state, write_state};

/// A block device's number: what names it in its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualDevice(pub u32);

impl VirtualDevice {
    /// Partition `partition` (0 for the whole) of the `disk`th Xen disk: `xvd(0, 0)` is xvda, 51712.
    /// Disks from 16 on, and partitions from 16 on, have extended numbers; 2^20 disks and 256 partitions
    /// there are.
    #[must_use]
    pub const fn xvd(disk: u32, partition: u32) -> VirtualDevice {
        if disk < 16 && partition < 16 {
            VirtualDevice(202 << 8 | disk << 4 | partition)
        } else {
            VirtualDevice(1 << 28 | (disk & 0xF_FFFF) << 8 | (partition & 0xFF))
        }
    }

    /// The number of a name such as `xvda`, `xvdaa` or `xvdb3`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<VirtualDevice> {
        let rest = name.strip_prefix("xvd")?;
        let letters = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_lowercase()).len();
        let (letters, digits) = rest.split_at(letters);
        if letters.is_empty() || letters.len() > 4 {
            return None;
        }
        let disk = letters
            .bytes()
            .fold(0, |disk, letter| disk * 26 + u32::from(letter - b'a') + 1)
            - 1;
        let partition = if digits.is_empty() {
            0
        } else {
            digits.parse().ok().filter(|part| *part > 0)?
        };
        let fits = disk < 1 << 20 && partition < 256;
        fits.then(|| VirtualDevice::xvd(disk, partition))
    }
}

/// Whether a device may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceMode {
    /// `r`
    ReadOnly,
    /// `w`
    ReadWrite,
}

/// A block device to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VbdSpec {
    /// Who uses it.
    pub frontend: DomId,
    /// Who serves it.
    pub backend: DomId,
    /// What it is called in the frontend's domain.
    pub device: VirtualDevice,
    /// Whether it may be written.
    pub mode: DeviceMode,
    /// Whether it is a CD-ROM.
    pub cdrom: bool,
    /// Whether it may be discarded from.
    pub discard: bool,
    /// Whether the frontend may trust its backend: a frontend that must not bounces all data.
    pub trusted: bool,
    /// The backend's `type` key: what `params` names.
    pub kind: String,
    /// The backend's `params` key: what to serve.
    pub params: String,
    /// The backend's `dev` key: the device's name, for people.
    pub name: String,
}

impl VbdSpec {
    /// A writable disk that is not trusted.
    #[must_use]
    pub fn new(frontend: DomId, backend: DomId, device: VirtualDevice) -> VbdSpec {
        VbdSpec {
            frontend,
            backend,
            device,
            mode: DeviceMode::ReadWrite,
            cdrom: false,
            discard: true,
            trusted: false,
            kind: String::from("file"),
            params: String::new(),
            name: String::new(),
        }
    }

    /// Where its directories are.
    #[must_use]
    pub fn paths(&self) -> VbdPaths {
        VbdPaths::new(self.frontend, self.backend, self.device)
    }
}

/// The two directories of a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VbdPaths {
    /// The frontend's.
    pub frontend: String,
    /// The backend's.
    pub backend: String,
}

impl VbdPaths {
    /// The directories of a device.
    #[must_use]
    pub fn new(frontend: DomId, backend: DomId, device: VirtualDevice) -> VbdPaths {
        let (fe, be, id) = (frontend.0, backend.0, device.0);
        VbdPaths {
            frontend: format!("/local/domain/{fe}/device/vbd/{id}"),
            backend: format!("/local/domain/{be}/backend/vbd/{fe}/{id}"),
        }
    }
}

/// Makes both directories in one transaction, each owned by its side and readable by the other. What was there
/// before is removed.
///
/// # Errors
/// The store's error; nothing was made then.
pub fn create<S: Store>(store: &mut S, spec: &VbdSpec) -> Result<VbdPaths, XenbusError<S::Error>> {
    let paths = spec.paths();
    store.transaction(|store, tx| {
        let dir = &paths.frontend;
        make_directory(store, tx, dir, spec.frontend, spec.backend)?;
        write_link_to_backend(store, tx, &paths, spec.backend)?;
        store.put(tx, dir, "virtual-device", spec.device.0)?;
        store.put(tx, dir, "device-type", device_type(spec.cdrom))?;
        store.put(tx, dir, "trusted", u8::from(spec.trusted))?;
        store.put(tx, dir, "state", XenbusState::Initialising)?;
        write_backend(store, tx, &paths, spec)
    })?;
    Ok(paths)
}

fn write_backend<S: Store>(
    store: &mut S,
    tx: Tx,
    paths: &VbdPaths,
    spec: &VbdSpec,
) -> Result<(), XenbusError<S::Error>> {
    let dir = &paths.backend;
    make_directory(store, tx, dir, spec.backend, spec.frontend)?;
    store.put(tx, dir, "frontend", &paths.frontend)?;
    store.put(tx, dir, "frontend-id", spec.frontend.0)?;
    store.put(tx, dir, "online", 1)?;
    store.put(tx, dir, "removable", 0)?;
    store.put(tx, dir, "bootable", 1)?;
    store.put(tx, dir, "dev", &spec.name)?;
    store.put(tx, dir, "type", &spec.kind)?;
    store.put(
        tx,
        dir,
        "mode",
        if spec.mode == DeviceMode::ReadOnly {
            "r"
        } else {
            "w"
        },
    )?;
    store.put(tx, dir, "device-type", device_type(spec.cdrom))?;
    store.put(tx, dir, "discard-enable", u8::from(spec.discard))?;
    store.put(tx, dir, "params", &spec.params)?;
    store.put(tx, dir, "state", XenbusState::Initialising)
}

fn write_link_to_backend<S: Store>(
    store: &mut S,
    tx: Tx,
    paths: &VbdPaths,
    backend: DomId,
) -> Result<(), XenbusError<S::Error>> {
    store.put(tx, &paths.frontend, "backend", &paths.backend)?;
    store.put(tx, &paths.frontend, "backend-id", backend.0)
}

fn device_type(cdrom: bool) -> &'static str {
    if cdrom { "cdrom" } else { "disk" }
}

/// An empty directory of `owner`; what will be made in it inherits the permissions.
fn make_directory<S: Store>(
    store: &mut S,
    tx: Tx,
    directory: &str,
    owner: DomId,
    reader: DomId,
) -> Result<(), XenbusError<S::Error>> {
    store.remove(tx, directory).map_err(XenbusError::Store)?;
    store.write(tx, directory, b"").map_err(XenbusError::Store)?;
    store
        .set_permissions(tx, directory, owner, &[reader])
        .map_err(XenbusError::Store)
}

/// Puts a new backend, of any domain, in the place of one that is gone: the frontend closes what it had
/// and connects anew. `old` says where the old one was; its directory is removed.
///
/// # Errors
/// The store's error; nothing was changed then.
pub fn replace_backend<S: Store>(
    store: &mut S,
    old: &VbdPaths,
    spec: &VbdSpec,
) -> Result<VbdPaths, XenbusError<S::Error>> {
    let paths = spec.paths();
    store.transaction(|store, tx| {
        store.remove(tx, &old.backend).map_err(XenbusError::Store)?;
        write_backend(store, tx, &paths, spec)?;
        let (owner, readers) = (spec.frontend, [spec.backend]);
        for key in store
            .directory(tx, &paths.frontend)
            .map_err(XenbusError::Store)?
            .unwrap_or_default()
        {
            let path = format!("{}/{key}", paths.frontend);
            store
                .set_permissions(tx, &path, owner, &readers)
                .map_err(XenbusError::Store)?;
        }
        store
            .set_permissions(tx, &paths.frontend, owner, &readers)
            .map_err(XenbusError::Store)?;
        write_link_to_backend(store, tx, &paths, spec.backend)?;
        // Lest the new one takes the old connection for one that it could go on with.
        write_state(store, tx, &paths.frontend, XenbusState::Initialising)
    })?;
    Ok(paths)
}

/// Asks both sides to let go of the device for good (spec 2.8, 6.4). Wait for [`is_closed`], ten seconds at
/// most, then [`remove`].
///
/// # Errors
/// The store's error.
pub fn take_offline<S: Store>(store: &mut S, paths: &VbdPaths) -> Result<(), XenbusError<S::Error>> {
    store.transaction(|store, tx| {
        store.put(tx, &paths.backend, "online", 0)?;
        match read_state_in(store, tx, &paths.backend)? {
            XenbusState::Closed | XenbusState::Unknown => Ok(()),
            _ => write_state(store, tx, &paths.backend, XenbusState::Closing),
        }
    })
}

fn read_state_in<S: Store>(
    store: &mut S,
    tx: Tx,
    directory: &str,
) -> Result<XenbusState, XenbusError<S::Error>> {
    let text = store
        .read(tx, &format!("{directory}/state"))
        .map_err(XenbusError::Store)?;
    Ok(text.map_or(XenbusState::Unknown, |text| XenbusState::from_text(&text)))
}

/// Whether the backend has let go.
///
/// # Errors
/// The store's error.
pub fn is_closed<S: Store>(store: &mut S, paths: &VbdPaths) -> Result<bool, XenbusError<S::Error>> {
    Ok(matches!(
        read_state(store, &paths.backend)?,
        XenbusState::Closed | XenbusState::Unknown
    ))
}

/// Removes both directories.
///
/// # Errors
/// The store's error.
pub fn remove<S: Store>(store: &mut S, paths: &VbdPaths) -> Result<(), XenbusError<S::Error>> {
    let paths = [paths.frontend.to_string(), paths.backend.to_string()];
    store.transaction(|store, tx| {
        paths
            .iter()
            .try_for_each(|path| store.remove(tx, path))
            .map_err(XenbusError::Store)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_table() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvda1", 51713),
            ("xvdb", 51728),
            ("xvdp15", 51712 + 255),
            ("xvdq", 1 << 28 | 16 << 8),
            ("xvda16", 1 << 28 | 16),
            ("xvdaa", 1 << 28 | 26 << 8),
            ("xvdab3", 1 << 28 | 27 << 8 | 3),
        ] {
            assert_eq!(
                VirtualDevice::from_name(name),
                Some(VirtualDevice(number)),
                "{name}"
            );
        }
        for name in [
            "", "xvd", "sda", "xvd1", "xvda0", "xvdA", "xvda256", "xvdaaaaa", "xvda-1", "xvda1b",
        ] {
            assert_eq!(VirtualDevice::from_name(name), None, "{name}");
        }
    }
}
