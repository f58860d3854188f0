//! What the surroundings give: hypercalls and time to everybody, table frames and pages to a
//! granter, the own address map to a grantee.
//!
//! A kernel, a unikernel, a process domain and an in-memory machine each implement these traits
//! once; nothing else in this crate knows which of them it runs in.

use core::ops::Range;

use gnttab_abi::{Errno, Gfn, MapGrantRef};

use crate::{Call, TableFrame};

/// How hypercalls are made, and how this program waits.
///
/// ```
/// use gnttab_abi::{Errno, GrantStatus};
/// use gnttab_guest::{Call, Hypercall};
///
/// /// A hypervisor without grant tables.
/// struct Bare;
///
/// impl Hypercall for Bare {
///     fn grant_table_op(&self, _call: Call<'_>) -> Result<(), Errno> {
///         Err(Errno::NoSys)
///     }
///     fn sleep_ms(&self, ms: u32) {
///         std::thread::sleep(std::time::Duration::from_millis(ms.into()));
///     }
/// }
/// ```
pub trait Hypercall {
    /// Makes one `grant_table_op` hypercall and returns when the hypervisor has worked through
    /// the batch; every OUT field of every item that it answered is then filled in.
    ///
    /// The items of a batch are independent, so a batch that is too long for a transport may be
    /// made as several hypercalls. [`Call::encode`] and [`Call::decode`] do the byte work for a
    /// raw hypercall.
    ///
    /// # Errors
    /// What the hypercall as a whole answered. Items before the one that ended it keep their
    /// results (spec 0.2).
    fn grant_table_op(&self, call: Call<'_>) -> Result<(), Errno>;

    /// Waits for about so many milliseconds. Called without any lock of this crate held, and
    /// only from the operations that say that they wait.
    fn sleep_ms(&self, ms: u32);

    /// Passes a moment while another processor does something short.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// Called before an internal lock is taken. A kernel that uses this crate in interrupt
    /// handlers masks interrupts here and returns what it needs to put them back.
    fn mask_interrupts(&self) -> usize {
        0
    }

    /// Called after an internal lock was given up, with what [`Hypercall::mask_interrupts`] said.
    fn restore_interrupts(&self, saved: usize) {
        let _ = saved;
    }
}

/// A page of the domain's own memory, owned by whoever has the value.
///
/// Dropping the value gives the page back to where it came from; that is why this crate keeps
/// it until the peer has let go. What has to hold:
/// 1. As long as the value exists the frame is used for nothing else, and its number stays.
/// 2. The bytes are reached only in ways that allow for a peer who changes them at any moment.
///
/// A page of a larger buffer is one too: the buffer in an [`Arc`](alloc::sync::Arc), and an index.
/// The buffer is then freed with the last of its pages.
pub trait Page {
    /// The frame's number, as the hypervisor expects it from this kind of guest: a gfn for
    /// auto-translated guests, the machine frame for PV.
    fn gfn(&self) -> Gfn;

    /// Fills the page with zeros.
    fn zero(&mut self);
}

/// Which frames of the grant table are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// The entries.
    Shared,
    /// The status words; a version 2 table has one such frame for every eight of the others.
    Status,
}

