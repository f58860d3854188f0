//! Mapping other domains' pages, and unmapping them (spec guest-driver 5).
//!
//! What must always hold:
//! 1. The status of every item is looked at, and it alone says whether a mapping exists; what a
//!    granter can provoke is an error, never a panic (rule GST-5).
//! 2. Exactly what was mapped is unmapped, once, at the same address.
//! 3. An address where something may still be mapped is never used again: after an unmap that
//!    failed, and after a hypercall that left it unknown what it did.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use gnttab_abi::{DomId, Errno, GrantHandle, GrantRef, GrantStatus, MapFlags, MapGrantRef, UnmapGrantRef};

use crate::map_error::{MapError, Tally, UnmapError, UnmapFailure};
use crate::window::{Place, Places};
use crate::{Access, Call, Grantee, Window, WindowError, WindowStats, retry};

/// How many unmaps one hypercall carries: the hypervisor flushes once for so many.
const UNMAP_BATCH: usize = 32;

/// One page to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRequest {
    /// The domain that granted it.
    pub dom: DomId,
    /// Its reference, as that domain told it.
    pub gref: GrantRef,
    /// What is wanted; more than was granted fails.
    pub access: Access,
}

/// Maps other domains' pages into a window. Clones are the same mapper.
///
/// What it returns are guards: dropping one unmaps. A page that is being read or written, by
/// this program or by a device, is kept mapped by keeping its guard, in an [`Arc`] where several
/// do.
///
/// ```
/// use gnttab_abi::{DomId, GrantRef};
/// use gnttab_guest::{Access, Grantee, MapError, MapRequest, MappedRun, Mapper, Mapping};
///
/// /// A ring of two pages, all or nothing.
/// fn ring<X: Grantee>(mapper: &Mapper<X>, dom: DomId, refs: [u32; 2]) -> Result<MappedRun<X>, MapError> {
///     mapper.map_run(dom, &refs.map(GrantRef), Access::ReadWrite)
/// }
///
/// /// The pages of a request: those that can be had, or the first error; either way nothing leaks.
/// fn segments<X: Grantee>(mapper: &Mapper<X>, requests: &[MapRequest]) -> Result<Vec<Mapping<X>>, MapError> {
///     mapper.map(requests)?.into_iter().collect()
/// }
/// ```
pub struct Mapper<X: Grantee>(Arc<Inner<X>>);

struct Inner<X: Grantee> {
    x: Arc<X>,
    places: Places,
    flags: MapFlags,
}

impl<X: Grantee> Mapper<X> {
    /// A mapper for processors' use of the pages.
    ///
    /// # Errors
    /// [`WindowError`] if the platform does not admit the window.
    pub fn new(x: Arc<X>, window: Window) -> Result<Mapper<X>, WindowError> {
        Mapper::with_flags(x, window, MapFlags::HOST_MAP)
    }

    /// A mapper that asks for each page with these flags, and with read-only where that is all
    /// that is wanted: [`MapFlags::DEVICE_MAP`] where devices use the pages too.
    ///
    /// # Errors
    /// [`WindowError`] if the platform does not admit the window.
    pub fn with_flags(x: Arc<X>, window: Window, flags: MapFlags) -> Result<Mapper<X>, WindowError> {
        let places = Places::new(&*x, window)?;
        Ok(Mapper(Arc::new(Inner {
            x,
            places,
            flags: flags | MapFlags::HOST_MAP,
        })))
    }

    /// How the window is used.
    #[must_use]
    pub fn window(&self) -> WindowStats {
        self.0.places.stats(&*self.0.x)
    }

