//! `cargo xtask demo`: from a bare machine to a fine-tuned model.

use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{cargo, describe, run, workspace};
use crate::{fetch, setup};

/// The model that is fine-tuned, and the rows it is fine-tuned on.
const MODEL: &str = "smollm2-135m-instruct";
const DATA: &str = "squad";

/// Sets up, fetches, builds and runs `pt demo sft`; `extra` goes to it.
pub(crate) fn sft(extra: &[String]) -> Result<()> {
    let libtorch = setup::setup()?;
    let (model, data) = (fetch::one(MODEL)?, fetch::one(DATA)?);
    run(cargo(&libtorch).args(["build", "--release", "-p", "pt-cli"]))?;
    // Through cargo once more, rather than by path: it knows the target folder and the library path.
    let mut command: Command = cargo(&libtorch);
    command.args(["run", "--release", "--quiet", "-p", "pt-cli", "--bin", "pt", "--", "demo", "sft"]);
    command.arg("--model").arg(model).arg("--data").arg(data);
    command.arg("--output").arg(free_folder()).args(extra);
    replace_with(&mut command)
}

/// Becomes the command, so that Ctrl-C reaches it alone and its exit code (130 after a saved checkpoint) is ours.
#[cfg(unix)]
fn replace_with(command: &mut Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let line = describe(command);
    eprintln!("$ {line}");
    Err(command.exec()).with_context(|| format!("cannot run `{line}`"))
}

#[cfg(not(unix))]
fn replace_with(command: &mut Command) -> Result<()> {
    run(command)
}

/// `runs/demo-sft`, or with a number where runs stand already: a run is never overwritten.
fn free_folder() -> std::path::PathBuf {
    let runs = workspace().join("runs");
    let names = std::iter::once("demo-sft".to_owned()).chain((2..).map(|number| format!("demo-sft-{number}")));
    names.map(|name| runs.join(name)).find(|path| !path.exists()).unwrap_or_else(|| runs.join("demo-sft"))
}
