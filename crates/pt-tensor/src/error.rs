//! What can go wrong below the model level.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, TensorError>;

/// An error of this crate; [`hint`](Self::hint) says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// libtorch threw.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
    /// A kernel of `pt-quant` refused its arguments.
    #[error(transparent)]
    Quant(#[from] pt_quant::QuantError),
    /// An argument has a shape that the function does not take.
    #[error("{what} has shape {found:?}, expected {expected}")]
    Shape {
        /// The argument.
        what: String,
        /// Its shape.
        found: Vec<i64>,
        /// The shape in words or letters.
        expected: String,
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
    /// There is no memory for a part of what is to be done.
    #[error("out of memory: no {bytes} bytes for {what}")]
    OutOfMemory {
        /// The part.
        what: String,
        /// What it takes.
        bytes: usize,
    },
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file could not be written; what stood there before still stands.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path}: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is not in the file.
    #[error("{path}: no tensor `{name}`")]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// An error of a crate above, on its way through a callback that returns this type.
    #[error("{error}")]
    Other {
        /// The error; downcast it to what the callback put in.
        error: Box<dyn std::error::Error + Send + Sync>,
        /// What it says to do.
        hint: Option<String>,
    },
}

impl TensorError {
    /// What to do next, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Other { hint, .. } => hint.clone(),
            Self::Quant(error) => Some(error.hint().into()),
            Self::Torch(e) if e.to_string().contains("out of memory") || e.to_string().contains("can't allocate") => {
                Some("out of memory: use smaller micro-batches (max_tokens_per_microbatch), activation checkpointing or bf16".into())
            }
            Self::OutOfMemory { what, .. } if what.starts_with("the optimizer state") => Some(
                "adamw.variant=adamw_8bit takes a quarter of it, adamw.variant=paged_adamw keeps it in a file that the \
                 system pages in and out"
                    .into(),
            ),
            Self::Format { .. } => Some("the file may be cut off or damaged: fetch it or save it again".into()),
            Self::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Some("the disk is full: free some space; the last complete file is untouched".into())
            }
            Self::MissingTensor { .. } => Some("the checkpoint does not fit this architecture or a shard is missing".into()),
            _ => None,
        }
    }

    pub(crate) fn shape(what: impl Into<String>, found: &tch::Tensor, expected: impl Into<String>) -> Self {
        Self::Shape { what: what.into(), found: found.size(), expected: expected.into() }
    }

    pub(crate) fn argument(what: &str, found: impl ToString, expected: &str) -> Self {
        Self::Argument { what: what.into(), found: found.to_string(), expected: expected.into() }
    }
}

/// libtorch appends a C++ stack trace to its messages; a user needs the first line.
fn first_line(error: &tch::TchError) -> String {
    let text = error.to_string();
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or("").to_string()
}
