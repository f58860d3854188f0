//! The raw door: the hypercall as a guest makes it (spec 3.1).
//!
//! A command number, an address, a count and a calling ABI come in; arguments are decoded from
//! guest memory, the same operations run as behind the typed door, and results are encoded back.
//! Batches, faults in guest memory, and yielding in mid-batch exist here only. What must always
//! hold:
//! 1. Each argument is copied in once, and the copy is what is judged (ENG-5).
//! 2. Only the documented OUT bytes are written (spec 1.8).
//! 3. A call that stops early says how to go on; it has done whole items and nothing else.

use alloc::vec::Vec;

use gnttab_abi::{
    Abi, COMPAT_COPY_CHUNK, COMPAT_SETUP_TABLE_FRAMES, COMPAT_STATUS_FRAMES, COMPAT_TRANSFER_CHUNK,
    CacheFlush, Command, Copy, DumpTable, Errno, GetStatusFrames, GetVersion, Gfn, GrantStatus, MapGrantRef,
    Op, QuerySize, SetVersion, SetupTable, SwapGrantRef, Transfer, Truncated, UnmapAndReplace, UnmapGrantRef,
};

use crate::ahead;
use crate::args::{Args, Arguments, LARGEST, Raw, Window};
use crate::cache::Flushed;
use crate::copy::{Run, shares_nothing};
use crate::domain::{Reference, Vcpu};
use crate::engine::Processor;
use crate::hypervisor::{DomainKind, Hypervisor};
use crate::registry::{LEAVE_AFTER, Visit};
use crate::shared::PageWords;
use crate::unmap::{Group, Request, UNMAP_GROUP};

/// Guest memory could not be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory at {addr:#x} could not be accessed")]
pub struct Fault {
    /// The guest address.
    pub addr: u64,
}

/// The calling guest's memory, by the addresses that it passes.
///
/// Reads and writes are all or nothing as far as this call is concerned: a part that faults is a
/// fault of the whole. Neither waits for another processor: they may be called from inside a table.
pub trait GuestMemory {
    /// Whether an array of `bytes` bytes may lie at `addr`, before anything is accessed (spec
    /// 3.1.2). Faults are found by the access itself.
    fn plausible(&self, addr: u64, bytes: u64) -> bool {
        let _ = (addr, bytes);
        true
    }

    /// Reads guest memory.
    ///
    /// # Errors
    /// [`Fault`] if any byte cannot be read.
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault>;

    /// Writes guest memory.
    ///
    /// # Errors
    /// [`Fault`] if any byte cannot be written.
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// Looks at guest memory ahead of the read that counts, for hints alone: true if `into` was filled. It
    /// may always say no, which is the default, and it may not wait.
    #[inline(always)]
    fn peek(&self, addr: u64, into: &mut [u8]) -> bool {
        let _ = (addr, into);
        false
    }

    /// The pages that `bytes` bytes at `addr` lie in, if they lie one behind the other in the embedder's memory
    /// too and the guest may read and write them, and how far behind their start. Arguments are then read and
    /// written there, with no further question, not even whether they are plausible. `None`, the default, where that
    /// cannot be said of all.
    #[inline(always)]
    fn pages(&self, addr: u64, bytes: u64) -> Option<(&[PageWords], usize)> {
        let _ = (addr, bytes);
        None
    }

    /// Where dump_table's text goes; the hypervisor's console, say.
    fn print(&self, text: &str) {
        let _ = text;
    }
}

/// The hypercall's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Operation and opaque bits.
    pub command: Command,
    /// Guest address of the argument or the array of arguments.
    pub addr: u64,
    /// Number of arguments, as passed: a signed number to the checks.
    pub count: u32,
}

/// How a hypercall ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Finished: 0, or an errno.
    Done(Result<(), Errno>),
    /// Stopped between items because the embedder asked: make this call to go on (spec 3.1.3).
    Continue(Call),
}

/// How a batch ended, before it is told to the guest.
enum Stop {
    Failed(Errno),
    /// So many items are done; the opaque bits to go on with.
    Yield(u32, u32),
}

impl From<Fault> for Stop {
    fn from(_: Fault) -> Stop {
        Stop::Failed(Errno::Fault)
    }
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Stop {
        Stop::Failed(errno)
    }
}

