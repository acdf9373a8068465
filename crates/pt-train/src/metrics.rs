//! `metrics.jsonl`: one record a line, valid JSON always, kept in memory as series for the report.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Result, TrainError};

/// Names of the metrics that every trainer writes; a method adds its own beside them.
pub mod names {
    /// Mean loss a trained token of the step, nats.
    pub const LOSS: &str = "loss";
    /// The same over the evaluation set.
    pub const EVAL_LOSS: &str = "eval_loss";
    /// Learning rate that the step used.
    pub const LEARNING_RATE: &str = "learning_rate";
    /// Norm of the gradient before clipping.
    pub const GRAD_NORM: &str = "grad_norm";
    /// Tokens a second, prompt tokens included.
    pub const TOKENS_PER_SECOND: &str = "tokens_per_second";
    /// Peak memory so far, bytes: of the device, or resident on a CPU.
    pub const MEMORY: &str = "memory_bytes";
    /// Epochs done.
    pub const EPOCH: &str = "epoch";
    /// Share of the trained tokens of the step that were the most probable ones.
    pub const ACCURACY: &str = "mean_token_accuracy";
    /// The same over the evaluation set.
    pub const EVAL_ACCURACY: &str = "eval_mean_token_accuracy";
}

/// Points of one metric, `(step, value)` in order of writing.
pub type Series = Vec<(u64, f64)>;

/// Appends records to `metrics.jsonl`; each line reaches the operating system before the call returns.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    series: BTreeMap<String, Series>,
}

impl MetricsWriter {
    /// Opens the file to continue after `step`: later records, and a line that a crash cut short, are removed.
    /// A new run has `step` 0 and keeps only records of step 0.
    ///
    /// # Errors
    /// [`TrainError::Read`], [`TrainError::Write`], [`TrainError::Metrics`] for a damaged line before the last.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let text = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(TrainError::read(path)(error)),
        };
        let records = parse(path, &text)?;
        let mut kept = Vec::new();
        let mut series = BTreeMap::new();
        for record in records.iter().filter(|record| step_of(record) <= step) {
            kept.extend(line(record));
            remember(&mut series, record);
        }
        if kept != text {
            crate::run_dir::write_atomic(path, &kept)?;
        }
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).append(true).open(path)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        Ok(Self { path: path.to_path_buf(), file: open().map_err(TrainError::write(path))?, series })
    }

    /// Writes one record. A value that is not finite is written as the string `NaN`, `inf` or `-inf`, since JSON
    /// has no such numbers.
    ///
    /// # Errors
    /// [`TrainError::Write`].
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut record = Map::new();
        record.insert("step".into(), step.into());
        for (name, value) in values {
            record.insert(
                (*name).into(),
                serde_json::Number::from_f64(*value).map_or_else(|| Value::String(value.to_string()), Value::Number),
            );
        }
        self.file.write_all(&line(&record)).map_err(TrainError::write(&self.path))?;
        remember(&mut self.series, &record);
        Ok(())
    }

    /// Forces all records to disk; called with each checkpoint, which must not be ahead of them.
    ///
    /// # Errors
    /// [`TrainError::Write`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(TrainError::write(&self.path))
    }

    /// All points of all metrics, by name.
    pub fn series(&self) -> &BTreeMap<String, Series> {
        &self.series
    }
}

/// Reads the series of a metrics file; a last line that was cut short is passed over.
///
/// # Errors
/// [`TrainError::Read`], [`TrainError::Metrics`].
pub fn read_series(path: &Path) -> Result<BTreeMap<String, Series>> {
    let bytes = std::fs::read(path).map_err(TrainError::read(path))?;
    let mut series = BTreeMap::new();
    parse(path, &bytes)?.iter().for_each(|record| remember(&mut series, record));
    Ok(series)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Map<String, Value>>> {
    let mut records = Vec::new();
    let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    for (index, line) in lines.iter().enumerate() {
        match serde_json::from_slice::<Map<String, Value>>(line) {
            Ok(record) if record.get("step").is_some_and(Value::is_u64) && line.ends_with(b"\n") => {
                records.push(record)
            }
            // Only the last line can have been cut by a crash.
            _ if index + 1 == lines.len() => {}
            Ok(_) => {
                return Err(TrainError::Metrics {
                    path: path.into(),
                    line: index + 1,
                    message: "has no `step`".into(),
                });
            }
            Err(error) => {
                return Err(TrainError::Metrics { path: path.into(), line: index + 1, message: error.to_string() });
            }
        }
    }
    Ok(records)
}

fn line(record: &Map<String, Value>) -> Vec<u8> {
    let mut bytes = Value::Object(record.clone()).to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

fn step_of(record: &Map<String, Value>) -> u64 {
    record.get("step").and_then(Value::as_u64).unwrap_or(0)
}

fn remember(series: &mut BTreeMap<String, Series>, record: &Map<String, Value>) {
    for (name, value) in record.iter().filter(|(name, _)| *name != "step") {
        let value = value.as_f64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
        if let Some(value) = value {
            series.entry(name.clone()).or_default().push((step_of(record), value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_later_and_broken_lines_and_keeps_the_rest_byte_for_byte() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 0).expect("opens");
        for step in 1..=4 {
            writer.write(step, &[("loss", 1.0 / step as f64), ("grad_norm", f64::NAN)]).expect("writes");
        }
        writer.sync().expect("syncs");
        let straight = std::fs::read(&path).expect("reads");
        File::options()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(b"{\"step\":5,\"lo"))
            .expect("writes");
        assert_eq!(read_series(&path).expect("reads")["loss"].len(), 4);
        let mut resumed = MetricsWriter::open(&path, 2).expect("opens");
        assert_eq!(resumed.series()["loss"], [(1, 1.0), (2, 0.5)]);
        for step in 3..=4 {
            resumed.write(step, &[("loss", 1.0 / step as f64), ("grad_norm", f64::NAN)]).expect("writes");
        }
        assert_eq!(std::fs::read(&path).expect("reads"), straight);
    }

    #[test]
    fn every_line_is_json_though_values_are_not_finite() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 0).expect("opens");
        writer.write(1, &[("loss", f64::NAN), ("a", f64::INFINITY), ("b", 1e-7)]).expect("writes");
        let text = std::fs::read_to_string(&path).expect("reads");
        assert_eq!(text, "{\"step\":1,\"loss\":\"NaN\",\"a\":\"inf\",\"b\":1e-7}\n");
        let series = read_series(&path).expect("reads");
        assert!(series["loss"][0].1.is_nan() && series["a"][0].1.is_infinite());
    }

    #[test]
    fn damage_before_the_last_line_is_an_error() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\nnonsense\n{\"step\":2}\n").expect("writes");
        let error = MetricsWriter::open(&path, 9).expect_err("damaged").to_string();
        assert!(error.contains("metrics.jsonl:2: "), "{error}");
    }
}
