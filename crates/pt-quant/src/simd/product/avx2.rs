//! Products with AVX2 and FMA.
//!
//! ```text
//! for each group of 64 columns, for each of 2 rows: table[row] = 16 products code · absmax, in two vectors of 8
//!     for each 8 columns: z = zero-extend(codes)
//!         weight = permute(table, z): both halves looked up by bits 0 to 2, bit 3 (shifted to the sign) chooses
//!         acc[row] += weight · x
//! ```
//! Two rows at a time, since their tables take 4 of 16 registers. There is no bf16 dot product: tables are rounded to bf16 and the rest is
//! f32. Integers: products of unsigned and signed bytes would saturate with the biased codes, so the sign of the code goes to the activation.

// Arrays of registers are read best by index, several at once.
#![allow(clippy::needless_range_loop)]

use core::arch::x86_64::*;

use super::{
    GROUP, Group, Int8Group, Int8Rows, Int8Table, Kernels, Rows, Sums, TILE_ROWS, Table, Tiles, check_backward,
    check_forward, check_int8, check_panel, scalar,
};

const MAX_ROWS: usize = 4;

pub(super) static KERNELS: Kernels = Kernels {
    max_rows: MAX_ROWS,
    lanes: 8,
    panel_rows: [12; 2],
    forward_f32,
    order_f32: None,
    forward_bf16: None,
    order_bf16: None,
    forward_int8,
    reduce,
    quantize,
    panel_f32,
    panel_bf16,
    panel_row_pairs: scalar::panel_row_pairs,
    backward_f32,
    backward_bf16: None,
    backward_few: None,
    tile_rows,
    untile_rows,
};

/// Calls `$function::<M, ..>` for the number of rows, which is 1 to 4.
macro_rules! by_rows {
    ($rows:expr, $function:ident $(, $constant:expr)*; $arguments:tt) => {
        match $rows {
            0 => {}
            1 => $function::<1 $(, $constant)*> $arguments,
            2 => $function::<2 $(, $constant)*> $arguments,
            3 => $function::<3 $(, $constant)*> $arguments,
            4 => $function::<4 $(, $constant)*> $arguments,
            rows => unreachable!("{rows} rows"),
        }
    };
}

