//! NCA: noise contrast, which holds the chosen completion's own likelihood up.

use super::stable::neg_log_sigmoid;
use pt_tensor::Tensor;

/// −log σ(β·a_c) − ½·log σ(−β·a_c) − ½·log σ(−β·a_r), `[num_pairs]`.
///
/// Chen et al. 2024, <https://arxiv.org/abs/2402.05369>, Eq. 11 for pairs.
pub(super) fn pair(chosen: &Tensor, rejected: &Tensor, beta: f64) -> Tensor {
    let (chosen, rejected) = (chosen * beta, rejected * beta);
    neg_log_sigmoid(&chosen) + neg_log_sigmoid(&-chosen) * 0.5 + neg_log_sigmoid(&-rejected) * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Kind;

    /// ln 2 for each of 1 + ½ + ½; the slope is −½ + ¼ on the chosen side and ¼ on the other.
    #[test]
    fn an_unmoved_policy_pays_two_ln_2_and_is_pulled_both_ways() {
        let leaves = [(); 2].map(|()| Tensor::from_slice(&[0f64]).set_requires_grad(true));
        let loss = pair(&leaves[0], &leaves[1], 1.0);
        assert!((loss.double_value(&[0]) - 2.0 * 2f64.ln()).abs() < 1e-12);
        loss.sum(Kind::Double).backward();
        assert_eq!(leaves.map(|leaf| leaf.grad().double_value(&[0])), [-0.25, 0.25]);
    }
}
