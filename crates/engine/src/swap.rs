//! `swap_grant_ref` (spec 3.12).
//!
//! The checks, in order: both references in the table; the same one twice; neither in use. The
//! exchange is made with the table to itself.

use gnttab_abi::{GrantRef, GrantStatus, Op, SwapGrantRef};

use crate::domain::Vcpu;
use crate::engine::Processor;
use crate::hypervisor::Hypervisor;
use crate::table::SharedEntry;

impl<H: Hypervisor> Processor<'_, H> {
    /// Exchanges entries of the caller's own table, pair after pair. Every item's `status` is
    /// written.
    pub fn swap(&mut self, vcpu: &Vcpu<H>, items: &mut [SwapGrantRef]) {
        for item in items {
            item.status = self.swap_item(vcpu, item.ref_a, item.ref_b);
        }
    }

    pub(crate) fn swap_item(&mut self, vcpu: &Vcpu<H>, ref_a: GrantRef, ref_b: GrantRef) -> GrantStatus {
        let status = self
            .swap_one(vcpu, ref_a, ref_b)
            .err()
            .unwrap_or(GrantStatus::OKAY);
        vcpu.caller()
            .answer(&self.engine.hv, Op::SwapGrantRef, None, Some(ref_a), status);
        status
    }

    fn swap_one(&mut self, vcpu: &Vcpu<H>, ref_a: GrantRef, ref_b: GrantRef) -> Result<(), GrantStatus> {
        let domain = &*vcpu.domain;
        let _excluded = self.engine.registry.exclude(domain);
        let view = domain.table.view();
        // 1, 2
        let a = view.shared(ref_a).ok_or(GrantStatus::BAD_GNTREF)?;
        let b = view.shared(ref_b).ok_or(GrantStatus::BAD_GNTREF)?;
        // 3
        if ref_a == ref_b {
            return Ok(());
        }
        // 4, 5
        if view.state(ref_a).is_pinned() || view.state(ref_b).is_pinned() {
            return Err(GrantStatus::EAGAIN);
        }
        // 6
        match (a, b) {
            (SharedEntry::V1(a), SharedEntry::V1(b)) => {
                let (of_a, of_b) = (a.load(), b.load());
                a.store(of_b);
                b.store(of_a);
            }
            (SharedEntry::V2(a), SharedEntry::V2(b)) => {
                let (of_a, of_b) = ((a.load(), a.load_status()), (b.load(), b.load_status()));
                a.store(of_b.0);
                a.store_status(of_b.1);
                b.store(of_a.0);
                b.store_status(of_a.1);
            }
            // One table has one version.
            _ => return Err(GrantStatus::GENERAL_ERROR),
        }
        Ok(())
    }
}
