//! What can go wrong, with what was found and what was expected.

use alloc::string::String;

use crate::Isa;

/// An error of this crate. Nothing was written when one is returned, unless the function says so.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A buffer of the wrong length.
    #[error("`{what}` has {found} elements, expected {expected}")]
    Length {
        /// The name of the argument.
        what: &'static str,
        /// Elements in it.
        found: usize,
        /// Elements that the other arguments ask for.
        expected: usize,
    },
    /// A number that is out of the range that the function takes.
    #[error("`{what}` is {found}, expected {expected}")]
    Value {
        /// The name of the argument.
        what: &'static str,
        /// Its value.
        found: String,
        /// The values that are taken.
        expected: &'static str,
    },
    /// A range that goes beyond the end.
    #[error("`{what}` asks for {len} elements from {start} on, of {available}")]
    Range {
        /// The name of the argument.
        what: &'static str,
        /// The first element asked for.
        start: usize,
        /// How many are asked for.
        len: usize,
        /// How many there are.
        available: usize,
    },
    /// No block size.
    #[error("the block size is {found}, expected a power of two from 32 to 4096")]
    BlockSize {
        /// Its value.
        found: usize,
    },
    /// A size that does not fit in memory's address space.
    #[error("`{what}` overflows: the sizes given are too large")]
    Overflow {
        /// What was being computed.
        what: &'static str,
    },
    /// An instruction set that this processor lacks.
    #[error("this processor does not have the instruction set `{isa}`")]
    Isa {
        /// The one asked for.
        isa: Isa,
    },
    /// The name of no instruction set.
    #[error("`{found}` is no instruction set")]
    UnknownIsa {
        /// The name as given.
        found: String,
    },
}

impl QuantError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Length { .. } => "the docs of the function say which lengths belong together",
            Self::Value { .. } => "use one of the values expected",
            Self::Range { .. } => "ask for less: ranges are counted in elements, not in bytes",
            Self::BlockSize { .. } => "64 is what QLoRA uses",
            Self::Overflow { .. } => "check the shape: it may come from a damaged file",
            Self::Isa { .. } => "Isa::available lists what this processor has; PT_QUANT_ISA=scalar always works",
            Self::UnknownIsa { .. } => "use scalar, avx2, avx512, avx512bf16, neon or neondot",
        }
    }
}

/// Checks the length of a buffer.
pub(crate) fn check_len(what: &'static str, found: usize, expected: usize) -> Result<(), QuantError> {
    if found == expected { Ok(()) } else { Err(QuantError::Length { what, found, expected }) }
}