impl From<Fault> for Errno {
    fn from(_: Fault) -> Errno {
        Errno::Fault
    }
}

impl<H: Hypervisor> Processor<'_, H> {
    /// Serves one grant-table hypercall of a vCPU.
    ///
    /// `yield_now` is asked between items whether the processor is wanted for something else;
    /// `|| false` runs every batch to its end. It may not wait for another processor.
    pub fn hypercall(
        &mut self,
        vcpu: &Vcpu<H>,
        abi: Abi,
        call: Call,
        memory: &(impl GuestMemory + ?Sized),
        yield_now: &mut (impl FnMut() -> bool + ?Sized),
    ) -> Outcome {
        let args = Args {
            memory,
            addr: call.addr,
        };
        let mut door = Door {
            cpu: self,
            vcpu,
            abi,
            memory,
            args,
            yield_now,
            call,
        };
        match door.serve() {
            Ok(()) => Outcome::Done(Ok(())),
            Err(Stop::Failed(errno)) => Outcome::Done(Err(errno)),
            Err(Stop::Yield(done, opaque)) => {
                let command = Command(call.command.0 & Command::MASK | opaque);
                Outcome::Continue(Call {
                    command,
                    addr: door.args.at(done, door.item_size()),
                    count: call.count - done,
                })
            }
        }
    }
}

struct Door<'a, 'e, H: Hypervisor, M: ?Sized, Y: ?Sized> {
    cpu: &'a mut Processor<'e, H>,
    vcpu: &'a Vcpu<H>,
    abi: Abi,
    memory: &'a M,
    args: Args<'a, M>,
    yield_now: &'a mut Y,
    call: Call,
}

/// Between items: whether to stop before this one.
#[inline(always)]
fn yield_before(index: u32, yield_now: &mut (impl FnMut() -> bool + ?Sized)) -> Result<(), Stop> {
    if index > 0 && yield_now() {
        Err(Stop::Yield(index, 0))
    } else {
        Ok(())
    }
}

