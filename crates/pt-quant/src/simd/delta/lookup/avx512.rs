//! Lookup products with AVX-512 (F, BW, DQ, VL, VBMI, VNNI).
//!
//! ```text
//! f32, a line:       for each byte r of the double words, for each nibble j of it:
//!                        acc[r] += permute(table[j], line >> (8r + 4j))                16 outputs × 4 inputs
//! integers, a line:  entries = shuffle(table[0], low nibbles) + shuffle(table[1], high nibbles)   64 outputs × 8 inputs, for each plane
//!                    all += entries (as 16-bit numbers); odd += upper bytes            even = all - (odd << 8), at the end of a group
//! ```
//! The permute reads the lowest 4 bits of a lane, so the shifts need no masks. Bytes of 7 bits can be added once without a carry; 16-bit sums hold
//! a group. Planes are put together by a dot product with (1, 128), and the bias is what the dot product starts from.

use core::arch::x86_64::*;

use super::{
    GROUP, Integers, Kernels, LINE, Line, ONE_BIAS, Out, Rows, Sums, TWO_BIAS, Tiles, check_build_integers,
    check_forward, check_integers, steps_of,
};

const F32_LEN: usize = 32;

/// Lines that are asked for ahead, into the L2 cache, when a single row reads them: the L1 cache has too few misses under way at once for memory.
const AHEAD: usize = 64;

pub(super) static KERNELS: Kernels =
    Kernels { f32_len: F32_LEN, build_f32, forward_f32, build_integers, forward_one, forward_two, transpose };

/// The signs of the numbers in a table of 16 sums, and what they multiply.
#[derive(Clone, Copy)]
struct Signs([__m512; 4]);

impl Signs {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        let one = _mm512_set1_ps(1.0);
        let minus = _mm512_set1_ps(-1.0);
        Self([0xaaaa, 0xcccc, 0xf0f0, 0xff00].map(|added| _mm512_mask_blend_ps(added, minus, one)))
    }

    /// As the scalar `sums`: products with ±1 are exact, so each step rounds once.
    ///
    /// # Safety
    /// 4 numbers readable at `x`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn sums(self, x: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        let x = unsafe { [0, 1, 2, 3].map(|at| _mm512_set1_ps(*x.add(at))) };
        let low = _mm512_fmadd_ps(x[1], self.0[1], _mm512_mul_ps(x[0], self.0[0]));
        let high = _mm512_fmadd_ps(x[3], self.0[3], _mm512_mul_ps(x[2], self.0[2]));
        _mm512_add_ps(low, high)
    }
}

fn build_f32(x: &[f32], tables: &mut [f32]) {
    assert_eq!(tables.len(), x.len() / LINE * F32_LEN, "tables for all lines");
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; tables of 16 for each 4 numbers.
    unsafe { build_f32_of(x, tables) }
}

/// # Safety
/// 16 entries for each 4 numbers.
#[target_feature(enable = "avx512f")]
unsafe fn build_f32_of(x: &[f32], tables: &mut [f32]) {
    let signs = Signs::new();
    for (x, table) in x.chunks_exact(4).zip(tables.chunks_exact_mut(16)) {
        // SAFETY: 4 numbers and 16 entries.
        unsafe { _mm512_storeu_ps(table.as_mut_ptr(), signs.sums(x.as_ptr())) };
    }
}

/// Calls `$function::<M, T, ..>` for blocks of at most `$rows` rows, and at most `$tiles` tiles of each, in that order: a block's tables stay in registers
/// or the L1 cache while tiles go by.
macro_rules! by_blocks {
    ($out:ident, $count:expr, [$rows:literal, $tiles:literal], $function:ident $(, $constant:expr)*; $arguments:tt) => {
        let mut row = 0;
        while row < $out.rows {
            let rows = ($out.rows - row).min($rows);
            let mut tile = 0;
            while tile < $count {
                let tiles = ($count - tile).min($tiles);
                by_blocks!(@call rows, tiles, row, tile, $function $(, $constant)*; $arguments);
                tile += tiles;
            }
            row += rows;
        }
    };
    (@call $rows:ident, $tiles:ident, $row:ident, $tile:ident, $function:ident $(, $constant:expr)*; ($($argument:expr),*)) => {
        match ($rows, $tiles) {
            (1, 1) => $function::<1, 1 $(, $constant)*>($($argument,)* $row, $tile),
            (1, 2) => $function::<1, 2 $(, $constant)*>($($argument,)* $row, $tile),
            (1, 3) => $function::<1, 3 $(, $constant)*>($($argument,)* $row, $tile),
            (1, 4) => $function::<1, 4 $(, $constant)*>($($argument,)* $row, $tile),
            (2, 1) => $function::<2, 1 $(, $constant)*>($($argument,)* $row, $tile),
            (2, 2) => $function::<2, 2 $(, $constant)*>($($argument,)* $row, $tile),
            (3, 1) => $function::<3, 1 $(, $constant)*>($($argument,)* $row, $tile),
            (3, 2) => $function::<3, 2 $(, $constant)*>($($argument,)* $row, $tile),
            (4, 1) => $function::<4, 1 $(, $constant)*>($($argument,)* $row, $tile),
            (4, 2) => $function::<4, 2 $(, $constant)*>($($argument,)* $row, $tile),
            (rows, tiles) => unreachable!("{rows} rows and {tiles} tiles"),
        }
    };
}

