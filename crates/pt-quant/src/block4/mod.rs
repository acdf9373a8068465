//! 4-bit tensors in blocks, in bitsandbytes' byte order: [`Block4Ref`] borrows one, [`Block4`] owns one.

mod absmax;
mod dequantize;
mod quantize;

use alloc::vec::Vec;
use core::fmt;

pub use absmax::{Absmax, AbsmaxBuf, NestedAbsmax, NestedAbsmaxBuf};
pub use dequantize::{STREAM_BYTES, Stores};
pub use quantize::quantize_into;

use crate::error::check_len;
use crate::{Codebook, QuantError};

/// How many consecutive weights share one scale: a power of two from 32 to 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(u16);

impl BlockSize {
    /// The block size of QLoRA, and bitsandbytes' default for 4 bits.
    pub const B64: Self = Self(64);
    /// bitsandbytes' default for 8 bits: optimizer states, and the absmax of double quantization.
    pub const B256: Self = Self(256);

    /// A block size.
    ///
    /// # Errors
    /// [`QuantError::BlockSize`] unless it is a power of two from 32 to 4096.
    pub const fn new(block_size: usize) -> Result<Self, QuantError> {
        if block_size.is_power_of_two() && block_size >= 32 && block_size <= 4096 {
            Ok(Self(block_size as u16))
        } else {
            Err(QuantError::BlockSize { found: block_size })
        }
    }

    /// As a number of weights.
    #[must_use]
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// Blocks that `len` weights make; the last may be short.
    #[must_use]
    pub const fn num_blocks(self, len: usize) -> usize {
        len.div_ceil(self.get())
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Bytes that `len` 4-bit codes take: two in a byte, the last half of a byte unused when `len` is odd.
#[must_use]
pub const fn packed_len(len: usize) -> usize {
    len.div_ceil(2)
}

/// A borrowed 4-bit tensor of `len` weights: weight `i` is `codebook.values()[code[i]] · absmax[i / block_size]`.
///
/// Blocks run over the flat tensor in row-major order, so that one may span rows when the row length is no multiple of the block
/// size. The bytes are bitsandbytes': code `2·i` in the high half of byte `i`, code `2·i + 1` in the low half. Nothing is copied: it can
/// lie over a mapped file.
///
/// # Example
/// ```
/// use pt_quant::{Absmax, Block4Ref, BlockSize, Codebook};
///
/// // Codes 0 and 15 of NF4 stand for -1 and 1; the block's scale is 2.
/// let weights = Block4Ref::new(&[0x0f], Absmax::F32(&[2.0]), 2, BlockSize::B64, Codebook::nf4())?;
/// assert_eq!(weights.len(), 2);
/// # Ok::<(), pt_quant::QuantError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block4Ref<'a> {
    packed: &'a [u8],
    absmax: Absmax<'a>,
    len: usize,
    block_size: BlockSize,
    codebook: Codebook,
}

impl<'a> Block4Ref<'a> {
    /// A tensor of `len` weights over `packed`, `[ceil(len / 2)]` bytes, and one scale a block, `[ceil(len / block_size)]`.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `packed` or `absmax` has another length.
    pub fn new(
        packed: &'a [u8],
        absmax: Absmax<'a>,
        len: usize,
        block_size: BlockSize,
        codebook: Codebook,
    ) -> Result<Self, QuantError> {
        check_len("packed", packed.len(), packed_len(len))?;
        check_len("absmax", absmax.len(), block_size.num_blocks(len))?;
        Ok(Self { packed, absmax, len, block_size, codebook })
    }

    /// The codes, two in a byte, the first in the high half: `[ceil(len / 2)]`.
    #[must_use]
    pub const fn packed(&self) -> &'a [u8] {
        self.packed
    }

    /// One scale a block.
    #[must_use]
    pub const fn absmax(&self) -> Absmax<'a> {
        self.absmax
    }

    /// Weights in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no weights.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Weights that share a scale.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// What the codes stand for.
    #[must_use]
    pub const fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// The code of weight `index`, 0 to 15, or `None` past the end.
    #[must_use]
    pub fn code(&self, index: usize) -> Option<u8> {
        (index < self.len).then(|| self.packed[index / 2] >> (4 * (1 - index % 2)) & 15)
    }

    /// A copy that owns its memory.
    #[must_use]
    pub fn to_owned(&self) -> Block4 {
        Block4 {
            packed: self.packed.to_vec(),
            absmax: self.absmax.to_owned(),
            len: self.len,
            block_size: self.block_size,
            codebook: self.codebook,
        }
    }
}

/// A 4-bit tensor that owns its memory; [`as_ref`](Self::as_ref) gives the [`Block4Ref`] that everything is done with.
#[derive(Debug, Clone, PartialEq)]
pub struct Block4 {
    packed: Vec<u8>,
    absmax: AbsmaxBuf,
    len: usize,
    block_size: BlockSize,
    codebook: Codebook,
}

impl Block4 {
    /// As [`Block4Ref::new`], of buffers that it keeps.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `packed` or `absmax` has another length.
    pub fn new(
        packed: Vec<u8>,
        absmax: AbsmaxBuf,
        len: usize,
        block_size: BlockSize,
        codebook: Codebook,
    ) -> Result<Self, QuantError> {
        Block4Ref::new(&packed, absmax.as_ref(), len, block_size, codebook)?;
        Ok(Self { packed, absmax, len, block_size, codebook })
    }

    /// Borrowed.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn as_ref(&self) -> Block4Ref<'_> {
        Block4Ref {
            packed: &self.packed,
            absmax: self.absmax.as_ref(),
            len: self.len,
            block_size: self.block_size,
            codebook: self.codebook,
        }
    }

    /// Its buffers.
    #[must_use]
    pub fn into_parts(self) -> (Vec<u8>, AbsmaxBuf) {
        (self.packed, self.absmax)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn lengths_are_checked() {
        let absmax = [1.0f32; 2];
        let new = |packed: &[u8], absmax, len| {
            Block4Ref::new(packed, absmax, len, BlockSize::B64, Codebook::nf4()).map(|_| ())
        };
        assert_eq!(new(&[0; 33], Absmax::F32(&absmax), 65), Ok(()));
        assert_eq!(
            new(&[0; 32], Absmax::F32(&absmax), 65),
            Err(QuantError::Length { what: "packed", found: 32, expected: 33 })
        );
        assert_eq!(
            new(&[0; 33], Absmax::F32(&absmax[..1]), 65),
            Err(QuantError::Length { what: "absmax", found: 1, expected: 2 })
        );
        assert_eq!(new(&[], Absmax::F32(&[]), 0), Ok(()));
    }

    #[test]
    fn the_first_code_is_in_the_high_half() {
        let weights =
            Block4::new(vec![0x1e, 0x70], AbsmaxBuf::F32(vec![1.0]), 3, BlockSize::B64, Codebook::nf4()).unwrap();
        let codes: Vec<_> = (0..4).map(|index| weights.as_ref().code(index)).collect();
        assert_eq!(codes, [Some(1), Some(14), Some(7), None]);
    }

    #[test]
    fn block_sizes_are_powers_of_two_from_32_to_4096() {
        let taken: Vec<_> = (0..=10_000).filter(|&size| BlockSize::new(size).is_ok()).collect();
        assert_eq!(taken, [32, 64, 128, 256, 512, 1024, 2048, 4096]);
    }
}
