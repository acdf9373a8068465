//! Lookup products with AVX2.
//!
//! ```text
//! f32, half a line:       for each byte r of the double words, for each part (bits 0-2, 3-5, 6-7) of it:
//!                             acc[r] += permute(table[part], half >> (8r + 3·part))         8 outputs × 3 or 2 inputs
//! integers, half a line:  entries = shuffle(table[0], low nibbles) + shuffle(table[1], high nibbles), for each plane; then as with AVX-512
//! ```
//! The permute of 8 numbers reads 3 bits of a lane, so bytes are cut into 3 + 3 + 2 bits; the last table stands there twice, since the third bit
//! it sees belongs to the next byte.

use core::arch::x86_64::*;

use super::{
    GROUP, Integers, Kernels, LINE, ONE_BIAS, Out, Rows, Sums, TWO_BIAS, Tiles, check_build_integers, check_forward,
    check_integers, scalar, steps_of,
};

const F32_LEN: usize = 24;

pub(super) static KERNELS: Kernels = Kernels {
    f32_len: F32_LEN,
    build_f32,
    forward_f32,
    build_integers,
    forward_one,
    forward_two,
    transpose: scalar::transpose,
};

fn build_f32(x: &[f32], tables: &mut [f32]) {
    for (x, tables) in x.chunks_exact(LINE).zip(tables.chunks_exact_mut(F32_LEN)) {
        for (index, entries) in tables.chunks_exact_mut(8).enumerate() {
            let at = 3 * index;
            let third = x.get(at + 2).copied().unwrap_or(0.0);
            for (pattern, entry) in entries.iter_mut().enumerate() {
                let signed = |bit: usize, value: f32| if pattern >> bit & 1 == 1 { value } else { -value };
                *entry = (signed(0, x[at]) + signed(1, x[at + 1])) + if index < 2 { signed(2, third) } else { 0.0 };
            }
        }
    }
}

/// Calls `$function::<M, ..>` for each tile and blocks of 2 rows.
macro_rules! by_blocks {
    ($out:ident, $count:expr, $function:ident $(, $constant:expr)*; ($($argument:expr),*)) => {
        for row in (0..$out.rows).step_by(2) {
            for tile in 0..$count {
                match $out.rows - row {
                    1 => $function::<1 $(, $constant)*>($($argument,)* row, tile),
                    _ => $function::<2 $(, $constant)*>($($argument,)* row, tile),
                }
            }
        }
    };
}

fn forward_f32(tiles: &Tiles<'_>, tables: &Rows<'_, f32>, scales: &Rows<'_, Sums>, out: &mut Out<'_>) {
    check_forward(tiles, tables, F32_LEN, scales, out);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_forward` has seen to the bounds.
    unsafe {
        by_blocks!(out, tiles.count, forward_f32_of; (tiles, tables, scales, out));
    }
}

/// # Safety
/// Bounds as `check_forward` has them, `M` rows from `row` on.
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_f32_of<const M: usize>(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
    row: usize,
    tile: usize,
) {
    for half in 0..2 {
        let mut acc = [[_mm256_setzero_ps(); 4]; M];
        for (index, line) in tiles.tile(tile).iter().enumerate() {
            // SAFETY: a line has 64 bytes; the caller's promise for the tables.
            unsafe {
                let bytes = _mm256_load_si256(line.0.as_ptr().add(32 * half).cast());
                let table: [[__m256; 3]; M] = core::array::from_fn(|m| {
                    let at = tables.data.as_ptr().add((row + m) * tables.stride + index * F32_LEN);
                    [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)), _mm256_loadu_ps(at.add(16))]
                });
                macro_rules! part {
                    ($byte:literal, $part:literal) => {
                        let picked = _mm256_srli_epi32::<{ 8 * $byte + 3 * $part }>(bytes);
                        for m in 0..M {
                            let entries = _mm256_permutevar8x32_ps(table[m][$part], picked);
                            acc[m][$byte] = _mm256_add_ps(acc[m][$byte], entries);
                        }
                    };
                }
                part!(0, 0);
                part!(1, 0);
                part!(2, 0);
                part!(3, 0);
                part!(0, 1);
                part!(1, 1);
                part!(2, 1);
                part!(3, 1);
                part!(0, 2);
                part!(1, 2);
                part!(2, 2);
                part!(3, 2);
            }
        }
        for (m, acc) in acc.into_iter().enumerate() {
            for (byte, acc) in acc.into_iter().enumerate() {
                let output = 16 * byte + 8 * half;
                // SAFETY: 64 sums a row and tile, and 64 scales a tile if any.
                unsafe {
                    let at = out.sums.as_mut_ptr().add(tile * out.stride + row + m).cast::<f32>().add(output);
                    let old = _mm256_loadu_ps(at);
                    let new = if scales.data.is_empty() {
                        _mm256_add_ps(old, acc)
                    } else {
                        let scale = scales.data.as_ptr().add(tile * scales.stride).cast::<f32>().add(output);
                        _mm256_fmadd_ps(acc, _mm256_loadu_ps(scale), old)
                    };
                    _mm256_storeu_ps(at, new);
                }
            }
        }
    }
}

fn build_integers(kind: Integers, x: &[f32], tables: &mut [u8], units: &mut [f32]) {
    check_build_integers(kind, x, tables, units);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_build_integers` has seen to the lengths.
    unsafe { build_integers_of(kind, x, tables, units) }
}

