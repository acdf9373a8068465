//! Gradients with AVX-512: dX = dY · W.
//!
//! Few rows of dY, each code looked up where it is multiplied:
//!
//! ```text
//! for each group of 64 columns, for each row n of W (or pair of rows, in bf16): table = 16 products code · absmax
//!     for each vector t of the 4 of a group: columns 4i + t in lanes i
//!         w = permute(table, codes >> 8t)
//!         for each row m of up to 8: acc[m][t] += dy[m, n] · w
//! ```
//! From 5 rows on the accumulators of a whole group do not fit the registers: two of its vectors are worked through first and then the other
//! two, with tables that the first pass has kept. The lookups and shifts run on a port that the multiplications do not need.
//!
//! Many rows: a panel of weights, decoded before, stays in the L1 cache for all of them.

// Arrays of registers are read best by index, several at once.
#![allow(clippy::needless_range_loop)]

use core::arch::x86_64::*;

use super::super::{BackwardFew, FewRows, GROUP, Rows, TILE_ROWS, Table, Tiles, check_backward, check_backward_few};
use super::block_table;

pub(super) static FEW: BackwardFew = BackwardFew { max_rows: MAX_FEW, f32: few_f32, bf16: None, natural };

pub(super) static FEW_BF16: BackwardFew = BackwardFew { bf16: Some(few_bf16), ..FEW };

const MAX_FEW: usize = 8;

/// Vectors of a group.
const VECTORS: usize = GROUP / 16;

/// Tiles from the one worked on to the one that the L2 cache is asked for. A column of tiles has the length of a row for its stride, mostly a power of
/// two, so that the L1 cache would not hold many.
const TILES_AHEAD: usize = 24;

/// Calls `$function::<M, V, FIRST, ..>` for all vectors of a group at once, or for one half of them and then the other.
macro_rules! by_few {
    ($rows:expr, $function:ident $(, $constant:expr)*; $arguments:tt) => {
        match $rows {
            1 => $function::<1, 4, 0 $(, $constant)*> $arguments,
            2 => $function::<2, 4, 0 $(, $constant)*> $arguments,
            3 => $function::<3, 4, 0 $(, $constant)*> $arguments,
            4 => $function::<4, 4, 0 $(, $constant)*> $arguments,
            5 => { $function::<5, 2, 0 $(, $constant)*> $arguments; $function::<5, 2, 2 $(, $constant)*> $arguments }
            6 => { $function::<6, 2, 0 $(, $constant)*> $arguments; $function::<6, 2, 2 $(, $constant)*> $arguments }
            7 => { $function::<7, 2, 0 $(, $constant)*> $arguments; $function::<7, 2, 2 $(, $constant)*> $arguments }
            8 => { $function::<8, 2, 0 $(, $constant)*> $arguments; $function::<8, 2, 2 $(, $constant)*> $arguments }
            rows => unreachable!("{rows} rows"),
        }
    };
}

