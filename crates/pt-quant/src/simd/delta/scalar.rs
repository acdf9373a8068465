//! What packing and merging mean, in plain Rust: the other instruction sets give the same bits.

use super::{Bits, GROUP, Kernels, LANES, check_merge, check_pack, total};
use crate::Element;

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

/// `bit = !(Δ < 0)`, `sum = Σ |Δ|` over each group, with `Δ = fine_tuned - base` in f32.
fn pack<T: Element>(base: &[T], fine_tuned: &[T], words: &mut [u64], sums: &mut [f64]) {
    check_pack(base, fine_tuned, words, sums);
    words.fill(0);
    for (group, sum) in sums.iter_mut().enumerate() {
        let start = group * GROUP;
        let mut lanes = [0.0f32; LANES];
        for index in start..base.len().min(start + GROUP) {
            let delta = fine_tuned[index].to_f32() - base[index].to_f32();
            // No number counts as positive too.
            let is_negative = delta < 0.0;
            words[index / 64] |= u64::from(!is_negative) << (index % 64);
            lanes[index % LANES] += delta.abs();
        }
        *sum = total(lanes.map(f64::from));
    }
}

/// `base + scale` where the bit is set, `base - scale` where it is not, rounded once to f32 and once more to a narrower format.
pub(super) fn merged<T: Element>(base: T, word: u64, index: usize, scale: f32) -> T {
    let signed = if word >> (index % 64) & 1 == 1 { scale } else { -scale };
    T::from_f32(base.to_f32() + signed)
}

fn merge<T: Element>(base: &[T], words: &[u64], scale: f32, out: &mut [T], _stream: bool) {
    check_merge(base.len(), words, out.len());
    for (index, (out, base)) in out.iter_mut().zip(base).enumerate() {
        *out = merged(*base, words[index / 64], index, scale);
    }
}

fn merge_in_place<T: Bits>(weights: &mut [T], words: &[u64], scale: f32, changes: &mut [T]) {
    check_merge(weights.len(), words, weights.len());
    for (index, weight) in weights.iter_mut().enumerate() {
        let old = *weight;
        *weight = merged(old, words[index / 64], index, scale);
        if let Some(change) = changes.get_mut(index) {
            *change = old.xor(*weight);
        }
    }
}
