//! Reinforcement learning from human feedback: reward models from rankings, rewards by rule, rollouts, and PPO, GRPO and
//! RLOO over them, in one process that resumes.
//!
//! # Map
//! - [`RewardModel`], a trunk with a [`ScalarHead`], its files and its training ([`RewardTraining`], [`RewardConfig`]) by
//!   [`ranking_losses`];
//! - [`reward`]: the [`Reward`](reward::Reward) trait, rules, external commands, sums; [`ModelScorer`] is a reward model
//!   as one;
//! - [`train`]: the loop over a [`RlRun`]: [`Roles`] on one base, [`Rollout`]s, and an [`Algorithm`] ([`PpoConfig`],
//!   [`GrpoConfig`]); [`diagnose`] says in words what goes wrong;
//! - the mathematics as pure functions over packed values, without padding: [`gae()`], [`whiten()`], [`token_rewards()`],
//!   [`KlEstimator`], [`KlController`], [`policy_losses`], [`value_losses`], [`group_advantages`],
//!   [`leave_one_out_advantages`], [`token_weights`].
#![forbid(unsafe_code)]

mod algorithm;
mod calibration;
mod diagnosis;
mod error;
mod gae;
#[cfg(test)]
mod golden_ppo;
mod group_advantage;
mod kl;
mod model_scorer;
mod packed;
mod policy_loss;
mod probe;
mod prompts;
mod ranking_loss;
pub mod reward;
mod reward_model;
mod reward_settings;
mod reward_training;
mod rl_settings;
mod rl_train;
mod roles;
mod rollout;
mod scalar_head;
mod token_rewards;
mod update;
mod value_loss;
mod whiten;

pub use algorithm::{Algorithm, AlgorithmState, Evidence, PolicyBatch, PolicyLoss, Targets, Updates, ValueSettings};
pub use calibration::{Calibration, CalibrationBin, NUM_BINS};
pub use diagnosis::{Diagnosis, Finding, IterationStats, diagnose};
pub use error::{Result, RlhfError};
pub use gae::{Advantages, explained_variance, gae};
pub use group_advantage::{ScaleRewards, group_advantages, leave_one_out_advantages};
pub use kl::{KlControl, KlControlKind, KlController, KlEstimator};
pub use model_scorer::ModelScorer;
pub use policy_loss::{
    ImportanceLevel, LossAverage, LossWindow, PolicyClip, PolicyOutput, clipped_losses, log_ratio, policy_losses,
    token_weights,
};
pub use prompts::{Prompt, PromptRow, check_rewards, encode_prompts, read_prompts};
pub use ranking_loss::{RankingOutput, centering_losses, pairwise_losses, plackett_luce_loss, ranking_losses};
pub use reward_model::{REWARD_FILE, RewardModel, ScoreStatistics, check_method, end_at_turn, trunk_of};
pub use reward_settings::{RankingLoss, RewardConfig};
pub use reward_training::{ACCURACY, RewardTraining, ScoreRecord, ScoredPair};
pub use rl_settings::{Baseline, CriticConfig, CriticKind, GrpoConfig, PpoConfig, RolloutConfig};
pub use rl_train::{
    CRITIC, EVAL_SCORES, IterationRecord, Phase, RlObserver, RlOutcome, RlRun, SCORES, SampleRecord, reward_metric,
    train,
};
pub use roles::{Critic, Reference, Roles};
pub use rollout::Rollout;
pub use scalar_head::{SCORE_WEIGHT, ScalarHead};
pub use token_rewards::{ScorePlacement, at_tokens, token_rewards, value_lengths};
pub use value_loss::{ValueOutput, value_losses};
pub use whiten::{RunningMoments, Variance, whiten};
