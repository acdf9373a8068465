//! EXO: the reverse KL between the policy's choice and the label's.

use super::stable::neg_log_sigmoid;
use pt_tensor::Tensor;

/// q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε), with q = σ(z), z = β·d, `[num_pairs]`.
///
/// Ji et al. 2024, <https://arxiv.org/abs/2402.00856>, Eq. 16 for K = 2.
pub(super) fn pair(z: &Tensor, label_smoothing: f64) -> Tensor {
    let side = |z: &Tensor, probability: f64| z.sigmoid() * (-neg_log_sigmoid(z) - probability.ln());
    side(z, 1.0 - label_smoothing) + side(&-z, label_smoothing)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A policy as sure as the label differs in nothing; an undecided one pays −ln 2 − ½·ln(ε(1 − ε)).
    #[test]
    fn the_divergence_vanishes_where_the_policy_is_as_sure_as_the_label() {
        let epsilon = 0.1f64;
        let found = pair(&Tensor::from_slice(&[9f64.ln(), 0.0]), epsilon);
        assert!(found.double_value(&[0]).abs() < 1e-12);
        let undecided = -(2f64.ln()) - 0.5 * (epsilon * (1.0 - epsilon)).ln();
        assert!((found.double_value(&[1]) - undecided).abs() < 1e-12);
    }
}
