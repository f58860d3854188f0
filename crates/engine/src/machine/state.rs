//! The whole state of the machine, behind its one lock, and the steps that concern frames and
//! their owners' accounts.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use gnttab_abi::{CacheOp, DomId, Gfn, Mfn};

use super::audit::{Audit, Violation};
use super::frames::{Frames, PageOwner, PageType};
use super::p2m::P2mEntry;
use super::policy::Policy;
use super::pv::L2Slot;
use crate::domain::Reference;
use crate::hypervisor::{Access, DomainKind};
use crate::shared::PageWords;

/// What the machine keeps for one domain.
pub(super) struct DomainState {
    pub(super) kind: DomainKind,
    /// Runs in 32-bit mode.
    pub(super) narrow: bool,
    pub(super) control: bool,
    pub(super) dying: bool,
    pub(super) crashes: Vec<&'static str>,
    /// Domains that it is the device model of.
    pub(super) targets: BTreeSet<DomId>,
    /// Pages on its account, special ones not among them.
    pub(super) pages: u64,
    pub(super) max_pages: u64,
    /// A PV domain takes only frames below this number.
    pub(super) frame_limit: u64,
    pub(super) io_frames: BTreeSet<Mfn>,
    pub(super) dirty: BTreeSet<Mfn>,
    pub(super) flushes: u64,
    /// Frames that a translation not yet flushed may reach.
    pub(super) stale: Vec<Mfn>,
    /// PV: by number of the 2 MiB range.
    pub(super) tables: BTreeMap<u64, L2Slot>,
    /// Translated: what each gfn stands for; a gfn that is not in it is a hole.
    pub(super) p2m: BTreeMap<Gfn, P2mEntry>,
    /// Translated: the domain's own page tables, by page number, where they differ from "every
    /// address is its guest physical one". `None`: not mapped.
    pub(super) own_tables: BTreeMap<u64, Option<(Gfn, Access)>>,
    /// Where table pages were that were taken out of the physmap on trial.
    pub(super) retracted: BTreeMap<Mfn, Gfn>,
    /// Populate-on-demand pages not yet populated.
    pub(super) outstanding: u64,
    pub(super) iommu: Option<Iommu>,
}

/// A domain's I/O MMU, as far as it holds other domains' frames.
#[derive(Default)]
pub(super) struct Iommu {
    pub(super) rights: BTreeMap<Mfn, Access>,
    pub(super) failing: bool,
}

impl DomainState {
    pub(super) fn new(kind: DomainKind) -> DomainState {
        DomainState {
            kind,
            narrow: false,
            control: false,
            dying: false,
            crashes: Vec::new(),
            targets: BTreeSet::new(),
            pages: 0,
            max_pages: u64::MAX,
            frame_limit: u64::MAX,
            io_frames: BTreeSet::new(),
            dirty: BTreeSet::new(),
            flushes: 0,
            stale: Vec::new(),
            tables: BTreeMap::new(),
            p2m: BTreeMap::new(),
            own_tables: BTreeMap::new(),
            retracted: BTreeMap::new(),
            outstanding: 0,
            iommu: None,
        }
    }

    pub(super) fn iommu_fails(&self) -> bool {
        self.iommu.as_ref().is_some_and(|iommu| iommu.failing)
    }
}

/// One maintenance of data caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheFlushed {
    /// The frame.
    pub mfn: Mfn,
    /// First byte in it.
    pub offset: u16,
    /// Bytes, 1 to 4096.
    pub length: u16,
    /// What was done.
    pub op: CacheOp,
}

pub(super) struct State {
    pub(super) frames: Frames,
    pub(super) domains: BTreeMap<DomId, DomainState>,
    pub(super) reference: Reference,
    pub(super) policy: Policy,
    /// No memory for anything new.
    pub(super) shortage: bool,
    /// No memory below 2^32.
    pub(super) low_shortage: bool,
    pub(super) cache_flushes: Vec<CacheFlushed>,
    /// What was printed.
    pub(super) console: String,
    /// Misuse seen as it happened.
    pub(super) violations: Vec<Violation>,
}

