//! BitFit: only biases are trained.

use crate::adapter::{Adapter, Merged, NewWeight, State, for_use};
use crate::base::Base;
use crate::config::{Fields, Modules, read_json};
use crate::error::to_model;
use crate::files;
use crate::target::{Strictness, Targets, target_layers};
use crate::{PeftError, Result};
use pt_model::{CausalLm, Linear, Sites};
use pt_tensor::{Kind, Tensor, no_grad};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// BitFit (Zaken et al. 2021, <https://arxiv.org/abs/2106.10199>): biases are trained, nothing else.
///
/// Llama, Mistral and SmolLM have no biases: they get new ones that start at zero, on every linear layer but the output
/// layer. The files are this crate's own; Python's PEFT does not read them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BitfitConfig {
    /// Linear layers and norms whose bias is trained: a list of names, a regular expression, or `all-linear`. A linear
    /// layer named here that has no bias gets one that starts at zero. Null: every bias that the model has, or of a
    /// model without any, new ones that start at zero on every linear layer.
    pub target_modules: Option<Modules>,
    /// Modules left out, though `target_modules` names them.
    pub exclude_modules: Option<Modules>,
    /// The base model's name or path, kept in the file for whoever loads it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, kept in the file.
    pub revision: Option<String>,
}

impl BitfitConfig {
    /// Checks combinations.
    ///
    /// # Errors
    /// [`PeftError::Config`] with every fault.
    pub fn validate(&self) -> Result<()> {
        match &self.target_modules {
            Some(Modules::Names(names)) if names.is_empty() => Err(PeftError::Config {
                faults: vec!["`target_modules` is empty, expected names, a pattern, `all-linear` or null".into()],
            }),
            _ => Ok(()),
        }
    }

    /// Reads `adapter_config.json` with the `peft_type` `BITFIT`, which is this crate's own.
    ///
    /// # Errors
    /// [`PeftError::Read`], [`PeftError::Json`]; [`PeftError::Field`] for another `peft_type` or a value of a wrong
    /// kind; [`PeftError::Config`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let value = read_json(path)?;
        let fields = Fields { path, value: &value };
        fields.check_method("BITFIT")?;
        let modules = "a list of names, or a pattern";
        let config = Self {
            target_modules: fields.get("target_modules", modules)?,
            exclude_modules: fields.get("exclude_modules", modules)?,
            base_model_name_or_path: fields.get("base_model_name_or_path", "a name or a path")?,
            revision: fields.get("revision", "a revision")?,
        };
        config.validate().map_err(|error| error.in_file(path))?;
        Ok(config)
    }

    /// The text of `adapter_config.json`, laid out as PEFT's: keys sorted, two spaces of indentation.
    pub fn to_text(&self) -> String {
        let modules = |modules: &Option<Modules>| modules.as_ref().map(Modules::to_json);
        let value = json!({
            "base_model_name_or_path": self.base_model_name_or_path,
            "exclude_modules": modules(&self.exclude_modules),
            "peft_type": "BITFIT",
            "revision": self.revision,
            "target_modules": modules(&self.target_modules),
            "task_type": "CAUSAL_LM",
        });
        format!("{value:#}")
    }
}

/// Trained biases of linear layers and norms, by module path: f32 leaves whatever the model computes in.
#[derive(Debug)]
pub(crate) struct Biases {
    by_path: BTreeMap<String, Bias>,
    kind: Kind,
}

#[derive(Debug)]
struct Bias {
    /// The parameter's name: `model.layers.0.self_attn.q_proj.bias`.
    name: String,
    value: Tensor,
    /// Whether the model has none here, so that the value started at zero.
    is_new: bool,
    /// Whether it is of a linear layer, and not of a norm.
    is_of_layer: bool,
}

