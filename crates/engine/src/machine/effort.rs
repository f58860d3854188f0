//! Seeing how much one call makes the engine do.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use spin::Mutex;

use super::audit::{Audit, Violation};
use super::between::Watch;
use super::request::{Answer, Request};

/// What a call may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Requests to the hypervisor, hooks included: each pass of a loop that a guest can prolong has
    /// at least one.
    pub steps: u64,
    /// Bytes of stack below whoever makes the call, as deep as the requests go.
    pub stack: usize,
}

impl Budget {
    /// For so many items: generous for what the engine does, far below any loop that does not end.
    #[must_use]
    pub const fn items(items: u64) -> Budget {
        Budget {
            steps: 64 * (items + 1),
            stack: 64 << 10,
        }
    }
}

/// Counts what calls cost, and notes those that cost too much (AUD-WRK). One call at a time.
///
/// ```
/// use gnttab_abi::MapFlags;
/// use gnttab_engine::machine::{Between, Budget, Effort, Scene};
///
/// let scene = Scene::pv().build_on(|machine| Between::new(machine, Effort::default()));
/// let effort = scene.engine.hypervisor().watch();
/// effort.call(Budget::items(1), || scene.map(scene.place(0), MapFlags::HOST_MAP));
/// assert!(effort.steps() > 3);
/// assert_eq!(effort.audit(), []);
/// ```
#[derive(Debug, Default)]
pub struct Effort {
    /// 0: nobody is counting.
    most: AtomicU64,
    steps: AtomicU64,
    top: AtomicUsize,
    deepest: AtomicUsize,
    found: Mutex<Vec<Violation>>,
}

/// Calls that cost so many times their budget are cut short, since nothing else would end them.
const FOR_EVER: u64 = 100;

/// Where the stack is now, near enough.
#[inline(never)]
fn stack() -> usize {
    let here = 0_u8;
    core::ptr::from_ref(&here).addr()
}

impl Effort {
    /// Makes a call and counts it. Other threads' requests meanwhile are counted with it.
    pub fn call<R>(&self, budget: Budget, call: impl FnOnce() -> R) -> R {
        self.steps.store(0, Ordering::Relaxed);
        let top = stack();
        self.top.store(top, Ordering::Relaxed);
        self.deepest.store(top, Ordering::Relaxed);
        self.most
            .store(budget.steps.saturating_mul(FOR_EVER), Ordering::Relaxed);
        let result = call();
        self.most.store(0, Ordering::Relaxed);
        let (steps, depth) = (self.steps(), self.depth());
        if steps > budget.steps {
            self.report(format!("{steps} steps in a call that may take {}", budget.steps));
        }
        if depth > budget.stack {
            self.report(format!(
                "{depth} bytes of stack in a call that may take {}",
                budget.stack
            ));
        }
        result
    }

    /// Steps of the latest call.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Bytes of stack that the latest call took.
    #[must_use]
    pub fn depth(&self) -> usize {
        let top = self.top.load(Ordering::Relaxed);
        top.saturating_sub(self.deepest.load(Ordering::Relaxed))
    }

    /// The calls that cost too much. Empty: none.
    #[must_use]
    pub fn audit(&self) -> Vec<Violation> {
        self.found.lock().clone()
    }

    fn report(&self, what: String) {
        self.found.lock().push(Violation {
            audit: Audit::Work,
            mfn: None,
            what,
        });
    }
}

impl Watch for Effort {
    /// # Panics
    /// If the call goes on for ever.
    fn after(&self, _request: &Request, _answer: &Answer) {
        let most = self.most.load(Ordering::Relaxed);
        if most == 0 {
            return;
        }
        let steps = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        self.deepest.fetch_min(stack(), Ordering::Relaxed);
        assert!(steps <= most, "AUD-WRK: {steps} steps in one call");
    }
}
