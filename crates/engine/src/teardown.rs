//! The end of a domain, as grantee and as granter (spec 7.2 to 7.5).
//!
//! In this order: [`Engine::begin_teardown`]; no vCPU of the domain acts any more;
//! [`Processor::release_mappings`] until it is done; the hypervisor gives up the domain's memory;
//! [`Engine::retire`]. A domain whose frames others still use stays findable, with its table. It goes
//! by itself with the last use of an entry; where references outlive uses ([`Hypervisor::is_held`]:
//! the page tables of a dead PV grantee, say), with the call of `retire` after the last of them.

use alloc::vec::Vec;

use gnttab_abi::{DomId, GrantHandle, GrantRef};

use crate::domain::{Domain, Vcpu};
use crate::engine::{Engine, Processor};
use crate::hypervisor::{Hook, Hypervisor};
use crate::observe::EntryView;
use crate::sync::Ordering;

/// How far the release of a dead domain's mappings got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// All of them are gone; so many were live this time.
    Done {
        /// Mappings released by this call.
        released: u32,
    },
    /// The budget is used up: call again.
    More {
        /// Mappings released by this call.
        released: u32,
    },
    /// The domain is not dying, or one of its vCPUs is still held.
    StillRunning,
}

/// What a soft reset finds in use (spec 7.4). It revokes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// The first entries in use, ten at most.
    pub entries: Vec<EntryView>,
    /// All entries in use.
    pub total: u32,
}

/// Entries that a soft reset names one by one.
const NAMED: usize = 10;

/// What became of a domain that was retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retired {
    /// Its number is free again.
    Gone,
    /// Entries of its table, or its frames, are still in use. It goes when the last use ends, or
    /// when this is called after the last reference has gone.
    Held,
    /// There is no such domain, or it is not dying.
    NotDying,
}

impl<H: Hypervisor> Engine<H> {
    /// Marks a domain as dying: it gains no new pages, pins or handles (TDN-3).
    pub fn begin_teardown(&self, domain: &Domain<H>) {
        domain.set_dying();
    }

    /// Lets a dying domain go, if nobody uses its entries.
    pub fn retire(&self, id: DomId) -> Retired {
        let Some(domain) = self.registry.find(id) else {
            return Retired::NotDying;
        };
        if !domain.is_dying() {
            return Retired::NotDying;
        }
        domain.retire.store(true, Ordering::SeqCst);
        if self.try_remove(&domain) {
            Retired::Gone
        } else {
            Retired::Held
        }
    }

    /// Called where a use of a dying domain's entry has ended, its reference included.
    pub(crate) fn reap(&self, id: DomId) {
        let Some(domain) = self.registry.find(id) else {
            return;
        };
        if domain.retire.load(Ordering::SeqCst) {
            self.try_remove(&domain);
        }
    }

    /// Removes a domain from the list if, with its table to itself, no entry is in use.
    fn try_remove(&self, domain: &Domain<H>) -> bool {
        // The gate stays shut until the domain is out of the list: no use can begin in between.
        let _excluded = self.registry.exclude(domain);
        let used = domain.table.is_used_from(GrantRef(0)) || self.hv.is_held(domain.private());
        !used && self.registry.remove(domain).is_some()
    }
}

impl<H: Hypervisor> Processor<'_, H> {
    /// A domain is reset softly: table, version, pins and its own mappings stay (spec 7.4). Says
    /// what of its table is in use, for the log; `None`: no such domain.
    pub fn soft_reset(&mut self, dom: DomId) -> Option<InUse> {
        let mut found = InUse {
            entries: Vec::new(),
            total: 0,
        };
        self.enter(dom)?;
        for gref in 0..u32::MAX {
            let Some(entry) = self.entry(dom, GrantRef(gref)) else {
                break;
            };
            if entry.pins.any() {
                found.total += 1;
                if found.entries.len() < NAMED {
                    found.entries.push(entry);
                }
            }
        }
        Some(found)
    }

    /// Releases mappings of a dying domain, from the highest handle down, at most `budget` records
    /// looked at (spec 7.2). The caller has taken every vCPU of the domain, so that none of its
    /// calls is under way.
    pub fn release_mappings(&mut self, vcpus: &[Vcpu<H>], budget: u32) -> Release {
        let Some(vcpu) = vcpus.first() else {
            return Release::StillRunning;
        };
        let domain = &vcpu.domain;
        let all = vcpus.iter().all(|v| core::ptr::eq(&*v.domain, &**domain));
        if !domain.is_dying() || !all || vcpus.len() != domain.vcpus.len() {
            return Release::StillRunning;
        }
        let mut released = 0;
        let limit = domain.maptrack.limit();
        let start = domain.teardown_at.load(Ordering::Relaxed).min(limit);
        let stop = start.saturating_sub(budget);
        for handle in (stop..start).rev() {
            released += u32::from(self.forget_mapping(vcpu, GrantHandle(handle)));
            self.engine.hv.hook(Hook::Teardown);
        }
        domain.teardown_at.store(stop, Ordering::Relaxed);
        if stop == 0 {
            Release::Done { released }
        } else {
            Release::More { released }
        }
    }
}

#[cfg(feature = "machine")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Config, Limits};
    use crate::hypervisor::DomainKind;
    use crate::machine::Machine;

    #[test]
    fn who_reaps_too_late_leaves_the_next_domain_of_that_number_alone() {
        let machine = Machine::new();
        let engine = Engine::new(machine.clone(), Config::default());
        let create = |guest| {
            let guest = machine.add_domain(DomId(guest), DomainKind::Pv).unwrap();
            engine.create_domain(DomId(5), DomainKind::Pv, Limits::default(), guest)
        };
        let old = create(1).unwrap();
        engine.begin_teardown(&old);
        assert_eq!(engine.retire(DomId(5)), Retired::Gone);
        let new = create(2).unwrap();
        assert!(!engine.try_remove(&old));
        assert!(core::ptr::eq(&*engine.domain(DomId(5)).unwrap(), &*new));
    }
}
