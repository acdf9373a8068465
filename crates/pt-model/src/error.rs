//! What can go wrong between a checkpoint on disk and the model's output.

use pt_tensor::{TchError, TensorError};
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// An error of this crate; [`hint`](Self::hint) says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// An error of the tensor layer.
    #[error(transparent)]
    Tensor(TensorError),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not JSON.
    #[error("{}: not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: serde_json::Error,
    },
    /// The path holds no model.
    #[error("{}: {reason}", path.display())]
    NotAModel {
        /// The path that was opened.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// A required key is not in the configuration.
    #[error("{}: `{field}` is missing, expected {expected}", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// What it should hold.
        expected: String,
        /// The nearest key that the file has.
        near: Option<String>,
    },
    /// A key holds what it should not.
    #[error("{}: `{field}` is {found}, expected {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// Its value, shortened.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// An architecture that this crate does not have.
    #[error("{}: `{field}` is `{found}`, expected one of {}", path.display(), known.join(", "))]
    UnknownArchitecture {
        /// The file.
        path: PathBuf,
        /// The key that names the architecture.
        field: String,
        /// The name found.
        found: String,
        /// The names known.
        known: Vec<String>,
        /// The nearest known name.
        near: Option<String>,
    },
    /// A GGUF file breaks its format.
    #[error("{}: not a whole GGUF file: {reason} (at byte {offset})", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A tensor is stored in a way that cannot be read yet.
    #[error("{}: tensor `{name}` is stored as {found}, expected one of {expected}", path.display())]
    StorageType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its storage type.
        found: String,
        /// The types that can be read.
        expected: String,
    },
    /// A tensor is not in the checkpoint.
    #[error("{}: no tensor `{name}`", path.display())]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The nearest name that is there.
        near: Option<String>,
    },
    /// A tensor's shape does not fit the configuration.
    #[error("{}: tensor `{name}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// Its shape.
        found: Vec<i64>,
        /// The shape that the configuration asks for.
        expected: Vec<i64>,
    },
    /// A tokenizer cannot be read or used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A chat template cannot be parsed.
    #[error("chat template, line {line}: {reason}")]
    TemplateSyntax {
        /// Line in the template, from 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
    /// A chat template refused its input or failed on it.
    #[error("chat template, line {line}: {reason}")]
    TemplateRender {
        /// Line in the template, from 1; 0 when not known.
        line: usize,
        /// What the template or the engine says.
        reason: String,
    },
    /// A group does not fit in a batch.
    #[error("prompt group {group}: {reason}")]
    Batch {
        /// Index of the group in the batch.
        group: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A sequence does not fit the context.
    #[error("a sequence of {length} tokens{} is longer than the context of {context}", with_virtual(*virtual_tokens))]
    TooLong {
        /// Tokens needed, the adapter's virtual tokens included.
        length: usize,
        /// How many of them are virtual.
        virtual_tokens: usize,
        /// Tokens the model can see.
        context: usize,
    },
    /// The model's output is no distribution.
    #[error("completion {row}, token {position}: the largest logit is {found}, expected a finite number")]
    NonFinite {
        /// The completion, counted through all prompts.
        row: usize,
        /// The token that was to be chosen, from 0.
        position: usize,
        /// The largest logit.
        found: f32,
    },
    /// Tensors that no part of the architecture uses.
    #[error("{}: {} tensors fit no part of this architecture: {}", path.display(), names.len(), some(names))]
    UnexpectedTensors {
        /// The file or folder.
        path: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// Weights cannot be exchanged now.
    #[error("the model's layers are held by a graph that was not run backward")]
    InUse,
    /// Something that cannot be done with this model.
    #[error("{what} is not supported")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// An argument lies outside its range.
    #[error("`{what}` is {found}, expected {expected}")]
    Argument {
        /// The argument.
        what: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
}

impl From<TensorError> for ModelError {
    fn from(error: TensorError) -> Self {
        match error {
            // One of ours that came through a callback of the tensor layer, a checkpointed layer's say.
            TensorError::Other { error, hint } => match error.downcast::<Self>() {
                Ok(own) => *own,
                Err(error) => Self::Tensor(TensorError::Other { error, hint }),
            },
            other => Self::Tensor(other),
        }
    }
}

/// For callbacks of the tensor layer; the way back gives the same error.
impl From<ModelError> for TensorError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Tensor(error) => error,
            other => Self::Other { hint: other.hint(), error: Box::new(other) },
        }
    }
}

