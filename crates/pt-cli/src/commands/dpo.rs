//! `pt dpo`

use crate::dpo_task::DpoTask;
use crate::training;
use anyhow::Result;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(after_long_help = training::help_on_fields::<DpoTask>())]
pub(crate) struct Args {
    #[command(flatten)]
    training: training::TrainArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    training::run(args.training, DpoTask::default())
}
