//! One entry of a grant table, judged: what it says, who could use it, and what is wrong or suspicious about it.
//!
//! Wrong: no guest can mean it and no hypervisor leaves it so, or the operation that it is there for must fail. Suspicious:
//! it is allowed, and seldom meant.

use gnttab_abi::{
    DomId, EntryBodyV2, EntryFlags, EntryHead, EntryType, EntryV1, EntryV2, GrantRef, NR_RESERVED_ENTRIES,
    PAGE_SIZE, RESERVED_CONSOLE, RESERVED_XENSTORE,
};
use serde::Serialize;

/// The flags that nobody has given a meaning.
const RESERVED_FLAGS: EntryFlags = EntryFlags::from_bits_retain(0xfe00);
/// The bits that say how the page is cached.
const CACHE_FLAGS: EntryFlags = EntryFlags::from_bits_retain(0x00e0);
/// The first frame number beyond the physical addresses of any architecture.
pub(super) const FRAME_LIMIT: u64 = 1 << 40;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    Wrong,
    Suspicious,
}

impl Severity {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Severity::Wrong => "wrong",
            Severity::Suspicious => "suspicious",
        }
    }
}

/// What is wrong or suspicious.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    /// Stable, for programs.
    pub(crate) code: &'static str,
    /// For people.
    pub(crate) text: String,
}

/// What an entry is, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// All its bytes are zero.
    Free,
    /// Free, and something is left of its last use.
    LeftOver,
    /// A whole page is granted.
    Granted,
    /// A part of a page is granted, for copies alone.
    SubPage,
    /// Another domain's grant is passed on, for copies alone.
    Transitive,
    /// It waits for a transfer, or has had one.
    Transfer,
    /// A type that its version does not have.
    Invalid,
}

/// An entry, decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Decoded {
    pub(crate) gref: u32,
    pub(crate) state: State,
    /// The flags by name.
    pub(crate) flags: String,
    pub(crate) flag_bits: u16,
    pub(crate) domid: u16,
    pub(crate) readonly: bool,
    /// Its status word, where the version has one and it was given.
    pub(crate) status: Option<u16>,
    /// Marked in use for reading.
    pub(crate) reading: bool,
    /// Marked in use for writing.
    pub(crate) writing: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) frame: Option<u64>,
    /// First byte of a sub-page grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) page_off: Option<u16>,
    /// Bytes of a sub-page grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) length: Option<u16>,
    /// The far domain of a transitive grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trans_domid: Option<u16>,
    /// The far reference of a transitive grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trans_gref: Option<u32>,
    pub(crate) findings: Vec<Finding>,
}

impl Decoded {
    /// Whether the entry gives anybody anything.
    pub(crate) fn is_live(&self) -> bool {
        !matches!(self.state, State::Free | State::LeftOver)
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.reading || self.writing
    }

