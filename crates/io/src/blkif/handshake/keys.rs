//! What each side writes, and how the other reads it (spec 2.5, 2.6): one pair of functions for each table.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use gnttab_abi::{Abi, GrantRef};

use crate::blkif::disk::{DiscardInfo, DiskInfo};
use crate::blkif::frontend::DeviceProperties;
use crate::blkif::layout::{ABSENT_PROTOCOL, MAX_INDIRECT_SEGMENTS, protocol_from_name, protocol_name};
use crate::xenbus::{EventPort, Store, StoreExt, Tx, XenbusError, invalid};

type Result<T, S> = core::result::Result<T, XenbusError<<S as Store>::Error>>;

/// What a backend allows, written before InitWait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendLimits {
    /// log2 of the pages of the largest ring.
    pub max_ring_page_order: u32,
    /// Most queues.
    pub max_queues: u32,
    /// Most segments of an indirect request; 0 for no indirect requests.
    pub max_indirect: u16,
    /// Persistent grants are wanted.
    pub persistent: bool,
}

impl Default for BackendLimits {
    /// Linux's numbers, and four queues.
    fn default() -> BackendLimits {
        BackendLimits {
            max_ring_page_order: 4,
            max_queues: 4,
            max_indirect: 256,
            persistent: true,
        }
    }
}

/// One queue as a frontend offers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueOffer {
    /// The ring's pages, in order: a power of two of them.
    pub ring: Vec<GrantRef>,
    /// The frontend's port, for the backend to bind.
    pub event_channel: EventPort,
}

/// How a frontend wants to talk, as its backend reads it.
///
/// Having one tells you: 1 to `max_queues` queues, each ring of the same number of pages, a power of two
/// that the backend allowed. It tells you nothing about references and ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendOffer {
    /// Layout of the rings.
    pub abi: Abi,
    /// Both sides want persistent grants.
    pub persistent: bool,
    /// The queues.
    pub queues: Vec<QueueOffer>,
}

pub(super) fn write_limits<S: Store>(
    store: &mut S,
    tx: Tx,
    dir: &str,
    limits: &BackendLimits,
) -> Result<(), S> {
    store.put(tx, dir, "max-ring-page-order", limits.max_ring_page_order)?;
    // The older spelling counts pages.
    store.put(tx, dir, "max-ring-pages", 1u64 << limits.max_ring_page_order)?;
    store.put(tx, dir, "multi-queue-max-queues", limits.max_queues)?;
    store.put(tx, dir, "feature-max-indirect-segments", limits.max_indirect)?;
    store.put(tx, dir, "feature-persistent", u8::from(limits.persistent))
}

pub(super) fn read_limits<S: Store>(store: &mut S, dir: &str) -> Result<BackendLimits, S> {
    let tx = Tx::NONE;
    Ok(BackendLimits {
        max_ring_page_order: store
            .number(tx, dir, "max-ring-page-order")?
            .unwrap_or(0)
            .min(MAX_RING_ORDER),
        max_queues: store
            .number(tx, dir, "multi-queue-max-queues")?
            .unwrap_or(1)
            .max(1),
        max_indirect: read_max_indirect(store, dir)?,
        persistent: store.flag(tx, dir, "feature-persistent")?,
    })
}

/// Largest ring that anybody offers: 2^8 pages hold more than a thousand requests.
pub(super) const MAX_RING_ORDER: u32 = 8;

fn read_max_indirect<S: Store>(store: &mut S, dir: &str) -> Result<u16, S> {
    let max: u64 = store
        .number(Tx::NONE, dir, "feature-max-indirect-segments")?
        .unwrap_or(0);
    Ok(u16::try_from(max)
        .unwrap_or(MAX_INDIRECT_SEGMENTS)
        .min(MAX_INDIRECT_SEGMENTS))
}

