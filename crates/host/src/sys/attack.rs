//! The system calls of a hostile process, each harmless to the memory of the one that makes it.
//!
//! They are raw on purpose: a library that refuses a call by itself would prove nothing.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::Pid;

/// What a system call answered.
pub(crate) type Answer = Result<i64, Errno>;

/// Makes a system call.
///
/// # Safety
/// The call with these arguments must not break memory that this process uses.
unsafe fn call(number: i64, args: [i64; 6]) -> Answer {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller's promise.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(super::window::last_errno()),
        value => Ok(value),
    }
}

/// A system call whose arguments are numbers that mean no memory of this process.
macro_rules! attack {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) = $call:expr, [$($value:expr),*];)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name($($arg: $ty),*) -> Answer {
            let mut args = [0; 6];
            for (slot, value) in args.iter_mut().zip([$(i64::from($value)),*]) {
                *slot = value;
            }
            // SAFETY: no argument is an address in this process (0 is none).
            unsafe { call($call, args) }
        }
    )*};
}

const BAD_ADDRESS: i64 = 8;

attack! {
    /// Traces a process.
    trace(pid: Pid) = libc::SYS_ptrace, [PTRACE_SEIZE, pid.as_raw_nonzero().get(), 0, 0];
    /// Opens a handle of a process.
    pidfd_open(pid: Pid) = libc::SYS_pidfd_open, [pid.as_raw_nonzero().get(), 0];
    /// Takes a descriptor out of a process.
    pidfd_getfd(pidfd: i32, number: i32) = libc::SYS_pidfd_getfd, [pidfd, number, 0];
    /// Signals a process with signal 0, which is allowed when every other is, and does nothing.
    kill(pid: Pid) = libc::SYS_kill, [pid.as_raw_nonzero().get(), 0];
    /// Signals a thread.
    tgkill(pid: Pid) = libc::SYS_tgkill, [pid.as_raw_nonzero().get(), pid.as_raw_nonzero().get(), 0];
    /// Signals a thread, the old way.
    tkill(pid: Pid) = libc::SYS_tkill, [pid.as_raw_nonzero().get(), 0];
    /// Compares kernel objects with another process.
    kcmp(pid: Pid) = libc::SYS_kcmp,
        [rustix::process::getpid().as_raw_nonzero().get(), pid.as_raw_nonzero().get(), 1, 0, 0];
    /// Reads another process's limits.
    prlimit(pid: Pid) = libc::SYS_prlimit64, [pid.as_raw_nonzero().get(), 7, 0, 0];
    /// Starts a ring of asynchronous calls, with a bad address where it would be described.
    io_uring() = libc::SYS_io_uring_setup, [1, BAD_ADDRESS];
    /// Handles page faults.
    userfaultfd() = libc::SYS_userfaultfd, [1];
    /// Loads a program into the kernel, from a bad address.
    bpf() = libc::SYS_bpf, [5, BAD_ADDRESS, 72];
    /// Watches processors, described at a bad address.
    perf() = libc::SYS_perf_event_open, [BAD_ADDRESS, 0, -1, -1, 0];
    /// Makes namespaces.
    unshare() = libc::SYS_unshare, [libc::CLONE_NEWUSER];
    /// Joins a namespace.
    setns(fd: i32) = libc::SYS_setns, [fd, 0];
    /// Mounts, with bad addresses for names.
    mount() = libc::SYS_mount, [BAD_ADDRESS, BAD_ADDRESS, BAD_ADDRESS, 0, 0];
    /// Looks for keys.
    keyctl() = libc::SYS_keyctl, [0, -3, 0];
    /// Becomes root.
    setuid() = libc::SYS_setuid, [0];
    /// Makes a socket.
    socket(family: i32, kind: i32) = libc::SYS_socket, [family, kind, 0];
    /// Executes a program named at a bad address.
    execve() = libc::SYS_execve, [BAD_ADDRESS, 0, 0];
    /// Makes memory of its own to hand out, named at a bad address.
    memfd_create() = libc::SYS_memfd_create, [BAD_ADDRESS, 0];
    /// Makes a System V segment of no bytes, which is refused or wrong.
    shmget() = libc::SYS_shmget, [libc::IPC_PRIVATE, 0, 0o600];
    /// Lets others trace it.
    become_dumpable() = libc::SYS_prctl, [libc::PR_SET_DUMPABLE, 1];
    /// Raises its own limit of descriptors, described at a bad address.
    raise_limit() = libc::SYS_prlimit64, [0, 7, BAD_ADDRESS, 0];
    /// Cuts a page off.
    truncate(fd: i32) = libc::SYS_ftruncate, [fd, 0];
    /// Makes a page longer.
    grow(fd: i32) = libc::SYS_ftruncate, [fd, 1 << 20];
    /// Punches a hole into a page.
    punch(fd: i32) = libc::SYS_fallocate, [fd, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 4096];
    /// Opens a page to everybody.
    chmod(fd: i32) = libc::SYS_fchmod, [fd, 0o777];
    /// Adds seals to a page.
    seal(fd: i32, seals: i32) = libc::SYS_fcntl, [fd, libc::F_ADD_SEALS, seals];
    /// Asks to be signalled in somebody's name.
    set_owner(fd: i32, pid: Pid) = libc::SYS_fcntl, [fd, libc::F_SETOWN, pid.as_raw_nonzero().get()];
    /// Looks at a descriptor's flags.
    descriptor_flags(fd: i32) = libc::SYS_fcntl, [fd, libc::F_GETFD];
}

