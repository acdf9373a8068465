//! Packing and merging of 1-bit deltas, by instruction set; all of them give the bits of `scalar.rs`. Products are in `lookup`.

pub(crate) mod lookup;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::{Bf16, Element, F16, Isa};

/// Numbers whose magnitudes are added up together: [`SCALE_GROUP`](crate::delta::SCALE_GROUP) of a row.
const GROUP: usize = crate::delta::SCALE_GROUP;

/// Partial sums of a group, element `i` going into number `i % 16`; they are added up in f64, halves onto halves.
const LANES: usize = 16;

/// `(base, fine_tuned, words, sums)` of a row: sets the bits where `fine_tuned - base < 0` does not hold, and writes the sum of the magnitudes of each group.
pub(crate) type Pack<T> = fn(&[T], &[T], &mut [u64], &mut [f64]);

/// `(base, words, scale, out, stream)` of a part of a row that starts at a word: `out = base + scale · signs`. `stream` writes past the caches, where there
/// are instructions for it.
pub(crate) type Merge<T> = fn(&[T], &[u64], f32, &mut [T], bool);

/// `(weights, words, scale, changes)`: as [`Merge`], in place; `changes`, unless empty, gets the bits that changed.
pub(crate) type MergeInPlace<T> = fn(&mut [T], &[u64], f32, &mut [T]);

pub(crate) struct Kernels {
    pub(crate) pack_f32: Pack<f32>,
    pub(crate) pack_bf16: Pack<Bf16>,
    pub(crate) pack_f16: Pack<F16>,
    pub(crate) merge_f32: Merge<f32>,
    pub(crate) merge_bf16: Merge<Bf16>,
    pub(crate) merge_f16: Merge<F16>,
    pub(crate) merge_in_place_f32: MergeInPlace<f32>,
    pub(crate) merge_in_place_bf16: MergeInPlace<Bf16>,
    pub(crate) merge_in_place_f16: MergeInPlace<F16>,
}

pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &avx512::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => &avx512::KERNELS_BF16,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot => &neon::KERNELS,
        _ => &scalar::KERNELS,
    }
}

/// Numbers whose bits can be combined.
pub(crate) trait Bits: Element {
    fn xor(self, other: Self) -> Self;
}

impl Bits for f32 {
    fn xor(self, other: Self) -> Self {
        Self::from_bits(self.to_bits() ^ other.to_bits())
    }
}

impl Bits for Bf16 {
    fn xor(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }
}

impl Bits for F16 {
    fn xor(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }
}

/// Panics unless there is a bit and a sum for every number: the kernels' pointers rely on it.
fn check_pack<T>(base: &[T], fine_tuned: &[T], words: &[u64], sums: &[f64]) {
    assert_eq!(base.len(), fine_tuned.len(), "a number of each");
    assert_eq!(words.len(), base.len().div_ceil(64), "a bit for each number");
    assert_eq!(sums.len(), base.len().div_ceil(GROUP), "a sum for each group");
}

/// Panics unless there is a bit and an output for every number: the kernels' pointers rely on it.
fn check_merge(len: usize, words: &[u64], out: usize) {
    assert_eq!(len, out, "an output for each number");
    assert!(words.len() >= len.div_ceil(64), "a bit for each number");
}

/// The sum of a group from its partial sums.
fn total(mut lanes: [f64; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
