//! Products with AVX-512.
//!
//! ```text
//! for each group of 64 columns, for each of 4 rows: table[row] = 16 products code · absmax
//!     for each half byte t of the 8 in a double word: columns 4i + t / 2 of row t % 2, in lanes i
//!         acc[row] += permute(table[row], codes >> 4t) · x[4i + t / 2]
//! ```
//! The permutations read only the low bits of an index (4 of a double word; 5 of a word and 6 of a byte, for which the table is repeated), so
//! nothing is masked, and the codes of the next column are a shift away. The activations are put in that order first, [`order_f32`] and for
//! words [`order_bf16`]. With bf16 the table is rounded once and the lookups give the very numbers that dequantizing gives. With integers
//! a vector holds a whole group, the unsigned code's bias is taken off through what the sum starts from, and scales are applied once a group.
//!
//! Zero-extending the codes instead would keep the natural order, but on Zen 4 it competes with the permutations and multiplications for three
//! ports, where shifts have a fourth: 14.7 cycles instead of 12.5 for a group's pair of rows in f32.
//!
//! Up to 5 rows of activations take all 4 rows of a tile at once, in 20 accumulators: each code is looked up once for all of them.

// Arrays of registers are read best by index, several at once.
#![allow(clippy::needless_range_loop)]

mod backward;

use core::arch::x86_64::*;

use super::{
    GROUP, Group, Int8Group, Int8Rows, Int8Table, Kernels, Rows, Sums, TILE_ROWS, Table, Tiles, check_forward,
    check_int8, check_panel, scalar,
};
use crate::simd::lanes::reduce_four;

const MAX_ROWS: usize = 5;

pub(super) static KERNELS: Kernels = Kernels {
    max_rows: MAX_ROWS,
    lanes: 16,
    panel_rows: [64; 2],
    forward_f32,
    order_f32: Some(order_f32),
    forward_bf16: None,
    order_bf16: Some(order_bf16),
    forward_int8,
    reduce,
    quantize,
    panel_f32,
    panel_bf16,
    panel_row_pairs,
    backward_f32: backward::by_panels_f32,
    backward_bf16: None,
    backward_few: Some(&backward::FEW),
    tile_rows,
    untile_rows,
};

pub(super) static KERNELS_BF16: Kernels = Kernels {
    forward_bf16: Some(forward_bf16),
    backward_bf16: Some(backward::by_panels_bf16),
    backward_few: Some(&backward::FEW_BF16),
    ..KERNELS
};

/// Calls `$function::<M, PAIRS, ..>` for the number of rows, which is 1 to 5.
macro_rules! by_rows {
    ($rows:expr, $function:ident $(, $constant:expr)*; $arguments:tt) => {
        match $rows {
            0 => {}
            1 => $function::<1, 2 $(, $constant)*> $arguments,
            2 => $function::<2, 2 $(, $constant)*> $arguments,
            3 => $function::<3, 2 $(, $constant)*> $arguments,
            4 => $function::<4, 2 $(, $constant)*> $arguments,
            5 => $function::<5, 2 $(, $constant)*> $arguments,
            rows => unreachable!("{rows} rows"),
        }
    };
}

