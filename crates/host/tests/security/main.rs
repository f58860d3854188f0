//! The security catalogue against the host: a process that is a domain, what it grants, and what it is given. Where a test
//! beside this folder fails on a hole already, `docs/advisories.md` names that one.
//!
//! This executable is the monitor, the launcher and the domains, so it has a `main` of its own.

mod roles;

use std::io::Read;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use gnttab_abi::DomId;
use gnttab_host::launch::{self, Program};
use gnttab_host::monitor::{DomainSpec, Monitor, Settings};
use gnttab_host::protocol::Join;
use gnttab_host::runtime::JoinError;
use libtest_mimic::{Arguments, Failed, Trial};

/// Tests by the name of their function.
macro_rules! trials {
    ($($test:ident,)*) => { vec![$(Trial::test(stringify!($test), $test)),*] };
}

fn main() -> ExitCode {
    if let Some(code) = launch::domain_main(roles::ROLES) {
        return code;
    }
    let trials = trials![
        xsa_396_pages_that_a_peer_kept_come_back_when_it_lets_go,
        xsa_403_memory_that_is_taken_again_is_zeros,
        xsa_468_lengths_over_their_limits_are_refused,
        xsa_468_whoever_is_another_user_is_not_let_in,
        l_02_a_share_that_fails_half_way_leaves_every_page_whole,
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// How long a domain of these tests may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A domain whose output is read.
struct Domain {
    id: DomId,
    output: std::io::PipeReader,
}

fn start(
    monitor: &Monitor,
    role: &str,
    arguments: &[&str],
    change: fn(&mut DomainSpec),
) -> Result<Domain, Failed> {
    let (output, write_end) = std::io::pipe()?;
    let program = Program {
        arguments: arguments.iter().map(ToString::to_string).collect(),
        stdout: Stdio::from(write_end),
        ..Program::role(role)
    };
    let mut spec = DomainSpec::new(role, program);
    change(&mut spec);
    Ok(Domain {
        id: monitor.create(spec)?,
        output,
    })
}

/// What a domain said, once it has ended well.
fn finish(monitor: &Monitor, mut domain: Domain) -> Result<String, Failed> {
    let ended = monitor
        .wait_for(domain.id, PATIENCE)?
        .ok_or("a domain did not end in time")?;
    let mut output = String::new();
    domain.output.read_to_string(&mut output)?;
    match ended.status {
        Some(status) if status.success() && ended.crashed.is_none() => Ok(output),
        _ => Err(format!("{} ended so: {ended:?}, after {output:?}", domain.id).into()),
    }
}

/// A frontend's pages that its backend still maps when the connection ends are set aside, every one, and not taken for
/// anything else; when the backend lets go they are the domain's again, without anybody's asking for it.
fn xsa_396_pages_that_a_peer_kept_come_back_when_it_lets_go() -> Result<(), Failed> {
    let monitor = Monitor::start(Settings::default())?;
    let front = start(&monitor, "allocator", &["2"], |spec| {
        spec.ram_pages = 24;
        spec.shareable_pages = 24;
    })?;
    let back = start(&monitor, "holder", &["1"], |_| ())?;
    assert_eq!(
        finish(&monitor, front)?.trim(),
        "16 pages were kept, and came back"
    );
    finish(&monitor, back)?;
    Ok(())
}

/// What a domain had in a page that it gave back is not there when the page is taken again, to be granted or not; and a new
/// domain finds nothing of an old one.
fn xsa_403_memory_that_is_taken_again_is_zeros() -> Result<(), Failed> {
    let monitor = Monitor::start(Settings::default())?;
    for _ in 0..2 {
        let domain = start(&monitor, "forgetful", &["1"], |spec| {
            spec.ram_pages = 32;
            spec.shareable_pages = 16;
        })?;
        assert_eq!(finish(&monitor, domain)?.trim(), "zeros");
    }
    Ok(())
}

/// Every length, count and number that a domain gives with a call, at and over its limit: refused in this build as in any
/// other, and the domain is served on.
fn xsa_468_lengths_over_their_limits_are_refused() -> Result<(), Failed> {
    let monitor = Monitor::start(Settings::default())?;
    let domain = start(&monitor, "long", &["1"], |_| ())?;
    assert_eq!(finish(&monitor, domain)?.trim(), "all refused, and served on");
    Ok(())
}

/// The socket on which programs join gives a machine to its own user and to root alone: another's connection is closed
/// before anything is read from it.
fn xsa_468_whoever_is_another_user_is_not_let_in() -> Result<(), Failed> {
    let monitor = Monitor::start(Settings::default())?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("machine");
    monitor.listen(&path)?;
    if !rustix::process::geteuid().is_root() {
        println!("not checked: only root can be another user");
        return Ok(());
    }
    // So that it is not the file system that says no.
    for open in [directory.path(), &path] {
        std::fs::set_permissions(open, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    }
    let joined = std::thread::scope(|scope| {
        let other = || {
            let uid = rustix::thread::Uid::from_raw(65534);
            // Of this thread alone, which ends here.
            rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(|errno| errno.to_string())?;
            let joined = gnttab_host::runtime::Domain::join_at(&path, &Join::default());
            Ok::<_, String>(matches!(joined, Err(JoinError::Channel(_))))
        };
        scope.spawn(other).join()
    });
    let closed = joined.map_err(|_| "the other user's thread failed")??;
    assert!(closed, "another user has joined the machine");
    assert!(monitor.domains().is_empty());
    // Its own user is let in.
    gnttab_host::runtime::Domain::join_at(&path, &Join::default()).map(drop)?;
    Ok(())
}

/// A domain asks for more shareable pages than it may have: those that it got are its own in every way, and those that it did
/// not get too. The hypervisor's view of a page and the domain's are one.
fn l_02_a_share_that_fails_half_way_leaves_every_page_whole() -> Result<(), Failed> {
    let monitor = Monitor::start(Settings::default())?;
    let domain = start(&monitor, "sharer", &["1"], |spec| {
        spec.ram_pages = 64;
        spec.shareable_pages = 10;
    })?;
    assert_eq!(finish(&monitor, domain)?.trim(), "every page is whole");
    Ok(())
}
