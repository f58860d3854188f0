//! The private state of a grant entry: one word that says who uses it and how, and the frame.
//!
//! ```text
//! bit   0        8        16       24       32            47        48     49          63
//!       | writes | reads  | writes | reads  | grantee     | partial | far  | top of    | busy
//!       |  host  |  host  | device | device | (15 bits)   |         |      | the frame |
//! ```
//!
//! The rest of the frame's number, its low 32 bits, is a word of its own: twelve bytes for each reference.
//!
//! The protocol, which is the whole of the locking between users of one entry:
//! 1. Whoever finds the entry pinned in the way it needs adds its pins with one compare-and-swap.
//!    It has then a share in the frame, which cannot change while any pin is left.
//! 2. Whoever has to touch the shared entry (first use, upgrade to writing, last use, last
//!    write) first sets `busy` with a compare-and-swap, and holds it for that step only, or for the
//!    whole of a use that is one brief copy. Nobody else changes the word meanwhile. This is the
//!    exclusion between "last unpin" and "first pin" that spec 8.3 calls essential.
//! 3. `busy` is cleared by one store that also publishes the new pins, the grantee and, through
//!    release ordering, the frame.
//!
//! What must always hold: no pins means the word is 0 or only `busy`; each counter is at most 128.

use gnttab_abi::{DomId, GrantRef, MapFlags, Mfn};

use crate::ahead::fetch_to_write;
use crate::sync::{AtomicU32, AtomicU64, Ordering, spin_loop};

/// Counters to be added to, or taken from, an entry's pins: at most one of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Pins(u32);

impl Pins {
    pub(crate) const HOST_WRITE: Pins = Pins(1);
    pub(crate) const HOST_READ: Pins = Pins(1 << 8);
    pub(crate) const DEVICE_WRITE: Pins = Pins(1 << 16);
    #[cfg(test)]
    pub(crate) const DEVICE_READ: Pins = Pins(1 << 24);

    /// By the three flags that matter.
    const OF_FLAGS: [Pins; 8] = {
        let (host, device) = (MapFlags::HOST_MAP.bits(), MapFlags::DEVICE_MAP.bits());
        let read_only = MapFlags::READONLY.bits();
        assert!(host | device | read_only == 7, "they are the lowest");
        let mut all = [Pins(0); 8];
        let mut flags = 0;
        while flags < 8 {
            // The counter of reads lies above that of writes.
            let above = if flags & read_only == 0 { 0 } else { 8 };
            if flags & host != 0 {
                all[flags as usize].0 |= Pins::HOST_WRITE.0 << above;
            }
            if flags & device != 0 {
                all[flags as usize].0 |= Pins::DEVICE_WRITE.0 << above;
            }
            flags += 1;
        }
        all
    };
    const TOP_BITS: u32 = 0x8080_8080;
    const WRITES: u32 = 0x00FF_00FF;

    /// What a mapping with these flags pins (spec 3.3 step 1).
    #[inline]
    pub(crate) fn of_mapping(flags: MapFlags) -> Pins {
        Self::OF_FLAGS[(flags.bits() & 7) as usize]
    }

    #[inline]
    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The four counters of an entry, for observers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinCounts {
    /// Uses by processors that may write: mappings and copies.
    pub host_write: u8,
    /// Uses by processors that only read.
    pub host_read: u8,
    /// Writable device mappings.
    pub device_write: u8,
    /// Read-only device mappings.
    pub device_read: u8,
}

impl PinCounts {
    /// Whether anybody uses the entry.
    #[must_use]
    pub fn any(self) -> bool {
        self != PinCounts::default()
    }
}

/// A value of the state word; by default that of an entry nobody uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct State(u64);

impl State {
    const PARTIAL: u64 = 1 << 47;
    const FAR: u64 = 1 << 48;
    const TOP_SHIFT: u32 = 49;
    const TOP_MASK: u64 = (1 << (MFN_BITS - 32)) - 1;
    const BUSY: u64 = 1 << 63;
    const GRANTEE_SHIFT: u32 = 32;
    const GRANTEE_MASK: u64 = 0x7FFF;

