//! Domains that are processes, on a machine that is this process: sharing, ending, dying.
//!
//! This executable is the monitor, the launcher and the domains, so it has a `main` of its own. It passes as
//! root and as any user. `GNTTAB_ROUNDS=1000` makes the leak test as long as it is meant to be.

#[path = "machine/roles.rs"]
mod roles;

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use gnttab_host::hostile::Attempt;
use gnttab_host::launch::{self, Code, Program, Start};
use gnttab_host::monitor::{
    Counters, DomainSpec, Ended, EventKind, Filter, Heard, Monitor, MonitorError, Settings, State,
};
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
    // An executable that runs as a domain, and one that joins.
    if let Ok(start) = Start::from_environment() {
        return roles::executed(start);
    }
    if let Some(path) = std::env::var_os("GNTTAB_TEST_JOIN") {
        return roles::joining(path.as_ref());
    }
    if std::env::var_os("GNTTAB_TEST_MONITOR").is_some() {
        return monitor_to_be_killed();
    }
    let trials = trials![
        a_page_is_granted_mapped_written_ended_and_renewed,
        a_hostile_domain_gets_nothing,
        a_part_of_a_page_is_copied_through_a_version_2_table,
        a_block_device_works_across_two_processes_with_persistent_grants,
        a_block_device_works_across_two_processes_with_grants_of_one_use,
        threads_share_the_vcpus_of_their_domain,
        a_peer_that_dies_gives_the_page_back,
        a_granter_that_dies_leaves_the_mapping_to_its_peer,
        whoever_misbehaves_is_ended,
        a_glutton_meets_its_limits_and_no_one_else_does,
        what_is_asked_wrongly_is_refused_and_leaves_nothing,
        nothing_is_leaked_when_domains_are_killed_at_any_instant,
        a_program_joins_over_a_socket_and_is_not_called_isolated,
        an_executable_is_a_domain_too,
        what_happens_is_told_in_order,
        dropping_the_monitor_ends_every_domain,
        killing_the_monitor_ends_every_domain,
    ];
    // One after the other: some count the descriptors of this process.
    let arguments = Arguments {
        test_threads: Some(1),
        ..Arguments::from_args()
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// How long a domain of these tests may take.
const PATIENCE: Duration = Duration::from_secs(30);

struct Machine {
    monitor: Monitor,
}

/// A domain whose output is read.
struct Domain {
    id: DomId,
    output: std::io::PipeReader,
}

impl Machine {
    fn new() -> Result<Machine, Failed> {
        Ok(Machine {
            monitor: Monitor::start(Settings::default())?,
        })
    }

    fn spec(role: &str, arguments: &[&str]) -> Result<(DomainSpec, std::io::PipeReader), Failed> {
        let (output, write_end) = std::io::pipe()?;
        let program = Program {
            arguments: arguments.iter().map(ToString::to_string).collect(),
            stdout: Stdio::from(write_end),
            ..Program::role(role)
        };
        Ok((DomainSpec::new(role, program), output))
    }

    fn start(&self, role: &str, arguments: &[&str]) -> Result<Domain, Failed> {
        let (spec, output) = Machine::spec(role, arguments)?;
        Ok(Domain {
            id: self.monitor.create(spec)?,
            output,
        })
    }

    /// What a domain said, once it has ended well.
    fn finish(&self, mut domain: Domain) -> Result<String, Failed> {
        let ended = self
            .monitor
            .wait_for(domain.id, PATIENCE)?
            .ok_or("a domain did not end in time")?;
        let mut output = String::new();
        domain.output.read_to_string(&mut output)?;
        match &ended {
            Ended {
                status: Some(status),
                crashed: None,
            } if status.success() => Ok(output),
            other => Err(format!("{} ended so: {other:?}, after {output:?}", domain.id).into()),
        }
    }
}

fn a_page_is_granted_mapped_written_ended_and_renewed() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let granter = machine.start("granter", &["2"])?;
    let grantee = machine.start("grantee", &["1"])?;
    assert_eq!(machine.finish(grantee)?.trim(), "saw hello, wrote world");
    assert_eq!(machine.finish(granter)?.trim(), "saw world, got the page back");
    Ok(())
}