fn forward_f32(tiles: &Tiles<'_>, tables: &Rows<'_, f32>, scales: &Rows<'_, Sums>, out: &mut Out<'_>) {
    check_forward(tiles, tables, F32_LEN, scales, out);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_forward` has seen to the bounds.
    unsafe {
        by_blocks!(out, tiles.count, [4, 1], forward_f32_of; (tiles, tables, scales, out));
    }
}

/// # Safety
/// Bounds as `check_forward` has them, `M` rows from `row` on and one tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn forward_f32_of<const M: usize, const T: usize>(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
    row: usize,
    tile: usize,
) {
    let one = _mm512_set1_ps(1.0);
    let mut acc = [[_mm512_setzero_ps(); 4]; M];
    // SAFETY: the caller's promise.
    let (lines, start) =
        unsafe { (tiles.lines.as_ptr().add(tile * tiles.stride), tables.data.as_ptr().add(row * tables.stride)) };
    for index in 0..tiles.len {
        // SAFETY: `len` lines of 64 bytes, and tables of each for all rows.
        unsafe {
            if M == 1 {
                _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(index + AHEAD).cast());
            }
            let bytes = _mm512_load_si512(lines.add(index).cast());
            let table: [[__m512; 2]; M] = core::array::from_fn(|m| {
                let at = start.add(m * tables.stride + index * F32_LEN);
                [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))]
            });
            macro_rules! nibble {
                ($byte:literal, $nibble:literal) => {
                    let picked = _mm512_srli_epi32::<{ 8 * $byte + 4 * $nibble }>(bytes);
                    for m in 0..M {
                        let entries = _mm512_permutexvar_ps(picked, table[m][$nibble]);
                        // The same sum either way: additions and multiplications have different units.
                        acc[m][$byte] = if $byte % 2 == 0 {
                            _mm512_add_ps(acc[m][$byte], entries)
                        } else {
                            _mm512_fmadd_ps(entries, one, acc[m][$byte])
                        };
                    }
                };
            }
            nibble!(0, 0);
            nibble!(1, 0);
            nibble!(2, 0);
            nibble!(3, 0);
            nibble!(0, 1);
            nibble!(1, 1);
            nibble!(2, 1);
            nibble!(3, 1);
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        for (quarter, acc) in acc.into_iter().enumerate() {
            // SAFETY: 64 sums a row and tile, and 64 scales a tile if any.
            unsafe {
                let at = out.sums.as_mut_ptr().add(tile * out.stride + row + m).cast::<f32>().add(16 * quarter);
                let old = _mm512_loadu_ps(at);
                let new = if scales.data.is_empty() {
                    _mm512_add_ps(old, acc)
                } else {
                    let scale = scales.data.as_ptr().add(tile * scales.stride).cast::<f32>().add(16 * quarter);
                    _mm512_fmadd_ps(acc, _mm512_loadu_ps(scale), old)
                };
                _mm512_storeu_ps(at, new);
            }
        }
    }
}

fn build_integers(kind: Integers, x: &[f32], tables: &mut [u8], units: &mut [f32]) {
    check_build_integers(kind, x, tables, units);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_build_integers` has seen to the lengths.
    unsafe {
        match kind {
            Integers::One => build_one(x, tables, units),
            Integers::Two => build_two::<false>(x, tables, units),
            Integers::Int8 => build_two::<true>(x, tables, units),
        }
    }
}