impl<'m, H, M, Y> Door<'m, '_, H, M, Y>
where
    H: Hypervisor,
    M: GuestMemory + ?Sized,
    Y: FnMut() -> bool + ?Sized,
{
    fn kind(&self) -> DomainKind {
        self.vcpu.domain.kind()
    }

    fn is_compat(&self) -> bool {
        self.abi == Abi::X86_32
    }

    fn is_4_17(&self) -> bool {
        self.cpu.engine.config.reference == Reference::V4_17
    }

    /// Bytes of an item of this call's operation.
    fn item_size(&self) -> usize {
        self.call.command.op().map_or(0, |op| op.arg_size(self.abi))
    }

    /// The door checks (spec 3.1.1), then the operation.
    fn serve(&mut self) -> Result<(), Stop> {
        let Call { command, count, .. } = self.call;
        // 1
        if self.kind() == DomainKind::Hvm && !hvm_may_call(command) {
            return Err(Errno::NoSys.into());
        }
        // 2
        if self.is_compat() {
            match Op::from_number(command.0) {
                Some(Op::SetupTable) => return self.setup_table_compat(),
                Some(Op::GetStatusFrames) => return self.get_status_frames_compat(),
                Some(Op::Transfer) => return self.in_chunks(Op::Transfer, COMPAT_TRANSFER_CHUNK),
                Some(Op::Copy) => return self.in_chunks(Op::Copy, COMPAT_COPY_CHUNK),
                _ => {}
            }
        }
        // 3
        if count > i32::MAX.cast_unsigned() {
            return Err(Errno::Inval.into());
        }
        // 4
        let op = command.op();
        if op != Some(Op::CacheFlush) && command.opaque() != 0 {
            return Err(Errno::Inval.into());
        }
        // 5
        let op = op.filter(|op| self.dispatches(*op)).ok_or(Errno::NoSys)?;
        self.allowed(op)?;
        // 6 is with the operations that take arrays, 7
        match op {
            Op::MapGrantRef => self.map(),
            Op::UnmapGrantRef => self.unmap(),
            Op::UnmapAndReplace => self.unmap_and_replace(),
            Op::SetupTable => self.setup_table(),
            Op::DumpTable => self.dump_table(),
            Op::Transfer => self.transfer(),
            Op::Copy => self.copy(),
            Op::QuerySize => self.query_size(),
            Op::SetVersion => self.set_version(),
            Op::GetStatusFrames => self.get_status_frames(),
            Op::GetVersion => self.get_version(),
            Op::SwapGrantRef => self.swap(),
            Op::CacheFlush => self.cache_flush(),
        }
    }

    /// Whether the door knows the operation for this kind of caller (step 5).
    fn dispatches(&self, op: Op) -> bool {
        match op {
            Op::DumpTable => self.cpu.engine.config.dump,
            Op::CacheFlush => {
                self.kind() == DomainKind::Arm || self.cpu.engine.config.reference != Reference::Head
            }
            _ => true,
        }
    }

    /// The off switches: of the machine and of the domain.
    fn allowed(&self, op: Op) -> Result<(), Errno> {
        let on = self.vcpu.domain.limits().operations.contains(op);
        match op {
            Op::Transfer => Ok(()),
            _ if on => Ok(()),
            _ => Err(Errno::NoSys),
        }
    }

    /// Step 6: whether the array may lie where it is said to.
    fn array_plausible(&self, size: usize) -> Result<(), Errno> {
        self.plausible(u64::from(self.call.count) * size as u64)
    }

    /// The array, if it can be reached directly, and if not, step 6.
    #[inline(always)]
    fn window(&self, size: usize) -> Result<Option<Window<'m>>, Errno> {
        let window = self.args.window(self.call.count, size);
        if window.is_none() {
            self.array_plausible(size)?;
        }
        Ok(window)
    }

    fn plausible(&self, bytes: u64) -> Result<(), Errno> {
        if self.memory.plausible(self.call.addr, bytes) {
            Ok(())
        } else {
            Err(Errno::Fault)
        }
    }

    /// Reads an argument of this call's operation.
    fn read(&self, index: u32) -> Result<Raw, Fault> {
        let mut raw = [0; LARGEST];
        self.args.read(index, self.item_size(), &mut raw)?;
        Ok(raw)
    }

    /// Writes the start of an argument.
    fn write(&self, index: u32, bytes: &[u8]) -> Result<(), Fault> {
        self.args.write_start(index, self.item_size(), bytes)
    }

    fn write_status(&self, index: u32, offset: usize, status: GrantStatus) -> Result<(), Fault> {
        self.args.write_status(index, self.item_size(), offset, status)
    }

    fn map(&mut self) -> Result<(), Stop> {
        match self.window(MapGrantRef::size(self.abi))? {
            Some(window) => self.map_all(window),
            None => self.map_all(self.args),
        }
    }

    #[inline(always)]
    fn map_all(&mut self, args: impl Arguments) -> Result<(), Stop> {
        let (abi, size, count) = (self.abi, MapGrantRef::size(self.abi), self.call.count);
        let now = self.cpu.engine.hv.now();
        let (mut visit, caller) = (self.cpu.visit(&self.vcpu.domain), self.vcpu.caller());
        for few in ahead::in_steps(count) {
            leave_now_and_then(&mut visit, few.start);
            ahead::look::<MapGrantRef, H>(&mut visit, caller.domain, few.start, count, args);
            for index in few {
                yield_before(index, self.yield_now)?;
                let mut raw = [0; LARGEST];
                args.read(index, size, &mut raw)?;
                let item = decoded(MapGrantRef::decode(abi, &raw))?;
                let answer = visit.map_item(&caller, &item, now);
                // An array of its own: the structure has no padding that had to stay.
                let mut raw = [0; LARGEST];
                answer.encode(abi, &mut raw).map_err(|_| Errno::Fault)?;
                // What comes before is as it was read.
                args.write(index, size, 16, raw)?;
            }
        }
        Ok(())
    }

    fn unmap(&mut self) -> Result<(), Stop> {
        let (abi, size) = (self.abi, UnmapGrantRef::size(self.abi));
        self.unmap_with(Op::UnmapGrantRef, size, |raw| {
            Ok((&decoded(UnmapGrantRef::decode(abi, raw))?).into())
        })
    }

    fn unmap_and_replace(&mut self) -> Result<(), Stop> {
        let (abi, size) = (self.abi, UnmapAndReplace::size(self.abi));
        self.unmap_with(Op::UnmapAndReplace, size, |raw| {
            Ok((&decoded(UnmapAndReplace::decode(abi, raw))?).into())
        })
    }

    #[inline(always)]
    fn unmap_with(
        &mut self,
        op: Op,
        size: usize,
        decode: impl Fn(&Raw) -> Result<Request, Errno>,
    ) -> Result<(), Stop> {
        match self.window(size)? {
            Some(window) => self.unmap_groups(window, op, size, decode),
            None => self.unmap_groups(self.args, op, size, decode),
        }
    }

    #[inline]
    fn unmap_groups(
        &mut self,
        args: impl Arguments,
        op: Op,
        size: usize,
        decode: impl Fn(&Raw) -> Result<Request, Errno>,
    ) -> Result<(), Stop> {
        let mut first = 0;
        while first < self.call.count {
            yield_before(first, self.yield_now)?;
            // A call for one mapping need not prepare for a group.
            first += if self.call.count - first == 1 {
                self.unmap_group::<1>(args, op, size, first, &decode)?
            } else {
                self.unmap_group::<UNMAP_GROUP>(args, op, size, first, &decode)?
            };
        }
        Ok(())
    }

    /// A group of at most `N` items from `first` on; how many they were.
    #[inline(always)]
    fn unmap_group<const N: usize>(
        &mut self,
        args: impl Arguments,
        op: Op,
        size: usize,
        first: u32,
        decode: &impl Fn(&Raw) -> Result<Request, Errno>,
    ) -> Result<u32, Stop> {
        let count = self.call.count - first;
        let items = u32::try_from(N).map_or(count, |most| most.min(count));
        let (mut visit, caller) = (self.cpu.visit(&self.vcpu.domain), self.vcpu.caller());
        let mut group: Group<N> = Group::new();
        let mut first_phase = || -> Result<(), Errno> {
            for index in first..first + items {
                let mut raw = [0; LARGEST];
                args.read(index, size, &mut raw)?;
                let status = visit.unmap_first(&caller, op, decode(&raw)?, &mut group);
                // Both structures have their status at the same place.
                args.write_status(index, size, 20, status)?;
            }
            Ok(())
        };
        let done = first_phase();
        visit.unmap_second(&caller, &group);
        done?;
        Ok(items)
    }

    fn transfer_is_on(&self) -> Result<(), Errno> {
        let on = self.cpu.engine.config.transfer
            && self.kind() == DomainKind::Pv
            && self.vcpu.domain.limits().operations.contains(Op::Transfer);
        if on { Ok(()) } else { Err(Errno::OpNotSupp) }
    }

    fn transfer(&mut self) -> Result<(), Stop> {
        self.array_plausible(Transfer::size(self.abi))?;
        self.transfer_is_on()?;
        for index in 0..self.call.count {
            yield_before(index, self.yield_now)?;
            let item = decoded(Transfer::decode(self.abi, &self.read(index)?))?;
            let status = self.cpu.transfer_item(self.vcpu, &item);
            self.write_status(index, 16, status)?;
        }
        Ok(())
    }

    /// A caller's copies whose arguments are wide.
    fn copy(&mut self) -> Result<(), Stop> {
        match self.window(Copy::size(Abi::X86_64))? {
            Some(window) => self.copy_all(window),
            None => self.copy_all(self.args),
        }
    }

    #[inline(always)]
    fn copy_all(&mut self, args: impl Arguments) -> Result<(), Stop> {
        const SIZE: usize = Copy::size(Abi::X86_64);
        let (count, yield_now) = (self.call.count, &mut *self.yield_now);
        let (mut visit, caller) = (self.cpu.visit(&self.vcpu.domain), self.vcpu.caller());
        let mut run = Run::new();
        let mut items = || -> Result<(), Stop> {
            for few in ahead::in_steps(count) {
                leave_now_and_then(&mut visit, few.start);
                ahead::look::<Copy, H>(&mut visit, caller.domain, few.start, count, args);
                for index in few {
                    yield_before(index, yield_now)?;
                    let mut raw = [0; LARGEST];
                    args.read(index, SIZE, &mut raw)?;
                    let item = decoded(Copy::decode(Abi::X86_64, &raw))?;
                    let alone = is_alone(args, index, count, &item);
                    let status = visit.copy_item(&caller, &mut run, &item, alone);
                    args.write_status(index, SIZE, 36, status)?;
                }
            }
            Ok(())
        };
        let done = items();
        visit.end_copy(&mut run);
        done
    }

    /// 32-bit callers' transfers and copies: a chunk is read whole before its first item runs, and
    /// its statuses are written after its last, the last first (spec 3.1.4).
    fn in_chunks(&mut self, op: Op, most: usize) -> Result<(), Stop> {
        let Call { count, .. } = self.call;
        if count > i32::MAX.cast_unsigned() {
            return Err(Errno::Inval.into());
        }
        self.array_plausible(self.item_size())?;
        if count == 0 {
            return Ok(());
        }
        self.allowed(op)?;
        if op == Op::Transfer {
            self.transfer_is_on()?;
        }
        let mut first = 0;
        while first < count {
            yield_before(first, self.yield_now)?;
            let chunk = u32::try_from(most).map_or(count, |most| most.min(count - first));
            first += self.chunk(op, first, chunk)?;
        }
        Ok(())
    }

    fn chunk(&mut self, op: Op, first: u32, chunk: u32) -> Result<u32, Stop> {
        let mut raws = Vec::new();
        raws.try_reserve_exact(chunk as usize).map_err(|_| Errno::NoMem)?;
        for index in first..first + chunk {
            raws.push(self.read(index)?);
        }
        let mut statuses = Vec::new();
        statuses
            .try_reserve_exact(chunk as usize)
            .map_err(|_| Errno::NoMem)?;
        let stop = |index, yield_now: &mut Y| index > first && yield_now();
        if op == Op::Transfer {
            for (raw, index) in raws.iter().zip(first..) {
                if stop(index, self.yield_now) {
                    break;
                }
                let item = decoded(Transfer::decode(self.abi, raw))?;
                statuses.push(self.cpu.transfer_item(self.vcpu, &item));
            }
        } else {
            let (mut visit, caller) = (self.cpu.visit(&self.vcpu.domain), self.vcpu.caller());
            let mut run = Run::new();
            for (raw, index) in raws.iter().zip(first..) {
                if stop(index, self.yield_now) {
                    break;
                }
                leave_now_and_then(&mut visit, index);
                let Ok(item) = Copy::decode(self.abi, raw) else {
                    break;
                };
                let next = raws.get((index - first) as usize + 1);
                let next = next.and_then(|raw| Copy::decode(self.abi, raw).ok());
                let alone = next.is_none_or(|next| shares_nothing(&item, &next));
                statuses.push(visit.copy_item(&caller, &mut run, &item, alone));
            }
            visit.end_copy(&mut run);
        }
        let offset = if op == Op::Transfer { 12 } else { 20 };
        let mut written = Ok(());
        let done = u32::try_from(statuses.len()).unwrap_or(chunk);
        for (status, index) in statuses.iter().rev().zip((first..first + done).rev()) {
            if self.write_status(index, offset, *status).is_err() {
                written = Err(Stop::Failed(Errno::Fault));
            }
        }
        written?;
        if done < chunk {
            Err(Stop::Yield(first + done, 0))
        } else {
            Ok(done)
        }
    }

    fn query_size(&mut self) -> Result<(), Stop> {
        self.one_only()?;
        // The same size for every calling ABI, and so a constant.
        let size = QuerySize::size(self.abi);
        let mut raw = [0; LARGEST];
        self.args.read(0, size, &mut raw)?;
        let mut item = decoded(QuerySize::decode(self.abi, &raw))?;
        item.status = match self.cpu.query_size(self.vcpu, item.dom) {
            Ok(size) => {
                (item.nr_frames, item.max_nr_frames) = (size.frames, size.max_frames);
                GrantStatus::OKAY
            }
            Err(status) => status,
        };
        item.encode(self.abi, &mut raw).map_err(|_| Errno::Fault)?;
        Ok(self.args.write(0, size, 0, raw)?)
    }

    fn one_only(&self) -> Result<(), Errno> {
        if self.call.count == 1 {
            Ok(())
        } else {
            Err(Errno::Inval)
        }
    }

    fn setup_table(&mut self) -> Result<(), Stop> {
        self.one_only()?;
        let item = decoded(SetupTable::decode(self.abi, &self.read(0)?))?;
        self.list_plausible(item.frame_list, item.nr_frames, 8)?;
        let (memory, list) = (self.memory, item.frame_list);
        let status = self
            .cpu
            .setup_table(self.vcpu, item.dom, item.nr_frames, None, &mut |i, gfn| {
                memory
                    .write(list.wrapping_add(u64::from(i) * 8), &gfn.0.to_le_bytes())
                    .is_ok()
            });
        Ok(self.write_status(0, 8, status)?)
    }

    fn list_plausible(&self, list: u64, elements: u32, size: u64) -> Result<(), Errno> {
        let plausible = self.memory.plausible(list, u64::from(elements) * size);
        if plausible { Ok(()) } else { Err(Errno::Fault) }
    }

    /// setup_table of a 32-bit caller (spec 3.1.4 step 4): the status is settled before the list is
    /// written.
    fn setup_table_compat(&mut self) -> Result<(), Stop> {
        let Call { count, .. } = self.call;
        if count > i32::MAX.cast_unsigned() {
            return Err(Errno::Inval.into());
        }
        self.array_plausible(self.item_size())?;
        if count == 0 {
            return Ok(());
        }
        if count > 1 {
            return Err(Errno::Inval.into());
        }
        self.allowed(Op::SetupTable)?;
        let mut raw = self.read(0)?;
        let mut item = decoded(SetupTable::decode(self.abi, &raw))?;
        self.list_plausible(item.frame_list, item.nr_frames, 4)?;
        let (memory, old) = (self.memory, self.is_4_17());
        let mut storing = true;
        item.status = self.cpu.setup_table(
            self.vcpu,
            item.dom,
            item.nr_frames,
            Some(COMPAT_SETUP_TABLE_FRAMES),
            &mut |i, gfn| {
                let at = item.frame_list.wrapping_add(u64::from(i) * 4);
                let fits = u32::try_from(gfn.0).is_ok();
                if storing && (fits || old) {
                    let [a, b, c, d, ..] = gfn.0.to_le_bytes();
                    storing = memory.write(at, &[a, b, c, d]).is_ok() || old;
                } else {
                    storing = false;
                }
                true
            },
        );
        item.encode(self.abi, &mut raw).map_err(|_| Errno::Fault)?;
        Ok(self.write(0, &raw[..SetupTable::size(self.abi)])?)
    }

    fn get_status_frames(&mut self) -> Result<(), Stop> {
        self.one_only()?;
        let item = decoded(GetStatusFrames::decode(self.abi, &self.read(0)?))?;
        self.list_plausible(item.frame_list, item.nr_frames, 8)?;
        let status = self.status_frames(&item, None);
        Ok(self.write_status(0, 6, status)?)
    }

    fn status_frames(&mut self, item: &GetStatusFrames, capacity: Option<usize>) -> GrantStatus {
        let (memory, list) = (self.memory, item.frame_list);
        // Xen 4.17 settles a 32-bit caller's status before the list is written.
        let settled = self.is_compat() && self.is_4_17();
        self.cpu.get_status_frames(
            self.vcpu,
            item.dom,
            item.nr_frames,
            capacity,
            &mut |i, gfn: Gfn| {
                let at = list.wrapping_add(u64::from(i) * 8);
                memory.write(at, &gfn.0.to_le_bytes()).is_ok() || settled
            },
        )
    }

    fn get_status_frames_compat(&mut self) -> Result<(), Stop> {
        let Call { count, .. } = self.call;
        if count > i32::MAX.cast_unsigned() {
            return Err(Errno::Inval.into());
        }
        self.array_plausible(self.item_size())?;
        if count == 0 {
            return Ok(());
        }
        if count > 1 {
            return Err(Errno::Inval.into());
        }
        self.allowed(Op::GetStatusFrames)?;
        let mut raw = self.read(0)?;
        let mut item = decoded(GetStatusFrames::decode(self.abi, &raw))?;
        self.list_plausible(item.frame_list, item.nr_frames, 8)?;
        let old = self.is_4_17();
        item.status = self.status_frames(&item, old.then_some(COMPAT_STATUS_FRAMES));
        if old {
            item.encode(self.abi, &mut raw).map_err(|_| Errno::Fault)?;
            return Ok(self.write(0, &raw[..GetStatusFrames::size(self.abi)])?);
        }
        Ok(self.write_status(0, 6, item.status)?)
    }

    fn set_version(&mut self) -> Result<(), Stop> {
        let mut raw = self.read(0)?;
        let mut item = decoded(SetVersion::decode(self.abi, &raw))?;
        let result = self.cpu.set_version(self.vcpu, item.version);
        item.version = self.vcpu.domain.version().number();
        item.encode(self.abi, &mut raw).map_err(|_| Errno::Fault)?;
        self.write(0, &raw[..SetVersion::size(self.abi)])?;
        Ok(result?)
    }

    fn get_version(&mut self) -> Result<(), Stop> {
        let mut raw = [0; LARGEST];
        self.args.read(0, GetVersion::size(self.abi), &mut raw)?;
        let item = decoded(GetVersion::decode(self.abi, &raw))?;
        let version = self.cpu.get_version(self.vcpu, item.dom)?;
        Ok(self
            .memory
            .write(self.call.addr.wrapping_add(4), &version.number().to_le_bytes())?)
    }

    fn swap(&mut self) -> Result<(), Stop> {
        self.array_plausible(SwapGrantRef::size(self.abi))?;
        for index in 0..self.call.count {
            yield_before(index, self.yield_now)?;
            let item = decoded(SwapGrantRef::decode(self.abi, &self.read(index)?))?;
            let status = self.cpu.swap_item(self.vcpu, item.ref_a, item.ref_b);
            self.write_status(index, 8, status)?;
        }
        Ok(())
    }

    fn dump_table(&mut self) -> Result<(), Stop> {
        self.one_only()?;
        let item = decoded(DumpTable::decode(self.abi, &self.read(0)?))?;
        let status = match self.cpu.dump_table(self.vcpu, item.dom) {
            Ok(text) => {
                self.memory.print(&text);
                GrantStatus::OKAY
            }
            Err(status) => status,
        };
        Ok(self.write_status(0, 2, status)?)
    }

    fn cache_flush(&mut self) -> Result<(), Stop> {
        self.array_plausible(CacheFlush::size(self.abi))?;
        let mut from = self.call.command.opaque();
        for index in 0..self.call.count {
            yield_before(index, self.yield_now)?;
            let item = decoded(CacheFlush::decode(self.abi, &self.read(index)?))?;
            loop {
                match self.cpu.cache_item(self.vcpu, &item, from)? {
                    Flushed::Done => break,
                    Flushed::SearchedTo(next) => from = next,
                }
                if (self.yield_now)() {
                    return Err(Stop::Yield(index, from));
                }
            }
            from = 0;
        }
        Ok(())
    }
}

