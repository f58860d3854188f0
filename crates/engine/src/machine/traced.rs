//! Writing down what the engine asks.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use spin::Mutex;

use super::between::{Between, Watch};
use super::request::{Answer, Request};

/// A request and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What was asked.
    pub request: Request,
    /// What was answered.
    pub answer: Answer,
}

/// `resolve d1 gfn 0x1004 rw -> frame 0x1004 of d1`.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.request, self.answer)
    }
}

/// The latest events, as many as it may hold.
#[derive(Debug)]
pub struct Trace {
    capacity: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<Event>,
    dropped: u64,
}

impl Trace {
    /// A trace of at most `capacity` events; older ones make room.
    #[must_use]
    pub fn new(capacity: usize) -> Trace {
        Trace {
            capacity,
            kept: Mutex::default(),
        }
    }

    /// The events, oldest first, which the trace forgets.
    pub fn take(&self) -> Vec<Event> {
        self.kept.lock().events.drain(..).collect()
    }

    /// How many events made room for others since the beginning.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.kept.lock().dropped
    }
}

impl Watch for Trace {
    fn after(&self, request: &Request, answer: &Answer) {
        let mut kept = self.kept.lock();
        if kept.events.len() >= self.capacity {
            kept.events.pop_front();
            kept.dropped += 1;
        }
        if self.capacity != 0 {
            let (request, answer) = (*request, *answer);
            kept.events.push_back(Event { request, answer });
        }
    }
}

/// A hypervisor whose every call is written down.
///
/// ```
/// use gnttab_abi::MapFlags;
/// use gnttab_engine::machine::{Scene, Traced};
///
/// let scene = Scene::pv().build_on(|machine| Traced::tracing(machine, 100));
/// let trace = scene.engine.hypervisor().watch();
/// trace.take();
/// scene.map(scene.place(0), MapFlags::HOST_MAP | MapFlags::READONLY);
///
/// let lines: Vec<String> = trace.take().iter().map(|event| event.to_string()).collect();
/// let frame = scene.frame.mfn;
/// assert!(lines.contains(&format!("resolve d1 gfn {frame} ro -> frame {frame} of d1")));
/// assert!(lines.contains(&format!(
///     "map_host d2 0x40000000 frame {frame} of d1 host_map|readonly -> done"
/// )));
/// ```
pub type Traced<H> = Between<H, Trace>;

impl<H> Between<H, Trace> {
    /// `hv`, with a trace of at most `capacity` events.
    pub fn tracing(hv: H, capacity: usize) -> Traced<H> {
        Between::new(hv, Trace::new(capacity))
    }
}