    /// The worst of its findings.
    pub(crate) fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).min()
    }

    pub(crate) fn find(&mut self, severity: Severity, code: &'static str, text: impl Into<String>) {
        let text = text.into();
        self.findings.push(Finding { severity, code, text });
    }

    fn wrong(&mut self, code: &'static str, text: impl Into<String>) {
        self.find(Severity::Wrong, code, text);
    }

    fn suspicious(&mut self, code: &'static str, text: impl Into<String>) {
        self.find(Severity::Suspicious, code, text);
    }

    /// What both versions have.
    fn new(gref: GrantRef, head: EntryHead, state: State) -> Decoded {
        let EntryHead { flags, domid } = head;
        let has_readonly = matches!(flags.kind(), EntryType::PermitAccess | EntryType::Transitive);
        Decoded {
            gref: gref.0,
            state,
            flags: flags.to_string(),
            flag_bits: flags.bits(),
            domid: domid.0,
            readonly: has_readonly && flags.contains(EntryFlags::READONLY),
            status: None,
            reading: false,
            writing: false,
            frame: None,
            page_off: None,
            length: None,
            trans_domid: None,
            trans_gref: None,
            findings: Vec::new(),
        }
    }

    /// The marks that the hypervisor keeps, from wherever the version has them.
    fn mark(&mut self, marks: EntryFlags) {
        self.reading = marks.contains(EntryFlags::READING);
        self.writing = marks.contains(EntryFlags::WRITING);
        if self.writing && !self.reading {
            self.wrong(
                "writing-alone",
                "marked in use for writing and not for reading: the hypervisor sets both and clears reading last",
            );
        }
        if self.writing && self.readonly {
            self.suspicious(
                "narrowed-in-use",
                "read-only, and in use for writing: the granter took the right to write back while a peer had it, which keeps it",
            );
        }
        if self.is_in_use() && !self.is_live() {
            self.wrong(
                "freed-in-use",
                "ended while marked in use: the peer still has the page, and the reference must not be used again",
            );
        }
    }

    /// What is wrong with the parts that both versions have.
    fn judge_head(&mut self, head: EntryHead, owner: Option<DomId>) {
        let EntryHead { flags, domid } = head;
        let kind = flags.kind();
        if kind == EntryType::AcceptTransfer {
            self.judge_transfer(flags);
        } else if flags.intersects(RESERVED_FLAGS) {
            let bits = (flags & RESERVED_FLAGS).bits();
            self.suspicious(
                "reserved-bits",
                format!(
                    "reserved flags {bits:#06x} are set: nobody looks at them today, a later version may"
                ),
            );
        }
        if kind == EntryType::Invalid {
            let others = flags - EntryFlags::TYPE_MASK - EntryFlags::IN_USE - RESERVED_FLAGS;
            if !others.is_empty() {
                self.suspicious(
                    "flags-without-type",
                    format!("flags {:#06x} on an entry without a type", others.bits()),
                );
            }
            return;
        }
        if !domid.is_ordinary() {
            self.wrong(
                "no-such-domain",
                format!(
                    "granted to {:#06x}, a number that no domain has: nobody can use it",
                    domid.0
                ),
            );
        } else if Some(domid) == owner {
            self.suspicious("to-itself", "granted to the domain that owns the table");
        }
    }

    fn judge_transfer(&mut self, flags: EntryFlags) {
        match flags.bits() {
            0x2 => self.suspicious(
                "no-mapping",
                "waits for a transfer: no mapping and no copy can use it, and only PV guests can transfer",
            ),
            0x6 => self.suspicious(
                "transfer-stuck",
                "a transfer was promised and has not ended: if the giver is idle it failed on the way, and never will",
            ),
            0xe => {}
            bits => self.wrong(
                "transfer-flags",
                format!("flags {bits:#06x}: a transfer needs exactly 0x0002, so none can come"),
            ),
        }
    }

    fn judge_frame(&mut self, frame: u64) {
        if frame == 0 {
            self.suspicious(
                "frame-0",
                "grants frame 0: was the frame written before the flags?",
            );
        } else if frame >= FRAME_LIMIT {
            self.wrong(
                "frame-too-big",
                format!("frame {frame:#x} is beyond any machine's memory"),
            );
        }
    }
}

/// What the reserved references are for.
pub(crate) fn reserved_name(gref: u32) -> Option<&'static str> {
    match GrantRef(gref) {
        RESERVED_CONSOLE => Some("console"),
        RESERVED_XENSTORE => Some("store"),
        GrantRef(gref) if gref < NR_RESERVED_ENTRIES => Some("reserved"),
        _ => None,
    }
}

/// An entry of version 1.
pub(crate) fn v1(gref: GrantRef, entry: EntryV1, owner: Option<DomId>) -> Decoded {
    let flags = entry.head.flags;
    let state = match flags.kind() {
        EntryType::Invalid if entry == EntryV1::default() => State::Free,
        EntryType::Invalid => State::LeftOver,
        EntryType::PermitAccess => State::Granted,
        EntryType::AcceptTransfer => State::Transfer,
        EntryType::Transitive => State::Invalid,
    };
    let mut decoded = Decoded::new(gref, entry.head, state);
    decoded.frame = Some(entry.frame.into());
    decoded.judge_head(entry.head, owner);
    // In an entry that waits for a transfer, bit 3 says something else.
    if state != State::Transfer {
        decoded.mark(flags);
    }
    match state {
        State::Granted => {
            decoded.judge_frame(entry.frame.into());
            if flags.contains(EntryFlags::SUB_PAGE) {
                decoded.suspicious(
                    "sub-page-v1",
                    "sub_page means nothing in version 1: mapping is refused, and copies reach the whole page",
                );
            }
        }
        State::Invalid => decoded.wrong(
            "type-not-in-v1",
            "type 3 (transitive) is none in version 1: no mapping and no copy can use it",
        ),
        _ => {}
    }
    decoded
}

