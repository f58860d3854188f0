//! What is wrong with a running machine, or soon will be, and what to do about it. `top`, `doctor` and `--batch` all say what
//! this says.

use serde::Serialize;

use gnttab_abi::NR_RESERVED_ENTRIES;
use gnttab_host::monitor::{DomainInfo, PendingInfo, State};

use crate::pulse::{Beat, Pulse, mappings};

/// From here on an end of access that is pending is called stuck: a peer that lets go does so sooner.
const STUCK_MS: u64 = 2000;
/// Looks at which withdrawn entries must be in use to be called stuck.
const STUCK_LOOKS: u32 = 3;
/// Errors a second from which a domain is refused often.
const OFTEN: f64 = 10.0;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    /// Something does not work.
    Problem,
    /// Something soon will not.
    Warning,
}

/// What is the matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A page that its owner wants back is still used.
    Stuck,
    /// A signal has stopped a domain's process.
    Stopped,
    /// A table has no room.
    Full,
    /// A table will soon have no room.
    NearlyFull,
    /// Many operations answer with errors.
    Refused,
    /// A consumer of a grant table has as much as it may have.
    Quota,
    /// Pages were given up for good.
    Leaked,
    /// A domain's process could reach more than what it was granted.
    NotIsolated,
}

impl Kind {
    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Stuck => "stuck",
            Kind::Stopped => "stopped",
            Kind::Full => "full",
            Kind::NearlyFull => "nearly full",
            Kind::Refused => "refused",
            Kind::Quota => "quota",
            Kind::Leaked => "leaked",
            Kind::NotIsolated => "not isolated",
        }
    }
}

/// Something that is wrong, or soon will be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// How bad it is.
    pub(crate) level: Level,
    /// What is the matter.
    pub(crate) kind: Kind,
    /// Whose matter.
    pub(crate) domain: u16,
    /// Its name.
    pub(crate) name: String,
    /// In words.
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) next: String,
    /// The other domain, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<u16>,
    /// The first reference that it is about, where it is about any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gref: Option<u32>,
}

/// Everything that is wrong, worst first.
pub(crate) fn judge(pulse: &Pulse) -> Vec<Finding> {
    let mut findings: Vec<Finding> = pulse.domains().flat_map(|beat| of_domain(beat, pulse)).collect();
    findings.sort_by_key(|finding| (finding.level, finding.kind, finding.domain));
    findings
}

fn of_domain(beat: &Beat, pulse: &Pulse) -> Vec<Finding> {
    let info = &beat.info;
    let mut all = stuck(beat, pulse);
    all.extend(dead(info, pulse));
    all.extend(table(info));
    all.extend(maptrack(info));
    all.extend(refused(beat));
    all.extend(quotas(beat));
    if let Some(says) = info.says.as_ref().filter(|says| says.leaked > 0) {
        all.push(Finding::new(
            info,
            (Level::Problem, Kind::Leaked),
            format!("has given up {} references and their pages for good", says.leaked),
            "its peers hold more than its queue of pending ends has room for: see what is stuck".into(),
        ));
    }
    if let (true, Some(pid)) = (info.stopped, info.pid) {
        all.push(Finding::new(
            info,
            (Level::Problem, Kind::Stopped),
            format!("does nothing: a signal has stopped its process {pid}"),
            format!("let it go on: kill -CONT {pid}"),
        ));
    }
    if info.state == State::Running && !info.isolated {
        all.push(Finding::new(
            info,
            (Level::Warning, Kind::NotIsolated),
            "is not isolated: it joined, or this machine lacks a wall that matters".into(),
            "trust it as you trust its user".into(),
        ));
    }
    all
}

impl Finding {
    fn new(info: &DomainInfo, (level, kind): (Level, Kind), what: String, next: String) -> Finding {
        Finding {
            level,
            kind,
            domain: info.id,
            name: info.name.clone(),
            what,
            next,
            peer: None,
            gref: None,
        }
    }
}

