//! Training of a reward model on rankings, an objective of [`pt_train::train`].

use crate::calibration::{Calibration, NUM_BINS};
use crate::ranking_loss::{RankingOutput, ranking_losses};
use crate::{Result, RewardConfig, RewardModel, RlhfError, ScoreStatistics};
use pt_model::{PackedBatch, PromptGroup};
use pt_tensor::{Device, Kind, Tensor, no_grad};
use pt_train::TrainError;
use pt_train::data::packing::split_by_tokens;
use pt_train::data::{Judgement, PreferenceGroup};
use pt_train::objective::{Evaluation, Objective, Pass, WindowRecord};
use pt_train::step::finite;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// Share of pairs whose better completion has the higher score, the metric; of held-out rows with `eval_` before it.
pub const ACCURACY: &str = "accuracy";
/// Scores of training completions that are remembered for [`ScoreStatistics`].
const REMEMBERED: usize = 1024;
/// Their name in a checkpoint.
const RECENT: &str = "recent_scores";

/// A held-out pair as it was scored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredPair {
    /// Its row among the held-out examples.
    pub example: usize,
    /// Score of the better completion less that of the worse one.
    pub difference: f64,
}

/// What a run remembers of its scores; a clone is the same record.
#[derive(Clone, Debug, Default)]
pub struct ScoreRecord(Rc<RefCell<Record>>);

#[derive(Debug, Default)]
struct Record {
    /// Oldest first.
    recent: VecDeque<f32>,
    /// The last evaluation and its step.
    held_out: Option<(u64, Vec<ScoredPair>)>,
}

impl ScoreRecord {
    /// Mean and deviation of the last 1024 scores of training completions, each as it was when its row was trained on:
    /// no pass of their own, and of rows that the model had not yet been fitted to.
    pub fn statistics(&self) -> Option<ScoreStatistics> {
        let record = self.0.borrow();
        ScoreStatistics::of(&record.recent.iter().copied().collect::<Vec<_>>())
    }

    /// The pairs of the last evaluation, where that was after step `step`.
    pub fn held_out(&self, step: u64) -> Option<Vec<ScoredPair>> {
        self.0.borrow().held_out.as_ref().filter(|(at, _)| *at == step).map(|(_, pairs)| pairs.clone())
    }

    fn remember(&self, scores: &[f32]) {
        let recent = &mut self.0.borrow_mut().recent;
        recent.extend(scores);
        let excess = recent.len().saturating_sub(REMEMBERED);
        recent.drain(..excess);
    }
}

/// Training of a reward model on pairs and ranked lists.
///
/// All completions of a prompt are scored in one pass over one copy of it. A window's loss is the mean over its
/// prompts of [`ranking_losses`], times each row's weight. Metrics have the names of TRL's `RewardTrainer`: `accuracy`
/// and `margin` are means over pairs, `min_reward`, `mean_reward`, `max_reward` over completions; evaluations add
/// `calibration_error`.
#[derive(Debug)]
pub struct RewardTraining {
    config: RewardConfig,
    reward: RewardModel,
    record: ScoreRecord,
}

/// Sums over a window or a held-out set.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    num_prompts: usize,
    /// r_chosen − r_rejected of each pair.
    differences: Vec<f64>,
    /// Of each completion.
    scores: Vec<f32>,
    num_tokens: i64,
}

impl Sums {
    fn loss(&self) -> f64 {
        self.loss / self.num_prompts.max(1) as f64
    }

    /// Numbers by their names, the one to show first.
    fn values(&self) -> Vec<(&'static str, f64)> {
        let num_pairs = self.differences.len().max(1) as f64;
        let scores = || self.scores.iter().map(|&score| f64::from(score));
        let num_right = self.differences.iter().filter(|difference| **difference > 0.0).count();
        vec![
            (ACCURACY, num_right as f64 / num_pairs),
            ("margin", self.differences.iter().sum::<f64>() / num_pairs),
            ("min_reward", scores().fold(f64::INFINITY, f64::min)),
            ("mean_reward", scores().sum::<f64>() / self.scores.len().max(1) as f64),
            ("max_reward", scores().fold(f64::NEG_INFINITY, f64::max)),
        ]
    }
}

impl RewardTraining {
    /// Trains `reward`'s head, and with it what the run trains of the trunk.
    ///
    /// # Errors
    /// [`RlhfError::Config`] with every fault of the settings.
    pub fn new(config: RewardConfig, reward: RewardModel) -> Result<Self> {
        let faults = config.faults();
        if !faults.is_empty() {
            return Err(RlhfError::Config { place: "objective".into(), faults });
        }
        Ok(Self { config, reward, record: ScoreRecord::default() })
    }

    /// What it remembers of its scores, from now on.
    pub fn record(&self) -> ScoreRecord {
        self.record.clone()
    }

