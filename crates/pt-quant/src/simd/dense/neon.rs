//! Block products with NEON: as in `avx512.rs`, with vectors of 4 and 8 weight rows (16 accumulators of 32 registers).

use core::arch::aarch64::{
    float32x4_t, vaddq_f32, vaddvq_f32, vandq_u32, vdupq_n_f32, vdupq_n_u32, vfmaq_f32, vfmaq_n_f32, vld1q_f32,
    vld1q_u16, vld1q_u32, vreinterpretq_f32_u32, vreinterpretq_u32_u16, vshlq_n_u32, vst1q_f32,
};

use super::{Kernels, Panel, Tiles, block_function, check_block, check_dots, dots_function, widen};

pub(super) static KERNELS: Kernels = Kernels { dots_f32, dots_bf16, few: None, lanes: 4, block_f32, block_bf16 };

block_function!(block_f32, inner_f32, "neon", f32, 4, 8, tile_f32, [1, 2, 3, 4, 5, 6, 7]);
block_function!(block_bf16, inner_bf16, "neon", u32, 4, 8, tile_bf16, [1, 2, 3, 4, 5, 6, 7]);

dots_function!(dots_f32, all_dots_f32, "neon", f32, dots_of_f32);
dots_function!(dots_bf16, all_dots_bf16, "neon", u16, dots_of_bf16);

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

/// Dot products of one weight row with `M` rows of X, two vectors at once.
///
/// # Safety
/// Valid for reads: `M · depth` numbers from `x`, `depth` from `w`.
#[target_feature(enable = "neon")]
unsafe fn dots_of_f32<const M: usize>(x: *const f32, w: *const f32, depth: usize) -> [f32; M] {
    let mut sums = [[vdupq_n_f32(0.0); 2]; M];
    let mut left = [0.0; M];
    let whole = depth / 8 * 8;
    // SAFETY: the caller's promise.
    unsafe {
        for d in (0..whole).step_by(8) {
            let ws = [vld1q_f32(w.add(d)), vld1q_f32(w.add(d + 4))];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = vfmaq_f32(*sum, vld1q_f32(x.add(m * depth + d + half * 4)), ws[half]);
                }
            }
        }
        for (m, left) in left.iter_mut().enumerate() {
            for d in whole..depth {
                *left += *x.add(m * depth + d) * *w.add(d);
            }
        }
    }
    totals(sums, left)
}

/// As [`dots_of_f32`], with even and odd numbers widened apart.
///
/// # Safety
/// As [`dots_of_f32`].
#[target_feature(enable = "neon")]
unsafe fn dots_of_bf16<const M: usize>(x: *const u16, w: *const u16, depth: usize) -> [f32; M] {
    let mut sums = [[vdupq_n_f32(0.0); 2]; M];
    let mut left = [0.0; M];
    let whole = depth / 8 * 8;
    // SAFETY: the caller's promise.
    unsafe {
        for d in (0..whole).step_by(8) {
            let w = halves(w.add(d));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = halves(x.add(m * depth + d));
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = vfmaq_f32(*sum, x[half], w[half]);
                }
            }
        }
        for (m, left) in left.iter_mut().enumerate() {
            for d in whole..depth {
                *left += widen(*x.add(m * depth + d)) * widen(*w.add(d));
            }
        }
    }
    totals(sums, left)
}

/// The even and the odd ones of 8 bf16 numbers.
///
/// # Safety
/// Valid for reads of 8 from `bits`.
#[target_feature(enable = "neon")]
unsafe fn halves(bits: *const u16) -> [float32x4_t; 2] {
    // SAFETY: the caller's promise.
    let pairs = vreinterpretq_u32_u16(unsafe { vld1q_u16(bits) });
    let odd = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
    [vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), vreinterpretq_f32_u32(odd)]
}

/// The sums of all lanes, and of what was left over.
#[target_feature(enable = "neon")]
fn totals<const M: usize>(sums: [[float32x4_t; 2]; M], mut left: [f32; M]) -> [f32; M] {
    for ([a, b], left) in sums.into_iter().zip(&mut left) {
        *left += vaddvq_f32(vaddq_f32(a, b));
    }
    left
}
