//! SLiC's hinge.

use pt_tensor::Tensor;

/// max(0, 1 − z), with z = β·d, `[num_pairs]`.
///
/// Zhao et al. 2023, <https://arxiv.org/abs/2305.10425>, Eq. 5, with the log-ratio for the log-prob, as Liu et al. 2023 (RSO,
/// <https://arxiv.org/abs/2309.06657>) normalise it.
pub(super) fn hinge(z: &Tensor) -> Tensor {
    (-z + 1.0).relu()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lead_of_one_is_enough() {
        let found = hinge(&Tensor::from_slice(&[-1f64, 0.0, 0.25, 1.0, 3.0]));
        assert_eq!(Vec::<f64>::try_from(found).unwrap(), [2.0, 1.0, 0.75, 0.0, 0.0]);
    }
}
