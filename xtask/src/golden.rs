//! `cargo xtask golden`: our numbers against those of the reference implementations, and writing the latter anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, pinned_python, pinned_python_by, run, workspace};
use crate::test::run_counted;
use crate::{fetch, setup};

const SMOLLM2: &str = "smollm2-135m-instruct";

/// Runs the golden tests, or with `regenerate` the generators; `area` chooses one.
pub(crate) fn golden(area: Option<&str>, regenerate: bool) -> Result<()> {
    let generators = workspace().join("fixtures/generate");
    if area == Some(INTEROP) {
        return interop(&generators, regenerate);
    }
    let chosen = choose(&areas(&generators)?, area)?;
    if regenerate {
        return write_fixtures(&generators, &chosen);
    }
    let libtorch = setup::setup()?;
    let model = fetch::one(SMOLLM2)?;
    let mut command = cargo(&libtorch);
    command.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests", "--"]);
    // The harness runs the tests whose names contain any of the filters.
    command.args(chosen.iter().map(|name| filter(name)));
    let num_passed = run_counted(command.env("PT_TEST_MODEL", model))?;
    if num_passed == 0 {
        bail!("no test ran: none has {} in its name", filter(&chosen.join(" or golden_")));
    }
    Ok(())
}

/// What `pt` writes, loaded by PEFT and transformers. Not an area: there is nothing to keep, and Python does the comparing.
const INTEROP: &str = "interop";

/// The same by AdapterHub's package, of bottleneck adapters.
const INTEROP_ADAPTERS: &str = "interop_adapters";

/// Has the tests write adapters and exports, tiny ones and those of the real model, and the pinned Python load them.
fn interop(generators: &Path, regenerate: bool) -> Result<()> {
    if regenerate {
        bail!("`{INTEROP}` keeps no fixtures: run `cargo xtask golden {INTEROP}`");
    }
    let libtorch = setup::setup()?;
    let model = fetch::one(SMOLLM2)?;
    let python = pinned_python("venv-golden", &generators.join("requirements.txt"))?;
    // In the build folder: the real model's two exports take a gigabyte, which a /tmp in memory may not have.
    let place = workspace().join("target");
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let folder = tempfile::tempdir_in(&place).context("cannot make a temporary folder")?;
    let mut command = cargo(&libtorch);
    command.args(["test", "-p", "pt-cli", "--test", "it", "--", "--nocapture"]).arg(filter(INTEROP));
    command.env("PT_TEST_MODEL", model).env("PT_INTEROP_FOLDER", folder.path());
    if run_counted(&mut command)? == 0 {
        bail!("no test ran: none has {} in its name", filter(INTEROP));
    }
    let load = |python: &Path, script: &str| {
        let script = generators.join(format!("{script}.py"));
        run(Command::new(python).arg(script).arg(folder.path()).current_dir(workspace()).stdin(Stdio::null()))
    };
    load(&python, INTEROP)?;
    let (environment, requirements) = environment_of("bottleneck");
    load(&pinned_python(environment, &generators.join(requirements))?, INTEROP_ADAPTERS)
}

/// What the names of an area's tests contain; a test below sees to it that each area has some.
fn filter(area: &str) -> String {
    format!("golden_{area}")
}

fn write_fixtures(generators: &Path, chosen: &[String]) -> Result<()> {
    for name in chosen {
        let (environment, requirements) = environment_of(name);
        let python = pinned_python(environment, &generators.join(requirements))?;
        let mut command = Command::new(python);
        command.arg(generators.join(format!("{name}.py")));
        if READ_SMOLLM2.contains(&name.as_str()) {
            command.arg("--gguf").arg(fetch::one(SMOLLM2)?);
        }
        if READ_PPO.contains(&name.as_str()) {
            command.arg("--ppo-sources").arg(ppo_sources(generators)?);
        }
        run(command.current_dir(workspace()).stdin(Stdio::null()))?;
    }
    eprintln!("fixtures are written; `cargo xtask golden` compares with them");
    Ok(())
}

