//! The thirteen operations and how a command register names them (spec 1.2, 3.1).

use core::fmt;

use crate::{
    Abi, CacheFlush, Copy, DumpTable, GetStatusFrames, GetVersion, MapGrantRef, QuerySize, SetVersion,
    SetupTable, SwapGrantRef, Transfer, UnmapAndReplace, UnmapGrantRef,
};

/// Hypercall number of `grant_table_op`, `__HYPERVISOR_grant_table_op` (spec 1.2).
pub const GRANT_TABLE_OP: u32 = 20;

/// The lowest `__XEN_INTERFACE_VERSION__` whose header shows version 2 tables: operations 8 to
/// 12 and their structures, `grant_entry_header`, `grant_entry_v2` and `grant_status_t`. Below
/// it `grant_entry_v1` is called `grant_entry` (spec 1.2).
pub const INTERFACE_VERSION_2_TABLES: u32 = 0x0003_020a;

/// The lowest `__XEN_INTERFACE_VERSION__` whose header declares [`SetupTable::frame_list`] as a
/// list of `xen_pfn_t`. Below it the list is of `unsigned long`, which has the same bits on x86 (spec 1.2).
pub const INTERFACE_SETUP_TABLE_PFNS: u32 = 0x0004_0300;

/// One operation of the grant-table hypercall (spec 1.2).
///
/// ```
/// use gnttab_abi::{Abi, Op};
///
/// assert_eq!(Op::from_number(5), Some(Op::Copy));
/// assert_eq!(Op::Copy.to_string(), "copy");
/// assert_eq!(Op::Copy.arg_size(Abi::X86_32), 24);
/// assert_eq!(Op::SwapGrantRef.interface_since(), Some(0x0003_020a));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Op {
    /// Map another domain's page.
    MapGrantRef = 0,
    /// Undo a mapping.
    UnmapGrantRef = 1,
    /// Learn (and enlarge to) the frames of a table.
    SetupTable = 2,
    /// Print a table. Real Xen never dispatched it.
    DumpTable = 3,
    /// Give a page away.
    Transfer = 4,
    /// Copy bytes through grants.
    Copy = 5,
    /// Ask how large a table is and may become.
    QuerySize = 6,
    /// Undo a mapping and put another in its place.
    UnmapAndReplace = 7,
    /// Choose the layout of the own table.
    SetVersion = 8,
    /// Learn the frames of the status words.
    GetStatusFrames = 9,
    /// Ask for the layout of a table.
    GetVersion = 10,
    /// Exchange two entries of the own table.
    SwapGrantRef = 11,
    /// Maintain data caches for a granted page.
    CacheFlush = 12,
}

impl Op {
    /// All operations, in the order of their numbers.
    pub const ALL: [Op; 13] = [
        Op::MapGrantRef,
        Op::UnmapGrantRef,
        Op::SetupTable,
        Op::DumpTable,
        Op::Transfer,
        Op::Copy,
        Op::QuerySize,
        Op::UnmapAndReplace,
        Op::SetVersion,
        Op::GetStatusFrames,
        Op::GetVersion,
        Op::SwapGrantRef,
        Op::CacheFlush,
    ];

    /// The operation with that number: 0 to 12, `None` above.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Op> {
        if number < 13 {
            Some(Op::ALL[number as usize])
        } else {
            None
        }
    }

    /// The number that the hypercall's command carries.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The name of the public header without its `GNTTABOP_` prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Op::MapGrantRef => "map_grant_ref",
            Op::UnmapGrantRef => "unmap_grant_ref",
            Op::SetupTable => "setup_table",
            Op::DumpTable => "dump_table",
            Op::Transfer => "transfer",
            Op::Copy => "copy",
            Op::QuerySize => "query_size",
            Op::UnmapAndReplace => "unmap_and_replace",
            Op::SetVersion => "set_version",
            Op::GetStatusFrames => "get_status_frames",
            Op::GetVersion => "get_version",
            Op::SwapGrantRef => "swap_grant_ref",
            Op::CacheFlush => "cache_flush",
        }
    }

    /// The lowest `__XEN_INTERFACE_VERSION__` whose header shows the operation; `None` where
    /// every header does. A property of the header only: the hypervisor never asks (spec 1.2).
    #[must_use]
    pub const fn interface_since(self) -> Option<u32> {
        if (self as u32) < Op::SetVersion as u32 {
            None
        } else {
            Some(INTERFACE_VERSION_2_TABLES)
        }
    }

    /// Bytes of one element of the operation's argument array (spec 1.6).
    #[must_use]
    pub const fn arg_size(self, abi: Abi) -> usize {
        match self {
            Op::MapGrantRef => MapGrantRef::size(abi),
            Op::UnmapGrantRef => UnmapGrantRef::size(abi),
            Op::SetupTable => SetupTable::size(abi),
            Op::DumpTable => DumpTable::size(abi),
            Op::Transfer => Transfer::size(abi),
            Op::Copy => Copy::size(abi),
            Op::QuerySize => QuerySize::size(abi),
            Op::UnmapAndReplace => UnmapAndReplace::size(abi),
            Op::SetVersion => SetVersion::size(abi),
            Op::GetStatusFrames => GetStatusFrames::size(abi),
            Op::GetVersion => GetVersion::size(abi),
            Op::SwapGrantRef => SwapGrantRef::size(abi),
            Op::CacheFlush => CacheFlush::size(abi),
        }
    }
}

/// The header's name without its prefix, as [`Op::name`].
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The command register of the hypercall: an operation and the opaque bits of a restart
/// (spec 3.1.1 step 4, 3.1.3).
///
/// ```
/// use gnttab_abi::{Command, Op};
///
/// // A cache flush that resumes its search at reference 0x3000.
/// let command = Command(0x300c);
/// assert_eq!((command.op(), command.opaque()), (Some(Op::CacheFlush), 0x3000));
/// assert_eq!(Command(13).op(), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u32);

impl Command {
    /// The bits that carry the operation's number.
    pub const MASK: u32 = 0xFFF;

    /// A command for an operation, without opaque bits.
    #[must_use]
    pub const fn new(op: Op) -> Command {
        Command(op.number())
    }

    /// The operation, if the low twelve bits name one.
    #[must_use]
    pub const fn op(self) -> Option<Op> {
        Op::from_number(self.0 & Self::MASK)
    }

    /// The bits above the operation's number, in place: a multiple of 4096.
    #[must_use]
    pub const fn opaque(self) -> u32 {
        self.0 & !Self::MASK
    }
}