    /// Losses of one micro-batch, `[num_prompts]`, its pairs, and its numbers into `sums`.
    fn losses(
        &self,
        pass: &Pass<'_>,
        examples: &[&PreferenceGroup],
        sums: &mut Sums,
    ) -> pt_train::Result<(Tensor, PackedBatch, RankingOutput)> {
        let groups: Vec<&PromptGroup> = examples.iter().map(|example| &example.group).collect();
        let batch = PackedBatch::new(&groups, pass.model.device())?;
        let scores = self.reward.scores(pass.model, pass.sites, &batch, pass.options);
        let scores = scores.map_err(|error| match error {
            RlhfError::Model(source) => {
                TrainError::Step { step: pass.step, tokens: batch.num_tokens(), source: Box::new(source) }
            }
            other => other.into(),
        })?; // [num_completions]
        finite(pass.step, "scores", &scores)?;
        let judgements: Vec<&Judgement> = examples.iter().map(|example| &example.judgement).collect();
        let out = ranking_losses(&scores, &judgements, &self.config)?;
        let weights: Vec<f32> = examples.iter().map(|example| example.weight as f32).collect();
        let losses = &out.losses * Tensor::from_slice(&weights).to_device(scores.device());
        sums.loss += finite(pass.step, "losses", &losses)?;
        sums.num_prompts += examples.len();
        sums.num_tokens += batch.num_tokens();
        let differences = numbers(&(&out.chosen_scores - &out.rejected_scores))?;
        sums.differences.extend(differences.into_iter().map(f64::from));
        sums.scores.extend(numbers(&scores)?);
        Ok((losses, batch, out))
    }
}

impl Objective for RewardTraining {
    type Example = PreferenceGroup;

    fn accumulate(&mut self, pass: &Pass<'_>, window: &[Vec<&PreferenceGroup>]) -> pt_train::Result<WindowRecord> {
        let num_prompts: usize = window.iter().map(Vec::len).sum();
        let mut sums = Sums::default();
        for examples in window.iter().filter(|examples| !examples.is_empty()) {
            let (losses, batch, _) = self.losses(pass, examples, &mut sums)?;
            pass.backward(losses.sum(None) / num_prompts as f64, &batch)?;
        }
        self.record.remember(&sums.scores);
        Ok(WindowRecord { loss: sums.loss(), values: sums.values(), num_tokens: sums.num_tokens })
    }

    fn evaluate(
        &mut self,
        pass: &Pass<'_>,
        examples: &[PreferenceGroup],
        max_tokens: usize,
        watch: &mut dyn FnMut(usize),
    ) -> pt_train::Result<Evaluation> {
        let indices: Vec<usize> = (0..examples.len()).collect();
        let batches = split_by_tokens(&indices, Some(max_tokens), |row| examples[row].num_tokens());
        let (mut sums, mut pairs, mut num_done) = (Sums::default(), Vec::new(), 0);
        no_grad(|| -> pt_train::Result<()> {
            for rows in batches {
                let chunk: Vec<&PreferenceGroup> = rows.iter().map(|&row| &examples[row]).collect();
                let first = sums.differences.len();
                let (_, _, out) = self.losses(pass, &chunk, &mut sums)?;
                let differences = sums.differences[first..].iter();
                pairs.extend(
                    differences
                        .zip(&out.prompt_of_pair)
                        .map(|(difference, prompt)| ScoredPair { example: rows[*prompt], difference: *difference }),
                );
                num_done += rows.len();
                watch(num_done);
            }
            Ok(())
        })?;
        self.record.0.borrow_mut().held_out = Some((pass.step, pairs));
        let mut values = sums.values();
        values.push(("calibration_error", Calibration::of(&sums.differences, NUM_BINS).expected_error));
        Ok(Evaluation { loss: sums.loss(), values })
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let recent: Vec<f32> = self.record.0.borrow().recent.iter().copied().collect();
        vec![(RECENT.into(), Tensor::from_slice(&recent))]
    }

    fn load_state(&mut self, get: &dyn Fn(&str) -> pt_tensor::Result<Tensor>) -> pt_train::Result<()> {
        let recent = numbers(&get(RECENT)?)?;
        self.record.0.borrow_mut().recent = recent.into();
        Ok(())
    }
}

/// The values of a tensor with one axis.
fn numbers(tensor: &Tensor) -> pt_train::Result<Vec<f32>> {
    let plain = tensor.detach().to_kind(Kind::Float).to_device(Device::Cpu);
    Ok(Vec::try_from(plain).map_err(pt_tensor::TensorError::from)?)
}

impl From<RlhfError> for TrainError {
    fn from(error: RlhfError) -> Self {
        match error {
            RlhfError::Tensor(error) => error.into(),
            RlhfError::Model(error) => error.into(),
            RlhfError::Train(error) => error,
            other => Self::Objective { message: other.to_string(), hint: other.hint() },
        }
    }
}