/// Ends of access that peers do not let happen: as the domain says, and as its table shows.
fn stuck(beat: &Beat, pulse: &Pulse) -> Vec<Finding> {
    let info = &beat.info;
    let said = info.says.iter().flat_map(|says| &says.pending);
    let old: Vec<&PendingInfo> = said.filter(|end| end.age_ms >= STUCK_MS).collect();
    let mut peers: Vec<u16> = old.iter().map(|end| end.peer).collect();
    peers.sort_unstable();
    peers.dedup();
    let mut findings: Vec<Finding> = peers
        .into_iter()
        .map(|peer| {
            let theirs: Vec<&&PendingInfo> = old.iter().filter(|end| end.peer == peer).collect();
            let longest = theirs.iter().map(|end| end.age_ms).max().unwrap_or(0);
            let mut some: Vec<String> = theirs
                .iter()
                .take(3)
                .map(|end| format!("{:#x}", end.gref))
                .collect();
            if theirs.len() > some.len() {
                some.push(format!("{} more", theirs.len() - some.len()));
            }
            let noun = if theirs.len() == 1 {
                "reference"
            } else {
                "references"
            };
            Finding {
                peer: Some(peer),
                gref: theirs.first().map(|end| end.gref),
                ..Finding::new(
                    info,
                    (Level::Problem, Kind::Stuck),
                    format!(
                        "wants {noun} {} back; {} has kept it for {}",
                        some.join(", "),
                        pulse.name(peer),
                        age(longest)
                    ),
                    format!("have d{peer} unmap it, or end d{peer}"),
                )
            }
        })
        .collect();
    if findings.is_empty() && beat.withdrawn_for >= STUCK_LOOKS {
        let users: Vec<String> = info.pinned_by.keys().map(|user| pulse.name(*user)).collect();
        findings.push(Finding {
            peer: info.pinned_by.keys().next().copied(),
            ..Finding::new(
                info,
                (Level::Problem, Kind::Stuck),
                format!(
                    "has withdrawn {} entries that {} still uses",
                    info.entries.withdrawn,
                    users.join(" or ")
                ),
                format!("see who: gnttab dump d{}", info.id),
            )
        });
    }
    findings
}

/// A dead domain whose pages others use.
fn dead(info: &DomainInfo, pulse: &Pulse) -> Option<Finding> {
    if info.state != State::Dying || info.page_references == 0 {
        return None;
    }
    let holders: Vec<u16> = pulse
        .domains()
        .filter(|other| other.info.maps.contains_key(&info.id))
        .map(|other| other.info.id)
        .collect();
    let names: Vec<String> = holders.iter().map(|id| pulse.name(*id)).collect();
    Some(Finding {
        peer: holders.first().copied(),
        ..Finding::new(
            info,
            (Level::Problem, Kind::Stuck),
            format!(
                "is dead, and {} still uses {} of its pages",
                if names.is_empty() {
                    "somebody".to_owned()
                } else {
                    names.join(" and ")
                },
                info.page_references
            ),
            "its memory goes when they let go: have them unmap, or end them".into(),
        )
    })
}

/// References of a table that are taken, and that there can be.
pub(crate) fn references(info: &DomainInfo) -> (u64, u64) {
    let reserved = u64::from(NR_RESERVED_ENTRIES);
    let most = info.entries.most.saturating_sub(reserved);
    let granted = u64::from(info.entries.total.saturating_sub(info.entries.free));
    // What is taken and not granted at this moment only the domain knows.
    let taken = info.says.as_ref().map_or(0, |says| {
        u64::from(says.refs.0.saturating_sub(says.refs.1)).saturating_sub(reserved)
    });
    (granted.max(taken).min(most), most)
}

fn table(info: &DomainInfo) -> Option<Finding> {
    let (taken, most) = references(info);
    let (frames, most_frames) = info.grant_frames;
    let what = format!("{taken} of {most} references are taken, in {frames} of {most_frames} frames");
    let next = format!(
        "give it more: grant-frames = {} in the machine file; or find who takes so many: gnttab dump d{}",
        most_frames.saturating_mul(2),
        info.id
    );
    limit(info, "its grant table", (taken, most), what, next)
}

