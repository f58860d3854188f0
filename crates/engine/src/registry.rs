//! Who is inside which table: look-up of domains, and the one lock that readers do not take.
//!
//! Every operation looks into one table at a time. A processor that enters a table writes the
//! domain's number into its own slot and then looks whether the domain is there and its gate
//! open; it wipes the slot when it leaves. Whoever needs a table for itself (a change of version,
//! a swap, removal of the domain) shuts the gate, or takes the domain out of the list, and then
//! waits until no slot holds the domain's number. Both sides write before they look, in the single
//! order of sequentially consistent operations, so at least one sees the other:
//!
//! ```text
//! reader: slot = id;  look at list and gate      writer: list or gate;  look at every slot
//! ```
//!
//! What must always hold:
//! 1. A processor is inside at most one table (`enter` borrows it exclusively), so no two wait for
//!    each other; never are two tables held together (spec 8.1).
//! 2. Inside, nothing waits for anything but another reader's step on the same entry.
//! 3. A `Domain` that a slot names, and that the list held after the slot was written, is not freed
//!    until the slot is wiped. This is what makes the one `unsafe` look-up sound.

#![expect(
    unsafe_code,
    reason = "look-up without a reference count, made sound by rule 3"
)]

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::hint::spin_loop;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use gnttab_abi::DomId;
use spin::Mutex;

use crate::domain::Domain;
use crate::hypervisor::Hypervisor;
use crate::segments::Segments;

/// A processor's slot, on a cache line of its own.
#[repr(align(64))]
pub(crate) struct Slot {
    /// 0: outside; otherwise the domain's number plus one.
    inside: AtomicU32,
    taken: AtomicBool,
}

impl Slot {
    /// Takes the slot for one holder; false if it has one.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::Acquire)
    }

    pub(crate) fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }
}

/// See the module.
pub(crate) struct Registry<H: Hypervisor> {
    domains: Segments<AtomicPtr<Domain<H>>, 64, 10>,
    slots: Box<[Slot]>,
    /// Serialises insertion and removal.
    changing: Mutex<()>,
    owns: PhantomData<Arc<Domain<H>>>,
}

impl<H: Hypervisor> Registry<H> {
    pub(crate) fn new(processors: usize) -> Registry<H> {
        let slot = |_| Slot {
            inside: AtomicU32::new(0),
            taken: AtomicBool::new(false),
        };
        Registry {
            domains: Segments::new(),
            slots: (0..processors).map(slot).collect(),
            changing: Mutex::new(()),
            owns: PhantomData,
        }
    }

    pub(crate) fn slot(&self, number: usize) -> Option<&Slot> {
        self.slots.get(number)
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
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

    /// Takes a domain out of the list and waits until nobody is inside its table. The caller is
    /// inside no table.
    pub(crate) fn remove(&self, id: DomId) -> Option<Arc<Domain<H>>> {
        let _changing = self.changing.lock();
        let place = self.domains.get(usize::from(id.0))?;
        let found = place.swap(ptr::null_mut(), Ordering::SeqCst);
        if found.is_null() {
            return None;
        }
        self.wait_until_left(id);
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
        (0..DomId::FIRST_RESERVED.0).map(DomId).filter(|id| {
            let place = self.domains.get(usize::from(id.0));
            place.is_some_and(|place| !place.load(Ordering::Acquire).is_null())
        })
    }

    /// Enters the table of a domain through a processor's slot; `None`: no such domain.
    #[inline]
    pub(crate) fn enter<'a>(&'a self, slot: &'a Slot, id: DomId) -> Option<Inside<'a, H>> {
        if !id.is_ordinary() {
            return None;
        }
        let place = self.domains.get(usize::from(id.0))?;
        loop {
            slot.inside.swap(u32::from(id.0) + 1, Ordering::SeqCst);
            let found = place.load(Ordering::SeqCst);
            if found.is_null() {
                slot.inside.store(0, Ordering::Release);
                return None;
            }
            // SAFETY: the slot was written before the list was read, so `remove` waits for the
            // slot before it frees what was found (rule 3). The borrow ends with `Inside`, which
            // wipes the slot.
            let domain = unsafe { &*found };
            if domain.table.gate.load(Ordering::SeqCst) == 0 {
                return Some(Inside { slot, domain });
            }
            slot.inside.store(0, Ordering::Release);
            spin_loop();
        }
    }

    /// Shuts a table's gate and waits until everybody has left. The caller is inside no table.
    pub(crate) fn exclude<'a>(&'a self, domain: &'a Domain<H>) -> Excluded<'a, H> {
        let gate = &domain.table.gate;
        while gate
            .compare_exchange_weak(0, 1, Ordering::SeqCst, Ordering::Relaxed)
            .is_err()
        {
            spin_loop();
        }
        self.wait_until_left(domain.id());
        Excluded { domain }
    }

    fn wait_until_left(&self, id: DomId) {
        for slot in &self.slots {
            while slot.inside.load(Ordering::SeqCst) == u32::from(id.0) + 1 {
                spin_loop();
            }
        }
    }
}

impl<H: Hypervisor> Drop for Registry<H> {
    fn drop(&mut self) {
        let ids: alloc::vec::Vec<DomId> = self.ids().collect();
        for id in ids {
            drop(self.remove(id));
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
        self.slot.inside.store(0, Ordering::Release);
    }
}

/// A table that nobody is inside. Having one tells you: every word of it is yours, but for what
/// the guest itself writes.
pub(crate) struct Excluded<'a, H: Hypervisor> {
    domain: &'a Domain<H>,
}

impl<H: Hypervisor> Drop for Excluded<'_, H> {
    fn drop(&mut self) {
        self.domain.table.gate.store(0, Ordering::SeqCst);
    }
}
