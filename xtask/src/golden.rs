//! `cargo xtask golden`: our numbers against those of the reference implementations, and writing the latter anew.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, pinned_python, run, workspace};
use crate::test::run_counted;
use crate::{fetch, setup};

/// Runs the golden tests, or with `regenerate` the generators; `area` chooses one.
pub(crate) fn golden(area: Option<&str>, regenerate: bool) -> Result<()> {
    let folder = workspace().join("fixtures/generate");
    let areas = areas(&folder)?;
    if regenerate {
        let chosen = choose(&areas, area)?;
        let python = pinned_python("venv-golden", &folder.join("requirements.txt"))?;
        let model = fetch::one("smollm2-135m-instruct")?;
        for name in chosen {
            let mut command = Command::new(&python);
            command
                .arg(folder.join(format!("{name}.py")))
                .current_dir(workspace())
                .stdin(Stdio::null());
            run(command.env("PT_TEST_MODEL", &model))?;
        }
        eprintln!("fixtures are written; `cargo xtask golden` compares with them");
        return Ok(());
    }
    let libtorch = setup::setup()?;
    let model = fetch::one("smollm2-135m-instruct")?;
    let mut command = cargo(&libtorch);
    command.args([
        "test",
        "--workspace",
        "--no-fail-fast",
        "--lib",
        "--bins",
        "--tests",
        "--",
        "golden",
    ]);
    // The test harness takes names that contain any of the filters; one that holds both narrows it.
    if let Some(area) = area {
        let last = format!("golden_{area}");
        command = cargo(&libtorch);
        command.args([
            "test",
            "--workspace",
            "--no-fail-fast",
            "--lib",
            "--bins",
            "--tests",
            "--",
            &last,
        ]);
        command.arg(format!("golden::{area}"));
    }
    run_counted(command.env("PT_TEST_MODEL", model))
}

/// The generators: every Python file of the folder but those whose names start with `_`.
fn areas(folder: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut areas: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_suffix(".py")
                .map(str::to_owned)
        })
        .filter(|name| !name.starts_with('_') && name != "common")
        .collect();
    areas.sort();
    Ok(areas)
}

fn choose(areas: &[String], area: Option<&str>) -> Result<Vec<String>> {
    match area {
        None => Ok(areas.to_vec()),
        Some(area) if areas.iter().any(|name| name == area) => Ok(vec![area.to_owned()]),
        Some(area) => bail!(
            "there is no generator for `{area}`; there are: {}",
            areas.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_the_generators_without_their_helpers() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "models.py",
            "lora.py",
            "_shared.py",
            "common.py",
            "requirements.txt",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = areas(folder.path()).unwrap();
        assert_eq!(found, ["lora", "models"]);
        assert_eq!(choose(&found, Some("lora")).unwrap(), ["lora"]);
        assert!(
            choose(&found, Some("lara"))
                .unwrap_err()
                .to_string()
                .contains("lora, models")
        );
    }
}