/// Writes a frontend's keys; what an earlier connection left under other names is removed.
pub(super) fn write_offer<S: Store>(
    store: &mut S,
    tx: Tx,
    dir: &str,
    abi: Abi,
    persistent: bool,
    queues: &[QueueOffer],
) -> Result<(), S> {
    for key in store
        .directory(tx, dir)
        .map_err(XenbusError::Store)?
        .unwrap_or_default()
    {
        if key.starts_with("ring-ref") || key.starts_with("queue-") || OPTIONAL_KEYS.contains(&key.as_str()) {
            store
                .remove(tx, &format!("{dir}/{key}"))
                .map_err(XenbusError::Store)?;
        }
    }
    store.put(tx, dir, "protocol", protocol_name(abi))?;
    store.put(tx, dir, "feature-persistent", u8::from(persistent))?;
    let pages = queues.first().map_or(0, |queue| queue.ring.len());
    if pages > 1 {
        store.put(tx, dir, "ring-page-order", pages.ilog2())?;
        store.put(tx, dir, "num-ring-pages", pages)?;
    }
    let several = queues.len() > 1;
    if several {
        store.put(tx, dir, "multi-queue-num-queues", queues.len())?;
    }
    for (index, queue) in queues.iter().enumerate() {
        let dir = if several {
            format!("{dir}/queue-{index}")
        } else {
            dir.to_string()
        };
        store.put(tx, &dir, "event-channel", queue.event_channel)?;
        match queue.ring.as_slice() {
            [gref] => store.put(tx, &dir, "ring-ref", gref.0)?,
            ring => {
                for (page, gref) in ring.iter().enumerate() {
                    store.put(tx, &dir, &format!("ring-ref{page}"), gref.0)?;
                }
            }
        }
    }
    Ok(())
}

/// Keys of a frontend that another connection may not need.
const OPTIONAL_KEYS: [&str; 4] = [
    "ring-page-order",
    "num-ring-pages",
    "multi-queue-num-queues",
    "event-channel",
];

pub(super) fn read_offer<S: Store>(
    store: &mut S,
    dir: &str,
    limits: &BackendLimits,
) -> Result<FrontendOffer, S> {
    let tx = Tx::NONE;
    let abi = match store.text(tx, dir, "protocol")? {
        None => ABSENT_PROTOCOL,
        Some(name) => protocol_from_name(&name).ok_or_else(|| {
            invalid(
                format!("{dir}/protocol"),
                &name,
                "x86_64-abi, x86_32-abi or arm-abi",
            )
        })?,
    };
    let count = store.number::<u32>(tx, dir, "multi-queue-num-queues")?;
    if count.is_some_and(|count| count == 0 || count > limits.max_queues) {
        let path = format!("{dir}/multi-queue-num-queues");
        return Err(invalid(
            path,
            &count.unwrap_or(0).to_string(),
            "1 to multi-queue-max-queues",
        ));
    }
    // The key alone means that references are numbered, even if there is one only.
    let order = store.number::<u32>(tx, dir, "ring-page-order")?;
    if order.is_some_and(|order| order > limits.max_ring_page_order) {
        let path = format!("{dir}/ring-page-order");
        return Err(invalid(
            path,
            &order.unwrap_or(0).to_string(),
            "at most max-ring-page-order",
        ));
    }
    let persistent = limits.persistent && store.flag(tx, dir, "feature-persistent")?;
    let count = count.unwrap_or(1);
    let queues = (0..count)
        .map(|index| {
            let dir = if count > 1 {
                format!("{dir}/queue-{index}")
            } else {
                dir.to_string()
            };
            let ring = match order {
                None => Vec::from([GrantRef(store.required(tx, &dir, "ring-ref")?)]),
                Some(order) => (0..1u32 << order)
                    .map(|page| store.required(tx, &dir, &format!("ring-ref{page}")).map(GrantRef))
                    .collect::<core::result::Result<_, _>>()?,
            };
            let event_channel = EventPort(store.required(tx, &dir, "event-channel")?);
            Ok(QueueOffer { ring, event_channel })
        })
        .collect::<core::result::Result<_, _>>()?;
    Ok(FrontendOffer {
        abi,
        persistent,
        queues,
    })
}

