//! Quantizing and dequantizing 4-bit blocks, by instruction set. All of them give the bits of `scalar.rs`.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::codebook::Search;
use crate::{Bf16, Element, F16, Isa};

/// `(search, block_size, input, packed, absmax)`: the last block may be short, and an odd number of weights fills its last byte with the code of 0.
/// `absmax` is the largest magnitude, whatever the codebook's is.
pub(crate) type Quantize<T> = fn(&Search<'_>, usize, &[T], &mut [u8], &mut [f32]);

/// `(values, packed, absmax, block_size, out, stream)`: from the start of a block, `block_size` an even number; the last block may be short.
/// `stream` writes past the caches, where there are instructions for it.
pub(crate) type Dequantize<T> = fn(&[f32; 16], &[u8], &[f32], usize, &mut [T], bool);

pub(crate) struct Kernels {
    pub(crate) quantize_f32: Quantize<f32>,
    pub(crate) quantize_bf16: Quantize<Bf16>,
    pub(crate) quantize_f16: Quantize<F16>,
    pub(crate) dequantize_f32: Dequantize<f32>,
    pub(crate) dequantize_bf16: Dequantize<Bf16>,
    pub(crate) dequantize_f16: Dequantize<F16>,
}

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => &avx512::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot => &neon::KERNELS,
        _ => &scalar::KERNELS,
    }
}

/// Panics unless the codes and scales of `len` weights are there: the kernels' pointers rely on it.
fn check(len: usize, packed: usize, num_absmax: usize, block_size: usize) {
    assert!(block_size > 0 && block_size.is_multiple_of(2), "blocks are whole bytes");
    assert!(packed >= len.div_ceil(2), "two weights a byte");
    assert!(num_absmax >= len.div_ceil(block_size), "one scale a block");
}

/// The weights of the last block from `done` on, which a vector kernel leaves; `done` is even.
fn dequantize_tail<T: Element>(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    out: &mut [T],
    done: usize,
) {
    if done < out.len() {
        let out = &mut out[done..];
        scalar::dequantize(values, &packed[done / 2..], &absmax[done / block_size..], block_size, out, false);
    }
}

#[cfg(test)]
mod tests;
