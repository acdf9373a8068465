//! Actor, reference and critic: one base with different adapters and heads, or models of their own.

use crate::packed::ranges;
use crate::{Result, ScalarHead};
use pt_model::{CausalLm, PackedBatch, RunOptions, Sites};
use pt_tensor::{LabelLogprobs, Tensor, no_grad};
use pt_train::train::Trained;
use std::rc::Rc;

/// What the policy is held to.
pub enum Reference<'a> {
    /// The actor's model with other sites: without its adapter, or with another one.
    Sites(Rc<dyn Sites>),
    /// Another model.
    Model(&'a CausalLm, Rc<dyn Sites>),
}

/// What judges the states that a response goes through.
pub enum Critic<'a> {
    /// Sites (and a model) of its own with a head; its trained tensors, the head's among them.
    Own(Trained<'a>, ScalarHead),
    /// A head on the actor's hidden states; it is trained with the actor, whose tensors hold its weight.
    OnActor(ScalarHead),
}

/// Who takes part in training.
pub struct Roles<'a> {
    /// The policy.
    pub actor: Trained<'a>,
    /// What it is held to; `None` where nothing asks for it.
    pub reference: Option<Reference<'a>>,
    /// The critic; `None` where the mean of other responses is the baseline.
    pub critic: Option<Critic<'a>>,
}

/// States whose values are wanted: those that predict the tokens of each completion, and after them the last one of
/// completions that have an entry after their end.
pub(crate) struct ValuePlaces {
    /// Positions in the batch and their prompts, completion after completion.
    positions: Vec<i64>,
    prompts: Vec<usize>,
    /// Which of them predict labels.
    labels: Vec<i64>,
}

impl ValuePlaces {
    /// `lengths` are the tokens of the batch's completions, `value_lengths` their values.
    pub(crate) fn new(batch: &PackedBatch, lengths: &[usize], value_lengths: &[usize]) -> Result<Self> {
        let of_labels = Vec::<i64>::try_from(&batch.label_positions).map_err(pt_tensor::TensorError::from)?;
        let mut places = Self { positions: vec![], prompts: vec![], labels: vec![] };
        for (completion, range) in ranges(lengths).enumerate() {
            places.labels.extend((0..range.len()).map(|offset| (places.positions.len() + offset) as i64));
            places.positions.extend_from_slice(&of_labels[range.clone()]);
            if value_lengths[completion] > range.len() {
                places.positions.push(batch.last_positions[completion]);
            }
        }
        places.prompts = places.positions.iter().map(|&position| batch.prompt_of_token[position as usize]).collect();
        Ok(places)
    }

    /// Hidden states there, `[num_values, hidden_size]`.
    pub(crate) fn states(
        &self,
        model: &CausalLm,
        batch: &PackedBatch,
        sites: &Rc<dyn Sites>,
        run: RunOptions,
    ) -> Result<Tensor> {
        let positions = Tensor::from_slice(&self.positions).to_device(model.device());
        Ok(model.hidden_states_at(batch, (&positions, &self.prompts), sites, run)?)
    }

    /// Those of them that predict labels, `[num_labels, hidden_size]`.
    pub(crate) fn label_states(&self, states: &Tensor) -> Tensor {
        states.index_select(0, &Tensor::from_slice(&self.labels).to_device(states.device()))
    }
}

impl Roles<'_> {
    /// The reference's log-probs of a batch's labels, `[num_labels]`, without a graph.
    pub(crate) fn reference_logprobs(
        &self,
        reference: &Reference<'_>,
        batch: &PackedBatch,
        options: &LabelLogprobs,
    ) -> Result<Tensor> {
        let (model, sites) = match reference {
            Reference::Sites(sites) => (self.actor.model, sites),
            Reference::Model(model, sites) => (*model, sites),
        };
        Ok(no_grad(|| model.label_logprobs(batch, sites, RunOptions::default(), options))?.logprobs)
    }

    /// The critic's values at `places`, `[num_values]`, without a graph.
    pub(crate) fn values(&self, critic: &Critic<'_>, batch: &PackedBatch, places: &ValuePlaces) -> Result<Tensor> {
        let (trained, head) = match critic {
            Critic::Own(trained, head) => (trained, head),
            Critic::OnActor(head) => (&self.actor, head),
        };
        let states = no_grad(|| places.states(trained.model, batch, &trained.sites, RunOptions::default()))?;
        no_grad(|| head.forward(&states))
    }
}
