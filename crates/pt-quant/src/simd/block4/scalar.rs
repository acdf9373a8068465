//! What quantizing and dequantizing mean, in plain Rust: the other instruction sets give the same bits.

use super::Kernels;
use crate::codebook::Search;
use crate::{Codebook, Element};

pub(super) static KERNELS: Kernels = Kernels {
    quantize_f32: quantize,
    quantize_bf16: quantize,
    quantize_f16: quantize,
    dequantize_f32: dequantize,
    dequantize_bf16: dequantize,
    dequantize_f16: dequantize,
};

/// Block by block: `absmax = max |x|`, `code = nearest(x / absmax)`.
fn quantize<T: Element>(search: &Search<'_>, block_size: usize, input: &[T], packed: &mut [u8], absmax: &mut [f32]) {
    let blocks = input.chunks(block_size).zip(packed.chunks_mut(block_size / 2));
    for ((block, packed), absmax) in blocks.zip(absmax) {
        *absmax = if block.len() == block_size {
            quantize_block(search.book, block, packed)
        } else {
            quantize_short_block(search.book, block, packed)
        };
    }
}

/// bitsandbytes keeps a scale from going below this before it divides by it.
pub(super) const MIN_ABSMAX: f32 = 1e-38;

/// The largest magnitude; NaN when any number is.
fn absmax_of<T: Element>(block: &[T]) -> f32 {
    // Magnitudes order as their bits do, NaN above infinity.
    let bits = block.iter().map(|value| value.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    if bits > 0x7f80_0000 { f32::NAN } else { f32::from_bits(bits) }
}

/// At least [`MIN_ABSMAX`]; NaN stays.
fn at_least_min(absmax: f32) -> f32 {
    if absmax < MIN_ABSMAX { MIN_ABSMAX } else { absmax }
}

/// A whole block: bitsandbytes multiplies by the reciprocal of the scale.
pub(super) fn quantize_block<T: Element>(book: &Codebook, block: &[T], packed: &mut [u8]) -> f32 {
    let absmax = absmax_of(block);
    let reciprocal = 1.0 / at_least_min(absmax);
    pack(book, packed, block, |value| value * reciprocal);
    absmax
}

/// A last block that is short: bitsandbytes divides by the scale, and the scale it keeps is the one that it divided by.
pub(super) fn quantize_short_block<T: Element>(book: &Codebook, block: &[T], packed: &mut [u8]) -> f32 {
    let absmax = at_least_min(absmax_of(block));
    pack(book, packed, block, |value| value / absmax);
    absmax
}

/// Two codes in a byte, the first in the high half. A missing last one is that of 0.
fn pack<T: Element>(book: &Codebook, packed: &mut [u8], block: &[T], scale: impl Fn(f32) -> f32) {
    for (byte, pair) in packed.iter_mut().zip(block.chunks(2)) {
        let code = |index: usize| {
            let scaled = pair.get(index).map_or(0.0, |value| scale(value.to_f32()));
            book.nearest(scaled.clamp(-1.0, 1.0))
        };
        *byte = code(0) << 4 | code(1);
    }
}

/// `out[i] = values[code[i]] · absmax[i / block_size]`, rounded once to `f32` and once more to a narrower format.
pub(super) fn dequantize<T: Element>(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    out: &mut [T],
    _stream: bool,
) {
    for ((out, packed), absmax) in out.chunks_mut(block_size).zip(packed.chunks(block_size / 2)).zip(absmax) {
        for (pair, byte) in out.chunks_mut(2).zip(packed) {
            for (value, code) in pair.iter_mut().zip([byte >> 4, byte & 15]) {
                *value = T::from_f32(values[usize::from(code)] * absmax);
            }
        }
    }
}
