//! Confinement: what a process gives up before a domain's program runs in it.
//!
//! The seals of [`SealedMemory`](crate::sys::SealedMemory) protect pages. This protects everything else: the
//! monitor and the other domains from `ptrace`, `/proc`, signals and `pidfd_getfd`, the user's files and
//! network, and the kernel from calls that a domain has no use for. Several walls, each of which this
//! machine may or may not give; [`Isolation`] says which, and whether those that matter are there.
//!
//! The system-call filter is an allow-list with arguments checked. What it leaves out, and why:
//!
//! | left out | because |
//! |---|---|
//! | `ptrace`, `process_vm_*`, `process_madvise`, `kcmp`, `pidfd_*` | other processes of the same user |
//! | `kill`, `tkill`, `rt_*sigqueueinfo`, `fcntl(F_SETOWN)`; `tgkill` but to itself | signals to others |
//! | `open*`, `socket`, `connect`, `bind`, `listen` | files and network |
//! | `sendmsg`, `sendmmsg` | descriptors are received, never sent on |
//! | `ftruncate`, `fallocate`, `fchmod`, `fcntl(F_ADD_SEALS)`, `memfd_create` | shared pages |
//! | `fork`, `execve`, `clone` but for threads | processes that the monitor does not know |
//! | `mmap` and `mprotect` for execution | code that is not the program's |
//! | `mmap` of shared anonymous or downward growing memory, `mremap`, `shmget` | memory that no limit counts |
//! | `io_uring_*`, `userfaultfd`, `bpf`, `perf_event_open`, `keyctl`, `mount`, `unshare`, `setns` | the kernel's rarer doors |
//!
//! `fstatat` and `statx` are how the C library and `std` ask about an open descriptor, and the filter cannot
//! read the name that may be given with it. So the process's root is a directory without files, and no name
//! leads anywhere. That takes root or a user namespace; where neither is to be had
//! ([`Isolation::nameless`]), and for a program that is executed, which needs its files' names, one thing is
//! left to a domain outside of itself: it can learn of a file by name that it exists, its kind, size, owner,
//! mode and times, as far as its user may search the directories on the way. It learns nothing of the content.
//!
//! A program that is executed (rather than a function of the launching binary) needs `execve`, files opened
//! for reading and executable mappings, since it is loaded after the filter; Landlock then says which files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::process::{Pid, Resource};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Is, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use serde::{Deserialize, Serialize};

use crate::sys;

/// What a domain's process may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The user to become, where the monitor is root and has that user. One of its own for each domain.
    pub user: Option<u32>,
    /// Descriptors that the process may have.
    pub descriptors: u64,
    /// Bytes of private memory (heap and threads' stacks) that it may have, beside its domain's memory and
    /// the 8 MiB to which its first stack may grow.
    pub private_memory: u64,
    /// Threads that it may have, where it has a user of its own.
    pub threads: u64,
    /// It may punch holes into files (`discard`). Sealed pages refuse that by themselves.
    pub discard: bool,
    /// A program to be executed, and what it may read and execute beside the system's libraries.
    /// `None`: a function of the launching binary, which needs no file at all.
    pub program: Option<Vec<PathBuf>>,
}

impl Default for Confinement {
    fn default() -> Self {
        Confinement {
            user: None,
            descriptors: 4096,
            private_memory: 512 << 20,
            threads: 64,
            discard: false,
            program: None,
        }
    }
}

/// Landlock's part in the [`Isolation`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landlock {
    /// The version of the interface that this kernel offers; 0: none.
    pub abi: u32,
    /// No file can be opened but those of the program.
    pub files: bool,
    /// No TCP port can be bound or connected to (from version 4).
    pub network: bool,
    /// No signal and no connection to an abstract socket leaves the domain (from version 6).
    pub scopes: bool,
}

