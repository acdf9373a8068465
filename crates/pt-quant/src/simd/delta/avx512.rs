//! Packing and merging with AVX-512 (F, BW, DQ, VL).
//!
//! ```text
//! pack, 16 weights:   Δ = fine_tuned - base; bits = !(Δ < 0); partial sums += |Δ|
//! merge, 16 weights:  out = round(base + (bits ? scale : -scale))
//! ```
//! Bits are the masks that AVX-512 compares and blends with. What is left at the end of a row is loaded and stored under a mask.

use core::arch::x86_64::*;

use super::{Bits, GROUP, Kernels, check_merge, check_pack};
use crate::{Bf16, F16};

mod bf16;

pub(super) static KERNELS: Kernels = Kernels {
    pack_f32: pack,
    pack_bf16: pack,
    pack_f16: pack,
    merge_f32: merge,
    merge_bf16: bf16::merge::<false>,
    merge_f16: merge,
    merge_in_place_f32: merge_in_place,
    merge_in_place_bf16: bf16::merge_in_place::<false>,
    merge_in_place_f16: merge_in_place,
};

pub(super) static KERNELS_BF16: Kernels =
    Kernels { merge_bf16: bf16::merge::<true>, merge_in_place_bf16: bf16::merge_in_place::<true>, ..KERNELS };

/// Formats of which 16 numbers are loaded and stored.
trait Vector: Bits {
    /// Their bits, as they lie in memory.
    type Raw: Copy;

    /// # Safety
    /// The numbers of the mask readable at `from`; AVX-512 F, BW, VL.
    unsafe fn load(from: *const Self, mask: __mmask16) -> Self::Raw;
    /// # Safety
    /// As `load`, to be written; `from` aligned for the whole vector if `STREAM` and the mask full.
    unsafe fn store<const STREAM: bool>(to: *mut Self, mask: __mmask16, raw: Self::Raw);
    /// # Safety
    /// AVX-512 F, BW, VL.
    unsafe fn widen(raw: Self::Raw) -> __m512;
    /// The nearest, ties to even.
    ///
    /// # Safety
    /// AVX-512 F, BW, VL.
    unsafe fn narrow(values: __m512) -> Self::Raw;
    /// # Safety
    /// AVX-512 F, BW, VL.
    unsafe fn xor(a: Self::Raw, b: Self::Raw) -> Self::Raw;
}

impl Vector for f32 {
    type Raw = __m512;

    #[inline(always)]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }

    #[inline(always)]
    unsafe fn store<const STREAM: bool>(to: *mut Self, mask: __mmask16, raw: __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            if STREAM && mask == u16::MAX {
                _mm512_stream_ps(to, raw);
            } else {
                _mm512_mask_storeu_ps(to, mask, raw);
            }
        }
    }

    #[inline(always)]
    unsafe fn widen(raw: __m512) -> __m512 {
        raw
    }

    #[inline(always)]
    unsafe fn narrow(values: __m512) -> __m512 {
        values
    }

    #[inline(always)]
    unsafe fn xor(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_castps_si512(b))) }
    }
}

macro_rules! half_width {
    ($type:ty, $widen:expr, $narrow:expr) => {
        impl Vector for $type {
            type Raw = __m256i;

            #[inline(always)]
            unsafe fn load(from: *const Self, mask: __mmask16) -> __m256i {
                // SAFETY: the caller's promise.
                unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) }
            }

            #[inline(always)]
            unsafe fn store<const STREAM: bool>(to: *mut Self, mask: __mmask16, raw: __m256i) {
                // SAFETY: the caller's promise.
                unsafe {
                    if STREAM && mask == u16::MAX {
                        _mm256_stream_si256(to.cast(), raw);
                    } else {
                        _mm256_mask_storeu_epi16(to.cast(), mask, raw);
                    }
                }
            }

            #[inline(always)]
            unsafe fn widen(raw: __m256i) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { $widen(raw) }
            }

            #[inline(always)]
            unsafe fn narrow(values: __m512) -> __m256i {
                // SAFETY: the caller's promise.
                unsafe { $narrow(values) }
            }

            #[inline(always)]
            unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
                // SAFETY: the caller's promise.
                unsafe { _mm256_xor_si256(a, b) }
            }
        }
    };
}

half_width!(Bf16, widen_bf16, narrow_bf16);
half_width!(F16, _mm512_cvtph_ps, _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>);

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen_bf16(raw: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn narrow_bf16(values: __m512) -> __m256i {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
    let rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x40_0000));
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
}

/// The mask of the numbers that are left, 16 at most.
#[inline]
fn first(len: usize) -> __mmask16 {
    if len >= 16 { u16::MAX } else { (1u16 << len) - 1 }
}

