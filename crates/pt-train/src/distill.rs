//! Distillation: the values of an adapter learn to give the logits of another model.
//!
//! What BitDelta trains its scales by (Liu et al. 2024, section 3.2, <https://arxiv.org/abs/2402.10193>):
//! mean of (student's logits − teacher's logits)² over all tokens of a calibration set and the whole vocabulary.

use crate::data::{BatchConfig, Batches, PromptGroup};
use crate::error::{Result, TrainError};
use crate::schedule::ScheduleConfig;
use crate::step::{Optimization, finite};
use pt_model::{CausalLm, Completion, Linear, PackedBatch, RunOptions, Sites};
use pt_tensor::{AdamWConfig, Kind, Tensor, no_grad};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Settings of a distillation; the defaults are BitDelta's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Highest learning rate; null for BitDelta's 1e-4, but at most a twentieth of the mean magnitude of the trained
    /// values: Adam's steps are about the learning rate whatever the gradients, and would overshoot small scales.
    pub learning_rate: Option<f64>,
    /// Its course over the run.
    pub schedule: ScheduleConfig,
    /// The optimizer.
    pub adamw: AdamWConfig,
    /// Pieces of text a step.
    pub batch_size: usize,
    /// Tokens of a piece; longer rows are cut into several.
    pub seq_len: usize,
    /// Seed of the order of pieces.
    pub seed: u64,
    /// Keep only layer inputs and compute activations again in the backward pass.
    pub activation_checkpointing: bool,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            steps: 200,
            learning_rate: None,
            schedule: ScheduleConfig { warmup_ratio: 0.0, ..ScheduleConfig::default() },
            adamw: AdamWConfig::default(),
            batch_size: 4,
            seq_len: 128,
            seed: 0,
            activation_checkpointing: false,
        }
    }
}

impl DistillConfig {
    /// Lists every fault at once.
    ///
    /// # Errors
    /// [`TrainError::Config`].
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if self.learning_rate.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
            faults.push(format!("learning_rate is {:?}, expected over 0", self.learning_rate.unwrap_or_default()));
        }
        for (field, value) in [("batch_size", self.batch_size), ("seq_len", self.seq_len)] {
            if value == 0 {
                faults.push(format!("{field} is 0, expected at least 1"));
            }
        }
        faults.extend(self.schedule.build(1).err().map(|fault| fault.to_string()));
        if faults.is_empty() {
            return Ok(());
        }
        Err(TrainError::Config { place: "distillation".into(), message: faults.join("; ") })
    }
}

/// A model with what is switched on at its sites. Teacher and student may be one model with different sites.
#[derive(Debug, Clone)]
pub struct Role<'a> {
    /// The model.
    pub model: &'a CausalLm,
    /// Its adapter, or [`pt_model::Bare`].
    pub sites: Rc<dyn Sites>,
}

impl Role<'_> {
    fn output_layer(&self) -> Result<&Linear> {
        let missing = || TrainError::Config { place: "model".into(), message: "has no output layer".into() };
        self.model.linear_layers().last().ok_or_else(missing)
    }

    /// What the output layer multiplies, `[tokens, n]`, and its weight, `[vocab_size, n]`.
    fn output(&self, hidden_states: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(self.sites.output(self.output_layer()?, hidden_states)?)
    }
}

/// Mean of (student's logits − teacher's logits)² without logits.
///
/// With δ = s − t for the hidden states s and t of a token, and one output weight W, the squares of its V differences add up
/// to ‖W·δ‖² = δᵀ·(WᵀW)·δ. WᵀW is `[hidden_size, hidden_size]` and computed once, so a step pays `hidden_size` products a
/// token in place of `vocab_size` of them for each model, and nothing as large as a tile of logits is held. Where the two
/// weights differ, the same holds for δ = \[s, t\] and W = \[W_s, −W_t\], in f64, since ‖W_s·s‖² and ‖W_t·t‖² cancel.
#[derive(Debug)]
pub struct LogitsError {
    /// `[n, n]`; f32, or f64 where the output weights differ.
    gram: Tensor,
    is_shared: bool,
    vocab_size: i64,
}

