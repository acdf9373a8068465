//! The scales of a 4-bit tensor: plain, or themselves quantized to 8 bits ("double quantization").

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::BlockSize;
use crate::QuantError;
use crate::error::check_len;

/// One scale a block, borrowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Absmax<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// Quantized to 8 bits.
    Nested(NestedAbsmax<'a>),
}

impl Absmax<'_> {
    /// Scales in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(absmax) => absmax.len(),
            Self::Nested(nested) => nested.codes.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Scale `index`, or `None` past the end.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<f32> {
        match self {
            Self::F32(absmax) => absmax.get(index).copied(),
            Self::Nested(nested) => {
                let &code = nested.codes.get(index)?;
                // Two roundings, as bitsandbytes: no fused multiply-add.
                let scaled = nested.map[usize::from(code)] * nested.absmax[index / nested.block_size.get()];
                Some(scaled + nested.offset)
            }
        }
    }

    /// A copy that owns its memory.
    #[must_use]
    pub fn to_owned(&self) -> AbsmaxBuf {
        match self {
            Self::F32(absmax) => AbsmaxBuf::F32(absmax.to_vec()),
            Self::Nested(nested) => AbsmaxBuf::Nested(nested.to_owned()),
        }
    }
}

/// Scales quantized to 8 bits: scale `i` is `map[codes[i]] · absmax[i / block_size] + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NestedAbsmax<'a> {
    codes: &'a [u8],
    absmax: &'a [f32],
    map: &'a [f32; 256],
    offset: f32,
    block_size: BlockSize,
}

impl<'a> NestedAbsmax<'a> {
    /// One code a scale, and one `absmax` for each `block_size` codes (bitsandbytes: 256).
    ///
    /// # Errors
    /// [`QuantError::Length`] when `absmax` is not `[ceil(codes.len() / block_size)]`.
    pub fn new(
        codes: &'a [u8],
        absmax: &'a [f32],
        map: &'a [f32; 256],
        offset: f32,
        block_size: BlockSize,
    ) -> Result<Self, QuantError> {
        check_len("nested_absmax", absmax.len(), block_size.num_blocks(codes.len()))?;
        Ok(Self { codes, absmax, map, offset, block_size })
    }

    /// A copy that owns its memory.
    #[must_use]
    pub fn to_owned(&self) -> NestedAbsmaxBuf {
        NestedAbsmaxBuf {
            codes: self.codes.to_vec(),
            absmax: self.absmax.to_vec(),
            map: Box::new(*self.map),
            offset: self.offset,
            block_size: self.block_size,
        }
    }

    /// One code a scale.
    #[must_use]
    pub const fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// One scale for each block of codes.
    #[must_use]
    pub const fn absmax(&self) -> &'a [f32] {
        self.absmax
    }

    /// What the codes stand for.
    #[must_use]
    pub const fn map(&self) -> &'a [f32; 256] {
        self.map
    }

    /// Added to every scale.
    #[must_use]
    pub const fn offset(&self) -> f32 {
        self.offset
    }

    /// Codes that share a scale.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }
}

/// One scale a block, owned.
#[derive(Debug, Clone, PartialEq)]
pub enum AbsmaxBuf {
    /// As they are.
    F32(Vec<f32>),
    /// Quantized to 8 bits.
    Nested(NestedAbsmaxBuf),
}

impl AbsmaxBuf {
    /// Borrowed.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn as_ref(&self) -> Absmax<'_> {
        match self {
            Self::F32(absmax) => Absmax::F32(absmax),
            Self::Nested(nested) => Absmax::Nested(nested.as_ref()),
        }
    }
}

/// [`NestedAbsmax`], owned.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmaxBuf {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    map: Box<[f32; 256]>,
    offset: f32,
    block_size: BlockSize,
}

impl NestedAbsmaxBuf {
    /// As [`NestedAbsmax::new`], of buffers that it keeps.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `absmax` is not `[ceil(codes.len() / block_size)]`.
    pub fn new(
        codes: Vec<u8>,
        absmax: Vec<f32>,
        map: Box<[f32; 256]>,
        offset: f32,
        block_size: BlockSize,
    ) -> Result<Self, QuantError> {
        NestedAbsmax::new(&codes, &absmax, &map, offset, block_size)?;
        Ok(Self { codes, absmax, map, offset, block_size })
    }

    /// Borrowed.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn as_ref(&self) -> NestedAbsmax<'_> {
        NestedAbsmax {
            codes: &self.codes,
            absmax: &self.absmax,
            map: &self.map,
            offset: self.offset,
            block_size: self.block_size,
        }
    }
}