/// Who watches hears of a grant's whole life, of refusals and of deaths, each with who and what.
fn what_happens_is_told_in_order() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let all = machine.monitor.watch(Filter::default())?;
    let refusals = machine.monitor.watch(Filter {
        events: vec![EventKind::Refused],
        ..Filter::default()
    })?;
    let granter = machine.start("slow granter", &["2"])?;
    let grantee = machine.start("grantee", &["1"])?;
    machine.finish(grantee)?;
    machine.finish(granter)?;
    let glutton = machine.start("glutton", &["1"])?;
    machine.monitor.destroy(glutton.id)?;
    let mut told = Vec::new();
    let mut deaths = 0;
    while deaths < 3 {
        match all.next(PATIENCE).ok_or("nothing more is told")? {
            Heard::Event(event) => {
                deaths += u32::from(event.event == EventKind::Died);
                told.push(event);
            }
            Heard::Dropped(count) => return Err(format!("{count} events were dropped").into()),
        }
    }
    let life: Vec<_> = told
        .iter()
        .filter(|event| event.gref == Some(8) && event.event != EventKind::Refused)
        .map(|event| (event.event, event.domain, event.peer))
        .collect();
    assert_eq!(
        life,
        [
            (EventKind::Granted, 1, Some(2)),
            (EventKind::Mapped, 2, Some(1)),
            (EventKind::Unmapped, 2, Some(1)),
            (EventKind::Ended, 1, Some(2)),
        ],
        "{told:?}"
    );
    let died = |domain| {
        let mut deaths = told.iter().filter(|event| event.event == EventKind::Died);
        deaths
            .find(|event| event.domain == domain)
            .and_then(|event| event.detail.as_deref())
    };
    assert_eq!(died(1), Some("exit code 0"));
    assert_eq!(died(3), Some("killed by signal 9"));
    assert!(
        told.windows(2)
            .all(|pair| pair[0].time_ms <= pair[1].time_ms + 60)
    );
    while let Some(Heard::Event(event)) = refusals.next(Duration::ZERO) {
        assert_eq!(event.event, EventKind::Refused);
    }
    Ok(())
}

fn a_hostile_domain_gets_nothing() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let victim = machine.start("victim", &["2"])?;
    let pid = machine
        .monitor
        .domain(victim.id)?
        .pid
        .ok_or("no process")?
        .to_string();
    let hostile = machine.start("hostile", &["1", &pid, &std::process::id().to_string()])?;
    let report = machine.finish(hostile)?;
    assert_eq!(machine.finish(victim)?.trim(), "kept the secret");
    let attempts: Vec<Attempt> = serde_json::from_str(&report)?;
    assert!(attempts.len() > 100, "{} attempts only", attempts.len());
    let let_in: Vec<String> = attempts
        .iter()
        .filter(|attempt| !attempt.is_refused())
        .map(ToString::to_string)
        .collect();
    if let_in.is_empty() {
        Ok(())
    } else {
        Err(let_in.join("\n").into())
    }
}

fn a_part_of_a_page_is_copied_through_a_version_2_table() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let granter = machine.start("copier", &["2", "granter"])?;
    let copier = machine.start("copier", &["1"])?;
    assert_eq!(machine.finish(copier)?.trim(), "saw only this");
    assert_eq!(machine.finish(granter)?.trim(), "gave a part");
    Ok(())
}

fn block_device(persistent: &str) -> Result<String, Failed> {
    let machine = Machine::new()?;
    let front = machine.start("block front", &["2", persistent])?;
    let back = machine.start("block back", &["1", persistent])?;
    assert_eq!(machine.finish(front)?.trim(), "every byte came back");
    machine.finish(back)
}

fn a_block_device_works_across_two_processes_with_persistent_grants() -> Result<(), Failed> {
    assert_ne!(block_device("persistent")?.trim(), "0 persistent mappings");
    Ok(())
}

fn a_block_device_works_across_two_processes_with_grants_of_one_use() -> Result<(), Failed> {
    assert_eq!(block_device("one use")?.trim(), "0 persistent mappings");
    Ok(())
}