/// Rows of the output weight that are taken into the Gram matrix at once.
const VOCAB_TILE: i64 = 8192;

impl LogitsError {
    /// For two roles whose output layers stay as they are.
    ///
    /// # Errors
    /// [`TrainError::Config`] when their vocabularies differ in size or the student's output weight is trained.
    pub fn new(student: &Role<'_>, teacher: &Role<'_>) -> Result<Self> {
        let probe = |role: &Role<'_>| -> Result<Tensor> {
            let width = role.output_layer()?.weight.size().1;
            let probe = Tensor::f_zeros([1, width], (role.model.kind(), role.model.device()));
            Ok(role.output(&probe.map_err(pt_tensor::TensorError::from)?)?.1)
        };
        let (of_student, of_teacher) = (probe(student)?, probe(teacher)?);
        let fault = |message: String| Err(TrainError::Config { place: "distillation".into(), message });
        if of_student.requires_grad() {
            return fault("the student's output layer is trained, expected a frozen one".into());
        }
        let (vocab_size, other) = (of_student.size()[0], of_teacher.size()[0]);
        if vocab_size != other {
            return fault(format!("the teacher's vocabulary has {other} entries, the student's {vocab_size}"));
        }
        no_grad(|| {
            let is_shared = of_student.size() == of_teacher.size() && of_student.equal(&of_teacher);
            let tile = |first: i64| {
                let len = VOCAB_TILE.min(vocab_size - first);
                let of_student = of_student.narrow(0, first, len);
                if is_shared {
                    return of_student.to_kind(Kind::Float);
                }
                let of_teacher = -of_teacher.narrow(0, first, len).to_kind(Kind::Double);
                Tensor::cat(&[of_student.to_kind(Kind::Double), of_teacher], 1)
            };
            let grams = (0..vocab_size).step_by(VOCAB_TILE as usize).map(|first| {
                let tile = tile(first);
                tile.tr().matmul(&tile)
            });
            let gram = grams.reduce(|sum, part| sum + part).unwrap_or_else(|| tile(0));
            Ok(Self { gram, is_shared, vocab_size })
        })
    }

    /// The sum of squares over tokens, divided by the vocabulary's size: a scalar with a gradient to the student.
    fn sum(&self, student: &Role<'_>, teacher: &Role<'_>, batch: &PackedBatch, run: RunOptions) -> Result<Tensor> {
        let of_teacher = no_grad(|| -> Result<Tensor> {
            let hidden_states = teacher.model.hidden_states(batch, &teacher.sites, RunOptions::default())?;
            self.states(teacher, hidden_states)
        })?;
        let of_student = self.states(student, student.model.hidden_states(batch, &student.sites, run)?)?;
        let delta = if self.is_shared { of_student - of_teacher } else { Tensor::cat(&[of_student, of_teacher], 1) };
        Ok((delta.matmul(&self.gram) * &delta).sum(Kind::Double) / self.vocab_size as f64)
    }

    /// What the output layer multiplies, in the kind of the Gram matrix.
    fn states(&self, role: &Role<'_>, hidden_states: Tensor) -> Result<Tensor> {
        let states = if self.is_shared { hidden_states } else { role.output(&hidden_states)?.0 };
        Ok(states.to_kind(self.gram.kind()))
    }

    /// Mean over all tokens of `pieces`, without a graph.
    ///
    /// # Errors
    /// Those of the models; [`TrainError::NonFinite`].
    pub fn mean(&self, student: &Role<'_>, teacher: &Role<'_>, pieces: &[Vec<i64>]) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for piece in pieces {
            let batch = PackedBatch::new(&[group(piece)], student.model.device())?;
            let part = no_grad(|| self.sum(student, teacher, &batch, RunOptions::default()))?;
            sum += finite(0, "logits", &part)?;
            count += piece.len();
        }
        Ok(sum / count.max(1) as f64)
    }
}

