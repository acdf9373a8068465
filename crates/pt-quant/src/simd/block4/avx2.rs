//! Quantizing and dequantizing with AVX2 (and F16C).
//!
//! ```text
//! quantize, 8 weights:        s = x · (1 / absmax); rank by four comparisons: border 7; 3 or 11; of four; of eight
//! dequantize f32, 8 weights:  broadcast 4 bytes; shift nibble j into lane j; look up both halves of the table, choose by bit 3
//! dequantize bf16, f16:       codes to bytes; look up both bytes of the output by `pshufb`; interleave
//! ```
//! The tables looked up hold the block's 16 outputs, values · absmax.

use core::arch::x86_64::*;

use super::{Kernels, check, dequantize_tail, scalar};
use crate::codebook::Search;
use crate::{Bf16, Element, F16};

pub(super) static KERNELS: Kernels = Kernels {
    quantize_f32: quantize,
    quantize_bf16: quantize,
    quantize_f16: quantize,
    dequantize_f32,
    dequantize_bf16,
    dequantize_f16,
};

/// Formats that 8 numbers are loaded from.
trait Load: Element {
    /// # Safety
    /// 8 numbers readable at `from`; AVX2 and F16C.
    unsafe fn load(from: *const Self) -> __m256;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Load for Bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise: 16 bytes.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }
}

impl Load for F16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise: 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

fn quantize<T: Load>(search: &Search<'_>, block_size: usize, input: &[T], packed: &mut [u8], absmax: &mut [f32]) {
    check(input.len(), packed.len(), absmax.len(), block_size);
    assert!(block_size.is_multiple_of(32), "blocks are whole vectors");
    let whole = input.len() - input.len() % block_size;
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked. `check` has seen to the lengths; `whole` is a
    // number of blocks.
    unsafe { quantize_blocks(search, block_size, &input[..whole], packed, absmax) }
    if whole < input.len() {
        absmax[whole / block_size] =
            scalar::quantize_short_block(search.book, &input[whole..], &mut packed[whole / 2..]);
    }
}

/// # Safety
/// `input` is a number of blocks of a multiple of 32, and there are bytes and scales for them; AVX2 and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize_blocks<T: Load>(
    search: &Search<'_>,
    block_size: usize,
    input: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let sign = _mm256_set1_epi32(i32::MAX);
    let bisect = Bisect::new(&search.book.thresholds);
    // SAFETY: the table has 16 bytes.
    let codes = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(search.book.codes.as_ptr().cast())) };
    let out = packed.as_mut_ptr();
    for (block, absmax) in absmax[..input.len() / block_size].iter_mut().enumerate() {
        let start = block * block_size;
        // SAFETY: 8 numbers of the block.
        let load = |offset: usize| unsafe { T::load(input.as_ptr().add(start + offset)) };
        let mut largest = [_mm256_setzero_si256(); 4];
        for group in 0..block_size / 32 {
            for (lane, largest) in largest.iter_mut().enumerate() {
                let magnitude = _mm256_and_si256(_mm256_castps_si256(load(32 * group + 8 * lane)), sign);
                *largest = _mm256_max_epu32(*largest, magnitude);
            }
        }
        let [a, b, c, d] = largest;
        let bits = max_of(_mm256_max_epu32(_mm256_max_epu32(a, b), _mm256_max_epu32(c, d)));
        if bits >= 0x7f80_0000 {
            // Infinite or NaN.
            // SAFETY: the block's own bytes, to which no other reference lives.
            let bytes = unsafe { core::slice::from_raw_parts_mut(out.add(start / 2), block_size / 2) };
            *absmax = scalar::quantize_block(search.book, &input[start..start + block_size], bytes);
            continue;
        }
        *absmax = f32::from_bits(bits);
        let reciprocal = _mm256_set1_ps(1.0 / absmax.max(scalar::MIN_ABSMAX));
        for group in 0..block_size / 32 {
            let rank = |lane: usize| bisect.rank(_mm256_mul_ps(load(32 * group + 8 * lane), reciprocal));
            // Packing works within halves: bytes come as 0..4 8..12 16..20 24..28 | 4..8 ...
            let low = _mm256_packus_epi32(rank(0), rank(1));
            let high = _mm256_packus_epi32(rank(2), rank(3));
            let ranks = _mm256_packus_epi16(low, high);
            let codes = _mm256_shuffle_epi8(codes, ranks);
            // 16 times the first of each pair, plus the second.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            let pairs = _mm256_packus_epi16(pairs, pairs);
            // In each half: 2 bytes each of vectors 0, 1, 2, 3.
            let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            // SAFETY: the group's 16 bytes.
            unsafe { _mm_storeu_si128(out.add((start + 32 * group) / 2).cast(), _mm_unpacklo_epi16(low, high)) };
        }
    }
}

