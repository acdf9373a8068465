//! The settings of bottleneck adapters, and `adapter_config.json` as AdapterHub's package writes it.

use crate::config::{Fields, is_off, number, read_json};
use crate::{PeftError, Result};
use pt_model::{Architecture, CausalLm};
use pt_tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Where settings that are null come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// Pfeiffer et al. 2020, <https://arxiv.org/abs/2005.00247>: after the MLP, ReLU, a sixteenth of the width.
    #[default]
    SeqBn,
    /// Houlsby et al. 2019, <https://arxiv.org/abs/1902.00751>: after attention and MLP, Swish, a sixteenth.
    DoubleSeqBn,
    /// He et al. 2021, <https://arxiv.org/abs/2110.04366>: parallel to the MLP, ReLU, half the width, scaled by 4.
    ParBn,
}

/// How much narrower the bottleneck is than the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ReductionFactor {
    /// The same in every layer.
    Number(f64),
    /// By layer, counted from 0, and `default` for the others: `{"1": 8, "default": 16}`.
    PerLayer(BTreeMap<String, f64>),
}

/// The factor of an adapter's output.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Scaling {
    /// A fixed one.
    Number(f64),
    /// A trained one.
    Trained(TrainedScaling),
}

/// A trained factor, which starts at one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainedScaling {
    /// One number.
    Learned,
    /// One for each channel.
    Channel,
}

/// What stands between the two projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NonLinearity {
    /// max(x, 0)
    Relu,
    /// x · sigmoid(x), also called SiLU.
    #[serde(alias = "silu")]
    Swish,
    /// GELU.
    Gelu,
    /// GELU by a tanh.
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluNew,
    /// x, below 0 a hundredth of it.
    #[serde(rename = "leakyrelu")]
    LeakyRelu,
    /// tanh.
    Tanh,
    /// 1 / (1 + e⁻ˣ)
    Sigmoid,
    /// x itself.
    Linear,
}

impl NonLinearity {
    pub(super) fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Self::Relu => x.relu(),
            Self::Swish => x.silu(),
            Self::Gelu => x.gelu("none"),
            Self::GeluNew => x.gelu("tanh"),
            Self::LeakyRelu => x.leaky_relu(),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => x.sigmoid(),
            Self::Linear => x.shallow_clone(),
        }
    }
}

/// Where the weights start; biases start at zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InitWeights {
    /// Normal with a deviation of 0.02.
    Bert,
    /// The first uniform in ±1/√hidden_size, the second zero: the model starts as it was.
    MamAdapter,
    /// Normal with a deviation of 0.01, cut off at two of them.
    Houlsby,
}

/// Bottleneck adapters: x + up(f(down(x))) after, or beside, a layer's branches, in AdapterHub's files.
///
/// What is null is as the preset has it. The names are AdapterHub's (`adapters` 1.3.0).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BottleneckConfig {
    /// `seq_bn` (Pfeiffer), `double_seq_bn` (Houlsby) or `par_bn` (parallel).
    pub preset: Preset,
    /// The adapter's name, which stands in the names of its tensors.
    pub name: String,
    /// An adapter after attention.
    pub mh_adapter: Option<bool>,
    /// An adapter after the MLP.
    pub output_adapter: Option<bool>,
    /// The model's width over the bottleneck's: a number, or one for each layer, `{"1": 8, "default": 16}`.
    pub reduction_factor: Option<ReductionFactor>,
    /// relu, swish, gelu, gelu_new, leakyrelu, tanh, sigmoid or linear.
    pub non_linearity: Option<NonLinearity>,
    /// Add the model's residual to what the adapter reads. These models have their norms before the branches, so the
    /// norm that AdapterHub's name speaks of is not applied.
    pub original_ln_before: Option<bool>,
    /// Add the model's residual to what the adapter gives; off, it is lost unless the adapter's own residual has it.
    pub original_ln_after: Option<bool>,
    /// A new layer norm before the adapter.
    pub ln_before: Option<bool>,
    /// A new layer norm after the adapter.
    pub ln_after: Option<bool>,
    /// The adapter's residual is the branch's output without the model's residual.
    pub residual_before_ln: Option<bool>,
    /// Add the adapter's residual before its own norm, with `ln_after`.
    pub adapter_residual_before_ln: Option<bool>,
    /// Beside the branch: the adapter reads the model's residual.
    pub is_parallel: Option<bool>,
    /// Factor of the adapter's output: a number, `learned` or `channel`.
    pub scaling: Option<Scaling>,
    /// `bert`, `mam_adapter` or `houlsby`.
    pub init_weights: Option<InitWeights>,
    /// Layers without an adapter, counted from 0.
    pub leave_out: Vec<i64>,
    /// Chance that an output of the adapter is dropped while training, 0 to below 1.
    pub dropout: f64,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
}

