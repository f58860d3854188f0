//! `dump_table`: a table as text.
//!
//! Real Xen never dispatched the operation and prints its tables on a console key instead. Here
//! the operation gives that text; [`Config::dump`](crate::Config::dump) off restores Xen's answer.

use alloc::string::String;
use core::fmt::Write;

use gnttab_abi::{DomId, EntryFlags, GrantRef, GrantStatus, Op};

use crate::domain::Vcpu;
use crate::engine::Processor;
use crate::hypervisor::Hypervisor;
use crate::observe::{EntryView, EntryWords};

impl<H: Hypervisor> Processor<'_, H> {
    /// The table of `dom` as text: a line for the table, one for each entry in use, with its pins
    /// and its shared words. The caller needs the right to query that table.
    ///
    /// # Errors
    /// `BAD_DOMAIN` or `PERMISSION_DENIED`.
    pub fn dump_table(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<String, GrantStatus> {
        let text = self
            .dump_target(vcpu, dom)
            .map(|dom| self.dump(dom).unwrap_or_default());
        let status = text.as_ref().err().copied().unwrap_or(GrantStatus::OKAY);
        vcpu.caller()
            .answer(&self.engine.hv, Op::DumpTable, Some(dom), None, status);
        text
    }

    fn dump_target(&mut self, vcpu: &Vcpu<H>, dom: DomId) -> Result<DomId, GrantStatus> {
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        if dom == DomId::SELF || dom == caller.id() {
            return Ok(caller.id());
        }
        let target = self.enter(dom).ok_or(GrantStatus::BAD_DOMAIN)?;
        if !hv.may_query(caller.private(), target.private()) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        Ok(dom)
    }

    /// The table of a domain as text, for the embedder; `None`: no such domain.
    pub fn dump(&mut self, dom: DomId) -> Option<String> {
        let (version, (frames, status)) = {
            let domain = self.enter(dom)?;
            (domain.version(), domain.frames())
        };
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{dom}: version {}, frames {frames}, status frames {status}",
            version.number()
        );
        let _ = writeln!(
            text,
            "      ref  user        mfn  hr  hw  dr  dw  | flags  domid      frame"
        );
        for gref in 0..u32::MAX {
            let Some(entry) = self.entry(dom, GrantRef(gref)) else {
                break;
            };
            if entry.pins.any() || !entry.words.flags().is_empty() {
                line(&mut text, &entry);
            }
        }
        Some(text)
    }
}

fn line(text: &mut String, entry: &EntryView) {
    let pins = entry.pins;
    let (user, mfn) = (entry.user.map_or(0x7FFF, |d| d.0), entry.mfn.map_or(0, |m| m.0));
    let frame = match entry.words {
        EntryWords::V1(words) => u64::from(words.frame),
        EntryWords::V2(words, _) => words.frame,
    };
    let flags: EntryFlags = entry.words.flags();
    let _ = writeln!(
        text,
        "{:9} {user:5} {mfn:#10x} {:3} {:3} {:3} {:3}  | {:#06x} {:5} {frame:#10x}",
        entry.gref,
        pins.host_read,
        pins.host_write,
        pins.device_read,
        pins.device_write,
        flags.bits(),
        entry.words.domid().0,
    );
}
