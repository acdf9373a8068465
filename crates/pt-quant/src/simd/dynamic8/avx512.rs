//! 8-bit dynamic numbers with AVX-512 (F, BW, DQ, VL, VBMI).
//!
//! ```text
//! quantize, 16 numbers:   cell by exponent and 7 bits of mantissa; gather its entry; code ± 1 beyond the entry's threshold
//! dequantize, 64 numbers: look up each of the 4 bytes of a value in 256 entries, two permutes of 128 and a blend; interleave; times absmax
//! ```

use core::arch::x86_64::*;

use super::{INFINITE, Kernels, MIN_ABSMAX, scalar};
use crate::DynamicMap;
use crate::dynamic8::{FIRST_CELL, NUM_CELLS};

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize };

fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    for ((block, codes), absmax) in input.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(absmax) {
        if block.len() == block_size && block_size.is_multiple_of(32) {
            // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; the block is whole vectors.
            let bits = unsafe { absmax_bits(block) };
            if bits < INFINITE {
                *absmax = f32::from_bits(bits);
                // SAFETY: as above, and the numbers are finite.
                unsafe { quantize_block(map.cells(), block, 1.0 / absmax.max(MIN_ABSMAX), codes) };
                continue;
            }
        }
        *absmax = scalar::quantize_block(map, block_size, block, codes);
    }
}

/// # Safety
/// AVX-512 F; `block` is a number of 32 numbers.
#[target_feature(enable = "avx512f")]
unsafe fn absmax_bits(block: &[f32]) -> u32 {
    let mut largest = [_mm512_setzero_si512(); 2];
    for start in (0..block.len()).step_by(32) {
        for (lane, largest) in largest.iter_mut().enumerate() {
            // SAFETY: 16 numbers of the block.
            let bits = unsafe { _mm512_loadu_si512(block.as_ptr().add(start + 16 * lane).cast()) };
            *largest = _mm512_max_epu32(*largest, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
        }
    }
    _mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1]))
}

/// # Safety
/// AVX-512 F, BW; `block` is a number of 16 numbers which times `reciprocal` are at most 1 and a rounding error.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn quantize_block(cells: &[u32; 2 * NUM_CELLS], block: &[f32], reciprocal: f32, codes: &mut [u8]) {
    assert_eq!(block.len(), codes.len());
    let reciprocal = _mm512_set1_ps(reciprocal);
    let first = _mm512_set1_epi32(FIRST_CELL as i32);
    for start in (0..block.len()).step_by(16) {
        // SAFETY: 16 numbers of the block; the cell of a magnitude of 1 and a rounding error is 2944, and `NUM_CELLS` follow for negative ones;
        // 16 codes, as many as numbers.
        unsafe {
            let scaled = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(block.as_ptr().add(start)), reciprocal));
            let negative = _mm512_srai_epi32::<31>(scaled);
            let magnitude = _mm512_and_si512(scaled, _mm512_set1_epi32(i32::MAX));
            let magnitude = _mm512_sub_epi32(_mm512_max_epu32(magnitude, first), first);
            let half = _mm512_and_si512(negative, _mm512_set1_epi32(NUM_CELLS as i32));
            let cell = _mm512_add_epi32(_mm512_srli_epi32::<16>(magnitude), half);
            let entry = _mm512_i32gather_epi32::<4>(cell, cells.as_ptr().cast());
            let threshold = _mm512_and_si512(entry, _mm512_set1_epi32(0x1_ffff));
            let beyond = _mm512_cmpge_epu32_mask(_mm512_and_si512(magnitude, _mm512_set1_epi32(0xffff)), threshold);
            let code = _mm512_srli_epi32::<24>(entry);
            // One away from zero: plus 1, or minus 1 where the number is negative.
            let step = _mm512_or_si512(negative, _mm512_set1_epi32(1));
            let code = _mm512_mask_add_epi32(code, beyond, code, step);
            _mm_storeu_si128(codes.as_mut_ptr().add(start).cast(), _mm512_cvtepi32_epi8(code));
        }
    }
}

