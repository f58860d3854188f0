//! Where a user's sockets are: `$XDG_RUNTIME_DIR/gnttab`, else `/tmp/gnttab-$UID`.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::PathBuf;

use crate::failure::Failure;

/// The folder, made if it was not there; nobody else may enter it.
pub(crate) fn folder() -> Result<PathBuf, Failure> {
    let uid = rustix::process::getuid().as_raw();
    let path = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder).join("gnttab"),
        _ => PathBuf::from(format!("/tmp/gnttab-{uid}")),
    };
    let fail = |why: &dyn std::fmt::Display| {
        Failure::new(format!("folder {}: {why}", path.display()))
            .next("set XDG_RUNTIME_DIR to a folder of yours that nobody else may write")
    };
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // In /tmp anybody could have made it first.
            let metadata = fs::symlink_metadata(&path).map_err(|error| fail(&error))?;
            if !metadata.is_dir() || metadata.uid() != uid || metadata.mode() & 0o022 != 0 {
                return Err(fail(&"is not a folder that only you may write"));
            }
        }
        Err(error) => return Err(fail(&error)),
    }
    Ok(path)
}
