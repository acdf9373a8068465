//! IA3: learned vectors that scale what linear layers give, or what feed-forward layers read.

use crate::adapter::{Adapter, Merged, NewWeight, State};
use crate::base::Base;
use crate::config::{Fields, Modules, is_off, read_json};
use crate::error::to_model;
use crate::files;
use crate::saved::SavedModules;
use crate::target::{Strictness, Targets, is_end_of, target_layers};
use crate::{PeftError, Result};
use pt_model::{Architecture, CausalLm, Linear, Sites};
use pt_tensor::{DenseWeight, Kind, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;
use std::rc::Rc;

/// (IA)³ (Liu et al. 2022, <https://arxiv.org/abs/2205.05638>): y = l ⊙ (x·Wᵀ + bias), and for feed-forward layers
/// y = (l ⊙ x)·Wᵀ + bias.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ia3Config {
    /// Layers that get a vector: a list of names, a regular expression, or `all-linear`; null is PEFT's choice for the
    /// architecture (keys, values and the layer that ends the MLP of a Llama).
    pub target_modules: Option<Modules>,
    /// Those of them whose input is scaled instead of their output; null is PEFT's choice for the architecture, as far as
    /// `target_modules` names it. As in PEFT a name is any end of the path.
    pub feedforward_modules: Option<Modules>,
    /// Layers that get none, though `target_modules` names them.
    pub exclude_modules: Option<Modules>,
    /// Modules that are trained whole and saved beside the vectors, by the end of their path: `lm_head`.
    pub modules_to_save: Vec<String>,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, kept in the file.
    pub revision: Option<String>,
}

/// PEFT 0.21's targets for an architecture, and which of them are feed-forward layers.
fn defaults(architecture: Architecture) -> (Modules, Modules) {
    let names = |names: &[&str]| Modules::Names(names.iter().map(ToString::to_string).collect());
    match architecture {
        Architecture::Llama | Architecture::Mistral => {
            (names(&["k_proj", "v_proj", "down_proj"]), names(&["down_proj"]))
        }
        Architecture::Qwen2 => (names(&["q_proj", "v_proj", "down_proj"]), names(&["down_proj"])),
        Architecture::Gpt2 => (names(&["c_attn", "mlp.c_proj"]), names(&["mlp.c_proj"])),
    }
}

impl Ia3Config {
    /// Checks combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if let Some(Modules::Names(names)) = &self.target_modules {
            if names.is_empty() && self.modules_to_save.is_empty() {
                faults.push("`target_modules` is empty, expected names, a pattern, `all-linear` or null".into());
            }
            if let Some(Modules::Names(feedforward)) = &self.feedforward_modules
                && let Some(name) = feedforward.iter().find(|name| !names.contains(name))
            {
                faults.push(format!("`feedforward_modules` has {name}, expected names that `target_modules` has too"));
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(PeftError::Config { faults }) }
    }

    /// The settings with the modules that are null filled in for an architecture.
    fn resolved(mut self, base: &Base<'_>) -> Result<Self> {
        if self.target_modules.is_none() || self.feedforward_modules.is_none() {
            let Some(architecture) = base.architecture() else {
                let fault =
                    "`target_modules` and `feedforward_modules` are null, expected both for a model of one's own";
                return Err(PeftError::Config { faults: vec![fault.into()] });
            };
            let (target_modules, mut feedforward_modules) = defaults(architecture);
            // Of targets that somebody chose, those that are feed-forward layers here.
            if let (Some(Modules::Names(chosen)), Modules::Names(feedforward)) =
                (&self.target_modules, &mut feedforward_modules)
            {
                feedforward.retain(|name| chosen.contains(name));
            }
            self.target_modules.get_or_insert(target_modules);
            self.feedforward_modules.get_or_insert(feedforward_modules);
        }
        self.validate()?;
        Ok(self)
    }

    /// Reads PEFT's `adapter_config.json`.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another `peft_type` or a value of a wrong
    /// kind; [`PeftError::Config`].
    pub fn from_peft_file(path: &Path) -> Result<Self> {
        Self::from_peft_json(path, &read_json(path)?)
    }

    fn from_peft_json(path: &Path, value: &Value) -> Result<Self> {
        let fields = Fields { path, value };
        fields.check_method("IA3")?;
        let modules = "a list of names, or a pattern";
        let config = Self {
            target_modules: fields.get("target_modules", modules)?,
            feedforward_modules: fields.get("feedforward_modules", modules)?,
            exclude_modules: fields.get("exclude_modules", modules)?,
            modules_to_save: fields.get("modules_to_save", "a list of names")?.unwrap_or_default(),
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
        let mut modules_to_save = json!(self.modules_to_save);
        if is_off(&modules_to_save) {
            modules_to_save = Value::Null;
        }
        let modules = |modules: &Option<Modules>| modules.as_ref().map(Modules::to_json);
        let value = json!({
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "exclude_modules": modules(&self.exclude_modules),
            "fan_in_fan_out": fan_in_fan_out,
            "feedforward_modules": modules(&self.feedforward_modules),
            "inference_mode": true,
            "init_ia3_weights": true,
            "modules_to_save": modules_to_save,
            "peft_type": "IA3",
            "revision": self.revision,
            "target_modules": modules(&self.target_modules),
            "task_type": "CAUSAL_LM",
        });
        // The literal above is in key order, and the map keeps it.
        format!("{value:#}")
    }
}

