//! What PPO, GRPO and RLOO differ in: how scores become advantages, and the loss.

use crate::packed::{ranges, sequence_ids};
use crate::reward::RewardSpec;
use crate::rl_settings::{Baseline, CriticConfig, GrpoConfig, PpoConfig, RolloutConfig};
use crate::rollout::Rollout;
use crate::{
    ImportanceLevel, KlController, KlEstimator, LossAverage, LossWindow, PolicyClip, PolicyOutput, Result,
    RunningMoments, ScorePlacement, Variance, at_tokens, clipped_losses, explained_variance, gae, group_advantages,
    leave_one_out_advantages, log_ratio, token_rewards, token_weights, value_lengths, whiten,
};
use pt_tensor::{Kind, Tensor};
use pt_train::settings::ObjectiveConfig;
use serde::{Deserialize, Serialize};

/// What an algorithm remembers from one iteration to the next; checkpoints keep it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlgorithmState {
    /// The price of the divergence.
    pub kl: KlController,
    /// Mean and variance of all scores.
    pub scores: RunningMoments,
}

/// How often the samples of an iteration are learned from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Updates {
    /// Passes over them.
    pub num_epochs: usize,
    /// Optimizer steps a pass.
    pub num_minibatches: usize,
    /// Distance from the policy that sampled at which they end, nats a token.
    pub target_kl: Option<f64>,
    /// Weight of the policy's entropy.
    pub entropy_coef: f64,
}

/// The loss of an algorithm's critic.
#[derive(Clone, Copy, Debug)]
pub struct ValueSettings<'a> {
    /// How far a value may move.
    pub clip: Option<f64>,
    /// Weight of the loss.
    pub vf_coef: f64,
    /// What the critic is.
    pub critic: &'a CriticConfig,
}

/// What the roles say of a rollout's tokens.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Log-probs under the reference, `[num_tokens]`; `None` without one.
    pub reference: Option<&'a [f32]>,
    /// The critic's values, as many as [`Algorithm::value_lengths`] counts; `None` without one.
    pub values: Option<&'a [f32]>,
}

/// What an update learns from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Targets {
    /// Of each token of the rollout.
    pub advantages: Vec<f32>,
    /// Of each value; empty without a critic.
    pub returns: Vec<f32>,
    /// Numbers of the rollout by the name of their metric.
    pub metrics: Vec<(String, f64)>,
}

/// One micro-batch of an update.
#[derive(Debug)]
pub struct PolicyBatch<'a> {
    /// Of the policy as it is, `[num_tokens]`, nats; differentiable.
    pub logprobs: &'a Tensor,
    /// Of the policy that sampled.
    pub old_logprobs: &'a Tensor,
    /// Of the reference, where there is one.
    pub reference: Option<&'a Tensor>,
    /// Of each token.
    pub advantages: &'a Tensor,
    /// Tokens of each response.
    pub lengths: &'a [usize],
    /// Which responses count.
    pub is_kept: &'a [bool],
    /// Those of the whole optimizer step.
    pub window: &'a LossWindow,
}

/// The loss of a micro-batch, a part of the optimizer step's.
#[derive(Debug)]
pub struct PolicyLoss {
    /// A scalar; those of all micro-batches add up to the step's loss.
    pub loss: Tensor,
    /// Of the ratios that were clipped.
    pub output: PolicyOutput,
}

/// PPO or GRPO: a part of the settings that knows how to learn from rollouts.
pub trait Algorithm: ObjectiveConfig {
    /// How responses are sampled.
    fn rollout(&self) -> &RolloutConfig;

    /// Responses to each prompt.
    fn num_samples(&self) -> usize;

    /// What a response is worth.
    fn rewards(&self) -> &[RewardSpec];

    /// Taken off the score of a response that was cut off.
    fn missing_eos_penalty(&self) -> Option<f64>;

    /// How often samples are learned from.
    fn updates(&self) -> Updates;

    /// The state of a new run.
    fn start(&self) -> AlgorithmState;

    /// Whether it needs the reference's log-probs.
    fn needs_reference(&self) -> bool;

    /// The critic's loss; `None` without a critic.
    fn value_settings(&self) -> Option<ValueSettings<'_>>;

    /// Values that it needs of each response.
    fn value_lengths(&self, lengths: &[usize], is_ended: &[bool]) -> Vec<usize>;

    /// Which responses of a rollout count.
    fn is_kept(&self, rollout: &Rollout) -> Vec<bool> {
        vec![true; rollout.is_ended.len()]
    }

