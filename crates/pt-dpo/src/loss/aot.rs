//! AOT: preferences between distributions, by way of sorting.

use super::dpo;
use pt_tensor::Tensor;

/// DPO's loss on the differences of the k-th smallest of `upper` and the k-th smallest of `lower`, `[num_pairs]`.
///
/// Melnyk et al. 2024, <https://arxiv.org/abs/2406.05882>: Algorithm 1 with `upper` the policy's log-ratios of chosen to rejected and `lower` the
/// reference's (`aot`), or chosen log-ratios over rejected ones (`aot_unpaired`). The k-th loss stands where the k-th
/// value of `upper` came from.
pub(super) fn sorted(upper: &Tensor, lower: &Tensor, beta: f64, label_smoothing: f64) -> Tensor {
    let (upper, origin) = upper.sort(0, false);
    let (lower, _) = lower.sort(0, false);
    let losses = dpo::sigmoid(&((upper - lower) * beta), label_smoothing);
    losses.index_select(0, &origin.argsort(0, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorted: (1, 3) over (0, 5), so 1 − 0 for the second pair and 3 − 5 for the first.
    #[test]
    fn differences_are_of_equal_ranks_and_go_back_to_their_pairs() {
        let found = sorted(&Tensor::from_slice(&[3f64, 1.0]), &Tensor::from_slice(&[0f64, 5.0]), 1.0, 0.0);
        let logistic = |z: f64| (-z).exp().ln_1p();
        assert!((found.double_value(&[0]) - logistic(-2.0)).abs() < 1e-12);
        assert!((found.double_value(&[1]) - logistic(1.0)).abs() < 1e-12);
    }
}
