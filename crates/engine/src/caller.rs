//! Who makes a call, with what is looked up once for all its items.

use gnttab_abi::{DomId, GrantRef, GrantStatus, Op};

use crate::domain::{Counters, Domain, Vcpu};
use crate::hypervisor::Hypervisor;
use crate::maptrack::Handles;
use crate::observe::Answered;

/// A vCPU on its way through the items of a call.
pub(crate) struct Caller<'v, H: Hypervisor> {
    pub(crate) domain: &'v Domain<H>,
    pub(crate) handles: Handles<'v>,
    counters: &'v Counters,
}

impl<H: Hypervisor> Vcpu<H> {
    #[inline]
    pub(crate) fn caller(&self) -> Caller<'_, H> {
        let domain = &*self.domain;
        Caller {
            domain,
            handles: domain.maptrack.handles(self.number),
            counters: self.counters(),
        }
    }
}

impl<H: Hypervisor> Caller<'_, H> {
    /// Counts an item of an operation and its answer, and tells the hypervisor of it.
    #[inline(always)]
    pub(crate) fn answer(
        &self,
        hv: &H,
        operation: Op,
        peer: Option<DomId>,
        gref: Option<GrantRef>,
        status: GrantStatus,
    ) {
        self.counters.operation(operation);
        self.counters.status(status);
        hv.answered(&Answered {
            caller: self.domain.id(),
            operation,
            peer,
            gref,
            status,
        });
    }
}
