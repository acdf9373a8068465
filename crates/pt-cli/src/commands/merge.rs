//! `pt merge`

use crate::job::save_model;
use crate::open::{FolderArgs, ModelArgs};
use anyhow::Result;
use pt_model::CausalLm;
use pt_peft::load_adapter;
use pt_tensor::Kind;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    folder: FolderArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    args.folder.check()?;
    let adapter = args.model.adapter_folder()?;
    let pretrained = args.model.pretrained()?;
    // Nothing is rounded in f32.
    let kind = args.model.saved_kind(&pretrained, Kind::Float)?;
    let mut model = CausalLm::load(&pretrained, args.model.device()?, kind)?;
    if let Some(folder) = &adapter {
        load_adapter(folder, &model)?.merge_into(&mut model)?;
    }
    args.folder.fill(|folder, max_shard_bytes| save_model(folder, &pretrained, &model, max_shard_bytes))?;
    Ok(ExitCode::SUCCESS)
}
