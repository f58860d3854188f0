//! The raw door of the memory operations that expose grant tables (spec 6).
//!
//! `add_to_physmap` and its batch form for the grant-table space, `acquire_resource` for the
//! grant-table resource. Everything else of the memory hypercall is the embedder's: the door says
//! so before it has done anything. The checks are those of `setup`, in the order of spec 6.1 and
//! 6.2.

use gnttab_abi::{
    Abi, AcquireResource, AddToPhysmap, AddToPhysmapBatch, DomId, Errno, Gfn, MEMOP_ACQUIRE_RESOURCE,
    MEMOP_ADD_TO_PHYSMAP, MEMOP_ADD_TO_PHYSMAP_BATCH, PHYSMAP_SPACE_GRANT_TABLE, RESOURCE_GRANT_TABLE,
    RESOURCE_GRANT_TABLE_SHARED, RESOURCE_GRANT_TABLE_STATUS,
};

use crate::domain::{Reference, Vcpu};
use crate::door::GuestMemory;
use crate::engine::Processor;
use crate::hypervisor::{DomainKind, Hypervisor};
use crate::setup::TableResource;

/// Frames that acquire_resource handles between two looks at the guest's list (spec 6.1 step 10).
const SLICE: u32 = 32;

/// How a memory operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryOutcome {
    /// It was the grant table's: 0, or an errno.
    Done(Result<(), Errno>),
    /// It is not about grant tables. Nothing was done.
    NotOurs,
}

