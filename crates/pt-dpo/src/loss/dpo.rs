//! DPO and its forms for labels that may be wrong.

use super::stable::neg_log_sigmoid;
use pt_tensor::Tensor;

/// −(1 − ε)·log σ(z) − ε·log σ(−z), with z = β·d, `[num_pairs]`.
///
/// ε = 0: Eq. 7 of Rafailov et al. 2023, <https://arxiv.org/abs/2305.18290>. ε > 0 is cDPO (Mitchell 2023, Eq. 3), where a label is
/// wrong with that probability: in torchtune and OpenRLHF, while TRL 1.16 ignores ε here.
pub(super) fn sigmoid(z: &Tensor, label_smoothing: f64) -> Tensor {
    if label_smoothing == 0.0 {
        return neg_log_sigmoid(z);
    }
    neg_log_sigmoid(z) * (1.0 - label_smoothing) + neg_log_sigmoid(&-z) * label_smoothing
}

/// \[−(1 − ε)·log σ(z) + ε·log σ(−z)\] / (1 − 2ε): its mean over labels flipped with the probability ε is DPO's loss.
///
/// Chowdhury et al. 2024, <https://arxiv.org/abs/2403.00409>, Eq. 10.
pub(super) fn robust(z: &Tensor, label_smoothing: f64) -> Tensor {
    let (clean, flipped) = (neg_log_sigmoid(z), neg_log_sigmoid(&-z));
    (clean * (1.0 - label_smoothing) - flipped * label_smoothing) / (1.0 - 2.0 * label_smoothing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Kind;

    #[test]
    fn an_unmoved_policy_pays_ln_2_whatever_the_labels_are_worth() {
        let zero = Tensor::from_slice(&[0f64]);
        for loss in [sigmoid(&zero, 0.0), sigmoid(&zero, 0.3), robust(&zero, 0.0), robust(&zero, 0.3)] {
            assert!((loss.double_value(&[0]) - 2f64.ln()).abs() < 1e-12);
        }
    }

    /// σ(ln 3) = 3/4.
    #[test]
    fn odds_of_three_to_one_pay_by_the_formula() {
        let z = Tensor::from_slice(&[3f64.ln()]);
        let (right, wrong) = (-(0.75f64.ln()), -(0.25f64.ln()));
        let found = sigmoid(&z, 0.1).double_value(&[0]);
        assert!((found - (0.9 * right + 0.1 * wrong)).abs() < 1e-12);
        let found = robust(&z, 0.1).double_value(&[0]);
        assert!((found - (0.9 * right - 0.1 * wrong) / 0.8).abs() < 1e-12);
    }

    /// cDPO stops pulling once the policy is as sure as the labels are: σ(z) = 1 − ε.
    #[test]
    fn the_conservative_loss_is_flat_where_the_policy_is_as_sure_as_the_labels() {
        let z = Tensor::from_slice(&[9f64.ln()]).set_requires_grad(true);
        sigmoid(&z, 0.1).sum(Kind::Double).backward();
        assert!(z.grad().double_value(&[0]).abs() < 1e-12);
    }

    #[test]
    fn flipping_labels_as_often_as_robust_assumes_gives_dpo_back() {
        let z = Tensor::from_slice(&[-1.5f64, 0.2, 4.0]);
        let mean = robust(&z, 0.2) * 0.8 + robust(&-&z, 0.2) * 0.2;
        assert!((mean - sigmoid(&z, 0.0)).abs().max().double_value(&[]) < 1e-12);
    }
}
