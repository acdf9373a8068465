//! Numbers to compute with, and weights in copies that no cache holds.

use anyhow::Result;
use pt_quant::{Bf16, Block4, Block4Matrix, BlockSize, Codebook, Element, Exec, ScaleFormat};

/// Cold weights are taken in turn from copies of more bytes than this.
const COLD_BYTES: usize = 160 << 20;

/// How many copies of `bytes` make cold weights.
pub(crate) fn cold_copies(bytes: usize) -> usize {
    COLD_BYTES.div_ceil(bytes.max(1))
}

/// `len` numbers around zero with the given spread, near enough to normal; the same on every machine.
pub(crate) fn numbers(len: usize, spread: f32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    // The sum of four uniform numbers has a variance of a third.
    (0..len).map(|_| (next() + next() + next() + next()) * spread * 1.732).collect()
}

/// The same in another format.
pub(crate) fn converted<T: Element>(numbers: &[f32]) -> Vec<T> {
    numbers.iter().map(|&number| T::from_f32(number)).collect()
}

/// A matrix of weights, `[rows, columns]`, as a model has them.
pub(crate) fn weights(rows: usize, columns: usize) -> Vec<f32> {
    numbers(rows * columns, 0.02, 1)
}

/// NF4 in blocks of 64.
pub(crate) fn block4(rows: usize, columns: usize, exec: &Exec<'_>) -> Result<Block4> {
    Ok(Block4::quantize(&weights(rows, columns), BlockSize::B64, Codebook::nf4(), exec)?)
}

/// A matrix for products and its copies for cold calls; scales as stored are doubly quantized ones.
pub(crate) fn matrices(
    rows: usize,
    columns: usize,
    copies: usize,
    scales: ScaleFormat,
    exec: &Exec<'_>,
) -> Result<Vec<Block4Matrix>> {
    let block4 = block4(rows, columns, exec)?;
    let block4 = if scales == ScaleFormat::AsStored { block4.double_quantize(exec)? } else { block4 };
    let matrix = Block4Matrix::from_block4(block4.as_ref(), rows, columns, scales, exec)?;
    Ok((0..copies).map(|_| matrix.clone()).collect())
}

/// A number format by the name that peers know it by.
pub(crate) trait Named: Element {
    const NAME: &'static str;
}

impl Named for f32 {
    const NAME: &'static str = "f32";
}

impl Named for Bf16 {
    const NAME: &'static str = "bf16";
}

impl Named for pt_quant::F16 {
    const NAME: &'static str = "f16";
}