    /// Maps one page. Waits where the hypervisor puts it off.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map_one(&self, request: MapRequest) -> Result<Mapping<X>, MapError> {
        let results = self.map(&[request])?;
        results.into_iter().next().unwrap_or(Err(MapError::NoMemory(1)))
    }

    /// Maps a batch, anywhere in the window: one result for each request, in their order. Waits
    /// where the hypervisor puts items off.
    ///
    /// # Errors
    /// [`MapError::WindowFull`] or [`MapError::NoMemory`]; nothing is mapped then.
    pub fn map(&self, requests: &[MapRequest]) -> Result<Vec<Result<Mapping<X>, MapError>>, MapError> {
        let (wanted, mut places) = room_for(requests)?;
        let x = &*self.0.x;
        match self.0.places.take(x, wanted, |place| places.push(place)) {
            Ok(()) => self.map_at(requests, places),
            Err(free) => Err(MapError::WindowFull { wanted, free }),
        }
    }

    /// Maps pages of one domain at addresses that follow one another, all of them or none: a ring
    /// of several pages, a buffer. Waits where the hypervisor puts items off.
    ///
    /// # Errors
    /// The first [`MapError`]; those that did succeed are unmapped.
    pub fn map_run(&self, dom: DomId, grefs: &[GrantRef], access: Access) -> Result<MappedRun<X>, MapError> {
        let mut requests = Vec::new();
        requests
            .try_reserve_exact(grefs.len())
            .map_err(|_| MapError::NoMemory(grefs.len()))?;
        requests.extend(grefs.iter().map(|&gref| MapRequest { dom, gref, access }));
        let (wanted, mut places) = room_for(&requests)?;
        let x = &*self.0.x;
        self.0
            .places
            .take_run(x, wanted, |place| places.push(place))
            .map_err(|free| MapError::WindowFull { wanted, free })?;
        let mut run = MappedRun {
            mapper: self.clone(),
            pages: Vec::new(),
        };
        run.pages
            .try_reserve_exact(grefs.len())
            .map_err(|_| MapError::NoMemory(grefs.len()))?;
        let mut first_error = None;
        for result in self.map_at(&requests, places)? {
            match result {
                Ok(mapping) => run.pages.push(mapping),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        // Dropping the run unmaps what it has.
        first_error.map_or(Ok(run), Err)
    }

    /// Undoes mappings, many in one hypercall.
    ///
    /// # Errors
    /// [`UnmapError`] with the first that could not be undone; all others are.
    pub fn unmap(&self, mappings: Vec<Mapping<X>>) -> Result<(), UnmapError> {
        let mut tally = Tally::default();
        let mut mappings = mappings;
        for some in mappings.chunks_mut(UNMAP_BATCH) {
            self.0.unmap_some(some, &mut tally);
        }
        tally.result()
    }

    /// Maps each request at its place.
    fn map_at(
        &self,
        requests: &[MapRequest],
        places: Vec<Place>,
    ) -> Result<Vec<Result<Mapping<X>, MapError>>, MapError> {
        let Inner {
            x,
            places: window,
            flags,
        } = &*self.0;
        let (mut items, mut results) = (Vec::new(), Vec::new());
        let reserved = items
            .try_reserve_exact(requests.len())
            .and_then(|()| results.try_reserve_exact(requests.len()));
        if reserved.is_err() {
            places.into_iter().for_each(|place| window.put(&**x, place));
            return Err(MapError::NoMemory(requests.len()));
        }
        items.extend(requests.iter().zip(&places).map(|(request, place)| MapGrantRef {
            host_addr: window.address(place),
            flags: match request.access {
                Access::ReadOnly => *flags | MapFlags::READONLY,
                Access::ReadWrite => *flags,
            },
            gref: request.gref,
            dom: request.dom,
            ..MapGrantRef::default()
        }));
        let call = retry::map(&**x, &mut items);
        for (item, place) in items.iter().zip(places) {
            results.push(self.0.judge(item, place, call));
        }
        Ok(results)
    }
}

impl<X: Grantee> Clone for Mapper<X> {
    fn clone(&self) -> Self {
        Mapper(Arc::clone(&self.0))
    }
}

impl<X: Grantee> fmt::Debug for Mapper<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mapper").field(&self.window()).finish()
    }
}

/// Room for the places of these requests, and how many they are.
fn room_for(requests: &[MapRequest]) -> Result<(u32, Vec<Place>), MapError> {
    let no_memory = MapError::NoMemory(requests.len());
    let wanted = u32::try_from(requests.len()).map_err(|_| no_memory)?;
    let mut places = Vec::new();
    places.try_reserve_exact(requests.len()).map_err(|_| no_memory)?;
    Ok((wanted, places))
}

/// Whether a hypercall that answered this may have mapped something without saying so. What the
/// door refuses was never begun.
fn may_have_mapped(errno: Errno) -> bool {
    !matches!(errno, Errno::NoSys | Errno::Perm | Errno::Acces | Errno::Inval)
}

impl<X: Grantee> Inner<X> {
    /// What became of one item, and of its place.
    fn judge(
        self: &Arc<Self>,
        item: &MapGrantRef,
        place: Place,
        call: Result<(), Errno>,
    ) -> Result<Mapping<X>, MapError> {
        let x = &*self.x;
        let (dom, gref, status) = (item.dom, item.gref, item.status);
        match (status, call) {
            (GrantStatus::OKAY, _) => {}
            (GrantStatus::GENERAL_ERROR, Err(errno)) => {
                if may_have_mapped(errno) {
                    self.places.leak(x, place);
                } else {
                    self.places.put(x, place);
                }
                return Err(MapError::Call { dom, gref, errno });
            }
            _ => {
                self.places.put(x, place);
                return Err(MapError::Status { dom, gref, status });
            }
        }
        let mut mapping = Mapping {
            mapper: Arc::clone(self),
            place: Some(place),
            entered: false,
            host_addr: item.host_addr,
            handle: item.handle,
            dev_bus_addr: item
                .flags
                .contains(MapFlags::DEVICE_MAP)
                .then_some(item.dev_bus_addr),
            dom,
            gref,
        };
        // On failure the mapping is dropped, which unmaps it.
        x.after_map(item)
            .map_err(|errno| MapError::NotEntered { dom, gref, errno })?;
        mapping.entered = true;
        Ok(mapping)
    }