fn forward_f32(tiles: &Tiles<'_>, table: &Table, x: &Rows<'_, f32>, acc: &mut [f32]) {
    check_forward(tiles, x, acc, MAX_ROWS, 16);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_forward` has seen to the bounds.
    unsafe {
        if table.round {
            by_rows!(x.rows, forward_f32_of, true; (tiles, table, x, acc));
        } else {
            by_rows!(x.rows, forward_f32_of, false; (tiles, table, x, acc));
        }
    }
}

fn forward_bf16(tiles: &Tiles<'_>, table: &Table, x: &Rows<'_, u16>, acc: &mut [f32]) {
    check_forward(tiles, x, acc, MAX_ROWS, 16);
    // SAFETY: as in `forward_f32`.
    unsafe { by_rows!(x.rows, forward_bf16_of; (tiles, table, x, acc)) }
}

fn forward_int8(tiles: &Tiles<'_>, table: &Int8Table, x: &Int8Rows<'_>, acc: &mut [f32], scratch: &mut Sums) {
    check_int8(tiles, x, acc, scratch, MAX_ROWS, 16);
    // SAFETY: as in `forward_f32`, with `check_int8`.
    unsafe { by_rows!(x.rows, forward_int8_of; (tiles, table, x, acc, scratch)) }
}

fn order_f32(x: &[f32], out: &mut [f32]) {
    /// Number `4i + t` of a group becomes number `16t + i`.
    #[target_feature(enable = "avx512f")]
    fn inner(x: &[f32], out: &mut [f32]) {
        for (x, out) in x.as_chunks::<GROUP>().0.iter().zip(out.as_chunks_mut::<GROUP>().0) {
            for t in 0..4 {
                for i in 0..16 {
                    out[16 * t + i] = x[4 * i + t];
                }
            }
        }
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(x, out) }
}

fn order_bf16(x: &[u16], out: &mut [u16]) {
    /// Number `2i + t` of a group becomes number `32t + i`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn inner(x: &[u16], out: &mut [u16]) {
        for (x, out) in x.as_chunks::<GROUP>().0.iter().zip(out.as_chunks_mut::<GROUP>().0) {
            for t in 0..2 {
                for i in 0..32 {
                    out[32 * t + i] = x[2 * i + t];
                }
            }
        }
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(x, out) }
}

fn reduce(acc: &[f32], sums: &mut Sums) {
    /// 4 vectors of 16 for each output of 4.
    #[target_feature(enable = "avx512f,avx512dq")]
    fn inner(acc: &[f32], sums: &mut Sums) {
        for (acc, sums) in acc.as_chunks::<{ 16 * TILE_ROWS }>().0.iter().zip(sums) {
            // SAFETY: each accumulator has 64 numbers, each output 4.
            unsafe {
                let acc = [0, 16, 32, 48].map(|first| _mm512_loadu_ps(acc.as_ptr().add(first)));
                _mm_storeu_ps(sums.as_mut_ptr(), reduce_four(acc[0], acc[1], acc[2], acc[3]));
            }
        }
    }
    assert_eq!(acc.len(), sums.len() * TILE_ROWS * 16, "16 lanes for each sum");
    // SAFETY: as in `forward_f32`.
    unsafe { inner(acc, sums) }
}

/// The accumulators of `PAIRS` pairs of rows of a tile: those at `out`, or zero when the groups begin with the first.
///
/// # Safety
/// `out` must be valid for `2 · PAIRS` vectors of each of `M` rows of activations, which are 4 apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_acc<const M: usize, const PAIRS: usize>(
    out: *const f32,
    first_group: usize,
) -> [[[__m512; 2]; PAIRS]; M] {
    let mut acc = [[[_mm512_setzero_ps(); 2]; PAIRS]; M];
    if first_group > 0 {
        for (m, acc) in acc.iter_mut().enumerate() {
            for (row, acc) in acc.as_flattened_mut().iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *acc = unsafe { _mm512_loadu_ps(out.add((m * TILE_ROWS + row) * 16)) };
            }
        }
    }
    acc
}

/// # Safety
/// As [`load_acc`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_acc<const M: usize, const PAIRS: usize>(acc: [[[__m512; 2]; PAIRS]; M], out: *mut f32) {
    for (m, acc) in acc.iter().enumerate() {
        for (row, acc) in acc.as_flattened().iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(out.add((m * TILE_ROWS + row) * 16), *acc) };
        }
    }
}

/// The nearest bf16 numbers, ties to even; NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn round_bf16(values: __m512) -> __m512 {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let rounded = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x1_0000)));
    _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values), _mm512_set1_ps(f32::NAN))
}

/// The 16 numbers that the codes of a block stand for.
#[inline]
#[target_feature(enable = "avx512f")]
fn block_table<const ROUND: bool>(values: __m512, absmax: f32) -> __m512 {
    let table = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
    if ROUND { round_bf16(table) } else { table }
}

/// The table in bf16, twice. Numbers under 2^-126 become zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn block_table_bf16(values: __m512, absmax: f32) -> __m512i {
    let table = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
    // SAFETY: both are 64 bytes without invalid values.
    unsafe { core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(table, table)) }
}

/// Groups from the one worked on to the one that is asked for: 5 KiB ahead. From memory this brings 30 % in f32 and 10 % in bf16; the integer
/// product runs at the speed of memory without.
const AHEAD: usize = 40;

/// Asks for the codes of some pairs of rows of a group, which may lie past the end.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const PAIRS: usize>(codes: *const Group, group: usize, part: usize) {
    let codes = codes.wrapping_add(group).cast::<i8>();
    for pair in 0..PAIRS {
        _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(GROUP * (part + pair)));
    }
}

/// Some pairs of rows of a group, ready to be looked up.
struct BlockF32<const PAIRS: usize> {
    codes: [__m512i; PAIRS],
    tables: [[__m512; 2]; PAIRS],
}

impl<const PAIRS: usize> BlockF32<PAIRS> {
    /// # Safety
    /// The pointers must be valid for a group and its scales.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load<const ROUND: bool>(
        codes: *const Group,
        scales: *const [f32; TILE_ROWS],
        values: __m512,
        part: usize,
    ) -> Self {
        // SAFETY: the caller's promise; a half of a group is a vector.
        let (codes, scales) = unsafe { (&(*codes).0, &*scales) };
        let mut block = Self { codes: [_mm512_setzero_si512(); PAIRS], tables: [[values; 2]; PAIRS] };
        for pair in 0..PAIRS {
            // SAFETY: as above.
            block.codes[pair] = unsafe { _mm512_load_si512(codes[part + pair].as_ptr().cast()) };
            for row in 0..2 {
                block.tables[pair][row] = block_table::<ROUND>(values, scales[2 * (part + pair) + row]);
            }
        }
        block
    }

    /// The weights of columns `4i + vector`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn weights(&self, vector: usize) -> [[__m512; 2]; PAIRS] {
        let mut weights = self.tables;
        for pair in 0..PAIRS {
            for row in 0..2 {
                let shift = _mm_cvtsi32_si128(8 * vector as i32 + 4 * row as i32);
                let codes = _mm512_srl_epi32(self.codes[pair], shift);
                weights[pair][row] = _mm512_permutexvar_ps(codes, self.tables[pair][row]);
            }
        }
        weights
    }
}

/// As [`BlockF32`], of words.
struct BlockBf16<const PAIRS: usize> {
    codes: [__m512i; PAIRS],
    tables: [[__m512i; 2]; PAIRS],
}

impl<const PAIRS: usize> BlockBf16<PAIRS> {
    /// # Safety
    /// The pointers must be valid for a group and its scales.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn load(codes: *const Group, scales: *const [f32; TILE_ROWS], values: __m512, part: usize) -> Self {
        // SAFETY: the caller's promise; a half of a group is a vector.
        let (codes, scales) = unsafe { (&(*codes).0, &*scales) };
        let zero = _mm512_setzero_si512();
        let mut block = Self { codes: [zero; PAIRS], tables: [[zero; 2]; PAIRS] };
        for pair in 0..PAIRS {
            // SAFETY: as above.
            block.codes[pair] = unsafe { _mm512_load_si512(codes[part + pair].as_ptr().cast()) };
            for row in 0..2 {
                block.tables[pair][row] = block_table_bf16(values, scales[2 * (part + pair) + row]);
            }
        }
        block
    }

    /// The weights of columns `2i + vector`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn weights(&self, vector: usize) -> [[__m512i; 2]; PAIRS] {
        let mut weights = self.tables;
        for pair in 0..PAIRS {
            for row in 0..2 {
                let shift = _mm_cvtsi32_si128(8 * vector as i32 + 4 * row as i32);
                let codes = _mm512_srl_epi16(self.codes[pair], shift);
                weights[pair][row] = _mm512_permutexvar_epi16(codes, self.tables[pair][row]);
            }
        }
        weights
    }
}

/// # Safety
/// The operands as `check_forward` wants them, for `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn forward_f32_of<const M: usize, const PAIRS: usize, const ROUND: bool>(
    tiles: &Tiles<'_>,
    table: &Table,
    x: &Rows<'_, f32>,
    acc: &mut [f32],
) {
    let groups = tiles.groups.len;
    // SAFETY: `check_forward`: 16 values; a tile has the groups worked on and their scales; rows of `groups · 64` activations; 4 accumulators for each
    // of M rows a tile.
    unsafe {
        let values = _mm512_loadu_ps(table.values.as_ptr());
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 16);
            for part in (0..2).step_by(PAIRS) {
                let out = out.add(2 * part * 16);
                let mut acc = load_acc::<M, PAIRS>(out, tiles.groups.start);
                let mut block = BlockF32::<PAIRS>::load::<ROUND>(codes, scales, values, part);
                let mut weights = block.weights(0);
                for group in 0..groups {
                    prefetch::<PAIRS>(codes, group + AHEAD, part);
                    for vector in 0..GROUP / 16 {
                        // Looked up one vector ahead: the multiplications of this one would fill the scheduler.
                        if vector == GROUP / 16 - 1 {
                            let next = groups.min(group + 2) - 1;
                            block = BlockF32::load::<ROUND>(codes.add(next), scales.add(next), values, part);
                        }
                        let next = block.weights((vector + 1) % (GROUP / 16));
                        for m in 0..M {
                            let x = x.data.as_ptr().add(m * x.stride + group * GROUP + 16 * vector);
                            let x = _mm512_loadu_ps(x);
                            for pair in 0..PAIRS {
                                for row in 0..2 {
                                    acc[m][pair][row] = _mm512_fmadd_ps(weights[pair][row], x, acc[m][pair][row]);
                                }
                            }
                        }
                        weights = next;
                    }
                }
                store_acc(acc, out);
            }
        }
    }
}

