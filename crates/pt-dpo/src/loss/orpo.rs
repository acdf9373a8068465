//! ORPO: the odds ratio of the two completions.

use super::stable::{log1mexp, neg_log_sigmoid};
use pt_tensor::Tensor;

/// −log σ(log odds_c − log odds_r), `[num_pairs]`, of log-probs averaged over tokens; odds are p / (1 − p).
///
/// Hong et al. 2024, <https://arxiv.org/abs/2403.07691>, Eq. 7. β (the paper's λ, TRL's beta) times this is added to −log p of the chosen completion, which in TRL is a
/// mean over prompt and completion; ours is over the completion alone, and [`PairBatch::chosen_nll`](super::PairBatch::chosen_nll) takes theirs.
pub(super) fn odds_ratio(chosen: &Tensor, rejected: &Tensor) -> Tensor {
    neg_log_sigmoid(&((chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities of 3/4 and 1/2 have odds of 3 and 1; −log σ(ln 3) = −ln 3/4.
    #[test]
    fn odds_of_three_to_one_pay_by_the_formula() {
        let ln = |p: f64| Tensor::from_slice(&[p.ln()]);
        assert!((odds_ratio(&ln(0.75), &ln(0.5)).double_value(&[0]) + 0.75f64.ln()).abs() < 1e-12);
        assert!((odds_ratio(&ln(0.5), &ln(0.5)).double_value(&[0]) - 2f64.ln()).abs() < 1e-12);
    }
}