/// What a domain that grants its pages has to give.
///
/// All of it for a PVH guest, whose kernel set pages aside at `TABLE` for table frames and has the
/// two hypercalls:
///
/// ```
/// use core::ops::Range;
/// use core::ptr::NonNull;
///
/// use gnttab_abi::{Abi, AddToPhysmap, Command, Errno, Gfn};
/// use gnttab_guest::{Call, FrameKind, Granter, Hypercall, Page, ReachError, TableFrame, reach};
///
/// # fn grant_table_op(_: Command, _: &mut [u8], _: u32) -> Result<(), Errno> { Ok(()) }
/// # fn memory_op(_: AddToPhysmap) -> Result<(), Errno> { Ok(()) }
/// # fn delay(_: u32) {}
/// # struct KernelPage { gfn: u64, bytes: *mut u8 }
/// # impl Page for KernelPage {
/// #     fn gfn(&self) -> Gfn { Gfn(self.gfn) }
/// #     fn zero(&mut self) {}
/// # }
/// /// Guest frame number and address of the pages set aside, and how many there are.
/// const TABLE: (u64, usize, u32) = (0xf_0000, 0xffff_8880_f000_0000, 64);
///
/// struct Kernel;
///
/// impl Hypercall for Kernel {
///     fn grant_table_op(&self, mut call: Call<'_>) -> Result<(), Errno> {
///         let mut bytes = [0; 4096];
///         let address = bytes.as_ptr().addr() as u64;
///         let raw = call.encode(Abi::X86_64, address, &mut bytes).map_err(|_| Errno::TooBig)?;
///         let result = grant_table_op(raw.command, &mut bytes[..raw.len], raw.count);
///         // Items that were done before the call failed keep their results.
///         call.decode(Abi::X86_64, &bytes).map_err(|_| Errno::TooBig)?;
///         result
///     }
///     fn sleep_ms(&self, ms: u32) {
///         delay(ms);
///     }
/// }
///
/// impl Granter for Kernel {
///     type Page = KernelPage;
///
///     fn reach(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), ReachError> {
///         if kind == FrameKind::Status || frames.end > TABLE.2 {
///             return Err(ReachError::NoRoom(frames.end));
///         }
///         for place in reach::physmap(kind, frames, |index| Gfn(TABLE.0 + u64::from(index))) {
///             memory_op(place)?;
///         }
///         Ok(())
///     }
///
///     fn frame(&self, _kind: FrameKind, index: u32) -> Option<TableFrame> {
///         let address = TABLE.1 + usize::try_from(index).ok()? * 4096;
///         let address = NonNull::new(core::ptr::with_exposed_provenance_mut(address))?;
///         // SAFETY: the kernel maps these pages for ever and uses them for nothing else.
///         Some(unsafe { TableFrame::new(address) })
///     }
/// }
/// ```
pub trait Granter: Hypercall {
    /// The pages that it grants.
    type Page: Page;

    /// Makes the frames with these indexes reachable for this program. Indexes that the table does
    /// not have yet enlarge it. Called for new frames only, but again for all of them after a
    /// resume; never for the same frame from two processors at once.
    ///
    /// An auto-translated guest makes the memory operations of
    /// [`reach::physmap`](crate::reach::physmap); a PV guest asks
    /// [`reach::setup_table`](crate::reach::setup_table) or
    /// [`reach::status_frames`](crate::reach::status_frames) for machine frames and maps them.
    ///
    /// # Errors
    /// [`ReachError`](crate::ReachError); none of these frames is used then, and a later call may
    /// name them again.
    fn reach(&self, kind: FrameKind, frames: Range<u32>) -> Result<(), crate::ReachError>;

    /// Where a frame lies that [`Granter::reach`] made reachable.
    fn frame(&self, kind: FrameKind, index: u32) -> Option<TableFrame>;

    /// A page comes back to its owner: the peer's right to it has ended and the hypervisor
    /// knows of no mapping. Called before anybody is told so.
    ///
    /// On hardware there is nothing to do. Where a peer might keep a view of the frame that the
    /// hypervisor cannot take away, this is the place to give the page new backing.
    ///
    /// # Errors
    /// Any error leaves the end of access pending: the page stays reserved, and a later retry
    /// calls this again.
    fn page_back(&self, page: &mut Self::Page) -> Result<(), Errno> {
        let _ = page;
        Ok(())
    }
}

/// What a domain that maps others' grants has to give. The defaults fit a guest whose hypervisor
/// owns the page tables that matter.
pub trait Grantee: Hypercall {
    /// Whether foreign pages may be placed at these guest addresses (bytes): this program's own
    /// address map covers them and nothing lies there. Asked once for a whole
    /// [`Window`](crate::Window), before anything is mapped into it (rule GST-8).
    fn admits(&self, addresses: Range<u64>) -> bool {
        let _ = addresses;
        true
    }

    /// The second half of a mapping that the hypervisor has made: what this program has to enter
    /// in tables of its own before it uses the address.
    ///
    /// # Errors
    /// Any error undoes this mapping, and it is reported as failed.
    fn after_map(&self, map: &MapGrantRef) -> Result<(), Errno> {
        let _ = map;
        Ok(())
    }

    /// Takes back what [`Grantee::after_map`] did, before the hypervisor is asked to unmap.
    ///
    /// # Errors
    /// Any error leaves the grant mapped, and its address is never used again.
    fn before_unmap(&self, host_addr: u64) -> Result<(), Errno> {
        let _ = host_addr;
        Ok(())
    }
}