/// Of `ptrace`: attaches without stopping.
const PTRACE_SEIZE: i32 = 0x4206;

/// Starts a process, which ends at once.
pub(crate) fn fork() -> Answer {
    // SAFETY: the child makes one system call and is gone; the parent goes on as it was.
    let pid = unsafe { call(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0, 0, 0]) }?;
    if pid == 0 {
        // SAFETY: ends this process at once, running nothing of it.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: waits for the child made above; no status is stored.
    unsafe { call(libc::SYS_wait4, [pid, 0, 0, 0, 0, 0]) }?;
    Ok(pid)
}

fn address<T>(of: *const T) -> i64 {
    i64::try_from(of.expose_provenance()).unwrap_or(0)
}

/// Moves a byte between this process and page zero of another; `EFAULT` means that it was let in.
fn vm(number: i64, pid: Pid) -> Answer {
    let mut byte = 0_u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: ptr::without_provenance_mut(8),
        iov_len: 1,
    };
    let args = [
        pid.as_raw_nonzero().get().into(),
        address(&raw const local),
        1,
        address(&raw const remote),
        1,
        0,
    ];
    // SAFETY: at most the one byte of `byte` is written.
    unsafe { call(number, args) }
}

/// Reads another process's memory.
pub(crate) fn vm_read(pid: Pid) -> Answer {
    vm(libc::SYS_process_vm_readv, pid)
}

/// Writes another process's memory.
pub(crate) fn vm_write(pid: Pid) -> Answer {
    vm(libc::SYS_process_vm_writev, pid)
}

/// Opens a path. The descriptor is closed again.
pub(crate) fn open(path: &str, flags: i32) -> Answer {
    let fd = open_keep(path, flags)?;
    Ok(fd.as_raw_fd().into())
}

