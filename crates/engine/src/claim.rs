//! Claiming a shared entry and giving it back (spec 4.1 and 4.3).
//!
//! Both run with the entry's `busy` held (see `active`), so that no mark set by a new user can be
//! cleared by an old one.

use gnttab_abi::{DomId, EntryFlags, EntryHead, EntryType};

use crate::active::State;
use crate::hypervisor::{Access, Hook, Hypervisor};
use crate::shared::{SharedV1, SharedV2};
use crate::table::SharedEntry;

/// What an entry must be for a use to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// Permit access to the whole page: a mapping needs it.
    Whole,
    /// Permit access, perhaps to a part: a copy takes either.
    Permit,
    /// Pass another domain's grant on.
    Transitive,
}

impl Wanted {
    /// Whether flags have the type that is wanted (the "type mask" of spec 4.1).
    #[inline]
    fn accepts(self, flags: EntryFlags, version2: bool) -> bool {
        match self {
            Wanted::Whole => flags.kind() == EntryType::PermitAccess && !flags.contains(EntryFlags::SUB_PAGE),
            Wanted::Permit => flags.kind() == EntryType::PermitAccess,
            Wanted::Transitive => version2 && flags.kind() == EntryType::Transitive,
        }
    }
}

/// The shared entry did not allow the use; it carries no mark of the attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refused;

/// Compare-and-swaps before a granter that keeps interfering is given up on (spec 4.1.1 step 6).
const ATTEMPTS: u32 = 5;

/// Marks the shared entry for a use by `user`. Runs when the entry is unpinned, or pinned without
/// write pins while writing is wanted; `pinned` tells which. Returns the head that was judged.
#[inline(always)]
pub(crate) fn begin_use<H: Hypervisor>(
    hv: &H,
    entry: &SharedEntry<'_>,
    pinned: bool,
    user: DomId,
    access: Access,
    wanted: Wanted,
) -> Result<EntryHead, Refused> {
    match entry {
        SharedEntry::V1(entry) => begin_v1(hv, entry, pinned, user, access, wanted),
        SharedEntry::V2(entry) => begin_v2(hv, entry, pinned, user, access, wanted),
    }
}

#[inline(always)]
fn begin_v1<H: Hypervisor>(
    hv: &H,
    entry: &SharedV1<'_>,
    pinned: bool,
    user: DomId,
    access: Access,
    wanted: Wanted,
) -> Result<EntryHead, Refused> {
    let mut head = entry.load_head();
    for _ in 0..ATTEMPTS {
        if !(pinned || wanted.accepts(head.flags, false) && head.domid == user) {
            return Err(Refused);
        }
        let mut marked = head;
        marked.flags |= EntryFlags::READING;
        if access == Access::Write {
            if head.flags.contains(EntryFlags::READONLY) {
                return Err(Refused);
            }
            marked.flags |= EntryFlags::WRITING;
        }
        hv.hook(Hook::ClaimLoaded);
        match entry.swap_head(head, marked) {
            Ok(()) => return Ok(head),
            Err(found) => head = found,
        }
    }
    Err(Refused)
}

#[inline(always)]
fn begin_v2<H: Hypervisor>(
    hv: &H,
    entry: &SharedV2<'_>,
    pinned: bool,
    user: DomId,
    access: Access,
    wanted: Wanted,
) -> Result<EntryHead, Refused> {
    let suits = |head: EntryHead| pinned || (wanted.accepts(head.flags, true) && head.domid == user);
    let read_only = |head: EntryHead| access == Access::Write && head.flags.contains(EntryFlags::READONLY);

    let head = entry.load_head();
    if !suits(head) || read_only(head) {
        return Err(Refused);
    }
    let mark = match access {
        Access::Read => EntryFlags::READING,
        Access::Write => EntryFlags::IN_USE,
    };
    let head = entry.mark_then_load_head(mark, || hv.hook(Hook::ClaimMarked));
    if !suits(head) || read_only(head) {
        let undo = if pinned {
            EntryFlags::WRITING
        } else {
            EntryFlags::IN_USE
        };
        entry.clear_status(undo);
        return Err(Refused);
    }
    Ok(head)
}

/// The marks that a use leaves to be cleared when it ends with `left` in force (spec 4.3 step 1), if any.
#[inline(always)]
pub(crate) fn marks_to_clear(left: State, ended: Access) -> Option<EntryFlags> {
    let writes = ended == Access::Write && !left.is_write_pinned();
    match (left.is_pinned(), writes) {
        (true, false) => None,
        (true, true) => Some(EntryFlags::WRITING),
        (false, false) => Some(EntryFlags::READING),
        (false, true) => Some(EntryFlags::IN_USE),
    }
}

/// Gives the shared entry back after a use, or an attempt, that wanted `ended` (spec 4.3).
#[inline(always)]
pub(crate) fn end_use(entry: &SharedEntry<'_>, left: State, ended: Access) {
    if let Some(marks) = marks_to_clear(left, ended) {
        clear_marks(entry, marks);
    }
}

/// Clears marks, with the entry held.
#[inline(always)]
pub(crate) fn clear_marks(entry: &SharedEntry<'_>, marks: EntryFlags) {
    match entry {
        SharedEntry::V1(entry) => entry.clear_flags(marks),
        SharedEntry::V2(entry) => entry.clear_status(marks),
    }
}