/// A structure out of bytes that were read whole, so that it cannot be cut short.
#[inline(always)]
fn decoded<T>(item: Result<T, Truncated>) -> Result<T, Errno> {
    item.map_err(|_| Errno::Fault)
}

/// Whether the copy behind item `index` does not look as if it wanted a side of the item's again.
#[inline(always)]
fn is_alone(args: impl Arguments, index: u32, count: u32, item: &Copy) -> bool {
    if index + 1 >= count {
        return true;
    }
    let next = args.glimpse(index + 1, Copy::size(Abi::X86_64));
    next.and_then(|raw| Copy::decode(Abi::X86_64, &raw).ok())
        .is_some_and(|next| shares_nothing(item, &next))
}

/// Leaves the table before every [`LEAVE_AFTER`]th item.
#[inline(always)]
fn leave_now_and_then<H: Hypervisor>(visit: &mut Visit<'_, H>, index: u32) {
    if (index as usize).is_multiple_of(LEAVE_AFTER) {
        visit.leave();
    }
}

/// The commands that an HVM caller may pass, all 32 bits compared (step 1).
fn hvm_may_call(command: Command) -> bool {
    matches!(
        Op::from_number(command.0),
        Some(
            Op::MapGrantRef
                | Op::UnmapGrantRef
                | Op::SetupTable
                | Op::Copy
                | Op::QuerySize
                | Op::SetVersion
                | Op::GetVersion
                | Op::SwapGrantRef
        )
    )
}
