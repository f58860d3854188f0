//! `set_version` and `get_version` (spec 3.9, 3.11).
//!
//! A change is made with the table to itself: it pays for the readers' freedom. The checks, in
//! order: a known version; one that the domain may have; not the one in force; no entry but the
//! reserved ones in use; memory; going back, no copy that depends on version 2, reserved entries
//! that fit, status frames that nobody holds.

use gnttab_abi::{DomId, EntryFlags, EntryHead, EntryType, EntryV1, EntryV2, Errno, GrantRef, Op};

use crate::domain::{Domain, Vcpu, Version};
use crate::engine::Processor;
use crate::hypervisor::{Hook, Hypervisor};
use crate::pages::NR_RESERVED_ENTRIES;
use crate::sync::Ordering;
use crate::table::SharedEntry;

impl<H: Hypervisor> Processor<'_, H> {
    /// Changes the version of the caller's own table. What the guest is told is
    /// [`Domain::version`] afterwards, on success and on failure.
    ///
    /// # Errors
    /// The hypercall's result: `Inval`, `NoSys`, `Busy`, `NoMem`, `Again`, `Range`; the old
    /// version stays in force.
    pub fn set_version(&mut self, vcpu: &Vcpu<H>, version: u32) -> Result<(), Errno> {
        vcpu.counters().operation(Op::SetVersion);
        let engine = self.engine;
        let domain = &*vcpu.domain;
        // 2, 3
        let version = Version::from_number(version).ok_or(Errno::Inval)?;
        if version > domain.limits().version {
            return Err(Errno::NoSys);
        }
        let _admin = domain.table.admin.lock();
        // 4
        if version == domain.table.version() {
            return Ok(());
        }
        let _excluded = engine.registry.exclude(domain);
        // 5
        if domain.table.is_used_from(GrantRef(NR_RESERVED_ENTRIES)) {
            return Err(Errno::Busy);
        }
        let hv = &engine.hv;
        match version {
            Version::V2 => to_v2(hv, domain),
            Version::V1 => to_v1(hv, domain),
        }
    }

    /// The version of a domain's table, or of the caller's own.
    ///
    /// # Errors
    /// `Srch`: no such domain; `Perm` (or the policy's errno): not permitted.
    pub fn get_version(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<Version, Errno> {
        vcpu.counters().operation(Op::GetVersion);
        let engine = self.engine;
        let caller = &vcpu.domain;
        if dom == DomId::SELF || dom == caller.id() {
            return Ok(caller.table.version());
        }
        let target = self.enter(dom).ok_or(Errno::Srch)?;
        if !engine.hv.may_query(caller.private(), target.private()) {
            return Err(engine.hv.query_errno());
        }
        Ok(target.table.version())
    }
}

impl<H: Hypervisor> Domain<H> {
    /// The version of its table now.
    #[must_use]
    pub fn version(&self) -> Version {
        self.table.version()
    }
}

type Reserved<T> = [T; NR_RESERVED_ENTRIES as usize];

