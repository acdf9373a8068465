//! Rollouts: responses sampled with the weights that are trained, and everything that an update learns from.

use crate::packed::ranges;
use crate::reward::{Parts, Sample, WeightedSum};
use crate::{Prompt, Result, RlhfError, RolloutConfig};
use pt_model::{CausalLm, Completion, FinishReason, GenerateConfig, PromptGroup, Sites, Tokenizer, generate};
use pt_tensor::io::{SafetensorsReader, save_safetensors};
use pt_tensor::{Device, Kind, Tensor};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

/// The responses of one iteration, packed: prompt after prompt, response after response, token after token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rollout {
    /// Index of each prompt.
    pub prompts: Vec<usize>,
    /// Each prompt with its responses; all tokens of a response are labels, the one that ended it included.
    pub groups: Vec<PromptGroup>,
    /// The text of each response.
    pub texts: Vec<String>,
    /// Whether the model ended each response itself.
    pub is_ended: Vec<bool>,
    /// Log-prob of each token under the policy that sampled, nats.
    pub logprobs: Vec<f32>,
    /// The score of each response.
    pub scores: Vec<f32>,
    /// The name of each part of the score, and what it gave each response.
    pub parts: Vec<(String, Vec<f64>)>,
}

impl Rollout {
    /// Tokens of each response.
    pub fn lengths(&self) -> Vec<usize> {
        self.groups.iter().flat_map(|group| &group.completions).map(|response| response.token_ids.len()).collect()
    }

    /// Responses of each prompt.
    pub fn group_sizes(&self) -> Vec<usize> {
        self.groups.iter().map(|group| group.completions.len()).collect()
    }

    /// Which responses are each prompt's.
    pub fn responses_of_group(&self) -> Vec<Range<usize>> {
        ranges(&self.group_sizes()).collect()
    }

