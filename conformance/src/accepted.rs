//! The differences from a real Xen that are accepted, as `docs/differences.json` lists them;
//! `docs/differences.md` says the same in words.

use gnttab_engine::Reference;
use serde::{Deserialize, Serialize};

use crate::rig::reference_name;
use crate::session::Difference;

/// The list.
#[derive(Debug, Deserialize)]
pub(crate) struct Accepted {
    /// What the list's form is.
    pub(crate) version: u32,
    pub(crate) differences: Vec<Entry>,
}

/// One accepted difference.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// Its name, as the text has it.
    pub(crate) id: String,
    /// In a line.
    pub(crate) why: String,
    /// The versions of Xen that differ so.
    pub(crate) xen: Vec<String>,
    /// Random programs do not ask what this decides.
    #[serde(default)]
    pub(crate) left_out: bool,
    /// Rows of the specification's appendix to which this Xen gives another answer.
    #[serde(default)]
    pub(crate) vectors: Vec<String>,
    /// What a program's first difference looks like.
    #[serde(default)]
    pub(crate) script: Option<Pattern>,
}

/// What is compared of a program's first difference; what is not there fits everything.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pattern {
    /// The operation of the step, as `set_version`.
    #[serde(default)]
    pub(crate) operation: Option<String>,
    /// What was seen differently, as `status`.
    #[serde(default)]
    pub(crate) what: Option<String>,
    #[serde(default)]
    pub(crate) xen: Option<u64>,
    #[serde(default)]
    pub(crate) engine: Option<u64>,
}

impl Pattern {
    fn fits(&self, found: &Difference) -> bool {
        let step = found.program.get(found.step).map_or("", String::as_str);
        let operation = step.split_whitespace().next().unwrap_or_default();
        let what = found.what.split_whitespace().next().unwrap_or_default();
        self.operation.as_deref().is_none_or(|wanted| wanted == operation)
            && self.what.as_deref().is_none_or(|wanted| wanted == what)
            && self.xen.is_none_or(|wanted| found.xen == Some(wanted))
            && self.engine.is_none_or(|wanted| found.engine == Some(wanted))
    }
}

impl Accepted {
    /// The list that was there when this was built.
    pub(crate) fn read() -> Result<Accepted, serde_json::Error> {
        let list: Accepted = serde_json::from_str(include_str!("../../docs/differences.json"))?;
        if list.version != 1 {
            let what = format!("version {} of a list of which this reads version 1", list.version);
            return Err(serde::de::Error::custom(what));
        }
        Ok(list)
    }

    fn of(&self, reference: Reference) -> impl Iterator<Item = &Entry> {
        let name = reference_name(reference);
        self.differences
            .iter()
            .filter(move |entry| entry.xen.iter().any(|xen| xen == name))
    }

    /// The entry that a row's other answer falls under.
    pub(crate) fn of_vector(&self, row: &str, reference: Reference) -> Option<&Entry> {
        self.of(reference)
            .find(|entry| entry.vectors.iter().any(|listed| listed == row))
    }

    /// The entry that a program's difference falls under.
    pub(crate) fn of_script(&self, found: &Difference, reference: Reference) -> Option<&Entry> {
        self.of(reference)
            .find(|entry| entry.script.as_ref().is_some_and(|pattern| pattern.fits(found)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const TEXT: &str = include_str!("../../docs/differences.md");

    /// The list and the text know the same differences, and the text names each row of the list.
    #[test]
    fn the_list_and_the_text_agree() {
        let list = Accepted::read().expect("it is JSON");
        assert_eq!(list.version, 1);
        let listed: BTreeSet<&str> = list.differences.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(listed.len(), list.differences.len(), "no name twice");
        let told: BTreeSet<&str> = TEXT
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
            .filter(|id| id.starts_with("X-"))
            .collect();
        assert_eq!(listed, told);
        for entry in &list.differences {
            let lines: Vec<&str> = TEXT
                .lines()
                .filter(|line| line.starts_with(&format!("| {} |", entry.id)))
                .collect();
            for row in &entry.vectors {
                assert!(
                    lines.iter().any(|line| line.contains(row)),
                    "{} does not name {row}",
                    entry.id
                );
            }
            assert!(!entry.xen.is_empty() && !entry.why.is_empty(), "{}", entry.id);
        }
    }

    /// A difference is listed only where everything that its entry says fits.
    #[test]
    fn only_what_fits_is_accepted() {
        let found = Difference {
            script: 0,
            frames: [1, 1],
            program: vec!["copy at Area(0, 0) { .. }".to_owned()],
            step: 0,
            what: "status 0".to_owned(),
            xen: Some(0),
            engine: Some(1),
            listed: None,
        };
        let list = |pattern: &str| -> Accepted {
            let text = format!(
                r#"{{"version": 1, "differences": [{{"id": "X-0", "why": "a test", "xen": ["4.17"], "script": {pattern}}}]}}"#
            );
            serde_json::from_str(&text).expect("JSON")
        };
        let fitting = list(r#"{"operation": "copy", "what": "status", "xen": 0, "engine": 1}"#);
        assert!(fitting.of_script(&found, Reference::V4_17).is_some());
        assert!(
            fitting.of_script(&found, Reference::V4_20).is_none(),
            "another Xen"
        );
        for other in [
            r#"{"operation": "swap_grant_ref"}"#,
            r#"{"what": "result"}"#,
            r#"{"xen": 1}"#,
            r#"{"engine": 0}"#,
        ] {
            assert!(
                list(other).of_script(&found, Reference::V4_17).is_none(),
                "{other}"
            );
        }
    }
}
