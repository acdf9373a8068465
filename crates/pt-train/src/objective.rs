//! What a run optimizes: examples, their gradients and their evaluation.

use crate::error::{Result, TrainError};
use pt_model::{CausalLm, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_tensor::{LabelLogprobs, LabelOutput, Tensor};
use std::rc::Rc;

/// One row as an objective takes it.
pub trait Example {
    /// Its tokens: a prompt and its completions.
    fn group(&self) -> &PromptGroup;

    /// Hands everything that training on it depends on to `sink`: a resumed run has to see the same.
    fn digest(&self, sink: &mut dyn FnMut(&[u8])) {
        self.group().digest(sink);
    }
}

impl Example for PromptGroup {
    fn group(&self) -> &PromptGroup {
        self
    }

    fn digest(&self, sink: &mut dyn FnMut(&[u8])) {
        let parts = std::iter::once((&self.prompt, 0u8)).chain(self.completions.iter().map(|c| (&c.token_ids, 1)));
        for (ids, mark) in parts {
            sink(&[mark]);
            sink(&(ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|id| sink(&id.to_le_bytes()));
        }
        self.completions.iter().flat_map(|c| &c.is_label).for_each(|&is_label| sink(&[u8::from(is_label)]));
    }
}

/// The model as one pass of the loop runs it.
pub struct Pass<'a> {
    /// The step at hand, for messages; 0 outside a run.
    pub step: u64,
    /// The model.
    pub model: &'a CausalLm,
    /// What is switched on at its sites.
    pub sites: &'a Rc<dyn Sites>,
    /// How it is run where gradients are wanted.
    pub options: RunOptions,
}

impl Pass<'_> {
    /// Log-probs of a batch's labels.
    ///
    /// # Errors
    /// [`TrainError::Step`] with the step and the size of the batch.
    pub fn label_logprobs(&self, batch: &PackedBatch, options: &LabelLogprobs) -> Result<LabelOutput> {
        let out = self.model.label_logprobs(batch, self.sites, self.options, options);
        out.map_err(|source| self.failed(batch, source))
    }

    /// Adds the gradients of a scalar loss to the trained tensors.
    ///
    /// # Errors
    /// As [`label_logprobs`](Self::label_logprobs).
    pub fn backward(&self, loss: Tensor, batch: &PackedBatch) -> Result<()> {
        let one = loss.ones_like();
        pt_tensor::autograd::backward(&[loss], &[one]).map_err(|source| self.failed(batch, source.into()))
    }

    fn failed(&self, batch: &PackedBatch, source: pt_model::ModelError) -> TrainError {
        TrainError::Step { step: self.step, tokens: batch.num_tokens(), source: Box::new(source) }
    }
}

/// What a window's gradients came from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WindowRecord {
    /// The loss that was minimised, a mean over the whole window.
    pub loss: f64,
    /// Other numbers by the name of their metric; the first is shown beside the loss.
    pub values: Vec<(&'static str, f64)>,
    /// Tokens that went through the model.
    pub num_tokens: i64,
}

/// Means over a held-out set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Evaluation {
    /// The objective's loss.
    pub loss: f64,
    /// Other numbers by the name of their metric, without `eval_`; the first is shown beside the loss.
    pub values: Vec<(&'static str, f64)>,
}

impl Evaluation {
    /// The number of a metric.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }
}

/// Turns examples into gradients. The loop does the rest: order, clipping, updates, evaluation, checkpoints, resume.
pub trait Objective {
    /// What it is trained on.
    type Example: Example;

    /// Adds the gradients of the window's mean loss; a window is the micro-batches of one optimizer step, and its
    /// gradient does not depend on how it is cut into them.
    ///
    /// # Errors
    /// [`TrainError::NonFinite`] with the place, [`TrainError::Step`].
    fn accumulate(&mut self, pass: &Pass<'_>, window: &[Vec<&Self::Example>]) -> Result<WindowRecord>;

    /// Means over `examples`, without gradients, in micro-batches of at most `max_tokens`; `watch` hears after each of
    /// them how many examples are done.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate).
    fn evaluate(
        &mut self,
        pass: &Pass<'_>,
        examples: &[Self::Example],
        max_tokens: usize,
        watch: &mut dyn FnMut(usize),
    ) -> Result<Evaluation>;

    /// Hears that the update of step `step` is done.
    ///
    /// # Errors
    /// The objective's own.
    fn after_update(&mut self, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Its own state, which a checkpoint keeps.
    fn state(&self) -> Vec<(String, Tensor)> {
        vec![]
    }

    /// Takes back what [`state`](Self::state) gave.
    ///
    /// # Errors
    /// Those of `get`.
    fn load_state(&mut self, _get: &dyn Fn(&str) -> pt_tensor::Result<Tensor>) -> Result<()> {
        Ok(())
    }
}

/// [`Objective::evaluate`] of the model as it stands, without dropout.
///
/// # Errors
/// As there.
pub fn evaluate<E: Example>(
    objective: &mut dyn Objective<Example = E>,
    pass: &Pass<'_>,
    examples: &[E],
    max_tokens: usize,
    watch: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let was_training = pass.sites.set_training(false);
    let evaluation = objective.evaluate(pass, examples, max_tokens, watch);
    pass.sites.set_training(was_training);
    evaluation
}
