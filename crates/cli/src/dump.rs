//! `gnttab dump`: a domain's grant table, decoded.

use gnttab_host::control::Table;
use gnttab_host::monitor::{DomainInfo, GrantInfo};
use serde_json::json;

use crate::args::Dump;
use crate::control;
use crate::failure::Failure;
use crate::output::{self, columns};

/// Prints the table.
pub(crate) fn main(args: &Dump) -> Result<(), Failure> {
    let mut machine = control::connect(args.control.as_deref())?;
    let domains = machine.domains().map_err(control::failed)?;
    let domain = control::find(&args.domain, &domains)?.id;
    let table = machine.table(domain).map_err(control::failed)?;
    if let Some(gref) = args.reference {
        return one_entry(args, &table, gref);
    }
    if args.json {
        let Table {
            domain,
            grants,
            mappings,
            mapped_by,
        } = &table;
        output::json(
            "dump",
            json!({ "domain": domain, "entries": grants, "mappings": mappings, "mapped_by": mapped_by }),
        );
    } else {
        output::line(text(&table).trim_end());
    }
    Ok(())
}

/// Entries that the table has.
fn entries(domain: &DomainInfo) -> u64 {
    let per_frame = if domain.version == 2 { 256 } else { 512 };
    u64::from(domain.grant_frames.0) * per_frame
}

fn one_entry(args: &Dump, table: &Table, gref: u32) -> Result<(), Failure> {
    let domain = &table.domain;
    let entries = entries(domain);
    if u64::from(gref) >= entries {
        let frames = domain.grant_frames.0;
        let frames = if frames == 1 {
            "1 frame".to_owned()
        } else {
            format!("{frames} frames")
        };
        return Err(Failure::new(format!(
            "bad_gntref (-3), domain d{}, reference {gref:#x}: past the table, which has {entries} entries ({frames} of version {})",
            domain.id, domain.version
        ))
        .next(match entries.checked_sub(1) {
            Some(last) => format!("the last one is {last:#x}"),
            None => "the domain has not set up its table".to_owned(),
        }));
    }
    let entry = table.grants.iter().find(|entry| entry.gref == gref);
    if args.json {
        output::json(
            "dump",
            json!({ "domain": domain, "gref": gref, "free": entry.is_none(), "entry": entry }),
        );
        return Ok(());
    }
    let text = match entry {
        None => format!("d{} reference {gref:#x}: free", domain.id),
        Some(entry) => {
            let [host_write, host_read, device_write, device_read] = entry.pins;
            let user = match entry.user {
                Some(user) => format!(
                    "in use by d{user}: pins host write {host_write}, host read {host_read}, device write {device_write}, device read {device_read}"
                ),
                None => "nobody uses it".to_owned(),
            };
            format!(
                "d{} reference {gref:#x}: {} to d{}, {}, frame {:#x}; {user}",
                domain.id,
                entry.kind,
                entry.grantee,
                or_none(&entry.flags),
                entry.frame,
            )
        }
    };
    output::line(&text);
    Ok(())
}

fn or_none(flags: &str) -> &str {
    if flags.is_empty() { "no flags" } else { flags }
}

fn text(table: &Table) -> String {
    let domain = &table.domain;
    let (frames, most) = domain.grant_frames;
    let mut text = format!(
        "d{} {}: version {}, {frames} of {most} frames, {} entries, {} granted, {} in use\n",
        domain.id,
        domain.name,
        domain.version,
        entries(domain),
        domain.granted,
        domain.in_use,
    );
    if !table.grants.is_empty() {
        text.push_str("\nIts entries\n");
        let head = [
            "ref",
            "kind",
            "to",
            "flags",
            "frame",
            "in use by",
            "pins hw hr dw dr",
        ]
        .map(str::to_owned);
        let row = |entry: &GrantInfo| {
            let pins = entry.pins.map(|pin| pin.to_string()).join(" ");
            [
                format!("{:#x}", entry.gref),
                entry.kind.clone(),
                format!("d{}", entry.grantee),
                if entry.flags.is_empty() {
                    "-".to_owned()
                } else {
                    entry.flags.clone()
                },
                format!("{:#x}", entry.frame),
                entry
                    .user
                    .map_or_else(|| "-".to_owned(), |user| format!("d{user}")),
                if entry.user.is_some() {
                    pins
                } else {
                    "-".to_owned()
                },
            ]
        };
        let rows = std::iter::once(head).chain(table.grants.iter().map(row));
        text.push_str(&columns(rows, &[0, 4]));
    }
    if !table.mappings.is_empty() {
        text.push_str("\nWhat it maps of others\n");
        let head = ["handle", "of", "ref", "access", "for"].map(str::to_owned);
        let rows = table.mappings.iter().map(|mapping| {
            [
                format!("{:#x}", mapping.handle),
                format!("d{}", mapping.granter),
                format!("{:#x}", mapping.gref),
                if mapping.readonly { "read" } else { "write" }.to_owned(),
                format!("{}.{:03} s", mapping.age_ms / 1000, mapping.age_ms % 1000),
            ]
        });
        text.push_str(&columns(std::iter::once(head).chain(rows), &[0, 2, 4]));
    }
    text
}
