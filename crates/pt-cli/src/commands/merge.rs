//! `pt merge`

use super::sft::save_model;
use crate::open::ModelArgs;
use anyhow::{Context, Result, bail};
use pt_model::CausalLm;
use pt_peft::{Adapter, LoraAdapter};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// New folder for the merged model.
    #[arg(long)]
    output: PathBuf,
    /// Largest size of one weight file, in MB.
    #[arg(long, default_value_t = 5000)]
    max_shard_mb: usize,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    if args.output.exists() && std::fs::read_dir(&args.output).map_or(true, |mut entries| entries.next().is_some()) {
        bail!("{} already exists and is not an empty folder", args.output.display());
    }
    let pretrained = args.model.pretrained()?;
    let mut model = CausalLm::load(&pretrained, args.model.device()?, args.model.kind()?)?;
    if let Some(folder) = &args.model.adapter {
        let adapter = LoraAdapter::load(folder, &model)?;
        adapter.merge_into(&mut model)?;
    }
    // Everything goes to a folder beside the target, which takes the name when it is whole.
    let parent = args.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot write {}", parent.display()))?;
    let folder = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempdir_in(parent)
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    save_model(folder.path(), &pretrained, &model, args.max_shard_mb.max(1) * 1_000_000)?;
    if args.output.exists() {
        std::fs::remove_dir(&args.output)?;
    }
    std::fs::rename(folder.path(), &args.output).with_context(|| format!("cannot write {}", args.output.display()))?;
    let _ = folder.keep();
    eprintln!("saved to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}