    /// The first use of an entry.
    #[inline]
    pub(crate) fn first(grantee: DomId, kind: UseKind, pins: Pins) -> State {
        let kind = match kind {
            UseKind::Whole => 0,
            UseKind::SubPage => Self::PARTIAL,
            UseKind::Transitive => Self::PARTIAL | Self::FAR,
        };
        State(u64::from(pins.0) | (u64::from(grantee.0) & Self::GRANTEE_MASK) << Self::GRANTEE_SHIFT | kind)
    }

    #[inline]
    fn with_top_of(self, mfn: Mfn) -> State {
        debug_assert!(mfn.0 >> MFN_BITS == 0, "rule 4 of a hypervisor");
        State(self.0 | (mfn.0 >> 32 & Self::TOP_MASK) << Self::TOP_SHIFT)
    }

    #[inline]
    fn top_of_mfn(self) -> u64 {
        self.0 >> Self::TOP_SHIFT & Self::TOP_MASK
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the counters are the low half of the word"
    )]
    #[inline]
    pub(crate) const fn pins(self) -> u32 {
        self.0 as u32
    }

    #[inline]
    pub(crate) const fn is_busy(self) -> bool {
        self.0 & Self::BUSY != 0
    }

    #[inline]
    pub(crate) const fn is_pinned(self) -> bool {
        self.pins() != 0
    }

    #[inline]
    pub(crate) const fn is_write_pinned(self) -> bool {
        self.pins() & Pins::WRITES != 0
    }

    /// Whether there are these pins and no others.
    #[inline]
    pub(crate) const fn is_just(self, pins: Pins) -> bool {
        self.pins() == pins.0
    }

    /// The domain that uses the entry. Meaningful while pinned.
    #[inline]
    pub(crate) fn grantee(self) -> DomId {
        DomId(u16::try_from(self.0 >> Self::GRANTEE_SHIFT & Self::GRANTEE_MASK).unwrap_or(DomId::INVALID.0))
    }

    /// Sub-page or transitive: for copy only.
    #[inline]
    pub(crate) const fn is_partial(self) -> bool {
        self.0 & Self::PARTIAL != 0
    }

    /// The frame is another domain's, through a transitive grant.
    #[inline]
    pub(crate) const fn is_transitive(self) -> bool {
        self.0 & Self::FAR != 0
    }

    /// Whether one of the wanted counters has no room (spec 2.3, overflow rule).
    #[inline]
    pub(crate) const fn is_full_for(self, wanted: Pins) -> bool {
        // Each wanted counter is 1: shifted to the top of its byte it selects that counter's bit.
        self.pins() & (wanted.0 << 7) & Pins::TOP_BITS != 0
    }

    #[inline]
    pub(crate) fn plus(self, wanted: Pins) -> State {
        State(self.0 + u64::from(wanted.0))
    }

    /// With fewer pins; the empty word when none are left.
    #[inline]
    fn minus(self, pins: Pins) -> State {
        let left = State(self.0 - u64::from(pins.0));
        if left.is_pinned() { left } else { State(0) }
    }

    pub(crate) fn counts(self) -> PinCounts {
        let [host_write, host_read, device_write, device_read] = self.pins().to_le_bytes();
        PinCounts {
            host_write,
            host_read,
            device_write,
            device_read,
        }
    }
}

/// What an entry in use gives access to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum UseKind {
    Whole,
    SubPage,
    Transitive,
}

/// Bits that a frame's number may have (see [`Hypervisor`](crate::Hypervisor)).
const MFN_BITS: u32 = 46;

/// The active entries of `N` neighbours, a power of two.
pub(crate) struct Actives<const N: usize> {
    states: [AtomicU64; N],
    frames: [AtomicU32; N],
}

impl<const N: usize> Actives<N> {
    pub(crate) fn new() -> Actives<N> {
        const { assert!(N.is_power_of_two()) };
        Actives {
            states: core::array::from_fn(|_| AtomicU64::new(0)),
            frames: core::array::from_fn(|_| AtomicU32::new(0)),
        }
    }

    /// One of them. The index is taken modulo `N`.
    #[inline(always)]
    pub(crate) fn get(&self, index: usize) -> Active<'_> {
        let index = index & (N - 1);
        Active {
            state: &self.states[index],
            frame: &self.frames[index],
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Active<'_>> {
        (0..N).map(|index| self.get(index))
    }
}

