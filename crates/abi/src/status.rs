//! What an operation answers for each item (spec 1.3).

use core::fmt;

macro_rules! statuses {
    ($($(#[$doc:meta])* $konst:ident = $value:literal, $name:literal, $message:literal;)*) => {
        /// The status of one item of an operation (`GNTST_*`, signed 16 bits).
        ///
        /// Zero is success and every failure is negative. A field that a guest filled in may
        /// hold any number, so this is a newtype with the known values as constants.
        ///
        /// ```
        /// use gnttab_abi::GrantStatus;
        ///
        /// let status = GrantStatus(-3);
        /// assert_eq!(status.result(), Err(GrantStatus::BAD_GNTREF));
        /// assert_eq!(status.to_string(), "bad_gntref (-3)");
        /// assert_eq!(status.message(), Some("invalid grant reference"));
        /// assert_eq!(GrantStatus(7).message(), None);
        /// ```
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct GrantStatus(pub i16);

        impl GrantStatus {
            $($(#[$doc])* pub const $konst: GrantStatus = GrantStatus($value);)*

            /// Every status that the interface knows, from [`GrantStatus::OKAY`] downwards.
            pub const ALL: &'static [GrantStatus] = &[$(GrantStatus::$konst,)*];

            /// The name of the public header without its `GNTST_` prefix, or `None` for a
            /// number that the interface does not know.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some($name),)* _ => None }
            }

            /// The message of the public header (`GNTTABOP_error_msgs`), or `None` for a number
            /// that the interface does not know.
            #[must_use]
            pub const fn message(self) -> Option<&'static str> {
                match self.0 { $($value => Some($message),)* _ => None }
            }
        }
    };
}

statuses! {
    /// Done.
    OKAY = 0, "okay", "okay";
    /// Failed for a reason that has no code of its own.
    GENERAL_ERROR = -1, "general_error", "undefined error";
    /// No such domain.
    BAD_DOMAIN = -2, "bad_domain", "unrecognised domain id";
    /// The reference lies past the table, or makes no sense here.
    BAD_GNTREF = -3, "bad_gntref", "invalid grant reference";
    /// No live mapping has this handle.
    BAD_HANDLE = -4, "bad_handle", "invalid mapping handle";
    /// A guest address could not be used.
    BAD_VIRT_ADDR = -5, "bad_virt_addr", "invalid virtual address";
    /// The bus address is not that of the mapping.
    BAD_DEV_ADDR = -6, "bad_dev_addr", "invalid device address";
    /// The I/O MMU has no room. No version of Xen that the spec knows produces it.
    NO_DEVICE_SPACE = -7, "no_device_space", "no spare translation slot in the I/O MMU";
    /// A policy forbids it.
    PERMISSION_DENIED = -8, "permission_denied", "permission denied";
    /// The page is not one that may be used so.
    BAD_PAGE = -9, "bad_page", "bad page";
    /// A copy would cross the end of a page.
    BAD_COPY_ARG = -10, "bad_copy_arg", "copy arguments cross page boundary";
    /// The frame's number does not fit the receiver.
    ADDRESS_TOO_BIG = -11, "address_too_big", "page address size too large";
    /// Not now: try again.
    EAGAIN = -12, "eagain", "operation not done; try again";
    /// Out of handles. Newer than the header of Xen 4.5 (spec 1.4).
    NO_SPACE = -13, "no_space", "out of space";
}

impl GrantStatus {
    /// Whether the item succeeded.
    #[must_use]
    pub const fn is_okay(self) -> bool {
        self.0 == 0
    }

    /// `Ok` for [`GrantStatus::OKAY`], the status itself as the error otherwise.
    ///
    /// # Errors
    /// Every status but okay, unknown numbers included.
    pub const fn result(self) -> Result<(), GrantStatus> {
        if self.is_okay() { Ok(()) } else { Err(self) }
    }
}

/// The name and the number: `bad_gntref (-3)`.
impl fmt::Display for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name().unwrap_or("unknown status"), self.0)
    }
}

impl fmt::Debug for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for GrantStatus {}