/// # Safety
/// The operands as `check_forward` wants them, for `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn forward_bf16_of<const M: usize, const PAIRS: usize>(
    tiles: &Tiles<'_>,
    table: &Table,
    x: &Rows<'_, u16>,
    acc: &mut [f32],
) {
    let groups = tiles.groups.len;
    // SAFETY: as in `forward_f32_of`; the vector types that are transmuted have 64 bytes and no invalid values.
    unsafe {
        let bh = |vector: __m512i| core::mem::transmute::<__m512i, __m512bh>(vector);
        let values = _mm512_loadu_ps(table.values.as_ptr());
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 16);
            for part in (0..2).step_by(PAIRS) {
                let out = out.add(2 * part * 16);
                let mut acc = load_acc::<M, PAIRS>(out, tiles.groups.start);
                let mut block = BlockBf16::<PAIRS>::load(codes, scales, values, part);
                let mut weights = block.weights(0);
                for group in 0..groups {
                    prefetch::<PAIRS>(codes, group + AHEAD, part);
                    for vector in 0..GROUP / 32 {
                        if vector == GROUP / 32 - 1 {
                            let next = groups.min(group + 2) - 1;
                            block = BlockBf16::load(codes.add(next), scales.add(next), values, part);
                        }
                        let next = block.weights((vector + 1) % (GROUP / 32));
                        for m in 0..M {
                            let x = x.data.as_ptr().add(m * x.stride + group * GROUP + 32 * vector);
                            let x = bh(_mm512_loadu_si512(x.cast()));
                            for pair in 0..PAIRS {
                                for row in 0..2 {
                                    acc[m][pair][row] = _mm512_dpbf16_ps(acc[m][pair][row], bh(weights[pair][row]), x);
                                }
                            }
                        }
                        weights = next;
                    }
                }
                store_acc(acc, out);
            }
        }
    }
}

