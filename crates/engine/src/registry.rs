//! Which domains there are, and entering their tables.
//!
//! Every operation looks into one table at a time. `presence` explains how a processor enters one
//! without taking a lock, and how another has it alone; the tag is the domain's number plus one.
//! What must always hold:
//! 1. A processor is inside at most one table (`Processor::enter` borrows it exclusively), so no
//!    two wait for each other; never are two tables held together (spec 8.1).
//! 2. Inside, nothing waits for anything but another processor's step on the same entry.
//! 3. A `Domain` that a slot names, and that the list held after the slot was written, is not freed
//!    until the slot is wiped. This is what makes the one `unsafe` look-up sound.

#![expect(
    unsafe_code,
    reason = "look-up without a reference count, made sound by rule 3"
)]

use alloc::sync::Arc;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr;

use gnttab_abi::DomId;

use crate::bound::below;
use crate::domain::Domain;
use crate::engine::Engine;
use crate::hypervisor::{Access, DomainKind, Hypervisor};
use crate::presence::{Presence, Slot};
use crate::segments::Segments;
use crate::sync::{AtomicPtr, Knock, Mutex, Ordering};
use crate::table::View;

/// What a processor inside a domain's table writes into its slot.
fn tag(id: DomId) -> u32 {
    u32::from(id.0) + 1
}

/// Places in the first segment of the list, and one more than the highest number. Few for the model
/// checker.
const FIRST_PLACES: usize = if cfg!(loom) { 4 } else { 64 };
const NUMBERS: u16 = if cfg!(loom) { 4 } else { DomId::FIRST_RESERVED.0 };

/// See the module.
pub(crate) struct Registry<H: Hypervisor> {
    domains: Segments<AtomicPtr<Domain<H>>, FIRST_PLACES, 10>,
    presence: Presence,
    /// Serialises insertion and removal.
    changing: Mutex<()>,
    owns: PhantomData<Arc<Domain<H>>>,
}

impl<H: Hypervisor> Registry<H> {
    pub(crate) fn new(processors: usize) -> Registry<H> {
        Registry {
            domains: Segments::new(),
            presence: Presence::new(processors),
            changing: Mutex::new(()),
            owns: PhantomData,
        }
    }

    pub(crate) fn slot(&self, number: usize) -> Option<&Slot> {
        self.presence.slot(number)
    }

    pub(crate) fn slots(&self) -> usize {
        self.presence.len()
    }

    /// Whether any processor is inside a table, for audits while nobody acts.
    #[cfg(feature = "machine")]
    pub(crate) fn is_anybody_inside(&self) -> bool {
        self.presence.is_anybody_inside()
    }

    /// Makes a domain findable; gives it back if its number is taken or there is no memory.
    pub(crate) fn insert(&self, domain: Arc<Domain<H>>) -> Result<(), Arc<Domain<H>>> {
        let _changing = self.changing.lock();
        let index = usize::from(domain.id().0);
        let empty = || AtomicPtr::new(ptr::null_mut());
        if self.domains.grow(index + 1, empty).is_err() {
            return Err(domain);
        }
        let Some(place) = self.domains.get(index) else {
            return Err(domain);
        };
        if !place.load(Ordering::Relaxed).is_null() {
            return Err(domain);
        }
        place.store(Arc::into_raw(domain).cast_mut(), Ordering::SeqCst);
        Ok(())
    }

    /// Takes a domain out of the list, unless it has gone already, and waits until nobody is inside
    /// its table. The caller is inside no table.
    pub(crate) fn remove(&self, domain: &Domain<H>) -> Option<Arc<Domain<H>>> {
        let _changing = self.changing.lock();
        let place = self.domains.get(usize::from(domain.id().0))?;
        let found = place.load(Ordering::Relaxed);
        // By then the number may be another domain's.
        if !ptr::eq(found, domain) {
            return None;
        }
        place.store(ptr::null_mut(), Ordering::SeqCst);
        self.presence.wait_until_left(tag(domain.id()));
        // SAFETY: the pointer came from `Arc::into_raw` in `insert`, was in the list until now and
        // is taken out once; no processor is inside that could still use it (rule 3).
        Some(unsafe { Arc::from_raw(found) })
    }

    /// A domain by number, with a count of its own; for the embedder and observers, not for hot
    /// paths.
    pub(crate) fn find(&self, id: DomId) -> Option<Arc<Domain<H>>> {
        let _changing = self.changing.lock();
        let found = self.domains.get(usize::from(id.0))?.load(Ordering::SeqCst);
        if found.is_null() {
            return None;
        }
        // SAFETY: the list holds one count of this `Arc`, and removal waits for `changing`.
        unsafe { Arc::increment_strong_count(found) };
        // SAFETY: the count that was just added is the one that this `Arc` owns.
        Some(unsafe { Arc::from_raw(found) })
    }

