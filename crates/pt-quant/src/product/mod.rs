//! Products with 4-bit matrices: [`Block4Matrix`] holds one in the order that the kernels read, and multiplies it.

mod backward;
mod flat;
mod forward;
mod matrix;
mod scales;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;

pub use forward::{Arithmetic, ProductOptions};
pub use matrix::Block4Matrix;
pub use scales::ScaleFormat;

use crate::dense::{grown, grown_aligned};
use crate::simd::product::{Int8Group, TILE_ROWS};
use crate::{Bf16, Element, Exec, Inline};

/// What a call shares among its threads: activations as the kernels want them.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    x_f32: Vec<f32>,
    x_bf16: Vec<u16>,
    x_f32_ordered: Vec<f32>,
    x_bf16_ordered: Vec<u16>,
    x_int8: Vec<Int8Group>,
    x_scales: Vec<f32>,
    /// A gradient of few rows, as its kernels want it.
    few_f32: Vec<f32>,
    few_bf16: Vec<u32>,
}

/// What one thread needs.
#[derive(Debug, Default)]
pub(crate) struct SlotScratch {
    /// Outputs of some tiles, still in lanes.
    acc: Vec<f32>,
    /// Outputs of some tiles.
    sums: Vec<[f32; TILE_ROWS]>,
    /// Scales of some tiles in f32, where they are held in another format.
    scales: Vec<[f32; TILE_ROWS]>,
    /// Scales of a tile times those of the activations.
    scaled: Vec<[f32; TILE_ROWS]>,
    /// Sums of the backward product.
    columns: Vec<f32>,
    panel_f32: Vec<f32>,
    /// Weights of a matrix that is not in tiles.
    decoded_bf16: Vec<Bf16>,
    panel_pairs: Vec<u32>,
    /// Tables of a gradient of few rows.
    tables: Vec<u32>,
}

/// Multiplications under which a product stays on the calling thread: waking another one takes as long as half of it (5 to 10 µs).
const MIN_SHARED: usize = 1 << 19;

/// The pool, or the calling thread alone for a product that is too small to share.
fn worth_sharing<'a>(exec: &Exec<'a>, rows: usize, columns: usize, depth: usize) -> Exec<'a> {
    if rows.saturating_mul(columns).saturating_mul(depth) < MIN_SHARED { exec.with_pool(&Inline) } else { *exec }
}

/// The numbers as f32: the slice itself if it is that, else a copy.
fn as_f32<'a, T: Element>(x: &'a [T], buffer: &'a mut Vec<f32>, round: bool) -> &'a [f32] {
    if let (Some(x), false) = (T::as_f32(x), round) {
        return x;
    }
    let copy = grown(buffer, x.len());
    for (copy, x) in copy.iter_mut().zip(x) {
        *copy = if round { Bf16::from_f32(x.to_f32()).to_f32() } else { x.to_f32() };
    }
    copy
}

/// The bits of the numbers in bf16: the slice itself if it is that, else a copy.
fn as_bf16_bits<'a, T: Element>(x: &'a [T], buffer: &'a mut Vec<u16>) -> &'a [u16] {
    if let Some(x) = T::as_bf16_bits(x) {
        return x;
    }
    let copy = grown(buffer, x.len());
    for (copy, x) in copy.iter_mut().zip(x) {
        *copy = Bf16::from_f32(x.to_f32()).0;
    }
    copy
}

/// As [`grown`], for elements without a default.
fn grown_with<T: Copy>(buffer: &mut Vec<T>, len: usize, filler: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, filler);
    }
    &mut buffer[..len]
}
