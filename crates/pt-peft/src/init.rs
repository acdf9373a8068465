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

/// `len` values of a normal distribution with this deviation, from a seed and a name (Box and Muller 1958, over
/// [`uniform`]); those beyond `cut` deviations are drawn again.
pub(crate) fn normal(seed: u64, name: &str, len: usize, deviation: f32, cut: Option<f32>) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    let mut round = 0;
    while values.len() < len {
        let name = if round == 0 { name.to_string() } else { format!("{name}#{round}") };
        let pairs = uniform(seed, &name, 2 * (len - values.len()), 1.0);
        let drawn = pairs.chunks_exact(2).map(|pair| {
            // (0, 1] and [0, 1): the logarithm of neither is infinite.
            let (u, v) = ((1.0 - pair[0]) / 2.0, (1.0 + pair[1]) / 2.0);
            (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
        });
        values.extend(drawn.filter(|z| cut.is_none_or(|cut| z.abs() <= cut)).map(|z| z * deviation));
        round += 1;
    }
    values
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

    #[test]
    fn normal_values_have_their_deviation_and_may_be_cut_off() {
        let values = normal(1, "a", 20_000, 0.5, None);
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 20_000.0;
        assert!((variance - 0.25).abs() < 0.01 && values.iter().any(|v| v.abs() > 1.5), "{variance}");
        let cut = normal(1, "a", 20_000, 0.5, Some(2.0));
        assert!(cut.len() == 20_000 && cut.iter().all(|v| v.abs() <= 1.0));
    }
}