/// An entry of version 2, with its status word if that is known.
pub(crate) fn v2(
    gref: GrantRef,
    entry: EntryV2,
    status: Option<EntryFlags>,
    owner: Option<DomId>,
) -> Decoded {
    let flags = entry.head.flags;
    let body = entry.body();
    let state = match (flags.kind(), body) {
        (EntryType::Invalid, _) if entry == EntryV2::default() => State::Free,
        (EntryType::Invalid, _) => State::LeftOver,
        (EntryType::PermitAccess, EntryBodyV2::SubPage { .. }) => State::SubPage,
        (EntryType::PermitAccess, _) => State::Granted,
        (EntryType::AcceptTransfer, _) => State::Transfer,
        (EntryType::Transitive, _) => State::Transitive,
    };
    let mut decoded = Decoded::new(gref, entry.head, state);
    decoded.judge_head(entry.head, owner);
    if state != State::Transfer && flags.intersects(EntryFlags::IN_USE) {
        decoded.suspicious(
            "marks-in-flags",
            "reading or writing is set in the flags: in version 2 the marks are in the status word, and these mean nothing",
        );
    }
    if let Some(status) = status {
        decoded.status = Some(status.bits());
        decoded.mark(status);
        judge_status(&mut decoded, status);
    }
    match body {
        EntryBodyV2::FullPage { frame } => {
            decoded.frame = Some(frame);
            if state == State::Granted {
                decoded.judge_frame(frame);
                if (entry.half, entry.length) != (0, 0) {
                    decoded.suspicious("padding", "bytes 4 to 7 of a whole-page grant are not zero");
                }
            }
        }
        EntryBodyV2::SubPage {
            page_off,
            length,
            frame,
        } => {
            (decoded.page_off, decoded.length, decoded.frame) = (Some(page_off), Some(length), Some(frame));
            decoded.judge_frame(frame);
            judge_part(&mut decoded, page_off, length);
        }
        EntryBodyV2::Transitive {
            trans_domid,
            gref: far,
        } => {
            (decoded.trans_domid, decoded.trans_gref) = (Some(trans_domid.0), Some(far.0));
            judge_transitive(&mut decoded, entry, trans_domid, owner);
        }
    }
    decoded
}

fn judge_status(decoded: &mut Decoded, status: EntryFlags) {
    let others = status - EntryFlags::IN_USE;
    if !others.is_empty() {
        decoded.suspicious(
            "status-bits",
            format!(
                "status word has bits {:#06x} that the hypervisor does not write",
                others.bits()
            ),
        );
    }
}

fn judge_part(decoded: &mut Decoded, page_off: u16, length: u16) {
    let end = u32::from(page_off) + u32::from(length);
    if usize::try_from(end).is_ok_and(|end| end > PAGE_SIZE) {
        decoded.wrong(
            "past-page",
            format!("bytes {page_off} to {end} are past the page's {PAGE_SIZE}"),
        );
    } else if length == 0 {
        decoded.suspicious("empty-part", "grants no byte");
    }
    decoded.suspicious("copy-only", "a part of a page: copies can use it, no mapping can");
}

fn judge_transitive(decoded: &mut Decoded, entry: EntryV2, trans_domid: DomId, owner: Option<DomId>) {
    decoded.suspicious(
        "copy-only",
        "a transitive grant: copies can use it, no mapping can, and many machines refuse it altogether",
    );
    if !trans_domid.is_ordinary() {
        decoded.wrong(
            "no-such-far-domain",
            format!(
                "passes on a grant of {:#06x}, a number that no domain has",
                trans_domid.0
            ),
        );
    } else if owner == Some(trans_domid) {
        decoded.wrong(
            "transitive-to-itself",
            "passes on a grant of the very domain that owns the table: every use fails",
        );
    } else if owner.is_none() && decoded.trans_gref == Some(decoded.gref) {
        decoded.suspicious(
            "transitive-to-itself",
            format!("if the table is {trans_domid}'s, it passes itself on and every use fails (say whose it is with --owner)"),
        );
    }
    if entry.length != 0 || entry.frame > u64::from(u32::MAX) {
        decoded.suspicious("padding", "the unused bytes of a transitive grant are not zero");
    }
    let pointless = entry.head.flags & (CACHE_FLAGS | EntryFlags::SUB_PAGE);
    if !pointless.is_empty() {
        decoded.suspicious(
            "flags-without-meaning",
            format!(
                "flags {:#06x} mean nothing on a transitive grant",
                pointless.bits()
            ),
        );
    }
}

