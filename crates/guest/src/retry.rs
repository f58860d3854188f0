//! Batches whose items the hypervisor may put off (spec guest-driver 5.2).
//!
//! For those who keep their own books of mappings; [`Mapper`](crate::Mapper) is built on these.

use gnttab_abi::{Copy, Errno, GrantStatus, MapGrantRef};

use crate::{Call, Hypercall};

/// The longest pause before an item is asked for again. The pauses grow by one millisecond each
/// time, so that all of them together are about 33 seconds.
const LONGEST_PAUSE_MS: u32 = 255;

/// An item that can be put off.
trait Deferrable: Sized {
    fn status(&mut self) -> &mut GrantStatus;
    fn call(items: &mut [Self]) -> Call<'_>;
}

impl Deferrable for MapGrantRef {
    fn status(&mut self) -> &mut GrantStatus {
        &mut self.status
    }
    fn call(items: &mut [Self]) -> Call<'_> {
        Call::Map(items)
    }
}

impl Deferrable for Copy {
    fn status(&mut self) -> &mut GrantStatus {
        &mut self.status
    }
    fn call(items: &mut [Self]) -> Call<'_> {
        Call::Copy(items)
    }
}

/// Maps a batch. Items that answer *eagain* are asked for again, one by one, after a pause of 1,
/// 2, ... 255 ms; then they count as *bad_page*. Every item's status says how it fared: `Ok` says
/// nothing about them (rule GST-5).
///
/// # Errors
/// What the hypercall as a whole answered. Items that were not reached say *general_error*.
/// After [`Errno::Fault`] a mapping may exist of which no item tells.
pub fn map(x: &impl Hypercall, items: &mut [MapGrantRef]) -> Result<(), Errno> {
    batch(x, items)
}

/// Copies a batch, with the same retries as [`map`]. An item takes at most 4096 bytes and crosses
/// the end of a page on neither side.
///
/// # Errors
/// What the hypercall as a whole answered. Items that were not reached say *general_error*.
///
/// ```
/// use gnttab_abi::{Copy, CopyFlags, CopyPtr, DomId, GrantRef};
/// use gnttab_guest::{Hypercall, retry};
///
/// /// Fetches the first 512 bytes of a granted page into frame `to` of this domain.
/// fn fetch(x: &impl Hypercall, from: DomId, gref: GrantRef, to: u64) -> Result<(), String> {
///     let mut items = [Copy {
///         source: CopyPtr::grant(from, gref, 0),
///         dest: CopyPtr::frame(to, 0),
///         len: 512,
///         flags: CopyFlags::SOURCE_GREF,
///         ..Copy::default()
///     }];
///     retry::copy(x, &mut items).map_err(|errno| errno.to_string())?;
///     retry::check(&items).map_err(|failed| failed.to_string())
/// }
/// ```
pub fn copy(x: &impl Hypercall, items: &mut [Copy]) -> Result<(), Errno> {
    batch(x, items)
}

/// Some items of a batch of copies failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{failed} of {items} copies failed; item {first} answered {status}")]
pub struct CopyFailed {
    /// The first one that failed.
    pub first: usize,
    /// What it answered.
    pub status: GrantStatus,
    /// How many failed.
    pub failed: usize,
    /// How many there are.
    pub items: usize,
}

/// Whether every item of a batch of copies succeeded.
///
/// # Errors
/// [`CopyFailed`] with the first item that did not.
pub fn check(items: &[Copy]) -> Result<(), CopyFailed> {
    let mut failures = items
        .iter()
        .enumerate()
        .filter(|(_, item)| !item.status.is_okay());
    match failures.next() {
        None => Ok(()),
        Some((first, item)) => {
            let failed = 1 + failures.count();
            Err(CopyFailed {
                first,
                status: item.status,
                failed,
                items: items.len(),
            })
        }
    }
}

fn batch<T: Deferrable>(x: &impl Hypercall, items: &mut [T]) -> Result<(), Errno> {
    if items.is_empty() {
        return Ok(());
    }
    // What nobody answers is not a success.
    for item in items.iter_mut() {
        *item.status() = GrantStatus::GENERAL_ERROR;
    }
    x.grant_table_op(T::call(items))?;
    for item in items
        .iter_mut()
        .filter_map(|item| (*item.status() == GrantStatus::EAGAIN).then_some(item))
    {
        alone(x, item)?;
    }
    Ok(())
}

/// Asks for one item again and again.
fn alone<T: Deferrable>(x: &impl Hypercall, item: &mut T) -> Result<(), Errno> {
    for pause in 1..=LONGEST_PAUSE_MS {
        x.sleep_ms(pause);
        *item.status() = GrantStatus::GENERAL_ERROR;
        x.grant_table_op(T::call(core::slice::from_mut(item)))?;
        if *item.status() != GrantStatus::EAGAIN {
            return Ok(());
        }
    }
    *item.status() = GrantStatus::BAD_PAGE;
    Ok(())
}
