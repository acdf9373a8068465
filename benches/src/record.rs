//! What was measured, on which machine, and how runs are summed up.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a command whose last line of output is one JSON object.
///
/// # Errors
/// When it fails or prints no such line.
pub fn json_of(command: &mut Command) -> Result<Value> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().rev().find(|line| line.starts_with('{')).context("it printed no JSON line")?;
    Ok(serde_json::from_str(line)?)
}

/// What one suite measured, printed as it comes and kept in `benches/records/<processor>/<date>-<suite>.jsonl`.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    lines: Vec<Value>,
}

impl Record {
    /// A record that says first what was measured, on which machine.
    ///
    /// # Errors
    /// When the date cannot be told.
    pub fn new(suite: &str, mut setting: Value) -> Result<Self> {
        let date = date()?;
        let cores = std::thread::available_parallelism()?.get();
        let cpu = cpu_name();
        let slug: String = cpu.to_lowercase().split(|letter: char| !letter.is_ascii_alphanumeric()).fold(
            String::new(),
            |slug, word| match word {
                "" => slug,
                word => slug + word + "-",
            },
        );
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("records").join(format!("{slug}{cores}"));
        let path = folder.join(format!("{date}-{suite}.jsonl"));
        setting["suite"] = suite.into();
        setting["cpu"] = cpu.into();
        setting["cores"] = cores.into();
        setting["date"] = date.into();
        let mut record = Self { path, lines: Vec::new() };
        record.add(setting);
        Ok(record)
    }

    /// Today's record of the suite, or the one at `path`, to go on with: what it holds stays.
    ///
    /// # Errors
    /// When it cannot be read, or was measured with other settings or on another processor.
    pub fn resume(suite: &str, setting: Value, path: Option<&Path>) -> Result<Self> {
        let mut record = Self::new(suite, setting)?;
        record.path = path.map_or(record.path, Path::to_path_buf);
        if !record.path.exists() {
            return Ok(record);
        }
        let place = record.path.display();
        let text = std::fs::read_to_string(&record.path).with_context(|| format!("cannot read {place}"))?;
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let without_date = |line: &Value| {
            let fields = line.as_object().into_iter().flatten().filter(|(name, _)| *name != "date");
            fields.map(|(name, value)| (name.clone(), value.clone())).collect::<Vec<_>>()
        };
        if lines.first().map(without_date) != record.lines.first().map(without_date) {
            bail!("{place} was measured with other settings: move it away to measure anew");
        }
        record.lines = lines;
        Ok(record)
    }

    /// What it holds.
    pub fn lines(&self) -> &[Value] {
        &self.lines
    }

