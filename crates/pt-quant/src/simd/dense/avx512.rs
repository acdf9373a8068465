//! Block products with AVX-512.
//!
//! ```text
//! for each d: load 2 vectors of X (16 rows each); for each of 12 weight rows: broadcast its element, acc[row][v] += w · x[v]
//! ```
//! 24 accumulators of 32 registers. A weight is broadcast by the load port, so the weights need no packing.

use core::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps,
    _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi16,
    _mm512_maskz_loadu_ps, _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_slli_epi32, _mm512_storeu_ps,
};

use super::{Kernels, Panel, Tiles, block_function, check_block, check_dots, dots_function};

mod few;

pub(super) static KERNELS: Kernels = Kernels {
    dots_f32,
    dots_bf16: dots_widened,
    few: Some((few::few_f32, few::few_widened)),
    lanes: 16,
    block_f32,
    block_bf16: block_widened,
};
pub(super) static KERNELS_BF16: Kernels =
    Kernels { dots_bf16, few: Some((few::few_f32, few::few_bf16)), block_bf16, ..KERNELS };

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

dots_function!(dots_f32, all_dots_f32, "avx512f", f32, dots_of_f32);
dots_function!(dots_bf16, all_dots_bf16, "avx512f,avx512bw,avx512bf16", u16, dots_of_bf16);
dots_function!(dots_widened, all_dots_widened, "avx512f,avx512bw", u16, dots_of_widened);

/// How far ahead of its use a weight is asked for, in bytes: the memory's latency at the speed of the kernel.
const AHEAD: usize = 2048;

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

/// With few rows of X, weights are used once and come from memory: while a line of each row is in use, asks for the line of the row
/// that the next block has in its place.
#[target_feature(enable = "avx512f")]
fn prefetch_next<const ROWS: usize, const VECTORS: usize, W>(
    w: *const W,
    d: usize,
    row_stride: usize,
    depth_stride: usize,
) {
    if VECTORS == 1 && d.is_multiple_of(16) {
        for row in ROWS..2 * ROWS {
            // A prefetch may point anywhere.
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(row * row_stride + d * depth_stride).cast());
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
        prefetch_next::<ROWS, VECTORS, _>(w, d, row_stride, depth_stride);
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
        prefetch_next::<ROWS, VECTORS, _>(w, d, row_stride, depth_stride);
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [_mm512_set1_epi32(0); VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = _mm512_loadu_si512(x.add(vector * x_stride + d * 16).cast());
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = _mm512_set1_epi32(w.add(row * row_stride + d * depth_stride).read_unaligned() as i32);
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm512_dpbf16_ps(*sum, as_bf16(w), as_bf16(x));
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
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for d in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let mut xs = [[_mm512_setzero_ps(); 2]; VECTORS];
            for (vector, xs) in xs.iter_mut().enumerate() {
                *xs = halves(_mm512_loadu_si512(x.add(vector * x_stride + d * 16).cast()));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let (low, high) = super::pair(w.add(row * row_stride + d * depth_stride).read_unaligned());
                let (low, high) = (_mm512_set1_ps(low), _mm512_set1_ps(high));
                for (sum, x) in sums.iter_mut().zip(xs) {
                    *sum = _mm512_fmadd_ps(high, x[1], _mm512_fmadd_ps(low, x[0], *sum));
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { add_to(sums, y, y_stride) }
}

/// Dot products of one weight row with `M` rows of X, two vectors at once: two chains of sums for each row of X.
///
/// # Safety
/// Valid for reads: `M · depth` numbers from `x`, `depth` from `w`.
#[target_feature(enable = "avx512f")]
unsafe fn dots_of_f32<const M: usize>(x: *const f32, w: *const f32, depth: usize) -> [f32; M] {
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    let whole = depth / 32 * 32;
    // SAFETY: the caller's promise; lanes beyond `depth` are masked. A prefetch may point anywhere.
    unsafe {
        for d in (0..whole).step_by(32) {
            let ahead = w.add(d).cast::<i8>().wrapping_add(AHEAD);
            _mm_prefetch::<_MM_HINT_T0>(ahead);
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64));
            let ws = [_mm512_loadu_ps(w.add(d)), _mm512_loadu_ps(w.add(d + 16))];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_fmadd_ps(_mm512_loadu_ps(x.add(m * depth + d + half * 16)), ws[half], *sum);
                }
            }
        }
        for d in (whole..depth).step_by(16) {
            let mask = lanes_left(depth - d);
            let w = _mm512_maskz_loadu_ps(mask, w.add(d));
            for (m, sums) in sums.iter_mut().enumerate() {
                sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x.add(m * depth + d)), w, sums[0]);
            }
        }
    }
    sums.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))
}

/// A mask of the first `left` lanes of 16.
fn lanes_left(left: usize) -> u16 {
    if left >= 16 { u16::MAX } else { (1 << left) - 1 }
}

/// A mask of the first `left` lanes of 32.
fn short_lanes_left(left: usize) -> u32 {
    if left >= 32 { u32::MAX } else { (1 << left) - 1 }
}

/// # Safety
/// As [`dots_of_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn dots_of_bf16<const M: usize>(x: *const u16, w: *const u16, depth: usize) -> [f32; M] {
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    let whole = depth / 64 * 64;
    // SAFETY: as in `dots_of_f32`; both vector types are 64 bytes without invalid values.
    unsafe {
        for d in (0..whole).step_by(64) {
            let ahead = w.add(d).cast::<i8>().wrapping_add(AHEAD);
            _mm_prefetch::<_MM_HINT_T0>(ahead);
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64));
            let ws = [_mm512_loadu_si512(w.add(d).cast()), _mm512_loadu_si512(w.add(d + 32).cast())];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    let x = _mm512_loadu_si512(x.add(m * depth + d + half * 32).cast());
                    *sum = _mm512_dpbf16_ps(*sum, as_bf16(x), as_bf16(ws[half]));
                }
            }
        }
        for d in (whole..depth).step_by(32) {
            let mask = short_lanes_left(depth - d);
            let w = as_bf16(_mm512_maskz_loadu_epi16(mask, w.add(d).cast()));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_maskz_loadu_epi16(mask, x.add(m * depth + d).cast());
                sums[0] = _mm512_dpbf16_ps(sums[0], as_bf16(x), w);
            }
        }
    }
    sums.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))
}

/// Without the instruction for pairs of bf16: even and odd numbers widened apart.
///
/// # Safety
/// As [`dots_of_f32`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn dots_of_widened<const M: usize>(x: *const u16, w: *const u16, depth: usize) -> [f32; M] {
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    for d in (0..depth).step_by(32) {
        let mask = short_lanes_left(depth - d);
        // SAFETY: the caller's promise; lanes beyond `depth` are masked. A prefetch may point anywhere.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(w.add(d).cast::<i8>().wrapping_add(AHEAD));
            let w = halves(_mm512_maskz_loadu_epi16(mask, w.add(d).cast()));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = halves(_mm512_maskz_loadu_epi16(mask, x.add(m * depth + d).cast()));
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_fmadd_ps(x[half], w[half], *sum);
                }
            }
        }
    }
    sums.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))
}

/// The even and the odd ones of 32 bf16 numbers.
#[target_feature(enable = "avx512f")]
fn halves(bits: __m512i) -> [__m512; 2] {
    let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(_mm512_and_si512(bits, high))]
}

#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, and every pattern of bits is a value of either.
    unsafe { core::mem::transmute(bits) }
}