fn pack<T: Vector>(base: &[T], fine_tuned: &[T], words: &mut [u64], sums: &mut [f64]) {
    check_pack(base, fine_tuned, words, sums);
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_pack` has seen to the lengths.
    unsafe { pack_row(base, fine_tuned, words, sums) }
}

/// # Safety
/// The lengths as `check_pack` has them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn pack_row<T: Vector>(base: &[T], fine_tuned: &[T], words: &mut [u64], sums: &mut [f64]) {
    let len = base.len();
    let whole = len / GROUP;
    for (group, (sum, words)) in sums[..whole].iter_mut().zip(words.chunks_exact_mut(2)).enumerate() {
        let mut lanes = _mm512_setzero_ps();
        for (index, word) in words.iter_mut().enumerate() {
            let mut bits = 0;
            for quarter in 0..4 {
                let at = group * GROUP + index * 64 + quarter * 16;
                // SAFETY: group `group` is whole, so 16 numbers from `at` on are in both slices.
                let delta = unsafe { difference(base, fine_tuned, at, u16::MAX) };
                bits |= u64::from(is_positive(delta)) << (quarter * 16);
                lanes = _mm512_add_ps(lanes, _mm512_abs_ps(delta));
            }
            *word = bits;
        }
        *sum = total(lanes);
    }
    if let Some(sum) = sums.get_mut(whole) {
        let mut lanes = _mm512_setzero_ps();
        let words = &mut words[2 * whole..];
        words.fill(0);
        let mut at = whole * GROUP;
        while at < len {
            let mask = first(len - at);
            // SAFETY: the mask ends where the slices do.
            let delta = unsafe { difference(base, fine_tuned, at, mask) };
            let offset = at - whole * GROUP;
            words[offset / 64] |= u64::from(is_positive(delta) & mask) << (offset % 64);
            lanes = _mm512_add_ps(lanes, _mm512_abs_ps(delta));
            at += 16;
        }
        *sum = total(lanes);
    }
}

/// `fine_tuned - base`, zero outside the mask.
///
/// # Safety
/// The numbers of the mask, from `at` on, are in both slices.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn difference<T: Vector>(base: &[T], fine_tuned: &[T], at: usize, mask: __mmask16) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let base = T::widen(T::load(base.as_ptr().add(at), mask));
        let tuned = T::widen(T::load(fine_tuned.as_ptr().add(at), mask));
        _mm512_sub_ps(tuned, base)
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn is_positive(delta: __m512) -> __mmask16 {
    _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(delta, _mm512_setzero_ps())
}

/// As `super::total`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn total(lanes: __m512) -> f64 {
    let low = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
    let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(lanes));
    let eight = _mm512_add_pd(low, high);
    let four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd::<1>(eight));
    let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
    _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
}

fn merge<T: Vector>(base: &[T], words: &[u64], scale: f32, out: &mut [T], stream: bool) {
    check_merge(base.len(), words, out.len());
    let (from, to, len) = (base.as_ptr(), out.as_mut_ptr(), out.len());
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_merge` has seen to the lengths. Streaming
    // stores are asked for only if `out` is aligned for them.
    unsafe {
        if stream && (to as usize).is_multiple_of(16 * size_of::<T>()) {
            merge_part::<T, true, false>(from, words, scale, to, core::ptr::null_mut(), len);
            _mm_sfence();
        } else {
            merge_part::<T, false, false>(from, words, scale, to, core::ptr::null_mut(), len);
        }
    }
}

fn merge_in_place<T: Vector>(weights: &mut [T], words: &[u64], scale: f32, changes: &mut [T]) {
    check_merge(weights.len(), words, weights.len());
    assert!(changes.is_empty() || changes.len() == weights.len(), "a change for each weight");
    let (at, len) = (weights.as_mut_ptr(), weights.len());
    // SAFETY: as in `merge`; both pointers to weights come from one exclusive borrow.
    unsafe {
        if changes.is_empty() {
            merge_part::<T, false, false>(at, words, scale, at, core::ptr::null_mut(), len);
        } else {
            merge_part::<T, false, true>(at, words, scale, at, changes.as_mut_ptr(), len);
        }
    }
}

/// # Safety
/// `len` numbers readable at `from` and writable at `to`, which may be the same, and at `changes` if `CHANGES`; a bit for each in `words`; `to` aligned to 16
/// numbers if `STREAM`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn merge_part<T: Vector, const STREAM: bool, const CHANGES: bool>(
    from: *const T,
    words: &[u64],
    scale: f32,
    to: *mut T,
    changes: *mut T,
    len: usize,
) {
    let (plus, minus) = (_mm512_set1_ps(scale), _mm512_set1_ps(-scale));
    let step = |at: usize, word: u64, mask: __mmask16| {
        let bits = (word >> (at % 64)) as __mmask16;
        // SAFETY: the caller's promise; the mask ends where the numbers do.
        unsafe {
            let old = T::load(from.add(at), mask);
            let new = T::narrow(_mm512_add_ps(T::widen(old), _mm512_mask_blend_ps(bits, minus, plus)));
            T::store::<STREAM>(to.add(at), mask, new);
            if CHANGES {
                T::store::<false>(changes.add(at), mask, <T as Vector>::xor(old, new));
            }
        }
    };
    let whole = len / 64;
    for (index, word) in words[..whole].iter().enumerate() {
        for quarter in 0..4 {
            step(index * 64 + quarter * 16, *word, u16::MAX);
        }
    }
    let mut at = whole * 64;
    while at < len {
        step(at, words[whole], first(len - at));
        at += 16;
    }
}
