//! A run is a directory, readable at every moment.
//!
//! ```text
//! run/
//!   config.yaml             the resolved configuration; its presence makes the folder a run
//!   metrics.jsonl           one line a record
//!   tensorboard/            event files
//!   report.html
//!   checkpoints/step-00000100/   complete: it got this name by a rename after everything in it was synced
//!   checkpoints/.step-00000200.tmp-x/   being written, or left by a crash; removed when the run is opened
//!   checkpoints/best.json   which checkpoint is best, and by what
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};

/// Writes a file such that its name holds either the old bytes or all of the new: a temporary file in the same
/// folder, synced, renamed, and the folder synced.
///
/// # Errors
/// [`TrainError::Write`]; the old file stands and the temporary one is gone.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    pt_tensor::io::write_atomically(path, |out| out.write_all(bytes)).map_err(|error| match error {
        pt_tensor::TensorError::Write { path, source } => TrainError::Write { path, source },
        other => other.into(),
    })
}

/// That a folder can be made and written to; leaves nothing behind.
///
/// # Errors
/// [`TrainError::Write`].
pub fn check_place(folder: &Path) -> Result<()> {
    // The folder itself, or the nearest above it that stands: whatever is to be made will be made in there.
    let stands = folder.ancestors().find(|folder| folder.symlink_metadata().is_ok());
    let place = stands.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !place.is_dir() {
        return Err(TrainError::write(folder)(io::ErrorKind::NotADirectory.into()));
    }
    tempfile::tempfile_in(place).map_err(TrainError::write(folder))?;
    Ok(())
}

/// Best checkpoint of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Step of the checkpoint.
    pub step: u64,
    /// Name of the metric.
    pub metric: String,
    /// Its value there.
    pub value: f64,
}