/// The walls around a domain's process: which of them this machine gave.
///
/// Having one that [`is_isolated`](Isolation::is_isolated) tells you: when it was made, before the domain's
/// program ran, the process could reach its own memory and its descriptors and nothing else, but, where it is
/// not [`nameless`](Isolation::nameless), for asking what a file is (not what is in it) by its name: see the
/// [module](self).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Isolation {
    /// The user that the process became; `None`: it runs as the monitor's own.
    pub own_user: Option<u32>,
    /// No capability is left.
    pub no_capabilities: bool,
    /// It cannot gain privileges by `execve`.
    pub no_new_privileges: bool,
    /// Other processes of its user can neither trace it nor look into it.
    pub undumpable: bool,
    /// It dies with the monitor.
    pub dies_with_monitor: bool,
    /// It inherited no descriptor but those meant for it.
    pub descriptors_closed: bool,
    /// Descriptors, private memory, the first stack and core dumps are bounded. That there is no memory but
    /// private memory and what the monitor gave needs [`system_calls`](Self::system_calls) too.
    pub limits: bool,
    /// Its root is a directory without files: no name leads to one.
    #[serde(default)]
    pub nameless: bool,
    /// What Landlock enforces.
    pub landlock: Landlock,
    /// The system-call filter is in force.
    pub system_calls: bool,
    /// It executes a program, and so keeps `execve` and the opening of files.
    pub executes: bool,
}

impl Isolation {
    /// Whether this process may be called an isolated domain: no wall that matters is missing.
    #[must_use]
    pub fn is_isolated(&self) -> bool {
        self.missing().is_empty()
    }

    /// The walls that matter and are not there.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        let mut need = |there: bool, wall| {
            if !there {
                missing.push(wall);
            }
        };
        need(self.system_calls, "system-call filter (seccomp)");
        need(self.no_new_privileges, "no new privileges");
        need(self.no_capabilities, "dropped capabilities");
        // A program that is executed closes itself when it joins its domain.
        need(
            self.undumpable || self.own_user.is_some() || self.executes,
            "closed to processes of the same user",
        );
        need(self.descriptors_closed, "inherited descriptors closed");
        // Without files there is nothing for Landlock to guard that the filter does not.
        need(
            !self.executes || self.landlock.files,
            "closed file system (Landlock)",
        );
        missing
    }
}

/// Why a process could not be confined as asked.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A step that every machine allows failed.
    #[error("cannot confine the process: {step}: {errno}")]
    Step {
        /// Which.
        step: &'static str,
        /// What the kernel said.
        errno: rustix::io::Errno,
    },
    /// Landlock is there but refused the rules.
    #[error("cannot confine the process: Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter could not be made. It is the same for everybody: a defect.
    #[error("cannot confine the process: system-call filter: {0}")]
    Filter(#[from] seccompiler::BackendError),
}

/// Confines this process, which must have one thread only, and says what that came to.
///
/// A wall that this machine does not have is left out and missing in the answer; anything else that goes
/// wrong is an error, and then the process must not go on.
///
/// # Errors
/// [`ConfineError`].
pub(crate) fn confine(wanted: &Confinement, monitor: Pid) -> Result<Isolation, ConfineError> {
    let step = |step| move |errno| ConfineError::Step { step, errno };
    let mut isolation = Isolation {
        descriptors_closed: true,
        executes: wanted.program.is_some(),
        ..Isolation::default()
    };
    let limit = |resource, value| sys::limit(resource, value).map_err(step("limits"));
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, wanted.descriptors)?;
    limit(Resource::Data, wanted.private_memory)?;
    limit(Resource::Stack, FIRST_STACK)?;
    limit(Resource::Memlock, 0)?;
    isolation.limits = true;
    // Before the change of user, which gives up the right to do it.
    isolation.nameless =
        wanted.program.is_none() && sys::leave_file_system().map_err(step("leave the file system"))?;
    if let Some(user) = wanted.user
        && sys::become_user(user).map_err(step("become a user of its own"))?
    {
        isolation.own_user = Some(user);
        // Counted by user: of a user that others have too, this would count theirs.
        limit(Resource::Nproc, wanted.threads)?;
    }
    sys::give_up_capabilities().map_err(step("give up capabilities"))?;
    isolation.no_capabilities = true;
    // After the change of user, which sets both back.
    sys::become_undumpable().map_err(step("PR_SET_DUMPABLE"))?;
    isolation.undumpable = wanted.program.is_none();
    sys::die_with_parent(monitor).map_err(step("PR_SET_PDEATHSIG"))?;
    isolation.dies_with_monitor = true;
    sys::give_up_new_privileges().map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    isolation.no_new_privileges = true;
    isolation.landlock = close_file_system(wanted.program.as_deref())?;
    isolation.system_calls = install_filter(wanted)?;
    Ok(isolation)
}

