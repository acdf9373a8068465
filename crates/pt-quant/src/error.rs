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
    /// A tensor that a file should hold and does not.
    #[error("there is no tensor `{name}`")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor of another format, size or content than it should have.
    #[error("tensor `{name}` is {found}, expected {expected}")]
    Tensor {
        /// Its name.
        name: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Numbers that lie where they cannot be used without a copy.
    #[error("tensor `{name}` does not lie at a multiple of 4 bytes of a little-endian memory")]
    Misaligned {
        /// Its name.
        name: String,
    },
    /// Bytes that are no JSON object.
    #[error("tensor `{name}` is no JSON object: {message}")]
    Json {
        /// The name of the tensor that holds them.
        name: String,
        /// What the parser says.
        message: String,
    },
    /// A field of the JSON of a 4-bit tensor.
    #[error("tensor `{name}`: `{field}` is {found}, expected {expected}")]
    QuantState {
        /// The name of the tensor with the JSON.
        name: String,
        /// The field.
        field: &'static str,
        /// Its value, or "missing".
        found: String,
        /// The values that are taken.
        expected: &'static str,
    },
    /// No block size.
    #[error("the block size is {found}, expected a power of two from 32 to 4096")]
    BlockSize {
        /// Its value.
        found: usize,
    },
    /// Numbers that should be finite and are not.
    #[error("`{what}` is infinite or no number in row {row}")]
    NonFinite {
        /// What was computed.
        what: &'static str,
        /// The first row with such a number.
        row: usize,
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
            Self::MissingTensor { .. } => {
                "is the weight in bitsandbytes' 4 bits? formats::bitsandbytes::is_quantized tells"
            }
            Self::Tensor { .. } | Self::Json { .. } | Self::QuantState { .. } => {
                "the file is damaged, or not what bitsandbytes writes: save it again"
            }
            Self::Misaligned { .. } => "formats::bitsandbytes::read_owned copies it from anywhere",
            Self::BlockSize { .. } => "64 is what QLoRA uses",
            Self::NonFinite { .. } => "a weight is not finite: look at both matrices in that row",
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