/// Waits until an observer sees that it is so.
fn until(what: &str, so: impl Fn() -> Result<bool, Failed>) -> Result<(), Failed> {
    let start = Instant::now();
    while !so()? {
        if start.elapsed() > PATIENCE {
            return Err(format!("waited in vain until {what}").into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn threads_share_the_vcpus_of_their_domain() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let (mut spec, output) = Machine::spec("many threads", &["1"])?;
    spec.limits.vcpus = 3;
    let id = machine.monitor.create(spec)?;
    assert_eq!(machine.finish(Domain { id, output })?.trim(), "each saw its own");
    Ok(())
}

fn a_peer_that_dies_gives_the_page_back() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let granter = machine.start("granter", &["2"])?;
    let keeper = machine.start("keeper", &["1"])?;
    until("the page is mapped", || {
        Ok(machine.monitor.domain(granter.id)?.in_use == 1)
    })?;
    let mappings = machine.monitor.mappings(keeper.id)?;
    assert_eq!(
        (mappings.len(), mappings[0].granter, mappings[0].readonly),
        (1, 1, false)
    );
    let grants = machine.monitor.grants(granter.id)?;
    assert_eq!(
        (grants.len(), grants[0].user, grants[0].pins),
        (1, Some(2), [1, 0, 0, 0])
    );
    assert!(machine.monitor.dump(granter.id)?.contains("d1: version 1"));
    machine.monitor.destroy(keeper.id)?;
    assert_eq!(machine.finish(granter)?.trim(), "saw hello, got the page back");
    Ok(())
}

fn a_granter_that_dies_leaves_the_mapping_to_its_peer() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let granter = machine.start("granter", &["2"])?;
    let keeper = machine.start("keeper", &["1"])?;
    until("the page is mapped", || {
        Ok(machine.monitor.domain(granter.id)?.in_use == 1)
    })?;
    machine.monitor.destroy(granter.id)?;
    // The number, the table and the memory stay until the peer lets go.
    let counters = machine.monitor.counters();
    assert_eq!(
        (
            counters.running,
            counters.dying,
            counters.memories,
            counters.page_references
        ),
        (1, 1, 2, 1)
    );
    assert_eq!(machine.monitor.mappings(keeper.id)?.len(), 1);
    machine.monitor.destroy(keeper.id)?;
    let counters = machine.monitor.counters();
    assert_eq!(
        (
            counters.running,
            counters.dying,
            counters.memories,
            counters.page_references
        ),
        (0, 0, 0, 0)
    );
    Ok(())
}

fn whoever_misbehaves_is_ended() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let bystander = machine.start("sleep", &[])?;
    let silent = machine.start("silent", &[])?;
    let garbage = machine.start("garbage", &[])?;
    let ended = machine
        .monitor
        .wait_for(garbage.id, PATIENCE)?
        .ok_or("garbage was accepted")?;
    assert_eq!(ended.crashed, Some("wrote garbage into its hypercall area"));
    let ended = machine
        .monitor
        .wait_for(silent.id, PATIENCE)?
        .ok_or("silence was accepted")?;
    assert!(!ended.status.ok_or("no status")?.success());
    assert!(
        machine.monitor.wait_for(bystander.id, Duration::ZERO)?.is_none(),
        "others live on"
    );
    Ok(())
}

fn a_glutton_meets_its_limits_and_no_one_else_does() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let (mut spec, output) = Machine::spec("glutton", &["2"])?;
    spec.shareable_pages = 640;
    let glutton = Domain {
        id: machine.monitor.create(spec)?,
        output,
    };
    let granter = machine.start("granter", &["3"])?;
    let grantee = machine.start("grantee", &["2"])?;
    assert_eq!(
        machine.finish(glutton)?.trim(),
        "640 pages, 512 ports, 32760 references"
    );
    assert_eq!(machine.finish(grantee)?.trim(), "saw hello, wrote world");
    machine.finish(granter)?;
    Ok(())
}

