//! Where trained tensors start.

/// `len` values uniform in ±`bound`, from a seed and a name: SplitMix64 (Steele et al. 2014) over the FNV-1a hash of
/// the name. Our own, so that neither libtorch's generator nor a library's version changes where training starts.
pub(crate) fn uniform(seed: u64, name: &str, len: usize, bound: f32) -> Vec<f32> {
    let hash =
        name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut state = hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            // 24 random bits: every value is exact in f32.
            let unit = (z >> 40) as f32 / (1u32 << 24) as f32;
            (2.0 * unit - 1.0) * bound
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starting_values_depend_on_seed_and_name_and_stay_in_their_bounds() {
        let values = uniform(1, "a", 4000, 0.5);
        assert!(values.iter().all(|v| v.abs() <= 0.5));
        let mean = values.iter().sum::<f32>() / 4000.0;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 4000.0;
        assert!(mean.abs() < 0.02 && (variance - 0.25 / 3.0).abs() < 0.005, "{mean} {variance}");
        assert_eq!(values, uniform(1, "a", 4000, 0.5));
        assert_ne!(values, uniform(2, "a", 4000, 0.5));
        assert_ne!(values, uniform(1, "b", 4000, 0.5));
    }
}
