//! bitsandbytes' 8-bit "dynamic" numbers: optimizer states, and the scales of double quantization.
//!
//! A number is a code, 0 to 255, times the scale of its block. Half of the codes lie in the highest decade and each lower one has half as
//! many, so that small numbers keep about one digit (Dettmers 2016, <https://arxiv.org/abs/1511.04561>; Dettmers et al. 2022,
//! <https://arxiv.org/abs/2110.02861>).

use crate::error::check_len;
use crate::simd::dynamic8::{NOTHING_ADDED, NOTHING_OFF, kernels};
use crate::simd::view::{View, ViewMut};
use crate::{BlockSize, Element, Exec, QuantError};

/// The 256 values of the dynamic numbers, and how a number finds its code.
#[derive(Debug, PartialEq)]
pub struct DynamicMap {
    values: [f32; 256],
    /// Halfway between neighbours.
    thresholds: [f32; 255],
    cells: [u32; 2 * NUM_CELLS],
}

/// Magnitudes from 2⁻²³ to 1 by their exponent and 7 bits of mantissa: 23 · 128 of them and that of 1 itself, rounded up to a power of two. No cell
/// holds two thresholds, nor does any lie below the second cell.
pub(crate) const NUM_CELLS: usize = 4096;

/// The bits of 2⁻²³, where the first cell begins; smaller magnitudes are in it.
pub(crate) const FIRST_CELL: u32 = (127 - 23) << 23;

/// The values of both signs: first moments of Adam, scales of double quantization.
static SIGNED: DynamicMap = DynamicMap::new(true);

/// The values from 0 on, twice as dense: second moments of Adam.
static UNSIGNED: DynamicMap = DynamicMap::new(false);

