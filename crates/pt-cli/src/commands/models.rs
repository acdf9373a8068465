//! `pt models`

use crate::talk::say;
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    for entry in pt_fetch::catalog() {
        let kind = format!("{:?}", entry.kind).to_lowercase();
        if args.json {
            say(json!({
                "name": entry.name, "kind": kind, "licence": entry.licence, "description": entry.description
            }))?;
        } else {
            say(format_args!("{:<32} {:<6} {}  [{}]", entry.name, kind, entry.description, entry.licence))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
