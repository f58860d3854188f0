//! `gnttab doctor`: what is wrong with a running machine, and how near its limits it is.

use std::thread;
use std::time::Instant;

use gnttab_host::monitor::State;
use serde_json::{Value, json};

use crate::args::Doctor;
use crate::control;
use crate::failure::Failure;
use crate::findings::{self, Finding, Level};
use crate::output::{self, columns};
use crate::pulse::{Beat, Pulse, mappings};

/// Looks twice and says what it found.
pub(crate) fn main(args: &Doctor) -> Result<(), Failure> {
    let mut machine = control::connect(args.which.control.as_deref())?;
    let mut pulse = Pulse::default();
    pulse.take(Instant::now(), machine.domains().map_err(control::failed)?);
    thread::sleep(args.interval);
    pulse.take(Instant::now(), machine.domains().map_err(control::failed)?);
    let findings = findings::judge(&pulse);
    if args.json {
        let domains: Vec<Value> = pulse.domains().map(room).collect();
        output::json("doctor", json!({ "findings": findings, "domains": domains }));
    } else {
        output::line(text(&pulse, &findings).trim_end());
    }
    let problems = findings
        .iter()
        .filter(|finding| finding.level == Level::Problem)
        .count();
    match problems {
        0 => Ok(()),
        _ => Err(Failure::new(output::count(problems, "problem")).in_data()),
    }
}

/// How near its limits a domain is.
fn room(beat: &Beat) -> Value {
    let info = &beat.info;
    let (taken, most) = findings::references(info);
    json!({
        "id": info.id,
        "name": info.name,
        "grant_frames": { "used": info.grant_frames.0, "most": info.grant_frames.1 },
        "references": { "used": taken, "most": most },
        "mappings": { "used": mappings(info), "most": info.handles.1 },
    })
}

fn text(pulse: &Pulse, findings: &[Finding]) -> String {
    let mut text = String::new();
    if findings.is_empty() {
        text.push_str("Nothing is wrong.\n");
    }
    for finding in findings {
        let level = match finding.level {
            Level::Problem => "problem",
            Level::Warning => "warning",
        };
        text.push_str(&format!(
            "{level}, {}: {}: {}\n    {}\n",
            finding.kind.name(),
            pulse.name(finding.domain),
            finding.what,
            finding.next
        ));
    }
    text.push_str("\nRoom\n");
    let head = [
        "domain",
        "frames",
        "references",
        "",
        "mappings",
        "",
        "suggested limits",
    ]
    .map(str::to_owned);
    let rows = pulse
        .domains()
        .filter(|beat| beat.info.state == State::Running)
        .map(|beat| {
            let info = &beat.info;
            let (taken, most) = findings::references(info);
            let held = mappings(info);
            [
                pulse.name(info.id),
                format!("{} of {}", info.grant_frames.0, info.grant_frames.1),
                format!("{taken} of {most}"),
                percent(taken, most),
                format!("{held} of {}", info.handles.1),
                percent(held, info.handles.1),
                suggestion(beat),
            ]
        });
    text.push_str(&columns(std::iter::once(head).chain(rows), &[1, 2, 3, 4, 5]));
    text
}

fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        whole => format!("{}%", part.saturating_mul(100) / whole),
    }
}

/// The limits that what is in use now would fit twice.
fn suggestion(beat: &Beat) -> String {
    let info = &beat.info;
    let per_frame = if info.version == 2 { 256 } else { 512 };
    let (taken, _) = findings::references(info);
    let frames = ((taken * 2 + 8).div_ceil(per_frame)).max(info.grant_frames.0.into());
    let maptrack = (mappings(info) * 2).div_ceil(256).max(1);
    format!("grant-frames = {frames}, maptrack-frames = {maptrack}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pulse::tests::{domain, two_looks};

    #[test]
    fn a_healthy_machine_is_called_so_with_its_room() {
        let healthy = domain(1, "app", json!({ "maps": { "2": 300 } }));
        let pulse = two_looks(vec![healthy.clone()], vec![healthy]);
        assert_eq!(
            text(&pulse, &findings::judge(&pulse)),
            "Nothing is wrong.\n\n\
             Room\n\
             \x20 domain   frames  references           mappings      suggested limits\n\
             \x20 d1 app  1 of 64  0 of 32760  0%  300 of 262144  0%  grant-frames = 1, maptrack-frames = 3\n"
        );
    }
}
