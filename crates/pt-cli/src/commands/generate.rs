//! `pt generate`

use crate::open::{Lines, ModelArgs, Opened};
use crate::talk::{self, Usage};
use anyhow::{Context, Result};
use pt_model::{FinishReason, GenerateConfig, Generated, generate};
use pt_train::data::{Encode, ReadOptions, Row, RowContent, Text, read_rows};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL or JSON rows with `prompt` (text or messages) or `messages`.
    #[arg(long, required_unless_present = "prompt")]
    data: Option<PathBuf>,
    /// A single prompt instead of a file; rendered as a user's turn where the model has a chat template.
    #[arg(long, conflicts_with = "data")]
    prompt: Option<String>,
    /// File for the results, one JSON line per row in order; stdout when absent.
    #[arg(long)]
    output: Option<PathBuf>,
    /// Rows that are written side by side.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    #[command(flatten)]
    sampling: Sampling,
    /// Add the log-prob of each token.
    #[arg(long)]
    logprobs: bool,
}

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Sampling {
    /// Most tokens of a completion.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Choose among this many most probable tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Choose among the fewest tokens whose probabilities sum to this.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Choose among tokens at least this likely relative to the likeliest.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f64,
    /// Over 1 makes tokens that already occurred less likely.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) repetition_penalty: f64,
    /// End a completion before this text; may be given several times.
    #[arg(long)]
    pub(crate) stop: Vec<String>,
    /// Seed of the random choices.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Completions per prompt.
    #[arg(long, default_value_t = 1)]
    pub(crate) num_samples: usize,
}

impl Sampling {
    /// With the model's own end tokens.
    pub(crate) fn config(&self, stop_ids: &[i64], with_logprobs: bool) -> GenerateConfig {
        GenerateConfig {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            stop: self.stop.clone(),
            stop_ids: stop_ids.to_vec(),
            seed: self.seed,
            first_prompt: 0,
            num_samples: self.num_samples,
            with_logprobs,
        }
    }
}

/// Token ids of a row's prompt: messages up to the assistant's last turn through the chat template, text as it is.
pub(crate) fn prompt_ids(row: &Row, encoder: &dyn Encode) -> Result<Vec<i64>> {
    let place = || format!("{}", row.origin);
    let chat = |messages: &[pt_train::data::Message], tools: Option<&serde_json::Value>| {
        encoder.render(messages, tools, true).map_err(anyhow::Error::msg).with_context(place)
    };
    let text = match &row.content {
        RowContent::Chat { messages, tools } => {
            let keep = match messages.last() {
                Some(last) if last.role == "assistant" => messages.len() - 1,
                _ => messages.len(),
            };
            chat(&messages[..keep], tools.as_ref())?
        }
        RowContent::Completion { prompt: Text::Chat(messages), tools, .. } => chat(messages, tools.as_ref())?,
        RowContent::Completion { prompt: Text::Plain(text), .. } | RowContent::Text(text) => text.clone(),
        other => {
            return Err(Usage(format!("{}: a {} row holds no prompt to complete", row.origin, other.form())).into());
        }
    };
    encoder.encode(&text).map_err(anyhow::Error::msg).with_context(place)
}

/// The completion as text: without end tokens, and cut before a stop text.
pub(crate) fn completion_text(row: &Generated, opened: &Opened, config: &GenerateConfig) -> Result<String> {
    let mut ids = row.token_ids.as_slice();
    if let (FinishReason::Stop, Some((last, rest))) = (row.finish_reason, ids.split_last())
        && config.stop_ids.contains(last)
    {
        ids = rest;
    }
    let mut text = opened.encoder()?.tokenizer.decode(ids, true)?;
    if let Some(end) = config.stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
        text.truncate(end);
    }
    Ok(text)
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let mut lines = Lines::new(args.output.as_deref())?;
    let rows = match &args.data {
        Some(path) => Some(read_rows(std::slice::from_ref(path), &ReadOptions::default())?),
        None => None,
    };
    let opened = args.model.open()?;
    let encoder = opened.encoder()?;
    let prompts: Vec<Vec<i64>> = match (&rows, &args.prompt) {
        (Some(rows), _) => rows.iter().map(|row| prompt_ids(row, &encoder)).collect::<Result<_>>()?,
        (None, Some(text)) => {
            let text = match encoder.has_template() {
                true => encoder
                    .render(&[pt_train::data::Message::new("user", text.as_str())], None, true)
                    .map_err(anyhow::Error::msg)?,
                false => text.clone(),
            };
            vec![encoder.encode(&text).map_err(anyhow::Error::msg)?]
        }
        (None, None) => return Err(Usage("give --data or --prompt".into()).into()),
    };
    let config = args.sampling.config(encoder.stop_ids(), args.logprobs);
    let (bar, started) = (talk::bar(prompts.len() as u64, "rows"), Instant::now());
    let mut num_tokens = 0;
    for (chunk, batch) in prompts.chunks(args.batch_size.max(1)).enumerate() {
        let config = GenerateConfig { first_prompt: (chunk * args.batch_size.max(1)) as u64, ..config.clone() };
        let completions = generate(&opened.model, Some(encoder.tokenizer), batch, &config, &opened.sites, |_, _| true)?;
        for samples in completions.chunks(config.num_samples) {
            for row in samples {
                num_tokens += row.token_ids.len();
                let mut line = json!({
                    "completion": completion_text(row, &opened, &config)?,
                    "token_ids": row.token_ids,
                    "finish_reason": row.finish_reason,
                });
                if let Some(logprobs) = &row.logprobs {
                    line["logprobs"] = json!(logprobs);
                }
                lines.push(&line)?;
            }
            bar.inc(1);
        }
        bar.set_message(format!("{:.0} tokens/s", num_tokens as f64 / started.elapsed().as_secs_f64()));
    }
    bar.finish_and_clear();
    lines.finish()?;
    eprintln!(
        "{} rows, {num_tokens} tokens, {:.1} tokens/s",
        prompts.len(),
        num_tokens as f64 / started.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}
