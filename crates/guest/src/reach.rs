//! Ways to make the frames of the own table reachable, for implementations of
//! [`Granter::reach`](crate::Granter::reach) (spec guest-driver 2.3).

use core::ops::Range;

use gnttab_abi::{
    ADD_TO_PHYSMAP_STATUS_BIT, AddToPhysmap, DomId, Errno, GetStatusFrames, Gfn, GrantStatus,
    PHYSMAP_SPACE_GRANT_TABLE, SetupTable,
};

use crate::{Call, FrameKind, Hypercall};

/// Frames of the table could not be made reachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReachError {
    /// The hypercall failed as a whole.
    #[error("the hypercall that gives access to grant-table frames answered {0}")]
    Call(#[from] Errno),
    /// The operation failed.
    #[error("the operation that gives access to grant-table frames answered {0}")]
    Status(#[from] GrantStatus),
    /// This program has no address left to place a frame at.
    #[error("no address left for frame {0} of the grant table")]
    NoRoom(u32),
    /// The platform made the frame reachable but does not say where it lies.
    #[error("the platform gave no address for frame {0} of the grant table")]
    NoAddress(u32),
}

/// The memory operations with which an auto-translated guest places these frames, in the order
/// in which to make them: from the last to the first, so that the table grows once.
///
/// The first failure ends it: the range is then not reachable.
///
/// ```
/// use gnttab_abi::{AddToPhysmap, Errno, Gfn};
/// use gnttab_guest::{FrameKind, reach};
///
/// # fn memory_op(_: AddToPhysmap) -> Result<(), Errno> { Ok(()) }
/// for place in reach::physmap(FrameKind::Shared, 1..4, |index| Gfn(0xf_0000 + u64::from(index))) {
///     memory_op(place)?;
/// }
/// # Ok::<(), Errno>(())
/// ```
pub fn physmap(
    kind: FrameKind,
    frames: Range<u32>,
    gfn_of: impl Fn(u32) -> Gfn,
) -> impl Iterator<Item = AddToPhysmap> {
    let space_bit = match kind {
        FrameKind::Shared => 0,
        FrameKind::Status => ADD_TO_PHYSMAP_STATUS_BIT,
    };
    frames.rev().map(move |index| AddToPhysmap {
        domid: DomId::SELF,
        size: 0,
        space: PHYSMAP_SPACE_GRANT_TABLE,
        idx: u64::from(index) | space_bit,
        gpfn: gfn_of(index).0,
    })
}

/// Asks for the numbers of the first `frames.len()` shared frames, which enlarges the table to so
/// many. For PV these are machine frames; an auto-translated guest learns where they lie already.
///
/// # Errors
/// [`ReachError`] with what the hypercall or the operation answered.
pub fn setup_table(x: &impl Hypercall, frames: &mut [u64]) -> Result<(), ReachError> {
    let nr_frames = u32::try_from(frames.len()).map_err(|_| Errno::Inval)?;
    let status = GrantStatus::GENERAL_ERROR;
    let mut arg = SetupTable {
        dom: DomId::SELF,
        nr_frames,
        status,
        frame_list: 0,
    };
    x.grant_table_op(Call::SetupTable {
        arg: &mut arg,
        frames,
    })?;
    Ok(arg.status.result()?)
}

/// Asks for the machine frames of the first `frames.len()` status frames. PV only.
///
/// # Errors
/// [`ReachError`] with what the hypercall or the operation answered.
pub fn status_frames(x: &impl Hypercall, frames: &mut [u64]) -> Result<(), ReachError> {
    let nr_frames = u32::try_from(frames.len()).map_err(|_| Errno::Inval)?;
    let status = GrantStatus::GENERAL_ERROR;
    let mut arg = GetStatusFrames {
        nr_frames,
        dom: DomId::SELF,
        status,
        frame_list: 0,
    };
    x.grant_table_op(Call::GetStatusFrames {
        arg: &mut arg,
        frames,
    })?;
    Ok(arg.status.result()?)
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn frames_are_placed_from_the_last_to_the_first() {
        let places: Vec<_> = physmap(FrameKind::Shared, 2..5, |i| Gfn(100 + u64::from(i)))
            .map(|place| (place.idx, place.gpfn))
            .collect();
        assert_eq!(places, [(4, 104), (3, 103), (2, 102)]);
    }

    #[test]
    fn status_frames_carry_their_bit() {
        let place = physmap(FrameKind::Status, 1..2, |_| Gfn(7)).next().unwrap();
        assert_eq!(place.idx, 0x8000_0001);
        assert_eq!((place.domid, place.space), (DomId::SELF, 1));
    }
}
