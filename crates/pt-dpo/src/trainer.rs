//! Preference training: one pass over each prompt group gives the log-probs of all its completions.

use crate::example::DpoExample;
use crate::reference::Reference;
use crate::{
    DpoError, LossConfig, LossOutput, NllAverage, PairBatch, PairLogps, UnpairedBatch, completion_lengths, kl_estimate,
    ld_logps, preference_loss, preference_metrics, sum_logps, unpaired_loss, unpaired_metrics, wpo_weights,
};
use pt_model::{PackedBatch, PromptGroup};
use pt_tensor::{Kind, LabelLogprobs, LabelOutput, Tensor, no_grad};
use pt_train::data::packing::split_by_tokens;
use pt_train::data::{Judgement, Pair};
use pt_train::objective::{Evaluation, Example as _, Objective, Pass, WindowRecord};
use pt_train::step::finite;
use pt_train::{Result, TrainError};

/// The metric that is shown beside the loss: the share of pairs whose chosen completion gained more on the reference.
pub const ACCURACY: &str = "rewards/accuracies";
/// Share of pairs whose chosen completion is the more probable one under the policy alone.
pub const LOGPS_ACCURACY: &str = "logps/accuracies";

/// By how much the chosen rewards lead.
const MARGINS: &str = "rewards/margins";

/// Preference training with one or more of the crate's losses.
///
/// A window's loss is the mean over its pairs (its labelled completions for KTO). Chosen and rejected attend to one copy
/// of their prompt, in the policy's pass and in the reference's, and no logits are held.
pub struct Dpo {
    config: LossConfig,
    reference: Reference,
}

/// Sums over a window or a held-out set.
#[derive(Default)]
struct Sums {
    loss: f64,
    count: f64,
    values: Vec<(&'static str, f64, f64)>,
    num_tokens: i64,
}

impl Sums {
    fn add(&mut self, name: &'static str, mean: f64, count: f64) {
        if !mean.is_finite() || count == 0.0 {
            return;
        }
        match self.values.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, sum, total)) => (*sum, *total) = (*sum + mean * count, *total + count),
            None => self.values.push((name, mean * count, count)),
        }
    }

    /// Means, the one to show first.
    fn means(&self) -> Vec<(&'static str, f64)> {
        let mut means: Vec<(&'static str, f64)> =
            self.values.iter().map(|(name, sum, count)| (*name, sum / count)).collect();
        let mean = |name| means.iter().find(|(known, _)| *known == name).map(|(_, mean)| *mean);
        if let (None, Some((chosen, rejected))) = (mean(MARGINS), mean("rewards/chosen").zip(mean("rewards/rejected")))
        {
            means.push((MARGINS, chosen - rejected));
        }
        means.sort_by_key(|(name, _)| *name != ACCURACY);
        means
    }
}

impl Dpo {
    /// Trains with `config`, held to `reference`.
    ///
    /// # Errors
    /// [`DpoError::Config`] with every fault of the settings.
    pub fn new(config: LossConfig, reference: Reference) -> crate::Result<Self> {
        config.validate()?;
        Ok(Self { config, reference })
    }

    /// Loss terms a row gives: its pairs, or its labelled completions.
    fn count(&self, example: &DpoExample) -> usize {
        match self.config.is_unpaired() {
            true => example.preference.group.completions.len(),
            false => example.preference.pairs().len(),
        }
    }

    /// KTO's z₀ over rows, without a graph; 0 for the other losses.
    fn kl(&self, pass: &Pass<'_>, micro_batches: &[Vec<&DpoExample>]) -> Result<f64> {
        let (mut policy, mut reference) = (Vec::new(), Vec::new());
        for examples in micro_batches {
            let with: Vec<&&DpoExample> = examples.iter().filter(|example| example.mismatched.is_some()).collect();
            let groups: Vec<&PromptGroup> = with.iter().filter_map(|example| example.mismatched.as_ref()).collect();
            if groups.is_empty() {
                continue;
            }
            let batch = PackedBatch::new(&groups, pass.model.device())?;
            let kept = with.iter().map(|example| example.reference.as_ref().map(|kept| kept.mismatched.as_slice()));
            let Some(of_reference) = self.reference.logprobs(pass.model, pass.sites, &batch, kept)? else {
                return Ok(0.0);
            };
            let out = no_grad(|| pass.label_logprobs(&batch, &LabelLogprobs::default()))?;
            policy.push(batch.sum_by_completion(&out.logprobs.to_kind(Kind::Float)));
            reference.push(batch.sum_by_completion(&of_reference));
        }
        if policy.is_empty() {
            return Ok(0.0);
        }
        Ok(kl_estimate(&Tensor::cat(&policy, 0), &Tensor::cat(&reference, 0))?)
    }