fn what_is_asked_wrongly_is_refused_and_leaves_nothing() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let before = machine.monitor.counters();
    let create = |change: fn(&mut DomainSpec)| {
        let (mut spec, _) = Machine::spec("sleep", &[]).ok()?;
        change(&mut spec);
        machine.monitor.create(spec).err()
    };
    assert!(matches!(
        create(|spec| spec.ram_pages = 0),
        Some(MonitorError::RamPages { .. })
    ));
    assert!(matches!(
        create(|spec| spec.ram_pages = u32::MAX),
        Some(MonitorError::RamPages { .. })
    ));
    assert!(matches!(
        create(|spec| spec.id = Some(DomId(0))),
        Some(MonitorError::BadNumber(_))
    ));
    assert!(matches!(
        create(|spec| spec.id = Some(DomId::SELF)),
        Some(MonitorError::BadNumber(_))
    ));
    assert!(matches!(
        create(|spec| spec.limits.vcpus = 0),
        Some(MonitorError::Create { .. })
    ));
    assert!(matches!(
        create(|spec| spec.limits.vcpus = 1000),
        Some(MonitorError::TooManyVcpus { .. })
    ));
    assert!(matches!(
        create(|spec| spec.limits.grant_frames = Some(0)),
        Some(MonitorError::Create { .. })
    ));
    assert!(matches!(
        create(|spec| spec.program = Program::role("no such role")),
        Some(MonitorError::Launch { .. })
    ));
    for gone in [DomId(9), DomId(0), DomId::SELF] {
        assert!(matches!(
            machine.monitor.domain(gone),
            Err(MonitorError::NoDomain(_))
        ));
        assert!(matches!(
            machine.monitor.destroy(gone),
            Err(MonitorError::NoDomain(_))
        ));
        assert!(matches!(
            machine.monitor.dump(gone),
            Err(MonitorError::NoDomain(_))
        ));
    }
    // The store closes its ends of connections in its own time.
    until("nothing is left", || Ok(machine.monitor.counters() == before))?;
    let domain = machine.start("sleep", &[])?;
    let (mut spec, _) = Machine::spec("sleep", &[])?;
    spec.id = Some(domain.id);
    assert!(matches!(
        machine.monitor.create(spec),
        Err(MonitorError::Exists(_))
    ));
    Ok(())
}

/// Two domains that grant, map, copy and end as fast as they can are killed, one or both, after a time
/// that is another in each round.
fn nothing_is_leaked_when_domains_are_killed_at_any_instant() -> Result<(), Failed> {
    let rounds = std::env::var("GNTTAB_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(100_u64);
    let machine = Machine::new()?;
    let mut baseline: Option<Counters> = None;
    for round in 0..rounds {
        let busy = |role, id: u16, peer: &str| -> Result<DomId, Failed> {
            let (mut spec, _) = Machine::spec(role, &[peer])?;
            spec.id = Some(DomId(id));
            spec.program.stderr = Stdio::null();
            Ok(machine.monitor.create(spec)?)
        };
        let granter = busy("busy granter", 1, "2")?;
        let grantee = busy("busy grantee", 2, "1")?;
        std::thread::sleep(Duration::from_micros(round * 7919 % 15_000));
        if round % 4 == 0 {
            // At least in these rounds somebody dies with pages mapped.
            until("pages are mapped", || {
                Ok(!machine.monitor.domain(grantee)?.maps.is_empty())
            })?;
        }
        let (first, second) = if round % 2 == 0 {
            (granter, grantee)
        } else {
            (grantee, granter)
        };
        let first = machine.monitor.destroy(first)?;
        std::thread::sleep(Duration::from_micros(round * 104_729 % 3_000));
        let second = machine.monitor.destroy(second)?;
        let crashed = [first.crashed, second.crashed];
        assert_eq!(
            crashed,
            [None, None],
            "round {round}: to die while pages are sent is not to misbehave"
        );
        let now = machine.monitor.counters();
        let baseline = baseline.get_or_insert(now);
        assert_eq!(
            (now.memories, now.page_references, now.dying),
            (0, 0, 0),
            "round {round}"
        );
        let back = || Ok(machine.monitor.counters() == *baseline);
        until("everything is back", back)
            .map_err(|_| format!("round {round}: {now:?}, before {baseline:?}"))?;
    }
    Ok(())
}

/// A grantee that nobody started as a domain: this executable, as a plain process.
fn a_program_joins_over_a_socket_and_is_not_called_isolated() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("machine");
    machine.monitor.listen(&path)?;
    let granter = machine.start("granter", &["2"])?;
    let mut joining = Command::new("/proc/self/exe")
        .env("GNTTAB_TEST_JOIN", &path)
        .stdout(Stdio::null())
        .spawn()?;
    // It is there for a short time.
    let seen = until("it has joined", || {
        let Ok(info) = machine.monitor.domain(DomId(2)) else {
            return Ok(false);
        };
        let as_it_should = (info.name.as_str(), info.isolated, info.pid) == ("visitor", false, None);
        Ok(info.state == State::Running && as_it_should)
    });
    assert!(joining.wait()?.success());
    seen?;
    assert_eq!(machine.finish(granter)?.trim(), "saw world, got the page back");
    let ended = machine
        .monitor
        .wait_for(DomId(2), PATIENCE)?
        .ok_or("a domain that hung up goes on")?;
    assert_eq!(
        ended,
        Ended {
            status: None,
            crashed: None
        }
    );

    let too_many = Join {
        vcpus: 1000,
        ..Join::default()
    };
    let refused = gnttab_host::runtime::Domain::join_at(&path, &too_many);
    assert!(matches!(refused, Err(JoinError::Refused(_))), "{refused:?}");
    let none = Join {
        ram_pages: 0,
        ..Join::default()
    };
    let refused = gnttab_host::runtime::Domain::join_at(&path, &none);
    assert!(matches!(refused, Err(JoinError::Refused(_))), "{refused:?}");
    drop(machine);
    assert!(!path.exists());
    Ok(())
}

