//! APO: anchored preference optimization, which says where each side should go.

use pt_tensor::Tensor;

/// (1 − σ(β·a_c)) + σ(β·a_r), `[num_pairs]`: the chosen up, the rejected down.
///
/// D'Oosterlinck et al. 2024, <https://arxiv.org/abs/2408.06266>, Eq. 7.
pub(super) fn zero(chosen: &Tensor, rejected: &Tensor, beta: f64) -> Tensor {
    // 1 − σ(x) as σ(−x), which has digits left where σ(x) is nearly one.
    (chosen * -beta).sigmoid() + (rejected * beta).sigmoid()
}

/// σ(β·a_c) + (1 − σ(β·(a_c − a_r))), `[num_pairs]`: both down, the rejected more.
///
/// The same, Eq. 8.
pub(super) fn down(chosen: &Tensor, rejected: &Tensor, beta: f64) -> Tensor {
    (chosen * beta).sigmoid() + ((rejected - chosen) * beta).sigmoid()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Kind;

    /// σ(0) twice; slopes of a quarter, which apo-down's chosen side has once with each sign.
    #[test]
    fn an_unmoved_policy_pays_one_and_the_sides_are_pulled_as_named() {
        for (loss, slopes) in [
            (zero as fn(&Tensor, &Tensor, f64) -> Tensor, [-0.25, 0.25]),
            (down as fn(&Tensor, &Tensor, f64) -> Tensor, [0.0, 0.25]),
        ] {
            let leaves = [(); 2].map(|()| Tensor::from_slice(&[0f64]).set_requires_grad(true));
            let value = loss(&leaves[0], &leaves[1], 1.0);
            assert_eq!(value.double_value(&[0]), 1.0);
            value.sum(Kind::Double).backward();
            assert_eq!(leaves.map(|leaf| leaf.grad().double_value(&[0])), slopes);
        }
    }
}