    /// Losses of one micro-batch, `[pairs]` or `[completions]`, and its numbers into `sums`.
    fn losses(
        &self,
        pass: &Pass<'_>,
        examples: &[&DpoExample],
        batch: &PackedBatch,
        window: &Window,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        // Before the policy's pass: a copy of the policy takes the policy's place for a moment.
        let kept = examples.iter().map(|example| example.reference.as_ref().map(|kept| kept.completions.as_slice()));
        let reference = self.reference.logprobs(pass.model, pass.sites, batch, kept)?;
        let options = LabelLogprobs { with_collision: self.config.wpo, ..LabelLogprobs::default() };
        let out = pass.label_logprobs(batch, &options)?;
        finite(pass.step, "log-probs", &out.logprobs)?;
        sums.num_tokens += batch.num_tokens();
        let losses = match self.config.is_unpaired() {
            true => self.unpaired(examples, batch, &out, reference, window, sums)?,
            false => self.paired(examples, batch, &out, reference, window, sums)?,
        };
        sums.loss += finite(pass.step, "losses", &losses)?;
        sums.count += losses.numel() as f64;
        Ok(losses)
    }

    fn paired(
        &self,
        examples: &[&DpoExample],
        batch: &PackedBatch,
        out: &LabelOutput,
        reference: Option<Tensor>,
        window: &Window,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        let device = out.logprobs.device();
        let ids = Tensor::from_slice(&batch.label_completion).to_device(device);
        let num_completions = batch.num_completions as i64;
        // Pairs by the number of each completion in the batch.
        let (mut chosen, mut rejected) = (Vec::new(), Vec::new());
        let (mut margins, mut weights) = (Vec::new(), Vec::new());
        let mut first = 0;
        for example in examples {
            // A difference of scores is in the judge's unit: it enters as far as the settings say.
            let scale = if example.preference.judgement.states_margin() { 1.0 } else { self.config.margin_scale };
            for Pair { chosen: one, rejected: other, margin } in example.preference.pairs() {
                chosen.push(first + one as i64);
                rejected.push(first + other as i64);
                margins.push((scale * margin) as f32);
                weights.push(example.preference.weight as f32);
            }
            first += example.preference.group.completions.len() as i64;
        }
        let logps_of = |logprobs: &Tensor| -> crate::Result<PairLogps> {
            match self.config.ld_alpha {
                Some(alpha) => ld_logps(logprobs, &ids, &chosen, &rejected, alpha),
                None => PairLogps::select(&sum_logps(logprobs, &ids, num_completions)?, &chosen, &rejected),
            }
        };
        let take = |column: &Tensor, side: &[i64]| column.index_select(0, &Tensor::from_slice(side).to_device(device));
        let column = |values: &[f32]| Tensor::from_slice(values).to_device(device);
        let lengths = completion_lengths(&ids, num_completions)?;
        let mut pairs =
            PairBatch::new(logps_of(&out.logprobs)?).with_lengths(take(&lengths, &chosen), take(&lengths, &rejected));
        pairs.reference = reference.as_ref().map(logps_of).transpose()?;
        pairs.mean_chosen_length = Some(window.mean_chosen_length);
        if self.config.ld_alpha.is_some() {
            // LD-DPO's weights are the preference's alone: −log p counts every token alike.
            let nll = -take(&sum_logps(&out.logprobs, &ids, num_completions)?, &chosen);
            pairs.chosen_nll = Some(match self.config.nll_average {
                NllAverage::Sequences => nll / take(&lengths, &chosen),
                NllAverage::Tokens => nll / window.mean_chosen_length,
            });
        }
        pairs.margins = margins.iter().any(|margin| *margin != 0.0).then(|| column(&margins));
        pairs.weights = weights.iter().any(|weight| *weight != 1.0).then(|| column(&weights));
        if let Some(log_collision) = &out.log_collision {
            let weights = wpo_weights(&out.logprobs.detach(), log_collision, &ids, num_completions)?;
            pairs.wpo_weights = Some(take(&weights, &chosen) * take(&weights, &rejected));
        }
        let output = preference_loss(&self.config, &pairs)?;
        let count = chosen.len() as f64;
        for (name, mean) in preference_metrics(&output, &pairs.policy) {
            sums.add(name, mean, count);
        }
        let is_right = pairs.policy.chosen_logps.gt_tensor(&pairs.policy.rejected_logps);
        sums.add(LOGPS_ACCURACY, is_right.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]), count);
        let LossOutput { losses, .. } = output;
        Ok(losses)
    }

    fn unpaired(
        &self,
        examples: &[&DpoExample],
        batch: &PackedBatch,
        out: &LabelOutput,
        reference: Option<Tensor>,
        window: &Window,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        let device = out.logprobs.device();
        let (mut labels, mut weights) = (Vec::new(), Vec::new());
        for example in examples {
            let Judgement::Labels(of_row) = &example.preference.judgement else {
                return Err(TrainError::Config {
                    place: "loss_type".into(),
                    message: "takes single completions with a label, and a row has pairs".into(),
                });
            };
            labels.extend_from_slice(of_row);
            weights.extend(of_row.iter().map(|_| example.preference.weight as f32));
        }
        let policy_logps = batch.sum_by_completion(&out.logprobs);
        let reference = reference.ok_or_else(|| DpoError::missing("reference", "kto"))?;
        let rows = UnpairedBatch {
            reference_logps: batch.sum_by_completion(&reference),
            policy_logps,
            is_desirable: Tensor::from_slice(&labels).to_device(device),
            kl: window.kl,
            weights: weights
                .iter()
                .any(|weight| *weight != 1.0)
                .then(|| Tensor::from_slice(&weights).to_device(device)),
        };
        let output = unpaired_loss(&self.config, &rows)?;
        let num_desirable = labels.iter().filter(|label| **label).count() as f64;
        for (name, mean) in unpaired_metrics(&output, &rows) {
            let count = match name {
                // Of the window's means, once they are known: micro-batches may hold one side only.
                MARGINS => continue,
                _ if name.ends_with("/chosen") => num_desirable,
                _ if name.ends_with("/rejected") => labels.len() as f64 - num_desirable,
                _ => labels.len() as f64,
            };
            sums.add(name, mean, count);
        }
        Ok(output.losses)
    }

    fn window(&self, pass: &Pass<'_>, micro_batches: &[Vec<&DpoExample>]) -> Result<Window> {
        let rows = || micro_batches.iter().flatten();
        let num_terms: usize = rows().map(|example| self.count(example)).sum();
        let chosen_length = |example: &&DpoExample| -> usize {
            let lengths: Vec<usize> = example.preference.group.label_counts().collect();
            example.preference.pairs().iter().map(|pair| lengths[pair.chosen]).sum()
        };
        let kl = if self.config.is_unpaired() { self.kl(pass, micro_batches)? } else { 0.0 };
        let mean_chosen_length = rows().map(chosen_length).sum::<usize>() as f64 / num_terms.max(1) as f64;
        Ok(Window { num_terms, mean_chosen_length, kl })
    }
}

