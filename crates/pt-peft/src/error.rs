//! What can go wrong between an adapter's settings, its files and the model it goes on.

use pt_model::ModelError;
use pt_tensor::{TchError, TensorError};
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, PeftError>;

/// An error of this crate; [`hint`](Self::hint) says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {
    /// An error of the tensor layer.
    #[error(transparent)]
    Tensor(TensorError),
    /// An error of the model.
    #[error(transparent)]
    Model(ModelError),
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
    /// The path holds no adapter that can be read.
    #[error("{}: {reason}", path.display())]
    NotAnAdapter {
        /// The path that was opened.
        path: PathBuf,
        /// What was looked for.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A key of `adapter_config.json` holds what it should not.
    #[error("{}: `{field}` is {found}, expected {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// Its value.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// The adapter uses parts of its method that are not supported yet and that would change its values.
    #[error("{}: not supported yet: {}", path.display(), features.join(", "))]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Each as `key = value`.
        features: Vec<String>,
        /// Whether the method is a change of weights, so that Python can merge it.
        is_mergeable: bool,
    },
    /// Settings that cannot be: every fault at once.
    #[error("{} in the adapter's settings: {}", if faults.len() == 1 { "a fault" } else { "faults" }, faults.join("; "))]
    Config {
        /// The faults.
        faults: Vec<String>,
    },
    /// A pattern is not a regular expression that can be used here.
    #[error("`{field}`: `{pattern}` is not a supported regular expression: {reason}")]
    Pattern {
        /// The setting.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// What the parser says.
        reason: String,
    },
    /// A name matches no part of the model.
    #[error("`{field}`: {} in this model", no_match(names))]
    NoMatch {
        /// The setting.
        field: &'static str,
        /// The names or the pattern without a match.
        names: Vec<String>,
        /// The nearest names that the model has.
        near: Vec<String>,
        /// The names that the model has.
        available: Vec<String>,
    },
    /// A fault of settings that were read from a file.
    #[error("{}: {fault}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// [`Config`](Self::Config), [`Pattern`](Self::Pattern) or [`NoMatch`](Self::NoMatch).
        fault: Box<PeftError>,
    },
    /// A file's tensors are not the adapter's.
    #[error("{}: {}", path.display(), difference(missing, unexpected, shapes))]
    Keys {
        /// The file.
        path: PathBuf,
        /// Tensors that the adapter has and the file has not.
        missing: Vec<String>,
        /// Tensors that the file has and the adapter has not.
        unexpected: Vec<String>,
        /// Tensors of another shape: name, found, expected.
        shapes: Vec<(String, Vec<i64>, Vec<i64>)>,
    },
    /// No adapter has this name.
    #[error("no adapter is called `{name}`; there {}", listed(available))]
    UnknownAdapter {
        /// The name.
        name: String,
        /// The adapters that are loaded.
        available: Vec<String>,
    },
    /// The method is no change of weights.
    #[error("{method} cannot be merged: {reason}")]
    NotMergeable {
        /// The method.
        method: &'static str,
        /// What it does instead.
        reason: &'static str,
    },
    /// A call came at a time when it makes no sense, such as a second merge.
    #[error("{0}")]
    State(String),
}

impl From<TensorError> for PeftError {
    fn from(error: TensorError) -> Self {
        match error {
            // One of ours that came through a site of the model.
            TensorError::Other { error, hint } => match error.downcast::<Self>() {
                Ok(own) => *own,
                Err(error) => Self::Tensor(TensorError::Other { error, hint }),
            },
            other => Self::Tensor(other),
        }
    }
}

impl From<ModelError> for PeftError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Tensor(error) => error.into(),
            other => Self::Model(other),
        }
    }
}

impl From<TchError> for PeftError {
    fn from(error: TchError) -> Self {
        Self::Tensor(error.into())
    }
}

/// An error as a site returns it; [`PeftError::from`] gives the same one back.
pub(crate) fn to_model(error: PeftError) -> ModelError {
    match error {
        PeftError::Model(error) => error,
        PeftError::Tensor(error) => error.into(),
        other => ModelError::Tensor(TensorError::Other { hint: other.hint(), error: Box::new(other) }),
    }
}

