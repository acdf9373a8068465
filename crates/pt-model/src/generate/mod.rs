//! Generation with a key/value cache: ragged rows without padding, a shared prompt computed once.

mod cache;
mod sample;

use crate::decoder::CausalLm;
use crate::sites::Sites;
use crate::tokenizer::Tokenizer;
use crate::{ModelError, Result};
use cache::Cache;
use pt_tensor::{Tensor, no_grad};
use sample::Sampler;
use serde::{Deserialize, Serialize};
use std::rc::Rc;

/// How tokens are chosen and when a row ends. The defaults are greedy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateConfig {
    /// Most tokens that a completion gets.
    pub max_new_tokens: usize,
    /// Logits are divided by it; 0 takes the most probable token.
    pub temperature: f64,
    /// Sample among this many most probable tokens; 0 for all.
    pub top_k: usize,
    /// Sample among the fewest tokens whose probabilities reach this sum.
    pub top_p: f64,
    /// Sample among tokens at least this likely relative to the most likely one.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens already in the row (Keskar et al. 2019); 1 for none.
    pub repetition_penalty: f64,
    /// A completion ends before the first of these texts.
    pub stop: Vec<String>,
    /// A completion ends with the first of these tokens (the model's own end tokens are added by the caller).
    pub stop_ids: Vec<i64>,
    /// Sample s of prompt p draws from a generator seeded by (seed, first_prompt + p, s), whatever else is in the batch.
    pub seed: u64,
    /// Number of the first prompt: who splits a file into batches passes the rows before, and every row draws the
    /// same at every batch size.
    pub first_prompt: u64,
    /// Completions per prompt; the prompt is computed once.
    pub num_samples: usize,
    /// Return the log-prob of each token under softmax(logits / temperature), before top-k, top-p and min-p (at
    /// temperature 0: under softmax(logits)).
    pub with_logprobs: bool,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: vec![],
            stop_ids: vec![],
            seed: 0,
            first_prompt: 0,
            num_samples: 1,
            with_logprobs: false,
        }
    }
}