/// The vector of one layer.
#[derive(Debug)]
struct Scale {
    path: String,
    /// l in PEFT's shape, an f32 leaf: `[out_features, 1]`, of a feed-forward layer `[1, in_features]`.
    l: Tensor,
    is_feedforward: bool,
}

impl Scale {
    /// x ⊙ l over the last axis, computed in f32 and rounded to the kind of x, as PEFT does.
    fn scale(&self, x: &Tensor) -> Tensor {
        (x * self.l.view(-1)).to_kind(x.kind())
    }

    fn around(&self, x: &Tensor, inner: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        // The frozen product keeps nothing; what l's gradient needs is x here and the product below, once each.
        if self.is_feedforward { inner(&self.scale(x)) } else { Ok(self.scale(&inner(x)?)) }
    }

    /// The layer's weight and bias with l in them, in their own kind; l has the axis that the product lacks.
    fn merged(&self, layer: &Linear) -> Result<NewWeight> {
        let dense = layer.weight.dense()?;
        let weight = DenseWeight::new((&dense * &self.l).to_kind(dense.kind()))?;
        let bias = match (&layer.bias, self.is_feedforward) {
            (Some(bias), false) => Some(self.scale(bias)),
            _ => None,
        };
        Ok(NewWeight { index: layer.index, weight: Rc::new(weight), bias })
    }
}

/// (IA)³ on some layers of a model, and modules that are trained whole. The vectors are f32 leaves whatever the model
/// computes in, and start at one.
#[derive(Debug)]
pub struct Ia3Adapter {
    config: Ia3Config,
    /// By [`Linear::index`].
    scales: Vec<Option<Scale>>,
    saved: SavedModules,
    /// Name of the output layer's weight, where the layer has a vector.
    output_weight: Option<String>,
    fan_in_fan_out: bool,
    state: State,
}

