//! LoRA's settings, and `adapter_config.json` as PEFT 0.21 writes it.

use super::options::{BiasMode, LoraInit, Start, TokenIndices};
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
    /// Train the length of each row of the weight apart from its direction (DoRA, Liu et al. 2024, <https://arxiv.org/abs/2402.09353>).
    pub use_dora: bool,
    /// How A and B start: true (A uniform, B zero), false (both random), `gaussian`, `orthogonal`, or from the weight:
    /// `pissa`, `pissa_niter_N` (Meng et al. 2024, <https://arxiv.org/abs/2404.02948>; with N a fast approximation),
    /// `olora` (Büyükakyüz 2024, <https://arxiv.org/abs/2406.01775>). The last three are saved as a plain update of twice the rank.
    pub init_lora_weights: LoraInit,
    /// Learning rate of B, of magnitudes and of biases as a multiple of the run's (LoRA+, Hayou et al. 2024,
    /// <https://arxiv.org/abs/2402.12354>; they take 16); an embedding's factors keep the run's. Null for 1.
    pub loraplus_lr_ratio: Option<f64>,
    /// Which of the model's biases are trained too: `none`, `all`, or `lora_only`, those of the layers with an update.
    pub bias: BiasMode,
    /// Give the update a bias of its own, added after B.
    pub lora_bias: bool,
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
    /// Tokens whose rows of the embedding (and of an output layer that is tied to it) are trained: a list of ids.
    pub trainable_token_indices: Option<TokenIndices>,
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
            use_dora: false,
            init_lora_weights: LoraInit::default(),
            loraplus_lr_ratio: None,
            bias: BiasMode::None,
            lora_bias: false,
            target_modules: Modules::Pattern("all-linear".into()),
            exclude_modules: None,
            layers_to_transform: vec![],
            layers_pattern: vec![],
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules_to_save: vec![],
            trainable_token_indices: None,
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

/// Keys of PEFT's file that change values and that this crate does not have, with the values that leave them off.
const UNSUPPORTED: [&str; 10] = [
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "ensure_weight_tying",
];

