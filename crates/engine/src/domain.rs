//! What the engine keeps for a domain, and the machine's settings (spec 2.1, 2.2).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::Cell;
use core::marker::PhantomData;

use gnttab_abi::{DomId, GrantStatus, Mfn, Op};

use crate::hypervisor::{DomainKind, Hypervisor};
use crate::maptrack::Maptrack;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering};
use crate::table::Table;

/// A layout of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// 8-byte entries, status bits in the flags.
    V1,
    /// 16-byte entries, status words apart.
    V2,
}

impl Version {
    /// 1 or 2.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }

    /// The version with that number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Version> {
        match number {
            1 => Some(Version::V1),
            2 => Some(Version::V2),
            _ => None,
        }
    }
}

/// Whose behaviour the engine shows where two versions of Xen differ (spec 10.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reference {
    /// Xen as of August 2026.
    #[default]
    Head,
    /// Xen 4.17.7.
    V4_17,
    /// Xen 4.20.4. What a PV caller sees was measured; elsewhere it is taken to be as [`Reference::Head`].
    V4_20,
}

/// A set of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpSet(u16);

impl OpSet {
    /// All thirteen.
    pub const ALL: OpSet = OpSet(0x1FFF);

    /// The set without one operation.
    #[must_use]
    pub const fn without(self, op: Op) -> OpSet {
        OpSet(self.0 & !(1 << op as u16))
    }

    /// Whether an operation is in the set.
    #[must_use]
    pub const fn contains(self, op: Op) -> bool {
        self.0 & (1 << op as u16) != 0
    }
}

/// Settings of the machine (spec 2.1).
///
/// ```
/// use gnttab_engine::{Config, Version};
///
/// let config = Config { max_version: Version::V1, ..Config::default() };
/// assert_eq!(config.max_grant_frames, 64);
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Default of a domain's frame limit (`gnttab_max_frames`); with [`Reference::V4_17`] also its ceiling.
    pub max_grant_frames: u32,
    /// Default of a domain's maptrack limit, in pages of 256 handles (`gnttab_max_maptrack_frames`);
    /// with [`Reference::V4_17`] also its ceiling.
    pub max_maptrack_frames: u32,
    /// The highest version that a domain may be given.
    pub max_version: Version,
    /// Whether transitive grants work at all.
    pub transitive: bool,
    /// Whether transfers work at all.
    pub transfer: bool,
    /// Whether dump_table answers. Off, it is -ENOSYS for everybody, as in Xen.
    pub dump: bool,
    /// Processors, or threads, that may be in the engine at once.
    pub processors: usize,
    /// The Xen whose behaviour is shown where two differ.
    pub reference: Reference,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            max_grant_frames: 64,
            max_maptrack_frames: 1024,
            max_version: Version::V2,
            transitive: true,
            transfer: true,
            dump: true,
            processors: 64,
            reference: Reference::Head,
        }
    }
}

/// The most frames that a table may be allowed. The reference's entry count overflows from
/// 2^20 frames on (spec 2.2); the engine refuses such limits.
pub const MAX_GRANT_FRAMES: u32 = (1 << 20) - 1;

/// The most maptrack pages that a domain may be allowed.
pub const MAX_MAPTRACK_FRAMES: u32 = (1 << 20) - 1;

/// Limits of one domain, fixed at its creation.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Frames of its table, 1 to [`MAX_GRANT_FRAMES`]; `None`: the machine's default.
    pub grant_frames: Option<u32>,
    /// Maptrack pages of 256 handles, 0 to [`MAX_MAPTRACK_FRAMES`]; `None`: the machine's default.
    pub maptrack_frames: Option<u32>,
    /// The highest version that its table may have.
    pub version: Version,
    /// Processors of the domain: at least 1.
    pub vcpus: usize,
    /// Whether others may use transitive entries of its table.
    pub transitive: bool,
    /// Operations that it may call; others are -ENOSYS (transfer: -EOPNOTSUPP).
    pub operations: OpSet,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            grant_frames: None,
            maptrack_frames: None,
            version: Version::V2,
            vcpus: 1,
            transitive: true,
            operations: OpSet::ALL,
        }
    }
}

