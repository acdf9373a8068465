//! Settings of a 1-bit delta.

use crate::config::{Fields, read_json};
use crate::{PeftError, Result};
use pt_tensor::ScaleAxis;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleSharing {
    /// The whole matrix, as in the paper.
    #[default]
    Matrix,
    /// A row: one scale an output.
    Row,
    /// 128 weights of a row.
    Group128,
}

impl From<ScaleSharing> for ScaleAxis {
    fn from(sharing: ScaleSharing) -> Self {
        match sharing {
            ScaleSharing::Matrix => Self::Matrix,
            ScaleSharing::Row => Self::Row,
            ScaleSharing::Group128 => Self::Group128,
        }
    }
}

/// Which of the parameters that get no signs (embeddings, norms, the output layer, biases) a delta carries in full
/// precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeptWhole {
    /// Those that differ from the base's: nothing is lost, and a fine-tune that left them alone pays nothing.
    #[default]
    Changed,
    /// All, as BitDelta's script does.
    All,
    /// None: the base's are used.
    None,
}

/// A 1-bit delta: `fine_tuned ≈ base + delta_scale · signs` in each linear layer of the decoder blocks (BitDelta, Liu et
/// al. 2024, <https://arxiv.org/abs/2402.10193>).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BitDeltaConfig {
    /// Weights that share a scale: `matrix`, `row` or `group128`.
    pub scale_sharing: ScaleSharing,
    /// Parameters without signs that are carried whole: `changed`, `all` or `none`.
    pub kept_whole: KeptWhole,
    /// Steps of distillation that trained the scales; 0 where they are the means of |fine_tuned − base|.
    pub distilled_steps: u64,
    /// The base model's name.
    pub base_model_name_or_path: Option<String>,
}

/// What `adapter_config.json` calls the method. PEFT has no such one.
const PEFT_TYPE: &str = "BITDELTA";

impl BitDeltaConfig {
    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another method or a value that cannot be.
    pub fn from_file(path: &Path) -> Result<Self> {
        let value = read_json(path)?;
        Fields { path, value: &value }.check_method(PEFT_TYPE)?;
        let known = ["peft_type", "scale_sharing", "kept_whole", "distilled_steps", "base_model_name_or_path"];
        let unknown = value.as_object().and_then(|fields| fields.keys().find(|key| !known.contains(&key.as_str())));
        if let Some(field) = unknown.cloned() {
            let found = value[&field].to_string();
            let expected = "no such field: was the delta made by a newer release?".into();
            return Err(PeftError::Field { path: path.into(), field, found, expected });
        }
        let fields = Fields { path, value: &value };
        Ok(Self {
            scale_sharing: fields.get("scale_sharing", "\"matrix\", \"row\" or \"group128\"")?.unwrap_or_default(),
            kept_whole: fields.get("kept_whole", "\"changed\", \"all\" or \"none\"")?.unwrap_or_default(),
            distilled_steps: fields.get("distilled_steps", "a number of steps")?.unwrap_or_default(),
            base_model_name_or_path: fields.get("base_model_name_or_path", "a text")?,
        })
    }

    /// The text of `adapter_config.json`.
    pub(super) fn to_text(&self) -> Result<String> {
        let json = |source| PeftError::Json { path: crate::CONFIG_FILE.into(), source };
        let mut value = serde_json::to_value(self).map_err(json)?;
        value["peft_type"] = PEFT_TYPE.into();
        Ok(format!("{}\n", serde_json::to_string_pretty(&value).map_err(json)?))
    }
}
