//! What an observer can see, without stopping anybody.
//!
//! Everything here is read from atomics while the machine runs: each number is true at some
//! instant, not all at the same one. Nothing here is judged by or written back.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use gnttab_abi::{
    DomId, EntryFlags, EntryType, EntryV1, EntryV2, GrantHandle, GrantRef, GrantStatus, MapFlags, Mfn, Op,
};

use crate::active::PinCounts;
use crate::domain::{Domain, Version};
use crate::engine::Processor;
use crate::hypervisor::{DomainKind, Hypervisor};
use crate::maptrack::age;
use crate::table::SharedEntry;

/// A shared entry as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryWords {
    /// Version 1.
    V1(EntryV1),
    /// Version 2 and its status word.
    V2(EntryV2, EntryFlags),
}

impl EntryWords {
    /// Type and flags; in version 2 with the status word's busy bits.
    #[must_use]
    pub fn flags(&self) -> EntryFlags {
        match self {
            EntryWords::V1(entry) => entry.head.flags,
            EntryWords::V2(entry, status) => entry.head.flags | (*status & EntryFlags::IN_USE),
        }
    }

    /// The domain that the entry names.
    #[must_use]
    pub fn domid(&self) -> DomId {
        match self {
            EntryWords::V1(entry) => entry.head.domid,
            EntryWords::V2(entry, _) => entry.head.domid,
        }
    }
}

/// One entry: what the guest wrote and what the engine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryView {
    /// Its reference.
    pub gref: GrantRef,
    /// The shared words.
    pub words: EntryWords,
    /// Its users.
    pub pins: PinCounts,
    /// The domain that uses it, while it is in use.
    pub user: Option<DomId>,
    /// The frame in use, while it is in use.
    pub mfn: Option<Mfn>,
}

/// One mapping that a domain holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingView {
    /// Its handle.
    pub handle: GrantHandle,
    /// The granter.
    pub granter: DomId,
    /// The reference in the granter's table.
    pub gref: GrantRef,
    /// Kinds, and whether it is read-only.
    pub flags: MapFlags,
    /// When it was made, in the hypervisor's clock ([`Hypervisor::now`]), nanoseconds: to within 17 ms, and
    /// in a clock that comes round after 2.3 years. [`MappingView::age`] reckons with both.
    pub born: u64,
}

impl MappingView {
    /// How long it has been there at the moment `now` of the hypervisor's clock, in nanoseconds, to within
    /// 17 ms.
    #[must_use]
    pub fn age(&self, now: u64) -> u64 {
        age(self.born, now)
    }
}

/// One item of an operation, as it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The domain that asked.
    pub caller: DomId,
    /// For what.
    pub operation: Op,
    /// The other domain, as far as it is known: a map's or an unmap's granter, whom a copy's grant is of, whom a
    /// transfer is to, whose table is asked about.
    pub peer: Option<DomId>,
    /// The reference in the other domain's table (of [`Op::SwapGrantRef`]: in the caller's own), as far as it is known.
    pub gref: Option<GrantRef>,
    /// The answer.
    pub status: GrantStatus,
}

/// Entries of a table by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryCounts {
    /// Free.
    pub invalid: u32,
    /// Granted, whole pages.
    pub permit_access: u32,
    /// Granted, parts of pages.
    pub sub_page: u32,
    /// Waiting for, or done with, a transfer.
    pub accept_transfer: u32,
    /// Passing another domain's grant on.
    pub transitive: u32,
    /// In use by somebody, whatever the type says now.
    pub in_use: u32,
    /// Of these, those whose type says free: withdrawn, and still in use.
    pub withdrawn: u32,
}

/// A domain as an observer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainView {
    /// Its number.
    pub id: DomId,
    /// Its kind.
    pub kind: DomainKind,
    /// Whether its death has begun.
    pub dying: bool,
    /// The version of its table.
    pub version: Version,
    /// Frames of its table.
    pub frames: u32,
    /// Frames that the table may have.
    pub max_frames: u32,
    /// Status frames.
    pub status_frames: u32,
    /// Entries by state.
    pub entries: EntryCounts,
    /// Pins on its entries, by domain that holds them.
    pub pinned_by: BTreeMap<DomId, u32>,
    /// Mappings it holds itself, by granter.
    pub maps: BTreeMap<DomId, u32>,
    /// Handles that exist, live and free.
    pub handles: u32,
    /// Handles that may exist.
    pub max_handles: u64,
    /// The age of its oldest live mapping, in nanoseconds, to within 17 ms.
    pub oldest_mapping: Option<u64>,
    /// Calls of each operation by its vCPUs, items counted one by one.
    pub operations: Vec<(Op, u64)>,
    /// Statuses that it was given; get_version, set_version and cache_flush have none.
    pub statuses: Vec<(GrantStatus, u64)>,
    /// Bytes of private memory that the engine spends on its entries and mappings.
    pub private_bytes: usize,
}

