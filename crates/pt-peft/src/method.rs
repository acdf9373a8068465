//! Every method by its name: settings, a new adapter, an adapter from a folder.

use crate::config::read_json;
use crate::files::{ADAPTER_HUB, CONFIG_FILE, TENSOR_FILE, check_folder, check_folder_as, check_has_settings};
use crate::{
    Adapter, BitDeltaAdapter, BitDeltaConfig, BitfitAdapter, BitfitConfig, BottleneckAdapter, BottleneckConfig,
    Ia3Adapter, Ia3Config, LoraAdapter, LoraConfig, PeftError, PrefixTuningAdapter, PrefixTuningConfig,
    PromptTuningAdapter, PromptTuningConfig, Result, TinytlAdapter, TinytlConfig, TinytlMode,
};
use pt_model::{CausalLm, Tokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;
use std::rc::Rc;

/// A parameter-efficient method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A low-rank update of linear layers, with DoRA and its other variants.
    #[default]
    Lora,
    /// Vectors that scale what linear layers give or read.
    Ia3,
    /// Biases alone.
    Bitfit,
    /// Small networks after or beside attention and MLP.
    Bottleneck,
    /// Trained embeddings before every sequence.
    PromptTuning,
    /// Trained keys and values before every sequence, in every layer.
    PrefixTuning,
    /// Biases and lite residual branches, for which little is kept for the backward pass.
    Tinytl,
    /// A fine-tune as one bit a weight: made of two models, not trained from nothing.
    #[serde(skip)]
    BitDelta,
}

impl Method {
    /// Every method that can be trained from nothing.
    pub const ALL: [Self; 7] =
        [Self::Lora, Self::Ia3, Self::Bitfit, Self::Bottleneck, Self::PromptTuning, Self::PrefixTuning, Self::Tinytl];

    /// Whether it is, as its defaults have it, a change of weights, so that it can be merged into a model; of other settings
    /// [`MethodConfig::is_mergeable`] says it.
    pub fn is_mergeable(self) -> bool {
        matches!(self, Self::Lora | Self::Ia3 | Self::Bitfit | Self::BitDelta)
    }

    /// Its name in configurations: the section of its settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Ia3 => "ia3",
            Self::Bitfit => "bitfit",
            Self::Bottleneck => "bottleneck",
            Self::PromptTuning => "prompt_tuning",
            Self::PrefixTuning => "prefix_tuning",
            Self::Tinytl => "tinytl",
            Self::BitDelta => "bitdelta",
        }
    }
}

/// A method with its settings.
#[derive(Debug, Clone, PartialEq)]
pub enum MethodConfig {
    /// See [`LoraConfig`].
    Lora(LoraConfig),
    /// See [`Ia3Config`].
    Ia3(Ia3Config),
    /// See [`BitfitConfig`].
    Bitfit(BitfitConfig),
    /// See [`BottleneckConfig`].
    Bottleneck(BottleneckConfig),
    /// See [`PromptTuningConfig`].
    PromptTuning(PromptTuningConfig),
    /// See [`PrefixTuningConfig`].
    PrefixTuning(PrefixTuningConfig),
    /// See [`TinytlConfig`].
    Tinytl(TinytlConfig),
    /// See [`BitDeltaConfig`].
    BitDelta(BitDeltaConfig),
}

impl MethodConfig {
    /// Which method it is.
    pub fn method(&self) -> Method {
        match self {
            Self::Lora(_) => Method::Lora,
            Self::Ia3(_) => Method::Ia3,
            Self::Bitfit(_) => Method::Bitfit,
            Self::Bottleneck(_) => Method::Bottleneck,
            Self::PromptTuning(_) => Method::PromptTuning,
            Self::PrefixTuning(_) => Method::PrefixTuning,
            Self::Tinytl(_) => Method::Tinytl,
            Self::BitDelta(_) => Method::BitDelta,
        }
    }

    /// Whether it is a change of weights, so that it can be merged into a model.
    pub fn is_mergeable(&self) -> bool {
        match self {
            Self::Tinytl(config) => config.mode == TinytlMode::Bias,
            other => other.method().is_mergeable(),
        }
    }