/// A status word by itself.
pub(crate) fn status(gref: GrantRef, status: EntryFlags) -> Decoded {
    // What the entry itself says is not known: taken as granted, since only the marks are judged.
    let state = if status.is_empty() {
        State::Free
    } else {
        State::Granted
    };
    let mut decoded = Decoded::new(gref, EntryHead::default(), state);
    decoded.flags = String::new();
    decoded.status = Some(status.bits());
    decoded.mark(status);
    judge_status(&mut decoded, status);
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    const D2: DomId = DomId(2);

    fn head(flags: u16) -> EntryHead {
        EntryHead {
            flags: EntryFlags::from_bits_retain(flags),
            domid: D2,
        }
    }

    fn codes(decoded: &Decoded) -> Vec<&'static str> {
        decoded.findings.iter().map(|finding| finding.code).collect()
    }

    fn v1_codes(flags: u16) -> Vec<&'static str> {
        let entry = EntryV1 {
            head: head(flags),
            frame: 0x1234,
        };
        codes(&v1(GrantRef(9), entry, None))
    }

    fn v2_codes(flags: u16, body: EntryBodyV2, status: u16) -> Vec<&'static str> {
        let status = EntryFlags::from_bits_retain(status);
        codes(&v2(
            GrantRef(9),
            EntryV2::new(head(flags), body),
            Some(status),
            Some(DomId(1)),
        ))
    }

    const PAGE: EntryBodyV2 = EntryBodyV2::FullPage { frame: 0x1234 };

    fn part(page_off: u16, length: u16) -> EntryBodyV2 {
        EntryBodyV2::SubPage {
            page_off,
            length,
            frame: 0x1234,
        }
    }

    fn via(domid: u16) -> EntryBodyV2 {
        EntryBodyV2::Transitive {
            trans_domid: DomId(domid),
            gref: GrantRef(3),
        }
    }

    #[test]
    fn what_a_driver_and_a_hypervisor_leave_is_found_good() {
        for flags in [0, 0x1, 0x5, 0x9, 0x19, 0xd, 0xe, 0xe1] {
            assert_eq!(v1_codes(flags), [""; 0], "{flags:#x}");
        }
        for (flags, status) in [(0, 0), (1, 0), (1, 8), (1, 0x18), (5, 8), (0xe, 0)] {
            assert_eq!(v2_codes(flags, PAGE, status), [""; 0], "{flags:#x} {status:#x}");
        }
    }

    #[test]
    fn each_kind_of_harm_in_version_1_is_found() {
        for (flags, code) in [
            (0x2, "no-mapping"),
            (0x6, "transfer-stuck"),
            (0x22, "transfer-flags"),
            (0xa, "transfer-flags"),
            (0x3, "type-not-in-v1"),
            (0x8, "freed-in-use"),
            (0x4, "flags-without-type"),
            (0x11, "writing-alone"),
            (0x1d, "narrowed-in-use"),
            (0x101, "sub-page-v1"),
            (0x8001, "reserved-bits"),
        ] {
            assert_eq!(v1_codes(flags), [code], "{flags:#x}");
        }
    }

    #[test]
    fn each_kind_of_harm_in_version_2_is_found() {
        for (flags, body, status, expected) in [
            (0x101, part(4000, 97), 0, &["past-page", "copy-only"][..]),
            (0x101, part(4000, 96), 0, &["copy-only"]),
            (0x101, part(0xffff, 0xffff), 0, &["past-page", "copy-only"]),
            (0x101, part(10, 0), 0, &["empty-part", "copy-only"]),
            (0x3, via(1), 0, &["copy-only", "transitive-to-itself"]),
            (0x3, via(5), 0, &["copy-only"]),
            (0x3, via(0x7ff0), 0, &["copy-only", "no-such-far-domain"]),
            (0x103, via(5), 0, &["copy-only", "flags-without-meaning"]),
            (0x0, PAGE, 0x18, &["freed-in-use"]),
            (0x1, PAGE, 0x10, &["writing-alone"]),
            (0x1, PAGE, 0x20, &["status-bits"]),
            (0x9, PAGE, 0, &["marks-in-flags"]),
            (
                0x1,
                EntryBodyV2::FullPage { frame: 1 << 52 },
                0,
                &["frame-too-big"],
            ),
            (0x1, EntryBodyV2::FullPage { frame: 0 }, 0, &["frame-0"]),
        ] {
            assert_eq!(
                v2_codes(flags, body, status),
                expected,
                "{flags:#x} {body:?} {status:#x}"
            );
        }
    }

    #[test]
    fn domains_that_cannot_be_are_found() {
        let mut entry = EntryV1 {
            head: head(1),
            frame: 7,
        };
        assert_eq!(codes(&v1(GrantRef(9), entry, Some(D2))), ["to-itself"]);
        entry.head.domid = DomId::SELF;
        assert_eq!(codes(&v1(GrantRef(9), entry, None)), ["no-such-domain"]);
        // What is free grants nobody anything, whatever is left in it.
        entry.head.flags = EntryFlags::empty();
        assert_eq!(codes(&v1(GrantRef(9), entry, None)), [""; 0]);
    }

    #[test]
    fn without_an_owner_an_entry_that_may_be_its_own_is_suspected() {
        let entry = EntryV2::new(
            head(3),
            EntryBodyV2::Transitive {
                trans_domid: DomId(1),
                gref: GrantRef(9),
            },
        );
        let found = |owner| codes(&v2(GrantRef(9), entry, None, owner));
        assert_eq!(found(None), ["copy-only", "transitive-to-itself"]);
        assert_eq!(found(Some(DomId(5))), ["copy-only"]);
    }
}
