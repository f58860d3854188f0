//! Keeping a grantee's I/O MMU in step with its mappings (spec 4.6).
//!
//! What must always hold:
//! 1. The right that devices have on a frame is that of the strongest live record that names it; it
//!    changes under the lock that guards the counts (IOM-1).
//! 2. A frame that devices may reach is referenced for that alone (IOM-5). The reference of a host
//!    mapping is its page-table entry's, and a PV guest can overwrite the entry while the record,
//!    and with it the devices' right, stays.

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
    let first = before.right().is_none();
    if first {
        hv.get_frame(mfn).ok_or(HostError)?;
    }
    if after.right() != before.right()
        && let Err(error) = hv.iommu_set(grantee.private(), mfn, after.right())
    {
        if first {
            hv.put_frame(mfn);
        }
        return Err(error);
    }
    uses.insert(mfn, after);
    Ok(())
}

/// Uncounts a record. The count goes down even if the I/O MMU cannot follow (IOM-3); a frame that
/// devices may then still reach stays referenced for ever.
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
        if after.right().is_none() {
            hv.put_frame(mfn);
        }
    }
    Ok(())
}