/// The largest of the sums of 4 magnitudes, or of the magnitudes if `SINGLE`; no number if any is none.
///
/// # Safety
/// `x` is whole lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn largest<const SINGLE: bool>(x: &[f32]) -> f32 {
    let mut largest = _mm512_setzero_si512();
    for x in x.chunks(16) {
        let mask = if x.len() == 16 { u16::MAX } else { 0xff };
        // SAFETY: 16 numbers, or the 8 of a last line.
        let mut values = unsafe { _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x.as_ptr())) };
        if !SINGLE {
            values = _mm512_add_ps(values, _mm512_permute_ps::<0b10_11_00_01>(values));
            values = _mm512_add_ps(values, _mm512_permute_ps::<0b01_00_11_10>(values));
        }
        // Numbers that are not negative order as their bits do, what is no number above infinity.
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(values));
    }
    f32::from_bits(_mm512_reduce_max_epu32(largest))
}

/// # Safety
/// Lengths as `check_build_integers` has them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn build_one(x: &[f32], tables: &mut [u8], units: &mut [f32]) {
    let signs = Signs::new();
    let groups = x.chunks(GROUP * LINE).zip(tables.chunks_mut(GROUP * Integers::One.line_bytes()));
    for ((x, tables), unit) in groups.zip(units) {
        let steps;
        // SAFETY: groups are whole lines.
        (steps, *unit) = steps_of(Integers::One, unsafe { largest::<false>(x) });
        if steps == 0.0 {
            tables.fill(ONE_BIAS as u8);
            continue;
        }
        let (steps, bias) = (_mm512_set1_ps(steps), _mm512_set1_epi32(ONE_BIAS));
        for (x, table) in x.chunks_exact(4).zip(tables.chunks_exact_mut(16)) {
            // SAFETY: 4 numbers and 16 bytes.
            unsafe {
                let entries = _mm512_cvtps_epi32(_mm512_mul_ps(signs.sums(x.as_ptr()), steps));
                let bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(entries, bias));
                _mm_storeu_si128(table.as_mut_ptr().cast(), bytes);
            }
        }
    }
}

/// # Safety
/// Lengths as `check_build_integers` has them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn build_two<const INT8: bool>(x: &[f32], tables: &mut [u8], units: &mut [f32]) {
    let kind = if INT8 { Integers::Int8 } else { Integers::Two };
    let signs = Signs::new();
    let groups = x.chunks(GROUP * LINE).zip(tables.chunks_mut(GROUP * kind.line_bytes()));
    for ((x, tables), unit) in groups.zip(units) {
        let steps;
        // SAFETY: groups are whole lines.
        (steps, *unit) = steps_of(kind, unsafe { largest::<INT8>(x) });
        let mut rounded = [0.0; GROUP * LINE];
        let (mut x, mut steps) = (x, _mm512_set1_ps(steps));
        if INT8 || *unit == 0.0 || unit.is_nan() {
            // Zero times what is no number is not zero: such groups have entries of zero, and a unit that tells.
            let keep = if *unit == 0.0 || unit.is_nan() { 0 } else { u8::MAX };
            let steps_of_8 = _mm512_castps512_ps256(steps);
            for (rounded, x) in rounded.chunks_exact_mut(8).zip(x.chunks_exact(8)) {
                // SAFETY: 8 numbers each.
                unsafe {
                    let scaled = _mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), steps_of_8);
                    let whole = _mm256_maskz_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(keep, scaled);
                    _mm256_storeu_ps(rounded.as_mut_ptr(), whole);
                }
            }
            x = &rounded[..x.len()];
            steps = _mm512_set1_ps(1.0);
        }
        let (bias, low) = (_mm512_set1_epi32(TWO_BIAS), _mm512_set1_epi32(127));
        for (x, table) in x.chunks_exact(LINE).zip(tables.chunks_exact_mut(kind.line_bytes())) {
            for nibble in 0..2 {
                // SAFETY: 8 numbers and 64 bytes.
                unsafe {
                    let sums = _mm512_mul_ps(signs.sums(x.as_ptr().add(4 * nibble)), steps);
                    let entries = _mm512_add_epi32(_mm512_cvtps_epi32(sums), bias);
                    let to = table.as_mut_ptr().add(16 * nibble);
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_and_si512(entries, low)));
                    _mm_storeu_si128(to.add(32).cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<7>(entries)));
                }
            }
        }
    }
}