/// Bytes to which the first thread's stack may grow, which the limit on private memory does not count.
const FIRST_STACK: u64 = 8 << 20;

/// Where programs and their libraries lie, and what the loader reads.
const SYSTEM: [&str; 8] = [
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/nix/store",
];

fn close_file_system(program: Option<&[PathBuf]>) -> Result<Landlock, ConfineError> {
    // A version that is newer than the kernel's is narrowed to what the kernel knows.
    let abi = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    let paths: Vec<PathBuf> = match program {
        Some(program) => SYSTEM
            .iter()
            .map(PathBuf::from)
            .chain(program.iter().cloned())
            .collect(),
        None => Vec::new(),
    };
    // Paths that do not exist are passed over.
    let status = ruleset
        .add_rules(path_beneath_rules(paths, AccessFs::from_read(abi)))?
        .restrict_self()?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
        _ => 0,
    };
    let enforced = status.ruleset != RulesetStatus::NotEnforced;
    Ok(Landlock {
        abi,
        files: enforced,
        network: enforced && abi >= 4,
        scopes: enforced && abi >= 6,
    })
}

/// System calls that are allowed, each under any of its rules (no rule: always).
type Allowed = BTreeMap<i64, Vec<SeccompRule>>;

/// Installs the filter; false if this kernel or architecture has none.
fn install_filter(wanted: &Confinement) -> Result<bool, ConfineError> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else {
        return Ok(false);
    };
    // Libraries take "no such call" for an answer and use `clone`, whose flags can be read by a filter.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let refuse = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    let first = SeccompFilter::new(clone3, SeccompAction::Allow, refuse(libc::ENOSYS), arch)?;
    let allowed = allowed(wanted)?;
    let second = SeccompFilter::new(allowed, refuse(libc::EPERM), SeccompAction::Allow, arch)?;
    for filter in [first, second] {
        let program: BpfProgram = filter.try_into()?;
        if seccompiler::apply_filter(&program).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A condition on an argument of which the kernel reads 32 bits.
fn int(index: u8, is: Is, value: u64) -> Result<SeccompCondition, ConfineError> {
    Ok(SeccompCondition::new(index, Width::Dword, is, value)?)
}

/// A condition on an argument of which the kernel reads all 64 bits.
fn long(index: u8, is: Is, value: u64) -> Result<SeccompCondition, ConfineError> {
    Ok(SeccompCondition::new(index, Width::Qword, is, value)?)
}

fn number(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}

fn allowed(wanted: &Confinement) -> Result<Allowed, ConfineError> {
    let mut allowed = Allowed::new();
    let always = [
        // Memory of its own and time.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_futex,
        libc::SYS_clock_gettime,
        libc::SYS_clock_getres,
        libc::SYS_gettimeofday,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_getrandom,
        // Threads.
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_set_robust_list,
        libc::SYS_set_tid_address,
        libc::SYS_rseq,
        libc::SYS_membarrier,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_uname,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_restart_syscall,
        // In the filter below it is "no such call".
        libc::SYS_clone3,
        // Signals of its own.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        // Descriptors that it has.
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_lseek,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_fstat,
        libc::SYS_close,
        libc::SYS_dup,
        // Connections that come to a socket that it has.
        libc::SYS_accept4,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_shutdown,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_getsockopt,
        // Waiting.
        libc::SYS_ppoll,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_eventfd2,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_arch_prctl,
    ];
    allowed.extend(always.map(|call| (call, Vec::new())));
    let mut when = |call: i64, conditions: Vec<SeccompCondition>| -> Result<(), ConfineError> {
        allowed
            .entry(call)
            .or_default()
            .push(SeccompRule::new(conditions)?);
        Ok(())
    };

    // Threads, and nothing that is a process.
    let thread = number(libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND);
    when(libc::SYS_clone, vec![long(0, Is::MaskedEq(thread), thread)?])?;
    // abort() signals its own process.
    when(
        libc::SYS_tgkill,
        vec![int(
            0,
            Is::Eq,
            number(rustix::process::getpid().as_raw_nonzero().get()),
        )?],
    )?;
    // A thread's own name.
    for option in [libc::PR_SET_NAME, libc::PR_GET_NAME] {
        when(libc::SYS_prctl, vec![int(0, Is::Eq, number(option))?])?;
    }
    // Closing itself to processes of the same user; not opening.
    when(
        libc::SYS_prctl,
        vec![
            int(0, Is::Eq, number(libc::PR_SET_DUMPABLE))?,
            long(1, Is::Eq, 0)?,
        ],
    )?;
    // A look at its own limits.
    when(libc::SYS_prlimit64, vec![int(0, Is::Eq, 0)?, long(2, Is::Eq, 0)?])?;
    for advice in [
        libc::MADV_NORMAL,
        libc::MADV_WILLNEED,
        libc::MADV_DONTNEED,
        libc::MADV_FREE,
        libc::MADV_DONTFORK,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_DONTDUMP,
        MADV_GUARD_INSTALL,
    ] {
        when(libc::SYS_madvise, vec![int(2, Is::Eq, number(advice))?])?;
    }
    for command in [
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_GET_SEALS,
    ] {
        when(libc::SYS_fcntl, vec![int(1, Is::Eq, number(command))?])?;
    }
    for request in [FIONBIO, FIONREAD, TCGETS] {
        when(libc::SYS_ioctl, vec![int(1, Is::Eq, request)?])?;
    }
    // send() on a connection; an address would start one.
    when(libc::SYS_sendto, vec![long(4, Is::Eq, 0)?])?;
    when(
        libc::SYS_setsockopt,
        vec![int(1, Is::Eq, number(libc::IPPROTO_TCP))?],
    )?;
    for option in [
        libc::SO_KEEPALIVE,
        libc::SO_LINGER,
        libc::SO_RCVTIMEO,
        libc::SO_SNDTIMEO,
        // No more than net.core.wmem_max.
        libc::SO_SNDBUF,
    ] {
        let socket = int(1, Is::Eq, number(libc::SOL_SOCKET))?;
        when(
            libc::SYS_setsockopt,
            vec![socket, int(2, Is::Eq, number(option))?],
        )?;
    }
    // fstat() and File::metadata(): a descriptor and no name. The filter cannot read the name, and the C
    // library has no other fstat(): that a name leads nowhere is for `leave_file_system`.
    let empty = number(libc::AT_EMPTY_PATH);
    when(libc::SYS_newfstatat, vec![int(3, Is::MaskedEq(empty), empty)?])?;
    when(libc::SYS_statx, vec![int(2, Is::MaskedEq(empty), empty)?])?;
    if wanted.discard {
        let punch = number(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        when(libc::SYS_fallocate, vec![int(1, Is::Eq, punch)?])?;
    }

    let executes = wanted.program.is_some();
    // The limit on private memory does not count shared memory nor stacks: none may be made from nothing.
    let counted = number(libc::MAP_TYPE | libc::MAP_GROWSDOWN);
    let of_file = number(libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN);
    for flags in [
        int(3, Is::MaskedEq(counted), number(libc::MAP_PRIVATE))?,
        int(3, Is::MaskedEq(of_file), 0)?,
    ] {
        when(libc::SYS_mmap, [vec![flags], protection(executes)?].concat())?;
    }
    if executes {
        when(
            libc::SYS_openat,
            vec![int(2, Is::MaskedEq(number(!READ_ONLY_FLAGS)), 0)?],
        )?;
        for call in LOADER_CALLS {
            allowed.insert(*call, Vec::new());
        }
    } else {
        when(libc::SYS_mprotect, protection(executes)?)?;
    }
    Ok(allowed)
}

/// How memory of `mmap` and `mprotect` may be accessed.
fn protection(executes: bool) -> Result<Vec<SeccompCondition>, ConfineError> {
    if executes {
        return Ok(Vec::new());
    }
    let execute = number(libc::PROT_EXEC);
    Ok(vec![int(2, Is::MaskedEq(execute), 0)?])
}

/// Numbers of `ioctl` on both architectures; the C libraries do not agree on their type.
const FIONBIO: u64 = 0x5421;
const FIONREAD: u64 = 0x541b;
const TCGETS: u64 = 0x5401;
/// From Linux 6.13, used for the guard pages of stacks.
const MADV_GUARD_INSTALL: i32 = 102;
/// Flags of `open` that neither write nor create.
const READ_ONLY_FLAGS: i32 =
    libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_LARGEFILE;
/// What a program that is loaded after the filter needs beside; Landlock bounds the files.
const LOADER_CALLS: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_mprotect,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn walls() -> Isolation {
        Isolation {
            own_user: None,
            no_capabilities: true,
            no_new_privileges: true,
            undumpable: true,
            dies_with_monitor: true,
            descriptors_closed: true,
            limits: true,
            nameless: true,
            landlock: Landlock {
                abi: 6,
                files: true,
                network: true,
                scopes: true,
            },
            system_calls: true,
            executes: false,
        }
    }

    #[test]
    fn a_process_is_called_isolated_only_with_every_wall_that_matters() {
        assert_eq!(walls().missing(), Vec::<&str>::new());
        let without: [fn(&mut Isolation); 5] = [
            |i| i.system_calls = false,
            |i| i.no_new_privileges = false,
            |i| i.no_capabilities = false,
            |i| i.descriptors_closed = false,
            |i| i.undumpable = false,
        ];
        for (index, take) in without.into_iter().enumerate() {
            let mut isolation = walls();
            take(&mut isolation);
            assert_eq!(isolation.missing().len(), 1, "wall {index}");
            assert!(!isolation.is_isolated());
        }
        let other_user = Isolation {
            undumpable: false,
            own_user: Some(7),
            ..walls()
        };
        assert!(other_user.is_isolated());
        let old_kernel = Isolation {
            landlock: Landlock::default(),
            ..walls()
        };
        assert!(old_kernel.is_isolated(), "no file can be opened anyhow");
        assert!(
            !Isolation {
                executes: true,
                ..old_kernel
            }
            .is_isolated()
        );
    }

    #[test]
    fn the_filter_can_be_made_for_both_kinds_of_program() {
        for program in [None, Some(Vec::new())] {
            let wanted = Confinement {
                program,
                discard: true,
                ..Confinement::default()
            };
            let allowed = allowed(&wanted).unwrap();
            let never = [
                libc::SYS_ptrace,
                libc::SYS_process_vm_readv,
                libc::SYS_process_vm_writev,
                libc::SYS_pidfd_getfd,
                libc::SYS_kill,
                libc::SYS_sendmsg,
                libc::SYS_socket,
                libc::SYS_ftruncate,
                libc::SYS_memfd_create,
                libc::SYS_shmget,
                libc::SYS_mremap,
                libc::SYS_io_uring_setup,
                libc::SYS_userfaultfd,
                libc::SYS_bpf,
            ];
            for call in never {
                assert!(!allowed.contains_key(&call), "system call {call}");
            }
        }
    }
}
