//! A delta in the order that the products read.

use alloc::vec;
use alloc::vec::Vec;

use super::{BitDelta, BitDeltaRef, BitMatrix, DeltaScale, DeltaScaleBuf, SCALE_GROUP, ScaleAxis};
use crate::error::check_len;
use crate::simd::delta::lookup::{self, Line, Sums, TILE, Tiles, position};
use crate::{Exec, QuantError};

/// A 1-bit delta that can be multiplied: signs in tiles of 64 outputs, in which the bytes of 8 inputs of all outputs lie together.
///
/// It takes 1 bit a weight, of outputs and inputs rounded up to multiples of 64, and the scales; nothing of the [`BitDelta`] it is made from is kept.
/// [`to_delta`](Self::to_delta) gives that back exactly.
#[derive(Debug, Clone)]
pub struct DeltaMatrix {
    /// `[ceil(out_features / 64), lines_per_tile]`
    lines: Vec<Line>,
    out_features: usize,
    in_features: usize,
    scale: TiledScale,
}

/// Scales, one for each output of a tile where there are more than one; zero beyond the last output.
#[derive(Debug, Clone)]
pub(super) enum TiledScale {
    Matrix(f32),
    /// `[num_tiles]`
    Row(Vec<Sums>),
    /// `[num_tiles, groups]`
    Group128(Vec<Sums>),
}

impl DeltaMatrix {
    /// Brings a delta into this order.
    ///
    /// # Errors
    /// None for a [`BitDeltaRef`], which is checked when it is made, but those of sizes that no memory holds.
    pub fn new(delta: BitDeltaRef<'_>, exec: &Exec<'_>) -> Result<Self, QuantError> {
        let signs = delta.signs();
        let (out_features, in_features) = (signs.out_features(), signs.in_features());
        let (lines_per_tile, num_tiles) = (8 * signs.words_per_row(), out_features.div_ceil(TILE));
        let num_lines = num_tiles.checked_mul(lines_per_tile).ok_or(QuantError::Overflow { what: "out_features" })?;
        let mut lines = vec![Line([0; TILE]); num_lines];
        exec.for_each_chunk(&mut lines, lines_per_tile, |tile, lines| {
            for output in 0..TILE.min(out_features - tile * TILE) {
                let words = signs.row(tile * TILE + output);
                for (word, lines) in words.iter().zip(lines.chunks_exact_mut(8)) {
                    for (byte, line) in word.to_le_bytes().into_iter().zip(lines) {
                        line.0[position(output)] = byte;
                    }
                }
            }
        });
        let mut this = Self { lines, out_features, in_features, scale: TiledScale::Matrix(0.0) };
        this.set_scale(delta.scale())?;
        Ok(this)
    }

    /// With another scale, also of another axis. A step of training changes scales alone.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the matrix needs another number of scales.
    pub fn set_scale(&mut self, scale: DeltaScale<'_>) -> Result<(), QuantError> {
        let expected = scale.axis().num_scales(self.out_features, self.in_features)?;
        check_len("scale", scale.values().len(), expected)?;
        let tile = |tile: usize, scale: &dyn Fn(usize) -> f32| -> Sums {
            core::array::from_fn(|output| match tile * TILE + output {
                row if row < self.out_features => scale(row),
                _ => 0.0,
            })
        };
        let groups = self.in_features.div_ceil(SCALE_GROUP);
        self.scale = match scale {
            DeltaScale::Matrix(scale) => TiledScale::Matrix(scale),
            DeltaScale::Row(scales) => {
                TiledScale::Row((0..self.num_tiles()).map(|index| tile(index, &|row| scales[row])).collect())
            }
            DeltaScale::Group128(scales) => TiledScale::Group128(
                (0..self.num_tiles() * groups)
                    .map(|index| tile(index / groups, &|row| scales[row * groups + index % groups]))
                    .collect(),
            ),
        };
        Ok(())
    }

    /// The delta as it is stored.
    #[must_use]
    pub fn to_delta(&self) -> BitDelta {
        let words_per_row = self.in_features.div_ceil(64);
        let byte = |row: usize, line: usize| self.tile(row / TILE)[line].0[position(row % TILE)];
        let word = |row: usize, word: usize| u64::from_le_bytes(core::array::from_fn(|at| byte(row, 8 * word + at)));
        let words = (0..self.out_features).flat_map(|row| (0..words_per_row).map(move |at| (row, at)));
        let words = words.map(|(row, at)| word(row, at)).collect();
        let signs = BitMatrix { words, out_features: self.out_features, in_features: self.in_features };
        let groups = self.in_features.div_ceil(SCALE_GROUP);
        let scale = match &self.scale {
            TiledScale::Matrix(scale) => DeltaScaleBuf::Matrix(*scale),
            TiledScale::Row(tiles) => {
                DeltaScaleBuf::Row((0..self.out_features).map(|row| tiles[row / TILE][row % TILE]).collect())
            }
            TiledScale::Group128(tiles) => DeltaScaleBuf::Group128(
                (0..self.out_features * groups)
                    .map(|index| {
                        let (row, group) = (index / groups, index % groups);
                        tiles[row / TILE * groups + group][row % TILE]
                    })
                    .collect(),
            ),
        };
        BitDelta { signs, scale }
    }

    /// N: outputs.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// K: inputs.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// What weights share a scale.
    #[must_use]
    pub fn scale_axis(&self) -> ScaleAxis {
        match self.scale {
            TiledScale::Matrix(_) => ScaleAxis::Matrix,
            TiledScale::Row(_) => ScaleAxis::Row,
            TiledScale::Group128(_) => ScaleAxis::Group128,
        }
    }

    /// Bytes of signs and scales in memory.
    #[must_use]
    pub fn size_in_bytes(&self) -> usize {
        let scales = match &self.scale {
            TiledScale::Matrix(_) => size_of::<f32>(),
            TiledScale::Row(tiles) | TiledScale::Group128(tiles) => size_of_val(tiles.as_slice()),
        };
        size_of_val(self.lines.as_slice()) + scales
    }

    pub(super) fn scale(&self) -> &TiledScale {
        &self.scale
    }

    pub(super) fn num_tiles(&self) -> usize {
        self.out_features.div_ceil(TILE)
    }

    pub(super) fn lines_per_tile(&self) -> usize {
        self.in_features.div_ceil(64) * 8
    }

    /// The lines of 64 outputs.
    pub(super) fn tile(&self, tile: usize) -> &[Line] {
        &self.lines[tile * self.lines_per_tile()..][..self.lines_per_tile()]
    }

    /// Some tiles, for the kernels.
    pub(super) fn tiles(&self, first: usize, count: usize) -> Tiles<'_> {
        let (stride, len) = (self.lines_per_tile(), self.lines_per_tile());
        Tiles { lines: &self.lines[first * stride..][..count * stride], stride, count, len }
    }

    /// The signs of 64 inputs for all outputs: `[num_tiles · 8]` lines, whose bits are outputs in the order of
    /// [`output_at`](lookup::output_at).
    pub(super) fn transposed_tile(&self, input_tile: usize, lines: &mut [Line], kernels: &lookup::Kernels) {
        for (tile, lines) in lines.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let (from, _) = self.tile(tile)[8 * input_tile..].as_chunks::<8>();
            (kernels.transpose)(&from[0], lines);
        }
    }
}