impl Ia3Adapter {
    /// A new adapter for a [`CausalLm`], or for linear layers of a model of one's own: all vectors one, which is the
    /// bare model.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be, [`PeftError::NoMatch`] for names that the model does not
    /// have, [`PeftError::Pattern`].
    pub fn new<'a>(config: Ia3Config, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        config.validate()?;
        Self::assemble(config.resolved(&base)?, &base, Strictness::EveryName)
    }

    /// Loads an adapter that PEFT or [`Adapter::save`] wrote, for a model or linear layers of one's own.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`] for a folder without an adapter, or with pickled tensors only; those of
    /// [`Ia3Config::from_peft_file`]; [`PeftError::NoMatch`]; [`PeftError::Keys`] with the difference.
    pub fn load<'a>(folder: &Path, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        files::check_folder(folder)?;
        let config = Ia3Config::from_peft_file(&folder.join(files::CONFIG_FILE))?.resolved(&base)?;
        let adapter = Self::assemble(config, &base, Strictness::AnyName)?;
        let mut shapes = files::shapes_of(&adapter.saved);
        let vectors = adapter.scales.iter().flatten();
        shapes.extend(vectors.map(|scale| (format!("{}.ia3_l", scale.path), scale.l.size())));
        files::AdapterFile::open(folder, &base, files::MODULES, &shapes)?.read_into(adapter.entries())?;
        Ok(adapter)
    }

    fn assemble(config: Ia3Config, base: &Base<'_>, strictness: Strictness) -> Result<Self> {
        let saved = SavedModules::copies(&config.modules_to_save, base)?;
        let none = Modules::Names(vec![]);
        let targets = Targets {
            target_modules: config.target_modules.as_ref().unwrap_or(&none),
            exclude_modules: config.exclude_modules.as_ref(),
            layers_to_transform: &[],
            layers_pattern: &[],
            modules_to_save: &config.modules_to_save,
        };
        let paths: Vec<&str> = base.layers.iter().map(|layer| layer.path.as_str()).collect();
        let feedforward = config.feedforward_modules.as_ref().unwrap_or(&none);
        let size = base.layers.iter().map(|layer| layer.index + 1).max().unwrap_or(0);
        let mut scales: Vec<Option<Scale>> = (0..size).map(|_| None).collect();
        let (mut fan_in_fan_out, mut output_weight) = (false, None);
        for position in target_layers(&targets, &paths, base.output, strictness)? {
            let layer = base.layers[position];
            let weight = format!("{}.weight", layer.path);
            if saved.contains(&weight) {
                continue;
            }
            let is_feedforward = is_end_of(&layer.path, "feedforward_modules", feedforward)?;
            let (out_features, in_features) = layer.weight.size();
            let shape = if is_feedforward { [1, in_features] } else { [out_features, 1] };
            let l = Tensor::f_ones(shape, (Kind::Float, layer.weight.device()))?.set_requires_grad(true);
            scales[layer.index] = Some(Scale { path: layer.path.clone(), l, is_feedforward });
            fan_in_fan_out |= layer.is_transposed_in_file;
            if Some(position) == base.output {
                output_weight = Some(weight);
            }
        }
        Ok(Self { config, scales, saved, output_weight, fan_in_fan_out, state: State::new() })
    }

    fn entries(&self) -> Vec<files::Entry> {
        let vectors = self.scales.iter().flatten();
        let vectors = vectors.map(|scale| files::Entry::new(format!("{}.ia3_l", scale.path), &scale.l));
        vectors.chain(files::entries_of(&self.saved)).collect()
    }

    /// The settings, with the modules that the architecture's defaults chose.
    pub fn config(&self) -> &Ia3Config {
        &self.config
    }

    /// Paths of the scaled layers, in model order, and whether their input is what is scaled.
    pub fn targets(&self) -> impl Iterator<Item = (&str, bool)> {
        self.scales.iter().flatten().map(|scale| (scale.path.as_str(), scale.is_feedforward))
    }

    fn scale_of(&self, layer: &Linear) -> Option<&Scale> {
        self.scales.get(layer.index).and_then(Option::as_ref)
    }
}

impl Sites for Ia3Adapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        if !self.state.is_live() {
            return layer.forward(hidden_states);
        }
        if let Some(whole) = self.saved.linear(layer, hidden_states).map_err(to_model)? {
            return Ok(whole);
        }
        self.around_linear(layer, hidden_states, &|hidden_states| Ok(layer.forward(hidden_states)?)).map_err(to_model)
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        let bare = || pt_model::Bare.output(layer, hidden_states);
        if !self.state.is_live() {
            return bare();
        }
        if let Some(weight) = self.saved.get(&format!("{}.weight", layer.path)) {
            return Ok((hidden_states.shallow_clone(), weight.to_kind(hidden_states.kind())));
        }
        let (states, weight) = bare()?;
        match self.scale_of(layer) {
            None => Ok((states, weight)),
            Some(scale) if scale.is_feedforward => Ok((scale.scale(&states), weight)),
            // l ⊙ (x·Wᵀ) is x·(W with its rows scaled)ᵀ.
            Some(scale) => Ok((states, (&weight * &scale.l).to_kind(weight.kind()))),
        }
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        if self.state.is_live() { self.saved.parameter(path) } else { None }
    }
}

