//! Where each field of an argument lies, for each calling ABI.
//!
//! x86_64 and Arm share the wide layout (8-byte words and pointers, 8-aligned), x86_32 has
//! the narrow one. The structures themselves are in `args`; this is what they are made with.

use crate::{CacheOp, CopyFlags, DomId, GrantHandle, GrantRef, GrantStatus, MapFlags};

/// A calling ABI: how wide words and pointers inside an argument are (spec 1.1).
///
/// ```
/// use gnttab_abi::{Abi, SetupTable};
///
/// assert_eq!(Abi::ALL.map(SetupTable::size), [24, 16, 24]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Abi {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86, PV or HVM.
    X86_32,
    /// Arm of either width: laid out as [`Abi::X86_64`].
    Arm,
}

impl Abi {
    /// All ABIs.
    pub const ALL: [Abi; 3] = [Abi::X86_64, Abi::X86_32, Abi::Arm];

    /// Bytes of a word (`xen_pfn_t`, `unsigned long`) or a pointer inside an argument.
    #[must_use]
    pub const fn word_size(self) -> usize {
        match self {
            Abi::X86_64 | Abi::Arm => 8,
            Abi::X86_32 => 4,
        }
    }
}

/// A word whose width is the ABI's: a frame number or a guest pointer.
pub type Word = u64;

/// The bytes end before the structure does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the argument is {needed} bytes long, {got} were given")]
pub struct Truncated {
    /// Bytes that the structure takes in this ABI.
    pub needed: usize,
    /// Bytes that were given.
    pub got: usize,
}

