//! What a hypercall as a whole can answer (spec 0.3). Xen's numbers, equal on all architectures.

use core::fmt;

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// A hypercall-level error. It ends a batch at once; finished items stay finished (spec 0.2).
        ///
        /// ```
        /// use gnttab_abi::Errno;
        ///
        /// assert_eq!(Errno::Fault.hypercall_result(), -14);
        /// assert_eq!(Errno::from_number(14), Some(Errno::Fault));
        /// assert_eq!(Errno::Fault.to_string(), "-EFAULT (-14)");
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Errno { $($(#[$doc])* $name,)* }

        impl Errno {
            /// Every error that the interface uses, by rising number.
            pub const ALL: &'static [Errno] = &[$(Errno::$name,)*];

            /// The positive number of the error.
            #[must_use]
            pub const fn number(self) -> u16 {
                match self { $(Errno::$name => $value,)* }
            }

            /// The error with that positive number, if this interface knows it.
            #[must_use]
            pub const fn from_number(number: u16) -> Option<Errno> {
                match number { $($value => Some(Errno::$name),)* _ => None }
            }

            /// The C name without its minus sign, as in `EFAULT`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Errno::$name => $text,)* }
            }
        }
    };
}

errnos! {
    /// Not permitted.
    Perm = 1, "EPERM";
    /// No such domain.
    Srch = 3, "ESRCH";
    /// Input or output failed.
    Io = 5, "EIO";
    /// No such page or device at that address.
    Nxio = 6, "ENXIO";
    /// Too much at once.
    TooBig = 7, "E2BIG";
    /// Try again.
    Again = 11, "EAGAIN";
    /// No memory.
    NoMem = 12, "ENOMEM";
    /// A policy forbids it.
    Acces = 13, "EACCES";
    /// Guest memory could not be read or written.
    Fault = 14, "EFAULT";
    /// Still in use.
    Busy = 16, "EBUSY";
    /// Across devices.
    Xdev = 18, "EXDEV";
    /// An argument makes no sense.
    Inval = 22, "EINVAL";
    /// Outside a function's domain.
    Dom = 33, "EDOM";
    /// A value does not fit.
    Range = 34, "ERANGE";
    /// No such operation.
    NoSys = 38, "ENOSYS";
    /// No data.
    NoData = 61, "ENODATA";
    /// A number overflowed.
    Overflow = 75, "EOVERFLOW";
    /// A sequence that may not be.
    IlSeq = 84, "EILSEQ";
    /// Known, but not supported here.
    OpNotSupp = 95, "EOPNOTSUPP";
}

impl Errno {
    /// The value a hypercall returns: the number, negated.
    #[must_use]
    pub const fn hypercall_result(self) -> i64 {
        -(self.number() as i64)
    }
}

/// As C writes it, and the number: `-EFAULT (-14)`.
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "-{} ({})", self.name(), -i32::from(self.number()))
    }
}

impl core::error::Error for Errno {}
