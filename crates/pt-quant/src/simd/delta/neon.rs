//! Packing and merging with NEON.
//!
//! ```text
//! pack, 16 weights:   Δ = fine_tuned - base; masks !(Δ < 0) as bytes, one bit kept of each, added up; partial sums += |Δ|
//! merge, 4 weights:   lane i tests bit i of a broadcast number; out = round(base + (bit ? scale : -scale))
//! ```
//! What is left at the end of a row goes through a copy on the stack, or one by one. There are no stores past the caches to be had.

use core::arch::aarch64::*;

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

/// Formats of which 4 numbers are loaded and stored.
trait Vector: Bits {
    const ZERO: Self;

    /// # Safety
    /// 4 numbers readable at `from`.
    unsafe fn load(from: *const Self) -> float32x4_t;
    /// Stores the nearest, ties to even.
    ///
    /// # Safety
    /// 4 numbers writable at `to`.
    unsafe fn store(to: *mut Self, values: float32x4_t);
}

impl Vector for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut Self, values: float32x4_t) {
        // SAFETY: the caller's promise.
        unsafe { vst1q_f32(to, values) }
    }
}

impl Vector for Bf16 {
    const ZERO: Self = Self(0);

    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise: 8 bytes.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut Self, values: float32x4_t) {
        // SAFETY: the caller's promise: 8 bytes.
        unsafe {
            let bits = vreinterpretq_u32_f32(values);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
            let is_number = vceqq_f32(values, values);
            vst1_u16(to.cast(), vshrn_n_u32::<16>(vbslq_u32(is_number, rounded, quiet)));
        }
    }
}

impl Vector for F16 {
    const ZERO: Self = Self(0);

    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        let out: float32x4_t;
        // SAFETY: the caller's promise: 8 bytes. `fcvtl` is in every NEON; its intrinsic is younger than the oldest compiler we build with.
        unsafe {
            let half = vld1_u16(from.cast());
            core::arch::asm!("fcvtl {out:v}.4s, {half:v}.4h", out = lateout(vreg) out, half = in(vreg) half,
                options(pure, nomem, nostack, preserves_flags));
        }
        out
    }

    #[inline(always)]
    unsafe fn store(to: *mut Self, values: float32x4_t) {
        // SAFETY: the caller's promise: 8 bytes; `fcvtn` as `fcvtl` above. It rounds as the floating-point mode tells, which Rust leaves at nearest.
        unsafe {
            let half: uint16x4_t;
            core::arch::asm!("fcvtn {half:v}.4h, {values:v}.4s", half = lateout(vreg) half, values = in(vreg) values,
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(to.cast(), half);
        }
    }
}

fn pack<T: Vector>(base: &[T], fine_tuned: &[T], words: &mut [u64], sums: &mut [f64]) {
    check_pack(base, fine_tuned, words, sums);
    let whole = base.len() / GROUP;
    for (group, (sum, words)) in sums[..whole].iter_mut().zip(words.chunks_exact_mut(2)).enumerate() {
        // SAFETY: group `group` is whole in both slices; NEON is in every 64-bit Arm.
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
#[target_feature(enable = "neon")]
unsafe fn pack_group<T: Vector>(base: *const T, fine_tuned: *const T, words: &mut [u64]) -> f64 {
    const BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    // SAFETY: the array has 16 bytes.
    let bits = unsafe { vld1q_u8(BITS.as_ptr()) };
    let mut lanes = [vdupq_n_f32(0.0); 4];
    for (index, word) in words.iter_mut().enumerate() {
        *word = 0;
        for quarter in 0..4 {
            let at = index * 64 + quarter * 16;
            let mut masks = [vdupq_n_u32(0); 4];
            for (part, (mask, lanes)) in masks.iter_mut().zip(&mut lanes).enumerate() {
                // SAFETY: the caller's promise: `at + 16 <= GROUP`.
                let delta =
                    unsafe { vsubq_f32(T::load(fine_tuned.add(at + 4 * part)), T::load(base.add(at + 4 * part))) };
                *mask = vmvnq_u32(vcltzq_f32(delta));
                *lanes = vaddq_f32(*lanes, vabsq_f32(delta));
            }
            let [a, b, c, d] = masks.map(|mask| vmovn_u32(mask));
            let bytes = vcombine_u8(vmovn_u16(vcombine_u16(a, b)), vmovn_u16(vcombine_u16(c, d)));
            let bytes = vandq_u8(bytes, bits);
            let sixteen = u64::from(vaddv_u8(vget_low_u8(bytes))) | u64::from(vaddv_u8(vget_high_u8(bytes))) << 8;
            *word |= sixteen << (quarter * 16);
        }
    }
    // As `super::total`.
    let two = |lanes: float32x4_t| [vcvt_f64_f32(vget_low_f32(lanes)), vcvt_high_f64_f32(lanes)];
    let [[a, b], [c, d], [e, f], [g, h]] = lanes.map(two);
    let (a, b, c, d) = (vaddq_f64(a, e), vaddq_f64(b, f), vaddq_f64(c, g), vaddq_f64(d, h));
    let (a, b) = (vaddq_f64(a, c), vaddq_f64(b, d));
    vaddvq_f64(vaddq_f64(a, b))
}

fn merge<T: Vector>(base: &[T], words: &[u64], scale: f32, out: &mut [T], _stream: bool) {
    check_merge(base.len(), words, out.len());
    let whole = out.len() / 64 * 64;
    // SAFETY: `check_merge` has seen to the lengths; NEON is in every 64-bit Arm.
    unsafe { merge_part(base.as_ptr(), &words[..whole / 64], scale, out.as_mut_ptr()) };
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
/// 64 numbers readable at `from` and writable at `to` for each word.
#[target_feature(enable = "neon")]
unsafe fn merge_part<T: Vector>(from: *const T, words: &[u64], scale: f32, to: *mut T) {
    let (plus, minus) = (vdupq_n_f32(scale), vdupq_n_f32(-scale));
    // SAFETY: the array has 4 numbers.
    let bits = unsafe { vld1q_u32([1, 2, 4, 8].as_ptr()) };
    for (index, word) in words.iter().enumerate() {
        for part in 0..16 {
            let mask = vtstq_u32(vdupq_n_u32((word >> (part * 4)) as u32), bits);
            let at = index * 64 + part * 4;
            // SAFETY: the caller's promise.
            unsafe { T::store(to.add(at), vaddq_f32(T::load(from.add(at)), vbslq_f32(mask, plus, minus))) };
        }
    }
}
