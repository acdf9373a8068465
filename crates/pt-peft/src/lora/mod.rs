//! LoRA: a low-rank update beside a frozen linear layer, and its variants: DoRA, rsLoRA, LoRA+, PiSSA, OLoRA, the
//! embedding, biases and single tokens.

mod bias;
mod build;
mod combine;
mod config;
mod dora;
mod embedding;
mod factors;
mod linear;
mod options;
mod start;

pub use combine::{Combination, MajoritySign, Pruning, Sum};
pub use config::LoraConfig;
pub use linear::lora_linear;
pub use options::{BiasMode, LoraInit, TokenIndices};

use crate::Result;
use crate::adapter::{Adapter, Merged, NewWeight, State};
use crate::error::to_model;
use crate::files::{self, Entry};
use crate::saved::SavedModules;
use bias::Biases;
use embedding::{EmbeddingFactors, TokenRows};
use factors::{Factors, Site, bias_change};
use pt_model::{CausalLm, Linear, Sites};
use pt_tensor::Tensor;
use std::path::Path;

/// LoRA on some layers of a model, and what else is trained beside it.
///
/// What is trained are f32 leaves whatever the model computes in; a forward pass uses copies in its kind.
#[derive(Debug)]
pub struct LoraAdapter {
    config: LoraConfig,
    /// By [`Linear::index`].
    factors: Vec<Option<Factors>>,
    embedding: Option<EmbeddingFactors>,
    tokens: Option<TokenRows>,
    biases: Biases,
    saved: SavedModules,
    /// Names of parameters that are replaced whole, and of the output layer's weight where that changes.
    replaced: Vec<String>,
    fan_in_fan_out: bool,
    state: State,
}

impl LoraAdapter {
    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Paths of the adapted linear layers, in model order, with the factor of each update.
    pub fn targets(&self) -> impl Iterator<Item = (&str, f64)> {
        self.factors.iter().flatten().map(|factors| (factors.path.as_str(), factors.scaling))
    }

    /// The trained tensors: their names here, and how files have them.
    fn named(&self) -> Vec<(String, Entry)> {
        let of_layers = self.factors.iter().flatten().map(|factors| (&factors.path, factors.tensors()));
        let of_embedding = self.embedding.iter().map(|embedding| (&embedding.path, embedding.tensors()));
        let updates = of_layers.chain(of_embedding).flat_map(|(path, tensors)| {
            tensors.into_iter().map(move |(part, tensor)| Entry::new(format!("{path}.{part}"), tensor))
        });
        let tokens = self.tokens.iter().map(|tokens| Entry::new(tokens.name(), &tokens.rows));
        let biases = self.biases.named().map(|(name, in_file, value)| (name, Entry::new(in_file, value)));
        let plain = updates.chain(tokens).chain(files::entries_of(&self.saved));
        plain.map(|entry| (entry.name.clone(), entry)).chain(biases).collect()
    }

