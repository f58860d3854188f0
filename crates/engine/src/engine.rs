//! The engine itself: settings, domains, and the processors that act in it.

use alloc::sync::Arc;

use gnttab_abi::DomId;

use crate::domain::{Config, CreateError, Domain, Limits};
use crate::hypervisor::{DomainKind, Hypervisor};
use crate::presence::Slot;
use crate::registry::{Inside, Registry, Visit};

/// The hypervisor's half of grant tables. See the crate's front page.
pub struct Engine<H: Hypervisor> {
    // Declared first: domains hold table pages of the hypervisor and go before it does.
    pub(crate) registry: Registry<H>,
    pub(crate) hv: H,
    pub(crate) config: Config,
}

impl<H: Hypervisor> Engine<H> {
    /// An engine without domains.
    pub fn new(hv: H, config: Config) -> Engine<H> {
        Engine {
            registry: Registry::new(config.processors),
            hv,
            config,
        }
    }

    /// The hypervisor that embeds it.
    pub fn hypervisor(&self) -> &H {
        &self.hv
    }

    /// The machine's settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Creates a domain's table: version 1, one zeroed frame (spec 7.1).
    ///
    /// # Errors
    /// As [`CreateError`] says; nothing was created.
    pub fn create_domain(
        &self,
        id: DomId,
        kind: DomainKind,
        limits: Limits,
        private: H::Domain,
    ) -> Result<Arc<Domain<H>>, CreateError> {
        let domain = Arc::new(Domain::new(&self.hv, &self.config, id, kind, limits, private)?);
        match self.registry.insert(Arc::clone(&domain)) {
            Ok(()) => Ok(domain),
            Err(_) => Err(CreateError::Exists(id)),
        }
    }

    /// A domain by number. For embedders and observers.
    pub fn domain(&self, id: DomId) -> Option<Arc<Domain<H>>> {
        self.registry.find(id)
    }

    /// The numbers of all domains, in order, those included that are dead but still held.
    pub fn domains(&self) -> impl Iterator<Item = DomId> + '_ {
        self.registry.ids()
    }

    /// The right to act in the engine as processor `number`; `None` if there is no such
    /// processor ([`Config::processors`]) or somebody holds it.
    pub fn processor(&self, number: usize) -> Option<Processor<'_, H>> {
        let slot = self.registry.slot(number)?;
        slot.take().then(|| Processor { engine: self, slot })
    }

    /// Some processor that nobody holds.
    pub fn any_processor(&self) -> Option<Processor<'_, H>> {
        (0..self.registry.slots()).find_map(|number| self.processor(number))
    }
}

/// One processor, or thread, acting in the engine. Every operation of the typed door is a method
/// of it.
pub struct Processor<'e, H: Hypervisor> {
    pub(crate) engine: &'e Engine<H>,
    slot: &'e Slot,
}

impl<'e, H: Hypervisor> Processor<'e, H> {
    /// The engine.
    pub fn engine(&self) -> &'e Engine<H> {
        self.engine
    }

    /// Enters one domain's table. The exclusive borrow keeps it to one at a time.
    #[inline]
    pub(crate) fn enter(&mut self, id: DomId) -> Option<Inside<'_, H>> {
        self.engine.registry.enter(self.slot, id)
    }

    /// Starts on a way through tables on a domain's behalf. The exclusive borrow keeps it to one at a time.
    #[inline]
    pub(crate) fn visit<'v>(&'v mut self, visitor: &'v Domain<H>) -> Visit<'v, H> {
        Visit::new(self.engine, self.slot, visitor)
    }

    /// A domain by number with a count of its own, without any lock.
    pub(crate) fn hold(&mut self, id: DomId) -> Option<Arc<Domain<H>>> {
        self.enter(id).map(|inside| inside.hold())
    }
}

impl<H: Hypervisor> Drop for Processor<'_, H> {
    fn drop(&mut self) {
        self.slot.give_back();
    }
}