    /// Where it will be written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Prints and keeps a line.
    pub fn add(&mut self, line: Value) {
        println!("{line}");
        self.lines.push(line);
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(self) -> Result<()> {
        self.keep()?;
        println!("written to {}", self.path.display());
        Ok(())
    }

    /// Writes what there is so far.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn keep(&self) -> Result<()> {
        std::fs::create_dir_all(self.path.parent().context("records have no folder")?)?;
        let text: String = self.lines.iter().map(|line| format!("{line}\n")).collect();
        // Whole or not at all: a killed run must not lose what it has.
        let next = self.path.with_extension("jsonl.tmp");
        std::fs::write(&next, text)
            .and_then(|()| std::fs::rename(&next, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// One measurement, in a process of its own.
pub type Measure<'a> = dyn FnMut() -> Result<Value> + 'a;

/// Rounds of ours and of the peer's (where it is there) in turn, each a line with `labels`; then the medians, and ours as
/// multiples of the peer's.
///
/// # Errors
/// Those of the measurements.
pub fn compare(
    record: &mut Record,
    labels: &Value,
    rounds: usize,
    ours: &mut [(&str, &mut Measure<'_>)],
    (peer, measure_peer): (&str, &mut (dyn FnMut() -> Result<Option<Value>> + '_)),
) -> Result<()> {
    let line = |fields: Value| {
        let mut line = fields;
        for (name, value) in labels.as_object().into_iter().flatten() {
            line[name] = value.clone();
        }
        line
    };
    let (mut own, mut theirs) = (vec![Vec::new(); ours.len()], Vec::new());
    for round in 0..rounds {
        for ((name, measure), all) in ours.iter_mut().zip(&mut own) {
            let measured = measure()?;
            record.add(line(json!({"tool": name, "round": round, "measured": measured})));
            all.push(measured);
        }
        if let Some(measured) = measure_peer()? {
            record.add(line(json!({"tool": peer, "round": round, "measured": measured})));
            theirs.push(measured);
        }
        record.keep()?;
    }
    let their_median = medians(&theirs);
    for ((name, _), all) in ours.iter().zip(&own) {
        let median = medians(all);
        record.add(line(json!({"median": name, "measured": median})));
        if !theirs.is_empty() {
            let ratio = ratios(&median, &their_median);
            record.add(line(json!({"ratio": format!("{name} / {peer}"), "measured": ratio})));
        }
    }
    if !theirs.is_empty() {
        record.add(line(json!({"median": peer, "measured": their_median})));
    }
    Ok(())
}

/// Ours as a multiple of the peer's, for every field that both have as a number.
pub fn ratios(own: &Value, peer: &Value) -> Value {
    let fields = own.as_object().into_iter().flatten();
    let ratio = |(name, value): (&String, &Value)| {
        let rounded = (value.as_f64()? / peer[name].as_f64()? * 100.0).round() / 100.0;
        Some((name.clone(), rounded.into()))
    };
    Value::Object(fields.filter_map(ratio).collect())
}

/// The middle one of several measurements.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median of every field that all of several measurements have as a number.
pub fn medians(measured: &[Value]) -> Value {
    let names = measured.first().and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name);
    let middle = |name: &String| {
        let values: Option<Vec<f64>> = measured.iter().map(|one| one[name].as_f64()).collect();
        Some((name.clone(), median(values?).into()))
    };
    Value::Object(names.filter_map(middle).collect())
}

/// Today in UTC, as `2026-11-24`.
///
/// # Errors
/// When `date` cannot be run.
pub fn date() -> Result<String> {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d"]).output().context("cannot run `date`")?;
    Ok(String::from_utf8(date.stdout)?.trim().to_owned())
}

/// The Python that has llama-cpp-python, where `cargo xtask bench --peers` could make it.
pub fn llama_cpp_python() -> Option<PathBuf> {
    std::env::var_os("PT_LLAMA_CPP_PYTHON").map(PathBuf::from)
}

/// Name of the processor, for records; with family and model where a name such as "AMD EPYC" says little.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |wanted: &str| {
        info.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == wanted).then(|| value.trim().to_owned())
        })
    };
    let Some(name) = field("model name") else { return std::env::consts::ARCH.to_owned() };
    match (field("cpu family"), field("model")) {
        (Some(family), Some(model)) => {
            let design = zen(&family, &model).map_or(String::new(), |design| format!(" ({design})"));
            format!("{name}, family {family} model {model}{design}")
        }
        _ => name,
    }
}

/// AMD's design of a family and model, as the Linux kernel tells them apart.
fn zen(family: &str, model: &str) -> Option<&'static str> {
    match (family, model.parse::<u32>().ok()?) {
        ("25", 0x10..=0x1f | 0x60..=0x7f | 0xa0..=0xaf) => Some("Zen 4"),
        ("25", _) => Some("Zen 3"),
        ("26", 0x00..=0x2f | 0x40..=0x4f | 0x60..=0x7f) => Some("Zen 5"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_leave_out_what_is_no_number() {
        let runs = [json!({"a": 1, "b": "x", "c": 2}), json!({"a": 3, "b": 1}), json!({"a": 2.5, "b": 1})];
        assert_eq!(medians(&runs), json!({"a": 2.5}));
        assert_eq!(ratios(&json!({"a": 3.0, "b": 1}), &json!({"a": 2})), json!({"a": 1.5}));
    }

    #[test]
    fn designs_are_told_by_family_and_model() {
        assert_eq!(zen("25", "17"), Some("Zen 4"));
        assert_eq!(zen("6", "17"), None);
    }
}