fn maptrack(info: &DomainInfo) -> Option<Finding> {
    let (taken, most) = (mappings(info), info.handles.1);
    let what = format!("{taken} of {most} mappings exist");
    let frames = most / 256;
    let next = format!(
        "give it more: maptrack-frames = {} in the machine file; or have it unmap what it does not use",
        frames.saturating_mul(2)
    );
    limit(info, "its maptrack", (taken, most), what, next)
}

fn limit(
    info: &DomainInfo,
    which: &str,
    (taken, most): (u64, u64),
    what: String,
    next: String,
) -> Option<Finding> {
    let (rank, word) = if most == 0 {
        return None;
    } else if taken >= most {
        ((Level::Problem, Kind::Full), "is full")
    } else if most - taken <= most / 10 {
        ((Level::Warning, Kind::NearlyFull), "is nearly full")
    } else {
        return None;
    };
    Some(Finding::new(info, rank, format!("{which} {word}: {what}"), next))
}

fn refused(beat: &Beat) -> Option<Finding> {
    let rate = beat.errors.filter(|rate| *rate >= OFTEN)?;
    let (status, _) = beat
        .by_status
        .iter()
        .max_by(|(_, one), (_, other)| one.total_cmp(other))?;
    Some(Finding::new(
        &beat.info,
        (Level::Problem, Kind::Refused),
        format!("is refused {rate:.0} times a second, mostly {status}"),
        format!(
            "see what it asks for: gnttab watch --domain d{} --event refused; what it means: gnttab explain {status}",
            beat.info.id
        ),
    ))
}

fn quotas(beat: &Beat) -> Vec<Finding> {
    let info = &beat.info;
    let consumers = info.says.iter().flat_map(|says| &says.consumers);
    consumers
        .filter_map(|consumer| {
            let quota = consumer.quota?;
            let lately = beat.refused.get(&consumer.name).copied().unwrap_or(0);
            (consumer.used >= quota || lately > 0).then(|| {
                let refused = match consumer.refused {
                    0 => String::new(),
                    1 => ", refused once".to_owned(),
                    times => format!(", refused {times} times"),
                };
                Finding::new(
                    info,
                    (Level::Warning, Kind::Quota),
                    format!(
                        "its consumer {} has {} of its {quota} references{refused}",
                        consumer.name, consumer.used
                    ),
                    format!("raise the quota of {}, or see why it lets none go", consumer.name),
                )
            })
        })
        .collect()
}

