//! Engine and machine held against each other: what only both together can tell.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use gnttab_abi::{DomId, EntryFlags, GrantRef, MapFlags, Mfn};

use super::audit::{Audit, Justified, Violation};
use super::{Guest, Machine, P2mEntry};
use crate::active::PinCounts;
use crate::domain::Domain;
use crate::engine::{Engine, Processor};
use crate::hypervisor::{Access, DomainKind, Hypervisor};
use crate::maptrack::RECORDS_PER_PAGE;
use crate::sync::Ordering;

/// A live mapping, and the frame that it maps.
struct Live {
    grantee: DomId,
    grantee_kind: DomainKind,
    granter: DomId,
    granter_kind: DomainKind,
    gref: GrantRef,
    flags: MapFlags,
    mfn: Mfn,
}

impl Live {
    fn access(&self) -> Access {
        if self.flags.contains(MapFlags::READONLY) {
            Access::Read
        } else {
            Access::Write
        }
    }

    /// Spec 4.5, but for host mappings in page tables, whose entries account for themselves.
    fn justifies(&self) -> Justified {
        let write = u64::from(self.access() == Access::Write);
        let mut due = Justified::default();
        if self.flags.contains(MapFlags::DEVICE_MAP) {
            due.references += 1;
            due.types += write;
        }
        if self.flags.contains(MapFlags::HOST_MAP) && self.grantee_kind.is_external() {
            let typed = self.grantee_kind == DomainKind::Hvm
                && (self.granter == self.grantee || self.granter_kind == DomainKind::Pv);
            due.references += 1;
            due.types += if typed { write } else { 0 };
        }
        due
    }
}

impl Machine {
    /// As [`Machine::audit`], with the engine's books beside the machine's: AUD-PIN and AUD-FLG
    /// for every entry, AUD-HND for every handle, AUD-LCK, and AUD-REF, AUD-P2M and AUD-IOM against
    /// the mappings that are live.
    ///
    /// For moments at which no operation is under way; `engine` must run on this machine.
    ///
    /// # Panics
    /// If all processors of the engine are in use.
    #[must_use]
    pub fn audit_with<H: Hypervisor<Domain = Guest>>(&self, engine: &Engine<H>) -> Vec<Violation> {
        let mut cpu = engine.any_processor().expect("a processor is free");
        let domains: Vec<_> = engine.domains().filter_map(|id| engine.domain(id)).collect();
        let mut found = Vec::new();
        audit_locks(engine, &domains, &mut found);
        if !found.is_empty() {
            // Whoever looks on would wait for them.
            return found;
        }
        for domain in &domains {
            audit_handles(domain, &mut found);
        }
        let live: Vec<Live> = domains
            .iter()
            .flat_map(|domain| live_of(&mut cpu, domain, &mut found))
            .collect();

        let mut claims: BTreeMap<Mfn, Justified> = BTreeMap::new();
        for mapping in &live {
            let due = mapping.justifies();
            let claim = claims.entry(mapping.mfn).or_default();
            claim.references += due.references;
            claim.types += due.types;
        }
        found.extend(self.audit_against(&claims));
        for domain in &domains {
            audit_entries(&mut cpu, domain, &live, &mut found);
            audit_reach(domain.private(), &live, &mut found);
        }
        found
    }
}

/// Live mappings of a domain; one of an entry that is not in use is wrong in itself.
fn live_of<H: Hypervisor<Domain = Guest>>(
    cpu: &mut Processor<'_, H>,
    domain: &Domain<H>,
    found: &mut Vec<Violation>,
) -> Vec<Live> {
    let mut live = Vec::new();
    for mapping in domain.mappings() {
        let granter_kind = cpu.engine().domain(mapping.granter).map(|granter| granter.kind());
        let view = cpu.entry(mapping.granter, mapping.gref);
        let (Some(granter_kind), Some(mfn)) = (granter_kind, view.and_then(|view| view.mfn)) else {
            found.push(Violation {
                audit: Audit::Pins,
                mfn: None,
                what: format!(
                    "handle {} of {} maps {} of {}, which is not in use",
                    mapping.handle,
                    domain.id(),
                    mapping.gref,
                    mapping.granter
                ),
            });
            continue;
        };
        live.push(Live {
            grantee: domain.id(),
            grantee_kind: domain.kind(),
            granter: mapping.granter,
            granter_kind,
            gref: mapping.gref,
            flags: mapping.flags,
            mfn,
        });
    }
    live
}

