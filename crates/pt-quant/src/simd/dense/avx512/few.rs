//! Products of up to 8 rows of X with AVX-512: dot products in a register tile.
//!
//! ```text
//! for each 3 rows of W, for each cache line of depth: load 3 vectors of W; for each row m of X: acc[row][m] += w[row] · x[m]
//! ```
//! 24 accumulators of 32 registers, in lanes that are summed last. A piece of X stays in the L1 cache while the rows of a block go by, whose
//! accumulators wait in memory meanwhile. X is packed so that a line of depth of all its rows lies in one piece: rows whose stride is a power of
//! two would throw one another out of the cache.

// Arrays of registers are read best by index, several at once.
#![allow(clippy::needless_range_loop)]

use core::arch::x86_64::*;

use super::super::{FEW_BLOCK, check_few};
use super::{as_bf16, halves, lanes_left, short_lanes_left};
use crate::simd::lanes::reduce_four;

/// Rows of W that are worked on at once.
const ROWS: usize = 3;

/// Cache lines of depth in a piece: 24 KiB of 8 rows of X.
const PIECE: usize = 48;

/// A row of accumulators.
type Lanes<const M: usize> = [__m512; M];

/// Makes a [`FewFn`](super::super::FewFn). `$load(mask, pointer)` reads a vector of W, `$load_x(pointer)` one of X, `$add(sum, w, x)` multiplies and adds.
macro_rules! few_function {
    ($name:ident, $all:ident, $tile:ident, $features:literal, $type:ty, $mask:path, $load:expr, $load_x:expr, $add:expr) => {
        pub(in super::super) fn $name(x: &[$type], rows: usize, w: &[$type], depth: usize, out: &mut [f32]) {
            check_few(x, rows, w, depth, out);
            // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_few` has seen to the lengths.
            unsafe {
                match rows {
                    1 => $all::<1>(x, w, depth, out),
                    2 => $all::<2>(x, w, depth, out),
                    3 => $all::<3>(x, w, depth, out),
                    4 => $all::<4>(x, w, depth, out),
                    5 => $all::<5>(x, w, depth, out),
                    6 => $all::<6>(x, w, depth, out),
                    7 => $all::<7>(x, w, depth, out),
                    _ => $all::<8>(x, w, depth, out),
                }
            }
        }

        /// # Safety
        /// `x` holds `M` rows of `depth` as packed, `w` a row of `depth` for each `M` of `out`.
        #[target_feature(enable = $features)]
        unsafe fn $all<const M: usize>(x: &[$type], w: &[$type], depth: usize, out: &mut [f32]) {
            const LINE: usize = 64 / size_of::<$type>();
            let lines = depth.div_ceil(LINE);
            for (block, out) in out.chunks_mut(FEW_BLOCK * M).enumerate() {
                let rows = out.len() / M;
                let mut acc: [Lanes<M>; FEW_BLOCK] = [[_mm512_setzero_ps(); M]; FEW_BLOCK];
                for first in (0..lines).step_by(PIECE) {
                    let last = lines.min(first + PIECE);
                    // Of the last line of a row, some lanes may lie beyond its end.
                    let whole = last.min(depth / LINE) - first;
                    let rest = if first + whole < last { $mask(depth - (first + whole) * LINE) } else { 0 };
                    // SAFETY: the caller's promise: lines `first .. last` of X are there, and of rows `row ..` of W, but for lanes that are masked.
                    unsafe {
                        let x = x.as_ptr().add(first * M * LINE);
                        let mut row = 0;
                        while row < rows {
                            let w = w.as_ptr().add((block * FEW_BLOCK + row) * depth + first * LINE);
                            let acc = acc.as_mut_ptr().add(row);
                            match rows - row {
                                1 => $tile::<M, 1>(x, w, depth, whole, rest, acc),
                                2 => $tile::<M, 2>(x, w, depth, whole, rest, acc),
                                _ => $tile::<M, ROWS>(x, w, depth, whole, rest, acc),
                            }
                            row += ROWS;
                        }
                    }
                }
                for (acc, out) in acc.iter().zip(out.chunks_exact_mut(M)) {
                    sum_lanes(acc, out);
                }
            }
        }

        /// # Safety
        /// `whole` lines of `M` rows readable at `x` and of `R` rows, `depth` apart, at `w`, then the lanes `rest` of one more unless it is 0; `R` rows of
        /// accumulators at `acc`.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $tile<const M: usize, const R: usize>(
            x: *const $type,
            w: *const $type,
            depth: usize,
            whole: usize,
            rest: u32,
            acc: *mut Lanes<M>,
        ) {
            const LINE: usize = 64 / size_of::<$type>();
            // SAFETY: the caller's promise. A prefetch may point anywhere.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); M]; R];
                for row in 0..R {
                    sums[row] = *acc.add(row);
                }
                for line in 0..whole {
                    for row in 0..R {
                        // While a line of each row is in use, the line of the row that comes next in its place, to the L2 cache: the L1 cache is full.
                        _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add((R + row) * depth + line * LINE).cast());
                    }
                    let mut ws = [$load(u32::MAX, w.add(line * LINE)); R];
                    for row in 1..R {
                        ws[row] = $load(u32::MAX, w.add(row * depth + line * LINE));
                    }
                    for m in 0..M {
                        let x = $load_x(x.add((line * M + m) * LINE));
                        for row in 0..R {
                            sums[row][m] = $add(sums[row][m], ws[row], x);
                        }
                    }
                }
                if rest != 0 {
                    for row in 0..R {
                        let w = $load(rest, w.add(row * depth + whole * LINE));
                        for m in 0..M {
                            sums[row][m] = $add(sums[row][m], w, $load_x(x.add((whole * M + m) * LINE)));
                        }
                    }
                }
                for row in 0..R {
                    *acc.add(row) = sums[row];
                }
            }
        }
    };
}

