//! What a confined process can still do to the rest of the machine: nothing.
//!
//! This executable is also the launcher and the hostile domains, which is why it has a `main` of its own.
//! It passes as root and as any user; `setpriv --reuid=65534 --clear-groups` runs it as one.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use gnttab_host::confine::{Confinement, Isolation};
use gnttab_host::hostile::{self, Attempt};
use gnttab_host::launch::{self, Code, LaunchError, Launched, Program, Role, Start, Starter};
use gnttab_host::sys::{Access, Backing, Channel, ChannelError, SealedMemory, Window};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::Pid;

const ROLES: &[(&str, Role)] = &[
    ("attack", attack),
    ("sleep", sleep),
    ("names", names),
    ("descriptors", descriptors),
    ("threads", threads),
    ("memory", memory),
    ("files", files),
    ("abort", abort),
];

/// Tests by the name of their function.
macro_rules! trials {
    ($($test:ident,)*) => { vec![$(Trial::test(stringify!($test), $test)),*] };
}

fn main() -> ExitCode {
    if let Some(code) = launch::domain_main(ROLES) {
        return code;
    }
    // The same attacks, unconfined: `--attack PID`.
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("--attack") {
        let victim = arguments.next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        println!(
            "{}",
            serde_json::to_string(&hostile::attack_kernel(&[("victim", victim.unwrap())])).unwrap()
        );
        return ExitCode::SUCCESS;
    }
    let trials = trials![
        every_wall_that_this_machine_has_is_up,
        a_hostile_domain_gets_nothing_from_the_kernel,
        the_same_attempts_succeed_without_confinement,
        a_hostile_domain_gets_nothing_from_a_read_only_page,
        no_name_leads_a_domain_to_a_file,
        a_domain_has_the_descriptors_meant_for_it_and_no_other,
        a_domain_can_start_threads,
        a_domain_cannot_take_more_memory_than_it_may,
        a_domain_serves_files_and_sockets_that_it_was_given,
        a_domain_that_aborts_ends_by_its_signal,
        an_executable_runs_and_reaches_no_file_but_its_libraries,
        an_executable_gets_no_memory_that_no_limit_counts,
        a_role_that_does_not_exist_is_an_error_that_says_so,
        domains_die_with_their_starter,
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

// --- roles: what the domains of these tests run ------------------------------------------------------------

/// Attacks: the pids named in the arguments, the page `page`, the channel. Reports as JSON.
fn attack(mut start: Start) -> ExitCode {
    let victims: Vec<(&str, Pid)> = start
        .arguments
        .iter()
        .zip(["the monitor", "another domain"])
        .map(|(pid, who)| (who, Pid::from_raw(pid.parse().unwrap()).unwrap()))
        .collect();
    let mut attempts = hostile::attack_kernel(&victims);
    if let Some(page) = start.descriptors.remove("page") {
        let window = Window::of(&page, 1, Access::Read).unwrap();
        attempts.extend(hostile::attack_page(page.as_fd(), &window, 0));
        attempts.push(hostile::attack_channel(&start.channel, page.as_fd()));
    }
    println!("{}", serde_json::to_string(&attempts).unwrap());
    ExitCode::SUCCESS
}

/// Asks about files that are there, by every kind of name.
fn names(_: Start) -> ExitCode {
    println!(
        "{}",
        serde_json::to_string(&hostile::attack_names(&NAMES)).unwrap()
    );
    ExitCode::SUCCESS
}

const NAMES: [&str; 9] = [
    "/etc/passwd",
    "/proc/self/exe",
    "/proc/1",
    "/tmp",
    "/dev/null",
    "etc",
    "../../../../../../etc/passwd",
    "../exe",
    "./../fd",
];

fn sleep(start: Start) -> ExitCode {
    let _ = start.channel.receive_bytes(&mut [0; 8], true);
    ExitCode::SUCCESS
}

fn descriptors(start: Start) -> ExitCode {
    let mut known: Vec<i32> = start.descriptors.values().map(AsRawFd::as_raw_fd).collect();
    known.extend([0, 1, 2, start.channel.as_fd().as_raw_fd()]);
    known.sort_unstable();
    println!(
        "{}",
        serde_json::to_string(&(known, hostile::open_descriptors())).unwrap()
    );
    ExitCode::SUCCESS
}

fn threads(_: Start) -> ExitCode {
    let threads: Vec<_> = (0..8_u64)
        .map(|n| {
            std::thread::Builder::new()
                .name(format!("t{n}"))
                .spawn(move || n)
                .unwrap()
        })
        .collect();
    let sum: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    println!("{sum}");
    ExitCode::SUCCESS
}

fn memory(_: Start) -> ExitCode {
    let mut taken: Vec<Vec<u8>> = Vec::new();
    loop {
        let mut chunk = Vec::new();
        if chunk.try_reserve_exact(16 << 20).is_err() {
            println!("{}", taken.len() * 16);
            return ExitCode::SUCCESS;
        }
        taken.push(chunk);
    }
}

/// Reads a file, writes it, syncs it, and answers one connection with it.
fn files(mut start: Start) -> ExitCode {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(start.descriptors.remove("file").unwrap());
    let len = file.metadata().unwrap().len();
    file.write_all_at(b"X", len - 1).unwrap();
    file.sync_all().unwrap();
    let mut content = vec![0; usize::try_from(len).unwrap()];
    file.read_exact_at(&mut content, 0).unwrap();
    let listener = std::os::unix::net::UnixListener::from(start.descriptors.remove("socket").unwrap());
    let (mut connection, _) = listener.accept().unwrap();
    connection.set_nonblocking(true).unwrap();
    connection.set_nonblocking(false).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    connection.write_all(&content).unwrap();
    ExitCode::SUCCESS
}

fn abort(_: Start) -> ExitCode {
    std::process::abort()
}

// --- tests -------------------------------------------------------------------------------------------------

/// A user of its own, where there is one to be had.
fn confinement() -> Confinement {
    Confinement {
        user: Some(1_900_000_007),
        ..Confinement::default()
    }
}

fn program(role: &str) -> Program {
    Program {
        confinement: confinement(),
        stdout: Stdio::piped(),
        ..Program::role(role)
    }
}

fn finish(mut launched: Launched) -> Result<String, Failed> {
    let mut output = String::new();
    launched
        .child
        .stdout
        .take()
        .ok_or("no output")?
        .read_to_string(&mut output)?;
    let status = launched.child.wait()?;
    if status.success() {
        Ok(output)
    } else {
        Err(format!("{status}, after {output:?}").into())
    }
}

fn run(program: Program) -> Result<String, Failed> {
    finish(Starter::new()?.start(program)?)
}

fn pid_of(child: &std::process::Child) -> String {
    child.id().to_string()
}

fn all_refused(report: &str, at_least: usize) -> Result<(), Failed> {
    let attempts: Vec<Attempt> = serde_json::from_str(report)?;
    let let_in: Vec<String> = attempts
        .iter()
        .filter(|attempt| !attempt.is_refused())
        .map(ToString::to_string)
        .collect();
    if !let_in.is_empty() {
        return Err(let_in.join("\n").into());
    }
    if attempts.len() < at_least {
        Err(format!("{} attempts only", attempts.len()).into())
    } else {
        Ok(())
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn every_wall_that_this_machine_has_is_up() -> Result<(), Failed> {
    let starter = Starter::new()?;
    let mut launched = starter.start(program("sleep"))?;
    let isolation: Isolation = launched.isolation.clone();
    launched.child.kill()?;
    launched.child.wait()?;
    assert_eq!(isolation.missing(), Vec::<&str>::new());
    // Root of a user namespace may not have that user.
    if !is_root() {
        assert_eq!(isolation.own_user, None);
    } else if std::fs::read_to_string("/proc/self/uid_map")?
        .trim()
        .ends_with("4294967295")
    {
        assert_eq!(isolation.own_user, Some(1_900_000_007));
    }
    assert!(
        isolation.dies_with_monitor && isolation.limits && isolation.undumpable,
        "{isolation:?}"
    );
    if isolation.landlock.abi == 0 {
        println!("Landlock not checked: this kernel has none");
    } else {
        assert!(isolation.landlock.files);
    }
    Ok(())
}

fn a_hostile_domain_gets_nothing_from_the_kernel() -> Result<(), Failed> {
    let starter = Starter::new()?;
    let mut victim = starter.start(program("sleep"))?;
    let mut hostile = program("attack");
    hostile.arguments = vec![std::process::id().to_string(), pid_of(&victim.child)];
    let report = finish(starter.start(hostile)?)?;
    assert_eq!(victim.child.try_wait()?, None, "the victim lives");
    victim.child.kill()?;
    victim.child.wait()?;
    all_refused(&report, 54)
}

/// The control: the attempts are real. What even a plain process is refused depends on the machine and on
/// who runs this, so only those are counted that any process can do to one of its own user.
fn the_same_attempts_succeed_without_confinement() -> Result<(), Failed> {
    let mut victim = Command::new("sleep").arg("60").spawn()?;
    let output = Command::new("/proc/self/exe")
        .args(["--attack", &pid_of(&victim)])
        .output()?;
    victim.kill()?;
    victim.wait()?;
    let attempts: Vec<Attempt> = serde_json::from_slice(&output.stdout)?;
    let let_in = [
        "ptrace of victim",
        "process_vm_readv of victim",
        "process_vm_writev of victim",
        "/proc/PID/mem of victim",
        "/proc/PID/fd of victim",
        "pidfd_getfd of victim",
        "kill of victim",
        "open a file of the user",
        "make a file",
        "make a Unix socket",
        "start a process",
        "execute a program",
        "make memory to hand out",
        "map memory for execution",
        "map shared memory of nothing",
        "map memory that grows like a stack",
        "make a mapping larger",
        "make a shared segment",
        "become root",
    ];
    for name in let_in {
        let attempt = attempts.iter().find(|attempt| attempt.name == name).ok_or(name)?;
        if name == "become root" && !is_root() {
            continue;
        }
        if attempt.is_refused() {
            return Err(attempt.to_string().into());
        }
    }
    Ok(())
}

fn a_hostile_domain_gets_nothing_from_a_read_only_page() -> Result<(), Failed> {
    let page = SealedMemory::new("secret", 1, Backing::Reserved)?;
    let owner = Window::of(&page, 1, Access::Write)?;
    owner.write(0, b"precious")?;
    let mut hostile = program("attack");
    hostile.descriptors = vec![("page".into(), page.read_only_descriptor()?)];
    let report = run(hostile)?;
    let mut content = [0; 8];
    owner.read(0, &mut content)?;
    assert_eq!(&content, b"precious");
    all_refused(&report, 35)
}

/// The names are of files that are there; a domain that this machine could give a root of its own finds none of them.
fn no_name_leads_a_domain_to_a_file() -> Result<(), Failed> {
    let there = hostile::attack_names(&NAMES[..5]);
    assert!(there.iter().all(|attempt| !attempt.is_refused()), "{there:?}");
    let starter = Starter::new()?;
    let launched = starter.start(program("names"))?;
    let nameless = launched.isolation.nameless;
    let report = finish(launched)?;
    if nameless {
        return all_refused(&report, 2 * NAMES.len());
    }
    assert!(!is_root(), "root can always have a root of its own");
    println!("not checked: neither root nor a user namespace is to be had here");
    Ok(())
}

fn a_domain_has_the_descriptors_meant_for_it_and_no_other() -> Result<(), Failed> {
    // A descriptor that a careless library left inheritable.
    let leak: OwnedFd = std::fs::File::open("/dev/null")?.into();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty())?;
    let mut program = program("descriptors");
    program.descriptors = vec![("null".into(), std::fs::File::open("/dev/null")?.into())];
    let report = run(program)?;
    let (known, open): (Vec<i32>, Vec<i32>) = serde_json::from_str(&report)?;
    assert_eq!(open, known);
    assert_eq!(known.len(), 5);
    Ok(())
}

fn a_domain_can_start_threads() -> Result<(), Failed> {
    assert_eq!(run(program("threads"))?.trim(), "28");
    Ok(())
}

fn a_domain_cannot_take_more_memory_than_it_may() -> Result<(), Failed> {
    let mut program = program("memory");
    program.confinement.private_memory = 64 << 20;
    let mib: u64 = run(program)?.trim().parse()?;
    assert!(mib <= 64, "{mib} MiB");
    Ok(())
}

fn a_domain_serves_files_and_sockets_that_it_was_given() -> Result<(), Failed> {
    use std::os::unix::net::{UnixListener, UnixStream};
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("file");
    std::fs::write(&path, b"content of a file.")?;
    let listener = UnixListener::bind(directory.path().join("socket"))?;
    let mut program = program("files");
    program.descriptors = vec![
        (
            "file".into(),
            std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)?
                .into(),
        ),
        ("socket".into(), listener.into()),
    ];
    let starter = Starter::new()?;
    let launched = starter.start(program)?;
    let mut got = String::new();
    UnixStream::connect(directory.path().join("socket"))?.read_to_string(&mut got)?;
    finish(launched)?;
    assert_eq!(got, "content of a fileX");
    Ok(())
}

fn a_domain_that_aborts_ends_by_its_signal() -> Result<(), Failed> {
    use std::os::unix::process::ExitStatusExt;
    let starter = Starter::new()?;
    let mut launched = starter.start(program("abort"))?;
    assert_eq!(launched.child.wait()?.signal(), Some(6));
    Ok(())
}

fn an_executable_runs_and_reaches_no_file_but_its_libraries() -> Result<(), Failed> {
    let starter = Starter::new()?;
    let executable = |path: &str, argument: &str| Program {
        code: Code::Executable(path.into()),
        arguments: vec![argument.into()],
        stderr: Stdio::null(),
        ..program("")
    };
    let launched = starter.start(executable("/bin/echo", "hello"))?;
    let walls = launched.isolation.clone();
    assert_eq!(finish(launched)?, "hello\n");
    if walls.landlock.files {
        assert!(walls.is_isolated(), "{:?}", walls.missing());
        assert!(finish(starter.start(executable("/bin/cat", "/etc/passwd"))?).is_err());
        assert!(finish(starter.start(executable("/bin/ls", "/proc"))?).is_err());
    } else {
        println!("files not checked: this kernel has no Landlock");
        assert!(!walls.is_isolated());
    }
    Ok(())
}

fn an_executable_gets_no_memory_that_no_limit_counts() -> Result<(), Failed> {
    let report = run(Program {
        code: Code::Executable(std::env::current_exe()?),
        arguments: vec!["--attack".into(), std::process::id().to_string()],
        ..program("")
    })?;
    let attempts: Vec<Attempt> = serde_json::from_str(&report)?;
    let uncounted = [
        "map shared memory of nothing",
        "map memory that grows like a stack",
        "make a mapping larger",
        "make a shared segment",
        "make memory to hand out",
    ];
    for name in uncounted {
        let attempt = attempts.iter().find(|attempt| attempt.name == name).ok_or(name)?;
        if !attempt.is_refused() {
            return Err(attempt.to_string().into());
        }
    }
    Ok(())
}

fn a_role_that_does_not_exist_is_an_error_that_says_so() -> Result<(), Failed> {
    let starter = Starter::new()?;
    let error = starter.start(program("no such role")).unwrap_err();
    assert!(
        matches!(&error, LaunchError::Refused(why) if why.contains("no such role")),
        "{error}"
    );
    let missing = Program {
        code: Code::Executable("/nonexistent/program".into()),
        ..program("")
    };
    // It is confined before it fails, so the start succeeds and the channel then ends.
    let mut launched = starter.start(missing)?;
    assert_eq!(
        launched.channel.receive_bytes(&mut [0; 8], true),
        Err(ChannelError::Closed)
    );
    assert!(!launched.child.wait()?.success());
    Ok(())
}

fn domains_die_with_their_starter() -> Result<(), Failed> {
    use std::os::unix::process::ExitStatusExt;
    let starter = Starter::new()?;
    let mut launched = starter.start(program("sleep"))?;
    let _keep: &Channel = &launched.channel;
    drop(starter);
    assert_eq!(launched.child.wait()?.signal(), Some(9));
    Ok(())
}