/// The largest of 8 unsigned numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn max_of(numbers: __m256i) -> u32 {
    let four = _mm_max_epu32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256::<1>(numbers));
    let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
    _mm_cvtsi128_si32(one) as u32
}

/// The borders, by which comparison needs them.
struct Bisect {
    first: __m256,
    second: [__m256; 2],
    /// Borders 1, 5, 9, 13.
    third: __m256,
    /// Borders 0, 2, 4 .. 14.
    fourth: __m256,
}

impl Bisect {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(t: &[f32; 15]) -> Self {
        Self {
            first: _mm256_set1_ps(t[7]),
            second: [_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])],
            third: _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]),
            fourth: _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]),
        }
    }

    /// Ranks of 8 scaled numbers.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn rank(&self, scaled: __m256) -> __m256i {
        // All ones, -1, where the number is above the border; so ranks are doubled and the mask subtracted.
        let above = |border: __m256| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(border, scaled));
        let first = above(self.first);
        let border = _mm256_blendv_ps(self.second[0], self.second[1], _mm256_castsi256_ps(first));
        let two = _mm256_sub_epi32(_mm256_add_epi32(_mm256_abs_epi32(first), _mm256_abs_epi32(first)), above(border));
        let three = _mm256_sub_epi32(_mm256_add_epi32(two, two), above(_mm256_permutevar8x32_ps(self.third, two)));
        _mm256_sub_epi32(_mm256_add_epi32(three, three), above(_mm256_permutevar8x32_ps(self.fourth, three)))
    }
}

fn dequantize_f32(values: &[f32; 16], packed: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32], stream: bool) {
    check(out.len(), packed.len(), absmax.len(), block_size);
    let to = out.as_mut_ptr();
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked. `check` has seen to the lengths.
    let done = unsafe {
        match stream {
            true if to.addr().is_multiple_of(32) => blocks_f32::<32>(values, packed, absmax, block_size, to, out.len()),
            true if to.addr().is_multiple_of(16) => blocks_f32::<16>(values, packed, absmax, block_size, to, out.len()),
            _ => blocks_f32::<0>(values, packed, absmax, block_size, to, out.len()),
        }
    };
    dequantize_tail(values, packed, absmax, block_size, out, done);
}

/// Stores a vector: past the caches in pieces of `STREAM` bytes, into them where that is 0.
///
/// # Safety
/// 32 bytes of room at `to`, which is aligned to `STREAM` bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<const STREAM: usize>(to: *mut u8, vector: __m256i) {
    // SAFETY: the caller's promise.
    unsafe {
        match STREAM {
            32 => _mm256_stream_si256(to.cast(), vector),
            16 => {
                _mm_stream_si128(to.cast(), _mm256_castsi256_si128(vector));
                _mm_stream_si128(to.add(16).cast(), _mm256_extracti128_si256::<1>(vector));
            }
            _ => _mm256_storeu_si256(to.cast(), vector),
        }
    }
}

/// The whole vectors; returns how many weights they are.
///
/// # Safety
/// Codes, scales and room are there for `len` weights, and `to` is aligned to `STREAM` bytes; AVX2.
#[target_feature(enable = "avx2")]
unsafe fn blocks_f32<const STREAM: usize>(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    to: *mut f32,
    len: usize,
) -> usize {
    // High half before low.
    let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    // SAFETY: 16 values.
    let book = unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] };
    let mut start = 0;
    for &absmax in &absmax[..len.div_ceil(block_size)] {
        let scale = _mm256_set1_ps(absmax);
        let [low, high] = [_mm256_mul_ps(book[0], scale), _mm256_mul_ps(book[1], scale)];
        let end = len.min(start + block_size);
        while start + 8 <= end {
            // SAFETY: the 4 bytes of weights `start .. start + 8`, which is even, and room for these.
            unsafe {
                let bytes = _mm256_set1_epi32(packed.as_ptr().add(start / 2).cast::<i32>().read_unaligned());
                // The permutes read 3 bits of a lane; the fourth, moved to the top, chooses between them.
                let codes = _mm256_srlv_epi32(bytes, shifts);
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                let low = _mm256_permutevar8x32_ps(low, codes);
                let high = _mm256_permutevar8x32_ps(high, codes);
                store::<STREAM>(to.add(start).cast(), _mm256_castps_si256(_mm256_blendv_ps(low, high, upper)));
            }
            start += 8;
        }
        if start < end {
            assert!(end == len, "blocks are whole vectors");
            break;
        }
    }
    if STREAM > 0 {
        // What was written must be there for whoever is told that we are done.
        _mm_sfence();
    }
    start
}