impl<H: Hypervisor> Processor<'_, H> {
    /// Serves one memory operation of a vCPU, if it is about grant tables. `command` is the
    /// hypercall's first argument, `addr` the guest address of its structure.
    pub fn memory_op(
        &mut self,
        vcpu: &Vcpu<H>,
        abi: Abi,
        command: u32,
        addr: u64,
        memory: &dyn GuestMemory,
    ) -> MemoryOutcome {
        let done = match command {
            MEMOP_ADD_TO_PHYSMAP => self.add_to_physmap(vcpu, abi, addr, memory),
            MEMOP_ADD_TO_PHYSMAP_BATCH => self.add_to_physmap_batch(vcpu, abi, addr, memory),
            MEMOP_ACQUIRE_RESOURCE => self.acquire_resource(vcpu, abi, addr, memory),
            _ => return MemoryOutcome::NotOurs,
        };
        match done {
            Ok(()) => MemoryOutcome::Done(Ok(())),
            Err(Refusal::NotOurs) => MemoryOutcome::NotOurs,
            Err(Refusal::Errno(errno)) => MemoryOutcome::Done(Err(errno)),
        }
    }

    fn add_to_physmap(
        &mut self,
        vcpu: &Vcpu<H>,
        abi: Abi,
        addr: u64,
        memory: &dyn GuestMemory,
    ) -> Result<(), Refusal> {
        let mut raw = [0; 24];
        memory
            .read(addr, &mut raw[..AddToPhysmap::size(abi)])
            .map_err(|_| Errno::Fault)?;
        let call = AddToPhysmap::decode(abi, &raw).map_err(|_| Errno::Fault)?;
        if call.space != PHYSMAP_SPACE_GRANT_TABLE {
            return Err(Refusal::NotOurs);
        }
        Ok(self.place_frame(vcpu, call.domid, call.idx, frame_of(abi, call.gpfn))?)
    }

    fn add_to_physmap_batch(
        &mut self,
        vcpu: &Vcpu<H>,
        abi: Abi,
        addr: u64,
        memory: &dyn GuestMemory,
    ) -> Result<(), Refusal> {
        let mut raw = [0; 32];
        memory
            .read(addr, &mut raw[..AddToPhysmapBatch::size(abi)])
            .map_err(|_| Errno::Fault)?;
        let call = AddToPhysmapBatch::decode(abi, &raw).map_err(|_| Errno::Fault)?;
        if u32::from(call.space) != PHYSMAP_SPACE_GRANT_TABLE {
            return Err(Refusal::NotOurs);
        }
        self.may_place(vcpu, call.domid)?;
        for index in 0..u64::from(call.size) {
            let idx = word(memory, abi, call.idxs, index)?;
            let gpfn = word(memory, abi, call.gpfns, index)?;
            let done = self.place_frame(vcpu, call.domid, idx, frame_of(abi, gpfn));
            let result = done.map_or_else(|errno| -i32::from(errno.number().cast_signed()), |()| 0);
            let slot = call.errs.wrapping_add(index * 4);
            memory
                .write(slot, &result.to_le_bytes())
                .map_err(|_| Errno::Fault)?;
        }
        Ok(())
    }

    fn acquire_resource(
        &mut self,
        vcpu: &Vcpu<H>,
        abi: Abi,
        addr: u64,
        memory: &dyn GuestMemory,
    ) -> Result<(), Refusal> {
        let mut raw = [0; 32];
        memory
            .read(addr, &mut raw[..AcquireResource::size(abi)])
            .map_err(|_| Errno::Fault)?;
        let call = AcquireResource::decode(abi, &raw).map_err(|_| Errno::Fault)?;
        if call.kind != RESOURCE_GRANT_TABLE {
            return Err(Refusal::NotOurs);
        }
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        // 1
        let old = self.engine.config.reference == Reference::V4_17;
        if old && caller.kind() == DomainKind::Hvm && !hv.is_control(caller.private()) {
            return Err(Errno::Acces.into());
        }
        // 3, 4
        let first = u32::try_from(call.frame)
            .ok()
            .filter(|first| first.checked_add(call.nr_frames).is_some());
        let (0, Some(first)) = (call.pad, first) else {
            return Err(Errno::Inval.into());
        };
        // 5 to 7
        let resource = match call.id {
            RESOURCE_GRANT_TABLE_SHARED => Some(TableResource::Shared),
            RESOURCE_GRANT_TABLE_STATUS => Some(TableResource::Status),
            _ => None,
        };
        let size = self.resource_size(vcpu, call.domid, resource.unwrap_or(TableResource::Shared))?;
        let resource = resource.ok_or(Errno::Inval)?;
        // 8
        if call.frame_list == 0 {
            if call.nr_frames != 0 {
                return Err(Errno::Inval.into());
            }
            let at = addr.wrapping_add(8);
            return Ok(memory.write(at, &size.to_le_bytes()).map_err(|_| Errno::Fault)?);
        }
        // 9
        if call.nr_frames == 0 || call.nr_frames > 0x3FF_FFFF {
            return Err(Errno::Inval.into());
        }
        // 10
        let mut done = 0;
        while done < call.nr_frames {
            let slice = SLICE.min(call.nr_frames - done);
            let list = call
                .frame_list
                .wrapping_add(u64::from(done) * abi.word_size() as u64);
            self.acquire_slice(
                vcpu,
                abi,
                (call.domid, resource),
                (first + done, slice),
                list,
                memory,
            )?;
            done += slice;
        }
        Ok(())
    }

    /// One slice: the machine frames of a PV caller go into its list; those of a translated one are
    /// mapped at the places that the list names.
    fn acquire_slice(
        &mut self,
        vcpu: &Vcpu<H>,
        abi: Abi,
        (dom, resource): (DomId, TableResource),
        (first, count): (u32, u32),
        list: u64,
        memory: &dyn GuestMemory,
    ) -> Result<(), Errno> {
        let hv = &self.engine.hv;
        let caller = &vcpu.domain;
        let translated = caller.kind().is_translated();
        let mut places = [Gfn::INVALID; SLICE as usize];
        if translated {
            for (place, index) in places.iter_mut().zip(0..u64::from(count)) {
                *place = frame_of(abi, word(memory, abi, list, index)?);
            }
        }
        self.acquire_frames(vcpu, dom, resource, first, count, &mut |index, mfn| {
            if !translated {
                let at = list.wrapping_add(u64::from(index) * abi.word_size() as u64);
                let bytes = mfn.0.to_le_bytes();
                return memory
                    .write(at, &bytes[..abi.word_size()])
                    .map_err(|_| Errno::Fault);
            }
            let place = places.get(index as usize).copied().unwrap_or(Gfn::INVALID);
            let mapped = hv.map_foreign(caller.private(), place, mfn);
            mapped.map_err(|errno| if index == 0 { errno } else { Errno::Io })
        })
    }
}

/// A memory operation that was not done.
enum Refusal {
    NotOurs,
    Errno(Errno),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal::Errno(errno)
    }
}

/// A frame number of a guest's own width: all ones are "none" in both.
fn frame_of(abi: Abi, word: u64) -> Gfn {
    if abi == Abi::X86_32 && word == u64::from(u32::MAX) {
        Gfn::INVALID
    } else {
        Gfn(word)
    }
}

/// Element `index` of a guest's array of words.
fn word(memory: &dyn GuestMemory, abi: Abi, list: u64, index: u64) -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    let size = abi.word_size();
    let at = list.wrapping_add(index * size as u64);
    memory.read(at, &mut bytes[..size]).map_err(|_| Errno::Fault)?;
    Ok(u64::from_le_bytes(bytes))
}