pub(super) fn write_properties<S: Store>(store: &mut S, tx: Tx, dir: &str, disk: &DiskInfo) -> Result<(), S> {
    store.put(tx, dir, "feature-flush-cache", u8::from(disk.flush))?;
    store.put(tx, dir, "feature-barrier", u8::from(disk.flush))?;
    store.put(tx, dir, "feature-discard", u8::from(disk.discard.is_some()))?;
    if let Some(discard) = disk.discard {
        store.put(tx, dir, "discard-granularity", discard.granularity)?;
        store.put(tx, dir, "discard-alignment", discard.alignment)?;
        store.put(tx, dir, "discard-secure", u8::from(discard.secure))?;
    }
    store.put(tx, dir, "info", disk.info_bits())?;
    write_size(store, tx, dir, disk)
}

/// The keys that change when a disk is resized.
pub(super) fn write_size<S: Store>(store: &mut S, tx: Tx, dir: &str, disk: &DiskInfo) -> Result<(), S> {
    store.put(tx, dir, "sectors", disk.sectors)?;
    store.put(tx, dir, "sector-size", disk.sector_size)?;
    store.put(tx, dir, "physical-sector-size", disk.physical_sector_size)
}

/// Largest disk that is taken from a backend: its bytes fit the signed numbers that files are counted with, so that
/// whoever uses the disk may multiply.
const MAX_SECTORS: u64 = i64::MAX.unsigned_abs() / 512;

/// Largest physical sector that is taken from a backend: a hint, on which others build their block sizes.
const MAX_PHYSICAL_SECTOR: u32 = 16 << 20;

/// Reads what a connected backend says of the device; `persistent` is what we want.
pub(super) fn read_properties<S: Store>(
    store: &mut S,
    dir: &str,
    persistent: bool,
) -> Result<DeviceProperties, S> {
    let tx = Tx::NONE;
    let sector_size: u32 = store.required(tx, dir, "sector-size")?;
    if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
        let path = format!("{dir}/sector-size");
        return Err(invalid(
            path,
            &sector_size.to_string(),
            "a power of two from 512 to 4096",
        ));
    }
    let sectors: u64 = store.required(tx, dir, "sectors")?;
    if sectors > MAX_SECTORS {
        let path = format!("{dir}/sectors");
        return Err(invalid(
            path,
            &sectors.to_string(),
            "a size whose bytes can be counted",
        ));
    }
    let physical_sector_size = store
        .number(tx, dir, "physical-sector-size")?
        .unwrap_or(sector_size);
    if !physical_sector_size.is_power_of_two() || physical_sector_size > MAX_PHYSICAL_SECTOR {
        let path = format!("{dir}/physical-sector-size");
        return Err(invalid(
            path,
            &physical_sector_size.to_string(),
            "a power of two up to 16 MiB",
        ));
    }
    let discard = if store.flag(tx, dir, "feature-discard")? {
        Some(DiscardInfo {
            granularity: store
                .number(tx, dir, "discard-granularity")?
                .filter(|granularity| *granularity > 0)
                .unwrap_or(sector_size),
            alignment: store.number(tx, dir, "discard-alignment")?.unwrap_or(0),
            secure: store.flag(tx, dir, "discard-secure")?,
        })
    } else {
        None
    };
    let disk = DiskInfo {
        sector_size,
        physical_sector_size: physical_sector_size.max(sector_size),
        flush: store.flag(tx, dir, "feature-flush-cache")?,
        discard,
        ..DiskInfo::new(sectors)
    };
    Ok(DeviceProperties {
        disk: disk.with_info_bits(store.required(tx, dir, "info")?),
        barrier: store.flag(tx, dir, "feature-barrier")?,
        persistent: persistent && store.flag(tx, dir, "feature-persistent")?,
        max_indirect: read_max_indirect(store, dir)?,
    })
}
