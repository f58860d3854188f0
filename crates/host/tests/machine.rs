//! Domains that are processes, on a machine that is this process: sharing, ending, dying.
//!
//! This executable is the monitor, the launcher and the domains, so it has a `main` of its own. It passes as
//! root and as any user. `GNTTAB_ROUNDS=1000` makes the leak test as long as it was meant to be.

#[path = "machine/roles.rs"]
mod roles;

use std::io::Read;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use gnttab_abi::DomId;
use gnttab_host::launch::{self, Program};
use gnttab_host::monitor::{DomainSpec, Ended, Monitor, Settings};
use libtest_mimic::{Arguments, Failed, Trial};

/// Tests by the name of their function.
macro_rules! trials {
    ($($test:ident,)*) => { vec![$(Trial::test(stringify!($test), $test)),*] };
}

fn main() -> ExitCode {
    if let Some(code) = launch::domain_main(roles::ROLES) {
        return code;
    }
    let trials = trials![a_page_is_granted_mapped_written_ended_and_renewed,];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
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
