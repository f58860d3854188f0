//! Recomputing what must hold (`AUD-*`): books against what they stand for.
//!
//! The machine sees frames, page tables, physmaps and I/O MMUs. How many references the engine
//! should hold beyond them (device mappings, mappings into translated domains, copies on their
//! way) it cannot see: [`Machine::audit`] takes the books for a lower bound, and
//! [`Machine::audit_idle`] for the whole truth, which it is once everything is unmapped;
//! [`Machine::audit_with`] asks the engine.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use gnttab_abi::{DomId, Mfn};

use super::Machine;
use super::frames::{PageOwner, PageType};
use super::p2m::P2mEntry;
use super::state::State;

/// Which rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Audit {
    /// AUD-REF: a frame's references and types are what mappings and ownership justify.
    References,
    /// AUD-P2M: table frames stand where they should; no mapping reaches a frame that is gone.
    Physmap,
    /// AUD-IOM: devices reach only frames that are mapped.
    Iommu,
    /// AUD-MEM: nobody touches what is free.
    Memory,
    /// AUD-PIN: an entry's pins are the live mappings of it.
    Pins,
    /// AUD-FLG: an entry in use is marked so.
    Marks,
    /// AUD-HND: every handle is live or on one free list, none both, none lost.
    Handles,
    /// AUD-LCK: nobody holds a lock, an entry, a record or a table when no operation is under way.
    Locks,
    /// AUD-BUF: only documented OUT fields of a guest's arrays changed, and IN fields were read once.
    Buffers,
    /// AUD-WRK: a call stayed within its budget of steps and stack.
    Work,
}

/// Something that must never be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule.
    pub audit: Audit,
    /// The frame concerned.
    pub mfn: Option<Mfn>,
    /// What was found.
    pub what: String,
}