impl Biases {
    /// Trainable copies of the biases that are chosen, as [`BitfitConfig`] says, and zeros where a layer has none.
    pub(crate) fn copies(
        target_modules: Option<&Modules>,
        exclude_modules: Option<&Modules>,
        base: &Base<'_>,
        strictness: Strictness,
    ) -> Result<Self> {
        let is_output = |position: usize| Some(position) == base.output;
        let linears = base.layers.iter().enumerate().filter(|(position, _)| !is_output(*position));
        let linears: Vec<&Linear> = linears.map(|(_, layer)| *layer).collect();
        let num_linears = linears.len();
        let mut paths: Vec<String> = linears.iter().map(|layer| layer.path.clone()).collect();
        // Norms come after the layers; those without a bias (RMS norm) have no place for one.
        let mut own: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, value) in base.biases() {
            if let Some(path) = name.strip_suffix(".bias") {
                own.insert(path.to_string(), value);
                if !paths.iter().any(|known| known == path) {
                    paths.push(path.to_string());
                }
            }
        }
        let is_chosen_by_default = |path: &str| own.is_empty() || own.contains_key(path);
        let everything = Modules::Pattern(".*".into());
        let all_linear = target_modules.is_some_and(Modules::is_all_linear);
        let targets = Targets {
            target_modules: target_modules.filter(|_| !all_linear).unwrap_or(&everything),
            exclude_modules,
            layers_to_transform: &[],
            layers_pattern: &[],
            modules_to_save: &[],
        };
        let names: Vec<&str> = paths.iter().map(String::as_str).collect();
        let mut by_path = BTreeMap::new();
        for position in target_layers(&targets, &names, None, strictness)? {
            let path = names[position];
            if (all_linear && position >= num_linears) || (target_modules.is_none() && !is_chosen_by_default(path)) {
                continue;
            }
            let value = match (own.get(path), linears.get(position)) {
                (Some(value), _) => no_grad(|| value.detach().to_kind(Kind::Float).copy()),
                (None, Some(layer)) => Tensor::f_zeros([layer.weight.size().0], (Kind::Float, layer.weight.device()))?,
                (None, None) => continue,
            };
            let (name, is_new) = (format!("{path}.bias"), !own.contains_key(path));
            let is_of_layer = base.layers.iter().any(|layer| layer.path == path);
            by_path.insert(path.to_string(), Bias { name, value: value.set_requires_grad(true), is_new, is_of_layer });
        }
        Ok(Self { by_path, kind: base.kind() })
    }

    /// No biases at all.
    pub(crate) fn none(base: &Base<'_>) -> Self {
        Self { by_path: BTreeMap::new(), kind: base.kind() }
    }

    /// By name, in the order of names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.by_path.values().map(|bias| (bias.name.as_str(), &bias.value))
    }

    /// Names of those that take the place of the model's: of norms. On a linear layer two add up.
    pub(crate) fn replaced(&self) -> Vec<&str> {
        self.by_path.values().filter(|bias| !bias.is_of_layer).map(|bias| bias.name.as_str()).collect()
    }

    /// How many there are, and how many of them the model had no parameter for.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.by_path.len(), self.by_path.values().filter(|bias| bias.is_new).count())
    }

    /// In words, for the model card and whoever starts a run.
    pub(crate) fn in_words(&self) -> String {
        match self.counts() {
            (all, 0) => format!("{all} biases of the model"),
            (all, new) if all == new => {
                format!("{new} new biases that start at zero, since the model has none on these layers")
            }
            (all, new) => format!("{} biases of the model and {new} new ones that start at zero", all - new),
        }
    }

    fn get(&self, layer: &Linear) -> Option<&Bias> {
        if self.by_path.is_empty() { None } else { self.by_path.get(&layer.path) }
    }

    /// A layer with its trained bias, as [`Sites::linear`] of an adapter of these biases in this state.
    ///
    /// Nothing is kept for the backward pass: the gradient of a bias is a sum over the gradient of the output.
    pub(crate) fn linear(&self, state: &State, layer: &Linear, hidden_states: &Tensor) -> Result<Tensor> {
        let Some(bias) = self.get(layer).filter(|_| state.is_live()) else { return Ok(layer.forward(hidden_states)?) };
        let value = for_use(&bias.value).to_kind(hidden_states.kind());
        if bias.is_new {
            // Added to the product that the base has: one with a bias of zero may sum in another order.
            return Ok(layer.weight.project(hidden_states, None)? + value);
        }
        Ok(layer.weight.project(hidden_states, Some(&value))?)
    }

    /// A layer's output, in which its own bias is already, with the trained one: [`Adapter::around_linear`].
    pub(crate) fn around(&self, state: &State, layer: &Linear, output: Tensor) -> Tensor {
        let Some(bias) = self.get(layer).filter(|_| state.is_live()) else { return output };
        let own = layer.bias.as_ref().map(|own| own.detach().to_kind(Kind::Float));
        let difference = own.map_or_else(|| bias.value.shallow_clone(), |own| &bias.value - own).to_kind(output.kind());
        output + difference
    }

    /// What [`pt_model::Sites::parameter`] gives for a path.
    pub(crate) fn parameter(&self, state: &State, path: &str) -> Option<Tensor> {
        if !state.is_live() {
            return None;
        }
        let bias = self.by_path.get(path.strip_suffix(".bias")?)?;
        Some(bias.value.to_kind(self.kind))
    }

    /// Puts the biases into a model.
    pub(crate) fn merge(&self, model: &mut CausalLm) -> Result<Merged> {
        let mut weights = Vec::new();
        for layer in model.linear_layers() {
            if let Some(bias) = self.get(layer) {
                let kind = layer.bias.as_ref().map_or(self.kind, Tensor::kind);
                let bias = Some(bias.value.detach().to_kind(kind).copy());
                weights.push(NewWeight { index: layer.index, weight: layer.weight.clone(), bias });
            }
        }
        let is_linear = |path: &str| model.linear_layers().any(|layer| layer.path == path);
        let norms = self.by_path.iter().filter(|(path, _)| !is_linear(path));
        let norms: Vec<_> =
            norms.filter_map(|(_, bias)| Some((model.parameter(&bias.name)?, bias.value.detach()))).collect();
        Merged::into_model(model, weights, norms)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = files::Entry> {
        self.iter().map(|(name, value)| files::Entry::new(name.into(), value))
    }
}

