//! 8-bit dynamic numbers with AVX2: the plain code of `cells.rs`, which the compiler turns into vectors but for the lookups. A gather is no faster
//! than loading entries one by one, and so is one for dequantizing.

use super::{Kernels, cells, scalar};
use crate::DynamicMap;

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize: scalar::dequantize };

fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], offset: f32, codes: &mut [u8], absmax: &mut [f32]) {
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked.
    unsafe { quantize_avx2(map, block_size, input, offset, codes, absmax) }
}

#[target_feature(enable = "avx2")]
fn quantize_avx2(
    map: &DynamicMap,
    block_size: usize,
    input: &[f32],
    offset: f32,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    cells::quantize_inline(map, block_size, input, offset, codes, absmax);
}