impl From<TchError> for ModelError {
    fn from(error: TchError) -> Self {
        Self::Tensor(error.into())
    }
}

impl ModelError {
    /// What to do next, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        let did_you_mean = |near: &Option<String>| near.as_ref().map(|near| format!("did you mean `{near}`?"));
        match self {
            Self::Tensor(error) => error.hint(),
            Self::Read { path, .. } if path.extension().is_some_and(|extension| extension == "safetensors") => {
                Some("the folder's index names this file: fetch the checkpoint again, or copy the file there".into())
            }
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Some("check the path; `pt models` lists the models that can be fetched by name".into())
            }
            Self::Read { .. } => None,
            Self::Json { .. } => Some("the file may be cut off or edited by hand: fetch it or save it again".into()),
            Self::NotAModel { .. } => Some(
                "a model is a .gguf file, or a folder with config.json, tokenizer.json and model.safetensors (or its shards and index)"
                    .into(),
            ),
            Self::MissingField { near, .. } => {
                did_you_mean(near).or_else(|| Some("the checkpoint's own config.json has this key; fetch it again".into()))
            }
            Self::Field { .. } => Some("compare with the config.json that the model was published with".into()),
            Self::UnknownArchitecture { near, .. } => did_you_mean(near)
                .or_else(|| Some("only decoder models of these architectures can be loaded so far".into())),
            Self::Gguf { .. } => Some("the file may be cut off or damaged: compare its size or checksum and fetch it again".into()),
            Self::StorageType { .. } => Some("use a file quantized to one of these types, for example Q4_K_M or Q8_0".into()),
            Self::MissingTensor { near, .. } => {
                did_you_mean(near).or_else(|| Some("the weights may belong to another config.json".into()))
            }
            Self::Shape { .. } => Some("the weights and config.json belong to different models".into()),
            Self::Tokenizer { .. } => Some("take tokenizer.json from the folder that the model was published in".into()),
            Self::TemplateSyntax { .. } => Some("chat templates are Jinja; correct the template in tokenizer_config.json or chat_template.jinja".into()),
            Self::TemplateRender { .. } => Some("check the roles and their order in the messages against what the template takes".into()),
            Self::Batch { .. } => Some("each group needs a completion, a token, and one mask entry per completion token".into()),
            Self::TooLong { .. } => Some("shorten the prompt, or set a lower max_length or max_new_tokens".into()),
            Self::UnexpectedTensors { .. } => Some("config.json may belong to another model, or the checkpoint holds an adapter or a head: load those with --adapter".into()),
            Self::NonFinite { .. } => Some("the weights or the adapter hold NaN or infinity, or f16 overflows: try --dtype bf16 or f32".into()),
            Self::InUse => Some("drop the losses of earlier steps before weights are exchanged".into()),
            Self::Unsupported { .. } => {
                Some("a dense checkpoint of the model can do it; `pt merge` writes one, of 4-bit weights too".into())
            }
            Self::Argument { .. } => None,
        }
    }

    pub(crate) fn field(
        path: &std::path::Path,
        field: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Field { path: path.into(), field: field.into(), found: shorten(&found.into()), expected: expected.into() }
    }
}

/// The first few of many names.
fn some(names: &[String]) -> String {
    let more = names.len().saturating_sub(4);
    let shown = names[..names.len() - more].join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// At most 60 characters of a value that goes into a message.
fn shorten(text: &str) -> String {
    if text.chars().count() <= 60 { text.into() } else { text.chars().take(57).chain("...".chars()).collect() }
}

/// The name nearest to `name`, if one is near enough to be a slip of the pen.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_string())
}

fn with_virtual(virtual_tokens: usize) -> String {
    if virtual_tokens == 0 { String::new() } else { format!(", {virtual_tokens} of them the adapter's virtual ones,") }
}