    /// The tensors of the plain update of twice the rank that stands for one that starts from the model's weights.
    fn converted(&self) -> Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = self.named().into_iter().map(|(_, entry)| entry).collect();
        let mut put = |name: String, value: Tensor| {
            if let Some(entry) = entries.iter_mut().find(|entry| entry.name == name) {
                entry.tensor = value;
            }
        };
        for factors in self.factors.iter().flatten() {
            let (a, b) = factors.converted()?;
            put(format!("{}.lora_A.weight", factors.path), a);
            put(format!("{}.lora_B.weight", factors.path), b);
        }
        if let Some(embedding) = &self.embedding {
            let (a, b) = embedding.converted()?;
            put(format!("{}.lora_embedding_A", embedding.path), a);
            put(format!("{}.lora_embedding_B", embedding.path), b);
        }
        Ok(entries)
    }

    fn factors_of(&self, layer: &Linear) -> Option<&Factors> {
        self.factors.get(layer.index).and_then(Option::as_ref)
    }

    /// The rows that are trained in an output layer, which is tied to the embedding.
    fn tokens_of(&self, layer: &Linear) -> Option<&TokenRows> {
        self.tokens.as_ref().filter(|tokens| tokens.tied_output == Some(layer.index))
    }

    fn site<'a>(&'a self, layer: &'a Linear) -> Site<'a> {
        let dropout = if self.state.is_training.get() { self.config.lora_dropout } else { 0.0 };
        Site { layer, trained_bias: self.biases.get(&layer.path), dropout }
    }

    fn linear_with(&self, layer: &Linear, hidden_states: &Tensor) -> Result<Tensor> {
        if let Some(factors) = self.factors_of(layer) {
            return factors.forward(self.site(layer), hidden_states);
        }
        if let Some(output) = self.saved.linear(layer, hidden_states)? {
            return Ok(output);
        }
        if let Some(tokens) = self.tokens_of(layer) {
            return tokens.logits(hidden_states, &layer.forward(hidden_states)?);
        }
        Ok(match self.biases.get(&layer.path) {
            Some(bias) => layer.weight.project(hidden_states, None)? + bias.to_kind(hidden_states.kind()),
            None => layer.forward(hidden_states)?,
        })
    }

    fn output_with(&self, layer: &Linear, hidden_states: &Tensor) -> Result<(Tensor, Tensor)> {
        if let Some(factors) = self.factors_of(layer) {
            return factors.output(self.site(layer), hidden_states);
        }
        if let Some(tokens) = self.tokens_of(layer) {
            return tokens.output(layer, hidden_states);
        }
        Ok(match self.saved.get(&format!("{}.weight", layer.path)) {
            Some(weight) => (hidden_states.shallow_clone(), weight.to_kind(hidden_states.kind())),
            None => pt_model::Bare.output(layer, hidden_states)?,
        })
    }
}

impl Sites for LoraAdapter {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        if !self.state.is_live() {
            return layer.forward(hidden_states);
        }
        self.linear_with(layer, hidden_states).map_err(to_model)
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        if !self.state.is_live() {
            return pt_model::Bare.output(layer, hidden_states);
        }
        self.output_with(layer, hidden_states).map_err(to_model)
    }

    fn embedding(&self, input_ids: &Tensor, embeddings: Tensor) -> pt_model::Result<Tensor> {
        if !self.state.is_live() {
            return Ok(embeddings);
        }
        let changed = match (&self.embedding, &self.tokens) {
            (Some(factors), _) => factors.forward(input_ids, &embeddings),
            (None, Some(tokens)) => tokens.forward(input_ids, &embeddings),
            (None, None) => Ok(embeddings),
        };
        changed.map_err(to_model)
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        if !self.state.is_live() {
            return None;
        }
        self.saved.parameter(path).or_else(|| self.biases.parameter(path))
    }

    fn set_training(&self, is_training: bool) -> bool {
        self.state.is_training.replace(is_training)
    }
}

