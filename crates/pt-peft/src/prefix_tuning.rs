//! Prefix tuning: trained keys and values of virtual tokens, in every layer, before every sequence.

use crate::adapter::State;
use crate::config::{Fields, read_json};
use crate::files::{self, Card, Entry};
use crate::init::{normal, uniform};
use crate::virtual_tokens::{self, Sizes, TENSOR, check_keys, check_room, count_fault, peft_text, zeros};
use crate::{Adapter, PeftError, Result};
use pt_model::{CausalLm, Sites, VirtualTokens};
use pt_tensor::{Tensor, no_grad};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// Where a prefix starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PrefixInit {
    /// Keys and values drawn from N(0, 1); with a projection, its embedding from N(0, 1) and its linear layers uniform
    /// in ±1/√in_features.
    #[default]
    Random,
    /// Keys and values of zero. Not the bare model: attention goes to them as well, and adds nothing there.
    Zero,
}

/// Prefix tuning (Li & Liang 2021, <https://arxiv.org/abs/2101.00190>): in every layer attention reads \[P_k; K\] and
/// \[P_v; V\] for the keys K and values V of a sequence, and only P is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixTuningConfig {
    /// Virtual tokens before every sequence, at least 1; they take room in the context.
    pub num_virtual_tokens: i64,
    /// Compute the prefix from an embedding of each virtual token by two linear layers with a tanh between them, which
    /// steadies training. The file holds what they give: training cannot go on from it, other than by `pt sft --resume`.
    pub prefix_projection: bool,
    /// Width between the two linear layers; null for that of a layer's keys.
    pub encoder_hidden_size: Option<i64>,
    /// Where it starts: `random` or `zero`.
    pub init: PrefixInit,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, kept in the file.
    pub revision: Option<String>,
}

impl Default for PrefixTuningConfig {
    /// 20 virtual tokens without a projection.
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            prefix_projection: false,
            encoder_hidden_size: None,
            init: PrefixInit::Random,
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

impl PrefixTuningConfig {
    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        let mut faults: Vec<String> = count_fault(self.num_virtual_tokens).into_iter().collect();
        if let Some(size) = self.encoder_hidden_size.filter(|&size| size < 1) {
            faults.push(format!("`encoder_hidden_size` is {size}, expected at least 1"));
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    /// Reads PEFT's `adapter_config.json`.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another `peft_type` or a value of a wrong
    /// kind; [`PeftError::Unsupported`] for modules that are trained whole; [`PeftError::Config`].
    pub fn from_peft_file(path: &Path) -> Result<Self> {
        Self::from_peft_json(path, &read_json(path)?)
    }

    fn from_peft_json(path: &Path, value: &Value) -> Result<Self> {
        let fields = Fields { path, value };
        fields.check_method("PREFIX_TUNING")?;
        check_keys(&fields)?;
        let words = "\"zero\" or null";
        let init = match fields.get::<String>("init_weights", words)?.as_deref() {
            None => PrefixInit::Random,
            Some("zero") => PrefixInit::Zero,
            Some(other) => return Err(fields.wrong("init_weights", &json!(other), words)),
        };
        let missing = || fields.wrong("num_virtual_tokens", &Value::Null, "a whole number");
        let config = Self {
            num_virtual_tokens: fields.get("num_virtual_tokens", "a whole number")?.ok_or_else(missing)?,
            prefix_projection: fields.get("prefix_projection", "true or false")?.unwrap_or(false),
            encoder_hidden_size: fields.get("encoder_hidden_size", "a whole number")?,
            init,
            base_model_name_or_path: fields.get("base_model_name_or_path", "a name or a path")?,
            revision: fields.get("revision", "a revision")?,
        };
        config.validate().map_err(|error| error.in_file(path))?;
        Ok(config)
    }

    /// The text of PEFT's `adapter_config.json` for a model.
    pub fn to_peft_text(&self, model: &CausalLm) -> String {
        self.text(sizes(model))
    }

    fn text(&self, sizes: Sizes) -> String {
        let own = json!({
            "base_model_name_or_path": self.base_model_name_or_path,
            "encoder_hidden_size": self.hidden_size(sizes),
            "init_weights": if self.init == PrefixInit::Zero { json!("zero") } else { Value::Null },
            "prefix_projection": self.prefix_projection,
            "revision": self.revision,
        });
        peft_text("PREFIX_TUNING", self.num_virtual_tokens, sizes, own)
    }

    fn hidden_size(&self, sizes: Sizes) -> i64 {
        self.encoder_hidden_size.unwrap_or(sizes.token_dim)
    }
}

/// Of the keys, which under grouped-query attention have fewer heads than the queries.
fn sizes(model: &CausalLm) -> Sizes {
    let config = model.config();
    Sizes {
        token_dim: config.head_dim * config.num_kv_heads,
        num_attention_heads: config.num_kv_heads,
        num_layers: config.num_layers,
    }
}

impl Sizes {
    /// Values of one virtual token: keys and values of all layers.
    fn width(self) -> i64 {
        self.num_layers * 2 * self.token_dim
    }
}

/// What is trained; all leaves in f32.
#[derive(Debug)]
enum Prefix {
    /// The keys and values themselves, `[num_virtual_tokens, width]`.
    Plain(Tensor),
    /// P = tanh(E·W₁ᵀ + b₁)·W₂ᵀ + b₂.
    Projected {
        /// E, `[num_virtual_tokens, token_dim]`.
        embedding: Tensor,
        /// W₁ and b₁, `[encoder_hidden_size, token_dim]`.
        first: (Tensor, Tensor),
        /// W₂ and b₂, `[width, encoder_hidden_size]`.
        second: (Tensor, Tensor),
    },
}

impl Prefix {
    /// `[num_virtual_tokens, width]`.
    fn rows(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Plain(rows) => rows.shallow_clone(),
            Self::Projected { embedding, first, second } => {
                embedding.f_linear(&first.0, Some(&first.1))?.tanh().f_linear(&second.0, Some(&second.1))?
            }
        })
    }