impl Default for BottleneckConfig {
    /// Pfeiffer's.
    fn default() -> Self {
        Self {
            preset: Preset::SeqBn,
            name: "default".into(),
            mh_adapter: None,
            output_adapter: None,
            reduction_factor: None,
            non_linearity: None,
            original_ln_before: None,
            original_ln_after: None,
            ln_before: None,
            ln_after: None,
            residual_before_ln: None,
            adapter_residual_before_ln: None,
            is_parallel: None,
            scaling: None,
            init_weights: None,
            leave_out: vec![],
            dropout: 0.0,
            base_model_name_or_path: None,
        }
    }
}

/// All settings of the network with the preset's filled in.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Resolved {
    pub(super) mh_adapter: bool,
    pub(super) output_adapter: bool,
    pub(super) reduction_factor: ReductionFactor,
    pub(super) non_linearity: NonLinearity,
    pub(super) original_ln_before: bool,
    pub(super) original_ln_after: bool,
    pub(super) ln_before: bool,
    pub(super) ln_after: bool,
    pub(super) residual_before_ln: bool,
    pub(super) adapter_residual_before_ln: bool,
    pub(super) is_parallel: bool,
    pub(super) scaling: Scaling,
    pub(super) init_weights: InitWeights,
}

impl Resolved {
    /// Width of the bottleneck in a layer, as AdapterHub rounds it; none where the map of factors does not say.
    pub(super) fn width(&self, layer: usize, hidden_size: i64) -> Option<i64> {
        let factor = match &self.reduction_factor {
            ReductionFactor::Number(factor) => factor,
            ReductionFactor::PerLayer(factors) => factors.get(&layer.to_string()).or_else(|| factors.get("default"))?,
        };
        Some((floor_division(hidden_size as f64, *factor) as i64).max(1))
    }
}

/// Python's `a // b` of positive numbers: of the exact quotient, where 32 / 0.1 in f64 is 320 and 32 // 0.1 is 319.
fn floor_division(a: f64, b: f64) -> f64 {
    ((a - a % b) / b).round()
}

/// Keys of AdapterHub's configuration for which there is nothing here, unless they are off.
const UNSUPPORTED: [&str; 6] =
    ["architecture", "use_gating", "phm_layer", "inv_adapter", "cross_adapter", "stochastic_depth"];

