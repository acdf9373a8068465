//! Checkpoints of a run and the adapter to use, found without opening the run: a live trainer may be writing there, and
//! opening it sweeps away what is half written.

use crate::run_command::RunCommand;
use crate::talk::Refused;
use anyhow::Result;
use pt_train::run_dir::Best;
use std::path::{Path, PathBuf};

/// The checkpoints that stand in a run.
pub(crate) struct Checkpoints {
    folder: PathBuf,
    /// Folder names, in the order of their steps.
    pub(crate) names: Vec<String>,
    /// Absent where no held-out loss was measured.
    pub(crate) best: Option<Best>,
}

impl Checkpoints {
    pub(crate) fn of(run: &Path) -> Self {
        let folder = run.join("checkpoints");
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| name.starts_with("step-"));
        names.sort();
        let best: Option<Best> =
            std::fs::read(folder.join("best.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Self { best: best.filter(|best| names.contains(&name_of(best))), folder, names }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The best, where this is it.
    pub(crate) fn best_named(&self, name: &str) -> Option<&Best> {
        self.best.as_ref().filter(|best| name_of(best) == name)
    }

    /// The best where one is named, else the last.
    pub(crate) fn chosen(&self) -> Option<PathBuf> {
        let name = self.best.as_ref().map(name_of).or(self.names.last().cloned())?;
        Some(self.path(&name))
    }
}

fn name_of(best: &Best) -> String {
    format!("step-{:08}", best.step)
}

/// The run that an adapter stands in: `RUN/checkpoints/step-N/adapter`.
pub(crate) fn run_of(adapter: &Path) -> Option<PathBuf> {
    let adapter = adapter.canonicalize().ok()?;
    let checkpoints = adapter.parent()?.parent().filter(|folder| folder.ends_with("checkpoints"))?;
    checkpoints.parent().map(Path::to_path_buf)
}

/// The reward model that a path names: an adapter as [`adapter_folder`] finds it, else a whole model, which stands in the
/// folder itself or is that of a run's best (else last) checkpoint.
pub(crate) enum RewardFolder {
    Adapter(PathBuf),
    Model(PathBuf),
}

impl RewardFolder {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoints::of(path).chosen();
        let models = [Some(path.to_path_buf()), checkpoint.map(|checkpoint| checkpoint.join("model"))];
        match models.into_iter().flatten().find(|folder| folder.join("config.json").exists()) {
            Some(folder) => Ok(Self::Model(folder)),
            None => Ok(Self::Adapter(adapter_folder(path)?)),
        }
    }
}

/// The adapter that a path names: itself, that of a checkpoint, or that of a run's best (else last) checkpoint, which is
/// then told on stderr.
pub(crate) fn adapter_folder(path: &Path) -> Result<PathBuf> {
    let is_adapter = |folder: &Path| folder.join("adapter_config.json").exists();
    if is_adapter(path) {
        return Ok(path.to_path_buf());
    }
    let refused = |message: String, hint: String| Refused { message: format!("{}: {message}", path.display()), hint };
    let is_run = path.join("config.yaml").exists() && path.join("checkpoints").is_dir();
    let checkpoints = Checkpoints::of(path);
    let Some(checkpoint) = (if is_run { checkpoints.chosen() } else { Some(path.to_path_buf()) }) else {
        return Err(refused(
            "this run has saved no checkpoint yet".into(),
            format!("train it further: {}", RunCommand::load(path)?.unwrap_or_default().resume(path)),
        )
        .into());
    };
    let (adapter, model) = (checkpoint.join("adapter"), checkpoint.join("model"));
    if is_adapter(&adapter) {
        let which = match (is_run, checkpoints.best.is_some()) {
            (true, true) => ", of the run's best checkpoint",
            (true, false) => ", of the run's last checkpoint",
            (false, _) => "",
        };
        eprintln!("adapter: {}{which}", adapter.display());
        return Ok(adapter);
    }
    if model.join("config.json").exists() {
        return Err(refused(
            "all weights were trained here, so there is no adapter".into(),
            format!("use the model alone: --model {}", model.display()),
        )
        .into());
    }
    Err(refused(
        "holds no adapter_config.json, so no adapter".into(),
        "--adapter takes a folder in PEFT's format, or a run of `pt sft` or `pt dpo`, whose best checkpoint it then takes".into(),
    )
    .into())
}
