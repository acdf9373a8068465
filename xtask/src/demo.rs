//! `cargo xtask demo`: from a bare machine to a trained model.

use std::process::Command;

use anyhow::{Context, Result};

use crate::args::Demo;
use crate::process::{cargo, describe, run, workspace};
use crate::{fetch, setup};

/// The model that is trained.
const MODEL: &str = "smollm2-135m-instruct";

/// Sets up, fetches, builds and runs `pt demo`; `extra` goes to it.
pub(crate) fn run_demo(demo: Demo, extra: &[String]) -> Result<()> {
    // Flags that take fetched sets, by their names.
    let (name, sets): (&str, &[(&str, &str)]) = match demo {
        Demo::Sft => ("sft", &[("--data", "squad")]),
        Demo::Dpo => ("dpo", &[("--data", "halueval-qa")]),
        Demo::Rlhf => ("rlhf", &[("--data", "halueval-qa"), ("--rankings", "alpaca-eval")]),
        Demo::Grpo => ("grpo", &[]),
    };
    let libtorch = setup::setup()?;
    let model = fetch::one(MODEL)?;
    let sets: Vec<_> = sets.iter().map(|(flag, set)| Ok((flag, fetch::one(set)?))).collect::<Result<_>>()?;
    run(cargo(&libtorch).args(["build", "--release", "-p", "pt-cli"]))?;
    // Through cargo once more, rather than by path: it knows the target folder and the library path.
    let mut command: Command = cargo(&libtorch);
    command.args(["run", "--release", "--quiet", "-p", "pt-cli", "--bin", "pt", "--", "demo", name]);
    command.arg("--model").arg(model);
    for (flag, path) in sets {
        command.arg(flag).arg(path);
    }
    command.arg("--output").arg(free_folder(&format!("demo-{name}"))).args(extra);
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

/// `runs/NAME`, or with a number where runs stand already: a run is never overwritten.
fn free_folder(name: &str) -> std::path::PathBuf {
    let runs = workspace().join("runs");
    let names = std::iter::once(name.to_owned()).chain((2..).map(|number| format!("{name}-{number}")));
    names.map(|name| runs.join(name)).find(|path| !path.exists()).unwrap_or_else(|| runs.join(name))
}