    /// That a folder holds the tensors of an adapter of this method.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`], for a pickle with the way to convert it.
    pub fn check_folder(&self, folder: &Path) -> Result<()> {
        match self {
            Self::Bottleneck(_) => check_folder_as(folder, &ADAPTER_HUB),
            _ => check_folder(folder),
        }
    }

    /// Name of the file of tensors in an adapter's folder.
    pub fn tensor_file(&self) -> &'static str {
        match self {
            Self::Bottleneck(_) => ADAPTER_HUB.tensor_file,
            _ => TENSOR_FILE,
        }
    }

    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Lora(config) => config.validate(),
            Self::Ia3(config) => config.validate(),
            Self::Bitfit(config) => config.validate(),
            Self::Bottleneck(config) => config.validate(),
            Self::PromptTuning(config) => config.validate(),
            Self::PrefixTuning(config) => config.validate(),
            Self::Tinytl(config) => config.validate(),
            Self::BitDelta(_) => Ok(()),
        }
    }

    /// The settings of the adapter in a folder.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`], [`PeftError::Read`], [`PeftError::Json`], [`PeftError::Field`] for a method that is
    /// not known, and those of the method's own settings.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        check_has_settings(folder)?;
        let path = folder.join(CONFIG_FILE);
        let value = read_json(&path)?;
        // AdapterHub's file has the name of PEFT's.
        if BottleneckConfig::is_adapter_hub(&value) {
            return Ok(Self::Bottleneck(BottleneckConfig::from_adapter_hub_file(&path)?));
        }
        let found = value.get("peft_type").cloned().unwrap_or_default();
        match found.as_str() {
            Some("LORA") => Ok(Self::Lora(LoraConfig::from_peft_file(&path)?)),
            Some("IA3") => Ok(Self::Ia3(Ia3Config::from_peft_file(&path)?)),
            Some("TINYTL") => Ok(Self::Tinytl(TinytlConfig::from_file(&path)?)),
            Some("BITFIT") => Ok(Self::Bitfit(BitfitConfig::from_file(&path)?)),
            Some("PROMPT_TUNING") => Ok(Self::PromptTuning(PromptTuningConfig::from_peft_file(&path)?)),
            Some("PREFIX_TUNING") => Ok(Self::PrefixTuning(PrefixTuningConfig::from_peft_file(&path)?)),
            Some("BITDELTA") => Ok(Self::BitDelta(BitDeltaConfig::from_file(&path)?)),
            _ => Err(PeftError::Field {
                path,
                field: "peft_type".into(),
                found: if found.is_null() { "missing".into() } else { found.to_string() },
                expected: "a method that is known here: \"LORA\", \"IA3\", \"BITFIT\", \"TINYTL\", \"PROMPT_TUNING\", \
                           \"PREFIX_TUNING\" or \"BITDELTA\""
                    .into(),
            }),
        }
    }

    /// The settings as JSON, for people to read.
    ///
    /// # Errors
    /// [`PeftError::Json`], which no settings that were read or validated give.
    pub fn settings(&self) -> Result<Value> {
        let value = match self {
            Self::Lora(config) => serde_json::to_value(config),
            Self::Ia3(config) => serde_json::to_value(config),
            Self::Bitfit(config) => serde_json::to_value(config),
            Self::Bottleneck(config) => serde_json::to_value(config),
            Self::PromptTuning(config) => serde_json::to_value(config),
            Self::PrefixTuning(config) => serde_json::to_value(config),
            Self::Tinytl(config) => serde_json::to_value(config),
            Self::BitDelta(config) => serde_json::to_value(config),
        };
        value.map_err(|source| PeftError::Json { path: CONFIG_FILE.into(), source })
    }

    /// Notes the base model's name, which adapter files carry, unless the settings have one.
    pub fn note_base_model(&mut self, name: &str) {
        let field = match self {
            Self::Lora(config) => &mut config.base_model_name_or_path,
            Self::Ia3(config) => &mut config.base_model_name_or_path,
            Self::Bitfit(config) => &mut config.base_model_name_or_path,
            Self::Bottleneck(config) => &mut config.base_model_name_or_path,
            Self::PromptTuning(config) => &mut config.base_model_name_or_path,
            Self::PrefixTuning(config) => &mut config.base_model_name_or_path,
            Self::Tinytl(config) => &mut config.base_model_name_or_path,
            Self::BitDelta(config) => &mut config.base_model_name_or_path,
        };
        field.get_or_insert_with(|| name.into());
    }

    /// Virtual tokens that stand before every sequence and take room in the model's context.
    pub fn num_virtual_tokens(&self) -> usize {
        match self {
            Self::PromptTuning(config) => config.num_virtual_tokens.max(0) as usize,
            Self::PrefixTuning(config) => config.num_virtual_tokens.max(0) as usize,
            _ => 0,
        }
    }

    /// Whether training can go on from the adapter in a folder with these settings.
    ///
    /// # Errors
    /// [`PeftError::State`], and why, where the folder does not hold what was trained.
    pub fn check_can_go_on(&self, folder: &Path) -> Result<()> {
        match self {
            Self::PrefixTuning(config) if config.prefix_projection => Err(PeftError::State(format!(
                "{}: the prefix was trained through a projection, and the file holds what that gave, not the projection: \
                 training cannot go on from it. Resume the run that made it, or train a new prefix",
                folder.display()
            ))),
            Self::BitDelta(_) => Err(PeftError::State(format!(
                "{}: a 1-bit delta, whose scales are trained by `pt delta distill`",
                folder.display()
            ))),
            _ => Ok(()),
        }
    }

    /// A new adapter for a model. Methods that start from a text need the model's tokenizer.
    ///
    /// # Errors
    /// Those of the method.
    pub fn create(&self, model: &CausalLm, tokenizer: Option<&Tokenizer>, seed: u64) -> Result<Rc<dyn Adapter>> {
        Ok(match self {
            Self::Lora(config) => Rc::new(LoraAdapter::new(config.clone(), model, seed)?),
            Self::Ia3(config) => Rc::new(Ia3Adapter::new(config.clone(), model)?),
            Self::Bitfit(config) => Rc::new(BitfitAdapter::new(config.clone(), model)?),
            Self::Bottleneck(config) => Rc::new(BottleneckAdapter::new(config.clone(), model, seed)?),
            Self::PromptTuning(config) => Rc::new(PromptTuningAdapter::new(config.clone(), model, tokenizer, seed)?),
            Self::PrefixTuning(config) => Rc::new(PrefixTuningAdapter::new(config.clone(), model, seed)?),
            Self::Tinytl(config) => Rc::new(TinytlAdapter::new(config.clone(), model, seed)?),
            Self::BitDelta(_) => {
                return Err(PeftError::State(
                    "a 1-bit delta is made of a base and its fine-tune: `pt delta compress`".into(),
                ));
            }
        })
    }
}

/// Loads an adapter of whatever method a folder holds.
///
/// # Errors
/// As [`MethodConfig::from_folder`], and those of the method's own `load`.
pub fn load_adapter(folder: &Path, model: &CausalLm) -> Result<Rc<dyn Adapter>> {
    let load = |method| -> Result<Rc<dyn Adapter>> {
        Ok(match method {
            Method::Lora => Rc::new(LoraAdapter::load(folder, model)?),
            Method::Ia3 => Rc::new(Ia3Adapter::load(folder, model)?),
            Method::Bitfit => Rc::new(BitfitAdapter::load(folder, model)?),
            Method::Bottleneck => Rc::new(BottleneckAdapter::load(folder, model)?),
            Method::PromptTuning => Rc::new(PromptTuningAdapter::load(folder, model)?),
            Method::PrefixTuning => Rc::new(PrefixTuningAdapter::load(folder, model)?),
            Method::Tinytl => Rc::new(TinytlAdapter::load(folder, model)?),
            Method::BitDelta => Rc::new(BitDeltaAdapter::load(folder, model)?),
        })
    };
    load(MethodConfig::from_folder(folder)?.method()).map_err(|error| error.in_file(&folder.join(CONFIG_FILE)))
}
