//! Other packings of the same signs: BitDelta's and GGUF's Q1_0.

use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use super::{BitDelta, BitDeltaRef, BitMatrix, BitMatrixRef, DeltaScaleBuf, SCALE_GROUP};
use crate::error::check_len;
use crate::{Exec, F16, QuantError};

/// Rows of 64-bit words that are transposed together: what they read is one cache line of 32-bit words.
const BLOCK_ROWS: usize = 16;

impl BitMatrix {
    /// From BitDelta's `mask`, which packs the transposed matrix.
    ///
    /// # Shapes
    /// - `mask`: `[in_features / 32, out_features]`; bit `j` of word `[k, n]` is the sign of weight `[n, 32·k + j]`, the lowest bit first.
    ///
    /// # Errors
    /// [`QuantError::Value`] when `in_features` is no multiple of 32, which BitDelta cannot pack; [`QuantError::Length`] when `mask` has another size.
    pub fn from_bitdelta(
        mask: &[i32],
        out_features: usize,
        in_features: usize,
        exec: &Exec<'_>,
    ) -> Result<Self, QuantError> {
        let mut bits = Self::cleared(out_features, in_features)?;
        check_mask(mask.len(), bits.as_ref())?;
        let words_per_row = in_features.div_ceil(64);
        if mask.is_empty() {
            return Ok(bits);
        }
        exec.for_each_chunk(bits.words_mut(), BLOCK_ROWS * words_per_row, |block, words| {
            for word in 0..words_per_row {
                for row in 0..words.len() / words_per_row {
                    let half = |half: usize| {
                        let line = 2 * word + half;
                        let bits = mask
                            .get(line * out_features + block * BLOCK_ROWS + row)
                            .filter(|_| line < in_features / 32);
                        u64::from(bits.map_or(0, |bits| bits.cast_unsigned()))
                    };
                    words[row * words_per_row + word] = half(0) | half(1) << 32;
                }
            }
        });
        Ok(bits)
    }
}

impl BitMatrixRef<'_> {
    /// To BitDelta's `mask`, which packs the transposed matrix: see [`BitMatrix::from_bitdelta`].
    ///
    /// # Errors
    /// As there.
    pub fn to_bitdelta(&self, mask: &mut [i32], exec: &Exec<'_>) -> Result<(), QuantError> {
        check_mask(mask.len(), *self)?;
        let (out_features, words_per_row) = (self.out_features(), self.words_per_row());
        exec.for_each_chunk(mask, out_features.max(1), |line, mask| {
            for (row, word) in mask.iter_mut().enumerate() {
                let bits = self.words()[row * words_per_row + line / 2];
                *word = ((bits >> (line % 2 * 32)) as u32).cast_signed();
            }
        });
        Ok(())
    }
}

fn check_mask(len: usize, bits: BitMatrixRef<'_>) -> Result<(), QuantError> {
    if !bits.in_features().is_multiple_of(32) {
        let found = bits.in_features().to_string();
        return Err(QuantError::Value { what: "in_features", found, expected: "a multiple of 32" });
    }
    check_len("mask", len, bits.in_features() / 32 * bits.out_features())
}

/// Bytes of a Q1_0 block of 128 weights: the scale in half precision, then 16 bytes of signs, the lowest bit first.
pub const Q1_0_BLOCK_BYTES: usize = 18;

/// Bytes of a matrix in Q1_0.
///
/// # Errors
/// [`QuantError::Value`] when `in_features` is no multiple of 128; [`QuantError::Overflow`] when the number fits no `usize`.
pub fn q1_0_len(out_features: usize, in_features: usize) -> Result<usize, QuantError> {
    if !in_features.is_multiple_of(SCALE_GROUP) {
        let found = in_features.to_string();
        return Err(QuantError::Value { what: "in_features", found, expected: "a multiple of 128" });
    }
    out_features
        .checked_mul(in_features / SCALE_GROUP)
        .and_then(|blocks| blocks.checked_mul(Q1_0_BLOCK_BYTES))
        .ok_or(QuantError::Overflow { what: "out_features" })
}

impl BitDelta {
    /// From the blocks of a GGUF tensor of type Q1_0, exactly: a scale for each 128 weights.
    ///
    /// # Errors
    /// [`QuantError::Value`] when `in_features` is no multiple of 128; [`QuantError::Length`] when there are not that many bytes.
    pub fn from_q1_0(
        blocks: &[u8],
        out_features: usize,
        in_features: usize,
        exec: &Exec<'_>,
    ) -> Result<Self, QuantError> {
        check_len("blocks", blocks.len(), q1_0_len(out_features, in_features)?)?;
        let mut signs = BitMatrix::cleared(out_features, in_features)?;
        let mut scales = vec![0.0; blocks.len() / Q1_0_BLOCK_BYTES];
        exec.for_each_chunk_pair((signs.words_mut(), 2 * 1024), (&mut scales, 1024), |index, words, scales| {
            let blocks = blocks.chunks_exact(Q1_0_BLOCK_BYTES).skip(index * 1024);
            for ((block, words), scale) in blocks.zip(words.chunks_exact_mut(2)).zip(scales) {
                *scale = F16(u16::from_le_bytes([block[0], block[1]])).to_f32();
                for (word, bytes) in words.iter_mut().zip(block[2..].chunks_exact(8)) {
                    *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
                }
            }
        });
        Ok(Self { signs, scale: DeltaScaleBuf::Group128(scales) })
    }
}

impl BitDeltaRef<'_> {
    /// To the blocks of a GGUF tensor of type Q1_0. Signs are kept; scales are repeated for each group of 128 and rounded to half precision.
    ///
    /// # Errors
    /// [`QuantError::Value`] when `in_features` is no multiple of 128 or a scale becomes infinite in half precision.
    pub fn to_q1_0(&self) -> Result<Vec<u8>, QuantError> {
        let in_features = self.signs.in_features();
        let mut blocks = Vec::with_capacity(q1_0_len(self.signs.out_features(), in_features)?);
        for row in 0..self.signs.out_features() {
            for (group, words) in self.signs.row(row).chunks_exact(2).enumerate() {
                let scale = self.scale.at(row, group * SCALE_GROUP, in_features);
                let half = F16::from_f32(scale);
                if !half.to_f32().is_finite() {
                    let found = scale.to_string();
                    return Err(QuantError::Value { what: "scale", found, expected: "under 65520 in half precision" });
                }
                blocks.extend(half.0.to_le_bytes());
                words.iter().for_each(|word| blocks.extend(word.to_le_bytes()));
            }
        }
        Ok(blocks)
    }
}