/// `1.2 s`, `3:07`, `1:02:03`.
pub(crate) fn age(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) if seconds < 10 => format!("{seconds}.{} s", ms / 100 % 10),
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes}:{seconds:02}"),
        (hours, minutes, seconds) => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pulse::tests::{domain, two_looks};
    use serde_json::{Value, json};

    fn kinds(before: Value, after: Value) -> Vec<(Level, Kind)> {
        let pulse = two_looks(vec![domain(1, "a", before)], vec![domain(1, "a", after)]);
        judge(&pulse)
            .iter()
            .map(|finding| (finding.level, finding.kind))
            .collect()
    }

    fn entries(total: u32, most: u64, free: u32) -> Value {
        json!({ "total": total, "most": most, "free": free, "permit_access": total - free, "sub_page": 0,
            "accept_transfer": 0, "transitive": 0, "withdrawn": 0 })
    }

    fn says(changes: Value) -> Value {
        let mut says = json!({ "age_ms": 1, "refs": [512, 504], "leaked": 0, "consumers": [], "pending_total": 0,
            "pending": [] });
        for (key, value) in changes.as_object().unwrap() {
            says[key] = value.clone();
        }
        says
    }

    #[test]
    fn a_table_is_full_when_only_the_reserved_references_are_left() {
        let of = |entries: Value| kinds(json!({}), json!({ "grant_frames": [1, 1], "entries": entries }));
        assert_eq!(of(entries(512, 512, 8)), [(Level::Problem, Kind::Full)]);
        assert_eq!(of(entries(512, 512, 9)), [(Level::Warning, Kind::NearlyFull)]);
        assert_eq!(of(entries(512, 512, 58)), [(Level::Warning, Kind::NearlyFull)]);
        assert_eq!(of(entries(512, 512, 59)), []);
        // Frames that there may be count as room.
        assert_eq!(of(entries(512, 1024, 8)), []);
        // What the domain has taken and not granted is taken.
        let taken = json!({ "grant_frames": [1, 1], "entries": entries(512, 512, 512),
            "says": says(json!({ "refs": [512, 0] })) });
        assert_eq!(kinds(json!({}), taken), [(Level::Problem, Kind::Full)]);
    }

    #[test]
    fn maptrack_is_full_when_there_are_as_many_mappings_as_handles() {
        let of = |mappings: u32| {
            kinds(
                json!({}),
                json!({ "handles": [256, 256], "maps": { "2": mappings } }),
            )
        };
        assert_eq!(of(256), [(Level::Problem, Kind::Full)]);
        assert_eq!(of(231), [(Level::Warning, Kind::NearlyFull)]);
        assert_eq!(of(230), []);
    }

    #[test]
    fn refusals_are_often_from_ten_a_second_on() {
        let of = |bad: u64| kinds(json!({}), json!({ "statuses": { "okay": 5, "bad_gntref": bad } }));
        assert_eq!(of(10), [(Level::Problem, Kind::Refused)]);
        assert_eq!(of(9), []);
    }

    #[test]
    fn an_end_that_is_pending_for_long_is_stuck_and_names_who_and_what() {
        let pending = |age_ms: u64| {
            json!({ "says": says(json!({ "pending_total": 1,
                "pending": [{ "gref": 8, "peer": 2, "tries": 9, "age_ms": age_ms }] })) })
        };
        assert_eq!(kinds(json!({}), pending(1999)), []);
        let pulse = two_looks(
            vec![],
            vec![
                domain(1, "lender", pending(65_000)),
                domain(2, "keeper", json!({})),
            ],
        );
        let findings = judge(&pulse);
        assert_eq!(findings.len(), 1);
        assert_eq!(
            findings[0].what,
            "wants reference 0x8 back; d2 keeper has kept it for 1:05"
        );
        assert_eq!((findings[0].peer, findings[0].gref), (Some(2), Some(8)));
    }

    #[test]
    fn a_dead_domain_whose_pages_are_used_is_stuck_and_names_the_user() {
        let dead = json!({ "state": "dying", "page_references": 3, "isolated": false, "name": "" });
        let pulse = two_looks(
            vec![],
            vec![
                domain(1, "", dead),
                domain(2, "keeper", json!({ "maps": { "1": 3 } })),
            ],
        );
        let findings = judge(&pulse);
        assert_eq!(findings.len(), 1);
        assert_eq!(
            findings[0].what,
            "is dead, and d2 keeper still uses 3 of its pages"
        );
    }

    #[test]
    fn a_consumer_at_its_quota_is_named() {
        let consumers = |used: u32, refused: u64| {
            json!({ "says": says(json!({ "consumers": [
                { "name": "", "used": 400, "quota": null, "refused": 0 },
                { "name": "vif0", "used": used, "quota": 8, "refused": refused }] })) })
        };
        assert_eq!(kinds(json!({}), consumers(7, 0)), []);
        assert_eq!(kinds(json!({}), consumers(8, 0)), [(Level::Warning, Kind::Quota)]);
        assert_eq!(kinds(consumers(7, 3), consumers(7, 3)), [], "that was long ago");
        assert_eq!(
            kinds(consumers(7, 3), consumers(7, 4)),
            [(Level::Warning, Kind::Quota)]
        );
    }

    #[test]
    fn who_is_stopped_is_named_with_what_lets_it_go_on() {
        let pulse = two_looks(vec![], vec![domain(3, "app", json!({ "stopped": true }))]);
        let findings = judge(&pulse);
        assert_eq!((findings.len(), findings[0].kind), (1, Kind::Stopped));
        assert_eq!(findings[0].next, "let it go on: kill -CONT 103");
    }

    #[test]
    fn ages_are_short() {
        assert_eq!(age(0), "0.0 s");
        assert_eq!(age(9_950), "9.9 s");
        assert_eq!(age(59_999), "59 s");
        assert_eq!(age(187_000), "3:07");
        assert_eq!(age(3_723_000), "1:02:03");
    }
}
