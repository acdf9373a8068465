//! What can go wrong in this crate.

use pt_tensor::{Tensor, TensorError};
use pt_train::{Origin, TrainError};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, RlhfError>;

/// An error of this crate; [`hint`](Self::hint) says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RlhfError {
    /// libtorch or the layer over it refused something.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The model or its files.
    #[error(transparent)]
    Model(#[from] pt_model::ModelError),
    /// The run, its data or its files.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A configuration with faults, all of them.
    #[error("{place}: {}", .faults.join("; "))]
    Config {
        /// What is configured.
        place: String,
        /// Each names the field, the value found and the value expected.
        faults: Vec<String>,
    },
    /// An argument has a shape, a kind or a length that the function does not take.
    #[error("`{what}` is {found}, expected {expected}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A prompt that nothing can be sampled for, or whose row lacks what a reward needs.
    #[error("{origin}: {message}")]
    Prompt {
        /// The row.
        origin: Origin,
        /// What is wrong, with the value found.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A reward cannot be computed, or is no number.
    #[error("reward `{reward}`: {message}")]
    Reward {
        /// The reward's name.
        reward: String,
        /// What happened, with the value found.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

impl RlhfError {
    /// What to do next, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Tensor(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::Train(error) => error.hint(),
            Self::Prompt { hint, .. } | Self::Reward { hint, .. } => hint.clone(),
            Self::Config { .. } | Self::Shape { .. } => None,
        }
    }

    pub(crate) fn shape(what: &'static str, found: &Tensor, expected: impl Into<String>) -> Self {
        Self::Shape { what, found: format!("{:?} of {:?}", found.size(), found.kind()), expected: expected.into() }
    }

    pub(crate) fn length(what: &'static str, found: usize, expected: usize) -> Self {
        Self::Shape { what, found: format!("of length {found}"), expected: format!("length {expected}") }
    }
}