impl BottleneckConfig {
    /// The settings with the preset's filled in.
    pub(super) fn resolved(&self) -> Resolved {
        let is_parallel = self.preset == Preset::ParBn;
        let is_double = self.preset == Preset::DoubleSeqBn;
        let non_linearity = if is_double { NonLinearity::Swish } else { NonLinearity::Relu };
        let init_weights = if is_parallel { InitWeights::MamAdapter } else { InitWeights::Bert };
        let factor = ReductionFactor::Number(if is_parallel { 2.0 } else { 16.0 });
        Resolved {
            mh_adapter: self.mh_adapter.unwrap_or(is_double),
            output_adapter: self.output_adapter.unwrap_or(true),
            reduction_factor: self.reduction_factor.clone().unwrap_or(factor),
            non_linearity: self.non_linearity.unwrap_or(non_linearity),
            original_ln_before: self.original_ln_before.unwrap_or(self.preset == Preset::SeqBn),
            original_ln_after: self.original_ln_after.unwrap_or(true),
            ln_before: self.ln_before.unwrap_or(false),
            ln_after: self.ln_after.unwrap_or(false),
            residual_before_ln: self.residual_before_ln.unwrap_or(true),
            adapter_residual_before_ln: self.adapter_residual_before_ln.unwrap_or(false),
            is_parallel: self.is_parallel.unwrap_or(is_parallel),
            scaling: self.scaling.unwrap_or(Scaling::Number(if is_parallel { 4.0 } else { 1.0 })),
            init_weights: self.init_weights.unwrap_or(init_weights),
        }
    }

    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        let resolved = self.resolved();
        if !resolved.mh_adapter && !resolved.output_adapter {
            faults.push("`mh_adapter` and `output_adapter` are both off, expected one of them".into());
        }
        let is_factor = |factor: &f64| factor.is_finite() && *factor > 0.0;
        match &resolved.reduction_factor {
            ReductionFactor::Number(factor) if !is_factor(factor) => {
                faults.push(format!("`reduction_factor` is {factor}, expected a number over 0"));
            }
            ReductionFactor::PerLayer(factors) => {
                for (layer, factor) in factors {
                    if !is_factor(factor) || (layer != "default" && layer.parse::<usize>().is_err()) {
                        let expected = "a layer's number or `default`, and a number over 0";
                        faults.push(format!("`reduction_factor` has {layer}: {factor}, expected {expected}"));
                    }
                }
            }
            ReductionFactor::Number(_) => {}
        }
        if let Scaling::Number(scaling) = resolved.scaling
            && !scaling.is_finite()
        {
            faults.push(format!("`scaling` is {scaling}, expected a finite number"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            faults.push(format!("`dropout` is {}, expected 0 to below 1", self.dropout));
        }
        if self.name.is_empty() || self.name.contains('.') {
            faults.push(format!("`name` is \"{}\", expected a name without a dot", self.name));
        }
        if let Some(layer) = self.leave_out.iter().find(|layer| **layer < 0) {
            faults.push(format!("`leave_out` has {layer}, expected layers counted from 0"));
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    /// Whether settings that are a file's `adapter_config.json` are AdapterHub's.
    pub(crate) fn is_adapter_hub(value: &Value) -> bool {
        value.get("peft_type").is_none() && value.get("config").is_some()
    }

    /// Reads AdapterHub's `adapter_config.json`.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for a value of a wrong kind;
    /// [`PeftError::Unsupported`] for features that would change the values; [`PeftError::Config`].
    pub fn from_adapter_hub_file(path: &Path) -> Result<Self> {
        Self::from_adapter_hub_json(path, &read_json(path)?)
    }

    fn from_adapter_hub_json(path: &Path, value: &Value) -> Result<Self> {
        let outer = Fields { path, value };
        let inner = value.get("config").unwrap_or(&Value::Null);
        if !inner.is_object() {
            return Err(outer.wrong("config", inner, "an object with the settings of the adapter"));
        }
        let fields = Fields { path, value: inner };
        let mut features = Vec::new();
        let mut refuse = |key: &str, value: &Value| features.push(format!("`{key}` = {value}"));
        for key in UNSUPPORTED {
            if let Some(value) = inner.get(key).filter(|value| !is_off(value) && value.as_f64() != Some(0.0)) {
                refuse(key, value);
            }
        }
        if let Some(value) = inner.get("residual_before_ln").filter(|value| value.is_string()) {
            // AdapterHub itself fails on it where norms stand before the branches.
            refuse("residual_before_ln", value);
        }
        // Before files had a version, the two GELUs had other names.
        let is_old = value.get("version").is_none();
        let non_linearity = inner.get("non_linearity").map(|value| match value.as_str().map(str::to_lowercase) {
            Some(name) if is_old && name == "gelu" => json!("gelu_new"),
            Some(name) if is_old && name == "gelu_orig" => json!("gelu"),
            Some(name) => json!(name),
            None => value.clone(),
        });
        for (key, value, is_known) in [
            (
                "non_linearity",
                &non_linearity,
                non_linearity.as_ref().is_none_or(|v| NonLinearity::deserialize(v).is_ok()),
            ),
            (
                "init_weights",
                &inner.get("init_weights").cloned(),
                inner.get("init_weights").is_none_or(|v| InitWeights::deserialize(v).is_ok()),
            ),
        ] {
            if let Some(value) = value.as_ref().filter(|_| !is_known) {
                refuse(key, value);
            }
        }
        if !features.is_empty() {
            return Err(PeftError::Unsupported { path: path.into(), features, is_mergeable: false });
        }
        let flag = |key: &str, default| -> Result<Option<bool>> {
            Ok(Some(fields.get(key, "true or false")?.unwrap_or(default)))
        };
        let required = |key: &str| -> Result<Option<bool>> {
            match fields.get(key, "true or false")? {
                Some(value) => Ok(Some(value)),
                None => Err(fields.wrong(key, &Value::Null, "true or false")),
            }
        };
        let config = Self {
            preset: Preset::SeqBn,
            name: outer.get("name", "a name")?.unwrap_or_else(|| "default".into()),
            mh_adapter: required("mh_adapter")?,
            output_adapter: required("output_adapter")?,
            reduction_factor: fields.get("reduction_factor", "a number, or an object of numbers by layer")?,
            non_linearity: non_linearity.and_then(|value| NonLinearity::deserialize(value).ok()),
            original_ln_before: flag("original_ln_before", false)?,
            original_ln_after: flag("original_ln_after", true)?,
            ln_before: flag("ln_before", false)?,
            ln_after: flag("ln_after", false)?,
            residual_before_ln: flag("residual_before_ln", true)?,
            adapter_residual_before_ln: flag("adapter_residual_before_ln", false)?,
            is_parallel: flag("is_parallel", false)?,
            scaling: Some(
                fields.get("scaling", "a number, \"learned\" or \"channel\"")?.unwrap_or(Scaling::Number(1.0)),
            ),
            init_weights: Some(fields.get("init_weights", "a name")?.unwrap_or(InitWeights::Bert)),
            leave_out: fields.get("leave_out", "a list of layers")?.unwrap_or_default(),
            dropout: fields.get("dropout", "a number")?.unwrap_or(0.0),
            base_model_name_or_path: outer.get("model_name", "a name or a path")?,
        };
        for key in ["reduction_factor", "non_linearity"] {
            if inner.get(key).is_none_or(Value::is_null) {
                return Err(fields.wrong(key, &Value::Null, "the adapter's"));
            }
        }
        config.validate().map_err(|error| error.in_file(path))?;
        Ok(config)
    }

    /// The text of AdapterHub's `adapter_config.json` for an adapter of `model`.
    pub(super) fn to_adapter_hub_text(&self, model: &ModelFacts) -> String {
        let resolved = self.resolved();
        let reduction_factor = match &resolved.reduction_factor {
            ReductionFactor::Number(factor) => number(*factor),
            ReductionFactor::PerLayer(factors) => {
                factors.iter().map(|(layer, factor)| (layer.clone(), number(*factor))).collect()
            }
        };
        let value = json!({
            "config": {
                "adapter_residual_before_ln": resolved.adapter_residual_before_ln,
                "cross_adapter": false,
                "dropout": self.dropout,
                "factorized_phm_W": true,
                "factorized_phm_rule": false,
                "hypercomplex_nonlinearity": "glorot-uniform",
                "init_weights": resolved.init_weights,
                "init_weights_seed": null,
                "inv_adapter": null,
                "inv_adapter_reduction_factor": null,
                "is_parallel": resolved.is_parallel,
                "learn_phm": true,
                "leave_out": self.leave_out,
                "ln_after": resolved.ln_after,
                "ln_before": resolved.ln_before,
                "mh_adapter": resolved.mh_adapter,
                "non_linearity": resolved.non_linearity,
                "original_ln_after": resolved.original_ln_after,
                "original_ln_before": resolved.original_ln_before,
                "output_adapter": resolved.output_adapter,
                "phm_bias": true,
                "phm_c_init": "normal",
                "phm_dim": 4,
                "phm_init_range": 0.0001,
                "phm_layer": false,
                "phm_rank": 1,
                "reduction_factor": reduction_factor,
                "residual_before_ln": resolved.residual_before_ln,
                "scaling": resolved.scaling,
                "shared_W_phm": false,
                "shared_phm_rule": true,
                "stochastic_depth": 0.0,
                "use_gating": false,
            },
            "hidden_size": model.hidden_size,
            "model_class": model.model_class,
            "model_name": self.base_model_name_or_path,
            "model_type": model.model_type,
            "name": self.name,
            "version": "adapters.1.3.0",
        });
        // The literal above is in key order, and the map keeps it.
        format!("{value:#}")
    }
}

/// What AdapterHub's file says of the model.
#[derive(Debug, Clone)]
pub(super) struct ModelFacts {
    hidden_size: i64,
    model_class: &'static str,
    model_type: &'static str,
}

impl ModelFacts {
    pub(super) fn of(model: &CausalLm) -> Self {
        let architecture = model.config().architecture;
        let model_class = match architecture {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Gpt2 => "GPT2LMHeadModel",
        };
        Self { hidden_size: model.config().hidden_size, model_class, model_type: architecture.model_type() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(change: impl Fn(&mut Value)) -> Result<BottleneckConfig> {
        let facts = ModelFacts { hidden_size: 32, model_class: "LlamaForCausalLM", model_type: "llama" };
        let mut value: Value = serde_json::from_str(&BottleneckConfig::default().to_adapter_hub_text(&facts)).unwrap();
        change(&mut value);
        BottleneckConfig::from_adapter_hub_json(Path::new("a/adapter_config.json"), &value)
    }

    #[test]
    fn presets_are_those_of_adapter_hub_and_survive_the_file() {
        for preset in [Preset::SeqBn, Preset::DoubleSeqBn, Preset::ParBn] {
            let config = BottleneckConfig { preset, name: "task".into(), ..Default::default() };
            let facts = ModelFacts { hidden_size: 32, model_class: "LlamaForCausalLM", model_type: "llama" };
            let value: Value = serde_json::from_str(&config.to_adapter_hub_text(&facts)).unwrap();
            let read = BottleneckConfig::from_adapter_hub_json(Path::new("a"), &value).unwrap();
            assert_eq!((read.resolved(), read.name.as_str()), (config.resolved(), "task"));
            let inner = value["config"].as_object().unwrap();
            assert!(inner.keys().is_sorted() && value.as_object().unwrap().keys().is_sorted());
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let error = file(|value| {
            value["config"]["use_gating"] = true.into();
            value["config"]["inv_adapter"] = "nice".into();
            value["config"]["stochastic_depth"] = 0.1.into();
            value["config"]["non_linearity"] = "mish".into();
            value["config"]["residual_before_ln"] = "post_add".into();
        });
        let error = error.unwrap_err();
        let PeftError::Unsupported { features, .. } = &error else { panic!("{error}") };
        assert_eq!(features.len(), 5, "{features:?}");
        let text = file(|value| value["config"]["scaling"] = "much".into()).unwrap_err().to_string();
        assert!(text.contains("`scaling` is \"much\", expected a number"), "{text}");
        let text = file(|value| value["config"] = "pfeiffer".into()).unwrap_err().to_string();
        assert!(text.contains("`config` is \"pfeiffer\", expected an object"), "{text}");
    }

    #[test]
    fn widths_are_rounded_down_and_at_least_one() {
        let factors = ReductionFactor::PerLayer([("1".to_string(), 64.0), ("default".into(), 2.5)].into());
        let resolved = BottleneckConfig { reduction_factor: Some(factors), ..Default::default() }.resolved();
        assert_eq!((resolved.width(0, 32), resolved.width(1, 32)), (Some(12), Some(1)));
        let factor = Some(ReductionFactor::Number(0.1));
        let wide = BottleneckConfig { reduction_factor: factor, ..Default::default() };
        assert_eq!(wide.resolved().width(0, 32), Some(319));
    }

    #[test]
    fn an_old_file_has_old_names_of_gelu() {
        let read = |name: &str| {
            file(|value| {
                value["config"]["non_linearity"] = name.into();
                value.as_object_mut().unwrap().remove("version");
            })
        };
        assert_eq!(read("gelu").unwrap().non_linearity, Some(NonLinearity::GeluNew));
        assert_eq!(read("gelu_orig").unwrap().non_linearity, Some(NonLinearity::Gelu));
    }

    #[test]
    fn every_fault_is_listed_at_once() {
        let config = BottleneckConfig {
            output_adapter: Some(false),
            reduction_factor: Some(ReductionFactor::Number(0.0)),
            dropout: 1.0,
            name: "a.b".into(),
            ..Default::default()
        };
        let text = config.validate().unwrap_err().to_string();
        for part in ["both off", "`reduction_factor` is 0", "`dropout` is 1", "`name` is \"a.b\""] {
            assert!(text.contains(part), "{text}");
        }
    }
}