/// A run's directory.
#[derive(Clone, Debug)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// Starts a run in a new or empty folder and saves its configuration.
    ///
    /// # Errors
    /// [`TrainError::RunExists`] when the folder holds anything; [`TrainError::Write`].
    pub fn create(root: &Path, config_yaml: &str) -> Result<Self> {
        Self::check_free(root)?;
        let run = Self { root: root.to_path_buf() };
        std::fs::create_dir_all(run.checkpoints()).map_err(TrainError::write(root))?;
        run.save_config(config_yaml)?;
        Ok(run)
    }

    /// What [`create`](Self::create) would refuse, told before anything is loaded. Leaves nothing behind.
    ///
    /// # Errors
    /// [`TrainError::RunExists`] when the folder holds anything; [`TrainError::Write`] when it could not be made.
    pub fn check_free(root: &Path) -> Result<()> {
        if root.is_file() {
            return Err(TrainError::RunExists { path: root.to_path_buf(), found: "is a file, expected a folder" });
        }
        if root.join("config.yaml").exists() {
            return Err(TrainError::RunExists { path: root.to_path_buf(), found: "already holds a run" });
        }
        if root.is_dir() {
            // What a crash before the first rename leaves behind is no reason to refuse.
            let names = list(root).map_err(TrainError::read(root))?;
            let is_left_over = |name: &String| {
                let checkpoints = || list(&root.join(name)).is_ok_and(|names| names.is_empty());
                name.starts_with(".tmp-") || (name == "checkpoints" && checkpoints())
            };
            if !names.iter().all(is_left_over) {
                return Err(TrainError::RunExists { path: root.to_path_buf(), found: "is not empty" });
            }
        }
        check_place(root)
    }

    /// Opens a run to continue or to read, and removes what an interrupted write left.
    ///
    /// # Errors
    /// [`TrainError::NotARun`] when there is no configuration; [`TrainError::Write`].
    pub fn open(root: &Path) -> Result<Self> {
        let run = Self { root: root.to_path_buf() };
        if !run.config_path().is_file() {
            return Err(TrainError::NotARun {
                path: root.to_path_buf(),
                message: "holds no config.yaml, so no run".into(),
            });
        }
        std::fs::create_dir_all(run.checkpoints()).map_err(TrainError::write(root))?;
        for folder in [run.root.clone(), run.checkpoints()] {
            for name in list(&folder).map_err(TrainError::read(&folder))? {
                let path = folder.join(&name);
                if name.starts_with(".tmp-") || (name.starts_with(".step-") && name.contains(".tmp-")) {
                    let removed =
                        if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                    removed.map_err(TrainError::write(&path))?;
                }
            }
        }
        Ok(run)
    }

    /// Replaces the saved configuration, in one step: a run that is resumed with other settings is described by
    /// those from then on.
    ///
    /// # Errors
    /// [`TrainError::Write`]; the old configuration stands then.
    pub fn save_config(&self, config_yaml: &str) -> Result<()> {
        write_atomic(&self.config_path(), config_yaml.as_bytes())
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration.
    pub fn config_path(&self) -> PathBuf {
        self.root.join("config.yaml")
    }

    /// Metrics, one JSON object a line.
    pub fn metrics_path(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// Folder of TensorBoard event files.
    pub fn tensorboard_path(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The report.
    pub fn report_path(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// Folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Where the checkpoint of a step stands, or would stand.
    pub fn checkpoint_path(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step:08}"))
    }

    /// Writes a checkpoint: `fill` gets an empty folder, which takes its name once everything in it is synced.
    ///
    /// A checkpoint of the same step that stands already is kept, and `fill` is not called: a run goes on from its
    /// newest one, so it holds the same state, and a folder cannot be replaced in one step.
    ///
    /// # Errors
    /// Those of `fill`, or [`TrainError::Write`] as one of its kind; no checkpoint appears then.
    pub fn write_checkpoint<E: From<TrainError>>(
        &self,
        step: u64,
        fill: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let path = self.checkpoint_path(step);
        if path.is_dir() {
            return Ok(path);
        }
        let folder = self.checkpoints();
        let temporary =
            builder(&format!(".step-{step:08}.tmp-"), 0o777).tempdir_in(&folder).map_err(TrainError::write(&path))?;
        fill(temporary.path())?;
        let publish = || -> io::Result<()> {
            sync_tree(temporary.path())?;
            std::fs::rename(temporary.path(), &path)?;
            sync_dir(&folder)
        };
        publish().map_err(TrainError::write(&path))?;
        // Its name is gone, so there is nothing for it to clean up.
        let _ = temporary.keep();
        Ok(path)
    }

    /// Steps of the complete checkpoints, rising.
    ///
    /// # Errors
    /// [`TrainError::Read`].
    pub fn checkpoint_steps(&self) -> Result<Vec<u64>> {
        let folder = self.checkpoints();
        let names = list(&folder).map_err(TrainError::read(&folder))?;
        let step_of = |name: &String| name.strip_prefix("step-").and_then(|digits| digits.parse().ok());
        let mut steps: Vec<u64> = names.iter().filter_map(step_of).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest complete checkpoint, if there is one.
    ///
    /// # Errors
    /// [`TrainError::Read`].
    pub fn latest(&self) -> Result<Option<(u64, PathBuf)>> {
        Ok(self.checkpoint_steps()?.last().map(|&step| (step, self.checkpoint_path(step))))
    }

    /// The best checkpoint, if one was named and still stands. A `best.json` that says none counts as absent:
    /// resuming names the best again.
    ///
    /// # Errors
    /// [`TrainError::Read`].
    pub fn best(&self) -> Result<Option<Best>> {
        let path = self.best_path();
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(TrainError::read(&path))?;
        let best: Option<Best> = serde_json::from_slice(&bytes).ok();
        Ok(best.filter(|best| self.checkpoint_path(best.step).is_dir()))
    }

    /// Names the best checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Write`].
    pub fn set_best(&self, best: &Best) -> Result<()> {
        let mut text =
            serde_json::to_string_pretty(best).map_err(|error| TrainError::write(&self.best_path())(error.into()))?;
        text.push('\n');
        write_atomic(&self.best_path(), text.as_bytes())
    }

    /// Removes all checkpoints but the newest `keep` and the best one; the newest always stays. Returns the steps removed.
    ///
    /// # Errors
    /// [`TrainError::Read`], [`TrainError::Write`].
    pub fn prune(&self, keep: usize) -> Result<Vec<u64>> {
        let steps = self.checkpoint_steps()?;
        let best = self.best()?.map(|best| best.step);
        let mut removed = Vec::new();
        for &step in &steps[..steps.len().saturating_sub(keep.max(1))] {
            if Some(step) == best {
                continue;
            }
            self.remove(step)?;
            removed.push(step);
        }
        Ok(removed)
    }

    fn remove(&self, step: u64) -> Result<()> {
        let path = self.checkpoint_path(step);
        // First out of the way in one step, so that a half-removed folder never bears a checkpoint's name.
        let doomed = self.checkpoints().join(format!(".step-{step:08}.tmp-old"));
        std::fs::rename(&path, &doomed).map_err(TrainError::write(&path))?;
        std::fs::remove_dir_all(&doomed).map_err(TrainError::write(&doomed))
    }

    fn best_path(&self) -> PathBuf {
        self.checkpoints().join("best.json")
    }
}

fn list(folder: &Path) -> io::Result<Vec<String>> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn sync_dir(folder: &Path) -> io::Result<()> {
    // Only Unix lets a folder be opened and synced; elsewhere the rename is all there is.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_dir(folder)
}

/// Temporary names with the permissions of any file of the user's (less the umask); the default is private.
fn builder(prefix: &str, mode: u32) -> tempfile::Builder<'_, '_> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> (tempfile::TempDir, RunDir) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(&folder.path().join("run"), "seed: 1\n").expect("a new folder");
        (folder, run)
    }

    fn save(run: &RunDir, step: u64) {
        run.write_checkpoint::<TrainError>(step, |folder| write_atomic(&folder.join("state.json"), b"{}"))
            .expect("saves");
    }

    #[test]
    fn an_existing_run_is_not_overwritten() {
        let (_folder, run) = run();
        let error = RunDir::create(run.root(), "").expect_err("holds a run");
        assert!(error.to_string().ends_with("already holds a run"), "{error}");
        assert!(error.hint().expect("a hint").contains("--resume"));
        assert!(RunDir::create(&run.config_path(), "").is_err());
        assert!(matches!(RunDir::open(&run.checkpoints()), Err(TrainError::NotARun { .. })));
        RunDir::open(run.root()).expect("opens");
    }

    #[test]
    fn a_resumed_run_keeps_its_new_settings() {
        let (_folder, run) = run();
        let again = RunDir::open(run.root()).expect("opens");
        again.save_config("seed: 2\n").expect("writes");
        assert_eq!(std::fs::read_to_string(run.config_path()).expect("reads"), "seed: 2\n");
        assert!(list(run.root()).expect("reads").iter().all(|name| !name.starts_with(".tmp-")));
    }

    #[test]
    fn a_failed_checkpoint_leaves_no_trace() {
        let (_folder, run) = run();
        save(&run, 10);
        let failed = run.write_checkpoint::<TrainError>(20, |folder| {
            write_atomic(&folder.join("half"), b"x")?;
            Err(TrainError::NotARun { path: folder.into(), message: "disk full, say".into() })
        });
        assert!(failed.is_err());
        assert_eq!(run.checkpoint_steps().expect("readable"), [10]);
        assert_eq!(list(&run.checkpoints()).expect("readable"), ["step-00000010"]);
    }

    #[test]
    fn leftovers_of_a_killed_process_are_ignored_and_swept() {
        let (_folder, run) = run();
        save(&run, 100);
        let left = run.checkpoints().join(".step-00000200.tmp-abc");
        std::fs::create_dir(&left).expect("makes");
        std::fs::write(left.join("model.safetensors"), b"half").expect("writes");
        std::fs::write(run.root().join(".tmp-xyz"), b"half").expect("writes");
        assert_eq!(run.latest().expect("readable").expect("one").0, 100);
        let again = RunDir::open(run.root()).expect("opens");
        assert!(!left.exists() && !run.root().join(".tmp-xyz").exists());
        assert_eq!(again.checkpoint_steps().expect("readable"), [100]);
    }

    #[test]
    fn a_checkpoint_of_the_same_step_stands() {
        let (_folder, run) = run();
        save(&run, 5);
        let again = run.write_checkpoint::<TrainError>(5, |_| unreachable!("it stands already")).expect("stands");
        assert_eq!(list(&again).expect("readable"), ["state.json"]);
        assert_eq!(list(&run.checkpoints()).expect("readable"), ["step-00000005"]);
    }

    /// Saves, names the best and prunes without end, when the test below starts this binary again for it.
    #[test]
    fn child_that_saves_until_it_is_killed() {
        let Some(root) = std::env::var_os("PT_TEST_RUN_DIR") else { return };
        let run = RunDir::open(Path::new(&root)).expect("readable after any kill");
        let first = run.latest().expect("readable").map_or(0, |(step, _)| step) + 1;
        let value = vec![7; 1 << 16];
        for step in first.. {
            let fill = |folder: &Path| {
                write_atomic(&folder.join("model"), &value)?;
                write_atomic(&folder.join("complete"), b"yes")
            };
            run.write_checkpoint::<TrainError>(step, fill).expect("saves");
            run.set_best(&Best { step, metric: "eval_loss".into(), value: 1.0 }).expect("writes");
            run.prune(2).expect("prunes");
        }
    }

    #[test]
    fn a_kill_at_any_moment_leaves_a_readable_run() {
        let (_folder, run) = run();
        let mut last = 0;
        for kill in 0..20_u64 {
            let mut child = std::process::Command::new(std::env::current_exe().expect("this test"))
                .args(["--exact", "run_dir::tests::child_that_saves_until_it_is_killed"])
                .env("PT_TEST_RUN_DIR", run.root())
                .stdout(std::process::Stdio::null())
                .spawn()
                .expect("starts");
            // However long the start takes on this machine, the kill comes while checkpoints are being written.
            let started = std::time::Instant::now();
            while run.latest().expect("readable").is_none_or(|(step, _)| step <= last) {
                assert!(child.try_wait().expect("asks").is_none(), "the child failed by itself");
                assert!(started.elapsed().as_secs() < 60, "the child never came to save");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            std::thread::sleep(std::time::Duration::from_millis(kill * 37 % 60));
            child.kill().expect("kills");
            child.wait().expect("ends");
            // Readable as it stands, before anything is swept up.
            for step in run.checkpoint_steps().expect("readable") {
                assert_eq!(std::fs::read(run.checkpoint_path(step).join("complete")).expect("complete"), b"yes");
            }
            run.best().expect("readable");
            let latest = run.latest().expect("readable").map_or(0, |(step, _)| step);
            assert!(latest >= last, "a kill lost a checkpoint");
            last = latest;
            RunDir::open(run.root()).expect("opens");
        }
    }

    #[test]
    fn pruning_keeps_the_newest_and_the_best() {
        let (_folder, run) = run();
        (1..=5).for_each(|step| save(&run, step * 100_000_000));
        run.set_best(&Best { step: 200_000_000, metric: "eval_loss".into(), value: 0.5 }).expect("writes");
        assert_eq!(run.prune(2).expect("prunes"), [100_000_000, 300_000_000]);
        assert_eq!(run.checkpoint_steps().expect("readable"), [200_000_000, 400_000_000, 500_000_000]);
        assert_eq!(run.best().expect("readable").expect("stands").value, 0.5);
        run.prune(0).expect("prunes");
        assert_eq!(run.latest().expect("readable").expect("one").0, 500_000_000);
    }

    #[test]
    fn a_damaged_note_of_the_best_counts_as_none() {
        let (_folder, run) = run();
        save(&run, 1);
        for text in ["{\"step\": 1, \"metric\": \"eval_loss\", \"value\": null}", "", "{"] {
            std::fs::write(run.best_path(), text).expect("writes");
            assert_eq!(run.best().expect("readable"), None);
            run.prune(1).expect("prunes");
        }
    }

    #[test]
    fn a_new_run_takes_only_a_folder_that_holds_nothing_of_worth() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let root = folder.path().join("run");
        // What a crash before config.yaml leaves.
        std::fs::create_dir_all(root.join("checkpoints")).expect("makes");
        std::fs::write(root.join(".tmp-xyz"), "half").expect("writes");
        let run = RunDir::create(&root, "").expect("nothing of worth");
        save(&run, 3);
        std::fs::remove_file(run.config_path()).expect("removes");
        let error = RunDir::create(&root, "").expect_err("a checkpoint stands");
        assert!(matches!(error, TrainError::RunExists { found: "is not empty", .. }), "{error}");
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_one_file() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("a.txt");
        write_atomic(&path, b"one").expect("writes");
        write_atomic(&path, b"two").expect("writes");
        assert_eq!(std::fs::read(&path).expect("reads"), b"two");
        assert_eq!(list(folder.path()).expect("reads"), ["a.txt"]);
        let error = write_atomic(&folder.path().join("no/such/file"), b"").expect_err("no folder");
        assert!(matches!(error, TrainError::Write { .. }) && error.hint().is_some());
    }
}
