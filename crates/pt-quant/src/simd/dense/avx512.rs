//! Block products with AVX-512.
//!
//! ```text
//! for each d: load 2 vectors of X (16 rows each); for each of 12 weight rows: broadcast its element, acc[row][v] += w · x[v]
//! ```
//! 24 accumulators of 32 registers. A weight is broadcast by the load port, so the weights need no packing.

use core::arch::x86_64::{
    __m512, __m512bh, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_storeu_ps,
};

use super::{Kernels, Panel, Tiles, block_function, check_block};

pub(super) static KERNELS: Kernels = Kernels { lanes: 16, block_f32, block_bf16: block_widened };
pub(super) static KERNELS_BF16: Kernels = Kernels { lanes: 16, block_f32, block_bf16 };

block_function!(block_f32, inner_f32, "avx512f", f32, 16, 12, tile_f32, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
block_function!(
    block_bf16,
    inner_bf16,
    "avx512f,avx512bf16",
    u32,
    16,
    12,
    tile_bf16,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
);
block_function!(block_widened, inner_widened, "avx512f", u32, 16, 6, tile_widened, [1, 2, 3, 4, 5]);

/// Adds the accumulators to the outputs.
///
/// # Safety
/// `y` must be valid for `ROWS` rows of `VECTORS · 16` numbers, `y_stride` apart.
#[target_feature(enable = "avx512f")]
unsafe fn add_to<const ROWS: usize, const VECTORS: usize>(
    sums: [[__m512; VECTORS]; ROWS],
    y: *mut f32,
    y_stride: usize,
) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let y = y.add(row * y_stride + vector * 16);
                _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), sum));
            }
        }
    }
}

/// # Safety
/// Valid for reads: `depth` vectors of 16 from `x`, and `VECTORS` such runs `x_stride` apart; `w + row · row_stride + d · depth_stride` for
/// all rows and depths. Valid for writes: as in [`add_to`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f")]
unsafe fn tile_f32<const ROWS: usize, const VECTORS: usize>(
    x: *const f32,
    x_stride: usize,
    depth: usize,
    w: *const f32,
    row_stride: usize,
    depth_stride: usize,
    y: *mut f32,
    y_stride: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [_mm512_setzero_ps(); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = _mm512_loadu_ps(x.add(vector * x_stride + d * 16));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = _mm512_set1_ps(*w.add(row * row_stride + d * depth_stride));
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm512_fmadd_ps(w, x, *sum);
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}

/// # Safety
/// As [`tile_f32`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile_bf16<const ROWS: usize, const VECTORS: usize>(
    x: *const u32,
    x_stride: usize,
    depth: usize,
    w: *const u32,
    row_stride: usize,
    depth_stride: usize,
    y: *mut f32,
    y_stride: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise; both vector types are 64 bytes without invalid values.
        unsafe {
            let mut xs = [_mm512_set1_epi32(0); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = _mm512_loadu_si512(x.add(vector * x_stride + d * 16).cast());
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = _mm512_set1_epi32(w.add(row * row_stride + d * depth_stride).read_unaligned() as i32);
                let w = core::mem::transmute::<_, __m512bh>(w);
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm512_dpbf16_ps(*sum, w, core::mem::transmute::<_, __m512bh>(x));
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}

/// Pairs of bf16 without the instruction for them: both halves widened to f32.
///
/// # Safety
/// As [`tile_f32`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f")]
unsafe fn tile_widened<const ROWS: usize, const VECTORS: usize>(
    x: *const u32,
    x_stride: usize,
    depth: usize,
    w: *const u32,
    row_stride: usize,
    depth_stride: usize,
    y: *mut f32,
    y_stride: usize,
) {
    let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [(_mm512_setzero_ps(), _mm512_setzero_ps()); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                let x = _mm512_loadu_si512(x.add(vector * x_stride + d * 16).cast());
                *xs = (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(_mm512_and_si512(x, high)));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let (low, high) = super::pair(w.add(row * row_stride + d * depth_stride).read_unaligned());
                let (low, high) = (_mm512_set1_ps(low), _mm512_set1_ps(high));
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm512_fmadd_ps(high, x.1, _mm512_fmadd_ps(low, x.0, *sum));
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}
