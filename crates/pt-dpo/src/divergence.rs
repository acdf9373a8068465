//! Divergences from the reference that take the place of the reverse KL.

use pt_tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::f64::consts::LN_2;

/// The f-divergence that ties the policy to its reference.
///
/// Wang et al. 2023, <https://arxiv.org/abs/2309.16240>. A completion's score is f′(u) with u = π/π_ref = exp(a), up to a constant that cancels
/// in the difference of a pair; a is its log-ratio in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FDivergence {
    /// The KL from the reference to the policy, as in DPO: a.
    #[default]
    ReverseKl,
    /// The KL the other way round: 1 − exp(−a).
    ForwardKl,
    /// Jensen-Shannon: log 2 + log σ(a).
    JsDivergence,
    /// (exp((α−1)·a) − 1) / (α−1); α → 1 is the reverse KL, 0 the forward one.
    AlphaDivergence,
}

impl FDivergence {
    /// Every divergence, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::ReverseKl, Self::ForwardKl, Self::JsDivergence, Self::AlphaDivergence];

    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReverseKl => "reverse_kl",
            Self::ForwardKl => "forward_kl",
            Self::JsDivergence => "js_divergence",
            Self::AlphaDivergence => "alpha_divergence",
        }
    }

    /// Scores of log-ratios, `[num_pairs]` both.
    ///
    /// Exponents are clamped at 80 nats, as TRL clamps those of the alpha divergence (it leaves the forward KL's alone), so that no score is
    /// infinite; beyond the clamp a score has no gradient.
    pub(crate) fn score(self, log_ratios: &Tensor, alpha: f64) -> Tensor {
        const HIGHEST: f64 = 80.0;
        match self {
            Self::ReverseKl => log_ratios.shallow_clone(),
            Self::ForwardKl => 1.0 - (-log_ratios).clamp_max(HIGHEST).exp(),
            Self::JsDivergence => log_ratios.log_sigmoid() + LN_2,
            Self::AlphaDivergence if (alpha - 1.0).abs() < 1e-6 => log_ratios.shallow_clone(),
            Self::AlphaDivergence => (log_ratios * (alpha - 1.0)).clamp_max(HIGHEST).expm1() / (alpha - 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmoved_policy_scores_zero_under_every_divergence() {
        let zero = Tensor::from_slice(&[0f64]);
        for divergence in FDivergence::ALL {
            assert_eq!(serde_json::to_string(&divergence).unwrap(), format!("\"{}\"", divergence.name()));
            assert!(divergence.score(&zero, 0.5).double_value(&[0]).abs() < 1e-12, "{divergence:?}");
        }
    }

    /// u = 2: forward KL 1 − 1/2, Jensen-Shannon log(4/3), α = ½: (2^−½ − 1)/−½; α = 0 is the forward KL.
    #[test]
    fn a_completion_twice_as_probable_scores_by_the_formulas() {
        let twice = Tensor::from_slice(&[LN_2]);
        for (divergence, alpha, expected) in [
            (FDivergence::ReverseKl, 0.5, LN_2),
            (FDivergence::ForwardKl, 0.5, 0.5),
            (FDivergence::JsDivergence, 0.5, (4f64 / 3.0).ln()),
            (FDivergence::AlphaDivergence, 0.5, 2.0 - 2f64.sqrt()),
            (FDivergence::AlphaDivergence, 0.0, 0.5),
            (FDivergence::AlphaDivergence, 1.0, LN_2),
        ] {
            let found = divergence.score(&twice, alpha).double_value(&[0]);
            assert!((found - expected).abs() < 1e-12, "{divergence:?} {alpha}: {found}");
        }
    }
}