/// Reads the reserved entries as `read` has them.
fn reserved<H: Hypervisor, T: Copy>(
    domain: &Domain<H>,
    empty: T,
    read: impl Fn(&SharedEntry<'_>) -> T,
) -> Reserved<T> {
    let view = domain.table.view();
    let mut all = [empty; NR_RESERVED_ENTRIES as usize];
    for (entry, gref) in all.iter_mut().zip(0..) {
        *entry = view.shared(GrantRef(gref)).map_or(empty, |shared| read(&shared));
    }
    all
}

/// Zeroes every shared page, and the status pages in use (steps 6 and 9).
fn clear<H: Hypervisor>(domain: &Domain<H>) {
    let table = &domain.table;
    (0..table.nr_frames())
        .filter_map(|i| table.shared_page(i))
        .for_each(|p| p.as_ref().clear());
    (0..table.nr_status())
        .filter_map(|i| table.status_page(i))
        .for_each(|p| p.as_ref().clear());
}

/// From version 1, with the table to itself (steps 6 to 11).
fn to_v2<H: Hypervisor>(hv: &H, domain: &Domain<H>) -> Result<(), Errno> {
    let table = &domain.table;
    let frames = table.nr_frames();
    table
        .make_status(hv, domain.private(), frames)
        .map_err(|_| Errno::NoMem)?;
    hv.hook(Hook::VersionChecked);
    let kept = reserved(domain, EntryV1::default(), |entry| match entry {
        SharedEntry::V1(entry) => entry.load(),
        SharedEntry::V2(_) => EntryV1::default(),
    });
    table.set_version(Version::V2);
    clear(domain);
    for index in 0..table.nr_status() {
        if let Some(page) = table.status_page(index) {
            hv.renew_table_page(domain.private(), page);
        }
    }
    let view = table.view();
    for (old, gref) in kept.iter().zip(0..) {
        if let Some(SharedEntry::V2(shared)) = view.shared(GrantRef(gref)) {
            let flags = old.head.flags.difference(EntryFlags::IN_USE);
            let head = EntryHead {
                flags,
                domid: old.head.domid,
            };
            shared.store_status(old.head.flags & EntryFlags::IN_USE);
            shared.store(EntryV2 {
                head,
                half: 0,
                length: 0,
                frame: u64::from(old.frame),
            });
        }
    }
    Ok(())
}

/// Back to version 1, with the table to itself (steps 6a to 11).
fn to_v1<H: Hypervisor>(hv: &H, domain: &Domain<H>) -> Result<(), Errno> {
    let table = &domain.table;
    if table.v2_ops.load(Ordering::SeqCst) != 0 {
        return Err(Errno::Again);
    }
    let kept = reserved(domain, Ok(EntryV1::default()), |entry| match entry {
        SharedEntry::V2(entry) => narrowed(entry.load(), entry.load_status()),
        SharedEntry::V1(entry) => Ok(entry.load()),
    });
    if kept.iter().any(Result::is_err) {
        return Err(Errno::Range);
    }
    hv.hook(Hook::VersionChecked);
    retract_status(hv, domain)?;
    table.set_version(Version::V1);
    clear(domain);
    let view = table.view();
    for (entry, gref) in kept.iter().zip(0..) {
        if let (Some(SharedEntry::V1(shared)), Ok(entry)) = (view.shared(GrantRef(gref)), entry) {
            shared.store(*entry);
        }
    }
    Ok(())
}

/// A reserved entry in version 1's format (steps 6b and 7); one that does not fit is an error.
fn narrowed(entry: EntryV2, status: EntryFlags) -> Result<EntryV1, Errno> {
    match entry.head.flags.kind() {
        EntryType::Transitive => Err(Errno::Range),
        EntryType::PermitAccess => {
            let frame = u32::try_from(entry.frame).map_err(|_| Errno::Range)?;
            let head = EntryHead {
                flags: entry.head.flags | status,
                domid: entry.head.domid,
            };
            Ok(EntryV1 { head, frame })
        }
        EntryType::Invalid | EntryType::AcceptTransfer => Ok(EntryV1::default()),
    }
}

/// Step 8: takes every status page back, or none (VER-2).
fn retract_status<H: Hypervisor>(hv: &H, domain: &Domain<H>) -> Result<(), Errno> {
    let table = &domain.table;
    for index in 0..table.nr_status() {
        let Some(page) = table.status_page(index) else {
            continue;
        };
        if hv.retract_table_page(domain.private(), page) {
            continue;
        }
        for earlier in (0..index).filter_map(|i| table.status_page(i)) {
            hv.restore_table_page(domain.private(), earlier);
        }
        if domain.kind().is_translated() {
            hv.crash(domain.private(), "a status frame is still in use");
        }
        return Err(Errno::Busy);
    }
    Ok(())
}

/// Shared and status pages of a table, for embedders that map them and for observers.
impl<H: Hypervisor> Domain<H> {
    /// Frame `index` of its table, if it has that many.
    #[must_use]
    pub fn shared_frame(&self, index: u32) -> Option<&H::TablePage> {
        self.table.shared_page(index)
    }

    /// Status frame `index`, if its version has status frames and that many.
    #[must_use]
    pub fn status_frame(&self, index: u32) -> Option<&H::TablePage> {
        self.table.status_page(index)
    }

    /// Frames that its table has, and status frames.
    #[must_use]
    pub fn frames(&self) -> (u32, u32) {
        (self.table.nr_frames(), self.table.nr_status())
    }
}
