//! `gnttab plan`: how large grant tables and maptrack have to be, before anything runs.

mod description;
mod need;

use serde_json::json;

use crate::args::Plan;
use crate::failure::Failure;
use crate::machine;
use crate::output::{self, columns};
use description::Description;
use need::{DomainNeed, Item};

/// Prints the plan.
pub(crate) fn main(args: &Plan) -> Result<(), Failure> {
    if args.example {
        output::line(description::EXAMPLE.trim_end());
        return Ok(());
    }
    let Some(path) = &args.description else {
        return Err(Failure::wrong_use("no description given").next("see: gnttab plan --help"));
    };
    let description = machine::read(path, Description::parse)
        .map_err(|error| Failure::from(error).next("see a working one with: gnttab plan --example"))?;
    let needs = need::needs(&description);
    if args.json {
        output::json(
            "plan",
            json!({ "fits": needs.iter().all(DomainNeed::fits), "domains": needs }),
        );
    } else {
        output::line(text(&needs).trim_end());
    }
    let narrow: Vec<&str> = needs
        .iter()
        .filter(|need| !need.fits())
        .map(|need| need.name.as_str())
        .collect();
    if narrow.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the limits that the description gives {} are too low",
        narrow.join(", ")
    ))
    .next("set those of the plan")
    .in_data())
}

fn text(needs: &[DomainNeed]) -> String {
    let mut text = String::new();
    for need in needs {
        text.push_str(&format!("d{} {}\n", need.id, need.name));
        let mut rows = Vec::new();
        if !need.grants.is_empty() {
            rows.extend(need.grants.iter().map(|item| row("grants", item)));
            let per_frame = need::entries_per_frame(need.grant_version);
            let status = match need.status_frames {
                0 => String::new(),
                status => format!(", and {status} status frames"),
            };
            rows.push([
                "=".to_owned(),
                need.references.to_string(),
                format!(
                    "with the 8 reserved ones; at {per_frame} a frame of version {}",
                    need.grant_version
                ),
                format!("{} grant frames{status}", need.grant_frames),
            ]);
        }
        if !need.mappings.is_empty() {
            rows.extend(need.mappings.iter().map(|item| row("maps", item)));
            rows.push([
                "=".to_owned(),
                need.handles.to_string(),
                "at 256 a frame, one of which is never used".to_owned(),
                format!("{} maptrack frames", need.maptrack_frames),
            ]);
        }
        if rows.is_empty() {
            text.push_str("  nothing\n");
        }
        text.push_str(&columns(rows, &[1]));
        text.push('\n');
    }
    text.push_str("Limits to set: the need and a quarter more, for grants whose peer lets go late\n");
    let head = ["domain", "gnttab run", "Xen (xl.cfg)", "described"].map(str::to_owned);
    let rows = needs.iter().map(|need| {
        let (frames, maptrack) = (need.grant_frames_to_set, need.maptrack_frames_to_set);
        [
            format!("d{} {}", need.id, need.name),
            format!("grant-frames = {frames}, maptrack-frames = {maptrack}"),
            format!("max_grant_frames={frames} max_maptrack_frames={maptrack}"),
            format!(
                "{} and {}: {}",
                need.grant_frames_limit,
                need.maptrack_frames_limit,
                if need.fits() { "enough" } else { "TOO LOW" }
            ),
        ]
    });
    text.push_str(&columns(std::iter::once(head).chain(rows), &[]));
    text
}

fn row(what: &str, item: &Item) -> [String; 4] {
    [
        what.to_owned(),
        item.count.to_string(),
        item.arithmetic.clone(),
        item.of.clone(),
    ]
}
