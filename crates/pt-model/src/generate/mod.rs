//! Generation with a key/value cache: ragged rows without padding, a shared prompt computed once.

mod cache;
mod sample;
mod stop;

use crate::decoder::{CausalLm, routed};
use crate::sites::Sites;
use crate::tokenizer::Tokenizer;
use crate::{ModelError, Result};
use cache::Cache;
use pt_tensor::{CacheSlot, Tensor, no_grad};
use sample::Sampler;
use serde::{Deserialize, Serialize};
use std::rc::Rc;
use stop::StopTexts;

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
    /// A completion ends before the first of these texts; none may be empty.
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
        if self.stop.iter().any(String::is_empty) {
            return wrong("stop", format!("{:?}", self.stop), "texts of at least one character");
        }
        Ok(())
    }
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token, which is the last of `token_ids`, or a stop text, which is cut off.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// The caller's callback said so.
    Cancelled,
}

/// One completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The tokens, a stop token included. Before a stop text, the fewest that hold all text up to it: should it begin
    /// inside a token, that token is the last.
    pub token_ids: Vec<i64>,
    /// The text without special tokens and without what ended it; `None` when no tokenizer was given.
    pub text: Option<String>,
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
    /// Tokens that the callback has heard.
    heard: usize,
    /// The text, once a stop text has cut it.
    text: Option<String>,
}

/// Whether [`generate`] can complete a prompt with a method, so that a bad one among many is found before the work.
///
/// # Errors
/// [`ModelError::TooLong`] for a prompt that leaves no room in the context beside the method's virtual tokens, [`ModelError::Argument`] for an empty one or a
/// token id outside the vocabulary.
pub fn check_prompt(model: &CausalLm, prompt: &[i64], sites: &dyn Sites) -> Result<()> {
    let context = model.config().max_position_embeddings as usize;
    let wrong = |found: String, expected: String| Err(ModelError::Argument { what: "prompt".into(), found, expected });
    if prompt.is_empty() {
        return wrong("empty".into(), "at least one token".into());
    }
    let virtual_tokens = sites.num_virtual_tokens();
    if prompt.len() + virtual_tokens >= context {
        return Err(ModelError::TooLong { length: prompt.len() + virtual_tokens + 1, virtual_tokens, context });
    }
    match prompt.iter().find(|&&id| id < 0 || id >= model.config().vocab_size) {
        Some(id) => wrong(id.to_string(), format!("a token id in 0..{}", model.config().vocab_size)),
        None => Ok(()),
    }
}

/// Completes prompts, `num_samples` each; row p · num_samples + s is sample s of prompt p.
///
/// `tokenizer` is needed for stop texts and [`Generated::text`]. `on_token(row, token)` hears every token and returns
/// whether the row goes on: at once, but a token that may be part of a stop text is held back until that is
/// decided, and one that is part of it is not heard. Results do not depend on what else is in the batch beyond floating-point rounding of products
/// of another size.
///
/// # Errors
/// [`ModelError::Argument`] for settings out of range and stop texts without a tokenizer, those of [`check_prompt`],
/// and [`ModelError::NonFinite`] when the logits are NaN or infinite.
pub fn generate(
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    prompts: &[Vec<i64>],
    config: &GenerateConfig,
    sites: &Rc<dyn Sites>,
    mut on_token: impl FnMut(usize, i64) -> bool,
) -> Result<Vec<Generated>> {
    config.validate()?;
    if tokenizer.is_none() && !config.stop.is_empty() {
        return Err(ModelError::Argument {
            what: "tokenizer".into(),
            found: "none".into(),
            expected: "one, to find the texts of `stop` (or give `stop_ids`)".into(),
        });
    }
    let stops = tokenizer.filter(|_| !config.stop.is_empty()).map(|t| StopTexts { tokenizer: t, texts: &config.stop });
    if prompts.is_empty() {
        return Ok(vec![]);
    }
    let context = model.config().max_position_embeddings as usize;
    let on_all = routed(sites, &(0..prompts.len()).collect::<Vec<_>>())?;
    prompts.iter().try_for_each(|prompt| check_prompt(model, prompt, on_all.as_ref()))?;
    no_grad(|| {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let num_virtual = on_all.num_virtual_tokens();
        // Tokens of a row, virtual ones aside.
        let capacity = longest.saturating_add(config.max_new_tokens).min(context - num_virtual);
        let cache = Rc::new(Cache::new(model, prompts.len() * config.num_samples, num_virtual + capacity));
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
                    heard: 0,
                    text: None,
                });
            }
        }
        let logits = prefill(model, prompts, config.num_samples, &cache, sites)?;
        // [prompts, vocab]; each of a prompt's samples starts from the same distribution.
        let logits = logits.repeat_interleave_self_int(config.num_samples as i64, 0, None);
        let mut active: Vec<usize> = (0..rows.len()).collect();
        choose(&mut rows, &active, &logits, config, stops.as_ref(), &mut on_token)?;
        loop {
            active.retain(|&row| rows[row].finish_reason.is_none());
            if active.is_empty() {
                break;
            }
            let ids: Vec<i64> = active.iter().filter_map(|&row| rows[row].token_ids.last().copied()).collect();
            let positions: Vec<i64> =
                active.iter().map(|&row| (rows[row].prompt.len() + rows[row].token_ids.len() - 1) as i64).collect();
            let slot = |(&row, &position): (&usize, &i64)| CacheSlot {
                row: rows[row].cache_row,
                position: num_virtual as i64 + position,
            };
            let slots = active.iter().zip(&positions).map(slot).collect();
            let prompt_of_token: Vec<usize> = active.iter().map(|&row| row / config.num_samples).collect();
            let attend = Rc::new(cache::Decode::new(cache.clone(), slots));
            let device = model.device();
            let (ids, positions) =
                (Tensor::from_slice(&ids).to_device(device), Tensor::from_slice(&positions).to_device(device));
            let logits = model.step(&ids, &positions, None, attend, None, &prompt_of_token, sites)?;
            choose(&mut rows, &active, &logits, config, stops.as_ref(), &mut on_token)?;
        }
        rows.into_iter().map(|row| row.finished(config, tokenizer)).collect()
    })
}

