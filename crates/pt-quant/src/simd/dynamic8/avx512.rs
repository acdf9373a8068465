//! 8-bit dynamic numbers with AVX-512 (F, BW, DQ, VL, VBMI).
//!
//! ```text
//! quantize, 64 numbers:   v = |s|; decade by exponent and one comparison; rank ≈ v · A[decade] + B[decade], less half a step;
//!                         rank + 1 beyond threshold[rank]; code = 127 ± rank
//! dequantize, 64 numbers: look up each of the 4 bytes of a value in 256 entries, two permutes of 128 and a blend; interleave; times absmax
//! ```

use core::arch::x86_64::*;

use super::{INFINITE, Kernels, MIN_ABSMAX, cells, scalar};
use crate::DynamicMap;

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize };

fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], offset: f32, codes: &mut [u8], absmax: &mut [f32]) {
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked.
    unsafe {
        if map.is_signed() && block_size.is_multiple_of(64) {
            quantize_signed(map, block_size, input, offset, codes, absmax);
        } else {
            quantize_by_cells(map, block_size, input, offset, codes, absmax);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_by_cells(
    map: &DynamicMap,
    block_size: usize,
    input: &[f32],
    offset: f32,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    cells::quantize_inline(map, block_size, input, offset, codes, absmax);
}

/// Decades 0 to 6 end at these; decade d has 2^d values, evenly from a tenth of its end.
const ENDS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// By the lowest 5 bits of the exponent of a magnitude from 2^-24 on: the decade that the octave begins in, and where the next one begins.
fn octaves() -> ([u32; 32], [f32; 32]) {
    let (mut decades, mut ends) = ([0; 32], [f32::INFINITY; 32]);
    for exponent in 103u32..=127 {
        let (start, end) = (f32::from_bits(exponent << 23), f32::from_bits((exponent + 1) << 23));
        let decade = ENDS[..6].iter().filter(|&&end| end <= start).count();
        decades[(exponent & 31) as usize] = decade as u32;
        if ENDS[decade] < end && decade < 6 {
            ends[(exponent & 31) as usize] = ENDS[decade];
        }
    }
    (decades, ends)
}

/// The map of both signs. With x = 2^d + 2^d · (v / end - 0.1) / 0.9 in decade d, a magnitude v has x rounded down as its rank, the number of
/// thresholds below it, but for rounding errors and for x from 2^d to 2^d + 0.2 behind the end of a decade, where it is one less. So x - 0.5 rounded
/// down is the rank or one less, and one comparison decides.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL, VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
unsafe fn quantize_signed(
    map: &DynamicMap,
    block_size: usize,
    input: &[f32],
    offset: f32,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    let (decades, ends) = octaves();
    let mut slopes = [0.0f32; 16];
    let mut offsets = [0.0f32; 16];
    for (decade, end) in ENDS.into_iter().enumerate() {
        let count = (1 << decade) as f32;
        slopes[decade] = count / (0.9 * end);
        offsets[decade] = count - count / 9.0 - 0.5;
    }
    // Element e = 16j + 4L + i, which lies at byte 4 · (4L + i) + j, goes to byte 16L + 4j + i: interleaving then puts it in lane 4L + i of vector j.
    let order: [u8; 64] = core::array::from_fn(|to| {
        let (quarter, vector, lane) = (to / 16, to % 16 / 4, to % 4);
        (4 * (4 * quarter + lane) + vector) as u8
    });
    // And in order.
    let natural: [u8; 64] = core::array::from_fn(|to| (4 * (to % 16) + to / 16) as u8);
    // SAFETY: the tables have 32, 16 and 64 elements.
    let (decades, ends, slopes, offsets, order, natural) = unsafe {
        (
            [_mm512_loadu_si512(decades.as_ptr().cast()), _mm512_loadu_si512(decades.as_ptr().add(16).cast())],
            [_mm512_loadu_ps(ends.as_ptr()), _mm512_loadu_ps(ends.as_ptr().add(16))],
            _mm512_loadu_ps(slopes.as_ptr()),
            _mm512_loadu_ps(offsets.as_ptr()),
            _mm512_loadu_si512(order.as_ptr().cast()),
            _mm512_loadu_si512(natural.as_ptr().cast()),
        )
    };
    let thresholds: &[f32; 128] = map.positive_thresholds();
    let [low, high] = [planes(&thresholds.as_chunks().0[0]), planes(&thresholds.as_chunks().0[1])];
    let (sign, taken_off) = (_mm512_set1_epi32(i32::MAX), _mm512_set1_ps(offset));
    for ((block, codes), absmax) in input.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(absmax) {
        let (groups, rest) = block.as_chunks::<64>();
        let mut largest = _mm512_setzero_si512();
        for sixteen in block.as_chunks::<16>().0 {
            // SAFETY: 16 numbers.
            let values = unsafe { _mm512_sub_ps(_mm512_loadu_ps(sixteen.as_ptr()), taken_off) };
            largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(values), sign));
        }
        let bits = _mm512_reduce_max_epu32(largest);
        if block.len() < block_size || !rest.is_empty() || bits >= INFINITE {
            *absmax = scalar::quantize_block(map, block_size, block, offset, codes);
            continue;
        }
        *absmax = f32::from_bits(bits);
        let reciprocal = _mm512_set1_ps(1.0 / absmax.max(MIN_ABSMAX));
        for (group, codes) in groups.iter().zip(codes.as_chunks_mut::<64>().0) {
            // 1. Ranks, or one less.
            let mut scaled = [_mm512_setzero_ps(); 4];
            let mut ranks = [_mm512_setzero_si512(); 4];
            for (vector, (scaled, rank)) in scaled.iter_mut().zip(&mut ranks).enumerate() {
                // SAFETY: 16 of 64 numbers.
                let values = unsafe { _mm512_loadu_ps(group.as_ptr().add(16 * vector)) };
                *scaled = _mm512_mul_ps(_mm512_sub_ps(values, taken_off), reciprocal);
                let magnitude = _mm512_abs_ps(*scaled);
                let octave = _mm512_castps_si512(_mm512_max_ps(magnitude, _mm512_set1_ps(f32::from_bits(103 << 23))));
                // The permutes read the lowest 5 bits, and 4.
                let octave = _mm512_srli_epi32::<23>(octave);
                let end = _mm512_permutex2var_ps(ends[0], octave, ends[1]);
                let decade = _mm512_permutex2var_epi32(decades[0], octave, decades[1]);
                let is_next = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(magnitude, end);
                let decade = _mm512_mask_add_epi32(decade, is_next, decade, _mm512_set1_epi32(1));
                let slope = _mm512_permutexvar_ps(decade, slopes);
                let offset = _mm512_permutexvar_ps(decade, offsets);
                *rank = _mm512_cvttps_epi32(_mm512_fmadd_ps(magnitude, slope, offset));
            }
            // 2. The thresholds of these ranks.
            let low_half = _mm512_or_si512(ranks[0], _mm512_slli_epi32::<8>(ranks[1]));
            let high_half = _mm512_or_si512(_mm512_slli_epi32::<16>(ranks[2]), _mm512_slli_epi32::<24>(ranks[3]));
            let ranks = _mm512_or_si512(low_half, high_half);
            let bytes = _mm512_permutexvar_epi8(order, ranks);
            let mut looked_up = [_mm512_setzero_si512(); 4];
            for (byte, looked_up) in looked_up.iter_mut().enumerate() {
                *looked_up = _mm512_permutex2var_epi8(low[byte], bytes, high[byte]);
            }
            let thresholds = interleave(looked_up);
            // 3. Which numbers are beyond theirs; magnitudes order as their bits do. A number at a threshold takes the lower value: of negative ones
            // that is the larger magnitude, which is as if they were a little larger.
            let (mut beyond, mut negative) = (0u64, 0u64);
            for (vector, threshold) in thresholds.into_iter().enumerate() {
                let bits = _mm512_castps_si512(scaled[vector]);
                let magnitude = _mm512_add_epi32(_mm512_and_si512(bits, sign), _mm512_srli_epi32::<31>(bits));
                beyond |= u64::from(_mm512_cmpgt_epi32_mask(magnitude, threshold)) << (16 * vector);
                negative |= u64::from(_mm512_movepi32_mask(bits)) << (16 * vector);
            }
            // 4. Codes, in order. There is no -1 in the map: 127 - 128 stays 0.
            let ranks = _mm512_permutexvar_epi8(natural, ranks);
            let ranks = _mm512_mask_add_epi8(ranks, beyond, ranks, _mm512_set1_epi8(1));
            let zero_code = _mm512_set1_epi8(127);
            let code = _mm512_mask_subs_epu8(_mm512_add_epi8(zero_code, ranks), negative, zero_code, ranks);
            // SAFETY: 64 codes.
            unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), code) };
        }
    }
}

