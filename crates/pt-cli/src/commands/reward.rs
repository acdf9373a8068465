//! `pt reward`

use crate::reward_task::RewardTask;
use crate::training;
use anyhow::Result;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(after_long_help = training::help_on_fields::<RewardTask>())]
pub(crate) struct Args {
    #[command(flatten)]
    training: training::TrainArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    training::run(args.training, RewardTask::default())
}