    /// Samples `num_samples` responses to each of the `chosen` prompts; `None` once `go_on` says no.
    ///
    /// `first` is how many prompts were sampled for before: response s to the p-th prompt of a run draws by (seed, p, s),
    /// whatever else is in the batch, so that a resumed run draws the same.
    ///
    /// # Errors
    /// Those of [`generate`].
    #[allow(clippy::too_many_arguments, reason = "one call, from the loop")]
    pub(crate) fn sample(
        (model, sites): (&CausalLm, &Rc<dyn Sites>),
        tokenizer: &Tokenizer,
        stop_ids: &[i64],
        prompts: &[Prompt],
        chosen: &[usize],
        (config, num_samples): (&RolloutConfig, usize),
        (seed, first): (u64, u64),
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Self>> {
        let mut rollout = Self { prompts: chosen.to_vec(), ..Self::default() };
        let mut num_tokens = 0;
        for (number, rows) in chosen.chunks(config.batch_size).enumerate() {
            let settings = GenerateConfig {
                max_new_tokens: config.max_new_tokens,
                temperature: config.temperature,
                stop_ids: stop_ids.to_vec(),
                seed,
                first_prompt: first + (number * config.batch_size) as u64,
                num_samples,
                with_logprobs: true,
                ..GenerateConfig::default()
            };
            let ids: Vec<Vec<i64>> = rows.iter().map(|&row| prompts[row].ids.clone()).collect();
            let responses = generate(model, Some(tokenizer), &ids, &settings, sites, |_, _| {
                num_tokens += 1;
                go_on(num_tokens)
            })?;
            if responses.iter().any(|response| response.finish_reason == FinishReason::Cancelled) {
                return Ok(None);
            }
            let mut responses = responses.into_iter();
            for prompt in ids {
                let mut group = PromptGroup { prompt, completions: vec![] };
                for response in responses.by_ref().take(num_samples) {
                    rollout.is_ended.push(response.finish_reason == FinishReason::Stop);
                    rollout.logprobs.extend(response.logprobs.unwrap_or_default());
                    rollout.texts.push(response.text.unwrap_or_default());
                    group.completions.push(Completion::new(response.token_ids));
                }
                rollout.groups.push(group);
            }
        }
        Ok(Some(rollout))
    }

    /// Fills in what each response is worth; `missing_eos_penalty` is taken off where it was cut off.
    ///
    /// # Errors
    /// Those of the rewards.
    pub(crate) fn judge(
        &mut self,
        reward: &mut WeightedSum,
        prompts: &[Prompt],
        missing_eos_penalty: Option<f64>,
    ) -> Result<()> {
        let mut samples = Vec::with_capacity(self.texts.len());
        for ((prompt, group), responses) in self.prompts.iter().zip(&self.groups).zip(self.responses_of_group()) {
            let prompt = &prompts[*prompt];
            for (response, index) in group.completions.iter().zip(responses) {
                samples.push(Sample {
                    prompt: &prompt.text,
                    response: &self.texts[index],
                    prompt_ids: &prompt.ids,
                    response_ids: &response.token_ids,
                    is_ended: self.is_ended[index],
                    fields: &prompt.fields,
                });
            }
        }
        let Parts { total, by_name } = reward.score_parts(&samples)?;
        let penalty = |is_ended: bool| if is_ended { 0.0 } else { missing_eos_penalty.unwrap_or(0.0) };
        let scores = total.into_iter().zip(&self.is_ended);
        self.scores = scores.map(|(score, is_ended)| (score - penalty(*is_ended)) as f32).collect();
        self.parts = by_name;
        Ok(())
    }

    /// Keeps a judged rollout, under a `key` that says of which iteration and policy it is.
    pub(crate) fn save(&self, path: &Path, key: &str) -> Result<()> {
        let column = |name: &str, tensor: Tensor| (name.to_string(), tensor);
        let counts = |counts: Vec<usize>| counts.into_iter().map(|count| count as i64).collect::<Vec<_>>();
        let token_ids: Vec<i64> =
            self.groups.iter().flat_map(|group| &group.completions).flat_map(|r| r.token_ids.clone()).collect();
        let mut tensors = vec![
            column("prompts", Tensor::from_slice(&counts(self.prompts.clone()))),
            column("group_sizes", Tensor::from_slice(&counts(self.group_sizes()))),
            column("lengths", Tensor::from_slice(&counts(self.lengths()))),
            column("token_ids", Tensor::from_slice(&token_ids)),
            column("is_ended", Tensor::from_slice(&self.is_ended)),
            column("logprobs", Tensor::from_slice(&self.logprobs)),
            column("scores", Tensor::from_slice(&self.scores)),
        ];
        for (number, (_, scores)) in self.parts.iter().enumerate() {
            tensors.push(column(&format!("part.{number}"), Tensor::from_slice(scores)));
        }
        Ok(save_safetensors(path, &tensors, &[("rollout", key)])?)
    }

    /// Reads a rollout that [`save`](Self::save) kept under the same key; `None` where there is none, or another.
    pub(crate) fn load(
        path: &Path,
        key: &str,
        prompts: &[Prompt],
        tokenizer: &Tokenizer,
        stop_ids: &[i64],
        names: &[String],
    ) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let reader = SafetensorsReader::open(path)?;
        if reader.metadata().get("rollout").map(String::as_str) != Some(key) {
            return Ok(None);
        }
        let integers = |name: &str| -> Result<Vec<i64>> {
            let tensor = reader.tensor(name, Device::Cpu)?;
            Ok(Vec::try_from(tensor).map_err(pt_tensor::TensorError::from)?)
        };
        let floats = |name: &str| -> Result<Vec<f64>> {
            let tensor = reader.tensor(name, Device::Cpu)?.to_kind(Kind::Double);
            Ok(Vec::try_from(tensor).map_err(pt_tensor::TensorError::from)?)
        };
        let narrow = |name: &str| Ok::<_, RlhfError>(floats(name)?.into_iter().map(|value| value as f32).collect());
        let damaged = || RlhfError::Config {
            place: path.display().to_string(),
            faults: vec!["its parts do not fit each other: delete the file to sample again".into()],
        };
        let mut rollout = Self {
            prompts: integers("prompts")?.into_iter().map(|row| row as usize).collect(),
            is_ended: floats("is_ended")?.into_iter().map(|is_ended| is_ended != 0.0).collect(),
            logprobs: narrow("logprobs")?,
            scores: narrow("scores")?,
            ..Self::default()
        };
        for (number, name) in names.iter().enumerate() {
            rollout.parts.push((name.clone(), floats(&format!("part.{number}"))?));
        }
        let (mut lengths, mut ids) = (integers("lengths")?.into_iter(), integers("token_ids")?.into_iter());
        let sizes = integers("group_sizes")?;
        if sizes.len() != rollout.prompts.len() || rollout.logprobs.len() != ids.len() {
            return Err(damaged());
        }
        for (&row, size) in rollout.prompts.iter().zip(sizes) {
            let prompt = prompts.get(row).ok_or_else(damaged)?.ids.clone();
            let mut group = PromptGroup { prompt, completions: vec![] };
            for _ in 0..size {
                let length = lengths.next().ok_or_else(damaged)? as usize;
                let token_ids: Vec<i64> = ids.by_ref().take(length).collect();
                let ends = usize::from(token_ids.last().is_some_and(|id| stop_ids.contains(id)));
                rollout.texts.push(tokenizer.decode(&token_ids[..token_ids.len() - ends], true)?);
                group.completions.push(Completion::new(token_ids));
            }
            rollout.groups.push(group);
        }
        let count = rollout.texts.len();
        if ids.next().is_some() || [rollout.is_ended.len(), rollout.scores.len()] != [count, count] {
            return Err(damaged());
        }
        Ok(Some(rollout))
    }
}
