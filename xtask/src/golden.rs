//! `cargo xtask golden`: our numbers against those of the reference implementations, and writing the latter anew.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, pinned_python, run, workspace};
use crate::test::run_counted;
use crate::{fetch, setup};

const SMOLLM2: &str = "smollm2-135m-instruct";
const QWEN: &str = "qwen2.5-coder-1.5b-instruct";

/// Runs the golden tests, or with `regenerate` the generators; `area` chooses one.
pub(crate) fn golden(area: Option<&str>, regenerate: bool) -> Result<()> {
    if regenerate {
        return write_fixtures(area);
    }
    let libtorch = setup::setup()?;
    let model = fetch::one(SMOLLM2)?;
    let mut command = cargo(&libtorch);
    command.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests", "--"]);
    // The harness runs the tests whose names contain any of the filters.
    match area {
        None => command.arg("golden"),
        Some(area) => command.args([format!("golden_{area}"), format!("golden::{area}")]),
    };
    run_counted(command.env("PT_TEST_MODEL", model))
}

fn write_fixtures(area: Option<&str>) -> Result<()> {
    let folder = workspace().join("fixtures/generate");
    let chosen = choose(&areas(&folder)?, area)?;
    let python = pinned_python("venv-golden", &folder.join("requirements.txt"))?;
    for name in chosen {
        for arguments in arguments_of(&name)? {
            let mut command = Command::new(&python);
            command.arg(folder.join(format!("{name}.py"))).args(arguments);
            run(command.current_dir(workspace()).stdin(Stdio::null()))?;
        }
    }
    eprintln!("fixtures are written; `cargo xtask golden` compares with them");
    Ok(())
}

/// One entry per run of the generator: those that read a real model are told where it is.
fn arguments_of(area: &str) -> Result<Vec<Vec<OsString>>> {
    let model = |name: &str| fetch::one(name).map(OsString::from);
    Ok(match area {
        "smollm2" => vec![vec!["--gguf".into(), model(SMOLLM2)?]],
        "tokenizer" => vec![vec![SMOLLM2.into(), model(SMOLLM2)?], vec![QWEN.into(), model(QWEN)?]],
        _ => vec![Vec::new()],
    })
}

/// Modules that generators share.
const HELPERS: [&str; 2] = ["common", "make_hf"];

/// The generators: every Python file of the folder but the helpers.
fn areas(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut areas: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".py").map(str::to_owned))
        .filter(|name| !HELPERS.contains(&name.as_str()))
        .collect();
    areas.sort();
    Ok(areas)
}

fn choose(areas: &[String], area: Option<&str>) -> Result<Vec<String>> {
    match area {
        None => Ok(areas.to_vec()),
        Some(area) if areas.iter().any(|name| name == area) => Ok(vec![area.to_owned()]),
        Some(area) => bail!("there is no generator for `{area}`; there are: {}", areas.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_the_generators_without_their_helpers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["models.py", "lora.py", "make_hf.py", "common.py", "requirements.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = areas(folder.path()).unwrap();
        assert_eq!(found, ["lora", "models"]);
        assert_eq!(choose(&found, Some("lora")).unwrap(), ["lora"]);
        assert!(choose(&found, Some("lara")).unwrap_err().to_string().contains("lora, models"));
    }
}
