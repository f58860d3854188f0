//! The arithmetic: from devices to references, frames and maptrack.

use gnttab_abi::{Abi, NR_RESERVED_ENTRIES, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE, status_pages_for};
use gnttab_io::blkif::{
    BackendConfig, FrontendConfig, MAX_DIRECT_SEGMENTS, SEGMENTS_PER_INDIRECT_PAGE, slot_size,
};
use gnttab_io::ring::RingShape;
use serde::Serialize;

use super::description::{Description, Disk, Driver, Network, Transmit};
use crate::roles::Sharing;

/// Handles that a maptrack frame holds.
const HANDLES_PER_FRAME: u32 = 256;
/// Bytes of a slot of netif's two rings.
const NET_TRANSMIT_SLOT: usize = 12;
const NET_RECEIVE_SLOT: usize = 8;
/// Frames asked for beyond the need: one in four, and at least one. Grants that end late, because a peer does not let go,
/// keep their references.
const SPARE: u32 = 4;

/// What one device asks of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Item {
    /// Which, for people.
    pub(crate) of: String,
    /// How the number comes about.
    pub(crate) arithmetic: String,
    pub(crate) count: u32,
}

/// What a domain needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DomainNeed {
    pub(crate) id: u16,
    pub(crate) name: String,
    /// The version of its table.
    pub(crate) grant_version: u32,
    pub(crate) grants: Vec<Item>,
    /// All its references, the reserved ones included.
    pub(crate) references: u32,
    /// Frames that hold them.
    pub(crate) grant_frames: u32,
    /// Status frames beside them.
    pub(crate) status_frames: u32,
    /// The limit to set.
    pub(crate) grant_frames_to_set: u32,
    /// The limit that the description has.
    pub(crate) grant_frames_limit: u32,
    pub(crate) mappings: Vec<Item>,
    /// All its mappings.
    pub(crate) handles: u32,
    pub(crate) maptrack_frames: u32,
    pub(crate) maptrack_frames_to_set: u32,
    pub(crate) maptrack_frames_limit: u32,
}

impl DomainNeed {
    /// Whether the description's limits are enough.
    pub(crate) fn fits(&self) -> bool {
        self.grant_frames <= self.grant_frames_limit && self.maptrack_frames <= self.maptrack_frames_limit
    }
}

/// What every domain needs, in their order.
pub(crate) fn needs(description: &Description) -> Vec<DomainNeed> {
    let mut grants: Vec<Vec<Item>> = description.domains.iter().map(|_| Vec::new()).collect();
    let mut mappings = grants.clone();
    let mut add = |backend, frontend, front: Item, back: Item| {
        if let (Some(backend), Some(frontend)) = (description.number(backend), description.number(frontend)) {
            grants[frontend].push(front);
            mappings[backend].push(back);
        }
    };
    for (number, disk) in description.disks.iter().enumerate() {
        let (front, back) = of_disk(number, disk);
        add(&disk.backend, &disk.frontend, front, back);
    }
    for (number, network) in description.networks.iter().enumerate() {
        let (front, back) = of_network(number, network);
        add(&network.backend, &network.frontend, front, back);
    }
    let domains = description.domains.iter().zip(grants).zip(mappings).zip(1..);
    domains
        .map(|(((domain, mut grants), mut mappings), id)| {
            let own = |count: u32| Item {
                of: "its own programs".to_owned(),
                arithmetic: "as described".to_owned(),
                count,
            };
            grants.extend(Some(domain.grants.get()).filter(|count| *count > 0).map(own));
            mappings.extend(Some(domain.mappings.get()).filter(|count| *count > 0).map(own));
            let version = domain.grant_version.get();
            let references = NR_RESERVED_ENTRIES + sum(&grants);
            let grant_frames = references.div_ceil(entries_per_frame(version));
            let handles = sum(&mappings);
            // Of n frames' handles one is never given out.
            let maptrack_frames = if handles == 0 {
                0
            } else {
                (handles + 1).div_ceil(HANDLES_PER_FRAME)
            };
            DomainNeed {
                id,
                name: domain.name.get_ref().to_string(),
                grant_version: version,
                grants,
                references,
                grant_frames,
                status_frames: if version == 2 {
                    status_pages_for(grant_frames)
                } else {
                    0
                },
                grant_frames_to_set: with_spare(grant_frames),
                grant_frames_limit: domain.grant_frames.get(),
                mappings,
                handles,
                maptrack_frames,
                maptrack_frames_to_set: with_spare(maptrack_frames),
                maptrack_frames_limit: domain.maptrack_frames.get(),
            }
        })
        .collect()
}

