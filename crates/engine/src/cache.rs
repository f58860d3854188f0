//! `cache_flush` (spec 3.13).
//!
//! The checks, in order: range and operation; nothing to do; a memory frame; an owner with a
//! table; the caller's own page, or one that the caller has in use by grant at this moment. Of
//! several such grants the one with the lowest reference counts, and if nobody writes through it,
//! nothing is invalidated that has not been cleaned.

use gnttab_abi::{CacheFlush, CacheOp, Errno, GrantRef, Op, PAGE_SIZE};

use crate::domain::Vcpu;
use crate::engine::Processor;
use crate::hypervisor::{Hook, Hypervisor};

/// References searched before a look whether somebody wants the processor.
const STEP: u32 = 4096;

/// How far one item got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    Done,
    /// Not found before this reference (a multiple of 4096); go on there.
    SearchedTo(u32),
}

impl<H: Hypervisor> Processor<'_, H> {
    /// Maintains caches, item after item.
    ///
    /// # Errors
    /// The errno of the first item that fails, with its index; earlier items are done.
    pub fn cache_flush(&mut self, vcpu: &Vcpu<H>, items: &[CacheFlush]) -> Result<(), (usize, Errno)> {
        for (index, item) in items.iter().enumerate() {
            let mut from = 0;
            loop {
                match self
                    .cache_item(vcpu, item, from)
                    .map_err(|errno| (index, errno))?
                {
                    Flushed::Done => break,
                    Flushed::SearchedTo(next) => from = next,
                }
            }
        }
        Ok(())
    }

    /// One item, its search starting at reference `from`.
    pub(crate) fn cache_item(
        &mut self,
        vcpu: &Vcpu<H>,
        item: &CacheFlush,
        from: u32,
    ) -> Result<Flushed, Errno> {
        if from == 0 {
            vcpu.counters().operation(Op::CacheFlush);
        }
        let hv = &self.engine.hv;
        let caller = vcpu.domain.id();
        // 1
        let (offset, length) = (usize::from(item.offset), usize::from(item.length));
        let known = CacheOp::CLEAN | CacheOp::INVAL;
        if offset >= PAGE_SIZE
            || length > PAGE_SIZE
            || offset + length > PAGE_SIZE
            || !known.contains(item.op)
        {
            return Err(Errno::Inval);
        }
        // 2
        if length == 0 || item.op.is_empty() {
            return if from == 0 {
                Ok(Flushed::Done)
            } else {
                Err(Errno::IlSeq)
            };
        }
        // 3, 4
        let mfn = item.mfn();
        let owner = hv
            .frame_owner(mfn)
            .map_err(|_| Errno::Inval)?
            .ok_or(Errno::Perm)?;
        let maintain = |op| {
            hv.cache_flush(mfn, item.offset, item.length, op)
                .map(|()| Flushed::Done)
        };
        // 5
        if owner == caller {
            return maintain(item.op);
        }
        // 6: inside the owner's table, so that what is found stays found until the flush is done
        let granter = self.enter(owner).ok_or(Errno::Perm)?;
        let view = granter.table.view();
        let end = from.saturating_add(STEP).min(view.entries());
        for gref in from..end {
            let Some(entry) = view.entry(GrantRef(gref)) else {
                continue;
            };
            let state = entry.active.load();
            if state.is_pinned() && state.grantee() == caller && entry.active.mfn() == mfn {
                hv.hook(Hook::CacheFound);
                // Whoever may only read must not throw away what others have written.
                let discards = item.op.contains(CacheOp::INVAL) && !state.is_write_pinned();
                return maintain(if discards {
                    item.op | CacheOp::CLEAN
                } else {
                    item.op
                });
            }
        }
        if end >= view.entries() {
            Err(Errno::Inval)
        } else {
            Ok(Flushed::SearchedTo(end))
        }
    }
}
