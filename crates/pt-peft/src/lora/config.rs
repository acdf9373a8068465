//! LoRA's settings, and `adapter_config.json` as PEFT 0.21 writes it.

use crate::config::{Fields, Modules, OneOrMany, is_off, number, read_json};
use crate::target::Targets;
use crate::{PeftError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// LoRA (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>): y = x·Wᵀ + scaling · dropout(x)·Aᵀ·Bᵀ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the update, at least 1.
    #[serde(alias = "r")]
    pub rank: i64,
    /// The update is scaled by `lora_alpha / rank`.
    pub lora_alpha: f64,
    /// Chance that an input of the update is dropped while training, 0 to below 1.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / sqrt(rank)` instead (Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>).
    pub use_rslora: bool,
    /// Layers that get an update: a list of names, a regular expression, or `all-linear`.
    pub target_modules: Modules,
    /// Layers that get none, though `target_modules` names them.
    pub exclude_modules: Option<Modules>,
    /// Only in these decoder layers, counted from 0; empty means all.
    pub layers_to_transform: Vec<i64>,
    /// Names of the list that `layers_to_transform` counts in; empty means any.
    pub layers_pattern: Vec<String>,
    /// Another rank for some layers: a regular expression for the end of the path, and the rank.
    pub rank_pattern: BTreeMap<String, i64>,
    /// Another alpha for some layers.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Modules that are trained whole and saved beside the update, by the end of their path: `lm_head`.
    pub modules_to_save: Vec<String>,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, kept in the file.
    pub revision: Option<String>,
}