/// A domain could not be created; nothing was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// The number is reserved.
    #[error("{0} is not an ordinary domain's number (they end below 0x7ff0)")]
    BadId(DomId),
    /// There is, or was and is still held, a domain of that number.
    #[error("{0} exists already, or still has frames in use")]
    Exists(DomId),
    /// The frame limit is 0 or above what is allowed.
    #[error("a limit of {asked} grant frames is outside 1 to {most}")]
    GrantFrames {
        /// The limit asked for.
        asked: u32,
        /// The largest.
        most: u32,
    },
    /// The maptrack limit is above what is allowed.
    #[error("a limit of {asked} maptrack frames is above {most}")]
    MaptrackFrames {
        /// The limit asked for.
        asked: u32,
        /// The largest.
        most: u32,
    },
    /// The version is above the machine's.
    #[error("version {} is above the machine's highest, {}", asked.number(), most.number())]
    Version {
        /// The version asked for.
        asked: Version,
        /// The machine's.
        most: Version,
    },
    /// A domain needs a vCPU.
    #[error("a domain needs at least one vCPU")]
    NoVcpus,
    /// No memory for the first frame.
    #[error("no memory for the first grant frame")]
    NoMemory,
}

/// A domain as the engine knows it.
///
/// Having one (in an `Arc`) tells you: its table and its list of mappings are there. It does not
/// tell you that the domain still runs.
pub struct Domain<H: Hypervisor> {
    id: DomId,
    kind: DomainKind,
    limits: Limits,
    private: H::Domain,
    dying: AtomicBool,
    /// The hypervisor has given up its memory; it goes with the last use of its entries.
    pub(crate) retire: AtomicBool,
    /// Handles from here up have been released by teardown.
    pub(crate) teardown_at: AtomicU32,
    pub(crate) table: Table<H::TablePage>,
    pub(crate) maptrack: Maptrack,
    /// Read-only and writable records by frame, for domains whose I/O MMU follows (spec 4.6).
    pub(crate) iommu: Mutex<BTreeMap<Mfn, IommuUse>>,
    pub(crate) vcpus: Vec<VcpuState>,
}

/// How many records of a domain name a frame (spec 4.6).
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct IommuUse {
    pub(crate) readonly: u32,
    pub(crate) writable: u32,
}

/// What belongs to one vCPU, on cache lines of its own.
#[derive(Default)]
#[repr(align(64))]
pub(crate) struct VcpuState {
    taken: AtomicBool,
    pub(crate) counters: Counters,
}

/// Counts of operations and statuses. Written by the one holder of the vCPU, without locked
/// operations; read by anybody.
#[derive(Default)]
pub(crate) struct Counters {
    operations: [AtomicU64; Op::ALL.len()],
    statuses: [AtomicU64; GrantStatus::ALL.len()],
}

impl Counters {
    #[inline]
    fn bump(counter: &AtomicU64, by: u64) {
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(by),
            Ordering::Relaxed,
        );
    }

    #[inline]
    pub(crate) fn operation(&self, op: Op) {
        Self::bump(&self.operations[op as usize], 1);
    }

    #[inline]
    pub(crate) fn status(&self, status: GrantStatus) {
        if status.is_okay() {
            return Self::bump(&self.statuses[0], 1);
        }
        let place = usize::from(status.0.unsigned_abs()).min(self.statuses.len() - 1);
        Self::bump(&self.statuses[place], 1);
    }

    pub(crate) fn add_to(&self, operations: &mut [u64], statuses: &mut [u64]) {
        for (sum, counter) in operations.iter_mut().zip(&self.operations) {
            *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
        }
        for (sum, counter) in statuses.iter_mut().zip(&self.statuses) {
            *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
        }
    }
}

