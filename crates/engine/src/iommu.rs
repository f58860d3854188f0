//! Keeping a grantee's I/O MMU in step with its mappings (spec 4.6).
//!
//! What must always hold: the right that devices have on a frame is that of the strongest live
//! record that names it; it changes under the lock that guards the counts (IOM-1).

use gnttab_abi::Mfn;

use crate::domain::{Domain, IommuUse};
use crate::hypervisor::{Access, HostError, Hypervisor};

impl IommuUse {
    fn right(self) -> Option<Access> {
        match (self.writable, self.readonly) {
            (0, 0) => None,
            (0, _) => Some(Access::Read),
            _ => Some(Access::Write),
        }
    }

    fn count(&mut self, access: Access) -> &mut u32 {
        match access {
            Access::Read => &mut self.readonly,
            Access::Write => &mut self.writable,
        }
    }
}

/// The largest count: 31 bits, as in the reference.
const MOST: u32 = i32::MAX.cast_unsigned();

/// Counts a new record. On failure nothing has changed.
pub(crate) fn add<H: Hypervisor>(
    hv: &H,
    grantee: &Domain<H>,
    mfn: Mfn,
    access: Access,
) -> Result<(), HostError> {
    let mut uses = grantee.iommu.lock();
    let before = uses.get(&mfn).copied().unwrap_or_default();
    let mut after = before;
    let count = after.count(access);
    if *count == MOST {
        return Err(HostError);
    }
    *count += 1;
    if after.right() != before.right() {
        hv.iommu_set(grantee.private(), mfn, after.right())?;
    }
    uses.insert(mfn, after);
    Ok(())
}

/// Uncounts a record. The count goes down even if the I/O MMU cannot follow (IOM-3).
pub(crate) fn remove<H: Hypervisor>(
    hv: &H,
    grantee: &Domain<H>,
    mfn: Mfn,
    access: Access,
) -> Result<(), HostError> {
    let mut uses = grantee.iommu.lock();
    let Some(before) = uses.get(&mfn).copied() else {
        return Ok(());
    };
    let mut after = before;
    let count = after.count(access);
    *count = count.saturating_sub(1);
    if after.right().is_none() {
        uses.remove(&mfn);
    } else {
        uses.insert(mfn, after);
    }
    if after.right() != before.right() {
        hv.iommu_set(grantee.private(), mfn, after.right())?;
    }
    Ok(())
}
