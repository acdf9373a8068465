//! Supervised fine-tuning: −log p of the trained tokens, averaged over the whole accumulation window.

use crate::data::PromptGroup;
use crate::data::packing::split_by_tokens;
use crate::error::{Result, TrainError};
use crate::metrics::names;
use crate::objective::{Evaluation, Objective, Pass, WindowRecord};
use crate::settings::{ObjectiveConfig, TrainConfig};
use crate::step::{finite, first_not_finite};
use pt_model::PackedBatch;
use pt_tensor::{Kind, LabelLogprobs, no_grad};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What supervised fine-tuning minimises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SftLoss {
    /// −log p of each trained token.
    #[default]
    Nll,
    /// p · −log p with the gradient through −log p alone: Dynamic Fine-Tuning, Wu et al. 2025,
    /// <https://arxiv.org/abs/2508.05629>.
    Dft,
}

/// The objective's part of the settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sft {
    /// `nll`, or `dft`, which weighs each token by its probability (Dynamic Fine-Tuning).
    pub loss: SftLoss,
}

/// Settings of a run of supervised fine-tuning.
pub type SftConfig = TrainConfig<Sft>;

impl ObjectiveConfig for Sft {
    const LEARNING_RATE: f64 = 2e-4;

    fn faults(&self) -> Vec<String> {
        vec![]
    }
}

impl Objective for Sft {
    type Example = PromptGroup;

    fn accumulate(&mut self, pass: &Pass<'_>, window: &[Vec<&PromptGroup>]) -> Result<WindowRecord> {
        let num_labels: usize = window.iter().flatten().map(|group| group.num_labels()).sum();
        let num_labels = num_labels.max(1) as f64;
        let (mut loss, mut correct, mut num_tokens) = (0.0, 0.0, 0);
        // Each micro-batch adds its share: the sum over its labels divided by the labels of the window.
        for groups in window {
            let batch = PackedBatch::new(groups, pass.model.device())?;
            num_tokens += batch.num_tokens();
            if batch.num_labels() == 0 {
                continue;
            }
            let out = pass.label_logprobs(&batch, &LabelLogprobs::default())?;
            finite(pass.step, "log-probs", &out.logprobs)?;
            correct += out.is_top1.sum(Kind::Double).double_value(&[]);
            let terms = match self.loss {
                SftLoss::Nll => out.logprobs,
                SftLoss::Dft => out.logprobs.detach().exp() * out.logprobs,
            };
            loss -= terms.sum(Kind::Double).double_value(&[]);
            pass.backward(terms.sum(None) * (-1.0 / num_labels), &batch)?;
        }
        let values = vec![(names::ACCURACY, correct / num_labels)];
        Ok(WindowRecord { loss: loss / num_labels, values, num_tokens })
    }

    /// Mean −log p of the labels, whatever is minimised.
    ///
    /// # Errors
    /// [`TrainError::Config`] when there is no label, [`TrainError::NonFinite`] with the row.
    fn evaluate(
        &mut self,
        pass: &Pass<'_>,
        groups: &[PromptGroup],
        max_tokens: usize,
        watch: &mut dyn FnMut(usize),
    ) -> Result<Evaluation> {
        let indices: Vec<usize> = (0..groups.len()).collect();
        let batches = split_by_tokens(&indices, Some(max_tokens), |row| groups[row].num_tokens());
        let (mut sum, mut correct, mut count, mut num_done) = (0.0, 0.0, 0, 0);
        no_grad(|| -> Result<()> {
            for rows in batches {
                let chunk: Vec<&PromptGroup> = rows.iter().map(|&row| &groups[row]).collect();
                let batch = PackedBatch::new(&chunk, pass.model.device())?;
                let out = pass.label_logprobs(&batch, &LabelLogprobs::default())?;
                let logprob = out.logprobs.sum(Kind::Double).double_value(&[]);
                if !logprob.is_finite() {
                    let completion = batch.label_completion[first_not_finite(&out.logprobs)] as usize;
                    let mut row_of =
                        rows.iter().flat_map(|&row| std::iter::repeat_n(row, groups[row].completions.len()));
                    let row = row_of.nth(completion).unwrap_or(0);
                    let place = format!("held-out row {row} of {}, counted from 0", groups.len());
                    return Err(TrainError::NonFinite { step: pass.step, what: "held-out log-probs".into(), place });
                }
                sum -= logprob;
                correct += out.is_top1.sum(Kind::Double).double_value(&[]);
                count += batch.num_labels();
                num_done += rows.len();
                watch(num_done);
            }
            Ok(())
        })?;
        if count == 0 {
            let message = "no row holds a token to score".into();
            return Err(TrainError::Config { place: "eval_data".into(), message });
        }
        let count = count as f64;
        Ok(Evaluation { loss: sum / count, values: vec![(names::ACCURACY, correct / count)] })
    }
}
