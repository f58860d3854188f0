//! What Xen's own C costs, to hold ours against.
//!
//! `common/grant_table.c` of August 2026, built with its own flags and run in user space on a two-core
//! 2.45 GHz machine, hypercall entry, shoot-downs and nested page walks left out. "Default" is with its
//! speculation fences, as it ships, "plain" without. Nanoseconds an item, best of many rounds; on that machine
//! a locked compare-exchange took [`L_NS`], and in units of that they are comparable with any other's.

/// An uncontended locked compare-exchange there.
pub const L_NS: f64 = 2.8;

/// A figure of Xen's.
#[derive(Clone, Copy, Debug)]
pub struct XenFigure {
    /// What it is, in words.
    pub work: &'static str,
    /// The case here that does the same.
    pub case: &'static str,
    /// As it ships.
    pub default_ns: f64,
    /// Without fences, if that was measured.
    pub plain_ns: Option<f64>,
}

const fn figure(work: &'static str, case: &'static str, default_ns: f64, plain_ns: Option<f64>) -> XenFigure {
    XenFigure {
        work,
        case,
        default_ns,
        plain_ns,
    }
}

/// All there are.
pub const FIGURES: [XenFigure; 14] = [
    figure("map + unmap, v1, batch 1", "pair/v1/warm/b1", 304.0, Some(184.0)),
    figure(
        "map + unmap, v1, batch 32",
        "pair/v1/warm/b32",
        285.0,
        Some(153.0),
    ),
    figure("map + unmap, v2, batch 1", "pair/v2/warm/b1", 322.0, Some(192.0)),
    figure(
        "map + unmap, v2, batch 32",
        "pair/v2/warm/b32",
        302.0,
        Some(159.0),
    ),
    figure(
        "copy 64 bytes, warm, v1, batch 32",
        "copy-from-64/v1/warm/b32",
        198.0,
        Some(113.0),
    ),
    figure(
        "copy 64 bytes, warm, v2, batch 32",
        "copy-from-64/v2/warm/b32",
        217.0,
        Some(123.0),
    ),
    figure(
        "copy 4096 bytes, warm, v1, batch 32",
        "copy-from-4096/v1/warm/b32",
        288.0,
        Some(193.0),
    ),
    figure(
        "copy 4096 bytes, cold source, batch 32",
        "copy-from-4096/v1/cold/b32",
        996.0,
        Some(763.0),
    ),
    figure(
        "copy 64 bytes, cold, batch 32",
        "copy-from-64/v1/cold/b32",
        730.0,
        Some(515.0),
    ),
    figure(
        "map + unmap, two threads, one reference, each",
        "pair-2-one-reference/v1/warm/b1",
        506.0,
        None,
    ),
    figure("get_version", "get_version/v1/warm/b1", 39.0, Some(15.0)),
    figure("query_size", "query_size/v1/warm/b1", 49.0, Some(24.0)),
    figure("set_version, 64 frames", "set_version-64/warm", 33_800.0, None),
    figure(
        "locked compare-exchange (the unit)",
        "limit/locked-compare-exchange",
        L_NS,
        None,
    ),
];

/// Xen's figure for a case, as it ships, in units of L.
#[must_use]
pub fn in_l(case: &str) -> Option<f64> {
    let found = FIGURES.iter().find(|figure| figure.case == case);
    found.map(|figure| figure.default_ns / L_NS)
}
