//! `cargo xtask bench`: runs suites of the `pt-benches` package, beside other tools when asked.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::fetch;
use crate::golden::adapter_hub;
use crate::process::{cargo, pinned_python, pinned_python_by, run, workspace};
use crate::setup::{self, Libtorch};

/// The suite of `pt-quant`, which needs neither libtorch nor a model.
const BARE_SUITE: &str = "quant";

/// The suite that measures a larger model as well.
const QLORA_SUITE: &str = "qlora";

/// The suite whose peer is an older TRL.
const PPO_SUITE: &str = "ppo";

/// Suites whose peers do not include llama.cpp.
const WITHOUT_LLAMA_CPP: [&str; 7] = ["sft", "dpo", "peft", QLORA_SUITE, "reward", PPO_SUITE, "grpo"];

/// Runs each suite (all of them when none is named); `extra` goes to every one.
pub(crate) fn bench(suites: &[String], peers: bool, extra: &[String]) -> Result<()> {
    let known = known_suites()?;
    if let Some(unknown) = suites.iter().find(|suite| !known.contains(suite)) {
        bail!("there is no suite `{unknown}`; there are: {}", known.join(", "));
    }
    let suites = if suites.is_empty() { &known } else { suites };
    let is_bare = suites.iter().all(|suite| suite == BARE_SUITE);
    let (libtorch, model) = match is_bare {
        true => (Libtorch::User, None),
        false => (setup::setup()?, Some(fetch::one("smollm2-135m-instruct")?)),
    };
    let larger = match suites.iter().any(|suite| suite == QLORA_SUITE) {
        true => Some(fetch::one("qwen2.5-coder-1.5b-instruct")?),
        false => None,
    };
    let python = match peers {
        true => Some(pinned_python("venv-peers", &workspace().join("benches/peers/requirements.txt"))?),
        false => None,
    };
    let has_llama_cpp = suites.iter().any(|suite| !WITHOUT_LLAMA_CPP.contains(&suite.as_str()));
    let llama_cpp = if peers && has_llama_cpp { llama_cpp_or_reason() } else { None };
    let is_of_methods = suites.iter().any(|suite| suite == "peft");
    let squad = if is_of_methods { Some(fetch::one("squad")?) } else { None };
    let adapters = match peers && is_of_methods {
        true => Some(adapter_hub()?),
        false => None,
    };

    let ppo = match peers && suites.iter().any(|suite| suite == PPO_SUITE) {
        true => Some(pinned_python("venv-peers-ppo", &workspace().join("benches/peers/requirements-ppo.txt"))?),
        false => None,
    };

    let features: &[&str] = if is_bare { &["--no-default-features"] } else { &[] };
    // Built first and all together, so that no compiler runs beside a measurement.
    run(cargo(&libtorch).args(["build", "--release", "-p", "pt-benches", "--bins"]).args(features))?;
    for suite in suites {
        let mut command = cargo(&libtorch);
        command.args(["run", "--release", "--quiet", "-p", "pt-benches", "--bin", suite]).args(features).arg("--");
        if let Some(python) = &python {
            command.arg("--peers").arg(python);
        }
        let variables = [
            ("PT_TEST_MODEL", &model),
            ("PT_QLORA_MODEL", &larger),
            ("PT_LLAMA_CPP_PYTHON", &llama_cpp),
            ("PT_SQUAD", &squad),
            ("PT_ADAPTERS_PYTHON", &adapters),
            ("PT_PPO_PYTHON", &ppo),
        ];
        for (name, value) in variables {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        run(command.args(extra))?;
    }
    Ok(())
}

/// The Python that has llama.cpp, or none after saying why: it is compiled, which may fail where the others do not.
fn llama_cpp_or_reason() -> Option<PathBuf> {
    match llama_cpp() {
        Ok(python) => Some(python),
        Err(error) => {
            eprintln!("llama.cpp is left out of the comparison: {error:#}");
            eprintln!(
                "  hint: it takes a C++ compiler (Debian and Ubuntu: sudo apt-get install g++); pip's output is above"
            );
            None
        }
    }
}

/// llama-cpp-python, compiled once from its source package for this processor, in an environment of its own.
fn llama_cpp() -> Result<PathBuf> {
    let peers = workspace().join("benches/peers");
    let (requirements, only_needed) = (peers.join("requirements-llama-cpp.txt"), peers.join("llama_cpp.cmake"));
    let mut defines = vec![format!("-DCMAKE_PROJECT_llama_cpp_INCLUDE={}", only_needed.display())];
    defines.extend(["GGML_NATIVE=ON", "GGML_OPENMP=ON"].map(|define| format!("-D{define}")));
    let unneeded = ["LLAMA_BUILD_TESTS", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER"];
    let unneeded = unneeded.iter().chain(&["LLAMA_BUILD_APP", "LLAMA_CURL", "LLAMA_OPENSSL", "LLAVA_BUILD"]);
    defines.extend(unneeded.map(|define| format!("-D{define}=OFF")));

    let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    // Another folder of the checkout changes nothing of what is built.
    let stamp = [&read(&requirements)?, &read(&only_needed)?, &defines[1..].join(" "), "\n"].concat();
    pinned_python_by("venv-llama-cpp", &stamp, 1000, |python| {
        eprintln!("compiling llama.cpp for this processor; it takes 3 to 10 minutes on two cores, once");
        let start = Instant::now();
        let mut command = quietly(python);
        command
            .args(["-m", "pip", "install", "--no-cache-dir", "--no-binary", "llama-cpp-python", "-r"])
            .arg(&requirements);
        run(command.env("CMAKE_ARGS", defines.join(" ")).env("CMAKE_BUILD_PARALLEL_LEVEL", "2"))?;
        eprintln!("llama.cpp was compiled in {:.0} s", start.elapsed().as_secs_f64());
        Ok(())
    })
}

/// A command that leaves the processor to others where there is `nice`.
fn quietly(program: &PathBuf) -> Command {
    let has_nice = Command::new("nice").arg("true").stdin(Stdio::null()).status().is_ok_and(|status| status.success());
    let mut command = Command::new(if has_nice { "nice".into() } else { program.clone() });
    if has_nice {
        command.args(["-n", "10"]).arg(program);
    }
    command.stdin(Stdio::null());
    command
}

/// The binaries of `pt-benches`, as cargo sees them.
fn known_suites() -> Result<Vec<String>> {
    let output = cargo(&Libtorch::User).args(["metadata", "--no-deps", "--format-version", "1"]).output();
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
