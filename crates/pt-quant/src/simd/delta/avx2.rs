//! Packing and merging with AVX2 and F16C.
//!
//! ```text
//! pack, 16 weights:   Δ = fine_tuned - base; bits = !(Δ < 0), gathered from the sign bits of the comparison; partial sums += |Δ|
//! merge, 8 weights:   lane i tests bit i of a broadcast byte; out = round(base + (bit ? scale : -scale))
//! ```
//! What is left at the end of a row goes through a copy on the stack.

use core::arch::x86_64::*;

use super::{Bits, GROUP, Kernels, check_merge, check_pack, scalar};
use crate::{Bf16, F16};

pub(super) static KERNELS: Kernels = Kernels {
    pack_f32: pack,
    pack_bf16: pack,
    pack_f16: pack,
    merge_f32: merge,
    merge_bf16: merge,
    merge_f16: merge,
    merge_in_place_f32: merge_in_place,
    merge_in_place_bf16: merge_in_place,
    merge_in_place_f16: merge_in_place,
};

/// Formats of which 8 numbers are loaded and stored.
trait Vector: Bits {
    const ZERO: Self;

    /// # Safety
    /// 8 numbers readable at `from`; AVX2 and F16C.
    unsafe fn load(from: *const Self) -> __m256;
    /// Stores the nearest, ties to even; past the caches if `STREAM`.
    ///
    /// # Safety
    /// 8 numbers writable at `to`, aligned for the whole vector if `STREAM`; AVX2 and F16C.
    unsafe fn store<const STREAM: bool>(to: *mut Self, values: __m256);
}

impl Vector for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store<const STREAM: bool>(to: *mut Self, values: __m256) {
        // SAFETY: the caller's promise.
        unsafe { if STREAM { _mm256_stream_ps(to, values) } else { _mm256_storeu_ps(to, values) } }
    }
}

impl Vector for Bf16 {
    const ZERO: Self = Self(0);

    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise: 16 bytes.
        unsafe {
            let half = _mm_loadu_si128(from.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
        }
    }

    #[inline(always)]
    unsafe fn store<const STREAM: bool>(to: *mut Self, values: __m256) {
        // SAFETY: the caller's promise: 16 bytes.
        unsafe { store_half::<STREAM>(to.cast(), narrow_bf16(values)) }
    }
}

impl Vector for F16 {
    const ZERO: Self = Self(0);

    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise: 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store<const STREAM: bool>(to: *mut Self, values: __m256) {
        // SAFETY: the caller's promise: 16 bytes.
        unsafe {
            store_half::<STREAM>(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values));
        }
    }
}

/// # Safety
/// 16 bytes writable at `to`, aligned if `STREAM`.
#[inline(always)]
unsafe fn store_half<const STREAM: bool>(to: *mut __m128i, half: __m128i) {
    // SAFETY: the caller's promise.
    unsafe { if STREAM { _mm_stream_si128(to, half) } else { _mm_storeu_si128(to, half) } }
}

#[inline]
#[target_feature(enable = "avx2")]
fn narrow_bf16(values: __m256) -> __m128i {
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
    let packed = _mm256_packus_epi32(upper, upper);
    _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
}