/// # Safety
/// Lengths as `check_build_integers` has them.
#[target_feature(enable = "avx2,fma")]
unsafe fn build_integers_of(kind: Integers, x: &[f32], tables: &mut [u8], units: &mut [f32]) {
    let groups = x.chunks(GROUP * LINE).zip(tables.chunks_mut(GROUP * kind.line_bytes()));
    for ((x, tables), unit) in groups.zip(units) {
        let mut largest = _mm256_setzero_si256();
        for x in x.chunks_exact(LINE) {
            // SAFETY: 8 numbers.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            let mut values = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX)));
            if kind != Integers::Int8 {
                values = _mm256_add_ps(values, _mm256_permute_ps::<0b10_11_00_01>(values));
                values = _mm256_add_ps(values, _mm256_permute_ps::<0b01_00_11_10>(values));
            }
            // Numbers that are not negative order as their bits do, what is no number above infinity.
            largest = _mm256_max_epi32(largest, _mm256_castps_si256(values));
        }
        let mut lanes = [0u32; 8];
        // SAFETY: 8 numbers.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), largest) };
        let steps;
        (steps, *unit) = steps_of(kind, f32::from_bits(lanes.into_iter().max().unwrap_or(0)));
        let is_zero = steps == 0.0;
        let (steps, bias) = (_mm256_set1_ps(steps), _mm256_set1_epi32(kind.bias()));
        for (x, table) in x.chunks_exact(LINE).zip(tables.chunks_exact_mut(kind.line_bytes())) {
            // SAFETY: 8 numbers.
            let mut x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            if is_zero {
                x = _mm256_setzero_ps();
            } else if kind == Integers::Int8 {
                x = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(x, steps));
            }
            let mut numbers = [0.0; LINE];
            // SAFETY: 8 numbers.
            unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), x) };
            for nibble in 0..2 {
                let mut entries = [_mm256_setzero_si256(); 2];
                for (half, entries) in entries.iter_mut().enumerate() {
                    let mut sums = sums(&numbers[4 * nibble..4 * nibble + 4], half == 1);
                    if kind != Integers::Int8 {
                        sums = _mm256_mul_ps(sums, steps);
                    }
                    *entries = _mm256_add_epi32(_mm256_cvtps_epi32(sums), bias);
                }
                // SAFETY: 16 bytes of each plane.
                unsafe {
                    let to = table.as_mut_ptr().add(16 * nibble);
                    if kind == Integers::One {
                        _mm_storeu_si128(to.cast(), bytes(entries));
                    } else {
                        let low = _mm256_set1_epi32(127);
                        _mm_storeu_si128(to.cast(), bytes(entries.map(|entries| _mm256_and_si256(entries, low))));
                        let high = entries.map(|entries| _mm256_srli_epi32::<7>(entries));
                        _mm_storeu_si128(to.add(32).cast(), bytes(high));
                    }
                }
            }
        }
    }
}

/// 8 of the 16 sums of 4 numbers, those with the fourth added or taken off; as the scalar `sums`.
#[inline]
#[target_feature(enable = "avx2")]
fn sums(x: &[f32], is_fourth_added: bool) -> __m256 {
    let signed = |at: usize, added: [i32; 8]| {
        let flips = added.map(|added| if added == 1 { 0 } else { i32::MIN });
        let [a, b, c, d, e, f, g, h] = flips;
        let flips = _mm256_castsi256_ps(_mm256_setr_epi32(a, b, c, d, e, f, g, h));
        _mm256_xor_ps(_mm256_set1_ps(x[at]), flips)
    };
    let low = _mm256_add_ps(signed(0, [0, 1, 0, 1, 0, 1, 0, 1]), signed(1, [0, 0, 1, 1, 0, 0, 1, 1]));
    let fourth = _mm256_set1_ps(if is_fourth_added { x[3] } else { -x[3] });
    _mm256_add_ps(low, _mm256_add_ps(signed(2, [0, 0, 0, 0, 1, 1, 1, 1]), fourth))
}