/// # Safety
/// The operands as `check_int8` wants them, for `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn forward_int8_of<const M: usize, const PAIRS: usize>(
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
        let values = _mm512_broadcast_i32x4(_mm_loadu_si128(table.codes.as_ptr().cast()));
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (tiles.codes.as_ptr().add(at), tiles.scales.as_ptr().add(at));
            let out = acc.as_mut_ptr().add(tile * M * TILE_ROWS * 16);
            for m in 0..M {
                for group in 0..groups {
                    let scale = _mm_set1_ps(*x.scales.as_ptr().add(m * x.stride + group));
                    let scale = _mm_mul_ps(_mm_loadu_ps((*scales.add(group)).as_ptr()), scale);
                    _mm_storeu_ps(scratch.as_mut_ptr().add(m * groups + group).cast(), scale);
                }
            }
            for part in (0..2).step_by(PAIRS) {
                let out = out.add(2 * part * 16);
                let mut acc = load_acc::<M, PAIRS>(out, tiles.groups.start);
                for group in 0..groups {
                    let codes = &(*codes.add(group)).0;
                    let mut weights = [[values; 2]; PAIRS];
                    for pair in 0..PAIRS {
                        let codes = _mm512_loadu_si512(codes[part + pair].as_ptr().cast());
                        weights[pair] = [
                            _mm512_permutexvar_epi8(codes, values),
                            _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(codes), values),
                        ];
                    }
                    for m in 0..M {
                        let x = &*x.groups.as_ptr().add(m * x.stride + group);
                        let start = _mm512_loadu_si512(x.start.as_ptr().cast());
                        let x = _mm512_loadu_si512(x.codes.as_ptr().cast());
                        let scale = &*scratch.as_ptr().add(m * groups + group);
                        for pair in 0..PAIRS {
                            for row in 0..2 {
                                let dot = _mm512_dpbusd_epi32(start, weights[pair][row], x);
                                let scale = _mm512_set1_ps(scale[2 * (part + pair) + row]);
                                acc[m][pair][row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[m][pair][row]);
                            }
                        }
                    }
                }
                store_acc(acc, out);
            }
        }
    }
}

