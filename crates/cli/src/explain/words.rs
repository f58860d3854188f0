//! What statuses, errors, operations and flags mean, in plain words, with the usual causes.

use gnttab_abi::{Errno, GrantStatus, Op};

/// What is said about a thing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words {
    /// One or two sentences.
    pub(crate) means: &'static str,
    /// The usual causes, or how it is used; the likeliest first.
    pub(crate) causes: &'static [&'static str],
}

const fn words(means: &'static str, causes: &'static [&'static str]) -> Words {
    Words { means, causes }
}

/// About the status of an item; `None` for a number that the interface does not know.
pub(crate) fn status(status: GrantStatus) -> Option<Words> {
    Some(match status {
        GrantStatus::OKAY => words("The item was done.", &[]),
        GrantStatus::GENERAL_ERROR => words(
            "The item failed for a reason that has no code of its own. Of a map or a copy it mostly means that the entry is not one that the caller may use in this way.",
            &[
                "the entry is free, or granted to another domain: ended too early, or its reference was told before its flags were written",
                "writing was asked for and the grant is read-only",
                "map: the entry is a part of a page (sub_page) or transitive, which only copies can use",
                "map: flags that this kind of guest may not give (device_map, application_map or contains_pte outside a PV guest)",
                "map or unmap: there is no place at host_addr, or another mapping is there",
                "map: another domain has the entry in use, or one domain has it 128 times",
                "copy: the range leaves the part of the page that a sub-page grant gives",
                "setup_table: more frames than the domain's limit (gnttab_max_frames), or no memory for them",
                "transfer: the receiver's entry is not exactly accept_transfer for this domain, or the receiver is full or dying",
            ],
        ),
        GrantStatus::BAD_DOMAIN => words(
            "There is no domain of that number.",
            &[
                "the peer has died, and its number has gone with it",
                "DOMID_SELF where the operation wants a number (map, transfer)",
                "a number from the XenStore that belongs to an earlier life of the peer",
            ],
        ),
        GrantStatus::BAD_GNTREF => words(
            "The reference lies past the granter's table.",
            &[
                "the granter has not set up that much of its table, or switched its version, which halves or doubles what a frame holds",
                "a reference of another domain, or of an earlier connection",
                "map: neither host_map nor device_map was asked for",
                "a reference read from a ring or the XenStore in the wrong width or byte order",
            ],
        ),
        GrantStatus::BAD_HANDLE => words(
            "The caller has no live mapping of that handle.",
            &[
                "unmapped twice: both the host and the device part were gone already",
                "the handle of a map that failed: only okay writes the handle",
                "a handle of another domain: handles are the mapping domain's own",
            ],
        ),
        GrantStatus::BAD_VIRT_ADDR => words(
            "The guest's list of frame numbers could not be written.",
            &["setup_table or get_status_frames with a frame_list that is not mapped, or too short"],
        ),
        GrantStatus::BAD_DEV_ADDR => words(
            "The bus address given to unmap is not that of the mapping.",
            &[
                "dev_bus_addr that the map did not return",
                "a value left in dev_bus_addr for a mapping without device_map: give 0",
            ],
        ),
        GrantStatus::NO_DEVICE_SPACE => words(
            "The I/O MMU has no room. No known version of Xen answers so; a number in the interface.",
            &[],
        ),
        GrantStatus::PERMISSION_DENIED => words(
            "A policy forbids it, or a copy names a frame of somebody else.",
            &[
                "copy: a side by frame whose domain is not DOMID_SELF, not even by the caller's own number",
                "setup_table, query_size, get_status_frames of another domain, by one that does not control it",
                "a security policy (XSM/FLASK) between the two domains",
            ],
        ),
        GrantStatus::BAD_PAGE => words(
            "The frame that the entry or the caller names cannot be used so.",
            &[
                "the entry names a frame that the granter does not have: ballooned out, never populated, or a number of the wrong kind (gfn, mfn)",
                "the entry names a page that the granter itself has by mapping or grant",
                "device memory: only memory can be granted",
                "transfer: the page is still mapped, granted or otherwise referenced; the giver keeps it",
            ],
        ),
        GrantStatus::BAD_COPY_ARG => words(
            "A copy would cross the end of a page.",
            &["offset + len is more than 4096 on one of the sides: split the copy at the page"],
        ),
        GrantStatus::ADDRESS_TOO_BIG => words(
            "The frame's number does not fit the receiver of a transfer, and there was no other to take its place.",
            &["a table of version 1 holds 32-bit frame numbers; the page is freed, and nobody has it"],
        ),
        GrantStatus::EAGAIN => words(
            "Not now: the same request can succeed later.",
            &[
                "the page is paged out or shared by the hypervisor, and is being brought back: wait and retry",
                "swap_grant_ref: one of the two entries is in use",
            ],
        ),
        GrantStatus::NO_SPACE => words(
            "The mapping domain has no handle left: its maptrack table is full.",
            &[
                "mappings that are never unmapped",
                "gnttab_max_maptrack_frames is too low for the domain's backends: 256 handles a frame (see: gnttab plan)",
                "persistent grants of many disks at once",
            ],
        ),
        _ => return None,
    })
}

/// About what a whole hypercall answered.
pub(crate) fn errno(errno: Errno) -> Words {
    match errno {
        Errno::Fault => words(
            "The hypervisor could not read or write the arguments in the guest's memory.",
            &[
                "the array is not mapped, or not in the address space that the ABI allows",
                "map: the item could not be written back; its mapping exists and its handle is lost",
            ],
        ),
        Errno::NoSys => words(
            "The operation does not exist here, for this kind of guest.",
            &[
                "dump_table: no Xen implements it",
                "HVM or PVH: transfer, unmap_and_replace, get_status_frames; x86: cache_flush",
                "set_version 2 where the highest version is 1 (gnttab=max-ver:1, and Arm's default)",
                "an operation number above 12",
            ],
        ),
        Errno::OpNotSupp => words(
            "The operation is switched off.",
            &["transfer: gnttab=no-transfer, a hypervisor without PV guests, or Arm"],
        ),
        Errno::Inval => words(
            "An argument makes no sense, so nothing was tried.",
            &[
                "setup_table, query_size, get_status_frames with a count that is not 1",
                "set_version with a version that is neither 1 nor 2",
                "cache_flush beyond a page, with an unknown bit, or of a page that the caller has not mapped",
            ],
        ),
        Errno::Busy => words(
            "set_version: something is still in use.",
            &[
                "a reference above 7 is mapped or being copied: end access first",
                "back to version 1: the guest still has the status frames mapped",
            ],
        ),
        Errno::Range => words(
            "Back to version 1: a reserved reference (0 to 7) holds what version 1 cannot say.",
            &["a frame of 2^32 or more, or a transitive grant, in a reference below 8"],
        ),
        Errno::Again => words(
            "Back to version 1 while a sub-page or transitive copy is under way: try again.",
            &[],
        ),
        Errno::NoMem => words(
            "The hypervisor has no memory for it.",
            &["set_version 2: the status frames; growing a table: its frames"],
        ),
        Errno::Srch => words("get_version: there is no such domain.", &["the domain has died"]),
        Errno::Perm => words(
            "The caller has no right to that domain or page.",
            &[
                "get_version of another domain, by one that does not control it",
                "cache_flush of a page that nobody owns",
            ],
        ),
        Errno::Acces => words("A security policy (XSM/FLASK) forbids it.", &[]),
        Errno::IlSeq => words(
            "cache_flush was continued with arguments that began nothing.",
            &["bits above the operation's number in the command: they are the hypervisor's"],
        ),
        _ => words("An error of the system, not of the grant-table operations.", &[]),
    }
}

/// About an operation.
pub(crate) fn op(op: Op) -> Words {
    match op {
        Op::MapGrantRef => words(
            "Maps a page that another domain has granted. Each item answers with a handle, by which it is unmapped.",
            &[
                "statuses: bad_domain, bad_gntref, general_error (not granted so), bad_page, no_space (maptrack full), eagain (retry)",
                "the granter cannot take the page back before the unmap",
            ],
        ),
        Op::UnmapGrantRef => words(
            "Undoes a mapping. host_addr and dev_bus_addr say which parts; the handle ends with the last.",
            &[
                "statuses: bad_handle, bad_dev_addr, general_error (nothing of that page at host_addr)",
                "okay with both addresses 0 does nothing: the handle lives on, and the entry stays in use",
            ],
        ),
        Op::SetupTable => words(
            "Tells where a table's frames are, and makes it at least so large. It never becomes smaller.",
            &["statuses: bad_domain, permission_denied, general_error (above the limit), bad_virt_addr"],
        ),
        Op::DumpTable => words(
            "Was meant to print a table. No Xen implements it; the engine here does, as text.",
            &["on Xen: -ENOSYS; the console's debug key g prints the tables"],
        ),
        Op::Transfer => words(
            "Gives a page of the caller away for good, to a domain that waits for it with an accept_transfer entry. PV only.",
            &[
                "once the page has left the caller most failures free it: bad_domain, permission_denied, address_too_big, general_error",
                "only bad_page leaves it with the caller for certain",
            ],
        ),
        Op::Copy => words(
            "The hypervisor copies bytes between two pages, each by reference or a frame of the caller's. Nothing is mapped, nothing stays in use.",
            &[
                "statuses: permission_denied (a frame not by DOMID_SELF), bad_domain, bad_gntref, general_error, bad_page, bad_copy_arg",
                "the only operation that sub-page and transitive grants are for",
            ],
        ),
        Op::QuerySize => words(
            "Asks how many frames a table has, and how many it may have.",
            &["statuses: bad_domain, permission_denied"],
        ),
        Op::UnmapAndReplace => words(
            "Undoes a mapping and puts what is mapped at new_addr in its place, in one step. For PV guests.",
            &["HVM: -ENOSYS; statuses as of unmap_grant_ref"],
        ),
        Op::SetVersion => words(
            "Chooses the layout of the caller's own table, 1 or 2. All entries but the reserved 0 to 7 are wiped.",
            &[
                "-EBUSY while a reference above 7 is in use; -ENOSYS where version 2 is off",
                "grants that nobody uses at that moment are revoked without a word",
            ],
        ),
        Op::GetStatusFrames => words(
            "Tells where the status words of a version 2 table are.",
            &["HVM: -ENOSYS, such guests place them with add_to_physmap; general_error: more than there are"],
        ),
        Op::GetVersion => words(
            "Asks for the layout of a table.",
            &["no status: -ESRCH without such a domain, -EPERM without the right"],
        ),
        Op::SwapGrantRef => words(
            "Exchanges two entries of the caller's own table.",
            &["statuses: bad_gntref, eagain (one is in use)"],
        ),
        Op::CacheFlush => words(
            "Cleans or drops what data caches hold of a page of the caller's, or of one granted to it and in use. Arm.",
            &["no status: the first item that fails ends it: -EINVAL, -EPERM; x86: -ENOSYS"],
        ),
    }
}

/// A flag: its bits, its name without prefix, and what it means.
pub(crate) type Flag = (u32, &'static str, &'static str);

/// Types of an entry, by their two bits.
pub(crate) const ENTRY_TYPES: [Flag; 4] = [
    (0, "invalid", "free: nobody can use it"),
    (1, "permit_access", "a page is granted, for mapping and copying"),
    (
        2,
        "accept_transfer",
        "waits for a page that another domain gives away (PV)",
    ),
    (
        3,
        "transitive",
        "passes on what a third domain has granted; version 2, copies alone",
    ),
];

/// Flags of an entry that grants, and of a status word.
pub(crate) const ENTRY_FLAGS: [Flag; 7] = [
    (
        0x004,
        "readonly",
        "the peer may only read; written by the granter",
    ),
    (
        0x008,
        "reading",
        "a peer has it mapped or is copying; kept by the hypervisor, in version 2 in the status word",
    ),
    (0x010, "writing", "a peer has it for writing; as reading"),
    (0x020, "PWT", "cache attribute (x86, device memory)"),
    (0x040, "PCD", "cache attribute (x86, device memory)"),
    (0x080, "PAT", "cache attribute (x86, device memory)"),
    (
        0x100,
        "sub_page",
        "only a part of the page; version 2, copies alone",
    ),
];

/// The same bits of an entry that waits for a transfer.
pub(crate) const TRANSFER_FLAGS: [Flag; 2] = [
    (
        0x004,
        "transfer_committed",
        "a giver was promised the slot; alone for long: that transfer failed, and the slot is lost",
    ),
    (
        0x008,
        "transfer_completed",
        "the page is here, its frame number is written",
    ),
];

/// Flags of a mapping.
pub(crate) const MAP_FLAGS: [Flag; 6] = [
    (0x01, "device_map", "for devices' DMA; PV only"),
    (0x02, "host_map", "for processors"),
    (
        0x04,
        "readonly",
        "for reading alone; what a read-only grant needs",
    ),
    (0x08, "application_map", "user mode may use it too; PV only"),
    (
        0x10,
        "contains_pte",
        "host_addr is the machine address of a page-table entry; PV only",
    ),
    (
        0x20,
        "can_fail",
        "a flag of Xen 4.5 and before: now unknown, ignored for PV and refused for others",
    ),
];

/// Flags of a copy.
pub(crate) const COPY_FLAGS: [Flag; 2] = [
    (
        1,
        "source_gref",
        "the source is a reference; without it a frame of the caller, by DOMID_SELF",
    ),
    (
        2,
        "dest_gref",
        "the destination is a reference; without it a frame of the caller, by DOMID_SELF",
    ),
];

/// What a cache flush does.
pub(crate) const CACHE_FLAGS: [Flag; 3] = [
    (1, "clean", "write back what was changed"),
    (2, "inval", "drop what is held"),
    (
        0x8000_0000,
        "source_gref",
        "the page by reference; no Xen accepts it",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_the_interface_has_is_explained() {
        for known in GrantStatus::ALL {
            assert!(status(*known).is_some(), "{known}");
        }
        assert!(status(GrantStatus(7)).is_none());
        for known in Errno::ALL {
            assert!(!errno(*known).means.is_empty());
        }
        for known in Op::ALL {
            assert!(!op(known).causes.is_empty());
        }
    }
}
