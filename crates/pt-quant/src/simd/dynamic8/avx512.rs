//! 8-bit dynamic numbers with AVX-512 (F, BW, DQ, VL, VBMI).
//!
//! ```text
//! quantize, 16 numbers:   cell by exponent and 7 bits of mantissa; gather its entry; code ± 1 beyond the entry's threshold
//! dequantize, 64 numbers: look up each of the 4 bytes of a value in 256 entries, two permutes of 128 and a blend; interleave; times absmax
//! ```

use core::arch::x86_64::*;

use super::{Kernels, cells, scalar};
use crate::DynamicMap;

pub(super) static KERNELS: Kernels = Kernels { quantize, dequantize };

fn quantize(map: &DynamicMap, block_size: usize, input: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked.
    unsafe { quantize_avx512(map, block_size, input, codes, absmax) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_avx512(map: &DynamicMap, block_size: usize, input: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    cells::quantize_inline(map, block_size, input, codes, absmax);
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
    // quarters[q][b] is byte b of values 64q .. 64q + 64.
    // Byte b of 16 values to quarter b of the vector.
    let order: [u8; 64] = core::array::from_fn(|byte| (4 * (byte % 16) + byte / 16) as u8);
    // SAFETY: the table has 64 bytes.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    let quarters = [0, 1, 2, 3].map(|quarter| {
        // SAFETY: 16 of 256 values.
        let sixteen =
            |index: usize| unsafe { _mm512_loadu_si512(values.as_ptr().add(64 * quarter + 16 * index).cast()) };
        // A transpose of 4 by 4 quarters of vectors.
        let [a, b, c, d] = [0, 1, 2, 3].map(|index| _mm512_permutexvar_epi8(order, sixteen(index)));
        let [ab_low, cd_low] = [(a, b), (c, d)].map(|(a, b)| _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b));
        let [ab_high, cd_high] = [(a, b), (c, d)].map(|(a, b)| _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b));
        [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_low, cd_low),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_low, cd_low),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_high, cd_high),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_high, cd_high),
        ]
    });
    let planes = [0, 1, 2, 3].map(|byte| quarters.map(|quarter: [__m512i; 4]| quarter[byte]));
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
