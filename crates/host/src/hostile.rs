//! The hostile domain: what a process tries that wants more than it was granted, and what it gets.
//!
//! Every attempt is made for real and by this process, and its outcome told: [`Outcome::Refused`] with
//! what the kernel or the monitor answered, or [`Outcome::Succeeded`]. The same attempts run without
//! confinement succeed for the most part, which the tests use to show that they can.
//!
//! [`attack_kernel`] needs nothing but a victim's process number, [`attack_page`] a page that another domain
//! granted for reading. [`attack_grants`], [`attack_granted`] and [`attack_store`] go by the monitor and the
//! store, and need a domain.

mod grants;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::sys::{Channel, Window, attack};

pub use grants::{KeptPage, attack_granted, attack_grants, attack_store};

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was not let, and this was the answer.
    Refused(String),
    /// It was let.
    Succeeded(String),
}

/// One attempt and its outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What was tried, and on whom.
    pub name: String,
    /// What came of it.
    pub outcome: Outcome,
}

impl Attempt {
    fn new(name: impl Into<String>, outcome: Outcome) -> Attempt {
        Attempt {
            name: name.into(),
            outcome,
        }
    }

    /// Whether it was not let.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self.outcome, Outcome::Refused(_))
    }
}

impl std::fmt::Display for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.outcome {
            Outcome::Refused(answer) => write!(f, "{}: refused ({answer})", self.name),
            Outcome::Succeeded(what) => write!(f, "{}: SUCCEEDED ({what})", self.name),
        }
    }
}

/// Judges what a system call answered: only an answer that says *no* is a refusal. `EFAULT`, say, means that
/// the call was let in and stumbled over the bad address that it was given.
fn judge(answer: Result<i64, Errno>) -> Outcome {
    match answer {
        Ok(value) => Outcome::Succeeded(format!("answer {value}")),
        Err(errno @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS)) => Outcome::Refused(name_of(errno)),
        Err(errno) => Outcome::Succeeded(format!("let in, {}", name_of(errno))),
    }
}

fn name_of(errno: Errno) -> String {
    let known = [
        (Errno::PERM, "EPERM"),
        (Errno::ACCESS, "EACCES"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::FAULT, "EFAULT"),
        (Errno::NOENT, "ENOENT"),
        (Errno::BADF, "EBADF"),
        (Errno::SRCH, "ESRCH"),
        (Errno::INVAL, "EINVAL"),
        (Errno::BUSY, "EBUSY"),
    ];
    let name = known.iter().find(|(known, _)| *known == errno);
    name.map_or_else(
        || format!("errno {}", errno.raw_os_error()),
        |(_, name)| (*name).to_owned(),
    )
}

/// Attempts on other processes, on files and network, and on the kernel's rarer doors. `victims` are
/// processes with what to call them: the monitor, another domain.
#[must_use]
pub fn attack_kernel(victims: &[(&str, Pid)]) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for (who, pid) in victims {
        attempts.extend(attack_process(who, *pid));
    }
    let mut tried = |name: &str, answer| attempts.push(Attempt::new(name, judge(answer)));
    let (read, write) = (libc::O_RDONLY, libc::O_RDWR);
    tried("open a file of the user", attack::open("/etc/passwd", read));
    tried(
        "list the root directory",
        attack::open("/", read | libc::O_DIRECTORY),
    );
    tried("make a file", attack::open("/tmp", write | libc::O_TMPFILE));
    tried(
        "open its own memory through /proc",
        attack::open("/proc/self/mem", write),
    );
    tried(
        "list its own descriptors through /proc",
        attack::open("/proc/self/fd", read | libc::O_DIRECTORY),
    );
    tried("open a terminal", attack::open("/dev/tty", write));
    tried("open /dev/mem", attack::open("/dev/mem", write));
    tried(
        "make a Unix socket",
        attack::socket(libc::AF_UNIX, libc::SOCK_STREAM),
    );
    tried(
        "make a TCP socket",
        attack::socket(libc::AF_INET, libc::SOCK_STREAM),
    );
    tried(
        "make a netlink socket",
        attack::socket(libc::AF_NETLINK, libc::SOCK_RAW),
    );
    tried("start a process", attack::fork());
    tried("execute a program", attack::execve());
    tried("become root", attack::setuid());
    tried("let others trace it", attack::become_dumpable());
    tried("raise its limits", attack::raise_limit());
    tried("make a namespace", attack::unshare());
    tried("join a namespace", attack::setns(0));
    tried("mount", attack::mount());
    tried("make memory to hand out", attack::memfd_create());
    tried("map memory for execution", attack::map_executable());
    tried("map shared memory of nothing", attack::map_kind(libc::MAP_SHARED));
    tried(
        "map memory that grows like a stack",
        attack::map_kind(libc::MAP_PRIVATE | libc::MAP_GROWSDOWN),
    );
    tried("make a mapping larger", attack::remap());
    tried("make a shared segment", attack::shmget());
    tried("io_uring", attack::io_uring());
    tried("userfaultfd", attack::userfaultfd());
    tried("bpf", attack::bpf());
    tried("perf_event_open", attack::perf());
    tried("keyctl", attack::keyctl());
    attempts
}

