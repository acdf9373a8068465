//! `pt merge`

use super::generate::at_least_one;
use crate::job::save_model;
use crate::open::ModelArgs;
use crate::talk::Refused;
use anyhow::{Context, Result};
use pt_model::{CausalLm, Pretrained};
use pt_peft::{Adapter, LoraAdapter};
use pt_tensor::Kind;
use pt_tensor::io::create_folder_atomically;
use pt_train::run_dir::check_place;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// New folder for the merged model.
    #[arg(long)]
    output: PathBuf,
    /// Largest size of one weight file, in MB.
    #[arg(long, default_value_t = 5000, value_parser = at_least_one())]
    max_shard_mb: usize,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    if args.output.exists() && std::fs::read_dir(&args.output).map_or(true, |mut entries| entries.next().is_some()) {
        return Err(Refused {
            message: format!("{} already exists and is not an empty folder", args.output.display()),
            hint: "choose another --output, or remove it first".into(),
        }
        .into());
    }
    check_place(&args.output)?;
    let adapter = args.model.adapter_folder()?;
    let pretrained = args.model.pretrained()?;
    let kind = if args.model.dtype == "auto" { checkpoint_kind(&pretrained) } else { args.model.kind()? };
    let mut model = CausalLm::load(&pretrained, args.model.device()?, kind)?;
    if let Some(folder) = &adapter {
        let adapter = LoraAdapter::load(folder, &model)?;
        adapter.merge_into(&mut model)?;
    }
    let parent = args.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot write {}", parent.display()))?;
    create_folder_atomically(&args.output, |folder| {
        save_model(folder, &pretrained, &model, args.max_shard_mb.saturating_mul(1_000_000))
    })?;
    eprintln!("saved to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

/// The number format that a checkpoint names as its own, which merging with `--dtype auto` keeps; f32, in which nothing
/// is rounded, for files that name none (GGUF).
fn checkpoint_kind(pretrained: &Pretrained) -> Kind {
    let named = ["dtype", "torch_dtype"].iter().find_map(|key| pretrained.config.raw.get(*key)?.as_str());
    match named {
        Some("bfloat16") => Kind::BFloat16,
        Some("float16") => Kind::Half,
        _ => Kind::Float,
    }
}