fn few_f32(tiles: &Tiles<'_>, table: &Table, dy: &[f32], rows: FewRows<'_>) {
    check_backward_few(tiles, dy.len(), TILE_ROWS, &rows, MAX_FEW);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_backward_few` has seen to the bounds.
    unsafe {
        if table.round {
            by_few!(rows.sums.len(), few_f32_of, true; (tiles, table, dy, rows.tables, rows.sums));
        } else {
            by_few!(rows.sums.len(), few_f32_of, false; (tiles, table, dy, rows.tables, rows.sums));
        }
    }
}

fn few_bf16(tiles: &Tiles<'_>, table: &Table, dy: &[u32], rows: FewRows<'_>) {
    check_backward_few(tiles, dy.len(), TILE_ROWS / 2, &rows, MAX_FEW);
    // SAFETY: as in `few_f32`.
    unsafe { by_few!(rows.sums.len(), few_bf16_of; (tiles, table, dy, rows.tables, rows.sums)) }
}

/// Vectors `FIRST .. FIRST + V` of the sums of `M` rows.
///
/// # Safety
/// `sums` must hold `M` rows.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_sums<const M: usize, const V: usize, const FIRST: usize>(sums: &[[f32; GROUP]]) -> [[__m512; V]; M] {
    let mut acc = [[_mm512_setzero_ps(); V]; M];
    for m in 0..M {
        for v in 0..V {
            // SAFETY: the caller's promise; a row has `VECTORS` vectors.
            acc[m][v] = unsafe { _mm512_loadu_ps(sums.as_ptr().add(m).cast::<f32>().add(16 * (FIRST + v))) };
        }
    }
    acc
}

/// # Safety
/// As [`load_sums`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_sums<const M: usize, const V: usize, const FIRST: usize>(
    acc: [[__m512; V]; M],
    sums: &mut [[f32; GROUP]],
) {
    for m in 0..M {
        for v in 0..V {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(m).cast::<f32>().add(16 * (FIRST + v)), acc[m][v]) };
        }
    }
}

/// What the gradient of few rows reads of a tile; asks for the same of a later one.
///
/// # Safety
/// `tile` must be one of the tiles, whose group is there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile<'a>(tiles: &Tiles<'a>, tile: usize) -> (&'a [[u8; GROUP]; 2], &'a [f32; TILE_ROWS]) {
    let at = tile * tiles.groups_per_row + tiles.groups.start;
    // A prefetch may point anywhere.
    let later = at.wrapping_add(TILES_AHEAD * tiles.groups_per_row);
    let codes = tiles.codes.as_ptr().wrapping_add(later).cast::<i8>();
    _mm_prefetch::<_MM_HINT_T1>(codes);
    _mm_prefetch::<_MM_HINT_T1>(codes.wrapping_add(GROUP));
    _mm_prefetch::<_MM_HINT_T1>(tiles.scales.as_ptr().wrapping_add(later).cast());
    // SAFETY: the caller's promise.
    unsafe { (&(*tiles.codes.as_ptr().add(at)).0, &*tiles.scales.as_ptr().add(at)) }
}

/// # Safety
/// The operands as `check_backward_few` wants them, with a table for each row and `M` rows of sums.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn few_f32_of<const M: usize, const V: usize, const FIRST: usize, const ROUND: bool>(
    tiles: &Tiles<'_>,
    table: &Table,
    dy: &[f32],
    tables: &mut [[u32; 16]],
    sums: &mut [[f32; GROUP]],
) {
    // SAFETY: `check_backward_few`: each tile has the group and its scales, 4 tables and 4 · M numbers of the gradient.
    unsafe {
        let values = _mm512_loadu_ps(table.values.as_ptr());
        // The weights of row `n`, row `row` of a tile.
        let tables = tables.as_mut_ptr().cast::<f32>();
        let decode = |(codes, scales): (&[[u8; GROUP]; 2], &[f32; TILE_ROWS]), n: usize, row: usize| {
            let kept = tables.add(16 * n);
            let table = if FIRST == 0 { block_table::<ROUND>(values, scales[row]) } else { _mm512_loadu_ps(kept) };
            if FIRST == 0 && V < VECTORS {
                _mm512_storeu_ps(kept, table);
            }
            let codes = _mm512_load_si512(codes[row / 2].as_ptr().cast());
            let mut weights = [table; V];
            for v in 0..V {
                let shift = _mm_cvtsi32_si128((8 * (FIRST + v) + 4 * (row % 2)) as i32);
                weights[v] = _mm512_permutexvar_ps(_mm512_srl_epi32(codes, shift), table);
            }
            weights
        };
        let mut acc = load_sums::<M, V, FIRST>(sums);
        for index in 0..tiles.num_tiles() {
            let own = tile(tiles, index);
            for row in 0..TILE_ROWS {
                let n = TILE_ROWS * index + row;
                let weights = decode(own, n, row);
                for m in 0..M {
                    let dy = _mm512_set1_ps(*dy.as_ptr().add(n * M + m));
                    for v in 0..V {
                        acc[m][v] = _mm512_fmadd_ps(weights[v], dy, acc[m][v]);
                    }
                }
            }
        }
        store_sums::<M, V, FIRST>(acc, sums);
    }
}

/// By bit offsets into 8 codes, the words of lane i of vector t: the byte of column 4i + t, and what is 4 bits behind it.
const fn offsets(vector: usize) -> [u8; 64] {
    let mut offsets = [0; 64];
    let mut word = 0;
    while word < 32 {
        // A quad word has two lanes.
        offsets[2 * word] = (32 * (word / 2 % 2) + 8 * vector + 4 * (word % 2)) as u8;
        word += 1;
    }
    offsets
}

/// # Safety
/// As [`few_f32_of`], of pairs of rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
unsafe fn few_bf16_of<const M: usize, const V: usize, const FIRST: usize>(
    tiles: &Tiles<'_>,
    table: &Table,
    dy: &[u32],
    tables: &mut [[u32; 16]],
    sums: &mut [[f32; GROUP]],
) {
    static OFFSETS: [[u8; 64]; VECTORS] = [offsets(0), offsets(1), offsets(2), offsets(3)];
    // SAFETY: as in `few_f32_of`, with 2 tables and 2 · M pairs of the gradient a tile; the vector types that are transmuted have 64 bytes and no
    // invalid values.
    unsafe {
        let bh = |vector: __m512i| core::mem::transmute::<__m512i, __m512bh>(vector);
        let values = _mm512_loadu_ps(table.values.as_ptr());
        let mut offsets = [_mm512_setzero_si512(); V];
        for v in 0..V {
            offsets[v] = _mm512_loadu_si512(OFFSETS[FIRST + v].as_ptr().cast());
        }
        // The 4 bits of a code in both words, and 16 more in the high one: the table of the second row is there.
        let (code, second) = (_mm512_set1_epi32(0xf_000f), _mm512_set1_epi32(0x10_0000));
        // The weights of pair `n` of rows, pair `pair` of a tile.
        let tables = tables.as_mut_ptr().cast::<__m512i>();
        let decode = |(codes, scales): (&[[u8; GROUP]; 2], &[f32; TILE_ROWS]), n: usize, pair: usize| {
            let kept = tables.add(n);
            let table = if FIRST == 0 {
                let [low, high] = [0, 1].map(|row| _mm512_mul_ps(values, _mm512_set1_ps(scales[2 * pair + row])));
                core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            } else {
                _mm512_loadu_si512(kept)
            };
            if FIRST == 0 && V < VECTORS {
                _mm512_storeu_si512(kept, table);
            }
            let codes = _mm512_load_si512(codes[pair].as_ptr().cast());
            let mut weights = [table; V];
            for v in 0..V {
                // (codes & code) | second
                let codes = _mm512_multishift_epi64_epi8(offsets[v], codes);
                let index = _mm512_ternarylogic_epi32::<0xea>(codes, code, second);
                weights[v] = _mm512_permutexvar_epi16(index, table);
            }
            weights
        };
        let mut acc = load_sums::<M, V, FIRST>(sums);
        for index in 0..tiles.num_tiles() {
            let own = tile(tiles, index);
            for pair in 0..TILE_ROWS / 2 {
                let n = TILE_ROWS / 2 * index + pair;
                let weights = decode(own, n, pair);
                for m in 0..M {
                    let dy = bh(_mm512_set1_epi32(*dy.as_ptr().add(n * M + m) as i32));
                    for v in 0..V {
                        acc[m][v] = _mm512_dpbf16_ps(acc[m][v], bh(weights[v]), dy);
                    }
                }
            }
        }
        store_sums::<M, V, FIRST>(acc, sums);
    }
}

fn natural(sums: &mut [[f32; GROUP]]) {
    /// Number `16t + i` becomes number `4i + t`.
    #[target_feature(enable = "avx512f")]
    fn inner(sums: &mut [[f32; GROUP]]) {
        for sums in sums {
            let from = *sums;
            for i in 0..16 {
                for t in 0..VECTORS {
                    sums[VECTORS * i + t] = from[16 * t + i];
                }
            }
        }
    }
    // SAFETY: as in `few_f32`.
    unsafe { inner(sums) }
}

/// Rows of the gradient that are worked on at once: 6 rows of 4 accumulators, 4 vectors of weights.
const BACKWARD_ROWS: usize = 6;

/// Calls `$function::<M>` for blocks of up to 6 rows of the sums.
macro_rules! by_blocks {
    ($sums:expr, $function:ident, $panel:expr, $dy:expr) => {
        for (block, sums) in $sums.chunks_mut(BACKWARD_ROWS).enumerate() {
            let dy = $dy.data.as_ptr().wrapping_add(block * BACKWARD_ROWS * $dy.stride);
            match sums.len() {
                1 => $function::<1>($panel, dy, $dy.stride, sums),
                2 => $function::<2>($panel, dy, $dy.stride, sums),
                3 => $function::<3>($panel, dy, $dy.stride, sums),
                4 => $function::<4>($panel, dy, $dy.stride, sums),
                5 => $function::<5>($panel, dy, $dy.stride, sums),
                _ => $function::<6>($panel, dy, $dy.stride, sums),
            }
        }
    };
}

pub(super) fn by_panels_f32(panel: &[[f32; GROUP]], dy: &Rows<'_, f32>, sums: &mut [[f32; GROUP]]) {
    check_backward(panel.len(), dy, sums.len());
    // SAFETY: as in `few_f32`, with `check_backward`; each block has as many sums as rows.
    unsafe { by_blocks!(sums, by_panels_f32_of, panel, dy) }
}

/// # Safety
/// `M` rows of `panel.len()` numbers at `dy`, `stride` apart; `M` sums.
#[target_feature(enable = "avx512f")]
unsafe fn by_panels_f32_of<const M: usize>(
    panel: &[[f32; GROUP]],
    dy: *const f32,
    stride: usize,
    sums: &mut [[f32; GROUP]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 4]; M];
        for m in 0..M {
            for v in 0..4 {
                acc[m][v] = _mm512_loadu_ps(sums.as_ptr().add(m).cast::<f32>().add(16 * v));
            }
        }
        for (n, weights) in panel.iter().enumerate() {
            let weights = [0, 1, 2, 3].map(|v| _mm512_loadu_ps(weights.as_ptr().add(16 * v)));
            for (m, acc) in acc.iter_mut().enumerate() {
                let dy = _mm512_set1_ps(*dy.add(m * stride + n));
                for v in 0..4 {
                    acc[v] = _mm512_fmadd_ps(weights[v], dy, acc[v]);
                }
            }
        }
        for m in 0..M {
            for v in 0..4 {
                _mm512_storeu_ps(sums.as_mut_ptr().add(m).cast::<f32>().add(16 * v), acc[m][v]);
            }
        }
    }
}

pub(super) fn by_panels_bf16(panel: &[[u32; GROUP]], dy: &Rows<'_, u16>, sums: &mut [[f32; GROUP]]) {
    check_backward(2 * panel.len(), dy, sums.len());
    // SAFETY: as in `by_panels_f32`; a row of the panel takes two numbers of the gradient.
    unsafe { by_blocks!(sums, by_panels_bf16_of, panel, dy) }
}

/// # Safety
/// `M` rows of `2 · panel.len()` numbers at `dy`, `stride` apart; `M` sums.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn by_panels_bf16_of<const M: usize>(
    panel: &[[u32; GROUP]],
    dy: *const u16,
    stride: usize,
    sums: &mut [[f32; GROUP]],
) {
    // SAFETY: the caller's promise; the vector types that are transmuted have 64 bytes and no invalid values.
    unsafe {
        let bh = |vector: __m512i| core::mem::transmute::<__m512i, __m512bh>(vector);
        let mut acc = [[_mm512_setzero_ps(); 4]; M];
        for m in 0..M {
            for v in 0..4 {
                acc[m][v] = _mm512_loadu_ps(sums.as_ptr().add(m).cast::<f32>().add(16 * v));
            }
        }
        for (pair, weights) in panel.iter().enumerate() {
            let weights = [0, 1, 2, 3].map(|v| bh(_mm512_loadu_si512(weights.as_ptr().add(16 * v).cast())));
            for (m, acc) in acc.iter_mut().enumerate() {
                let dy = dy.add(m * stride + 2 * pair).cast::<i32>().read_unaligned();
                let dy = bh(_mm512_set1_epi32(dy));
                for v in 0..4 {
                    acc[v] = _mm512_dpbf16_ps(acc[v], weights[v], dy);
                }
            }
        }
        for m in 0..M {
            for v in 0..4 {
                _mm512_storeu_ps(sums.as_mut_ptr().add(m).cast::<f32>().add(16 * v), acc[m][v]);
            }
        }
    }
}
