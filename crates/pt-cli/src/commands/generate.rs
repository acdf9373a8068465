//! `pt generate`

use crate::open::{DataArgs, ModelArgs, OutputArgs, RowAdapterArgs, WeightArgs};
use crate::talk::{self, Usage};
use anyhow::{Context, Result};
use clap::ArgGroup;
use clap::builder::RangedU64ValueParser;
use pt_model::{GenerateConfig, check_prompt, generate};
use pt_train::Origin;
use pt_train::data::{Encode, Message, ReadOptions, Rendering, Row, RowContent, Text, read_rows};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(clap::Args)]
#[command(group(ArgGroup::new("prompts").required(true).args(["data", "prompt"])))]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    weights: WeightArgs,
    /// JSONL or JSON rows with `prompt` (text or messages) or `messages`; what a row holds beside its prompt is left out.
    /// A prompt that is plain text is completed as it stands; --set data.as_chat=true asks it through the chat template.
    #[arg(long)]
    data: Option<PathBuf>,
    #[command(flatten)]
    row_adapters: RowAdapterArgs,
    /// A single prompt instead of a file; rendered as a user's turn where the model has a chat template.
    #[arg(long)]
    prompt: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// Rows that are written side by side.
    #[arg(long, default_value_t = 16, value_parser = at_least_one())]
    batch_size: usize,
    #[command(flatten)]
    sampling: Sampling,
    /// Completions per prompt.
    #[arg(long, default_value_t = 1, value_parser = at_least_one())]
    num_samples: usize,
    #[command(flatten)]
    read: DataArgs,
    /// Add the log-prob of each token.
    #[arg(long)]
    logprobs: bool,
}

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Sampling {
    /// Most tokens of a completion.
    #[arg(long, default_value_t = 256, value_parser = at_least_one())]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the most probable token.
    #[arg(long, default_value_t = 0.0, value_parser = number("0 or more", |t| t >= 0.0 && t.is_finite()))]
    pub(crate) temperature: f64,
    /// Choose among this many most probable tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Choose among the fewest tokens whose probabilities sum to this.
    #[arg(long, default_value_t = 1.0, value_parser = number("over 0 and at most 1", |p| p > 0.0 && p <= 1.0))]
    pub(crate) top_p: f64,
    /// Choose among tokens at least this likely relative to the likeliest.
    #[arg(long, default_value_t = 0.0, value_parser = number("between 0 and 1", |p| (0.0..=1.0).contains(&p)))]
    pub(crate) min_p: f64,
    /// Over 1 makes tokens that already occurred less likely.
    #[arg(long, default_value_t = 1.0, value_parser = number("over 0", |r| r > 0.0 && r.is_finite()))]
    pub(crate) repetition_penalty: f64,
    /// End a completion before this text; may be given several times.
    #[arg(long)]
    pub(crate) stop: Vec<String>,
    /// Seed of the random choices.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// A count that cannot be 0.
pub(crate) fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// A parser of numbers for which `is_good` holds; `expected` says which those are.
fn number(
    expected: &'static str,
    is_good: fn(f64) -> bool,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(value) if is_good(value) => Ok(value),
        _ => Err(format!("expected {expected}")),
    }
}

impl Sampling {
    /// With the model's own end tokens; one completion per prompt.
    pub(crate) fn config(&self, stop_ids: &[i64]) -> GenerateConfig {
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
            ..Default::default()
        }
    }
}

/// The turns before the assistant's last one, and the text of that one where it ends the conversation.
pub(crate) fn split_last_answer(messages: &[Message]) -> (&[Message], Option<&Message>) {
    match messages.split_last() {
        Some((last, before)) if last.role == "assistant" => (before, Some(last)),
        _ => (messages, None),
    }
}