/// Bytes 0 to 3 of 64 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn planes(values: &[f32; 64]) -> [__m512i; 4] {
    // Byte b of 16 values to quarter b of the vector.
    let order: [u8; 64] = core::array::from_fn(|byte| (4 * (byte % 16) + byte / 16) as u8);
    // SAFETY: the table has 64 bytes.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    let mut sixteens = [_mm512_setzero_si512(); 4];
    for (index, sixteen) in sixteens.iter_mut().enumerate() {
        // SAFETY: 16 of 64 values.
        let bits = unsafe { _mm512_loadu_si512(values.as_ptr().add(16 * index).cast()) };
        *sixteen = _mm512_permutexvar_epi8(order, bits);
    }
    // A transpose of 4 by 4 quarters of vectors.
    let [a, b, c, d] = sixteens;
    let ab_low = _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b);
    let cd_low = _mm512_shuffle_i32x4::<0b01_00_01_00>(c, d);
    let ab_high = _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b);
    let cd_high = _mm512_shuffle_i32x4::<0b11_10_11_10>(c, d);
    [
        _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_low, cd_low),
        _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_low, cd_low),
        _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_high, cd_high),
        _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_high, cd_high),
    ]
}

/// Four bytes each of 64 numbers to the numbers: lane 4L + i of vector j is at byte 16L + 4j + i.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(bytes: [__m512i; 4]) -> [__m512i; 4] {
    let [a, b, c, d] = bytes;
    let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
    let (low2, high2) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
    [
        _mm512_unpacklo_epi16(low, high),
        _mm512_unpackhi_epi16(low, high),
        _mm512_unpacklo_epi16(low2, high2),
        _mm512_unpackhi_epi16(low2, high2),
    ]
}