    /// Undoes up to [`UNMAP_BATCH`] mappings in one hypercall. Needs no memory: this is also how
    /// guards unmap when they are dropped.
    fn unmap_some(&self, mappings: &mut [Mapping<X>], tally: &mut Tally) {
        let x = &*self.x;
        let mut items = [UnmapGrantRef::default(); UNMAP_BATCH];
        let mut places = [const { None }; UNMAP_BATCH];
        let mut count = 0;
        for mapping in mappings {
            let Some(place) = mapping.place.take() else {
                continue;
            };
            tally.total += 1;
            let left = if mapping.entered {
                x.before_unmap(mapping.host_addr)
            } else {
                Ok(())
            };
            if let Err(errno) = left {
                tally.note(mapping.host_addr, mapping.handle, UnmapFailure::NotLeft(errno));
                self.places.leak(x, place);
                continue;
            }
            items[count] = UnmapGrantRef {
                host_addr: mapping.host_addr,
                dev_bus_addr: mapping.dev_bus_addr.unwrap_or(0),
                handle: mapping.handle,
                // What nobody answers is not a success.
                status: GrantStatus::GENERAL_ERROR,
            };
            places[count] = Some(place);
            count += 1;
        }
        if count == 0 {
            return;
        }
        let call = x.grant_table_op(Call::Unmap(&mut items[..count]));
        for (item, place) in items.iter().zip(places.into_iter().flatten()) {
            if item.status.is_okay() {
                self.places.put(x, place);
                continue;
            }
            let reason = match call {
                Err(errno) if item.status == GrantStatus::GENERAL_ERROR => UnmapFailure::Call(errno),
                _ => UnmapFailure::Status(item.status),
            };
            tally.note(item.host_addr, item.handle, reason);
            self.places.leak(x, place);
        }
    }
}

/// A page of another domain, mapped.
///
/// Having one tells you: the page is at [`host_addr`](Mapping::host_addr) and stays there until
/// this goes. It tells you nothing about its bytes, which the granter may change at any moment.
/// Dropping it unmaps; [`unmap`](Mapping::unmap) does so and says how it went.
#[must_use = "dropping a mapping unmaps it"]
pub struct Mapping<X: Grantee> {
    mapper: Arc<Inner<X>>,
    /// Taken out when it is unmapped.
    place: Option<Place>,
    /// Whether [`Grantee::after_map`] took it in.
    entered: bool,
    host_addr: u64,
    handle: GrantHandle,
    dev_bus_addr: Option<u64>,
    dom: DomId,
    gref: GrantRef,
}

impl<X: Grantee> Mapping<X> {
    /// Where the page is: a guest address in bytes, a multiple of 4096.
    #[must_use]
    pub fn host_addr(&self) -> u64 {
        self.host_addr
    }

    /// Where devices find it, if it was mapped for them (bytes).
    #[must_use]
    pub fn dev_bus_addr(&self) -> Option<u64> {
        self.dev_bus_addr
    }

    /// The domain whose page it is.
    #[must_use]
    pub fn granter(&self) -> DomId {
        self.dom
    }

    /// The reference that it was mapped by.
    #[must_use]
    pub fn gref(&self) -> GrantRef {
        self.gref
    }

    /// The hypervisor's handle of this mapping.
    #[must_use]
    pub fn handle(&self) -> GrantHandle {
        self.handle
    }

    /// Unmaps it.
    ///
    /// # Errors
    /// [`UnmapError`]; the address is never used again then.
    pub fn unmap(mut self) -> Result<(), UnmapError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), UnmapError> {
        let mut tally = Tally::default();
        let mapper = Arc::clone(&self.mapper);
        mapper.unmap_some(core::slice::from_mut(self), &mut tally);
        tally.result()
    }
}

impl<X: Grantee> Drop for Mapping<X> {
    fn drop(&mut self) {
        if self.place.is_some() {
            // A failure is counted in the window's statistics.
            let _ = self.undo();
        }
    }
}

impl<X: Grantee> fmt::Debug for Mapping<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Mapping({} of {} at {:#x})",
            self.gref, self.dom, self.host_addr
        )
    }
}

/// Pages of another domain, mapped at addresses that follow one another. Dropping it unmaps all
/// of them, many in one hypercall.
#[must_use = "dropping a mapping unmaps it"]
pub struct MappedRun<X: Grantee> {
    mapper: Mapper<X>,
    pages: Vec<Mapping<X>>,
}

impl<X: Grantee> MappedRun<X> {
    /// The pages, in the order of their addresses.
    pub fn pages(&self) -> &[Mapping<X>] {
        &self.pages
    }

    /// Where the first page is (bytes); `None` for a run of no pages.
    #[must_use]
    pub fn host_addr(&self) -> Option<u64> {
        self.pages.first().map(Mapping::host_addr)
    }

    /// Unmaps all of them.
    ///
    /// # Errors
    /// [`UnmapError`] with the first that could not be undone; all others are.
    pub fn unmap(mut self) -> Result<(), UnmapError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), UnmapError> {
        self.mapper.unmap(core::mem::take(&mut self.pages))
    }
}

impl<X: Grantee> Drop for MappedRun<X> {
    fn drop(&mut self) {
        // Failures are counted in the window's statistics.
        let _ = self.undo();
    }
}

impl<X: Grantee> fmt::Debug for MappedRun<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MappedRun").field(&self.pages).finish()
    }
}
