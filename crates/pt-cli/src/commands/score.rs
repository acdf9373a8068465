//! `pt score`

use super::generate::at_least_one;
use crate::open::{DataArgs, ModelArgs, OutputArgs, RowAdapterArgs, WeightArgs};
use crate::talk;
use anyhow::Result;
use pt_model::{ModelError, PackedBatch, PromptGroup, RunOptions};
use pt_tensor::{LabelLogprobs, no_grad};
use pt_train::data::{RowContent, read_rows, row_to_group, row_to_preference};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    weights: WeightArgs,
    /// JSONL or JSON rows: `prompt` and `completion`, `messages`, or `prompt`, `chosen`, `rejected`. The token that ends
    /// a turn is added to completions that are plain text, and scored with them.
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
    let mut opened = args.model.open(&args.weights)?;
    let row_adapters = args.row_adapters.open(&mut opened, &rows)?;
    let encoder = opened.encoder()?;
    let context = opened.model.config().max_position_embeddings as usize;
    let virtual_tokens = opened.sites.num_virtual_tokens();
    let mut groups: Vec<PromptGroup> = Vec::new();
    for row in &rows {
        let group = match row.content {
            RowContent::Preference { .. } => row_to_preference(row, &encoder)?.group,
            _ => row_to_group(row, &encoder, data.train_turns)?,
        };
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
        let chunk: Vec<PromptGroup> = batch_rows.iter().map(|&row| groups[row].clone()).collect();
        if let Some(row_adapters) = &row_adapters {
            row_adapters.choose(batch_rows.iter().copied())?;
        }
        let batch = PackedBatch::new(&chunk, opened.model.device())?;
        let out = no_grad(|| {
            opened.model.label_logprobs(&batch, &opened.sites, RunOptions::default(), &LabelLogprobs::default())
        })?;
        let logprobs = Vec::<f32>::try_from(out.logprobs.to_device(pt_tensor::Device::Cpu))?;
        let mut by_completion: Vec<Vec<f32>> = vec![vec![]; batch.num_completions];
        for (&completion, logprob) in batch.label_completion.iter().zip(logprobs) {
            by_completion[completion as usize].push(logprob);
        }
        let mut completions = by_completion.into_iter();
        for group in &chunk {
            let scored: Vec<serde_json::Value> = completions
                .by_ref()
                .take(group.completions.len())
                .map(|logprobs| {
                    let sum: f64 = logprobs.iter().map(|&l| f64::from(l)).sum();
                    let mut value = json!({"logprob": sum, "num_tokens": logprobs.len()});
                    if args.tokens {
                        value["token_logprobs"] = json!(logprobs);
                    }
                    value
                })
                .collect();
            lines.push(&json!({"completions": scored}))?;
            work.advance();
        }
    }
    work.finish();
    lines.finish()?;
    eprintln!("{} rows scored", rows.len());
    Ok(ExitCode::SUCCESS)
}