/// As [`scalar::quantize`], with the same bits.
fn quantize(x: &[f32; GROUP], out: &mut Int8Group) -> f32 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner(x: &[f32; GROUP], out: &mut Int8Group) -> f32 {
        // SAFETY: 64 numbers are 4 vectors of 16; the codes and sums are one vector each.
        unsafe {
            let x = [0, 16, 32, 48].map(|first| _mm512_loadu_ps(x.as_ptr().add(first)));
            // NaN and both infinities.
            let bad = x.map(|x| _mm512_fpclass_ps_mask::<0b1001_1001>(x));
            let sizes = x.map(|x| _mm512_abs_ps(x));
            let largest = _mm512_max_ps(_mm512_max_ps(sizes[0], sizes[1]), _mm512_max_ps(sizes[2], sizes[3]));
            let largest = _mm512_reduce_max_ps(largest);
            let inverse = if largest >= f32::MIN_POSITIVE * 128.0 { 127.0 / largest } else { 0.0 };
            for (index, x) in x.into_iter().enumerate() {
                let codes = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
                _mm_storeu_si128(out.codes.as_mut_ptr().add(16 * index).cast(), _mm512_cvtepi32_epi8(codes));
            }
            let codes = _mm512_loadu_si512(out.codes.as_ptr().cast());
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), codes);
            let start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sums));
            _mm512_storeu_si512(out.start.as_mut_ptr().cast(), start);
            if bad != [0; 4] {
                f32::NAN
            } else if inverse == 0.0 {
                0.0
            } else {
                largest / 127.0
            }
        }
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(x, out) }
}

fn tile_rows(rows: &[&[u8]; TILE_ROWS], out: &mut [Group]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
    fn inner(rows: &[&[u8]; TILE_ROWS], out: &mut [Group]) {
        scalar::tile_rows(rows, out);
    }
    // SAFETY: as in `forward_f32`.
    unsafe { inner(rows, out) }
}

fn untile_rows(groups: &[Group], rows: &mut [&mut [u8]; TILE_ROWS]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
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
            panel_f32_of::<true>(tiles, table, out);
        } else {
            panel_f32_of::<false>(tiles, table, out);
        }
    }
}

/// # Safety
/// The operands as `check_panel` wants them, with 64 elements a group.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn panel_f32_of<const ROUND: bool>(tiles: &Tiles<'_>, table: &Table, out: &mut [f32]) {
    let columns = tiles.groups.len * GROUP;
    // SAFETY: `check_panel`: the groups worked on lie in `codes` and `scales`, and 4 rows of `columns` numbers a tile in `out`.
    unsafe {
        let values = _mm512_loadu_ps(table.values.as_ptr());
        for tile in 0..tiles.num_tiles() {
            for group in 0..tiles.groups.len {
                let at = tile * tiles.groups_per_row + tiles.groups.start + group;
                let (codes, scales) = (&(*tiles.codes.as_ptr().add(at)).0, &*tiles.scales.as_ptr().add(at));
                let out = out.as_mut_ptr().add(tile * TILE_ROWS * columns + group * GROUP);
                for pair in 0..2 {
                    let tables = [0, 1].map(|row| block_table::<ROUND>(values, scales[2 * pair + row]));
                    for vector in 0..GROUP / 16 {
                        let codes = codes[pair].as_ptr().add(16 * vector);
                        let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
                        let out = out.add(2 * pair * columns + 16 * vector);
                        _mm512_storeu_ps(out, _mm512_permutexvar_ps(codes, tables[0]));
                        let codes = _mm512_srli_epi32::<4>(codes);
                        _mm512_storeu_ps(out.add(columns), _mm512_permutexvar_ps(codes, tables[1]));
                    }
                }
            }
        }
    }
}