/// The loader, the C library and the program run under the filter for executables.
fn an_executable_is_a_domain_too() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let granter = machine.start("granter", &["2"])?;
    let (mut spec, output) = Machine::spec("", &["1"])?;
    spec.program.code = Code::Executable(std::env::current_exe()?);
    let id = match machine.monitor.create(spec) {
        Err(MonitorError::NotIsolated { missing, .. }) => {
            println!(
                "skipped: an executable cannot be isolated here, for want of {}",
                missing.join(", ")
            );
            return Ok(());
        }
        created => created?,
    };
    assert!(machine.monitor.domain(id)?.isolated);
    assert_eq!(
        machine.finish(Domain { id, output })?.trim(),
        "saw hello, wrote world"
    );
    assert_eq!(machine.finish(granter)?.trim(), "saw world, got the page back");
    Ok(())
}

fn dropping_the_monitor_ends_every_domain() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let domains = [
        machine.start("sleep", &[])?,
        machine.start("busy granter", &["1"])?,
    ];
    drop(machine);
    for mut domain in domains {
        // The end of its output is the end of its process.
        domain.output.read_to_string(&mut String::new())?;
    }
    Ok(())
}

/// Two domains, of which it says that they run, and nothing more.
fn monitor_to_be_killed() -> ExitCode {
    let run = || -> Result<(), Failed> {
        let machine = Machine::new()?;
        let mut domains = Vec::new();
        for role in ["sleep", "busy granter"] {
            let mut program = Program::role(role);
            program.arguments = vec!["1".into()];
            // The pipe by which the test sees their end.
            program.stdout = Stdio::inherit();
            domains.push(machine.monitor.create(DomainSpec::new(role, program))?);
        }
        println!("ready");
        machine.monitor.wait(domains[0])?;
        Ok(())
    };
    if run().is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn killing_the_monitor_ends_every_domain() -> Result<(), Failed> {
    let mut monitor = Command::new("/proc/self/exe")
        .env("GNTTAB_TEST_MONITOR", "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = monitor.stdout.take().ok_or("no output")?;
    let mut ready = [0; 6];
    output.read_exact(&mut ready)?;
    assert_eq!(&ready, b"ready\n");
    monitor.kill()?;
    // All of them have the pipe: its end is the end of the last.
    output.read_to_string(&mut String::new())?;
    monitor.wait()?;
    Ok(())
}
