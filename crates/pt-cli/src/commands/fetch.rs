//! `pt fetch`

use crate::talk::say;
use anyhow::Result;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A name that `pt models` lists.
    name: String,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    say(pt_fetch::fetch(&args.name)?.display())?;
    Ok(ExitCode::SUCCESS)
}