/// One active entry.
#[derive(Clone, Copy)]
pub(crate) struct Active<'a> {
    state: &'a AtomicU64,
    /// Low bits of the frame's number. Meaningful while pinned; written under `busy` only.
    frame: &'a AtomicU32,
}

impl<'a> Active<'a> {
    /// A hint: the entry will be used soon.
    #[inline(always)]
    pub(crate) fn expect(self) {
        fetch_to_write(self.state);
        fetch_to_write(self.frame);
    }

    /// A look at the state that nobody else is in the middle of changing.
    #[inline]
    pub(crate) fn load(self) -> State {
        // Whoever looks is about to change it.
        fetch_to_write(self.state);
        loop {
            let state = State(self.state.load(Ordering::Acquire));
            if !state.is_busy() {
                return state;
            }
            spin_loop();
        }
    }

    /// Whether nobody uses the entry, or is about to.
    #[inline(always)]
    pub(crate) fn is_unused(self) -> bool {
        // Whoever looks is about to change it.
        fetch_to_write(self.state);
        self.state.load(Ordering::Relaxed) == 0
    }

    /// A look without waiting, for observers. Pins of a use that is just beginning may be missing.
    pub(crate) fn peek(self) -> State {
        State(self.state.load(Ordering::Acquire))
    }

    /// The frame. Stable while the caller, or a mapping it looks at, holds a pin.
    #[inline]
    pub(crate) fn mfn(self) -> Mfn {
        let top = State(self.state.load(Ordering::Relaxed)).top_of_mfn();
        Mfn(u64::from(self.frame.load(Ordering::Relaxed)) | top << 32)
    }

    /// Adds pins to a state that allows them (protocol step 1). False: the state has moved.
    #[inline]
    pub(crate) fn add_pins(self, seen: State, wanted: Pins) -> bool {
        self.exchange(seen, seen.plus(wanted))
    }

