//! `gnttab demo`: a disk served from one domain to another, and a hostile third.

pub(crate) mod report;
pub(crate) mod workload;