fn dequantize(values: &[f32; 256], codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32]) {
    assert!(codes.len() >= out.len() && absmax.len() >= out.len().div_ceil(block_size));
    if out.len() < 64 || !block_size.is_multiple_of(64) {
        return scalar::dequantize(values, codes, absmax, block_size, out);
    }
    let whole = out.len() - out.len() % 64;
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; lengths are checked above.
    unsafe { dequantize_blocks(values, &codes[..whole], absmax, block_size, &mut out[..whole]) };
    // The block that the rest belongs to may have begun before it.
    scalar::dequantize(values, &codes[whole..], &absmax[whole / block_size..], 64, &mut out[whole..]);
}

/// # Safety
/// AVX-512 F, BW, VBMI. As many codes as outputs, a number of 64, in blocks of a multiple of 64 with a scale each.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn dequantize_blocks(values: &[f32; 256], codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32]) {
    // planes[b][q] is byte b of values 64q .. 64q + 64.
    let mut planes = [[_mm512_setzero_si512(); 4]; 4];
    let zero = _mm512_setzero_si512();
    // Byte b of 16 values to quarter b of the vector.
    let order: [u8; 64] = core::array::from_fn(|byte| (4 * (byte % 16) + byte / 16) as u8);
    // SAFETY: the table has 64 bytes.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    for quarter in 0..4 {
        let mut sixteens = [zero; 4];
        for (index, sixteen) in sixteens.iter_mut().enumerate() {
            // SAFETY: 16 of 256 values.
            let bits = unsafe { _mm512_loadu_si512(values.as_ptr().add(64 * quarter + 16 * index).cast()) };
            *sixteen = _mm512_permutexvar_epi8(order, bits);
        }
        // A transpose of 4 by 4 quarters of vectors.
        let [a, b, c, d] = sixteens;
        let (ab_low, cd_low) =
            (_mm512_shuffle_i32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_i32x4::<0b01_00_01_00>(c, d));
        let (ab_high, cd_high) =
            (_mm512_shuffle_i32x4::<0b11_10_11_10>(a, b), _mm512_shuffle_i32x4::<0b11_10_11_10>(c, d));
        planes[0][quarter] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_low, cd_low);
        planes[1][quarter] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_low, cd_low);
        planes[2][quarter] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_high, cd_high);
        planes[3][quarter] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_high, cd_high);
    }
    // Interleaving works within quarters of vectors; this makes it come out in order: group j of quarter L is codes 16j + 4L ..
    let spread = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (block, &absmax) in absmax[..out.len().div_ceil(block_size)].iter().enumerate() {
        let scale = _mm512_set1_ps(absmax);
        let end = out.len().min((block + 1) * block_size);
        for start in (block * block_size..end).step_by(64) {
            // SAFETY: 64 codes.
            let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().add(start).cast()) };
            let codes = _mm512_permutexvar_epi32(spread, codes);
            let upper = _mm512_movepi8_mask(codes);
            let byte = |plane: &[__m512i; 4]| {
                // The permutes read 7 bits; the eighth chooses between them.
                let low = _mm512_permutex2var_epi8(plane[0], codes, plane[1]);
                let high = _mm512_permutex2var_epi8(plane[2], codes, plane[3]);
                _mm512_mask_blend_epi8(upper, low, high)
            };
            let bytes = [byte(&planes[0]), byte(&planes[1]), byte(&planes[2]), byte(&planes[3])];
            let (low, high) = (_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpacklo_epi8(bytes[2], bytes[3]));
            let (low2, high2) = (_mm512_unpackhi_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[2], bytes[3]));
            let vectors = [
                _mm512_unpacklo_epi16(low, high),
                _mm512_unpackhi_epi16(low, high),
                _mm512_unpacklo_epi16(low2, high2),
                _mm512_unpackhi_epi16(low2, high2),
            ];
            for (index, bits) in vectors.into_iter().enumerate() {
                // SAFETY: 16 of the group's 64 outputs.
                unsafe {
                    let to = out.as_mut_ptr().add(start + 16 * index);
                    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_castsi512_ps(bits), scale));
                }
            }
        }
    }
}
