//! A machine as it was seen, look after look: what its counters say happens in a second.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use gnttab_host::monitor::DomainInfo;

/// Looks that are remembered.
pub(crate) const HISTORY: usize = 60;

/// A domain, as last seen.
#[derive(Debug, Clone)]
pub(crate) struct Beat {
    /// Everything that is known of it.
    pub(crate) info: DomainInfo,
    /// Operations a second, since the look before; `None` at the first.
    pub(crate) operations: Option<f64>,
    /// Errors a second, since the look before.
    pub(crate) errors: Option<f64>,
    /// Errors a second, by status, where any.
    pub(crate) by_status: BTreeMap<String, f64>,
    /// Operations a second at earlier looks, newest last.
    pub(crate) history: VecDeque<f64>,
    /// How often consumers were refused references since the look before, by name.
    pub(crate) refused: BTreeMap<String, u64>,
    /// For how many looks entries have been withdrawn and still in use.
    pub(crate) withdrawn_for: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    domains: BTreeMap<u16, Beat>,
    at: Option<Instant>,
}

/// The status of what succeeded.
const OKAY: &str = "okay";

fn errors(info: &DomainInfo) -> impl Iterator<Item = (&String, u64)> {
    info.statuses
        .iter()
        .filter(|(status, _)| *status != OKAY)
        .map(|(status, count)| (status, *count))
}

/// Mappings that a domain holds.
pub(crate) fn mappings(info: &DomainInfo) -> u64 {
    info.maps.values().copied().map(u64::from).sum()
}

/// Pins on a domain's entries.
pub(crate) fn pins(info: &DomainInfo) -> u64 {
    info.pinned_by.values().copied().map(u64::from).sum()
}

impl Pulse {
    /// Takes in what was seen at a moment.
    pub(crate) fn take(&mut self, now: Instant, domains: Vec<DomainInfo>) {
        let seconds = self
            .at
            .replace(now)
            .map(|before| now.saturating_duration_since(before).as_secs_f64().max(0.001));
        let before = std::mem::take(&mut self.domains);
        for info in domains {
            let id = info.id;
            // Another domain of the same number has other counters.
            let known = before.get(&id).filter(|beat| beat.info.pid == info.pid);
            self.domains.insert(id, beat(known, seconds, info));
        }
    }

    /// The domains, by number.
    pub(crate) fn domains(&self) -> impl Iterator<Item = &Beat> {
        self.domains.values()
    }

    /// One of them.
    pub(crate) fn domain(&self, id: u16) -> Option<&Beat> {
        self.domains.get(&id)
    }

    /// `d2 app`, or the number alone.
    pub(crate) fn name(&self, id: u16) -> String {
        match self.domains.get(&id) {
            Some(beat) if !beat.info.name.is_empty() => format!("d{id} {}", beat.info.name),
            _ => format!("d{id}"),
        }
    }
}

fn beat(known: Option<&Beat>, seconds: Option<f64>, info: DomainInfo) -> Beat {
    let a_second = |count: u64| seconds.map(|seconds| count as f64 / seconds);
    let since = |now: u64, before: Option<u64>| now.saturating_sub(before.unwrap_or(now));
    // Whatever the machine says its counters are.
    let sum = |info: &DomainInfo| {
        info.operations
            .values()
            .fold(0_u64, |sum, count| sum.saturating_add(*count))
    };
    let operations = sum(&info);
    let before = known.map(|beat| sum(&beat.info));
    let rate = known.and(a_second(since(operations, before)));
    let by_status: BTreeMap<String, f64> = errors(&info)
        .filter_map(|(status, count)| {
            let before = known.map(|beat| beat.info.statuses.get(status).copied().unwrap_or(0));
            Some((status.clone(), a_second(since(count, before))?))
        })
        .filter(|(_, rate)| *rate > 0.0)
        .collect();
    let mut history = known.map(|beat| beat.history.clone()).unwrap_or_default();
    history.extend(rate);
    while history.len() > HISTORY {
        history.pop_front();
    }
    let consumers = |info: &DomainInfo| -> BTreeMap<String, u64> {
        let all = info.says.iter().flat_map(|says| &says.consumers);
        all.map(|consumer| (consumer.name.clone(), consumer.refused))
            .collect()
    };
    let refused_before = known.map(|beat| consumers(&beat.info)).unwrap_or_default();
    let refused = consumers(&info)
        .into_iter()
        .map(|(name, count)| {
            let before = refused_before.get(&name).copied();
            (name, since(count, before))
        })
        .collect();
    let withdrawn_for = match info.entries.withdrawn {
        0 => 0,
        _ => 1 + known.map_or(0, |beat| beat.withdrawn_for),
    };
    Beat {
        operations: rate,
        errors: rate.map(|_| by_status.values().fold(0.0, |sum, rate| sum + rate)),
        by_status,
        history,
        refused,
        withdrawn_for,
        info,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use serde_json::json;

    /// A domain of which nothing is to be said, with some keys changed.
    pub(crate) fn domain(id: u16, name: &str, changes: serde_json::Value) -> DomainInfo {
        let mut info = json!({
            "id": id, "name": name, "state": "running", "pid": 100 + u32::from(id), "age_ms": 5000, "isolated": true,
            "isolation": null, "shareable_pages": 0, "page_references": 0, "version": 1, "grant_frames": [1, 64],
            "granted": 0, "in_use": 0,
            "entries": { "total": 512, "most": 32768, "free": 512, "permit_access": 0, "sub_page": 0,
                "accept_transfer": 0, "transitive": 0, "withdrawn": 0 },
            "pinned_by": {}, "maps": {}, "handles": [256, 262_144], "oldest_mapping_ms": null,
            "operations": {}, "statuses": {}, "ports": [],
        });
        for (key, value) in changes.as_object().unwrap() {
            info[key] = value.clone();
        }
        serde_json::from_value(info).unwrap()
    }

    /// Two looks, a second apart.
    pub(crate) fn two_looks(before: Vec<DomainInfo>, after: Vec<DomainInfo>) -> Pulse {
        let (mut pulse, now) = (Pulse::default(), Instant::now());
        pulse.take(now, before);
        pulse.take(now + Duration::from_secs(1), after);
        pulse
    }

    #[test]
    fn rates_are_differences_and_a_new_domain_of_the_same_number_starts_anew() {
        let counted = |maps: u64, okay: u64, bad: u64| {
            let changes = json!({
                "operations": { "map_grant_ref": maps }, "statuses": { "okay": okay, "bad_gntref": bad },
            });
            domain(1, "a", changes)
        };
        let mut pulse = two_looks(vec![counted(10, 8, 2)], vec![counted(40, 28, 12)]);
        let beat = pulse.domain(1).unwrap();
        assert_eq!((beat.operations, beat.errors), (Some(30.0), Some(10.0)));
        assert_eq!(beat.by_status["bad_gntref"], 10.0);
        let mut other = counted(5, 5, 0);
        other.pid = Some(7);
        pulse.take(Instant::now() + Duration::from_secs(2), vec![other]);
        assert_eq!(pulse.domain(1).unwrap().operations, None);
        assert_eq!(pulse.name(1), "d1 a");
        assert_eq!(pulse.name(9), "d9");
    }
}