    /// By the names of PEFT's encoder.
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let named = |name: &str, tensor: &Tensor| (name.to_string(), tensor.shallow_clone());
        match self {
            Self::Plain(rows) => vec![named(TENSOR, rows)],
            Self::Projected { embedding, first, second } => vec![
                named("embedding.weight", embedding),
                named("transform.0.weight", &first.0),
                named("transform.0.bias", &first.1),
                named("transform.2.weight", &second.0),
                named("transform.2.bias", &second.1),
            ],
        }
    }
}

/// Prefix tuning of a model.
///
/// The prefix is the same for all sequences of a batch: it is computed once and stands once in each layer's keys and
/// values, not rotated. New, it is not the bare model, whatever `init` says.
///
/// Loaded, a projected prefix is the keys and values that its file holds: the projection is gone.
#[derive(Debug)]
pub struct PrefixTuningAdapter {
    config: PrefixTuningConfig,
    sizes: Sizes,
    prefix: Prefix,
    state: State,
}

impl PrefixTuningAdapter {
    /// A new prefix for a model.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be; [`PeftError::Tensor`] when there is no memory for its size.
    pub fn new(config: PrefixTuningConfig, model: &CausalLm, seed: u64) -> Result<Self> {
        config.validate()?;
        check_room(config.num_virtual_tokens, model)?;
        let (count, sizes) = (config.num_virtual_tokens, sizes(model));
        let (width, hidden) = (sizes.width(), config.hidden_size(sizes));
        let prefix = if config.prefix_projection {
            let linear = |output: i64, input: i64| -> Result<(Tensor, Tensor)> {
                Ok((zeros(&[output, input], model)?, zeros(&[output], model)?))
            };
            Prefix::Projected {
                embedding: zeros(&[count, sizes.token_dim], model)?,
                first: linear(hidden, sizes.token_dim)?,
                second: linear(width, hidden)?,
            }
        } else {
            Prefix::Plain(zeros(&[count, width], model)?)
        };
        for (name, tensor) in prefix.parameters() {
            let values = match name.as_str() {
                // What gives the prefix: with zeros there, it is zero.
                TENSOR | "transform.2.weight" | "transform.2.bias" if config.init == PrefixInit::Zero => continue,
                TENSOR | "embedding.weight" => normal(seed, &name, tensor.numel(), 1.0, None),
                _ => {
                    let input = if name.starts_with("transform.0") { sizes.token_dim } else { hidden };
                    uniform(seed, &name, tensor.numel(), 1.0 / (input as f32).sqrt())
                }
            };
            no_grad(|| tensor.shallow_clone().f_copy_(&Tensor::from_slice(&values).view_as(&tensor)))?;
        }
        Ok(Self { config, sizes, prefix, state: State::new() })
    }