/// AUD-LCK.
fn audit_locks<H: Hypervisor>(engine: &Engine<H>, domains: &[Arc<Domain<H>>], found: &mut Vec<Violation>) {
    let mut report = |what| {
        found.push(Violation {
            audit: Audit::Locks,
            mfn: None,
            what,
        });
    };
    if engine.registry.is_anybody_inside() {
        report(String::from("a processor is still inside a table"));
    }
    for domain in domains {
        let (id, table) = (domain.id(), &domain.table);
        let held = [
            ("its gate", !table.gate.is_open()),
            ("the lock of its table", table.admin.is_locked()),
            ("the lock of its I/O MMU", domain.iommu.is_locked()),
            ("a lock of its handles", domain.maptrack.is_locked()),
        ];
        for (what, _) in held.into_iter().filter(|(_, held)| *held) {
            report(format!("{id}: somebody holds {what}"));
        }
        let view = table.view();
        let partial = (0..view.entries()).filter_map(|gref| view.entry(GrantRef(gref)));
        let (mut busy, mut parts) = (0, 0);
        for entry in partial {
            let state = entry.active.peek();
            busy += u32::from(state.is_busy());
            parts += u32::from(state.is_pinned() && state.is_partial());
        }
        if busy != 0 {
            report(format!("{id}: {busy} entries are held"));
        }
        let counted = table.v2_ops.load(Ordering::SeqCst);
        if counted != parts {
            report(format!(
                "{id}: {counted} copies that depend on version 2, {parts} uses of that kind"
            ));
        }
    }
}

/// AUD-HND.
fn audit_handles<H: Hypervisor>(domain: &Domain<H>, found: &mut Vec<Violation>) {
    let mut report = |what: String| {
        found.push(Violation {
            audit: Audit::Handles,
            mfn: None,
            what: format!("{}: {what}", domain.id()),
        });
    };
    let maptrack = &domain.maptrack;
    let (limit, free) = (maptrack.limit(), maptrack.free_handles());
    let mut seen = BTreeSet::new();
    for handle in &free {
        if handle.0 >= limit {
            report(format!("free handle {handle} was never made"));
        }
        if maptrack.look(*handle).is_some() {
            report(format!("handle {handle} is free and live"));
        }
        if !seen.insert(handle.0) {
            report(format!("handle {handle} is free twice"));
        }
    }
    seen.extend(domain.mappings().map(|mapping| mapping.handle.0));
    // The last of all is never handed out (spec 2.5).
    let all_made = limit / RECORDS_PER_PAGE >= maptrack.max_pages();
    let total = if all_made { limit.saturating_sub(1) } else { limit };
    if seen.len() != total as usize {
        report(format!(
            "{} handles are free or live, of {total} that were made",
            seen.len()
        ));
    }
}

/// AUD-PIN and AUD-FLG.
fn audit_entries<H: Hypervisor<Domain = Guest>>(
    cpu: &mut Processor<'_, H>,
    domain: &Domain<H>,
    live: &[Live],
    found: &mut Vec<Violation>,
) {
    let id = domain.id();
    let mut due: BTreeMap<GrantRef, [u32; 4]> = BTreeMap::new();
    for mapping in live.iter().filter(|mapping| mapping.granter == id) {
        let [hw, hr, dw, dr] = due.entry(mapping.gref).or_default();
        let (host, device) = match mapping.access() {
            Access::Write => (hw, dw),
            Access::Read => (hr, dr),
        };
        *host += u32::from(mapping.flags.contains(MapFlags::HOST_MAP));
        *device += u32::from(mapping.flags.contains(MapFlags::DEVICE_MAP));
    }
    for gref in (0..).map(GrantRef) {
        let Some(view) = cpu.entry(id, gref) else { break };
        let has = counts(view.pins);
        let due = due.get(&gref).copied().unwrap_or_default();
        if has != due {
            found.push(Violation {
                audit: Audit::Pins,
                mfn: view.mfn,
                what: format!("{id} {gref}: pins {has:?}, live mappings are {due:?}"),
            });
        }
        let [hw, _, dw, _] = due;
        let mut marks = EntryFlags::empty();
        marks.set(EntryFlags::READING, due != [0; 4]);
        marks.set(EntryFlags::WRITING, hw + dw != 0);
        if !view.words.flags().contains(marks) {
            found.push(Violation {
                audit: Audit::Marks,
                mfn: view.mfn,
                what: format!("{id} {gref}: in use ({has:?}), but marked {}", view.words.flags()),
            });
        }
    }
}

fn counts(pins: PinCounts) -> [u32; 4] {
    [
        pins.host_write,
        pins.host_read,
        pins.device_write,
        pins.device_read,
    ]
    .map(u32::from)
}

