//! What the engine asks of a hypervisor, and what it is answered, as values.

use core::fmt;

use gnttab_abi::{CacheOp, DomId, Errno, Gfn, MapFlags, Mfn};

use crate::hypervisor::{Access, FrameOwner, Hook, HostMapping, HostUnmapping, Resolved};

/// One call of [`Hypervisor`](crate::Hypervisor), named as its method, with what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "each variant and field is documented at the method of its name"
)]
pub enum Request {
    Resolve {
        domain: DomId,
        gfn: Gfn,
        access: Access,
    },
    GetFrame(Mfn),
    PutFrame(Mfn),
    GetWritable(Mfn),
    PutWritable(Mfn),
    Copy {
        source: (Mfn, u16),
        dest: (Mfn, u16),
        len: u16,
    },
    MarkDirty {
        granter: DomId,
        mfn: Mfn,
    },
    MapHost {
        grantee: DomId,
        mapping: HostMapping,
    },
    UnmapHost {
        grantee: DomId,
        unmapping: HostUnmapping,
    },
    Flush {
        grantee: DomId,
    },
    Crash {
        domain: DomId,
        why: &'static str,
    },
    IsHeld {
        domain: DomId,
    },
    AllocTablePage {
        domain: DomId,
    },
    TablePageMfn {
        page: Mfn,
    },
    TablePageGfn {
        domain: DomId,
        page: Mfn,
    },
    RetractTablePage {
        domain: DomId,
        page: Mfn,
    },
    RestoreTablePage {
        domain: DomId,
        page: Mfn,
    },
    RenewTablePage {
        domain: DomId,
        page: Mfn,
    },
    PlaceTablePage {
        domain: DomId,
        page: Mfn,
        gfn: Gfn,
    },
    MapForeign {
        caller: DomId,
        gfn: Gfn,
        mfn: Mfn,
    },
    IsControl {
        domain: DomId,
    },
    IsDeviceModelOf {
        caller: DomId,
        target: DomId,
    },
    MayMap {
        caller: DomId,
        granter: DomId,
        flags: MapFlags,
    },
    MayUnmap {
        caller: DomId,
        granter: DomId,
    },
    MayCopy {
        caller: DomId,
        source: DomId,
        dest: DomId,
    },
    MayTransfer {
        caller: DomId,
        receiver: DomId,
    },
    MaySetup {
        caller: DomId,
        target: DomId,
    },
    MayQuery {
        caller: DomId,
        target: DomId,
    },
    QueryErrno,
    MayGrantIo {
        granter: DomId,
        mfn: Mfn,
    },
    IommuFollows {
        grantee: DomId,
    },
    IommuSet {
        grantee: DomId,
        mfn: Mfn,
        access: Option<Access>,
    },
    CacheFlush {
        mfn: Mfn,
        offset: u16,
        length: u16,
        op: CacheOp,
    },
    FrameOwner(Mfn),
    Steal {
        from: DomId,
        mfn: Mfn,
    },
    FreeStolen(Mfn),
    ReplaceStolen {
        mfn: Mfn,
        receiver: DomId,
    },
    Fits {
        receiver: DomId,
        mfn: Mfn,
    },
    Reserve {
        receiver: DomId,
    },
    Unreserve {
        receiver: DomId,
    },
    Assign {
        receiver: DomId,
        mfn: Mfn,
    },
    Install {
        receiver: DomId,
        mfn: Mfn,
        gfn: Gfn,
    },
    Now,
    Hook(Hook),
}

/// What a [`Request`] was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done, where nothing else was asked for.
    Done,
    /// Yes.
    Yes,
    /// No.
    No,
    /// A frame and its owner.
    Resolved(Resolved),
    /// A frame's owner.
    Owner(FrameOwner),
    /// A frame's owner, if a domain owns it.
    Domain(Option<DomId>),
    /// A frame.
    Frame(Mfn),
    /// A guest frame.
    Gfn(Gfn),
    /// A time in nanoseconds.
    Time(u64),
    /// It failed, with an errno.
    Errno(Errno),
    /// It failed, for this reason.
    Failed(&'static str),
}

fn access_word(access: Access) -> &'static str {
    match access {
        Access::Read => "ro",
        Access::Write => "rw",
    }
}

