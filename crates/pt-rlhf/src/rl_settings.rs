//! Settings of PPO and of GRPO: each the part of a run's configuration named `objective`.
//!
//! The loop's own settings keep their meaning: a step is an iteration (sample, score, update), `batch.batch_size` times
//! `batch.accumulation` are its prompts, and `batch.max_tokens` bounds the micro-batches of the passes.

use crate::reward::{RewardSpec, reward_faults};
use crate::{
    ImportanceLevel, KlControl, KlControlKind, KlEstimator, LossAverage, PolicyClip, ScaleRewards, ScorePlacement,
};
use pt_train::settings::ObjectiveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How responses are sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutConfig {
    /// Most tokens of a response.
    pub max_new_tokens: usize,
    /// Logits are divided by it, when sampling and in every log-prob that is compared with a sample's.
    pub temperature: f64,
    /// Prompts that are sampled for at a time.
    pub batch_size: usize,
    /// Longer prompts are left out, in tokens; null for no limit.
    pub max_prompt_tokens: Option<usize>,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self { max_new_tokens: 64, temperature: 1.0, batch_size: 16, max_prompt_tokens: None }
    }
}

impl RolloutConfig {
    fn faults(&self) -> Vec<String> {
        let Self { max_new_tokens, temperature, batch_size, max_prompt_tokens } = *self;
        let mut faults = Vec::new();
        let counts = [("max_new_tokens", max_new_tokens), ("batch_size", batch_size)];
        for (name, count) in counts.into_iter().chain(max_prompt_tokens.map(|most| ("max_prompt_tokens", most))) {
            if count == 0 {
                faults.push(format!("rollout.{name} is 0, expected at least 1"));
            }
        }
        if !(temperature > 0.0 && temperature.is_finite()) {
            faults.push(format!("rollout.temperature is {temperature}, expected over 0: responses are sampled"));
        }
        faults
    }
}

/// What the critic is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CriticKind {
    /// An adapter of its own over the frozen base, with a value head; where all weights are trained, a model of its own.
    #[default]
    Adapter,
    /// A value head on the actor's own hidden states: one pass serves both, and both losses train the actor's adapter.
    ActorHead,
}

/// The critic.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CriticConfig {
    /// `adapter` or `actor_head`.
    pub kind: CriticKind,
    /// A reward model (its run, or its adapter's folder) whose adapter and head the critic starts from.
    pub path: Option<PathBuf>,
    /// Its highest learning rate; the actor's when null.
    pub learning_rate: Option<f64>,
    /// Iterations at the beginning that train the critic alone.
    pub warmup_iterations: u64,
}

/// Proximal policy optimization (Schulman et al. 2017, <https://arxiv.org/abs/1707.06347>) as InstructGPT has it
/// (Ouyang et al. 2022, <https://arxiv.org/abs/2203.02155>). Defaults are those of TRL 1.12 but for how responses are
/// sampled, the learning rate (1e-5, for adapters) and the place of the score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PpoConfig {
    /// How responses are sampled.
    pub rollout: RolloutConfig,
    /// Responses to each prompt, which is computed once for all of them.
    pub num_samples: usize,
    /// What a response is worth: a weighted sum of rewards.
    pub rewards: Vec<RewardSpec>,
    /// Price of a nat of divergence from the reference.
    pub kl_coef: f64,
    /// How the divergence of a token is estimated: `k1` (log-ratio, unbiased), `k2` (half its square), `k3` (never negative).
    pub kl_estimator: KlEstimator,
    /// Whether the price moves.
    pub kl_control: KlControl,
    /// Where a response's score is paid: on its `last_token`, or `after_end`, on an entry of its own as in TRL.
    pub score_placement: ScorePlacement,
    /// Divide scores by the standard deviation of all scores so far, after taking off their mean.
    pub normalize_scores: bool,
    /// Scores are cut to ± this, once normalized; null for no limit.
    pub score_clip: Option<f64>,
    /// Taken off the score of a response that was cut off; null for nothing.
    pub missing_eos_penalty: Option<f64>,
    /// Discount of later rewards.
    pub gamma: f64,
    /// λ of generalized advantage estimation.
    pub lam: f64,
    /// Divide the rewards of tokens by their standard deviation; their mean stays.
    pub whiten_rewards: bool,
    /// Bring the advantages of an iteration to mean 0 and variance 1.
    pub whiten_advantages: bool,
    /// Clipping of the policy's ratio.
    pub clip: PolicyClip,
    /// A value moves at most this far from what it was at the rollout; null for no clipping.
    pub value_clip: Option<f64>,
    /// Weight of the value loss.
    pub vf_coef: f64,
    /// Weight of the policy's entropy, which is rewarded.
    pub entropy_coef: f64,
    /// Passes over an iteration's samples.
    pub num_epochs: usize,
    /// Optimizer steps a pass; prompts are dealt out anew each time.
    pub num_minibatches: usize,
    /// The updates of an iteration end once the policy is further than this from the one that sampled (nats a token,
    /// k3); null for never.
    pub target_kl: Option<f64>,
    /// The critic.
    pub critic: CriticConfig,
}