impl<H: Hypervisor> Domain<H> {
    pub(crate) fn new(
        hv: &H,
        config: &Config,
        id: DomId,
        kind: DomainKind,
        limits: Limits,
        private: H::Domain,
    ) -> Result<Domain<H>, CreateError> {
        if !id.is_ordinary() {
            return Err(CreateError::BadId(id));
        }
        let (mut most_frames, mut most_maptrack) = (MAX_GRANT_FRAMES, MAX_MAPTRACK_FRAMES);
        if config.reference == Reference::V4_17 {
            most_frames = most_frames.min(config.max_grant_frames);
            most_maptrack = most_maptrack.min(config.max_maptrack_frames);
        }
        if limits.version > config.max_version {
            return Err(CreateError::Version {
                asked: limits.version,
                most: config.max_version,
            });
        }
        let frames = limits.grant_frames.unwrap_or(config.max_grant_frames);
        if frames == 0 || frames > most_frames {
            return Err(CreateError::GrantFrames {
                asked: frames,
                most: most_frames,
            });
        }
        let maptrack = limits.maptrack_frames.unwrap_or(config.max_maptrack_frames);
        if maptrack > most_maptrack {
            return Err(CreateError::MaptrackFrames {
                asked: maptrack,
                most: most_maptrack,
            });
        }
        if limits.vcpus == 0 {
            return Err(CreateError::NoVcpus);
        }
        let limits = Limits {
            grant_frames: Some(frames),
            maptrack_frames: Some(maptrack),
            ..limits
        };
        let table = Table::new(hv, &private, frames).ok_or(CreateError::NoMemory)?;
        Ok(Domain {
            id,
            kind,
            limits,
            private,
            dying: AtomicBool::new(false),
            retire: AtomicBool::new(false),
            teardown_at: AtomicU32::new(u32::MAX),
            table,
            maptrack: Maptrack::new(maptrack, limits.vcpus),
            iommu: Mutex::new(BTreeMap::new()),
            vcpus: (0..limits.vcpus).map(|_| VcpuState::default()).collect(),
        })
    }

    /// Its number.
    #[must_use]
    #[inline]
    pub fn id(&self) -> DomId {
        self.id
    }

    /// Its kind.
    #[must_use]
    #[inline]
    pub fn kind(&self) -> DomainKind {
        self.kind
    }

    /// Its limits, defaults filled in.
    #[must_use]
    #[inline]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What the hypervisor keeps for it.
    #[must_use]
    #[inline]
    pub fn private(&self) -> &H::Domain {
        &self.private
    }

    /// Whether its death has begun.
    #[must_use]
    #[inline]
    pub fn is_dying(&self) -> bool {
        self.dying.load(Ordering::Acquire)
    }

    pub(crate) fn set_dying(&self) {
        self.dying.store(true, Ordering::Release);
    }

    /// The most frames its table may have.
    #[must_use]
    pub fn max_grant_frames(&self) -> u32 {
        self.table.max_frames()
    }
}

impl<H: Hypervisor> core::fmt::Debug for Domain<H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Domain")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// The right to act as one vCPU of a domain. There is at most one for each vCPU at a time.
///
/// Handles that this vCPU frees it gets back first, and its counters have one writer: it can be sent to another
/// thread, but not shared with one.
///
/// ```compile_fail
/// use gnttab_engine::machine::Machine;
/// use gnttab_engine::Vcpu;
///
/// fn share(_: impl Sync) {}
/// fn share_vcpu(vcpu: Vcpu<Machine>) {
///     share(vcpu);
/// }
/// ```
pub struct Vcpu<H: Hypervisor> {
    pub(crate) domain: Arc<Domain<H>>,
    pub(crate) number: usize,
    one_thread: PhantomData<Cell<()>>,
}

impl<H: Hypervisor> Vcpu<H> {
    /// Takes vCPU `number` of a domain; `None` if it has no such vCPU or somebody holds it.
    #[must_use]
    pub fn take(domain: &Arc<Domain<H>>, number: usize) -> Option<Vcpu<H>> {
        let state = domain.vcpus.get(number)?;
        let free = !state.taken.swap(true, Ordering::Acquire);
        free.then(|| Vcpu {
            domain: Arc::clone(domain),
            number,
            one_thread: PhantomData,
        })
    }

    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &Arc<Domain<H>> {
        &self.domain
    }

    #[inline]
    pub(crate) fn counters(&self) -> &Counters {
        &self.domain.vcpus[self.number].counters
    }
}

impl<H: Hypervisor> Drop for Vcpu<H> {
    fn drop(&mut self) {
        self.domain.vcpus[self.number]
            .taken
            .store(false, Ordering::Release);
    }
}

impl<H: Hypervisor> core::fmt::Debug for Vcpu<H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}v{}", self.domain.id, self.number)
    }
}
