//! Block products with NEON: as in `avx512.rs`, with vectors of 4 and 8 weight rows (16 accumulators of 32 registers).

use core::arch::aarch64::{
    float32x4_t, vaddq_f32, vandq_u32, vdupq_n_f32, vdupq_n_u32, vfmaq_n_f32, vld1q_f32, vld1q_u32,
    vreinterpretq_f32_u32, vshlq_n_u32, vst1q_f32,
};

use super::{Kernels, Panel, Tiles, block_function, check_block};

pub(super) static KERNELS: Kernels = Kernels { lanes: 4, block_f32, block_bf16 };

block_function!(block_f32, inner_f32, "neon", f32, 4, 8, tile_f32, [1, 2, 3, 4, 5, 6, 7]);
block_function!(block_bf16, inner_bf16, "neon", u32, 4, 8, tile_bf16, [1, 2, 3, 4, 5, 6, 7]);

/// Adds the accumulators to the outputs.
///
/// # Safety
/// `y` must be valid for `ROWS` rows of `VECTORS · 4` numbers, `y_stride` apart.
#[target_feature(enable = "neon")]
unsafe fn add_to<const ROWS: usize, const VECTORS: usize>(
    sums: [[float32x4_t; VECTORS]; ROWS],
    y: *mut f32,
    y_stride: usize,
) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let y = y.add(row * y_stride + vector * 4);
                vst1q_f32(y, vaddq_f32(vld1q_f32(y), sum));
            }
        }
    }
}

/// # Safety
/// Valid for reads: `depth` vectors of 4 from `x`, and `VECTORS` such runs `x_stride` apart; `w + row · row_stride + d · depth_stride` for
/// all rows and depths. Valid for writes: as in [`add_to`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "neon")]
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
    let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [vdupq_n_f32(0.0); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = vld1q_f32(x.add(vector * x_stride + d * 4));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = *w.add(row * row_stride + d * depth_stride);
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = vfmaq_n_f32(*sum, x, w);
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
#[target_feature(enable = "neon")]
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
    let high = vdupq_n_u32(0xffff_0000);
    let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [(vdupq_n_f32(0.0), vdupq_n_f32(0.0)); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                let x = vld1q_u32(x.add(vector * x_stride + d * 4));
                *xs = (vreinterpretq_f32_u32(vshlq_n_u32::<16>(x)), vreinterpretq_f32_u32(vandq_u32(x, high)));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let (low, high) = super::pair(w.add(row * row_stride + d * depth_stride).read_unaligned());
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = vfmaq_n_f32(vfmaq_n_f32(*sum, x.0, low), x.1, high);
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}