impl Default for PpoConfig {
    fn default() -> Self {
        Self {
            rollout: RolloutConfig::default(),
            num_samples: 1,
            rewards: vec![],
            kl_coef: 0.05,
            kl_estimator: KlEstimator::K1,
            kl_control: KlControl::default(),
            score_placement: ScorePlacement::default(),
            normalize_scores: false,
            score_clip: None,
            missing_eos_penalty: None,
            gamma: 1.0,
            lam: 0.95,
            whiten_rewards: false,
            whiten_advantages: true,
            clip: PolicyClip::default(),
            value_clip: Some(0.2),
            vf_coef: 0.1,
            entropy_coef: 0.0,
            num_epochs: 4,
            num_minibatches: 1,
            target_kl: None,
            critic: CriticConfig::default(),
        }
    }
}

/// Faults of numbers by name: those outside of what `is_good` says.
fn out_of_range(numbers: &[(&str, f64)], expected: &str, is_good: impl Fn(f64) -> bool) -> Vec<String> {
    let bad = numbers.iter().filter(|(_, value)| !is_good(*value));
    bad.map(|(name, value)| format!("{name} is {value}, expected {expected}")).collect()
}

/// Those of settings that are null or over 0.
fn not_over_0(numbers: &[(&str, Option<f64>)]) -> Vec<String> {
    let given: Vec<(&str, f64)> = numbers.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect();
    out_of_range(&given, "over 0 or null", |value| value > 0.0 && value.is_finite())
}

fn counts_of_0(counts: &[(&str, usize)]) -> Vec<String> {
    let bad = counts.iter().filter(|(_, count)| *count == 0);
    bad.map(|(name, _)| format!("{name} is 0, expected at least 1")).collect()
}

/// Those of rewards; without any the caller brings a reward of its own.
fn faults_of(rewards: &[RewardSpec]) -> Vec<String> {
    if rewards.is_empty() {
        return vec![];
    }
    let mut faults = reward_faults(rewards);
    if rewards.iter().all(|reward| reward.weight() == 0.0) {
        faults.push("rewards have the weight 0, all of them, expected one to learn from".into());
    }
    faults
}

impl ObjectiveConfig for PpoConfig {
    /// For adapters; all weights are trained with 3e-6 or less.
    const LEARNING_RATE: f64 = 1e-5;
    /// An iteration takes as long as many steps of other training.
    const SAVE_EVERY: u64 = 5;

    fn faults(&self) -> Vec<String> {
        let mut faults = self.rollout.faults();
        faults.extend(faults_of(&self.rewards));
        faults.extend(self.kl_control.faults());
        faults.extend(self.clip.faults());
        let weights = [("kl_coef", self.kl_coef), ("vf_coef", self.vf_coef), ("entropy_coef", self.entropy_coef)];
        faults.extend(out_of_range(&weights, "at least 0", |weight| weight >= 0.0 && weight.is_finite()));
        let shares = [("gamma", self.gamma), ("lam", self.lam)];
        faults.extend(out_of_range(&shares, "0 to 1", |share| (0.0..=1.0).contains(&share)));
        faults.extend(not_over_0(&[
            ("score_clip", self.score_clip),
            ("missing_eos_penalty", self.missing_eos_penalty),
            ("value_clip", self.value_clip),
            ("target_kl", self.target_kl),
            ("critic.learning_rate", self.critic.learning_rate),
        ]));
        faults.extend(counts_of_0(&[
            ("num_samples", self.num_samples),
            ("num_epochs", self.num_epochs),
            ("num_minibatches", self.num_minibatches),
        ]));
        if self.critic.kind == CriticKind::ActorHead && self.critic.warmup_iterations > 0 {
            faults.push("critic.warmup_iterations is set and critic.kind is actor_head, expected 0: they share".into());
        }
        if self.critic.kind == CriticKind::ActorHead && self.critic.learning_rate.is_some() {
            faults.push(
                "critic.learning_rate is set and critic.kind is actor_head, expected null: one optimizer has both"
                    .into(),
            );
        }
        if self.kl_control.kind == KlControlKind::Adaptive && self.kl_coef == 0.0 {
            faults.push("kl_coef is 0 and kl_control.kind is adaptive, which multiplies it, expected over 0".into());
        }
        faults
    }
}