/// A starting point that only sets A and B, which the file then overwrites. PiSSA and OLoRA change the base weights too,
/// in a way that is computed again; that of others (PiSSA by iteration, CorDA, LoftQ, LoRA-GA) is lost.
const HARMLESS_INIT: &str = "eva";

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
        self.check_variants(&mut faults);
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

    /// The faults of LoRA's variants.
    fn check_variants(&self, faults: &mut Vec<String>) {
        let init = &self.init_lora_weights;
        let start = match init.start() {
            Ok(start) => start,
            Err(expected) => return faults.push(format!("`init_lora_weights` is {init}, expected {expected}")),
        };
        let ranks = self.rank_pattern.values().copied().chain([self.rank]);
        if let Some(odd) = ranks.filter(|rank| rank % 2 != 0).find(|_| start == Start::Orthogonal) {
            faults.push(format!("`rank` is {odd}, expected an even one for `init_lora_weights` = {init}"));
        }
        if start.is_from_weight() && self.use_dora {
            // A magnitude cannot stand for a change of the weight that the file leaves out.
            faults.push(format!("`use_dora` with `init_lora_weights` = {init}, expected one of them"));
        }
        if self.lora_bias && (self.use_dora || !matches!(start, Start::Uniform | Start::Random)) {
            faults.push(
                "`lora_bias` with `use_dora` or a named `init_lora_weights`, expected it alone, as in PEFT".into(),
            );
        }
        if let Some(ratio) = self.loraplus_lr_ratio.filter(|ratio| !(*ratio > 0.0 && ratio.is_finite())) {
            faults.push(format!("`loraplus_lr_ratio` is {ratio}, expected over 0"));
        }
        if let Some(tokens) = &self.trainable_token_indices {
            let ids = tokens.ids();
            let mut seen = std::collections::BTreeSet::new();
            if let Some(id) = ids.iter().find(|id| **id < 0 || !seen.insert(**id)) {
                faults.push(format!("`trainable_token_indices` has {id}, expected ids from 0, each once"));
            }
            if ids.is_empty() {
                faults.push("`trainable_token_indices` is empty, expected ids of tokens".into());
            }
        }
    }

    /// The settings of the plain update, of twice the rank, that an adapter from the model's weights is saved as.
    pub(super) fn converted(&self) -> Self {
        // alpha / rank, or alpha / √rank, stays what it was.
        let alpha_factor = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        Self {
            rank: 2 * self.rank,
            lora_alpha: alpha_factor * self.lora_alpha,
            rank_pattern: self.rank_pattern.iter().map(|(name, rank)| (name.clone(), 2 * rank)).collect(),
            alpha_pattern: self
                .alpha_pattern
                .iter()
                .map(|(name, alpha)| (name.clone(), alpha_factor * alpha))
                .collect(),
            init_lora_weights: LoraInit::default(),
            ..self.clone()
        }
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
        let dora = if self.use_dora { ", with trained magnitudes (DoRA)" } else { "" };
        format!("rank {}, alpha {}{rslora}{dora}", self.rank, self.lora_alpha)
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
        let init: Option<LoraInit> = fields.get("init_lora_weights", "true, false or a name")?;
        let init = init.filter(|init| *init != LoraInit::Named(HARMLESS_INIT.into())).unwrap_or_default();
        if matches!(init.start(), Err(_) | Ok(Start::Pissa { num_iterations: Some(_) })) {
            features.push(format!("`init_lora_weights` = {init}"));
        }
        if !features.is_empty() {
            return Err(PeftError::Unsupported { path: path.into(), features, is_mergeable: true });
        }
        let layers: Option<OneOrMany<i64>> = fields.get("layers_to_transform", "a number or a list of numbers")?;
        let pattern: Option<OneOrMany<String>> = fields.get("layers_pattern", "a name or a list of names")?;
        let modules = "a list of names, or a pattern";
        let config = Self {
            rank: fields.get("r", "a whole number")?.unwrap_or(8),
            lora_alpha: fields.get("lora_alpha", "a number")?.unwrap_or(8.0),
            lora_dropout: fields.get("lora_dropout", "a number")?.unwrap_or(0.0),
            use_rslora: fields.get("use_rslora", "true or false")?.unwrap_or(false),
            use_dora: fields.get("use_dora", "true or false")?.unwrap_or(false),
            init_lora_weights: init,
            loraplus_lr_ratio: None,
            bias: fields.get("bias", "\"none\", \"all\" or \"lora_only\"")?.unwrap_or_default(),
            lora_bias: fields.get("lora_bias", "true or false")?.unwrap_or(false),
            target_modules: fields.get("target_modules", modules)?.unwrap_or(Modules::Names(vec![])),
            exclude_modules: fields.get("exclude_modules", modules)?,
            layers_to_transform: layers.map(OneOrMany::into_vec).unwrap_or_default(),
            layers_pattern: pattern.map(OneOrMany::into_vec).unwrap_or_default(),
            rank_pattern: fields.get("rank_pattern", "an object of ranks")?.unwrap_or_default(),
            alpha_pattern: fields.get("alpha_pattern", "an object of numbers")?.unwrap_or_default(),
            modules_to_save: fields.get("modules_to_save", "a list of names")?.unwrap_or_default(),
            trainable_token_indices: fields
                .get("trainable_token_indices", "a list of token ids, or one for the embedding's name")?,
            base_model_name_or_path: fields.get("base_model_name_or_path", "a name or a path")?,
            revision: fields.get("revision", "a revision")?,
        };
        config.validate().map_err(|error| error.in_file(path))?;
        Ok(config)
    }

    /// The text of PEFT's `adapter_config.json`: keys sorted, two spaces of indentation, lists sorted.
    ///
    /// `fan_in_fan_out` says whether the base stores its weights transposed (GPT-2).
    pub fn to_peft_text(&self, fan_in_fan_out: bool) -> String {
        let or_null = |is_some: bool, value: Value| if is_some { value } else { Value::Null };
        let mut modules_to_save = self.modules_to_save.clone();
        modules_to_save.sort();
        let mut value = json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, &v)| (k.clone(), number(v))).collect::<Map<_, _>>(),
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": self.bias,
            "exclude_modules": self.exclude_modules.as_ref().map(Modules::to_json),
            "fan_in_fan_out": fan_in_fan_out,
            "inference_mode": true,
            "init_lora_weights": self.init_lora_weights,
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
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        // Keys that older versions of PEFT do not know are written where they are needed.
        if self.lora_bias {
            value["lora_bias"] = json!(true);
        }
        if let Some(tokens) = &self.trainable_token_indices {
            value["trainable_token_indices"] = json!(tokens);
        }
        if let Value::Object(map) = &mut value {
            map.sort_keys();
        }
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
            use_dora: true,
            init_lora_weights: LoraInit::Named("gaussian".into()),
            bias: BiasMode::LoraOnly,
            trainable_token_indices: Some(TokenIndices::Ids(vec![7, 3])),
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
            "peft_type": "LORA", "use_qalora": true, "layer_replication": [[0, 2]],
            "init_lora_weights": "pissa_niter_4", "target_parameters": [], "loftq_config": {},
        }))
        .unwrap_err();
        let PeftError::Unsupported { features, .. } = &error else { panic!("{error}") };
        assert_eq!(features.len(), 3, "{features:?}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn variants_that_exclude_each_other_are_named() {
        let faults = |config: LoraConfig| config.validate().unwrap_err().to_string();
        let named = |name: &str| LoraInit::Named(name.into());
        let text = faults(LoraConfig { init_lora_weights: named("pisa"), ..Default::default() });
        assert!(text.contains("`init_lora_weights` is \"pisa\", expected true, false"), "{text}");
        let text = faults(LoraConfig { use_dora: true, init_lora_weights: named("olora"), ..Default::default() });
        assert!(text.contains("`use_dora` with `init_lora_weights` = \"olora\""), "{text}");
        let text = faults(LoraConfig { lora_bias: true, use_dora: true, ..Default::default() });
        assert!(text.contains("`lora_bias` with `use_dora`"), "{text}");
        let text = faults(LoraConfig { rank: 3, init_lora_weights: named("orthogonal"), ..Default::default() });
        assert!(text.contains("`rank` is 3, expected an even one"), "{text}");
        let ids = |ids: &[i64]| Some(TokenIndices::Ids(ids.to_vec()));
        let text = faults(LoraConfig { trainable_token_indices: ids(&[4, 4]), ..Default::default() });
        assert!(text.contains("has 4, expected ids from 0, each once"), "{text}");
        let text = faults(LoraConfig { loraplus_lr_ratio: Some(0.0), ..Default::default() });
        assert!(text.contains("`loraplus_lr_ratio` is 0, expected over 0"), "{text}");
    }

    #[test]
    fn a_plain_update_of_twice_the_rank_keeps_the_scaling() {
        for use_rslora in [false, true] {
            let config = LoraConfig {
                use_rslora,
                rank_pattern: [("q".to_string(), 6)].into(),
                alpha_pattern: [("q".to_string(), 3.0)].into(),
                ..Default::default()
            };
            let converted = config.converted();
            let scalings = |config: &LoraConfig| {
                [
                    config.scaling(config.rank, config.lora_alpha),
                    config.scaling(config.rank_pattern["q"], config.alpha_pattern["q"]),
                ]
            };
            for (a, b) in scalings(&config).into_iter().zip(scalings(&converted)) {
                assert!((a - b).abs() < 1e-12, "{a} {b}");
            }
        }
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
