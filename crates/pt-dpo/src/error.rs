//! What can go wrong in this crate.

use pt_tensor::{Tensor, TensorError};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, DpoError>;

/// An error of this crate; [`hint`](Self::hint) says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DpoError {
    /// libtorch or the layer over it refused something.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A configuration with faults, all of them.
    #[error("loss: {}", .faults.join("; "))]
    Config {
        /// Each names the field, the value found and the value expected.
        faults: Vec<String>,
    },
    /// A tensor has a shape or kind that the function does not take.
    #[error("`{what}` is {found}, expected {expected}")]
    Shape {
        /// The tensor.
        what: &'static str,
        /// Its kind and shape.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// KTO's point of reference needs completions of other prompts, and there is only one prompt.
    #[error("`kto` pairs each prompt with a completion of another one, and all {num_rows} rows have the same prompt")]
    OnePrompt {
        /// Rows, once those of one prompt are joined.
        num_rows: usize,
    },
    /// Something that the loss is computed from was not given.
    #[error("`{needed_by}` needs `{what}`, which is absent")]
    Missing {
        /// The absent input.
        what: &'static str,
        /// The loss or the setting that needs it.
        needed_by: String,
    },
}

impl DpoError {
    /// What to do next, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Tensor(error) => error.hint(),
            Self::Missing { what: "reference", .. } => {
                Some("give the reference's log-probs, or take `simpo`, `cpo` or `orpo`, which have no reference".into())
            }
            Self::OnePrompt { .. } => {
                Some("give rows of other prompts, or take `apo_zero_unpaired`, which has no point of reference".into())
            }
            Self::Missing { what: "lengths", .. } => {
                Some("give the scored tokens of each completion (`completion_lengths` counts them)".into())
            }
            Self::Missing { what: "wpo_weights", .. } => {
                Some("`wpo_weights` computes them from `LabelLogprobs { with_collision: true, .. }`".into())
            }
            _ => None,
        }
    }

    pub(crate) fn shape(what: &'static str, found: &Tensor, expected: impl Into<String>) -> Self {
        Self::Shape { what, found: format!("{:?} of {:?}", found.size(), found.kind()), expected: expected.into() }
    }

    pub(crate) fn missing(what: &'static str, needed_by: impl Into<String>) -> Self {
        Self::Missing { what, needed_by: needed_by.into() }
    }
}
