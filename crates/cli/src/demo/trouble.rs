//! `gnttab demo --trouble`: a machine with something wrong in every way that the tools know.

use std::time::Duration;

use gnttab_engine::Limits;

use crate::args::Demo;
use crate::failure::Failure;
use crate::live::Stop;
use crate::output;
use crate::roles::TROUBLE;
use crate::roles::trouble::Orders;
use crate::session::{DomainPlan, Event, ProgramPlan, Session};

/// Stays up until told to stop.
pub(super) fn main(args: &Demo) -> Result<(), Failure> {
    let stop = Stop::new()?;
    let domains = [
        ("keeper", Orders::Keeper(2)),
        ("lender", Orders::Lender(1)),
        ("hoarder", Orders::Hoarder(1)),
        ("knocker", Orders::Knocker(1)),
    ]
    .map(|(name, orders)| plan(name, orders));
    let domains = domains.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut session = Session::start(&format!("trouble-{}", std::process::id()), domains, Vec::new())?;
    let ready = "d1 keeper keeps a page of d2 lender, d3 hoarder's table is full, d4 knocker is refused: \
                 look with gnttab top, gnttab doctor, gnttab watch; Ctrl-C ends it";
    if args.json {
        output::json("demo", serde_json::json!({ "event": "ready" }));
    } else {
        output::say(ready);
    }
    while !stop.asked_within(Duration::ZERO) {
        if let Some(Event::Ended { name, how, .. }) = session.next_event(Duration::from_millis(200))? {
            return Err(Failure::new(format!("domain {name} {how}")));
        }
    }
    session.stop(|_| {})?;
    Ok(())
}

fn plan(name: &str, orders: Orders) -> Result<DomainPlan, Failure> {
    let text =
        serde_json::to_string(&orders).map_err(|error| Failure::new(format!("domain {name}: {error}")))?;
    let mut plan = DomainPlan {
        ram_pages: 1024,
        program: ProgramPlan::Role(TROUBLE, text),
        ..DomainPlan::new(name)
    };
    if matches!(orders, Orders::Hoarder(_)) {
        plan.limits = Limits {
            grant_frames: Some(1),
            ..Limits::default()
        };
    }
    Ok(plan)
}