impl State {
    pub(super) fn new(reference: Reference) -> State {
        State {
            frames: Frames::default(),
            domains: BTreeMap::new(),
            reference,
            policy: Policy::default(),
            shortage: false,
            low_shortage: false,
            cache_flushes: Vec::new(),
            console: String::new(),
            violations: Vec::new(),
        }
    }

    /// A domain's state. It is there for as long as a [`Guest`](super::Guest) of that number is,
    /// and nobody else asks.
    pub(super) fn domain(&self, id: DomId) -> &DomainState {
        &self.domains[&id]
    }

    pub(super) fn domain_mut(&mut self, id: DomId) -> &mut DomainState {
        self.domains
            .get_mut(&id)
            .expect("a domain's state lives as long as its Guest")
    }

    pub(super) fn is_external(&self, id: DomId) -> bool {
        self.domains
            .get(&id)
            .is_some_and(|domain| domain.kind.is_external())
    }

    pub(super) fn violation(&mut self, audit: Audit, mfn: Option<Mfn>, what: String) {
        self.violations.push(Violation { audit, mfn, what });
    }

    // --- references and types -----------------------------------------------------------------

    /// Drops a reference; the last one frees the frame.
    pub(super) fn put(&mut self, mfn: Mfn) {
        let Some(frame) = self.frames.get_mut(mfn) else {
            self.violation(
                Audit::References,
                Some(mfn),
                String::from("a reference was dropped on no frame"),
            );
            return;
        };
        if !frame.is_memory() {
            return;
        }
        match frame.info.references {
            0 => self.violation(
                Audit::References,
                Some(mfn),
                String::from("a reference was dropped that nobody held"),
            ),
            1 => self.free(mfn),
            _ => frame.info.references -= 1,
        }
    }

    /// Frees a frame and takes it off its owner's account.
    pub(super) fn free(&mut self, mfn: Mfn) {
        let Some(info) = self.frames.get(mfn).map(|frame| frame.info) else {
            return;
        };
        if info.type_count != 0 {
            let what = format!("freed with {} uses as {:?}", info.type_count, info.page_type);
            self.violation(Audit::References, Some(mfn), what);
        }
        let reachable = self
            .domains
            .iter()
            .find(|(_, domain)| domain.stale.contains(&mfn))
            .map(|(id, _)| *id);
        if let Some(id) = reachable {
            let what = format!("freed while {id} may still reach it by a stale translation");
            self.violation(Audit::Memory, Some(mfn), what);
        }
        if let PageOwner::Domain(owner) = info.owner
            && !info.special
            && let Some(owner) = self.domains.get_mut(&owner)
        {
            owner.pages = owner.pages.saturating_sub(1);
        }
        self.frames.release(mfn);
    }

    /// The owner gives its allocation up; the frame lives on while others reference it.
    pub(super) fn give_up(&mut self, mfn: Mfn) {
        let Some(frame) = self.frames.get_mut(mfn) else {
            return;
        };
        if core::mem::take(&mut frame.info.allocated) {
            self.put(mfn);
        }
    }

    /// Whether the writable type of this frame is a matter of counting at all: not on Arm.
    fn has_types(&self, mfn: Mfn) -> bool {
        match self.frames.owner(mfn) {
            Some(PageOwner::Domain(owner)) => self
                .domains
                .get(&owner)
                .is_none_or(|domain| domain.kind != DomainKind::Arm),
            _ => true,
        }
    }

    /// Takes the writable type.
    pub(super) fn get_type(&mut self, mfn: Mfn) -> bool {
        if self.frames.live(mfn).is_none() {
            return false;
        }
        !self.has_types(mfn) || self.frames.take_type(mfn, PageType::Writable)
    }

