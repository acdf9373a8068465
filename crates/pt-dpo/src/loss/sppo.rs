//! SPPO: each log-ratio is to become the completion's win rate over the reference, less one half.

use pt_tensor::Tensor;

/// (a_c − 1/(2β))² + (a_r + 1/(2β))², `[num_pairs]`; 1/β is the paper's η.
///
/// Wu et al. 2024, <https://arxiv.org/abs/2405.00675>, Eq. 4.7, with the hard win rates 1 and 0.
pub(super) fn hard(chosen: &Tensor, rejected: &Tensor, beta: f64) -> Tensor {
    (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// β = 0.25: the chosen is to gain two nats and the rejected to lose two.
    #[test]
    fn both_sides_have_a_target() {
        let found = hard(&Tensor::from_slice(&[2f64, 0.0]), &Tensor::from_slice(&[-2f64, 1.0]), 0.25);
        assert_eq!(Vec::<f64>::try_from(found).unwrap(), [0.0, 4.0 + 9.0]);
    }
}