fn forward_f32(tiles: &Tiles<'_>, table: &Table, x: &Rows<'_, f32>, acc: &mut [f32]) {
    check_forward(tiles, x, acc, MAX_ROWS, 8);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_forward` has seen to the bounds.
    unsafe {
        if table.round {
            by_rows!(x.rows, forward_f32_of, true; (tiles, table, x, acc));
        } else {
            by_rows!(x.rows, forward_f32_of, false; (tiles, table, x, acc));
        }
    }
}

fn forward_int8(tiles: &Tiles<'_>, table: &Int8Table, x: &Int8Rows<'_>, acc: &mut [f32], scratch: &mut Sums) {
    check_int8(tiles, x, acc, scratch, MAX_ROWS, 8);
    // SAFETY: as in `forward_f32`, with `check_int8`.
    unsafe { by_rows!(x.rows, forward_int8_of; (tiles, table, x, acc, scratch)) }
}

fn reduce(acc: &[f32], sums: &mut Sums) {
    /// 4 vectors of 8 for each output of 4.
    #[target_feature(enable = "avx2")]
    fn inner(acc: &[f32], sums: &mut Sums) {
        for (acc, sums) in acc.as_chunks::<{ 8 * TILE_ROWS }>().0.iter().zip(sums) {
            // SAFETY: each accumulator has 32 numbers, each output 4.
            unsafe {
                let acc = [0, 8, 16, 24].map(|first| _mm256_loadu_ps(acc.as_ptr().add(first)));
                let (low, high) = (reduce_two(acc[0], acc[1]), reduce_two(acc[2], acc[3]));
                _mm_storeu_ps(sums.as_mut_ptr(), _mm_movelh_ps(low, high));
            }
        }
    }
    assert_eq!(acc.len(), sums.len() * TILE_ROWS * 8, "8 lanes for each sum");
    // SAFETY: as in `forward_f32`.
    unsafe { inner(acc, sums) }
}

/// The sums over the lanes of 2 vectors, in lanes 0 and 1.
#[inline]
#[target_feature(enable = "avx2")]
fn reduce_two(a: __m256, b: __m256) -> __m128 {
    let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let ab = _mm_add_ps(_mm256_castps256_ps128(ab), _mm256_extractf128_ps::<1>(ab));
    _mm_add_ps(ab, _mm_movehl_ps(ab, ab))
}

/// The accumulators of two rows of a tile: those at `out`, or zero when the groups begin with the first.
///
/// # Safety
/// `out` must be valid for two vectors of each of `M` rows of activations, which are 4 apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_acc<const M: usize>(out: *const f32, first_group: usize) -> [[__m256; 2]; M] {
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    if first_group > 0 {
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *acc = [0, 1].map(|row| unsafe { _mm256_loadu_ps(out.add((m * TILE_ROWS + row) * 8)) });
        }
    }
    acc
}

/// # Safety
/// As [`load_acc`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_acc<const M: usize>(acc: [[__m256; 2]; M], out: *mut f32) {
    for (m, acc) in acc.into_iter().enumerate() {
        for (row, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(out.add((m * TILE_ROWS + row) * 8), acc) };
        }
    }
}

/// The nearest bf16 numbers, ties to even; NaN stays NaN.
#[inline]
#[target_feature(enable = "avx2")]
fn round_bf16(values: __m256) -> __m256 {
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let rounded = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-0x1_0000)));
    _mm256_blendv_ps(rounded, _mm256_set1_ps(f32::NAN), _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values))
}

/// The 16 numbers that the codes of a block stand for.
#[inline]
#[target_feature(enable = "avx2")]
fn block_table<const ROUND: bool>(values: [__m256; 2], absmax: f32) -> [__m256; 2] {
    values.map(|values| {
        let table = _mm256_mul_ps(values, _mm256_set1_ps(absmax));
        if ROUND { round_bf16(table) } else { table }
    })
}

/// Looks 8 codes up: the low 4 bits of `codes`, whose bit 3 is the sign bit of `choice`.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: [__m256; 2], codes: __m256i, choice: __m256i) -> __m256 {
    let (low, high) = (_mm256_permutevar8x32_ps(table[0], codes), _mm256_permutevar8x32_ps(table[1], codes));
    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(choice))
}

/// The weights of 8 columns of the two rows of half a group.
///
/// # Safety
/// `codes` must be valid for 8 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn weights_of(tables: [[__m256; 2]; 2], codes: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    let codes = unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast())) };
    [
        look_up(tables[0], codes, _mm256_slli_epi32::<28>(codes)),
        look_up(tables[1], _mm256_srli_epi32::<4>(codes), _mm256_slli_epi32::<24>(codes)),
    ]
}

/// # Safety
/// The operands as `check_forward` wants them, for `M` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_f32_of<const M: usize, const ROUND: bool>(
    tiles: &Tiles<'_>,
    table: &Table,
    x: &Rows<'_, f32>,
    acc: &mut [f32],
) {
    let groups = tiles.groups.len;
    // SAFETY: `check_forward`: 16 values; a tile has the groups worked on and their scales; rows of `groups · 64` activations; 4 accumulators for each
    // of M rows a tile.
    unsafe {
        let values = [0, 8].map(|first| _mm256_loadu_ps(table.values.as_ptr().add(first)));
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 8);
            for pair in 0..2 {
                let out = out.add(2 * pair * 8);
                let mut acc = load_acc::<M>(out, tiles.groups.start);
                for group in 0..groups {
                    let (codes, scales) = ((*codes.add(group)).0[pair].as_ptr(), &*scales.add(group));
                    let tables = [
                        block_table::<ROUND>(values, scales[2 * pair]),
                        block_table::<ROUND>(values, scales[2 * pair + 1]),
                    ];
                    for vector in 0..GROUP / 8 {
                        let weights = weights_of(tables, codes.add(8 * vector));
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let x = x.data.as_ptr().add(m * x.stride + group * GROUP + 8 * vector);
                            let x = _mm256_loadu_ps(x);
                            for row in 0..2 {
                                acc[row] = _mm256_fmadd_ps(weights[row], x, acc[row]);
                            }
                        }
                    }
                }
                store_acc(acc, out);
            }
        }
    }
}

/// # Safety
/// The operands as `check_int8` wants them, for `M` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_int8_of<const M: usize>(
    tiles: &Tiles<'_>,
    table: &Int8Table,
    x: &Int8Rows<'_>,
    acc: &mut [f32],
    scratch: &mut Sums,
) {
    let groups = tiles.groups.len;
    // SAFETY: `check_int8`: 16 codes; a tile has the groups worked on and their scales, a row of activations as many, as has the scratch of each
    // row; 4 accumulators for each of M rows a tile.
    unsafe {
        let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.codes.as_ptr().cast()));
        let values = _mm256_sub_epi8(values, _mm256_set1_epi8(-128));
        let low = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 8);
            for m in 0..M {
                for group in 0..groups {
                    let scale = _mm_set1_ps(*x.scales.as_ptr().add(m * x.stride + group));
                    let scale = _mm_mul_ps(_mm_loadu_ps((*scales.add(group)).as_ptr()), scale);
                    _mm_storeu_ps(scratch.as_mut_ptr().add(m * groups + group).cast(), scale);
                }
            }
            for pair in 0..2 {
                let out = out.add(2 * pair * 8);
                let mut acc = load_acc::<M>(out, tiles.groups.start);
                for group in 0..groups {
                    let codes = (*codes.add(group)).0[pair].as_ptr();
                    let mut dots = [[_mm256_setzero_si256(); 2]; M];
                    for half in 0..2 {
                        let codes = _mm256_loadu_si256(codes.add(32 * half).cast());
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low);
                        let weights = [
                            _mm256_shuffle_epi8(values, _mm256_and_si256(codes, low)),
                            _mm256_shuffle_epi8(values, high),
                        ];
                        let sizes = [_mm256_abs_epi8(weights[0]), _mm256_abs_epi8(weights[1])];
                        for (m, dots) in dots.iter_mut().enumerate() {
                            let x = &*x.groups.as_ptr().add(m * x.stride + group);
                            let x = _mm256_loadu_si256(x.codes.as_ptr().add(32 * half).cast());
                            for row in 0..2 {
                                // Both factors are at most 127, so two products fit in 16 bits.
                                let x = _mm256_sign_epi8(x, weights[row]);
                                let dot = _mm256_madd_epi16(_mm256_maddubs_epi16(sizes[row], x), ones);
                                dots[row] = _mm256_add_epi32(dots[row], dot);
                            }
                        }
                    }
                    for (m, (acc, dots)) in acc.iter_mut().zip(dots).enumerate() {
                        let scale = &*scratch.as_ptr().add(m * groups + group);
                        for row in 0..2 {
                            let scale = _mm256_set1_ps(scale[2 * pair + row]);
                            acc[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[row]), scale, acc[row]);
                        }
                    }
                }
                store_acc(acc, out);
            }
        }
    }
}

fn quantize(x: &[f32; GROUP], out: &mut Int8Group) -> f32 {
    #[target_feature(enable = "avx2")]
    fn inner(x: &[f32; GROUP], out: &mut Int8Group) -> f32 {
        scalar::quantize(x, out)
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(x, out) }
}

fn tile_rows(rows: &[&[u8]; TILE_ROWS], out: &mut [Group]) {
    #[target_feature(enable = "avx2")]
    fn inner(rows: &[&[u8]; TILE_ROWS], out: &mut [Group]) {
        scalar::tile_rows(rows, out);
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(rows, out) }
}

fn untile_rows(groups: &[Group], rows: &mut [&mut [u8]; TILE_ROWS]) {
    #[target_feature(enable = "avx2")]
    fn inner(groups: &[Group], rows: &mut [&mut [u8]; TILE_ROWS]) {
        scalar::untile_rows(groups, rows);
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(groups, rows) }
}

fn panel_f32(tiles: &Tiles<'_>, table: &Table, out: &mut [f32]) {
    check_panel(tiles, GROUP, out.len());
    // SAFETY: as in `forward_f32`, with `check_panel`.
    unsafe {
        if table.round {
            panel_of::<true, f32>(tiles, table, out);
        } else {
            panel_of::<false, f32>(tiles, table, out);
        }
    }
}

fn panel_bf16(tiles: &Tiles<'_>, table: &Table, out: &mut [u32]) {
    check_panel(tiles, GROUP / 2, out.len());
    // SAFETY: as in `forward_f32`, with `check_panel`; an element holds two weights.
    unsafe { panel_of::<true, u32>(tiles, table, out) }
}

/// Weights as f32 (`T` = f32), or two as bf16 in an element (`T` = u32).
///
/// # Safety
/// The operands as `check_panel` wants them, with 64 elements a group for f32 and 32 for u32.
#[target_feature(enable = "avx2,fma")]
unsafe fn panel_of<const ROUND: bool, T>(tiles: &Tiles<'_>, table: &Table, out: &mut [T]) {
    let pairs = size_of::<T>() == 4 && core::any::type_name::<T>() == core::any::type_name::<u32>();
    let per_group = if pairs { GROUP / 2 } else { GROUP };
    let columns = tiles.groups.len * per_group;
    // SAFETY: `check_panel`: the groups worked on lie in `codes` and `scales`, and 4 rows of `columns` elements of 4 bytes a tile in `out`.
    unsafe {
        let values = [0, 8].map(|first| _mm256_loadu_ps(table.values.as_ptr().add(first)));
        for tile in 0..tiles.num_tiles() {
            for group in 0..tiles.groups.len {
                let at = tile * tiles.groups_per_row + tiles.groups.start + group;
                let (codes, scales) = (&(*tiles.codes.as_ptr().add(at)).0, &*tiles.scales.as_ptr().add(at));
                let out = out.as_mut_ptr().cast::<f32>().add(tile * TILE_ROWS * columns + group * per_group);
                for pair in 0..2 {
                    let tables = [
                        block_table::<ROUND>(values, scales[2 * pair]),
                        block_table::<ROUND>(values, scales[2 * pair + 1]),
                    ];
                    let codes = codes[pair].as_ptr();
                    let out = out.add(2 * pair * columns);
                    if pairs {
                        for vector in 0..GROUP / 16 {
                            let first = weights_of(tables, codes.add(16 * vector));
                            let second = weights_of(tables, codes.add(16 * vector + 8));
                            for row in 0..2 {
                                let packed = pack_bf16(first[row], second[row]);
                                _mm256_storeu_si256(out.add(row * columns + 8 * vector).cast(), packed);
                            }
                        }
                    } else {
                        for vector in 0..GROUP / 8 {
                            let weights = weights_of(tables, codes.add(8 * vector));
                            _mm256_storeu_ps(out.add(8 * vector), weights[0]);
                            _mm256_storeu_ps(out.add(columns + 8 * vector), weights[1]);
                        }
                    }
                }
            }
        }
    }
}

/// The upper halves of 16 numbers, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn pack_bf16(first: __m256, second: __m256) -> __m256i {
    let high = |values: __m256| _mm256_srli_epi32::<16>(_mm256_castps_si256(values));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(high(first), high(second)))
}

/// Rows of the gradient that are worked on at once: 3 rows of 4 accumulators, for half a group.
const BACKWARD_ROWS: usize = 3;

fn backward_f32(panel: &[[f32; GROUP]], dy: &Rows<'_, f32>, sums: &mut [[f32; GROUP]]) {
    check_backward(panel.len(), dy, sums.len());
    for (block, sums) in sums.chunks_mut(BACKWARD_ROWS).enumerate() {
        // SAFETY: as in `forward_f32`, with `check_backward`; each block has as many sums as rows.
        unsafe {
            let dy_rows = dy.data.as_ptr().wrapping_add(block * BACKWARD_ROWS * dy.stride);
            match sums.len() {
                1 => backward_f32_of::<1>(panel, dy_rows, dy.stride, sums),
                2 => backward_f32_of::<2>(panel, dy_rows, dy.stride, sums),
                _ => backward_f32_of::<3>(panel, dy_rows, dy.stride, sums),
            }
        }
    }
}

/// # Safety
/// `M` rows of `panel.len()` numbers at `dy`, `stride` apart; `M` sums.
#[target_feature(enable = "avx2,fma")]
unsafe fn backward_f32_of<const M: usize>(
    panel: &[[f32; GROUP]],
    dy: *const f32,
    stride: usize,
    sums: &mut [[f32; GROUP]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for half in 0..2 {
            let sum = |sums: *mut [f32; GROUP], m: usize, v: usize| sums.add(m).cast::<f32>().add(32 * half + 8 * v);
            let mut acc = [[_mm256_setzero_ps(); 4]; M];
            for m in 0..M {
                for v in 0..4 {
                    acc[m][v] = _mm256_loadu_ps(sum(sums.as_mut_ptr(), m, v));
                }
            }
            for (n, weights) in panel.iter().enumerate() {
                let mut dys = [_mm256_setzero_ps(); M];
                for m in 0..M {
                    dys[m] = _mm256_set1_ps(*dy.add(m * stride + n));
                }
                for v in 0..4 {
                    let weights = _mm256_loadu_ps(weights.as_ptr().add(32 * half + 8 * v));
                    for m in 0..M {
                        acc[m][v] = _mm256_fmadd_ps(weights, dys[m], acc[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..4 {
                    _mm256_storeu_ps(sum(sums.as_mut_ptr(), m, v), acc[m][v]);
                }
            }
        }
    }
}