    /// Drops the writable type.
    pub(super) fn put_type(&mut self, mfn: Mfn) {
        if !self.has_types(mfn) {
            return;
        }
        match self.frames.get_mut(mfn) {
            Some(frame) if frame.info.type_count != 0 && frame.info.page_type == PageType::Writable => {
                frame.info.type_count -= 1;
            }
            _ => self.violation(
                Audit::References,
                Some(mfn),
                String::from("the writable type was dropped, but not held"),
            ),
        }
    }

    /// The machine uses a frame as a page table or the like; false if it is in use otherwise.
    pub(super) fn use_as(&mut self, mfn: Mfn, page_type: PageType) -> bool {
        if self.frames.reference(mfn).is_none() {
            return false;
        }
        if !self.frames.take_type(mfn, page_type) {
            self.put(mfn);
            return false;
        }
        if let Some(frame) = self.frames.get_mut(mfn) {
            frame.in_use_as_table = true;
        }
        true
    }

    /// Ends [`State::use_as`].
    pub(super) fn stop_use(&mut self, mfn: Mfn) {
        if let Some(frame) = self.frames.get_mut(mfn)
            && core::mem::take(&mut frame.in_use_as_table)
        {
            frame.info.type_count -= 1;
            self.put(mfn);
        }
    }

    // --- memory of domains --------------------------------------------------------------------

    /// A zeroed page of a domain, below 2^32. Special pages are not on its account.
    pub(super) fn allocate(&mut self, domain: DomId, special: bool) -> Option<Mfn> {
        if self.shortage || self.low_shortage {
            return None;
        }
        let mfn = self.frames.allocate(PageOwner::Domain(domain));
        self.account(mfn, domain, special);
        Some(mfn)
    }

    /// As [`State::allocate`], at a chosen number.
    pub(super) fn allocate_at(&mut self, domain: DomId, mfn: Mfn) -> bool {
        let done = self.frames.allocate_at(mfn, PageOwner::Domain(domain));
        if done {
            self.account(mfn, domain, false);
        }
        done
    }

    fn account(&mut self, mfn: Mfn, domain: DomId, special: bool) {
        if let Some(frame) = self.frames.get_mut(mfn) {
            frame.info.special = special;
        }
        if !special {
            self.domain_mut(domain).pages += 1;
        }
    }

    /// Gives up every page of a domain but the special ones, which are the engine's.
    pub(super) fn give_up_all(&mut self, domain: DomId) {
        let owned = self.frames.iter().filter(|(_, frame)| {
            frame.info.owner == PageOwner::Domain(domain) && frame.info.allocated && !frame.info.special
        });
        let owned: Vec<Mfn> = owned.map(|(mfn, _)| mfn).collect();
        for mfn in owned {
            self.give_up(mfn);
        }
    }

    /// Frames that are on a domain's account, or still kept by others after its death.
    pub(super) fn frames_of(&self, domain: DomId) -> usize {
        self.frames
            .iter()
            .filter(|(_, frame)| frame.info.owner == PageOwner::Domain(domain) && !frame.info.special)
            .count()
    }

    /// Whether anything keeps a domain's frames from being free but the table pages' own owner.
    pub(super) fn is_held(&self, domain: DomId) -> bool {
        self.frames.iter().any(|(_, frame)| {
            let info = &frame.info;
            let table_only = info.special && info.allocated && info.references == 1;
            info.owner == PageOwner::Domain(domain) && !table_only
        })
    }

    /// The bytes of a frame, unless it is free or no memory.
    pub(super) fn words(&mut self, mfn: Mfn) -> Option<Arc<PageWords>> {
        match self.frames.live(mfn) {
            Some(frame) => Some(Arc::clone(&frame.words)),
            None => {
                let what = String::from("its bytes were used, but it is free or no memory");
                self.violation(Audit::Memory, Some(mfn), what);
                None
            }
        }
    }
}