/// How a group's scores become advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Less the group's mean, over its spread: GRPO.
    #[default]
    GroupMean,
    /// Less the mean of the other responses: RLOO.
    LeaveOneOut,
}

/// Group-relative policy optimization (Shao et al. 2024, <https://arxiv.org/abs/2402.03300>) with the choices of DAPO,
/// Dr. GRPO and GSPO, and REINFORCE leave-one-out (Ahmadian et al. 2024, <https://arxiv.org/abs/2402.14740>): a critic
/// is the mean of other responses to the same prompt. Defaults are those of TRL 1.16 but for how responses are sampled and
/// the learning rate (1e-5, for adapters).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GrpoConfig {
    /// How responses are sampled.
    pub rollout: RolloutConfig,
    /// Responses to each prompt, a group; the prompt is computed once for all of them.
    pub num_samples: usize,
    /// What a response is worth: a weighted sum of rewards.
    pub rewards: Vec<RewardSpec>,
    /// `group_mean` (GRPO) or `leave_one_out` (RLOO).
    pub baseline: Baseline,
    /// What `group_mean` divides by: the spread of the `group`, of the `batch`, or `none` (Dr. GRPO).
    pub scale_rewards: ScaleRewards,
    /// What one importance ratio is of: `token`, `sequence` (GSPO) or `sum` (RLOO).
    pub importance: ImportanceLevel,
    /// What the losses of tokens are averaged over: each response (`grpo`), all tokens of a step (`dapo`) or of a
    /// micro-batch (`bnpo`), or the longest length (`dr_grpo`).
    pub loss_average: LossAverage,
    /// Clipping of the ratio.
    pub clip: PolicyClip,
    /// Price of a nat of divergence from the reference: in the loss by k3 for `group_mean`, taken off the score for
    /// `leave_one_out`. 0 for no reference.
    pub beta: f64,
    /// Taken off the score of a response that was cut off; null for nothing.
    pub missing_eos_penalty: Option<f64>,
    /// Leave responses that were cut off out of the loss (DAPO).
    pub mask_truncated: bool,
    /// Weight of the policy's entropy, which is rewarded.
    pub entropy_coef: f64,
    /// Passes over an iteration's samples.
    pub num_epochs: usize,
    /// Optimizer steps a pass; prompts are dealt out anew each time.
    pub num_minibatches: usize,
    /// The updates of an iteration end once the policy is further than this from the one that sampled (nats a token,
    /// k3); null for never.
    pub target_kl: Option<f64>,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            rollout: RolloutConfig::default(),
            num_samples: 8,
            rewards: vec![],
            baseline: Baseline::GroupMean,
            scale_rewards: ScaleRewards::default(),
            importance: ImportanceLevel::Token,
            loss_average: LossAverage::Dapo,
            clip: PolicyClip::default(),
            beta: 0.0,
            missing_eos_penalty: None,
            mask_truncated: false,
            entropy_coef: 0.0,
            num_epochs: 1,
            num_minibatches: 1,
            target_kl: None,
        }
    }
}

impl ObjectiveConfig for GrpoConfig {
    /// For adapters; all weights are trained with 1e-6.
    const LEARNING_RATE: f64 = 1e-5;
    /// An iteration takes as long as many steps of other training.
    const SAVE_EVERY: u64 = 5;

    fn faults(&self) -> Vec<String> {
        let mut faults = self.rollout.faults();
        faults.extend(faults_of(&self.rewards));
        faults.extend(self.clip.faults());
        let weights = [("beta", self.beta), ("entropy_coef", self.entropy_coef)];
        faults.extend(out_of_range(&weights, "at least 0", |weight| weight >= 0.0 && weight.is_finite()));
        faults.extend(not_over_0(&[("missing_eos_penalty", self.missing_eos_penalty), ("target_kl", self.target_kl)]));
        faults.extend(counts_of_0(&[("num_epochs", self.num_epochs), ("num_minibatches", self.num_minibatches)]));
        if self.num_samples < 2 {
            let found = self.num_samples;
            faults.push(format!("num_samples is {found}, expected at least 2: a response is held to the others"));
        }
        if self.baseline == Baseline::LeaveOneOut && self.scale_rewards != ScaleRewards::default() {
            faults.push("scale_rewards is set and baseline is leave_one_out, which divides by nothing".into());
        }
        if self.importance == ImportanceLevel::Sum && self.loss_average != LossAverage::default() {
            faults.push("loss_average is set and importance is sum, which has one loss a response".into());
        }
        faults
    }
}