/// References that a frame holds.
pub(crate) fn entries_per_frame(version: u32) -> u32 {
    if version == 2 {
        V2_ENTRIES_PER_PAGE
    } else {
        V1_ENTRIES_PER_PAGE
    }
}

fn with_spare(frames: u32) -> u32 {
    frames + frames.div_ceil(SPARE).max(1)
}

fn sum(items: &[Item]) -> u32 {
    items.iter().fold(0, |sum, item| sum.saturating_add(item.count))
}

fn slots(pages: u32, slot: usize) -> u32 {
    let pages = usize::try_from(pages).unwrap_or(usize::MAX);
    RingShape::new(pages, slot).map_or(0, RingShape::slots)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// What a disk asks of its frontend and of its backend.
fn of_disk(number: usize, disk: &Disk) -> (Item, Item) {
    let (queues, ring) = (disk.queues.get(), 1 << disk.ring_order.get());
    let slots = slots(ring, slot_size(Abi::X86_64));
    let segments = disk.segments();
    let indirect = if segments > count(MAX_DIRECT_SEGMENTS) {
        segments.div_ceil(count(SEGMENTS_PER_INDIRECT_PAGE))
    } else {
        0
    };
    let request = segments + indirect;
    let pool = count(FrontendConfig::new(Abi::X86_64).max_pages);
    let in_flight = slots * request;
    let (data, data_text) = match disk.driver {
        Driver::Gnttab if in_flight > pool => (
            pool,
            format!("{pool} of the pool, less than {slots} slots x {request}"),
        ),
        _ => (
            in_flight,
            format!("{slots} slots x {}", request_text(segments, indirect)),
        ),
    };
    let front = Item {
        of: format!("disk {number}, from {}", disk.backend.get_ref()),
        arithmetic: format!("{} x ({} + {data_text})", queues_text(queues), pages_text(ring)),
        count: queues * (ring + data),
    };
    let kept = count(BackendConfig::new(Abi::X86_64, true).persistent_limit);
    // What is not kept is mapped while its request is served.
    let one_shot = match disk.driver {
        Driver::Gnttab => segments.max(indirect),
        Driver::Linux => in_flight,
    };
    let (mapped, mapped_text) = match (disk.sharing, disk.driver) {
        (Sharing::Persistent, _) if data <= kept => (data, format!("{data} kept")),
        (Sharing::Persistent, Driver::Gnttab) => {
            (kept + one_shot, format!("{kept} kept + {one_shot} of a request"))
        }
        (Sharing::Persistent, Driver::Linux) => (data, format!("{kept} kept + {} of requests", data - kept)),
        (Sharing::Copied, _) => (0, "0 of requests, which are copied".to_owned()),
        (Sharing::Mapped, Driver::Gnttab) => (one_shot, format!("{one_shot} of the request being served")),
        (Sharing::Mapped, Driver::Linux) => (
            one_shot,
            format!("{slots} slots x {}", request_text(segments, indirect)),
        ),
    };
    let back = Item {
        of: format!("disk {number}, for {}", disk.frontend.get_ref()),
        arithmetic: format!("{} x ({} + {mapped_text})", queues_text(queues), pages_text(ring)),
        count: queues * (ring + mapped),
    };
    (front, back)
}

fn request_text(segments: u32, indirect: u32) -> String {
    match indirect {
        0 => format!("{segments} segments"),
        _ => format!("({segments} segments + {indirect} indirect)"),
    }
}

fn queues_text(queues: u32) -> String {
    if queues == 1 {
        "1 queue".to_owned()
    } else {
        format!("{queues} queues")
    }
}

fn pages_text(pages: u32) -> String {
    if pages == 1 {
        "1 ring page".to_owned()
    } else {
        format!("{pages} ring pages")
    }
}

/// What a network interface asks of its frontend and of its backend.
fn of_network(number: usize, network: &Network) -> (Item, Item) {
    let queues = network.queues.get();
    let (sent, received) = (slots(1, NET_TRANSMIT_SLOT), slots(1, NET_RECEIVE_SLOT));
    let front = Item {
        of: format!("network {number}, from {}", network.backend.get_ref()),
        arithmetic: format!(
            "{} x (2 ring pages + {sent} to send + {received} to receive)",
            queues_text(queues)
        ),
        count: queues * (2 + sent + received),
    };
    // What is received is always copied.
    let (mapped, text) = match network.transmit {
        Transmit::Map => (sent, format!("{sent} being sent")),
        Transmit::Copy => (0, "0, all is copied".to_owned()),
    };
    let back = Item {
        of: format!("network {number}, for {}", network.frontend.get_ref()),
        arithmetic: format!("{} x (2 ring pages + {text})", queues_text(queues)),
        count: queues * (2 + mapped),
    };
    (front, back)
}

#[cfg(test)]
mod tests {
    use gnttab_io::blkif::{DeviceProperties, Disk as _, FrontendQueue, Io};
    use gnttab_io::fake::{Event, FakeDomain, RamDisk};
    use proptest::prelude::*;

    use super::*;

    fn plan(devices: &str) -> Vec<DomainNeed> {
        let text = format!("[[domain]]\nname = \"back\"\n[[domain]]\nname = \"front\"\n{devices}");
        needs(&Description::parse(&text).unwrap())
    }

    fn disk(more: &str) -> (u32, u32) {
        let needs = plan(&format!(
            "[[disk]]\nbackend = \"back\"\nfrontend = \"front\"\n{more}"
        ));
        (needs[1].grants[0].count, needs[0].mappings[0].count)
    }

    /// By hand from the protocol: 32 slots in a page, 33 pages a request of 32 segments.
    #[test]
    fn disks_are_counted_as_their_drivers_use_them() {
        assert_eq!(disk(""), (1 + 32 * 33, 1 + 32 * 33));
        assert_eq!(disk("sharing = \"mapped\""), (1057, 1 + 32));
        assert_eq!(disk("sharing = \"copied\""), (1057, 1));
        assert_eq!(disk("sharing = \"mapped\"\ndriver = \"linux\""), (1057, 1057));
        assert_eq!(disk("indirect-segments = 0"), (1 + 32 * 11, 1 + 32 * 11));
        assert_eq!(
            disk("queues = 2\nring-order = 1"),
            (2 * (2 + 1056), 2 * (2 + 1056))
        );
        assert_eq!(
            disk("ring-order = 1\ndriver = \"linux\""),
            (2 + 64 * 33, 2 + 64 * 33)
        );
        assert_eq!(disk("indirect-segments = 256"), (1057, 1057));
    }

    #[test]
    fn networks_have_256_slots_each_way() {
        let needs = plan("[[network]]\nbackend = \"back\"\nfrontend = \"front\"\nqueues = 4");
        assert_eq!((needs[1].references, needs[0].handles), (8 + 4 * 514, 4 * 258));
        let needs = plan("[[network]]\nbackend = \"back\"\nfrontend = \"front\"\ntransmit = \"copy\"");
        assert_eq!(needs[0].handles, 2);
    }

    #[test]
    fn frames_are_rounded_up_by_version() {
        let frames = |grants: u32, version: u32| {
            let text = format!("[[domain]]\nname = \"a\"\ngrants = {grants}\ngrant-version = {version}\n");
            let need = needs(&Description::parse(&text).unwrap()).remove(0);
            (need.grant_frames, need.status_frames)
        };
        assert_eq!(frames(504, 1), (1, 0));
        assert_eq!(frames(505, 1), (2, 0));
        assert_eq!(frames(504, 2), (2, 1));
        assert_eq!(frames(256 * 8, 2), (9, 2));
        let maptrack = |mappings: u32| {
            let text = format!("[[domain]]\nname = \"a\"\nmappings = {mappings}\n");
            needs(&Description::parse(&text).unwrap())[0].maptrack_frames
        };
        assert_eq!([0, 1, 255, 256, 511].map(maptrack), [0, 1, 1, 2, 2]);
    }

    #[test]
    fn a_limit_that_is_too_low_does_not_fit() {
        let text = "[[domain]]\nname = \"a\"\ngrant-frames = 1\ngrants = 600\n";
        let needs = needs(&Description::parse(text).unwrap());
        assert!(!needs[0].fits());
        assert_eq!((needs[0].grant_frames, needs[0].grant_frames_to_set), (2, 3));
    }

    proptest! {
        /// The plan's number is what the frontend's own driver comes to with a backend that answers nothing.
        #[test]
        fn a_full_ring_grants_what_was_planned(order in 0_u32..3, indirect in 0_u16..70) {
            let domain = FakeDomain::new();
            let config = FrontendConfig { max_indirect: indirect, ..FrontendConfig::new(Abi::X86_64) };
            let mut queue = FrontendQueue::new(domain.granter(), config);
            let ring = queue.open(1 << order, Event::new()).unwrap();
            let disk_info = RamDisk::new(1 << 11).info();
            queue.start(DeviceProperties { disk: disk_info, barrier: false, persistent: true, max_indirect: 256 });
            let pages = usize::from(indirect).max(MAX_DIRECT_SEGMENTS);
            for token in 0..130 {
                queue.submit(token, Io::Write { sector: 0, data: vec![0; pages * 4096].into() }).unwrap();
            }
            queue.kick();
            let planned = disk(&format!("ring-order = {order}\nindirect-segments = {indirect}")).0;
            prop_assert_eq!(count(ring.len()) + count(queue.pool_pages()), planned);
        }
    }
}