/// The rounded table as 16-bit numbers, twice, without AVX-512 BF16: subnormal numbers are kept.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn block_table_u16(values: __m512, absmax: f32) -> __m512i {
    let bits = _mm512_castps_si512(block_table::<true>(values, absmax));
    let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
    _mm512_broadcast_i64x4(half)
}

fn panel_bf16(tiles: &Tiles<'_>, table: &Table, out: &mut [u32]) {
    check_panel(tiles, GROUP / 2, out.len());
    // SAFETY: as in `forward_f32`, with `check_panel`.
    unsafe { panel_bf16_of(tiles, table, out) }
}

/// # Safety
/// The operands as `check_panel` wants them, with 32 elements a group.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn panel_bf16_of(tiles: &Tiles<'_>, table: &Table, out: &mut [u32]) {
    let columns = tiles.groups.len * GROUP / 2;
    // SAFETY: as in `panel_f32_of`; two weights an element.
    unsafe {
        let values = _mm512_loadu_ps(table.values.as_ptr());
        for tile in 0..tiles.num_tiles() {
            for group in 0..tiles.groups.len {
                let at = tile * tiles.groups_per_row + tiles.groups.start + group;
                let (codes, scales) = (&(*tiles.codes.as_ptr().add(at)).0, &*tiles.scales.as_ptr().add(at));
                let out = out.as_mut_ptr().add(tile * TILE_ROWS * columns + group * GROUP / 2);
                for pair in 0..2 {
                    let tables = [0, 1].map(|row| block_table_u16(values, scales[2 * pair + row]));
                    for vector in 0..GROUP / 32 {
                        let codes = codes[pair].as_ptr().add(32 * vector);
                        let codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.cast()));
                        let out = out.add(2 * pair * columns + 16 * vector);
                        _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(codes, tables[0]));
                        let codes = _mm512_srli_epi16::<4>(codes);
                        _mm512_storeu_si512(out.add(columns).cast(), _mm512_permutexvar_epi16(codes, tables[1]));
                    }
                }
            }
        }
    }
}

fn panel_row_pairs(tiles: &Tiles<'_>, table: &Table, out: &mut [[u32; GROUP]]) {
    check_panel(tiles, GROUP, 2 * out.as_flattened().len());
    assert!(tiles.groups.len <= 1, "one group at a time");
    // SAFETY: as in `forward_f32`, with `check_panel`.
    unsafe { panel_row_pairs_of(tiles, table, out) }
}

/// The two rows of a pair lie in one vector of double words: both are looked up there, 16 columns at a time.
///
/// # Safety
/// The operands as `check_panel` wants them, with one group and 64 elements for two rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn panel_row_pairs_of(tiles: &Tiles<'_>, table: &Table, out: &mut [[u32; GROUP]]) {
    if tiles.groups.len == 0 {
        return;
    }
    // SAFETY: `check_panel`: the group of each tile lies in `codes` and `scales`, and two elements of 64 columns a tile in `out`.
    unsafe {
        let values = _mm512_loadu_ps(table.values.as_ptr());
        let second_row = _mm512_set1_epi32(0x10_0000);
        for tile in 0..tiles.num_tiles() {
            let at = tile * tiles.groups_per_row + tiles.groups.start;
            let (codes, scales) = (&(*tiles.codes.as_ptr().add(at)).0, &*tiles.scales.as_ptr().add(at));
            for pair in 0..2 {
                // The table of the first row in words 0 to 15, that of the second in words 16 to 31.
                let [first, second] = [0, 1].map(|row| {
                    let bits = _mm512_castps_si512(block_table::<true>(values, scales[2 * pair + row]));
                    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits))
                });
                let table = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
                let out = out.as_mut_ptr().add(2 * tile + pair).cast::<u32>();
                for vector in 0..GROUP / 16 {
                    let codes = codes[pair].as_ptr().add(16 * vector);
                    let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
                    // Low word: the first row's code. High word: the second row's, and 16.
                    let low = _mm512_and_si512(codes, _mm512_set1_epi32(0xf));
                    let high = _mm512_and_si512(_mm512_slli_epi32::<12>(codes), _mm512_set1_epi32(0xf_0000));
                    let index = _mm512_or_si512(_mm512_or_si512(low, high), second_row);
                    _mm512_storeu_si512(out.add(16 * vector).cast(), _mm512_permutexvar_epi16(index, table));
                }
            }
        }
    }
}
