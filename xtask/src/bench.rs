//! `cargo xtask bench`: runs suites of the `pt-benches` package, beside the Python tools when asked.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::fetch;
use crate::process::{cargo, pinned_python, run, workspace};
use crate::setup::{self, Libtorch};

/// Runs each suite (all of them when none is named); `extra` goes to every one.
pub(crate) fn bench(suites: &[String], peers: bool, extra: &[String]) -> Result<()> {
    let libtorch = setup::setup()?;
    let known = known_suites(&libtorch)?;
    if let Some(unknown) = suites.iter().find(|suite| !known.contains(suite)) {
        bail!("there is no suite `{unknown}`; there are: {}", known.join(", "));
    }
    let suites = if suites.is_empty() { &known } else { suites };
    let python = match peers {
        true => Some(pinned_python("venv-peers", &workspace().join("benches/peers/requirements.txt"))?),
        false => None,
    };
    let model = fetch::one("smollm2-135m-instruct")?;
    // Built first and all together, so that no compiler runs beside a measurement.
    run(cargo(&libtorch).args(["build", "--release", "-p", "pt-benches"]))?;
    for suite in suites {
        let mut command = cargo(&libtorch);
        command.args(["run", "--release", "--quiet", "-p", "pt-benches", "--bin", suite, "--"]);
        if let Some(python) = &python {
            command.arg("--peers").arg(python);
        }
        run(command.args(extra).env("PT_TEST_MODEL", &model))?;
    }
    Ok(())
}

/// The binaries of `pt-benches`, as cargo sees them.
fn known_suites(libtorch: &Libtorch) -> Result<Vec<String>> {
    let output = cargo(libtorch).args(["metadata", "--no-deps", "--format-version", "1"]).output();
    let output = output.context("cannot run `cargo metadata`")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).context("`cargo metadata` did not print JSON")?;
    Ok(binaries(&metadata, "pt-benches"))
}

fn binaries(metadata: &Value, package: &str) -> Vec<String> {
    let packages = metadata["packages"].as_array().into_iter().flatten().filter(|found| found["name"] == package);
    packages
        .flat_map(|found| found["targets"].as_array().into_iter().flatten())
        .filter(|target| target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "bin")))
        .filter_map(|target| target["name"].as_str().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_the_binaries_of_the_package() {
        let metadata = serde_json::json!({"packages": [
            {"name": "other", "targets": [{"kind": ["bin"], "name": "no"}]},
            {"name": "pt-benches", "targets": [
                {"kind": ["lib"], "name": "pt_benches"},
                {"kind": ["bin"], "name": "sft"},
                {"kind": ["bin"], "name": "generate"}]}]});
        assert_eq!(binaries(&metadata, "pt-benches"), ["sft", "generate"]);
    }
}
