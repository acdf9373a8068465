//! `pt ppo`

use crate::{rl, training};
use anyhow::Result;
use pt_rlhf::PpoConfig;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(after_long_help = rl::help::<PpoConfig>())]
pub(crate) struct Args {
    #[command(flatten)]
    training: training::TrainArgs,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    rl::run::<PpoConfig>(args.training)
}