fn group(piece: &[i64]) -> PromptGroup {
    PromptGroup::single(vec![], Completion::new(piece.to_vec()))
}

/// Rows as pieces of at most `seq_len` tokens.
pub fn pieces(rows: &[PromptGroup], seq_len: usize) -> Vec<Vec<i64>> {
    let tokens = rows.iter().flat_map(|row| {
        row.completions.iter().map(|completion| [row.prompt.as_slice(), completion.token_ids.as_slice()].concat())
    });
    tokens.flat_map(|ids| ids.chunks(seq_len.max(1)).map(<[i64]>::to_vec).collect::<Vec<_>>()).collect()
}

/// One step of a distillation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistillRecord {
    /// Counted from 1.
    pub step: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Mean squared difference of logits before the step.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
}

/// Trains `parameters` so that the student gives the teacher's logits on `pieces` of text; returns the steps done, fewer
/// than asked for where `stop` was set.
///
/// # Errors
/// [`TrainError::Config`], [`TrainError::NonFinite`] with the place, [`TrainError::Step`] for what the models report.
pub fn distill(
    student: &Role<'_>,
    parameters: Vec<(String, Tensor)>,
    teacher: &Role<'_>,
    pieces: &[Vec<i64>],
    config: &DistillConfig,
    stop: &AtomicBool,
    mut watch: impl FnMut(DistillRecord),
) -> Result<u64> {
    config.validate()?;
    let error = LogitsError::new(student, teacher)?;
    let batching = BatchConfig { batch_size: config.batch_size, seed: config.seed, ..BatchConfig::default() };
    let mut batches = Batches::new(pieces.iter().map(|piece| group(piece)).collect(), batching)?;
    let learning_rate = config.learning_rate.unwrap_or_else(|| 1e-4f64.min(mean_magnitude(&parameters) / 20.0));
    let schedule = config.schedule.build(config.steps as usize)?;
    let mut optimization =
        Optimization::new(parameters, config.adamw, &std::env::temp_dir(), schedule, learning_rate, None)?;
    let run = RunOptions { is_checkpointed: config.activation_checkpointing };
    for step in 1..=config.steps {
        if stop.load(Ordering::Relaxed) {
            return Ok(step - 1);
        }
        let mut loss = 0.0;
        for groups in batches.next_window() {
            let batch = PackedBatch::new(&groups, student.model.device())?;
            let failed = |source| TrainError::Step { step, tokens: batch.num_tokens(), source: Box::new(source) };
            let mean = error.sum(student, teacher, &batch, run)? / batch.num_tokens() as f64;
            loss += finite(step, "logits", &mean)?;
            let one = mean.ones_like();
            pt_tensor::autograd::backward(&[mean], &[one]).map_err(|source| failed(source.into()))?;
        }
        let update = optimization.step(step)?;
        watch(DistillRecord { step, total_steps: config.steps, loss, learning_rate: update.learning_rate });
    }
    optimization.check_finite(config.steps)?;
    Ok(config.steps)
}

fn mean_magnitude(parameters: &[(String, Tensor)]) -> f64 {
    let sum: f64 = parameters.iter().map(|(_, tensor)| tensor.abs().sum(Kind::Double).double_value(&[])).sum();
    let count: usize = parameters.iter().map(|(_, tensor)| tensor.numel()).sum();
    sum / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_pieces_and_faults_are_listed() {
        let row = PromptGroup::single(vec![1, 2, 3], Completion::new(vec![4, 5]));
        assert_eq!(pieces(&[row.clone(), row], 3), [vec![1, 2, 3], vec![4, 5], vec![1, 2, 3], vec![4, 5]]);
        let config = DistillConfig { batch_size: 0, learning_rate: Some(-1.0), ..DistillConfig::default() };
        let text = config.validate().expect_err("faults").to_string();
        assert!(text.contains("learning_rate is -1") && text.contains("batch_size is 0"), "{text}");
    }
}