few_function!(
    few_f32,
    all_f32,
    tile_f32,
    "avx512f,avx512dq",
    f32,
    f32_mask,
    |mask: u32, from| _mm512_maskz_loadu_ps(mask as u16, from),
    |from| _mm512_loadu_ps(from),
    |sum, w, x| _mm512_fmadd_ps(w, x, sum)
);
few_function!(
    few_bf16,
    all_bf16,
    tile_bf16,
    "avx512f,avx512bw,avx512dq,avx512bf16",
    u16,
    short_lanes_left,
    |mask: u32, from: *const u16| _mm512_maskz_loadu_epi16(mask, from.cast()),
    |from: *const u16| _mm512_loadu_si512(from.cast()),
    |sum, w, x| _mm512_dpbf16_ps(sum, as_bf16(w), as_bf16(x))
);
few_function!(
    few_widened,
    all_widened,
    tile_widened,
    "avx512f,avx512bw,avx512dq",
    u16,
    short_lanes_left,
    |mask: u32, from: *const u16| halves(_mm512_maskz_loadu_epi16(mask, from.cast())),
    |from: *const u16| halves(_mm512_loadu_si512(from.cast())),
    |sum, w: [__m512; 2], x: [__m512; 2]| _mm512_fmadd_ps(w[1], x[1], _mm512_fmadd_ps(w[0], x[0], sum))
);

fn f32_mask(left: usize) -> u32 {
    u32::from(lanes_left(left))
}

/// The sums over the lanes of each of `M` vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum_lanes<const M: usize>(acc: &Lanes<M>, out: &mut [f32]) {
    for (acc, out) in acc.chunks(4).zip(out.chunks_mut(4)) {
        let lanes = |index: usize| acc.get(index).copied().unwrap_or(_mm512_setzero_ps());
        let sums = reduce_four(lanes(0), lanes(1), lanes(2), lanes(3));
        let mut four = [0.0f32; 4];
        // SAFETY: 4 numbers.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums) };
        out.copy_from_slice(&four[..out.len()]);
    }
}
