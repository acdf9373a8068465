//! IPO: a squared loss that does not run away on pairs which never disagree.

use pt_tensor::Tensor;

/// (d − 1/(2β))², `[num_pairs]`; β is the paper's τ.
///
/// Azar et al. 2023, <https://arxiv.org/abs/2310.12036>, Eq. 17. There, and in OpenRLHF, d is of summed log-probs (our `ipo`); TRL and
/// LLaMA-Factory average them over tokens first (our `ipo_norm`), as the authors told TRL they had done in their experiments.
pub(super) fn squared(difference: &Tensor, beta: f64) -> Tensor {
    (difference - 1.0 / (2.0 * beta)).square()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// β = 0.25 asks for a lead of two nats, no more and no less.
    #[test]
    fn the_loss_is_the_squared_distance_from_the_lead_asked_for() {
        let found = squared(&Tensor::from_slice(&[0f64, 2.0, 5.0]), 0.25);
        assert_eq!(Vec::<f64>::try_from(found).unwrap(), [4.0, 0.0, 9.0]);
    }
}
