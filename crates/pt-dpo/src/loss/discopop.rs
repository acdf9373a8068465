//! DiscoPOP: a loss that a language model came up with.

use super::stable::neg_log_sigmoid;
use pt_tensor::Tensor;

/// −(1 − g)·log σ(z) + g·exp(−z), with z = β·d and g = σ(z/τ), `[num_pairs]`.
///
/// Lu et al. 2024, <https://arxiv.org/abs/2406.08414>, Eq. 5; τ is 0.05 there, and at most 1 here. The second term is computed as exp(−z + log σ(z/τ)),
/// and 1 − g as σ(−z/τ): as written it is 0 · ∞ for a pair far on the wrong side, where TRL has NaN.
pub(super) fn blend(z: &Tensor, tau: f64) -> Tensor {
    let blend = z / tau;
    neg_log_sigmoid(z) * (-&blend).sigmoid() + (blend.log_sigmoid() - z).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Kind;

    /// Half of ln 2, half of one.
    #[test]
    fn an_unmoved_policy_pays_half_of_each() {
        let found = blend(&Tensor::from_slice(&[0f64]), 0.05).double_value(&[0]);
        assert!((found - 0.5 * (2f64.ln() + 1.0)).abs() < 1e-12);
    }

    /// Far to the left the logistic loss is left over, −z with the slope −1; far to the right the exponential, which is nothing.
    #[test]
    fn the_ends_are_the_logistic_and_the_exponential_loss() {
        let z = Tensor::from_slice(&[-1000f64, 1000.0]).set_requires_grad(true);
        let loss = blend(&z, 0.05);
        loss.sum(Kind::Double).backward();
        assert_eq!(Vec::<f64>::try_from(loss.detach()).unwrap(), [1000.0, 0.0]);
        assert_eq!(Vec::<f64>::try_from(z.grad()).unwrap(), [-1.0, 0.0]);
    }
}
