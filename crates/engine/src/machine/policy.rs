//! Who may do what to whom (spec 3.2): the plain policy, SILO, and answers a test chooses.

use alloc::sync::Arc;

use gnttab_abi::{DomId, Errno, MapFlags};

use super::state::State;

/// A question that the engine asks the policy. The first domain is the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Check {
    /// Map a grant of the second domain with these flags.
    Map(DomId, DomId, MapFlags),
    /// Unmap a grant of the second domain.
    Unmap(DomId, DomId),
    /// Copy from the second domain to the third.
    Copy(DomId, DomId, DomId),
    /// Transfer a page to the second domain.
    Transfer(DomId, DomId),
    /// Learn the frames of the second domain's table, or make it larger.
    Setup(DomId, DomId),
    /// Learn size or version of the second domain's table.
    Query(DomId, DomId),
}

/// A rule in front of the base policy; `None`: let the base policy answer.
pub(super) type Rule = Arc<dyn Fn(&Check) -> Option<bool> + Send + Sync>;

/// Which of Xen's policies answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BasePolicy {
    /// Everything but other domains' tables.
    #[default]
    Plain,
    /// As plain, but only with control domains.
    Silo,
}

pub(super) struct Policy {
    pub(super) base: BasePolicy,
    pub(super) rule: Option<Rule>,
    pub(super) query_errno: Errno,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            base: BasePolicy::Plain,
            rule: None,
            query_errno: Errno::Perm,
        }
    }
}

impl State {
    pub(super) fn base_allows(&self, check: &Check) -> bool {
        let control = |id: DomId| self.domain(id).control;
        match *check {
            Check::Map(a, b, _) | Check::Transfer(a, b) => {
                self.policy.base == BasePolicy::Plain || a == b || control(a) || control(b)
            }
            Check::Copy(caller, a, b) => {
                let plain = self.policy.base == BasePolicy::Plain;
                plain || a == b || control(caller) || control(a) || control(b)
            }
            Check::Unmap(..) => true,
            Check::Setup(caller, target) | Check::Query(caller, target) => {
                caller == target || control(caller) || self.domain(caller).targets.contains(&target)
            }
        }
    }
}
