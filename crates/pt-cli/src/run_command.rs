//! What a run was started with beside its configuration: `command.yaml` in its folder, so that
//! `--resume --output RUN` is all that the command needs to go on.

use crate::open::BaseFormat;
use crate::talk::Usage;
use anyhow::Result;
use pt_tensor::Kind;
use pt_train::config::{load_config, to_yaml};
use pt_train::run_dir::write_atomic;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The command that trains, and its flags that are no fields of the configuration. Paths are absolute, so that a run can be resumed from
/// any folder; a name of the catalog stays a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RunCommand {
    /// `sft`, `dpo`, `reward`; empty, in a run of an earlier version, is `sft`.
    pub(crate) task: String,
    pub(crate) model: String,
    pub(crate) adapter: Option<String>,
    pub(crate) data: Vec<String>,
    pub(crate) eval_data: Vec<String>,
    pub(crate) device: String,
    /// As it was resolved, never `auto`: a run keeps its number format on another machine.
    pub(crate) dtype: String,
    /// How the base's linear layers are held; empty, in a run of an earlier version, is `as-stored`.
    pub(crate) weights: String,
    pub(crate) samples: Option<usize>,
}

impl RunCommand {
    fn path(run: &Path) -> PathBuf {
        run.join("command.yaml")
    }

    /// What a run kept; `None` when it kept nothing.
    pub(crate) fn load(run: &Path) -> Result<Option<Self>> {
        let path = Self::path(run);
        if !path.exists() {
            return Ok(None);
        }
        let command: Self = load_config(Some(&path), &[])?;
        Ok(Some(Self { task: command.task().into(), ..command }))
    }

    /// The command that goes on with the run in a folder.
    pub(crate) fn resume(&self, run: &Path) -> String {
        format!("pt {} --resume --output {}", self.task(), run.display())
    }

    /// What stands after `pt`.
    pub(crate) fn task(&self) -> &str {
        if self.task.is_empty() { "sft" } else { &self.task }
    }

    /// How its base's linear layers are held, by name; `None` where no run was kept.
    pub(crate) fn kept_weights(&self) -> Option<String> {
        match (self.weights.as_str(), self.model.is_empty()) {
            ("", true) => None,
            // A run of a version without the flag began as it does without it.
            ("", false) => Some(BaseFormat::AsStored.name().into()),
            (weights, _) => Some(weights.into()),
        }
    }

    pub(crate) fn save(&self, run: &Path) -> Result<()> {
        Ok(write_atomic(&Self::path(run), to_yaml(self)?.as_bytes())?)
    }
}

/// A path as a run keeps it; what is no path that stands (a name of the catalog) as it is.
pub(crate) fn absolute(path: &str) -> String {
    std::fs::canonicalize(path).map_or_else(|_| path.to_string(), |path| path.display().to_string())
}

/// The name of a number format, as `--dtype` takes it.
pub(crate) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    }
}

/// The value of a flag that cannot change in the course of a run: as given, or as the run in folder `run` kept it.
///
/// # Errors
/// [`Usage`] when both are there and differ.
pub(crate) fn agreed<T: PartialEq + std::fmt::Debug>(
    flag: &str,
    given: Option<T>,
    kept: Option<T>,
    run: &Path,
) -> Result<Option<T>> {
    match (given, kept) {
        (Some(given), Some(kept)) if given != kept => Err(Usage(format!(
            "{flag} is {given:?}, the run was started with {kept:?}: leave the flag out, or, where files were moved, \
             change {}",
            RunCommand::path(run).display()
        ))
        .into()),
        (given, kept) => Ok(given.or(kept)),
    }
}