/// Opens a path.
pub(crate) fn open_keep(path: &str, flags: i32) -> Result<OwnedFd, Errno> {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let args = [
        libc::AT_FDCWD.into(),
        address(path.as_ptr()),
        (flags | libc::O_CLOEXEC).into(),
        0o600,
        0,
        0,
    ];
    // SAFETY: reads a string that ends in zero.
    let fd = unsafe { call(libc::SYS_openat, args) }?;
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: just opened, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks about a file by its name, in the way that is meant for a descriptor.
pub(crate) fn stat_name(path: &str) -> Answer {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let mut about = [0u64; 64];
    let args = [
        libc::AT_FDCWD.into(),
        address(path.as_ptr()),
        address(about.as_mut_ptr()),
        libc::AT_EMPTY_PATH.into(),
        0,
        0,
    ];
    // SAFETY: reads a string that ends in zero, and fills in a structure that is smaller than the array.
    unsafe { call(libc::SYS_newfstatat, args) }
}

/// The same by the newer call.
pub(crate) fn statx_name(path: &str) -> Answer {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let mut about = [0u64; 64];
    let args = [
        libc::AT_FDCWD.into(),
        address(path.as_ptr()),
        libc::AT_EMPTY_PATH.into(),
        libc::STATX_BASIC_STATS.into(),
        address(about.as_mut_ptr()),
        0,
    ];
    // SAFETY: reads a string that ends in zero, and fills in a structure that is smaller than the array.
    unsafe { call(libc::SYS_statx, args) }
}

/// Makes a page of its own memory executable.
pub(crate) fn map_executable() -> Answer {
    let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    map_anonymous(prot, libc::MAP_PRIVATE)
}

/// Makes a page of memory from nothing, of this kind (`MAP_SHARED`, say).
pub(crate) fn map_kind(kind: i32) -> Answer {
    map_anonymous(libc::PROT_READ | libc::PROT_WRITE, kind)
}

fn map_anonymous(prot: i32, kind: i32) -> Answer {
    let flags = kind | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { call(libc::SYS_mmap, [0, 4096, prot.into(), flags.into(), -1, 0]) }?;
    // SAFETY: the page just mapped, which nobody uses.
    unsafe { call(libc::SYS_munmap, [at, 4096, 0, 0, 0, 0]) }
}

/// Makes a mapping larger, one at address zero, where there is none; `EFAULT` means that it was let in.
pub(crate) fn remap() -> Answer {
    // SAFETY: nothing is mapped there, and nothing is moved: no `MREMAP_MAYMOVE`.
    unsafe { call(libc::SYS_mremap, [0, 4096, 8192, 0, 0, 0]) }
}

/// Maps the first page of a descriptor for writing. Nothing is written.
pub(crate) fn map_writable(fd: i32) -> Answer {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe {
        call(
            libc::SYS_mmap,
            [0, 4096, prot.into(), libc::MAP_SHARED.into(), fd.into(), 0],
        )
    }?;
    // SAFETY: the page just mapped, which nobody uses.
    unsafe { call(libc::SYS_munmap, [at, 4096, 0, 0, 0, 0]) }
}

/// Writes a byte into a descriptor: what is there already, at the start.
pub(crate) fn write_back(fd: i32) -> Answer {
    let mut byte = 0_u8;
    let to = address(&raw mut byte);
    // SAFETY: writes the one byte of `byte`.
    unsafe { call(libc::SYS_pread64, [fd.into(), to, 1, 0, 0, 0]) }?;
    // SAFETY: reads the one byte of `byte`.
    unsafe { call(libc::SYS_pwrite64, [fd.into(), to, 1, 0, 0, 0]) }
}

/// Makes a page of a window writable behind the window's back.
pub(crate) fn protect_writable(window: &super::Window, page: usize) -> Answer {
    let at =
        i64::try_from(window.addresses().start + page * gnttab_abi::PAGE_SIZE).map_err(|_| Errno::FAULT)?;
    if page >= window.pages() {
        return Err(Errno::FAULT);
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a page inside the window; more access breaks nothing.
    unsafe { call(libc::SYS_mprotect, [at, 4096, prot.into(), 0, 0, 0]) }
}
/// Whether this process can read a byte at an address, found out without touching it.
pub(crate) fn readable(at: usize, pipe: BorrowedFd<'_>) -> bool {
    let at = i64::try_from(at).unwrap_or(0);
    // SAFETY: the kernel reads one byte or says that it cannot.
    unsafe { call(libc::SYS_write, [pipe.as_raw_fd().into(), at, 1, 0, 0, 0]) }.is_ok()
}

/// Whether a descriptor is a file, as every memfd is.
pub(crate) fn is_file(fd: i32) -> bool {
    use rustix::fs::FileType;
    if descriptor_flags(fd).is_err() {
        return false;
    }
    // SAFETY: just seen to be open; used for one question.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::fs::fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}