/// 16 numbers under 256 as bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes([first, second]: [__m256i; 2]) -> __m128i {
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, second));
    _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
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
        by_blocks!(out, tiles.count, forward_integers, 1; (tiles, tables, units, scales, out));
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
        by_blocks!(out, tiles.count, forward_integers, 2; (tiles, tables, units, scales, out));
    }
}

/// # Safety
/// Bounds as `check_integers` has them, `M` rows from `row` on.
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_integers<const M: usize, const PLANES: usize>(
    tiles: &Tiles<'_>,
    tables: &Rows<'_, u8>,
    units: &Rows<'_, f32>,
    scales: &Rows<'_, Sums>,
    out: &mut Out<'_>,
    row: usize,
    tile: usize,
) {
    let nibble = _mm256_set1_epi8(15);
    for (group, lines) in tiles.tile(tile).chunks(GROUP).enumerate() {
        // SAFETY: the caller's promise: tables of this group follow in each row.
        let start = unsafe { tables.data.as_ptr().add(row * tables.stride + group * GROUP * 32 * PLANES) };
        for half in 0..2 {
            let mut all = [[_mm256_setzero_si256(); PLANES]; M];
            let mut odd = [[_mm256_setzero_si256(); PLANES]; M];
            for (index, line) in lines.iter().enumerate() {
                // SAFETY: a line has 64 bytes, its tables `32 · PLANES`.
                unsafe {
                    let bytes = _mm256_load_si256(line.0.as_ptr().add(32 * half).cast());
                    let low = _mm256_and_si256(bytes, nibble);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                    for m in 0..M {
                        for plane in 0..PLANES {
                            let table: *const __m128i =
                                start.add(m * tables.stride + 32 * (PLANES * index + plane)).cast();
                            let first = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
                            let second = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.add(1)));
                            let entries =
                                _mm256_add_epi8(_mm256_shuffle_epi8(first, low), _mm256_shuffle_epi8(second, high));
                            all[m][plane] = _mm256_add_epi16(all[m][plane], entries);
                            odd[m][plane] = _mm256_add_epi16(odd[m][plane], _mm256_srli_epi16::<8>(entries));
                        }
                    }
                }
            }
            for m in 0..M {
                // SAFETY: the caller's promise: a unit for each group and row, scales for each group if any, 64 sums a row.
                unsafe {
                    let values = values::<PLANES>(all[m], odd[m], lines.len());
                    let unit = _mm256_set1_ps(*units.data.get_unchecked((row + m) * units.stride + group));
                    let to = out.sums.as_mut_ptr().add(tile * out.stride + row + m).cast::<f32>();
                    for (byte, value) in values.into_iter().enumerate() {
                        let output = 16 * byte + 8 * half;
                        let mut value = _mm256_mul_ps(_mm256_cvtepi32_ps(value), unit);
                        if !scales.data.is_empty() {
                            let scale = scales.data.as_ptr().add(tile * scales.stride + group).cast::<f32>();
                            value = _mm256_mul_ps(value, _mm256_loadu_ps(scale.add(output)));
                        }
                        let to = to.add(output);
                        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), value));
                    }
                }
            }
        }
    }
}

/// The sums of a group without their bias, by byte of the double words.
#[inline]
#[target_feature(enable = "avx2")]
fn values<const PLANES: usize>(all: [__m256i; PLANES], odd: [__m256i; PLANES], num_lines: usize) -> [__m256i; 4] {
    let even: [__m256i; PLANES] =
        core::array::from_fn(|plane| _mm256_sub_epi16(all[plane], _mm256_slli_epi16::<8>(odd[plane])));
    let bias = 2 * num_lines as i32 * if PLANES == 1 { ONE_BIAS } else { TWO_BIAS };
    let bias = _mm256_set1_epi32(-bias);
    let low = _mm256_set1_epi32(0xffff);
    let add = |planes: [__m256i; PLANES]| {
        let mut sum = _mm256_add_epi32(bias, planes[0]);
        if PLANES == 2 {
            sum = _mm256_add_epi32(sum, _mm256_slli_epi32::<7>(planes[PLANES - 1]));
        }
        sum
    };
    let low_half = |sums: [__m256i; PLANES]| add(sums.map(|sums| _mm256_and_si256(sums, low)));
    let high_half = |sums: [__m256i; PLANES]| add(sums.map(|sums| _mm256_srli_epi32::<16>(sums)));
    [low_half(even), low_half(odd), high_half(even), high_half(odd)]
}
