//! `pt score`

use super::generate::at_least_one;
use crate::open::{DataArgs, ModelArgs, Opened, OutputArgs, RowAdapterArgs, WeightArgs};
use crate::talk::{self, Usage};
use anyhow::Result;
use pt_model::{ModelError, PackedBatch, PromptGroup, RunOptions};
use pt_rlhf::{RewardModel, end_at_turn};
use pt_tensor::{Device, LabelLogprobs, no_grad};
use pt_train::data::{RowContent, read_rows, row_to_group, row_to_preference};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    weights: WeightArgs,
    /// JSONL or JSON rows: `prompt` and `completion`, `messages`, or `prompt`, `chosen`, `rejected`. The token that
    /// ends a turn is added to completions that are plain text, and scored with them. A reward model (a model, or the
    /// adapter of a run of `pt reward`) gives each completion its score.
    #[arg(long)]
    data: PathBuf,
    #[command(flatten)]
    row_adapters: RowAdapterArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Add the log-prob of each scored token.
    #[arg(long)]
    tokens: bool,
    /// Most tokens that go through the model at once.
    #[arg(long, default_value_t = 4096, value_parser = at_least_one())]
    max_tokens: usize,
    #[command(flatten)]
    read: DataArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let mut lines = args.output.open()?;
    let data = args.read.config(&[])?;
    let rows = read_rows(std::slice::from_ref(&args.data), &data.read_options())?;
    let (mut opened, reward) = args.model.open_scorer(&args.weights)?;
    if reward.is_some() && (args.tokens || !args.row_adapters.is_empty()) {
        let flag = if args.tokens { "--tokens" } else { "--row-adapter" };
        return Err(Usage(format!("{flag}: this is a reward model, which gives each completion one score")).into());
    }
    let row_adapters = args.row_adapters.open(&mut opened, &rows)?;
    let encoder = opened.encoder()?;
    let context = opened.model.config().max_position_embeddings as usize;
    let mut groups: Vec<PromptGroup> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let virtual_tokens = match &row_adapters {
            Some(row_adapters) => row_adapters.sites_of(index)?.num_virtual_tokens(),
            None => opened.sites.num_virtual_tokens(),
        };
        let mut group = match row.content {
            RowContent::Preference { .. } => row_to_preference(row, &encoder)?.group,
            _ => row_to_group(row, &encoder, data.train_turns)?,
        };
        if reward.is_some() {
            end_at_turn(&mut group, &encoder);
        }
        let length = group.longest_sequence() + virtual_tokens;
        if length > context {
            let fault = ModelError::TooLong { length, virtual_tokens, context };
            return Err(anyhow::Error::from(fault).context(row.origin.to_string()));
        }
        groups.push(group);
    }
    let mut work = talk::Work::new("scoring", groups.len(), "rows");
    let indices: Vec<usize> = (0..groups.len()).collect();
    for batch_rows in
        pt_train::data::packing::split_by_tokens(&indices, Some(args.max_tokens), |row| groups[row].num_tokens())
    {
        let chunk: Vec<&PromptGroup> = batch_rows.iter().map(|&row| &groups[row]).collect();
        if let Some(row_adapters) = &row_adapters {
            row_adapters.choose(batch_rows.iter().copied())?;
        }
        let batch = PackedBatch::new(&chunk, opened.model.device())?;
        let scored = match &reward {
            Some(reward) => scores(&opened, reward, &batch)?,
            None => logprobs(&opened, &batch, args.tokens)?,
        };
        let mut scored = scored.into_iter();
        for (&row, group) in batch_rows.iter().zip(&chunk) {
            let of_row: Vec<Value> = scored.by_ref().take(group.completions.len()).collect();
            if of_row.iter().any(|value| value["score"].is_null() && reward.is_some()) {
                anyhow::bail!("{}: the score is no finite number", rows[row].origin);
            }
            lines.push(&json!({"completions": of_row}))?;
            work.advance();
        }
    }
    work.finish();
    lines.finish()?;
    eprintln!("{} rows scored", rows.len());
    Ok(ExitCode::SUCCESS)
}

/// The log-prob of each completion of a batch.
fn logprobs(opened: &Opened, batch: &PackedBatch, with_tokens: bool) -> Result<Vec<Value>> {
    let (run, options) = (RunOptions::default(), LabelLogprobs::default());
    let out = no_grad(|| opened.model.label_logprobs(batch, &opened.sites, run, &options))?;
    let logprobs = Vec::<f32>::try_from(out.logprobs.to_device(Device::Cpu))?;
    let mut by_completion: Vec<Vec<f32>> = vec![vec![]; batch.num_completions];
    for (&completion, logprob) in batch.label_completion.iter().zip(logprobs) {
        by_completion[completion as usize].push(logprob);
    }
    let value = |logprobs: Vec<f32>| {
        let sum: f64 = logprobs.iter().map(|&l| f64::from(l)).sum();
        let mut value = json!({"logprob": sum, "num_tokens": logprobs.len()});
        if with_tokens {
            value["token_logprobs"] = json!(logprobs);
        }
        value
    };
    Ok(by_completion.into_iter().map(value).collect())
}

/// A reward model's score of each completion of a batch, and the same by the mean and deviation of the scores where
/// those are known.
fn scores(opened: &Opened, reward: &RewardModel, batch: &PackedBatch) -> Result<Vec<Value>> {
    let scores = no_grad(|| reward.scores(&opened.model, &opened.sites, batch, RunOptions::default()))?;
    let scores = Vec::<f32>::try_from(scores.to_device(Device::Cpu))?;
    let value = |score: f32| {
        let mut value = json!({"score": score});
        if let Some(statistics) = reward.statistics {
            value["normalized_score"] = json!(statistics.normalize(f64::from(score)));
        }
        value
    };
    Ok(scores.into_iter().map(value).collect())
}