fn forward_one(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, u8>,
    units: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
) {
    check_integers(Integers::One, tiles, tables, units, scales, out);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_integers` has seen to the bounds.
    unsafe {
        if out.rows == 1 {
            by_blocks!(out, tiles.count, [1, 4], forward_integers, 1; (tiles, tables, units, scales, out));
        } else {
            by_blocks!(out, tiles.count, [4, 2], forward_integers, 1; (tiles, tables, units, scales, out));
        }
    }
}

fn forward_two(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, u8>,
    units: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
) {
    check_integers(Integers::Two, tiles, tables, units, scales, out);
    // SAFETY: as in `forward_one`.
    unsafe {
        if out.rows == 1 {
            by_blocks!(out, tiles.count, [1, 4], forward_integers, 2; (tiles, tables, units, scales, out));
        } else {
            by_blocks!(out, tiles.count, [2, 2], forward_integers, 2; (tiles, tables, units, scales, out));
        }
    }
}

/// # Safety
/// Bounds as `check_integers` has them, `M` rows from `row` on and `T` tiles from `tile` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn forward_integers<const M: usize, const T: usize, const PLANES: usize>(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, u8>,
    units: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
    row: usize,
    tile: usize,
) {
    let nibble = _mm512_set1_epi8(15);
    let odd_bytes = _mm512_set1_epi16(1 << 8);
    // SAFETY: the caller's promise.
    let (lines, start) =
        unsafe { (tiles.lines.as_ptr().add(tile * tiles.stride), tables.data.as_ptr().add(row * tables.stride)) };
    for group in 0..tiles.len.div_ceil(GROUP) {
        let mut all = [[[_mm512_setzero_si512(); PLANES]; T]; M];
        let mut odd = [[[_mm512_setzero_si512(); PLANES]; T]; M];
        let end = tiles.len.min((group + 1) * GROUP);
        for index in group * GROUP..end {
            // SAFETY: `len` lines of 64 bytes in each tile, and tables of `32 · PLANES` bytes a line in each row.
            unsafe {
                let nibbles: [[__m512i; 2]; T] = core::array::from_fn(|t| {
                    if M == 1 {
                        _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(t * tiles.stride + index + AHEAD).cast());
                    }
                    let bytes = _mm512_load_si512(lines.add(t * tiles.stride + index).cast());
                    [_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble)]
                });
                for m in 0..M {
                    for plane in 0..PLANES {
                        let table = start.add(m * tables.stride + 32 * (PLANES * index + plane)).cast();
                        let first = _mm512_broadcast_i32x4(_mm_loadu_si128(table));
                        let second = _mm512_broadcast_i32x4(_mm_loadu_si128(table.add(1)));
                        for t in 0..T {
                            let [low, high] = nibbles[t];
                            let entries =
                                _mm512_add_epi8(_mm512_shuffle_epi8(first, low), _mm512_shuffle_epi8(second, high));
                            all[m][t][plane] = _mm512_add_epi16(all[m][t][plane], entries);
                            // A multiplication by 1, for shifts have the unit of the shuffles.
                            let upper = _mm512_maddubs_epi16(entries, odd_bytes);
                            odd[m][t][plane] = _mm512_add_epi16(odd[m][t][plane], upper);
                        }
                    }
                }
            }
        }
        for m in 0..M {
            for t in 0..T {
                // SAFETY: the caller's promise: a unit for each group and row, scales for each group and tile if any, 64 sums a row and tile.
                unsafe {
                    let values = values::<PLANES>(all[m][t], odd[m][t], end - group * GROUP);
                    let unit = _mm512_set1_ps(*units.data.get_unchecked((row + m) * units.stride + group));
                    let to = out.sums.as_mut_ptr().add((tile + t) * out.stride + row + m).cast::<f32>();
                    for (quarter, value) in values.into_iter().enumerate() {
                        let mut value = _mm512_mul_ps(_mm512_cvtepi32_ps(value), unit);
                        if !scales.data.is_empty() {
                            let scale = scales.data.as_ptr().add((tile + t) * scales.stride + group);
                            value = _mm512_mul_ps(value, _mm512_loadu_ps(scale.cast::<f32>().add(16 * quarter)));
                        }
                        let to = to.add(16 * quarter);
                        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), value));
                    }
                }
            }
        }
    }
}

/// The sums of a group without their bias, 16 outputs a vector.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn values<const PLANES: usize>(all: [__m512i; PLANES], odd: [__m512i; PLANES], num_lines: usize) -> [__m512i; 4] {
    let even: [__m512i; PLANES] =
        core::array::from_fn(|plane| _mm512_sub_epi16(all[plane], _mm512_slli_epi16::<8>(odd[plane])));
    let bias = 2 * num_lines as i32 * if PLANES == 1 { ONE_BIAS } else { TWO_BIAS };
    let bias = _mm512_set1_epi32(-bias);
    if PLANES == 1 {
        let low = _mm512_set1_epi32(0xffff);
        let low_half = |sums| _mm512_add_epi32(_mm512_and_si512(sums, low), bias);
        let high_half = |sums| _mm512_add_epi32(_mm512_srli_epi32::<16>(sums), bias);
        [low_half(even[0]), low_half(odd[0]), high_half(even[0]), high_half(odd[0])]
    } else {
        let high_plane = PLANES - 1;
        let weights = _mm512_set1_epi32(1 | 128 << 16);
        let low_half = |sums: [__m512i; PLANES]| {
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, sums[0], _mm512_slli_epi32::<16>(sums[high_plane]));
            _mm512_dpwssd_epi32(bias, both, weights)
        };
        let high_half = |sums: [__m512i; PLANES]| {
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(sums[0]), sums[high_plane]);
            _mm512_dpwssd_epi32(bias, both, weights)
        };
        [low_half(even), low_half(odd), high_half(even), high_half(odd)]
    }
}

fn transpose(from: &[Line; 8], to: &mut [Line; 8]) {
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked.
    unsafe { transpose_lines(from, to) }
}

/// Octets of outputs are brought together, each of their 8 × 8 bits is transposed, and the bytes go to their positions.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn transpose_lines(from: &[Line; 8], to: &mut [Line; 8]) {
    /// Where the byte at a position comes from: input `o` of the tile is byte `o`.
    const ORDER: [u8; 64] = {
        let mut order = [0; 64];
        let mut at = 0;
        while at < 64 {
            order[at] = super::output_at(at) as u8;
            at += 1;
        }
        order
    };
    // SAFETY: lines and the order have 64 bytes each.
    unsafe {
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        let line: [__m512i; 8] = core::array::from_fn(|index| _mm512_load_si512(from[index].0.as_ptr().cast()));
        // 8 × 8 octets: pairs within 128 bits, then blocks of 128 bits twice.
        let pair: [[__m512i; 2]; 4] = core::array::from_fn(|index| {
            let (a, b) = (line[2 * index], line[2 * index + 1]);
            [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
        });
        for parity in 0..2 {
            let [a, b, c, d] = [pair[0][parity], pair[1][parity], pair[2][parity], pair[3][parity]];
            let (ab_even, ab_odd) =
                (_mm512_shuffle_i64x2::<0b10_00_10_00>(a, b), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b));
            let (cd_even, cd_odd) =
                (_mm512_shuffle_i64x2::<0b10_00_10_00>(c, d), _mm512_shuffle_i64x2::<0b11_01_11_01>(c, d));
            let octets = [
                _mm512_shuffle_i64x2::<0b10_00_10_00>(ab_even, cd_even),
                _mm512_shuffle_i64x2::<0b10_00_10_00>(ab_odd, cd_odd),
                _mm512_shuffle_i64x2::<0b11_01_11_01>(ab_even, cd_even),
                _mm512_shuffle_i64x2::<0b11_01_11_01>(ab_odd, cd_odd),
            ];
            for (block, octets) in octets.into_iter().enumerate() {
                let mut bits = octets;
                macro_rules! swap {
                    ($shift:literal, $mask:literal) => {
                        let moved = _mm512_xor_si512(bits, _mm512_srli_epi64::<$shift>(bits));
                        let moved = _mm512_and_si512(moved, _mm512_set1_epi64($mask));
                        bits = _mm512_ternarylogic_epi64::<0x96>(bits, moved, _mm512_slli_epi64::<$shift>(moved));
                    };
                }
                swap!(7, 0x00aa_00aa_00aa_00aa);
                swap!(14, 0x0000_cccc_0000_cccc);
                swap!(28, 0x0000_0000_f0f0_f0f0);
                let bytes = _mm512_permutexvar_epi8(order, bits);
                _mm512_store_si512(to[2 * block + parity].0.as_mut_ptr().cast(), bytes);
            }
        }
    }
}