/// The Python that has AdapterHub's package.
pub(crate) fn adapter_hub() -> Result<PathBuf> {
    let (environment, requirements) = environment_of("bottleneck");
    pinned_python(environment, &workspace().join("fixtures/generate").join(requirements))
}

/// The Python environment of a generator, and the list of its packages: AdapterHub's package pins an older transformers.
fn environment_of(area: &str) -> (&'static str, &'static str) {
    match area {
        "bottleneck" => ("venv-adapters", "adapters_requirements.txt"),
        _ => ("venv-golden", "requirements.txt"),
    }
}

/// The environment with the packages whose PPO is read and not imported, without what they depend on.
fn ppo_sources(generators: &Path) -> Result<PathBuf> {
    let requirements = generators.join("ppo_requirements.txt");
    let wanted =
        fs::read_to_string(&requirements).with_context(|| format!("cannot read {}", requirements.display()))?;
    let python = pinned_python_by("venv-ppo-sources", &wanted, 200, |python| {
        let mut command = Command::new(python);
        run(command.args(["-m", "pip", "install", "--no-deps", "-r"]).arg(&requirements).stdin(Stdio::null()))
    })?;
    let folder = python.parent().and_then(Path::parent).context("the environment's Python is not in its bin folder")?;
    Ok(folder.to_owned())
}

/// Generators that read the sources of packages with PPO, and are told where they are.
const READ_PPO: [&str; 1] = ["rlhf"];

/// Generators that read the real model, and are told where it is.
const READ_SMOLLM2: [&str; 3] = ["smollm2", "tokenizer", "dpo_train"];

/// Modules that generators share, and what is no generator.
const HELPERS: [&str; 3] = ["common", INTEROP, INTEROP_ADAPTERS];

/// The generators: every Python file of the folder but the helpers, `models` first, whose files others read.
fn areas(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut areas: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".py").map(str::to_owned))
        .filter(|name| !HELPERS.contains(&name.as_str()))
        .collect();
    areas.sort_by_key(|name| (name != "models", name.clone()));
    Ok(areas)
}

fn choose(areas: &[String], area: Option<&str>) -> Result<Vec<String>> {
    match area {
        None => Ok(areas.to_vec()),
        Some(area) if areas.iter().any(|name| name == area) => Ok(vec![area.to_owned()]),
        Some(area) => bail!("there is no area `{area}`; there are: {}, {INTEROP}", areas.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_the_generators_without_their_helpers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["models.py", "lora.py", "common.py", "interop.py", "interop_adapters.py"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = areas(folder.path()).unwrap();
        assert_eq!(found, ["models", "lora"]);
        assert_eq!(choose(&found, Some("lora")).unwrap(), ["lora"]);
        assert!(choose(&found, Some("lara")).unwrap_err().to_string().contains("models, lora"));
    }

    /// The sources under a folder, end to end.
    fn sources(folder: &Path) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                text += &sources(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text += &fs::read_to_string(&path).unwrap();
            }
        }
        text
    }

    #[test]
    fn every_area_has_tests_that_its_filter_finds() {
        let areas = areas(&workspace().join("fixtures/generate")).unwrap();
        assert!(areas.len() > 5, "{areas:?}");
        let text = sources(&workspace().join("crates"));
        for area in areas.into_iter().chain([INTEROP.to_owned()]) {
            let filter = filter(&area);
            let is_found = text.contains(&format!("fn {filter}_")) || text.contains(&format!("mod {filter};"));
            assert!(is_found, "no test is named {filter}_..");
        }
    }

    #[test]
    fn the_generators_that_read_the_real_model_or_sources_take_their_paths() {
        let options = READ_SMOLLM2.map(|name| (name, "\"--gguf\""));
        for (name, option) in options.into_iter().chain(READ_PPO.map(|name| (name, "\"--ppo-sources\""))) {
            let path = workspace().join("fixtures/generate").join(format!("{name}.py"));
            assert!(fs::read_to_string(&path).unwrap().contains(option), "{}", path.display());
        }
    }
}