impl<H: Hypervisor> Domain<H> {
    /// Live mappings that this domain holds, by handle.
    pub fn mappings(&self) -> impl Iterator<Item = MappingView> + '_ {
        (0..self.maptrack.limit()).map(GrantHandle).filter_map(|handle| {
            let (record, born) = self.maptrack.look_with_birth(handle)?;
            let (granter, gref, flags) = (record.granter, record.gref, record.flags);
            Some(MappingView {
                handle,
                granter,
                gref,
                flags,
                born,
            })
        })
    }
}

impl<H: Hypervisor> Processor<'_, H> {
    /// One entry of a domain's table; `None` past the table, or if there is no such domain.
    pub fn entry(&mut self, dom: DomId, gref: GrantRef) -> Option<EntryView> {
        let domain = self.enter(dom)?;
        let view = domain.table.view();
        let words = match view.shared(gref)? {
            SharedEntry::V1(shared) => EntryWords::V1(shared.load()),
            SharedEntry::V2(shared) => EntryWords::V2(shared.load(), shared.load_status()),
        };
        let used = view
            .entry(gref)
            .map(|entry| (entry.active.peek(), entry.active.mfn()));
        let (state, mfn) = used.unwrap_or_default();
        let pins = state.counts();
        let user = pins.any().then(|| state.grantee());
        let mfn = pins.any().then_some(mfn);
        Some(EntryView {
            gref,
            words,
            pins,
            user,
            mfn,
        })
    }

    /// Everything about a domain that an observer asks for; `None`: no such domain. Looks at each
    /// entry and each handle once; the table is left between entries, so nobody waits for this.
    pub fn observe(&mut self, dom: DomId) -> Option<DomainView> {
        let domain = self.hold(dom)?;
        let mut entries = EntryCounts::default();
        let mut pinned_by = BTreeMap::new();
        let last = u32::MAX;
        for gref in 0..last {
            let Some(entry) = self.entry(dom, GrantRef(gref)) else {
                break;
            };
            let flags = entry.words.flags();
            let place = match flags.kind() {
                EntryType::Invalid => &mut entries.invalid,
                EntryType::PermitAccess if flags.contains(EntryFlags::SUB_PAGE) => &mut entries.sub_page,
                EntryType::PermitAccess => &mut entries.permit_access,
                EntryType::AcceptTransfer => &mut entries.accept_transfer,
                EntryType::Transitive => &mut entries.transitive,
            };
            *place += 1;
            if let Some(user) = entry.user {
                entries.in_use += 1;
                entries.withdrawn += u32::from(flags.kind() == EntryType::Invalid);
                let PinCounts {
                    host_write,
                    host_read,
                    device_write,
                    device_read,
                } = entry.pins;
                let pins = [host_write, host_read, device_write, device_read];
                *pinned_by.entry(user).or_default() += pins.into_iter().map(u32::from).sum::<u32>();
            }
        }
        let mut maps = BTreeMap::new();
        let mut oldest_mapping = None::<u64>;
        let now = self.engine.hv.now();
        for mapping in domain.mappings() {
            *maps.entry(mapping.granter).or_default() += 1;
            oldest_mapping = oldest_mapping.max(Some(mapping.age(now)));
        }
        let mut operations = [0; Op::ALL.len()];
        let mut statuses = [0; GrantStatus::ALL.len()];
        for vcpu in &domain.vcpus {
            vcpu.counters.add_to(&mut operations, &mut statuses);
        }
        let (frames, status_frames) = domain.frames();
        Some(DomainView {
            id: domain.id(),
            kind: domain.kind(),
            dying: domain.is_dying(),
            version: domain.version(),
            frames,
            max_frames: domain.max_grant_frames(),
            status_frames,
            entries,
            pinned_by,
            maps,
            handles: domain.maptrack.limit(),
            max_handles: u64::from(domain.maptrack.max_pages()) * 256,
            oldest_mapping,
            operations: Op::ALL.into_iter().zip(operations).collect(),
            statuses: GrantStatus::ALL.iter().copied().zip(statuses).collect(),
            private_bytes: domain.table.bytes() + domain.maptrack.bytes(),
        })
    }
}
