//! The scalar functions with a search of one step: the exponent and 7 bits of mantissa give a cell, and a cell's entry the code on either side of
//! its threshold.

use super::{INFINITE, Kernels, scalar};
use crate::DynamicMap;
use crate::dynamic8::{FIRST_CELL, NUM_CELLS};

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize: scalar::dequantize };

fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    for ((block, codes), absmax) in input.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(absmax) {
        *absmax = scalar::absmax_of(block);
        if block.len() == block_size && absmax.to_bits() < INFINITE {
            let reciprocal = 1.0 / absmax.max(super::MIN_ABSMAX);
            for (code, value) in codes.iter_mut().zip(block) {
                *code = find(map.cells(), value * reciprocal);
            }
        } else {
            *absmax = scalar::quantize_block(map, block_size, block, codes);
        }
    }
}

/// The nearest code of a number from -1 to 1, or a rounding error beyond.
#[inline]
fn find(cells: &[u32; 2 * NUM_CELLS], scaled: f32) -> u8 {
    let bits = scaled.to_bits();
    let magnitude = (bits & 0x7fff_ffff).max(FIRST_CELL) - FIRST_CELL;
    let negative = bits >> 31;
    let cell = (magnitude >> 16) as usize + negative as usize * NUM_CELLS;
    let entry = cells[cell.min(2 * NUM_CELLS - 1)];
    let is_beyond = u32::from(magnitude & 0xffff >= entry & 0x1_ffff);
    // Plus one for positive numbers, minus one for negative ones.
    ((entry >> 24).wrapping_add(is_beyond).wrapping_sub(2 * (negative & is_beyond))) as u8
}