impl Adapter for Ia3Adapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.entries().into_iter().map(|entry| (entry.name, entry.tensor)).collect()
    }

    fn set_enabled(&self, is_enabled: bool) {
        self.state.is_enabled.set(is_enabled);
    }

    fn around_linear(
        &self,
        layer: &Linear,
        hidden_states: &Tensor,
        inner: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.scale_of(layer).filter(|_| self.state.is_live()) {
            Some(scale) => scale.around(hidden_states, inner),
            None => inner(hidden_states),
        }
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.saved.iter().map(|saved| saved.name.as_str()).chain(self.output_weight.as_deref()).collect()
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let (of_outputs, of_inputs): (Vec<_>, Vec<_>) = self.targets().partition(|(_, is_input)| !is_input);
        files::save(
            folder,
            &self.config.to_peft_text(self.fan_in_fan_out),
            files::MODULES,
            self.entries(),
            &files::Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "ia3",
                title: "IA3 adapter",
                settings: format!("scaled outputs of {} layers, inputs of {}", of_outputs.len(), of_inputs.len()),
            },
        )
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        self.state.merge(|| {
            let mut weights = Vec::new();
            for layer in model.linear_layers() {
                if let Some(whole) = self.saved.merged_layer(layer)? {
                    weights.push(whole);
                } else if let Some(scale) = self.scale_of(layer) {
                    weights.push(scale.merged(layer)?);
                }
            }
            let outside = self.saved.outside_layers(model);
            Merged::into_model(model, weights, outside)
        })
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut model.linear_layers_mut()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Ia3Config> {
        Ia3Config::from_peft_json(Path::new("a/adapter_config.json"), &value)
    }

    #[test]
    fn a_written_config_reads_as_the_same() {
        let config = Ia3Config {
            target_modules: Some(Modules::Names(vec!["down_proj".into(), "k_proj".into()])),
            feedforward_modules: Some(Modules::Names(vec!["down_proj".into()])),
            exclude_modules: Some(Modules::Pattern("lm.*".into())),
            modules_to_save: vec!["lm_head".into()],
            ..Default::default()
        };
        let text = config.to_peft_text(false);
        assert_eq!(read(serde_json::from_str(&text).unwrap()).unwrap(), config);
        let value: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert!(value.keys().is_sorted(), "{text}");
    }

    #[test]
    fn feedforward_modules_are_a_part_of_the_targets() {
        let names = |names: &[&str]| Some(Modules::Names(names.iter().map(ToString::to_string).collect()));
        let config = Ia3Config {
            target_modules: names(&["k_proj"]),
            feedforward_modules: names(&["down_proj"]),
            ..Default::default()
        };
        let text = config.validate().unwrap_err().to_string();
        assert!(text.contains("`feedforward_modules` has down_proj"), "{text}");
    }

    #[test]
    fn a_layer_of_ones_own_is_scaled_at_either_end() {
        let weight = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).view([2, 3]);
        let layers = [0, 1].map(|index| {
            let bias = Some(Tensor::from_slice(&[10f32, 20.]));
            Linear::dense(index, ["a.key", "a.down"][index], weight.shallow_clone(), bias).unwrap()
        });
        let names = |names: &[&str]| Some(Modules::Names(names.iter().map(ToString::to_string).collect()));
        let config = Ia3Config {
            target_modules: names(&["key", "down"]),
            feedforward_modules: names(&["down"]),
            ..Default::default()
        };
        let adapter = Ia3Adapter::new(config, layers.as_slice()).unwrap();
        for (_, tensor) in &mut adapter.parameters() {
            let _ = pt_tensor::no_grad(|| tensor.g_mul_scalar_(2.0));
        }
        let x = Tensor::from_slice(&[1f32, 0., -1.]).view([1, 3]);
        let run = |layer: &Linear| Vec::<f32>::try_from(adapter.linear(layer, &x).unwrap().view(-1)).unwrap();
        assert_eq!(run(&layers[0]), [16., 36.]); // 2 · (x·Wᵀ + bias)
        assert_eq!(run(&layers[1]), [6., 16.]); // (2 · x)·Wᵀ + bias
        let nothing_named = Ia3Adapter::new(Ia3Config::default(), layers.as_slice()).unwrap_err();
        assert!(nothing_named.to_string().contains("expected both"), "{nothing_named}");
    }
}