impl Row {
    fn finished(self, config: &GenerateConfig, tokenizer: Option<&Tokenizer>) -> Result<Generated> {
        let finish_reason = self.finish_reason.unwrap_or(FinishReason::Length);
        let text = match (self.text, tokenizer) {
            (None, Some(tokenizer)) => {
                // A stop token need not be special, and is no text of the completion either way.
                let ends = usize::from(self.token_ids.last().is_some_and(|id| config.stop_ids.contains(id)));
                Some(tokenizer.decode(&self.token_ids[..self.token_ids.len() - ends], true)?)
            }
            (text, _) => text,
        };
        let logprobs = config.with_logprobs.then_some(self.logprobs);
        Ok(Generated { token_ids: self.token_ids, text, logprobs, finish_reason })
    }

    /// Lets the callback hear the tokens before `end` that it has not heard; returns whether the row goes on.
    fn tell(&mut self, index: usize, end: usize, on_token: &mut impl FnMut(usize, i64) -> bool) -> bool {
        let from = self.heard.min(end);
        self.heard = self.heard.max(end);
        self.token_ids[from..end].iter().all(|&token| on_token(index, token))
    }
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
    let prompt_of_token: Vec<usize> =
        prompts.iter().enumerate().flat_map(|(p, prompt)| std::iter::repeat_n(p, prompt.len())).collect();
    let mut ends = Vec::new();
    let mut total = 0;
    for prompt in prompts {
        total += prompt.len() as i64;
        ends.push(total - 1);
    }
    let device = model.device();
    let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
    let lengths: Vec<i64> = prompts.iter().map(|prompt| prompt.len() as i64).collect();
    let on_all = routed(sites, &prompt_of_token)?;
    let (num_virtual, ahead) = (on_all.num_virtual_tokens(), on_all.virtual_tokens()?);
    let attend = cache::Prefill::new(cache.clone(), &lengths, num_samples as i64, num_virtual, ahead.as_ref());
    model.step(
        &tensor(&ids),
        &tensor(&positions),
        ahead,
        Rc::new(attend),
        Some(&tensor(&ends)),
        &prompt_of_token,
        sites,
    )
}

/// Chooses the next token of each active row from `logits: [active, vocab]` and ends rows that are done.
fn choose(
    rows: &mut [Row],
    active: &[usize],
    logits: &Tensor,
    config: &GenerateConfig,
    stops: Option<&StopTexts<'_>>,
    on_token: &mut impl FnMut(usize, i64) -> bool,
) -> Result<()> {
    let logits = logits.to_kind(pt_tensor::Kind::Float).to_device(pt_tensor::Device::Cpu);
    let (largest, most_probable) = logits.max_dim(-1, false); // NaN, where there is one, counts as the largest
    for (&index, found) in active.iter().zip(Vec::<f32>::try_from(largest)?) {
        if !found.is_finite() {
            return Err(ModelError::NonFinite { row: index, position: rows[index].token_ids.len(), found });
        }
    }
    // The common case takes no copy of the logits.
    let greedy = match config.temperature == 0.0 && config.repetition_penalty == 1.0 && !config.with_logprobs {
        true => Some(Vec::<i64>::try_from(most_probable)?),
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
        let len = row.token_ids.len();
        let is_stop_id = config.stop_ids.contains(&token);
        let seen = match stops {
            Some(stops) => stops.look(&row.token_ids, row.heard)?,
            None => stop::Seen::Settled(len),
        };
        match seen {
            stop::Seen::Stop { kept, before, text } => {
                row.tell(index, before, on_token);
                row.token_ids.truncate(kept);
                row.logprobs.truncate(kept);
                (row.text, row.finish_reason) = (Some(text), Some(FinishReason::Stop));
            }
            stop::Seen::Settled(settled) => {
                row.finish_reason = match () {
                    () if is_stop_id => Some(FinishReason::Stop),
                    () if len >= row.room => Some(FinishReason::Length),
                    () => None,
                };
                // Nothing follows the last token that could make a stop text of it.
                let end = if row.finish_reason.is_some() { len } else { settled };
                if !row.tell(index, end, on_token) && !is_stop_id {
                    row.finish_reason = Some(FinishReason::Cancelled);
                }
            }
        }
    }
    Ok(())
}
