//! Block products with AVX2 and FMA: as in `avx512.rs`, with vectors of 8 and 6 weight rows (12 accumulators of 16 registers).

use core::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::{Kernels, Panel, Tiles, block_function, check_block};

pub(super) static KERNELS: Kernels = Kernels { lanes: 8, block_f32, block_bf16 };

block_function!(block_f32, inner_f32, "avx2,fma", f32, 8, 6, tile_f32, [1, 2, 3, 4, 5]);
block_function!(block_bf16, inner_bf16, "avx2,fma", u32, 8, 4, tile_bf16, [1, 2, 3]);

/// Adds the accumulators to the outputs.
///
/// # Safety
/// `y` must be valid for `ROWS` rows of `VECTORS · 8` numbers, `y_stride` apart.
#[target_feature(enable = "avx2,fma")]
unsafe fn add_to<const ROWS: usize, const VECTORS: usize>(
    sums: [[__m256; VECTORS]; ROWS],
    y: *mut f32,
    y_stride: usize,
) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let y = y.add(row * y_stride + vector * 8);
                _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), sum));
            }
        }
    }
}

/// # Safety
/// Valid for reads: `depth` vectors of 8 from `x`, and `VECTORS` such runs `x_stride` apart; `w + row · row_stride + d · depth_stride` for
/// all rows and depths. Valid for writes: as in [`add_to`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx2,fma")]
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
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [_mm256_setzero_ps(); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = _mm256_loadu_ps(x.add(vector * x_stride + d * 8));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = _mm256_set1_ps(*w.add(row * row_stride + d * depth_stride));
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm256_fmadd_ps(w, x, *sum);
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}

/// Pairs of bf16, both halves widened to f32.
///
/// # Safety
/// As [`tile_f32`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx2,fma")]
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
    let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [(_mm256_setzero_ps(), _mm256_setzero_ps()); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                let x = _mm256_loadu_si256(x.add(vector * x_stride + d * 8).cast());
                *xs = (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)), _mm256_castsi256_ps(_mm256_and_si256(x, high)));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let (low, high) = super::pair(w.add(row * row_stride + d * depth_stride).read_unaligned());
                let (low, high) = (_mm256_set1_ps(low), _mm256_set1_ps(high));
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm256_fmadd_ps(high, x.1, _mm256_fmadd_ps(low, x.0, *sum));
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}