impl DynamicMap {
    /// The map of both signs, from -0.993 to 1, bit for bit bitsandbytes' `create_dynamic_map(signed=True)`: for first moments of Adam, and
    /// for the scales of double quantization.
    #[must_use]
    pub fn signed() -> &'static Self {
        &SIGNED
    }

    /// The map from 0 to 1, bit for bit bitsandbytes' `create_dynamic_map(signed=False)`: for second moments of Adam.
    #[must_use]
    pub fn unsigned() -> &'static Self {
        &UNSIGNED
    }

    const fn new(is_signed: bool) -> Self {
        let values = values(is_signed);
        let mut thresholds = [0.0; 255];
        let mut rank = 0;
        while rank < 255 {
            thresholds[rank] = f32::midpoint(values[rank], values[rank + 1]);
            rank += 1;
        }
        let cells = cells(&thresholds);
        Self { values, thresholds, cells }
    }

    /// The values of codes 0 to 255, ascending.
    #[must_use]
    pub const fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The code for `scaled`, a number divided by the scale of its block: the nearest value; halfway between two, the lower. NaN takes code 255.
    #[must_use]
    pub fn nearest(&self, scaled: f32) -> u8 {
        // NaN above everything, as bitsandbytes has it.
        #[allow(clippy::neg_cmp_op_on_partial_ord)]
        let rank = self.thresholds.partition_point(|&threshold| !(threshold >= scaled));
        rank as u8
    }

    pub(crate) fn is_signed(&self) -> bool {
        self.values[0] < 0.0
    }

    /// The thresholds above zero of the map of both signs.
    pub(crate) fn positive_thresholds(&self) -> &[f32; 128] {
        debug_assert!(self.is_signed());
        self.thresholds.last_chunk().unwrap_or(&[0.0; 128])
    }

    /// For each cell a code in the upper 8 bits and a threshold in the lower ones: a number whose lowest 16 bits reach it has the code's
    /// neighbour away from zero. Positive numbers first, negative ones from [`NUM_CELLS`] on.
    pub(crate) const fn cells(&self) -> &[u32; 2 * NUM_CELLS] {
        &self.cells
    }

    /// Quantizes `input` block by block: `absmax = max |x|`, `code = nearest(x / absmax)`.
    ///
    /// Codes are the exact nearest ones, as with bitsandbytes' CUDA kernels and its `default` operation; its CPU library looks them up in
    /// steps of 2⁻¹⁵ and differs in 0.2 % of them. What is said of [`quantize_into`](crate::quantize_into) about short last blocks, zeros and
    /// numbers that are not finite holds here too.
    ///
    /// # Shapes
    /// `codes` as `input`; `absmax`: `[ceil(input.len() / block_size)]`.
    ///
    /// # Errors
    /// [`QuantError::Length`] for a buffer of another length.
    ///
    /// # Example
    /// ```
    /// use pt_quant::{BlockSize, DynamicMap, Exec};
    ///
    /// let (mut codes, mut absmax) = ([0; 3], [0.0]);
    /// let map = DynamicMap::signed();
    /// map.quantize_into(&[0.5f32, -2.0, 0.0], BlockSize::B256, &mut codes, &mut absmax, &Exec::new())?;
    /// assert_eq!((codes, absmax), ([201, 0, 127], [2.0]));
    /// let mut back = [0.0f32; 3];
    /// map.dequantize_into(&codes, &absmax, BlockSize::B256, &mut back, &Exec::new())?;
    /// assert!((back[0] - 0.5).abs() < 0.01 && (back[1] + 2.0).abs() < 0.02 && back[2] == 0.0);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn quantize_into<T: Element>(
        &self,
        input: &[T],
        block_size: BlockSize,
        codes: &mut [u8],
        absmax: &mut [f32],
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        check_len("codes", codes.len(), input.len())?;
        check_len("absmax", absmax.len(), block_size.num_blocks(input.len()))?;
        let (kernels, block_size) = (kernels(exec.isa()), block_size.get());
        let piece = CHUNK.max(block_size);
        exec.for_each_chunk_pair((codes, piece), (absmax, piece / block_size), |index, codes, absmax| {
            let start = index * piece;
            match View::of(&input[start..start + codes.len()]) {
                View::F32(input) => (kernels.quantize)(self, block_size, input, NOTHING_OFF, codes, absmax),
                _ => {
                    // The narrow formats are widened a block at a time.
                    let mut wide = [0.0f32; 4096];
                    for (block, (codes, absmax)) in codes.chunks_mut(block_size).zip(absmax).enumerate() {
                        let from = &input[start + block * block_size..][..codes.len()];
                        let wide = &mut wide[..from.len()];
                        wide.iter_mut().zip(from).for_each(|(wide, value)| *wide = value.to_f32());
                        let absmax = core::slice::from_mut(absmax);
                        (kernels.quantize)(self, block_size, wide, NOTHING_OFF, codes, absmax);
                    }
                }
            }
        });
        Ok(())
    }

    /// The numbers that codes stand for: `values[code] · absmax`, rounded to nearest in `f32` and again in a narrower format.
    ///
    /// # Shapes
    /// `out` as `codes`; `absmax`: `[ceil(codes.len() / block_size)]`.
    ///
    /// # Errors
    /// [`QuantError::Length`] for a buffer of another length.
    pub fn dequantize_into<T: Element>(
        &self,
        codes: &[u8],
        absmax: &[f32],
        block_size: BlockSize,
        out: &mut [T],
        exec: &Exec<'_>,
    ) -> Result<(), QuantError> {
        check_len("out", out.len(), codes.len())?;
        check_len("absmax", absmax.len(), block_size.num_blocks(codes.len()))?;
        let (kernels, block_size) = (kernels(exec.isa()), block_size.get());
        let piece = CHUNK.max(block_size);
        exec.for_each_chunk(out, piece, |index, out| {
            let start = index * piece;
            let (codes, absmax) = (&codes[start..start + out.len()], &absmax[start / block_size..]);
            match ViewMut::of(out) {
                ViewMut::F32(out) => (kernels.dequantize)(&self.values, codes, absmax, block_size, NOTHING_ADDED, out),
                _ => {
                    let mut wide = [0.0f32; 4096];
                    for ((out, codes), &absmax) in out.chunks_mut(block_size).zip(codes.chunks(block_size)).zip(absmax)
                    {
                        let wide = &mut wide[..out.len()];
                        (kernels.dequantize)(&self.values, codes, &[absmax], block_size, NOTHING_ADDED, wide);
                        out.iter_mut().zip(wide).for_each(|(out, wide)| *out = T::from_f32(*wide));
                    }
                }
            }
        });
        Ok(())
    }
}

