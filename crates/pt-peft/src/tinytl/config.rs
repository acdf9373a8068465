//! TinyTL's settings and their file.

use crate::config::{Fields, read_json};
use crate::{PeftError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;

/// What TinyTL trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TinytlMode {
    /// Biases alone, as BitFit does by default.
    Bias,
    /// Lite residual branches alone.
    LiteResidual,
    /// Both.
    #[default]
    Both,
}

/// TinyTL (Cai et al. 2020, <https://arxiv.org/abs/2007.11622>): biases and lite residual branches beside frozen blocks,
/// so that little is kept for the backward pass: a frozen linear layer keeps no input.
///
/// A block's branch pools its input two tokens at a time, runs a causal grouped convolution over the pooled tokens, a
/// group norm, ReLU, a 1×1 convolution and a last group norm that starts at zero. The files are this crate's own;
/// Python's PEFT does not read them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TinytlConfig {
    /// `bias`, `lite_residual` or `both`.
    pub mode: TinytlMode,
    /// Pooled tokens that the convolution sees, itself and those before it.
    pub kernel_size: i64,
    /// Groups of the convolution.
    pub groups: i64,
    /// Width of the branch over the model's, rounded to whole groups of channels. The paper's networks have some hundred
    /// channels and take 1; a quarter keeps the branch as small beside a language model.
    pub expand_ratio: f64,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, kept in the file.
    pub revision: Option<String>,
}

impl Default for TinytlConfig {
    /// The paper's kernel of 5 and 2 groups, a quarter of the width.
    fn default() -> Self {
        Self {
            mode: TinytlMode::Both,
            kernel_size: 5,
            groups: 2,
            expand_ratio: 0.25,
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

impl TinytlConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if !(1..=64).contains(&self.kernel_size) {
            faults.push(format!("`kernel_size` is {}, expected 1 to 64", self.kernel_size));
        }
        if self.groups < 1 {
            faults.push(format!("`groups` is {}, expected at least 1", self.groups));
        }
        if !(self.expand_ratio > 0.0 && self.expand_ratio <= 16.0) {
            faults.push(format!("`expand_ratio` is {}, expected over 0 and at most 16", self.expand_ratio));
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    pub(super) fn has_biases(&self) -> bool {
        self.mode != TinytlMode::LiteResidual
    }

    pub(super) fn has_branches(&self) -> bool {
        self.mode != TinytlMode::Bias
    }

    /// Width of the branches in a model: whole groups of `channels_per_group` and of the convolution.
    ///
    /// # Errors
    /// [`PeftError::Config`] where the model's own width is not made of such groups.
    pub(super) fn width(&self, hidden_size: i64, channels_per_group: i64) -> Result<i64> {
        if hidden_size % channels_per_group != 0 || hidden_size % self.groups != 0 {
            let fault = format!(
                "`groups` is {} and norms have groups of {channels_per_group} channels, expected divisors of the \
                 model's {hidden_size}",
                self.groups
            );
            return Err(PeftError::Config { faults: vec![fault] });
        }
        // The least common multiple of both.
        let unit = (1..=self.groups).map(|i| i * channels_per_group).find(|unit| unit % self.groups == 0);
        let unit = unit.unwrap_or(self.groups * channels_per_group);
        Ok(((hidden_size as f64 * self.expand_ratio / unit as f64).round() as i64).max(1) * unit)
    }

    /// Reads `adapter_config.json` with the `peft_type` `TINYTL`, which is this crate's own.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another `peft_type` or a value of a wrong
    /// kind; [`PeftError::Config`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let value = read_json(path)?;
        let fields = Fields { path, value: &value };
        fields.check_method("TINYTL")?;
        let default = Self::default();
        let config = Self {
            mode: fields.get("mode", "\"bias\", \"lite_residual\" or \"both\"")?.unwrap_or(default.mode),
            kernel_size: fields.get("kernel_size", "a whole number")?.unwrap_or(default.kernel_size),
            groups: fields.get("groups", "a whole number")?.unwrap_or(default.groups),
            expand_ratio: fields.get("expand_ratio", "a number")?.unwrap_or(default.expand_ratio),
            base_model_name_or_path: fields.get("base_model_name_or_path", "a name or a path")?,
            revision: fields.get("revision", "a revision")?,
        };
        config.validate().map_err(|error| error.in_file(path))?;
        Ok(config)
    }

    /// The text of `adapter_config.json`, laid out as PEFT's: keys sorted, two spaces of indentation.
    pub fn to_text(&self) -> String {
        let value = json!({
            "base_model_name_or_path": self.base_model_name_or_path,
            "expand_ratio": self.expand_ratio,
            "groups": self.groups,
            "kernel_size": self.kernel_size,
            "mode": self.mode,
            "peft_type": "TINYTL",
            "revision": self.revision,
            "task_type": "CAUSAL_LM",
        });
        format!("{value:#}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_whole_groups() {
        let config = TinytlConfig::default();
        assert_eq!((config.width(576, 8).unwrap(), config.width(32, 8).unwrap()), (144, 8));
        assert_eq!(TinytlConfig { groups: 3, ..config.clone() }.width(576, 8).unwrap(), 144);
        assert_eq!(TinytlConfig { groups: 12, ..config.clone() }.width(576, 8).unwrap(), 144);
        assert!(config.width(36, 8).unwrap_err().to_string().contains("the model's 36"));
    }

    #[test]
    fn every_fault_is_listed_at_once() {
        let config = TinytlConfig { kernel_size: 0, groups: 0, expand_ratio: f64::NAN, ..Default::default() };
        let text = config.validate().unwrap_err().to_string();
        for part in ["`kernel_size` is 0", "`groups` is 0", "`expand_ratio` is NaN"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
