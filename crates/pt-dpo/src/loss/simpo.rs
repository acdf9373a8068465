//! SimPO and CPO: the policy's own log-probs for rewards, no reference.

use super::dpo;
use pt_tensor::Tensor;

/// −log σ(β·d̄ − γ), `[num_pairs]`, with d̄ = mean log π_c − mean log π_r over tokens.
///
/// Meng et al. 2024, <https://arxiv.org/abs/2405.14734>, Eq. 6 (their β is 2 to 2.5, γ/β about a half). Smoothed labels as in TRL.
pub(super) fn simpo(mean_difference: &Tensor, beta: f64, gamma: f64, label_smoothing: f64) -> Tensor {
    dpo::sigmoid(&(mean_difference * beta - gamma), label_smoothing)
}

/// −log σ(β·(log π_c − log π_r)), `[num_pairs]`, to which the chosen completion's −log p is added.
///
/// Xu et al. 2024, <https://arxiv.org/abs/2401.08417>, Eq. 5. Smoothed labels as in TRL.
pub(super) fn cpo(difference: &Tensor, beta: f64, label_smoothing: f64) -> Tensor {
    dpo::sigmoid(&(difference * beta), label_smoothing)
}

#[cfg(test)]
mod tests {
    use crate::{Loss, LossConfig, PairBatch, PairLogps, preference_loss};
    use pt_tensor::Tensor;

    fn loss(config: &LossConfig) -> f64 {
        let logps = PairLogps::from_slices(&[-4.0], &[-9.0]).unwrap();
        let pairs = PairBatch::new(logps).with_lengths(Tensor::from_slice(&[2i64]), Tensor::from_slice(&[3i64]));
        preference_loss(config, &pairs).unwrap().losses.double_value(&[0])
    }

    /// −4 over 2 tokens leads −9 over 3 by one nat a token: β = 2 and γ = 2 leave nothing, so ln 2.
    #[test]
    fn simpo_averages_over_tokens_and_asks_for_a_margin() {
        let config = LossConfig { beta: 2.0, simpo_gamma: 2.0, ..LossConfig::of(Loss::Simpo) };
        assert!((loss(&config) - 2f64.ln()).abs() < 1e-6);
    }

    /// The lead is 5 nats, −log σ(0.1 · 5), and the chosen tokens cost 2 nats each.
    #[test]
    fn cpo_sums_and_adds_the_chosen_nll() {
        let expected = (-0.5f64).exp().ln_1p();
        assert!((loss(&LossConfig::of(Loss::Cpo)) - (expected + 2.0)).abs() < 1e-6);
        assert!((loss(&LossConfig { nll_weight: Some(0.0), ..LossConfig::of(Loss::Cpo) }) - expected).abs() < 1e-6);
    }
}
