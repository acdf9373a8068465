//! `pt sft`

use crate::task::SftTask;
use crate::training;
use anyhow::Result;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(after_long_help = training::help_on_fields::<SftTask>())]
pub(crate) struct Args {
    #[command(flatten)]
    training: training::TrainArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    training::run(args.training, SftTask)
}
