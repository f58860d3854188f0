//! Which layout the table has, and how large it may become (spec guest-driver 2.1, 2.2).

use gnttab_abi::{DomId, Errno, QuerySize, SetVersion, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE};

use crate::{Call, Hypercall};

/// The most frames of a hypervisor that cannot be asked.
const LEGACY_MAX_FRAMES: u32 = 4;

/// The layout of a grant table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Entries of 8 bytes with 32-bit frame numbers.
    #[default]
    V1,
    /// Entries of 16 bytes, with status words beside them.
    V2,
}

impl Version {
    /// The version to ask for where addresses have so many bits: version 2 only if a 32-bit frame
    /// number cannot name every frame.
    ///
    /// For PV the addresses are the machine's, for an auto-translated guest all the
    /// guest-physical ones that it may ever use.
    ///
    /// ```
    /// use gnttab_guest::Version;
    ///
    /// assert_eq!(Version::for_address_bits(44), Version::V1);
    /// assert_eq!(Version::for_address_bits(46), Version::V2);
    /// ```
    #[must_use]
    pub const fn for_address_bits(bits: u32) -> Version {
        if bits > 44 { Version::V2 } else { Version::V1 }
    }

    /// 1 or 2.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }

    /// Entries in one frame.
    #[must_use]
    pub const fn entries_per_frame(self) -> u32 {
        match self {
            Version::V1 => V1_ENTRIES_PER_PAGE,
            Version::V2 => V2_ENTRIES_PER_PAGE,
        }
    }
}

/// Version 1 was asked for, and the hypervisor holds on to version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grant table stays at version 2: set_version(1) answered {0}; is an entry still mapped?")]
pub struct VersionStuck(pub Errno);

/// Asks for a version and says which one is in force: version 2 only when it was granted,
/// version 1 in every other case.
pub(crate) fn choose(x: &impl Hypercall, wanted: Version) -> Result<Version, VersionStuck> {
    let mut arg = SetVersion {
        version: wanted.number(),
    };
    match (x.grant_table_op(Call::SetVersion(&mut arg)), wanted) {
        (Ok(()), _) => Ok(wanted),
        (Err(_), Version::V2) => Ok(Version::V1),
        // The one case in which carrying on would misread every entry. A hypervisor too old to
        // know of versions leaves the field as it was.
        (Err(errno), Version::V1) if arg.version == Version::V2.number() => Err(VersionStuck(errno)),
        (Err(_), Version::V1) => Ok(Version::V1),
    }
}

/// How many frames the own table may have.
pub(crate) fn max_frames(x: &impl Hypercall) -> u32 {
    // A status that nobody writes is not a success.
    let mut arg = QuerySize {
        dom: DomId::SELF,
        status: gnttab_abi::GrantStatus::GENERAL_ERROR,
        ..QuerySize::default()
    };
    match x.grant_table_op(Call::QuerySize(&mut arg)) {
        Ok(()) if arg.status.is_okay() => arg.max_nr_frames,
        _ => LEGACY_MAX_FRAMES,
    }
}