/// Attempts to learn of files by their names, by the calls that are meant for descriptors.
#[must_use]
pub fn attack_names(names: &[&str]) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for name in names {
        for (call, answer) in [
            ("fstatat", attack::stat_name(name)),
            ("statx", attack::statx_name(name)),
        ] {
            let outcome = match answer {
                Ok(_) => Outcome::Succeeded("it is there".into()),
                Err(errno) => Outcome::Refused(name_of(errno)),
            };
            attempts.push(Attempt::new(format!("learn of {name} by {call}"), outcome));
        }
    }
    attempts
}

fn attack_process(who: &str, pid: Pid) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut tried =
        |what: &str, answer| attempts.push(Attempt::new(format!("{what} of {who}"), judge(answer)));
    let proc = |what: &str| format!("/proc/{}/{what}", pid.as_raw_nonzero());
    let (read, write, list) = (libc::O_RDONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_DIRECTORY);
    tried("ptrace", attack::trace(pid));
    tried("process_vm_readv", attack::vm_read(pid));
    tried("process_vm_writev", attack::vm_write(pid));
    tried("/proc/PID/mem", attack::open(&proc("mem"), write));
    tried("/proc/PID/maps", attack::open(&proc("maps"), read));
    tried("/proc/PID/fd", attack::open(&proc("fd"), list));
    tried("/proc/PID/map_files", attack::open(&proc("map_files"), list));
    tried("/proc/PID/root", attack::open(&proc("root"), list));
    let handle = attack::pidfd_open(pid);
    // Without a handle the attempt is made with standard input, which is no handle either: what matters is
    // whether the call is let.
    let number = handle
        .ok()
        .and_then(|handle| i32::try_from(handle).ok())
        .unwrap_or(0);
    tried("pidfd_open", handle);
    tried("pidfd_getfd", attack::pidfd_getfd(number, 0));
    tried("kill", attack::kill(pid));
    tried("tgkill", attack::tgkill(pid));
    tried("tkill", attack::tkill(pid));
    tried("fcntl(F_SETOWN)", attack::set_owner(0, pid));
    tried("kcmp", attack::kcmp(pid));
    tried("prlimit", attack::prlimit(pid));
    attempts
}

/// Attempts on a page that was granted for reading only: by its descriptor, kept though the rules say to
/// close it, and by its mapping, page `page` of `window`.
#[must_use]
pub fn attack_page(descriptor: BorrowedFd<'_>, window: &Window, page: usize) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let fd = descriptor.as_raw_fd();
    let mut tried = |what: &str, answer| {
        attempts.push(Attempt::new(
            format!("{what} a page granted for reading"),
            judge(answer),
        ));
    };
    tried("map for writing", attack::map_writable(fd));
    tried("mprotect for writing", attack::protect_writable(window, page));
    // A descriptor for reading answers EBADF, which refuses as well.
    tried("pwrite to", attack::write_back(fd).map_err(bad_as_refused));
    tried("truncate", attack::truncate(fd).map_err(bad_as_refused));
    tried("grow", attack::grow(fd).map_err(bad_as_refused));
    tried("punch a hole into", attack::punch(fd).map_err(bad_as_refused));
    tried("fchmod", attack::chmod(fd));
    tried("seal", attack::seal(fd, libc::F_SEAL_WRITE));
    tried("seal for ever", attack::seal(fd, libc::F_SEAL_SEAL));
    let path = format!("/proc/self/fd/{fd}");
    let reopened = attack::open_keep(&path, libc::O_RDWR);
    match reopened {
        Ok(reopened) => tried("reopen and write to", attack::write_back(reopened.as_raw_fd())),
        Err(errno) => tried("reopen and write to", Err(errno)),
    }
    attempts
}

/// `EBADF`: the descriptor is not one for writing. `EINVAL`: `ftruncate` says it so.
fn bad_as_refused(errno: Errno) -> Errno {
    match errno {
        Errno::BADF | Errno::INVAL => Errno::PERM,
        other => other,
    }
}

/// Tries to send a descriptor on, to whoever is at the other end of a channel.
#[must_use]
pub fn attack_channel(channel: &Channel, descriptor: BorrowedFd<'_>) -> Attempt {
    let sent = channel.send(b"take it", &[descriptor.as_fd()]);
    let outcome = match sent {
        Ok(()) => Outcome::Succeeded("sent".into()),
        Err(error) => Outcome::Refused(error.to_string()),
    };
    Attempt::new("send a descriptor on", outcome)
}

/// The descriptors that this process has open, found by trying every number.
#[must_use]
pub fn open_descriptors() -> Vec<i32> {
    (0..65536)
        .filter(|&fd| attack::descriptor_flags(fd).is_ok())
        .collect()
}
