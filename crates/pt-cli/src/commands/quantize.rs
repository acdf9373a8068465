//! `pt quantize`

use crate::job::save_checkpoint;
use crate::open::{FolderArgs, ModelArgs};
use crate::talk::{self, Refused};
use anyhow::Result;
use pt_model::quantize_checkpoint;
use pt_tensor::{Kind, Nf4Options};
use std::process::ExitCode;

/// What weights are quantized to.
#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum Format {
    /// 4-bit NormalFloat, as bitsandbytes and QLoRA have it
    Nf4,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    folder: FolderArgs,
    /// Format of the linear layers; embeddings, norms and the output layer keep --dtype (auto: the checkpoint's own, bf16 for GGUF files).
    #[arg(long, value_enum, default_value = "nf4")]
    to: Format,
    /// Quantize the scales too, as --weights nf4 does: 4.13 instead of 4.5 bits a weight.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    double_quant: bool,
    /// Weights that share a scale: a power of two from 32 to 4096.
    #[arg(long, default_value_t = 64)]
    block_size: usize,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let Format::Nf4 = args.to;
    args.folder.check()?;
    if args.model.adapter.is_some() {
        return Err(Refused {
            message: "--adapter: an adapter is not quantized".into(),
            hint: "`pt merge` it first, and quantize the result; or keep it beside the quantized model, as QLoRA does"
                .into(),
        }
        .into());
    }
    let pretrained = args.model.pretrained()?;
    let kind = args.model.saved_kind(&pretrained, Kind::BFloat16)?;
    let options = Nf4Options { block_size: args.block_size, double_quant: args.double_quant };
    let bar = talk::bar(0, "tensors");
    let (tensors, config) = quantize_checkpoint(&pretrained, kind, options, |_, count| {
        bar.set_length(count as u64);
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    args.folder
        .fill(|folder, max_shard_bytes| save_checkpoint(folder, &pretrained, &tensors, &config, max_shard_bytes))?;
    Ok(ExitCode::SUCCESS)
}
