//! Quantizing and dequantizing with NEON.
//!
//! ```text
//! quantize, 4 weights:    s = x · (1 / absmax); rank by four comparisons: border 7; 3 or 11; of four; of eight
//! dequantize, 32 weights: codes to bytes; look up each byte of the outputs by `tbl`; store the bytes interleaved (`st4`, `st2`)
//! ```
//! The tables looked up hold the block's 16 outputs, values · absmax. There are no stores past the caches to be had.

use core::arch::aarch64::*;

use super::{Kernels, check, dequantize_tail, scalar};
use crate::codebook::Search;
use crate::{Bf16, Element, F16};

pub(super) static KERNELS: Kernels = Kernels {
    quantize_f32: quantize,
    quantize_bf16: quantize,
    quantize_f16: quantize,
    dequantize_f32,
    dequantize_bf16: dequantize_16_bits,
    dequantize_f16: dequantize_16_bits,
};

/// Formats that 4 numbers are loaded from.
trait Load: Element {
    /// # Safety
    /// 4 numbers readable at `from`.
    unsafe fn load(from: *const Self) -> float32x4_t;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_f32(from) }
    }
}

impl Load for Bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise: 8 bytes.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }
}

impl Load for F16 {
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
}

fn quantize<T: Load>(search: &Search<'_>, block_size: usize, input: &[T], packed: &mut [u8], absmax: &mut [f32]) {
    check(input.len(), packed.len(), absmax.len(), block_size);
    assert!(block_size.is_multiple_of(32), "blocks are whole vectors");
    let whole = input.len() - input.len() % block_size;
    // SAFETY: handed out only by `kernels`; NEON is in every 64-bit Arm. `check` has seen to the lengths; `whole` is a number of blocks.
    unsafe { quantize_blocks(search, block_size, &input[..whole], packed, absmax) }
    if whole < input.len() {
        absmax[whole / block_size] =
            scalar::quantize_short_block(search.book, &input[whole..], &mut packed[whole / 2..]);
    }
}

/// # Safety
/// `input` is a number of blocks of a multiple of 32, and there are bytes and scales for them; NEON.
#[target_feature(enable = "neon")]
unsafe fn quantize_blocks<T: Load>(
    search: &Search<'_>,
    block_size: usize,
    input: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let bisect = Bisect::new(&search.book.thresholds);
    // SAFETY: the table has 16 bytes.
    let codes = unsafe { vld1q_u8(search.book.codes.as_ptr()) };
    let out = packed.as_mut_ptr();
    for (block, absmax) in absmax[..input.len() / block_size].iter_mut().enumerate() {
        let start = block * block_size;
        // SAFETY: 4 numbers of the block.
        let load = |offset: usize| unsafe { T::load(input.as_ptr().add(start + offset)) };
        let mut largest = [vdupq_n_u32(0); 4];
        for group in 0..block_size / 16 {
            for (lane, largest) in largest.iter_mut().enumerate() {
                let magnitude = vreinterpretq_u32_f32(vabsq_f32(load(16 * group + 4 * lane)));
                *largest = vmaxq_u32(*largest, magnitude);
            }
        }
        let [a, b, c, d] = largest;
        let bits = vmaxvq_u32(vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d)));
        if bits >= 0x7f80_0000 {
            // Infinite or NaN.
            // SAFETY: the block's own bytes, to which no other reference lives.
            let bytes = unsafe { core::slice::from_raw_parts_mut(out.add(start / 2), block_size / 2) };
            *absmax = scalar::quantize_block(search.book, &input[start..start + block_size], bytes);
            continue;
        }
        *absmax = f32::from_bits(bits);
        let reciprocal = 1.0 / absmax.max(scalar::MIN_ABSMAX);
        for group in 0..block_size / 16 {
            let rank = |lane: usize| bisect.rank(vmulq_n_f32(load(16 * group + 4 * lane), reciprocal));
            let low = vcombine_u16(vmovn_u32(rank(0)), vmovn_u32(rank(1)));
            let high = vcombine_u16(vmovn_u32(rank(2)), vmovn_u32(rank(3)));
            let codes = vqtbl1q_u8(codes, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
            // As 16-bit numbers, little-endian, the first of a pair is the low byte: it goes up by 4, the second comes down by 8.
            let pairs = vreinterpretq_u16_u8(codes);
            let bytes = vmovn_u16(vorrq_u16(vshlq_n_u16::<4>(pairs), vshrq_n_u16::<8>(pairs)));
            // SAFETY: the group's 8 bytes.
            unsafe { vst1_u8(out.add((start + 16 * group) / 2), bytes) };
        }
    }
}

/// The borders, by which comparison needs them.
struct Bisect {
    first: float32x4_t,
    second: [float32x4_t; 2],
    /// Borders 1, 5, 9, 13.
    third: uint8x16_t,
    /// Borders 0, 2, 4 .. 14.
    fourth: uint8x16x2_t,
}

impl Bisect {
    #[inline]
    #[target_feature(enable = "neon")]
    fn new(t: &[f32; 15]) -> Self {
        // SAFETY: each array has 4 numbers.
        let bytes = |numbers: [f32; 4]| unsafe { vreinterpretq_u8_f32(vld1q_f32(numbers.as_ptr())) };
        Self {
            first: vdupq_n_f32(t[7]),
            second: [vdupq_n_f32(t[3]), vdupq_n_f32(t[11])],
            third: bytes([t[1], t[5], t[9], t[13]]),
            fourth: uint8x16x2_t(bytes([t[0], t[2], t[4], t[6]]), bytes([t[8], t[10], t[12], t[14]])),
        }
    }

