//! Samples as lines or JSON.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use gnttab_host::control::Client;
use gnttab_host::monitor::{DomainInfo, MachineInfo};
use serde_json::{Value, json};

use super::app::App;
use super::draw::{frames, maptrack, rate, state};
use crate::args::Top;
use crate::control;
use crate::failure::Failure;
use crate::findings::{Finding, age};
use crate::live::Stop;
use crate::output::{self, columns};
use crate::pulse::{Beat, pins};
use crate::watch::clock;

/// Prints as many samples as asked for. The first is a look of which nothing is said: rates need two.
pub(super) fn main(args: &Top, mut machine: Client) -> Result<(), Failure> {
    let stop = Stop::new()?;
    let mut app = App::new(args.interval, args.sort, &args.filter, false);
    let mut look = |app: &mut App| -> Result<(MachineInfo, u64), Failure> {
        let info = machine.machine().map_err(control::failed)?;
        let domains: Vec<DomainInfo> = machine.domains().map_err(control::failed)?;
        app.take(Instant::now(), info.clone(), domains);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok((info, u64::try_from(now.as_millis()).unwrap_or(u64::MAX)))
    };
    look(&mut app)?;
    let mut next = Instant::now() + args.interval;
    let mut left = args.count;
    while left != Some(0) && !stop.asked_within(next.saturating_duration_since(Instant::now())) {
        // Late ones are left out, not made up for.
        next = (next + args.interval).max(Instant::now());
        let (info, time_ms) = look(&mut app)?;
        let read = if args.json {
            output::json("top", sample(&app, &info, time_ms))
        } else {
            output::line(text(&app, &info, time_ms).trim_end())
        };
        if !read {
            break;
        }
        left = left.map(|left| left - 1);
    }
    thread::yield_now();
    Ok(())
}

fn sample(app: &App, machine: &MachineInfo, time_ms: u64) -> Value {
    let domains: Vec<Value> = app
        .rows()
        .into_iter()
        .map(|beat| {
            let mut domain = json!(beat.info);
            let by_status: BTreeMap<&String, f64> = beat
                .by_status
                .iter()
                .map(|(status, rate)| (status, *rate))
                .collect();
            domain["per_second"] =
                json!({ "operations": beat.operations, "errors": beat.errors, "by_status": by_status });
            domain
        })
        .collect();
    json!({ "time_ms": time_ms, "machine": machine, "domains": domains, "findings": findings(app) })
}

/// What is wrong with the domains that are shown, or because of them.
fn findings(app: &App) -> Vec<&Finding> {
    let shown: Vec<u16> = app.rows().iter().map(|beat| beat.info.id).collect();
    let concerns = |finding: &&Finding| {
        shown.contains(&finding.domain) || finding.peer.is_some_and(|peer| shown.contains(&peer))
    };
    app.findings.iter().filter(concerns).collect()
}

fn text(app: &App, machine: &MachineInfo, time_ms: u64) -> String {
    let head = [
        "id", "name", "state", "frames", "granted", "in use", "pins", "maptrack", "ops/s", "err/s", "oldest",
    ];
    let row = |beat: &Beat| {
        let info = &beat.info;
        [
            format!("d{}", info.id),
            info.name.clone(),
            state(info).to_owned(),
            frames(info),
            info.granted.to_string(),
            info.in_use.to_string(),
            pins(info).to_string(),
            maptrack(info),
            rate(beat.operations),
            rate(beat.errors),
            info.oldest_mapping_ms.map_or("-".to_owned(), age),
        ]
    };
    let rows = std::iter::once(head.map(str::to_owned)).chain(app.rows().into_iter().map(row));
    let mut text = format!(
        "{}  up {}, {}, {} of {} vCPUs\n",
        clock(time_ms),
        age(machine.age_ms),
        output::count(app.rows().len(), "domain"),
        machine.vcpus.0,
        machine.vcpus.1
    );
    text.push_str(&columns(rows, &[3, 4, 5, 6, 7, 8, 9, 10]));
    for finding in findings(app) {
        text.push_str(&format!(
            "  ! {}: {}: {}\n",
            finding.kind.name(),
            app.pulse.name(finding.domain),
            finding.what
        ));
    }
    text
}
