//! `pt grpo`

use crate::{rl, training};
use anyhow::Result;
use pt_rlhf::GrpoConfig;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(after_long_help = rl::help::<GrpoConfig>())]
pub(crate) struct Args {
    #[command(flatten)]
    training: training::TrainArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    rl::run::<GrpoConfig>(args.training)
}
