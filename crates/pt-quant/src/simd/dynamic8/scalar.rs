//! What the dynamic numbers mean, in plain Rust: the other instruction sets give the same bits.

use super::{INFINITE, Kernels, MIN_ABSMAX};
use crate::DynamicMap;

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize };

/// Block by block, with x = input - offset: `absmax = max |x|`, `code = nearest(x / absmax)`.
fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], offset: f32, codes: &mut [u8], absmax: &mut [f32]) {
    for ((block, codes), absmax) in input.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(absmax) {
        *absmax = quantize_block(map, block_size, block, offset, codes);
    }
}

/// One block; returns its scale. As bitsandbytes does it, a whole block is multiplied by the reciprocal, a short one divided, and the scale that
/// a short one keeps is the one it was divided by.
pub(super) fn quantize_block(map: &DynamicMap, block_size: usize, block: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let absmax = absmax_of(block, offset);
    let divisor = if absmax < MIN_ABSMAX { MIN_ABSMAX } else { absmax };
    let reciprocal = 1.0 / divisor;
    let is_whole = block.len() == block_size;
    for (code, value) in codes.iter_mut().zip(block) {
        let value = value - offset;
        let scaled = if is_whole { value * reciprocal } else { value / divisor };
        *code = map.nearest(scaled.clamp(-1.0, 1.0));
    }
    if is_whole { absmax } else { divisor }
}

/// The largest magnitude; NaN when any number is.
fn absmax_of(block: &[f32], offset: f32) -> f32 {
    let bits = block.iter().map(|value| (value - offset).to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    if bits > INFINITE { f32::NAN } else { f32::from_bits(bits) }
}

/// `out[i] = values[codes[i]] · absmax[i / block_size] + offset`.
pub(super) fn dequantize(
    values: &[f32; 256],
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    offset: f32,
    out: &mut [f32],
) {
    for ((out, codes), absmax) in out.chunks_mut(block_size).zip(codes.chunks(block_size)).zip(absmax) {
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = values[usize::from(code)] * absmax + offset;
        }
    }
}