/// AUD-P2M and AUD-IOM: what a domain and its devices can reach of others is what it maps.
fn audit_reach(guest: &Guest, live: &[Live], found: &mut Vec<Violation>) {
    let id = guest.id();
    let mut rights: BTreeMap<Mfn, Access> = BTreeMap::new();
    let mut maps: BTreeMap<Mfn, u32> = BTreeMap::new();
    for mapping in live.iter().filter(|mapping| mapping.grantee == id) {
        *maps.entry(mapping.mfn).or_default() += 1;
        if mapping.granter != id {
            let right = rights.entry(mapping.mfn).or_insert(Access::Read);
            if mapping.access() == Access::Write {
                *right = Access::Write;
            }
        }
    }
    let mut report = |audit, mfn, what: String| {
        found.push(Violation {
            audit,
            mfn: Some(mfn),
            what,
        });
    };
    for mfn in guest.grant_frames() {
        if !maps.contains_key(&mfn) {
            report(
                Audit::Physmap,
                mfn,
                format!("{id} has it mapped, but not by a live grant"),
            );
        }
    }
    if let Some(has) = guest.iommu_rights()
        && has != rights
    {
        let mfns = has.keys().chain(rights.keys());
        for mfn in mfns.filter(|mfn| has.get(mfn) != rights.get(mfn)) {
            let what = format!(
                "devices of {id} may {:?}, its mappings say {:?}",
                has.get(mfn),
                rights.get(mfn)
            );
            report(Audit::Iommu, *mfn, what);
        }
    }
}

impl Guest {
    /// Other domains' frames that it reaches by what looks like a grant mapping. A control domain
    /// maps by other means too, so its page tables are not looked at.
    fn grant_frames(&self) -> Vec<Mfn> {
        let state = self.machine().lock();
        let domain = state.domain(self.id());
        let physmap = domain.p2m.values().filter_map(|entry| match entry {
            P2mEntry::Grant(mfn, _) => Some(*mfn),
            _ => None,
        });
        let mut frames: Vec<Mfn> = physmap.collect();
        if !domain.control {
            let mapped = state.present_ptes(self.id());
            let mapped = mapped.iter().map(|pte| pte.mfn());
            frames.extend(mapped.filter(|mfn| {
                state.frames.live(*mfn).is_some() && !state.frames.is_owned_by(*mfn, self.id())
            }));
        }
        frames
    }

    fn iommu_rights(&self) -> Option<BTreeMap<Mfn, Access>> {
        let state = self.machine().lock();
        let iommu = state.domain(self.id()).iommu.as_ref();
        iommu.map(|iommu| iommu.rights.clone())
    }
}

/// The audits see what they are for; what no guest and no embedder can do is done from inside.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{C, G, Scene};

    fn kinds(scene: &Scene) -> Vec<Audit> {
        let mut kinds: Vec<Audit> = scene.audit().iter().map(|found| found.audit).collect();
        kinds.dedup();
        kinds
    }

    #[test]
    fn handles_lost_doubled_or_free_while_live() {
        let scene = Scene::pv().build();
        let mapped = scene.map(scene.place(0), MapFlags::HOST_MAP);
        let domain = scene.domain(C);
        let maptrack = &domain.maptrack;
        assert_eq!(kinds(&scene), []);
        let handle = maptrack.handles(0).allocate().unwrap().handle;
        assert_eq!(kinds(&scene), [Audit::Handles], "lost");
        maptrack.handles(0).release(maptrack.free(handle).unwrap());
        assert_eq!(kinds(&scene), []);
        maptrack.handles(0).release(maptrack.free(handle).unwrap());
        assert_eq!(kinds(&scene), [Audit::Handles], "twice");
        maptrack.handles(0).allocate().unwrap();
        maptrack.handles(0).release(maptrack.free(mapped.handle).unwrap());
        assert_eq!(kinds(&scene), [Audit::Handles], "free and live");
    }

    #[test]
    fn locks_entries_tables_and_counts_that_are_held() {
        let scene = Scene::pv().granter_v2().build();
        let domain = scene.domain(G);
        let admin = domain.table.admin.lock();
        assert_eq!(kinds(&scene), [Audit::Locks]);
        drop(admin);
        let iommu = domain.iommu.lock();
        assert_eq!(kinds(&scene), [Audit::Locks]);
        drop(iommu);
        domain.table.gate.shut();
        assert_eq!(kinds(&scene), [Audit::Locks]);
        domain.table.gate.open();
        let mut cpu = scene.processor();
        let inside = cpu.enter(G);
        assert_eq!(kinds(&scene), [Audit::Locks]);
        drop(inside);
        drop(cpu);
        let view = domain.table.view();
        let entry = view.entry_to_use(Scene::GREF).unwrap();
        let claim = entry.active.claim(entry.active.load());
        assert_eq!(kinds(&scene), [Audit::Locks]);
        drop(claim);
        domain.table.v2_ops.fetch_add(1, Ordering::SeqCst);
        assert_eq!(kinds(&scene), [Audit::Locks]);
        domain.table.v2_ops.fetch_sub(1, Ordering::SeqCst);
        assert_eq!(kinds(&scene), []);
    }
}