/// What the loss of one micro-batch has to know of the whole window.
struct Window {
    /// Pairs or labelled completions.
    num_terms: usize,
    mean_chosen_length: f64,
    kl: f64,
}

impl Objective for Dpo {
    type Example = DpoExample;

    fn accumulate(&mut self, pass: &Pass<'_>, micro_batches: &[Vec<&DpoExample>]) -> Result<WindowRecord> {
        let window = self.window(pass, micro_batches)?;
        let mut sums = Sums::default();
        for examples in micro_batches {
            let groups: Vec<&PromptGroup> = examples.iter().map(|example| example.group()).collect();
            let batch = PackedBatch::new(&groups, pass.model.device())?;
            let losses = self.losses(pass, examples, &batch, &window, &mut sums)?;
            if losses.numel() > 0 {
                pass.backward(losses.sum(None) / window.num_terms as f64, &batch)?;
            }
        }
        let loss = sums.loss / sums.count.max(1.0);
        Ok(WindowRecord { loss, values: sums.means(), num_tokens: sums.num_tokens })
    }

    fn evaluate(
        &mut self,
        pass: &Pass<'_>,
        examples: &[DpoExample],
        max_tokens: usize,
        watch: &mut dyn FnMut(usize),
    ) -> Result<Evaluation> {
        let indices: Vec<usize> = (0..examples.len()).collect();
        let split = split_by_tokens(&indices, Some(max_tokens), |row| examples[row].group().num_tokens());
        let micro_batches: Vec<Vec<&DpoExample>> =
            split.into_iter().map(|rows| rows.into_iter().map(|row| &examples[row]).collect()).collect();
        let (mut sums, mut num_done) = (Sums::default(), 0);
        no_grad(|| -> Result<()> {
            let window = self.window(pass, &micro_batches)?;
            for examples in &micro_batches {
                let groups: Vec<&PromptGroup> = examples.iter().map(|example| example.group()).collect();
                let batch = PackedBatch::new(&groups, pass.model.device())?;
                let _ = self.losses(pass, examples, &batch, &window, &mut sums)?;
                num_done += examples.len();
                watch(num_done);
            }
            Ok(())
        })?;
        Ok(Evaluation { loss: sums.loss / sums.count.max(1.0), values: sums.means() })
    }

    fn after_update(&mut self, step: u64) -> Result<()> {
        self.reference.after_update(step);
        Ok(())
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        self.reference.state()
    }

    fn load_state(&mut self, get: &dyn Fn(&str) -> pt_tensor::Result<Tensor>) -> Result<()> {
        self.reference.load_state(get)
    }
}

impl From<DpoError> for TrainError {
    fn from(error: DpoError) -> Self {
        match error {
            DpoError::Tensor(error) => error.into(),
            other => Self::Objective { message: other.to_string(), hint: other.hint() },
        }
    }
}
