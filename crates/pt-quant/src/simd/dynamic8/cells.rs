//! The scalar functions with a search of one step: the exponent and 7 bits of mantissa give a cell, and a cell's entry the code on either side of
//! its threshold.

use super::{INFINITE, Kernels, scalar};
use crate::DynamicMap;
use crate::dynamic8::{FIRST_CELL, NUM_CELLS};

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize: scalar::dequantize };

fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], offset: f32, codes: &mut [u8], absmax: &mut [f32]) {
    quantize_inline(map, block_size, input, offset, codes, absmax);
}

/// Inlined into functions for an instruction set, so that the compiler uses its vectors for all but the lookups.
#[inline(always)]
pub(super) fn quantize_inline(
    map: &DynamicMap,
    block_size: usize,
    input: &[f32],
    offset: f32,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    for ((block, codes), absmax) in input.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(absmax) {
        let bits = block.iter().fold(0, |largest: u32, value| largest.max((value - offset).to_bits() & 0x7fff_ffff));
        if block.len() < block_size || bits >= INFINITE {
            *absmax = scalar::quantize_block(map, block_size, block, offset, codes);
            continue;
        }
        *absmax = f32::from_bits(bits);
        let reciprocal = 1.0 / absmax.max(super::MIN_ABSMAX);
        let (groups, rest) = block.as_chunks::<GROUP>();
        let (group_codes, rest_codes) = codes.as_chunks_mut::<GROUP>();
        for (group, codes) in groups.iter().zip(group_codes) {
            *codes = find(map.cells(), group, offset, reciprocal);
        }
        if !rest.is_empty() {
            let mut padded = [0.0; GROUP];
            padded[..rest.len()].copy_from_slice(rest);
            rest_codes.copy_from_slice(&find(map.cells(), &padded, offset, reciprocal)[..rest.len()]);
        }
    }
}

const GROUP: usize = 64;

/// The nearest codes of numbers that less `offset` and times `reciprocal` are from -1 to 1, or a rounding error beyond. Three loops, of which the first and the last
/// become vectors.
#[inline(always)]
fn find(cells: &[u32; 2 * NUM_CELLS], numbers: &[f32; GROUP], offset: f32, reciprocal: f32) -> [u8; GROUP] {
    let scaled: [u32; GROUP] = core::array::from_fn(|index| ((numbers[index] - offset) * reciprocal).to_bits());
    let magnitudes = scaled.map(|bits| (bits & 0x7fff_ffff).max(FIRST_CELL) - FIRST_CELL);
    let places: [u32; GROUP] =
        core::array::from_fn(|index| (magnitudes[index] >> 16) + (scaled[index] >> 31) * NUM_CELLS as u32);
    // In range: the cell of 1 and a rounding error is 2944. The remainder, of a power of two, is for the compiler.
    let entries = places.map(|place| cells[place as usize % (2 * NUM_CELLS)]);
    core::array::from_fn(|index| {
        let is_beyond = u32::from(magnitudes[index] & 0xffff >= entries[index] & 0x1_ffff);
        // Plus one for positive numbers, minus one for negative ones.
        let negative = scaled[index] >> 31;
        (entries[index] >> 24).wrapping_add(is_beyond).wrapping_sub(2 * (negative & is_beyond)) as u8
    })
}