impl Adapter for LoraAdapter {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.named().into_iter().map(|(name, entry)| (name, entry.tensor)).collect()
    }

    fn lr_factor(&self, name: &str) -> f64 {
        let Some(ratio) = self.config.loraplus_lr_ratio else { return 1.0 };
        let is_vector = || self.named().iter().any(|(own, entry)| own == name && entry.tensor.dim() == 1);
        if name.ends_with(".lora_B.weight") || is_vector() { ratio } else { 1.0 }
    }

    fn is_saved_converted(&self) -> bool {
        self.factors.iter().flatten().any(|factors| factors.part.is_some())
    }

    fn is_gradient_exact(&self, name: &str) -> bool {
        let is_factor = |part: &str| name.contains(part);
        !self.config.use_dora || !["lora_A.", "lora_B.", "lora_embedding_"].into_iter().any(is_factor)
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
        let output = inner(hidden_states)?;
        if !self.state.is_live() {
            return Ok(output);
        }
        if let Some(factors) = self.factors_of(layer) {
            return factors.around(self.site(layer), hidden_states, output);
        }
        if let Some(tokens) = self.tokens_of(layer) {
            return tokens.logits(hidden_states, &output);
        }
        Ok(match self.biases.get(&layer.path) {
            Some(bias) => {
                let change = bias_change(bias, layer).to_kind(output.kind());
                output + change
            }
            None => output,
        })
    }

    fn replaced_parameters(&self) -> Vec<&str> {
        self.replaced.iter().map(String::as_str).collect()
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let (config, entries) = match self.is_saved_converted() {
            true => (self.config.converted(), self.converted()?),
            false => (self.config.clone(), self.named().into_iter().map(|(_, entry)| entry).collect()),
        };
        let card = files::Card {
            base: config.base_model_name_or_path.as_deref(),
            tag: "lora",
            title: "LoRA adapter",
            settings: config.in_words(),
        };
        files::save(folder, &config.to_peft_text(self.fan_in_fan_out), files::MODULES, entries, &card)
    }

    fn merge_into(&self, model: &mut CausalLm) -> Result<()> {
        self.state.merge(|| {
            // All new weights first: should one fail, the model is as it was.
            let weights = self.merged_weights(&model.linear_layers().collect::<Vec<_>>())?;
            let mut outside = self.saved.outside_layers(model);
            outside.extend(self.biases.outside_layers(model));
            let mut table = |path: &str, values: Tensor| {
                outside.extend(model.parameter(&format!("{path}.weight")).map(|parameter| (parameter, values)));
            };
            if let Some(embedding) = &self.embedding {
                table(&embedding.path, embedding.merged()?);
            }
            if let Some(tokens) = &self.tokens {
                table(&tokens.path, tokens.merged()?);
            }
            Merged::into_model(model, weights, outside)
        })
    }

    fn unmerge_from(&self, model: &mut CausalLm) -> Result<()> {
        self.state.unmerge(&mut model.linear_layers_mut()?)
    }
}

impl LoraAdapter {
    /// [`Adapter::merge_into`] for the linear layers of a model of one's own.
    ///
    /// # Errors
    /// As there.
    pub fn merge_into_layers(&self, layers: &mut [Linear]) -> Result<()> {
        self.state.merge(|| {
            let weights = self.merged_weights(&layers.iter().collect::<Vec<_>>())?;
            let mut merged = Merged::default();
            merged.install(&mut layers.iter_mut().collect::<Vec<_>>(), weights);
            Ok(merged)
        })
    }

    /// [`Adapter::unmerge_from`] for the linear layers of a model of one's own.
    ///
    /// # Errors
    /// As there.
    pub fn unmerge_from_layers(&self, layers: &mut [Linear]) -> Result<()> {
        self.state.unmerge(&mut layers.iter_mut().collect::<Vec<_>>())
    }

    /// The weights and biases of the layers that the adapter changes, summed in f32, or those trained whole.
    fn merged_weights(&self, layers: &[&Linear]) -> Result<Vec<NewWeight>> {
        let mut weights = Vec::new();
        for &layer in layers {
            let index = layer.index;
            if let Some(whole) = self.saved.merged_layer(layer)? {
                weights.push(whole);
            } else if let Some(factors) = self.factors_of(layer) {
                let (weight, bias) = factors.merged(self.site(layer))?;
                weights.push(NewWeight { index, weight, bias });
            } else if let Some(tokens) = self.tokens_of(layer) {
                weights.push(NewWeight { index, weight: tokens.merged_output(layer)?, bias: None });
            } else if let Some(bias) = self.biases.get(&layer.path) {
                let bias = bias.detach().to_kind(layer.weight.kind()).copy();
                weights.push(NewWeight { index, weight: layer.weight.clone(), bias: Some(bias) });
            }
        }
        Ok(weights)
    }
}