    /// Takes the entry for a step that touches the shared entry (protocol step 2). `None`: the
    /// state has moved.
    #[inline]
    pub(crate) fn claim(self, seen: State) -> Option<Claim<'a>> {
        // Lazily: a claim that was not had must not be made, for its drop writes.
        self.exchange(seen, State(seen.0 | State::BUSY)).then(|| Claim {
            entry: self,
            result: seen,
        })
    }

    /// Lowers pins in a state that was `seen`. `news` says what a state with the pins already lowered means to
    /// the shared entry; if anything, `tell` is called with it, and with the entry held.
    #[inline(always)]
    pub(crate) fn drop_pins<N>(
        self,
        mut seen: State,
        pins: Pins,
        news: impl Fn(State) -> Option<N>,
        tell: impl FnOnce(N),
    ) {
        loop {
            let left = seen.minus(pins);
            match news(left) {
                None => {
                    if self.exchange(seen, left) {
                        return;
                    }
                }
                Some(news) => {
                    if let Some(mut claim) = self.claim(seen) {
                        tell(news);
                        claim.result = left;
                        return;
                    }
                }
            }
            seen = self.load();
        }
    }

    #[inline]
    fn exchange(self, seen: State, new: State) -> bool {
        self.state
            .compare_exchange(seen.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

/// An entry held by `busy`. Dropped, it publishes the state that was set, by default the one that
/// was found.
pub(crate) struct Claim<'a> {
    entry: Active<'a>,
    result: State,
}

impl Claim<'_> {
    /// The first use: the frame becomes known, then the state, which is given back as it is then.
    #[inline]
    pub(crate) fn publish_first(mut self, mfn: Mfn, state: State) -> State {
        self.entry.frame.store(low_of(mfn), Ordering::Relaxed);
        self.result = state.with_top_of(mfn);
        self.result
    }

    /// The end of the last use.
    #[inline]
    pub(crate) fn publish_unused(mut self) {
        self.result = State::default();
    }

    /// A further use.
    #[inline]
    pub(crate) fn publish_more(mut self, wanted: Pins) {
        self.result = self.result.plus(wanted);
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        self.entry.state.store(self.result.0, Ordering::Release);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half")]
#[inline]
fn low_of(mfn: Mfn) -> u32 {
    mfn.0 as u32
}

/// What a version 2 entry in use needs beyond frame and state, in one word; written under `busy`
/// only, meaningful while pinned and partial.
///
/// Sub-page: first byte (15 bits) and length. Transitive: the far domain and reference; the range
/// is that of the far entry, which stays pinned for as long as this one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extra(pub(crate) u64);

impl Extra {
    pub(crate) fn sub_page(start: u16, length: u16) -> Extra {
        Extra(u64::from(start) | u64::from(length) << 16)
    }

    /// What is kept of a sub-page's part.
    pub(crate) fn kept(self) -> Extra {
        Extra(self.0 & !0x8000)
    }

    pub(crate) fn transitive(domid: DomId, gref: GrantRef) -> Extra {
        Extra(u64::from(gref.0) | u64::from(domid.0) << 32)
    }

    pub(crate) fn range(self) -> (u16, u16) {
        let [a, b, c, d, ..] = self.0.to_le_bytes();
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }

    pub(crate) fn far(self) -> (DomId, GrantRef) {
        let [a, b, c, d, e, f, ..] = self.0.to_le_bytes();
        (
            DomId(u16::from_le_bytes([e, f])),
            GrantRef(u32::from_le_bytes([a, b, c, d])),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D2: DomId = DomId(2);
    /// With the lowest and the highest bit that a frame's number may have.
    const FRAME: Mfn = Mfn(1 << (MFN_BITS - 1) | 7);

    fn first(entry: Active<'_>, pins: Pins) {
        let claim = entry.claim(entry.load()).unwrap();
        claim.publish_first(FRAME, State::first(D2, UseKind::Whole, pins));
    }

    #[test]
    fn each_counter_reaches_128_and_no_more() {
        for pins in [
            Pins::HOST_READ,
            Pins::HOST_WRITE,
            Pins::DEVICE_READ,
            Pins::DEVICE_WRITE,
        ] {
            let actives = Actives::<1>::new();
            let entry = actives.get(0);
            first(entry, pins);
            for _ in 1..128 {
                assert!(!entry.load().is_full_for(pins));
                assert!(entry.add_pins(entry.load(), pins));
            }
            let full = entry.load();
            assert!(full.is_full_for(pins), "the 129th use is refused");
            let others = [
                Pins::HOST_READ,
                Pins::HOST_WRITE,
                Pins::DEVICE_READ,
                Pins::DEVICE_WRITE,
            ];
            for other in others.into_iter().filter(|o| *o != pins) {
                assert!(!full.is_full_for(other), "one counter's limit is not another's");
            }
        }
    }

    #[test]
    fn the_last_pin_leaves_an_empty_word() {
        let actives = Actives::<1>::new();
        let entry = actives.get(0);
        first(entry, Pins::HOST_WRITE);
        assert!(entry.add_pins(entry.load(), Pins::HOST_READ));
        entry.drop_pins(entry.load(), Pins::HOST_WRITE, |_| None, |()| ());
        assert_eq!((entry.load().grantee(), entry.mfn()), (D2, FRAME));
        entry.drop_pins(
            entry.load(),
            Pins::HOST_READ,
            |left| (!left.is_pinned()).then_some(left),
            |left| assert_eq!(left, State(0)),
        );
        assert_eq!(entry.load(), State(0));
    }

    #[test]
    fn a_claim_that_is_given_up_leaves_the_state_alone() {
        let actives = Actives::<1>::new();
        let entry = actives.get(0);
        first(entry, Pins::HOST_READ);
        let before = entry.load();
        drop(entry.claim(before).unwrap());
        assert_eq!(entry.load(), before);
    }

    #[test]
    fn a_claim_that_was_not_had_changes_nothing() {
        let actives = Actives::<1>::new();
        let entry = actives.get(0);
        let before = entry.load();
        first(entry, Pins::HOST_READ);
        assert!(entry.claim(before).is_none());
        assert!(entry.load().is_pinned());
    }

    #[test]
    fn extra_words_give_back_what_was_put_in() {
        assert_eq!(Extra::sub_page(0x7FFF, 0xFFFF).range(), (0x7FFF, 0xFFFF));
        let far = (DomId(0x7FEF), GrantRef(u32::MAX));
        assert_eq!(Extra::transitive(far.0, far.1).far(), far);
    }
}