    /// The numbers of all domains, in order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = DomId> + '_ {
        let made = u16::try_from(self.domains.made()).unwrap_or(NUMBERS);
        (0..made.min(NUMBERS)).map(DomId).filter(|id| {
            let place = self.domains.get(usize::from(id.0));
            place.is_some_and(|place| !place.load(Ordering::Acquire).is_null())
        })
    }

    /// Waits until every visit that is under way now has ended. The caller is inside no table.
    pub(crate) fn wait_for_all(&self) {
        self.presence.wait_for_all();
    }

    /// Enters the table of a domain through a processor's slot; `None`: no such domain.
    #[inline]
    pub(crate) fn enter<'a>(&'a self, slot: &'a Slot, id: DomId) -> Option<Inside<'a, H>> {
        let domain = self.find_inside(slot, id)?;
        Some(Inside { slot, domain })
    }

    /// As [`Registry::enter`], for the two who wipe the slot when they leave: the domain may be used
    /// until then.
    #[inline]
    fn find_inside<'a>(&'a self, slot: &Slot, id: DomId) -> Option<&'a Domain<H>> {
        let place = self
            .domains
            .get(below(id.0.into(), DomId::FIRST_RESERVED.0.into())?)?;
        let mut knock = Knock::first();
        loop {
            slot.announce(tag(id));
            let found = place.load(Ordering::SeqCst);
            if found.is_null() {
                slot.leave();
                return None;
            }
            // SAFETY: the slot was written before the list was read, so `remove` waits for the
            // slot before it frees what was found (rule 3). `Inside` and `Visit` lend it out for no
            // longer than until they wipe the slot.
            let domain = unsafe { &*found };
            if domain.table.gate.is_open() {
                return Some(domain);
            }
            slot.leave();
            knock = knock.wait();
        }
    }

    /// Shuts a table's gate and waits until everybody has left. The caller is inside no table.
    pub(crate) fn exclude<'a>(&'a self, domain: &'a Domain<H>) -> Excluded<'a, H> {
        domain.table.gate.shut();
        self.presence.wait_until_left(tag(domain.id()));
        Excluded { domain }
    }
}

impl<H: Hypervisor> Drop for Registry<H> {
    fn drop(&mut self) {
        let ids: alloc::vec::Vec<DomId> = self.ids().collect();
        for domain in ids.into_iter().filter_map(|id| self.find(id)) {
            drop(self.remove(&domain));
        }
    }
}

/// A processor inside a table. Having one tells you: the domain is there, and its version cannot
/// change.
pub(crate) struct Inside<'a, H: Hypervisor> {
    slot: &'a Slot,
    domain: &'a Domain<H>,
}

impl<H: Hypervisor> Inside<'_, H> {
    /// A count of the domain's own, to keep it after leaving.
    pub(crate) fn hold(&self) -> Arc<Domain<H>> {
        let domain: *const Domain<H> = self.domain;
        // SAFETY: the pointer is that of an `Arc` that the list holds a count of, at least until
        // this processor has left (rule 3).
        unsafe { Arc::increment_strong_count(domain) };
        // SAFETY: the count that was just added is the one that this `Arc` owns.
        unsafe { Arc::from_raw(domain) }
    }
}

impl<H: Hypervisor> Deref for Inside<'_, H> {
    type Target = Domain<H>;
    fn deref(&self) -> &Domain<H> {
        self.domain
    }
}

impl<H: Hypervisor> Drop for Inside<'_, H> {
    fn drop(&mut self) {
        self.slot.leave();
    }
}

/// A processor on its way through tables, one at a time. It stays in one for as long as the next
/// thing asked for is there too and nobody wants the table alone; dropped, it leaves.
pub(crate) struct Visit<'a, H: Hypervisor> {
    pub(crate) engine: &'a Engine<H>,
    slot: &'a Slot,
    /// On whose behalf.
    visitor: &'a Domain<H>,
    inside: Option<Room<'a, H>>,
}

/// Items after which a processor leaves a table in any case, at the latest: who waits for all to have left,
/// whatever their table, waits for no more than these.
pub(crate) const LEAVE_AFTER: usize = 64;