impl PeftError {
    /// The same with the file that the settings were read from, where it does not name it.
    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Config { .. } | Self::Pattern { .. } | Self::NoMatch { .. } => {
                Self::InFile { path: path.into(), fault: Box::new(self) }
            }
            other => other,
        }
    }

    /// What to do next, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Tensor(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::InFile { fault, .. } => fault.hint(),
            Self::NotAnAdapter { hint, .. } => Some(hint.clone()),
            Self::NotMergeable { .. } => Some("keep it beside the model: pass it with --adapter".into()),
            Self::Json { .. } => Some("the file may be cut off or edited by hand: save it or copy it again".into()),
            Self::Unsupported { is_mergeable: true, .. } => Some(
                "merge the adapter into its base with Python PEFT (`merge_and_unload`) and load the merged model"
                    .into(),
            ),
            Self::Unsupported { is_mergeable: false, .. } => {
                Some("train it without them, or use it in the Python package that wrote it".into())
            }
            Self::Pattern { .. } => {
                Some("look-around and back-references are not available; give a list of names, or `all-linear`".into())
            }
            Self::NoMatch { near, available, .. } if near.is_empty() => {
                Some(format!("the model has {}", shortened(available)))
            }
            Self::NoMatch { near, available, .. } => {
                Some(format!("did you mean {}? The model has {}", quoted(near), shortened(available)))
            }
            Self::Keys { shapes, .. } if shapes.iter().any(|(_, found, expected)| is_transposed(found, expected)) => {
                Some("the file looks transposed: lora_A is [rank, in_features], lora_B is [out_features, rank]".into())
            }
            Self::Keys { shapes, .. } if !shapes.is_empty() => Some(
                "the adapter was trained on a model of another size, or adapter_config.json (`r`, `num_virtual_tokens`) \
                 is not this file's"
                    .into(),
            ),
            Self::Keys { .. } => {
                Some("the adapter was trained on another architecture, or its config names other modules".into())
            }
            _ => None,
        }
    }
}

/// Whether one shape is the other turned round.
fn is_transposed(found: &[i64], expected: &[i64]) -> bool {
    found != expected && found.iter().rev().eq(expected)
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The first few names, and how many more there are.
fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let head = quoted(&names[..names.len().min(SHOWN)]);
    if names.len() > SHOWN { format!("{head} and {} more", names.len() - SHOWN) } else { head }
}

fn no_match(names: &[String]) -> String {
    if names.is_empty() { "no layer is selected".into() } else { format!("nothing matches {}", quoted(names)) }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "are none".into() } else { format!("are {}", quoted(names)) }
}

fn difference(missing: &[String], unexpected: &[String], shapes: &[(String, Vec<i64>, Vec<i64>)]) -> String {
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!("{} missing: {}", missing.len(), shortened(missing)));
    }
    if !unexpected.is_empty() {
        parts.push(format!("{} unexpected: {}", unexpected.len(), shortened(unexpected)));
    }
    for (name, found, expected) in shapes.iter().take(4) {
        parts.push(format!("tensor `{name}` has shape {found:?}, expected {expected:?}"));
    }
    if shapes.len() > 4 {
        parts.push(format!("{} more of another shape", shapes.len() - 4));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_tensor_is_named_as_such() {
        let error = PeftError::Keys {
            path: "a/adapter_model.safetensors".into(),
            missing: vec![],
            unexpected: vec![],
            shapes: vec![("x.lora_A.weight".into(), vec![64, 4], vec![4, 64])],
        };
        assert!(error.to_string().ends_with("tensor `x.lora_A.weight` has shape [64, 4], expected [4, 64]"), "{error}");
        assert!(error.hint().unwrap().contains("transposed"));
    }

    #[test]
    fn an_error_of_a_site_comes_back_as_itself() {
        let sent = PeftError::Pattern { field: "target_modules", pattern: "(".into(), reason: "x".into() };
        let hint = sent.hint();
        let on_the_way = to_model(sent);
        assert_eq!(on_the_way.hint(), hint);
        let back = PeftError::from(on_the_way);
        assert!(matches!(back, PeftError::Pattern { .. }), "{back:?}");
    }

    #[test]
    fn a_long_list_is_cut_and_counted() {
        let names: Vec<String> = (0..20).map(|i| format!("layer{i}")).collect();
        let text = shortened(&names);
        assert!(text.ends_with("`layer11` and 8 more"), "{text}");
    }
}
