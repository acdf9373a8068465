//! The values of LoRA's settings that are more than a number or a name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How A and B start: a flag or a name, as PEFT takes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum LoraInit {
    /// True: A uniform, B zero. False: both random, so that the adapter acts from the start.
    Default(bool),
    /// `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N` or `olora`.
    Named(String),
}

impl Default for LoraInit {
    fn default() -> Self {
        Self::Default(true)
    }
}

impl std::fmt::Display for LoraInit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default(flag) => write!(f, "{flag}"),
            Self::Named(name) => write!(f, "\"{name}\""),
        }
    }
}

/// What [`LoraInit`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Uniform,
    Random,
    Gaussian,
    Orthogonal,
    Pissa { num_iterations: Option<u32> },
    Olora,
}

impl Start {
    /// Whether A and B are a part of the weight, which then leaves it.
    pub(super) fn is_from_weight(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }
}

impl LoraInit {
    /// Which start it is, or what was expected.
    pub(super) fn start(&self) -> Result<Start, &'static str> {
        let name = match self {
            Self::Default(true) => return Ok(Start::Uniform),
            Self::Default(false) => return Ok(Start::Random),
            Self::Named(name) => name.as_str(),
        };
        match name {
            "gaussian" => Ok(Start::Gaussian),
            "orthogonal" => Ok(Start::Orthogonal),
            "pissa" => Ok(Start::Pissa { num_iterations: None }),
            "olora" => Ok(Start::Olora),
            _ => name
                .strip_prefix("pissa_niter_")
                .and_then(|number| number.parse().ok())
                .map(|number| Start::Pissa { num_iterations: Some(number) })
                .ok_or("true, false, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N` or `olora`"),
        }
    }
}

/// Which of the model's biases are trained beside the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BiasMode {
    /// None.
    #[default]
    None,
    /// All: of linear layers and of norms.
    All,
    /// Those of the layers that have an update.
    LoraOnly,
}

/// Tokens whose embeddings are trained, as PEFT takes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Ids.
    Ids(Vec<i64>),
    /// Ids for the input embedding, under its name.
    ByModule(BTreeMap<String, Vec<i64>>),
}

impl TokenIndices {
    /// The ids.
    pub(super) fn ids(&self) -> Vec<i64> {
        match self {
            Self::Ids(ids) => ids.clone(),
            Self::ByModule(modules) => modules.values().flatten().copied().collect(),
        }
    }

    /// The names of the modules, where they are named.
    pub(super) fn modules(&self) -> Vec<&str> {
        match self {
            Self::Ids(_) => vec![],
            Self::ByModule(modules) => modules.keys().map(String::as_str).collect(),
        }
    }
}