    /// What an update learns from.
    ///
    /// # Errors
    /// [`crate::RlhfError::Shape`] when the evidence does not fit the rollout.
    fn targets(&self, rollout: &Rollout, evidence: Evidence<'_>, state: &mut AlgorithmState) -> Result<Targets>;

    /// The policy's loss.
    ///
    /// # Errors
    /// [`crate::RlhfError::Shape`] when columns do not fit each other.
    fn policy_loss(&self, batch: &PolicyBatch<'_>) -> Result<PolicyLoss>;
}

/// Sums over each response of a value per token.
fn sums(tokens: &[f32], lengths: &[usize]) -> Vec<f64> {
    ranges(lengths).map(|range| tokens[range].iter().map(|value| f64::from(*value)).sum()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// KL(policy ‖ reference) of each token by an estimator; zeros without a reference.
fn divergence(rollout: &Rollout, reference: Option<&[f32]>, estimator: KlEstimator) -> Vec<f32> {
    match reference {
        Some(reference) => estimator.values(&rollout.logprobs, reference),
        None => vec![0.0; rollout.logprobs.len()],
    }
}

/// The divergence of responses and of tokens, nats; nothing where there is no reference to diverge from.
fn kl_metrics(has_reference: bool, kl: &[f32], of_response: &[f64]) -> Vec<(String, f64)> {
    if !has_reference {
        return vec![];
    }
    let per_token = of_response.iter().sum::<f64>() / kl.len().max(1) as f64;
    vec![("objective/kl".into(), mean(of_response)), ("objective/kl_per_token".into(), per_token)]
}

/// The clipped loss, averaged, and the weight of each of its entries.
fn clipped(
    batch: &PolicyBatch<'_>,
    clip: &PolicyClip,
    level: ImportanceLevel,
    average: LossAverage,
) -> Result<(PolicyLoss, Tensor, Tensor)> {
    let device = batch.logprobs.device();
    let ratios = log_ratio(level, batch.logprobs, batch.old_logprobs, batch.lengths)?;
    let kept: Vec<f32> = batch.is_kept.iter().map(|is_kept| if *is_kept { 1.0 } else { 0.0 }).collect();
    let kept = Tensor::from_slice(&kept).to_device(device);
    let (advantages, weights) = match level {
        ImportanceLevel::Sum => {
            // A response has one advantage: that of its first token.
            let firsts: Vec<i64> = ranges(batch.lengths).map(|range| range.start as i64).collect();
            let advantages = batch.advantages.index_select(0, &Tensor::from_slice(&firsts).to_device(device));
            (advantages, kept / batch.window.num_sequences.max(1) as f64)
        }
        _ => {
            let mut weights =
                Tensor::from_slice(&token_weights(batch.lengths, average, batch.window)).to_device(device);
            if average == LossAverage::Bnpo {
                // The mean of a micro-batch is over the tokens that count.
                let (all, counted) = batch
                    .lengths
                    .iter()
                    .zip(batch.is_kept)
                    .fold((0, 0), |(all, counted), (n, kept)| (all + n, counted + n * usize::from(*kept)));
                weights *= all as f64 / counted.max(1) as f64;
            }
            let of_token = sequence_ids(batch.lengths, device);
            (batch.advantages.shallow_clone(), weights * kept.index_select(0, &of_token))
        }
    };
    let output = clipped_losses(&ratios, &advantages, clip)?;
    let loss = (&output.losses * &weights).sum(output.losses.kind());
    Ok((PolicyLoss { loss, output }, ratios, weights))
}

impl Algorithm for PpoConfig {
    fn rollout(&self) -> &RolloutConfig {
        &self.rollout
    }

    fn num_samples(&self) -> usize {
        self.num_samples
    }

    fn rewards(&self) -> &[RewardSpec] {
        &self.rewards
    }

    fn missing_eos_penalty(&self) -> Option<f64> {
        self.missing_eos_penalty
    }

    fn updates(&self) -> Updates {
        let &Self { num_epochs, num_minibatches, target_kl, entropy_coef, .. } = self;
        Updates { num_epochs, num_minibatches, target_kl, entropy_coef }
    }

    fn start(&self) -> AlgorithmState {
        AlgorithmState { kl: KlController::new(self.kl_coef, self.kl_control.clone()), scores: RunningMoments::new() }
    }

    fn needs_reference(&self) -> bool {
        self.kl_coef > 0.0
    }

    fn value_settings(&self) -> Option<ValueSettings<'_>> {
        Some(ValueSettings { clip: self.value_clip, vf_coef: self.vf_coef, critic: &self.critic })
    }

    fn value_lengths(&self, lengths: &[usize], is_ended: &[bool]) -> Vec<usize> {
        value_lengths(lengths, is_ended, self.score_placement)
    }

    fn targets(&self, rollout: &Rollout, evidence: Evidence<'_>, state: &mut AlgorithmState) -> Result<Targets> {
        let lengths = rollout.lengths();
        let kl = divergence(rollout, evidence.reference, self.kl_estimator);
        let mut scores = rollout.scores.clone();
        if self.normalize_scores {
            state.scores.update(&scores);
            state.scores.normalize(&mut scores, true);
        }
        if let Some(most) = self.score_clip {
            scores.iter_mut().for_each(|score| *score = score.clamp(-most as f32, most as f32));
        }
        let kl_coef = state.kl.coef();
        let placement: ScorePlacement = self.score_placement;
        let mut rewards = token_rewards(&kl, &lengths, &scores, kl_coef, placement, &rollout.is_ended)?;
        let value_lengths = self.value_lengths(&lengths, &rollout.is_ended);
        let total: Vec<f64> = sums(&rewards, &value_lengths);
        if self.whiten_rewards {
            whiten(&mut rewards, false, Variance::Unbiased);
        }
        let values = evidence.values.unwrap_or(&[]);
        let estimate = gae(&rewards, values, &value_lengths, self.gamma, self.lam)?;
        let mut advantages = at_tokens(&estimate.advantages, &lengths, &value_lengths)?;
        if self.whiten_advantages {
            whiten(&mut advantages, true, Variance::Unbiased);
        }
        let of_response = sums(&kl, &lengths);
        let per_sequence = mean(&of_response);
        state.kl.update(per_sequence, lengths.len());
        let mut metrics = kl_metrics(evidence.reference.is_some(), &kl, &of_response);
        metrics.extend([
            ("objective/kl_coef".into(), kl_coef),
            ("objective/non_score_reward".into(), -kl_coef * per_sequence),
            ("objective/rlhf_reward".into(), mean(&total)),
            ("val/explained_variance".into(), explained_variance(values, &estimate.returns)),
        ]);
        Ok(Targets { advantages, returns: estimate.returns, metrics })
    }

    fn policy_loss(&self, batch: &PolicyBatch<'_>) -> Result<PolicyLoss> {
        Ok(clipped(batch, &self.clip, ImportanceLevel::Token, LossAverage::Dapo)?.0)
    }
}

impl Algorithm for GrpoConfig {
    fn rollout(&self) -> &RolloutConfig {
        &self.rollout
    }

    fn num_samples(&self) -> usize {
        self.num_samples
    }

    fn rewards(&self) -> &[RewardSpec] {
        &self.rewards
    }

    fn missing_eos_penalty(&self) -> Option<f64> {
        self.missing_eos_penalty
    }

    fn updates(&self) -> Updates {
        let &Self { num_epochs, num_minibatches, target_kl, entropy_coef, .. } = self;
        Updates { num_epochs, num_minibatches, target_kl, entropy_coef }
    }

    fn start(&self) -> AlgorithmState {
        AlgorithmState { kl: KlController::new(self.beta, Default::default()), scores: RunningMoments::new() }
    }

    fn needs_reference(&self) -> bool {
        self.beta > 0.0
    }

    fn value_settings(&self) -> Option<ValueSettings<'_>> {
        None
    }

    fn value_lengths(&self, lengths: &[usize], _is_ended: &[bool]) -> Vec<usize> {
        vec![0; lengths.len()]
    }

    fn is_kept(&self, rollout: &Rollout) -> Vec<bool> {
        rollout.is_ended.iter().map(|is_ended| *is_ended || !self.mask_truncated).collect()
    }

    fn targets(&self, rollout: &Rollout, evidence: Evidence<'_>, _state: &mut AlgorithmState) -> Result<Targets> {
        let (lengths, sizes) = (rollout.lengths(), rollout.group_sizes());
        let kl = divergence(rollout, evidence.reference, KlEstimator::K1);
        let of_response = sums(&kl, &lengths);
        let mut scores = rollout.scores.clone();
        let advantages = match self.baseline {
            Baseline::GroupMean => group_advantages(&scores, &sizes, self.scale_rewards),
            Baseline::LeaveOneOut => {
                let price = of_response.iter().map(|kl| (self.beta * kl) as f32);
                scores.iter_mut().zip(price).for_each(|(score, price)| *score -= price);
                leave_one_out_advantages(&scores, &sizes)?
            }
        };
        let of_tokens = advantages.iter().zip(&lengths).flat_map(|(one, &length)| std::iter::repeat_n(*one, length));
        let is_flat = |range: std::ops::Range<usize>| rollout.scores[range.clone()].windows(2).all(|w| w[0] == w[1]);
        let num_flat = rollout.responses_of_group().into_iter().filter(|range| is_flat(range.clone())).count();
        let mut metrics = vec![("frac_reward_zero_std".to_string(), num_flat as f64 / sizes.len().max(1) as f64)];
        metrics.extend(kl_metrics(evidence.reference.is_some(), &kl, &of_response));
        Ok(Targets { advantages: of_tokens.collect(), returns: vec![], metrics })
    }

    fn policy_loss(&self, batch: &PolicyBatch<'_>) -> Result<PolicyLoss> {
        let (mut policy, ratios, weights) = clipped(batch, &self.clip, self.importance, self.loss_average)?;
        // RLOO has its price in the scores.
        if let (Baseline::GroupMean, Some(reference)) = (self.baseline, batch.reference) {
            let kl = KlEstimator::K3.tensor(batch.logprobs, reference); // [num_tokens]
            let priced = match self.importance {
                ImportanceLevel::Sum => crate::packed::sum_by_sequence(&kl, batch.lengths),
                // The samples are the old policy's: their estimate of the divergence is weighed by the ratio, as in TRL.
                _ => kl * ratios.exp(),
            };
            policy.loss += (priced * weights).sum(Kind::Float) * self.beta;
        }
        Ok(policy)
    }
}