/// BitFit on a model.
#[derive(Debug)]
pub struct BitfitAdapter {
    config: BitfitConfig,
    biases: Biases,
    state: State,
}

impl BitfitAdapter {
    /// A new adapter for a [`CausalLm`], or for linear layers of a model of one's own; it starts as the bare model.
    ///
    /// # Errors
    /// [`PeftError::Config`] for settings that cannot be, [`PeftError::NoMatch`] for names that the model does not
    /// have, [`PeftError::Pattern`].
    pub fn new<'a>(config: BitfitConfig, base: impl Into<Base<'a>>) -> Result<Self> {
        config.validate()?;
        Self::assemble(config, &base.into(), Strictness::EveryName)
    }

    /// Loads an adapter that [`Adapter::save`] wrote.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`]; those of [`BitfitConfig::from_file`]; [`PeftError::NoMatch`]; [`PeftError::Keys`]
    /// with the difference.
    pub fn load<'a>(folder: &Path, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        files::check_folder(folder)?;
        let config = BitfitConfig::from_file(&folder.join(files::CONFIG_FILE))?;
        let adapter = Self::assemble(config, &base, Strictness::AnyName)?;
        let shapes = adapter.biases.iter().map(|(name, value)| (name.to_string(), value.size())).collect();
        files::AdapterFile::open(folder, &base, files::MODULES, &shapes)?.read_into(adapter.biases.entries())?;
        Ok(adapter)
    }

    fn assemble(config: BitfitConfig, base: &Base<'_>, strictness: Strictness) -> Result<Self> {
        let biases = Biases::copies(config.target_modules.as_ref(), config.exclude_modules.as_ref(), base, strictness)?;
        Ok(Self { config, biases, state: State::new() })
    }

    /// The settings.
    pub fn config(&self) -> &BitfitConfig {
        &self.config
    }

    /// Names of the trained biases.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        self.biases.iter().map(|(name, _)| name)
    }
}

impl Sites for BitfitAdapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        self.biases.linear(&self.state, layer, hidden_states).map_err(to_model)
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        self.biases.parameter(&self.state, path)
    }
}

impl Adapter for BitfitAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.biases.iter().map(|(name, value)| (name.into(), value.shallow_clone())).collect()
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
        Ok(self.biases.around(&self.state, layer, inner(hidden_states)?))
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.biases.replaced()
    }

    fn note(&self) -> Option<String> {
        Some(format!("BitFit trains {}", self.biases.in_words()))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        files::save(
            folder,
            &self.config.to_text(),
            files::MODULES,
            self.biases.entries(),
            &files::Card {
                base: self.config.base_model_name_or_path.as_deref(),
                tag: "bitfit",
                title: "BitFit adapter",
                settings: format!(
                    "{}. The files are `pt`'s own; Python's PEFT does not read them",
                    self.biases.in_words()
                ),
            },
        )
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        self.state.merge(|| self.biases.merge(model))
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut model.linear_layers_mut()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_ones_own_have_their_biases_trained_and_the_others_left_alone() {
        let weight = || Tensor::ones([2, 3], (Kind::Float, pt_tensor::Device::Cpu));
        let bias = Tensor::from_slice(&[1f32, 2.]);
        let with = Linear::dense(0, "a.up", weight(), Some(bias.shallow_clone())).unwrap();
        let layers = [with, Linear::dense(1, "a.down", weight(), None).unwrap()];
        let names = |config: BitfitConfig| {
            let adapter = BitfitAdapter::new(config, layers.as_slice()).unwrap();
            (adapter.targets().map(ToString::to_string).collect::<Vec<_>>(), adapter.biases.counts())
        };
        assert_eq!(names(BitfitConfig::default()), (vec!["a.up.bias".to_string()], (1, 0)));
        let all = Some(Modules::Pattern("all-linear".into()));
        let both = vec!["a.down.bias".to_string(), "a.up.bias".to_string()];
        assert_eq!(names(BitfitConfig { target_modules: all.clone(), ..Default::default() }), (both, (2, 1)));
        let without = &layers[1..];
        let adapter = BitfitAdapter::new(BitfitConfig::default(), without).unwrap();
        assert_eq!(adapter.biases.counts(), (1, 1));
        assert!(adapter.note().unwrap().contains("new biases that start at zero"));
    }
}