    /// Loads a prefix that PEFT or [`Adapter::save`] wrote, one without a projection even where it was trained through
    /// one.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without an adapter; those of [`PrefixTuningConfig::from_peft_file`];
    /// [`PeftError::Keys`] with the difference; [`PeftError::Config`] when the model's context is too short for it.
    pub fn load(folder: &Path, model: &CausalLm) -> Result<Self> {
        files::check_folder(folder)?;
        let config = PrefixTuningConfig::from_peft_file(&folder.join(files::CONFIG_FILE))?;
        let sizes = sizes(model);
        let rows = virtual_tokens::read(folder, config.num_virtual_tokens, sizes.width(), model)?;
        Ok(Self { config, sizes, prefix: Prefix::Plain(rows), state: State::new() })
    }

    /// The settings.
    pub fn config(&self) -> &PrefixTuningConfig {
        &self.config
    }
}

impl Sites for PrefixTuningAdapter {
    fn num_virtual_tokens(&self) -> usize {
        if self.state.is_live() { self.config.num_virtual_tokens as usize } else { 0 }
    }

    fn virtual_tokens(&self) -> pt_model::Result<Option<VirtualTokens>> {
        if !self.state.is_live() {
            return Ok(None);
        }
        let Sizes { token_dim, num_attention_heads: heads, num_layers } = self.sizes;
        let rows = self.prefix.rows().map_err(crate::error::to_model)?;
        let parts = rows.f_view([self.config.num_virtual_tokens, 2 * num_layers, heads, token_dim / heads])?;
        let layer = |index: i64| (parts.select(1, 2 * index), parts.select(1, 2 * index + 1)); // [n, heads, head_dim]
        Ok(Some(VirtualTokens::KeysValues((0..num_layers).map(layer).collect())))
    }
}

impl Adapter for PrefixTuningAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.prefix.parameters()
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.state.is_enabled.set(is_enabled);
    }

    fn is_saved_converted(&self) -> bool {
        matches!(self.prefix, Prefix::Projected { .. })
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        vec![TENSOR]
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let projected = if self.config.prefix_projection { ", trained through a projection" } else { "" };
        let rows = no_grad(|| self.prefix.rows())?;
        files::save(
            folder,
            &self.config.text(self.sizes),
            "",
            [Entry::new(TENSOR.into(), &rows)],
            &Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "prefix-tuning",
                title: "Prefix tuning",
                settings: format!("{} virtual tokens{projected}", self.config.num_virtual_tokens),
            },
        )
    }

    fn merge_into(&self, _model: &mut CausalLm) -> Result<()> {
        let reason = "its keys and values stand before every sequence and are no change of weights";
        Err(PeftError::NotMergeable { method: "prefix tuning", reason })
    }

    fn unmerge_from(&self, _model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut [])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { token_dim: 8, num_attention_heads: 2, num_layers: 3 };

    #[test]
    fn a_written_config_reads_as_the_same() {
        let config = PrefixTuningConfig {
            num_virtual_tokens: 7,
            prefix_projection: true,
            encoder_hidden_size: Some(512),
            init: PrefixInit::Zero,
            base_model_name_or_path: Some("org/model".into()),
            revision: Some("main".into()),
        };
        let value: Value = serde_json::from_str(&config.text(SIZES)).unwrap();
        assert!(value.as_object().unwrap().keys().is_sorted(), "{value}");
        assert_eq!(PrefixTuningConfig::from_peft_json(Path::new("a"), &value).unwrap(), config);
    }

    #[test]
    fn faults_and_wrong_values_are_named() {
        let config = PrefixTuningConfig { num_virtual_tokens: 0, encoder_hidden_size: Some(0), ..Default::default() };
        let text = config.validate().unwrap_err().to_string();
        assert!(text.contains("`num_virtual_tokens` is 0") && text.contains("`encoder_hidden_size` is 0"), "{text}");
        let file = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "init_weights": "one"});
        let text = PrefixTuningConfig::from_peft_json(Path::new("a"), &file).unwrap_err().to_string();
        assert_eq!(text, "a: `init_weights` is \"one\", expected \"zero\" or null");
    }
}