    /// Ranks of 4 scaled numbers.
    #[inline]
    #[target_feature(enable = "neon")]
    fn rank(&self, scaled: float32x4_t) -> uint32x4_t {
        // All ones, -1, where the number is above the border; so ranks are doubled and the mask subtracted.
        let above = |border: float32x4_t| vcltq_f32(border, scaled);
        // Index i to bytes 4i .. 4i + 4.
        let bytes = |index: uint32x4_t| {
            let index = vmlaq_u32(vdupq_n_u32(0x0302_0100), index, vdupq_n_u32(0x0404_0404));
            vreinterpretq_u8_u32(index)
        };
        let first = above(self.first);
        let one = vshrq_n_u32::<31>(first);
        let two = vsubq_u32(vaddq_u32(one, one), above(vbslq_f32(first, self.second[1], self.second[0])));
        let border = vreinterpretq_f32_u8(vqtbl1q_u8(self.third, bytes(two)));
        let three = vsubq_u32(vaddq_u32(two, two), above(border));
        let border = vreinterpretq_f32_u8(vqtbl2q_u8(self.fourth, bytes(three)));
        vsubq_u32(vaddq_u32(three, three), above(border))
    }
}

/// The codes of 32 weights in 16 bytes, in order.
#[inline]
#[target_feature(enable = "neon")]
fn unpack(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    let (first, second) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15)));
    [vzip1q_u8(first, second), vzip2q_u8(first, second)]
}

fn dequantize_f32(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    out: &mut [f32],
    _stream: bool,
) {
    check(out.len(), packed.len(), absmax.len(), block_size);
    // SAFETY: handed out only by `kernels`; NEON is in every 64-bit Arm. `check` has seen to the lengths.
    let done = unsafe { blocks_f32(values, packed, absmax, block_size, out.as_mut_ptr(), out.len()) };
    dequantize_tail(values, packed, absmax, block_size, out, done);
}

/// The whole vectors; returns how many weights they are.
///
/// # Safety
/// Codes, scales and room are there for `len` weights; NEON.
#[target_feature(enable = "neon")]
unsafe fn blocks_f32(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    to: *mut f32,
    len: usize,
) -> usize {
    let mut start = 0;
    for &absmax in &absmax[..len.div_ceil(block_size)] {
        let table = values.map(|value| value * absmax);
        // SAFETY: 64 bytes.
        let planes = unsafe { vld4q_u8(table.as_ptr().cast()) };
        let end = len.min(start + block_size);
        while start + 32 <= end {
            // SAFETY: the 16 bytes of weights `start .. start + 32`, which is even, and room for these.
            unsafe {
                let codes = unpack(vld1q_u8(packed.as_ptr().add(start / 2)));
                for (half, codes) in codes.into_iter().enumerate() {
                    let bytes = uint8x16x4_t(
                        vqtbl1q_u8(planes.0, codes),
                        vqtbl1q_u8(planes.1, codes),
                        vqtbl1q_u8(planes.2, codes),
                        vqtbl1q_u8(planes.3, codes),
                    );
                    vst4q_u8(to.add(start + 16 * half).cast(), bytes);
                }
            }
            start += 32;
        }
        if start < end {
            assert!(end == len, "blocks are whole vectors");
            break;
        }
    }
    start
}

fn dequantize_16_bits<T: Element>(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    out: &mut [T],
    _stream: bool,
) {
    const { assert!(size_of::<T>() == 2, "two bytes a number") };
    check(out.len(), packed.len(), absmax.len(), block_size);
    // SAFETY: handed out only by `kernels`; NEON is in every 64-bit Arm. `check` has seen to the lengths, and elements of two bytes are any bits.
    let done = unsafe { blocks_16_bits(values, packed, absmax, block_size, out.as_mut_ptr(), out.len()) };
    dequantize_tail(values, packed, absmax, block_size, out, done);
}

/// The whole vectors; returns how many weights they are.
///
/// # Safety
/// Codes, scales and room are there for `len` weights of two bytes; NEON.
#[target_feature(enable = "neon")]
unsafe fn blocks_16_bits<T: Element>(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    to: *mut T,
    len: usize,
) -> usize {
    let mut start = 0;
    for &absmax in &absmax[..len.div_ceil(block_size)] {
        // Rounded in plain code: 16 numbers a block.
        let table = values.map(|value| T::from_f32(value * absmax));
        // SAFETY: 32 bytes.
        let planes = unsafe { vld2q_u8(table.as_ptr().cast()) };
        let end = len.min(start + block_size);
        while start + 32 <= end {
            // SAFETY: the 16 bytes of weights `start .. start + 32`, which is even, and room for these.
            unsafe {
                let codes = unpack(vld1q_u8(packed.as_ptr().add(start / 2)));
                for (half, codes) in codes.into_iter().enumerate() {
                    let bytes = uint8x16x2_t(vqtbl1q_u8(planes.0, codes), vqtbl1q_u8(planes.1, codes));
                    vst2q_u8(to.add(start + 16 * half).cast(), bytes);
                }
            }
            start += 32;
        }
        if start < end {
            assert!(end == len, "blocks are whole vectors");
            break;
        }
    }
    start
}