impl Default for LoraConfig {
    /// Rank 16, alpha 32, every linear layer.
    fn default() -> Self {
        Self {
            rank: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: Modules::Pattern("all-linear".into()),
            exclude_modules: None,
            layers_to_transform: vec![],
            layers_pattern: vec![],
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules_to_save: vec![],
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

/// Keys of PEFT's file that change values and that this crate does not have, with the values that leave them off.
const UNSUPPORTED: [&str; 13] = [
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "ensure_weight_tying",
];

/// Starting points that only set A and B, which the file then overwrites. Others (PiSSA, OLoRA, CorDA, LoftQ,
/// LoRA-GA) change the base weights too.
const HARMLESS_INITS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

impl LoraConfig {
    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if self.rank < 1 {
            faults.push(format!("`rank` is {}, expected at least 1", self.rank));
        }
        if !self.lora_alpha.is_finite() {
            faults.push(format!("`lora_alpha` is {}, expected a finite number", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            faults.push(format!("`lora_dropout` is {}, expected 0 to below 1", self.lora_dropout));
        }
        for (pattern, rank) in self.rank_pattern.iter().filter(|(_, rank)| **rank < 1) {
            faults.push(format!("`rank_pattern.{pattern}` is {rank}, expected at least 1"));
        }
        for (pattern, alpha) in self.alpha_pattern.iter().filter(|(_, alpha)| !alpha.is_finite()) {
            faults.push(format!("`alpha_pattern.{pattern}` is {alpha}, expected a finite number"));
        }
        match &self.target_modules {
            Modules::Names(names) if names.is_empty() && self.modules_to_save.is_empty() => {
                faults.push("`target_modules` is empty, expected names, a pattern or `all-linear`".into());
            }
            Modules::Pattern(_) if !self.target_modules.is_all_linear() && !self.layers_to_transform.is_empty() => {
                faults.push("`layers_to_transform` needs `target_modules` as a list of names, found a pattern".into());
            }
            _ => {}
        }
        if let Some(layer) = self.layers_to_transform.iter().find(|layer| **layer < 0) {
            faults.push(format!("`layers_to_transform` has {layer}, expected layers counted from 0"));
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_empty() {
            faults.push("`layers_pattern` is set without `layers_to_transform`, expected both".into());
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    /// What it goes on.
    pub fn targets(&self) -> Targets<'_> {
        Targets {
            target_modules: &self.target_modules,
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: &self.layers_to_transform,
            layers_pattern: &self.layers_pattern,
            modules_to_save: &self.modules_to_save,
        }
    }

    /// The settings in a sentence's end, for the model card.
    pub(super) fn in_words(&self) -> String {
        let rslora = if self.use_rslora { ", rank-stabilised" } else { "" };
        format!("rank {}, alpha {}{rslora}", self.rank, self.lora_alpha)
    }

    /// Factor of the update for a rank and an alpha.
    pub fn scaling(&self, rank: i64, lora_alpha: f64) -> f64 {
        if self.use_rslora { lora_alpha / (rank as f64).sqrt() } else { lora_alpha / rank as f64 }
    }

    /// Reads PEFT's `adapter_config.json`; keys that PEFT leaves out get PEFT's defaults (rank 8, alpha 8), and keys
    /// that do not bear on LoRA's values are passed over.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another `peft_type` or a value of a wrong
    /// kind; [`PeftError::Unsupported`] for features that would change the values; [`PeftError::Config`].
    pub fn from_peft_file(path: &Path) -> Result<Self> {
        Self::from_peft_json(path, &read_json(path)?)
    }

    fn from_peft_json(path: &Path, value: &Value) -> Result<Self> {
        let fields = Fields { path, value };
        fields.check_method("LORA")?;
        let mut features: Vec<String> = UNSUPPORTED
            .iter()
            .filter_map(|&key| value.get(key).filter(|v| !is_off(v)).map(|v| format!("`{key}` = {v}")))
            .collect();
        if let Some(bias) = value.get("bias").filter(|v| !is_off(v) && v.as_str() != Some("none")) {
            features.push(format!("`bias` = {bias}"));
        }
        if let Some(init) = value.get("init_lora_weights").and_then(Value::as_str)
            && !HARMLESS_INITS.contains(&init)
        {
            features.push(format!("`init_lora_weights` = \"{init}\""));
        }
        if !features.is_empty() {
            return Err(PeftError::Unsupported { path: path.into(), features });
        }
        let layers: Option<OneOrMany<i64>> = fields.get("layers_to_transform", "a number or a list of numbers")?;
        let pattern: Option<OneOrMany<String>> = fields.get("layers_pattern", "a name or a list of names")?;
        let modules = "a list of names, or a pattern";
        let config = Self {
            rank: fields.get("r", "a whole number")?.unwrap_or(8),
            lora_alpha: fields.get("lora_alpha", "a number")?.unwrap_or(8.0),
            lora_dropout: fields.get("lora_dropout", "a number")?.unwrap_or(0.0),
            use_rslora: fields.get("use_rslora", "true or false")?.unwrap_or(false),
            target_modules: fields.get("target_modules", modules)?.unwrap_or(Modules::Names(vec![])),
            exclude_modules: fields.get("exclude_modules", modules)?,
            layers_to_transform: layers.map(OneOrMany::into_vec).unwrap_or_default(),
            layers_pattern: pattern.map(OneOrMany::into_vec).unwrap_or_default(),
            rank_pattern: fields.get("rank_pattern", "an object of ranks")?.unwrap_or_default(),
            alpha_pattern: fields.get("alpha_pattern", "an object of numbers")?.unwrap_or_default(),
            modules_to_save: fields.get("modules_to_save", "a list of names")?.unwrap_or_default(),
            base_model_name_or_path: fields.get("base_model_name_or_path", "a name or a path")?,
            revision: fields.get("revision", "a revision")?,
        };
        config.validate()?;
        Ok(config)
    }

    /// The text of PEFT's `adapter_config.json`: keys sorted, two spaces of indentation, lists sorted.
    ///
    /// `fan_in_fan_out` says whether the base stores its weights transposed (GPT-2).
    pub fn to_peft_text(&self, fan_in_fan_out: bool) -> String {
        let or_null = |is_some: bool, value: Value| if is_some { value } else { Value::Null };
        let mut modules_to_save = self.modules_to_save.clone();
        modules_to_save.sort();
        let value = json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, &v)| (k.clone(), number(v))).collect::<Map<_, _>>(),
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": self.exclude_modules.as_ref().map(Modules::to_json),
            "fan_in_fan_out": fan_in_fan_out,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": or_null(!self.layers_pattern.is_empty(), json!(self.layers_pattern)),
            "layers_to_transform": or_null(!self.layers_to_transform.is_empty(), json!(self.layers_to_transform)),
            "lora_alpha": number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": or_null(!modules_to_save.is_empty(), json!(modules_to_save)),
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "revision": self.revision,
            "target_modules": self.target_modules.to_json(),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        // The literal above is in key order, and the map keeps it.
        format!("{value:#}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<LoraConfig> {
        LoraConfig::from_peft_json(Path::new("a/adapter_config.json"), &value)
    }

    #[test]
    fn every_fault_is_listed_at_once() {
        let config = LoraConfig { rank: 0, lora_dropout: 1.0, layers_pattern: vec!["h".into()], ..Default::default() };
        let text = config.validate().unwrap_err().to_string();
        for part in ["`rank` is 0, expected at least 1", "`lora_dropout` is 1", "`layers_pattern` is set without"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_written_config_reads_as_the_same() {
        let config = LoraConfig {
            lora_alpha: 20.5,
            use_rslora: true,
            target_modules: Modules::Names(vec!["q_proj".into(), "v_proj".into()]),
            exclude_modules: Some(Modules::Pattern("lm.*".into())),
            layers_to_transform: vec![0, 2],
            layers_pattern: vec!["layers".into()],
            rank_pattern: [("q_proj".to_string(), 4)].into(),
            alpha_pattern: [("v_proj".to_string(), 8.0)].into(),
            modules_to_save: vec!["lm_head".into()],
            base_model_name_or_path: Some("org/model".into()),
            ..Default::default()
        };
        let value: Value = serde_json::from_str(&config.to_peft_text(false)).unwrap();
        assert_eq!(read(value).unwrap(), config);
    }

    #[test]
    fn the_file_has_sorted_keys_and_whole_alphas() {
        let text = LoraConfig::default().to_peft_text(true);
        let value: Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert!(value.keys().is_sorted(), "{text}");
        assert!(text.contains("  \"lora_alpha\": 32,\n") && text.contains("  \"fan_in_fan_out\": true,\n"), "{text}");
    }

    #[test]
    fn missing_keys_have_pefts_defaults_and_unknown_ones_pass() {
        let config = read(json!({"peft_type": "LORA", "target_modules": ["q_proj"], "a_new_key": 3})).unwrap();
        assert_eq!((config.rank, config.lora_alpha, config.use_rslora), (8, 8.0, false));
    }

    #[test]
    fn features_that_change_values_are_refused_by_name() {
        let error = read(json!({
            "peft_type": "LORA", "use_dora": true, "bias": "all", "layer_replication": [[0, 2]],
            "init_lora_weights": "pissa_niter_4", "target_parameters": [], "loftq_config": {},
        }))
        .unwrap_err();
        let PeftError::Unsupported { features, .. } = &error else { panic!("{error}") };
        assert_eq!(features.len(), 4, "{features:?}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn another_method_or_a_wrong_type_names_the_field() {
        let text = read(json!({"peft_type": "IA3"})).unwrap_err().to_string();
        assert_eq!(text, "a/adapter_config.json: `peft_type` is \"IA3\", expected \"LORA\"");
        let text = read(json!({"peft_type": "LORA", "r": "eight"})).unwrap_err().to_string();
        assert_eq!(text, "a/adapter_config.json: `r` is \"eight\", expected a whole number");
    }

    #[test]
    fn a_user_may_write_r_and_typos_are_caught() {
        let config: LoraConfig = serde_json::from_value(json!({"r": 4, "target_modules": "all-linear"})).unwrap();
        assert!(config.rank == 4 && config.target_modules.is_all_linear());
        assert!(serde_json::from_value::<LoraConfig>(json!({"lora_alfa": 4})).is_err());
    }
}
