//! What a process does to itself on its way to being a domain.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{self, DumpableBehavior, Pid, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags};

/// Takes the channel that the monitor put in the place of standard input, puts `/dev/null` there,
/// and closes every other descriptor but standard output and error.
///
/// For the first lines of `main` only: whatever owns a descriptor at this point loses it.
///
/// # Errors
/// The kernel's: standard input is closed, or there is no `/dev/null`.
pub(crate) fn take_channel_from_stdin() -> Result<OwnedFd, Errno> {
    let first: libc::c_uint = 3;
    // SAFETY: closes descriptors that nothing in this process has taken into its possession yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if closed != 0 {
        return Err(Errno::NOSYS);
    }
    let channel = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(channel)
}

/// Becomes a user of its own, in no group. Whether there was one to be had: this process is root, and the
/// number is one that its user namespace has.
///
/// # Errors
/// The kernel's, when the change went half way.
pub(crate) fn become_user(user: u32) -> Result<bool, Errno> {
    if !process::geteuid().is_root() {
        return Ok(false);
    }
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    match rustix::thread::set_thread_res_gid(gid, gid, gid) {
        Err(Errno::INVAL | Errno::PERM) => return Ok(false),
        other => other?,
    }
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(true)
}

/// Makes a directory without files its root, so that no name leads to one any more: the directory of what it knows of its
/// own descriptors. Whether that could be done: it takes root, or a user namespace of its own, in which it then is.
///
/// # Errors
/// The kernel's, when the change went half way.
pub(crate) fn leave_file_system() -> Result<bool, Errno> {
    const EMPTY: &str = "/proc/self/fdinfo";
    if process::chroot(EMPTY).is_err() {
        // SAFETY: no descriptor and no memory changes hands: only what this process may do to the system does.
        let own = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) };
        if own.and_then(|()| process::chroot(EMPTY)).is_err() {
            return Ok(false);
        }
    }
    // What it was in before has names too.
    process::chdir("/")?;
    Ok(true)
}

/// Gives up every capability.
///
/// # Errors
/// The kernel's.
pub(crate) fn give_up_capabilities() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    rustix::thread::set_capabilities(None, sets)
}

/// Lowers a limit for good. A hard limit that is lower already stays.
///
/// # Errors
/// The kernel's.
pub(crate) fn limit(resource: Resource, value: u64) -> Result<(), Errno> {
    let value = process::getrlimit(resource)
        .maximum
        .map_or(value, |maximum| maximum.min(value));
    process::setrlimit(
        resource,
        Rlimit {
            current: Some(value),
            maximum: Some(value),
        },
    )
}

/// Allows this process as many descriptors as it may have: the soft limit becomes the hard one.
pub(crate) fn raise_descriptor_limit() -> u64 {
    let now = process::getrlimit(Resource::Nofile);
    let _ = process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: now.maximum,
            maximum: now.maximum,
        },
    );
    process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// No core dump, and nobody of the same user may trace this process or look into its `/proc`.
///
/// # Errors
/// The kernel's.
pub(crate) fn become_undumpable() -> Result<(), Errno> {
    process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// This process dies with the thread that started it. `monitor` must still be the parent.
///
/// # Errors
/// `ESRCH` when the parent has died already.
pub(crate) fn die_with_parent(monitor: Pid) -> Result<(), Errno> {
    process::set_parent_process_death_signal(Some(Signal::KILL))?;
    match process::getppid() {
        Some(parent) if parent == monitor => Ok(()),
        _ => Err(Errno::SRCH),
    }
}

/// Gives up all ways to gain privileges by `execve`.
///
/// # Errors
/// The kernel's.
pub(crate) fn give_up_new_privileges() -> Result<(), Errno> {
    rustix::thread::set_no_new_privs(true)
}

/// Takes possession of a descriptor that this process inherited without close-on-exec, and sets that flag:
/// which is how a second attempt is told from the first.
///
/// # Errors
/// `EBADF`: not open, or taken already.
pub(crate) fn take_inherited(number: i32) -> Result<OwnedFd, Errno> {
    use std::os::fd::{BorrowedFd, FromRawFd};
    if number < 3 {
        return Err(Errno::BADF);
    }
    // SAFETY: only asked whether it is open; -1 is the one number that may not be borrowed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if rustix::io::fcntl_getfd(borrowed)?.contains(rustix::io::FdFlags::CLOEXEC) {
        return Err(Errno::BADF);
    }
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: open, and inherited: everything that this process opened by itself is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