/// A structure could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The buffer is too short. Nothing was written.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// A word is wider than the ABI's words. Nothing was written.
    #[error("field {field}: {value:#x} does not fit the 32-bit words of this ABI")]
    TooWide {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// A field that has the same size in every ABI.
pub(crate) trait Fixed: Copy {
    const SIZE: usize;
    fn load(bytes: &[u8]) -> Self;
    fn store(self, bytes: &mut [u8]);
}

macro_rules! fixed_int {
    ($($int:ty),*) => {$(
        impl Fixed for $int {
            const SIZE: usize = size_of::<$int>();
            #[inline]
            fn load(bytes: &[u8]) -> Self {
                let mut raw = [0; size_of::<$int>()];
                raw.copy_from_slice(&bytes[..size_of::<$int>()]);
                <$int>::from_le_bytes(raw)
            }
            #[inline]
            fn store(self, bytes: &mut [u8]) {
                bytes[..size_of::<$int>()].copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
fixed_int!(u16, i16, u32, i32, u64);

macro_rules! fixed_newtype {
    ($($name:ident($int:ty): $wrap:expr, $unwrap:expr;)*) => {$(
        impl Fixed for $name {
            const SIZE: usize = size_of::<$int>();
            #[inline]
            fn load(bytes: &[u8]) -> Self {
                $wrap(<$int>::load(bytes))
            }
            #[inline]
            fn store(self, bytes: &mut [u8]) {
                $unwrap(self).store(bytes);
            }
        }
    )*};
}
fixed_newtype! {
    DomId(u16): DomId, |v: DomId| v.0;
    GrantRef(u32): GrantRef, |v: GrantRef| v.0;
    GrantHandle(u32): GrantHandle, |v: GrantHandle| v.0;
    GrantStatus(i16): GrantStatus, |v: GrantStatus| v.0;
    MapFlags(u32): MapFlags::from_bits_retain, |v: MapFlags| v.bits();
    CopyFlags(u16): CopyFlags::from_bits_retain, |v: CopyFlags| v.bits();
    CacheOp(u32): CacheOp::from_bits_retain, |v: CacheOp| v.bits();
}

/// Loads a word of the ABI's width.
#[inline]
pub(crate) fn load_word(abi: Abi, bytes: &[u8]) -> Word {
    match abi.word_size() {
        4 => u64::from(u32::load(bytes)),
        _ => u64::load(bytes),
    }
}

/// Stores a word of the ABI's width; the caller has seen that it fits.
#[inline]
pub(crate) fn store_word(abi: Abi, word: Word, bytes: &mut [u8]) {
    match u32::try_from(word) {
        Ok(narrow) if abi.word_size() == 4 => narrow.store(bytes),
        _ => word.store(bytes),
    }
}

/// Declares a structure of the interface: its fields, and where they lie in the wide and the
/// narrow layout. `word` marks a field whose width is the ABI's.
macro_rules! structure {
    (
        $(#[$doc:meta])*
        $name:ident [$wide:literal, $narrow:literal] {
            $($(#[$fdoc:meta])* $field:ident : $kind:tt $(($ty:ty))? @ [$woff:literal, $noff:literal],)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: structure!(@type $kind $($ty)?),)*
        }

        impl $name {
            /// Bytes that the structure takes.
            #[must_use]
            pub const fn size(abi: $crate::Abi) -> usize {
                match abi.word_size() { 4 => $narrow, _ => $wide }
            }

            /// Reads the structure from the start of `bytes`. Any content is accepted;
            /// padding is ignored.
            ///
            /// # Errors
            /// [`Truncated`](crate::Truncated) if there are fewer bytes than [`Self::size`].
            #[inline]
            pub fn decode(abi: $crate::Abi, bytes: &[u8]) -> Result<Self, $crate::Truncated> {
                let needed = Self::size(abi);
                let Some(bytes) = bytes.get(..needed) else {
                    return Err($crate::Truncated { needed, got: bytes.len() });
                };
                let narrow = abi.word_size() == 4;
                Ok(Self {
                    $($field: structure!(@load $kind $($ty)?, abi, &bytes[if narrow { $noff } else { $woff }..]),)*
                })
            }

            /// Writes every field to the start of `bytes`; padding is left as it was.
            ///
            /// # Errors
            /// [`EncodeError`](crate::EncodeError) if the buffer is too short or a word does
            /// not fit the ABI; nothing is written then.
            #[inline]
            pub fn encode(&self, abi: $crate::Abi, bytes: &mut [u8]) -> Result<(), $crate::EncodeError> {
                let needed = Self::size(abi);
                let got = bytes.len();
                let Some(bytes) = bytes.get_mut(..needed) else {
                    return Err($crate::Truncated { needed, got }.into());
                };
                let narrow = abi.word_size() == 4;
                $(structure!(@fits $kind $($ty)?, narrow, self.$field, stringify!($field));)*
                $(structure!(@store $kind $($ty)?, abi, self.$field, &mut bytes[if narrow { $noff } else { $woff }..]);)*
                Ok(())
            }

            /// Where each field lies: its name, offset and size in bytes, in the order of the header.
            #[must_use]
            pub const fn fields(abi: $crate::Abi) -> &'static [(&'static str, usize, usize)] {
                match abi.word_size() {
                    4 => &[$((stringify!($field), $noff, structure!(@size $kind $($ty)?, 4)),)*],
                    _ => &[$((stringify!($field), $woff, structure!(@size $kind $($ty)?, 8)),)*],
                }
            }
        }
    };
    (@type word) => { $crate::Word };
    (@type fixed $ty:ty) => { $ty };
    (@load word, $abi:expr, $bytes:expr) => { $crate::layout::load_word($abi, $bytes) };
    (@load fixed $ty:ty, $abi:expr, $bytes:expr) => { <$ty as $crate::layout::Fixed>::load($bytes) };
    (@fits word, $narrow:expr, $value:expr, $name:expr) => {
        if $narrow && $value > u64::from(u32::MAX) {
            return Err($crate::EncodeError::TooWide { field: $name, value: $value });
        }
    };
    (@fits fixed $ty:ty, $narrow:expr, $value:expr, $name:expr) => {};
    (@store word, $abi:expr, $value:expr, $bytes:expr) => { $crate::layout::store_word($abi, $value, $bytes) };
    (@store fixed $ty:ty, $abi:expr, $value:expr, $bytes:expr) => {
        <$ty as $crate::layout::Fixed>::store($value, $bytes)
    };
    (@size word, $word:literal) => { $word };
    (@size fixed $ty:ty, $word:literal) => { <$ty as $crate::layout::Fixed>::SIZE };
}
pub(crate) use structure;
