//! Merging into bf16 with AVX-512.
//!
//! ```text
//! 32 weights in a vector, as 16 double words: even = w << 16, odd = w & 0xffff0000, both of them f32
//!     each plus the scale, whose sign bit is turned where the weight's bit is not set; rounded; together again
//! ```
//! So no weight changes its lane, and nothing runs through the ports that shuffle.

use core::arch::x86_64::*;

use super::super::check_merge;
use crate::Bf16;

/// `NATIVE`: with AVX-512 BF16.
pub(super) fn merge<const NATIVE: bool>(base: &[Bf16], words: &[u64], scale: f32, out: &mut [Bf16], stream: bool) {
    check_merge(base.len(), words, out.len());
    let (from, to, len) = (base.as_ptr(), out.as_mut_ptr(), out.len());
    // SAFETY: handed out only by `kernels`, for an instruction set that `Exec` has checked; `check_merge` has seen to the lengths. Streaming
    // stores are asked for only if `out` is aligned for them.
    unsafe {
        if stream && (to as usize).is_multiple_of(64) {
            by_isa::<NATIVE, true, false>(from, words, scale, to, core::ptr::null_mut(), len);
            _mm_sfence();
        } else {
            by_isa::<NATIVE, false, false>(from, words, scale, to, core::ptr::null_mut(), len);
        }
    }
}

pub(super) fn merge_in_place<const NATIVE: bool>(
    weights: &mut [Bf16],
    words: &[u64],
    scale: f32,
    changes: &mut [Bf16],
) {
    check_merge(weights.len(), words, weights.len());
    assert!(changes.is_empty() || changes.len() == weights.len(), "a change for each weight");
    let (at, len) = (weights.as_mut_ptr(), weights.len());
    // SAFETY: as in `merge`; both pointers to weights come from one exclusive borrow.
    unsafe {
        if changes.is_empty() {
            by_isa::<NATIVE, false, false>(at, words, scale, at, core::ptr::null_mut(), len);
        } else {
            by_isa::<NATIVE, false, true>(at, words, scale, at, changes.as_mut_ptr(), len);
        }
    }
}

/// # Safety
/// As [`merge_part`]; AVX-512 BF16 if `NATIVE`.
unsafe fn by_isa<const NATIVE: bool, const STREAM: bool, const CHANGES: bool>(
    from: *const Bf16,
    words: &[u64],
    scale: f32,
    to: *mut Bf16,
    changes: *mut Bf16,
    len: usize,
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn native<const STREAM: bool, const CHANGES: bool>(
        from: *const Bf16,
        words: &[u64],
        scale: f32,
        to: *mut Bf16,
        changes: *mut Bf16,
        len: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            merge_part::<STREAM, CHANGES>(from, words, scale, to, changes, len, |even, odd| narrow_native(even, odd))
        }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn plain<const STREAM: bool, const CHANGES: bool>(
        from: *const Bf16,
        words: &[u64],
        scale: f32,
        to: *mut Bf16,
        changes: *mut Bf16,
        len: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { merge_part::<STREAM, CHANGES>(from, words, scale, to, changes, len, |even, odd| narrow(even, odd)) }
    }
    // SAFETY: the caller's promise.
    unsafe {
        if NATIVE {
            native::<STREAM, CHANGES>(from, words, scale, to, changes, len);
        } else {
            plain::<STREAM, CHANGES>(from, words, scale, to, changes, len);
        }
    }
}

/// # Safety
/// `len` numbers readable at `from` and writable at `to`, which may be the same, and at `changes` if `CHANGES`; a bit for each in `words`; `to` aligned to a
/// vector if `STREAM`. AVX-512 F, BW, DQ, VL, and what `narrow` wants.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn merge_part<const STREAM: bool, const CHANGES: bool>(
    from: *const Bf16,
    words: &[u64],
    scale: f32,
    to: *mut Bf16,
    changes: *mut Bf16,
    len: usize,
    narrow: impl Fn(__m512, __m512) -> __m512i,
) {
    let scale = _mm512_castps_si512(_mm512_set1_ps(scale));
    let (sign, high) = (_mm512_set1_epi32(i32::MIN), _mm512_set1_epi32(0xffff_0000u32 as i32));
    let signs = _mm512_set1_epi16(i16::MIN);
    let step = |at: usize, word: u64, mask: __mmask32| {
        // SAFETY: the caller's promise; the mask ends where the numbers do.
        unsafe {
            let old = _mm512_maskz_loadu_epi16(mask, from.add(at).cast());
            let negative = _mm512_maskz_mov_epi16(!(word >> (at % 64)) as __mmask32, signs);
            // scale ^ (negative & sign)
            let odd_scale = _mm512_ternarylogic_epi32::<0x78>(scale, negative, sign);
            let even_scale = _mm512_xor_si512(scale, _mm512_slli_epi32::<16>(negative));
            let [even, odd] =
                [_mm512_slli_epi32::<16>(old), _mm512_and_si512(old, high)].map(|w| _mm512_castsi512_ps(w));
            let even = _mm512_add_ps(even, _mm512_castsi512_ps(even_scale));
            let new = narrow(even, _mm512_add_ps(odd, _mm512_castsi512_ps(odd_scale)));
            if STREAM && mask == u32::MAX {
                _mm512_stream_si512(to.add(at).cast(), new);
            } else {
                _mm512_mask_storeu_epi16(to.add(at).cast(), mask, new);
            }
            if CHANGES {
                _mm512_mask_storeu_epi16(changes.add(at).cast(), mask, _mm512_xor_si512(old, new));
            }
        }
    };
    let whole = len / 64;
    for (index, word) in words[..whole].iter().enumerate() {
        step(index * 64, *word, u32::MAX);
        step(index * 64 + 32, *word, u32::MAX);
    }
    for at in (whole * 64..len).step_by(32) {
        let mask = if len - at >= 32 { u32::MAX } else { (1 << (len - at)) - 1 };
        step(at, words[whole], mask);
    }
}

/// The nearest bf16 numbers, ties to even, in the low and high halves of double words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn narrow(even: __m512, odd: __m512) -> __m512i {
    let round = |values: __m512| {
        let bits = _mm512_castps_si512(values);
        let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
        _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x40_0000))
    };
    _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(round(even)), round(odd))
}

/// As [`narrow`]. The instruction takes subnormal numbers for zero, so they go the other way.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
fn narrow_native(even: __m512, odd: __m512) -> __m512i {
    const SUBNORMAL: i32 = 0x20;
    if _mm512_fpclass_ps_mask::<SUBNORMAL>(even) | _mm512_fpclass_ps_mask::<SUBNORMAL>(odd) != 0 {
        return narrow(even, odd);
    }
    // Number i is double word i / 2's half i % 2.
    static ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut word = 0;
        while word < 32 {
            order[word] = (word / 2 + 16 * (word % 2)) as u16;
            word += 1;
        }
        order
    };
    // SAFETY: the table has 64 bytes; the vector types that are transmuted too, and no invalid values.
    unsafe {
        let both = core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
        _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), both)
    }
}
