//! `gnttab watch`: what happens on a running machine, one event a line.

use std::collections::BTreeMap;

use gnttab_host::control::{Client, Heard};
use gnttab_host::monitor::{EventInfo, EventKind, Filter};
use serde_json::{Value, json};

use crate::args::Watch;
use crate::control;
use crate::failure::Failure;
use crate::output;

/// Tells events until the machine ends, nobody reads any more, or there were as many as asked for.
pub(crate) fn main(args: &Watch) -> Result<(), Failure> {
    let path = control::path(args.which.control.as_deref())?;
    let mut names = Names::new(control::connect(Some(&path))?);
    let filter = Filter {
        events: args.event.clone(),
        domain: match &args.domain {
            Some(domain) => Some(names.find(domain)?),
            None => None,
        },
        gref: args.reference,
        operation: args.operation.map(|op| op.name().to_owned()),
        status: args.status.and_then(|status| status.name()).map(str::to_owned),
    };
    let events = control::connect(Some(&path))?
        .events(filter)
        .map_err(control::failed)?;
    if !args.json {
        output::say("watching; Ctrl-C ends it");
    }
    let mut left = args.count;
    for heard in events {
        let heard = heard.map_err(control::failed)?;
        let read = match (&heard, args.json) {
            (Heard::Event(event), false) => output::line(&names.line(event)),
            (Heard::Event(event), true) => output::json("watch", names.object(event)),
            (Heard::Dropped(count), false) => {
                output::line(&format!("{} {count} events were left out", " ".repeat(12)))
            }
            (Heard::Dropped(count), true) => {
                output::json("watch", json!({ "event": "dropped", "count": count }))
            }
        };
        left = left.map(|left| left.saturating_sub(u64::from(matches!(heard, Heard::Event(_)))));
        if !read || left == Some(0) {
            return Ok(());
        }
    }
    output::say("the machine has ended");
    Ok(())
}

/// What domains are called: asked for when a number comes up that is new.
struct Names {
    machine: Client,
    known: BTreeMap<u16, String>,
}

impl Names {
    fn new(machine: Client) -> Names {
        Names {
            machine,
            known: BTreeMap::new(),
        }
    }

    fn find(&mut self, wanted: &crate::args::DomainRef) -> Result<u16, Failure> {
        let domains = self.machine.domains().map_err(control::failed)?;
        control::find(wanted, &domains).map(|domain| domain.id)
    }

    fn name(&mut self, id: u16) -> Option<&str> {
        if !self.known.contains_key(&id)
            && let Ok(domains) = self.machine.domains()
        {
            // The dead have no name any more, but had one.
            let named = domains.into_iter().filter(|domain| !domain.name.is_empty());
            for domain in named {
                self.known.insert(domain.id, domain.name);
            }
            self.known.entry(id).or_default();
        }
        self.known
            .get(&id)
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    }

    /// `d2 app`, or the number alone.
    fn full(&mut self, id: u16) -> String {
        match self.name(id) {
            Some(name) => format!("d{id} {name}"),
            None => format!("d{id}"),
        }
    }

    /// `12:00:01.234  refused   d4 knocker map_grant_ref of d1 keeper ref 0x30d40: bad_gntref`
    fn line(&mut self, event: &EventInfo) -> String {
        let who = self.full(event.domain);
        let peer = event.peer.map(|peer| self.full(peer));
        let gref = event
            .gref
            .map(|gref| format!(" ref {gref:#x}"))
            .unwrap_or_default();
        let of = peer
            .as_ref()
            .map(|peer| format!(" of {peer}"))
            .unwrap_or_default();
        let to = peer
            .as_ref()
            .map(|peer| format!(" to {peer}"))
            .unwrap_or_default();
        let what = match event.event {
            EventKind::Granted | EventKind::Ended => format!("{who}{gref}{to}"),
            EventKind::Mapped | EventKind::Unmapped => format!("{who}{gref}{of}"),
            EventKind::Pending => format!("{who}{gref}, kept by {}", peer.unwrap_or_default()),
            EventKind::Refused if event.operation.is_none() => {
                format!("{who}: {}", event.detail.as_deref().unwrap_or("-"))
            }
            EventKind::Refused => format!(
                "{who} {}{gref}{of}: {}",
                event.operation.as_deref().unwrap_or("-"),
                event.status.as_deref().unwrap_or("-")
            ),
            EventKind::Died => format!("{who}: {}", event.detail.as_deref().unwrap_or("-")),
        };
        format!("{}  {:9} {what}", clock(event.time_ms), event.event.name())
    }

    fn object(&mut self, event: &EventInfo) -> Value {
        let mut object = json!(event);
        object["name"] = json!(self.name(event.domain));
        if let Some(peer) = event.peer {
            object["peer_name"] = json!(self.name(peer));
        }
        object
    }
}

/// `12:34:56.789`, in UTC, as logs have it.
pub(crate) fn clock(time_ms: u64) -> String {
    let (seconds, ms) = (time_ms / 1000, time_ms % 1000);
    let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}.{ms:03}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_utc() {
        assert_eq!(clock(1_795_529_346_623), "14:09:06.623");
    }
}
