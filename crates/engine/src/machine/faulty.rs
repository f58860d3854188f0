//! Making a hypervisor fail where a test wants it to.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;

use super::between::{Between, Verdict, Watch};
use super::request::Request;

type Rule = Box<dyn FnMut(&Request) -> Verdict + Send>;

/// Rules that say which requests fail. The first rule that refuses decides.
///
/// Every failure is one that the trait allows. One of them breaks the engine's trust all the same
/// where nothing real would: a mapping that was just made can be removed again, so do not refuse
/// `unmap_host` together with what comes after `map_host` in a map (the I/O MMU).
#[derive(Default)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
    refused: AtomicU64,
}

impl Faults {
    /// Asks `rule` about every request that can fail. It must not use the hypervisor.
    pub fn rule(&self, rule: impl FnMut(&Request) -> Verdict + Send + 'static) {
        self.rules.lock().push(Box::new(rule));
    }

    /// Refuses every request that `which` picks.
    pub fn fail(&self, which: impl Fn(&Request) -> bool + Send + 'static) {
        self.rule(move |request| refuse_if(which(request)));
    }

    /// Refuses the `nth` request, counted from 1, that `which` picks from now on, and no other.
    pub fn fail_nth(&self, nth: u64, which: impl Fn(&Request) -> bool + Send + 'static) {
        let mut seen = 0;
        self.rule(move |request| {
            let picked = which(request);
            seen += u64::from(picked);
            refuse_if(picked && seen == nth)
        });
    }

    /// Refuses about one in `one_in` of the requests that `which` picks; which ones follows from
    /// `seed`. 0 refuses none.
    pub fn fail_randomly(&self, seed: u64, one_in: u64, which: impl Fn(&Request) -> bool + Send + 'static) {
        let mut state = seed;
        self.rule(move |request| {
            if !which(request) {
                return Verdict::Proceed;
            }
            // SplitMix64: any seed will do, 0 too.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            refuse_if((z ^ (z >> 31)).checked_rem(one_in) == Some(0))
        });
    }

    /// Forgets all rules.
    pub fn clear(&self) {
        self.rules.lock().clear();
    }

    /// How many requests were refused so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

fn refuse_if(refuse: bool) -> Verdict {
    if refuse { Verdict::Refuse } else { Verdict::Proceed }
}

impl Watch for Faults {
    fn before(&self, request: &Request) -> Verdict {
        // All rules are asked, since each may be counting.
        let mut verdict = Verdict::Proceed;
        for rule in self.rules.lock().iter_mut() {
            let said = rule(request);
            if verdict == Verdict::Proceed {
                verdict = said;
            }
        }
        if verdict != Verdict::Proceed {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        verdict
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}

/// A hypervisor that fails on demand.
///
/// ```
/// use gnttab_abi::{EntryFlags, GrantStatus, MapFlags};
/// use gnttab_engine::machine::{Faulty, G, Request, Scene};
///
/// let scene = Scene::pv().build_on(Faulty::failing);
/// let faults = scene.engine.hypervisor().watch();
/// faults.fail_nth(1, |request| matches!(request, Request::MapHost { .. }));
///
/// // The first mapping fails and leaves no trace; the second works.
/// let failed = scene.map(scene.place(0), MapFlags::HOST_MAP);
/// assert_eq!(failed.status, GrantStatus::GENERAL_ERROR);
/// assert_eq!(scene.flags(G, Scene::GREF), EntryFlags::PERMIT_ACCESS);
/// assert_eq!(scene.audit(), []);
/// assert_eq!(scene.map(scene.place(0), MapFlags::HOST_MAP).status, GrantStatus::OKAY);
/// ```
pub type Faulty<H> = Between<H, Faults>;

impl<H> Between<H, Faults> {
    /// `hv`, which does not fail until [`Faults`] are told to.
    pub fn failing(hv: H) -> Faulty<H> {
        Between::new(hv, Faults::default())
    }
}
