use core::fmt;

macro_rules! errnos {
    ($($name:ident = $meaning:literal,)*) => {
        /// Why a request was refused: the errors the protocol can name.
        ///
        /// On the wire an error is the *name*, because numbers differ between
        /// systems.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Errno {
            $(#[doc = concat!($meaning, ".")] $name,)*
        }

        impl Errno {
            /// Every error the protocol can name, in the order of `xs_wire.h`.
            pub const ALL: &'static [Errno] = &[$(Errno::$name,)*];

            /// The name that goes on the wire.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Errno::$name => stringify!($name),)*
                }
            }

            /// What it means, for a person.
            pub const fn meaning(self) -> &'static str {
                match self {
                    $(Errno::$name => $meaning,)*
                }
            }

            /// The error of this name.
            pub fn from_name(name: &[u8]) -> Option<Self> {
                Self::ALL.iter().copied().find(|e| e.name().as_bytes() == name)
            }
        }
    };
}

errnos! {
    EINVAL = "malformed path, number or message",
    EACCES = "the permissions do not allow it",
    EEXIST = "this watch exists already",
    EISDIR = "it is a directory",
    ENOENT = "no such node, watch, transaction or domain",
    ENOMEM = "the store is out of memory",
    ENOSPC = "the domain's quota of nodes, bytes or transactions is used up",
    EIO = "input or output failed",
    ENOTEMPTY = "the directory is not empty",
    ENOSYS = "the store does not know this request",
    EROFS = "the store is read-only",
    EBUSY = "a transaction cannot be started within a transaction",
    EAGAIN = "somebody else changed what this transaction used: start it again",
    EISCONN = "already connected",
    E2BIG = "it does not fit a message, or the quota of watches is used up",
    EPERM = "only a privileged domain may give a node to another owner",
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.meaning())
    }
}

impl core::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again_and_others_are_not() {
        for &errno in Errno::ALL {
            assert_eq!(Errno::from_name(errno.name().as_bytes()), Some(errno));
        }
        assert_eq!(Errno::from_name(b"EWOULDBLOCK"), None);
        assert_eq!(Errno::from_name(b""), None);
    }
}
