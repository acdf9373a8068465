//! Block products with AVX2 and FMA: as in `avx512.rs`, with vectors of 8 and 6 weight rows (12 accumulators of 16 registers).

use core::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_movehl_ps, _mm_prefetch, _mm_shuffle_ps,
    _mm256_add_ps, _mm256_and_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_extractf128_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::{Kernels, Panel, Tiles, block_function, check_block, check_dots, dots_function, widen};

pub(super) static KERNELS: Kernels = Kernels { dots_f32, dots_bf16, few: None, lanes: 8, block_f32, block_bf16 };

block_function!(block_f32, inner_f32, "avx2,fma", f32, 8, 6, tile_f32, [1, 2, 3, 4, 5]);
block_function!(block_bf16, inner_bf16, "avx2,fma", u32, 8, 4, tile_bf16, [1, 2, 3]);

dots_function!(dots_f32, all_dots_f32, "avx2,fma", f32, dots_of_f32);
dots_function!(dots_bf16, all_dots_bf16, "avx2,fma", u16, dots_of_bf16);

/// How far ahead of its use a weight is asked for, in bytes.
const AHEAD: usize = 2048;

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
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [[_mm256_setzero_ps(); 2]; VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = halves(_mm256_loadu_si256(x.add(vector * x_stride + d * 8).cast()));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let (low, high) = super::pair(w.add(row * row_stride + d * depth_stride).read_unaligned());
                let (low, high) = (_mm256_set1_ps(low), _mm256_set1_ps(high));
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm256_fmadd_ps(high, x[1], _mm256_fmadd_ps(low, x[0], *sum));
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
#[target_feature(enable = "avx2,fma")]
unsafe fn dots_of_f32<const M: usize>(x: *const f32, w: *const f32, depth: usize) -> [f32; M] {
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    let mut left = [0.0; M];
    let whole = depth / 16 * 16;
    // SAFETY: the caller's promise. A prefetch may point anywhere.
    unsafe {
        for d in (0..whole).step_by(16) {
            _mm_prefetch::<_MM_HINT_T0>(w.add(d).cast::<i8>().wrapping_add(AHEAD));
            let ws = [_mm256_loadu_ps(w.add(d)), _mm256_loadu_ps(w.add(d + 8))];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_fmadd_ps(_mm256_loadu_ps(x.add(m * depth + d + half * 8)), ws[half], *sum);
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
#[target_feature(enable = "avx2,fma")]
unsafe fn dots_of_bf16<const M: usize>(x: *const u16, w: *const u16, depth: usize) -> [f32; M] {
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    let mut left = [0.0; M];
    let whole = depth / 16 * 16;
    // SAFETY: the caller's promise. A prefetch may point anywhere.
    unsafe {
        for d in (0..whole).step_by(16) {
            _mm_prefetch::<_MM_HINT_T0>(w.add(d).cast::<i8>().wrapping_add(AHEAD));
            let w = halves(_mm256_loadu_si256(w.add(d).cast()));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = halves(_mm256_loadu_si256(x.add(m * depth + d).cast()));
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_fmadd_ps(x[half], w[half], *sum);
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

/// The even and the odd ones of 16 bf16 numbers.
#[target_feature(enable = "avx2")]
fn halves(bits: __m256i) -> [__m256; 2] {
    let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
    [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)), _mm256_castsi256_ps(_mm256_and_si256(bits, high))]
}

/// The sums of all lanes, and of what was left over.
#[target_feature(enable = "avx2")]
fn totals<const M: usize>(sums: [[__m256; 2]; M], mut left: [f32; M]) -> [f32; M] {
    for ([a, b], left) in sums.into_iter().zip(&mut left) {
        let both = _mm256_add_ps(a, b);
        let four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        *left += _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)));
    }
    left
}