/// The two bytes of 16 outputs in bf16, rounded to even, each in both halves of a vector: low bytes, high bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn planes_bf16(products: [__m256; 2]) -> [__m256i; 2] {
    let round = |product: __m256| {
        let bits = _mm256_castps_si256(product);
        let upper = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(product, product));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        _mm256_blendv_epi8(_mm256_srli_epi32::<16>(rounded), quiet, is_nan)
    };
    let numbers = _mm256_packus_epi32(round(products[0]), round(products[1]));
    // Packing works within halves: 0..4 8..12 | 4..8 12..16.
    planes(_mm256_permute4x64_epi64::<0b11_01_10_00>(numbers))
}

/// As [`planes_bf16`], in f16.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn planes_f16(products: [__m256; 2]) -> [__m256i; 2] {
    let [low, high] = products.map(|product| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(product));
    planes(_mm256_set_m128i(high, low))
}

/// The low and the high bytes of 16 numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn planes(numbers: __m256i) -> [__m256i; 2] {
    let low = _mm256_and_si256(numbers, _mm256_set1_epi16(0xff));
    let high = _mm256_srli_epi16::<8>(numbers);
    [low, high].map(|bytes| {
        let (first, second) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
        _mm256_broadcastsi128_si256(_mm_packus_epi16(first, second))
    })
}

macro_rules! dequantize_16_bits {
    ($name:ident, $blocks:ident, $type:ty, $planes:ident) => {
        fn $name(
            values: &[f32; 16],
            packed: &[u8],
            absmax: &[f32],
            block_size: usize,
            out: &mut [$type],
            stream: bool,
        ) {
            check(out.len(), packed.len(), absmax.len(), block_size);
            let to = out.as_mut_ptr();
            // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked. `check` has seen to the lengths.
            let done = unsafe {
                match stream {
                    true if to.addr().is_multiple_of(32) => {
                        $blocks::<32>(values, packed, absmax, block_size, to, out.len())
                    }
                    true if to.addr().is_multiple_of(16) => {
                        $blocks::<16>(values, packed, absmax, block_size, to, out.len())
                    }
                    _ => $blocks::<0>(values, packed, absmax, block_size, to, out.len()),
                }
            };
            dequantize_tail(values, packed, absmax, block_size, out, done);
        }

        /// The whole vectors; returns how many weights they are.
        ///
        /// # Safety
        /// Codes, scales and room are there for `len` weights, and `to` is aligned to `STREAM` bytes; AVX2 and F16C.
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn $blocks<const STREAM: usize>(
            values: &[f32; 16],
            packed: &[u8],
            absmax: &[f32],
            block_size: usize,
            to: *mut $type,
            len: usize,
        ) -> usize {
            // SAFETY: 16 values.
            let book = unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] };
            // Bytes 0..4 and 8..12 to the lower half of the vector, the others to the upper.
            let halves = _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3);
            let mask = _mm256_set1_epi8(15);
            let mut start = 0;
            for &absmax in &absmax[..len.div_ceil(block_size)] {
                let scale = _mm256_set1_ps(absmax);
                let [low, high] = $planes(book.map(|values| _mm256_mul_ps(values, scale)));
                let end = len.min(start + block_size);
                while start + 32 <= end {
                    // SAFETY: the 16 bytes of weights `start .. start + 32`, which is even, and room for these.
                    unsafe {
                        let bytes = _mm_loadu_si128(packed.as_ptr().add(start / 2).cast());
                        let bytes = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(bytes), halves);
                        let first = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
                        let second = _mm256_and_si256(bytes, mask);
                        // Codes 0..8 16..24 | 8..16 24..32.
                        let codes = _mm256_unpacklo_epi8(first, second);
                        let (low, high) = (_mm256_shuffle_epi8(low, codes), _mm256_shuffle_epi8(high, codes));
                        store::<STREAM>(to.add(start).cast(), _mm256_unpacklo_epi8(low, high));
                        store::<STREAM>(to.add(start + 16).cast(), _mm256_unpackhi_epi8(low, high));
                    }
                    start += 32;
                }
                if start < end {
                    assert!(end == len, "blocks are whole vectors");
                    break;
                }
            }
            if STREAM > 0 {
                // What was written must be there for whoever is told that we are done.
                _mm_sfence();
            }
            start
        }
    };
}

dequantize_16_bits!(dequantize_bf16, blocks_bf16, Bf16, planes_bf16);
dequantize_16_bits!(dequantize_f16, blocks_f16, F16, planes_f16);
