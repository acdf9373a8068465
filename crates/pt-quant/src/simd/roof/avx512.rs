//! 64-byte loads, and stores that leave the caches alone:
//!
//! ```text
//! until out is aligned: out[i] = value
//! for 16 numbers at a time: stream(out, value)
//! the rest: out[i] = value
//! ```

use core::arch::x86_64::*;

use super::Kernels;

pub(super) static KERNELS: Kernels = Kernels {
    // SAFETY: as for `read` below.
    multiply_f32: |operations| unsafe { multiply_f32(operations) },
    // SAFETY: as for `read` below.
    multiply_bf16: |operations| unsafe { multiply_f32(operations) },
    // SAFETY: handed out by `kernels` only for levels that an `Exec` has found on this processor.
    read: |data| unsafe { read(data) },
    // SAFETY: as for `read`.
    write: |out, value| unsafe { write(out, value) },
    // SAFETY: as for `read`.
    copy: |from, to| unsafe { copy(from, to) },
};

pub(super) static KERNELS_BF16: Kernels = Kernels {
    // SAFETY: as for `read` above; this level has AVX-512 BF16.
    multiply_bf16: |operations| unsafe { multiply_bf16(operations) },
    ..KERNELS
};

/// Sums side by side: enough to hide how long one addition takes.
const SUMS: usize = 24;

#[target_feature(enable = "avx512f")]
fn multiply_f32(operations: usize) -> u32 {
    let factor = _mm512_set1_ps(core::hint::black_box(0.5));
    let mut sums = [factor; SUMS];
    for _ in 0..operations.div_ceil(2 * 16 * SUMS) {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    bits(sums)
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_bf16(operations: usize) -> u32 {
    let halves = _mm512_set1_ps(core::hint::black_box(0.5));
    let factor = _mm512_cvtne2ps_pbh(halves, halves);
    let mut sums = [halves; SUMS];
    for _ in 0..operations.div_ceil(2 * 32 * SUMS) {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    bits(sums)
}

#[target_feature(enable = "avx512f")]
fn bits(sums: [__m512; SUMS]) -> u32 {
    let total = sums.into_iter().fold(_mm512_setzero_ps(), |total, sum| _mm512_add_ps(total, sum));
    _mm512_reduce_add_ps(total).to_bits()
}

#[target_feature(enable = "avx512f")]
fn read(data: &[f32]) -> u32 {
    let mut all = [_mm512_setzero_si512(); 8];
    let mut lines = data.chunks_exact(16 * all.len());
    for line in &mut lines {
        for (all, part) in all.iter_mut().zip(line.chunks_exact(16)) {
            // SAFETY: `part` has 16 numbers, 64 bytes.
            *all = _mm512_xor_si512(*all, unsafe { _mm512_loadu_si512(part.as_ptr().cast()) });
        }
    }
    let mut parts = [0u32; 16];
    for all in all {
        let mut stored = [0u32; 16];
        // SAFETY: 16 numbers of 4 bytes are 64 bytes.
        unsafe { _mm512_storeu_si512(stored.as_mut_ptr().cast(), all) };
        parts.iter_mut().zip(stored).for_each(|(part, stored)| *part ^= stored);
    }
    let rest = lines.remainder().iter().fold(0, |all, value| all ^ value.to_bits());
    parts.into_iter().fold(rest, |all, part| all ^ part)
}

#[target_feature(enable = "avx512f")]
fn write(out: &mut [f32], value: f32) {
    let (head, lines, rest) = aligned(out);
    head.fill(value);
    rest.fill(value);
    let value = _mm512_set1_ps(value);
    for line in lines.chunks_exact_mut(16) {
        // SAFETY: `line` has 16 numbers and starts at a multiple of 64 bytes.
        unsafe { _mm512_stream_ps(line.as_mut_ptr(), value) };
    }
    // Other threads see the stores after this one.
    _mm_sfence();
}

#[target_feature(enable = "avx512f")]
fn copy(from: &[f32], to: &mut [f32]) {
    let (head, lines, rest) = aligned(to);
    let (from_head, from) = from.split_at(head.len());
    let (from_lines, from_rest) = from.split_at(lines.len());
    head.copy_from_slice(from_head);
    rest.copy_from_slice(from_rest);
    for (from, line) in from_lines.chunks_exact(16).zip(lines.chunks_exact_mut(16)) {
        // SAFETY: both have 16 numbers, and `line` starts at a multiple of 64 bytes.
        unsafe { _mm512_stream_ps(line.as_mut_ptr(), _mm512_loadu_ps(from.as_ptr())) };
    }
    _mm_sfence();
}

/// The numbers before the first multiple of 64 bytes, whole lines of 16 from there, and what is left.
fn aligned(out: &mut [f32]) -> (&mut [f32], &mut [f32], &mut [f32]) {
    let head = out.as_ptr().align_offset(64).min(out.len());
    let (head, out) = out.split_at_mut(head);
    let lines = out.len() / 16 * 16;
    let (lines, rest) = out.split_at_mut(lines);
    (head, lines, rest)
}