fn dequantize(values: &[f32; 256], codes: &[u8], absmax: &[f32], block_size: usize, offset: f32, out: &mut [f32]) {
    assert!(codes.len() >= out.len() && absmax.len() >= out.len().div_ceil(block_size));
    if out.len() < 64 || !block_size.is_multiple_of(64) {
        return scalar::dequantize(values, codes, absmax, block_size, offset, out);
    }
    let whole = out.len() - out.len() % 64;
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; lengths are checked above.
    unsafe { dequantize_blocks(values, &codes[..whole], absmax, block_size, offset, &mut out[..whole]) };
    // The block that the rest belongs to may have begun before it.
    scalar::dequantize(values, &codes[whole..], &absmax[whole / block_size..], 64, offset, &mut out[whole..]);
}

/// # Safety
/// AVX-512 F, BW, VBMI. As many codes as outputs, a number of 64, in blocks of a multiple of 64 with a scale each.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn dequantize_blocks(
    values: &[f32; 256],
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    offset: f32,
    out: &mut [f32],
) {
    // quarters[q][b] is byte b of values 64q .. 64q + 64.
    let quarters = values.as_chunks::<64>().0;
    let quarters = [planes(&quarters[0]), planes(&quarters[1]), planes(&quarters[2]), planes(&quarters[3])];
    // Interleaving works within quarters of vectors; this makes it come out in order: group j of quarter L is codes 16j + 4L ..
    let spread = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (block, &absmax) in absmax[..out.len().div_ceil(block_size)].iter().enumerate() {
        let (scale, offset) = (_mm512_set1_ps(absmax), _mm512_set1_ps(offset));
        let end = out.len().min((block + 1) * block_size);
        for start in (block * block_size..end).step_by(64) {
            // SAFETY: 64 codes.
            let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().add(start).cast()) };
            let codes = _mm512_permutexvar_epi32(spread, codes);
            let upper = _mm512_movepi8_mask(codes);
            let mut bytes = [_mm512_setzero_si512(); 4];
            for (byte, out) in bytes.iter_mut().enumerate() {
                // The permutes read 7 bits; the eighth chooses between them.
                let low = _mm512_permutex2var_epi8(quarters[0][byte], codes, quarters[1][byte]);
                let high = _mm512_permutex2var_epi8(quarters[2][byte], codes, quarters[3][byte]);
                *out = _mm512_mask_blend_epi8(upper, low, high);
            }
            let vectors = interleave(bytes);
            for (index, bits) in vectors.into_iter().enumerate() {
                // SAFETY: 16 of the group's 64 outputs.
                unsafe {
                    let to = out.as_mut_ptr().add(start + 16 * index);
                    let scaled = _mm512_mul_ps(_mm512_castsi512_ps(bits), scale);
                    _mm512_storeu_ps(to, _mm512_add_ps(scaled, offset));
                }
            }
        }
    }
}
