//! BCO on pairs: a binary classifier whose logit is the reward.

use super::stable::neg_log_sigmoid;
use pt_tensor::Tensor;

/// −log σ(β·a_c) − log σ(−β·a_r), `[num_pairs]`.
///
/// Jung et al. 2024, <https://arxiv.org/abs/2404.04656>, Eq. 12, without its running mean of rewards δ, as in TRL; LLaMA-Factory subtracts one.
pub(super) fn pair(chosen: &Tensor, rejected: &Tensor, beta: f64) -> Tensor {
    neg_log_sigmoid(&(chosen * beta)) + neg_log_sigmoid(&(rejected * -beta))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// σ(ln 3) = 3/4 on the chosen side, σ(0) = 1/2 on the rejected one.
    #[test]
    fn each_side_is_classified_by_itself() {
        let found = pair(&Tensor::from_slice(&[3f64.ln()]), &Tensor::from_slice(&[0f64]), 1.0);
        assert!((found.double_value(&[0]) + (0.75f64 * 0.5).ln()).abs() < 1e-12);
    }
}