fn pack<T: Vector>(base: &[T], fine_tuned: &[T], words: &mut [u64], sums: &mut [f64]) {
    check_pack(base, fine_tuned, words, sums);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_pack` has seen to the lengths.
    unsafe { pack_row(base, fine_tuned, words, sums) }
}

/// # Safety
/// The lengths as `check_pack` has them.
#[target_feature(enable = "avx2,f16c")]
unsafe fn pack_row<T: Vector>(base: &[T], fine_tuned: &[T], words: &mut [u64], sums: &mut [f64]) {
    let whole = base.len() / GROUP;
    for (group, (sum, words)) in sums[..whole].iter_mut().zip(words.chunks_exact_mut(2)).enumerate() {
        // SAFETY: group `group` is whole in both slices.
        *sum = unsafe { pack_group(base.as_ptr().add(group * GROUP), fine_tuned.as_ptr().add(group * GROUP), words) };
    }
    if let Some(sum) = sums.get_mut(whole) {
        let len = base.len() - whole * GROUP;
        let copy = |from: &[T]| {
            let mut copy = [T::ZERO; GROUP];
            copy[..len].copy_from_slice(&from[whole * GROUP..]);
            copy
        };
        let mut two = [0; 2];
        // SAFETY: both copies hold a whole group.
        *sum = unsafe { pack_group(copy(base).as_ptr(), copy(fine_tuned).as_ptr(), &mut two) };
        for (index, word) in words[2 * whole..].iter_mut().enumerate() {
            let used = (len - index * 64).min(64);
            *word = two[index] & u64::MAX >> (64 - used);
        }
    }
}

/// # Safety
/// A whole group readable at both.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn pack_group<T: Vector>(base: *const T, fine_tuned: *const T, words: &mut [u64]) -> f64 {
    let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
    let mut lanes = [_mm256_setzero_ps(); 2];
    for (index, word) in words.iter_mut().enumerate() {
        let mut bits = 0;
        for eighth in 0..8 {
            let at = index * 64 + eighth * 8;
            // SAFETY: the caller's promise: `at + 8 <= GROUP`.
            let delta = unsafe { _mm256_sub_ps(T::load(fine_tuned.add(at)), T::load(base.add(at))) };
            let is_positive = _mm256_cmp_ps::<_CMP_NLT_UQ>(delta, _mm256_setzero_ps());
            bits |= (_mm256_movemask_ps(is_positive) as u64) << (eighth * 8);
            lanes[eighth % 2] = _mm256_add_ps(lanes[eighth % 2], _mm256_and_ps(delta, magnitude));
        }
        *word = bits;
    }
    // As `super::total`.
    let quarter = |lanes: __m256| {
        [_mm256_cvtps_pd(_mm256_castps256_ps128(lanes)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(lanes))]
    };
    let ([a, b], [c, d]) = (quarter(lanes[0]), quarter(lanes[1]));
    let four = _mm256_add_pd(_mm256_add_pd(a, c), _mm256_add_pd(b, d));
    let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
    _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
}

fn merge<T: Vector>(base: &[T], words: &[u64], scale: f32, out: &mut [T], stream: bool) {
    check_merge(base.len(), words, out.len());
    let whole = out.len() / 64 * 64;
    let (from, to) = (base.as_ptr(), out.as_mut_ptr());
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_merge` has seen to the lengths. Streaming
    // stores are asked for only if `out` is aligned for them.
    unsafe {
        if stream && (to as usize).is_multiple_of(8 * size_of::<T>()) {
            merge_part::<T, true>(from, &words[..whole / 64], scale, to);
            _mm_sfence();
        } else {
            merge_part::<T, false>(from, &words[..whole / 64], scale, to);
        }
    }
    for index in whole..out.len() {
        out[index] = scalar::merged(base[index], words[whole / 64], index, scale);
    }
}

fn merge_in_place<T: Vector>(weights: &mut [T], words: &[u64], scale: f32, changes: &mut [T]) {
    check_merge(weights.len(), words, weights.len());
    let num_changes = changes.len();
    assert!(num_changes == 0 || num_changes == weights.len(), "a change for each weight");
    // By 1024 weights, which stay in the L1 cache between the merge and the comparison.
    let mut old = [T::ZERO; 1024];
    for (index, part) in weights.chunks_mut(1024).enumerate() {
        let words = &words[index * 16..];
        let old = &mut old[..part.len()];
        old.copy_from_slice(part);
        merge(old, words, scale, part, false);
        if num_changes > 0 {
            let changes = &mut changes[index * 1024..][..part.len()];
            changes.iter_mut().zip(old).zip(part).for_each(|((change, old), new)| *change = old.xor(*new));
        }
    }
}

/// # Safety
/// 64 numbers readable at `from` and writable at `to` for each word; `to` aligned to 8 numbers if `STREAM`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn merge_part<T: Vector, const STREAM: bool>(from: *const T, words: &[u64], scale: f32, to: *mut T) {
    let minus = _mm256_set1_ps(-scale);
    let sign = _mm256_set1_epi32(i32::MIN);
    // Shifts bit `i` of a byte to the sign of lane `i`.
    let shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (index, word) in words.iter().enumerate() {
        for eighth in 0..8 {
            let byte = _mm256_set1_epi32((word >> (eighth * 8)) as u8 as i32);
            let flip = _mm256_and_si256(_mm256_sllv_epi32(byte, shifts), sign);
            let signed = _mm256_xor_ps(minus, _mm256_castsi256_ps(flip));
            let at = index * 64 + eighth * 8;
            // SAFETY: the caller's promise.
            unsafe { T::store::<STREAM>(to.add(at), _mm256_add_ps(T::load(from.add(at)), signed)) };
        }
    }
}