impl GenerateConfig {
    fn validate(&self) -> Result<()> {
        let wrong = |what: &str, found: String, expected: &str| {
            Err(ModelError::Argument { what: what.into(), found, expected: expected.into() })
        };
        if self.max_new_tokens == 0 {
            return wrong("max_new_tokens", "0".into(), "at least 1");
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", self.temperature.to_string(), "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return wrong("top_p", self.top_p.to_string(), "over 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return wrong("min_p", self.min_p.to_string(), "between 0 and 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return wrong("repetition_penalty", self.repetition_penalty.to_string(), "over 0");
        }
        if self.num_samples == 0 {
            return wrong("num_samples", "0".into(), "at least 1");
        }
        Ok(())
    }
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token, which is the last of `token_ids`, or a stop text.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// The caller's callback said so.
    Cancelled,
}

/// One completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The tokens, a stop token included.
    pub token_ids: Vec<i64>,
    /// Log-prob of each token in nats, if asked for.
    pub logprobs: Option<Vec<f32>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A row that is being written.
struct Row {
    cache_row: i64,
    prompt: Rc<Vec<i64>>,
    token_ids: Vec<i64>,
    logprobs: Vec<f32>,
    sampler: Sampler,
    room: usize,
    finish_reason: Option<FinishReason>,
}

/// Completes prompts, `num_samples` each; row p · num_samples + s is sample s of prompt p.
///
/// `tokenizer` is needed for stop texts only. `on_token(row, token)` hears every token at once and returns whether
/// the row goes on. Results do not depend on what else is in the batch beyond floating-point rounding of products
/// of another size.
///
/// # Errors
/// [`ModelError::TooLong`] for a prompt that leaves no room in the context, [`ModelError::Argument`] for settings out of
/// range, an empty prompt, or a token id outside the vocabulary.
pub fn generate(
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    prompts: &[Vec<i64>],
    config: &GenerateConfig,
    sites: &Rc<dyn Sites>,
    mut on_token: impl FnMut(usize, i64) -> bool,
) -> Result<Vec<Generated>> {
    config.validate()?;
    if prompts.is_empty() {
        return Ok(vec![]);
    }
    let context = model.config().max_position_embeddings as usize;
    for prompt in prompts {
        if prompt.is_empty() {
            return Err(ModelError::Argument {
                what: "prompt".into(),
                found: "empty".into(),
                expected: "at least one token".into(),
            });
        }
        if prompt.len() >= context {
            return Err(ModelError::TooLong { length: prompt.len() + 1, context });
        }
        if let Some(id) = prompt.iter().find(|&&id| id < 0 || id >= model.config().vocab_size) {
            let expected = format!("a token id in 0..{}", model.config().vocab_size);
            return Err(ModelError::Argument { what: "prompt".into(), found: id.to_string(), expected });
        }
    }
    no_grad(|| {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let capacity = (longest + config.max_new_tokens).min(context);
        let cache = Rc::new(Cache::new(model, prompts.len() * config.num_samples, capacity));
        let mut rows = Vec::new();
        for (p, prompt) in prompts.iter().enumerate() {
            let prompt = Rc::new(prompt.clone());
            for s in 0..config.num_samples {
                rows.push(Row {
                    cache_row: rows.len() as i64,
                    room: config.max_new_tokens.min(capacity - prompt.len()),
                    prompt: prompt.clone(),
                    token_ids: vec![],
                    logprobs: vec![],
                    sampler: Sampler::new(config, config.first_prompt + p as u64, s as u64),
                    finish_reason: None,
                });
            }
        }
        let logits = prefill(model, prompts, config.num_samples, &cache, sites)?;
        // [prompts, vocab]; each of a prompt's samples starts from the same distribution.
        let logits = logits.repeat_interleave_self_int(config.num_samples as i64, 0, None);
        let mut active: Vec<usize> = (0..rows.len()).collect();
        choose(&mut rows, &active, &logits, config, tokenizer, &mut on_token)?;
        loop {
            active.retain(|&row| rows[row].finish_reason.is_none());
            if active.is_empty() {
                break;
            }
            let ids: Vec<i64> = active.iter().filter_map(|&row| rows[row].token_ids.last().copied()).collect();
            let positions: Vec<i64> =
                active.iter().map(|&row| (rows[row].prompt.len() + rows[row].token_ids.len() - 1) as i64).collect();
            let cache_rows: Vec<i64> = active.iter().map(|&row| rows[row].cache_row).collect();
            let attend = Rc::new(cache::Decode::new(cache.clone(), cache_rows, positions.clone()));
            let device = model.device();
            let (ids, positions) =
                (Tensor::from_slice(&ids).to_device(device), Tensor::from_slice(&positions).to_device(device));
            let logits = model.step(&ids, &positions, attend, None, sites)?;
            choose(&mut rows, &active, &logits, config, tokenizer, &mut on_token)?;
        }
        Ok(rows
            .into_iter()
            .map(|row| Generated {
                token_ids: row.token_ids,
                logprobs: config.with_logprobs.then_some(row.logprobs),
                finish_reason: row.finish_reason.unwrap_or(FinishReason::Length),
            })
            .collect())
    })
}

/// Computes the prompts, packed, into the cache rows of their samples; returns the logits after each prompt.
fn prefill(
    model: &CausalLm,
    prompts: &[Vec<i64>],
    num_samples: usize,
    cache: &Rc<Cache>,
    sites: &Rc<dyn Sites>,
) -> Result<Tensor> {
    let ids: Vec<i64> = prompts.iter().flatten().copied().collect();
    let positions: Vec<i64> = prompts.iter().flat_map(|prompt| 0..prompt.len() as i64).collect();
    let mut ends = Vec::new();
    let mut total = 0;
    for prompt in prompts {
        total += prompt.len() as i64;
        ends.push(total - 1);
    }
    let device = model.device();
    let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
    let lengths = prompts.iter().map(|prompt| prompt.len() as i64).collect();
    let attend = Rc::new(cache::Prefill::new(cache.clone(), lengths, num_samples as i64));
    model.step(&tensor(&ids), &tensor(&positions), attend, Some(&tensor(&ends)), sites)
}

/// Chooses the next token of each active row from `logits: [active, vocab]` and ends rows that are done.
fn choose(
    rows: &mut [Row],
    active: &[usize],
    logits: &Tensor,
    config: &GenerateConfig,
    tokenizer: Option<&Tokenizer>,
    on_token: &mut impl FnMut(usize, i64) -> bool,
) -> Result<()> {
    let logits = logits.to_kind(pt_tensor::Kind::Float).to_device(pt_tensor::Device::Cpu);
    // The common case takes no copy of the logits.
    let greedy = match config.temperature == 0.0 && config.repetition_penalty == 1.0 && !config.with_logprobs {
        true => Some(Vec::<i64>::try_from(logits.argmax(-1, false))?),
        false => None,
    };
    for (i, &index) in active.iter().enumerate() {
        let row = &mut rows[index];
        let (token, logprob) = match &greedy {
            Some(tokens) => (tokens[i], 0.0),
            None => {
                let logits = Vec::<f32>::try_from(logits.get(i as i64))?;
                row.sampler.sample(logits, row.prompt.iter().chain(&row.token_ids))
            }
        };
        row.token_ids.push(token);
        row.logprobs.push(logprob);
        let goes_on = on_token(index, token);
        let is_stop_text = match tokenizer.filter(|_| !config.stop.is_empty()) {
            Some(tokenizer) => {
                let text = tokenizer.decode(&row.token_ids, false)?;
                config.stop.iter().any(|stop| text.contains(stop.as_str()))
            }
            None => false,
        };
        if config.stop_ids.contains(&token) || is_stop_text {
            row.finish_reason = Some(FinishReason::Stop);
        } else if !goes_on {
            row.finish_reason = Some(FinishReason::Cancelled);
        } else if row.token_ids.len() >= row.room {
            row.finish_reason = Some(FinishReason::Length);
        }
    }
    Ok(())
}
