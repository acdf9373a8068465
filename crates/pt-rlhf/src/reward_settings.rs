//! The reward model's part of a run's settings.

use pt_train::settings::ObjectiveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How rankings are scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RankingLoss {
    /// Bradley–Terry on every pair of different ranks, averaged over the pairs of a prompt.
    #[default]
    Pairwise,
    /// The likelihood of the whole ranking.
    PlackettLuce,
}

/// What a reward model is trained for. The part of a run's settings named `objective`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// `pairwise` (InstructGPT, Ouyang et al. 2022, <https://arxiv.org/abs/2203.02155>), or `plackett_luce`. For pairs
    /// they are the same.
    pub loss: RankingLoss,
    /// Factor of mean((r_chosen + r_rejected)²), which keeps scores around 0 (Eisenstein et al. 2023,
    /// <https://arxiv.org/abs/2312.09244>, who take 0.01); null for none.
    pub center_rewards_coefficient: Option<f64>,
    /// Ask a pair's scores to part by the row's `margin`, or by the difference of its `scores` (Touvron et al. 2023,
    /// <https://arxiv.org/abs/2307.09288>).
    pub use_margin: bool,
}

impl RewardConfig {
    /// Every fault of the settings.
    pub fn faults(&self) -> Vec<String> {
        let Self { loss, center_rewards_coefficient, use_margin } = self;
        let mut faults = Vec::new();
        if let Some(factor) = center_rewards_coefficient.filter(|factor| !(*factor > 0.0 && factor.is_finite())) {
            faults.push(format!("center_rewards_coefficient is {factor}, expected over 0, or null"));
        }
        if *use_margin && *loss == RankingLoss::PlackettLuce {
            faults.push(
                "use_margin is true and loss is plackett_luce, which knows no margins, expected one of them".into(),
            );
        }
        faults
    }
}

impl ObjectiveConfig for RewardConfig {
    /// TRL's, for an adapter and its head; all weights are trained with 1e-5 or less.
    const LEARNING_RATE: f64 = 1e-4;

    fn faults(&self) -> Vec<String> {
        self.faults()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_named() {
        assert!(RewardConfig::default().faults().is_empty());
        let config =
            RewardConfig { loss: RankingLoss::PlackettLuce, center_rewards_coefficient: Some(-0.1), use_margin: true };
        let faults = config.faults();
        assert_eq!(faults[0], "center_rewards_coefficient is -0.1, expected over 0, or null");
        assert!(faults[1].starts_with("use_margin is true") && faults.len() == 2, "{faults:?}");
        assert!(!RewardConfig { center_rewards_coefficient: Some(f64::NAN), ..Default::default() }.faults().is_empty());
    }
}