/// Numbers that a thread takes at a time; a number of blocks of any size.
const CHUNK: usize = 1 << 16;

/// The values in ascending order, rounded where bitsandbytes rounds: `linspace(0.1, 1, n)` from either end with one rounding, means and
/// powers of ten in f32.
const fn values(is_signed: bool) -> [f32; 256] {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut values = [0.0; 256];
    let zero = if is_signed { 127 } else { 0 };
    let mut next = zero + 1;
    let mut decade = 0;
    while decade < 7 {
        let num_steps = 1 << (decade + !is_signed as usize);
        let step = (1.0f32 - 0.1) / num_steps as f32;
        let mut index = 0;
        while index < num_steps {
            let value = POWERS[decade] * ((border(index, num_steps, step) + border(index + 1, num_steps, step)) / 2.0);
            values[next] = value;
            if is_signed {
                values[2 * zero - next] = -value;
            }
            next += 1;
            index += 1;
        }
        decade += 1;
    }
    values[255] = 1.0;
    values
}

/// Element `index` of torch's `linspace(0.1, 1, num_steps + 1)`: counted from the nearer end, product and sum rounded once. They are exact in f64.
const fn border(index: usize, num_steps: usize, step: f32) -> f32 {
    if index < num_steps.div_ceil(2) {
        (0.1f32 as f64 + step as f64 * index as f64) as f32
    } else {
        (1.0 - step as f64 * (num_steps - index) as f64) as f32
    }
}

/// See [`DynamicMap::cells`].
const fn cells(thresholds: &[f32; 255]) -> [u32; 2 * NUM_CELLS] {
    const NONE: u32 = 0x1_0000;
    let mut num_negative = 0;
    while thresholds[num_negative] < 0.0 {
        num_negative += 1;
    }
    let mut cells = [0; 2 * NUM_CELLS];
    let (mut above, mut below) = (num_negative, num_negative);
    let mut cell = 0;
    while cell < NUM_CELLS {
        // Positive: the code up to the threshold, which is the number of those in lower cells.
        let mut entry = (above as u32) << 24 | NONE;
        if above < 255 && cell_of(thresholds[above]) == cell {
            // Strictly above the threshold is the next code.
            entry = (above as u32) << 24 | ((thresholds[above].to_bits() & 0xffff) + 1);
            above += 1;
            assert!(above == 255 || cell_of(thresholds[above]) > cell, "one threshold a cell");
        }
        cells[cell] = entry;
        // Negative, going down: a number at the threshold or below it is not above it.
        let mut entry = (below as u32) << 24 | NONE;
        if below > 0 && cell_of(-thresholds[below - 1]) == cell {
            entry = (below as u32) << 24 | (thresholds[below - 1].to_bits() & 0xffff);
            below -= 1;
            assert!(below == 0 || cell_of(-thresholds[below - 1]) > cell, "one threshold a cell");
        }
        cells[NUM_CELLS + cell] = entry;
        cell += 1;
    }
    assert!(above == 255 && below == 0, "every threshold has its cell");
    cells
}

const fn cell_of(magnitude: f32) -> usize {
    ((magnitude.to_bits() - FIRST_CELL) >> 16) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_ascend_and_hold_their_ends() {
        for (map, first) in [(DynamicMap::signed(), -0.992_968_75), (DynamicMap::unsigned(), 0.0)] {
            assert!(map.values.is_sorted_by(|a, b| a < b));
            assert!((map.values[0] - first).abs() < 1e-6 && map.values[255] == 1.0);
            assert!(map.values.contains(&0.0));
        }
        assert_eq!(DynamicMap::signed().values[127], 0.0);
    }

    #[test]
    fn every_value_is_nearest_to_itself_and_ties_go_down() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            for (code, &value) in map.values.iter().enumerate() {
                assert_eq!(usize::from(map.nearest(value)), code);
            }
            for (code, &threshold) in map.thresholds.iter().enumerate() {
                assert_eq!(usize::from(map.nearest(threshold)), code);
                assert_eq!(usize::from(map.nearest(threshold.next_up())), code + 1);
            }
            assert_eq!(map.nearest(f32::NAN), 255);
        }
    }
}
