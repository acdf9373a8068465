//! Demos of several commands: each stage is a command of `pt` as one would type it, in a process of its own, with its run
//! in a folder of the demo's.

use crate::talk::{Usage, say};
use anyhow::{Context, Result, ensure};
use pt_train::data::{ReadOptions, read_rows};
use pt_train::metrics::read_series;
use pt_train::run_dir::write_atomic;
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What a demo of several stages is asked with.
#[derive(clap::Args)]
pub(super) struct StageArgs {
    /// The model file.
    #[arg(long)]
    pub(super) model: PathBuf,
    /// New folder for the rows and for a run of each stage.
    #[arg(long)]
    pub(super) output: PathBuf,
    /// auto, cpu, cuda or mps.
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, f32 or bf16.
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Seed of every stage.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Set a field of a stage's configuration: --set ppo.max_steps=3, say.
    #[arg(long, value_name = "STAGE.FIELD=VALUE")]
    set: Vec<String>,
    /// Go on with the demo in --output.
    #[arg(long)]
    resume: bool,
}

/// How a demo's stages went.
pub(super) enum Went {
    /// All of them.
    Well,
    /// One ended early, with this code: it was interrupted, or failed and has said why.
    Ended(u8),
}

impl StageArgs {
    /// Refuses a folder that holds a demo (or holds none to resume) and settings of stages that there are not.
    pub(super) fn check(&self, stages: &[&str]) -> Result<()> {
        for set in &self.set {
            let is_known =
                set.split_once('.').is_some_and(|(stage, rest)| stages.contains(&stage) && rest.contains('='));
            if !is_known {
                let stages: Vec<String> = stages.iter().map(|stage| format!("{stage}.FIELD=VALUE")).collect();
                return Err(Usage(format!("--set is `{set}`, expected {}", stages.join(" or "))).into());
            }
        }
        let is_used = fs::read_dir(&self.output).is_ok_and(|mut entries| entries.next().is_some());
        match (self.resume, is_used) {
            (true, false) => Err(Usage(format!("{} holds no demo to resume", self.output.display())).into()),
            (false, true) => Err(Usage(format!(
                "{} is not empty: give another --output, or --resume to go on with the demo in it",
                self.output.display()
            ))
            .into()),
            _ => Ok(()),
        }
    }

    /// Folder of a stage's run.
    pub(super) fn run_of(&self, stage: &str) -> PathBuf {
        self.output.join(stage)
    }

    /// Writes rows beside the runs.
    pub(super) fn write_rows(&self, name: &str, rows: &[Value]) -> Result<PathBuf> {
        let path = self.output.join(name);
        fs::create_dir_all(&self.output).with_context(|| format!("cannot make {}", self.output.display()))?;
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        write_atomic(&path, text.as_bytes())?;
        Ok(path)
    }

    /// Runs the command of a stage, or goes on with it.
    pub(super) fn run(&self, stage: &str, flags: &[(&str, &Path)], settings: &[(&str, &str)]) -> Result<Went> {
        let run = self.run_of(stage);
        let mut words: Vec<OsString> = vec![stage.into(), "--output".into(), run.clone().into()];
        let own = self.set.iter().filter_map(|set| Some(set.strip_prefix(stage)?.strip_prefix('.')?.to_owned()));
        if self.resume && run.join("config.yaml").exists() {
            // It remembers all but what is set anew.
            words.push("--resume".into());
            own.for_each(|set| words.extend(["--set".into(), set.into()]));
        } else {
            words.extend(["--model".into(), self.model.clone().into()]);
            for (flag, value) in flags {
                words.extend([format!("--{flag}").into(), value.into()]);
            }
            let settings = settings.iter().map(|(name, value)| format!("{name}={value}"));
            for set in settings.chain([format!("seed={}", self.seed)]).chain(own) {
                words.extend(["--set".into(), set.into()]);
            }
            words.extend(["--device", &self.device, "--dtype", &self.dtype].map(OsString::from));
        }
        let shown: Vec<String> = words.iter().map(|word| quoted(&word.to_string_lossy())).collect();
        eprintln!("\n$ pt {}", shown.join(" "));
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let status = Command::new(program).args(words).status().with_context(|| format!("cannot run `pt {stage}`"))?;
        let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        if !status.success() {
            eprintln!("the demo goes on, once that is mended, with the same command and --resume");
        }
        Ok(if status.success() { Went::Well } else { Went::Ended(code) })
    }

    /// A metric of a stage when it was first and last written.
    pub(super) fn ends(&self, stage: &str, metric: &str) -> Result<Option<(f64, f64)>> {
        let series = read_series(&self.run_of(stage).join("metrics.jsonl"))?;
        let ends = |points: &Vec<(u64, f64)>| Some((points.first()?.1, points.last()?.1));
        Ok(series.get(metric).and_then(ends))
    }

    /// The report of a stage, and how to talk with its result.
    pub(super) fn close(&self, stage: &str) -> Result<()> {
        say(format_args!("report          {}", self.run_of(stage).join("report.html").display()))?;
        say("\nTalk with it:")?;
        say(format_args!("  pt chat --model {} --adapter {}", self.model.display(), self.run_of(stage).display()))
    }
}

impl Went {
    /// The exit code of a stage that ended early.
    pub(super) fn early(self) -> Option<ExitCode> {
        match self {
            Self::Well => None,
            Self::Ended(code) => Some(ExitCode::from(code)),
        }
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The rows of a fetched set's file as they stand, once they were seen to be rows of the set.
pub(super) fn rows_of(folder: &Path, file: &str, set: &str) -> Result<Vec<Value>> {
    let path = folder.join(file);
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}: run `pt fetch {set}`", path.display()))?;
    // From the file itself, so that a fault names its line there.
    let rows = read_rows(std::slice::from_ref(&path), &ReadOptions { preferences: true, ..ReadOptions::default() })?;
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    ensure!(rows.len() == lines.len(), "{}: expected one row a line", path.display());
    lines.into_iter().map(|line| serde_json::from_str(line).with_context(|| path.display().to_string())).collect()
}

/// `count` of the rows, evenly spaced; all where there are fewer.
pub(super) fn spaced<T: Clone>(rows: &[T], count: usize) -> Vec<T> {
    let count = count.min(rows.len());
    (0..count).map(|number| rows[number * rows.len() / count].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_split_them() {
        assert_eq!(quoted("batch.batch_size=8"), "batch.batch_size=8");
        assert_eq!(quoted("rewards=[{type: f1}]"), "'rewards=[{type: f1}]'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn rows_are_picked_evenly() {
        assert_eq!(spaced(&[0, 1, 2, 3, 4, 5], 3), [0, 2, 4]);
        assert_eq!(spaced(&[0, 1], 5), [0, 1]);
    }
}
