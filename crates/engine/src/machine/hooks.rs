//! Stopping the engine at a chosen point, or doing something just there.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;

use crate::hypervisor::Hook;

type Action = Box<dyn FnMut() + Send>;

/// What happens at each [`Hook`].
///
/// An action runs on the actor that reached the hook, with no lock of the machine held: it may
/// use the machine and, as another processor, the engine. While it runs, the hook does nothing to
/// others, nor to the action's own calls.
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use std::sync::Arc;
///
/// use gnttab_engine::machine::Machine;
/// use gnttab_engine::{Hook, Hypervisor};
///
/// let machine = Machine::new();
/// let seen = Arc::new(AtomicU32::new(0));
/// let count = Arc::clone(&seen);
/// machine.hooks().at(Hook::MapPinned, move || {
///     count.fetch_add(1, Ordering::Relaxed);
/// });
/// machine.hook(Hook::MapPinned);
/// machine.hook(Hook::MapPublish);
/// assert_eq!(seen.load(Ordering::Relaxed), 1);
/// ```
#[derive(Default)]
pub struct Hooks {
    /// Whether anything is there at all; keeps the common case to one load.
    armed: AtomicBool,
    actions: Mutex<Actions>,
    relax: Mutex<Option<fn()>>,
}

#[derive(Default)]
struct Actions {
    set: Vec<Armed>,
    next_id: u64,
}

struct Armed {
    id: u64,
    hook: Hook,
    /// Taken out while it runs.
    action: Option<Action>,
}

impl Hooks {
    /// Runs `action` each time that somebody reaches `hook`. Several actions of one hook run in
    /// the order in which they were set.
    pub fn at(&self, hook: Hook, action: impl FnMut() + Send + 'static) {
        let mut actions = self.actions.lock();
        let id = actions.next_id;
        actions.next_id += 1;
        let action: Option<Action> = Some(Box::new(action));
        actions.set.push(Armed { id, hook, action });
        self.armed.store(true, Ordering::Release);
    }

    /// Runs `action` the next time that somebody reaches `hook`.
    pub fn once(&self, hook: Hook, action: impl FnOnce() + Send + 'static) {
        let mut action = Some(action);
        self.at(hook, move || {
            if let Some(action) = action.take() {
                action();
            }
        });
    }

    /// Stops the next actor that reaches `hook`, until [`Parked::release`]. Needs threads.
    pub fn park(&self, hook: Hook) -> Parked {
        let gate = Arc::new(Gate::default());
        let relax = self.relax.lock().unwrap_or(spin_loop);
        let inside = Arc::clone(&gate);
        self.once(hook, move || {
            inside.arrived.store(true, Ordering::Release);
            while !inside.open.load(Ordering::Acquire) {
                relax();
            }
        });
        Parked { gate, relax }
    }

    /// What a parked actor, and whoever waits for it, does meanwhile; a test on an operating
    /// system gives `std::thread::yield_now`.
    pub fn set_relax(&self, relax: fn()) {
        *self.relax.lock() = Some(relax);
    }

    /// Forgets all actions; who is parked stays so.
    pub fn clear(&self) {
        self.armed.store(false, Ordering::Release);
        let forgotten = core::mem::take(&mut self.actions.lock().set);
        // Dropped without the lock: an action may own anything.
        drop(forgotten);
    }

    /// Somebody reached a hook.
    pub(super) fn reached(&self, hook: Hook) {
        if !self.armed.load(Ordering::Acquire) {
            return;
        }
        let here: Vec<u64> = {
            let actions = self.actions.lock();
            let here = actions.set.iter().filter(|armed| armed.hook == hook);
            here.map(|armed| armed.id).collect()
        };
        for id in here {
            // Taken out while it runs, so that it can reach hooks itself.
            let Some(mut action) = self.with(id, Option::take).flatten() else {
                continue;
            };
            action();
            self.with(id, |place| *place = Some(action));
        }
    }

    fn with<R>(&self, id: u64, f: impl FnOnce(&mut Option<Action>) -> R) -> Option<R> {
        let mut actions = self.actions.lock();
        let armed = actions.set.iter_mut().find(|armed| armed.id == id)?;
        Some(f(&mut armed.action))
    }
}

impl core::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Hooks")
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Gate {
    arrived: AtomicBool,
    open: AtomicBool,
}

/// A place at which one actor is, or will be, stopped. Dropping it lets the actor go.
#[must_use = "dropping it lets the actor go at once"]
pub struct Parked {
    gate: Arc<Gate>,
    relax: fn(),
}

impl Parked {
    /// Whether the actor is there.
    #[must_use]
    pub fn arrived(&self) -> bool {
        self.gate.arrived.load(Ordering::Acquire)
    }

    /// Waits until the actor is there.
    pub fn wait(&self) {
        while !self.arrived() {
            (self.relax)();
        }
    }

    /// Lets the actor go on, now or when it comes.
    pub fn release(self) {}
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.gate.open.store(true, Ordering::Release);
    }
}