/// Token ids of a row's prompt: messages up to the assistant's last turn through the chat template, text as it is.
pub(crate) fn prompt_ids(row: &Row, encoder: &dyn Encode) -> Result<Vec<i64>> {
    let place = || row.origin.to_string();
    let chat = |messages: &[Message], tools: Option<&serde_json::Value>| -> Result<Vec<i64>> {
        let text = encoder.render(messages, tools, true).map_err(anyhow::Error::msg).with_context(place)?;
        encoder.encode(&text).map_err(anyhow::Error::msg).with_context(place)
    };
    match &row.content {
        RowContent::Chat { messages, tools } => chat(split_last_answer(messages).0, tools.as_ref()),
        RowContent::Completion { prompt: Text::Chat(messages), tools, .. }
        | RowContent::Preference { prompt: Some(Text::Chat(messages)), tools, .. }
        | RowContent::Prompt { prompt: Text::Chat(messages), tools } => chat(messages, tools.as_ref()),
        RowContent::Completion { prompt: Text::Plain(text), .. }
        | RowContent::Preference { prompt: Some(Text::Plain(text)), .. }
        | RowContent::Prompt { prompt: Text::Plain(text), .. }
        | RowContent::Text(text) => {
            let ids = encoder.encode(text).map_err(anyhow::Error::msg).with_context(place)?;
            Ok(encoder.bos_id().into_iter().chain(ids).collect())
        }
        other => Err(Usage(format!("{}: a {} row holds no prompt to complete", row.origin, other.form())).into()),
    }
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let mut lines = args.output.open()?;
    let options = ReadOptions { prompt_only: true, ..args.read.config(&[])?.read_options() };
    let rows = match &args.data {
        Some(path) => Some(read_rows(std::slice::from_ref(path), &options)?),
        None => None,
    };
    let mut opened = args.model.open(&args.weights)?;
    let row_adapters = args.row_adapters.open(&mut opened, rows.as_deref().unwrap_or_default())?;
    if row_adapters.is_some() && rows.is_none() {
        return Err(Usage("--row-adapter is for the rows of --data: with --prompt, give --adapter".into()).into());
    }
    let encoder = opened.encoder()?;
    let prompts: Vec<Vec<i64>> = match (&rows, &args.prompt) {
        (Some(rows), _) => rows.iter().map(|row| prompt_ids(row, &encoder)).collect::<Result<_>>()?,
        (None, Some(text)) => {
            let prompt = match encoder.has_template() {
                true => Text::Chat(vec![Message::new("user", text.as_str())]),
                false => Text::Plain(text.clone()),
            };
            let origin = Origin { path: "--prompt".into(), position: 0, is_line: false };
            let row = Row {
                content: RowContent::Prompt { prompt, tools: None },
                origin,
                source: String::new(),
                adapter: None,
            };
            vec![prompt_ids(&row, &encoder)?]
        }
        (None, None) => return Err(Usage("give --data or --prompt".into()).into()),
    };
    // All of them before the first is completed: a fault in the last row must not cost the work on the others.
    for (index, prompt) in prompts.iter().enumerate() {
        let place = rows.as_ref().map_or("--prompt".into(), |rows| rows[index].origin.to_string());
        let sites = match &row_adapters {
            Some(row_adapters) => row_adapters.sites_of(index)?,
            None => opened.sites.clone(),
        };
        check_prompt(&opened.model, prompt, sites.as_ref()).context(place)?;
    }
    let rendering = Rendering::of(&encoder);
    let is_bare = |row: &&Row| row.content.plain_prompt().is_some_and(|text| rendering.is_missing_in(text));
    let num_bare = rows.iter().flatten().filter(is_bare).count();
    if num_bare > 0 {
        eprintln!(
            "warning: {num_bare} prompts are plain text and completed as they stand, where `--prompt` and `pt chat` ask \
             through the chat template; to do so here: --set data.as_chat=true, or messages in `prompt`"
        );
    }
    let config = GenerateConfig {
        num_samples: args.num_samples,
        with_logprobs: args.logprobs,
        ..args.sampling.config(encoder.stop_ids())
    };
    let (mut work, started) = (talk::Work::new("completing", prompts.len(), "rows"), Instant::now());
    let mut num_tokens = 0;
    for (chunk, batch) in prompts.chunks(args.batch_size).enumerate() {
        let first = chunk * args.batch_size;
        let config = GenerateConfig { first_prompt: first as u64, ..config.clone() };
        if let Some(row_adapters) = &row_adapters {
            row_adapters.choose(first..first + batch.len())?;
        }
        let completions = generate(&opened.model, Some(encoder.tokenizer), batch, &config, &opened.sites, |_, _| true)?;
        for samples in completions.chunks(config.num_samples) {
            for row in samples {
                num_tokens += row.token_ids.len();
                let mut line = json!({
                    "completion": row.text,
                    "token_ids": row.token_ids,
                    "finish_reason": row.finish_reason,
                });
                if let Some(logprobs) = &row.logprobs {
                    line["logprobs"] = json!(logprobs);
                }
                lines.push(&line)?;
            }
            work.advance();
        }
        work.note(format!("{:.0} tokens/s", num_tokens as f64 / started.elapsed().as_secs_f64()));
    }
    work.finish();
    lines.finish()?;
    eprintln!(
        "{} rows, {num_tokens} tokens, {:.1} tokens/s",
        prompts.len(),
        num_tokens as f64 / started.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}