/// `AUD-REF frame 0x1000: ...`.
impl core::fmt::Display for Violation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self.audit {
            Audit::References => "AUD-REF",
            Audit::Physmap => "AUD-P2M",
            Audit::Iommu => "AUD-IOM",
            Audit::Memory => "AUD-MEM",
            Audit::Pins => "AUD-PIN",
            Audit::Marks => "AUD-FLG",
            Audit::Handles => "AUD-HND",
            Audit::Locks => "AUD-LCK",
            Audit::Buffers => "AUD-BUF",
            Audit::Work => "AUD-WRK",
        })?;
        if let Some(mfn) = self.mfn {
            write!(f, " frame {mfn}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// References and types that something justifies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Justified {
    /// References.
    pub references: u64,
    /// Uses as writable memory.
    pub types: u64,
}

impl Machine {
    /// Everything that is wrong now, whatever the engine is in the middle of. Empty: nothing.
    #[must_use]
    pub fn audit(&self) -> Vec<Violation> {
        self.lock().audit(None)
    }

    /// As [`Machine::audit`], for a moment at which the engine holds no reference but those of
    /// entries in PV page tables.
    #[must_use]
    pub fn audit_idle(&self) -> Vec<Violation> {
        self.audit_against(&BTreeMap::new())
    }

    /// As [`Machine::audit`], for a moment at which the engine holds exactly `claims` beyond
    /// entries in PV page tables.
    #[must_use]
    pub fn audit_against(&self, claims: &BTreeMap<Mfn, Justified>) -> Vec<Violation> {
        self.lock().audit(Some(claims))
    }
}

impl State {
    fn audit(&self, claims: Option<&BTreeMap<Mfn, Justified>>) -> Vec<Violation> {
        let mut found = self.violations.clone();
        self.audit_references(claims, &mut found);
        self.audit_physmaps(&mut found);
        self.audit_iommus(&mut found);
        for (mfn, frame) in self.frames.iter() {
            if frame.info.owner == PageOwner::Free && !frame.is_poisoned() {
                found.push(Violation {
                    audit: Audit::Memory,
                    mfn: Some(mfn),
                    what: String::from("written to while free"),
                });
            }
        }
        found
    }

    /// What the machine itself can account for.
    fn justified(&self) -> BTreeMap<Mfn, Justified> {
        let mut all: BTreeMap<Mfn, Justified> = BTreeMap::new();
        for (mfn, frame) in self.frames.iter() {
            let info = &frame.info;
            let own = u64::from(info.allocated) + u64::from(frame.in_use_as_table) + frame.held;
            all.entry(mfn).or_default().references += own;
        }
        for id in self.domains.keys() {
            for pte in self.present_ptes(*id) {
                let justified = all.entry(pte.mfn()).or_default();
                justified.references += 1;
                justified.types += u64::from(self.entry_holds_type(*id, pte));
            }
            for entry in self.domain(*id).p2m.values() {
                if let P2mEntry::Foreign(mfn) = entry {
                    all.entry(*mfn).or_default().references += 1;
                }
            }
            let rights = self
                .domain(*id)
                .iommu
                .iter()
                .flat_map(|iommu| iommu.rights.keys());
            for mfn in rights {
                all.entry(*mfn).or_default().references += 1;
            }
        }
        all
    }

    fn audit_references(&self, claims: Option<&BTreeMap<Mfn, Justified>>, found: &mut Vec<Violation>) {
        let justified = self.justified();
        for (mfn, frame) in self.frames.iter() {
            if !frame.is_memory() || frame.info.owner == PageOwner::Free {
                continue;
            }
            let mut due = justified.get(&mfn).copied().unwrap_or_default();
            if let Some(claim) = claims.and_then(|claims| claims.get(&mfn)) {
                due.references += claim.references;
                due.types += claim.types;
            }
            let writable = frame.info.page_type == PageType::Writable;
            let has = Justified {
                references: frame.info.references,
                types: if writable { frame.info.type_count } else { 0 },
            };
            let exact = claims.is_some();
            let short = has.references < due.references || has.types < due.types;
            if short || (exact && has != due) {
                let bound = if exact { "exactly" } else { "at least" };
                let what = format!(
                    "{} references and {} writable uses, should be {bound} {} and {}",
                    has.references, has.types, due.references, due.types
                );
                found.push(Violation {
                    audit: Audit::References,
                    mfn: Some(mfn),
                    what,
                });
            }
        }
    }

    fn audit_physmaps(&self, found: &mut Vec<Violation>) {
        let mut places: BTreeMap<Mfn, u32> = BTreeMap::new();
        let mut report = |mfn: Mfn, what: String| {
            found.push(Violation {
                audit: Audit::Physmap,
                mfn: Some(mfn),
                what,
            });
        };
        for (id, domain) in &self.domains {
            for (gfn, entry) in &domain.p2m {
                if let Some(mfn) = entry.own_ram() {
                    if !self.frames.is_owned_by(mfn, *id) {
                        report(
                            mfn,
                            format!("{id} has it as its own at {gfn}, but does not own it"),
                        );
                    }
                    *places.entry(mfn).or_default() += 1;
                }
                if let P2mEntry::Grant(mfn, _) | P2mEntry::Foreign(mfn) = *entry
                    && self.gone(mfn)
                {
                    report(mfn, format!("{id} maps it at {gfn}, but it is free"));
                }
            }
            for pte in self.present_ptes(*id) {
                if self.gone(pte.mfn()) {
                    report(pte.mfn(), format!("a page table of {id} maps it, but it is free"));
                }
            }
        }
        for (mfn, count) in places {
            if count > 1 {
                report(mfn, format!("stands at {count} guest addresses"));
            }
        }
    }

    /// Whether a frame was memory once and is free now.
    fn gone(&self, mfn: Mfn) -> bool {
        self.frames
            .get(mfn)
            .is_none_or(|frame| frame.info.owner == PageOwner::Free)
    }

    fn audit_iommus(&self, found: &mut Vec<Violation>) {
        for (id, domain) in &self.domains {
            let rights = domain.iommu.iter().flat_map(|iommu| iommu.rights.keys());
            for mfn in rights {
                let own = self.frames.is_owned_by(*mfn, *id);
                if own || self.gone(*mfn) {
                    let what = format!("devices of {id} may reach it by grant, {}", Self::why(own));
                    found.push(Violation {
                        audit: Audit::Iommu,
                        mfn: Some(*mfn),
                        what,
                    });
                }
            }
        }
    }

    const fn why(own: bool) -> &'static str {
        if own {
            "but it is the domain's own"
        } else {
            "but it is free"
        }
    }

    /// For a domain that goes: its frames must be on their way out too.
    pub(super) fn check_forgotten(&mut self, domain: DomId) {
        let left = self.frames_of(domain);
        if left != 0 {
            let what = format!("{domain} was forgotten while others use {left} of its frames");
            self.violation(Audit::References, None, what);
        }
    }
}
