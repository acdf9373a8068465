//! A reward model as a reward.

use crate::reward::{Reward, Sample};
use crate::{Result, RewardModel};
use pt_model::{CausalLm, Completion, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_tensor::{Device, TensorError, no_grad};
use pt_train::data::packing::split_by_tokens;
use std::rc::Rc;

/// Tokens that are scored at a time.
const MICRO_BATCH: usize = 4096;

/// Scores responses by a reward model that reads the policy's tokens; normalized where the model's statistics are known.
pub struct ModelScorer {
    name: String,
    model: Rc<CausalLm>,
    sites: Rc<dyn Sites>,
    reward: RewardModel,
}

impl ModelScorer {
    /// A reward model with its trunk: `model` with `sites` switched on.
    ///
    /// # Errors
    /// As [`RewardModel::check_fits`].
    pub fn new(name: &str, model: Rc<CausalLm>, sites: Rc<dyn Sites>, reward: RewardModel) -> Result<Self> {
        reward.check_fits(&model)?;
        Ok(Self { name: name.into(), model, sites, reward })
    }
}

impl Reward for ModelScorer {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        // Responses to one prompt stand side by side: it is computed once for all of them.
        let mut groups: Vec<PromptGroup> = Vec::new();
        for sample in samples {
            let response = Completion::new(sample.response_ids.to_vec());
            match groups.last_mut().filter(|group| group.prompt == sample.prompt_ids) {
                Some(group) => group.completions.push(response),
                None => groups.push(PromptGroup::single(sample.prompt_ids.to_vec(), response)),
            }
        }
        let all: Vec<usize> = (0..groups.len()).collect();
        let mut scores = Vec::with_capacity(samples.len());
        for rows in split_by_tokens(&all, Some(MICRO_BATCH), |row| groups[row].num_tokens()) {
            let rows: Vec<&PromptGroup> = rows.into_iter().map(|row| &groups[row]).collect();
            let batch = PackedBatch::new(&rows, self.model.device())?;
            let run = RunOptions::default();
            let of_batch = no_grad(|| self.reward.scores(&self.model, &self.sites, &batch, run))?;
            let of_batch = Vec::<f32>::try_from(of_batch.to_device(Device::Cpu)).map_err(TensorError::from)?;
            let statistics = self.reward.statistics;
            let normalized = |score: f32| statistics.map_or(f64::from(score), |known| known.normalize(score.into()));
            scores.extend(of_batch.into_iter().map(normalized));
        }
        Ok(scores)
    }
}
