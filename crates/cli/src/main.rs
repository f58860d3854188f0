//! The `gnttab` command: what people type.
//!
//! Standard output is data, standard error is talk; exit code 0 done, 1 failed, 2 wrong use; every failure is one line that
//! names what failed, on which object, why, and the next step.

#![deny(unsafe_code)]

mod args;
mod bell;
mod bench;
mod block;
mod control;
mod decode;
mod demo;
mod disk;
mod doctor;
mod dump;
mod explain;
mod failure;
mod file;
mod findings;
mod hand;
mod image;
mod image_disk;
mod live;
mod machine;
mod manual;
mod nbd;
mod output;
mod place;
mod plan;
mod pulse;
mod queue_device;
mod roles;
mod run;
mod session;
mod shell;
mod store;
mod top;
#[expect(
    unsafe_code,
    reason = "addresses of memory that a peer may write go to the kernel as they are"
)]
mod vectored;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{AtRest, Cli, Command, Watching};

fn main() -> ExitCode {
    if let Some(code) = gnttab_host::launch::domain_main(roles::ROLES) {
        return code;
    }
    let cli = Cli::parse();
    if let Ok(directives) = std::env::var("GNTTAB_TRACE") {
        // Spans of the operations that domains call: docs/tracing.md.
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::new(directives))
            .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
            .with_writer(std::io::stderr)
            .init();
    }
    let name = cli.command.name();
    let json = cli.command.wants_json();
    let outcome = match cli.command {
        Command::Demo(demo) => demo::main(&demo),
        Command::Disk(disk) => disk::main(&disk),
        Command::Run(run) => run::main(&run),
        Command::Dump(dump) => dump::main(&dump),
        Command::Bench(bench) => bench::main(&bench),
        Command::Watching(Watching::Top(top)) => top::main(&top),
        Command::Watching(Watching::Watch(watch)) => watch::main(&watch),
        Command::Watching(Watching::Doctor(doctor)) => doctor::main(&doctor),
        Command::AtRest(AtRest::Decode(decode)) => decode::main(&decode),
        Command::AtRest(AtRest::Explain(explain)) => explain::main(&explain),
        Command::AtRest(AtRest::Plan(plan)) => plan::main(&plan),
        Command::AtRest(AtRest::Shell(shell)) => shell::main(&shell),
        Command::AtRest(AtRest::Grant(grant)) => hand::grant(&grant),
        Command::AtRest(AtRest::Map(map)) => hand::map(&map),
        Command::AtRest(AtRest::Completions(completions)) => manual::completions(&completions),
        Command::AtRest(AtRest::Man(man)) => manual::main(&man),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::say(&format!("gnttab {name}: {failure}"));
            if json && !failure.is_in_data() {
                output::json(name, serde_json::json!({ "error": failure.to_json() }));
            }
            ExitCode::from(failure.exit_code())
        }
    }
}