/// `map_host d2 0x40000000 frame 0x1004 of d1 host_map`: the method, who, what.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Request::Resolve { domain, gfn, access } => {
                write!(f, "resolve {domain} gfn {gfn} {}", access_word(access))
            }
            Request::GetFrame(mfn) => write!(f, "get_frame {mfn}"),
            Request::PutFrame(mfn) => write!(f, "put_frame {mfn}"),
            Request::GetWritable(mfn) => write!(f, "get_writable {mfn}"),
            Request::PutWritable(mfn) => write!(f, "put_writable {mfn}"),
            Request::Copy { source, dest, len } => {
                let ((from, at), (to, into)) = (source, dest);
                write!(f, "copy {from}+{at} to {to}+{into}, {len} bytes")
            }
            Request::MarkDirty { granter, mfn } => write!(f, "mark_dirty {granter} {mfn}"),
            Request::MapHost { grantee, mapping } => {
                let HostMapping {
                    addr,
                    mfn,
                    flags,
                    cache: _,
                    granter,
                } = mapping;
                write!(f, "map_host {grantee} {addr:#x} frame {mfn} of {granter} {flags}")
            }
            Request::UnmapHost { grantee, unmapping } => {
                let HostUnmapping {
                    addr,
                    new_addr,
                    mfn,
                    flags,
                } = unmapping;
                write!(f, "unmap_host {grantee} {addr:#x} frame {mfn} {flags}")?;
                if new_addr != 0 {
                    write!(f, " replaced by {new_addr:#x}")?;
                }
                Ok(())
            }
            Request::Flush { grantee } => write!(f, "flush {grantee}"),
            Request::Crash { domain, why } => write!(f, "crash {domain}: {why}"),
            Request::IsHeld { domain } => write!(f, "is_held {domain}"),
            Request::AllocTablePage { domain } => write!(f, "alloc_table_page {domain}"),
            Request::TablePageMfn { page } => write!(f, "table_page_mfn {page}"),
            Request::TablePageGfn { domain, page } => write!(f, "table_page_gfn {domain} {page}"),
            Request::RetractTablePage { domain, page } => write!(f, "retract_table_page {domain} {page}"),
            Request::RestoreTablePage { domain, page } => write!(f, "restore_table_page {domain} {page}"),
            Request::RenewTablePage { domain, page } => write!(f, "renew_table_page {domain} {page}"),
            Request::PlaceTablePage { domain, page, gfn } => {
                write!(f, "place_table_page {domain} {page} at gfn {gfn}")
            }
            Request::MapForeign { caller, gfn, mfn } => {
                write!(f, "map_foreign {caller} {mfn} at gfn {gfn}")
            }
            Request::IsControl { domain } => write!(f, "is_control {domain}"),
            Request::IsDeviceModelOf { caller, target } => write!(f, "is_device_model_of {caller} {target}"),
            Request::MayMap {
                caller,
                granter,
                flags,
            } => write!(f, "may_map {caller} {granter} {flags}"),
            Request::MayUnmap { caller, granter } => write!(f, "may_unmap {caller} {granter}"),
            Request::MayCopy { caller, source, dest } => write!(f, "may_copy {caller} {source} {dest}"),
            Request::MayTransfer { caller, receiver } => write!(f, "may_transfer {caller} {receiver}"),
            Request::MaySetup { caller, target } => write!(f, "may_setup {caller} {target}"),
            Request::MayQuery { caller, target } => write!(f, "may_query {caller} {target}"),
            Request::QueryErrno => f.write_str("query_errno"),
            Request::MayGrantIo { granter, mfn } => write!(f, "may_grant_io {granter} {mfn}"),
            Request::IommuFollows { grantee } => write!(f, "iommu_follows {grantee}"),
            Request::IommuSet { grantee, mfn, access } => {
                write!(
                    f,
                    "iommu_set {grantee} {mfn} {}",
                    access.map_or("none", access_word)
                )
            }
            Request::CacheFlush {
                mfn,
                offset,
                length,
                op,
            } => {
                write!(f, "cache_flush {mfn}+{offset} {length} bytes {op}")
            }
            Request::FrameOwner(mfn) => write!(f, "frame_owner {mfn}"),
            Request::Steal { from, mfn } => write!(f, "steal {from} {mfn}"),
            Request::FreeStolen(mfn) => write!(f, "free_stolen {mfn}"),
            Request::ReplaceStolen { mfn, receiver } => write!(f, "replace_stolen {mfn} for {receiver}"),
            Request::Fits { receiver, mfn } => write!(f, "fits {receiver} {mfn}"),
            Request::Reserve { receiver } => write!(f, "reserve {receiver}"),
            Request::Unreserve { receiver } => write!(f, "unreserve {receiver}"),
            Request::Assign { receiver, mfn } => write!(f, "assign {receiver} {mfn}"),
            Request::Install { receiver, mfn, gfn } => write!(f, "install {receiver} {mfn} at gfn {gfn}"),
            Request::Now => f.write_str("now"),
            Request::Hook(hook) => write!(f, "hook {hook:?}"),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Answer::Done => f.write_str("done"),
            Answer::Yes => f.write_str("yes"),
            Answer::No => f.write_str("no"),
            Answer::Resolved(Resolved { mfn, owner }) => {
                write!(f, "frame {mfn} of ")?;
                Answer::Owner(owner).fmt(f)
            }
            Answer::Owner(FrameOwner::Domain(id)) => write!(f, "{id}"),
            Answer::Owner(FrameOwner::CopyOnWrite) => f.write_str("copy-on-write"),
            Answer::Owner(FrameOwner::Io) => f.write_str("I/O"),
            Answer::Domain(Some(id)) => write!(f, "{id}"),
            Answer::Domain(None) => f.write_str("nobody"),
            Answer::Frame(mfn) => write!(f, "frame {mfn}"),
            Answer::Gfn(gfn) => write!(f, "gfn {gfn}"),
            Answer::Time(now) => write!(f, "{now} ns"),
            Answer::Errno(errno) => write!(f, "{errno}"),
            Answer::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}
