//! Everything that can go wrong in this crate, with what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where a data row came from, printed as `train.jsonl:12` or `train.json[11]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// File that holds the row.
    pub path: PathBuf,
    /// Line number from 1 in JSONL, position from 0 in a JSON array.
    pub position: usize,
    /// True when `position` counts lines.
    pub is_line: bool,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        if self.is_line { write!(f, "{path}:{}", self.position) } else { write!(f, "{path}[{}]", self.position) }
    }
}

/// Error of this crate. The message says where, what was found and what was expected; [`TrainError::hint`]
/// says what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file or folder could not be read.
    #[error("cannot read {path}")]
    Read {
        /// What was being read.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file or folder could not be written; whatever stood there before still stands.
    #[error("cannot write {path}")]
    Write {
        /// What was being written.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A data file holds something that is not JSON.
    #[error("{origin}: not valid JSON: {message}")]
    Json {
        /// The line or element.
        origin: Origin,
        /// What the parser said.
        message: String,
    },
    /// No form of row fits the fields that a row has.
    #[error("{origin}: row has the fields {}, expected {expected}", quoted(found))]
    MissingField {
        /// The row.
        origin: Origin,
        /// Field names that the row has, in its order.
        found: Vec<String>,
        /// The forms that would do.
        expected: String,
        /// A near name or a mapping that would mend it.
        suggestion: String,
    },
    /// A field is there but holds the wrong kind of value.
    #[error("{origin}: `{field}` is {found}, expected {expected}")]
    Field {
        /// The row.
        origin: Origin,
        /// Field name, with the position in a list where there is one.
        field: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A data set holds no rows.
    #[error("{path}: holds no rows")]
    EmptyData {
        /// The file or folder.
        path: PathBuf,
    },
    /// A file's name does not say a format that is read here.
    #[error("{path}: `{found}` files are not read, expected .jsonl or .json")]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its extension.
        found: String,
    },
    /// A row has the form of another kind of training.
    #[error("{origin}: a {found} row cannot be trained on by {task}")]
    WrongForm {
        /// The row.
        origin: Origin,
        /// Form of the row.
        found: &'static str,
        /// What was asked for.
        task: &'static str,
    },
    /// The tokenizer or the chat template refused a row.
    #[error("{origin}: {what} failed: {message}")]
    Encode {
        /// The row.
        origin: Origin,
        /// `tokenizing` or `the chat template`.
        what: &'static str,
        /// Its own words.
        message: String,
    },
    /// The template renders the start of a conversation differently once more turns follow.
    #[error(
        "{origin}: the chat template is not prefix-preserving: the text before message {message} \
         changes when later messages follow (first difference at byte {byte}: {before:?} became {after:?})"
    )]
    NotPrefixPreserving {
        /// The row.
        origin: Origin,
        /// Message whose context changed, from 0.
        message: usize,
        /// Where the two renderings part.
        byte: usize,
        /// Text of the prefix rendering from there.
        before: String,
        /// Text of the full rendering from there.
        after: String,
    },
    /// A row would train nothing.
    #[error("{origin}: {why} ({count} such row(s) in all)")]
    NothingTrained {
        /// First such row.
        origin: Origin,
        /// Which way it came to nothing.
        why: String,
        /// How many rows share the fault.
        count: usize,
    },
    /// A row is longer than allowed, under the policy `refuse`.
    #[error("{origin}: row has {found} tokens, the limit is {max_length} ({count} such row(s) in all)")]
    TooLong {
        /// First such row.
        origin: Origin,
        /// Its length in tokens.
        found: usize,
        /// The limit.
        max_length: usize,
        /// How many rows share the fault.
        count: usize,
    },
    /// Nothing is left after the checks.
    #[error("all {rows} rows were dropped: {reasons}")]
    AllDropped {
        /// Rows read.
        rows: usize,
        /// Counts by reason.
        reasons: String,
    },
    /// No row trains a token that ends a turn, so the model would never learn to stop.
    #[error("source `{source_name}`: none of its {rows} rows trains a stop token (ids {stop_ids:?})")]
    StopNotTrained {
        /// Name of the source.
        source_name: String,
        /// Rows looked at.
        rows: usize,
        /// Ids that end a turn.
        stop_ids: Vec<i64>,
    },
    /// A configuration key that nothing reads.
    #[error("{place}: unknown key `{key}`{}", .suggestion.as_ref().map(|name| format!(", did you mean `{name}`?")).unwrap_or_default())]
    UnknownKey {
        /// File, or `--set`.
        place: String,
        /// The key with its path.
        key: String,
        /// Nearest known name.
        suggestion: Option<String>,
        /// All known names at that place.
        known: Vec<String>,
    },
    /// A configuration that does not parse, or a value of the wrong kind or range.
    #[error("{place}: {message}")]
    Config {
        /// File, `--set`, or the field.
        place: String,
        /// What is wrong.
        message: String,
    },
    /// The output folder holds something already.
    #[error("{path}: {found}")]
    RunExists {
        /// The folder.
        path: PathBuf,
        /// What it holds.
        found: &'static str,
    },
    /// The folder is no run, or has nothing to resume from.
    #[error("{path}: {message}")]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        message: String,
    },
    /// The tensors of a checkpoint are not those that the configuration trains.
    #[error("the checkpoint does not fit the configuration: {}", differences(missing, unexpected))]
    StateMismatch {
        /// Trained here, not in the checkpoint.
        missing: Vec<String>,
        /// In the checkpoint, not trained here.
        unexpected: Vec<String>,
    },
    /// A loss, a gradient or a trained value is not finite; no checkpoint was written.
    #[error("step {step}: {what} is not finite; the first bad place is {place}")]
    NonFinite {
        /// The step.
        step: u64,
        /// Log-probs, gradient or parameter.
        what: String,
        /// Tensor and entry.
        place: String,
    },
    /// A training step failed below.
    #[error("step {step}, a micro-batch of {tokens} tokens")]
    Step {
        /// The step.
        step: u64,
        /// Tokens of the micro-batch.
        tokens: i64,
        /// The cause.
        source: Box<pt_model::ModelError>,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] pt_model::ModelError),
    /// An error of the tensor layer.
    #[error(transparent)]
    Tensor(#[from] pt_tensor::TensorError),
    /// An error of a parameter-efficient method.
    #[error(transparent)]
    Peft(#[from] pt_peft::PeftError),
    /// What an objective of another crate refuses, in its words.
    #[error("{message}")]
    Objective {
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A line in a metrics file is damaged in a place where a crash cannot have done it.
    #[error("{path}:{line}: {message}")]
    Metrics {
        /// The file.
        path: PathBuf,
        /// Line from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

/// Result with this crate's error.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

impl TrainError {
    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Read { path: path.to_path_buf(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Write { path: path.to_path_buf(), source }
    }

    /// What to do about it, in one line, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Objective { hint, .. } => return hint.clone(),
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "check the path; relative paths start at the current folder".into()
            }
            Self::Read { .. } => "check that the file may be read".into(),
            Self::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "the disk is full: free some space, then resume; the last checkpoint is untouched".into()
            }
            Self::Write { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                "choose an output folder that you may write to".into()
            }
            Self::Write { .. } => "check that the folder exists, may be written to and has room".into(),
            Self::Json { origin, .. } if origin.is_line => "JSONL holds one JSON object per line: mend or delete that line".into(),
            Self::Json { .. } => "a .json file holds one array of objects (or one object per line)".into(),
            Self::MissingField { suggestion, .. } => suggestion.clone(),
            Self::Field { .. } => "mend that row, or delete it".into(),
            Self::EmptyData { .. } => "is it the right file? each row is a JSON object".into(),
            Self::UnknownFormat { .. } => "convert the file to one JSON object per line".into(),
            Self::WrongForm { found: "prompt-only", .. } => {
                "add what should follow the prompt as `completion`; `pt generate` takes prompts alone".into()
            }
            Self::WrongForm { task: "preference training", .. } => {
                "such rows judge nothing; preferences are `prompt`, `chosen`, `rejected`, or completions with ranks or labels".into()
            }
            Self::WrongForm { .. } => {
                "train on preferences with `pt dpo`; or map a column, e.g. --set data.columns.completion=chosen".into()
            }
            Self::Encode { what: "the chat template", .. } => {
                "check the roles and their order in that row; a model without a template takes `prompt` and `completion` text".into()
            }
            Self::Encode { .. } => "check the text of that row".into(),
            Self::NotPrefixPreserving { .. } => {
                "such templates rewrite earlier turns (reasoning models do); train the last turn only with --set data.train_turns=last".into()
            }
            Self::NothingTrained { .. } => {
                "mend those rows, raise --set data.max_length=N where they were cut, or drop them with \
                 --set data.on_empty=drop"
                    .into()
            }
            Self::TooLong { .. } => {
                "raise --set data.max_length=N, or choose --set data.too_long=drop, truncate_left or truncate_right".into()
            }
            Self::AllDropped { .. } => "raise --set data.max_length=N, or look at the rows with `pt inspect`".into(),
            Self::StopNotTrained { .. } => {
                "the template or the truncation leaves the end of turn out, so generation would not stop; \
                 if that is meant: --set data.require_stop=false"
                    .into()
            }
            Self::UnknownKey { known, .. } if !known.is_empty() => format!("known keys here: {}", known.join(", ")),
            Self::UnknownKey { .. } => "see --help for the keys".into(),
            Self::Config { .. } => "see --help for the fields and their values".into(),
            Self::RunExists { found, .. } if found.contains("run") => {
                "continue it with --resume, or choose another --output".into()
            }
            Self::RunExists { .. } => "choose another --output: a run makes its own folder".into(),
            Self::NotARun { .. } => "start the run without --resume".into(),
            Self::StateMismatch { .. } => {
                "resume with the settings that the run began with (its config.yaml), or start a new run".into()
            }
            Self::NonFinite { .. } => {
                "lower learning_rate, set max_grad_norm, or compute in f32; the last checkpoint stands and can be resumed".into()
            }
            Self::Step { source, .. } => return source.hint(),
            Self::Model(source) => return source.hint(),
            Self::Tensor(source) => return source.hint(),
            Self::Peft(source) => return source.hint(),
            Self::Metrics { .. } => "delete that line, or move the file away; checkpoints do not depend on it".into(),
        })
    }
}

/// Both sides of a comparison of names, a few of each.
fn differences(missing: &[String], unexpected: &[String]) -> String {
    let side = |what: &str, names: &[String]| {
        let more = names.len().saturating_sub(3);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!names.is_empty()).then(|| format!("{what} {}{rest}", quoted(&names[..names.len() - more])))
    };
    let sides = [side("it lacks", missing), side("not trained here are", unexpected)];
    sides.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

fn quoted(names: &[String]) -> String {
    if names.is_empty() {
        return "(none)".into();
    }
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