/// A domain whose table a visit is inside, and the table as it stands. It goes before the slot is wiped.
pub(crate) struct Room<'a, H: Hypervisor> {
    domain: &'a Domain<H>,
    pub(crate) view: View<'a, H::TablePage>,
    /// Whether a writable host mapping of the visitor's takes the writable type of the granter's page (spec 3.3
    /// step 14c, 4.5).
    typed: bool,
}

impl<H: Hypervisor> Room<'_, H> {
    /// Whether it is the domain that was judged, if one was.
    #[inline(always)]
    pub(crate) fn is(&self, judged: Option<&Domain<H>>) -> bool {
        judged.is_none_or(|judged| ptr::eq(self.domain, judged))
    }

    /// Whether a host mapping of the visitor's takes the writable page type.
    #[inline(always)]
    pub(crate) fn takes_type(&self, access: Access) -> bool {
        access == Access::Write && self.typed
    }
}

impl<H: Hypervisor> Deref for Room<'_, H> {
    type Target = Domain<H>;
    #[inline]
    fn deref(&self) -> &Domain<H> {
        self.domain
    }
}

impl<'a, H: Hypervisor> Visit<'a, H> {
    pub(crate) fn new(engine: &'a Engine<H>, slot: &'a Slot, visitor: &'a Domain<H>) -> Visit<'a, H> {
        Visit {
            engine,
            slot,
            visitor,
            inside: None,
        }
    }

    /// To be called before each item, which may be one that enters no table and so would leave none: a
    /// batch keeps nobody waiting who wants a table alone.
    #[inline(always)]
    pub(crate) fn begin_item(&mut self) {
        let shut = |room: &Room<'_, H>| !room.table.gate.is_open();
        if self.inside.as_ref().is_some_and(shut) {
            self.leave();
        }
    }

    /// The domain, with the processor inside its table until the next call; `None`: no such domain.
    #[inline]
    pub(crate) fn enter(&mut self, id: DomId) -> Option<&Room<'a, H>> {
        let stays = |room: &Room<'_, H>| room.id() == id;
        if !self.inside.as_ref().is_some_and(stays) {
            self.enter_another(id);
        }
        self.inside.as_ref()
    }

    /// [`Visit::begin_item`] and [`Visit::enter`] in one.
    #[inline(always)]
    pub(crate) fn enter_or_stay(&mut self, id: DomId) -> Option<&Room<'a, H>> {
        let stays = |room: &Room<'_, H>| room.id() == id && room.table.gate.is_open();
        if self.inside.as_ref().is_some_and(stays) {
            return self.inside.as_ref();
        }
        self.enter_another(id);
        self.inside.as_ref()
    }

    /// As [`Visit::enter`]; `None` also if the number is another domain's by now than the one that was
    /// `judged`.
    #[inline(always)]
    pub(crate) fn enter_judged(&mut self, (id, judged): (DomId, Option<&Domain<H>>)) -> Option<&Room<'a, H>> {
        self.enter(id).filter(|room| room.is(judged))
    }

    fn enter_another(&mut self, id: DomId) {
        // Left before another is entered: never two at a time (rule 1).
        self.leave();
        let found = self.engine.registry.find_inside(self.slot, id);
        let (grantee, itself) = (self.visitor.kind(), self.visitor.id() == id);
        self.inside = found.map(|domain| Room {
            domain,
            view: domain.table.view(),
            typed: grantee != DomainKind::Arm && (!domain.kind().is_external() || itself),
        });
    }

    /// The domain whose table the processor is inside; if none, the one of the number that `id` gives.
    #[inline(always)]
    pub(crate) fn inside_any(&mut self, id: impl FnOnce() -> Option<DomId>) -> Option<&Room<'a, H>> {
        if self.inside.is_none() {
            self.enter_another(id()?);
        }
        self.inside.as_ref()
    }

    /// Leaves the table, if the processor is inside one.
    #[inline]
    pub(crate) fn leave(&mut self) {
        if self.inside.take().is_some() {
            self.slot.leave();
        }
    }

    /// A domain by number with a count of its own, and no table entered.
    pub(crate) fn hold(&mut self, id: DomId) -> Option<Arc<Domain<H>>> {
        self.leave();
        self.engine
            .registry
            .enter(self.slot, id)
            .map(|inside| inside.hold())
    }
}

impl<H: Hypervisor> Drop for Visit<'_, H> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A table that nobody is inside. Having one tells you: every word of it is yours, but for what
/// the guest itself writes.
pub(crate) struct Excluded<'a, H: Hypervisor> {
    domain: &'a Domain<H>,
}

impl<H: Hypervisor> Drop for Excluded<'_, H> {
    fn drop(&mut self) {
        self.domain.table.gate.open();
    }
}
